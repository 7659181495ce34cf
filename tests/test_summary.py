"""What the posterior says about each parameter, from draws that are known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from escape_inference.conditions import aggregate
from escape_inference.law import load_law
from escape_inference.model import build_inputs, sort_conditions
from escape_inference.summary import parameter_summary

LAW = load_law("power_law")


def fit_of(dimension: list[float], pooling: str) -> SimpleNamespace:
    """A fit of two minima, each parameter drawn from what stands in ``sites``."""
    table = pd.DataFrame(
        {"minimum": ["a", "b"], "run": [1, 2], "learning_rate": 0.05, "batch_size": 8, "steps": [120, 90],
         "escaped": True, "loss_minimum": 0.01, "loss_barrier": 0.03, "hessian_minimum": 3.0, "hessian_saddle": 4.0,
         "effective_dimension": dimension}
    )  # fmt: skip
    inputs = build_inputs(LAW, sort_conditions(aggregate(table)), pooling)
    rng = np.random.default_rng(1)
    draw = lambda median, width: median * np.exp(width * rng.normal(size=(4, 500)))
    sites = {"temperature_scale": draw(1.1, 0.1), "log_prefactor": rng.normal(size=(4, 500))}
    sites["effective_dimension"] = np.stack([draw(2.0, 0.01), draw(6.0, 0.2)], axis=-1)
    if np.isnan(dimension).any():
        sites["effective_dimension_unmeasured"] = draw(6.0, 0.2)
    for name in inputs.pooled:
        sites[f"{name}_spread"] = rng.exponential(0.3, size=(4, 500))
    return SimpleNamespace(problem=SimpleNamespace(law=LAW, inputs=inputs), sites=sites)


def test_the_dimension_of_minima_without_a_measured_one_is_a_parameter_beside_the_measured_one():
    rows = parameter_summary(fit_of([2.0, np.nan], "complete"))
    assert list(rows) == ["temperature_scale", "effective_dimension", "effective_dimension_unmeasured", "log_prefactor"]
    row = rows["effective_dimension_unmeasured"]
    assert row["mean"] == pytest.approx(6.1, abs=0.2) and row["moved_by_data"]
    assert rows["effective_dimension"]["mean"] == pytest.approx(2.0, abs=0.01)
    assert "effective_dimension_unmeasured" not in parameter_summary(fit_of([2.0, 3.0], "complete"))


def test_with_partial_pooling_the_spreads_are_parameters_and_draws_from_their_prior_have_not_moved():
    rows = parameter_summary(fit_of([2.0, 3.0], "partial"))
    spreads = {name: row for name, row in rows.items() if name.endswith("_spread")}
    assert {"temperature_scale_spread", "log_prefactor_spread"} <= set(spreads)
    for row in spreads.values():
        assert not row["moved_by_data"] and row["theory"] is None
        assert row["sd"] == pytest.approx(row["prior_sd"], rel=0.1)
