"""Per-sample and full-batch losses of any ``apply(params, inputs) -> predictions``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from escape_inference.errors import InputError

Apply = Callable[[Any, Array], Array]
SampleLoss = Callable[[Array, Array], Array]


def mean_square(prediction: Array, target: Array) -> Float[Array, ""]:
    """Half the squared error of one sample, so that its mean is ``L = (1/2N) sum_mu |f - y|^2``.

    >>> float(mean_square(jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0])))
    2.5
    """
    return 0.5 * jnp.sum((prediction - target) ** 2)


def logistic(prediction: Array, target: Array) -> Float[Array, ""]:
    """Logistic loss of one sample whose targets are +1 and -1: ``log(1 + exp(-y f))``, summed over outputs.

    >>> round(float(logistic(jnp.array([0.0, 3.0]), jnp.array([1.0, -1.0]))), 3)
    3.742
    """
    return jnp.sum(jax.nn.softplus(-target * prediction))


def cross_entropy(prediction: Array, target: Array) -> Float[Array, ""]:
    """Cross entropy of one sample between its target probabilities (one-hot or not) and the softmax of the outputs.

    >>> round(float(cross_entropy(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))), 3)
    1.313
    """
    return -jnp.sum(target * jax.nn.log_softmax(prediction))


LOSSES: dict[str, SampleLoss] = {"mean_square": mean_square, "logistic": logistic, "cross_entropy": cross_entropy}


def resolve_loss(loss: str | SampleLoss) -> SampleLoss:
    """The per-sample loss of that name, or the user's own ``(prediction, target) -> scalar`` for one sample.

    Raises:
        InputError: the name is not known.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(f"loss: {loss!r} is not known; allowed: {', '.join(LOSSES)}, or a callable for one sample.")
    return LOSSES[loss]


def sample_losses(
    apply: Apply, loss: SampleLoss, params: PyTree, inputs: Float[Array, "n ..."], targets: Array
) -> Float[Array, " n"]:
    """The loss of each sample.

    >>> sample_losses(lambda p, x: p * x, mean_square, 2.0, jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    return jax.vmap(loss)(apply(params, inputs), targets)


def check_problem(
    apply: Apply, loss: SampleLoss, params: PyTree, inputs: Array | np.ndarray, targets: Array | np.ndarray
) -> tuple[Array, Array]:
    """Inputs and targets as JAX arrays, refused if they cannot be trained on.

    Raises:
        InputError: different numbers of samples, values that are not finite, predictions of the wrong shape, or a loss
            that is not one number for each sample.
    """
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
        raise InputError(
            f"inputs {inputs.shape} and targets {targets.shape} must have the same number of samples first."
        )
    for name, values in (("inputs", inputs), ("targets", targets)):
        if not bool(jnp.all(jnp.isfinite(values))):
            raise InputError(f"{name}: every value must be finite.")
    try:
        predictions = jax.eval_shape(apply, params, inputs)
        losses = jax.eval_shape(jax.vmap(loss), predictions, targets)
    except Exception as error:  # whatever the user's functions raise
        kind = type(error).__name__
        raise InputError(f"the network or the loss does not accept this data: {kind}: {error}") from error
    single = predictions.size == targets.size == len(inputs)  # [N, 1] and [N] are the same numbers
    if (
        len(predictions.shape) == 0
        or predictions.shape[0] != len(inputs)
        or (loss in LOSSES.values() and predictions.shape != targets.shape and not single)
    ):
        raise InputError(f"predictions have shape {predictions.shape}, targets {targets.shape}: they must match.")
    if losses.shape != (len(inputs),):
        raise InputError(f"loss: must be one number for each sample, got shape {losses.shape[1:]} for one.")
    return inputs, targets
