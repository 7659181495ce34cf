"""Networks taken apart at the product with their inputs: the same numbers as in one piece, up to rounding."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from escape_inference.trainers import curvature, measure_escape, replicas, spectral_density, top_hessian
from escape_inference.trainers.blocks import make_blocks
from escape_inference.trainers.datasets import check_data
from escape_inference.trainers.first_layer import Staircase, first_layer
from escape_inference.trainers.looks import Gate, Limits, Screen, World
from escape_inference.trainers.losses import mean_square
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.replicas import Replicas
from escape_inference.trainers.sgd import make_recipe, root_key

SAMPLES, INPUTS, NEVER = 200, 320, 40


@lru_cache
def problem() -> tuple[Callable, Any, jax.Array, jax.Array]:
    """A perceptron with a wide first layer; some columns of the inputs are zero in every sample, more in most of them."""
    rng = np.random.default_rng(0)
    share = rng.uniform(size=INPUTS)
    share[share < NEVER / INPUTS] = 0
    inputs = rng.normal(size=(SAMPLES, INPUTS)) * (rng.uniform(size=(SAMPLES, 1)) < share)
    data = check_data("wide", inputs.astype(np.float32), np.sign(rng.normal(size=SAMPLES)).astype(np.float32))
    network = load_network("multilayer_perceptron", data, {"widths": [64, 8]})
    return network.apply, network.init(root_key(2)), jnp.asarray(data.inputs), jnp.asarray(data.targets)


def own_function(params: dict, inputs: jax.Array) -> jax.Array:
    flat = inputs.reshape(len(inputs), -1)
    hidden = jnp.tanh(params["bias"] + jnp.einsum("ij,nj->ni", params["first"], flat))
    return jax.nn.softplus(hidden) @ params["second"]


def own_params(inputs: int) -> dict:
    rng = np.random.default_rng(1)
    shapes = {"first": (5, inputs), "bias": (5,), "second": (5, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def equinox_network() -> tuple[Callable, Any]:
    module = eqx.nn.MLP(12, 1, 4, 2, key=jax.random.key(0))
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return lambda params, inputs: jax.vmap(eqx.combine(params, rest))(inputs), params


@pytest.mark.parametrize("name", ["built-in", "equinox", "own", "own, compiled", "images", "linear"])
def test_a_network_taken_apart_predicts_the_same(name: str) -> None:
    inputs = jax.random.normal(jax.random.key(1), (7, 12)) * (jnp.arange(12) != 3)
    if name == "built-in":
        apply, params, inputs, _ = problem()
    elif name == "equinox":
        apply, params = equinox_network()
    elif name == "linear":
        apply, params = (lambda params, inputs: inputs @ params), jnp.arange(12.0)
    else:
        apply, params = (jax.jit(own_function) if "compiled" in name else own_function), own_params(12)
        inputs = inputs.reshape(7, 3, 4) if name == "images" else inputs
    layer = first_layer(apply, params, inputs)
    assert layer is not None
    matrix, others = layer.take(params)
    for batch in (inputs, inputs[:3]):
        split = layer.rest(params, others, layer.rows(batch) @ matrix)
        np.testing.assert_allclose(split, apply(params, batch), rtol=1e-5, atol=1e-6)
    assert eqx.tree_equal(layer.put(params, matrix, others), params)
    moved = layer.put(params, matrix + 1, jax.tree.map(lambda leaf: leaf + 1, others))
    changed = sum(int(jnp.sum(a != b)) for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True))
    unused = inputs[0].size - len(layer.used)
    assert changed == sum(leaf.size for leaf in jax.tree.leaves(params)) - unused * matrix.shape[1]


def test_columns_that_are_always_zero_are_left_out() -> None:
    apply, params, inputs, _ = problem()
    layer = first_layer(apply, params, inputs)
    assert layer is not None
    zero = set(np.flatnonzero(~np.any(np.asarray(inputs) != 0, axis=0)).tolist())
    assert len(zero) > 20
    assert set(range(INPUTS)) - set(layer.used) <= zero
    assert len(zero & set(layer.used)) < 16


def test_products_of_parts_are_those_of_the_whole() -> None:
    apply, params, inputs, _ = problem()
    layer = first_layer(apply, params, inputs)
    assert layer is not None
    rows, (matrix, _) = layer.rows(inputs), layer.take(params)
    stairs = Staircase.of(rows)
    assert len(stairs.parts) > 1
    assert sum(part.size for part in stairs.parts) < 0.9 * rows.size
    np.testing.assert_allclose(stairs.times(matrix), (rows @ matrix)[stairs.order], rtol=1e-4, atol=1e-5)
    (whole,) = Staircase.of(rows + 1).parts
    assert whole.shape == rows.shape


REFUSED: dict[str, Callable] = {
    "squared": lambda p, x: x**2 @ p["first"].T,
    "scaled": lambda p, x: 2 * x @ p["first"].T,
    "used twice": lambda p, x: x @ p["first"].T + x[:, :5],
    "multiplied twice": lambda p, x: (x @ p["first"].T) * (x @ p["first"].T + p["bias"]),
    "weights used twice": lambda p, x: jnp.tanh(x @ p["first"].T) @ p["first"],
    "weights scaled": lambda p, x: x @ (2 * p["first"].T),
    "samples mixed": lambda p, x: (x - x.mean(0)) @ p["first"].T,
    "samples last": lambda p, x: (p["first"] @ x.T).T,
    "a constant matrix": lambda p, x: (x @ jnp.ones((12, 5))) * p["bias"],
    "no product": lambda p, x: x[:, :5] * p["bias"],
    "inputs given back": lambda p, x: x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_left_in_one_piece(name: str) -> None:
    inputs = jax.random.normal(jax.random.key(1), (7, 12))
    assert first_layer(REFUSED[name], own_params(12), inputs) is None


def test_a_convolution_is_left_in_one_piece() -> None:
    data = check_data("images", np.ones((6, 144), np.float32), np.ones(6, np.float32))
    network = load_network("convolutional", data, {"channels": [2], "widths": [3]})
    assert first_layer(network.apply, network.init(root_key(0)), jnp.asarray(data.inputs)) is None


def engines(batch_size: int, with_replacement: bool = True) -> tuple[Replicas, World]:
    apply, params, inputs, targets = problem()
    recipe = make_recipe(apply, mean_square, None, batch_size, with_replacement)
    numbers = (jnp.float32(0.02), jnp.float32(jnp.inf), jnp.int32(10), jnp.int32(1))
    engine = Replicas(recipe, params, 3, root_key(5), 0.02, replace=False)
    return engine, World(inputs, targets, *numbers, None, None)


def screened(world: World) -> World:
    """Screens that ask for the full loss at some iterations."""
    limits = Limits(jnp.float32(0.4), jnp.float32(0.3))
    screens = [
        Screen(world.inputs[:size], world.targets[:size], jnp.full(size, 1 / size, jnp.float32), limits)
        for size in (30, 60)
    ]
    gate = Limits(jnp.float32(0.5), jnp.float32(0.4))
    return world._replace(gate=Gate(gate, jnp.float32(0.4)), screens=(screens[0], screens[1]))


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize(("batch_size", "steps"), [(8, 48), (8, 53), (3, 50), (80, 20)])
def test_blocks_take_the_steps_of_plain_sgd(batch_size: int, steps: int, with_replacement: bool) -> None:
    engine, world = engines(batch_size, with_replacement)
    blocks = make_blocks(engine.recipe, problem()[1], world.inputs)
    assert blocks is not None
    start = engine.states[0]
    arguments = np.uint32(2), np.int32(3), np.int32(3 + steps), np.bool_(True), engine.key
    for seen in (world, screened(world))[batch_size > 32 :]:  # a block of one iteration serves the screens alone
        plain = engine._piece(start, *arguments, seen)
        quick = blocks.piece(start, *arguments, blocks.world(seen))
        assert int(quick[1]) == int(plain[1]) == 3 + steps
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), quick[0], plain[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), quick[3], plain[3])
        np.testing.assert_allclose(quick[4], plain[4], rtol=1e-4)
        assert int(plain[3].looks) > 3
    assert int(plain[3].looks) < steps


def test_a_block_ends_where_a_run_escapes_and_a_replay_finds_its_state() -> None:
    engine, world = engines(8)
    start = engine.states[0]
    losses = [float(engine._run(world, start, 1, 0, end).records[-1, 5]) for end in range(10, 60, 10)]
    world = world._replace(barrier=jnp.float32(np.mean(losses)), check_interval=jnp.int32(7))
    start = jax.tree.map(lambda leaf: -leaf, start) if losses[0] > np.mean(losses) else start
    plain = engine._run(world, start, 1, 0, 60)
    engine.advance(1, world)
    prepared = engine._in_blocks(world)
    assert prepared.compact is not None
    quick = engine._run(prepared, start, 1, 0, 60)
    assert quick.escaped == plain.escaped
    assert quick.end == plain.end
    replay = engine._run(prepared, start, 1, 0, quick.end, watch=False)
    for one, other in zip(*map(jax.tree.leaves, (replay.state, quick.state)), strict=True):
        assert jnp.all(one == other)


def test_escapes_are_those_of_plain_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, params, inputs, targets = problem()
    loss = float(jnp.mean(0.5 * (apply(params, inputs) - targets) ** 2))
    settings: dict = dict(
        learning_rate=0.25,
        batch_size=4,
        loss_barrier=1.3 * loss,
        replicas=6,
        steps=40,
        burn_in=(0, 0),
        looks="exact",
    )
    quick = measure_escape(apply, params, inputs, targets, **settings)
    monkeypatch.setattr(replicas, "make_blocks", lambda *arguments: None)
    plain = measure_escape(apply, params, inputs, targets, **settings)
    assert plain.escapes > 0
    assert quick.rows.equals(plain.rows)


def test_blocks_are_for_plain_sgd_and_wide_first_layers() -> None:
    apply, params, inputs, _ = problem()
    recipe = lambda optimizer: make_recipe(apply, mean_square, optimizer, 8, True)
    assert make_blocks(recipe(None), params, inputs) is not None
    assert make_blocks(recipe(lambda rate: optax.sgd(rate, momentum=0.9)), params, inputs) is None
    narrow = make_recipe(own_function, mean_square, None, 8, True)
    assert make_blocks(narrow, own_params(12), jnp.ones((20, 12))) is None


@pytest.mark.parametrize("part", ["hessian", "gauss_newton"])
def test_hessians_are_the_same_without_the_columns_that_are_always_zero(part: str) -> None:
    apply, params, inputs, targets = problem()
    whole = curvature.make_problem(apply, params, inputs, targets)
    compact = whole.compact()
    assert compact.inputs.shape[1] <= INPUTS - 16
    vector = whole.start()
    expected = curvature.linear_map(whole, part)(vector)
    np.testing.assert_allclose(
        curvature.linear_map(compact, part)(vector), expected, atol=1e-5 * jnp.abs(expected).max()
    )
    spectrum = top_hessian(apply, params, inputs, targets, k=3, part=part)
    weights = jax.tree.leaves(params)[0].shape
    first = spectrum.eigenvectors[:, : weights[0] * weights[1]].reshape(3, *weights)
    unused = ~np.any(np.asarray(inputs) != 0, axis=0)
    assert np.abs(first[:, :, unused]).max() < 1e-6
    density = spectral_density(apply, params, inputs, targets, part=part, probes=2, iterations=30)
    assert density.dimension == whole.dimension
