"""Bayesian inference and model comparison for the escape rate of stochastic gradient descent.

>>> import escape_inference as ei
>>> ei.load_law("power_law").source
'Mori, Ziyin, Liu, Ueda, ICML 2022'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Comparison": "comparison",
    "Conditions": "conditions",
    "EscapeCheck": "escape_check",
    "InputError": "errors",
    "Law": "law",
    "LawReport": "law_check",
    "Parameter": "law",
    "Setting": "law",
    "World": "worlds",
    "aggregate": "conditions",
    "built_in_laws": "law",
    "check_escape": "escape_check",
    "check_law": "law_check",
    "compare": "comparison",
    "critical_learning_rates": "prediction",
    "identifiability": "identification",
    "residual_trends": "trends",
    "infer": "inference",
    "kramers_log_prefactor": "law",
    "load_law": "law",
    "make_design": "worlds",
    "make_ramps": "design",
    "prepare": "inference",
    "read_measurements": "table",
    "simulate": "simulation",
    "simulate_sde": "sde",
    "threshold_log_rate": "law",
    "write_report": "report",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from escape_inference.comparison import Comparison, compare
    from escape_inference.conditions import Conditions, aggregate
    from escape_inference.design import make_ramps
    from escape_inference.errors import InputError
    from escape_inference.escape_check import EscapeCheck, check_escape
    from escape_inference.identification import identifiability
    from escape_inference.inference import infer, prepare
    from escape_inference.law import (
        Law,
        Parameter,
        Setting,
        built_in_laws,
        kramers_log_prefactor,
        load_law,
        threshold_log_rate,
    )
    from escape_inference.law_check import LawReport, check_law
    from escape_inference.prediction import critical_learning_rates
    from escape_inference.report import write_report
    from escape_inference.sde import simulate_sde
    from escape_inference.simulation import simulate
    from escape_inference.table import read_measurements
    from escape_inference.trends import residual_trends
    from escape_inference.worlds import World, make_design


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``--help`` and a table's errors do not wait for JAX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
