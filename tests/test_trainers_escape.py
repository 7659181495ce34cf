"""Escape times of SGD: against exact rates, and in the corner cases."""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from escape_inference.errors import InputError
from escape_inference.trainers import EscapeRecord, Minimum, UnstableMinimum, engines, lanes, measure_escape
from escape_inference.trainers.looks import Gate, Limits
from escape_inference.trainers.losses import mean_square
from escape_inference.trainers.optimizers import named_optimizer
from escape_inference.trainers.screens import Screens, choose_screens, subsample
from escape_inference.trainers.sgd import make_recipe

CURVATURE, LOSS_MINIMUM, STRETCH = 2.0, 0.3, 10.0


@lru_cache
def ideal_world(dimension: int) -> tuple[Callable, Callable, np.ndarray, np.ndarray]:
    """A quadratic well whose batch noise has covariance ``STRETCH^2 2 L(theta) h / B`` in every direction, exactly.

    Every sample has the loss ``L = L* + h |theta|^2 / 2``; only its gradient carries noise. The temperature of SGD is
    then ``STRETCH^2 eta h / B``, which may be large while a single step stays small.
    """
    noise = np.random.default_rng(3).normal(size=(512, dimension))
    noise -= noise.mean(0)
    noise = (noise @ np.linalg.inv(np.linalg.cholesky(noise.T @ noise / 512)).T).astype(np.float32)

    def loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
        level = LOSS_MINIMUM + 0.5 * CURVATURE * jnp.sum(prediction**2)
        fixed, here = jax.lax.stop_gradient(level), jax.lax.stop_gradient(prediction)
        return level + STRETCH * jnp.sqrt(2 * CURVATURE * fixed) * jnp.dot(target, prediction - here)

    def apply(theta: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.broadcast_to(theta, (len(inputs), dimension))

    return apply, loss, np.zeros((512, 1), np.float32), noise


def looked_at_barrier(ratio: float, learning_rate: float, batch_size: int) -> float:
    """The loss threshold that SGD must be given to escape as the diffusion does at ``ratio`` (Broadie et al. 1997)."""
    radius = np.sqrt(2 * LOSS_MINIMUM * (ratio - 1) / CURVATURE)
    step = STRETCH * learning_rate * np.sqrt(2 * CURVATURE * LOSS_MINIMUM * ratio / batch_size)
    return LOSS_MINIMUM + 0.5 * CURVATURE * (radius - 0.5826 * step) ** 2


@pytest.mark.parametrize(
    ("dimension", "temperature", "ratio", "rate"),
    [(1, 0.1, 1.4, 0.05588), (4, 0.1, 1.4, 0.69012), (4, 0.1, 1.7, 0.18667)],
)
def test_fleming_viot_gives_the_leading_eigenvalue_of_the_killed_diffusion(
    dimension: int, temperature: float, ratio: float, rate: float
) -> None:
    apply, loss, inputs, targets = ideal_world(dimension)
    batch_size = 10
    learning_rate = temperature * batch_size / (STRETCH**2 * CURVATURE)
    record = measure_escape(
        apply,
        jnp.zeros(dimension),
        inputs,
        targets,
        learning_rate=learning_rate,
        batch_size=batch_size,
        loss_barrier=looked_at_barrier(ratio, learning_rate, batch_size),
        replicas=400,
        steps=6000 if dimension == 1 else 3000,
        loss=loss,
        seed=5,
        burn_in=(600, 2000),
    )
    assert record.escapes > 500
    assert record.rate / CURVATURE == pytest.approx(rate, abs=3 * record.rate_se / CURVATURE + 0.02 * rate)
    gaps = record.rows.loc[record.rows["escaped"], "steps"]
    if gaps.mean() * learning_rate * CURVATURE < 3:  # short against the run, so that censoring does not matter
        assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)
    assert record.settled
    assert record.missed_fraction is None


def test_times_from_the_minimum_are_longer_than_the_quasi_stationary_gaps() -> None:
    apply, loss, inputs, targets = ideal_world(4)
    learning_rate, batch_size = 0.005, 10
    record = measure_escape(
        apply,
        jnp.zeros(4),
        inputs,
        targets,
        learning_rate=learning_rate,
        batch_size=batch_size,
        loss_barrier=looked_at_barrier(1.4, learning_rate, batch_size),
        replicas=1000,
        steps=3000,
        loss=loss,
        seed=6,
        start="minimum",
    )
    times = record.rows.loc[record.rows["escaped"], "steps"]
    assert len(times) == 1000
    assert 1 / (times.mean() * learning_rate * CURVATURE) == pytest.approx(0.77 * 0.69012, rel=0.06)
    assert times.std() / times.mean() < 0.9


@lru_cache
def one_weight(spread: float = 1.0, samples: int = 64) -> tuple[Callable, np.ndarray, np.ndarray]:
    """``L = theta^2 / 2 + spread^2 / 2``: h* = 1."""
    targets = spread * np.where(np.arange(samples) % 2 == 0, 1.0, -1.0).astype(np.float32)
    return lambda theta, inputs: inputs * theta, np.ones(samples, np.float32), targets


def quick(**changes: object) -> EscapeRecord:
    apply, inputs, targets = one_weight()
    settings: dict = dict(learning_rate=0.2, batch_size=2, loss_barrier=0.6, replicas=12, steps=300, seed=1) | changes
    return measure_escape(apply, jnp.zeros(1), inputs, targets, **settings)


def test_rows_are_the_gaps_between_escapes_and_cover_every_iteration() -> None:
    record = quick()
    rows = record.rows
    slots = rows["run"].str[:3]
    assert rows["run"].is_unique
    assert rows.groupby(slots)["steps"].sum().eq(300).all()
    assert rows.groupby(slots)["escaped"].agg(lambda escaped: escaped.iloc[:-1].all()).all()
    assert rows["escaped"].sum() == record.escapes == record.trend["escapes"].sum()
    assert record.exposure == pytest.approx(0.2 * 300 * 12) == pytest.approx(record.trend["exposure"].sum())
    assert set(rows.columns) == {
        "run",
        "learning_rate",
        "batch_size",
        "steps",
        "escaped",
        "check_interval",
        "barrier",
        "start",
        "loss_minimum",
        "loss_barrier",
    }
    assert rows["loss_minimum"].unique() == pytest.approx(0.5)
    assert (rows["start"] == "quasi_stationary").all()
    assert (rows["barrier"] == "threshold").all()


def test_without_noise_nothing_escapes_and_every_row_is_censored() -> None:
    for start in ("minimum", "quasi_stationary"):
        record = quick(batch_size=64, with_replacement=False, start=start, hessian_minimum=1.0, run_prefix="a-")
        assert record.escapes == 0
        assert record.rate == 0
        assert record.rate_se == pytest.approx(1 / record.exposure)
        assert len(record.rows) == 12
        assert not record.rows["escaped"].any()
        assert (record.rows["steps"] == 300).all()
        assert (record.rows["hessian_minimum"] == 1.0).all()
        assert record.rows["run"].str.startswith("a-").all()
        assert record.trend["median_loss"].to_numpy() == pytest.approx(0.5)


def test_noise_free_descent_from_a_slope_escapes_at_the_computed_iteration() -> None:
    """Gradient descent beyond eta = 2/h multiplies theta by 1 - eta h at each step."""
    apply, inputs, targets = one_weight()
    record = measure_escape(
        apply,
        jnp.full(1, 0.01),
        inputs,
        targets,
        learning_rate=2.5,
        batch_size=64,
        with_replacement=False,
        loss_barrier=0.5 + 0.5 * 0.2**2,
        replicas=3,
        steps=50,
        start="minimum",
    )
    expected = int(np.ceil(np.log(0.2 / 0.01) / np.log(1.5)))
    assert record.rows["steps"].tolist() == [expected] * 3
    assert record.rows["escaped"].all()


def test_looking_every_few_iterations_finds_escapes_at_multiples_only() -> None:
    exact, sparse = quick(start="minimum"), quick(start="minimum", check_interval=7)
    assert (sparse.rows.loc[sparse.rows["escaped"], "steps"] % 7 == 0).all()
    assert (sparse.rows.loc[~sparse.rows["escaped"], "steps"] == 294).all()
    assert (sparse.rows["steps"].to_numpy() >= np.minimum(exact.rows["steps"], 294)).all()
    gaps = quick(check_interval=7)
    assert (gaps.rows["steps"] % 7 == 0).all()
    assert gaps.rows.groupby(gaps.rows["run"].str[:3])["steps"].sum().eq(294).all()


def test_a_wide_interval_of_looks_is_flagged_only_against_a_known_curvature() -> None:
    def flagged(**changes: object) -> list[str]:
        return [warning for warning in quick(**changes).warnings if "check_interval" in warning]

    assert "between two looks" in flagged(check_interval=7, hessian_minimum=1.0)[0]
    assert "overshot" in flagged(hessian_minimum=1.01)[0]
    assert not flagged(check_interval=7)
    assert not flagged(hessian_minimum=0.99)


def test_an_unstable_minimum_is_refused_with_its_learning_rate() -> None:
    apply, inputs, targets = one_weight()
    unstable: dict = {"learning_rate": 2.5, "batch_size": 64, "with_replacement": False, "replicas": 4, "steps": 100}
    with pytest.raises(UnstableMinimum, match=r"learning rate 2\.5 every replica exceeded .* unstable"):
        measure_escape(apply, jnp.full(1, 0.01), inputs, targets, loss_barrier=0.6, **unstable)


@pytest.mark.parametrize("few_parameters", [0, 4096])
def test_a_run_that_diverges_between_looks_has_escaped(few_parameters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "FEW_PARAMETERS", few_parameters)
    record = quick(learning_rate=1e20, check_interval=20, start="minimum", loss_barrier=1e30)
    assert record.rows["escaped"].all()
    assert (record.rows["steps"] == 20).all()


@lru_cache
def network() -> tuple[Callable, dict, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 3)).astype(np.float32)
    targets = rng.normal(size=2000).astype(np.float32)
    solution = np.linalg.lstsq(inputs, targets, rcond=None)[0].astype(np.float32)
    return (lambda params, x: x @ params["weight"]), {"weight": solution}, inputs, targets


def measure_network(
    monkeypatch: pytest.MonkeyPatch, few_parameters: int, ratio: float = 1.12, **changes: object
) -> EscapeRecord:
    monkeypatch.setattr(engines, "FEW_PARAMETERS", few_parameters)
    apply, params, inputs, targets = network()
    level = 0.5 * np.mean((inputs @ params["weight"] - targets) ** 2)
    settings: dict = {"learning_rate": 0.1, "batch_size": 4, "replicas": 10, "steps": 600, "seed": 2} | changes
    return measure_escape(apply, params, inputs, targets, loss_barrier=ratio * level, **settings)


def test_results_do_not_depend_on_how_replicas_are_batched_or_threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = measure_network(monkeypatch, 0, replica_batch=1, threads=1)
    other = measure_network(monkeypatch, 0, replica_batch=7, threads=3)
    again = measure_network(monkeypatch, 0)
    assert one.escapes > 20
    pd.testing.assert_frame_equal(one.rows, other.rows)
    pd.testing.assert_frame_equal(one.rows, again.rows)
    assert (one.missed_fraction, one.full_looks) == (other.missed_fraction, other.full_looks)
    different = measure_network(monkeypatch, 0, seed=3)
    assert not one.rows["steps"].equals(different.rows["steps"])


@pytest.mark.parametrize("changes", [{}, {"start": "minimum"}, {"with_replacement": False}, {"optimizer": optax.adam}])
def test_lanes_and_separate_replicas_give_the_same_escapes(monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    changes = (
        {"learning_rate": 0.05, "looks": "exact"} | changes if "optimizer" in changes else {"looks": "exact"} | changes
    )
    lanes = measure_network(monkeypatch, 4096, burn_in=(150, 150), **changes)
    separate = measure_network(monkeypatch, 0, burn_in=(150, 150), **changes)
    assert lanes.escapes > 5
    pd.testing.assert_frame_equal(lanes.rows, separate.rows)


@pytest.mark.parametrize(("few_parameters", "replicas"), [(4096, 200), (0, 40)])
def test_screened_looks_see_the_same_escapes_as_exact_ones(
    monkeypatch: pytest.MonkeyPatch, few_parameters: int, replicas: int
) -> None:
    settings: dict = {"replicas": replicas, "start": "minimum", "learning_rate": 0.2, "ratio": 1.3}
    exact = measure_network(monkeypatch, 4096, looks="exact", **settings)
    screened = measure_network(monkeypatch, few_parameters, looks="screened", **settings)
    assert screened.screens is not None
    assert screened.missed_fraction is not None
    assert screened.missed_fraction < 0.01 + 3 * screened.missed_fraction_se
    assert screened.full_looks < 0.3 * exact.full_looks
    np.testing.assert_allclose(screened.trend["median_loss"], exact.trend["median_loss"].median(), rtol=0.1)
    later = screened.rows["steps"] != exact.rows["steps"]
    assert exact.escapes > 0.9 * replicas
    assert later.mean() <= 0.01
    assert (screened.rows["steps"] >= exact.rows["steps"]).all()


def test_the_gate_shuts_without_missing_crossings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random looks often enough to tell; the gate must have been shut for the test to mean something."""
    thresholds = []
    make_gate = Screens.gate

    def observed(self: Screens, barrier: float, loss_minimum: float) -> object:
        gate = make_gate(self, barrier, loss_minimum)
        thresholds.append(float(gate.limits.threshold))
        return gate

    monkeypatch.setattr(Screens, "gate", observed)
    settings: dict = {"replicas": 24, "learning_rate": 0.2, "ratio": 1.5, "steps": 4000}
    record = measure_network(monkeypatch, 0, looks="screened", **settings)
    assert record.escapes > 50
    assert thresholds[0] == 0
    assert np.mean(np.array(thresholds) > 0) > 0
    assert record.missed_fraction is not None
    assert record.missed_fraction < 0.01 + 3 * record.missed_fraction_se


@pytest.mark.parametrize(("few_parameters", "stage"), [(4096, "limits"), (0, "gate")])
def test_a_stage_that_is_blind_is_reported_as_missing_crossings(
    monkeypatch: pytest.MonkeyPatch, few_parameters: int, stage: str
) -> None:
    never = Limits(jnp.float32(1e9), jnp.float32(0.0))
    blind = {"limits": never, "gate": Gate(never, jnp.float32(1e9))}[stage]
    monkeypatch.setattr(Screens, stage, lambda *_: blind)
    record = measure_network(monkeypatch, few_parameters, looks="screened", replicas=60, steps=800)
    assert record.missed_fraction > 0.3
    assert any("missed" in warning for warning in record.warnings)


def test_a_subsample_estimates_the_mean_without_bias() -> None:
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=2000) * rng.exponential(size=2000)
    typical = losses * rng.uniform(0.5, 2.0, size=2000)
    estimates = []
    for _ in range(400):
        indices, weights = subsample(typical, 40, rng)
        estimates.append(losses[indices] @ weights)
    assert np.mean(estimates) == pytest.approx(losses.mean(), abs=4 * np.std(estimates) / 20)
    assert np.std(estimates) < losses.std() / np.sqrt(40) / 2


def test_screens_are_refused_where_the_loss_is_always_near_the_barrier() -> None:
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=(32, 2000))
    mean = float(losses.mean())
    assert choose_screens(losses, losses, mean, 0, gated=False) is None
    assert choose_screens(losses, 5 * losses, 5 * mean, 0, gated=False) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 65}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"replicas": 1}, "replicas"),
        ({"loss_barrier": 0.5}, "loss_barrier"),
        ({"loss_barrier": float("inf")}, "loss_barrier"),
        ({"start": "saddle"}, "quasi_stationary, minimum"),
        ({"looks": "none"}, "auto, exact, screened"),
        ({"check_interval": 301}, "check_interval"),
        ({"check_interval": 2, "looks": "screened"}, "screened"),
        ({"replica_batch": 0}, "replica_batch"),
        ({"burn_in": (5, 2)}, "burn_in"),
        ({"hessian_minimum": -1.0}, "hessian_minimum"),
        ({"loss": "huber"}, "mean_square"),
        ({"loss": lambda prediction, target: jnp.ones(2)}, "one number"),
        ({"optimizer": 3}, "optimizer"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quick(**changes)


@pytest.mark.parametrize("few_parameters", [0, 4096])
def test_double_precision_is_accepted(few_parameters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, params, inputs, targets = network()
    monkeypatch.setattr(engines, "FEW_PARAMETERS", few_parameters)
    with jax.enable_x64(True):
        wide = {"weight": jnp.asarray(params["weight"], jnp.float64)}
        level = 0.5 * np.mean((inputs @ params["weight"] - targets) ** 2)
        settings: dict = {
            "learning_rate": 0.1,
            "batch_size": 4,
            "replicas": 3,
            "steps": 60,
            "loss_barrier": 1.12 * level,
        }
        for looks in ("exact", "screened"):
            record = measure_escape(
                apply, wide, inputs.astype(float), targets.astype(float), looks=looks, start="minimum", **settings
            )
            assert len(record.rows) == 3


def test_a_network_without_a_hash_is_accepted() -> None:
    class Network:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, theta: jax.Array, inputs: jax.Array) -> jax.Array:
            return inputs * theta

    _, inputs, targets = one_weight()
    settings: dict = {
        "learning_rate": 0.2,
        "batch_size": 2,
        "loss_barrier": 0.6,
        "replicas": 12,
        "steps": 300,
        "seed": 1,
    }
    record = measure_escape(Network(), jnp.zeros(1), inputs, targets, **settings)
    pd.testing.assert_frame_equal(record.rows, quick().rows)


def test_bad_data_is_refused() -> None:
    apply, inputs, targets = one_weight()
    common: dict = {"learning_rate": 0.1, "batch_size": 1, "loss_barrier": 1.0, "replicas": 2, "steps": 5}
    with pytest.raises(InputError, match="targets: every value must be finite"):
        measure_escape(apply, jnp.zeros(1), inputs, np.full(64, np.nan), **common)
    with pytest.raises(InputError, match="same number of samples"):
        measure_escape(apply, jnp.zeros(1), inputs, targets[:-1], **common)
    with pytest.raises(InputError, match="must match"):
        measure_escape(lambda p, x: jnp.ones((64, 2)) * p, jnp.zeros(1), inputs, targets, **common)
    with pytest.raises(InputError, match="does not accept"):
        measure_escape(lambda p, x: x @ jnp.ones((3, 3)), jnp.zeros(1), inputs, targets, **common)


def test_progress_reaches_its_total_and_an_interrupt_leaves_at_once() -> None:
    heard: list[tuple[int, int, str]] = []
    quick(progress=lambda *report: heard.append(report))
    assert heard[-1][:2] == (300, 300)
    assert any("burn-in" in message for _, _, message in heard)
    assert all(earlier[0] <= later[0] for earlier, later in pairwise(heard))

    def interrupt(done: int, total: int, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(progress=interrupt)


def test_the_loss_of_a_saved_minimum_is_used() -> None:
    apply, inputs, targets = one_weight()
    minimum = Minimum(jnp.zeros(1), 0.5, 0.0)
    record = measure_escape(
        apply,
        minimum,
        inputs,
        targets,
        learning_rate=0.2,
        batch_size=2,
        loss_barrier=0.6,
        replicas=12,
        steps=300,
        seed=1,
    )
    pd.testing.assert_frame_equal(record.rows, quick().rows)


@lru_cache
def many_samples() -> tuple[Callable, Minimum, np.ndarray, np.ndarray]:
    """A linear regression with so many samples that looks may be screened, and where its loss is lowest."""
    rng = np.random.default_rng(8)
    inputs, targets = rng.normal(size=(2000, 3)).astype(np.float32), rng.normal(size=2000).astype(np.float32)
    best = np.linalg.lstsq(inputs, targets)[0]
    loss = 0.5 * float(np.mean((inputs @ best - targets) ** 2))
    return (lambda theta, x: x @ theta), Minimum(jnp.asarray(best), loss, 0.0), inputs, targets


def test_a_pilot_that_never_comes_near_the_barrier_leaves_every_look_exact() -> None:
    apply, minimum, *data = many_samples()
    common: dict = {"replicas": 4, "steps": 50}
    with pytest.raises(UnstableMinimum, match="the minimum is unstable there"):
        measure_escape(
            apply, minimum, *data, learning_rate=50.0, batch_size=1, loss_barrier=1.3 * minimum.loss_minimum, **common
        )
    quiet = measure_escape(
        apply, minimum, *data, learning_rate=1e-6, batch_size=100, loss_barrier=1e3 * minimum.loss_minimum, **common
    )
    assert (quiet.escapes, quiet.screens) == (0, None)


def test_an_optimiser_that_adds_noise_moves_every_replica_by_its_own() -> None:
    apply, minimum, *data = many_samples()
    noisy = named_optimizer("noisy_sgd", {"eta": 1.0, "gamma": 0.0})

    def times(seed: int) -> list[int]:
        record = measure_escape(
            apply, minimum, *data, learning_rate=0.1, batch_size=2000, with_replacement=False, optimizer=noisy,
            start="minimum", loss_barrier=1.1 * minimum.loss_minimum, replicas=6, steps=2000, looks="exact", seed=seed,
            follow_steps=5,
        )  # fmt: skip
        assert set(record.rows["afterwards"]) <= {"returned", "stayed"}
        assert record.rows["escaped"].all()
        return record.rows["steps"].tolist()

    first = times(0)
    assert len(set(first)) > 3
    assert times(1) != first == times(0)


def test_lanes_whose_full_losses_take_turns_see_the_same() -> None:
    apply, minimum, *data = many_samples()
    settings: dict = {"learning_rate": 0.3, "batch_size": 4, "loss_barrier": 1.3 * minimum.loss_minimum}
    settings |= {"replicas": 7, "steps": 120, "looks": "exact"}
    together = measure_escape(apply, minimum, *data, **settings)
    turns = measure_escape(apply, minimum, *data, **settings, replica_batch=3)
    assert together.escapes > 5
    pd.testing.assert_frame_equal(turns.rows, together.rows)


def test_full_losses_of_many_lanes_take_a_bounded_memory() -> None:
    recipe = make_recipe(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], mean_square, None, 4, True)
    params = {"a": jnp.zeros((20, 50)), "b": jnp.zeros(50)}
    numbers = jnp.float32(0.1), jnp.float32(1), jnp.int32(1), jnp.int32(1)
    world = lanes.World(jnp.zeros((20_000, 20)), jnp.zeros(20_000), *numbers, None, None)
    hidden = 20_000 * 50 * 4
    assert hidden <= lanes.loss_memory(recipe, params, world) <= 3 * hidden


@pytest.mark.parametrize("start", ["quasi_stationary", "minimum"])
def test_runs_that_escaped_are_followed_and_told_apart(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    def rows(loss: Callable, origin: float, noise: float, learning_rate: float, barrier: float) -> pd.DataFrame:
        inputs, targets = np.array([[-noise], [noise]], np.float32), np.zeros((2, 1), np.float32)
        return measure_escape(
            lambda theta, x: theta + x, jnp.full(1, origin), inputs, targets, loss=loss, learning_rate=learning_rate,
            batch_size=1, loss_barrier=barrier, replicas=6, steps=300, start=start, burn_in=(20, 40), looks="exact",
            follow_steps=200,
        ).rows  # fmt: skip

    def well(f: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(f**2)

    def two_wells(f: jax.Array, y: jax.Array) -> jax.Array:
        """The loss of the second, 0.35, is above the barrier."""
        return f[0] ** 4 / 4 - f[0] ** 2 / 2 + 0.1 * f[0] + 0.5

    one = rows(well, 0.0, 1.0, 0.1, 0.58)
    two = rows(two_wells, -1.05, 0.3, 0.5, 0.4)
    for table in (one, two):
        assert (table.loc[~table["escaped"], "afterwards"] == "").all()
    assert (one.loc[one["escaped"], "afterwards"] == "returned").mean() > 0.8  # some are above by chance
    assert set(two.loc[two["escaped"], "afterwards"]) == {"returned", "stayed"}
    monkeypatch.setattr(engines, "FEW_PARAMETERS", 0)
    assert rows(well, 0.0, 1.0, 0.1, 0.58)["afterwards"].tolist() == one["afterwards"].tolist()
