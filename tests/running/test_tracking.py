"""What trackers receive of a run: every number, once, at its step of the whole run."""

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerState

from jumplora.command_line import main
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter, train_task
from jumplora.method.adapter import adapter_layers
from jumplora.method.gated_linear import dense_product
from jumplora.method.jumprelu import threshold_gradient
from jumplora.running.tracking import Tracking, gate_numbers

BALL = [("a ball", "sport"), ("an atom of many words", "physics")] * 10
RAIN = [("rain", "yes"), ("sun", "no")] * 5
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
)
QUICK = TrainConfig(batch_size=2, learning_rate=1e-2, max_length=120, epochs=2.0)  # 20 and 10 steps
STEPS = list(range(1, 31))


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("tensorboard").setLevel(logging.ERROR)


def learn(out=None, method="ELLA + JumpLoRA", config=QUICK, report_to="tensorboard"):
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    options = dict(report_to=report_to, zero_shot=False, progress=False, checkpoint_every=0.0)
    sequence = TaskSequence("short", TASKS)
    return learn_sequence(model, tokenizer, sequence, METHODS[method], config, out=out, **options), model


def curves(folder, place="*/tensorboard"):
    "Name -> steps and values, of the only run in a folder."
    (found,) = folder.glob(place)
    read = EventAccumulator(str(found), size_guidance=dict(scalars=0)).Reload()
    points = {name: read.Scalars(name) for name in read.Tags()["scalars"]}
    return {name: ([e.step for e in events], [e.value for e in events]) for name, events in points.items()}


def single(values) -> list[float]:
    "Numbers as an event file keeps them."
    return torch.tensor(list(values), dtype=torch.float32).tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing has disturbed, its model, its folder and its curves."
    folder = tmp_path_factory.mktemp("whole")
    return *learn(folder), folder, curves(folder)


def test_every_number_of_the_record_is_in_the_event_file_on_one_axis(whole):
    run, _, _, found = whole
    for name in ("loss", "penalty"):
        record = run.extra[name]
        assert found[f"train/{name}"] == (STEPS, single(record["topics"] + record["weather"]))
    assert max(found["train/penalty"][1][20:]) > 0 == max(found["train/penalty"][1][:20])
    points = run.thresholds["topics"] + run.thresholds["weather"]
    assert found["train/interpolation"] == (STEPS, single(p["interpolation"] for p in points))
    assert found["train/threshold"] == (STEPS, single(p["threshold"]["model"] for p in points))
    first, second = run.accuracy.tolist()  # scores stand where their task ended
    assert found["eval/topics"] == ([20, 30], single([first[0], second[0]]))
    assert found["eval/weather"] == ([30], single([second[1]]))
    assert found["eval/average"] == ([20, 30], single([first[0], sum(second) / 2]))


def test_the_last_count_of_a_task_is_the_sparsity_of_its_update(whole):
    run, model, _, found = whole
    steps, shares = found["train/sparsity"]
    assert steps == found["train/entries_in_window"][0] == [10, 20, 30]
    sizes = {name: model.get_submodule(name).weight.numel() for name in run.sparsity["topics"]}
    for share, task in ((shares[1], "topics"), (shares[2], "weather")):
        off = sum(run.sparsity[task][name] * size for name, size in sizes.items())
        assert share == pytest.approx(off / sum(sizes.values()), rel=1e-6) and 0.1 < share < 1


def test_entries_in_the_window_are_those_that_pull_at_the_threshold():
    model, _ = load_backbone("tiny-llama", device="cpu", dtype="float32")
    adapted = attach_adapter(model, replace(QUICK, bandwidth=0.02), gated=True)
    torch.manual_seed(0)
    pulling = total = below = 0
    for layer in adapter_layers(adapted).values():
        A, B = layer.lora_A["default"].weight, torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        gate, x = layer.lora_gate["default"], dense_product(A, B).detach().flatten()
        gate.set_threshold(0.004)  # below half the width: the windows around it and its negative overlap
        alone = [threshold_gradient(one, gate.threshold, torch.ones(1), 0.02, "sum") for one in x.view(-1, 1)]
        pulling, total = pulling + sum(bool(value) for value in alone), total + len(x)
        below += int((x.abs() <= gate.threshold).sum())
    found = gate_numbers(adapted)
    assert found["sparsity"] == below / total and found["entries_in_window"] == pulling
    assert found["interpolation"] == 0 and found["threshold"] == pytest.approx(0.004)
    assert gate_numbers(adapted, count=False).keys() == {"interpolation", "threshold"}
    assert 0 < pulling < total - below


def test_tracking_changes_no_number_and_a_complete_run_opens_no_tracker(whole):
    run, model, folder, _ = whole
    other, same = learn(report_to="none")
    assert other.extra["loss"] == run.extra["loss"] and other.thresholds == run.thresholds
    weights = dict(same.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())
    files = list(folder.rglob("events*"))
    assert learn(folder)[0].to_dict() == run.to_dict()
    assert list(folder.rglob("events*")) == files


class Crash(TrainerCallback):
    "Fails in the second task after a step was drawn, before its checkpoint."

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == 4 and state.max_steps == 10:
            raise MemoryError("no room")


def crash_while_training(*args, callbacks, **options):
    return train_task(*args, callbacks=[*callbacks, Crash()], **options)


@pytest.mark.parametrize(
    ("name", "fail", "drawn"),
    [("train_task", crash_while_training, 24), ("evaluate", Mock(side_effect=MemoryError("no room")), 20)],
)
def test_a_run_that_crashed_resumes_in_the_same_curves(name, fail, drawn, whole, tmp_path):
    with patch.object(continual, name, fail), pytest.raises(MemoryError):
        learn(tmp_path)
    assert curves(tmp_path)["train/loss"][0] == STEPS[:drawn]
    assert ("eval/topics" in curves(tmp_path)) == (drawn > 20)
    learn(tmp_path)
    assert len(list(tmp_path.rglob("events*"))) == 2 and curves(tmp_path) == whole[3]


@pytest.mark.parametrize("method", ["Replay", "multi-task", "SeqLoRA"])
def test_the_axis_counts_the_steps_that_a_method_takes(method, tmp_path):
    run = learn(tmp_path, method)[0]
    losses = [value for task in run.tasks for value in run.extra["loss"].get(task, [])]
    found = curves(tmp_path)
    assert found["train/loss"] == (list(range(1, len(losses) + 1)), single(losses))
    assert found["eval/average"][0][-1] == len(losses)
    assert "train/threshold" not in found and "train/sparsity" not in found


def test_every_threshold_has_its_name_and_a_folder_for_all_runs_one_folder_for_each(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "all"))
    run = learn(tmp_path / "runs", config=replace(QUICK, threshold_scope="layer", epochs=0.5))[0]
    assert not list((tmp_path / "runs").rglob("events*"))
    names = set(run.thresholds["topics"][0]["threshold"])
    assert len(names) > 1
    assert {f"train/threshold/{name}" for name in names} <= curves(tmp_path / "all", run.name).keys()


@pytest.mark.parametrize("wrong", ["tensorbord", ["tensorboard", "x"], "all of them", "wandb"])
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything_is_done(wrong, tmp_path):
    message = "report_to=.* is not supported|report_to='wandb': .*pip install wandb"
    missing = patch("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with missing, pytest.raises(ValueError, match=message):
        learn(tmp_path, report_to=wrong)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_an_unknown_tracker_before_it_loads_anything(tmp_path, capsys):
    words = ["compare", "--out", str(tmp_path), "--backbone", "nowhere/nothing", "--report-to"]
    assert main([*words, "tensorbord"]) == 2
    assert "report_to='tensorbord'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_only_the_main_process_has_trackers(tmp_path):
    for on_main in (True, False):
        with patch.object(continual, "is_main", lambda on_main=on_main: on_main):
            learn(tmp_path / str(on_main), "SeqLoRA", replace(QUICK, epochs=0.1))
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("events*")} == {"True"}


def test_a_tracker_gets_a_copy_of_the_trainers_state_and_nothing_without_a_loss():
    tracker = Mock()
    tracking = Tracking([tracker], Mock(run_name="a run"))
    tracking.before = 20
    state = TrainerState(global_step=3, epoch=0.5)
    tracking.on_train_begin(None, state, None)
    (_, passed, _), _ = tracker.on_train_begin.call_args
    assert (passed.global_step, passed.epoch, state.global_step) == (23, 0.5, 3)
    tracking.on_log(None, state, None, logs={"train_runtime": 1.0})
    tracking.log_scores(20, {})
    assert not tracker.on_log.called
    tracking.close()
    tracking.close()
    assert tracker.on_train_end.call_count == 1


def test_wandb_finds_each_run_by_its_name_and_is_ended_after_it(tmp_path):
    wandb = MagicMock(spec_set=["init", "finish", "log", "run", "config", "define_metric", "watch"])
    errors = SimpleNamespace(ConfigError=KeyError)
    with (
        patch.dict(sys.modules, {"wandb": wandb, "wandb.sdk.lib.config_util": errors}),
        patch("transformers.integrations.integration_utils.is_wandb_available", lambda: True),
    ):
        runs = [learn(tmp_path, method, report_to=["wandb"])[0] for method in ("IncLoRA", "ELLA")]
    asked = [call.kwargs for call in wandb.init.call_args_list]
    assert [(one["id"], one["resume"]) for one in asked] == [(run.name, "allow") for run in runs]
    assert {one["project"] for one in asked} == {"jumplora"} and wandb.finish.call_count == 2
    logged = [call.args[0] for call in wandb.log.call_args_list[:32]]
    assert [line["train/global_step"] for line in logged if "train/loss" in line] == STEPS
    assert [line["train/global_step"] for line in logged if "eval/topics" in line] == [20, 30]
