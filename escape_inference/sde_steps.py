"""Many Euler-Maruyama steps of a particle in a landscape, all conditions and runs side by side.

Lengths are in units of sqrt(L* / h*), losses of L*, times of 1 / h*; float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from escape_inference.worlds import COMMITTED

GOLDEN = 0.618034


class StepSettings(NamedTuple):
    """What one step needs to know of each condition; what a ramp changes has one entry for each level."""

    noise_exponent: Float[Array, " condition"]
    barrier_ratio: Float[Array, " condition"]  # L^s / L*
    hessian_ratio: Float[Array, " condition"]  # h^s / h*, 1 for a threshold
    temperature: Float[Array, "condition level"]
    time_step: Float[Array, "condition level"]
    stride: Int[Array, "condition level"]  # small steps between two looks
    begins: Int[Array, "condition level"]  # the clock at which the level begins


class State(NamedTuple):
    """Where every run is."""

    position: Float[Array, "condition run dim"]
    alive: Bool[Array, "condition run"]
    clock: Int[Array, " condition"]  # small steps since the clock of the table started


def landscape(barrier: str, settings: StepSettings, position: Array) -> tuple[Array, Array, Array]:
    """Loss [condition, run], its gradient [condition, run, dim], and who has left the well [condition, run]."""
    ratio = settings.barrier_ratio[:, None]
    if barrier == "threshold":
        loss = 1 + 0.5 * jnp.sum(position**2, axis=-1)
        return loss, position, loss > ratio
    skew = settings.hessian_ratio[:, None] - 1
    width = jnp.sqrt(12 * (ratio - 1) / (2 + skew))
    along = position[..., 0] / width
    folded = jnp.where(along > 1, 2 - along, along)
    inner = jnp.maximum(folded, 0)
    slope = width * jnp.where(folded < 0, folded, inner * (1 - inner) * (1 + skew * inner))
    height = jnp.where(folded < 0, folded**2 / 2, inner**2 * (0.5 + (skew - 1) * inner / 3 - skew * inner**2 / 4))
    loss = 1 + width**2 * height + 0.5 * jnp.sum(position[..., 1:] ** 2, axis=-1)
    forward = jnp.where(along > 1, -slope, slope)[..., None]
    return loss, jnp.concatenate([forward, position[..., 1:]], axis=-1), along > COMMITTED


def revive(state: State, escaped: Bool[Array, "condition run"], uniform: Float[Array, "condition run"]) -> Array:
    """Positions after each escaped replica has become a copy of a random survivor of its condition (Fleming-Viot).

    Where none has survived all start again at the minimum.
    """
    survivors = state.alive & ~escaped
    count = survivors.sum(axis=1, keepdims=True)
    rank = jnp.clip((uniform * count).astype(int), 0, jnp.maximum(count - 1, 0))
    parent = jnp.take_along_axis(jnp.argsort(~survivors, axis=1), rank, axis=1)
    copies = jnp.take_along_axis(state.position, parent[..., None], axis=1)
    copies = jnp.where((count > 0)[..., None], copies, 0.0)
    return jnp.where(escaped[..., None], copies, state.position)


@partial(jax.jit, static_argnames=("barrier", "revived"))
def advance(
    barrier: str,
    revived: bool,
    settings: StepSettings,
    state: State,
    normal: Float[Array, "condition step run dim"],
    uniform: Float[Array, "condition run"],
) -> tuple[State, Bool[Array, "step condition run"]]:
    """Many small steps of every condition; which runs were seen to escape at each.

    An escaped run is dead, or is ``revived`` at once with the random numbers ``uniform`` (shifted from step to step).
    """
    exponent = settings.noise_exponent[:, None]
    loss_and_gradient = partial(landscape, barrier, settings)

    def at_level(clock: Array) -> tuple[Array, ...]:
        changing = (settings.temperature, settings.time_step, settings.stride, settings.begins)
        if settings.begins.shape[1] == 1:
            return tuple(x[:, 0] for x in changing)
        level = jnp.sum(clock[:, None] >= settings.begins[:, 1:], axis=1, keepdims=True)
        return tuple(jnp.take_along_axis(x, level, axis=1)[:, 0] for x in changing)

    def one(carry: tuple[State, Array, Array], normal: Array) -> tuple[tuple[State, Array, Array], Array]:
        state, loss, gradient = carry
        temperature, step, stride, begin = at_level(state.clock)
        noise = jnp.sqrt((2 * temperature * step)[:, None] * loss**exponent)
        position = state.position - step[:, None, None] * gradient + noise[..., None] * normal
        clock = state.clock + 1
        loss, gradient, outside = loss_and_gradient(position)
        looked = (clock - begin) % stride == 0
        escaped = looked[:, None] & state.alive & (outside | ~jnp.isfinite(loss))
        if not revived:
            return (State(position, state.alive & ~escaped, clock), loss, gradient), escaped
        state = State(position, state.alive, clock)

        def copy_survivors(state: State) -> tuple[Array, Array, Array]:
            position = revive(state, escaped, (uniform + GOLDEN * clock[:, None]) % 1)
            return position, *loss_and_gradient(position)[:2]

        position, loss, gradient = jax.lax.cond(
            jnp.any(escaped), copy_survivors, lambda state: (state.position, loss, gradient), state
        )
        return (state._replace(position=position), loss, gradient), escaped

    start = (state, *loss_and_gradient(state.position)[:2])
    (state, _, _), escaped = jax.lax.scan(one, start, jnp.moveaxis(normal, 1, 0))
    return state, escaped
