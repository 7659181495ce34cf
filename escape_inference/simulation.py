"""Measured tables drawn from a law: exactly memoryless, at the law's own rates.

What a real measurement adds to the law (a delay while the well fills, overshoot, a run's memory of the level before in a ramp)
is not in such a table; :func:`escape_inference.simulate_sde` steps the equation of motion and has all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from escape_inference.design import budget, complete_design, in_ramps, measured_table
from escape_inference.errors import InputError
from escape_inference.law import Law, Parameter, Setting, load_law
from escape_inference.precision import float64
from escape_inference.row_groups import combined_codes

MOST_GAPS = 30_000_000  # escapes in the quasi-stationary state that are drawn at most
_ONE_RATE = ("minimum", "batch_size", "check_interval", "start", "learning_rate", "loss_barrier")


def simulate(
    law: str | Path | Law,
    design: pd.DataFrame,
    parameters: Mapping[str, float],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Draw the escapes that a law predicts under a design.

    A look at the loss finds an escape with probability 1 - exp(-kappa w), w = eta m for a look every m iterations, from the
    minimum as in the quasi-stationary state and at every level of a ramp. Each condition has one log rate: that of the law
    plus ``log_prefactor`` plus a normal variable of standard deviation ``discrepancy``.

    Args:
        law: name, path of a law file, or a :class:`~escape_inference.Law`.
        design: conditions and ramps, see :mod:`escape_inference.design`; and optionally ``barrier`` (the same in all rows;
            else ``saddle`` where there is a column ``hessian_saddle``, ``threshold`` where not) and
            ``effective_dimension``, which then stands in the table and takes the place of the parameter.
        parameters: the law's parameters in its own units; ``log_prefactor`` and ``discrepancy`` are 0 if not given.
        seed: the same seed gives the same table.

    Returns:
        A table of measurements: one row for each run from the minimum, for each gap between the escapes of a replica slot
        (the last one censored), or for each level of a ramp that the run reached.

    Raises:
        InputError: bad law, design or parameters, or a rate that is not finite.

    >>> from escape_inference.worlds import World, make_design
    >>> design = make_design(World(dimension=3), minima=2, learning_rates=2, runs=50, seed=1)
    >>> table = simulate("power_law", design, {"temperature_scale": 1.0, "effective_dimension": 3.0}, seed=1)
    >>> len(table), 0.9 < float(table["escaped"].mean()) < 1.0
    (200, True)
    """
    law, barrier = load_law(law), barrier_of(design)
    design = complete_design(design, barrier)
    values, scatter = check_parameters(law, barrier, parameters, "effective_dimension" in design)
    log_rate = law_log_rate(law, design, values, barrier) + values["log_prefactor"]
    if not np.isfinite(log_rate).all():
        row = int(np.flatnonzero(~np.isfinite(log_rate))[0])
        raise InputError(f"law {law.name}: the log rate of row {row + 1} of the design is {log_rate[row]}, not finite")
    rng = np.random.default_rng(seed)
    which = pd.factorize(combined_codes(*(design[name] for name in _ONE_RATE), in_ramps(design)))[0]
    log_rate = log_rate + scatter * rng.standard_normal(which.max() + 1)[which]
    look = (design["learning_rate"] * design["check_interval"]).to_numpy()
    hazard = np.exp(np.clip(log_rate, -700, 700)) * look
    carried = ["effective_dimension"] if "effective_dimension" in design else []
    return measured_table(design, _draw(design, hazard, rng), barrier, carried)


def barrier_of(design: pd.DataFrame) -> str:
    """The kind of barrier of a design: its column ``barrier``, or what the column ``hessian_saddle`` tells.

    Raises:
        InputError: both kinds in one design, or another word.
    """
    kinds = set(design["barrier"]) if "barrier" in design else {"saddle" if "hessian_saddle" in design else "threshold"}
    if len(kinds) != 1 or not kinds <= {"saddle", "threshold"}:
        raise InputError(f"the barrier of a design is saddle or threshold in all rows, not {sorted(map(str, kinds))}")
    return str(kinds.pop())


def law_log_rate(
    law: Law, design: pd.DataFrame, values: Mapping[str, float], barrier: str
) -> Float[np.ndarray, " condition"]:
    """Natural log of the law's rate κ per unit time for each row of a design, without the log prefactor.

    >>> design = pd.DataFrame({"learning_rate": [0.1], "batch_size": [1], "loss_minimum": [1.0], "loss_barrier": [2.0],
    ...     "hessian_minimum": [1.0], "hessian_saddle": [1.0]})
    >>> from escape_inference.law import load_law
    >>> rate = law_log_rate(load_law("power_law"), design, {"temperature_scale": 1.0, "effective_dimension": 2.0}, "saddle")
    >>> round(float(np.exp(rate[0])) * 2 * np.pi * 2**10, 9)  # κ = c^-10 / 2π
    1.0
    """
    return _by_start(law.log_rate, design, values, barrier)


def law_temperature(
    law: Law, design: pd.DataFrame, values: Mapping[str, float], barrier: str
) -> Float[np.ndarray, " condition"]:
    """The law's dimensionless temperature for each row of a design."""
    return _by_start(law.temperature, design, values, barrier)


@float64
def _by_start(
    formula: Callable[[Any, Setting], Any], design: pd.DataFrame, values: Mapping[str, float], barrier: str
) -> np.ndarray:
    result = np.zeros(len(design))
    starts = design["start"].to_numpy() if "start" in design else np.full(len(design), "minimum")
    for start in dict.fromkeys(starts):
        rows = starts == start
        part = design.loc[rows]
        here = {name: jnp.asarray(float(value)) for name, value in values.items()}
        if "effective_dimension" in part:
            here["effective_dimension"] = jnp.asarray(part["effective_dimension"].to_numpy(float))
        result[rows] = np.broadcast_to(
            np.asarray(_jitted(formula)(here, setting_of(part, barrier, start)), float), rows.sum()
        )
    return result


@lru_cache(maxsize=32)
def _jitted(formula: Callable[[Any, Setting], Any]) -> Callable[[Any, Setting], Any]:
    """Passage laws are loops that would run operation by operation."""
    return jax.jit(formula, compiler_options={"xla_backend_optimization_level": 0})


def setting_of(frame: pd.DataFrame, barrier: str, start: str) -> Setting:
    """Conditions with known settings as a law sees them.

    >>> from escape_inference.worlds import World, make_design
    >>> setting_of(make_design(World()), "saddle", "minimum").learning_rate.shape
    (36,)
    """
    names = ("learning_rate", "batch_size", "check_interval", "loss_minimum", "hessian_minimum", "hessian_saddle")
    column = {name: jnp.asarray(frame[name].to_numpy(float)) for name in names if name in frame}
    column.setdefault("check_interval", jnp.ones(len(frame)))
    column.setdefault("hessian_saddle", column["hessian_minimum"])
    return Setting(
        **column,
        log_barrier=jnp.asarray(np.log((frame["loss_barrier"] / frame["loss_minimum"]).to_numpy(float))),
        barrier=barrier,  # type: ignore[arg-type]
        start=start,  # type: ignore[arg-type]
    )


def default_parameters(law: Law, design: pd.DataFrame) -> dict[str, float]:
    """The value that the theory gives for each parameter that the law uses under a design, or else its prior's median.

    >>> from escape_inference.law import load_law
    >>> default_parameters(load_law("power_law"), pd.DataFrame({"hessian_saddle": [1.0]}))
    {'temperature_scale': 1.0, 'effective_dimension': 3.0}
    """
    parameters: Sequence[Parameter] = law.parameters_for({barrier_of(design)})
    return {p.name: p.median_for(design) if p.theory is None else float(p.theory) for p in parameters}


def check_parameters(
    law: Law, barrier: str, parameters: Mapping[str, float], dimension_measured: bool = False
) -> tuple[dict[str, float], float]:
    """The law's parameters with the log prefactor, and the discrepancy; or one message on what is wrong with them."""
    if barrier not in law.barriers:
        raise InputError(f"law {law.name} has no formula for barrier {barrier!r}")
    own = {p.name: p for p in law.parameters_for({barrier})}
    if dimension_measured:
        own.pop("effective_dimension", None)
    known = [*own, "log_prefactor", "discrepancy"]
    missing = [name for name in own if name not in parameters]
    unknown = [name for name in parameters if name not in known]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"does not use {', '.join(unknown)} here"
        raise InputError(f"law {law.name} {wrong}; for a {barrier} its parameters are {', '.join(known)}")
    values = {"log_prefactor": 0.0, "discrepancy": 0.0} | {name: _number(name, parameters[name]) for name in parameters}
    for name, value in values.items():
        if value <= 0 and name in own and own[name].positive:
            raise InputError(f"law {law.name}: the parameter {name} must be positive, not {value:g}")
    if values["discrepancy"] < 0:
        raise InputError(f"the discrepancy must not be negative, but is {values['discrepancy']:g}")
    return values, values.pop("discrepancy")


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"the parameter {name} must be a finite number, not {value!r}")
    return number


def _draw(design: pd.DataFrame, hazard: np.ndarray, rng: np.random.Generator) -> Int[np.ndarray, "escape 3"]:
    """Row of the design, slot and iteration of the escapes; ``hazard`` [row] is that between two looks."""
    runs, interval = design["runs"].to_numpy(), design["check_interval"].to_numpy()
    looks = budget(design) // interval
    many = (design["start"] == "quasi_stationary").to_numpy()
    expected = (runs * looks * -np.expm1(-hazard))[many].sum()
    if expected > MOST_GAPS:
        raise InputError(f"about {expected:.2g} escapes in the quasi-stationary state are too many: lower max_steps")
    row = np.repeat(np.arange(len(design)), runs)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(runs) - runs, runs)
    at, found = np.zeros(len(row)), []
    while len(row):
        at = at + np.maximum(np.ceil(rng.standard_exponential(len(row)) / hazard[row]), 1)
        inside = at <= looks[row]
        row, slot, at = row[inside], slot[inside], at[inside]
        found.append(np.stack([row, slot, at.astype(np.int64) * interval[row]], axis=1))
        again = many[row]
        row, slot, at = row[again], slot[again], at[again]
    escapes = np.concatenate([np.zeros((0, 3), np.int64), *found])
    return _first_jumps(design, escapes)


def _first_jumps(design: pd.DataFrame, escapes: np.ndarray) -> np.ndarray:
    """Without the escapes that a run of a ramp would have made at levels beyond its jump."""
    ramp = in_ramps(design)
    if not ramp.any():
        return escapes
    label = pd.factorize(combined_codes(design["minimum"], design["ramp"]))[0]
    inside = ramp[escapes[:, 0]]
    levels = pd.DataFrame(escapes[inside], columns=["row", "slot", "iteration"])
    first = levels.groupby([label[levels["row"]], levels["slot"]])["row"].transform("min")
    return np.concatenate([escapes[~inside], levels[(levels["row"] == first).to_numpy()].to_numpy()])


def simulate_slide(design: pd.DataFrame, *, coefficient_of_variation: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Times that are not escape: a particle that slides down with constant drift passes a point below.

    The passage time of dx = v dt + sqrt(2 D) dW over a distance a is inverse Gaussian with the mean a / v and the
    coefficient of variation sqrt(2 D / (v a)), where a metastable escape has 1. The mean is a third of ``max_steps``.

    Args:
        design: as for :func:`simulate`, without ramps; the landscape is not used beyond being copied into the table.
        coefficient_of_variation: of the passage time.
        seed: the same seed gives the same table.

    >>> from escape_inference.worlds import World, make_design
    >>> steps = simulate_slide(make_design(World(), minima=1, learning_rates=1, runs=400)).steps
    >>> 0.09 < float(steps.std() / steps.mean()) < 0.11
    True
    """
    barrier = barrier_of(design)
    design = complete_design(design.assign(start="minimum", check_interval=1, ramp=""), barrier)
    rng = np.random.default_rng(seed)
    mean, runs = design["max_steps"].to_numpy() / 3, design["runs"].to_numpy()
    times = [rng.wald(m, m / coefficient_of_variation**2, n) for m, n in zip(mean, runs, strict=True)]
    row = np.repeat(np.arange(len(design)), runs)
    slot = np.concatenate([np.arange(n) for n in runs])
    escapes = np.stack([row, slot, np.ceil(np.concatenate(times)).astype(int)], axis=1)
    return measured_table(design, escapes, barrier)
