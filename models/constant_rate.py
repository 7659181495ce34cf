"""Constant rate: the null hypothesis that the barrier does not matter.

    κ = ρ h*

One escape for every 1/ρ relaxation times, whatever the barrier, the learning rate and the batch size. A law that cannot beat
this one has learned nothing from the settings.

It must fail wherever escapes become rarer at smaller learning rates by more than the clock η alone explains.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from escape_inference.law import Law, Parameter, Setting, Values


def temperature(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """``η h*/B``; this law makes no use of it."""
    return setting.diffusion_scale


def log_rate(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """Log of κ = ρ h*."""
    return jnp.log(values["rate_scale"]) + jnp.log(setting.hessian_minimum)


LAW = Law(
    name="constant_rate",
    title="constant rate (null)",
    source="null hypothesis",
    parameters=(
        Parameter(
            name="rate_scale",
            median=0.03,
            width=2.0,
            reason="metastable escapes are slower than the relaxation: 90 % of the prior between 0.001 and 0.8 of it",
        ),
    ),
    temperature=temperature,
    log_rate=log_rate,
    equation="κ = ρ h*",
    temperature_equation="T = η h*/B (not used)",
)
