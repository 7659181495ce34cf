"""The likelihood of one condition's escapes, with the law's error integrated out.

From the quasi-stationary state each look at the loss finds an escape with probability ``1 − exp(−κ w)``, ``w = η m`` for a look
every m iterations. All that the runs of a condition say about κ is then the number of escapes d and the exposure e up to the
beginning of the intervals that hold them (a run that did not escape counts its whole length):

    log p = d log(1 − exp(−κ w)) − κ e.

Where the check found a delay, the waiting time is Gamma with mean 1/κ and unknown shape, and the log-likelihood as a function of
log κ arrives as a table (:mod:`escape_inference.waiting`).

No law is exact. The log rate of a condition is the law's plus δ ~ Normal(0, σ), and δ is integrated out by Gauss-Hermite quadrature
around its mode, which is known in closed form (Lambert's W), so that leaving a condition out is a smooth operation.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int
from numpy.polynomial import Chebyshev, Polynomial
from numpy.polynomial.chebyshev import chebinterpolate
from numpy.polynomial.polynomial import polyval
from numpyro import distributions as dist
from scipy.special import bernoulli, factorial

NODES = 13
_X, _W = np.polynomial.hermite.hermgauss(NODES)
_LOG_WEIGHT = np.log(_W) + _X**2 + 0.5 * np.log(2.0)
LARGEST_LOG_RATE = 80.0
NEWTON_STEPS = 8
LOWEST_LOG = -690.0  #: of a number that a double still holds with all its digits
FINE_HAZARD = 0.01  #: below it the logarithm of an escape's probability is a short series
SMALL_HAZARD = 0.5  #: below it, a longer one
_K = 2 * np.arange(1, 8)
_SERIES = bernoulli(14)[_K] / (_K * factorial(_K))  #: of ``log(sinh(y/2) / (y/2))`` in y²
_SHORT = chebinterpolate(lambda x: polyval(SMALL_HAZARD**2 * (x + 1) / 2, _SERIES), 3)
_SHORT = Chebyshev(_SHORT, [0.0, SMALL_HAZARD**2]).convert(kind=Polynomial).coef
"""The same for small hazards in fewer terms, to 14 digits."""
CENTRED = 1e-3  #: distance of the quadrature from the mode, in widths of the integrand, before the last Newton step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observations:
    """What was seen, one entry for each condition, and tables for the delayed ones.

    ``escapes`` d; ``looks`` the number of looks at the loss (of all runs, escapes included); ``look_width`` w in time units;
    ``weight`` 1, or 0 to leave the condition out.
    ``delayed`` holds the positions of the conditions with a Gamma waiting time; ``table_*`` their log-likelihood on uniform grids
    of log κ, ``table_escapes`` and ``table_exposure`` the exponential likelihood with the same maximum and curvature.
    """

    escapes: Float[Any, " condition"]
    looks: Float[Any, " condition"]
    look_width: Float[Any, " condition"]
    weight: Float[Any, " condition"]
    delayed: Int[Any, " delayed"]
    table_start: Float[Any, " delayed"]
    table_step: Float[Any, " delayed"]
    table_values: Float[Any, "delayed grid"]
    table_escapes: Float[Any, " delayed"]
    table_exposure: Float[Any, " delayed"]

    @property
    def exposure_before(self) -> Float[Array, " condition"]:
        """e: the exposure up to the beginning of the intervals that hold the escapes, in time units."""
        return (self.looks - self.escapes) * self.look_width


def log_escape_probability(log_hazard: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log(1 − exp(−y))`` from ``log y``, exact and with exact gradients from y = 0 to y = ∞.

    >>> float(log_escape_probability(-5000.0)), round(float(log_escape_probability(1.0)), 6)
    (-5000.0, -0.068266)
    """
    bounded = jnp.clip(log_hazard, -LARGEST_LOG_RATE, LARGEST_LOG_RATE)
    return jnp.log(-jnp.expm1(-jnp.exp(bounded))) + jnp.minimum(log_hazard + LARGEST_LOG_RATE, 0.0)


def log_likelihood_given_rate(
    log_rate: Float[Array, "..."],
    escapes: Float[Array, "..."],
    exposure_before: Float[Array, "..."],
    look_width: Float[Array, "..."],
) -> Float[Array, "..."]:
    """``d log(1 − exp(−κ w)) − κ e`` for a given log κ, elementwise.

    >>> round(float(log_likelihood_given_rate(0.0, 1.0, 2.0, 1.0)), 4)
    -2.4587
    """
    rate = jnp.exp(jnp.minimum(log_rate, LARGEST_LOG_RATE))
    seen = jnp.where(escapes > 0, escapes * log_escape_probability(log_rate + jnp.log(look_width)), 0.0)
    return seen - rate * exposure_before


def marginal_log_likelihood(
    log_rate: Float[Array, " condition"], discrepancy: Float[Array, ""], observed: Observations
) -> Float[Array, " condition"]:
    """Log-likelihood of each condition with δ ~ Normal(0, ``discrepancy``) on the log rate integrated out.

    Differentiable in ``log_rate`` and ``discrepancy``: with E the mean over the integrand, the derivatives are ``E[δ]/σ²`` and
    ``E[δ²]/σ³ − 1/σ`` (integration by parts), so they cost nothing beyond the value.

    Args:
        log_rate: the law's natural log rates, per unit time.
        discrepancy: σ > 0.
        observed: what was seen.

    Returns:
        One value for each condition (weights are not applied).
    """
    return _marginal(log_rate, jnp.broadcast_to(discrepancy, jnp.shape(log_rate)), observed)


@jax.custom_jvp
def _marginal(log_rate: Array, discrepancy: Array, observed: Observations) -> Array:
    return _marginal_and_moments(log_rate, discrepancy, observed)[0]


@_marginal.defjvp
def _marginal_jvp(
    primals: tuple[Array, Array, Observations], tangents: tuple[Array, Array, Any]
) -> tuple[Array, Array]:
    log_rate, discrepancy, observed = primals
    value, first, second = _marginal_and_moments(log_rate, discrepancy, observed)
    slope = first / discrepancy**2
    spread = second / discrepancy**3 - 1 / discrepancy
    return value, slope * tangents[0] + spread * tangents[1]


Moments = tuple[Array, Array, Array]


@custom_vmap
def _marginal_and_moments(log_rate: Array, discrepancy: Array, observed: Observations) -> Moments:
    """The logarithm of the integral over δ, and the mean of δ and of δ² over the integrand, for each condition."""
    return jax.tree.map(lambda x: x[0], _of_points(log_rate[None], discrepancy[None], observed))


@_marginal_and_moments.def_vmap
def _of_batch(
    count: int, batched: Any, log_rate: Array, discrepancy: Array, observed: Observations
) -> tuple[Moments, tuple[bool, bool, bool]]:
    if any(jax.tree.leaves(batched[2])):
        axes = jax.tree.map(lambda each: 0 if each else None, tuple(batched))
        found = jax.vmap(_marginal_and_moments.fun, axes)(log_rate, discrepancy, observed)
    else:
        log_rate, discrepancy = (jnp.broadcast_to(x, (count, *x.shape[-1:])) for x in (log_rate, discrepancy))
        found = _of_points(log_rate, discrepancy, observed)
    return found, (True, True, True)


def _of_points(
    log_rate: Float[Array, "point condition"], discrepancy: Float[Array, "point condition"], observed: Observations
) -> Moments:
    """All points by one quadrature: if each had its own, all would wait for both."""
    escapes, exposure = _exponential_twin(observed)
    mode, scale = jax.vmap(_mode_and_scale, (0, 0, None, None, None))(
        log_rate, discrepancy, escapes, exposure, observed
    )
    each = 0, 0, 0, 0, None
    by_nodes = lambda: jax.vmap(_over_nodes, each)(log_rate, discrepancy, mode, scale, observed)
    most = jnp.zeros(())  # the logarithm of a probability; beyond all reason rounding may say anything else
    if observed.delayed.size:
        found = by_nodes()
        most = jnp.zeros(log_rate.shape[1:]).at[observed.delayed].set(observed.table_values.max(axis=1) + 1.0)
    else:
        log_hazard = log_rate + mode + jnp.log(observed.look_width)
        small = lambda: jax.vmap(_over_small_hazards, each)(log_hazard, discrepancy, mode, scale, observed)
        largest = jnp.max(log_hazard + np.sqrt(2.0) * _X[-1] * scale)
        found = jax.lax.cond(largest > np.log(SMALL_HAZARD), by_nodes, small)
    return jnp.minimum(found[0], most), *found[1:]


def _over_nodes(log_rate: Array, discrepancy: Array, mode: Array, scale: Array, observed: Observations) -> Moments:
    """The quadrature for any likelihood."""
    delta = mode + jnp.sqrt(2.0) * scale * _X[:, None]
    exponent = _LOG_WEIGHT[:, None] + _log_likelihood(log_rate + delta, observed) - 0.5 * (delta / discrepancy) ** 2
    top = jnp.max(exponent, axis=0)
    weight = jnp.exp(exponent - top)
    total = weight.sum(axis=0)
    value = top + jnp.log(total * scale / discrepancy) - 0.5 * jnp.log(2 * jnp.pi)
    return value, (weight * delta).sum(axis=0) / total, (weight * delta**2).sum(axis=0) / total


def _over_small_hazards(
    log_hazard: Array, discrepancy: Array, mode: Array, scale: Array, observed: Observations
) -> Moments:
    """The same where no look finds an escape with a large probability: everything relative to the mode, nodes in pairs ``mode ± u``.

    ``log_hazard`` is that of a look at the mode. Written out, since an array over nodes would be gone through once for each sum.
    """
    escapes, precision, width = observed.escapes, 1 / discrepancy**2, np.sqrt(2.0) * scale
    hazard, looks, slope = jnp.exp(log_hazard), observed.looks - escapes / 2, escapes - mode * precision

    def excess(hazard: Array) -> Array:
        """``d log((1 − exp(−y)) / y) − y (looks − d)``."""
        square, series = jnp.minimum(hazard, SMALL_HAZARD) ** 2, 0.0  # never larger, but faster so
        for coefficient in _SHORT[::-1]:
            series = (series + coefficient) * square
        return escapes * series - hazard * looks

    at_mode = excess(hazard)
    total, first, second = jnp.exp(_LOG_WEIGHT[NODES // 2]), jnp.zeros(()), jnp.zeros(())
    for x, log_weight in zip(_X[NODES // 2 + 1 :], _LOG_WEIGHT[NODES // 2 + 1 :], strict=True):
        u = x * width
        factor, even = jnp.exp(u), log_weight - 0.5 * precision * u**2 - at_mode
        above = jnp.exp(even + slope * u + excess(hazard * factor))
        below = jnp.exp(even - slope * u + excess(hazard / factor))
        total += above + below
        first += (above - below) * u
        second += (above + below) * u**2
    seen = jnp.where(escapes > 0, escapes * log_hazard, 0.0) + at_mode
    value = seen - 0.5 * precision * mode**2 + _log(total * scale / discrepancy)
    first, second = first / total, second / total
    return value - 0.5 * np.log(2 * np.pi), mode + first, mode**2 + 2 * mode * first + second


def conditional_discrepancy(
    share: Float[Array, " condition"],
    log_rate: Float[Array, " condition"],
    discrepancy: Float[Array, ""],
    observed: Observations,
) -> Float[Array, " condition"]:
    """The value of every condition's δ below which this share of its posterior lies, given the law's rates and σ, from a grid.

    With shares from a uniform distribution they are draws.
    """
    escapes, exposure = _exponential_twin(observed)
    mode, scale = _mode_and_scale(log_rate, discrepancy, escapes, exposure, observed)
    middle, width = jnp.linspace(-6.0, 6.0, 61)[:, None], 0.2
    delta = mode + scale * middle
    log_density = _log_likelihood(log_rate + delta, observed) - 0.5 * (delta / discrepancy) ** 2
    density = jnp.exp(log_density - jnp.max(log_density, axis=0))
    below = jnp.cumsum(density, axis=0)
    wanted = share * below[-1]
    choice = jnp.minimum(jnp.sum(below < wanted, axis=0), len(middle) - 1)
    chosen, up_to = (jnp.take_along_axis(x, choice[None], axis=0)[0] for x in (density, below))
    return mode + scale * (middle[choice, 0] + width * (0.5 - (up_to - wanted) / chosen))


def replicate_escapes(
    rng: np.random.Generator,
    log_rate: Float[np.ndarray, "draw condition"],
    discrepancy: Float[np.ndarray, "draw 1"],
    observed: Observations,
) -> Float[np.ndarray, "draw condition"]:
    """Escapes of every condition in as many looks as were made, at a fresh discrepancy (predictive draws).

    Memoryless conditions: one trial a look. Delayed ones: counts of a renewal process with the Gamma shape of the data.
    """
    rate = np.exp(
        np.clip(log_rate + discrepancy * rng.normal(size=log_rate.shape), -LARGEST_LOG_RATE, LARGEST_LOG_RATE)
    )
    looks, width = np.round(np.asarray(observed.looks)).astype(np.int64), np.asarray(observed.look_width)
    count = rng.binomial(looks, -np.expm1(-rate * width)).astype(float)
    index = np.asarray(observed.delayed)
    if index.size:
        sharpness = np.asarray(observed.table_escapes) / np.maximum(np.asarray(observed.escapes)[index], 1.0)
        mean = np.minimum(rate[:, index] * np.asarray(observed.table_exposure), 1e9)
        count[:, index] = np.minimum(np.floor(rng.poisson(mean) / sharpness), looks[index])
    return count


def _exponential_twin(observed: Observations) -> tuple[Array, Array]:
    """Escapes and exposure of the exponential likelihood that is closest to each condition's own."""
    escapes, exposure = (
        jnp.asarray(observed.escapes),
        observed.exposure_before + 0.5 * observed.escapes * observed.look_width,
    )
    if observed.delayed.size:
        escapes = escapes.at[observed.delayed].set(observed.table_escapes)
        exposure = exposure.at[observed.delayed].set(observed.table_exposure)
    return escapes, exposure


def _log_likelihood(log_rate: Array, observed: Observations) -> Array:
    """Log-likelihood ``[node, condition]`` for given log rates, from the counts or from the table.

    The counts as in :func:`log_likelihood_given_rate` but in fewer operations, to 14 digits.
    """
    log_hazard = log_rate + jnp.log(observed.look_width)
    hazard = jnp.exp(jnp.minimum(log_hazard, LARGEST_LOG_RATE))
    seen = jnp.where(
        hazard < FINE_HAZARD,
        log_hazard - hazard * (0.5 - hazard * (1 / 24 - hazard**2 / 2880)),
        _log(1 - jnp.exp(-jnp.maximum(hazard, FINE_HAZARD))),
    )
    value = jnp.where(observed.escapes > 0, observed.escapes * seen, 0.0)
    value = value - hazard * (observed.looks - observed.escapes)
    if observed.delayed.size:
        value = value.at[:, observed.delayed].set(_from_table(log_rate[:, observed.delayed], observed))
    return value


def _log(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm of positive normal numbers, in double precision several times faster than the library's, which is not vectorised."""
    if x.dtype != jnp.float64:
        return jnp.log(x)
    bits = jax.lax.bitcast_convert_type(x, jnp.int64)
    mantissa = jax.lax.bitcast_convert_type((bits & ((1 << 52) - 1)) | (1023 << 52), jnp.float64)
    high = mantissa > np.sqrt(2.0)
    ratio = jnp.where(high, mantissa / 2, mantissa)
    ratio = (ratio - 1) / (ratio + 1)
    series = jnp.full_like(ratio, 1 / 21)
    for k in range(19, 0, -2):
        series = series * ratio**2 + 1 / k
    return ((bits >> 52) - 1023 + high) * np.log(2.0) + 2 * ratio * series


def _mode_and_scale(
    log_rate: Array, discrepancy: Array, escapes: Array, exposure: Array, observed: Observations
) -> tuple[Array, Array]:
    """Mode of the integrand in δ and its Gaussian width, from ``δ = dσ² − W(σ² E κ exp(dσ²))`` and Newton steps."""
    variance = discrepancy**2
    w = _lambert_w_of_exp(_log(variance) + jnp.log(exposure) + log_rate + escapes * variance)
    mode = escapes * variance - w
    curvature = (1 + w) / variance
    coarse = jnp.asarray(observed.look_width) > 0
    if observed.delayed.size:
        coarse = coarse.at[observed.delayed].set(False)

    def newton(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        mode, curvature, _, count = state
        rate = jnp.exp(jnp.minimum(log_rate + mode, LARGEST_LOG_RATE))
        y, e = rate * observed.look_width, rate * observed.exposure_before
        r = jnp.where(y < 1e-8, 1 - y / 2, y / jnp.expm1(jnp.clip(y, 1e-8, 600.0)))
        slope = observed.escapes * r - e - mode / variance
        bend = observed.escapes * r * (y + r - 1) + e + 1 / variance
        off = jnp.max(jnp.where(coarse, slope**2 / bend, 0.0))  # in widths of the integrand, squared
        return jnp.where(coarse, mode + slope / bend, mode), jnp.where(coarse, bend, curvature), off, count + 1

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        return (state[2] > CENTRED**2) & (state[3] < NEWTON_STEPS)

    start = mode, curvature, jnp.asarray(jnp.inf, mode.dtype), jnp.asarray(0)
    mode, curvature, *_ = jax.lax.while_loop(unfinished, newton, start)
    return mode, 1 / jnp.sqrt(curvature)


def _lambert_w_of_exp(a: Array) -> Array:
    """Solve ``w + log w = a`` (Lambert's W of exp(a)), for any real a, by two steps of fourth order.

    Fritsch, Shafer and Crowley, Commun. ACM 16, 123 (1973).
    """
    exp_a = jnp.exp(jnp.clip(a, LOWEST_LOG, 1.0))
    w = jnp.where(a > 1.0, a - _log(jnp.maximum(a, 1.0)), exp_a / (1 + exp_a))
    for _ in range(2):
        rest = a - w - _log(w)
        twice = 2 * (1 + w) * (1 + w + 2 / 3 * rest)
        w = w * (1 + rest / (1 + w) * (twice - rest) / (twice - 2 * rest))
    return jnp.where(a > LOWEST_LOG, w, 0.0)


def _from_table(log_rate: Array, observed: Observations) -> Array:
    """Cubic interpolation of the tabulated log-likelihood minus its exponential twin; constant difference outside the grid."""
    points = observed.table_values.shape[1]
    grid = observed.table_start[:, None] + observed.table_step[:, None] * jnp.arange(points)
    twin = observed.table_escapes * log_rate - observed.table_exposure * jnp.exp(
        jnp.minimum(log_rate, LARGEST_LOG_RATE)
    )
    residual = observed.table_values - (
        observed.table_escapes[:, None] * grid - observed.table_exposure[:, None] * jnp.exp(grid)
    )
    position = jnp.clip((log_rate - observed.table_start) / observed.table_step, 1.0, points - 2.0)
    left = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)), 1, points - 3)
    t = position - left
    rows = jnp.arange(observed.delayed.size)
    p0, p1, p2, p3 = (residual[rows, (left + k).astype(int)] for k in (-1, 0, 1, 2))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return twin + curve


class EscapeCounts(dist.Distribution):
    """Escapes of every condition for its exposure, the law's discrepancy integrated out.

    Each look is one trial; ``sample`` draws a discrepancy and then the number of escapes among the looks of the condition,
    the record that ``log_prob`` scores (the order of the escapes is known, so there is no binomial coefficient). The waiting
    times of delayed conditions are scored by their tables; :func:`replicate_escapes` draws counts for them.

    NumPyro's censored distributions are no substitute: their log survival saturates and loses its gradient in the tail.
    """

    arg_constraints: dict[str, Any] = {"log_rate": dist.constraints.real, "discrepancy": dist.constraints.positive}  # noqa: RUF012
    support = dist.constraints.nonnegative_integer

    def __init__(self, log_rate: Array, discrepancy: Array, observed: Observations) -> None:
        self.log_rate, self.discrepancy, self.observed = log_rate, discrepancy, observed
        super().__init__(batch_shape=jnp.shape(log_rate), validate_args=False)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Escapes ``[*sample_shape, condition]`` for the looks at each condition, at a fresh discrepancy."""
        assert key is not None
        delta_key, count_key = jax.random.split(key)
        seen, shape = self.observed, (*sample_shape, *self.batch_shape)
        rate = jnp.exp(self.log_rate + self.discrepancy * jax.random.normal(delta_key, shape))
        return jax.random.binomial(count_key, jnp.round(seen.looks), -jnp.expm1(-rate * seen.look_width), shape)

    def log_prob(self, value: Array) -> Float[Array, " condition"]:
        """Log-likelihood of each condition for the escapes ``value`` in the observed exposure."""
        observed = Observations(**{**self.observed.__dict__, "escapes": jnp.asarray(value, self.log_rate.dtype)})
        return marginal_log_likelihood(self.log_rate, self.discrepancy, observed)
