"""Exact first-passage laws of a loss threshold in an isotropic quadratic well, in log space and with exact gradients.

The loss of a quadratic well of dimension n, driven by noise that grows as the loss to the power q, is a one-dimensional
diffusion of ``x = L/L*``. In units of 1/h*, with ``ΔU_q(x) = (x^(1−q) − 1)/(1−q)`` and T = η h*/B, it has the scale density
``s = e^{ΔU_q/T} (x−1)^(−n/2)`` and the speed density ``m = x^(−q) (x−1)^(n/2−1) e^{−ΔU_q/T}/(2T)``. With ``(Gf)(x) = ∫ₓᶜ s ∫₁ʸ f m``:

- from the minimum the mean time to ``x = c`` is ``(G1)(1)``, and κ is its inverse;
- from the quasi-stationary state the time is exponential with the leading eigenvalue λ₁ of ``G⁻¹`` (Le Bris, Lelièvre, Luskin
  and Perez 2012).

The integrals are those of any one-dimensional diffusion (Karlin and Taylor 1981, section 15.3; Pollak, Talkner 1990). The
exponent of Mori et al. (ICML 2022) is the limit of large c at q = 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from escape_inference.passage_edges import Vector
from escape_inference.passage_leading import leading_time
from escape_inference.passage_operator import Slopes, constant, drive, generator_of, log_slopes
from escape_inference.passage_panels import build_grid

LOOK_SHIFT = 0.5826
BLOCK = 1024


def log_potential(barrier_ratio: ArrayLike, noise_exponent: ArrayLike) -> Float[Array, "..."]:
    """``ΔU_q(c) = (c^(1−q) − 1)/(1−q)``, the barrier in units of T; ``log c`` at q = 1, with exact derivatives through it.

    >>> float(log_potential(3.0, 0.0)), float(log_potential(3.0, 1.0)), float(log_potential(4.0, 1.5))
    (2.0, 1.0986..., 1.0)
    """
    log_ratio, q = jnp.log(jnp.asarray(barrier_ratio, float)), jnp.asarray(noise_exponent, float)
    z = (1 - q) * log_ratio
    small = jnp.abs(z) < 0.5
    near, far = jnp.where(small, z, 0.0), jnp.where(small, 1.0, z)
    series = jnp.ones_like(near)
    for k in range(14, 1, -1):
        series = 1 + near / k * series
    return log_ratio * jnp.where(small, series, jnp.expm1(far) / far)


def overshoot_ratio(
    barrier_ratio: ArrayLike,
    temperature: ArrayLike,
    noise_exponent: ArrayLike,
    step: ArrayLike,
    check_interval: ArrayLike = 1,
) -> Float[Array, "..."]:
    """The barrier ratio that a continuous path has to reach where a walk is looked at once in a while.

    The threshold radius ``√(c − 1)`` is moved out by 0.5826 standard deviations of the walk between two looks,
    ``√(m η h* T c^q)`` (Broadie, Glasserman and Kou 1997), for looks every m iterations.

    Args:
        barrier_ratio: c = L^s/L*, above 1.
        temperature: T at the minimum, any scale factor included.
        noise_exponent: q.
        step: η h*.
        check_interval: m, iterations between looks.

    >>> round(float(overshoot_ratio(1.5, 0.1, 1.0, 0.1, 1)), 3)
    1.606
    """
    c = jnp.asarray(barrier_ratio, float)
    variance = check_interval * step * temperature * c ** jnp.asarray(noise_exponent, float)
    return 1 + (jnp.sqrt(c - 1) + LOOK_SHIFT * jnp.sqrt(variance)) ** 2


def log_mean_passage_rate(
    temperature: ArrayLike, barrier_ratio: ArrayLike, dimension: ArrayLike, noise_exponent: ArrayLike
) -> Float[Array, "..."]:
    """``log(κ/h*)``, κ the inverse of the mean time in which the loss, started at the minimum, first exceeds c L*.

    Args:
        temperature: T = η h*/B, positive.
        barrier_ratio: c = L^s/L*, above 1.
        dimension: n, positive, not necessarily an integer.
        noise_exponent: q; 1 is the power law, 0 noise frozen at its value at the minimum.

    Returns:
        The arguments broadcast against each other. In double precision the relative error of κ is below 1e-6 for
        0.005 ≤ T ≤ 1, c ≤ 50, 0.5 ≤ n ≤ 200, −0.5 ≤ q ≤ 2.5.

    >>> from escape_inference.precision import float64
    >>> round(float(jnp.exp(float64(log_mean_passage_rate)(0.1, 1.7, 4, 1.0))), 6)
    0.163556
    """
    return _broadcast(_mean_rate, temperature, barrier_ratio, dimension, noise_exponent)


def log_leading_rate(
    temperature: ArrayLike, barrier_ratio: ArrayLike, dimension: ArrayLike, noise_exponent: ArrayLike
) -> Float[Array, "..."]:
    """``log(λ₁/h*)``, λ₁ the escape rate over the threshold from the quasi-stationary state.

    Args:
        temperature: T = η h*/B, positive.
        barrier_ratio: c = L^s/L*, above 1.
        dimension: n, positive, not necessarily an integer.
        noise_exponent: q.

    Returns:
        The arguments broadcast against each other. In double precision the relative error of λ₁ is below 1e-6 over the range of
        the mean passage rate, but for the corner n > 100, q > 1.5, c > 10 (no well, λ₁ of many h*), where it can be a factor off.

    >>> from escape_inference.precision import float64
    >>> round(float(jnp.exp(float64(log_leading_rate)(0.1, 1.7, 4, 1.0))), 5)
    0.18667
    """
    return _broadcast(_leading_rate, temperature, barrier_ratio, dimension, noise_exponent)


def _broadcast(law: Callable[[Vector, Vector, Vector, Vector], Vector], *arguments: ArrayLike) -> Float[Array, "..."]:
    T, c, n, q = jnp.broadcast_arrays(*(jnp.asarray(x, float) for x in arguments))
    if T.dtype != jnp.float64:
        raise TypeError("passage rates need double precision: call them inside `with jax.enable_x64(True):`")
    flat = (T.ravel(), c.ravel() - 1, n.ravel(), q.ravel())
    if T.size == 0:
        return jnp.zeros(T.shape)
    if any(isinstance(x, jax.core.Tracer) for x in flat):
        return law(*flat).reshape(T.shape)
    # numbers at hand: blocks of one size, so that every law and every table share one compiled program, and of like conditions,
    # so that those without a well do not make the others wait
    columns = np.stack([np.asarray(x) for x in flat])
    order = np.argsort(columns[0] * columns[2] / columns[1])
    blocks = -(-T.size // BLOCK)
    sorted_columns = np.pad(columns[:, order], ((0, 0), (0, blocks * BLOCK - T.size)), mode="edge")
    parts = [np.asarray(_COMPILED[law](*jnp.asarray(part))) for part in np.split(sorted_columns, blocks, axis=1)]
    result = np.empty(T.size)
    result[order] = np.concatenate(parts)[: T.size]
    return jnp.asarray(result).reshape(T.shape)


Evaluate = Callable[[Vector, Vector, Vector, Vector], tuple[Vector, Slopes]]


def _rate(evaluate: Evaluate) -> Callable[[Vector, Vector, Vector, Vector], Vector]:
    """The log rate of a log time, differentiated by the slopes that come with it."""

    @jax.custom_jvp
    def rate(T: Vector, excess: Vector, n: Vector, q: Vector) -> Vector:
        return -evaluate(T, excess, n, q)[0]

    @rate.defjvp
    def rate_jvp(arguments: tuple[Vector, ...], tangents: tuple[Vector, ...]) -> tuple[Vector, Vector]:
        log_time, slopes = evaluate(*arguments)
        change = sum(
            (slope * tangent for slope, tangent in zip(slopes, tangents, strict=True)), jnp.zeros_like(log_time)
        )
        return -log_time, -change

    return rate


def _mean_time(temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector) -> tuple[Vector, Slopes]:
    """``log(τ h*)``, τ = (G1)(1), and its derivatives in T, c, n, q."""
    generator = generator_of(build_grid(temperature, excess, dimension, noise_exponent))
    one = constant(generator)
    driven = drive(generator, one)
    log_time = jnp.log(driven.density.sum()) + generator.log_scale - jnp.log(temperature)
    return log_time, log_slopes(generator, one, driven, one, temperature, noise_exponent)


def _leading_time(
    temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector
) -> tuple[Vector, Slopes]:
    """``log(h*/λ₁)`` and its derivatives."""
    generator = generator_of(build_grid(temperature, excess, dimension, noise_exponent))
    return leading_time(generator, temperature, excess, dimension, noise_exponent)


# without the expensive passes compilation takes a third of the time and the program runs as fast
FAST_COMPILATION = {"xla_llvm_disable_expensive_passes": True}
_mean_rate, _leading_rate = _rate(_mean_time), _rate(_leading_time)
_COMPILED = {law: jax.jit(law, compiler_options=FAST_COMPILATION) for law in (_mean_rate, _leading_rate)}
