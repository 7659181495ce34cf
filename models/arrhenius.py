"""Arrhenius law with uniform noise: the noise is the same everywhere, in every direction and at every minimum.

    κ = sqrt(h* h^s)/(2π) · exp(−ΔL B/(η D)),   ΔL = L^s − L*

Kramers 1940; for SGD as gradient Langevin dynamics: Jastrzębski et al. 2017. The noise covariance per unit time is 2(η/B) D·I with
one strength D (loss/time). For a loss threshold the rate is the exact first-passage rate in an isotropic quadratic well of
dimension n with noise that does not depend on the loss; its temperature at the minimum is η D/(B L*).

It must fail where the noise grows with the loss, as it does for SGD with the mean-square loss.
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
    typical_noise_strength,
)
from escape_inference.models.power_law import EFFECTIVE_DIMENSION


def temperature(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """``η D/(B L*)``: the temperature of noise of strength D in units of the loss at the minimum."""
    return values["noise_strength"] * setting.learning_rate / (setting.batch_size * setting.loss_minimum)


def log_rate(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """Log of κ: Kramers over a saddle, the exact passage law (noise exponent 0) over a threshold."""
    t = temperature(values, setting)
    if setting.barrier == "threshold":
        return threshold_log_rate(setting, t, values["effective_dimension"], 0.0)
    return kramers_log_prefactor(setting) - jnp.expm1(setting.log_barrier) / t


LAW = Law(
    name="arrhenius",
    title="Arrhenius (uniform noise)",
    source="Kramers 1940; Jastrzębski et al. 2017",
    parameters=(
        Parameter(
            name="noise_strength",
            median=typical_noise_strength,
            width=1.5,
            unit="loss/time",
            reason="the noise of SGD half-way up a typical barrier is h* sqrt(L* L^s); a factor of 4.5 either way",
        ),
        dataclasses.replace(EFFECTIVE_DIMENSION, barriers=("threshold",)),
    ),
    temperature=temperature,
    log_rate=log_rate,
    equation="κ = sqrt(h* h^s)/(2π) · exp(−(L^s − L*) B/(η D)) over a saddle; "
    "over a threshold the first-passage rate in a quadratic well of dimension n, noise ∝ loss^0",
    temperature_equation="T = η D/(B L*)",
)
