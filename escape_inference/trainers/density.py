"""The density of the Hessian's spectrum, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from matfree import decomp

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import make_problem, product_with
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.sgd import Recipe


@dataclass(frozen=True)
class SpectralDensity:
    """Quadrature rules of the spectral density, one for each random probe.

    Attributes:
        nodes: 1/time.
        weights: of each node; the weights of a probe sum to 1.
        dimension: number of eigenvalues of the matrix.
    """

    nodes: Float[np.ndarray, "probes iterations"]
    weights: Float[np.ndarray, "probes iterations"]
    dimension: int

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """The mean of a function over all eigenvalues, and its standard error.

        The error is the larger of the scatter over probes, which a few probes may understate, and of what normal probes
        are known to scatter: ``sqrt(2 <f^2> / (dimension probes))``.
        """
        values = (self.weights * function(self.nodes)).sum(1)
        scatter = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        square = float((self.weights * function(self.nodes) ** 2).sum(1).mean())
        return float(values.mean()), max(float(scatter), float(np.sqrt(2 * square / (self.dimension * len(values)))))

    def count_above(self, level: float) -> tuple[float, float]:
        """The number of eigenvalues above a level, and its standard error.

        Few eigenvalues are counted poorly, with an error of at least ``sqrt(2 n / probes)`` (n not below 1), many well.
        """
        mean, error = self.mean(lambda nodes: (nodes > level).astype(float))
        return self.dimension * mean, max(self.dimension * error, float(np.sqrt(2 / len(self.nodes))))

    def density(self, at: Float[np.ndarray, " m"], width: float) -> Float[np.ndarray, " m"]:
        """The density per unit of 1/time, smoothed by normal kernels of standard deviation ``width``; its area is 1."""
        kernels = np.exp(-0.5 * ((at[:, None, None] - self.nodes) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return (kernels * self.weights).sum(2).mean(1)


def spectral_density(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    probes: int = 8,
    iterations: int = 60,
    part: str = "hessian",
    layers: str | None = None,
    subsample: int | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
) -> SpectralDensity:
    """The density of all eigenvalues of the full-batch Hessian.

    Stochastic Lanczos quadrature (Golub and Meurant 1994; Ubaru, Chen and Saad 2017; for networks Ghorbani, Krishnan and
    Xiao 2019): the Lanczos matrix of a normal random vector is a Gauss quadrature rule of the spectrum as that vector
    sees it, and the mean over vectors is the spectral density.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        probes: random vectors.
        iterations: Lanczos iterations, the nodes of each rule.
        part: ``hessian`` or ``gauss_newton``.
        layers: only the block of the parameters whose path begins so; see ``layer_names``.
        subsample: use this many random samples instead of all.
        loss: as in ``train_minimum``.
        seed: of the probes and of the subsample.

    Raises:
        InputError: an argument that cannot be used, or a Hessian that is not finite.

    Examples:
        >>> inputs = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
        >>> density = spectral_density(lambda theta, x: x @ theta, jnp.zeros(4), inputs, jnp.zeros(4), probes=3)
        >>> density.nodes[0].round(3).tolist()
        [4.0, 2.25, 1.0, 0.25]
    """
    if int(probes) != probes or probes < 1:
        raise InputError(f"probes: must be a positive integer, got {probes}.")
    problem = make_problem(
        apply, minimum, inputs, targets, loss=loss, layers=layers, subsample=subsample, seed=seed
    ).compact()
    if int(iterations) != iterations or iterations < 1:
        raise InputError(f"iterations: must be a positive integer, got {iterations}.")
    iterations = min(int(iterations), problem.dimension)
    rule = compiled_rule(problem.recipe, part, iterations)
    nodes, weights = [], []
    for probe in range(probes):
        found = rule(problem.params, problem.mask, problem.start(2 + probe), problem.inputs, problem.targets)
        nodes.append(np.asarray(found[0], float)[::-1])
        weights.append(np.asarray(found[1], float)[::-1])
    if not np.all(np.isfinite(nodes)):
        raise InputError("the Hessian is not finite at these parameters.")
    return SpectralDensity(np.array(nodes), np.array(weights), problem.dimension)


@lru_cache(maxsize=32)
def compiled_rule(recipe: Recipe, part: str, iterations: int) -> Callable:
    """``(params, mask, start, inputs, targets) -> (nodes, weights)`` of the spectrum as ``start`` sees it, compiled."""

    def rule(params: PyTree, mask: Array, start: Array, inputs: Array, targets: Array) -> tuple[Array, Array]:
        product = product_with(recipe, part, params, mask, inputs, targets)
        _, matrix, *_ = decomp.tridiag_sym(iterations, reortho="full", custom_vjp=False)(product, start)
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors[0] ** 2

    return jax.jit(rule)
