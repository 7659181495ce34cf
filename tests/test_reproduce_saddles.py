"""The comparison of escape rates over saddles with the formulas: its small form runs, and its arithmetic is right."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import reproduce_saddles

        yield reproduce_saddles
    finally:
        sys.path.remove(str(SCRIPTS))


def test_the_small_form_finds_a_saddle_and_compares_rates_with_the_formulas(script, tmp_path, monkeypatch) -> None:
    from reproduction import CONCLUSIONS, run

    monkeypatch.setattr(sys, "argv", ["reproduce_saddles.py", "--quick", "--output", str(tmp_path)])
    run("saddles", "Escape over saddles of small networks", script.__doc__, script.main)
    record = json.loads((tmp_path / "saddles.json").read_text(encoding="utf-8"))
    assert len(record["claims"]) == 5
    assert {claim["conclusion"] for claim in record["claims"]} <= set(CONCLUSIONS)
    minimum = pd.read_csv(tmp_path / "saddles_minima.csv").iloc[0]
    assert minimum["usable"]
    assert minimum["negative"] == 1
    assert minimum["loss_barrier"] > 1.02 * minimum["loss_minimum"]
    assert minimum["loss_beyond"] == pytest.approx(minimum["loss_minimum"], rel=1e-3), "the two units change places"
    rates = pd.read_csv(tmp_path / "saddles_rates.csv")
    assert (rates["escapes"] > 3).all()
    assert (rates["elsewhere"] == 0).all()
    row = rates.iloc[0]
    h, down, ratio = row["hessian_minimum"], row["hessian_saddle"], row["loss_barrier"] / row["loss_minimum"]
    exponent = row["batch_size"] / (row["learning_rate"] * h) + 1 - row["effective_dimension"] / 2
    by_hand = np.sqrt(h * down) / (2 * np.pi) * ratio**-exponent
    assert row["power_law_along"] == pytest.approx(by_hand, rel=0.1), "but for the error of n"
    assert row["ratio_power_law_along"] == pytest.approx(row["rate"] / by_hand, rel=0.15)
    assert (rates["rate_q05"] < rates["rate"]).all()
    assert (rates["rate"] < rates["rate_q95"]).all()
    assert 0.05 < row["ratio_power_law_along"] < 20, "the right order of magnitude"
    for suffix in ("rates.png",):
        assert 5_000 < (tmp_path / f"saddles_{suffix}").stat().st_size < 200 * 1024


def test_the_rate_allows_for_the_interval_between_looks(script) -> None:
    generator = np.random.default_rng(3)
    kappa, width, looks = 0.3, 2.0, 40_000
    escapes = generator.binomial(looks, -np.expm1(-kappa * width))
    row = {"escapes": escapes, "exposure": looks * width, "learning_rate": 0.1, "check_interval": 20}
    low, high = np.percentile(script.measured_rates(row, generator), (0.5, 99.5))
    assert low < kappa < high
    assert high / low < 1.1
    assert escapes / row["exposure"] < 0.9 * kappa, "without it the rate would be too low"


def test_a_straight_line_of_theory_has_slope_ratio_one(script) -> None:
    scale = np.array([2.0, 4.0, 6.0])
    h, ratio = 0.7, 1.6
    rates = 0.3 * np.exp(-np.log(ratio) / h * scale)
    frame = pd.DataFrame(
        {"minimum": "m", "batch_size": 2, "learning_rate": 2 / scale, "check_interval": 1, "hessian_minimum": h}
    ).assign(loss_minimum=0.5, loss_barrier=0.5 * ratio, exposure=1e4 / rates, escapes=10_000)
    found = script.slopes(frame, np.random.default_rng(0)).iloc[0]
    assert found["slope_ratio"] == pytest.approx(1, abs=0.02)
    assert found["slope_ratio_q05"] < found["slope_ratio"] < found["slope_ratio_q95"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([0.8, 0.9], [1.2, 1.3], "agree"),
        ([0.2, 0.1], [4.0, 5.0], "cannot tell"),
        ([1.2, 2.0], [1.9, 3.0], "differ"),
        ([0.8, 1.1, 1.1, 0.9], [1.2, 1.5, 1.5, 1.1], "cannot tell"),
    ],
)
def test_a_conclusion_says_no_more_than_the_intervals(script, low, high, expected) -> None:
    assert script.conclusion(pd.Series(low), pd.Series(high)) == expected
