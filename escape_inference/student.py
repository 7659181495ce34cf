"""The Student distribution that both evidence methods use as a proposal, fitted to weighted points."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from escape_inference.programs import Ahead

LogDensity = Callable[..., Array]

BLOCK = 1000  # points whose densities are computed by one call of one compiled program
FREEDOM = 7  # degrees of freedom: tails heavier than those of any log-concave posterior


class Student(NamedTuple):
    """Student distribution with ``FREEDOM`` degrees of freedom: location [dim], Cholesky factor of its scale."""

    location: Float[Array, " dim"]
    factor: Float[Array, "dim dim"]

    def transform(self, normal: Float[Array, "dim+freedom"]) -> Float[Array, " dim"]:
        """One draw, made of ``dim + FREEDOM`` standard normal numbers."""
        direction, rest = jnp.split(normal, [self.location.size])
        return self.location + self.factor @ direction * jnp.sqrt(FREEDOM / jnp.sum(rest**2))

    def log_density(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Log density at ``z``."""
        dim = z.shape[-1]
        square = jnp.sum(solve_triangular(self.factor, z - self.location, lower=True) ** 2)
        constant = gammaln((FREEDOM + dim) / 2) - gammaln(FREEDOM / 2) - 0.5 * dim * jnp.log(FREEDOM * jnp.pi)
        log_determinant = jnp.sum(jnp.log(jnp.diagonal(self.factor)))
        return constant - log_determinant - 0.5 * (FREEDOM + dim) * jnp.log1p(square / FREEDOM)


def fit_normal(
    points: Float[Array, "point dim"], weights: Float[Array, " point"]
) -> tuple[Array, Float[Array, "dim dim"]]:
    """Weighted mean, and Cholesky factor of the weighted covariance (ridge of 1e-9 of its diagonal)."""
    mean = weights @ points
    centred = points - mean
    covariance = (centred * weights[:, None]).T @ centred
    return mean, jnp.linalg.cholesky(covariance + jnp.diag(1e-9 * jnp.diagonal(covariance) + 1e-300))


def fit_student(points: Float[Array, "point dim"], weights: Float[Array, " point"]) -> Student:
    """Student distribution with the mean and the covariance of the weighted points."""
    mean, factor = fit_normal(points, weights)
    return Student(mean, factor * jnp.sqrt((FREEDOM - 2) / FREEDOM))


def normals(key: Array, count: int) -> Float[Array, " count"]:
    """Standard normal numbers, made in a loop: the compiler would repeat their long computation wherever one of them is used."""
    halves = jax.lax.map(lambda k: jax.random.normal(k, (-(-count // 2),)), jax.random.split(key))
    return halves.ravel()[:count]


def call(function: LogDensity, z: Array, data: Any) -> Array:
    return function(z) if data is None else function(z, data)


def at_points(
    log_density: LogDensity, points: Float[np.ndarray, "point dim"], data: Any
) -> Float[np.ndarray, " point"]:
    """Log density at many points, in blocks of one size so that it compiles once."""
    blocks = -(-len(points) // BLOCK)
    padded = np.concatenate([points, np.repeat(points[-1:], blocks * BLOCK - len(points), axis=0)])
    parts = [np.asarray(_block(part, data, log_density=log_density)) for part in np.split(padded, blocks)]
    return np.concatenate(parts)[: len(points)]


def prepare_density(log_density: LogDensity, dim: int, data: Any) -> None:
    """Start compiling what :func:`at_points` needs."""
    _block.prepare(jax.ShapeDtypeStruct((BLOCK, dim), np.float64), data, log_density=log_density)


@partial(Ahead, static=("log_density",))
def _block(points: Float[Array, "point dim"], data: Any, *, log_density: LogDensity) -> Float[Array, " point"]:
    return jax.lax.map(lambda z: call(log_density, z, data), points, batch_size=100)
