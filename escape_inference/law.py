"""What a law is: priors, a temperature and a log escape rate; and how laws are found.

A law lives in one file of ``escape_inference.models`` (the folder ``models/`` of the repository) as a constant ``LAW``. A law of
your own can be a path to such a file or a :class:`Law` object; it needs no registration.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float
from numpyro import distributions as dist

from escape_inference.errors import InputError
from escape_inference.passage import log_leading_rate, log_mean_passage_rate, overshoot_ratio

Values = Mapping[str, Float[Array, "..."]]
BUILT_IN_ORDER = ("power_law", "arrhenius", "arrhenius_anisotropic", "noise_exponent", "constant_rate")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Setting:
    """The settings of some conditions that share one kind of barrier and one kind of start, as a law sees them.

    Every array has shape ``[condition]``; a quantity that was not measured, or was measured with an error, is a latent
    variable of the model and arrives here with its current value.
    """

    learning_rate: Float[Array, " condition"]  #: η, time per iteration
    batch_size: Float[Array, " condition"]  #: B
    check_interval: Float[Array, " condition"]  #: iterations between two looks at the loss
    loss_minimum: Float[Array, " condition"]  #: L*, loss
    log_barrier: Float[Array, " condition"]  #: ΔU = log(L^s / L*)
    hessian_minimum: Float[Array, " condition"]  #: h*, 1/time
    hessian_saddle: Float[Array, " condition"]  #: h^s, 1/time (saddles only)
    barrier: Literal["saddle", "threshold"] = field(metadata={"static": True}, default="saddle")
    start: Literal["minimum", "quasi_stationary"] = field(metadata={"static": True}, default="minimum")
    passage: Any = None  #: takes the place of the exact threshold laws, as a function of (T, c, n, q)

    @property
    def loss_gap(self) -> Float[Array, " condition"]:
        """ΔL = L^s − L*, in units of the loss."""
        return self.loss_minimum * jnp.expm1(self.log_barrier)

    @property
    def diffusion_scale(self) -> Float[Array, " condition"]:
        """η h* / B, the temperature of the power law before any scale."""
        return self.learning_rate * self.hessian_minimum / self.batch_size


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law with its prior: log-normal if positive, else normal.

    Args:
        name: name of the site, as it appears in every output.
        median: median of the prior; a number, or a function of the conditions' table (settings only, never the escapes).
        width: prior standard deviation, of the natural logarithm if ``positive``.
        reason: one sentence on why this prior.
        positive: log-normal instead of normal.
        theory: the value that the theory behind the law gives, if it gives one.
        unit: unit of the parameter.
        barriers: the kinds of barrier for which the law uses the parameter.
    """

    name: str
    median: float | Callable[[pd.DataFrame], float]
    width: float
    reason: str
    positive: bool = True
    theory: float | None = None
    unit: str = "1"
    barriers: tuple[str, ...] = ("saddle", "threshold")

    def median_for(self, frame: pd.DataFrame) -> float:
        """The prior's median for this table of conditions."""
        return float(self.median(frame)) if callable(self.median) else float(self.median)

    def prior(self, median: Float[Array, ""], width: Float[Array, ""] | float = 1.0) -> dist.Distribution:
        """The prior, with its standard deviation multiplied by ``width``."""
        if self.positive:
            return dist.LogNormal(jnp.log(median), self.width * width)
        return dist.Normal(median, self.width * width)


@dataclass(frozen=True)
class Law:
    """A hypothesis on the escape rate.

    Args:
        name: name in commands and files.
        title: a few words for tables and plots.
        source: where the law comes from.
        parameters: its parameters; ``log_prefactor`` and ``discrepancy`` are added to every law.
        log_rate: ``log_rate(values, setting) -> [condition]``, natural log of the rate κ per unit time.
        temperature: ``temperature(values, setting) -> [condition]``, the dimensionless temperature at the minimum.
        barriers: the kinds of barrier to which the law applies.
        special_cases: names of the laws that this one contains as special cases.
        points: values of normal parameters whose Bayes factor against the whole family is computed, as ``(name, value)``.
        equation: formula of the rate κ, as it stands in the docstring, for the attributes of posterior files.
        temperature_equation: the same of the temperature.
    """

    name: str
    title: str
    source: str
    parameters: tuple[Parameter, ...]
    log_rate: Callable[[Values, Setting], Float[Array, " condition"]]
    temperature: Callable[[Values, Setting], Float[Array, " condition"]]
    barriers: tuple[str, ...] = ("saddle", "threshold")
    special_cases: tuple[str, ...] = ()
    points: tuple[tuple[str, float], ...] = ()
    equation: str = ""
    temperature_equation: str = ""

    def __post_init__(self) -> None:
        names = [p.name for p in self.parameters]
        if not self.name.isidentifier():
            raise InputError(f"a law's name must be a Python identifier, not {self.name!r}")
        if len(set(names)) < len(names) or {"log_prefactor", "discrepancy"} & set(names):
            raise InputError(
                f"law {self.name}: parameter names must be unique and not log_prefactor or discrepancy: {names}"
            )

    def parameters_for(self, barriers: set[str]) -> tuple[Parameter, ...]:
        """The parameters that the law uses for these kinds of barrier."""
        return tuple(p for p in self.parameters if barriers & set(p.barriers))


def kramers_log_prefactor(setting: Setting) -> Float[Array, " condition"]:
    """``½ log(h* h^s) − log 2π``, the attempt rate of a passage over a saddle (Mori et al. 2022)."""
    return 0.5 * jnp.log(setting.hessian_minimum * setting.hessian_saddle) - jnp.log(2 * jnp.pi)


def threshold_log_rate(
    setting: Setting,
    temperature: Float[Array, " condition"],
    dimension: Float[Array, "..."],
    noise_exponent: Float[Array, "..."] | float,
) -> Float[Array, " condition"]:
    """Log rate at which the loss of an isotropic well of that dimension first exceeds the threshold.

    The noise grows as the loss to the power ``noise_exponent`` and has that ``temperature`` at the minimum. The rate is the
    inverse mean passage time for runs that start at the minimum and the leading eigenvalue of the killed diffusion for runs
    in the quasi-stationary state; looks at discrete iterations are allowed for.
    """
    ratio = overshoot_ratio(
        jnp.exp(setting.log_barrier),
        temperature,
        noise_exponent,
        setting.learning_rate * setting.hessian_minimum,
        setting.check_interval,
    )
    if setting.passage is not None:
        return jnp.log(setting.hessian_minimum) + setting.passage(temperature, ratio, dimension, noise_exponent)
    shape = jnp.shape(ratio)
    n, q = jnp.broadcast_to(dimension, shape), jnp.broadcast_to(noise_exponent, shape)
    law = log_leading_rate if setting.start == "quasi_stationary" else log_mean_passage_rate
    return jnp.log(setting.hessian_minimum) + law(temperature, ratio, n, q)


def typical_noise_strength(frame: pd.DataFrame) -> float:
    """Geometric mean of ``h* sqrt(L* L^s)`` over the conditions: the noise of the power law half-way up a typical barrier."""
    return _geometric_mean(frame, lambda part: np.log(part["hessian_minimum"]) + _log_loss(part))


def typical_loss(frame: pd.DataFrame) -> float:
    """Geometric mean of ``sqrt(L* L^s)`` over the conditions."""
    return _geometric_mean(frame, _log_loss)


def _log_loss(frame: pd.DataFrame) -> Any:
    return 0.5 * np.log(frame["loss_minimum"] * frame["loss_barrier"])


def _geometric_mean(frame: pd.DataFrame, log: Callable[[pd.DataFrame], Any]) -> float:
    """Over the conditions where all is measured, or else over all, with the centres of the priors for what is not.

    These are those of the model: L* a factor e below L^s (1 if neither is known) and h* the typical one. They follow the units.
    """
    logs = log(frame).dropna()
    if logs.empty:
        low = frame["loss_minimum"].fillna(frame["loss_barrier"] / np.e).fillna(1.0)
        high, curvature = (
            frame["loss_barrier"].fillna(low * np.e),
            frame["hessian_minimum"].fillna(typical_curvature(frame)),
        )
        logs = log(frame.assign(loss_minimum=low, loss_barrier=high, hessian_minimum=curvature))
    return float(np.exp(logs.mean()))


def typical_curvature(frame: pd.DataFrame) -> float:
    """Geometric mean of h* over the conditions."""
    logs = np.log(frame["hessian_minimum"].dropna())
    return float(np.exp(logs.mean())) if len(logs) else 0.2 / float(frame["learning_rate"].median())


def built_in_laws() -> dict[str, Law]:
    """Every law in the folder ``models/``, by name.

    >>> "power_law" in built_in_laws()
    True
    """
    package = importlib.import_module("escape_inference.models")
    laws: dict[str, Law] = {}
    for info in pkgutil.iter_modules(package.__path__):
        law = _law_of(importlib.import_module(f"escape_inference.models.{info.name}"), f"models/{info.name}.py")
        if law.name in laws:
            raise InputError(f"models/{info.name}.py: the name {law.name!r} is taken by another law")
        laws[law.name] = law
    known = [name for name in BUILT_IN_ORDER if name in laws]
    return {name: laws[name] for name in known + sorted(set(laws) - set(known))}


def load_law(law: "str | Path | Law") -> Law:
    """A law from its name, from the path of a file with a constant ``LAW``, or from the object itself.

    Raises:
        InputError: no such law (the message lists those there are), no such file, or a file without a ``LAW``.

    >>> load_law("power_law").name
    'power_law'
    """
    if isinstance(law, Law):
        return law
    if str(law).endswith(".py"):
        path = Path(law)
        if not path.is_file():
            raise InputError(f"{path}: there is no such law file")
        return _law_in_file(path.resolve(), path.stat().st_mtime_ns)
    laws = built_in_laws()
    if law not in laws:
        raise InputError(
            f"there is no law {str(law)!r}; choose from {', '.join(laws)}, or give the path of a law's .py file"
        )
    return laws[str(law)]


@lru_cache(maxsize=32)
def _law_in_file(path: Path, _changed: int) -> Law:
    """The law of a file, the same object as long as the file is unchanged, so that a second fit compiles nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: the law file cannot be run: {type(error).__name__}: {error}") from error
    return _law_of(module, str(path))


def load_laws(laws: "Sequence[str | Path | Law]") -> list[Law]:
    """Several laws at once, with distinct names."""
    loaded = [load_law(law) for law in laws]
    names = [law.name for law in loaded]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"each law can be compared once; given more than once: {', '.join(doubled)}")
    return loaded


def _law_of(module: ModuleType, where: str) -> Law:
    law = getattr(module, "LAW", None)
    if not isinstance(law, Law):
        raise InputError(f"{where}: a law file must define a constant LAW of type escape_inference.Law")
    return law
