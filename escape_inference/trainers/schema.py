"""The sections of a study file: which keys there are, what they may hold, and what to say about the rest."""

import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from escape_inference.errors import InputError

Item = TypeVar("Item")
OneOrMany = Annotated[
    list[Item], BeforeValidator(lambda value: value if isinstance(value, list) else [value]), Field(min_length=1)
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Bounds = Annotated[list[Positive], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0, lt=2**63)]


FEW, MANY = 5, 30
"""Eigenvalues that are computed for h*, and for the number of outliers, which only the bulk below them tells."""


class Section(BaseModel):
    """A table of the file: no key but those named here, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class NamedSection(BaseModel):
    """``[data]`` or ``[network]``: a name, and options that the data set or network itself checks."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Every key but the name."""
        return dict(self.model_extra or {})


class OptimizerSection(NamedSection):
    """``optimizer = { name = "sgd", momentum = 0.9 }``: the others are options of the optimiser, which checks them."""


class HessianSection(Section):
    """``[hessian]``: what is measured at each minimum besides its loss."""

    eigenvalues: Count | None = None
    """how many of the largest eigenvalues; by default 5, and 30 where outliers are to be counted"""
    subsample: Annotated[int, Field(ge=2)] | None = None
    """use so many random samples instead of all"""
    effective_dimension: Literal["unknown", "parameters", "outliers"] = "unknown"
    """n in the table: left out, the number of parameters, or the number of outliers with its error"""
    gauss_newton: bool = False
    """the eigenvalues of the Gauss-Newton part, too"""
    density_probes: WholeNumber = 0
    """random vectors for the density of the whole spectrum; 0: none"""
    density_iterations: Count = 60
    """Lanczos iterations for each of them"""
    escape_direction: Literal["top", "saddle"] = "top"
    """h* in the table: the largest eigenvalue, or the curvature towards the saddle of [[saddles]]"""

    @property
    def wanted(self) -> int:
        """How many eigenvalues: as given; else few for h* alone, and more where outliers are to be counted."""
        return self.eigenvalues or (MANY if self.effective_dimension == "outliers" else FEW)

    @property
    def content(self) -> dict[str, Any]:
        """What a minimum's spectrum depends on; options that are not used leave it as if they did not exist."""
        optional = {"gauss_newton", "density_probes", "density_iterations"}
        used = self.model_dump(include=optional, exclude_defaults=True)
        return self.model_dump(exclude=optional | {"escape_direction"}) | {"eigenvalues": self.wanted} | used


class MinimaSection(Section):
    """``[[minima]]``: a grid of training runs."""

    label: Annotated[str, Field(min_length=1)] = "lr{learning_rate}_b{batch_size}_s{seed}"
    """name of each minimum; {learning_rate}, {batch_size}, {steps}, {seed} and options of the data are filled in"""
    learning_rate: OneOrMany[Positive]
    """η of the training"""
    batch_size: OneOrMany[Count]
    """B of the training"""
    steps: OneOrMany[Count]
    """SGD iterations"""
    seed: OneOrMany[WholeNumber] = [0]
    """of initial parameters and batches"""
    with_replacement: bool = True
    """draw every batch anew; false: go through the data in epochs"""
    optimizer: OptimizerSection | None = None
    """in place of plain SGD: a name of optax or my_module:my_optimizer, with options"""
    polish_steps: WholeNumber = 0
    """most iterations of full-batch gradient descent afterwards"""
    polish_learning_rate: Positive | None = None
    """their learning rate; by default that of the training"""
    data: dict[str, Any] = {}
    """options of [data] that differ for these minima"""


class EscapeSection(Section):
    """``[[escape]]``: a grid of conditions, for every minimum named."""

    minima: OneOrMany[str] = ["*"]
    """labels, or patterns with *"""
    learning_rate: OneOrMany[Positive] | None = None
    """η; or"""
    temperature: OneOrMany[Positive] | None = None
    """η h*/B, from which η follows at each minimum"""
    batch_size: OneOrMany[Count]
    """B"""
    threshold: OneOrMany[AboveOne]
    """c: a run has escaped when the full-batch loss exceeds c L*"""
    replicas: Annotated[int, Field(ge=2)]
    """runs side by side"""
    steps: Count
    """iterations of each, after the burn-in"""
    start: OneOrMany[Literal["quasi_stationary", "minimum"]] = ["quasi_stationary"]
    """where the clock starts"""
    check_interval: Count = 1
    """iterations between two looks at the loss"""
    with_replacement: bool = True
    """draw every batch anew; false: go through the data in epochs"""
    optimizer: OptimizerSection | None = None
    """in place of plain SGD, as in [[minima]]"""
    burn_in: Annotated[list[WholeNumber], Field(min_length=2, max_length=2)] | None = None
    """[least, most] iterations before the clock starts; by default [steps/4, steps]"""
    looks: Literal["auto", "exact", "screened"] = "auto"
    """full loss at every look (exact), behind cheap estimates (screened), or whichever costs less"""
    follow_steps: WholeNumber = 0
    """follow each run that escaped for so long; the column afterwards says whether it returned or stayed"""

    @model_validator(mode="after")
    def _consistent(self) -> "EscapeSection":
        if (self.learning_rate is None) == (self.temperature is None):
            raise ValueError("give either learning_rate or temperature (η h*/B, from which η follows), and not both")
        if self.burn_in is not None and self.burn_in[0] > self.burn_in[1]:
            raise ValueError(f"burn_in = {self.burn_in} must be [minimum, maximum]")
        if self.check_interval > self.steps:
            raise ValueError(f"check_interval = {self.check_interval} is longer than steps = {self.steps}")
        if self.looks == "screened" and self.check_interval != 1:
            raise ValueError("looks = 'screened' looks at every iteration: leave check_interval out")
        return self


class RampSection(Section):
    """``[[ramps]]``: the learning rate raised level by level, for every minimum named."""

    minima: OneOrMany[str] = ["*"]
    """labels, or patterns with *"""
    learning_rate: Bounds | None = None
    """[lowest, highest] η; or"""
    relative: Bounds | None = None
    """the same over 2/h* of each minimum"""
    levels: Annotated[int, Field(ge=2)]
    """how many learning rates"""
    spacing: Literal["geometric", "linear"] = "geometric"
    """of the levels"""
    steps_per_level: Count
    """iterations at each"""
    batch_size: OneOrMany[Count]
    """B"""
    threshold: OneOrMany[AboveOne] | None = None
    """a run has jumped above so many L*; or"""
    jump_factor: OneOrMany[AboveOne] | None = None
    """above so many times the running loss"""
    runs: Count
    """ramps side by side, each with random numbers of its own"""
    check_interval: Count = 1
    """iterations between two looks; divides steps_per_level"""
    with_replacement: bool = True
    """draw every batch anew; false: go through the data in epochs"""
    optimizer: OptimizerSection | None = None
    """in place of plain SGD, as in [[minima]]"""

    @model_validator(mode="after")
    def _consistent(self) -> "RampSection":
        if (self.learning_rate is None) == (self.relative is None):
            raise ValueError("give either learning_rate = [lowest, highest] or relative (the same over 2/h*)")
        low, high = self.learning_rate or self.relative or [0, 0]
        if not low < high:
            raise ValueError(f"learning rates must be [lowest, highest], got [{low:g}, {high:g}]")
        if (self.threshold is None) == (self.jump_factor is None):
            raise ValueError(
                "give either threshold (the loss of a jump over L*) or jump_factor (over the running loss)"
            )
        if self.steps_per_level % self.check_interval:
            raise ValueError(
                f"check_interval = {self.check_interval} must divide steps_per_level = {self.steps_per_level}"
            )
        return self


class SaddleSection(Section):
    """``[[saddles]]``: the lowest saddle by which SGD leaves each minimum named, and escape times over it."""

    minima: OneOrMany[str] = ["*"]
    """labels, or patterns with *"""
    search_learning_rate: OneOrMany[Positive] | None = None
    """η of runs that are to leave the minimum; or"""
    search_temperature: OneOrMany[Positive] | None = None
    """their η h*/B"""
    search_batch_size: Count | None = None
    """their B; by default the smallest of batch_size"""
    search_runs: Count = 16
    """runs at each"""
    search_steps: Count = 5000
    """most iterations of each"""
    threshold: AboveOne = 10.0
    """they stop above so many L*"""
    descent_steps: Count = 20_000
    """most iterations of the descents from where they stopped"""
    candidates: Count = 4
    """most minima to which a saddle is sought"""
    images: Annotated[int, Field(ge=3)] = 15
    """points of the path between two minima"""
    path_iterations: Count = 300
    """descents of the path"""
    refine_iterations: Count = 100
    """most steps from its top to the saddle"""
    gradient_norm: Positive = 1e-4
    """below which a minimum or a saddle is reached"""
    learning_rate: OneOrMany[Positive] | None = None
    """η of the escapes that are timed; or"""
    temperature: OneOrMany[Positive] | None = None
    """their η h*/B; or"""
    barrier_over_temperature: OneOrMany[Positive] | None = None
    """log(L^s/L*) over that"""
    batch_size: OneOrMany[Count]
    """their B"""
    replicas: Annotated[int, Field(ge=2)]
    """runs side by side"""
    steps: Count
    """iterations of each, after the burn-in"""
    check_interval: Count = 100
    """iterations between two looks at which side of the saddle a run is"""
    look_steps: Count = 500
    """most iterations of the descent that tells"""
    start: OneOrMany[Literal["quasi_stationary", "minimum"]] = ["quasi_stationary"]
    """where the clock starts"""
    with_replacement: bool = True
    """draw every batch anew; false: go through the data in epochs"""
    optimizer: OptimizerSection | None = None
    """in place of plain SGD, as in [[minima]]"""
    burn_in: Annotated[list[WholeNumber], Field(min_length=2, max_length=2)] | None = None
    """[least, most] iterations before the clock starts; by default [steps/4, steps]"""

    @model_validator(mode="after")
    def _consistent(self) -> "SaddleSection":
        if (self.search_learning_rate is None) == (self.search_temperature is None):
            raise ValueError("give either search_learning_rate or search_temperature (η h*/B), and not both")
        given = [self.learning_rate, self.temperature, self.barrier_over_temperature]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "give one of learning_rate, temperature (η h*/B) or barrier_over_temperature (log(L^s/L*) over that)"
            )
        if self.burn_in is not None and self.burn_in[0] > self.burn_in[1]:
            raise ValueError(f"burn_in = {self.burn_in} must be [minimum, maximum]")
        if self.check_interval > self.steps:
            raise ValueError(f"check_interval = {self.check_interval} is longer than steps = {self.steps}")
        return self


class StudyFile(Section):
    """The whole file."""

    title: str = ""
    """in words"""
    seed: WholeNumber = 0
    """of everything random"""
    loss: str = "mean_square"
    """mean_square, logistic, cross_entropy, or my_module:my_loss, a function (prediction, target) of one sample"""
    data: NamedSection
    """name: mnist_two_class, linear_regression, or my_module:my_data, a function that returns (inputs, targets)"""
    network: NamedSection
    """name: multilayer_perceptron, convolutional, linear, or my_module:my_network: (init, apply), equinox or flax"""
    hessian: HessianSection = HessianSection()
    minima: Annotated[list[MinimaSection], Field(min_length=1)]
    escape: list[EscapeSection] = []
    ramps: list[RampSection] = []
    saddles: list[SaddleSection] = []

    @model_validator(mode="after")
    def _measures(self) -> "StudyFile":
        if not (self.escape or self.ramps or self.saddles):
            raise ValueError("the study measures nothing: write at least one [[escape]] or [[ramps]] or [[saddles]]")
        if self.hessian.escape_direction == "saddle" and not self.saddles:
            raise ValueError("[hessian]: escape_direction = 'saddle' needs a [[saddles]] section")
        return self


PAIRS = {
    "learning_rate": "a pair, [lowest, highest]",
    "relative": "a pair, [lowest, highest]",
    "burn_in": "a pair, [minimum, maximum]",
}
"""What the keys expect that hold two numbers."""
SECTIONS: dict[str, type[BaseModel]] = {
    "data": NamedSection,
    "network": NamedSection,
    "hessian": HessianSection,
    "minima": MinimaSection,
    "escape": EscapeSection,
    "ramps": RampSection,
    "saddles": SaddleSection,
}


def read_file(path: Path, *, seed: int | None = None) -> StudyFile:
    """Read and validate a study file; ``seed`` takes the place of the file's own.

    Raises:
        InputError: the file cannot be read, is not TOML, or breaks a rule; a line for each slip that names the file,
            the section, the key and what is allowed.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the study: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the study is not a text file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    try:
        return StudyFile.model_validate(raw if seed is None else raw | {"seed": seed})
    except ValidationError as error:
        lines = dict.fromkeys(explain(dict(slip), raw) for slip in error.errors())
        raise InputError("\n".join(f"{path}: {line}" for line in lines)) from error


def keys_text() -> str:
    """Every key that a study may hold, section by section, with what it may be and what it means.

    >>> print(keys_text().splitlines()[3])
      seed = 0                        of everything random
    """
    lines = ["Keys of a study; those without a value must be given, and lists of values are grids.", ""]
    sections: dict[str, type[BaseModel]] = {"": StudyFile, **SECTIONS}
    for section, model in sections.items():
        if section in ("data", "network"):
            continue
        double = section in ("minima", "escape", "ramps", "saddles")
        lines += ["", f"[[{section}]]" if double else f"[{section}]"] if section else []
        for name, field in model.model_fields.items():
            if not section and name in SECTIONS and not field.description:
                continue
            shown = name if field.is_required() else _shown(name, field.default)
            lines.append(f"  {shown:31} {field.description}{_choices(field.annotation)}")
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if value is None or value == {}:
        return f"{name} (optional)"
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return f"{name} = {json.dumps(value)}"


def _choices(annotation: Any) -> str:
    """The words that a key may hold, if only some may."""
    if get_origin(annotation) is Literal:
        return f" ({', '.join(get_args(annotation))})"
    return next((found for inner in get_args(annotation) if (found := _choices(inner))), "")


def explain(slip: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """Return one line about one slip that pydantic found in the parsed file ``raw``.

    >>> slip = {"type": "extra_forbidden", "loc": ("escape", 0, "replica"), "msg": "", "input": 3}
    >>> explain(slip, {"escape": [{"replica": 3}]})[:71]
    '[[escape]] number 1: unknown key replica (did you mean replicas?); allo'
    """
    place = list(slip["loc"])
    section = str(place[0]) if place and place[0] in SECTIONS else ""
    inside = place[1:] if section else place
    prefix = ""
    if section and inside and isinstance(inside[0], int):
        prefix = f"[[{section}]] number {inside[0] + 1}: "
        inside = inside[1:]
    elif section:
        double = section in ("minima", "escape", "ramps", "saddles")
        prefix = f"[[{section}]]: " if double else f"[{section}]: "
    key = next((str(part) for part in inside if isinstance(part, str)), "")
    value = slip.get("input")
    if slip["type"] == "extra_forbidden":
        allowed = list((SECTIONS[section] if section else StudyFile).model_fields)
        close = get_close_matches(key, allowed, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{prefix}unknown key {key}{hint}; allowed: {', '.join(allowed)}"
    if slip["type"] == "missing":
        return f"{prefix}{key or 'this section'} is required"
    message = str(slip["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if slip["type"] == "model_type" and key == "optimizer":
        message = 'a table such as { name = "sgd", momentum = 0.9 }'
    elif slip["type"] in ("list_type", "too_short", "too_long") and key in PAIRS:
        message = PAIRS[key]
    if slip["type"] == "list_type" and not key:
        return f"{prefix}write this section with double brackets, [[{section}]], once for each grid"
    if not key:
        return f"{prefix}{message}" if slip["type"] == "value_error" else f"{prefix}must be {message}, got {value!r}"
    return f"{prefix}{key} = {value!r}: must be {message}"
