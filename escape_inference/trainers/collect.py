"""Run a measuring campaign: train the minima of a study, time the escapes under every condition, write the tables.

Each minimum and each condition is one part of the campaign, finished and on the disk before the next begins. A campaign
that was stopped goes on with ``resume=True``, repeats nothing, and ends with the very table that it would have had.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from escape_inference import __version__
from escape_inference.errors import InputError
from escape_inference.trainers.datasets import Dataset, import_object, load_data
from escape_inference.trainers.escape import UnstableMinimum, measure_escape
from escape_inference.trainers.hessian import top_hessian
from escape_inference.trainers.minimum import Minimum, train_minimum
from escape_inference.trainers.networks import Network, load_network
from escape_inference.trainers.storage import Campaign, open_campaign
from escape_inference.trainers.study import (
    ConditionSpec,
    MinimumSpec,
    Study,
    derived_seed,
    describe,
    fingerprint,
    read_study,
)
from escape_inference.trainers.tables import part_name, read_record, record_writer, summary, write_tables

Report = Callable[[int, int, str], None]


@dataclass
class World:
    """Data and network of one or more minima, and the loss."""

    data: Dataset
    network: Network
    loss: Any
    trained: dict[str, Minimum] = field(default_factory=dict)


def collect(
    study: str | Path, output: str | Path, *, resume: bool = False, seed: int | None = None, progress: bool = True
) -> Path:
    """Measure everything that a study asks for.

    Args:
        study: the TOML file, see :mod:`escape_inference.trainers.study`.
        output: folder to write; it must be new or empty unless ``resume``.
        resume: go on with a campaign that was stopped; its study, seed and data must be unchanged.
        seed: takes the place of the study's own seed.
        progress: draw progress bars on the standard error.

    Returns:
        Path of ``measurements.parquet``, the table of all runs. Beside it: ``minima.csv``, ``conditions.csv`` (what
        each condition gave, whether it settled, unstable ones included) and ``trends.csv`` (rate and loss in time).

    Raises:
        InputError: the study, its data or network, or the output folder cannot be used; the disk is full; or no escape
            was seen under any condition. Finished parts are never lost.

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
        },
        "title": plan.file.title,
        "study": plan.file.model_dump(),
        "version": __version__,
    }
    with open_campaign(output, content, resume=resume) as campaign, _progress_bars(plan, progress, output) as report:
        for spec in plan.minima:
            _minimum_part(campaign, spec, worlds[_world_key(spec)], plan, report)
        for condition in plan.conditions:
            _condition_part(campaign, condition, worlds[_world_key(condition.minimum)], report)
        return write_tables(campaign, plan)


def _world_key(spec: MinimumSpec) -> str:
    return json.dumps(spec.data_options, sort_keys=True, default=str)


def _prepare(plan: Study) -> dict[str, World]:
    """Load and check data, network and loss before anything is trained."""
    folder, file = plan.path.parent, plan.file
    is_path = ":" in file.loss
    if not is_path and file.loss != "mean_square":
        raise InputError(f"loss = {file.loss!r}: must be 'mean_square' or an import path my_module:my_loss")
    loss = import_object(file.loss, what="loss", folder=folder) if is_path else file.loss
    worlds: dict[str, World] = {}
    for spec in plan.minima:
        key = _world_key(spec)
        if key not in worlds:
            data = load_data(file.data.name, spec.data_options, folder=folder)
            worlds[key] = World(data, load_network(file.network.name, data, file.network.options, folder=folder), loss)
        _check_batch("[[minima]]", spec.label, spec.settings["batch_size"], worlds[key].data)
    for condition in plan.conditions:
        data = worlds[_world_key(condition.minimum)].data
        _check_batch("[[escape]]", describe(condition), condition.batch_size, data)
    return worlds


def _check_batch(section: str, label: str, batch_size: int, data: Dataset) -> None:
    if batch_size > data.samples:
        raise InputError(
            f"{section}: {label}: batch_size = {batch_size} is more than the {data.samples} samples of the data"
        )


def _minimum_part(campaign: Campaign, spec: MinimumSpec, world: World, plan: Study, report: Report) -> None:
    """Train one minimum and measure its spectrum, unless that is done."""
    part = part_name("minimum", spec)
    report(0, 1, f"minimum {spec.label}")
    if campaign.finished(part) is None:
        init, apply, data = world.network.init, world.network.apply, world.data
        params = init(jax.random.key(derived_seed(spec.content, "initial parameters")))
        record: dict[str, Any] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
        writers: dict[str, Callable[[Path], object]] = {"record.json": record_writer(record)}
        try:
            minimum = train_minimum(
                apply,
                params,
                data.inputs,
                data.targets,
                **spec.settings,
                loss=world.loss,
                seed=derived_seed(spec.content, "training"),
                progress=report,
            )
        except InputError as error:
            record |= {"status": "failed", "note": str(error)}
        else:
            hessian = plan.file.hessian
            spectrum = top_hessian(
                apply,
                minimum,
                data.inputs,
                data.targets,
                k=min(hessian.eigenvalues, record["parameters"]),
                subsample=hessian.subsample,
                loss=world.loss,
                seed=derived_seed(spec.content, "hessian"),
            )
            dimensions = {"unknown": None, "parameters": record["parameters"], "outliers": spectrum.outliers}
            record |= {
                "status": "trained",
                "note": "" if spectrum.converged[0] else "the top Hessian eigenvalue did not converge",
                "loss_minimum": float(minimum.loss_minimum),
                "gradient_norm": float(minimum.gradient_norm),
                "hessian_minimum": float(spectrum.top),
                "hessian_minimum_se": float(spectrum.top_se),
                "effective_dimension": dimensions[hessian.effective_dimension],
                "outliers": int(spectrum.outliers),
                "eigenvalues": [float(value) for value in spectrum.eigenvalues],
            }
            writers["minimum.npz"] = minimum.save
        campaign.finish(part, writers | {"record.json": record_writer(record)})
    report(1, 1, f"minimum {spec.label}")


def _condition_part(campaign: Campaign, spec: ConditionSpec, world: World, report: Report) -> None:
    """Measure one condition, unless that is done or its minimum could not be trained."""
    part, label = part_name("condition", spec), describe(spec)
    report(0, 1, label)
    folder = campaign.finished(part_name("minimum", spec.minimum))
    assert folder is not None
    known = read_record(folder)
    if campaign.finished(part) is None and known["status"] == "trained":
        name = spec.minimum.label
        if name not in world.trained:
            like = world.network.init(jax.random.key(0))
            world.trained[name] = Minimum.load(folder / "minimum.npz", like)
        learning_rate = spec.learning_rate_at(known["hessian_minimum"])
        try:
            measured = measure_escape(
                world.network.apply,
                world.trained[name],
                world.data.inputs,
                world.data.targets,
                learning_rate=learning_rate,
                batch_size=spec.batch_size,
                loss_barrier=spec.threshold * known["loss_minimum"],
                start=spec.start,
                **spec.settings,
                loss=world.loss,
                seed=derived_seed(spec.content, "escape"),
                hessian_minimum=known["hessian_minimum"],
                run_prefix=f"{spec.identity[:6]}-",
                progress=report,
            )
        except UnstableMinimum as error:
            record = {"status": "unstable", "learning_rate": learning_rate, "note": str(error)}
            campaign.finish(part, {"record.json": record_writer(record)})
        except InputError as error:
            kept = f"{campaign.count()} finished parts are kept"
            raise InputError(f"{campaign.output}: {label}: {error} ({kept})") from error
        else:
            record = {"status": "measured", "learning_rate": learning_rate, **summary(measured)}
            campaign.finish(
                part,
                {
                    "record.json": record_writer(record),
                    "rows.parquet": lambda path: measured.rows.to_parquet(path, index=False),
                    "trend.csv": lambda path: measured.trend.to_csv(path, index=False),
                },
            )
    report(1, 1, label)


@contextmanager
def _progress_bars(plan: Study, shown: bool, output: Path) -> Iterator[Report]:
    """Yield a callback ``report(done, total, message)`` that draws two bars on the standard error.

    One bar counts the parts of the campaign, the other follows the part at work.
    """
    if not shown:
        yield lambda done, total, message: None
        return
    labels = [f"minimum {spec.label}" for spec in plan.minima] + [describe(spec) for spec in plan.conditions]
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
