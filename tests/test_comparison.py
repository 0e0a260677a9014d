"""Comparison over orders and seeds: cells against numpy, intervals against brute force, wins and files."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from jumplora.command_line import main
from jumplora.results.grid_tables import (
    beside_figure,
    budget_text,
    forgetting_figure,
    forgotten_per_task,
    gate_table,
    grid_table,
    measured,
    order_values,
    paired_difference,
    part_tables,
    put_together,
    scratch_scores,
    search_table,
    sequence_figure,
    summary_table,
    tables_of,
    typical_interval,
    wins,
    write_tables,
)
from jumplora.storage.record import Run

ORDERS = {
    "order1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "order2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "order3": ["yahoo", "amazon", "agnews", "dbpedia"],
}
ALL = ["amazon", "agnews", "dbpedia", "yahoo"]


def make(method, order, seed, rng=None, split="test", **changes):
    "A run with random scores."
    rng = rng or np.random.default_rng([seed, *map(ord, method + order)])
    tasks = ORDERS.get(order, [order])
    matrix = np.where(np.tri(len(tasks), dtype=bool), rng.uniform(0, 100, (len(tasks), len(tasks))), np.nan)
    configuration = dict(
        method=dict(regularizer=dict(name=method)),
        train=dict(max_length=128, kept=None, learning_rate=1e-3),
        rows={task: f"rows of {task}" for task in tasks},
        counts={task: [120, 40, 50] for task in tasks},
        scored_split=split,
    )
    content = dict(configuration=configuration, accuracy=matrix, seconds=dict(train=[60.0], evaluate=[30.0]))
    backbone = changes.pop("backbone", "a model")
    return Run(method, backbone, order, seed, tasks, [50] * len(tasks), **content | changes)


METHODS = ("IncLoRA", "IncLoRA + JumpLoRA", "ELLA")
RUNS = [make(*where) for where in itertools.product(METHODS, ORDERS, (1, 2, 3))]
ALONE = [make("single task", task, seed) for task in ALL for seed in (1, 2)]


def test_cells_are_means_over_seeds_with_their_standard_deviation():
    table = grid_table(RUNS, "SC", "backward transfer")
    for method in METHODS:
        values = {}
        for run in (run for run in RUNS if run.method == method):
            a = run.accuracy
            values[run.sequence, run.seed] = np.mean([a[3, j] - a[j, j] for j in range(3)])
        for order in ORDERS:
            cell = [values[order, seed] for seed in (1, 2, 3)]
            assert table.loc[method, order] == f"{np.mean(cell):.1f} ± {np.std(cell, ddof=1):.1f}"
        parts = [np.mean([values[order, seed] for order in ORDERS]) for seed in (1, 2, 3)]
        assert table.loc[method, "SC"] == f"{np.mean(parts):.1f} ± {np.std(parts, ddof=1):.1f}"
        assert table.loc[method, "seeds"] == "3"


def test_a_seed_without_all_orders_does_not_count_in_the_mean_of_orders():
    runs = [run for run in RUNS if (run.sequence, run.seed) != ("order3", 2)]
    assert len(order_values(measured(runs, "ELLA"), tuple(ORDERS))) == 2
    assert len(order_values(measured(runs, "ELLA"), ("order1",))) == 3
    table = grid_table(runs, methods=["SeqLoRA", "ELLA"])
    assert (table.loc["ELLA", "seeds"], table.loc["SeqLoRA", "SC"]) == ("2", "not run")
    assert list(table.index[:2]) == ["SeqLoRA", "IncLoRA"]  # the order of every table
    unfinished = make("ELLA", "order1", 9, accuracy=np.full((4, 4), np.nan))
    assert grid_table([*RUNS, unfinished]).equals(grid_table(RUNS))


def test_forward_transfer_uses_the_same_task_on_the_same_rows_and_settings():
    run = RUNS[0]
    expected = [np.mean([o.accuracy[0, 0] for o in ALONE if o.tasks == [task]]) for task in run.tasks]
    assert scratch_scores(run, ALONE) == pytest.approx(expected)
    summary = summary_table([*RUNS, *ALONE])
    own = [r for r in RUNS if r.method == run.method]
    per_seed = [
        np.mean([np.mean(r.accuracy[3] - np.array(scratch_scores(r, ALONE))) for r in own if r.seed == seed])
        for seed in (1, 2, 3)
    ]
    shown = f"{np.mean(per_seed):.1f} ± {np.std(per_seed, ddof=1):.1f}"
    assert summary.loc[run.method, "forward transfer"] == shown
    assert summary.loc["ELLA", "runs"] == "9 of 9"
    for key, value in dict(train=dict(max_length=512), rows=dict.fromkeys(ALL, "other")).items():
        other = [
            make("single task", o.tasks[0], o.seed, configuration=o.configuration | {key: value})
            for o in ALONE
        ]
        assert scratch_scores(run, other) is None
    assert scratch_scores(run, [make("single task", o.tasks[0], o.seed, backbone="b") for o in ALONE]) is None
    assert summary_table(RUNS).loc["ELLA", "forward transfer"] == "not measured"
    faster = run.configuration | {"train": run.configuration["train"] | {"learning_rate": 1e-2}}
    other = make(run.method, run.sequence, 1, configuration=faster)
    assert scratch_scores(other, ALONE) is None
    faster["method"] = faster["method"] | {"optimizer": "muon"}
    assert scratch_scores(other, ALONE) == pytest.approx(expected)


def test_tasks_learned_alone_stand_beside_every_order_that_they_cover():
    everything = [*RUNS, *ALONE]
    per_seed = [np.mean([run.accuracy[0, 0] for run in ALONE if run.seed == seed]) for seed in (1, 2)]
    cell = f"{np.mean(per_seed):.1f} ± {np.std(per_seed, ddof=1):.1f}"
    row = grid_table(everything).loc["single task"]
    assert row.tolist() == [cell, cell, cell, cell, "2"]
    summary = summary_table(everything).loc["single task"]
    assert summary["overall accuracy"] == cell and summary["minutes"].startswith("6.0")  # 4 times 1.5
    assert summary["backward transfer"] == summary["forgetting"] == "not measured"
    fewer = [run for run in ALONE if run.tasks != ["yahoo"]]
    assert (grid_table([*RUNS, *fewer]).loc["single task", list(ORDERS)] == "not run").all()
    with pytest.raises(ValueError, match="two runs of single task on amazon"):
        grid_table([*everything, ALONE[0]])
    moved = ALONE[0].configuration | {"rows": {"amazon": "rows of the Hub"}}
    others = make("single task", "amazon", 1, configuration=moved)
    assert [run.seed for run in put_together([others, *ALONE[1:]], RUNS)] == [2, 2, 2]


def brute_force(differences, outer):
    means = []
    for size in range(1, len(differences) + 1):
        means += [np.mean(pick) for pick in itertools.combinations(differences, size)]
    means.sort()
    return means[outer - 1], means[-outer]


@pytest.mark.parametrize("n", [6, 7, 9])
def test_the_interval_is_that_of_all_subset_means(n):
    differences = np.random.default_rng(n).normal(size=n)
    outer = math.floor(0.025 * 2**n)
    assert typical_interval(differences) == pytest.approx(brute_force(differences, outer))


def test_too_few_or_too_many_pairs_have_no_interval():
    assert typical_interval([1.0] * 5) is None and typical_interval([]) is None
    assert typical_interval([2.0] * 6) == (2.0, 2.0)
    with pytest.raises(ValueError, match="17 pairs"):
        typical_interval([1.0] * 17)


def outcome(gains):
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return f"{better} better, {worse} worse, {len(gains) - better - worse} equal"


def test_pairs_share_order_and_seed():
    runs = [run for run in RUNS if (run.method, run.seed) != ("IncLoRA", 3)]
    row = paired_difference(runs, "IncLoRA + JumpLoRA", "IncLoRA")
    a, b = measured(runs, "IncLoRA + JumpLoRA"), measured(runs, "IncLoRA")
    differences = [a[key] - b[key] for key in sorted(b)]
    assert row["pairs"] == "6" and row["mean"] == f"{np.mean(differences):+.1f}"
    low, high = typical_interval(differences)
    assert row["95 % interval"] == f"{low:+.1f} to {high:+.1f}"
    assert row["outcome"] == outcome(differences)
    less = paired_difference(runs, "IncLoRA + JumpLoRA", "IncLoRA", measure="forgetting")
    c, d = measured(runs, "IncLoRA + JumpLoRA", "forgetting"), measured(runs, "IncLoRA", "forgetting")
    assert less["outcome"] == outcome([d[k] - c[k] for k in d])  # less is better
    assert paired_difference(runs, "IncLoRA", "IncLoRA")["outcome"] == "0 better, 0 worse, 6 equal"
    table = gate_table(runs)
    assert set(table["pairs"]) == {"6", "0"} and "not run" in set(table["mean"])


def test_a_win_is_clear_of_all_others_by_more_than_either_spread():
    cells = dict(
        clear=["60.0 ± 1.0", "63.0 ± 0.5", "50.0 ± 9.0"],
        within=["60.0 ± 4.0", "63.0 ± 0.5", "50.0 ± 9.0"],
        own=["60.0 ± 1.0", "63.0 ± 4.0", "50.0 ± 1.0"],
        third=["60.0 ± 1.0", "63.0 ± 0.5", "59.0 ± 6.0"],
        low=["-9.0 ± 0.1", "-5.0 ± 0.1", "not run"],
        single=["60.0 ± 1.0", "63.0", "50.0 ± 1.0"],
        alone=["60.0 ± 1.0", "not run", "not run"],
        edge=["60.0 ± 3.0", "63.0 ± 0.5", "50.0 ± 1.0"],
    )
    table = pd.DataFrame(cells, index=["A", "B", "C"])
    won = wins(table, dict(clear=1, within=1, own=1, third=1, low=-1, single=1, alone=1, edge=1))
    assert won.to_numpy().nonzero()[0].tolist() == [0, 1] and won.loc["B", "clear"] and won.loc["A", "low"]


def test_a_reference_is_never_a_win_and_takes_none_away():
    table = pd.DataFrame({"x": ["60.0 ± 1.0", "50.0 ± 1.0", "90.0 ± 0.1"]}, index=["A", "B", "single task"])
    assert wins(table, {"x": 1})["x"].tolist() == [True, False, False]


def test_two_records_in_one_place_are_refused():
    with pytest.raises(ValueError, match="two runs of IncLoRA on order1 with seed 1; keep one"):
        grid_table([*RUNS, RUNS[0]])
    other = make("IncLoRA", "order1", 9)
    other.configuration["train"]["kept"] = 0.5
    with pytest.raises(ValueError, match="differ in train; compare runs of one setting"):
        grid_table([*RUNS, other])
    with pytest.raises(ValueError, match="measure='accuracy'"):
        measured(RUNS, "ELLA", "accuracy")


def test_falls_are_from_the_best_score_and_leave_the_last_task_out():
    own = [run for run in RUNS if run.method == "ELLA"]
    found = {task: [] for task in ALL}
    for run in own:
        for j, task in enumerate(run.tasks[:3]):
            found[task].append(max(run.accuracy[j:, j]) - run.accuracy[3, j])
    assert forgotten_per_task(own) == pytest.approx({task: np.mean(values) for task, values in found.items()})


def test_the_budget_and_what_must_be_known_of_rows_are_said():
    noted = make("ELLA", "order1", 7, extra=dict(notes=dict(yahoo="a different sample")))
    text = budget_text([*RUNS, noted])
    assert "28 runs of a model" in text and "120 training rows and 50 test rows" in text
    assert "at most 128 tokens" in text and "yahoo: a different sample." in text
    assert budget_text([]) == "Not run."


def test_a_search_shows_every_try():
    tries = []
    for strength in (1e4, 1e5):
        run = make("ELLA", "order1", 1, split="dev")
        run.configuration["method"]["regularizer"]["strength"] = strength
        tries.append(run)
    gate = make("IncLoRA + JumpLoRA", "order1", 1, split="dev")
    gate.configuration["train"]["kept"] = 0.05
    muon = make("IncLoRA (Muon)", "order1", 1, split="dev")
    tried = ["λ = 10000.0", "λ = 100000.0", "learning rate = 0.001", "kept = 0.05"]
    assert search_table([gate, tries[1], muon, tries[0]])["tried"].tolist() == tried


def test_tables_are_written_in_three_forms_that_agree(tmp_path):
    tables = part_tables(RUNS)
    paths = write_tables(tables, tmp_path)
    assert sorted({path.suffix for path in paths}) == [".csv", ".html", ".md"] and len(paths) == 15
    back = pd.read_csv(tmp_path / "SC-summary.csv", index_col=0, dtype=str)
    assert back.equals(tables["SC-summary"])
    markdown = (tmp_path / "SC-summary.md").read_text()
    assert all(cell in markdown for cell in tables["SC-summary"].to_numpy().ravel())


def test_every_sequence_has_a_table_also_beside_the_orders():
    others = [make("IncLoRA", name, 1) for name in ("mine", "yours")]
    assert list(tables_of(others)) == ["mine", "yours"]
    assert list(tables_of(others[:1])) == ["comparison"]
    both = tables_of([*RUNS, *ALONE, others[0]])
    assert list(both)[0] == "mine" and both["SC-summary"].equals(tables_of([*RUNS, *ALONE])["SC-summary"])


BUDGET = ["backbone", "dtype", "scored_split", "weights", "max_length", "epochs", "learning_rate"]


@pytest.mark.parametrize("key", BUDGET)
def test_runs_of_two_budgets_are_not_put_into_one_table(key):
    other = make("N-LoRA", "order1", 4)
    if key == "backbone":
        other.backbone = "another"
    else:
        about = other.configuration
        (about["train"] if key in ("max_length", "epochs", "learning_rate") else about)[key] = "another"
    said = {"epochs": "settings"}.get(key, key)  # a setting that only one of them has
    with pytest.raises(ValueError, match=f"differs from other runs in {said}"):
        tables_of([*RUNS, other])


def test_a_gate_and_the_rate_of_another_optimizer_are_no_other_budget():
    gated, muon = make("N-LoRA + JumpLoRA", "order1", 4), make("IncLoRA (Muon)", "order1", 4)
    gated.configuration["train"] |= dict(kept=0.05, threshold_scope="block", learn_threshold=False)
    muon.configuration["train"]["learning_rate"] = 3e-3
    muon.configuration["method"]["optimizer"] = "muon"
    assert {"N-LoRA + JumpLoRA", "IncLoRA (Muon)"} <= set(grid_table([*RUNS, gated, muon]).index)


def test_rows_of_one_name_that_are_not_the_same_are_noticed():
    other = make("ELLA", "order1", 4)
    other.configuration["rows"]["yahoo"] = "a different sample"
    with pytest.raises(ValueError, match="differs from other runs in rows of yahoo"):
        tables_of([*RUNS, other])


def test_the_command_prints_and_writes_the_tables_of_several_orders(tmp_path, capsys):
    for run in [*RUNS, *ALONE]:
        run.save(tmp_path / "runs")
    assert (
        main(["table", str(tmp_path / "runs"), "--format", "markdown", "--out", str(tmp_path / "tables")])
        == 0
    )
    said = capsys.readouterr().out
    assert "SC-overall-accuracy" in said and (tmp_path / "tables" / "SC-gate.csv").exists()
    assert main(["table", str(tmp_path / "nothing")]) == 2


def test_lines_stand_in_pairs_and_the_title_says_what_the_gate_moves():
    axes = sequence_figure(RUNS).axes
    lines = {line.get_label(): line.get_ydata() for ax in axes for line in ax.lines}
    assert {label.rpartition(" (")[0] for label in lines} == set(METHODS)
    for ax in axes:  # a method with and without the gate share a panel
        names = [line.get_label().rpartition(" (")[0] for line in ax.lines]
        assert len({name.removesuffix(" + JumpLoRA") for name in names}) == 1 or "JumpLoRA" not in str(names)
    finals = {m: np.mean([run.average_accuracy for run in RUNS if run.method == m]) for m in METHODS}
    ends = {label.rpartition(" (")[0]: line[-1] for label, line in lines.items()}
    assert ends == pytest.approx(finals)
    moved = [finals[m] - finals[m.removesuffix(" + JumpLoRA")] for m in METHODS if "JumpLoRA" in m]
    assert f"by {min(moved):+.1f} to {max(moved):+.1f} points" in axes[0].figure.get_suptitle()


def test_lines_leave_out_a_seed_without_all_orders_as_the_table_does():
    low = make("IncLoRA", "order1", 9, accuracy=np.tril(np.ones((4, 4))))
    with_low, without = sequence_figure([*RUNS, low]), sequence_figure(RUNS)
    assert with_low.get_suptitle() == without.get_suptitle()
    ends = [figure.axes[0].lines[0].get_ydata()[-1] for figure in (with_low, without)]
    mean = np.mean(order_values(measured(RUNS, "IncLoRA"), tuple(ORDERS)))
    assert ends[0] == ends[1] == pytest.approx(mean)
    fewer = [run for run in RUNS if (run.method, run.seed) != ("IncLoRA", 3)]  # pairs share their seeds
    final = {(r.method, r.sequence, r.seed): r.average_accuracy for r in fewer}
    pairs = [(o, s) for m, o, s in final if m == "IncLoRA"]
    gain = np.mean([final["IncLoRA + JumpLoRA", o, s] - final["IncLoRA", o, s] for o, s in pairs])
    assert f"by {gain:+.1f} to" in sequence_figure(fewer).get_suptitle()


def test_lines_of_runs_that_share_no_order_or_seed_are_drawn_or_not_run():
    apart = [make("IncLoRA", "order1", 1), make("IncLoRA", "order2", 2)]  # no seed has both orders
    assert "not run" in sequence_figure(apart).axes[0].texts[0].get_text()
    seeds = [make("ELLA", "order1", 1), make("ELLA + JumpLoRA", "order1", 2)]
    assert "nowhere: no pairs" in sequence_figure(seeds).get_suptitle()


def test_forgetting_is_a_number_per_method_and_task():
    ax = forgetting_figure(RUNS).axes[0]
    rows, columns = [[label.get_text() for label in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis)]
    shown = dict(zip(((r, c) for r in rows for c in columns), (t.get_text() for t in ax.texts), strict=True))
    for method in METHODS:
        for task, lost in forgotten_per_task([run for run in RUNS if run.method == method]).items():
            assert shown[method, task] == f"{lost:.1f}"
    worst = max(shown.values(), key=float)
    assert f"by {float(worst):.0f} points" in ax.get_title("left")


@pytest.mark.parametrize("figure", [sequence_figure, forgetting_figure])
def test_figures_say_when_nothing_was_run(figure):
    empty = figure([])
    assert "not run" in empty.axes[0].texts[0].get_text()
    joint = make("multi-task", "order1", 1, accuracy=[[None] * 4] * 3 + [[50.0] * 4])
    assert joint.complete
    figure([*RUNS, joint])  # a bound without a diagonal is left out, and breaks nothing


def test_a_tie_looks_like_a_tie_beside_reported_numbers():
    scores = {"IncLoRA": 58.5, "ELLA": 58.3}
    runs = [make(m, o, 1, accuracy=np.full((4, 4), x)) for m, x in scores.items() for o in ORDERS]
    known = dict(metric="overall accuracy", model="T5-large", column="SC")
    reported = pd.DataFrame(
        [dict(method="IncLoRA", value=64.0) | known, dict(method="ELLA", value=80.0) | known]
    )
    figure = beside_figure(reported, runs)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    width, height = ax.get_window_extent().size
    per_point = width / np.ptp(ax.get_xlim()), height / np.ptp(ax.get_ylim())
    assert per_point[0] == pytest.approx(per_point[1])  # one point is as long on either axis
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([58.5, 58.3])
    assert ax.get_title("left").startswith("0 of 1 pairs")  # reported the other way round
