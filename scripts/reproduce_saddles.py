"""Escape rates over saddles of small networks beside the formulas for them, nothing fitted.

    python scripts/reproduce_saddles.py [--quick] [--output data/reproduction]

Mori, Ziyin, Liu and Ueda (ICML 2022) predict the rate at which SGD leaves a minimum over a saddle,
``kappa = sqrt(h* h^s)/(2 pi) (L^s/L*)^-(B/(eta h*) + 1 - n/2)``; with noise that does not grow with the loss it would be
``sqrt(h* h^s)/(2 pi) exp(-(L^s/L* - 1) B/(eta h*))`` (Arrhenius, noise frozen at its value at the minimum). Here every quantity is
measured: a two-layer network with two tanh units is trained to a minimum, runs of SGD that leave it show the minimum beyond, the
saddle between is found by the string method and min-mode following, and replicas of SGD in the quasi-stationary state are timed
over it at several eta/B. The ratio of the measured to the predicted rate has no free parameter. Conditions in which eta times the largest eigenvalue is above
0.6 are measured and shown, but not judged: so near the limit of gradient descent, 2, SGD is no diffusion.

The networks are narrow: a student of a noisy teacher, and handwritten digits (even or odd) by their six leading principal
components. Outputs are the sum of the units, so that the two units can change places, and the saddle lies where they are equal or
nearly so. A wide network on the same digits is searched too; where no saddle is found, the table says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jax.flatten_util import ravel_pytree
from reproduction import Claim, Reproduction, run
from studies import narrow
from studies.narrow import apply

from escape_inference.trainers import top_hessian, train_minimum
from escape_inference.trainers.crossings import measure_crossings
from escape_inference.trainers.curvature import make_problem
from escape_inference.trainers.exits import find_exits
from escape_inference.trainers.losses import mean_square, sample_losses
from escape_inference.trainers.lowest_path import relax_path, straight_path
from escape_inference.trainers.way_out import Exit

BARRIERS = (2.5, 3.5, 4.5, 5.5)
"""log(L^s/L*) over the temperature eta h*/B, from which eta follows."""
DRAWS = 20_000
INTERVAL = (5, 95)
"""Per cent: the ends of the intervals."""
LARGEST_STEP = 0.6
"""Largest eta times the largest eigenvalue at which SGD is compared with a diffusion; 2 is the limit of gradient descent."""
SETTLED = 0.9
"""The share of 90 % intervals that should contain 1 if a formula were right."""


@dataclass(frozen=True)
class World:
    """A network and its data."""

    name: str
    inputs: np.ndarray
    targets: np.ndarray
    units: int = narrow.UNITS

    @property
    def problem(self) -> tuple:
        """Inputs and targets."""
        return jnp.asarray(self.inputs, jnp.float32), jnp.asarray(self.targets, jnp.float32)

    def start(self, seed: int) -> dict[str, jax.Array]:
        """Initial weights."""
        return narrow.Committee(self.units).init(jax.random.key(seed), self.problem[0])


@dataclass(frozen=True)
class Well:
    """A minimum and the saddle by which it is left."""

    name: str
    world: World
    minimum: object
    way_out: Exit
    top: float
    top_se: float
    outliers: int
    outliers_se: float
    returned: int
    runs: int
    noise: tuple[float, float]
    work: float


def teacher(noise: float) -> World:
    """Student and teacher of one shape."""
    return World(f"teacher, noise {noise:g}", *narrow.teacher(noise))


def digits(units: int = narrow.UNITS) -> World:
    """Even against odd digits."""
    return World(f"MNIST, {units} units", *narrow.digits(), units)


def noise_along(world: World, point: np.ndarray, direction: np.ndarray, like: dict) -> float:
    """Variance over samples of the gradient along a direction, ``e^T C e``: B times that of a mini-batch."""
    unravel = ravel_pytree(like)[1]
    inputs, targets = world.problem

    def losses(flat: jax.Array) -> jax.Array:
        return sample_losses(apply, mean_square, unravel(flat), inputs, targets)

    slopes = jax.jvp(losses, (jnp.asarray(point),), (jnp.asarray(direction, jnp.float32),))[1]
    return float(jnp.var(slopes))


def find_well(world: World, seed: int, quick: bool) -> Well | dict:
    """Train a minimum and find the saddle by which it is left; where there is none, what was found instead."""
    wide = world.units > narrow.UNITS
    minimum = train_minimum(
        apply, world.start(seed), *world.problem, learning_rate=0.05, batch_size=20, steps=3000 if quick else 10_000,
        polish_steps=20_000, polish_learning_rate=0.3, polish_gradient_norm=1e-5, seed=seed,
    )  # fmt: skip
    size = sum(leaf.size for leaf in jax.tree.leaves(minimum.params))
    spectrum = top_hessian(apply, minimum, *world.problem, k=min(size, 30))
    found = find_exits(
        apply, minimum, *world.problem, learning_rates=[0.8 / spectrum.top, 1.6 / spectrum.top], batch_size=1,
        loss_barrier=100 * minimum.loss_minimum, runs=4 if wide else 12, steps=1500 if quick or wide else 4000,
        descent_steps=5000, path_iterations=1000,
        candidates=2 if wide else 4, refine_iterations=300, seed=seed,
    )  # fmt: skip
    way_out = found.lowest
    if way_out is None or way_out.saddle.loss_barrier <= minimum.loss_minimum:
        notes = {one.note for one in found.exits} or {"no run reached another minimum."}
        return {
            "minimum": world.name,
            "parameters": size,
            "samples": len(world.inputs),
            "loss_minimum": minimum.loss_minimum,
            "hessian_top": spectrum.top,
            "hessian_top_se": spectrum.top_se,
            "searched": found.runs,
            "returned": found.returned,
            "usable": False,
            "note": "; ".join(sorted(notes)),
        }
    top = np.asarray(ravel_pytree(way_out.saddle.params)[0])
    toward = (top - way_out.home) / np.linalg.norm(top - way_out.home)
    ends = [
        noise_along(world, at, direction, minimum.params) / (2 * level * way_out.hessian_along)
        for at, direction, level in (
            (way_out.home, toward, way_out.loss_home),
            (top, np.asarray(way_out.saddle.mode), way_out.saddle.loss_barrier),
        )
    ]
    counted = spectrum.counted
    return Well(
        world.name,
        world,
        minimum,
        way_out,
        spectrum.top,
        spectrum.top_se,
        counted.count,
        0.0 if np.isnan(counted.se) else counted.se,
        found.returned,
        found.runs,
        (ends[0], ends[1]),
        work_against_noise(world, minimum.params, way_out),
    )


def work_against_noise(world: World, like: dict, way_out: Exit) -> float:
    """``int 2 dL / (t^T C t)`` along the lowest path up to the saddle, times B/eta the exponent of one dimension.

    With ``t^T C t = 2 L h*`` all along it would be ``log(L^s/L*)/h*``, the exponent of the power law.
    Runs do not keep to that path: they leave where the noise is stronger, and more often than this exponent says.
    """
    problem = make_problem(apply, like, *world.problem)
    top = ravel_pytree(way_out.saddle.params)[0]
    straight = straight_path(jnp.asarray(way_out.home), top, 21)
    path, levels = relax_path(problem, straight, iterations=500, learning_rate=0.3)
    points, heights = np.asarray(path), np.asarray(levels, float)
    total = 0.0
    for low, high, rise in zip(points[:-1], points[1:], np.diff(heights), strict=True):
        tangent = (high - low) / np.linalg.norm(high - low)
        total += 2 * rise / noise_along(world, (low + high) / 2, tangent, like)
    return total


def measure(well: Well, barrier: float, batch_size: int, quick: bool, seed: int) -> dict:
    """Time the escapes at one eta/B."""
    saddle, minimum = well.way_out.saddle, well.minimum
    ratio = saddle.loss_barrier / minimum.loss_minimum
    h = well.way_out.hessian_along
    learning_rate = float(f"{np.log(ratio) / barrier * batch_size / h:.3g}")
    expected = np.sqrt(h * saddle.hessian_saddle) / (2 * np.pi) * np.exp(-barrier)
    interval = int(np.clip(0.05 / (expected * learning_rate), 20, 1000))
    replicas = 64 if quick else 96
    wanted = 40 if quick else 300
    steps = int(np.clip(wanted / (expected * learning_rate * replicas), 10 * interval, 4000 if quick else 60_000))
    record = measure_crossings(
        apply, minimum, *well.world.problem, well.way_out, learning_rate=learning_rate, batch_size=batch_size,
        replicas=replicas, steps=steps, check_interval=interval, descent_steps=150, seed=seed,
        burn_in=(min(steps // 4, int(20 / (h * learning_rate))), steps), hessian_minimum=h,
    )  # fmt: skip
    return {
        "minimum": well.name,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "barrier_over_temperature": np.log(ratio) * batch_size / (learning_rate * h),
        "loss_minimum": minimum.loss_minimum,
        "loss_barrier": saddle.loss_barrier,
        "hessian_minimum": h,
        "learning_rate_times_top": learning_rate * well.top,
        "hessian_saddle": saddle.hessian_saddle,
        "effective_dimension": well.outliers,
        "check_interval": interval,
        "replicas": replicas,
        "steps": steps,
        "escapes": record.escapes,
        "elsewhere": record.elsewhere,
        "exposure": record.exposure,
        "settled": record.settled,
        "rate_change": record.rate_change,
    }


def measured_rates(row: dict, generator: np.random.Generator) -> np.ndarray:
    """Draws of the rate: Gamma posterior under Jeffreys's prior, the looks' interval taken into account.

    A run escapes between two looks with probability ``1 - exp(-kappa dt)``, and its exposure counts dt whole.
    """
    seen = generator.gamma(row["escapes"] + 0.5, 1 / row["exposure"], DRAWS)
    width = row["learning_rate"] * row["check_interval"]
    return -np.log1p(-np.minimum(seen * width, 1 - 1e-9)) / width


def predicted_rates(well: Well, row: dict, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws of each formula's rate, from the errors of L^s, h^s, h* and n."""

    def draw(value: float, error: float) -> np.ndarray:
        return np.maximum(value + error * generator.standard_normal(DRAWS), 1e-12)

    saddle, way_out = well.way_out.saddle, well.way_out
    ratio = draw(saddle.loss_barrier, saddle.loss_barrier_se) / well.minimum.loss_minimum
    down = draw(saddle.hessian_saddle, saddle.hessian_saddle_se)
    n = draw(well.outliers, well.outliers_se)
    scale = row["batch_size"] / row["learning_rate"]
    predictions = {}
    for name, h in (("along", np.full(DRAWS, way_out.hessian_along)), ("top", draw(well.top, well.top_se))):
        front = np.sqrt(h * down) / (2 * np.pi)
        predictions[f"power_law_{name}"] = front * ratio ** -(scale / h + 1 - n / 2)
        predictions[f"arrhenius_{name}"] = front * np.exp(-(ratio - 1) * scale / h)
    front = np.sqrt(way_out.hessian_along * down) / (2 * np.pi)
    predictions["measured_noise"] = front * np.exp(-well.work * scale)
    return predictions


def compare(wells: Sequence[Well], rows: list[dict]) -> pd.DataFrame:
    """Rates with their intervals, and the ratios of measured to predicted."""
    generator = np.random.default_rng(1)
    named = {well.name: well for well in wells}
    table = []
    for row in rows:
        measured = measured_rates(row, generator)
        low, high = np.percentile(measured, INTERVAL)
        own = row | {"rate": np.median(measured), "rate_q05": low, "rate_q95": high}
        for name, predicted in predicted_rates(named[row["minimum"]], row, generator).items():
            ratios = measured / predicted
            low, high = np.percentile(ratios, INTERVAL)
            own |= {name: np.median(predicted), f"ratio_{name}": np.median(ratios)}
            own |= {f"ratio_{name}_q05": low, f"ratio_{name}_q95": high}
        table.append(own)
    return pd.DataFrame(table)


def slopes(table: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """The slope of the log rate in B/eta over that of the power law, ``-log(L^s/L*)/h*``, for each minimum.

    Line through the log rates, each draw of the rates one line: no prefactor and no n enter.
    """
    found = []
    for name, own in table.groupby("minimum", sort=False):
        scale = (own["batch_size"] / own["learning_rate"]).to_numpy()
        if len(own) < 2 or np.ptp(scale) == 0:
            continue
        draws = np.log([measured_rates(row, generator) for row in own.to_dict("records")])
        line = np.polyfit(scale, draws, 1, w=np.sqrt(own["escapes"].to_numpy()))[0]
        first = own.iloc[0]
        theory = -np.log(first["loss_barrier"] / first["loss_minimum"]) / first["hessian_minimum"]
        low, high = np.percentile(line / theory, INTERVAL)
        found.append(
            {"minimum": name, "slope_ratio": np.median(line / theory), "slope_ratio_q05": low, "slope_ratio_q95": high}
        )
    return pd.DataFrame(found)


def conclusion(low: pd.Series, high: pd.Series) -> str:
    """``agree``: as many 90 % intervals contain 1 as should; ``differ``: less than half do; else ``cannot tell``."""
    contained = ((low <= 1) & (high >= 1)).mean()
    wide = (high / low > 3).mean() > 0.5
    if contained >= SETTLED:
        return "cannot tell" if wide else "agree"
    return "differ" if contained < 0.5 else "cannot tell"


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions with enough escapes and small enough steps for a comparison."""
    return table[(table["escapes"] >= 5) & (table["learning_rate_times_top"] <= LARGEST_STEP)]


def ratio_claim(table: pd.DataFrame, name: str, claim: str, what: str) -> Claim:
    """One formula beside the measured rates."""
    known = compared(table)
    low, high = known[f"ratio_{name}_q05"], known[f"ratio_{name}_q95"]
    if known.empty:
        return Claim(claim, "too few escapes", "cannot tell")
    middle = known[f"ratio_{name}"]
    inside = int(((low <= 1) & (high >= 1)).sum())
    own = [
        f"{minimum} {part.min():.2g} to {part.max():.2g}"
        for minimum, part in middle.groupby(known["minimum"], sort=False)
    ]
    text = f"{what}: measured over predicted {'; '.join(own)}; {inside} of {len(known)} intervals contain 1"
    return Claim(claim, text, conclusion(low, high))


def rival_claim(table: pd.DataFrame) -> Claim:
    """Power law against Arrhenius: can these rates tell them apart, and if so which is nearer?"""
    claim = "the rates follow the power law and not the Arrhenius formula"
    known = compared(table)
    if known.empty:
        return Claim(claim, "too few escapes", "cannot tell")
    power, arrhenius = (np.abs(np.log(known[f"ratio_{law}_along"])) for law in ("power_law", "arrhenius"))
    apart = np.abs(np.log(known["power_law_along"] / known["arrhenius_along"]))
    low, high = known["ratio_arrhenius_along_q05"], known["ratio_arrhenius_along_q95"]
    inside = int(((low <= 1) & (high >= 1)).sum())
    text = (
        f"the formulas differ by factors {np.exp(apart.min()):.2g} to {np.exp(apart.max()):.2g}; the median miss is a factor "
        f"{np.exp(power.median()):.2g} (power law) and {np.exp(arrhenius.median()):.2g} (Arrhenius, {inside} of {len(known)} "
        "intervals contain 1)"
    )
    if apart.median() < min(power.median(), arrhenius.median()):
        return Claim(claim, text + "; what both miss by is more than what sets them apart", "cannot tell")
    nearer = (power < arrhenius).mean()
    return Claim(claim, text, "agree" if nearer >= SETTLED else "differ" if nearer <= 1 - SETTLED else "cannot tell")


def draw_figure(wells: Sequence[Well], table: pd.DataFrame) -> plt.Figure:
    """Rates against B/eta for each minimum, and the ratios to the formulas."""
    figure, axes = plt.subplots(2, len(wells), figsize=(3.0 * len(wells) + 0.4, 5.2), squeeze=False, sharey="row")
    styles = {
        "power_law_along": ("C0", "-", "power law, h* towards saddle"),
        "arrhenius_along": ("C1", "--", "Arrhenius, h* towards saddle"),
        "power_law_top": ("C3", ":", "power law, h* the largest eigenvalue"),
    }
    for (upper, lower), well in zip(axes.T, wells, strict=True):
        own = table[(table["minimum"] == well.name) & (table["escapes"] > 0)].copy()
        own["scale"] = own["batch_size"] / own["learning_rate"]
        own = own.sort_values("scale")
        errors = [own["rate"] - own["rate_q05"], own["rate_q95"] - own["rate"]]
        upper.errorbar(own["scale"], own["rate"], errors, fmt="ko", ms=4, label="measured")
        for name, (colour, line, label) in styles.items():
            upper.plot(own["scale"], own[name], color=colour, ls=line, label=label)
            ratio = own[f"ratio_{name}"]
            errors = [ratio - own[f"ratio_{name}_q05"], own[f"ratio_{name}_q95"] - ratio]
            lower.errorbar(own["scale"], ratio, errors, color=colour, ls=line, marker="o", ms=3)
        lower.axhline(1, color="0.5", lw=0.8)
        c = well.way_out.saddle.loss_barrier / well.minimum.loss_minimum
        upper.set(yscale="log", title=f"{well.name}\nL$^s$/L* = {c:.3f}, n = {well.outliers}")
        lower.set(yscale="log", xlabel="B/η (1/time)")
    axes[0, 0].set_ylabel("escape rate κ (1/time)")
    axes[1, 0].set_ylabel("measured / predicted")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def describe(wells: Sequence[Well]) -> pd.DataFrame:
    """What was measured at each minimum and its saddle."""
    rows = []
    for well in wells:
        numbers = {key: value for key, value in well.way_out.numbers.items() if key not in ("lowest", "note")}
        ratio = well.way_out.saddle.loss_barrier / well.minimum.loss_minimum
        rows.append(
            {"minimum": well.name, "parameters": well.way_out.home.size, "samples": len(well.world.inputs)}
            | {"loss_minimum": well.minimum.loss_minimum, "barrier_ratio": ratio, "hessian_top": well.top}
            | {"hessian_top_se": well.top_se, "outliers": well.outliers, "outliers_se": well.outliers_se}
            | {"searched": well.runs, "returned": well.returned}
            | {"noise_at_minimum": well.noise[0], "noise_at_saddle": well.noise[1]}
            | {"work_ratio": well.work * well.way_out.hessian_along / np.log(ratio)}
            | numbers
        )
    return pd.DataFrame(rows)


def main(reproduction: Reproduction) -> list[Claim]:
    """Find the saddles, time the escapes, and compare."""
    quick = reproduction.quick
    worlds = [teacher(0.4)] if quick else [teacher(0.4), teacher(0.3), digits(), digits(30)]
    found = [find_well(world, 0, quick) for world in worlds]
    wells = [well for well in found if isinstance(well, Well)]
    without = [well for well in found if isinstance(well, dict)]
    print(*(f"{one['minimum']}: no saddle: {one['note']}" for one in without), sep="\n", flush=True)
    if not wells:
        return [Claim("SGD leaves a minimum over a saddle", f"no saddle around {len(worlds)} minima", "cannot tell")]
    batches: list[tuple[float, int]] = [(barrier, 1) for barrier in (BARRIERS[:2] if quick else BARRIERS)]
    batches += [] if quick else [(BARRIERS[3], 2)]
    rows = []
    for well in wells:
        for seed, (barrier, batch_size) in enumerate(batches):
            rows.append(measure(well, barrier, batch_size, quick, seed))
            print(
                f"{well.name}: B={batch_size}, ΔU/T={barrier:g}: {rows[-1]['escapes']} escapes, "
                f"{rows[-1]['elsewhere']} elsewhere",
                flush=True,
            )
    table = compare(wells, rows)
    described = describe(wells)
    lines = slopes(compared(table), np.random.default_rng(2))
    described = described.merge(lines, on="minimum", how="left") if len(lines) else described
    described = pd.concat([described, pd.DataFrame(without)], ignore_index=True) if without else described
    reproduction.table("minima", described, "Each minimum, the saddle by which it is left, and the noise along the way")
    reproduction.table("rates", table, "Escape rates over the saddle at each (eta, B), and the formulas' predictions")
    reproduction.figure(
        "rates",
        draw_figure(wells, table),
        "Escape rates over a saddle against B/eta: measured (90 % intervals) and predicted with nothing fitted; below, their ratio.",
    )
    formula = "κ = √(h* h^s)/2π · (L^s/L*)^−(B/(ηh*) + 1 − n/2)"
    claims = [
        ratio_claim(table, "power_law_along", f"{formula}, h* along the escape", "h* towards the saddle, n outliers"),
        ratio_claim(table, "power_law_top", f"{formula}, h* an outlier", "h* the largest eigenvalue"),
        rival_claim(table),
    ]
    if len(lines):
        text = "; ".join(
            f"{line.minimum}: {line.slope_ratio:.2f} [{line.slope_ratio_q05:.2f}, {line.slope_ratio_q95:.2f}]"
            for line in lines.itertuples()
        )
        verdict = conclusion(lines["slope_ratio_q05"], lines["slope_ratio_q95"])
        claims.append(
            Claim("log κ falls with B/η at the slope log(L^s/L*)/h*", f"slope over that of theory: {text}", verdict)
        )
    if without:
        names = ", ".join(
            f"{one['minimum']} ({one['returned']} of {one['searched']} runs came back)" for one in without
        )
        claims.append(
            Claim("minima are left over saddles", f"none converged for {names}: see the table", "cannot tell")
        )
    noise = "; ".join(
        f"{well.name}: {well.noise[0]:.2f} at the minimum, {well.noise[1]:.2f} at the saddle" for well in wells
    )
    near = all(0.8 < value < 1.25 for well in wells for value in well.noise)
    claims.append(
        Claim(
            "the noise along the escape is 2 L h*/B (decoupling)",
            f"measured over that: {noise}",
            "agree" if near else "differ",
        )
    )
    return claims


if __name__ == "__main__":
    run("saddles", "Escape over saddles of small networks", __doc__, partial(main))
