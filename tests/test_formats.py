"""An update as files: to the same bits in stock PEFT, whatever the shapes, and PEFT's private names."""

import copy
import inspect
import json
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.shira import ShiraModel
from peft.tuners.supertuning.layer import SupertuningLayer
from safetensors.torch import load_file, save_file

from jumplora.data.backbones import load_backbone
from jumplora.method.adapter import JumpLoraConfig, delta_weights, gate_groups
from jumplora.storage import formats
from jumplora.storage.formats import SPARSE, add_updates, entries_needed, exact_updates, filled, format_bytes, merged_model, save_gated_adapter, save_sparse_adapter, shira_state, supertuning_state
from jumplora.storage.updates import SparseUpdate, sparse_update

ADVICE = f"peft {peft.__version__} moved it: mend nbs/5_inside/formats.ipynb, or peft's range in settings.ini"
torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's SHiRA leaves it open, and torch warns


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def same_bits(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def random_update(shape, density, generator, size=1e-3):
    delta = size * torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, delta, 0.0)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-t5"])
def learned(request):
    "A base with a few awkward weights, updates of two tasks that need corrections, and the merged model."
    base = load_backbone(request.param, device="cpu", dtype="float32")[0]
    names = [n for n, _ in base.named_modules() if n.split(".")[-1] in ("q_proj", "v_proj", "q", "v")]
    generator, merged = torch.Generator().manual_seed(0), copy.deepcopy(base)
    for i, name in enumerate(names):
        weight = base.get_submodule(name).weight.data
        weight.view(-1)[0] = -0.0  # where the filling goes
        new = weight.clone()
        for size in (0.1, 0.1):  # far enough for float32 to round
            delta = random_update(weight.shape, (0.03, 0.2)[i % 2], generator, size)
            delta.view(-1)[0] = 0.0
            new = torch.where(delta != 0, new + delta, new)
        merged.get_submodule(name).weight.data.copy_(new)
    weights = {n: (merged.get_submodule(n).weight.data, base.get_submodule(n).weight.data) for n in names}
    updates = {name: exact_updates(*pair) for name, pair in weights.items()}
    return base, updates, merged


def logits(model):
    torch.manual_seed(1)
    ids = torch.randint(3, 200, (2, 7))
    both = dict(decoder_input_ids=ids[:, :3]) if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **both).logits


# ---- from one weight to another --------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 3, 12])
def test_the_updates_take_the_base_to_the_merged_weight_bit_for_bit(tasks):
    generator = torch.Generator().manual_seed(tasks)
    base = 0.05 * torch.randn(300, 200, generator=generator)
    merged = base.clone()
    for _ in range(tasks):
        merged = merged + random_update(base.shape, 0.3, generator, 0.05)
    updates = exact_updates(merged, base)
    model = torch.nn.Sequential(torch.nn.Linear(200, 300, bias=False))
    model[0].weight.data = base.clone()
    add_updates(model, {"0": updates})
    assert torch.equal(model[0].weight, merged)
    assert len(updates) == (1 if tasks == 1 else 2)


def test_no_update_is_an_update_without_entries():
    (update,) = exact_updates(torch.ones(2, 3), torch.ones(2, 3))
    assert len(update.values) == 0 and update.shape == (2, 3)


def test_adding_leaves_all_other_entries_their_bits():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model[0].weight.data.fill_(-0.0)
    add_updates(model, {"0": [sparse_update(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))]})
    assert torch.signbit(model[0].weight).sum() == 5 and model[0].weight[0, 1] == 1


def test_merging_leaves_the_base_as_it_was(learned):
    base, updates, merged = learned
    before = copy.deepcopy(base)
    assert same_bits(merged_model(base, updates), merged) and same_bits(base, before)
    assert any(len(parts) == 2 for parts in updates.values()), "no update needs a correction"


# ---- stock PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("form", SPARSE)
def test_stock_peft_comes_to_the_same_bits(learned, form, safe, tmp_path):
    base, updates, merged = learned
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    save_sparse_adapter(updates, tmp_path, form, task_type=kind)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(stock), logits(merged))
    assert not torch.equal(logits(stock), logits(base))
    assert same_bits(stock.merge_and_unload(safe_merge=safe), merged)


def test_filling_with_plus_zero_would_lose_a_sign(learned, monkeypatch, tmp_path):
    base, updates, merged = learned
    pad = formats.F.pad
    monkeypatch.setattr(formats.F, "pad", lambda tensor, room, value=0: pad(tensor, room))
    save_sparse_adapter(updates, tmp_path, "supertuning", task_type="CAUSAL_LM")
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    assert not same_bits(stock, merged)


@pytest.mark.parametrize("form", SPARSE)
def test_an_adapter_says_what_it_is_and_no_path(learned, form, tmp_path):
    base, updates, _ = learned
    save_sparse_adapter(updates, tmp_path, form, task_type="CAUSAL_LM", base_model_name_or_path="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == form.upper() and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "some/base" and config["inference_mode"] is True
    assert config["target_modules"] == sorted(updates)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]


def test_layers_of_the_same_last_name_elsewhere_are_left_alone(learned, tmp_path):
    base, updates, _ = learned
    name = next(iter(updates))
    save_sparse_adapter({name: updates[name]}, tmp_path, task_type="CAUSAL_LM")
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    adapted = [n for n, m in stock.named_modules() if isinstance(m, SupertuningLayer)]
    assert adapted == [f"base_model.model.{name}"]


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.floats(0, 1)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_set_of_shapes_and_densities_has_the_room_that_peft_computes(layers):
    updates = {}
    for i, (rows, columns, share) in enumerate(layers):
        count = round(share * rows * columns)
        positions = torch.arange(count, dtype=torch.int32)
        updates[f"layer{i}"] = [SparseUpdate(positions, torch.ones(count), (rows, columns))]
    settings, tensors = supertuning_state(updates)
    for name, (count, shape) in entries_needed(updates).items():
        room = SupertuningLayer._num_trainable(None, math.prod(shape), settings["sparsity"])
        assert count <= room == len(tensors[f"{name}.supertuning_values"])
        assert tensors[f"{name}.supertuning_values"].count_nonzero() == len(updates[name][0].values)
    try:
        settings, tensors = shira_state(updates)
    except ValueError:
        needed = max(math.ceil(count / sum(shape)) for count, shape in entries_needed(updates).values())
        assert any(needed * sum(shape) > math.prod(shape) for _, shape in entries_needed(updates).values())
        return
    for name, parts in updates.items():
        rows, columns = tensors[f"{name}.shira_indices"]
        values, (height, width) = tensors[f"{name}.shira_weight"], parts[0].shape
        assert len(values) == settings["r"] * (height + width) <= height * width
        assert rows.max() < height and columns.max() < width
        back = torch.zeros(height, width).index_put((rows, columns), values, accumulate=True)
        assert torch.equal(back, parts[0].dense())


def test_filling_adds_only_negative_zeros_at_position_0():
    parts = [SparseUpdate(torch.tensor([3], dtype=torch.int32), torch.tensor([2.0]), (2, 2))] * 2
    positions, values = filled(parts, 4)
    assert positions.tolist() == [3, 3, 0, 0] and values.tolist() == [2, 2, 0, 0]
    assert torch.signbit(values).tolist() == [False, False, True, True]
    assert positions.dtype == torch.int32


def test_what_does_not_fit_is_refused_with_another_format():
    dense = {"wide": [sparse_update(torch.ones(64, 64))], "narrow": [sparse_update(torch.ones(2, 64))]}
    with pytest.raises(ValueError, match="SHiRA needs r=32, and narrow allows 1; use 'supertuning'"):
        shira_state(dense)
    assert supertuning_state(dense)[0] == {"sparsity": 0.0}
    with pytest.raises(ValueError, match="wide needs 8192 entries in 4096 places; use format 'merged'"):
        supertuning_state({"wide": dense["wide"] * 2})
    with pytest.raises(ValueError, match="format='lora' is not known"):
        save_sparse_adapter(dense, "nowhere", "lora")


# ---- the gated adapter -----------------------------------------------------------------------------------


def gated_toy(scope="block"):
    base = load_backbone("tiny-llama", device="cpu", dtype="float32")[0]
    config = JumpLoraConfig(threshold_scope=scope, target_modules=["q_proj", "lm_head"])
    adapted = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(2)
    for group in gate_groups(adapted).values():
        for layer in group.layers.values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        group.gate.set_threshold(0.02)
        group.gate.interpolation.fill_(1.0)
    return base, adapted


@pytest.mark.parametrize("scope", ["model", "block", "layer"])
def test_a_gated_adapter_gates_again_exactly(scope, tmp_path):
    base, adapted = gated_toy(scope)
    save_gated_adapter(adapted, tmp_path, "some/base")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    one, other = delta_weights(adapted), delta_weights(again)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all((delta == 0).any() and (delta != 0).any() for delta in one.values())
    assert torch.equal(logits(adapted), logits(again))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "JUMPLORA" and config["target_modules"] == ["lm_head", "q_proj"]
    assert config["base_model_name_or_path"] == "some/base"


# ---- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (64, 128)])
def test_a_dense_float16_difference_is_smaller_above_a_quarter_and_above_a_sixth(shape):
    for density in (0.1, 0.16, 0.18, 0.24, 0.26, 0.4):
        count = round(density * math.prod(shape))
        update = SparseUpdate(torch.arange(count, dtype=torch.int32), torch.ones(count), shape)
        sizes = format_bytes({"layer": [update]})
        assert (sizes["supertuning"] < sizes["dense float16"]) == (density < 0.25)
        slack = sum(shape) / math.prod(shape)  # SHiRA's count is a multiple of in + out
        if abs(density - 1 / 6) > slack:
            assert (sizes["shira"] < sizes["dense float16"]) == (density < 1 / 6)


def test_computed_sizes_are_those_of_the_files(learned, tmp_path):
    _, updates, _ = learned
    for form in SPARSE:
        save_sparse_adapter(updates, tmp_path / form, form, task_type="CAUSAL_LM")
        tensors = load_file(tmp_path / form / "adapter_model.safetensors")
        assert sum(tensor.nbytes for tensor in tensors.values()) == format_bytes(updates)[form]
    base, adapted = gated_toy()
    updates = {name: [sparse_update(delta)] for name, delta in delta_weights(adapted).items()}
    save_gated_adapter(adapted, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gates = sum(tensor.nbytes for name, tensor in tensors.items() if "lora_gate" in name)
    assert sum(t.nbytes for t in tensors.values()) - gates == format_bytes(updates, rank=8)["jumplora"]
    assert gates < 200


# ---- what is private to PEFT -----------------------------------------------------------------------------


def must(condition, what):
    assert condition, f"{what}; {ADVICE}"


def test_peft_still_names_and_types_the_tensors_as_they_are_written(tmp_path):
    base = load_backbone("tiny-llama", device="cpu", dtype="float32")[0]
    for form, (config, _) in SPARSE.items():
        options = dict(sparsity=0.9) if form == "supertuning" else dict(r=2, random_seed=0)
        name = "model.layers.0.self_attn.q_proj"
        model = get_peft_model(copy.deepcopy(base), config(target_modules=[name], **options))
        own = get_peft_model_state_dict(model)
        save_sparse_adapter({name: [sparse_update(torch.eye(64))]}, tmp_path, form, task_type="CAUSAL_LM")
        ours = load_file(tmp_path / "adapter_model.safetensors")
        must(ours.keys() == own.keys(), f"{form} is saved as {sorted(own)}")
        for key, tensor in ours.items():
            must(own[key].dtype == tensor.dtype, f"{key} is {own[key].dtype}")
            must(own[key].ndim == tensor.ndim, f"{key} has shape {tuple(own[key].shape)}")


def test_peft_still_computes_the_room_of_a_layer_as_is_assumed():
    found = inspect.signature(SupertuningLayer._num_trainable)
    must(list(found.parameters) == ["self", "num_params", "sparsity"], f"_num_trainable takes {found}")
    must(SupertuningLayer._num_trainable(None, 100, 0.75) == 25, "it counts in another way")
    must(hasattr(ShiraModel, "_remap_adapter_state_dict_for_load"), "SHiRA reads its positions elsewhere")


def test_peft_refuses_tensors_of_another_length(learned, tmp_path):
    base, updates, _ = learned
    save_sparse_adapter(updates, tmp_path, "supertuning", task_type="CAUSAL_LM")
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor[:-1] for key, tensor in load_file(path).items()}, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
