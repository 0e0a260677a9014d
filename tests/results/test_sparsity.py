"Overlap against boolean masks and the definition of chance, filling, and the report."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jumplora.results.sparsity import (
    chance_overlap,
    overlap_report,
    recorded_overlap,
    tasks_that_fit,
)
from jumplora.storage.record import Run

SHAPES = {"a.q_proj": (12, 9), "b.v_proj": (7, 5)}


def masks(seed, tasks=3, density=0.3):
    generator = np.random.default_rng(seed)
    return [{n: generator.random(shape) < density for n, shape in SHAPES.items()} for _ in range(tasks)]


def flat(kept):
    return [np.concatenate([mask.ravel() for mask in task.values()]) for task in kept]


def record(kept, gated=True):
    "The record of a run whose tasks touched these entries."
    tasks = [f"task {i}" for i in range(len(kept))]
    support = dict(
        entries={layer: math.prod(shape) for layer, shape in SHAPES.items()},
        counts={n: [int(task[n].sum()) for task in kept] for n in reversed(SHAPES)},  # order is not meaning
        shared=[[int((a & b).sum()) for b in flat(kept)[: i + 1]] for i, a in enumerate(flat(kept))],
        touched=[int(np.any(flat(kept)[: i + 1], axis=0).sum()) for i in range(len(kept))],
    )
    zeros = {name: {n: 1 - m.mean() for n, m in task.items()} for name, task in zip(tasks, kept, strict=True)}
    configuration = dict(method=dict(gated=gated, after_task="merge"))
    about = dict(sparsity=zeros, extra=dict(support=support))
    return Run("m", "none", "s", 1, tasks, [4] * len(tasks), configuration, **about)


def overlap_of(kept):
    return recorded_overlap(record(kept))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_shares_and_ratios_are_those_of_boolean_masks(seed, density):
    kept = masks(seed, density=density)
    found, touched = overlap_of(kept), flat(kept)
    assert found.counts.tolist() == [[task[layer].sum() for task in kept] for layer in SHAPES]
    for i in range(3):
        assert found.density[i] == touched[i].mean()
        assert found.filled[i] == pytest.approx(np.any(touched[: i + 1], axis=0).mean())
        for j in range(i + 1, 3):
            both = (touched[i] & touched[j]).sum()
            smaller = min(touched[i].sum(), touched[j].sum())
            row = found.table().loc[f"task {i}, task {j}"]
            ratio = both / smaller if smaller else math.nan
            assert found.shared[i, j] == found.shared[j, i] == row["shared"] == both
            assert row["of the smaller"] == pytest.approx(ratio, abs=1e-4, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9).flatmap(lambda N: st.tuples(st.just(N), st.integers(0, N), st.integers(0, N))))
def test_chance_is_the_hypergeometric_distribution(numbers):
    N, n, m = numbers
    ways = [math.comb(m, k) * math.comb(N - m, n - k) / math.comb(N, n) for k in range(min(n, m) + 1)]
    mean = sum(k * p for k, p in enumerate(ways))
    variance = sum((k - mean) ** 2 * p for k, p in enumerate(ways))
    expected, spread = chance_overlap(n, m, N)
    assert expected == pytest.approx(mean) and spread == pytest.approx(math.sqrt(variance), abs=1e-9)


@pytest.mark.parametrize("counts", [(5, 3, 4), (3, 5, 4), (-1, 2, 4), (0, 0, 0), (math.nan, 1, 4)])
def test_chance_of_more_entries_than_there_are_is_refused(counts):
    with pytest.raises(ValueError, match="use counts from 0 to entries, entries above 0"):
        chance_overlap(*counts)


def test_chance_is_added_up_over_layers():
    found = overlap_of(masks(0))
    parts = [chance_overlap(*found.counts[i, :2], found.entries[i]) for i in range(2)]
    expected, spread = found.by_chance()
    assert expected[0, 1] == pytest.approx(parts[0][0] + parts[1][0])
    assert spread[0, 1] == pytest.approx(math.hypot(parts[0][1], parts[1][1]))
    assert found.z()[0, 1] == pytest.approx((found.shared[0, 1] - expected[0, 1]) / spread[0, 1])


def test_blind_tasks_have_a_small_z_equal_ones_a_large_one_and_full_or_empty_ones_none():
    first, second = masks(1, 2)
    z = overlap_of([first, second, first]).z()
    assert abs(z[0, 1]) < 3 < 8 < z[0, 2] and np.isnan(z[0, 0])
    full, empty = ({name: np.full(shape, on) for name, shape in SHAPES.items()} for on in (True, False))
    found = overlap_of([full, full, empty])
    assert np.isnan(found.z()).all()
    ratio = found.table()["of the smaller"]
    assert np.isnan(ratio["task 0, task 2"]) and ratio["task 0, task 1"] == 1
    assert "| task 0, task 1 | 143 | 143.0 | 0.0 | nan |" in overlap_report(record([full, full]), found)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 0.9), st.floats(0, 1), st.floats(0.05, 1))
def test_the_last_task_that_fits_finds_enough_and_the_next_does_not(density, filled, free):
    more = tasks_that_fit(density, filled, free)
    untouched = [(1 - filled) * (1 - density) ** k for k in (more - 1, more)]
    assert more == 0 or untouched[0] >= free * (1 - 1e-6)
    assert untouched[1] < free * (1 + 1e-6)


def test_the_edges_of_capacity_and_what_lies_beyond_them():
    edges = {(0, 0): math.inf, (0, 0.6): 0, (1, 0): 1, (1, 1): 0, (0.5, 0): 2, (0.5, 0.5): 1}
    assert {edge: tasks_that_fit(*edge) for edge in edges} == edges
    assert tasks_that_fit(0.2, free=0.8**3) == 4  # a whole number in spite of rounding
    assert tasks_that_fit(0.1, filled=0.9, free=0.1) == 1  # also of what is free
    for wrong in dict(density=-0.1), dict(density=2), dict(filled=1.1), dict(free=0), dict(free=2):
        with pytest.raises(ValueError, match="use shares from 0 to 1, and free above 0"):
            tasks_that_fit(**dict(density=0.1) | wrong)


def test_the_file_of_a_record_gives_the_same_counts(tmp_path):
    run = record(masks(3))
    found, again = recorded_overlap(run), recorded_overlap(Run.load(run.save(tmp_path)))
    assert again.tasks == found.tasks and np.array_equal(again.z(), found.z(), equal_nan=True)
    for name in ("entries", "counts", "shared", "touched"):
        assert np.array_equal(getattr(again, name), getattr(found, name))


def test_a_run_without_all_counts_says_why():
    run = record(masks(3))
    run.accuracy = np.where(np.tri(3) > 0, 50.0, np.nan)
    assert recorded_overlap(run).tasks == run.tasks
    run.extra["support"]["shared"].pop()
    with pytest.raises(ValueError, match="counts of 2 of its 3 tasks alone.*archive=False"):
        recorded_overlap(run)
    run.extra["support"] = None
    with pytest.raises(ValueError, match="has no counts of shared entries"):
        recorded_overlap(run)
    run.configuration["method"]["gated"] = False
    del run.extra["support"]
    with pytest.raises(ValueError, match="has no gate, so every task touches nearly all"):
        recorded_overlap(run)


def test_the_report_says_how_full_the_matrix_is_and_which_layers_are_densest():
    empty = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    kept = [{name: mask.copy() for name, mask in empty.items()} for _ in range(2)]
    kept[0]["b.v_proj"][0] = kept[1]["b.v_proj"][1] = True  # five entries each, none shared
    text = overlap_report(record(kept), overlap_of(kept))
    assert "7.0% of 143 entries are touched. At 3.50% per task" in text
    assert "18 further tasks find" in text and tasks_that_fit(5 / 143, 10 / 143) == 18
    assert "| task 1 | 5 | 3.5 | 6.99 | 6.87 |" in text and "| task 0, task 1 | 0 |" in text
    assert text.index("| b.v_proj | 14.29 | 14.29 |") < text.index("| a.q_proj | 0.0 | 0.0 |")
    alone = overlap_report(record([empty]), overlap_of([empty]))
    assert "every further task finds" in alone and "Shared entries" not in alone
