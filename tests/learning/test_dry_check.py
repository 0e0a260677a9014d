"What cannot work is refused before anything is computed or written, with what to do."

import copy

import pytest
import torch
import transformers as T
from equal_runs import same_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn.utils import parametrizations

from jumplora.data.backbones import byte_tokenizer, load_backbone
from jumplora.learning.continual import learn_sequence
from jumplora.learning.dry_check import dry_check
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence, encode_prompt
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import adapter_layers

SPECIAL = dict(unk_token="<|?|>", bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>")


def tokenizer(**changes):
    return byte_tokenizer(**{k: v for k, v in (SPECIAL | changes).items() if v is not None})


def of_words(*words, **changes):
    "A tokenizer that knows these words alone."
    special = SPECIAL | changes
    numbers = {word: i for i, word in enumerate([*special.values(), *words])}
    known = Tokenizer(WordLevel(numbers, unk_token=special["unk_token"]))
    known.pre_tokenizer = WhitespaceSplit()
    return T.PreTrainedTokenizerFast(tokenizer_object=known, **special)


def sequence(options=("good", "bad"), text="a text", instruction="What is it?\n"):
    rows = [(f"{text} {i}", options[i % len(options)]) for i in range(4)]
    return TaskSequence("s", [Task("mine", instruction, options, rows, rows, rows)])


def config_of(name, tokens, **more):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    ids = dict(vocab_size=len(tokens), bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id)
    return getattr(T, f"{name}Config")(**sizes | ids | dict(pad_token_id=tokens.pad_token_id) | more)


def model_of(name, **more):
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(config_of(name, tokenizer(), **more)).eval()


def llama(**more):
    return model_of("Llama", **more)


def with_vision(tokens):
    text = config_of("Gemma3Text", tokens, num_key_value_heads=2, head_dim=16).to_dict()
    sight = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    sight |= dict(image_size=28, patch_size=14, vision_use_head=False)
    config = T.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    return T.Gemma3ForConditionalGeneration(config).eval()


def t5(**changes):
    model, _ = load_backbone("tiny-t5", device="cpu", dtype="float32")
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def changed(model, change):
    change(model)
    return model


def shares_a_weight(model):
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight


def in_inference_mode():
    with torch.inference_mode():
        return llama()


def ends_every_text():
    tokens = tokenizer()
    end = [("<|end|>", tokens.eos_token_id)]
    closing = TemplateProcessing(single="$A <|end|>", pair="$A $B <|end|>", special_tokens=end)
    tokens.backend_tokenizer.post_processor = closing
    return tokens


REFUSED = {
    "no pad token": (llama, tokenizer(pad_token=None), {}, "no pad_token; set one, e.g. tokenizer.pad_token"),
    "no end token": (llama, tokenizer(eos_token=None), {}, "no eos_token; set one"),
    "pad token beyond the embedding": (
        lambda: llama(vocab_size=tokenizer().pad_token_id, pad_token_id=0), tokenizer(), {},
        "pad_token has the id .* embeds .*resize_token_embeddings",
    ),
    "no first token": (lambda: t5(decoder_start_token_id=None), None, {}, "start_token_id is missing; set"),
    "prompts that end": (llama, ends_every_text(), {}, "ends every prompt with '<.end.>'.*add_eos_token"),
    "an option of unknown characters": (
        llama, of_words("good", "is"), dict(options=("good", "is bad")), "'is bad' into 'is', so no answer",
    ),
    "positions": (
        lambda: llama(max_position_embeddings=130), tokenizer(), dict(text="long " * 40),
        "task 'mine': a prompt of 128 tokens and an answer of 8 exceed the 130 positions.*max_length=122",
    ),
    "no default targets": (
        lambda: model_of("Phi3"), tokenizer(), {}, "no default target_modules for 'phi3'.*'qkv_proj'"
    ),
    "another type of layer": (
        lambda: model_of("GPT2", n_embd=32, n_layer=2, n_head=2), tokenizer(), {}, "c_attn is of type Conv1D"
    ),
    "batches that are read wrongly": (
        lambda: model_of("Rwkv", attention_hidden_size=32), tokenizer(), {}, "'rwkv' reads padding as text"
    ),
    "a weight with two owners": (
        lambda: changed(llama(), shares_a_weight), tokenizer(), {},
        "layers.0.self_attn.q_proj shares its weight with .*layers.1.self_attn.q_proj.weight",
    ),
    "an option that spells the end token": (
        llama, of_words("good", "is", eos_token="</s>"), dict(options=("good", "is </s>")),
        "'is </s>' into 'is', so no answer",
    ),
    "a weight that is computed": (
        lambda: changed(llama(), lambda m: parametrizations.weight_norm(m.model.layers[0].self_attn.q_proj)),
        tokenizer(), {}, "q_proj computes its weight from other parameters",
    ),
    "a weight that is elsewhere": (
        lambda: changed(llama(), lambda m: m.model.layers[0].self_attn.q_proj.to("meta")), tokenizer(), {},
        "q_proj has no weight in memory; load the model without offloading",
    ),
    "inference mode": (in_inference_mode, tokenizer(), {}, "was loaded in torch.inference_mode"),
    "a head that is no language model": (
        lambda: T.LlamaForSequenceClassification(config_of("Llama", tokenizer())).eval(), tokenizer(), {},
        "LlamaForSequenceClassification cannot answer a prompt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(case, tmp_path):
    make, tokens, rows, says = REFUSED[case]
    model = make()
    tokens = tokens or load_backbone("tiny-t5", device="cpu", dtype="float32")[1]
    method = METHODS["IncLoRA + JumpLoRA"]
    with pytest.raises(ValueError, match=says):
        learn_sequence(model, tokens, sequence(**rows), method, TrainConfig(), out=tmp_path, progress=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_where_prompts_can_exceed_the_positions_every_text_is_encoded():
    tokens, words = tokenizer(), "internationalisation " * 20
    rare = "漢" * 150  # three tokens each
    assert len(rare) < len(words) and len(tokens(rare).input_ids) > len(tokens(words).input_ids)
    rows = [(f"{words}{i}", "good") for i in range(20)] + [(rare, "bad")]
    tasks = TaskSequence("one", [Task("mine", "Good or bad?\n", ("good", "bad"), rows, (), rows[:4])])
    longest = len(encode_prompt(tokens, tasks[0], rare, 4096, "field"))
    model, config = llama(max_position_embeddings=longest), TrainConfig(max_length=4096)
    with pytest.raises(ValueError, match=f"a prompt of {longest} tokens and an answer of 8 exceed"):
        dry_check(model, tokens, tasks, config)


def test_scores_by_labels_need_no_room_for_a_generated_answer():
    model, rows = llama(max_position_embeddings=132), sequence(text="long " * 40)
    assert dry_check(model, tokenizer(), rows, scoring="labels")
    with pytest.raises(
        ValueError, match="a prompt of 128 tokens and an answer of 8 exceed the 132 positions"
    ):
        dry_check(model, tokenizer(), rows)


def test_the_output_layer_of_a_model_with_tied_embeddings_is_refused_wherever_one_begins():
    config = TrainConfig(target_modules=("lm_head",))
    with pytest.raises(ValueError, match="lm_head shares its weight with model.embed_tokens.weight"):
        attach_adapter(llama(tie_word_embeddings=True), config, gated=False)
    with pytest.raises(ValueError, match="lm_head shares its weight with model.embed_tokens.weight"):
        dry_check(llama(tie_word_embeddings=True), tokenizer(), sequence(), config)
    assert dry_check(llama(), tokenizer(), sequence(), config) == ["lm_head"]


@pytest.mark.parametrize(
    "name, targets",
    [
        *[(name, targets) for name in ("tiny-llama", "tiny-t5") for targets in (None, "all-linear")],
        ("tiny-llama", ("0.self_attn.q_proj", "down_proj")),
        ("tiny-llama", r".*mlp\.\w+_proj"),
        ("tiny-t5", ("q", "wo")),
    ],
)
def test_the_layers_are_those_that_peft_adapts(name, targets):
    model, tokens = load_backbone(name, device="cpu", dtype="float32")
    config = TrainConfig(target_modules=targets)
    found = dry_check(model, tokens, sequence(), config)
    assert found == list(adapter_layers(attach_adapter(model, config, gated=True)))


def test_layers_that_read_no_text_are_refused_and_a_regular_expression_leaves_them_out():
    model = with_vision(tokenizer())
    says = "match 2 layers that read no text, such as .*vision.*regular expression.*language_model"
    with pytest.raises(ValueError, match=says):
        dry_check(model, tokenizer(), sequence(), TrainConfig(target_modules=("q_proj",)))
    config = TrainConfig(target_modules=r".*language_model.*q_proj")
    assert len(dry_check(model, tokenizer(), sequence(), config)) == 2


def test_a_model_that_is_fine_stays_as_it_is():
    model = llama().train()
    before = copy.deepcopy(model)
    dry_check(model, tokenizer(), sequence())
    assert same_weights(model, before) and model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_disk_without_room_is_named(monkeypatch, tmp_path):
    full = type("usage", (), dict(free=1000))
    monkeypatch.setattr("shutil.disk_usage", lambda place: full)
    with pytest.raises(OSError, match=f"{tmp_path} has 0.0 GB free, and the state of a run may need 0.0 GB"):
        dry_check(llama(), tokenizer(), sequence(), out=tmp_path / "new" / "runs")


def test_a_split_whose_labels_are_hidden_is_refused():
    model, tokens = load_backbone("tiny-llama", device="cpu", dtype="float32")
    rows, hidden = [("a text", "good"), ("another", "bad")], [("a text", "-"), ("another", "-")]
    task = Task("hidden", "What is it?\n", ("good", "bad"), rows, rows, hidden)
    assert dry_check(model, tokens, TaskSequence("one", [task]), split="dev")
    with pytest.raises(
        ValueError, match=r"'hidden': no test row has a label .*\(hidden labels\?\); score another"
    ):
        dry_check(model, tokens, TaskSequence("one", [task]))
