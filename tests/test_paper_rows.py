"The paper's rows: recipe, fingerprints, the check of a folder, and one door to all tasks."

import hashlib
import json
import random
import subprocess
from itertools import permutations
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from real_rows import DATA, needs_rows

from jumplora.command_line import main
from jumplora.data import paper_rows
from jumplora.data.backbones import load_backbone
from jumplora.data.paper_rows import (
    OTHER_ROWS,
    PAPER_FILES,
    as_in_the_paper,
    blob_id,
    check_folder,
    load_sequence,
    on_answerable_rows,
    paper_split,
)
from jumplora.data.rows import BENCHMARK, ORDERS, read_folder
from jumplora.learning.continual import Learner
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import SPLITS, Example, Task, TaskSequence
from jumplora.learning.training import TrainConfig


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


@pytest.fixture
def published(monkeypatch):
    "Pretend that the paper's AG News was cut from `public_rows(60)`."
    rows = public_rows(60)
    split = paper_split(task(options=("World", "Sports", "Business"), train=rows, test=rows))
    ids = {name: blob_id(getattr(split, name))[:16] for name in SPLITS}
    monkeypatch.setitem(PAPER_FILES, "agnews", ids)
    monkeypatch.setitem(BENCHMARK, "agnews", BENCHMARK["agnews"]._replace(rows=(47, 13, 60)))
    return split


# ---------------------------------------------------------------- one door


@pytest.mark.parametrize("name", ["newsrom", "order7", 0, 7, "Newsroom", "ordre1"])
def test_an_unknown_sequence_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match="sequence=.* is not known; use 'newsroom', 'newsroom20', 'order1'"):
        load_sequence(name)


def test_an_order_without_a_folder_says_what_to_give(monkeypatch):
    monkeypatch.delenv("JUMPLORA_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="order4 are not shipped: give folder=.*JUMPLORA_DATA"):
        load_sequence(4)
    monkeypatch.setenv("JUMPLORA_DATA", "no/such/folder")
    with pytest.raises(FileNotFoundError, match="no/such/folder does not exist"):
        load_sequence("order4")


def test_any_folder_of_tasks_is_opened(tmp_path):
    found = load_sequence(public_copy(tmp_path / "my data", "TC/mine"), train=3)
    assert found.name == "my data" and found.names == ("mine",) and len(found["mine"].train) == 3


# ---------------------------------------------------------------- the paper's split


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


# ---------------------------------------------------------------- names of rows


def test_a_name_is_the_one_that_git_computes(tmp_path):
    rows = public_rows(9)
    content = json.dumps([{"sentence": r.text, "label": r.label} for r in rows], ensure_ascii=False)
    data = content.encode()
    assert blob_id(rows) == hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()
    try:
        git = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert blob_id(rows) == git.stdout.decode().strip()


def test_a_text_that_utf8_cannot_write_has_a_name():
    assert blob_id([Example("half \ud83d", "a")]) != blob_id([Example("half ", "a")])


def test_rows_of_a_public_copy_are_cut_and_recognized(tmp_path, published):
    found = as_in_the_paper(read_folder(public_copy(tmp_path))["agnews"])
    assert [getattr(found, s) for s in SPLITS] == [getattr(published, s) for s in SPLITS]
    assert "cut from the public files" in found.note and OTHER_ROWS not in found.note
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
    assert OTHER_ROWS in found.note


def test_the_note_says_which_splits_differ(published):
    half = task(
        "agnews",
        ("World", "Sports", "Business"),
        published.train,
        published.dev[:-1],
        published.test,
        note="mine",
    )
    assert as_in_the_paper(half).note == f"mine; {OTHER_ROWS}: dev"


def test_an_order_is_cut_when_it_is_opened(tmp_path, published, monkeypatch):
    monkeypatch.setitem(ORDERS, 1, ("agnews",))
    found = load_sequence("order1", public_copy(tmp_path))
    assert found["agnews"].train == published.train and found.name == "order1"
    limited = load_sequence(1, tmp_path, train=6)
    assert len(limited["agnews"].train) == 6 and set(limited["agnews"].train) <= set(published.train)


def test_the_notes_are_in_the_record():
    noted = task("a", train=[("x", "yes")], test=[("y", "no")], note="other rows")
    sequence = TaskSequence("s", [noted, task("b", train=[("x", "yes")], test=[("y", "no")])])
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    learner = Learner(model, tokenizer, sequence, METHODS["IncLoRA"], TrainConfig())
    assert learner.run.extra["notes"] == {"a": "other rows"}


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
    monkeypatch.setattr(paper_rows, "BENCHMARK", {"agnews": BENCHMARK["agnews"]})
    assert main(["data", "check", folder]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert main(["data", "chekc", folder]) == 2
    assert main(["data", "check", folder + "/nowhere"]) == 1


# ---------------------------------------------------------------- rows without an answer


def test_a_score_without_unanswerable_rows():
    assert on_answerable_rows(50.0, 100, 0) == 50.0
    assert on_answerable_rows(60.0, 100, 40) == pytest.approx(100.0)
    for outside in (-1, 100, 101):
        with pytest.raises(ValueError, match="leaves no row"):
            on_answerable_rows(50.0, 100, outside)


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
@pytest.mark.parametrize("number", ["2"])
def test_short_orders_are_read_by_number_or_name(number, monkeypatch):
    monkeypatch.setenv("JUMPLORA_DATA", str(DATA))
    found = load_sequence(number, train=8, dev=4, test=10)
    assert found.names == ORDERS[int(str(number)[-1])] and found.name == f"order{str(number)[-1]}"
    assert all(len(t.train) == 8 for t in found)


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
    for order in permutations(sorted(sizes)):
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


def test_a_task_that_cannot_be_read_is_one_line_of_the_table(tmp_path, monkeypatch):
    def refuse(folder, names):
        raise OSError(f"{names[0]} is locked")

    folder = public_copy(tmp_path)
    monkeypatch.setattr(paper_rows, "read_folder", refuse)
    table = check_folder(folder)
    assert len(table) == len(BENCHMARK) and table["verdict"].str.contains("is locked").any()
