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
from typing import NamedTuple

import datasets
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
    hub_task,
    paper_split,
    read_folder,
)
from jumplora.data.sequences import load_sequence
from jumplora.learning.tasks import SPLITS, Example, Task
from jumplora.running.grid import Job, job_sequence, plan
from jumplora.storage.record import Run

TOPICS = ("World", "Sports", "Business")
OTHER = "other rows than the paper's"


def sizes(task) -> tuple:
    return tuple(len(getattr(task, split)) for split in SPLITS)


def rows_of(task, *splits) -> list[Example]:
    return [row for split in splits or SPLITS for row in getattr(task, split)]


def test_orders_name_the_tasks_of_the_benchmark():
    assert list(ORDERS) == [1, 2, 3, 4, 5, 6] and len(BENCHMARK) == 15
    for number, names in ORDERS.items():
        assert len(set(names)) == len(names) == (4 if number < 4 else 15)
        assert set(names) <= set(BENCHMARK)
    assert len({name for known in BENCHMARK.values() for name in known.files.values()}) == 45


# ---------------------------------------------------------------- the paper's rows

PUBLIC = [Example(f"text {i} of {{braces}} and é\u2028", TOPICS[i * i % 7 % 3]) for i in range(60)]


def as_json(rows) -> str:
    return json.dumps([{"sentence": row.text, "label": row.label} for row in rows], ensure_ascii=False)


def public_copy(folder: Path, name="TC/agnews", rows=PUBLIC) -> Path:
    "A folder as O-LoRA's authors lay it out: dev is test once more."
    (folder / name).mkdir(parents=True)
    for split in SPLITS:
        (folder / name / f"{split}.json").write_text(as_json(rows), "utf-8")
    return folder


@pytest.fixture
def published(monkeypatch):
    "Pretend that the paper's AG News was cut from `PUBLIC`; names are those that git gives to the files."
    split = paper_split(Task("agnews", "Question?\n", TOPICS, PUBLIC, [], PUBLIC))
    names = {}
    for name in SPLITS:
        content = as_json(getattr(split, name)).encode()
        done = subprocess.run(
            ["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True
        )
        names[name] = done.stdout.decode()[:16]
    monkeypatch.setitem(BENCHMARK, "agnews", BENCHMARK["agnews"]._replace(rows=(47, 13, 60), files=names))
    return split


# differences: 20
def test_the_papers_split_follows_its_recipe():
    "The recipe written out a second time, with other words."
    rows = [Example(f"text {i}", "abc"[i * i % 7 % 3]) for i in range(2000)]
    found = paper_split(Task("t", "", ("a", "b", "c"), rows, [], rows))
    labels = list(dict.fromkeys(row.label for row in rows))
    expected = {}
    for splits in (("train", "dev"), ("test",)):
        rng = random.Random(42)
        parts = [[row for row in rows if row.label == label] for label in labels]
        for part in parts:
            rng.shuffle(part)
        for split in splits:
            expected[split] = []
            for part in parts:
                cut = int(len(part) * 0.8)
                expected[split] += {"train": part[:cut], "dev": part[cut:], "test": part[:500]}[split]
            rng.shuffle(expected[split])
    assert all(list(getattr(found, split)) == expected[split] for split in SPLITS)
    assert max(found.counts()["test"].values()) == 500


def test_rows_of_a_public_copy_are_cut_and_recognized(tmp_path, published, monkeypatch):
    found = as_in_the_paper(read_folder(public_copy(tmp_path))["agnews"])
    assert [getattr(found, split) for split in SPLITS] == [getattr(published, split) for split in SPLITS]
    assert "cut from the public files" in found.note and OTHER not in found.note
    assert as_in_the_paper(found) is found
    monkeypatch.setitem(ORDERS, 1, ("agnews",))
    opened = load_sequence("order1", tmp_path)
    assert opened["agnews"].train == published.train and opened.name == "order1"
    limited = load_sequence(1, tmp_path, train=6)["agnews"].train
    assert len(limited) == 6 and set(limited) <= set(published.train)


LETTER = [*PUBLIC[:7], Example(PUBLIC[7].text + " ", PUBLIC[7].label), *PUBLIC[8:]]


@pytest.mark.parametrize(
    "rows", [LETTER, PUBLIC[::-1], PUBLIC[:-1]], ids=["a letter", "the order", "a row less"]
)
def test_other_rows_stay_and_are_noted(tmp_path, published, rows):
    given = read_folder(public_copy(tmp_path, rows=rows))["agnews"]
    found = as_in_the_paper(given)
    assert (found.train, found.dev, found.test) == (given.train, given.dev, given.test)
    assert OTHER in found.note


def test_the_note_names_the_splits_that_differ(published):
    half = Task("agnews", "", TOPICS, published.train, published.dev[:-1], published.test, note="mine")
    assert as_in_the_paper(half).note == f"mine; {OTHER}: dev"


def test_a_folder_is_checked_line_by_line(tmp_path, published, capsys, monkeypatch):
    folder = str(public_copy(tmp_path))
    table = check_folder(folder)
    assert table.loc["agnews", "verdict"].tolist() == ["cut from the copy"] * 3
    assert table.loc["agnews", "rows"].tolist() == table.loc["agnews", "paper"].tolist() == [47, 13, 60]
    assert (table["verdict"] == "missing").sum() == 14 and len(table) == 17
    assert main(["data", "check", folder]) == 1
    assert "3 of 17 lines are the paper's rows" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "BENCHMARK", {"agnews": BENCHMARK["agnews"]})
    assert main(["data", "check", folder]) == 0 and "3 of 3" in capsys.readouterr().out
    assert main(["data", "chekc", folder]) == 2
    assert main(["data", "check", folder + "/nowhere"]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, verdict",
    [
        ("[", "cannot be read"),
        ('{"a": 1}', "no column 'text'"),
        ('[{"text": "x"}]', "row 0|sentence|label"),
        ("[]", "rows"),
        (None, "loop|is missing"),
        (dict(options="yes"), "its entry in .*tasks.json is odd: .*; use texts"),
        (dict(use={"train": 3}), "its entry in .*tasks.json is odd"),
        ("Other/COPA", "two tasks named 'copa'; rename one"),
    ],
)
def test_a_task_that_cannot_be_read_does_not_stop_the_check(tmp_path, published, capsys, content, verdict):
    public_copy(public_copy(tmp_path), "COPA/copa")
    broken = tmp_path / "COPA" / "copa" / "train.json"
    if content is None:  # a link to itself
        broken.unlink()
        broken.symlink_to(broken)
    elif isinstance(content, dict):
        (tmp_path / "tasks.json").write_text(json.dumps([dict(name="agnews"), content | dict(name="copa")]))
    elif "/" in content:
        public_copy(tmp_path, content)
        (tmp_path / "tasks.json").write_text('[{"name": "agnews"}, {"name": "copa"}]')
    else:
        broken.write_text(content)
    table = check_folder(tmp_path)
    assert table.loc["agnews", "verdict"].eq("cut from the copy").all()
    assert re.search(verdict, table.loc[("copa", "all"), "verdict"])
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "3 of 17 lines are the paper's rows" in capsys.readouterr().out


# ---------------------------------------------------------------- the real rows of the benchmark


@pytest.fixture(scope="module")
def long_order():
    return load_sequence(4, DATA)


@needs_rows
def test_the_benchmark_has_the_questions_options_and_rows_that_are_shipped(long_order):
    facts = {entry["name"]: entry for entry in json.loads((DATA / "tasks.json").read_text("utf-8"))}
    orders = json.loads((DATA / "orders.json").read_text("utf-8"))
    assert set(facts) == set(BENCHMARK) and long_order.names == ORDERS[4]
    assert {int(k): tuple(v) for k, v in orders.items()} == ORDERS
    for name, known in BENCHMARK.items():
        entry, task = facts[name], long_order[name]
        assert (task.instruction, task.options) == (known.instruction, known.options)
        assert known.rows == tuple(entry.get("paper_rows", entry["rows"])[split] for split in SPLITS)
        for split in SPLITS:
            use = entry["use"][split]
            assert len(getattr(task, split)) == entry["rows"][use]
            assert {label: n for label, n in task.counts()[split].items() if n} == entry["label_counts"][use]
    table = check_folder(DATA)  # every file that is present has the name of the paper's
    other = table[table["verdict"] != "ok"]
    assert len(table) == 45 and set(other.index.get_level_values("task")) <= {"yahoo"}
    assert "test" not in other.index.get_level_values("split")


@needs_rows
# differences: 19
def test_odd_rows_of_the_benchmark_are_kept_and_reported(long_order):
    mnli, yahoo = long_order["mnli"], long_order["yahoo"]
    assert mnli.outside_options == 131 == mnli.counts()["test"]["-"]
    assert mnli.limit(test=1500).outside_options == 0 and mnli.limit(test=1510).outside_options == 10
    assert sum(task.outside_options for task in long_order) == 131
    assert "train_substitute" in yahoo.note and len(yahoo.train) == 2378
    assert {row.text for row in yahoo.train}.isdisjoint(row.text for row in yahoo.dev)
    rows = pq.read_table(DATA / "imdb" / "train.parquet").to_pylist()
    assert [tuple(row) for row in long_order["imdb"].train] == [(r["sentence"], r["label"]) for r in rows]
    texts = [row.text for task in long_order for row in task.train]
    odd = [text for text in texts if "{" in text or len(text.splitlines()) > 1]
    assert odd and all(f"\nText: {text}\nAnswer:" in long_order[0].prompt(text) for text in odd)


@needs_rows
@pytest.mark.parametrize("name", ["agnews", "cb", "rte", "qqp", "amazon"])
def test_the_real_rows_were_drawn_by_the_recipe(name):
    "Undo the last shuffle: rows then lie label by label, and by chance they never would."
    rows = {
        s: pq.read_table(DATA / name / f"{s}.parquet").column("label").to_pylist() for s in ("train", "dev")
    }
    sizes = Counter(rows["train"]) + Counter(rows["dev"])
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


# ---------------------------------------------------------------- rows from the Hub


class Card(NamedTuple):
    "A dataset's card, one of its rows, and the text and option that the paper's rows would have."

    place: tuple  # dataset and configuration
    names: list | None  # of the labels, in their order
    row: dict  # the label's column is the last
    text: str
    option: str
    splits: tuple = ("train", "validation", "test")  # the test split has -1 for every label

    def made_up(self, split: str, count: int, labels=None) -> list[dict]:
        "Invented rows, no text twice; the labels in turn."
        *texts, label = self.row
        hidden = split.startswith("test") and "validation" in " ".join(self.splits) or split == "unsupervised"
        labels = labels or ([-1] if hidden else range(len(self.names)) if self.names else range(1, 6))
        rows = [{name: f"{name} {i} of {split}" for name in texts} for i in range(count)]
        return [row | {label: labels[i % len(labels)]} for i, row in enumerate(rows)]

    def dataset(self, rows: list[dict]) -> datasets.Dataset:
        "Rows with the card's features, and a column that is not read."
        *texts, label = self.row
        features = {name: datasets.Value("string") for name in texts} | {"idx": datasets.Value("int32")}
        features[label] = datasets.ClassLabel(names=self.names) if self.names else datasets.Value("int64")
        columns = {name: [row.get(name) for row in rows] for name in features}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


GLUE, SUPER, TWO = "nyu-mll/glue", "aps/super_glue", ("train", "test")
MNLI_SPLITS = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
BOOL = ["False", "True"]
DBPEDIA = """Company EducationalInstitution Artist Athlete OfficeHolder MeanOfTransportation Building
NaturalPlace Village Animal Plant Album Film WrittenWork""".split()
YAHOO = """Society & Culture|Science & Mathematics|Health|Education & Reference|Computers & Internet|Sports
Business & Finance|Entertainment & Music|Family & Relationships|Politics & Government""".replace("\n", "|")
AMAZON = "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes"
STARS = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
CARDS = {
    "mnli": Card((GLUE, "mnli"), ["entailment", "neutral", "contradiction"],
        dict(premise="A {cat} sat. ", hypothesis="It sat.", label=1),
        "sentence 1: A {cat} sat. \nsentence 2: It sat.", "neutral", MNLI_SPLITS),
    "cb": Card((SUPER, "cb"), ["entailment", "contradiction", "neutral"],
        dict(premise="P", hypothesis="H", label=1), "sentence 1: P\nsentence 2: H", "contradiction"),
    "wic": Card((SUPER, "wic"), BOOL, dict(word="toss", sentence1="I toss.", sentence2="A toss.", label=0),
        "word: toss\nI toss.\nA toss.", "False"),
    "copa": Card((SUPER, "copa"), ["choice1", "choice2"],
        dict(premise="It fell.", choice1="One.", choice2="Two.", question="effect", label=1),
        'Which sentence is the effect of "It fell."? Choose one between A and B.\nA: One.\nB: Two.', "B"),
    "qqp": Card((GLUE, "qqp"), ["not_duplicate", "duplicate"],
        dict(question1="Why?", question2="How?", label=1),
        "first sentence: Why?\nsecond sentence: How?", "True"),
    "boolqa": Card((SUPER, "boolq"), BOOL, dict(question="is it", passage="It -- Is.", label=1),
        "question: is it\npassage: It -- Is.", "True"),
    "rte": Card((GLUE, "rte"), ["entailment", "not_entailment"], dict(sentence1="S", sentence2="T", label=1),
        "sentence 1: S\nsentence 2: T", "contradiction"),
    "imdb": Card(("stanfordnlp/imdb", None), ["neg", "pos"], dict(text="Fine.<br />\u2028Yes", label=1),
        "Fine.<br />\u2028Yes", "Good", ("train", "test", "unsupervised")),
    "yelp": Card(("Yelp/yelp_review_full", None), STARS, dict(text="Good\\nfood.", label=3),
        "Text: Good\\nfood.\n", "positive", TWO),
    "amazon": Card((AMAZON, None), None, dict(review_title=None, review_text="It broke.", class_index=1),
        "Title: \nText: It broke.\n", "very negative", TWO),
    "sst-2": Card((GLUE, "sst2"), ["negative", "positive"], dict(sentence="it 's dull . ", label=0),
        "Text: it 's dull . ", "Bad"),
    "dbpedia": Card(("fancyzhx/dbpedia_14", None), DBPEDIA, dict(title="A", content=" A is.", label=13),
        "Title: A\nText:  A is.\n", "Written Work", TWO),
    "agnews": Card(("fancyzhx/ag_news", None), ["World", "Sports", "Business", "Sci/Tech"],
        dict(text="Shares fall", label=3), "Text: Shares fall\n", "Science or Technology", TWO),
    "multirc": Card((SUPER, "multirc"), BOOL,
        dict(paragraph="It is. ", question="Is it?", answer="Yes", label=0),
        "paragraph: It is. \nquestion: Is it?\ncandidate answer: Yes", "False"),
    "yahoo": Card(("community-datasets/yahoo_answers_topics", None), YAHOO.split("|"),
        dict(question_title="T?", question_content="", best_answer="", topic=9),
        "Question: T?\nAnswer: \n", "Politics & Government", TWO),
}  # fmt: skip


class Hub:
    "A stand-in for `datasets.load_dataset`: requests are kept; `rows` replace invented rows of a split."

    def __init__(self):
        self.count, self.rows, self.requests = 60, {}, []

    def __call__(self, repo_id, config=None, **more):
        self.requests.append((repo_id, config, more))
        (card,) = (card for card in CARDS.values() if card.place == (repo_id, config))
        rows = {split: self.rows.get(split) or card.made_up(split, self.count) for split in card.splits}
        return datasets.DatasetDict({split: card.dataset(found) for split, found in rows.items()})


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(datasets, "load_dataset", found)
    return found


@pytest.mark.parametrize("name", BENCHMARK)
def test_a_task_has_the_papers_texts_options_and_question(hub, name):
    card, known = CARDS[name], BENCHMARK[name]
    source = known.hub
    hub.rows = {split: [card.row, *card.made_up(split, 60)] for split in ("train", source.test)}
    task = hub_task(name)
    assert hub.requests == [(*card.place, {"revision": source.revision})]  # a fixed version, and nothing else
    assert source.revision is None if name == "amazon" else re.fullmatch("[0-9a-f]{40}", source.revision)
    assert (card.text, card.option) in task.test
    assert card.text not in [row.text for row in rows_of(task, "train", "dev")]
    assert (task.name, task.instruction, task.options) == (f"{name}-hub", known.instruction, known.options)
    assert {row.label for row in task.test} == set(known.options) and task.outside_options == 0
    where = f"{DIFFERENT_SAMPLE}: drawn from {card.place[0]}"
    assert task.note.startswith(where) and f"test from its {source.test} split" in task.note
    assert "train has" in task.note and f"the paper's {known.rows[0]}" in task.note
    if name == "yahoo":  # longer questions keep their title
        longer = [row.text for row in task.test if row.text != card.text]
        assert all(re.fullmatch("Title: .*\nQuestion: .*\nAnswer: .*\n", text) for text in longer)


def test_counts_are_the_papers_where_there_are_enough_rows(hub):
    rng = random.Random(0)
    labels = [int(rng.random() < 0.37) for _ in range(4000)]  # about QQP's share of duplicates
    hub.rows = {split: CARDS["qqp"].made_up(split, 4000, labels) for split in ("train", "validation")}
    task = hub_task("qqp")
    counts = task.counts()
    assert sizes(task) == BENCHMARK["qqp"].rows
    assert set(counts["test"].values()) == {500} and "rows, the paper's" not in task.note
    for split in ("train", "dev"):  # as the labels come
        assert 0.33 < counts[split]["True"] / sum(counts[split].values()) < 0.41
    texts = [row.text for row in rows_of(task)]
    assert len(set(texts)) == len(texts) == sum(BENCHMARK["qqp"].rows)


def test_mnli_has_500_test_rows_of_each_label_and_none_without_an_answer(hub):
    hub.count = 1800
    task = hub_task("mnli")
    assert set(task.counts()["test"].values()) == {500} and task.outside_options == 0
    assert "test has 1500 rows, the paper's 1631" in task.note


def test_the_same_seed_draws_the_same_rows_and_another_seed_others(hub):
    hub.count = 1500
    one, other = hub_task("rte"), hub_task("rte", seed=1)
    assert one == hub_task("rte")
    assert all(getattr(one, split) != getattr(other, split) for split in SPLITS)
    assert len(one.test) == 277 and 0 < len(set(one.test) & set(other.test)) < 277


CB = [0] * 115 + [1] * 119 + [2] * 16  # the public train split's labels


@pytest.mark.parametrize("name, train, labels", [("cb", 250, CB), ("copa", 400, None)])
def test_small_tasks_use_every_public_row_and_share_each_label_fairly(hub, name, train, labels):
    hub.rows = {"train": CARDS[name].made_up("train", train, labels)}
    hub.rows["validation"] = CARDS[name].made_up("validation", BENCHMARK[name].rows[2])
    task = hub_task(name)
    assert sizes(task) == BENCHMARK[name].rows
    for option, count in Counter(row.label for row in rows_of(task, "train", "dev")).items():
        assert abs(task.counts()["dev"][option] - count * len(task.dev) / train) <= 1


def test_rows_that_are_public_twice_are_drawn_once_and_rows_without_an_answer_never(hub):
    card = CARDS["sst-2"]
    same = card.made_up("both", 40)
    hub.rows = {"train": same + same + card.made_up("train", 40), "validation": same}
    task = hub_task("sst-2")
    assert len(task.test) == 40 and len(task.train) + len(task.dev) == 40
    assert set(task.test).isdisjoint(rows_of(task, "train", "dev"))
    hub.rows = {split: card.made_up(split, 90, [0, -1, 1]) for split in ("train", "validation")}
    task = hub_task("sst-2")
    assert len(task.train) + len(task.dev) == 60 and len(task.test) == 60 and task.outside_options == 0
    hub.rows["train"] = card.made_up("train", 4, [-1])
    with pytest.raises(ValueError, match="task 'sst-2-hub' has no train rows"):
        hub_task("sst-2")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("sst-2", lambda data: data.rename_column("sentence", "body"),
         "nyu-mll/glue: column='sentence' is not known; use .*'body'"),
        ("sst-2", lambda data: data.rename_column("label", "body"),
         "nyu-mll/glue: column='label' is not known; use .*'body'"),
        ("agnews", lambda data: data.cast_column(
            "label", datasets.ClassLabel(names=["World", "Sport", "Business", "Sci/Tech"])),
         "ag_news: label='Sport' is not known; .*did you mean 'Sports'"),
        ("agnews", lambda data: {"train": data["train"]}, "ag_news: split='test' is not known; use 'train'"),
        ("amazon", lambda data: data.map(lambda row: {"class_index": row["class_index"] - 1}),
         "label='0' is not known"),  # stars are 1 to 5
    ],
)  # fmt: skip
def test_a_dataset_that_was_changed_is_refused_before_a_row_is_drawn(
    hub, monkeypatch, name, changed, message
):
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, **more: changed(hub(*place, **more)))
    with pytest.raises(ValueError, match=message):
        hub_task(name)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        RuntimeError("Dataset scripts are no longer supported"),
        ValueError("BuilderConfig 'x' not found"),
    ],
)
def test_a_dataset_that_cannot_be_read_gives_what_to_do(monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(OSError, match=f"task 'cb' could not be read .{error}.*connect to the Hub"):
        hub_task("cb")


def test_the_real_library_offline_is_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert main(["compare", "--sequence", "copa-hub", "--out", str(tmp_path / "runs")]) == 1
    error = capsys.readouterr().err
    assert (
        "aps/super_glue" in error and "connect to the Hub once" in error and not (tmp_path / "runs").exists()
    )


# ---------------------------------------------------------------- by name


def test_orders_are_opened_by_name_in_the_papers_order(hub, monkeypatch):
    monkeypatch.delenv("JUMPLORA_DATA", raising=False)
    assert set(HUB_SEQUENCES) == {f"order{n}-hub" for n in ORDERS} | {f"{name}-hub" for name in BENCHMARK}
    for call, match in (
        (lambda: hub_task("agnew"), "task='agnew' is not known; .*did you mean 'agnews'"),
        (
            lambda: load_sequence("order9-hub"),
            "sequence='order9-hub' is not known; .*did you mean 'order.-hub'",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert not hub.requests
    found = load_sequence("order2-hub", train=6, dev=3, test=8)
    assert found.name == "order2-hub" and found.names == tuple(f"{name}-hub" for name in ORDERS[2])
    assert all(sizes(task) == (6, 3, 8) for task in found)
    assert all(DIFFERENT_SAMPLE in note for note in found.table()["note"])
    alone = load_sequence("agnews-hub", train=6, dev=3, test=8)
    assert alone.names == ("agnews-hub",) and alone["agnews-hub"] == found["agnews-hub"]


def test_a_grid_takes_them_by_name_and_no_other_job_gets_another_key(hub):
    job = Job("ELLA + JumpLoRA", "order1", 42, "smollm2-135m", strength=3e5)
    assert job.key == "order1_ella-jumplora_seed42_7326e576"  # as before there were rows from the Hub
    alone = plan(["single task"], ["order1", "order1-hub", "order2-hub"], [1], backbone="tiny-llama")
    assert [job.sequence for job in alone] == [*ORDERS[1], *(f"{name}-hub" for name in ORDERS[1])]
    assert [job.sequence for job in plan(["ELLA"], ["order1-hub"], [1], backbone="x")] == ["order1-hub"]
    few = dict(train=4, dev=2, test=4)
    alone = job_sequence(Job("single task", "yahoo-hub", 1, "tiny-llama", few))
    whole = job_sequence(Job("ELLA", "order1-hub", 1, "tiny-llama", few))
    assert alone.names == ("yahoo-hub",) and alone[0] == whole["yahoo-hub"]
    assert len(hub.requests) == 1 + 4  # a single task downloads its own dataset only


def test_a_run_carries_the_label_into_its_record_and_onto_the_screen(hub, tmp_path, capsys):
    call = "compare --sequence copa-hub --method SeqLoRA --seed 1 --progress false --backbone tiny-llama"
    call += " --device cpu --dtype float32 --train-rows 4 --dev-rows 2 --test-rows 4"
    call += " --batch-size 4 --max-length 160"
    assert main([*call.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(DIFFERENT_SAMPLE) >= 3 and "copa-hub" in printed  # the rows, the table, the budget
    assert DIFFERENT_SAMPLE in (tmp_path / "tables" / "copa-hub-summary.md").read_text()
    (path,) = tmp_path.glob("*/record.json")
    run = Run.load(path)
    assert path.parent.name.startswith("copa-hub_") and run.sequence == "copa-hub"
    assert run.extra["notes"]["copa-hub"].startswith(DIFFERENT_SAMPLE)
    assert main(["show", str(path)]) == 0 and f"copa-hub: {DIFFERENT_SAMPLE}" in capsys.readouterr().out
