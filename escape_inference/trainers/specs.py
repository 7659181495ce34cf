"""One piece of a study each: a minimum to train, a condition to time, a ramp, a saddle; and what it is known by."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from escape_inference.trainers.ramp_record import learning_rate_levels


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON-able value, whatever the order of its keys.

    >>> fingerprint({"a": 1, "b": 2.5}) == fingerprint({"b": 2.5, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def derived_seed(content: Mapping[str, Any], purpose: str) -> int:
    """Return a seed below 2³¹ that depends on the content and the purpose alone.

    >>> derived_seed({"learning_rate": 0.1}, "training")
    1719296756
    """
    return int(fingerprint({"content": dict(content), "purpose": purpose})[:8], 16) >> 1


@dataclass(frozen=True)
class MinimumSpec:
    """One minimum to train.

    Attributes:
        label: its name in the table.
        settings: arguments of the training: learning_rate, batch_size, steps, with_replacement, polish_steps,
            polish_learning_rate.
        data_options: options of the data set, complete.
        content: everything that the trained minimum depends on.
    """

    label: str
    settings: dict[str, Any]
    data_options: dict[str, Any]
    content: dict[str, Any]

    @property
    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(self.content)


@dataclass(frozen=True)
class ConditionSpec:
    """One condition to measure.

    Attributes:
        minimum: the minimum that the runs start from.
        learning_rate: η, or None when the temperature is given.
        temperature: T = η h*/B, or None when η is given.
        batch_size: B.
        threshold: c, the loss barrier over the loss minimum.
        start: ``quasi_stationary`` or ``minimum``.
        settings: other arguments of the measurement: replicas, steps, check_interval, with_replacement, burn_in, looks.
        content: everything that the measurement depends on.
    """

    minimum: MinimumSpec
    learning_rate: float | None
    temperature: float | None
    batch_size: int
    threshold: float
    start: str
    settings: dict[str, Any]
    content: dict[str, Any]

    @property
    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(self.content)

    def learning_rate_at(self, hessian_minimum: float) -> float:
        """Return η: as given, or T B/h* to three digits.

        Args:
            hessian_minimum: h* of the minimum, 1/time.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        assert self.temperature is not None
        return float(f"{self.temperature * self.batch_size / hessian_minimum:.3g}")


@dataclass(frozen=True)
class RampSpec:
    """One ramp of the learning rate to drive.

    Attributes:
        minimum: the minimum that the runs start from.
        bounds: lowest and highest η, time per iteration; or, if ``relative``, over 2/h* of the minimum.
        relative: are the bounds in units of 2/h*, where gradient descent itself becomes unstable?
        levels: how many.
        spacing: ``geometric`` or ``linear``.
        batch_size: B.
        threshold: c, the loss of a jump over the loss minimum; or None when ``jump_factor`` is given.
        jump_factor: the loss of a jump over the running loss; or None.
        settings: other arguments of the measurement: runs, steps_per_level, check_interval, with_replacement.
        content: everything that the measurement depends on.
    """

    minimum: MinimumSpec
    bounds: tuple[float, float]
    relative: bool
    levels: int
    spacing: str
    batch_size: int
    threshold: float | None
    jump_factor: float | None
    settings: dict[str, Any]
    content: dict[str, Any]

    @property
    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(self.content)

    def learning_rates_at(self, hessian_minimum: float) -> Float[ndarray, " j"]:
        """Return η of each level; ``hessian_minimum`` is h* of the minimum, 1/time."""
        unit = 2 / hessian_minimum if self.relative else 1.0
        low, high = self.bounds
        return learning_rate_levels(low * unit, high * unit, self.levels, self.spacing)


@dataclass(frozen=True)
class SaddleSpec:
    """The search for the saddles around one minimum.

    Attributes:
        minimum: the minimum that is left.
        learning_rates: η of the runs that leave it; or, if ``relative``, their temperatures T = η h*/B.
        relative: are they temperatures?
        batch_size: B of these runs.
        threshold: c: a run stops when its loss exceeds c L*.
        settings: other arguments of the search: runs, steps, descent_steps, candidates, images, path_iterations,
            refine_iterations, gradient_norm.
        content: everything that the search depends on.
    """

    minimum: MinimumSpec
    learning_rates: tuple[float, ...]
    relative: bool
    batch_size: int
    threshold: float
    settings: dict[str, Any]
    content: dict[str, Any]

    @property
    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(self.content)

    def learning_rates_at(self, hessian_minimum: float) -> list[float]:
        """Return η of the runs; ``hessian_minimum`` is h* of the minimum, 1/time."""
        unit = self.batch_size / hessian_minimum if self.relative else 1.0
        return [float(f"{value * unit:.3g}") if self.relative else value for value in self.learning_rates]


@dataclass(frozen=True)
class CrossingSpec:
    """Escape times over the lowest saddle that a search found.

    Attributes:
        saddle: the search.
        scale: what ``value`` is: ``learning_rate`` η, ``temperature`` T = η h*/B, or ``barrier_over_temperature``
            log(L^s/L*)/T.
        value: see ``scale``.
        batch_size: B.
        start: ``quasi_stationary`` or ``minimum``.
        along: is h* the curvature towards the saddle, rather than the largest eigenvalue?
        settings: other arguments of the measurement: replicas, steps, check_interval, descent_steps, with_replacement,
            burn_in.
        content: everything that the measurement depends on.
    """

    saddle: SaddleSpec
    scale: str
    value: float
    batch_size: int
    start: str
    along: bool
    settings: dict[str, Any]
    content: dict[str, Any]

    @property
    def minimum(self) -> MinimumSpec:
        """The minimum that the runs start from."""
        return self.saddle.minimum

    @property
    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(self.content)

    def learning_rate_at(self, hessian_minimum: float, ratio: float) -> float:
        """Return η: as given, or to three digits.

        Args:
            hessian_minimum: h* of the minimum, 1/time.
            ratio: L^s/L*.
        """
        if self.scale == "learning_rate":
            return self.value
        temperature = self.value if self.scale == "temperature" else math.log(ratio) / self.value
        return float(f"{temperature * self.batch_size / hessian_minimum:.3g}")


def optimizer_text(settings: Mapping[str, Any]) -> str:
    """Return the optimiser among some settings, such as ``sgd`` or ``sgd momentum=0.9``.

    >>> optimizer_text({"optimizer": {"name": "sgd", "momentum": 0.9}}), optimizer_text({})
    ('sgd momentum=0.9', 'sgd')
    """
    chosen = settings.get("optimizer") or {"name": "sgd"}
    return " ".join([chosen["name"], *(f"{key}={value}" for key, value in chosen.items() if key != "name")])


def describe(condition: "ConditionSpec | RampSpec | SaddleSpec | CrossingSpec") -> str:
    """Return a readable name, such as ``m1 η=0.05 B=8 c=2 quasi_stationary`` or ``m1 ramp B=8 c=50``.

    What is not plain SGD with replacement says so at the end.
    """
    steps = optimizer_text(condition.settings)
    unusual = [] if steps == "sgd" else [steps]
    unusual += [] if condition.settings.get("with_replacement", True) else ["without replacement"]
    return " ".join([_describe(condition), *unusual])


def _describe(condition: "ConditionSpec | RampSpec | SaddleSpec | CrossingSpec") -> str:
    if isinstance(condition, SaddleSpec):
        name = "T" if condition.relative else "η"
        given = ",".join(f"{value:g}" for value in condition.learning_rates)
        return f"{condition.minimum.label} saddles {name}={given} B={condition.batch_size} c={condition.threshold:g}"
    if isinstance(condition, CrossingSpec):
        name = {"learning_rate": "η", "temperature": "T", "barrier_over_temperature": "ΔU/T"}[condition.scale]
        given = f"{name}={condition.value:g} B={condition.batch_size}"
        return f"{condition.minimum.label} {given} saddle {condition.start}"
    if isinstance(condition, RampSpec):
        jump = f"c={condition.threshold:g}" if condition.threshold is not None else f"factor={condition.jump_factor:g}"
        unit = "·2/h*" if condition.relative else ""
        low, high = condition.bounds
        return f"{condition.minimum.label} ramp η={low:g}-{high:g}{unit} B={condition.batch_size} {jump}"
    given = f"η={condition.learning_rate:g}" if condition.learning_rate is not None else f"T={condition.temperature:g}"
    return f"{condition.minimum.label} {given} B={condition.batch_size} c={condition.threshold:g} {condition.start}"
