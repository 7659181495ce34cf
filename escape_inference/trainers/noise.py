"""The strength of SGD's gradient noise, and how it follows the loss along a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import make_problem
from escape_inference.trainers.losses import Apply, SampleLoss, sample_losses
from escape_inference.trainers.minimum import Minimum, Progress, compiled_training, parameters_of
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key

CHUNK = 64
"""Samples whose gradients are in memory together."""
RESAMPLES = 2000
"""Of the block bootstrap."""
LEAST_POINTS = 8
"""Fewest points of a slope."""


@dataclass(frozen=True)
class NoiseStrength:
    """Noise at one point of the loss landscape.

    Attributes:
        loss: full-batch loss L.
        noise: ``N = (1/N) sum_mu |grad l_mu|^2 - |grad L|^2``, the trace of B times the covariance of the batch
            gradient drawn with replacement; loss squared over parameter squared.
        gradient_square: ``|grad L|^2``.
    """

    loss: float
    noise: float
    gradient_square: float


@dataclass(frozen=True)
class NoiseTrace:
    """Noise and loss along training.

    Attributes:
        table: a row for each snapshot: ``step``, ``epoch``, ``loss``, ``noise_strength``, ``gradient_square``.
        slope: of log N against log L over the late snapshots; 1 if the noise is proportional to the loss.
        slope_lower, slope_upper: its 95 % interval (moving-block bootstrap).
        late_from: the first iteration that counts as late.
        params: where the training ended.
    """

    table: pd.DataFrame
    slope: float
    slope_lower: float
    slope_upper: float
    late_from: int
    params: PyTree


def noise_strength(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    loss: str | SampleLoss = "mean_square",
) -> NoiseStrength:
    """The exact strength of the gradient noise, from the gradient of every sample.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        loss: as in ``train_minimum``.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        Two samples with the gradients 3 and -1: their mean square is 5, the square of their mean 1.

        >>> noise_strength(lambda theta, x: theta * x, jnp.zeros(1), jnp.ones((2, 1)), jnp.array([[-3.0], [1.0]]))
        NoiseStrength(loss=2.5, noise=4.0, gradient_square=1.0)
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss)
    found = _compiled_strength(problem.recipe)(problem.params, problem.inputs, problem.targets)
    return NoiseStrength(*(float(value) for value in found))


@lru_cache(maxsize=32)
def _compiled_strength(recipe: Recipe) -> Callable:
    def strength(params: PyTree, inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        def one(sample: tuple[Array, Array]) -> Array:
            gradient = jax.grad(recipe.mean_loss)(params, sample[0][None], sample[1][None])
            return optax.tree.norm(gradient, squared=True)

        squares = jax.lax.map(one, (inputs, targets), batch_size=min(CHUNK, len(inputs)))
        gradient = optax.tree.norm(jax.grad(recipe.mean_loss)(params, inputs, targets), squared=True)
        loss = jnp.mean(sample_losses(recipe.apply, recipe.loss, params, inputs, targets))
        return loss, jnp.mean(squares) - gradient, gradient

    return jax.jit(strength)


def noise_along_training(
    apply: Apply,
    params: PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    learning_rate: float,
    batch_size: int,
    steps: int,
    every: int,
    late_from: int | None = None,
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    with_replacement: bool = True,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
    progress: Progress | None = None,
) -> NoiseTrace:
    """Train, and measure the noise strength and the loss every so many iterations.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        params: where to start, a pytree of arrays.
        inputs: samples first.
        targets: samples first.
        learning_rate: eta, time units per iteration.
        batch_size: B, samples per gradient.
        steps: iterations.
        every: iterations between two snapshots; an epoch has N/B.
        late_from: first iteration that counts for the slope; None: half of them.
        optimizer: as in ``train_minimum``.
        with_replacement: draw each batch independently, or go through the data in epochs of a new random order.
        loss: as in ``train_minimum``.
        seed: of the batches.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Raises:
        InputError: an argument that cannot be used, training that diverged, or fewer than ``LEAST_POINTS`` late
            snapshots.

    References:
        Mori, Ziyin, Liu and Ueda, ICML 2022, figure of N against L.
    """
    problem = make_problem(apply, params, inputs, targets, loss=loss)
    check_training(learning_rate, batch_size, steps, problem.samples)
    late_from = steps // 2 if late_from is None else late_from
    if int(every) != every or every < 1 or (steps - late_from) // every < LEAST_POINTS:
        raise InputError(
            f"every: must be a positive integer with {LEAST_POINTS} snapshots from iteration {late_from} to {steps}, "
            f"got {every}."
        )
    recipe = make_recipe(apply, problem.recipe.loss, optimizer, batch_size, with_replacement)
    train, strength = compiled_training(recipe), _compiled_strength(problem.recipe)
    state = recipe.start(parameters_of(params), learning_rate)
    key, eta = root_key(seed), jnp.float32(learning_rate)
    rows = []
    for begin in range(0, steps, every):
        end = min(begin + every, steps)
        state = train(state, jnp.int32(begin), jnp.int32(end), key, eta, problem.inputs, problem.targets)
        found = [float(value) for value in strength(state[0], problem.inputs, problem.targets)]
        if not np.all(np.isfinite(found)):
            raise InputError(f"training diverged by iteration {end} at learning rate {learning_rate:g}. Lower it.")
        rows.append([end, end * batch_size / problem.samples, *found])
        if progress:
            progress(end, steps, "noise along training")
    table = pd.DataFrame(rows, columns=["step", "epoch", "loss", "noise_strength", "gradient_square"])
    late = table[table["step"] > late_from]
    slope = log_log_slope(late["loss"].to_numpy(), late["noise_strength"].to_numpy(), seed=seed)
    return NoiseTrace(table, *slope, late_from, state[0])


def log_log_slope(
    loss: Float[np.ndarray, " m"], noise: Float[np.ndarray, " m"], *, seed: int = 0
) -> tuple[float, float, float]:
    """The slope of log noise against log loss by least squares, and its 95 % interval.

    Snapshots of one run follow each other and are not independent; blocks of about ``m^(1/3)`` neighbours are resampled
    (Kunsch 1989).

    Args:
        loss: in order of time.
        noise: in the same order.
        seed: of the resampling.

    Raises:
        InputError: fewer than ``LEAST_POINTS`` points, a value that is not positive, or a loss that never changes.

    Examples:
        >>> loss = np.geomspace(1, 0.01, 20)
        >>> slope, lower, upper = log_log_slope(loss, 3 * loss**1.5)
        >>> round(slope, 6), round(lower, 6), round(upper, 6)
        (1.5, 1.5, 1.5)
    """
    points = np.stack([np.asarray(loss, float), np.asarray(noise, float)])
    if points.shape[1] < LEAST_POINTS or not np.all(points > 0) or not np.all(np.isfinite(points)):
        raise InputError(f"slope: needs at least {LEAST_POINTS} points with positive, finite loss and noise.")
    x, y = np.log(points)
    if np.ptp(x) <= 1e-9:
        raise InputError("slope: the loss is the same at every point.")
    size = len(x)
    block = max(round(size ** (1 / 3)), 1)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, size - block + 1, size=(RESAMPLES, -(-size // block)))
    chosen = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :size]
    slopes = _slope(x[chosen], y[chosen])
    lower, upper = np.quantile(slopes[np.isfinite(slopes)], [0.025, 0.975])
    return float(_slope(x[None], y[None])[0]), float(lower), float(upper)


def _slope(x: Float[np.ndarray, "s m"], y: Float[np.ndarray, "s m"]) -> Float[np.ndarray, " s"]:
    deviation = x - x.mean(1, keepdims=True)
    square = (deviation**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > 0, (deviation * y).sum(1) / square, np.nan)
