"""Escape times of SGD from a minimum of its loss, over a loss threshold.

Two ways of starting the clock. From the *minimum*: every replica starts at theta* and runs until its loss exceeds the
barrier or its budget ends; such times include the time in which the run fills its well. From the *quasi-stationary*
state: in the process of Fleming and Viot, replicas run side by side and one that escapes is replaced at once by a copy
of a random survivor; after a burn-in the gaps between the escapes of a replica slot are exponential with the escape
rate, whatever the barrier (Le Bris, Lelievre, Luskin and Perez 2012; Binder, Lelievre and Simpson 2015).
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.engines import make_engine
from escape_inference.trainers.looks import World
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss
from escape_inference.trainers.minimum import Minimum, parameters_of
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.process import AFTERWARDS, Process, Progress, UnstableMinimum, afterwards
from escape_inference.trainers.record import TREND_BINS, Condition, EscapeRecord, Outcome, make_record
from escape_inference.trainers.screens import FEWEST, choose_screens, pilot_losses
from escape_inference.trainers.sgd import check_training, make_recipe, root_key

__all__ = ["EscapeRecord", "UnstableMinimum", "measure_escape"]

STARTS = ("quasi_stationary", "minimum")
LOOKS = ("auto", "exact", "screened")
LEAST_MONITOR, WATCHED = 400, 8
"""Least number of iterations between scheduled full looks, which the trend of the loss is made of, and at how many
replicas they are, where screens save the others."""


def measure_escape(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    learning_rate: float,
    batch_size: int,
    loss_barrier: float,
    replicas: int,
    steps: int,
    check_interval: int = 1,
    start: str = "quasi_stationary",
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    loss: str | SampleLoss = "mean_square",
    with_replacement: bool = True,
    seed: int = 0,
    replica_batch: int | None = None,
    burn_in: tuple[int, int] | None = None,
    looks: str = "auto",
    follow_steps: int = 0,
    hessian_minimum: float | None = None,
    run_prefix: str = "",
    threads: int | None = None,
    progress: Progress | None = None,
) -> EscapeRecord:
    """Run replicas of SGD from a minimum and time how long their full-batch loss stays below the barrier.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters (its loss is then computed here).
        inputs: samples first.
        targets: samples first.
        learning_rate: eta, time units per iteration.
        batch_size: B, samples per gradient.
        loss_barrier: full-batch loss above which a run has escaped; a loss that is not a number counts as above.
        replicas: runs side by side.
        steps: iterations of each replica, after the burn-in; rounded down to a multiple of ``check_interval``.
        check_interval: the loss is looked at every so many iterations. With 1 the two-stage looks of ``looks.py`` keep
            the cost down; with more, every look is the full loss.
        start: ``quasi_stationary`` or ``minimum``.
        optimizer: None for plain SGD, a function of the learning rate (``optax.adam``), or an optax transformation
            (which then ignores ``learning_rate``, so give the same). A replaced replica copies the optimiser's state
            too.
        loss: ``mean_square``, half the squared error, or a callable ``(prediction, target) -> loss`` for one sample.
        with_replacement: draw each batch independently, or go through the data in epochs of a new random order.
        seed: random numbers are fixed by (seed, replica slot, iteration).
        replica_batch: how many replicas are advanced in one go; only memory and speed depend on it, never a result.
        burn_in: least and most iterations before the rows begin (quasi-stationary start only). None: a quarter of
            ``steps``, and ``steps``.
        looks: ``exact``, ``screened``, or ``auto``: screened where that is estimated to be cheaper.
        follow_steps: every run that escaped is followed for so many iterations more, and the column ``afterwards`` says
            whether its loss then ``stayed`` above the barrier, ``returned`` below or ``diverged`` (``unknown`` where too
            many escaped at once).
        hessian_minimum: h*, 1/time, for the rows and for the check of the interval of looks.
        run_prefix: put before every ``run``.
        threads: replicas advanced at the same time; None: as many as processors.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Returns:
        The rows and how they were measured.

    Raises:
        UnstableMinimum: every replica escaped at the same time, so that no quasi-stationary state exists to measure.
        InputError: an argument that cannot be used.

    Examples:
        One weight, loss ``theta^2 / 2 + 1/2`` of two samples; escape over 1.25 times the loss of the minimum:

        >>> record = measure_escape(
        ...     lambda theta, x: theta * x, jnp.zeros(1), jnp.ones((2, 1)), jnp.array([[1.0], [-1.0]]),
        ...     learning_rate=0.2, batch_size=1, loss_barrier=0.625, replicas=16, steps=200)
        >>> record.rows["run"].iloc[0], bool(record.rows["escaped"].iloc[0]), record.settled
        ('000-0000', True, True)
        >>> record.escapes == record.rows["escaped"].sum(), round(record.exposure / 0.2 / 16)
        (np.True_, 200)
    """
    began = time.perf_counter()
    sample_loss = resolve_loss(loss)
    params = parameters_of(minimum)
    inputs, targets = check_problem(apply, sample_loss, params, inputs, targets)
    check_training(learning_rate, batch_size, steps, len(inputs))
    check_run(start, looks, replicas, steps, check_interval, replica_batch, burn_in, hessian_minimum)
    recipe = make_recipe(apply, sample_loss, optimizer, batch_size, with_replacement)
    loss_minimum = float(jax.jit(recipe.mean_loss)(params, inputs, targets))
    if isinstance(minimum, Minimum):
        loss_minimum = minimum.loss_minimum
    check_barrier(loss_barrier, loss_minimum)
    if int(follow_steps) != follow_steps or follow_steps < 0:
        raise InputError(f"follow_steps: must be a whole number, 0 or more, got {follow_steps}.")
    steps -= steps % check_interval
    eta, barrier = jnp.float32(learning_rate), jnp.float32(loss_barrier)
    world = World(inputs, targets, eta, barrier, jnp.int32(1), jnp.int32(check_interval), None, None)
    key = root_key(seed)
    quasi_stationary = start == "quasi_stationary"
    engine = make_engine(
        recipe,
        params,
        replicas,
        key,
        learning_rate,
        replace=quasi_stationary,
        replica_batch=replica_batch,
        threads=threads,
        keep_left=follow_steps > 0,
    )
    screens = None
    if check_interval == 1 and (looks == "screened" or (looks == "auto" and len(inputs) >= FEWEST)):
        losses = pilot_losses(recipe, params, key, world)
        screens = choose_screens(*losses, loss_barrier, seed, gated=engine.gated, forced=looks == "screened")
        if looks == "screened" and screens is None:
            raise InputError("looks: there are too few samples, or too few losses below the barrier, for screens.")
    monitor = steps / TREND_BINS if screens is None else max(steps / TREND_BINS, LEAST_MONITOR)
    monitor = max(1, round(monitor / check_interval)) * check_interval
    turns = 1 if screens is None else max(1, replicas // WATCHED)
    world = world._replace(monitor=jnp.int32(monitor), turns=jnp.int32(turns))
    process = Process(engine, world, screens, progress, steps, loss_minimum)
    burnt, settled = 0, True
    test: dict[str, float] = {}
    if quasi_stationary:
        burnt, test, settled = process.burn_in(burn_in or (steps // 4, steps), check_interval)
    if follow_steps:
        streams = jax.random.fold_in(key, AFTERWARDS)
        process.follow = lambda state, number: afterwards(
            recipe, state, world, jax.random.fold_in(streams, number), follow_steps
        )
    process.measure(burnt + steps)
    condition = Condition(
        float(learning_rate),
        int(batch_size),
        int(check_interval),
        start,
        loss_minimum,
        float(loss_barrier),
        hessian_minimum,
        run_prefix,
    )
    outcome = Outcome(
        process.rounds,
        replicas,
        burnt,
        burnt + steps,
        monitor,
        turns,
        None if screens is None else screens.sizes,
        test,
        settled,
    )
    return make_record(condition, outcome, time.perf_counter() - began)


def check_barrier(loss_barrier: float, loss_minimum: float) -> None:
    """Raises InputError for a loss that nobody can escape over."""
    if not (loss_minimum < loss_barrier < float("inf")):
        raise InputError(
            f"loss_barrier: {loss_barrier:g} must be finite and above the loss at the minimum, {loss_minimum:g}."
        )


def check_run(
    start: str,
    looks: str,
    replicas: int,
    steps: int,
    check_interval: int,
    replica_batch: int | None,
    burn_in: tuple[int, int] | None,
    hessian_minimum: float | None,
) -> None:
    """Raises InputError for settings of a measurement that cannot be used."""
    if start not in STARTS:
        raise InputError(f"start: {start!r} is not known; allowed: {', '.join(STARTS)}.")
    if looks not in LOOKS:
        raise InputError(f"looks: {looks!r} is not known; allowed: {', '.join(LOOKS)}.")
    least = 2 if start == "quasi_stationary" else 1
    if int(replicas) != replicas or replicas < least:
        raise InputError(f"replicas: must be an integer of at least {least} for start {start!r}, got {replicas}.")
    if int(check_interval) != check_interval or not 1 <= check_interval <= steps:
        raise InputError(f"check_interval: must be an integer from 1 to steps, {steps}, got {check_interval}.")
    if looks == "screened" and check_interval != 1:
        raise InputError("looks: screened looks are made every iteration; use check_interval 1.")
    if replica_batch is not None and (int(replica_batch) != replica_batch or replica_batch < 1):
        raise InputError(f"replica_batch: must be a positive integer, got {replica_batch}.")
    if burn_in is not None and not 0 <= burn_in[0] <= burn_in[1]:
        raise InputError(f"burn_in: must be (least, most) iterations, got {burn_in}.")
    if hessian_minimum is not None and not 0 < hessian_minimum < float("inf"):
        raise InputError(f"hessian_minimum: must be positive and finite, got {hessian_minimum}.")
