"The statistics of the study against counting by hand, and its plan."

import itertools
import json
import math
import operator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jumplora.learning.evaluation import Score
from jumplora.results.interference import (
    LEVEL,
    VARIANTS,
    arm_over_family,
    compare_families,
    frontier,
    jackknife,
    outcome,
    retention_at,
    study_jobs,
    study_table,
)
from jumplora.results.run_tables import load_runs, paired_t
from jumplora.running.grid import job_method
from jumplora.storage.record import Run

ROOT = Path(__file__).resolve().parents[2]


def test_the_numbers_in_the_pages_sentences_are_those_of_the_records():
    cells = json.loads((ROOT / "nbs/3_results/interference.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    page = " ".join(" ".join(texts).split())

    def lead(folder, arms, score, column, first, second):
        table = study_table(load_runs(ROOT / "results" / folder, "test"), arms, score)
        table = table.set_index(["method", "rate", "seed"])[column].sort_index()
        return paired_t((table.loc[first] - table.loc[second]).to_numpy())

    late, dense, seen, own = (
        ("IncLoRA + late gate", 1e-3),
        ("IncLoRA", 1e-3),
        "seen_accuracy",
        "option_accuracy",
    )

    def over_line(folder, score):
        return arm_over_family(
            study_table(load_runs(ROOT / "results" / folder, "test"), 3, score), late, dense[0]
        )

    runs = load_runs(ROOT / "results/interference", "test")
    study, own_study = study_table(runs), study_table(runs, score=own)
    found = found_main = compare_families(study, late[0], dense[0])
    interval = f"{100 * found['level']:.1f} % interval {found['low']:+.1f} to {found['high']:+.1f}; six seeds"
    assert f"{found['mean']:+.1f} points ({interval})" in page and study["seed"].nunique() == 6
    found = {score: lead("longer", 3, score, "retention", late, dense)["mean"] for score in (seen, own)}
    assert f"it keeps {found[seen]:.1f} more, and {found[own]:.1f} more among own labels" in page
    assert all(over_line("deeper", score)["low"] > 0 for score in (seen, own))  # as the front page says
    found = [over_line("deeper", score)["mean"] for score in (seen, own)]
    assert "at its L the late gate keeps {:.1f} more, among own labels {:.1f}".format(*found) in page
    found = over_line("deeper", seen)
    guide = (ROOT / "nbs/4_guides/which_method.ipynb").read_text()
    assert f"{found['mean']:+.1f} | 95 %: {found['low']:.1f} to {found['high']:.1f} |" in guide
    gates = study_table(load_runs(ROOT / "results/gates", "dev"), arms=13)
    own_gates = gates.set_index(["method", "rate", "seed"])[["learning", "retention"]].sort_index()
    layer = own_gates.loc[f"{late[0]}, threshold_scope layer", 1e-3] - own_gates.loc[late]
    L, R = (paired_t(layer[name].to_numpy()) for name in ("learning", "retention"))
    entry = " ".join((ROOT / "docs/experiments.md").read_text().split())
    ahead = f"{R['mean']:.1f} more R ({R['low']:.1f} to {R['high']:.1f}) at {-L['mean']:.1f} less L"
    assert f"a threshold per layer has {ahead} ({L['low']:.1f} to {L['high']:+.1f})" in entry
    R = paired_t(
        (own_gates.loc[late] - own_gates.loc["IncLoRA, falling rate", 1.4e-3])["retention"].to_numpy()
    )
    ahead = f"{R['mean']:.1f} more R than the falling rate from 1.4e-3"
    assert f"{ahead} ({R['low']:.1f} to {R['high']:.1f})" in entry
    over = arm_over_family(gates, late, dense[0])
    ahead = f"lies {over['mean']:.1f} above the dense curve"
    assert f"{ahead} ({over['low']:.1f} to {over['high']:.1f})" in entry
    lost = study.assign(retention=study["retention"] - own_study["retention"])
    lost = compare_families(lost, late[0], dense[0])
    readme = " ".join((ROOT / "README.md").read_text().split())
    share = f"Of its {found_main['mean']:.0f}-point lead about {lost['mean']:.0f} points"
    assert f"{share} (97.8 % interval {lost['low']:.1f} to {lost['high']:.0f}, an unplanned" in readme
    found = lead("interference", 14, own, "retention", ("IncLoRA pruned", 1.4e-3), (late[0], 7e-4))
    assert f"in pruning's favour (by {found['low']:.1f} to {found['high']:.1f}; all unplanned)" in page
    found = lead("interference", 14, seen, "retention", ("SeqLoRA", 1e-3), dense)
    assert (
        f"keeps {found['mean']:.1f} more ({found['low']:+.1f} to {found['high']:+.1f}, not planned)" in page
    )
    found = lead("interference", 14, seen, "base loss", late, dense)
    assert f"by {found['mean']:.2f} more with the gate" in page
    assert f"(interval at 1e-3: {found['low']:.2f} to {found['high']:.2f}; not planned)" in page
    found = lead("interference", 14, seen, "retention", late, ("IncLoRA scaled", 1e-3))
    assert f"keeps {found['mean']:.1f} less" in page
    R = [study_table(load_runs(ROOT / "results/interference", "test"), score=score) for score in (seen, own)]
    (a, b), (c, d) = (
        [table.groupby(["method", "rate"])["retention"].mean()[arm] for table in R] for arm in (dense, late)
    )
    before = study_table(load_runs(ROOT / "results/untrained", "test"), 1, own)["retention"].mean()
    assert f"(not tested; the untrained model has {before:.0f})" in page
    assert f"raises R of IncLoRA from {a:.0f} to {b:.0f}, and with the gate from {c:.0f} to {d:.1f}" in page


def test_three_looks_err_as_often_as_the_page_says():
    draws = np.random.default_rng(0).standard_normal((200_000, 24))
    wrong = np.zeros(len(draws), bool)
    for seeds in (6, 12, 24):
        means, errors = draws[:, :seeds].mean(1), draws[:, :seeds].std(1, ddof=1)
        interval = paired_t(draws[0, :seeds], LEVEL)
        wrong |= abs(means) > (interval["high"] - interval["mean"]) / errors[0] * errors
    page = (ROOT / "nbs/3_results/interference.ipynb").read_text()
    assert f"err in {100 * wrong.mean():.1f} % of simulated studies, not 5 %" in page


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(2).normal(3, 2, 40)
    found = jackknife(lambda used: values[used].mean(), len(values), level=0.95)
    assert found == pytest.approx(paired_t(values))
    assert found["high"] < jackknife(lambda used: values[used].mean(), len(values))["high"]


def test_intervals_of_six_seeds_hold_the_true_difference_about_as_often_as_they_say():
    right = [found["low"] < 2 < found["high"] for found in (
        compare_families(table_of(2.0, seeds=6, start=6 * i, noise=2.0), "gate", "dense") for i in range(150)
    )]  # fmt: skip
    assert 0.94 < np.mean(right) <= 1


def test_families_that_lie_on_one_curve_do_not_differ_and_a_shift_is_found():
    rates = [2.5e-4, 5e-4, 1e-3]
    x = np.log(np.array(rates))
    one = frontier(rates, 50 + 4 * (x + 7), 20 - 6 * (x + 7))
    wide = [1.25e-4, 3e-4, 7e-4]
    y = np.log(np.array(wide))
    other = frontier(wide, 50 + 4 * (y + 7), 22 - 6 * (y + 7))
    middle = (one[:, 0].min() + other[:, 0].max()) / 2
    assert retention_at(other, middle) - retention_at(one, middle) == pytest.approx(2, abs=1e-3)
    assert math.isnan(retention_at(one, 99))
    with pytest.raises(ValueError, match="at least two"):
        frontier([1e-3], [50], [20])


def test_a_curve_ends_where_more_rate_learns_less():
    rates = [1e-4, 1e-3, 1e-2]
    curve = frontier(rates, [40, 50, 45], [20, 10, 0])
    back = frontier(rates[::-1], [45, 50, 40], [0, 10, 20], straight=True)
    assert np.allclose(back, frontier(rates, [40, 50, 45], [20, 10, 0], straight=True))
    assert curve[-1, 0] == curve[:, 0].max() > 50 - 1e-9 and (np.diff(curve[:, 0]) >= 0).all()


def table_of(shift, seeds=6, start=0, noise=0.2):
    "Rows of two families on one curve, the first shifted in retention by so many points."
    rows = []
    for seed, (method, rates) in itertools.product(range(start, start + seeds), FAMILIES.items()):
        for rate in rates:
            x = math.log(rate) + 7
            own = np.random.default_rng([seed, int(1e6 * rate), len(method)]).normal(0, noise, 2)
            gain = shift if method == "gate" else 0.0
            rows.append(dict(method=method, rate=rate, seed=seed, learning=50 + 8 * x + own[0]))
            rows[-1]["retention"] = 20 - 6 * x + gain + own[1]
    return pd.DataFrame(rows)


FAMILIES = {"gate": (5e-4, 7e-4, 1e-3), "dense": (2.5e-4, 5e-4, 1e-3)}


@pytest.mark.parametrize(
    ("shift", "word"),
    [
        (5.0, "The late gate keeps more: +"),
        (-5.0, "The late gate keeps less: -"),
        (0.0, "as much, to within two"),
    ],
)
def test_the_outcome_names_what_was_put_in(shift, word):
    found = compare_families(table_of(shift), "gate", "dense")
    assert found["mean"] == pytest.approx(shift, abs=0.8)
    assert found["low"] <= found["mean"] <= found["high"]
    assert word in outcome(found)


def test_families_are_compared_in_the_middle_of_the_learning_that_both_reach():
    found = compare_families(table_of(2.0, noise=0.0), "gate", "dense")
    rates = FAMILIES["gate"][0], FAMILIES["dense"][-1]
    assert found["learning"] == pytest.approx(106 + 4 * sum(math.log(rate) for rate in rates), abs=0.1)


def test_families_without_common_learning_and_wide_intervals_have_their_own_outcomes():
    table = table_of(0.0)
    table.loc[table["method"] == "gate", "learning"] += 100
    assert "no learning in common" in outcome(compare_families(table, "gate", "dense"))
    found = dict(learning=50.0, mean=1.0, low=-3.0, high=5.0, level=0.95)
    points = "+1.0 points of retention (95.0 % interval -3.0 to +5.0)"
    assert outcome(found) == f"Undecided: {points}, at equal learning (50.0 % right after a task)."


def test_a_difference_whose_interval_fails_is_undecided_and_not_without_common_learning():
    table = table_of(0.0)
    odd = (table["method"] == "gate") & (table["seed"] == table["seed"].min())
    table.loc[odd, "learning"] -= 24  # without this seed the gate's curve begins at a higher learning
    found = compare_families(table, "gate", "dense", level=0.9)
    assert math.isnan(found["low"]) and math.isfinite(found["mean"]) and found["level"] == 0.9
    assert outcome(found).startswith("Undecided") and "points of retention (no interval)" in outcome(found)


def test_arms_are_paired_by_seed_and_not_by_place():
    table = table_of(2.0).sample(frac=1, random_state=0)
    found = [arm_over_family(rows, ("gate", 5e-4), "dense") for rows in (table, table.sort_values("seed"))]
    assert found[0] == found[1] and found[0]["low"] < 2 < found[0]["high"]
    fewer = table[(table["method"] == "dense") | (table["seed"] > 0)]
    assert math.isnan(arm_over_family(fewer, ("gate", 5e-4), "dense")["mean"])
    assert math.isnan(compare_families(fewer, "gate", "dense")["mean"])


def test_an_arm_that_leaves_the_curve_without_one_seed_has_a_gain_and_no_interval():
    table = table_of(0.0, noise=0.0)
    own = table[table["method"] == "gate"].assign(method="arm")
    own = own[own["rate"] == 1e-3].assign(learning=lambda rows: rows["learning"] - 0.5)
    own.loc[own["seed"] == 0, "learning"] -= 2
    own["learning"] += 0.7  # without seed 0 beyond the highest learning of the dense family
    found = arm_over_family(pd.concat([table, own]), ("arm", 1e-3), "dense")
    assert math.isnan(found["low"]) and abs(found["mean"]) < 2


def test_there_is_no_interval_where_a_seed_cannot_be_left_out():
    found = jackknife(lambda used: math.nan if 3 not in used else 1.0, 6)
    assert math.isnan(found["low"]) and math.isnan(found["high"])


def test_the_study_has_fourteen_arms_a_seed_that_differ_in_nothing_but_what_is_named():
    jobs = study_jobs(seeds=[101, 102])
    assert len(jobs) == 28 and len({job.key for job in jobs}) == 28
    assert all(job.sequence == f"topics-{job.seed}" and job.scoring == "labels" for job in jobs)
    first = [job for job in jobs if job.seed == 101]
    assert sum(job.method == "IncLoRA" for job in first) == 5
    with pytest.raises(ValueError, match="variant='wide' is not known"):
        study_jobs("wide")
    with pytest.raises(ValueError, match="method='ELLA' is not known; use 'IncLoRA'"):
        study_jobs("deeper", methods=["ELLA"])
    wider, unlisted = (study_jobs(name, [7], ["IncLoRA + late gate"])[0] for name in ("deeper", "unlisted"))
    assert wider.train["top_layers"] == 8 and wider.sequence == "topics-7"
    assert unlisted.sequence == "topics-unlisted-7" and unlisted.train["top_layers"] == 4
    for job in first:
        method, config = job_method(job)
        assert config.top_layers == 4 and config.max_length == 64 and config.batch_size == 8
        assert (config.kept == 0.1 and config.hold_kept) == ("late gate" in job.method)
    assert [job.regularizer for job in first if job.method == "IncLoRA scaled"] == [dict(norm=8.2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_its_own_seeds_rates_and_rows(variant):
    plan, jobs = VARIANTS[variant], study_jobs(variant)
    assert {job.seed for job in jobs} == set(plan["seeds"])
    gates = [len(plan["gates"]) if "late gate" in arm else 1 for arm in plan["rates"]]
    rates = map(len, plan["rates"].values())
    assert len({job.key for job in jobs}) == len(jobs)
    assert len(jobs) == len(plan["seeds"]) * sum(map(operator.mul, rates, gates))
    assert {(job.rows["train"], job.rows[plan["split"]]) for job in jobs} == {plan["rows"]}
    assert {job.split for job in jobs} == {plan["split"]}
    assert all(job.train | plan["train"] == job.train for job in jobs)
    assert all((job.strength == 1e3) == ("ELLA" in job.method) for job in jobs)


def test_straight_lines_meet_every_arm():
    rates, learned, kept = [1e-4, 1e-3, 1e-2], [40, 45, 55], [20, 10, 0]
    curve = frontier(rates, learned, kept, straight=True)
    assert [retention_at(curve, L) for L in (*learned, 50)] == pytest.approx([20, 10, 0, 5])


def test_only_seeds_with_every_arm_are_read():
    def made(seed, method, rate):
        tasks = ["b", "a"]  # a record keeps its dicts in alphabetical order
        run = Run(method, "tiny", "topics-1", seed, tasks, [4, 4], dict(train=dict(learning_rate=rate)))
        for i, j in ((0, 0), (1, 0), (1, 1)):
            right = tuple(k < (1, 2, 4)[i + j] for k in range(4))
            own = tuple(k < (2, 3, 4)[i + j] for k in range(4))
            run.add_score(i, j, Score((), right, own, seen=right, log_loss=(1.0, 2.0, 4.0)[i + j]))
        run.extra["updates"] = dict(b=dict(kept=0.1, norm=2.0), a=dict(kept=0.1, norm=4.0))
        run.extra["neutral_loss"] = {"": 4.0, "a": 4.5, "b": 4.1}
        return run

    runs = [made(1, "IncLoRA", 1e-3), made(1, "SeqLoRA", 1e-3), made(2, "IncLoRA", 1e-3)]
    table = study_table(runs, arms=2)
    assert table["seed"].tolist() == [1, 1] and study_table([]).empty
    late, other = (made(1, "IncLoRA + late gate", 1e-3) for _ in range(2))
    other.configuration["train"] |= dict(kept=0.03, threshold_scope="layer")
    late.configuration["train"] |= dict(kept=0.1, gate_start=0.7, threshold_scope="model")
    names = study_table([late, other], arms=2)["method"].tolist()
    assert names == [late.method, f"{late.method}, kept 0.03, threshold_scope layer"]
    with pytest.raises(ValueError, match="two runs of one arm and seed; give the runs of one variant"):
        study_table([*runs, made(1, "SeqLoRA", 1e-3)], arms=2)
    row = table.iloc[0]
    assert row["learning"] == (25 + 100) / 2 and row["retention"] == 50 and row["kept"] == pytest.approx(10)
    own = study_table(runs, arms=2, score="option_accuracy").iloc[0]
    assert own["learning"] == (50 + 100) / 2 and own["retention"] == 75 and own["exact"] == 50
    assert row["norm"] == 3 and row["base loss"] == pytest.approx(0.5)
