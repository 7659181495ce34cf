"""Plain SGD in blocks of iterations, for networks whose first layer is a wide product (see ``first_layer.py``).

The batches are known in advance. With X the inputs of a block's batches, W the first layer's weights at its beginning
and D_j the gradient of iteration j with respect to the products, the products of batch k are

    X_k W_k = X_k W - eta sum_{j<k} (X_k X_j^T) D_j,

so that W is read once and written once in a block, and the products are large ones, which processors are good at; all
the rest is stepped as ever. The first screen is of fixed samples S, of which ``S W`` is kept in the same way, from a
table of the products of every sample with those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from escape_inference.trainers.first_layer import FirstLayer, Staircase, first_layer
from escape_inference.trainers.looks import IN_ONE_THREAD, Compact, Screen, Tally, World, no_records, renew_gate, watch
from escape_inference.trainers.sgd import Recipe, slot_key

TOGETHER = 64
"""Samples of a block, about: more would make the products of its samples with one another the larger part."""
WIDE, HEAVY = 256, 2**14
"""Least number of inputs, and of weights, of a first layer that is treated so."""


@dataclass(frozen=True)
class _Losses:
    """Losses within a block: ``slopes`` holds the gradients of its iterations so far, and zeros.

    ``screened`` are the products of the first screen's samples at the block's beginning, and ``moving`` how they move with
    the slopes; the later stages are rare and use the matrix.
    """

    recipe: Recipe
    layer: FirstLayer
    world: World
    params: PyTree
    others: PyTree
    matrix: Float[Array, "inputs outputs"]
    chosen: Int[Array, " block"]
    slopes: Float[Array, "block outputs"]
    screened: Float[Array, "m outputs"] | None
    moving: Float[Array, "block m"] | None

    def _each(self, product: Float[Array, "n outputs"], targets: Array) -> Float[Array, " n"]:
        return jax.vmap(self.recipe.loss)(self.layer.rest(self.params, self.others, product), targets)

    def moved(self) -> Float[Array, "inputs outputs"]:
        """The matrix now."""
        assert self.world.compact is not None
        rate = self.world.learning_rate.astype(self.matrix.dtype)
        return self.matrix - rate * (self.world.compact.rows[self.chosen].T @ self.slopes)

    def first(self) -> Float[Array, "m outputs"]:
        """The products of the first screen's samples now."""
        assert self.screened is not None and self.moving is not None
        return self.screened + self.moving.T @ self.slopes

    def screen(self, stage: int) -> Float[Array, ""]:
        assert self.world.screens is not None and self.world.compact is not None
        assert self.world.compact.screens is not None
        screen = self.world.screens[stage]
        product = self.first() if stage == 0 else self.world.compact.screens[stage] @ self.moved()
        return jnp.sum(screen.weights * self._each(product, screen.targets)).astype(jnp.float32)

    def full(self) -> Float[Array, ""]:
        assert self.world.compact is not None
        stairs = self.world.compact.stairs
        losses = self._each(stairs.times(self.moved()), self.world.targets[stairs.order])
        return jnp.mean(losses).astype(jnp.float32)


def block_length(recipe: Recipe) -> int:
    """Iterations of a block."""
    return max(1, TOGETHER // recipe.batch_size)


@lru_cache(maxsize=32)
def compiled_blocks(recipe: Recipe, layer: FirstLayer) -> Callable:
    """What ``replicas.compiled_piece`` does, in blocks."""
    size = recipe.batch_size
    length = block_length(recipe)

    def piece(
        state: PyTree, slot: Array, step: Array, end: Array, watched: Array, key: PRNGKeyArray, world: World
    ) -> tuple[PyTree, Array, Array, Tally, Array]:
        compact = world.compact
        assert compact is not None
        (params, optimizer_state), gate = state
        rows, samples, stream = compact.rows, len(world.inputs), slot_key(key, slot)
        optimizer = recipe.optimizer(world.learning_rate)

        def batch_loss(others: PyTree, product: Array, targets: Array) -> Array:
            return jnp.mean(jax.vmap(recipe.loss)(layer.rest(params, others, product), targets))

        def renewed(order: Array | None, step: Array) -> tuple[Array | None, tuple[Array, Array]]:
            order = recipe.renew(order, stream, step, samples)
            return order, recipe.draw(stream, step, order, samples)

        def draw(order: Array | None, steps: Array) -> tuple[Array | None, tuple[Array, Array]]:
            if recipe.with_replacement:
                return None, jax.vmap(recipe.draw, (None, 0, None, None))(stream, steps, None, samples)
            return jax.lax.scan(renewed, order, steps)

        def block(carry: tuple) -> tuple:
            matrix, others, gate, step, escaped, order, tally, records, screened = carry
            order, (indices, uniforms) = draw(order, step + 1 + jnp.arange(length, dtype=step.dtype))
            chosen, targets = indices.reshape(-1), world.targets[indices]
            inputs = rows[chosen]
            at_start = inputs @ matrix
            step_size = -world.learning_rate.astype(matrix.dtype)
            coupling = step_size * (inputs @ inputs.T) if length > 1 else None
            moving = None if compact.table is None else step_size * compact.table[chosen]

            def losses(others: PyTree, slopes: Array) -> _Losses:
                return _Losses(recipe, layer, world, params, others, matrix, chosen, slopes, screened, moving)

            def iteration(carry: tuple) -> tuple:
                done, others, slopes, gate, _, tally, records = carry
                place = done * size
                product = jax.lax.dynamic_slice_in_dim(at_start, place, size)
                if coupling is not None:
                    product = product + jax.lax.dynamic_slice_in_dim(coupling, place, size) @ slopes
                loss, (gradient, slope) = jax.value_and_grad(batch_loss, (0, 1))(others, product, targets[done])
                others = optax.apply_updates(others, optimizer.update(gradient, optimizer_state, others)[0])
                slopes = jax.lax.dynamic_update_slice_in_dim(slopes, slope, place, 0)
                gate = renew_gate(gate, loss)
                here = losses(others, slopes)
                escaped, tally, records = watch(
                    watched, here, gate, uniforms[done], step + done + 1, slot, tally, records, world
                )
                return done + 1, others, slopes, gate, escaped, tally, records

            inner = (jnp.int32(0), others, jnp.zeros_like(at_start), gate, escaped, tally, records)
            going = lambda c: (c[0] < length) & (step + c[0] < end) & ~c[4]
            last = jax.lax.while_loop(going, iteration, inner)
            done, others, slopes, gate, escaped, tally, records = last
            ended = losses(others, slopes)
            screened = None if screened is None else ended.first()
            return ended.moved(), others, gate, step + done, escaped, order, tally, records, screened

        matrix, others = layer.take(params)
        screened = None if compact.screens is None else compact.screens[0] @ matrix
        order = recipe.order(stream, step + 1, samples)
        carry = (matrix, others, gate, step, jnp.array(False), order, Tally.zero(), no_records(), screened)
        carry = jax.lax.while_loop(lambda c: (c[3] < end) & ~c[4], block, carry)
        matrix, others, gate, step, escaped, _, tally, records, _ = carry
        return ((layer.put(params, matrix, others), optimizer_state), gate), step, escaped, tally, records

    return jax.jit(piece, compiler_options=IN_ONE_THREAD)


class Blocks:
    """The pieces of a network in blocks, and the arrays that they need of a world."""

    def __init__(self, recipe: Recipe, layer: FirstLayer, inputs: Array) -> None:
        self._length = block_length(recipe)
        self.piece = compiled_blocks(recipe, layer)
        self._layer = layer
        self._screens: tuple[Screen, Screen] | None = None
        rows = layer.rows(inputs)
        self._compact = Compact(rows, Staircase.of(rows), None, None)

    def world(self, world: World) -> World:
        """The world with what the pieces need, of the same inputs; as it is where they gain nothing."""
        screens = world.screens
        if screens is None:
            alone = self._compact._replace(screens=None, table=None)
            return world if self._length == 1 else world._replace(compact=alone)
        if self._screens is None or any(a.inputs is not b.inputs for a, b in zip(screens, self._screens, strict=True)):
            first, second = (self._layer.rows(screen.inputs) for screen in screens)
            table = self._compact.rows @ first.T
            self._screens, self._compact = screens, self._compact._replace(screens=(first, second), table=table)
        return world._replace(compact=self._compact)


def make_blocks(recipe: Recipe, params: PyTree, inputs: Array) -> Blocks | None:
    """Blocks for plain SGD of a network with a wide first layer; None for everything else."""
    if recipe.optimizer is not optax.sgd or recipe.batch_size > len(inputs):
        return None
    layer = first_layer(recipe.apply, params, inputs)
    if layer is None or len(layer.used) < WIDE or layer.take(params)[0].size < HEAVY:
        return None
    return Blocks(recipe, layer, inputs)
