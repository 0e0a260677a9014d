"""Tables and figures: computed from records, never guessed, reported and measured apart."""

import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jumplora.command_line import main
from jumplora.conventions import METHOD_COLORS
from jumplora.data import benchmark
from jumplora.data.benchmark import DIFFERENT_SAMPLE
from jumplora.results.run_tables import (
    COMPARED,
    PARTS,
    accuracy_figure,
    best_cells,
    budget_text,
    by_method,
    comparison_table,
    first_task_figure,
    gate_table,
    grid_table,
    in_order,
    load_runs,
    markdown_table,
    measured,
    reported_results,
    reported_table,
    scored_on_test,
    summary_table,
    tables_of,
    told_apart,
    typical_interval,
    wins,
    write_tables,
)
from jumplora.storage.record import Run

ROOT = Path(__file__).resolve().parents[2]
REPORTED = ROOT / "results" / "reported.json"


def make(method="ELLA", final=(60.0, 70.0), seed=0, sequence="order1", backbone="google-t5/t5-large", **more):
    first, second = final
    run = Run(method, backbone, sequence, seed, ["a", "b"], [80, 80], {}, [[80, None], [first, second]])
    for key, value in more.items():
        setattr(run, key, value)
    return run


# ---------------------------------------------------------------- loading


def test_all_records_below_a_folder_are_loaded_and_a_damaged_one_is_named(tmp_path):
    make().save(tmp_path / "laptop")
    make(seed=1).save(tmp_path / "cluster" / "deep")
    bad = make(seed=2).save(tmp_path)
    bad.write_text("{")
    with pytest.warns(UserWarning, match="seed2.*not readable as JSON") as caught:
        runs = load_runs(tmp_path)
    assert len(caught) == 1 and sorted(run.seed for run in runs) == [0, 1]


def test_a_folder_that_is_not_there_holds_no_runs(tmp_path):
    assert load_runs(tmp_path / "nowhere") == []


def test_a_record_that_was_set_aside_is_not_loaded(tmp_path):
    from jumplora.storage.record import set_aside

    set_aside(make().save(tmp_path))
    assert load_runs(tmp_path) == []


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    "other, key",
    [
        (make(method="IncLoRA", sequence="order2"), "sequence"),
        (make(method="IncLoRA", backbone="smollm2-135m"), "backbone"),
        (make(method="IncLoRA", tasks=["b", "a"]), "tasks"),
        (make(method="IncLoRA", test_rows=[80, 81]), "test_rows"),
        (make(method="IncLoRA", configuration={"train": {"rank": 4}}), "train.rank: 4 / absent"),
        (make(method="IncLoRA", configuration={"scored_split": "dev"}), "scored_split"),
    ],
)
def test_runs_that_learned_different_things_do_not_share_a_table(other, key):
    with pytest.raises(ValueError, match=f"differ in {key}"):
        comparison_table([make(), other])


def test_one_seed_may_count_only_once():
    twin = make(configuration={"method": {"lambda": 2}})
    with pytest.raises(ValueError, match="two runs with one seed"):
        by_method([make(), twin])


def test_runs_on_other_devices_and_with_other_method_settings_may_be_compared():
    gpu = make("IncLoRA", seed=1, configuration={"device": "cuda", "method": {"name": "IncLoRA"}, "seed": 1})
    assert list(by_method([make(), gpu])) == ["IncLoRA", "ELLA"]


def test_runs_scored_on_dev_rows_are_no_results():
    dev, test = make(configuration={"scored_split": "dev"}), make(configuration={"scored_split": "test"})
    kept = scored_on_test([dev, test, make(seed=5)])
    assert kept[0] is test and [run.seed for run in kept] == [0, 5]


def test_rows_follow_the_order_of_the_colours_and_unknown_methods_come_last():
    names = ["zzz", "my method", *reversed(METHOD_COLORS)]
    assert in_order(names) == [*METHOD_COLORS, "my method", "zzz"]


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds():
    runs = [make(final=(60, 70)), make(final=(64, 72), seed=1), make(final=(50, 75), seed=2)]
    scores = np.array([65.0, 68.0, 62.5])
    deviation = np.sqrt(((scores - scores.mean()) ** 2).sum() / 2)
    row = comparison_table(runs).loc["ELLA"]
    assert row["overall accuracy"] == f"{scores.mean():.1f} ± {deviation:.1f}"
    assert row["backward transfer"] == "-22.0 ± 7.2"
    assert row["seeds"] == "3"


def test_a_missing_method_is_not_run_and_a_missing_number_not_measured():
    table = comparison_table([make()], methods=COMPARED)
    assert list(table.index) == list(COMPARED)
    assert set(table.loc["IncLoRA"].drop("seeds")) == {"not run"} and table.loc["IncLoRA", "seeds"] == "0"
    assert table.loc["ELLA", "sparsity %"] == "not measured"
    assert table.loc["ELLA", "option accuracy"] == "not measured"


def test_an_unfinished_run_has_no_numbers():
    half = make(accuracy=np.array([[80, np.nan], [np.nan, np.nan]]))
    row = comparison_table([half]).loc["ELLA"]
    assert row["overall accuracy"] == "1 of 2 tasks" and row["seeds"] == "0"
    assert set(row.drop(["seeds", "overall accuracy"])) == {"unfinished"}


def test_an_unfinished_run_does_not_change_the_mean_of_finished_ones():
    half = make(seed=1, accuracy=np.array([[10, np.nan], [np.nan, np.nan]]))
    assert comparison_table([make(), half]).equals(comparison_table([make()]))


def test_no_runs_give_a_table_of_not_run():
    assert (comparison_table([], methods=COMPARED).drop(columns="seeds") == "not run").all().all()


def test_a_seed_whose_number_is_missing_spoils_the_mean():
    with_time, without = make(seconds={"train": [60]}), make(seed=1, seconds={"train": [None]})
    assert comparison_table([with_time, without]).loc["ELLA", "minutes"] == "not measured"


def test_the_best_of_each_column_is_found_with_ties_and_signs():
    runs = [make("IncLoRA", (50, 70)), make("ELLA", (60, 70)), make("ELLA + JumpLoRA", (60, 60))]
    best = best_cells(comparison_table(runs, methods=["SeqLoRA"]))
    assert best["overall accuracy"].tolist() == [False, False, True, False]
    assert best["backward transfer"].tolist() == [False, False, True, True]
    assert best["forgetting"].tolist() == [False, False, True, True]
    assert not best[["sparsity %", "minutes", "seeds", "option accuracy"]].any().any()


def test_a_single_measured_method_is_best_of_nothing():
    assert not best_cells(comparison_table([make()], methods=COMPARED)).any().any()


def test_negative_backward_transfer_prints_no_minus_zero():
    row = comparison_table([make(final=(80.0, 70.0)), make(final=(80.0 - 1e-9, 70.0), seed=1)]).loc["ELLA"]
    assert row["backward transfer"] == "0.0 ± 0.0"


def test_the_interval_note_counts_the_pairs_that_can_be_told_apart():
    far = [make("IncLoRA", (10, 10)), make("ELLA", (90, 90)), make("SeqLoRA", (12, 9))]
    note = told_apart(by_method(far))
    assert "The intervals overlap for 1 of 3 pairs of methods" in note
    assert "ELLA over SeqLoRA, ELLA over IncLoRA" in note or "ELLA over IncLoRA, ELLA over SeqLoRA" in note
    half = make("IncLoRA", accuracy=np.array([[80, np.nan], [np.nan, np.nan]]))
    for few in ([], far[:1], [far[1], half]):  # an unfinished run does not count
        assert "nothing to compare" in told_apart(by_method(few))


# ---------------------------------------------------------------- Markdown


def test_a_markdown_table_has_one_line_per_row_and_escapes_bars():
    table = pd.DataFrame({"x": ["1.0", "a|b"], "y": ["no", "yes"]}, index=pd.Index(["r1", "r2"], name="row"))
    lines = markdown_table(table, pd.DataFrame({"x": [True, False], "y": [False, False]}, index=table.index))
    assert lines.splitlines() == [
        "| row | x | y |", "| --- | ---: | --- |", "| r1 | **1.0** | no |", "| r2 | a\\|b | yes |"
    ]  # fmt: skip


def test_a_markdown_table_becomes_a_table_on_a_page():
    from markdown_it import MarkdownIt

    table = comparison_table([make()], methods=COMPARED)
    html = MarkdownIt("commonmark").enable("table").render(markdown_table(table))
    assert html.count("<tr>") == 1 + len(COMPARED) and html.count("</th>") == 1 + len(table.columns)


# ---------------------------------------------------------------- reported beside measured


def test_the_published_file_holds_what_is_read_from_it():
    table, text = reported_results(REPORTED), json.loads(REPORTED.read_text())
    known = table[table["value"].notna()]
    values = [value for part in ("rows", "other_models") for entry in text[part] for value in entry["values"]]
    wanted = sum(value is not None for value in values)
    wanted += sum(name in entry for entry in text["backward_transfer"] for name in text["columns"])
    assert len(known) == wanted
    assert (known["source"] != "").all() and known["certainty"].isin(["A", "B", "C"]).all()
    olora = table[(table["method"] == "O-LoRA") & (table["column"] == "SC") & (table["note"] == 1)]
    assert olora["value"].tolist() == [75.8] and olora["certainty"].tolist() == ["A"]


def test_published_averages_are_the_means_of_their_orders_but_for_one_misprint_in_the_source():
    table, apart = reported_results(REPORTED), set()
    table = table[table["metric"] == "overall accuracy"]
    for (method, _, _), group in table.groupby(["method", "model", "source"]):
        values = group.set_index("column")["value"]
        for average, orders in PARTS.items():
            if values[[average, *orders]].notna().all():
                if abs(values[average] - values[list(orders)].mean()) > 0.1:
                    apart.add((method, average))
    assert apart == {("L2P", "SC")}


def test_reported_and_measured_never_share_a_column():
    runs = [make("ELLA", (81.5, 82.5), sequence=order) for order in ("order1", "order2", "order3")]
    table = reported_table(reported_results(REPORTED), runs)
    assert all(name.startswith(("reported", "measured")) or name == "source" for name in table.columns)
    row = table.loc["ELLA"]
    assert row["reported SC"] == "79.9" and row["measured SC"] == "82.0" and row["source"] == "[3] B"
    assert row["reported order1"] == "not reported" and row["measured order1"] == "82.0"
    assert table.loc["ELLA + JumpLoRA", "reported SC"] == "not reported"
    assert table.loc["ELLA + JumpLoRA", "measured SC"] == "not run"
    assert "82.0" not in table.filter(like="reported").to_numpy()


def test_each_source_is_a_row_and_the_measured_cells_stand_in_the_first():
    table = reported_table(reported_results(REPORTED), [])
    rows = table.loc["IncLoRA"]
    assert rows["reported SC"].tolist() == ["66.4", "63.6", "68.8"] and rows["source"].is_unique
    assert rows["measured SC"].tolist() == ["not run", "″", "″"]


def test_an_average_needs_all_its_orders_and_the_right_backbone():
    two = [make(sequence=order) for order in ("order1", "order2")]
    row = reported_table(reported_results(REPORTED), two).loc["ELLA"]
    assert (row["measured order1"], row["measured SC"]) == ("65.0", "not run")
    other = [make(sequence=order, backbone="smollm2-135m") for order in ("order1", "order2", "order3")]
    table = reported_table(reported_results(REPORTED), other)
    assert set(table.loc["ELLA"][["measured order1", "measured SC"]]) == {"not run"}


def test_backward_transfer_keeps_the_digits_of_its_source():
    table = reported_table(reported_results(REPORTED), [], ("SC", "order1"), metric="backward transfer")
    assert table.loc["ELLA + JumpLoRA", "reported SC"] == "-1.9"
    assert table.loc["IncLoRA", "reported order1"] == "-14.55"


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric='accuracy' is not known"):
        reported_table(reported_results(REPORTED), [], metric="accuracy")


# ---------------------------------------------------------------- figures


def test_the_matrix_figure_has_one_panel_per_method_with_its_numbers():
    figure = accuracy_figure([make("SeqLoRA", (12, 34)), make("ELLA", (56, 78))])
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert list(panels) == ["SeqLoRA", "ELLA"]
    assert sorted(text.get_text() for text in panels["SeqLoRA"].texts) == ["12", "34", "80"]


def test_the_first_task_figure_draws_each_method_with_its_interval():
    ax = first_task_figure([make("SeqLoRA", (12, 34)), make("ELLA", (56, 78))]).axes[0]
    assert [line.get_label() for line in ax.lines] == ["SeqLoRA", "ELLA"]
    assert ax.lines[0].get_ydata().tolist() == [80, 12] and len(ax.collections) == 2
    assert "12 % (SeqLoRA) and 56 % (ELLA)" in ax.get_title(loc="left")
    low, high = ax.collections[0].get_paths()[0].vertices[:, 1].min(), 12
    assert 0 < low < high


def test_runs_of_one_method_with_two_strengths_are_no_seeds_of_one_another():
    weak, strong = make("ELLA"), make("ELLA", seed=1)
    for run, strength in ((weak, 1.0), (strong, 1e9)):
        run.configuration["method"] = dict(regularizer=dict(strength=strength))
    with pytest.raises(ValueError, match="the runs of ELLA differ in its settings"):
        comparison_table([weak, strong])


def test_figures_of_several_seeds_show_their_mean():
    ax = first_task_figure([make(), make(seed=1, final=(50, 70))]).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [80, 55]


@pytest.mark.parametrize("figure", [accuracy_figure, first_task_figure])
def test_a_figure_without_records_says_how_to_make_them(figure):
    words = [text.get_text() for ax in figure([]).axes for text in ax.texts]
    assert words == ["not run: make run makes the records"]


def test_a_figure_of_an_unfinished_run_is_drawn_without_warnings():
    half = make(accuracy=np.array([[80, np.nan], [np.nan, np.nan]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (accuracy_figure([half]), first_task_figure([half, make("IncLoRA")])):
            figure.canvas.draw()


# ---------------------------------------------------------------- the records of this repository


def test_the_records_of_this_repository_are_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = load_runs(ROOT / "results")
    for run in runs:
        assert run.environment["versions"]["torch"] and 0 < run.finished <= len(run.tasks)


# ---------------------------------------------------------------- several orders and seeds

ORDERS = {
    "order1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "order2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "order3": ["yahoo", "amazon", "agnews", "dbpedia"],
}
ALL = ["amazon", "agnews", "dbpedia", "yahoo"]


def make_order(method, order, seed, rng=None, split="test", **changes):
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
RUNS = [make_order(*where) for where in itertools.product(METHODS, ORDERS, (1, 2, 3))]
ALONE = [make_order("single task", task, seed) for task in ALL for seed in (1, 2)]


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
    table = grid_table(runs, methods=["SeqLoRA", "ELLA"])
    assert (table.loc["ELLA", "seeds"], table.loc["SeqLoRA", "SC"]) == ("2", "not run")
    assert list(table.index[:2]) == ["SeqLoRA", "IncLoRA"]  # the order of every table
    unfinished = make_order("ELLA", "order1", 9, accuracy=np.full((4, 4), np.nan))
    assert grid_table([*RUNS, unfinished]).equals(grid_table(RUNS))


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


def test_forward_transfer_subtracts_the_scores_of_tasks_learned_alone():
    own = [run for run in RUNS if run.method == "ELLA"]
    found = measured([*RUNS, *ALONE], "ELLA", "forward transfer")
    for run in own:
        scratch = [np.mean([o.accuracy[0, 0] for o in ALONE if o.tasks == [task]]) for task in run.tasks]
        assert found[run.sequence, run.seed] == pytest.approx(np.mean(run.accuracy[3] - np.array(scratch)))
    per_seed = [np.mean([found[order, seed] for order in ORDERS]) for seed in (1, 2, 3)]
    summary = summary_table([*RUNS, *ALONE]).loc["ELLA"]
    assert summary["forward transfer"] == f"{np.mean(per_seed):.1f} ± {np.std(per_seed, ddof=1):.1f}"
    assert summary["runs"] == "9 of 9"
    fewer = [run for run in ALONE if run.tasks != ["yahoo"]]  # a task was never learned alone
    assert summary_table([*RUNS, *fewer]).loc["ELLA", "forward transfer"] == "not measured"


def test_forward_transfer_needs_equal_training_but_for_the_rate_of_another_optimizer():
    muon = make_order("IncLoRA (Muon)", "order1", 1)
    muon.configuration["train"]["learning_rate"] = 3e-3
    muon.configuration["method"]["optimizer"] = "muon"
    assert not math.isnan(measured([muon, *ALONE], muon.method, "forward transfer")["order1", 1])
    muon.configuration["train"]["kept"] = 0.5  # a setting of the method, not of the budget
    assert math.isnan(measured([muon, *ALONE], muon.method, "forward transfer")["order1", 1])


def test_runs_that_hold_the_rows_they_had_right_are_assembled_too():
    bits = {task: {task: dict(exact_match="80", option_accuracy="80")} for task in ALL}  # one row, right
    scores = dict(accuracy=[[100.0]], option_accuracy=[[100.0]])
    alone = [make_order("single task", task, 1, **scores) for task in ALL]
    for run in alone:
        run.test_rows, run.right = [1], {run.tasks[0]: bits[run.tasks[0]]}
    assert set(measured([*RUNS, *alone], "single task").values()) == {100.0}


def outcome(gains):
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return f"{better} better, {worse} worse, {len(gains) - better - worse} equal"


def test_pairs_share_order_and_seed():
    runs = [run for run in RUNS if (run.method, run.seed) != ("IncLoRA", 3)]
    table = gate_table(runs, measures=("overall accuracy", "forgetting")).loc["IncLoRA + JumpLoRA − IncLoRA"]
    for (_, row), sign in zip(table.iterrows(), (1, -1), strict=True):  # less forgetting is better
        gated, base = (measured(runs, m, row["measure"]) for m in ("IncLoRA + JumpLoRA", "IncLoRA"))
        differences = [gated[key] - base[key] for key in base]
        assert row["pairs"] == "6" and row["mean"] == f"{np.mean(differences):+.1f}"
        low, high = typical_interval(differences)
        assert row["95 % interval"] == f"{low:+.1f} to {high:+.1f}"
        assert row["outcome"] == outcome([sign * d for d in differences])
    everything = gate_table(runs)
    assert set(everything["pairs"]) == {"6", "0"} and "not run" in set(everything["mean"])


def test_few_or_many_pairs_have_a_mean_and_no_interval():
    many = [make_order(m, o, seed) for m in METHODS[:2] for o in ORDERS for seed in range(6)]
    for runs, pairs, words in (
        (many, "18", "too many pairs"),
        (many[:3] + many[18:21], "3", "too few pairs"),
    ):
        row = gate_table(runs).iloc[0]
        assert (row["pairs"], row["95 % interval"]) == (pairs, words) and row["mean"] != "not run"
    same = [make_order(m, "order1", s, accuracy=np.full((4, 4), 50.0)) for m in METHODS[:2] for s in range(6)]
    assert gate_table(same).iloc[0]["outcome"] == "0 better, 0 worse, 6 equal"


def test_an_unknown_part_is_refused():
    for table in (grid_table, summary_table, gate_table):
        with pytest.raises(ValueError, match="part='XL' is not known"):
            table(RUNS, "XL")


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
    other = make_order("IncLoRA", "order1", 9)
    other.configuration["train"]["kept"] = 0.5
    with pytest.raises(ValueError, match="differ in train; compare runs of one setting"):
        grid_table([*RUNS, other])
    with pytest.raises(ValueError, match="measure='accuracy'"):
        measured(RUNS, "ELLA", "accuracy")


def test_the_budget_and_what_must_be_known_of_rows_are_said():
    noted = make_order("ELLA", "order1", 7, extra=dict(notes=dict(yahoo="a different sample")))
    text = budget_text([*RUNS, noted])
    assert "28 runs of a model" in text and "120 training rows and 50 test rows" in text
    assert "at most 128 tokens" in text and "yahoo: a different sample." in text
    assert budget_text([]) == "Not run."


def test_tables_are_written_in_three_forms_that_agree(tmp_path):
    tables = tables_of(RUNS)
    paths = write_tables(tables, tmp_path)
    assert sorted({path.suffix for path in paths}) == [".csv", ".html", ".md"] and len(paths) == 15
    back = pd.read_csv(tmp_path / "SC-summary.csv", index_col=0, dtype=str)
    assert back.equals(tables["SC-summary"])
    markdown = (tmp_path / "SC-summary.md").read_text()
    assert all(cell in markdown for cell in tables["SC-summary"].to_numpy().ravel())


def test_every_sequence_has_a_table_also_beside_the_orders():
    others = [make_order("IncLoRA", name, 1) for name in ("mine", "yours")]
    assert list(tables_of(others)) == ["mine", "yours"]
    assert list(tables_of(others[:1])) == ["comparison"]
    both = tables_of([*RUNS, *ALONE, others[0]])
    assert list(both)[0] == "mine" and both["SC-summary"].equals(tables_of([*RUNS, *ALONE])["SC-summary"])


BUDGET = ["backbone", "dtype", "scored_split", "weights", "max_length", "epochs", "learning_rate"]


@pytest.mark.parametrize("key", BUDGET)
def test_runs_of_two_budgets_are_not_put_into_one_table(key):
    other = make_order("N-LoRA", "order1", 4)
    if key == "backbone":
        other.backbone = "another"
    else:
        about = other.configuration
        (about["train"] if key in ("max_length", "epochs", "learning_rate") else about)[key] = "another"
    said = {"epochs": "settings"}.get(key, key)  # a setting that only one of them has
    with pytest.raises(ValueError, match=f"differs from other runs in {said}"):
        tables_of([*RUNS, other])


def test_a_gate_and_the_rate_of_another_optimizer_are_no_other_budget():
    gated, muon = make_order("N-LoRA + JumpLoRA", "order1", 4), make_order("IncLoRA (Muon)", "order1", 4)
    gated.configuration["train"] |= dict(kept=0.05, threshold_scope="block", learn_threshold=False)
    muon.configuration["train"]["learning_rate"] = 3e-3
    muon.configuration["method"]["optimizer"] = "muon"
    assert {"N-LoRA + JumpLoRA", "IncLoRA (Muon)"} <= set(grid_table([*RUNS, gated, muon]).index)


def test_rows_of_one_name_that_are_not_the_same_are_noticed():
    other = make_order("ELLA", "order1", 4)
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


# ---------------------------------------------------------------- rows from the Hub


def hub_run(method="ELLA", sequence="order1-hub", seed=1, rows="these", model="a model") -> Run:
    tail = "-hub" if sequence.endswith("-hub") else ""
    tasks = [f"{name}{tail}" for name in benchmark.ORDERS[int(sequence[5])]]
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


HUB_PAIR, HUB_ORDERS = ("ELLA", "ELLA + JumpLoRA"), ("order1-hub", "order2-hub", "order3-hub")
HUB_RUNS = [hub_run(*asked) for asked in itertools.product(HUB_PAIR, HUB_ORDERS, (1, 2))]


def test_tables_in_every_form_and_figures_say_that_rows_are_a_different_sample(tmp_path, capsys):
    labelled = f"method ({DIFFERENT_SAMPLE})"
    assert comparison_table([hub_run()]).index.name == labelled
    for table in (grid_table(HUB_RUNS, "SC-hub"), summary_table(HUB_RUNS, "SC-hub")):
        assert table.index.name == labelled
    assert gate_table(HUB_RUNS, "SC-hub").index.name == f"compared ({DIFFERENT_SAMPLE})"
    assert list(grid_table(HUB_RUNS, "SC-hub").columns) == [*HUB_ORDERS, "SC-hub", "seeds"]
    for figure in (accuracy_figure([hub_run()]), first_task_figure([hub_run()])):
        shown = [*figure.texts, *(text for ax in figure.axes for text in (ax.title, ax._left_title))]
        assert DIFFERENT_SAMPLE in " ".join([figure.get_suptitle(), *(text.get_text() for text in shown)])
    assert f"agnews-hub: {DIFFERENT_SAMPLE}" in budget_text(HUB_RUNS)
    for run in HUB_RUNS:
        run.save(tmp_path / "runs")
    for form in ("text", "markdown", "csv", "html"):
        flags = ["--format", form, "--out", str(tmp_path / "tables")]
        assert main(["table", str(tmp_path / "runs"), *flags]) == 0
        assert DIFFERENT_SAMPLE in capsys.readouterr().out
    files = list((tmp_path / "tables").iterdir())
    assert len(files) == 15 and all("SC-hub" in f.name and DIFFERENT_SAMPLE in f.read_text() for f in files)


def test_rows_of_the_paper_and_of_the_hub_stand_in_no_common_table(tmp_path):
    paper, hub = hub_run("IncLoRA", "order1"), hub_run("ELLA", "order1-hub")
    with pytest.raises(ValueError, match="differ in sequence: order1 / order1-hub"):
        by_method([paper, hub])
    tables = tables_of([paper, hub])
    assert "not run" in tables["SC-overall-accuracy"].loc["ELLA", "order1"]
    assert "not run" in tables["SC-hub-overall-accuracy"].loc["IncLoRA", "order1-hub"]
    assert tables["SC-summary"].index.name == "method"
    with pytest.raises(ValueError, match="differs from other runs in rows of"):
        measured([hub_run("IncLoRA", rows="these"), hub_run("ELLA", rows="those")], "ELLA")
    reported = reported_results(ROOT / "results" / "reported.json")
    beside = reported_table(reported, [hub_run(model="google-t5/t5-large")])
    assert set(beside["measured order1"]) <= {"not run", "″"}
