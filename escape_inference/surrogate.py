"""A law's log rates as Chebyshev polynomials of its parameters, over the region where the posterior is.

The exact passage laws of a threshold are integrals, far too slow for the thousands of gradients of a sampler. But the log rate of
every condition is a smooth function of the law's one to three parameters, so a tensor product of Chebyshev polynomials
reproduces it: roughly over the prior, where tempered Monte Carlo looks for the posterior, and to many digits over the region
that the posterior occupies. Whoever samples with it checks draws against the exact law afterwards.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NEAR_NODES = {1: 20, 2: 14, 3: 9}  #: nodes a parameter over the posterior, by the number of parameters
WIDE_NODES = {1: 48, 2: 28, 3: 14}  #: the same over the prior
NEAR_SDS, WIDE_SDS = 8.0, 3.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Surrogate:
    """Chebyshev coefficients ``[condition, node, ...]`` over a box in the parameters (logarithms of positive ones)."""

    center: Float[Array, " parameter"]
    half_width: Float[Array, " parameter"]
    coefficients: Float[Array, "condition ..."]
    names: tuple[str, ...] = field(metadata={"static": True})
    positive: tuple[bool, ...] = field(metadata={"static": True})

    def __call__(self, values: dict[str, Array]) -> Float[Array, " condition"]:
        """Log rates (without log prefactor) for named parameter values; constant beyond the box."""
        result = self.coefficients
        for k, (name, positive) in enumerate(zip(self.names, self.positive, strict=True)):
            raw = jnp.log(values[name]) if positive else values[name]
            x = jnp.clip((raw - self.center[k]) / self.half_width[k], -1.0, 1.0)
            result = jnp.einsum("ck...,k->c...", result, _polynomials(x, result.shape[1]))
        return result


def _polynomials(x: Array, count: int) -> Float[Array, " count"]:
    values = [jnp.ones_like(x), x]
    while len(values) < count:
        values.append(2 * x * values[-1] - values[-2])
    return jnp.stack(values[:count])


def chebyshev_points(dimension: int, count: int) -> Float[np.ndarray, "point dimension"]:
    """All points of the tensor grid in [−1, 1]^dimension, the last coordinate fastest."""
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    return np.stack(np.meshgrid(*[nodes] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)


def chebyshev_coefficients(values: Float[np.ndarray, "point condition"], dimension: int, count: int) -> np.ndarray:
    """Coefficients ``[condition, node, ...]`` from values at :func:`chebyshev_points`.

    >>> points = chebyshev_points(1, 8)
    >>> np.round(chebyshev_coefficients(2 * points**2 - 1, 1, 8)[0, :4], 12) + 0.0
    array([0., 0., 1., 0.])
    """
    angle = np.pi * (np.arange(count) + 0.5) / count
    transform = 2.0 / count * np.cos(np.arange(count)[:, None] * angle)
    transform[0] /= 2
    result = values.T.reshape(-1, *[count] * dimension)
    for axis in range(1, dimension + 1):
        result = np.moveaxis(np.tensordot(transform, result, axes=(1, axis)), 0, axis)
    return result
