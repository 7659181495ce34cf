"""Compiled programs: made in the background before they are needed, and kept on disk as traced, so that tracing is done once.

JAX keeps compiled programs on disk, but it must trace a function anew in every process to know which one is meant; for a sampler that
takes as long as the sampling. Here the traced form (``jax.export``) lies in the same folder, under a name made of everything that it
depends on: this package's source, the versions of the libraries, the shapes of the arguments, the law. Processes that need the same
program share the work: one makes it while the other makes another one.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np
from jax import export

from escape_inference.precision import float64
from escape_inference.workers import processors

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may make the same program
    fcntl = None  # type: ignore[assignment]

LIBRARIES = ("jax", "jaxlib", "numpy", "numpyro", "blackjax")
OPTIONS = {"xla_backend_optimization_level": 1}
WAIT = 0.05  #: seconds between two looks at a program that another process makes
PATIENCE = 100.0  #: seconds after which that process counts as suspended
_THREADS = ThreadPoolExecutor(len(processors()), thread_name_prefix="compile")


def random_keys(*seed: int, count: int | None = None) -> jax.Array:
    """Keys ``[count]`` of a stream of random numbers, or a single one; JAX would compile programs to make them.

    >>> random_keys(0, 1, count=3).shape, random_keys(0, 1).shape
    ((3,), ())
    """
    words = np.random.SeedSequence(seed).generate_state(2 * (count or 1))
    shaped: Any = words.reshape((2,) if count is None else (count, 2))
    return jax.random.wrap_key_data(shaped, impl="threefry2x32")


class Ahead:
    """A function that is compiled in the background for arguments of the shapes that it will get.

    Args:
        function: of pytrees of arrays, and of static keyword arguments. Those that are functions themselves have an attribute
            ``stored_as``, a text that says all about them, if the program may be kept on disk.
        static: names of the static arguments.
        options: of the compiler; the default halves the time of compilation and slows nothing here.

    >>> power = Ahead(lambda x, degree: x**degree, static=("degree",))
    >>> power.prepare(np.zeros(3, np.float32), degree=2)
    >>> power(np.arange(3, dtype=np.float32), degree=2).tolist()
    [0.0, 1.0, 4.0]
    """

    def __init__(
        self, function: Callable[..., Any], *, static: tuple[str, ...] = (), options: dict[str, Any] = OPTIONS
    ) -> None:
        self.function, self.name, self.options = function, function.__name__, options
        self.jitted = jax.jit(function, static_argnames=static, compiler_options=self.options)
        self._programs: dict[Any, Future] = {}
        self._lock = Lock()

    def prepare(self, *arguments: Any, **static: Any) -> None:
        """Start compiling for arrays like these (or shapes and types alone)."""
        self._program(arguments, static, wanted=True)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """The function's value; waits for the program if it is being compiled."""
        program = self._program(arguments, static, wanted=None not in _described(static).values())
        if program is None:  # JAX keeps it as long as its static functions live
            return self.jitted(*arguments, **static)
        leaves = jax.tree.leaves(arguments)
        return program.result()(*(x if isinstance(x, jax.Array) else np.asarray(x) for x in leaves))

    def _program(self, arguments: tuple[Any, ...], static: dict[str, Any], wanted: bool) -> Future | None:
        """The program, which is made if it is wanted and not there."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = ((x.shape, x.dtype) if hasattr(x, "dtype") else (np.shape(x), np.asarray(x).dtype) for x in leaves)
        key = structure, tuple(shapes), tuple(sorted(static.items()))
        with self._lock:
            if wanted and key not in self._programs:
                make = float64(self._make) if jax.config.read("jax_enable_x64") else self._make
                program: Future = Future()
                self._programs[key] = program
                until = time.monotonic() + PATIENCE
                _THREADS.submit(make, make, program, until, structure, tuple(map(_shape, leaves)), static)
            return self._programs.get(key)

    def _make(
        self,
        again: Callable[..., None],
        program: Future,
        until: float,
        structure: Any,
        shapes: tuple[jax.ShapeDtypeStruct, ...],
        static: dict[str, Any],
    ) -> None:
        """Make a program, unless another process makes the same one: then later, ``again``, after others that are wanted."""
        try:
            name = _stored_name(self.name, structure, shapes, static, self.options)
            with _lock_of(name) as free:
                if free or time.monotonic() > until:
                    program.set_result(self._compile(name, structure, shapes, static))
                    return
            time.sleep(WAIT)
            _THREADS.submit(again, again, program, until, structure, shapes, static)
        except BaseException as error:
            program.set_exception(error)

    def _compile(
        self, name: Path | None, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], static: dict[str, Any]
    ) -> Any:
        def flat(*leaves: Any) -> Any:
            return self.function(*jax.tree.unflatten(structure, leaves), **static)

        traced = _load(name) or _save(name, export.export(jax.jit(flat))(*shapes))
        return jax.jit(traced.call, compiler_options=self.options).lower(*shapes).compile()


def _described(static: dict[str, Any]) -> dict[str, str | None]:
    """What static arguments say of themselves; None for a function that says nothing."""
    return {k: getattr(v, "stored_as", None) if callable(v) else repr(v) for k, v in sorted(static.items())}


def _stored_name(function: str, structure: Any, shapes: Any, static: dict[str, Any], options: Any) -> Path | None:
    """Where a program is kept; None if JAX keeps none on this machine or a static argument does not say what it is."""
    folder, values = jax.config.values["jax_compilation_cache_dir"], _described(static)
    local = folder and "://" not in folder and jax.config.values["jax_enable_compilation_cache"]
    if not local or None in values.values():
        return None
    what = repr((function, str(structure), shapes, values, options, jax.config.read("jax_enable_x64"), _fingerprint()))
    return Path(folder) / "traced" / hashlib.sha256(what.encode()).hexdigest()


@lru_cache(maxsize=1)
def _fingerprint() -> str:
    """A number of this package's source, the versions of the libraries and the kind of device."""
    found = hashlib.sha256(repr((*map(version, LIBRARIES), jax.default_backend())).encode())
    for path in _sources():
        found.update(path.read_bytes())
    return found.hexdigest()


def _sources() -> list[Path]:
    """Every module of this package; the folder of the laws is a link in a checkout."""
    walk = os.walk(Path(__file__).parent, followlinks=True)
    return sorted(Path(folder) / name for folder, _, names in walk for name in names if name.endswith(".py"))


@contextmanager
def _lock_of(name: Path | None) -> Iterator[bool]:
    """Whether this program is ours to make; the system opens the lock of a process that has died."""
    if name is None or fcntl is None:
        yield True
        return
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        file = open(name.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError:  # a folder that cannot be written
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield True
        else:
            yield True


def _load(name: Path | None) -> export.Exported | None:
    if name is None:
        return None
    try:
        return export.deserialize(bytearray(name.read_bytes()))
    except Exception:  # not there, cut short or of another format: it is made again
        return None


def _save(name: Path | None, traced: export.Exported) -> export.Exported:
    """Keep a traced function, if there is room; a file is whole or absent."""
    if name is not None:
        temporary = name.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            temporary.write_bytes(traced.serialize())
            temporary.replace(name)
    return traced


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    array = np.asarray(value)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
