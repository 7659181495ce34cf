"""Measuring escapes: train minima, measure their Hessian, and time how long SGD stays in them."""

from escape_inference.trainers.escape import EscapeRecord, UnstableMinimum, measure_escape
from escape_inference.trainers.hessian import HessianSpectrum, top_hessian
from escape_inference.trainers.minimum import Minimum, train_minimum

__all__ = [
    "EscapeRecord",
    "HessianSpectrum",
    "Minimum",
    "UnstableMinimum",
    "measure_escape",
    "top_hessian",
    "train_minimum",
]
