r"""Escapes made by stepping a stochastic differential equation, in the form of a measured table.

No law of escape is used here: a particle moves in the landscape of a :class:`~escape_inference.worlds.World`, and a run
has escaped when it is seen outside its well. With loss L, minimum L*, curvature h* and temperature T (dimensionless),

.. math:: d\theta = -\nabla L\,dt + \sqrt{2\,T L^* (L / L^*)^q}\;dW \qquad (\text{Ito}),

where T = eta h* / B for the noise of SGD (q = 1: noise proportional to the loss; Mori et al., ICML 2022, sect. 3), and
T = eta D / (B L*), q = 0 for uniform noise of strength D. The steps are Euler-Maruyama steps; one iteration of the
table is a time eta and consists of ``ceil(eta h* / time_step)`` of them, and after every ``check_interval`` iterations
the loss is looked at. In a ramp the learning rate is raised level by level while the particle goes on from where it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Int

from escape_inference.design import budget, complete_design, experiments, in_ramps, measured_table
from escape_inference.errors import InputError
from escape_inference.sde_steps import State, StepSettings, advance
from escape_inference.worlds import World, temperature

RELAXATIONS = 10.0  # burn-in of a quasi-stationary condition, in units of 1 / h*
CHUNK_NUMBERS = 2**21  # random numbers made at a time
SHRINK, SMALL = 8, 200  # conditions in play are made fewer by this factor, unless there are fewer slots than this
MOST_STEPS = 2**30


def simulate_sde(world: World, design: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Measure escapes in a world under the conditions of a design.

    Args:
        world: landscape and noise.
        design: conditions and ramps, see :mod:`escape_inference.design`.
        seed: the same seed gives the same table.

    Returns:
        A table of measurements: one row for each run from the minimum, escaped or censored at ``max_steps``; or one for
        each level of a ramp that the run reached; or, in the quasi-stationary state, one row for each gap between the
        escapes of a replica slot after a burn-in of 10 / h*, the last one censored, when ``runs`` replicas are followed
        for ``max_steps`` each and one that escapes becomes a copy of a random survivor. ``effective_dimension`` is the
        world's.

    Raises:
        InputError: the design lacks a column or has impossible values.

    >>> design = pd.DataFrame({"minimum": ["a"], "learning_rate": [0.1], "batch_size": [1], "loss_minimum": [0.02],
    ...     "loss_barrier": [0.028], "hessian_minimum": [1.0], "runs": [40], "max_steps": [4000]})
    >>> table = simulate_sde(World(barrier="threshold", dimension=1), design, seed=1)
    >>> len(table), int(table.escaped.sum()), 150 < float(table.steps.mean()) < 500  # 186 if always looked at
    (40, 40, True)
    """
    design = complete_design(design, world.barrier)
    ramp, slots = in_ramps(design), (design["start"] == "quasi_stationary").to_numpy()
    found = [
        _escapes(world, design, _levels(design, rows), seed, stream, revived=stream == 1)
        for stream, rows in enumerate((~ramp & ~slots, slots, ramp))
        if rows.any()
    ]
    table = measured_table(design, np.concatenate(found), world.barrier)
    return table.assign(effective_dimension=float(world.dimension))


def _levels(design: pd.DataFrame, which: np.ndarray) -> list[Int[np.ndarray, " level"]]:
    """Rows of the design that each experiment among ``which`` goes through."""
    rows = np.flatnonzero(which)
    number = experiments(design)[rows]
    return [rows[number == k] for k in dict.fromkeys(number)]


def _escapes(
    world: World, design: pd.DataFrame, levels: list[np.ndarray], seed: int, stream: int, revived: bool
) -> Int[np.ndarray, "escape 3"]:
    """Every escape seen: row of the design, slot, and iteration since the start of its clock (burn-in: not positive).

    Each experiment (each run of it, where runs are independent) has its own stream of random numbers, used in order,
    whatever else is simulated beside it.
    """
    runs = design["runs"].to_numpy()[[rows[0] for rows in levels]]
    slots = np.zeros(len(levels), int)
    if not revived:  # runs are independent: each is stepped as if it were a condition of its own
        levels = [rows for rows, count in zip(levels, runs, strict=True) for _ in range(count)]
        slots = np.concatenate([np.arange(count) for count in runs])
        runs = np.ones(len(levels), int)
    longest = max(len(rows) for rows in levels)
    table = np.array([np.append(rows, np.full(longest - len(rows), rows[-1])) for rows in levels])
    reached = np.arange(longest) < np.array([len(rows) for rows in levels])[:, None]
    settings, substeps, ends, state = _prepare(world, design, table, reached, runs)
    width, events, members = int(runs.max()), [np.zeros((0, 3), int)], np.arange(len(levels))
    streams = [np.random.Generator(np.random.SFC64([seed, stream, int(k)])) for k in members]
    while True:
        clock = np.asarray(state.clock)
        live = np.asarray(state.alive).any(axis=1) & (clock < ends[members, -1])
        if not live.any():
            return np.concatenate(events)
        size = len(members) // SHRINK
        if live.sum() <= size and len(members) * width > SMALL:  # worth another compilation
            kept = np.argsort(~live, kind="stable")[:size]
            settings, state = jax.tree.map(lambda values, kept=kept: values[kept], (settings, state))
            members, clock = members[kept], clock[kept]
        length = int(np.clip(CHUNK_NUMBERS // (len(members) * width * world.dimension), 64, 1024))
        shape = (length, width, world.dimension)
        normal = np.stack([streams[k].standard_normal(shape, np.float32) for k in members])
        uniform = np.stack([streams[k].random(width, np.float32) for k in members])
        state, escaped = advance(world.barrier, revived, settings, state, normal, uniform)
        step, member, slot = np.nonzero(np.asarray(escaped))
        time, who = clock[member] + step + 1, members[member]
        inside = time <= ends[who, -1]
        time, who, slot = time[inside], who[inside], slot[inside]
        level = np.sum(time[:, None] > ends[who, :-1], axis=1)
        begin = np.where(level > 0, ends[who, level - 1], 0)
        iteration = (time - begin) // substeps[who, level]
        events.append(np.stack([table[who, level], slots[who] + slot, iteration], axis=1))


def _prepare(
    world: World, design: pd.DataFrame, table: np.ndarray, reached: np.ndarray, runs: np.ndarray
) -> tuple[StepSettings, np.ndarray, np.ndarray, State]:
    """Dimensionless settings, small steps in an iteration and at the end of each level, and all runs at the minimum.

    ``table`` holds the row of the design for each condition and level; those beyond the last level are not ``reached``.
    """
    relaxation = (design["learning_rate"] * design["hessian_minimum"]).to_numpy()[table]
    substeps = np.ones(table.shape, int)
    if world.time_step is not None:
        substeps = np.maximum(1, np.ceil(relaxation / world.time_step * (1 - 1e-9)).astype(int))
    ends = np.cumsum(np.where(reached, budget(design)[table] * substeps, 0), axis=1)
    if ends.max() >= MOST_STEPS:
        raise InputError("more than 2**30 steps of integration: lower max_steps, or raise time_step")
    interval = design["check_interval"].to_numpy()[table]
    quasi_stationary = (design["start"] == "quasi_stationary").to_numpy()[table[:, 0]]
    burn_in = np.where(quasi_stationary, np.ceil(RELAXATIONS / relaxation[:, 0]), 0).astype(int)
    burn_in = -(-burn_in // interval[:, 0]) * interval[:, 0]
    saddle = world.barrier == "saddle"

    def single(values: Any) -> Array:
        return jnp.asarray(np.asarray(values), jnp.float32)

    first = design.iloc[table[:, 0]]
    settings = StepSettings(
        noise_exponent=single(np.full(len(table), world.noise_exponent)),
        barrier_ratio=single(first["loss_barrier"] / first["loss_minimum"]),
        hessian_ratio=single(first["hessian_saddle"] / first["hessian_minimum"] if saddle else np.ones(len(table))),
        temperature=single(temperature(world, design)[table]),
        time_step=single(relaxation / substeps),
        stride=jnp.asarray(interval * substeps, jnp.int32),
        begins=jnp.asarray(np.hstack([np.zeros((len(table), 1), int), ends[:, :-1]]), jnp.int32),
    )
    state = State(
        position=jnp.zeros((len(table), runs.max(), world.dimension), jnp.float32),
        alive=jnp.asarray(np.arange(runs.max()) < runs[:, None]),
        clock=jnp.asarray(-burn_in * substeps[:, 0], jnp.int32),
    )
    return settings, substeps, ends, state
