"""The decoupling approximation: the spectra of (1/N) sum l C and of L (1/N) sum C, at initialisation and along training.

    python scripts/reproduce_decoupling.py [--quick] [--output data/reproduction]

The published set-up: the first 10^4 samples of MNIST, even digits +1 and odd ones -1, two hidden layers of 100 ReLU,
eta = 0.01, B = 100, spectra at initialisation and after 50 and 500 epochs. Here the 5,000 digits that ship with the project
take their place. Independent runs differ in initialisation, in batches and in the 1,000 of these digits whose gradients make
the spectra; intervals are those of one further run of this kind, wider than those of the mean over runs.

The two spectra are compared rank by rank. ``Large`` are the first eigenvalues, which together make 90 % of the trace and so of
the noise (a fraction of the largest one would take in nearly all ranks of a small sample), ``small`` the lowest tenth of all
ranks. The typical factor of a group is exp(rms log ratio), 1 where the spectra are equal. Beside it stands the same
factor after the errors of the samples are exchanged in a random order: what finitely many samples give by chance if losses and
gradients have nothing to do with each other, which is the approximation itself.

Rules: spectra agree, as on the logarithmic axis of the published figure, when the interval of the
typical factor lies below 2, and differ when it lies above. The approximation as an equality, sum l |grad f|^2 = L sum |grad f|^2
(the traces, which fix the noise strength), agrees when the interval of their ratio contains 1 and reaches no further than 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.ticker import NullFormatter
from reproduction import Claim, Reproduction, across_runs, run

from escape_inference.trainers import DecouplingCheck, train_minimum
from escape_inference.trainers.datasets import load_data
from escape_inference.trainers.decoupling import sample_kernel
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.sgd import root_key

LEARNING_RATE, BATCH, WIDTHS = 0.01, 100, [100, 100]
LARGE, SMALL = 0.9, 0.1  #: fraction of the trace; fraction of the ranks
FACTOR, TRACE_REACH = 2.0, 0.1
FLOOR = 1e-12  #: of the largest eigenvalue: single precision of the gradients holds nothing below
BLUE, RED, GREY = "#1f6f8b", "#c8553d", "0.55"


@dataclass(frozen=True)
class Design:
    """Samples in a spectrum, epochs at which it is taken, independent runs."""

    samples: int
    epochs: tuple[int, ...]
    runs: int


FULL = Design(1000, (0, 50, 500), 4)
QUICK = Design(300, (0, 5, 50), 3)


def log_ratio(check: DecouplingCheck, coupled: Float[np.ndarray, " m"] | None = None) -> Float[np.ndarray, " m"]:
    """Log of the coupled over the decoupled eigenvalue of each rank, neither counted as less than the floor."""
    left, right = check.coupled if coupled is None else coupled, check.decoupled
    return np.log(np.maximum(left, FLOOR * left[0]) / np.maximum(right, FLOOR * right[0]))


def groups(check: DecouplingCheck) -> dict[str, slice]:
    """The ranks that are called large and small."""
    ranks = len(check.decoupled)
    large = leading(check.decoupled)
    return {"large": slice(0, large), "small": slice(ranks - max(round(SMALL * ranks), 1), ranks)}


def leading(eigenvalues: Float[np.ndarray, " m"]) -> int:
    """The number of eigenvalues, largest first, that make the large part of the trace.

    >>> leading(np.array([6.0, 2.0, 1.0, 0.5, 0.5]))
    3
    """
    return int(np.searchsorted(np.cumsum(eigenvalues), LARGE * eigenvalues.sum() * (1 - 1e-12))) + 1


def typical_factor(ratio: Float[np.ndarray, " m"]) -> float:
    """How far the spectra are apart, as a factor of at least 1.

    >>> typical_factor(np.log([3.0, 1 / 3])).__round__(6)
    3.0
    """
    return float(np.exp(np.sqrt(np.mean(ratio**2))))


def summarise(check: DecouplingCheck, exchanged: DecouplingCheck) -> list[dict[str, float | str]]:
    """A row for each group of eigenvalues."""
    rows: list[dict[str, float | str]] = []
    for group, ranks in groups(check).items():
        here, by_chance = log_ratio(check)[ranks], log_ratio(check, exchanged.coupled)[ranks]
        rows.append(
            {
                "group": group,
                "ranks": ranks.stop - ranks.start,
                "smallest": float(check.decoupled[ranks][-1] / check.decoupled[0]),
                "ratio": float(np.exp(here.mean())),
                "factor": typical_factor(here),
                "factor_exchanged": typical_factor(by_chance),
                "trace_ratio": float(check.coupled.sum() / check.decoupled.sum()),
                "trace_ratio_exchanged": float(exchanged.coupled.sum() / exchanged.decoupled.sum()),
                "matrix_distance": check.matrix_distance,
                "matrix_distance_exchanged": exchanged.matrix_distance,
            }
        )
    return rows


def measure(design: Design) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The spectra of every run and epoch; and a row for each group of eigenvalues, with half of the samples too."""
    data = load_data("mnist_two_class")
    network = load_network("multilayer_perceptron", data, {"widths": WIDTHS})
    problem = jnp.asarray(data.inputs), jnp.asarray(data.targets)
    spectra, distances = [], []
    for seed in range(design.runs):
        start, rng = network.init(root_key(seed)), np.random.default_rng(seed)
        for epoch in design.epochs:
            at = start
            if epoch:
                at = train_minimum(
                    network.apply, start, *problem, learning_rate=LEARNING_RATE, batch_size=BATCH,
                    steps=epoch * (data.samples // BATCH), seed=seed,
                ).params  # fmt: skip
            found = sample_kernel(network.apply, at, *problem, samples=design.samples, seed=seed)
            for size in (design.samples // 2, design.samples):
                chosen = np.arange(size)
                check, exchanged = found.check(chosen), found.check(chosen, rng.permutation(size))
                point = {"run": seed, "epoch": epoch, "samples": size, "loss": float(found.losses[:size].mean())}
                distances += [point | row for row in summarise(check, exchanged)]
            ranks = {"run": seed, "epoch": epoch, "rank": np.arange(1, len(check.coupled) + 1)}
            sides = {"coupled": check.coupled, "decoupled": check.decoupled, "exchanged": exchanged.coupled}
            spectra.append(pd.DataFrame(ranks | sides))
    return pd.concat(spectra, ignore_index=True), pd.DataFrame(distances)


def judge(interval: Sequence[float], limit: float) -> str:
    """Whether spectra agree within a factor."""
    return "agree" if interval[2] < limit else "differ" if interval[1] > limit else "cannot tell"


def factor_interval(values: Sequence[float]) -> list[float]:
    """The typical factor of one further run, from that of each run; the interval is made in the logarithm."""
    return [max(float(np.exp(value)), 1.0) for value in across_runs(np.log(values).tolist(), single=True)]


def claims_of(distances: pd.DataFrame, design: Design) -> list[Claim]:
    """The paper's statements beside what the runs gave."""
    claims = []
    whole = distances[distances["samples"] == design.samples]
    for epoch in design.epochs:
        when = "at initialisation" if epoch == 0 else f"after {epoch} epochs"
        large, small = (whole[(whole["epoch"] == epoch) & (whole["group"] == group)] for group in ("large", "small"))
        loss = f"L ≈ {large['loss'].mean():.2g}"
        apart, below = factor_interval(large["factor"].tolist()), factor_interval(small["factor"].tolist())
        claims.append(
            Claim(
                f"{when}: the spectra of both sides agree but for the smallest eigenvalues",
                f"{loss}; the {large['ranks'].min()} to {large['ranks'].max()} eigenvalues that make 90 % of the trace are "
                f"typically a factor {apart[0]:.2f} ({apart[1]:.2f} to {apart[2]:.2f}) apart, mean ratio "
                f"{large['ratio'].mean():.2f} ({large['factor_exchanged'].mean():.2f} apart by chance)",
                judge(apart, FACTOR),
            )
        )
        claims.append(
            Claim(
                f"{when}: the smallest eigenvalues are the exception",
                f"lowest tenth: a factor {below[0]:.3g} ({below[1]:.3g} to {below[2]:.3g}) apart, "
                f"{small['factor_exchanged'].mean():.3g} with the errors exchanged at random",
                {"agree": "differ", "differ": "agree"}.get(judge(below, FACTOR), "cannot tell"),
            )
        )
        trace = across_runs(large["trace_ratio"].tolist(), single=True)
        equal = trace[1] <= 1 <= trace[2]
        claims.append(
            Claim(
                f"{when}: Σ ℓ C = L Σ C as an equality, in the trace",
                f"ratio {trace[0]:.2f} ({trace[1]:.2f} to {trace[2]:.2f}), {large['trace_ratio_exchanged'].mean():.2f} by "
                f"chance; Frobenius norm of the difference {large['matrix_distance'].mean():.2f} of the matrix, "
                f"{large['matrix_distance_exchanged'].mean():.2f} by chance",
                "differ" if not equal else "agree" if (trace[2] - trace[1]) / 2 <= TRACE_REACH else "cannot tell",
            )
        )
    return claims


def draw(spectra: pd.DataFrame, design: Design) -> plt.Figure:
    """The eigenvalue distributions of both sides, and their ratio by rank."""
    figure, axes = plt.subplots(2, len(design.epochs), figsize=(9, 5.4), layout="constrained", sharey="row")
    sides = (
        ("decoupled", "L (1/N) Σ C", BLUE),
        ("coupled", "(1/N) Σ ℓ C", RED),
        ("exchanged", "errors exchanged", GREY),
    )
    for (upper, lower), epoch in zip(axes.T, design.epochs, strict=True):
        here = spectra[spectra["epoch"] == epoch]
        top = here["decoupled"].max()
        edges = np.linspace(np.log10(FLOOR), 0.5, 41)
        middle = 10 ** (0.5 * (edges[1:] + edges[:-1])) * top
        for side, label, colour in sides:
            values = np.log10(np.clip(here[side].to_numpy() / top, 1.01 * FLOOR, None))
            counts = np.stack([np.histogram(values[here["run"] == seed], edges)[0] for seed in range(design.runs)])
            style = {"color": colour, "ls": "--" if side == "exchanged" else "-", "lw": 1.1}
            upper.step(middle, counts.mean(0), where="mid", label=label, **style)
            upper.fill_between(middle, counts.min(0), counts.max(0), step="mid", color=colour, alpha=0.2, lw=0)
            if side == "decoupled":
                continue
            ratio = np.stack([_floored(one[side]) / _floored(one["decoupled"]) for _, one in here.groupby("run")])
            logs = np.log(ratio)
            low, high = (np.exp(edge) for edge in np.transpose([across_runs(c, single=True)[1:] for c in logs.T]))
            ranks = np.arange(1, ratio.shape[1] + 1)
            lower.plot(ranks, np.exp(logs.mean(0)), label=label, **style)
            if side == "coupled":
                lower.fill_between(ranks, low, high, color=colour, alpha=0.2, lw=0)
        large = np.mean([leading(one["decoupled"].to_numpy()) for _, one in here.groupby("run")])
        lower.axvline(large, color="k", lw=0.7, ls=":")
        lower.axhspan(1 / FACTOR, FACTOR, color="k", alpha=0.07, lw=0)
        lower.axhline(1, color="k", lw=0.7)
        upper.set_title("initialisation" if epoch == 0 else f"{epoch} epochs")
        upper.set(xscale="log", yscale="symlog", xlabel="eigenvalue (loss / time)", ylim=(0, None))
        lower.set(xscale="log", yscale="log", xlabel="rank", ylim=(1e-3, 10))
        upper.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("eigenvalues in a bin")
    axes[1, 0].set_ylabel("ratio to L (1/N) Σ C")
    axes[0, 0].legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def _floored(values: pd.Series) -> Float[np.ndarray, " m"]:
    return np.maximum(values.to_numpy(), FLOOR * values.iloc[0])


def main(reproduction: Reproduction) -> list[Claim]:
    """Measure, write tables and figure, return the claims."""
    design = QUICK if reproduction.quick else FULL
    spectra, distances = measure(design)
    kept = spectra[spectra["rank"].isin(np.unique(np.geomspace(1, spectra["rank"].max(), 120).round()))]
    reproduction.table(
        "distances", distances,
        "Distance of the spectra of both sides (rank by rank, as a factor), of their traces and of the matrices, in each run.",
    )  # fmt: skip
    reproduction.table("spectra", kept, "Eigenvalues of both sides at 120 ranks of each run, loss / time.")
    reproduction.figure(
        "spectra", draw(spectra, design),
        f"Eigenvalue distributions of both sides of the decoupling approximation ({design.runs} runs, band: their range) and the "
        "ratio by rank (band: 90 % interval of one run; grey: within a factor 2; dotted: 90 % of the trace lie to the left).",
    )  # fmt: skip
    return claims_of(distances, design)


if __name__ == "__main__":
    run("decoupling", "Decoupling approximation", __doc__, main)
