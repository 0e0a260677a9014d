"""The loop: the ten lines, merge and memory against numpy, seeds, resuming, what is refused or set aside."""

import inspect
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import content, files, same_weights
from golden import CONTROLS
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence, merge_adapter, weights_of
from jumplora.learning.evaluation import evaluate
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import Diverged, TrainConfig, attach_adapter, named_updates, train_task
from jumplora.method.adapter import adapter_layers, delta_weights, gate_groups
from jumplora.method.regularizers import ELLA, Regularizer, Update
from jumplora.storage.record import Run
from jumplora.storage.state import load_learned

BALL = [("a ball", "sport"), ("an atom", "physics")] * 8
RAIN = [("rain", "yes"), ("sun", "no")] * 8
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
)
SEQUENCE = TaskSequence("short", TASKS)
NO_DEV = TaskSequence("short", [replace(task, dev=()) for task in TASKS])
QUICK = TrainConfig(batch_size=8, epochs=3, learning_rate=1e-2, max_length=120)
EVERYWHERE = ("q_proj", "v_proj", "up_proj", "down_proj", "lm_head")
LEARNS = TrainConfig(batch_size=4, epochs=10, learning_rate=1e-2, max_length=200, target_modules=EVERYWHERE)
SEQUENTIAL = [n for n in METHODS if METHODS[n].training == "sequential" and n not in CONTROLS]
MERGING = [name for name in SEQUENTIAL if METHODS[name].after_task == "merge"]
EACH_METHOD = pytest.mark.parametrize("name", SEQUENTIAL)


@dataclass
class Result:
    "A run, the model it ended with, and what was in the adapters before each was merged."

    run: Run
    model: torch.nn.Module
    folder: Path | None
    updates: list[dict] = field(default_factory=list)


def as64(tensor):
    return tensor.detach().to(torch.float64).cpu().numpy()


def learn(method, out=None, backbone="tiny-llama", config=QUICK, sequence=SEQUENCE, dtype="float32", **more):
    "One run on a fresh backbone; what the merge of every task reads and writes is copied."
    updates, real = [], continual.Learner.finish

    def watched(learner, i, log):
        gates = {name: group.gate for group in gate_groups(learner.adapted).values() for name in group.layers}
        deltas, seen = delta_weights(learner.adapted), {}
        past = getattr(learner.regularizer, "past", getattr(learner.regularizer, "rows", {}))  # rows: O-LoRA
        for name, layer in adapter_layers(learner.adapted).items():
            A, B = as64(layer.lora_A["default"].weight), as64(layer.lora_B["default"].weight)
            seen[name] = dict(A=A, dense=B @ A, scaling=layer.scaling["default"], gate=None)
            seen[name]["before"] = layer.get_base_layer().weight.detach().clone()
            seen[name]["delta"] = deltas[name].detach().clone()
            seen[name]["past"] = past[name].clone() if name in past else None
            if name in gates:
                seen[name]["gate"] = gates[name].threshold.item(), gates[name].interpolation.item()
        real(learner, i, log)
        after = weights_of(learner.adapted) if learner.adapted is not None else learner.weights
        past = getattr(learner.regularizer, "past", {})
        for name, layer in seen.items():
            layer["after"] = after[name].detach().clone()
            layer["past after"] = past[name].clone() if name in past else None
        updates.append(seen)

    model, tokenizer = load_backbone(backbone, device="cpu", dtype=dtype)
    method = METHODS[method] if isinstance(method, str) else method
    options = dict(seed=1, out=out, backbone=backbone, progress=False) | more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual.Learner, "finish", watched)
        run = learn_sequence(model, tokenizer, sequence, method, config, **options)
    return Result(run, model, Path(out) / run.name if out is not None else None, updates)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(out):
    "One quick run on the tiny decoder of every method that learns task after task."
    return {name: learn(name, out) for name in SEQUENTIAL}


class Lost(Exception):
    "Stands for a lost machine."


def lost_in_task(number, method, out, **options):
    "Begin a run that is lost when that task begins; returns the names of the tasks that began."
    real, begun = continual.train_task, []

    def train(model, tokenizer, task, *rest, **given):
        begun.append(task.name)
        if task.name == SEQUENCE.names[number]:
            raise Lost(task.name)
        return real(model, tokenizer, task, *rest, **given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Lost):
        patch.setattr(continual, "train_task", train)
        learn(method, out, **options)
    return begun


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "The folder of an ELLA + JumpLoRA run that was lost in its second task."
    out = tmp_path_factory.mktemp("stopped")
    lost_in_task(1, "ELLA + JumpLoRA", out)
    return next(out.iterdir())


@pytest.fixture
def lost(stopped, tmp_path):
    "A copy of that folder, to be resumed or damaged."
    return Path(shutil.copytree(stopped, tmp_path / "out" / stopped.name))


@pytest.fixture
def no_training(monkeypatch):
    "Fails the test if anything is trained or scored."
    for name in ("train_task", "evaluate"):
        monkeypatch.setattr(continual, name, lambda *a, **o: pytest.fail("trained or scored again"))


def states(folder):
    return sorted(path.name for path in (folder / "state").glob("*.safetensors"))


# ---- the ten lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IncLoRA", "ELLA + JumpLoRA"])
def test_ten_lines_give_the_same_scores_losses_and_weights(runs, name):
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    regularizer = ELLA() if "ELLA" in name else Regularizer()
    for i, task in enumerate(SEQUENCE):
        continual.set_seed(1000 + i)  # one for each task, of a run with seed 1
        adapted = attach_adapter(model, QUICK, gated=METHODS[name].gated)
        log = train_task(adapted, tokenizer, task, QUICK, regularizer, seed=1000 + i)
        assert log.loss == runs[name].run.extra["loss"][task.name]
        regularizer.after_task(named_updates(adapted))
        model = merge_adapter(adapted)
        for j, seen in enumerate(TASKS[: i + 1]):
            score = evaluate(model, tokenizer, seen, max_length=120)
            assert score.exact_match == runs[name].run.accuracy[i, j]
    assert same_weights(model, runs[name].model)


class Watch(TrainerCallback):
    "What the Trainer of each task is given, and our frames between the user's call and it."

    def __init__(self):
        self.tasks = []

    def on_train_begin(self, args, state, control, **kwargs):
        package = str(Path(continual.__file__).parent.parent)
        ours = [frame.function for frame in inspect.stack(0) if frame.filename.startswith(package)]
        self.tasks.append((args.seed, ours[::-1]))


def test_a_callback_sees_every_task_each_with_its_seed_few_frames_from_the_call(runs):
    watch = Watch()
    run = learn("IncLoRA", callbacks=[watch]).run
    frames = ["learn_sequence", "train", "train_task", "train_or_resume"]
    assert watch.tasks == [(1000, frames), (1001, frames)]
    plain = runs["IncLoRA"].run
    assert "callbacks" not in plain.configuration and run.name != plain.name
    assert run.configuration == plain.configuration | {"callbacks": [f"{__name__}.Watch"]}
    assert run.extra["loss"] == plain.extra["loss"]


@pytest.mark.parametrize(("share", "rows"), [(0.07, 7), (0.071, 8), (0, 0), (0.001, 1), (1, 100)])
def test_rehearsal_takes_a_share_of_every_older_task_rounded_up(share, rows):
    tasks = [replace(task, train=task.train[:10] * 10) for task in TASKS]
    tasks = TaskSequence("three", [*tasks, replace(TASKS[0], name="again")])
    method = Method("Replay", after_task="keep", rehearsal=share)
    assert [len(task.train) for task in method.tasks_beside(tasks, 2)] == [rows, rows][: 2 * (rows > 0)]


# ---- every method: record, merge and memory against numpy -------------------------------------------------


def expected_update(layer):
    "s·J_τ(BA) in float64, and the entries whose side of τ the rounding of float32 may decide."
    dense = layer["dense"]
    if layer["gate"] is None:
        return layer["scaling"] * dense, np.zeros_like(dense, dtype=bool)
    tau, interpolation = layer["gate"]
    assert interpolation == 1  # fully gated when it is merged
    gated = np.where(np.abs(dense) > tau, dense, 0.0)
    return layer["scaling"] * gated, np.abs(np.abs(dense) - tau) < 1e-6 * tau


@EACH_METHOD
def test_the_record_of_every_method_holds_scores_times_gate_and_sparsity(runs, name):
    run, T = runs[name].run, len(SEQUENCE)
    assert run.complete and run.method == name and Run.load(runs[name].folder).complete
    for matrix in (run.accuracy, run.option_accuracy):
        assert np.array_equal(~np.isnan(matrix), np.tri(T, dtype=bool))  # nothing unseen is scored
        assert np.nanmin(matrix) >= 0 and np.nanmax(matrix) <= 100
    assert [len(run.seconds[part]) for part in ("train", "evaluate", "merge")] == [T, T, T]
    assert run.peak_memory > 2**27 and len(run.extra["loss"]["topics"]) == 6
    for history in run.thresholds.values() if METHODS[name].gated else ():
        factors = [point["interpolation"] for point in history]
        assert factors == sorted(factors) and factors[-1] == 1
        assert all(tau > 0 for point in history for tau in point["threshold"].values())
    for task, layers in zip(SEQUENCE.names, runs[name].updates, strict=True):
        assert run.sparsity[task].keys() == layers.keys()
        for key, layer in layers.items():
            update, unsure = expected_update(layer)
            assert abs(run.sparsity[task][key] * update.size - (update == 0).sum()) <= unsure.sum() + 1e-6
    shares = [share for layers in run.sparsity.values() for share in layers.values()]
    assert min(shares) > 0.01 if METHODS[name].gated else max(shares) < 0.01


@pytest.mark.parametrize("name", ["IncLoRA", "IncLoRA + JumpLoRA"])
def test_an_encoder_decoder_learns_a_sequence_too(name):
    result = learn(name, backbone="tiny-t5")
    assert result.run.complete and bool(result.run.thresholds["topics"]) == METHODS[name].gated
    layers = " ".join(result.run.sparsity["weather"])
    assert "decoder." in layers and "encoder." in layers.replace("decoder.", "")


@pytest.mark.parametrize("name", MERGING)
def test_the_merge_adds_the_gated_update_to_the_weight(runs, name):
    for layer in [layer for task in runs[name].updates for layer in task.values()]:
        update, unsure = expected_update(layer)
        assert unsure.mean() < 0.01 and np.abs(update).max() > 1e-4
        error = np.abs(as64(layer["after"]) - (as64(layer["before"]) + update))[~unsure]
        assert error.max() <= 1e-5 * max(1.0, np.abs(update).max())


@EACH_METHOD
def test_merging_methods_change_and_archive_the_adapted_layers_and_keeping_ones_nothing(runs, name):
    result, merged = runs[name], name in MERGING
    names = sorted(path.name for path in (result.folder / "updates").glob("*"))
    assert names == (["01-topics.safetensors", "02-weather.safetensors"] if merged else [])
    assert (list(result.run.extra.get("archives", {})) == list(SEQUENCE.names)) == merged
    assert ("support" in result.run.extra) == METHODS[name].gated
    base = load_backbone("tiny-llama", dtype="float32")[0].state_dict()
    adapted = {f"{layer}.weight" for layer in result.updates[0]}
    assert len(adapted) == 4  # queries and values of two layers
    after = {key.replace(".base_layer.", "."): value for key, value in result.model.state_dict().items()}
    assert {key for key in base if not torch.equal(base[key], after[key])} == (adapted if merged else set())


@pytest.mark.parametrize("name", ["ELLA", "ELLA + JumpLoRA"])
# differences: 26
def test_ellas_memory_grows_by_the_bits_of_the_weights_and_changes_later_tasks_only(runs, name):
    plain, ella = runs[name.replace("ELLA", "IncLoRA")], runs[name]
    first, second = ella.updates
    for key, layer in second.items():
        assert first[key]["past"] is None and torch.equal(first[key]["past after"], first[key]["delta"])
        assert torch.equal(layer["past"], first[key]["past after"])
        assert torch.equal(layer["past after"], layer["past"] + layer["delta"])
        assert torch.equal(layer["after"], layer["before"] + layer["delta"])
        assert torch.equal(layer["before"], first[key]["after"])  # the next task starts where this one ended
        assert torch.equal(first[key]["after"], plain.updates[0][key]["after"])
    assert ella.run.extra["loss"]["topics"] == plain.run.extra["loss"]["topics"]
    assert not any(ella.run.extra["penalty"]["topics"]) and max(ella.run.extra["penalty"]["weather"]) > 0
    assert plain.run.extra["penalty"] == {"topics": [], "weather": []}
    assert METHODS[name].regularizer.tasks == 0 and METHODS[name].regularizer.past == {}  # a copy has learned
    assert not same_weights(ella.model, plain.model)


def test_olora_remembers_the_rows_that_were_learned(runs):
    first, second = runs["O-LoRA"].updates
    assert all(np.array_equal(as64(layer["past"]), first[name]["A"]) for name, layer in second.items())


# differences: 29
def test_seqlora_keeps_training_one_adapter_which_load_learned_adds_to_the_weights(runs):
    first, second = runs["SeqLoRA"].updates
    loaded, _, _ = load_learned(runs["SeqLoRA"].folder, device="cpu", dtype="float32")
    for key, layer in second.items():
        assert torch.equal(layer["after"], first[key]["before"])
        one, two = first[key]["dense"], layer["dense"]
        assert not np.array_equal(one, two)
        assert (one * two).sum() > 0.3 * np.linalg.norm(one) * np.linalg.norm(two)  # two starts from one
        expected = as64(layer["before"]) + layer["scaling"] * two
        assert np.abs(as64(loaded.get_submodule(key).weight) - expected).max() < 1e-5
    assert any("lora_A" in name for name, _ in runs["SeqLoRA"].model.named_parameters())


@pytest.mark.parametrize("kept", [True, False], ids=["weights kept", "no weights"])
# differences: 26
def test_many_tiny_updates_add_up_in_a_bfloat16_model_where_the_float32_weights_are_kept(kept):
    model, _ = load_backbone("tiny-llama", dtype="bfloat16")
    name, tiny, weights = "model.layers.0.self_attn.q_proj", 4e-6, {}
    start = as64(model.get_submodule(name).weight)
    for _ in range(100):
        adapted = attach_adapter(model, QUICK, gated=False)
        for layer in adapter_layers(adapted).values():
            layer.lora_A["default"].weight.data.fill_(1.0)
            layer.lora_B["default"].weight.data.fill_(tiny / (layer.scaling["default"] * QUICK.rank))
        weights = weights or weights_of(adapted)
        model = merge_adapter(adapted, weights if kept else None)
    merged = model.get_submodule(name).weight
    assert merged.dtype == torch.bfloat16 and not any("lora" in key for key in model.state_dict())
    if kept:
        assert weights[name].dtype == torch.float32
        assert np.abs(as64(weights[name]) - (start + 100 * tiny)).max() < 1e-6
        assert torch.equal(merged, weights[name].bfloat16())
    else:
        assert (as64(merged) == start).mean() > 0.8  # each sum was rounded back to where it began


# ---- seeds and scores -------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(runs):
    name = "ELLA + JumpLoRA"
    again, other = learn(name), learn(name, seed=2)
    assert content(again.run) | {"extra": 0} == content(runs[name].run) | {"extra": 0}
    assert again.run.extra["loss"] == runs[name].run.extra["loss"]
    assert same_weights(again.model, runs[name].model)
    assert not same_weights(other.model, runs[name].model) and other.run.name != again.run.name


def test_zero_shot_scores_are_those_of_the_untouched_backbone(runs):
    model, tokenizer = load_backbone("tiny-llama", dtype="float32")
    scores = [evaluate(model, tokenizer, task, max_length=120) for task in SEQUENCE]
    for result in runs.values():
        assert result.run.zero_shot == [score.exact_match for score in scores]
        assert result.run.zero_shot_options == [score.option_accuracy for score in scores]


@pytest.mark.parametrize("known", [False, ([1.0, 2.0], [3.0, 4.0])], ids=["left out", "given"])
def test_zero_shot_scores_can_be_left_out_or_given_even_after_some_were_taken(known, tmp_path, monkeypatch):
    scored, real = [], evaluate

    def fails_once(model, tokenizer, task, *rest, **options):
        scored.append(task.name)
        if scored == list(SEQUENCE.names):
            raise Lost
        return real(model, tokenizer, task, *rest, **options)

    monkeypatch.setattr(continual, "evaluate", fails_once)
    for zero_shot in (True, known):  # the first call stops after one score
        lost_in_task(1, "IncLoRA", tmp_path, zero_shot=zero_shot)
    assert scored == ["topics", "weather", "topics"]  # the last of them after its training
    run = Run.load(next(tmp_path.glob("*/record.json")))
    assert (run.zero_shot, run.zero_shot_options) == (known or (None, None)) and "" not in run.right


def test_a_run_that_really_learns_is_recorded_and_read_back_with_the_scores_of_its_last_row(tmp_path):
    learned = learn("IncLoRA + JumpLoRA", tmp_path, config=LEARNS)
    run = learned.run
    assert run.accuracy[1, 1] == run.option_accuracy[1, 1] == 100 and run.zero_shot == [0.0, 0.0]
    assert run.extra["loss"]["weather"][-1] < 0.5 * run.extra["loss"]["weather"][0]
    record = json.loads((learned.folder / "record.json").read_text())
    assert record["accuracy"][1][1] == record["option_accuracy"][1][1] == 100
    assert record["accuracy"][0][1] is None
    model, tokenizer, run = load_learned(learned.folder, device="cpu", dtype="float32")
    assert same_weights(model, learned.model)
    for j, task in enumerate(SEQUENCE):
        score = evaluate(model, tokenizer, task, max_length=LEARNS.max_length)
        assert (score.exact_match, score.option_accuracy) == (run.accuracy[-1, j], run.option_accuracy[-1, j])


def test_a_base_that_was_loaded_from_a_folder_is_asked_for_by_name_and_opened_where_it_is(tmp_path):
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    base = load_backbone(str(tmp_path / "base"), device="cpu", dtype="float32")
    options = dict(out=tmp_path / "runs", progress=False)
    with pytest.warns(UserWarning, match="names the base 'base', and no path.*give load_learned, rollback"):
        run = learn_sequence(*base, SEQUENCE, METHODS["IncLoRA"], QUICK, **options)
    folder = tmp_path / "runs" / run.name
    with pytest.raises(OSError, match="'base' cannot be loaded(.|\n)*or give backbone="):
        load_learned(folder)
    with pytest.raises(ValueError, match="the model given has other weights"):
        load_learned(folder, backbone=base)  # it holds what was learned
    for where in (tmp_path / "base", (model, tokenizer)):
        found, _, _ = load_learned(folder, backbone=where, device="cpu")
        assert same_weights(found, base[0])


def test_a_regularizer_that_remembers_another_run_is_refused():
    used = ELLA(1.0)
    used.after_task({"layer": Update(torch.ones(2, 2))})
    with pytest.raises(ValueError, match="remembers tasks already; make a new one"):
        learn(Method("ELLA", regularizer=used))


def test_the_model_is_given_back_with_its_own_use_of_a_cache(tmp_path):
    for use_cache in (True, False):
        model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
        model.config.use_cache = use_cache
        learn_sequence(model, tokenizer, SEQUENCE, METHODS["IncLoRA"], QUICK, zero_shot=False, progress=False)
        assert model.config.use_cache is use_cache


@pytest.mark.parametrize("method", ["IncLoRA", "IncLoRA pruned"])
def test_an_update_that_the_last_step_broke_is_neither_merged_nor_recorded(method, tmp_path, monkeypatch):
    real = continual.train_task

    def broken(adapted, *rest, **given):
        log = real(adapted, *rest, **given)
        next(iter(adapter_layers(adapted).values())).lora_B["default"].weight.data[0, 0] = math.inf
        return log

    monkeypatch.setattr(continual, "train_task", broken)
    with pytest.raises(Diverged, match=f"task '{SEQUENCE.names[0]}': the last step left .* not finite in"):
        learn(method, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_rows_of_the_split_are_scored_with_the_lengths_of_the_settings(monkeypatch):
    calls, real = [], evaluate

    def watched(model, tokenizer, task, split, labels, **settings):
        lengths = settings["max_length"], settings["truncation"], settings["batch_size"]
        calls.append((task.name, split, *lengths))
        return real(model, tokenizer, task, split, labels, **settings)

    monkeypatch.setattr(continual, "evaluate", watched)
    config = TrainConfig(batch_size=8, max_length=77, truncation="reference")
    run = learn("IncLoRA", config=config, split="dev", zero_shot=False).run
    assert calls == [(name, "dev", 77, "reference", 16) for name in ("topics", "topics", "weather")]
    assert run.test_rows == [2, 2] and run.configuration["scored_split"] == "dev"


# ---- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ELLA + JumpLoRA", "SeqLoRA", "EWC", "O-LoRA"])
# differences: 28, 30
def test_a_run_lost_in_its_second_task_ends_with_the_same_bits(method, runs, tmp_path, monkeypatch):
    whole = runs[method]
    lost_in_task(1, method, tmp_path / "lost")
    (folder,) = (tmp_path / "lost").iterdir()
    assert Run.load(folder).finished == 1 and states(folder) == ["after-1.safetensors"]
    begun, real = [], train_task
    monkeypatch.setattr(continual, "train_task", lambda *a, **o: begun.append(a[2].name) or real(*a, **o))
    resumed = learn(method, tmp_path / "lost")
    assert begun == ["weather"] and resumed.folder == folder
    assert content(resumed.run) == content(whole.run)  # matrices, losses, gates, checksum of the state
    assert same_weights(resumed.model, whole.model)
    assert Run.load(folder).complete and states(folder) == ["after-2.safetensors"]


def test_a_bfloat16_run_resumes_from_its_float32_weights(tmp_path):
    whole = learn("IncLoRA", dtype="bfloat16")
    lost_in_task(1, "IncLoRA", tmp_path, dtype="bfloat16")
    resumed = learn("IncLoRA", tmp_path, dtype="bfloat16")
    name = "model.layers.0.self_attn.q_proj"
    assert resumed.updates[0][name]["after"].dtype == torch.float32
    assert torch.equal(resumed.updates[0][name]["after"], whole.updates[1][name]["after"])
    loaded, _, run = load_learned(resumed.folder, device="cpu")  # as precise as the run, not "auto"
    assert run.configuration["dtype"] == "bfloat16"
    assert same_weights(loaded, whole.model) and same_weights(resumed.model, whole.model)


def test_a_finished_run_is_neither_trained_nor_scored_again_and_the_model_holds_it(
    runs, out, tmp_path, no_training
):
    for name, result in runs.items():
        before, again = files(result.folder), learn(name, out)
        assert content(again.run) == content(result.run) and files(result.folder) == before
        assert same_weights(again.model, result.model)
    (tmp_path / again.folder.name).mkdir()
    shutil.copy(again.folder / "record.json", tmp_path / again.folder.name)  # what a repository keeps
    assert content(learn(name, tmp_path).run) == content(again.run)


def one_changed(**changes):
    return dict(sequence=TaskSequence("short", [replace(TASKS[0], **changes), TASKS[1]]))


@pytest.mark.parametrize(
    "changes",
    [
        dict(config=replace(QUICK, learning_rate=2e-2)),
        dict(config=replace(QUICK, kept=0.1)),
        dict(config=replace(QUICK, target_modules=("q_proj",))),
        dict(method=Method("IncLoRA + JumpLoRA", gated=True, regularizer=ELLA(1.0))),
        dict(method=Method("IncLoRA + JumpLoRA", gated=True, after_task="keep", training="joint")),
        dict(seed=2),
        dict(split="dev"),
        dict(dtype="bfloat16"),
        dict(sequence=TaskSequence("short", TASKS[::-1])),
        one_changed(instruction="Which?\n"),
        one_changed(options=TASKS[0].options[::-1]),
        one_changed(train=BALL[::-1]),
        "one bit of the backbone",
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_decides_the_numbers_gives_another_run(changes, monkeypatch, tmp_path):
    learner = continual.Learner
    monkeypatch.setattr(learner, "running", lambda learner: nullcontext())
    monkeypatch.setattr(learner, "remaining", lambda learner: ())
    monkeypatch.setattr(learner, "score", lambda learner: None)
    usual = dict(method="IncLoRA + JumpLoRA", out=tmp_path)
    before = learn(**usual).run.name
    if isinstance(changes, str):
        model, tokenizer = load_backbone("tiny-llama", dtype="float32")
        model.model.norm.weight.data[0] += 1e-7
        monkeypatch.setattr(f"{__name__}.load_backbone", lambda *a, **o: (model, tokenizer))
        changes = {}
    assert learn(**usual | changes).run.name != before
    assert not list(tmp_path.iterdir())


# ---- records and states that cannot be trusted ------------------------------------------------------------


@pytest.mark.parametrize("part", ["learning_rate", "seed", "tasks"])
def test_the_record_of_another_run_is_refused_and_left_alone(part, lost, tmp_path, no_training):
    stranger = Run.load(lost)
    if part == "learning_rate":
        stranger.configuration["train"]["learning_rate"] = 0.5
    elif part == "seed":
        stranger.seed = 3
    else:
        stranger.tasks, stranger.right = stranger.tasks[::-1], {}
    shutil.copy(stranger.save(tmp_path / "elsewhere"), lost / "record.json")
    before = files(lost.parent)
    with pytest.raises(ValueError, match="record.json is the record of another run, .*; move it out of"):
        learn("ELLA + JumpLoRA", lost.parent)
    assert files(lost.parent) == before


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty", "binary", "its copy too"])
def test_a_damaged_record_is_named_set_aside_and_not_used(damage, lost):
    record = lost / "record.json"
    good = record.read_bytes()
    edited = good.replace(b'"seed": 1', b'"seed": 9')
    bad = dict(truncated=good[:-40], edited=edited, empty=b"", binary=b"\xff\xfe\x00").get(damage, b"{}")
    assert bad != good
    record.write_bytes(bad)
    first, message = 1, r"record\.json: .*record\.damaged-1\.json; the run resumes after 1 learned tasks"
    if damage == "its copy too":
        (lost / "state/after-1.json").write_bytes(bad)
        first, message = 0, "the run starts again"
    with pytest.warns(UserWarning, match=message) as caught:
        begun = lost_in_task(first, "ELLA + JumpLoRA", lost.parent, zero_shot=False)
    assert begun == [SEQUENCE.names[first]] and caught[0].filename == __file__
    assert (lost / "record.damaged-1.json").read_bytes() == bad
    if damage == "its copy too":
        assert (lost / "state" / "after-1.damaged-1.json").exists()
    else:
        assert Run.load(record).finished == 1  # its copy knows the first task


@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit", "empty"])
def test_a_state_that_is_not_the_recorded_one_is_refused(damage, lost, no_training):
    state = lost / "state" / "after-1.safetensors"
    good = state.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    state.write_bytes({"truncated": good[:-100], "one bit": flipped}.get(damage, b""))
    if damage == "missing":
        state.unlink()
    before, what = files(lost), "missing" if damage == "missing" else "damaged"
    message = rf"after-1\.safetensors is {what}.*; delete .* to learn .* again"
    for use in (lambda: learn("ELLA + JumpLoRA", lost.parent), lambda: load_learned(lost)):
        with pytest.raises(ValueError, match=message):
            use()
    assert files(lost) == before  # nothing is lost: the record still holds what was measured


@dataclass(eq=False)
class NaNLater(Regularizer):
    "A penalty that is NaN from the second task on."

    tasks: int = field(default=0, init=False)

    def penalty(self, updates):
        return next(iter(updates.values())).delta.sum() * (math.nan if self.tasks else 0.0)

    def after_task(self, updates):
        self.tasks += 1


def test_a_nan_loss_names_task_and_step_and_leaves_the_last_good_state(tmp_path):
    with pytest.raises(Diverged, match="task 'weather': the loss became nan at step 1"):
        learn(Method("nan later", regularizer=NaNLater()), tmp_path)
    (folder,) = tmp_path.iterdir()
    run = Run.load(folder)
    assert run.finished == 1 and not np.isnan(run.accuracy[0, 0]) and "weather" not in run.extra["loss"]
    assert states(folder) == ["after-1.safetensors"]
    model, _, _ = load_learned(folder, device="cpu", dtype="float32")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


# ---- arguments --------------------------------------------------------------------------------------------


NO_CALLBACK = r"no instance of TrainerCallback; use MyCallback\(\)"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seed=-1), "seed=-1 "),
        (dict(seed=5_000_000), "seed=5000000 "),
        (dict(seed=1.5), "seed=1.5 "),
        (dict(split="tset"), "split='tset' is not known.*did you mean 'test'"),
        (dict(split="name"), "split='name' is not known"),
        (dict(config=replace(QUICK, target_modules=("q_prj",))), "target_modules.*q_prj.*q_proj"),
        (dict(split="dev", sequence=NO_DEV), r"no dev rows to score in \['topics', 'weather'\]"),
        (dict(callbacks=[TrainerCallback]), NO_CALLBACK),
        (dict(callbacks=[print]), NO_CALLBACK),
        (dict(left="adapter"), "still carries an adapter; load the backbone again"),
        (dict(left="update"), "holds what run topics.*_inclora_.* has learned; load the backbone again"),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)
def test_a_wrong_argument_is_found_before_anything_is_computed(
    options, message, tmp_path, no_training, monkeypatch
):
    left = options.pop("left", "") if "left" in (options := dict(options)) else ""
    if left:
        model, tokenizer = load_backbone("tiny-llama", dtype="float32")
        if left == "adapter":
            attach_adapter(model, QUICK, gated=False)  # what an interrupted call leaves in the model
        else:
            model.jumplora_run = (
                "topics_tiny-llama_inclora_seed42_0",
                "its first weights",
            )  # see the next test
        monkeypatch.setattr(f"{__name__}.load_backbone", lambda *a, **o: (model, tokenizer))
    with pytest.raises(ValueError, match=message):
        learn("IncLoRA", tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", [False, True], ids=["learned", "resumed"])
def test_a_model_that_holds_what_a_run_learned_begins_no_other(again, tmp_path):
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    options = dict(config=QUICK, seed=1, backbone="tiny-llama", out=tmp_path, progress=False)
    two = TaskSequence("two", SEQUENCE[:2])
    run = learn_sequence(model, tokenizer, two, METHODS["IncLoRA"], **options)
    if again:  # the model that a complete run is restored into
        model, _ = load_backbone("tiny-llama", device="cpu", dtype="float32")
        assert learn_sequence(model, tokenizer, two, METHODS["IncLoRA"], **options).name == run.name
    for method in ("IncLoRA", "ELLA"):
        with pytest.raises(ValueError, match=f"holds what run {run.name} has learned"):
            learn_sequence(model, tokenizer, two, METHODS[method], **options)
    start = load_backbone("tiny-llama", device="cpu", dtype="float32")[0].state_dict()
    model.load_state_dict(start)  # as it was at first
    assert learn_sequence(model, tokenizer, two, METHODS["IncLoRA"], **options).name == run.name
    fresh, _, _ = load_learned(tmp_path / run.name)  # on purpose
    half, _, _ = load_learned(tmp_path / run.name, device="cpu", dtype="bfloat16")
    assert fresh.dtype == torch.float32 and half.dtype == torch.bfloat16
    on = learn_sequence(fresh, tokenizer, two, METHODS["IncLoRA"], **options)
    assert on.name != run.name and on.complete


@pytest.mark.parametrize(("change", "kind"), [
    (lambda layer: nn.Parameter(layer.weight.to(torch.int8), requires_grad=False), "q_proj"),
    (lambda layer: nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False), "q_proj"),
    (None, "c_proj"),
])  # fmt: skip
def test_an_update_is_merged_into_full_precision_linear_layers_only(change, kind):
    if change is None:
        base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
        lora = LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True)
    else:
        base, lora = load_backbone("tiny-llama", device="cpu", dtype="float32")[0], LoraConfig()
    model = get_peft_model(base, lora)
    for layer in adapter_layers(model).values():
        if change is not None:
            layer.get_base_layer().weight = change(layer.get_base_layer())
    with pytest.raises(ValueError, match=f"merged into .*{kind}: .* is no full-precision nn.Linear"):
        merge_adapter(model)
    assert adapter_layers(model)  # the adapter is still there


def test_an_adapter_that_is_merged_already_is_not_added_twice():
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    adapted = attach_adapter(model, QUICK, gated=False)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="merged already; call model.unmerge_adapter"):
        merge_adapter(adapted)
