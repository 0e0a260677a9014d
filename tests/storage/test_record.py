"""The run record: round trips, damage, names and settings."""

import hashlib
import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import jumplora
from jumplora.data.backbones import load_backbone
from jumplora.learning import continual
from jumplora.learning.evaluation import Score
from jumplora.learning.methods import METHODS
from jumplora.learning.tasks import Task, TaskSequence
from jumplora.learning.training import TrainConfig
from jumplora.storage.record import (
    Damaged,
    Run,
    digest,
    environment,
    flatten,
    plain,
    read_tensors,
    set_aside,
    write_tensors,
)


def make(**changes):
    given = dict(
        method="ELLA + JumpLoRA", backbone="google-t5/t5-large", sequence="newsroom", seed=42,
        tasks=["first", "second"], test_rows=[80, 60], configuration={"r": 8, "train": {"lr": 1e-3}},
    )  # fmt: skip
    return Run(**(given | changes))


def finished():
    run = make(accuracy=[[80, None], [60, 91]], option_accuracy=[[82, None], [75, 92]])
    run.zero_shot, run.zero_shot_options = [0.0, 12.5], [25.0, 30.0]
    run.sparsity = {"first": {"q": 0.9, "v": 0.8}, "second": {"q": 0.7, "v": 0.6}}
    run.thresholds = {"first": [{"step": 1, "interpolation": 0.0, "threshold": {"model": 0.00912345678901}}]}
    run.seconds = {"train": [60.0, 30.0], "evaluate": [20.0, 10.0], "merge": [0.5, np.nan]}
    run.peak_memory, run.environment, run.extra = 5_000_000_000, environment(), {"note": "ä"}
    return run


def sign(path, **changes):
    "Change fields of a record on disk, with a checksum that is right again."
    record = json.loads(path.read_text()) | changes
    del record["checksum"]
    path.write_text(json.dumps(record | {"checksum": digest(record)}))


def test_a_run_survives_saving_and_loading_to_the_last_digit_and_byte(tmp_path):
    run = finished()
    path = run.save(tmp_path)
    again, content = Run.load(path), path.read_bytes()
    assert again.to_dict() == Run.load(path.parent).to_dict() == run.to_dict()
    assert np.array_equal(again.accuracy, run.accuracy, equal_nan=True) and again.name == run.name
    assert again.thresholds["first"][0]["threshold"]["model"] == 0.00912345678901
    assert run.save(tmp_path).read_bytes() == again.save(tmp_path / "b").read_bytes() == content


def test_the_file_is_strict_json_with_sorted_keys_and_a_checksum_anyone_can_check(tmp_path):
    run = finished()
    path = run.save(tmp_path)
    assert path == tmp_path / run.name / "record.json"

    def refuse(word):
        raise AssertionError(word)

    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert list(record) == sorted(record) and record["format"] == 1 and "right" not in record
    checksum = record.pop("checksum")
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == checksum
    assert record["accuracy"] == [[80.0, None], [60.0, 91.0]]
    assert record["metrics"]["average_accuracy"] == 75.5 and record["metrics"]["backward_transfer"] == -20
    sign(path, metrics={"average_accuracy": 99.0})
    assert Run.load(path).average_accuracy == 75.5  # for readers; here it is computed again


def test_infinity_is_not_written(tmp_path):
    run = finished()
    run.seconds["train"][0] = math.inf
    with pytest.raises(ValueError, match=r"record.seconds.train\[0\] is infinite"):
        run.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_record_leave_a_whole_one(tmp_path):
    runs = [make(accuracy=[[score, None], [60, 91]]) for score in (70, 80)]
    path = runs[0].save(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(lambda run=run: [run.save(tmp_path) for _ in range(40)]) for run in runs]
        while not all(job.done() for job in jobs):
            assert Run.load(path).accuracy[0, 0] in (70, 80)
    assert all(job.exception() is None for job in jobs)
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_the_numbers_of_a_finished_run():
    run = finished()
    assert (run.average_accuracy, run.just_learned) == (75.5, 85.5)
    assert (run.backward_transfer, run.forgetting) == (-20, 20)
    assert run.average_option_accuracy == 83.5
    assert run.mean_sparsity == pytest.approx(75)
    assert math.isnan(run.minutes)  # one part was not measured
    run.seconds["merge"][1] = 0.5
    assert run.minutes == pytest.approx(121 / 60)
    assert repr(run).endswith("2 of 2 tasks, average accuracy 75.5 %>")
    assert repr(make()) == f"<Run {make().name}: 0 of 2 tasks>"


METRICS = ("average_accuracy", "just_learned", "backward_transfer", "forgetting", "mean_sparsity")
N = None


@pytest.mark.parametrize(
    ("accuracy", "done", "known"),
    [([[N, N], [N, N]], 0, {}),
     ([[80, N], [N, N]], 1, {}),
     ([[80, N], [N, 91]], 1, {"just_learned": 85.5}),  # a hole
     ([[N, N, N], [60, 91, N], [60, 90, 80]], 0, {"average_accuracy": 230 / 3}),
     ([[N, N, N], [N, N, N], [60, 90, N]], 0, {}),
     ([[N, N], [60, 91]], 2, {"average_accuracy": 75.5}),  # learned at once
     ([[70]], 1, {"average_accuracy": 70, "just_learned": 70})],
)  # fmt: skip
def test_only_scored_tasks_are_finished_and_a_metric_without_its_scores_is_nan(
    accuracy, done, known, tmp_path
):
    size = len(accuracy)
    run = make(tasks=["a", "b", "c"][:size], test_rows=[9] * size, accuracy=accuracy)
    assert run.finished == done and run.complete == (done == size)
    values = {name: getattr(run, name) for name in METRICS}
    assert {name: value for name, value in values.items() if not math.isnan(value)} == pytest.approx(known)
    assert Run.load(run.save(tmp_path)).finished == done


@pytest.mark.parametrize(
    "bad",
    [0, 1, 40, -1, -2, -30,  # cut short
     b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"checksum": "x"}', b'{"format": 1, "checksum": 3}',
     "\ufeff{}".encode(), b'{"format": 2, "checksum": "x"}', b"\x00" * 64, b"\xff\xfe\x00"],
    ids=lambda bad: repr(bad)[:20],
)  # fmt: skip
def test_what_is_no_whole_record_is_damaged(bad, tmp_path):
    path = finished().save(tmp_path)
    content = path.read_bytes().rstrip(b"\n")
    path.write_bytes(content[:bad] if isinstance(bad, int) else bad)
    with pytest.raises(Damaged, match=r"record\.json: .*It is not used\. Set it aside .* or delete it"):
        Run.load(path)


def test_nan_is_not_json_even_where_the_checksum_fits(tmp_path):
    path = finished().save(tmp_path)
    sign(path, extra={"note": math.nan})
    assert "NaN" in path.read_text()
    with pytest.raises(Damaged, match="not a run record"):
        Run.load(path)


def test_every_single_altered_character_is_noticed(tmp_path):
    path = make(accuracy=[[80, None], [60, 91]]).save(tmp_path)
    content = path.read_bytes()
    for i in range(len(content) - 1):  # the last is a line break
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(Damaged):
            Run.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": []}, "tasks"), ({"tasks": ["a", "a"]}, "tasks"), ({"tasks": 5}, "int"),
     ({"tasks": ["a/b", "c"]}, "task='a/b'"), ({"tasks": ["../up", "b"]}, "task='../up'"),
     ({"test_rows": [80]}, "test_rows"), ({"test_rows": [1, 0]}, "test_rows"),
     ({"accuracy": [[1]]}, "accuracy"), ({"accuracy": [[101, None], [1, 2]]}, "accuracy"),
     ({"method": ""}, "method"), ({"method": " "}, "method"), ({"backbone": None}, "backbone"),
     ({"seed": True}, "seed"), ({"extra": {"notes": 3}}, "notes"), ({"environment": []}, "environment"),
     ({"sparsity": {"first": {"q": 2}}}, "sparsity"), ({"surprise": 1}, "surprise")],
)  # fmt: skip
def test_a_run_that_cannot_be_right_is_refused_in_memory_and_on_disk(change, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**change)
    path = finished().save(tmp_path)
    sign(path, **change)
    with pytest.raises(Damaged, match=f"does not describe a run .*{message}"):
        Run.load(path)


def test_records_set_aside_do_not_replace_each_other_and_a_missing_one_is_not_called_damaged(tmp_path):
    path = tmp_path / "record.json"
    for number in (1, 2, 3):
        path.write_text(str(number))
        assert set_aside(path).name == f"record.damaged-{number}.json"
        with pytest.raises(FileNotFoundError):
            Run.load(path)
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["1", "2", "3"]


def test_a_file_that_may_not_be_read_is_neither_missing_nor_damaged(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"weight": torch.ones(2)}, {})
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", Mock(side_effect=PermissionError(13, "Permission denied")))
        with pytest.raises(PermissionError):
            read_tensors(path)
    assert read_tensors(path)[0]["weight"].tolist() == [1, 1]
    for damage, message in ((path.unlink, "is missing"), (path.mkdir, "is damaged")):
        damage()
        with pytest.raises(Damaged, match=message):
            read_tensors(path)


def test_plain_knows_arrays_tensors_tuples_and_nan():
    value = {"b": torch.tensor([1, 2]), "a": np.float32(0.5), "c": (np.int64(3), True, None), "d": math.nan}
    same = {"a": 0.5, "b": [1, 2], "c": [3, True, None], "d": None}
    assert plain(value) == same and digest(value) == digest(same)


@pytest.mark.parametrize("value", [{1: 2}, {1, 2}, object(), b"x", Path("x"), math.inf, {"a": [-math.inf]}])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(ValueError):
        digest(value)


def test_flatten_keeps_empty_dicts_visible():
    assert flatten({"a": {}, "b": {"c": {"d": 1}}}) == {"a": {}, "b.c.d": 1}


def test_every_setting_changes_the_name_but_neither_its_order_nor_what_was_measured():
    changes = [
        {}, {"seed": 43}, {"tasks": ["second", "first"]}, {"configuration": {"r": 4}}, {"backbone": "other"},
        {"method": "ELLA"}, {"sequence": "order1"}, {"backbone": "google/t5-t5-large"},
    ]  # fmt: skip
    runs = [make(**change) for change in changes]
    assert len({run.name for run in runs}) == len({run.configuration_hash for run in runs}) == len(changes)
    assert finished().name == make(configuration={"train": {"lr": 1e-3}, "r": 8}).name == make().name


@pytest.mark.parametrize(
    "backbone", ["../../x", "/abs/path/model", "C:\\model", "m" * 300, "ünï", "...", "a b\nc"]
)
def test_a_runs_name_is_one_safe_folder_name(tmp_path, backbone):
    run = make(backbone=backbone)
    path = run.save(tmp_path)
    assert path.parent.parent == tmp_path and len(run.name) < 200
    assert path.parent.resolve().parent == tmp_path.resolve()
    assert Run.load(path).backbone == backbone


def test_the_environment_names_versions_and_nothing_private():
    found = environment("cpu")
    assert torch.__version__.split("+")[0] == found["versions"]["torch"].split("+")[0]
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert str(Path.cwd()) not in str(found) and str(Path.home()) not in str(found)


def test_a_checkout_names_its_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(jumplora, "__file__", str(tmp_path / "jumplora" / "__init__.py"))
    (tmp_path / "settings.ini").write_text("x")
    assert environment()["commit"] is None  # no checkout
    git("init", "-q")
    assert environment()["commit"] is None  # nothing committed
    git("add", "settings.ini")
    git("commit", "-qm", "first")
    git("tag", "-a", "-m", "first", "v1")
    (tmp_path / "untracked").write_text("z")
    assert environment()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "settings.ini").write_text("y")
    assert environment()["commit"] == git("rev-parse", "HEAD") + "+changes"
    git("mv", "settings.ini", "other.ini")
    assert environment()["commit"] is None  # a checkout of another project


# ---- which rows were right --------------------------------------------------------------------------------


def score_of(right, likeliest=None):
    return Score(("",) * len(right), tuple(right), tuple(right if likeliest is None else likeliest))


def with_rows():
    "A run with 8 + 3 rows, scored before the first task and after it."
    run = make(test_rows=[8, 3])
    run.add_score(None, 0, score_of([False] * 8))
    run.add_score(None, 1, score_of([True, False, False]))
    run.add_score(0, 0, score_of([True, False] * 4, [False] * 5 + [True] * 3))
    return run


def test_a_score_fills_its_cell_and_the_rows_that_were_right_survive_saving(tmp_path):
    run = with_rows()
    assert (run.accuracy[0, 0], run.option_accuracy[0, 0]) == (50, 37.5)
    assert run.zero_shot == run.zero_shot_options == [0, pytest.approx(100 / 3)]
    assert run.right["first"] == {"first": {"exact_match": "aa", "option_accuracy": "07"}}
    assert run.right[""]["second"]["exact_match"] == "80"
    again = Run.load(run.save(tmp_path))
    assert again.to_dict() == run.to_dict() and again.name == make(test_rows=[8, 3]).name
    assert again.rows_right(0, 0).tolist() == [True, False] * 4
    assert again.rows_right(0, 0, "option_accuracy").tolist() == [False] * 5 + [True] * 3
    assert again.rows_right(None, 1).tolist() == [True, False, False]


def test_scores_of_other_rows_or_out_of_order_are_refused():
    run = make(test_rows=[8, 3])
    with pytest.raises(ValueError, match="3 rows of 'first' were scored, not 8"):
        run.add_score(0, 0, score_of([True] * 3))
    with pytest.raises(ValueError, match="j=1, but 0 tasks"):
        run.add_score(None, 1, score_of([True] * 3))
    assert run.to_dict() == make(test_rows=[8, 3]).to_dict()


@pytest.mark.parametrize(
    "change",
    [lambda run: run.right["first"]["first"].update(exact_match="ab"),  # one row more than the score
     lambda run: run.right["first"]["first"].update(option_accuracy="0700"),
     lambda run: run.right[""]["second"].update(exact_match="81"),  # a bit behind the last row
     lambda run: run.right[""]["second"].update(exact_match="no"),
     lambda run: run.right["first"]["first"].pop("option_accuracy"),
     lambda run: run.right.update(third={"first": {}}),
     lambda run: run.right.update(first={"third": {}}),
     lambda run: run.right.update(first=3),
     lambda run: run.right.update(first={"first": "aa"}),
     lambda run: setattr(run, "right", [1]),
     lambda run: setattr(run, "zero_shot", None),
     lambda run: setattr(run, "zero_shot_options", [0.0]),
     lambda run: run.option_accuracy.__setitem__((0, 0), math.nan),
     lambda run: run.option_accuracy.__setitem__((0, 0), 37.6)],
)  # fmt: skip
def test_rows_that_contradict_the_scores_are_refused_in_memory_and_on_disk(change, tmp_path):
    run = with_rows()
    path = run.save(tmp_path)
    change(run)
    with pytest.raises(ValueError):
        run.save(tmp_path)
    keys = ("right", "option_accuracy", "zero_shot", "zero_shot_options")
    sign(path, **{key: plain(getattr(run, key)) for key in keys})
    with pytest.raises(Damaged, match="does not describe a run"):
        Run.load(path)


def test_a_run_of_an_older_record_resumes_and_keeps_the_rows_of_new_scores(tmp_path, monkeypatch):
    rows = [("rain", "yes"), ("sun", "no")]
    tasks = [Task(name, "Wet?\n", ("yes", "no"), rows * 2, [], rows) for name in ("first", "second")]
    config, scored = TrainConfig(batch_size=4, max_length=60), []

    def stop_after_four(*args, **settings):
        scored.append(args)
        if len(scored) == 5:
            raise KeyboardInterrupt
        return score_of([len(scored) > 2, False])

    def learn():
        model, tokenizer = load_backbone("tiny-llama", device="cpu", dtype="float32")
        options = dict(out=tmp_path, progress=False)
        sequence = TaskSequence("short", tasks)
        return continual.learn_sequence(model, tokenizer, sequence, METHODS["IncLoRA"], config, **options)

    monkeypatch.setattr(continual, "evaluate", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        learn()  # untrained twice, the first task, the first again after the second
    run = Run.load(next(tmp_path.glob("*/record.json")))
    assert run.rows_right(1, 0).tolist() == [True, False] and np.isnan(run.accuracy[1, 1])
    run.right = {}
    assert '"right"' not in run.save(tmp_path).read_text()
    run = learn()
    assert run.complete and run.right.keys() == {"second"} and run.accuracy[1].tolist() == [50, 50]
    assert run.rows_right(1, 1).tolist() == [True, False]
    missing = {None: "before anything was learned", 1: "after learning 'second'"}
    for i, when in missing.items():
        with pytest.raises(ValueError, match=f"rows of 'first' were right {when}.*older than this field"):
            run.rows_right(i, 0)
