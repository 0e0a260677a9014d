"Tasks from any table or file, every mistake named, balanced rows, sequences, folders."

import hashlib
import json
import random
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from jumplora.data.backbones import byte_tokenizer
from jumplora.data.benchmark import BENCHMARK, read_folder
from jumplora.learning.tasks import (
    SPLITS,
    Example,
    Question,
    Task,
    TaskSequence,
    encode_answer,
    encode_prompt,
    prompt,
)

YES_NO = ("yes", "no")
ROWS = [("one", "yes"), ("two", "no")]


def task(name="t", options=YES_NO, train=ROWS, dev=(), test=ROWS, **more) -> Task:
    return Task(name, "Question?\n", options, train, dev, test, **more)


# ---------------------------------------------------------------- prompt, rows, labels


# differences: 40
def test_the_prompt_is_the_one_of_the_paper():
    instruction = "What is the topic? Choose one from the option.\n"
    expected = (
        "Task Instruction: What is the topic? Choose one from the option.\n\n"
        "Options: World | Sports\n"
        "Text: The cup final.\n"
        "Answer:"
    )
    assert Question("q", instruction, ["World", "Sports"]).prompt("The cup final.") == expected


@given(st.text(), st.text())
def test_any_instruction_and_text_stand_in_the_prompt_unchanged(instruction, text):
    whole = prompt(instruction, YES_NO, text)
    assert whole == "Task Instruction: " + instruction + "\nOptions: yes | no\nText: " + text + "\nAnswer:"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"label": "yes"}, "no column 'text' in .'label'."),
        ({"Sentence": "x", "label": "yes"}, "no column 'text'"),
        ("xy", "is not a row"),
        (5, "is not a row"),
        (None, "is not a row"),
        ({"sentence": ["x"], "label": "yes"}, "the text is .'x'. of type list in column 'sentence'"),
        ({"text": pd.Timestamp(2020, 1, 1), "label": "yes"}, "of type Timestamp in column 'text'"),
        (("x", float("nan")), "the label is nan"),
        (("x", float("inf")), "the label is inf"),
        (("x", pd.NA), "the label is <NA>"),
        (("x", " "), "the label is ' '"),
        (("x", ["yes"]), "the label is .'yes'."),
    ],
)
def test_a_bad_row_is_named_with_its_place(row, says):
    for split in SPLITS:
        rows = {"train": ROWS, "dev": [], "test": ROWS} | {split: [("fine", "yes"), row]}
        with pytest.raises(ValueError, match=f"task 't', {split} row 1: .*{says}"):
            task(**rows)


def test_a_label_outside_the_options_is_refused_in_train_and_dev_and_counted_in_test():
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match=f"task 't', {split} row 0: label 'yess' .*did you mean 'yes'"):
            task(**{split: [("x", "yess")]})
    found = task(test=[("x", "-"), *ROWS, ("y", "Yes")])
    assert found.outside_options == 2
    assert list(found.counts()["test"].items()) == [("yes", 1), ("no", 1), ("-", 1), ("Yes", 1)]


@pytest.mark.parametrize(
    "labels, options",
    [
        ([True, False], ("False", "True")),
        ([np.bool_(True), "False"], ("False", "True")),
        ([10, 2, np.int64(2)], ("2", "10")),
        ([10.0, 2, np.float32(2)], ("2", "10")),
        ([0.5, -1, "10"], ("-1", "0.5", "10")),
        (["10", "2", "b"], ("10", "2", "b")),
    ],
)
def test_labels_of_any_type_become_the_same_text_in_rows_and_options(labels, options):
    rows = [(f"text {i}", label) for i, label in enumerate(labels)]
    found = Task.load("t", {"train": rows, "test": rows}, "Which?\n")
    assert found.options == options and {row.label for row in found.train} == set(options)
    assert Task.load(
        "t", {"train": rows, "test": rows}, "Which?\n", labels[:1] + labels[1:2] + list(options[2:])
    )
    assert json.loads(json.dumps(found.train)) == [list(row) for row in found.train]


def test_a_polars_table_is_read_by_its_rows():
    rows = [dict(text="a", label="x"), dict(text="b", label="y")]
    table = SimpleNamespace(to_dicts=lambda: rows, to_dict=None, columns=["text", "label"])
    assert Task.load("t", {"train": table, "test": table}).train == (("a", "x"), ("b", "y"))


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path):
    table = pd.DataFrame([["a", "b", "x"]], columns=["text", "text", "label"])
    table.to_csv(tmp_path / "twice.csv", index=False)
    for source in (table, tmp_path / "twice.csv"):
        with pytest.raises(ValueError, match="two columns are named 'text'; rename one"):
            Task.load("t", {"train": source, "test": source})
    other = pd.DataFrame([["a", "x", 1]], columns=["text", "label", "features"])  # a word of data sets
    assert Task.load("t", {"train": other, "test": other}).train == (("a", "x"),)
    (tmp_path / "unnamed.csv").write_text("text,label,,\na,x,,\n")  # spare commas, as spreadsheets write them
    assert Task.load("t", dict.fromkeys(("train", "test"), tmp_path / "unnamed.csv")).train == (("a", "x"),)


def test_a_fingerprint_changes_with_rows_instruction_and_options_alone():
    assert task().fingerprint() == "fb8f3468b9c56dfb" == task("u", note="n").fingerprint()
    others = [task(train=ROWS[::-1]), task(dev=ROWS), task(test=ROWS[:1]), task(options=("no", "yes"))]
    others.append(Task("t", "Question?", YES_NO, ROWS, (), ROWS))
    assert len({other.fingerprint() for other in [task(), *others]}) == 6


# ---------------------------------------------------------------- tables and files

ODD = [
    ("NA", "no"),
    ("001", "yes"),
    ("2020-01-01", "no"),
    ('a "b",\tc\nd', "yes"),
    ("é {x} |\u2028null", "no"),
    ("1.0", "yes"),
]
FRAME = pd.DataFrame(ODD, columns=["text", "label"])


def save(path: Path, rows=ODD, text="text", label="label") -> Path:
    "Rows as a file of the kind that its ending names."
    frame = pd.DataFrame(rows, columns=[text, label])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False, encoding="utf-8-sig")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in frame.to_dict("records")]
        content = "\n".join(lines) + "\n" if path.suffix != ".json" else " \n[" + ",\n".join(lines) + "]"
        path.write_text(content, "utf-8-sig")
    return path


ENDINGS = [".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_of_any_kind_gives_the_texts_as_they_are_written(tmp_path, ending):
    path = save(tmp_path / f"rows{ending}")
    found = Task.load("t", {"train": str(path), "test": path}, "Which?\n")
    assert list(found.train) == ODD == list(found.test) and found.options == ("no", "yes")


@pytest.mark.parametrize(
    "source",
    [
        FRAME,
        FRAME.to_dict("records"),
        datasets.Dataset.from_pandas(FRAME),
        [{"sentence": text, "label": label, "id": 3} for text, label in ODD],
    ],
)
def test_a_table_in_memory_gives_the_rows_of_its_file(source):
    expected = Task("t", "Which?\n", ("no", "yes"), iter(ODD), (), ODD).fingerprint()
    assert Task.load("t", {"train": source, "test": source}, "Which?\n").fingerprint() == expected
    assert Task("t", "Which?\n", ("no", "yes"), source, (), source).fingerprint() == expected


@pytest.mark.parametrize("as_file", [False, True])
def test_a_data_set_keeps_the_names_of_its_numbered_labels(tmp_path, as_file):
    features = datasets.Features(q=datasets.Value("string"), y=datasets.ClassLabel(names=["good", "bad"]))
    labels = {"train": [0, 1], "validation": [1], "test": [1, 0, -1], "unsupervised": [-1]}
    data = datasets.DatasetDict()
    for split, numbers in labels.items():
        rows = dict(q=[f"{split} {i}" for i in range(len(numbers))], y=numbers)
        data[split] = datasets.Dataset.from_dict(rows, features)
        data[split].to_parquet(tmp_path / f"{split}.parquet")
    found = Task.load("mine", tmp_path if as_file else data, "Good?\n", text="q", label="y")
    assert found.options == ("good", "bad") and found.dev == (Example("validation 0", "bad"),)
    assert [row.label for row in found.test] == ["bad", "good", "-"] and found.outside_options == 1
    with pytest.raises(
        ValueError, match="mine', train row 0: no column 'text' in .'q', 'y'.; rename one, or"
    ):
        Task.load("mine", data, "Good?\n")
    with pytest.raises(ValueError, match=r"no column 'label' in .*; rename one, or use Task.load\(label=…\)"):
        Task.load("mine", data, "Good?\n", text="q")


def test_whole_numbers_of_a_column_with_gaps_are_whole_and_the_gap_is_named():
    frame = pd.DataFrame({"sentence": ["a", "b", "c"], "label": [1, 2, None]})
    found = Task.load("t", {"train": frame[:2], "val": [], "test": frame[:1]})
    assert found.options == ("1", "2") and found.note == "with a general instruction"
    assert found.instruction == "What fits the following text? Choose one from the option.\n"
    with pytest.raises(ValueError, match="task 't', dev row 2: the label is nan"):
        Task.load("t", {"train": frame[:2], "dev": frame, "test": frame[:1]})


@pytest.mark.parametrize(
    "data, says",
    [
        ({"train": ROWS}, "there is no .test. in train"),
        ({"test": ROWS}, "there is no .train. in test"),
        (
            {"train": ROWS, "dev": ROWS, "val": ROWS, "test": ROWS},
            "dev: there are dev and val; keep one",
        ),
        (FRAME, "data is a DataFrame; give split -> rows"),
        ({"train": "rows.csv", "test": ROWS}, "train: the file rows.csv is missing"),
        ("nowhere", "the folder nowhere does not exist"),
    ],
)
def test_splits_that_are_missing_are_named(data, says):
    with pytest.raises((ValueError, FileNotFoundError), match=f"task 't'.*{says}"):
        Task.load("t", data)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", b"text,label\na, b,yes\n", "cannot be read .*Expected 2 fields in line 2, saw 3"),
        ("a.csv", b'text,label\n"a,yes\nb,no\n', "cannot be read .*EOF inside string"),
        ("a.csv", "text,label\n\xe9,yes\n".encode("latin-1"), "cannot be read .*utf-8"),
        ("a.tsv", b'text\tlabel\n"good\tyes\na "bad" one\tno\n', "cannot be read .*line 3: .*expected after"),
        ("a.csv", b"", "cannot be read .*No columns"),
        ("a.csv", b"text,label\n", "has no train rows"),
        ("a.csv", b"text;label\na;yes\n", "train row 0: no column 'text' in .'text;label'."),
        ("a.tsv", b"text\tlabel\na\tyes\nb\n", "train row 1: the label is ''"),
        ("a.json", b'{"rows":\n []}', "cannot be read"),
        ("a.jsonl", b'{"text": "a", "label": "yes"}\n{"text"', "cannot be read"),
        ("a.json", b"[" * 3000, "cannot be read"),
        ("a.json", b"", "has no train rows"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.txt", b"a", "its ending='.txt' is not known; use '.csv', "),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"task 't'.*{says}"):
        Task.load("t", {"train": tmp_path / name, "test": ROWS})


def test_of_two_files_for_one_split_one_must_go(tmp_path):
    save(tmp_path / "train.csv"), save(tmp_path / "train.json"), save(tmp_path / "test.csv")
    with pytest.raises(ValueError, match="holds train.csv and train.json; remove one"):
        Task.load("t", tmp_path)


# ---------------------------------------------------------------- fewer rows


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(1, 70), st.integers(1, 70))
def test_limited_rows_are_balanced_complete_and_nested(labels, n, m):
    rows = [Example(f"text {i}", label) for i, label in enumerate(labels)]
    whole = task(options="a b c".split(), train=[("x", "a")], test=rows)
    chosen = whole.limit(test=n).test
    assert len(chosen) == min(n, len(rows)) and len(set(chosen)) == len(chosen) and set(chosen) <= set(rows)
    assert set(whole.limit(test=min(n, m)).test) <= set(chosen)
    left, have = Counter(labels), Counter(row.label for row in chosen)
    inside = [label for label in "abc" if left[label]]
    for a in inside:  # a label that still has rows is at most one round behind any other
        assert have[a] == left[a] or all(have[a] >= have[b] - 1 for b in inside)
    if have["d"]:  # no option: taken last
        assert all(have[label] == left[label] for label in inside)


def test_limits_depend_on_the_seed_the_task_and_nothing_else():
    rows = [(f"text {i}", YES_NO[i % 2]) for i in range(50)]
    whole = task(train=rows, dev=rows, test=rows)
    first = whole.limit(10, 10, 10, seed=1)
    random.seed(1)
    assert whole.limit(10, 10, 10, seed=1) == first
    assert whole.limit(10, seed=2).train != first.train != task("u", train=rows).limit(10, seed=1).train
    assert whole.limit() == whole and len(whole.limit(dev=0).dev) == 0
    assert sorted(whole.limit(train=99).train) == sorted(whole.train)


BAD_COUNTS = [("train", 0), ("test", 0), ("dev", -1), ("train", True), ("test", 1.5), ("dev", "3")]


@pytest.mark.parametrize("split, bad", BAD_COUNTS)
def test_a_number_of_rows_must_be_one(split, bad):
    with pytest.raises(ValueError, match=f"{split}=.* is no number of rows; use"):
        task().limit(**{split: bad})


# ---------------------------------------------------------------- sequences


def test_a_sequence_is_read_by_position_name_and_slice():
    sequence = TaskSequence("s", [task("a"), task("b"), task("c")])
    assert [t.name for t in sequence] == ["a", "b", "c"] == list(sequence.names)
    assert len(sequence) == 3 and sequence["b"] is sequence[1] is sequence[-2]
    assert sequence[1:].names == ("b", "c") and isinstance(sequence[1:], TaskSequence)
    with pytest.raises(ValueError, match="task='d' is not known; use 'a', 'b' or 'c'"):
        sequence["d"]
    with pytest.raises(IndexError):
        sequence[3]
    with pytest.raises(ValueError, match="has no tasks"):
        sequence[3:]


def test_the_table_counts_every_split():
    table = TaskSequence("s", [task("a", test=[*ROWS, ("x", "?")], note="n")]).limit(train=1).table()
    assert table.loc["a"].to_dict() == {
        "options": 2, "train": 1, "dev": 0, "test": 3, "outside options": 1, "note": "n"
    }  # fmt: skip


# ---------------------------------------------------------------- folders


def olora(folder: Path, path: str, **splits) -> Path:
    for split, rows in splits.items():
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / f"{split}.json").write_text(json.dumps(rows))
    return folder


ONE = [{"sentence": "The cup final.", "label": "Sports"}]
TWO = [{"sentence": "An election.", "label": "World"}]


def test_a_folder_is_read_whatever_its_capitals_with_the_benchmarks_questions(tmp_path):
    olora(tmp_path, "TC/AgNews", train=ONE, dev=TWO, test=TWO)
    good, bad = [{"sentence": "x", "label": "Good"}], [{"sentence": "y", "label": "Bad"}]
    olora(tmp_path, "SC/SST-2", train=good, dev=[], test=bad)
    found = read_folder(tmp_path, ["SST-2", "AGNEWS"], "mine")
    assert found.names == ("sst-2", "agnews") and found.name == "mine"
    assert found["agnews"].instruction == BENCHMARK["agnews"].instruction
    assert found["agnews"].options == BENCHMARK["agnews"].options
    assert "dev equals test" in found["agnews"].note and not found["sst-2"].note
    assert read_folder(tmp_path).names == ("sst-2", "agnews")  # as the paths are sorted
    (asked,) = TaskSequence.load(tmp_path, ["sst-2"], questions={"SST-2": ("Good?\n", ("Good", "Bad"))})
    assert asked.instruction == "Good?\n" and asked.options == ("Good", "Bad")
    plain = TaskSequence.load(tmp_path, ["sst-2"])[0]
    assert plain.options == ("Good",) and "general instruction" in plain.note


@pytest.mark.parametrize(
    "name, expected",
    [("my data (2)", "my data _2"), ("[Été] 50%", "Ete_ 50"), ("a.b-c_d+1", "a.b-c_d+1"), ("数据", "")],
)
def test_a_folder_of_any_name_is_opened(tmp_path, name, expected, monkeypatch):
    folder = tmp_path / name
    (
        save(folder / name / "train.csv"),
        save(folder / name / "validation.tsv"),
        save(folder / name / "test.jsonl"),
    )
    found = TaskSequence.load(folder)
    expected = expected or hashlib.sha256(name.encode()).hexdigest()[:16]
    assert found.name == expected and found.names == (expected.lower(),)
    assert list(found[0].train) == ODD == list(found[0].dev)
    assert Task.load("t", folder / name).fingerprint() == found[0].fingerprint()
    monkeypatch.chdir(tmp_path)
    assert TaskSequence.load(name).tasks == found.tasks  # a path that is relative


def test_labels_json_gives_the_options_of_an_unknown_task(tmp_path):
    olora(tmp_path, "XX/mine", train=ONE, dev=[], test=TWO)
    for labels, options in ((None, ("Sports",)), (["World", "Sports"], ("World", "Sports"))):
        if labels:
            olora(tmp_path, "XX/mine", labels=labels)
        found = read_folder(tmp_path)["mine"]
        assert found.options == options and "general instruction" in found.note
    assert found.outside_options == 0 and found.instruction.endswith("option.\n")
    olora(tmp_path, "XX/mine", labels=["World"])
    with pytest.raises(ValueError, match="task 'mine', train row 0: label 'Sports' is not in World"):
        read_folder(tmp_path)


def test_labels_that_are_not_the_benchmarks_make_a_task_of_ones_own(tmp_path):
    olora(tmp_path, "TC/agnews", train=ONE, test=TWO, labels=["World", "Sports"])
    found = read_folder(tmp_path)["agnews"]
    assert found.options == ("World", "Sports") and "general instruction" in found.note
    olora(tmp_path, "TC/agnews", labels=list(reversed(BENCHMARK["agnews"].options)))
    assert read_folder(tmp_path)["agnews"].options == BENCHMARK["agnews"].options
    (tmp_path / "tasks.json").write_text('[{"name": "agnews", "instruction": "Mine?"}]')
    assert read_folder(tmp_path)["agnews"].prompt("x").startswith("Task Instruction: Mine?\nOptions: World |")


def test_a_task_that_is_not_in_the_folder_is_named_with_those_that_are(tmp_path):
    olora(tmp_path, "TC/agnews", train=ONE, dev=TWO, test=TWO)
    with pytest.raises(ValueError, match="lacks a task; task='agnew' is not known; use 'agnews'"):
        read_folder(tmp_path, ["agnew"])
    with pytest.raises(ValueError, match="has two tasks named 'agnews'"):
        read_folder(tmp_path, ["agnews", "AGNews"])
    olora(tmp_path, "Other/AGNEWS", train=ONE, dev=TWO, test=TWO)
    with pytest.raises(ValueError, match="two tasks named 'agnews'"):
        read_folder(tmp_path)
    for path in (tmp_path / "nowhere", __file__):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_folder(path)


def listed(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [save(folder / f"{split}.parquet", [(f"{split} text", "yes")]) for split in SPLITS]
    entry = {"name": "Mine", "instruction": "Yes?\n", "options": ["yes", "no"]}
    entry["files"] = {path.stem: path.name for path in paths}
    entry["sha256"] = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    (folder / "tasks.json").write_text(json.dumps([entry | changes]))
    return folder


def test_a_listed_folder_is_read(tmp_path):
    found = read_folder(listed(tmp_path, note="a note"))["mine"]
    assert (found.instruction, found.options, found.note) == ("Yes?\n", ("yes", "no"), "a note")
    assert found.train == (Example("train text", "yes"),)


def test_a_list_needs_names_alone_and_may_name_columns_and_options_of_any_type(tmp_path):
    for name in ("b", "A (1)"):
        save(tmp_path / "group" / name / "train.csv", [("one", 1), ("two", 0)], "body", "stars")
        save(tmp_path / "group" / name / "test.csv", [("three", 1)], "body", "stars")
    columns = dict(text="body", label="stars")
    entries = [dict(name="b", options=[1, 0], **columns), dict(name="A _1", instruction="?", **columns)]
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    found = TaskSequence.load(tmp_path)
    assert found.names == ("b", "a _1") and [t.options for t in found] == [("1", "0"), ("0", "1")]
    assert [t.note for t in found] == ["with a general instruction", ""] and found[1].instruction == "?"
    (tmp_path / "tasks.json").write_text('[{"name": "c"}]')
    with pytest.raises(FileNotFoundError, match="task 'c': no folder c with train.* in .*, and no 'files'"):
        TaskSequence.load(tmp_path)


def test_use_decides_which_file_is_read(tmp_path):
    files = {"train": "none.parquet", "small": "test.parquet", "dev": "dev.parquet", "test": "test.parquet"}
    folder = listed(tmp_path, files=files, use={"train": "small", "dev": "dev", "test": "test"})
    assert read_folder(folder)["mine"].train[0].text == "test text"
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match="there is no file 'huge', only train, small, dev, test"):
            read_folder(listed(tmp_path, files=files, use={"train": "small", split: "huge"}))
    del files["dev"]
    assert not read_folder(listed(tmp_path, files=files, use={"train": "small"}))["mine"].dev


def test_a_listed_folder_cannot_swap_a_file_or_name_one_outside(tmp_path):
    (tmp_path / "secret.json").write_text("[]")
    for path in ("../secret.json", "/etc/passwd", "sub/../../secret.json"):
        files = {"train": path, "dev": "dev.parquet", "test": "test.parquet"}
        with pytest.raises(ValueError, match="leads out of the folder"):
            read_folder(listed(tmp_path / "data", files=files))
    save(listed(tmp_path / "data") / "dev.parquet", [("other", "yes")])
    with pytest.raises(ValueError, match="task 'mine', dev: .* is not the file that tasks.json lists"):
        read_folder(tmp_path / "data")


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"name": 1}]', "not json", "[]", ""])
def test_a_broken_list_of_tasks_is_refused(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match="tasks.json|holds no"):
        read_folder(tmp_path)


SPECIAL = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
BARE = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "<s>")]
PIECES = [(character, -3.0) for character in "▁\n|:.,<>/?" + string.ascii_letters]


def starting(tokenizer):
    "The tokenizer with a BOS before each text."
    start = [("<s>", tokenizer.bos_token_id)]
    added = processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=start)
    tokenizer.backend_tokenizer.post_processor = added
    return tokenizer


def pieces():
    "A tokenizer like T5's: its special tokens are pieces that any text can spell."
    backend = Tokenizer(models.Unigram(BARE + PIECES, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return starting(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL))


TOKENIZERS = {  # tokenizer, ids before and after each prompt, how "</s>" is read
    "bytes, learned": (lambda: starting(byte_tokenizer(**SPECIAL)), 1, 0, "</s>"),
    "pieces": (pieces, 1, 0, "< /s>"),
    "bytes, without offsets": (ByT5Tokenizer, 0, 1, "</s>"),
}
OF_ANY_KIND = pytest.mark.parametrize("kind", TOKENIZERS)


@OF_ANY_KIND
@pytest.mark.parametrize("truncation", ["field", "reference"])
@pytest.mark.parametrize("max_length", [90, 400])
# differences: 32, 33
def test_a_text_that_spells_a_special_token_is_read_as_text(kind, truncation, max_length):
    make, before, after, spelled = TOKENIZERS[kind]
    tokenizer = make()
    question = Question("q", "Is </s> an end?\n", ["no", "</s>"])
    ids = encode_prompt(tokenizer, question, "he wrote </s> here " * 6, max_length, truncation)
    special = [i for i, token in enumerate(ids) if token in tokenizer.all_special_ids]
    assert special == [0] * before + [len(ids) - 1] * after
    whole = question.prompt("he wrote </s> here " * 6).replace("</s>", spelled)
    read = tokenizer.decode(ids, skip_special_tokens=True)
    if max_length == 90:
        assert len(ids) == 90 and whole.startswith(read.removesuffix("\nAnswer:"))
    else:
        assert read == whole
    plain = question.prompt("an ordinary text").replace("</s>", "end")
    assert tokenizer(plain, split_special_tokens=True).input_ids == tokenizer(plain).input_ids


def test_an_option_that_spells_a_special_token_is_an_answer_that_can_be_given():
    tokenizer = byte_tokenizer(**SPECIAL)
    ids = encode_answer(tokenizer, "</s>", encoder_decoder=True)
    assert tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "</s>"


@pytest.mark.parametrize("text", ["a long text " * 30, "日本語の文 " * 30, "é" * 200])
def test_without_offsets_as_many_characters_are_kept_as_fit(text):
    tokenizer = ByT5Tokenizer()
    question = Question("q", "Is it?\n", ["no", "yes"])
    ids = encode_prompt(tokenizer, question, text, 120)
    kept = tokenizer.decode(ids, skip_special_tokens=True).split("Text: ")[1].removesuffix("\nAnswer:")
    assert kept and text.startswith(kept)
    one_more = question.prompt(text[: len(kept) + 1])
    assert len(ids) <= 120 < len(tokenizer(one_more).input_ids)
    with pytest.raises(ValueError, match="max_length=20 leaves no room"):
        encode_prompt(tokenizer, question, text, 20)


def test_reference_truncation_cuts_from_the_right_whatever_the_tokenizers_side_is():
    tokenizer = byte_tokenizer()
    task = Question("which", "Which?\n", YES_NO)
    whole = encode_prompt(tokenizer, task, "a text", 100)
    tokenizer.truncation_side = "left"
    assert encode_prompt(tokenizer, task, "a text", 12, "reference") == whole[:12]
    assert tokenizer.truncation_side == "left"
