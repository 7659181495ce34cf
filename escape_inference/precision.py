"""Double precision for inference, without touching the precision of the user's own JAX code."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def float64(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with JAX in double precision, and leave the global setting alone.

    >>> import jax.numpy as jnp
    >>> float64(lambda: jnp.ones(1).dtype)()
    dtype('float64')
    >>> jnp.ones(1).dtype
    dtype('float32')
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapper
