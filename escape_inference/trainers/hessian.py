"""The top of the Hessian's spectrum at a minimum, by Lanczos iteration on Hessian-vector products."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree
from matfree import decomp

from escape_inference.errors import InputError
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss, sample_losses
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.sgd import root_key

CONVERGED = 1e-3
"""A Ritz value counts as an eigenvalue when its residual is below this fraction of the largest one."""


@dataclass(frozen=True)
class HessianSpectrum:
    """The largest eigenvalues of the Hessian of the loss.

    Attributes:
        eigenvalues: largest first, 1/time.
        residuals: ``|H v - lambda v|`` for each; an eigenvalue of H lies within this distance of lambda.
        converged: residual below ``CONVERGED`` of the largest eigenvalue.
        top: the largest eigenvalue, h*.
        top_se: its residual, as a bound of its error.
        outliers: how many eigenvalues lie above the widest relative gap among those found; a suggestion for the
            effective dimension, to be judged by eye.
    """

    eigenvalues: Float[np.ndarray, " k"]
    residuals: Float[np.ndarray, " k"]
    converged: Bool[np.ndarray, " k"]
    top: float
    top_se: float
    outliers: int


def top_hessian(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    k: int = 10,
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
        k: eigenvalues wanted.
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
    sample_loss = resolve_loss(loss)
    params = minimum.params if isinstance(minimum, Minimum) else minimum
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), params)
    inputs, targets = check_problem(apply, sample_loss, params, inputs, targets)
    key = root_key(seed)
    if subsample is not None:
        if not 1 <= subsample <= len(inputs):
            raise InputError(f"subsample: must be from 1 to the number of samples, {len(inputs)}, got {subsample}.")
        chosen = jax.random.choice(jax.random.fold_in(key, 1), len(inputs), (subsample,), replace=False)
        inputs, targets = inputs[chosen], targets[chosen]
    flat, unravel = ravel_pytree(params)
    if not 1 <= k <= flat.size:
        raise InputError(f"k: must be from 1 to the number of parameters, {flat.size}, got {k}.")
    iterations = min(2 * k + 20 if iterations is None else iterations, flat.size)
    if iterations < k:
        raise InputError(f"iterations: must be at least k, {k}, got {iterations}.")

    def mean_loss(vector: Array, inputs: Array, targets: Array) -> Array:
        return jnp.mean(sample_losses(apply, sample_loss, unravel(vector), inputs, targets))

    def product(vector: Array, inputs: Array, targets: Array) -> Array:
        return jax.jvp(jax.grad(lambda at: mean_loss(at, inputs, targets)), (flat,), (vector,))[1]

    @jax.jit
    def spectrum(start: Array, inputs: Array, targets: Array) -> tuple[Array, Array]:
        basis, matrix, *_ = decomp.tridiag_sym(iterations, reortho="full", custom_vjp=False)(
            lambda vector: product(vector, inputs, targets), start
        )
        values, vectors = jnp.linalg.eigh(matrix)
        values, vectors = values[::-1][:k], (vectors.T @ basis)[::-1][:k]
        vectors = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
        images = jax.lax.map(lambda vector: product(vector, inputs, targets), vectors)
        return values, jnp.linalg.norm(images - values[:, None] * vectors, axis=1)

    start = jax.random.normal(jax.random.fold_in(key, 0), flat.shape, flat.dtype)
    eigenvalues, residuals = (np.asarray(result, float) for result in spectrum(start, inputs, targets))
    if not np.all(np.isfinite(eigenvalues)):
        raise InputError("the Hessian is not finite at these parameters.")
    return HessianSpectrum(
        eigenvalues=eigenvalues,
        residuals=residuals,
        converged=residuals < CONVERGED * np.abs(eigenvalues).max(),
        top=float(eigenvalues[0]),
        top_se=float(residuals[0]),
        outliers=count_outliers(eigenvalues),
    )


def count_outliers(eigenvalues: Float[np.ndarray, " k"]) -> int:
    """Eigenvalues above the widest gap in the logarithm, among the positive ones.

    >>> count_outliers(np.array([10.0, 7.0, 6.0, 0.5, 0.4, -0.1]))
    3
    """
    positive = eigenvalues[eigenvalues > 0]
    if len(positive) < 2:
        return len(positive)
    return int(np.argmax(-np.diff(np.log(positive)))) + 1
