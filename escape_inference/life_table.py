"""Escape times of many conditions in a few intervals each: for likelihoods (``times``) and for checks (``life_table``).

Both start from the table of equal rows ``condition, steps, escapes, censored``, sorted by condition and steps.
"""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

MOST_ROWS = 64
_CENSORED_ROWS = 16
_QUANTILES = 128
TESTED_ESCAPES = 20


def exact_or_binned_times(rows: pd.DataFrame, check_interval: Int[np.ndarray, "condition"]) -> pd.DataFrame:
    """Intervals that hold the escapes, at most 64 rows for each condition.

    With few distinct values they are the exact intervals ``(steps − check_interval, steps]``; with more, neighbouring
    ones are joined at quantiles that are equally spaced in ``arcsin(sqrt(p))``: similar counts in the bulk, finer in
    both tails, which say most about the shape. The first then starts at 0 and each at the end of the one before.
    Censored runs get rows of their own, at their exact lengths or, beyond 16 distinct lengths, at the means of groups
    (so that their exposure is exact).

    Args:
        rows: ``condition``, ``steps``, ``escapes``, ``censored``, sorted by condition and steps.
        check_interval: iterations between looks.

    Returns:
        ``condition, lower, upper, escapes, censored``; ``lower`` and ``upper`` in iterations.

    >>> rows = pd.DataFrame({"condition": 0, "steps": [30, 40, 90], "escapes": [2, 1, 0], "censored": [0, 0, 5]})
    >>> exact_or_binned_times(rows, np.array([10])).to_numpy().astype(int).tolist()
    [[0, 20, 30, 2, 0], [0, 30, 40, 1, 0], [0, 80, 90, 0, 5]]
    """
    conditions = len(check_interval)
    censored = _binned(rows[rows["censored"] > 0], "censored", np.full(conditions, _CENSORED_ROWS))
    used = np.bincount(censored["condition"], minlength=conditions)
    escaped = _binned(rows[rows["escapes"] > 0], "escapes", MOST_ROWS - used)
    interval = check_interval[escaped["condition"].to_numpy()]
    upper = escaped["last"].to_numpy()
    same = np.append(False, escaped["condition"].to_numpy()[1:] == escaped["condition"].to_numpy()[:-1])
    before = np.where(same, np.append(0, upper[:-1]), 0)
    lower = np.where(escaped["binned"], before, np.maximum(upper - interval, 0))
    ends = censored["mean"].to_numpy()
    looks = check_interval[censored["condition"].to_numpy()]
    pieces = [
        {"condition": escaped["condition"], "lower": lower, "upper": upper, "escapes": escaped["count"], "censored": 0},
        {
            "condition": censored["condition"],
            "lower": np.maximum(ends - looks, 0.0),
            "upper": ends,
            "escapes": 0,
            "censored": censored["count"],
        },
    ]
    result = pd.concat([pd.DataFrame(piece) for piece in pieces], ignore_index=True)
    result = result.sort_values(["condition", "upper", "censored"], kind="stable", ignore_index=True)
    return result.astype(
        {"condition": np.int64, "lower": float, "upper": float, "escapes": np.int64, "censored": np.int64}
    )


def _binned(rows: pd.DataFrame, name: str, most: Int[np.ndarray, "condition"]) -> pd.DataFrame:
    """Join neighbouring values of each condition until at most ``most`` groups are left, smaller ones in the tails."""
    condition, count = rows["condition"].to_numpy(), rows[name].to_numpy()
    size = len(most)
    distinct = np.bincount(condition, minlength=size)
    begin = np.cumsum(distinct) - distinct
    total = np.bincount(condition, weights=count, minlength=size)
    cumulative = np.append(0, np.cumsum(count))
    before = cumulative[:-1] - cumulative[begin[condition]]
    rank = np.arange(len(rows)) - begin[condition]
    binned = (distinct > most)[condition]
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.arcsin(np.sqrt(before / total[condition])) / (0.5 * np.pi)
        quantile = np.floor(angle * most[condition]).astype(np.int64)
    group = np.where(binned, quantile, rank)
    change = np.append(True, (group[1:] != group[:-1]) | (condition[1:] != condition[:-1]))[: len(rows)]
    start = np.flatnonzero(change)
    if not start.size:
        start = np.zeros(0, dtype=np.int64)
        return pd.DataFrame({"condition": start, "last": start, "mean": start, "count": start, "binned": start == 1})
    joined = np.add.reduceat(count, start)
    steps = rows["steps"].to_numpy()
    return pd.DataFrame(
        {
            "condition": condition[start],
            "last": steps[np.append(start[1:], len(rows)) - 1],
            "mean": np.add.reduceat(count * steps.astype(float), start) / joined,
            "count": joined,
            "binned": binned[start],
        }
    )


def life_tables(
    rows: pd.DataFrame,
    check_interval: Int[np.ndarray, "condition"],
    hazard: Float[np.ndarray, "condition"],
    testable: Bool[np.ndarray, "condition"],
) -> pd.DataFrame:
    """Escapes and censored runs between edges that do not depend on the single times, for the testable conditions.

    The edges are 128 quantiles of the exponential of the same rate, moved onto looks, and the lengths of the censored
    runs (all if there are at most 64 of them, quantiles otherwise), so that every interval has an expected count.

    Args:
        rows: ``condition``, ``steps``, ``escapes``, ``censored``, sorted by condition and steps.
        check_interval: iterations between looks.
        hazard: rate per iteration of the fitted exponential.
        testable: conditions to make a table for, if they have at least 20 escapes.

    Returns:
        ``condition, upper, escapes, censored``; runs beyond the last edge are censored there.

    >>> rows = pd.DataFrame({"condition": 0, "steps": [1, 2, 5, 6], "escapes": [9, 9, 9, 0], "censored": [0, 0, 0, 4]})
    >>> table = life_tables(rows, np.array([1]), np.array([0.3]), np.array([True]))
    >>> table[["upper", "escapes", "censored"]].to_numpy().astype(int).tolist()[:6]
    [[1, 9, 0], [2, 9, 0], [3, 0, 0], [4, 0, 0], [5, 9, 0], [6, 0, 4]]
    """
    condition = rows["condition"].to_numpy()
    bounds = np.searchsorted(condition, np.arange(len(check_interval) + 1))
    steps, escapes, censored = (rows[name].to_numpy() for name in ("steps", "escapes", "censored"))
    quantiles = -np.log1p(-np.arange(1, 2 * _QUANTILES, 2) / (2 * _QUANTILES))
    pieces: dict[str, list[np.ndarray]] = {"condition": [], "upper": [], "escapes": [], "censored": []}
    for i in np.flatnonzero(testable):
        part = slice(bounds[i], bounds[i + 1])
        if escapes[part].sum() < TESTED_ESCAPES:
            continue
        looks = np.ceil(np.minimum(quantiles / hazard[i], 2.0**52) / check_interval[i])
        ends = steps[part][censored[part] > 0]
        if len(ends) > MOST_ROWS:
            ends = ends[:: -(-len(ends) // MOST_ROWS)]
        edges = np.unique(np.concatenate([looks * check_interval[i], ends.astype(float)]))
        place = np.searchsorted(edges, steps[part])
        inside = place < len(edges)
        died = np.bincount(place[inside], weights=escapes[part][inside], minlength=len(edges))
        lost = np.bincount(place[inside], weights=censored[part][inside], minlength=len(edges))
        lost[-1] += (escapes[part] + censored[part])[~inside].sum()
        at_risk = died[::-1].cumsum()[::-1] + lost[::-1].cumsum()[::-1]
        keep = at_risk > 0
        for name, values in zip(pieces, (np.full(len(edges), i), edges, died, lost), strict=True):
            pieces[name].append(values[keep])
    kinds = {"condition": np.int64, "upper": float, "escapes": np.int64, "censored": np.int64}
    return pd.DataFrame({name: np.concatenate([*values, []]).astype(kinds[name]) for name, values in pieces.items()})
