"""A burn-in, then the measured iterations, round by round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.burn_in import BurnIn
from escape_inference.trainers.engines import Engine
from escape_inference.trainers.looks import World
from escape_inference.trainers.minimum import compiled_loss, compiled_training
from escape_inference.trainers.rounds import Extinct, Round
from escape_inference.trainers.screens import Screens
from escape_inference.trainers.sgd import Recipe

AFTERWARDS = 0x61667465
"""Stream of the random numbers of a run after its escape."""
BURN_IN_ROUNDS = 16
"""Least number of rounds in the longest burn-in, for its tests to have something to compare."""

Progress = Callable[[int, int, str], None]


class UnstableMinimum(InputError):
    """No replica survived: at this learning rate the minimum does not hold SGD, so it has no escape rate."""


def afterwards(recipe: Recipe, state: PyTree, world: World, stream: PRNGKeyArray, steps: int) -> str:
    """Where the loss of a run that escaped is some iterations later: ``returned`` below the barrier, ``stayed`` or ``diverged``."""
    numbers = jnp.int32(0), jnp.int32(steps), stream, world.learning_rate
    state = compiled_training(recipe)(state, *numbers, world.inputs, world.targets)
    loss = float(compiled_loss(recipe)(state[0], world.inputs, world.targets))
    if not math.isfinite(loss):
        return "diverged"
    return "stayed" if loss > float(world.barrier) else "returned"


class Process:
    """Advances the replicas round by round and keeps what they hand back."""

    def __init__(
        self,
        engine: Engine,
        world: World,
        screens: Screens | None,
        progress: Progress | None,
        steps: int,
        loss_minimum: float,
    ) -> None:
        self.loss_minimum = loss_minimum
        self.engine, self.world, self.screens, self.progress, self.steps = engine, world, screens, progress, steps
        self.rounds: list[Round] = []
        self.follow: Callable[[PyTree, int], str] | None = None
        """What becomes of a run that escaped, from its state at the crossing and the number of the escape."""
        self.escaped, self.replica_steps = 0, 0
        self.burnt = 0

    def _advance(self, end: int) -> Round:
        world, barrier = self.world, float(self.world.barrier)
        if self.screens is not None:
            world = self.screens.put_into(world, self.loss_minimum)
        before = self.engine.step
        try:
            done = self.engine.advance(end, world)
        except Extinct as extinct:
            raise UnstableMinimum(
                f"at learning rate {float(world.learning_rate):g} every replica exceeded the loss {barrier:g} by "
                f"iteration {extinct.step}: the minimum is unstable there and has no escape rate. Lower the learning "
                "rate, raise the barrier, or use more replicas."
            ) from None
        if self.screens is not None:
            self.screens.fit(done, barrier, self.loss_minimum)
        self.escaped += len(done.escapes)
        self.replica_steps += (end - before) * self.engine.replicas
        return done

    def _length(self, longest: int | None = None) -> int:
        """Iterations of the next round: a multiple of the interval of looks, or a piece of one interval."""
        length = self.engine.round_length(self.escaped, self.replica_steps)
        length = length if longest is None else min(length, longest)
        interval = int(self.world.check_interval)
        return length - length % interval if interval <= length else min(length, interval - self.engine.step % interval)

    def burn_in(self, limits: tuple[int, int], check_interval: int) -> tuple[int, dict[str, float], bool]:
        """Advance until the replicas have settled; iterations used, the tests, and whether they passed."""
        least, most = (-(-limit // check_interval) * check_interval for limit in limits)
        record = BurnIn()
        while self.engine.step < most and not (
            self.engine.step >= least and self.engine.step % check_interval == 0 and record.settled()
        ):
            end = min(self.engine.step + self._length(longest=max(most // BURN_IN_ROUNDS, 1)), most)
            record.add(end, self._advance(end))
            if self.progress:
                self.progress(0, self.steps, f"burn-in, iteration {end} of at most {most}")
        self.burnt = self.engine.step
        return self.burnt, record.test(), record.settled()

    def _followed(self, done: Round) -> tuple[str, ...] | None:
        if self.follow is None:
            return None
        before = sum(len(earlier.escapes) for earlier in self.rounds)
        return tuple(
            "unknown" if state is None else self.follow(state, before + place) for place, state in enumerate(done.left)
        )

    def measure(self, end: int) -> None:
        """Advance to iteration ``end``, keeping every round."""
        while self.engine.step < end and self.engine.running():
            done = self._advance(min(self.engine.step + self._length(), end))
            self.rounds.append(replace(done, left=(), afterwards=self._followed(done)))
            if self.progress:
                escapes = sum(len(done.escapes) for done in self.rounds)
                self.progress(self.engine.step - self.burnt, self.steps, f"{escapes} escapes")
        if self.progress:
            self.progress(end - self.burnt, self.steps, f"{sum(len(done.escapes) for done in self.rounds)} escapes")
