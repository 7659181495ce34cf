"""The top of the Hessian's spectrum at a minimum, by Lanczos iteration on Hessian-vector products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from scipy.linalg import eigh_tridiagonal

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import Problem, linear_map, make_problem
from escape_inference.trainers.direction import sampling_error
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.outliers import OutlierCount, count_outliers

CONVERGED = 1e-3
"""A Ritz value counts as an eigenvalue when its residual is below this fraction of the largest one."""
TOLERANCE = 1e-5
"""The iteration ends when all residuals are below this fraction of the largest eigenvalue. Far smaller than the gaps
between eigenvalues, so that one which enters late is not overlooked."""
CHECK_INTERVAL = 3
"""Iterations between two looks at the residuals."""
ROUNDING = 1e-6
"""Couplings below this fraction of the matrix are rounding errors of single precision."""


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
    k: int | None = None,
    part: str = "hessian",
    layers: str | None = None,
    subsample: int | None = None,
    iterations: int | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
) -> HessianSpectrum:
    """The ``k`` largest eigenvalues of the full-batch Hessian.

    Lanczos with full reorthogonalisation (Lanczos 1950): without it single precision shows ghost copies of the outliers.
    The Hessian is linearised once, so that a product repeats nothing that does not depend on the vector.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        k: eigenvalues wanted; None: thirty, or all of a smaller network; thirty show the bulk below a few outliers, so that these can be counted.
        part: ``hessian``, or ``gauss_newton`` for the part of it that does not contain the network's own curvature.
        layers: only the block of the parameters whose path begins so, such as ``.layers[0]``; see ``layer_names``.
        subsample: use this many random samples instead of all; a different matrix, so the residual is then only part of
            the error.
        iterations: Lanczos iterations at most, at least k; None: ``2 k + 20``.
        loss: as in ``train_minimum``.
        seed: of the starting vector and of the subsample.

    Raises:
        InputError: an argument that cannot be used, or a Hessian that is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> curvatures = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> spectrum = top_hessian(lambda theta, x: x @ theta, jnp.zeros(2), curvatures, jnp.zeros(2), k=2)
        >>> spectrum.eigenvalues.round(4).tolist(), spectrum.converged.tolist()
        ([4.5, 0.5], [True, True])
    """
    problem = make_problem(
        apply, minimum, inputs, targets, loss=loss, layers=layers, subsample=subsample, seed=seed
    ).compact()
    dimension = problem.dimension
    k = min(30, dimension) if k is None else k
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
    problem: Problem, part: str, k: int, iterations: int, *, lowest: bool = False, tolerance: float = TOLERANCE
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, "k p"]]:
    """Eigenvalues from one end of the spectrum, outermost first, their residuals and their eigenvectors.

    At most ``iterations`` products are made, fewer where all residuals fall below ``tolerance`` of the largest
    eigenvalue before. Each new vector is made orthogonal to all the old ones, and once more if little of it is left
    (Daniel, Gragg, Kaufman and Stewart 1976). What that takes away is missing from the tridiagonal matrix, so it
    belongs to the residual, beside the coupling of the last vector: ``H Q = Q (T + C) + beta q e^T``.

    Raises:
        InputError: a Hessian that is not finite.
    """
    product, sign = linear_map(problem, part), -1.0 if lowest else 1.0
    basis = np.empty((iterations, len(problem.mask)), np.float32)
    diagonal, couplings, taken = (np.zeros(iterations) for _ in range(3))
    vector, _ = _orthogonal(np.asarray(problem.start()), basis[:0])
    for done in range(1, iterations + 1):
        basis[done - 1] = vector
        image = sign * np.asarray(product(vector))
        diagonal[done - 1] = _dot(vector, image)
        if not np.isfinite(diagonal[done - 1]):
            raise InputError("the Hessian is not finite at these parameters.")
        image = image - np.float32(diagonal[done - 1]) * vector
        if done > 1:
            image -= np.float32(couplings[done - 2]) * basis[done - 2]
        rest, taken[done - 1] = _orthogonal(image, basis[:done])
        couplings[done - 1] = _dot(rest, image)
        size = max(np.abs(diagonal[:done]).max(), couplings[: done - 1].max(initial=0.0))
        if couplings[done - 1] <= ROUNDING * size:  # the vectors span an invariant subspace: go on from outside of it
            taken[done - 1], couplings[done - 1] = np.hypot(taken[done - 1], couplings[done - 1]), 0.0
            rest, _ = _orthogonal(np.asarray(problem.start(done)), basis[:done])
        vector = rest
        if done == iterations or (done >= k and done % CHECK_INTERVAL == 0):
            values, mixing = eigh_tridiagonal(diagonal[:done], couplings[: done - 1])
            values, mixing = values[::-1][:k], mixing[:, ::-1][:, :k]
            residuals = np.hypot(couplings[done - 1] * np.abs(mixing[-1]), np.sqrt(taken[:done] ** 2 @ mixing**2))
            if residuals.max() < tolerance * np.abs(values).max():
                break
    vectors = mixing.T.astype(np.float32) @ basis[:done]
    return sign * values, residuals, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _orthogonal(
    vector: Float[np.ndarray, " p"], basis: Float[np.ndarray, "m p"]
) -> tuple[Float[np.ndarray, " p"], float]:
    """The unit vector along the part of a vector that is orthogonal to the rows, and the length of the other part.

    Zeros instead, where nothing but rounding errors is left.
    """
    within = np.zeros(len(basis), np.float32)
    length = before = np.sqrt(_dot(vector, vector))
    for _ in range(3):
        overlap = _dot(basis, vector)
        vector, within = vector - np.einsum("i,ij->j", overlap, basis), within + overlap
        after = np.sqrt(_dot(vector, vector))
        if after > 0.7 * before:
            return vector / after, float(np.linalg.norm(within))
        before = after
    return np.zeros_like(vector), float(length)


def _dot(one: Float[np.ndarray, "*m p"], two: Float[np.ndarray, " p"]) -> Any:
    """A product without the threads of NumPy's linear algebra, which go on spinning and halve the speed of JAX's."""
    return np.einsum("...j,j->...", one, two)
