"""The clock, the memory meter, and every part of the benchmark on models small enough for a test."""

import json

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jumplora.data.backbones import load_backbone
from jumplora.method.gated_linear import sum_is_safe
from jumplora.method.regularizers import ELLA
from jumplora.results import speed as benchmark
from jumplora.results import speed_of_runs as benchmark_runs


@pytest.fixture
def small(monkeypatch):
    "Parts as they are, on tiny models and a few rows."

    def tiny(name, *args, **options):
        return load_backbone("tiny-llama" if name == "smollm2-135m" else name, *args, **options)

    def few(name, **rows):
        from jumplora.data.sequences import load_sequence

        return load_sequence(name, **dict(train=8, dev=4, test=4) | rows)

    for module in (benchmark, benchmark_runs):
        monkeypatch.setattr(module, "load_backbone", tiny)
    monkeypatch.setattr(benchmark_runs, "load_sequence", few)
    monkeypatch.setattr(benchmark, "t5_large_shape", lambda: load_backbone("tiny-t5")[0])
    monkeypatch.setattr(benchmark, "TOKENS", {8: (2.0, 1.0), 16: (2.0, 1.0)})
    never = lambda works, rounds: {name: [0.1] * rounds for name in works}  # noqa: E731
    monkeypatch.setattr(benchmark_runs, "alternate", never)  # start-up: processes that take seconds
    monkeypatch.setattr(benchmark, "LAYERS", (3, 64))


def test_variants_take_turns_and_the_first_round_is_not_timed():
    order = []
    seconds = benchmark.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]


def test_a_ratio_is_taken_within_a_round():
    seconds = {"base": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 5.0]}  # the second round was slow for both
    rows = benchmark.compare_times(seconds, "base", model="m")
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["low"] == 2.0 and rows[1]["high"] == 2.25 and rows[1]["rounds"] == 3
    assert rows[1]["milliseconds"] == 5000 and rows[1]["model"] == "m"


def test_the_peak_counts_what_is_held_at_once_not_what_is_allocated_in_all():
    def two_at_once():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + 1  # the first is gone: again two

    assert 2 * 4000 <= benchmark.peak_bytes(two_at_once) < 2 * 4000 + 100  # and the ones that are added
    assert benchmark.peak_bytes(lambda: None) == 0


def test_a_release_of_what_was_there_before_does_not_lower_the_peak():
    events = [(3, 8, 50), (1, 7, 10), (2, 9, -500), (4, 7, -10), (5, 8, -50), (6, 7, 20)]  # 9 is from before
    assert benchmark.most_held(iter(events)) == 60


def test_the_naive_way_gives_the_same_numbers_and_is_gone_afterwards():
    model, _ = load_backbone("tiny-llama")
    gated = benchmark.training.attach_adapter(model, benchmark.training.TrainConfig(), True)
    benchmark.random_update(gated)
    ella, batch = benchmark.full_past(gated), benchmark.random_batch(model, 2, 16)
    labels, inputs = batch.pop("labels"), batch
    results = []
    for surroundings, price in (
        (benchmark.nullcontext, benchmark.training.penalty_function(gated, ella)),
        (benchmark.naive_layer, benchmark.naive_penalty(gated, ella)),
    ):
        with surroundings():
            loss = benchmark.training.label_loss(gated(**inputs), labels) + price()
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in gated.parameters() if p.requires_grad)])
        gated.zero_grad(set_to_none=True)
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-6)
    from jumplora.method.gated_linear import gated_linear

    assert benchmark.adapter.gated_linear is gated_linear
    assert isinstance(ella, ELLA)


def test_an_error_inside_the_naive_way_puts_everything_back():
    before = benchmark.adapter.gated_linear
    with pytest.raises(ZeroDivisionError), benchmark.naive_layer():
        raise ZeroDivisionError
    assert benchmark.adapter.gated_linear is before


def test_the_gates_of_a_random_update_are_closed_and_pass_as_many_entries_as_lora_has():
    model, _ = load_backbone("tiny-llama")
    model = benchmark.training.attach_adapter(model, benchmark.training.TrainConfig(), True)
    deltas = benchmark.adapter.delta_weights(benchmark.random_update(model))
    factors = sum(p.numel() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)
    assert sum(int(delta.count_nonzero()) for delta in deltas.values()) == factors


def test_copies_share_their_weights_and_not_their_adapters():
    model, _ = load_backbone("tiny-llama")
    copies = [benchmark.with_shared_weights(model) for _ in range(2)]
    pointers = [{p.data_ptr() for p in each.parameters()} for each in (model, *copies)]
    assert pointers[0] == pointers[1] == pointers[2]
    benchmark.training.attach_adapter(copies[0], benchmark.training.TrainConfig(), True)
    assert not any("lora" in name for name, _ in copies[1].named_modules())


def test_the_whole_benchmark_writes_a_record_per_part_and_a_table(small, tmp_path, capsys):
    benchmark_runs.measure(benchmark_runs.PARTS, tmp_path, quick=True)
    parts = benchmark.load_parts(tmp_path)
    assert parts.keys() == benchmark_runs.PARTS.keys()
    assert len(capsys.readouterr().out.splitlines()) == len(parts)
    assert set(parts["layer"]["tokens"]) == {8, 16} and (parts["layer"]["peak_megabytes"] > 0).all()
    assert (parts["step"]["gigaflop"] > 0).all() and (parts["step"]["peak_megabytes"] > 0).all()
    assert (parts["evaluation"]["differ"] == 0).all()
    assert parts["batches"].set_index("variant")["differ"]["float32"] == 0
    assert parts["run"]["accuracy"].map(str).nunique() == 1
    assert len(parts["growth"]) == 10
    table = benchmark_runs.speed_table(parts)
    assert set(table["met"]) <= {"yes", "no", ""} and len(table) == 4 + 4 + 6 + 7 + 3
    records = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert all(record["environment"]["versions"]["torch"] for record in records)


def test_the_full_step_has_a_row_for_the_large_model_too(small):
    rows = benchmark.step_part(False)
    assert [row["model"] for row in rows] == ["smollm2-135m"] * 3 + ["T5-large's shape"] * 3
    assert len(benchmark.step_verdicts(pd.DataFrame(rows))) == 8


def test_a_part_that_does_not_exist_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="part='layers' is not known.*did you mean 'layer'"):
        benchmark_runs.measure(["startup", "layers"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_work_of_a_layer_is_what_a_counter_counts(dtype):
    apart = not sum_is_safe(dtype)
    for variant, work in benchmark.layer_variants(tokens=48, size=32, dtype=dtype).items():
        with FlopCounterMode(display=False) as counter:
            work()
        expected = benchmark.layer_work(variant, tokens=48, size=32, apart=apart)[0]
        assert counter.get_total_flops() == expected, variant
