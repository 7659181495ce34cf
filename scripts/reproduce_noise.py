"""The strength of SGD's noise against the loss along training, and its covariance against 2 L H / B.

    python scripts/reproduce_noise.py [--quick] [--output data/reproduction]

The published set-up: eta = 0.1, B = 100, the noise strength N(theta) and the loss at every epoch of a fully connected and of
a convolutional network. Here both are trained on the 5,000 digits in two classes that ship with the project, fully connected
with two hidden layers of 100, convolutional with two layers of 5 x 5 kernels (8 and 16 channels, stride 2) and a hidden layer
of 64. An epoch has 50 iterations, a twelfth of one of the full MNIST, so there are more of them, and the convolutional network is
looked at every second one.

The slope of log N against log L counts the snapshots of the second half of training as late; the last quarter and the whole
are in the table too. Independent runs differ in initialisation and batches, and the interval of a mean is that over runs.

Rules, fixed before the measurement: a value agrees with 1 when its 90 % interval contains 1 and reaches no further than 0.1
(slope) or 0.25 (ratio) from its middle, differs when the interval excludes 1, and is open otherwise. The covariance is aligned
with the Hessian when the whole interval of the cosine lies above 0.9, and not when it lies below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Array
from matplotlib.ticker import NullFormatter
from reproduction import Claim, Reproduction, across_runs, run

from escape_inference.trainers import noise_along_training, noise_covariance, top_hessian, train_minimum
from escape_inference.trainers.datasets import Dataset, load_data
from escape_inference.trainers.networks import Network, load_network
from escape_inference.trainers.noise import log_log_slope
from escape_inference.trainers.sgd import root_key

LEARNING_RATE, BATCH = 0.1, 100
DIRECTIONS = 10  #: eigenvectors along which the covariance is measured
WINDOWS = {"late": 0.5, "last quarter": 0.75, "whole": 0.0}  #: from which part of training on
SLOPE_REACH, RATIO_REACH, ALIGNED = 0.1, 0.25, 0.9
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#8d6a9f", "#e0a030")


@dataclass(frozen=True)
class Design:
    """What is measured for one network.

    Attributes:
        label: in tables and figures.
        network: its built-in name.
        options: of the network.
        epochs: of training.
        every: epochs between two snapshots.
        runs: independent initialisations and batches.
        early: epoch of the first covariance; the second is at the end.
    """

    label: str
    network: str
    epochs: int
    every: int
    runs: int
    early: int
    options: dict[str, Any] = field(default_factory=dict)


PERCEPTRON = {"widths": [100, 100]}
FULL = (
    Design("fully connected", "multilayer_perceptron", 400, 1, 4, 10, PERCEPTRON),
    Design("convolutional", "convolutional", 200, 2, 3, 10),
)
QUICK = (
    Design("fully connected", "multilayer_perceptron", 60, 1, 2, 10, PERCEPTRON),
    Design("convolutional", "convolutional", 40, 1, 2, 10, {"channels": [4, 8], "widths": [16]}),
)


def measure_noise(
    design: Design, network: Network, data: Dataset, problem: tuple[Array, Array]
) -> tuple[pd.DataFrame, pd.DataFrame, list[Any]]:
    """Loss and noise at every snapshot of every run; the slopes, with their intervals within a run; where the runs ended."""
    epoch = data.samples // BATCH
    steps = design.epochs * epoch
    traces, slopes, ends = [], [], []
    for seed in range(design.runs):
        trace = noise_along_training(
            network.apply, network.init(root_key(seed)), *problem, learning_rate=LEARNING_RATE, batch_size=BATCH,
            steps=steps, every=design.every * epoch, seed=seed,
        )  # fmt: skip
        table = trace.table.assign(noise_over_loss=trace.table["noise_strength"] / trace.table["loss"])
        traces.append(table.assign(network=design.label, run=seed))
        for window, begin in WINDOWS.items():
            part = table[table["step"] > begin * steps]
            found = log_log_slope(part["loss"].to_numpy(), part["noise_strength"].to_numpy(), seed=seed)
            reach = {"largest_loss": part["loss"].max(), "smallest_loss": part["loss"].min()}
            slope = dict(zip(("slope", "slope_q025", "slope_q975"), found, strict=True))
            start = {"network": design.label, "run": seed, "window": window, "from_epoch": part["epoch"].min()}
            slopes.append(start | reach | slope)
        ends.append(trace.params)
    return pd.concat(traces), pd.DataFrame(slopes), ends


def measure_covariance(
    design: Design, network: Network, data: Dataset, problem: tuple[Array, Array], ends: Sequence[Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The covariance along the top of the Hessian, early and at the end of the same runs; a row for each direction, and
    one for each point."""
    directions, points = [], []
    for seed in range(design.runs):
        early = train_minimum(
            network.apply, network.init(root_key(seed)), *problem, learning_rate=LEARNING_RATE, batch_size=BATCH,
            steps=design.early * (data.samples // BATCH), seed=seed,
        )  # fmt: skip
        for epochs, at in ((design.early, early), (design.epochs, ends[seed])):
            spectrum = top_hessian(network.apply, at, *problem, k=2 * DIRECTIONS)
            top = slice(DIRECTIONS)
            found = noise_covariance(network.apply, at, *problem, spectrum.eigenvalues[top], spectrum.eigenvectors[top])
            point = {"network": design.label, "run": seed, "epoch": epochs}
            outlier = np.arange(DIRECTIONS) < spectrum.outliers
            directions.append(found.table.assign(**point, outlier=outlier))
            values = spectrum.eigenvalues[top]
            points.append(
                point
                | {
                    "loss": float(found.table["predicted"].iloc[0] / (2 * values[0])),
                    "outliers": spectrum.outliers,
                    "outliers_se": spectrum.counted.se,
                    "log_ratio": float(np.log(found.table["ratio"][outlier]).mean()),
                    "alignment": found.alignment,
                    "alignment_se": found.alignment_se,
                    "alignment_if_isotropic": float(values.sum() / np.sqrt(len(values) * (values**2).sum())),
                }
            )
    return pd.concat(directions), pd.DataFrame(points)


def conclusion(interval: Sequence[float], reach: float) -> str:
    """Whether a value is 1, as far as its interval says."""
    _, low, high = interval
    if not low <= 1 <= high:
        return "differ"
    return "agree" if (high - low) / 2 <= reach else "cannot tell"


def claims_of(design: Design, slopes: pd.DataFrame, points: pd.DataFrame) -> list[Claim]:
    """The paper's statements about one network beside what the runs gave."""
    found = {window: across_runs(slopes.loc[slopes["window"] == window, "slope"].to_numpy(float)) for window in WINDOWS}
    late = slopes[slopes["window"] == "late"]
    text = {window: f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})" for window, value in found.items()}
    losses = f"{late['largest_loss'].max():.2g} to {late['smallest_loss'].min():.2g}"
    claims = [
        Claim(
            f"{design.label} network: N ∝ L late in training (slope 1)",
            f"slope {text['late']} over {design.runs} runs, second half of {design.epochs} epochs, L from {losses}; last "
            f"quarter {text['last quarter']}, whole run {text['whole']}",
            conclusion(found["late"], SLOPE_REACH),
        )
    ]
    for when, epoch in (("early", design.early), ("late", design.epochs)):
        here = points[points["epoch"] == epoch]
        ratio = [float(np.exp(value)) for value in across_runs(here["log_ratio"].to_numpy(float))]
        cosine = across_runs(here["alignment"].to_numpy(float))
        loss = f"L ≈ {here['loss'].mean():.1g}"
        claims.append(
            Claim(
                f"{design.label} network, {when}: the noise along the outlier directions is 2 L H / B",
                f"epoch {epoch}, {loss}: measured over predicted {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}), "
                f"{here['outliers'].min()} to {here['outliers'].max()} outliers",
                conclusion(ratio, RATIO_REACH),
            )
        )
        aligned = "agree" if cosine[1] > ALIGNED else "differ" if cosine[2] < ALIGNED else "cannot tell"
        claims.append(
            Claim(
                f"{design.label} network, {when}: the covariance of the noise is aligned with the Hessian",
                f"epoch {epoch}: cosine {cosine[0]:.3f} ({cosine[1]:.3f} to {min(cosine[2], 1):.3f}) within the "
                f"{DIRECTIONS} top directions; isotropic noise would have {here['alignment_if_isotropic'].mean():.2f}",
                aligned,
            )
        )
    return claims


def draw_noise(designs: Sequence[Design], traces: pd.DataFrame, slopes: pd.DataFrame) -> plt.Figure:
    """N and L against the epoch, and against each other."""
    figure, axes = plt.subplots(len(designs), 2, figsize=(8, 3 * len(designs)), squeeze=False, layout="constrained")
    for (left, right), design in zip(axes, designs, strict=True):
        table = traces[traces["network"] == design.label]
        for seed, one in table.groupby("run"):
            label = lambda text, first=seed == 0: text if first else None
            left.plot(one["epoch"], one["noise_strength"], color=COLOURS[1], lw=0.8, label=label("noise strength N"))
            left.plot(one["epoch"], one["loss"], color=COLOURS[0], lw=0.8, label=label("loss L"))
            late = one["epoch"] > design.epochs / 2
            right.plot(
                one["loss"][~late], one["noise_strength"][~late], ".", ms=3, color="0.75", label=label("earlier")
            )
            right.plot(
                one["loss"][late],
                one["noise_strength"][late],
                ".",
                ms=3,
                color=COLOURS[seed],
                label=f"run {seed}, late",
            )
        late = table[table["epoch"] > design.epochs / 2]
        middle = np.exp(np.log(late[["loss", "noise_strength"]]).mean())
        span = np.array([table["loss"].min(), table["loss"].max()])
        right.plot(span, middle["noise_strength"] * span / middle["loss"], "k--", lw=0.9, label="N ∝ L")
        found = across_runs(
            slopes.loc[(slopes["network"] == design.label) & (slopes["window"] == "late"), "slope"].tolist()
        )
        right.set_title(f"late slope {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})")
        left.set_title(f"{design.label}, {design.runs} runs")
        left.set(yscale="log", xlabel="epoch", ylabel="L (loss), N (loss² / parameter²)")
        right.set(xscale="log", yscale="log", xlabel="loss L", ylabel="noise strength N (loss² / parameter²)")
        right.xaxis.set_minor_formatter(NullFormatter())
        left.legend(frameon=False)
        right.legend(frameon=False, fontsize=7)
    return figure


def draw_covariance(designs: Sequence[Design], directions: pd.DataFrame) -> plt.Figure:
    """Measured over predicted variance along every direction, with the error of the samples."""
    figure, axes = plt.subplots(len(designs), 2, figsize=(8, 2.8 * len(designs)), squeeze=False, layout="constrained")
    for row, design in zip(axes, designs, strict=True):
        for axis, epoch in zip(row, (design.early, design.epochs), strict=True):
            here = directions[(directions["network"] == design.label) & (directions["epoch"] == epoch)]
            for seed, one in here.groupby("run"):
                place = one["rank"] + 0.15 * (seed - (design.runs - 1) / 2)
                for outlier, filled in ((True, COLOURS[seed]), (False, "white")):
                    part = one["outlier"] == outlier
                    axis.errorbar(
                        place[part], one["ratio"][part], 1.645 * one["ratio_se"][part], fmt="o", ms=3.5, lw=0.8,
                        color=COLOURS[seed], mfc=filled, label=f"run {seed}" if outlier else None,
                    )  # fmt: skip
            axis.axhline(1, color="k", ls="--", lw=0.9)
            axis.set_title(f"{design.label}, epoch {epoch}")
            axis.set(
                xlabel="rank of the Hessian's eigenvalue", ylabel="B vᵀΣv / (2 L λ)", xticks=range(1, DIRECTIONS + 1)
            )
            axis.set_ylim(bottom=0)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title="filled: outliers"
    )
    return figure


def main(reproduction: Reproduction) -> list[Claim]:
    """Measure both networks, write tables and figures, return the claims."""
    designs = QUICK if reproduction.quick else FULL
    data = load_data("mnist_two_class", {"samples": 1000} if reproduction.quick else {})
    problem = jnp.asarray(data.inputs), jnp.asarray(data.targets)
    parts: list[list[pd.DataFrame]] = [[], [], [], []]
    claims = []
    for design in designs:
        network = load_network(design.network, data, design.options)
        *found, ends = measure_noise(design, network, data, problem)
        found += measure_covariance(design, network, data, problem, ends)
        for part, frame in zip(parts, found, strict=True):
            part.append(frame)
        claims += claims_of(design, found[1], found[3])
    traces, slopes, directions, points = (pd.concat(part, ignore_index=True) for part in parts)
    first = ["network", "run"]
    reproduction.table(
        "strength", traces[[*first, *traces.columns.difference(first, sort=False)]],
        "Loss L, noise strength N and squared gradient along training at eta = 0.1, B = 100.",
    )  # fmt: skip
    reproduction.table(
        "slopes", slopes, "Slope of log N against log L in each run and window, with 95 % intervals by block bootstrap."
    )
    reproduction.table(
        "covariance", directions[[*first, "epoch", *directions.columns.difference([*first, "epoch"], sort=False)]],
        "B times the variance of the gradient noise along the top eigenvectors of the Hessian, against 2 L lambda.",
    )  # fmt: skip
    reproduction.table(
        "alignment", points, "Loss, outliers, mean log ratio along them, and cosine between covariance and Hessian."
    )
    reproduction.figure(
        "strength", draw_noise(designs, traces, slopes),
        "Noise strength and loss along training, and against each other; the title has the mean late slope and its 90 % "
        "interval over runs.",
    )  # fmt: skip
    reproduction.figure(
        "covariance", draw_covariance(designs, directions),
        "Variance of the noise along the Hessian's top eigenvectors over the prediction 2 L lambda / B; bars: 90 % intervals "
        "from the scatter over samples.",
    )  # fmt: skip
    return claims


if __name__ == "__main__":
    run("noise", "Noise strength and covariance", __doc__, main)
