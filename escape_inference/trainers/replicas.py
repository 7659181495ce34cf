"""Replicas one by one, for networks: each runs alone (its weights stay in cache) and they meet only at escapes.

A round advances every replica by the same number of iterations on a pool of threads. In the Fleming-Viot process a
replica that escapes at iteration k is replaced by a copy of a survivor *at iteration k*; that state is found again by
repeating the survivor's own iterations from the start of its last piece, which random numbers fixed by (seed, slot,
iteration) make exact.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from escape_inference.trainers.blocks import Blocks, make_blocks
from escape_inference.trainers.looks import IN_ONE_THREAD, RECORD, LossesOf, Tally, World, no_records, renew_gate, watch
from escape_inference.trainers.rounds import DONORS, SHORTEST, Extinct, Round
from escape_inference.trainers.sgd import Recipe, slot_key

LONGEST = 128
"""Iterations of one round at most."""


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
            gate = renew_gate(gate, batch_loss)

            losses = LossesOf(recipe, inner[0], world)
            escaped, tally, records = watch(watched, losses, gate, uniform, step, slot, tally, records, world)
            return (inner, gate), step, escaped, order, tally, records

        order = recipe.order(stream, step + 1, samples)
        carry = (state, step, jnp.array(False), order, Tally.zero(), no_records())
        state, step, escaped, _, tally, records = jax.lax.while_loop(lambda c: (c[1] < end) & ~c[2], body, carry)
        return state, step, escaped, tally, records

    return jax.jit(piece, compiler_options=IN_ONE_THREAD)


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

    A state is the parameters and the optimiser's, and the gate of ``looks.py``.
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
            return min(max(self.step, SHORTEST), LONGEST)
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

    def advance(self, end: int, world: World) -> Round:
        """Advance every living replica to iteration ``end``.

        Raises:
            Extinct: every replica escaped at the same iteration, so that nothing is left to copy.
        """
        slots = [slot for slot, alive in enumerate(self.alive) if alive]
        world = self._in_blocks(world)
        double = bool(jax.config.read("jax_enable_x64"))  # a setting of the calling thread alone

        def in_thread(work: Callable[..., _Piece], *job: Any) -> _Piece:
            with jax.enable_x64(double):
                return work(world, *job)

        pieces: list[list[_Piece]] = [[] for _ in self.alive]
        # escapes (iteration, slot) that await the next piece of a slot, by that slot
        undecided: dict[int, list[tuple[int, int]]] = {}
        pool = ThreadPoolExecutor(min(self.threads, self.replica_batch))
        try:
            running = {
                pool.submit(in_thread, self._run, self.states[slot], slot, self.step, end): slot for slot in slots
            }
            while running:
                escapes = []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    slot, piece = running.pop(future), future.result()
                    pieces[slot].append(piece)
                    escapes += undecided.pop(slot, []) + [(piece.end, slot)] * piece.escaped
                for step, slot in escapes if self.replace else []:
                    donor = self._donor(pieces, slot, step)
                    source = next((piece for piece in pieces[donor] if piece.start < step <= piece.end), None)
                    if source is None:
                        undecided.setdefault(donor, []).append((step, slot))
                    else:
                        running[pool.submit(in_thread, self._renew, source, slot, donor, step, end)] = slot
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for slot in slots:
            last = pieces[slot][-1]
            self.states[slot] = last.state
            self.alive[slot] = self.replace or not last.escaped
        self.step = end
        return self._round(pieces)

    def _donor(self, pieces: list[list[_Piece]], slot: int, step: int) -> int:
        """The one with the highest score of those that, as far as is known, did not escape at this iteration too.

        Where it is not known yet whether it did, the choice is final only if it did not; for the earliest escape of all
        it always becomes known.
        """
        scores = donor_scores(self.key, slot, step, len(pieces))
        candidates = [j for j, own in enumerate(pieces) if not any(p.escaped and p.end == step for p in own)]
        if not candidates:
            raise Extinct(step)
        return max(candidates, key=lambda j: scores[j])

    def _renew(self, world: World, source: _Piece, slot: int, donor: int, step: int, end: int) -> _Piece:
        """Go on from the state of the donor at this iteration, which lies in ``source``."""
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
