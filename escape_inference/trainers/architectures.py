"""The networks that ship, as equinox modules that work on whole batches.

Every layer is a matrix product, the convolutions too, so that gradients taken sample by sample stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "identity": lambda x: x,
}


class MultilayerPerceptron(eqx.Module):
    """Fully connected layers with one activation between them; works on whole batches.

    Attributes:
        layers: affine maps, initialised uniformly in ±1/√(fan in) (the default of equinox and of PyTorch).
        activation: name of the function between the layers, see ``ACTIVATIONS``.
        squeeze: return [batch] rather than [batch, 1].
    """

    layers: list[eqx.nn.Linear]
    activation: str = eqx.field(static=True)
    squeeze: bool = eqx.field(static=True)

    def __init__(self, sizes: Sequence[int], activation: str, squeeze: bool, key: Key[Array, ""]) -> None:
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = [eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
        self.activation = activation
        self.squeeze = squeeze

    def __call__(self, inputs: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Return the predictions for a batch."""
        hidden = inputs.reshape(len(inputs), -1)
        for layer in self.layers[:-1]:
            hidden = ACTIVATIONS[self.activation](_affine(layer, hidden))
        output = _affine(self.layers[-1], hidden)
        return output[:, 0] if self.squeeze else output


def _affine(layer: eqx.nn.Linear, inputs: Float[Array, "... in"]) -> Float[Array, "... out"]:
    output = inputs @ layer.weight.T
    return output if layer.bias is None else output + layer.bias


class ConvolutionalNetwork(eqx.Module):
    """Convolutions with a stride, then fully connected layers, one activation between all of them.

    Each convolution gathers its patches and multiplies them with one matrix, and stays a matrix product when gradients
    are taken sample by sample.

    Attributes:
        convolutions: affine maps from a patch, row by row with the channels last, to the channels of the next layer.
        layers: affine maps after the last convolution, over rows, columns, channels.
        image: height, width, channels of a sample.
        kernel: height and width of a patch.
        stride: pixels between patches; no padding.
        activation: name of the function between the layers, see ``ACTIVATIONS``.
        squeeze: return [batch] rather than [batch, 1].
    """

    convolutions: list[eqx.nn.Linear]
    layers: list[eqx.nn.Linear]
    image: tuple[int, int, int] = eqx.field(static=True)
    kernel: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    squeeze: bool = eqx.field(static=True)

    def __init__(
        self,
        image: tuple[int, int, int],
        channels: Sequence[int],
        sizes: Sequence[int],
        kernel: int,
        stride: int,
        activation: str,
        squeeze: bool,
        key: Key[Array, ""],
    ) -> None:
        keys = jax.random.split(key, len(channels) + len(sizes))
        depths = (image[2], *channels)
        self.convolutions = [
            eqx.nn.Linear(kernel**2 * a, b, key=k) for a, b, k in zip(depths[:-1], depths[1:], keys, strict=False)
        ]
        height, width = (convolved(side, len(channels), kernel, stride) for side in image[:2])
        widths = (height * width * depths[-1], *sizes)
        self.layers = [
            eqx.nn.Linear(a, b, key=k) for a, b, k in zip(widths[:-1], widths[1:], keys[len(channels) :], strict=True)
        ]
        self.image, self.kernel, self.stride = image, kernel, stride
        self.activation, self.squeeze = activation, squeeze

    def __call__(self, inputs: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Return the predictions for a batch."""
        activation = ACTIVATIONS[self.activation]
        hidden = inputs.reshape(len(inputs), *self.image)
        for layer in self.convolutions:
            hidden = activation(_affine(layer, patches(hidden, self.kernel, self.stride)))
        hidden = hidden.reshape(len(inputs), -1)
        for layer in self.layers[:-1]:
            hidden = activation(_affine(layer, hidden))
        output = _affine(self.layers[-1], hidden)
        return output[:, 0] if self.squeeze else output


def convolved(side: int, times: int, kernel: int, stride: int) -> int:
    """The side of an image after so many convolutions; below 1 if it is too small for them.

    >>> convolved(28, 2, kernel=5, stride=2)
    4
    """
    for _ in range(times):
        side = (side - kernel) // stride + 1 if side >= kernel else 0
    return side


def patches(images: Float[Array, "batch h w c"], kernel: int, stride: int) -> Float[Array, "batch i j k"]:
    """Every patch as one vector: rows, then columns, then channels of the kernel.

    >>> patches(jnp.arange(9.0).reshape(1, 3, 3, 1), kernel=2, stride=1)[0, 1, 0].tolist()
    [3.0, 4.0, 6.0, 7.0]
    """
    rows, columns = (_places(side, kernel, stride) for side in images.shape[1:3])
    found = jnp.einsum("iph,jqw,nhwc->nijpqc", rows, columns, images)
    return found.reshape(*found.shape[:3], -1)


def _places(side: int, kernel: int, stride: int) -> Float[np.ndarray, "i kernel side"]:
    """1 where a pixel of a side is at this place of a patch."""
    first = stride * np.arange(convolved(side, 1, kernel, stride))
    return (first[:, None, None] + np.arange(kernel)[:, None] == np.arange(side)).astype(np.float32)
