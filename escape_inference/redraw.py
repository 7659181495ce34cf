"""A law's posterior under another prior or without a condition, from draws of one that is known.

Where the law is a table of a few parameters the draws are made anew by adaptive importance sampling, which costs a few thousand densities;
with many latent settings they are weighted anew. Where the Pareto shape says that neither can be trusted, Markov chains run again.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from escape_inference.cross_validation import pareto_limit, smoothed
from escape_inference.evidence import Evidence, bridge_log_evidence
from escape_inference.exploration import FEW_DIMENSIONS
from escape_inference.importance import Weighted, effective_share, importance_sample
from escape_inference.inference import ACCEPTANCE, Fit, run_chains
from escape_inference.law import Law
from escape_inference.model import PriorWidths
from escape_inference.precision import float64
from escape_inference.problem import Problem, densities, log_likelihood_at
from escape_inference.rate_tables import exact_minus_table, focus, misplaced, place_in_table
from escape_inference.student import at_points

STARTS = 1000  #: draws of a known posterior from which importance sampling begins, about
REFIT_DRAWS = 400  #: draws of each chain where Markov chains run again
LEAST_EFFECTIVE = 200.0  #: draws with weight that a posterior needs
MOST_MORE = 10  #: times as many draws as are wanted, where few of them carry weight
ATTEMPTS = 4  #: for a table of the law's rates that is made anew where the draws went, and for Markov chains
OUTSIDE = 1e-3  #: weight beyond the region where the law's rates are tabulated that is accepted
MISPLACED, SHIFT = (
    0.03,
    0.02,
)  #: by such a table: share of the posterior and error of the log evidence, both below those of the draws


class Sample(NamedTuple):
    """Weighted draws of a posterior: points of the target, log-likelihoods, log evidence; the log joint density, if it is kept."""

    problem: Problem
    widths: PriorWidths
    z: Float[np.ndarray, "draw slot"]
    log_weight: Float[np.ndarray, " draw"]
    log_likelihood: Float[np.ndarray, "draw condition"]
    evidence: Evidence
    log_joint: Float[np.ndarray, " draw"] | None = None

    @property
    def few_dimensions(self) -> bool:
        """Whether another posterior is drawn by importance sampling."""
        return len(self.problem.target.used) <= FEW_DIMENSIONS

    @property
    def start(self) -> "Sample":
        """As many of the draws as another posterior begins with."""
        every = slice(None, None, max(len(self.z) // STARTS, 1) if self.few_dimensions else 1)
        kept: dict[str, Any] = {name: x[every] for name, x in self._asdict().items() if isinstance(x, np.ndarray)}
        return self._replace(**kept)

    def without_law(self) -> "Sample":
        """The same for another process, which knows the law."""
        return self._replace(problem=self.problem.without_law())

    def with_law(self, law: Law) -> "Sample":
        """The same with its law again."""
        return self._replace(problem=self.problem.with_law(law))


@float64
def first_sample(fit: Fit, seed: int) -> Sample:
    """The posterior draws of a fit, with the evidence by bridge sampling."""
    z, problem, widths = fit.draws.z, fit.problem, PriorWidths()
    target, everything = problem.target, np.ones(len(problem.observed.escapes))
    data = _data(problem, everything, widths)
    evidence = bridge_log_evidence(densities(target.law, target.shapes)[0], z, data=data, seed=seed)
    flat, values = z.reshape(-1, z.shape[-1]), fit.log_likelihood.reshape(-1, fit.log_likelihood.shape[-1])
    sample = Sample(problem, widths, flat, np.zeros(len(flat)), values, evidence)
    return sample if sample.few_dimensions else sample._replace(log_joint=_log_joint(problem, flat, everything, widths))


@float64
def with_prior(sample: Sample, widths: PriorWidths, *, seed: int, warmup: int, chains: int) -> Sample:
    """The posterior under a prior of other widths."""
    draws = len(sample.z) // 2  # independent ones, worth more than those of a chain
    everything, sample = np.ones(sample.log_likelihood.shape[1]), sample.start
    after, before = _log_joint(sample.problem, sample.z, everything, widths), sample.log_joint
    if before is None:
        before = _log_joint(sample.problem, sample.z, everything, sample.widths)
    log_ratio = sample.log_weight + after - before
    return _redraw(sample, log_ratio, everything, widths, draws=draws, seed=seed, warmup=warmup, chains=chains)


@float64
def without_condition(sample: Sample, condition: int, *, seed: int, warmup: int, chains: int) -> Sample:
    """The posterior from all conditions but one; ``log_likelihood`` still has a column for it."""
    weight = np.ones(sample.log_likelihood.shape[1])
    weight[condition], sample = 0.0, sample.start
    log_ratio = sample.log_weight - sample.log_likelihood[:, condition]
    draws = REFIT_DRAWS * chains
    return _redraw(sample, log_ratio, weight, sample.widths, draws=draws, seed=seed, warmup=warmup, chains=chains)


def _redraw(
    sample: Sample,
    log_ratio: np.ndarray,
    weight: np.ndarray,
    widths: PriorWidths,
    *,
    draws: int,
    seed: int,
    warmup: int,
    chains: int,
) -> Sample:
    problem = sample.problem
    if sample.few_dimensions:
        start = sample.z, log_ratio
        for attempt in range(ATTEMPTS):
            data = _data(problem, weight, widths)
            log_joint = densities(problem.target.law, problem.target.shapes)[0]
            found = importance_sample(log_joint, *start, data=data, draws=draws, seed=seed + attempt)
            if attempt == ATTEMPTS - 1 or found.pareto_k == np.inf:
                break
            start, points = (found.z, found.log_weight), _resampled(found.z, found.log_weight, seed)
            outside = _share_outside(problem, *start) >= OUTSIDE
            if not outside and (problem is sample.problem or _table_is_good(problem, points, widths)):
                break
            problem = focus(problem if outside else replace(problem, extent="fine"), points)
        if not _sound(found) and found.pareto_k < 1:
            more = np.clip(1.5 * LEAST_EFFECTIVE / _effective(found), 2, MOST_MORE)
            start = found.z, found.log_weight
            found = importance_sample(log_joint, *start, data=data, draws=int(more * draws), seed=seed + ATTEMPTS)
        if _sound(found):
            evidence = Evidence(found.log_evidence, found.standard_error, "importance")
            return _sample(problem, widths, found.z, found.log_weight, evidence)
    elif smoothed(log_ratio)[1] < pareto_limit(len(log_ratio)):
        shift = logsumexp(log_ratio) - np.log(len(log_ratio))
        error = np.sqrt(max(1 / effective_share(log_ratio) - 1, 0.0) / len(log_ratio) * 4)
        known = sample.evidence
        evidence = Evidence(known.log_evidence + shift, float(np.hypot(known.standard_error, error)), known.method)
        return _sample(problem, widths, sample.z, log_ratio, evidence)
    count = max(draws // chains, 4)
    for attempt in range(ATTEMPTS if sample.few_dimensions else 1):  # smaller steps after a divergence
        again, acceptance = seed + attempt, 1 - (1 - ACCEPTANCE) / 3**attempt
        run = run_chains(
            *(problem, weight, widths), seed=again, warmup=warmup, chains=chains, count=count, acceptance=acceptance
        )
        if not run.diverging.any():
            break
    log_joint = densities(problem.target.law, problem.target.shapes)[0]
    evidence = bridge_log_evidence(log_joint, run.z, data=_data(problem, weight, widths), seed=seed)
    flat = run.z.reshape(-1, run.z.shape[-1])
    return _sample(problem, widths, flat, np.zeros(len(flat)), evidence)


def _effective(found: Weighted) -> float:
    return effective_share(found.log_weight) * len(found.log_weight)


def _sound(found: Weighted) -> bool:
    """Whether the weights can be trusted, and enough draws carry one."""
    return found.pareto_k < pareto_limit(len(found.log_weight)) and _effective(found) >= LEAST_EFFECTIVE


def _data(problem: Problem, weight: np.ndarray, widths: PriorWidths) -> tuple:
    return problem.target.inputs, problem.weighted(weight), widths.as_arrays()


def _log_joint(problem: Problem, z: np.ndarray, weight: np.ndarray, widths: PriorWidths) -> np.ndarray:
    return at_points(densities(problem.target.law, problem.target.shapes)[0], z, _data(problem, weight, widths))


def _sample(problem: Problem, widths: PriorWidths, z: np.ndarray, log_weight: np.ndarray, evidence: Evidence) -> Sample:
    """Draws without weight are left out: ratios of their densities would be 0/0."""
    alive = np.isfinite(log_weight)
    z, log_weight = z[alive], log_weight[alive]
    return Sample(problem, widths, z, log_weight, log_likelihood_at(problem, z, widths), evidence)


def _resampled(z: np.ndarray, log_weight: np.ndarray, seed: int) -> np.ndarray:
    probability = np.exp(log_weight - logsumexp(log_weight))
    return z[np.random.default_rng(seed).choice(len(z), len(z), p=probability / probability.sum())]


def _table_is_good(problem: Problem, points: np.ndarray, widths: PriorWidths) -> bool:
    """Whether the law's rates are those of the table, as far as this posterior and its evidence are concerned."""
    error = exact_minus_table(problem, points, widths)
    shift = float(logsumexp(error) - np.log(len(error)))
    return misplaced(error) <= MISPLACED and abs(shift) <= SHIFT


def _share_outside(problem: Problem, z: np.ndarray, log_weight: np.ndarray) -> float:
    """Share of the weight beyond the region where the law's rates are tabulated."""
    outside = np.any(np.abs(place_in_table(problem, z)) > 1, axis=1)
    return float(np.exp(logsumexp(log_weight[outside]) - logsumexp(log_weight))) if outside.any() else 0.0
