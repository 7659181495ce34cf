"""Ramps of the learning rate against solvers that know neither a law of escape nor a random number."""

import numpy as np
import pandas as pd
import pytest
from kramers.formulas import switching_distribution
from kramers.solvers import fokker_planck
from scipy.integrate import cumulative_simpson

from escape_inference.conditions import aggregate
from escape_inference.design import make_ramps
from escape_inference.errors import InputError
from escape_inference.inference import infer
from escape_inference.law import load_law
from escape_inference.posterior import parameters_of
from escape_inference.sde import simulate_sde
from escape_inference.simulation import law_log_rate, simulate
from escape_inference.table import read_measurements
from escape_inference.worlds import World, make_design

LOSS, HESSIAN, BATCH = 0.03, 2.5, 2
RATIO, SADDLE = 1.4, 1.5  # L^s / L*, h^s / h*
LEVELS = np.geomspace(0.05, 0.25, 9)  # temperatures
SECONDS = 40.0  # time at each level, 1 / h*


def ramp(runs, levels=LEVELS, seconds=SECONDS, noise=None, **changes):
    """One minimum under a ramp through these temperatures; all levels last equally long in time."""
    eta = levels * BATCH / HESSIAN if noise is None else levels * BATCH * LOSS / noise
    return pd.DataFrame(
        {
            "minimum": "a",
            "ramp": "up",
            "learning_rate": eta,
            "batch_size": BATCH,
            "loss_minimum": LOSS,
            "loss_barrier": RATIO * LOSS,
            "hessian_minimum": HESSIAN,
            "hessian_saddle": SADDLE * HESSIAN,
            "runs": runs,
            "max_steps": np.rint(seconds / (eta * HESSIAN)).astype(int),
        }
        | changes
    )


def well(x):
    """Loss and its slope along the escape direction; lengths in units of sqrt(L* / h*), losses of L*."""
    a = np.sqrt(12 * (RATIO - 1) / (1 + SADDLE))
    u = np.where(x > a, 2 - x / a, x / a)
    skew = SADDLE - 1
    inner = np.maximum(u, 0)
    height = np.where(u < 0, u**2 / 2, inner**2 * (0.5 + (skew - 1) * inner / 3 - skew * inner**2 / 4))
    slope = a * np.where(u < 0, u, inner * (1 - inner) * (1 + skew * inner))
    return 1 + a**2 * height, np.where(x > a, -slope, slope)


def exact_survival(design, temperature, q):
    """Share of runs still inside at the end of each level, from the Fokker-Planck equation.

    dx = -L' dt + sqrt(2 T L^q) dW has constant diffusion in y, dy = L^(-q/2) dx, and in the time s, ds = T dt:
    dy = -L' L^(-q/2) (1/T + q/(2 L^(1-q))) ds + sqrt(2) dW for q = 0 and 1.
    """
    a = np.sqrt(12 * (RATIO - 1) / (1 + SADDLE))
    x = np.linspace(-4 * a, 1.5 * a, 20001)
    loss, slope = well(x)
    y = cumulative_simpson(loss ** (-q / 2), x=x, initial=0)
    y -= np.interp(0.0, x, y)
    pull = slope * loss ** (-q / 2)
    time = (design["learning_rate"] * design["hessian_minimum"] * design["max_steps"]).to_numpy()
    ends = np.cumsum(temperature * time)

    def drift(where, s):
        level = min(np.searchsorted(ends, s, side="right"), len(ends) - 1)
        return -np.interp(where, y, pull) * (1 / temperature[level] + q / 2)

    solved = fokker_planck.solve(
        drift, 1.0, (y[0], y[-1]), left="reflecting", right="absorbing", t_end=ends[-1], x0=0.0,
        n_cells=600, dt=ends[-1] / 3000, time_dependent=True,
    )  # fmt: skip
    return np.interp(ends, solved.t, solved.survival)


@pytest.mark.parametrize(("noise", "q"), [("loss", 1), ("uniform", 0)])
def test_survival_and_mean_critical_learning_rate_of_stepped_ramps_are_the_exact_ones(noise, q):
    world = World(noise, noise_strength=0.2 if noise == "uniform" else None, dimension=1, time_step=0.02)
    runs = 1500
    design = ramp(runs, noise=world.noise_strength)
    table = simulate_sde(world, design, seed=1)
    reached = table.groupby("learning_rate")["escaped"]
    survived = np.cumprod(1 - reached.mean().to_numpy())
    exact = exact_survival(design, LEVELS, q)
    assert exact[0] > 0.97 and exact[-1] < 0.1  # the ramp spans the whole range
    error = np.sqrt(exact * (1 - exact) / runs)
    assert (np.abs(survived - exact) < 3 * error + 0.01).all(), (survived, exact)
    jump = table[table["escaped"]].groupby("run")["learning_rate"].last()
    share = -np.diff(np.append(1.0, exact))
    eta = design["learning_rate"].to_numpy()
    mean = (share * eta).sum() / share.sum()
    assert abs(jump.mean() / mean - 1) < 3 * jump.std() / mean / np.sqrt(len(jump)) + 0.003


def test_a_run_carries_its_state_from_level_to_level():
    """Two levels at one temperature are one level twice as long; runs restarted at the minimum would survive more."""
    world = World("loss", dimension=6, barrier="threshold", time_step=0.02)
    halves = ramp(1500, levels=np.array([0.0499, 0.05]), seconds=1.0, loss_barrier=1.35 * LOSS)
    table = simulate_sde(world, halves, seed=2)
    whole = ramp(1500, levels=np.array([0.05]), seconds=2.0, loss_barrier=1.35 * LOSS, ramp="")
    once = simulate_sde(world, whole, seed=3)
    left = table.groupby("run")["escaped"].last().mean()
    again = simulate_sde(world, whole.assign(max_steps=whole["max_steps"] // 2), seed=4)["escaped"].mean()
    error = np.sqrt(left * (1 - left) / 1500)
    assert abs(left - once["escaped"].mean()) < 3 * np.sqrt(2) * error
    restarted = 1 - (1 - again) ** 2
    assert left - restarted > 4 * np.hypot(error, 2 * np.sqrt(again / 1500))


def test_ramps_drawn_from_a_law_switch_as_force_spectroscopy_predicts():
    """Fine levels are a smooth ramp: p(eta) = k exp(-int k / rate), k escapes a time, eta rising linearly in time."""
    law, values = load_law("power_law"), {"temperature_scale": 1.2, "effective_dimension": 3.0}
    levels = np.linspace(0.03, 0.24, 700)
    design = ramp(2000, levels=levels, seconds=1.5)
    duration = (design["learning_rate"] * design["max_steps"]).mean()  # of one level, time

    def rate(eta):
        part = ramp(1, levels=np.ravel(eta) * HESSIAN / BATCH).assign(check_interval=1)
        return np.exp(law_log_rate(law, part, values, "saddle")).reshape(np.shape(eta))

    eta = design["learning_rate"].to_numpy()
    half = (eta[1] - eta[0]) / 2
    exact = switching_distribution(rate, (eta[1] - eta[0]) / duration, eta[-1] + half, eta[0] - half)
    table = simulate("power_law", design, values, seed=5)
    jump = table[table["escaped"]].groupby("run")["learning_rate"].last()
    assert len(jump) == 2000
    assert abs(jump.mean() - exact.mean) < 3 * jump.std() / np.sqrt(2000) + 0.1 * half
    assert jump.std() == pytest.approx(np.sqrt(exact.variance), rel=3 / np.sqrt(2 * 2000) + 0.01)


def test_ramps_alone_give_back_the_temperature_scale_and_the_dimension_of_a_world():
    """Saddles of different heights in three directions; only the jumps of ramps are known."""
    world = World(dimension=3)
    design = make_ramps(make_design(world, minima=8, seed=6), levels=10, runs=40)
    table = simulate_sde(world, design, seed=6).drop(columns="effective_dimension")
    assert aggregate(read_measurements(table)).frame["ramp"].sum() >= 70
    fit = infer("power_law", table, seed=0, draws=500, warmup=300)
    assert fit.attrs["trustworthy"]
    found = parameters_of(fit)
    for name, truth in (("temperature_scale", 1.0), ("effective_dimension", 3.0)):
        draws = fit.posterior[name].to_numpy().ravel()
        low, high = np.quantile(draws, [0.01, 0.99])
        assert low < truth < high, (name, low, high)
    assert found["temperature_scale"]["sd"] < 0.15 * found["temperature_scale"]["prior_sd"]
    wrong = infer("power_law", table.assign(learning_rate=1.5 * table["learning_rate"]), seed=0, draws=500, warmup=300)
    assert np.quantile(wrong.posterior["temperature_scale"], 0.99) < 1.0


def test_a_ramp_has_a_row_for_each_level_until_its_jump():
    design = pd.concat([ramp(20), ramp(7).assign(minimum="b", ramp="", max_steps=100)], ignore_index=True)
    for table in (
        simulate_sde(World(dimension=1), design, seed=7),
        simulate("power_law", design, {"temperature_scale": 1.0, "effective_dimension": 1.0}, seed=7),
    ):
        read_measurements(table)
        ramps = table[table["minimum"] == "a"]
        assert ramps["run"].nunique() == 20 and not set(ramps["run"]) & set(table.loc[table["minimum"] == "b", "run"])
        for _, rows in ramps.groupby("run"):
            eta = design["learning_rate"].to_numpy()[: len(rows)]
            assert rows["learning_rate"].tolist() == eta.tolist()
            assert not rows["escaped"].iloc[:-1].any()
            full = rows["steps"] == design["max_steps"].to_numpy()[: len(rows)]
            assert full[~rows["escaped"]].all()
            assert rows["escaped"].iloc[-1] or len(rows) == len(LEVELS)


def test_a_ramp_does_not_depend_on_its_neighbours():
    two = pd.concat([ramp(30), ramp(30).assign(minimum="b").iloc[:5]], ignore_index=True)
    world = World(dimension=2)
    alone, both = simulate_sde(world, ramp(30), seed=8), simulate_sde(world, two, seed=8)
    pd.testing.assert_frame_equal(alone, both[both["minimum"] == "a"])


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda rows: rows.iloc[::-1], "rise"),
        (lambda rows: rows.iloc[:1], "two levels"),
        (lambda rows: rows.assign(start="quasi_stationary"), "starts at the minimum"),
        (lambda rows: rows.assign(runs=range(1, len(rows) + 1)), "runs must be the same"),
        (lambda rows: rows.assign(loss_barrier=np.linspace(0.04, 0.05, len(rows))), "loss_barrier must be the same"),
    ],
)
def test_a_ramp_that_is_none_is_refused_with_its_rows(spoil, word):
    with pytest.raises(InputError, match=word) as caught:
        simulate_sde(World(dimension=1), spoil(ramp(3)), seed=0)
    assert "row" in str(caught.value)


def test_half_of_the_runs_of_a_default_ramp_jump_within_two_thirds_of_its_levels():
    world = World(dimension=2)
    design = make_ramps(make_design(world, minima=6, runs=50, seed=9), levels=9)
    table = simulate_sde(world, design, seed=9)
    level = table.groupby(["minimum", "run"])["escaped"].agg(["size", "last"])
    early = (level["last"] & (level["size"] <= 6)).mean()
    assert 0.3 < early < 0.75
    assert level["last"].mean() > 0.85
