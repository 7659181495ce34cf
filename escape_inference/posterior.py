"""Posterior files: the ArviZ data tree of a fit, with coordinates, units and sources."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from escape_inference.later import library
from escape_inference.law import Law
from escape_inference.model import MEAN_DISCREPANCY
from escape_inference.summary import jsonable, parameter_summary

if TYPE_CHECKING:
    from escape_inference.inference import Fit, Prepared

DESCRIPTIONS = {
    "temperature": ("1 (log loss)", "temperature at the minimum"),
    "log_barrier": ("1 (log loss)", "ΔU = log(L^s/L*) (Mori et al. 2022)"),
    "log_rate": (
        "log(1/time)",
        "natural log of the law's escape rate κ per unit time t = η k; hazard per iteration is η κ",
    ),
    "log_rate_residual": ("log(1/time)", "δ, log rate of the condition minus the law's"),
    "waiting_shape": ("1", "Gamma shape of the waiting time; 1 for memoryless conditions"),
    "discrepancy": (
        "log(1/time)",
        "σ, sd of δ between conditions; exp(σ) is the typical factor by which the law misses",
    ),
    "log_prefactor": ("1", "natural log of the factor on the law's prefactor; 0 in theory"),
    "effective_dimension": ("1", "n, number of outlier eigenvalues of the Hessian at the minimum"),
    "loss_minimum": ("loss", "L*"),
    "hessian_minimum": ("1/time", "h*, curvature at the minimum along the escape direction"),
    "escapes": ("count", "escapes of the condition"),
    "exposure": ("time", "Σ η·steps over all runs of the condition"),
    "longest": ("iterations", "steps of the longest run of the condition"),
    "learning_rate": ("time per iteration", "η"),
    "batch_size": ("samples", "B"),
    "loss_barrier": ("loss", "L^s, loss at the saddle or threshold"),
    "hessian_saddle": ("1/time", "h^s, absolute value of the negative curvature at the saddle"),
    "check_interval": ("iterations", "iterations between two looks at the loss"),
    "runs": ("count", "runs of the condition; replica slots in the quasi-stationary state"),
    "barrier": ("1", "what loss_barrier is: the loss at a saddle, or a threshold"),
    "start": ("1", "where the clock started: at the minimum, or in the quasi-stationary state"),
    "ramp": ("1", "whether the condition is a level of ramps"),
}
CONDITION_VARIABLES = (
    *("temperature", "log_barrier", "log_rate", "log_rate_residual", "waiting_shape", "hessian_saddle"),
)


def to_tree(
    fit: "Fit",
    prepared: "Prepared",
    *,
    prior: dict[str, np.ndarray],
    prior_predictive: np.ndarray,
    posterior_predictive: np.ndarray,
    residual: np.ndarray,
    waiting_shape: np.ndarray,
) -> xr.DataTree:
    """Assemble the data tree of a fit (arrays ``[chain, draw, ...]``)."""
    arviz_base = library("arviz_base")

    frame, law = prepared.conditions.frame, fit.problem.law
    conditions, minima = list(frame["condition"]), list(prepared.conditions.minima)
    keep = lambda sites: {k: v for k, v in sites.items() if not k.endswith("_base")}
    priors = scalar_priors(fit)
    posterior = keep(fit.sites) | {"log_rate_residual": residual, "waiting_shape": waiting_shape}
    per_minimum = {
        name: ["minimum"]
        for name in posterior
        if name in ("loss_minimum", "hessian_minimum", "effective_dimension") or name.endswith("_by_minimum")
        if posterior[name].ndim == 3
    }
    constant = {
        name: frame[name].to_numpy(float)
        for name in (
            "learning_rate",
            "batch_size",
            "check_interval",
            "loss_barrier",
            "hessian_saddle",
            "runs",
            "exposure",
            "longest",
        )
    }
    constant |= {
        f"measured_{name}": frame[name].to_numpy(float)
        for name in ("loss_minimum", "hessian_minimum", "effective_dimension")
    }
    constant |= {name: frame[name].to_numpy() for name in ("barrier", "start", "ramp")}
    draws = fit.draws
    tree = arviz_base.from_dict(
        {
            "posterior": posterior,
            "prior": keep(prior),
            "posterior_predictive": {"escapes": posterior_predictive},
            "prior_predictive": {"escapes": prior_predictive},
            "log_likelihood": {"escapes": fit.log_likelihood},
            "log_prior": {name: prior(posterior[name]) for name, (prior, _) in priors.items()},
            "sample_stats": {
                "diverging": draws.diverging,
                "energy": draws.energy,
                "n_steps": draws.n_steps,
                "acceptance_rate": draws.acceptance_rate,
                "step_size": draws.step_size,
            },
            "observed_data": {"escapes": frame["escapes"].to_numpy()},
            "constant_data": constant,
        },
        coords={"condition": conditions, "minimum": minima},
        dims={name: ["condition"] for name in (*CONDITION_VARIABLES, *constant, "escapes")} | per_minimum,
    )
    for group in (
        tree.posterior,
        tree.constant_data,
    ):  # where no variable is one for each minimum, the names are still known
        group.coords["minimum"] = minima
    tree.constant_data.coords["condition_minimum"] = ("condition", list(frame["minimum"]))
    _describe(tree, law)
    if law.equation:
        tree.attrs["equation"] = law.equation
    convergence = fit.convergence
    tree.attrs.update(
        {
            "law": law.name,
            "source": law.source,
            "inference_library": "numpyro",
            "table": str(prepared.conditions.path),
            "table_sha256": str(prepared.conditions.sha256),
            "escape_check": prepared.check.sentence,
            "left_out": ", ".join(prepared.left_out) or "none",
            "rhat_max": convergence.rhat_max,
            "ess_min": convergence.ess_min,
            "divergences": convergence.divergences,
            "bfmi_min": convergence.bfmi_min,
            "trustworthy": int(convergence.trustworthy),
            "convergence": convergence.reason or "converged",
            "positive_parameters": " ".join(name for name, (_, positive) in priors.items() if positive),
            "parameters": json.dumps(jsonable(parameter_summary(fit))),
        }
        | prepared.settings
    )
    return tree


def scalar_priors(fit: "Fit") -> dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]]:
    """Log prior density of every scalar parameter with a prior of its own, and whether the parameter is positive."""
    inputs = fit.problem.inputs
    found: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {}
    for p in fit.problem.law.parameters_for(inputs.barriers):
        name = p.name
        if name == "effective_dimension" and inputs.dimension_carried != "none":
            name = "effective_dimension_unmeasured"
        if name in fit.sites:
            log, median = (np.log if p.positive else np.asarray), float(inputs.medians[p.name])
            center = np.log(median) if p.positive else median
            found[name] = partial(_log_normal_density, log=log, center=center, width=p.width), p.positive
    found["log_prefactor"] = partial(_log_normal_density, log=np.asarray, center=0.0, width=1.0), False
    found["discrepancy"] = (lambda value: -value / MEAN_DISCREPANCY - np.log(MEAN_DISCREPANCY)), True
    return found


def _log_normal_density(
    value: np.ndarray, *, log: Callable[..., np.ndarray], center: float, width: float
) -> np.ndarray:
    """Density of a normal variable, or of a log-normal one in its own units."""
    z = (log(value) - center) / width
    return -0.5 * z**2 - np.log(width * np.sqrt(2 * np.pi)) - (log(value) if log is np.log else 0.0)


def parameters_of(tree: xr.DataTree) -> dict[str, dict[str, Any]]:
    """The parameter summary of a posterior, as in ``comparison.json``."""
    return json.loads(tree.attrs["parameters"])


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it at the end, so that a file is either whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_WRITING = Lock()  #: the library ends the process if two threads write at a time


def save_tree(tree: xr.DataTree, path: Path) -> None:
    """Write a posterior as NetCDF."""
    with _WRITING, _whole_or_absent(path) as temporary:
        tree.to_netcdf(temporary, engine="netcdf4")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with _whole_or_absent(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def description(name: str, law: Law) -> tuple[str, str]:
    """Unit and meaning of a variable of a posterior file; empty for one that is not known.

    >>> from escape_inference.law import load_law
    >>> description("temperature", load_law("arrhenius"))
    ('1 (log loss)', 'temperature at the minimum, T = η D/(B L*)')
    >>> description("effective_dimension_unmeasured", load_law("power_law"))
    ('1', 'where it was not measured: n, number of outlier eigenvalues of the Hessian at the minimum')
    """
    if name in DESCRIPTIONS:
        unit, text = DESCRIPTIONS[name]
        equation = law.temperature_equation if name == "temperature" else ""
        return unit, f"{text}, {equation}" if equation else text
    for p in law.parameters:
        if name == p.name:
            return p.unit, f"parameter of law {law.name}; prior: {p.reason} ({law.source})"
    for end, begin in (("_by_minimum", "for each minimum"), ("_unmeasured", "where it was not measured")):
        if name.endswith(end):
            unit, text = description(name.removesuffix(end), law)
            return unit, f"{begin}: {text}"
    if name.startswith("measured_"):
        unit, text = description(name.removeprefix("measured_"), law)
        return unit, f"as in the table, NaN where it was not measured: {text}"
    if name.endswith("_spread"):
        base = name.removesuffix("_spread")
        of = base if base == "log_prefactor" else f"the logarithm of {base}"
        return "1", f"sd of {of} between minima (partial pooling)"
    return "", ""


def _describe(tree: xr.DataTree, law: Law) -> None:
    equations = dict.fromkeys(("log_rate", *(p.name for p in law.parameters)), law.equation)
    equations["temperature"] = law.temperature_equation
    for group in tree.children.values():
        for name, variable in group.data_vars.items():
            unit, text = description(str(name), law)
            if text and group.name in ("log_prior", "log_likelihood"):
                unit, text = "nat", f"{str(group.name).replace('_', ' ')} of {name}: {text}"
            if text:
                variable.attrs.update({"units": unit, "description": text, "law_source": law.source})
            if equation := equations.get(str(name)):
                variable.attrs["equation"] = equation
