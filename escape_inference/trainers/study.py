"""The TOML file that describes a measuring campaign, with its grids written out.

A study names data and a network, how to train the minima, and under which conditions to time the escapes from each::

    seed = 0
    [data]
    name = "mnist_two_class"           # other keys are options of that data set; my_module:my_data works too
    [network]
    name = "multilayer_perceptron"     # other keys are options of that network; my_module:my_network works too
    widths = [100, 100, 100]
    [hessian]
    eigenvalues = 30                   # the largest ones; thirty show the bulk below the outliers
    effective_dimension = "outliers"   # n in the table: their number; or "parameters", or "unknown"
    density_probes = 8                 # random vectors for the density of the whole spectrum (default: none)
    gauss_newton = true                # its part without the network's own curvature too (default: not)
    escape_direction = "saddle"        # h* towards the saddle of [[saddles]]; "top" (default): the largest eigenvalue
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
    follow_steps = 500                 # the column afterwards: is a run that escaped back below the barrier by then? (default: 0)

    [[ramps]]
    relative = [0.05, 1.5]             # lowest and highest learning rate over 2/h*; or learning_rate = [0.005, 0.2]
    levels = 24                        # spacing = "geometric" (or "linear")
    steps_per_level = 300
    batch_size = 8
    threshold = 50.0                   # a run has jumped above 50 L*; or jump_factor, over the running loss
    runs = 8

    [[saddles]]
    search_temperature = [0.2, 0.4]    # η h*/B of runs that leave the minimum; or search_learning_rate
    threshold = 10.0                   # they stop above 10 L* (or after search_steps) and go down to where they belong
    barrier_over_temperature = [4, 6]  # log(L^s/L*)/T of the escapes timed; or learning_rate, or temperature
    batch_size = 8
    replicas = 32
    steps = 20000
    check_interval = 200               # every so many iterations descent tells which runs have crossed

``optimizer = { name = "sgd", momentum = 0.9 }`` in any of the last four takes the place of plain SGD: a name of optax
or an import path. Instead of ``learning_rate``, an ``[[escape]]`` may give ``temperature`` T: then η = T B/h* at each minimum, to three
digits. ``[[saddles]]`` looks for the lowest saddle by which each minimum is left, and times the escapes over it, in rows
whose ``barrier`` is ``saddle``. ``data`` inside ``[[minima]]`` overrides options of ``[data]`` (a list is a grid there too; in a label the
seed of the data is ``{data_seed}``). Everything random
is derived from what a piece of the study *is* (its values and the seed), never from where it stands in the file or when
it runs.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from escape_inference.errors import InputError
from escape_inference.trainers.schema import (
    EscapeSection,
    MinimaSection,
    RampSection,
    SaddleSection,
    StudyFile,
    read_file,
)
from escape_inference.trainers.specs import (
    ConditionSpec,
    CrossingSpec,
    MinimumSpec,
    RampSpec,
    SaddleSpec,
    describe,
    fingerprint,
)


@dataclass(frozen=True)
class Study:
    """A checked study with its grids written out.

    Attributes:
        path: the file.
        file: its sections.
        minima: every minimum; labels and contents are unique.
        conditions: every condition, in the order of the file, minimum by minimum within a section; contents are unique.
        ramps: every ramp, in the same order.
        saddles: every search for saddles, in the same order.
        crossings: every condition under which escapes over a saddle are timed, in the same order.
    """

    path: Path
    file: StudyFile
    minima: list[MinimumSpec]
    conditions: list[ConditionSpec]
    ramps: list[RampSpec]
    saddles: list[SaddleSpec]
    crossings: list[CrossingSpec]

    @property
    def measured(self) -> list[ConditionSpec | RampSpec | SaddleSpec | CrossingSpec]:
        """Everything but the minima, in the order in which it is measured."""
        return [*self.conditions, *self.ramps, *self.saddles, *self.crossings]

    @property
    def identity(self) -> str:
        """Fingerprint of all that a campaign measures; comments, layout and title are no part of it."""
        content: dict[str, Any] = {
            "minima": [[spec.label, spec.content] for spec in self.minima],
            "conditions": [spec.content for spec in self.conditions],
        }
        for name, specs in (("ramps", self.ramps), ("saddles", self.saddles), ("crossings", self.crossings)):
            content |= {name: [spec.content for spec in specs]} if specs else {}  # type: ignore[attr-defined]
        return fingerprint(content)


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
                remedy += "; {data_seed} is the seed of the data" if "seed" in spec.data_options else ""
                raise InputError(f"[[minima]]: two minima have the label {spec.label}; {remedy}")
            contents[spec.identity] = spec.label
            labels.add(spec.label)
        conditions = [spec for place, part in enumerate(file.escape) for spec in _conditions(part, place, minima)]
        ramps = [spec for place, part in enumerate(file.ramps) for spec in _ramps(part, place, minima)]
        _check_unique("[[escape]]: this condition", conditions)
        _check_unique("[[ramps]]: this ramp", ramps)
        crossings = [spec for place, part in enumerate(file.saddles) for spec in _crossings(file, part, place, minima)]
        _check_unique("[[saddles]]: this condition", crossings)
        saddles = list({spec.saddle.identity: spec.saddle for spec in crossings}.values())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Study(path, file, minima, conditions, ramps, saddles, crossings)


def _optimizer(section: MinimaSection | EscapeSection | RampSection | SaddleSection) -> dict[str, Any]:
    """The optimiser among the settings; nothing for plain SGD, whose studies stay what they were."""
    chosen = section.optimizer
    return {} if chosen is None else {"optimizer": {"name": chosen.name, **chosen.options}}


def _check_unique(what: str, specs: Sequence[ConditionSpec | RampSpec | CrossingSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.identity in seen:
            raise InputError(f"{what} occurs twice: {describe(spec)}")
        seen.add(spec.identity)


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
            hidden = {f"data_{key}": value for key, value in data_options.items() if key in point}
            known = data_options | hidden | point
            try:
                label = section.label.format(**known)
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                raise InputError(
                    f"[[minima]]: label = {section.label!r} can use {{...}} of: {', '.join(known)}"
                ) from error
            if not label.strip():
                raise InputError(f"[[minima]]: label = {section.label!r} gives an empty name")
            settings = (
                {key: point[key] for key in ("learning_rate", "batch_size", "steps")}
                | {
                    "with_replacement": section.with_replacement,
                    "polish_steps": section.polish_steps,
                    "polish_learning_rate": section.polish_learning_rate,
                }
                | _optimizer(section)
            )
            content = {
                "study_seed": file.seed,
                "loss": file.loss,
                "data": {"name": file.data.name, **data_options},
                "network": {"name": file.network.name, **file.network.options},
                "hessian": file.hessian.content,
                "seed": point["seed"],
                **settings,
            }
            yield MinimumSpec(label, settings, data_options, content)


def _conditions(section: EscapeSection, place: int, minima: Sequence[MinimumSpec]) -> Iterator[ConditionSpec]:
    chosen = _chosen(section.minima, minima, f"[[escape]] number {place + 1}")
    settings = section.model_dump(
        include={"replicas", "steps", "check_interval", "with_replacement", "burn_in", "looks"}
    ) | _optimizer(section)
    settings |= {"follow_steps": section.follow_steps} if section.follow_steps else {}
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


def _ramps(section: RampSection, place: int, minima: Sequence[MinimumSpec]) -> Iterator[RampSpec]:
    relative = section.learning_rate is None
    low, high = section.learning_rate or section.relative or []
    fixed: dict[str, Any] = {"bounds": (low, high), "relative": relative, "levels": section.levels}
    fixed["spacing"] = section.spacing
    settings = section.model_dump(include={"runs", "steps_per_level", "check_interval", "with_replacement"})
    settings |= _optimizer(section)
    choices: dict[str, Sequence[Any]] = {
        "batch_size": section.batch_size,
        "threshold": section.threshold or [None],
        "jump_factor": section.jump_factor or [None],
    }
    for minimum in _chosen(section.minima, minima, f"[[ramps]] number {place + 1}"):
        for point in _grid(choices):
            content = {"minimum": minimum.content, **fixed, **point, **settings}
            yield RampSpec(minimum, **fixed, **point, settings=settings, content=content)


SEARCH = ("descent_steps", "candidates", "images", "path_iterations", "refine_iterations", "gradient_norm")
SCALES = ("learning_rate", "temperature", "barrier_over_temperature")


def _crossings(
    file: StudyFile, section: SaddleSection, place: int, minima: Sequence[MinimumSpec]
) -> Iterator[CrossingSpec]:
    relative = section.search_learning_rate is None
    rates = tuple(section.search_learning_rate or section.search_temperature or [])
    search: dict[str, Any] = {
        "learning_rates": rates,
        "relative": relative,
        "batch_size": section.search_batch_size or min(section.batch_size),
        "threshold": section.threshold,
    }
    sought = {"runs": section.search_runs, "steps": section.search_steps} | section.model_dump(include=set(SEARCH))
    settings = section.model_dump(include={"replicas", "steps", "check_interval", "with_replacement", "burn_in"})
    settings |= {"descent_steps": section.look_steps} | _optimizer(section)
    scale = next(name for name in SCALES if getattr(section, name) is not None)
    choices: dict[str, Sequence[Any]] = {
        "value": getattr(section, scale),
        "batch_size": section.batch_size,
        "start": section.start,
    }
    for minimum in _chosen(section.minima, minima, f"[[saddles]] number {place + 1}"):
        content = {"minimum": minimum.content, "search": {**search, **sought}}
        saddle = SaddleSpec(minimum, **search, settings=sought, content=content)
        for point in _grid(choices):
            direction = file.hessian.escape_direction
            own = {"saddle": content, "scale": scale, "escape_direction": direction, **point, **settings}
            yield CrossingSpec(saddle, scale, **point, along=direction == "saddle", settings=settings, content=own)


def _chosen(patterns: Sequence[str], minima: Sequence[MinimumSpec], where: str) -> list[MinimumSpec]:
    """The minima whose label matches one of the patterns, each of which must match one."""
    for pattern in patterns:
        if not any(fnmatchcase(spec.label, pattern) for spec in minima):
            labels = ", ".join(spec.label for spec in minima[:20])
            raise InputError(f"{where}: minima = {pattern!r} matches none of: {labels}")
    return [spec for spec in minima if any(fnmatchcase(spec.label, pattern) for pattern in patterns)]
