"""Data and networks by name or import path, and everything that is refused before training."""

import hashlib
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from escape_inference.errors import InputError
from escape_inference.row_groups import ramp_codes
from escape_inference.table import read_measurements
from escape_inference.trainers.datasets import Dataset, check_data, load_data
from escape_inference.trainers.networks import load_network

MODULE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

def my_data(samples=20):
    x = np.arange(2.0 * samples).reshape(samples, 2)
    return x, x.sum(axis=1)

def broken_data():
    return 1 / 0

def lonely_data():
    return np.ones((3, 2))

def init(key):
    return jax.random.normal(key, (2,))

pair = (init, lambda params, x: x @ params)
column = (init, lambda params, x: (x @ params)[:, None])
failing = (init, lambda params, x: x @ params[:1])
whole = (lambda key: jnp.zeros(2, int), lambda params, x: x.sum(axis=1))
module = eqx.nn.MLP(2, "scalar", 5, 1, key=jax.random.key(1))

def module_of_key(key, width=3):
    return eqx.nn.MLP(2, "scalar", width, 1, key=key)

class Flaxlike:
    def init(self, key, x):
        return {"params": {"kernel": jax.random.normal(key, (x.shape[-1],))}}
    def apply(self, variables, x):
        return x @ variables["params"]["kernel"]

flaxlike = Flaxlike()
number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_study_module.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def own(folder: Path) -> Dataset:
    return load_data("own_study_module:my_data", {"samples": 10}, folder=folder)


def test_mnist_has_two_balanced_classes_of_real_digits() -> None:
    data = load_data("mnist_two_class")
    assert data.inputs.shape == (5000, 784)
    assert data.inputs.dtype == np.float32
    assert (float(data.inputs.min()), float(data.inputs.max())) == (0.0, 1.0)
    assert sorted(np.unique(data.targets, return_counts=True)[1].tolist()) == [2500, 2500]
    zeros = data.inputs[::10].mean(axis=0).reshape(28, 28)
    assert zeros[14, 14] < 0.1 < 0.4 < zeros[14, 8:20].max(), "the mean 0 has a hole in its middle"
    assert load_data("mnist_parity").sha256 == data.sha256
    assert load_data("mnist_two_class", {"positive_digits": [3]}).targets.sum() == 500 - 4500


def test_linear_regression_has_unit_curvature_and_noise_independent_of_the_inputs() -> None:
    data = load_data("linear_regression", {"samples": 10_000, "dimension": 4})
    covariance = data.inputs.T @ data.inputs / 10_000
    assert np.abs(covariance - np.eye(4)).max() < 0.05
    assert abs(data.targets.var() - 1) < 0.05
    assert np.abs(data.inputs.T @ data.targets / 10_000).max() < 0.05
    assert data.sha256 != load_data("linear_regression", {"samples": 10_000, "dimension": 4, "seed": 1}).sha256


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "unknown name 'mnist'; use mnist_two_class, mnist_parity, linear_regression or an import path"),
        ("mnist_two_class", {"samples": 6000}, "not between 2 and 5000"),
        ("mnist_two_class", {"samples": "all"}, "samples = 'all': Input should be a valid integer"),
        ("mnist_two_class", {"sample": 10}, "unknown option sample; allowed: samples, positive_digits"),
        ("mnist_two_class", {"positive_digits": [11]}, "digits from 0 to 9"),
        ("mnist_two_class", {"positive_digits": []}, "one of the two classes empty"),
        ("linear_regression", {"dimension": 0}, "needs samples > dimension >= 1"),
        ("no_such_module_here:x", {}, "cannot import 'no_such_module_here'"),
        ("own_study_module:nothing", {}, "has no 'nothing'"),
        ("own_study_module:number", {}, "is not callable"),
        ("own_study_module:", {}, "not an import path"),
        ("own_study_module:broken_data", {}, "failed: ZeroDivisionError"),
        ("own_study_module:lonely_data", {}, "must return a pair"),
    ],
)
def test_data_that_cannot_be_loaded_are_refused(folder: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(name, options, folder=folder)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([[1.0], [np.nan]], [1.0, 2.0], "inputs hold 1 NaN or infinite value, first in sample 1"),
        ([[1.0], [2.0]], [np.inf, -np.inf], "targets hold 2 NaN or infinite values, first in sample 0"),
        ([[1e39], [2.0]], [1.0, 2.0], "inputs hold 1 NaN or infinite"),
        ([[1.0], [2.0]], [1.0], "2 inputs but 1 targets"),
        ([1.0, 2.0], [1.0, 2.0], r"expected \[samples, features\]"),
        ([[1.0], [2.0]], np.ones((2, 1, 1)), r"expected \[samples\] or \[samples, outputs\]"),
        ([[1.0], [2.0, 3.0]], [1.0, 2.0], "not a regular array"),
        ([["a"], ["b"]], [1.0, 2.0], "not a regular array of real numbers"),
        (np.ones((2, 1)) * 1j, [1.0, 2.0], "not a regular array of real numbers"),
        (np.ones((0, 2)), [], "inputs are empty"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(inputs: object, targets: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_data("mine", inputs, targets)


@pytest.mark.parametrize(
    ("name", "options", "leaves"),
    [
        ("own_study_module:pair", {}, 2),
        ("own_study_module:module", {}, 21),
        ("own_study_module:module_of_key", {"width": 4}, 17),
        ("own_study_module:flaxlike", {}, 2),
        ("linear", {"bias": True}, 3),
        ("multilayer_perceptron", {"widths": [5, 4], "activation": "tanh"}, 15 + 24 + 5),
    ],
)
def test_every_kind_of_network_predicts_the_shape_of_the_targets(
    folder: Path, own: Dataset, name: str, options: dict, leaves: int
) -> None:
    network = load_network(name, own, options, folder=folder)
    params = network.init(jax.random.key(5))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == leaves
    predictions = network.apply(params, jnp.asarray(own.inputs))
    assert predictions.shape == own.targets.shape
    assert jnp.allclose(network.apply(params, jnp.asarray(own.inputs[3:4])), predictions[3:4], rtol=1e-5)


def test_the_perceptron_is_the_one_of_equinox(own: Dataset) -> None:
    network = load_network("multilayer_perceptron", own, {"widths": [7, 6]})
    params = network.init(jax.random.key(2))
    hidden = jnp.asarray(own.inputs[0])
    for place, layer in enumerate(params.layers):
        hidden = layer(hidden) if place == 2 else jax.nn.relu(layer(hidden))
    assert isinstance(params.layers[0], eqx.nn.Linear)
    assert jnp.allclose(network.apply(params, jnp.asarray(own.inputs[:1])), hidden, rtol=1e-5)


def test_the_convolutions_are_those_of_equinox() -> None:
    images = np.random.default_rng(0).normal(size=(3, 11, 9, 2))
    network = load_network("convolutional", check_data("images", images, np.ones(3)), {"kernel": 3, "channels": [4, 5]})
    params = network.init(jax.random.key(2))
    hidden = jnp.moveaxis(jnp.asarray(images[1], jnp.float32), -1, 0)
    for layer in params.convolutions:
        depth = hidden.shape[0]
        same = eqx.nn.Conv2d(depth, len(layer.weight), 3, stride=2, key=jax.random.key(0))
        weight = jnp.moveaxis(layer.weight.reshape(-1, 3, 3, depth), -1, 1)
        same = eqx.tree_at(lambda conv: (conv.weight, conv.bias), same, (weight, layer.bias[:, None, None]))
        hidden = jax.nn.relu(same(hidden))
    hidden = jnp.moveaxis(hidden, 0, -1).reshape(-1)
    for place, layer in enumerate(params.layers):
        hidden = layer(hidden) if place == 1 else jax.nn.relu(layer(hidden))
    assert jnp.allclose(network.apply(params, jnp.asarray(images, jnp.float32))[1:2], hidden, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convolutional", {}, r"inputs of shape \(2,\) are no images that 2 kernels of 5 fit"),
        ("convolutional", {"channels": []}, r"channels \(at least one\), widths, kernel and stride must be"),
        (
            "perceptron",
            {},
            "unknown name 'perceptron'; use multilayer_perceptron, linear, convolutional or an import path",
        ),
        ("linear", {"widths": [3]}, "unknown option widths; allowed: bias"),
        ("multilayer_perceptron", {"widths": [0]}, "whole numbers >= 1"),
        ("multilayer_perceptron", {"widths": 3}, "widths = 3"),
        ("multilayer_perceptron", {"activation": "step"}, "unknown activation 'step'; allowed: relu, tanh"),
        ("own_study_module:column", {}, r"shape \(10, 1\) for the whole of the data, but the targets ha"),
        ("own_study_module:failing", {}, "cannot be applied to inputs of shape"),
        ("own_study_module:whole", {}, "no floating-point parameters"),
        ("own_study_module:number", {}, "is a int; expected a pair"),
        ("own_study_module:pair", {"width": 3}, "takes no options, got width"),
        ("own_study_module:module_of_key", {"wide": 3}, "unknown option wide; allowed: width"),
        ("own_study_module:my_data", {}, "my_data failed: TypeError"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    folder: Path, own: Dataset, name: str, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_network(name, own, options, folder=folder)


DATA = Path(__file__).parent.parent / "data"
RESOURCES = json.loads((DATA / "datapackage.json").read_text(encoding="utf-8"))["resources"]


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource["name"])
def test_what_ships_is_what_the_data_package_describes(resource: dict) -> None:
    content = (DATA / resource["path"]).read_bytes()
    assert len(content) == resource["bytes"] < 2 * 2**20
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" == resource["hash"]
    if resource["format"] == "csv":
        table = pd.read_csv(DATA / resource["path"])
        assert list(table) == [field["name"] for field in resource["schema"]["fields"]]
        assert "escape-inference collect scripts/studies/" in resource["measured"]["command"]


def test_every_file_that_ships_is_described() -> None:
    described = {resource["path"] for resource in RESOURCES} | {"datapackage.json", "reproduction"}
    assert {path.name for path in DATA.iterdir()} == described
    folder = DATA / "reproduction"
    tables = json.loads((folder / "datapackage.json").read_text(encoding="utf-8"))["resources"]
    assert {path.name for path in folder.glob("*.csv")} == {resource["path"] for resource in tables}
    for resource in tables:
        content = (folder / resource["path"]).read_bytes()
        assert resource["hash"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert resource["measured"]["command"].startswith("python scripts/reproduce_")


def test_the_twelve_minima_have_escapes_ramps_and_spectra() -> None:
    table = read_measurements(DATA / "mnist_minima.csv")
    critical = pd.read_csv(DATA / "mnist_minima_critical_learning_rates.csv")
    spectra = pd.read_csv(DATA / "mnist_minima_spectra.csv")
    minima = pd.read_csv(DATA / "mnist_minima_minima.csv")
    assert len(minima.drop_duplicates(["learning_rate", "batch_size"])) == 12
    for frame in (table, critical, spectra):
        assert set(frame["minimum"]) == set(minima["minimum"])
    in_ramp, _ = ramp_codes(table)
    assert table.loc[in_ramp, "run"].nunique() == len(critical) == 96
    quasi = table[table["start"] == "quasi_stationary"]
    assert quasi.groupby("minimum", observed=True)["escaped"].sum().gt(0).all()
    top = spectra.query("part == 'hessian' and rank == 1").set_index("minimum")["eigenvalue"]
    assert minima.set_index("minimum")["hessian_minimum"].to_dict() == top.to_dict()
    assert (spectra["residual"] < 1e-3 * spectra["minimum"].map(top)).all()
    assert (critical["upper"] < 1.3 * 2 / critical["hessian_minimum"]).all()
