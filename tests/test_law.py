"""Laws are finite and differentiable far from typical settings, are the formulas of their papers, and are found by name, path or object."""

import dataclasses
import subprocess
import sys
import textwrap
from math import exp, log, pi, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.integrate import cumulative_trapezoid

import escape_inference.models
from escape_inference.errors import InputError
from escape_inference.law import Law, Parameter, Setting, built_in_laws, load_law, load_laws
from escape_inference.passage import log_leading_rate, log_mean_passage_rate
from escape_inference.posterior import description

NAMES = ("power_law", "arrhenius", "arrhenius_anisotropic", "noise_exponent", "constant_rate")
KINDS = [(barrier, start) for barrier in ("saddle", "threshold") for start in ("minimum", "quasi_stationary")]
SIZE = 40


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs that run once are compiled without optimisation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def frame():
    """Conditions over two decades of loss and a wide range of η, B, h*, c; no two quantities vary together."""
    rng = np.random.default_rng(11)
    loss = np.exp(rng.uniform(np.log(2e-4), np.log(0.05), SIZE))
    return pd.DataFrame(
        {
            "learning_rate": np.exp(rng.uniform(np.log(0.005), np.log(0.1), SIZE)),
            "batch_size": rng.choice([1, 2, 5, 8, 20], SIZE).astype(float),
            "check_interval": rng.choice([1, 2, 5], SIZE).astype(float),
            "loss_minimum": loss,
            "loss_barrier": loss * np.exp(rng.uniform(0.1, 1.5, SIZE)),
            "hessian_minimum": np.exp(rng.uniform(np.log(0.3), np.log(12.0), SIZE)),
            "hessian_saddle": np.exp(rng.uniform(np.log(0.1), np.log(5.0), SIZE)),
        }
    )


def setting(barrier="saddle", start="minimum", table=None):
    table = frame() if table is None else table
    columns = {name: jnp.asarray(table[name].to_numpy(float)) for name in table if name != "loss_barrier"}
    log_barrier = jnp.asarray(np.log(table["loss_barrier"] / table["loss_minimum"]).to_numpy())
    return Setting(**columns, log_barrier=log_barrier, barrier=barrier, start=start)


def prior_draws(law, seed=0):
    """One draw of every parameter for every condition."""
    keys = jax.random.split(jax.random.key(seed), len(law.parameters))
    return {
        p.name: p.prior(jnp.asarray(p.median_for(frame()))).sample(key, (SIZE,))
        for p, key in zip(law.parameters, keys, strict=True)
    }


def log_rate_and_slopes(law, values, at):
    value, pull = jax.vjp(lambda values, at: jnp.broadcast_to(law.log_rate(values, at), (SIZE,)), values, at)
    return np.asarray(value), pull(jnp.ones(SIZE))


def log_rate(law, values, at):
    return log_rate_and_slopes(law, values, at)[0]


# --- the contract


def test_the_laws_that_ship_are_found_in_their_order():
    assert tuple(built_in_laws()) == NAMES


@pytest.mark.parametrize(("barrier", "start"), KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_log_rates_and_all_gradients_are_finite_at_draws_from_the_prior(name, barrier, start):
    law = load_law(name)
    value, (by_parameter, by_setting) = log_rate_and_slopes(law, prior_draws(law), setting(barrier, start))
    assert value.shape == (SIZE,) and np.isfinite(value).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(by_parameter))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(by_setting))
    for p in law.parameters_for({barrier}):
        used = np.abs(np.asarray(by_parameter[p.name])) > 0
        assert used.any(), f"{p.name} is declared for a {barrier} but does not enter the rate"
    for p in set(law.parameters) - set(law.parameters_for({barrier})):
        assert not np.asarray(by_parameter[p.name]).any()


def test_noise_strengths_have_their_units():
    units = {name: {p.name: p.unit for p in law.parameters} for name, law in built_in_laws().items()}
    assert units["arrhenius"]["noise_strength"] == "loss/time"
    assert units["arrhenius_anisotropic"]["noise_strength"] == "loss"


@pytest.mark.parametrize("empty", [(), ("loss_minimum",), ("hessian_minimum",), ("loss_barrier", "hessian_minimum")])
@pytest.mark.parametrize("name", NAMES)
def test_prior_medians_follow_the_units_and_never_look_at_the_escapes(name, empty):
    """Escapes are not even in the table; with other units of loss and time the medians change by those."""
    loss, time, table = 0.0043, 37.0, frame().assign(**dict.fromkeys(empty, np.nan))
    scaled = table.assign(
        loss_minimum=table["loss_minimum"] * loss,
        loss_barrier=table["loss_barrier"] * loss,
        hessian_minimum=table["hessian_minimum"] / time,
        learning_rate=table["learning_rate"] * time,
    )
    for p in load_law(name).parameters:
        factor = {"1": 1.0, "loss": loss, "loss/time": loss / time}[p.unit]
        assert p.median_for(scaled) == pytest.approx(p.median_for(table) * factor, rel=1e-10)
        assert p.reason


def test_medians_where_something_was_not_measured_are_those_at_the_centres_of_the_models_priors():
    strength = load_law("arrhenius").parameters[0]
    table = frame()
    other = table.assign(loss_minimum=np.nan)
    assert strength.median_for(other) == pytest.approx(
        strength.median_for(table.assign(loss_minimum=table["loss_barrier"] / np.e)), rel=1e-12
    )
    other = table.assign(hessian_minimum=np.nan)
    typical = 0.2 / table["learning_rate"].median()
    assert strength.median_for(other) == pytest.approx(
        strength.median_for(table.assign(hessian_minimum=typical)), rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_medians_are_finite_where_nothing_was_measured(name):
    empty = frame().assign(loss_minimum=np.nan, loss_barrier=np.nan, hessian_minimum=np.nan)
    assert all(np.isfinite(p.median_for(empty)) for p in load_law(name).parameters)


def test_parameters_have_the_names_and_theoretical_values_of_the_theory():
    names = {name: tuple(p.name for p in law.parameters) for name, law in built_in_laws().items()}
    assert names["power_law"] == ("temperature_scale", "effective_dimension")
    assert set(names["noise_exponent"]) == {"noise_exponent", "temperature_scale", "effective_dimension"}
    assert names["arrhenius"] == names["arrhenius_anisotropic"] == ("noise_strength", "effective_dimension")
    theory = {p.name: p.theory for law in built_in_laws().values() for p in law.parameters}
    assert theory["temperature_scale"] == 1.0 and theory["noise_exponent"] == 1.0
    assert load_law("noise_exponent").special_cases == ("power_law",)


# --- formulas by hand

ONE = {
    "learning_rate": 0.05,
    "batch_size": 7.0,
    "check_interval": 3.0,
    "loss_minimum": 0.02,
    "loss_barrier": 0.031,
    "hessian_minimum": 3.1,
    "hessian_saddle": 1.7,
}
KRAMERS = sqrt(3.1 * 1.7) / (2 * pi)


def one(barrier="saddle", start="minimum"):
    """One asymmetric condition, repeated so that nothing compiles anew."""
    return setting(barrier, start, pd.DataFrame([ONE] * SIZE))


def rate(name, at, **values):
    return float(np.exp(log_rate(load_law(name), {k: jnp.asarray(v) for k, v in values.items()}, at)[0]))


def test_the_power_law_over_a_saddle_is_that_of_mori_and_others():
    temperature = 0.8 * 0.05 * 3.1 / 7
    expected = KRAMERS * (0.031 / 0.02) ** -(1 / temperature + 1 - 3.4 / 2)
    found = rate("power_law", one(), temperature_scale=0.8, effective_dimension=3.4)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("height", [3.0, 4.0, 6.0])
def test_finite_temperature_makes_n_of_the_saddle_formula_too_large_by_temperature_over_barrier(height):
    """Exact passage times of one dimension, well and mirror image joined at a saddle, at barriers ΔU = height × T."""
    temperature, sizes = np.linspace(0.03, 0.3, SIZE), []
    table = pd.DataFrame([{**ONE, "batch_size": 1.0, "hessian_minimum": 1.0, "hessian_saddle": 1.0}] * SIZE)
    table = table.assign(learning_rate=temperature, loss_barrier=ONE["loss_minimum"] * np.exp(height * temperature))
    for t, barrier in zip(temperature, np.exp(height * temperature), strict=True):
        distance = sqrt(6 * (barrier - 1))
        x = np.linspace(-8.0, 1.5 * distance, 40_001)
        u = np.where(x < distance, x, 2 * distance - x) / distance
        loss = 1 + distance**2 * np.where(u < 0, u**2 / 2, u**2 / 2 - u**3 / 3)
        density = loss ** -(1 / t + 1)
        inner = cumulative_trapezoid(density, x, initial=0.0) / (density * t * loss)
        sizes.append(-np.log(np.trapezoid(inner[x >= 0], x[x >= 0])))
    law, at = load_law("power_law"), setting(table=table)
    values = {"temperature_scale": jnp.ones(SIZE), "effective_dimension": jnp.ones(SIZE)}
    missed = np.array(sizes) - np.asarray(law.log_rate(values, at))
    excess = 2 * np.polyfit(height * temperature, missed, 1)[0]
    assert excess * height == pytest.approx(1.0, abs=0.35)


def test_arrhenius_with_uniform_noise_is_kramers_formula():
    expected = KRAMERS * exp(-(0.031 - 0.02) * 7 / (0.05 * 0.24))
    assert rate("arrhenius", one(), noise_strength=0.24) == pytest.approx(expected, rel=1e-12)


def test_arrhenius_with_noise_along_the_hessian_is_kramers_formula():
    expected = KRAMERS * exp(-(0.031 - 0.02) * 7 / (0.05 * 0.09 * 3.1))
    assert rate("arrhenius_anisotropic", one(), noise_strength=0.09) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("q", [-0.6, 0.3, 1.7])
def test_the_noise_exponent_family_over_a_saddle_is_kramers_formula_for_its_noise(q):
    c, temperature, n = 1.55, 0.8 * 0.05 * 3.1 / 7, 3.4
    height = (c ** (1 - q) - 1) / (1 - q)
    expected = KRAMERS * c ** (-q * (1 - n / 2)) * exp(-height / temperature)
    found = rate("noise_exponent", one(), noise_exponent=q, temperature_scale=0.8, effective_dimension=n)
    assert found == pytest.approx(expected, rel=1e-11)


def test_the_constant_rate_counts_relaxation_times():
    assert rate("constant_rate", one(), rate_scale=0.04) == pytest.approx(0.04 * 3.1, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("power_law", {"temperature_scale": 0.8}, 0.8 * 0.05 * 3.1 / 7),
        ("noise_exponent", {"temperature_scale": 0.8}, 0.8 * 0.05 * 3.1 / 7),
        ("arrhenius", {"noise_strength": 0.24}, 0.05 * 0.24 / (7 * 0.02)),
        ("arrhenius_anisotropic", {"noise_strength": 0.09}, 0.05 * 0.09 * 3.1 / (7 * 0.02)),
        ("constant_rate", {}, 0.05 * 3.1 / 7),
    ],
)
def test_temperatures_are_those_of_the_noise_at_the_minimum(name, values, expected):
    law, at = load_law(name), one()
    assert float(law.temperature(values, at)[0]) == pytest.approx(expected, rel=1e-13)
    doubled = dataclasses.replace(at, batch_size=2 * at.batch_size)
    assert float(law.temperature(values, doubled)[0]) == pytest.approx(expected / 2, rel=1e-13)


def test_at_the_critical_learning_rate_the_power_law_forgets_the_barrier():
    """η_c = 2 B/((n − 2) h*): the exponent vanishes there, and is positive below."""
    n, at = 9.0, setting()
    critical = 2 * at.batch_size / ((n - 2) * at.hessian_minimum)
    values = {"temperature_scale": jnp.asarray(1.0), "effective_dimension": jnp.asarray(n)}
    for share, sign in ((1.0, 0), (0.9, -1), (1.1, 1)):
        _, (_, slopes) = log_rate_and_slopes(
            load_law("power_law"), values, dataclasses.replace(at, learning_rate=share * critical)
        )
        np.testing.assert_array_equal(np.sign(np.round(np.asarray(slopes.log_barrier), 9)), sign)


@pytest.mark.parametrize("start", ["minimum", "quasi_stationary"])
@pytest.mark.parametrize(
    ("name", "values", "temperature", "q"),
    [
        ("power_law", {"temperature_scale": 8.0}, 8.0 * 0.05 * 3.1 / 7, 1.0),
        ("noise_exponent", {"temperature_scale": 8.0, "noise_exponent": 0.6}, 8.0 * 0.05 * 3.1 / 7, 0.6),
        ("arrhenius", {"noise_strength": 0.24}, 0.05 * 0.24 / (7 * 0.02), 0.0),
        ("arrhenius_anisotropic", {"noise_strength": 0.09}, 0.05 * 0.09 * 3.1 / (7 * 0.02), 0.0),
    ],
)
def test_over_a_threshold_a_law_is_the_passage_law_of_its_own_noise(name, values, temperature, q, start):
    """The start picks the law; the radius is moved out by 0.5826 deviations of the walk between two looks."""
    radius = sqrt(2 * (0.031 - 0.02) / 3.1)
    # noise of one iteration at the threshold: 2 η T L*^(1−q) (L^s)^q
    deviation = sqrt(2 * 0.05 * temperature * 0.02 ** (1 - q) * 0.031**q)
    shifted = 1 + 3.1 * (radius + 0.5826 * sqrt(3) * deviation) ** 2 / (2 * 0.02)
    passage = log_leading_rate if start == "quasi_stationary" else log_mean_passage_rate
    columns = [jnp.full(SIZE, x) for x in (temperature, shifted, 2.7, q)]
    expected = 3.1 * np.exp(np.asarray(jax.vjp(passage, *columns)[0])[0])
    found = rate(name, one("threshold", start), effective_dimension=2.7, **values)
    assert found == pytest.approx(expected, rel=1e-8)


# --- limits


@pytest.mark.parametrize(("barrier", "start"), KINDS)
def test_noise_that_grows_as_the_loss_is_the_power_law(barrier, start):
    law, family = load_law("power_law"), load_law("noise_exponent")
    values, at = prior_draws(law), setting(barrier, start)
    general = log_rate(family, values | {"noise_exponent": jnp.ones(SIZE)}, at)
    np.testing.assert_allclose(general, log_rate(law, values, at), rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize(("barrier", "start"), KINDS)
def test_noise_that_does_not_grow_is_arrhenius_frozen_at_each_minimum(barrier, start):
    """D = α L* h* or s = α L*, another one for every minimum."""
    family, at = load_law("noise_exponent"), setting(barrier, start)
    values = prior_draws(family) | {"noise_exponent": jnp.zeros(SIZE)}
    expected = log_rate(family, values, at)
    frozen = values["temperature_scale"] * at.loss_minimum
    for name, strength in (("arrhenius_anisotropic", frozen), ("arrhenius", frozen * at.hessian_minimum)):
        found = log_rate(load_law(name), values | {"noise_strength": strength}, at)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-6)


@pytest.mark.parametrize("name", ["power_law", "noise_exponent", "arrhenius", "arrhenius_anisotropic"])
def test_rarer_looks_miss_escapes_over_a_threshold_and_none_over_a_saddle(name):
    law = load_law(name)
    values = {p.name: jnp.asarray(p.median_for(frame())) for p in law.parameters}
    for barrier in ("threshold", "saddle"):
        at = setting(barrier)
        often, rarely = (
            log_rate(law, values, dataclasses.replace(at, check_interval=jnp.full(SIZE, m))) for m in (1.0, 20.0)
        )
        assert (often > rarely).all() if barrier == "threshold" else (often == rarely).all()


# --- priors


def test_priors_have_their_median_and_their_width():
    positive = Parameter("scale", 0.3, 0.7, "a reason")
    real = Parameter("exponent", -0.4, 0.7, "a reason", positive=False)
    for width in (0.5, 1.0, 2.0):
        log_scale = np.log(positive.prior(jnp.asarray(0.3), width).icdf(jnp.array([0.5, 0.841344746])))
        np.testing.assert_allclose(log_scale, [log(0.3), log(0.3) + 0.7 * width], rtol=1e-6)
        quantiles = real.prior(jnp.asarray(-0.4), width).icdf(jnp.array([0.5, 0.841344746]))
        np.testing.assert_allclose(quantiles, [-0.4, -0.4 + 0.7 * width], rtol=1e-6, atol=1e-8)


# --- laws are found

LAW_FILE = """
from escape_inference.law import Law, Parameter

LAW = Law(
    name="{name}",
    title="a law of my own",
    source="here",
    parameters=(Parameter("steepness", 1.0, 0.5, "no idea"),),
    log_rate=lambda values, setting: -values["steepness"] * setting.log_barrier,
    temperature=lambda values, setting: setting.diffusion_scale,
)
"""


def law_file(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def test_a_law_is_found_by_its_name_by_a_path_or_as_itself(tmp_path):
    law = load_law("arrhenius")
    assert law.name == "arrhenius"
    assert load_law(law) is law
    path = law_file(tmp_path, LAW_FILE.format(name="mine"))
    for given in (path, str(path)):
        mine = load_law(given)
        assert mine.name == "mine"
        found = log_rate(mine, {"steepness": jnp.asarray(2.0)}, one())
        assert found[0] == pytest.approx(-2 * log(0.031 / 0.02))
    assert [each.name for each in load_laws(["power_law", path, law])] == ["power_law", "mine", "arrhenius"]


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match=r"no law 'power'") as caught:
        load_law("power")
    assert all(name in str(caught.value) for name in NAMES) and ".py" in str(caught.value)


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(InputError, match=r"absent\.py: there is no such law file"):
        load_law(tmp_path / "absent.py")


@pytest.mark.parametrize("text", ["law = 3", "LAW = 'power_law'", "LAW = None"])
def test_a_file_without_a_law_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"mine\.py: a law file must define a constant LAW"):
        load_law(law_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LAW = (", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError: .*no_such_module_anywhere"),
        ("LAW = 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_with_the_reason(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"mine\.py: the law file cannot be run: {message}"):
        load_law(law_file(tmp_path, text))


def test_a_mistake_inside_the_law_of_a_file_is_reported_as_it_is(tmp_path):
    with pytest.raises(InputError, match=r"^a law's name must be a Python identifier, not 'my law'"):
        load_law(law_file(tmp_path, LAW_FILE.format(name="my law")))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "log_prefactor"), ("discrepancy",)])
def test_parameter_names_are_unique_and_not_those_of_the_model(names):
    parameters = tuple(Parameter(name, 1.0, 1.0, "a reason") for name in names)
    with pytest.raises(InputError, match="parameter names must be unique"):
        Law("mine", "mine", "here", parameters, lambda values, at: at.log_barrier, lambda values, at: at.log_barrier)


def test_a_law_given_twice_is_refused_by_name():
    with pytest.raises(InputError, match=r"more than once: arrhenius, power_law$"):
        load_laws(["power_law", "arrhenius", "power_law", load_law("arrhenius"), "constant_rate"])


@pytest.fixture
def other_folder(tmp_path, monkeypatch):
    """Another folder of models in place of the one that ships."""
    monkeypatch.setattr(escape_inference.models, "__path__", [str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("escape_inference.models.test_only_")]:
        del sys.modules[name]


def test_a_new_file_in_the_folder_is_a_law_at_once(other_folder):
    law_file(other_folder, LAW_FILE.format(name="second"), "test_only_b.py")
    law_file(other_folder, LAW_FILE.format(name="first"), "test_only_c.py")
    assert tuple(built_in_laws()) == ("first", "second")
    assert load_law("second").title == "a law of my own"


def test_two_files_with_one_name_are_an_error(other_folder):
    for name in ("test_only_d.py", "test_only_e.py"):
        law_file(other_folder, LAW_FILE.format(name="twin"), name)
    with pytest.raises(InputError, match=r"models/test_only_e\.py: the name 'twin' is taken"):
        built_in_laws()


def test_a_file_in_the_folder_without_a_law_is_an_error(other_folder):
    law_file(other_folder, "nothing = 0", "test_only_f.py")
    with pytest.raises(InputError, match=r"models/test_only_f\.py: a law file must define a constant LAW"):
        built_in_laws()


def test_numpyro_is_whole_where_another_package_imports_it_lazily():
    """ArviZ 1 registers NumPyro with a lazy loader; ``import numpyro.distributions`` then runs that package twice and loses its parts."""
    code = "import escape_inference.comparison, numpyro; numpyro.distributions.distribution, numpyro.infer.hmc"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_equations_of_a_law_and_everything_about_it_in_a_posterior_file_are_described(name):
    law = load_law(name)
    assert "κ = " in law.equation and "h*" in law.equation
    assert law.temperature_equation in description("temperature", law)[1]
    constants = ["check_interval", "runs", "longest", "barrier", "start", "ramp", "measured_loss_minimum"]
    own = [f"{p.name}{end}" for p in law.parameters for end in ("", "_by_minimum", "_spread", "_unmeasured")]
    for variable in constants + own:
        unit, text = description(variable, law)
        assert unit and text, variable
    assert description("something_else", law) == ("", "")
