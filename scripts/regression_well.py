"""Linear regression as a well: the loss is exactly ``L* + (theta - theta*)' H (theta - theta*) / 2``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from escape_inference.trainers.datasets import linear_regression


@dataclass(frozen=True)
class RegressionWell:
    """A linear regression and the well of its mean-square loss, in closed form and double precision.

    Attributes:
        inputs: x, [samples, dimension], single precision, as SGD sees them.
        targets: y, [samples].
        minimum: theta*, [dimension].
        loss_minimum: L*, loss.
        hessian: H, [dimension, dimension], 1/time.
    """

    inputs: Float32[np.ndarray, "samples dimension"]
    targets: Float32[np.ndarray, " samples"]
    minimum: Float[np.ndarray, " dimension"]
    loss_minimum: float
    hessian: Float[np.ndarray, "dimension dimension"]

    @property
    def dimension(self) -> int:
        """Number of weights d."""
        return len(self.minimum)

    @property
    def curvature(self) -> float:
        """h*, the mean eigenvalue of the Hessian (all are close to 1), 1/time."""
        return float(np.trace(self.hessian)) / self.dimension

    def excess(self, positions: Float[np.ndarray, "*point dimension"]) -> Float[np.ndarray, "*point"]:
        """``L / L* - 1`` at some positions.

        >>> well = make_well(samples=1000, dimension=2)
        >>> step = np.array([0.3, -0.2])
        >>> residual = well.inputs.astype(float) @ (well.minimum + step) - well.targets
        >>> bool(np.isclose(well.excess(well.minimum + step), np.mean(residual**2) / 2 / well.loss_minimum - 1))
        True
        """
        offset = np.asarray(positions, float) - self.minimum
        return np.einsum("...i,ij,...j", offset, self.hessian, offset) / (2 * self.loss_minimum)


def make_well(samples: int, dimension: int, seed: int = 0) -> RegressionWell:
    """The regression of a standard normal y on an independent standard normal x."""
    inputs, targets = (array.astype(np.float32) for array in linear_regression(samples, dimension, seed))
    x, y = inputs.astype(float), targets.astype(float)
    minimum = np.linalg.lstsq(x, y)[0]
    return RegressionWell(inputs, targets, minimum, float(np.mean((x @ minimum - y) ** 2) / 2), x.T @ x / samples)
