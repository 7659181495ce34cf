"""A law's log rates as Chebyshev polynomials of its parameters, over the region where the posterior is.

The exact passage laws of a threshold are integrals, far too slow for the thousands of gradients of a sampler, and every law of its
own would have to be compiled. But the log rate of every condition is a smooth function of the law's one or two parameters,
so a table of polynomial coefficients reproduces it: roughly over the prior, where tempered Monte Carlo looks for the posterior,
and to many digits over the region that the posterior occupies. Samplers then see numbers only, the same program for every law.
Whoever samples with it checks draws against the exact law afterwards.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SLOTS = 2  #: parameters that a table can have; the slots that a law does not use stay idle
TERMS = {"near": 351, "wide": 400}  #: products of polynomials that are kept, those of lowest total degree
NODES = {"near": {1: 28, 2: 26}, "wide": {1: 40, 2: 28}}  #: nodes a parameter, by the number of parameters
DEGREES = 40


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Surrogate:
    """Chebyshev coefficients over a box in the parameters (logarithms of positive ones)."""

    center: Float[Array, " slot"]
    half_width: Float[Array, " slot"]
    degrees: Int[Array, "slot term"]
    coefficients: Float[Array, "condition term"]
    names: tuple[str, ...] = field(metadata={"static": True})
    positive: tuple[bool, ...] = field(metadata={"static": True})

    def __call__(self, values: dict[str, Array]) -> Float[Array, " condition"]:
        """Log rates (without log prefactor) for named parameter values; constant beyond the box."""
        place = jnp.zeros(self.degrees.shape[0])
        for k, (name, positive) in enumerate(zip(self.names, self.positive, strict=True)):
            raw = jnp.log(values[name]) if positive else values[name]
            place = place.at[k].set(jnp.clip((raw - self.center[k]) / self.half_width[k], -1.0, 1.0))
        return _series(place, self.degrees, self.coefficients)

    def with_terms(self, extent: str) -> "Surrogate":
        """The same in the shape of a larger table, for programs that were compiled for that one."""
        degrees, coefficients = (
            jnp.asarray(_padded(np.asarray(x), TERMS[extent], axis=1)) for x in (self.degrees, self.coefficients)
        )
        return replace(self, degrees=degrees, coefficients=coefficients)


@jax.custom_jvp
def _series(place: Float[Array, " slot"], degrees: Array, coefficients: Array) -> Float[Array, " condition"]:
    return coefficients @ jnp.prod(_terms(_polynomials(place)[0], degrees), axis=0)


@_series.defjvp
def _series_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The gradient by the slopes of the polynomials; the table itself is a constant."""
    place, degrees, coefficients = primals
    value, slope = (_terms(x, degrees) for x in _polynomials(place))
    slots = range(len(place))
    slopes = [jnp.prod(jnp.stack([slope[j] if j == k else value[j] for j in slots]), axis=0) for k in slots]
    both = coefficients @ jnp.stack([jnp.prod(value, axis=0), *slopes], axis=1)
    return both[:, 0], both[:, 1:] @ tangents[0]


def _polynomials(place: Float[Array, " slot"]) -> tuple[Float[Array, "slot degree"], Float[Array, "slot degree"]]:
    """``T_k = cos kθ`` and ``T_k' = k sin kθ / sin θ`` at ``cos θ``, the latter kept finite at the ends of the box."""
    degree, angle = jnp.arange(DEGREES), jnp.arccos(place)[:, None]
    sine = jnp.sqrt(jnp.maximum(1 - place**2, 1e-14))[:, None]
    return jnp.cos(degree * angle), degree * jnp.sin(degree * angle) / sine


def _terms(polynomials: Float[Array, "slot degree"], degrees: Array) -> Float[Array, "slot term"]:
    return jnp.take_along_axis(polynomials, degrees, axis=1)


def chebyshev_points(dimension: int, extent: str) -> Float[np.ndarray, "point dimension"]:
    """All points of the tensor grid in [−1, 1]^dimension, the last coordinate fastest, for a "near" or a "wide" table."""
    count = NODES[extent][dimension]
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    return np.stack(np.meshgrid(*[nodes] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)


def tabulate(
    rates: Float[np.ndarray, "point condition"],
    center: Float[np.ndarray, " parameter"],
    half_width: Float[np.ndarray, " parameter"],
    names: tuple[str, ...],
    positive: tuple[bool, ...],
    extent: str,
) -> Surrogate:
    """The polynomials through log rates at ``center + half_width · chebyshev_points``.

    >>> points = chebyshev_points(1, "near")
    >>> table = tabulate(2 * points**2 - 1, np.zeros(1), np.ones(1), ("a",), (False,), "near")
    >>> table({"a": jnp.array(0.5)}).round(5).tolist()  # T₂(½) = 2/4 − 1
    [-0.5]
    """
    dimension = len(center)
    count, terms = NODES[extent][dimension], TERMS[extent]
    angle = np.pi * (np.arange(count) + 0.5) / count
    transform = 2.0 / count * np.cos(np.arange(count)[:, None] * angle)
    transform[0] /= 2
    result = rates.T.reshape(-1, *[count] * dimension)
    for axis in range(1, dimension + 1):
        result = np.moveaxis(np.tensordot(transform, result, axes=(1, axis)), 0, axis)
    degrees = np.indices([count] * dimension).reshape(dimension, -1)
    kept = np.argsort(degrees.sum(axis=0), kind="stable")[:terms]
    return Surrogate(
        center=jnp.asarray(_padded(center, SLOTS)),
        half_width=jnp.asarray(_padded(half_width, SLOTS, fill=1.0)),
        degrees=jnp.asarray(_padded(_padded(degrees[:, kept], terms, axis=1), SLOTS)),
        coefficients=jnp.asarray(_padded(result.reshape(len(result), -1)[:, kept], terms, axis=1)),
        names=names,
        positive=positive,
    )


def _padded(values: np.ndarray, size: int, axis: int = 0, fill: float = 0.0) -> np.ndarray:
    width = [(0, 0)] * values.ndim
    width[axis] = (0, size - values.shape[axis])
    return np.pad(values, width, constant_values=fill)
