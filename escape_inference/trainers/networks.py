"""Networks by name: a multilayer perceptron, a convolutional network, a linear map, or the user's own.

A network is two functions, as pure as JAX wants them: ``init(key) -> params`` (any pytree of arrays) and
``apply(params, inputs) -> predictions`` for a batch, inputs [batch, ...], predictions of the shape of the targets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.architectures import ACTIVATIONS, ConvolutionalNetwork, MultilayerPerceptron, convolved
from escape_inference.trainers.datasets import Dataset, check_options, import_object, module_path


@dataclass(frozen=True)
class Network:
    """A network that fits its data.

    Attributes:
        name: built-in name or import path.
        init: ``init(key) -> params``.
        apply: ``apply(params, inputs [batch, ...]) -> predictions`` [batch] or [batch, outputs], like the targets.
    """

    name: str
    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[[PyTree, Array], Array]


def multilayer_perceptron(data: Dataset, widths: Sequence[int] = (100, 100, 100), activation: str = "relu") -> Network:
    """Return a fully connected network with the given hidden widths, one output for each target column.

    Raises:
        InputError: a width below 1 or an unknown activation.

    >>> from escape_inference.trainers.datasets import check_data
    >>> network = multilayer_perceptron(check_data("d", [[0.0, 1.0]], [1.0]), widths=[4, 3], activation="tanh")
    >>> params = network.init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)), network.apply(params, jnp.ones((5, 2))).shape
    (31, (5,))
    """
    if not widths or min(widths) < 1:
        raise InputError(f"network: widths = {list(widths)} must be one or more whole numbers >= 1")
    if activation not in ACTIVATIONS:
        raise InputError(f"network: unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    outputs = 1 if data.targets.ndim == 1 else data.targets.shape[1]
    return _perceptron(
        (int(np.prod(data.inputs.shape[1:])), *widths, outputs), activation, squeeze=data.targets.ndim == 1
    )


@lru_cache(maxsize=32)
def _perceptron(sizes: tuple[int, ...], activation: str, *, squeeze: bool) -> Network:
    """The same network is the same object, so that what was compiled for it is used again."""
    return _from_module(
        "multilayer_perceptron", lambda key: MultilayerPerceptron(sizes, activation, squeeze, key), batched=True
    )


def convolutional(
    data: Dataset,
    channels: Sequence[int] = (8, 16),
    widths: Sequence[int] = (64,),
    kernel: int = 5,
    stride: int = 2,
    activation: str = "relu",
) -> Network:
    """Return convolutions with the given channels followed by fully connected layers of the given hidden widths.

    Inputs are images [samples, height, width] or [samples, height, width, channels]; flat inputs are square images of
    one channel.

    Raises:
        InputError: numbers below 1, an unknown activation, inputs that are no images or too small for the kernel.

    >>> from escape_inference.trainers.datasets import load_data
    >>> network = convolutional(load_data("mnist_two_class", {"samples": 10}))
    >>> params = network.init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)), network.apply(params, jnp.ones((5, 784))).shape
    (19937, (5,))
    """
    if not channels or min([*channels, *widths, kernel, stride]) < 1:
        raise InputError("network: channels (at least one), widths, kernel and stride must be whole numbers >= 1")
    if activation not in ACTIVATIONS:
        raise InputError(f"network: unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    shape = data.inputs.shape[1:]
    side = round(float(np.sqrt(shape[0])))
    image = {1: (side, side, 1), 2: (*shape, 1), 3: shape}.get(len(shape), (0, 0, 0))
    smallest = min(convolved(length, len(channels), kernel, stride) for length in image[:2])
    if smallest < 1 or np.prod(image) != np.prod(shape):
        raise InputError(f"network: inputs of shape {shape} are no images that {len(channels)} kernels of {kernel} fit")
    outputs = 1 if data.targets.ndim == 1 else data.targets.shape[1]
    return _convolutional(
        image, tuple(channels), (*widths, outputs), kernel, stride, activation, squeeze=data.targets.ndim == 1
    )


@lru_cache(maxsize=32)
def _convolutional(
    image: tuple[int, int, int],
    channels: tuple[int, ...],
    sizes: tuple[int, ...],
    kernel: int,
    stride: int,
    activation: str,
    *,
    squeeze: bool,
) -> Network:
    settings = image, channels, sizes, kernel, stride, activation, squeeze
    return _from_module("convolutional", lambda key: ConvolutionalNetwork(*settings, key), batched=True)


def linear(data: Dataset, bias: bool = False) -> Network:
    """Return the linear map of the inputs, without bias unless asked for, so that d inputs give d parameters.

    Source:
        Mori, Ziyin, Liu, Ueda, ICML 2022, linear regression.

    >>> from escape_inference.trainers.datasets import check_data
    >>> network = linear(check_data("d", [[0.0, 1.0, 2.0]], [1.0]))
    >>> network.apply({"weights": jnp.array([1.0, 2.0, 3.0])}, jnp.array([[1.0, 1.0, 1.0]])).tolist()
    [6.0]
    """
    shape = (int(np.prod(data.inputs.shape[1:])), *data.targets.shape[1:])

    def init(key: Key[Array, ""]) -> dict[str, Array]:
        params = {"weights": jax.random.normal(key, shape) / np.sqrt(shape[0])}
        return params | {"bias": jnp.zeros(shape[1:])} if bias else params

    return Network("linear", init, _apply_linear)


def _apply_linear(params: dict[str, Array], inputs: Array) -> Array:
    return inputs.reshape(len(inputs), -1) @ params["weights"] + params.get("bias", 0.0)


BUILT_IN: dict[str, Callable[..., Network]] = {
    "multilayer_perceptron": multilayer_perceptron,
    "linear": linear,
    "convolutional": convolutional,
}


def load_network(
    name: str,
    data: Dataset,
    options: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    same_shape: bool = True,
) -> Network:
    """Build a network by its built-in name or import path, and check that its predictions fit the targets.

    An import path ``my_module:my_network`` may name

    - a pair ``(init, apply)`` of functions as above;
    - an equinox module, which sees one sample at a time (its weights are the starting point of every minimum), or a
      function of a key that returns one;
    - a flax.nnx module, which sees a batch, or a function of a key that returns one;
    - an object with methods ``init(key, inputs)`` and ``apply(params, inputs)``, as those of flax.linen are.

    Args:
        name: ``multilayer_perceptron``, ``linear``, ``convolutional`` or ``my_module:my_network``.
        data: what it will be trained on.
        options: keyword arguments of the built-in network; of the function of a key, for an import path.
        folder: searched first for the user's module.
        same_shape: predictions must have the shape of the targets; a loss of one's own may compare others, such as
            scores [samples, classes] with labels [samples].

    Raises:
        InputError: unknown name or option, an object of none of these kinds, or predictions that do not have the shape
            of the targets.

    >>> from escape_inference.trainers.datasets import check_data
    >>> load_network("linear", check_data("d", [[0.0, 1.0]], [1.0])).name
    'linear'
    """
    options = dict(options or {})
    if name in BUILT_IN:
        check_options(BUILT_IN[name], options, f"network: {name}", skip=1)
        network = BUILT_IN[name](data, **options)
    elif ":" in name:
        found = import_object(name, what="network", folder=folder)
        with module_path(folder):
            network = _adapt(name, found, options, data)
    else:
        names = ", ".join(BUILT_IN)
        raise InputError(f"network: unknown name {name!r}; use {names} or an import path my_module:my_network")
    check_network(network, data, same_shape)
    return network


def check_network(network: Network, data: Dataset, same_shape: bool = True) -> None:
    """Trace the network on the data (nothing is computed) and compare the shape of predictions and targets.

    Raises:
        InputError: the network cannot be applied to these inputs, or its predictions have another shape or are not
            real numbers.
    """
    inputs = jax.ShapeDtypeStruct(data.inputs.shape, jnp.float32)
    try:
        params = jax.eval_shape(network.init, jax.random.key(0))
        predictions = jax.eval_shape(network.apply, params, inputs)
    except Exception as error:
        raise InputError(
            f"network: {network.name} cannot be applied to inputs of shape {data.inputs.shape}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        ) from error
    leaves = jax.tree.leaves(params)
    if not any(leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise InputError(f"network: {network.name} has no floating-point parameters to train")
    shape = getattr(predictions, "shape", None)
    if shape is None or (same_shape and shape != data.targets.shape):
        got = f"predictions of shape {shape}" if shape is not None else f"a {type(predictions).__name__}"
        raise InputError(
            f"network: {network.name} gives {got} for the whole of the data, but the targets have shape "
            f"{data.targets.shape}; the last layer must give {_outputs(data)}"
        )
    if not jnp.issubdtype(predictions.dtype, jnp.floating):
        raise InputError(f"network: {network.name} gives predictions of type {predictions.dtype}, not real numbers")


def _outputs(data: Dataset) -> str:
    if data.targets.ndim == 1:
        return "one number for each sample, shape [samples] without a last axis of 1"
    return f"{data.targets.shape[1]} numbers for each sample"


def _from_module(name: str, make: Callable[[Any], eqx.Module], *, batched: bool) -> Network:
    """Split an equinox module into trainable parameters and the rest, which is the same for every key."""
    static = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(0)), _is_trainable)[1]

    def init(key: Key[Array, ""]) -> PyTree:
        return eqx.filter(make(key), _is_trainable)

    def apply(params: PyTree, inputs: Array) -> Array:
        module: Any = eqx.combine(params, static)
        return module(inputs) if batched else jax.vmap(module)(inputs)

    return Network(name, init, apply)


def _is_nnx(found: Any) -> bool:
    return any(kind.__module__.startswith("flax.nnx") for kind in type(found).__mro__) and callable(found)


def _from_nnx(name: str, make: Callable[[Any], Any]) -> Network:
    """Split a flax.nnx module into its parameters and the rest, which is the same for every key."""
    from flax import nnx  # only who brings such a module has it

    split: Any = nnx.split
    graph, _, rest = split(make(jax.random.key(0)), nnx.Param, ...)

    def init(key: Key[Array, ""]) -> PyTree:
        return split(make(key), nnx.Param, ...)[1]

    return Network(name, init, lambda params, inputs: nnx.merge(graph, params, rest)(inputs))


def _is_trainable(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _adapt(name: str, found: Any, options: dict[str, Any], data: Dataset) -> Network:
    """Turn the object behind an import path into a :class:`Network`."""
    if isinstance(found, eqx.Module) and callable(found):
        check_no_options(name, options)
        return _from_module(name, lambda key: found, batched=False)
    if isinstance(found, tuple | list) and len(found) == 2 and all(callable(part) for part in found):
        check_no_options(name, options)
        return Network(name, *found)
    if _is_nnx(found):
        check_no_options(name, options)
        return _from_nnx(name, lambda key: found)
    methods = [getattr(found, method, None) for method in ("init", "apply")]
    if not isinstance(found, type) and all(callable(method) for method in methods):
        check_no_options(name, options)
        first = jnp.asarray(data.inputs[:1])
        return Network(name, lambda key: found.init(key, first), found.apply)
    if callable(found):
        check_options(found, options, f"network: {name}", skip=1)
        try:
            made = found(jax.random.key(0), **options)
        except Exception as error:
            raise InputError(f"network: {name} failed: {type(error).__name__}: {error}") from error
        if isinstance(made, eqx.Module) and callable(made):
            return _from_module(name, lambda key: found(key, **options), batched=False)
        if _is_nnx(made):
            return _from_nnx(name, lambda key: found(key, **options))
    raise InputError(
        f"network: {name} is a {type(found).__name__}; expected a pair (init, apply), an equinox or flax.nnx module (or a "
        "function of a key that returns one), or an object with the methods init and apply"
    )


def check_no_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options for an object that takes none."""
    if options:
        raise InputError(f"network: {name} takes no options, got {', '.join(options)}")
