"""The penalties, against float64 arithmetic written here, and what they remember."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from torch import nn

from jumplora.method.regularizers import ELLA, IncLoRA, Regularizer, Update, overlap_energy

SHAPES = {"a.q": (5, 3), "a.v": (2, 7), "b.q": (4, 4)}


def random_updates(seed, scale=1.0, shapes=SHAPES, grad=False):
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: Update(delta.requires_grad_(grad)) for name, delta in deltas.items()}


def ella_by_hand(updates, past, reduction):
    terms = [
        np.sum((u.delta.detach().numpy().astype(np.float64) * np.asarray(past[name], np.float64)) ** 2)
        for name, u in updates.items()
    ]
    return np.sum(terms) if reduction == "sum" else np.mean(terms)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("strength", [1.0, 3e4])
def test_ella_equals_its_formula_in_float64_after_several_tasks(reduction, strength):
    ella = ELLA(strength, reduction)
    past = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for seed in range(3):
        done = random_updates(seed, scale=1e-2)
        ella.after_task(done)
        past = {name: past[name] + done[name].delta.numpy().astype(np.float64) for name in past}
    current = random_updates(9, scale=1e-2, grad=True)
    penalty = ella.penalty(current)
    expected = strength * ella_by_hand(current, past, reduction)
    np.testing.assert_allclose(penalty.item(), expected, rtol=1e-5)
    penalty.backward()
    layers = len(SHAPES) if reduction == "mean" else 1
    for name, update in current.items():
        gradient = 2 * strength / layers * update.delta.detach().numpy().astype(np.float64) * past[name] ** 2
        np.testing.assert_allclose(update.delta.grad.numpy(), gradient, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_price_of_all_layers_is_the_sum_of_their_prices(reduction):
    ella, current = ELLA(2.0, reduction), random_updates(9)
    assert all(ella.layer_penalty(name, update) == 0 for name, update in current.items())
    ella.after_task(random_updates(0))
    parts = [ella.layer_penalty(name, update) for name, update in current.items()]
    torch.testing.assert_close(sum(parts), ella.penalty(current))


def test_a_past_in_bfloat16_takes_half_and_prices_within_its_rounding():
    exact, half = ELLA(1.0), ELLA(1.0, past_dtype="bfloat16")
    for seed in range(15):
        for ella in (exact, half):
            ella.after_task(random_updates(seed))
    assert all(2 * half.past[n].nbytes == exact.past[n].nbytes for n in SHAPES)
    current = random_updates(99)
    assert abs(half.penalty(current) / exact.penalty(current) - 1) < 0.02
    again = ELLA(1.0, past_dtype="bfloat16")
    again.load_state_dict(load(save(half.state_dict())))
    assert again.penalty(current) == half.penalty(current) and again.describe()["past_dtype"] == "bfloat16"


def test_an_unknown_dtype_of_the_past_is_refused():
    with pytest.raises(ValueError, match="past_dtype='float16' is not known.*bfloat16"):
        ELLA(past_dtype="float16")


def test_the_authors_mean_of_scaled_factors_is_s4_over_l_times_the_papers_sum():
    s, bare, old = 4.0, random_updates(0), random_updates(1)
    paper = sum(
        np.sum((bare[n].delta.numpy().astype(np.float64) * old[n].delta.numpy().astype(np.float64)) ** 2)
        for n in SHAPES
    )
    ella = ELLA(1.0, "mean")
    ella.after_task({name: Update(s * u.delta) for name, u in old.items()})
    code = ella.penalty({name: Update(s * u.delta) for name, u in bare.items()}).item()
    np.testing.assert_allclose(code / paper, s**4 / len(SHAPES), rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1.0, 1e12])
def test_the_first_task_costs_nothing_for_any_strength(strength):
    penalty = ELLA(strength).penalty(random_updates(0, grad=True))
    assert penalty.item() == 0 and penalty.shape == () and not penalty.requires_grad


def test_strength_zero_costs_nothing_in_later_tasks():
    ella = ELLA(0.0)
    ella.after_task(random_updates(0))
    assert ella.penalty(random_updates(0, grad=True)).item() == 0
    assert ELLA(1.0).penalty({}).item() == 0


def test_disjoint_supports_cost_nothing_and_one_shared_entry_costs_its_product():
    new, old = torch.zeros(4, 4), torch.zeros(4, 4)
    new[0], old[1] = 3.0, 5.0
    ella = ELLA(2.0)
    ella.after_task({"x": Update(old)})
    assert ella.penalty({"x": Update(new)}).item() == 0
    new[1, 2] = 0.5
    assert ella.penalty({"x": Update(new)}).item() == pytest.approx(2 * (0.5 * 5) ** 2)


def test_the_past_is_float32_and_takes_no_part_in_later_changes_of_an_update():
    delta = torch.full((2, 2), 1.0, dtype=torch.bfloat16)
    ella = ELLA()
    ella.after_task({"x": Update(delta)})
    delta.add_(5)
    assert ella.past["x"].dtype == torch.float32 and (ella.past["x"] == 1).all()
    ella.after_task({"x": Update(torch.full((2, 2), 2.0**-12, dtype=torch.bfloat16))})
    assert (ella.past["x"] == 1 + 2.0**-12).all()  # bfloat16 would have rounded this to 1
    full = torch.rand(2, 2, requires_grad=True)
    ella.after_task({"x": Update(full)})
    assert not ella.past["x"].requires_grad


def test_half_precision_updates_are_priced_in_float32():
    delta = torch.full((2, 2), 1e-3, dtype=torch.float16, requires_grad=True)
    ella = ELLA(1.0)
    ella.after_task({"x": Update(torch.full((2, 2), 1e-3))})
    penalty = ella.penalty({"x": Update(delta)})  # each product is 1e-6, its square 1e-12: 0 in float16
    assert penalty.dtype == torch.float32 and penalty.item() == pytest.approx(4e-12, rel=1e-2)


def test_a_penalty_leaves_the_memory_unchanged():
    ella = ELLA(1.0)
    ella.after_task(random_updates(0))
    before = copy.deepcopy(ella.state_dict())
    ella.penalty(random_updates(1, grad=True)).backward()
    assert all(torch.equal(before[k], v) for k, v in ella.state_dict().items())


@pytest.mark.parametrize("names", [["module.a.q", "a.v", "b.q"], ["a.q", "a.v"], ["a.q", "a.v", "b.q", "c"]])
def test_names_that_do_not_match_the_past_are_refused_and_listed(names):
    ella = ELLA(1.0)
    ella.after_task(random_updates(0))
    current = {name: Update(torch.ones(5, 3)) for name in names}
    odd = sorted(set(names) ^ set(SHAPES))
    for call in (ella.penalty, ella.after_task):
        with pytest.raises(ValueError, match="different layers") as error:
            call(current)
        assert all(name in str(error.value) for name in odd)
    assert ella.tasks == 1


def test_a_shape_that_does_not_match_the_past_is_refused():
    ella = ELLA(1.0)
    ella.after_task({"x": Update(torch.ones(2, 3))})
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        ella.penalty({"x": Update(torch.ones(3, 2))})  # would broadcast or fail without a name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_update_with_a_bad_entry_is_not_remembered_at_all(bad):
    ella = ELLA(1.0)
    ella.after_task(random_updates(0))
    before = {name: w.clone() for name, w in ella.past.items()}
    broken = random_updates(1)
    broken["b.q"].delta[0, 0] = bad
    with pytest.raises(ValueError, match="b.q"):
        ella.after_task(broken)
    assert ella.tasks == 1 and all(torch.equal(before[n], ella.past[n]) for n in before)


def test_one_strength_per_task_is_used_in_order_and_runs_out_with_an_error():
    ella, update = ELLA((0.0, 2.0, 6.0)), {"x": Update(torch.ones(1, 1))}
    seen = []
    for _ in range(3):
        seen.append(ella.penalty(update).item())
        ella.after_task(update)
    assert seen == [0, 2 * 1, 6 * 4]  # W_past is 1, then 2
    with pytest.raises(ValueError, match="3 values.*task 4"):
        ella.penalty(update)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), (1.0, -2.0), "3"])
def test_a_strength_that_is_not_a_finite_positive_number_is_refused(strength):
    with pytest.raises(ValueError, match="strength="):
        ELLA(strength)


def test_an_unknown_reduction_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        ELLA(reduction="means")
    with pytest.raises(ValueError, match="reduction"):
        overlap_energy({}, {}, "max")


def test_the_memory_survives_safetensors_and_goes_on_bit_for_bit():
    ella = ELLA(3.0, "sum")
    ella.after_task(random_updates(0))
    ella.after_task(random_updates(1))
    again = ELLA(3.0, "sum")
    again.load_state_dict(load(save(ella.state_dict())))
    assert again.tasks == 2
    for regularizer in (ella, again):
        regularizer.after_task(random_updates(2))
    assert all(torch.equal(ella.past[name], again.past[name]) for name in SHAPES)
    assert ella.penalty(random_updates(3)) == again.penalty(random_updates(3))


def test_the_state_of_another_regularizer_is_refused():
    with pytest.raises(ValueError, match="keeps no memory"):
        IncLoRA().load_state_dict({"tasks": torch.tensor(1)})
    for state in ({}, {"tasks": torch.tensor(1), "fisher.x": torch.ones(1)}):
        with pytest.raises(ValueError, match="needs 'tasks'"):
            ELLA().load_state_dict(state)
    IncLoRA().load_state_dict(IncLoRA().state_dict())


def test_settings_are_json_and_the_memory_is_not_among_them():
    ella = ELLA([0.0, 3e4])
    ella.after_task(random_updates(0))
    described = json.loads(json.dumps(ella.describe()))
    settings = {"strength": [0.0, 3e4], "reduction": "mean", "past_dtype": "float32"}
    assert described == {"name": "ELLA"} | settings
    assert ELLA(**{k: v for k, v in described.items() if k != "name"}).strength == (0.0, 3e4)
    assert IncLoRA().describe() == {"name": "IncLoRA"}


def test_two_regularizers_share_no_memory():
    first, second = ELLA(), ELLA()
    first.after_task(random_updates(0))
    assert second.past == {} and second.tasks == 0
    clone = copy.deepcopy(first)
    clone.after_task(random_updates(1))
    assert first.tasks == 1 and not torch.equal(first.past["a.q"], clone.past["a.q"])


def test_the_memory_moves_with_to_and_with_the_first_penalty():
    ella = ELLA(1.0)
    ella.after_task({"x": Update(torch.ones(2, 2))})
    assert ella.to("meta") is ella and ella.past["x"].device.type == "meta"
    ella = ELLA(1.0)
    ella.after_task({"x": Update(torch.ones(2, 2))})
    ella.penalty({"x": Update(torch.ones(2, 2, device="meta"))})
    assert ella.past["x"].device.type == "meta"
    assert IncLoRA().to("meta").penalty({}).item() == 0


def test_ella_prices_a_stock_peft_lora_and_the_price_reaches_both_factors():
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    layer = model.get_submodule("base_model.model.0")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ella = ELLA(7.0, "sum")
    ella.after_task({"0": Update(torch.ones(5, 6))})
    penalty = ella.penalty({"0": Update(layer.get_delta_weight("default"), A, B)})
    dense = 4.0 * B.detach().numpy().astype(np.float64) @ A.detach().numpy().astype(np.float64)
    np.testing.assert_allclose(penalty.item(), 7 * np.sum(dense**2), rtol=1e-5)
    penalty.backward()
    gradient = 2 * 7 * dense  # of the penalty in the update; chain rule below
    np.testing.assert_allclose(A.grad.numpy(), 4 * B.detach().numpy().T @ gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(B.grad.numpy(), 4 * gradient @ A.detach().numpy().T, rtol=1e-4, atol=1e-6)


def test_the_base_class_alone_is_a_regularizer_that_asks_for_nothing():
    regularizer, updates = Regularizer(), random_updates(0, grad=True)
    assert regularizer.after_task(updates) is None and regularizer.state_dict() == {}
    assert regularizer.penalty(updates).item() == 0 and regularizer.to("cpu") is regularizer
