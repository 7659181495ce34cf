"""Hamiltonian Monte Carlo in two forms; prior widths and left-out conditions share one compiled program.

A posterior of few parameters whose shape is known from tempered Monte Carlo needs trajectories of one length only, and all chains take
them side by side (:data:`hmc`), at a fifth of the cost of NUTS. Any other is left to NUTS (:data:`nuts`), whose chains run one after the
other: side by side each would wait for the longest trajectory of all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int
from numpyro import infer

from escape_inference.bend import Bend, bent
from escape_inference.later import library
from escape_inference.programs import OPTIONS, Ahead
from escape_inference.student import LogDensity

Shapes = tuple[tuple[str, tuple[tuple[int, ...], bool]], ...]
LENGTHS = 0.8, 2.4  #: of trajectories, around a quarter of the period of a standard normal distribution
FIRST_STEP, MOST_STEPS = 0.5, 64  #: of a trajectory of :data:`hmc`


class Draws(NamedTuple):
    """Posterior draws in unconstrained space and the sampler's own statistics, ``[chain, draw]``."""

    z: Float[Any, "chain draw dim"]
    potential: Any
    diverging: Any
    energy: Any
    n_steps: Any
    acceptance_rate: Any
    step_size: Any


def hmc_chains(
    keys: Array,
    start: Float[Array, "chain dim"],
    covariance: Float[Array, "dim dim"],
    bend: Bend,
    data: Any,
    count: Int[Array, ""],
    acceptance: Float[Array, ""],
    *,
    log_joint: LogDensity,
    warmup: int,
    draws: int,
) -> Draws:
    """Run one chain for each key by Hamiltonian Monte Carlo; arguments as those of :func:`nuts_chains`.

    The mass matrix stays at ``covariance``. The length of the trajectories is drawn anew every time (randomised HMC), and the step size,
    one for all chains, is adapted to their mean acceptance by dual averaging while they warm up.
    """
    hmc, step_size_of = library("blackjax.mcmc.hmc"), library("blackjax.adaptation.step_size")
    kernel = hmc.build_kernel()
    initialise, adapt, _ = step_size_of.dual_averaging_adaptation(acceptance)

    def log_density(point: Array) -> Array:
        value = log_joint(bent(bend, point), data)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def advance(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, tuning, room = carry
        own = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
        length = jax.random.uniform(jax.random.fold_in(shared, i), (), minval=shortest, maxval=longest)
        allowed = jnp.exp(jnp.where(i <= warmup, tuning.log_step_size, tuning.log_step_size_avg))
        steps = jnp.where(i > 0, jnp.minimum(jnp.ceil(length / allowed), MOST_STEPS), 1).astype(int)
        # the first trajectory has no length: it computes density and gradient where the chains start
        step_size = jnp.where(i > 0, jnp.minimum(length / steps, allowed), 0.0)
        move = lambda key, state: kernel(key, state, log_density, step_size, covariance, steps)
        moved, info = jax.vmap(move)(own, states)
        kinetic = 0.5 * jnp.einsum("ci,ij,cj->c", info.momentum, covariance, info.momentum)
        tuning = jax.tree.map(
            lambda new, old: jnp.where((i > 0) & (i <= warmup), new, old),
            adapt(tuning, info.acceptance_rate.mean()),
            tuning,
        )
        record = (
            *(moved.position, -moved.logdensity, info.is_divergent, kinetic - states.logdensity),
            *(jnp.asarray(steps, float), info.acceptance_rate, step_size),
        )
        place = jnp.maximum(i - warmup - 1, 0)
        return moved, tuning, tuple(x.at[:, place].set(y) for x, y in zip(room, record, strict=True))

    (shortest, longest), (number, dim) = LENGTHS, start.shape
    shared = jax.random.fold_in(keys[0], 1 + warmup + draws)  # a number that no step of a chain has
    nowhere = hmc.HMCState(start, jnp.full(number, -jnp.inf), jnp.zeros((number, dim)))
    blank = jnp.zeros((number, draws))
    room = jnp.zeros((number, draws, dim)), blank, blank > 0, *(blank for _ in range(4))
    first = nowhere, initialise(FIRST_STEP), room
    z, *rest = jax.lax.fori_loop(0, 1 + warmup + count, advance, first)[2]
    return Draws(bent(bend, z), *rest)


def nuts_chains(
    keys: Array,
    start: Float[Array, "chain dim"],
    covariance: Float[Array, "dim dim"],
    bend: Bend,
    data: Any,
    count: Int[Array, ""],
    acceptance: Float[Array, ""],
    *,
    log_joint: LogDensity,
    warmup: int,
    draws: int,
) -> Draws:
    """Run one NUTS chain for each key; other values of ``data``, ``count`` or ``acceptance`` compile nothing.

    :data:`nuts` is the compiled form.

    ``data`` is what ``log_joint(z, data)`` takes: inputs, what was observed (with weights of the conditions), widths of the prior.
    Only the first ``count`` of the ``draws`` places are filled; steps are as long as a mean ``acceptance`` allows.

    The chains run in the straight coordinates of ``bend``, where they begin at ``start``; draws are of the posterior's own. The mass matrix
    is dense and starts at ``covariance``, so that combinations of parameters that the data fix are as easy as single ones.
    """

    def chain(key: Array, z: Array) -> tuple[Array, ...]:
        def potential(point: Array) -> Array:
            energy = -log_joint(bent(bend, point), data)
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
    return Draws(bent(bend, z), potential, diverging, energy, steps.astype(float), accepted, step_size)


export.register_namedtuple_serialization(Draws, serialized_name="escape_inference.Draws")
STATIC = ("log_joint", "warmup", "draws")
# without fusion emitters it compiles in half the time, and a few points at a time are nearly as fast
FEW_POINTS = OPTIONS | {"xla_cpu_use_fusion_emitters": False}
hmc = Ahead(hmc_chains, static=STATIC, options=FEW_POINTS)
nuts = Ahead(nuts_chains, static=STATIC, options=FEW_POINTS)
