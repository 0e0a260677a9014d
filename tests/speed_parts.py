"""Two measurements beside those of `jumplora speed`: the start of a threshold, and fifty equal tasks.

`python tests/speed_parts.py` writes their records to `results/speed`.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jumplora.conventions import set_seed
from jumplora.data.backbones import load_backbone
from jumplora.learning.continual import Learner
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Example, Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.method.schedule import initial_threshold
from jumplora.results import speed

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
    learner = Learner(
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


PARTS = dict(start=start_of_threshold, growth=equal_tasks)

if __name__ == "__main__":
    speed.PARTS.update(PARTS)
    speed.measure(sys.argv[1:] or PARTS, RECORDS)
