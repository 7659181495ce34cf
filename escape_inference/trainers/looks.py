"""Two-stage looks at the loss: cheap screens every iteration, the full-batch loss only near the barrier.

Near a real minimum the loss must be looked at every iteration, and one full-batch loss costs as much as a hundred SGD
iterations. A *screen* is a small fixed subsample, drawn with probability growing with a sample's typical loss and
weighted back (Hansen and Hurwitz 1943), so that its weighted loss estimates the full loss. There are two, a small and a
larger one: when the first comes near the barrier the second is computed, when that comes near too, the full loss.
Before them stands a *gate* that costs nothing: the largest of the last batches' losses, whose gradients are what moves
the weights; where it is low, most iterations need no screen at all. Only the full loss decides an escape. Every
stage also asks the next one at random iterations where it would not; weighted by one over their probability (Horvitz
and Thompson 1952), the crossings found there estimate without bias how many were missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from escape_inference.trainers.first_layer import Staircase
from escape_inference.trainers.losses import sample_losses
from escape_inference.trainers.sgd import Recipe

CLOSE_LOOKS = (1 / 4, 1 / 4, 1 / 8)
"""Probability that the next stage is asked although the gate, the first, the second screen is low, but not by much."""
FAR_LOOKS = (1 / 16, 1 / 64, 1 / 64)
"""The same where it is low."""
SAMPLE_INTERVAL = 16
"""Iterations between two first screens that are computed in any case, for the record of the loss."""
MEMORY_OF_GATE = 0.7
"""What is left of a batch's loss after an iteration when it is compared with the next one's."""
RECORD = 7
"""Numbers kept of a full look: iteration, slot, gate, first and second screen, full loss, probability of the look."""
CAPACITY = 64
"""Full looks of one piece that are kept."""
IN_ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}
"""Option for compiled code that runs in as many threads as there are processors: its own would only be in the way."""


class Limits(NamedTuple):
    """From ``threshold`` a stage always asks the next one, from ``close`` often."""

    threshold: Float[Array, ""]
    close: Float[Array, ""]


class Gate(NamedTuple):
    """The limits of the gate, and the second screen's value from which a loss counts as near the barrier."""

    limits: Limits
    near: Float[Array, ""]


class Screen(NamedTuple):
    """A weighted subsample, and when its loss asks for the next stage."""

    inputs: Float[Array, "m ..."]
    targets: Array
    weights: Float[Array, " m"]
    limits: Limits


class Compact(NamedTuple):
    """What ``blocks.py`` needs: the inputs without the columns that are zero in every sample, and those of the screens.

    ``table`` has the products of every sample's row with those of the first screen.
    """

    rows: Float[Array, "n inputs"]
    stairs: Staircase
    screens: tuple[Float[Array, "first inputs"], Float[Array, "second inputs"]] | None
    table: Float[Array, "n first"] | None


class World(NamedTuple):
    """The numbers and arrays of a measurement; ``monitor`` and ``turns`` are those of ``scheduled``."""

    inputs: Float[Array, "n ..."]
    targets: Array
    learning_rate: Float[Array, ""]
    barrier: Float[Array, ""]
    monitor: Int[Array, ""]
    check_interval: Int[Array, ""]
    gate: Gate | None
    screens: tuple[Screen, Screen] | None
    compact: Compact | None = None
    turns: Int[Array, ""] | int = 1


def scheduled(step: Any, slot: Any, monitor: Any, turns: Any) -> Any:
    """Whether the full loss is looked at in any case: every ``monitor`` iterations, of the replicas whose turn it is.

    >>> [slot for slot in range(6) if scheduled(800, slot, 400, 3)]
    [1, 4]
    """
    return (step % monitor == 0) & ((slot + step // monitor) % turns == 0)


class Seen(NamedTuple):
    """One look: estimates are NaN where they were not computed."""

    gate: Float[Array, ""]
    first: Float[Array, ""]
    second: Float[Array, ""]
    loss: Float[Array, ""]
    probability: Float[Array, ""]


class Losses(Protocol):
    """The losses of one state that a look may ask for."""

    def screen(self, stage: int) -> Float[Array, ""]:
        """The estimate of the full-batch loss by the first (0) or the second (1) screen."""

    def full(self) -> Float[Array, ""]:
        """The full-batch loss."""


@dataclass(frozen=True)
class LossesOf:
    """Losses computed from the parameters."""

    recipe: Recipe
    params: PyTree
    world: World

    def screen(self, stage: int) -> Float[Array, ""]:
        assert self.world.screens is not None
        screen = self.world.screens[stage]
        losses = sample_losses(self.recipe.apply, self.recipe.loss, self.params, screen.inputs, screen.targets)
        return jnp.sum(screen.weights * losses).astype(jnp.float32)

    def full(self) -> Float[Array, ""]:
        return self.recipe.mean_loss(self.params, self.world.inputs, self.world.targets).astype(jnp.float32)


def asks(value: Array, limits: Limits, stage: int, always: Bool[Array, ""]) -> Array:
    """Probability with which this stage (0: gate, 1 and 2: screens) asks the next one; NaN asks."""
    low = jnp.where(value < limits.close, FAR_LOOKS[stage], CLOSE_LOOKS[stage])
    return jnp.where(always | ~(value < limits.threshold), 1.0, low)


def renew_gate(gate: Float[Array, ""], batch_loss: Array) -> Float[Array, ""]:
    """The gate after one more batch."""
    return jnp.maximum(MEMORY_OF_GATE * gate, batch_loss.astype(jnp.float32))


def gate_asks(gate: Float[Array, ""], step: Int[Array, ""], due: Bool[Array, ""], world: World) -> Float[Array, ""]:
    """Probability with which the first screen is computed."""
    if world.gate is None:
        return jnp.ones((), jnp.float32)
    return asks(gate, world.gate.limits, 0, due | (step % SAMPLE_INTERVAL == 0))


def second_look(losses: Losses, seen: Seen, uniform: Float[Array, ""], due: Bool[Array, ""], world: World) -> Seen:
    """The second screen, and the full loss where that asks for it.

    ``seen.probability`` is the one with which the stages before asked; ``uniform`` is below it. ``due``: all are asked.
    """
    assert world.screens is not None
    second = losses.screen(1)
    probability = seen.probability * asks(second, world.screens[1].limits, 2, due)
    loss = jax.lax.cond(uniform < probability, losses.full, lambda: seen.loss)
    return seen._replace(second=second, loss=loss, probability=probability)


def first_look(losses: Losses, seen: Seen, uniform: Float[Array, ""], due: Bool[Array, ""], world: World) -> Seen:
    """The first screen, and the second where that asks for it."""
    assert world.screens is not None
    first = losses.screen(0)
    probability = seen.probability * asks(first, world.screens[0].limits, 1, due)
    seen = seen._replace(first=first, probability=probability)
    return jax.lax.cond(uniform < probability, lambda: second_look(losses, seen, uniform, due, world), lambda: seen)


def look(
    losses: Losses,
    gate: Float[Array, ""],
    uniform: Float[Array, ""],
    step: Int[Array, ""],
    due: Bool[Array, ""],
    world: World,
) -> tuple[Seen, Bool[Array, ""]]:
    """What was seen of one replica at this iteration, and whether the full loss was computed."""
    nan = jnp.full((), jnp.nan, jnp.float32)
    seen = Seen(gate, nan, nan, nan, jnp.ones((), jnp.float32))
    if world.screens is None:
        looked = step % world.check_interval == 0
        loss = jax.lax.cond(looked, losses.full, lambda: nan)
        return seen._replace(first=loss, second=loss, loss=loss), looked
    seen = seen._replace(probability=gate_asks(gate, step, due, world))
    seen = jax.lax.cond(uniform < seen.probability, lambda: first_look(losses, seen, uniform, due, world), lambda: seen)
    return seen, uniform < seen.probability


class Tally(NamedTuple):
    """Running sums over iterations, for one replica slot (or, batched, for all)."""

    looks: Int[Array, ""]
    """Full losses computed."""
    found: Int[Array, ""]
    """Crossings found."""
    missed: Float[Array, ""]
    """Horvitz-Thompson estimate of the crossings missed."""
    missed_square: Float[Array, ""]
    """Its variance."""
    estimates: Int[Array, ""]
    """Iterations at which the log loss was estimated."""
    log_loss: Float[Array, ""]
    """Sum of the log of the first screen (of the loss, where looks are exact)."""
    log_loss_square: Float[Array, ""]
    near: Int[Array, ""]
    """Iterations at which the second screen was near the barrier."""
    lowest_gate: Float[Array, ""]
    """The lowest gate among those."""

    @classmethod
    def zero(cls, shape: tuple[int, ...] = ()) -> Tally:
        integer, real = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        return cls(integer, integer, real, real, integer, real, real, integer, jnp.full(shape, jnp.inf, jnp.float32))

    @classmethod
    def merge(cls, tallies: Sequence[Tally]) -> Tally:
        """One tally (of NumPy numbers) for several pieces."""
        merged = jax.tree.map(lambda *values: np.sum(values, axis=0), cls.zero(), *tallies)
        return merged._replace(lowest_gate=np.min([tally.lowest_gate for tally in tallies], initial=np.inf))

    def add(
        self,
        seen: Seen,
        looked: Bool[Array, "*r"],
        escaped: Bool[Array, "*r"],
        step: Int[Array, ""],
        world: World,
    ) -> Tally:
        """Add one iteration; logs are of the loss in units of the barrier, so that single precision suffices."""
        missed = jnp.where(escaped, 1.0 / seen.probability - 1.0, 0.0)
        log_loss = jnp.log(seen.first / world.barrier)
        usable = jnp.isfinite(log_loss)
        near = jnp.zeros_like(usable)
        if world.gate is not None:
            near = seen.second > world.gate.near
            usable = usable & (step % SAMPLE_INTERVAL == 0)
        log_loss = jnp.where(usable, log_loss, 0.0)
        return Tally(
            self.looks + looked.astype(jnp.int32),
            self.found + escaped.astype(jnp.int32),
            self.missed + missed,
            self.missed_square + missed / seen.probability,
            self.estimates + usable.astype(jnp.int32),
            self.log_loss + log_loss,
            self.log_loss_square + log_loss**2,
            self.near + near.astype(jnp.int32),
            jnp.minimum(self.lowest_gate, jnp.where(near, seen.gate, jnp.inf)),
        )


def crossed(seen: Seen, looked: Bool[Array, "*r"], world: World) -> Bool[Array, "*r"]:
    """Above the barrier, or not a number: a run that diverged has escaped."""
    return looked & ~(seen.loss <= world.barrier)


def watch(
    watched: Bool[Array, ""],
    losses: Losses,
    gate: Float[Array, ""],
    uniform: Float[Array, ""],
    step: Int[Array, ""],
    slot: Array,
    tally: Tally,
    records: Float[Array, "kept record"],
    world: World,
) -> tuple[Bool[Array, ""], Tally, Float[Array, "kept record"]]:
    """Whether a watched replica escaped at this iteration, and the sums and full looks with this one.

    Where nothing is asked, neither changes.
    """
    due = scheduled(step, slot.astype(step.dtype), world.monitor, world.turns)
    exact = step % world.check_interval == 0
    asked = exact if world.screens is None else uniform < gate_asks(gate, step, due, world)

    def asking(tally: Tally, records: Array) -> tuple[Array, Tally, Array]:
        seen, looked = look(losses, gate, uniform, step, due, world)
        escaped = crossed(seen, looked, world)
        row = jnp.stack([step, slot, *seen])
        keep = looked & due if world.screens is None else looked
        records = jax.lax.cond(keep, lambda: jnp.roll(records, 1, axis=0).at[0].set(row), lambda: records)
        return escaped, tally.add(seen, looked, escaped, step, world), records

    quiet = lambda tally, records: (jnp.array(False), tally, records)
    return jax.lax.cond(watched & asked, asking, quiet, tally, records)


def no_records() -> Float[Array, "kept record"]:
    """Room for the full looks of one piece."""
    return jnp.full((CAPACITY, RECORD), jnp.nan, jnp.float32)
