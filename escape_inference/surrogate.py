"""A law's log rates as polynomials of its parameters, over the region where the posterior is.

The exact passage laws of a threshold are integrals, far too slow for the thousands of gradients of a sampler, and every law of its
own would have to be compiled. But the log rate of every condition is a smooth function of the law's one to three parameters, so
products of a few polynomials of each parameter reproduce it (a Tucker decomposition of its values at Chebyshev nodes): roughly over the
prior, where tempered Monte Carlo looks for the posterior, and to many digits over the region that the posterior occupies, most digits
where most of it is. Samplers then see numbers only, the same program for every law. Whoever samples with it checks draws against the
exact law afterwards.

References:
    Trefethen, Approximation Theory and Approximation Practice (2013), chapter 3; De Lathauwer, De Moor and Vandewalle,
    SIAM J. Matrix Anal. Appl. 21, 1253 (2000).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SLOTS = 3  #: parameters that a table can have; the slots that a law does not use stay idle
#: Chebyshev nodes a parameter, by the number of parameters; "fine" is for a posterior whose rates a "near" table does not follow.
NODES = {"near": {1: 28, 2: 26, 3: 14}, "fine": {1: 28, 2: 26, 3: 14}, "wide": {1: 40, 2: 28, 3: 18}}
DEGREES = {extent: max(nodes.values()) for extent, nodes in NODES.items()}
_FEW, _MANY = (16, 16, 1), (8, 8, 8)
RANKS = {  #: polynomials of each slot, by the number of parameters
    "near": {1: (6, 6, 6), 2: (6, 6, 6), 3: (6, 6, 6)},
    "fine": {1: _FEW, 2: _FEW, 3: _MANY},
    "wide": {1: (8, 8, 8), 2: (8, 8, 8), 3: (8, 8, 8)},
}
WIDER, LEAST_WIDTH, LEAST_DENSITY = 1.5, 0.02, 0.01  #: draws in other posteriors and in tails count, too
LOADINGS = {"near": 16, "fine": 32, "wide": 24}  #: sums of products of them that the conditions share


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Surrogate:
    """Polynomials over a box in the parameters (logarithms of positive ones).

    Attributes:
        center, half_width: of the box.
        polynomials: Chebyshev coefficients of the polynomials of each parameter.
        core: coefficients of their products.
        loadings: weight of each of these sums in the log rate of a condition.
        names, positive: of the parameters.
    """

    center: Float[Any, " slot"]
    half_width: Float[Any, " slot"]
    polynomials: Float[Any, "slot degree rank"]
    core: Float[Any, "loading rank_a rank_b rank_c"]
    loadings: Float[Any, "condition loading"]
    names: tuple[str, ...] = field(metadata={"static": True})
    positive: tuple[bool, ...] = field(metadata={"static": True})

    def __call__(self, values: dict[str, Array]) -> Float[Array, " condition"]:
        """Log rates (without log prefactor) for named parameter values; constant beyond the box."""
        place = jnp.zeros(SLOTS)
        for k, (name, positive) in enumerate(zip(self.names, self.positive, strict=True)):
            raw = jnp.log(values[name]) if positive else values[name]
            place = place.at[k].set(jnp.clip((raw - self.center[k]) / self.half_width[k], -1.0, 1.0))
        return _log_rates(place, self.polynomials, self.core, self.loadings)


@jax.custom_jvp
def _log_rates(place: Float[Array, " slot"], polynomials: Array, core: Array, loadings: Array) -> Array:
    a, b, c = (one[:rank] for one, rank in zip(_basis(place, polynomials)[..., 0], core.shape[1:], strict=True))
    return loadings @ (core @ c @ b @ a)


@_log_rates.defjvp
def _log_rates_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The gradient by the slopes of the polynomials; the table itself is a constant."""
    place, polynomials, core, loadings = primals
    (a, slope_a), (b, slope_b), (c, slope_c) = jnp.moveaxis(_basis(place, polynomials), 2, 1)
    inner = _mix(c, table := core.T)
    rest = _mix(b, inner)
    sums = _mix(a, rest), _mix(slope_a, rest), _mix(a, _mix(slope_b, inner)), _mix(a, _mix(b, _mix(slope_c, table)))
    both = loadings @ jnp.stack(sums, axis=1)
    return both[:, 0], both[:, 1:] @ tangents[0]


def _mix(weights: Float[Array, " rank"], parts: Float[Array, "rank *rest"]) -> Float[Array, "*rest"]:
    """A weighted sum, written out: for a single point, small products and reductions take several times as long."""
    return sum((weights[k] * parts[k] for k in range(1, len(parts))), weights[0] * parts[0])


def _basis(place: Float[Array, " slot"], polynomials: Array) -> Float[Array, "slot rank 2"]:
    """Values and slopes of the polynomials by Clenshaw's recurrence, written out: no Chebyshev polynomial is stored."""
    twice = 2 * place[:, None]
    value = value_before = slope = slope_before = jnp.zeros_like(polynomials[:, 0])
    for k in range(polynomials.shape[1] - 1, 0, -1):
        slope, slope_before = twice * slope - slope_before + 2 * value, slope
        value, value_before = twice * value - value_before + polynomials[:, k], value
    return jnp.stack(
        [polynomials[:, 0] + twice / 2 * value - value_before, value + twice / 2 * slope - slope_before], axis=-1
    )


def chebyshev_points(dimension: int, extent: str) -> Float[np.ndarray, "point dimension"]:
    """All points of the tensor grid in [−1, 1]^dimension, the last coordinate fastest, for a table of this extent."""
    return np.stack(np.meshgrid(*[_nodes(dimension, extent)] * dimension, indexing="ij"), axis=-1).reshape(
        -1, dimension
    )


def _nodes(dimension: int, extent: str) -> Float[np.ndarray, " node"]:
    count = NODES[extent][dimension]
    return np.cos(np.pi * (np.arange(count) + 0.5) / count)


def importance_of_nodes(
    places: Float[np.ndarray, "draw dimension"], extent: str
) -> Float[np.ndarray, "dimension node"]:
    """How much errors matter at the nodes of a table of this extent: as often as draws come by, some of them far from the others.

    >>> int(importance_of_nodes(np.random.default_rng(0).normal(0.5, 0.2, (1000, 1)), "near").argmax())  # the node at 0.53
    9
    """
    dimension = places.shape[1]
    nodes, middle, width = _nodes(dimension, extent), places.mean(axis=0), WIDER * places.std(axis=0) + LEAST_WIDTH
    density = np.exp(-0.5 * ((nodes - middle[:, None]) / width[:, None]) ** 2) + LEAST_DENSITY
    density *= np.sqrt(1 - nodes**2)  # by the distance of the nodes
    return density / density.sum(axis=1, keepdims=True)


def tabulate(
    rates: Float[np.ndarray, "point condition"],
    center: Float[np.ndarray, " parameter"],
    half_width: Float[np.ndarray, " parameter"],
    names: tuple[str, ...],
    positive: tuple[bool, ...],
    extent: str,
    importance: Float[np.ndarray, "parameter node"] | None = None,
) -> Surrogate:
    """The polynomials through log rates at ``center + half_width · chebyshev_points``.

    Where there are more than the table holds, those are kept with which the squared errors at the nodes, times their ``importance``, are
    least (nearly: a higher-order singular value decomposition).

    >>> points = chebyshev_points(1, "near")
    >>> table = tabulate(2 * points**2 - 1, np.zeros(1), np.ones(1), ("a",), (False,), "near")
    >>> table({"a": jnp.array(0.5)}).round(5).tolist()  # T₂(½) = 2/4 − 1
    [-0.5]
    """
    dimension = len(center)
    count, ranks, most = NODES[extent][dimension], RANKS[extent][dimension], LOADINGS[extent]
    angle = np.pi * (np.arange(count) + 0.5) / count
    transform = 2.0 / count * np.cos(np.arange(count)[:, None] * angle)
    transform[0] /= 2
    stretch = np.sqrt(np.ones((dimension, count)) if importance is None else importance)
    core = rates.T.reshape(-1, *[count] * dimension)
    for axis, own in enumerate(stretch):
        core = np.moveaxis(np.moveaxis(core, axis + 1, -1) * own, -1, axis + 1)
    polynomials = np.zeros((SLOTS, DEGREES[extent], max(ranks)))
    polynomials[:, 0, 0] = 1.0
    for axis, (rank, own) in enumerate(zip(ranks, stretch, strict=False)):
        basis, core = _leading(core, axis + 1, rank)
        polynomials[axis, :count, : basis.shape[1]] = transform @ (basis / own[:, None])
    loadings, core = _leading(core, 0, most)
    idle = SLOTS - dimension
    core = core[(..., *[None] * idle)]
    room = [(0, full - size) for full, size in zip((most, *ranks), core.shape, strict=True)]
    return Surrogate(
        center=np.pad(center, (0, idle)),
        half_width=np.pad(half_width, (0, idle), constant_values=1.0),
        polynomials=polynomials,
        core=np.pad(core, room),
        loadings=np.pad(loadings, [(0, 0), (0, most - loadings.shape[1])]),
        names=names,
        positive=positive,
    )


def _leading(tensor: np.ndarray, axis: int, rank: int) -> tuple[Float[np.ndarray, "size rank"], np.ndarray]:
    """The leading singular vectors of one axis, and the tensor with that axis expressed in them."""
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    basis = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
    return basis, np.moveaxis(np.tensordot(basis.T, tensor, axes=(1, axis)), 0, axis)
