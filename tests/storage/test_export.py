"""An export: the files to the last bit, what the card says, and what never leaves the machine."""

import copy
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jumplora.command_line import main
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.continual import Method, learn_sequence
from jumplora.learning.evaluation import Score
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.storage import export
from jumplora.storage.export import (
    _find_origin,
    exact_updates,
    export_run,
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


@torch.no_grad()
def logits(model):
    ids = torch.arange(3, 17).view(2, 7)
    both = dict(decoder_input_ids=ids[:, :3]) if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **both).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with two bases in it: a decoder with a card, and an encoder-decoder."
    place = tmp_path_factory.mktemp("place")
    for name, tiny in TINY.items():
        model, tokenizer = load_backbone(tiny, device="cpu", dtype="float32")
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    return place


def learn(place, method=GATED, base="base", dtype="float32", config=QUICK, tasks=TASKS, **options):
    "One quick run with invented scores of four rows; its folder, and the model that it ended with."
    model, tokenizer = load_backbone(str(place / base), device="cpu", dtype=dtype)
    scores = iter([(75.0, 50.0), (25.0, 100.0), (50.0, 75.0)])

    def invented(*args, **options):
        return Score(("",) * 4, *(tuple(25 * row < score for row in range(4)) for score in next(scores)))

    options = dict(out=place / "runs", seed=1, backbone=str(place / base)) | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "evaluate", invented)
        run = learn_sequence(
            model, tokenizer, TaskSequence("short", tasks), method, config, progress=False, zero_shot=False,
            **options,
        )  # fmt: skip
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
        "whole": (run, "merged", None),
        "super": (run, "supertuning", None),
        "weather": (run, "supertuning", "weather"),
        "half": (half, "supertuning", None),
        "half-whole": (half, "merged", None),
        "t5-whole": (t5, "merged", None),
        "t5-super": (t5, "supertuning", None),
    }
    for name, (learned, form, task) in asked.items():
        export_run(learned[0], place / name, form, task=task)
    return {name: (learned, task) for name, (learned, _, task) in asked.items()}


def parts_of(folder):
    "The YAML and the text of a card, split as YAML front matter is, and the code in it."
    _, front, text = re.split(r"^---$", (folder / "README.md").read_text(), maxsplit=2, flags=re.M)
    return yaml.safe_load(front), text, re.search(r"```python\n(.*?)\n```", text, re.S)[1]


STOCK = """
import sys
import warnings
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


# ---- the files -------------------------------------------------------------------------------------------


def test_the_code_of_a_card_gives_the_bits_of_the_run_without_this_package(place, exports):
    words = [sys.executable, "-W", "ignore", "-c", STOCK, *exports]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, ((folder, learned), task) in exports.items():
        finished = load_finished(folder, task)
        ours, found = merged_model(finished.base, finished.updates), load_file(place / f"{name}.stock")
        assert torch.equal(found.pop("logits"), logits(ours)), name
        assert same_bits(found, ours.state_dict()), name
        assert not torch.equal(logits(ours), logits(finished.base))
        if task is None and "half" not in name:
            assert same_bits(found, learned.state_dict())
    for pair in (("whole", "base"), ("t5-whole", "t5")):
        one, other = (AutoTokenizer.from_pretrained(place / name) for name in pair)
        assert one("two atoms").input_ids == other("two atoms").input_ids


def test_the_updates_of_the_tasks_add_up_to_the_run(run):
    model = load_finished(run[0]).base
    for task in ("topics", "weather"):
        model = merged_model(model, load_finished(run[0], task).updates)
    assert same_bits(model.state_dict(), run[1].state_dict())


def test_a_kept_gated_adapter_gates_again_exactly(kept, place, monkeypatch):
    export_run(kept, place / "gated", "jumplora")
    monkeypatch.chdir(place)
    found = {}
    exec(parts_of(place / "gated")[2], found)
    finished = load_finished(kept)
    ours = merged_model(finished.base, finished.updates).state_dict()
    assert same_bits(found["model"].merge_and_unload().state_dict(), ours)
    config = json.loads((place / "gated" / "adapter_config.json").read_text())
    assert config["peft_type"] == "JUMPLORA" and config["target_modules"] == sorted(config["target_modules"])
    assert (place / "gated" / "adapter_model.safetensors").stat().st_size < 60_000


def test_the_same_export_has_the_same_bytes_and_names_no_folder_of_this_machine(place, run, kept, exports):
    for name, folder, form in (("super", run[0], "supertuning"), ("gated", kept, "jumplora")):
        twice = [export_run(folder, place / "twice" / part / name, form) for part in "ab"]
        one, other = (sorted(out.iterdir()) for out in twice)
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    for out in (*(place / name for name in exports), *twice):
        for path in out.rglob("*.*"):
            assert path.suffix in {".json", ".md", ".safetensors", ".jinja"}
            assert place.name.encode() not in path.read_bytes(), path


# ---- the sparse file and the updates in it -----------------------------------------------------------


ADVICE = f"peft {peft.__version__} moved it: mend nbs/5_inside/export.ipynb, or peft's range in settings.ini"


def random_update(shape, density, generator, size):
    delta = size * torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, delta, 0.0)


@pytest.mark.parametrize("tasks", [0, 1, 3, 12])
def test_the_updates_take_the_base_to_the_merged_weight_bit_for_bit(tasks):
    generator = torch.Generator().manual_seed(tasks)
    base = 0.05 * torch.randn(300, 200, generator=generator)
    base[0] = -0.0
    merged = base.clone()
    for _ in range(tasks):
        merged[1:] = merged[1:] + random_update((299, 200), 0.3, generator, 0.05)
    updates = exact_updates(merged, base)
    assert len(updates) == (1 if tasks < 2 else 2) and (tasks or not len(updates[0].values))
    model = torch.nn.Sequential(torch.nn.Linear(200, 300, bias=False))
    model[0].weight.data = base.clone()
    assert torch.equal(bits(merged_model(model, {"0": updates})[0].weight), bits(merged))
    assert torch.equal(bits(model[0].weight), bits(base))


@pytest.mark.parametrize("name, safe", [("tiny-llama", True), ("tiny-llama", False), ("tiny-t5", False)])
def test_stock_peft_comes_to_the_same_bits_and_leaves_other_layers_alone(name, safe, tmp_path):
    base = load_backbone(name, device="cpu", dtype="float32")[0]
    names = [n for n, _ in base.named_modules() if n.split(".")[-1] in ("q_proj", "v_proj", "q", "v")][:3]
    generator, merged, updates = torch.Generator().manual_seed(0), copy.deepcopy(base), {}
    for i, layer in enumerate(names):
        weight = base.get_submodule(layer).weight.data
        weight.view(-1)[0] = -0.0  # where the filling goes
        new = weight.clone()
        for _ in range(2):  # far enough for float32 to round
            delta = random_update(weight.shape, (0.03, 0.2)[i % 2], generator, 0.1)
            delta.view(-1)[0] = 0.0
            new = torch.where(delta != 0, new + delta, new)
        merged.get_submodule(layer).weight.data.copy_(new)
        updates[layer] = exact_updates(new, weight)
    assert any(len(parts) == 2 for parts in updates.values()), "no update needs a correction"
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    save_sparse_adapter(updates, tmp_path, task_type=kind, base_model_name_or_path="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = dict(peft_type="SUPERTUNING", task_type=kind, base_model_name_or_path="some/base")
    assert wanted.items() <= config.items() and config["inference_mode"] is True
    assert config["target_modules"] == sorted(updates) and len(list(tmp_path.iterdir())) == 2
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    adapted = [n for n, m in stock.named_modules() if isinstance(m, SupertuningLayer)]
    assert adapted == [f"base_model.model.{layer}" for layer in names]
    assert torch.equal(logits(stock), logits(merged)) and not torch.equal(logits(stock), logits(base))
    assert same_bits(stock.merge_and_unload(safe_merge=safe).state_dict(), merged.state_dict())
    own = get_peft_model(copy.deepcopy(base), SupertuningConfig(target_modules=names, sparsity=0.9))
    ours = load_file(tmp_path / "adapter_model.safetensors")
    about = {key: (tensor.dtype, tensor.ndim) for key, tensor in get_peft_model_state_dict(own).items()}
    assert {key: (tensor.dtype, tensor.ndim) for key, tensor in ours.items()} == about, ADVICE
    save_file({key: tensor[:-1] for key, tensor in ours.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


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
    found = inspect.signature(SupertuningLayer._num_trainable)
    assert list(found.parameters) == ["self", "num_params", "sparsity"], ADVICE
    for name, (update,) in updates.items():
        key, used = f"base_model.model.{name}.supertuning", len(update.values)
        values, positions = tensors[f"{key}_values"], tensors[f"{key}_indices"]
        room = SupertuningLayer._num_trainable(None, math.prod(update.shape), sparsity)
        assert max(1, used) <= room == len(values) == len(positions)
        assert torch.equal(values[:used], update.values) and positions.dtype == torch.int32
        free = values[used:]  # only negative zeros, at position 0
        assert not free.count_nonzero() and torch.signbit(free).all() and not positions[used:].any()


def test_an_update_with_more_entries_than_places_is_refused_and_a_dense_one_fits(tmp_path):
    dense = [sparse_update(torch.ones(64, 64))]
    with pytest.raises(ValueError, match="wide needs 8192 entries in 4096 places; use format 'merged'"):
        save_sparse_adapter({"wide": dense * 2}, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    save_sparse_adapter({"wide": dense}, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["sparsity"] == 0.0


# ---- bfloat16 ---------------------------------------------------------------


def test_a_bfloat16_run_is_exported_in_float32_and_the_card_says_why(half, place, exports):
    saved = AutoModelForCausalLM.from_pretrained(place / "half-whole", dtype="auto")
    state = load_file(next((half[0] / "state").glob("*.safetensors")))
    sums = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    assert saved.dtype == torch.float32 and sums
    for name, merged in sums.items():
        assert torch.equal(bits(saved.get_submodule(name).weight), bits(merged))
    assert same_bits({k: v.bfloat16() for k, v in saved.state_dict().items()}, half[1].state_dict())
    assert any(not torch.equal(merged, merged.bfloat16().float()) for merged in sums.values())
    for name in ("half", "half-whole"):
        assert "Added to a base in bfloat16, the updates would be rounded" in parts_of(place / name)[1]
    assert 'dtype="bfloat16").float()' in parts_of(place / "half")[2]
    assert "bfloat16" not in parts_of(place / "super")[1]


# ---- the card --------------------------------------------------------------------------------------------


def test_the_metadata_of_a_card_is_yaml_with_licence_and_tags(place, exports):
    data = parts_of(place / "super")[0]
    assert data["library_name"] == "peft" and data["license"] == "mit"
    assert {"jumplora", "continual-learning", "supertuning"} <= set(data["tags"])
    assert parts_of(place / "whole")[0]["library_name"] == "transformers"
    assert "model-index" not in data  # the scores stand in the text


def test_the_text_of_a_card_has_scores_settings_and_how_to_ask(place, exports, run):
    (_, text, code), record = parts_of(place / "super"), Run.load(run[0])
    for j, task in enumerate(record.tasks):
        assert f"| {task} | 4 | {record.accuracy[j, j]:.1f} | {record.accuracy[-1, j]:.1f} | " in text
    assert f"| mean of 2 | 8 | {record.just_learned:.1f} | {record.average_accuracy:.1f} | |" in text
    assert "Exact match of test rows, one seed." in text and "The prompt of the task topics:" in text
    assert "after learning topics, then weather (IncLoRA + JumpLoRA; format supertuning)" in text
    for setting in ("train.learning_rate 0.01", "method.gated True", "seed 1"):
        assert f", {setting}," in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "Licence: mit." in text
    updates = load_finished(run[0]).updates
    count = sum(len(parts[0].values) for parts in updates.values())
    size = sum(math.prod(parts[0].shape) for parts in updates.values())
    changed = f"{count} of {size} weights in {len(updates)} layers differ from the base ({count / size:.2%})"
    assert changed in text and len(text.splitlines()) < 50
    assert len(code.replace("\n\n", "\n").splitlines()) <= 5
    # text of others stays inside its cell and its block
    assert r"| a \| different &lt;b>sample&lt;/b> --- license: stolen |" in text
    assert "\n    ```\n    ---\n" in text and text.count("\n```") == 2
    assert not re.search(r"^(---|license: stolen)", text, re.M)


def test_one_task_alone_has_no_scores_of_its_own(place, exports):
    text = parts_of(place / "weather")[1]
    assert "was not scored alone" in text
    assert "the update of task weather alone" in text and "prompt of the task weather" in text


@pytest.mark.parametrize(
    "backbone, about, license, id",
    [
        ("base", {}, "mit", None),
        ("base", dict(license="apache-2.0", base_model="some/mine"), "apache-2.0", "some/mine"),
        ("t5", {}, None, None),
        ("tiny-llama", {}, None, None),
        ("smollm2-135m", {}, "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("smollm2-135m", dict(license="mit", base_model="some/mine"), "mit", "some/mine"),
        ("some/base", {}, "other", "some/base"),
        ("some/other", {}, None, "some/other"),
        ("t5-large", {}, None, "t5-large"),  # the oldest bases have no owner
        *((front, {}, None, None) for front in ("license: [", "- a list", "license: 3", "\n")),
    ],
)
def test_a_licence_is_given_or_read_and_never_invented(
    place, run, tmp_path, monkeypatch, backbone, about, license, id
):
    if backbone in TINY:
        backbone = str(place / backbone)
    elif not re.fullmatch(r"[\w/.-]+", backbone):  # the front matter of a damaged card
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "README.md").write_text(f"---\n{backbone}\n---\n")
        backbone = str(tmp_path / "damaged")
    stated = ModelCard("---\nlicense: other\nlicense_name: its-own\n---\n")
    cards, runs, hub = ModelCard.load, Run.load, {"some/base": stated}
    start = load_start(runs(run[0]), device="cpu")  # of another backbone only the name is looked at
    monkeypatch.setattr(ModelCard, "load", lambda c, **o: cards(c, **o) if isinstance(c, Path) else hub[c])
    monkeypatch.setattr(export, "load_start", lambda run, **options: start)
    monkeypatch.setattr(export.Run, "load", lambda folder: replace(runs(folder), backbone=backbone))
    data, text, code = parts_of(export_run(run[0], tmp_path / "out", "supertuning", **about))
    assert (data.get("license"), data.get("base_model")) == (license, id)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (None if backbone == "smollm2-135m" else id)
    if id and backbone != "smollm2-135m":
        assert f'AutoModelForCausalLM.from_pretrained("{id}"' in code
    assert data.get("license_name") == ("its-own" if license == "other" else None)
    assert f"Base: {id or Path(backbone).name}. Licence: {license or 'not known here'}" in text
    if backbone == "smollm2-135m":  # the Hub has other weights than the package
        assert 'load_backbone("smollm2-135m", dtype="float32")[0]' in code and "AutoModel" not in text
        assert "PEFT, 0.21 or newer, and jumplora for the base." in text and "4-bit" in text


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="shira"), "format='shira' is not known; use 'merged', 'jumplora' or 'supertuning'"),
        (dict(format="supertuned"), "format='supertuned' is not known.*did you mean 'supertuning'"),
        (dict(task="wether"), "task='wether' is not known.*did you mean 'weather'"),
        (dict(task="../../weather"), "task='../../weather' is not known"),
        (dict(format="jumplora"), "has kept no adapter; use format 'supertuning'"),
        (dict(format="jumplora", task="weather"), "has kept no adapter"),
        (dict(repo_id="no-owner"), "repo_id='no-owner' is no Hub id .it has no owner.; use OWNER/NAME"),
        (dict(repo_id=""), "repo_id='' is no Hub id"),
        (dict(repo_id="a/b/c"), "repo_id='a/b/c' is no Hub id"),
        (dict(base_model="../x"), "base_model='../x' is no Hub id"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_run(run[0], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_only_an_empty_or_new_folder_is_written_to_and_all_of_it_or_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ValueError, match="is not empty"):
            export_run(run[0], out)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "deep" / "er"):
        assert export_run(run[0], out, "supertuning") == out and (out / "README.md").is_file()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(ModelCard, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export_run(run[0], tmp_path / "out", "supertuning")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty", "deep"}


def test_a_kept_adapter_has_no_update_of_one_task_and_without_a_gate_is_not_called_gated(
    kept, place, tmp_path
):
    with pytest.raises(ValueError, match="keeps no update of 'topics' alone; export it without a task"):
        export_run(kept, tmp_path / "out", task="topics")
    folder, _ = learn(place, Method("SeqLoRA", after_task="keep"), tasks=TASKS[:1])
    with pytest.raises(ValueError, match="has kept an adapter without a gate"):
        export_run(folder, tmp_path / "out", "jumplora")
    export_run(folder, tmp_path / "dense", "supertuning")
    assert json.loads((tmp_path / "dense" / "adapter_config.json").read_text())["sparsity"] == 0.0


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_an_adapter_that_is_exported_before_gamma_is_1_warns(gamma, kept, tmp_path):
    finished = load_finished(kept)
    for name, value in finished.adapter.items():
        if name.endswith("interpolation"):
            value.fill_(gamma)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        finished.write(tmp_path, "jumplora", None)
    expected = ["an adapter is saved at γ = 0.5: it is not sparse before γ = 1"] * (gamma < 1)
    assert [str(o.message).split(";")[0] for o in found if "sparse" in str(o.message)] == expected


def test_another_base_a_damaged_state_and_a_damaged_archive_are_refused(place, run, tmp_path, monkeypatch):
    folder = shutil.copytree(run[0], tmp_path / run[0].name)
    for name, task in (("updates/*weather*", "weather"), ("state/*.safetensors", None)):
        path = next(folder.glob(name))
        path.write_bytes(path.read_bytes()[:-1] + b"\x7e")
        with pytest.raises(ValueError, match="damaged|was changed"):
            load_finished(folder, task)
    model, tokenizer = load_backbone(str(place / "base"), device="cpu", dtype="float32")
    model.lm_head.weight.data[0, 0] += 1
    home = sys.modules[load_start.__module__]
    monkeypatch.setattr(home, "load_backbone", lambda *args, **options: (model, tokenizer))
    with pytest.raises(ValueError, match="has other weights than the backbone"):
        load_finished(run[0])


def test_a_run_that_was_stopped_is_exported_as_far_as_it_got(place, monkeypatch, tmp_path):
    def second(learner, i, real=continual.Learner.train):
        if i == 1:
            raise KeyboardInterrupt
        return real(learner, i)

    monkeypatch.setattr(continual.Learner, "train", second)
    with pytest.raises(KeyboardInterrupt):
        learn(place, out=tmp_path / "runs", seed=2)
    (folder,) = (tmp_path / "runs").iterdir()
    text = parts_of(export_run(folder, tmp_path / "out"))[1]
    assert "| weather |" not in text and "after learning topics (" in text
    with pytest.raises(ValueError, match="task='weather' is not known"):
        load_finished(folder, "weather")
    fresh = Run.load(folder)
    fresh.accuracy[:], fresh.right = math.nan, {}
    del fresh.extra["state_tasks"]
    with pytest.raises(ValueError, match="has finished no task yet"):
        load_finished(fresh.save(tmp_path / "none").parent)


def test_the_card_of_joint_training_leaves_out_what_was_just_learned(place, tmp_path):
    folder, _ = learn(place, METHODS["multi-task"], out=tmp_path)
    text = parts_of(export_run(tmp_path / folder.name, tmp_path / "out", "merged"))[1]
    assert "| mean of 2 | 8 |  | 50.0 | |" in text and "nan" not in text


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
    assert sent[2]["allow_patterns"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sent[2]["delete_patterns"] == ["adapter_*", "model*.safetensors*"]  # of another format


@pytest.mark.parametrize("name", ["export", "a/b/c", "a/", "/b", "some/ex port", "some/--x", "", "a/b.git"])
def test_an_impossible_name_reaches_no_hub(hub, place, exports, name):
    with pytest.raises(ValueError, match="use OWNER/NAME"):
        push_to_hub(place / "super", name, api=hub)
    assert not hub.mock_calls


def test_a_folder_that_is_no_export_or_holds_more_reaches_no_hub(hub, place, run, exports, tmp_path):
    for name in ("file", "link"):
        shutil.copytree(place / "super", tmp_path / name)
    (tmp_path / "file" / "deep").mkdir()
    (tmp_path / "file" / "deep" / "weights.bin").write_bytes(b"")
    (tmp_path / "link" / "link.json").symlink_to(place / "base" / "config.json")
    for folder, message in (
        (run[0] / "updates", "has no README.md"),
        (tmp_path / "file", "holds .'weights.bin'.*move them away"),
        (tmp_path / "link", "link.json"),
    ):
        with pytest.raises(ValueError, match=message):
            push_to_hub(folder, "some/export", api=hub)
    assert not hub.mock_calls


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command_writes_an_export_and_lists_it(run, tmp_path, capsys):
    words = ["export", str(run[0] / "record.json"), "--format", "supertuning", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said and f"written to {tmp_path / 'out'}" in said
    assert main(words) == 2 and "jumplora: " in (said := capsys.readouterr().err) and "is not empty" in said
    assert main(["export", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(form in said for form in ("merged", "jumplora", "supertuning"))


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
    assert '"some/export"' in parts_of(tmp_path / "out")[2]


def test_a_full_disk_is_named_and_nothing_is_left(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export.Finished, "write", full)
    with pytest.raises(OSError, match=r"export could not be written .*No space left .*make room"):
        export_run(run[0], tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_given_as_base_stays_as_it_is_and_its_card_names_no_hub_id(place, half, tmp_path):
    given = load_backbone(str(place / "base"), device="cpu", dtype="bfloat16")
    for form in ("merged", "supertuning"):
        data, text, _ = parts_of(export_run(half[0], tmp_path / form, form, backbone=given))
        assert next(given[0].parameters()).dtype == torch.bfloat16 and data.get("base_model") is None
    assert _find_origin("gpt2", None, None, given=True).id is None
    assert _find_origin("some/gpt2", None, "mit", given=True).id == "some/gpt2"
