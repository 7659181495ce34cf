"""The scripts that repeat the published noise experiments: what they write, and numbers that a wrong formula would miss."""

import importlib
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from escape_inference.trainers.decoupling import SampleKernel

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
reproduce_noise, reproduce_decoupling = (
    importlib.import_module(f"reproduce_{name}") for name in ("noise", "decoupling")
)
across_runs = importlib.import_module("reproduction").across_runs
sys.path.remove(str(SCRIPTS))

CONCLUSIONS = {"agree", "differ", "cannot tell"}


@lru_cache
def written(name: str, folder: Path) -> dict:
    """Run a script in its quick form, as a reader would, and return its record."""
    command = [sys.executable, str(SCRIPTS / f"reproduce_{name}.py"), "--quick", "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert record["command"] == f"python scripts/reproduce_{name}.py --quick"
    assert {claim["conclusion"] for claim in record["claims"]} <= CONCLUSIONS
    for file in (*record["tables"], *record["figures"]):
        assert (folder / file).stat().st_size < 200 * 1024
    for file in record["figures"]:
        assert (folder / file).read_bytes().startswith(b"\x89PNG")
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduction")


def test_the_noise_script_measures_both_networks(folder: Path) -> None:
    record = written("noise", folder)
    assert len(record["claims"]) == 10
    assert set(record["tables"]) == {f"noise_{part}.csv" for part in ("strength", "slopes", "covariance", "alignment")}
    strength = pd.read_csv(folder / "noise_strength.csv")
    assert set(strength["network"]) == {"fully connected", "convolutional"}
    for _, one in strength.groupby(["network", "run"]):
        assert one["epoch"].tolist() == list(range(1, len(one) + 1)), "every epoch"
        assert one["loss"].iloc[-5:].mean() < 0.5 * one["loss"].iloc[0], "it learns"
    perceptron = strength[strength["network"] == "fully connected"]
    assert (perceptron["noise_strength"] > 10 * perceptron["gradient_square"]).mean() > 0.9


def test_late_in_training_the_noise_of_the_perceptron_follows_the_loss(folder: Path) -> None:
    written("noise", folder)
    slopes = pd.read_csv(folder / "noise_slopes.csv")
    late = slopes[(slopes["network"] == "fully connected") & (slopes["window"] == "late")]
    assert late["slope"].between(0.8, 1.2).all(), "a noise as the square or the root of the loss would be far outside"
    assert ((late["slope_q025"] < late["slope"]) & (late["slope"] < late["slope_q975"])).all()
    assert (late["slope_q975"] - late["slope_q025"] < 0.5).all()


def test_along_the_top_direction_the_noise_is_about_twice_loss_times_curvature(folder: Path) -> None:
    """The factor 2 is seen: without it every ratio would be twice as large."""
    written("noise", folder)
    found = pd.read_csv(folder / "noise_covariance.csv")
    assert found["predicted"].to_numpy() == pytest.approx(found["variance"] / found["ratio"], rel=1e-4)
    top = found[(found["rank"] == 1) & (found["epoch"] > 10)]
    assert top["ratio"].between(0.75, 1.6).all()
    assert top["ratio_se"].between(0.005, 0.3).all()
    points = pd.read_csv(folder / "noise_alignment.csv")
    late = points[points["epoch"] > 10]
    assert (late["alignment"] > late["alignment_if_isotropic"] + 0.1).all()
    assert late["alignment"].between(0.8, 1).all()
    assert late["alignment_se"].between(1e-4, 0.1).all()


def test_the_decoupling_script_writes_both_spectra(folder: Path) -> None:
    record = written("decoupling", folder)
    assert len(record["claims"]) == 9
    distances = pd.read_csv(folder / "decoupling_distances.csv")
    largest = distances["samples"].max()
    assert set(distances["samples"]) == {largest // 2, largest}
    spectra = pd.read_csv(folder / "decoupling_spectra.csv")
    for _, one in spectra.groupby(["run", "epoch"]):
        for side in ("coupled", "decoupled", "exchanged"):
            assert (np.diff(one[side]) <= 0).all(), "largest first"
        assert one["coupled"].iloc[0] == pytest.approx(one["decoupled"].iloc[0], rel=2)
        assert one["coupled"].iloc[0] > 0.3 * one["decoupled"].iloc[0]


def test_both_sides_are_equal_at_initialisation_and_the_smallest_fall_below_later(folder: Path) -> None:
    """At initialisation all errors are close to ±1, so every loss is close to L: a wrong factor on one side would show."""
    written("decoupling", folder)
    distances = pd.read_csv(folder / "decoupling_distances.csv")
    start = distances[distances["epoch"] == 0]
    assert (start["factor"] < 1.3).all()
    assert start["trace_ratio"].between(0.93, 1.07).all()
    assert (start["matrix_distance"] < 0.1).all()
    trained = distances[distances["epoch"] == distances["epoch"].max()].set_index("group")
    assert (trained.loc["small", "factor"] > 10).all()
    assert (trained.loc["small", "ratio"] < 0.1).all()
    assert (trained.loc["large", "factor"] < trained.loc["small", "factor"].min() / 5).all()


def test_a_known_tie_between_loss_and_gradient_is_measured_and_an_exchange_undoes_it() -> None:
    """Two groups of samples along separate directions, with losses 2 and 0.5, so that L = 1.25."""
    half = 40
    kernel = np.kron(np.eye(2), np.ones((half, half))) + 1e-6 * np.eye(2 * half)
    errors = np.repeat([2.0, 1.0], half)[:, None]
    found = SampleKernel(kernel, errors, 0.5 * errors[:, 0] ** 2)
    check = found.check()
    assert np.exp(reproduce_decoupling.log_ratio(check)[:2]) == pytest.approx([2 / 1.25, 0.5 / 1.25], rel=1e-4)
    factor = reproduce_decoupling.typical_factor(reproduce_decoupling.log_ratio(check)[:2])
    assert factor == pytest.approx(np.exp(np.sqrt((np.log(1.6) ** 2 + np.log(0.4) ** 2) / 2)), rel=1e-4)
    assert reproduce_decoupling.leading(check.decoupled) == 2
    mixed = found.check(exchanged=np.random.default_rng(0).permutation(2 * half))
    assert np.exp(reproduce_decoupling.log_ratio(check, mixed.coupled)[:2]) == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ([0.99, 1.02, 1.0, 0.98], "agree"),
        ([0.81, 0.83, 0.82, 0.8], "differ"),
        ([1.04, 1.05, 1.05, 1.06], "differ"),
        ([0.4, 1.9, 1.1, 0.7], "cannot tell"),
    ],
)
def test_a_conclusion_is_what_the_interval_over_runs_supports(slopes: list[float], expected: str) -> None:
    assert reproduce_noise.conclusion(across_runs(slopes), reproduce_noise.SLOPE_REACH) == expected


@pytest.mark.parametrize(
    ("factors", "expected"),
    [([1.3, 1.35, 1.4], "agree"), ([8.0, 9.0, 7.0], "differ"), ([1.2, 2.5, 1.9], "cannot tell")],
)
def test_spectra_agree_within_a_factor_of_two_or_not(factors: list[float], expected: str) -> None:
    interval = reproduce_decoupling.factor_interval(factors)
    assert interval[0] == pytest.approx(np.exp(np.mean(np.log(factors))))
    assert reproduce_decoupling.judge(interval, reproduce_decoupling.FACTOR) == expected


def test_the_interval_over_runs_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [across_runs(rng.normal(3, 1, 4)) for _ in range(2000)]
    assert np.mean([low < 3 < high for _, low, high in intervals]) == pytest.approx(0.9, abs=0.02)
    further = [
        across_runs(draw[:4], single=True)[1] < draw[4] < across_runs(draw[:4], single=True)[2]
        for draw in rng.normal(3, 1, (2000, 5))
    ]
    assert np.mean(further) == pytest.approx(0.9, abs=0.02)
