"""Worlds in which escape can be simulated, and designs: which conditions are to be measured in them.

A world says how the noise depends on the loss and what the barrier is, so that the law which is true in it is known.
A design is a plain table with one row for each condition; :func:`make_design` chooses learning rates for which escapes
are frequent enough to be seen and rare enough to be escapes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import gammaln

from escape_inference.errors import InputError

COMMITTED = 1.5  # a run over a saddle has escaped at 1.5 times the distance of the saddle
NOISES = ("loss", "uniform")
BARRIERS = ("saddle", "threshold")
RATES = {
    "saddle": (0.0007, 0.03),
    "threshold": (0.003, 0.15),
}  # over h*: seldom enough to be escape, often enough to be seen
RATIOS = {"saddle": (np.exp(0.2), np.exp(1.5)), "threshold": (1.2, 2.5)}  # L^s / L*


@dataclass(frozen=True)
class World:
    """A landscape and its noise.

    Attributes:
        noise: ``"loss"``, the noise of SGD, covariance per unit time 2 (eta / B) h* L* (L / L*)**q in each of the
            directions; or ``"uniform"``, 2 (eta / B) D, with one D for all conditions.
        noise_exponent: q of the loss noise: 1 is proportional to the loss, where the power law holds; 0 is frozen at
            its value at the minimum. Uniform noise has 0.
        noise_strength: D of the uniform noise, loss. Not used by loss noise.
        dimension: number n of directions, all with curvature h* at the minimum.
        barrier: ``"threshold"``: isotropic quadratic well, L = L* + h* |theta|**2 / 2, a run has escaped when its loss
            exceeds ``loss_barrier``. ``"saddle"``: along the first direction a well and a saddle, exactly with the L*,
            h*, L^s and h^s of the design, and a mirror image of the well beyond; the other directions are quadratic.
            Between minimum (u = 0) and saddle (u = 1, at distance a) dL/dx = h* x (1 - u)(1 + (h^s/h* - 1) u), x = a u,
            which makes a**2 = 12 (L^s - L*) / (h* + h^s); for u < 0 the well is quadratic. A run has escaped when u
            exceeds 1.5.
        time_step: longest step of the integration, in units of 1 / h* (up to 0.05 the rates are good to 1 %);
            ``None`` takes one step for each iteration, as SGD does.

    >>> World(noise="uniform", noise_strength=0.02).noise_exponent
    0.0
    """

    noise: str = "loss"
    noise_exponent: float = 1.0
    noise_strength: float | None = None
    dimension: int = 2
    barrier: str = "saddle"
    time_step: float | None = 0.04

    def __post_init__(self) -> None:
        if self.noise not in NOISES or self.barrier not in BARRIERS:
            raise InputError(f"noise is one of {NOISES}, barrier one of {BARRIERS}; not {self.noise}, {self.barrier}")
        if self.noise == "uniform":
            if self.noise_strength is None or not 0 < self.noise_strength < np.inf:
                raise InputError("a world with uniform noise needs a noise_strength D > 0")
            object.__setattr__(self, "noise_exponent", 0.0)
        if not np.isfinite(self.noise_exponent):
            raise InputError(f"noise_exponent must be a finite number, not {self.noise_exponent}")
        if self.dimension < 1:
            raise InputError(f"a world has a dimension of at least 1, not {self.dimension}")
        if self.time_step is not None and not self.time_step > 0:
            raise InputError(f"time_step must be positive or None, not {self.time_step}")


def temperature(world: World, design: pd.DataFrame) -> np.ndarray:
    """Dimensionless temperature of each condition: eta h* / B, or eta D / (B L*) for uniform noise.

    >>> design = pd.DataFrame(
    ...     {"learning_rate": [0.1], "batch_size": [4], "hessian_minimum": [2.0], "loss_minimum": [0.5]})
    >>> temperature(World(), design).round(3).tolist()
    [0.05]
    >>> temperature(World(noise="uniform", noise_strength=0.4), design).round(3).tolist()
    [0.02]
    """
    rate_per_sample = (design["learning_rate"] / design["batch_size"]).to_numpy()
    if world.noise == "uniform":
        return rate_per_sample * world.noise_strength / design["loss_minimum"].to_numpy()
    return rate_per_sample * design["hessian_minimum"].to_numpy()


def high_barrier_rate(
    world: World, temperature: np.ndarray, barrier_ratio: np.ndarray, hessian_ratio: np.ndarray | float = 1.0
) -> np.ndarray:
    """Escape rate over h* for a high barrier, good to a factor of about two: enough to choose conditions with.

    Over a saddle with c = L^s / L* and h^s / h* = ``hessian_ratio`` Kramers' formula for a noise proportional to L**q,
    sqrt(h^s / h*) / (2 pi) c**(-q (1 - n / 2)) exp(-dU_q / T), with dU_q = (c**(1 - q) - 1) / (1 - q); for a threshold
    the small-temperature limit of the mean passage time, 2 / Gamma(n / 2) ((c - 1) / T)**(n / 2) c**-q exp(-dU_q / T).

    >>> round(float(high_barrier_rate(World(dimension=2), np.array(0.1), np.array(1.5))), 5)  # 1.5**-10 / (2 pi)
    0.00276
    >>> round(float(high_barrier_rate(World(barrier="threshold", dimension=1), np.array(0.1), np.array(1.7))), 5)
    0.00871
    """
    q, n = world.noise_exponent, world.dimension
    log_c = np.log(barrier_ratio)
    potential = log_c if q == 1 else np.expm1((1 - q) * log_c) / (1 - q)
    if world.barrier == "saddle":
        return np.sqrt(hessian_ratio) / (2 * np.pi) * np.exp(-q * (1 - n / 2) * log_c - potential / temperature)
    prefactor = 2 * np.exp(-gammaln(n / 2) - q * log_c) * ((barrier_ratio - 1) / temperature) ** (n / 2)
    return prefactor * np.exp(-potential / temperature)


def spread_minima(
    rng: np.random.Generator, barrier: str, minima: int, ratios: tuple[float, float] | None = None
) -> pd.DataFrame:
    """Minima that differ in everything: one row each, with the settings of a minimum and its barrier.

    h* spreads over a factor of 10, L* over a factor of 100, independently, h^s / h* from 0.5 to 2, and L^s / L* within ``ratios``: evenly
    in its logarithm for a saddle, evenly in L^s / L* - 1 for a threshold. A single minimum is in the middle of all.

    >>> spread_minima(np.random.default_rng(0), "threshold", 1).round(4)["loss_barrier"].tolist()
    [0.031]
    """

    def spread(lowest: float, highest: float) -> np.ndarray:
        return rng.permutation(np.geomspace(lowest, highest, minima) if minima > 1 else [np.sqrt(lowest * highest)])

    saddle = barrier == "saddle"
    hessian, loss = spread(0.5, 5.0), spread(0.002, 0.2)
    low, high = ratios or RATIOS[barrier]
    ratio = np.exp(spread(np.log(low), np.log(high))) if saddle else 1 + spread(low - 1, high - 1)
    rows = pd.DataFrame(
        {
            "minimum": [f"m{i + 1}" for i in range(minima)],
            "loss_minimum": loss,
            "loss_barrier": ratio * loss,
            "hessian_minimum": hessian,
        }
    )
    return rows.assign(hessian_saddle=spread(0.5, 2.0) * hessian) if saddle else rows


def rate_targets(
    rng: np.random.Generator, barrier: str, minima: int, learning_rates: int, rates: tuple[float, float] | None = None
) -> np.ndarray:
    """Rates over h* to aim at, ``[minimum, learning rate]``: one at random in each equal part of a range in logarithm."""
    low, high = rates or RATES[barrier]
    place = (np.arange(learning_rates) + rng.random((minima, learning_rates))) / learning_rates
    return low * (high / low) ** place


def make_design(
    world: World,
    *,
    minima: int = 12,
    learning_rates: int = 3,
    runs: int = 40,
    start: str = "minimum",
    check_interval: int = 1,
    rates: tuple[float, float] | None = None,
    ratios: tuple[float, float] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Conditions under which escapes are frequent enough to be seen: one row for each minimum and learning rate.

    The minima are those of :func:`spread_minima`, so that a law with the wrong scale of noise cannot fit. The learning rates of a minimum are those at which :func:`high_barrier_rate` takes values within
    ``rates``, one at random in each equal part of that range in logarithm; its batch size keeps eta h* near 0.1 where
    that is possible.
    ``minima=1`` is one minimum at several learning rates, which cannot tell one law from another.

    Args:
        world: the world to be measured in.
        minima: number of minima.
        learning_rates: number of learning rates for each.
        runs: runs of each condition, or replica slots.
        start: ``"minimum"``: 5 % of the runs are expected to be censored; ``"quasi_stationary"``: about as many
            escapes as slots are expected.
        check_interval: iterations between two looks.
        rates: lowest and highest escape rate over h*; by default 0.0007 to 0.03 over a saddle, 0.003 to 0.15 for a
            threshold (looks at every iteration only make the measured one about half of that).
        ratios: lowest and highest L^s / L*; by default 1.22 to 4.48 over a saddle, 1.2 to 2.5 for a threshold.
        seed: of the spread.

    Returns:
        A design, see :mod:`escape_inference.design`.

    >>> design = make_design(World(), seed=1)
    >>> len(design), design.minimum.nunique(), bool((design.loss_minimum.max() / design.loss_minimum.min()) > 99)
    (36, 12, True)
    """
    rng = np.random.default_rng(seed)
    saddle = world.barrier == "saddle"
    rows = spread_minima(rng, world.barrier, minima, ratios)
    hessian, loss = rows["hessian_minimum"].to_numpy(), rows["loss_minimum"].to_numpy()
    ratio = (rows["loss_barrier"] / rows["loss_minimum"]).to_numpy()
    hessian_ratio = (rows["hessian_saddle"] / hessian).to_numpy() if saddle else np.ones(minima)
    targets = rate_targets(rng, world.barrier, minima, learning_rates, rates)
    cold = np.full(targets.shape, 1e-3)
    hot = np.broadcast_to(2 * np.log(ratio)[:, None] / max(world.dimension, 2), targets.shape).copy()
    for _ in range(60):
        middle = np.sqrt(cold * hot)
        slow = high_barrier_rate(world, middle, ratio[:, None], hessian_ratio[:, None]) < targets
        cold, hot = np.where(slow, middle, cold), np.where(slow, hot, middle)
    relaxation = cold * (loss * hessian / world.noise_strength if world.noise_strength else np.ones(minima))[:, None]
    batch = np.maximum(1, np.rint(0.1 / np.median(relaxation, axis=1))).astype(int)
    rate = relaxation * batch[:, None] / hessian[:, None]
    seen = ratio[:, None]
    if not saddle:  # a threshold that is looked at once in a while acts as if it were farther off
        look = check_interval * rate * hessian[:, None]
        seen = 1 + (np.sqrt(seen - 1) + 0.5826 * np.sqrt(look * cold * seen**world.noise_exponent)) ** 2
    kappa = hessian[:, None] * high_barrier_rate(world, cold, seen, hessian_ratio[:, None])
    time = (3.0 if start == "minimum" else 1.0) / kappa
    every = rows.loc[np.repeat(np.arange(minima), learning_rates)].reset_index(drop=True)
    return every.assign(
        learning_rate=rate.ravel(),
        batch_size=np.repeat(batch, learning_rates),
        runs=runs,
        max_steps=np.maximum(np.ceil(time / rate).astype(int).ravel(), check_interval),
        start=start,
        check_interval=check_interval,
    )
