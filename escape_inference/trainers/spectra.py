"""What the record of a minimum says about its loss and its Hessian."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Array

from escape_inference.trainers.density import SpectralDensity, spectral_density
from escape_inference.trainers.hessian import HessianSpectrum, top_hessian
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.minimum import Minimum
from escape_inference.trainers.schema import HessianSection

LISTS = ("eigenvalues", "residuals", "gauss_newton_eigenvalues", "gauss_newton_residuals")
"""Entries of a record that hold one number for each eigenvalue."""


def spectrum_record(
    apply: Apply,
    minimum: Minimum,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    section: HessianSection,
    loss: str | SampleLoss,
    seed: int,
) -> dict[str, Any]:
    """Measure what ``[hessian]`` asks for at one minimum.

    Returns:
        A record that JSON can hold. ``outliers`` is their most probable number, ``outliers_se`` its error,
        ``bulk_edge`` the eigenvalue below them and ``outlier_gap`` the ratio between; ``outliers_by_density`` counts
        the eigenvalues above the middle of that gap by stochastic quadrature.
    """
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(minimum.params))
    k = min(section.wanted, parameters)
    settings: dict[str, Any] = {"subsample": section.subsample, "loss": loss, "seed": seed}
    spectrum = top_hessian(apply, minimum, inputs, targets, k=k, **settings)
    counted = spectrum.counted
    error = None if np.isnan(counted.se) else float(counted.se)
    dimensions = {
        "unknown": (None, None),
        "parameters": (parameters, None),
        "outliers": (None, None) if error is None else (counted.count, error),
    }
    dimension, dimension_se = dimensions[section.effective_dimension]
    record = {
        "note": _note(spectrum, section),
        "loss_minimum": float(minimum.loss_minimum),
        "gradient_norm": float(minimum.gradient_norm),
        "hessian_minimum": float(spectrum.top),
        "hessian_minimum_se": float(spectrum.top_se),
        "effective_dimension": dimension,
        "effective_dimension_se": dimension_se,
        "outliers": int(counted.count),
        "outliers_se": error,
        "bulk_edge": None if np.isnan(counted.bulk_edge) else counted.bulk_edge,
        "outlier_gap": None if np.isnan(counted.gap) else counted.gap,
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "residuals": spectrum.residuals.tolist(),
    }
    if section.gauss_newton:
        part = top_hessian(apply, minimum, inputs, targets, k=k, part="gauss_newton", **settings)
        record |= {"gauss_newton_top": part.top, "gauss_newton_outliers": int(part.counted.count)}
        record |= {"gauss_newton_eigenvalues": part.eigenvalues.tolist()}
        record |= {"gauss_newton_residuals": part.residuals.tolist()}
    if section.density_probes:
        settings |= {"probes": section.density_probes, "iterations": section.density_iterations}
        density = spectral_density(apply, minimum, inputs, targets, **settings)
        record |= density_record(density, spectrum, parameters)
    return record


def density_record(density: SpectralDensity, spectrum: HessianSpectrum, parameters: int) -> dict[str, float]:
    """The trace, and the number of eigenvalues above the middle of the gap, with their errors.

    The outliers enter the trace as they are, and only the bulk below them by quadrature, whose error they would decide.
    """
    counted = spectrum.counted
    if np.isnan(counted.bulk_edge):
        trace, error = density.mean(lambda nodes: nodes)
        return {"trace": parameters * trace, "trace_se": parameters * error}
    level = counted.bulk_edge * counted.gap**0.5
    bulk, error = density.mean(lambda nodes: nodes * (nodes <= level))
    outliers = float(spectrum.eigenvalues[: counted.count].sum())
    count, count_se = density.count_above(level)
    return {
        "trace": outliers + parameters * bulk,
        "trace_se": parameters * error,
        "outliers_by_density": count,
        "outliers_by_density_se": count_se,
    }


def spectrum_table(minimum: str, record: dict[str, Any]) -> pd.DataFrame:
    """The eigenvalues in the record of a minimum, a row each: ``part``, ``rank``, ``eigenvalue``, ``residual``."""
    parts = []
    for part, prefix in (("hessian", ""), ("gauss_newton", "gauss_newton_")):
        values = record.get(f"{prefix}eigenvalues", [])
        rows = {"minimum": minimum, "part": part, "rank": range(1, len(values) + 1), "eigenvalue": values}
        parts.append(pd.DataFrame(rows | {"residual": record.get(f"{prefix}residuals", [])}))
    return pd.concat(parts, ignore_index=True)


def _note(spectrum: HessianSpectrum, section: HessianSection) -> str:
    if section.effective_dimension == "outliers" and np.isnan(spectrum.counted.se):
        known = f"{len(spectrum.eigenvalues)} eigenvalues do not tell how many are outliers"
        return f"{known}: effective_dimension is left empty; raise eigenvalues"
    if not spectrum.converged[0]:
        return "the top Hessian eigenvalue did not converge"
    missing = int((~spectrum.converged).sum())
    return f"{missing} of {len(spectrum.converged)} Hessian eigenvalues did not converge" if missing else ""
