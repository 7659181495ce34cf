"""The curvature along given directions, such as those in which runs of SGD escaped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import Problem, make_problem, product_with
from escape_inference.trainers.engines import make_engine
from escape_inference.trainers.escape import check_barrier, check_run
from escape_inference.trainers.looks import World
from escape_inference.trainers.losses import Apply, SampleLoss, sample_losses
from escape_inference.trainers.minimum import Minimum, parameters_of
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key


@dataclass(frozen=True)
class DirectionalCurvature:
    """The Hessian along directions.

    Attributes:
        values: ``d^T H d / |d|^2`` for each direction, 1/time.
        mean: their mean.
        se: its standard error over directions (NaN for one).
        share: how much of each direction's square length lies in the basis that it was projected on (1 without one).
    """

    values: Float[np.ndarray, " m"]
    mean: float
    se: float
    share: Float[np.ndarray, " m"]


def curvature_along(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    directions: Float[np.ndarray, "m p"],
    *,
    basis: Float[np.ndarray, "k p"] | None = None,
    loss: str | SampleLoss = "mean_square",
) -> DirectionalCurvature:
    """The curvature of the full-batch loss along each direction.

    A run that escaped has also diffused in the many flat directions, which say nothing about the barrier: with ``basis``
    (the outlier eigenvectors) every direction is projected on it first.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        directions: over the flattened parameters, of any length but zero.
        basis: orthonormal rows.
        loss: as in ``train_minimum``.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        >>> inputs = jnp.diag(jnp.array([3.0, 1.0]))
        >>> found = curvature_along(
        ...     lambda theta, x: x @ theta, jnp.zeros(2), inputs, jnp.zeros(2), np.array([[2.0, 0.0], [1.0, 1.0]]))
        >>> found.values.tolist()
        [4.5, 2.5]
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss)
    directions = np.atleast_2d(np.asarray(directions, dtype=np.float32))
    if directions.ndim != 2 or directions.shape[1] != len(problem.mask) or not len(directions):
        raise InputError(
            f"directions: must have shape [any, {len(problem.mask)}] (the parameters), got {directions.shape}."
        )
    whole = (directions**2).sum(1)
    if basis is not None:
        directions = (directions @ basis.T) @ basis
    length = (directions**2).sum(1)
    if not np.all(length > 0):
        raise InputError("directions: a direction has no length (in the basis).")
    product = _compiled_products(problem.recipe)
    images = product(problem.params, problem.mask, problem.inputs, problem.targets, jnp.asarray(directions))
    values = (directions * np.asarray(images)).sum(1).astype(float) / length
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return DirectionalCurvature(values, float(values.mean()), error, length / whole)


@lru_cache(maxsize=32)
def _compiled_products(recipe: Recipe) -> Callable:
    def products(params: PyTree, mask: Array, inputs: Array, targets: Array, vectors: Array) -> Array:
        return jax.lax.map(product_with(recipe, "hessian", params, mask, inputs, targets), vectors)

    return jax.jit(products)


def escape_displacements(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    learning_rate: float,
    batch_size: int,
    loss_barrier: float,
    replicas: int,
    steps: int,
    check_interval: int = 1,
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
) -> Float[np.ndarray, "m p"]:
    """Where runs of SGD that started at the minimum were when they escaped, as differences from the minimum.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        learning_rate: eta, time units per iteration.
        batch_size: B, samples per gradient.
        loss_barrier: full-batch loss above which a run has escaped.
        replicas: runs.
        steps: most iterations of each.
        check_interval: the full loss is computed every so many iterations.
        optimizer: as in ``measure_escape``.
        loss: as in ``train_minimum``.
        seed: of the batches.

    Returns:
        One row for each run that escaped, over the flattened parameters.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        >>> moved = escape_displacements(
        ...     lambda theta, x: theta * x, jnp.full(1, 0.1), jnp.ones((2, 1)), jnp.zeros((2, 1)), learning_rate=3.0,
        ...     batch_size=2, loss_barrier=0.1, replicas=2, steps=9)
        >>> moved.astype(float).round(4).tolist()
        [[-0.9], [-0.9]]
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss)
    check_training(learning_rate, batch_size, steps, problem.samples)
    check_run("minimum", "exact", replicas, steps, check_interval, None, None, None)
    at_minimum = float(jax.jit(problem.recipe.mean_loss)(problem.params, problem.inputs, problem.targets))
    check_barrier(loss_barrier, at_minimum)
    recipe = make_recipe(apply, problem.recipe.loss, optimizer, batch_size, True)
    engine = make_engine(
        recipe, problem.params, replicas, root_key(seed), learning_rate, replace=False, replica_batch=None, threads=None
    )
    numbers = jnp.float32(learning_rate), jnp.float32(loss_barrier), jnp.int32(2**30), jnp.int32(check_interval)
    world = World(problem.inputs, problem.targets, *numbers, None, None)
    escaped: list[int] = []
    while engine.step < steps and engine.running():
        done = engine.advance(min(engine.step + engine.round_length(0, 0), steps), world)
        escaped += [slot for _, slot in done.escapes]
    origin = ravel_pytree(parameters_of(minimum))[0]
    ends = [ravel_pytree(engine.state_of(slot)[0])[0] - origin for slot in sorted(escaped)]
    return np.asarray(ends).reshape(len(ends), origin.size)


def sampling_error(problem: Problem, vector: Float[np.ndarray, " p"]) -> float:
    """Standard error of ``v^T H v`` from having only a subsample of the data, for a unit vector v.

    That of a mean over samples drawn without replacement.
    """
    values = np.asarray(_compiled_sample_curvatures(problem.recipe)(
        problem.params, jnp.asarray(vector), problem.inputs, problem.targets
    ), float)  # fmt: skip
    if len(values) < 2:
        return float("inf")
    return float(values.std(ddof=1) * np.sqrt(1 / len(values) - 1 / problem.samples))


@lru_cache(maxsize=32)
def _compiled_sample_curvatures(recipe: Recipe) -> Callable:
    def curvatures(params: PyTree, vector: Array, inputs: Array, targets: Array) -> Array:
        flat, unravel = ravel_pytree(params)
        direction = unravel(vector.astype(flat.dtype))

        def losses(params: PyTree) -> Array:
            return sample_losses(recipe.apply, recipe.loss, params, inputs, targets)

        def slopes(params: PyTree) -> Array:
            return jax.jvp(losses, (params,), (direction,))[1]

        return jax.jvp(slopes, (params,), (direction,))[1]

    return jax.jit(curvatures)
