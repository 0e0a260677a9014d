"""A run survives: checkpoints at any step, kills, signals, full disks, damaged files, a second process."""

import errno
import gc
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import transformers
from equal_runs import content, files, same_weights
from safetensors import safe_open
from safetensors.torch import save
from transformers import Trainer, TrainerCallback

from jumplora.command_line import main
from jumplora.conventions import set_seed
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import Progress, TrainConfig, attach_adapter, train_task
from jumplora.method.regularizers import NLoRA
from jumplora.storage import state
from jumplora.storage.record import Damaged, Run, read_tensors, write_tensors
from jumplora.storage.state import (
    Checkpoint,
    Stopped,
    adapter_tensors,
    held_lock,
)

BALL = [("a ball", "sport"), ("an atom of many words", "physics"), ("two balls and a bat", "sport")] * 4
RAIN = [("rain", "yes"), ("sun", "no")] * 6
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
)
SEQUENCE = TaskSequence("short", TASKS)
QUICK = TrainConfig(batch_size=3, learning_rate=1e-2, max_length=120)  # four steps
HARD = replace(QUICK, batch_size=2, gradient_accumulation=2, epochs=2.5, lora_dropout=0.2)
ADVICE = f"transformers {transformers.__version__} moved it: mend nbs/5_inside/state.ipynb"


def learn(method, out=None, config=QUICK, **options):
    "One run on a fresh backbone; returns its record and the model."
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    method = METHODS[method] if isinstance(method, str) else method
    options = dict(seed=1, out=out, progress=False) | options
    return learn_sequence(model, tokenizer, SEQUENCE, method, config, **options), model


@pytest.fixture(autouse=True)
def usual_interrupt():
    "What starts in the background of a shell ignores SIGINT; these tests are about the usual handler."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    "A Trainer collects garbage whenever it starts; what other tests hold need not be looked through."
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An ELLA + JumpLoRA run that nobody disturbed."
    return learn("ELLA + JumpLoRA", tmp_path_factory.mktemp("whole"))


# ---- every step -------------------------------------------------------------------------------------------


class Count(TrainerCallback):
    "A callback of a user, whose count is resumed."

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state_dict(self):
        return dict(steps=self.steps)

    def load_state_dict(self, state):
        self.steps = state["steps"]


def train(
    path=None, copies=None, config=HARD, gated=False, optimizer="adamw", also=(), backbone="tiny-llama"
):
    "Train the first task, with a checkpoint after every step that is kept as a copy; losses, gate, adapter."
    set_seed(0)
    model, tokenizer = load_backbone(backbone, device="cpu", dtype="float32")
    model = attach_adapter(model, config, gated)
    checkpoint = Checkpoint(path, {"task": 0}, every=float("inf")) if path else None
    settings, count = (TASKS[0], config, NLoRA(1e-4)), Count()
    options = dict(also=also, optimizer=optimizer, seed=3, checkpoint=checkpoint, callbacks=[count])
    real = Checkpoint.write

    def write(self, parts, about):
        real(self, parts, about)
        shutil.copy(path, copies / f"{about['trainer']['global_step']}.safetensors")

    due = patch.object(Checkpoint, "due", lambda self: copies is not None)
    with due, patch.object(Checkpoint, "write", write):
        log = train_task(model, tokenizer, *settings, **options)
    assert count.steps == log.steps
    return log, adapter_tensors(model)


LENGTHS = replace(HARD, group_by_length=True)
OPTIONS = dict(bf16=True, gradient_checkpointing=True, lr_scheduler_type="cosine", warmup_steps=2)
OPTIONS |= dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
POWER = dict(lr_scheduler_type="polynomial", lr_scheduler_kwargs=dict(power=2.0), warmup_steps=3)
PASSED = replace(HARD, training_arguments=OPTIONS)
SETTINGS = {
    "accumulation, dropout, epochs": dict(),
    "rows by length, gated": dict(config=replace(LENGTHS, threshold_scope="block"), gated=True),
    "rows of other tasks by length, Muon": dict(also=(TASKS[1],), config=LENGTHS, optimizer="muon"),
    "options of the Trainer, gated": dict(config=PASSED, gated=True),
    "options of the Trainer, T5": dict(config=PASSED, backbone="tiny-t5"),
    "options of the Trainer, T5, gated": dict(config=PASSED, backbone="tiny-t5", gated=True),
    "warm-up and decay, Muon": dict(config=replace(HARD, training_arguments=POWER), optimizer="muon"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_goes_on_from_any_step_with_the_same_bits(name, tmp_path):
    log, adapter = train(tmp_path / "x", tmp_path, **SETTINGS[name])
    epoch = log.steps * 2 // 5  # steps of one: three, or six
    for step in (epoch + 1, 2 * epoch):  # in the middle of the second, and at its end
        resumed, same = train(tmp_path / f"{step}.safetensors", **SETTINGS[name])
        assert (resumed.loss, resumed.penalty, resumed.gate) == (log.loss, log.penalty, log.gate), step
        assert all(torch.equal(adapter[key], same[key]) for key in adapter), step


def test_a_checkpoint_costs_no_randomness_and_holds_no_pickle(tmp_path):
    assert train(tmp_path / "x", tmp_path)[0].loss == train()[0].loss
    with safe_open(tmp_path / "x", "pt") as file:
        note = json.loads(file.metadata()["jumplora"])
    assert note["format"] == 1 and note["about"]["trainer"]["global_step"] == 8
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}


def test_checkpoints_come_after_a_minute_and_take_little_of_the_time(tmp_path):
    checkpoint, clock = Checkpoint(tmp_path / "x", {}, every=60.0), [1000.0]
    checkpoint.written = clock[0]
    with patch("jumplora.storage.state.time.monotonic", lambda: clock[0]):
        assert not checkpoint.due()
        clock[0] += 60
        assert checkpoint.due()
        checkpoint.cost = 3.0  # a slow disk
        assert not checkpoint.due()
        clock[0] += 90
        assert checkpoint.due()
        checkpoint.every = float("inf")
        assert not checkpoint.due()
        checkpoint.stop.number = signal.SIGINT
        assert checkpoint.due()


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("train", ["self", "resume_from_checkpoint"]),
    ],
)
def test_the_trainer_still_has_the_methods_that_are_replaced(method, needed):
    found = list(inspect.signature(getattr(Trainer, method)).parameters)
    assert [name for name in found if name in needed] == needed, f"{method}{found}; {ADVICE}"


def test_the_trainer_calls_each_of_them_once(tmp_path):
    train(tmp_path / "x", tmp_path)
    calls = []
    for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"):
        real = getattr(state.ResumableTrainer, name)

        def watched(self, *args, real=real, name=name):
            calls.append(name)
            return real(self, *args)

        patch.object(state.ResumableTrainer, name, watched).start()
    try:
        train(tmp_path / "4.safetensors")
    finally:
        patch.stopall()
    assert sorted(calls) == sorted(set(calls)) and len(calls) == 3, ADVICE


# ---- killed -----------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(root, tmp_path):
    command = [sys.executable, "tests/torture.py", "--kills", "3", "--tasks", "2"]
    command += ["--cases", "ELLA + JumpLoRA", "--out", tmp_path / "record.json"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["total"] == 3 and record["equal"] is True


def test_the_long_torture_is_on_record(root):
    path = root / "results" / "torture" / "cpu.json"
    if not path.is_file():
        pytest.skip("not run: make torture")
    record = json.loads(path.read_text())
    assert record["equal"] is True and all(case["equal"] == case["runs"] for case in record["cases"].values())
    assert min(sum(case["kills"].values()) for case in record["cases"].values()) >= 20
    phases = {"training", "checkpoint", "merging", "state", "record", "scoring"}
    assert phases <= record["kills"].keys() and record["command"].startswith("python tests/torture.py")
    methods = {"SeqLoRA", "EWC", "Replay", "IncLoRA (Muon)", "multi-task", "ELLA + JumpLoRA"}
    assert methods <= record["cases"].keys()


def test_a_score_that_was_taken_is_not_taken_again(whole, tmp_path):
    real, scored = continual.evaluate, []

    def evaluate(model, tokenizer, task, *rest, **options):
        if len(scored) == 4:  # two untrained, one after the first task, one of two after the second
            raise RuntimeError("lost")
        scored.append(task.name)
        return real(model, tokenizer, task, *rest, **options)

    with patch.object(continual, "evaluate", evaluate), pytest.raises(RuntimeError, match="lost"):
        learn("ELLA + JumpLoRA", tmp_path)
    assert scored == ["topics", "weather", "topics", "topics"]
    with patch.object(continual, "evaluate", evaluate), patch.object(continual, "train_task", None):
        scored.clear()
        run, model = learn("ELLA + JumpLoRA", tmp_path)
    assert scored == ["weather"]
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])


# ---- signals ----------------------------------------------------------------------------------------------


def send_at(step, number, name=None):
    "`train_task` that gets a signal in a step, of a certain task or any."
    real = continual.train_task

    def train(*args, callbacks, **options):
        def advanced(steps, done=[0]):  # noqa: B006
            done[0] += steps
            if done[0] == step and name in (None, args[2].name):
                os.kill(os.getpid(), number)

        return real(*args, callbacks=[Progress(advanced), *callbacks], **options)

    return patch.object(continual, "train_task", train)


def test_a_signal_stops_after_the_step_and_the_run_goes_on_from_there(whole, tmp_path, capfd):
    number = signal.SIGINT
    before = signal.getsignal(number)
    with send_at(2, number), pytest.raises(KeyboardInterrupt) as stopped:
        learn("ELLA + JumpLoRA", tmp_path)
    assert stopped.value.status == 128 + number and "a second signal stops at once" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    (path,) = tmp_path.glob("*/state/step.safetensors")
    assert read_tensors(path)[1]["trainer"]["global_step"] == 2
    run, model = learn("ELLA + JumpLoRA", tmp_path)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])
    assert not path.exists()


@pytest.mark.parametrize(("where", "scores"), [("evaluate", [1, 0]), ("write_finished", [2, 0])])
def test_a_signal_while_scoring_or_saving_stops_after_it(where, scores, tmp_path):
    real = getattr(continual, where)

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with patch.object(continual, where, signalled), pytest.raises(Stopped):
        learn("IncLoRA", tmp_path)
    run = Run.load(next(tmp_path.glob("*/record.json")))
    assert [len(run.zero_shot), (run.accuracy >= 0).sum()] == scores
    assert run.tasks_learned == (where == "write_finished") and learn("IncLoRA", tmp_path)[0].complete


def test_a_second_signal_stops_at_once():
    with pytest.raises(Stopped), state._graceful_shutdown() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not reached")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_that_somebody_else_handles_are_left_alone():
    def own(*args):
        pass

    signal.signal(signal.SIGTERM, own)
    try:
        with state._graceful_shutdown():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = []

    def elsewhere():
        with state._graceful_shutdown() as request:
            seen.extend([signal.getsignal(signal.SIGINT), request.number])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, None]


def test_without_a_folder_ctrl_c_interrupts_at_once():
    with send_at(2, signal.SIGINT), pytest.raises(KeyboardInterrupt) as stopped:
        learn("IncLoRA")
    assert not isinstance(stopped.value, Stopped)


@pytest.fixture
def data(tmp_path):
    "A folder of two tasks, as the command line takes it."
    for task in TASKS:
        folder = tmp_path / "data" / task.name
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [dict(sentence=row.text, label=row.label) for row in getattr(task, split)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
        (folder / "labels.json").write_text(json.dumps(list(task.options)))
    return tmp_path / "data"


def compare(data, out):
    "Words of a command."
    words = ["compare", "--sequence", data, "--out", out, "--backbone", "tiny-llama", "--batch-size", 3]
    return [*map(str, words), "--max-length", "160", "--method", "IncLoRA", "--progress", "false"]


def test_the_command_says_how_to_go_on_and_its_status_tells_the_signal(data, tmp_path, capsys):
    words = compare(data, tmp_path / "out")
    with send_at(2, signal.SIGTERM):
        assert main(words) == 143
    said = capsys.readouterr().err
    assert "stopped by SIGTERM; resume with:\njumplora compare" in said
    gone, kept = data / "weather" / "test.json", files(tmp_path / "out")
    rows = gone.read_text()
    gone.unlink()
    assert main(words) in (1, 2) and "weather" in capsys.readouterr().err
    assert files(tmp_path / "out") == kept  # the state is as it was
    gone.write_text(rows)
    assert main(words) == 0 and "table.md" in capsys.readouterr().out


# ---- disks ------------------------------------------------------------------------------------------------


def failing(real, allowed, number):
    "A stand-in for a function of `os` that works so many times."
    left = [allowed]

    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    return call


def test_every_write_may_fail_once_and_the_run_goes_on(whole, tmp_path):
    failures, out, number = 0, tmp_path / "out", errno.ENOSPC
    for allowed in (0, *[1, 2, 3, 4] * 8):  # archive, state, the copy of its record, record
        try:
            with patch.object(os, "replace", failing(os.replace, allowed, number)):
                run, model = learn("ELLA + JumpLoRA", out, checkpoint_every=float("inf"))
            break
        except OSError as error:
            failures += 1
            assert error.errno == number and "untouched" in str(error) and str(out) in str(error)
            assert not list(out.rglob(".*.tmp"))
            assert len(list(out.glob("*/state/after-*.safetensors"))) <= 2
    assert failures >= 4  # of thirteen writes
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])


def test_a_file_that_the_system_cuts_short_is_not_kept(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # enough for a record, not for a state
    try:
        with pytest.raises(OSError, match="01-topics.safetensors") as error:
            learn("ELLA + JumpLoRA", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".*.tmp")) and Run.load(next(tmp_path.glob("*/record.json"))).zero_shot


def test_a_disk_that_is_really_full_is_survived(whole, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", out], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(OSError, match="No space left"):
            learn("ELLA + JumpLoRA", out)
        subprocess.run(["mount", "-o", "remount,size=4m", out], check=True)
        run, model = learn("ELLA + JumpLoRA", out)
    finally:
        subprocess.run(["umount", out], check=True)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])


def test_a_place_where_nothing_can_be_written_is_named_at_once(data, tmp_path, capsys):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert main(compare(data, blocked / "out")) == 1
    said = capsys.readouterr().err
    assert "a file" in said and "Traceback" not in said and blocked.read_text() == ""


# ---- files that cannot be trusted -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_second_task(tmp_path_factory):
    "The folder of a run that was stopped in its second task, with a state and a checkpoint."
    out = tmp_path_factory.mktemp("stopped")

    with send_at(3, signal.SIGTERM, "weather"), pytest.raises(Stopped):
        learn("ELLA + JumpLoRA", out)
    return next(out.iterdir())


@pytest.fixture
def folder(in_second_task, tmp_path):
    shutil.copytree(in_second_task, tmp_path / in_second_task.name)
    return tmp_path / in_second_task.name


def step_path(folder):
    return folder / "state" / "step.safetensors"


def spoil(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_checkpoint_is_set_aside_and_the_task_starts_again(folder, whole):
    assert read_tensors(step_path(folder))[1]["owner"]["task"] == 1
    spoil(step_path(folder))
    with pytest.warns(UserWarning, match=r"now step\.damaged-1\.safetensors, and the training starts again"):
        run, model = learn("ELLA + JumpLoRA", folder.parent)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])


def test_a_damaged_state_is_set_aside_and_the_run_goes_on_from_the_one_before(folder, whole):
    with patch.object(continual, "evaluate", side_effect=RuntimeError("lost")), pytest.raises(RuntimeError):
        learn("ELLA + JumpLoRA", folder.parent)  # after the second task, before it is scored
    assert [state._state_path(folder, n).exists() for n in (1, 2)] == [True, True]
    spoil(state._state_path(folder, 2))
    with pytest.warns(UserWarning, match=r"now after-2\.damaged-1\.safetensors.* after 1 learned tasks"):
        run, model = learn("ELLA + JumpLoRA", folder.parent)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])
    kept = sorted(path.name for path in (folder / "state").iterdir())
    assert kept == ["after-2.damaged-1.safetensors", "after-2.json", "after-2.safetensors", "lock"]


def test_a_checkpoint_of_another_run_or_state_is_not_used(folder, whole):
    tensors, about, _ = read_tensors(step_path(folder))
    for key, value in dict(run="0" * 64, task=0, after="").items():
        other = about | dict(owner=about["owner"] | {key: value})
        write_tensors(step_path(folder), tensors, other)
        owner = dict(run=Run.load(folder).configuration_hash, task=1, after=about["owner"]["after"])
        assert Checkpoint(step_path(folder), owner).read() is None
    run, model = learn("ELLA + JumpLoRA", folder.parent)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])


def test_a_state_of_another_format_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    for note, message in (({"jumplora": '{"format": 2}'}, "format 2.*reads format 1"), (None, "format None")):
        path.write_bytes(save({"a": torch.zeros(2)}, metadata=note))
        with pytest.raises(Damaged, match=message):
            read_tensors(path)


# ---- one folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "left"), [("all", []), ("one task", ["weather"])], ids=["all", "one task"])
def test_a_second_process_waits_for_the_lock_and_then_reads_what_the_first_saved(
    saved, left, whole, in_second_task, tmp_path
):
    source = in_second_task.parent if saved == "one task" else tmp_path / "other"
    source = source / whole[0].name
    if saved == "all":
        learn("ELLA + JumpLoRA", source.parent)
    folder, waits, seen, begun = tmp_path / "out" / source.name, threading.Event(), [], []

    def second():
        with patch("jumplora.storage.state.warnings.warn", lambda *words, **options: waits.set()):
            seen.append(learn("ELLA + JumpLoRA", folder.parent))

    def train(model, tokenizer, task, *rest, real=continual.train_task, **options):
        begun.append(task.name)
        return real(model, tokenizer, task, *rest, **options)

    with patch.object(continual, "train_task", train):
        with held_lock(folder / "state" / "lock"):
            thread = threading.Thread(target=second)
            thread.start()
            assert waits.wait(60) and not (folder / "record.json").exists()
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
        thread.join(60)
    assert begun == left and content(seen[0][0]) == content(whole[0])
    assert same_weights(seen[0][1], whole[1])


def test_what_a_killed_writer_left_is_removed_and_a_folder_stays_small(whole, tmp_path):
    folder = tmp_path / whole[0].name
    (folder / "state").mkdir(parents=True)
    for place in (folder, folder / "state"):
        (place / ".0123456789abcdef.tmp").write_bytes(b"half a state")
    run, _ = learn("ELLA + JumpLoRA", tmp_path, checkpoint_every=0)
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    archives = ["01-topics.safetensors", "02-weather.safetensors"]
    assert names == [*archives, "after-2.json", "after-2.safetensors", "lock", "record.json"]
    assert run.extra["state_bytes"] == state._state_path(folder, 2).stat().st_size


def test_a_finished_run_in_a_read_only_place_is_only_read(whole, tmp_path):
    out = tmp_path / "out"
    (out / whole[0].name).mkdir(parents=True)
    whole[0].save(out)
    lock, write = "jumplora.storage.state.held_lock", "jumplora.storage.record.write_atomic"
    with patch(lock, None), patch(write, None):
        assert content(learn("ELLA + JumpLoRA", out)[0]) == content(whole[0])


def test_a_lock_is_free_when_its_process_is_gone(tmp_path):
    if (child := os.fork()) == 0:
        with held_lock(tmp_path / "lock"):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with held_lock(tmp_path / "lock") as ours:
        assert not ours
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with held_lock(tmp_path / "lock") as ours:
        assert ours


KEPT_GATE = Method("kept gate", gated=True, after_task="keep")


@pytest.mark.parametrize("method", [KEPT_GATE, "EWC"], ids=["kept gate", "EWC"])
def test_a_kept_adapter_scores_the_same_after_mixed_precision_and_after_an_interruption(method, tmp_path):
    passed = replace(QUICK, training_arguments=OPTIONS | dict(warmup_steps=0))
    run, model = learn(method, tmp_path / "whole", passed)

    calls = iter(range(9))

    def lose(*args, real=continual.evaluate, **options):
        if next(calls) > 1:  # both tasks are scored before learning
            raise RuntimeError("lost")
        return real(*args, **options)

    with patch.object(continual, "evaluate", lose), pytest.raises(RuntimeError, match="lost"):
        learn(method, tmp_path / "out", passed)
    resumed, same = learn(method, tmp_path / "out", passed)
    assert content(resumed) == content(run) and same_weights(model, same)


@pytest.mark.parametrize("method", [KEPT_GATE, "multi-task"], ids=["kept gate", "multi-task"])
def test_other_methods_go_on_from_a_step_too(method, tmp_path):
    run, model = learn(method, tmp_path / "whole")
    with send_at(3, signal.SIGTERM), pytest.raises(Stopped):
        learn(method, tmp_path / "out")
    resumed, same = learn(method, tmp_path / "out")
    assert content(resumed) == content(run) and same_weights(model, same)


def test_what_a_kill_after_the_last_score_leaves_is_removed_by_the_next_call(whole, tmp_path):
    def lose(folder, keep, real=state._remove_states):
        if keep == {2}:
            raise RuntimeError("lost")
        real(folder, keep)

    with patch.object(state, "_remove_states", lose), pytest.raises(RuntimeError):
        learn("ELLA + JumpLoRA", tmp_path)
    folder = tmp_path / whole[0].name
    assert Run.load(folder).complete and state._state_path(folder, 1).exists()
    step_path(folder).write_bytes(b"of the last task, which is finished")
    assert content(learn("ELLA + JumpLoRA", tmp_path)[0]) == content(whole[0])
    assert sorted(path.name for path in folder.glob("state/*.safetensors")) == ["after-2.safetensors"]


def test_a_record_that_was_set_aside_by_hand_loses_nothing_that_a_state_holds(folder, whole):
    (folder / "record.json").rename(folder / "aside.json")
    run, model = learn("ELLA + JumpLoRA", folder.parent)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])
    assert run.seconds["train"][0] == Run.load(folder / "aside.json").seconds["train"][0]  # not trained again


def test_leaving_a_run_after_its_first_task_keeps_its_state(whole, tmp_path):
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    method = METHODS["ELLA + JumpLoRA"]
    options = dict(seed=1, out=tmp_path, progress=False)
    learner = continual.Learner(model, tokenizer, SEQUENCE, method, QUICK, **options)
    with learner.running():
        learner.score()
        learner.finish(0, learner.train(0))
    assert state._state_path(learner.folder, 1).exists()
    run, model = learn("ELLA + JumpLoRA", tmp_path)
    assert content(run) == content(whole[0]) and same_weights(model, whole[1])
