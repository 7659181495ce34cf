"""What the data say about a parameter, where chains moved and where they did not."""

import numpy as np
import pytest
import xarray as xr

from escape_inference.identification import identifiability


def fit_with(draws: np.ndarray) -> xr.DataTree:
    """A posterior of one parameter with a standard normal prior and a likelihood of one observation at 1 ± 0.2."""
    rng = np.random.default_rng(3)
    sampled = {"log_prefactor": (("chain", "draw"), draws)}
    groups = {
        "posterior": xr.Dataset(sampled),
        "prior": xr.Dataset({"log_prefactor": (("chain", "draw"), rng.normal(size=(1, 2000)))}),
        "log_prior": xr.Dataset({"log_prefactor": (("chain", "draw"), -(draws**2) / 2)}),
        "log_likelihood": xr.Dataset(
            {"escapes": (("chain", "draw", "condition"), -((draws[..., None] - 1) ** 2) / 2 / 0.2**2)}
        ),
        "constant_data": xr.Dataset({"barrier": ("condition", ["threshold"])}),
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs["positive_parameters"] = ""
    for group in tree.children.values():
        group.coords["draw"] = np.arange(group.sizes.get("draw", 0)) if "draw" in group.sizes else []
    return tree


@pytest.fixture
def moving() -> np.ndarray:
    return np.random.default_rng(4).normal(1 / 1.04, 0.2 / np.sqrt(1.04), size=(4, 500))


def test_chains_that_moved_say_what_the_data_fix(moving):
    row = identifiability(fit_with(moving)).loc["log_prefactor"]
    assert row["status"] == "identified"
    assert row["contraction"] == pytest.approx(1 - 0.2**2 / 1.04, abs=0.01)


def test_chains_that_stood_still_say_nothing():
    row = identifiability(fit_with(np.full((4, 500), 0.7))).loc["log_prefactor"]
    assert row["status"] == "not known"
    assert "chains of the sampler stood still" in row["sentence"]
    assert "identified" not in row["sentence"]
