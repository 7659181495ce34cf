"""The threshold laws as a spline, for posteriors with many latent settings.

With measurement errors or partial pooling every condition has a temperature, a barrier and a dimension of its own at every step of the
sampler, and the exact integrals of :mod:`escape_inference.passage` are too slow there. But both laws are one smooth function of (T, c, n, q):
once the leading ``−ΔU_q(c)/T`` is taken away, a cubic B-spline in ``(log T, log (c − 1), log n, q)`` reproduces it, with continuous
second derivatives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.ndimage import spline_filter

from escape_inference.passage import LOOK_SHIFT, log_leading_rate, log_mean_passage_rate, log_potential

if TYPE_CHECKING:
    from escape_inference.law import Law, Setting

STEPS = (0.18, 0.2, 0.2)  #: grid steps in log T, log (c − 1), log n
STEPS_WITH_EXPONENT = (0.35, 0.35, 0.4, 0.5)  #: the same and q, where q varies
LOG_TEMPERATURES = (-6.0, 5.0)
LOG_DIMENSIONS = (float(np.log(0.01)), float(np.log(150.0)))
EXPONENTS = (-1.5, 2.7)
MARGIN = 4  #: grid points beyond the range on every side
CHECKED = 300


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PassageTable:
    """Spline coefficients of ``log(κ/h*) + ΔU_q(c)/T`` on a uniform grid; without a fourth axis q is fixed.

    Attributes:
        low, step: first node and spacing of every axis.
        coefficients: of the B-splines, one axis for each of log T, log (c − 1), log n and, if q varies, q.
        error: largest difference from the exact law at random points inside.
    """

    low: Float[Array, " axis"]
    step: Float[Array, " axis"]
    coefficients: Float[Array, "..."]
    error: float = field(metadata={"static": True}, default=float("nan"))

    def __call__(
        self,
        temperature: Float[Array, " condition"],
        barrier_ratio: Float[Array, " condition"],
        dimension: Float[Array, " condition"],
        noise_exponent: Float[Array, " condition"] | float,
    ) -> Float[Array, " condition"]:
        """``log(κ/h*)``; beyond the grid the tabulated part stays as it is at the edge."""
        T, ratio, n, q = jnp.broadcast_arrays(temperature, barrier_ratio, dimension, noise_exponent)
        places = [jnp.log(T), jnp.log(ratio - 1), jnp.log(n), q][: self.coefficients.ndim]
        return self._spline(places) - log_potential(ratio, noise_exponent) / T

    def _spline(self, places: list[Array]) -> Array:
        letters = "ijkl"[: len(places)]
        weights, index = [], []
        for axis, place in enumerate(places):
            size = self.coefficients.shape[axis]
            t = jnp.clip((place - self.low[axis]) / self.step[axis], 1.0, size - 3.0)
            left = jnp.clip(jnp.floor(jax.lax.stop_gradient(t)), 1, size - 3)
            u = t - left
            cubic = (1 - u) ** 3 / 6, (3 * u**3 - 6 * u**2 + 4) / 6, (1 + 3 * u * (1 + u * (1 - u))) / 6, u**3 / 6
            weights.append(jnp.stack(cubic, axis=-1))
            taps = left.astype(int)[..., None] - 1 + jnp.arange(4)
            index.append(taps.reshape(*place.shape, *(4 if k == axis else 1 for k in range(len(places)))))
        rule = f"...{letters}," + ",".join(f"...{letter}" for letter in letters) + "->..."
        return jnp.einsum(rule, self.coefficients[tuple(index)], *weights)


def build_passage_table(
    start: str, log_excess: tuple[float, float], noise_exponent: float | None, *, seed: int = 0
) -> PassageTable:
    """Tabulate one threshold law.

    Args:
        start: ``minimum`` (mean passage) or ``quasi_stationary`` (leading rate).
        log_excess: range of ``log (c − 1)``, overshoot included.
        noise_exponent: q, or None for a table in q as well.
        seed: of the points at which the table is compared with the law.
    """
    law = log_leading_rate if start == "quasi_stationary" else log_mean_passage_rate
    ranges = [LOG_TEMPERATURES, log_excess, LOG_DIMENSIONS] + ([EXPONENTS] if noise_exponent is None else [])
    step = np.array(STEPS if noise_exponent is not None else STEPS_WITH_EXPONENT)
    low = np.array([bounds[0] - MARGIN * width for bounds, width in zip(ranges, step, strict=True)])
    counts = [int(np.ceil((b - a) / s)) + 1 + 2 * MARGIN for (a, b), s in zip(ranges, step, strict=True)]
    axes = [a + s * np.arange(k) for a, s, k in zip(low, step, counts, strict=True)]
    grid = [x.ravel() for x in np.meshgrid(*axes, indexing="ij")]
    values = _smooth_part(law, grid, noise_exponent).reshape(counts)
    table = PassageTable(
        jnp.asarray(low), jnp.asarray(step), jnp.asarray(spline_filter(values, order=3, mode="mirror"))
    )
    rng = np.random.default_rng(seed)
    points = [rng.uniform(a, b, CHECKED) for a, b in ranges]
    exact = _smooth_part(law, points, noise_exponent)
    error = float(np.max(np.abs(np.asarray(table._spline([jnp.asarray(x) for x in points])) - exact)))
    return PassageTable(table.low, table.step, table.coefficients, error)


class _Recorder:
    """Stands in for a table and notes which q a law asks for: a number, or None where it varies."""

    def __init__(self) -> None:
        self.exponents: list[float | None] = []

    def __call__(self, temperature: Array, barrier_ratio: Array, dimension: Array, noise_exponent: Any) -> Array:
        self.exponents.append(float(noise_exponent) if isinstance(noise_exponent, int | float) else None)
        return jnp.zeros_like(barrier_ratio)


def tables_for(law: "Law", settings: "Sequence[tuple[Setting, float]]") -> dict[str, PassageTable]:
    """The tables that a law needs for the thresholds among some settings, by kind of start.

    Args:
        law: the law.
        settings: typical settings of conditions of one kind, with the standard deviation of their latent log barrier.

    A law that asks for several fixed q, or for one that varies, gets a table in q as well.
    """
    tables: dict[str, PassageTable] = {}
    for setting, spread in settings:
        if setting.barrier != "threshold":
            continue
        recorder = _Recorder()
        values = {p.name: jnp.ones(()) for p in law.parameters}
        jax.eval_shape(partial(_ask, law, replace(setting, passage=recorder)), values)
        if not recorder.exponents:
            continue
        distinct = set(recorder.exponents)
        log_excess = _log_excess(setting, spread)
        tables[setting.start] = build_passage_table(
            setting.start, log_excess, distinct.pop() if len(distinct) == 1 else None
        )
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


def _smooth_part(law: Callable[..., Array], grid: list[np.ndarray], noise_exponent: float | None) -> np.ndarray:
    T, ratio, n = np.exp(grid[0]), 1 + np.exp(grid[1]), np.exp(grid[2])
    q = grid[3] if noise_exponent is None else np.full_like(T, noise_exponent)
    return np.asarray(law(T, ratio, n, q)) + np.asarray(log_potential(ratio, q)) / T
