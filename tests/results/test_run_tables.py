"""Tables and figures: computed from records, never guessed, reported and measured apart."""

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from jumplora.command_line import main
from jumplora.conventions import METHOD_COLORS
from jumplora.data import benchmark
from jumplora.data.benchmark import DIFFERENT_SAMPLE
from jumplora.results.run_tables import (
    COMPARED,
    PARTS,
    accuracy_figure,
    budget_text,
    clear_best,
    grid_table,
    holm,
    learned_figure,
    load_runs,
    markdown_table,
    measured,
    paired_t,
    paired_table,
    summary_table,
    tables_of,
    write_tables,
)
from jumplora.storage.record import Run, set_aside

ROOT = Path(__file__).resolve().parents[2]
HALF = np.array([[80, np.nan], [np.nan, np.nan]])  # the second task is not learned yet


def make(method="ELLA", final=(60.0, 70.0), seed=0, sequence="order1", backbone="google-t5/t5-large", **more):
    "A run of two tasks, with these scores at its end."
    run = Run(method, backbone, sequence, seed, ["a", "b"], [80, 80], {}, [[80, None], final])
    return replace(run, **more)


def make_order(method="ELLA", order="order1", seed=1, **changes):
    "A run of one of the benchmark's orders, or of one task, with random scores."
    rng = np.random.default_rng([seed, *map(ord, method + order)])
    hub = "-hub" if order.endswith("-hub") else ""
    tasks = [f"{task}{hub}" for task in benchmark.ORDERS[int(order[5])]] if order[:5] == "order" else [order]
    size = len(tasks)
    configuration = dict(
        method=dict(regularizer=dict(name=method)),
        train=dict(max_length=128, kept=None, learning_rate=1e-3),
        rows={task: f"rows of {task}" for task in tasks},
        counts=dict.fromkeys(tasks, [120, 40, 50]),
        scored_split="test",
    )
    scores = np.where(np.tri(size, dtype=bool), rng.uniform(0, 100, (size, size)), np.nan)
    run = Run(method, "a model", order, seed, tasks, [50] * size, configuration, scores)
    run.seconds = dict(train=[60.0], evaluate=[30.0])
    run.extra = dict(notes=dict.fromkeys(tasks, f"{DIFFERENT_SAMPLE}: drawn from x")) if hub else {}
    return replace(run, **changes)


METHODS, ORDERS = ("IncLoRA", "IncLoRA + JumpLoRA", "ELLA"), PARTS["SC"]
ALL = ["amazon", "agnews", "dbpedia", "yahoo"]
RUNS = [make_order(*where) for where in itertools.product(METHODS, ORDERS, (1, 2, 3))]
ALONE = [make_order("single task", task, seed) for task in ALL for seed in (1, 2)]
HUB_ORDERS = tuple(f"{order}-hub" for order in ORDERS)
HUB_RUNS = [make_order(*where) for where in itertools.product(METHODS[1:], HUB_ORDERS, (1, 2))]


def cell(values):
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


# ---------------------------------------------------------------- loading


def test_all_records_below_a_folder_are_loaded_and_a_damaged_one_is_named(tmp_path):
    make().save(tmp_path / "laptop")
    make(seed=1).save(tmp_path / "cluster" / "deep")
    make(seed=2).save(tmp_path).write_text("{")
    set_aside(make(seed=3).save(tmp_path))
    with pytest.warns(UserWarning, match="seed2.*not a run record") as caught:
        runs = load_runs(tmp_path)
    assert len(caught) == 1 and sorted(run.seed for run in runs) == [0, 1]
    assert load_runs(tmp_path / "nowhere") == []


def test_runs_scored_on_dev_rows_are_no_results(tmp_path):
    for seed, configuration in enumerate(({"scored_split": "dev"}, {"scored_split": "test"}, {})):
        make(seed=seed, configuration=configuration).save(tmp_path)
    for split, seeds in ((None, {0, 1, 2}), ("test", {1, 2}), ("dev", {0})):
        assert {run.seed for run in load_runs(tmp_path, split)} == seeds
    with pytest.raises(ValueError, match="split='tset' is not known.*did you mean 'test'"):
        load_runs(tmp_path, "tset")


def test_the_records_of_this_repository_are_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = load_runs(ROOT / "results")
    assert len(runs) > 200
    for run in runs:
        assert run.environment["versions"]["torch"] and 0 < run.finished <= len(run.tasks)


# ---------------------------------------------------------------- one sequence


@pytest.mark.parametrize(
    "other, message",
    [
        (make("IncLoRA", backbone="smollm2-135m"), "differ in backbone"),
        (make("IncLoRA", tasks=["b", "a"]), "differ in tasks of order1"),
        (make("IncLoRA", test_rows=[80, 81]), "differ in test_rows of order1"),
        (make("IncLoRA", configuration={"train": {"rank": 4}}), "differ in rank: absent / 4"),
        (make("IncLoRA", configuration={"scored_split": "dev"}), "differ in scored_split: test / dev"),
        (make(), "two runs of ELLA on order1 with seed 0; keep one"),
        (
            make(seed=1, configuration={"method": {"lambda": 2}}),
            "differ in method.lambda of ELLA: absent / 2; a table",
        ),
        (
            make(seed=1, configuration={"train": {"kept": 0.1}}),
            "seed1.* differ in train.kept of ELLA: absent / 0.1",
        ),
    ],
)
def test_runs_that_learned_different_things_do_not_share_a_table(other, message):
    with pytest.raises(ValueError, match=message):
        summary_table([make(), other], "order1")
    texts = [make(seed=seed, configuration={"neutral": name}) for seed, name in enumerate("ab")]
    with pytest.raises(ValueError, match="differ in neutral: a / b"):
        summary_table([make(seed=2), *texts], "order1")


def test_rows_follow_the_order_of_the_colours_whatever_the_device_and_the_settings_of_a_method():
    gpu = dict(device="cuda", method=dict(name="another"), seed=1)
    runs = [make(name, seed=1, configuration=gpu) for name in ("zzz", "my method", *reversed(METHOD_COLORS))]
    assert list(grid_table([make(), *runs[:2]]).index) == ["ELLA", "my method", "zzz"]
    assert list(grid_table(runs).index) == [*METHOD_COLORS, "my method", "zzz"]


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds():
    runs = [make(final=(60, 70)), make(final=(64, 72), seed=1), make(final=(50, 75), seed=2)]
    row = summary_table(runs, "order1").loc["ELLA"]
    assert row["overall accuracy"] == cell([65.0, 68.0, 62.5])
    assert row["backward transfer"] == "-22.0 ± 7.2" and row["runs"] == "3"
    assert row["retention"] == cell([60, 64, 50]) and row["running average"] == cell([72.5, 74, 71.25])
    even = summary_table([make(final=(80.0, 70.0)), make(final=(80.0 - 1e-9, 70.0), seed=1)], "order1")
    assert even.loc["ELLA", "backward transfer"] == "0.0 ± 0.0"  # no minus zero


def test_a_missing_number_is_not_run_or_unfinished_or_not_measured():
    def table(*runs, methods=None):
        return summary_table(runs, "order1", methods)

    assert (table(methods=COMPARED).drop(columns="runs") == "not run").all().all()
    some = table(make(), make("IncLoRA", accuracy=HALF), methods=COMPARED)
    assert list(some.index) == list(COMPARED)
    assert some.loc["SeqLoRA"].unique().tolist() == ["not run", "0"]
    assert some.loc["IncLoRA"].unique().tolist() == ["unfinished", "0"]
    assert some.loc["ELLA", "sparsity %"] == "not measured"
    with_time, without = make(seconds={"train": [60]}), make(seed=1, seconds={"train": [None]})
    assert table(with_time).loc["ELLA", "minutes"] == "1.0"
    assert table(with_time, without).loc["ELLA", "minutes"] == "not measured"
    assert table(make(), make(seed=1, accuracy=HALF)).equals(table(make()))


def test_a_markdown_table_has_one_line_per_row_and_escapes_bars():
    table = pd.DataFrame({"x": ["1.0", "a|b"], "y": ["no", "yes"]}, index=pd.Index(["r1", "r2"], name="row"))
    text = markdown_table(table, pd.DataFrame({"x": [True, False], "y": [False, False]}, index=table.index))
    assert text.splitlines() == [
        "| row | x | y |", "| --- | ---: | --- |", "| r1 | **1.0** | no |", "| r2 | a\\|b | yes |"
    ]  # fmt: skip
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<tr>") == 3 and html.count("</th>") == 3
    assert markdown_table(table, index=False).startswith("| x | y |")


# ---------------------------------------------------------------- figures


def test_the_figure_of_learning_states_its_differences_and_leaves_unfinished_runs_out():
    runs = [make("SeqLoRA", (60, 70)), make("ELLA", (66, 90))]
    (axis,) = learned_figure([*runs, make("IncLoRA", (60, None))]).axes
    assert axis.get_title("left").startswith(
        "Methods differ by 10 points in learning, 6 in retention\n(order1, "
    )
    assert len(axis.get_legend().texts) == 2
    (alone,) = learned_figure(runs[:1]).axes
    assert alone.get_title("left").startswith("order1, ")


def test_the_matrix_figure_has_one_panel_per_method_with_its_numbers():
    figure = accuracy_figure([make("SeqLoRA", (12, 34)), make("ELLA", (56, 78))])
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert list(panels) == ["SeqLoRA", "ELLA"]
    places = {text.get_text(): text.get_position() for text in panels["SeqLoRA"].texts}
    assert places == {"80": (0, 0), "12": (0, 1), "34": (1, 1)}  # column, row
    image = panels["SeqLoRA"].images[0].get_array()
    assert (image[1, 0], image[1, 1]) == (12, 34)


def test_forgetting_is_better_the_less_there_is():
    ends = {"IncLoRA": (20, 1), "ELLA": (70, 2)}
    runs = [
        make(name, (end + step * seed, 70), seed) for name, (end, step) in ends.items() for seed in range(4)
    ]
    table = pd.DataFrame(index=list(ends), columns=["forgetting", "backward transfer"])
    assert clear_best(runs, table, "order1").to_numpy().tolist() == [[False] * 2, [True] * 2]


def test_unfinished_runs_are_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runs in ([make(accuracy=HALF)], [make(accuracy=HALF), make("IncLoRA")]):
            accuracy_figure(runs).canvas.draw()


# ---------------------------------------------------------------- several orders and seeds


def test_cells_are_means_over_seeds_with_their_standard_deviation():
    table = grid_table(RUNS, "SC", "backward transfer")
    for method in METHODS:
        own = {(run.sequence, run.seed): run.accuracy for run in RUNS if run.method == method}
        values = {where: np.mean([a[3, j] - a[j, j] for j in range(3)]) for where, a in own.items()}
        parts = [np.mean([values[order, seed] for order in ORDERS]) for seed in (1, 2, 3)]
        cells = [cell([values[order, seed] for seed in (1, 2, 3)]) for order in ORDERS]
        assert table.loc[method].tolist() == [*cells, cell(parts), "9"]


def test_a_seed_without_all_orders_does_not_count_in_the_mean_of_orders():
    runs = [run for run in RUNS if (run.sequence, run.seed) != ("order3", 2)]
    table = grid_table(runs, methods=["SeqLoRA", "ELLA"])
    assert (table.loc["ELLA", "runs"], table.loc["SeqLoRA", "SC"]) == ("8", "not run")
    means = [
        np.mean([run.average_accuracy for run in runs if (run.method, run.seed) == ("ELLA", s)])
        for s in (1, 3)
    ]
    assert table.loc["ELLA", "SC"] == cell(means)
    assert list(table.index[:2]) == ["SeqLoRA", "IncLoRA"]  # the order of every table
    two = [run for run in RUNS if run.method == "ELLA" and run.sequence != "order3"]
    assert summary_table(two, methods=["SeqLoRA"])["minutes"].tolist() == ["not run", "unfinished"]
    assert grid_table(two).loc["ELLA", ["order3", "SC", "runs"]].tolist() == ["not run", "unfinished", "6"]


def test_an_unfinished_run_is_no_second_one_and_two_whole_ones_are_named():
    half = make(accuracy=[[80, None], [None, None]], configuration={"device": "cuda"})
    assert summary_table([half, make()]).equals(summary_table([make()]))
    second = make(configuration={"device": "cuda"})
    assert second.name != make().name
    with pytest.raises(ValueError, match=f"{make().name} and {second.name} are two runs of ELLA"):
        summary_table([make(), second])


def test_a_sequence_named_like_a_part_of_the_benchmark_has_its_own_table():
    own = [make(method, sequence="SC", seed=seed) for method in ("IncLoRA", "ELLA") for seed in (1, 2)]
    tables = tables_of(own)
    assert set(tables) == {"SC-summary", "SC-pairs"}
    assert tables["SC-summary"]["runs"].tolist() == ["2", "2"]
    assert tables["SC-pairs"]["pairs"].tolist() == ["2"] * 3
    both = tables_of([*own, *RUNS])
    assert both["SC-summary"].equals(tables_of(RUNS)["SC-summary"])
    assert both["folder SC-summary"].equals(tables["SC-summary"])


def test_a_run_that_was_not_finished_counts_nowhere_and_is_called_unfinished_where_it_stands_alone():
    nothing = np.full((4, 4), np.nan)
    unfinished = make_order("ELLA", "order1", 9, accuracy=nothing)
    assert grid_table([*RUNS, unfinished]).equals(grid_table(RUNS))
    alone = grid_table([*RUNS, make_order("N-LoRA", accuracy=nothing)]).loc["N-LoRA"]
    assert alone.tolist() == ["unfinished", "not run", "not run", "unfinished", "0"]


def test_tasks_learned_alone_stand_beside_every_order_that_they_cover():
    everything = [*RUNS, *ALONE]
    per_seed = [np.mean([run.accuracy[0, 0] for run in ALONE if run.seed == seed]) for seed in (1, 2)]
    assert grid_table(everything).loc["single task"].tolist() == [cell(per_seed)] * 4 + ["6"]
    summary = summary_table(everything).loc["single task"]
    assert summary["overall accuracy"] == cell(per_seed) and summary["minutes"].startswith("6.0")  # 4 * 1.5
    assert summary["backward transfer"] == summary["forgetting"] == "not measured"
    fewer = [run for run in ALONE if run.tasks != ["yahoo"]]
    assert (grid_table([*RUNS, *fewer]).loc["single task", list(ORDERS)] == "not run").all()
    right = dict(exact_match="80", option_accuracy="80")  # the only row; the runs of a sequence have 50
    held = [make_order("single task", task, accuracy=[[100.0]], option_accuracy=[[100.0]], test_rows=[1],
                       right={task: {task: right}}) for task in ALL]  # fmt: skip
    assert measured([*RUNS, *held], "single task") == dict.fromkeys([(order, 1) for order in ORDERS], 100.0)


def test_forward_transfer_subtracts_the_scores_of_tasks_learned_alone():
    found = measured([*RUNS, *ALONE], "ELLA", "forward transfer")
    for run in (run for run in RUNS if run.method == "ELLA"):
        alone = [np.mean([o.accuracy[0, 0] for o in ALONE if o.tasks == [task]]) for task in run.tasks]
        assert found[run.sequence, run.seed] == pytest.approx(np.mean(run.accuracy[3] - np.array(alone)))
    summary = summary_table([*RUNS, *ALONE]).loc["ELLA"]
    per_seed = [np.mean([found[order, seed] for order in ORDERS]) for seed in (1, 2, 3)]
    assert summary["forward transfer"] == cell(per_seed) and summary["runs"] == "9"
    fewer = [run for run in ALONE if run.tasks != ["yahoo"]]  # a task was never learned alone
    assert summary_table([*RUNS, *fewer]).loc["ELLA", "forward transfer"] == "not measured"


def test_a_gate_and_the_rate_of_another_optimizer_are_no_other_budget_but_forward_transfer_needs_one_gate():
    gated, muon = make_order("N-LoRA + JumpLoRA"), make_order("IncLoRA (Muon)")
    gated.configuration["train"] |= dict(kept=0.05, threshold_scope="block", learn_threshold=False)
    muon.configuration["train"]["learning_rate"] = 3e-3
    muon.configuration["method"]["optimizer"] = "muon"
    assert {gated.method, muon.method} <= set(grid_table([*RUNS, gated, muon]).index)
    assert not math.isnan(measured([muon, *ALONE], muon.method, "forward transfer")["order1", 1])
    muon.configuration["train"]["kept"] = 0.5
    assert math.isnan(measured([muon, *ALONE], muon.method, "forward transfer")["order1", 1])


def test_a_pair_is_a_seed_over_the_orders_of_both_and_each_method_is_compared_with_what_it_is_built_on():
    runs = [run for run in RUNS if (run.method, run.seed) != ("IncLoRA", 3)]
    table = paired_table(runs, measures=("overall accuracy", "forgetting"))
    assert list(dict.fromkeys(table.index)) == ["ELLA vs IncLoRA", "IncLoRA + JumpLoRA vs IncLoRA"]
    for name, row in table.iterrows():
        first = name.split(" vs ")[0]
        ours, theirs = (measured(runs, method, row["measure"]) for method in (first, "IncLoRA"))
        seeds = {seed: [ours[o, seed] - theirs[o, seed] for o in ORDERS] for _, seed in theirs}
        differences = np.mean(list(seeds.values()), axis=1)
        assert row["pairs"] == "2" and row["mean"] == f"{np.mean(differences):+.1f}"
        t = paired_t(differences)
        assert (
            row["95 % interval"] == f"{t['low']:+.1f} to {t['high']:+.1f}"
            and float(row["p"]) >= t["p"] - 5e-4
        )
    whole = paired_table(runs, measures=["overall accuracy"]).iloc[0]
    some = [run for run in RUNS if (run.seed, run.sequence) not in ((3, "order1"), (3, "order2"))]
    assert paired_table(some, measures=["overall accuracy"]).iloc[0].equals(whole)  # as in the cells
    one = paired_table([make_order(method) for method in METHODS[:2]], measures=["overall accuracy"]).iloc[0]
    assert (one["pairs"], one["95 % interval"], one["p"]) == ("1", "too few pairs", "")
    assert paired_table(RUNS[:3]).empty
    unknown = paired_table(runs, measures=["base loss"])
    assert set(unknown["mean"]) == {"not measured"} and set(unknown["95 % interval"]) == {""}


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (9, 2.306), (24, 2.069), (30, 2.045)])
def test_students_t_is_that_of_the_printed_tables(n, t):
    noise = np.random.default_rng(n).normal(size=n)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    found = paired_t(noise + t / n**0.5)  # t is the 97.5 % quantile
    assert found["p"] == pytest.approx(0.05, abs=3e-4) and found["pairs"] == n
    assert found["low"] == pytest.approx(0, abs=3e-3 * t) and found["high"] == pytest.approx(
        2 * t / n**0.5, rel=3e-3
    )
    assert paired_t(-noise - t / n**0.5)["p"] == pytest.approx(found["p"]) and paired_t(noise)["p"] > 0.99


def test_equal_differences_and_too_few_pairs_have_no_interval():
    assert paired_t([0.0, 0.0])["p"] == 1
    for few in ([], [1.0], [1.0, math.nan], [2.0, 2.0], [0.1 + 0.2, 0.3]):
        assert math.isnan(paired_t(few)["p"]) and math.isnan(paired_t(few)["low"])


def test_holm_multiplies_by_the_hypotheses_that_are_left_and_never_falls():
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
    assert holm({"a": 0.03, "b": math.nan}) == {"a": 0.03, "b": 1.0}  # not tested, so not counted


def with_strength(order, seed, strength, **changes):
    run = make_order("ELLA", order, seed, **changes)
    run.configuration["method"]["regularizer"]["strength"] = strength
    return run


def test_one_table_takes_a_strength_per_order_but_not_two_on_one_order():
    planned = {"order1": 3e4, "order4": [5e5] * 15, "order6": 5e5}
    runs = [with_strength(order, 1, strength) for order, strength in planned.items()]
    assert {"SC-summary", "LS-summary"} <= set(tables_of(runs))
    with pytest.raises(ValueError, match=r"strength of ELLA on order1: 30000.0 / 1.0"):
        tables_of([*runs, with_strength("order1", 2, 1.0)])


@pytest.mark.parametrize(("key", "value"), [("scoring", "labels"), ("callbacks", ["my.EarlyStop"])])
def test_runs_that_were_scored_or_trained_in_another_way_share_no_table(key, value):
    other = make_order("IncLoRA", seed=2)
    other.configuration[key] = value
    with pytest.raises(ValueError, match=f"differ in {key}"):
        tables_of([make_order("IncLoRA"), other])


def test_single_tasks_without_another_method_are_a_table_of_their_own():
    runs = [make_order("single task", "agnews", seed) for seed in (1, 2)]
    assert summary_table(runs, "agnews").loc["single task", "runs"] == "2"


def test_a_folder_whose_name_ends_in_a_number_stays_one_sequence():
    runs = [make("IncLoRA", seed=seed, sequence="news-2") for seed in (1, 2, 3)]
    assert set(measured(runs, "IncLoRA")) == {("news-2", seed) for seed in (1, 2, 3)}
    runs = [make("IncLoRA", seed=seed, sequence="topics-2") for seed in (1, 2, 3)]  # the same for all seeds
    assert summary_table(runs, "topics-2")["runs"].tolist() == ["3"] and "topics-2-summary" in tables_of(runs)


def test_a_sequence_that_its_seed_draws_is_one_sequence_in_all_tables():
    def run(method, seed, tasks):
        drawn = make_order(method, "order1", seed, sequence=f"topics-{seed}", tasks=tasks)
        drawn.configuration["rows"] = {task: f"rows of {task}, seed {seed}" for task in tasks}
        return drawn

    tasks = dict(zip((1, 2, 3), itertools.permutations("abcd"), strict=False))
    runs = [run(method, seed, list(tasks[seed])) for method in METHODS for seed in tasks]
    assert set(tables_of(runs)) == {"topics-summary", "topics-pairs"}
    finals = [r.average_accuracy for r in runs if r.method == "ELLA"]
    assert summary_table(runs, "topics").loc["ELLA", "overall accuracy"] == cell(finals)
    assert set(paired_table(runs, "topics")["pairs"]) == {"3"}
    panels = accuracy_figure(runs).axes
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["1", "2", "3", "4"]
    runs[0].configuration["rows"]["a"] = "others"
    with pytest.raises(ValueError, match="differ in rows of a of topics-1"):
        summary_table(runs, "topics")


def test_bold_is_better_than_all_others_in_pairs_and_references_do_not_count():
    def runs(method, shift):
        rng = np.random.default_rng(len(method))
        return [make_order(method, run.sequence, run.seed,
                           accuracy=np.clip(run.accuracy / 2 + shift + rng.normal(0, 0.1), 0, 100))
                for run in RUNS if run.method == "ELLA"]  # fmt: skip

    three = [*runs("ELLA", 10), *runs("IncLoRA", 5), *runs("SeqLoRA", 0), *runs("single task", 40)]
    table = pd.DataFrame(
        index=["SeqLoRA", "IncLoRA", "ELLA", "single task"], columns=["retention", "minutes"]
    )
    assert clear_best(three, table).to_numpy().tolist() == [
        [False] * 2,
        [False] * 2,
        [True, False],
        [False] * 2,
    ]
    assert not clear_best(RUNS, table.reindex(["IncLoRA", "ELLA"])).any().any()  # random scores
    assert not clear_best(three, table.reindex(["ELLA"])).any().any()  # one of one


def test_a_method_that_lacks_an_order_is_in_no_pair_and_not_bold():
    names = ["IncLoRA", "ELLA", "IncLoRA + JumpLoRA"]
    scores = {"IncLoRA": 50.0, "ELLA": 70.0, "IncLoRA + JumpLoRA": 90.0}
    runs = [
        make(name, (scores[name] + seed, scores[name]), seed, order)
        for name, order, seed in itertools.product(names, ORDERS, range(3))
        if order == "order1" or "JumpLoRA" not in name
    ]
    table = summary_table(runs)[["overall accuracy"]]
    pairs = paired_table(runs, measures=("overall accuracy",))
    assert pairs["mean"].tolist() == ["+20.0", "unfinished"] and table.loc[names[2]].item() == "unfinished"
    runs = [replace(run, accuracy=run.accuracy + i % 5 / 10) for i, run in enumerate(runs)]
    assert clear_best(runs, table)["overall accuracy"].to_dict() == {name: name == "ELLA" for name in names}
    alone = [run for run in runs if run.sequence == "order1"]
    assert float(paired_table(alone)["mean"].iloc[-3]) > 30  # of what was run


def test_of_equal_methods_at_most_one_column_in_twenty_has_a_bold_cell():
    rng = np.random.default_rng(0)
    names = [f"method {m}" for m in range(5)]
    table = pd.DataFrame(index=names, columns=["overall accuracy"])
    wrong = 0
    for _ in range(100):
        luck = {key: rng.normal(0, 3) for key in itertools.product(names, range(3))}  # of a method's seed
        where = itertools.product(names, ORDERS, range(3))
        runs = [make(name, rng.normal([60, 70], 1) + luck[name, s], s, order) for name, order, s in where]
        wrong += clear_best(runs, table).any(axis=None)
    assert wrong <= 5


# ---------------------------------------------------------------- refusals


def with_setting(run, where, key, value="another"):
    (run.configuration[where] if where else run.configuration)[key] = value
    return run


@pytest.mark.parametrize(
    "where, key, named",
    [
        (None, "dtype", "dtype"),
        (None, "scored_split", "scored_split"),
        (None, "weights", "weights"),
        ("train", "max_length", "max_length"),
        ("train", "learning_rate", "learning_rate of adamw"),
        ("train", "epochs", "epochs"),  # only one of them has it
        ("rows", "yahoo", "rows of yahoo"),
    ],
)
def test_runs_of_two_budgets_are_not_put_into_one_table(where, key, named):
    other = with_setting(make_order("N-LoRA"), where, key)
    for table in (grid_table, summary_table, paired_table, tables_of):
        with pytest.raises(ValueError, match=f"differ in {named}: .*; a table takes runs that agree in it"):
            table([*RUNS, other])


@pytest.mark.parametrize(
    "other, message",
    [
        (make_order("N-LoRA", seed=2, backbone="b"), "differ in backbone: a model / b"),
        (RUNS[0], "two runs of IncLoRA on order1 with seed 1; keep one"),
        (ALONE[0], "two runs of single task on amazon with seed 1; keep one"),
        (
            with_setting(make_order("IncLoRA", seed=9), "train", "kept"),
            "differ in train.kept of IncLoRA: None / another",
        ),
    ],
)
def test_unlike_runs_and_repeated_ones_are_not_put_into_one_table(other, message):
    for table in (grid_table, summary_table, tables_of):
        with pytest.raises(ValueError, match=message):
            table([*RUNS, *ALONE, other])


def test_unknown_measures_and_parts_are_refused():
    with pytest.raises(ValueError, match="measure='accuracy' is not known"):
        measured(RUNS, "ELLA", "accuracy")
    with pytest.raises(ValueError, match="part='XL' is not known"):
        grid_table(RUNS, "XL")


@pytest.mark.parametrize("table", [grid_table, summary_table])
def test_one_name_in_place_of_a_list_of_methods_is_refused(table):
    with pytest.raises(ValueError, match=r"methods='ELLA' is one name; give a list of names, \['ELLA'\]"):
        table(RUNS[:1], methods="ELLA")


# ---------------------------------------------------------------- the paper's model


T5 = ("google-t5/t5-large", "t5-large", "/data/models/T5-large/", "a/models--google-t5--t5-large/snapshots/0")


@pytest.mark.parametrize("hub, seeds", [("", (1,)), ("-hub", (1, 2))])
@pytest.mark.parametrize("names", [*((name,) for name in T5[1:]), T5], ids=str)
def test_runs_of_the_papers_model_fill_the_tables_by_whatever_name_it_was_loaded(names, hub, seeds):
    name = itertools.cycle(names)
    every = [order + hub for orders in PARTS.values() for order in orders]
    where = list(itertools.product(COMPARED, every, seeds))
    runs = [make_order(*one, backbone=next(name)) for one in where]
    of = {one: run for one, run in zip(where, runs, strict=True)}

    def text(values):
        return cell(values) if len(seeds) > 1 else f"{values[0]:.1f}"

    tables = tables_of(runs)
    for part, orders in PARTS.items():
        grid = tables[f"{part}{hub}-overall-accuracy"]
        for method in COMPARED:
            scores = {o: [of[method, o + hub, seed].average_accuracy for seed in seeds] for o in orders}
            means = [text(np.mean(list(scores.values()), axis=0)), str(len(orders) * len(seeds))]
            assert grid.loc[method].tolist() == [*map(text, scores.values()), *means]
            lost = [np.mean([of[method, o + hub, seed].forgetting for o in orders]) for seed in seeds]
            assert tables[f"{part}{hub}-summary"].loc[method, "forgetting"] == text(lost)
        pairs = tables[f"{part}{hub}-pairs"].loc["ELLA + JumpLoRA vs ELLA", "pairs"]
        assert set(pairs) == {str(len(seeds))}
    assert "not run" not in grid_table(runs, f"SC{hub}", methods=COMPARED).to_numpy()


def test_two_budgets_of_the_papers_model_are_not_averaged():
    runs = [make_order("ELLA", seed=seed, backbone=T5[seed]) for seed in (0, 1)]
    runs[1].configuration["weights"] = "other"
    with pytest.raises(ValueError, match="differ in weights: None / other"):
        grid_table(runs)


# ---------------------------------------------------------------- captions, files and the command


def test_a_caption_states_the_budget_and_the_notes_of_the_rows():
    noted = make_order("ELLA", "order1", 7, extra=dict(notes=dict(yahoo="a different sample")))
    text = budget_text([*RUNS, noted])
    assert "28 runs of a model" in text and "120 training rows and 50 test rows" in text
    assert "at most 128 tokens" in text and "yahoo: a different sample." in text
    longer = with_setting(make_order(seed=8), "train", "max_length", 256)
    assert "128 to 256 tokens" in budget_text([longer, noted])
    assert "yahoo" not in budget_text([noted], notes=False) and budget_text([]) == "Not run."
    noted.configuration["scored_split"] = "dev"
    assert f"and {noted.test_rows[0]} dev rows" in budget_text([noted])


def test_every_sequence_has_a_table_also_beside_the_orders():
    others = [make_order("IncLoRA", name, 1) for name in ("mine", "yours")]
    assert list(tables_of(others)) == ["mine-summary", "yours-summary"]  # nothing to compare
    both = tables_of([*RUNS, *ALONE, others[0]])
    assert list(both)[-1] == "mine-summary" and both["SC-summary"].equals(
        tables_of([*RUNS, *ALONE])["SC-summary"]
    )


def test_tables_are_written_in_three_forms_that_agree(tmp_path):
    tables = tables_of(RUNS)
    paths = write_tables(tables, tmp_path)
    assert sorted({path.suffix for path in paths}) == [".csv", ".html", ".md"] and len(paths) == 12
    assert pd.read_csv(tmp_path / "SC-summary.csv", index_col=0, dtype=str).equals(tables["SC-summary"])
    markdown = (tmp_path / "SC-summary.md").read_text()
    assert all(cell in markdown for cell in tables["SC-summary"].to_numpy().ravel())


def test_the_tables_that_are_kept_are_those_of_the_records(tmp_path):
    made = write_tables(tables_of(load_runs(ROOT / "results" / "reduced")), tmp_path)
    kept = {path.name: path.read_text() for path in (ROOT / "results" / "tables").iterdir()}
    assert kept == {path.name: path.read_text() for path in made}


def test_the_command_prints_and_writes_tables_and_figures_that_say_that_rows_are_a_different_sample(
    tmp_path, capsys
):
    for run in HUB_RUNS:
        run.save(tmp_path / "runs")
    for form in ("text", "markdown", "csv", "html"):
        flags = ["--format", form, "--out", str(tmp_path / "tables")]
        assert main(["table", str(tmp_path / "runs"), *flags]) == 0
        printed = capsys.readouterr().out
        assert f"method ({DIFFERENT_SAMPLE})" in printed and "SC-hub-overall-accuracy" in printed
    files = list((tmp_path / "tables").iterdir())
    assert len(files) == 9 and all("SC-hub" in f.name and DIFFERENT_SAMPLE in f.read_text() for f in files)
    assert main(["table", str(tmp_path / "nothing")]) == 2
    one = HUB_RUNS[:1]
    assert list(grid_table(HUB_RUNS, "SC-hub").columns) == [*HUB_ORDERS, "SC-hub", "runs"]
    assert f"agnews-hub: {DIFFERENT_SAMPLE}" in budget_text(HUB_RUNS)
    assert DIFFERENT_SAMPLE in accuracy_figure(one).get_suptitle()


def test_rows_of_the_paper_and_of_the_hub_stand_in_no_common_table():
    paper, hub = make_order("IncLoRA"), make_order("ELLA", "order1-hub")
    tables = tables_of([paper, hub])
    assert "not run" in tables["SC-overall-accuracy"].loc["ELLA", "order1"]
    assert "not run" in tables["SC-hub-overall-accuracy"].loc["IncLoRA", "order1-hub"]
    assert tables["SC-summary"].index.name == "method"


def test_the_loss_on_neutral_texts_has_a_column_where_a_run_measured_it():
    losses = {"": 4.0, "a": 4.5, "b": 4.125}  # task b is learned last
    runs = [make(extra=dict(neutral_loss=losses)), make("IncLoRA")]
    assert runs[0].base_loss == 0.125 and np.isnan(runs[1].base_loss)
    assert np.isnan(make(extra=dict(neutral_loss=losses | {"b": None})).base_loss)  # null in the record: nan
    assert summary_table(runs, "order1")["base loss"].to_dict() == {"IncLoRA": "not measured", "ELLA": "0.12"}
    assert "base loss" not in summary_table(runs[1:], "order1")
