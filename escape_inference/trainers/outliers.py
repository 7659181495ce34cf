"""How many eigenvalues stand out of the bulk of a spectrum, with an uncertainty.

The rule. Near its upper edge a bulk has order statistics: if the largest m eigenvalues of a bulk fall off like a power
(any power), then ``j log(lambda_j / lambda_{j+1})`` for j = 1, 2, ... are independent exponential numbers with one mean
(Renyi 1953; the basis of Hill's estimator, 1975). An outlier breaks this: it may lie anywhere above the bulk. So each
number n of outliers is a hypothesis with a likelihood,

- the n largest eigenvalues have a uniform density in the logarithm, over a factor ``WIDEST`` above the bulk's edge;
- the others, counted anew from the edge, have exponential spacings as above, their unknown mean integrated out,

and with equal prior weights the likelihoods give a probability of each n. The number reported is the most probable one,
its error the root mean square distance from it under these probabilities. At least one eigenvalue counts (the direction
of escape), and at least ``LEAST_BULK`` must be left for the bulk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln, logsumexp

WIDEST = 1e3
"""Outliers are looked for up to this factor above the bulk's edge."""
LEAST_BULK = 4
"""Fewest eigenvalues that make a bulk."""


@dataclass(frozen=True)
class OutlierCount:
    """The number of outliers.

    Attributes:
        count: the most probable number n.
        se: root mean square distance from it; NaN where there are too few eigenvalues to tell, so few that the number
            of outliers is the largest that they allow.
        probabilities: of n = 1, 2, ...
        bulk_edge: the eigenvalue n + 1, the top of the bulk, 1/time (NaN if none is known).
        gap: eigenvalue n over the bulk's edge.
    """

    count: int
    se: float
    probabilities: Float[np.ndarray, " n"]
    bulk_edge: float
    gap: float


def count_outliers(eigenvalues: Float[np.ndarray, " k"]) -> OutlierCount:
    """Count the eigenvalues above the bulk; see the module's docstring for the rule.

    Args:
        eigenvalues: the largest of a spectrum, 1/time, converged, largest first; only the positive ones are used. About
            twenty beyond the outliers tell the bulk well. With fewer than ``LEAST_BULK + 1`` positive ones those above
            the widest relative gap are counted, without an error; nor has a count one that is the largest possible.

    Examples:
        >>> bulk = 0.3 * np.arange(1, 21) ** -0.5
        >>> found = count_outliers(np.array([8.0, 5.0, 2.0, *bulk]))
        >>> found.count, round(found.se, 2), round(found.gap, 2), found.bulk_edge
        (3, 1.03, 6.67, 0.3)

    References:
        A. Renyi, Acta Math. Acad. Sci. Hung. 4, 191 (1953); B. M. Hill, Ann. Stat. 3, 1163 (1975).
    """
    positive = np.sort(eigenvalues[eigenvalues > 0])[::-1].astype(float)
    spacings = -np.diff(np.log(positive))
    size = len(positive)
    if size <= LEAST_BULK:
        if size < 2:
            return OutlierCount(size, float("nan"), np.ones(size), float("nan"), float("nan"))
        count = int(np.argmax(spacings)) + 1
        return OutlierCount(count, float("nan"), np.ones(0), float(positive[count]), float(np.exp(spacings[count - 1])))
    candidates = np.arange(1, size - LEAST_BULK + 1)
    scores = np.array([_log_likelihood(spacings, int(n)) for n in candidates])
    probabilities = np.exp(scores - logsumexp(scores))
    count = int(candidates[np.argmax(probabilities)])
    error = float(np.sqrt(probabilities @ (candidates - count) ** 2)) if count < candidates[-1] else float("nan")
    return OutlierCount(count, error, probabilities, float(positive[count]), float(np.exp(spacings[count - 1])))


def _log_likelihood(spacings: Float[np.ndarray, " s"], count: int) -> float:
    """Of the logarithms of all eigenvalues but the smallest, if ``count`` of them are outliers."""
    bulk = spacings[count:]
    number = len(bulk)
    weights = np.arange(1, number + 1)
    total = max(float(weights @ bulk), np.finfo(float).tiny)
    if spacings[:count].sum() > np.log(WIDEST):
        outliers = -count * np.log(spacings[:count].sum())
    else:
        outliers = -count * np.log(np.log(WIDEST))
    return float(gammaln(count + 1) + outliers + np.log(weights).sum() + gammaln(number) - number * np.log(total))
