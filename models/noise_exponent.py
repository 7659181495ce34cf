"""Noise exponent family: the noise grows as the loss to the power q.

    log κ = ½ log(h* h^s) − log 2π − q (1 − n/2) ΔU − ΔU_q/T,   ΔU_q = (c^{1−q} − 1)/(1 − q),   c = L^s/L*,   T = α η h*/B

Kramers' rate for state-dependent noise (Itô) whose covariance along the escape direction is 2 η L*^{1−q} L^q h*/B per unit time.
q = 1 is the power law of Mori et al. 2022 exactly; q = 0 is an Arrhenius law with the noise frozen at its value at each minimum. The
posterior of q answers "power law or Arrhenius?" on a continuous scale. For a loss threshold the rate is the exact first-passage
rate of the same diffusion in an isotropic quadratic well of dimension n.

It must fail where the noise is no function of the loss alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from escape_inference.law import Law, Parameter, Setting, Values, kramers_log_prefactor, threshold_log_rate
from escape_inference.models.power_law import EFFECTIVE_DIMENSION, TEMPERATURE_SCALE, temperature
from escape_inference.passage import log_potential


def log_rate(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """Log of κ: the formula above over a saddle, the exact passage law over a threshold."""
    t, n, q = temperature(values, setting), values["effective_dimension"], values["noise_exponent"]
    if setting.barrier == "threshold":
        return threshold_log_rate(setting, t, n, q)
    potential = log_potential(jnp.exp(setting.log_barrier), q)
    return kramers_log_prefactor(setting) - q * (1 - n / 2) * setting.log_barrier - potential / t


LAW = Law(
    name="noise_exponent",
    title="noise exponent family (noise ∝ loss^q)",
    source="Kramers' rate with noise ∝ L^q; q = 1: Mori et al., ICML 2022",
    parameters=(
        Parameter(
            name="noise_exponent",
            median=0.5,
            width=0.75,
            positive=False,
            theory=1.0,
            reason="even between q = 0 (Arrhenius) and q = 1 (power law), with room beyond both",
        ),
        TEMPERATURE_SCALE,
        EFFECTIVE_DIMENSION,
    ),
    temperature=temperature,
    log_rate=log_rate,
    special_cases=("power_law",),
    points=(("noise_exponent", 0.0), ("noise_exponent", 1.0)),
    equation="log κ = ½ log(h* h^s) − log 2π − q (1 − n/2) ΔU − ((L^s/L*)^(1−q) − 1)/((1 − q) T) over a saddle; "
    "over a threshold the first-passage rate in a quadratic well of dimension n, noise ∝ loss^q",
    temperature_equation="T = α η h*/B",
)
