"""Grids: plans, keys, states, processes that fail, are stopped or killed, a stand-in for SLURM, refusals."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import submitit
import torch
from tokenizers import normalizers
from torch import nn

from jumplora.command_line import main
from jumplora.conventions import write_atomic
from jumplora.data.backbones import load_backbone
from jumplora.data.sequences import newsroom
from jumplora.learning.training import TrainConfig
from jumplora.running import grid
from jumplora.running.grid import Job, job_sequence, plan, run_grid, status
from jumplora.running.reproduce import project
from jumplora.storage.record import Run
from jumplora.storage.state import held_lock, weights_fingerprint

SMALL = dict(backbone="tiny-llama", rows=dict(train=8, dev=0, test=4), train=dict(max_length=200))


def write_rows(folder, word, tasks=1, rows=8, labels=("yes", "no")):
    "A folder of small tasks."
    for task in "abcdefgh"[:tasks]:
        (folder / task).mkdir(parents=True, exist_ok=True)
        lines = [dict(text=f"{word} {i}", label=labels[i % 2]) for i in range(rows)]
        for name in ("train.jsonl", "test.jsonl"):
            (folder / task / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


SHARED = TemporaryDirectory()
ROWS = write_rows(Path(SHARED.name) / "mine", "text", tasks=2)


@pytest.fixture
def here(monkeypatch):
    "Does at once, in this process, what submitit would do in one of its own; or, without `works`, nothing."

    def submit(work, key):
        with suppress(ValueError, OSError, RuntimeError):
            work(key) if executor.works else None
        return executor.submit.return_value

    executor = Mock(works=True)
    executor.submit.side_effect = submit
    executor.given = lambda name: [call.args[0].keywords[name] for call in executor.submit.call_args_list]
    monkeypatch.setattr(submitit, "AutoExecutor", lambda **where: executor)
    return executor


@pytest.fixture
def forked(monkeypatch):
    "Workers in processes of their own that need not import anything again."

    def submit(work, key):
        process = get_context("fork").Process(target=work, args=(key,))
        process.start()
        return Mock(_process=process, done=lambda: not process.is_alive())

    monkeypatch.setattr(submitit, "AutoExecutor", lambda **where: Mock(submit=submit))


def states(out):
    return list(status(out)["state"])


def seeds(*numbers, **other):
    return plan(["IncLoRA"], [ROWS], numbers, **SMALL | other)


def far(seed=1):
    "A job that fails in its worker."
    return seeds(seed, train=dict(max_length=200, batch_size=2, learning_rate=1e300))


def saved(change, folder):
    "tiny-llama as a folder, with a change that asks for settings of training."
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    train = change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return dict(backbone=str(folder), train=train)


JOBS = seeds(1)


# ---- plans ------------------------------------------------------------------------------------------------


def test_a_plan_has_every_combination_once_and_single_tasks_once():
    jobs = plan(["IncLoRA", "ELLA", "IncLoRA"], iter(["order1", "order2"]), [1, 2, 1], {"ELLA": 3.0}, **SMALL)
    assert len(jobs) == len({job.key for job in jobs}) == 8
    assert [job.strength for job in jobs[:4]] == [None, 3.0, None, 3.0]
    assert [(job.sequence, job.seed) for job in jobs[::2]] == [
        ("order1", 1), ("order2", 1), ("order1", 2), ("order2", 2),
    ]  # fmt: skip
    assert plan(["ELLA"], [1, "2"], [1], **SMALL) == plan(["ELLA"], ["order1", "order2"], [1], **SMALL)
    gated = plan(
        ["ELLA + JumpLoRA"],
        ["order1-hub"],
        [1],
        {"ELLA + JumpLoRA": {"order1-hub": 7.0}, "ELLA": 3.0},
        **SMALL,
    )
    assert gated[0].strength == 7.0
    with pytest.raises(ValueError, match="method with a strength='Ella'.*did you mean 'ELLA'"):
        plan(["ELLA"], ["order1"], [1], {"Ella": 3.0}, **SMALL)
    tasks = [job.sequence for job in plan(["single task"], ["order1", "order2", "order3"], [1], **SMALL)]
    assert tasks == ["dbpedia", "amazon", "yahoo", "agnews"]
    mixed = plan(["ELLA", "single task"], ["order1", "order2"], [1], **SMALL)
    assert [job.method for job in mixed] == ["ELLA", *4 * ["single task"], "ELLA"]
    assert len(plan(["single task"], [f"order{n}" for n in range(1, 7)], [1], **SMALL)) == 15


def test_the_command_plans_a_protocol_and_flags_override_it(monkeypatch):
    run = Mock()
    run.return_value = pd.DataFrame(dict(state=["done"]))
    monkeypatch.setattr(grid, "run_grid", run)
    monkeypatch.setattr(grid, "status", lambda out: pd.DataFrame(dict(state=["done"])))

    def planned(words):
        assert main(["grid", *shlex.split(words)]) == 0
        return run.call_args.args[0]

    def strengths(words):
        return {(job.method, job.sequence): job.strength for job in planned(f"--seed 1 {words}")}

    paper = strengths("--protocol paper --sequence order1 order4 order5 order6-hub")
    expected = dict(order1=3e4, order4=[5e5] * 14 + [5e7], order5=[5e6] * 12 + [5e7] * 3)
    for name, value in (expected | {"order6-hub": 5e5}).items():
        assert paper["ELLA", name] == paper["ELLA + JumpLoRA", name] == value
    assert paper["IncLoRA", "order1"] is None
    chosen = strengths("--method ELLA --sequence 3 newsroom newsroom20")
    assert list(chosen.values()) == [3e6, 3e5, None]
    flags = strengths("--method ELLA 'O-LoRA + JumpLoRA' --strength ELLA=7 --sequence order2")
    assert flags == {("ELLA", "order2"): 7.0, ("O-LoRA + JumpLoRA", "order2"): 0.5}
    jobs = planned("--set kept=0.05 threshold_scope=block group_by_length=true kept=null kept=0.05")
    assert {(job.dtype, job.split, job.rows["train"]) for job in jobs} == {("float32", "test", 120)}
    tried = dict(threshold_scope="block", group_by_length=True)
    tries = [train for train, _ in groupby(job.train for job in jobs)]
    assert tries == [dict(kept=0.05) | tried, dict(kept=None) | tried]


def test_a_key_changes_with_everything_that_is_asked_and_is_safe_as_a_name():
    job = Job("ELLA + JumpLoRA", "order1", 1, "tiny-llama")
    changes = dict(
        method="ELLA", sequence="order2", seed=2, backbone="x", rows={"train": 3}, train={"kept": 0.1},
        strength=1.0, split="dev", dtype="float32", fingerprint="0", scoring="labels", neutral=True,
        regularizer={"norm": 2.0}, archive=False,
    )  # fmt: skip
    assert changes.keys() == {field.name for field in fields(Job)}
    keys = {replace(job, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {job.key}) == len(changes) + 1
    key = Job("ELLA", "../../x/..", 1, "b").key
    assert key.strip("-._abcdefghijklmnopqrstuvwxyz0123456789") == "" and "/" not in key


def test_a_job_is_learned_as_it_was_asked(here, tmp_path, monkeypatch):
    learn = Mock()
    monkeypatch.setattr(grid, "learn_sequence", learn)
    monkeypatch.setattr(grid, "dry_check", Mock())  # the labels may begin alike
    monkeypatch.setattr(grid, "tales", lambda: ("one text",))
    asked = dict(scoring="labels", neutral=True, archive=False, regularizer=dict(norm=2.5))
    run_grid(plan(["IncLoRA scaled"], [ROWS], [1], **SMALL, **asked), tmp_path, device="cpu")
    (*_, method, config), given = learn.call_args
    assert (given["scoring"], given["neutral"], given["archive"]) == ("labels", ("one text",), False)
    assert method.regularizer.norm == 2.5 and config.max_length == 200 and given["seed"] == 1


def test_a_single_task_of_the_benchmark_is_a_sequence_of_one(monkeypatch):
    whole = newsroom().limit(train=4, dev=0, test=4)
    monkeypatch.setattr(grid, "load_sequence", lambda name, folder, **rows: whole)
    sequence = job_sequence(Job("single task", "hobbies", 1, "tiny-llama"))
    assert sequence.names == ("hobbies",) and sequence[0] == whole["hobbies"]


# ---- states -----------------------------------------------------------------------------------------------


def test_the_state_of_a_job_is_that_of_its_runs_folder(here, tmp_path, capsys):
    table = run_grid([*far(), *JOBS], tmp_path, workers=2)
    assert list(table["state"]) == ["failed", "done"]
    error, key = table["note"].iloc[0], table.index[1]
    assert error.startswith("Diverged: task 'a': the loss became nan") and "\n" not in error
    assert f"{table.index[0]}: failed: {error}" in capsys.readouterr().out
    assert main(["grid", "--status", "--out", str(tmp_path)]) == 1  # a script can see the failure
    assert "1 done, 0 running, 1 failed, 0 waiting" in capsys.readouterr().out

    record = next(tmp_path.glob("mine*/record.json"))
    text = record.read_text()
    content = json.loads(text)["configuration"]
    assert all(counts == [8, 0, 4] for counts in content["counts"].values())
    assert content["train"]["max_length"] == 200
    for damaged in (text[:100], text.replace('"seed": 1', '"seed": 2')):
        record.write_text(damaged)
        assert states(tmp_path) == ["failed", "waiting"]
        assert status(tmp_path)["note"].iloc[1] == "no record that can be read"
    record.unlink()
    assert status(tmp_path)["note"].iloc[1] == "no task learned yet"
    with held_lock(record.parent / "state" / "lock") as ours:
        assert ours and states(tmp_path) == ["failed", "running"]
        here.submit.reset_mock()
        run_grid(JOBS, tmp_path)  # somebody is at it
        assert not here.submit.called
    with pytest.MonkeyPatch.context() as patch:  # somebody else's, which may only be read
        patch.setattr(grid, "held_lock", Mock(side_effect=PermissionError("no")))
        assert states(tmp_path) == ["failed", "waiting"]
    record.write_text(text)
    assert states(tmp_path) == ["failed", "done"]

    note = tmp_path / "jobs" / key / "run.json"
    (tmp_path.parent / "record.json").write_text(text)  # of a folder that is not the grid's
    for odd in ('{"run": "../../../etc"}', '{"run": ".."}', '{"run": 5}', "no json", "[1]", "[" * 5000):
        note.write_text(odd)
        assert states(tmp_path) == ["failed", "waiting"]  # a name is never a path
    before = record.stat().st_mtime_ns
    for _ in range(2):  # finds the run, and learns nothing again; then nothing is handed over
        run_grid(JOBS, tmp_path)
        assert states(tmp_path) == ["failed", "done"] and record.stat().st_mtime_ns == before
    assert here.submit.call_count == 1


def test_folders_of_other_versions_and_damaged_jobs_are_left_alone(here, tmp_path):
    here.works = False
    path = tmp_path / "jobs.json"
    run_grid(JOBS, tmp_path)
    good = path.read_text()
    odd = {
        *('{"format": 99}', good.replace('"format": 2', '"format": 1'), "no json", "[]", "", '{"format": 2}'),
        good.replace('"seed": 1', '"seed": 2'),
        good.replace('"seed": 1', '"seed": Infinity'),
        good.replace('"seed"', '"sed"'),
        good.replace('"jobs": {', '"jobs": {"x": 1, '),
    }
    message = "is damaged or of another version than format 2; use another folder"
    for content in odd:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            status(tmp_path)
        with pytest.raises(ValueError, match=message):
            run_grid(JOBS, tmp_path)
        assert path.read_text() == content
    with pytest.raises(ValueError, match="holds no grid"):
        status(tmp_path / "nowhere")


# ---- workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, processes, each", [(1, 1, 8), (3, 1, 2), (16, 1, 2), (1, 2, 4), (2, 4, 1)])
def test_workers_share_the_threads_of_torch(workers, processes, each, here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    here.works = False
    run_grid(seeds(1, 2, 3), tmp_path, workers=workers, processes=processes, device="cpu")
    assert here.given("threads") == [each] * 3 and here.given("device") == ["cpu"] * 3
    assert here.update_parameters.call_args.kwargs["tasks_per_node"] == processes
    assert states(tmp_path) == ["failed"] * 3  # their processes ended, and left no record


@pytest.mark.parametrize(
    "device, processes, visible, expected",
    [
        ("auto", 1, None, [("cuda", str(i)) for i in range(5)]),
        ("cuda", 1, "7,2,3,4,GPU-9", [("cuda", name) for name in ("7", "2", "3", "4", "GPU-9")]),
        ("cuda:1", 1, None, [("cuda", "1")]),
        ("cuda:1", 1, "7,2,3,4,GPU-9", [("cuda", "2")]),
        ("cpu", 2, None, [("cpu", "all")]),
        ("auto", 2, None, [("cuda", "0,1"), ("cuda", "2,3")]),
        ("cuda", 2, "7,2,3,4,GPU-9", [("cuda", "7,2"), ("cuda", "3,4")]),
    ],
)
def test_jobs_take_gpus_in_turn(device, processes, visible, expected, here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here.works = False
    run_grid(seeds(*range(6)), tmp_path, workers=6, device=device, processes=processes)
    given = list(zip(here.given("device"), here.given("visible"), strict=True))
    assert given == [expected[i % len(expected)] for i in range(6)]
    for wrong, n, message in (
        ("auto", 6, "processes=6: device='auto' has 5 GPUs here; use as many"),
        ("cuda:1", 2, "processes=2: device='cuda:1' has 1 GPUs here; use as many"),
        ("cuda:5", 1, "number of a GPU='5' is not known; use '0', '1', '2', '3' or '4'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_grid(JOBS, tmp_path, device=wrong, processes=n)


def test_a_job_loads_its_model_on_the_only_gpu_that_it_sees(here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    load, seen = grid.load_backbone, []

    def load_here(name, *, device="auto", **options):
        if device == "cpu":  # the check before any job starts
            return load(name, device=device, **options)
        seen.append((device, os.environ["CUDA_VISIBLE_DEVICES"]))
        raise ValueError("no GPU is needed to see where it would go")

    monkeypatch.setattr(grid, "load_backbone", load_here)
    run_grid(seeds(1, 2, 3), tmp_path, workers=2)
    assert seen == [("cuda", "4"), ("cuda", "6"), ("cuda", "4")]


def test_ctrl_c_stops_the_workers(here, tmp_path, monkeypatch):
    here.works = False
    monkeypatch.setattr(time, "sleep", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_grid(seeds(1, 2, 3), tmp_path, workers=2)
    stopped = here.submit.return_value._process.terminate
    assert stopped.call_count == 2 and states(tmp_path) == ["waiting"] * 3


def test_ctrl_c_works_again_after_a_worker_could_not_start(here, tmp_path):
    here.submit.side_effect = OSError("no process is left")
    with pytest.raises(OSError, match="no process is left"):
        run_grid(JOBS, tmp_path)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_single_task_is_one_that_the_sequence_has_alone(tmp_path):
    (alone,) = plan(["single task"], [write_rows(tmp_path / "one", "text")], [1], **SMALL)
    assert job_sequence(alone).names == ("a",)
    (several,) = plan(["single task"], [ROWS], [1], **SMALL)
    with pytest.raises(ValueError, match="'single task' learns one task; 'mine' has 2"):
        grid.job_method(several)[0].check_fits(job_sequence(several))


def test_the_benchmarks_folder_may_begin_with_a_tilde(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    here.works = False
    run_grid(JOBS, tmp_path / "out", folder="~/rows")
    assert here.given("folder") == [str(tmp_path / "rows")]


def test_when_its_minutes_are_over_a_grid_starts_nothing_and_stops_what_runs(here, tmp_path):
    assert list(run_grid(seeds(1, 2), tmp_path / "none", minutes=0)["state"]) == ["waiting"] * 2
    assert not here.submit.called
    here.works = False
    job = here.submit.return_value
    job._process.terminate.side_effect = lambda: job.done.configure_mock(return_value=True)
    job.done.return_value = False
    table = run_grid(seeds(1, 2, 3), tmp_path / "some", workers=2, minutes=0.01)
    assert job._process.terminate.call_count == 2 and list(table["state"]) == ["waiting"] * 3


def grid_command(out, sequence):
    "`jumplora grid` with two jobs, in a process of its own."
    flags = f"--method IncLoRA SeqLoRA --sequence {sequence} --seed 1 --backbone tiny-llama --out {out}"
    command = [sys.executable, "-m", "jumplora.command_line", "grid", *flags.split(), "--device", "cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def heard():  # tests that run in the background inherit that Ctrl+C is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(command, start_new_session=True, preexec_fn=heard, **pipes)


def wait_until_it_learns(out):
    "The folder of the run that has begun."
    deadline = time.time() + 400
    while not (begun := list(out.glob("long*/state/lock"))) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    return begun[0].parent


def test_a_signal_to_the_command_lets_its_workers_save_and_stop(tmp_path):
    rows = write_rows(tmp_path / "long", "text " * 30, tasks=8, rows=120)
    numbers = {signal.SIGTERM: os.kill, signal.SIGINT: os.killpg}  # Ctrl+C goes to the workers too
    processes = {number: grid_command(tmp_path / number.name, rows) for number in numbers}
    for number, send in numbers.items():
        process, out = processes[number], tmp_path / number.name
        state = wait_until_it_learns(out)
        send(process.pid, number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number and "Traceback" not in err
        assert f"stopped by {number.name}; resume with:" in err
        assert states(out) == ["waiting", "waiting"] and len(list(out.glob("long*"))) == 1
        (log,) = out.glob("jobs/*_inclora_*/*.err")
        assert "stops after this step or score" in log.read_text()
        assert list(state.glob("*.safetensors"))  # saved where it stopped


def test_a_worker_that_is_killed_while_it_imports_has_failed(tmp_path, monkeypatch, capsys):
    kills = "import os, sys\nif 'submitit.core._submit' in sys.orig_argv: os.kill(os.getpid(), 9)\n"
    (tmp_path / "sitecustomize.py").write_text(kills)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    words = f"--method IncLoRA SeqLoRA --sequence {ROWS} --seed 1 --backbone tiny-llama --workers 2"
    assert main(["grid", *words.split(), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "0 done, 0 running, 2 failed, 0 waiting" in said and "its process was killed" in said


@pytest.mark.parametrize("changed", ["rows", "weights"])
def test_other_rows_or_weights_behind_a_path_are_another_job(changed, here, tmp_path):
    words = iter(["text", "word", "third", "late"])
    scales = iter([1.0, 1.5, 2.0, 2.5])

    def scale_first_layer(model, tokenizer):
        model.model.layers[0].self_attn.q_proj.weight.data *= next(scales)

    def change():
        if changed == "weights":
            saved(scale_first_layer, tmp_path / "model")
        return write_rows(tmp_path / "data", next(words) if changed == "rows" else "text")

    backbone = str(tmp_path / "model") if changed == "weights" else "tiny-llama"
    jobs = plan(["IncLoRA"], [change()], [1], **SMALL | dict(backbone=backbone, dtype="float32"))
    first = run_grid(jobs, tmp_path / "out")
    assert run_grid(jobs, tmp_path / "out").equals(first) and here.submit.call_count == 1
    change()
    second = run_grid(jobs, tmp_path / "out")
    assert here.submit.call_count == 2 and first.index[0] != second.index[0]
    assert states(tmp_path / "out") == ["done", "done"] and len(list(tmp_path.glob("out/data*"))) == 2
    here.works = False
    change()
    (key,) = run_grid(jobs, tmp_path / "out").index
    change()
    with pytest.raises(ValueError, match="has changed since; give the command again"):
        grid._run_job(str(tmp_path / "out"), key, folder=None, device="cpu", processes=1)


def test_the_exit_code_is_of_the_jobs_of_this_command_and_earlier_failures_are_named(here, tmp_path, capsys):
    words = f"--method IncLoRA --sequence {ROWS} --seed 1 --backbone tiny-llama --out {tmp_path}".split()
    few = dict(rows=SMALL["rows"], train=SMALL["train"], dense={}, strengths={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grid.PROTOCOLS, "reduced", few)
        assert main(["grid", *words, "--set", "learning_rate=1e300", "batch_size=2"]) == 1
        assert "earlier command" not in capsys.readouterr().out
        assert main(["grid", *words]) == 0
        assert "1 failed in an earlier command" in capsys.readouterr().out
        assert main(["grid", "--status", "--out", str(tmp_path)]) == 1
        assert main(["grid", *words, "--set", "learning_rate=1e300", "batch_size=2"]) == 1  # retried
        assert "earlier command" not in capsys.readouterr().out


def test_a_killed_worker_stops_no_other_and_a_second_call_resumes_it(forked, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "mine", "text", tasks=4)
    jobs = plan(["IncLoRA", "SeqLoRA"], [rows], [1], **SMALL)
    sleep, parent, submit, workers = time.sleep, os.getpid(), submitit.AutoExecutor().submit, {}
    seen = []

    def submit_and_note(work, key):
        workers[key] = submit(work, key)
        return workers[key]

    def kill_after_the_first_task(seconds):
        for path in tmp_path.glob("*_inclora_*/record.json") if os.getpid() == parent and not seen else ():
            if Run.load(path).finished:
                seen.extend(status(tmp_path)["state"])
                next(job for key, job in workers.items() if "_inclora_" in key)._process.kill()
        sleep(min(seconds, 0.02))

    monkeypatch.setattr(submitit, "AutoExecutor", lambda **where: Mock(submit=submit_and_note))
    monkeypatch.setattr(time, "sleep", kill_after_the_first_task)
    table = run_grid(jobs, tmp_path, workers=2)
    assert seen[0] == "running" and list(table["state"]) == ["failed", "done"]
    said = "its process was killed; a second call resumes"
    assert table["note"].iloc[0] == said and f"{table.index[0]}: failed: {said}" in capsys.readouterr().out
    killed = Run.load(next(tmp_path.glob("*_inclora_*")))
    assert 0 < killed.finished < 4
    stamp = next(tmp_path.glob("*_seqlora_*/record.json")).stat().st_mtime_ns

    assert list(run_grid(jobs, tmp_path, workers=2)["state"]) == ["done", "done"]
    assert next(tmp_path.glob("*_seqlora_*/record.json")).stat().st_mtime_ns == stamp  # not done again
    resumed = Run.load(next(tmp_path.glob("*_inclora_*")))
    rows = slice(killed.finished)
    assert np.array_equal(resumed.accuracy[rows], killed.accuracy[rows], equal_nan=True)
    assert resumed.extra["loss"]["a"] == killed.extra["loss"]["a"]


def test_a_job_of_two_processes_has_the_scores_of_one(here, tmp_path, monkeypatch):
    jobs = plan(["ELLA + JumpLoRA"], [ROWS], [1], **SMALL)
    run_grid(jobs, tmp_path / "one", device="cpu")
    monkeypatch.undo()
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    assert list(run_grid(jobs, tmp_path / "two", processes=2, device="cpu")["state"]) == ["done"]
    two, one = (Run.load(next((tmp_path / name).glob("mine*"))) for name in ("two", "one"))
    assert two.extra["processes"]["a"]["processes"] == 2 and "processes" not in one.extra
    assert two.name == one.name and np.array_equal(two.accuracy, one.accuracy, equal_nan=True)
    for task, losses in one.extra["loss"].items():
        assert np.allclose(two.extra["loss"][task], losses, atol=1e-5)


def test_slurm_gets_one_array_of_what_is_missing_and_the_call_returns(tmp_path, monkeypatch):
    tools, out = tmp_path / "bin", tmp_path / "grid"
    tools.mkdir()
    for name, says in dict(sbatch="Submitted batch job 4242", srun="", sacct="", scontrol="").items():
        (tools / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/{name}.sh 2>/dev/null\necho "{says}"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    options = dict(slurm_partition="fast", gpus_per_node=1, timeout_min=90)
    with held_lock(out / "one" / "state" / "lock"):  # the first job is running
        weights = weights_fingerprint(load_backbone("tiny-llama", device="cpu")[0])
        known = grid._rows_fingerprint(job_sequence(JOBS[0])) + weights
        key = replace(JOBS[0], fingerprint=known).key
        write_atomic(out / "jobs" / key / "run.json", '{"run": "one"}')
        table = run_grid(seeds(1, 2, 3), out, workers=2, engine="slurm", processes=4, **options)
    script = (tmp_path / "sbatch.sh").read_text()
    assert "#SBATCH --array=0-1%2" in script  # two of three, two at a time
    assert "#SBATCH --partition=fast" in script and "#SBATCH --time=90" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    assert list(table["state"]) == ["running", "waiting", "waiting"]


def refused_by_submitit(number, frame):
    "What submitit does with SIGTERM, and with the signal that comes before a time limit."
    raise AssertionError("the worker did not take the signal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=["SIGTERM", "time limit"])
def test_a_signal_of_the_cluster_lets_a_worker_save_and_stop(number, here, tmp_path):
    here.works = False
    rows = write_rows(tmp_path / "long", "text", tasks=8, rows=64)
    jobs = plan(["IncLoRA"], [rows], [1], backbone="tiny-llama")
    (key,) = run_grid(jobs, tmp_path).index

    def work():
        for taken in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(taken, refused_by_submitit)
        grid._run_job(str(tmp_path), key, folder=None, device="cpu", processes=1)

    worker = get_context("fork").Process(target=work)
    worker.start()
    state = wait_until_it_learns(tmp_path)
    os.kill(worker.pid, number)
    worker.join(60)
    assert worker.exitcode == 1 and states(tmp_path) == ["waiting"]
    assert list(state.glob("*.safetensors"))


# ---- before a worker starts -------------------------------------------------------------------------------


def tied(model, tokenizer):
    "An output layer that is the embedding."
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return dict(max_length=200, target_modules=["lm_head"])


def lossy(model, tokenizer):
    "A tokenizer that does not give an option back."
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("no", "on")
    return dict(max_length=200)


def quantised(folder, monkeypatch):
    "Weights of eight bits behind a name."
    load = grid.load_backbone

    def load_small(*name, **options):
        model, tokenizer = load(*name, **options)
        layer = model.model.layers[0].self_attn.q_proj
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        return model, tokenizer

    monkeypatch.setattr(grid, "load_backbone", load_small)
    return {}


UNFIT = {
    "max_length=20 leaves no room": lambda folder, patch: dict(train=dict(max_length=20)),
    "no dev rows to score in": lambda folder, patch: dict(split="dev"),
    "rows of='trian' is not known": lambda folder, patch: dict(rows=dict(trian=4)),
    "exceed the 2048 positions": lambda folder, patch: dict(
        sequence=write_rows(folder / "mine", "word " * 3000), train=dict(max_length=5000)
    ),
    "4 processes cannot share": lambda folder, patch: dict(train=dict(max_length=200, batch_size=2)),
    "turns the option 'no' into 'on'": lambda folder, patch: saved(lossy, folder),
    "shares its weight with": lambda folder, patch: saved(tied, folder),
    "are quantised": quantised,
    "0.0 GB free": lambda folder, patch: patch.setattr("shutil.disk_usage", lambda place: Mock(free=1)) or {},
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_cannot_work_is_refused_before_a_worker_starts_and_the_job_is_named(
    message, here, tmp_path, monkeypatch
):
    jobs = [*JOBS, replace(seeds(3)[0], **UNFIT[message](tmp_path / "unfit", monkeypatch))]
    with pytest.raises((ValueError, OSError), match=f"IncLoRA on .*mine, seed [13]: .*{message}"):
        run_grid(jobs, tmp_path / "out", processes=4, device="cpu")
    assert not here.submit.called and not (tmp_path / "out").exists()


def test_a_model_is_loaded_and_checked_once_for_all_jobs_that_read_the_same(here, tmp_path, monkeypatch):
    here.works = False
    load, check = (Mock(side_effect=getattr(grid, name)) for name in ("load_backbone", "dry_check"))
    monkeypatch.setattr(grid, "load_backbone", load)
    monkeypatch.setattr(grid, "dry_check", check)
    jobs = plan(["ELLA", "IncLoRA + JumpLoRA"], [ROWS], [1, 2], **SMALL)
    jobs += seeds(1, train=dict(max_length=200, kept=0.1)) + seeds(1, train=dict(max_length=300))
    run_grid(jobs + jobs, tmp_path)
    assert (load.call_count, check.call_count, here.submit.call_count) == (1, 2, 6)
    for path in tmp_path.glob("jobs/*/run.json"):
        path.write_text('{"run": "one"}')
    with held_lock(tmp_path / "one" / "state" / "lock"):  # all are running
        run_grid(jobs, tmp_path)
    assert (check.call_count, here.submit.call_count) == (2, 6)


# ---- the command ------------------------------------------------------------------------------------------


WRONG = {
    "--method Ella": "did you mean 'ELLA'",
    "--protocol big": "protocol='big'",
    "--strength ELLA": "is not NAME=NUMBER",
    "--strength ELLA=-1": "not allowed",
    "--strength ELLA=0,1,1": "seed 42: strength has 3 values for 2 tasks",
    "--strength ELLA=1 ELLA=2": "ELLA has one already",
    "--set kept": "is not NAME=VALUE",
    "--set =1": "is not NAME=VALUE",
    "--set rang=4": "did you mean 'rank'",
    "--set rank=0": "rank=0",
    "--sequence order7": "order7",
    "--sequence order1 --folder nowhere": "nowhere",  # rows that are missing
    "--engine lsf": "engine='lsf'",
    "--workers 0": "workers=0",
    "--processes 0": "processes=0",
    "--split foo": "split='foo'",
    "--dtype float23": "dtype='float23'",
    "--seeds=1": "--seeds is not a flag of `jumplora grid`; write --seed",
    "--status": "holds no grid",
    "--seed -1": "seed=-1 is not a whole number from 0",
    "--device cuad": "device='cuad' is not usable here",
    "--device cuda:99": "device='cuda:99' is not usable here",
    "--backbone tiny-lama": "did you mean 'tiny-llama'",
    "--backbone no/such": "backbone='no/such' cannot be loaded",
    "--set target_modules=q_prj": "q_proj",
    "--set max_length=20": "seed 42: max_length=20 leaves no room",
    "--slurm gpus=1": "Parameter 'gpus' need to be prefixed by an executor name",
    "--slurm slurm_partition=x": "slurm_partition needs engine='slurm', and this is engine='local'",
    "--slurm timeout_min=soon": "timeout_min",
    "--slurm workers=3": "--slurm workers=3: submitit has no such parameter; see --help",
    "--slurm jobs=3": "--slurm jobs=3: submitit has no such parameter",
    "--engine slurm --slurm slurm_partitoin=x": "engine='slurm'",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_answered_and_nothing_is_written(words, tmp_path, capsys):
    out = tmp_path / "grid"
    usual = dict(sequence=ROWS, backbone="tiny-llama", out=out)
    flags = [word for k, v in usual.items() if f"--{k}" not in words for word in (f"--{k}", str(v))]
    code = main(["grid", *flags, *words.split()])
    assert code == (1 if "nowhere" in words or "no/such" in words else 2)
    said = capsys.readouterr()
    assert WRONG[words] in said.err and "Traceback" not in said.err and not out.exists()


@pytest.mark.parametrize(
    ("method", "strength", "tasks"),
    [("ELLA", [1.0, 2.0, 3.0], 3), ("multi-task", None, 3), ("IncLoRA", None, 1)],
)
def test_a_strength_per_task_joint_training_and_one_task_are_projected(method, strength, tasks, tmp_path):
    folder = write_rows(tmp_path / "mine", "text", tasks=tasks, rows=24)
    job = Job(method, folder, 1, strength=strength, **SMALL | dict(rows={}))
    found = project([job], device="cpu", steps=(1, 2)).loc[method]
    assert found["runs"] == 1 and found["hours"] >= 0 and found["disk, GB"] > 0


def test_a_projection_multiplies_what_it_measured(tmp_path, monkeypatch):
    def fake(model, tokenizer, sequence, *rest, **options):
        train, score = (sum(len(getattr(task, part)) for task in sequence) for part in ("train", "test"))
        last = len(sequence[-1].train)
        assert train == 2 * last
        read = rest[1].epochs * last
        return Mock(peak_memory=3e9, seconds=dict(train=[1.0 + 2.0 * read], evaluate=[7.0 + 0.5 * score]))

    monkeypatch.setattr("jumplora.running.reproduce.learn_sequence", fake)
    folder = write_rows(tmp_path / "mine", "text", tasks=3, rows=24)
    settings = dict(rows={}, train=dict(max_length=200, batch_size=4, epochs=2.0))
    jobs = [Job("IncLoRA", folder, seed, **SMALL | settings) for seed in (1, 2)]
    found = project(jobs, device="cpu", steps=(1, 2)).loc["IncLoRA"]
    one = 2.0 * 2 * 3 * 24 + 0.5 * 24 * (3 + 2 + 1)  # two epochs; a task is scored after every later one
    assert found["hours"] == pytest.approx(2 * one / 3600) and found["peak memory, GB"] == 3
    assert found["ms per training row"] == 2000 and found["ms per scored row"] == 500 and found["runs"] == 2


# differences: 31
def test_the_papers_protocol_has_its_settings():
    config = TrainConfig(**grid.PROTOCOLS["paper"]["train"])
    assert (config.batch_size, config.max_length, config.truncation) == (32, 512, "reference")
    assert (config.rank, config.lora_alpha, config.learning_rate) == (8, 32, 1e-3)
    assert not config.group_by_length
