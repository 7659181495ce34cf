"""Compare laws on one table: leave-one-condition-out, evidence, and a verdict that is withheld when it should be."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from arviz_stats.base import array_stats
from jaxtyping import Array
from scipy.special import logsumexp

from escape_inference.cross_validation import (
    LeaveOneOut,
    difference,
    leave_one_out,
    needs_refit,
    pareto_limit,
    stacking_weights,
    with_refits,
)
from escape_inference.evidence import Evidence, agree, bridge_log_evidence
from escape_inference.exploration import Problem, densities
from escape_inference.inference import (
    CHAINS,
    DRAWS,
    WARMUP,
    Fit,
    Prepared,
    applicable,
    build_problem,
    fit_law,
    fit_tree,
    model_at,
    prepare,
    run_chains,
)
from escape_inference.law import Law, built_in_laws, load_laws
from escape_inference.precision import float64
from escape_inference.sampler import Draws
from escape_inference.summary import jsonable, law_sentence, parameter_summary
from escape_inference.verdict import WIDTHS, Candidate, Pair, decide

Progress = Callable[[str], None]
REFIT_DRAWS = 400  #: draws a chain of a fit that leaves one condition out
PARALLEL = os.cpu_count() or 1


@dataclass(frozen=True)
class LawResult:
    """Everything that is known of one law on these data."""

    fit: Fit
    loo: dict[float, LeaveOneOut]
    bridge: dict[float, Evidence]

    @property
    def smc(self) -> Evidence:
        """Log evidence by tempered Monte Carlo."""
        return self.fit.problem.evidence

    @property
    def evidence_agrees(self) -> bool:
        """Whether bridge sampling and tempered SMC agree; if not, Bayes factors with this law are withheld."""
        return agree(self.bridge[1.0], self.smc)


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`.

    Attributes:
        verdict: name of the winning law, ``inconclusive`` or ``not_escape``.
        reason: one sentence with the numbers that decided.
        table: one row for each law, best first.
        fits: the ArviZ data tree of every law.
        report: the content of ``comparison.json``.
    """

    verdict: str
    reason: str
    table: pd.DataFrame
    fits: dict[str, xr.DataTree]
    report: dict[str, Any] = field(repr=False)


@float64
def compare(
    table: str | Path | pd.DataFrame | Prepared,
    laws: "Sequence[str | Path | Law] | None" = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    chains: int = CHAINS,
    progress: Progress | None = None,
) -> Comparison:
    """Fit every law and compare them.

    Args:
        table: path of a CSV or Parquet table, a data frame, or the result of :func:`~escape_inference.prepare`.
        laws: names, paths of law files or law objects; by default every built-in law that applies.
        seed: the same seed gives the same result.
        draws, warmup, chains: posterior draws and warm-up steps a chain, and chains.
        progress: called with a short text at every step.

    Returns:
        The verdict, its reason, the table, the posteriors and the report.

    Raises:
        InputError: bad table or law, or a law that does not apply to the barriers in the table.
    """
    say = progress or (lambda text: None)
    chosen = load_laws(laws) if laws is not None else None
    say("reading the table and checking for escape")
    prepared = table if isinstance(table, Prepared) else prepare(table, seed=seed)
    prepared.settings.update({"seed": seed, "draws": draws, "warmup": warmup, "chains": chains})
    if chosen is None:
        chosen = [law for law in built_in_laws().values() if applicable(law, prepared.conditions)]
    frame = prepared.conditions.frame
    results: dict[str, LawResult] = {}
    if len(frame) and frame["escapes"].sum() and prepared.check.grade != "not_escape":
        for law in chosen:
            say(f"{law.name}: from the prior to the posterior")
            results[law.name] = _study(build_problem(law, prepared, seed=seed), seed, draws, warmup, chains, say)
    return _assemble(prepared, chosen, results, seed, say)


def _study(problem: Problem, seed: int, draws: int, warmup: int, chains: int, say: Progress) -> LawResult:
    """Posterior, evidence by two methods, leave-one-out; the last two at three prior widths."""
    name, everything = problem.law.name, np.ones(problem.observed.escapes.shape[0])
    say(f"{name}: sampling")
    fit = fit_law(problem, seed=seed, draws=draws, warmup=warmup, chains=chains)
    problem = fit.problem
    say(f"{name}: evidence")

    def run(weight: np.ndarray, width: float, seed: int, count: int = draws) -> Draws:
        with jax.enable_x64(True):  # a setting of each thread
            return run_chains(problem, weight, width, seed=seed, draws=draws, warmup=warmup, chains=chains, count=count)

    def bridge(draws: Draws, width: float) -> Evidence:
        target = problem.target
        data = (target.inputs, problem.observed, jnp.asarray(width))
        return bridge_log_evidence(densities(target.law, target.shapes)[0], draws.z, data=data, seed=seed)

    evidence, loo = {1.0: bridge(fit.draws, 1.0)}, {}
    sources = {width: (fit.draws, fit.log_likelihood, _log_prior_ratio(problem, fit.draws, width)) for width in WIDTHS}
    limit = pareto_limit(draws * chains)
    far = [w for w in WIDTHS if w != 1.0 and not array_stats.psislw(-sources[w][2])[1] < limit]
    if far:
        say(f"{name}: sampling with prior widths {', '.join(f'×{w:g}' for w in far)}")
    with ThreadPoolExecutor(PARALLEL) as pool:
        for width, source in zip(far, pool.map(lambda w: run(everything, w, seed + 2), far), strict=True):
            sources[width] = source, _log_likelihood(problem, source), np.zeros(draws * chains)
            evidence[width] = bridge(source, width)
        for width, (_, values, log_weight) in sources.items():
            if width not in evidence:
                evidence[width] = _reweighted(evidence[1.0], log_weight)
            loo[width] = leave_one_out(values, log_weight)
        wanted = {(w if w in far else 1.0, int(i)) for w in WIDTHS for i in needs_refit(loo[w], draws * chains)}
        if wanted:
            say(f"{name}: exact fits without {len({i for _, i in wanted})} conditions that single draws decide")

        def without(task: tuple[float, int]) -> Draws:
            weight = everything.copy()
            weight[task[1]] = 0.0
            return run(weight, task[0], seed + 3, REFIT_DRAWS)

        left_out = dict(zip(sorted(wanted), pool.map(without, sorted(wanted)), strict=True))
    scores = {task: _log_likelihood(problem, draws)[..., task[1]].ravel() for task, draws in left_out.items()}
    for width in WIDTHS:
        found, sampled_width = {}, width if width in far else 1.0
        for i in map(int, needs_refit(loo[width], draws * chains)):
            task = sampled_width, i
            ratio = _log_prior_ratio(problem, left_out[task], width) if width != sampled_width else np.zeros(1)
            found[i] = scores[task], np.broadcast_to(ratio, scores[task].shape)
        loo[width] = with_refits(loo[width], found)
    return LawResult(fit, loo, evidence)


def _log_prior_ratio(problem: Problem, draws: Draws, width: float) -> np.ndarray:
    """Log of the prior density at prior widths × ``width`` over the density at ×1, for every draw."""
    flat = draws.z.reshape(-1, draws.z.shape[-1])
    target = problem.target
    if target.inputs.surrogate is not None:  # independent standard normals, of which idle ones must not add noise
        used = flat[:, target.used]
        return np.sum(0.5 * used**2 * (1 - 1 / width**2) - np.log(width), axis=1)
    log_prior = densities(target.law, target.shapes)[1]
    at = [
        _map_points(log_prior, jnp.asarray(flat), (target.inputs, problem.observed, jnp.asarray(factor)))
        for factor in (width, 1.0)
    ]
    return np.asarray(at[0] - at[1])


@partial(jax.jit, static_argnames=("function",))
def _map_points(function: Callable[..., Array], points: Array, data: Any) -> Array:
    return jax.lax.map(lambda z: function(z, data), points, batch_size=200)


def _reweighted(evidence: Evidence, log_weight: np.ndarray) -> Evidence:
    """The evidence under another prior: Z times the posterior mean of the prior ratio, with its Monte Carlo error."""
    shift = logsumexp(log_weight) - np.log(log_weight.size)
    weight = np.exp(log_weight - shift)
    error = float(np.std(weight) / np.sqrt(weight.size / 4))
    return Evidence(evidence.log_evidence + float(shift), float(np.hypot(evidence.standard_error, error)), "bridge")


def _log_likelihood(problem: Problem, run: Draws) -> np.ndarray:
    return model_at(problem, problem.near_inputs, problem.target.to_model(run.z)).log_likelihood


def _pairs(results: dict[str, LawResult]) -> dict[tuple[str, str], list[Pair]]:
    pairs = {}
    for one, two in permutations(results, 2):
        a, b = results[one], results[two]
        shown = a.evidence_agrees and b.evidence_agrees
        pairs[one, two] = [
            Pair(
                width,
                *difference(a.loo[width], b.loo[width]),
                a.bridge[width].log_evidence - b.bridge[width].log_evidence if shown else float("nan"),
            )
            for width in WIDTHS
        ]
    return pairs


def _assemble(
    prepared: Prepared, laws: Sequence[Law], results: dict[str, LawResult], seed: int, say: Progress
) -> Comparison:
    frame, check = prepared.conditions.frame, prepared.check
    pairs = _pairs(results)
    candidates = [
        Candidate(
            law.name,
            law.special_cases,
            results[law.name].fit.convergence.trustworthy,
            results[law.name].fit.convergence.reason,
        )
        for law in laws
        if law.name in results
    ]
    verdict, reason = decide(check, candidates, pairs, len(frame))
    say("writing up")
    fits = {name: fit_tree(result.fit, prepared, seed=seed) for name, result in results.items()}
    names = sorted(results, key=lambda name: -results[name].loo[1.0].elpd)
    weights = stacking_weights(np.array([results[n].loo[1.0].pointwise for n in names])) if names else np.zeros(0)
    evidences = np.array([results[n].bridge[1.0].log_evidence for n in names])
    shown = bool(names) and all(results[n].evidence_agrees for n in names)
    probabilities = np.exp(evidences - logsumexp(evidences)) if shown else np.full(len(names), np.nan)
    entries = {}
    for name, weight, probability in zip(names, weights, probabilities, strict=True):
        entries[name] = _entry(results[name], results[names[0]], float(weight), float(probability), fits[name])
    if verdict in results:
        reason += law_sentence(verdict, entries[verdict]["parameters"], entries[verdict]["discrepancy"])
    report = {
        "verdict": verdict,
        "reason": reason,
        "laws": entries,
        "pairs": [
            {"law": a, "rival": b, "prior_width": p.width, "elpd_diff": p.elpd_diff, "elpd_diff_se": p.elpd_diff_se}
            | {"log_bayes_factor": p.log_bayes_factor}
            for (a, b), several in pairs.items()
            if a < b
            for p in several
        ],
        "escape_check": check.as_dict(),
        "left_out": list(prepared.left_out),
        "data": {
            "path": str(prepared.conditions.path),
            "sha256": prepared.conditions.sha256,
            "minima": len(prepared.every.minima),
            "conditions": len(prepared.every),
            "runs": prepared.every.n_runs,
            "escapes": prepared.every.n_escapes,
        },
        "settings": prepared.settings,
    }
    report = jsonable(report)
    return Comparison(verdict, reason, _table(report["laws"]), fits, report)


def _entry(result: LawResult, best: LawResult, weight: float, probability: float, tree: xr.DataTree) -> dict[str, Any]:
    loo, convergence = result.loo[1.0], result.fit.convergence
    gap, error = difference(loo, best.loo[1.0])
    k = np.where(loo.refitted, -np.inf, loo.pareto_k)
    bridge = result.bridge[1.0]
    discrepancy = result.fit.sites["discrepancy"]
    return {
        "elpd": loo.elpd,
        "elpd_se": loo.standard_error,
        "elpd_diff": gap,
        "elpd_diff_se": error,
        "stacking_weight": weight,
        "log_evidence": bridge.log_evidence,
        "log_evidence_se": bridge.standard_error,
        "log_evidence_smc": result.smc.log_evidence,
        "log_evidence_smc_se": result.smc.standard_error,
        "evidence_methods_agree": result.evidence_agrees,
        "log_evidence_by_prior_width": {f"{w:g}": e.log_evidence for w, e in sorted(result.bridge.items())},
        "posterior_probability": probability,
        "discrepancy": {
            "mean": discrepancy.mean(),
            "q05": np.quantile(discrepancy, 0.05),
            "q95": np.quantile(discrepancy, 0.95),
        },
        "parameters": parameter_summary(result.fit),
        "rhat_max": convergence.rhat_max,
        "ess_min": convergence.ess_min,
        "divergences": convergence.divergences,
        "pareto_k_max": k.max(),
        "refitted_conditions": int(loo.refitted.sum()),
        "trustworthy": convergence.trustworthy,
        "not_trustworthy_because": convergence.reason or None,
    }


def _table(laws: dict[str, Any]) -> pd.DataFrame:
    columns = (
        *("elpd", "elpd_se", "elpd_diff", "elpd_diff_se", "stacking_weight", "log_evidence", "log_evidence_se"),
        *("posterior_probability", "rhat_max", "ess_min", "divergences", "pareto_k_max", "trustworthy"),
    )
    rows = {
        name: {c: entry[c] for c in columns[:8]}
        | {f"discrepancy_{q}": entry["discrepancy"][q] for q in ("mean", "q05", "q95")}
        | {c: entry[c] for c in columns[8:]}
        for name, entry in laws.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("law")
