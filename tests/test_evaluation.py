"""Answers and option scores against one row at a time, without cache, mask or padding."""

from functools import cache
from os.path import commonprefix

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import jumplora.learning.evaluation as evaluation
from jumplora.data.backbones import byte_tokenizer
from jumplora.learning.evaluation import answer, by_length, evaluate, normalize
from jumplora.learning.tasks import Example, Task, encode_answer, encode_prompt
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import adapter_layers, gate_groups

OPTIONS = ("no", "natural science", "a sport that is played with a ball")  # 1, a few and many tokens
TEXTS = [
    *("goal", "x", "two teams met and one of them won", "an atom splits", "ice", "a b c d e f g"),
    "cells divide in two, and each of the two divides again, and so on until the food is gone",
]
TASK = Task("topics", "Which topic?\n", OPTIONS, [("a", "no")], [], [(t, OPTIONS[0]) for t in TEXTS])


@cache
def tokenizer_of(kind):
    if kind != "t5":
        special = dict(unk_token="<|?|>", bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>")
        return byte_tokenizer(**special)
    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    end = [("</s>", tokenizer.eos_token_id)]
    closing = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=end)
    tokenizer.backend_tokenizer.post_processor = closing
    return tokenizer


def load(kind, seed=0):
    "A random model with large weights, so that different texts get different answers."
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(kind)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    ids["vocab_size"] = len(tokenizer)
    if kind == "llama":
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        config = LlamaConfig(num_key_value_heads=1, initializer_range=0.3, **sizes, **ids)
        return LlamaForCausalLM(config).eval(), tokenizer
    if kind == "mistral":  # looks back eight tokens, so padding inside a prompt would show
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        config = MistralConfig(num_key_value_heads=1, initializer_range=0.3, sliding_window=8, **sizes, **ids)
        return MistralForCausalLM(config).eval(), tokenizer
    if kind == "gpt2":  # learned positions: a wrong position shows, which rotary embeddings would hide
        sizes = dict(n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
        ids["bos_token_id"] = tokenizer.bos_token_id
        return GPT2LMHeadModel(GPT2Config(**sizes, **ids)).eval(), tokenizer
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0)
    config = T5Config(**sizes, **ids, decoder_start_token_id=tokenizer.pad_token_id)
    model = T5ForConditionalGeneration(config).eval()
    for block in model.decoder.block:  # a random decoder hardly listens to its encoder
        attention = block.layer[1].EncDecAttention
        for projection in (attention.v, attention.o):
            projection.weight.data *= 6
    return model, tokenizer


KINDS = ["llama", "mistral", "gpt2", "t5"]


@torch.no_grad()
def next_logits(model, prompt, said):
    "Logits after a prompt and what was said so far: one row, nothing kept, nothing padded."
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        return model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([start + said])).logits[0]
    return model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 :]


def greedy(model, tokenizer, prompt, steps):
    said = []
    while len(said) < steps and tokenizer.eos_token_id not in said:
        said.append(next_logits(model, prompt, said)[-1].argmax().item())
    return tokenizer.decode(said, skip_special_tokens=True)


def score(model, prompt, option):
    logits = next_logits(model, prompt, option[:-1]).double().numpy()
    high = logits.max(-1, keepdims=True)
    logs = logits - high - np.log(np.exp(logits - high).sum(-1, keepdims=True))
    return logs[np.arange(len(option)), option].sum()


def prompts(tokenizer, texts=TEXTS, **settings):
    return [encode_prompt(tokenizer, TASK, text, **dict(max_length=128) | settings) for text in texts]


def options(tokenizer, kind):
    return [encode_answer(tokenizer, option, kind == "t5") for option in OPTIONS]


# ---- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_batch_are_those_of_one_row_at_a_time(kind):
    model, tokenizer = load(kind)
    longest = max(map(len, options(tokenizer, kind)))
    assert len({len(prompt) for prompt in prompts(tokenizer)}) > 4
    expected = [greedy(model, tokenizer, prompt, longest) for prompt in prompts(tokenizer)]
    assert len(set(expected)) > 2  # else equal answers would prove little
    for batch_size in (1, 3, 16):
        said, _ = answer(model, tokenizer, TASK, TEXTS, batch_size=batch_size, max_new_tokens=2)
        assert said == expected


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stop_at_the_end_token_and_other_rows_go_on(kind):
    model, tokenizer = load(kind)
    said, _ = answer(model, tokenizer, TASK, TEXTS)
    first = {next_logits(model, prompt, [])[-1].argmax().item() for prompt in prompts(tokenizer)}
    stop = sorted(first)[0]
    before, tokenizer.eos_token_id = tokenizer.eos_token_id, stop  # one row's first token ends an answer now
    try:
        longest = max(map(len, options(tokenizer, kind)))
        expected = [greedy(model, tokenizer, prompt, longest) for prompt in prompts(tokenizer)]
        stopped, _ = answer(model, tokenizer, TASK, TEXTS)
    finally:
        tokenizer.eos_token_id = before
    assert stopped == expected != said


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    "own",
    [
        dict(repetition_penalty=5.0),
        dict(num_beams=3),
        dict(do_sample=True, temperature=5.0),
        dict(min_new_tokens=6, no_repeat_ngram_size=1),
        dict(max_new_tokens=1, suppress_tokens=list(range(5, 200))),
    ],
    ids=lambda own: "+".join(own),
)
def test_answers_are_greedy_whatever_the_models_own_settings_ask(kind, own):
    model, tokenizer = load(kind)
    expected, scores = answer(model, tokenizer, TASK, TEXTS[:3])
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config
    said, likely = answer(model, tokenizer, TASK, TEXTS[:3])
    assert said == expected
    assert torch.equal(likely, scores)
    assert model.generation_config is settings  # given back as it was
    assert all(getattr(settings, name) == value for name, value in own.items())


def test_the_models_own_settings_come_back_after_an_error(monkeypatch):
    model, tokenizer = load("llama")
    settings = model.generation_config

    def fail(**inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(model, tokenizer, TASK, TEXTS[:1])
    assert model.generation_config is settings


@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_that_say_no_option_are_generated(kind, monkeypatch):
    model, tokenizer = load(kind, seed=2)
    rows, steps = prompts(tokenizer), 3
    said = []
    for row in rows:  # greedy tokens of each
        said.append([])
        for _ in range(steps):
            said[-1].append(next_logits(model, row, said[-1])[-1].argmax().item())
    choices = [said[0], [9, 9, 9], said[3][:2] + [9]]  # an answer, none, and one that leaves it at the end
    others = [i for i, tokens in enumerate(said) if tokens != said[0]]
    assert 0 < len(others) < len(rows)
    generated, own = [], evaluation.generate

    def count(*args, **inputs):
        answers = own(*args, **inputs)
        generated.append(len(answers))
        return answers

    monkeypatch.setattr(evaluation, "generate", count)
    answers, scores = evaluation.reader(model, rows)(model, tokenizer, rows, choices, steps)
    assert generated == [len(others)]
    assert answers == tokenizer.batch_decode(said, skip_special_tokens=True)
    expected = np.array([[score(model, row, option) for option in choices] for row in rows])
    assert np.abs(scores.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_common_start_is_read_once(kind, monkeypatch):
    model, tokenizer = load(kind)
    read, own = [], type(model.get_decoder()).forward

    def watch(self, *args, **inputs):
        read.append(tuple((args[0] if args else inputs["input_ids"]).shape))
        return own(self, *args, **inputs)

    monkeypatch.setattr(type(model.get_decoder()), "forward", watch)
    answer(model, tokenizer, TASK, TEXTS, batch_size=4)
    rows = sorted(prompts(tokenizer), key=len)
    shared = len(commonprefix(rows))
    assert shared > 10 and read[0] == (1, shared)
    assert (4, len(rows[3]) - shared - 1) in read and (3, len(rows[-1]) - shared - 1) in read


def test_rows_are_read_from_short_to_long_and_each_once():
    rows = [[0] * n for n in (5, 1, 4, 2, 3)]
    assert by_length(rows, 2) == [[1, 3], [4, 2], [0]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_and_no_text_at_all_are_answered(kind):
    model, tokenizer = load(kind)
    said, scores = answer(model, tokenizer, TASK, ["", "goal"])
    longest = max(map(len, options(tokenizer, kind)))
    assert said == [greedy(model, tokenizer, prompt, longest) for prompt in prompts(tokenizer, ["", "goal"])]
    assert scores.isfinite().all()
    said, scores = answer(model, tokenizer, TASK, [])
    assert (said, scores.shape) == ([], (0, 3))


@pytest.mark.parametrize("truncation", ["field", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_very_long_text_is_cut_and_answered(kind, truncation):
    model, tokenizer = load(kind)
    texts, cut = ["goal", "the team won {again} " * 2000], dict(max_length=100, truncation=truncation)
    said, scores = answer(model, tokenizer, TASK, texts, **cut)
    rows = prompts(tokenizer, texts, **cut)
    assert max(map(len, rows)) <= 100
    longest = max(map(len, options(tokenizer, kind)))
    assert said == [greedy(model, tokenizer, prompt, longest) for prompt in rows]
    expected = [[score(model, prompt, option) for option in options(tokenizer, kind)] for prompt in rows]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_a_prompt_of_one_token_is_answered():
    model, tokenizer = load("llama")
    cut = dict(max_length=1, truncation="reference")
    said, scores = answer(model, tokenizer, TASK, ["goal"], **cut)
    ((token,),) = prompts(tokenizer, ["goal"], **cut)
    longest = max(map(len, options(tokenizer, "llama")))
    assert said == [greedy(model, tokenizer, [token], longest)]
    assert scores.isfinite().all()


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    model, tokenizer = load("llama")
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        answer(model, tokenizer, TASK, TEXTS, batch_size=batch_size)


# ---- option scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_option_scores_are_summed_log_probabilities_of_a_full_pass(kind):
    model, tokenizer = load(kind)
    choices = options(tokenizer, kind)
    assert len({len(option) for option in choices}) == 3
    expected = np.array([[score(model, p, option) for option in choices] for p in prompts(tokenizer)])
    assert len(set(expected.round(3).ravel())) > 12  # rows and options differ
    for batch_size in (1, 3, 16):
        _, scores = answer(model, tokenizer, TASK, TEXTS, batch_size=batch_size)
        assert scores.shape == (len(TEXTS), 3)
        assert np.abs(scores.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_an_option_does_not_depend_on_the_others(kind):
    model, tokenizer = load(kind)
    _, scores = answer(model, tokenizer, TASK, TEXTS)
    for i, option in enumerate(OPTIONS):
        alone = Task("alone", TASK.instruction, (option,), [("a", option)], [], [("a", option)])
        with pytest.MonkeyPatch.context() as patch:  # the same prompts, one option
            patch.setattr(evaluation, "encode_prompt", lambda t, task, *rest: encode_prompt(t, TASK, *rest))
            _, one = answer(model, tokenizer, alone, TEXTS)
        torch.testing.assert_close(one[:, 0], scores[:, i], rtol=1e-4, atol=1e-4)


# ---- scores of a task -------------------------------------------------------------------------------------


def scripted(monkeypatch, answers, likeliest):
    "A model that says these answers and finds these options likeliest."
    scores = torch.eye(len(OPTIONS))[[OPTIONS.index(option) for option in likeliest]]
    monkeypatch.setattr(evaluation, "answer", lambda *args, **settings: (answers, scores))


def with_labels(*labels):
    rows = [Example(f"text {i}", label) for i, label in enumerate(labels)]
    return Task("scripted", "", OPTIONS, rows[:1], rows, rows)


def test_both_scores_are_percent_of_the_rows(monkeypatch):
    labels = [OPTIONS[i] for i in (0, 1, 2, 0)]
    scripted(monkeypatch, [OPTIONS[0], "nonsense", OPTIONS[2], OPTIONS[0]], [labels[0], *[OPTIONS[2]] * 3])
    model = torch.nn.Linear(1, 1)
    result = evaluate(model, None, with_labels(*labels))
    assert (result.exact_match, result.option_accuracy, result.rows) == (75.0, 50.0, 4)
    assert result.answers == (OPTIONS[0], "nonsense", OPTIONS[2], OPTIONS[0])


@pytest.mark.parametrize("rows", [11, 22, 39, 44])  # 100 / 11 * 11 is above 100
def test_a_perfect_score_is_one_hundred_percent(rows, monkeypatch):
    scripted(monkeypatch, [OPTIONS[0]] * rows, [OPTIONS[0]] * rows)
    result = evaluate(torch.nn.Linear(1, 1), None, with_labels(*[OPTIONS[0]] * rows))
    assert (result.exact_match, result.option_accuracy) == (100.0, 100.0)


def test_case_and_white_space_do_not_count_and_nothing_else_is_forgiven(monkeypatch):
    assert normalize("  Natural\n\tSCIENCE ") == "natural science"
    said = [" Natural \n science", "NATURAL SCIENCE", "natural science.", "natural  sciences", ""]
    scripted(monkeypatch, said, [OPTIONS[0]] * 5)
    result = evaluate(torch.nn.Linear(1, 1), None, with_labels(*[OPTIONS[1]] * 5))
    assert result.exact_match == 40.0


def test_labels_outside_the_options_count_as_wrong_in_both_scores(monkeypatch):
    task = Task("outside", "", OPTIONS, [("a", "no")], [], [("a", "no"), ("b", "weather"), ("c", "NO")])
    assert task.outside_options == 2
    scripted(monkeypatch, ["no", "weather", "no"], ["no", "no", "no"])
    result = evaluate(torch.nn.Linear(1, 1), None, task)
    assert result.option_accuracy == pytest.approx(100 / 3)
    assert result.exact_match == pytest.approx(100 / 3)


def test_the_split_is_the_one_that_was_asked_for():
    model, tokenizer = load("llama")
    task = Task("splits", "", OPTIONS, [("a", "no")] * 3, [("b", "no")] * 2, [("c", "no")])
    assert [evaluate(model, tokenizer, task, split).rows for split in ("train", "dev", "test")] == [3, 2, 1]
    with pytest.raises(ValueError, match=r"split='eval'.*'dev'"):
        evaluate(model, tokenizer, task, "eval")
    with pytest.raises(ValueError, match="'topics' has no dev rows"):
        evaluate(model, tokenizer, TASK, "dev")


@pytest.mark.parametrize("training", [True, False])
def test_train_or_eval_mode_is_as_before_also_after_an_error(training, monkeypatch):
    model, tokenizer = load("llama")
    model.train(training)
    modes = []
    own = evaluation.read_options

    def watch(model, *args):
        modes.append(model.training)
        return own(model, *args)

    monkeypatch.setattr(evaluation, "read_options", watch)
    evaluate(model, tokenizer, TASK)
    assert modes and not any(modes)
    assert model.training is training

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evaluation, "read_options", fail)
    with pytest.raises(RuntimeError):
        evaluate(model, tokenizer, TASK)
    assert model.training is training


def test_progress_counts_every_row_once():
    model, tokenizer = load("llama")
    done = []
    evaluate(model, tokenizer, TASK, batch_size=3, advance=done.append)
    assert done == [3, 3, 1]


def test_scoring_leaves_no_gradient_and_changes_no_weight():
    model, tokenizer = load("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, scores = answer(model, tokenizer, TASK, TEXTS[:2])
    assert not scores.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_wrapped_and_a_merged_model_agree(kind, gated):
    model, tokenizer = load(kind)
    plain = answer(model, tokenizer, TASK, TEXTS)
    wrapped = attach_adapter(model, TrainConfig(rank=2), gated)
    generator = torch.Generator().manual_seed(1)
    for layer in adapter_layers(wrapped).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    for group in gate_groups(wrapped).values():
        group.gate.set_threshold(0.05)
        group.gate.interpolation.fill_(1.0)
    wrapped.eval()
    adapted = answer(wrapped, tokenizer, TASK, TEXTS)
    with wrapped.disable_adapter():
        disabled = answer(wrapped, tokenizer, TASK, TEXTS)
    merged = answer(wrapped.merge_and_unload(), tokenizer, TASK, TEXTS)
    assert adapted[0] == merged[0]
    torch.testing.assert_close(adapted[1], merged[1], rtol=1e-4, atol=1e-4)
    assert disabled[0] == plain[0]
    torch.testing.assert_close(disabled[1], plain[1], rtol=1e-4, atol=1e-4)
    assert (adapted[1] - plain[1]).abs().max() > 0.1  # the adapter does change what is said


def test_a_bf16_model_is_scored():
    model, tokenizer = load("llama")
    exact = answer(model, tokenizer, TASK, TEXTS)[1]
    said, rough = answer(model.bfloat16(), tokenizer, TASK, TEXTS)
    assert len(said) == len(TEXTS)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.05
