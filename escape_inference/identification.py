"""What the data cannot say: posterior against prior for every parameter, in numbers and in a plain sentence.

With one threshold only the slope in B/η and the height of the line are fixed by escapes, so that n and the prefactor trade off exactly;
a posterior for n then is its prior, however narrow it looks. Three measures tell: the contraction of the posterior, the sensitivity
of the posterior to powers of the prior and of the likelihood (Kallioinen, Paananen, Bürkner and Vehtari, Stat. Comput. 34, 57 (2024)),
and the correlation with the other parameters.
"""

import warnings

import numpy as np
import pandas as pd
import xarray as xr

from escape_inference.later import library

MOVED_CONTRACTION = 0.36  #: sd of the posterior below 0.8 of the prior's
MOVED_SHIFT = 1.0  #: or the mean moved by so many standard deviations of the prior
SENSITIVE = 0.05  #: cumulative Jensen-Shannon distance above which a posterior follows its prior
NARROW = 0.9  #: contraction (sd below a third of the prior's) beyond which that sensitivity is no objection
TIED = 0.9  #: correlation from which two parameters are known in combination only
PARTNERS = 0.5  #: the same where neither is narrow: their priors cut the ridge short

_NAMES = {
    "temperature_scale": "the temperature scale α",
    "effective_dimension": "the effective dimension n",
    "effective_dimension_unmeasured": "the effective dimension n of the minima without a measured spectrum",
    "noise_strength": "the noise strength",
    "noise_exponent": "the noise exponent q",
    "log_prefactor": "the prefactor",
    "discrepancy": "the discrepancy σ",
}
_REMEDIES = {
    "effective_dimension": "a second threshold, a ramp through the critical learning rate or a measured spectrum would fix it",
    "temperature_scale": "more learning rates or batch sizes at one barrier would fix it",
    "noise_strength": "more learning rates or batch sizes at one barrier would fix it",
    "noise_exponent": "minima whose losses or barriers differ more would fix it",
    "log_prefactor": "escapes at several temperatures over one barrier would fix it",
    "discrepancy": "more conditions would fix it",
}


def identifiability(fit: xr.DataTree) -> pd.DataFrame:
    """What the data say about each parameter of a fit.

    Args:
        fit: what :func:`escape_inference.infer` returns, or a posterior file opened with ``xarray.open_datatree``.

    Returns:
        One row for each scalar parameter, indexed by its name: ``contraction`` (1 − variance of the posterior over that of the prior, of the
        logarithm for positive parameters), ``shift`` (of the mean, in sd of the prior), ``prior_sensitivity`` and
        ``likelihood_sensitivity`` (power scaling; above 0.05 the posterior follows), ``correlated_with`` and ``correlation``
        (the strongest), ``status`` and ``sentence``. Status ``not identified``: the posterior is about the prior; ``combination``: it moved
        but follows its prior, and another parameter; ``weakly identified``: it moved but follows its prior; ``not known``: chains
        stood still; else ``identified``.

    The example in the README prints the sentences.
    """
    fit = fit.load()
    scale = _on_prior_scale(fit)
    names = list(scale)
    posterior = pd.DataFrame({name: scale[name][0] for name in names})
    correlations = posterior.corr().to_numpy() - np.eye(len(names))
    correlations[:, [name == "discrepancy" for name in names]] *= (
        0.0  # the error of a law is no partner in a combination
    )
    sensitivity = {group: _sensitivity(fit, names, group) for group in ("prior", "likelihood")}
    rows = []
    for i, name in enumerate(names):
        draws, prior = scale[name]
        contraction = 1 - draws.var() / prior.var()
        shift = (draws.mean() - prior.mean()) / prior.std()
        partner = int(np.argmax(np.abs(correlations[i]))) if len(names) > 1 else i
        row = {"contraction": contraction, "shift": shift}
        row |= {f"{group}_sensitivity": values[name] for group, values in sensitivity.items()}
        row |= {"correlated_with": names[partner], "correlation": correlations[i, partner]}
        row["status"] = _status(row)
        rows.append(row | {"sentence": _sentence(name, row, fit) + _limit_of_the_formula(name, fit)})
    return pd.DataFrame(rows, index=pd.Index(names, name="parameter"))


def _status(row: dict) -> str:
    if not np.isfinite(row["prior_sensitivity"] + row["correlation"]):
        return "not known"
    correlation, follows = abs(row["correlation"]), row["prior_sensitivity"] > SENSITIVE
    if row["contraction"] <= MOVED_CONTRACTION and abs(row["shift"]) <= MOVED_SHIFT:
        return "not identified"
    if follows and correlation > (TIED if row["contraction"] > NARROW else PARTNERS):
        return "combination"
    return "weakly identified" if follows and row["contraction"] <= NARROW else "identified"


def _on_prior_scale(fit: xr.DataTree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Draws of posterior and prior of every parameter with a prior of its own, logarithms of positive ones."""
    positive = set(str(fit.attrs["positive_parameters"]).split())
    found = {}
    for name in map(str, fit["log_prior"].data_vars):
        draws, prior = (fit[group][name].to_numpy().ravel() for group in ("posterior", "prior"))
        found[name] = (np.log(draws), np.log(prior)) if name in positive else (draws, prior)
    return found


def _sensitivity(fit: xr.DataTree, names: list[str], group: str) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = library("arviz_stats").psense(fit, var_names=names, group=group)
        except ValueError:  # the same value in all draws of the tail
            return dict.fromkeys(names, float("nan"))
    values = found if hasattr(found, "data_vars") and len(found.data_vars) else found["posterior"]
    return {name: float(values[name]) for name in names}


def _sentence(name: str, row: dict, fit: xr.DataTree) -> str:
    subject = _NAMES.get(name, name.replace("_", " "))
    remedy = _REMEDIES.get(name.removesuffix("_unmeasured"), "conditions that differ in other settings would fix it")
    partner = _NAMES.get(row["correlated_with"], row["correlated_with"].replace("_", " "))
    if row["status"] == "not known":
        return f"what the data say about {subject} is not known: chains of the sampler stood still."
    if row["status"] == "identified":
        return (
            f"{subject} is identified: the data shrink its prior variance by {100 * max(row['contraction'], 0):.0f} %."
        )
    if row["status"] == "weakly identified":
        return f"{subject} is weakly identified: its prior still counts; {_remedy_for(name, remedy, fit)}."
    fixed = f"the data fix only its combination with {partner} (correlation {row['correlation']:.2f})"
    if row["status"] == "combination":
        return f"{subject} is identified through its prior: {fixed}; {_remedy_for(name, remedy, fit)}."
    if abs(row["correlation"]) < TIED / 2:
        fixed = "its posterior is its prior"
    return f"{subject} is not identified: {fixed}; {_remedy_for(name, remedy, fit)}."


def _limit_of_the_formula(name: str, fit: xr.DataTree) -> str:
    """How far n can be off because formulas over a saddle are the leading order in T.

    The next order is a factor exp(a T) on the rate with a near 1/2 (mean passage time of one dimension, by quadrature), and n acts
    as (n/2) ΔU, so that n is read too high by about T/ΔU.
    """
    saddles = fit["constant_data"]["barrier"].to_numpy() == "saddle"
    if name != "effective_dimension" or not saddles.any():
        return ""
    posterior = fit["posterior"]
    ratio = (posterior["temperature"] / posterior["log_barrier"]).median(("chain", "draw")).to_numpy()[saddles]
    off = float(np.median(ratio))
    return f" Over a saddle the formula is the leading order in T: n may be read too high by about T/ΔU = {off:.2g}."


def _remedy_for(name: str, remedy: str, fit: xr.DataTree) -> str:
    """The remedy, shortened where the table already has part of it."""
    constant = fit["constant_data"]
    if bool(constant["ramp"].to_numpy().any()):
        remedy = remedy.replace("a ramp through the critical learning rate", "more levels of the ramps")
    barriers = pd.DataFrame({"minimum": constant["condition_minimum"], "barrier": constant["loss_barrier"]})
    if barriers.drop_duplicates()["minimum"].duplicated().any():
        remedy = remedy.replace("a second threshold", "thresholds further apart")
    return remedy
