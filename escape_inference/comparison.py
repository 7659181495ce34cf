"""Compare laws on one table: leave-one-condition-out, evidence, and a verdict that is withheld when it should be."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import jax
import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import logsumexp

from escape_inference.background import side_by_side
from escape_inference.cross_validation import (
    LeaveOneOut,
    difference,
    leave_one_out,
    needs_refit,
    stacking_weights,
    with_refits,
)
from escape_inference.diagnostics import Convergence
from escape_inference.errors import InputError
from escape_inference.evidence import Evidence, agree
from escape_inference.identification import identifiability
from escape_inference.inference import (
    CHAINS,
    DRAWS,
    WARMUP,
    Fit,
    Prepared,
    applicable,
    build_problem,
    check_settings,
    fit_law,
    fit_tree,
    prepare,
)
from escape_inference.law import Law, built_in_laws, load_laws
from escape_inference.model import PriorWidths
from escape_inference.precision import float64
from escape_inference.prediction import critical_learning_rates
from escape_inference.redraw import Sample, first_sample, with_prior, without_condition
from escape_inference.savage_dickey import point_bayes_factor
from escape_inference.summary import jsonable, law_sentence, parameter_summary
from escape_inference.trends import residual_trends
from escape_inference.verdict import NO_DISCREPANCY, WIDTHS, Candidate, Pair, decide
from escape_inference.workers import Desk, Workers, on_processors, processors

Progress = Callable[[str], None]
Keep = Callable[[str, xr.DataTree], None]
VARIANTS = {width: PriorWidths(width, width) for width in WIDTHS} | {NO_DISCREPANCY: PriorWidths(1.0, 1e-4)}
COMPILED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
Settings = dict[str, Any]
Again = Callable[[str], tuple[LeaveOneOut, Evidence]]


@dataclass
class Findings:
    """What is told of one law on these data; ``loo`` and ``evidence`` by prior width (0: without a discrepancy)."""

    convergence: Convergence
    parameters: dict[str, dict[str, Any]]
    discrepancy: dict[str, float]
    loo: dict[float, LeaveOneOut]
    evidence: dict[float, Evidence]
    smc: Evidence
    tree: xr.DataTree
    says: dict[str, Any]

    @property
    def evidence_agrees(self) -> bool:
        """Whether bridge sampling and tempered SMC agree; if not, Bayes factors with this law are withheld."""
        return agree(self.evidence[1.0], self.smc)


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
    laws: "Sequence[str | Path | Law] | str | Path | Law | None" = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    chains: int = CHAINS,
    pooling: str = "complete",
    progress: Progress | None = None,
    keep: Keep | None = None,
    workers: Workers | None = None,
) -> Comparison:
    """Fit every law and compare them.

    Args:
        table: path of a CSV or Parquet table, a data frame, or the result of :func:`~escape_inference.prepare`.
        laws: names, paths of law files or law objects, or a single one; by default every built-in law that applies.
        seed: the same seed gives the same result.
        draws, warmup, chains: posterior draws and warm-up steps a chain, and chains.
        pooling: ``complete`` or ``partial``, as in :func:`~escape_inference.infer`.
        progress: called with a short text at every step.
        keep: called with a law's name and its posterior as soon as that is known, by several threads perhaps.
        workers: processes that study laws given by name or path side by side, a :class:`~escape_inference.workers.Workers`;
            without them threads do.

    Returns:
        The verdict, its reason, the table, the posteriors and the report.

    Raises:
        InputError: bad table, law or setting, or a law that does not apply to the barriers in the table.
    """
    say, keep = progress or (lambda text: None), keep or (lambda name, tree: None)
    laws = [laws] if isinstance(laws, str | Path | Law) else laws
    chosen = load_laws(laws) if laws is not None else None
    if laws is not None and not chosen:
        raise InputError(
            "no law to compare is named; give names or paths of laws, or leave laws out for all that apply"
        )
    settings = {"seed": seed, "draws": draws, "warmup": warmup, "chains": chains, "pooling": pooling}
    check_settings(settings, pooling)
    say("reading the table and checking for escape")
    prepared = table if isinstance(table, Prepared) else prepare(table, seed=seed)
    prepared.settings.update(settings)
    if chosen is None:
        chosen = [law for law in built_in_laws().values() if applicable(law, prepared.conditions)]
    frame = prepared.conditions.frame
    if not (len(frame) and frame["escapes"].sum() and prepared.check.grade != "not_escape"):
        return _assemble(prepared, chosen, {}, None)
    given = [law.name for law in chosen] if laws is None else [one for one in laws if not isinstance(one, Law)]
    if workers is None or not workers.all or len(given) < len(chosen):
        return _assemble(prepared, chosen, *_study_here(chosen, prepared, settings, say, keep))
    with Desk(workers.all) as desk:
        return _assemble(prepared, chosen, *_study_there(desk, chosen, given, prepared, settings, say, keep))


def _study_here(
    laws: Sequence[Law], prepared: Prepared, settings: Settings, say: Progress, keep: Keep
) -> tuple[dict[str, Findings], Again]:
    """Findings of every law, studied by threads, and what finds their scores without a discrepancy."""
    stages = Stages(say, settings)

    def study(law: Law) -> tuple[Findings, Sample]:
        findings, sample = stages.study(law, prepared)
        keep(law.name, findings.tree)
        return findings, sample

    names = [law.name for law in laws]
    known = dict(zip(names, side_by_side(study, laws, len(processors())), strict=True))
    again = float64(lambda name: _without_discrepancy(known[name][1], settings))
    return {name: findings for name, (findings, _) in known.items()}, again


def _study_there(
    desk: Desk,
    laws: Sequence[Law],
    given: Sequence["str | Path"],
    prepared: Prepared,
    settings: Settings,
    say: Progress,
    keep: Keep,
) -> tuple[dict[str, Findings], Again]:
    """The same by processes, laws of many parameters first; when none is left to begin with, what a verdict needs of the others."""
    where = {law.name: one for law, one in zip(laws, given, strict=True)}
    programs = {name: jax.config.values[name] for name in COMPILED}
    order = [law.name for law in sorted(laws, key=lambda law: -len(law.parameters))]
    occasion = uuid4().hex
    studies = {
        name: desk.submit(0, _study_at_worker, where[name], occasion, prepared, settings, programs, say=say)
        for name in order
    }
    exact: dict[str, Future] = {}

    def finish(name: str) -> Findings:
        findings, sample = studies[name].result()
        exact[name] = desk.submit(1, _again_at_worker, where[name], occasion, sample, settings, processors(), say=say)
        keep(name, findings.tree)
        return findings

    found = dict(zip(where, side_by_side(finish, where, len(laws)), strict=True))
    return found, lambda name: exact[name].result()


@float64
def _study_at_worker(
    law: "str | Path", occasion: str, prepared: Prepared, settings: Settings, programs: dict[str, Any], say: Progress
) -> tuple[Findings, Sample]:
    for name, value in programs.items():
        jax.config.update(name, value)
    findings, sample = Stages(say, settings).study(_loaded(law, occasion), prepared)
    return findings, sample.without_law()


@float64
def _again_at_worker(
    law: "str | Path", occasion: str, sample: Sample, settings: Settings, share: list[int], say: Progress
) -> tuple[LeaveOneOut, Evidence]:
    with on_processors(share):  # others have less to do by now
        return _without_discrepancy(sample.with_law(_loaded(law, occasion)), settings)


@lru_cache
def _loaded(law: "str | Path", occasion: str) -> Law:
    """The law, read once by each process for one comparison, as its programs belong to the object."""
    return load_laws([law])[0]


def _without_discrepancy(sample: Sample, settings: Settings) -> tuple[LeaveOneOut, Evidence]:
    """Exact leave-one-out scores and evidence with next to no discrepancy."""
    found = with_prior(sample, VARIANTS[NO_DISCREPANCY], **_redraw_settings(settings))
    return _exact_scores(found, settings), found.evidence


def _exact_scores(sample: Sample, settings: Settings) -> LeaveOneOut:
    """Leave-one-out by importance sampling; conditions for which that cannot be trusted are really left out."""
    loo, again = leave_one_out(sample.log_likelihood[None], sample.log_weight), _redraw_settings(settings)
    if len(np.unique(sample.z[:, 0])) <= settings["chains"]:
        return loo  # chains that stand still would stand still again
    wanted = [int(i) for i in needs_refit(loo, len(sample.z))]
    refits = side_by_side(lambda i: without_condition(sample, i, **again), wanted, len(processors()))
    return with_refits(
        loo, {i: (one.log_likelihood[:, i], one.log_weight) for i, one in zip(wanted, refits, strict=True)}
    )


def _redraw_settings(settings: Settings) -> dict[str, int]:
    return {name: settings[name] for name in ("seed", "warmup", "chains")}


class Stages:
    """The stages of a law's study; different laws are in different stages at a time, so that each program is compiled once."""

    def __init__(self, say: Progress, settings: dict[str, Any]) -> None:
        self.say, self.settings = say, settings
        self.locks = {name: Lock() for name in ("explore", "sample", "vary", "write")}

    @float64
    def study(self, law: Law, prepared: Prepared) -> tuple[Findings, Sample]:
        """Posterior, evidence by two methods, leave-one-out; the last two at three prior widths."""
        seed, draws, warmup, chains = (self.settings[name] for name in ("seed", "draws", "warmup", "chains"))
        with self.locks["explore"]:
            self.say(f"{law.name}: from the prior to the posterior")
            problem = build_problem(law, prepared, **self.settings)
        with self.locks["sample"]:
            self.say(f"{law.name}: sampling")
            fit = fit_law(problem, seed=seed, draws=draws, warmup=warmup, chains=chains)
        with self.locks["write"]:
            tree = fit_tree(fit, prepared, seed=seed)
            says = _says(fit, tree, seed)
        with self.locks["vary"]:
            self.say(f"{law.name}: evidence, prior widths, left-out conditions")
            first, redraw = first_sample(fit, seed), _redraw_settings(self.settings)
            says["point_bayes_factors"] = _points(first)
            others = {key: VARIANTS[key] for key in WIDTHS if key != 1.0}
            found = side_by_side(lambda widths: with_prior(first, widths, **redraw), others.values(), len(processors()))
            samples = {1.0: first} | dict(zip(others, found, strict=True))
            loo = {width: _exact_scores(samples[width], self.settings) for width in WIDTHS}
        discrepancy = fit.sites["discrepancy"]
        low, high = np.quantile(discrepancy, [0.05, 0.95])
        findings = Findings(
            convergence=fit.convergence,
            parameters=parameter_summary(fit),
            discrepancy={"mean": float(discrepancy.mean()), "q05": float(low), "q95": float(high)},
            loo=loo,
            evidence={width: sample.evidence for width, sample in samples.items()},
            smc=fit.problem.evidence,
            tree=tree,
            says=says,
        )
        return findings, first


def _says(fit: Fit, tree: xr.DataTree, seed: int) -> dict[str, Any]:
    """What the posterior says beyond its parameters: identifiability, trends, critical learning rates."""
    law = fit.problem.law
    return {
        "identifiability": identifiability(tree),
        "residual_trends": residual_trends(tree),
        "critical_learning_rates": critical_learning_rates(law, tree, seed=seed),
    }


def _points(first: Sample) -> dict[str, dict[str, float]]:
    """Bayes factors of the points of a family against the whole."""
    points = {}
    for name, value in first.problem.law.points:
        found = point_bayes_factor(first.problem, first.z, first.evidence, name, value)
        points[f"{name}={value:g}"] = {
            "log_bayes_factor": found.log_evidence,
            "log_bayes_factor_se": found.standard_error,
        }
    return points


def _pairs(results: dict[str, Findings]) -> dict[tuple[str, str], list[Pair]]:
    pairs = {}
    for one, two in permutations(results, 2):
        a, b = results[one], results[two]
        shown = a.evidence_agrees and b.evidence_agrees
        pairs[one, two] = [
            Pair(
                width,
                *difference(a.loo[width], b.loo[width]),
                a.evidence[width].log_evidence - b.evidence[width].log_evidence if shown else float("nan"),
            )
            for width in a.loo
        ]
    return pairs


def _assemble(prepared: Prepared, laws: Sequence[Law], results: dict[str, Findings], again: Again | None) -> Comparison:
    frame, check = prepared.conditions.frame, prepared.check
    candidates = [
        Candidate(
            law.name,
            law.special_cases,
            results[law.name].convergence.trustworthy,
            results[law.name].convergence.reason,
        )
        for law in laws
        if law.name in results
    ]
    verdict, reason = decide(check, candidates, pairs := _pairs(results), len(frame))
    if verdict in results and again is not None:  # it must hold without the discrepancy, too, with exact scores
        exact = side_by_side(again, results, len(processors()))
        for result, (loo, evidence) in zip(results.values(), exact, strict=True):
            result.loo[NO_DISCREPANCY], result.evidence[NO_DISCREPANCY] = loo, evidence
        verdict, reason = decide(check, candidates, pairs := _pairs(results), len(frame))
    fits = {name: result.tree for name, result in results.items()}
    names = sorted(results, key=lambda name: -results[name].loo[1.0].elpd)
    weights = stacking_weights(np.array([results[n].loo[1.0].pointwise for n in names])) if names else np.zeros(0)
    evidences = np.array([results[n].evidence[1.0].log_evidence for n in names])
    shown = bool(names) and all(results[n].evidence_agrees for n in names)
    probabilities = np.exp(evidences - logsumexp(evidences)) if shown else np.full(len(names), np.nan)
    entries = {}
    for name, weight, probability in zip(names, weights, probabilities, strict=True):
        entries[name] = _entry(results[name], results[names[0]], float(weight), float(probability))
    if verdict in results:
        reason += law_sentence(entries[verdict], results[verdict].says["residual_trends"])
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
        "escape_check": check.as_dict() | {"sentence": check.sentence},
        "left_out": list(prepared.left_out),
        "not_measured": prepared.conditions.not_measured,
        "rare_looks": prepared.conditions.rare_looks,
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


def _entry(result: Findings, best: Findings, weight: float, probability: float) -> dict[str, Any]:
    loo, convergence = result.loo[1.0], result.convergence
    gap, error = difference(loo, best.loo[1.0])
    k = np.where(loo.refitted, -np.inf, loo.pareto_k)
    bridge = result.evidence[1.0]
    known = result.says["identifiability"]
    parameters = {
        name: row | (known.loc[name].to_dict() if name in known.index else {})
        for name, row in result.parameters.items()
    }
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
        "log_evidence_by_prior_width": {f"{w:g}": result.evidence[w].log_evidence for w in sorted(WIDTHS)},
        "posterior_probability": probability,
        "discrepancy": result.discrepancy,
        "parameters": parameters,
        "identifiability": known.to_dict("index"),
        "residual_trends": result.says["residual_trends"].reset_index().to_dict("records"),
        "critical_learning_rates": result.says["critical_learning_rates"].to_dict("records"),
        "point_bayes_factors": result.says["point_bayes_factors"],
        "rhat_max": convergence.rhat_max,
        "ess_min": convergence.ess_min,
        "divergences": convergence.divergences,
        "pareto_k_max": k.max(),
        "refitted_conditions": int(loo.refitted.sum()),
        "trustworthy": convergence.trustworthy,
        "not_trustworthy_because": convergence.reason or None,
    }


def _table(laws: dict[str, Any]) -> pd.DataFrame:
    discrepancy = {f"discrepancy_{q}": q for q in ("mean", "q05", "q95")}
    columns = (
        *("elpd", "elpd_se", "elpd_diff", "elpd_diff_se", "stacking_weight", "log_evidence", "log_evidence_se"),
        *("posterior_probability", *discrepancy),
        *("rhat_max", "ess_min", "divergences", "pareto_k_max", "trustworthy"),
    )
    rows = [entry | {name: entry["discrepancy"][q] for name, q in discrepancy.items()} for entry in laws.values()]
    return pd.DataFrame(rows, index=pd.Index(list(laws), name="law"), columns=list(columns))
