"""The parts of a campaign: each measures one thing and is on the disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from escape_inference.errors import InputError
from escape_inference.trainers.crossings import measure_crossings
from escape_inference.trainers.datasets import Dataset
from escape_inference.trainers.escape import UnstableMinimum, measure_escape
from escape_inference.trainers.exits import find_exits
from escape_inference.trainers.minimum import Minimum, train_minimum
from escape_inference.trainers.networks import Network
from escape_inference.trainers.optimizers import named_optimizer
from escape_inference.trainers.ramp import measure_ramp
from escape_inference.trainers.schema import HessianSection
from escape_inference.trainers.specs import (
    ConditionSpec,
    CrossingSpec,
    MinimumSpec,
    RampSpec,
    SaddleSpec,
    derived_seed,
    describe,
)
from escape_inference.trainers.spectra import spectrum_record
from escape_inference.trainers.storage import Campaign
from escape_inference.trainers.tables import (
    part_name,
    ramp_summary,
    read_record,
    record_writer,
    saddle_summary,
    summary,
)
from escape_inference.trainers.way_out import Exit

Report = Callable[[int, int, str], None]
Writers = dict[str, Callable[[Path], object]]


@dataclass
class World:
    """Data and network of one or more minima, and the loss; the optimisers that were checked and the network's sign."""

    data: Dataset
    network: Network
    loss: Any
    folder: Path
    trained: dict[str, Minimum] = field(default_factory=dict)
    optimizers: set[str] = field(default_factory=set)
    sign: str = ""

    @property
    def problem(self) -> tuple[Any, Any]:
        """Inputs and targets."""
        return self.data.inputs, self.data.targets

    def arguments(self, spec: MinimumSpec | ConditionSpec | RampSpec | SaddleSpec | CrossingSpec) -> dict[str, Any]:
        """The settings of a piece of the study, with the optimiser that they name."""
        named = spec.settings.get("optimizer")
        if named is None:
            return spec.settings
        options = {key: value for key, value in named.items() if key != "name"}
        return spec.settings | {"optimizer": named_optimizer(named["name"], options, folder=self.folder)}

    def minimum(self, label: str, folder: Path) -> Minimum:
        """The trained minimum that a finished part holds, read once."""
        if label not in self.trained:
            self.trained[label] = Minimum.load(folder / "minimum.npz", self.network.init(jax.random.key(0)))
        return self.trained[label]


def minimum_part(campaign: Campaign, spec: MinimumSpec, world: World, hessian: HessianSection, report: Report) -> None:
    """Train one minimum and measure its spectrum, unless that is done."""
    part = part_name("minimum", spec)
    report(0, 1, f"minimum {spec.label}")
    if campaign.finished(part) is None:
        params = world.network.init(jax.random.key(derived_seed(spec.content, "initial parameters")))
        record: dict[str, Any] = {"parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params))}
        writers: Writers = {"record.json": record_writer(record)}
        try:
            minimum = train_minimum(
                world.network.apply,
                params,
                *world.problem,
                **world.arguments(spec),
                loss=world.loss,
                seed=derived_seed(spec.content, "training"),
                progress=report,
            )
            writers["minimum.npz"] = minimum.save
            data, seed = (world.network.apply, minimum, *world.problem), derived_seed(spec.content, "hessian")
            spectrum = spectrum_record(*data, section=hessian, loss=world.loss, seed=seed)
        except InputError as error:
            record |= {"status": "failed", "note": str(error)}
        else:
            record |= {"status": "trained", "note": ""} | spectrum
        campaign.finish(part, writers | {"record.json": record_writer(record)})
    report(1, 1, f"minimum {spec.label}")


def condition_part(campaign: Campaign, spec: ConditionSpec, world: World, report: Report) -> None:
    """Time the escapes under one condition, unless that is done or its minimum could not be trained."""

    def measure(minimum: Minimum, known: dict[str, Any]) -> tuple[dict[str, Any], Writers]:
        learning_rate = spec.learning_rate_at(known["hessian_minimum"])
        try:
            measured = measure_escape(
                world.network.apply,
                minimum,
                *world.problem,
                learning_rate=learning_rate,
                batch_size=spec.batch_size,
                loss_barrier=spec.threshold * known["loss_minimum"],
                start=spec.start,
                **world.arguments(spec),
                loss=world.loss,
                seed=derived_seed(spec.content, "escape"),
                hessian_minimum=known["hessian_minimum"],
                run_prefix=f"{spec.identity[:6]}-",
                progress=report,
            )
        except UnstableMinimum as error:
            return {"status": "unstable", "learning_rate": learning_rate, "note": str(error)}, {}
        record = {"status": "measured", "learning_rate": learning_rate, **summary(measured)}
        return record, {
            "rows.parquet": lambda path: measured.rows.to_parquet(path, index=False),
            "trend.csv": lambda path: measured.trend.to_csv(path, index=False),
        }

    _measured_part(campaign, "condition", spec, world, report, measure)


def ramp_part(campaign: Campaign, spec: RampSpec, world: World, report: Report) -> None:
    """Drive one ramp of the learning rate, unless that is done or its minimum could not be trained."""

    def measure(minimum: Minimum, known: dict[str, Any]) -> tuple[dict[str, Any], Writers]:
        measured = measure_ramp(
            world.network.apply,
            minimum,
            *world.problem,
            batch_size=spec.batch_size,
            learning_rates=spec.learning_rates_at(known["hessian_minimum"]),
            loss_barrier=None if spec.threshold is None else spec.threshold * known["loss_minimum"],
            jump_factor=spec.jump_factor,
            **world.arguments(spec),
            loss=world.loss,
            seed=derived_seed(spec.content, "ramp"),
            hessian_minimum=known["hessian_minimum"],
            run_prefix=f"{spec.identity[:6]}-",
            progress=report,
        )
        return {"status": "measured", **ramp_summary(measured)}, {
            "rows.parquet": lambda path: measured.rows.to_parquet(path, index=False),
            "critical.parquet": lambda path: measured.critical.to_parquet(path, index=False),
        }

    _measured_part(campaign, "ramp", spec, world, report, measure)


def saddle_part(campaign: Campaign, spec: SaddleSpec, world: World, report: Report) -> None:
    """Look for the saddles around one minimum, unless that is done or the minimum could not be trained."""

    def measure(minimum: Minimum, known: dict[str, Any]) -> tuple[dict[str, Any], Writers]:
        learning_rates = spec.learning_rates_at(known["hessian_minimum"])
        found = find_exits(
            world.network.apply,
            minimum,
            *world.problem,
            learning_rates=learning_rates,
            batch_size=spec.batch_size,
            loss_barrier=spec.threshold * known["loss_minimum"],
            **spec.settings,
            loss=world.loss,
            seed=derived_seed(spec.content, "saddles"),
            progress=report,
        )
        return saddle_summary(found, learning_rates, known["loss_minimum"]), {
            f"exit_{place}.npz": one.save for place, one in enumerate(found.exits)
        }

    _measured_part(campaign, "saddle", spec, world, report, measure)


def crossing_part(campaign: Campaign, spec: CrossingSpec, world: World, report: Report) -> None:
    """Time the escapes over the lowest saddle around a minimum, unless that is done or there is none to cross."""

    def measure(minimum: Minimum, known: dict[str, Any]) -> tuple[dict[str, Any], Writers]:
        folder = campaign.finished(part_name("saddle", spec.saddle))
        assert folder is not None
        searched = read_record(folder)
        if searched.get("chosen") is None:
            return {"status": "no saddle", "note": searched["note"]}, {}
        way_out = Exit.load(folder / f"exit_{searched['chosen']}.npz", minimum.params)
        ratio = way_out.saddle.loss_barrier / known["loss_minimum"]
        hessian_minimum = way_out.hessian_along if spec.along else known["hessian_minimum"]
        learning_rate = spec.learning_rate_at(hessian_minimum, ratio)
        barrier = {"loss_barrier": way_out.saddle.loss_barrier}
        try:
            measured = measure_crossings(
                world.network.apply,
                minimum,
                *world.problem,
                way_out,
                learning_rate=learning_rate,
                batch_size=spec.batch_size,
                start=spec.start,
                **world.arguments(spec),
                loss=world.loss,
                seed=derived_seed(spec.content, "escape"),
                hessian_minimum=hessian_minimum,
                run_prefix=f"{spec.identity[:6]}-",
                progress=report,
            )
        except UnstableMinimum as error:
            return {"status": "unstable", "learning_rate": learning_rate, **barrier, "note": str(error)}, {}
        record = {"status": "measured", "learning_rate": learning_rate, **barrier, **summary(measured)}
        return record | {"elsewhere": measured.elsewhere}, {
            "rows.parquet": lambda path: measured.rows.to_parquet(path, index=False),
            "trend.csv": lambda path: measured.trend.to_csv(path, index=False),
        }

    _measured_part(campaign, "crossing", spec, world, report, measure)


def _measured_part(
    campaign: Campaign,
    kind: str,
    spec: ConditionSpec | RampSpec | SaddleSpec | CrossingSpec,
    world: World,
    report: Report,
    measure: Callable[[Minimum, dict[str, Any]], tuple[dict[str, Any], Writers]],
) -> None:
    part, label = part_name(kind, spec), describe(spec)
    report(0, 1, label)
    folder = campaign.finished(part_name("minimum", spec.minimum))
    assert folder is not None
    known = read_record(folder)
    if campaign.finished(part) is None and known["status"] == "trained":
        try:
            record, writers = measure(world.minimum(spec.minimum.label, folder), known)
        except InputError as error:  # what cannot be measured here is no reason to lose the rest
            record, writers = {"status": "failed", "note": str(error)}, {}
        campaign.finish(part, {"record.json": record_writer(record)} | writers)
    report(1, 1, label)
