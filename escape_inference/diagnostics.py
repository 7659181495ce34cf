"""Did the sampler converge? The gate that every fit passes before it may say anything."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from escape_inference.later import library

RHAT_LIMIT = 1.01
ESS_PER_CHAIN = 100
BFMI_LIMIT = 0.3
FEWEST_CHAINS = 4  #: with fewer, R-hat says too little about chains that agree by chance


class Convergence(NamedTuple):
    """Worst values over the sampled variables, and what they say (Vehtari et al. 2021; Betancourt 2017)."""

    rhat_max: float
    ess_min: float
    divergences: int
    bfmi_min: float
    trustworthy: bool
    reason: str


def check_convergence(
    z: Float[np.ndarray, "chain draw dim"], diverging: np.ndarray, energy: Float[np.ndarray, "chain draw"]
) -> Convergence:
    """Rank-normalised R-hat < 1.01, bulk and tail ESS of 100 a chain, no divergence, E-BFMI of 0.3; else not trustworthy.

    >>> draws = np.random.default_rng(0).normal(size=(4, 500, 2))
    >>> check_convergence(draws, np.zeros((4, 500), bool), draws[..., 0]).trustworthy
    True
    >>> check_convergence(draws + np.arange(4)[:, None, None], np.zeros((4, 500), bool), draws[..., 0]).trustworthy
    False
    """
    array_stats = library("arviz_stats.base").array_stats

    columns = np.moveaxis(np.asarray(z, float), -1, 0)
    rhat = float(np.max([array_stats.rhat(c, chain_axis=0, draw_axis=1) for c in columns]))
    ess = float(
        np.min(
            [
                array_stats.ess(c, chain_axis=0, draw_axis=1, method=m, prob=(0.05, 0.95) if m == "tail" else None)
                for c in columns
                for m in ("bulk", "tail")
            ]
        )
    )
    step = np.diff(energy, axis=1)
    bfmi = float(np.min(np.mean(step**2, axis=1) / np.var(energy, axis=1)))
    divergences = int(np.sum(diverging))
    limit = ESS_PER_CHAIN * columns.shape[1]
    failures = [
        text
        for failed, text in (
            (not rhat < RHAT_LIMIT, f"R-hat {rhat:.3f} (must be below {RHAT_LIMIT})"),
            (not ess >= limit, f"effective sample size {ess:.0f} (must be {limit} or more)"),
            (divergences > 0, f"{divergences} divergences"),
            (not bfmi >= BFMI_LIMIT, f"E-BFMI {bfmi:.2f} (must be {BFMI_LIMIT} or more)"),
        )
        if failed
    ]
    return Convergence(rhat, ess, divergences, bfmi, not failures, "; ".join(failures))


def with_too_few_chains(convergence: Convergence, chains: int) -> Convergence:
    """The same, not trustworthy if there are fewer than four chains.

    >>> fine = Convergence(1.001, 900.0, 0, 0.9, True, "")
    >>> with_too_few_chains(fine, 4).trustworthy, with_too_few_chains(fine, 2).reason
    (True, '2 chains (must be 4 or more)')
    """
    if chains >= FEWEST_CHAINS:
        return convergence
    text = f"{chains} chains (must be {FEWEST_CHAINS} or more)"
    return convergence._replace(trustworthy=False, reason="; ".join(filter(None, (convergence.reason, text))))
