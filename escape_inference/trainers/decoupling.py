"""The decoupling approximation, checked: ``(1/N) sum_mu l_mu C_mu`` against ``L (1/N) sum_mu C_mu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from escape_inference.trainers.curvature import make_problem
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.sgd import Recipe

SMALLEST = 1e-5
"""Eigenvalues below this fraction of the largest are left out of the distance: single precision does not hold them."""


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
        samples: use this many random samples (memory: samples x outputs x parameters numbers); None: all.
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
    problem = make_problem(apply, minimum, inputs, targets, loss=loss, subsample=samples, seed=seed)
    found = _compiled_products(problem.recipe)(problem.params, problem.inputs, problem.targets)
    coupled, decoupled, cross = (np.asarray(product, float) for product in found)
    left = np.clip(np.linalg.eigvalsh(coupled)[::-1], 0, None)
    right = np.clip(np.linalg.eigvalsh(decoupled)[::-1], 0, None)
    rank = min(len(left), len(right))
    pair = np.stack([left[:rank], right[:rank]])
    held = np.all(pair > SMALLEST * pair[:, :1], axis=0)
    ratio = np.log10(pair[0, held] / pair[1, held])
    square = (coupled**2).sum() + (decoupled**2).sum() - 2 * (cross**2).sum()
    return DecouplingCheck(
        coupled=left,
        decoupled=right,
        log_distance=float(np.sqrt(np.mean(ratio**2))) if len(ratio) else float("nan"),
        relative_distance=float(np.abs(pair[0] - pair[1]).sum() / right.sum()),
        matrix_distance=float(np.sqrt(max(square, 0.0) / (decoupled**2).sum())),
        samples=len(problem.inputs),
    )


@lru_cache(maxsize=32)
def _compiled_products(recipe: Recipe) -> Callable:
    def products(params: PyTree, inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        """Scalar products between the samples' vectors of each side, and between the sides."""
        flat, unravel = ravel_pytree(params)
        samples = len(inputs)

        def loss_of(vector: Array, x: Array, y: Array) -> Array:
            return recipe.mean_loss(unravel(vector), x[None], y[None])

        def outputs(vector: Array, x: Array) -> Array:
            return recipe.apply(unravel(vector), x[None]).reshape(-1)

        one_gradient, one_jacobian = jax.grad(loss_of), jax.jacrev(outputs)
        gradients = jax.lax.map(lambda pair: one_gradient(flat, *pair), (inputs, targets))
        jacobians = jax.lax.map(lambda x: one_jacobian(flat, x), inputs).reshape(-1, flat.size)
        loss = recipe.mean_loss(params, inputs, targets)
        left = gradients / jnp.sqrt(2.0 * samples)
        right = jacobians * jnp.sqrt(loss / samples)
        return left @ left.T, right @ right.T, left @ right.T

    return jax.jit(products)
