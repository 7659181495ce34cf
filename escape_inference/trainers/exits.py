"""The ways out of a minimum: where runs of SGD that left it end, and the saddles between.

Runs that leave are taken down to the minima reached. For each of these the lowest path from the minimum left is relaxed and its
highest point refined to a saddle; then descent from both sides of that saddle says which two minima it really joins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import Problem, make_problem
from escape_inference.trainers.descent import Descent, descend, rise_between
from escape_inference.trainers.direction import curvature_along
from escape_inference.trainers.hessian import eigenpairs
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum, Progress, parameters_of
from escape_inference.trainers.saddle import SAFE, Saddle, find_saddle
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key, slot_key
from escape_inference.trainers.way_out import Exit, Exits

NEGLIGIBLE_RISE = 1e-3
"""Two points are in one well if the straight line between them does not rise by this share of the loss of the minimum."""
SAME = 0.1
"""Two minima are one if their distance is below this share of the distance to the minimum left."""
NUDGE = 0.05
"""Where the descents from a saddle begin, over the distance to the nearer of its two minima."""
ATTEMPTS = 3
"""Most searches for one saddle: a path with a minimum on the way is searched again up to that minimum."""


def find_exits(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    learning_rates: float | Sequence[float],
    batch_size: int,
    loss_barrier: float,
    runs: int = 16,
    steps: int = 5000,
    descent_steps: int = 20_000,
    candidates: int = 4,
    images: int = 15,
    path_iterations: int = 300,
    refine_iterations: int = 100,
    gradient_norm: float = 1e-4,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
    progress: Progress | None = None,
) -> Exits:
    """Leave a minimum by SGD, see where the runs end, and find the saddles between.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters.
        inputs: samples first.
        targets: samples first.
        learning_rates: of the runs that are to leave, one or several; so large that some do.
        batch_size: of these runs.
        loss_barrier: a run stops at the first full-batch loss above this, and otherwise after ``steps``.
        runs: at each learning rate.
        steps: most iterations of a run.
        descent_steps: most iterations of the descents afterwards.
        candidates: most minima to which a saddle is sought, those where most runs ended first.
        images: points of a path.
        path_iterations: descents of a path.
        refine_iterations: most steps of the search for a saddle.
        gradient_norm: below which a minimum or a saddle is reached.
        loss: as in ``train_minimum``.
        seed: of the batches.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite at the minimum.

    Examples:
        A tilted double well, ``x^4 / 4 - x^2 / 2 + 0.02 x + 0.6``, left to the right over its saddle at 0.02:

        >>> found = find_exits(
        ...     lambda theta, x: theta + x, jnp.full(1, -1.0), jnp.array([[-0.3], [0.3]]), jnp.zeros((2, 1)),
        ...     loss=lambda f, y: (f[0]**4 / 4 - f[0]**2 / 2 + 0.02 * f[0] + 0.6), images=7, path_iterations=100,
        ...     learning_rates=[0.9], batch_size=1, loss_barrier=0.7, runs=8, steps=300)
        >>> found.lowest.usable, bool(found.lowest.beyond[0] > 0.5)
        (True, True)
    """
    problem = make_problem(apply, minimum, inputs, targets, loss=loss, seed=seed)
    rates: list[float] = np.atleast_1d(np.asarray(learning_rates, float)).tolist()
    if not rates:
        raise InputError("learning_rates: needs at least one value.")
    for learning_rate in rates:
        check_training(learning_rate, batch_size, steps, problem.samples)
    origin, unravel = ravel_pytree(problem.params)
    curvature = abs(float(eigenpairs(problem, "hessian", 1, min(20, problem.dimension))[0][0]))
    rate = SAFE / max(curvature, 1e-12)

    def down(points: Array) -> Descent:
        return descend(problem, points, learning_rate=rate, steps=descent_steps, gradient_norm=gradient_norm / 10)

    if progress:
        progress(0, 1, "leaving the minimum")
    start = down(origin[None])
    home, level = start.points[0], float(start.losses[0])
    if not np.isfinite(level):
        raise InputError("the loss is not finite at the minimum.")
    leave = _compiled_leaving(make_recipe(apply, problem.recipe.loss, None, batch_size, True))
    slots = jnp.arange(runs, dtype=jnp.uint32)
    ends = [
        leave(problem.params, slots, jnp.int32(steps), jnp.float32(learning_rate), jnp.float32(loss_barrier),
              root_key(seed + place), problem.inputs, problem.targets)
        for place, learning_rate in enumerate(rates)
    ]  # fmt: skip
    done = down(jnp.concatenate(ends))
    rises = np.asarray(rise_between(problem, home, done.points))
    finite = np.isfinite(np.asarray(done.losses))
    left = np.flatnonzero(finite & (rises > NEGLIGIBLE_RISE * level))
    places = _distinct(np.asarray(home), np.asarray(done.points)[left])
    settings = {
        "images": images,
        "path_iterations": path_iterations,
        "refine_iterations": refine_iterations,
        "gradient_norm": gradient_norm,
    }
    found: list[Exit] = []
    for number, (place, members) in enumerate(places[:candidates]):
        if progress:
            progress(number, min(len(places), candidates), "looking for saddles")
        end = jnp.asarray(np.asarray(done.points)[left][place])
        one = _exit_towards(problem, home, end, down, unravel, settings, seed)
        found.append(replace(one, runs=members))
    found.sort(key=lambda one: (not one.usable, one.saddle.loss_barrier))
    returned = int((finite & (rises <= NEGLIGIBLE_RISE * level)).sum())
    return Exits(tuple(_merged(found)), len(done.points), returned, level)


@lru_cache(maxsize=32)
def _compiled_leaving(recipe: Recipe) -> Callable:
    """``-> points [runs, p]`` where the runs were when their loss exceeded the barrier, or at the end."""

    def leave(
        params: PyTree, slots: Array, steps: Array, rate: Array, barrier: Array, key: PRNGKeyArray, inputs: Array,
        targets: Array,
    ) -> Array:  # fmt: skip
        samples = inputs.shape[0]

        def one(slot: Array) -> Array:
            stream = slot_key(key, slot)

            def body(carry: tuple) -> tuple:
                state, step, _ = carry
                indices, _ = recipe.draw(stream, step + 1, None, samples)
                new, _ = recipe.step(state, rate, inputs, targets, indices, stream, step + 1)
                level = recipe.mean_loss(new[0], inputs, targets)
                finite = jnp.isfinite(level)
                new = jax.tree.map(lambda now, old: jnp.where(finite, now, old), new, state)
                return new, step + 1, finite & (level <= barrier)

            carry = (recipe.start(params, rate), jnp.int32(0), jnp.array(True))
            state = jax.lax.while_loop(lambda carry: (carry[1] < steps) & carry[2], body, carry)[0]
            return ravel_pytree(state[0])[0]

        return jax.lax.map(one, slots)

    return jax.jit(leave)


def _distinct(home: np.ndarray, points: np.ndarray) -> list[tuple[int, int]]:
    """Points that are not the same minimum: index of one of each, and how many there are, most first."""
    groups: list[list[int]] = []
    for index, point in enumerate(points):
        reach = SAME * float(np.linalg.norm(point - home))
        for group in groups:
            if np.linalg.norm(points[group[0]] - point) < reach:
                group.append(index)
                break
        else:
            groups.append([index])
    return [(group[0], len(group)) for group in sorted(groups, key=len, reverse=True)]


def _exit_towards(
    problem: Problem,
    home: Array,
    end: Array,
    down: Callable[[Array], Descent],
    unravel: Callable[[Array], PyTree],
    settings: dict,
    seed: int,
) -> Exit:
    """The saddle between home and the end; where a third minimum lies between, the saddle on this side of it."""
    apply, loss, data = problem.recipe.apply, problem.recipe.loss, (problem.inputs, problem.targets)
    level = float(problem.recipe.mean_loss(unravel(home), *data))
    for _ in range(ATTEMPTS):
        try:
            saddle = find_saddle(apply, unravel(home), unravel(end), *data, loss=loss, seed=seed, **settings)
        except InputError as error:
            return _failed(problem, home, end, unravel, str(error))
        top = ravel_pytree(parameters_of(saddle.params))[0]
        loss_end = float(problem.recipe.mean_loss(unravel(end), *data))
        toward = top - home
        along = float("nan")
        if bool(jnp.any(toward != 0)):
            along = curvature_along(apply, unravel(home), *data, np.asarray(toward)[None], loss=loss).mean
        exit_ = Exit(saddle, np.asarray(home), np.asarray(end), level, loss_end, along, 0, False, saddle.note)
        if not saddle.converged:
            return exit_
        nudge = NUDGE * float(jnp.minimum(jnp.linalg.norm(top - home), jnp.linalg.norm(top - end)))
        mode = jnp.asarray(saddle.mode, top.dtype)
        mode = mode * jnp.sign(mode @ (end - home))
        sides = down(jnp.stack([top - nudge * mode, top + nudge * mode]))
        rises = np.asarray(rise_between(problem, home, sides.points)) <= NEGLIGIBLE_RISE * level
        if rises.sum() == 1:
            other = int(np.argmin(rises))
            beyond, loss_beyond = np.asarray(sides.points[other]), float(sides.losses[other])
            return replace(exit_, beyond=beyond, loss_beyond=loss_beyond, usable=True)
        if rises.all():
            return replace(exit_, note="descent from both sides of the saddle leads back to the minimum.")
        distances = jnp.linalg.norm(sides.points - home, axis=1)
        nearer = sides.points[int(jnp.argmin(distances))]
        exit_ = replace(exit_, note="the saddle joins two other minima: the path has a minimum on the way.")
        if not float(jnp.min(distances)) < float(jnp.linalg.norm(end - home)):
            break
        end = nearer
    return exit_


def _failed(problem: Problem, home: Array, end: Array, unravel: Callable[[Array], PyTree], note: str) -> Exit:
    """An exit whose saddle could not be looked for."""
    nan, none = float("nan"), np.empty(0)
    data = problem.inputs, problem.targets
    levels = [float(problem.recipe.mean_loss(unravel(at), *data)) for at in (home, end)]
    saddle = Saddle(unravel(end), nan, nan, nan, nan, nan, 0, none, none, none, False, note)
    return Exit(saddle, np.asarray(home), np.asarray(end), levels[0], levels[1], nan, 0, False, note)


def _merged(exits: Sequence[Exit]) -> list[Exit]:
    """Usable exits over the same saddle as one, with the runs of both."""
    kept: list[Exit] = []
    for exit_ in exits:
        top = np.asarray(ravel_pytree(exit_.saddle.params)[0])
        for place, other in enumerate(kept):
            gap = np.linalg.norm(np.asarray(ravel_pytree(other.saddle.params)[0]) - top)
            if exit_.usable and other.usable and gap < SAME * np.linalg.norm(top - exit_.home):
                kept[place] = replace(other, runs=other.runs + exit_.runs)
                break
        else:
            kept.append(exit_)
    return kept
