"""Stop work at random moments, again and again, and compare its end with work that was left alone.

    python tests/torture.py --kills 24 --tasks 2 --out results/torture/cpu.json

Every run, grid, rollback and export is done in a process of its own, on a tiny model. Half of the
kills come from outside after a random time; the other half the process gives itself at a random one
of its events: before and after each part of the work, each fsync, rename, new folder and removal.
Most are SIGKILL, which no program can notice; the others are SIGTERM, SIGINT, and a limit on the
size of files, after which writing fails as on a full disk. The same folder is used until its work is
complete, so most is stopped many times. Record (without times), weights and files must then be those
of work that nobody disturbed.
"""

import argparse
import errno
import gc
import hashlib
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", KINETO_LOG_LEVEL="99")

import torch
from equal_runs import content
from tqdm import tqdm
from transformers.models.llama import modeling_llama  # noqa: F401 - here once, and not in every process

from jumplora.conventions import write_atomic
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.running import grid
from jumplora.storage import export, rollback
from jumplora.storage.record import Run, environment, tensors_checksum
from jumplora.storage.state import Checkpoint

WORDS = {"pets": ("cat", "dog"), "sky": ("sun", "moon"), "table": ("fork", "cup")}
TASKS = [
    Task(name, "Which word?\n", words, rows, rows[:2], rows[:4])
    for name, words in WORDS.items()
    for rows in [[(f"one {word} and {'more ' * n}", word) for n in range(8) for word in words]]
]
HARD = TrainConfig(
    batch_size=3, gradient_accumulation=2, epochs=2.5, learning_rate=1e-2, lora_dropout=0.1, max_length=120
)
SORTED = replace(HARD, group_by_length=True)
KEPT_GATE = Method("kept gate", gated=True, after_task="keep", training="joint")
PATIENCE = 3600  # seconds for a process that nobody stops from outside
PHASES = {  # what is watched: where it is looked up, its name, and what it is called here
    "restoring": (continual.Learner, "_restore"),
    "training": (continual, "train_task"),
    "checkpoint": (Checkpoint, "write"),
    "merging": (continual.Learner, "finish"),
    "state": (continual.state, "write_finished"),
    "record": (Run, "save"),
    "scoring": (continual, "evaluate"),
    "rollback": (rollback, "rollback"),
    "export": (export, "export_run"),
    "grid": (grid, "run_grid"),
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
WAYS = (*3 * ["SIGKILL"], "SIGTERM", "SIGINT", "full disk")
STOPPED = 75  # exit status of a process that a signal or a full disk has ended


def strike(process: int, way: str, size: int) -> None:
    "Stop a process, or let it write no file of more than so many bytes."
    if way in SIGNALS:
        os.kill(process, SIGNALS[way])
    else:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Watch:
    "Knows in which phase a process is, and stops it at one of its events; the board is shared memory."

    def __init__(self, board: mmap.mmap, fatal: int, way: str, size: int):
        self.board, self.fatal, self.way, self.size, self.events = board, fatal, way, size, 0
        self.on = True
        self.begin()

    def begin(self):
        "From now on this process is the one to stop."
        self.board[40:60] = str(os.getpid()).encode().ljust(20)
        self.enter("starting")

    def enter(self, phase):
        self.phase = phase
        if self.on:
            self.board[:40] = f"{phase} {self.events}".encode().ljust(40)

    def event(self, phase):
        self.events += self.on
        self.enter(phase)
        if self.on and self.events == self.fatal:
            self.board[60:61] = b"!"
            strike(os.getpid(), self.way, self.size)

    def watch(self, place, name, phase=None):
        "Put an event before and after a function. The process ends with the run, so nothing is put back."
        function = getattr(place, name)

        def call(*args, **options):
            before = self.phase
            self.event(phase or before)
            try:
                return function(*args, **options)
            finally:
                self.event(phase or before)
                self.enter(before)

        setattr(place, name, call)

    def watch_all(self):
        "Put events around the parts of the work, and around what changes files."
        for phase, (place, name) in PHASES.items():
            self.watch(place, name, phase)
        for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
            self.watch(os, name)


# ---- the work ---------------------------------------------------------------------------------------------


def learn(method: Method, config: TrainConfig, every: float, tasks: int, out: Path, watch: Watch):
    "One run, from wherever its folder is, to the end; then what the model holds, in a file."
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    watch.watch_all()
    options = dict(seed=1, out=out, backbone="tiny-llama", progress=False, checkpoint_every=every)
    learn_sequence(model, tokenizer, TaskSequence("tortured", TASKS[:tasks]), method, config, **options)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(out / "model", tensors_checksum(weights))


def take_out_and_export(tasks: int, out: Path, watch: Watch) -> None:
    "Learn undisturbed, then take the first task out and write two exports, where they are missing."
    watch.on = False
    learn(METHODS["IncLoRA + JumpLoRA"], HARD, float("inf"), tasks, out, watch)
    watch.on = True
    (run,) = (path.parent for path in out.glob("*/record.json"))
    if not rollback.rollback_folder(run, TASKS[0].name).exists():
        rollback.rollback(run, TASKS[0].name)
    for form, task in (("merged", None), ("supertuning", TASKS[0].name)):
        if not (out / form).exists():
            export.export_run(run, out / form, form, task=task)


class ForkExecutor:
    "What a grid uses of submitit, without the seconds in which a new interpreter imports everything."

    workers_begin = staticmethod(lambda: None)  # called in each worker

    def __init__(self, folder, cluster):
        pass

    def update_parameters(self, **options):
        pass

    def submit(self, work, key):
        return ForkedJob(work, key)


class ForkedJob:
    "A worker; its own handle, as in submitit."

    def __init__(self, work, key):
        self._process, self.ended = self, False
        if (process := os.fork()) == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as submitit does
                ForkExecutor.workers_begin()
                work(key)
            finally:
                os._exit(0)
        self.process = process

    def done(self):
        self.ended = self.ended or os.waitpid(self.process, os.WNOHANG)[0] != 0
        return self.ended

    def terminate(self):
        if not self.done():
            os.kill(self.process, signal.SIGTERM)


def work_through_grid(victim: str, tasks: int, out: Path, watch: Watch) -> None:
    "Two jobs at a time; the grid itself or its workers are stopped."
    for task in TASKS[: min(tasks, 2)]:
        for split in ("train", "dev", "test"):
            rows = [dict(text=row.text, label=row.label) for row in getattr(task, split)[:8]]
            write_atomic(out / "rows" / task.name / f"{split}.json", json.dumps(rows))
    train = dict(batch_size=4, learning_rate=1e-2, rank=2)
    jobs = grid.plan(
        ["IncLoRA", "ELLA + JumpLoRA"], [str(out / "rows")], [1], backbone="tiny-llama", train=train
    )
    grid.submitit.AutoExecutor = ForkExecutor

    def begin_worker():
        watch.on = victim == "worker"
        if watch.on:
            watch.begin()

    ForkExecutor.workers_begin = begin_worker
    watch.on = victim == "grid"
    watch.watch_all()
    for _ in range(600):
        states = set(grid.run_grid(jobs, out, workers=2, device="cpu")["state"])
        if states == {"done"}:
            return
        if "failed" in states:
            raise KeyboardInterrupt  # a worker was stopped: the next call resumes
        time.sleep(0.1)  # workers that a stopped grid has left finish their jobs
    raise TimeoutError(f"the jobs stay {states}")


def run_of(method: Method, config: TrainConfig = HARD, every: float = 0) -> partial:
    "A run of a method, with so many seconds between checkpoints."
    return partial(learn, method, config, every)


CASES = {  # name -> what is done, given the number of tasks, a folder and a watch
    "IncLoRA": run_of(METHODS["IncLoRA"]),
    "ELLA": run_of(METHODS["ELLA"], SORTED),
    "ELLA + JumpLoRA": run_of(METHODS["ELLA + JumpLoRA"]),
    "ELLA + JumpLoRA, no checkpoints": run_of(METHODS["ELLA + JumpLoRA"], SORTED, float("inf")),
    "SeqLoRA": run_of(METHODS["SeqLoRA"]),
    "multi-task + JumpLoRA, kept": run_of(KEPT_GATE, SORTED),
    "EWC": run_of(METHODS["EWC"]),
    "Replay": run_of(replace(METHODS["Replay"], rehearsal=0.2), SORTED),
    "IncLoRA (Muon)": run_of(METHODS["IncLoRA (Muon)"]),
    "multi-task": run_of(METHODS["multi-task"], SORTED),
    "rollback and export": take_out_and_export,
    "a grid": partial(work_through_grid, "grid"),
    "workers of a grid": partial(work_through_grid, "worker"),
}

# ---- torture ----------------------------------------------------------------------------------------------


def in_a_process(
    case: str, tasks: int, out: Path, fatal: int = 0, after: float | None = None, way="SIGKILL", size: int = 0
) -> tuple[str, int, bool, bool, int]:
    "Work in a process of its own; its last phase, its events, was it struck, did it stop, an open pipe."
    board, (reading, writing) = mmap.mmap(-1, 64), os.pipe()
    watch_options = (board, fatal, way, size)
    if (child := os.fork()) == 0:
        os.close(reading)
        console = os.dup(2)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        tqdm.set_lock(threading.RLock())  # the lock from before is one for all: a killed process keeps it
        gc.freeze()  # what was loaded before need not be looked through again
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            CASES[case](tasks, out, Watch(*watch_options))
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(STOPPED)
        except BaseException as error:
            if way == "full disk" and isinstance(error, OSError) and os.strerror(errno.EFBIG) in str(error):
                os._exit(STOPPED)
            os.write(console, f"{case}, {way}: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os.close(writing)
    patience = PATIENCE if after is None else after
    struck = not select.select([reading], [], [], patience)[0]  # the pipe closes with the child and its own
    if struck:
        with suppress(ProcessLookupError):  # a worker that has ended meanwhile
            strike(int(board[40:60].decode()) if after is not None else child, way, size)
    status = os.waitpid(child, 0)[1]
    struck = struck or board[60:61] == b"!"
    phase, events = board[:40].decode().split()
    stopped = os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == STOPPED
    if status and not (stopped and (struck or case == "a grid" or case == "workers of a grid")):
        raise SystemExit(f"{case} failed, or took longer than {PATIENCE} s, in its phase {phase!r} ({way})")
    return phase, int(events), struck, bool(status), reading


def ended(out: Path) -> tuple[dict, str, dict[str, str]]:
    "The records without times, memory and the state of the machine; what the model held; other files."
    records = {path.parent.name: content(Run.load(path)) for path in out.glob("*/record.json")}
    parts = out.rglob("*.safetensors"), out.glob("*/rollback-*/*"), out.glob("merged/*"), out.glob("super*/*")
    paths = [path.relative_to(out) for found in parts for path in found]
    seen = [p for p in paths if not any(part[0] == "." for part in p.parts)]
    files = {str(p): hashlib.sha256((out / p).read_bytes()).hexdigest() for p in seen}
    model = out / "model"
    if (out / "jobs.json").exists():  # a grid does not open a finished run again, to remove an older state
        files = {name: value for name, value in files.items() if not name.endswith("after-1.safetensors")}
    return records, model.read_text() if model.exists() else "", files


def torture(case: str, tasks: int, kills: int, place: Path, seed: int) -> tuple[dict, Counter]:
    "Stop the work of one case so many times; compare all that reached its end. Also how it was stopped."
    start, chance = time.perf_counter(), random.Random(f"{case} {seed}")
    alone = place / "alone"
    _, events, *_ = in_a_process(case, tasks, alone)
    seconds, expected = time.perf_counter() - start, ended(alone)
    phases, ways, runs, equal = Counter(), Counter(), 0, 0
    while phases.total() < kills:
        out, pipes, stopped, stops = place / f"run-{runs}", [], True, []
        while stopped:
            left = phases.total() < kills
            fatal = chance.randrange(1, events + 1) if left and chance.random() < 0.5 else 0
            after = chance.uniform(0, seconds) if left and not fatal else None
            way, size = chance.choice(WAYS), chance.choice((0, 100, 3000, 30_000))
            phase, _, struck, stopped, pipe = in_a_process(case, tasks, out, fatal, after, way, size)
            pipes.append(pipe)
            if struck and stopped:
                phases[phase] += 1
                ways[way] += 1
                stops.append((way, size, phase, fatal, after))
            if sum(1 for _ in out.glob("*/state/after-*.safetensors")) > 2 * len(list(out.glob("*/state"))):
                raise SystemExit(f"{case}: more than two states in {out}")
        for pipe in pipes:
            os.read(pipe, 1)  # the end of the workers that a stopped grid has left
            os.close(pipe)
        found = ended(out)
        if found != expected:
            print(f"{case} ended otherwise after {stops}", file=sys.stderr)
        runs, equal = runs + 1, equal + (found == expected)
        shutil.rmtree(out)
    shutil.rmtree(alone)
    taken = round(time.perf_counter() - start, 1)
    return dict(kills=dict(sorted(phases.items())), runs=runs, equal=equal, seconds=taken), ways


def main() -> int:
    "The command."
    parser = argparse.ArgumentParser(description="Stop work at random moments and compare its ends.")
    parser.add_argument("--kills", type=int, default=30, help="of each case")
    parser.add_argument("--tasks", type=int, default=3, help="of each run, 1 to 3")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="a file for the record; none: only print")
    flags, cases, ways = parser.parse_args(), {}, Counter()
    for case in flags.cases:
        with tempfile.TemporaryDirectory() as place:
            cases[case], found = torture(case, flags.tasks, flags.kills, Path(place), flags.seed)
            ways += found
        print(case, json.dumps(cases[case]), flush=True)
    phases = sum((Counter(case["kills"]) for case in cases.values()), Counter())
    equal = all(case["equal"] == case["runs"] for case in cases.values())
    seconds = round(sum(case["seconds"] for case in cases.values()), 1)
    command = "python tests/torture.py " + " ".join(sys.argv[1:])
    record = dict(command=command, equal=equal, kills=dict(sorted(phases.items())), total=phases.total())
    record["ways"] = dict(sorted(ways.items()))
    record |= dict(cases=cases, seconds=seconds, environment=environment("cpu"))
    if flags.out:
        write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
    print(f"{phases.total()} kills, {'every' if equal else 'NOT every'} run ended as if nothing had happened")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
