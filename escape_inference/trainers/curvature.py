"""Products of the Hessian of the loss, or of its Gauss-Newton part, with vectors; never the matrix itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.first_layer import OnRows, Staircase, first_layer
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss, sample_losses
from escape_inference.trainers.minimum import Minimum, parameters_of
from escape_inference.trainers.sgd import Recipe, make_recipe, root_key

PARTS = ("hessian", "gauss_newton")


@dataclass(frozen=True)
class Problem:
    """A loss at fixed parameters, checked, and the directions that count.

    Attributes:
        recipe: network and loss.
        params: the parameters, a pytree.
        inputs: samples first; those of the subsample.
        targets: samples first.
        mask: 1 for the parameters of the layers chosen, 0 for the others.
        key: of the random starting vectors.
        samples: number of samples before any subsampling.
    """

    recipe: Recipe
    params: PyTree
    inputs: Array
    targets: Array
    mask: Float[Array, " p"]
    key: PRNGKeyArray
    samples: int

    @property
    def dimension(self) -> int:
        """Number of parameters that count."""
        return int(jnp.sum(self.mask))

    def compact(self) -> Problem:
        """The same without products of inputs that are zero, where the network allows it; see ``Staircase``.

        The recipe and the inputs change, and the order of the samples; products of the Hessian are the same, and quicker.
        """
        layer = first_layer(self.recipe.apply, self.params, self.inputs)
        if layer is None:
            return self
        rows = layer.rows(self.inputs)
        stairs = Staircase.of(rows)
        if stairs.parts[0].shape == (len(rows), np.prod(layer.shape)):
            return self
        recipe = replace(self.recipe, apply=OnRows(layer, tuple((len(part), part.shape[1]) for part in stairs.parts)))
        return replace(self, recipe=recipe, inputs=rows[stairs.order], targets=self.targets[stairs.order])

    def start(self, number: int = 0) -> Float[Array, " p"]:
        """A normal random vector in the directions that count."""
        noise = jax.random.normal(jax.random.fold_in(self.key, number), self.mask.shape, self.mask.dtype)
        return noise * self.mask


def make_problem(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    loss: str | SampleLoss = "mean_square",
    layers: str | None = None,
    subsample: int | None = None,
    seed: int = 0,
) -> Problem:
    """Check the arguments that every spectrum shares; see ``top_hessian`` for them.

    Raises:
        InputError: an argument that cannot be used.
    """
    sample_loss = resolve_loss(loss)
    params = parameters_of(minimum)
    inputs, targets = check_problem(apply, sample_loss, params, inputs, targets)
    key, samples = root_key(seed), len(inputs)
    if subsample is not None:
        if not 1 <= subsample <= samples:
            raise InputError(f"subsample: must be from 1 to the number of samples, {samples}, got {subsample}.")
        chosen = jax.random.choice(jax.random.fold_in(key, 1), samples, (subsample,), replace=False)
        inputs, targets = inputs[chosen], targets[chosen]
    mask = layer_mask(params, layers)
    return Problem(make_recipe(apply, sample_loss, None, 1, True), params, inputs, targets, mask, key, samples)


def layer_names(params: PyTree) -> list[str]:
    """The paths of the arrays of a pytree, whose beginnings name layers.

    >>> layer_names({"first": {"weight": jnp.zeros(2), "bias": jnp.zeros(1)}, "last": [jnp.zeros(3)]})
    ["['first']['bias']", "['first']['weight']", "['last'][0]"]
    """
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def layer_mask(params: PyTree, layers: str | None) -> Float[Array, " p"]:
    """1 for the parameters whose path begins with ``layers`` (None: all), 0 for the others, in one flat vector.

    Raises:
        InputError: no path begins so; the message lists the paths.

    >>> layer_mask({"a": jnp.zeros(2), "b": jnp.zeros(3)}, "['b']").tolist()
    [0.0, 0.0, 1.0, 1.0, 1.0]
    """
    names = layer_names(params)
    chosen = [layers is None or name.startswith(layers) for name in names]
    if not any(chosen):
        raise InputError(f"layers: no parameters begin with {layers!r}; there are: {', '.join(names)}.")
    leaves, structure = jax.tree.flatten(params)
    kept = [jnp.full(jnp.shape(leaf), keep, jnp.result_type(leaf)) for leaf, keep in zip(leaves, chosen, strict=True)]
    return ravel_pytree(jax.tree.unflatten(structure, kept))[0]


def product_with(
    recipe: Recipe, part: str, params: PyTree, mask: Float[Array, " p"], inputs: Array, targets: Array
) -> Callable[[Float[Array, " p"]], Float[Array, " p"]]:
    """The map of a flat vector v to M v, linearised once; for use inside compiled code.

    ``hessian`` is the second derivative H of the mean loss. ``gauss_newton`` leaves out the curvature of the network:
    ``G = (1/N) sum_mu J_mu^T (d^2 l / df^2) J_mu`` (Schraudolph 2002), for the mean-square loss ``(1/N) sum_mu C_mu``.
    Both are restricted to the directions of the mask.

    Raises:
        InputError: an unknown part.
    """
    if part not in PARTS:
        raise InputError(f"part: {part!r} is not known; allowed: {', '.join(PARTS)}.")
    flat, unravel = ravel_pytree(params)
    if part == "hessian":

        def mean_loss(vector: Array) -> Array:
            return jnp.mean(sample_losses(recipe.apply, recipe.loss, unravel(vector), inputs, targets))

        tangent = jax.linearize(jax.grad(mean_loss), flat)[1]
        return lambda vector: mask * tangent(mask * vector)

    def predict(vector: Array) -> Array:
        return recipe.apply(unravel(vector), inputs)

    def loss_of(predictions: Array) -> Array:
        return jnp.mean(jax.vmap(recipe.loss)(predictions, targets))

    predictions, forward = jax.linearize(predict, flat)
    backward = jax.linear_transpose(forward, flat)
    curve = jax.linearize(jax.grad(loss_of), predictions)[1]
    return lambda vector: mask * backward(curve(forward(mask * vector)))[0]


def linear_map(problem: Problem, part: str) -> Callable[[Array | np.ndarray], Float[Array, " p"]]:
    """The compiled map of a flat vector v to M v of ``product_with``; what does not depend on v is computed here, once.

    M is symmetric, so the map is its transpose, which JAX hands out of compiled code together with what it has stored.

    >>> problem = make_problem(lambda w, x: x @ w, jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.zeros(2))
    >>> linear_map(problem, "hessian")(jnp.array([1.0, 2.0])).tolist()
    [4.5, 1.0]
    """
    transpose = _compiled_transpose(problem.recipe, part)(problem.params, problem.mask, problem.inputs, problem.targets)
    return lambda vector: _call(transpose, jnp.asarray(vector, problem.mask.dtype))


@lru_cache(maxsize=32)
def _compiled_transpose(recipe: Recipe, part: str) -> Callable:
    def transpose(params: PyTree, mask: Array, inputs: Array, targets: Array) -> Callable:
        return jax.vjp(product_with(recipe, part, params, mask, inputs, targets), jnp.zeros_like(mask))[1]

    return jax.jit(transpose)


@jax.jit
def _call(transpose: Callable, vector: Array | np.ndarray) -> Array:
    return transpose(vector)[0]
