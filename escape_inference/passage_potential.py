"""The logarithmic potential of noise that grows as a power of the loss, fast and exactly differentiable at the nodes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def fast_expm1(z: Array) -> Array:
    """``eᶻ − 1`` to full relative accuracy for z < 10, several times faster than the library function.

    >>> from escape_inference.precision import float64
    >>> float(float64(fast_expm1)(1e-9)), float(float64(fast_expm1)(1.0))
    (1.00000000050000...e-09, 1.718281828459...)
    """
    half = jnp.tanh(jnp.asarray(z, float) / 2)
    return 2 * half / (1 - half)


@jax.custom_jvp
def potential(log_x: Array, noise_exponent: Array) -> Array:
    """``ΔU_q = (x^(1−q) − 1)/(1−q)`` from ``log x``, for ``x^(1−q)`` up to some e¹⁰; ``log x`` at q = 1.

    >>> from escape_inference.precision import float64
    >>> at_one, near_one = float64(lambda: potential(jnp.log(3.0), jnp.array([1.0, 1.5])))()
    >>> round(float(at_one), 6), round(float(near_one), 6)  # log 3 and 2 (1 − 1/√3)
    (1.098612, 0.845299)
    """
    stretch = 1 - noise_exponent
    stretch = jnp.where(jnp.abs(stretch) < 1e-12, 1e-12, stretch)
    return fast_expm1(stretch * log_x) / stretch


@potential.defjvp
def _potential_jvp(arguments: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    log_x, q = arguments
    value = potential(log_x, q)
    return value, (1 + (1 - q) * value) * tangents[0] + potential_slope(log_x, value, q) * tangents[1]


def potential_slope(log_x: Array, potential: Array, noise_exponent: Array) -> Array:
    """``∂ΔU_q/∂q`` at a loss ratio whose logarithm and ΔU_q are given.

    >>> from escape_inference.precision import float64
    >>> float(float64(lambda: potential_slope(jnp.log(2.0), jnp.log(2.0), jnp.ones(())))())  # −(log 2)²/2
    -0.2402265069591...
    """
    stretch = 1 - noise_exponent
    z = stretch * log_x
    series: Array | float = 1 / 45360
    for k in (5760, 840, 144, 30, 8, 3, 2):
        series = 1 / k + z * series
    gap = jnp.where(stretch == 0, 1.0, stretch)
    return jnp.where(jnp.abs(z) < 0.15, -(log_x**2) * series, (potential - log_x * (1 + stretch * potential)) / gap)
