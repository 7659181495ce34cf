"""Replicas one by one, for networks: each runs alone (its weights stay in cache) and they meet only at escapes.

A round advances every replica by the same number of iterations on a pool of threads. In the Fleming-Viot process a
replica that escapes at iteration k is replaced by a copy of a survivor *at iteration k*; that state is found again by
repeating the survivor's own iterations from the start of its last piece, which random numbers fixed by (seed, slot,
iteration) make exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from escape_inference.trainers.blocks import Blocks, make_blocks
from escape_inference.trainers.looks import MEMORY_OF_GATE, RECORD, LossesOf, Tally, World, no_records, watch
from escape_inference.trainers.rounds import DONORS, Extinct, Round
from escape_inference.trainers.sgd import Recipe, slot_key

SHORTEST, LONGEST = 16, 128
"""Iterations of one round."""


@lru_cache(maxsize=32)
def compiled_piece(recipe: Recipe) -> Callable:
    """``(state, slot, step, end, watch, key, world) -> (state, step, escaped, tally, records)``, compiled."""

    def piece(
        state: PyTree, slot: Array, step: Array, end: Array, watched: Array, key: PRNGKeyArray, world: World
    ) -> tuple[PyTree, Array, Array, Tally, Array]:
        samples = world.inputs.shape[0]
        stream = slot_key(key, slot)

        def body(carry: tuple) -> tuple:
            state, step, _, order, tally, records = carry
            step = step + 1
            order = recipe.renew(order, stream, step, samples)
            indices, uniform = recipe.draw(stream, step, order, samples)
            inner, gate = state
            inner, batch_loss = recipe.step(
                inner, world.learning_rate, world.inputs, world.targets, indices, stream, step
            )
            gate = MEMORY_OF_GATE * gate + (1 - MEMORY_OF_GATE) * batch_loss.astype(jnp.float32)

            losses = LossesOf(recipe, inner[0], world)
            escaped, tally, records = watch(watched, losses, gate, uniform, step, slot, tally, records, world)
            return (inner, gate), step, escaped, order, tally, records

        order = recipe.order(stream, step + 1, samples)
        carry = (state, step, jnp.array(False), order, Tally.zero(), no_records())
        state, step, escaped, _, tally, records = jax.lax.while_loop(lambda c: (c[1] < end) & ~c[2], body, carry)
        return state, step, escaped, tally, records

    return jax.jit(piece)


@dataclass
class _Piece:
    """A replica's iterations from ``start`` (exclusive) until ``end`` (inclusive), where it may have escaped."""

    origin: PyTree
    start: int
    state: PyTree
    end: int
    escaped: bool
    tally: Tally
    records: np.ndarray


class Replicas:
    """The states of all replica slots, advanced round by round; see the module's docstring.

    A state is the parameters and the optimiser's, and the running mean of the batch losses.
    """

    gated = True

    def __init__(
        self,
        recipe: Recipe,
        params: PyTree,
        replicas: int,
        key: PRNGKeyArray,
        learning_rate: float,
        *,
        replace: bool,
        replica_batch: int | None = None,
        threads: int = 1,
    ) -> None:
        self.recipe, self.key, self.replace, self.step, self.replicas = recipe, key, replace, 0, replicas
        self.states: list[PyTree] = [(recipe.start(params, learning_rate), jnp.zeros((), jnp.float32))] * replicas
        self.alive = [True] * replicas
        self.replica_batch = replica_batch or replicas
        self.threads = threads
        self._piece = compiled_piece(recipe)
        self._inputs: Array | None = None
        self._blocks: Blocks | None = None

    def running(self) -> bool:
        return any(self.alive)

    def state_of(self, slot: int) -> PyTree:
        return self.states[slot][0]

    def round_length(self, escapes: int, replica_steps: int) -> int:
        """So long that about a quarter of the replicas escape in a round: longer ones repeat much for the copies."""
        if not self.replace:
            return LONGEST
        return min(max(replica_steps // (4 * (escapes + 1)), SHORTEST), LONGEST)

    def _in_blocks(self, world: World) -> World:
        """The world with what pieces in blocks need, where they serve."""
        if self._inputs is not world.inputs:
            self._inputs = world.inputs
            self._blocks = make_blocks(self.recipe, self.states[0][0][0], world.inputs)
        return world if self._blocks is None else self._blocks.world(world)

    def _run(self, world: World, state: PyTree, slot: int, start: int, end: int, watch: bool = True) -> _Piece:
        arguments = (np.uint32(slot), np.int32(start), np.int32(end), np.bool_(watch), self.key, world)
        piece = self._piece if world.compact is None or self._blocks is None else self._blocks.piece
        new, *others = piece(state, *arguments)
        step, escaped, tally, records = jax.tree.map(np.asarray, others)
        return _Piece(state, start, new, int(step), bool(escaped), tally, records[np.isfinite(records[:, 0])][::-1])

    def _parallel(self, pool: ThreadPoolExecutor, work: Callable[..., Any], jobs: Iterable[tuple]) -> list[Any]:
        double = bool(jax.config.read("jax_enable_x64"))  # a setting of the calling thread alone

        def in_thread(job: tuple) -> Any:
            with jax.enable_x64(double):
                return work(*job)

        waiting = list(jobs)
        results: list[Any] = []
        for first in range(0, len(waiting), self.replica_batch):
            results.extend(pool.map(in_thread, waiting[first : first + self.replica_batch]))
        return results

    def advance(self, end: int, world: World) -> Round:
        """Advance every living replica to iteration ``end``.

        Raises:
            Extinct: every replica escaped at the same iteration, so that nothing is left to copy.
        """
        slots = [slot for slot, alive in enumerate(self.alive) if alive]
        world = self._in_blocks(world)
        pool = ThreadPoolExecutor(self.threads)
        try:
            jobs = [(world, self.states[slot], slot, self.step, end) for slot in slots]
            pieces: list[list[_Piece]] = [[] for _ in self.alive]
            for slot, piece in zip(slots, self._parallel(pool, self._run, jobs), strict=True):
                pieces[slot].append(piece)
            while self.replace and (ready := self._replacements(pieces)):
                renewed = self._parallel(pool, self._renew, [(world, pieces, *event, end) for event in ready])
                for (slot, _, _), piece in zip(ready, renewed, strict=True):
                    pieces[slot].append(piece)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for slot in slots:
            last = pieces[slot][-1]
            self.states[slot] = last.state
            self.alive[slot] = self.replace or not last.escaped
        self.step = end
        return self._round(pieces)

    def _replacements(self, pieces: list[list[_Piece]]) -> list[tuple[int, int, int]]:
        """Escapes (slot, donor, iteration) whose donor is already certain; the earliest one always is."""
        waiting = sorted((own[-1].end, slot) for slot, own in enumerate(pieces) if own[-1].escaped)
        ready = []
        for step, slot in waiting:
            scores = donor_scores(self.key, slot, step, len(pieces))
            status = [_status(own, step) for own in pieces]
            if not any(status_ != "escaped" for status_ in status):
                raise Extinct(step)
            donor = max((j for j, status_ in enumerate(status) if status_ != "escaped"), key=lambda j: scores[j])
            if status[donor] == "survived":
                ready.append((slot, donor, step))
        return ready

    def _renew(self, world: World, pieces: list[list[_Piece]], slot: int, donor: int, step: int, end: int) -> _Piece:
        source = next(piece for piece in pieces[donor] if piece.start < step <= piece.end)
        if step == source.end:
            state = source.state
        else:
            state = self._run(world, source.origin, donor, source.start, step, watch=False).state
        if step < end:
            return self._run(world, state, slot, step, end)
        return _Piece(state, end, state, end, False, jax.tree.map(np.asarray, Tally.zero()), np.empty((0, RECORD)))

    def _round(self, pieces: list[list[_Piece]]) -> Round:
        tallies = [Tally.merge([piece.tally for piece in own]) for own in pieces]
        left = sorted(
            ((p.end, slot, p) for slot, own in enumerate(pieces) for p in own if p.escaped), key=lambda e: e[:2]
        )
        return Round(
            escapes=[(end, slot) for end, slot, _ in left],
            left=tuple(piece.state[0] for _, _, piece in left),
            tally=jax.tree.map(lambda *xs: np.asarray(xs), *tallies),
            records=np.concatenate([p.records for own in pieces for p in own] or [np.empty((0, RECORD))]),
        )


def _status(own: list[_Piece], step: int) -> str:
    """What a slot was doing at that iteration: survived it, escaped at it, or not known yet."""
    for piece in own:
        if piece.escaped and piece.end == step:
            return "escaped"
        if piece.start < step <= piece.end:
            return "survived"
    return "unknown"


@lru_cache(maxsize=1)
def _scores() -> Callable:
    def scores(key: PRNGKeyArray, slot: Array, step: Array, replicas: int) -> Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(slot_key(key, slot), DONORS), step), (replicas,)
        )

    return jax.jit(scores, static_argnums=3)


def donor_scores(key: PRNGKeyArray, slot: int, step: int, replicas: int) -> np.ndarray:
    """The survivor with the largest of these numbers replaces ``slot`` at iteration ``step``."""
    return np.asarray(_scores()(key, jnp.uint32(slot), jnp.int32(step), replicas))
