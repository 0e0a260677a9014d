"""Every method still gives the numbers that were frozen in golden/runs.json.

These tests say that numbers moved, not which are right. `python tests/golden.py` freezes them anew: that
belongs only in a commit that means to alter numbers.
"""

import copy
import json

import golden
import pytest
import torch

from jumplora.learning.methods import METHODS, base_of

STORED = json.loads(golden.STORED.read_text("utf-8"))
EXACT = STORED["machine"] == golden.machine()
PRICED = [name for name, (method, *_) in golden.RUNS.items() if base_of(method) in golden.STRENGTHS]
GATED = [name for name, (method, *_) in golden.RUNS.items() if METHODS[method].gated]


@pytest.mark.parametrize("name", golden.RUNS)
def test_a_run_gives_the_numbers_that_were_frozen(name):
    threads = torch.get_num_threads()
    found = golden.differences(STORED["runs"].get(name, {}), golden.projection(name), EXACT)
    assert not found, golden.complaint(name, found, EXACT)
    assert torch.get_num_threads() == threads


# ---- the frozen runs can tell -----------------------------------------------------------------------------


def test_every_method_is_frozen_on_both_backbones_with_and_without_accumulation():
    assert list(STORED["runs"]) == list(golden.RUNS), golden.ADVICE
    kinds = {(method, backbone, "gradient_accumulation" in settings)
             for method, backbone, settings in golden.RUNS.values()}  # fmt: skip
    usual = [name for name in METHODS if name not in golden.CONTROLS]
    assert kinds == {(m, b, a) for m in usual for b in golden.TARGETS for a in (False, True)} | {
        (name, "tiny-llama", False) for name in golden.CONTROLS
    }


def test_no_two_frozen_runs_end_with_the_same_weights():
    digests = [run["weights_sha256"] for run in STORED["runs"].values()]
    assert len(set(digests)) == len(digests)  # else a setting that tells two of them apart does nothing


@pytest.mark.parametrize("name", PRICED)
def test_a_frozen_penalty_is_neither_lost_in_the_loss_nor_all_of_it(name):
    run = STORED["runs"][name]
    shares = [p / loss for p, loss in zip(run["penalty"]["weather"], run["loss"]["weather"], strict=True)]
    assert 0.04 < max(shares) < 0.9


@pytest.mark.parametrize("name", GATED)
def test_a_frozen_gate_lets_some_entries_pass_and_not_all(name):
    run = STORED["runs"][name]
    for task, layers in run["sparsity"].items():
        held = bool(METHODS[golden.RUNS[name][0]].settings)  # few entries, late: the published gate has more
        assert 0.1 < sum(layers.values()) / len(layers) < (0.999 if held else 0.9)
        history = run["thresholds"][task]
        ramp = [0 < point["interpolation"] < 1 for point in history]
        assert history[-1]["interpolation"] == 1 and (any(ramp) if held else ramp[len(ramp) // 2])
        assert len({str(point["threshold"]) for point in history}) > 3  # it was learned, or chosen again


# ---- the comparison can tell ------------------------------------------------------------------------------


def altered(place: list, change) -> tuple[dict, dict]:
    "A frozen run, and a copy in which one value is another."
    run = STORED["runs"]["tiny-llama, ELLA + JumpLoRA"]
    other = copy.deepcopy(run)
    *way, last = place
    inner = other
    for key in way:
        inner = inner[key]
    inner[last] = change(inner[last])
    return run, other


def test_the_last_bit_of_a_number_is_seen_where_the_machine_is_the_same():
    pair = altered(["penalty", "weather", -1], lambda value: value * (1 + 2**-52))
    (found,) = golden.differences(*pair, exact=True)
    assert found.startswith("penalty.weather[9]: stored ") and ", found " in found
    assert not golden.differences(*pair, exact=False)


def test_another_machine_may_round_the_first_steps_and_nothing_more():
    place = ["loss", "topics", 1]
    assert not golden.differences(*altered(place, lambda value: value * (1 + 1e-5)), exact=False)
    assert golden.differences(*altered(place, lambda value: value * (1 + 1e-3)), exact=False)


@pytest.mark.parametrize("exact", [True, False])
def test_another_schedule_of_the_gate_is_seen_everywhere(exact):
    assert golden.differences(
        *altered(["thresholds", "topics", 2, "interpolation"], lambda g: g + 0.1), exact
    )
    assert golden.differences(*altered(["thresholds", "weather", 0, "step"], lambda step: step + 1), exact)


@pytest.mark.parametrize("exact", [True, False])
def test_a_field_or_step_that_is_gone_or_new_is_seen_everywhere(exact):
    assert golden.differences(*altered(["loss", "weather"], lambda steps: steps[:-1]), exact)
    assert golden.differences(*altered(["sparsity"], lambda tasks: tasks | {"more": {}}), exact)


def test_a_complaint_names_run_field_and_both_values_and_says_how_to_freeze():
    found = golden.differences(*altered(["accuracy", 0, 0], lambda value: 12.5), exact=True)
    text = golden.complaint("a run", found, exact=True)
    assert "'a run'" in text and "accuracy[0][0]: stored 50.0, found 12.5" in text
    assert "python tests/golden.py" in text and "means to alter numbers" in text
