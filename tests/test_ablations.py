"Runs that differ in one setting: found, compared and drawn from invented records."

import numpy as np
import pytest

from jumplora.results.ablations import (
    all_but,
    by_age,
    density,
    difference_claim,
    drift,
    long_figure,
    setting_figure,
    threshold_figure,
    tradeoff_claim,
    tradeoff_figure,
    variant_table,
    variants,
)
from jumplora.storage.record import Run

TASKS = ["a", "b", "c"]


def made(learned=70.0, lost=5.0, seed=1, kept=0.1, sparsity=0.6, history=(), rows=50, **changes) -> Run:
    matrix = np.full((3, 3), np.nan)
    for j in range(3):
        matrix[j:, j] = learned - lost * np.arange(3 - j)
    train = dict(kept=kept, bandwidth=1e-3) | changes.pop("train", {})
    configuration = dict(train=train, rows=dict.fromkeys(TASKS, "x"), device="cpu") | changes.pop("asked", {})
    facts = dict(sparsity={t: {"q": sparsity} for t in TASKS}, thresholds={t: list(history) for t in TASKS})
    about = dict(method="IncLoRA + JumpLoRA", backbone="m", sequence="s") | changes
    return Run(seed=seed, tasks=TASKS, test_rows=[rows] * 3, configuration=configuration, accuracy=matrix,
               **about, **facts)  # fmt: skip


def test_only_the_setting_the_seed_and_the_device_may_differ():
    base = made()
    assert all_but(base, "kept") == all_but(made(kept=0.5, seed=3, asked=dict(device="cuda")), "kept")
    asked = [dict(rows={}), dict(scored_split="dev"), dict(method={"name": "ELLA"})]
    others = [made(train=dict(bandwidth=1e-2)), made(sequence="t"), made(backbone="n")]
    others += [made(asked=change) for change in asked]
    assert all(all_but(base, "kept") != all_but(other, "kept") for other in others)
    assert list(variants([base, *others], base, "kept")) == [0.1]
    assert list(variants([base, *others], base, "bandwidth")) == [1e-3, 1e-2]


def test_values_stand_in_order_and_only_seeds_of_all_of_them_count():
    runs = [made(kept=k, seed=s) for k in (0.5, None, 0.02) for s in (2, 1)] + [made(kept=0.5, seed=3)]
    found = variants(runs, runs[0], "kept")
    assert list(found) == [0.02, 0.5, None]
    assert [[run.seed for run in group] for group in found.values()] == [[1, 2]] * 3
    assert variants([made(kept=0.5, seed=1), made(kept=0.1, seed=2)], made(), "kept") == {}


def test_unfinished_runs_are_left_out_and_competing_ones_refused():
    part = made(kept=0.5)
    part.accuracy[2] = np.nan
    assert list(variants([made(), part], made(), "kept")) == [0.1]
    with pytest.raises(ValueError, match="one setting and one seed; keep one"):
        variants([made(), made(learned=60.0)], made(), "kept")


def test_the_table_holds_what_each_value_learns_and_loses():
    table = variant_table({0.1: [made(seed=1), made(learned=72.0, seed=2)], "none": [made(lost=0.0)]}, "kept")
    assert table.index.name == "kept" and list(table.index) == ["0.1", "none"]
    assert table.loc["0.1", "just learned"] == "71.0 ± 1.4" and table.loc["none", "forgetting"] == "0.0"
    assert table.loc["0.1", "sparsity %"] == "60.0 ± 0.0" and table.loc["none", "seeds"] == "1"


def test_a_title_says_whether_the_intervals_overlap():
    near = {"a": [made()], "b": [made(learned=71.0)]}
    far = {"a": [made(learned=30.0)], "b": [made(learned=90.0)]}
    assert difference_claim(near, "scope") == "scope, not told apart: b ends 1.0 points above a"
    assert difference_claim(far, "scope") == "scope, told apart: b ends 60.0 points above a"
    many = {name: [made(learned=group[0].accuracy[0, 0], rows=40_000)] for name, group in near.items()}
    assert difference_claim(many, "scope").startswith("scope, told apart: ")
    assert setting_figure(near, "scope").axes[0].get_title(loc="left") == difference_claim(near, "scope")
    labels = [text.get_text() for text in setting_figure(near, "scope").axes[0].get_yticklabels()]
    assert labels == ["b", "a"]  # from below: the first stands on top


def test_density_is_measured_and_its_title_compares_the_ends():
    thin, full = [made(learned=68.0, lost=2.0, sparsity=0.98)], [made(sparsity=0.0)]
    assert density(thin) == pytest.approx(2.0) and density(full) == 100
    said = "Keeping 2 % of the entries instead of 100 %: -2.0 points learned, -4.5 forgotten"
    assert tradeoff_claim([thin, full]) == said
    figure = tradeoff_figure({"full": full, "thin": thin})  # in any order
    assert figure.get_suptitle() == said
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([2.0, 100.0])


def test_the_way_of_a_threshold_begins_where_it_was_chosen():
    steps = [dict(step=1, interpolation=0.0, threshold=dict(a=9.0, b=9.0)),
             dict(step=2, interpolation=0.5, threshold=dict(a=2.0, b=4.0)),
             dict(step=3, interpolation=1.0, threshold=dict(a=2.1, b=3.0))]  # fmt: skip
    assert drift(made(history=steps)) == dict.fromkeys(TASKS, [1.0, 0.75])  # of the group that went furthest
    assert drift(made(history=steps[:1])) == drift(made()) == {}
    title = threshold_figure({0.1: [made(history=steps)]}).get_suptitle()
    assert title == "The threshold moves by 25.0 % at most; 10 % above it become 40 %"


def test_forgetting_by_age_is_a_mean_over_the_tasks_that_reach_it():
    run = made()
    run.accuracy[1, 0], run.accuracy[2, 1] = 69.0, 62.0
    assert by_age(run) == [4.5, 10.0]  # (1 + 8) / 2 after one more task, 10 after two
    assert long_figure([run]).get_suptitle() == "After 3 tasks: IncLoRA + JumpLoRA 64.0 %"


def test_figures_without_runs_say_so():
    for figure in (setting_figure({}, "x"), tradeoff_figure({}), threshold_figure({}), long_figure([])):
        assert "not run" in figure.axes[0].texts[0].get_text()
    assert variants([made()], None, "kept") == {} and variant_table({}).empty
