"""Rows, names and records stay what they were: the sequences' fingerprints, and every record in results/.

`python tests/test_fingerprints.py` freezes golden/fingerprints.json anew: right only in a commit that means
to alter rows, instructions or options, the name of a grid's job, or the list of records.
"""

import json
import math
from functools import cache
from pathlib import Path

import pytest
from real_rows import DATA, ROOT, needs_rows

from jumplora.data.backbones import load_backbone
from jumplora.data.benchmark import ORDERS
from jumplora.data.sequences import load_sequence, tales
from jumplora.learning.continual import Method
from jumplora.learning.methods import METHODS, with_settings
from jumplora.learning.tasks import TaskSequence, fingerprint
from jumplora.learning.training import TrainConfig
from jumplora.running.grid import PROTOCOLS, Job, job_sequence, plan
from jumplora.storage.record import Run, plain
from jumplora.storage.state import new_run

STORED = Path(__file__).resolve().parent / "golden" / "fingerprints.json"
FROZEN = json.loads(STORED.read_text("utf-8")) if STORED.is_file() else {}
ADVICE = f"Only a commit that means to alter it freezes it anew, with `python tests/{Path(__file__).name}`."
SHIPPED, BENCHMARK = ("newsroom", "newsroom20"), tuple(f"order{number}" for number in ORDERS)
NAMES = [*SHIPPED, *(pytest.param(name, marks=needs_rows) for name in BENCHMARK)]
ROWS = PROTOCOLS["reduced"]["rows"]  # of every record that is kept in results/
# folders of records for which a seed draws the rows
DRAWN = ("quick", "interference", "ella", "unlisted", "longer", "deeper", "untrained", "gates", "pilot")
PATHS = [path for path in sorted(ROOT.glob("results/*/*/record.json")) if path.parts[-3] not in DRAWN]
RECORDS = {path.parent.relative_to(ROOT / "results").as_posix(): path for path in PATHS}


@cache
def sequence(name: str) -> TaskSequence:
    "A sequence with all its rows. The other orders are made of order4, so that no task is read six times."
    if name in (*SHIPPED, "order1", "order4"):
        return load_sequence(name, DATA if name in BENCHMARK else None)
    return TaskSequence(name, [sequence("order4")[task] for task in ORDERS[int(name.removeprefix("order"))]])


@cache
def reduced(name: str) -> TaskSequence:
    "The rows of a sequence that the records have learned."
    return sequence(name).limit(**ROWS)


def fingerprints(tasks) -> dict[str, str]:
    return {task.name: task.fingerprint() for task in tasks}


def of_sequence(name: str) -> dict:
    return dict(all=fingerprints(sequence(name)), reduced=fingerprints(reduced(name)))


def job_keys() -> list[str]:
    "The folders of a small grid: a grid that is asked for again finds them by these names."
    protocol = PROTOCOLS["reduced"]
    shared = dict(backbone="smollm2-135m", rows=ROWS, train=dict(kept=0.035))
    jobs = plan(METHODS, ["order1", "newsroom"], [42], protocol["strengths"], **shared)
    return [job.key for job in jobs]


# ---- sequences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_has_the_rows_that_were_frozen(name):
    for kind, found in of_sequence(name).items():
        stored = FROZEN["sequences"][name][kind]
        assert list(found) == list(stored), f"{name}: other tasks, or another order. {ADVICE}"
        wrong = {task: (stored[task], found[task]) for task in found if found[task] != stored[task]}
        assert not wrong, f"{name}, {kind} rows: (stored, found) differ in {wrong}. {ADVICE}"


def test_rows_are_limited_in_the_same_way_while_a_sequence_is_loaded():
    frozen = FROZEN["sequences"]["newsroom"]["reduced"]
    assert fingerprints(load_sequence("newsroom", **ROWS)) == frozen
    job = Job("ELLA", "newsroom", 42, "smollm2-135m", rows=ROWS)
    assert fingerprints(job_sequence(job)) == frozen


@needs_rows
def test_a_single_task_of_the_benchmark_has_the_rows_that_it_has_in_its_order():
    job, frozen = Job("single task", "yahoo", 42, "smollm2-135m", rows=ROWS), FROZEN["sequences"]["order1"]
    assert fingerprints(job_sequence(job, str(DATA))) == {"yahoo": frozen["reduced"]["yahoo"]}


def test_the_jobs_of_a_grid_keep_their_names():
    wrong = [pair for pair in zip(FROZEN["jobs"], job_keys(), strict=True) if len(set(pair)) > 1]
    assert not wrong, f"(stored, found) differ: {wrong}. {ADVICE}"


# ---- records ----------------------------------------------------------------------------------------------

# These two were made before the settings existed; what they lack is at its default today.
OLDER = {
    "search/newsroom_smollm2-135m_ella_seed42_06c16e1a": ("train.group_by_length", "regularizer.past_dtype"),
    "search/newsroom_smollm2-135m_ella_seed42_afd34ce3": ("train.group_by_length", "regularizer.past_dtype"),
}


@cache
def tiny():
    "Any model on the CPU in float32: of a backbone, a configuration holds that and the weights' fingerprint."
    return load_backbone("tiny-llama", device="cpu", dtype="float32")[0]


def method_of(run: Run) -> Method:
    "The method of a record, made from today's list and the record's settings."
    settings = {k: v for k, v in run.configuration["method"]["regularizer"].items() if k != "name"}
    return with_settings(METHODS[run.method], **settings)


def asked_again(run: Run, tasks: TaskSequence) -> dict:
    "The configuration that the same request makes today, but for the weights of the backbone."
    settings, split = run.configuration["train"], run.configuration["scored_split"]
    fresh = new_run(tiny(), tasks, method_of(run), TrainConfig(**settings), seed=run.seed, split=split)
    return plain(fresh.configuration | {"weights": run.configuration["weights"]})


def tasks_of(run: Run) -> TaskSequence:
    "The rows that a record names: of its sequence, or of the order that holds its one task."
    if METHODS[run.method].training != "isolated":
        return reduced(run.sequence)
    return TaskSequence(run.sequence, [reduced("order1")[run.sequence]])


def records(learned: bool = False) -> list:
    "Every record; where its rows must be read, those of the benchmark only where they are."
    shipped = {name for name in RECORDS if Path(name).name.split("_")[0] in SHIPPED}
    marks = {name: needs_rows if learned and name not in shipped else () for name in RECORDS}
    return [pytest.param(name, marks=marks[name]) for name in RECORDS]


@pytest.mark.parametrize("folder", ["quick", "interference", "unlisted"])
def test_drawn_rows_are_those_that_the_records_name(folder):
    run = Run.load(min(ROOT.glob(f"results/{folder}/*/record.json")))
    counts = map(max, zip(*run.configuration["counts"].values(), strict=True))
    found = load_sequence(run.sequence, **dict(zip(("train", "dev", "test"), counts, strict=True)))
    assert list(found.names) == run.tasks and fingerprints(found) == run.configuration["rows"]


def test_the_neutral_texts_are_those_of_the_study():
    assert len(tales()) == 48 and fingerprint(text.encode() for text in tales()) == "2abf6fd0913f826a"


def test_all_records_are_found():
    assert list(RECORDS) == FROZEN["records"], ADVICE


@pytest.mark.parametrize("name", records())
def test_a_record_holds_the_same_when_it_is_written_again(name, tmp_path):
    run = Run.load(RECORDS[name])
    assert run.name == Path(name).name and run.complete
    old = json.loads(RECORDS[name].read_text("utf-8"))
    new = json.loads(run.save(tmp_path).read_text("utf-8"))
    before, after = old.pop("metrics"), new.pop("metrics")
    before.pop("micro_average", None)  # only older records have it
    assert before.keys() <= after.keys()  # metrics may be added
    for key, value in before.items():  # sums, perhaps in another order
        assert value == after[key] or math.isclose(value, after[key], rel_tol=1e-12)
    del new["checksum"], old["checksum"]  # over the metrics too
    assert list(new) == list(old) and new == old


@pytest.mark.parametrize("name", records(learned=True))
def test_the_same_request_makes_the_same_configuration_and_the_same_name(name):
    run = Run.load(RECORDS[name])
    found = asked_again(run, tasks_of(run))
    for place in OLDER.get(name, ()):
        part, key = place.split(".")
        values = found["train"] if part == "train" else found["method"][part]
        assert values.pop(key) in (False, "float32")
    assert found == run.configuration
    again = dict(method=run.method, seed=run.seed, backbone=run.backbone, configuration=found)
    again |= dict(sequence=tasks_of(run).name, tasks=list(tasks_of(run).names), test_rows=run.test_rows)
    assert Run(**again).name == Path(name).name


if __name__ == "__main__":
    known = FROZEN.get("sequences", {})
    present = [name for name in (*SHIPPED, *BENCHMARK) if name in SHIPPED or (DATA / "tasks.json").is_file()]
    rows = known | {name: of_sequence(name) for name in present}
    frozen = dict(sequences=rows, jobs=job_keys(), records=list(RECORDS))
    STORED.write_text(json.dumps(frozen, indent=1) + "\n", "utf-8")
