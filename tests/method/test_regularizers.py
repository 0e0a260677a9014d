"""The penalties against float64 arithmetic written here, what they remember, and in real training."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from jumplora.data.backbones import load_backbone
from jumplora.learning.training import TrainConfig, attach_adapter, named_updates, penalty_function
from jumplora.method.regularizers import ELLA, IncLoRA, NLoRA, OLoRA, Regularizer, Update

SHAPES = {"a.q": (5, 3), "a.v": (2, 7), "b.q": (4, 4)}
STATEFUL = {
    "ELLA": lambda: ELLA(3.0, "sum"),
    "ELLA bfloat16": lambda: ELLA(3.0, past_dtype="bfloat16"),
    "O-LoRA": lambda: OLoRA(0.5, 0.1),
}
each_memory = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
each_penalty = pytest.mark.parametrize(
    "make", [*STATEFUL.values(), lambda: NLoRA(0.1)], ids=[*STATEFUL, "N-LoRA"]
)


def random_updates(seed, scale=1.0, grad=False, rank=2):
    "Factors, their product, and the gradients of all three."
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, (out, size) in SHAPES.items():
        A = torch.randn(rank, size, generator=generator).mul_(scale).requires_grad_(grad)
        B = torch.randn(out, rank, generator=generator).requires_grad_(grad)
        updates[name] = Update(B @ A, A, B)
        if grad:
            updates[name].delta.retain_grad()
    return updates


def double(tensor):
    return tensor.detach().numpy().astype(np.float64)


def after(regularizer, *seeds):
    "A regularizer that has remembered some tasks."
    for seed in seeds:
        regularizer.after_task(random_updates(seed))
    return regularizer


def same_state(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


# ---- the formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("strength", [1.0, 3e4])
# differences: 22
def test_ella_equals_its_formula_in_float64_after_several_tasks(reduction, strength):
    ella, past = ELLA(strength, reduction), dict.fromkeys(SHAPES, 0.0)
    for seed in range(3):
        done = random_updates(seed, scale=1e-2)
        ella.after_task(done)
        past = {name: past[name] + double(done[name].delta) for name in past}
    current = random_updates(9, scale=1e-2, grad=True)
    penalty, layers = ella.penalty(current), len(SHAPES) if reduction == "mean" else 1
    energy = sum(np.sum((double(u.delta) * past[name]) ** 2) for name, u in current.items()) / layers
    np.testing.assert_allclose(penalty.item(), strength * energy, rtol=1e-5)
    penalty.backward()
    for name, u in current.items():
        gradient = 2 * strength / layers * double(u.delta) * past[name] ** 2
        np.testing.assert_allclose(u.delta.grad.numpy(), gradient, rtol=1e-5, atol=1e-12)


# differences: 40
def test_o_lora_equals_its_formula_in_float64_after_several_tasks():
    olora, current = after(OLoRA(0.5, 0.1), 0, 1, 2), random_updates(9, grad=True)
    done, expected = [random_updates(seed) for seed in range(3)], 0.0
    past = {name: np.concatenate([double(task[name].A) for task in done]) for name in SHAPES}
    for name, u in current.items():
        A, B = double(u.A), double(u.B)
        expected += 0.5 * np.abs(past[name] @ A.T).sum() + 0.1 * (np.linalg.norm(A) + np.linalg.norm(B))
    penalty = olora.penalty(current)
    np.testing.assert_allclose(penalty.item(), expected, rtol=1e-5)
    penalty.backward()
    for name, u in current.items():
        A, B = double(u.A), double(u.B)
        gradient = 0.5 * np.sign(A @ past[name].T) @ past[name] + 0.1 * A / np.linalg.norm(A)
        np.testing.assert_allclose(u.A.grad.numpy(), gradient, rtol=1e-5)
        np.testing.assert_allclose(u.B.grad.numpy(), 0.1 * B / np.linalg.norm(B), rtol=1e-5)


# differences: 22
def test_the_authors_mean_of_scaled_factors_is_s4_over_l_times_the_papers_sum():
    s, bare, old = 4.0, random_updates(0), random_updates(1)
    paper = sum(np.sum((double(bare[n].delta) * double(old[n].delta)) ** 2) for n in SHAPES)
    ella = ELLA(1.0, "mean")
    ella.after_task({name: Update(s * u.delta) for name, u in old.items()})
    code = ella.penalty({name: Update(s * u.delta) for name, u in bare.items()}).item()
    np.testing.assert_allclose(code / paper, s**4 / len(SHAPES), rtol=1e-5)


def test_n_lora_is_the_sum_of_all_entries_of_the_dense_update():
    current = random_updates(0)
    expected = 0.25 * sum(np.abs(double(u.B) @ double(u.A)).sum() for u in current.values())
    np.testing.assert_allclose(NLoRA(0.25).penalty(current).item(), expected, rtol=1e-5)


def test_the_first_task_has_no_penalty_nor_have_strength_zero_and_no_layers():
    current = random_updates(0, grad=True)
    for strength in (0.0, 1.0, 1e12):
        for penalty in (make(strength).penalty(current) for make in (ELLA, OLoRA)):
            assert penalty.item() == 0 and penalty.shape == () and not penalty.requires_grad
    for make in (ELLA, OLoRA, NLoRA):
        assert after(make(0.0), 0).penalty(current).item() == make(1.0).penalty({}).item() == 0


def test_one_strength_per_task_is_used_in_order_and_runs_out_with_an_error():
    ella, update, seen = ELLA((0.0, 2.0, 6.0)), {"x": Update(torch.ones(1, 1))}, []
    for _ in range(3):
        seen.append(ella.penalty(update).item())
        ella.after_task(update)
    assert seen == [0, 2 * 1, 6 * 4]  # W_past is 1, then 2
    with pytest.raises(ValueError, match="3 values.*task 4"):
        ella.penalty(update)


def test_the_base_class_and_inclora_have_no_penalty_and_no_memory():
    for regularizer in (Regularizer(), IncLoRA()):
        after(regularizer, 0).before_task(SHAPES, "cpu")
        penalty = regularizer.penalty(random_updates(0, grad=True))
        assert penalty.item() == 0 and not penalty.requires_grad
        assert regularizer.state_dict() == {}
    assert Regularizer().penalty({"x": Update(None, torch.ones(2, 2, device="meta"))}).device.type == "meta"


# ---- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [ELLA, lambda: ELLA(past_dtype="bfloat16"), OLoRA, NLoRA])
def test_half_precision_updates_are_penalised_in_float32(make, dtype):
    value, regularizer = torch.tensor([[1e-3, 1.7e-3]], dtype=dtype), make()
    regularizer.after_task({"x": Update(value, value)})
    penalty = regularizer.penalty({"x": Update(value, value)})  # ELLA's squares are 1e-12: 0 in float16
    wide = regularizer.penalty({"x": Update(value.float(), value.float())})
    assert penalty.dtype == torch.float32 and penalty.item() > 0
    torch.testing.assert_close(penalty, wide, rtol=1e-6, atol=0)


def test_the_past_is_summed_in_float32_and_in_bfloat16_takes_half_within_its_rounding():
    ella, olora = ELLA(), OLoRA()
    for size in (1.0, 2.0**-12):
        value = torch.full((2, 2), size, dtype=torch.bfloat16)
        ella.after_task({"x": Update(value)})
        olora.after_task({"x": Update(None, value)})
    assert ella.past["x"].dtype == olora.rows["x"].dtype == torch.float32
    assert (ella.past["x"] == 1 + 2.0**-12).all()  # bfloat16 would have rounded this to 1
    exact, half = after(ELLA(1.0), *range(15)), after(ELLA(1.0, past_dtype="bfloat16"), *range(15))
    assert all(2 * half.past[n].nbytes == exact.past[n].nbytes for n in SHAPES)
    current = random_updates(99)
    assert abs(half.penalty(current) / exact.penalty(current) - 1) < 0.02


# ---- the memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_memory
def test_the_past_does_not_change_with_an_update_or_a_state_that_changes_in_place(make, dtype):
    regularizer, again = make(), make()
    value = torch.full((2, 2), 0.5, dtype=dtype, requires_grad=True)
    regularizer.after_task({"x": Update(value, value)})
    with torch.no_grad():
        value.add_(5)
    state = {key: tensor.clone() for key, tensor in regularizer.state_dict().items()}
    again.load_state_dict(state)
    for tensor in state.values():
        tensor.add_(5)
    for one in (regularizer, again):
        memory = getattr(one, one.memory[0])["x"]
        assert (memory == 0.5).all() and not memory.requires_grad


@each_memory
def test_the_memory_survives_safetensors_penalties_and_copies_and_continues_bit_for_bit(make):
    one, again, current = after(make(), 0, 1), make(), random_updates(9, grad=True)
    assert not make().state_dict().keys() - {"tasks"}
    stored = save(one.state_dict())
    again.load_state_dict(load(stored))
    penalty = one.penalty(current)
    assert getattr(again, "tasks", 2) == 2 and again.penalty(current) == penalty > 0
    penalty.backward()
    after(copy.deepcopy(one), 2)
    assert same_state(load(stored), one.state_dict())
    assert same_state(after(one, 2).state_dict(), after(again, 2).state_dict())
    assert again.penalty(current) == one.penalty(current)


def test_the_state_of_another_regularizer_is_refused():
    tasks, one = {"tasks": torch.tensor(1)}, torch.ones(1)
    for state in ({}, {"past.x": one}, tasks | {"fisher.x": one}, {"tasks": torch.ones(2)}):
        ella = after(ELLA(), 0)
        with pytest.raises(ValueError, match=r"not the memory of ELLA, \['past', 'tasks'\]"):
            ella.load_state_dict(state)
        assert ella.tasks == 1 and set(ella.past) == set(SHAPES)
    with pytest.raises(ValueError, match=r"not the memory of OLoRA, \['rows'\].*past.a"):
        OLoRA().load_state_dict({"past.a": torch.ones(2)})
    for without in (IncLoRA(), NLoRA()):
        with pytest.raises(ValueError, match="not the memory of .*tasks"):
            without.load_state_dict(tasks)
        without.load_state_dict(without.state_dict())


@each_memory
@pytest.mark.parametrize("names", [["module.a.q", "a.v", "b.q"], ["a.q", "a.v"], ["a.q", "a.v", "b.q", "c"]])
# differences: 25
def test_names_that_do_not_match_the_past_are_refused_and_listed(make, names):
    regularizer, one = after(make(), 0), torch.ones(5, 3)
    before, current = regularizer.state_dict(), {name: Update(one, one) for name in names}
    shapes = dict.fromkeys(names, (5, 3))
    calls = (lambda: regularizer.penalty(current), lambda: regularizer.after_task(current))
    for call in (*calls, lambda: regularizer.before_task(shapes, "cpu")):
        with pytest.raises(ValueError, match="different layers") as error:
            call()
        assert all(name in str(error.value) for name in set(names) ^ set(SHAPES))
    assert same_state(before, regularizer.state_dict())


@pytest.mark.parametrize("act", ["penalty", "after_task"])
def test_a_shape_that_does_not_match_the_past_is_refused(act):
    ella = ELLA(1.0)
    ella.after_task({"x": Update(torch.ones(2, 3))})
    for shape in ((3, 2), (1, 3)):  # the second would broadcast
        with pytest.raises(ValueError, match=rf"\({shape[0]}, {shape[1]}\).*\(2, 3\)"):
            getattr(ella, act)({"x": Update(torch.ones(shape))})


@pytest.mark.parametrize("tasks", [0, 1])
@each_memory
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_update_with_a_bad_entry_is_not_remembered_at_all(make, bad, tasks):
    regularizer, broken = after(make(), *range(tasks)), random_updates(1)
    before = {key: value.clone() for key, value in regularizer.state_dict().items()}
    broken["b.q"].delta[0, 0] = broken["b.q"].A[0, 0] = bad
    with pytest.raises(ValueError, match=r"'b.q' \(1 of 3 layers\) holds NaN or infinity"):
        regularizer.after_task(broken)
    assert same_state(before, regularizer.state_dict())


# differences: 24
def test_the_memory_moves_before_a_task_and_with_a_penalty():
    for make in STATEFUL.values():
        regularizer = after(make(), 0)
        regularizer.before_task(SHAPES, "meta")
        assert getattr(regularizer, regularizer.memory[0])["a.q"].device.type == "meta"
    ella = ELLA(1.0)
    ella.after_task({"x": Update(torch.ones(2, 2))})
    ella.penalty({"x": Update(torch.ones(2, 2, device="meta"))})
    assert ella.past["x"].device.type == "meta"


def test_a_regularizer_of_ones_own_is_saved_by_naming_its_memory():
    class Largest(Regularizer):
        memory = ("largest", "seen", "factors", "rare")

        def __init__(self):
            self.largest, self.seen, self.factors, self.rare = {}, 0, {}, {}

        def after_task(self, updates):
            self.largest = {name: update.delta.detach().abs().max() for name, update in updates.items()}
            self.factors = {f"{name}.A": update.delta.detach()[0] for name, update in updates.items()}
            self.seen += 1

    again = Largest()
    again.load_state_dict(load(save(after(Largest(), 0).state_dict())))
    assert again.seen == 1 and again.largest == after(Largest(), 0).largest
    assert again.factors.keys() == {f"{name}.A" for name in SHAPES} and again.rare == {}


# ---- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ELLA, OLoRA, lambda s: OLoRA(norm_strength=s), NLoRA])
@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), (1.0, -2.0), "3"])
def test_a_strength_that_is_not_a_finite_positive_number_is_refused(make, strength):
    with pytest.raises(ValueError, match="strength="):
        make(strength)


@pytest.mark.parametrize("ten", [np.int64(10), np.float32(10), torch.tensor(10.0)], ids=repr)
def test_the_strength_of_ella_may_be_a_number_of_numpy_or_torch(ten):
    ella = ELLA(ten)
    assert ella.strength == 10 and json.dumps(ella.describe()) == json.dumps(
        ELLA(type(ella.strength)(10)).describe()
    )


def test_unknown_choices_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        ELLA(reduction="means")
    with pytest.raises(ValueError, match="past_dtype='float16' is not known.*bfloat16"):
        ELLA(past_dtype="float16")


def test_settings_are_json_and_the_memory_is_not_among_them():
    described = json.loads(json.dumps(after(ELLA([0.0, 3e4]), 0).describe()))
    settings = {"strength": [0.0, 3e4], "reduction": "mean", "past_dtype": "float32"}
    assert described == {"name": "ELLA"} | settings and ELLA(**settings).strength == (0.0, 3e4)
    olora = after(OLoRA(0.5), 0)
    assert olora.describe() == {"name": "OLoRA", "strength": 0.5, "norm_strength": 0.0}
    assert IncLoRA().describe() == {"name": "IncLoRA"}


# ---- in training ------------------------------------------------------------------------------------------


def test_a_setting_that_no_record_would_tell_is_refused():
    class Price(Regularizer):
        def __init__(self, strength):
            self.strength, self._seen = strength, 0

    with pytest.raises(
        ValueError, match=r"Price.strength is no field of a dataclass.*@dataclass\(eq=False\)"
    ):
        Price(0.1).describe()


class Direction(Regularizer):
    "A penalty with a matrix product, which autocast would round."

    def layer_penalty(self, name, update):
        return (update.A @ torch.ones(update.A.shape[1], 1)).square().sum()


def adapted_after_a_task(kind, gated, make):
    "Model, regularizer that remembers its update, and the factors."
    torch.manual_seed(0)
    model, regularizer = attach_adapter(load_backbone(kind)[0], TrainConfig(rank=2), gated), make()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    regularizer.after_task(named_updates(model))
    factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    return model, regularizer, factors


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("make", [ELLA, OLoRA, NLoRA, Direction])
def test_autocast_changes_no_bit_of_a_penalty_and_its_gradient(gated, make):
    model, regularizer, factors = adapted_after_a_task("tiny-llama", gated, make)
    penalty = penalty_function(model, regularizer)
    values = [penalty()]
    whole = regularizer.penalty(named_updates(model))
    with torch.autocast("cpu", torch.bfloat16):
        values.append(penalty())
        assert make is Direction or regularizer.penalty(named_updates(model)) == whole
    assert values[0] == values[1] > 0
    found = [torch.autograd.grad(v, factors, allow_unused=True, materialize_grads=True) for v in values]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-t5"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@each_penalty
def test_layer_by_layer_the_gradients_are_those_of_the_whole(kind, gated, make):
    model, regularizer, factors = adapted_after_a_task(kind, gated, make)
    penalties = (regularizer.penalty(named_updates(model)), penalty_function(model, regularizer)())
    whole, apart = (
        torch.autograd.grad(penalty, factors, allow_unused=True, materialize_grads=True)
        for penalty in penalties
    )
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other)
    assert any(gradient.any() for gradient in whole)


def test_a_penalty_that_is_set_on_one_instance_is_charged():
    model, regularizer, _ = adapted_after_a_task("tiny-llama", False, IncLoRA)
    assert penalty_function(model, regularizer) is None
    regularizer.layer_penalty = lambda name, update: update.B.abs().sum()
    assert penalty_function(model, regularizer)() > 0
