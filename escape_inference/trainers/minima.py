"""Many minima in one call, each saved as soon as it is found."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss
from escape_inference.trainers.minimum import Minimum, Progress, how_made, parameters_of, train_minimum
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.sgd import make_recipe, root_key

INITIAL = 0x696E6974
"""Stream of the random numbers of the initial parameters."""
SAME_LOSS = 1e-4
"""Relative difference of the losses after the first iterations that rounding on another machine may make."""


@dataclass(frozen=True)
class Minima:
    """What many trainings gave.

    Attributes:
        found: the minima by their names, in the order asked for.
        failed: for the others, why; a learning rate at which training diverges is no reason to lose the rest.
    """

    found: dict[str, Minimum]
    failed: dict[str, str]


def train_minima(
    init: Callable[[PRNGKeyArray], PyTree],
    apply: Apply,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    learning_rate: float | Sequence[float],
    batch_size: int | Sequence[int],
    steps: int | Sequence[int],
    seed: int | Sequence[int] = 0,
    folder: str | Path | None = None,
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    with_replacement: bool = True,
    loss: str | SampleLoss = "mean_square",
    polish_steps: int = 0,
    progress: Progress | None = None,
) -> Minima:
    """Train once for every combination of learning rate, batch size, number of iterations and seed.

    Args:
        init: ``key -> params``; each seed has initial parameters of its own, the same at every learning rate and batch
            size.
        apply: ``(params, inputs) -> predictions``, any JAX function.
        inputs: samples first.
        targets: samples first.
        learning_rate: eta, one or several, time units per iteration.
        batch_size: B, one or several, samples per gradient.
        steps: iterations, one or several.
        seed: of the initial parameters and the batches, one or several.
        folder: where to save each minimum, as ``<name>.npz``; one that is there already and was made in the same way
            (settings, and the loss after the first iterations) is read and not trained again. None: nothing is saved.
        optimizer: None for plain SGD, a function of the learning rate (``optax.adam``), or an optax transformation.
        with_replacement: draw each batch independently, or go through the data in epochs of a new random order.
        loss: as in ``train_minimum``.
        polish_steps: most iterations of full-batch gradient descent afterwards.
        progress: called as ``progress(minima done, minima to do, name)``.

    Returns:
        The minima, named such as ``lr0.1_b20_n10000_s0``.

    Raises:
        InputError: an argument that cannot be used, or a file of that name that holds something else.

    Examples:
        >>> import jax.numpy as jnp
        >>> minima = train_minima(
        ...     lambda key: jax.random.normal(key, (1,)), lambda theta, x: theta * x, jnp.ones((4, 1)), jnp.ones((4, 1)),
        ...     learning_rate=[0.1, 0.5], batch_size=[1, 4], steps=200)
        >>> list(minima.found), max(minimum.loss_minimum for minimum in minima.found.values()) < 1e-6
        (['lr0.1_b1_n200_s0', 'lr0.1_b4_n200_s0', 'lr0.5_b1_n200_s0', 'lr0.5_b4_n200_s0'], True)
    """
    choices = {"learning_rate": learning_rate, "batch_size": batch_size, "steps": steps, "seed": seed}
    grid = [_as_list(name, values) for name, values in choices.items()]
    points = [dict(zip(choices, values, strict=True)) for values in itertools.product(*grid)]
    names = [f"lr{p['learning_rate']:g}_b{p['batch_size']}_n{p['steps']}_s{p['seed']}" for p in points]
    if len(set(names)) < len(names):
        raise InputError("learning_rate, batch_size, steps, seed: a value is given twice.")
    if folder is not None:
        _check_writable(Path(folder))
    found, failed = {}, {}
    for done, (name, point) in enumerate(zip(names, points, strict=True)):
        params = init(jax.random.fold_in(root_key(point["seed"]), INITIAL))
        path = None if folder is None else Path(folder) / f"{name}.npz"
        saved = None
        if path is not None and path.exists():
            sample_loss, same = resolve_loss(loss), parameters_of(params)
            data = check_problem(apply, sample_loss, same, inputs, targets)
            recipe = make_recipe(apply, sample_loss, optimizer, point["batch_size"], with_replacement)
            settings = {key: value for key, value in point.items() if key != "batch_size"}
            settings |= {"loss": loss, "optimizer": optimizer, "polish_steps": polish_steps}
            saved = _saved(path, params, how_made(recipe, same, *data, **settings))
        try:
            found[name] = saved or train_minimum(
                apply, params, inputs, targets, **point, optimizer=optimizer, with_replacement=with_replacement,
                loss=loss, polish_steps=polish_steps,
            )  # fmt: skip
        except InputError as error:
            if "diverged" not in str(error):
                raise
            failed[name] = str(error)
        if path is not None and saved is None and name in found:
            found[name].save(path)
        if progress:
            progress(done + 1, len(points), name)
    return Minima(found, failed)


def _as_list(name: str, values: Any) -> list[Any]:
    chosen = [values] if np.isscalar(values) else list(values)
    if not chosen:
        raise InputError(f"{name}: needs at least one value.")
    return chosen


def _check_writable(folder: Path) -> None:
    """Before anything is trained.

    Raises:
        InputError: minima cannot be saved there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot save minima there: {error.strerror or error}") from error


def _saved(path: Path, like: PyTree, settings: Mapping[str, Any]) -> Minimum:
    """The minimum in that file, if it was made in this way."""
    minimum = Minimum.load(path, like)
    known, wanted = minimum.made, dict(settings)
    early = wanted.pop("early_loss")
    del wanted["polish_steps"]  # so many were needed; how many were allowed is compared
    differ = [key for key, value in wanted.items() if known.get(key) != value]
    if not differ and not np.isclose(known.get("early_loss", np.nan), early, rtol=SAME_LOSS, equal_nan=True):
        differ = ["data, network, loss or optimiser (the loss after the first iterations)"]
    if differ:
        raise InputError(f"{path}: was made with other {', '.join(differ)}; give another folder.")
    return minimum
