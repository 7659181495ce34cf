"""Designs: which conditions are to be simulated; and the measured table that escapes under a design make.

A design is a plain table with one row for each condition:

=====================  ==============================================================================================
``minimum``            label of the minimum
``learning_rate``      eta [time per iteration]
``batch_size``         B
``loss_minimum``       L* [loss]
``loss_barrier``       L^s, or the threshold [loss]
``hessian_minimum``    h* [1/time]
``hessian_saddle``     h^s [1/time]; for a saddle only
``runs``               runs, or replica slots in the quasi-stationary state
``max_steps``          iterations for which each is followed
``start``              ``minimum`` (default) or ``quasi_stationary``
``check_interval``     iterations between two looks at the loss (default 1)
``ramp``               empty (default), or a label: the rows of one minimum with that label are the levels of a ramp
=====================  ==============================================================================================

In a ramp each run goes through the levels in the order of the rows, ``max_steps`` at each, until it escapes.
:func:`escape_inference.worlds.make_design` makes a design of fixed learning rates, :func:`make_ramps` one of ramps.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from escape_inference.errors import InputError

SETTINGS = ("learning_rate", "batch_size", "loss_minimum", "loss_barrier", "hessian_minimum")
ONE_FOR_A_RAMP = ("batch_size", "loss_minimum", "loss_barrier", "hessian_minimum", "runs", "check_interval")


def complete_design(design: pd.DataFrame, barrier: str) -> pd.DataFrame:
    """The design with its defaults and a plain index, or an error that names what is wrong.

    Raises:
        InputError: a column is missing, a value impossible, or a ramp not one.

    >>> complete_design(pd.DataFrame({"minimum": ["a"]}), "threshold")
    Traceback (most recent call last):
    escape_inference.errors.InputError: the design lacks the columns learning_rate, batch_size, loss_minimum, loss_barrier, hessian_minimum, runs, max_steps
    """
    needed = [*SETTINGS, "runs", "max_steps"] + (["hessian_saddle"] if barrier == "saddle" else [])
    missing = [name for name in ("minimum", *needed) if name not in design.columns]
    if missing:
        raise InputError(f"the design lacks the columns {', '.join(missing)}")
    if design.empty:
        raise InputError("the design has no rows; each condition needs one")
    design = design.reset_index(drop=True).assign(
        start=design["start"].fillna("minimum").to_numpy() if "start" in design else "minimum",
        check_interval=design["check_interval"].fillna(1).to_numpy() if "check_interval" in design else 1,
        ramp=design["ramp"].fillna("").astype(str).to_numpy() if "ramp" in design else "",
    )
    numbers = design[[*needed, "check_interval"]].apply(pd.to_numeric, errors="coerce")
    counts = numbers[["batch_size", "runs", "max_steps", "check_interval"]]
    for wrong, rule in (
        (~((numbers > 0) & np.isfinite(numbers)).all(axis=1), "numbers must be positive and finite"),
        ((counts != np.floor(counts)).any(axis=1), f"{', '.join(counts)} must be whole numbers"),
        (numbers["loss_barrier"] <= numbers["loss_minimum"], "loss_barrier must be above loss_minimum"),
        (~design["start"].isin(["minimum", "quasi_stationary"]), "start must be 'minimum' or 'quasi_stationary'"),
        (numbers["check_interval"] > numbers["max_steps"], "check_interval must be at most max_steps"),
        (design["minimum"].isna(), "minimum must not be empty"),
    ):
        _refuse(wrong.to_numpy(), rule)
    design = design.assign(**numbers).astype({name: np.int64 for name in counts})
    _check_ramps(design)
    return design


def _refuse(wrong: np.ndarray, rule: str) -> None:
    if wrong.any():
        rows = ", ".join(str(row + 1) for row in np.flatnonzero(wrong)[:5])
        raise InputError(f"row {rows} of the design (the first is 1): {rule}")


def _check_ramps(design: pd.DataFrame) -> None:
    in_ramp = design["ramp"].to_numpy() != ""
    groups = design.groupby(["minimum", "ramp"], sort=False)
    _refuse(in_ramp & (groups["runs"].transform("size") < 2).to_numpy(), "a ramp needs at least two levels")
    _refuse(in_ramp & (design["start"] != "minimum").to_numpy(), "a ramp starts at the minimum")
    falls = groups["learning_rate"].diff().le(0).to_numpy()
    _refuse(in_ramp & falls, "the learning rate of a ramp must rise from level to level")
    for name in (*ONE_FOR_A_RAMP, *(["hessian_saddle"] if "hessian_saddle" in design else [])):
        changes = (design[name] != groups[name].transform("first")).to_numpy()
        _refuse(in_ramp & changes, f"{name} must be the same at every level of a ramp")


def in_ramps(design: pd.DataFrame) -> Bool[np.ndarray, " row"]:
    """Which rows of a complete design are levels of ramps, ``[row]``."""
    return (design["ramp"] != "").to_numpy()


def experiments(design: pd.DataFrame) -> Int[np.ndarray, " row"]:
    """Number of the experiment of each row of a complete design: the levels of one ramp share it.

    >>> rows = pd.DataFrame({"minimum": ["a", "a", "a", "b"], "ramp": ["", "up", "up", ""]})
    >>> experiments(rows).tolist()
    [0, 1, 1, 2]
    """
    own = np.where(in_ramps(design), -1, np.arange(len(design)))
    return design.groupby(["minimum", "ramp", own], sort=False, dropna=False).ngroup().to_numpy()


def budget(design: pd.DataFrame) -> Int[np.ndarray, " row"]:
    """Iterations for which each run is followed: ``max_steps``, down to the last look."""
    interval = design["check_interval"].to_numpy()
    return design["max_steps"].to_numpy() // interval * interval


def make_ramps(design: pd.DataFrame, *, levels: int = 12, runs: int | None = None) -> pd.DataFrame:
    """A design in which each minimum of another design is left in a ramp of the learning rate.

    The levels rise by equal ratios from the lowest to the highest learning rate of the minimum. They are held for as many
    iterations as let half of the runs escape in the first two thirds of the levels, if ``max_steps`` of the design is in
    proportion to the mean time to escape, as it is in what ``make_design`` returns.

    Args:
        design: fixed learning rates, at least two for each minimum at one batch size.
        levels: number of levels, at least 2.
        runs: ramps of each minimum; by default as many as the design has runs of a condition.

    Raises:
        InputError: too few levels or learning rates.

    >>> from escape_inference.worlds import World, make_design
    >>> ramps = make_ramps(make_design(World(), minima=2), levels=5, runs=7)
    >>> len(ramps), ramps["ramp"].unique().tolist(), set(ramps["runs"]), bool((ramps["max_steps"] > 0).all())
    (10, ['ramp'], {7}, True)
    """
    if levels < 2:
        raise InputError(f"a ramp needs at least two levels, not {levels}")
    found = []
    for name, rows in design.groupby("minimum", sort=False):
        rows = rows.sort_values("learning_rate")
        eta = rows["learning_rate"].to_numpy()
        if not eta[0] < eta[-1]:
            raise InputError(f"minimum {name}: a ramp needs two learning rates, the lowest and the highest")
        # expected escapes of a run within max_steps, see make_design
        expected = np.where(rows["start"] == "quasi_stationary", 1.0, 3.0) if "start" in rows else 3.0
        up = np.geomspace(eta[0], eta[-1], levels)
        hazard = np.exp(np.interp(np.log(up), np.log(eta), np.log(expected / rows["max_steps"].to_numpy())))
        steps = int(np.ceil(np.log(2) / hazard[: max(1, round(2 * levels / 3))].sum()))
        interval = int(rows["check_interval"].iloc[0]) if "check_interval" in rows else 1
        level = rows.iloc[[0] * levels].assign(learning_rate=up, start="minimum", ramp="ramp")
        found.append(level.assign(max_steps=-(-steps // interval) * interval, **({"runs": runs} if runs else {})))
    return pd.concat(found, ignore_index=True)


def measured_table(
    design: pd.DataFrame, escapes: Int[np.ndarray, "escape 3"], barrier: str, columns: Sequence[str] = ()
) -> pd.DataFrame:
    """The measured table of the escapes under a complete design.

    Args:
        design: what :func:`complete_design` returns.
        escapes: row of the design, slot (0 to ``runs`` - 1), iteration since the start of that row's clock. Those outside
            the budget of their row do not count; in the quasi-stationary state a slot may have several.
        barrier: ``saddle`` or ``threshold``.
        columns: further columns of the design to be copied.

    Returns:
        One row for each run, for each gap between the escapes of a replica slot (the last one censored), or for each
        level of a ramp up to its jump; with unique run numbers.

    >>> design = complete_design(pd.DataFrame({"minimum": "a", "learning_rate": [0.1, 0.2], "batch_size": 1,
    ...     "loss_minimum": 1.0, "loss_barrier": 2.0, "hessian_minimum": 1.0, "runs": 2, "max_steps": 50, "ramp": "up"}),
    ...     "threshold")
    >>> measured_table(design, np.array([[1, 0, 7]]), "threshold")[["run", "learning_rate", "steps", "escaped"]]
       run  learning_rate  steps  escaped
    0    0            0.1     50    False
    1    0            0.2      7     True
    2    1            0.1     50    False
    3    1            0.2     50    False
    """
    limit, runs = budget(design), design["runs"].to_numpy()
    experiment = experiments(design)
    offset = np.zeros(experiment.max() + 1, np.int64)
    offset[1:] = np.cumsum(runs[np.unique(experiment, return_index=True)[1]])[:-1]
    escapes = np.asarray(escapes, np.int64).reshape(-1, 3)
    escapes = escapes[(escapes[:, 2] > 0) & (escapes[:, 2] <= limit[escapes[:, 0]])]
    row = np.repeat(np.arange(len(design)), runs)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(runs) - runs, runs)
    run = offset[experiment[row]] + slot
    left = np.full(run.max() + 1, len(design))  # the row in which a run escaped for the first time
    np.minimum.at(left, offset[experiment[escapes[:, 0]]] + escapes[:, 1], escapes[:, 0])
    slots = (design["start"] == "quasi_stationary").to_numpy()[row]
    stayed = slots | (row < left[run])
    at = np.concatenate([row[stayed], escapes[:, 0]])
    who = np.concatenate([run[stayed], offset[experiment[escapes[:, 0]]] + escapes[:, 1]])
    when = np.concatenate([limit[row[stayed]], escapes[:, 2]])
    escaped = np.arange(len(at)) >= stayed.sum()
    order = np.lexsort((~escaped, when, at, who))
    at, who, when, escaped = at[order], who[order], when[order], escaped[order]
    same = (who[1:] == who[:-1]) & (at[1:] == at[:-1])
    steps = when - np.append(0, np.where(same, when[:-1], 0))
    kept = steps > 0
    about = ["minimum", "learning_rate", "batch_size", "start", "check_interval", *SETTINGS[2:]]
    about += (["hessian_saddle"] if barrier == "saddle" else []) + list(columns)
    table = design[about].iloc[at[kept]].reset_index(drop=True)
    table.insert(1, "run", who[kept])
    table.insert(4, "steps", steps[kept])
    table.insert(5, "escaped", escaped[kept])
    return table.assign(barrier=barrier)
