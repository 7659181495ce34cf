"""The contract of a law, as a test that can be run on a law of one's own.

:func:`check_law` evaluates the law at draws from its prior, for every kind of barrier and start that it declares, and
compares: with itself in other units of time and loss, with itself for the conditions in another order, with what escapes
can be like. Each failure is a sentence with a remedy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from escape_inference.conditions import aggregate
from escape_inference.law import Law, Setting, load_law
from escape_inference.law_rules import (
    DRAWS,
    Finding,
    Kind,
    conditions_on_their_own,
    finite_gradients,
    finite_rates,
    medians_follow_units,
    parameters_are_used,
    prior_covers_data,
    pure_temperature,
    sane_prior,
    unit_of_loss,
    unit_of_time,
    units_can_be_read,
)
from escape_inference.model import build_inputs, known_settings, sort_conditions
from escape_inference.precision import float64
from escape_inference.simulation import setting_of
from escape_inference.table import read_measurements
from escape_inference.worlds import World, make_design

STARTS = ("minimum", "quasi_stationary")


@dataclass(frozen=True)
class LawReport:
    """What :func:`check_law` found.

    Attributes:
        law: name of the law.
        findings: one for each rule, in the order in which they were tried.
    """

    law: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether the law keeps every rule."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The rules that it breaks."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        count = len(self.failures)
        end = "keeps the contract" if not count else f"breaks {count} rule{'s' if count > 1 else ''} of the contract"
        return "\n".join([*map(str, self.findings), f"law {self.law} {end}"])


class _Broken(Exception):
    """A rule was broken in such a way that the rest cannot be tried."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding


@float64
def check_law(
    law: str | Path | Law, table: str | Path | pd.DataFrame | None = None, *, fits: bool = True, seed: int = 0
) -> LawReport:
    """Test a law against its contract.

    Args:
        law: name, path of a law file, or a :class:`~escape_inference.Law`.
        table: a measured table; the law is then tried at its settings, and its prior is compared with the measured rates.
            By default at 16 conditions over two decades of the loss where escapes are rare and can be seen.
        fits: also fit a small table twice and see whether the second fit compiles anything (some ten seconds).
        seed: of the draws.

    Returns:
        A report; ``print`` it, or look at ``passed`` and ``failures``.

    Raises:
        InputError: there is no such law, or the table is bad. What is wrong with the law is in the report.

    >>> from escape_inference.law import load_law
    >>> import dataclasses
    >>> law = load_law("constant_rate")
    >>> forgot = dataclasses.replace(law, log_rate=lambda v, s: law.log_rate(v, s) - jnp.log(s.hessian_minimum))
    >>> [finding.rule for finding in check_law(forgot, fits=False).failures]
    ['unit of time']
    """
    law = load_law(law)
    findings: list[Finding] = []
    try:
        findings.append(units_can_be_read(law))
        if not findings[0].passed:
            raise _Broken(findings.pop())
        kinds, frame = _kinds(law, table, seed)
        findings.append(medians_follow_units(law, frame))
        for rule in (
            finite_rates,
            finite_gradients,
            parameters_are_used,
            unit_of_time,
            unit_of_loss,
            pure_temperature,
            conditions_on_their_own,
        ):
            findings.append(rule(law, kinds))
        findings.append(sane_prior(law, kinds))
        if table is not None:
            findings.append(prior_covers_data(law, frame, kinds, seed))
    except _Broken as broken:
        findings.append(broken.finding)
    if fits and all(finding.passed for finding in findings):
        from escape_inference.law_fits import second_fit

        findings.append(Finding("second fit", *second_fit(law, seed)))
    return LawReport(law.name, tuple(findings))


def _kinds(law: Law, table: str | Path | pd.DataFrame | None, seed: int) -> tuple[list[Kind], pd.DataFrame]:
    """The law compiled for every kind of condition, and the conditions' table."""
    kinds, frames = [], []
    for name, setting, frame in _settings(law, table):
        parameters = law.parameters_for({setting.barrier})
        keys = jax.random.split(jax.random.key(seed), max(len(parameters), 1))
        values = {}
        for p, key in zip(parameters, keys, strict=False):
            try:
                median = p.median_for(frame)
            except Exception:
                raise _Broken(medians_follow_units(law, frame)) from None
            if not np.isfinite(median) or (p.positive and median <= 0):
                found = f"the median of {p.name} is {median:g}"
                raise _Broken(
                    Finding("prior medians", False, found, "It must be finite, and positive if positive=True")
                )
            values[p.name] = p.prior(jnp.asarray(median)).sample(key, (DRAWS,))
        kinds.append(Kind(name, setting, values, _compiled(law)))
        frames.append(frame)
        _run(law, kinds[-1])
    return kinds, frames[0]


def _settings(law: Law, table: str | Path | pd.DataFrame | None) -> Iterator[tuple[str, Setting, pd.DataFrame]]:
    if table is None:
        for barrier in law.barriers:
            if barrier not in ("saddle", "threshold"):
                known = "The kinds are 'saddle' and 'threshold'"
                raise _Broken(Finding("barriers", False, f"{barrier!r} is no kind of barrier", known))
            design = make_design(World(barrier=barrier, dimension=3), minima=8, learning_rates=2, seed=1).assign(
                barrier=barrier
            )
            frame = pd.DataFrame({"hessian_saddle": np.nan, "effective_dimension": np.nan} | dict(design))
            for start in STARTS:
                yield f"{barrier}, {start.replace('_', '-')}", setting_of(design, barrier, start), frame
        return
    conditions = sort_conditions(aggregate(read_measurements(table)))
    lacking = sorted(set(conditions.frame["barrier"]) - set(law.barriers))
    if lacking:
        found = f"the table has conditions with a {lacking[0]}, for which the law declares no formula"
        raise _Broken(Finding("barriers", False, found, "Add the formula, or use the law on other tables"))
    inputs = build_inputs(law, conditions)
    for _, setting, _ in known_settings(inputs):
        yield f"{setting.barrier}, {setting.start.replace('_', '-')}", setting, conditions.frame


def _compiled(law: Law) -> Callable[..., Any]:
    """``(values [draw], setting) -> log rates, their slopes by values and by setting, temperatures``, one row a draw."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
    def evaluate(values: dict[str, Any], setting: Setting) -> tuple[Any, ...]:
        size = setting.learning_rate.shape

        def one(values: dict[str, Any]) -> tuple[Any, ...]:
            def rate(values: dict[str, Any], setting: Setting) -> Any:
                return jnp.broadcast_to(law.log_rate(values, setting), size)

            value, pull = jax.vjp(rate, values, setting)
            temperature = jnp.broadcast_to(law.temperature(values, setting), size)
            return value, *pull(jnp.ones(size, value.dtype)), temperature

        return jax.vmap(one)(values) if values else jax.tree.map(lambda x: x[None], one(values))

    return evaluate


def _run(law: Law, kind: Kind) -> None:
    """Evaluate once, or say in words why that does not work."""
    rule = "log rate can be evaluated"
    try:
        kind.here  # noqa: B018
    except KeyError as error:
        known = ", ".join(kind.values) or "none"
        raise _Broken(
            Finding(
                rule,
                False,
                f"over a {kind.setting.barrier} the law asks for the value {error.args[0]!r}, and it declares {known}",
                f"Declare the parameter with barriers=({kind.setting.barrier!r},), or correct the name",
            )
        ) from None
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise _Broken(
            Finding(
                rule,
                False,
                f"({kind.name}) the law cannot be compiled: {str(error).splitlines()[0]}",
                "Use jax.numpy in place of numpy, jnp.where in place of if, and no float(...) of a value",
            )
        ) from None
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise _Broken(
            Finding(
                rule,
                False,
                f"({kind.name}) {type(error).__name__}: {text}",
                "log_rate and temperature get (values, setting) and return one number for each condition",
            )
        ) from None
