"""Metrics, checked against sums written out in the test."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jumplora.learning import metrics
from jumplora.learning.metrics import (
    as_matrix,
    average_accuracy,
    average_interval,
    backward_transfer,
    forgetting,
    forward_transfer,
    interval,
    just_learned,
    micro_average,
    standard_error,
)

NAN = float("nan")
WORKED = [[80, None, None], [84, 70, None], [60, 74, 91]]


@st.composite
def triangles(draw, smallest=2):
    size = draw(st.integers(smallest, 6))
    score = st.floats(0, 100, allow_nan=False)
    return [[draw(score) if j <= i else NAN for j in range(size)] for i in range(size)]


def test_the_worked_example_by_hand():
    assert average_accuracy(WORKED) == 75
    assert just_learned(WORKED) == pytest.approx(241 / 3)
    assert backward_transfer(WORKED) == -8
    assert forgetting(WORKED) == 12
    assert forward_transfer(WORKED, [80, 76, 90]) == pytest.approx(-7)
    assert micro_average(WORKED, [100, 100, 400]) == pytest.approx(83)


@settings(max_examples=60, deadline=None)
@given(triangles())
def test_all_metrics_equal_their_sums_written_out(a):
    last, T = a[-1], len(a)
    assert average_accuracy(a) == pytest.approx(math.fsum(last) / T, rel=1e-12, abs=1e-9)
    assert just_learned(a) == pytest.approx(math.fsum(a[j][j] for j in range(T)) / T, abs=1e-9)
    bwt = math.fsum(last[j] - a[j][j] for j in range(T - 1)) / (T - 1)
    assert backward_transfer(a) == pytest.approx(bwt, abs=1e-9)
    fall = math.fsum(max(a[i][j] for i in range(j, T)) - last[j] for j in range(T - 1)) / (T - 1)
    assert forgetting(a) == pytest.approx(fall, abs=1e-9)
    scratch = [50.0] * T
    assert forward_transfer(a, scratch) == pytest.approx(math.fsum(last) / T - 50, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(triangles())
def test_forgetting_is_at_least_the_size_of_a_backward_loss_and_never_negative(a):
    assert forgetting(a) >= -backward_transfer(a) - 1e-9
    assert forgetting(a) >= 0


@settings(max_examples=40, deadline=None)
@given(triangles(smallest=1), st.integers(1, 1000))
def test_micro_and_macro_agree_when_tasks_are_of_one_size(a, rows):
    assert micro_average(a, [rows] * len(a)) == pytest.approx(average_accuracy(a), abs=1e-9)


def test_scores_of_tasks_not_learned_yet_change_nothing():
    zero_shot = np.array(as_matrix(WORKED))
    zero_shot[np.triu_indices(3, 1)] = 99.0
    for metric in (average_accuracy, just_learned, backward_transfer, forgetting):
        assert metric(zero_shot) == metric(WORKED)


def test_the_input_is_not_changed():
    a = as_matrix(WORKED)
    before = a.copy()
    for metric in (average_accuracy, just_learned, backward_transfer, forgetting):
        metric(a)
    assert np.array_equal(a, before, equal_nan=True)


@pytest.mark.parametrize(
    "metric, missing",
    [(average_accuracy, (2, 1)), (just_learned, (1, 1)), (backward_transfer, (0, 0)),
     (backward_transfer, (2, 2)), (forgetting, (1, 0))],
)  # fmt: skip
def test_a_missing_score_is_named(metric, missing):
    a = as_matrix(WORKED)
    a[missing] = NAN
    with pytest.raises(ValueError, match=rf"accuracy\[{missing[0]}, {missing[1]}\], which was not measured"):
        metric(a)


def test_a_missing_score_that_a_metric_does_not_read_is_no_error():
    a = as_matrix(WORKED)
    a[1, 0] = NAN
    assert backward_transfer(a) == -8 and average_accuracy(a) == 75


def test_many_missing_scores_are_listed_in_short():
    with pytest.raises(ValueError, match="and 4 more, which were not measured"):
        average_accuracy(np.full((10, 10), NAN))


@pytest.mark.parametrize("metric", [backward_transfer, forgetting])
def test_one_task_cannot_be_forgotten(metric):
    with pytest.raises(ValueError, match="there is 1 task"):
        metric([[80.0]])


@pytest.mark.parametrize("bad", [[[1, 2]], [1, 2], [], [[]], 5.0])
def test_a_matrix_that_is_not_square_is_refused(bad):
    with pytest.raises(ValueError, match=r"use \(T, T\)"):
        as_matrix(bad)


@pytest.mark.parametrize("score", [-0.1, 100.1, math.inf, -math.inf])
def test_a_score_outside_percent_is_refused_with_its_place(score):
    with pytest.raises(ValueError, match=r"accuracy\[1, 0\]"):
        as_matrix([[50, None], [score, 50]])


@pytest.mark.parametrize("scratch", [[80, 76], [80, NAN, 90], [80, 101, 90]])
def test_forward_transfer_needs_a_score_for_every_task(scratch):
    with pytest.raises(ValueError, match="scratch"):
        forward_transfer(WORKED, scratch)


@pytest.mark.parametrize("rows", [[1, 2], [1, 2, 0], [1, 2, -3]])
def test_the_micro_mean_needs_a_count_for_every_task(rows):
    with pytest.raises(ValueError, match="rows"):
        micro_average(WORKED, rows)


def test_the_standard_error_of_eighty_rows_is_about_five_points():
    assert standard_error(70, 80) == pytest.approx(100 * (0.7 * 0.3 / 80) ** 0.5)
    assert standard_error(0, 80) == 0


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 500), st.data())
def test_the_ends_of_wilsons_interval_are_where_the_score_test_just_fails(rows, data):
    right = data.draw(st.integers(0, rows))
    p = right / rows
    for end in interval(100 * p, rows):
        q = end / 100
        assert abs(p - q) == pytest.approx(1.96 * math.sqrt(q * (1 - q) / rows), abs=1e-6)


def test_wilsons_interval_covers_the_true_share_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for true in (0.05, 0.5, 0.9):
        right = rng.binomial(80, true, 4000)
        ends = {int(r): interval(100 * int(r) / 80, 80) for r in np.unique(right)}
        covered = np.mean([ends[int(r)][0] <= 100 * true <= ends[int(r)][1] for r in right])
        assert 0.92 < covered < 0.98


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng, shares = np.random.default_rng(1), np.array([0.3, 0.6, 0.8, 0.95])
    scores = 100 * rng.binomial(80, shares, (3000, 4)) / 80
    ends = [average_interval(row.tolist(), [80] * 4) for row in scores]
    covered = np.mean([low <= 100 * shares.mean() <= high for low, high in ends])
    assert 0.93 < covered < 0.97


def test_the_interval_of_one_score_is_wilsons():
    assert average_interval([62.5], [80]) == pytest.approx(interval(62.5, 80))


@pytest.mark.parametrize("percent, rows", [(-1, 10), (101, 10), (50, 0), (NAN, 10)])
def test_an_interval_needs_percent_and_rows(percent, rows):
    with pytest.raises(ValueError):
        interval(percent, rows)


def test_the_figure_marks_the_cells_that_each_number_reads():
    filled = {}
    for ax in metrics.cells_figure(WORKED).axes:
        filled[ax.get_title(loc="left").split(":")[0]] = ~np.ma.getmaskarray(ax.images[0].get_array())
    assert filled["average accuracy"].tolist() == [[False] * 3, [False] * 3, [True] * 3]
    assert np.array_equal(filled["just learned"], np.eye(3, dtype=bool))
    assert filled["backward transfer"].sum() == 4 and not filled["backward transfer"][:, 2].any()
    assert filled["forgetting"].sum() == 5
