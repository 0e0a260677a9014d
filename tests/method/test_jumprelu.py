"The gate and its threshold, against arithmetic written again in numpy float64."

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from jumplora.method.jumprelu import Gate, threshold_gradient, two_sided_jumprelu

SHAPES = [(), (1,), (7,), (5, 6), (2, 3, 4), (64, 33), (0,), (0, 4)]
both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def numpy64(tensor):
    return tensor.detach().to(torch.float64).numpy()


def reference(x, tau, g, epsilon, reduction="mean"):
    "Value, gradient in x and gradient in tau."
    kept = np.abs(x) > tau
    signed = (np.abs(x - tau) < epsilon / 2) * 1.0 - (np.abs(-x - tau) < epsilon / 2)
    total = (signed * g).sum()
    if reduction == "mean":
        total = total / x.size if x.size else 0.0
    return np.where(kept, x, 0.0), np.where(kept, g, 0.0), -(tau / epsilon) * total


def smoothed(x, tau, epsilon):
    "The integral of t / epsilon over t > tau and |x - t| < epsilon / 2."
    upper, lower = x + epsilon / 2, np.maximum(tau, x - epsilon / 2)
    return np.where(upper > lower, (upper**2 - lower**2) / (2 * epsilon), 0.0)


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(x, tau, g, *settings, gate=two_sided_jumprelu):
    "Output, gradient in x and gradient in tau."
    x, tau = x.detach().requires_grad_(), torch.tensor([tau], requires_grad=True)
    y = gate(x, tau, *settings)
    y.backward(g)
    return y.detach(), x.grad, tau.grad


@both_reductions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.0, 0.0712, 0.7133, 50.0])  # at 0.0712 the two windows overlap
# differences: 5
def test_value_and_gradients_are_the_papers_for_every_dtype_and_shape(dtype, reduction, tau):
    for seed, shape in enumerate(SHAPES):
        x, g = random(shape, seed, dtype), random(shape, 100 + seed, dtype)
        y, grad_x, grad_tau = run(x, tau, g, 0.4, reduction)
        tau64 = float(torch.tensor(tau))
        value, wanted_x, wanted_tau = reference(numpy64(x), tau64, numpy64(g), 0.4, reduction)
        assert y.dtype == dtype and y.shape == x.shape and grad_tau.dtype == torch.float32
        np.testing.assert_array_equal(numpy64(y), value)
        np.testing.assert_array_equal(numpy64(grad_x), wanted_x)
        np.testing.assert_allclose(numpy64(grad_tau), [wanted_tau], rtol=1e-5, atol=1e-7)
        if 0 < tau < 1 and x.numel() > 1000:  # the sweep has entries inside and outside the windows
            assert 0.1 < (np.abs(np.abs(numpy64(x)) - tau) < 0.2).mean() < 0.5


@both_reductions
@pytest.mark.parametrize("tau", [0.02, 0.1, 0.19, 0.21, 0.6, 1.5])
def test_threshold_gradient_is_the_slope_of_the_smoothed_gate(tau, reduction):
    x, g = np.random.default_rng(0).standard_normal((2, 5000))

    def loss(t):
        value = smoothed(x, t, 0.4) - smoothed(-x, t, 0.4)
        return (value * g).mean() if reduction == "mean" else (value * g).sum()

    threshold = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    two_sided_jumprelu(torch.from_numpy(x), threshold, 0.4, reduction).backward(torch.from_numpy(g))
    quotient = (loss(tau + 1e-6) - loss(tau - 1e-6)) / 2e-6
    np.testing.assert_allclose(threshold.grad.item(), quotient, rtol=1e-5)
    for entry in (-0.9, 0.1, 0.45, 0.6, 0.71, 0.95):  # smoothed is the average of the gate over the window
        t = entry + (np.arange(100_000) + 0.5) / 100_000 * 0.4 - 0.2
        average = np.where(t > tau, t, 0.0).mean()
        np.testing.assert_allclose(smoothed(np.array(entry), tau, 0.4), average, atol=1e-5)


# differences: 6
def test_an_entry_at_the_edge_of_a_window_does_not_count_and_the_default_window_is_the_papers():
    for x in (0.25, 0.75, -0.25, -0.75):  # τ ± ε/2, exact in binary
        assert threshold_gradient(torch.tensor([x]), torch.tensor([0.5]), torch.ones(1), 0.5) == 0
    inside, outside = torch.tensor([[0.0091 + 4e-4], [0.0091 + 6e-4]])
    assert run(inside, 0.0091, torch.ones(1))[2].item() == pytest.approx(-9.1)
    assert run(outside, 0.0091, torch.ones(1))[2].item() == 0


def test_the_gradient_of_many_entries_is_accurate_and_summed_in_fp32():
    x, g, tau = random((1024, 1024), 1) * 1e-3, random((1024, 1024), 2) * 1e-8, torch.tensor([2.1e-3])
    *_, expected = reference(numpy64(x), numpy64(tau)[0], numpy64(g), 1e-3)
    np.testing.assert_allclose(threshold_gradient(x, tau, g).item(), expected, rtol=1e-5)
    half = torch.full((5000,), 0.5, dtype=torch.bfloat16)
    total = threshold_gradient(half, torch.tensor([0.5]), torch.ones_like(half), 0.4, "sum")
    assert total.dtype == torch.float32 and total.item() == pytest.approx(-0.5 / 0.4 * 5000, rel=1e-6)


def test_an_entry_at_the_threshold_is_zeroed_a_nan_passes_and_bf16_is_compared_in_fp32():
    x = torch.tensor([0.25, -0.25, 0.2500001, -0.2500001])
    gate = two_sided_jumprelu
    assert (gate(x, 0.25) != 0).tolist() == [False, False, True, True]
    assert torch.equal(gate(x, 0.0), x)
    y = gate(torch.tensor([math.nan, math.inf, 0.1]), 0.5)
    assert y[0].isnan() and y[1].isinf() and y[2] == 0
    entry = torch.tensor([0.0091], dtype=torch.bfloat16)
    for wrap in (float, torch.tensor):
        assert gate(entry, wrap(entry.item() * 0.999)) != 0 and gate(entry, wrap(entry.item() * 1.001)) == 0


def test_strided_and_expanded_tensors_work_and_the_gate_compiles_in_one_piece():
    x, g = random((6, 8), 16).t()[::2], torch.ones(1).expand(4, 6)
    expected = run(x.contiguous(), 0.5, g.contiguous(), 0.4)
    torch.testing.assert_close(run(x, 0.5, g, 0.4), expected)
    compiled = torch.compile(two_sided_jumprelu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, 0.5, g, 0.4, gate=compiled), expected)
    assert expected[2].item() != 0


def test_float_and_tensor_thresholds_agree_and_a_scalar_tensor_learns():
    x, scalar = random((5, 5), 8), torch.tensor(0.5, requires_grad=True)
    y = two_sided_jumprelu(x, scalar, 0.4)
    y.sum().backward()
    for threshold in (0.5, torch.tensor([0.5])):
        assert torch.equal(two_sided_jumprelu(x, threshold), y)
    assert scalar.grad.shape == () and scalar.grad != 0


def test_second_derivatives_and_settings_that_no_gate_can_use_are_refused():
    x, tau = torch.randn(4, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    first = torch.autograd.grad(two_sided_jumprelu(x, tau).pow(2).sum(), tau, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.backward()
    for given in (0, -1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="bandwidth=.*finite number above 0"):
            two_sided_jumprelu(x, 0.5, bandwidth=given)
    with pytest.raises(ValueError, match="'meen' is not known; use 'mean' or 'sum'.*did you mean 'mean'"):
        two_sided_jumprelu(x, 0.5, reduction="meen")
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\)"):
        two_sided_jumprelu(x, torch.ones(2))


# ---------------------------------------------------------------- Gate


@pytest.mark.parametrize("form", ["log", "raw"])
@pytest.mark.parametrize("moved", [0.0, 0.25])
# differences: 2
def test_theta_receives_the_chain_rule(form, moved):
    gate = Gate(0.7, parametrization=form)
    gate.theta.data.fill_(moved)
    tau = 0.7 * math.exp(moved) if form == "log" else 0.7 + moved
    assert gate.threshold.shape == (1,) and gate.threshold.item() == pytest.approx(tau, rel=1e-6)
    x, g = random((30, 30), 10), random((30, 30), 11)
    two_sided_jumprelu(x, gate.threshold, 0.4).backward(g)
    *_, grad_tau = reference(numpy64(x), tau, numpy64(g), 0.4)
    assert gate.theta.grad.item() == pytest.approx(grad_tau * (tau if form == "log" else 1), rel=1e-5)


# differences: 5
def test_a_shared_threshold_receives_the_sum_of_the_means():
    shared, layers = Gate(0.5), [random((6, 6), 12), random((30, 10), 13)]
    sum(two_sided_jumprelu(x, shared.threshold, 0.4).sum() for x in layers).backward()

    def mean(*xs):
        flat = np.concatenate([numpy64(x).ravel() for x in xs])
        return 0.5 * reference(flat, 0.5, np.ones_like(flat), 0.4)[2]

    assert shared.theta.grad.item() == pytest.approx(sum(map(mean, layers)), rel=1e-5)
    assert abs(shared.theta.grad.item() - mean(*layers)) > 1e-3


def test_a_new_gate_is_dense_trains_theta_alone_and_starts_at_the_papers_placeholder():
    gate = Gate()
    assert gate.threshold.item() == pytest.approx(math.exp(-4.7), rel=1e-6)
    assert gate.interpolation.item() == 0 and [name for name, _ in gate.named_parameters()] == ["theta"]


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.bfloat16().float(), torch.float32),
        (lambda m: m.to(device="cpu", dtype=torch.float16), torch.float16),
    ],
)
# differences: 7
def test_the_gate_keeps_its_bits_when_the_model_changes_dtype(convert, dtype):
    gate = Gate(0.0123456)
    gate.theta.data.fill_(0.123456789)
    gate.interpolation.fill_(1 / 3)
    theta, before = gate.theta, copy.deepcopy(gate.state_dict())
    model = convert(nn.ModuleList([nn.Linear(3, 3), gate]))
    assert model[0].weight.dtype == dtype
    assert gate.theta is theta and theta.requires_grad  # an optimizer still holds the right tensor
    for name, tensor in gate.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])


def test_the_gate_is_fp32_on_another_device_and_where_the_default_dtype_is_not():
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate = Gate(0.0123456)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in gate.state_dict().values()} == {torch.float32}
    assert gate.threshold.item() == pytest.approx(0.0123456, rel=1e-6)
    model = nn.ModuleList([nn.Linear(3, 3), gate]).to("meta", dtype=torch.bfloat16)
    for tensor in model[1].state_dict().values():
        assert tensor.device.type == "meta" and tensor.dtype == torch.float32


# differences: 2
def test_setting_a_threshold_is_exact_and_forgets_what_was_learned():
    gate = Gate()
    for value in [*random((50,), 14).abs(), torch.zeros(())]:
        gate.theta.data.fill_(0.5)
        gate.set_threshold(value)
        assert torch.equal(gate.threshold.detach(), value.reshape(1)) and gate.theta.item() == 0


@pytest.mark.parametrize("given", [-0.1, math.nan, math.inf])
def test_a_setting_of_the_gate_out_of_range_is_refused_and_nothing_changes(given):
    gate = Gate(0.5)
    gate.theta.data.fill_(0.1)
    before = gate.threshold.item()
    with pytest.raises(ValueError, match="threshold=.*finite number, 0 or above"):
        gate.set_threshold(given)
    assert gate.threshold.item() == before
    with pytest.raises(ValueError, match="threshold="):
        Gate(given)
    with pytest.raises(ValueError, match="parametrization='logs'.*did you mean 'log'"):
        Gate(parametrization="logs")


def test_the_gate_survives_its_state_dict_and_a_copy():
    gate, loaded = Gate(0.0123456), Gate()
    gate.theta.data.fill_(0.3)
    gate.interpolation.fill_(0.7)
    gate._last_read = (gate.interpolation, 2, True)  # as a GPU leaves it
    loaded.load_state_dict(gate.state_dict())
    assert set(gate.state_dict()) == {"start", "theta", "interpolation"}
    for other in (loaded, copy.deepcopy(gate)):
        assert torch.equal(other.threshold, gate.threshold)
        assert torch.equal(other.interpolation, gate.interpolation) and other._last_read[0] is None


# differences: 6
def test_adam_moves_the_threshold_by_little():
    gate = Gate()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(350):
        gate.theta.grad = torch.full((1,), -1e-2)
        optimizer.step()
    assert (gate.threshold / gate.start).item() == pytest.approx(math.exp(0.35), rel=1e-3)
