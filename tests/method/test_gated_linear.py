"The gated layer, naive and fused, against arithmetic written again in numpy float64."

import math

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from jumplora.method.gated_linear import (
    _sum_is_safe,
    dense_product,
    gated_linear,
    gated_update,
    naive_gated_linear,
    naive_gated_update,
)

both_layers = pytest.mark.parametrize("layer", [naive_gated_linear, gated_linear])
OUT, IN, RANK, SCALING, EPSILON = 6, 7, 3, 2.5, 0.2
# largest error over largest entry: reference in float64, inputs exactly those of the layer
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens=(5,), dtype=torch.float32, factors=torch.float32, tau=0.15, weight=True, bias=True):
    "Leaves that all require a gradient, by name."
    made = {
        "x": random(*tokens, IN, seed=1, dtype=dtype),
        "weight": random(OUT, IN, seed=2, dtype=dtype) if weight else None,
        "A": random(RANK, IN, seed=3, dtype=factors) * 0.4,
        "B": random(OUT, RANK, seed=4, dtype=factors) * 0.4,
        "threshold": torch.tensor([tau]),
        "bias": random(OUT, seed=5, dtype=dtype) if bias else None,
    }
    return {name: value if value is None else value.requires_grad_() for name, value in made.items()}


def run(layer, given, gamma, **settings):
    "The value and every gradient, by name."
    settings = {"scaling": SCALING, "bandwidth": EPSILON} | settings
    y = layer(**given, interpolation=gamma, **settings)
    y.backward(random(*y.shape, seed=6, dtype=y.dtype))
    return {"y": y.detach()} | {name: value.grad for name, value in given.items() if value is not None}


def reference(given, gamma, reduction="mean", bandwidth=EPSILON):
    "The same in numpy float64, from the equations of the paper."
    n = {k: None if v is None else v.detach().double().numpy() for k, v in given.items()}
    x, A, B, tau = n["x"], n["A"], n["B"], n["threshold"]
    dense = B @ A
    kept = (np.abs(dense) > tau).astype(float)
    update = SCALING * (gamma * dense * kept + (1 - gamma) * dense)
    whole = update if n["weight"] is None else n["weight"] + update
    y = x @ whole.T + (0 if n["bias"] is None else n["bias"])
    g = random(*y.shape, seed=6, dtype=given["x"].dtype).double().numpy()
    G = np.einsum("no,ni->oi", g.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
    through = SCALING * G * ((1 - gamma) + gamma * kept)
    window = (np.abs(dense - tau) < bandwidth / 2) * 1.0 - (np.abs(-dense - tau) < bandwidth / 2) * 1.0
    total = (window * SCALING * gamma * G).sum() / (dense.size if reduction == "mean" else 1)
    found = {"y": y, "x": g @ whole, "A": B.T @ through, "B": through @ A.T}
    found["threshold"] = -tau / bandwidth * total
    if n["weight"] is not None:
        found["weight"] = G
    if n["bias"] is not None:
        found["bias"] = g.reshape(-1, y.shape[-1]).sum(0)
    return found


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        got = found[name].double().numpy()
        assert got.shape == np.shape(value), name
        largest = np.abs(value).max() if np.size(value) else 0.0
        np.testing.assert_allclose(got, value, rtol=0, atol=tolerance * largest + 1e-30, err_msg=name)


@pytest.fixture(params=["processor", "accelerator"])
def path(request, monkeypatch):
    "The two forms of the gate; a processor can run both."
    if request.param == "accelerator":
        monkeypatch.setattr("jumplora.method.gated_linear.on_accelerator", lambda tensor: True)
    return request.param


# ---------------------------------------------------------------- the equations


def by_update(x, weight, A, B, threshold, interpolation, *, bias, **settings):
    "The layer from the update alone."
    update = gated_update(A, B, threshold, interpolation, **settings)
    assert update.dtype == torch.promote_types(A.dtype, torch.float32)
    y = F.linear(x, update.to(x.dtype), bias)
    return y if weight is None else y + F.linear(x, weight)


@pytest.mark.parametrize("layer", [naive_gated_linear, gated_linear, by_update])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [0.0, 0.03, 0.15, 50.0])
# differences: 5
def test_value_and_gradients_are_the_papers_for_every_dtype_and_shape(path, layer, dtype, gamma, tau):
    wide = torch.promote_types(dtype, torch.float32)  # factors in half precision, too
    forms = (True, True, "mean", wide), (True, False, "sum", dtype), (False, True, "sum", wide)
    for tokens in ((), (1,), (0,), (5,), (2, 3), (0, 3)):
        for weight, bias, reduction, factors in (*forms, (False, False, "mean", dtype)):
            given = inputs(tokens, dtype, factors, tau, weight, bias)
            found = run(layer, given, torch.tensor([gamma]), reduction=reduction)
            assert found["y"].dtype == dtype and found["y"].shape == (*tokens, OUT)
            assert_close(found, reference(given, float(np.float32(gamma)), reduction), TOLERANCE[dtype])


def test_the_sweep_above_has_kept_zeroed_and_window_entries():
    given = inputs()
    sizes = dense_product(given["A"], given["B"]).abs()
    assert reference(given, 0.3)["threshold"] != 0
    assert 5 <= (sizes > 0.15).sum() <= 37
    assert ((sizes - 0.15).abs() < EPSILON / 2).sum() >= 4
    assert (sizes < EPSILON / 2 - 0.03).sum() >= 4  # in both windows at tau = 0.03


@both_layers
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("bandwidth", [0.25, 0.5])  # 0.5: entries lie exactly on the edges of the windows
def test_an_entry_at_the_threshold_is_zeroed_and_one_on_a_windows_edge_is_outside(
    path, layer, gamma, bandwidth
):
    given = inputs(tau=0.25)
    for name in "AB":  # exact in binary
        given[name] = given[name].detach().mul(4).round().div(4).requires_grad_()
    sizes = dense_product(given["A"], given["B"]).abs()
    assert (sizes == 0.25).any() and (sizes == 0.5).any() and (sizes == 0.0).any()
    found = run(layer, given, gamma, bandwidth=bandwidth)
    assert_close(found, reference(given, gamma, bandwidth=bandwidth), 1e-5)


# ---------------------------------------------------------------- identities


@both_layers
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_fresh_adapter_changes_nothing_and_never_learns_if_it_starts_gated(layer, gamma):
    given = inputs((4,)) | {"B": torch.zeros(OUT, RANK, requires_grad=True)}
    found = run(layer, given, gamma)
    assert torch.equal(found["y"], F.linear(given["x"], given["weight"], given["bias"]))
    assert not found["A"].any() and not found["threshold"].any()
    assert found["B"].any() == (gamma < 1)


# differences: 37
def test_the_layer_at_gamma_one_equals_the_merged_weight_bit_for_bit():
    given = inputs((5,))
    update = gated_update(given["A"], given["B"], given["threshold"], 1.0, SCALING)
    merged = F.linear(given["x"], given["weight"] + update, given["bias"])
    assert torch.equal(gated_linear(**given, interpolation=1.0, scaling=SCALING), merged)
    assert (update == 0).any() and (update != 0).any()


@both_layers
def test_gamma_and_the_threshold_may_be_floats_and_gamma_is_a_constant(layer):
    gamma = torch.tensor([0.5], requires_grad=True)
    expected = run(layer, inputs(), gamma)
    assert gamma.grad is None
    fixed = inputs()
    y = layer(**fixed | {"threshold": 0.15}, interpolation=0.5, scaling=SCALING)
    y.backward(random(5, OUT, seed=6))
    found = {"y": y} | {name: value.grad for name, value in fixed.items() if name != "threshold"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_strided_inputs_and_expanded_gradients_work_and_inputs_are_left_as_they_were():
    dense, strided = inputs((4, 5)), inputs((4, 5))
    x = random(5, 4, IN, seed=8).transpose(0, 1)
    for given, entries in ((dense, x.contiguous()), (strided, x)):
        given["x"] = entries.detach().requires_grad_()
        given["A"] = random(IN, RANK, seed=9).T.detach().requires_grad_()
        before = {name: value.detach().clone() for name, value in given.items()}
        gated_linear(**given, interpolation=0.5, bandwidth=EPSILON).sum().backward()
        assert all(torch.equal(given[name], before[name]) for name in before)
    assert not strided["x"].is_contiguous() and not strided["A"].is_contiguous()
    for name in dense:
        torch.testing.assert_close(dense[name].grad, strided[name].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("asked", ["x", "weight", "bias", "A", "B", "threshold"])
def test_only_gradients_that_are_needed_appear_and_each_is_right_alone(path, asked):
    given = inputs((5,))
    expected = reference(given, 0.5)[asked]
    for name, value in given.items():
        value.requires_grad_(name == asked)
    found = run(gated_linear, given, 0.5)
    assert all((value is None) == (name != asked) for name, value in found.items() if name != "y")
    np.testing.assert_allclose(found[asked].numpy(), expected, rtol=1e-4, atol=1e-5)
    factors = {name: inputs()[name].requires_grad_(name != asked) for name in ("A", "B", "threshold")}
    gated_update(**factors, interpolation=0.5, bandwidth=EPSILON).pow(2).sum().backward()
    assert all((value.grad is None) == (name == asked) for name, value in factors.items())


# ---------------------------------------------------------------- rounding, products and memory


@both_layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# differences: 26
def test_half_precision_does_not_round_the_update_away(layer, dtype):
    "Near 1 neighbouring numbers are 8e-3 (bf16) and 1e-3 (fp16) apart; the update is 1e-4 and 3e-4."
    weight, B = torch.ones(8, 8, dtype=dtype), torch.full((8, 1), 1e-2)
    A = torch.tensor([[3e-2] + [1e-2] * 7])
    x = torch.tensor([[1, -1] + [0] * 6], dtype=dtype)  # the weight's part cancels, the update's does not
    np.testing.assert_allclose(layer(x, weight, A, B, 0.0, 0.0).float().numpy(), 2e-4, rtol=1e-2)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("precision", ["highest", "high"])  # "high" may round fp32 inputs to TF32 or bf16
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# differences: 35
def test_only_fp64_and_unrounded_fp32_take_one_product_and_frozen_inputs_none(dtype, precision):
    wide = torch.promote_types(dtype, torch.float32)
    given, one, dense = inputs((50,), dtype, wide), 2 * 50 * OUT * IN, 2 * OUT * RANK * IN
    given["x"].requires_grad_(False), given["weight"].requires_grad_(False)
    safe = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        naive = flops(lambda: naive_gated_linear(**given, interpolation=0.5))
        fused = flops(lambda: gated_linear(**given, interpolation=0.5))
        y = gated_linear(**given, interpolation=0.5)
        backward = flops(lambda: y.backward(torch.ones_like(y)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert fused == (1 if safe else 2) * one + dense and naive == 2 * one + dense
    assert backward == one + 3 * dense  # G, then ΔW, ∂A, ∂B


def test_each_device_is_asked_for_its_own_rounding_of_fp32():
    assert _sum_is_safe(torch.float32, "cpu") and _sum_is_safe(torch.float32, "cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert _sum_is_safe(torch.float32, "cpu") and not _sum_is_safe(torch.float32, "cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_stored_for_backward_but_the_arguments(dtype):
    def stored_by(layer, **given):
        stored = {}
        with saved_tensors_hooks(lambda t: stored.setdefault(t.data_ptr(), t), lambda tensor: tensor):
            layer(**given, interpolation=0.5)
        return {pointer: tuple(t.shape) for pointer, t in stored.items() if t.numel() > 1}

    given = inputs((50,), dtype)
    factors = {name: given[name] for name in ("A", "B", "threshold")}
    names = {given[name].data_ptr(): name for name in ("x", "weight", "A", "B")}
    assert stored_by(gated_linear, **given).keys() == names.keys()
    assert {names[pointer] for pointer in stored_by(gated_update, **factors)} == {"A", "B"}
    naive = stored_by(naive_gated_linear, **given)
    assert sum(sorted(shape) == sorted((OUT, IN)) for shape in naive.values()) == 3  # W, ΔW, ΔW_eff


# ---------------------------------------------------------------- autocast, checkpointing, compile


@both_layers
def test_autocast_rounds_the_products_and_not_the_update(layer):
    given = inputs((6,))
    factors = {name: given[name] for name in ("A", "B", "threshold")}
    with torch.autocast("cpu", torch.bfloat16):
        update = gated_update(**factors, interpolation=0.5, scaling=SCALING)
        y = layer(**given, interpolation=0.5, scaling=SCALING, bandwidth=EPSILON)
    assert update.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert torch.equal(update, gated_update(**factors, interpolation=0.5, scaling=SCALING))
    y.backward(random(*y.shape, seed=6, dtype=torch.bfloat16))
    assert all(value.grad.dtype == torch.float32 for value in given.values())
    expected = {name: value for name, value in reference(given, 0.5).items() if name != "y"}
    assert_close({name: given[name].grad for name in expected}, expected, 3e-2)


def test_autocast_leaves_double_precision_alone_and_does_not_round_the_factors_gradients():
    plain = run(gated_linear, inputs((6,), torch.bfloat16), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped = run(gated_linear, inputs((6,), torch.bfloat16), 0.5)
        double = gated_linear(**inputs((6,), torch.float64, torch.float64), interpolation=0.5)
    assert all(torch.equal(plain[name], wrapped[name]) for name in ("A", "B"))
    assert double.dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    def checkpointed(x, weight, A, B, threshold, bias, **settings):
        def inner(*tensors):
            return gated_linear(*tensors[:5], bias=tensors[5], **settings)

        return checkpoint(inner, x, weight, A, B, threshold, bias, use_reentrant=reentrant)

    plain, again = (run(layer, inputs((2, 5)), 0.5) for layer in (gated_linear, checkpointed))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def under_autocast(**given):
    with torch.autocast("cpu", torch.bfloat16):
        return gated_linear(**given)


@pytest.mark.parametrize("layer", [naive_gated_linear, gated_linear, under_autocast])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_compiles_once_in_one_piece_and_follows_gamma_and_the_threshold(layer, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for count, (gamma, tau) in enumerate(((0.0, 0.15), (0.4, 0.15), (1.0, 0.1))):
        with torch._dynamo.config.patch(error_on_recompile=count > 0):
            found = run(compiled, inputs((2, 5), dtype, tau=tau), torch.tensor([gamma]))
        expected = run(layer, inputs((2, 5), dtype, tau=tau), torch.tensor([gamma]))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- bad input


@both_layers
def test_second_derivatives_are_refused(layer):
    given = inputs()
    loss = layer(**given, interpolation=0.5).pow(2).sum()
    first = torch.autograd.grad(loss, given["A"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("function", [naive_gated_linear, gated_linear, naive_gated_update, gated_update])
def test_settings_that_no_gate_can_use_and_factors_that_would_broadcast_are_refused(function):
    given = inputs() | {"interpolation": 0.5}
    if function in (naive_gated_update, gated_update):
        given = {name: given[name] for name in ("A", "B", "threshold", "interpolation")}
    cases = {"reduction": ("avg", "reduction"), "bandwidth": (0.0, "bandwidth")}
    cases |= {name: (torch.ones(2), "one number") for name in ("threshold", "interpolation")}
    if function is gated_linear:
        cases["B"] = given["B"][:1], r"weight is \(6, 7\) and B @ A is \(1, 7\)"
    for name, (bad, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            function(**given | {name: bad})


@both_layers
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_nan_in_a_factor_reaches_the_output(path, layer, gamma):
    given = inputs((5,)) | {"A": torch.full((RANK, IN), math.nan)}
    assert layer(**given, interpolation=gamma).isnan().all()
