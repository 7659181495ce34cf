"""Measuring escapes: train minima, measure their spectra and noise, time escapes, and raise the learning rate."""

from escape_inference.trainers.covariance import NoiseCovariance, noise_covariance
from escape_inference.trainers.crossings import measure_crossings
from escape_inference.trainers.decoupling import DecouplingCheck, decoupling_check
from escape_inference.trainers.density import SpectralDensity, spectral_density
from escape_inference.trainers.direction import DirectionalCurvature, curvature_along, escape_displacements
from escape_inference.trainers.escape import EscapeRecord, UnstableMinimum, measure_escape
from escape_inference.trainers.exits import find_exits
from escape_inference.trainers.hessian import HessianSpectrum, top_hessian
from escape_inference.trainers.minima import Minima, train_minima
from escape_inference.trainers.minimum import Minimum, train_minimum
from escape_inference.trainers.noise import NoiseStrength, NoiseTrace, noise_along_training, noise_strength
from escape_inference.trainers.outliers import OutlierCount, count_outliers
from escape_inference.trainers.ramp import measure_ramp
from escape_inference.trainers.ramp_record import RampRecord, learning_rate_levels
from escape_inference.trainers.saddle import Saddle, find_saddle
from escape_inference.trainers.way_out import Exit, Exits

__all__ = [
    "DecouplingCheck",
    "DirectionalCurvature",
    "EscapeRecord",
    "Exit",
    "Exits",
    "HessianSpectrum",
    "Minima",
    "Minimum",
    "NoiseCovariance",
    "NoiseStrength",
    "NoiseTrace",
    "OutlierCount",
    "RampRecord",
    "Saddle",
    "SpectralDensity",
    "UnstableMinimum",
    "count_outliers",
    "curvature_along",
    "decoupling_check",
    "escape_displacements",
    "find_exits",
    "find_saddle",
    "learning_rate_levels",
    "measure_crossings",
    "measure_escape",
    "measure_ramp",
    "noise_along_training",
    "noise_covariance",
    "noise_strength",
    "spectral_density",
    "top_hessian",
    "train_minima",
    "train_minimum",
]
