"""Answers and option scores against one row at a time; the metrics against sums written out here."""

import copy
import math
from functools import cache
from os.path import commonprefix

import numpy as np
import pytest
import torch
from equal_runs import same_weights
from hypothesis import given, settings
from hypothesis import strategies as st
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
from jumplora.learning.evaluation import (
    answer,
    as_matrix,
    average_accuracy,
    backward_transfer,
    evaluate,
    forgetting,
    forward_transfer,
    interval,
    just_learned,
    retention,
    running_average,
    sign_test,
)
from jumplora.learning.tasks import Example, Question, Task, encode_answer, encode_prompt
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


def alone(model, tokenizer, kind, texts=TEXTS, **cut):
    "What `answer` must return: greedy answers and option scores, one row and one pass at a time."
    options = [encode_answer(tokenizer, option, kind == "t5") for option in OPTIONS]
    answers, scores = [], []
    for prompt in prompts(tokenizer, texts, **cut):
        said = []
        while len(said) < max(map(len, options)) and tokenizer.eos_token_id not in said:
            said.append(next_logits(model, prompt, said)[-1].argmax().item())
        answers.append(tokenizer.decode(said, skip_special_tokens=True))
        scores.append([score(model, prompt, option) for option in options])
    return answers, np.array(scores)


def score(model, prompt, option):
    logits = next_logits(model, prompt, option[:-1]).double().numpy()
    high = logits.max(-1, keepdims=True)
    logs = logits - high - np.log(np.exp(logits - high).sum(-1, keepdims=True))
    return logs[np.arange(len(option)), option].sum()


def prompts(tokenizer, texts=TEXTS, **settings):
    return [encode_prompt(tokenizer, TASK, text, **dict(max_length=128) | settings) for text in texts]


def same_answers(found, expected):
    (said, scores), (expected_answers, expected_scores) = found, expected
    assert said == expected_answers
    assert np.abs(scores.numpy() - expected_scores).max() < 1e-4 * np.abs(expected_scores).max()


# ---- answers and option scores ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
# differences: 13, 17, 18
def test_answers_and_scores_of_a_batch_are_those_of_one_row_at_a_time(kind):
    model, tokenizer = load(kind)
    assert len({len(prompt) for prompt in prompts(tokenizer)}) > 4
    assert len({len(encode_answer(tokenizer, option, kind == "t5")) for option in OPTIONS}) == 3
    expected = alone(model, tokenizer, kind)
    assert len(set(expected[0])) > 2  # else equal answers would prove little
    assert len(set(expected[1].round(3).ravel())) > 12  # rows and options differ
    for batch_size in (1, 3, 16):
        found = answer(model, tokenizer, TASK, TEXTS, batch_size=batch_size, max_new_tokens=2)
        same_answers(found, expected)
        assert found[1].shape == (len(TEXTS), 3) and not found[1].requires_grad


def test_a_pass_over_many_options_reads_fewer_rows(monkeypatch):
    model, tokenizer = load("llama")
    many = Question("many", "Which?\n", tuple(map(str, range(100))), list_options=False)
    forward, rows = model.forward, []
    monkeypatch.setattr(
        model, "forward", lambda **given: rows.append(len(given["input_ids"])) or forward(**given)
    )
    scores = answer(model, tokenizer, many, TEXTS[:5], max_new_tokens=1)[1]
    assert max(rows) == 200 and scores.shape == (5, 100)


LONG = "the team won {again} " * 2000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "texts, cut",
    [
        (["", "goal"], {}),
        (["goal", LONG], dict(max_length=100, truncation="field")),
        (["goal", LONG], dict(max_length=100, truncation="reference")),
        (["goal"], dict(max_length=1, truncation="reference")),
    ],
    ids=["empty", "field", "reference", "one token"],
)
def test_texts_of_any_length_are_answered(kind, texts, cut):
    model, tokenizer = load(kind)
    assert max(map(len, prompts(tokenizer, texts, **cut))) <= cut.get("max_length", 128)
    same_answers(answer(model, tokenizer, TASK, texts, **cut), alone(model, tokenizer, kind, texts, **cut))
    said, scores = answer(model, tokenizer, TASK, [])
    assert (said, scores.shape) == ([], (0, 3))


@pytest.mark.parametrize("kind", KINDS)
# differences: 17, 18
def test_answers_stop_at_the_end_token_and_other_rows_continue(kind, monkeypatch):
    model, tokenizer = load(kind)
    said, _ = answer(model, tokenizer, TASK, TEXTS)
    first = {next_logits(model, prompt, [])[-1].argmax().item() for prompt in prompts(tokenizer)}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token_id = sorted(first)[0]  # one row's first token ends an answer now
    stopped, _ = answer(model, tokenizer, TASK, TEXTS)
    assert stopped == alone(model, tokenizer, kind)[0] != said


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
# differences: 38
def test_answers_are_greedy_whatever_the_models_own_settings_are_which_come_back(kind, own, monkeypatch):
    model, tokenizer = load(kind)
    expected, scores = answer(model, tokenizer, TASK, TEXTS[:3])
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config
    said, likely = answer(model, tokenizer, TASK, TEXTS[:3])
    assert said == expected and torch.equal(likely, scores)
    assert all(getattr(settings, name) == value for name, value in own.items())

    def fail(**inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(model, tokenizer, TASK, TEXTS[:3])
    assert model.generation_config is settings


@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_whose_greedy_answer_is_no_option_are_generated(kind, monkeypatch):
    model, tokenizer = load(kind, seed=2)
    rows, greedy_tokens = prompts(tokenizer), []
    for row in rows:
        greedy_tokens.append([])
        for _ in range(4):
            greedy_tokens[-1].append(next_logits(model, row, greedy_tokens[-1])[-1].argmax().item())
    first = greedy_tokens[0][:3]  # an answer, none (and longer), and one that leaves it at its last token
    choices = dict(zip(OPTIONS, [first, [9, 9, 9, 9], greedy_tokens[3][:2] + [9]], strict=True))
    expected = [first if tokens[:3] == first else tokens for tokens in greedy_tokens]
    assert 0 < expected.count(first) < len(rows)
    monkeypatch.setattr(evaluation, "encode_answer", lambda tokenizer, option, kind: choices[option])
    generated, own = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: generated.append(len(inputs["attention_mask"])) or own(**inputs)
    )
    found = answer(model, tokenizer, TASK, TEXTS, max_new_tokens=1)
    assert generated == [len(rows) - expected.count(first)]
    scores = np.array([[score(model, row, option) for option in choices.values()] for row in rows])
    same_answers(found, (tokenizer.batch_decode(expected, skip_special_tokens=True), scores))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_shared_prefix_is_read_once_and_rows_from_short_to_long(kind, monkeypatch):
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_an_option_does_not_depend_on_the_others(kind, monkeypatch):
    model, tokenizer = load(kind)
    _, scores = answer(model, tokenizer, TASK, TEXTS)
    own = lambda tokenizer, task, *rest: encode_prompt(tokenizer, TASK, *rest)  # noqa: E731
    monkeypatch.setattr(evaluation, "encode_prompt", own)  # the same prompts, one option
    for i, option in enumerate(OPTIONS):
        _, one = answer(model, tokenizer, Question("alone", TASK.instruction, (option,)), TEXTS)
        torch.testing.assert_close(one[:, 0], scores[:, i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    model, tokenizer = load("llama")
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        answer(model, tokenizer, TASK, TEXTS, batch_size=batch_size)


# ---- scores of a task -------------------------------------------------------------------------------------


def scripted(monkeypatch, answers, likeliest):
    "A model that says these answers and finds these options likeliest."
    scores = torch.eye(len(OPTIONS))[[OPTIONS.index(option) for option in likeliest]]
    monkeypatch.setattr(evaluation, "answer", lambda *args, **settings: (answers, scores))


def with_labels(*labels):
    rows = [Example(f"text {i}", label) for i, label in enumerate(labels)]
    return Task("scripted", "", OPTIONS, rows[:1], rows, rows)


def test_a_score_keeps_which_rows_are_right_and_its_percent_follow(monkeypatch):
    labels = [OPTIONS[i] for i in (0, 1, 2, 0)]
    scripted(monkeypatch, [OPTIONS[0], "nonsense", OPTIONS[2], OPTIONS[0]], [labels[0], *[OPTIONS[2]] * 3])
    model = torch.nn.Linear(1, 1)
    result = evaluate(model, None, with_labels(*labels))
    assert (result.exact_match, result.option_accuracy, result.rows) == (75.0, 50.0, 4)
    assert result.answers == (OPTIONS[0], "nonsense", OPTIONS[2], OPTIONS[0])
    assert result.right == (True, False, True, True) and result.likeliest == (True, False, True, False)
    assert repr(result) == "<Score exact_match=75.0, option_accuracy=50.0, rows=4>"


@pytest.mark.parametrize("rows", [11, 22, 39, 44])  # 100 / 11 * 11 is above 100
def test_a_perfect_score_is_one_hundred_percent(rows, monkeypatch):
    scripted(monkeypatch, [OPTIONS[0]] * rows, [OPTIONS[0]] * rows)
    result = evaluate(torch.nn.Linear(1, 1), None, with_labels(*[OPTIONS[0]] * rows))
    assert (result.exact_match, result.option_accuracy) == (100.0, 100.0)


def test_case_and_white_space_do_not_count_and_nothing_else_is_forgiven(monkeypatch):
    said = [" Natural \n\tscience ", "NATURAL SCIENCE", "natural science.", "natural  sciences", ""]
    scripted(monkeypatch, said, [OPTIONS[0]] * 5)
    result = evaluate(torch.nn.Linear(1, 1), None, with_labels(*[OPTIONS[1]] * 5))
    assert result.right == (True, True, False, False, False)


# differences: 19
def test_labels_outside_the_options_count_as_wrong_in_both_scores(monkeypatch):
    task = Task("outside", "", OPTIONS, [("a", "no")], [], [("a", "no"), ("b", "weather"), ("c", "NO")])
    scripted(monkeypatch, ["no", "weather", "no"], ["no", "no", "no"])
    result = evaluate(torch.nn.Linear(1, 1), None, task)
    assert result.right == result.likeliest == (True, False, False)


def test_the_split_is_the_one_that_was_asked_for():
    model, tokenizer = load("llama")
    task = Task("splits", "", OPTIONS, [("a", "no")] * 3, [("b", "no")] * 2, [("c", "no")])
    assert [evaluate(model, tokenizer, task, split).rows for split in ("train", "dev", "test")] == [3, 2, 1]
    with pytest.raises(ValueError, match=r"split='eval'.*'dev'"):
        evaluate(model, tokenizer, task, "eval")
    with pytest.raises(ValueError, match="'topics' has no dev rows"):
        evaluate(model, tokenizer, TASK, "dev")


@pytest.mark.parametrize("training", [True, False])
def test_scoring_counts_its_rows_and_leaves_mode_and_weights_as_they_were(training, monkeypatch):
    model, tokenizer = load("llama")
    model.train(training)
    before = copy.deepcopy(model)
    done, modes, own = [], [], model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: modes.append(model.training) or own(**inputs))
    evaluate(model, tokenizer, TASK, batch_size=3, advance=done.append)
    assert done == [3, 3, 1] and modes and not any(modes)
    assert model.training is training and same_weights(model, before)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(TypeError):
        evaluate(model, tokenizer, TASK)
    assert model.training is training


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
# differences: 37
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


# ---- the matrix and its uncertainty -----------------------------------------------------------------------

NAN = float("nan")
WORKED = [[80, None, None], [84, 70, None], [60, 74, 91]]


@st.composite
def triangles(draw):
    size = draw(st.integers(2, 6))
    score = st.floats(0, 100, allow_nan=False)
    return [[draw(score) if j <= i else NAN for j in range(size)] for i in range(size)]


def test_the_worked_example_by_hand():
    assert average_accuracy(WORKED) == 75
    assert just_learned(WORKED) == pytest.approx(241 / 3)
    assert backward_transfer(WORKED) == -8
    assert forgetting(WORKED) == 12
    assert forward_transfer(WORKED, [80, 76, 90]) == pytest.approx(-7)


@settings(max_examples=60, deadline=None)
@given(triangles())
# differences: 21
def test_all_metrics_equal_their_sums_written_out(a):
    last, T = a[-1], len(a)
    assert average_accuracy(a) == pytest.approx(math.fsum(last) / T, rel=1e-12, abs=1e-9)
    assert just_learned(a) == pytest.approx(math.fsum(a[j][j] for j in range(T)) / T, abs=1e-9)
    bwt = math.fsum(last[j] - a[j][j] for j in range(T - 1)) / (T - 1)
    assert backward_transfer(a) == pytest.approx(bwt, abs=1e-9)
    fall = math.fsum(max(a[i][j] for i in range(j, T)) - last[j] for j in range(T - 1)) / (T - 1)
    assert forgetting(a) == pytest.approx(fall, abs=1e-9)
    assert forgetting(a) >= max(0, -backward_transfer(a) - 1e-9)
    scratch = [50.0] * T
    assert forward_transfer(a, scratch) == pytest.approx(math.fsum(last) / T - 50, abs=1e-9)


@pytest.mark.parametrize("metric", [average_accuracy, just_learned, backward_transfer, forgetting])
def test_scores_of_tasks_not_learned_yet_change_nothing_and_the_matrix_stays_as_it_is(metric):
    filled = as_matrix(WORKED)
    filled[np.triu_indices(3, 1)] = 99.0
    before = filled.copy()
    assert metric(filled) == metric(WORKED)
    assert np.array_equal(filled, before)


@pytest.mark.parametrize(
    "metric, missing",
    [(average_accuracy, (2, 1)), (just_learned, (1, 1)), (backward_transfer, (0, 0)),
     (backward_transfer, (2, 0)), (backward_transfer, (2, 2)), (forgetting, (1, 0))],
)  # fmt: skip
# differences: 21
def test_a_missing_score_is_named(metric, missing):
    a = as_matrix(WORKED)
    a[missing] = NAN
    with pytest.raises(ValueError, match=rf"not measured, .*: \[{missing[0]}, {missing[1]}\]$"):
        metric(a)


def test_a_missing_score_that_a_metric_does_not_read_is_no_error():
    a = as_matrix(WORKED)
    a[1, 0] = NAN
    assert (backward_transfer(a), average_accuracy(a)) == (-8, 75)
    assert forgetting([[80, None, None], [84, 70, None], [60, 74, None]]) == 12
    a[:2] = NAN  # all tasks learned at once
    assert (average_accuracy(a), forward_transfer(a, [60, 74, 91])) == (75, 0)


def test_many_missing_scores_are_listed_in_short():
    with pytest.raises(ValueError, match=r"\[9, 0\], .* and 4 more$"):
        average_accuracy(np.full((10, 10), NAN))


ONE = [[80.0]]
MISTAKES = [
    *[(metric, (ONE,), "there is 1 task") for metric in (backward_transfer, forgetting)],
    *[(average_accuracy, (bad,), r"use \(T, T\)") for bad in ([[1, 2]], [1, 2], [], [[]], 5.0)],
    *[(just_learned, ([[50, None], [bad, 50]],), r"accuracy\[1, 0\]") for bad in (-0.1, 100.1, math.inf)],
    *[(forward_transfer, (WORKED, bad), "scratch") for bad in ([80, 76], [80, NAN, 90], [80, 101, 90])],
    *[(interval, bad, "percent|rows") for bad in ((-1, 10), (101, 10), (50, 0), (NAN, 10))],
    (sign_test, ([True] * 3, [True] * 2), "3 and 2 rows; both methods must be scored on the same rows"),
]


@pytest.mark.parametrize("metric, arguments, says", MISTAKES)
def test_scores_that_cannot_be_summed_up_are_refused_with_the_reason(metric, arguments, says):
    with pytest.raises(ValueError, match=says):
        metric(*arguments)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 500), st.data())
def test_the_ends_of_wilsons_interval_are_where_the_score_test_just_fails(rows, data):
    right = data.draw(st.integers(0, rows))
    p = right / rows
    for end in interval(100 * p, rows):
        q = end / 100
        assert abs(p - q) == pytest.approx(1.96 * math.sqrt(q * (1 - q) / rows), abs=1e-6)
    low, high = interval(100 * p, rows)
    assert low - 1e-9 <= 100 * p <= high + 1e-9 and low < high


@pytest.mark.parametrize(
    "only_first, only_second, both", [(10, 2, 5), (2, 10, 0), (3, 3, 9), (0, 6, 1), (0, 0, 4)]
)
def test_the_sign_test_is_the_two_sided_binomial_test_of_the_rows_that_differ(only_first, only_second, both):
    first = [True] * only_first + [False] * only_second + [True] * both + [False]
    second = [False] * only_first + [True] * only_second + [True] * both + [False]
    n = only_first + only_second
    # all outcomes of n fair coins that are at least as far from n / 2
    far = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(only_first - only_second))
    assert sign_test(first, second) == (only_first, only_second, pytest.approx(far / 2**n))


def test_retention_and_the_running_average_are_means_over_later_times_written_out():
    a = [[80, np.nan, np.nan], [60, 90, np.nan], [30, 40, 70]]
    assert retention(a) == pytest.approx((60 + 30 + 40) / 3)
    assert running_average(a) == pytest.approx((80 + (60 + 90) / 2 + (30 + 40 + 70) / 3) / 3)
    assert running_average([[80]]) == 80
    with pytest.raises(ValueError, match=r"retention needs scores that were not measured.*\[1, 0\]"):
        retention([[80, np.nan], [np.nan, 50]])
    with pytest.raises(ValueError, match="there is 1 task"):
        retention([[80]])
