"A row's scores and answer are those of full passes over it alone, in any kind of model."

from functools import cache

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

import jumplora.learning.evaluation as evaluation
from jumplora.data.backbones import byte_tokenizer
from jumplora.learning.evaluation import answer
from jumplora.learning.tasks import Question, encode_answer, encode_prompt
from jumplora.running.answers import contiguous_head, reads_together

QUESTION = Question("q", "What is it? Choose one from the option and think. ", ("good", "rather bad", "no"))
TEXTS = ["x", "hello there you " * 6, "two teams met and one won"]

SHAPE = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    head_dim=16, max_position_embeddings=512,
)  # fmt: skip
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)
WINDOW = SHAPE | dict(sliding_window=8)
ROPE = dict(rope_theta=10000.0, factor=4.0)
LONG = ROPE | dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8)
EXPERTS = dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)
EXPERTS |= dict(shared_expert_intermediate_size=32)
MAMBA = dict(hidden_size=64, num_hidden_layers=2, state_size=8)
DECODERS = {  # config -> settings; rows share batches and a prefix
    "Llama": SHAPE, "Qwen2": SHAPE, "Qwen3": SHAPE, "Mistral": WINDOW, "Gemma2": WINDOW, "Gemma3Text": WINDOW,
    "Phi": SHAPE, "Phi3": SHAPE, "SmolLM3": SHAPE, "Olmo2": SHAPE, "Granite": SHAPE, "GptOss": WINDOW,
    "Qwen3Moe": SHAPE | EXPERTS, "GPT2": GPT, "GPTNeoX": SMALL | dict(intermediate_size=96),
    "GPTJ": GPT | dict(rotary_dim=8), "Falcon": SMALL | dict(alibi=True), "StableLm": SHAPE,
    "OPT": SMALL | dict(ffn_dim=96, word_embed_proj_dim=64),
    "Bloom": dict(hidden_size=64, n_layer=2, n_head=4),
}  # fmt: skip
ALONE = {  # config -> settings; each row is read alone
    "GPTNeo": dict(
        hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "Mpt": dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=512),
    "Llama4Text": SHAPE | dict(attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=96),
    "Rwkv": dict(hidden_size=64, num_hidden_layers=2, attention_hidden_size=64),
    "Mamba": MAMBA, "FalconMamba": MAMBA,
    "Mamba2": MAMBA | dict(num_heads=8, head_dim=16, n_groups=1),
    "RecurrentGemma": SHAPE | dict(attention_window_size=8, lru_width=64, num_hidden_layers=3),
    "Lfm2": SHAPE | dict(layer_types=["conv", "full_attention"]),
    "Qwen3Next": SHAPE | EXPERTS | dict(
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "Jamba": SHAPE | dict(
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, use_mamba_kernels=False
    ),
    "Bamba": SHAPE | dict(
        attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8
    ),
    "MiniMax": SHAPE | dict(
        layer_types=["linear_attention", "full_attention"], num_local_experts=2, block_size=8
    ),
    "ModernBertDecoder": SHAPE | dict(cls_token_id=1, sep_token_id=2, local_attention=8),
    "OpenAIGPT": GPT,
    "Phi3 of long texts": SHAPE | dict(rope_parameters=LONG, original_max_position_embeddings=60),
}  # fmt: skip
LAYERS = dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
LAYERS |= dict(decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=512)
T5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
ENCODERS = {"T5": T5, "LongT5": T5 | dict(local_radius=4), "Bart": LAYERS, "MBart": LAYERS, "PLBart": LAYERS}
ENCODERS |= {"Marian": LAYERS, "Pegasus": LAYERS, "M2M100": LAYERS, "LED": LAYERS | dict(attention_window=8)}
ALONE_ENCODERS = {
    "SwitchTransformers": T5 | dict(
        num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2
    ),
    "ProphetNet": dict(
        hidden_size=64, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        max_position_embeddings=128,
    ),
}  # fmt: skip
FAMILIES = DECODERS | ALONE | ENCODERS | ALONE_ENCODERS


@cache
def words():
    special = dict(unk_token="<|?|>", bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>")
    return byte_tokenizer(**special)


def model_of(family, **changes):
    "A model of two layers, made in place, whose large weights make neighbours count."
    tokens = words()
    ids = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    encoder_decoder = family in ENCODERS | ALONE_ENCODERS
    if encoder_decoder:
        ids["decoder_start_token_id"] = tokens.pad_token_id
    kind = getattr(transformers, family.split()[0] + "Config")
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(kind(vocab_size=len(tokens), **ids, **FAMILIES[family] | changes)).float().eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.mul_(5 if weights.std() < 0.1 else 1.5)
    return model


@torch.no_grad()
def alone(model, text):
    "Option scores and greedy answer of one text: full passes without cache, padding and masks."
    tokens = words()
    read = encode_prompt(tokens, QUESTION, text, 512)

    def logits_after(written):  # (1 + written, vocabulary)
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *written]])
            return model(input_ids=torch.tensor([read]), decoder_input_ids=start).logits[0]
        return model(input_ids=torch.tensor([read + written])).logits[0, len(read) - 1 :]

    options = [encode_answer(tokens, option, model.config.is_encoder_decoder) for option in QUESTION.options]
    logs = [logits_after(option[:-1]).log_softmax(-1) for option in options]
    scores = [log[torch.arange(len(option)), option].sum() for log, option in zip(logs, options, strict=True)]
    written = []
    while len(written) < max(map(len, options)) and written[-1:] != [tokens.eos_token_id]:
        written.append(logits_after(written)[-1].argmax().item())
    return torch.stack(scores), tokens.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_answered_in_a_batch_as_by_full_passes_over_it_alone(family):
    model = model_of(family)
    assert reads_together(model, 200) == (family in DECODERS | ENCODERS)
    expected, texts = zip(*(alone(model, text) for text in TEXTS), strict=True)
    expected = torch.stack(expected)
    assert expected.std(0).max() > 0.02  # the text counts
    close = dict(rtol=1e-5, atol=1e-5)
    answers, scores = answer(model, words(), QUESTION, TEXTS, max_length=512, max_new_tokens=1)
    torch.testing.assert_close(scores, expected, **close)
    assert answers == list(texts)
    for text, row, given in zip(TEXTS[:2], scores, answers, strict=False):
        single, one = answer(model, words(), QUESTION, [text], max_length=512, max_new_tokens=1)
        torch.testing.assert_close(one[0], row, **close)
        assert single == [given]


class Own(LlamaForCausalLM):
    "A model whose code is not that of transformers, with a type that is."


def unknown_type():
    model = model_of("Llama")
    model.config.model_type = "brand_new"
    return model


def unknown_code():
    model = model_of("Llama")
    model.__class__ = Own
    return model


@pytest.mark.parametrize("made", [unknown_type, unknown_code])
def test_a_model_of_unknown_kind_reads_each_row_alone_and_shares_nothing(made, monkeypatch):
    expected, scores = answer(model_of("Llama"), words(), QUESTION, TEXTS)
    monkeypatch.delattr(evaluation.reading, "read_prefix")
    monkeypatch.delattr(evaluation.reading, "read_decoder")
    done = []
    answers, found = answer(made(), words(), QUESTION, TEXTS, advance=done.append)
    torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-5)
    assert answers == expected and done == [1] * len(TEXTS)


def test_frequencies_that_depend_on_the_longest_text_so_far_are_refused_beyond_their_length():
    rope = ROPE | dict(rope_type="dynamic")
    model = model_of("Llama", rope_parameters=rope, max_position_embeddings=80)
    assert reads_together(model, 80)
    with pytest.raises(ValueError, match="'dynamic' and .* max_position_embeddings=80.*lower max_length"):
        answer(model, words(), QUESTION, ["a long text " * 20], max_length=200)
    assert len(answer(model, words(), QUESTION, TEXTS, max_length=60)[0]) == len(TEXTS)


def test_the_output_layer_reads_a_batch_in_one_product_and_keeps_no_hook():
    model = model_of("Llama")
    shapes = []
    head = model.get_output_embeddings()
    given = dict(input_ids=torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]]), logits_to_keep=2)
    expected = model(**given).logits
    with contiguous_head(model):
        watch = head.register_forward_pre_hook(lambda layer, args: shapes.append(args[0].is_contiguous()))
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-5, atol=1e-5)
        watch.remove()
    assert shapes == [True] and not head._forward_pre_hooks
