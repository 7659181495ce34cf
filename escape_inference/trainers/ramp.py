"""The critical learning rate: eta is raised level by level until the loss jumps.

Every run starts at the minimum and keeps its batch size; each level holds eta for the same number of iterations. Such a
ramp is an escape experiment with a changing hazard: the run survives level j with probability
``exp(-eta_j kappa(eta_j) k)``, and its critical learning rate is known to lie between the last level that it survived and
the one at which it jumped (Evans and Ritchie 1997, for the same statistics in force spectroscopy). Mori et al. (ICML 2022)
raise eta slowly and note where the loss suddenly rises.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, PyTree
from scipy.stats import binom

from escape_inference.errors import InputError
from escape_inference.trainers.engines import Engine, make_engine
from escape_inference.trainers.looks import World
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss
from escape_inference.trainers.minimum import Minimum, compiled_training, parameters_of
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.process import Process, Progress
from escape_inference.trainers.record import Condition
from escape_inference.trainers.screens import FEWEST, Screens, choose_screens, pilot_losses
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key

LOOKS_A_LEVEL = 4
"""Scheduled full losses of every run in a level, which the running loss is made of."""
AFTERWARDS = 0x61667465
"""Stream of the random numbers of a run after its jump."""
COVERAGE = 0.95
"""Of the interval of the median critical learning rate."""


@dataclass(frozen=True)
class RampRecord:
    """Rows for the measured table, and the critical learning rate of each run.

    Attributes:
        rows: a row for each run and level, in order, with the columns of the measured table but ``minimum``; ``escaped``
            is true in the last row of a run that jumped, ``steps`` is then the iteration of the jump within that level.
            ``barrier`` is ``threshold`` and ``loss_barrier`` the loss above which the run had jumped.
        critical: a row for each run: ``run``, ``batch_size``, ``critical_learning_rate`` (the level of the jump; NaN if
            there was none), ``lower`` (the last level survived; 0 if none) and ``upper`` (the level of the jump; infinite
            if none) bound it, ``level`` counted from 1, ``step`` of the jump within it, ``jumped``, ``loss_barrier``,
            and ``afterwards``: where the loss was after one more level's iterations at the same eta, ``returned`` below
            the barrier, ``stayed`` above it, ``diverged`` to a loss that is not finite, or ``none``.
        median: the median critical learning rate over runs (infinite where most did not jump).
        median_lower, median_upper: the interval that holds it with 95 % probability, from the order of the runs, each
            end at the outer end of its level.
        warnings: what a reader must know, in sentences.
        seconds: wall time.
    """

    rows: pd.DataFrame
    critical: pd.DataFrame
    median: float
    median_lower: float
    median_upper: float
    warnings: tuple[str, ...]
    seconds: float


def learning_rate_levels(first: float, last: float, levels: int, spacing: str = "geometric") -> Float[np.ndarray, " j"]:
    """Rising learning rates, by equal ratios or by equal differences.

    Args:
        first: the lowest, time per iteration.
        last: the highest.
        levels: how many, at least 2.
        spacing: ``geometric`` or ``linear``.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        >>> learning_rate_levels(0.01, 0.16, 5).round(3).tolist(), learning_rate_levels(0.1, 0.4, 3, "linear").tolist()
        ([0.01, 0.02, 0.04, 0.08, 0.16], [0.1, 0.25, 0.4])
    """
    if not 0 < first < last < float("inf"):
        raise InputError(f"learning rates: need 0 < first < last, both finite, got {first} and {last}.")
    if int(levels) != levels or levels < 2:
        raise InputError(f"levels: must be an integer of at least 2, got {levels}.")
    if spacing not in ("geometric", "linear"):
        raise InputError(f"spacing: {spacing!r} is not known; allowed: geometric, linear.")
    return np.geomspace(first, last, levels) if spacing == "geometric" else np.linspace(first, last, levels)


def measure_ramp(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    batch_size: int,
    learning_rates: Sequence[float] | np.ndarray,
    steps_per_level: int,
    runs: int,
    loss_barrier: float | None = None,
    jump_factor: float | None = None,
    check_interval: int = 1,
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    loss: str | SampleLoss = "mean_square",
    with_replacement: bool = True,
    seed: int = 0,
    looks: str = "auto",
    hessian_minimum: float | None = None,
    run_prefix: str = "",
    threads: int | None = None,
    progress: Progress | None = None,
) -> RampRecord:
    """Raise the learning rate level by level and find where the loss of each run jumps.

    A run has jumped when its full-batch loss exceeds ``loss_barrier`` or is no longer a number. With ``jump_factor`` the
    barrier of a level is that factor times the running loss: the median, over the runs still in the well, of their
    full-batch losses in the level before (at first, and at least, the loss of the minimum).

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters (its loss is then computed here).
        inputs: samples first.
        targets: samples first.
        batch_size: B, samples per gradient, the same at every level.
        learning_rates: eta of each level, time units per iteration, rising; see ``learning_rate_levels``.
        steps_per_level: iterations of each level, a multiple of ``check_interval``.
        runs: runs side by side, each with random numbers of its own.
        loss_barrier: the loss above which a run has jumped; or
        jump_factor: that loss over the running loss, above 1.
        check_interval: the loss is looked at every so many iterations; with 1 by the two-stage looks of ``looks.py``.
        optimizer: None for plain SGD, or a function of the learning rate (``optax.adam``).
        loss: ``mean_square``, half the squared error, or a callable ``(prediction, target) -> loss`` for one sample.
        with_replacement: draw each batch independently, or go through the data in epochs of a new random order.
        seed: random numbers are fixed by (seed, run, iteration).
        looks: ``exact``, or ``auto``: screened where that is estimated to be cheaper.
        hessian_minimum: h*, 1/time, for the rows.
        run_prefix: put before every ``run``.
        threads: runs advanced at the same time; None: as many as processors.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        Two samples with the loss ``2.5 theta^2 / 2 + 0.5``: full batches leave it beyond 2 / 2.5 = 0.8.

        >>> ramp = measure_ramp(
        ...     lambda theta, x: theta * x, jnp.full(1, 0.3), jnp.full((2, 1), 2.5**0.5), jnp.array([[1.0], [-1.0]]),
        ...     batch_size=2, learning_rates=[0.795, 0.81, 0.82], steps_per_level=100, runs=3, jump_factor=2.0,
        ...     with_replacement=False)
        >>> ramp.critical["lower"].tolist(), ramp.critical["upper"].tolist()
        ([0.795, 0.795, 0.795], [0.81, 0.81, 0.81])
    """
    began = time.perf_counter()
    sample_loss = resolve_loss(loss)
    params = parameters_of(minimum)
    inputs, targets = check_problem(apply, sample_loss, params, inputs, targets)
    levels = np.asarray(learning_rates, float)
    if levels.ndim != 1 or len(levels) == 0 or not np.all(np.diff(levels) > 0):
        raise InputError(f"learning_rates: must rise from level to level, got {levels.tolist()}.")
    for level in levels[[0, -1]]:
        check_training(float(level), batch_size, steps_per_level, len(inputs))
    _check_ramp(runs, steps_per_level, check_interval, loss_barrier, jump_factor, looks)
    recipe = make_recipe(apply, sample_loss, optimizer, batch_size, with_replacement)
    loss_minimum = float(jax.jit(recipe.mean_loss)(params, inputs, targets))
    if isinstance(minimum, Minimum):
        loss_minimum = minimum.loss_minimum
    barrier = loss_barrier if loss_barrier is not None else float(jump_factor or 0) * loss_minimum
    if not loss_minimum < barrier < float("inf"):
        raise InputError(
            f"loss_barrier: {barrier:g} must be finite and above the loss at the minimum, {loss_minimum:g}."
        )

    key = root_key(seed)
    engine = make_engine(
        recipe, params, runs, key, float(levels[0]), replace=False, replica_batch=None, threads=threads
    )
    every = max(1, steps_per_level // LOOKS_A_LEVEL // check_interval) * check_interval
    numbers = jnp.float32(levels[0]), jnp.float32(barrier), jnp.int32(every), jnp.int32(check_interval)
    world = World(inputs, targets, *numbers, None, None)
    screens: Screens | None = None
    if check_interval == 1 and looks == "auto" and len(inputs) >= FEWEST:
        middle = world._replace(learning_rate=jnp.float32(np.sqrt(levels[0] * levels[-1])))
        screens = choose_screens(*pilot_losses(recipe, params, key, middle), barrier, seed, gated=engine.gated)
    process = Process(engine, world, screens, progress, steps_per_level * len(levels), loss_minimum)
    barriers = []
    for place, eta in enumerate(levels):
        process.world = world._replace(learning_rate=jnp.float32(eta), barrier=jnp.float32(barrier))
        barriers.append(barrier)
        first = len(process.rounds)
        process.measure((place + 1) * steps_per_level)
        if not engine.running():
            break
        if jump_factor is not None:
            seen = np.concatenate([done.records for done in process.rounds[first:]])
            scheduled = seen[(seen[:, 0] % every == 0) & (seen[:, 5] <= barrier), 5]
            barrier = jump_factor * max(float(np.median(scheduled)), loss_minimum)
    jumps = {slot: step for done in process.rounds for step, slot in done.escapes}
    condition = Condition(
        float(levels[0]), batch_size, check_interval, "minimum", loss_minimum, barriers[-1], hessian_minimum, run_prefix
    )
    rows, critical = _tables(condition, levels, steps_per_level, runs, jumps, barriers)
    critical["afterwards"] = [
        _afterwards(recipe, engine, world, key, slot, levels, barriers, jumps.get(slot), steps_per_level)
        for slot in range(runs)
    ]
    median, low, high = critical_median(critical)
    return RampRecord(rows, critical, median, low, high, _warnings(critical), time.perf_counter() - began)


def _tables(
    condition: Condition,
    levels: np.ndarray,
    steps_per_level: int,
    runs: int,
    jumps: dict[int, int],
    barriers: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the measured table, and the critical learning rate of each run."""
    rows, critical = [], []
    for slot in range(runs):
        jump = jumps.get(slot)
        last = len(levels) - 1 if jump is None else (jump - 1) // steps_per_level
        level = {"loss_barrier": float(barriers[last])}
        for place in range(last + 1):
            escaped = jump is not None and place == last
            steps = jump - place * steps_per_level if jump is not None and escaped else steps_per_level
            row = condition.row(f"{slot:03d}", steps, escaped)
            rows.append(row | level | {"learning_rate": float(levels[place])})
        jumped = jump is not None
        critical.append(
            {
                "run": rows[-1]["run"],
                "batch_size": condition.batch_size,
                "critical_learning_rate": float(levels[last]) if jumped else float("nan"),
                "lower": (float(levels[last - 1]) if last else 0.0) if jumped else float(levels[-1]),
                "upper": float(levels[last]) if jumped else float("inf"),
                "level": last + 1,
                "step": rows[-1]["steps"],
                "jumped": jumped,
                **level,
            }
        )
    return pd.DataFrame(rows), pd.DataFrame(critical)


def _afterwards(
    recipe: Recipe,
    engine: Engine,
    world: World,
    key: Array,
    slot: int,
    levels: np.ndarray,
    barriers: Sequence[float],
    jump: int | None,
    steps: int,
) -> str:
    """Where the loss of a run is, one level's iterations after its jump at the same learning rate."""
    if jump is None:
        return "none"
    last = (jump - 1) // steps
    stream = jax.random.fold_in(jax.random.fold_in(key, AFTERWARDS), slot)
    numbers = jnp.int32(0), jnp.int32(steps), stream, jnp.float32(levels[last])
    state = compiled_training(recipe)(engine.state_of(slot), *numbers, world.inputs, world.targets)
    loss = float(jax.jit(recipe.mean_loss)(state[0], world.inputs, world.targets))
    if not np.isfinite(loss):
        return "diverged"
    return "stayed" if loss > barriers[last] else "returned"


def critical_median(critical: pd.DataFrame) -> tuple[float, float, float]:
    """The median level of the jump over runs, and an interval that holds the median with 95 % probability.

    The ends are order statistics (binomial, free of any distribution); the lower one is the lower end of its level. With
    few runs the interval is that of the extremes, which then covers less.

    >>> table = pd.DataFrame({"lower": [0.0, 0.1, 0.1, 0.5, 0.5, 0.8], "upper": [0.1, 0.5, 0.5, 0.8, 0.8, np.inf]})
    >>> critical_median(table)
    (0.65, 0.0, inf)
    """
    lower, upper = np.sort(critical["lower"]), np.sort(critical["upper"])
    count = len(upper)
    rank = int(binom.ppf((1 - COVERAGE) / 2, count, 0.5))
    rank = max(rank - 1, 0)
    with np.errstate(invalid="ignore"):
        median = float(np.median(upper))
    return median, float(lower[rank]), float(upper[count - 1 - rank])


def _warnings(critical: pd.DataFrame) -> tuple[str, ...]:
    warnings = []
    first = int((critical["jumped"] & (critical["level"] == 1)).sum())
    never = int((~critical["jumped"]).sum())
    if first:
        warnings.append(f"{first} of {len(critical)} runs jumped at the first level: begin lower.")
    if never:
        warnings.append(f"{never} of {len(critical)} runs never jumped: go higher.")
    back = int((critical["afterwards"] == "returned").sum())
    if back > len(critical) / 2:
        warnings.append(f"{back} of {len(critical)} runs came back below the barrier: it is too low for a jump.")
    return tuple(warnings)


def _check_ramp(
    runs: int,
    steps_per_level: int,
    check_interval: int,
    loss_barrier: float | None,
    jump_factor: float | None,
    looks: str,
) -> None:
    if int(runs) != runs or runs < 1:
        raise InputError(f"runs: must be a positive integer, got {runs}.")
    if int(check_interval) != check_interval or check_interval < 1 or steps_per_level % check_interval:
        raise InputError(
            f"check_interval: must be a positive integer that divides steps_per_level, {steps_per_level}, "
            f"got {check_interval}."
        )
    if (loss_barrier is None) == (jump_factor is None):
        raise InputError("give either loss_barrier (a loss) or jump_factor (over the running loss), and not both.")
    if jump_factor is not None and not 1 < jump_factor < float("inf"):
        raise InputError(f"jump_factor: must be above 1 and finite, got {jump_factor}.")
    if looks not in ("auto", "exact"):
        raise InputError(f"looks: {looks!r} is not known; allowed: auto, exact.")
