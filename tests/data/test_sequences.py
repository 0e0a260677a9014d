"One function opens every sequence, by name or by folder."

import pytest
from real_rows import DATA, needs_rows

from jumplora.data.backbones import load_backbone
from jumplora.data.benchmark import ORDERS
from jumplora.data.sequences import load_sequence
from jumplora.learning.continual import Learner
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig


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
    for split in ("train", "test"):
        path = tmp_path / "my data" / "mine" / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text,label\n" + "\n".join(f"text {i},{i % 2}" for i in range(10)))
    found = load_sequence(tmp_path / "my data", train=4, test=6)
    assert found.name == "my data" and found.names == ("mine",)
    assert found["mine"].counts() == {
        "train": {"0": 2, "1": 2},
        "dev": {"0": 0, "1": 0},
        "test": {"0": 3, "1": 3},
    }
    assert load_sequence(tmp_path / "my data", train=4, seed=1)["mine"].train != found["mine"].train


def test_a_folder_of_ones_own_has_its_own_labels_also_where_a_task_has_a_benchmarks_name(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "yelp").mkdir(exist_ok=True)
        (tmp_path / "yelp" / f"{split}.csv").write_text("text,label\nfine,positive\nawful,negative\n")
    (task,) = load_sequence(tmp_path)
    assert task.options == ("negative", "positive") and task.note == "with a general instruction"


def test_the_notes_are_in_the_record():
    yes_no = dict(instruction="?", options=("yes", "no"), train=[("x", "yes")], dev=[], test=[("y", "no")])
    noted = Task("a", **yes_no, note="other rows")
    sequence = TaskSequence("s", [noted, Task("b", **yes_no)])
    model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
    learner = Learner(model, tokenizer, sequence, METHODS["IncLoRA"], TrainConfig())
    assert learner.run.extra["notes"] == {"a": "other rows"}


@needs_rows
@pytest.mark.parametrize("number", ["2"])
def test_short_orders_are_read_by_number_or_name(number, monkeypatch):
    monkeypatch.setenv("JUMPLORA_DATA", str(DATA))
    found = load_sequence(number, train=8, dev=4, test=10)
    assert found.names == ORDERS[int(str(number)[-1])] and found.name == f"order{str(number)[-1]}"
    assert all(len(t.train) == 8 for t in found)
