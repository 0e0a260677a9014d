"""Grids: plans, keys, states, real processes that fail or are killed, a stand-in for SLURM, refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from jumplora.command_line import main, parse_settings, swept
from jumplora.running import grid
from jumplora.running.grid import (
    Job,
    held_lock,
    job_sequence,
    job_state,
    open_grid,
    places_for,
    plan,
    read_job,
    run_grid,
    run_job,
    status,
)
from jumplora.storage.record import Run

SMALL = dict(backbone="tiny-llama", rows=dict(train=8, dev=0, test=4), train=dict(max_length=200))


def states(out):
    table = status(out)
    return dict(zip(table.index, table["state"], strict=True))


# ---- plans ------------------------------------------------------------------------------------------------


def test_a_plan_has_every_combination_once_and_single_tasks_once():
    jobs = plan(["IncLoRA", "ELLA", "IncLoRA"], ["order1", "order2"], [1, 2, 1], {"ELLA": 3.0}, **SMALL)
    assert len(jobs) == len({job.key for job in jobs}) == 8
    assert [job.strength for job in jobs[:4]] == [None, 3.0, None, 3.0]
    tasks = [job.sequence for job in plan(["single task"], ["order1", "order2", "order3"], [1], **SMALL)]
    assert tasks == ["dbpedia", "amazon", "yahoo", "agnews"]
    mixed = plan(["ELLA", "single task"], ["order1", "order2"], [1], **SMALL)
    assert [job.method for job in mixed] == ["ELLA", *4 * ["single task"], "ELLA"]
    everything = plan(["single task"], [f"order{n}" for n in range(1, 7)], [1], **SMALL)
    assert len(everything) == 15
    with pytest.raises(ValueError, match="did you mean 'ELLA'"):
        plan(["Ella"], ["order1"], [1], **SMALL)


def test_a_protocol_knows_the_strengths_and_a_flag_overrides_them(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(grid, "run_grid", lambda jobs, out, **where: asked.update({out: jobs}))
    monkeypatch.setattr(grid, "status", lambda out: pd.DataFrame(dict(state=["done"])))

    def strengths(*words):
        assert main(["grid", "--out", "here", "--seeds", "1", *words]) == 0
        return {(job.method, job.sequence): job.strength for job in asked["here"]}

    paper = strengths("--protocol", "paper", "--orders", "order1", "order4", "order5", "order6-hub")
    expected = dict(order1=3e4, order4=[5e5] * 14 + [5e7], order5=[5e6] * 12 + [5e7] * 3)
    expected |= {"order6-hub": 5e5}
    assert {name: paper["ELLA", name] for name in expected} == expected
    assert {name: paper["ELLA + JumpLoRA", name] for name in expected} == expected
    assert paper["IncLoRA", "order1"] is None
    words = ("--methods", "ELLA", "O-LoRA + JumpLoRA", "--strength", "ELLA=7", "--orders", "order2")
    reduced = strengths(*words)
    assert reduced == {("ELLA", "order2"): 7.0, ("O-LoRA + JumpLoRA", "order2"): 0.5}
    chosen = strengths("--methods", "ELLA", "--orders", "order3", "newsroom", "newsroom20")
    assert [chosen["ELLA", name] for name in ("order3", "newsroom", "newsroom20")] == [3e6, 3e5, None]


def test_a_key_changes_with_everything_that_is_asked_and_is_safe_as_a_name():
    job = Job("ELLA + JumpLoRA", "order1", 1, "tiny-llama")
    changes = dict(
        method="ELLA", sequence="order2", seed=2, backbone="x", rows={"train": 3}, train={"kept": 0.1},
        strength=1.0, split="dev", dtype="float32",
    )  # fmt: skip
    keys = {replace(job, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {job.key}) == len(changes) + 1
    assert Job("ELLA", "../../x/..", 1, "b").key.strip("-._abcdefghijklmnopqrstuvwxyz0123456789") == ""
    assert "/" not in Job("ELLA", "../../x/..", 1, "b").key


def test_every_mistake_is_found_before_anything_is_written(tmp_path):
    jobs = {
        "is no setting of training": Job("ELLA", "newsroom", 1, "tiny-llama", train={"rang": 4}),
        "rank=0": Job("ELLA", "newsroom", 1, "tiny-llama", train={"rank": 0}),
        "order9": Job("ELLA", "order9", 1, "tiny-llama"),
        "not allowed": Job("ELLA", "newsroom", 1, "tiny-llama", strength=-1.0),
        "strength has 3 values for 4 tasks": Job(
            "ELLA", "newsroom", 1, "tiny-llama", strength=[0.0, 1.0, 1.0]
        ),
    }
    for message, job in jobs.items():
        with pytest.raises(ValueError, match=message):
            run_grid([job], tmp_path / "grid")
    with pytest.raises(OSError, match="no such place|does not exist|not shipped"):
        run_grid(
            [Job("ELLA", "order1", 1, "tiny-llama")],
            tmp_path / "grid",
            folder=str(tmp_path / "no such place"),
        )
    assert not (tmp_path / "grid").exists()


def test_a_single_task_of_the_benchmark_is_a_sequence_of_one(monkeypatch):
    from jumplora.data.newsroom import newsroom
    from jumplora.running import grid

    whole = newsroom().limit(train=4, dev=0, test=4)
    monkeypatch.setattr(grid, "load_sequence", lambda name, folder, **rows: whole)
    sequence = job_sequence(Job("single task", "hobbies", 1, "tiny-llama"))
    assert sequence.names == ("hobbies",) and sequence[0] == whole["hobbies"]


# ---- states -----------------------------------------------------------------------------------------------


def test_a_done_job_is_done_only_while_its_record_is_good(tmp_path):
    (job,) = plan(["IncLoRA"], ["newsroom"], [1], **SMALL)
    open_grid(tmp_path, [job])
    folder = tmp_path / "jobs" / job.key
    assert job_state(folder) == ("waiting", "")
    assert run_job(str(tmp_path), job.key) == "done" and job_state(folder)[0] == "done"
    record = next(tmp_path.glob("newsroom*/record.json"))
    text = record.read_text()
    for damaged in (text[:100], text.replace('"seed": 1', '"seed": 2')):
        record.write_text(damaged)
        assert job_state(folder) == ("waiting", "its record is gone or damaged")
    record.write_text(text)
    assert job_state(folder)[0] == "done"
    (folder / "state.json").write_text('{"state": "done", "record": "../../../etc"}')
    assert job_state(folder)[0] == "waiting"  # a name is never a path
    (folder / "state.json").write_text("no json")
    assert job_state(folder) == ("waiting", "")
    before = record.stat().st_mtime_ns
    run_job(str(tmp_path), job.key)  # finds its record, and learns nothing again
    assert Run.load(record).complete and record.stat().st_mtime_ns == before


def test_a_lock_is_free_again_when_its_process_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from jumplora.running.grid import held_lock\n"
        "with held_lock(Path(sys.argv[1])) as ours: print(ours, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with held_lock(tmp_path / "lock") as ours:
        assert not ours
    holder.kill()
    holder.wait()
    with held_lock(tmp_path / "lock") as ours:
        assert ours


def test_a_worker_waits_out_somebody_who_only_looks(tmp_path):
    lock = tmp_path / "lock"
    looks = threading.Event()

    def look():
        with held_lock(lock):
            looks.set()
            time.sleep(0.3)

    looker = threading.Thread(target=look)
    looker.start()
    looks.wait()
    with held_lock(lock) as at_once:
        assert not at_once
    with held_lock(lock, patience=5) as ours:
        assert ours
    looker.join()


def test_folders_of_other_versions_and_damaged_jobs_are_left_alone(tmp_path):
    jobs = plan(["IncLoRA"], ["newsroom"], [1], **SMALL)
    for content in ('{"format": 99}', "no json", "[]"):
        (tmp_path / "grid.json").write_text(content)
        with pytest.raises(ValueError, match="is a grid of format"):
            run_grid(jobs, tmp_path)
        assert (tmp_path / "grid.json").read_text() == content and not (tmp_path / "jobs").exists()
        with pytest.raises(ValueError, match="is a grid of format"):
            status(tmp_path)
    (tmp_path / "grid.json").unlink()
    open_grid(tmp_path, jobs)
    asked = tmp_path / "jobs" / jobs[0].key / "asked.json"
    for damage in (asked.read_text().replace('"seed": 1', '"seed": 2'), "{}", "[1]", ""):
        asked.write_text(damage)
        with pytest.raises(ValueError, match="is damaged; delete"):
            read_job(asked.parent)
    with pytest.raises(ValueError, match="holds no grid"):
        status(tmp_path / "nowhere")


@pytest.mark.parametrize("workers, processes, each", [(1, 1, 8), (3, 1, 2), (16, 1, 1), (1, 2, 4), (2, 4, 1)])
def test_workers_share_the_threads_that_torch_was_given(workers, processes, each, tmp_path, monkeypatch):
    class Executor:
        def submit(self, job, out, key, folder, device, threads, visible, processes):
            return device, threads

    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(grid, "executor_for", lambda *where: Executor())
    monkeypatch.setattr(grid, "run_local", lambda out, keys, workers, submit: given.append(submit("a", 0)))
    grid.start_here(tmp_path, ["a"], workers, processes, [("cpu", "all")], None, {})
    assert given == [("cpu", each)]


def test_jobs_take_gpus_in_turn_and_those_of_several_processes_take_as_many_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places_for("auto") == [(f"cuda:{i}", "all") for i in range(5)]
    assert places_for("cuda:1") == [("cuda:1", "all")] and places_for("cpu", 3) == [("cpu", "all")]
    assert places_for("auto", 2) == [("cuda", "0,1"), ("cuda", "2,3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,2,3,4,GPU-9")
    assert places_for("cuda", 2) == [("cuda", "7,2"), ("cuda", "3,4")]
    with pytest.raises(ValueError, match="processes=6, and there are 5 GPUs here; use at most 5"):
        places_for("auto", 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert places_for("auto", 2) == [("auto", "7,2,3,4,GPU-9")]


# ---- real processes ---------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def worker_of(out, key):
    "The process that holds a job's lock, as the kernel knows it."
    inode = str((out / "jobs" / key / "lock").stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "FLOCK" in words and words[5].split(":")[-1] == inode:
            return int(words[4])


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the worker is found through /proc/locks")
def test_a_killed_worker_stops_no_other_and_a_second_call_runs_only_what_is_missing(tmp_path, capsys):
    enough = SMALL | dict(rows=dict(train=64, dev=0, test=4))  # so much that there is time to kill it
    jobs = plan(["IncLoRA"], ["newsroom"], [1], **enough) + plan(["SeqLoRA"], ["newsroom"], [1], **SMALL)
    victim, other = (job.key for job in jobs)

    def kill_after_the_first_task():
        deadline = time.time() + 120
        records = "*_inclora_*/record.json"
        while time.time() < deadline and not any(Run.load(path).finished for path in tmp_path.glob(records)):
            time.sleep(0.02)
        os.kill(worker_of(tmp_path, victim), signal.SIGKILL)

    killer = threading.Thread(target=kill_after_the_first_task)
    killer.start()
    table = run_grid(jobs, tmp_path, workers=2)
    killer.join()
    assert states(tmp_path) == {victim: "failed", other: "done"}
    said = "its process was killed; a second call goes on where it was"
    assert table.loc[victim, "note"] == said and f"{victim}: failed: {said}" in capsys.readouterr().out
    killed = Run.load(next(tmp_path.glob("*_inclora_*")))
    assert 0 < killed.finished < 4
    stamp = next(tmp_path.glob("*_seqlora_*/record.json")).stat().st_mtime_ns

    run_grid(jobs, tmp_path, workers=2)
    assert states(tmp_path) == {victim: "done", other: "done"}
    assert next(tmp_path.glob("*_seqlora_*/record.json")).stat().st_mtime_ns == stamp  # not done again
    resumed, done = Run.load(next(tmp_path.glob("*_inclora_*"))), killed.finished
    assert np.array_equal(resumed.accuracy[:done], killed.accuracy[:done], equal_nan=True)
    assert resumed.extra["loss"]["reuters"] == killed.extra["loss"]["reuters"]


def test_a_run_that_fails_says_its_last_line_and_the_others_are_done(tmp_path):
    good = plan(["IncLoRA"], ["newsroom"], [1], **SMALL)
    bad = plan(["IncLoRA"], ["newsroom"], [1], **SMALL | dict(backbone="no such model"))
    table = run_grid([*bad, *good], tmp_path, workers=2)
    assert states(tmp_path) == {bad[0].key: "failed", good[0].key: "done"}
    error = table.loc[bad[0].key, "note"]
    assert "no such model" in error and "\n" not in error
    assert main(["grid", "--status", "--out", str(tmp_path)]) == 1


def test_a_job_of_two_processes_has_the_scores_of_one_and_writes_down_how_it_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    good = plan(["ELLA + JumpLoRA"], ["newsroom"], [1], **SMALL)
    bad = plan(["IncLoRA"], ["newsroom"], [1], **SMALL | dict(backbone="no such model"))
    table = run_grid([*good, *bad], tmp_path / "two", processes=2, device="cpu")
    assert states(tmp_path / "two") == {good[0].key: "done", bad[0].key: "failed"}
    assert "no such model" in table.loc[bad[0].key, "note"]
    open_grid(tmp_path / "one", good)
    run_job(str(tmp_path / "one"), good[0].key, device="cpu")
    two, one = (Run.load(next((tmp_path / name).glob("newsroom*"))) for name in ("two", "one"))
    assert two.extra["processes"]["reuters"]["processes"] == 2 and "processes" not in one.extra
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
    jobs = plan(["IncLoRA"], ["newsroom"], [1, 2, 3], **SMALL)
    open_grid(out, jobs)
    run_job(str(out), jobs[0].key)
    options = dict(slurm_partition="fast", gpus_per_node=1, timeout_min=90)
    table = run_grid(jobs, out, workers=2, engine="slurm", processes=4, **options)
    script = (tmp_path / "sbatch.sh").read_text()
    assert "#SBATCH --array=0-1%2" in script  # two of three, two at a time
    assert "#SBATCH --partition=fast" in script and "#SBATCH --time=90" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    assert sorted(table["state"]) == ["done", "waiting", "waiting"]
    with pytest.raises(ValueError, match="engine='lsf'"):
        run_grid(jobs, out, engine="lsf")


# ---- the command ------------------------------------------------------------------------------------------


def test_settings_are_json_or_text():
    words = ["kept=0.05", "threshold_scope=block", "group_by_length=true", "kept=null"]
    assert parse_settings(words) == dict(kept=None, threshold_scope="block", group_by_length=True)
    for word in ("kept", "=1"):
        with pytest.raises(ValueError, match="is not NAME=VALUE"):
            parse_settings([word])


def test_a_setting_given_twice_is_swept():
    tries = swept(["kept=0.05", "rank=4", "kept=0.2", "kept=0.05"])
    assert tries == [dict(kept=0.05, rank=4), dict(kept=0.2, rank=4)]
    assert swept([]) == [{}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "Ella"], "did you mean 'ELLA'"),
        (["--protocol", "big"], "protocol='big'"),
        (["--strength", "ELLA"], "is not NAME=NUMBER"),
        (["--set", "rang=4"], "is no setting of training"),
        (["--orders", "order7"], "order7"),
        (["--workers", "0"], "workers=0"),
        (["--processes", "0"], "processes=0"),
        (["--score", "foo"], "score='foo'"),
        (["--dtype", "float23"], "dtype='float23'"),
        (["--method", "ELLA"], "--method is not a flag; write it out: --methods"),
        (["--strength", "ELLA=1", "ELLA=2"], "ELLA has one already"),
        (["--status"], "holds no grid"),
    ],
)
def test_wrong_words_are_answered_and_nothing_is_written(words, message, tmp_path, capsys):
    out = tmp_path / "grid"
    orders = [] if "--orders" in words else ["--orders", "newsroom"]
    words = ["grid", *orders, "--backbone", "tiny-llama", "--out", str(out), *words]
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and not out.exists()


def test_records_of_a_grid_say_the_protocol_in_numbers(tmp_path):
    (job,) = plan(["IncLoRA"], ["newsroom"], [1], **SMALL)
    open_grid(tmp_path, [job])
    run_job(str(tmp_path), job.key)
    record = json.loads(next(tmp_path.glob("newsroom*/record.json")).read_text())
    assert all(counts == [8, 0, 4] for counts in record["configuration"]["counts"].values())
    assert record["configuration"]["train"]["max_length"] == 200
