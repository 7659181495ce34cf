r"""First-passage times of SGD in linear regression: is the number of directions n what the power law says, and how sure is that?

    python scripts/reproduce_passage_times.py [--quick] [--output data/reproduction]

The published set-up: x and y standard normal, N = 10^4, n = d, h* close to 1, B = 1, learning rate 0.1; 100 runs for each
threshold c L* start at the minimum and end when the full-batch loss, looked at after every iteration, exceeds it. The paper
reads n from the slope of log(mean time) against log c, which it takes to be B/(eta h*) + 1 - n/2.

Here every d is fitted three times, n never given: the exact passage law at the theory's temperature T = eta h*/B (the same
knowledge as the straight line has), the project's ``power_law`` (T free by a factor) and ``noise_exponent`` (noise ∝ L^q). Runs
that never crossed count as censored. As a control the same design is run on the law's own diffusion, with one Gaussian step
an iteration; there the law must find n = d. The project's checks say where the law cannot be trusted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from regression_well import RegressionWell, make_well
from reproduction import Claim, Reproduction, run
from scipy import stats

import escape_inference as ei
from escape_inference.models import power_law
from escape_inference.precision import float64
from escape_inference.trainers import measure_escape
from escape_inference.workers import processes
from escape_inference.worlds import World

LEARNING_RATE, BATCH_SIZE = 0.1, 1
DIMENSIONS = (8, 4, 1, 16, 2)  #: the longest first
THRESHOLDS = (1.1, 1.2, 1.3, 1.4, 1.5, 1.65, 1.8, 2.0, 2.3, 2.6, 3.0)
SAMPLES, RUNS, BUDGET = 10_000, 100, 20_000
WORKERS = 3  #: processes side by side, most of whose time goes into compiling
FEWEST = 5  #: escapes of a condition that enters the straight line

THEORY = replace(
    power_law.LAW,
    name="power_law_at_theory",
    title="power law at T = η h*/B",
    parameters=(power_law.EFFECTIVE_DIMENSION,),
    temperature=lambda values, setting: setting.diffusion_scale,
    log_rate=lambda values, setting: power_law.log_rate({**values, "temperature_scale": 1.0}, setting),
)
LAWS: dict[str, str | ei.Law] = {"theory": THEORY, "power_law": "power_law", "noise_exponent": "noise_exponent"}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    dimensions: Sequence[int]
    thresholds: Sequence[float]
    runs: int
    budget: int


FULL = Plan(DIMENSIONS, THRESHOLDS, RUNS, BUDGET)
QUICK = Plan((2,), (1.1, 1.25, 1.4, 1.6, 1.8), 40, 4000)


def predict(weights: Any, inputs: Any) -> Any:
    """The linear model."""
    return inputs @ weights


def measure(well: RegressionWell, plan: Plan) -> pd.DataFrame:
    """Passage times of SGD from the minimum, in the form of a measured table; n is left empty."""
    rows = []
    for number, ratio in enumerate(plan.thresholds):
        record = measure_escape(
            predict,
            jnp.asarray(well.minimum, jnp.float32),
            well.inputs,
            well.targets,
            learning_rate=LEARNING_RATE,
            batch_size=BATCH_SIZE,
            loss_barrier=ratio * well.loss_minimum,
            replicas=plan.runs,
            steps=plan.budget,
            start="minimum",
            looks="exact",
            hessian_minimum=well.curvature,
            run_prefix=f"{number}-",
            seed=1000 * well.dimension + number,
        )
        rows.append(record.rows)
    table = pd.concat(rows, ignore_index=True).assign(loss_minimum=well.loss_minimum)
    table.insert(0, "minimum", f"d{well.dimension}")
    return table


def simulate(well: RegressionWell, plan: Plan, seed: int) -> pd.DataFrame:
    """The same design on the law's own diffusion, with as many iterations and one Gaussian step for each."""
    design = pd.DataFrame(
        {
            "minimum": f"d{well.dimension}",
            "learning_rate": LEARNING_RATE,
            "batch_size": BATCH_SIZE,
            "loss_minimum": well.loss_minimum,
            "loss_barrier": well.loss_minimum * np.array(plan.thresholds),
            "hessian_minimum": well.curvature,
            "runs": plan.runs,
            "max_steps": plan.budget,
            "start": "minimum",
        }
    )
    world = World(noise="loss", dimension=well.dimension, barrier="threshold", time_step=None)
    return ei.simulate_sde(world, design, seed=seed).drop(columns="effective_dimension", errors="ignore")


@float64
def theory_rates(table: pd.DataFrame, thresholds: np.ndarray, dimension: int) -> np.ndarray:
    """Rate of the exact law at T = eta h*/B and n = d for each threshold c, per unit time."""
    first = table.iloc[0]
    setting = ei.Setting(
        *(jnp.full(len(thresholds), value) for value in (LEARNING_RATE, BATCH_SIZE, 1.0, first["loss_minimum"])),
        log_barrier=jnp.log(jnp.asarray(thresholds)),
        hessian_minimum=jnp.full(len(thresholds), first["hessian_minimum"]),
        hessian_saddle=jnp.full(len(thresholds), jnp.nan),
        barrier="threshold",
        start="minimum",
    )
    return np.exp(np.asarray(ei.threshold_log_rate(setting, setting.diffusion_scale, dimension, 1.0)))


def describe(table: pd.DataFrame, dimension: int) -> pd.DataFrame:
    """One row for each threshold: the times, the check of them, and the rate beside the law's at n = d."""
    conditions = ei.aggregate(ei.read_measurements(table))
    check = ei.check_escape(conditions).frame
    frame = conditions.frame
    ratio = (frame["loss_barrier"] / frame["loss_minimum"]).to_numpy()
    steps = (frame["exposure"] / LEARNING_RATE).to_numpy()
    escapes = frame["escapes"].to_numpy()
    with np.errstate(divide="ignore"):
        mean_time = np.where(escapes > 0, steps / escapes, np.nan)
    variation = check["coefficient_of_variation"].to_numpy()
    law = theory_rates(table, ratio, dimension)
    return pd.DataFrame(
        {
            "dimension": dimension,
            "threshold": ratio.round(6),
            "runs": frame["runs"],
            "escapes": escapes,
            "mean_time": mean_time,
            "mean_time_relative_se": np.where(np.isnan(variation), 1.0, variation) / np.sqrt(np.maximum(escapes, 1)),
            "law_mean_time": 1 / (LEARNING_RATE * law),
            "rate_over_law": 1 / (mean_time * LEARNING_RATE * law),
            "coefficient_of_variation": variation,
            "coefficient_of_variation_low": check["coefficient_of_variation_low"],
            "coefficient_of_variation_high": check["coefficient_of_variation_high"],
            "grade": check["grade"],
        }
    )


def straight_line(conditions: pd.DataFrame, inverse_temperature: float) -> dict[str, float]:
    """n as the paper reads it: least squares of log(mean time) on log c, with the 90 % interval of the line's own scatter."""
    own = conditions[conditions["escapes"] >= FEWEST]
    fit = stats.linregress(np.log(own["threshold"]), np.log(own["mean_time"]))
    reach = stats.t.ppf(0.95, len(own) - 2) * fit.stderr
    mean = 2 * (inverse_temperature + 1 - fit.slope)
    return {"slope": fit.slope, "mean": mean, "q05": mean - 2 * reach, "q95": mean + 2 * reach}


def trend(tree: xr.DataTree) -> tuple[float, float, float]:
    """Slope of the residual log rate against log c: posterior mean and 90 % interval. 0 if the law has the right shape."""
    residual = np.asarray(tree.posterior["log_rate_residual"])
    barrier = np.asarray(tree.posterior["log_barrier"])
    residual, barrier = (values.reshape(-1, values.shape[-1]) for values in (residual, barrier))
    centred = barrier - barrier.mean(axis=1, keepdims=True)
    slope = (centred * residual).sum(axis=1) / (centred**2).sum(axis=1)
    return float(slope.mean()), *(float(q) for q in np.quantile(slope, [0.05, 0.95]))


def summarise(tree: xr.DataTree, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of posteriors: one for each parameter of a fit, its discrepancy and its residual trend."""
    about = {**about, "trustworthy": bool(tree.attrs["trustworthy"]), "convergence": tree.attrs["convergence"]}
    about["left_out"] = tree.attrs["left_out"].count("η=")
    rows = []
    for name, row in json.loads(tree.attrs["parameters"]).items():
        kept = {key: row[key] for key in ("mean", "q05", "q95", "moved_by_data", "theory")}
        rows.append({**about, "parameter": name, **kept})
    sigma = np.asarray(tree.posterior["discrepancy"]).ravel()
    low, high = np.quantile(sigma, [0.05, 0.95])
    rows.append({**about, "parameter": "discrepancy", "mean": sigma.mean(), "q05": low, "q95": high})
    mean, low, high = trend(tree)
    return [*rows, {**about, "parameter": "residual_trend", "mean": mean, "q05": low, "q95": high, "theory": 0.0}]


def fit(table: pd.DataFrame, dimension: int, data: str, laws: Sequence[str]) -> list[dict[str, Any]]:
    """Posteriors of some laws; a table that the project refuses, because nothing in it is escape, gives one row that says so."""
    rows: list[dict[str, Any]] = []
    for name in laws:
        about = {"dimension": dimension, "data": data, "law": name}
        try:
            tree = ei.infer(LAWS[name], table, seed=dimension)
        except ei.InputError as error:
            rows.append({**about, "parameter": "refused", "trustworthy": False})
            print(f"d = {dimension}, {data}, {name}: {error}", flush=True)
        else:
            rows += summarise(tree, about)
            print(f"d = {dimension}, {data}, {name}: {tree.attrs['convergence']}", flush=True)
    return rows


def line_rows(conditions: pd.DataFrame, inverse_temperature: float) -> list[dict[str, Any]]:
    """The straight line's slope and n for one dimension, as rows of the table of posteriors."""
    found = straight_line(conditions, inverse_temperature)
    about = {name: conditions[name].iloc[0] for name in ("dimension", "data")}
    about |= {"law": "straight_line", "trustworthy": True}
    return [
        {**about, "parameter": "slope", "mean": found.pop("slope")},
        {**about, "parameter": "effective_dimension", **found},
    ]


def choose(table: pd.DataFrame, data: str, law: str, parameter: str) -> pd.DataFrame:
    """Rows of the table of posteriors, one for each dimension."""
    chosen = (table["data"] == data) & (table["law"] == law) & (table["parameter"] == parameter)
    return table[chosen].sort_values("dimension").reset_index(drop=True)


def draw(conditions: pd.DataFrame, table: pd.DataFrame) -> plt.Figure:
    """Mean times with the law and the straight lines; their ratio to the law; n by four ways; q and the temperature."""
    figure, ((times, ratio), (number, others)) = plt.subplots(2, 2, figsize=(9.2, 7.6), constrained_layout=True)
    dimensions = sorted(conditions["dimension"].unique())
    for colour, d in zip(("C0", "C1", "C2", "C3", "C4"), dimensions, strict=False):
        own = conditions[(conditions["dimension"] == d) & (conditions["escapes"] > 0)]
        style = {"color": colour, "marker": "o", "ms": 3.5, "lw": 0.9, "capsize": 2, "ls": ""}
        spread = np.exp(1.645 * own["mean_time_relative_se"])
        error = [own["mean_time"] * (1 - 1 / spread), own["mean_time"] * (spread - 1)]
        times.errorbar(own["threshold"], own["mean_time"], error, **style, label=f"d = {d}")
        times.plot(own["threshold"], own["law_mean_time"], color=colour, lw=0.9)
        slope = choose(table[table["dimension"] == d], "sgd", "straight_line", "slope")["mean"].iloc[0]
        fitted = own[own["escapes"] >= FEWEST]
        middle = np.exp(np.log(fitted["mean_time"]).mean() - slope * np.log(fitted["threshold"]).mean())
        times.plot(own["threshold"], middle * own["threshold"] ** slope, color=colour, lw=0.7, ls=":")
        over = own["rate_over_law"]
        ratio.errorbar(own["threshold"], over, [over * (1 - 1 / spread), over * (spread - 1)], **{**style, "ls": "-"})
    times.set(xscale="log", yscale="log", xlabel="threshold c (loss L/L*)", ylabel="mean passage time (iterations)")
    times.set_title("lines: exact law at n = d, T = ηh*/B; dotted: straight lines", fontsize=8)
    times.legend(frameon=False, fontsize=7)
    ratio.axhline(1, color="k", ls="--", lw=0.8)
    ratio.set(xscale="log", yscale="log", xlabel="threshold c (loss L/L*)", ylabel="measured rate / exact law at n = d")
    for axes in (times, ratio):
        axes.set_xticks(ticks := [1.1, 1.3, 1.6, 2, 2.5, 3], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    ratio.set_yticks(ticks := [0.03, 0.1, 0.3, 1, 2], [f"{tick:g}" for tick in ticks])
    _draw_estimates(number, table)
    _draw_others(others, table)
    return figure


WAYS = (
    ("sgd", "straight_line", "straight line, T = ηh*/B (below 0: at the edge)", "C7", "v"),
    ("sgd", "theory", "exact law, T = ηh*/B", "C0", "o"),
    ("sgd", "power_law", "exact law, T free", "C1", "s"),
    ("diffusion", "theory", "control: the law's own diffusion, T = ηh*/B", "C2", "D"),
)


def _draw_estimates(axes: plt.Axes, table: pd.DataFrame) -> None:
    """n by each way against d; a straight line's n below zero is drawn at the lower edge."""
    floor = 0.1
    for shift, (data, law, label, colour, marker) in zip((0.9, 0.97, 1.03, 1.1), WAYS, strict=True):
        own = choose(table, data, law, "effective_dimension")
        if not len(own):
            continue
        low, mean, high = (own[name].clip(lower=floor).to_numpy() for name in ("q05", "mean", "q95"))
        style = {"color": colour, "marker": marker, "ms": 4, "lw": 1, "capsize": 2, "ls": ""}
        axes.errorbar(
            own["dimension"] * shift,
            mean,
            [np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
            **style,
            label=label,
        )
    ends = np.array([0.8, 20])
    axes.loglog(ends, ends, "k--", lw=0.8, label="truth n = d")
    axes.set(xlabel="dimension d", ylabel="effective dimension n, 90 % interval", ylim=(floor * 0.9, None))
    axes.legend(frameon=False, fontsize=7)
    axes.set_xticks(own_ticks := sorted(table["dimension"].unique()), [str(d) for d in own_ticks])
    axes.minorticks_off()


def _draw_others(axes: plt.Axes, table: pd.DataFrame) -> None:
    """q and the temperature's factor for every dimension."""
    shown = (
        ("noise_exponent", "noise_exponent", "noise exponent q", "C3", "o", 0.95),
        ("power_law", "temperature_scale", "temperature scale α of the power law", "C1", "s", 1.05),
    )
    for law, parameter, label, colour, marker, shift in shown:
        own = choose(table, "sgd", law, parameter)
        style = {"color": colour, "marker": marker, "ms": 4, "lw": 1, "capsize": 2, "ls": ""}
        error = [own["mean"] - own["q05"], own["q95"] - own["mean"]]
        axes.errorbar(own["dimension"] * shift, own["mean"], error, **style, label=label)
        doubtful = own[~own["trustworthy"].astype(bool)]
        axes.plot(doubtful["dimension"] * shift, doubtful["mean"], "x", color="k", ms=9, label="_")
    axes.axhline(1, color="k", ls="--", lw=0.8, label="theory: both 1")
    axes.set(xscale="log", xlabel="dimension d", ylabel="q and α, 90 % interval")
    axes.set_title("crossed out: a fit that the project calls not trustworthy", fontsize=8)
    axes.set_xticks(ticks := sorted(table["dimension"].unique()), [str(d) for d in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7)


def _listed(rows: pd.DataFrame, truth: Sequence[float] | None = None) -> tuple[str, int]:
    """The intervals in words, and how many contain the truth (by default d)."""
    truth = rows["dimension"] if truth is None else truth
    words = [f"d = {r.dimension}: {r.mean:.2g} [{r.q05:.2g}, {r.q95:.2g}]" for r in rows.itertuples()]
    return "; ".join(words), int(((rows["q05"] <= truth) & (truth <= rows["q95"])).sum())


def _verdict(contained: int, total: int) -> str:
    """Nine intervals in ten should contain the truth; how many misses are too many, and how many leave it open."""
    chance = float(stats.binom.sf(total - contained - 1, total, 0.1))
    return "cannot tell" if not total or 0.05 < chance < 0.2 else "agree" if chance >= 0.2 else "differ"


def make_claims(conditions: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    """What the paper says, beside the fits, and what the project's own checks say of them."""
    claims = []
    texts = {
        "straight_line": "the slope of log(mean time) against log c is B/(ηh*) + 1 − n/2 with n = d: n by the straight line",
        "theory": "mean passage times follow from noise ∝ L with n = d at T = ηh*/B: n by the exact passage law, n latent",
        "power_law": "the same with T free by a factor α: n by the project's power_law",
    }
    for law, text in texts.items():
        own = choose(table, "sgd", law, "effective_dimension")
        words, contained = _listed(own)
        if len(control := choose(table, "diffusion", law, "effective_dimension")):
            found, right = _listed(control)
            words += f". Control on the law's own diffusion: {found} ({right} of {len(control)} contain d)"
        claims.append(Claim(text, f"{words}; {contained} of {len(own)} contain d", _verdict(contained, len(own))))
    for law, parameter, text in (
        ("power_law", "temperature_scale", "the temperature is ηh*/B: its factor α is 1"),
        ("noise_exponent", "noise_exponent", "the noise is proportional to the loss: q = 1 in noise ∝ L^q"),
    ):
        own = choose(table, "sgd", law, parameter)
        doubt = own[~own["trustworthy"].astype(bool)]["dimension"].tolist()
        words, contained = _listed(own, np.ones(len(own)))
        words += f"; {contained} of {len(own)} contain 1" + (f"; fits not trustworthy at d = {doubt}" if doubt else "")
        claims.append(Claim(text, words, "cannot tell" if len(doubt) > len(own) / 2 else _verdict(contained, len(own))))
    claims.append(_check_claim(conditions, table))
    return claims


def _check_claim(conditions: pd.DataFrame, table: pd.DataFrame) -> Claim:
    """What the checks say for each dimension, against where the rates really leave the law."""
    words, spoken = [], []
    for dimension, own in conditions[conditions["data"] == "sgd"].groupby("dimension"):
        tested = own[own["grade"] != "untested"]
        grades = ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in tested["grade"].value_counts().items()
        )
        said = [grades]
        for law, parameter, name in (
            ("theory", "discrepancy", "σ"),
            ("theory", "residual_trend", "residual trend"),
            ("power_law", "temperature_scale", "α"),
        ):
            row = choose(table, "sgd", law, parameter)
            row = row[row["dimension"] == dimension]
            if len(row):
                said.append("{} {:.2g} [{:.2g}, {:.2g}]".format(name, *row.iloc[0][["mean", "q05", "q95"]]))
        reliable = own[own["escapes"] >= 20]
        worst = float(np.abs(np.log(reliable["rate_over_law"])).max())
        words.append(f"d = {dimension}: rates off by up to a factor {np.exp(worst):.2f}; " + ", ".join(said))
        spoken.append((worst > np.log(1.5), _speaks(own, table, dimension)))
    right = sum(off == loud for off, loud in spoken)
    text = "where the law fails by more than a factor of 1.5, the checks say so (delayed or not escape, trend, α off 1)"
    return Claim(text, ". ".join(words), "agree" if right == len(spoken) else "differ")


def _speaks(own: pd.DataFrame, table: pd.DataFrame, dimension: int) -> bool:
    """Whether most conditions are not memoryless, or a trend of the residuals or the temperature leaves the theory's value."""
    tested = own[own["grade"] != "untested"]
    loud = bool((tested["grade"] != "memoryless").mean() > 0.5)
    for law, parameter, value in (("theory", "residual_trend", 0.0), ("power_law", "temperature_scale", 1.0)):
        row = choose(table, "sgd", law, parameter)
        row = row[row["dimension"] == dimension]
        loud |= bool(len(row)) and not bool(row["q05"].iloc[0] <= value <= row["q95"].iloc[0])
    return loud


@dataclass(frozen=True)
class Study:
    """One dimension's runs, their conditions, and the posteriors from them."""

    data: str
    runs: pd.DataFrame
    conditions: pd.DataFrame
    posteriors: list[dict[str, Any]]


def study(dimension: int, data: str, plan: Plan, laws: Sequence[str]) -> Study:
    """Measure (``sgd``) or simulate (``diffusion``), check and fit."""
    well = make_well(SAMPLES, dimension)
    runs = measure(well, plan) if data == "sgd" else simulate(well, plan, dimension)
    conditions = describe(runs, dimension).assign(data=data)
    print(f"d = {dimension}, {data}: measured", flush=True)
    line = line_rows(conditions, BATCH_SIZE / (LEARNING_RATE * well.curvature))
    return Study(data, runs, conditions, fit(runs, dimension, data, laws) + line)


def main(reproduction: Reproduction) -> list[Claim]:
    """Measure, check and fit, dimensions side by side; draw. The control's fits come last."""
    plan = QUICK if reproduction.quick else FULL
    laws = ["power_law"] if reproduction.quick else list(LAWS)
    jobs = [(dimension, "sgd", plan, laws) for dimension in plan.dimensions]
    jobs += [(dimension, "diffusion", plan, ["theory"]) for dimension in plan.dimensions]
    if reproduction.quick:
        studies = [study(*job) for job in jobs]
    else:
        with processes(WORKERS) as pool:
            studies = list(pool.map(study, *zip(*jobs, strict=True)))
    conditions = pd.concat([one.conditions for one in studies], ignore_index=True)
    conditions = conditions.sort_values(["data", "dimension", "threshold"], ascending=[False, True, True])
    table = pd.DataFrame([row for one in studies for row in one.posteriors])
    measured = [
        one.runs for one in sorted(studies, key=lambda one: one.conditions["dimension"].iloc[0]) if one.data == "sgd"
    ]
    reproduction.table("runs", pd.concat(measured, ignore_index=True), RUNS_TABLE)
    reproduction.table("conditions", conditions, CONDITIONS_TABLE)
    reproduction.table("posteriors", table, POSTERIORS_TABLE)
    reproduction.figure("passage", draw(conditions[conditions["data"] == "sgd"], table), FIGURE)
    return make_claims(conditions, table)


RUNS_TABLE = (
    "The measured table, readable by escape-inference: one row for each run of SGD from the minimum; n is left empty."
)
CONDITIONS_TABLE = (
    "One row for each threshold, d and kind of data (sgd, or the law's own diffusion as a control): mean passage time in "
    "iterations (all iterations over escapes), the exact law's at n = d and T = eta h*/B, and the check for memoryless escape"
)
POSTERIORS_TABLE = (
    "One row for each parameter of each fit, mean and 90 % interval: laws theory (T = eta h*/B held), power_law, noise_exponent, "
    "and the straight line; residual_trend is the slope of the residual log rate against log c"
)
FIGURE = (
    "Mean passage times against the exact law and straight lines; measured rates over the law's; the effective dimension by "
    "four ways beside the truth; noise exponent and temperature scale"
)

if __name__ == "__main__":
    run("passage_times", "Passage times in linear regression", __doc__, main)
