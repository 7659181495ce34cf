"""Power law: the noise of SGD is proportional to the loss.

    κ = sqrt(h* h^s)/(2π) · (L^s/L*)^−(1/T + 1 − n/2),   T = α η h*/B

T. Mori, L. Ziyin, K. Liu, M. Ueda, *Power-Law Escape Rate of SGD*, ICML 2022. h* and h^s are the curvatures along the escape
direction at the minimum and (in absolute value) at the saddle, L* and L^s the losses there, n the number of outlier eigenvalues
of the Hessian. For a loss threshold in place of a saddle the rate is the exact first-passage rate of the same diffusion in an
isotropic quadratic well of dimension n, without the limit of a small temperature.

It must fail where the noise is not proportional to the loss (label noise at zero loss, gradient noise added by hand), where the
mini-batch noise is far from Gaussian (single extreme samples), and for η h* of order one, where SGD is no diffusion. The formula over a
saddle is the leading order in T: at barriers of ΔU = 2 T to 5 T, n is read too high by about T/ΔU.
"""

from jaxtyping import Array, Float

from escape_inference.law import Law, Parameter, Setting, Values, kramers_log_prefactor, threshold_log_rate


def temperature(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """``T = α η h*/B``, in units of the logarithm of the loss."""
    return values["temperature_scale"] * setting.diffusion_scale


def log_rate(values: Values, setting: Setting) -> Float[Array, " condition"]:
    """Log of κ: Mori et al. over a saddle, the exact passage law (noise exponent 1) over a threshold."""
    t, n = temperature(values, setting), values["effective_dimension"]
    if setting.barrier == "threshold":
        return threshold_log_rate(setting, t, n, 1.0)
    return kramers_log_prefactor(setting) - (1 / t + 1 - n / 2) * setting.log_barrier


TEMPERATURE_SCALE = Parameter(
    name="temperature_scale",
    median=1.0,
    width=0.7,
    theory=1.0,
    reason="the theory says 1; real mini-batch noise and curvature measured along another direction shift it by a factor of about 2",
)
EFFECTIVE_DIMENSION = Parameter(
    name="effective_dimension",
    median=3.0,
    width=1.0,
    reason="the number of outlier eigenvalues is about the number of classes or outputs: 90 % between 0.6 and 16",
)
LAW = Law(
    name="power_law",
    title="power law (noise ∝ loss)",
    source="Mori, Ziyin, Liu, Ueda, ICML 2022",
    parameters=(TEMPERATURE_SCALE, EFFECTIVE_DIMENSION),
    temperature=temperature,
    log_rate=log_rate,
    equation="κ = sqrt(h* h^s)/(2π) · (L^s/L*)^−(1/T + 1 − n/2) over a saddle; "
    "over a threshold the first-passage rate in a quadratic well of dimension n, noise ∝ loss^1",
    temperature_equation="T = α η h*/B",
)
