"""The ramp, the threshold from the data against numpy, and the schedule in real training."""

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
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from jumplora.data.backbones import load_backbone
from jumplora.method.adapter import JumpLoraConfig, delta_weights, gate_groups
from jumplora.method.schedule import (
    Diverged,
    SparsityCallback,
    SparsitySchedule,
    initial_threshold,
    interpolation_factor,
    ramp_steps,
    read_thresholds,
)

ENTRIES = 2 * (64 * 64 + 32 * 64)  # of the updates of two blocks with a query and a value projection


def tiny(rank=2, scope="model"):
    torch.manual_seed(0)
    return get_peft_model(load_backbone("tiny-llama")[0], JumpLoraConfig(r=rank, threshold_scope=scope))


def fill_B(model, seed=1, groups=None):
    generator = torch.Generator().manual_seed(seed)
    found = gate_groups(model)
    for name in groups or found:
        for layer in found[name].layers.values():
            B = layer.lora_B["default"].weight
            B.data.copy_(torch.randn(B.shape, generator=generator))


def train(schedule, folder, rows, resume=None, callbacks=(), **more):
    "Train with transformers' Trainer; the schedule's state after each step, and its JSON."
    states = []

    class Recorder(SparsityCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            states.append((schedule.state_dict(), json.dumps(schedule.state_dict())))

    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(rows)]
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=1, report_to="none", disable_tqdm=True,
        logging_strategy="no", use_cpu=True, learning_rate=1e-2, **{"save_strategy": "no"} | more,
    )  # fmt: skip
    callbacks = [Recorder(schedule), *callbacks]
    trainer = Trainer(schedule.model, args, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return states


def same_parameters(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------- the ramp


def paper_interpolation(k, K):
    f, l = math.floor(0.2 * K), math.floor(0.8 * K)  # noqa: E741
    return min(max((k - f) / (l - f), 0.0), 1.0)


@pytest.mark.parametrize("K", [*range(5, 51), 80, 999])
# differences: 3
def test_from_five_steps_on_the_ramp_is_the_papers(K):
    for k in range(K + 1):
        assert interpolation_factor(k, K) == paper_interpolation(k, K), k


@pytest.mark.parametrize("start, stop", [(0.2, 0.8), (0, 1), (0, 0.01), (0.5, 0.5), (1, 1), (0, 0.3)])
def test_every_task_length_starts_dense_ends_gated_and_never_turns_back(start, stop):
    for K in range(1, 51):
        gammas = [interpolation_factor(k, K, start, stop) for k in range(K + 1)]
        assert gammas[0] == 0 and gammas[-1] == 1 and gammas == sorted(gammas), K
        assert interpolation_factor(K + 2, K, start, stop) == 1
        first, last = ramp_steps(K, start, stop)
        assert 1 <= first <= last <= K and (first < last or K == 1), K
        assert gammas[first] == (0 if K > 1 else 1), K  # the threshold is chosen before the gate acts


# differences: 3
def test_one_to_four_steps_are_defined_and_a_share_that_is_exact_on_paper_is_exact_in_floats():
    gammas = {K: [interpolation_factor(k, K) for k in range(K + 1)] for K in range(1, 5)}
    assert gammas == {1: [0, 1], 2: [0, 0, 1], 3: [0, 0, 1, 1], 4: [0, 0, 0.5, 1, 1]}
    assert int(0.29 * 100) == 28  # the trap
    assert ramp_steps(100, 0.29, 0.57) == (29, 57)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0), "total_steps=0"),
        ((0, -3), "total_steps=-3"),
        ((-1, 10), "step=-1"),
        ((0, 10, -0.1, 0.8), "0 <= start <= stop <= 1"),
        ((0, 10, 0.8, 0.2), "0 <= start <= stop <= 1"),
        ((0, 10, 0.2, 1.1), "0 <= start <= stop <= 1"),
        ((0, 10, float("nan"), 0.8), "0 <= start <= stop <= 1"),
    ],
)
def test_steps_and_shares_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        interpolation_factor(*arguments)


# ---------------------------------------------------------------- the threshold


def check_threshold(layers, kept):
    "As many pass as numpy's sort allows, equal entries together and zeros never; τ is the middle of the gap."
    values = np.sort(np.concatenate([layer.numpy().ravel() for layer in layers]).astype(np.float64))[::-1]
    threshold = initial_threshold(layers, kept)
    zeroed = values[kept] if kept < len(values) else 0.0
    larger = values[values > zeroed]
    assert threshold == float(np.float32(threshold)), "not a number of fp32"
    assert np.sum(values > threshold) == len(larger) <= kept
    if len(larger):
        middle = float(np.float32((zeroed + larger[-1]) / 2))
        assert threshold == (middle if middle < larger[-1] else zeroed)


@pytest.mark.parametrize("kept", [0, 1, 7, 63, 500, 1999, 2000])
# differences: 1, 34
def test_the_threshold_is_the_middle_of_the_gap_that_a_sort_finds(kept):
    torch.manual_seed(kept)
    sizes = ((20, 30), (50, 20), (400,))
    check_threshold([torch.randn(*shape).abs() * 1e-4 for shape in sizes], kept)


@settings(max_examples=400, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.25 + 2**-25, 0.5, 3.0]), min_size=1, max_size=12)
    | st.lists(st.floats(0, float(np.finfo(np.float32).max), width=32), min_size=1, max_size=30),
    cut=st.integers(0, 12),
    kept=st.integers(0, 30),
)
# differences: 1
def test_ties_zeros_neighbours_and_any_float32_magnitudes_keep_the_largest_possible_count(values, cut, kept):
    layer = torch.tensor(values)
    check_threshold([layer[:cut], layer[cut:]], min(kept, len(values)))


@pytest.mark.parametrize(
    "values, kept, threshold",
    [
        ([1.0, 3.0, 8.0], 1, 5.5),
        ([1.0, 1.0 + 2**-23], 1, 1.0),  # no fp32 number lies between
        ([1.0 + 2**-23, 1.0 + 2**-22], 1, 1.0 + 2**-23),  # rounding to even would reach the upper value
        ([2.0, 2.0], 1, 3.0),  # a tie at the top: none passes, with a margin
        ([3.0, 1.0, 2.0], 0, 4.5),  # τ is half as large again as the largest entry
        ([3.0, 1.0, 2.0], 3, 0.5),
        ([0.0] * 9, 4, 0.0),
        ([], 0, 0.0),
    ],
)
def test_the_threshold_of_a_few_entries_is_the_one_found_by_hand(values, kept, threshold):
    assert initial_threshold([torch.tensor(values)], kept) == threshold


def test_half_precision_magnitudes_are_compared_exactly():
    layer = torch.tensor([0.5, 0.5, 0.498046875, 0.25], dtype=torch.bfloat16)
    assert int((layer.float() > initial_threshold([layer], 2)).sum()) == 2


def test_two_passes_over_one_layer_at_a_time_are_enough():
    class Layers:  # formed anew at every pass
        passes = alive = most = 0

        def __iter__(self):
            self.passes += 1
            for i in range(40):
                layer = torch.rand(10, 10, generator=torch.Generator().manual_seed(i))
                self.alive += 1
                self.most = max(self.most, self.alive)
                weakref.finalize(layer, lambda: setattr(self, "alive", self.alive - 1))
                yield layer
                del layer

    layers = Layers()
    threshold = initial_threshold(layers, 10)
    assert layers.passes == 2 and layers.most <= 2  # one in use, the next one just made
    assert sum(int((layer > threshold).sum()) for layer in layers) == 10


@pytest.mark.parametrize(
    "layers, kept, message",
    [
        ([torch.ones(3), torch.tensor([1.0, float("nan")])], 2, "NaN or infinity"),
        ([torch.tensor([1.0, float("inf")])], 1, "NaN or infinity"),
        ([torch.ones(3)], -1, "kept=-1"),
        ([torch.ones(3)], 4, "kept=4.*3 entries"),
        (iter([torch.ones(3)]), 2, "only once; give a list"),
    ],
)
def test_entries_without_an_order_and_impossible_counts_are_refused(layers, kept, message):
    with pytest.raises(Diverged if "NaN" in message else ValueError, match=message):
        initial_threshold(layers, kept)


@pytest.mark.parametrize("scope", ["model", "block", "layer"])
@pytest.mark.parametrize("rank", [1, 8, 40])
# differences: 4
def test_as_many_entries_pass_as_the_adapter_has_parameters_or_all(scope, rank):
    model = tiny(rank, scope)
    schedule = SparsitySchedule(model, 1)
    fill_B(model)
    schedule.after_step(1)  # K = 1: γ is 1 now
    passed = delta_weights(model)
    for name, group in schedule.groups.items():
        shapes = [(64, 64) if "q_proj" in layer else (32, 64) for layer in group.layers]
        expected = min(sum(rank * (out + inp) for out, inp in shapes), sum(out * inp for out, inp in shapes))
        assert schedule.kept_entries[name] == expected
        assert sum(int(passed[layer].count_nonzero()) for layer in group.layers) == expected


def test_a_count_or_a_share_can_be_given_and_an_impossible_one_is_refused():
    model = tiny()
    for kept, entries in ((1, 1), (ENTRIES, ENTRIES), (1.0, ENTRIES), (0.25, ENTRIES // 4), (1e-9, 1)):
        assert SparsitySchedule(model, 5, kept=kept).kept_entries == {"model": entries}
    for bad in (0, -1, ENTRIES + 1, 0.0, 1.5, -0.5, True, "all", float("nan")):
        with pytest.raises(ValueError, match=f"kept={bad!r} is not .* 'model' with {ENTRIES} entries"):
            SparsitySchedule(model, 5, kept=bad)


# ---------------------------------------------------------------- the schedule


def test_a_model_without_a_gate_and_a_gated_zero_update_are_refused_and_a_learned_one_becomes_dense():
    model = tiny()
    gate = gate_groups(model)["model"].gate
    with pytest.raises(ValueError, match="no gradient"):
        SparsitySchedule(model, 10, start=0.0, stop=0.0)
    with pytest.raises(ValueError, match="'other' has no gate"):
        SparsitySchedule(model, 5, adapter_name="other")
    with pytest.raises(ValueError, match="has no gate"):
        SparsitySchedule(get_peft_model(load_backbone("tiny-llama")[0], LoraConfig()), 5)
    gate.interpolation.fill_(1)
    with pytest.raises(ValueError, match="γ = 1.*zero"):
        SparsitySchedule(model, 5)
    fill_B(model)
    SparsitySchedule(model, 5)
    assert gate.interpolation.item() == 0


@pytest.mark.parametrize(
    "K, accumulation", [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1), (12, 1), (3, 2), (2, 4)]
)
def test_every_task_trains_dense_chooses_the_threshold_at_step_f_and_ends_gated(tmp_path, K, accumulation):
    schedule, forwards = SparsitySchedule(tiny(scope="block"), K), []
    gate = next(iter(schedule.groups.values())).gate
    schedule.model.register_forward_pre_hook(lambda *_: forwards.append(gate.interpolation.item()))
    placeholder = gate.threshold.item()
    train(schedule, tmp_path, 2 * K * accumulation, gradient_accumulation_steps=accumulation)
    gammas = [interpolation_factor(k, K) for k in range(K + 1)]
    np.testing.assert_allclose(forwards, np.repeat(gammas[:-1], accumulation), rtol=1e-6)
    found = [(entry["step"], entry["interpolation"]) for entry in schedule.history]
    assert found == list(enumerate(gammas))[1:] and gate.interpolation.item() == 1
    for name, group in schedule.groups.items():
        thresholds = [entry["threshold"][name] for entry in schedule.history]
        early, chosen = thresholds[: schedule.first - 1], thresholds[schedule.first - 1]
        assert early == [pytest.approx(placeholder)] * len(early) and 0 < chosen < 0.99 * placeholder
        assert any(delta_weights(schedule.model)[layer].any() for layer in group.layers)


def test_a_group_whose_update_is_still_zero_gets_its_threshold_later():
    model = tiny(scope="block")
    schedule = SparsitySchedule(model, 5)
    names = list(schedule.groups)
    fill_B(model, groups=names[1:])
    schedule.after_step(1)  # for instance a warm-up step with learning rate zero
    assert schedule.started == names[1:]
    placeholder = schedule.history[0]["threshold"][names[0]]
    fill_B(model, groups=names[:1])
    schedule.after_step(2)
    assert schedule.started == names[1:] + names[:1]
    assert schedule.history[1]["threshold"][names[0]] != placeholder


def test_thresholds_are_chosen_once_in_the_order_of_the_groups_and_the_factors_stay():
    model = tiny(scope="layer")
    schedule, resumed = SparsitySchedule(model, 5), SparsitySchedule(model, 5)
    fill_B(model)
    schedule.after_step(1)
    fill_B(model, seed=9)
    before = {n: p.clone() for n, p in model.named_parameters() if "theta" not in n}
    schedule.after_step(2)
    assert schedule.history[0]["threshold"] == schedule.history[1]["threshold"]
    resumed.resume_at(2)
    assert schedule.started == resumed.started == list(schedule.groups) and len(schedule.groups) == 4
    after = dict(model.named_parameters())
    assert all(torch.equal(before[n], after[n]) and after[n].grad is None for n in before)


# ---------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("with_state", [True, False], ids=["saved state", "checkpoint alone"])
@pytest.mark.parametrize(
    "steps, warmup, stopped",
    [(10, 0, 1), (10, 0, 2), (10, 0, 3), (5, 2, 1)],  # f = 2, or f = 1 with learning rate zero in step f
)
def test_a_resumed_training_ends_like_one_that_was_not_stopped(tmp_path, steps, warmup, stopped, with_state):
    more = dict(rows=2 * steps, save_strategy="steps", save_steps=1, warmup_steps=warmup)
    whole, resumed = (SparsitySchedule(tiny(scope="block"), steps) for _ in range(2))
    states = train(whole, tmp_path, **more)
    assert all(json.dumps(state) == frozen for state, frozen in states)  # later steps do not change them
    if with_state:
        resumed.load_state_dict(json.loads(states[stopped - 1][1]))
        gamma = next(iter(resumed.groups.values())).gate.interpolation.item()
        assert gamma == pytest.approx(interpolation_factor(stopped, steps))
    train(resumed, tmp_path, resume=str(tmp_path / f"checkpoint-{stopped}"), **more)
    assert resumed.history == whole.history[0 if with_state else stopped :]
    assert resumed.started == whole.started and same_parameters(whole.model, resumed.model)


def test_the_state_of_another_schedule_is_refused():
    state = SparsitySchedule(tiny(), 8).state_dict()
    others = {
        "total_steps=8, this one 9": SparsitySchedule(tiny(), 9),
        "start=0.2, this one 0.3": SparsitySchedule(tiny(), 8, start=0.3),
        "stop=0.8, this one 0.7": SparsitySchedule(tiny(), 8, stop=0.7),
        "kept_entries": SparsitySchedule(tiny(scope="block"), 8),
        "hold=False, this one True": SparsitySchedule(tiny(), 8, hold=True),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    del state["hold"]  # as it was saved before
    SparsitySchedule(tiny(), 8, hold=True).load_state_dict(state)


@pytest.mark.parametrize("total, gamma, message", [(6, 0, "made for 6 steps.*will do 3"), (3, 1, "γ = 1")])
def test_another_total_or_a_gate_set_to_one_stops_before_the_first_step(tmp_path, total, gamma, message):
    schedule = SparsitySchedule(tiny(), total)
    schedule.groups["model"].gate.interpolation.fill_(gamma)
    with pytest.raises(ValueError, match=message):
        train(schedule, tmp_path, rows=6)
    assert not any(p.any() for n, p in schedule.model.named_parameters() if "lora_B" in n)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


BEST = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
BEST |= dict(
    load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
)  # the worst, which is an early one


@pytest.mark.parametrize(
    ("settings", "callbacks", "name", "end"),
    [
        (dict(), [], "red", None),
        (dict(save_strategy="steps", save_steps=2), [], "red", None),  # a checkpoint of the ramp is no end
        (dict(), [Stop()], "red", "at step 3 of 10 at γ = 0.167"),
        (BEST, [], "default", "at step 10 of 10 at γ = 0"),
    ],
    ids=["to the end", "with checkpoints", "stopped early", "back to the best checkpoint"],
)
def test_a_training_that_ends_before_its_gate_is_gated_warns(settings, callbacks, name, end, tmp_path):
    model = get_peft_model(load_backbone("tiny-llama")[0], JumpLoraConfig(r=2), adapter_name=name)
    schedule = SparsitySchedule(model, 10, adapter_name=name)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(schedule, tmp_path, rows=20, callbacks=callbacks, **settings)
    found = [str(warning.message) for warning in found if "γ" in str(warning.message)]
    assert len(found) == (end is not None)
    assert all(message.startswith(f"training ended {end}: it is not sparse") for message in found)
    assert (schedule.groups["model"].gate.interpolation < 1) == (end is not None)


def test_a_training_that_begins_anew_starts_dense_and_chooses_its_threshold_again(tmp_path):
    schedule = SparsitySchedule(tiny(), 10)
    train(schedule, tmp_path, rows=20)
    chosen = read_thresholds(schedule.groups)
    states = [state for state, _ in train(schedule, tmp_path, rows=20)]
    assert states[0]["started"] == [] and [point["step"] for point in states[0]["history"]] == [1]
    assert [point["interpolation"] for point in states[-1]["history"]][:3] == [0, 0, pytest.approx(1 / 6)]
    assert read_thresholds(schedule.groups) != chosen
