"""Rows from the Hub: a stand-in with the true columns and labels, a test per task, what keeps scores apart.

Columns, labels in their order and splits are those of the datasets' cards, written down here a second time.
"""

import itertools
import re
import string
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from real_rows import DATA, ROOT, needs_rows

from jumplora.command_line import main
from jumplora.data import hub_rows
from jumplora.data.hub_rows import DIFFERENT_SAMPLE, HUB_SEQUENCES, HUB_SOURCES, hub_task, sample_gap
from jumplora.data.paper_rows import load_sequence
from jumplora.data.rows import BENCHMARK, ORDERS
from jumplora.learning.tasks import SPLITS
from jumplora.results.grid_tables import (
    budget_text,
    forgetting_figure,
    gate_table,
    grid_table,
    measured,
    search_table,
    sequence_figure,
    summary_table,
    tables_of,
)
from jumplora.results.run_tables import (
    accuracy_figure,
    by_method,
    comparison_table,
    first_task_figure,
    reported_results,
    reported_table,
    what_was_run,
)
from jumplora.running.grid import Job, job_sequence, plan
from jumplora.storage.record import Run

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
    source = HUB_SOURCES[name]
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


def test_yahoos_longer_questions_keep_their_title():
    row = dict(question_title="T?", question_content="More.", best_answer="A")
    assert hub_rows.row_text(HUB_SOURCES["yahoo"], row) == "Title: T?\nQuestion: More.\nAnswer: A\n"


@needs_rows
@pytest.mark.parametrize("name", BENCHMARK)
def test_every_text_of_the_paper_has_the_form_of_our_templates(name):
    source = HUB_SOURCES[name]
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
    for name, source in HUB_SOURCES.items():
        hub_rows.load_hub(name)
        assert hub.asked[-1] == (source.repo_id, source.config, {"revision": source.revision})
        assert source.revision is None if name == "amazon" else re.fullmatch("[0-9a-f]{40}", source.revision)
    assert len({source.repo_id for source in HUB_SOURCES.values()}) == 8


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
    source = HUB_SOURCES[name]
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
        hub_rows.hub_sequence("order7-hub")
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
    amazon = HUB_SOURCES["amazon"]
    with pytest.raises(ValueError, match="label='0' is not known"):
        hub_rows.row_answers(hub(amazon.repo_id)["test"], amazon)


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
    assert [job.sequence for job in alone] == [*ORDERS[1], *(f"{name}-hub" for name in ORDERS[1])]
    assert [job.sequence for job in plan(["ELLA"], ["order1-hub"], [1], backbone="x")] == ["order1-hub"]
    few = dict(train=4, dev=2, test=4)
    alone = job_sequence(Job("single task", "yahoo-hub", 1, "tiny-llama", few))
    whole = job_sequence(Job("ELLA", "order1-hub", 1, "tiny-llama", few))
    assert alone.names == ("yahoo-hub",) and alone[0] == whole["yahoo-hub"]
    assert len(hub.asked) == 1 + 4  # a single task downloads its own dataset only


# ---------------------------------------------------------------- the label, wherever numbers appear


def record(method="ELLA", sequence="order1-hub", seed=1, rows="these", model="a model") -> Run:
    tail = "-hub" if sequence.endswith("-hub") else ""
    tasks = [f"{name}{tail}" for name in ORDERS[int(sequence[5])]]
    scores = np.where(np.tri(4, dtype=bool), 10.0 * seed + np.arange(16).reshape(4, 4), np.nan)
    configuration = dict(
        method=dict(regularizer=dict(name=method)),
        train=dict(max_length=128, kept=None, learning_rate=1e-3),
        scored_split="test",
        rows=dict.fromkeys(tasks, rows),
        counts=dict.fromkeys(tasks, [120, 40, 50]),
    )
    extra = dict(notes=dict.fromkeys(tasks, f"{DIFFERENT_SAMPLE}: drawn from x")) if tail else {}
    return Run(method, model, sequence, seed, tasks, [50] * 4, configuration, scores, extra=extra)


PAIR, HUB_ORDERS = ("ELLA", "ELLA + JumpLoRA"), ("order1-hub", "order2-hub", "order3-hub")
RUNS = [record(*asked) for asked in itertools.product(PAIR, HUB_ORDERS, (1, 2))]


def test_tables_in_every_form_and_figures_say_that_rows_are_a_different_sample(tmp_path, capsys):
    labelled = f"method ({DIFFERENT_SAMPLE})"
    assert comparison_table([record()]).index.name == labelled == search_table([record()]).index.name
    assert grid_table(RUNS, "SC-hub").index.name == labelled == summary_table(RUNS, "SC-hub").index.name
    assert gate_table(RUNS, "SC-hub").index.name == f"compared ({DIFFERENT_SAMPLE})"
    assert list(grid_table(RUNS, "SC-hub").columns) == [*HUB_ORDERS, "SC-hub", "seeds"]
    for figure in (accuracy_figure([record()]), first_task_figure([record()])):
        shown = [*figure.texts, *(text for ax in figure.axes for text in (ax.title, ax._left_title))]
        assert DIFFERENT_SAMPLE in " ".join([figure.get_suptitle(), *(text.get_text() for text in shown)])
    for draw in (sequence_figure, forgetting_figure):
        figure = draw(RUNS, "SC-hub")
        assert DIFFERENT_SAMPLE in figure.get_suptitle() + figure.axes[0].get_title("left")
    assert f"agnews-hub: {DIFFERENT_SAMPLE}" in budget_text(RUNS)
    assert f"on order1-hub with a model ({DIFFERENT_SAMPLE}) (2 seeds)" in what_was_run(RUNS)
    for run in RUNS:
        run.save(tmp_path / "runs")
    for form in ("text", "markdown", "csv", "html"):
        flags = ["--format", form, "--out", str(tmp_path / "tables")]
        assert main(["table", str(tmp_path / "runs"), *flags]) == 0
        assert DIFFERENT_SAMPLE in capsys.readouterr().out
    files = list((tmp_path / "tables").iterdir())
    assert len(files) == 15 and all("SC-hub" in f.name and DIFFERENT_SAMPLE in f.read_text() for f in files)


def test_rows_of_the_paper_and_of_the_hub_stand_in_no_common_table(tmp_path):
    paper, hub = record("IncLoRA", "order1"), record("ELLA", "order1-hub")
    with pytest.raises(ValueError, match="differ in sequence: order1 / order1-hub"):
        by_method([paper, hub])
    tables = tables_of([paper, hub])
    assert "not run" in tables["SC-overall-accuracy"].loc["ELLA", "order1"]
    assert "not run" in tables["SC-hub-overall-accuracy"].loc["IncLoRA", "order1-hub"]
    assert tables["SC-summary"].index.name == "method"
    with pytest.raises(ValueError, match="differs from other runs in rows of"):
        measured([record("IncLoRA", rows="these"), record("ELLA", rows="those")], "ELLA")
    reported = reported_results(ROOT / "results" / "reported.json")
    beside = reported_table(reported, [record(model="google-t5/t5-large")])
    assert set(beside["measured order1"]) <= {"not run", "″"}


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


# ---------------------------------------------------------------- the gap


def test_two_samples_differ_by_the_gap_in_one_case_of_twenty():
    rng = np.random.default_rng(0)
    for score, rows in ((80, 1000), (50, 200), (95, 2000)):
        a, b = (100 * rng.binomial(rows, score / 100, 20000) / rows for _ in range(2))
        assert 0.035 < (abs(a - b) > sample_gap(score, rows)).mean() < 0.065
