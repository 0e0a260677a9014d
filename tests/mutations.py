"""Alter the package in one place at a time, and see that the tests notice: `python tests/mutations.py`.

Each mutation replaces one text of one exported module in a copy of the project and runs the related tests
there. It is killed if a test fails or the time runs out. The outcome is in results/mutations.json.
"""

# ruff: noqa: E501 -- a line of the table is one change

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jumplora.conventions import write_atomic

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "results" / "mutations.json"
LIMIT = 300  # seconds for the tests of one mutation


@dataclass(frozen=True)
class Mutation:
    "One change, and the tests that should notice it."

    name: str  # what is wrong then
    module: str  # path below jumplora/
    old: str  # occurs exactly once in the module
    new: str  # what replaces it
    tests: str  # files below tests/, and words for `-k` after a bar
    equivalent: str = ""  # why no test can notice


def of(module: str, tests: str, *changes: tuple) -> list[Mutation]:
    "Mutations of one module; a change is (name, old, new) and, where they are other ones, its tests."
    return [Mutation(name, module, old, new, *(rest or [tests])) for name, old, new, *rest in changes]


MUTATIONS = [
    *of(
        "method/jumprelu.py", "method/test_jumprelu.py",
        ("the window is twice as wide", "((wide - threshold).abs() < bandwidth / 2)", "((wide - threshold).abs() < bandwidth)"),
        ("the edge of a window counts", "((wide - threshold).abs() < bandwidth / 2)", "((wide - threshold).abs() <= bandwidth / 2)"),
        ("the window at -τ has the wrong sign", "window -= ((wide", "window += ((wide"),
        ("the gradient of τ has the wrong sign", "return -(threshold / bandwidth) * total", "return (threshold / bandwidth) * total"),
        ("mean and sum are swapped", 'if reduction == "mean":', 'if reduction == "sum":'),
        ("an entry equal to τ passes", "zeroed = x.abs() <= threshold  # compared", "zeroed = x.abs() < threshold  # compared"),
        ("zeroed entries receive a gradient", "return grad.masked_fill(zeroed.view_as(x), 0), grad_threshold", "return grad, grad_threshold"),
        ("exp(θ) is only its first order", "self.start * self.theta.exp()", "self.start * (1 + self.theta)"),
        ("a new threshold keeps the old θ", "        self.theta.zero_()", "        pass"),
        ("a cast moves τ to half precision", "else tensor.to(moved.device)", "else moved"),
        ("a change of γ on a GPU goes unseen", "or self._last_read[1] != version or version < 0", "", "method/test_adapter.py|change_of_gamma"),
    ),
    *of(
        "method/gated_linear.py", "method/test_gated_linear.py",
        ("γ receives a gradient", "gate_scalar(interpolation, delta).detach()", "gate_scalar(interpolation, delta)"),
        ("below τ the scaling is dropped", "below = self.scaling * (1 - gamma.to(delta.dtype))", "below = 1 - gamma.to(delta.dtype)"),
        ("the scaling is dropped on CPUs", "torch.lerp(delta, gated, share, out=gated)), self.scaling", "torch.lerp(delta, gated, share, out=gated)), 1.0"),
        ("γ runs from gated to dense", "torch.lerp(delta, gated, share, out=gated)", "torch.lerp(gated, delta, share, out=gated)"),
        ("the window at -τ is dropped", "between.grad_input(G, delta, -high, -low,", "between.grad_input(G, delta, -low, -high,"),
        ("the gradient of τ forgets γ", "(self.scaling * gamma) * total / count", "self.scaling * total / count"),
        ("the gradient of B forgets the scaling", "grad_B = d_delta @ (rest * A.to(delta.dtype).T)", "grad_B = d_delta @ A.to(delta.dtype).T"),
        ("the gradient of the bias is a mean", "grad_bias = rows.sum(0)", "grad_bias = rows.mean(0)"),
        ("a masked entry receives a gradient", "G = G if ctx.gate.mask is None else G * ctx.gate.mask.to(G.device)", "pass", "method/test_adapter.py|masked"),
        ("products in TF32 count as exact", 'in ("none", "ieee")', 'in ("none", "ieee", "tf32")'),
    ),
    *of(
        "method/schedule.py", "method/test_schedule.py",
        ("the ramp begins a step late", "return (step - first) / (last - first)", "return (step - first - 1) / (last - first)"),
        ("a held density is held only once", "if self.hold or name not in self.started", "if name not in self.started", "learning/test_controls.py|exactly"),
        ("no step stays dense", "min(max(1, first), max(1, total_steps - 1))", "min(max(0, first), max(1, total_steps - 1))"),
        ("one entry fewer passes", "rank = kept - int(at_least[last + 1])", "rank = kept - 1 - int(at_least[last + 1])"),
        ("the threshold is chosen a step late", "if step >= self.first:\n            for name", "if step > self.first:\n            for name"),
        ("a zero update gets its threshold", "if threshold > 0:  # else", "if threshold >= 0:  # else"),
        ("a resumed schedule chooses τ again", "self.started = learned if step >= self.first else []", "self.started = []"),
    ),
    *of(
        "method/regularizers.py", "method/test_regularizers.py",
        ("the gradient of ELLA is half", ".mul_(2 * grad)", ".mul_(grad)"),
        ("ELLA remembers the last task alone", "{name: delta + self.past[name].to(delta.device) for", "{name: delta for"),
        ("ELLA's mean and sum are swapped", 'if self.reduction == "mean" else strength', 'if self.reduction == "sum" else strength'),
        ("ELLA takes the strength of the task before", "strength = strength[self.tasks]", "strength = strength[self.tasks - 1]"),
        ("ELLA counts one task at most", "self.tasks += 1", "self.tasks = 1"),
        ("O-LoRA remembers the last task alone", "torch.cat([self.rows[name].to(A.device), A]) if name in self.rows else A.clone()", "A.clone()"),
        ("O-LoRA squares its overlaps", "overlap.abs().sum()", "overlap.square().sum()"),
        ("N-LoRA is a mean", "update.delta.float().abs().sum()", "update.delta.float().abs().mean()"),
        ("the memory stays in the graph", "tensor.detach().float() for name", "tensor.float() for name"),
    ),
    *of(
        "method/adapter.py", "method/test_adapter.py",
        ("a zero update may alter a weight's bits", "return torch.where(delta == 0, orig_weight, merged)", "return merged"),
        ("a merge rounds the update first", "(orig_weight.float() + delta).to(orig_weight.dtype)", "orig_weight + delta.to(orig_weight.dtype)"),
        ("a dense gate gives its threshold no gradient", "thin = thin + 0 * gate.threshold.to(thin)", "pass", "method/test_adapter.py|dense_gate"),
        ("a dense gate ignores a mask", 'if not gate.is_dense() or "mask" in module.gate_options[active_adapter]:', "if not gate.is_dense():", "method/test_adapter.py|masked"),
        ("the threshold is chosen among masked entries", 'layer.gate_options[self.adapter_name].get("mask")).abs_()', "None).abs_()", "method/test_adapter.py|masked"),
        ("dropout is dropped", "x = module.lora_dropout[active_adapter](x)", "pass"),
        ("the update of plain LoRA is not scaled", "return layer.scaling[adapter_name] * product", "return product"),
        ("a penalty moves the threshold", "gate.threshold.detach() if detach_threshold else gate.threshold", "gate.threshold"),
        ("two adapters share a gate", "gates.setdefault((adapter_name, group),", 'gates.setdefault(("", group),'),
        ("a merged layer adds its update twice", "or self.disable_adapters or self.merged or not plain", "or self.disable_adapters or not plain"),
        ("thresholds are compared with signed entries", '.get("mask")).abs_()', '.get("mask"))'),
    ),
    *of(
        "learning/tasks.py", "learning/test_tasks.py",
        ("options are joined by commas", "{' | '.join(options)}", "{', '.join(options)}"),
        ("every seed draws the same rows", 'random.Random(f"{seed}/{self.name}/{split}")', 'random.Random(f"{self.name}/{split}")'),
        ("drawn rows are not balanced", "order = sorted(range(len(rows)), key=rounds.__getitem__)", "order = range(len(rows))"),
        ("a fingerprint ignores the options", "[self.instruction, list(self.options), *", "[self.instruction, *"),
        ("an answer has no end token", ".input_ids + [tokenizer.eos_token_id]", ".input_ids", "learning/test_training.py|target"),
        ("rows are padded on the other side", "f + row if left else row + f", "row + f if left else f + row", "learning/test_training.py|batches or padded"),
        ("positions count the padding", "(mask.cumsum(-1) - 1).clamp(min=0)", "torch.ones_like(mask).cumsum(-1) - 1", "learning/test_training.py|padded"),
        ("a cut prompt wastes a token", "room -= max(1, len(ids) - max_length)", "room -= 1 + len(ids) - max_length", "learning/test_training.py|truncation"),
    ),
    *of(
        "learning/training.py", "learning/test_training.py",
        ("a decoder predicts the token it reads", "logits[:, -labels.shape[1] : -1]", "logits[:, -labels.shape[1] + 1 :]", "learning/test_training.py|loss"),
        ("the penalty grows with the accumulation", "value / self.current_gradient_accumulation_steps", "value", "learning/test_training.py|penalty"),
        ("weight decay shrinks thresholds", '[name for name in names if ".lora_gate." not in name] if self.args.weight_decay else names', "names", "learning/test_training.py|decay"),
        ("a fixed threshold learns", "if config.hold_kept or not config.learn_threshold else ()", "if False else ()", "learning/test_training.py|threshold"),
        ("a layer's penalty adds its gradient to its value", "(flat - flat.detach()) @", "flat @", "learning/test_training.py|layer"),
        ("the steps of a task are rounded down", "math.ceil(batches / config.gradient_accumulation)", "(batches // config.gradient_accumulation)", "learning/test_training.py|steps"),
        ("the loss is a mean over one batch", "num_items_in_batch if num_items_in_batch is not None else", "None or", "learning/test_training.py|accumulation or label_loss"),
        ("importance is taken with dropout", "    model.eval()\n    collator", "    collator", "learning/test_methods.py|gradients"),
    ),
    *of(
        "learning/evaluation.py", "learning/test_evaluation.py|not covers",
        ("the diagonal counts as retention", "a[np.tril_indices(len(a), -1)]", "a[np.tril_indices(len(a))]"),
        ("a tie counts as a choice", "seen=tuple(((scores >= of_label).sum(1) == 1).tolist())", "seen=tuple((scores.argmax(1) == right).tolist())", "learning/test_controls.py|equal_probability"),
        ("the end of a label counts as its beginning", "begin = (given != -100).int().argmax(-1)", "begin = -(given != -100).int().sum(-1) * 0 - 1", "learning/test_controls.py|one_row"),
        ("forgetting looks before a task was learned", "a[j:, j].max()", "a[:, j].max()"),
        ("backward transfer has the wrong sign", "(a[-1, :-1] - np.diag(a)[:-1])", "(np.diag(a)[:-1] - a[-1, :-1])"),
        ("Wilson's centre is off", "(p + z * z / (2 * rows))", "(p + z * z / rows)"),
        ("the sign test has one side", "min(1.0, 2 * tail / 2**n)", "min(1.0, tail / 2**n)", "learning/test_evaluation.py results/test_sparsity.py results/test_run_tables.py|sign"),
        ("a label outside the options may be right", "row.label in task.options and normalize(given)", "normalize(given)"),
        ("the unlikeliest option is chosen", "(found >= found[column[row.label]])", "(found <= found[column[row.label]])"),
        ("dropout stays on while scoring", "answer(model.eval(), ", "answer(model, "),
        ("the longest option may be cut off", "longest = max([max_new_tokens, *map(len, options)])", "longest = max_new_tokens"),
    ),
    *of(
        "learning/continual.py", "learning/test_continual.py",
        ("rows are scored among labels of later tasks", "for one in seen for option", "for one in self.sequence for option", "learning/test_controls.py|seen_so_far"),
        ("a model that was learned begins another run", "self.model.jumplora_run = run.name, run.conf", "_ = run.name, run.conf", "learning/test_continual.py|begins_no_other"),
        ("an update is merged with the wrong sign", "weights[name] += neutral_zeros(update.delta)", "weights[name] -= neutral_zeros(update.delta)"),
        ("a share of rows is rounded down", "math.ceil(round(self.rehearsal", "math.floor(round(self.rehearsal"),
        ("every task has the same seed", "seed = 1000 * self.run.seed + i", "seed = 1000 * self.run.seed"),
        ("joint training learns every task", "range(max(self.run.finished, self._first), len", "range(self.run.finished, len", "learning/test_methods.py|multi"),
        ("a method remembers from run to run", "copy.deepcopy(self.method.regularizer)", "self.method.regularizer"),
        ("the regularizer learns of no update", "        self.regularizer.after_task(updates)", "        pass"),
        ("the new task is not scored", "self.sequence if i is None else self.sequence[: i + 1]", "self.sequence if i is None else self.sequence[:i]"),
        ("dev scores are test scores", "task, self.split, labels,\n", 'task, "test", labels,\n', "learning/test_continual.py storage/test_record.py|dev or split or score"),
        ("prompts are cut at 128 tokens while scoring", "max_length=self.config.max_length, truncation", "truncation", "learning/test_continual.py"),
        ("a kept adapter is not in the saved weights", "{name: weight + deltas[name] for", "{name: weight for"),
    ),
    *of(
        "learning/methods.py", "learning/test_methods.py",
        ("pruning keeps the smallest entries", "(u.delta.abs() > threshold)", "(u.delta.abs() <= threshold)", "learning/test_controls.py|pruning"),
        ("a random mask differs from task to task", 'zlib.crc32(f"{self.seed}/{name}".encode())', "torch.seed()", "learning/test_controls.py|random_mask"),
        ("only the last task's entries are barred", "changed | self.used[name].to(changed.device) if name in self.used else changed", "~changed", "learning/test_controls.py|disjoint"),
        ("EWC is λ instead of λ/2", "return self.strength / 2 * total", "return self.strength * total"),
        ("importance is a sum over rows", "{key: F / count + ", "{key: F + "),
        ("importance forgets older tasks", " + self.importance.get(key, 0) for", " for"),
        ("importance is not squared", "gradient.detach().float().square()", "gradient.detach().float().abs()"),
    ),
    # Modules of storage/ change more often: these follow them.
    *of(
        "running/trunk.py", "running/test_trunk.py",
        ("rows are padded to the longest of their batch", "16 * math.ceil(len(row) / 16)", "max(map(len, rows))", "running/test_trunk.py|same_shapes"),
        ("a row with a hole is replayed", "mask.diff(dim=-1).sum(-1) > 1", "mask.diff(dim=-1).sum(-1) > 9", "running/test_trunk.py|lower_blocks"),
        ("other weights read the same files", "digest([weights, first, settings, machine])", "digest([first, settings, machine])", "running/test_trunk.py|damaged"),
        ("dropout below the adapters is frozen in silence", "if not all(torch.equal(self._run(inputs)[0], known) for _ in range(2)):", "if False:", "running/test_trunk.py|replayed_says"),
    ),
    *of(
        "results/interference.py", "results/test_interference.py",
        ("families are compared where they learn least", "at = (low + high) / 2", "at = low", "results/test_interference.py|middle"),
        ("seeds with missing arms are read", "if size == arms]", "if size]"),
    ),
    *of(
        "results/run_tables.py", "results/test_run_tables.py",
        ("Holm corrects for the tests that are done", "(len(known) - i) * p", "(i + 1) * p"),
        ("a t interval forgets the number of pairs", "/ math.sqrt(n)\n", "\n"),
        ("bold needs one win", "bool(ahead) and all(ahead)", "any(ahead)"),
        ("pairs are of any two runs", "ours[order, seed] - theirs[order, seed]", "ours[order, seed] - max(theirs.values())"),
    ),
    *of(
        "running/grid.py", "test_command_line.py|papers_protocol",
        ("gated methods have dropout too", "{} if METHODS[method].gated else dense or {}", "dense or {}"),
    ),
    *of(
        "storage/state.py", "storage/test_state.py",
        ("a resumed run draws other random numbers", 'torch.set_rng_state(tensors["cpu"])', "pass"),
        ("a resumed optimizer starts afresh", '["state"].setdefault(int(i), {})[name] = tensor', '["state"]'),
        ("a signal is not obeyed", "self.stop.obey()", "pass"),
    ),
]  # fmt: skip


def check_table() -> None:
    "`ValueError` unless every old text occurs once in its module, and every name once in the table."
    wrong = []
    for mutation in MUTATIONS:
        count = (ROOT / "jumplora" / mutation.module).read_text("utf-8").count(mutation.old)
        if count != 1:
            wrong.append(f"{mutation.module}: {mutation.old!r} occurs {count} times")
    names = [mutation.name for mutation in MUTATIONS]
    wrong += [f"two mutations are named {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
    if wrong:
        raise ValueError("the table of tests/mutations.py does not fit the code:\n" + "\n".join(wrong))


def copy_project(folder: Path) -> None:
    "Package and tests as copies, everything else as links."
    for entry in ROOT.iterdir():
        if entry.name in ("jumplora", "tests"):
            shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not entry.name.startswith(".") or entry.name == ".demo":
            (folder / entry.name).symlink_to(entry)


def run_tests(folder: Path, tests: str) -> tuple[str, str]:  # outcome; failed test, or the last lines
    "Run tests in a copy: passed, failed, timeout or broken (no test ran)."
    files, _, words = tests.partition("|")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=-rfE"]
    command += [f"tests/{file}" for file in files.split()] + (["-k", words] if words else [])
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "timeout", f"more than {LIMIT} seconds"
    if done.returncode == 0:
        return "passed", ""
    failed = re.search(r"^(?:FAILED|ERROR) tests/([^\s\[]+::[^\s\[]+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return "failed", failed[1]
    return "broken", (done.stdout + done.stderr)[-600:]


def try_mutation(mutation: Mutation, folder: Path) -> dict:  # an entry of the record
    "Apply one mutation in a copy, run its tests, and take it back."
    module = folder / "jumplora" / mutation.module
    original = module.read_text("utf-8")
    start = time.monotonic()
    module.write_text(original.replace(mutation.old, mutation.new), "utf-8")
    try:
        outcome, by = run_tests(folder, mutation.tests)
    finally:
        module.write_text(original, "utf-8")
    verdict = dict(failed="killed", timeout="killed", passed="survived", broken="broken")[outcome]
    if verdict == "survived" and mutation.equivalent:
        verdict, by = "equivalent", mutation.equivalent
    seconds = round(time.monotonic() - start, 1)
    entry = dict(module=mutation.module, old=mutation.old, new=mutation.new, tests=mutation.tests)
    return entry | dict(outcome=verdict, by=by, seconds=seconds)


def is_current(mutation: Mutation, entry: dict | None) -> bool:
    "Whether an entry of the record is about this change."
    about = ("module", "old", "new", "tests")
    return entry is not None and all(entry[key] == getattr(mutation, key) for key in about)


def main() -> int:  # exit status: 1 when a mutation survives
    "Try mutations, add them to the record, and print what became of each."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose module or name matches")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at a time")
    options = parser.parse_args()
    check_table()
    chosen = [m for m in MUTATIONS if re.search(options.only, f"{m.module} {m.name}")]
    stored = json.loads(STORED.read_text("utf-8"))["mutations"] if STORED.exists() else {}
    record = {m.name: stored[m.name] for m in MUTATIONS if is_current(m, stored.get(m.name))}
    copies = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as place:
        for n in range(options.jobs):
            folder = Path(place).resolve() / str(n)
            folder.mkdir()
            copy_project(folder)
            copies.put(folder)

        def work(mutation: Mutation) -> dict:
            folder = copies.get()
            try:
                entry = try_mutation(mutation, folder)
            finally:
                copies.put(folder)
            print(f"{entry['outcome']:10} {entry['seconds']:6.1f} s  {mutation.module}: {mutation.name}")
            print(f"           {entry['by']}" if entry["by"] else "", flush=True)
            return entry

        with ThreadPoolExecutor(options.jobs) as pool:
            record |= zip([m.name for m in chosen], pool.map(work, chosen), strict=True)
        killers = {record[m.name]["by"] for m in chosen if "::" in record[m.name]["by"]}
        outcome, by = run_tests(copies.get(), " ".join(sorted(killers))) if killers else ("passed", "")
    counts = {}
    for entry in record.values():
        counts[entry["outcome"]] = counts.get(entry["outcome"], 0) + 1
    write_atomic(STORED, json.dumps(dict(counts=counts, mutations=record), indent=1, sort_keys=True) + "\n")
    print(counts)
    if outcome != "passed":
        print(f"a test that killed fails on the unchanged code too: {by}")
    bad = [m.name for m in chosen if record[m.name]["outcome"] not in ("killed", "equivalent")]
    return int(bool(bad) or outcome != "passed")


if __name__ == "__main__":
    sys.exit(main())
