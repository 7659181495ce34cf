"""A small form of the calibration of laws by the ranks of the truth; the whole one is a script."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
CHANCE = 0.9999  #: that all ranks of one quantity stay within the band


@pytest.fixture(scope="module")
def calibrate_laws():
    sys.path.insert(0, SCRIPTS)  # for the processes, too, that it starts
    yield importlib.import_module("calibrate_laws")
    sys.path.remove(SCRIPTS)


@pytest.fixture(scope="module")
def found(calibrate_laws):
    found = calibrate_laws.ranks("constant_rate", "saddle", tables=30, jobs=1)
    assert found.pop("trustworthy").mean() > 0.9
    return found


def test_ranks_of_the_truth_are_uniform(calibrate_laws, found):
    told = calibrate_laws.verdicts(found, CHANCE)
    assert {"rate_scale", "log_prefactor", "discrepancy", "log_likelihood"} <= set(told.index)
    assert told["uniform"].all(), told.to_string()


@pytest.mark.parametrize("power", [0.35, 3.0])
def test_ranks_of_posteriors_that_are_shifted_leave_the_band(calibrate_laws, found, power):
    """What a wrong formula does: the truth is above the draws, or below, more often than not."""
    assert not calibrate_laws.verdicts(found**power, CHANCE)["uniform"].any()
