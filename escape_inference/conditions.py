"""Conditions: everything that the runs at one setting say about its escape rate, in one pass over the table.

If escape is memoryless, the runs of a condition enter through two numbers only, the escapes d and the exposure
E = Σ η·steps (Le Bris, Lelièvre, Luskin, Perez 2012: exact from the quasi-stationary state). The times themselves are
kept too, in a few intervals, for the check that they are memoryless and for waiting times that are not.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from escape_inference.life_table import exact_or_binned_times, life_tables
from escape_inference.row_groups import combined_codes, first_rows, ramp_codes
from escape_inference.table import is_checked, read_measurements
from escape_inference.table_columns import COVARIATES, ERRORS

_KEYS = (
    "minimum",
    "batch_size",
    "check_interval",
    "barrier",
    "start",
    "learning_rate",
    "loss_barrier",
    "hessian_saddle",
    "loss_barrier_se",
    "hessian_saddle_se",
)
LONGEST_LOOK = 0.2  #: time between two looks over a threshold, in units of 1/h*, at which nearly every crossing is seen
_STEPS = ("optimizer", "with_replacement")  #: how steps are made, in tables where that differs


@dataclass(frozen=True)
class Conditions:
    """The conditions of a table, in order of first appearance.

    Attributes:
        frame: one row for each condition. ``condition`` (a readable, unique label), the settings ``minimum``,
            ``learning_rate`` η, ``batch_size``, ``check_interval`` (iterations), ``barrier``, ``start``, ``ramp``
            (a level of ramps); ``loss_minimum``, ``loss_barrier``, ``hessian_minimum``, ``hessian_saddle``,
            ``effective_dimension`` (NaN where not measured) and their ``_se`` (0 where not given); ``runs`` (for gaps
            of replica slots: the slots), ``starts`` (runs that begin here; a ramp begins at its first level),
            ``escapes``, ``exposure`` Σ η·steps over all rows, ``exposure_before`` the part of it before the intervals
            that hold the escapes, ``look_width`` η·check_interval; exposures and widths in time units;
            ``longest`` iterations of the longest row.
        times: long form, a few rows for each condition: ``condition`` (position in ``frame``), ``lower``, ``upper``
            (iterations; ``escapes`` runs escaped in ``(lower, upper]``), ``escapes``, ``censored`` (runs that ended
            without an escape at ``upper``).
        life_table: long form for the conditions that can be checked: ``condition``, ``upper`` (iterations, increasing;
            edges at quantiles of the exponential, on looks), ``escapes`` and ``censored`` since the previous edge;
            the runs beyond the last edge are counted as censored there.
        minima: labels of the minima, in order of first appearance.
        path: where the table came from.
        sha256: its digest.
    """

    frame: pd.DataFrame
    times: pd.DataFrame
    life_table: pd.DataFrame
    minima: list[str]
    path: str
    sha256: str

    @property
    def n_runs(self) -> int:
        """Number of runs: a ramp is one run, so is a replica slot of a quasi-stationary condition."""
        return int(self.frame["starts"].sum())

    @property
    def n_escapes(self) -> int:
        """Number of escapes."""
        return int(self.frame["escapes"].sum())

    @property
    def not_measured(self) -> list[str]:
        """Quantities that are empty somewhere, and for how many minima or conditions: they are inferred, with wide priors.

        The effective dimension is not among them: it is a parameter of the laws that use it.
        """
        saddle, found = self.frame["barrier"] == "saddle", []
        for name, scale in (("loss_minimum", 0), ("hessian_minimum", 0), ("loss_barrier", 1), ("hessian_saddle", 1)):
            empty = self.frame[self.frame[name].isna() & (saddle | (name != "hessian_saddle"))]
            count = (empty["minimum"].nunique(), len(empty))[scale]
            unit = (("minimum", "minima"), ("condition", "conditions"))[scale][count != 1]
            found += [f"{name} of {count} {unit}"] if count else []
        return found

    @property
    def rare_looks(self) -> list[str]:
        """Conditions over a threshold with ``check_interval · η · h*`` above 0.2, and that number.

        Crossings that come back between two looks are missed there; where each iteration was looked at, single steps of SGD are so
        long that they overshoot the threshold. Over a saddle it does no harm, since a run that has left stays away.
        """
        product = (self.frame["look_width"] * self.frame["hessian_minimum"]).to_numpy(float)
        rare = (self.frame["barrier"] == "threshold").to_numpy() & (product > LONGEST_LOOK)
        names = self.frame["condition"][rare]
        return [f"{name} ({value:.2g})" for name, value in zip(names, product[rare], strict=True)]

    def __len__(self) -> int:
        return len(self.frame)

    def select(self, which: "Bool[np.ndarray, 'condition'] | Int[np.ndarray, 'chosen']") -> "Conditions":
        """The conditions where a mask is true, or those at the positions given, in that order.

        >>> table = pd.DataFrame({"minimum": ["a", "b"], "run": [1, 2], "learning_rate": 0.1, "batch_size": 8,
        ...     "steps": [10, 20], "escaped": True})
        >>> aggregate(table).select(np.array([1])).frame["condition"].tolist()
        ['b η=0.1 B=8']
        """
        which = np.asarray(which)
        positions = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        frame = self.frame.iloc[positions].reset_index(drop=True)
        return Conditions(
            frame=frame,
            times=_select_long(self.times, positions),
            life_table=_select_long(self.life_table, positions),
            minima=list(dict.fromkeys(frame["minimum"])),
            path=self.path,
            sha256=self.sha256,
        )


def aggregate(table: pd.DataFrame) -> Conditions:
    """Gather the rows of a measured table into conditions.

    Rows belong to one condition when they agree in ``minimum``, ``learning_rate``, ``batch_size``, ``check_interval``,
    ``barrier``, ``start``, ``loss_barrier``, ``hessian_saddle`` (and the errors of both), in being levels of a ramp or
    not, and, where the table has these columns, in ``optimizer`` and ``with_replacement``.

    Args:
        table: what :func:`~escape_inference.table.read_measurements` returns; any other table is checked first.

    Raises:
        InputError: if the table breaks a rule.

    >>> table = pd.DataFrame({"minimum": "m1", "run": [1, 2, 3], "learning_rate": 0.05, "batch_size": 8,
    ...     "steps": [120, 300, 500], "escaped": [True, True, False], "check_interval": 20})
    >>> conditions = aggregate(table)
    >>> conditions.frame["condition"].tolist()
    ['m1 η=0.05 B=8']
    >>> conditions.frame[["runs", "escapes", "exposure", "exposure_before", "look_width"]].to_numpy(float).tolist()
    [[3.0, 2.0, 46.0, 44.0, 1.0]]
    >>> conditions.times[["lower", "upper", "escapes", "censored"]].to_numpy().astype(int).tolist()
    [[100, 120, 1, 0], [280, 300, 1, 0], [480, 500, 0, 1]]
    """
    if not is_checked(table):
        table = read_measurements(table)
    in_ramp, ramp = ramp_codes(table)
    columns = [table[name] for name in (*_KEYS, *(name for name in _STEPS if name in table))]
    key = combined_codes(*columns, in_ramp) if in_ramp.any() else combined_codes(*columns)
    codes, distinct = pd.factorize(key)
    count = len(distinct)
    del key, distinct
    first = first_rows(codes, count)
    frame = _settings(table, first, in_ramp)
    rows = np.bincount(codes, minlength=count)
    frame["runs"], frame["starts"] = _runs(table, codes, rows, ramp, frame)
    _add_exposures(frame, table, codes)
    steps, escaped = table["steps"].to_numpy(), table["escaped"].to_numpy()
    intervals = _count_equal(codes, steps, escaped)
    frame["longest"] = intervals.groupby("condition")["steps"].max().to_numpy()
    check_interval = frame["check_interval"].to_numpy()
    testable = ~frame["ramp"].to_numpy() & (frame["exposure_before"].to_numpy() > 0)
    rate = _geometric_rate(frame)
    return Conditions(
        frame=frame,
        times=exact_or_binned_times(intervals, check_interval),
        life_table=life_tables(intervals, check_interval, rate * frame["learning_rate"].to_numpy(), testable),
        minima=list(dict.fromkeys(frame["minimum"])),
        path=str(table.attrs["path"]),
        sha256=str(table.attrs["sha256"]),
    )


def _select_long(long: pd.DataFrame, positions: np.ndarray) -> pd.DataFrame:
    """Rows of a long table for the conditions at ``positions``, renumbered and in that order."""
    groups = long.groupby("condition", sort=False).indices
    pieces = [(new, groups[old]) for new, old in enumerate(positions) if old in groups]
    rows = np.concatenate([rows for _, rows in pieces]) if pieces else np.zeros(0, dtype=np.int64)
    numbers = np.repeat([new for new, _ in pieces], [len(rows) for _, rows in pieces]).astype(np.int64)
    return long.iloc[rows].assign(condition=numbers).reset_index(drop=True)


def _settings(table: pd.DataFrame, first: np.ndarray, in_ramp: np.ndarray) -> pd.DataFrame:
    names = ["minimum", "learning_rate", "batch_size", "check_interval", "barrier", "start", *COVARIATES, *ERRORS]
    frame = table[names].iloc[first].reset_index(drop=True)
    for name in ("minimum", "barrier", "start"):
        frame[name] = frame[name].astype("str")
    for value, error in zip(COVARIATES, ERRORS, strict=True):
        frame[error] = frame[error].where(frame[value].notna(), 0.0).fillna(0.0)
    frame.insert(6, "ramp", in_ramp[first])
    how = [table[name].iloc[first] for name in _STEPS if name in table]
    steps = [
        ", ".join(f"{column.name}={value}" for column, value in zip(how, row, strict=True))
        for row in zip(*how, strict=True)
    ]
    frame.insert(0, "condition", _labels(frame, steps))
    frame.attrs = {}
    return frame


def _labels(frame: pd.DataFrame, steps: list[str]) -> list[str]:
    """Short labels; a setting that does not fit the short form is added only where labels would collide."""

    def number(name: str, symbol: str) -> list[str]:
        return ["" if np.isnan(value) else f" {symbol}={value:.6g}" for value in frame[name].astype(float)]

    ratio = frame["loss_barrier"] / frame["loss_minimum"]
    parts = [list(frame["minimum"]), number("learning_rate", "η"), number("batch_size", "B")]
    parts.append(["" if np.isnan(c) else f" c={c:.4g}" for c in ratio])
    labels = pd.Series(["".join(words) for words in zip(*parts, strict=True)], dtype=object)
    extra = {
        "start": [" quasi-stationary" if start == "quasi_stationary" else " from minimum" for start in frame["start"]],
        "ramp": [" ramp" if ramp else "" for ramp in frame["ramp"]],
        "barrier": [f" {barrier}" for barrier in frame["barrier"]],
        "check_interval": number("check_interval", "m"),
        "loss_barrier": number("loss_barrier", "L^s"),
        "hessian_saddle": number("hessian_saddle", "h^s"),
    }
    if steps:
        extra["steps"] = [f" {words}" for words in steps]
    for words in extra.values():
        same = labels.duplicated(keep=False).to_numpy()
        if not same.any():
            return list(labels)
        values = pd.Series(words, dtype=object)
        varies = values.groupby(labels.to_numpy()).transform("nunique").to_numpy() > 1
        labels = labels.where(~(same & varies), labels + values)
    number_in_group = labels.groupby(labels.to_numpy()).cumcount()
    while labels.duplicated().any():
        labels = labels.where(~labels.duplicated(keep=False), labels + " #" + (number_in_group + 1).astype(str))
    return list(labels)


def _runs(
    table: pd.DataFrame, codes: np.ndarray, rows: np.ndarray, ramp: np.ndarray, frame: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """Runs of each condition and runs that begin there."""
    runs = rows.copy()
    slots = (frame["start"] == "quasi_stationary").to_numpy()
    if slots.any():
        inside = slots[codes] if not slots.all() else slice(None)
        held = codes[inside]
        pair = combined_codes(held, table["run"][inside])
        runs[slots] = np.bincount(held[~pd.Series(pair).duplicated().to_numpy()], minlength=len(rows))[slots]
    starts = runs.copy()
    levels = np.flatnonzero(ramp >= 0)
    if levels.size:
        first = levels[~pd.Series(ramp[levels]).duplicated().to_numpy()]
        ramps = frame["ramp"].to_numpy()
        starts[ramps] = np.bincount(codes[first], minlength=len(rows))[ramps]
    return runs, starts


def _add_exposures(frame: pd.DataFrame, table: pd.DataFrame, codes: np.ndarray) -> None:
    """Counts and exposures; iterations are summed first, so that the sums are exact integers."""
    count = len(frame)
    steps, escaped = table["steps"].to_numpy(), table["escaped"].to_numpy()
    learning_rate, interval = frame["learning_rate"].to_numpy(), frame["check_interval"].to_numpy()
    total = np.bincount(codes, weights=steps, minlength=count)
    held = codes[escaped]
    last = np.bincount(held, weights=interval[held], minlength=count)
    frame["escapes"] = np.bincount(held, minlength=count)
    frame["exposure"] = learning_rate * total
    frame["exposure_before"] = learning_rate * (total - last)
    frame["look_width"] = learning_rate * interval


def _count_equal(codes: np.ndarray, steps: np.ndarray, escaped: np.ndarray) -> pd.DataFrame:
    """Rows with equal condition and steps counted: ``condition, steps, escapes, censored``, sorted by the first two."""
    bits = int(steps.max()).bit_length()
    if bits + int(codes.max()).bit_length() + 1 <= 62:
        key = (codes.astype(np.int64) << (bits + 1)) | (steps << 1) | escaped
        key.sort()
        new = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
        counts = np.diff(np.append(new, len(key)))
        key = key[new]
        condition, steps, escaped = key >> (bits + 1), (key >> 1) & ((1 << bits) - 1), (key & 1).astype(bool)
    else:
        order = np.lexsort((escaped, steps, codes))
        condition, steps, escaped = codes[order], steps[order], escaped[order]
        differs = (condition[1:] != condition[:-1]) | (steps[1:] != steps[:-1]) | (escaped[1:] != escaped[:-1])
        new = np.flatnonzero(np.append(True, differs))
        counts = np.diff(np.append(new, len(order)))
        condition, steps, escaped = condition[new], steps[new], escaped[new]
    return pd.DataFrame(
        {
            "condition": condition,
            "steps": steps,
            "escapes": np.where(escaped, counts, 0),
            "censored": np.where(escaped, 0, counts),
        }
    )


def _geometric_rate(frame: pd.DataFrame) -> Float[np.ndarray, "condition"]:
    """Most likely memoryless rate κ: ``log(1 + d w / e) / w`` (∞ where the first look found every escape)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        width = frame["look_width"].to_numpy()
        return np.asarray(np.log1p(frame["escapes"].to_numpy() * width / frame["exposure_before"].to_numpy()) / width)
