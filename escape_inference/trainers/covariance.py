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


@dataclass(frozen=True)
class NoiseCovariance:
    """B times the covariance of the batch gradient, within a few directions.

    Attributes:
        table: a row for each direction: ``rank``, ``eigenvalue`` (1/time), ``variance`` (``B v^T Sigma v``),
            ``predicted`` (``2 L lambda``), ``ratio`` of the two, which is 1 in the theory, and ``ratio_se`` from the
            scatter over samples.
        matrix: B times the covariance of the gradient's components along the directions.
        alignment: cosine between that matrix and the predicted diagonal one, as vectors of their elements; 1 if they
            are proportional.
    """

    table: pd.DataFrame
    matrix: Float[np.ndarray, "k k"]
    alignment: float


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
    slopes_of, level = _compiled_slopes(problem.recipe), jax.jit(problem.recipe.mean_loss)
    slopes = np.asarray(
        slopes_of(problem.params, jnp.asarray(vectors, jnp.float32), problem.inputs, problem.targets), float
    )
    loss_here = float(level(problem.params, problem.inputs, problem.targets))
    centred = slopes - slopes.mean(1, keepdims=True)
    samples = slopes.shape[1]
    matrix = centred @ centred.T / samples
    predicted = 2 * loss_here * values
    error = (centred**2).std(1, ddof=1) / np.sqrt(samples) if samples > 1 else np.full(len(values), np.nan)
    table = pd.DataFrame(
        {
            "rank": np.arange(1, len(values) + 1),
            "eigenvalue": values,
            "variance": np.diag(matrix),
            "predicted": predicted,
            "ratio": np.diag(matrix) / predicted,
            "ratio_se": error / np.abs(predicted),
        }
    )
    alignment = float(np.diag(matrix) @ predicted / (np.linalg.norm(matrix) * np.linalg.norm(predicted)))
    return NoiseCovariance(table, matrix, alignment)


@lru_cache(maxsize=32)
def _compiled_slopes(recipe: Recipe) -> Callable:
    def slopes(params: PyTree, vectors: Array, inputs: Array, targets: Array) -> Array:
        unravel = ravel_pytree(params)[1]

        def losses(params: PyTree) -> Array:
            return sample_losses(recipe.apply, recipe.loss, params, inputs, targets)

        tangent = jax.linearize(losses, params)[1]
        return jax.lax.map(lambda vector: tangent(unravel(vector)), vectors)

    return jax.jit(slopes)
