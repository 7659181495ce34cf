"""Conditions under which the escapes that a law predicts are frequent enough to be seen."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from escape_inference.law import Law
from escape_inference.simulation import check_parameters, default_parameters, law_log_rate, law_temperature
from escape_inference.worlds import rate_targets, spread_minima

RELAXATION = 0.1  # eta h* to aim at by the batch size
COLDEST = 1e-3  # lowest temperature
LARGEST = 1.0  # eta h*: beyond 2 gradient descent diverges
HALVINGS = 40


def make_law_design(
    law: Law,
    parameters: Mapping[str, float],
    *,
    barrier: str = "saddle",
    minima: int = 12,
    learning_rates: int = 3,
    runs: int = 40,
    start: str = "minimum",
    check_interval: int = 1,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """A design whose learning rates are those at which the law's rates are in the range that can be measured.

    The minima and the rates to aim at are those of :func:`escape_inference.worlds.make_design`. Where the law's rate does
    not reach them between a temperature of 0.001 and one of twice the log barrier or eta h* = 1, the nearer end is taken; where it hardly
    depends on the learning rate, eta h* is 0.03 to 0.3.

    Args:
        law: the law.
        parameters: those of its parameters that are to differ from the theory's value or the prior's median.
        barrier, minima, learning_rates, runs, start, check_interval, seed: as for ``make_design``.

    Returns:
        The design, and all parameters.

    Raises:
        InputError: the law has no formula for the barrier, or the parameters are not its own.

    >>> from escape_inference.law import load_law
    >>> design, values = make_law_design(load_law("arrhenius"), {"noise_strength": 1.0}, minima=3)
    >>> rate = np.exp(law_log_rate(load_law("arrhenius"), design, values, "saddle")) / design["hessian_minimum"]
    >>> len(design), values, bool((rate > 0.00069).all() and (rate < 0.031).all())
    (9, {'noise_strength': 1.0}, True)
    """
    rng = np.random.default_rng(seed)
    rows = spread_minima(rng, barrier, minima)
    targets = rate_targets(rng, barrier, minima, learning_rates)
    kind = rows.assign(barrier=barrier)
    values = default_parameters(law, kind) | dict(parameters)
    check_parameters(law, barrier, values)
    design = rows.loc[np.repeat(np.arange(minima), learning_rates)].reset_index(drop=True)
    design = design.assign(learning_rate=1.0, batch_size=1, start=start, check_interval=check_interval)
    hessian = design["hessian_minimum"].to_numpy()
    goal = np.log(targets.ravel() * hessian)

    def rate(eta: np.ndarray) -> np.ndarray:
        return law_log_rate(law, design.assign(learning_rate=eta), values, barrier) + values.get("log_prefactor", 0.0)

    for _ in range(2):  # first with one sample a batch, then with the batch size that this suggests
        unit = law_temperature(law, design.assign(learning_rate=1.0), values, barrier)
        cold = COLDEST / unit
        hot = 2 * np.log((design["loss_barrier"] / design["loss_minimum"]).to_numpy()) / unit
        hot = np.maximum(np.minimum(hot, LARGEST / hessian), 2 * cold)
        flat = np.abs(rate(hot) - rate(cold)) < np.log(2)
        for _ in range(HALVINGS):
            middle = np.sqrt(cold * hot)
            slow = ~(rate(middle) >= goal)
            cold, hot = np.where(slow, middle, cold), np.where(slow, hot, middle)
        spread = np.geomspace(0.3, 3.0, learning_rates) if learning_rates > 1 else np.ones(1)
        eta = np.where(flat, RELAXATION * np.tile(spread, minima) / hessian, np.sqrt(cold * hot))
        relaxation = np.median((eta * hessian).reshape(minima, -1), axis=1)
        if (design["batch_size"] == 1).all():
            batch = np.maximum(1, np.rint(RELAXATION / relaxation)).astype(int)
            design["batch_size"] = np.repeat(batch, learning_rates)
    hazard = np.exp(np.clip(rate(eta), -600, 600)) * eta
    steps = np.ceil(np.minimum((3.0 if start == "minimum" else 1.0) / hazard, 1e12)).astype(np.int64)
    design = design.assign(learning_rate=eta, runs=runs, max_steps=np.maximum(steps, check_interval))
    return design, values
