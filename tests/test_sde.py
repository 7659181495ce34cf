"""Simulated escapes against exact rates of the same stochastic differential equation, computed without simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from kramers.solvers import FirstPassage1D
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import splu

from escape_inference.errors import InputError
from escape_inference.sde import simulate_sde
from escape_inference.sde_steps import State, StepSettings, landscape, revive
from escape_inference.simulation import simulate_slide
from escape_inference.table import read_measurements
from escape_inference.worlds import World, high_barrier_rate, make_design, temperature

LOSS, HESSIAN = 0.03, 2.5  # of every hand-made condition: nothing is tested at L* = h* = 1 only


def condition(T, c, r=1.0, *, look=None, noise=None, runs=600, time, start="minimum", check_interval=1):
    """One row of a design at temperature T, followed for ``time`` / h*. Uniform noise D = ``noise`` leaves eta free."""
    batch = 3 if look is None else 7
    learning_rate = T * batch / HESSIAN if look is None else look / HESSIAN
    if noise is not None:
        learning_rate, batch = T * 7 * LOSS / noise, 7
    return pd.DataFrame(
        {
            "minimum": ["a"],
            "learning_rate": [learning_rate],
            "batch_size": [batch],
            "loss_minimum": [LOSS],
            "loss_barrier": [c * LOSS],
            "hessian_minimum": [HESSIAN],
            "hessian_saddle": [r * HESSIAN],
            "runs": [runs],
            "max_steps": [int(np.ceil(time / (learning_rate * HESSIAN)))],
            "start": [start],
            "check_interval": [check_interval],
        }
    )


def potential(loss, q):
    return np.log(loss) if q == 1 else np.expm1((1 - q) * np.log(loss)) / (1 - q)


def saddle_height(x, c, r):
    """Loss along the escape direction, lengths in units of sqrt(L* / h*), losses of L*."""
    a = np.sqrt(12 * (c - 1) / (1 + r))
    u = np.where(x > a, 2 - x / a, x / a)
    inside = u**2 / 2 + (r - 2) * u**3 / 3 - (r - 1) * u**4 / 4
    return 1 + a**2 * np.where(u < 0, u**2 / 2, inside), a


def exact_saddle(q, T, c, r):
    """First passage in one dimension, time in units of 1 / h*."""
    a = saddle_height(0.0, c, r)[1]
    return FirstPassage1D(
        log_psi=lambda x: -potential(saddle_height(x, c, r)[0], q) / T,
        D=lambda x: T * saddle_height(x, c, r)[0] ** q,
        domain=(-12 * a, 1.5 * a),
        left="reflecting",
        right="absorbing",
        breakpoints=(0.0, a),
    )


def exact_threshold(q, T, c, n, look):
    """First passage of the radius of an isotropic well; the threshold is moved for looks ``look`` / h* apart."""
    end = np.sqrt(2 * (c - 1)) + 0.5826 * np.sqrt(2 * T * c**q * look)
    return FirstPassage1D(
        log_psi=lambda s: (n - 1) * np.log(s) - potential(1 + s**2 / 2, q) / T,
        D=lambda s: T * (1 + s**2 / 2) ** q,
        domain=(1e-4, end),
        left="reflecting",
        right="absorbing",
    )


def relaxation(table):
    return (table["learning_rate"] * table["hessian_minimum"]).to_numpy()


def measured_rate(table):
    """Escapes over exposure in units of h*, and its relative standard error."""
    exposure = (relaxation(table) * (table["steps"] - 0.5 * table["check_interval"] * table["escaped"])).sum()
    return table["escaped"].sum() / exposure, 1 / np.sqrt(table["escaped"].sum())


def assert_rate(table, exact, systematic=0.02):
    rate, error = measured_rate(table)
    assert abs(np.log(rate / exact)) < 3 * error + systematic


CASES = [("loss", 1.0, 0.12, 1.4, 1.5), ("loss", 0.5, 0.1, 1.35, 0.7), ("uniform", 0.0, 0.15, 1.5, 1.2)]


@pytest.mark.parametrize(("noise", "q", "T", "c", "r"), CASES)
def test_mean_time_over_a_saddle_is_the_exact_one(noise, q, T, c, r):
    exact = exact_saddle(q, T, c, r)
    mean = float(exact.mean_time(0.0).value)
    world = World(noise, q, 0.2 if noise == "uniform" else None, dimension=1, time_step=0.02)
    design = condition(T, c, r, noise=world.noise_strength, runs=1500, time=15 * mean)
    table = simulate_sde(world, design, seed=1)
    assert table["escaped"].all()
    times = relaxation(table) * (table["steps"] - 0.5)
    assert abs(times.mean() / mean - 1) < 3 * times.std() / mean / np.sqrt(len(times)) + 0.02


@pytest.mark.parametrize(("noise", "q", "T", "c", "r"), CASES)
def test_quasi_stationary_rate_over_a_saddle_is_the_leading_eigenvalue(noise, q, T, c, r):
    exact = exact_saddle(q, T, c, r).decay_rate().value
    world = World(noise, q, 0.2 if noise == "uniform" else None, dimension=1, time_step=0.02)
    design = condition(T, c, r, noise=world.noise_strength, runs=100, time=20 / exact, start="quasi_stationary")
    assert_rate(simulate_sde(world, design, seed=2), exact)


def test_frozen_noise_in_the_other_directions_does_not_change_the_escape_over_a_saddle():
    exact = exact_saddle(0.0, 0.12, 1.4, 1.5).decay_rate().value
    design = condition(0.12, 1.4, 1.5, runs=100, time=20 / exact, start="quasi_stationary")
    assert_rate(simulate_sde(World(noise_exponent=0.0, dimension=3), design, seed=3), exact)


def saddle_eigenvalue(T, c, r, n, q=1.0, cells=(240, 120)):
    """Leading eigenvalue for n directions: finite volumes in (x, distance in the other n - 1 directions)."""
    a = saddle_height(0.0, c, r)[1]
    edges_x = np.linspace(-1.6 * a, 1.5 * a, cells[0] + 1)
    edges_y = np.linspace(0, 2.0 * a, cells[1] + 1)
    dx, dy = edges_x[1] - edges_x[0], edges_y[1] - edges_y[0]
    x, y = edges_x[:-1] + dx / 2, edges_y[:-1] + dy / 2

    def loss(x, y):
        return saddle_height(x, c, r)[0][:, None] + y[None, :] ** 2 / 2

    def conductance(x, y):
        return np.exp(-potential(loss(x, y), q) / T) * y[None, :] ** (n - 2)

    speed = conductance(x, y) / (T * loss(x, y) ** q) * dx * dy
    index = np.arange(x.size * y.size).reshape(x.size, y.size)
    along = conductance(edges_x[1:], y) * dy / dx
    across = conductance(x, edges_y[1:-1]) * dx / dy
    pairs = [(index[:-1], index[1:], along[:-1]), (index[:, :-1], index[:, 1:], across)]
    i, j, g = (np.concatenate([p[k].ravel() for p in pairs]) for k in range(3))
    links = coo_matrix((g, (i, j)), shape=(index.size, index.size))
    links = links + links.T
    loss_at_end = np.zeros(index.shape)
    loss_at_end[-1] = 2 * along[-1]
    laplacian = diags(np.asarray(links.sum(axis=1)).ravel() + loss_at_end.ravel()) - links
    solve = splu(laplacian.tocsc()).solve
    f, m = np.ones(index.size), speed.ravel()
    for _ in range(20):
        g = solve(m * f)
        f, eigenvalue = g / g.max(), (m * f * f).sum() / (m * f * g).sum()
    return eigenvalue


def test_power_law_noise_in_three_directions_gives_the_eigenvalue_of_the_whole_landscape():
    one = exact_saddle(1.0, 0.15, 1.6, 1.3).decay_rate().value
    exact = saddle_eigenvalue(0.15, 1.6, 1.3, 3)
    assert exact / one > 1.4  # the other directions matter: Kramers' factor is c**((n - 1) / 2) = 1.6
    design = condition(0.15, 1.6, 1.3, runs=100, time=20 / exact, start="quasi_stationary")
    assert_rate(simulate_sde(World(dimension=3), design, seed=4), exact, systematic=0.03)


@pytest.mark.parametrize(
    ("noise", "q", "T", "c", "n"),
    [("loss", 1.0, 0.05, 1.3, 2), ("loss", 0.5, 0.1, 1.7, 4), ("uniform", 0.0, 0.1, 1.5, 1)],
)
def test_passage_of_a_threshold_has_the_exact_mean_and_the_exact_quasi_stationary_rate(noise, q, T, c, n):
    world = World(noise, q, 7 * T * LOSS / 0.02 if noise == "uniform" else None, n, "threshold", 0.02)
    design = condition(T, c, noise=world.noise_strength, time=1.0)
    design["batch_size"] = 1 if noise == "loss" else 7
    if noise == "loss":
        design["learning_rate"] = T / HESSIAN
    look = float((design["learning_rate"] * HESSIAN).iloc[0])
    exact = exact_threshold(q, T, c, n, look)
    mean, rate = float(exact.mean_time(1e-4).value), exact.decay_rate().value
    design["max_steps"] = int(15 * mean / look)
    table = simulate_sde(world, design.assign(runs=1000), seed=5)
    times = relaxation(table) * (table["steps"] - 0.5)
    assert abs(times.mean() / mean - 1) < 3 * times.std() / mean / np.sqrt(len(times)) + 0.03
    quasi = simulate_sde(world, design.assign(runs=100, start="quasi_stationary"), seed=5)
    assert_rate(quasi, rate, systematic=0.03)


def test_times_from_the_minimum_are_delayed_and_gaps_in_the_quasi_stationary_state_are_not():
    world = World(noise="uniform", noise_strength=1.0, dimension=8, barrier="threshold")
    design = condition(0.05, 1.3, noise=1.0, runs=400, time=60)
    table = simulate_sde(world, design, seed=6)
    gaps = simulate_sde(world, design.assign(start="quasi_stationary"), seed=6)
    gaps = gaps[gaps["escaped"]]
    assert table["steps"].std() / table["steps"].mean() < 0.9
    assert 0.93 < gaps["steps"].std() / gaps["steps"].mean() < 1.05
    assert gaps["steps"].mean() < 0.9 * table["steps"].mean()


def test_the_clock_of_the_quasi_stationary_state_starts_after_the_burn_in():
    """Followed for only 1.5 / h* from the minimum, no run would have filled its well: the rate must be there."""
    world = World(noise="uniform", noise_strength=1.0, dimension=8, barrier="threshold", time_step=0.02)
    design = condition(0.05, 1.3, noise=1.0, runs=1000, time=1.5, start="quasi_stationary")
    look = float((design["learning_rate"] * HESSIAN).iloc[0])
    assert_rate(simulate_sde(world, design, seed=13), exact_threshold(0.0, 0.05, 1.3, 8, look).decay_rate().value, 0.03)


def test_an_escaped_replica_becomes_a_copy_of_any_survivor_and_of_no_other():
    position = jnp.arange(1.0, 13.0).reshape(2, 6, 1)
    escaped = jnp.array([[False, True, False, True, False, False], [True] * 6])
    alive = jnp.array([[True] * 5 + [False], [True] * 6])
    parents = set()
    for uniform in np.linspace(0, 1, 50):
        after = revive(State(position, alive, jnp.zeros(2, int)), escaped, jnp.full((2, 6), uniform))[..., 0]
        assert after[0, [0, 2, 4, 5]].tolist() == [1, 3, 5, 6]
        assert after[1].tolist() == [0] * 6
        parents.add(float(after[0, 1]))
    assert parents == {1, 3, 5}


@pytest.mark.parametrize("barrier", ["saddle", "threshold"])
def test_the_landscape_has_the_curvatures_and_heights_it_was_asked_for(barrier):
    c, r = 1.7, 0.6
    conditions = StepSettings(*(jnp.asarray([v]) for v in (1.0, c, r)), *(jnp.zeros((1, 1)),) * 4)

    compiled = jax.jit(landscape, static_argnums=0)

    def loss_and_gradient(points):
        loss, gradient, _ = compiled(barrier, conditions, jnp.asarray(points, jnp.float32)[None])
        return np.asarray(loss[0], float), np.asarray(gradient[0], float)

    def curvature(point, step=5e-3):
        moves = step * np.eye(3)
        return (loss_and_gradient(point + moves)[1] - loss_and_gradient(point - moves)[1]) / (2 * step)

    points = np.random.default_rng(0).uniform(-2.5, 4.5, (50, 3))
    for axis, move in enumerate(0.02 * np.eye(3)):
        slope = (loss_and_gradient(points + move)[0] - loss_and_gradient(points - move)[0]) / 0.04
        np.testing.assert_allclose(loss_and_gradient(points)[1][:, axis], slope, atol=2e-3)
    np.testing.assert_allclose(curvature(np.array([-6e-3, 0, 0])), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(curvature(np.array([6e-3, 0, 0])), np.eye(3), atol=2e-2)
    if barrier == "saddle":
        saddle = np.array([np.sqrt(12 * (c - 1) / (1 + r)), 0, 0])
        np.testing.assert_allclose(loss_and_gradient([saddle, 2 * saddle])[0], [c, 1], rtol=1e-5)
        for place in (0.997, 1.003):
            np.testing.assert_allclose(curvature(saddle * place), np.diag([-r, 1, 1]), atol=1e-2)


def test_same_seed_gives_the_same_table_and_a_condition_does_not_depend_on_its_neighbours():
    world = World()
    design = make_design(world, minima=3, runs=10, rates=(0.005, 0.02))
    table = simulate_sde(world, design, seed=7)
    pd.testing.assert_frame_equal(table, simulate_sde(world, design, seed=7))
    assert not table["steps"].equals(simulate_sde(world, design, seed=8)["steps"])
    alone = simulate_sde(world, design.iloc[:2], seed=7)
    pd.testing.assert_frame_equal(alone, table.iloc[: len(alone)])


@pytest.mark.parametrize("barrier", ["saddle", "threshold"])
@pytest.mark.parametrize("start", ["minimum", "quasi_stationary"])
def test_tables_are_accepted_as_measurements_and_keep_to_the_looks_and_the_budget(barrier, start):
    world = World(noise="uniform", noise_strength=0.7, barrier=barrier)
    design = make_design(world, minima=2, runs=12, start=start, check_interval=3, rates=(0.01, 0.03), seed=4)
    design["max_steps"] = design["max_steps"] // 3
    table = simulate_sde(world, design, seed=9)
    read = read_measurements(table)
    assert len(read) == len(table)
    assert (table["steps"] % 3 == 0).all()
    per_run = table.groupby("run")["steps"].sum().to_numpy()
    budget = np.repeat(design["max_steps"].to_numpy() // 3 * 3, 12)
    censored = ~table.groupby("run")["escaped"].last().to_numpy()
    assert len(per_run) == len(design) * 12
    assert table["escaped"].any() and censored.any()
    if start == "minimum":
        assert len(table) == len(per_run)
        assert (per_run[censored] == budget[censored]).all() and (per_run <= budget).all()
    else:
        assert (per_run == budget).all()


def test_runs_may_differ_in_number_and_starts_may_be_mixed():
    world = World(barrier="threshold")
    design = make_design(world, minima=2, learning_rates=2, runs=10)
    design["runs"] = [3, 8, 5, 12]
    design["start"] = ["minimum", "quasi_stationary"] * 2
    table = simulate_sde(world, design, seed=10)
    slots = table.groupby(["minimum", "learning_rate"], sort=False)["run"].nunique()
    assert slots.tolist() == [3, 8, 5, 12]
    assert table["start"].value_counts()["minimum"] == 8


@pytest.mark.parametrize("barrier", ["saddle", "threshold"])
@pytest.mark.parametrize("world", [World(), World(noise="uniform", noise_strength=1.0)], ids=["loss", "uniform"])
@pytest.mark.filterwarnings("ignore:(divide|overflow):RuntimeWarning")
def test_default_designs_see_escapes_in_the_right_range_and_tell_the_laws_apart(world, barrier):
    world = World(world.noise, world.noise_exponent, world.noise_strength, barrier=barrier)
    design = make_design(world)
    table = simulate_sde(world, design, seed=11)
    assert len(table) == 1440
    assert 0.88 < table["escaped"].mean() < 0.98
    groups = table.groupby(["minimum", "learning_rate"], sort=False)
    rate = (groups["escaped"].sum() / (groups["steps"].sum() * groups["learning_rate"].first())).to_numpy()
    rate = rate / design["hessian_minimum"].to_numpy()
    assert np.mean((rate > 1e-3) & (rate < 0.2)) > 0.75
    ratio = (design["loss_barrier"] / design["loss_minimum"]).to_numpy()
    uniform = design["learning_rate"] / design["batch_size"] / design["loss_minimum"]
    loss = design["learning_rate"] / design["batch_size"] * design["hessian_minimum"]
    misfit = {}
    for name, q, scale in (("loss", 1.0, loss), ("uniform", 0.0, uniform)):
        law = World(noise_exponent=q, barrier=barrier)
        residuals = [
            np.log(rate / high_barrier_rate(law, np.exp(shift) * scale.to_numpy(), ratio))
            for shift in np.linspace(-8, 8, 321)
        ]
        misfit[name] = min(np.std(r) for r in residuals if np.isfinite(r).all())
    other = "uniform" if world.noise == "loss" else "loss"
    assert misfit[world.noise] < 0.45
    assert misfit[other] > 3 * misfit[world.noise]


def test_one_step_for_each_iteration_is_stochastic_gradient_descent_on_the_well():
    """The stationary variance of an Euler step eta h* = 0.4 in a quadratic well is T / (1 - eta h* / 2), not T."""
    design = condition(0.4 / 3, 30.0, runs=50, time=400)
    design["batch_size"], design["learning_rate"] = 3, 0.4 / HESSIAN
    coarse = simulate_sde(World(noise_exponent=0.0, dimension=1, barrier="threshold", time_step=None), design, seed=12)
    assert not coarse["escaped"].any()
    design["loss_barrier"] = 1.55 * LOSS
    rates = []
    for time_step in (None, 0.02):
        world = World(noise_exponent=0.0, dimension=1, barrier="threshold", time_step=time_step)
        rates.append(measured_rate(simulate_sde(world, design.assign(runs=500), seed=12))[0])
    assert rates[0] > 1.3 * rates[1]


def test_sliding_times_have_the_coefficient_of_variation_they_were_given():
    design = make_design(World(), minima=2, runs=500)
    table = simulate_slide(design, coefficient_of_variation=0.1, seed=3)
    groups = table.groupby(["minimum", "learning_rate"])["steps"]
    np.testing.assert_allclose(groups.std() / groups.mean(), 0.1, rtol=0.12)
    assert read_measurements(table)["escaped"].all()
    pd.testing.assert_frame_equal(table, simulate_slide(design, seed=3))


def test_temperature_halves_when_the_batch_doubles_and_uniform_noise_forgets_the_curvature():
    design = condition(0.1, 1.5, time=10)
    for world in (World(), World(noise="uniform", noise_strength=0.3)):
        first = temperature(world, design)
        np.testing.assert_allclose(temperature(world, design.assign(batch_size=6)), first / 2)
        np.testing.assert_allclose(temperature(world, design.assign(learning_rate=design.learning_rate * 3)), 3 * first)
    sharper = design.assign(hessian_minimum=2 * HESSIAN)
    assert temperature(World(), sharper) == pytest.approx(0.2)
    assert temperature(World(noise="uniform", noise_strength=0.3), sharper) == pytest.approx(0.3 * 0.12 / 3 / LOSS)


@pytest.mark.parametrize(
    "spoil",
    [
        {"learning_rate": -0.1},
        {"loss_barrier": 0.01},
        {"start": "somewhere"},
        {"check_interval": 10**9},
        {"hessian_minimum": np.nan},
        {"max_steps": 2**31},
    ],
)
def test_an_impossible_design_is_refused(spoil):
    with pytest.raises(InputError):
        simulate_sde(World(), condition(0.1, 1.5, time=10).assign(**spoil))


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="hessian_saddle"):
        simulate_sde(World(), condition(0.1, 1.5, time=10).drop(columns="hessian_saddle"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": "pink"},
        {"noise": "uniform"},
        {"noise": "uniform", "noise_strength": np.inf},
        {"noise_exponent": np.nan},
        {"noise_exponent": np.inf},
        {"dimension": 0},
        {"barrier": "wall"},
        {"time_step": 0.0},
    ],
)
def test_an_impossible_world_is_refused(wrong):
    with pytest.raises(InputError):
        World(**wrong)
