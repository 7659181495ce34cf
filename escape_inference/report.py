"""A page to look at: the verdict, the laws against the measured rates, the parameters against their priors."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import arviz_base  # noqa: F401  (registers what reading a posterior needs)
import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import gamma

from escape_inference.errors import InputError
from escape_inference.posterior import write_text

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.verdict{font-size:1.5rem;font-weight:600}img{max-width:100%}.doubt{color:#a33}"""


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` in a folder that ``compare`` has filled; one file, pictures included.

    Raises:
        InputError: there is no ``comparison.json`` in the folder, or a posterior that it names is missing.
    """
    folder = Path(folder)
    source = folder / "comparison.json"
    if not source.is_file():
        raise InputError(f"{source}: not found; run escape-inference compare TABLE --output {folder} first")
    report = json.loads(source.read_text(encoding="utf-8"))
    trees = {}
    for name in report["laws"]:
        path = folder / f"{name}.nc"
        if not path.is_file():
            raise InputError(f"{path}: not found, though {source.name} names this law; run compare again")
        trees[name] = xr.open_datatree(path, engine="netcdf4")
    parts = [
        f"<h1>Escape of SGD: {html.escape(Path(report['data']['path']).name)}</h1>",
        f"<p class=verdict>Verdict: {html.escape(report['verdict'])}</p><p>{html.escape(report['reason'])}</p>",
        _escape_check(report),
    ]
    if trees:
        parts += [
            "<h2>Laws, best first</h2>",
            _laws(report),
            "<h2>Measured rates against each law</h2>",
            _image(rates_figure(trees)),
        ]
        parts += ["<h2>Parameters</h2>", *(_parameters(name, law) for name, law in report["laws"].items())]
        parts += [_image(parameters_figure(trees, report))]
    parts += [f"<h2>Data and settings</h2>{_pairs(report['data'] | report['settings'])}"]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Escape of SGD</title><style>{STYLE}</style>{''.join(parts)}</html>"
    for tree in trees.values():
        tree.close()
    path = folder / "report.html"
    write_text(path, page)
    return path


def rates_figure(trees: dict[str, xr.DataTree]) -> Figure:
    """Measured escape rates with 90 % intervals against the posterior of each law, one panel a law; on the line is right."""
    figure = Figure(figsize=(4.2 * len(trees), 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(trees), sharey=True))
    for axis, (name, tree) in zip(axes, trees.items(), strict=True):
        escapes = tree["observed_data"]["escapes"].to_numpy()
        exposure = tree["constant_data"]["exposure"].to_numpy()
        predicted = np.quantile(tree["posterior"]["log_rate"].to_numpy(), [0.05, 0.5, 0.95], axis=(0, 1)) / np.log(10)
        low, high = gamma.ppf(0.05, np.maximum(escapes, 1e-3)) / exposure, gamma.ppf(0.95, escapes + 1) / exposure
        rate = np.where(escapes > 0, escapes, np.nan) / exposure
        seen = escapes > 0
        floor = np.where(seen, low, high / 1e3)
        center = np.log10(np.where(seen, rate, high))
        axis.errorbar(
            predicted[1],
            center,
            xerr=[predicted[1] - predicted[0], predicted[2] - predicted[1]],
            yerr=[center - np.log10(floor), np.log10(high) - center],
            fmt="o",
            ms=4,
            lw=0.8,
            color="#1f5fa8",
            ecolor="#9db8d6",
        )
        ends = [np.nanmin([center.min(), predicted[1].min()]), np.nanmax([center.max(), predicted[1].max()])]
        axis.plot(ends, ends, color="#444", lw=1)
        axis.set_title(name)
        axis.set_xlabel("law: log10 κ (1/time)")
    axes[0].set_ylabel("measured: log10 κ (1/time), 90 % interval")
    return figure


def parameters_figure(trees: dict[str, xr.DataTree], report: dict[str, Any]) -> Figure:
    """Posterior (filled) and prior (line) of every scalar parameter, with the value of the theory."""
    panels = [
        (law, name)
        for law, tree in trees.items()
        for name in [*report["laws"][law]["parameters"], "discrepancy"]
        if name in tree["posterior"] and tree["posterior"][name].ndim == 2
    ]
    rows = -(-len(panels) // 4)
    figure = Figure(figsize=(12, 2.4 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, 4)).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (law, name) in zip(axes, panels, strict=False):
        draws = trees[law]["posterior"][name].to_numpy().ravel()
        prior = trees[law]["prior"][name].to_numpy().ravel()
        low, high = np.quantile(np.concatenate([draws, np.quantile(prior, [0.05, 0.95])]), [0.0, 1.0])
        bins = np.linspace(low, high, 50)
        axis.hist(draws, bins, density=True, color="#1f5fa8", alpha=0.7, label="posterior")
        axis.hist(prior, bins, density=True, histtype="step", color="#666", label="prior")
        theory = report["laws"][law]["parameters"].get(name, {}).get("theory")
        if theory is not None:
            axis.axvline(theory, color="#c33", lw=1.2, label="theory")
        axis.set_title(f"{law}\n{name.replace('_', ' ')}", fontsize=9)
        axis.set_yticks([])
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _image(figure: Figure) -> str:
    with matplotlib.rc_context({"font.size": 10}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _rows(header: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    return (
        f"<table><tr>{head}</tr>"
        + "".join("<tr>" + "".join(f"<td>{_show(v)}</td>" for v in row) + "</tr>" for row in rows)
        + "</table>"
    )


def _laws(report: dict[str, Any]) -> str:
    names = [
        "elpd",
        "elpd_diff",
        "elpd_diff_se",
        "stacking_weight",
        "log_evidence",
        "log_evidence_se",
        "posterior_probability",
    ]
    names += ["rhat_max", "ess_min", "divergences", "pareto_k_max", "trustworthy"]
    return _rows(
        ["law", *names, "discrepancy (factor)"],
        [[law, *(e[n] for n in names), float(np.exp(e["discrepancy"]["mean"]))] for law, e in report["laws"].items()],
    )


def _parameters(name: str, law: dict[str, Any]) -> str:
    columns = ["mean", "sd", "q05", "q95", "prior_sd", "moved_by_data", "theory", "contains_theory"]
    rows = [[parameter, *(row[c] for c in columns)] for parameter, row in law["parameters"].items()]
    sentences = [row["sentence"] for row in law.get("identifiability", {}).values()]
    sentences += [
        f"residual log rates against {trend['variable'].replace('_', ' ')}: p = {trend['p_value']:.2g}"
        + (", a trend" if trend["trend"] else "")
        for trend in law["residual_trends"]
        if trend["p_value"] is not None
    ]
    sentences += [
        f"log Bayes factor of {point.replace('_', ' ')} against the family: {found['log_bayes_factor']:.2f} ± {found['log_bayes_factor_se']:.2f}"
        for point, found in law["point_bayes_factors"].items()
        if found["log_bayes_factor"] is not None
    ]
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<h3>{html.escape(name)}</h3>" + _rows(["parameter", *columns], rows) + f"<ul>{listed}</ul>" + _ramps(law)


def _ramps(law: dict[str, Any]) -> str:
    """Critical learning rates of the ramps in the data, if there are any."""
    ramps = law["critical_learning_rates"]
    if not ramps:
        return ""
    header = [name.replace("_", " ") for name in ramps[0]]
    return "<p>Critical learning rates, 90 % intervals:</p>" + _rows(header, [list(row.values()) for row in ramps])


def _escape_check(report: dict[str, Any]) -> str:
    said = (
        ("Left out, not escape", "left_out"),
        ("Not measured, inferred with wide priors", "not_measured"),
        ("Looks too rare for a threshold (check_interval η h* above 0.2)", "rare_looks"),
    )
    return f"<h2>Is it escape?</h2>{_pairs(report['escape_check'])}" + "".join(
        f"<p class=doubt>{title}: {html.escape(', '.join(report[key]))}</p>" for title, key in said if report.get(key)
    )


def _pairs(values: dict[str, Any]) -> str:
    return _rows(["", ""], [[k.replace("_", " "), v] for k, v in values.items()])
