"""What the adapter needs of PEFT's inside: a failure here names the place to look at after an upgrade."""

import configparser
import copy
import inspect
import json
import math
import pickle
import runpy
from dataclasses import fields
from importlib.metadata import version

import peft
import pytest
import torch
from packaging.requirements import Requirement
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import nn

from jumplora.data.backbones import load_backbone
from jumplora.method.adapter import (
    JumpLoraConfig,
    JumpLoraLinear,
    JumpLoraModel,
    JumpLoraVariant,
    adapter_layers,
    gate_groups,
)

ADVICE = f"peft {peft.__version__} moved it: mend nbs/1_method/adapter.ipynb, or lower peft's range"


def must(condition, what):
    assert condition, f"{what}; {ADVICE}"


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_installed_peft_is_in_the_range_of_the_settings(root):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini")
    wanted = map(Requirement, settings["DEFAULT"]["requirements"].split())
    (found,) = (requirement.specifier for requirement in wanted if requirement.name == "peft")
    must(found.contains(version("peft"), prereleases=True), f"it is outside {found}")
    assert {item.operator for item in found} >= {"<", ">="}, "PEFT's private names are used: name both ends"


@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (register_peft_method, "name config_cls model_cls prefix"),
        (LoraVariant.init, "module adapter_name"),
        (LoraVariant.forward, "module active_adapter x result kwargs"),
        (LoraVariant.merge_safe, "module active_adapter orig_weight"),
        (LoraVariant.merge_unsafe, "module active_adapter orig_weight"),
        (LoraVariant.unmerge, "module active_adapter orig_weight"),
        (LoraVariant.supports_lora_conversion, "self"),
        (LoraLayer.update_layer, "self adapter_name r lora_alpha config kwargs"),
        (LoraLayer.resolve_lora_variant, "self config kwargs"),
        (LoraLayer._cache_store, "self key value"),
        (LoraLayer._cache_pop, "self key"),
        (LoraLayer.delete_adapter, "self adapter_name"),
        (BaseTunerLayer._move_adapter_to_device_of_base_layer, "self adapter_name device"),
        (BaseTunerLayer.get_base_layer, "self"),
        (Linear.__init__, "self base_layer adapter_name config r lora_alpha"),
        (Linear.get_delta_weight, "self adapter"),
        (Linear.forward, "self x args kwargs"),
        (Linear.merge, "self safe_merge adapter_names"),
        (LoraModel._create_and_replace, "self lora_config adapter_name target current_key"),
        (LoraModel._create_new_module, "lora_config adapter_name target kwargs"),
        (LoraModel.delete_adapter, "self adapter_name"),
        (LoraModel.add_weighted_adapter, "self adapters weights adapter_name"),
        (get_peft_model_state_dict, "model adapter_name save_embedding_layers"),
        (set_peft_model_state_dict, "model peft_model_state_dict adapter_name"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_peft_still_has_the_names_and_parameters_that_are_used(function, needed):
    found = parameters(function)
    must(not set(needed.split()) - set(found), f"{function.__qualname__} takes {found}, not {needed}")


def test_arguments_that_peft_gives_by_place_stand_where_they_stood():
    found = parameters(LoraModel._create_and_replace)[1:7]
    expected = ["lora_config", "adapter_name", "target", "target_name", "parent", "current_key"]
    must(found == expected, f"LoraModel._create_and_replace takes {found}")
    must(parameters(JumpLoraModel._create_and_replace)[1:4] == expected[:3], "our override no longer fits")
    must(parameters(LoraModel._create_new_module)[:3] == expected[:3], "LoraModel._create_new_module changed")
    is_static = isinstance(inspect.getattr_static(LoraModel, "_create_new_module"), staticmethod)
    must(is_static, "LoraModel._create_new_module is no static method")


def test_peft_finds_the_variant_and_calls_it_to_run_to_merge_and_to_unmerge(monkeypatch):
    for name in ("adapter_layer_names", "other_param_names"):
        must(isinstance(getattr(LoraLayer, name), tuple), f"LoraLayer.{name} is no tuple")
        must(set(getattr(LoraLayer, name)) < set(getattr(JumpLoraLinear, name)), f"{name} lost entries")
    must(isinstance(inspect.getattr_static(Linear, "lora_variants"), property), "lora_variants changed")
    must(JumpLoraModel.tuner_layer_cls is LoraLayer, "LoraModel.tuner_layer_cls changed")
    configs = LoraConfig, JumpLoraConfig
    stock, tagged = ({f.name for f in fields(c) if f.metadata.get("is_lora_variant")} for c in configs)
    must(tagged - stock == {"use_jumplora"}, "fields with is_lora_variant")
    must("use_dora" in stock, "LoraConfig marks its variants in another way")

    base = nn.Sequential()
    base.q_proj = nn.Linear(4, 6)
    # with dropout PEFT's own forward runs
    model = get_peft_model(base, JumpLoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    layer = model.get_submodule("base_model.model.q_proj")
    for name in ("lora_A", "lora_B", "lora_dropout", "scaling", "lora_variant", "merged_adapters", "_caches"):
        must(hasattr(layer, name), f"a LoRA layer has no {name}")
    called = []
    for name in ("forward", "merge_safe", "merge_unsafe", "unmerge"):
        original = getattr(JumpLoraVariant, name)

        def spy(*args, name=name, original=original, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(JumpLoraVariant, name, staticmethod(spy))
    model(torch.ones(1, 4))
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    model.merge_adapter()
    must(called[:4] == ["forward", "merge_safe", "unmerge", "merge_unsafe"], f"PEFT called {called}")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_adapter_type_is_a_full_member_of_pefts_enumeration_however_often_the_module_runs():
    members = list(PeftType)
    runpy.run_module("jumplora.method.adapter")
    must(list(PeftType) == members and PeftType.LORA.value == "LORA", "a second run adds members")
    member = PeftType.JUMPLORA
    must(issubclass(PeftType, str), "PeftType is no str enumeration")
    must(PeftType("JUMPLORA") is member is PeftType["JUMPLORA"], "look-up by value or name fails")
    must(member in list(PeftType) and member == "JUMPLORA", "the member is not listed")
    must(member.name == member.value == "JUMPLORA" and "JUMPLORA" in repr(member), "its name is wrong")
    must(copy.deepcopy(member) is member, "a copy is another member")
    must(hash(member) == hash(PeftType("JUMPLORA")) and len({*PeftType}) == len(PeftType), "hash is wrong")
    must(PEFT_TYPE_TO_TUNER_MAPPING[member] is JumpLoraModel, "the tuner is not registered")
    must(PEFT_TYPE_TO_CONFIG_MAPPING[member] is JumpLoraConfig, "the configuration is not registered")
    with pytest.raises(KeyError, match="jumplora"):  # which is why ours is guarded
        register_peft_method(
            name="jumplora", config_cls=JumpLoraConfig, model_cls=JumpLoraModel, prefix="lora_"
        )


# ---- what PEFT's own tests ask of a LoRA-like adapter ------------------------------------------------------

IDS = torch.arange(3, 27).view(3, 8)
# fields of LoraConfig that act outside the layer, or on its factors alone; compared with stock LoRA below
SUPPORTED = "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r "
SUPPORTED += "target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save "
SUPPORTED += "runtime_config init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern "
SUPPORTED += "layer_replication trainable_token_indices ensure_weight_tying megatron_core qalora_group_size"
WARNED = "loftq_config eva_config corda_config"  # PEFT warns that they are ignored
REFUSED = dict(
    lora_bias=True, fan_in_fan_out=True, use_qalora=True, megatron_config={"tp": 1}, target_parameters=["w"],
    lora_ga_config={}, use_dora=True, velora_config={}, alora_invocation_tokens=[1], monteclora_config={},
    use_bdlora={}, arrow_config={}, kasa_config={},
)  # fmt: skip


def adapted(kind=JumpLoraConfig, name="default", dtype=torch.float32, gamma=1.0, **settings):
    torch.manual_seed(0)
    base = load_backbone("tiny-llama")[0].to(dtype)
    model = get_peft_model(base, kind(**dict(r=2, lora_alpha=6, init_lora_weights=False) | settings), name)
    return set_gates(model, name, gamma=gamma).eval()


def set_gates(model, name="default", gamma=1.0, threshold=0.1):
    for group in gate_groups(model, name).values():
        group.gate.set_threshold(threshold)
        group.gate.interpolation.fill_(gamma)
    return model


def two(**settings):
    model = adapted(**settings)
    model.add_adapter("second", JumpLoraConfig(r=3, init_lora_weights=False))
    return set_gates(model, "second", threshold=0.05).eval()


@torch.no_grad()
def outputs(model, **inputs):
    return model(**inputs or dict(input_ids=IDS)).logits


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora_gate" not in n}


def test_every_field_of_pefts_lora_config_is_supported_refused_or_warned_about():
    known = {*SUPPORTED.split(), *WARNED.split(), *REFUSED}
    must({field.name for field in fields(LoraConfig)} == known, "LoraConfig has other fields; sort them in")
    for name, value in REFUSED.items():
        with pytest.raises(ValueError, match=f"{name}=.* does not go with a gate; leave it out"):
            JumpLoraConfig(task_type="CAUSAL_LM", **{name: value})


@pytest.mark.filterwarnings("ignore:an adapter is saved at γ = 0:", "ignore:You have requested `ensure_w")
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(bias="all"),
        dict(use_rslora=True),
        dict(lora_dropout=0.5),  # in evaluation
        dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
        dict(trainable_token_indices=[3, 5]),
        dict(target_modules=r".*layers\.1\..*(q|v)_proj"),
        dict(target_modules="all-linear", exclude_modules=["down_proj"]),
        dict(layers_to_transform=[0], target_modules=["k_proj"]),
        dict(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 9}),
        dict(layer_replication=[(0, 2), (1, 2)]),
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="orthogonal"),
        dict(init_lora_weights=True),
    ],
    ids=str,
)
def test_at_gamma_zero_each_supported_setting_trains_saves_and_loads_as_in_stock_lora(settings, tmp_path):
    ours, stock = adapted(gamma=0.0, **settings), adapted(LoraConfig, **settings)
    found, expected = gradients(ours), gradients(stock)
    assert found.keys() == expected.keys() and len(found) >= 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)
    for model in (ours, stock):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.save_pretrained(tmp_path / type(model.base_model).__name__)
    torch.testing.assert_close(outputs(ours), outputs(stock), rtol=1e-3, atol=1e-4)
    files = [tmp_path / kind / "adapter_config.json" for kind in ("LoraModel", "JumpLoraModel")]
    theirs, saved = [json.loads(file.read_text()) for file in files]
    for key in {"target_modules", *settings}:  # a regular expression stays one; a set has no order
        listed = isinstance(saved[key], list)
        assert saved[key] == theirs[key] or (listed and sorted(saved[key]) == sorted(theirs[key]))
    again = PeftModel.from_pretrained(load_backbone("tiny-llama")[0], tmp_path / "JumpLoraModel")
    assert torch.equal(outputs(again.eval()), outputs(ours))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_the_adapter_alone_and_are_those_without_gradient_checkpointing(reentrant):
    model = adapted().train()
    expected = gradients(model)
    assert all("lora_" in name for name in expected) and len(expected) == 8
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", [True, False], ids=["adapter in fp32", "adapter in the base's dtype"])
def test_an_adapter_added_generated_with_and_merged_keeps_the_dtypes_that_were_asked_for(dtype, cast):
    model = adapted(dtype=dtype)
    model.add_adapter("second", JumpLoraConfig(r=2, init_lora_weights=False), autocast_adapter_dtype=cast)
    found = {p.dtype for n, p in model.named_parameters() if "lora_A.second" in n}
    assert found == {torch.float32 if cast else dtype}
    set_gates(model, "second").set_adapter("second")
    assert model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (3, 10)
    merged = model.merge_and_unload(safe_merge=True)
    assert {p.dtype for p in merged.parameters()} == {dtype} and outputs(merged).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(value):
    model = adapted()
    layer = next(iter(adapter_layers(model).values()))
    before = layer.get_base_layer().weight.clone()
    layer.lora_A["default"].weight.data[0] = value
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged


@pytest.mark.filterwarnings("ignore:.*(Already|All adapters are already) .*merged")
def test_merging_twice_is_merging_once_and_disabling_unmerges():
    model = adapted()
    with model.disable_adapter():
        base = outputs(model)
    model.merge_adapter()
    once = outputs(model)
    model.merge_adapter()
    assert torch.equal(outputs(model), once) and not torch.allclose(once, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model.unload()), base)


def test_beams_of_a_batch_with_mixed_adapters_are_those_of_each_adapter_alone():
    model, found = two(), {}
    how = dict(max_new_tokens=5, num_beams=2, do_sample=False)
    mixed = model.generate(input_ids=IDS, adapter_names=["second", "__base__", "default"], **how)
    with model.disable_adapter():
        found[1] = model.generate(input_ids=IDS, **how)
    for row, name in ((2, "default"), (0, "second")):
        model.set_adapter(name)
        found[row] = model.generate(input_ids=IDS, **how)
    assert all(mixed[row].tolist()[: len(alone[row])] == alone[row].tolist() for row, alone in found.items())
    inputs = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(outputs(model, inputs_embeds=inputs), outputs(model))


@pytest.mark.parametrize("name", ["default2", "other_default", "efaul"])
def test_only_the_selected_adapter_is_saved_whatever_the_others_are_called(name, tmp_path):
    model = adapted()
    expected = set(get_peft_model_state_dict(model))
    model.add_adapter(name, JumpLoraConfig(r=3))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


@pytest.mark.filterwarnings("ignore:Adapter .* was active")
@pytest.mark.parametrize("gone", ["default", "second"])
def test_a_deleted_adapter_leaves_nothing_behind_and_an_unknown_one_is_an_error(gone):
    model, left = two(), {"default": "second", "second": "default"}[gone]
    with pytest.raises(ValueError, match="unknown does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter(gone)
    assert list(model.peft_config) == model.active_adapters == [left]
    for layer in adapter_layers(model).values():
        parts = (*layer.adapter_layer_names, *layer.other_param_names)
        assert not any(gone in getattr(layer, part) for part in parts)
    assert not gate_groups(model, gone) and outputs(model).isfinite().all()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_one_gate_of_its_own_and_a_state_fits_another_model(again):
    model = two()
    twin = again(model)
    assert torch.equal(outputs(twin), outputs(model)) and len({*gates(twin)}) == 1
    gates(twin)[0].set_threshold(9.0)
    assert not torch.equal(outputs(twin), outputs(model))
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    assert torch.equal(outputs(twin), outputs(model))


def gates(model):
    return [layer.lora_gate["default"] for layer in adapter_layers(model).values()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add_weighted_adapter(["default"], [0.5], "half"), "one after another"),
        (lambda m: m.save_pretrained(".", path_initial_model_for_weight_conversion="a"), "leave path_init"),
        (lambda m: convert_to_lora(m, 2), "not support|[Cc]annot"),
        (lambda m: [m.add_adapter(a, JumpLoraConfig(bias="all")) for a in "bc"], "supports only 1 adapter"),
    ],
    ids=["weighted", "conversion", "to LoRA", "bias"],
)
def test_what_a_gate_cannot_do_is_an_error(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        call(two())
