"""What the scripts ``reproduce_*.py`` share: the command line, one claim of the paper with what was measured, and the page of all claims.

    python scripts/reproduction.py [--folder data/reproduction]

writes the page ``README.md`` and ``datapackage.json`` of that folder from the claims that the scripts left there; a script that writes into
data/reproduction does so itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import t as student

CONCLUSIONS = ("agree", "differ", "cannot tell")
FOLDER = Path(__file__).resolve().parent.parent / "data" / "reproduction"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 130,
    "svg.hashsalt": "escape",
}


@dataclass(frozen=True)
class Claim:
    """One statement of the paper beside the measurement: a row of the page.

    Args:
        claim: what the paper says.
        measured: what was measured here, with its interval.
        conclusion: ``agree``, ``differ`` or ``cannot tell``.
    """

    claim: str
    measured: str
    conclusion: str

    def __post_init__(self) -> None:
        if self.conclusion not in CONCLUSIONS:
            raise ValueError(f"a conclusion is one of {CONCLUSIONS}, not {self.conclusion!r}")


@dataclass
class Reproduction:
    """Collects the results of one script and writes them: tables as CSV, figures as PNG, claims as JSON."""

    name: str
    title: str
    output: Path
    quick: bool
    tables: dict[str, str] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def table(self, suffix: str, frame: pd.DataFrame, description: str) -> None:
        """Write ``<name>_<suffix>.csv``."""
        path = self._path(f"{suffix}.csv")
        self._replace(path, lambda temporary: frame.to_csv(temporary, index=False, float_format="%.6g"))
        self.tables[path.name] = description

    def figure(self, suffix: str, figure: plt.Figure, description: str) -> None:
        """Write ``<name>_<suffix>.png`` (below 200 KiB) and close the figure."""
        path = self._path(f"{suffix}.png")
        self._replace(path, lambda temporary: figure.savefig(temporary, format="png", bbox_inches="tight"))
        plt.close(figure)
        self.figures[path.name] = description

    def finish(self, claims: Sequence[Claim]) -> None:
        """Write ``<name>.json`` with the claims and print them."""
        seconds = time.perf_counter() - self.began
        record = {
            "name": self.name,
            "title": self.title,
            "command": f"python scripts/reproduce_{self.name}.py" + (" --quick" if self.quick else ""),
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores",
            "seconds": round(seconds),
            "claims": [asdict(claim) for claim in claims],
            "tables": self.tables,
            "figures": self.figures,
        }
        path = self.output / f"{self.name}.json"
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        self._replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        for claim in claims:
            print(f"paper:    {claim.claim}\nmeasured: {claim.measured}\n          {claim.conclusion}")
        print(f"{seconds:.0f} s; tables and figures in {self.output}")

    def _path(self, ending: str) -> Path:
        return self.output / f"{self.name}_{ending}"

    def _replace(self, path: Path, write: Callable[[Path], object]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def run(name: str, title: str, doc: str | None, main: Callable[[Reproduction], Sequence[Claim]]) -> None:
    """Parse ``--quick`` and ``--output``, run ``main`` and write what it found."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form that takes less than two minutes")
    parser.add_argument("--output", type=Path, help="folder for tables and figures (default: results/reproduction)")
    arguments = parser.parse_args()
    plt.rcParams.update(STYLE)
    reproduction = Reproduction(name, title, arguments.output or Path("results/reproduction"), arguments.quick)
    reproduction.finish(main(reproduction))
    if reproduction.output.resolve() == FOLDER:
        write_page(FOLDER)


def across_runs(values: Sequence[float], *, single: bool = False) -> tuple[float, float, float]:
    """The mean over independent runs and its 90 % interval (Student's t); with ``single`` that of one further run.

    >>> [round(x, 2) for x in across_runs([1.0, 2.0, 3.0])], [round(x, 2) for x in across_runs([1.0, 2.0, 3.0], single=True)]
    ([2.0, 0.31, 3.69], [2.0, -1.37, 5.37])
    """
    found = np.asarray(values, float)
    spread = found.std(ddof=1) * np.sqrt(1 / len(found) + single)
    reach = float(student.ppf(0.95, len(found) - 1) * spread)
    mean = float(found.mean())
    return mean, mean - reach, mean + reach


def page(records: Sequence[dict]) -> str:
    """The page of all claims, in Markdown."""
    lines = [
        "# The published experiments, measured again",
        "",
        "Mori, Ziyin, Liu and Ueda, *Power-Law Escape Rate of SGD* (ICML 2022). One row for each claim; intervals are 90 % unless stated.",
        "",
        "| experiment | the paper says | measured here | | command, time |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        for i, claim in enumerate(record["claims"]):
            made = (
                f"`{record['command']}`, {record['seconds']} s, {record['machine']}, {record['date']}" if i == 0 else ""
            )
            title = record["title"] if i == 0 else ""
            lines.append(f"| {title} | {claim['claim']} | {claim['measured']} | {claim['conclusion']} | {made} |")
    for record in records:
        lines += ["", f"## {record['title']}", ""]
        lines += [f"![{text}]({name})\n\n{text}" for name, text in record["figures"].items()]
        lines += ["", *(f"- `{name}`: {text}" for name, text in record["tables"].items())]
    return "\n".join(lines) + "\n"


def package(records: Sequence[dict], folder: Path) -> dict:
    """The Frictionless description of the tables in the folder."""
    resources = []
    for record in records:
        for name, text in record["tables"].items():
            content = (folder / name).read_bytes()
            columns = pd.read_csv(folder / name, nrows=1000).dtypes.items()
            kinds = {"i": "integer", "f": "number", "b": "boolean"}
            resources.append(
                {
                    "name": Path(name).stem,
                    "path": name,
                    "profile": "tabular-data-resource",
                    "description": text,
                    "measured": {key: record[key] for key in ("command", "date", "machine", "seconds")},
                    "bytes": len(content),
                    "hash": f"sha256:{hashlib.sha256(content).hexdigest()}",
                    "schema": {"fields": [{"name": c, "type": kinds.get(kind.kind, "string")} for c, kind in columns]},
                }
            )
    return {"profile": "tabular-data-package", "name": "escape-inference-reproduction", "resources": resources}


def write_page(folder: Path) -> None:
    """Write the page of all claims and the description of the tables."""
    order = ("noise", "decoupling", "stationary", "passage_times", "critical_learning_rate", "saddles")
    paths = sorted((p for p in folder.glob("*.json") if p.stem in order), key=lambda path: order.index(path.stem))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    (folder / "README.md").write_text(page(records), encoding="utf-8")
    text = json.dumps(package(records, folder), indent=1, ensure_ascii=False) + "\n"
    (folder / "datapackage.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    write_page(parser.parse_args().folder)
