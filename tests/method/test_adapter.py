"""The tuner against stock PEFT, against numpy, and on every pitfall that was measured in PEFT."""

import copy
import json
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from jumplora.learning.training import named_updates
from jumplora.method.adapter import (
    JumpLoraConfig,
    JumpLoraLinear,
    JumpLoraModel,
    adapter_layers,
    delta_weights,
    dense_update,
    gate_groups,
)
from jumplora.method.regularizers import ELLA

IDS = torch.arange(3, 19).view(2, 8)
SCOPES = {"model": 1, "block": 2, "layer": 4}  # gates of a Llama of two blocks with two targets each


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(config).to(dtype).eval()


def t5(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).to(dtype).eval()


MODELS = {"llama": llama, "t5": t5}


def randomize(model, name="default", seed=1, scale=0.3):
    "Factors that are not zero, so that there is an update to speak of."
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            weight = factor[name].weight
            weight.data.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def close_gate(model, threshold=0.1, gamma=1.0, name="default"):
    for group in gate_groups(model, name).values():
        group.gate.set_threshold(threshold)
        group.gate.interpolation.fill_(gamma)
    return model


def adapted(base="llama", dtype=torch.float32, threshold=0.1, gamma=1.0, **settings):
    settings = dict(r=2, lora_alpha=6) | settings
    model = get_peft_model(MODELS[base](dtype), JumpLoraConfig(**settings))
    return close_gate(randomize(model), threshold, gamma)


def logits(model, **kwargs):
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = IDS
    return model(input_ids=IDS, **kwargs).logits


def bits(tensor):
    "The bytes of a tensor: tells 0 from -0."
    return tensor.detach().contiguous().view(torch.uint8).clone()


def weights_bits(model):
    return {name: bits(layer.get_base_layer().weight) for name, layer in adapter_layers(model).items()}


def assert_same(measured, expected, tolerance=1e-6):
    "Equal up to a share of the largest entry."
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def n_gates(model, name="default"):
    return len({id(layer.lora_gate[name]) for layer in adapter_layers(model).values()})


def a_layer(model, ending="q_proj"):
    return next(layer for name, layer in adapter_layers(model).items() if name.endswith(ending))


# ---- what it computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", MODELS)
def test_a_fresh_adapter_changes_no_bit_of_the_output(base):
    plain = MODELS[base]()
    with torch.no_grad():
        expected = logits(plain)
        model = get_peft_model(plain, JumpLoraConfig(r=2))
        assert torch.equal(logits(model), expected)
        randomize(model)
        assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize(("gamma", "threshold"), [(0.0, 0.1), (1.0, 0.0)], ids=["gamma 0", "tau 0"])
def test_zero_gamma_or_zero_threshold_gives_pefts_lora_and_its_gradients(base, gamma, threshold):
    ours = adapted(base, gamma=gamma, threshold=threshold)
    stock = randomize(get_peft_model(MODELS[base](), LoraConfig(r=2, lora_alpha=6)))
    theirs = adapter_layers(stock)
    assert theirs.keys() == adapter_layers(ours).keys()
    x = torch.randn(4, 16)
    for name, layer in adapter_layers(ours).items():
        assert_same(layer(x), theirs[name](x))
    tolerance = {"llama": 1e-6, "t5": 1e-5}[base]  # T5 does not scale its queries: rounding grows on the way
    outputs = [logits(model) for model in (ours, stock)]
    assert_same(*outputs, tolerance)
    for output in outputs:
        output.float().log_softmax(-1)[..., 3].mean().backward()
    for name, layer in adapter_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            mine = getattr(layer, factor)["default"].weight.grad
            reference = getattr(theirs[name], factor)["default"].weight.grad
            assert reference.abs().max() > 0
            assert_same(mine, reference, tolerance)


def numpy_layer(x, W, A, B, tau, gamma, scaling, epsilon, grad, reduction):
    "The layer of the paper and its three gradients, in float64."
    delta = B @ A
    mask = (np.abs(delta) > tau).astype(np.float64)
    update = scaling * (gamma * delta * mask + (1 - gamma) * delta)
    G = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (out, in)
    grad_delta = scaling * G * (gamma * mask + (1 - gamma))
    window = (np.abs(delta - tau) < epsilon / 2).astype(float) - (np.abs(-delta - tau) < epsilon / 2)
    reduce = np.mean if reduction == "mean" else np.sum
    grad_tau = -(tau / epsilon) * reduce(window * scaling * gamma * G)
    return x @ (W + update).T, update, B.T @ grad_delta, grad_delta @ A.T, grad_tau


def double(tensor):
    return tensor.detach().double().numpy()


def relative(measured, expected):
    return np.linalg.norm(double(measured) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["fused path", "PEFT's path"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("threshold", [0.1, 0.01], ids=["apart", "overlapping windows"])
def test_forward_gradients_and_merge_are_the_papers(threshold, reduction, dropout):
    settings = dict(bandwidth=0.05, threshold_reduction=reduction, lora_dropout=dropout)
    model = adapted(threshold=threshold, gamma=0.6, threshold_scope="layer", **settings)
    layer = a_layer(model)  # its output dropout is active only in training; 1e-12 never drops here
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 5, 16, generator=generator)
    out = layer(x)
    grad = torch.randn(out.shape, generator=generator)
    out.backward(grad)
    A, B, gate = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_gate["default"]
    W = layer.get_base_layer().weight
    tau = float(double(gate.threshold)[0])
    arguments = (tau, float(gate.interpolation), 3.0, 0.05, double(grad), reduction)
    y, update, grad_A, grad_B, grad_tau = numpy_layer(*map(double, (x, W, A, B)), *arguments)
    margins = np.abs(np.abs(np.abs(double(B) @ double(A)) - tau)[..., None] - [0, 0.025])
    assert margins.min() > 1e-6  # no entry on an edge, where fp32 and fp64 could disagree
    assert grad_tau != 0
    assert relative(out, y) < 1e-5
    assert relative(layer.get_delta_weight("default"), update) < 1e-5
    assert relative(A.grad, grad_A) < 1e-5
    assert relative(B.grad, grad_B) < 1e-5
    assert relative(gate.theta.grad, np.array([tau * grad_tau])) < 1e-5
    before = double(W)
    layer.merge()
    assert relative(W, before + update) < 1e-6
    assert relative(W - torch.tensor(before), update) < 1e-5


@pytest.mark.parametrize("base", MODELS)
def test_a_shared_threshold_receives_the_sum_of_its_layers_gradients(base):
    together = adapted(base, bandwidth=0.1)
    apart = adapted(base, bandwidth=0.1, threshold_scope="layer")
    for model in (together, apart):
        logits(model).square().mean().backward()
    gates = [group.gate for group in gate_groups(apart).values()]
    assert len(gates) == len(adapter_layers(apart)) > 1
    total = sum(double(gate.theta.grad) for gate in gates)
    (shared,) = gate_groups(together).values()
    assert relative(shared.gate.theta.grad, total) < 1e-4


def test_the_threshold_stays_in_the_graph_while_gamma_is_zero():
    model = adapted(gamma=0.0)
    logits(model).sum().backward()
    (group,) = gate_groups(model).values()
    assert torch.equal(group.gate.theta.grad, torch.zeros(1))


def test_lora_dropout_falls_on_the_updates_input_alone():
    layer = a_layer(adapted(lora_dropout=0.5))
    x = torch.randn(4, 16)
    with torch.no_grad():
        base, update = layer.get_base_layer()(x), layer.get_delta_weight("default")
        still = layer.eval()(x)
        layer.train()
        torch.manual_seed(3)
        dropped = layer(x)
        torch.manual_seed(3)
        expected = base + nn.functional.dropout(x, 0.5) @ update.T
    torch.testing.assert_close(still, base + x @ update.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(dropped, still, atol=1e-2)


@pytest.mark.parametrize("base", MODELS)
def test_a_bf16_model_stays_close_to_fp32(base):
    exact, rough = adapted(base), adapted(base, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, measured = logits(exact), logits(rough)
    assert measured.dtype == torch.bfloat16
    assert (measured.float() - expected).norm() / expected.norm() < 0.03
    measured = logits(rough)
    measured.float().square().mean().backward()
    logits(exact).square().mean().backward()
    for name, layer in adapter_layers(rough).items():
        reference = adapter_layers(exact)[name].lora_B["default"].weight.grad
        grad = layer.lora_B["default"].weight.grad
        assert (grad - reference).norm() / reference.norm() < 0.1


def test_autocast_runs_both_ways():
    model = adapted()
    with torch.no_grad():
        expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = logits(model)
    measured.float().square().mean().backward()
    assert (measured.float() - expected).norm() / expected.norm() < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- which layers, which gates ----------------------------------------------------------------------------


def test_default_targets_are_query_and_value_of_each_architecture():
    names = list(adapter_layers(adapted("llama")))
    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    assert names == layers
    names = {name.rsplit(".", 1)[-1] for name in adapter_layers(adapted("t5"))}
    assert names == {"q", "v"}
    assert len(adapter_layers(adapted("t5"))) == 2 * (2 + 2 * 2)  # encoder; decoder with cross-attention


def test_blocks_of_both_architectures_are_told_apart():
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert list(gate_groups(adapted("llama", threshold_scope="block"))) == blocks
    blocks = [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)]
    assert list(gate_groups(adapted("t5", threshold_scope="block"))) == blocks
    found = JumpLoraModel.BLOCK.match
    assert found("transformer.h.11.attn.c_attn")[0] == "transformer.h.11"
    assert found("a.layers.1.b.blocks.2.q")[0] == "a.layers.1"
    assert found("lm_head") is None


@pytest.mark.parametrize("scope", SCOPES)
def test_a_group_holds_its_layers_and_only_they_follow_its_gate(scope):
    model = adapted(threshold_scope=scope)
    groups = gate_groups(model)
    assert len(groups) == SCOPES[scope] == n_gates(model)
    assert [name for group in groups.values() for name in group.layers] == list(adapter_layers(model))
    before = delta_weights(model)
    first = next(iter(groups.values()))
    first.gate.set_threshold(1e9)  # nothing passes
    for name, delta in delta_weights(model).items():
        assert (not delta.any()) if name in first.layers else torch.equal(delta, before[name])


def test_dense_update_is_neither_gated_nor_scaled():
    layer = a_layer(adapted(threshold=1e9))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert relative(dense_update(layer), double(B) @ double(A)) < 1e-6
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize("config", [JumpLoraConfig, LoraConfig], ids=["gated", "plain"])
def test_delta_weights_is_what_merging_adds_and_has_gradients(config):
    model = randomize(get_peft_model(llama(), config(r=2)))
    if config is JumpLoraConfig:
        close_gate(model, 0.1, 0.5)
    deltas = delta_weights(model)
    before = {n: layer.get_base_layer().weight.clone() for n, layer in adapter_layers(model).items()}
    sum(d.square().sum() for d in deltas.values()).backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in adapter_layers(model).values())
    model.merge_adapter()
    for name, layer in adapter_layers(model).items():
        merged = layer.get_base_layer().weight
        torch.testing.assert_close(merged, before[name] + deltas[name].detach(), rtol=1e-6, atol=1e-7)


def test_a_penalty_may_leave_the_threshold_alone():
    model = adapted(bandwidth=0.1, gamma=0.5)
    (gate,) = (group.gate for group in gate_groups(model).values())
    sum(d.square().sum() for d in delta_weights(model).values()).backward()
    assert gate.theta.grad.item() != 0
    model.zero_grad()
    sum(d.square().sum() for d in delta_weights(model, detach_threshold=True).values()).backward()
    assert gate.theta.grad is None


def test_wrapped_models_keep_their_layers_names():
    model = adapted()
    names = list(adapter_layers(model))

    class Wrapper(nn.Module):
        def __init__(self, inner, name):
            super().__init__()
            self.add_module(name, inner)

    for prefixes in (["module"], ["_orig_mod"], ["module", "_orig_mod"], ["_fsdp_wrapped_module", "module"]):
        wrapped = model
        for prefix in prefixes:
            wrapped = Wrapper(wrapped, prefix)
        assert list(adapter_layers(wrapped)) == names
        assert list(delta_weights(wrapped)) == names
        assert list(next(iter(gate_groups(wrapped).values())).layers) == names
    assert list(adapter_layers(model.get_base_model())) == names  # adapted in place, not wrapped at all
    block = model.get_base_model().model.layers
    block[0] = Wrapper(block[0], "_orig_mod")  # one block compiled by itself
    assert list(adapter_layers(model)) == names


# ---- saving and loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True], ids=["normal", "low_cpu_mem_usage"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_reloaded_adapter_keeps_gate_and_sharing(tmp_path, scope, low_memory):
    model = adapted(threshold_scope=scope)
    for i, group in enumerate(gate_groups(model).values()):
        group.gate.set_threshold(0.1 + 0.05 * i)
        group.gate.theta.data.fill_(0.25)
        group.gate.interpolation.fill_(0.5 + 0.1 * i)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert n_gates(again) == SCOPES[scope]
    for group, saved in zip(gate_groups(again).values(), gate_groups(model).values(), strict=True):
        assert (group.name, list(group.layers)) == (saved.name, list(saved.layers))
        for name, value in saved.gate.state_dict().items():
            assert torch.equal(group.gate.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("low_memory", [False, True], ids=["normal", "low_cpu_mem_usage"])
def test_an_adapter_may_be_loaded_under_another_name(tmp_path, low_memory):
    model = adapted(threshold=0.25, gamma=0.5)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = logits(model)
        for name in ("other", "threshold", "lora_gate"):
            again = PeftModel.from_pretrained(llama(), tmp_path, name, low_cpu_mem_usage=low_memory)
            (group,) = gate_groups(again, name).values()
            assert (group.gate.threshold.item(), group.gate.interpolation.item()) == (0.25, 0.5)
            assert torch.equal(logits(again.eval()), expected)


def test_an_adapter_saved_under_another_name_can_become_the_default(tmp_path):
    model = get_peft_model(llama(), JumpLoraConfig(r=2), adapter_name="red")
    close_gate(randomize(model, "red"), 0.25, 0.5, "red")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "red")
    (gate,) = (group.gate for group in gate_groups(again).values())
    assert (gate.threshold.item(), gate.interpolation.item()) == (0.25, 0.5)


def test_an_adapter_may_be_loaded_beside_another(tmp_path):
    adapted(threshold=0.25, gamma=0.5).save_pretrained(tmp_path)
    model = adapted(threshold=0.1, gamma=1.0)
    result = model.load_adapter(tmp_path, "second")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "second" in key]
    gates = [next(iter(gate_groups(model, name).values())).gate for name in ("default", "second")]
    assert [gate.interpolation.item() for gate in gates] == [1.0, 0.5]
    assert [round(gate.threshold.item(), 6) for gate in gates] == [0.1, 0.25]


def test_the_adapter_file_holds_factors_and_gate_and_nothing_of_the_past(tmp_path):
    model, regularizer = adapted(), ELLA()
    regularizer.after_task(named_updates(model))
    assert regularizer.past
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.split("_proj.")[1] for key in tensors}
    gate = {f"lora_gate.{part}" for part in ("start", "theta", "interpolation")}
    assert kinds == {"lora_A.weight", "lora_B.weight"} | gate
    for key, tensor in tensors.items():
        assert tensor.numel() < 16 * 16, key  # no dense update, no weight
        if "lora_gate" in key:
            assert (tensor.shape, tensor.dtype) == ((1,), torch.float32), key
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "JUMPLORA"


def test_the_configuration_survives_the_file(tmp_path):
    settings = dict(threshold_scope="block", threshold_parametrization="raw", bandwidth=0.02)
    model = adapted(**settings, threshold_reduction="sum", initial_threshold=0.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    config = again.peft_config["default"]
    assert isinstance(config, JumpLoraConfig)
    for name, value in (settings | dict(threshold_reduction="sum", initial_threshold=0.5)).items():
        assert getattr(config, name) == value
    assert a_layer(again).gate_options["default"] == dict(bandwidth=0.02, reduction="sum")
    assert a_layer(again).lora_gate["default"].parametrization == "raw"


def test_stock_peft_refuses_the_adapter_instead_of_running_it_ungated(tmp_path):
    adapted().save_pretrained(tmp_path)
    code = f"""
        import sys, torch
        from peft import PeftModel
        class Base(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj = torch.nn.Linear(16, 16)
        assert not any(name.startswith("jumplora") for name in sys.modules)
        try:
            PeftModel.from_pretrained(Base(), {str(tmp_path)!r})
        except (KeyError, ValueError) as error:
            print("refused", type(error).__name__, error)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused") and "JUMPLORA" in done.stdout, done.stdout


def test_a_copied_model_keeps_its_sharing_and_leaves_the_original_alone():
    model = adapted(threshold_scope="block")
    twin = copy.deepcopy(model)
    assert n_gates(twin) == 2
    close_gate(twin, 9.0, 0.0)
    assert all(group.gate.interpolation == 1 for group in gate_groups(model).values())


# ---- dtypes -----------------------------------------------------------------------------------------------


def gate_dtypes(model):
    gate = a_layer(model).lora_gate["default"]
    return {tensor.dtype for tensor in gate.state_dict().values()} | {gate.threshold.dtype}


@pytest.mark.parametrize("cast", [True, False], ids=["fp32 factors", "bf16 factors"])
def test_the_gate_is_float32_in_a_bf16_model(tmp_path, cast):
    config = JumpLoraConfig(r=2, initial_threshold=0.1234567)
    model = get_peft_model(llama(torch.bfloat16), config, autocast_adapter_dtype=cast)
    assert a_layer(model).lora_A["default"].weight.dtype == (torch.float32 if cast else torch.bfloat16)
    assert gate_dtypes(model) == {torch.float32}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path, autocast_adapter_dtype=cast)
    assert gate_dtypes(again) == {torch.float32}
    exact = torch.tensor(0.1234567)
    assert a_layer(again).lora_gate["default"].threshold.item() == exact.item() != exact.bfloat16().item()
    assert logits(randomize(again)).isfinite().all()


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: a_layer(model)._move_adapter_to_device_of_base_layer("default"),
        lambda model: a_layer(model.bfloat16())._move_adapter_to_device_of_base_layer("default"),
    ],
    ids=["to", "half", "PEFT moves it", "PEFT moves it in a bf16 model"],
)
def test_moving_a_model_rounds_neither_threshold_nor_gamma(move):
    model = adapted(threshold=0.1234567, gamma=1 / 3)
    gate = a_layer(model).lora_gate["default"]
    before = {name: bits(tensor) for name, tensor in gate.state_dict().items()}
    move(model)
    assert a_layer(model).lora_gate["default"] is gate
    assert n_gates(model) == 1
    assert gate_dtypes(model) == {torch.float32}
    for name, tensor in gate.state_dict().items():
        assert torch.equal(bits(tensor), before[name]), name


def test_every_gate_tensor_has_shape_1():
    for scope in SCOPES:
        for group in gate_groups(adapted(threshold_scope=scope)).values():
            assert {tuple(t.shape) for t in group.gate.state_dict().values()} == {(1,)}
            assert group.gate.threshold.shape == (1,)


# ---- merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", MODELS)
def test_merge_then_unmerge_gives_every_bit_back(base, dtype, safe):
    model = adapted(base, dtype)
    before, deltas = weights_bits(model), delta_weights(model)
    plain = {n: layer.get_base_layer().weight.float().clone() for n, layer in adapter_layers(model).items()}
    with torch.no_grad():
        expected = logits(model)
        model.merge_adapter(safe_merge=safe)
        merged = logits(model)
    rough = dtype == torch.bfloat16
    assert (merged - expected).float().norm() / expected.float().norm() < (0.03 if rough else 1e-5)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, (plain[name] + deltas[name]).to(dtype)), name
    assert any(not torch.equal(before[name], now) for name, now in weights_bits(model).items())
    model.unmerge_adapter()
    for name, now in weights_bits(model).items():
        assert torch.equal(now, before[name]), name


def test_merge_then_unmerge_keeps_the_sign_of_a_zero_weight():
    model = adapted()
    layer = a_layer(model)
    weight = layer.get_base_layer().weight
    weight.data[:, ::2] = -0.0
    before = bits(weight)
    assert (layer.get_delta_weight("default")[:, ::2] == 0).any()
    layer.merge()
    layer.unmerge()
    assert torch.equal(bits(weight), before)


def test_two_overlapping_merges_are_taken_back_bit_for_bit():
    model = adapted()
    model.add_adapter("second", JumpLoraConfig(r=2))
    close_gate(randomize(model, "second", seed=2), name="second")
    before = weights_bits(model)
    one, two = delta_weights(model), delta_weights(model, "second")
    assert any(((one[name] != 0) & (two[name] != 0)).any() for name in one)
    model.merge_adapter(["default", "second"])
    model.unmerge_adapter()
    assert all(torch.equal(now, before[name]) for name, now in weights_bits(model).items())


@pytest.mark.parametrize("base", MODELS)
def test_merge_and_unload_leaves_a_plain_model_that_says_the_same(base):
    model = adapted(base)
    with torch.no_grad():
        expected = logits(model)
        plain = model.merge_and_unload()
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-6)
    assert not adapter_layers(plain)
    assert not any("lora" in name for name, _ in plain.named_parameters())


# ---- several adapters -------------------------------------------------------------------------------------


def two_adapters():
    model = adapted(threshold=0.1)
    model.add_adapter("second", JumpLoraConfig(r=3, threshold_scope="layer"))
    return close_gate(randomize(model, "second", seed=2), 0.2, 0.5, "second").eval()


def test_each_adapter_has_gates_of_its_own():
    model = two_adapters()
    assert (n_gates(model), n_gates(model, "second")) == (1, 4)
    one = logits(model)
    model.set_adapter("second")
    two = logits(model)
    assert not torch.allclose(one, two, atol=1e-3)
    layer = a_layer(model)
    x = torch.randn(2, 16)
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + x @ sum(deltas).T, rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_may_use_different_adapters():
    model = two_adapters()
    with torch.no_grad():
        mixed = model(input_ids=IDS.repeat(2, 1)[:3], adapter_names=["second", "__base__", "default"]).logits
        alone = {"default": logits(model)[0]}
        model.set_adapter("second")
        alone["second"] = logits(model)[0]
        with model.disable_adapter():
            alone["__base__"] = logits(model)[1]
    for row, name in zip(mixed, ["second", "__base__", "default"], strict=True):
        torch.testing.assert_close(row, alone[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone["default"], alone["second"], atol=1e-3)


def test_a_disabled_adapter_is_the_backbone_and_comes_back():
    model = adapted()
    with torch.no_grad():
        adapted_logits = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(llama()))
        assert torch.equal(logits(model), adapted_logits)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_adapter_deleted_and_added_again_gets_a_fresh_gate(scope):
    model = two_adapters()
    config = JumpLoraConfig(r=2, threshold_scope=scope, initial_threshold=0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which adapter becomes active
        old = {id(group.gate): group.gate for group in gate_groups(model).values()}
        model.delete_adapter("default")
    assert not gate_groups(model)
    assert not any("default" in name for name, _ in model.named_parameters())
    model.add_adapter("default", config)
    groups = gate_groups(model)
    assert len(groups) == SCOPES[scope]
    for group in groups.values():
        assert id(group.gate) not in old
        assert (group.gate.threshold.item(), group.gate.interpolation.item()) == (0.75, 0.0)
    assert n_gates(model, "second") == 4


def test_weighted_sums_of_gated_adapters_are_refused():
    model = two_adapters()
    with pytest.raises(ValueError, match="merge the adapters one after another"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    assert not a_layer(model).supports_lora_conversion()


# ---- training tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", MODELS)
def test_gradient_checkpointing_changes_no_gradient(base):
    grads = []
    for checkpointing in (False, True):
        model = adapted(base, bandwidth=0.1).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits(model, use_cache=False).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad.any(), name
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused path", "PEFT's path"])
def test_an_adapted_layer_compiles_in_one_piece(dropout):
    layer = a_layer(adapted(lora_dropout=dropout)).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)
    layer.lora_gate["default"].interpolation.fill_(0.25)  # the schedule writes in place
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)
    compiled(x).sum().backward()
    grad = layer.lora_B["default"].weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(grad, layer.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-6)


def test_only_factors_and_thresholds_are_trained():
    model = adapted(threshold_scope="block")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = [name for name in trained if ".lora_A." in name or ".lora_B." in name]
    thresholds = [name for name in trained if name.endswith(".theta")]
    assert (len(factors), len(thresholds)) == (8, 2)
    assert len(trained) == 10


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(r=0), "r=0"),
        (dict(r=-2), "r=-2"),
        (dict(bandwidth=0.0), "bandwidth=0.0"),
        (dict(bandwidth=float("nan")), "bandwidth=nan"),
        (dict(initial_threshold=-1.0), "initial_threshold=-1.0"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(threshold_parametrization="exp"), "threshold_parametrization='exp'"),
        (dict(threshold_reduction="max"), "threshold_reduction='max'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_out_of_range_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        JumpLoraConfig(**bad)


def test_an_unknown_scope_is_told_the_nearest_one():
    with pytest.raises(ValueError, match=r"threshold_scope='layers'.*'model'.*'block'.*did you mean 'layer'"):
        JumpLoraConfig(threshold_scope="layers")


def test_a_target_that_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"Embedding.*nn\.Linear"):
        get_peft_model(llama(), JumpLoraConfig(target_modules=["embed_tokens"]))
    sizes = dict(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"Conv1D.*nn\.Linear"):
        get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)), JumpLoraConfig(target_modules=["c_attn"]))


def test_another_lora_variant_on_top_is_refused():
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(llama(), JumpLoraConfig(r=2, use_dora=True))


def test_layers_have_the_type_that_the_page_promises():
    assert all(isinstance(layer, JumpLoraLinear) for layer in adapter_layers(adapted()).values())
    stock = get_peft_model(llama(), LoraConfig(r=2))
    assert not gate_groups(stock)
    assert len(adapter_layers(stock)) == 4
