"""A few hundred wild inputs: each is taken and right, or refused by a message that names it."""

import pytest
from fuzz import CHECKS, attack


@pytest.mark.parametrize("test", CHECKS, ids=lambda test: test.__name__)
def test_wild_input_is_taken_rightly_or_refused_clearly(test):
    assert attack(test, 25) > 5
