"""An export: the files to the last bit, what the card says, and what never leaves the machine."""

import copy
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import peft
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, SupertuningConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.supertuning.layer import SupertuningLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jumplora.command_line import main
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.evaluation import Score
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.storage import export
from jumplora.storage.export import (
    FORMATS,
    exact_updates,
    export_run,
    files_to_push,
    load_finished,
    merged_model,
    push_to_hub,
    save_sparse_adapter,
)
from jumplora.storage.record import Run
from jumplora.storage.state import load_start
from jumplora.storage.updates import SparseUpdate, sparse_update

NOTE = "a | different <b>sample</b>\n---\nlicense: stolen"
BALL = [("a ball", "sport"), ("an atom", "physics")] * 6
RAIN = [("rain", "yes"), ("sun", "no")] * 6
TASKS = (
    Task("topics", "Topic?\n```\n---\n", ("sport", "physics"), BALL, BALL[:2], BALL[:4], note=NOTE),
    Task("weather", "Wet?\n", ("yes", "no"), RAIN, RAIN[:2], RAIN[:4]),
)
LATE = dict(gate_start=0.6, gate_stop=0.9, kept=0.05, threshold_scope="layer")
QUICK = TrainConfig(batch_size=6, epochs=2, learning_rate=1e-2, max_length=120, **LATE)
GATED, KEPT = Method("IncLoRA + JumpLoRA", gated=True), Method("kept", gated=True, after_task="keep")
TINY = dict(base="tiny-llama", t5="tiny-t5")


def bits(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def same_bits(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with three bases in it: a decoder with a card, the same with tied weights, an encoder-decoder."
    place = tmp_path_factory.mktemp("place")
    for name, tiny in TINY.items():
        for part in load_backbone(tiny, device="cpu", dtype="float32"):
            part.save_pretrained(place / name)
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for part in (model, tokenizer):
        part.save_pretrained(place / "tied")
    return place


def score_of(*percents):
    "A score of four rows, of which so many percent are right."
    return Score(("",) * 4, *(tuple(25 * row < percent for row in range(4)) for percent in percents))


def learn(place, method=GATED, base="base", dtype="float32", config=QUICK, tasks=TASKS, **options):
    "One quick run with invented scores; its folder, and the model that it ended with."
    model, tokenizer = load_backbone(str(place / base), device="cpu", dtype=dtype)
    options = dict(seed=1, out=place / "runs", progress=False, zero_shot=False) | options
    sequence, scores = TaskSequence("short", tasks), iter([(75.0, 50.0), (25.0, 100.0), (50.0, 75.0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "evaluate", lambda *args, **options: score_of(*next(scores)))
        about = dict(backbone=str(place / base)) | options
        run = learn_sequence(model, tokenizer, sequence, method, config, **about)
    return place / "runs" / run.name, model


@pytest.fixture(scope="module")
def run(place):
    return learn(place)


@pytest.fixture(scope="module")
def kept(place):
    return learn(place, KEPT, tasks=TASKS[:1])[0]


@pytest.fixture(scope="module")
def half(place):
    return learn(place, dtype="bfloat16", tasks=TASKS[:1])


@pytest.fixture(scope="module")
def t5(place):
    return learn(place, base="t5", tasks=TASKS[:1])


@pytest.fixture(scope="module")
def exports(place, run, half, t5):
    "name -> the run behind it; the exports lie beside the bases, so that a card's code finds both."
    asked = {
        "whole": (run[0], "merged", None),
        "super": (run[0], "supertuning", None),
        "weather": (run[0], "supertuning", "weather"),
        "half": (half[0], "supertuning", None),
        "t5-whole": (t5[0], "merged", None),
        "t5-super": (t5[0], "supertuning", None),
    }
    for name, (folder, form, task) in asked.items():
        export_run(folder, place / name, form, task=task)
    return {name: (folder, task) for name, (folder, _, task) in asked.items()}


def code_of(card):
    return re.search(r"```python\n(.*?)\n```", card.read_text(), re.S)[1]


STOCK = """
import sys
sys.modules["jumplora"] = None  # an import of it fails
import re, torch
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
for name in sys.argv[1:]:
    found = {}
    exec(re.search(r"```python\\n(.*?)\\n```", Path(name, "README.md").read_text(), re.S)[1], found)
    model = found["model"].eval()
    ids = torch.arange(3, 17).view(2, 7)
    both = dict(decoder_input_ids=ids[:, :3]) if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **both).logits
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_file({"logits": logits, **weights}, f"{name}.stock")
assert not [name for name in sys.modules if name.startswith("jumplora.")]
"""


@pytest.fixture(scope="module")
def stock(place, exports):
    "name -> logits and merged weights, as a Python without this package computes them from the card's code."
    words = [sys.executable, "-W", "ignore", "-c", STOCK, *exports]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: load_file(place / f"{name}.stock") for name in exports}


# ---- the files -------------------------------------------------------------------------------------------

NAMES = ("whole", "super", "weather", "half", "t5-whole", "t5-super")


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_card_gives_the_same_bits_without_this_package(name, stock, exports):
    finished = load_finished(*exports[name])
    ours, found = merged_model(finished.base, finished.updates), dict(stock[name])
    ids = torch.arange(3, 17).view(2, 7)
    both = dict(decoder_input_ids=ids[:, :3]) if ours.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = ours(input_ids=ids, **both).logits
        before = finished.base(input_ids=ids, **both).logits
    assert torch.equal(found.pop("logits"), logits) and not torch.equal(before, logits)
    assert same_bits(found, ours.state_dict())


@pytest.mark.parametrize("kind", ["run", "t5"])
def test_the_merged_model_is_the_one_that_the_run_ended_with(kind, request, place, exports):
    model = request.getfixturevalue(kind)[1]
    model_name, folder = ("base", place / "whole") if kind == "run" else ("t5", place / "t5-whole")
    saved = load_backbone(str(folder), device="cpu", dtype="float32")[0]
    assert same_bits(saved.state_dict(), model.state_dict())
    tokenizers = [AutoTokenizer.from_pretrained(place / name) for name in (folder.name, model_name)]
    assert tokenizers[0]("two atoms").input_ids == tokenizers[1]("two atoms").input_ids


def test_the_updates_of_the_tasks_add_up_to_the_run(run):
    model, learned = load_finished(run[0]).base, run[1]
    for task in ("topics", "weather"):
        finished = load_finished(run[0], task)
        assert all(len(parts) == 1 for parts in finished.updates.values())
        model = merged_model(model, finished.updates)
    assert same_bits(model.state_dict(), learned.state_dict())


def test_a_kept_gated_adapter_gates_again_exactly(kept, place, monkeypatch):
    export_run(kept, place / "gated", "jumplora")
    monkeypatch.chdir(place)
    found = {}
    exec(code_of(place / "gated" / "README.md"), found)
    finished = load_finished(kept)
    ours = merged_model(finished.base, finished.updates).state_dict()
    assert same_bits(found["model"].merge_and_unload().state_dict(), ours)
    config = json.loads((place / "gated" / "adapter_config.json").read_text())
    assert config["peft_type"] == "JUMPLORA" and config["target_modules"] == sorted(config["target_modules"])
    assert (place / "gated" / "adapter_model.safetensors").stat().st_size < 60_000


def test_the_same_export_has_the_same_bytes(run, kept, place, exports):
    for name, folder, form in (("super", run[0], "supertuning"), ("gated", kept, "jumplora")):
        for place_ in ("a", "b"):
            export_run(folder, place / "twice" / place_ / name, form)
        one, other = (sorted((place / "twice" / p / name).iterdir()) for p in ("a", "b"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_an_export_is_safetensors_and_text_and_names_no_folder_of_this_machine(place, exports):
    for name in exports:
        files = [path for path in (place / name).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".json", ".md", ".safetensors", ".jinja"}
        for path in files:
            content = path.read_bytes()
            assert str(place).encode() not in content and place.name.encode() not in content, path


# ---- the sparse file and the updates in it -----------------------------------------------------------


ADVICE = f"peft {peft.__version__} moved it: mend nbs/5_inside/export.ipynb, or peft's range in settings.ini"


def random_update(shape, density, generator, size=1e-3):
    delta = size * torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, delta, 0.0)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-t5"])
def awkward(request):
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
    assert torch.equal(merged_model(model, {"0": updates})[0].weight, merged)
    assert torch.equal(model[0].weight, base) and len(updates) == (1 if tasks == 1 else 2)


def test_no_update_is_an_update_without_entries_and_adding_leaves_other_entries_their_bits():
    (update,) = exact_updates(torch.ones(2, 3), torch.ones(2, 3))
    assert len(update.values) == 0 and update.shape == (2, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model[0].weight.data.fill_(-0.0)
    one = [sparse_update(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))]
    model = merged_model(model, {"0": one})
    assert torch.signbit(model[0].weight).sum() == 5 and model[0].weight[0, 1] == 1


@pytest.mark.parametrize("safe", [True, False])
def test_stock_peft_comes_to_the_same_bits(awkward, safe, tmp_path):
    base, updates, merged = awkward
    assert any(len(parts) == 2 for parts in updates.values()), "no update needs a correction"
    assert same_bits(merged_model(base, updates).state_dict(), merged.state_dict())
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    save_sparse_adapter(updates, tmp_path, task_type=kind, base_model_name_or_path="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = dict(peft_type="SUPERTUNING", task_type=kind, base_model_name_or_path="some/base")
    assert wanted.items() <= config.items() and config["inference_mode"] is True
    assert config["target_modules"] == sorted(updates) and len(list(tmp_path.iterdir())) == 2
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(stock), logits(merged)) and not torch.equal(logits(stock), logits(base))
    assert same_bits(stock.merge_and_unload(safe_merge=safe).state_dict(), merged.state_dict())


def test_layers_of_the_same_last_name_elsewhere_are_left_alone(awkward, tmp_path):
    base, updates, _ = awkward
    name = next(iter(updates))
    save_sparse_adapter({name: updates[name]}, tmp_path, task_type="CAUSAL_LM")
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    adapted = [n for n, m in stock.named_modules() if isinstance(m, SupertuningLayer)]
    assert adapted == [f"base_model.model.{name}"]


LAYERS = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.floats(0, 1)), min_size=1, max_size=5)


@given(LAYERS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_set_of_shapes_and_densities_has_the_room_that_peft_computes(tmp_path_factory, layers):
    updates, folder = {}, tmp_path_factory.getbasetemp() / "room"
    for i, (rows, columns, share) in enumerate(layers):
        positions = torch.arange(round(share * rows * columns), dtype=torch.int32)
        updates[f"layer{i}"] = [SparseUpdate(positions, torch.ones(len(positions)), (rows, columns))]
    save_sparse_adapter(updates, folder)
    sparsity = json.loads((folder / "adapter_config.json").read_text())["sparsity"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, (update,) in updates.items():
        values, positions = (
            tensors[f"base_model.model.{name}.supertuning_{p}"] for p in ("values", "indices")
        )
        room = SupertuningLayer._num_trainable(None, math.prod(update.shape), sparsity)
        assert max(1, len(update.values)) <= room == len(values) == len(positions)
        assert torch.equal(values[: len(update.values)], update.values) and positions.dtype == torch.int32
        free = values[len(update.values) :]  # only negative zeros, at position 0
        assert not free.count_nonzero() and torch.signbit(free).all()
        assert not positions[len(update.values) :].any()


def test_an_update_with_more_entries_than_places_is_refused_and_a_dense_one_fits(tmp_path):
    dense = {"wide": [sparse_update(torch.ones(64, 64))]}
    with pytest.raises(ValueError, match="wide needs 8192 entries in 4096 places; use format 'merged'"):
        save_sparse_adapter({"wide": dense["wide"] * 2}, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    save_sparse_adapter(dense, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["sparsity"] == 0.0


def test_peft_still_names_types_and_counts_the_tensors_as_they_are_written(awkward, tmp_path):
    base, updates, _ = awkward
    name = next(iter(updates))
    config = SupertuningConfig(target_modules=[name], sparsity=0.9)
    own = get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), config))
    save_sparse_adapter({name: updates[name]}, tmp_path, task_type="CAUSAL_LM")
    path = tmp_path / "adapter_model.safetensors"
    ours = load_file(path)
    about = {key: (tensor.dtype, tensor.ndim) for key, tensor in own.items()}
    assert {key: (tensor.dtype, tensor.ndim) for key, tensor in ours.items()} == about, ADVICE
    found = inspect.signature(SupertuningLayer._num_trainable)
    assert list(found.parameters) == ["self", "num_params", "sparsity"], ADVICE
    save_file({key: tensor[:-1] for key, tensor in ours.items()}, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


# ---- bfloat16, and weights with two owners ---------------------------------------------------------------


def test_a_bfloat16_run_is_exported_in_float32_and_the_card_says_why(half, place, exports):
    folder, learned = half
    export_run(folder, place / "half-whole")
    saved = AutoModelForCausalLM.from_pretrained(place / "half-whole", dtype="auto")
    state = load_file(next((folder / "state").glob("*.safetensors")))
    sums = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    assert saved.dtype == torch.float32 and sums
    for name, merged in sums.items():
        assert torch.equal(bits(saved.get_submodule(name).weight), bits(merged))
    assert same_bits({k: v.bfloat16() for k, v in saved.state_dict().items()}, learned.state_dict())
    assert any(not torch.equal(merged, merged.bfloat16().float()) for merged in sums.values())
    for name in ("half", "half-whole"):
        assert "The run computed with bfloat16 weights" in (place / name / "README.md").read_text()
    assert 'dtype="bfloat16").float()' in code_of(place / "half" / "README.md")
    assert "bfloat16" not in (place / "super" / "README.md").read_text()


def test_an_update_added_in_bfloat16_is_partly_lost(half):
    finished = load_finished(half[0])
    name, (update, *_) = next(iter(finished.updates.items()))
    weight = finished.base.get_submodule(name).weight.detach().bfloat16()
    arrived = (weight + update.dense().bfloat16()).float() - weight.float()
    assert not torch.equal(arrived, update.dense())


@pytest.fixture(scope="module")
def tied(place):
    asked = dict(q=(GATED, "q_proj"), head=(GATED, "lm_head"), kept=(KEPT, "lm_head"))
    return {
        name: learn(place, method, "tied", config=replace(QUICK, target_modules=(target,)), tasks=TASKS[:1])
        for name, (method, target) in asked.items()
    }


def test_tied_weights_stay_tied_in_a_merged_export(tied, place):
    for name in ("q", "head"):
        folder, learned = tied[name]
        export_run(folder, place / f"tied-{name}")
        saved = AutoModelForCausalLM.from_pretrained(place / f"tied-{name}", dtype="float32")
        assert saved.lm_head.weight is saved.model.embed_tokens.weight
        assert same_bits(saved.state_dict(), learned.state_dict())
    export_run(tied["q"][0], place / "tied-sparse", "supertuning")


@pytest.mark.parametrize(
    ("name", "form", "good"),
    [
        ("head", "supertuning", "merged"),
        ("kept", "merged", "jumplora"),
        ("kept", "supertuning", "jumplora"),
    ],
)
def test_a_format_that_would_untie_a_weight_is_refused(tied, place, name, form, good):
    with pytest.raises(ValueError, match=f"embed_tokens and lm_head share a weight.*use '{good}'"):
        export_run(tied[name][0], place / "never", form)
    assert not (place / "never").exists()


# ---- the card --------------------------------------------------------------------------------------------


def parts_of(card):
    "The YAML and the text of a card, split as YAML front matter is."
    _, front, text = re.split(r"^---$", card.read_text(), maxsplit=2, flags=re.M)
    return yaml.safe_load(front), text


def test_the_metadata_of_a_card_is_yaml_that_the_library_reads_back(place, exports, run):
    data, _ = parts_of(place / "super" / "README.md")
    record = Run.load(run[0])
    assert data["library_name"] == "peft" and data["license"] == "mit"
    assert {"jumplora", "continual-learning", "supertuning"} <= set(data["tags"])
    assert parts_of(place / "whole" / "README.md")[0]["library_name"] == "transformers"
    results = ModelCard.load(place / "super" / "README.md").data.eval_results
    found = {result.dataset_name: result.metric_value for result in results}
    last = dict(zip(record.tasks, record.accuracy[-1], strict=True))
    assert found == pytest.approx(last | {"all of short": record.average_accuracy})
    assert {result.metric_type for result in results} == {"exact_match"}
    assert {result.dataset_split for result in results} == {"test"}


def test_the_text_of_a_card_has_scores_settings_and_how_to_ask(place, exports, run):
    text, record = parts_of(place / "super" / "README.md")[1], Run.load(run[0])
    for j, task in enumerate(record.tasks):
        assert f"| {task} | 4 | {record.accuracy[j, j]:.1f} | {record.accuracy[-1, j]:.1f} | " in text
    assert f"| mean of 2 | 8 | {record.just_learned:.1f} | {record.average_accuracy:.1f} | |" in text
    assert "Exact match of test rows, one seed." in text and "The prompt of the task topics:" in text
    assert "after learning topics, then weather (IncLoRA + JumpLoRA; format supertuning)" in text
    for setting in ("train.learning_rate 0.01", "method.gated True", "seed 1"):
        assert f", {setting}," in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "Licence: mit." in text
    counts = [len(parts[0].values) for parts in load_finished(run[0]).updates.values()]
    sizes = sum(math.prod(parts[0].shape) for parts in load_finished(run[0]).updates.values())
    share = f"{sum(counts) / sizes:.2%}"
    assert f"{sum(counts)} of {sizes} weights in {len(counts)} layers differ from the base ({share})" in text
    assert len(code_of(place / "super" / "README.md").replace("\n\n", "\n").splitlines()) <= 5
    assert len(text.splitlines()) < 50


def test_text_of_others_stays_inside_its_cell_and_its_block(place, exports):
    data, text = parts_of(place / "super" / "README.md")
    assert data["license"] == "mit"
    assert r"| a \| different &lt;b>sample&lt;/b> --- license: stolen |" in text
    assert "\n    ```\n    ---\n" in text and text.count("\n```") == 2
    assert not re.search(r"^(---|license: stolen)", text, re.M)


def test_one_task_alone_has_no_scores_of_its_own(place, exports):
    data, text = parts_of(place / "weather" / "README.md")
    assert "model-index" not in data and "was not scored alone" in text
    assert "the update of task weather alone" in text and "prompt of the task weather" in text


def base_on_card(monkeypatch, run, out, backbone, **about):
    "Metadata and text of the card of a run on another backbone, of which only the name is looked at."
    start = load_start(Run.load(run[0]), device="cpu")
    monkeypatch.setattr(export, "load_start", lambda run, **options: start)
    real = Run.load
    monkeypatch.setattr(export.Run, "load", lambda folder: replace(real(folder), backbone=backbone))
    return parts_of(export_run(run[0], out, "supertuning", **about) / "README.md")


@pytest.mark.parametrize(
    "backbone, about, license, id",
    [
        ("base", {}, "mit", None),
        ("base", dict(license="apache-2.0", base_model="some/mine"), "apache-2.0", "some/mine"),
        ("t5", {}, None, None),
        ("tiny-llama", {}, None, None),
        ("smollm2-135m", {}, "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("some/base", {}, "other", "some/base"),
        ("some/other", {}, None, "some/other"),
        ("t5-large", {}, None, "t5-large"),  # the oldest bases have no owner
    ],
)
def test_a_licence_is_given_or_read_and_never_invented(
    place, run, tmp_path, monkeypatch, backbone, about, license, id
):
    stated = ModelCard("---\nlicense: other\nlicense_name: its-own\n---\n")
    real, hub = ModelCard.load, {"some/base": stated}
    monkeypatch.setattr(ModelCard, "load", lambda c, **o: real(c, **o) if isinstance(c, Path) else hub[c])
    local = str(place / backbone) if backbone in TINY else backbone
    data, text = base_on_card(monkeypatch, run, tmp_path / "out", local, **about)
    assert (data.get("license"), data.get("base_model")) == (license, id)
    assert data.get("license_name") == ("its-own" if license == "other" else None)
    assert f"Base: {id or backbone}. Licence: {license or 'not known here'}" in text
    if backbone == "smollm2-135m":  # the Hub has other weights than the package
        assert 'load_backbone("smollm2-135m", dtype="float32")[0]' in text and "AutoModel" not in text
        assert "PEFT, 0.21 or newer, and jumplora for the base." in text and "4-bit" in text


@pytest.mark.parametrize("front", ["license: [", "- a list", "license: 3", ""])
def test_a_damaged_card_of_the_base_states_nothing(front, run, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert "license" not in base_on_card(monkeypatch, run, tmp_path / "out", str(tmp_path))[0]


def test_a_card_without_a_known_licence_says_so_and_has_no_field_for_it(t5, place, exports):
    data, text = parts_of(place / "t5-super" / "README.md")
    assert "license" not in data and "base_model" not in data
    assert "Licence: not known here" in text and "Base: t5." in text


def test_a_given_base_and_licence_are_on_the_card_and_in_the_configuration(t5, place):
    about = dict(base_model="some/t5", license="apache-2.0", repo_id="some/export")
    folder = export_run(t5[0], place / "given", "supertuning", **about)
    data, _ = parts_of(folder / "README.md")
    assert (data["base_model"], data["base_model_relation"]) == ("some/t5", "adapter")
    assert data["license"] == "apache-2.0"
    assert 'AutoModelForSeq2SeqLM.from_pretrained("some/t5"' in code_of(folder / "README.md")
    assert 'from_pretrained(base, "some/export")' in code_of(folder / "README.md")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/t5"


# ---- what is refused -------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_as_it_is(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        export_run(run[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="is not empty"):
        export_run(run[0], tmp_path / "mine.txt")


def test_an_empty_folder_and_one_in_a_folder_that_is_not_there_are_fine(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "deep" / "er"):
        assert export_run(run[0], out, "supertuning") == out and (out / "README.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(format="shira"), "format='shira' is not known; use 'merged', 'jumplora' or 'supertuning'"),
        (dict(format="supertuned"), "format='supertuned' is not known.*did you mean 'supertuning'"),
        (dict(task="wether"), "task='wether' is not known.*did you mean 'weather'"),
        (dict(task="../../weather"), "task='../../weather' is not known"),
        (dict(format="jumplora"), "has kept no adapter; use format 'supertuning'"),
        (dict(format="jumplora", task="weather"), "has kept no adapter"),
        (dict(repo_id="no-owner"), "repo_id='no-owner' has no owner; use OWNER/NAME"),
        (dict(repo_id=""), "repo_id='' is no Hub id"),
        (dict(repo_id="a/b/c"), "repo_id='a/b/c' is no Hub id"),
        (dict(base_model="../x"), "base_model='../x' is no Hub id"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_run(run[0], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_a_gate_is_not_called_gated(place, tmp_path):
    folder, _ = learn(place, Method("SeqLoRA", after_task="keep"), tasks=TASKS[:1])
    with pytest.raises(ValueError, match="has kept an adapter without a gate"):
        export_run(folder, tmp_path / "out", "jumplora")
    export_run(folder, tmp_path / "dense", "supertuning")
    assert json.loads((tmp_path / "dense" / "adapter_config.json").read_text())["sparsity"] == 0.0


def test_a_task_without_an_archive_is_refused(kept, tmp_path):
    with pytest.raises(ValueError, match="keeps no update of 'topics' alone; export it without a task"):
        export_run(kept, tmp_path / "out", task="topics")


def test_another_base_a_damaged_state_and_a_damaged_archive_are_refused(place, run, tmp_path, monkeypatch):
    folder = tmp_path / run[0].name
    shutil.copytree(run[0], folder)
    archive, state = (next(folder.glob(name)) for name in ("updates/*weather*", "state/*.safetensors"))
    for path, options in ((archive, dict(task="weather")), (state, {})):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged|was changed"):
            load_finished(folder, **options)
    model, tokenizer = load_backbone(str(place / "base"), device="cpu", dtype="float32")
    model.lm_head.weight.data[0, 0] += 1
    monkeypatch.setattr(
        sys.modules[load_start.__module__], "load_backbone", lambda *a, **k: (model, tokenizer)
    )
    with pytest.raises(ValueError, match="has other weights than the backbone"):
        load_finished(run[0])


def test_a_run_that_was_stopped_is_exported_as_far_as_it_got(place, monkeypatch, tmp_path):
    real, begun = continual.train_task, []

    def once(*args, **options):
        begun.append(1)
        if len(begun) > 1:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(continual, "train_task", once)
    with pytest.raises(KeyboardInterrupt):
        learn(place, out=tmp_path / "runs", seed=2)
    (folder,) = (tmp_path / "runs").iterdir()
    data, text = parts_of(export_run(folder, tmp_path / "out") / "README.md")
    assert len(data["model-index"][0]["results"]) == 1 and "backward transfer" not in text
    assert "| weather |" not in text and "after learning topics (" in text
    with pytest.raises(ValueError, match="task='weather' is not known"):
        load_finished(folder, "weather")
    begun.append(1)
    with pytest.raises(KeyboardInterrupt):
        learn(place, out=tmp_path / "none", seed=3)
    fresh = copy.deepcopy(Run.load(folder))
    fresh.accuracy[:], fresh.right = math.nan, {}
    del fresh.extra["state_tasks"]
    with pytest.raises(ValueError, match="has finished no task yet"):
        load_finished(fresh.save(tmp_path / "none").parent)


def test_an_export_is_whole_or_not_there(run, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(ModelCard, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export_run(run[0], tmp_path / "out", "supertuning")
    assert not list(tmp_path.iterdir())


# ---- the Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    "The Hub's interface, signatures included, and nothing behind it."
    api = create_autospec(HfApi, instance=True)
    api.upload_folder.return_value = "https://huggingface.co/some/export/commit/1"
    return api


def test_a_push_makes_the_repository_and_then_sends_the_listed_files(hub, place, exports):
    assert push_to_hub(place / "super", "some/export", private=True, api=hub).endswith("/commit/1")
    (made, sent) = hub.mock_calls
    assert made[0] == "create_repo" and made[1:] == (("some/export",), dict(private=True, exist_ok=True))
    assert sent[0] == "upload_folder" and sent[2]["repo_id"] == "some/export"
    assert Path(sent[2]["folder_path"]) == place / "super"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sent[2]["allow_patterns"] == names == list(files_to_push(place / "super"))


@pytest.mark.parametrize("name", ["export", "a/b/c", "a/", "/b", "some/ex port", "some/--x", "", "a/b.git"])
def test_an_impossible_name_reaches_no_hub(hub, place, exports, name):
    with pytest.raises(ValueError, match="use OWNER/NAME"):
        push_to_hub(place / "super", name, api=hub)
    assert not hub.mock_calls


def test_a_folder_that_is_no_export_or_holds_more_reaches_no_hub(hub, place, run, exports, tmp_path):
    with pytest.raises(ValueError, match="has no README.md"):
        push_to_hub(run[0] / "updates", "some/export", api=hub)
    shutil.copytree(place / "super", tmp_path / "more")
    (tmp_path / "more" / "deep").mkdir()
    (tmp_path / "more" / "deep" / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds .'weights.bin'.*move them away"):
        push_to_hub(tmp_path / "more", "some/export", api=hub)
    shutil.rmtree(tmp_path / "more" / "deep")
    (tmp_path / "more" / "link.json").symlink_to(place / "base" / "config.json")
    with pytest.raises(ValueError, match="link.json"):
        push_to_hub(tmp_path / "more", "some/export", api=hub)
    assert not hub.mock_calls


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command_writes_an_export_and_lists_it(run, tmp_path, capsys):
    words = [str(run[0] / "record.json"), "--format", "supertuning", "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said and f"written to {tmp_path / 'out'}" in said
    assert main(["export", *words]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_dry_run_writes_and_sends_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "HfApi", lambda: pytest.fail("the Hub was asked"))
    words = ["export", str(run[0]), "--out", str(tmp_path / "out"), "--push", "some/export", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "would be written to" in said and "some/export" in said
    assert not list(tmp_path.iterdir())


def test_the_command_pushes_what_it_has_written(run, tmp_path, capsys, monkeypatch, hub):
    monkeypatch.setattr(export, "HfApi", lambda: hub)
    words = ["export", str(run[0]), "--format", "supertuning", "--out", str(tmp_path / "out")]
    assert main([*words, "--task", "topics", "--push", "some/export", "--private"]) == 0
    assert capsys.readouterr().out.endswith("/commit/1\n")
    assert [call[0] for call in hub.mock_calls] == ["create_repo", "upload_folder"]
    assert hub.create_repo.call_args.kwargs["private"] is True
    assert '"some/export"' in code_of(tmp_path / "out" / "README.md")


@pytest.mark.parametrize(
    "words",
    [["--format", "onnx"], ["--task", "nothing"], ["--push", "nobody"], ["--base-model", "x/y/z"]],
    ids=str,
)
def test_a_wrong_flag_ends_with_2(run, tmp_path, capsys, words):
    assert main(["export", str(run[0]), "--out", str(tmp_path / "out"), *words]) == 2
    assert "jumplora: " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_formats_of_the_command_and_of_the_page_are_the_same(capsys):
    assert main(["export", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(form in said for form in FORMATS)
