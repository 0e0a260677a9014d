"""The benchmark's rows: recipe, checksums, the check of a folder, and other rows from a stand-in for the Hub.

Columns, labels in their order and splits are those of the datasets' cards, written down here a second time.
"""

import itertools
import json
import random
import re
import string
import subprocess
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from real_rows import DATA, needs_rows

from jumplora.command_line import main
from jumplora.data import benchmark
from jumplora.data.benchmark import (
    BENCHMARK,
    DIFFERENT_SAMPLE,
    HUB_SEQUENCES,
    ORDERS,
    as_in_the_paper,
    check_folder,
    hub_sequence,
    hub_table,
    hub_task,
    paper_split,
    read_folder,
)
from jumplora.data.sequences import load_sequence
from jumplora.learning.tasks import SPLITS, Example, Task
from jumplora.running.grid import Job, job_sequence, plan
from jumplora.storage.record import Run

# ---------------------------------------------------------------- facts


def test_orders_name_the_tasks_of_the_benchmark():
    assert list(ORDERS) == [1, 2, 3, 4, 5, 6] and len(BENCHMARK) == 15
    for number, names in ORDERS.items():
        assert len(set(names)) == len(names) == (4 if number < 4 else 15)
        assert set(names) <= set(BENCHMARK)
    assert len({name for known in BENCHMARK.values() for name in known.files.values()}) == 45


# ---------------------------------------------------------------- the paper's rows


def task(name="t", options=("yes", "no"), train=(), dev=(), test=(), **more) -> Task:
    return Task(name, "Question?\n", options, train, dev, test, **more)


def public_rows(n, labels=("World", "Sports", "Business")):
    return [Example(f"text {i} of {{braces}} and é\u2028", labels[i * i % 7 % len(labels)]) for i in range(n)]


def public_copy(folder: Path, name="TC/agnews", rows=None) -> Path:
    "A folder as O-LoRA's authors lay it out: dev is test once more."
    rows = public_rows(60) if rows is None else rows
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        content = [{"sentence": row.text, "label": row.label} for row in rows]
        (path / f"{split}.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def git_name(rows) -> str:
    "What git calls the JSON file that holds these rows."
    content = json.dumps([{"sentence": r.text, "label": r.label} for r in rows], ensure_ascii=False)
    done = subprocess.run(
        ["git", "hash-object", "--stdin"], input=content.encode(), capture_output=True, check=True
    )
    return done.stdout.decode().strip()


@pytest.fixture
def published(monkeypatch):
    "Pretend that the paper's AG News was cut from `public_rows(60)`."
    rows = public_rows(60)
    split = paper_split(task(options=("World", "Sports", "Business"), train=rows, test=rows))
    files = {name: git_name(getattr(split, name))[:16] for name in SPLITS}
    monkeypatch.setitem(BENCHMARK, "agnews", BENCHMARK["agnews"]._replace(rows=(47, 13, 60), files=files))
    return split


def test_the_papers_split_follows_its_recipe():
    "The recipe written out a second time, with other words."
    rows = [Example(f"text {i}", "abc"[i * i % 7 % 3]) for i in range(2000)]
    found = paper_split(task(options=("a", "b", "c"), train=rows, test=rows))
    rng, labels = random.Random(42), list(dict.fromkeys(row.label for row in rows))
    parts = {label: [row for row in rows if row.label == label] for label in labels}
    for label in labels:
        rng.shuffle(parts[label])
    train = [row for label in labels for row in parts[label][: int(len(parts[label]) * 0.8)]]
    dev = [row for label in labels for row in parts[label][int(len(parts[label]) * 0.8) :]]
    rng.shuffle(train)
    rng.shuffle(dev)
    assert (list(found.train), list(found.dev)) == (train, dev)
    rng = random.Random(42)
    parts = {label: [row for row in rows if row.label == label] for label in labels}
    for label in labels:
        rng.shuffle(parts[label])
    test = [row for label in labels for row in parts[label][:500]]
    rng.shuffle(test)
    assert list(found.test) == test and max(found.counts()["test"].values()) == 500


OTHER = "other rows than the paper's"


def test_rows_of_a_public_copy_are_cut_and_recognized(tmp_path, published):
    found = as_in_the_paper(read_folder(public_copy(tmp_path))["agnews"])
    assert [getattr(found, s) for s in SPLITS] == [getattr(published, s) for s in SPLITS]
    assert "cut from the public files" in found.note and OTHER not in found.note
    assert as_in_the_paper(found) is found


@pytest.mark.parametrize("change", ["a letter", "the order", "a row less"])
def test_other_rows_stay_and_are_noted(tmp_path, published, change):
    rows = public_rows(60)
    if change == "a letter":
        rows[7] = Example(rows[7].text + " ", rows[7].label)
    rows = rows[::-1] if change == "the order" else rows[:-1] if change == "a row less" else rows
    given = read_folder(public_copy(tmp_path, rows=rows))["agnews"]
    found = as_in_the_paper(given)
    assert (found.train, found.dev, found.test) == (given.train, given.dev, given.test)
    assert OTHER in found.note


def test_the_note_says_which_splits_differ(published):
    half = task(
        "agnews",
        ("World", "Sports", "Business"),
        published.train,
        published.dev[:-1],
        published.test,
        note="mine",
    )
    assert as_in_the_paper(half).note == f"mine; {OTHER}: dev"


def test_an_order_is_cut_when_it_is_opened(tmp_path, published, monkeypatch):
    monkeypatch.setitem(ORDERS, 1, ("agnews",))
    found = load_sequence("order1", public_copy(tmp_path))
    assert found["agnews"].train == published.train and found.name == "order1"
    limited = load_sequence(1, tmp_path, train=6)
    assert len(limited["agnews"].train) == 6 and set(limited["agnews"].train) <= set(published.train)


# ---------------------------------------------------------------- the check of a folder


def test_a_folder_is_checked_line_by_line(tmp_path, published):
    table = check_folder(public_copy(tmp_path))
    assert table.loc["agnews", "verdict"].tolist() == ["cut from the copy"] * 3
    assert table.loc["agnews", "rows"].tolist() == table.loc["agnews", "paper"].tolist() == [47, 13, 60]
    assert (table["verdict"] == "missing").sum() == 14 and len(table) == 17


@pytest.mark.parametrize(
    "content, says",
    [
        ("[", "cannot be read"),
        ('{"a": 1}', "no column 'text'"),
        ('[{"text": "x"}]', "row 0|sentence|label"),
        ("[]", "rows"),
    ],
)
def test_a_broken_file_does_not_stop_the_check(tmp_path, published, content, says):
    public_copy(public_copy(tmp_path), "COPA/copa")
    (tmp_path / "COPA" / "copa" / "train.json").write_text(content)
    table = check_folder(tmp_path)
    assert table.loc["agnews", "verdict"].eq("cut from the copy").all()
    assert pd.Series([table.loc[("copa", "all"), "verdict"]]).str.contains(says).all()


def test_no_folder_and_no_tasks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tasks.json"):
        check_folder(tmp_path)


def test_the_command_ends_with_0_only_where_all_rows_are_the_papers(tmp_path, published, capsys, monkeypatch):
    folder = str(public_copy(tmp_path))
    assert main(["data", "check", folder]) == 1
    assert "3 of 17 lines are the paper's rows" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "BENCHMARK", {"agnews": BENCHMARK["agnews"]})
    assert main(["data", "check", folder]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert main(["data", "chekc", folder]) == 2
    assert main(["data", "check", folder + "/nowhere"]) == 1


def test_a_task_that_cannot_be_read_is_one_line_of_the_table(tmp_path, monkeypatch):
    def refuse(folder, names):
        raise OSError(f"{names[0]} is locked")

    folder = public_copy(tmp_path)
    monkeypatch.setattr(benchmark, "read_folder", refuse)
    table = check_folder(folder)
    assert len(table) == len(BENCHMARK) and table["verdict"].str.contains("is locked").any()


# ---------------------------------------------------------------- the real rows of the benchmark


@pytest.fixture(scope="module")
def long_order():
    return load_sequence(4, DATA)


@needs_rows
def test_the_benchmark_has_the_questions_options_and_rows_that_are_shipped(long_order):
    facts = {entry["name"]: entry for entry in json.loads((DATA / "tasks.json").read_text("utf-8"))}
    assert set(facts) == set(BENCHMARK) and long_order.names == ORDERS[4]
    orders = json.loads((DATA / "orders.json").read_text("utf-8"))
    assert {int(k): tuple(v) for k, v in orders.items()} == ORDERS
    for name, known in BENCHMARK.items():
        entry, t = facts[name], long_order[name]
        assert (t.instruction, t.options) == (known.instruction, known.options)
        assert (known.category, known.dataset) == (entry["category"], entry["olora_dataset_name"])
        rows = entry.get("paper_rows", entry["rows"])
        assert known.rows == tuple(rows[split] for split in SPLITS)
        assert {s: len(getattr(t, s)) for s in SPLITS} == {s: entry["rows"][entry["use"][s]] for s in SPLITS}
        for split in SPLITS:
            counts = entry["label_counts"][entry["use"][split]]
            assert {label: n for label, n in t.counts()[split].items() if n} == counts


@needs_rows
def test_mnli_keeps_its_rows_without_an_answer(long_order):
    mnli = long_order["mnli"]
    assert mnli.outside_options == 131 == mnli.counts()["test"]["-"]
    assert mnli.limit(test=1500).outside_options == 0 and mnli.limit(test=1510).outside_options == 10
    assert sum(t.outside_options for t in long_order) == 131


@needs_rows
def test_yahoo_says_that_its_train_rows_are_a_substitute(long_order):
    assert "train_substitute" in long_order["yahoo"].note and len(long_order["yahoo"].train) == 2378
    texts = {row.text for row in long_order["yahoo"].train}
    assert texts.isdisjoint(row.text for row in long_order["yahoo"].dev)


@needs_rows
def test_the_texts_of_the_benchmark_are_kept_to_the_letter(long_order):
    rows = pq.read_table(DATA / "imdb" / "train.parquet").to_pylist()
    assert [tuple(row) for row in long_order["imdb"].train] == [(r["sentence"], r["label"]) for r in rows]
    texts = [row.text for t in long_order for row in t.train]
    odd = [text for text in texts if "{" in text or len(text.splitlines()) > 1]
    assert odd and all(f"\nText: {text}\nAnswer:" in long_order[0].prompt(text) for text in odd)


@needs_rows
def test_every_file_that_is_present_has_the_name_of_the_papers():
    table = check_folder(DATA)
    other = table[table["verdict"] != "ok"]
    assert len(table) == 45 and set(other.index.get_level_values("task")) <= {"yahoo"}
    assert "test" not in other.index.get_level_values("split")


@needs_rows
@pytest.mark.parametrize("name", ["agnews", "cb", "rte", "qqp", "amazon"])
def test_the_real_rows_were_drawn_by_the_recipe(name):
    "Undo the last shuffle: rows then lie label by label, and by chance they never would."
    rows = {
        s: pq.read_table(DATA / name / f"{s}.parquet").column("label").to_pylist() for s in ("train", "dev")
    }
    sizes = {label: rows["train"].count(label) + rows["dev"].count(label) for label in set(rows["train"])}
    fitting = []
    for order in itertools.permutations(sorted(sizes)):
        rng, fits = random.Random(42), True
        for label in order:
            rng.shuffle(list(range(sizes[label])))
        for split in ("train", "dev"):
            places = list(range(len(rows[split])))
            rng.shuffle(places)
            drawn = [label for _, label in sorted(zip(places, rows[split], strict=True))]
            cut = {
                label: int(0.8 * n) if split == "train" else n - int(0.8 * n) for label, n in sizes.items()
            }
            fits = fits and drawn == [label for label in order for _ in range(cut[label])]
        fitting += [order] if fits else []
    assert len(fitting) == 1


# ---------------------------------------------------------------- rows from the Hub

# (dataset, configuration): text columns, other columns, the label's column, its names in order, splits
GLUE, SUPER = "nyu-mll/glue", "aps/super_glue"
HIDDEN = ("train", "validation", "test")  # the test split has -1 for every label
OPEN = ("train", "test")
NUMBERS = {"idx": "int32"}
WIC = dict.fromkeys(("start1", "start2", "end1", "end2", "idx"), "int32")
DBPEDIA = """Company EducationalInstitution Artist Athlete OfficeHolder MeanOfTransportation Building
NaturalPlace Village Animal Plant Album Film WrittenWork""".split()
YAHOO = """Society & Culture|Science & Mathematics|Health|Education & Reference|Computers & Internet|Sports
Business & Finance|Entertainment & Music|Family & Relationships|Politics & Government""".replace("\n", "|")
MNLI_SPLITS = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
NLI, SENTENCES, BOOL = ["premise", "hypothesis"], ["sentence1", "sentence2"], ["False", "True"]
AMAZON = "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes"
COPA = ["premise", "choice1", "choice2", "question"]
AGNEWS = ["World", "Sports", "Business", "Sci/Tech"]
ASKED = ["question_title", "question_content", "best_answer"]
STARS = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
CARDS = {
    (GLUE, "mnli"): (NLI, NUMBERS, "label", ["entailment", "neutral", "contradiction"], MNLI_SPLITS),
    (SUPER, "cb"): (NLI, NUMBERS, "label", ["entailment", "contradiction", "neutral"], HIDDEN),
    (SUPER, "wic"): (["word", *SENTENCES], WIC, "label", BOOL, HIDDEN),
    (SUPER, "copa"): (COPA, NUMBERS, "label", ["choice1", "choice2"], HIDDEN),
    (GLUE, "qqp"): (["question1", "question2"], NUMBERS, "label", ["not_duplicate", "duplicate"], HIDDEN),
    (SUPER, "boolq"): (["question", "passage"], NUMBERS, "label", BOOL, HIDDEN),
    (GLUE, "rte"): (SENTENCES, NUMBERS, "label", ["entailment", "not_entailment"], HIDDEN),
    ("stanfordnlp/imdb", None): (["text"], {}, "label", ["neg", "pos"], ("train", "test", "unsupervised")),
    ("Yelp/yelp_review_full", None): (["text"], {}, "label", STARS, OPEN),
    (AMAZON, None): (["review_title", "review_text"], {}, "class_index", None, OPEN),
    (GLUE, "sst2"): (["sentence"], NUMBERS, "label", ["negative", "positive"], HIDDEN),
    ("fancyzhx/dbpedia_14", None): (["title", "content"], {}, "label", DBPEDIA, OPEN),
    ("fancyzhx/ag_news", None): (["text"], {}, "label", AGNEWS, OPEN),
    (SUPER, "multirc"): (["paragraph", "question", "answer"], {"idx": "triple"}, "label", BOOL, HIDDEN),
    ("community-datasets/yahoo_answers_topics", None): (
        ASKED,
        {"id": "int32"},
        "topic",
        YAHOO.split("|"),
        OPEN,
    ),
}
TRIPLE = {name: datasets.Value("int32") for name in ("paragraph", "question", "answer")}


def split_of(card, rows: list[dict]) -> datasets.Dataset:
    "Rows with the card's features; what a row does not say is filled."
    texts, others, label, names, _ = card
    features = {name: datasets.Value("string") for name in texts}
    features |= {name: TRIPLE if kind == "triple" else datasets.Value(kind) for name, kind in others.items()}
    features[label] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    columns = {name: [row[name] for row in rows] for name in [*texts, label]}
    for name, kind in others.items():
        columns[name] = [dict.fromkeys(TRIPLE, 0) if kind == "triple" else 0 for _ in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def made_up(card, split: str, count: int, labels=None) -> list[dict]:
    "Invented rows, no text twice; `labels` are dealt in turn."
    texts, _, label, names, _ = card
    labels = labels or (range(len(names)) if names else range(1, 6))
    if split.startswith("test") and "validation" in " ".join(card[4]) or split == "unsupervised":
        labels = [-1]
    return [
        {**{name: f"{name} {i} of {split}" for name in texts}, label: labels[i % len(labels)]}
        for i in range(count)
    ]


class Hub:
    "A stand-in for `datasets.load_dataset`: what is asked of it is written down."

    def __init__(self):
        self.count, self.rows, self.asked = 60, {}, []

    def __call__(self, repo_id, config=None, **more):
        self.asked.append((repo_id, config, more))
        card = CARDS[repo_id, config]
        rows = {split: self.rows.get(split) or made_up(card, split, self.count) for split in card[4]}
        return datasets.DatasetDict({split: split_of(card, found) for split, found in rows.items()})


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(datasets, "load_dataset", found)
    return found


# ---------------------------------------------------------------- one test per task

TEXTS = {  # task: a row as the Hub has it, the text that the paper's rows would have, the option
    "mnli": (dict(premise="A {cat} sat. ", hypothesis="It sat.", label=1),
             "sentence 1: A {cat} sat. \nsentence 2: It sat.", "neutral"),
    "cb": (dict(premise="P", hypothesis="H", label=1), "sentence 1: P\nsentence 2: H", "contradiction"),
    "wic": (dict(word="toss", sentence1="I toss.", sentence2="A toss.", label=0),
            "word: toss\nI toss.\nA toss.", "False"),
    "copa": (dict(premise="It fell.", choice1="One.", choice2="Two.", question="effect", label=1),
             'Which sentence is the effect of "It fell."? Choose one between A and B.\nA: One.\nB: Two.',
             "B"),
    "qqp": (dict(question1="Why?", question2="How?", label=1),
            "first sentence: Why?\nsecond sentence: How?", "True"),
    "boolqa": (dict(question="is it", passage="It -- Is.", label=1),
               "question: is it\npassage: It -- Is.", "True"),
    "rte": (dict(sentence1="S", sentence2="T", label=1), "sentence 1: S\nsentence 2: T", "contradiction"),
    "imdb": (dict(text="Fine.<br />\u2028Yes", label=1), "Fine.<br />\u2028Yes", "Good"),
    "yelp": (dict(text="Good\\nfood.", label=3), "Text: Good\\nfood.\n", "positive"),
    "amazon": (dict(review_title=None, review_text="It broke.", class_index=1),
               "Title: \nText: It broke.\n", "very negative"),
    "sst-2": (dict(sentence="it 's dull . ", label=0), "Text: it 's dull . ", "Bad"),
    "dbpedia": (dict(title="A", content=" A is.", label=13), "Title: A\nText:  A is.\n", "Written Work"),
    "agnews": (dict(text="Shares fall", label=3), "Text: Shares fall\n", "Science or Technology"),
    "multirc": (dict(paragraph="It is. ", question="Is it?", answer="Yes", label=0),
                "paragraph: It is. \nquestion: Is it?\ncandidate answer: Yes", "False"),
    "yahoo": (dict(question_title="T?", question_content="", best_answer="", topic=9),
              "Question: T?\nAnswer: \n", "Politics & Government"),
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARK)
def test_a_task_has_the_papers_texts_options_and_question(hub, name):
    row, text, option = TEXTS[name]
    source = BENCHMARK[name].hub
    card = CARDS[source.repo_id, source.config]
    hub.rows = {split: [row | {source.label: row[source.label]}, *made_up(card, split, 60)]
                for split in ("train", source.test)}  # fmt: skip
    task = hub_task(name)
    assert (text, option) in task.test and text not in [row.text for row in (*task.train, *task.dev)]
    known = BENCHMARK[name]
    assert (task.name, task.instruction, task.options) == (f"{name}-hub", known.instruction, known.options)
    assert set(Counter(row.label for row in task.test)) == set(known.options) and task.outside_options == 0
    where = f"{DIFFERENT_SAMPLE}: drawn from {source.repo_id}"
    assert task.note.startswith(where) and f"test from its {source.test} split" in task.note
    assert "train has" in task.note and f"the paper's {known.rows[0]}" in task.note


def test_yahoos_longer_questions_keep_their_title(hub):
    task = hub_task("yahoo")
    assert all(re.fullmatch("Title: .*\nQuestion: .*\nAnswer: .*\n", row.text) for row in task.test)


@needs_rows
@pytest.mark.parametrize("name", BENCHMARK)
def test_every_text_of_the_paper_has_the_form_of_our_templates(name):
    source = BENCHMARK[name].hub
    forms = []
    for template in filter(None, (source.text, source.without[1])):
        parts = string.Formatter().parse(template)
        pattern = "".join(re.escape(text) + ("(.*)" if field else "") for text, field, _, _ in parts)
        forms.append(re.compile(pattern, re.S))
    rows = pq.read_table(DATA / name / "dev.parquet").column("sentence").to_pylist()
    texts = [re.sub("^Title: .*\n", "", text) if name == "agnews" else text for text in rows]
    assert len(texts) > 50 and all(any(form.fullmatch(text) for form in forms) for text in texts)


# ---------------------------------------------------------------- which version, which code


def test_a_version_is_fixed_wherever_one_is_known_and_nothing_else_is_asked(hub):
    for name, known in BENCHMARK.items():
        source = known.hub
        hub_task(name)
        assert hub.asked[-1] == (source.repo_id, source.config, {"revision": source.revision})
        assert source.revision is None if name == "amazon" else re.fullmatch("[0-9a-f]{40}", source.revision)
    assert len({known.hub.repo_id for known in BENCHMARK.values()}) == 8
    table = hub_table()
    assert list(table.index) == list(BENCHMARK) and (table["version"] == "newest").sum() == 1
    assert table.loc["copa"].tolist() == [
        "aps/super_glue copa",
        "3de24cf8",
        "question, premise, choice1, choice2",
        "validation",
    ]


# ---------------------------------------------------------------- which rows


def test_counts_are_the_papers_where_there_are_enough_rows(hub):
    rng = np.random.default_rng(0)
    labels = [int(x < 0.37) for x in rng.random(4000)]  # about QQP's share of duplicates
    hub.count = 4000
    hub.rows = {split: made_up(CARDS[GLUE, "qqp"], split, 4000, labels) for split in ("train", "validation")}
    task = hub_task("qqp")
    assert tuple(len(getattr(task, split)) for split in SPLITS) == BENCHMARK["qqp"].rows
    counts = task.counts()
    assert set(counts["test"].values()) == {500} and "rows, the paper's" not in task.note
    for split in ("train", "dev"):  # as the labels come
        assert 0.33 < counts[split]["True"] / sum(counts[split].values()) < 0.41
    texts = [row.text for split in SPLITS for row in getattr(task, split)]
    assert len(set(texts)) == len(texts) == sum(BENCHMARK["qqp"].rows)


def test_mnli_has_500_test_rows_of_each_label_and_none_without_an_answer(hub):
    hub.count = 1800
    task = hub_task("mnli")
    assert set(task.counts()["test"].values()) == {500} and task.outside_options == 0
    assert "test has 1500 rows, the paper's 1631" in task.note


def test_the_same_seed_draws_the_same_rows_and_another_seed_others(hub):
    hub.count = 1500
    one, again, other = hub_task("rte"), hub_task("rte"), hub_task("rte", seed=1)
    assert one == again
    for split in SPLITS:
        assert getattr(one, split) != getattr(other, split)
    shared = set(one.test) & set(other.test)
    assert len(one.test) == 277 and 0 < len(shared) < 277


CB = [0] * 115 + [1] * 119 + [2] * 16  # the public train split's labels


@pytest.mark.parametrize("name, train, labels", [("cb", 250, CB), ("copa", 400, None)])
def test_small_tasks_use_every_public_row_and_share_each_label_fairly(hub, name, train, labels):
    source = BENCHMARK[name].hub
    card = CARDS[source.repo_id, source.config]
    hub.rows = {"train": made_up(card, "train", train, labels),
                "validation": made_up(card, "validation", BENCHMARK[name].rows[2])}  # fmt: skip
    task = hub_task(name)
    assert tuple(len(getattr(task, split)) for split in SPLITS) == BENCHMARK[name].rows
    for option, count in Counter(row.label for row in (*task.train, *task.dev)).items():
        assert abs(task.counts()["dev"][option] - count * len(task.dev) / train) <= 1


def test_a_text_that_is_public_twice_is_drawn_once_and_never_in_train_and_test(hub):
    card = CARDS[GLUE, "sst2"]
    same = made_up(card, "both", 40)
    hub.rows = {"train": same + same + made_up(card, "train", 40), "validation": same}
    task = hub_task("sst-2")
    assert len(task.test) == 40 and len(task.train) + len(task.dev) == 40
    assert not {row.text for row in task.test} & {row.text for row in (*task.train, *task.dev)}


def test_rows_without_an_answer_are_passed_over(hub):
    card = CARDS[GLUE, "sst2"]
    hub.rows = {split: made_up(card, split, 90, [0, -1, 1]) for split in ("train", "validation")}
    task = hub_task("sst-2")
    assert len(task.train) + len(task.dev) == 60 and len(task.test) == 60 and task.outside_options == 0


# ---------------------------------------------------------------- errors


def test_an_unknown_task_or_sequence_names_the_nearest(hub):
    with pytest.raises(ValueError, match="task='agnew' is not known; .*did you mean 'agnews'"):
        hub_task("agnew")
    with pytest.raises(ValueError, match="did you mean 'order6-hub'|did you mean 'order.-hub'"):
        hub_sequence("order7-hub")
    assert not hub.asked


@pytest.mark.parametrize("missing", ["sentence", "label"])
def test_a_missing_column_is_named_with_those_that_are_there(hub, monkeypatch, missing):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub(*a, **k).rename_column(missing, "body"))
    with pytest.raises(ValueError, match=f"nyu-mll/glue: column='{missing}' is not known; use .*'body'"):
        hub_task("sst-2")


def test_a_missing_split_and_an_unknown_label_stop_before_a_row_is_drawn(hub, monkeypatch):
    names = ["World", "Sport", "Business", "Sci/Tech"]
    other = datasets.ClassLabel(names=names)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub(*a, **k).cast_column("label", other))
    with pytest.raises(ValueError, match="ag_news: label='Sport' is not known; .*did you mean 'Sports'"):
        hub_task("agnews")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": hub(*a, **k)["train"]})
    with pytest.raises(ValueError, match="ag_news: split='test' is not known; use 'train'"):
        hub_task("agnews")
    hub.rows = {"test": made_up(CARDS[AMAZON, None], "test", 12, [0, 1, 2, 3, 4, 5])}  # stars are 1 to 5
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(ValueError, match="label='0' is not known"):
        hub_task("amazon")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        RuntimeError("Dataset scripts are no longer supported"),
        ValueError("BuilderConfig 'x' not found"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(OSError, match=f"task 'cb' could not be read .{error}.*connect to the Hub"):
        hub_task("cb")


def test_the_real_library_offline_is_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert main(["compare", "--sequence", "copa-hub", "--out", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr().err
    assert "aps/super_glue" in said and "connect to the Hub once" in said and not (tmp_path / "runs").exists()


def test_a_task_without_any_row_is_refused(hub):
    hub.rows = {"train": made_up(CARDS[GLUE, "rte"], "train", 4, [-1])}
    with pytest.raises(ValueError, match="task 'rte-hub' has no train rows"):
        hub_task("rte")


# ---------------------------------------------------------------- one door


def test_orders_are_opened_by_name_in_the_papers_order(hub, monkeypatch):
    monkeypatch.delenv("JUMPLORA_DATA", raising=False)
    assert set(HUB_SEQUENCES) == {f"order{n}-hub" for n in ORDERS} | {f"{name}-hub" for name in BENCHMARK}
    found = load_sequence("order2-hub", train=6, dev=3, test=8)
    assert found.name == "order2-hub" and found.names == tuple(f"{name}-hub" for name in ORDERS[2])
    assert all((len(task.train), len(task.dev), len(task.test)) == (6, 3, 8) for task in found)
    assert all(DIFFERENT_SAMPLE in note for note in found.table()["note"])
    alone = load_sequence("agnews-hub", train=6, dev=3, test=8)
    assert alone.names == ("agnews-hub",) and alone["agnews-hub"] == found["agnews-hub"]
    with pytest.raises(ValueError, match="sequence='order9-hub' is not known; .*did you mean 'order.-hub'"):
        load_sequence("order9-hub")


def test_a_grid_takes_them_by_name_and_no_other_job_gets_another_key(hub):
    job = Job("ELLA + JumpLoRA", "order1", 42, "smollm2-135m", strength=3e5)
    assert job.key == "order1_ella-jumplora_seed42_7326e576"  # as before there were rows from the Hub
    alone = plan(["single task"], ["order1", "order1-hub", "order2-hub"], [1], backbone="tiny-llama")
    tasks = [job.sequence for job in alone]
    assert tasks == [*ORDERS[1], *(f"{name}-hub" for name in ORDERS[1])]
    assert [job.sequence for job in plan(["ELLA"], ["order1-hub"], [1], backbone="x")] == ["order1-hub"]
    few = dict(train=4, dev=2, test=4)
    alone = job_sequence(Job("single task", "yahoo-hub", 1, "tiny-llama", few))
    whole = job_sequence(Job("ELLA", "order1-hub", 1, "tiny-llama", few))
    assert alone.names == ("yahoo-hub",) and alone[0] == whole["yahoo-hub"]
    assert len(hub.asked) == 1 + 4  # a single task downloads its own dataset only


def test_a_run_carries_the_label_into_its_record_and_onto_the_screen(hub, tmp_path, capsys):
    common = ["--out", str(tmp_path), "--backbone", "tiny-llama", "--device", "cpu", "--dtype", "float32"]
    rows = "--train-rows 4 --dev-rows 2 --test-rows 4 --batch-size 4 --max-length 160".split()
    asked = ["--sequence", "copa-hub", "--method", "SeqLoRA", "--seed", "1", "--progress", "false"]
    assert main(["compare", *asked, *common, *rows]) == 0
    said = capsys.readouterr().out
    assert said.count(DIFFERENT_SAMPLE) >= 3 and "copa-hub" in said  # the rows, the table, the budget
    assert DIFFERENT_SAMPLE in (tmp_path / "table.md").read_text()
    (path,) = tmp_path.glob("*/record.json")
    assert path.parent.name.startswith("copa-hub_")
    run = Run.load(path)
    assert run.sequence == "copa-hub" and run.extra["notes"]["copa-hub"].startswith(DIFFERENT_SAMPLE)
    assert main(["show", str(path)]) == 0 and f"copa-hub: {DIFFERENT_SAMPLE}" in capsys.readouterr().out
