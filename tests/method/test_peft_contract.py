"""What the adapter needs of PEFT's inside: a failure here names the place to look at after an upgrade."""

import configparser
import copy
import inspect
import runpy
from dataclasses import fields
from importlib.metadata import version

import peft
import pytest
import torch
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

from jumplora.method.adapter import JumpLoraConfig, JumpLoraLinear, JumpLoraModel, JumpLoraVariant

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
