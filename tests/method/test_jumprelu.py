"The gate and its threshold, against arithmetic written again in numpy float64."

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from jumplora.method.jumprelu import (
    Gate,
    jumprelu,
    threshold_gradient,
    two_sided_jumprelu,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (5, 6), (2, 3, 4), (64, 33), (0,), (0, 4)]
GATES = [jumprelu, two_sided_jumprelu]


def numpy64(tensor):
    return tensor.detach().to(torch.float64).numpy()


def reference(gate, x, tau, g, epsilon, reduction):
    "Value, gradient in x and gradient in tau."
    near_right = np.abs(x - tau) < epsilon / 2
    near_left = np.abs(-x - tau) < epsilon / 2
    two_sided = gate is two_sided_jumprelu
    kept = (np.abs(x) > tau) if two_sided else (x > tau)
    signed = near_right.astype(float) - (near_left.astype(float) if two_sided else 0.0)
    total = (signed * g).sum()
    if reduction == "mean":
        total = total / x.size if x.size else 0.0
    return np.where(kept, x, 0.0), np.where(kept, g, 0.0), -(tau / epsilon) * total


def smoothed(x, tau, epsilon):
    "The integral of t / epsilon over t > tau and |x - t| < epsilon / 2."
    upper, lower = x + epsilon / 2, np.maximum(tau, x - epsilon / 2)
    return np.where(upper > lower, (upper**2 - lower**2) / (2 * epsilon), 0.0)


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.0, 0.0712, 0.7133, 50.0])
def test_value_and_gradients_are_the_papers_for_every_dtype_and_shape(gate, dtype, reduction, tau):
    for seed, shape in enumerate(SHAPES):
        x = random(shape, dtype, seed).requires_grad_()
        g = random(shape, dtype, 100 + seed)
        threshold = torch.tensor([tau], requires_grad=True)
        y = gate(x, threshold, bandwidth=0.4, reduction=reduction)
        y.backward(g)
        value, grad_x, grad_tau = reference(
            gate, numpy64(x), numpy64(threshold)[0], numpy64(g), 0.4, reduction
        )
        assert y.dtype == dtype and y.shape == x.shape and threshold.grad.dtype == torch.float32
        np.testing.assert_array_equal(numpy64(y), value)
        np.testing.assert_array_equal(numpy64(x.grad), grad_x)
        np.testing.assert_allclose(numpy64(threshold.grad), [grad_tau], rtol=1e-5, atol=1e-7)


def test_the_sweep_above_has_entries_inside_and_outside_the_window():
    x = numpy64(random((64, 33), torch.float32, SHAPES.index((64, 33))))
    for tau in (0.0712, 0.7133):
        share = (np.abs(np.abs(x) - tau) < 0.2).mean()
        assert 0.1 < share < 0.5


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tau", [0.02, 0.1, 0.19, 0.21, 0.6, 1.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_threshold_gradient_is_the_slope_of_the_smoothed_gate(gate, tau, reduction):
    x, g = np.random.default_rng(0).standard_normal((2, 5000))
    epsilon, step = 0.4, 1e-6

    def loss(t):
        value = smoothed(x, t, epsilon)
        if gate is two_sided_jumprelu:
            value = value - smoothed(-x, t, epsilon)
        return (value * g).mean() if reduction == "mean" else (value * g).sum()

    quotient = (loss(tau + step) - loss(tau - step)) / (2 * step)
    threshold = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    gate(torch.from_numpy(x), threshold, epsilon, reduction).backward(torch.from_numpy(g))
    np.testing.assert_allclose(threshold.grad.item(), quotient, rtol=1e-5)


def test_smoothed_gate_is_the_average_of_the_gate_over_the_window():
    tau, epsilon = 0.6, 0.4
    for x in (-0.9, 0.1, 0.45, 0.6, 0.71, 0.95):
        t = x + (np.arange(100_000) + 0.5) / 100_000 * epsilon - epsilon / 2
        average = np.where(t > tau, t, 0.0).mean()
        np.testing.assert_allclose(smoothed(np.array(x), tau, epsilon), average, atol=1e-5)


def test_two_by_two_example_by_hand():
    x = torch.tensor([[0.5, -0.2], [0.9, -0.7]], requires_grad=True)
    tau = torch.tensor([0.6], requires_grad=True)
    y = two_sided_jumprelu(x, tau, bandwidth=0.4)
    y.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert y.tolist() == [[0, 0], [pytest.approx(0.9), pytest.approx(-0.7)]]
    assert x.grad.tolist() == [[0, 0], [3, 4]]
    assert tau.grad.item() == pytest.approx(1.125)  # -(0.6 / 0.4) * (1 - 4) / 4


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.19])
def test_windows_cancel_where_they_overlap(tau):
    inside_both = torch.linspace(-(0.2 - tau) + 1e-4, 0.2 - tau - 1e-4, 50)
    gradient = threshold_gradient(inside_both, torch.tensor([tau]), torch.ones(50), 0.4, "sum")
    assert gradient.item() == 0
    single = torch.tensor([0.2 - tau + 1e-3, -(0.2 - tau + 1e-3)])
    one = threshold_gradient(single[:1], torch.tensor([tau]), torch.ones(1), 0.4, "sum")
    other = threshold_gradient(single[1:], torch.tensor([tau]), torch.ones(1), 0.4, "sum")
    assert one.item() == pytest.approx(-tau / 0.4) and other.item() == pytest.approx(tau / 0.4)


def test_default_bandwidth_is_the_papers():
    x = torch.tensor([0.0091 + 4e-4, 0.0091 + 6e-4])
    gradients = [threshold_gradient(x[i : i + 1], torch.tensor([0.0091]), torch.ones(1)) for i in (0, 1)]
    assert gradients[0].item() == pytest.approx(-9.1) and gradients[1].item() == 0


def test_mean_of_a_million_entries_is_accurate_in_fp32():
    x, g = random((1024, 1024), torch.float32, 1) * 1e-3, random((1024, 1024), torch.float32, 2) * 1e-8
    tau = torch.tensor([2.1e-3])
    *_, expected = reference(two_sided_jumprelu, numpy64(x), numpy64(tau)[0], numpy64(g), 1e-3, "mean")
    np.testing.assert_allclose(threshold_gradient(x, tau, g).item(), expected, rtol=1e-5)


def test_half_precision_gradients_are_summed_in_fp32():
    x, g = torch.full((5000,), 0.5, dtype=torch.bfloat16), torch.ones(5000, dtype=torch.bfloat16)
    total = threshold_gradient(x, torch.tensor([0.5]), g, 0.4, "sum")
    assert total.dtype == torch.float32 and total.item() == pytest.approx(-0.5 / 0.4 * 5000, rel=1e-6)


def test_two_sided_gate_is_one_sided_gate_of_x_minus_that_of_minus_x():
    values = []
    for build in (
        lambda x, t: two_sided_jumprelu(x, t, 0.4),
        lambda x, t: jumprelu(x, t, 0.4) - jumprelu(-x, t, 0.4),
    ):
        x, tau = random((40, 50), torch.float32, 3).requires_grad_(), torch.tensor([0.13], requires_grad=True)
        y = build(x, tau)
        y.backward(random((40, 50), torch.float32, 4))
        values.append((y.detach(), x.grad, tau.grad))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_zero_threshold_is_the_identity():
    x = random((9, 9), torch.float32, 5)
    assert torch.equal(two_sided_jumprelu(x, 0.0), x)


def test_an_entry_at_the_threshold_is_dropped():
    x = torch.tensor([0.25, -0.25, 0.2500001, -0.2500001])
    assert (two_sided_jumprelu(x, 0.25) != 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("gate", GATES)
def test_nan_and_infinity_are_not_swallowed(gate):
    y = gate(torch.tensor([math.nan, math.inf, 0.1]), 0.5)
    assert y[0].isnan() and y[1].isinf() and y[2] == 0


@pytest.mark.parametrize("gate", GATES)
def test_a_threshold_above_every_entry_gives_zeros_and_no_gradient(gate):
    x, tau = random((6, 6), torch.float32, 6).requires_grad_(), torch.tensor([1e3], requires_grad=True)
    y = gate(x, tau)
    y.sum().backward()
    assert not y.any() and not x.grad.any() and tau.grad.item() == 0


@pytest.mark.parametrize("gate", GATES)
def test_strided_and_expanded_tensors_work(gate):
    x = random((6, 8), torch.float32, 16)
    strided, dense = x.t()[::2], x.t()[::2].contiguous()
    results = []
    for entries in (strided, dense):
        entries, tau = entries.detach().requires_grad_(), torch.tensor([0.5], requires_grad=True)
        gate(entries, tau, 0.4).sum().backward()  # sum sends back an expanded gradient
        results.append((entries.grad, tau.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])
    assert results[0][1].item() != 0


def test_float_and_tensor_thresholds_agree_and_a_scalar_tensor_learns():
    x = random((5, 5), torch.float32, 8)
    scalar = torch.tensor(0.5, requires_grad=True)
    y = two_sided_jumprelu(x, scalar, 0.4)
    y.sum().backward()
    assert torch.equal(two_sided_jumprelu(x, 0.5), y) and torch.equal(
        two_sided_jumprelu(x, torch.tensor([0.5])), y
    )
    assert scalar.grad.shape == () and scalar.grad != 0


@pytest.mark.parametrize("gate", GATES)
def test_bf16_entries_are_compared_in_fp32(gate):
    entry = torch.tensor([0.0091], dtype=torch.bfloat16)
    assert gate(entry, entry.item() * 0.999) != 0 and gate(entry, entry.item() * 1.001) == 0


@pytest.mark.parametrize("gate", GATES)
def test_second_derivatives_are_refused(gate):
    x, tau = torch.randn(4, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    first = torch.autograd.grad(gate(x, tau).pow(2).sum(), tau, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.backward()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("given", [0, -1e-3, math.nan, math.inf])
def test_a_bandwidth_that_is_not_a_positive_number_is_refused(gate, given):
    with pytest.raises(ValueError, match="bandwidth=.*finite number above 0"):
        gate(torch.ones(2), 0.5, bandwidth=given)


@pytest.mark.parametrize("gate", GATES)
def test_an_unknown_reduction_is_refused_with_the_choices(gate):
    with pytest.raises(
        ValueError, match="reduction='meen' is not known; use 'mean' or 'sum'.*did you mean 'mean'"
    ):
        gate(torch.ones(2), 0.5, reduction="meen")


def test_several_thresholds_are_refused():
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\)"):
        two_sided_jumprelu(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("gate", GATES)
def test_gate_compiles_in_one_piece(gate):
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    results = []
    for function in (gate, compiled):
        x, tau = random((8, 8), torch.float32, 9).requires_grad_(), torch.tensor([0.5], requires_grad=True)
        y = function(x, tau, 0.4)
        y.sum().backward()
        results.append((y.detach(), x.grad, tau.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- Threshold


@pytest.mark.parametrize(("form", "factor"), [("log", 0.7), ("raw", 1.0)])
@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_theta_receives_the_chain_rule(form, factor, moved):
    gate = Gate(0.7, parametrization=form)
    with torch.no_grad():
        gate.theta.fill_(moved)
    tau = 0.7 * math.exp(moved) if form == "log" else 0.7 + moved
    assert gate.threshold.item() == pytest.approx(tau, rel=1e-6)
    x, g = random((30, 30), torch.float32, 10), random((30, 30), torch.float32, 11)
    two_sided_jumprelu(x, gate.threshold, 0.4).backward(g)
    *_, grad_tau = reference(two_sided_jumprelu, numpy64(x), tau, numpy64(g), 0.4, "mean")
    expected = grad_tau * (tau if form == "log" else 1.0)
    assert gate.theta.grad.item() == pytest.approx(expected, rel=1e-5)


def test_a_shared_threshold_receives_the_sum_of_the_means():
    shared, layers = Gate(0.5), [random((6, 6), torch.float32, 12), random((30, 10), torch.float32, 13)]
    sum(two_sided_jumprelu(x, shared.threshold, 0.4).sum() for x in layers).backward()
    means = [reference(two_sided_jumprelu, numpy64(x), 0.5, np.ones(x.shape), 0.4, "mean")[2] for x in layers]
    assert shared.theta.grad.item() == pytest.approx(0.5 * sum(means), rel=1e-5)


def test_default_start_is_the_papers_placeholder():
    assert Gate().threshold.item() == pytest.approx(math.exp(-4.7), rel=1e-6)
    assert Gate().threshold.shape == (1,)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(3, 3), Gate(0.0123456)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to(device="cpu", dtype=torch.float16),
    ],
)
def test_threshold_keeps_its_bits_when_the_model_changes_dtype(convert):
    model = Model()
    model.gate.theta.data.fill_(0.123456789)
    theta, before = model.gate.theta, model.gate.threshold.item()
    convert(model)
    assert model.gate.theta is theta and theta.requires_grad  # an optimizer still holds the right tensor
    assert model.gate.theta.dtype == model.gate.start.dtype == torch.float32
    assert model.gate.threshold.item() == before


def test_other_parameters_of_the_model_are_converted():
    assert Model().bfloat16().linear.weight.dtype == torch.bfloat16


def test_threshold_follows_its_model_to_another_device():
    model = Model().to("meta", dtype=torch.bfloat16)
    assert model.gate.theta.device.type == model.gate.start.device.type == "meta"
    assert model.gate.theta.dtype == torch.float32


def test_threshold_is_fp32_where_the_default_dtype_is_not():
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate = Gate(0.0123456)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gate.threshold.dtype == torch.float32
    assert gate.threshold.item() == pytest.approx(0.0123456, rel=1e-6)


def test_set_is_exact_and_forgets_what_was_learned():
    gate = Gate()
    gate.theta.data.fill_(0.5)
    values = random((1000,), torch.float32, 14).abs()
    for value in values[:50]:
        gate.set_threshold(value)
        assert torch.equal(gate.threshold.detach(), value.reshape(1)) and gate.theta.item() == 0


def test_zero_is_allowed_and_keeps_everything():
    gate = Gate()
    gate.set_threshold(0.0)
    x = random((4, 4), torch.float32, 15)
    assert torch.equal(two_sided_jumprelu(x, gate.threshold), x)


@pytest.mark.parametrize("given", [-0.1, math.nan, math.inf])
def test_a_threshold_that_no_gate_can_use_is_refused_and_nothing_changes(given):
    gate = Gate(0.5)
    with pytest.raises(ValueError, match="threshold=.*finite number, 0 or above"):
        gate.set_threshold(given)
    assert gate.threshold.item() == 0.5
    with pytest.raises(ValueError, match="threshold="):
        Gate(given)


def test_an_unknown_parametrization_is_refused():
    with pytest.raises(ValueError, match="parametrization='logs'.*did you mean 'log'"):
        Gate(parametrization="logs")


def test_threshold_survives_its_state_dict_and_a_copy():
    gate = Gate(0.0123456)
    gate.theta.data.fill_(0.3)
    loaded = Gate()
    loaded.load_state_dict(gate.state_dict())
    assert set(gate.state_dict()) == {"start", "theta", "interpolation"}
    for other in (loaded, copy.deepcopy(gate)):
        assert torch.equal(other.threshold, gate.threshold)


def test_only_theta_is_trained():
    assert [name for name, _ in Gate().named_parameters()] == ["theta"]


def test_adam_moves_the_threshold_by_little():
    gate = Gate()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(350):
        gate.theta.grad = torch.full((1,), -1e-2)
        optimizer.step()
    assert (gate.threshold / gate.start).item() == pytest.approx(math.exp(0.35), rel=1e-3)
