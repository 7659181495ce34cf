"""Run a measuring campaign: train the minima of a study, time the escapes under every condition, write the tables.

Each minimum and each condition is one part of the campaign, finished and on the disk before the next begins. A campaign
that was stopped goes on with ``resume=True``, repeats nothing, and ends with the very table that it would have had.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from escape_inference import __version__
from escape_inference.errors import InputError
from escape_inference.trainers.datasets import Dataset, import_object, load_data
from escape_inference.trainers.losses import LOSSES, check_problem, resolve_loss
from escape_inference.trainers.minimum import parameters_of
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.optimizers import check_optimizer
from escape_inference.trainers.parts import (
    Report,
    World,
    condition_part,
    crossing_part,
    minimum_part,
    ramp_part,
    saddle_part,
)
from escape_inference.trainers.screens import FEWEST
from escape_inference.trainers.sgd import make_recipe
from escape_inference.trainers.specs import CrossingSpec, MinimumSpec, RampSpec, SaddleSpec, describe, fingerprint
from escape_inference.trainers.storage import SIGN, open_campaign
from escape_inference.trainers.study import Study, read_study
from escape_inference.trainers.tables import remarks_on, write_tables

SIGNED = 64
"""Samples from which an edited network or loss is recognised."""
SECTIONS: dict[type, str] = {RampSpec: "[[ramps]]", SaddleSpec: "[[saddles]]", CrossingSpec: "[[saddles]]"}


def collect(
    study: str | Path, output: str | Path, *, resume: bool = False, seed: int | None = None, progress: bool = True
) -> Path:
    """Measure everything that a study asks for.

    Args:
        study: the TOML file, see :mod:`escape_inference.trainers.study`.
        output: folder to write; it must be new or empty unless ``resume``.
        resume: go on with a campaign that was stopped; its study, seed, data, network and loss must be unchanged.
        seed: takes the place of the study's own seed.
        progress: draw progress bars on the standard error.

    Returns:
        Path of ``measurements.parquet``, the table of all runs. Beside it: ``minima.csv``, ``spectra.csv`` (the
        eigenvalues at each minimum), ``conditions.csv`` (what each condition gave, whether it settled, unstable ones
        included) and ``trends.csv`` (rate and loss in time); and, where the study has ramps, ``ramps.csv`` (what each
        gave) and ``critical_learning_rates.parquet`` and ``.csv`` (a row for each run); and, where it looks for
        saddles, ``saddles.csv`` (all that were found, converged or not).

    Raises:
        InputError: the study, its data or network, or the output folder cannot be used; the disk is full; or no escape
            was seen under any condition. Finished parts are never lost. What could not be measured, or is doubtful, is
            said on the standard error and in the tables; the rest is measured all the same.

    The replicas start from the quasi-stationary state unless the study says otherwise (Binder, Lelièvre, Simpson, J.
    Comput. Phys. 2015).
    """
    plan, output = read_study(study, seed=seed), Path(output)
    try:
        worlds = _prepare(plan)
    except InputError as error:
        raise InputError(f"{study}: {error}") from error
    content = {
        "identity": {
            "study": plan.identity,
            "data": fingerprint({key: world.data.sha256 for key, world in worlds.items()}),
            SIGN: fingerprint({key: world.sign for key, world in worlds.items()}),
        },
        "title": plan.file.title,
        "study": plan.file.model_dump(),
        "version": __version__,
    }
    with open_campaign(output, content, resume=resume) as campaign, _progress_bars(plan, progress, output) as report:
        for spec in plan.minima:
            minimum_part(campaign, spec, worlds[_world_key(spec)], plan.file.hessian, report)
        for condition in plan.conditions:
            condition_part(campaign, condition, worlds[_world_key(condition.minimum)], report)
        for ramp in plan.ramps:
            ramp_part(campaign, ramp, worlds[_world_key(ramp.minimum)], report)
        for saddle in plan.saddles:
            saddle_part(campaign, saddle, worlds[_world_key(saddle.minimum)], report)
        for crossing in plan.crossings:
            crossing_part(campaign, crossing, worlds[_world_key(crossing.minimum)], report)
        path = write_tables(campaign, plan)
    if remarks := remarks_on(output):
        Console(stderr=True).print("\n".join(remarks), markup=False, highlight=False, soft_wrap=True)
    return path


def _world_key(spec: MinimumSpec) -> str:
    return json.dumps(spec.data_options, sort_keys=True, default=str)


def _prepare(plan: Study) -> dict[str, World]:
    """Load and check data, network and loss before anything is trained."""
    folder, file = plan.path.parent, plan.file
    is_path = ":" in file.loss
    if not is_path and file.loss not in LOSSES:
        names = ", ".join(map(repr, LOSSES))
        raise InputError(f"loss = {file.loss!r}: must be {names} or an import path my_module:my_loss")
    loss = import_object(file.loss, what="loss", folder=folder) if is_path else file.loss
    if not (callable(loss) or loss in LOSSES):
        raise InputError(
            f"loss = {file.loss!r}: is a {type(loss).__name__}, not a function (prediction, target) -> loss"
        )
    worlds: dict[str, World] = {}
    for spec in plan.minima:
        key = _world_key(spec)
        if key not in worlds:
            data = load_data(file.data.name, spec.data_options, folder=folder)
            network = load_network(file.network.name, data, file.network.options, folder=folder, same_shape=not is_path)
            worlds[key] = World(data, network, loss, folder)
            worlds[key].sign = _sign(worlds[key])
            _check_subsample(file.hessian.subsample, data)
        _check_optimizer(worlds[key], spec)
        _check_batch("[[minima]]", spec.label, spec.settings["batch_size"], worlds[key].data)
    for measured in plan.measured:
        world = worlds[_world_key(measured.minimum)]
        _check_optimizer(world, measured)
        section = SECTIONS.get(type(measured), "[[escape]]")
        _check_batch(section, describe(measured), measured.batch_size, world.data)
        if measured.settings.get("looks") == "screened" and world.data.samples < FEWEST:
            raise InputError(
                f"{section}: {describe(measured)}: looks = 'screened' needs at least {FEWEST} samples, the data have "
                f"{world.data.samples}; leave it out"
            )
    return worlds


def _sign(world: World) -> str:
    """Loss and length of the gradient at some initial parameters, by which an edited network or loss is recognised.

    Raises:
        InputError: the loss cannot be computed, or is not one number for each sample.
    """
    network, loss = world.network, resolve_loss(world.loss)
    params = parameters_of(network.init(jax.random.key(0)))
    data = check_problem(network.apply, loss, params, *(part[:SIGNED] for part in world.problem))
    slope = jax.jit(jax.value_and_grad(make_recipe(network.apply, loss, None, 1, True).mean_loss))
    value, gradient = slope(params, *data)
    return f"{float(value):.4g} {float(optax.tree.norm(gradient)):.4g}"


def _check_optimizer(world: World, spec: Any) -> None:
    """Refuse an optimiser that cannot make a step on this network, once for each."""
    named = json.dumps(spec.settings.get("optimizer"), sort_keys=True)
    if named not in world.optimizers:
        check_optimizer(world.arguments(spec).get("optimizer"), jax.eval_shape(world.network.init, jax.random.key(0)))
        world.optimizers.add(named)


def _check_subsample(subsample: int | None, data: Dataset) -> None:
    if subsample is not None and subsample > data.samples:
        raise InputError(f"[hessian]: subsample = {subsample} is more than the {data.samples} samples of the data")


def _check_batch(section: str, label: str, batch_size: int, data: Dataset) -> None:
    if batch_size > data.samples:
        raise InputError(
            f"{section}: {label}: batch_size = {batch_size} is more than the {data.samples} samples of the data"
        )


@contextmanager
def _progress_bars(plan: Study, shown: bool, output: Path) -> Iterator[Report]:
    """Yield a callback ``report(done, total, message)`` that draws two bars on the standard error.

    One bar counts the parts of the campaign, the other follows the part at work.
    """
    if not shown:
        yield lambda done, total, message: None
        return
    labels = [f"minimum {spec.label}" for spec in plan.minima]
    labels += [describe(spec) for spec in plan.measured]
    waiting = set(labels)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        campaign = bars.add_task("campaign", total=len(labels))
        piece = bars.add_task("", total=1)

        def report(done: int, total: int, message: str) -> None:
            bars.update(piece, completed=done, total=total, description=message)
            if message in waiting and done == total:
                waiting.discard(message)
                bars.update(campaign, completed=len(labels) - len(waiting))

        try:
            yield report
        except KeyboardInterrupt:
            finished = len(labels) - len(waiting)
            console.print(f"stopped: {finished} of {len(labels)} parts are finished in {output}; go on with --resume")
            raise
