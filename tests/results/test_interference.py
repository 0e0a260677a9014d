"The statistics of the study against counting by hand, and its plan."

import itertools
import math

import numpy as np
import pytest

from jumplora.results.interference import (
    bootstrap,
    common_learning,
    frontier,
    holm,
    retention_at,
    sign_flip_test,
)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, -0.5], [0.3, 0.3, 0.3, -0.3], list(np.arange(9) - 2.0)])
def test_the_sign_flip_test_counts_all_signs(values):
    totals = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = np.mean([abs(total) >= abs(sum(values)) - 1e-12 for total in totals])
    assert sign_flip_test(values) == pytest.approx(expected)


def test_many_seeds_are_drawn_and_agree_with_all_signs():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.4, 0.8):
        values = rng.normal(shift, 1, 16)
        assert sign_flip_test([*values, 0.0]) == pytest.approx(sign_flip_test(values), abs=0.01)
    false = [sign_flip_test(rng.normal(0, 1, 24), draws=2000) <= 0.05 for _ in range(400)]
    assert 0.02 < np.mean(false) < 0.09  # about 5 % where there is nothing
    for bad in ([], [math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite numbers"):
            sign_flip_test(bad)


def test_holm_multiplies_by_the_hypotheses_that_are_left_and_never_falls():
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_a_bootstrap_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(2).normal(3, 2, 400)
    low, high = bootstrap(lambda drawn: values[drawn].mean(), len(values))
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)


def test_families_that_lie_on_one_curve_do_not_differ_and_a_shift_is_found():
    rates = [2.5e-4, 5e-4, 1e-3]
    x = np.log(np.array(rates))
    one = frontier(rates, 50 + 4 * (x + 7), 20 - 6 * (x + 7))
    wide = [1.25e-4, 3e-4, 7e-4]
    y = np.log(np.array(wide))
    other = frontier(wide, 50 + 4 * (y + 7), 22 - 6 * (y + 7))
    middle = common_learning(one, other)
    assert retention_at(other, middle) - retention_at(one, middle) == pytest.approx(2, abs=1e-3)
    assert math.isnan(retention_at(one, 99)) and math.isnan(common_learning(one, one + 100))
    assert middle == pytest.approx((one[:, 0].min() + other[:, 0].max()) / 2)
    with pytest.raises(ValueError, match="at least two"):
        frontier([1e-3], [50], [20])


def test_a_curve_ends_where_more_rate_learns_less():
    rates = [1e-4, 1e-3, 1e-2]
    curve = frontier(rates, [40, 50, 45], [20, 10, 0])
    assert curve[-1, 0] == curve[:, 0].max() > 50 - 1e-9 and (np.diff(curve[:, 0]) >= 0).all()
