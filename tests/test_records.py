"""Tables and figures: computed from records, never guessed, reported and measured apart."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jumplora.conventions import METHOD_COLORS
from jumplora.results import run_tables as records
from jumplora.results.run_tables import (
    COMPARED,
    accuracy_figure,
    best_cells,
    by_method,
    comparison_table,
    first_task_figure,
    grid_command,
    in_order,
    interval_note,
    load_runs,
    markdown_table,
    mean_text,
    measured_text,
    reported_results,
    reported_table,
    source_list,
    what_was_run,
)
from jumplora.storage.record import Run

ROOT = Path(__file__).resolve().parents[1]
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
    kept = records.scored_on_test([dev, test, make(seed=5)])
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
    assert row["backward transfer"] == mean_text([-20.0, -16.0, -30.0])
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
    assert mean_text([-0.0]) == "0.0"


def test_the_interval_note_counts_the_pairs_that_can_be_told_apart():
    far = [make("IncLoRA", (10, 10)), make("ELLA", (90, 90)), make("SeqLoRA", (12, 9))]
    note = interval_note(far)
    assert "The intervals overlap for 1 of 3 pairs of methods" in note
    assert "ELLA over SeqLoRA, ELLA over IncLoRA" in note or "ELLA over IncLoRA, ELLA over SeqLoRA" in note
    assert "nothing to tell apart" in interval_note([]) and "nothing to tell apart" in interval_note(far[:1])


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
        for average, orders in records.PARTS.items():
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
    assert measured_text(two, "SC", "average_accuracy") == "not run"
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


def test_every_note_of_a_table_is_in_the_list_of_sources():
    reported = reported_results(REPORTED)
    listed = source_list(reported)
    for columns in (("order1", "order2", "order3", "SC"), ("order4", "order5", "order6", "LS")):
        for source in reported_table(reported, [], columns)["source"]:
            assert f"- {source.split(' ')[0]} " in listed


def test_the_command_that_fills_the_grid_is_one_shell_line_with_flags_that_exist():
    import shlex

    from jumplora.command_line import parser_of

    line = grid_command(["ELLA", "ELLA + JumpLoRA"], ["order1", "order4"], "google-t5/t5-large")
    words = shlex.split(line)
    assert words[:2] == ["jumplora", "grid"]
    flags = parser_of("grid").parse_args(words[2:])
    assert flags.method == ["ELLA", "ELLA + JumpLoRA"] and flags.sequence == ["order1", "order4"]
    assert (flags.protocol, flags.backbone, flags.out) == ("paper", "google-t5/t5-large", "results/t5-large")


def test_the_first_sentence_counts_the_records():
    assert "nothing yet" in what_was_run([]) and "0 of 30 cells" in what_was_run([])
    small = [make(method, sequence="newsroom", backbone="smollm2-135m") for method in COMPARED]
    text = what_was_run([*small, make()])
    assert "5 of 5 methods on newsroom with smollm2-135m (1 seed)" in text and "1 of 30 cells" in text
    assert "no table of the paper is reproduced" in text
    text = what_was_run([*small, make(COMPARED[0], sequence="newsroom", backbone="smollm2-135m", seed=7)])
    assert "on newsroom with smollm2-135m (1 to 2 seeds)" in text
    assert "agnews" not in what_was_run([make("single task", sequence="agnews", backbone="smollm2-135m")])
    everything = [make(m, sequence=f"order{i}") for m in COMPARED for i in range(1, 7)]
    assert "30 of 30 cells were run: the grid is full" in what_was_run(everything)


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
