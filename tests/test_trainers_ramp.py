"""Ramps of the learning rate: where they jump, and what they write."""

from collections.abc import Callable
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from escape_inference.errors import InputError
from escape_inference.row_groups import ramp_codes
from escape_inference.table import read_measurements
from escape_inference.trainers import RampRecord, learning_rate_levels, measure_ramp
from escape_inference.trainers.ramp_record import critical_median


@lru_cache
def quadratic(*curvatures: float) -> tuple[Callable, np.ndarray, np.ndarray]:
    """``L = 0.3 + sum_i h_i theta_i^2 / 2`` over samples that come in pairs of opposite targets."""
    size = len(curvatures)
    inputs = np.repeat(np.diag(np.sqrt(size * np.array(curvatures))), 2, axis=0)
    targets = np.sqrt(0.6) * np.where(np.arange(2 * size) % 2 == 0, 1.0, -1.0)
    return lambda theta, x: x @ theta, inputs, targets


@lru_cache
def noisy(curvature: float) -> tuple[Callable, np.ndarray, np.ndarray]:
    """``L = 0.3 + h theta^2 / 2`` over samples with normal targets."""
    targets = np.random.default_rng(4).normal(size=128)
    targets = np.sqrt(0.6) * (targets - targets.mean()) / targets.std()
    return lambda theta, x: x @ theta, np.full((128, 1), np.sqrt(curvature)), targets


def ramp(*curvatures: float, start: float = 0.1, **changes: object) -> RampRecord:
    apply, inputs, targets = noisy(*curvatures) if changes.get("batch_size") == 1 else quadratic(*curvatures)
    settings: dict = {
        "batch_size": len(inputs),
        "with_replacement": False,
        "steps_per_level": 200,
        "runs": 2,
        "jump_factor": 3.0,
    }
    return measure_ramp(apply, jnp.full(len(curvatures), start), inputs, targets, **(settings | changes))


@pytest.mark.parametrize("curvatures", [(2.7,), (0.4, 5.3, 1.1)])
@pytest.mark.parametrize("criterion", [{"jump_factor": 3.0}, {"jump_factor": None, "loss_barrier": 2.1}])
def test_full_batch_descent_jumps_between_the_levels_around_two_over_h(curvatures: tuple, criterion: dict) -> None:
    limit = 2 / max(curvatures)
    levels = limit * np.array([0.99, 0.997, 1.02, 1.05])
    measured = ramp(*curvatures, learning_rates=levels, steps_per_level=200, **criterion)
    for _, run in measured.critical.iterrows():
        assert run["lower"] == levels[1] < limit < run["upper"] == run["critical_learning_rate"] == levels[2]
        assert run["level"] == 3
        assert run["afterwards"] == "stayed"


def test_divergence_to_infinity_is_a_jump() -> None:
    # so few iterations that the first level does not end in the minimum itself, which nothing would leave
    measured = ramp(2.7, learning_rates=[0.1, 40.0], steps_per_level=20)
    assert measured.rows["escaped"].tolist() == [False, True] * 2
    assert measured.rows["steps"].tolist()[1] <= 5
    assert measured.critical["afterwards"].eq("diverged").all()


def test_the_iteration_of_the_jump_is_that_of_the_multiplied_displacement() -> None:
    """``theta -> (1 - eta h) theta`` from 0.1, so that the loss passes 1.3 at a computable iteration."""
    h, eta = 2.7, 0.9
    measured = ramp(h, learning_rates=[eta], jump_factor=None, loss_barrier=1.3)
    expected = int(np.ceil(np.log(np.sqrt(2 * (1.3 - 0.3) / h) / 0.1) / np.log(eta * h - 1)))
    assert measured.rows["steps"].tolist() == [expected] * 2
    assert measured.rows["escaped"].all()
    assert measured.critical["lower"].eq(0).all()
    assert "jumped at the first level" in measured.warnings[0]
    sparse = ramp(h, learning_rates=[eta], jump_factor=None, loss_barrier=1.3, check_interval=4)
    assert sparse.rows["steps"].tolist() == [-(-expected // 4) * 4] * 2


def test_rows_are_a_ramp_by_the_rules_for_measured_tables() -> None:
    levels = learning_rate_levels(0.03, 0.6, 20, "linear")
    measured = ramp(
        2.7,
        start=0.0,
        learning_rates=levels,
        batch_size=1,
        with_replacement=True,
        runs=5,
        steps_per_level=60,
        jump_factor=None,
        loss_barrier=0.8,
        run_prefix="r-",
        hessian_minimum=2.7,
    )
    table = read_measurements(measured.rows.assign(minimum="m"))
    inside, ramps = ramp_codes(table)
    assert inside.all()
    assert len(set(ramps)) == 5
    assert (table["loss_barrier"] == 0.8).all()
    assert (table["start"] == "minimum").all()
    assert (table["barrier"] == "threshold").all()
    for run, own in table.groupby("run", sort=False):
        assert str(run).startswith("r-")
        assert own["learning_rate"].tolist() == pytest.approx(levels[: len(own)])
        assert own["escaped"].tolist() == [False] * (len(own) - 1) + [True]
        assert (own["steps"].iloc[:-1] == 60).all()
        assert 1 <= own["steps"].iloc[-1] <= 60
    assert len(set(table.groupby("run").size())) > 1, "the runs have random numbers of their own"
    last = table.groupby("run")["learning_rate"].max()
    assert measured.critical.set_index("run")["critical_learning_rate"].to_dict() == last.to_dict()
    assert (measured.critical["lower"] < measured.critical["upper"]).all()


def test_runs_that_never_jump_are_censored_at_the_last_level() -> None:
    measured = ramp(2.7, learning_rates=[0.1, 0.2], runs=3)
    assert not measured.rows["escaped"].any()
    assert measured.rows["steps"].eq(200).all()
    assert measured.critical["lower"].eq(0.2).all()
    assert measured.critical["upper"].eq(np.inf).all()
    assert measured.critical["afterwards"].eq("none").all()
    assert measured.median == np.inf
    assert "3 of 3 runs never jumped" in measured.warnings[0]


def test_a_run_that_comes_back_is_told_from_one_that_stays_away() -> None:
    """Noise alone crosses a low barrier and comes back; a step into the higher well stays."""
    low = ramp(
        1.3,
        start=0.0,
        learning_rates=[0.05],
        batch_size=1,
        with_replacement=True,
        jump_factor=1.2,
        runs=6,
        steps_per_level=600,
    )
    assert (low.critical["afterwards"] == "returned").mean() > 0.5
    assert "came back" in low.warnings[-1]

    def two_wells(prediction: jnp.ndarray, target: jnp.ndarray) -> jnp.ndarray:
        theta = prediction[0]
        return 3 - jnp.exp(-((theta + 1) ** 2)) - 0.7 * jnp.exp(-((theta - 1) ** 2)) + 0 * target[0]

    away = measure_ramp(
        lambda theta, x: theta * x, jnp.full(1, -1.3), np.ones((4, 1)), np.zeros((4, 1)), batch_size=4,
        learning_rates=[0.01, 4.0], steps_per_level=30, runs=1, loss_barrier=2.2, loss=two_wells, with_replacement=False,
    )  # fmt: skip
    assert away.critical["level"].tolist() == [2]
    assert away.critical["afterwards"].tolist() == ["stayed"]


def test_the_factor_follows_the_running_loss() -> None:
    """Gradient descent lowers the loss of the first level, and the barrier of the next ones with it, to no less than L*."""
    measured = ramp(2.7, start=0.5, learning_rates=[0.05, 0.06, 0.9], steps_per_level=40)
    start = 0.3 + 0.5 * 2.7 * 0.5**2
    assert measured.critical["loss_barrier"].iloc[0] == pytest.approx(3.0 * start, rel=1e-4), "L* is the start's loss"
    rising = ramp(2.7, start=0.5, learning_rates=[0.75, 0.9], steps_per_level=4, jump_factor=1.5)
    assert rising.critical["loss_barrier"].iloc[0] > 1.5 * start


def test_the_same_seed_gives_the_same_ramp_and_another_seed_another() -> None:
    common: dict = dict(
        start=0.0, learning_rates=learning_rate_levels(0.1, 0.9, 5), batch_size=1, with_replacement=True, runs=4
    )
    first, again, other = (ramp(2.7, seed=seed, **common) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first.rows, again.rows)
    pd.testing.assert_frame_equal(first.critical, again.critical)
    assert not first.rows["steps"].equals(other.rows["steps"])


def test_the_median_has_the_coverage_of_its_order_statistics() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        draws = rng.exponential(size=25)
        edges = np.arange(0, 12, 0.25)
        place = np.searchsorted(edges, draws)
        _, low, high = critical_median(pd.DataFrame({"lower": edges[place - 1], "upper": edges[place]}))
        covered += low <= np.log(2) <= high
    assert 0.95 <= covered / 400 <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": [0.2, 0.1]}, "learning_rates: must rise"),
        ({"learning_rates": []}, "learning_rates: must rise"),
        ({"learning_rates": [-0.1, 0.1]}, "learning_rate: must be positive"),
        ({"runs": 0}, "runs"),
        ({"check_interval": 7}, "divides steps_per_level"),
        ({"jump_factor": 1.0}, "jump_factor"),
        ({"jump_factor": None}, "either loss_barrier"),
        ({"loss_barrier": 5.0}, "either loss_barrier"),
        ({"loss_barrier": 0.2, "jump_factor": None}, "above the loss at the minimum"),
        ({"batch_size": 3}, "batch_size"),
        ({"looks": "never"}, "looks"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ramp(2.7, **({"learning_rates": [0.1, 0.2]} | changes))


@pytest.mark.parametrize("arguments", [(0.2, 0.1, 4), (0.1, 0.2, 1), (0.1, 0.2, 4, "cubic"), (0.0, 0.1, 4)])
def test_levels_that_cannot_be_are_refused(arguments: tuple) -> None:
    with pytest.raises(InputError):
        learning_rate_levels(*arguments)
