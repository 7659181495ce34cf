"""A minimum of the full-batch loss, found as published experiments find it: by SGD."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key, slot_key

PIECE = 500
"""Iterations between two reports of progress."""
EARLY = 10
"""Iterations after which the loss tells how a minimum is made."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Minimum:
    """Where escapes start from.

    Attributes:
        params: parameters, any pytree of arrays.
        loss_minimum: full-batch loss there, L*.
        gradient_norm: Euclidean norm of the full-batch gradient there; 0 at an exact minimum.
        made: how it was found (numbers and strings that JSON can hold).
    """

    params: PyTree
    loss_minimum: float
    gradient_norm: float
    made: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write one ``.npz``: under a temporary name in the same folder, then renamed, so that it is whole or absent.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = Path(path)
        leaves = {f"leaf_{index:04d}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(self.params))}
        about = {"loss_minimum": self.loss_minimum, "gradient_norm": self.gradient_norm, "made": self.made}
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, about=np.array(json.dumps(about)), **leaves)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path, like: PyTree) -> Minimum:
        """Read a saved minimum; ``like`` is a pytree of the same structure and shapes, such as ``init(key)``.

        Raises:
            InputError: the file is not one of these, or holds parameters of another shape.
        """
        wanted, structure = jax.tree.flatten(like)
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                leaves = [file[name] for name in sorted(file.files) if name != "about"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path}: not a saved minimum: {error}") from error
        shapes, expected = [leaf.shape for leaf in leaves], [np.shape(leaf) for leaf in wanted]
        if shapes != expected:
            raise InputError(f"{path}: parameters have shapes {shapes}, but the network has {expected}.")
        params = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
        return cls(params, float(about["loss_minimum"]), float(about["gradient_norm"]), about["made"])


def parameters_of(minimum: Minimum | PyTree) -> PyTree:
    """The parameters of a ``Minimum``, or the pytree itself, as JAX arrays of at least single precision."""
    params = minimum.params if isinstance(minimum, Minimum) else minimum
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), params)


@lru_cache(maxsize=32)
def compiled_training(recipe: Recipe) -> Callable:
    """``(state, step, end, key, learning_rate, inputs, targets) -> state`` after iteration ``end``, compiled."""

    def train(
        state: PyTree, step: Array, end: Array, key: PRNGKeyArray, learning_rate: Array, inputs: Array, targets: Array
    ) -> PyTree:
        stream, samples = slot_key(key, 0), inputs.shape[0]

        def body(carry: tuple) -> tuple:
            state, step, order = carry
            step = step + 1
            order = recipe.renew(order, stream, step, samples)
            indices, _ = recipe.draw(stream, step, order, samples)
            return recipe.step(state, learning_rate, inputs, targets, indices, stream, step)[0], step, order

        carry = (state, step, recipe.order(stream, step + 1, samples))
        return jax.lax.while_loop(lambda carry: carry[1] < end, body, carry)[0]

    return jax.jit(train)


@lru_cache(maxsize=32)
def compiled_loss(recipe: Recipe) -> Callable:
    """``(params, inputs, targets) -> full-batch loss``, compiled."""
    return jax.jit(recipe.mean_loss)


@lru_cache(maxsize=32)
def _compiled_descent(recipe: Recipe) -> Callable:
    def descend(
        params: PyTree, gradient_norm: Array, steps: Array, learning_rate: Array, inputs: Array, targets: Array
    ) -> tuple[PyTree, Array, Array]:
        def body(carry: tuple) -> tuple:
            params, done, _ = carry
            gradient = jax.grad(recipe.mean_loss)(params, inputs, targets)
            move = lambda leaf, slope: leaf - learning_rate.astype(leaf.dtype) * slope
            params = jax.tree.map(move, params, gradient)
            return params, done + 1, optax.tree.norm(gradient)

        start = (params, jnp.int32(0), jnp.full((), jnp.inf, jnp.result_type(*jax.tree.leaves(params))))
        return jax.lax.while_loop(lambda carry: (carry[1] < steps) & (carry[2] > gradient_norm), body, start)

    return jax.jit(descend)


@lru_cache(maxsize=32)
def _compiled_slope(recipe: Recipe) -> Callable:
    return jax.jit(jax.value_and_grad(recipe.mean_loss))


def how_made(
    recipe: Recipe,
    params: PyTree,
    inputs: Array,
    targets: Array,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    loss: str | SampleLoss,
    optimizer: OptimizerFactory | optax.GradientTransformation | None,
    polish_steps: int,
) -> dict[str, Any]:
    """How a minimum is trained, as numbers and strings that JSON can hold.

    ``early_loss`` is the full-batch loss after the first iterations: it tells other data, networks, losses and optimisers
    apart, whatever they are called.
    """
    early, key, eta = jnp.int32(min(steps, EARLY)), root_key(seed), jnp.float32(learning_rate)
    start = recipe.start(params, learning_rate)
    state = compiled_training(recipe)(start, jnp.int32(0), early, key, eta, inputs, targets)
    return {
        "learning_rate": float(learning_rate),
        "batch_size": recipe.batch_size,
        "steps": int(steps),
        "seed": int(seed),
        "with_replacement": recipe.with_replacement,
        "loss": _name(loss),
        "optimizer": "sgd" if optimizer is None else _name(optimizer),
        "polish_at_most": int(polish_steps),
        "polish_steps": 0,
        "early_loss": float(_compiled_slope(recipe)(state[0], inputs, targets)[0]),
    }


def _name(given: Any) -> str:
    """What a function or an optimiser is called, as far as it has a name."""
    if isinstance(given, str):
        return given
    given = getattr(given, "func", given)  # of a functools.partial
    return str(getattr(given, "__qualname__", type(given).__name__))


def train_minimum(
    apply: Apply,
    params: PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    learning_rate: float,
    batch_size: int,
    steps: int,
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    with_replacement: bool = True,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
    polish_steps: int = 0,
    polish_learning_rate: float | None = None,
    polish_gradient_norm: float = 1e-6,
    progress: Progress | None = None,
) -> Minimum:
    """Train from ``params`` and return where the run ended, with its full-batch loss and gradient norm.

    By default this is what published experiments do: a number of SGD iterations (10^4 in Mori et al. 2022), no more.
    The end point then lies within SGD's own fluctuations of a minimum, and ``loss_minimum`` is its full-batch loss as
    it is; the gradient norm says how far from stationary it is. With ``polish_steps`` full-batch gradient descent
    follows, until the gradient norm is below ``polish_gradient_norm``.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        params: where to start, a pytree of arrays.
        inputs: samples first.
        targets: samples first.
        learning_rate: eta of the SGD iterations.
        batch_size: samples per gradient.
        steps: SGD iterations.
        optimizer: None for plain SGD, a function of the learning rate (``optax.adam``), or an optax transformation.
        with_replacement: draw each batch independently, or go through the data in epochs of a new random order.
        loss: ``mean_square``, half the squared error, or a callable ``(prediction, target) -> loss`` for one sample.
        seed: of the batches.
        polish_steps: most iterations of full-batch gradient descent afterwards.
        polish_learning_rate: its learning rate; None: the same as before.
        polish_gradient_norm: it stops below this gradient norm.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Raises:
        InputError: an argument that cannot be used, or the loss is not finite at the end.

    Examples:
        The mean of the targets minimises the squared error, with half their variance as loss:

        >>> minimum = train_minimum(
        ...     lambda mean, x: mean * x, jnp.zeros(1), jnp.ones((4, 1)), jnp.array([[1.0], [2.0], [3.0], [6.0]]),
        ...     learning_rate=0.1, batch_size=4, steps=10, polish_steps=500, polish_gradient_norm=1e-5)
        >>> round(float(minimum.params[0]), 3), round(minimum.loss_minimum, 3), minimum.gradient_norm < 1e-5
        (3.0, 1.75, True)
    """
    sample_loss = resolve_loss(loss)
    params = parameters_of(params)
    inputs, targets = check_problem(apply, sample_loss, params, inputs, targets)
    check_training(learning_rate, batch_size, steps, len(inputs))
    recipe = make_recipe(apply, sample_loss, optimizer, batch_size, with_replacement)
    made = how_made(
        recipe, params, inputs, targets, learning_rate=learning_rate, steps=steps, seed=seed, loss=loss,
        optimizer=optimizer, polish_steps=polish_steps,
    )  # fmt: skip
    train, key, eta = compiled_training(recipe), root_key(seed), jnp.float32(learning_rate)
    state = recipe.start(params, learning_rate)
    for begin in range(0, steps, PIECE):
        end = min(begin + PIECE, steps)
        state = train(state, jnp.int32(begin), jnp.int32(end), key, eta, inputs, targets)
        if progress:
            jax.block_until_ready(state)
            progress(end, steps, "training")
    params = state[0]
    if polish_steps:
        rate = jnp.float32(learning_rate if polish_learning_rate is None else polish_learning_rate)
        goal = jnp.float32(polish_gradient_norm)
        params, used, _ = _compiled_descent(recipe)(params, goal, jnp.int32(polish_steps), rate, inputs, targets)
        made |= {"polish_steps": int(used), "polish_learning_rate": float(rate)}
    loss_minimum, gradient = _compiled_slope(recipe)(params, inputs, targets)
    if not bool(jnp.isfinite(loss_minimum)):
        raise InputError(
            f"training diverged: the loss is {float(loss_minimum)} after {steps} iterations at learning rate "
            f"{learning_rate:g}. Lower the learning rate."
        )
    return Minimum(params, float(loss_minimum), float(optax.tree.norm(gradient)), made)
