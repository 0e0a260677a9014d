"Blocks below the first adapted one: computed once per row, and equal to what the whole model computes."

import contextlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from running.test_answers import ALONE, ALONE_ENCODERS, ENCODERS, FAMILIES, model_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

import jumplora.running.trunk as trunk_module
from jumplora.data.backbones import load_backbone
from jumplora.learning.continual import learn_sequence
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Example, Task, TaskSequence
from jumplora.learning.training import TrainConfig, attach_adapter, target_layers
from jumplora.running.trunk import Trunk, block_of
from jumplora.storage.rollback import rollback


def top_of(model, stack="model.layers"):
    "The last block of a stack, by name."
    return [f"{stack}.{len(model.get_submodule(stack)) - 1}"]


def stacks_of(model):
    named = model.named_modules()
    return [
        name
        for name, m in named
        if isinstance(m, nn.ModuleList) and block_of(model, f"{name}.0") == (name, 0)
    ]


def batch_of(rows, left, positions):
    "Rows of token ids as one padded batch."
    width = max(map(len, rows))
    sides = [([0] * (width - len(row)), row) for row in rows]
    ids = torch.tensor([fill + row if left else row + fill for fill, row in sides])
    ones = [([0] * (width - len(row)), [1] * len(row)) for row in rows]
    mask = torch.tensor([fill + row if left else row + fill for fill, row in ones])
    given = dict(input_ids=ids, attention_mask=mask)
    return given | (dict(position_ids=(mask.cumsum(-1) - 1).clamp(min=0)) if positions else {})


def without_dropout(model):
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name == "p"):
                setattr(module, name, 0.0)
    return model


ROWS = [[9, 30, 31, 32, 33, 34, 35], [9, 30, 40], [50, 51, 52, 53], [9, 30, 31, 32]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_batch_equals_the_whole_model_in_every_family_and_the_others_say_why_not(family):
    model = without_dropout(model_of(family))
    stack = next(
        name for name in stacks_of(model) if "decoder" not in name or family not in ENCODERS | ALONE_ENCODERS
    )
    with Trunk(model, top_of(model, stack)) as trunk:
        if trunk.reason:
            others = {"T5", "LongT5", "LED", "GptOss"}  # a shared bias, windows; experts, on some processors
            kept = ALONE.keys() | ALONE_ENCODERS.keys() | others
            assert family in kept, trunk.reason
            return
        owner = model.get_submodule(stack.rpartition(".")[0])
        left = not model.config.is_encoder_decoder
        for chosen in ([0, 1, 2], [1, 3], [2], [0, 1, 2, 3]):
            given = batch_of([ROWS[i] for i in chosen], left, "position_ids" in trunk._takes)
            replayed = owner(**given)[0]
            trunk._plain = True
            plain = owner(**given)[0]
            trunk._plain = False
            seen = given["attention_mask"].bool()
            torch.testing.assert_close(
                replayed[seen], plain[seen], rtol=1e-5, atol=1e-5 * plain.abs().max().item()
            )
        assert trunk.computed == len(ROWS)  # each once
    assert not any("forward" in vars(m) for m in model.modules()) and not owner._forward_pre_hooks


@cache
def whole_words():
    "A tokenizer of words: each label begins with a token of its own."
    known = "<pad> </s> <unk> Task Instruction : What ? Text Answer a b c some longer text than that x y one"
    known = known.split() + "more of them red blue green yellow 0 1 2 3".split()
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


TEXTS = ["a b c", "some longer text than that", "x y", "one more of them"]


def task(name, *labels):
    rows = [Example(f"{text} {label} {i}", label) for i, text in enumerate(TEXTS) for label in labels]
    return Task(name, "What?", labels, rows, (), rows[:4], list_options=False)


SEQUENCE = TaskSequence("two", [task("first", "red", "blue"), task("second", "green", "yellow")])
CONFIG = TrainConfig(top_layers=1, batch_size=4, max_length=40, epochs=2, learning_rate=5e-3)


def learn(folder=None, method="IncLoRA + late gate", **more):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    run = learn_sequence(
        model, whole_words(), SEQUENCE, METHODS[method], CONFIG, scoring="labels", hidden_states=folder,
        progress=False, **more,
    )  # fmt: skip
    return run, model


def test_a_run_with_replay_has_the_losses_and_scores_of_the_run_through_all_blocks(monkeypatch):
    replayed, model = learn()
    monkeypatch.setattr("jumplora.learning.continual.Trunk", lambda *given: contextlib.nullcontext())
    plain, other = learn()
    for name in SEQUENCE.names:
        assert replayed.extra["loss"][name] == pytest.approx(plain.extra["loss"][name], abs=1e-5)
    assert (replayed.seen_accuracy == plain.seen_accuracy)[1].all()
    assert (replayed.accuracy == plain.accuracy)[1].all()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_states_of_another_attention_or_precision_are_not_read(tmp_path):
    model, _ = load_backbone("tiny-llama", device="cpu", dtype="float32")

    def place():
        return Trunk(model, ["model.layers.1.self_attn.q_proj"], tmp_path)._store.folder

    places = {place(), place()}
    model.config._attn_implementation = "eager"
    places.add(place())
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert len({*places, place()}) == 3
    finally:
        matmul.fp32_precision = before


def test_runs_share_a_folder_and_give_the_same_bits(tmp_path, monkeypatch):
    computed = []
    leave = Trunk.__exit__
    monkeypatch.setattr(Trunk, "__exit__", lambda t, *error: (computed.append(t.computed), leave(t, *error)))
    memory = learn()[0]
    first = learn(tmp_path)[0]
    second = learn(tmp_path)[0]
    assert computed[1::2] == [16, 16, 0] and len({row.text for one in SEQUENCE for row in one.train}) == 16
    assert memory.extra["loss"] == first.extra["loss"] == second.extra["loss"]
    assert memory.right == first.right == second.right


@pytest.mark.parametrize("method", ["SeqLoRA", "IncLoRA + late gate"])
def test_a_run_that_stops_between_tasks_resumes_with_replay_and_ends_with_the_same_bits(method, tmp_path):
    class Stop(TrainerCallback):
        stops = False

        def on_train_begin(self, args, state, control, **kwargs):
            if args.seed % 1000 == 1 and self.stops:
                raise RuntimeError("the second task begins")

    stop = Stop()
    whole, model = learn(method=method, out=tmp_path / "whole", callbacks=[stop])
    stop.stops = True
    with pytest.raises(RuntimeError, match="second task"):
        learn(method=method, out=tmp_path / "stopped", callbacks=[stop])
    stop.stops = False
    resumed, other = learn(method=method, out=tmp_path / "stopped", callbacks=[stop])
    assert resumed.extra["loss"] == whole.extra["loss"] and resumed.right == whole.right
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_rollback_scores_as_the_run_did(tmp_path, monkeypatch):
    run, _ = learn(out=tmp_path)
    backbone = (load_backbone("tiny-llama", dtype="float32")[0], whole_words())
    answers = "jumplora.learning.evaluation.answer"
    monkeypatch.setattr(answers, lambda *given, **options: pytest.fail("scored by answers"))
    found = rollback(tmp_path / run.name, "second", SEQUENCE, backbone=backbone)
    scores = [[matrix[i, 0] for i in (1, 0)] for matrix in (run.accuracy, run.option_accuracy)]
    assert found.scores["first"] == sum(scores, [])


def tiny_trunk(folder, limit=10**9, seed=0):
    torch.manual_seed(seed)
    model = model_of("Llama") if not seed else load_backbone("tiny-llama", dtype="float32")[0]
    return model, Trunk(model, top_of(model), folder, limit)


def read(model, rows):
    return model(**batch_of(rows, True, True)).logits


@torch.no_grad()
def test_products_have_the_same_shapes_whatever_rows_are_read_together():
    model, trunk = tiny_trunk(None)
    shapes = []
    watched = model.model.layers[0].register_forward_pre_hook(
        lambda block, args, kwargs: shapes.append(args[0].shape[:2]) if not trunk._batch else None,
        with_kwargs=True,
    )
    trunk.hidden([tuple(row) for row in ROWS])
    trunk.hidden([tuple(range(3, 20)), (5, 6)])
    watched.remove()
    assert shapes == [(8, 16), (8, 16), (8, 32)]


@torch.no_grad()
def test_a_damaged_file_is_removed_and_other_weights_read_other_files(tmp_path):
    model, trunk = tiny_trunk(tmp_path)
    with trunk:
        first = read(model, ROWS)
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    model, trunk = tiny_trunk(tmp_path)
    with trunk:
        assert read(model, ROWS).equal(first) and trunk.computed == len(ROWS)
    assert file.read_bytes() == whole  # the same rows, written again
    changed = model_of("Llama")
    changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    other = Trunk(changed, top_of(changed), tmp_path)
    with other:
        read(changed, ROWS)
    assert other.computed == len(ROWS) and len(list(tmp_path.iterdir())) == 2
    merged = model_of("Llama")
    merged.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # above the trunk: a merge
    with Trunk(merged, top_of(merged), tmp_path) as third:
        read(merged, ROWS)
    assert third.computed == 0


@torch.no_grad()
def test_the_oldest_files_make_room_and_memory_has_the_same_limit(tmp_path):
    model, _ = tiny_trunk(tmp_path)
    other = tmp_path / "run" / "weights.safetensors"  # not of rows: it stays
    other.parent.mkdir()
    other.touch()
    for row in ROWS:
        with Trunk(model, top_of(model), tmp_path, limit=6000):
            read(model, [row])
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 0 < kept <= 6000 and other.exists()
    with Trunk(model, top_of(model), limit=1) as trunk:
        expected = read(model, ROWS)
        read(model, ROWS)
    assert trunk.computed == 2 * len(ROWS) and expected.isfinite().all()
    with Trunk(model, top_of(model), tmp_path / "small", limit=6000) as trunk:
        trunk._store.bytes = 6000  # the memory is full
        first = read(model, ROWS[:1])
        trunk._store.save()
        assert read(model, ROWS[:1]).equal(first)
    assert trunk.computed == 1


@torch.no_grad()
def test_a_file_that_another_run_removes_or_owns_costs_nothing_but_itself(tmp_path, monkeypatch):
    for row in ROWS[:2]:
        model, trunk = tiny_trunk(tmp_path)
        with trunk:
            read(model, [row])
    files = sorted(tmp_path.rglob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(trunk_module, "safe_open", Mock(side_effect=OSError(24, "Too many open files")))
        tiny_trunk(tmp_path)
    assert sorted(tmp_path.rglob("*.safetensors")) == files
    monkeypatch.setattr(trunk_module.os, "utime", Mock(side_effect=PermissionError(1, "not the owner")))
    model, trunk = tiny_trunk(tmp_path)
    with trunk:
        read(model, ROWS[:2])
        assert trunk.computed == 0 and sorted(tmp_path.rglob("*.safetensors")) == files
        stat, gone = Path.stat, files[0]

        def removed(path, **options):  # between the listing and the reading of its size
            if path == gone and options.get("follow_symlinks", True):
                raise FileNotFoundError(2, "removed")
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", removed)
        read(model, ROWS[2:3])
    monkeypatch.undo()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3  # the new rows are on disk, too


@torch.no_grad()
def test_a_full_disk_is_a_warning_and_the_rows_stay_in_memory(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trunk_module, "write_atomic", full)
    model, trunk = tiny_trunk(tmp_path)
    with pytest.warns(UserWarning, match="memory only .*No space left"), trunk:
        read(model, ROWS)
    with trunk:
        read(model, ROWS)
    assert trunk.computed == len(ROWS)


@torch.no_grad()
def test_a_call_that_needs_the_lower_blocks_runs_through_all_of_them():
    model, trunk = tiny_trunk(None)
    given = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    ids = torch.tensor([ROWS[0]])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    holes = batch_of(ROWS, True, True)
    holes["attention_mask"][0, 3] = 0
    holes["position_ids"] = (holes["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    all_hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    with trunk:
        assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given).equal(expected)
        found = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert all(a.equal(b) for a, b in zip(found, all_hidden, strict=True))
        model(inputs_embeds=model.get_input_embeddings()(ids))
        model(**holes)
        shifted = batch_of(ROWS, True, True)
        shifted["position_ids"] += 1
        model(**shifted)
        del shifted["position_ids"]
        model(**shifted)
        assert trunk.computed == 0
        read(model, ROWS)
        assert trunk.computed == len(ROWS)


@pytest.mark.parametrize("kind", ["dropout", "altered", "first"])
def test_what_cannot_be_replayed_says_why_and_runs_as_usual(kind):
    model = model_of("GPT2") if kind == "dropout" else model_of("Llama")
    model = model_of("GPT2", resid_pdrop=0.1) if kind == "dropout" else model
    stack = stacks_of(model)[0]
    layers = top_of(model, stack)
    if kind == "altered":
        block = model.get_submodule(stack)[0]
        block.forward = block.forward
    if kind == "first":
        layers = [f"{stack}.0.mlp.up_proj"]
    words_of = {"dropout": "random numbers", "altered": "altered", "first": "first block is adapted"}
    trunk = Trunk(model, layers)
    assert words_of[kind] in trunk.reason
    expected = read(model.eval(), ROWS)
    with trunk:
        assert read(model, ROWS).equal(expected)


def test_gradients_and_checkpointing_are_those_of_the_whole_model():
    found = []
    for replay in (False, True):
        model = load_backbone("tiny-llama", dtype="float32")[0]
        torch.manual_seed(0)
        adapted = attach_adapter(model, CONFIG, gated=True).train()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        names = [n.replace(".base_layer", "") for n, m in model.named_modules() if hasattr(m, "lora_A")]
        with Trunk(model, names) if replay else contextlib.nullcontext():
            adapted(**batch_of(ROWS, True, True)).logits.square().mean().backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(plain, replayed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "count", "message"),
    [
        (None, 3, "model.layers has 2 blocks; use at most 2"),
        (("lm_head",), 1, "lm_head is in no block"),
        ((r"model\.layers\.0\.self_attn\.q_proj",), 1, "match no linear layer"),
        (r"model\.layers\.0\.self_attn\.q_proj", 1, "the last blocks hold no layer"),
    ],
)
def test_a_number_of_blocks_that_does_not_fit_is_refused(targets, count, message):
    model = load_backbone("tiny-llama", dtype="float32")[0]
    with pytest.raises(ValueError, match=message):
        target_layers(model, targets, count)
    with pytest.raises(ValueError, match="top_layers"):
        replace(CONFIG, top_layers=0)


def test_adapters_stand_on_the_last_blocks_of_every_stack():
    model = model_of("T5")
    names = list(target_layers(model, ("q", "v"), 1))
    assert names and all(".block.1." in name for name in names)
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
