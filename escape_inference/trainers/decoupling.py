"""The decoupling approximation, checked: ``(1/N) sum_mu l_mu C_mu`` against ``L (1/N) sum_mu C_mu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import make_problem
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.sgd import Recipe

SMALLEST = 1e-5
"""Eigenvalues below this fraction of the largest are left out of the distance, which is about those that are held well."""
BLOCK = 500
"""Samples whose Jacobians are in memory together, twice."""


@dataclass(frozen=True)
class DecouplingCheck:
    """Both sides of the approximation.

    Attributes:
        coupled: eigenvalues of ``(1/N) sum_mu l_mu C_mu``, largest first; loss / time.
        decoupled: eigenvalues of ``L (1/N) sum_mu C_mu``.
        log_distance: root mean square of ``log10`` of the ratio of the two spectra, rank by rank, over the eigenvalues
            above ``SMALLEST`` of the largest on both sides. 0.3 is a factor of two.
        relative_distance: ``sum |coupled - decoupled| / sum decoupled``, which the large eigenvalues decide.
        matrix_distance: Frobenius norm of the difference of the matrices over that of the decoupled one: the spectra
            may agree although the eigenvectors do not.
        samples: number of samples used.
    """

    coupled: Float[np.ndarray, " m"]
    decoupled: Float[np.ndarray, " m"]
    log_distance: float
    relative_distance: float
    matrix_distance: float
    samples: int


@dataclass(frozen=True)
class SampleKernel:
    """Scalar products between the gradients of the network's outputs, from which both sides follow for any samples.

    Attributes:
        kernel: ``J_mu J_nu^T``, samples and outputs in one axis, sample by sample.
        slopes: ``d l_mu / d f_mu`` of each sample and output.
        losses: ``l_mu`` of each sample.
    """

    kernel: Float[np.ndarray, "nm nm"]
    slopes: Float[np.ndarray, "n m"]
    losses: Float[np.ndarray, " n"]

    def check(
        self, chosen: Int[np.ndarray, " k"] | None = None, exchanged: Int[np.ndarray, " k"] | None = None
    ) -> DecouplingCheck:
        """Both sides of the approximation over some of the samples.

        Args:
            chosen: use these samples; None: all.
            exchanged: on the coupled side give each of them the error of another, ``chosen[exchanged]``. In a random
                order that breaks any tie between a sample's loss and its gradient, so that what is left of the
                distance is the scatter of finitely many samples.
        """
        samples, outputs = self.slopes.shape
        chosen = np.arange(samples) if chosen is None else np.asarray(chosen)
        size = len(chosen)
        rows = (chosen[:, None] * outputs + np.arange(outputs)).reshape(-1)
        kernel = self.kernel[np.ix_(rows, rows)]
        slopes = self.slopes[chosen if exchanged is None else chosen[np.asarray(exchanged)]]
        half = np.einsum("na,nam->nm", slopes, kernel.reshape(size, outputs, -1))
        coupled = np.einsum("nmb,mb->nm", half.reshape(size, size, outputs), slopes) / (2 * size)
        decoupled = kernel * (self.losses[chosen].mean() / size)
        cross = (half**2).sum() * self.losses[chosen].mean() / (2 * size**2)
        left = np.clip(np.linalg.eigvalsh(coupled)[::-1], 0, None)
        right = np.clip(np.linalg.eigvalsh(decoupled)[::-1], 0, None)
        rank = min(len(left), len(right))
        pair = np.stack([left[:rank], right[:rank]])
        held = np.all(pair > SMALLEST * pair[:, :1], axis=0)
        ratio = np.log10(pair[0, held] / pair[1, held])
        square = (coupled**2).sum() + (decoupled**2).sum() - 2 * cross
        return DecouplingCheck(
            coupled=left,
            decoupled=right,
            log_distance=float(np.sqrt(np.mean(ratio**2))) if len(ratio) else float("nan"),
            relative_distance=float(np.abs(pair[0] - pair[1]).sum() / right.sum()),
            matrix_distance=float(np.sqrt(max(square, 0.0) / (decoupled**2).sum())),
            samples=size,
        )


def decoupling_check(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    samples: int | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
) -> DecouplingCheck:
    """Compare the two sides of the decoupling approximation of the mean-square loss.

    ``C_mu = grad f_mu grad f_mu^T``, and ``l_mu C_mu = grad l_mu grad l_mu^T / 2``, which is also what is taken for a
    network with several outputs (then with ``C_mu = J_mu^T J_mu`` on the other side). The spectra are those of the
    matrices of scalar products between samples, so that the cost grows with the samples and not with the parameters.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        samples: use this many random samples (time: their number times the outputs, cubed); None: all.
        loss: as in ``train_minimum``; the approximation is made for the mean-square loss.
        seed: of the choice of samples.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        Two samples in different directions: the losses 2 and 0.5 stay with theirs on one side, and are averaged, 1.25,
        on the other.

        >>> check = decoupling_check(
        ...     lambda theta, x: x @ theta, jnp.zeros(2), jnp.eye(2), jnp.array([2.0, 1.0]))
        >>> check.coupled.round(3).tolist(), check.decoupled.round(3).tolist()
        ([1.0, 0.25], [0.625, 0.625])

    References:
        Mori, Ziyin, Liu and Ueda, ICML 2022, figure of the decoupling approximation.
    """
    return sample_kernel(apply, minimum, inputs, targets, samples=samples, loss=loss, seed=seed).check()


def sample_kernel(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    samples: int | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
) -> SampleKernel:
    """What ``decoupling_check`` needs, to check any choice of the samples with one computation of the gradients.

    The products are summed in double precision, so that eigenvalues far below the largest are held.

    Args:
        apply, minimum, inputs, targets, samples, loss, seed: as in ``decoupling_check``.

    Raises:
        InputError: an argument that cannot be used, or gradients that are not finite.

    Examples:
        >>> found = sample_kernel(lambda theta, x: x @ theta, jnp.zeros(2), jnp.eye(2), jnp.array([2.0, 1.0]))
        >>> found.kernel.tolist(), found.slopes.tolist(), found.losses.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[-2.0], [-1.0]], [2.0, 0.5])
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss, subsample=samples, seed=seed)
    jacobian_of = _compiled_jacobian(problem.recipe)
    size = len(problem.inputs)
    pieces = [slice(begin, min(begin + BLOCK, size)) for begin in range(0, size, BLOCK)]

    def jacobian(piece: slice) -> tuple[Float[np.ndarray, "bm p"], np.ndarray, np.ndarray]:
        rows, slopes, losses = jacobian_of(problem.params, problem.inputs[piece], problem.targets[piece])
        return np.asarray(rows, float).reshape(-1, rows.shape[-1]), np.asarray(slopes, float), np.asarray(losses, float)

    kernel, slopes, losses = np.zeros((0, 0)), [], []
    for number, piece in enumerate(pieces):
        rows, slope, loss_here = jacobian(piece)
        slopes.append(slope)
        losses.append(loss_here)
        outputs = slope.shape[1]
        if number == 0:
            kernel = np.empty((size * outputs, size * outputs))
        own = slice(piece.start * outputs, piece.stop * outputs)
        kernel[own, own] = rows @ rows.T
        for other in pieces[:number]:
            across = slice(other.start * outputs, other.stop * outputs)
            kernel[own, across] = rows @ jacobian(other)[0].T
            kernel[across, own] = kernel[own, across].T
    if not np.all(np.isfinite(kernel)):
        raise InputError("the gradients of the network are not finite at these parameters.")
    return SampleKernel(kernel, np.concatenate(slopes), np.concatenate(losses))


@lru_cache(maxsize=32)
def _compiled_jacobian(recipe: Recipe) -> Callable:
    def jacobian(params: PyTree, inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        flat, unravel = ravel_pytree(params)

        def outputs(vector: Array, x: Array) -> Array:
            return recipe.apply(unravel(vector), x[None])[0]

        def one(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            x, y = pair
            loss, slope = jax.value_and_grad(recipe.loss)(outputs(flat, x), y)
            return jax.jacrev(outputs)(flat, x).reshape(-1, flat.size), jnp.atleast_1d(slope).reshape(-1), loss

        return jax.lax.map(one, (inputs, targets), batch_size=50)

    return jax.jit(jacobian)
