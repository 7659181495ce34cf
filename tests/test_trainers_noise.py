"""Noise: problems whose covariance, slope and decoupling are known exactly."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from escape_inference.errors import InputError
from escape_inference.trainers import (
    decoupling_check,
    noise_along_training,
    noise_covariance,
    noise_strength,
    top_hessian,
)
from escape_inference.trainers.decoupling import sample_kernel
from escape_inference.trainers.noise import log_log_slope


def linear(theta: jax.Array, inputs: jax.Array) -> jax.Array:
    return inputs @ theta


@lru_cache
def network() -> tuple[Callable, dict, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    params = {"in": rng.normal(size=(3, 5)), "out": rng.normal(size=(5, 2))}
    inputs, targets = rng.normal(size=(150, 3)), rng.normal(size=(150, 2))

    def apply(params: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["in"]) @ params["out"]

    return apply, jax.tree.map(jnp.float32, params), inputs.astype(np.float32), targets.astype(np.float32)


@lru_cache
def sample_gradients() -> np.ndarray:
    """Of the network, one row for each sample, one by one."""
    apply, params, inputs, targets = network()
    flat, unravel = ravel_pytree(params)

    def loss(vector: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((apply(unravel(vector), x[None])[0] - y) ** 2)

    return np.asarray(jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(flat, inputs, targets), float)


def test_the_noise_of_a_network_is_that_of_its_sample_gradients() -> None:
    gradients = sample_gradients()
    found = noise_strength(*network())
    assert found.gradient_square == pytest.approx(np.sum(gradients.mean(0) ** 2), rel=1e-4)
    assert found.noise == pytest.approx(np.trace(np.cov(gradients.T, bias=True)), rel=1e-4)


def test_batch_gradients_scatter_with_the_noise_over_the_batch_size() -> None:
    apply, params, inputs, targets = network()
    rng, size = np.random.default_rng(1), 7
    gradients = sample_gradients()
    batches = gradients[rng.integers(0, 150, size=(20000, size))].mean(1)
    assert batches.var(0).sum() == pytest.approx(noise_strength(apply, params, inputs, targets).noise / size, rel=0.03)


@lru_cache
def noise_with_exponent(power: float) -> tuple[Callable, jax.Array, np.ndarray, np.ndarray, Callable]:
    """``L = 0.2 + 1.5 |theta|^2`` for every sample, with noise of strength ``4 d L^power`` exactly."""
    dimension = 3
    signs = np.repeat(np.concatenate([np.eye(dimension), -np.eye(dimension)]), 5, axis=0) * np.sqrt(dimension)

    def loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
        level = 0.2 + 1.5 * jnp.sum(prediction**2)
        fixed, here = jax.lax.stop_gradient(level), jax.lax.stop_gradient(prediction)
        return level + 2 * fixed ** (power / 2) * jnp.dot(target, prediction - here)

    def apply(theta: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.broadcast_to(theta, (len(inputs), dimension))

    return apply, jnp.array([1.0, -0.5, 2.0]), np.zeros((len(signs), 1), np.float32), signs.astype(np.float32), loss


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_slope_along_training_is_the_exponent_of_the_noise(power: float) -> None:
    apply, start, inputs, targets, loss = noise_with_exponent(power)
    assert noise_strength(apply, start, inputs, targets, loss=loss).noise == pytest.approx(
        4 * 3 * (0.2 + 1.5 * 5.25) ** power, rel=1e-4
    )
    trace = noise_along_training(
        apply, start, inputs, targets, learning_rate=0.01, batch_size=5, steps=300, every=10, loss=loss
    )
    assert trace.slope == pytest.approx(power, abs=1e-3)
    assert trace.slope_lower - 1e-3 <= power <= trace.slope_upper + 1e-3
    assert trace.table["step"].tolist() == list(range(10, 301, 10))
    assert trace.table["epoch"].iloc[-1] == pytest.approx(300 * 5 / 30)
    assert trace.table["loss"].iloc[0] > 2 * trace.table["loss"].iloc[-1]


def test_the_interval_of_a_slope_covers_it_although_neighbours_are_alike() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(60):
        x = np.cumsum(rng.normal(size=120)) * 0.3
        residual = np.zeros(120)
        for step in range(1, 120):
            residual[step] = 0.6 * residual[step - 1] + 0.1 * rng.normal()
        slope, lower, upper = log_log_slope(np.exp(x), np.exp(0.8 * x + 1 + residual), seed=seed)
        assert lower < slope < upper
        covered.append(lower <= 0.8 <= upper)
    assert np.mean(covered) > 0.8


def test_the_covariance_of_gaussian_regression_is_the_known_one() -> None:
    """For x ~ N(0, I) it is ``2 L I + delta delta^T`` at a distance delta from the minimum."""
    rng = np.random.default_rng(7)
    inputs, delta = rng.normal(size=(60_000, 3)), np.array([0.9, 0.0, 0.0])
    targets = inputs @ np.array([0.5, -1.0, 2.0]) + 0.8 * rng.normal(size=60_000)
    at = jnp.asarray(np.array([0.5, -1.0, 2.0]) + delta)
    level = 0.5 * (0.8**2 + 0.9**2)
    found = noise_covariance(linear, at, inputs, targets, np.ones(3), np.eye(3))
    assert found.matrix == pytest.approx(2 * level * np.eye(3) + np.outer(delta, delta), abs=0.06)
    expected = np.array([1 + 0.9**2 / (2 * level), 1.0, 1.0])
    assert np.all(np.abs(found.table["ratio"] - expected) < 4 * found.table["ratio_se"] + 0.01)
    assert found.table["ratio_se"].between(0.003, 0.03).all()
    assert found.alignment == pytest.approx(expected.sum() / np.sqrt(3 * (expected**2).sum()), abs=0.01)


def test_the_covariance_along_eigenvectors_is_that_of_the_sample_gradients() -> None:
    apply, params, inputs, targets = network()
    spectrum = top_hessian(apply, params, inputs, targets, k=4)
    found = noise_covariance(apply, params, inputs, targets, spectrum.eigenvalues, spectrum.eigenvectors)
    exact = spectrum.eigenvectors @ np.cov(sample_gradients().T, bias=True) @ spectrum.eigenvectors.T
    assert found.matrix == pytest.approx(exact, rel=1e-3, abs=1e-4)
    level = noise_strength(apply, params, inputs, targets).loss
    assert found.table["predicted"].to_numpy() == pytest.approx(2 * level * spectrum.eigenvalues, rel=1e-4)


def test_the_errors_of_the_covariance_are_those_of_drawing_the_samples_again() -> None:
    apply, params, inputs, targets = network()
    spectrum = top_hessian(apply, params, inputs, targets, k=3)
    at = apply, params, inputs, targets, spectrum.eigenvalues, spectrum.eigenvectors
    found = noise_covariance(*at)
    flat, unravel = ravel_pytree(params)

    def losses(vector: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((apply(unravel(vector), inputs) - targets) ** 2, axis=1)

    def curvature(vector: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jax.jvp(losses, (x,), (vector,))[1], (flat,), (vector,))[1]

    curvatures = np.stack([np.asarray(curvature(jnp.asarray(v)), float) for v in spectrum.eigenvectors])
    slopes = spectrum.eigenvectors @ sample_gradients().T
    values, rng, drawn = np.asarray(losses(flat), float), np.random.default_rng(3), []
    for _ in range(1500):
        chosen = rng.integers(0, 150, 150)
        matrix = np.cov(slopes[:, chosen], bias=True)
        predicted = 2 * values[chosen].mean() * curvatures[:, chosen].mean(1)
        cosine = np.diag(matrix) @ predicted / np.linalg.norm(matrix) / np.linalg.norm(predicted)
        drawn.append([*(np.diag(matrix) / predicted), cosine])
    spread = np.std(drawn, axis=0)
    assert found.table["ratio_se"].to_numpy() == pytest.approx(spread[:3], rel=0.2)
    assert found.alignment_se == pytest.approx(spread[3], rel=0.15)


def test_equal_losses_decouple_exactly() -> None:
    inputs = np.random.default_rng(3).normal(size=(40, 6)) * np.sqrt(np.arange(1, 7))
    targets = np.where(np.arange(40) % 3 == 0, 1.3, -1.3)
    check = decoupling_check(linear, jnp.zeros(6), inputs, targets)
    assert check.coupled == pytest.approx(check.decoupled, abs=1e-4)
    assert check.log_distance < 1e-3
    assert check.relative_distance < 1e-4
    assert check.matrix_distance < 1e-3
    exact = np.linalg.eigvalsh(inputs.T @ inputs / 40)[::-1] * 0.5 * 1.3**2
    assert check.decoupled[:6] == pytest.approx(exact, rel=1e-4)


def test_a_loss_that_goes_with_the_gradient_is_seen_as_coupled() -> None:
    """Two groups in orthogonal directions: losses 4.5 and 0.5, so that the spectra are (2.25, 0.25) and (1.25, 1.25)."""
    inputs, targets = np.repeat(np.eye(2), 10, axis=0), np.repeat([3.0, 1.0], 10)
    check = decoupling_check(linear, jnp.zeros(2), inputs, targets)
    assert check.coupled[:2] == pytest.approx([2.25, 0.25])
    assert check.decoupled[:2] == pytest.approx([1.25, 1.25])
    assert check.log_distance == pytest.approx(np.sqrt((np.log10(1.8) ** 2 + np.log10(0.2) ** 2) / 2))
    assert check.relative_distance == pytest.approx(2 / 2.5)
    assert check.matrix_distance == pytest.approx(np.sqrt(2 / (2 * 1.25**2)))


def test_both_sides_of_a_network_with_two_outputs_are_those_of_the_dense_matrices() -> None:
    apply, params, inputs, targets = network()
    check = decoupling_check(apply, params, inputs, targets)
    gradients = sample_gradients()
    exact = np.linalg.eigvalsh(gradients.T @ gradients / 300)[::-1]
    assert check.coupled[:10] == pytest.approx(exact[:10], rel=1e-3)
    gauss_newton = top_hessian(apply, params, inputs, targets, k=5, part="gauss_newton").eigenvalues
    level = noise_strength(apply, params, inputs, targets).loss
    assert check.decoupled[:5] == pytest.approx(level * gauss_newton, rel=1e-3)
    assert decoupling_check(apply, params, inputs, targets, samples=60).samples == 60


def test_one_kernel_serves_every_choice_of_samples() -> None:
    apply, params, inputs, targets = network()
    whole = sample_kernel(apply, params, np.tile(inputs, (3, 1)), np.tile(targets, (3, 1)))
    chosen = np.random.default_rng(2).choice(150, 40, replace=False)
    part, alone = whole.check(chosen + 300), decoupling_check(apply, params, inputs[chosen], targets[chosen])
    assert part.coupled == pytest.approx(alone.coupled, rel=1e-6, abs=1e-9)
    assert part.decoupled == pytest.approx(alone.decoupled, rel=1e-6, abs=1e-9)
    assert part.matrix_distance == pytest.approx(alone.matrix_distance, rel=1e-4)


def test_exchanged_errors_are_not_tied_to_the_gradients() -> None:
    """Gradients whose length goes with the loss: the tie adds a factor, and an exchange in random order removes it."""
    rng = np.random.default_rng(6)
    length = np.exp(0.5 * rng.normal(size=(400, 1)))
    inputs = length * rng.normal(size=(400, 4))
    found = sample_kernel(linear, jnp.zeros(4), inputs, length[:, 0] * rng.choice([-1, 1], 400))
    tied, free = found.check(), found.check(exchanged=rng.permutation(400))
    assert tied.coupled.sum() / tied.decoupled.sum() == pytest.approx(np.exp(4 * 0.25), rel=0.35)
    assert free.coupled.sum() / free.decoupled.sum() == pytest.approx(1, abs=0.2)
    assert free.log_distance < 0.3 * tied.log_distance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every"),
        ({"every": 40}, "every: must be a positive integer with 8 snapshots from iteration 150"),
        ({"late_from": 295}, "every"),
        ({"batch_size": 31}, "batch_size"),
        ({"learning_rate": 1e4}, "diverged by iteration"),
    ],
)
def test_noise_that_cannot_be_measured_is_refused(settings: dict, message: str) -> None:
    apply, start, inputs, targets, loss = noise_with_exponent(1.0)
    arguments: dict = {"learning_rate": 0.01, "batch_size": 5, "steps": 300, "every": 10, "loss": loss} | settings
    with pytest.raises(InputError, match=message):
        noise_along_training(apply, start, inputs, targets, **arguments)


def test_directions_and_points_that_cannot_be_are_refused() -> None:
    apply, params, inputs, targets = network()
    with pytest.raises(InputError, match=r"eigenvectors: must have shape \(1, 25\)"):
        noise_covariance(apply, params, inputs, targets, np.ones(1), np.ones((1, 3)))
    with pytest.raises(InputError, match="at least 8 points"):
        log_log_slope(np.arange(1.0, 6), np.arange(1.0, 6))
    with pytest.raises(InputError, match="same at every point"):
        log_log_slope(np.ones(20), np.arange(1.0, 21))
