"""The exact covariance of SGD's gradient noise along given directions, against ``2 L H / B``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import make_problem
from escape_inference.trainers.losses import Apply, SampleLoss, sample_losses
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.sgd import Recipe

RESAMPLES = 400
"""Of the samples, for the error of the alignment."""


@dataclass(frozen=True)
class NoiseCovariance:
    """B times the covariance of the batch gradient, within a few directions.

    Attributes:
        table: a row for each direction: ``rank``, ``eigenvalue`` (1/time), ``variance`` (``B v^T Sigma v``),
            ``predicted`` (``2 L lambda``), ``ratio`` of the two, which is 1 in the theory, and ``ratio_se``.
        matrix: B times the covariance of the gradient's components along the directions.
        alignment: cosine between that matrix and the predicted diagonal one, as vectors of their elements; 1 if they
            are proportional.
        alignment_se: its standard error.

    For the samples at hand everything is exact. The errors are those of having these samples rather than others, at the
    same point and along the same directions: noise, loss and curvature all vary with them, and partly cancel.
    """

    table: pd.DataFrame
    matrix: Float[np.ndarray, "k k"]
    alignment: float
    alignment_se: float


def noise_covariance(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    eigenvalues: Float[np.ndarray, " k"],
    eigenvectors: Float[np.ndarray, "k p"],
    *,
    loss: str | SampleLoss = "mean_square",
) -> NoiseCovariance:
    """The covariance of the gradient noise along eigenvectors of the Hessian, over every sample, no approximation.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        eigenvalues: of the Hessian, such as ``top_hessian`` finds, 1/time.
        eigenvectors: of unit length, one in each row, over the flattened parameters.
        loss: as in ``train_minimum``; the prediction is that for the mean-square loss.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        One weight, samples with the gradients 3 and -1, so the variance is 4; L = 2.5 and H = 1 predict 5.

        >>> found = noise_covariance(
        ...     lambda theta, x: theta * x, jnp.zeros(1), jnp.ones((2, 1)), jnp.array([[-3.0], [1.0]]),
        ...     np.array([1.0]), np.array([[1.0]]))
        >>> found.table[["variance", "predicted", "ratio"]].iloc[0].tolist(), found.alignment
        ([4.0, 5.0, 0.8], 1.0)

    References:
        Mori, Ziyin, Liu and Ueda, ICML 2022, equation for the SGD noise covariance.
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss)
    values, vectors = np.atleast_1d(eigenvalues), np.atleast_2d(eigenvectors)
    if vectors.shape != (len(values), len(problem.mask)):
        raise InputError(
            f"eigenvectors: must have shape {(len(values), len(problem.mask))} (eigenvalues, parameters), "
            f"got {vectors.shape}."
        )
    found = _compiled_derivatives(problem.recipe)(
        problem.params, jnp.asarray(vectors, jnp.float32), problem.inputs, problem.targets
    )
    sample_losses_here, slopes, curvatures = (np.asarray(part, float) for part in found)
    loss_here = float(sample_losses_here.mean())
    centred = slopes - slopes.mean(1, keepdims=True)
    samples = slopes.shape[1]
    matrix = centred @ centred.T / samples
    predicted = 2 * loss_here * values
    ratio = np.diag(matrix) / predicted
    influence = centred**2 / predicted[:, None] - ratio[:, None] * (
        sample_losses_here / loss_here + curvatures / values[:, None]
    )
    table = pd.DataFrame(
        {
            "rank": np.arange(1, len(values) + 1),
            "eigenvalue": values,
            "variance": np.diag(matrix),
            "predicted": predicted,
            "ratio": ratio,
            "ratio_se": _standard_error(influence),
        }
    )
    return NoiseCovariance(table, matrix, _alignment(matrix, predicted), _alignment_error(slopes, curvatures))


def _alignment(matrix: Float[np.ndarray, "k k"], predicted: Float[np.ndarray, " k"]) -> float:
    length = np.linalg.norm(matrix) * np.linalg.norm(predicted)
    return float(np.diag(matrix) @ predicted / length) if length > 0 else float("nan")


def _alignment_error(slopes: Float[np.ndarray, "k n"], curvatures: Float[np.ndarray, "k n"]) -> float:
    """By drawing the samples again (the alignment is stationary where it is 1, so a derivative would not do)."""
    samples, rng = slopes.shape[1], np.random.default_rng(0)
    drawn = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        weights = rng.multinomial(samples, np.full(samples, 1 / samples)) / samples
        centred = slopes - (slopes @ weights)[:, None]
        drawn[number] = _alignment((weights * centred) @ centred.T, curvatures @ weights)
    return float(np.nanstd(drawn, ddof=1)) if samples > 1 else float("nan")


def _standard_error(influence: Float[np.ndarray, "k n"]) -> Float[np.ndarray, " k"]:
    samples = influence.shape[1]
    if samples < 2:
        return np.full(len(influence), np.nan)
    return influence.std(1, ddof=1) / np.sqrt(samples)


@lru_cache(maxsize=32)
def _compiled_derivatives(recipe: Recipe) -> Callable:
    def derivatives(params: PyTree, vectors: Array, inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        """The loss of every sample, and its first and second derivative along each vector."""
        unravel = ravel_pytree(params)[1]

        def losses(params: PyTree) -> Array:
            return sample_losses(recipe.apply, recipe.loss, params, inputs, targets)

        def along(vector: Array) -> tuple[Array, Array]:
            direction = (unravel(vector),)

            def slopes(params: PyTree) -> Array:
                return jax.jvp(losses, (params,), direction)[1]

            return jax.jvp(slopes, (params,), direction)

        return losses(params), *jax.lax.map(along, vectors)

    return jax.jit(derivatives)
