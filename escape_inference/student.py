"""The Student distribution that samplers and both evidence methods use as a proposal, and densities at many points."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float
from scipy.special import gammaln

from escape_inference.programs import Ahead, random_keys

LogDensity = Callable[..., Array]

BLOCK = 512  # points whose densities are computed by one call of one compiled program
FREEDOM = 7  # degrees of freedom: tails heavier than those of any log-concave posterior


class Student(NamedTuple):
    """Student distribution with ``FREEDOM`` degrees of freedom: location [dim], Cholesky factor of its scale."""

    location: Float[Any, " dim"]
    factor: Float[Any, "dim dim"]

    def transform(self, normal: Float[Any, "... dim+freedom"]) -> Float[Any, "... dim"]:
        """Draws, each made of ``dim + FREEDOM`` standard normal numbers."""
        dim = self.location.shape[0]
        direction, rest = normal[..., :dim], normal[..., dim:]
        return self.location + direction @ self.factor.T * (FREEDOM / (rest**2).sum(axis=-1, keepdims=True)) ** 0.5

    def log_density(self, z: Float[Any, "... dim"]) -> Float[Any, "..."]:
        """Log density at ``z``, in JAX or, for a NumPy array, in NumPy."""
        numpy, dim = np if isinstance(z, np.ndarray) else jnp, z.shape[-1]
        solve = partial(scipy.linalg.solve_triangular, check_finite=False) if numpy is np else solve_triangular
        square = (solve(self.factor, (z - self.location).T, lower=True) ** 2).sum(axis=0)
        constant = gammaln((FREEDOM + dim) / 2) - gammaln(FREEDOM / 2) - 0.5 * dim * np.log(FREEDOM * np.pi)
        log_determinant = numpy.log(numpy.diagonal(self.factor)).sum()
        return constant - log_determinant - 0.5 * (FREEDOM + dim) * numpy.log1p(square / FREEDOM)


def normal_log_density(x: Any, center: Any, scale: Any) -> Any:
    """Log density of a normal distribution in NumPy; SciPy's distributions take a second to read."""
    return -0.5 * ((x - center) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def fit_normal(
    points: Float[np.ndarray, "point dim"], weights: Float[np.ndarray, " point"]
) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    """Weighted mean, and Cholesky factor of the weighted covariance (ridge of 1e-9 of its diagonal)."""
    mean = weights @ points
    centred = points - mean
    covariance = (centred * weights[:, None]).T @ centred
    return mean, np.linalg.cholesky(covariance + np.diag(1e-9 * np.diagonal(covariance) + 1e-300))


def fit_student(points: Float[np.ndarray, "point dim"], weights: Float[np.ndarray, " point"]) -> Student:
    """Student distribution with the mean and the covariance of the weighted points."""
    mean, factor = fit_normal(points, weights)
    return Student(mean, factor * np.sqrt((FREEDOM - 2) / FREEDOM))


def call(function: LogDensity, z: Array, data: Any) -> Array:
    return function(z) if data is None else function(z, data)


def at_points(
    log_density: LogDensity, points: Float[np.ndarray, "point dim"], data: Any
) -> Float[np.ndarray, " point"]:
    """Log density at many points: by its attribute ``at_points`` if it has one, else in blocks of one size so that it compiles once."""
    if own := getattr(log_density, "at_points", None):
        return own(points, data)
    blocks = -(-len(points) // BLOCK)
    padded = np.concatenate([points, np.repeat(points[-1:], blocks * BLOCK - len(points), axis=0)])
    parts = [np.asarray(_block(part, data, log_density=log_density)) for part in np.split(padded, blocks)]
    return np.concatenate(parts)[: len(points)]


def prepare_density(log_density: LogDensity, dim: int, data: Any) -> None:
    """Start compiling what :func:`at_points` needs, if that is a program of its own."""
    if not hasattr(log_density, "at_points"):
        _block.prepare(jax.ShapeDtypeStruct((BLOCK, dim), np.float64), data, log_density=log_density)


@partial(Ahead, static=("log_density",))
def _block(points: Float[Array, "point dim"], data: Any, *, log_density: LogDensity) -> Float[Array, " point"]:
    return jax.lax.map(lambda z: call(log_density, z, data), points, batch_size=64)


def draws_of(sample: Callable[..., Array], count: int, seed: list[int], data: Any) -> Float[np.ndarray, "draw dim"]:
    """Draws ``sample(key, data)``: by its attribute ``draws`` if it has one, else by one compiled program."""
    if own := getattr(sample, "draws", None):
        return own(count, np.random.default_rng(seed), data)
    return np.asarray(_draws(random_keys(*seed, count=count), data, sample=sample))


@partial(Ahead, static=("sample",))
def _draws(keys: Array, data: Any, *, sample: Callable[..., Array]) -> Float[Array, "draw dim"]:
    return jax.vmap(lambda key: call(sample, key, data))(keys)
