"""Kill runs at random moments, again and again, and compare their ends with runs that were left alone.

    python tests/torture.py --kills 30 --out results/torture/cpu.json

Every run is a process of its own, on a tiny model. Half of the kills come from outside after a
random time; the other half the process gives itself at a random one of its events: before and after
each part of the work, each fsync, rename and removal. All are SIGKILL, which no program can notice.
The same folder is used until its run is complete, so most runs are killed many times. Record
(without times), weights and files must then be those of a run that nobody disturbed.
"""

import argparse
import gc
import json
import mmap
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", KINETO_LOG_LEVEL="99")

import torch
from equal_runs import content
from tqdm import tqdm
from transformers.models.llama import modeling_llama  # noqa: F401 - here once, and not in every process

from jumplora.conventions import write_atomic
from jumplora.data.backbones import load_backbone
from jumplora.data.newsroom import file_sha256
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
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
CASES = {  # name -> method, settings, seconds between checkpoints
    "IncLoRA": (METHODS["IncLoRA"], HARD, 0),
    "ELLA": (METHODS["ELLA"], SORTED, 0),
    "ELLA + JumpLoRA": (METHODS["ELLA + JumpLoRA"], HARD, 0),
    "ELLA + JumpLoRA, no checkpoints": (METHODS["ELLA + JumpLoRA"], SORTED, float("inf")),
    "SeqLoRA": (METHODS["SeqLoRA"], HARD, 0),
    "multi-task + JumpLoRA, kept": (KEPT_GATE, SORTED, 0),
    "EWC": (METHODS["EWC"], HARD, 0),
    "Replay": (replace(METHODS["Replay"], rehearsal=0.2), SORTED, 0),
    "IncLoRA (Muon)": (METHODS["IncLoRA (Muon)"], HARD, 0),
    "multi-task": (METHODS["multi-task"], SORTED, 0),
}
PATIENCE = 3600  # seconds for a run that nobody kills from outside
PHASES = {  # what is watched: where it is looked up, its name, and what it is called here
    "restoring": (continual.Learner, "_restore"),
    "training": (continual, "train_task"),
    "checkpoint": (Checkpoint, "write"),
    "merging": (continual.Learner, "finish"),
    "state": (continual, "write_finished"),
    "record": (Run, "save"),
    "scoring": (continual, "evaluate"),
}


class Watch:
    "Knows in which phase a run is, and kills it at one of its events."

    def __init__(self, board: mmap.mmap, fatal: int):
        self.board, self.fatal, self.events = board, fatal, 0
        self.enter("starting")

    def enter(self, phase):
        self.phase = phase
        self.board[:40] = f"{phase} {self.events}".encode().ljust(40)

    def event(self, phase):
        self.events += 1
        self.enter(phase)
        if self.events == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

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


def learn(case: str, tasks: int, out: Path, watch: Watch) -> None:
    "One run, from wherever its folder is, to the end; then what the model holds, in a file."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    method, config, every = CASES[case]
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    for phase, (place, name) in PHASES.items():
        watch.watch(place, name, phase)
    for name in ("fsync", "replace", "unlink"):
        watch.watch(os, name)
    options = dict(seed=1, out=out, progress=False, checkpoint_every=every)
    learn_sequence(model, tokenizer, TaskSequence("tortured", TASKS[:tasks]), method, config, **options)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    (out / "model").write_text(tensors_checksum(weights))


def in_a_process(
    case: str, tasks: int, out: Path, fatal: int = 0, after: float | None = None
) -> tuple[str, int, bool]:
    "Learn in a process of its own; returns its last phase, how many events it saw, whether it was killed."
    board, (reading, writing) = mmap.mmap(-1, 40), os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        tqdm.set_lock(threading.RLock())  # the lock from before is one for all: a killed process keeps it
        gc.freeze()  # what was loaded before need not be looked through again
        try:
            learn(case, tasks, out, Watch(board, fatal))
            os._exit(0)
        except BaseException as error:
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    os.close(writing)
    patience = PATIENCE if after is None else after
    if not select.select([reading], [], [], patience)[0]:  # the pipe closes with the child
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(reading)
    phase, events = board[:40].decode().split()
    if (status and not os.WIFSIGNALED(status)) or (status and not fatal and after is None):
        raise SystemExit(f"{case} failed, or took longer than {PATIENCE} s, in its phase {phase!r}")
    return phase, int(events), bool(status)


def ended(out: Path) -> tuple[dict, str, dict[str, str]]:
    "The record without times, memory and the state of the machine; what the model held; files of tensors."
    record = content(Run.load(next(out.glob("*/record.json"))))
    files = {str(path.relative_to(out)): file_sha256(path) for path in out.rglob("*.safetensors")}
    return record, (out / "model").read_text(), files


def torture(case: str, tasks: int, kills: int, place: Path, seed: int) -> dict:
    "Kill runs of one case so many times; compare every one that reached its end."
    start, chance = time.perf_counter(), random.Random(f"{case} {seed}")
    alone = place / "alone"
    _, events, _ = in_a_process(case, tasks, alone)
    seconds, expected = time.perf_counter() - start, ended(alone)
    phases, runs, equal = Counter(), 0, 0
    while phases.total() < kills:
        out = place / f"run-{runs}"
        while True:
            left = phases.total() < kills
            fatal = chance.randrange(1, events + 1) if left and chance.random() < 0.5 else 0
            after = chance.uniform(0, seconds) if left and not fatal else None
            phase, _, killed = in_a_process(case, tasks, out, fatal, after)
            if not killed:
                break
            phases[phase] += 1
            if sum(1 for _ in out.glob("*/state/after-*.safetensors")) > 2:
                raise SystemExit(f"{case}: more than two states in {out}")
        runs, equal = runs + 1, equal + (ended(out) == expected)
        shutil.rmtree(out)
    shutil.rmtree(alone)
    taken = round(time.perf_counter() - start, 1)
    return dict(kills=dict(sorted(phases.items())), runs=runs, equal=equal, seconds=taken)


def main() -> int:
    "The command."
    parser = argparse.ArgumentParser(description="Kill runs at random moments and compare their ends.")
    parser.add_argument("--kills", type=int, default=30, help="of each case")
    parser.add_argument("--tasks", type=int, default=3, help="of each run, 1 to 3")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="a file for the record; none: only print")
    flags, cases = parser.parse_args(), {}
    for case in flags.cases:
        with tempfile.TemporaryDirectory() as place:
            cases[case] = torture(case, flags.tasks, flags.kills, Path(place), flags.seed)
        print(case, json.dumps(cases[case]), flush=True)
    phases = sum((Counter(case["kills"]) for case in cases.values()), Counter())
    equal = all(case["equal"] == case["runs"] for case in cases.values())
    seconds = round(sum(case["seconds"] for case in cases.values()), 1)
    command = "python tests/torture.py " + " ".join(sys.argv[1:])
    record = dict(command=command, equal=equal, kills=dict(sorted(phases.items())), total=phases.total())
    record |= dict(cases=cases, seconds=seconds, environment=environment("cpu"))
    if flags.out:
        write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
    print(f"{phases.total()} kills, {'every' if equal else 'NOT every'} run ended as if nothing had happened")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
