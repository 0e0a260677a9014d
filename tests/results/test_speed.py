"The clock, the memory meter, and every part of the measurements on models small enough for a test."

import json
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from jumplora.data.backbones import load_backbone
from jumplora.learning import continual, training
from jumplora.learning.tasks import Example, Task, TaskSequence
from jumplora.method import adapter
from jumplora.method.regularizers import ELLA, Update
from jumplora.results import speed

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "speed"
sys.path.insert(0, str(ROOT / "tests"))

import speed_parts  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    "Parts as they are, on tiny models and a few rows."

    def tiny(name, *args, **options):
        return load_backbone("tiny-llama" if name == "smollm2-135m" else name, *args, **options)

    def few(name, **rows):
        texts = ["one row", "a longer row, " * 2, "the longest of them, " * 3, "the last"]
        tasks = []
        for task, labels in {"tweets": "angry calm", "science": "physics medicine", "other": "x y"}.items():
            labels = tuple(labels.split())
            examples = [Example(text, labels[i % 2]) for i, text in enumerate(texts)]
            tasks.append(Task(task, "Which?\n", labels, 2 * examples, examples, examples))
        return TaskSequence(name, tasks)

    monkeypatch.setattr(speed, "load_backbone", tiny)
    monkeypatch.setattr(speed_parts, "load_backbone", tiny)
    monkeypatch.setattr(speed_parts, "load_sequence", few)
    monkeypatch.setattr(speed, "T5ForConditionalGeneration", lambda shape: load_backbone("tiny-t5")[0])
    for name, part in dict(blocks=speed_parts.top_blocks, run=speed_parts.short_run).items():
        monkeypatch.setitem(speed.PARTS, name, partial(part, top=1))
    monkeypatch.setitem(speed.PARTS, "layer", partial(speed._layer, tokens=(8, 16), size=64))


@pytest.fixture
def gated():
    model, _ = load_backbone("tiny-llama")
    return speed._random_update(training.attach_adapter(model, training.TrainConfig(), True))


def test_variants_take_turns_the_first_round_is_not_timed_and_ratios_are_taken_within_a_round(monkeypatch):
    now = 0.0
    order = []

    def work(name, durations):
        nonlocal now
        order.append(name)
        now += durations.pop(0)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    times = dict(base=[9.0, 1.0, 10.0, 2.0], other=[1.0, 2.0, 20.0, 5.0])  # the third round is slow for both
    base, other = speed._compare({name: partial(work, name, times[name]) for name in times}, 3, "base")
    assert order == ["base", "other"] * 4
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
    replaced += [(adapter.JumpLoraLinear, "fused_adapter")]
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
    assert len(speed.speed_table(parts)) == sum(map(len, parts.values()))
    records = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert all(record["environment"]["versions"]["torch"] and record["quick"] for record in records)


def test_a_run_learns_two_tasks_without_replay_storing_and_with_stored_hidden_states(small, monkeypatch):
    runs, trunks = [], []

    def learn(model, tokenizer, sequence, method, config, **options):
        trunks.clear()
        run = learn_sequence(model, tokenizer, sequence, method, config, **options)
        runs.append((method.name, [task.name for task in sequence], trunks[-1].computed if trunks else None))
        return run

    def leave(trunk, *error):
        trunks.append(trunk)
        return leave_trunk(trunk, *error)

    learn_sequence, leave_trunk = continual.learn_sequence, speed_parts.Trunk.__exit__
    monkeypatch.setattr(continual, "learn_sequence", learn)
    monkeypatch.setattr(speed_parts.Trunk, "__exit__", leave)
    rows = speed.PARTS["run"](True, "cpu", torch.float32)
    names = ["IncLoRA", "IncLoRA, storing", "IncLoRA, stored", "late gate, stored"]
    assert [row["variant"] for row in rows] == names
    assert all(row["train"] > 0 and row["evaluate"] > 0 and row["rounds"] == 1 for row in rows)
    assert rows[0]["accuracy"] == rows[1]["accuracy"] == rows[2]["accuracy"]

    def expected(*computed):
        methods = ["IncLoRA"] * 3 + ["IncLoRA + late gate"]
        return [(method, ["tweets", "science"], n) for method, n in zip(methods, computed, strict=True)]

    # the round that is not timed fills the folder
    assert runs == expected(None, 8, 8, 0) + expected(None, 8, 0, 0)


def test_the_start_of_a_threshold_and_equal_tasks_are_measured():
    few = speed_parts.RandomLayers(3, 64)
    assert sum((layer > speed_parts.initial_threshold(few, 500)).sum() for layer in few) == 500
    counted = speed_parts.start_of_threshold(True, "cpu", torch.float32, count=3, size=64)
    assert [row["variant"] for row in counted] == ["kthvalue", "counting"] * 2
    growth = speed_parts.equal_tasks(True, "cpu", torch.float32, tasks=2, width=32)
    assert [row["task"] for row in growth] == [1, 2]
    assert all(row["step_milliseconds"] == 1e3 * row["train"] / 8 for row in growth)


def test_the_full_step_has_rows_for_the_large_model_too(small, monkeypatch):
    def rounds_of(works, rounds, base, device, **columns):
        return [dict(variant=name, rounds=rounds) | columns for name in works]

    monkeypatch.setattr(speed, "_measured", rounds_of)
    rows = pd.DataFrame(speed.PARTS["step"](False, "cpu", torch.float32))
    assert rows["model"].tolist() == ["smollm2-135m"] * 3 + ["T5-large's shape"] * 3
    assert rows["rounds"].tolist() == [30] * 3 + [5] * 3


def test_a_part_that_does_not_exist_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="part='layers' is not known.*did you mean 'layer'"):
        speed.measure(["step", "layers"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_stored_records_load_as_they_were_written_and_the_table_repeats_them():
    parts = speed.load_parts(RECORDS)
    assert parts.keys() == speed.PARTS.keys() | speed_parts.PARTS.keys()
    assert set(speed.load_parts(RECORDS, dtype="bfloat16")) == {"layer", "step"}
    stored = json.loads((RECORDS / "cpu-float32-layer.json").read_text())
    assert parts["layer"].to_dict("records") == stored["rows"]
    table = speed.speed_table(parts)
    assert table.index.is_unique and table["ratio"]["layer, 512, JumpLoRA"] == 1.51
