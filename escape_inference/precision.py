"""Double precision for inference, and the same rounding everywhere, without touching the settings of the user's own code."""

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import jax
from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
R = TypeVar("R")


class _OneThread:
    """NumPy's linear algebra in one thread while somebody is inside.

    Several add in another order, and a chain makes of a last digit another chain: the same seed would give other draws in
    a process that has another number of processors. The limit holds for the whole process, hence the count.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._limit = ThreadpoolController().limit(limits=1, user_api="blas")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


ONE_THREAD = _OneThread()


def float64(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with JAX in double precision and NumPy in one thread, and leave the global settings alone.

    >>> import jax.numpy as jnp
    >>> float64(lambda: jnp.ones(1).dtype)()
    dtype('float64')
    >>> jnp.ones(1).dtype
    dtype('float32')
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with ONE_THREAD, jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapper
