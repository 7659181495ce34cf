"""What a fit refuses before it samples, how often it samples, and how it is written."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from escape_inference import inference
from escape_inference.comparison import compare
from escape_inference.diagnostics import Convergence
from escape_inference.errors import InputError
from escape_inference.evidence import Evidence
from escape_inference.inference import infer
from escape_inference.law import Law, Parameter, kramers_log_prefactor
from escape_inference.posterior import save_tree
from escape_inference.problem import Problem
from escape_inference.rate_tables import law_itself
from escape_inference.sampler import Draws
from escape_inference.sde import simulate_sde
from escape_inference.worlds import World, make_design

TABLE = simulate_sde(World(dimension=1), make_design(World(dimension=1), minima=2, learning_rates=2, runs=20), seed=1)


def unexplored(law, inputs, observed, shapes, *_):
    """The problem as it is before it is explored."""
    nothing, itself = Evidence(float("nan"), float("nan"), "none"), law_itself(law, inputs, shapes)
    return Problem(law, inputs, observed, shapes, inputs, inputs, itself, nothing, np.zeros((0, len(itself.used))))


def test_a_law_that_is_not_finite_over_its_prior_is_refused_before_sampling(monkeypatch):
    """Finite near the data and not a number where the scale is above 3, one prior draw in 17."""

    def log_rate(values, setting):
        scale = values["scale"]
        return (
            kramers_log_prefactor(setting)
            - setting.log_barrier / (scale * setting.diffusion_scale)
            + jnp.sqrt(3 - scale)
        )

    law = Law(
        name="some_nan",
        title="t",
        source="s",
        parameters=(Parameter("scale", median=1.0, width=0.7, reason="r"),),
        log_rate=log_rate,
        temperature=lambda values, setting: values["scale"] * setting.diffusion_scale,
        barriers=("saddle",),
    )
    monkeypatch.setattr("escape_inference.inference.explore", unexplored)
    monkeypatch.setattr("escape_inference.inference.fit_law", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(InputError, match=r"law some_nan: the log rate is not finite at \d+ of 1000 draws .*check-law"):
        infer(law, TABLE)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"draws": 0}, "draws must be a whole number of at least 100, not 0"),
        ({"warmup": 1.5}, "warmup must be a whole number of at least 100, not 1.5"),
        ({"chains": 0}, "chains must be a whole number of at least 2, not 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"pooling": "none"}, "pooling is one of complete, partial; not 'none'"),
    ],
)
def test_settings_that_the_command_refuses_are_refused_by_the_functions(setting, said):
    with pytest.raises(InputError, match=said):
        infer("power_law", TABLE, **setting)
    with pytest.raises(InputError, match=said):
        compare(TABLE, ["power_law", "arrhenius"], **setting)


@pytest.mark.parametrize(("chains", "trustworthy"), [(4, True), (2, False)])
def test_a_fit_with_fewer_than_four_chains_is_not_trustworthy_and_says_why(chains, trustworthy, monkeypatch):
    """However well its chains agree; and it is not sampled again for that."""
    found, _ = fitted(monkeypatch, np.zeros((3, 1)), chains)
    assert found.trustworthy == trustworthy
    assert found.reason == ("" if trustworthy else "2 chains (must be 4 or more)")


def fitted(monkeypatch, particles, chains=4):
    """Convergence of a fit whose chains agree at once, and the acceptance that was asked of them."""
    flat, asked = np.zeros((chains, 100)), []
    runs = [Draws(flat[..., None], flat.astype(bool), *[flat] * (len(Draws._fields) - 2))]
    sample = lambda *_, acceptance, **__: (asked.append(acceptance), runs.pop())[1]
    monkeypatch.setattr(inference, "run_chains", sample)
    monkeypatch.setattr(inference, "check_convergence", lambda *_: Convergence(1.0, 900.0, 0, 1.0, True, ""))
    monkeypatch.setattr(inference, "table_error", lambda *_: 0.0)
    monkeypatch.setattr(inference, "spline_error", lambda *_: 0.0)
    monkeypatch.setattr(inference, "summarise", lambda problem, run, convergence: convergence)
    target = SimpleNamespace(inputs=SimpleNamespace(passage=None), to_model=lambda z: z)
    problem = SimpleNamespace(observed=SimpleNamespace(escapes=np.zeros(3)), target=target, particles=particles)
    return inference.fit_law(problem, seed=0, draws=100, warmup=100, chains=chains), asked


def test_a_bent_posterior_is_sampled_with_smaller_steps_from_the_start(monkeypatch):
    straight = np.random.default_rng(0).normal(size=(2000, 3))
    curved = straight * [1.0, 0.1, 0.1]
    curved[:, 1] += 0.3 * straight[:, 0] ** 2
    usual, careful = (fitted(monkeypatch, particles)[1] for particles in (straight, curved))
    assert usual == [inference.ACCEPTANCE]
    assert usual < careful


def test_what_trajectories_of_one_length_do_not_sample_is_left_to_nuts_and_told(monkeypatch):
    flat, asked = np.zeros((4, 100)), []
    run = Draws(flat[..., None], flat.astype(bool), *[flat] * (len(Draws._fields) - 2))

    @dataclass(frozen=True)
    class Unsampled:
        observed = SimpleNamespace(escapes=np.zeros(3))
        target = SimpleNamespace(inputs=SimpleNamespace(passage=None, surrogate=None), to_model=lambda z: z)
        particles: np.ndarray

    monkeypatch.setattr(inference, "run_chains", lambda *_, **given: asked.append(given["patient"]) or run)
    monkeypatch.setattr(inference, "check_convergence", lambda *_: Convergence(1.5, 9.0, 0, 1.0, False, "R-hat 1.5"))
    monkeypatch.setattr(inference, "table_error", lambda *_: 0.0)
    monkeypatch.setattr(inference, "spline_error", lambda *_: 0.0)
    monkeypatch.setattr(inference, "summarise", lambda problem, run, convergence: convergence)
    found = inference.fit_law(Unsampled(np.zeros((9, 1))), seed=0, draws=100, warmup=100, chains=4)
    assert asked == [False] * inference.PATIENCE + [True] * (inference.ATTEMPTS - inference.PATIENCE)
    assert not found.trustworthy


def test_files_that_threads_write_at_once_are_whole(tmp_path):
    """The library that writes them would end the process."""
    tree = xr.DataTree.from_dict(
        {f"group{k}": xr.Dataset({f"x{i}": ("x", [k, i]) for i in range(20)}) for k in range(5)}
    )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: save_tree(tree.copy(deep=True), tmp_path / f"{k}.nc"), range(40)))
    for k in range(40):
        with xr.open_datatree(tmp_path / f"{k}.nc", engine="netcdf4") as found:
            assert found.equals(tree)
    assert len(list(tmp_path.iterdir())) == 40
