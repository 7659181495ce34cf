r"""Escapes made by stepping a stochastic differential equation, in the form of a measured table.

No law of escape is used here: a particle moves in the landscape of a :class:`~escape_inference.worlds.World`, and a run
has escaped when it is seen outside its well. With loss L, minimum L*, curvature h* and temperature T (dimensionless),

.. math:: d\theta = -\nabla L\,dt + \sqrt{2\,T L^* (L / L^*)^q}\;dW \qquad (\text{Ito}),

where T = eta h* / B for the noise of SGD (q = 1: noise proportional to the loss; Mori et al., ICML 2022, sect. 3), and
T = eta D / (B L*), q = 0 for uniform noise of strength D. The steps are Euler-Maruyama steps; one iteration of the
table is a time eta and consists of ``ceil(eta h* / time_step)`` of them, and after every ``check_interval`` iterations
the loss is looked at. The computation is in float32 with lengths in units of sqrt(L* / h*), losses of L*, times of
1 / h*.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float, Int

from escape_inference.errors import InputError
from escape_inference.worlds import COMMITTED, World, temperature

RELAXATIONS = 10.0  # burn-in of a quasi-stationary condition, in units of 1 / h*
CHUNK_NUMBERS = 2**21  # random numbers made at a time
GOLDEN = 0.618034
SHRINK, SMALL = 8, 200  # conditions in play are made fewer by this factor, unless there are fewer slots than this


class _Conditions(NamedTuple):
    """What one step needs to know of each condition."""

    temperature: Float[Array, " condition"]
    noise_exponent: Float[Array, " condition"]
    time_step: Float[Array, " condition"]
    barrier_ratio: Float[Array, " condition"]  # L^s / L*
    hessian_ratio: Float[Array, " condition"]  # h^s / h*, 1 for a threshold
    stride: Int[Array, " condition"]  # small steps between two looks


class _State(NamedTuple):
    position: Float[Array, "condition run dim"]
    alive: Bool[Array, "condition run"]
    clock: Int[Array, " condition"]  # small steps since the clock of the table started


def _landscape(barrier: str, conditions: _Conditions, position: Array) -> tuple[Array, Array, Array]:
    """Loss [condition, run], its gradient [condition, run, dim], and who has left the well [condition, run]."""
    ratio = conditions.barrier_ratio[:, None]
    if barrier == "threshold":
        loss = 1 + 0.5 * jnp.sum(position**2, axis=-1)
        return loss, position, loss > ratio
    skew = conditions.hessian_ratio[:, None] - 1
    width = jnp.sqrt(12 * (ratio - 1) / (2 + skew))
    along = position[..., 0] / width
    folded = jnp.where(along > 1, 2 - along, along)
    inner = jnp.maximum(folded, 0)
    slope = width * jnp.where(folded < 0, folded, inner * (1 - inner) * (1 + skew * inner))
    height = jnp.where(folded < 0, folded**2 / 2, inner**2 * (0.5 + (skew - 1) * inner / 3 - skew * inner**2 / 4))
    loss = 1 + width**2 * height + 0.5 * jnp.sum(position[..., 1:] ** 2, axis=-1)
    forward = jnp.where(along > 1, -slope, slope)[..., None]
    return loss, jnp.concatenate([forward, position[..., 1:]], axis=-1), along > COMMITTED


def _revive(state: _State, escaped: Bool[Array, "condition run"], uniform: Float[Array, "condition run"]) -> Array:
    """Positions after each escaped replica has become a copy of a random survivor of its condition (Fleming-Viot).

    Where none has survived all start again at the minimum.
    """
    survivors = state.alive & ~escaped
    count = survivors.sum(axis=1, keepdims=True)
    rank = jnp.clip((uniform * count).astype(int), 0, jnp.maximum(count - 1, 0))
    parent = jnp.take_along_axis(jnp.argsort(~survivors, axis=1), rank, axis=1)
    copies = jnp.take_along_axis(state.position, parent[..., None], axis=1)
    copies = jnp.where((count > 0)[..., None], copies, 0.0)
    return jnp.where(escaped[..., None], copies, state.position)


@partial(jax.jit, static_argnames=("barrier", "revived"))
def _advance(
    barrier: str,
    revived: bool,
    conditions: _Conditions,
    state: _State,
    normal: Float[Array, "condition step run dim"],
    uniform: Float[Array, "condition run"],
) -> tuple[_State, Bool[Array, "step condition run"]]:
    """Many small steps of every condition; which runs were seen to escape at each.

    An escaped run is dead, or is ``revived`` at once with the random numbers ``uniform`` (shifted from step to step).
    """
    step = conditions.time_step[:, None]
    exponent = conditions.noise_exponent[:, None]
    variance = 2 * conditions.temperature[:, None] * step
    loss_and_gradient = partial(_landscape, barrier, conditions)

    def one(carry: tuple[_State, Array, Array], normal: Array) -> tuple[tuple[_State, Array, Array], Array]:
        state, loss, gradient = carry
        noise = jnp.sqrt(variance * loss**exponent)
        position = state.position - step[..., None] * gradient + noise[..., None] * normal
        clock = state.clock + 1
        loss, gradient, outside = loss_and_gradient(position)
        looked = clock % conditions.stride == 0
        escaped = looked[:, None] & state.alive & (outside | ~jnp.isfinite(loss))
        if not revived:
            return (_State(position, state.alive & ~escaped, clock), loss, gradient), escaped
        state = _State(position, state.alive, clock)

        def revive(state: _State) -> tuple[Array, Array, Array]:
            position = _revive(state, escaped, (uniform + GOLDEN * clock[:, None]) % 1)
            return position, *loss_and_gradient(position)[:2]

        position, loss, gradient = jax.lax.cond(
            jnp.any(escaped), revive, lambda state: (state.position, loss, gradient), state
        )
        return (state._replace(position=position), loss, gradient), escaped

    start = (state, *loss_and_gradient(state.position)[:2])
    (state, _, _), escaped = jax.lax.scan(one, start, jnp.moveaxis(normal, 1, 0))
    return state, escaped


def simulate_sde(world: World, design: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Measure escapes in a world under the conditions of a design.

    Args:
        world: landscape and noise.
        design: one row for each condition, see :func:`escape_inference.worlds.make_design`. Columns ``minimum``,
            ``learning_rate`` [time], ``batch_size``, ``loss_minimum`` and ``loss_barrier`` [loss], ``hessian_minimum``
            [1/time], ``hessian_saddle`` [1/time] (saddle only), ``runs``, ``max_steps`` [iterations], and optionally
            ``start`` (``minimum`` or ``quasi_stationary``) and ``check_interval`` [iterations], at most ``max_steps``.
        seed: the same seed gives the same table.

    Returns:
        A table of measurements: one row for each run from the minimum, escaped or censored at ``max_steps``; or, in the
        quasi-stationary state, one row for each gap between the escapes of a replica slot after a burn-in of 10 / h*,
        the last one censored, when ``runs`` replicas are followed for ``max_steps`` each and one that escapes becomes a
        copy of a random survivor. ``effective_dimension`` is the world's.

    Raises:
        InputError: the design lacks a column or has impossible values.

    >>> design = pd.DataFrame({"minimum": ["a"], "learning_rate": [0.1], "batch_size": [1], "loss_minimum": [0.02],
    ...     "loss_barrier": [0.028], "hessian_minimum": [1.0], "runs": [40], "max_steps": [4000]})
    >>> table = simulate_sde(World(barrier="threshold", dimension=1), design, seed=1)
    >>> len(table), int(table.escaped.sum()), 150 < float(table.steps.mean()) < 500  # 186 if always looked at
    (40, 40, True)
    """
    design = _complete(world, design)
    found = []
    for number, start in enumerate(("minimum", "quasi_stationary")):
        rows = np.flatnonzero(design["start"] == start)
        runs = design["runs"].to_numpy()[rows]
        if start == "minimum":  # runs are independent: each is stepped as if it were a condition of its own
            rows, slots = np.repeat(rows, runs), np.concatenate([np.arange(n) for n in [*runs, 0]])
            events = _escapes(world, design.iloc[rows].assign(runs=1), seed, number)
            events[:, 1] = slots[events[:, 0]]
        else:
            events = _escapes(world, design.iloc[rows], seed, number)
        found.append(np.column_stack([rows[events[:, 0]], events[:, 1:]]))
    return _table(world, design, pd.DataFrame(np.concatenate(found), columns=["condition", "slot", "iteration"]))


def _escapes(world: World, design: pd.DataFrame, seed: int, kind: int) -> Int[np.ndarray, "escape 3"]:
    """Every escape seen: row of the design, slot, and iteration since the start of the clock (burn-in: not positive).

    Each row of the design has its own stream of random numbers, used in order, whatever else is simulated beside it.
    """
    events = [np.zeros((0, 3), int)]
    if design.empty:
        return events[0]
    runs = int(design["runs"].max())
    revived = design["start"].iloc[0] == "quasi_stationary"
    conditions, substeps, state = _prepare(world, design, runs)
    end = _budget(design) * substeps
    members = np.arange(len(design))
    streams = [np.random.Generator(np.random.SFC64([seed, kind, int(row)])) for row in members]
    while True:
        clock = np.asarray(state.clock)
        live = np.asarray(state.alive).any(axis=1) & (clock < end[members])
        if not live.any():
            return np.concatenate(events)
        size = len(members) // SHRINK
        if live.sum() <= size and len(members) * runs > SMALL:  # worth another compilation
            kept = np.argsort(~live, kind="stable")[:size]
            conditions, state = jax.tree.map(lambda values, kept=kept: values[kept], (conditions, state))
            members, clock = members[kept], clock[kept]
        length = int(np.clip(CHUNK_NUMBERS // (len(members) * runs * world.dimension), 64, 1024))
        shape = (length, runs, world.dimension)
        normal = np.stack([streams[row].standard_normal(shape, np.float32) for row in members])
        uniform = np.stack([streams[row].random(runs, np.float32) for row in members])
        state, escaped = _advance(world.barrier, revived, conditions, state, normal, uniform)
        step, member, slot = np.nonzero(np.asarray(escaped))
        iteration = (clock[member] + step + 1) // substeps[members[member]]
        events.append(np.stack([members[member], slot, iteration], axis=1))


def _budget(design: pd.DataFrame) -> Int[np.ndarray, " condition"]:
    """Iterations for which each run is followed: ``max_steps``, down to the last look."""
    interval = design["check_interval"].to_numpy()
    return design["max_steps"].to_numpy() // interval * interval


def simulate_slide(design: pd.DataFrame, *, coefficient_of_variation: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Times that are not escape: a particle that slides down with constant drift passes a point below.

    The passage time of dx = v dt + sqrt(2 D) dW over a distance a is inverse Gaussian with the mean a / v and the
    coefficient of variation sqrt(2 D / (v a)), where a metastable escape has 1. The mean is a third of ``max_steps``.

    Args:
        design: as for :func:`simulate_sde`; the landscape is not used beyond being copied into the table.
        coefficient_of_variation: of the passage time.
        seed: the same seed gives the same table.

    >>> from escape_inference.worlds import make_design
    >>> steps = simulate_slide(make_design(World(), minima=1, learning_rates=1, runs=400)).steps
    >>> 0.09 < float(steps.std() / steps.mean()) < 0.11
    True
    """
    barrier = "saddle" if "hessian_saddle" in design.columns else "threshold"
    world = World(barrier=barrier)
    design = _complete(world, design.assign(start="minimum", check_interval=1))
    rng = np.random.default_rng(seed)
    mean = design["max_steps"].to_numpy() / 3
    times = [rng.wald(m, m / coefficient_of_variation**2, n) for m, n in zip(mean, design["runs"], strict=True)]
    found = pd.DataFrame(
        {
            "condition": np.repeat(np.arange(len(design)), design["runs"]),
            "slot": np.concatenate([np.arange(n) for n in design["runs"]]),
            "iteration": np.ceil(np.concatenate(times)).astype(int),
        }
    )
    return _table(world, design, found)


def _complete(world: World, design: pd.DataFrame) -> pd.DataFrame:
    """The design with its defaults, or an error that names what is wrong."""
    needed = ["minimum", "learning_rate", "batch_size", "loss_minimum", "loss_barrier", "hessian_minimum"]
    needed += ["runs", "max_steps"] + (["hessian_saddle"] if world.barrier == "saddle" else [])
    missing = [name for name in needed if name not in design.columns]
    if missing or design.empty:
        raise InputError(f"the design has no rows or lacks the columns {missing}")
    design = design.reset_index(drop=True).assign(
        start=design["start"].to_numpy() if "start" in design else "minimum",
        check_interval=design["check_interval"].to_numpy() if "check_interval" in design else 1,
    )
    numbers = design[[name for name in needed if name != "minimum"] + ["check_interval"]]
    wrong = ~((numbers > 0) & np.isfinite(numbers)).all(axis=1) | (design["loss_barrier"] <= design["loss_minimum"])
    wrong |= ~design["start"].isin(["minimum", "quasi_stationary"]) | (design["check_interval"] > design["max_steps"])
    if wrong.any():
        raise InputError(
            f"rows {list(design.index[wrong][:5])} of the design break a rule: numbers positive and finite, "
            "loss_barrier > loss_minimum, start 'minimum' or 'quasi_stationary', check_interval <= max_steps"
        )
    return design


def _prepare(world: World, design: pd.DataFrame, runs: int) -> tuple[_Conditions, np.ndarray, _State]:
    """Dimensionless conditions, small steps in one iteration of each, and the state with all runs at the minimum."""
    relaxation = (design["learning_rate"] * design["hessian_minimum"]).to_numpy()
    substeps = np.ones(len(design), int)
    if world.time_step is not None:
        substeps = np.maximum(1, np.ceil(relaxation / world.time_step * (1 - 1e-9)).astype(int))
    if (design["max_steps"].to_numpy() * substeps).max() >= 2**30:
        raise InputError("more than 2**30 steps of integration: lower max_steps, or raise time_step")
    quasi_stationary = (design["start"] == "quasi_stationary").to_numpy()
    burn_in = np.where(quasi_stationary, np.ceil(RELAXATIONS / relaxation), 0).astype(int)
    burn_in = -(-burn_in // design["check_interval"].to_numpy()) * design["check_interval"].to_numpy()
    saddle = world.barrier == "saddle"

    def single(values: Any) -> Array:
        return jnp.asarray(np.asarray(values), jnp.float32)

    conditions = _Conditions(
        temperature=single(temperature(world, design)),
        noise_exponent=single(np.full(len(design), world.noise_exponent)),
        time_step=single(relaxation / substeps),
        barrier_ratio=single(design["loss_barrier"] / design["loss_minimum"]),
        hessian_ratio=single(design["hessian_saddle"] / design["hessian_minimum"] if saddle else np.ones(len(design))),
        stride=jnp.asarray(design["check_interval"].to_numpy() * substeps, jnp.int32),
    )
    state = _State(
        position=jnp.zeros((len(design), runs, world.dimension), jnp.float32),
        alive=jnp.asarray(np.arange(runs) < design["runs"].to_numpy()[:, None]),
        clock=jnp.asarray(-burn_in * substeps, jnp.int32),
    )
    return conditions, substeps, state


def _table(world: World, design: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Rows of measurements from the escapes (condition, slot, iteration counted from the start of the clock)."""
    budget = _budget(design)
    condition = np.repeat(np.arange(len(design)), design["runs"])
    slots = pd.DataFrame({"condition": condition, "run": np.arange(len(condition))})
    slots["slot"] = slots.groupby("condition").cumcount()
    events = events[(events["iteration"] > 0) & (events["iteration"] <= budget[events["condition"]])]
    escapes = slots.merge(events, on=["condition", "slot"]).assign(escaped=True)
    open_ended = (design["start"] == "quasi_stationary").to_numpy()[slots["condition"]]
    open_ended |= ~slots["run"].isin(escapes["run"]).to_numpy()
    ends = slots[open_ended].assign(iteration=lambda rows: budget[rows["condition"]], escaped=False)
    rows = pd.concat([escapes, ends]).sort_values(["run", "iteration", "escaped"], ascending=[True, True, False])
    rows["steps"] = rows["iteration"] - rows.groupby("run")["iteration"].shift(fill_value=0)
    rows = rows[rows["steps"] > 0]
    about = ["minimum", "learning_rate", "batch_size", "start", "check_interval", "loss_minimum", "loss_barrier"]
    about += ["hessian_minimum"] + (["hessian_saddle"] if world.barrier == "saddle" else [])
    table = design.loc[rows["condition"], about].reset_index(drop=True)
    table.insert(1, "run", rows["run"].to_numpy())
    table.insert(4, "steps", rows["steps"].to_numpy())
    table.insert(5, "escaped", rows["escaped"].to_numpy(bool))
    return table.assign(barrier=world.barrier, effective_dimension=float(world.dimension))
