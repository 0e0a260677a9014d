"""The interpolation, the start of the threshold against numpy, and the schedule in real training."""

import copy
import json
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from jumplora.method.adapter import JumpLoraConfig, delta_weights, dense_update, gate_groups
from jumplora.method.schedule import (
    SparsityCallback,
    SparsitySchedule,
    initial_threshold,
    interpolation_factor,
    ramp_steps,
)


def tiny(rank=2, scope="model", seed=0, config=JumpLoraConfig, **settings):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    if config is JumpLoraConfig:
        settings["threshold_scope"] = scope
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, config(r=rank, target_modules=["q_proj", "v_proj"], **settings))


def fill_B(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for group in gate_groups(model).values():
        for layer in group.layers.values():
            B = layer.lora_B["default"].weight
            B.data.copy_(torch.randn(B.shape, generator=generator))


def train(model, steps, schedule, first=1, moments=None):
    ids = torch.arange(32).view(2, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    if moments:
        optimizer.load_state_dict(moments)
    for step in range(first, first + steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step)
    return optimizer


# ---------------------------------------------------------------- interpolation


def paper_interpolation(k, K):
    f, l = math.floor(0.2 * K), math.floor(0.8 * K)  # noqa: E741
    return min(max((k - f) / (l - f), 0.0), 1.0)


@pytest.mark.parametrize("K", [*range(5, 51), 80, 999])
def test_from_five_steps_on_the_interpolation_is_the_papers(K):
    for k in range(K + 1):
        assert interpolation_factor(k, K) == paper_interpolation(k, K), k


def test_seven_steps_have_the_forwards_of_the_paper():
    assert [interpolation_factor(k, 7) for k in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    "start, stop", [(0.2, 0.8), (0.0, 1.0), (0.0, 0.01), (0.5, 0.5), (1.0, 1.0), (0.0, 0.3)]
)
def test_every_task_length_starts_dense_ends_gated_and_never_opens_again(start, stop):
    for K in range(1, 51):
        gammas = [interpolation_factor(k, K, start, stop) for k in range(K + 1)]
        assert gammas[0] == 0 and gammas[-1] == 1, K
        assert gammas == sorted(gammas), K
        first, last = ramp_steps(K, start, stop)
        assert 1 <= first <= last <= K and (first < last or K == 1), K
        assert gammas[first] == (0 if K > 1 else 1), K  # the threshold is set before the gate acts


def test_one_to_four_steps_are_defined():
    gammas = {K: [interpolation_factor(k, K) for k in range(K + 1)] for K in range(1, 5)}
    assert gammas == {1: [0, 1], 2: [0, 0, 1], 3: [0, 0, 1, 1], 4: [0, 0, 0.5, 1, 1]}


def test_a_share_that_is_exact_on_paper_is_exact_in_floats():
    assert int(0.29 * 100) == 28  # the trap
    assert ramp_steps(100, 0.29, 0.57) == (29, 57)


def test_a_step_beyond_the_end_keeps_the_gate_closed():
    assert interpolation_factor(12, 10) == 1


@pytest.mark.parametrize("steps", [0, -3])
def test_a_task_without_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"total_steps={steps}"):
        interpolation_factor(0, steps)


@pytest.mark.parametrize("start, stop", [(-0.1, 0.8), (0.8, 0.2), (0.2, 1.1), (float("nan"), 0.8)])
def test_shares_outside_their_range_are_refused(start, stop):
    with pytest.raises(ValueError, match="0 <= start <= stop <= 1"):
        interpolation_factor(0, 10, start, stop)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step=-1"):
        interpolation_factor(-1, 10)


def test_a_gate_closed_from_the_first_step_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no gradient"):
        SparsitySchedule(tiny(), 10, start=0.0, stop=0.0)


# ---------------------------------------------------------------- threshold


def count_by_sorting(values, kept):
    "`kept`, or where equal entries forbid that the next smaller count; zeros never pass."
    ordered = np.sort(values.astype(np.float64))[::-1]
    below = ordered[kept] if kept < len(ordered) else 0.0
    return int(np.sum(ordered > below))


def check_start(layers, kept):
    values = np.concatenate([layer.numpy().ravel() for layer in layers])
    threshold = initial_threshold(layers, kept)
    assert threshold == float(np.float32(threshold)), "not a number of fp32"
    assert int(np.sum(values > np.float32(threshold))) == count_by_sorting(values, kept) <= kept
    return threshold


@pytest.mark.parametrize("kept", [0, 1, 7, 63, 500, 1999, 2000])
def test_the_threshold_keeps_exactly_as_many_as_a_sort_says(kept):
    torch.manual_seed(kept)
    sizes = ((20, 30), (50, 20), (400,))
    check_start([torch.randn(*shape).abs() * 1e-4 for shape in sizes], kept)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.25 + 2**-25, 0.5, 3.0]), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    kept=st.integers(0, 12),
)
def test_ties_zeros_neighbours_and_tiny_layers_keep_the_largest_possible_count(values, cut, kept):
    layer = torch.tensor(values)
    check_start([layer[:cut], layer[cut:]], min(kept, len(values)))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(0, float(np.finfo(np.float32).max), width=32), min_size=1, max_size=30),
    kept=st.integers(0, 30),
)
def test_any_float32_magnitudes_keep_the_largest_possible_count(values, kept):
    check_start([torch.tensor(values)], min(kept, len(values)))


def test_all_entries_can_be_kept_and_none():
    layer = torch.tensor([0.3, 0.1, 0.2])
    assert 0 < initial_threshold([layer], 3) < 0.1
    assert 0.3 < initial_threshold([layer], 0) < math.inf


def test_an_update_of_zeros_gives_the_threshold_zero():
    assert initial_threshold([torch.zeros(3, 3)], 4) == 0
    assert initial_threshold([], 0) == 0


def test_the_threshold_sits_in_the_middle_of_the_gap():
    assert initial_threshold([torch.tensor([1.0, 3.0, 8.0])], 1) == 5.5
    one, next_to_it, after_it = 1.0, 1.0 + 2**-23, 1.0 + 2**-22
    assert initial_threshold([torch.tensor([one, next_to_it])], 1) == one
    assert initial_threshold([torch.tensor([next_to_it, after_it])], 1) == next_to_it  # to even would go up
    assert initial_threshold([torch.tensor([2.0, 2.0])], 1) == 3.0  # a tie: none passes, with a margin


def test_half_precision_magnitudes_are_compared_exactly():
    layer = torch.tensor([0.5, 0.5, 0.498046875, 0.25], dtype=torch.bfloat16)
    threshold = initial_threshold([layer], 2)
    assert int((layer.float() > threshold).sum()) == 2


class Twice:
    "Layers made anew each time they are asked for, one at a time."

    def __init__(self):
        self.passes, self.alive, self.most = 0, 0, 0

    def __iter__(self):
        self.passes += 1
        for i in range(40):
            layer = torch.rand(10, 10, generator=torch.Generator().manual_seed(i))
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(layer, lambda: setattr(self, "alive", self.alive - 1))
            yield layer
            del layer


def test_two_passes_over_one_layer_at_a_time_are_enough():
    layers = Twice()
    threshold = initial_threshold(layers, 10)
    assert layers.passes == 2 and layers.most <= 2  # one in use, the next one just made
    assert sum(int((layer > threshold).sum()) for layer in layers) == 10


def test_layers_that_can_be_seen_only_once_are_refused():
    with pytest.raises(ValueError, match="only once; give a list"):
        initial_threshold(iter([torch.ones(3)]), 2)


@pytest.mark.parametrize("scale", [1e-38, 1e-4, 1.0, 1e30])
@pytest.mark.parametrize("kept", [1, 17, 500, 999])
def test_the_threshold_lies_between_two_neighbours_of_kthvalue(scale, kept):
    layer = torch.randn(1000, generator=torch.Generator().manual_seed(kept)).abs() * scale
    below, above = (layer.kthvalue(1000 - kept + i).values.item() for i in (0, 1))
    assert below <= initial_threshold([layer], kept) < above


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        initial_threshold([torch.ones(3), torch.tensor([1.0, bad])], 2)


def test_a_count_outside_the_update_is_refused():
    with pytest.raises(ValueError, match="kept=-1"):
        initial_threshold([torch.ones(3)], -1)
    with pytest.raises(ValueError, match="kept=4.*3 entries"):
        initial_threshold([torch.ones(3)], 4)


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize("scope", ["model", "block", "layer"])
@pytest.mark.parametrize("rank", [1, 2, 8, 40])
def test_the_gate_passes_as_many_entries_as_the_adapter_has_parameters_or_all(scope, rank):
    model = tiny(rank, scope)
    schedule = SparsitySchedule(model, 1)
    fill_B(model)
    schedule.after_step(1)  # K = 1: γ is 1 now
    passed = delta_weights(model)
    for name, group in schedule.groups.items():
        shapes = [(16, 16) if "q_proj" in layer else (8, 16) for layer in group.layers]
        expected = min(sum(rank * (out + inp) for out, inp in shapes), sum(out * inp for out, inp in shapes))
        assert schedule.kept_entries[name] == expected
        assert sum(int(passed[layer].count_nonzero()) for layer in group.layers) == expected
        values = np.concatenate([np.abs(dense_update(o).numpy()).ravel() for o in group.layers.values()])
        ordered = np.sort(values.astype(np.float64))
        below = ordered[-expected - 1] if expected < len(ordered) else 0.0
        np.testing.assert_allclose(
            group.gate.threshold.item(), (below + ordered[-expected]) / 2, rtol=1e-6
        )  # the middle of the gap, in float64


def test_a_count_or_a_share_can_be_asked_for():
    group = gate_groups(tiny())["model"]  # 2 · (16·16 + 8·16) = 768 entries
    assert [group.entries_to_keep(k) for k in (1, 768, 1.0, 0.25, 1e-9)] == [1, 768, 768, 192, 1]
    schedule = SparsitySchedule(tiny(), 5, kept=0.25)
    assert schedule.kept_entries == {"model": 192}


@pytest.mark.parametrize("kept", [0, -1, 769, 0.0, 1.5, -0.5, True, "all", float("nan")])
def test_an_impossible_count_is_refused_when_the_schedule_is_made(kept):
    with pytest.raises(ValueError, match="kept=.*768 entries"):
        SparsitySchedule(tiny(), 5, kept=kept)


# ---------------------------------------------------------------- the schedule


def test_a_closed_gate_over_a_zero_update_is_refused_and_over_a_learned_one_is_opened():
    model = tiny()
    gate = gate_groups(model)["model"].gate
    gate.interpolation.fill_(1)
    with pytest.raises(ValueError, match="γ = 1.*zero"):
        SparsitySchedule(model, 5)
    fill_B(model)
    SparsitySchedule(model, 5)
    assert gate.interpolation.item() == 0


def test_a_model_without_a_gate_is_refused():
    with pytest.raises(ValueError, match="has no gate"):
        SparsitySchedule(tiny(config=LoraConfig), 5)
    with pytest.raises(ValueError, match="'other' has no gate"):
        SparsitySchedule(tiny(), 5, adapter_name="other")


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 7, 12])
def test_every_task_length_trains_dense_sets_the_threshold_once_and_ends_gated(K):
    model, forwards = tiny(scope="block"), []
    schedule = SparsitySchedule(model, K)
    gate = next(iter(schedule.groups.values())).gate
    model.register_forward_pre_hook(lambda *_: forwards.append(gate.interpolation.item()))
    placeholder = gate.threshold.item()
    train(model, K, schedule)
    np.testing.assert_allclose(forwards, [interpolation_factor(k, K) for k in range(K)], rtol=1e-6)
    assert gate.interpolation.item() == 1
    assert sorted(schedule.started) == sorted(schedule.groups)
    thresholds = [entry["threshold"] for entry in schedule.history]
    for name, group in schedule.groups.items():
        early = [t[name] for t in thresholds[: schedule.first - 1]]
        assert early == [pytest.approx(placeholder)] * len(early)
        assert 0 < thresholds[-1][name] < placeholder  # the paper's rule leaves the placeholder for K < 5
        assert any(delta_weights(model)[layer].any() for layer in group.layers)


def test_the_history_is_plain_numbers_that_json_keeps():
    model = tiny(scope="block")
    schedule = SparsitySchedule(model, 6)
    train(model, 6, schedule)
    assert [entry["step"] for entry in schedule.history] == [1, 2, 3, 4, 5, 6]
    assert json.loads(json.dumps(schedule.history)) == schedule.history
    last = schedule.history[-1]["threshold"]
    assert last == {name: group.gate.threshold.item() for name, group in gate_groups(model).items()}


def test_a_sparse_history_keeps_the_steps_where_something_changes():
    model = tiny()
    fill_B(model)
    schedule = SparsitySchedule(model, 50, log_every=20)
    for step in range(1, 51):
        schedule.after_step(step)
    assert [entry["step"] for entry in schedule.history] == [10, 20, 40, 50]


def test_a_group_whose_update_is_still_zero_gets_its_threshold_later():
    model = tiny(scope="block")
    schedule = SparsitySchedule(model, 5)
    schedule.after_step(1)  # for instance a warm-up step with learning rate zero
    assert schedule.started == []
    placeholder = schedule.history[0]["threshold"]
    fill_B(model)
    schedule.after_step(2)
    assert sorted(schedule.started) == sorted(schedule.groups)
    assert all(schedule.history[1]["threshold"][name] != placeholder[name] for name in placeholder)


def test_the_data_sets_the_threshold_only_once():
    model = tiny()
    schedule = SparsitySchedule(model, 5)
    fill_B(model)
    schedule.after_step(1)
    fill_B(model, seed=9)
    schedule.after_step(2)
    assert schedule.history[0]["threshold"] == schedule.history[1]["threshold"]


def test_setting_gates_does_not_touch_the_factors_or_their_gradients():
    model = tiny()
    fill_B(model)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    schedule = SparsitySchedule(model, 2)
    schedule.after_step(1)
    schedule.after_step(2)
    after = dict(model.named_parameters())
    assert all(torch.equal(before[n], after[n]) and after[n].grad is None for n in before)
    assert not schedule.groups["model"].gate.interpolation.requires_grad


def test_a_stopped_training_goes_on_with_the_same_numbers():
    whole = tiny(scope="block")
    schedule = SparsitySchedule(whole, 8)
    optimizer = train(whole, 3, schedule)
    state = json.loads(json.dumps(schedule.state_dict()))
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    moments = optimizer.state_dict()

    again = tiny(scope="block", seed=5)
    again.load_state_dict(weights)
    resumed = SparsitySchedule(again, 8)
    resumed.load_state_dict(state)
    assert next(iter(resumed.groups.values())).gate.interpolation.item() == pytest.approx(2 / 5)
    for model, plan in ((whole, schedule), (again, resumed)):
        train(model, 5, plan, first=4, moments=copy.deepcopy(moments))
    assert schedule.history == resumed.history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_state_of_another_schedule_is_refused():
    state = SparsitySchedule(tiny(), 8).state_dict()
    with pytest.raises(ValueError, match="total_steps=8, this one 9"):
        SparsitySchedule(tiny(), 9).load_state_dict(state)
    with pytest.raises(ValueError, match="kept_entries"):
        SparsitySchedule(tiny(scope="block"), 8).load_state_dict(state)


# ---------------------------------------------------------------- with Trainer


def trainer(model, folder, schedule, rows=12, **more):
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(rows)]
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=1, report_to="none", disable_tqdm=True,
        logging_strategy="no", use_cpu=True, learning_rate=1e-2, **{"save_strategy": "no"} | more,
    )  # fmt: skip
    made = Trainer(model, args, train_dataset=data, callbacks=[SparsityCallback(schedule)])
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("accumulation, steps", [(1, 6), (2, 3), (4, 2)])
def test_the_callback_counts_optimizer_steps_whatever_the_accumulation(tmp_path, accumulation, steps):
    model = tiny()
    schedule = SparsitySchedule(model, steps)
    trainer(model, tmp_path, schedule, gradient_accumulation_steps=accumulation).train()
    assert [entry["step"] for entry in schedule.history] == list(range(1, steps + 1))
    expected = [interpolation_factor(k, steps) for k in range(1, steps + 1)]
    assert [entry["interpolation"] for entry in schedule.history] == expected
    assert schedule.groups["model"].gate.interpolation.item() == 1


def test_a_schedule_for_another_number_of_steps_stops_before_the_first(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="made for 6 steps.*will do 3"):
        trainer(model, tmp_path, SparsitySchedule(model, 6), gradient_accumulation_steps=2).train()
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_a_gate_closed_after_the_schedule_was_made_stops_before_the_first_step(tmp_path):
    model = tiny()
    schedule = SparsitySchedule(model, 6)
    schedule.groups["model"].gate.interpolation.fill_(1)
    with pytest.raises(ValueError, match="γ = 1"):
        trainer(model, tmp_path, schedule).train()


def test_a_trainer_resumed_from_its_checkpoint_ends_like_one_that_was_not_stopped(tmp_path):
    saving = dict(save_strategy="steps", save_steps=3)
    whole = tiny(scope="block")
    uninterrupted = SparsitySchedule(whole, 6)
    trainer(whole, tmp_path, uninterrupted, **saving).train()

    again = tiny(scope="block")
    resumed = SparsitySchedule(again, 6)
    trainer(again, tmp_path, resumed, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.history == uninterrupted.history[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
