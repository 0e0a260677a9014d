"""The tuner against stock PEFT, against numpy in float64, and on every pitfall that was measured in PEFT."""

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, LoraGAConfig
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from jumplora.data.backbones import load_backbone
from jumplora.learning.training import named_updates
from jumplora.method.adapter import (
    JumpLoraConfig,
    JumpLoraLinear,
    JumpLoraModel,
    JumpLoraVariant,
    adapter_layers,
    delta_weights,
    gate_groups,
)
from jumplora.method.gated_linear import naive_gated_linear, naive_gated_update

pytestmark = pytest.mark.filterwarnings("ignore:.*it is not sparse before")  # many gates here are halfway
IDS = torch.arange(3, 19).view(2, 8)
SCOPES = {"model": 1, "block": 2, "layer": 4}  # gates of a Llama of two blocks with two targets each
NOT_SPARSE = "it is not sparse before γ = 1; finish its schedule, or set gate.interpolation.fill_(1)"
MOVING = "pissa pissa_niter_4 olora OLoRA loftq corda lora_ga eva mica typo".split()
both_models = pytest.mark.parametrize("base", ["llama", "t5"])
# a dropout of 1e-12 drops nothing, and keeps the layer from its fused path
both_paths = pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["fused path", "PEFT's path"])
low_memory = pytest.mark.parametrize("low_memory", [False, True], ids=["normal", "low_cpu_mem_usage"])
both_merges = pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])


def backbone(base="llama", dtype=torch.float32):
    return load_backbone(f"tiny-{base}")[0].to(dtype)


def fill(model, name="default", threshold=0.03, gamma=1.0, seed=1):
    "Random factors, so that the update is not zero, and the same τ and γ in every gate."
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            weight = factor[name].weight
            weight.data.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    for group in gate_groups(model, name).values():
        group.gate.set_threshold(threshold)
        group.gate.interpolation.fill_(gamma)
    return model


def adapted(base="llama", dtype=torch.float32, threshold=0.03, gamma=1.0, config=JumpLoraConfig, **settings):
    model = get_peft_model(backbone(base, dtype), config(**dict(r=2, lora_alpha=6) | settings))
    return fill(model, threshold=threshold, gamma=gamma)


def two_adapters():
    model = adapted()
    model.add_adapter("second", JumpLoraConfig(r=3, threshold_scope="layer"))
    return fill(model, "second", 0.05, 0.5, seed=2).eval()


def logits(model, **kwargs):
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = IDS
    return model(input_ids=IDS, **kwargs).logits


def a_layer(model):
    return next(layer for name, layer in adapter_layers(model).items() if name.endswith("q_proj"))


def gates(model, name="default"):
    return [group.gate for group in gate_groups(model, name).values()]


def gate_state(model, name="default"):
    (gate,) = gates(model, name)
    return round(gate.threshold.item(), 6), gate.interpolation.item()


def n_gates(model, name="default"):
    return len({id(layer.lora_gate[name]) for layer in adapter_layers(model).values()})


def weights(model):
    return {n: layer.get_base_layer().weight.detach().clone() for n, layer in adapter_layers(model).items()}


def same_bits(one, other):
    "Whether named tensors have the same bytes, which distinguish 0 from -0."
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def double(tensor):
    return tensor.detach().double().numpy()


def relative(measured, expected):
    "The distance as a share of the expected, of tensors or arrays."
    measured, expected = (double(o) if isinstance(o, torch.Tensor) else o for o in (measured, expected))
    return np.linalg.norm(measured - expected) / np.linalg.norm(expected)


# ---- what it computes -------------------------------------------------------------------------------------


@both_models
def test_a_fresh_adapter_changes_no_bit_of_the_output_and_uses_jumplora_layers(base):
    with torch.no_grad():
        expected = logits(backbone(base))
        model = get_peft_model(backbone(base), JumpLoraConfig(r=2))
        assert torch.equal(logits(model), expected)
        assert not torch.allclose(logits(fill(model)), expected, atol=1e-3)
    assert all(isinstance(layer, JumpLoraLinear) for layer in adapter_layers(model).values())
    assert not gate_groups(adapted(config=LoraConfig))


@both_models
@pytest.mark.parametrize(("gamma", "threshold"), [(0.0, 0.03), (1.0, 0.0)], ids=["gamma 0", "tau 0"])
def test_zero_gamma_or_zero_threshold_gives_pefts_lora_and_its_gradients(base, gamma, threshold):
    ours, stock = adapted(base, gamma=gamma, threshold=threshold), adapted(base, config=LoraConfig)
    theirs = adapter_layers(stock)
    assert theirs.keys() == adapter_layers(ours).keys()
    assert relative(logits(ours), logits(stock)) < 1e-5
    for model in (ours, stock):
        logits(model).log_softmax(-1)[..., 3].mean().backward()
    for name, layer in adapter_layers(ours).items():
        x = torch.randn(4, 64)
        assert relative(layer(x), theirs[name](x)) < 1e-6
        for factor in ("lora_A", "lora_B"):
            mine, reference = (getattr(o, factor)["default"].weight.grad for o in (layer, theirs[name]))
            assert relative(mine, reference) < 1e-5
    assert torch.equal(gates(ours)[0].theta.grad, torch.zeros(1))  # in the graph all the same


@both_paths
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["log", "raw"])
def test_forward_gradients_and_merge_are_those_of_the_naive_layer(form, reduction, dropout):
    torch.manual_seed(0)
    settings = dict(bandwidth=0.02, threshold_reduction=reduction, threshold_parametrization=form)
    settings |= dict(r=2, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(16, 14)), JumpLoraConfig(**settings))
    layer = adapter_layers(fill(model, gamma=0.6))["0"]
    A, B, gate = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_gate["default"]
    W, bias, x, grad = layer.weight, layer.bias, torch.randn(3, 5, 16), torch.randn(3, 5, 14)
    same, found = dict(interpolation=0.6, scaling=3.0, bandwidth=0.02, reduction=reduction), []
    for run in (layer, lambda x: naive_gated_linear(x, W, A, B, gate.threshold, bias=bias, **same)):
        layer.zero_grad()
        out = run(x)
        out.backward(grad)
        found.append([out, *(p.grad.clone() for p in (A, B, gate.theta))])
    for measured, expected in zip(*found, strict=True):
        assert relative(measured, expected) < 1e-5
    before, update = W.clone(), naive_gated_update(A, B, gate.threshold, **same)
    layer.merge()
    assert relative(W - before, update) < 1e-5


def on_forward(base, calls):
    base.register_forward_hook(lambda module, inputs, output: calls.append(1) or output + 1)


def before_forward(base, calls):
    base.register_forward_pre_hook(lambda module, inputs: calls.append(1) or (inputs[0] * 2,))


def on_backward(base, calls):
    base.register_full_backward_hook(lambda module, inputs, outputs: calls.append(1))


def before_backward(base, calls):
    base.register_full_backward_pre_hook(lambda module, outputs: calls.append(1) or (outputs[0] * 2,))


def own_forward(base, calls):
    plain = base.forward
    base.forward = lambda x: calls.append(1) or plain(x) + 1


def offloaded(base, calls):
    cpu_offload(base, torch.device("cpu"))
    assert base.weight.device.type == "meta"


def weight_norm(base, calls):
    nn.utils.weight_norm(base)
    base.weight_g.data.mul_(2)  # the weight itself is computed at the next forward


def parametrized(base, calls):
    nn.utils.parametrizations.weight_norm(base)
    base.parametrizations.weight.original0.data.mul_(2)


def pruned(base, calls):
    prune.random_unstructured(base, "weight", 0.5)
    base.weight_mask.zero_()


ALTERED = [on_forward, before_forward, on_backward, before_backward, own_forward, offloaded, weight_norm]
ALTERED += [parametrized, pruned]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("alter", ALTERED, ids=lambda alter: alter.__name__)
def test_what_is_done_to_the_base_layer_acts_once_per_pass_as_with_stock_lora(alter):
    x, found = torch.randn(3, 8), []
    for config in (JumpLoraConfig, LoraConfig):
        torch.manual_seed(0)
        settings = config(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
        layer = adapter_layers(get_peft_model(nn.Sequential(nn.Linear(8, 6)), settings))["0"]
        unaltered = layer(x)
        alter(layer.base_layer, calls := [])
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        output.square().sum().backward()
        found.append((calls, output, inputs.grad, layer.lora_A["default"].weight.grad))
        assert (alter in (on_backward, before_backward, offloaded)) == torch.allclose(output, unaltered)
    (calls, *ours), (expected_calls, *theirs) = found
    assert calls == expected_calls and len(calls) == (alter in ALTERED[:5])
    for measured, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_that_is_offloaded_with_its_adapter_runs_and_merges(scope):
    model = adapted(threshold_scope=scope).eval()
    with torch.no_grad():
        expected = logits(model)
        cpu_offload(model, torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_the_fused_path_serves_one_active_adapter_on_a_plain_float32_layer_without_dropout():
    model = two_adapters()
    layer = a_layer(model)
    assert layer.fused_adapter() == "default"
    with model.disable_adapter():
        assert layer.fused_adapter() is None
    model.base_model.set_adapter(["default", "second"])
    assert layer.fused_adapter() is None
    model.set_adapter("second")
    assert layer.fused_adapter() == "second"
    layer.merge()
    assert layer.fused_adapter() is None
    layer.unmerge()
    layer.base_layer.__class__ = type("QuantisedLinear", (nn.Linear,), {})
    for other in (layer, a_layer(adapted(lora_dropout=0.1)), a_layer(adapted(dtype=torch.bfloat16))):
        assert other.fused_adapter() is None


# differences: 8
def test_lora_dropout_falls_on_the_updates_input_alone():
    layer, x = a_layer(adapted(lora_dropout=0.5)), torch.randn(4, 64)
    base, update = layer.get_base_layer()(x), layer.get_delta_weight("default")
    still = layer.eval()(x)
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    assert relative(dropped, base + nn.functional.dropout(x, 0.5) @ update.T) < 1e-5
    assert relative(still, base + x @ update.T) < 1e-5
    assert relative(dropped, still) > 1e-2


@both_models
def test_a_bf16_model_stays_close_to_fp32(base):
    exact, rough = adapted(base), adapted(base, dtype=torch.bfloat16)
    outputs = [logits(model) for model in (rough, exact)]
    assert outputs[0].dtype == torch.bfloat16
    assert relative(*outputs) < 0.03
    for output in outputs:
        output.float().square().mean().backward()
    for name, layer in adapter_layers(rough).items():
        reference = adapter_layers(exact)[name].lora_B["default"].weight.grad
        assert relative(layer.lora_B["default"].weight.grad, reference) < 0.1


def test_autocast_runs_both_ways_through_pefts_own_forward(monkeypatch):
    model = adapted()
    layer, x = a_layer(model), torch.randn(2, 64)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = logits(model)
        assert layer(x).dtype == layer.get_base_layer()(x).dtype == torch.bfloat16
    assert relative(measured, expected) < 0.03
    measured.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(JumpLoraVariant, "forward", staticmethod(lambda *args, result, **kwargs: result))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


# ---- which layers, which gates ----------------------------------------------------------------------------


# differences: 36
def test_query_and_value_are_the_default_targets_and_blocks_are_found_in_each_architecture():
    llama, t5 = (adapted(base, threshold_scope="block") for base in ("llama", "t5"))
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert list(gate_groups(llama)) == blocks
    assert list(adapter_layers(llama)) == [f"{block}.self_attn.{p}_proj" for block in blocks for p in "qv"]
    assert list(gate_groups(t5)) == [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)]
    assert {name.rsplit(".", 1)[-1] for name in adapter_layers(t5)} == {"q", "v"}
    assert len(adapter_layers(t5)) == 2 * (2 + 2 * 2)  # encoder; decoder with cross-attention
    found = JumpLoraModel.BLOCK.match
    assert found("transformer.h.11.attn.c_attn")[0] == "transformer.h.11"
    assert found("a.layers.1.b.blocks.2.q")[0] == "a.layers.1"
    outside = gate_groups(adapted(target_modules=["q_proj", "lm_head"], threshold_scope="block"))
    assert list(outside["outside blocks"].layers) == ["lm_head"]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_gate_acts_on_its_group_alone_also_in_a_copy_and_only_factors_and_thresholds_are_trained(scope):
    model = adapted(threshold_scope=scope)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = [next(o for o in ("lora_A", "lora_B", "theta") if o in name) for name in trained]
    assert sorted(kinds) == ["lora_A"] * 4 + ["lora_B"] * 4 + ["theta"] * SCOPES[scope]
    before, twin = delta_weights(model), copy.deepcopy(model)
    groups = gate_groups(twin)
    assert len(groups) == SCOPES[scope] == n_gates(twin)
    assert [name for group in groups.values() for name in group.layers] == list(adapter_layers(twin))
    first = next(iter(groups.values()))
    first.gate.set_threshold(1e9)  # nothing passes
    for name, delta in delta_weights(twin).items():
        assert (not delta.any()) if name in first.layers else torch.equal(delta, before[name])
    assert same_bits(delta_weights(model), before)


def test_a_group_gives_the_sizes_of_its_dense_entries_neither_gated_nor_scaled():
    model = fill(two_adapters(), threshold=1e9)
    for name in ("default", "second"):
        groups = gate_groups(model, name).values()
        for layer, sizes in zip(adapter_layers(model).values(), (o for g in groups for o in g), strict=True):
            product = double(layer.lora_B[name].weight) @ double(layer.lora_A[name].weight)
            assert relative(sizes, np.abs(product)) < 1e-6
    assert not a_layer(model).get_delta_weight("default").any()


@pytest.mark.parametrize("config", [JumpLoraConfig, LoraConfig], ids=["gated", "plain"])
def test_delta_weights_is_what_merging_adds_and_has_gradients(config):
    model = adapted(gamma=0.5, config=config)
    deltas, before = delta_weights(model), weights(model)
    sum(d.square().sum() for d in deltas.values()).backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in adapter_layers(model).values())
    model.merge_adapter()
    for name, merged in weights(model).items():
        torch.testing.assert_close(merged, before[name] + deltas[name].detach(), rtol=1e-6, atol=1e-7)


# differences: 23
def test_a_penalty_may_leave_the_threshold_alone():
    model = adapted(bandwidth=0.02, gamma=0.5)
    theta = gates(model)[0].theta
    for detach in (True, False):
        sum(d.square().sum() for d in delta_weights(model, detach_threshold=detach).values()).backward()
        assert (theta.grad is None) == detach
    assert theta.grad.item() != 0


def wrap(model, kind, attribute):
    "A stand-in for a wrapper's class that holds the model as the real one does."
    wrapper = type(kind, (nn.Module,), {})()
    setattr(wrapper, attribute, model)
    return wrapper


@pytest.mark.parametrize(
    "kinds",
    [
        dict(DistributedDataParallel="module"),
        dict(DeepSpeedEngine="module", OptimizedModule="_orig_mod"),
        dict(FullyShardedDataParallel="_fsdp_wrapped_module", CheckpointWrapper="_checkpoint_wrapped_module"),
    ],
    ids=" ".join,
)
# differences: 25
def test_wrapped_models_keep_their_layers_names(kinds):
    model = adapted()
    names = list(adapter_layers(model))
    assert list(adapter_layers(nn.DataParallel(model))) == list(adapter_layers(torch.compile(model))) == names
    assert list(adapter_layers(model.get_base_model())) == list(adapter_layers(model.base_model)) == names
    blocks = model.get_base_model().model.layers
    wrapped = model
    for kind, attribute in kinds.items():
        blocks[0] = wrap(blocks[0], kind, attribute)  # one block by itself
        wrapped = wrap(wrapped, kind, attribute)  # the whole model
    assert list(adapter_layers(wrapped)) == list(delta_weights(wrapped)) == names
    assert list(next(iter(gate_groups(wrapped).values())).layers) == names


def test_layers_that_are_called_like_a_wrappers_attribute_keep_their_names():
    inner = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    base = nn.ModuleDict({"module": inner, "_orig_mod": nn.Linear(4, 4)})
    base.base_model = nn.ModuleDict({"model": nn.ModuleDict({"v_proj": nn.Linear(4, 4)})})
    targets = ["q_proj", "_orig_mod", "v_proj"]
    model = get_peft_model(nn.ModuleDict({"module": base}), JumpLoraConfig(target_modules=targets))
    names = ["module.module.q_proj", "module._orig_mod", "module.base_model.model.v_proj"]
    for wrapped in (model, nn.DataParallel(model), wrap(model, "OptimizedModule", "_orig_mod")):
        assert sorted(adapter_layers(wrapped)) == sorted(names)
    assert all(model.get_base_model().get_submodule(name) is adapter_layers(model)[name] for name in names)


def test_an_adapter_that_no_layer_has_is_an_error_that_names_those_there_are():
    model = get_peft_model(backbone(), JumpLoraConfig(r=2), adapter_name="red")
    for call in (delta_weights, adapter_layers, named_updates):
        with pytest.raises(ValueError, match=r"no layer has an adapter 'default'; this model has \['red'\]"):
            call(model, "default")
    assert len(delta_weights(model, "red")) == len(named_updates(model, "red")) == 4
    assert not delta_weights(backbone())


# ---- saving and loading -----------------------------------------------------------------------------------


@low_memory
@pytest.mark.parametrize("scope", SCOPES)
# differences: 10
def test_a_reloaded_adapter_keeps_gate_and_sharing(tmp_path, scope, low_memory):
    model = adapted(threshold_scope=scope)
    for i, gate in enumerate(gates(model)):
        gate.set_threshold(0.1 + 0.05 * i)
        gate.theta.data.fill_(0.25)
        gate.interpolation.fill_(0.5 + 0.1 * i)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(backbone(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert n_gates(again) == SCOPES[scope]
    for group, saved in zip(gate_groups(again).values(), gate_groups(model).values(), strict=True):
        assert (group.name, list(group.layers)) == (saved.name, list(saved.layers))
        assert same_bits(group.gate.state_dict(), saved.gate.state_dict())
    assert torch.equal(logits(again), logits(model))


@low_memory
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("default", "other"), ("default", "threshold"), ("default", "lora_gate"), ("red", "default")],
)
def test_an_adapter_may_be_loaded_under_another_name(tmp_path, saved, loaded, low_memory):
    model = fill(get_peft_model(backbone(), JumpLoraConfig(r=2), adapter_name=saved), saved, 0.25, 0.5).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path if saved == "default" else tmp_path / saved
    again = PeftModel.from_pretrained(backbone(), folder, loaded, low_cpu_mem_usage=low_memory).eval()
    assert gate_state(again, loaded) == (0.25, 0.5)
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_may_be_loaded_beside_another(tmp_path):
    adapted(threshold=0.25, gamma=0.5).save_pretrained(tmp_path)
    model = adapted()
    result = model.load_adapter(tmp_path, "second")
    assert not [*result.unexpected_keys, *(key for key in result.missing_keys if "second" in key)]
    assert (gate_state(model), gate_state(model, "second")) == ((0.03, 1.0), (0.25, 0.5))


def test_an_adapters_folder_holds_its_settings_factors_and_gate_and_no_dense_update(tmp_path):
    settings = dict(threshold_scope="block", threshold_parametrization="raw", bandwidth=0.02)
    settings |= dict(threshold_reduction="sum", initial_threshold=0.5)
    adapted(**settings).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gate = {f"lora_gate.{part}" for part in ("start", "theta", "interpolation")}
    assert {key.split("_proj.")[1] for key in tensors} == {"lora_A.weight", "lora_B.weight"} | gate
    for key, tensor in tensors.items():
        assert tensor.numel() < 32 * 64, key  # no dense update, no weight
        assert "lora_gate" not in key or (tensor.shape, tensor.dtype) == ((1,), torch.float32), key
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "JUMPLORA"
    again = PeftModel.from_pretrained(backbone(), tmp_path)
    config = again.peft_config["default"]
    assert isinstance(config, JumpLoraConfig)
    assert {name: getattr(config, name) for name in settings} == settings
    assert a_layer(again).gate_options["default"] == dict(bandwidth=0.02, reduction="sum")
    assert a_layer(again).lora_gate["default"].parametrization == "raw"


def test_stock_peft_refuses_the_adapter_instead_of_running_it_ungated(tmp_path):
    adapted().save_pretrained(tmp_path)
    code = """if True:
        from peft import PeftModel
        from torch.nn import Linear, ModuleDict
        PeftModel.from_pretrained(ModuleDict({"q_proj": Linear(64, 64)}), ".")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("KeyError: 'JUMPLORA'"), done.stderr


@pytest.mark.parametrize("cast", [True, False], ids=["fp32 factors", "bf16 factors"])
def test_the_gate_is_float32_in_a_bf16_model_its_file_and_its_half(tmp_path, cast):
    model = get_peft_model(backbone(dtype=torch.bfloat16), JumpLoraConfig(r=2), autocast_adapter_dtype=cast)
    assert a_layer(model).lora_A["default"].weight.dtype == (torch.float32 if cast else torch.bfloat16)
    fill(model, threshold=0.1234567, gamma=1 / 3).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(backbone(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=cast)
    assert logits(again).isfinite().all()
    for moved in (model, again, model.half()):
        (gate,) = gates(moved)
        assert {o.dtype for o in (*gate.state_dict().values(), gate.threshold)} == {torch.float32}
        assert (gate.threshold, gate.interpolation) == (torch.tensor(0.1234567), torch.tensor(1 / 3))


# ---- merging ----------------------------------------------------------------------------------------------


@both_merges
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@both_models
# differences: 27
def test_merge_then_unmerge_gives_every_bit_back_and_unloading_leaves_a_plain_model(base, dtype, safe):
    model = adapted(base, dtype)
    before, deltas, expected = weights(model), delta_weights(model), logits(model)
    model.merge_adapter(safe_merge=safe)
    assert relative(logits(model), expected) < (0.03 if dtype == torch.bfloat16 else 1e-5)
    merged = weights(model)
    assert same_bits(merged, {name: (before[name].float() + deltas[name]).to(dtype) for name in before})
    assert not same_bits(merged, before)
    model.unmerge_adapter()
    assert same_bits(weights(model), before)
    plain = model.merge_and_unload()
    assert relative(logits(plain), expected) < (0.03 if dtype == torch.bfloat16 else 1e-5)
    assert not adapter_layers(plain) and not any("lora" in name for name, _ in plain.named_parameters())


def test_a_merged_model_that_was_cast_gives_its_first_weights_back():
    model = adapted()
    before = weights(model)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name].double()) for name, weight in weights(model).items())


def test_a_merge_changes_no_zero_update_and_two_that_overlap_are_taken_back_bit_for_bit():
    model = two_adapters()
    for layer in adapter_layers(model).values():
        layer.get_base_layer().weight.data[:, ::2] = -0.0
    before, one, two = weights(model), delta_weights(model), delta_weights(model, "second")
    model.merge_adapter(["default"])
    for name, merged in weights(model).items():
        zero = one[name] == 0
        assert zero[:, ::2].any() and ((one[name] != 0) & (two[name] != 0)).any()
        assert same_bits({name: merged[zero]}, {name: before[name][zero]})  # not even the sign of a zero
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert same_bits(weights(model), before)


@both_merges
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_merge_into_quantised_weights_is_refused_and_leaves_them_alone(safe, dtype):
    layer = a_layer(adapted())
    quantised = torch.ones(64, 64).to(dtype)
    layer.get_base_layer().weight = nn.Parameter(quantised.clone(), requires_grad=False)
    with pytest.raises(ValueError, match="are quantised; merge into the full-precision checkpoint"):
        layer.merge(safe_merge=safe)
    left = layer.get_base_layer().weight
    assert torch.equal(left.view(torch.int8), quantised.view(torch.int8)) and not layer.merged


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "save_pretrained", "layer"])
@pytest.mark.parametrize(("gamma", "others"), [(0.25, 1.0), (1.0, 1.0), (1.0, 0.25)])
def test_an_adapter_warns_where_it_is_merged_or_saved_before_gamma_is_1(
    how, gamma, others, tmp_path, recwarn
):
    model = adapted(gamma=gamma)
    model.add_adapter("second", JumpLoraConfig(r=2))
    fill(model, "second", gamma=others)  # not the one that is merged or saved
    recwarn.clear()
    warnings.simplefilter("always")
    if how == "save_pretrained":
        for i, folder in enumerate(
            ["one", "two", "checkpoint-7"]
        ):  # the last as the Trainer does: no warning
            one = dict(selected_adapters=["default"], safe_serialization=i != 1)
            model.save_pretrained(tmp_path / folder, **one)
    else:
        a_layer(model).merge() if how == "layer" else getattr(model, how)()
    found = {str(warning.message) for warning in recwarn if "sparse" in str(warning.message)}
    done = "an adapter is saved" if how == "save_pretrained" else "adapter 'default' is merged"
    assert found == ({f"{done} at γ = 0.25: {NOT_SPARSE}"} if gamma < 1 else set())
    if how == "save_pretrained" and gamma < 1:
        assert sum("sparse" in str(warning.message) for warning in recwarn) == 2


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:You are.*tied", "ignore:.*layers? tied")
@pytest.mark.parametrize("kind", ["lm_head", "two layers", "layer_replication"])
def test_a_merge_into_a_weight_with_two_owners_is_refused_and_leaves_it_alone(kind):
    base, settings = backbone(), dict(target_modules=["lm_head", "q_proj", "v_proj"])
    if kind == "lm_head":
        base.lm_head.weight = base.get_input_embeddings().weight
    elif kind == "two layers":
        base.model.layers[0].self_attn.v_proj.weight = base.model.layers[1].self_attn.v_proj.weight
    else:
        settings["layer_replication"] = [(0, 2), (1, 2)]
    model = fill(get_peft_model(base, JumpLoraConfig(r=2, **settings)))
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="weight and .*weight share a weight: .* untie them"):
            merge()
    assert same_bits(weights(model), before) and not a_layer(model).merged


# ---- several adapters -------------------------------------------------------------------------------------


def test_two_adapters_have_gates_of_their_own_and_add_their_updates():
    model = two_adapters()
    assert (n_gates(model), n_gates(model, "second")) == (1, 4)
    layer, x = a_layer(model), torch.randn(2, 64)
    model.set_adapter("second")
    trained = [layer.lora_gate[name].theta.requires_grad for name in ("default", "second")]
    assert trained == [False, True]
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    model.base_model.set_adapter(["default", "second"])
    assert relative(layer(x), layer.get_base_layer()(x) + x @ sum(deltas).T) < 1e-5
    with pytest.raises(ValueError, match="merge the adapters one after another"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    assert not layer.supports_lora_conversion()


def test_rows_of_a_batch_may_use_different_adapters_and_a_disabled_one_comes_back():
    model, names = two_adapters(), ["second", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=IDS.repeat(2, 1)[:3], adapter_names=names).logits
        default = logits(model)
        with model.disable_adapter():
            base = logits(model)
        assert torch.equal(base, logits(backbone())) and torch.equal(logits(model), default)
        model.set_adapter("second")
        alone = [logits(model)[0], base[1], default[0]]
    for row, expected in zip(mixed, alone, strict=True):
        assert relative(row, expected) < 1e-4
    assert relative(alone[2], alone[0]) > 1e-3


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("scope", SCOPES)
def test_an_adapter_deleted_and_added_again_gets_a_fresh_gate(scope):
    model = two_adapters()
    (old,), second = gates(model), gates(model, "second")
    model.delete_adapter("default")
    assert not gate_groups(model) and not any("default" in name for name, _ in model.named_parameters())
    model.add_adapter("default", JumpLoraConfig(r=2, threshold_scope=scope, initial_threshold=0.75))
    fresh = gates(model)
    assert len(fresh) == SCOPES[scope] and old not in fresh
    assert {(gate.threshold.item(), gate.interpolation.item()) for gate in fresh} == {(0.75, 0.0)}
    assert gates(model, "second") == second


def test_a_second_adapter_of_the_same_name_on_the_same_model_has_fresh_gates():
    model = adapted()
    before = gates(model)
    before[0].interpolation.fill_(1)
    with pytest.warns(UserWarning, match="second time"):
        again = get_peft_model(model.get_base_model(), JumpLoraConfig(r=2, initial_threshold=0.75))
    (gate,) = gates(again)
    assert gate not in before and (gate.threshold.item(), gate.interpolation.item()) == (0.75, 0.0)


# ---- training tools ---------------------------------------------------------------------------------------


@both_paths
def test_an_adapted_layer_compiles_in_one_piece(dropout):
    layer, x, grads = a_layer(adapted(lora_dropout=dropout)), torch.randn(3, 64), []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), layer(x)) < 1e-6
    layer.lora_gate["default"].interpolation.fill_(0.25)  # the schedule writes in place
    assert relative(compiled(x), layer(x)) < 1e-6
    for run in (compiled, layer):
        layer.zero_grad()
        run(x).sum().backward()
        grads.append(layer.lora_B["default"].weight.grad.clone())
    assert relative(*grads) < 1e-5


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(r=0), "r=0 is not positive"),
        (dict(r=-2), "r=-2"),
        (dict(bandwidth=0.0), "bandwidth=0.0"),
        (dict(bandwidth=float("nan")), "bandwidth=nan"),
        (dict(bandwidth=float("inf")), "bandwidth=inf"),
        (dict(initial_threshold=-1.0), "initial_threshold=-1.0"),
        (dict(initial_threshold=True), "initial_threshold=True"),
        (dict(r=2.5), "r=2.5 is not positive; give a whole number"),
        (dict(lora_alpha=0), "lora_alpha=0 is not positive"),
        (dict(lora_alpha=float("nan")), "lora_alpha=nan is not positive"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(lora_dropout=1.0), "lora_dropout=1.0 is not a share from 0 to below 1"),
        (dict(lora_dropout=-0.5), "lora_dropout=-0.5"),
        (dict(lora_dropout=float("nan")), "lora_dropout=nan"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out=True does not go with a gate; leave it out"),
        (dict(use_qalora=True), "use_qalora=True does not go with a gate"),
        (dict(megatron_config={"a": 1}), "megatron_config"),
        (dict(target_parameters=["q_proj.weight"]), "target_parameters"),
        (dict(lora_ga_config=LoraGAConfig()), "lora_ga_config"),
        (dict(kasa_config=KasaConfig()), "kasa_config"),
        (dict(use_jumplora=False), "use_jumplora=False does not go with a gate"),
        *((dict(init_lora_weights=init), f"{init!r} may move weights.*use True, False") for init in MOVING),
        (dict(threshold_parametrization="exp"), "threshold_parametrization='exp'"),
        (dict(threshold_reduction="max"), "threshold_reduction='max'"),
        (dict(threshold_scope="layers"), r"scope='layers'.*'model'.*'block'.*did you mean 'layer'"),
        (dict(target_modules=["embed_tokens"]), r"Embedding.*nn\.Linear"),
        (dict(use_dora=True), "use_dora=True does not go with a gate"),  # another variant on top
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
# differences: 9
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        adapted(**bad)


def test_a_target_that_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"Conv1D.*nn\.Linear"):
        get_peft_model(nn.Sequential(Conv1D(3, 4)), JumpLoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learned", [True, False], ids=["τ learns", "τ fixed"])
def test_a_dense_gate_takes_loras_products_and_gives_its_threshold_a_gradient_of_zero(dtype, learned):
    gated, plain = adapted(dtype=dtype, gamma=0.0), adapted(dtype=dtype, config=LoraConfig)
    for group in gate_groups(gated).values():
        group.gate.theta.requires_grad_(learned)
    for model in (gated, plain):
        model(input_ids=IDS).logits.float().square().mean().backward()
    assert gated(input_ids=IDS).logits.equal(plain(input_ids=IDS).logits)  # bit for bit
    theirs = dict(plain.named_parameters())
    for name, parameter in gated.named_parameters():
        if name in theirs and parameter.requires_grad:
            assert parameter.grad.equal(theirs[name].grad), name
    for group in gate_groups(gated).values():
        assert group.gate.theta.grad.item() == 0 if learned else group.gate.theta.grad is None


@pytest.mark.parametrize("waits", [False, True], ids=["processor", "accelerator"])
def test_a_change_of_gamma_is_seen_however_it_is_made(waits, monkeypatch):
    monkeypatch.setattr("jumplora.method.jumprelu.on_accelerator", lambda tensor: waits)
    model = adapted(gamma=0.0)
    (group,) = gate_groups(model).values()
    dense = model(input_ids=IDS).logits
    group.gate.interpolation.fill_(1.0)
    gated = model(input_ids=IDS).logits
    assert not gated.equal(dense)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    group.gate.interpolation.zero_()
    assert model(input_ids=IDS).logits.equal(dense)
    model.load_state_dict(state)
    assert model(input_ids=IDS).logits.equal(gated)
    group.gate.interpolation = torch.zeros(1)
    assert model(input_ids=IDS).logits.equal(dense)
    assert copy.deepcopy(model)(input_ids=IDS).logits.equal(dense)
    with torch.inference_mode():
        group.gate.interpolation = torch.ones(1)
        assert model(input_ids=IDS).logits.equal(gated)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@both_paths
def test_a_masked_entry_is_zero_in_forward_gradient_threshold_and_merge(gamma, dropout):
    model = adapted(gamma=gamma, lora_dropout=dropout, bandwidth=0.05)
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, layer in adapter_layers(model).items():
        masks[name] = torch.rand(layer.get_base_layer().weight.shape, generator=generator) < 0.5
        layer.gate_options["default"]["mask"] = masks[name]
    model(input_ids=IDS).logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for layer in adapter_layers(model).values():  # the same, written out under autograd
        layer.fused_adapter = lambda: None
        layer.gated_output = lambda adapter, x, layer=layer: naive_gated_linear(
            x, None, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight,
            layer.lora_gate[adapter].threshold, layer.lora_gate[adapter].interpolation,
            scaling=layer.scaling[adapter], **layer.gate_options[adapter],
        )  # fmt: skip
    model(input_ids=IDS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    (group,) = gate_groups(model).values()
    sizes = dict(zip(group.layers, group, strict=True))
    for name, delta in delta_weights(model).items():
        assert not delta[~masks[name]].any() and delta[masks[name]].any()
        assert not sizes[name][~masks[name]].any()


@pytest.mark.parametrize("more", [dict(use_dora=True), dict(lora_bias=True)])
def test_an_adapter_that_is_more_than_two_factors_has_no_update_to_merge(more):
    base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], **more))
    with pytest.raises(ValueError, match="more than two factors"):
        delta_weights(model)


def test_an_adapted_embedding_is_no_layer_that_is_left_out():
    base = nn.ModuleDict({"words": nn.Embedding(9, 8), "read": nn.Linear(8, 8)})
    model = get_peft_model(base, LoraConfig(target_modules=["words", "read"], r=2))
    assert set(adapter_layers(model, "default")) == {"words", "read"}
    with pytest.raises(ValueError, match="an embedding"):
        delta_weights(model)
