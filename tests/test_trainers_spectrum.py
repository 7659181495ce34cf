"""Spectra: against dense solves and known matrices."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from escape_inference.errors import InputError
from escape_inference.trainers import count_outliers, spectral_density, top_hessian
from escape_inference.trainers.curvature import layer_names
from escape_inference.trainers.direction import curvature_along, escape_displacements


@lru_cache
def small_network() -> tuple[Callable, dict, np.ndarray, np.ndarray]:
    """Two tanh layers with 29 parameters, away from any minimum, so that Hessian and Gauss-Newton part differ."""
    rng = np.random.default_rng(8)
    params = {
        "first": {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "second": {"weight": rng.normal(size=(4, 2)) * 0.7, "bias": rng.normal(size=2)},
        "scale": np.array([1.3, 0.6, 0.9]),
    }
    inputs, targets = rng.normal(size=(70, 3)), rng.normal(size=(70, 2))

    def apply(params: dict, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh((x * params["scale"]) @ params["first"]["weight"] + params["first"]["bias"])
        return hidden @ params["second"]["weight"] + params["second"]["bias"]

    return apply, jax.tree.map(jnp.float32, params), inputs.astype(np.float32), targets.astype(np.float32)


@lru_cache
def dense(part: str) -> np.ndarray:
    apply, params, inputs, targets = small_network()
    flat, unravel = ravel_pytree(params)
    if part == "hessian":
        return np.asarray(
            jax.jit(jax.hessian(lambda v: 0.5 * jnp.mean(jnp.sum((apply(unravel(v), inputs) - targets) ** 2, axis=1))))(
                flat
            )
        )
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda v: apply(unravel(v), inputs)))(flat))
    return np.einsum("noi,noj->ij", jacobian, jacobian) / len(inputs)


@pytest.mark.parametrize("part", ["hessian", "gauss_newton"])
def test_the_spectrum_of_a_network_is_that_of_the_dense_matrix(part: str) -> None:
    exact = np.linalg.eigvalsh(dense(part))[::-1]
    found = top_hessian(*small_network(), k=7, part=part)
    assert found.eigenvalues == pytest.approx(exact[:7], rel=1e-4, abs=1e-5)
    assert found.converged.all()
    assert found.eigenvectors @ dense(part) @ found.eigenvectors.T == pytest.approx(np.diag(exact[:7]), abs=2e-4)
    assert abs(exact[1] - np.linalg.eigvalsh(dense("hessian" if part != "hessian" else "gauss_newton"))[-2]) > 0.01


def test_the_residual_is_that_of_the_matrix_while_the_iteration_has_not_converged() -> None:
    matrix = dense("hessian")
    for iterations in (8, 12, 16):
        found = top_hessian(*small_network(), k=5, iterations=iterations)
        exact = np.linalg.norm(found.eigenvectors @ matrix - found.eigenvalues[:, None] * found.eigenvectors, axis=1)
        assert found.residuals == pytest.approx(exact, rel=0.02, abs=3e-6 * found.top)
        assert exact.max() > 1e-3 * found.top


def test_every_copy_of_a_repeated_eigenvalue_is_found() -> None:
    """One starting vector spans only one of them; the others come from outside of what it spans."""
    found = top_hessian(*rotated(4.0, 4.0, 4.0, 1.0, 1.0, 0.5), k=5)
    assert found.eigenvalues == pytest.approx([4, 4, 4, 1, 1], rel=1e-4)
    assert found.eigenvectors @ found.eigenvectors.T == pytest.approx(np.eye(5), abs=1e-5)
    assert found.converged.all()


@pytest.mark.parametrize("layers", ["['first']", "['second']['weight']", "['scale']"])
def test_a_layer_has_the_spectrum_of_its_own_block(layers: str) -> None:
    apply, params, inputs, targets = small_network()
    flags = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, jax.tree_util.keystr(path).startswith(layers)), params
    )
    chosen = np.flatnonzero(ravel_pytree(flags)[0])
    exact = np.linalg.eigvalsh(dense("hessian")[np.ix_(chosen, chosen)])[::-1]
    found = top_hessian(apply, params, inputs, targets, k=3, layers=layers)
    assert found.eigenvalues == pytest.approx(exact[:3], rel=1e-3, abs=1e-4)
    assert np.abs(np.delete(found.eigenvectors, chosen, axis=1)).max() < 1e-6


def test_an_unknown_layer_or_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"no parameters begin with 'third'; there are: \['first'\]\['bias'\]"):
        top_hessian(*small_network(), k=2, layers="third")
    with pytest.raises(InputError, match="part: 'fisher' is not known; allowed: hessian, gauss_newton"):
        top_hessian(*small_network(), k=2, part="fisher")
    with pytest.raises(InputError, match="k: must be from 1 to the number of parameters, 3"):
        top_hessian(*small_network(), k=4, layers="['scale']")
    assert len(layer_names(small_network()[1])) == 5


@lru_cache
def rotated(*eigenvalues: float) -> tuple[Callable, jax.Array, np.ndarray, np.ndarray]:
    """A linear map whose Hessian has exactly these eigenvalues, in a random basis."""
    size = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(size, size)))[0]
    inputs = np.sqrt(size * np.array(eigenvalues))[:, None] * basis
    return lambda theta, x: x @ theta, jnp.zeros(size), inputs.astype(np.float32), np.zeros(size, np.float32)


def test_the_density_has_the_moments_and_counts_of_a_known_spectrum() -> None:
    eigenvalues = np.r_[9.0, 6.0, np.linspace(0.2, 1.4, 150)]
    density = spectral_density(*rotated(*eigenvalues.tolist()), probes=60, iterations=25, seed=3)
    for function in (lambda x: x, lambda x: x**2, lambda x: np.sqrt(x)):
        mean, error = density.mean(function)
        assert abs(mean - function(eigenvalues).mean()) < 3.5 * error
        assert error < 0.15 * mean
    for level, exact in ((3.0, 2), (0.8, 77), (0.1, 152)):
        count, error = density.count_above(level)
        assert abs(count - exact) < 3.5 * error + 1.0
    assert density.count_above(3.0)[1] == pytest.approx(np.sqrt(2 * 2 / 60), rel=0.4), "the error that is documented"
    assert density.weights.sum(1) == pytest.approx(np.ones(60), rel=1e-5)
    grid = np.linspace(-1, 11, 2000)
    curve = density.density(grid, 0.1)
    assert np.trapezoid(curve, grid) == pytest.approx(1, rel=1e-3)
    assert curve[np.abs(grid - 0.8).argmin()] == pytest.approx(150 / 152 / 1.2, rel=0.25)


def test_the_density_of_a_layer_counts_its_own_parameters() -> None:
    density = spectral_density(*small_network(), layers="['second']", probes=3, iterations=40)
    assert density.dimension == 10
    assert density.nodes.shape == (3, 10)
    trace = density.dimension * density.mean(lambda x: x)[0]
    chosen = [i for i in range(29) if 19 <= i < 29]
    assert trace == pytest.approx(np.trace(dense("hessian")[np.ix_(chosen, chosen)]), rel=0.6)


@pytest.mark.parametrize("spikes", [(7.0,), (9.0, 6.0, 5.0), (14.0, 12.0, 10.0, 9.0, 8.0, 6.0)])
def test_spikes_above_a_marchenko_pastur_bulk_are_counted(spikes: tuple) -> None:
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(800, 160))
        x[:, : len(spikes)] *= np.sqrt(spikes)
        found = count_outliers(np.linalg.eigvalsh(x.T @ x / 800)[::-1][:30])
        assert found.count == len(spikes)
        assert 0 < found.se < 1
        assert found.bulk_edge == pytest.approx((1 + np.sqrt(160 / 800)) ** 2, rel=0.1)
        assert found.gap > 1.4


def test_the_error_of_the_count_covers_the_truth_where_outliers_are_near_the_bulk() -> None:
    """Bulks with a power-law tail and outliers that may lie anywhere above: as the rule says, and nothing is certain."""
    rng = np.random.default_rng(1)
    error, within, distances = [], [], []
    for _ in range(300):
        number, slope = int(rng.integers(1, 6)), rng.uniform(0.2, 0.6)
        bulk = np.sort(np.exp(slope * rng.exponential(size=400)))[::-1][:22]
        outliers = bulk[0] * np.exp(rng.uniform(0, np.log(1e3), size=number))
        found = count_outliers(np.sort(np.r_[outliers, bulk])[::-1])
        distances.append(found.count - number)
        error.append(found.se)
        within.append(abs(found.count - number) <= 2 * max(found.se, 0.5))
    assert np.mean(within) > 0.9
    assert np.sqrt(np.mean(np.square(error))) == pytest.approx(np.sqrt(np.mean(np.square(distances))), rel=0.35)


def test_a_gap_that_widens_is_believed_more() -> None:
    bulk = 0.3 * np.arange(1, 21) ** -0.6
    errors = [count_outliers(np.array([ratio * 0.9, ratio * 0.6, *bulk])).se for ratio in (1.2, 2.0, 6.0, 20.0)]
    assert errors == sorted(errors, reverse=True)
    assert count_outliers(np.array([18.0, 12.0, *bulk])).count == 2


def test_a_subsample_adds_the_error_of_sampling() -> None:
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(3000, 4)) * np.array([2.0, 1.0, 0.5, 0.5])
    problem = (lambda theta, x: x @ theta, jnp.zeros(4), inputs, np.zeros(3000))
    whole = top_hessian(*problem, k=1)
    parts = [top_hessian(*problem, k=1, subsample=300, seed=seed) for seed in range(20)]
    spread = np.std([part.top for part in parts])
    assert np.mean([part.top_se for part in parts]) == pytest.approx(spread, rel=0.3)
    assert whole.top_se < 0.01 * spread


def test_curvature_along_a_direction_is_the_quadratic_form_and_projection_removes_the_rest() -> None:
    eigenvalues = (5.0, 2.0, 0.3, 0.1)
    problem = rotated(*eigenvalues)
    vectors = top_hessian(*problem, k=4).eigenvectors
    directions = np.array([[2.0, 1.0, 0.0, 3.0], [0.0, 1.5, 0.0, 0.0]]) @ vectors
    found = curvature_along(*problem, directions)
    assert found.values == pytest.approx([(4 * 5 + 2 + 9 * 0.1) / 14, 2.0], rel=1e-4)
    assert found.se == pytest.approx(np.std(found.values, ddof=1) / np.sqrt(2))
    projected = curvature_along(*problem, directions, basis=vectors[:2])
    assert projected.values == pytest.approx([22 / 5, 2.0], rel=1e-4)
    assert projected.share == pytest.approx([5 / 14, 1.0], rel=1e-4)


def test_escapes_go_along_the_steep_direction() -> None:
    """With noise aligned to the Hessian the loss is first exceeded along the large eigenvalues."""
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(500, 3)) * np.sqrt([4.0, 0.4, 0.1])
    problem = (lambda theta, x: x @ theta, jnp.zeros(3), inputs, rng.normal(size=500))
    moved = escape_displacements(*problem, learning_rate=0.05, batch_size=2, loss_barrier=0.8, replicas=12, steps=6000)
    assert len(moved) == 12
    losses = 0.5 * np.mean((inputs @ moved.T - problem[3][:, None]) ** 2, axis=0)
    assert np.all((losses > 0.8) & (losses < 2.5))
    steep = curvature_along(*problem, moved)
    assert 2 < steep.mean < 4.5
    assert 0 < steep.se < 0.5


def test_directions_that_cannot_be_are_refused() -> None:
    problem = rotated(2.0, 1.0)
    with pytest.raises(InputError, match=r"directions: must have shape \[any, 2\]"):
        curvature_along(*problem, np.ones((2, 3)))
    with pytest.raises(InputError, match="no length"):
        curvature_along(*problem, np.zeros((1, 2)))
    with pytest.raises(InputError, match="probes"):
        spectral_density(*problem, probes=0)
    with pytest.raises(InputError, match="iterations"):
        spectral_density(*problem, iterations=0)


def test_too_few_eigenvalues_tell_no_number_of_outliers() -> None:
    found = count_outliers(np.array([10.0, 9.9, 9.8, 0.01, 0.005]))
    assert np.isnan(found.se)
    assert np.isnan(count_outliers(np.array([9.0, 8.0, 7.0, 0.5, 0.4, 0.3, 0.2])).se)
    assert not np.isnan(count_outliers(np.array([9.0, 8.0, 7.0, *0.3 * np.arange(1, 21) ** -0.5])).se)
