"""Replicas as lanes of one vectorised program, for small models.

All lanes take the same iteration at the same time, so that a replica that escapes is replaced inside the loop. The
random numbers and the choice of the donor are those of ``replicas.py``: both give the same escapes, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import subjaxprs
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from escape_inference.trainers.looks import (
    RECORD,
    LossesOf,
    Seen,
    Tally,
    World,
    asks,
    crossed,
    scheduled,
    second_look,
)
from escape_inference.trainers.rounds import DONORS, SHORTEST, Extinct, Round
from escape_inference.trainers.sgd import Recipe, slot_key

CAPACITY = 4096
"""Full looks of one round that are kept."""
LEFT = 512
"""Escapes of one round whose states are kept, where they are to be followed."""
LONGEST = 256
"""Iterations of one round."""
MEMORY = 2**30
"""Bytes that the full losses of lanes may take together."""


@lru_cache(maxsize=32)
def compiled_round(recipe: Recipe, replace: bool, together: int | None, keep_left: bool) -> Callable:
    """``(states, alive, step, end, key, world) -> (states, alive, step, extinct, history, tally, records, left)``.

    ``together`` lanes at a time compute the full loss (None: all). ``left`` holds the states of the first escapes at their
    crossing, in order, if ``keep_left``.
    """

    def look_at_lanes(
        states: PyTree,
        alive: Bool[Array, " r"],
        uniform: Float[Array, " r"],
        step: Int[Array, ""],
        due: Bool[Array, " r"],
        world: World,
    ) -> tuple[Seen, Bool[Array, " r"]]:
        lanes = len(alive)
        nan = jnp.full((lanes,), jnp.nan, jnp.float32)
        seen = Seen(nan, nan, nan, nan, jnp.ones(lanes, jnp.float32))
        params = states[0]
        if world.screens is None:
            looked = alive & (step % world.check_interval == 0)

            def full() -> Array:
                one = lambda own: LossesOf(recipe, own, world).full()
                return jax.vmap(one)(params) if together is None else jax.lax.map(one, params, batch_size=together)

            loss = jax.lax.cond(jnp.any(looked), full, lambda: nan)
            loss = jnp.where(looked, loss, jnp.nan)
            return seen._replace(first=loss, second=loss, loss=loss), looked
        first = jnp.where(alive, jax.vmap(lambda own: LossesOf(recipe, own, world).screen(0))(params), jnp.nan)
        seen = seen._replace(first=first, probability=asks(first, world.screens[0].limits, 1, due))

        def one_lane(carry: tuple) -> tuple:
            waiting, seen = carry
            lane = jnp.argmax(waiting)
            own, here = jax.tree.map(lambda leaf: leaf[lane], (params, seen))
            here = second_look(LossesOf(recipe, own, world), here, uniform[lane], due[lane], world)
            return waiting.at[lane].set(False), jax.tree.map(lambda all_, one: all_.at[lane].set(one), seen, here)

        waiting = alive & (uniform < seen.probability)
        _, seen = jax.lax.while_loop(lambda carry: jnp.any(carry[0]), one_lane, (waiting, seen))
        return seen, alive & (uniform < seen.probability)

    def replace_lanes(
        states: PyTree, escaped: Bool[Array, " r"], streams: PRNGKeyArray, step: Int[Array, ""]
    ) -> PyTree:
        lanes = len(escaped)

        def one_lane(carry: tuple) -> tuple:
            waiting, donors = carry
            lane = jnp.argmax(waiting)
            stream = jax.random.fold_in(jax.random.fold_in(streams[lane], DONORS), step)
            scores = jnp.where(escaped, -1.0, jax.random.uniform(stream, (lanes,)))
            return waiting.at[lane].set(False), donors.at[lane].set(jnp.argmax(scores).astype(jnp.int32))

        donors = jnp.arange(lanes, dtype=jnp.int32)
        _, donors = jax.lax.while_loop(lambda carry: jnp.any(carry[0]), one_lane, (escaped, donors))
        return jax.tree.map(lambda leaf: leaf[donors], states)

    def round_(
        states: PyTree, alive: Bool[Array, " r"], step: Array, end: Array, key: PRNGKeyArray, world: World
    ) -> tuple:
        samples, lanes = world.inputs.shape[0], len(alive)
        slots = jnp.arange(lanes, dtype=jnp.uint32)
        streams = jax.vmap(lambda slot: slot_key(key, slot))(slots)
        draw = jax.vmap(recipe.draw, (0, None, None if recipe.with_replacement else 0, None))
        advance = jax.vmap(recipe.step, (0, None, None, None, 0, 0, None))
        begin = step

        def keep(
            records: Array, cursor: Array, seen: Seen, kept: Bool[Array, " r"], step: Array
        ) -> tuple[Array, Array]:
            place = jnp.where(kept, cursor + jnp.cumsum(kept) - 1, CAPACITY)
            rows = jnp.stack([jnp.full(lanes, step, jnp.float32), slots.astype(jnp.float32), *seen], axis=1)
            return records.at[place].set(rows, mode="drop"), cursor + jnp.sum(kept, dtype=jnp.int32)

        def put_left(new: PyTree, escaped: Bool[Array, " r"], left: tuple) -> tuple:
            room, count = left
            place = jnp.where(escaped, count + jnp.cumsum(escaped) - 1, LEFT)
            room = jax.tree.map(lambda kept, now: kept.at[place].set(now, mode="drop"), room, new)
            return room, count + jnp.sum(escaped, dtype=jnp.int32)

        def body(carry: tuple) -> tuple:
            states, alive, step, _, order, tally, records, cursor, history, left = carry
            step = step + 1
            order = recipe.renew(order, streams, step, samples)
            indices, uniform = draw(streams, step, order, samples)
            new, _ = advance(states, world.learning_rate, world.inputs, world.targets, indices, streams, step)
            if not replace:
                new = jax.tree.map(
                    lambda now, old: jnp.where(alive.reshape(-1, *([1] * (now.ndim - 1))), now, old), new, states
                )
            due = scheduled(step, slots.astype(step.dtype), world.monitor, world.turns)
            seen, looked = look_at_lanes(new, alive, uniform, step, due, world)
            escaped = crossed(seen, looked, world)
            tally = tally.add(seen, looked, escaped, step, world)
            kept = looked & due if world.screens is None else looked
            records, cursor = jax.lax.cond(
                jnp.any(kept), lambda: keep(records, cursor, seen, kept, step), lambda: (records, cursor)
            )
            history = history.at[step - begin - 1].set(escaped)
            if keep_left:
                left = jax.lax.cond(jnp.any(escaped), put_left, lambda new, escaped, left: left, new, escaped, left)
            extinct = jnp.all(escaped) & replace
            if replace:
                new = jax.lax.cond(jnp.any(escaped), lambda: replace_lanes(new, escaped, streams, step), lambda: new)
            else:
                alive = alive & ~escaped
            return new, alive, step, extinct, order, tally, records, cursor, history, left

        orders = jax.vmap(recipe.order, (0, None, None))
        order = None if recipe.with_replacement else orders(streams, step + 1, samples)
        records = jnp.full((CAPACITY, RECORD), jnp.nan, jnp.float32)
        history = jnp.zeros((LONGEST, lanes), bool)
        kept = states if keep_left else ()
        room = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], (LEFT, *leaf.shape[1:])), kept)
        left = room, jnp.int32(0)
        tally, cursor = Tally.zero((lanes,)), jnp.int32(0)
        carry = (states, alive, step, jnp.array(False), order, tally, records, cursor, history, left)
        carry = jax.lax.while_loop(lambda c: (c[2] < end) & ~c[3] & jnp.any(c[1]), body, carry)
        states, alive, step, extinct, _, tally, records, _, history, left = carry
        return states, alive, step, extinct, history, tally, records, left[0]

    return jax.jit(round_)


@lru_cache(maxsize=64)
def _bytes_of_loss(recipe: Recipe, shapes: tuple, structure: Any) -> int:
    params, inputs, targets = jax.tree.unflatten(structure, shapes)
    return 2 * _largest(jax.make_jaxpr(recipe.mean_loss)(params, inputs, targets).jaxpr)


def _largest(jaxpr: Any) -> int:
    """Bytes of the largest array that a traced program makes."""
    made = [value.aval for line in jaxpr.eqns for value in line.outvars]
    sizes = [value.size * getattr(value.dtype, "itemsize", 4) for value in made if hasattr(value, "dtype")]
    return max([1, *sizes, *(_largest(inner) for inner in subjaxprs(jaxpr))])


def loss_memory(recipe: Recipe, params: PyTree, world: World) -> int:
    """About how many bytes one full loss takes: twice its largest intermediate array."""
    arrays = params, world.inputs, world.targets
    leaves, structure = jax.tree.flatten(arrays)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _bytes_of_loss(recipe, shapes, structure)


class Lanes:
    """The states of all replica slots as one batch; see the module's docstring."""

    gated = False

    def __init__(
        self, recipe: Recipe, params: PyTree, replicas: int, key: PRNGKeyArray, learning_rate: float, *, replace: bool,
        replica_batch: int | None = None, keep_left: bool = False,
    ) -> None:  # fmt: skip
        self.key, self.replicas, self.step = key, replicas, 0
        start = recipe.start(params, learning_rate)
        self.states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (replicas, *jnp.shape(leaf))), start)
        self.alive = jnp.ones(replicas, bool)
        self._recipe, self._replace, self._most = recipe, replace, replica_batch or replicas
        self._keep_left = keep_left

    def running(self) -> bool:
        return bool(jnp.any(self.alive))

    def state_of(self, slot: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[slot], self.states)

    def round_length(self, escapes: int, replica_steps: int) -> int:
        return min(max(self.step, SHORTEST), LONGEST)

    def advance(self, end: int, world: World) -> Round:
        """Advance every living lane to iteration ``end``.

        Raises:
            Extinct: every lane escaped at the same iteration.
        """
        begin = self.step
        together = min(self._most, max(1, MEMORY // loss_memory(self._recipe, self.state_of(0)[0], world)))
        fewer = together if together < self.replicas else None
        round_ = compiled_round(self._recipe, self._replace, fewer, self._keep_left)
        result = round_(self.states, self.alive, jnp.int32(begin), jnp.int32(end), self.key, world)
        self.states, self.alive, step, extinct, history, tally, records, room = result
        if bool(extinct):
            raise Extinct(int(step))
        self.step = end
        records = np.asarray(records)
        escapes = [(begin + 1 + int(row), int(slot)) for row, slot in np.argwhere(np.asarray(history))]
        left = [jax.tree.map(lambda leaf: leaf[place], room) if place < LEFT else None for place in range(len(escapes))]  # noqa: B023
        return Round(
            escapes=escapes,
            left=tuple(left) if self._keep_left else (),
            tally=jax.tree.map(np.asarray, tally),
            records=records[np.isfinite(records[:, 0])],
        )
