"""Which way of running replicas side by side suits a network."""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from escape_inference.trainers.lanes import Lanes
from escape_inference.trainers.looks import World
from escape_inference.trainers.replicas import Replicas
from escape_inference.trainers.rounds import Round
from escape_inference.trainers.sgd import Recipe
from escape_inference.workers import processors

FEW_PARAMETERS = 4096
"""Up to this many parameters the replicas are lanes of one vectorised program; above, each runs alone, in cache."""


class Engine(Protocol):
    """Replica slots that can be advanced together."""

    step: int
    replicas: int
    gated: bool
    """Do its replicas branch on their own, so that the gate saves work?"""

    def advance(self, end: int, world: World) -> Round:
        """Advance to iteration ``end``; raises ``Extinct`` when no replica is left to copy."""

    def running(self) -> bool:
        """Is any replica still in its well?"""

    def state_of(self, slot: int) -> PyTree:
        """Parameters and optimiser state of one slot; of a replica that escaped, those at its crossing."""

    def round_length(self, escapes: int, replica_steps: int) -> int:
        """Iterations that the next round should have, given the escapes seen so far."""


def make_engine(
    recipe: Recipe,
    params: PyTree,
    replicas: int,
    key: PRNGKeyArray,
    learning_rate: float,
    *,
    replace: bool,
    replica_batch: int | None,
    threads: int | None,
    keep_left: bool = False,
) -> Engine:
    """Lanes for a small model, separate replicas for a network; ``keep_left``: rounds hold the states of escapes."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if size <= FEW_PARAMETERS:
        return Lanes(
            recipe, params, replicas, key, learning_rate, replace=replace, replica_batch=replica_batch,
            keep_left=keep_left,
        )  # fmt: skip
    if threads is None:
        threads = len(processors())
    return Replicas(
        recipe, params, replicas, key, learning_rate, replace=replace, replica_batch=replica_batch, threads=threads
    )
