"""Wild input for everything that a user or a broken disk can hand to the package.

    python tests/fuzz.py --cases 200 --out results/torture/fuzz.json

Each check draws input, hands it over, and asserts: it is either taken, and then right, or refused by
a ValueError, TypeError or OSError whose text names the thing; and nothing appears outside of the
folder that was given. Every call draws the same input. `fuzz_models.py` holds more checks.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from equal_runs import entries, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_bad_input import ANYTHING, BRACES, CONTROL, LONG

from jumplora.command_line import chosen_methods, swept
from jumplora.command_line import main as command
from jumplora.conventions import write_atomic
from jumplora.data.benchmark import read_folder
from jumplora.learning import evaluation
from jumplora.learning.evaluation import evaluate
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.method.adapter import JumpLoraConfig
from jumplora.running.grid import Job, job_method, plan, status
from jumplora.storage import record as records
from jumplora.storage.record import Run, digest, read_tensors, write_tensors
from jumplora.storage.state import Checkpoint, load_state
from jumplora.storage.updates import ArchiveHeader, archive_path, read_archive, sparse_update

# ---- what is drawn ----------------------------------------------------------------------------------------


def one_of(*values):
    "A strategy of fixed values."
    return st.sampled_from(values)


RIGHT_TO_LEFT = st.text(st.sampled_from("\u202e\u2067\u200fمرحبا שלום ab"), max_size=20)
HALVES = st.text(st.characters(codec=None, categories=["Cs", "Ll"]), min_size=1, max_size=6)
WORDS = one_of(
    "", " ", "a", "A", "a b", "ab", "abc", "a,b", "a|b", "a, b", "{a}", "{0}", "%s", "../a", "a" * 100_000
)
TEXTS = st.one_of(WORDS, BRACES, CONTROL, RIGHT_TO_LEFT, HALVES, ANYTHING, LONG)
PATHS = one_of("..", "../x", "../../etc/passwd", "/tmp/x", "a/b", "a\\b", "~", "", ".", "x\x00y", "x" * 300,
               "rows.json", "\ud800")  # fmt: skip
EXTREME = one_of(10**400, -(10**30), 2**31, 2**63, 1e308, 5e-324, math.nan, math.inf, True, False)
NUMBERS = st.one_of(st.integers(-2, 40), st.floats(), EXTREME)
SMALL = st.one_of(st.none(), NUMBERS, WORDS, PATHS, HALVES)
JUNK = st.recursive(
    SMALL, lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS | PATHS, x, max_size=3), max_leaves=5
)
DEEP = st.integers(300, 3000).map(lambda n: b"[" * n + b"]" * n)
ODD_JSON = (b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 5000, b'"\\ud800"', b"\xff\xfe", b"")
HUGE = one_of(*ODD_JSON, b"null", b"[]", b"{}")


@st.composite
def damaged(draw, good: bytes) -> bytes:
    "A file's bytes after something happened to them."
    at = draw(st.integers(0, len(good) - 1))
    kind = draw(one_of("flip", "cut", "grow", "hole", "other"))
    if kind == "flip":
        return good[:at] + bytes([good[at] ^ draw(st.integers(1, 255))]) + good[at + 1 :]
    if kind == "cut":
        return good[:at]
    if kind == "grow":
        return good + draw(st.binary(min_size=1, max_size=9))
    if kind == "hole":
        return good[:at] + draw(st.binary(max_size=9)) + good[at + draw(st.integers(0, 40)) :]
    return draw(DEEP | HUGE | st.binary(max_size=40))


def put(value: dict, path: list[str], new: object) -> dict:
    "A copy with another value at one place."
    first, *rest = path
    return value | {first: put(value[first], rest, new) if rest else new}


# ---- what must hold ---------------------------------------------------------------------------------------


class Refused(Exception):
    "The input was refused as it should be."


@contextlib.contextmanager
def taken_or_refused(*names: str):
    "Let a clear refusal end the block; everything else is a failure."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, OSError, TypeError) as error:
        message = str(error)
        assert not isinstance(error, (UnicodeError, json.JSONDecodeError)), f"names nothing: {error!r}"
        assert any(name in message for name in names), f"{message!r:.300} names none of {names}"
        raise Refused from None


@contextlib.contextmanager
def inside():
    "A folder to work in; nothing beside it may change."
    secret = b'[{"text": "a secret", "label": "a"}]'
    with tempfile.TemporaryDirectory() as parent:
        parent = Path(parent)
        (parent / "secret.json").write_bytes(secret)
        (parent / "inside").mkdir()
        yield parent / "inside"
        beside = {name: data for name, data in files(parent).items() if name.parts[0] != "inside"}
        assert beside == {Path("secret.json"): secret}


def check(function):
    "Run a check so that a proper refusal is a pass."

    @functools.wraps(function)
    def call(*args, **options):
        with contextlib.suppress(Refused):
            function(*args, **options)

    return call


def shell(*words: object) -> str:
    "What the command prints; an exception that it does not turn into a message fails the check."
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = command(list(map(str, words)))
    assert code in (0, 1, 2) and "Traceback" not in out.getvalue()
    return out.getvalue()


def to_disk(path: Path, value: object) -> None:
    "Bytes, or JSON as any program may write it, NaN and half characters included."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode("ascii"))


# ---- settings ---------------------------------------------------------------------------------------------

TRAIN = [item.name for item in fields(TrainConfig)]


@given(st.dictionaries(st.sampled_from(TRAIN), JUNK | TEXTS | NUMBERS, max_size=3))
@check
def settings_of_a_training(values):
    with taken_or_refused(*values, "start="):
        config = TrainConfig(**values)
    described = config.describe()
    assert digest(described) and json.loads(json.dumps(described, allow_nan=False))
    for name in ("rank", "batch_size", "gradient_accumulation", "max_length"):
        assert type(getattr(config, name)) is int and 1 <= getattr(config, name) < 2**63
    for name in ("lora_alpha", "learning_rate", "epochs", "max_grad_norm", "bandwidth"):
        assert 0 < float(getattr(config, name)) < math.inf
    assert 0 <= float(config.lora_dropout) < 1 and 0 <= config.gate_start <= config.gate_stop <= 1


GATE = one_of("threshold_scope", "threshold_reduction", "threshold_parametrization", "bandwidth", "r")


@given(st.dictionaries(GATE, SMALL, max_size=2))
@check
def settings_of_an_adapter(values):
    with taken_or_refused(*values):
        config = JumpLoraConfig(**values)
    assert config.threshold_scope in ("model", "block", "layer") and 0 < config.bandwidth < math.inf
    assert json.loads(json.dumps(config.to_dict(), default=str, allow_nan=False))


def pairs(names, values):
    "Words like NAME=VALUE."
    return st.builds("{}={}".format, names, values)


NAMES = one_of(*METHODS, "ELLA+JumpLoRA", "ella", "", "../ELLA") | TEXTS
PRICES = pairs(one_of("ELLA", "O-LoRA", "EWC", "N-LoRA", "IncLoRA", ""), TEXTS | NUMBERS.map(str))
LISTS = st.lists(NUMBERS.map(str), min_size=1, max_size=4).map(lambda values: "ELLA=" + ",".join(values))


@given(st.lists(NAMES, min_size=1, max_size=3), st.lists(PRICES | LISTS | TEXTS, max_size=3), SMALL)
@check
def methods_and_strengths(names, strengths, dtype):
    with taken_or_refused("method", "strength", "past_dtype"):
        methods = chosen_methods(names, strengths, "newsroom", dtype)
    for method in methods:
        assert method.name in METHODS and digest(method.describe())
        found = getattr(method.regularizer, "strength", 0.0)
        assert all(0 <= value < math.inf for value in (found if isinstance(found, tuple) else [found]))


VALUES = TEXTS | NUMBERS.map(str) | DEEP.map(bytes.decode) | JUNK.map(repr)


@given(st.lists(pairs(st.sampled_from(TRAIN) | TEXTS, VALUES) | TEXTS, max_size=3))
@check
def settings_that_are_swept(words):
    names = [repr(word) for word in words] + [n for w in words if len((n := w.partition("=")[0]).strip()) > 1]
    with taken_or_refused("NAME=VALUE", "setting", *TRAIN, "start=", *names):
        jobs = []
        for train in swept(words):
            if len(train) < 9:
                jobs += plan(["ELLA"], ["order1"], [1], backbone="tiny", train=train)
        for job in jobs:
            job_method(job)
    for job in jobs:
        assert Path(job.key).name == job.key and len(job.key.encode()) < 255


# ---- tasks ------------------------------------------------------------------------------------------------

LABELS = one_of("a", "a b", "a b c", "ab", "A", "a,b", "a, b", "a|b", "x", "{0}")
ROW = st.tuples(TEXTS, LABELS | TEXTS) | JUNK | st.fixed_dictionaries(dict(text=TEXTS, label=LABELS))
GOOD_ROW = st.tuples(ANYTHING.filter(str.strip), one_of("a", "a b", "ab"))
ROWS = st.lists(GOOD_ROW, min_size=1, max_size=4) | st.lists(ROW, max_size=3)
OPTIONS = st.just(("a", "a b", "ab")) | st.lists(LABELS | TEXTS, max_size=4) | JUNK


@given(st.just("t") | TEXTS | PATHS, st.just("Which?\n") | TEXTS | JUNK, OPTIONS, ROWS, ROWS, TEXTS | JUNK)
@check
def tasks_made_of_anything(name, instruction, options, rows, test, note):
    with taken_or_refused("task", "Task"):
        made = Task(name, instruction, options, rows, rows, test, note)
    assert len(made.train) == len(rows) and len(made.test) == len(test) and made.fingerprint()
    assert made.outside_options == sum(row.label not in made.options for row in made.test)
    assert all(row.label in made.options for row in made.train)
    for row in made.train:
        asked = made.prompt(row.text)
        assert asked.encode() and asked.endswith(f"\nText: {row.text}\nAnswer:")
        assert asked.startswith(f"Task Instruction: {instruction}\nOptions: {' | '.join(made.options)}\n")
    TaskSequence("one", [made]).table().to_string().encode()


@given(
    st.lists(TEXTS | PATHS | one_of("a", "A", "b"), max_size=3), TEXTS | PATHS, st.tuples(SMALL, SMALL, SMALL)
)
@check
def sequences_and_names(names, name, counts):
    rows = [("one", "a"), ("two", "b")]
    named = ("Task.name", "sequence", "TaskSequence.name", "train=", "dev=", "test=")
    with inside() as folder, taken_or_refused(*named):
        made = TaskSequence(name, [Task(each, "", ("a", "b"), rows, rows, rows) for each in names])
        for i, task in enumerate(made.names):
            assert archive_path(folder, i, task).resolve().parent == folder.resolve() / "updates"
            write_atomic(archive_path(folder, i, task), "")
        made.limit(*counts)


@given(TEXTS | PATHS, TEXTS | PATHS, TEXTS | PATHS)
@check
def runs_called_anything(method, backbone, sequence):
    with inside() as folder, taken_or_refused("method", "backbone", "sequence"):
        run = Run(method, backbone, sequence, seed=1, tasks=["a"], test_rows=[1], configuration={})
        record = run.save(folder)
        assert record.parent.parent == folder and Run.load(record).to_dict() == run.to_dict()


SPLIT_FILES = dict(train="rows.json", dev="rows.json", test="rows.json")
ENTRY = dict(
    name="topics", instruction="Topic?\n", options=["a", "b"], note="", use={}, sha256={}, files=SPLIT_FILES
)
ON_DISK = json.dumps([dict(text="one", label="a"), dict(sentence="two", label="b")]).encode()
PLACES = one_of(["files", "train"], *([key] for key in ENTRY))
USES = st.fixed_dictionaries(dict(train=SMALL | st.just(["dev"])))


@given(PLACES, JUNK | PATHS | USES, st.just(ON_DISK) | damaged(ON_DISK))
@check
def lists_of_tasks_on_disk(place, value, content):
    with inside() as folder:
        to_disk(folder / "rows.json", content)
        to_disk(folder / "tasks.json", [put(ENTRY, place, value)])
        with taken_or_refused("task", "Task.name", str(folder)):
            found = read_folder(folder)
            assert not any("secret" in row.text for task in found for row in task.train)
            assert "secret" not in shell("data", "check", folder)


TABLE_ROWS = st.lists(st.fixed_dictionaries(dict(text=SMALL, label=SMALL)), max_size=3)


@given(one_of("train.json", "dev.json", "test.json", "labels.json"), damaged(ON_DISK) | JUNK | TABLE_ROWS)
@check
def folders_in_the_public_layout(name, content):
    with inside() as folder:
        for split in ("train", "dev", "test"):
            to_disk(folder / "TC" / "topics" / f"{split}.json", ON_DISK)
        to_disk(folder / "TC" / "topics" / name, content)
        with taken_or_refused("topics", str(folder)):
            assert len(read_folder(folder)) == 1
        shell("data", "check", folder)


PARQUET = io.BytesIO()
pq.write_table(pa.table(dict(text=["one", "two"], label=["a", "b"])), PARQUET)


@given(damaged(PARQUET.getvalue()))
@check
def parquet_files(content):
    with inside() as folder:
        for split in ("train", "dev", "test"):
            to_disk(
                folder / "topics" / f"{split}.parquet", content if split == "train" else PARQUET.getvalue()
            )
        with taken_or_refused("topics", str(folder)):
            read_folder(folder)


# ---- records ----------------------------------------------------------------------------------------------


def whole_run() -> Run:
    "A record with something in every field."
    return Run(
        "ELLA", "tiny", "two", seed=1, tasks=["a", "b"], test_rows=[2, 2],
        configuration=dict(method=dict(name="ELLA", after_task="merge"), train=dict(rank=8), weights="w"),
        accuracy=[[50.0, math.nan], [25.0, 75.0]],
        option_accuracy=[[50.0, math.nan], [25.0, 75.0]],
        zero_shot=[10.0, 20.0],
        zero_shot_options=[10.0, 20.0],
        sparsity=dict(a=dict(q=0.5)),
        thresholds=dict(a=[dict(step=1, interpolation=0.5, threshold=dict(model=0.1))]),
        seconds=dict(evaluate=[1.0, 1.0], merge=[0.1, 0.1], train=[1.0, 2.0]),
        environment=dict(device="cpu"),
        extra=dict(state_tasks=2, notes=dict(a="a note")),
        peak_memory=1000,
    )  # fmt: skip


RECORD = whole_run().to_dict()


def checksum_or_none(function, *values) -> str:
    "A checksum that matches, where the values can have one."
    try:
        return function(*values)
    except ValueError:
        return "none"


def signed(record: dict) -> bytes:
    "With a checksum that matches, where a record can have one."
    unsigned = {key: value for key, value in record.items() if key != "checksum"}
    return json.dumps(record | dict(checksum=checksum_or_none(digest, unsigned))).encode()


@given(damaged(signed(RECORD)))
@check
def damaged_records(content):
    with inside() as folder:
        path = folder / "run" / "record.json"
        write_atomic(path, content)
        shell("show", path), shell("table", folder)
        with taken_or_refused(str(path)):
            assert Run.load(path).to_dict() == RECORD


DEEP_PLACES = ("configuration method", "sparsity a", "sparsity a q", "seconds train", "extra notes")
FIELDS = one_of(*([key] for key in RECORD), *map(str.split, DEEP_PLACES))


@given(FIELDS, JUNK | st.lists(JUNK, max_size=2))
@check
def records_with_wrong_types(place, value):
    with inside() as folder:
        path = folder / "run" / "record.json"
        write_atomic(path, signed(put(RECORD, place, value)))
        shell("show", path), shell("table", folder)
        with taken_or_refused(str(path)):
            run = Run.load(path)
        again = Run.load(run.save(folder))
        assert again.to_dict() == run.to_dict() and Path(run.name).name == run.name


# ---- states and archives ----------------------------------------------------------------------------------

TENSORS = {"weight.q": torch.arange(6.0).view(2, 3), "adapter.A": torch.ones(2)}
OWNER = dict(run="r", task=1)
ABOUT = dict(tasks=1, owner=OWNER)


def state_bytes(tensors: dict = TENSORS, about: object = ABOUT, note: dict | None = None) -> bytes:
    "A file as `write_tensors` makes it, or with another note; the checksum matches where there can be one."
    checksum = checksum_or_none(records.tensors_checksum, tensors, about)
    made = dict(format=records.FORMAT, checksum=checksum, about=about) | (note or {})
    return save(tensors, metadata={"jumplora": json.dumps(made)})


@given(damaged(state_bytes()))
@check
def damaged_states(content):
    with inside() as folder:
        path = folder / "state" / "after-1.safetensors"
        checksum = write_tensors(path, TENSORS, ABOUT)
        path.write_bytes(content)
        with taken_or_refused(str(path)):
            tensors, _, _ = read_tensors(path)
            assert tensors.keys() == TENSORS.keys()
            assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
            (weight,) = load_state(folder, 1, checksum)["weight"].items()
            assert weight[0] == "q" and torch.equal(weight[1], TENSORS["weight.q"])


NOTES = st.dictionaries(one_of("format", "checksum", "about"), JUNK, max_size=1)


@given(JUNK, NOTES, one_of("weight.q", "q", "new.q", ""))
@check
def states_with_wrong_types(about, note, name):
    with inside() as folder:
        path = folder / "state" / "after-1.safetensors"
        content = state_bytes({name: torch.ones(2)}, about, note)
        write_atomic(path, content)
        step = Checkpoint(path, OWNER)
        with taken_or_refused(str(path)):
            load_state(folder, 1, read_tensors(path)[2])
        write_atomic(path, content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert step.read() is None or about["owner"] == OWNER


DELTA = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, -1.0]])
HEADER = ArchiveHeader("a", 0, "ELLA", "tiny", "base", "before", "update", {"q": [2, 3]}, 0.5, "float32")
UPDATE = entries("q", sparse_update(DELTA))


def archive_bytes(header: dict, tensors: dict) -> bytes:
    "A file with a checksum that matches, where it can have one."
    return state_bytes(tensors, header)


@given(damaged(archive_bytes(asdict(HEADER), UPDATE)))
@check
def damaged_archives(content):
    with inside() as folder:
        path = archive_path(folder, 0, "a")
        write_tensors(path, UPDATE, asdict(HEADER))
        path.write_bytes(content)
        with taken_or_refused(str(path)):
            assert torch.equal(read_archive(path).update("q").dense(), DELTA)


NUMBERED = st.lists(st.integers(-2, 7), max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.int32)
)
VALUED = st.lists(st.floats(width=32), max_size=4).map(torch.tensor)
ODD = {"q.indices": NUMBERED | VALUED, "q.values": VALUED | NUMBERED}
ODD |= {"q.A": VALUED | st.just(torch.ones(1, 3)), "q.B": VALUED | st.just(torch.ones(2, 1))}
ODD |= {"q.scaling": VALUED | st.just(torch.ones(()))}
SHAPES = st.fixed_dictionaries(dict(q=st.lists(st.integers(-3, 4) | SMALL, max_size=3)))
HEADER_FIELDS = one_of(*(item.name for item in fields(ArchiveHeader)))


@given(HEADER_FIELDS, JUNK | SHAPES | st.just("factors"), st.fixed_dictionaries({}, optional=ODD))
@check
def archives_with_wrong_types(name, value, tensors):
    with inside() as folder:
        path = archive_path(folder, 0, "a")
        write_atomic(path, archive_bytes(asdict(HEADER) | {name: value}, UPDATE | tensors))
        with taken_or_refused(str(path)):
            archive = read_archive(path)
            for layer in archive.header.layers:
                assert torch.isfinite(archive.update(layer).dense()).all()
            assert archive.exact in (True, False)


# ---- grids ------------------------------------------------------------------------------------------------

JOB = Job("ELLA", "order1", 1, "tiny")
JOBS = dict(format=2, jobs={JOB.key: asdict(JOB)})
KEYS = one_of("format", "jobs", "run", "error", JOB.key)
GRIDS = st.dictionaries(KEYS, JUNK | one_of(2, "x", JOBS["jobs"]), max_size=3)


@given(one_of("jobs.json", f"jobs/{JOB.key}/run.json"), GRIDS | damaged(json.dumps(JOBS).encode()) | JUNK)
@check
def grids_on_disk(name, content):
    with inside() as folder:
        to_disk(folder / "jobs.json", JOBS)
        to_disk(folder / name, content)
        shell("grid", "--status", "--out", folder)
        with taken_or_refused(str(folder)):
            table = status(folder)
            assert len(table) <= 1 and set(table["state"]) <= {"done", "running", "failed", "waiting"}


@given(one_of(*(item.name for item in fields(Job))), JUNK)
@check
def jobs_with_wrong_types(name, value):
    with inside() as folder:
        job = asdict(JOB) | {name: value}
        with contextlib.suppress(TypeError, ValueError, AttributeError, OSError):
            to_disk(folder / "jobs.json", dict(format=2, jobs={Job(**job).key: job}))
        with taken_or_refused(str(folder)):
            status(folder).to_string()
        shell("grid", "--status", "--out", folder)


# ---- scores -----------------------------------------------------------------------------------------------

ANSWERS = one_of("a", " A ", "a  b", "A\tB", "ab", "a b c", "", "a.", "x", "a,b", "\ufeffa") | ANYTHING
ANSWERED = one_of("a", "a b", "ab", "a,b", "A", "x", "a  b")


@given(st.lists(st.tuples(ANSWERS, ANSWERED, st.permutations([1.0, 2.0, 3.0, 4.0])), min_size=1, max_size=12))
@check
def scores_of_any_answers(rows):
    options = ("a", "a b", "ab", "a,b")
    task = Task("t", "", options, [("text", "a")], [], [("text", label) for _, label, _ in rows])
    given_back = [text for text, _, _ in rows], torch.tensor([numbers for _, _, numbers in rows])
    with patch.object(evaluation, "answer", lambda *args, **options: given_back):
        score = evaluate(torch.nn.Identity(), None, task)
    right = likeliest = 0
    for text, label, numbers in rows:  # the same in other words
        right += label in options and text.casefold().split() == label.casefold().split()
        likeliest += options[max(range(4), key=lambda i: numbers[i])] == label
    assert score.rows == len(rows)
    assert math.isclose(score.exact_match, 100 * right / len(rows))
    assert math.isclose(score.option_accuracy, 100 * likeliest / len(rows))


CHECKS = [value for value in dict(globals()).values() if getattr(value, "is_hypothesis_test", False)]


def attack(test, cases: int) -> int:
    "Run one check on so many cases; returns how many there were, which may be fewer where few exist."
    count, inner = [0], test.hypothesis.inner_test

    @functools.wraps(inner)
    def counted(*args, **options):
        count[0] += 1
        return inner(*args, **options)

    test.hypothesis.inner_test = counted
    quiet = dict(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    try:
        settings(max_examples=cases, print_blob=False, **quiet)(test)()
    finally:
        test.hypothesis.inner_test = inner
    return count[0]


def main() -> int:
    "The command."
    parser = argparse.ArgumentParser(description="Wild input, a few thousand times.")
    parser.add_argument("--cases", type=int, default=200, help="of each check")
    parser.add_argument("--out", type=Path, help="a file for the record; none: only print")
    flags, found, failed, start = parser.parse_args(), {}, {}, time.perf_counter()
    from fuzz_models import CHECKS as MORE  # it imports from this file

    for test in (*CHECKS, *MORE):
        try:
            found[test.__name__] = attack(test, flags.cases)
        except Exception as error:
            failed[test.__name__] = f"{type(error).__name__}: {error}"[:300]
        print(test.__name__, found.get(test.__name__, failed.get(test.__name__)), flush=True)
    call = "python tests/fuzz.py " + " ".join(sys.argv[1:])
    record = dict(command=call, passed=not failed, total=sum(found.values()), cases=found, failed=failed)
    record |= dict(seconds=round(time.perf_counter() - start, 1), environment=records.environment("cpu"))
    if flags.out:
        write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
    print(f"{record['total']} cases, {len(failed)} checks failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
