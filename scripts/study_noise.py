"""The noise of SGD on MNIST, as the published experiments measure it.

    python scripts/study_noise.py [--epochs 500] [--samples 1000] [--output results/noise]

A network with two hidden layers of 100 is trained on 5,000 digits in two classes with learning rate 0.01 and batches of 100.
At initialisation, after a tenth of the epochs and at the end: the spectra of both sides of the decoupling approximation and
their distances. At the end: the covariance of the noise along the outlier directions against 2 L H / B. Then, with learning
rate 0.1, the noise strength at every epoch and the slope of its logarithm against that of the loss. Prints the figures, and
writes them as CSV.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import pandas as pd

from escape_inference.trainers import (
    decoupling_check,
    noise_along_training,
    noise_covariance,
    top_hessian,
    train_minimum,
)
from escape_inference.trainers.datasets import load_data
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.sgd import root_key

BATCH = 100


def main(epochs: int, samples: int, output: Path) -> None:
    """Measure and print."""
    output.mkdir(parents=True, exist_ok=True)
    data = load_data("mnist_two_class")
    network = load_network("multilayer_perceptron", data, {"widths": [100, 100]})
    problem = jnp.asarray(data.inputs), jnp.asarray(data.targets)
    start = network.init(root_key(0))
    epoch = data.samples // BATCH
    spectra, at = [], start
    for done in (0, max(epochs // 10, 1), epochs):
        if done:
            settings = {"learning_rate": 0.01, "batch_size": BATCH, "steps": done * epoch, "with_replacement": False}
            at = train_minimum(network.apply, start, *problem, **settings)
        check = decoupling_check(network.apply, at, *problem, samples=samples)
        print(
            f"epoch {done}: decoupling, factor {10**check.log_distance:.2f} between the spectra, "
            f"{check.relative_distance:.2f} of the trace, matrices {check.matrix_distance:.2f} apart"
        )
        sides = {"coupled": check.coupled, "decoupled": check.decoupled[: len(check.coupled)]}
        spectra.append(pd.DataFrame({"epoch": done, "rank": range(1, len(check.coupled) + 1), **sides}))
    pd.concat(spectra).to_csv(output / "decoupling.csv", index=False)
    spectrum = top_hessian(network.apply, at, *problem, k=30)
    print(f"outliers {spectrum.outliers} +- {spectrum.counted.se:.1f}, h* {spectrum.top:.2f}")
    found = noise_covariance(network.apply, at, *problem, spectrum.eigenvalues[:10], spectrum.eigenvectors[:10])
    found.table.to_csv(output / "covariance.csv", index=False)
    print(found.table[["rank", "eigenvalue", "ratio", "ratio_se"]].round(3).to_string(index=False))
    print(f"alignment of the covariance with 2 L H: {found.alignment:.3f}")
    trace = noise_along_training(
        network.apply, start, *problem, learning_rate=0.1, batch_size=BATCH, steps=epoch * min(epochs, 100), every=epoch
    )
    trace.table.to_csv(output / "noise.csv", index=False)
    print(f"log N against log L: slope {trace.slope:.3f}, 95 % from {trace.slope_lower:.3f} to {trace.slope_upper:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("results/noise"))
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.samples, arguments.output)
