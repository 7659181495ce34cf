"""What is known of the ways out of a minimum, and one of them on the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.saddle import Saddle


@dataclass(frozen=True)
class Exit:
    """One way out of a minimum.

    Attributes:
        saddle: what was found, converged or not.
        home: the minimum that is left, after descent; over the flattened parameters.
        beyond: the minimum on the other side.
        loss_home: full-batch loss there.
        loss_beyond: full-batch loss there.
        hessian_along: curvature at ``home`` towards the saddle, 1/time.
        runs: how many runs that left ended at ``beyond``.
        usable: a converged saddle that joins ``home`` and ``beyond``.
        note: what is not as it should be, in a sentence; empty if usable.
    """

    saddle: Saddle
    home: Float[np.ndarray, " p"]
    beyond: Float[np.ndarray, " p"]
    loss_home: float
    loss_beyond: float
    hessian_along: float
    runs: int
    usable: bool
    note: str

    @property
    def numbers(self) -> dict[str, Any]:
        """What a row about it holds."""
        names = ("loss_barrier", "loss_barrier_se", "hessian_saddle", "hessian_saddle_se", "gradient_norm", "negative")
        own = {name: getattr(self, name) for name in ("loss_home", "loss_beyond", "hessian_along", "runs", "usable")}
        lowest = {"lowest": [float(value) for value in self.saddle.lowest]}
        known = {name: getattr(self.saddle, name) for name in names} | lowest | own
        return known | {"converged": self.saddle.converged, "note": self.note}

    def save(self, path: str | Path) -> Path:
        """Write the numbers and the three points as one ``.npz``."""
        path = Path(path)
        about = {key: value for key, value in self.numbers.items() if key not in ("converged", "usable", "note")}
        points = {"home": self.home, "beyond": self.beyond, "mode": self.saddle.mode}
        points |= {"saddle": np.asarray(ravel_pytree(self.saddle.params)[0]), "path_losses": self.saddle.path_losses}
        with open(path, "wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **points)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: str | Path, like: PyTree) -> Exit:
        """Read a usable exit; ``like`` is a pytree of parameters of the same structure and shapes.

        Raises:
            InputError: the file is not one of these, or holds parameters of another shape.
        """
        flat, unravel = ravel_pytree(like)
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                points = {name: file[name] for name in ("home", "beyond", "saddle", "mode", "path_losses")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path}: not a saved exit: {error}") from error
        if points["saddle"].shape != flat.shape:
            raise InputError(f"{path}: has {points['saddle'].size} parameters, but the network has {flat.size}.")
        ours = {name: about.pop(name) for name in ("loss_home", "loss_beyond", "hessian_along", "runs")}
        more = {"lowest": np.asarray(about.pop("lowest")), "mode": points["mode"], "path_losses": points["path_losses"]}
        saddle = Saddle(params=unravel(jnp.asarray(points["saddle"])), **about, **more, converged=True, note="")
        return cls(saddle, points["home"], points["beyond"], **ours, usable=True, note="")


@dataclass(frozen=True)
class Exits:
    """All ways out that were found, the lowest usable saddle first.

    Attributes:
        exits: one for each minimum reached.
        runs: SGD runs that were made.
        returned: how many of them ended in the well that they started from.
        loss_home: full-batch loss at the minimum after descent.
    """

    exits: tuple[Exit, ...]
    runs: int
    returned: int
    loss_home: float

    @property
    def lowest(self) -> Exit | None:
        """The lowest usable exit."""
        return next((found for found in self.exits if found.usable), None)
