"""Wild tokenizers, models, layers, tables and surroundings; `tests/fuzz.py` runs these checks too.

What is taken must equal a slow computation that does not use the package; everything else is refused.
"""

import copy
import csv
import io
import json
import math
import re
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
import yaml
from accelerate import cpu_offload
from fuzz import (
    JUNK,
    NUMBERS,
    PATHS,
    TEXTS,
    Refused,
    check,
    damaged,
    inside,
    one_of,
    shell,
    taken_or_refused,
    whole_run,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from running.test_answers import FAMILIES, QUESTION, alone, model_of, words
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers import PreTrainedTokenizerFast

from jumplora.conventions import set_seed
from jumplora.data.backbones import load_backbone
from jumplora.learning import evaluation
from jumplora.learning.continual import Learner, Method
from jumplora.learning.dry_check import dry_check
from jumplora.learning.evaluation import answer
from jumplora.learning.tasks import Task, TaskSequence, encode_answer, encode_prompt
from jumplora.learning.training import (
    TrainConfig,
    attach_adapter,
    penalty_function,
    target_layers,
    train_task,
)
from jumplora.method.adapter import JumpLoraConfig, adapter_layers, delta_weights
from jumplora.method.regularizers import ELLA, IncLoRA, Update
from jumplora.results.run_tables import load_runs, tables_of
from jumplora.running import grid

datasets.disable_progress_bars()

# ---- tokenizers -------------------------------------------------------------------------------------------

SPECIAL = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
SPELLED = ("<|?|>", "<|start|>", "<|end|>", "<|pad|>", *SPECIAL.values())
CORPUS = "Task Instruction : What is it ? Options : Text : Answer : good bad rather no 0123456789 | . , - ( )"
KINDS = ("bytes", "starts", "ends", "pieces", "lower pieces", "unigram", "words", "characters")


@cache
def tokenizer_of(kind: str):
    "A small tokenizer of one kind; all but ByT5's are trained on one line."
    if kind == "characters":
        return transformers.ByT5Tokenizer()
    if kind in ("bytes", "starts", "ends"):
        made = copy.deepcopy(words())
        template = dict(starts="<|start|> $A", ends="$A <|end|>").get(kind)
        if template:
            ids = [(word, made.convert_tokens_to_ids(word)) for word in ("<|start|>", "<|end|>")]
            post = processors.TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=ids)
            made.backend_tokenizer.post_processor = post
        return made
    settings = dict(vocab_size=300, special_tokens=list(SPECIAL.values()), show_progress=False)
    if kind == "unigram":
        made, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **settings)
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "words":
        made, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(**settings)
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=kind == "lower pieces")
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings)
    made.train_from_iterator([CORPUS] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


@cache
def model_for(family: str, tokens: int, **changes):
    "A model of one layer for so many tokens."
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    if family == "T5":
        sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    if family == "OPT":
        sizes |= dict(ffn_dim=16, word_embed_proj_dim=16)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    config = getattr(transformers, f"{family}Config")(vocab_size=tokens, **ids, **sizes | changes)
    auto = transformers.AutoModelForSeq2SeqLM if family == "T5" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config).eval()


def plainly(text: str) -> str:
    "How answers are compared, in other words."
    return " ".join(text.lower().split())


def one_task(options=("good", "bad"), text="it is", name="mine"):
    rows = [(f"{text} {i}", options[i % len(options)]) for i in range(3)]
    return Task(name, "What is it?\n", options, rows, rows, rows)


ODD_WORDS = (
    "good",
    "bad",
    "Good",
    "rather good",
    "no",
    "<=50K",
    ">50K",
    "½",
    "1/2",
    "ﬁne",
    "fine",
    "é",
    "e\u0301",
    "naïve",
    "naive",
    "日本",
    "don't",
    "1.0",
    "10",
    "١",
    "a.b",
    "a , b",
    "( )",
    "##no",
    "▁no",
    "<unk>",
    "\u200b",
    "no\u00adno",
    "ẞ",
    "ß",
    "İ",
    *SPELLED,
    "<pad>",
    "</s>",
    "[SEP]",
)
OPTION_SETS = st.lists(one_of(*ODD_WORDS), min_size=1, max_size=3, unique_by=str.lower)
OPTION_SETS |= st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=2)


@given(one_of(*KINDS), OPTION_SETS, one_of("Llama", "T5"))
@check
def options_under_any_tokenizer(kind, options, family):
    tokenizer = tokenizer_of(kind)
    with taken_or_refused("task 'mine'"):
        task = one_task(options)
    model, coded = model_for(family, len(tokenizer) + 8), []
    for option in task.options:
        ids = tokenizer(option if family == "T5" else f" {option}", add_special_tokens=False).input_ids
        if not set(ids) & set(tokenizer.all_special_ids) and "<" not in option:
            assert [*ids, tokenizer.eos_token_id] == encode_answer(tokenizer, option, family == "T5")
        coded.append(encode_answer(tokenizer, option, family == "T5"))
    back = tokenizer.batch_decode(coded, skip_special_tokens=True)
    fine = [plainly(text) == plainly(option) for text, option in zip(back, task.options, strict=True)]
    good = all(fine) and len(set(map(tuple, coded))) == len(coded)
    if kind in ("ends", "characters") and family == "Llama":
        with taken_or_refused(*map(repr, task.options), "two options", tokenizer.eos_token):
            dry_check(model, tokenizer, TaskSequence("s", [task]))
        raise AssertionError("a prompt that ends before the answer was taken")
    try:
        with taken_or_refused(*map(repr, task.options), "two options"):
            dry_check(model, tokenizer, TaskSequence("s", [task]))
    finally:
        refused = sys.exc_info()[0] is not None
        assert refused != good, f"{task.options} come back as {back}"


PROMPTS = st.lists(one_of(*SPELLED, *ODD_WORDS, " ", "\n", "hello") | st.text(max_size=8), max_size=40)


@given(one_of(*KINDS), PROMPTS.map("".join), st.integers(40, 300), one_of("field", "reference"))
@check
def special_tokens_in_texts(kind, text, most, truncation):
    tokenizer = tokenizer_of(kind)
    with taken_or_refused("max_length"):
        ids = encode_prompt(tokenizer, QUESTION, text, most, truncation)
    assert 0 < len(ids) <= most
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    frame = [token for token in tokenizer("good").input_ids if token in special]
    assert [token for token in ids if token in special] == frame
    if kind in ("bytes", "starts", "ends"):
        read = tokenizer.decode([token for token in ids if token not in special])
        if truncation == "reference":
            assert QUESTION.prompt(text).startswith(read.rstrip("\ufffd"))
        else:
            assert read in [QUESTION.prompt(text[:n]) for n in range(len(text) + 1)]
            assert read == QUESTION.prompt(text) or len(ids) > most - 8


TOKENS = st.fixed_dictionaries(
    dict(family=one_of("Llama", "OPT", "GPTNeoX", "T5"), positions=st.integers(40, 140)),
    optional=dict(pad=one_of(None, "beyond", "end", "end")),
) | st.fixed_dictionaries(
    dict(family=one_of("Llama", "T5"), positions=st.just(140)), optional=dict(end=st.none(), start=st.none())
)


@given(TOKENS, st.integers(34, 160), st.integers(1, 60))
@check
def tokens_and_positions(drawn, most, times):
    family, tokenizer = drawn["family"], copy.deepcopy(words())
    task = one_task(text="it is what it is " * times)
    changes = dict(max_position_embeddings=drawn["positions"]) if family != "T5" else {}
    model = copy.deepcopy(model_for(family, len(tokenizer), **changes))
    if "end" in drawn:
        tokenizer.eos_token = None
    if "pad" in drawn:
        tokenizer.pad_token = {"beyond": "<new>", "end": tokenizer.eos_token}.get(drawn["pad"])
        if drawn["pad"] == "beyond":
            tokenizer.add_tokens(["<new>"])
    if "start" in drawn:
        model.config.decoder_start_token_id = None
    config = TrainConfig(rank=1, max_length=most, target_modules="all-linear")
    names = ("pad_token", "eos_token", "decoder_start_token_id", "max_length", "positions")
    good = drawn.get("pad", "end") is not None and drawn.get("pad") != "beyond" and "end" not in drawn
    good = good and not (family == "T5" and "start" in drawn)
    with taken_or_refused("max_length"):
        if good:
            longest = max(len(encode_prompt(tokenizer, task, row.text, most)) for row in task.train)
            good = family == "T5" or longest + 8 <= drawn["positions"]
    try:
        with taken_or_refused(*names):
            dry_check(model, tokenizer, TaskSequence("s", [task]), config)
    finally:
        refused = sys.exc_info()[0] is not None
        assert refused != good
    log = train_task(attach_adapter(model, config, gated=True), tokenizer, task, config, IncLoRA())
    assert all(map(math.isfinite, log.loss))


# ---- targets and layers -----------------------------------------------------------------------------------

TARGET = one_of(
    "q_proj", "v_proj", "self_attn.q_proj", "0.self_attn.q_proj", "layers.0.mlp.up_proj", "lm_head",
    "model.layers.0.self_attn.k_proj", "proj", "q", "norm", "embed_tokens", "model", "mlp", ".q_proj",
    "Q_PROJ", "q_proj ", "", "all-linear", "default",
)  # fmt: skip
PATTERN = one_of(
    r".*\.(q|v)_proj",
    r".*q_proj",
    "q_proj",
    ".*",
    "(",
    "*",
    "[",
    r"\d",
    "all-linear",
    "ALL-LINEAR",
    r"(?i).*Q_PROJ",
    ".*norm",
    r"model\.layers\.0\..*proj",
    ".*lm_head",
    "^.*up_proj$",
    "",
)
LAYERS = one_of(
    "q_proj", "v_proj", "self_attn.k_proj", "layers.0.mlp.up_proj", "lm_head", "model.layers.0.mlp.down_proj"
)
TARGETS = (
    st.sets(LAYERS, min_size=1).map(list)
    | PATTERN
    | st.lists(TARGET, max_size=3)
    | st.lists(TARGET, max_size=3).map(tuple)
    | PATTERN
    | JUNK
    | st.none()
)


@given(TARGETS, st.booleans())
@check
def targets_of_an_adapter(targets, tied):
    model = model_for("Llama", 16, tie_word_embeddings=tied)
    with taken_or_refused("target_modules"):
        config = TrainConfig(rank=1, target_modules=targets)
        found = target_layers(model, config.target_modules)
    wanted = config.target_modules  # a word alone is a name, not an expression
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted
    if not all(isinstance(layer, nn.Linear) for layer in found.values()):
        with taken_or_refused("target_modules"):
            attach_adapter(copy.deepcopy(model), config, gated=True)
        raise AssertionError("a layer that is not linear was taken")
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=1, target_modules=wanted)
    ).targeted_module_names
    assert set(found) == set(theirs)
    ours = adapter_layers(attach_adapter(copy.deepcopy(model), config, gated=True))
    assert set(ours) == set(theirs)
    if tied and "lm_head" in found:
        tokenizer = words()
        model = model_for("Llama", len(tokenizer), tie_word_embeddings=True)
        with taken_or_refused("lm_head"):
            dry_check(model, tokenizer, TaskSequence("s", [one_task()]), config)
        raise AssertionError("a weight with two owners was taken")


NAMES = (
    "module", "model", "base_model", "base_layer", "_orig_mod", "layers", "h", "0", "default", "lora_A",
    "weight", "linear", "_fsdp_wrapped_module",
)  # fmt: skip
LEAF = st.just(None)
TREES = st.recursive(
    LEAF, lambda inner: st.dictionaries(one_of(*NAMES), inner, min_size=1, max_size=3), max_leaves=6
)


def built(tree):
    "A module of linear layers that are nested and named as in the tree; called, it adds their outputs."
    if tree is None:
        return nn.Linear(3, 3)
    node = nn.Module()
    for name, child in tree.items():
        node.add_module(name, built(child))
    return node


@given(TREES, one_of("layer", "block", "model"), st.booleans())
@check
def modules_of_any_name(tree, scope, wrapped):
    assume(tree is not None)
    model = built(tree)
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    reserved = {"lora_A", "base_layer"}  # PEFT's own; it skips them
    assume(not reserved & {part for path in paths for part in path.split(".")})
    config = JumpLoraConfig(r=1, target_modules="|".join(map(re.escape, paths)), threshold_scope=scope)
    adapted = get_peft_model(model, config)
    if wrapped:
        adapted = nn.DataParallel(adapted)
    found = adapter_layers(adapted)
    assert sorted(found) == sorted(paths)
    assert set(delta_weights(adapted)) == set(paths)


INITIAL = one_of(
    True, False, None, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "corda",
    "loftq", "lora_ga", "GAUSSIAN", "true", "", 0, 1, 2.0,
)  # fmt: skip


@given(INITIAL | TEXTS | JUNK, one_of("Llama", "T5"))
@check
def initial_weights_of_an_adapter(value, family):
    model = copy.deepcopy(model_for(family, 16))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    targets = ["q_proj", "v_proj"] if family == "Llama" else ["q", "v"]
    with taken_or_refused("init_lora_weights"):
        config = JumpLoraConfig(r=2, target_modules=targets, init_lora_weights=value)
        adapted = get_peft_model(model, config)
    after = {
        name.replace(".base_layer", ""): weight
        for name, weight in adapted.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    if config.init_lora_weights:
        assert all(delta.abs().max() < 1e-6 for delta in delta_weights(adapted).values())


class Doubled(nn.Linear):
    "A linear layer with a forward of its own."

    def forward(self, x):
        return 2 * super().forward(x)


def times_three(*values):
    return 3 * values[-1] if isinstance(values[-1], torch.Tensor) else (3 * values[-1][0],)


def wrapped(way: str, layer: nn.Linear) -> nn.Module:
    "A layer whose output is not x Wᵀ + b alone."
    if way == "hook":
        layer.register_forward_hook(lambda module, args, result: 3 * result)
    elif way == "early hook":
        layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    elif way == "hook with kwargs":
        layer.register_forward_hook(lambda module, args, kwargs, result: 3 * result, with_kwargs=True)
    elif way == "weight norm":
        return parametrizations.weight_norm(layer)
    elif way == "old weight norm":
        weight_norm(layer)
    elif way == "spectral norm":
        return parametrizations.spectral_norm(layer).eval()
    elif way == "subclass":
        made = Doubled(4, 5)
        made.load_state_dict(layer.state_dict())
        return made
    elif way == "forward":
        plain = layer.forward
        layer.forward = lambda x: plain(x) + 1
    elif way == "offload":
        cpu_offload(layer, execution_device="cpu")
    return layer


WAYS = (
    "plain", "hook", "early hook", "hook with kwargs", "weight norm", "old weight norm", "spectral norm",
    "subclass", "forward", "offload",
)  # fmt: skip


@given(one_of(*WAYS), one_of("before", "after"), st.booleans(), st.floats(0, 1), st.integers(0, 99))
@check
def layers_that_are_wrapped(way, moment, double, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.float64 if double else torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(4, 5).to(kind)
    reference = copy.deepcopy(layer)
    reference = wrapped(way, reference.to(kind)).to(kind)
    model = nn.Sequential(layer)
    if moment == "before":
        model[0] = wrapped(way, layer).to(kind)
    with taken_or_refused("target_modules", "layer", "weight"):
        adapted = get_peft_model(model, JumpLoraConfig(r=2, target_modules=["0"], lora_alpha=4)).to(kind)
    (made,) = adapter_layers(adapted).values()
    if moment == "after" and way in ("hook", "early hook", "hook with kwargs", "forward"):
        wrapped(way, made.get_base_layer())
    elif moment == "after":
        return
    A, B = made.lora_A["default"].weight, made.lora_B["default"].weight
    gate = made.lora_gate["default"]
    if A.is_meta:
        return
    with torch.no_grad():
        for factor in (A, B):
            factor.copy_(torch.randn(factor.shape, generator=generator))
        gate.interpolation.fill_(gamma)
    x = torch.randn(3, 4, generator=generator).to(kind)
    product = B.double() @ A.double()
    kept = torch.where(product.abs() > gate.threshold.item(), product, 0.0)
    update = 2 * (gamma * kept + (1 - gamma) * product)
    expected = reference(x) + (x.double() @ update.T.detach()).to(kind)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-4)


@given(
    st.integers(0, 99),
    st.floats(0, 1e3),
    one_of("layer", "whole", "ELLA", "scaled ELLA", "none"),
    st.booleans(),
)
@check
def penalties_of_own_classes(seed, strength, kind, gated):
    class OfLayers(IncLoRA):
        def layer_penalty(self, name, update):
            return strength * (update.A.square().sum() + update.delta.abs().sum())

    class Whole(IncLoRA):
        def penalty(self, updates):
            return strength * sum(u.A.square().sum() + u.delta.abs().sum() for u in updates.values())

    class Scaled(ELLA):
        def penalty(self, updates):
            return 2 * sum(u.delta.square().sum() for u in updates.values())

    made = dict(layer=OfLayers, whole=Whole, ELLA=ELLA, none=IncLoRA) | {"scaled ELLA": Scaled}
    config = TrainConfig(rank=2, target_modules=("q_proj", "v_proj"))
    model = attach_adapter(copy.deepcopy(model_for("Llama", 16)), config, gated)
    generator = torch.Generator().manual_seed(seed)
    layers = adapter_layers(model)

    def draw():
        with torch.no_grad():
            for layer in layers.values():
                for part in (layer.lora_A, layer.lora_B):
                    part["default"].weight.normal_(generator=generator)
        return {name: delta.detach() for name, delta in delta_weights(model).items()}

    regularizer = made[kind]()
    past = draw()
    if kind == "ELLA":
        penalty_function(model, regularizer)
        regularizer.after_task({name: Update(delta) for name, delta in past.items()})
    now = draw()
    found = penalty_function(model, regularizer)
    if kind == "none":
        assert found is None
        return
    value, expected = found(), 0.0
    for name, delta in now.items():
        A = layers[name].lora_A["default"].weight
        if kind == "ELLA":
            overlap = (past[name].double() * delta.double()).square().sum().item()
            expected += regularizer.strength * overlap / len(layers)
        elif kind == "scaled ELLA":
            expected += 2 * delta.double().square().sum().item()
        else:
            expected += strength * (A.double().square().sum() + delta.double().abs().sum()).item()
    assert math.isclose(value.item(), expected, rel_tol=1e-4, abs_tol=1e-6)
    if strength or "ELLA" in kind:
        assert value.requires_grad


# ---- answers ----------------------------------------------------------------------------------------------

model_once = cache(model_of)
ASKED = st.lists(st.text("abc ,.xyz", max_size=40).map(lambda text: f"t {text}"), min_size=1, max_size=3)


@given(one_of(*FAMILIES), ASKED, st.integers(1, 6), one_of("left", "right"))
@check
def answers_in_batches(family, texts, batch, side):
    model, tokenizer = model_once(family), words()
    with (
        patch.object(tokenizer, "padding_side", side),
        taken_or_refused("batch_size", "max_length", "rope_type"),
    ):
        answers, scores = answer(
            model, tokenizer, QUESTION, texts, max_length=512, batch_size=batch, max_new_tokens=1
        )
    for text, given_back, row in zip(texts, answers, scores, strict=True):
        expected, written = alone(model, text)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
        assert given_back == written


SCORE = st.floats(0, 100)


def matrices(score):
    "Square ones of 1 to 4 rows."
    row = lambda n, one: st.lists(one, min_size=n, max_size=n)  # noqa: E731
    return st.integers(1, 4).flatmap(lambda n: row(n, row(n, score)))


ODD_MATRICES = st.lists(st.lists(NUMBERS, max_size=3), max_size=3)
MATRICES = matrices(SCORE) | matrices(SCORE | st.just(math.nan))
MATRICES |= ODD_MATRICES


def by_hand(a: list[list[float]]) -> dict[str, list[float] | None]:
    "The terms whose mean each metric is."
    last, n = a[-1], len(a)
    found = dict(average_accuracy=last, just_learned=[a[j][j] for j in range(n)])
    if n > 1:
        found["backward_transfer"] = [last[j] - a[j][j] for j in range(n - 1)]
        best = [[a[i][j] for i in range(j, n)] for j in range(n - 1)]
        found["forgetting"] = [
            max(column) - last[j] if not any(map(math.isnan, column)) else math.nan
            for j, column in enumerate(best)
        ]
    return found


@given(MATRICES)
def metrics_of_any_matrix(a):
    square = a and all(len(row) == len(a) for row in a)
    for name in ("average_accuracy", "just_learned", "backward_transfer", "forgetting"):
        with suppress(Refused):
            with taken_or_refused("accuracy", "transfer", "forgetting"):
                found = getattr(evaluation, name)(a)
            assert square
            terms = by_hand([list(map(float, row)) for row in a])[name]
            assert math.isclose(found, sum(terms) / len(terms), abs_tol=1e-9)


# ---- tables -----------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=30) | one_of(
    "NA", "null", "1", "1.0", "007", "true", '"', 'a "b" c', "a,b", "a\tb", "a\nb", "#x", "\ufeffa", "-",
    "a\u2028b",
)  # fmt: skip
LABELLED = dict(
    text=one_of("good", "bad", "NA", "a b", "1e3", "nan", "None", "007"),
    int=st.integers(-3, 12),
    float=one_of(0.5, 1.0, -2.25, 3.0),
    bool=st.booleans(),
)
FORMS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet", "table", "frame", "class labels")
COLUMNS = one_of(("text", "label"), ("sentence", "label"), ("my text", "the label"))
PLACES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


def as_text(value: object) -> str:
    "What a label is called, in other words."
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:.0f}" if value == round(value) else repr(float(value))


def write_table(path: Path, form: str, rows: list[dict], mark: bool) -> None:
    "A table as other programs write it, with or without a byte-order mark."
    if form == "parquet":
        pd.DataFrame(rows).to_parquet(path)
        return
    if form in ("csv", "tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter="," if form == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue()
    else:
        content = json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(content.encode("utf-8-sig" if mark else "utf-8"))


@given(st.data(), one_of(*FORMS), one_of(*LABELLED), COLUMNS, PLACES, st.booleans())
@check
def tables_in_any_form(data, form, kind, columns, place, mark):
    texts = CELLS.filter(str.strip) if data.draw(st.integers(0, 5)) else CELLS
    rows = data.draw(st.lists(st.tuples(texts, LABELLED[kind]), min_size=1, max_size=4))
    given_rows = [dict(zip(columns, row, strict=True)) for row in rows]
    expected = [(text, as_text(label)) for text, label in rows]
    options = dict(text=columns[0] if columns[0] == "my text" else None, label=columns[1])
    with inside() as folder:
        source = dict.fromkeys(("train", "test"), given_rows)
        if form == "frame":
            source = dict.fromkeys(source, pd.DataFrame(given_rows))
        elif form == "table":
            source = dict.fromkeys(source, datasets.Dataset.from_list(given_rows))
        elif form == "class labels":
            names = sorted({label for _, label in expected})
            numbered = [row | {columns[1]: names.index(as_text(row[columns[1]]))} for row in given_rows]
            kinds = {columns[0]: datasets.Value("string"), columns[1]: datasets.ClassLabel(names=names)}
            table = datasets.Dataset.from_list(numbered, features=datasets.Features(kinds))
            source = dict.fromkeys(source, table)
        else:
            try:
                home = folder / place
                home.mkdir()
            except OSError:  # a name that this disk does not take
                return
            for split in source:
                write_table(home / f"{split}.{form}", form, given_rows, mark)
            source = home
        with taken_or_refused("train row", "train"):
            task = Task.load("mine", source, **options)
            if isinstance(source, Path) and options["text"] is None:
                (same,) = TaskSequence.load(folder)
                assert same.train == task.train
        assert list(task.train) == list(task.test) == expected
        assert sorted(task.options) == sorted({label for _, label in expected})


KEPT = [
    -1, 0, 1, 2, True, False, np.int64(1), np.bool_(True), np.float32(1), 0.5, 1e300, math.nan, math.inf,
    None, pd.NA, pd.NaT, "1", "True", " ", "", "a|b", " a", "a ", b"a", ("a",), [1], {}, object, 1 + 0j,
    np.str_("a"), np.array(1), np.array([1]), torch.tensor(1), "A", "a", 10**30,
]  # fmt: skip
VALUES = st.sampled_from(range(len(KEPT))).map(KEPT.__getitem__)


@given(st.lists(VALUES, min_size=1, max_size=4), st.lists(VALUES, max_size=4) | st.none(), st.booleans())
@check
def labels_of_any_type(labels, options, framed):
    rows = [dict(text=f"text {i}", label=label) for i, label in enumerate(labels)]
    with taken_or_refused("task 'mine'"):
        source = pd.DataFrame(rows) if framed else rows
        task = Task.load("mine", dict(train=source, test=source), "Which?\n", options)
    allowed = (bool, np.bool_, int, float, np.integer, np.floating, str)
    for row, label in zip(task.train, labels, strict=True):
        assert isinstance(label, allowed) and row.label in task.options
        if isinstance(label, bool | np.bool_) and not framed:
            assert row.label == str(bool(label))
        elif not isinstance(label, str | bool | np.bool_) and not framed:
            assert float(row.label) == float(label)
        elif isinstance(label, str):
            assert row.label == label


PLANNED = st.lists(
    st.fixed_dictionaries(
        dict(
            method=one_of("ELLA", "IncLoRA", "own", "ELLA + JumpLoRA"),
            seed=st.integers(0, 3),
            sequence=one_of("two", "order1"),
            backbone=one_of("tiny", "a/b"),
            scores=st.lists(st.floats(0, 100), min_size=3, max_size=3),
            broken=one_of(0, 0, 0, 1),
            depth=st.integers(0, 2),
        )
    ),
    max_size=5,
)


@given(PLANNED)
@check
def tables_of_odd_folders(drawn):
    with inside() as folder:
        wanted = []
        for i, one in enumerate(drawn):
            first, second, third = one["scores"]
            scores = [[first, math.nan], [second, third]]
            fields = {name: one[name] for name in ("method", "seed", "sequence", "backbone")}
            run = replace(whole_run(), **fields, accuracy=np.array(scores), option_accuracy=np.array(scores))
            path = run.save(folder.joinpath(*["deep"] * one["depth"], str(i)))
            if one["broken"]:
                path.write_bytes(path.read_bytes()[:-5])
            else:
                wanted.append(run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = load_runs(folder)
        assert sorted(run.average_accuracy for run in runs) == sorted((r.accuracy[1].mean()) for r in wanted)
        printed = shell("table", folder)
        assert wanted or "holds no run" in printed
        with taken_or_refused(*{run.name for run in wanted}, "runs", "seed", "order1", str(folder)):
            tables = tables_of(runs)
        if {run.sequence for run in wanted} == {"two"} and len({r.backbone for r in wanted}) == 1:
            shown = " ".join(frame.to_string() for frame in tables.values())
            for method in {run.method for run in wanted}:
                group = [run.accuracy[1].mean() for run in wanted if run.method == method]
                mean = f"{np.mean(group):.1f}"
                assert method in shown and mean in shown, f"{method} {mean} is not in\n{shown}"


# ---- surroundings -----------------------------------------------------------------------------------------

DEVICES = one_of(
    "cpu", "auto", "cuda", "cuda:0", "cuda:99", "cpu:0", "cpu:7", "CPU", "gpu", "mps", "xpu", "cpu ",
    "meta", "cpu:-1", 0, -1, 1.5, None, torch.device("cpu"), ("cpu",),
)  # fmt: skip
DTYPES = one_of(
    "auto", "float32", "bfloat16", "float16", "float64", "fp32", "bf16", "Float32", "torch.bfloat16",
    torch.float32, torch.float16, torch.int8, "int8", "half", None, 32,
)  # fmt: skip


PLACED = st.tuples(DEVICES | TEXTS | JUNK, st.just("auto")) | st.tuples(st.just("cpu"), DTYPES | TEXTS | JUNK)


@given(PLACED)
@check
def devices_and_formats(drawn):
    device, dtype = drawn
    with taken_or_refused("device=", "dtype="):
        model = load_backbone("tiny-llama", device=device, dtype=dtype)[0]
    parameter = next(model.parameters())
    asked = str(dtype).removeprefix("torch.")
    assert str(parameter.dtype).removeprefix("torch.") == ("float32" if asked == "auto" else asked)
    assert parameter.device.type == ("cpu" if str(device) == "auto" else str(device).partition(":")[0])


@given(NUMBERS | JUNK | one_of(np.int64(3), np.float64(3), "3", 2**32 - 1, 2**32, 4294966, 4294967))
@check
def seeds_of_any_kind(seed):
    with taken_or_refused("seed="):
        set_seed(seed)
    first = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(int(seed))
    np.random.seed(int(seed))
    assert first == (torch.rand(1).item(), np.random.rand())
    tokenizer = words()
    with taken_or_refused("seed="):
        learner = Learner(
            model_for("Llama", len(tokenizer)),
            tokenizer,
            TaskSequence("s", [one_task()]),
            Method("mine"),
            TrainConfig(target_modules=("q_proj",)),
            seed=seed,
        )
    assert learner.run.seed == seed and json.dumps(learner.run.to_dict())


def mostly(**kinds):
    "Some names with a good value each; at most one of them gets a wild one instead."
    good = st.fixed_dictionaries({}, optional={name: value for name, (value, _) in kinds.items()})
    wild = st.one_of(*(st.fixed_dictionaries({name: value}) for name, (_, value) in kinds.items()))
    return st.builds(lambda one, other: one | other, good, st.just({}) | wild)


GRID = mostly(
    workers=(one_of(1, 2, 5), JUNK), processes=(one_of(1, 2), JUNK), engine=(st.just("local"), JUNK | TEXTS),
    device=(one_of("cpu", "auto"), DEVICES | TEXTS), name=(st.just("jumplora"), JUNK),
    timeout_min=(st.just(5), JUNK), slurm_partition=(st.nothing(), JUNK), mem_gb=(st.just(1), JUNK),
)  # fmt: skip
ROW_COUNTS = st.dictionaries(one_of("train", "dev", "test"), one_of(1, 2), max_size=2)
JOB = mostly(
    seeds=(st.lists(one_of(1, 2), max_size=2), st.lists(JUNK, max_size=2)),
    split=(one_of("test", "dev"), TEXTS), dtype=(one_of("auto", "float32", "bfloat16"), DTYPES),
    backbone=(one_of("tiny-llama", "tiny-t5"), TEXTS), sequence=(st.nothing(), PATHS | TEXTS),
    train=(st.just(dict(rank=2)), st.dictionaries(one_of("rank", "epochs"), JUNK, max_size=1)),
    rows=(ROW_COUNTS, st.dictionaries(one_of("train", "dev", "test"), JUNK, max_size=2)),
)  # fmt: skip


@given(GRID, JOB)
@check
def settings_of_a_grid(options, drawn):
    with inside() as folder:
        rows = json.dumps([dict(text="one", label="a"), dict(text="two", label="b")])
        for split in ("train", "dev", "test"):
            (folder / "rows" / "mine").mkdir(parents=True, exist_ok=True)
            (folder / "rows" / "mine" / f"{split}.json").write_text(rows)
        shared = {name: drawn[name] for name in ("split", "dtype", "train", "rows") if name in drawn}
        sequence = drawn.get("sequence", str(folder / "rows"))
        started, known = (
            [],
            (*options, *drawn, *shared.get("rows", ()), *shared.get("train", ()), "seed", "submitit"),
        )
        with patch.object(grid, "_run_here", lambda out, keys, *rest: started.extend(keys)):
            with taken_or_refused(*known, str(sequence), "number of a GPU"):
                jobs = grid.plan(
                    ["IncLoRA"],
                    [sequence],
                    drawn.get("seeds", [1]),
                    backbone=drawn.get("backbone", "tiny-llama"),
                    **shared,
                )
                table = grid.run_grid(jobs, folder / "out", **options)
        assert len(started) == len(table) == len(set(drawn.get("seeds", [1])))
        assert set(table["state"]) <= {"waiting"}


ENCODINGS = one_of(
    "ascii", "latin-1", "cp1252", "cp437", "utf-8", "utf-16", "shift_jis", "koi8-r", "mac_roman"
)
SPOKEN = one_of(
    ["--help"], ["compare", "--help"], ["grid", "--help"], ["show", "RUN"], ["table", "RUN"],
    ["compaer"], ["table", "RUN", "--format", "markdown"], ["data", "check", "RUN"], ["show", "λ 日本"],
)  # fmt: skip


@given(ENCODINGS, SPOKEN, one_of("λ", "日本", "a", "€", "é ü"))
@check
def terminals_of_any_encoding(encoding, spoken, note):
    with inside() as folder:
        run = replace(whole_run(), extra=dict(state_tasks=2, notes=dict(a=note)))
        (home := folder / "runs").mkdir()
        run.save(home)
        words = [str(home / run.name) if word == "RUN" and spoken[0] == "show" else word for word in spoken]
        words = [str(home) if word == "RUN" else word for word in words]
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        streams[1].reconfigure(errors="backslashreplace")  # as Python's own
        with (
            patch("sys.stdout", streams[0]),
            patch("sys.stderr", streams[1]),
            patch("sys.argv", ["jumplora", *words]),
        ):
            from jumplora.command_line import main

            code = main()
        for stream in streams:
            stream.flush()
        said = [stream.buffer.getvalue().decode(encoding) for stream in streams]
        assert code in (0, 1, 2) and any(said) and "Traceback" not in "".join(said)
        if spoken[0] == "show" and code == 0 and note == "a":
            assert "a: a" in said[0]


FLAGS = dict(rank=4, method=["ELLA"], seed=[1], sequence="newsroom", progress=False, kept=None, train_rows=3)
YAML = st.dictionaries(
    one_of(*FLAGS, "ranks", "", "config"), JUNK | one_of(*map(str, FLAGS.values())), max_size=3
)


@given(
    YAML.map(lambda value: json.dumps(value).encode())
    | damaged(yaml.safe_dump(FLAGS).encode())
    | st.binary(max_size=30)
)
@check
def files_of_flags(content):
    with inside() as folder:
        (folder / "flags.yaml").write_bytes(content)
        printed = shell(
            "compare",
            "--sequence",
            folder / "nowhere",
            "--config",
            folder / "flags.yaml",
            "--backbone",
            folder / "none",
        )
        assert printed.strip()


CHECKS = [value for value in dict(globals()).values() if getattr(value, "is_hypothesis_test", False)]
