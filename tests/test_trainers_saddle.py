"""Saddles of known height and curvature, and landscapes without one."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from escape_inference.errors import InputError
from escape_inference.trainers import Saddle, find_saddle, top_hessian, train_minimum
from escape_inference.trainers.lowest_path import spread_evenly

INPUTS, TARGETS = np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32)


def itself(theta: jax.Array, inputs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(theta, (len(inputs), theta.size))


@lru_cache
def landscape(name: str) -> Callable:
    """A function of the parameters, as the loss of every sample."""

    def tilted(x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.4 + 3 * (x**2 - 1) ** 2 + 0.8 * x + 2.5 * (y - 0.7 * x) ** 2

    def cubic(x: jax.Array, y: jax.Array) -> jax.Array:
        return 2.0 + 1.7 * (x - x**3 / 3) + 0.65 * y**2

    def bent(x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.3 + 1.5 * (x**2 - 1) ** 2 + 4 * (y - x**2) ** 2

    def bowl(x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.2 + 1.5 * x**2 + 0.4 * y**2

    def hilltop(x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.3 + 1.5 * (x**2 - 1) ** 2 + 0.5 * y**4 - 0.5 * y**2 + x**2 * y**2

    chosen = {"hilltop": hilltop, "tilted": tilted, "cubic": cubic, "bent": bent, "bowl": bowl}[name]
    return lambda prediction, target: chosen(prediction[0], prediction[1]) + 0 * target[0]


def crossing(name: str, start: list[float], end: list[float], **settings: object) -> Saddle:
    arguments: dict = {"images": 9, "path_iterations": 150} | settings
    return find_saddle(itself, jnp.array(start), jnp.array(end), INPUTS, TARGETS, loss=landscape(name), **arguments)


def test_the_saddle_of_a_tilted_double_well_with_another_curved_direction() -> None:
    x = np.roots([12, 0, -12, 0.8])
    left, top, right = np.sort(x.real)
    saddle = crossing("tilted", [left, 0.7 * left], [right, 0.7 * right])
    assert saddle.converged, saddle.note
    assert saddle.params == pytest.approx([top, 0.7 * top], abs=1e-3)
    assert saddle.loss_barrier == pytest.approx(0.4 + 3 * (top**2 - 1) ** 2 + 0.8 * top, rel=1e-5)
    second = 36 * top**2 - 12
    hessian = np.array([[second + 5 * 0.49, -5 * 0.7], [-5 * 0.7, 5.0]])
    exact = np.linalg.eigvalsh(hessian)
    assert saddle.hessian_saddle == pytest.approx(-exact[0], rel=1e-3)
    assert saddle.lowest == pytest.approx(exact, rel=1e-3)
    assert saddle.negative == 1
    assert saddle.gradient_norm < 1e-4
    assert saddle.loss_barrier_se < 1e-6
    assert saddle.hessian_saddle_se < 1e-3
    assert saddle.path_losses.argmax() not in (0, 8)


def test_the_saddle_of_a_cubic_is_found_from_an_end_on_the_other_slope() -> None:
    """``U = 1.7 (x - x^3 / 3)`` has its minimum at -1 and its top at +1, 2 * 1.7 * 2 / 3 higher, with h = h^s = 3.4."""
    saddle = crossing("cubic", [-1.0, 0.0], [2.2, 0.3])
    assert saddle.params == pytest.approx([1.0, 0.0], abs=1e-3)
    assert saddle.loss_barrier == pytest.approx(2 + 1.7 * 2 / 3, rel=1e-5)
    assert saddle.hessian_saddle == pytest.approx(3.4, rel=1e-3)
    bottom = top_hessian(itself, jnp.array([-1.0, 0.0]), INPUTS, TARGETS, k=2, loss=landscape("cubic"))
    assert bottom.eigenvalues == pytest.approx([3.4, 1.3], rel=1e-4)


def test_the_path_bends_round_a_hill_that_the_straight_line_crosses() -> None:
    """Minima at (-1, 1) and (1, 1), the saddle at the origin: the straight line has the loss 5.8 there."""
    saddle = crossing("bent", [-1.0, 1.0], [1.0, 1.0], path_iterations=400)
    assert saddle.converged, saddle.note
    assert saddle.params == pytest.approx([0, 0], abs=2e-3)
    assert saddle.loss_barrier == pytest.approx(1.8, rel=1e-4)
    assert saddle.hessian_saddle == pytest.approx(6.0, rel=1e-3)
    assert saddle.columns["barrier"] == "saddle"
    assert saddle.columns["loss_barrier"] == saddle.loss_barrier


def test_the_saddle_of_a_two_layer_linear_network() -> None:
    """``f = a b x`` fits y = 1.5 x at a b = 1.5; the sign of both is changed over the origin, where H has ``+-1.5 <x^2>``."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 1)).astype(np.float32)
    targets = 1.5 * inputs[:, 0]
    start = {"a": jnp.float32(0.9), "b": jnp.float32(1.5 / 0.9)}
    end = {"a": -jnp.float32(1.1), "b": -jnp.float32(1.5 / 1.1)}
    saddle = find_saddle(
        lambda p, x: p["a"] * p["b"] * x[:, 0], start, end, inputs, targets, images=8, path_iterations=200
    )
    square = float(np.mean(inputs**2))
    assert saddle.converged, saddle.note
    assert float(saddle.params["a"]) == pytest.approx(0, abs=1e-3)
    assert saddle.loss_barrier == pytest.approx(0.5 * 1.5**2 * square, rel=1e-5)
    assert saddle.hessian_saddle == pytest.approx(1.5 * square, rel=1e-3)
    assert saddle.lowest == pytest.approx([-1.5 * square, 1.5 * square], rel=1e-3)


def test_a_path_over_a_hilltop_is_led_off_it_to_a_saddle() -> None:
    """Both minima lie on y = 0, as does the hilltop between them; the saddles are at y = +-sqrt(0.5), lower by 0.125."""
    saddle = crossing("hilltop", [-1.0, 0.0], [1.0, 0.0], refine_iterations=200)
    assert saddle.converged, saddle.note
    assert np.abs(np.asarray(saddle.params)) == pytest.approx([0, 0.5**0.5], abs=1e-3)
    assert saddle.loss_barrier == pytest.approx(0.3 + 1.5 - 0.125, rel=1e-4)
    assert saddle.hessian_saddle == pytest.approx(6 - 1, rel=1e-3)
    assert saddle.lowest[1] == pytest.approx(2, rel=1e-3)


def test_a_gradient_that_is_left_is_said_and_counted_as_an_error() -> None:
    exact = 0.3 + 1.5
    rough = crossing("bent", [-1.0, 1.0], [1.0, 1.2], path_iterations=40, refine_iterations=0, images=6)
    assert not rough.converged
    assert "above 0.0001: more refine_iterations" in rough.note
    assert rough.loss_barrier != pytest.approx(exact, rel=1e-3)
    assert abs(rough.loss_barrier - exact) < 3 * rough.loss_barrier_se


def test_a_landscape_without_a_barrier_is_said_to_have_none() -> None:
    flat = crossing("bowl", [-1.0, 0.5], [0.8, -0.4], path_iterations=20)
    assert not flat.converged
    assert "no barrier was found" in flat.note
    assert np.isnan(flat.hessian_saddle)
    assert flat.negative == 0


def test_a_trained_minimum_can_be_either_end() -> None:
    settings: dict = {"learning_rate": 0.02, "batch_size": 3, "steps": 400, "loss": landscape("tilted")}
    ends = [train_minimum(itself, jnp.array(at), INPUTS, TARGETS, **settings) for at in ([-0.8, 0.1], [0.9, 0.3])]
    saddle = find_saddle(itself, *ends, INPUTS, TARGETS, loss=landscape("tilted"), images=7, path_iterations=100)
    assert saddle.loss_barrier > max(end.loss_minimum for end in ends)
    assert saddle.path_losses[[0, -1]] == pytest.approx([end.loss_minimum for end in ends], rel=1e-4)


def test_spreading_keeps_the_ends_and_equal_distances() -> None:
    path = spread_evenly(jnp.array([[0.0, 0.0], [0.1, 0.0], [0.1, 2.0], [5.0, 2.0]]))
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [5, 2]
    assert path[1] == pytest.approx(np.array([0.1 + 7 / 3 - 2.1, 2.0]), abs=1e-5)
    assert path[2] == pytest.approx(np.array([0.1 + 14 / 3 - 2.1, 2.0]), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"images": 2}, "images"), ({"end": [-1.0, 1.0]}, "end: must be another"), ({"learning_rate": 1e9}, "not finite")],
)
def test_what_cannot_be_is_refused(settings: dict, message: str) -> None:
    end = settings.pop("end", [1.0, 1.0])
    with pytest.raises(InputError, match=message):
        crossing("bent", [-1.0, 1.0], end, **settings)
