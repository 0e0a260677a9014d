"The clock, the memory meter, and every part of the measurements on models small enough for a test."

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from jumplora.data.backbones import load_backbone
from jumplora.data.sequences import load_sequence
from jumplora.learning import evaluation, training
from jumplora.learning.tasks import Question
from jumplora.method import adapter
from jumplora.method.gated_linear import gated_linear
from jumplora.results import speed

RECORDS = Path(__file__).resolve().parents[2] / "results" / "speed"


@pytest.fixture
def small(monkeypatch):
    "Parts as they are, on tiny models and a few rows."

    def tiny(name, *args, **options):
        return load_backbone("tiny-llama" if name == "smollm2-135m" else name, *args, **options)

    def few(name, **rows):
        return load_sequence(name, **dict(train=8, dev=4, test=4))

    monkeypatch.setattr(speed, "load_backbone", tiny)
    monkeypatch.setattr(speed, "load_sequence", few)
    monkeypatch.setattr(speed, "_t5_large_shape", lambda: load_backbone("tiny-t5")[0])
    monkeypatch.setattr(speed, "_TARGETS", {8: (2.0, 1.0), 16: (2.0, 1.0)})
    monkeypatch.setattr(speed, "_LAYERS", (3, 64))
    monkeypatch.setattr(speed.sys, "executable", "true")  # a fresh Python with torch takes seconds


@pytest.fixture
def gated():
    model, _ = load_backbone("tiny-llama")
    return speed._random_update(training.attach_adapter(model, training.TrainConfig(), True))


def test_variants_take_turns_and_the_first_round_is_not_timed():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = speed.alternate(works, 3)
    assert order == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]
    order.clear()
    assert [len(values) for values in speed.alternate(works, 1).values()] == [1, 1] and order == ["a", "b"]


def test_a_ratio_is_taken_within_a_round():
    seconds = {"base": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 5.0]}  # the second round was slow for both
    base, other = speed.compare_times(seconds, "base", model="m")
    assert base["ratio"] == 1.0
    spread = dict(ratio=2.0, low=2.0, high=2.25, rounds=3)
    assert other == dict(variant="other", milliseconds=5000, model="m") | spread


def test_the_peak_counts_what_is_held_at_once_not_what_is_allocated_in_all():
    def two_at_once():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + 1  # the first is gone: again two

    assert 2 * 4000 <= speed.peak_bytes(two_at_once) < 2 * 4000 + 100  # and the ones that are added
    assert speed.peak_bytes(lambda: None) == 0


def test_a_release_of_what_was_there_before_does_not_lower_the_peak():
    events = [(3, 8, 50), (1, 7, 10), (2, 9, -500), (4, 7, -10), (5, 8, -50), (6, 7, 20)]  # 9 is from before
    assert speed._most_held(events) == 60


def test_the_naive_way_gives_the_same_gradients_and_is_gone_afterwards():
    model, _ = load_backbone("tiny-llama")
    works = speed._step_works(model, rows=2, length=16)
    steps, gradients = {name: work.args[0] for name, work in works.items()}, []
    assert steps["LoRA"] is not steps["naive"] is steps["JumpLoRA + ELLA"]
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(shared <= {p.data_ptr() for p in step.parameters()} for step in steps.values())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Module, "zero_grad", lambda self, set_to_none=True: None)
        for name in ("JumpLoRA + ELLA", "naive"):
            works[name]()
            learned = [p for p in steps[name].parameters() if p.requires_grad]
            gradients.append([p.grad for p in learned])
            for p in learned:
                p.grad = None
    for fast, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-6)
    assert adapter.gated_linear is gated_linear


def test_an_error_inside_the_naive_way_puts_everything_back():
    before = [adapter.gated_linear, adapter.gated_update, adapter.JumpLoraLinear.fused_adapter]
    before += [training.penalty_function, evaluation.answer]

    def now():
        layer = [adapter.gated_linear, adapter.gated_update, adapter.JumpLoraLinear.fused_adapter]
        return [*layer, training.penalty_function, evaluation.answer]

    with pytest.raises(ZeroDivisionError), speed._naive_run():
        assert not any(old is new for old, new in zip(before, now(), strict=True))
        raise ZeroDivisionError
    assert now() == before


def test_the_gate_of_a_random_update_passes_as_many_entries_as_lora_has_parameters(gated):
    factors = sum(p.numel() for n, p in gated.named_parameters() if "lora_A" in n or "lora_B" in n)
    deltas = adapter.delta_weights(gated).values()
    assert sum(int(delta.count_nonzero()) for delta in deltas) == factors


@pytest.mark.parametrize("options", [True, False])
def test_naive_answers_and_scores_are_those_of_the_fast_way(options):
    model, tokenizer = load_backbone("tiny-llama")
    question = Question("news", "Which topic?\n", ("sport", "money"))
    texts, rows = ["a short one", "a longer one " * 5, "again " * 9], []
    fast, fast_scores = evaluation.answer(model, tokenizer, question, texts)
    naive, scores = speed._naive_answer(
        model, tokenizer, question, texts, batch_size=2, advance=rows.append, options=options
    )
    assert naive == fast and rows == [2, 1]
    if options:
        torch.testing.assert_close(scores, fast_scores, rtol=0, atol=1e-4)
    else:
        assert scores.shape == (3, 0)


@pytest.mark.parametrize("dtype, products", [(torch.float32, (2, 3, 5)), (torch.bfloat16, (2, 5, 5))])
def test_a_gated_layer_multiplies_three_times_and_five_times_in_bfloat16(dtype, products):
    T, n, r = 48, 32, 8
    rows = speed._timed(speed._layer_works(T, n, dtype=dtype), 1, "LoRA", "cpu")
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
    assert (parts["evaluation"]["differ"] == 0).all() and parts["batches"]["differ"][0] == 0
    assert parts["run"]["accuracy"].map(str).nunique() == 1
    assert len(parts["growth"]) == 10 and parts["path"]["peak_megabytes"][0] > 0
    table = speed.speed_table(parts)
    assert set(table["met"]) <= {"yes", "no", "not decided", ""} and len(table) == 4 + 4 + 6 + 7 + 3
    records = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert all(record["environment"]["versions"]["torch"] and record["quick"] for record in records)


def test_the_full_step_has_rows_for_the_large_model_too(small):
    rows = pd.DataFrame(speed.PARTS["step"](False, "cpu", torch.float32))
    assert rows["model"].tolist() == ["smollm2-135m"] * 3 + ["T5-large's shape"] * 3
    assert rows["rounds"].tolist() == [30] * 3 + [5] * 3
    assert len(speed.speed_table({"step": rows})) == 8


def test_a_part_that_does_not_exist_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="part='layers' is not known.*did you mean 'layer'"):
        speed.measure(["startup", "layers"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_stored_records_load_as_they_were_written():
    parts = speed.load_parts(RECORDS)
    assert parts.keys() == speed.PARTS.keys()
    assert set(speed.load_parts(RECORDS, dtype="bfloat16")) == {"layer", "step"}
    stored = json.loads((RECORDS / "cpu-float32-layer.json").read_text())
    assert parts["layer"].to_dict("records") == stored["rows"]
    assert parts["layer"].attrs["environment"] == stored["environment"]


@pytest.mark.parametrize(
    "ratio, low, high, met",
    [
        (1.0, 0.9, 1.1, "yes"),
        (1.0, 0.9, 1.2, "not decided"),
        (1.5, 1.1, 1.6, "not decided"),
        (1.5, 1.2, 1.6, "no"),
    ],
)
def test_a_time_is_decided_only_when_its_spread_lies_on_one_side_of_the_target(ratio, low, high, met):
    base = dict(variant="LoRA", tokens=16384, ratio=1.0, low=1.0, high=1.0)
    gated = base | dict(variant="JumpLoRA", ratio=ratio, low=low, high=high)
    naive = base | dict(variant="naive", ratio=9.0, low=4.1, high=9.5)
    table = speed.speed_table({"layer": pd.DataFrame([base, gated, naive])})
    assert table["met"].iloc[0] == met and table["target"].iloc[0] == "≤ 1.1"
    assert table["met"].iloc[1] == ("yes" if 4.1 / high >= 2.5 else "not decided")


def test_one_timing_decides_nothing_and_a_fall_of_the_step_time_is_noise():
    met = speed.speed_table(speed.load_parts(RECORDS))["met"]
    assert met["exact match: naive over fast"] == met["run of four tasks: naive over fast"] == "not decided"
    assert met["step time, last five tasks of 50 over tasks 2 to 6"] == "not decided"
    assert met["memory, last five tasks of 50 over tasks 2 to 6"] == "yes"
    assert (
        met["layer, 16384 tokens: naive over JumpLoRA"]
        == met["layer, 512 tokens: JumpLoRA over LoRA"]
        == "no"
    )
    assert met["import jumplora beyond torch: seconds"] == "not decided"
