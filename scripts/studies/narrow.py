"""Narrow networks and small data whose minima have barriers between them, for saddles.toml and reproduce_saddles.py."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from escape_inference.trainers.datasets import mnist_two_class

UNITS = 2


def teacher(
    noise: float = 0.4, samples: int = 400, dimension: int = 4
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
    """Normal inputs and the outputs of a network of two units, with normal noise of this standard deviation."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(samples, dimension))
    weights = generator.normal(size=(dimension, UNITS))
    weights = 1.2 * weights / np.linalg.norm(weights, axis=0)
    return inputs, np.tanh(inputs @ weights).sum(1) + noise * generator.normal(size=samples)


def digits(samples: int = 500, dimension: int = 6) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
    """Even (+1) and odd (-1) handwritten digits by their leading principal components, of unit mean square together."""
    images, targets = mnist_two_class(samples)
    images = np.asarray(images, float).reshape(samples, -1)
    images = images - images.mean(0)
    components = images @ np.linalg.svd(images, full_matrices=False)[2][:dimension].T
    return components / components.std(), targets


def apply(params: dict[str, Array], inputs: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Two layers: the sum of tanh units, which can change places."""
    return jnp.sum(jnp.tanh(inputs @ params["w"]), axis=1)


@dataclass(frozen=True)
class Committee:
    """The network, as studies want one: the sum of so many tanh units."""

    units: int = UNITS

    def init(self, key: Key[Array, ""], inputs: Float[Array, "n d"]) -> dict[str, Array]:
        """Initial weights."""
        return {"w": 0.5 * jax.random.normal(key, (inputs.shape[1], self.units))}

    apply = staticmethod(apply)


network = Committee()
