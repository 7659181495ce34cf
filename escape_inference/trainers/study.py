"""The TOML file that describes a measuring campaign, with its grids written out.

A study names data and a network, how to train the minima, and under which conditions to time the escapes from each::

    seed = 0
    [data]
    name = "mnist_two_class"           # other keys are options of that data set; my_module:my_data works too
    [network]
    name = "multilayer_perceptron"     # other keys are options of that network; my_module:my_network works too
    widths = [100, 100, 100]
    [hessian]
    eigenvalues = 5
    [[minima]]
    label = "lr{learning_rate}_b{batch_size}"
    learning_rate = [0.1, 0.02]        # a list is a grid: every combination is one minimum
    batch_size = [10, 100]
    steps = 10000
    [[escape]]
    learning_rate = [0.05, 0.06]       # every combination is one condition, for every minimum
    batch_size = 8
    threshold = [2.0, 3.0]             # c: a run has escaped when the full-batch loss exceeds c times L*
    replicas = 24
    steps = 3000

Instead of ``learning_rate``, an ``[[escape]]`` may give ``temperature`` T: then η = T B/h* at each minimum, to three
digits. ``data`` inside ``[[minima]]`` overrides options of ``[data]`` (a list is a grid there too). Everything random
is derived from what a piece of the study *is* (its values and the seed), never from where it stands in the file or when
it runs.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from escape_inference.errors import InputError
from escape_inference.trainers.schema import EscapeSection, MinimaSection, StudyFile, read_file


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
class Study:
    """A checked study with its grids written out.

    Attributes:
        path: the file.
        file: its sections.
        minima: every minimum; labels and contents are unique.
        conditions: every condition, in the order of the file, minimum by minimum within a section; contents are unique.
    """

    path: Path
    file: StudyFile
    minima: list[MinimumSpec]
    conditions: list[ConditionSpec]

    @property
    def identity(self) -> str:
        """Fingerprint of all that a campaign measures; comments, layout and title are no part of it."""
        return fingerprint(
            {
                "minima": [[spec.label, spec.content] for spec in self.minima],
                "conditions": [spec.content for spec in self.conditions],
            }
        )


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


def read_study(path: str | Path, *, seed: int | None = None) -> Study:
    """Read a study, check every key, and write its grids out.

    Args:
        path: the TOML file.
        seed: takes the place of the study's own seed.

    Raises:
        InputError: the file cannot be read, is not TOML, or breaks a rule; a line for each slip that names the file,
            the section, the key and what is allowed.
    """
    path = Path(path)
    file = read_file(path, seed=seed)
    try:
        minima = [spec for section in file.minima for spec in _minima(file, section)]
        labels: set[str] = set()
        contents: dict[str, str] = {}
        for spec in minima:
            if spec.identity in contents:
                raise InputError(f"[[minima]]: {contents[spec.identity]} and {spec.label} are the same minimum twice")
            if spec.label in labels:
                remedy = 'name what differs, for example label = "lr{learning_rate}_b{batch_size}_s{seed}"'
                raise InputError(f"[[minima]]: two minima have the label {spec.label}; {remedy}")
            contents[spec.identity] = spec.label
            labels.add(spec.label)
        conditions = [spec for place, part in enumerate(file.escape) for spec in _conditions(part, place, minima)]
        seen: set[str] = set()
        for condition in conditions:
            if condition.identity in seen:
                raise InputError(f"[[escape]]: this condition occurs twice: {describe(condition)}")
            seen.add(condition.identity)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Study(path, file, minima, conditions)


def describe(condition: ConditionSpec) -> str:
    """Return a readable name, such as ``m1 η=0.05 B=8 c=2 quasi_stationary``."""
    given = f"η={condition.learning_rate:g}" if condition.learning_rate is not None else f"T={condition.temperature:g}"
    return f"{condition.minimum.label} {given} B={condition.batch_size} c={condition.threshold:g} {condition.start}"


def _grid(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every combination, the last key turning fastest."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _minima(file: StudyFile, section: MinimaSection) -> Iterator[MinimumSpec]:
    overrides = {key: value if isinstance(value, list) else [value] for key, value in section.data.items()}
    empty = [key for key, values in overrides.items() if not values]
    if empty:
        raise InputError(f"[[minima]]: data = {{ {empty[0]} = [] }} leaves nothing to train on")
    for options in _grid(overrides):
        data_options = file.data.options | options
        for point in _grid({key: getattr(section, key) for key in ("learning_rate", "batch_size", "steps", "seed")}):
            try:
                label = section.label.format(**data_options | point)
            except (KeyError, IndexError, ValueError) as error:
                known = ", ".join(data_options | point)
                raise InputError(f"[[minima]]: label = {section.label!r} can use {{...}} of: {known}") from error
            settings = {key: point[key] for key in ("learning_rate", "batch_size", "steps")} | {
                "with_replacement": section.with_replacement,
                "polish_steps": section.polish_steps,
                "polish_learning_rate": section.polish_learning_rate,
            }
            content = {
                "study_seed": file.seed,
                "loss": file.loss,
                "data": {"name": file.data.name, **data_options},
                "network": {"name": file.network.name, **file.network.options},
                "hessian": file.hessian.model_dump(),
                "seed": point["seed"],
                **settings,
            }
            yield MinimumSpec(label, settings, data_options, content)


def _conditions(section: EscapeSection, place: int, minima: Sequence[MinimumSpec]) -> Iterator[ConditionSpec]:
    for pattern in section.minima:
        if not any(fnmatchcase(spec.label, pattern) for spec in minima):
            labels = ", ".join(spec.label for spec in minima[:20])
            raise InputError(f"[[escape]] number {place + 1}: minima = {pattern!r} matches none of: {labels}")
    chosen = [spec for spec in minima if any(fnmatchcase(spec.label, pattern) for pattern in section.minima)]
    settings = section.model_dump(
        include={"replicas", "steps", "check_interval", "with_replacement", "burn_in", "looks"}
    )
    choices: dict[str, Sequence[Any]] = {
        "learning_rate": section.learning_rate or [None],
        "temperature": section.temperature or [None],
        "batch_size": section.batch_size,
        "threshold": section.threshold,
        "start": section.start,
    }
    for minimum in chosen:
        for point in _grid(choices):
            yield ConditionSpec(
                minimum, **point, settings=settings, content={"minimum": minimum.content, **point, **settings}
            )
