"""A run survives: checkpoints at any step, kills, signals, full disks, damaged files, a second process."""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import transformers
from equal_runs import content, files, same_weights
from safetensors import safe_open
from safetensors.torch import save
from transformers import TrainerCallback

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
from jumplora.storage.state import Checkpoint, Stopped, adapter_tensors, held_lock

BALL = [("a ball", "sport"), ("an atom of many words", "physics"), ("two balls and a bat", "sport")] * 4
RAIN = [("rain", "yes"), ("sun", "no")] * 6
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
)
QUICK = TrainConfig(batch_size=3, learning_rate=1e-2, max_length=120)  # four steps
HARD = replace(QUICK, batch_size=2, gradient_accumulation=2, epochs=2.5, lora_dropout=0.2)


def learn(out=None, method="ELLA + JumpLoRA", config=QUICK, tasks=TASKS, **options):
    "One run on a fresh backbone; returns its record and the model."
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    method = METHODS[method] if isinstance(method, str) else method
    options = dict(seed=1, out=out, progress=False) | options
    return learn_sequence(model, tokenizer, TaskSequence("short", tasks), method, config, **options), model


def assert_equal(one, other):
    "Two runs ended with the same record and the same weights."
    assert content(one[0]) == content(other[0]) and same_weights(one[1], other[1])


def failing(place, name, allowed, error):
    "A patch: a function works so many times, and then raises an error."
    real, left = getattr(place, name), [allowed]

    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args, **options)

    return patch.object(place, name, call)


def signal_at(step, number, name=None):
    "A patch: the training of a certain task, or of any, gets a signal in a step."
    real = continual.train_task

    def train(*args, callbacks, **options):
        def advanced(steps, done=[0]):  # noqa: B006
            done[0] += steps
            if done[0] == step and name in (None, args[2].name):
                os.kill(os.getpid(), number)

        return real(*args, callbacks=[Progress(advanced), *callbacks], **options)

    return patch.object(continual, "train_task", train)


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
    return learn(tmp_path_factory.mktemp("whole"))


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
def test_a_training_resumes_from_any_step_with_the_same_bits(name, tmp_path):
    log, adapter = train(tmp_path / "x", tmp_path, **SETTINGS[name])
    epoch = log.steps * 2 // 5  # steps of one: three, or six
    assert not (tmp_path / f"{log.steps}.safetensors").exists()  # a Trainer resumed there takes one step more
    for step in (
        epoch + 1,
        2 * epoch,
        log.steps - 1,
    ):  # within the second, at its end, near the last
        resumed, same = train(tmp_path / f"{step}.safetensors", **SETTINGS[name])
        assert (resumed.loss, resumed.penalty, resumed.gate) == (log.loss, log.penalty, log.gate), step
        assert all(torch.equal(adapter[key], same[key]) for key in adapter), step


def test_a_checkpoint_draws_no_random_numbers_and_holds_no_pickle(tmp_path):
    assert train(tmp_path / "x", tmp_path)[0].loss == train()[0].loss
    with safe_open(tmp_path / "x", "pt") as file:
        note = json.loads(file.metadata()["jumplora"])
    assert note["format"] == 1 and note["about"]["trainer"]["global_step"] == 7
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}


@pytest.mark.parametrize(
    ("waited", "cost", "every", "number", "due"),
    [(59, 0, 60, None, False), (60, 0, 60, None, True), (149, 3, 60, None, False), (150, 3, 60, None, True),
     (9e9, 0, float("inf"), None, False), (0, 0, float("inf"), signal.SIGINT, True)],
)  # fmt: skip
def test_checkpoints_come_after_a_minute_and_take_little_of_the_time(waited, cost, every, number, due):
    checkpoint = Checkpoint(None, {}, every=every)
    checkpoint.cost, checkpoint.stop.number = cost, number
    with patch("jumplora.storage.state.time.monotonic", lambda: checkpoint.written + waited):
        assert checkpoint.due() is due


def test_the_trainer_calls_each_method_that_is_replaced_once(tmp_path):
    train(tmp_path / "x", tmp_path)
    with ExitStack() as stack:
        watched = []
        for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"):
            real = getattr(state.ResumableTrainer, name)
            watched.append(patch.object(state.ResumableTrainer, name, autospec=True, side_effect=real))
        calls = [stack.enter_context(one) for one in watched]
        train(tmp_path / "4.safetensors")
    advice = f"transformers {transformers.__version__} moved one: change nbs/5_inside/state.ipynb"
    assert [call.call_count for call in calls] == [1, 1, 1], advice


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
    wild = json.loads((path.parent / "fuzz.json").read_text())
    assert wild["passed"] is True and wild["total"] > 3000 and not wild["failed"]


def test_a_score_that_was_taken_is_not_taken_again(whole, tmp_path):
    # two untrained, one after the first task, one of two after the second
    with failing(continual, "evaluate", 4, RuntimeError("lost")), pytest.raises(RuntimeError, match="lost"):
        learn(tmp_path)
    with patch.object(continual, "evaluate", wraps=continual.evaluate) as scored:
        with patch.object(continual, "train_task", None):
            assert_equal(learn(tmp_path), whole)
    assert [call.args[2].name for call in scored.call_args_list] == ["weather"]


KEPT_GATE = Method("kept gate", gated=True, after_task="keep", training="joint")
MIXED = replace(QUICK, training_arguments=OPTIONS | dict(warmup_steps=0))


@pytest.mark.parametrize(
    ("method", "config", "interruption"),
    [
        (KEPT_GATE, QUICK, signal_at(3, signal.SIGTERM)),
        ("multi-task", QUICK, signal_at(3, signal.SIGTERM)),
        (KEPT_GATE, MIXED, failing(continual, "evaluate", 3, RuntimeError("lost"))),  # two before learning
        ("EWC", MIXED, failing(continual, "evaluate", 2, RuntimeError("lost"))),
    ],
    ids=["kept gate, step", "multi-task, step", "kept gate in mixed precision, score", "EWC, score"],
)
def test_every_kind_of_method_resumes(method, config, interruption, tmp_path):
    undisturbed = learn(tmp_path / "whole", method, config)
    with interruption, pytest.raises((Stopped, RuntimeError)):
        learn(tmp_path / "out", method, config)
    assert_equal(learn(tmp_path / "out", method, config), undisturbed)


def test_a_signal_stops_after_the_step_and_the_run_resumes_there(whole, tmp_path, capfd):
    number = signal.SIGINT
    before = signal.getsignal(number)
    with signal_at(2, number), pytest.raises(KeyboardInterrupt) as stopped:
        learn(tmp_path)
    assert stopped.value.status == 128 + number and "a second signal stops at once" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    (path,) = tmp_path.glob("*/state/step.safetensors")
    assert read_tensors(path)[1]["trainer"]["global_step"] == 2
    assert_equal(learn(tmp_path), whole)
    assert not path.exists()


@pytest.mark.parametrize(("where", "scores"), [("evaluate", [1, 0]), ("write_finished", [2, 0])])
def test_a_signal_while_scoring_or_saving_stops_after_it(where, scores, tmp_path):
    place = continual if where == "evaluate" else continual.state
    real = getattr(place, where)

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with patch.object(place, where, signalled), pytest.raises(Stopped):
        learn(tmp_path, "IncLoRA")
    run = Run.load(next(tmp_path.glob("*/record.json")))
    assert [len(run.zero_shot), (run.accuracy >= 0).sum()] == scores
    assert run.tasks_learned == (where == "write_finished") and learn(tmp_path, "IncLoRA")[0].complete


def test_a_second_signal_stops_at_once(tmp_path):
    with pytest.raises(Stopped), state.held_folder(tmp_path, 2) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # to the whole group: a parent may pass its own on
        request.since -= 4
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not reached")
    with pytest.raises(Stopped), state.held_folder(tmp_path, 2):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not reached")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_that_somebody_else_handles_are_left_alone(tmp_path):
    def own(*args):
        pass

    signal.signal(signal.SIGTERM, own)
    try:
        with state.held_folder(tmp_path, 2):
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = []

    def elsewhere():
        with state.held_folder(tmp_path, 2) as request:
            seen.extend([signal.getsignal(signal.SIGINT), request.number])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, None]


def test_without_a_folder_ctrl_c_interrupts_at_once():
    with signal_at(2, signal.SIGINT), pytest.raises(KeyboardInterrupt) as stopped:
        learn(None, "IncLoRA")
    assert not isinstance(stopped.value, Stopped)


def test_the_command_names_the_way_to_resume_and_its_status_the_signal(tmp_path, capsys):
    for task in TASKS:
        folder = tmp_path / "data" / task.name
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [dict(sentence=row.text, label=row.label) for row in getattr(task, split)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
        (folder / "labels.json").write_text(json.dumps(list(task.options)))
    words = "compare --backbone tiny-llama --batch-size 3 --max-length 160 --method IncLoRA --progress false"
    words = [*words.split(), "--sequence", str(tmp_path / "data"), "--out"]
    blocked, out = tmp_path / "a file", tmp_path / "out"
    blocked.write_text("")
    assert main([*words, str(blocked / "out")]) == 1  # nothing can be written there
    said = capsys.readouterr().err
    assert "a file" in said and "Traceback" not in said and blocked.read_text() == ""
    words.append(str(out))
    with signal_at(2, signal.SIGTERM):
        assert main(words) == 143
    assert "stopped by SIGTERM; resume with:\njumplora compare" in capsys.readouterr().err
    gone, kept = tmp_path / "data" / "weather" / "test.json", files(out)
    rows = gone.read_text()
    gone.unlink()
    assert main(words) in (1, 2) and "weather" in capsys.readouterr().err
    assert files(out) == kept  # the state is as it was
    gone.write_text(rows)
    assert main(words) == 0 and "learned.png" in capsys.readouterr().out


def test_every_write_may_fail_once_and_the_run_resumes(whole, tmp_path):
    failures, out, full = 0, tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for allowed in (0, *[1, 2, 3, 4] * 8):  # archive, state, the copy of its record, record
        try:
            with failing(os, "replace", allowed, full):
                found = learn(out, checkpoint_every=float("inf"))
            break
        except OSError as error:
            failures += 1
            assert error.errno == full.errno and "untouched" in str(error) and str(out) in str(error)
            assert not list(out.rglob(".*.tmp"))
            assert len(list(out.glob("*/state/after-*.safetensors"))) <= 2
    assert failures >= 4  # of thirteen writes
    assert_equal(found, whole)


def test_a_file_that_the_system_cuts_short_is_not_kept_and_the_run_resumes(whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # enough for a record, not for a state
    try:
        with pytest.raises(OSError, match="01-topics.safetensors") as error:
            learn(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".*.tmp")) and Run.load(next(tmp_path.glob("*/record.json"))).zero_shot
    assert_equal(learn(tmp_path), whole)


# ---- files that cannot be trusted -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_second_task(tmp_path_factory):
    "The folder of a run that was stopped in its second task, with a state and a checkpoint."
    out = tmp_path_factory.mktemp("stopped")
    with signal_at(3, signal.SIGTERM, "weather"), pytest.raises(Stopped):
        learn(out)
    return next(out.iterdir())


@pytest.fixture
def folder(in_second_task, tmp_path):
    "A copy of it."
    return shutil.copytree(in_second_task, tmp_path / in_second_task.name)


def states(folder):
    "Names of the files of state and checkpoint."
    return sorted(path.name for path in folder.glob("state/*.safetensors"))


def spoil(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_checkpoint_is_set_aside_and_the_task_starts_again(folder, whole):
    spoil(folder / "state" / "step.safetensors")
    with pytest.warns(UserWarning, match=r"now step\.damaged-1\.safetensors, and the training starts again"):
        assert_equal(learn(folder.parent), whole)


def test_a_damaged_state_is_set_aside_and_the_run_resumes_from_the_one_before(folder, whole):
    with failing(continual, "evaluate", 0, RuntimeError("lost")), pytest.raises(RuntimeError):
        learn(folder.parent)  # after the second task, before it is scored
    assert states(folder) == ["after-1.safetensors", "after-2.safetensors"]
    spoil(folder / "state" / "after-2.safetensors")
    with pytest.warns(UserWarning, match=r"now after-2\.damaged-1\.safetensors.* after 1 learned tasks"):
        assert_equal(learn(folder.parent), whole)
    assert states(folder) == ["after-2.damaged-1.safetensors", "after-2.safetensors"]
    assert {path.name for path in folder.glob("state/*")} - set(states(folder)) == {"after-2.json", "lock"}


def test_a_checkpoint_of_another_run_or_state_is_not_used(folder, whole):
    path = folder / "state" / "step.safetensors"
    tensors, about, _ = read_tensors(path)
    owner = dict(run=Run.load(folder).configuration_hash, task=1, after=about["owner"]["after"])
    assert about["owner"] == owner and Checkpoint(path, owner).read() is not None
    for key, value in dict(run="0" * 64, task=0, after="").items():
        write_tensors(path, tensors, about | dict(owner=owner | {key: value}))
        assert Checkpoint(path, owner).read() is None
    assert_equal(learn(folder.parent), whole)


def test_a_whole_state_that_the_record_does_not_name_is_refused(folder):
    path = folder / "state" / "after-1.safetensors"
    tensors, about, _ = read_tensors(path)
    write_tensors(path, tensors, about | dict(tasks=2))
    with pytest.raises(Damaged, match="is not the state that the record names; delete .* to learn"):
        learn(folder.parent)


def test_a_state_of_another_format_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    for note, message in (({"jumplora": '{"format": 2}'}, "format 2.*reads format 1"), (None, "format None")):
        path.write_bytes(save({"a": torch.zeros(2)}, metadata=note))
        with pytest.raises(Damaged, match=message):
            read_tensors(path)


def test_a_record_that_was_set_aside_by_hand_loses_nothing_that_a_state_holds(folder, whole):
    (folder / "record.json").rename(folder / "aside.json")
    found = learn(folder.parent)
    assert_equal(found, whole)
    assert found[0].seconds["train"][0] == Run.load(folder / "aside.json").seconds["train"][0]  # as it was


@pytest.mark.parametrize("left", [[], ["weather"]], ids=["all saved", "one task saved"])
def test_a_second_process_waits_for_the_lock_and_then_reads_what_the_first_saved(
    left, whole, in_second_task, tmp_path
):
    source = in_second_task if left else tmp_path / "other" / whole[0].name
    if not left:
        learn(source.parent)
    folder, waits, found = tmp_path / "out" / source.name, threading.Event(), []

    def second():
        with patch("jumplora.storage.state.warnings.warn", lambda *words, **options: waits.set()):
            found.append(learn(folder.parent))

    with patch.object(continual, "train_task", wraps=continual.train_task) as trained:
        with held_lock(folder / "state" / "lock"):
            thread = threading.Thread(target=second)
            thread.start()
            assert waits.wait(60)
            thread.join(1)
            assert not (folder / "record.json").exists()
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
        thread.join(60)
    assert [call.args[2].name for call in trained.call_args_list] == left
    assert_equal(found[0], whole)


def test_what_a_killed_writer_left_is_removed_and_a_folder_stays_small(whole, tmp_path):
    folder = tmp_path / whole[0].name
    (folder / "state").mkdir(parents=True)
    for place in (folder, folder / "state"):
        (place / ".0123456789abcdef.tmp").write_bytes(b"half a state")
    run, _ = learn(tmp_path, checkpoint_every=0)
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    archives = ["01-topics.safetensors", "02-weather.safetensors"]
    assert names == [*archives, "after-2.json", "after-2.safetensors", "lock", "record.json"]
    assert run.extra["state_bytes"] == (folder / "state" / "after-2.safetensors").stat().st_size


def test_an_unfinished_run_keeps_its_last_two_states(tmp_path):
    tasks = [*TASKS, Task("more", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4])]
    # three untrained, one after the first task, two after the second
    with failing(continual, "evaluate", 6, RuntimeError("lost")), pytest.raises(RuntimeError, match="lost"):
        learn(tmp_path, "IncLoRA", tasks=tasks)
    assert states(next(tmp_path.iterdir())) == ["after-2.safetensors", "after-3.safetensors"]


def test_what_a_kill_after_the_last_score_leaves_is_removed_by_the_next_call(whole, tmp_path):
    # removed before each of the two states is written, and at the end
    with failing(state, "_remove_states", 2, RuntimeError("lost")), pytest.raises(RuntimeError, match="lost"):
        learn(tmp_path)
    folder = tmp_path / whole[0].name
    assert Run.load(folder).complete and states(folder) == ["after-1.safetensors", "after-2.safetensors"]
    (folder / "state" / "step.safetensors").write_bytes(b"of the last task, which is finished")
    assert content(learn(tmp_path)[0]) == content(whole[0])
    assert states(folder) == ["after-2.safetensors"]


def test_a_finished_run_in_a_read_only_place_is_only_read(whole, tmp_path):
    out = tmp_path / "out"
    (out / whole[0].name).mkdir(parents=True)
    whole[0].save(out)
    lock, write = "jumplora.storage.state.held_lock", "jumplora.storage.record.write_atomic"
    with patch(lock, None), patch(write, None):
        assert content(learn(out)[0]) == content(whole[0])


def test_leaving_a_run_after_its_first_task_keeps_its_state(whole, tmp_path):
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    sequence, method = TaskSequence("short", TASKS), METHODS["ELLA + JumpLoRA"]
    options = dict(seed=1, out=tmp_path, progress=False)
    learner = continual.Learner(model, tokenizer, sequence, method, QUICK, **options)
    with learner.running():
        learner.score()
        learner.finish(0, learner.train(0))
    assert states(learner.folder) == ["after-1.safetensors"]
    assert_equal(learn(tmp_path), whole)


def test_a_complete_run_without_its_state_says_that_the_model_stays_as_it_was(tmp_path):
    first, learned = learn(tmp_path, "IncLoRA")
    again, same = learn(tmp_path, "IncLoRA")
    assert content(again) == content(first) and same_weights(same, learned)
    shutil.rmtree(tmp_path / first.name / "state")
    with pytest.warns(UserWarning, match="its state was removed: the model stays as it was given") as caught:
        again, untouched = learn(tmp_path, "IncLoRA")
    assert caught[0].filename == __file__
    assert content(again) == content(first) and not same_weights(untouched, learned)


def test_a_signal_is_stored_where_nobody_reads_the_terminal_any_more():
    request = state.StopRequest()
    with patch("os.write", side_effect=BrokenPipeError):
        request.receive(signal.SIGINT)  # no error that would end the step
    with pytest.raises(Stopped):
        request.obey()
