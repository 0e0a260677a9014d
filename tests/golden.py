"""Golden runs: every method on both tiny backbones, and the numbers that they gave when they were frozen.

`python tests/golden.py` runs all and rewrites golden/runs.json: right only in a commit that means to alter
numbers. `python tests/golden.py --check` compares instead. Words behind either choose runs by parts of names.

Bits are compared on the machine that froze them, by processor and versions. Elsewhere another order of sums
is enough to change a score: a rounding error grows with every step of Adam, and a gate turns it into an entry
that passes or not. So only the first two steps and the form of the rest are compared there. For a comparison
of bits on another machine, freeze a file of its own at the older commit, `--file before.json`, and `--check`
with the same file at the newer one.
"""

import argparse
import gc
import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from jumplora.data.backbones import load_backbone
from jumplora.learning.continual import learn_sequence
from jumplora.learning.evaluation import answer
from jumplora.learning.methods import METHODS, base_of, with_settings
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig

STORED = Path(__file__).resolve().parent / "golden" / "runs.json"
ADVICE = "Only a commit that means to alter numbers freezes them anew, with `python tests/golden.py`."
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")
SCHEDULE = r"thresholds\..*\.(step|interpolation)$"
BEGINNING = re.compile(rf"zero_shot\b|loss\.\w+\[[01]\]$|{SCHEDULE}")  # what another machine must find too,
TOLERANCE = 1e-4  # relative and absolute; Muon computes in bfloat16

# ---- what is run ------------------------------------------------------------------------------------------

# Lengths differ, so that padding and the order by length matter; one text is longer than a prompt may be.
BALL = [("a ball " * n, "sport") for n in (1, 4, 2, 9, 3)] + [("an atom", "physics of matter")] * 4
RAIN = [("rain", "yes"), ("sun and wind " * 3, "no"), ("fog " * 60, "yes"), ("heat", "no")] * 2
RAIN += [("ice", "yes")]
TASKS = (
    Task("topics", "Topic?\n", ("sport", "physics of matter", "law"), BALL * 2, BALL[:2], BALL[3:7]),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN * 2, RAIN[:2], RAIN[:4]),
)
TARGETS = {  # so many that the tiny models learn something in ten steps
    "tiny-llama": ("q_proj", "v_proj", "up_proj", "down_proj", "lm_head"),
    "tiny-t5": ("q", "v", "wi", "wo"),
}
STRENGTHS = {"ELLA": 3e3, "O-LoRA": 0.05, "N-LoRA": 1e-3, "EWC": 1e4}  # a visible part of the loss
# 18 rows are five batches of at most four: the last batch, and with accumulation the last step, is not full.
USUAL = dict(batch_size=4, epochs=2.0, learning_rate=1e-2, max_length=60)  # ten steps
ACCUMULATED = dict(gradient_accumulation=2, epochs=3.0)  # nine steps
GATED = "ELLA + JumpLoRA"
CONTROLS = "IncLoRA pruned", "IncLoRA scaled", "IncLoRA + random mask", "IncLoRA + disjoint masks"
OTHER = dict(threshold_scope="layer", threshold_reduction="sum", kept=0.3, lora_dropout=0.1)
OTHER |= dict(bandwidth=1e-2, truncation="reference")


def plan() -> dict[str, tuple[str, str, dict]]:  # name of a run -> method, backbone, fields of `TrainConfig`
    "Every method on every backbone with and without accumulation, other settings, and the controls once."
    runs = {}
    for backbone in TARGETS:
        for method in [name for name in METHODS if name not in CONTROLS]:
            for words, settings in (("", {}), (", accumulation 2", ACCUMULATED)):
                runs[f"{backbone}, {method}{words}"] = (method, backbone, settings)
        runs[f"{backbone}, {GATED}, by length"] = (GATED, backbone, dict(group_by_length=True))
        runs[f"{backbone}, {GATED}, other settings"] = (GATED, backbone, OTHER)
    return runs | {f"tiny-llama, {method}": (method, "tiny-llama", {}) for method in CONTROLS}


RUNS = plan()


@contextmanager
def alone() -> Iterator[None]:
    "One thread, so that sums do not depend on how many share them; and quick rounds of the collector."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects at every start, and would look at every module that is imported
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


# ---- what is kept of a run --------------------------------------------------------------------------------


def without_nan(value):
    "Lists and dicts of numbers for JSON: None where nothing was measured."
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def weights_digest(model: torch.nn.Module) -> str:
    "SHA-256 over names and bytes of all parameters, in the order of their names."
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def some_weights(model: torch.nn.Module, begun: torch.nn.Module) -> dict[str, dict[str, float]]:
    "L2 norm and mean of six parameters that learning changed or added: where the digest says only yes or no."
    old = dict(begun.named_parameters())
    new = {n.replace(".base_layer", ""): p.detach() for n, p in sorted(model.named_parameters())}
    moved = [name for name in new if name not in old or not torch.equal(new[name], old[name])]
    chosen = [moved[i * len(moved) // 6] for i in range(6)]
    return {n: dict(norm=new[n].double().norm().item(), mean=new[n].double().mean().item()) for n in chosen}


def final_answers(model, tokenizer, task: Task, config: TrainConfig) -> dict[str, list]:
    "Answers and option scores of the test rows: finer than accuracies of four rows."
    cut = dict(max_length=config.max_length, truncation=config.truncation)
    answers, scores = answer(model, tokenizer, task, [row.text for row in task.test], **cut)
    return dict(text=answers, scores=scores.tolist())


def projection(name: str) -> dict:  # JSON types
    "Do a run in memory and keep what must not change."
    method, backbone, settings = RUNS[name]
    method = with_settings(METHODS[method], strength=STRENGTHS.get(base_of(method)))
    sequence = TaskSequence("golden", TASKS[:1] if method.training == "isolated" else TASKS)
    config = TrainConfig(**USUAL | dict(target_modules=TARGETS[backbone]) | settings)
    model, tokenizer = load_backbone(backbone, device="cpu", dtype="float32")
    begun, _ = load_backbone(backbone, device="cpu", dtype="float32")
    options = dict(seed=3, out=None, backbone=backbone, zero_shot=not settings, progress=False)
    with alone():
        run = learn_sequence(model, tokenizer, sequence, method, config, **options)
        said = {task.name: final_answers(model, tokenizer, task, config) for task in sequence}
    kept = dict(  # causes first: a complaint names the first that differ
        loss=run.extra["loss"],
        penalty=run.extra["penalty"],
        thresholds=run.thresholds,
        sparsity=run.sparsity,
        weights=some_weights(model, begun),
        weights_sha256=weights_digest(model),
        zero_shot=[run.zero_shot, run.zero_shot_options],
        accuracy=run.accuracy.tolist(),
        option_accuracy=run.option_accuracy.tolist(),
        answers=said,
    )
    return without_nan(kept)


def machine() -> dict:  # text and numbers
    "What must be the same for the same bits."
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8", errors="ignore") if info.is_file() else ""
    found = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text.split("\n\n")[0], re.M))
    words = [found[key] for key in ("model name", "cpu family", "model", "stepping") if key in found]
    with alone():
        threads = torch.get_num_threads()
    return dict(
        versions=dict(python=platform.python_version()) | {name: metadata.version(name) for name in PACKAGES},
        processor=", ".join(words) or platform.machine(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=threads,
    )


# ---- comparison -------------------------------------------------------------------------------------------


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    "Every value with the place where it stands; an empty list or dict is a value too."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path, value
    for key, item in items if value else ():
        yield from leaves(item, f"{path}[{key}]" if isinstance(value, list) else f"{path}.{key}".lstrip("."))


def differences(stored: dict, found: dict, exact: bool) -> list[str]:  # "FIELD: stored …, found …"
    "Where two projections differ. Where not exact: in form, schedule, or numbers of the beginning."
    old, new = dict(leaves(stored)), dict(leaves(found))
    first = f"loss.{next(iter(stored.get('loss', {})), '')}["
    near = [key for key in old if BEGINNING.match(key) and (key.startswith(first) or key[0] in "zt")]

    def same(key: str) -> bool:
        if key not in old or key not in new:
            return False
        numbers = all(type(value) in (int, float) for value in (old[key], new[key]))
        if exact or (key in near and not numbers):
            return old[key] == new[key]
        return key not in near or math.isclose(old[key], new[key], rel_tol=TOLERANCE, abs_tol=TOLERANCE)

    wrong = [key for key in dict.fromkeys([*old, *new]) if not same(key)]
    return [f"{k}: stored {old.get(k, 'nothing')!r}, found {new.get(k, 'nothing')!r}" for k in wrong]


def complaint(name: str, found: list[str], exact: bool) -> str:  # several lines
    "What a failing comparison says."
    rule = "bit for bit" if exact else f"to {TOLERANCE:g} at the beginning: another machine froze them"
    more = [f"… and {len(found) - 8} more"] if len(found) > 8 else []
    return "\n  ".join([f"golden run {name!r} differs (compared {rule}):", *found[:8], *more, ADVICE])


# ---- the command ------------------------------------------------------------------------------------------


def main() -> int:  # exit status
    "Freeze or check the chosen runs."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names of runs; all runs, if there are none")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--file", type=Path, default=STORED, help="where the numbers are stored")
    asked = parser.parse_args()
    chosen = [name for name in RUNS if all(word in name for word in asked.words)]
    stored = json.loads(asked.file.read_text("utf-8")) if asked.file.is_file() else dict(machine={}, runs={})
    exact, failed, begun, runs = stored["machine"] == machine(), 0, time.perf_counter(), {}
    if asked.words and not exact and not asked.check:
        parser.error("another machine froze the others; freeze all runs here, not some")
    for name in chosen:
        runs[name] = projection(name)
        if asked.check and (found := differences(stored["runs"].get(name, {}), runs[name], exact)):
            print(complaint(name, found, exact))
            failed += 1
    print(f"{len(chosen)} runs in {time.perf_counter() - begun:.0f} s, {failed} differ")
    if not asked.check:
        kept = stored["runs"] | runs if asked.words else runs
        pairs = [(json.dumps(name), kept[name]) for name in RUNS if name in kept]
        lines = [f"{name}: {json.dumps(run, allow_nan=False)}" for name, run in pairs]
        head = json.dumps(machine(), indent=1)
        asked.file.parent.mkdir(exist_ok=True)
        asked.file.write_text(f'{{"machine": {head},\n"runs": {{\n' + ",\n".join(lines) + "\n}}\n", "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
