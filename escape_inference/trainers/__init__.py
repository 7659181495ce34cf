"""Measuring escapes: train minima, measure their spectra and noise, time escapes, and raise the learning rate."""

from escape_inference.trainers.escape import EscapeRecord, UnstableMinimum, measure_escape
from escape_inference.trainers.hessian import HessianSpectrum, top_hessian
from escape_inference.trainers.minimum import Minimum, train_minimum
from escape_inference.trainers.ramp import RampRecord, learning_rate_levels, measure_ramp

__all__ = [
    "EscapeRecord",
    "HessianSpectrum",
    "Minimum",
    "RampRecord",
    "UnstableMinimum",
    "learning_rate_levels",
    "measure_escape",
    "measure_ramp",
    "top_hessian",
    "train_minimum",
]
