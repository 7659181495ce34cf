"""The small form of the critical-learning-rate experiment, from nothing to tables, figures and claims."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce_critical_learning_rate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("critical")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--output", "out"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return here / "out"


def test_every_ramp_has_a_measured_and_a_predicted_critical_learning_rate(folder):
    rates = pd.read_csv(folder / "critical_learning_rate_rates.csv")
    assert set(rates["law"]) == {"power_law", "arrhenius"}
    one = rates[rates["law"] == "power_law"]
    assert len(one) == 4 and (one["jumped"] <= one["runs"]).all()
    assert (one["measured_q05"] <= one["measured"]).all() and (one["measured"] <= one["measured_q95"]).all()
    assert np.allclose(one["gradient_descent_limit"], 2 / one["hessian_minimum"])
    seen = one[np.isfinite(one["measured"])]
    assert len(seen) >= 3
    assert (seen["measured"] / seen["gradient_descent_limit"]).between(0.05, 4.0).all()
    miss = np.log(seen["predicted"] / seen["measured"])
    assert np.sqrt(np.mean(miss**2)) < np.log(4)  # four runs a ramp, minima of a short training


def test_claims_and_figures_come_out(folder):
    record = json.loads((folder / "critical_learning_rate.json").read_text(encoding="utf-8"))
    assert len(record["claims"]) == 4 and record["command"].endswith("--quick")
    for name in record["figures"]:
        assert 5_000 < (folder / name).stat().st_size < 200_000
