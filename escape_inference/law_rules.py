"""The rules of a law's contract, each a function of the law and of its rates at draws from the prior."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import pandas as pd

from escape_inference.law import Law, Setting
from escape_inference.law_units import UnitError, median_in_units, rescaled_settings, rescaled_values, unit_factor
from escape_inference.model import MEAN_DISCREPANCY

DRAWS = 60
OTHER_TIME, OTHER_LOSS = 37.0, 0.0043  #: factors of the other units
TOLERANCE = 1e-5  #: nats by which a log rate may change with the units
SLOWEST, FASTEST = 1e-9, 10.0  #: of a rate over h* that could be an escape that somebody sees
NARROWEST, BROADEST = 0.05, 500.0  #: nats, between which the log rate of the typical condition spreads over the prior
OUTSIDE = 0.2  #: share of measured rates that may lie outside the central 99 % of the prior


@dataclass(frozen=True)
class Finding:
    """One rule of the contract: whether the law keeps it, what was found, and what to do if it does not."""

    rule: str
    passed: bool
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'} {self.rule}: {self.found}." + (
            f" {self.remedy}." if self.remedy and not self.passed else ""
        )


@dataclass(frozen=True)
class Kind:
    """Conditions of one kind, draws of the parameters [draw], and the law compiled for them."""

    name: str
    setting: Setting
    values: dict[str, Any]
    evaluate: Callable[..., Any]

    @cached_property
    def here(self) -> tuple[Any, ...]:
        """Log rates ``[draw, condition]``, their slopes by values and by settings, temperatures."""
        return self.evaluate(self.values, self.setting)

    @property
    def log_rate(self) -> np.ndarray:
        """Log rates ``[draw, condition]``."""
        return np.asarray(self.here[0])

    def elsewhere(self, values: dict[str, Any], setting: Setting) -> np.ndarray:
        """Log rates at other values and settings, less those here."""
        return np.asarray(self.evaluate(values, setting)[0]) - self.log_rate


def units_can_be_read(law: Law) -> Finding:
    """Every unit is a product of powers of loss and time."""
    for p in law.parameters:
        try:
            unit_factor(p.unit, 1.0, 1.0)
        except UnitError:
            return Finding(
                "units of the parameters",
                False,
                f"the unit {p.unit!r} of {p.name} is not a product of powers of loss and time",
                "Write it like '1', 'loss', 'loss/time' or '1/time^2'",
            )
    return Finding("units of the parameters", True, ", ".join(f"{p.name} [{p.unit}]" for p in law.parameters) or "none")


def medians_follow_units(law: Law, frame: pd.DataFrame) -> Finding:
    """Prior medians that are computed from the settings follow the units."""
    rule = "prior medians"
    for p in law.parameters:
        try:
            value, expected = median_in_units(p, frame, OTHER_TIME, OTHER_LOSS)
        except Exception as error:
            return Finding(
                rule,
                False,
                f"the median of {p.name} cannot be computed from the settings: {type(error).__name__}: {error}",
                "It gets the conditions' table with the settings only (never escapes) and returns one number",
            )
        if not np.isclose(value, expected, rtol=1e-6):
            return Finding(
                rule,
                False,
                f"the median of {p.name} does not follow its unit {p.unit!r}: other units of loss and time turn it "
                f"into {value:.4g} and not {expected:.4g}",
                "Build it from settings whose product has that unit, or correct the unit",
            )
    return Finding(rule, True, "finite, positive where they must be, and in the units declared")


def finite_rates(law: Law, kinds: list[Kind]) -> Finding:
    """The log rate is finite at draws from the prior."""
    for kind in kinds:
        bad = ~np.isfinite(kind.log_rate)
        if bad.any():
            draw, condition = np.argwhere(bad)[0]
            return Finding(
                "finite log rate",
                False,
                f"({kind.name}) it is not finite in {bad.mean():.1%} of draws from the prior, first at "
                f"{_at(kind, draw, condition)}",
                "Compute the logarithm directly, never the log of a rate that may underflow; narrow a prior that "
                "reaches values without meaning",
            )
    names = "; ".join(kind.name for kind in kinds)
    return Finding("finite log rate", True, f"at {DRAWS} draws from the prior ({names})")


def finite_gradients(law: Law, kinds: list[Kind]) -> Finding:
    """So are its slopes by every parameter and by every setting that can be latent."""
    rule = "finite gradients"
    for kind in kinds:
        _, by_value, by_setting, _ = kind.here
        slopes = dict(by_value) | {
            name: getattr(by_setting, name)
            for name in ("loss_minimum", "log_barrier", "hessian_minimum", "hessian_saddle")
        }
        for name, slope in slopes.items():
            bad = ~np.isfinite(np.asarray(slope))
            if bad.any():
                where = np.argwhere(bad)[0]
                condition = int(where[1]) if len(where) > 1 else 0
                return Finding(
                    rule,
                    False,
                    f"({kind.name}) the slope of the log rate by {name} is not finite at "
                    f"{_at(kind, int(where[0]), condition)}",
                    "A jnp.where over a formula that is infinite on the other side gives NaN slopes: make its argument "
                    "safe first; avoid sqrt, abs and powers at zero",
                )
    return Finding(rule, True, "by every parameter and by every setting that can be latent")


def parameters_are_used(law: Law, kinds: list[Kind]) -> Finding:
    """Every parameter that is declared for a barrier enters the rate there."""
    for kind in kinds:
        by_value = kind.here[1]
        for p in law.parameters_for({kind.setting.barrier}):
            if not np.asarray(by_value[p.name]).any():
                return Finding(
                    "parameters enter the rate",
                    False,
                    f"({kind.name}) the rate does not depend on {p.name}, although it is declared for this barrier",
                    f"Use it, remove it, or leave {kind.setting.barrier!r} out of its barriers",
                )
    return Finding("parameters enter the rate", True, "every one that is declared")


def unit_of_time(law: Law, kinds: list[Kind]) -> Finding:
    """The rate scales as 1/time."""
    rule = "unit of time"
    for kind in kinds:
        there = rescaled_values(law, kind.values, OTHER_TIME, 1.0), rescaled_settings(kind.setting, OTHER_TIME, 1.0)
        shift = kind.elsewhere(*there)
        if _changed(shift, -np.log(OTHER_TIME), kind):
            return Finding(
                rule,
                False,
                f"({kind.name}) a rate has the unit 1/time, so a unit of time {OTHER_TIME:g} times smaller must make it "
                f"{OTHER_TIME:g} times smaller (log rate {-np.log(OTHER_TIME):+.3f}), but the log rate changed by "
                f"{_worst(shift, -np.log(OTHER_TIME)):+.3f}",
                "Multiply the rate by a quantity of unit 1/time such as hessian_minimum, let exponents have no unit, and "
                "declare the units of the parameters",
            )
    return Finding(rule, True, "the rate scales as 1/time")


def unit_of_loss(law: Law, kinds: list[Kind]) -> Finding:
    """The rate does not depend on the unit of the loss."""
    for kind in kinds:
        there = rescaled_values(law, kind.values, 1.0, OTHER_LOSS), rescaled_settings(kind.setting, 1.0, OTHER_LOSS)
        shift = kind.elsewhere(*there)
        if _changed(shift, 0.0, kind):
            return Finding(
                "unit of loss",
                False,
                f"({kind.name}) the rate must not depend on the unit of the loss, but the log rate changed by "
                f"{_worst(shift, 0.0):+.3f} when all losses were multiplied by {OTHER_LOSS:g}",
                "Divide losses by losses (loss_gap / loss_minimum), or give the parameter that multiplies them unit='loss'",
            )
    return Finding("unit of loss", True, "the rate does not depend on it")


def pure_temperature(law: Law, kinds: list[Kind]) -> Finding:
    """The temperature is positive and a pure number."""
    rule = "temperature"
    remedy = "It is the dimensionless temperature at the minimum, such as eta h* / B times a number"
    for kind in kinds:
        here = np.asarray(kind.here[3])
        if not (np.isfinite(here) & (here > 0)).all():
            return Finding(rule, False, f"({kind.name}) it is not positive and finite everywhere", remedy)
        values = rescaled_values(law, kind.values, OTHER_TIME, OTHER_LOSS)
        there = np.asarray(kind.evaluate(values, rescaled_settings(kind.setting, OTHER_TIME, OTHER_LOSS))[3])
        if not np.allclose(here, there, rtol=1e-7):
            factor = float((there / here).ravel()[0])
            return Finding(
                rule,
                False,
                f"({kind.name}) it changed by a factor {factor:.4g} with the units of time and loss",
                remedy,
            )
    return Finding(rule, True, "positive, and a pure number")


def conditions_on_their_own(law: Law, kinds: list[Kind]) -> Finding:
    """The rate of a condition does not depend on the others."""
    for kind in kinds:
        back = jax.tree.map(lambda x: x[::-1], kind.setting)
        if _changed(np.asarray(kind.evaluate(kind.values, back)[0])[:, ::-1] - kind.log_rate, 0.0, kind):
            return Finding(
                "conditions on their own",
                False,
                f"({kind.name}) the rate of a condition changes when the conditions come in another order",
                "Use each condition's own settings: no mean, maximum or index over the conditions",
            )
    return Finding("conditions on their own", True, "the rate of one does not depend on the others")


def sane_prior(law: Law, kinds: list[Kind]) -> Finding:
    """Rates at typical settings spread over a broad but not absurd range."""
    rule = "prior predictive"
    texts = []
    for kind in kinds:
        ratio = kind.log_rate - np.log(np.asarray(kind.setting.hessian_minimum))
        low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
        spread = float(np.subtract(*np.quantile(np.median(ratio, axis=1), [0.95, 0.05])))
        found, remedy = "", ""
        if high < np.log(SLOWEST):
            found = f"95 % of the rates are below {_power(high)} h*: nobody would see such an escape"
            remedy = "Shift the medians so that typical settings give escapes"
        elif middle > np.log(FASTEST):
            found = f"half of the rates are above {_power(middle)} h*: nothing escapes faster than it relaxes"
            remedy = "Shift the medians towards smaller temperatures or rates"
        elif spread > BROADEST:
            found = f"the rate of a typical condition spreads over {spread / np.log(10):.0f} decades (90 % of draws)"
            remedy = "Narrow the widths: a width of 0.7 is a factor of 2 either way"
        elif kind.values and spread < NARROWEST:
            found = f"the prior fixes the rate of a typical condition within {np.expm1(spread):.1%}: the data could not move it"
            remedy = "Widen the priors to what is really known"
        if found:
            return Finding(rule, False, f"({kind.name}) {found}", remedy)
        texts.append(f"{kind.name}: {_power(low)} to {_power(high)} h*")
    return Finding(rule, True, "90 % of the rates at typical settings are from " + "; ".join(texts))


def prior_covers_data(law: Law, frame: pd.DataFrame, kinds: list[Kind], seed: int) -> Finding:
    """Measured rates lie within what the prior allows."""
    rng = np.random.default_rng(seed)
    log_rate = np.hstack([np.broadcast_to(kind.log_rate, (DRAWS, len(kind.setting.batch_size))) for kind in kinds])
    log_rate = log_rate + rng.normal(size=(DRAWS, 1))  # log prefactor
    log_rate = log_rate + rng.exponential(MEAN_DISCREPANCY, (DRAWS, 1)) * rng.normal(size=log_rate.shape)
    seen = (frame["escapes"] >= 3).to_numpy()
    if not seen.any():
        return Finding("prior covers the data", True, "no condition has three escapes to compare with")
    measured = np.log((frame["escapes"] / frame["exposure"]).to_numpy()[seen])
    low, high = np.quantile(log_rate[:, seen], [0.005, 0.995], axis=0)
    outside = (measured < low) | (measured > high)
    text = f"{outside.sum()} of {seen.sum()} measured rates lie outside the central 99 % of the prior"
    side = "faster" if np.median((measured - (low + high) / 2)[outside] if outside.any() else 0.0) > 0 else "slower"
    return Finding(
        "prior covers the data",
        bool(outside.mean() <= OUTSIDE),
        text,
        f"Escapes are {side} than the prior allows: shift the medians or widen them, for a reason that is not these data",
    )


def _changed(shift: np.ndarray, expected: float, kind: Kind) -> bool:
    scale = 1e-9 * np.abs(kind.log_rate).max()
    return bool(not (np.abs(shift - expected) <= TOLERANCE + scale).all())


def _worst(shift: np.ndarray, expected: float) -> float:
    return float(shift.ravel()[np.nanargmax(np.abs(shift - expected))])


def _power(log_value: float) -> str:
    return f"{np.exp(log_value):.1g}" if log_value > -50 else f"10^{log_value / np.log(10):.0f}"


def _at(kind: Kind, draw: int, condition: int) -> str:
    parts = [f"{name} = {float(value[draw]):.3g}" for name, value in kind.values.items()]
    for name in ("learning_rate", "batch_size", "loss_minimum", "log_barrier", "hessian_minimum"):
        parts.append(f"{name} = {float(getattr(kind.setting, name)[condition]):.3g}")
    return ", ".join(parts)
