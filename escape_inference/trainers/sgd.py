"""One SGD iteration, with random numbers fixed by (seed, replica slot, iteration)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from escape_inference.errors import InputError
from escape_inference.trainers.losses import Apply, SampleLoss, sample_losses
from escape_inference.trainers.optimizers import OptimizerFactory, resolve_optimizer

NOISE = 0x6E6F6973
"""Stream of the random numbers of an optimiser's own."""


@dataclass(frozen=True)
class Recipe:
    """What is compiled: everything about an SGD iteration that is not a number or an array."""

    apply: Apply
    loss: SampleLoss
    optimizer: OptimizerFactory
    batch_size: int
    with_replacement: bool = True

    def epoch_length(self, samples: int) -> int:
        """Iterations per epoch; an incomplete last batch is dropped."""
        return samples // self.batch_size

    def mean_loss(self, params: PyTree, inputs: Array, targets: Array) -> Float[Array, ""]:
        return jnp.mean(sample_losses(self.apply, self.loss, params, inputs, targets))

    def start(self, params: PyTree, learning_rate: float | Array) -> tuple[PyTree, PyTree]:
        """Parameters and a fresh optimiser state."""
        return params, self.optimizer(learning_rate).init(params)

    def step(
        self,
        state: tuple[PyTree, PyTree],
        learning_rate: float | Array,
        inputs: Array,
        targets: Array,
        indices: Int[Array, " batch"],
        slot_key: PRNGKeyArray,
        step: Int[Array, ""],
    ) -> tuple[tuple[PyTree, PyTree], Float[Array, ""]]:
        """``theta <- theta - eta grad L_batch(theta)``, or what the optimiser makes of that; and L_batch before it.

        An optimiser that draws random numbers gets those of this slot and iteration.
        """
        params, optimizer_state = state
        optimizer_state = with_keys(optimizer_state, slot_key, step)
        batch_loss, gradient = jax.value_and_grad(self.mean_loss)(params, inputs[indices], targets[indices])
        updates, optimizer_state = self.optimizer(learning_rate).update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), batch_loss

    def draw(
        self, slot_key: PRNGKeyArray, step: Int[Array, ""], order: Int[Array, " n"] | None, samples: int
    ) -> tuple[UInt32[Array, " batch"], Float[Array, ""]]:
        """The batch of this iteration, and a uniform number for its random look.

        With replacement: independent uniform samples (bias below N / 2^32). Without: the next piece of the epoch's
        order.
        """
        key = jax.random.fold_in(slot_key, step)
        if self.with_replacement:
            bits = jax.random.bits(key, (self.batch_size + 1,), jnp.uint32)
            indices, last = bits[:-1] % samples, bits[-1]
        else:
            assert order is not None
            position = ((step - 1) % self.epoch_length(samples)) * self.batch_size
            indices = jax.lax.dynamic_slice(order, (position,), (self.batch_size,))
            last = jax.random.bits(key, (), jnp.uint32)
        return indices, (last >> 8).astype(jnp.float32) / 2.0**24

    def order(self, slot_key: PRNGKeyArray, step: Int[Array, ""], samples: int) -> Int[Array, " n"] | None:
        """The order of the samples in the epoch that iteration ``step`` (counted from 1) belongs to."""
        if self.with_replacement:
            return None
        epoch = (step - 1) // self.epoch_length(samples)
        return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(slot_key, 0x65706F63), epoch), samples)

    def renew(
        self, order: Int[Array, " n"] | None, slot_key: PRNGKeyArray, step: Int[Array, ""], samples: int
    ) -> Int[Array, " n"] | None:
        """A new order at the first iteration of an epoch (``step`` must not be batched, so that the branch is real)."""
        if order is None:
            return None
        first = (step - 1) % self.epoch_length(samples) == 0
        make = self.order if slot_key.ndim == 0 else jax.vmap(self.order, (0, None, None))
        return jax.lax.cond(first, lambda: make(slot_key, step, samples), lambda: order)


def with_keys(optimizer_state: PyTree, slot_key: PRNGKeyArray, step: Int[Array, ""]) -> PyTree:
    """The state of an optimiser with every random key in it replaced by one of this slot and iteration.

    An optimiser that adds noise starts from a key of its own, the same in all replicas, which would then move alike.
    """

    def renewed(leaf: Any) -> Any:
        if not (hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
            return leaf
        words = jax.random.bits(jax.random.fold_in(jax.random.fold_in(slot_key, NOISE), step), (2,), jnp.uint32)
        first = jax.random.fold_in(jax.random.key(0, impl=jax.random.key_impl(leaf)), words[0])
        return jnp.broadcast_to(jax.random.fold_in(first, words[1]), leaf.shape)

    return jax.tree.map(renewed, optimizer_state)


def make_recipe(
    apply: Apply,
    loss: SampleLoss,
    optimizer: OptimizerFactory | optax.GradientTransformation | None,
    batch_size: int,
    with_replacement: bool,
) -> Recipe:
    """A recipe that can be looked up among the compiled ones, even where a callable has no hash (some modules)."""

    def hashable(function: Callable) -> Callable:
        try:
            hash(function)
        except TypeError:
            return lambda *arguments: function(*arguments)
        return function

    factory = hashable(resolve_optimizer(optimizer))
    return Recipe(hashable(apply), hashable(loss), factory, int(batch_size), bool(with_replacement))


def slot_key(key: PRNGKeyArray, slot: int | Int[Array, ""]) -> PRNGKeyArray:
    """The random stream of one replica slot."""
    return jax.random.fold_in(key, slot)


def root_key(seed: int) -> PRNGKeyArray:
    """The key of a seed; the generator is named, so that a user's JAX settings do not change the results.

    >>> bool(jax.numpy.any(jax.random.key_data(root_key(2**40)) != jax.random.key_data(root_key(0))))
    True
    """
    high, low = divmod(int(seed), 2**32)  # JAX itself drops what is beyond 32 bits
    key = jax.random.key(low, impl="threefry2x32")
    return jax.random.fold_in(key, high % 2**32) if high else key


def check_training(learning_rate: float, batch_size: int, steps: int, samples: int) -> None:
    """Raises InputError for a learning rate, batch size or number of iterations that cannot be used."""
    if not (learning_rate > 0 and learning_rate < float("inf")):
        raise InputError(f"learning_rate: must be positive and finite, got {learning_rate}.")
    if int(batch_size) != batch_size or not 1 <= batch_size <= samples:
        raise InputError(
            f"batch_size: must be an integer from 1 to the number of samples, {samples}, got {batch_size}."
        )
    if int(steps) != steps or steps < 1:
        raise InputError(f"steps: must be a positive integer, got {steps}.")
