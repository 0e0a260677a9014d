"Scores on rows from the Hub: every table, figure and record says that the sample is a different one."

import itertools

import numpy as np
import pytest
from real_rows import ROOT

from jumplora.command_line import main
from jumplora.data.benchmark import DIFFERENT_SAMPLE, ORDERS
from jumplora.results.run_tables import (
    accuracy_figure,
    budget_text,
    by_method,
    comparison_table,
    first_task_figure,
    gate_table,
    grid_table,
    measured,
    reported_results,
    reported_table,
    summary_table,
    tables_of,
)
from jumplora.storage.record import Run


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
    assert comparison_table([record()]).index.name == labelled
    assert grid_table(RUNS, "SC-hub").index.name == labelled == summary_table(RUNS, "SC-hub").index.name
    assert gate_table(RUNS, "SC-hub").index.name == f"compared ({DIFFERENT_SAMPLE})"
    assert list(grid_table(RUNS, "SC-hub").columns) == [*HUB_ORDERS, "SC-hub", "seeds"]
    for figure in (accuracy_figure([record()]), first_task_figure([record()])):
        shown = [*figure.texts, *(text for ax in figure.axes for text in (ax.title, ax._left_title))]
        assert DIFFERENT_SAMPLE in " ".join([figure.get_suptitle(), *(text.get_text() for text in shown)])
    assert f"agnews-hub: {DIFFERENT_SAMPLE}" in budget_text(RUNS)
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
