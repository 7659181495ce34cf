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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.engines import Engine, make_engine
from escape_inference.trainers.escape import check_barrier
from escape_inference.trainers.looks import World
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss
from escape_inference.trainers.minimum import Minimum, parameters_of
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.process import AFTERWARDS, Process, Progress, afterwards
from escape_inference.trainers.ramp_record import RampRecord, critical_median, ramp_tables, ramp_warnings
from escape_inference.trainers.record import Condition
from escape_inference.trainers.screens import FEWEST, Screens, choose_screens, pilot_losses
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key

LOOKS_A_LEVEL = 4
"""Scheduled full losses of every run in a level, which the running loss is made of."""


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
    optimizer: OptimizerFactory | None = None,
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
    if isinstance(optimizer, optax.GradientTransformation):
        raise InputError(
            "optimizer: a ready transformation keeps its own learning rate, so no ramp would reach it; "
            "give a function of the learning rate, such as optax.adam."
        )
    recipe = make_recipe(apply, sample_loss, optimizer, batch_size, with_replacement)
    loss_minimum = float(jax.jit(recipe.mean_loss)(params, inputs, targets))
    if isinstance(minimum, Minimum):
        loss_minimum = minimum.loss_minimum
    barrier = loss_barrier if loss_barrier is not None else float(jump_factor or 0) * loss_minimum
    check_barrier(barrier, loss_minimum)
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
    rows, critical = ramp_tables(condition, levels, steps_per_level, runs, jumps, barriers)
    critical["afterwards"] = [
        _afterwards(recipe, engine, world, key, slot, levels, barriers, jumps.get(slot), steps_per_level)
        for slot in range(runs)
    ]
    median, low, high = critical_median(critical)
    return RampRecord(rows, critical, median, low, high, ramp_warnings(critical), time.perf_counter() - began)


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
    there = world._replace(learning_rate=jnp.float32(levels[last]), barrier=jnp.float32(barriers[last]))
    stream = jax.random.fold_in(jax.random.fold_in(key, AFTERWARDS), slot)
    return afterwards(recipe, engine.state_of(slot), there, stream, steps)


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
