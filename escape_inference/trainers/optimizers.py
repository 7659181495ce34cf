"""Optimisers: plain SGD, any of optax, or the user's own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.datasets import import_object

OptimizerFactory = Callable[[Any], optax.GradientTransformation]
_TRANSFORMATIONS: dict[int, tuple[optax.GradientTransformation, OptimizerFactory]] = {}


def resolve_optimizer(optimizer: OptimizerFactory | optax.GradientTransformation | None) -> OptimizerFactory:
    """A function from the learning rate to an optax transformation.

    Args:
        optimizer: None for plain SGD; a function of the learning rate, such as ``optax.adam``; or a ready
            transformation, which then has its own learning rate built in.

    Raises:
        InputError: anything else.
    """
    if optimizer is None:
        return optax.sgd
    if isinstance(optimizer, tuple) and hasattr(optimizer, "update"):
        ready: optax.GradientTransformation = optimizer
        if id(ready) not in _TRANSFORMATIONS:  # one function for each, so that compiled code is found again
            _TRANSFORMATIONS[id(ready)] = (ready, lambda learning_rate: ready)
        return _TRANSFORMATIONS[id(ready)][1]
    if callable(optimizer):
        return optimizer
    raise InputError("optimizer: give None (SGD), a function of the learning rate, or an optax transformation.")


def named_optimizer(
    name: str, options: Mapping[str, Any] | None = None, *, folder: str | Path | None = None
) -> OptimizerFactory:
    """An optimiser by its name in optax, or by an import path, with options.

    Args:
        name: such as ``sgd`` or ``adam``, or ``my_module:my_optimizer``, a function whose first argument is the
            learning rate.
        options: its other arguments, such as ``momentum``.
        folder: searched first for the user's module.

    Raises:
        InputError: unknown name, or options that it does not take.

    >>> updates, _ = (heavy := named_optimizer("sgd", {"momentum": 0.9})(0.5)).update(2.0, heavy.init(0.0))
    >>> float(updates)
    -1.0
    >>> named_optimizer("sgd", {"momentun": 0.9})
    Traceback (most recent call last):
        ...
    escape_inference.errors.InputError: optimizer: sgd takes no option momentun; it takes: momentum, nesterov, \
accumulator_dtype
    """
    return _named(name, json.dumps(dict(options or {}), sort_keys=True), str(folder) if folder is not None else None)


def check_optimizer(optimizer: OptimizerFactory | optax.GradientTransformation | None, params: PyTree) -> None:
    """Trace one step of an optimiser (nothing is computed).

    Raises:
        InputError: it cannot make a step from parameters and gradient alone.

    >>> check_optimizer(optax.lbfgs, jax.ShapeDtypeStruct((2,), float))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    escape_inference.errors.InputError: optimizer: cannot make a step from the gradient: TypeError: ...
    """

    def step(params: PyTree) -> PyTree:
        made = resolve_optimizer(optimizer)(0.1)
        return optax.apply_updates(params, made.update(params, made.init(params), params)[0])

    try:
        jax.eval_shape(step, params)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise InputError(
            f"optimizer: cannot make a step from the gradient: {type(error).__name__}: {reason}"
        ) from error


@lru_cache(maxsize=64)
def _named(name: str, options: str, folder: str | None) -> OptimizerFactory:
    """The same function for the same name and options, so that compiled code is found again."""
    chosen = json.loads(options)
    found = getattr(optax, name, None)
    make = import_object(name, what="optimizer", folder=folder) if ":" in name else found
    parameters = list(inspect.signature(make).parameters) if callable(make) else []
    if not callable(make) or (":" not in name and parameters[:1] != ["learning_rate"]):
        raise InputError(
            f"optimizer: unknown name {name!r}; use one of optax, such as sgd, adam or rmsprop, or an import path "
            "my_module:my_optimizer of a function of the learning rate"
        )
    unknown = [key for key in chosen if key not in parameters[1:]]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(make).parameters.values()):
        raise InputError(
            f"optimizer: {name} takes no option {', '.join(unknown)}; it takes: {', '.join(parameters[1:])}"
        )

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        return make(learning_rate, **chosen)

    try:
        optimizer(0.1)
    except Exception as error:
        raise InputError(f"optimizer: {name} with {chosen} failed: {type(error).__name__}: {error}") from error
    return optimizer
