"""Taking a task out again: every bit accounted for, nothing believed unchecked."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import entries, files
from safetensors.torch import load_file

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.results.run_tables import load_runs
from jumplora.storage import rollback as page
from jumplora.storage.record import Run
from jumplora.storage.rollback import add_archives, load_archives, load_without, rollback, rollback_folder
from jumplora.storage.state import load_start
from jumplora.storage.updates import (
    UpdateArchive,
    archive_path,
    read_archive,
    sparse_update,
    write_archive,
)

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
    weights: list[dict] = field(default_factory=list)


def learn(out, method=GATED, backbone="tiny-llama", dtype="float32", sequence=SEQUENCE, **options):
    "One run on a fresh backbone, its weights copied at the end of every task."
    weights, real = [], continual.Learner.finish

    def watched(learner, i, log):
        if not weights:
            weights.append({name: weight.clone() for name, weight in learner.weights.items()})
        real(learner, i, log)
        weights.append({name: weight.clone() for name, weight in learner.weights.items()})

    model, tokenizer = load_backbone(backbone, device="cpu", dtype=dtype)
    options = dict(seed=1, out=out, backbone=backbone, progress=False, zero_shot=False) | options
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


def copied(result, place):
    return replace(result, folder=Path(shutil.copytree(result.folder, place / result.folder.name)))


@pytest.fixture
def gated(results, tmp_path):
    "A copy of the gated run, to be changed or damaged."
    return copied(results["gated"], tmp_path)


def same_bits(one, other):
    "Whether named float32 tensors agree in every bit, the sign of zero included."
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def weights_without(folder, task):
    stored = load_file(rollback_folder(folder, task) / "weights.safetensors")
    return {name.removesuffix(".weight"): weight for name, weight in stored.items()}


def largest_error(folder, task, wanted):
    found = weights_without(folder, task)
    return max((found[name] - weight).abs().max().item() for name, weight in wanted.items())


def others(result, k, archives):
    "The base and all updates but one."
    return add_archives(result.weights[0], archives[:k] + archives[k + 1 :])


def rewrite(result, i, keep=True, change=lambda update, old: (update, old), **about):
    "Write archive i again, changed, with a good checksum in the record."
    path = archive_path(result.folder, i, result.run.tasks[i])
    found, tensors = read_archive(path), {}
    for layer in found.header.layers:
        update, old = change(found.update(layer), found.overwritten(layer))
        tensors |= entries(layer, update, old if keep else None)
    run = Run.load(result.folder)
    written = write_archive(path, replace(found.header, **about), tensors)
    run.extra["archives"][run.tasks[i]] = written
    run.save(result.folder.parent)


# ---- what is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, k", PLACES)
def test_a_task_is_taken_out_bit_for_bit(results, kind, k, tmp_path):
    result = copied(results[kind], tmp_path)
    folder, before, task = result.folder, files(result.folder), result.run.tasks[k]
    found, archives = rollback(folder, task), load_archives(folder, result.run)
    assert found.bound == 0 and found.task == task and found.last == (k == len(result.run.tasks) - 1)
    weights = weights_without(folder, task)
    assert same_bits(weights, others(result, k, archives))
    if found.last:
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


def test_a_report_names_what_was_done_and_how_exactly(gated):
    rollback(gated.folder, "topics")
    report = (rollback_folder(gated.folder, "topics") / "report.md").read_text()
    assert f"# topics taken out of {gated.run.name}" in report and "kept as they were learned" in report
    assert "base and other updates, in order, bit for bit" in report and "| task |" not in report
    assert re.search(r"touched (\d+) of (\d+) entries \((\d+\.\d\d)%\)", report)
    rounded = page.rollback_report(page.TakenOut("run", "b", ["a", "b"], 1, 4, 2.5e-3, {"a": [1.0] * 4}))
    assert "as it was before that task, to 2.5e-03 in every entry" in rounded and "(25.00%)" in rounded
    assert "kept as they were" not in rounded and "| a | 1.0 | 1.0 | 1.0 | 1.0 |" in rounded


def test_without_overwritten_values_the_base_gives_the_same_bits(gated):
    for i in range(3):
        rewrite(gated, i, keep=False)
    archives = load_archives(gated.folder, Run.load(gated.folder))
    for k, task in enumerate(gated.run.tasks):
        assert rollback(gated.folder, task).bound == 0
        assert same_bits(weights_without(gated.folder, task), others(gated, k, archives))


@pytest.mark.parametrize("k", [0, 1])
def test_factors_on_another_processor_stay_within_the_stated_bound(results, k, tmp_path, monkeypatch):
    result = copied(results["no gate"], tmp_path)
    exact = load_archives(result.folder, result.run)
    wanted = others(result, k, exact)

    def in_float64(archive, layer):  # another order of rounding
        A, B, s = (archive.tensors[f"{layer}.{part}"].double() for part in ("A", "B", "scaling"))
        return sparse_update((s * (B @ A)).float())

    monkeypatch.setattr(UpdateArchive, "update", in_float64)
    assert not exact[0].exact
    found = rollback(result.folder, result.run.tasks[k])
    assert largest_error(result.folder, found.task, wanted) <= found.bound and 0 < found.bound < 1e-3


def test_scores_without_the_last_task_are_those_of_the_row_before(gated):
    found, run = rollback(gated.folder, "places", SEQUENCE), gated.run
    for j, task in enumerate(run.tasks):
        match, after, options, options_after = found.scores[task]
        assert (match, options) == (run.accuracy[2, j], run.option_accuracy[2, j])
        if j < 2:
            assert (after, options_after) == (run.accuracy[1, j], run.option_accuracy[1, j])
    place = rollback_folder(gated.folder, "places")
    assert "| weather |" in (place / "report.md").read_text()
    facts = json.loads((place / "rollback.json").read_text())
    assert facts["scores"] == found.scores and facts["bound"] == 0


def test_a_merged_task_that_is_not_scored_yet_can_be_taken_out(gated):
    run = Run.load(gated.folder)
    run.accuracy[2, 1:], run.extra["state_tasks"] = np.nan, 3  # killed while its scores were taken
    del run.right[run.tasks[2]]
    run.save(gated.folder.parent)
    assert run.finished == 2
    found = rollback(gated.folder, "places", SEQUENCE)
    assert found.bound == 0 and found.tasks == run.tasks and np.isnan(found.scores["places"][0])
    assert "| places | nan | " in page.rollback_report(found)


# ---- refusals --------------------------------------------------------------------------------------------


def flip_last_byte(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def archive_of(gated, i):
    return archive_path(gated.folder, i, gated.run.tasks[i])


def nothing(gated):
    "Leave the run as it is."


REFUSED = {
    "unknown task": (nothing, "tpoics", "task='tpoics' is not known.*did you mean 'topics'"),
    "a path as task": (nothing, "../x", "task='../x' is not known"),
    "twice": (lambda g: rollback(g.folder, "topics"), "topics", "taken out before; delete .*rollback-topics"),
    "tampered": (
        lambda g: flip_last_byte(archive_of(g, 1)),
        "places",
        "02-weather.safetensors.*the checksum does not match",
    ),
    "missing": (lambda g: archive_of(g, 1).unlink(), "topics", "02-weather.*missing"),
    "another archive": (
        lambda g: shutil.copy(archive_of(g, 0), archive_of(g, 1)),
        "topics",
        "02-weather.*not the file that the record names",
    ),
    "another base": (
        lambda g: rewrite(g, 1, base="0" * 16),
        "topics",
        "its base is '0000000000000000', that of the run",
    ),
    "another task": (
        lambda g: rewrite(g, 1, task="topics"),
        "topics",
        "its task is 'topics', that of the run",
    ),
    "another position": (
        lambda g: rewrite(g, 1, position=0),
        "topics",
        "its position is 0, that of the run 1",
    ),
    "another method": (lambda g: rewrite(g, 1, method="x"), "topics", "its method is 'x', that of the run"),
    "another update": (
        lambda g: rewrite(g, 1, change=lambda update, old: (replace(update, values=2 * update.values), old)),
        "topics",
        "do not add up to the merged weights",
    ),
    "another past": (
        lambda g: rewrite(g, 2, change=lambda update, old: (update, old + 1)),
        "places",
        "do not add up to the merged weights",
    ),
    "another start": (lambda g: rewrite(g, 2, before="0" * 64), "places", "not those that it began with"),
    "damaged state": (
        lambda g: flip_last_byte(g.folder / "state" / "after-3.safetensors"),
        "topics",
        "after-3.safetensors",
    ),
    "damaged record": (lambda g: flip_last_byte(g.folder / "record.json"), "topics", "record.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_rightly_is_refused_and_changes_nothing(gated, case):
    prepare, task, message = REFUSED[case]
    prepare(gated)
    before = files(gated.folder.parent)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        rollback(gated.folder, task)
    assert files(gated.folder.parent) == before
    assert not list(gated.folder.glob(".rollback*"))


@pytest.mark.parametrize("changes", [dict(after_task="keep"), dict(training="joint")], ids=str)
def test_a_run_without_updates_of_single_tasks_says_so(gated, changes):
    run = Run.load(gated.folder)
    run.configuration["method"] |= changes
    with pytest.raises(ValueError, match="JumpLoRA .*no update is one task's own"):
        load_archives(gated.folder, run)


def test_a_run_that_kept_no_archives_has_to_be_learned_again(gated):
    run = Run.load(gated.folder)
    del run.extra["archives"]["weather"]
    with pytest.raises(ValueError, match="no archive of 'weather'; learn it again, with archive=True"):
        load_archives(gated.folder, run)
    run.extra["state_tasks"] = 0
    with pytest.raises(ValueError, match="no learned task; learn it again, with archive=True"):
        load_archives(gated.folder, run)


def test_a_backbone_with_other_weights_is_refused(results, tmp_path, monkeypatch):
    folder = copied(results["no gate"], tmp_path).folder
    home = sys.modules[load_start.__module__]
    real = home.load_backbone

    def changed(name, **options):
        model, tokenizer = real(name, **options)
        model.get_submodule("model.norm").weight.data[0] += 1e-6
        return model, tokenizer

    monkeypatch.setattr(home, "load_backbone", changed)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="tiny-llama has other weights than the backbone"):
        rollback(folder, "topics")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "sequence, message",
    [
        (SEQUENCE.limit(4), "the rows of 'topics' are not those of .*'train': 8"),
        (TaskSequence("short", TASKS[:2]), "the rows of 'places' are not those"),
    ],
    ids=["fewer rows", "a task less"],
)
def test_rows_of_another_run_are_refused(gated, sequence, message):
    before = files(gated.folder)
    with pytest.raises(ValueError, match=message):
        rollback(gated.folder, "topics", sequence)
    assert files(gated.folder) == before


class Stopped(Exception):
    "Stands for a lost machine."


def test_a_crash_while_writing_leaves_no_folder(gated, monkeypatch):
    def crash(found):
        raise Stopped

    monkeypatch.setattr(page, "rollback_report", crash)
    before = files(gated.folder)
    with pytest.raises(Stopped):
        rollback(gated.folder, "topics")
    assert files(gated.folder) == before and not list(gated.folder.glob(".rollback*"))


def test_a_folder_that_appears_meanwhile_is_not_overwritten(gated, monkeypatch):
    place = rollback_folder(gated.folder, "topics")
    monkeypatch.setattr(page, "rollback_report", lambda found: files_in(place) or "report")

    def files_in(place):
        place.mkdir()
        (place / "mine").write_text("mine")

    with pytest.raises(ValueError, match="rollback-topics could not be made .*nothing was overwritten"):
        rollback(gated.folder, "topics")
    assert [path.name for path in place.iterdir()] == ["mine"] and not list(gated.folder.glob(".rollback*"))


def test_a_damaged_result_is_not_loaded(gated):
    with pytest.raises(ValueError, match="was not taken out of .*call rollback first"):
        load_without(gated.folder, "topics")
    rollback(gated.folder, "topics")
    place = rollback_folder(gated.folder, "topics")
    flip_last_byte(place / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged .*; delete .*rollback-topics"):
        load_without(gated.folder, "topics")
    (place / "rollback.json").write_text((place / "rollback.json").read_text().replace("topics", "tropics"))
    with pytest.raises(ValueError, match="rollback.json: .*"):
        load_without(gated.folder, "topics")


def test_a_task_taken_out_of_a_run_that_has_learned_on_is_refused(tmp_path, monkeypatch):
    train = continual.Learner.train

    def interrupted(learner, i):
        if i == 2:
            raise KeyboardInterrupt
        return train(learner, i)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(continual.Learner, "train", interrupted)
        learn(tmp_path)
    (folder,) = tmp_path.iterdir()
    task = rollback(folder, SEQUENCE.names[0]).task
    load_without(folder, task, device="cpu")
    learn(tmp_path)
    with pytest.raises(ValueError, match="the run has learned .* since; delete .* and call rollback again"):
        load_without(folder, task, device="cpu")
