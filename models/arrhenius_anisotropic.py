"""Arrhenius law with anisotropic noise: aligned with the Hessian, but not growing with the loss.

    κ = sqrt(h* h^s)/(2π) · exp(−ΔL B/(η s h*)),   ΔL = L^s − L*

Zhu et al. 2019; Xie, Sato, Sugiyama 2021. The noise along a direction of curvature h has covariance 2(η/B) s h per unit time with one
strength s (a loss). For a loss threshold the rate is the exact first-passage rate in an isotropic quadratic well of dimension n
with that noise; its temperature at the minimum is η s h*/(B L*).

It must fail where the noise at a minimum scales with the loss there: minima of different loss then need different s.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from escape_inference.law import (
    Law,
    Parameter,
    Setting,
    Values,
    kramers_log_prefactor,
    threshold_log_rate,
    typical_loss,
)
from escape_inference.models.power_law import EFFECTIVE_DIMENSION


def temperature(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """``η s h*/(B L*)``: the temperature of the noise in units of the loss at the minimum."""
    return values["noise_strength"] * setting.diffusion_scale / setting.loss_minimum


def log_rate(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """Log of κ: Kramers over a saddle, the exact passage law (noise exponent 0) over a threshold."""
    t = temperature(values, setting)
    if setting.barrier == "threshold":
        return threshold_log_rate(setting, t, values["effective_dimension"], 0.0)
    return kramers_log_prefactor(setting) - jnp.expm1(setting.log_barrier) / t


LAW = Law(
    name="arrhenius_anisotropic",
    title="Arrhenius (noise along the Hessian)",
    source="Zhu et al. 2019; Xie, Sato, Sugiyama 2021",
    parameters=(
        Parameter(
            name="noise_strength",
            median=typical_loss,
            width=1.5,
            unit="loss",
            reason="the noise of SGD half-way up a typical barrier is sqrt(L* L^s) times the Hessian; a factor of 4.5 either way",
        ),
        dataclasses.replace(EFFECTIVE_DIMENSION, barriers=("threshold",)),
    ),
    temperature=temperature,
    log_rate=log_rate,
    equation="κ = sqrt(h* h^s)/(2π) · exp(−(L^s − L*) B/(η s h*)) over a saddle; "
    "over a threshold the first-passage rate in a quadratic well of dimension n, noise ∝ loss^0",
    temperature_equation="T = η s h*/(B L*)",
)
