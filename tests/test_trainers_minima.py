"""Many minima, losses and optimisers by name, networks by import path."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from escape_inference.errors import InputError
from escape_inference.trainers import Minimum, measure_ramp, top_hessian, train_minima, train_minimum
from escape_inference.trainers import minima as minima_module
from escape_inference.trainers.collect import collect
from escape_inference.trainers.datasets import check_data, linear_regression
from escape_inference.trainers.losses import cross_entropy, logistic
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.optimizers import named_optimizer
from escape_inference.trainers.sgd import root_key


def linear(theta: jax.Array, inputs: jax.Array) -> jax.Array:
    return inputs @ theta


def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (3,))


@pytest.fixture(scope="module")
def regression() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    inputs = rng.normal(size=(60, 3)).astype(np.float32)
    return inputs, (inputs @ np.array([1.0, -2.0, 0.5]) + 0.3 * rng.normal(size=60)).astype(np.float32)


GRID: dict = {"learning_rate": [0.05, 0.2], "batch_size": [4, 15], "steps": 120, "seed": [0, 7]}


def test_many_minima_are_each_what_one_training_gives(
    regression: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple] = []
    many = train_minima(draw, linear, *regression, **GRID, folder=tmp_path, progress=lambda *news: heard.append(news))
    assert len(many.found) == 8
    assert not many.failed
    assert heard[-1] == (8, 8, "lr0.2_b15_n120_s7")
    name = "lr0.2_b4_n120_s7"
    start = draw(jax.random.fold_in(root_key(7), minima_module.INITIAL))
    alone = train_minimum(linear, start, *regression, learning_rate=0.2, batch_size=4, steps=120, seed=7)
    assert np.array_equal(many.found[name].params, alone.params)
    saved = Minimum.load(tmp_path / f"{name}.npz", jnp.zeros(3))
    assert np.array_equal(saved.params, alone.params)
    assert (saved.loss_minimum, saved.gradient_norm) == (alone.loss_minimum, alone.gradient_norm)
    assert (saved.made["learning_rate"], saved.made["batch_size"], saved.made["seed"]) == (0.2, 4, 7)
    (tmp_path / f"{name}.npz").unlink()
    trained: list[dict] = []
    real = minima_module.train_minimum
    monkeypatch.setattr(
        minima_module, "train_minimum", lambda *given, **named: (trained.append(named), real(*given, **named))[1]
    )
    again = train_minima(draw, linear, *regression, **GRID, folder=tmp_path)
    assert len(trained) == 1, "what is there is not trained again"
    assert {key: m.loss_minimum for key, m in again.found.items()} == {
        key: m.loss_minimum for key, m in many.found.items()
    }


def test_minima_saved_from_other_settings_are_not_mistaken(regression: tuple, tmp_path: Path) -> None:
    one: dict = {"learning_rate": 0.1, "batch_size": 4, "steps": 20}
    train_minima(draw, linear, *regression, **one, folder=tmp_path)
    with pytest.raises(InputError, match="was made with other with_replacement"):
        train_minima(draw, linear, *regression, **one, folder=tmp_path, with_replacement=False)


def test_one_divergence_does_not_lose_the_other_minima(regression: tuple) -> None:
    many = train_minima(draw, linear, *regression, learning_rate=[0.1, 90.0], batch_size=4, steps=200)
    assert list(many.found) == ["lr0.1_b4_n200_s0"]
    assert "diverged" in many.failed["lr90_b4_n200_s0"]
    with pytest.raises(InputError, match="batch_size"):
        train_minima(draw, linear, *regression, learning_rate=0.1, batch_size=61, steps=2)
    with pytest.raises(InputError, match="given twice"):
        train_minima(draw, linear, *regression, learning_rate=[0.1, 0.1], batch_size=4, steps=2)
    with pytest.raises(InputError, match="steps: needs at least one"):
        train_minima(draw, linear, *regression, learning_rate=0.1, batch_size=4, steps=[])


def test_momentum_moves_the_stability_limit_to_that_of_heavy_ball() -> None:
    """Heavy ball with momentum b leaves a quadratic of curvature h beyond 2 (1 + b) / h."""
    h, momentum = 2.7, 0.5
    limit = 2 * (1 + momentum) / h
    inputs, targets = np.full((2, 1), np.sqrt(h)), np.array([0.7, -0.7])
    levels = limit * np.array([0.97, 0.99, 1.02, 1.05])
    ramp = measure_ramp(
        linear, jnp.full(1, 0.1), inputs, targets, batch_size=2, learning_rates=levels, steps_per_level=250, runs=1,
        loss_barrier=0.5, with_replacement=False, optimizer=named_optimizer("sgd", {"momentum": momentum}),
    )  # fmt: skip
    assert ramp.critical["lower"].iloc[0] == levels[1] < limit < levels[2] == ramp.critical["upper"].iloc[0]


@pytest.mark.parametrize(("name", "options"), [("adam", {"b1": 0.8}), ("sgd", {"momentum": 0.7, "nesterov": True})])
def test_an_optimiser_by_name_is_that_of_optax(regression: tuple, name: str, options: dict) -> None:
    settings: dict = {"learning_rate": 0.03, "batch_size": 60, "steps": 9, "with_replacement": False}
    found = train_minimum(linear, jnp.ones(3), *regression, optimizer=named_optimizer(name, options), **settings)
    rule = getattr(optax, name)(0.03, **options)
    theta, state = jnp.ones(3), rule.init(jnp.ones(3))
    for _ in range(9):
        updates, state = rule.update(
            jax.grad(lambda t: 0.5 * jnp.mean((linear(t, regression[0]) - regression[1]) ** 2))(theta), state
        )
        theta = theta + updates
    assert found.params == pytest.approx(np.asarray(theta), rel=1e-4)
    assert named_optimizer(name, options) is named_optimizer(name, dict(options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sdg", {}, "unknown name 'sdg'"),
        ("apply_updates", {}, "unknown name 'apply_updates'"),
        ("sgd", {"speed": 1}, "sgd takes no option speed; it takes: momentum"),
        ("nowhere_at_all:rule", {}, "optimizer: cannot import 'nowhere_at_all'"),
        ("lookahead", {}, "unknown name"),
    ],
)
def test_an_unknown_optimiser_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_optimizer(name, options)


def test_losses_by_name_are_the_textbook_ones() -> None:
    prediction, target = jnp.array([0.3, -1.2, 2.0]), jnp.array([0.0, 1.0, 0.0])
    probabilities = np.exp(prediction) / np.exp(prediction).sum()
    assert float(cross_entropy(prediction, target)) == pytest.approx(-np.log(probabilities[1]), rel=1e-5)
    assert float(logistic(jnp.float32(1.7), jnp.float32(-1))) == pytest.approx(np.log(1 + np.exp(1.7)), rel=1e-5)
    inputs, targets = np.ones((4, 1)), np.array([1.0, 1.0, 1.0, -1.0])
    found = train_minimum(
        linear, jnp.zeros(1), inputs, targets, learning_rate=1.0, batch_size=4, steps=200, with_replacement=False,
        loss="logistic",
    )  # fmt: skip
    assert float(found.params[0]) == pytest.approx(np.log(3), rel=1e-3), "the log odds"
    with pytest.raises(InputError, match="they must match"):
        train_minimum(
            lambda theta, x: x * theta, jnp.zeros(2), np.ones((4, 2)), targets, learning_rate=1.0, batch_size=4, steps=2,
            loss="cross_entropy",
        )  # fmt: skip


STUDY = """
[data]
name = "linear_regression"
samples = 60
dimension = 8
[network]
name = "{network}"
[[minima]]
label = "m"
learning_rate = 0.01
batch_size = 10
steps = 100
optimizer = {{ name = "sgd", momentum = 0.9 }}
with_replacement = false
[[ramps]]
relative = [0.5, 40.0]
levels = 5
steps_per_level = 20
batch_size = 5
threshold = 4.0
runs = 2
"""
MODULES = {
    "equinox": """
import equinox as eqx, jax, jax.numpy as jnp
class Net(eqx.Module):
    layers: list
    def __init__(self, key):
        a, b = jax.random.split(key)
        self.layers = [eqx.nn.Linear(8, 6, key=a), eqx.nn.Linear(6, "scalar", key=b)]
    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))
def network(key):
    return Net(key)
""",
    "flax": """
import flax.linen as nn
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(6)(x)))[..., 0]
network = Net()
""",
    "nnx": """
import jax.numpy as jnp
from flax import nnx
class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)
    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))[..., 0]
def network(key):
    return Net(nnx.Rngs(key))
""",
    "init_apply": """
import jax, jax.numpy as jnp
class Net:
    def init(self, key, x):
        a, b = jax.random.split(key)
        first, second = jax.random.normal(a, (x.shape[-1], 6)) / 3, jax.random.normal(b, (6,)) / 2
        return {"params": {"dense": {"kernel": first}, "out": second}}
    def apply(self, params, x):
        return jnp.tanh(x @ params["params"]["dense"]["kernel"]) @ params["params"]["out"]
network = Net()
""",
}


@pytest.mark.parametrize("library", ["equinox", "flax", "nnx", "init_apply"])
def test_a_module_of_the_users_own_is_measured_from_a_study(tmp_path: Path, library: str) -> None:
    (tmp_path / f"own_{library}.py").write_text(MODULES[library])
    (tmp_path / "study.toml").write_text(STUDY.format(network=f"own_{library}:network"))
    table = pd.read_parquet(collect(tmp_path / "study.toml", tmp_path / "out", progress=False))
    minima = pd.read_csv(tmp_path / "out" / "minima.csv")
    assert minima["status"].tolist() == ["trained"]
    assert minima["parameters"].iloc[0] == (8 * 6 + 6 if library == "init_apply" else 8 * 6 + 6 + 6 + 1)
    assert "0.9" in minima["optimizer"].iloc[0]
    assert minima["loss_minimum"].iloc[0] < 0.5 * np.mean(linear_regression(60, 8)[1] ** 2)
    assert table.groupby("run").size().max() > 1


def test_an_option_that_the_optimiser_of_a_study_does_not_take_is_refused_first(tmp_path: Path) -> None:
    text = STUDY.format(network="linear").replace("momentum = 0.9", "momentun = 0.9")
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(InputError, match="sgd takes no option momentun; it takes: momentum"):
        collect(tmp_path / "study.toml", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_built_network_of_two_outputs_takes_the_cross_entropy() -> None:
    data = check_data("d", np.eye(4), np.eye(2)[[0, 1, 0, 1]])
    network = load_network("multilayer_perceptron", data, {"widths": [8]})
    found = train_minimum(
        network.apply, network.init(root_key(1)), data.inputs, data.targets, learning_rate=0.5, batch_size=4,
        steps=300, loss="cross_entropy",
    )  # fmt: skip
    assert found.loss_minimum < 0.1


def test_a_saved_minimum_that_was_made_otherwise_is_not_handed_out(regression: tuple, tmp_path: Path) -> None:
    once: dict = {"learning_rate": 0.1, "batch_size": 4, "steps": 60, "folder": tmp_path}
    train_minima(draw, linear, *regression, **once)
    inputs, targets = regression
    for changed, what in (
        ({"optimizer": optax.adam}, "optimizer"),
        ({"optimizer": named_optimizer("sgd", {"momentum": 0.9})}, "optimizer"),
        ({"loss": "logistic"}, "loss"),
        ({"polish_steps": 5}, "polish_at_most"),
        ({"targets": targets + 0.1}, "data, network, loss or optimiser"),
        ({"apply": lambda theta, x: 1.1 * linear(theta, x)}, "data, network, loss or optimiser"),
    ):
        call = {"apply": linear, "inputs": inputs, "targets": targets} | once | changed
        with pytest.raises(InputError, match=f"was made with other {what}"):
            train_minima(draw, **call)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_folder_that_cannot_be_written_is_told_before_training(regression: tuple, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot save minima there"):
        train_minima(draw, linear, *regression, learning_rate=0.1, batch_size=4, steps=5, folder=tmp_path / "file")


def test_a_ramp_refuses_an_optimiser_with_a_learning_rate_of_its_own(regression: tuple) -> None:
    with pytest.raises(InputError, match="keeps its own learning rate"):
        measure_ramp(
            linear, jnp.zeros(3), *regression, batch_size=4, learning_rates=[0.1, 0.2], steps_per_level=5, runs=2,
            loss_barrier=1e3, optimizer=optax.sgd(0.1),
        )  # fmt: skip


def test_predictions_that_only_have_the_size_of_the_targets_are_refused() -> None:
    inputs, targets = np.ones((5, 2), np.float32), np.ones((5, 3), np.float32)
    with pytest.raises(InputError, match="they must match"):
        train_minimum(
            lambda p, x: (x @ p)[:, :, None],
            jnp.zeros((2, 3)),
            inputs,
            targets,
            learning_rate=0.1,
            batch_size=1,
            steps=1,
        )


def test_double_precision_trains_polishes_and_finds_the_spectrum(regression: tuple) -> None:
    inputs, targets = (np.asarray(part, float) for part in regression)
    with jax.enable_x64(True):
        found = train_minimum(
            linear, jnp.zeros(3), inputs, targets, learning_rate=0.1, batch_size=4, steps=50, polish_steps=2000,
            polish_gradient_norm=1e-10,
        )  # fmt: skip
        spectrum = top_hessian(linear, found, inputs, targets)
    assert found.params.dtype == np.float64
    assert found.gradient_norm < 1e-9
    exact = np.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[::-1]
    assert spectrum.eigenvalues == pytest.approx(exact, rel=1e-5)
