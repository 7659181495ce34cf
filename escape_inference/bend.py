"""Coordinates in which a bent posterior is nearly a normal distribution, so that samplers can take long steps.

Escape rates fix combinations of parameters, and the posterior is then a narrow ridge along which the others change, not linearly: no mass
matrix fits both of its ends. In the order of their variance, each principal coordinate minus a quadratic function of those before it
is straight. The transformation is triangular, so its Jacobian is a constant, and it is exact for any coefficients: a poor fit costs
time, never correctness.

References:
    Marzouk, Moselhy, Parno and Spantini, An introduction to sampling via measure transport (2016), section 3.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

REACH = 5.0  #: standard deviations up to which the quadratic functions are followed; constant beyond
MOST_DIMENSIONS = 7  #: in more there is no transformation: too few points are known for so many coefficients
LEAST_VARIANCE = 1e-10
BENT = 0.3  #: share of a coordinate's variance that a bend explains where it is no chance


class Bend(NamedTuple):
    """``z = center + axes (w + products(1, w) coefficients)``; every column of the coefficients uses earlier coordinates only."""

    center: Float[Any, " dim"]
    axes: Float[Any, "dim dim"]
    coefficients: Float[Any, "product dim"]


def _products(w: Any, numpy: Any) -> Any:
    """All products of two of 1 and the coordinates, ``[..., (dim + 1)²]``; 1 alone in many dimensions."""
    one = numpy.ones_like(w[..., :1])
    if w.shape[-1] > MOST_DIMENSIONS:
        return one
    known = numpy.concatenate([one, numpy.clip(w, -REACH, REACH)], axis=-1)
    return (known[..., :, None] * known[..., None, :]).reshape(*w.shape[:-1], -1)


def straight(dim: int) -> Bend:
    """No transformation at all, of the shapes that :func:`fit_bend` gives.

    >>> bent(straight(2), jnp.array([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    return Bend(np.zeros(dim), np.eye(dim), np.zeros(((dim + 1) ** 2 if dim <= MOST_DIMENSIONS else 1, dim)))


def fit_bend(
    points: Float[np.ndarray, "point dim"], weights: Float[np.ndarray, " point"] | None = None, least: float = 0.0
) -> Bend:
    """The transformation in which (weighted) points of a posterior are straight, by least squares; none at all in many dimensions or for few points.

    A coordinate of which it explains less than the share ``least`` of the variance stays as it is.

    >>> r = np.linspace(-2, 2, 50)
    >>> around = np.stack([3 * r, r**2], axis=1)
    >>> bool(np.ptp(unbent(fit_bend(around), around)[:, 1]) < 1e-9)
    True
    """
    count, dim = points.shape
    if dim > MOST_DIMENSIONS or count <= (dim + 1) * (dim + 2) // 2:
        return straight(dim)
    share = np.full(count, 1 / count) if weights is None else weights / weights.sum()
    center, bend, root = share @ points, straight(dim), np.sqrt(share)[:, None]
    variance, vectors = np.linalg.eigh(np.atleast_2d(np.cov(points.T, aweights=share)))
    axes = vectors[:, ::-1] * np.sqrt(np.maximum(variance[::-1], LEAST_VARIANCE))
    places = np.linalg.solve(axes, (points - center).T).T
    w = places.copy()
    for k in range(1, dim):
        i, j = np.triu_indices(k + 1)
        known = _products(w, np)[:, allowed := i * (dim + 1) + j]
        bend.coefficients[allowed, k] = np.linalg.lstsq(root * known, root[:, 0] * places[:, k], rcond=None)[0]
        w[:, k] = places[:, k] - known @ bend.coefficients[allowed, k]
        if share @ w[:, k] ** 2 > (1 - least) * (share @ places[:, k] ** 2):
            bend.coefficients[:, k], w[:, k] = 0.0, places[:, k]
    return Bend(center, axes, bend.coefficients)


def bent(bend: Bend, w: Float[Any, "... dim"]) -> Float[Any, "... dim"]:
    """Points of the posterior's own space from points of the straight one, in JAX or, for a NumPy array, in NumPy."""
    return bend.center + (w + _products(w, np if isinstance(w, np.ndarray) else jnp) @ bend.coefficients) @ bend.axes.T


def unbent(bend: Bend, z: Float[np.ndarray, "point dim"]) -> Float[np.ndarray, "point dim"]:
    """The inverse of :func:`bent`, coordinate by coordinate."""
    w = np.linalg.solve(bend.axes, (z - bend.center).T).T
    for k in range(1, w.shape[1]):  # every column needs the earlier ones only
        w[:, k] -= _products(w, np) @ bend.coefficients[:, k]
    return w
