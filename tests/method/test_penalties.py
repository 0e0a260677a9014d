"""O-LoRA and N-LoRA against float64 arithmetic written here, their memory, and both in real training."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from jumplora.data.backbones import load_backbone
from jumplora.learning.continual import learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter, named_updates, penalty_function
from jumplora.method.regularizers import NLoRA, OLoRA, Update

SHAPES = {"a.q": (5, 3), "a.v": (2, 7), "b.q": (4, 4)}


def random_updates(seed, rank=2, grad=False):
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, (out, size) in SHAPES.items():
        A = torch.randn(rank, size, generator=generator).requires_grad_(grad)
        B = torch.randn(out, rank, generator=generator).requires_grad_(grad)
        updates[name] = Update(B @ A, A, B)
    return updates


def double(tensor):
    return tensor.detach().numpy().astype(np.float64)


def test_o_lora_equals_its_formula_in_float64_after_several_tasks():
    olora = OLoRA(0.5, 0.1)
    past = {name: np.zeros((0, size)) for name, (_, size) in SHAPES.items()}
    for seed in range(3):
        done = random_updates(seed)
        olora.after_task(done)
        past = {name: np.concatenate([past[name], double(done[name].A)]) for name in past}
    current = random_updates(9, grad=True)
    expected = sum(
        0.5 * np.abs(past[n] @ double(u.A).T).sum()
        + 0.1 * (np.linalg.norm(double(u.A)) + np.linalg.norm(double(u.B)))
        for n, u in current.items()
    )
    penalty = olora.penalty(current)
    np.testing.assert_allclose(penalty.item(), expected, rtol=1e-5)
    penalty.backward()
    for name, update in current.items():
        A = double(update.A)
        gradient = 0.5 * np.sign(A @ past[name].T) @ past[name] + 0.1 * A / np.linalg.norm(A)
        np.testing.assert_allclose(update.A.grad.numpy(), gradient, rtol=1e-5)


def test_n_lora_is_the_sum_of_all_entries_of_the_dense_update():
    current = random_updates(0)
    expected = 0.25 * sum(np.abs(double(u.B) @ double(u.A)).sum() for u in current.values())
    np.testing.assert_allclose(NLoRA(0.25).penalty(current).item(), expected, rtol=1e-5)
    wrong = 0.25 * sum(np.abs(double(u.A) @ double(u.A).T).sum() for u in current.values())  # r × r
    assert abs(expected - wrong) > 1e-3 * expected


@pytest.mark.parametrize("regularizer", [OLoRA(0.5, 0.1), NLoRA(0.1)], ids=["O-LoRA", "N-LoRA"])
def test_the_price_of_all_layers_is_the_sum_of_their_prices(regularizer):
    regularizer.after_task(random_updates(0))
    current = random_updates(9)
    parts = [regularizer.layer_penalty(name, update) for name, update in current.items()]
    torch.testing.assert_close(sum(parts), regularizer.penalty(current))


def test_the_first_task_is_free_and_orthogonal_rows_stay_free():
    olora, A = OLoRA(1e9), torch.eye(4)
    assert olora.penalty({"layer": Update(A, A[:2], A[:, :2])}) == 0
    olora.after_task({"layer": Update(A, A[:2], A[:, :2])})
    assert olora.penalty({"layer": Update(A, A[2:], A[:, :2])}) == 0
    assert olora.penalty({"layer": Update(A, A[1:3], A[:, :2])}) == 1e9


def test_half_precision_factors_are_priced_in_float32():
    A, past = torch.full((1, 3), 1 / 3).bfloat16(), torch.full((1, 3), 1 / 3)
    assert shared_directions(A, past).dtype == torch.float32
    expected = (double(A.float()) * double(past)).sum()
    np.testing.assert_allclose(shared_directions(A, past).item(), expected, rtol=1e-6)


def test_the_memory_survives_safetensors_and_goes_on_bit_for_bit():
    olora, again = OLoRA(), OLoRA()
    olora.after_task(random_updates(0))
    again.load_state_dict(load(save(olora.state_dict())))
    for each in (olora, again):
        each.after_task(random_updates(1))
    current = random_updates(9)
    assert torch.equal(olora.penalty(current), again.penalty(current)) and olora.penalty(current) > 0
    assert all(rows.shape[0] == 4 for rows in again.past.values())


def test_a_remembered_factor_does_not_change_with_the_adapter():
    olora, done = OLoRA(), random_updates(0)
    olora.after_task(done)
    before = olora.past["a.q"].clone()
    with torch.no_grad():
        done["a.q"].A.zero_()
    assert torch.equal(olora.past["a.q"], before)


def test_other_layers_are_refused_in_price_and_memory():
    olora, current = OLoRA(), random_updates(0)
    olora.after_task(current)
    fewer = {name: current[name] for name in ("a.q", "a.v")}
    for act in (olora.penalty, olora.after_task):
        with pytest.raises(ValueError, match=r"different layers: \['b.q'\]"):
            act(fewer)
    with pytest.raises(ValueError, match="different layers"):
        olora.before_task({"a.q": (5, 3)}, "cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_with_a_bad_entry_is_not_remembered(bad):
    olora, done = OLoRA(), random_updates(0)
    done["a.v"].A[0, 0] = bad
    with pytest.raises(ValueError, match="'a.v' hold NaN or infinity"):
        olora.after_task(done)
    assert olora.past == {}


def test_the_state_of_another_regularizer_is_refused():
    with pytest.raises(ValueError, match="not the memory of O-LoRA.*past.a"):
        OLoRA().load_state_dict({"past.a": torch.ones(2)})


@pytest.mark.parametrize("make", [lambda s: OLoRA(s), lambda s: OLoRA(norm_strength=s), lambda s: NLoRA(s)])
@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_not_a_finite_positive_number_is_refused(make, strength):
    with pytest.raises(ValueError, match="strength="):
        make(strength)


def test_settings_are_json_and_the_memory_is_not_among_them():
    olora = OLoRA(0.5)
    olora.after_task(random_updates(0))
    described = json.loads(json.dumps(olora.describe()))
    assert described == {"name": "OLoRA", "strength": 0.5, "norm_strength": 0.0}


def test_the_leak_of_random_entries_is_the_share_of_directions_that_were_read():
    torch.manual_seed(0)
    leaks = [leak(torch.randn(64, 64), torch.randn(16, 64)) for _ in range(20)]
    assert abs(np.mean(leaks) - 16 / 64) < 0.01


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-t5"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("regularizer", [OLoRA(0.5, 0.1), NLoRA(0.1)], ids=["O-LoRA", "N-LoRA"])
def test_layer_by_layer_the_gradients_are_those_of_the_whole(kind, gated, regularizer):
    torch.manual_seed(0)
    model = attach_adapter(load_backbone(kind)[0], TrainConfig(rank=2), gated)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    regularizer.past = {}
    regularizer.after_task(named_updates(model))
    factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    whole = torch.autograd.grad(regularizer.penalty(named_updates(model)), factors, allow_unused=True)
    apart = torch.autograd.grad(penalty_function(model, regularizer)(), factors, allow_unused=True)
    for one, other, factor in zip(whole, apart, factors, strict=True):
        other = torch.zeros_like(factor) if other is None else other
        torch.testing.assert_close(other, torch.zeros_like(factor) if one is None else one)


@pytest.mark.parametrize("name", ["O-LoRA", "O-LoRA + JumpLoRA", "N-LoRA"])
def test_a_run_learns_resumes_and_remembers(name, tmp_path):
    rows = [(f"one {word} and {n} more", word) for n in range(8) for word in ("cat", "dog")]
    tasks = [Task(f"task {i}", "Which?\n", ("cat", "dog"), rows, [], rows[:4]) for i in range(2)]
    config = TrainConfig(batch_size=4, max_length=200)
    runs = []
    for _ in range(2):  # the second finds the record of the first
        sequence = TaskSequence("pair", tasks)
        model, tokenizer = load_backbone("tiny-llama")
        asked = (model, tokenizer, sequence, METHODS[name], config)
        runs.append(learn_sequence(*asked, out=tmp_path, zero_shot=False, progress=False))
    assert runs[0].complete and np.array_equal(runs[0].accuracy, runs[1].accuracy, equal_nan=True)
    assert runs[0].extra["penalty"]["task 1"][-1] > 0
    assert (runs[0].mean_sparsity > 0) == ("JumpLoRA" in name)
