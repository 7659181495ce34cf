"""Test of a life table against the exponential with a fitted rate, calibrated by simulating the same experiment."""

import numpy as np
import pandas as pd
from jaxtyping import Float


def exponential_test(
    table: pd.DataFrame, check_interval: int, replicates: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of one condition from the exponential, and its p-value by parametric bootstrap.

    The distance is the greatest difference, over the edges of the table, between the product-limit survival and the
    survival of the exponential of greatest likelihood. Each replicate draws the escapes interval by interval from that
    exponential (binomial among the runs at risk), removes the censored in the observed proportion of those then at
    risk, and refits the rate.

    Args:
        table: rows of ``Conditions.life_table`` for one condition: ``upper`` (iterations), ``escapes``, ``censored``.
        check_interval: iterations between looks; an escape is noticed at a look only.
        replicates: size of the bootstrap.
        rng: source of randomness.

    Returns:
        Distance and p-value.

    >>> table = pd.DataFrame({"upper": [10.0, 20.0, 30.0], "escapes": [50, 25, 13], "censored": [0, 0, 12]})
    >>> distance, p_value = exponential_test(table, 10, 200, np.random.default_rng(0))
    >>> round(distance, 3), p_value > 0.5
    (0.003, True)
    """
    upper = table["upper"].to_numpy(np.float64)
    died, lost = table["escapes"].to_numpy(np.int64), table["censored"].to_numpy(np.int64)
    looks = np.floor(upper / check_interval) * check_interval
    width = np.diff(looks, prepend=0.0)
    if (died[width == 0] > 0).any():
        # escapes between looks: the recorded times are not on a grid, take them as they are
        width = np.diff(upper, prepend=0.0)
    width = width / upper.max()
    at_risk = (died + lost)[::-1].cumsum()[::-1]
    survivors = at_risk - died
    rate = _rate(died[None], survivors[None], width)
    distance = _distance(died[None], at_risk[None], rate, width)[0]
    leave = np.divide(lost, survivors, out=np.zeros(len(lost)), where=survivors > 0)
    hazard = -np.expm1(-rate[0] * width)
    count = np.full(replicates, at_risk[0])
    simulated_died = np.empty((replicates, len(width)), dtype=np.int64)
    simulated_risk = np.empty_like(simulated_died)
    for j in range(len(width)):
        simulated_risk[:, j] = count
        simulated_died[:, j] = rng.binomial(count, hazard[j])
        count = count - simulated_died[:, j]
        if leave[j] > 0:
            count = count - (count if leave[j] >= 1 else rng.binomial(count, leave[j]))
    simulated_rate = _rate(simulated_died, simulated_risk - simulated_died, width)
    simulated = _distance(simulated_died, simulated_risk, simulated_rate, width)
    return float(distance), float((1 + (simulated >= distance - 1e-12).sum()) / (1 + replicates))


def _rate(
    died: Float[np.ndarray, "replicate interval"],
    survivors: Float[np.ndarray, "replicate interval"],
    width: Float[np.ndarray, "interval"],
) -> Float[np.ndarray, "replicate"]:
    """Rate of greatest likelihood: the root of ``Σ d w / (e^(κw) − 1) = Σ s w``, by Newton steps in log κ."""
    exposure = survivors @ width
    log_rate = np.log(np.maximum(died.sum(axis=1), 0.5) / (exposure + 0.5 * (died @ width)))
    for _ in range(50):
        y = np.clip(np.exp(log_rate)[:, None] * width, 1e-12, 600.0)
        share = y / np.expm1(y)
        gradient = (died * share).sum(axis=1) - np.exp(log_rate) * exposure
        bend = (died * share * (y + share - 1.0)).sum(axis=1) + np.exp(log_rate) * exposure
        move = np.clip(gradient / np.maximum(bend, 1e-12), -1.0, 1.0)
        log_rate = np.clip(log_rate + move, -50.0, 50.0)
        if np.abs(move).max() < 1e-9:
            break
    return np.exp(log_rate)


def _distance(
    died: Float[np.ndarray, "replicate interval"],
    at_risk: Float[np.ndarray, "replicate interval"],
    rate: Float[np.ndarray, "replicate"],
    width: Float[np.ndarray, "interval"],
) -> Float[np.ndarray, "replicate"]:
    """Greatest difference between the two survival curves over the edges reached by someone."""
    left = 1.0 - np.divide(died, at_risk, out=np.zeros(died.shape), where=at_risk > 0)
    product_limit = np.cumprod(left, axis=1)
    exponential = np.exp(-rate[:, None] * np.cumsum(width))
    difference = np.where(at_risk > 0, np.abs(product_limit - exponential), 0.0)
    return np.asarray(difference.max(axis=1))
