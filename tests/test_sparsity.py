"Overlap against numpy and scipy's definitions, filling against simulation, and the report."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jumplora.results import sparsity
from jumplora.results.sparsity import (
    Overlap,
    chance_overlap,
    expected_overlap,
    filled_share,
    jaccard,
    overlap_report,
    overlap_table,
    overlap_z,
    recorded_overlap,
    share_of_smaller,
    simulate_filling,
    support_overlap,
    tasks_that_fit,
)
from jumplora.storage.record import Run
from jumplora.storage.updates import ArchiveHeader, UpdateArchive, pack_sparse, sparse_update

torch = pytest.importorskip("torch")
SHAPES = {"a.q_proj": (12, 9), "b.v_proj": (7, 5)}


def masks(seed, tasks=3, density=0.3):
    generator = np.random.default_rng(seed)
    return [{n: generator.random(shape) < density for n, shape in SHAPES.items()} for _ in range(tasks)]


def archive(task, kept):
    tensors = {}
    for name, mask in kept.items():
        tensors |= pack_sparse(name, sparse_update(torch.tensor(mask, dtype=torch.float32)))
    about = dict(task=task, position=0, method="m", model="none", base="-", before="-", update="-")
    shapes = {name: list(mask.shape) for name, mask in kept.items()}
    return UpdateArchive(ArchiveHeader(**about, layers=shapes, sparsity=0.7, values="float32"), tensors)


def overlap_of(kept):
    return support_overlap([archive(f"task {i}", masks) for i, masks in enumerate(kept)])


def record(overlap, method=None):
    "A record that holds the same counts."
    shared = [overlap.shared[i, : i + 1].tolist() for i in range(len(overlap.tasks))]
    entries = dict(zip(SHAPES, overlap.entries.tolist(), strict=True))
    counts = dict(zip(reversed(SHAPES), overlap.counts[::-1].tolist(), strict=True))  # order is not meaning
    support = dict(entries=entries, counts=counts, shared=shared)
    extra = dict(support=support | dict(touched=overlap.touched.tolist()))
    kept = dict(zip(overlap.tasks, (overlap.counts / overlap.entries[:, None]).T, strict=True))
    zeros = {task: {n: 1 - float(x) for n, x in zip(SHAPES, row, strict=True)} for task, row in kept.items()}
    configuration = dict(method=method or dict(gated=True, after_task="merge"))
    rows = [4] * len(overlap.tasks)
    return Run("m", "none", "s", 1, overlap.tasks, rows, configuration, sparsity=zeros, extra=extra)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_counts_are_those_of_boolean_masks(seed, density):
    kept = masks(seed, density=density)
    found = overlap_of(kept)
    flat = [np.concatenate([mask.ravel() for mask in task.values()]) for task in kept]
    for i in range(3):
        assert found.density[i] == flat[i].mean()
        assert found.filled[i] == pytest.approx(np.any(flat[: i + 1], axis=0).mean())
        for j in range(3):
            both, either = (flat[i] & flat[j]).sum(), (flat[i] | flat[j]).sum()
            smaller = min(flat[i].sum(), flat[j].sum())
            assert found.shared[i, j] == both
            assert jaccard(found)[i, j] == pytest.approx(both / either if either else math.nan, nan_ok=True)
            assert share_of_smaller(found)[i, j] == pytest.approx(
                both / smaller if smaller else math.nan, nan_ok=True
            )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9).flatmap(lambda N: st.tuples(st.just(N), st.integers(0, N), st.integers(0, N))))
def test_chance_is_the_hypergeometric_distribution(numbers):
    N, n, m = numbers
    ways = [math.comb(m, k) * math.comb(N - m, n - k) / math.comb(N, n) for k in range(min(n, m) + 1)]
    mean = sum(k * p for k, p in enumerate(ways))
    variance = sum((k - mean) ** 2 * p for k, p in enumerate(ways))
    expected, spread = chance_overlap(n, m, N)
    assert expected == pytest.approx(mean) and spread == pytest.approx(math.sqrt(variance), abs=1e-9)


def test_chance_is_added_up_over_layers():
    found = overlap_of(masks(0))
    parts = [chance_overlap(*found.counts[i, :2], found.entries[i]) for i in range(2)]
    expected, spread = expected_overlap(found)
    assert expected[0, 1] == pytest.approx(parts[0][0] + parts[1][0])
    assert spread[0, 1] == pytest.approx(math.hypot(parts[0][1], parts[1][1]))
    assert overlap_z(found)[0, 1] == pytest.approx((found.shared[0, 1] - expected[0, 1]) / spread[0, 1])


def test_blind_tasks_have_a_small_z_and_equal_ones_a_large_one():
    first, second = masks(1, 2)
    z = overlap_z(overlap_of([first, second, first]))
    assert abs(z[0, 1]) < 3 < 8 < z[0, 2] and np.isnan(z[0, 0])


def test_full_and_empty_supports_have_no_z():
    full = {name: np.ones(shape, dtype=bool) for name, shape in SHAPES.items()}
    empty = {name: np.zeros(shape, dtype=bool) for name, shape in SHAPES.items()}
    found = overlap_of([full, full, empty])
    assert np.isnan(overlap_z(found)).all()
    assert np.isnan(share_of_smaller(found)[0, 2]) and jaccard(found)[0, 1] == 1
    assert "| task 0, task 1 | 143 | 143.0 | 0.0 | nan |" in overlap_report(record(found), found)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 0.9), st.floats(0, 1), st.floats(0.05, 1))
def test_the_last_task_that_fits_finds_enough_and_the_next_does_not(density, filled, free):
    more = tasks_that_fit(density, filled, free)
    untouched = [(1 - filled) * (1 - density) ** k for k in (more - 1, more)]
    assert more == 0 or untouched[0] >= free * (1 - 1e-6)
    assert untouched[1] < free * (1 + 1e-6)


@pytest.mark.parametrize(
    "density, filled, wanted", [(0, 0, math.inf), (0, 0.6, 0), (1, 0, 1), (1, 1, 0), (0.5, 0, 2)]
)
def test_the_edges_of_capacity(density, filled, wanted):
    assert tasks_that_fit(density, filled) == wanted


@pytest.mark.parametrize(
    "wrong", [dict(density=-0.1), dict(density=2), dict(filled=1.1), dict(free=0), dict(free=2)]
)
def test_shares_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="use shares from 0 to 1, and free above 0"):
        tasks_that_fit(**dict(density=0.1) | wrong)


@pytest.mark.parametrize("density", [0.003, 0.05, 0.3])
def test_a_thousand_blind_tasks_fill_the_matrix_as_the_formula_says(density):
    filled = simulate_filling(density, tasks=1000, entries=4000)
    wanted = filled_share(density, np.arange(1, 1001))
    spread = np.sqrt(wanted * (1 - wanted) / 4000)  # of a mean over entries
    assert np.abs(filled - wanted).max() < 4 * spread.max()
    assert (np.diff(filled) >= 0).all() and filled[0] == density


def test_tasks_that_crowd_fill_it_more_slowly():
    options = dict(density=0.05, tasks=60, entries=4000)
    assert (simulate_filling(**options, crowding=2.0)[2:] < simulate_filling(**options)[2:]).all()
    assert np.array_equal(simulate_filling(**options), simulate_filling(**options))


def test_the_record_gives_the_same_counts(tmp_path):
    found = overlap_of(masks(3))
    for run in (record(found), Run.load(record(found).save(tmp_path))):  # as made, and through the file
        again = recorded_overlap(run)
        assert again.tasks == found.tasks
        for name in ("entries", "counts", "shared", "touched"):
            assert np.array_equal(getattr(again, name), getattr(found, name))
        assert np.array_equal(overlap_z(again), overlap_z(found), equal_nan=True)


def test_a_run_without_counts_says_why():
    found = overlap_of(masks(3))
    run = record(found, dict(gated=False))
    run.extra = {}
    with pytest.raises(ValueError, match="has no gate, so every task touches nearly all"):
        recorded_overlap(run)
    run.configuration["method"]["gated"], run.extra["support"] = True, None
    with pytest.raises(ValueError, match="has no counts of shared entries"):
        recorded_overlap(run)
    with pytest.raises(ValueError, match="no archive to count"):
        support_overlap([])


def test_counts_of_some_tasks_are_not_taken_for_those_of_all():
    found = overlap_of(masks(3))
    run = record(found)
    run.accuracy = np.where(np.tri(3) > 0, 50.0, np.nan)
    assert recorded_overlap(run).tasks == run.tasks
    run.extra["support"]["shared"].pop()
    with pytest.raises(ValueError, match="counts of 2 of its 3 tasks alone.*archive=False"):
        recorded_overlap(run)


def test_the_report_has_every_pair_task_and_layer():
    found = overlap_of(masks(4))
    text = overlap_report(record(found), found)
    for words in (
        "task 0, task 2",
        "| task 1 |",
        "b.v_proj",
        "143 entries are touched",
        "further tasks find",
    ):
        assert words in text, words
    assert list(overlap_table(found).index) == ["task 0, task 1", "task 0, task 2", "task 1, task 2"]
    one = overlap_of(masks(4, tasks=1))
    assert "Shared entries" not in overlap_report(record(one), one)


@pytest.mark.parametrize("tasks", [1, 3])
def test_figures_are_drawn_for_one_task_and_for_many(tasks):
    found = overlap_of(masks(5, tasks=tasks))
    assert len(sparsity.overlap_figure(found).axes) == 6
    assert len(sparsity.density_figure(record(found)).axes) == 2
    assert isinstance(found, Overlap)
