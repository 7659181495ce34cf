"""Saddles in a study: found, timed, resumed with the same table, and every slip named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from escape_inference.errors import InputError
from escape_inference.table import read_measurements
from escape_inference.trainers.collect import collect
from escape_inference.trainers.specs import describe
from escape_inference.trainers.study import read_study

LANDSCAPE = """
import jax.numpy as jnp
import numpy as np

def data():
    return np.array([[-0.3], [0.3]]), np.zeros(2)

def loss(prediction, target):
    return prediction + 0 * target

def wells(params, inputs):
    x, y = params["x"] + inputs[:, 0], params["y"]
    return 0.5 + x**4 / 4 - x**2 / 2 + 0.05 * x + 0.5 * (y - 0.4 * x) ** 2

def bowl(params, inputs):
    return 0.2 + 0.5 * (params["x"] + inputs[:, 0]) ** 2 + params["y"] ** 2

start = lambda key: {"x": jnp.full((), -1.0), "y": jnp.full((), -0.4)}
double_well, single_well = (start, wells), (start, bowl)
"""
"""Two samples push x to -0.3 and +0.3 of where it is. Their mean is again a tilted double well, with another curved direction."""

STUDY = """
seed = 2
loss = "landscape:loss"
[data]
name = "landscape:data"
[network]
name = "landscape:double_well"
[hessian]
effective_dimension = "parameters"
[[minima]]
label = "left"
learning_rate = 0.1
batch_size = 2
steps = 100
polish_steps = 400
polish_learning_rate = 0.3
[[saddles]]
search_learning_rate = [0.9, 1.1]
search_runs = 4
search_steps = 300
threshold = 1.9
images = 9
path_iterations = 100
learning_rate = 0.6
batch_size = 1
replicas = 24
steps = 1000
check_interval = 10
start = ["quasi_stationary", "minimum"]
"""
PARTS = 1 + 1 + 2


def mean_loss(x: float) -> float:
    """The full-batch loss along the valley y = 0.4 x, from the mean over x - 0.3 and x + 0.3."""
    shift = 0.3
    fourth = x**4 + 6 * x**2 * shift**2 + shift**4
    return 0.5 + fourth / 4 - (x**2 + shift**2) / 2 + 0.05 * x + 0.5 * 0.16 * shift**2


def stationary() -> np.ndarray:
    """The left minimum, the saddle and the right minimum."""
    return np.sort(np.roots([1, 0, 3 * 0.09 - 1, 0.05]).real)


def curvatures(x: float) -> np.ndarray:
    second = 3 * x**2 + 3 * 0.09 - 1 + 0.16
    return np.linalg.eigvalsh(np.array([[second, -0.4], [-0.4, 1.0]]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saddles")
    (folder / "landscape.py").write_text(LANDSCAPE, encoding="utf-8")
    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    collect(folder / "study.toml", folder / "out", progress=False)
    return folder / "out"


def test_the_saddle_of_a_double_well_is_found_and_stands_in_every_row(measured: Path) -> None:
    left, top, right = stationary()
    found = pd.read_csv(measured / "saddles.csv").iloc[0]
    assert found["timed"]
    assert found["usable"]
    assert found["loss_barrier"] == pytest.approx(mean_loss(top), rel=1e-5)
    assert found["hessian_saddle"] == pytest.approx(-curvatures(top)[0], rel=1e-3)
    assert found["lowest_2"] == pytest.approx(curvatures(top)[1], rel=1e-3)
    assert found["loss_beyond"] == pytest.approx(mean_loss(right), rel=1e-5)
    assert found["loss_home"] == pytest.approx(mean_loss(left), rel=1e-5)
    assert found["searched"] == 8
    assert 0 < found["runs"] == 8 - found["returned"]
    table = read_measurements(measured / "measurements.parquet")
    assert set(table["barrier"]) == {"saddle"}
    assert set(table["start"]) == {"quasi_stationary", "minimum"}
    assert set(table["check_interval"]) == {10}
    for column in ("loss_barrier", "loss_barrier_se", "hessian_saddle", "hessian_saddle_se"):
        assert table[column].to_numpy() == pytest.approx(found[column])
    assert table["loss_minimum"].to_numpy() == pytest.approx(mean_loss(left), rel=1e-3)
    assert table["hessian_minimum"].to_numpy() == pytest.approx(curvatures(left)[1], rel=1e-2)


def rate_of_the_walk(eta: float, replicas: int = 4000, looks: int = 200) -> tuple[float, float]:
    """Escapes per time unit by an independent simulation of the same SGD, in which a run has escaped when it has reached
    the bottom of the other well."""
    generator = np.random.default_rng(0)
    left, _, right = stationary()
    x, y = np.full(replicas, left), np.full(replicas, 0.4 * left)
    escapes = exposure = 0
    for step in range(looks * 10):
        at = x + generator.choice([-0.3, 0.3], replicas)
        slope_y = y - 0.4 * at
        x, y = x - eta * (at**3 - at + 0.05 - 0.4 * slope_y), y - eta * slope_y
        gone = x > right
        if step >= 500:
            escapes, exposure = escapes + gone.sum(), exposure + eta * replicas
        donors = np.flatnonzero(~gone)
        copies = generator.choice(donors, int(gone.sum()))
        x[gone], y[gone] = x[copies], y[copies]
    return escapes / exposure, escapes**0.5 / exposure


def test_the_rate_over_the_saddle_is_that_of_an_independent_simulation(measured: Path) -> None:
    conditions = pd.read_csv(measured / "conditions.csv").set_index("start")
    assert set(conditions["status"]) == {"measured"}
    assert set(conditions["barrier"]) == {"saddle"}
    steady = conditions.loc["quasi_stationary"]
    assert steady["escapes"] > 100
    assert steady["elsewhere"] == 0
    rate, error = rate_of_the_walk(0.6)
    assert abs(steady["rate"] - rate) < 4 * np.hypot(error, steady["rate_se"]), (steady["rate"], rate, error)
    table = pd.read_parquet(measured / "measurements.parquet")
    assert table["escaped"].sum() == conditions["escapes"].sum()
    assert len(table[table["start"] == "minimum"]) == 24


def test_a_campaign_killed_in_the_search_and_in_the_timing_ends_with_the_same_tables(
    folder: Path, measured: Path
) -> None:
    output = folder / "killed"
    code = "import sys; from escape_inference.trainers.collect import collect; collect(*sys.argv[1:], resume=True)"
    for parts in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "study.toml"), str(output)],
            stderr=subprocess.DEVNULL,
            env=dict(os.environ),
        )
        deadline = time.monotonic() + 240
        while len(list((output / "parts").glob("[!.]*"))) < parts:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert parts <= len(list((output / "parts").glob("[!.]*"))) < PARTS
    collect(folder / "study.toml", output, resume=True, progress=False)
    pd.testing.assert_frame_equal(
        pd.read_parquet(measured / "measurements.parquet"), pd.read_parquet(output / "measurements.parquet")
    )
    for name in ("saddles.csv", "conditions.csv", "minima.csv", "trends.csv"):
        assert (measured / name).read_bytes() == (output / name).read_bytes(), name


def test_towards_the_saddle_the_curvature_is_the_softer_one_and_scales_the_learning_rate(
    folder: Path, measured: Path
) -> None:
    path = folder / "towards.toml"
    text = STUDY.replace("[hessian]", '[hessian]\nescape_direction = "saddle"')
    text = text.replace("learning_rate = 0.6", "barrier_over_temperature = 0.5").replace(', "minimum"]', "]")
    path.write_text(text, encoding="utf-8")
    table = read_measurements(collect(path, folder / "towards", progress=False))
    left, top, _ = stationary()
    direction = np.array([1, 0.4]) / np.hypot(1, 0.4)
    second = 3 * left**2 + 3 * 0.09 - 1 + 0.16
    along = direction @ np.array([[second, -0.4], [-0.4, 1.0]]) @ direction
    assert table["hessian_minimum"].to_numpy() == pytest.approx(along, rel=1e-2)
    assert along < 0.9 * curvatures(left)[1]
    learning_rate = table["learning_rate"].iloc[0]
    wanted = np.log(mean_loss(top) / table["loss_minimum"].iloc[0]) / 0.5 / along
    assert learning_rate == pytest.approx(wanted, rel=0.01)
    minima = pd.read_csv(folder / "towards" / "minima.csv")
    assert minima["hessian_minimum"].iloc[0] == pytest.approx(curvatures(left)[1], rel=1e-2)


def test_a_minimum_without_a_way_out_is_said_to_have_none(folder: Path) -> None:
    path = folder / "bowl.toml"
    escape = (
        '[[escape]]\nlearning_rate = 0.5\nbatch_size = 1\nthreshold = 1.1\nreplicas = 8\nsteps = 100\nlooks = "exact"\n'
    )
    path.write_text(STUDY.replace("double_well", "single_well") + escape, encoding="utf-8")
    table = read_measurements(collect(path, folder / "bowl", progress=False))
    assert set(table["barrier"]) == {"threshold"}
    found = pd.read_csv(folder / "bowl" / "saddles.csv").iloc[0]
    assert found["status"] == "none"
    assert "8 of 8 runs came back to the minimum and none reached another" in found["note"]
    conditions = pd.read_csv(folder / "bowl" / "conditions.csv")
    assert list(conditions["status"]) == ["measured", "no saddle", "no saddle"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("images = 9", "image = 9", r"\[\[saddles\]\] number 1: unknown key image \(did you mean images\?\)"),
        ("images = 9", "images = 2", "images = 2: must be greater than or equal to 3"),
        ("threshold = 1.9", "threshold = 1.0", "threshold = 1.0: must be greater than 1"),
        ("search_runs = 4", "search_runs = 0", "search_runs = 0: must be greater than or equal to 1"),
        ("search_learning_rate = [0.9, 1.1]", "", "either search_learning_rate or search_temperature"),
        ("search_runs = 4", "search_temperature = 1.0", "either search_learning_rate or search_temperature"),
        ("learning_rate = 0.6", "", "one of learning_rate, temperature .* or barrier_over_temperature"),
        ("learning_rate = 0.6", "learning_rate = 0.6\ntemperature = 1.0", "one of learning_rate, temperature"),
        ("learning_rate = 0.6", "learning_rate = [0.6, 0.6]", "this condition occurs twice: left η=0.6 B=1 saddle"),
        ("check_interval = 10", "check_interval = 1001", "check_interval = 1001 is longer than steps = 1000"),
        ("check_interval = 10", "burn_in = [9, 3]", "burn_in = .9, 3. must be .minimum, maximum."),
        ("images = 9", 'minima = "x*"', r"\[\[saddles\]\] number 1: minima = 'x.' matches none of: left"),
        ('"quasi_stationary", ', '"somewhere", ', "start = 'somewhere': must be 'quasi_stationary' or 'minimum'"),
        ("[[saddles]]", "[saddles]", r"write this section with double brackets, \[\[saddles\]\]"),
        ("[hessian]", '[hessian]\nescape_direction = "down"', "escape_direction = 'down': must be 'top' or 'saddle'"),
    ],
)
def test_a_slip_in_a_saddle_section_is_named(folder: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    path = tmp_path / "study.toml"
    place = STUDY.rindex(old)
    path.write_text(STUDY[:place] + STUDY[place:].replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_study(path)


def test_a_batch_larger_than_the_data_is_refused_before_any_training(folder: Path) -> None:
    path = folder / "batch.toml"
    path.write_text(STUDY.replace("search_runs = 4", "search_batch_size = 3"), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[\[saddles\]\]: left saddles .* batch_size = 3 is more than the 2 samples"):
        collect(path, folder / "batch", progress=False)


def test_saddles_are_searched_once_for_many_conditions_and_change_the_study(folder: Path, tmp_path: Path) -> None:
    study = read_study(folder / "study.toml")
    assert [describe(spec) for spec in study.measured] == [
        "left saddles η=0.9,1.1 B=1 c=1.9",
        "left η=0.6 B=1 saddle quasi_stationary",
        "left η=0.6 B=1 saddle minimum",
    ]
    path = tmp_path / "study.toml"
    path.write_text(STUDY + STUDY[STUDY.index("[[saddles]]") :].replace("rate = 0.6", "rate = 0.5"), encoding="utf-8")
    both = read_study(path)
    assert len(both.saddles) == 1
    assert len(both.crossings) == 4
    assert both.identity != study.identity
