"""Taking a task out again: every bit accounted for, nothing believed unchecked."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import entries, files
from safetensors.torch import load_file

from jumplora.conventions import write_atomic
from jumplora.data.backbones import load_backbone
from jumplora.data.sequences import load_sequence
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.results.run_tables import load_runs
from jumplora.storage import rollback as page
from jumplora.storage.record import Run, write_tensors
from jumplora.storage.rollback import add_archives, load_archives, load_without, rollback
from jumplora.storage.state import load_start, new_run
from jumplora.storage.updates import UpdateArchive, archive_path, read_archive, sparse_update

BALL = [("a ball", "sport"), ("an atom", "physics")] * 4
RAIN = [("rain", "yes"), ("sun", "no")] * 4
FORK = [("a fork", "table"), ("a tree", "forest")] * 4
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
    Task("places", "Where?\n", ("table", "forest"), FORK, FORK[:2], FORK[:4]),
)
SEQUENCE, PAIR = TaskSequence("short", TASKS), TaskSequence("pair", TASKS[:2])
QUICK = TrainConfig(batch_size=8, epochs=5, learning_rate=1e-2, max_length=120, kept=0.05)
GATED = Method("IncLoRA + JumpLoRA", gated=True)


@dataclass
class Result:
    "A run, its folder, the model it ended with, and its float32 weights: at first, and after each task."

    run: Run
    folder: Path
    model: torch.nn.Module
    weights: list[dict]

    def place(self, task):
        return self.folder / f"rollback-{task}"

    def archive(self, i):
        return archive_path(self.folder, i, self.run.tasks[i])

    def without(self, task):
        stored = load_file(self.place(task) / "weights.safetensors")
        return {name.removesuffix(".weight"): weight for name, weight in stored.items()}

    def others(self, k, archives):
        "The base and all updates but one."
        return add_archives(self.weights[0], archives[:k] + archives[k + 1 :])


def learn(out, method=GATED, backbone="tiny-llama", dtype="float32", sequence=SEQUENCE):
    "One run on a fresh backbone, its weights copied at the end of every task."
    weights, real = [], continual.Learner.finish

    def watched(learner, i, log):
        before = {name: weight.clone() for name, weight in learner.weights.items()}
        real(learner, i, log)
        after = {name: weight.clone() for name, weight in learner.weights.items()}
        weights.extend([after] if weights else [before, after])

    model, tokenizer = load_backbone(backbone, device="cpu", dtype=dtype)
    options = dict(seed=1, out=out, backbone=backbone, progress=False, zero_shot=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual.Learner, "finish", watched)
        run = learn_sequence(model, tokenizer, sequence, method, QUICK, **options)
    return Result(run, Path(out) / run.name, model, weights)


KINDS = {
    "gated": dict(),
    "gated, bfloat16": dict(dtype="bfloat16", sequence=PAIR),
    "gated, encoder-decoder": dict(backbone="tiny-t5", sequence=PAIR),
    "no gate": dict(method=Method("IncLoRA"), sequence=PAIR),
}
PLACES = [(kind, k) for kind, options in KINDS.items() for k in range(2 if "sequence" in options else 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return {kind: learn(tmp_path_factory.mktemp("runs"), **given) for kind, given in KINDS.items()}


@pytest.fixture
def copied(results, tmp_path):
    "A copy of a run, to be changed or damaged."

    def copy(kind):
        old = results[kind]
        return replace(old, folder=Path(shutil.copytree(old.folder, tmp_path / "runs" / old.folder.name)))

    return copy


@pytest.fixture
def gated(copied):
    return copied("gated")


def same_bits(one, other):
    "Whether named float32 tensors agree in every bit, the sign of zero included."
    same = (torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one)
    return one.keys() == other.keys() and all(same)


def rewrite(result, i, factor=1, **about):
    "Write archive i again, changed, with a good checksum in the record."
    found, tensors = read_archive(result.archive(i)), {}
    for layer in found.header.layers:
        update = found.update(layer)
        tensors |= entries(layer, replace(update, values=factor * update.values))
    run, header = Run.load(result.folder), asdict(found.header) | about
    run.extra["archives"][run.tasks[i]]["checksum"] = write_tensors(result.archive(i), tensors, header)
    run.save(result.folder.parent)


def test_a_model_that_is_given_as_base_is_not_changed(copied):
    result = copied("gated")
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for task in result.run.tasks[:2]:
        found = rollback(result.folder, task, SEQUENCE, backbone=(model, tokenizer))
        assert found.scores and all(torch.equal(before[n], w) for n, w in model.state_dict().items())


# ---- what is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, k", PLACES)
def test_a_task_is_taken_out_bit_for_bit(copied, kind, k):
    result = copied(kind)
    folder, before, task = result.folder, files(result.folder), result.run.tasks[k]
    found, archives = rollback(folder, task), load_archives(folder, result.run)
    assert found.bound == 0 and found.task == task and found.tasks == result.run.tasks
    weights = result.without(task)
    assert same_bits(weights, result.others(k, archives))
    if task == found.tasks[-1]:
        assert same_bits(weights, result.weights[k])  # the weights that the last task began with
    changed = sum((archives[k].update(name).dense() != 0).sum().item() for name in weights)
    assert (found.changed, found.entries) == (changed, sum(w.numel() for w in weights.values()))
    after = files(folder)
    assert before.items() <= after.items()
    names = {path.as_posix() for path in after.keys() - before.keys()}
    assert names == {f"rollback-{task}/{n}" for n in ("weights.safetensors", "rollback.json", "report.md")}
    model, _, run = load_without(folder, task, device="cpu")
    assert run.name == result.run.name and len(load_runs(folder.parent)) == 1  # not a run of its own
    for name, weight in weights.items():
        own = model.get_submodule(name).weight
        assert own.dtype == result.model.dtype and torch.equal(own, weight.to(own.dtype))


@pytest.mark.parametrize("k", [0, 1])
def test_factors_on_another_processor_stay_within_the_stated_bound(copied, k, monkeypatch):
    result = copied("no gate")
    exact = load_archives(result.folder, result.run)
    wanted = result.others(k, exact)

    def rounded(archive, layer):  # in another order, and half as badly as is allowed
        A, B, s = (archive.tensors[f"{layer}.{part}"].double() for part in ("A", "B", "scaling"))
        return sparse_update((s * (B @ A)).float() * (1 + 2.0**-13))

    monkeypatch.setattr(UpdateArchive, "update", rounded)
    assert not exact[0].exact
    found = rollback(result.folder, result.run.tasks[k])
    left = result.without(found.task)
    error = max((left[name] - weight).abs().max().item() for name, weight in wanted.items())
    assert error <= found.bound and 0 < found.bound < 1e-3


def test_a_report_names_what_was_done_and_how_exactly(gated):
    rollback(gated.folder, "topics")
    report = (gated.place("topics") / "report.md").read_text()
    assert f"# topics taken out of {gated.run.name}" in report and "kept as they were learned" in report
    assert "base and other updates, in order, bit for bit" in report and "| task |" not in report
    assert re.search(r"touched (\d+) of (\d+) entries \((\d+\.\d\d)%\)", report)
    rounded = page.rollback_report(page.TakenOut("run", "b", ["a", "b"], 1, 4, 2.5e-3, {"a": [1.0] * 4}))
    assert "as it was before that task, to 2.5e-03 in every entry" in rounded and "(25.00%)" in rounded
    assert "kept as they were" not in rounded and "| a | 1.0 | 1.0 | 1.0 | 1.0 |" in rounded


def test_scores_without_the_last_task_are_those_of_the_row_before(gated):
    found, run = rollback(gated.folder, "places", SEQUENCE), gated.run
    for j, task in enumerate(run.tasks):
        match, after, options, options_after = found.scores[task]
        assert (match, options) == (run.accuracy[2, j], run.option_accuracy[2, j])
        if j < 2:
            assert (after, options_after) == (run.accuracy[1, j], run.option_accuracy[1, j])
    assert "| weather |" in (gated.place("places") / "report.md").read_text()
    facts = json.loads((gated.place("places") / "rollback.json").read_text())
    assert facts["scores"] == found.scores and facts["bound"] == 0


def test_a_merged_task_that_is_not_scored_yet_can_be_taken_out(gated):
    run = Run.load(gated.folder)
    run.accuracy[2, 1:], run.extra["state_tasks"] = np.nan, 3  # killed while its scores were taken
    del run.right[run.tasks[2]]
    run.save(gated.folder.parent)
    assert run.finished == 2
    found = rollback(gated.folder, "places", SEQUENCE)
    assert found.bound == 0 and found.tasks == run.tasks and np.isnan(found.scores["places"][0])
    assert "| places | nan | " in (gated.place("places") / "report.md").read_text()


# ---- refusals --------------------------------------------------------------------------------------------


def edit(change):
    "Change the record of a run."

    def prepare(gated):
        run = Run.load(gated.folder)
        change(run)
        run.save(gated.folder.parent)

    return prepare


def flip_last_byte(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


AGAIN = "learn it again elsewhere, with archive=True"
REFUSED = [  # the task, the message, and what is done to the run before, or which rows are to be scored
    ("tpoics", "task='tpoics' is not known.*did you mean 'topics'", None),
    ("../x", "task='../x' is not known", None),
    ("topics", "taken out before; delete .*rollback-topics", lambda g: rollback(g.folder, "topics")),
    ("places", "02-weather.*checksum does not match", lambda g: flip_last_byte(g.archive(1))),
    ("topics", "02-weather.*missing", lambda g: g.archive(1).unlink()),
    ("topics", "02-weather.*not the file that the", lambda g: shutil.copy(g.archive(0), g.archive(1))),
    ("topics", "do not add up to the merged weights", lambda g: rewrite(g, 1, factor=2)),
    ("places", "not those that it began with", lambda g: rewrite(g, 2, before="0" * 64)),
    ("topics", "after-3.safetensors", lambda g: flip_last_byte(g.folder / "state" / "after-3.safetensors")),
    ("topics", "record.json", lambda g: flip_last_byte(g.folder / "record.json")),
    ("topics", "the rows of 'topics' are not those of .*'train': 8", SEQUENCE.limit(4)),
    ("topics", "the rows of 'places' are not those", PAIR),
    ("topics", f"no archive of 'weather'; {AGAIN}", edit(lambda run: run.extra["archives"].pop("weather"))),
]


@pytest.mark.parametrize("task, message, prepare", REFUSED, ids=[message for _, message, _ in REFUSED])
def test_what_cannot_be_done_rightly_is_refused_and_changes_nothing(gated, task, message, prepare):
    rows = prepare if isinstance(prepare, TaskSequence) else None
    if prepare and not rows:
        prepare(gated)
    before = files(gated.folder.parent)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        rollback(gated.folder, task, rows)
    assert files(gated.folder.parent) == before
    assert not list(gated.folder.glob(".rollback*"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(after_task="keep"), "JumpLoRA .*no update is one task's own"),
        (dict(training="joint"), "JumpLoRA .*no update is one task's own"),
    ],
)
def test_a_run_without_updates_of_single_tasks_says_so(gated, changes, message):
    run = Run.load(gated.folder)
    run.configuration["method"] |= changes
    with pytest.raises(ValueError, match=message):
        load_archives(gated.folder, run)


def test_a_backbone_with_other_weights_is_refused(copied, monkeypatch):
    folder = copied("no gate").folder
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    model.get_submodule("model.norm").weight.data[0] += 1e-6
    home = load_start.__module__
    monkeypatch.setattr(f"{home}.load_backbone", lambda name, **options: (model, tokenizer))
    before = files(folder)
    with pytest.raises(ValueError, match="tiny-llama has other weights than the backbone"):
        rollback(folder, "topics")
    rounded = (model.bfloat16(), tokenizer)  # which cannot be compared with the float32 of the run
    with pytest.raises(ValueError, match=r"model given has other weights .*\(bfloat16 here, float32 there"):
        rollback(folder, "topics", backbone=rounded)
    assert files(folder) == before


@pytest.mark.parametrize("taken", [False, True], ids=["crash", "a folder appears"])
def test_a_folder_appears_whole_and_never_over_another(gated, monkeypatch, taken):
    place, before = gated.place("topics"), files(gated.folder)

    def meanwhile(found):
        if not taken:
            raise OSError("no space left")
        place.mkdir()
        (place / "mine").write_text("mine")
        return "report"

    monkeypatch.setattr(page, "rollback_report", meanwhile)
    message = "rollback-topics could not be made .*nothing was overwritten" if taken else "no space left"
    with pytest.raises((ValueError, OSError), match=message):
        rollback(gated.folder, "topics")
    mine = {Path("rollback-topics/mine"): b"mine"} if taken else {}
    assert files(gated.folder) == before | mine and not list(gated.folder.glob(".rollback*"))


def test_a_damaged_or_outdated_result_is_not_loaded(gated):
    with pytest.raises(ValueError, match="was not taken out of .*call rollback first"):
        load_without(gated.folder, "topics")
    rollback(gated.folder, "topics")
    place = gated.place("topics")
    edit(lambda run: run.extra.update(state_tasks=2))(gated)
    with pytest.raises(ValueError, match="the run has learned .* since .*; delete .* call rollback again"):
        load_without(gated.folder, "topics")
    flip_last_byte(place / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged .*; delete .*rollback-topics"):
        load_without(gated.folder, "topics")
    write_tensors(place / "weights.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"weights\.safetensors is not what rollback wrote; delete"):
        load_without(gated.folder, "topics")
    (place / "rollback.json").write_text((place / "rollback.json").read_text().replace("topics", "tropics"))
    with pytest.raises(ValueError, match="rollback.json: .*; delete .*rollback-topics and call rollback"):
        load_without(gated.folder, "topics")
    with pytest.raises(ValueError, match="task='../topics' is not known"):
        load_without(gated.folder, "../topics")


@pytest.mark.parametrize("limits", [{}, dict(train=6), dict(train=6, dev=2, test=4)])
def test_the_rows_of_a_run_are_found_again_whatever_was_limited(tmp_path, limits):
    rows = [dict(text=f"text {i}", label=("yes", "no")[i % 2]) for i in range(8)]
    for split in ("train", "dev", "test"):
        for name in ("one", "two"):
            write_atomic(tmp_path / name / f"{split}.json", json.dumps(rows))
    tasks = load_sequence(tmp_path, **limits)[:1]  # the folder has more
    model, _ = load_backbone("tiny-llama", device="cpu", dtype="float32")
    run = new_run(model, tasks, GATED, QUICK, seed=1)
    found = page.load_rows(run, str(tmp_path))
    assert found["one"].fingerprint() == tasks["one"].fingerprint()
