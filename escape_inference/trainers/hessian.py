"""The top of the Hessian's spectrum at a minimum, by Lanczos iteration on Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from matfree import decomp

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import Problem, make_problem, product_with
from escape_inference.trainers.direction import sampling_error
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.outliers import OutlierCount, count_outliers
from escape_inference.trainers.sgd import Recipe

CONVERGED = 1e-3
"""A Ritz value counts as an eigenvalue when its residual is below this fraction of the largest one."""


@dataclass(frozen=True)
class HessianSpectrum:
    """The largest eigenvalues of the Hessian of the loss.

    Attributes:
        eigenvalues: largest first, 1/time.
        eigenvectors: of unit length, one in each row, over the flattened parameters.
        residuals: ``|H v - lambda v|`` for each; an eigenvalue of H lies within this distance of lambda.
        converged: residual below ``CONVERGED`` of the largest eigenvalue.
        top: the largest eigenvalue, h*.
        top_se: its residual, as a bound of its error; on a subsample with the error of sampling added.
        counted: the number of outliers among the converged eigenvalues, its error and the bulk's edge.
    """

    eigenvalues: Float[np.ndarray, " k"]
    eigenvectors: Float[np.ndarray, "k p"]
    residuals: Float[np.ndarray, " k"]
    converged: Bool[np.ndarray, " k"]
    top: float
    top_se: float
    counted: OutlierCount

    @property
    def outliers(self) -> int:
        """The most probable number of outliers."""
        return self.counted.count


def top_hessian(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    k: int = 30,
    part: str = "hessian",
    layers: str | None = None,
    subsample: int | None = None,
    iterations: int | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
) -> HessianSpectrum:
    """The ``k`` largest eigenvalues of the full-batch Hessian.

    Lanczos with full reorthogonalisation (Lanczos 1950; ``matfree``): without it single precision shows ghost copies of
    the outliers. The residuals are computed from the eigenvectors, not from the recursion.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        k: eigenvalues wanted; thirty show the bulk below a few outliers, so that these can be counted.
        part: ``hessian``, or ``gauss_newton`` for the part of it that does not contain the network's own curvature.
        layers: only the block of the parameters whose path begins so, such as ``.layers[0]``; see ``layer_names``.
        subsample: use this many random samples instead of all; a different matrix, so the residual is then only part of
            the error.
        iterations: Lanczos iterations, at least k; None: ``2 k + 20``.
        loss: as in ``train_minimum``.
        seed: of the starting vector and of the subsample.

    Raises:
        InputError: an argument that cannot be used, or a Hessian that is not finite.

    Examples:
        >>> curvatures = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> spectrum = top_hessian(lambda theta, x: x @ theta, jnp.zeros(2), curvatures, jnp.zeros(2), k=2)
        >>> spectrum.eigenvalues.round(4).tolist(), spectrum.converged.tolist()
        ([4.5, 0.5], [True, True])
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss, layers=layers, subsample=subsample, seed=seed)
    dimension = problem.dimension
    if not 1 <= k <= dimension:
        raise InputError(f"k: must be from 1 to the number of parameters, {dimension}, got {k}.")
    iterations = min(2 * k + 20 if iterations is None else iterations, dimension)
    if iterations < k:
        raise InputError(f"iterations: must be at least k, {k}, got {iterations}.")
    eigenvalues, residuals, vectors = eigenpairs(problem, part, k, iterations)
    converged = residuals < CONVERGED * np.abs(eigenvalues).max()
    error = float(residuals[0])
    if subsample is not None:
        error = float(np.hypot(error, sampling_error(problem, vectors[0])))
    usable = eigenvalues[: int(np.argmin(np.append(converged, False)))]
    return HessianSpectrum(
        eigenvalues=eigenvalues,
        eigenvectors=vectors,
        residuals=residuals,
        converged=converged,
        top=float(eigenvalues[0]),
        top_se=error,
        counted=count_outliers(usable if len(usable) else eigenvalues[:1]),
    )


def eigenpairs(
    problem: Problem, part: str, k: int, iterations: int, *, lowest: bool = False
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, "k p"]]:
    """Eigenvalues from one end of the spectrum, outermost first, their residuals and their eigenvectors.

    Raises:
        InputError: a Hessian that is not finite.
    """
    found = _compiled_lanczos(problem.recipe, part, k, iterations, -1 if lowest else 1)(
        problem.params, problem.mask, problem.start(), problem.inputs, problem.targets
    )
    eigenvalues, residuals = (np.asarray(result, float) for result in found[:2])
    if not np.all(np.isfinite(eigenvalues)):
        raise InputError("the Hessian is not finite at these parameters.")
    return eigenvalues, residuals, np.asarray(found[2])


@lru_cache(maxsize=32)
def _compiled_lanczos(recipe: Recipe, part: str, k: int, iterations: int, sign: int) -> Callable:
    def spectrum(
        params: PyTree, mask: Array, start: Array, inputs: Array, targets: Array
    ) -> tuple[Array, Array, Array]:
        forward = product_with(recipe, part, params, mask, inputs, targets)

        def product(vector: Array) -> Array:
            return sign * forward(vector)

        basis, matrix, *_ = decomp.tridiag_sym(iterations, reortho="full", custom_vjp=False)(product, start)
        values, vectors = jnp.linalg.eigh(matrix)
        values, vectors = values[::-1][:k], (vectors.T @ basis)[::-1][:k]
        vectors = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
        images = jax.lax.map(product, vectors)
        return sign * values, jnp.linalg.norm(images - values[:, None] * vectors, axis=1), vectors

    return jax.jit(spectrum)
