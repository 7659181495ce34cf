"""Work in the background: programs compiled before they are needed, and tasks side by side that stop at Ctrl-C."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from escape_inference.precision import float64

Item = TypeVar("Item")
Result = TypeVar("Result")
_COMPILERS = ThreadPoolExecutor(2, thread_name_prefix="compile")


class Ahead:
    """A jitted function that can be compiled in the background for arguments of the shapes that it will get.

    >>> power = Ahead(jax.jit(lambda x, degree: x**degree, static_argnames="degree"))
    >>> power.prepare(np.zeros(3, np.float32), degree=2)
    >>> power(np.arange(3, dtype=np.float32), degree=2).tolist()
    [0.0, 1.0, 4.0]
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self._programs: dict[Any, Future] = {}

    def prepare(self, *arguments: Any, **static: Any) -> None:
        """Start compiling for arrays like these."""
        shapes = jax.tree.map(_shape, arguments)
        key = _key(arguments, static)
        if key not in self._programs:
            with_precision = float64(self._compile) if jax.config.values["jax_enable_x64"] else self._compile
            self._programs[key] = _COMPILERS.submit(with_precision, shapes, static)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """The function's value; waits for the program if it is being compiled."""
        program = self._programs.get(_key(arguments, static))
        if program is None:
            return self.jitted(*arguments, **static)
        return program.result()(*jax.tree.map(_as_array, arguments))

    def _compile(self, shapes: Any, static: dict[str, Any]) -> Any:
        return self.jitted.lower(*shapes, **static).compile()


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """``function`` of every item, in threads; an interruption or an error does not wait for the others."""
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _key(arguments: Any, static: dict[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((x.shape, x.dtype) for x in map(_shape, leaves)), tuple(sorted(static.items()))


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    array = np.asarray(value)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _as_array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else np.asarray(value)
