"""The contract of a law: kept by every law that ships, and seen to be broken by laws that are wrong on purpose."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from escape_inference.cli import main
from escape_inference.errors import InputError
from escape_inference.law import Law, Parameter, built_in_laws, kramers_log_prefactor, threshold_log_rate, typical_loss
from escape_inference.law_check import check_law
from escape_inference.law_units import UnitError, unit_factor
from escape_inference.simulation import simulate
from escape_inference.worlds import World, make_design

SCALE = Parameter("scale", 1.0, 0.7, "the theory says 1")


def temperature(values, setting):
    return values["scale"] * setting.diffusion_scale


def log_rate(values, setting):
    """Arrhenius with the noise of each minimum: right in every way."""
    return kramers_log_prefactor(setting) - jnp.expm1(setting.log_barrier) / temperature(values, setting)


RIGHT = Law("mine", "mine", "here", (SCALE,), log_rate, temperature, barriers=("saddle",))


def changed(**changes):
    return dataclasses.replace(RIGHT, **changes)


@pytest.mark.parametrize("name", list(built_in_laws()))
def test_every_law_that_ships_keeps_the_contract(name):
    report = check_law(name, fits=False)
    assert report.passed, str(report)
    assert len(report.findings) == 10
    assert all(finding.found for finding in report.findings)


def test_a_law_of_ones_own_keeps_the_contract_and_its_second_fit_compiles_nothing():
    report = check_law(RIGHT)
    assert report.passed, str(report)
    assert [finding.rule for finding in report.findings][-1] == "second fit"
    assert "law mine keeps the contract" in str(report)


def compiled_anew(values, setting):
    """Right, but a program of its own at every call, and of an exponent whose integrals are in no table."""
    rate = threshold_log_rate(setting, temperature(values, setting), 2.0, 0.5)
    return jax.jit(lambda rate: rate + 0.0)(rate)


def test_a_law_that_is_compiled_for_every_fit_breaks_the_contract():
    report = check_law(changed(log_rate=compiled_anew, barriers=("threshold",)))
    assert [finding.rule for finding in report.failures] == ["second fit"]
    assert "compiled" in report.failures[0].found and "top level" in report.failures[0].remedy


def nan_slope(values, setting):
    """Finite everywhere, but the branch that is not taken has an infinite slope."""
    t = temperature(values, setting)
    extra = jnp.where(t > 0.0, 0.0, jnp.sqrt(t - t) / (t - t))
    return log_rate(values, setting) + extra


WRONG = {
    "forgets the unit of time": (
        changed(log_rate=lambda v, s: log_rate(v, s) - jnp.log(s.hessian_minimum)),
        ("unit of time", "-3.611", "hessian_minimum"),
    ),
    "has a learning rate in an exponent": (
        changed(log_rate=lambda v, s: kramers_log_prefactor(s) - v["scale"] * s.log_barrier / s.learning_rate),
        ("unit of time", "37", "exponents"),
    ),
    "has a loss in an exponent": (
        changed(log_rate=lambda v, s: kramers_log_prefactor(s) - s.loss_gap / temperature(v, s)),
        ("unit of loss", "0.0043", "loss_gap / loss_minimum"),
    ),
    "calls a loss a pure number": (
        changed(
            parameters=(Parameter("scale", typical_loss, 0.7, "a loss"),),
            log_rate=lambda v, s: kramers_log_prefactor(s) - s.loss_gap / temperature(v, s),
        ),
        ("prior medians", "does not follow its unit", "correct the unit"),
    ),
    "has a unit that nobody knows": (
        changed(parameters=(dataclasses.replace(SCALE, unit="joule"),)),
        ("units of the parameters", "joule", "loss/time"),
    ),
    "looks at the escapes in its prior": (
        changed(parameters=(Parameter("scale", lambda frame: frame["escapes"].mean(), 0.7, "wrong"),)),
        ("prior medians", "escapes", "settings only"),
    ),
    "has a median below zero": (
        changed(parameters=(Parameter("scale", -1.0, 0.7, "wrong"),)),
        ("prior medians", "-1", "positive"),
    ),
    "has a temperature with a unit": (
        changed(temperature=lambda v, s: v["scale"] * s.learning_rate),
        ("temperature", "37", "dimensionless"),
    ),
    "has a temperature of zero": (
        changed(temperature=lambda v, s: 0.0 * s.learning_rate),
        ("temperature", "not positive", "dimensionless"),
    ),
    "mixes conditions": (
        changed(log_rate=lambda v, s: log_rate(v, s) + 0.1 * jnp.arange(s.log_barrier.size)),
        ("conditions on their own", "order", "index"),
    ),
    "asks for what it does not declare": (
        changed(log_rate=lambda v, s: log_rate(v, s) + v["slope"]),
        ("log rate can be evaluated", "'slope'", "Declare the parameter"),
    ),
    "declares what it does not use": (
        changed(parameters=(SCALE, Parameter("slope", 1.0, 0.7, "none"))),
        ("parameters enter the rate", "slope", "remove it"),
    ),
    "branches on a value": (
        changed(log_rate=lambda v, s: log_rate(v, s) if v["scale"] > 1 else -log_rate(v, s)),
        ("log rate can be evaluated", "compiled", "jnp.where"),
    ),
    "uses numpy": (
        changed(log_rate=lambda v, s: kramers_log_prefactor(s) - np.exp(np.asarray(s.log_barrier)) / temperature(v, s)),
        ("log rate can be evaluated", "compiled", "jax.numpy"),
    ),
    "fails": (
        changed(log_rate=lambda v, s: s.no_such_setting),
        ("log rate can be evaluated", "AttributeError", "one number for each condition"),
    ),
    "underflows": (
        changed(log_rate=lambda v, s: jnp.log(jnp.maximum(jnp.exp(40 * log_rate(v, s)), 0.0))),
        ("finite log rate", "of draws", "directly"),
    ),
    "has slopes that are not finite": (
        changed(log_rate=nan_slope),
        ("finite gradients", "scale", "jnp.where"),
    ),
    "is absurdly broad": (
        changed(parameters=(Parameter("scale", 1.0, 6.0, "who knows"),)),
        ("prior predictive", "decades", "Narrow"),
    ),
    "knows everything beforehand": (
        changed(parameters=(Parameter("scale", 1.0, 1e-5, "certain"),)),
        ("prior predictive", "could not move it", "Widen"),
    ),
    "predicts escapes that nobody sees": (
        changed(log_rate=lambda v, s: log_rate(v, s) - 60.0),
        ("prior predictive", "nobody would see", "Shift"),
    ),
    "predicts escapes faster than relaxation": (
        changed(log_rate=lambda v, s: log_rate(v, s) + 30.0),
        ("prior predictive", "faster than it relaxes", "smaller"),
    ),
    "has a barrier of its own": (changed(barriers=("wall",)), ("barriers", "'wall'", "saddle")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_law_that_is_wrong_is_told_so_with_a_remedy(name):
    law, (rule, found, remedy) = WRONG[name]
    report = check_law(law, fits=False)
    assert not report.passed
    failure = {finding.rule: finding for finding in report.failures}.get(rule)
    assert failure is not None, str(report)
    assert found in failure.found and remedy in failure.remedy, str(failure)
    assert f"FAILED {rule}: " in str(report) and "breaks" in str(report)


def test_a_rate_in_another_unit_is_forgiven_where_the_parameter_has_it():
    """The same Arrhenius law with a noise strength that is a loss."""
    law = changed(
        parameters=(Parameter("scale", typical_loss, 0.7, "a loss", unit="loss"),),
        log_rate=lambda v, s: kramers_log_prefactor(s) - s.loss_gap / (v["scale"] * s.diffusion_scale),
        temperature=lambda v, s: v["scale"] * s.diffusion_scale / s.loss_minimum,
    )
    assert check_law(law, fits=False).passed


def test_at_a_table_the_prior_is_compared_with_the_measured_rates():
    design = make_design(World(dimension=1), minima=4, learning_rates=2, runs=30, seed=3)
    table = simulate(RIGHT, design, {"scale": 2.0}, seed=3)
    assert check_law(RIGHT, table, fits=False).passed
    for shift, side in ((80.0, "slower"), (-20.0, "faster")):
        shifted = changed(log_rate=lambda v, s, shift=shift: log_rate(v, s) + shift)
        failures = check_law(shifted, table, fits=False).failures
        failure = {finding.rule: finding for finding in failures}["prior covers the data"]
        assert "8 of 8" in failure.found and side in failure.remedy
    other = table.drop(columns="hessian_saddle").assign(barrier="threshold")
    assert [f.rule for f in check_law(RIGHT, other, fits=False).failures] == ["barriers"]


def test_no_law_and_no_table_is_the_users_mistake_and_not_a_finding(tmp_path):
    with pytest.raises(InputError, match="no law"):
        check_law("nothing")
    with pytest.raises(InputError, match="no such file"):
        check_law("power_law", tmp_path / "none.csv", fits=False)


def test_units_are_products_of_powers_of_loss_and_time():
    assert unit_factor("loss^2/time", 3.0, 5.0) == pytest.approx(25 / 3)
    assert unit_factor("1/time^0.5", 4.0, 5.0) == pytest.approx(0.5)
    assert unit_factor("loss·time", 3.0, 5.0) == pytest.approx(15)
    for unit in ("", "metre", "loss time", "time^x"):
        with pytest.raises(UnitError):
            unit_factor(unit, 2.0, 2.0)


LAW_FILE = """
from escape_inference.law import Law, Parameter

LAW = Law(
    name="steep",
    title="a law that forgot its clock",
    source="here",
    parameters=(Parameter("steepness", 2.0, 0.5, "no idea"),),
    log_rate=lambda values, setting: -values["steepness"] * setting.log_barrier{clock},
    temperature=lambda values, setting: setting.diffusion_scale,
    barriers=("saddle",),
)
"""


@pytest.mark.parametrize("right", [True, False])
def test_the_command_reports_and_exits_by_what_it_found(tmp_path, monkeypatch, capsys, right):
    path = tmp_path / "steep.py"
    clock = " + __import__('jax').numpy.log(setting.hessian_minimum)" if right else ""
    path.write_text(LAW_FILE.format(clock=clock))
    monkeypatch.setattr(sys, "argv", ["escape-inference", "check-law", str(path), "--no-fits", "--quiet"])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    assert "unit of time" in out.out
    if right:
        assert not end.value.code and "keeps the contract" in out.out
    else:
        assert end.value.code == 2
        assert out.err == "escape-inference: law steep breaks the contract: unit of time\n"
