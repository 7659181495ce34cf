"""What one round of replicas hands back, and the end that it can meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import PyTree

from escape_inference.trainers.looks import Tally

DONORS = 0x646F6E6F
"""Stream of the random numbers that choose a donor."""

SHORTEST = 16
"""Iterations of the first round; later ones are longer, but screens learn from round to round."""


class Extinct(Exception):
    """Every replica escaped at the same iteration."""

    def __init__(self, step: int) -> None:
        super().__init__(f"every replica escaped at iteration {step}")
        self.step = step


@dataclass(frozen=True)
class Round:
    """Escapes as (iteration, slot) in order, sums for each slot, and the full looks kept (see ``looks.RECORD``).

    ``left`` is the state of each escape at its crossing, where the engine keeps it (None where there was no room);
    ``afterwards`` what became of each (None: nobody followed them).
    """

    escapes: list[tuple[int, int]]
    tally: Tally
    records: np.ndarray
    left: tuple[PyTree, ...] = ()
    afterwards: tuple[str, ...] | None = None
