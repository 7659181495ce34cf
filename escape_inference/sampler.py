"""NUTS with chains side by side; prior widths and left-out conditions share one compiled program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro import infer

from escape_inference.background import Ahead
from escape_inference.bend import Bend, bent
from escape_inference.likelihood import Observations
from escape_inference.model import Inputs, PriorWidths
from escape_inference.student import LogDensity

Shapes = tuple[tuple[str, tuple[tuple[int, ...], bool]], ...]


class Draws(NamedTuple):
    """Posterior draws in unconstrained space and the sampler's own statistics, ``[chain, draw]``."""

    z: Float[Any, "chain draw dim"]
    potential: Any
    diverging: Any
    energy: Any
    tree_depth: Any
    acceptance_rate: Any
    step_size: Any


def chains(
    keys: Array,
    start: Float[Array, "chain dim"],
    covariance: Float[Array, "dim dim"],
    bend: Bend,
    inputs: Inputs,
    observed: Observations,
    widths: PriorWidths,
    count: Int[Array, ""],
    acceptance: Float[Array, ""],
    *,
    log_joint: LogDensity,
    warmup: int,
    draws: int,
) -> Draws:
    """Run one NUTS chain for each key; other values of ``observed`` (its weights, too), ``widths``, ``count`` or ``acceptance`` compile nothing.

    :data:`sample` is the compiled form.

    Only the first ``count`` of the ``draws`` places are filled; steps are as long as a mean ``acceptance`` allows.

    The chains run in the straight coordinates of ``bend``, where they begin at ``start``; draws are of the posterior's own. The mass matrix
    is dense and starts at ``covariance``, so that combinations of parameters that the data fix are as easy as single ones.
    """

    def chain(key: Array, z: Array) -> tuple[Array, ...]:
        def potential(point: Array) -> Array:
            energy = -log_joint(bent(bend, point), (inputs, observed, widths))
            return jnp.where(jnp.isfinite(energy), energy, jnp.inf)

        initialise, step = infer.hmc.hmc(potential, algo="NUTS")
        state = initialise(
            z,
            num_warmup=warmup,
            inverse_mass_matrix=covariance,
            dense_mass=True,
            target_accept_prob=acceptance,  # type: ignore[arg-type]
            max_tree_depth=8,
            rng_key=key,
        )

        def record(state: infer.hmc.HMCState, _: None) -> tuple[infer.hmc.HMCState, tuple[Array, ...]]:
            state = step(state)
            return state, (
                state.z,
                state.potential_energy,
                state.diverging,
                state.energy,
                state.num_steps,
                state.accept_prob,
                state.adapt_state.step_size,
            )

        state = jax.lax.fori_loop(0, warmup, lambda _, state: step(state), state)
        _, first = jax.eval_shape(record, state, None)
        room = tuple(jnp.zeros((draws, *x.shape), x.dtype) for x in first)

        def keep(
            i: Array, carry: tuple[infer.hmc.HMCState, tuple[Array, ...]]
        ) -> tuple[infer.hmc.HMCState, tuple[Array, ...]]:
            state, new = record(carry[0], None)
            return state, tuple(x.at[i].set(y) for x, y in zip(carry[1], new, strict=True))

        return jax.lax.fori_loop(0, count, keep, (state, room))[1]

    z, potential, diverging, energy, steps, accepted, step_size = jax.vmap(chain)(keys, start)
    return Draws(bent(bend, z), potential, diverging, energy, jnp.ceil(jnp.log2(steps + 1.0)), accepted, step_size)


# the lower optimisation level halves the time of compilation and does not slow the sampler
sample = Ahead(
    jax.jit(
        chains,
        static_argnames=("log_joint", "warmup", "draws"),
        compiler_options={"xla_backend_optimization_level": 1},
    )
)
