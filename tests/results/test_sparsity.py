"Overlap against numpy and scipy's definitions, filling against simulation, and the report."

import math

import numpy as np
import pytest
from equal_runs import entries
from hypothesis import given, settings
from hypothesis import strategies as st

from jumplora.results.sparsity import (
    chance_overlap,
    density_figure,
    overlap_figure,
    overlap_report,
    recorded_overlap,
    support_overlap,
    tasks_that_fit,
)
from jumplora.storage.record import Run
from jumplora.storage.updates import ArchiveHeader, UpdateArchive, sparse_update

torch = pytest.importorskip("torch")
SHAPES = {"a.q_proj": (12, 9), "b.v_proj": (7, 5)}


def masks(seed, tasks=3, density=0.3):
    generator = np.random.default_rng(seed)
    return [{n: generator.random(shape) < density for n, shape in SHAPES.items()} for _ in range(tasks)]


def archive(task, kept):
    tensors = {}
    for name, mask in kept.items():
        tensors |= entries(name, sparse_update(torch.tensor(mask, dtype=torch.float32)))
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
            assert found.smaller[i, j] == smaller
            if i < j:
                row = found.table().loc[f"task {i}, task {j}"]
                ratios = [both / whole if whole else math.nan for whole in (either, smaller)]
                shown = [row["Jaccard"], row["of the smaller"]]
                assert row["shared"] == both and shown == pytest.approx(ratios, abs=1e-4, nan_ok=True)


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
    expected, spread = found.by_chance()
    assert expected[0, 1] == pytest.approx(parts[0][0] + parts[1][0])
    assert spread[0, 1] == pytest.approx(math.hypot(parts[0][1], parts[1][1]))
    assert found.z()[0, 1] == pytest.approx((found.shared[0, 1] - expected[0, 1]) / spread[0, 1])


def test_blind_tasks_have_a_small_z_and_equal_ones_a_large_one():
    first, second = masks(1, 2)
    z = overlap_of([first, second, first]).z()
    assert abs(z[0, 1]) < 3 < 8 < z[0, 2] and np.isnan(z[0, 0])


def test_full_and_empty_supports_have_no_z():
    full = {name: np.ones(shape, dtype=bool) for name, shape in SHAPES.items()}
    empty = {name: np.zeros(shape, dtype=bool) for name, shape in SHAPES.items()}
    found = overlap_of([full, full, empty])
    assert np.isnan(found.z()).all()
    table = found.table()
    assert np.isnan(table["of the smaller"]["task 0, task 2"]) and table["Jaccard"]["task 0, task 1"] == 1
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


def test_the_record_gives_the_same_counts(tmp_path):
    found = overlap_of(masks(3))
    for run in (record(found), Run.load(record(found).save(tmp_path))):  # as made, and through the file
        again = recorded_overlap(run)
        assert again.tasks == found.tasks
        for name in ("entries", "counts", "shared", "touched"):
            assert np.array_equal(getattr(again, name), getattr(found, name))
        assert np.array_equal(again.z(), found.z(), equal_nan=True)


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
    words = ("task 0, task 2", "| task 1 |", "b.v_proj", "143 entries are touched", "further tasks find")
    assert [word for word in words if word not in text] == []
    assert list(found.table().index) == ["task 0, task 1", "task 0, task 2", "task 1, task 2"]
    one = overlap_of(masks(4, tasks=1))
    assert "Shared entries" not in overlap_report(record(one), one)


def test_the_report_says_how_full_the_matrix_is_and_which_layers_are_densest():
    kept = [{"a.q_proj": np.zeros((12, 9), bool), "b.v_proj": np.zeros((7, 5), bool)} for _ in range(2)]
    kept[0]["b.v_proj"][0] = kept[1]["b.v_proj"][1] = True  # five entries each, none shared
    found = overlap_of(kept)
    text = overlap_report(record(found), found)
    assert "7.0% of 143 entries are touched. At 3.50% per task" in text
    assert "18 further tasks find" in text and tasks_that_fit(5 / 143, 10 / 143) == 18
    assert "| task 1 | 5 | 3.5 | 6.99 | 6.87 |" in text
    assert text.index("| b.v_proj | 14.29 | 14.29 |") < text.index("| a.q_proj | 0.0 | 0.0 |")
    empty = overlap_of([{name: np.zeros(shape, bool) for name, shape in SHAPES.items()}])
    assert "every further task finds" in overlap_report(record(empty), empty)


@pytest.mark.parametrize("tasks", [1, 3])
def test_figures_are_drawn_for_one_task_and_for_many(tasks):
    found = overlap_of(masks(5, tasks=tasks))
    axes = overlap_figure(found).axes
    assert len(axes) == 6 and axes[0].images[0].get_clim() == axes[1].images[0].get_clim()
    assert axes[2].images[0].get_array().shape == (tasks, tasks)
    kept = density_figure(record(found)).axes[0].images[0].get_array()
    assert np.allclose(kept, 100 * found.counts / found.entries[:, None])
