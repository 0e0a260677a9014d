"""Measurements beside those of `jumplora speed`: the start of a threshold, fifty equal tasks, and replay.

`python tests/speed_parts.py [PART ...]` writes their records to `results/speed`.
"""

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jumplora.conventions import set_seed
from jumplora.data.backbones import load_backbone
from jumplora.data.sequences import load_sequence
from jumplora.learning import continual
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Example, Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.method import adapter
from jumplora.method.schedule import initial_threshold
from jumplora.results import speed
from jumplora.running.trunk import Trunk

RECORDS = Path(__file__).resolve().parent.parent / "results" / "speed"


class RandomLayers:
    "|BA| of random factors of rank 8, computed anew at every pass."

    def __init__(self, count: int, size: int, device="cpu"):
        self.factors = 0.02 * torch.randn((2, count, size, 8), device=device)

    def __iter__(self) -> Iterator[Tensor]:
        return ((B @ A.T).abs_() for A, B in zip(*self.factors, strict=True))


def start_of_threshold(quick: bool, device, dtype, count: int = 144, size: int = 1024) -> list[dict]:
    "The threshold that keeps a share of T5-large's entries: by `kthvalue` of all at once, and by counting."
    set_seed(0)
    layers = RandomLayers(count, size, device)
    rows = []
    for share in (1 / 64, 1 / 2):  # LoRA's own size at rank 8, and the middle
        kept = int(count * size**2 * share)

        def kthvalue(below=count * size**2 - kept):
            return torch.cat([layer.flatten() for layer in layers]).kthvalue(below).values.item()

        works = {"kthvalue": kthvalue, "counting": partial(initial_threshold, layers, kept)}
        rows += speed._measured(works, 2 if quick else 5, "kthvalue", device, share=share)
    return rows


def equal_tasks(quick: bool, device, dtype, tasks: int = 50, width: int = 256) -> list[dict]:
    "Equal tasks on a random model of 3 million weights: seconds, and memory of the process after each."
    set_seed(0)
    tokenizer = load_backbone("tiny-llama")[1]
    shape = dict(intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, **shape)
    words = ("red", "blue")
    examples = [Example(f"{word} " * 10, word) for word in words * 32]
    sequence = [Task(f"task {i}", "Which?\n", words, examples, [], examples[:8]) for i in range(tasks)]
    learner = continual.Learner(
        LlamaForCausalLM(config).to(device, dtype),
        tokenizer,
        TaskSequence("two words", sequence),
        METHODS["ELLA + JumpLoRA"],
        TrainConfig(batch_size=8),
    )
    rows = []
    for i in range(tasks):
        learner.finish(i, learner.train(i))
        learner.score(i)
        row = {name: values[-1] for name, values in learner.run.seconds.items()}
        row["step_milliseconds"] = 1e3 * row["train"] / 8
        rows.append(dict(task=i + 1, megabytes=psutil.Process().memory_info().rss / 1e6) | row)
    return rows


def top_blocks(quick: bool, device, dtype, top=4) -> list[dict]:
    "A step with adapters on all 30 blocks and on the last four, there also with replayed hidden states."
    model = load_backbone("smollm2-135m", device=device, dtype=dtype)[0]
    set_seed(0)
    batch = speed._random_batch(model, 8, 44, 2)
    works = {}
    with ExitStack() as stack:
        for name, (count, gated, gamma) in {
            "LoRA, all blocks": (None, False, 0),
            "LoRA, last blocks": (top, False, 0),
            "LoRA, replayed": (top, False, 0),
            "dense gate, replayed": (top, True, 0),
            "gated, replayed": (top, True, 1),
        }.items():
            adapted = speed._adapted(model, gated, count)
            for group in adapter.gate_groups(adapted).values():
                group.gate.interpolation.fill_(gamma)
            if "replayed" in name:
                stack.enter_context(Trunk(adapted.get_base_model(), adapter.adapter_layers(adapted)))
            works[name] = partial(speed._training_step, adapted, batch)
        return speed._measured(
            works, 5 if quick else 20, "LoRA, all blocks", device, rows=8, length=46, blocks=top
        )


def short_run(quick: bool, device, dtype, top=4) -> list[dict]:
    "Two tasks of `topics-1` on the last blocks: without replay, storing hidden states, and with stored ones."
    rows = dict(train=8, test=8) if quick else dict(train=64, test=32)
    sequence = TaskSequence("topics-1", list(load_sequence("topics-1", dev=0, **rows))[:2])
    model, tokenizer = load_backbone("smollm2-135m", device=device, dtype=dtype)
    config = TrainConfig(top_layers=top, max_length=46)
    runs = {}

    def learn(name: str, method: str, trunk: Callable, folder: Path, keep: bool = True) -> None:
        with patch.object(continual, "Trunk", trunk):
            runs[name] = continual.learn_sequence(
                copy.deepcopy(model), tokenizer, sequence, METHODS[method], config,
                zero_shot=False, progress=False, scoring="labels", hidden_states=folder,
            )  # fmt: skip
        if not keep:
            shutil.rmtree(folder)

    with tempfile.TemporaryDirectory() as temporary:
        new, filled = Path(temporary, "new"), Path(temporary, "filled")
        works = {
            "IncLoRA": partial(learn, "IncLoRA", "IncLoRA", lambda *given: nullcontext(), None),  # no replay
            "IncLoRA, storing": partial(learn, "IncLoRA, storing", "IncLoRA", Trunk, new, keep=False),
            # filled in the round that is not timed
            "IncLoRA, stored": partial(learn, "IncLoRA, stored", "IncLoRA", Trunk, filled),
            "late gate, stored": partial(learn, "late gate, stored", "IncLoRA + late gate", Trunk, filled),
        }
        found = speed._compare(works, 1 if quick else 7, "IncLoRA", device)
    for row in found:
        run = runs[row["variant"]]  # of the last round
        row |= {stage: sum(run.seconds[stage]) for stage in ("train", "evaluate")}
        row["accuracy"] = run.average_accuracy
    return found


PARTS = dict(start=start_of_threshold, growth=equal_tasks, blocks=top_blocks, run=short_run)

if __name__ == "__main__":
    speed.PARTS.update(PARTS)
    speed.measure(sys.argv[1:] or PARTS, RECORDS)
