"""NUTS; prior widths and left-out conditions share one compiled program.

Chains run one after the other: side by side each would wait for the longest trajectory of all, and would take long to trace.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int
from numpyro import infer

from escape_inference.bend import Bend, bent
from escape_inference.likelihood import Observations
from escape_inference.model import Inputs, PriorWidths
from escape_inference.programs import OPTIONS, Ahead
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

        def record(state: infer.hmc.HMCState) -> tuple[Array, ...]:
            return (
                state.z,
                state.potential_energy,
                state.diverging,
                state.energy,
                state.num_steps,
                state.accept_prob,
                state.adapt_state.step_size,
            )

        def advance(
            i: Array, carry: tuple[infer.hmc.HMCState, tuple[Array, ...]]
        ) -> tuple[infer.hmc.HMCState, tuple[Array, ...]]:
            state, place = step(carry[0]), jnp.maximum(i - warmup, 0)
            return state, tuple(x.at[place].set(y) for x, y in zip(carry[1], record(state), strict=True))

        # one loop for warm-up and draws, as a second would trace and compile the step again
        room = tuple(jnp.zeros((draws, *jnp.shape(x)), jnp.asarray(x).dtype) for x in record(state))
        return jax.lax.fori_loop(0, warmup + count, advance, (state, room))[1]

    z, potential, diverging, energy, steps, accepted, step_size = jax.lax.map(lambda one: chain(*one), (keys, start))
    return Draws(bent(bend, z), potential, diverging, energy, jnp.ceil(jnp.log2(steps + 1.0)), accepted, step_size)


export.register_namedtuple_serialization(Draws, serialized_name="escape_inference.Draws")
sample = Ahead(
    chains,
    static=("log_joint", "warmup", "draws"),
    options=OPTIONS
    | {"xla_cpu_use_fusion_emitters": False},  # compiles a quarter faster, and one point at a time is as fast
)
