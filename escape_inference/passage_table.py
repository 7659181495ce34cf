"""The threshold laws as splines.

Both laws are one smooth function of (T, c, n, q): once the leading ``−ΔU_q(c)/T`` is taken away, a cubic B-spline in
``(log T, log (c − 1), log n)`` reproduces it, with continuous second derivatives, a hundred times faster than the integrals of
:mod:`escape_inference.passage`; at q = 0 it depends on T and c through (c − 1)/T alone. For q = 0, for q = 1 and, on a coarser grid, for
any q the values at the nodes ship with the package (``passage_*.npz``, made by ``scripts/make_passage_tables.py``); for other fixed q
and for higher thresholds the integrals are tabulated for the measurements at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.ndimage import spline_filter

from escape_inference.passage import LOOK_SHIFT, log_leading_rate, log_mean_passage_rate, log_potential

if TYPE_CHECKING:
    from escape_inference.law import Law, Setting

STEPS = (0.2, 0.2, 0.2)  #: grid steps in log T, log (c − 1), log n
STEPS_FROZEN = (0.07, 0.07)  #: in log ((c − 1)/T), log n, at q = 0
STEPS_WITH_EXPONENT = (0.3, 0.3, 0.35, 0.4)  #: in log T, log (c − 1), log n and q, where q varies
LOG_TEMPERATURES = (-6.0, 4.0)
LOG_EXCESSES = (-4.6, 5.8)  #: log (c − 1) in the tables that ship
LOG_EXCESSES_WITH_EXPONENT = (-4.6, 3.8)  #: the same in those where q varies
LOG_SCALED = (-10.0, 8.0)  #: log ((c − 1)/T) at q = 0
LOG_DIMENSIONS = (float(np.log(0.01)), float(np.log(150.0)))
RANGES_WITH_EXPONENT = ((-6.0, 2.5), (-3.0, float(np.log(150.0))), (-1.5, 2.7))  #: of log T, log n and q there
SHIPPED_EXPONENTS = (0.0, 1.0, None)  #: None where q varies
MARGIN = 6  #: grid points beyond the range on every side of a table that ships
MARGIN_MADE = 2  #: the same of a table that is made for some measurements
PAD = 8  #: points beyond those, by odd reflection, so that the spline leaves the grid straight
RICHARDSON = (4.0, 16.0)  #: by which the error falls when the steps are halved, at least and where they are small
STARTS = {"minimum": log_mean_passage_rate, "quasi_stationary": log_leading_rate}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PassageTable:
    """Spline coefficients of ``log(κ/h*) + ΔU_q(c)/T`` on a uniform grid.

    Attributes:
        low, step: first node and spacing of every axis.
        coefficients: of the B-splines, one axis for each of log T, log (c − 1), log n and, if q varies, q; or for log ((c − 1)/T)
            and log n at q = 0.
        beyond: 1 if the spline goes on linearly beyond the grid, 0 if it stays as it is at the edge.
    """

    low: Float[Array, " axis"]
    step: Float[Array, " axis"]
    coefficients: Float[Array, "..."]
    beyond: Float[Array, ""]

    def __call__(
        self,
        temperature: Float[Array, " condition"],
        barrier_ratio: Float[Array, " condition"],
        dimension: Float[Array, " condition"],
        noise_exponent: Float[Array, " condition"] | float,
    ) -> Float[Array, " condition"]:
        """``log(κ/h*)``."""
        T, ratio, n, q = jnp.broadcast_arrays(temperature, barrier_ratio, dimension, noise_exponent)
        if self.coefficients.ndim == 2:
            places = [jnp.log((ratio - 1) / T), jnp.log(n)]
        else:
            places = [jnp.log(T), jnp.log(ratio - 1), jnp.log(n), q][: self.coefficients.ndim]
        return self._spline(places) - log_potential(ratio, noise_exponent) / T

    def _spline(self, places: list[Array]) -> Array:
        letters = "ijkl"[: len(places)]
        weights, index = [], []
        for axis, place in enumerate(places):
            size = self.coefficients.shape[axis]
            t = (place - self.low[axis]) / self.step[axis]
            inside = jnp.clip(t, PAD, size - 1.0 - PAD)
            left = jnp.floor(jax.lax.stop_gradient(inside))
            u, beyond = inside - left, self.beyond * (t - inside)
            cubic = (1 - u) ** 3 / 6, (3 * u**3 - 6 * u**2 + 4) / 6, (1 + 3 * u * (1 + u * (1 - u))) / 6, u**3 / 6
            slope = -((1 - u) ** 2) / 2, u * (1.5 * u - 2), 0.5 + u * (1 - 1.5 * u), u**2 / 2
            weights.append(jnp.stack(cubic, axis=-1) + beyond[..., None] * jnp.stack(slope, axis=-1))
            taps = left.astype(int)[..., None] - 1 + jnp.arange(4)
            index.append(taps.reshape(*place.shape, *(4 if k == axis else 1 for k in range(len(places)))))
        rule = f"...{letters}," + ",".join(f"...{letter}" for letter in letters) + "->..."
        return jnp.einsum(rule, self.coefficients[tuple(index)], *weights)

    @cached_property
    def coarser(self) -> "PassageTable":
        """The spline through every second node, constant beyond, written with the nodes of this one."""
        return self._through_some(1)

    @cached_property
    def coarsest(self) -> "PassageTable":
        """The same through every fourth node."""
        return self._through_some(2)

    def _through_some(self, halvings: int) -> "PassageTable":
        """Splines repeat themselves exactly when their steps are halved."""
        values, every = np.asarray(self.coefficients), 2**halvings
        for axis in range(values.ndim):
            c = np.moveaxis(values, axis, 0)
            before, at, after = (c[k : len(c) - 2 * PAD + k : every] for k in (PAD - 1, PAD, PAD + 1))
            values = np.moveaxis((before + 4 * at + after) / 6, 0, axis)
        coefficients = _coefficients(values)
        for axis, size in enumerate(self.coefficients.shape):
            c = np.moveaxis(coefficients, axis, 0)
            for count in (size // 2 + PAD, size)[-halvings:]:
                c = _halved(c, count)
            coefficients = np.moveaxis(c, 0, axis)
        with jax.enable_x64(True):
            return replace(self, **jax.device_put({"coefficients": coefficients, "beyond": np.float64(0.0)}))


def build_passage_table(
    start: str, log_excess: tuple[float, float], noise_exponent: float | None, *, shipped: bool = True
) -> PassageTable:
    """A threshold law as a spline: one that ships, if it covers the range, or a new one.

    Args:
        start: ``minimum`` (mean passage) or ``quasi_stationary`` (leading rate).
        log_excess: range of ``log (c − 1)``, overshoot included.
        noise_exponent: q, or None for a table in q as well.
        shipped: false to tabulate the integrals in any case.

    >>> from escape_inference.precision import float64
    >>> table = float64(build_passage_table)("minimum", (-1.0, 1.0), 1.0)
    >>> round(float(jnp.exp(float64(table)(0.1, 1.7, 4.0, 1.0))), 5)
    0.16356
    """
    if shipped and _ships(log_excess, noise_exponent):
        return _shipped(start, noise_exponent)
    low, step, values = passage_values(start, log_excess, noise_exponent, MARGIN_MADE)
    return _through(low, step, values)


def _ships(log_excess: tuple[float, float], noise_exponent: float | None) -> bool:
    low, high = LOG_EXCESSES_WITH_EXPONENT if noise_exponent is None else LOG_EXCESSES
    covered = low <= log_excess[0] and log_excess[1] <= high
    return noise_exponent == 0 or (covered and noise_exponent in SHIPPED_EXPONENTS)


def passage_values(
    start: str, log_excess: tuple[float, float], noise_exponent: float | None, margin: int = MARGIN
) -> tuple[Float[np.ndarray, " axis"], Float[np.ndarray, " axis"], Float[np.ndarray, "..."]]:
    """First nodes, steps and values of ``log(κ/h*) + ΔU_q(c)/T`` at the nodes, by the integrals themselves."""
    if noise_exponent == 0:
        ranges, step = [LOG_SCALED, LOG_DIMENSIONS], np.array(STEPS_FROZEN)
    elif noise_exponent is None:
        log_temperatures, *others = RANGES_WITH_EXPONENT
        ranges, step = [log_temperatures, log_excess, *others], np.array(STEPS_WITH_EXPONENT)
    else:
        ranges, step = [LOG_TEMPERATURES, log_excess, LOG_DIMENSIONS], np.array(STEPS)
    low = np.array([bounds[0] - margin * width for bounds, width in zip(ranges, step, strict=True)])
    counts = [int(np.ceil((b - a) / s)) + 1 + 2 * margin for (a, b), s in zip(ranges, step, strict=True)]
    axes = [a + s * np.arange(k) for a, s, k in zip(low, step, counts, strict=True)]
    grid = [x.ravel() for x in np.meshgrid(*axes, indexing="ij")]
    if noise_exponent == 0:
        grid = [-grid[0] / 2, grid[0] / 2, grid[1]]
    values = smooth_part(STARTS[start], grid, noise_exponent)
    if start == "quasi_stationary":  # where there is no well and n is above 100 it may not be finite
        lost = np.flatnonzero(~np.isfinite(values))
        values[lost] = smooth_part(log_mean_passage_rate, [x[lost] for x in grid], noise_exponent)
    return low, step, np.nan_to_num(values, posinf=0.0, neginf=0.0).reshape(counts)


def shipped_path(start: str, noise_exponent: float | None) -> Path:
    """The file with the nodes of one law at one q, or where q varies."""
    label = "any_q" if noise_exponent is None else f"q{noise_exponent:g}"
    return Path(__file__).with_name(f"passage_{start}_{label}.npz")


@cache
def _shipped(start: str, noise_exponent: float | None) -> PassageTable:
    with np.load(shipped_path(start, noise_exponent)) as file:
        return _through(*(file[name].astype(float) for name in ("low", "step", "values")))


def _through(low: Any, step: Any, values: np.ndarray) -> PassageTable:
    with jax.enable_x64(True):
        return PassageTable(*jax.device_put((low - PAD * step, step, _coefficients(values), np.float64(1.0))))


def _halved(coefficients: np.ndarray, count: int) -> np.ndarray:
    """So many coefficients of the same splines with half the steps along the first axis; the node at ``PAD`` stays where it is."""
    c = coefficients[PAD // 2 - 1 :][: count // 2 + 3]
    between = (c[:-1] + c[1:]) / 2
    finer = np.empty((count, *c.shape[1:]))
    finer[::2] = ((between[:-1] + between[1:] + 2 * c[1:-1]) / 4)[: -(-count // 2)]
    finer[1::2] = between[1:][: count // 2]
    return finer


def _coefficients(values: np.ndarray) -> np.ndarray:
    """Of the splines through the values, ``PAD`` more on every side."""
    padded = np.pad(values, PAD, mode="reflect", reflect_type="odd")
    return spline_filter(padded, order=3, mode="mirror")


class _Recorder:
    """Stands in for a table and notes which q a law asks for: a number, or None where it varies."""

    def __init__(self) -> None:
        self.exponents: list[float | None] = []

    def __call__(self, temperature: Array, barrier_ratio: Array, dimension: Array, noise_exponent: Any) -> Array:
        self.exponents.append(float(noise_exponent) if isinstance(noise_exponent, int | float) else None)
        return jnp.zeros_like(barrier_ratio)


def tables_for(
    law: "Law", settings: "Sequence[tuple[Setting, float]]", only_shipped: bool = False
) -> dict[str, PassageTable]:
    """The tables that a law needs for the thresholds among some settings, by kind of start.

    Args:
        law: the law.
        settings: typical settings of conditions of one kind, with the standard deviation of their latent log barrier.
        only_shipped: none at all if one that is needed does not ship.

    A law that asks for several fixed q, or for one that varies, gets a table in q as well.
    """
    tables: dict[str, PassageTable] = {}
    for setting, spread in settings:
        if setting.barrier != "threshold":
            continue
        recorder = _Recorder()
        values = {p.name: np.ones(()) for p in law.parameters}
        jax.eval_shape(partial(_ask, law, replace(setting, passage=recorder)), values)
        if not recorder.exponents:
            continue
        distinct = set(recorder.exponents)
        log_excess, q = _log_excess(setting, spread), distinct.pop() if len(distinct) == 1 else None
        if only_shipped and not _ships(log_excess, q):
            return {}
        tables[setting.start] = build_passage_table(setting.start, log_excess, q)
    return tables


def _ask(law: "Law", setting: "Setting", values: dict[str, Array]) -> Array:
    return law.log_rate(values, setting)


def _log_excess(setting: "Setting", spread: float) -> tuple[float, float]:
    """Range of ``log (c − 1)`` that the conditions can reach, overshoot at hot temperatures included."""
    log_c = np.asarray(setting.log_barrier)
    low, high = np.log(np.expm1(np.maximum(log_c.min() - 3 * spread, 0.01))), log_c.max() + 3 * spread
    walk = float(np.max(np.asarray(setting.check_interval * setting.learning_rate * setting.hessian_minimum)))
    radius = np.sqrt(np.expm1(high)) + LOOK_SHIFT * np.sqrt(2 * walk * np.exp(high))
    return float(low), float(max(2 * np.log(radius), low + 1.0))


def smooth_part(
    law: Callable[..., Array], grid: list[np.ndarray], noise_exponent: float | None
) -> Float[np.ndarray, " point"]:
    """``log(κ/h*) + ΔU_q(c)/T`` at points (log T, log (c − 1), log n, perhaps q)."""
    T, ratio, n = np.exp(grid[0]), 1 + np.exp(grid[1]), np.exp(grid[2])
    q = grid[3] if noise_exponent is None else np.full_like(T, noise_exponent)
    return np.array(law(T, ratio, n, q)) + np.asarray(log_potential(ratio, q)) / T
