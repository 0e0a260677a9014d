"The clock, the memory meter, and every part of the measurements on models small enough for a test."

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig

from jumplora.data.backbones import load_backbone
from jumplora.learning import evaluation, training
from jumplora.learning.tasks import Example, Question, Task, TaskSequence
from jumplora.method import adapter
from jumplora.method.regularizers import ELLA, Update
from jumplora.results import speed

ROOT = Path(__file__).resolve().parents[2]
RECORDS, PAGE = ROOT / "results" / "speed", ROOT / "nbs" / "3_results" / "speed.ipynb"


@pytest.fixture
def small(monkeypatch):
    "Parts as they are, on tiny models and a few rows."

    def tiny(name, *args, **options):
        return load_backbone("tiny-llama" if name == "smollm2-135m" else name, *args, **options)

    def few(name, **rows):
        texts = ["one row", "a longer row, " * 2, "the longest of them, " * 3, "the last"]
        tasks = []
        for task, labels in {"tweets": ("angry", "calm"), "science": ("physics", "medicine")}.items():
            examples = [Example(text, labels[i % 2]) for i, text in enumerate(texts)]
            tasks.append(Task(task, "Which?\n", labels, 2 * examples, examples, examples))
        return TaskSequence(name, tasks)

    monkeypatch.setattr(speed, "load_backbone", tiny)
    monkeypatch.setattr(speed, "load_sequence", few)
    monkeypatch.setattr(speed, "_t5_large_shape", lambda: load_backbone("tiny-t5")[0])
    monkeypatch.setitem(speed.PARTS, "blocks", partial(speed._blocks, top=1))
    monkeypatch.setitem(speed.PARTS, "layer", partial(speed._layer, tokens=(8, 16), size=64))


@pytest.fixture
def gated():
    model, _ = load_backbone("tiny-llama")
    return speed._random_update(training.attach_adapter(model, training.TrainConfig(), True))


def test_variants_take_turns_and_the_first_round_is_not_timed():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = speed._alternate(works, 3)
    assert order == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]
    order.clear()
    assert [len(values) for values in speed._alternate(works, 1).values()] == [1, 1] and order == ["a", "b"]


def test_a_ratio_is_taken_within_a_round():
    seconds = {"base": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 5.0]}  # the second round was slow for both
    base, other = speed._compare(seconds, "base")
    assert base["ratio"] == 1.0
    assert other == dict(variant="other", milliseconds=5000, ratio=2.0, low=2.0, high=2.25, rounds=3)


def test_the_peak_counts_what_a_call_holds_at_once():
    before = []

    def two_at_once():
        first = torch.zeros(1000)
        second = first + 1
        del first
        before.append(second + 1)  # the first is gone: again two

    assert 2 * 4000 <= speed._peak_bytes(two_at_once) < 2 * 4000 + 100  # not three
    assert speed._peak_bytes(lambda: None) == 0
    released = speed._peak_bytes(lambda: (before.clear(), torch.zeros(1000)))
    assert 4000 <= released < 4100  # what was held before does not count when it is released


def test_the_naive_way_gives_the_same_gradients_and_is_gone_after_an_error(gated):
    replaced = [(adapter, "gated_linear"), (adapter, "gated_update"), (training, "penalty_function")]
    replaced += [(adapter.JumpLoraLinear, "fused_adapter"), (evaluation, "answer")]
    before = [getattr(owner, name) for owner, name in replaced]
    ella = ELLA(strength=1.0)
    updates = training.named_updates(gated)
    ella.after_task({name: Update(torch.randn_like(update.delta)) for name, update in updates.items()})
    tokens = torch.arange(20).view(2, 10)
    learned = [p for p in gated.parameters() if p.requires_grad]

    def gradients():
        loss = gated(input_ids=tokens, labels=tokens).loss + training.penalty_function(gated, ella)()
        return torch.autograd.grad(loss, learned)

    fast = gradients()
    with pytest.raises(ZeroDivisionError), speed._naive_way():
        assert not [n for (owner, n), old in zip(replaced, before, strict=True) if getattr(owner, n) is old]
        naive = gradients()
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in replaced] == before
    for one, other in zip(fast, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_gate_of_a_random_update_passes_as_many_entries_as_lora_has_parameters(gated):
    factors = sum(p.numel() for n, p in gated.named_parameters() if "lora_A" in n or "lora_B" in n)
    deltas = adapter.delta_weights(gated).values()
    assert sum(int(delta.count_nonzero()) for delta in deltas) == factors


@pytest.mark.parametrize("scored", [True, False])
def test_naive_answers_and_scores_are_those_of_the_fast_way(scored):
    model, tokenizer = load_backbone("tiny-llama")
    long = "money, shares and everything else that is traded anywhere"  # more tokens than answers have
    question = Question("news", "Which topic?\n", ("sport", long))
    texts, rows = ["a short one", "a longer one " * 5, "again " * 9], []
    fast, fast_scores = evaluation.answer(model, tokenizer, question, texts)
    naive, scores = speed._naive_answer(
        model, tokenizer, question, texts, batch_size=2, advance=rows.append, scored=scored
    )
    assert naive == fast and rows == [2, 1]
    torch.testing.assert_close(scores, fast_scores if scored else torch.zeros(3, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype, products", [(torch.float32, (2, 3, 5)), (torch.bfloat16, (2, 5, 5))])
def test_a_gated_layer_multiplies_three_times_and_five_times_in_bfloat16(dtype, products):
    T, n, r = 48, 32, 8
    rows = speed._layer(True, "cpu", dtype, tokens=[T], size=n)
    counted = {row["variant"]: row["gigaflop"] * 1e9 for row in rows}
    product, thin, dense = 2 * T * n**2, 2 * T * n * r, 2 * n**2 * r
    frozen, gated, naive = products
    wanted = {"frozen": frozen * product, "LoRA": 2 * product + 6 * thin}
    wanted |= {"JumpLoRA": gated * product + 4 * dense, "naive": naive * product + 3 * dense}
    assert counted == pytest.approx(wanted)


def test_all_parts_write_a_record_each_and_a_table(small, tmp_path, capsys):
    speed.measure(speed.PARTS, tmp_path, quick=True)
    parts = speed.load_parts(tmp_path)
    assert parts.keys() == speed.PARTS.keys()
    assert len(capsys.readouterr().out.splitlines()) == len(parts)
    assert set(parts["layer"]["tokens"]) == {8, 16}
    for name in ("layer", "step"):
        assert (parts[name][["gigaflop", "peak_megabytes"]] > 0).all(axis=None)
    assert (parts["evaluation"]["differ"] == 0).all()
    assert parts["run"]["accuracy"].map(str).nunique() == 1
    assert len(speed.speed_table(parts)) == sum(map(len, parts.values()))
    records = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert all(record["environment"]["versions"]["torch"] and record["quick"] for record in records)


def test_the_parts_of_the_page_alone_measure_answers_equal_tasks_and_fresh_processes(small, monkeypatch):
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = vars(speed) | dict(PARTS=dict(speed.PARTS))
    for mark in ("import psutil", "def start_of_threshold", "PARTS |= "):
        exec(next(source for source in sources if mark in source), found)
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    found["LlamaConfig"] = lambda **shape: LlamaConfig(**shape | tiny)
    monkeypatch.setattr("sys.executable", "true")  # a fresh Python with torch takes seconds
    rows = {name: found["PARTS"][name](True, "cpu", torch.float32) for name in ("batches", "startup")}
    assert [row["variant"] for row in rows["batches"]] == ["float32", "bfloat16"]
    assert rows["batches"][0]["differ"] == 0
    assert [row["variant"] for row in rows["startup"]][0] == "python" and rows["startup"][0]["ratio"] == 1
    counted = found["start_of_threshold"](True, "cpu", torch.float32, count=3, size=64)
    assert [row["variant"] for row in counted] == ["kthvalue", "counting"] * 2
    growth = found["equal_tasks"](True, "cpu", torch.float32, tasks=2)
    assert [row["task"] for row in growth] == [1, 2]
    assert all(row["step_milliseconds"] == 1e3 * row["train"] / 8 for row in growth)


def test_the_full_step_has_rows_for_the_large_model_too(small, monkeypatch):
    def rounds_of(works, rounds, base, device, **columns):
        return [dict(variant=name, rounds=rounds) | columns for name in works]

    monkeypatch.setattr(speed, "_timed", rounds_of)
    rows = pd.DataFrame(speed.PARTS["step"](False, "cpu", torch.float32))
    assert rows["model"].tolist() == ["smollm2-135m"] * 3 + ["T5-large's shape"] * 3
    assert rows["rounds"].tolist() == [30] * 3 + [5] * 3


def test_a_part_that_does_not_exist_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="part='layers' is not known.*did you mean 'layer'"):
        speed.measure(["step", "layers"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_stored_records_load_as_they_were_written_and_the_table_repeats_them():
    parts = speed.load_parts(RECORDS)
    assert parts.keys() == speed.PARTS.keys() | {"batches", "growth", "path", "start", "startup"}
    assert set(speed.load_parts(RECORDS, dtype="bfloat16")) == {"layer", "step"}
    stored = json.loads((RECORDS / "cpu-float32-layer.json").read_text())
    assert parts["layer"].to_dict("records") == stored["rows"]
    assert parts["layer"].attrs["environment"] == stored["environment"]
    table = speed.speed_table(parts)
    assert table.index.is_unique and table["ratio"]["layer, 512, JumpLoRA"] == 1.51
    assert table["low"]["run, naive"] == 2.41 and table["differ"]["batches, bfloat16"] == 0.04
