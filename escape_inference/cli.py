"""The command line: ``escape-inference infer | compare | collect | report``."""

import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Timer
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from escape_inference import cli_simulate
from escape_inference.errors import InputError
from escape_inference.workers import Workers

if TYPE_CHECKING:
    from escape_inference.inference import Prepared

INTERRUPTED = 130  #: the exit code that Typer gives Ctrl-C
SHIPPED = 5  #: laws that are compared where none is named

app = typer.Typer(
    name="escape-inference",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Infer and compare laws for the escape rate of stochastic gradient descent from measured escape times.",
    epilog="Start with: escape-inference compare TABLE --output results. The table's columns are described in README.md.",
)
SHOWN = 5  #: conditions named at most in one printed line
TablePath = Annotated[
    Path, typer.Argument(help="Measured table, CSV or Parquet: one row for each run at one condition.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if it is not there.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Draws = Annotated[int, typer.Option("--draws", min=100, help="Posterior draws of each chain.")]
Warmup = Annotated[int, typer.Option("--warmup", min=100, help="Warm-up steps of each chain.")]
Chains = Annotated[
    int, typer.Option("--chains", min=2, help="Chains, run side by side; a fit with fewer than 4 is not trustworthy.")
]
Pooling = Annotated[
    str,
    typer.Option(
        "--pooling",
        help="complete: one temperature scale, n and prefactor for all minima; partial: one for each minimum around a population value.",
    ),
]


@app.command()
def infer(
    table: TablePath,
    law: Annotated[str, typer.Option("--law", help="Name of a law, or the path of a law's .py file.")] = "power_law",
    output: Output = Path("results"),
    seed: Seed = 0,
    quiet: Quiet = False,
    draws: Draws = 1000,
    warmup: Warmup = 500,
    chains: Chains = 4,
    pooling: Pooling = "complete",
) -> None:
    """Posterior of one law: writes OUTPUT/<law>.nc (open it with arviz.from_netcdf) and prints a summary.

    Example: escape-inference infer data/mnist_two_class.csv --law power_law --output results
    """
    with _reading():
        from escape_inference import inference
        from escape_inference import law as laws
        from escape_inference.identification import identifiability
        from escape_inference.posterior import parameters_of, save_tree
        from escape_inference.prediction import critical_learning_rates
        from escape_inference.trends import residual_trends, trend_sentence

    _check_writable(output)
    _keep_compiled_programs()
    chosen = laws.load_law(law)
    with _progress(quiet) as say:
        say("reading the table and checking for escape")
        prepared = inference.prepare(table, seed=seed)
        say(f"{chosen.name}: sampling")
        settings = {"seed": seed, "draws": draws, "warmup": warmup, "chains": chains}
        tree = inference.infer(chosen, prepared, pooling=pooling, **settings)
        known = identifiability(tree)
        ramps = critical_learning_rates(chosen, tree, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{chosen.name}.nc"
    save_tree(tree, path)
    _print_data(prepared)
    _print_parameters(chosen.name, parameters_of(tree))
    for sentence in known["sentence"]:
        print(f"  {sentence}")
    if left := trend_sentence(residual_trends(tree)):
        print(f"  {left}")
    _print_ramps(chosen.name, ramps.to_dict("records"))
    if not tree.attrs["trustworthy"]:
        print(f"NOT TRUSTWORTHY: {tree.attrs['convergence']}")
    print(f"Posterior: {path}")


@app.command()
def compare(
    table: TablePath,
    laws: Annotated[
        str | None,
        typer.Option("--laws", help="Comma-separated names or law files; by default every law that applies."),
    ] = None,
    output: Output = Path("results"),
    seed: Seed = 0,
    quiet: Quiet = False,
    draws: Draws = 1000,
    warmup: Warmup = 500,
    chains: Chains = 4,
    pooling: Pooling = "complete",
) -> None:
    """Fit several laws and compare them: writes posteriors, comparison.csv and comparison.json, prints the verdict.

    The verdict is a law only when leave-one-condition-out and the Bayes factor agree by wide margins at three prior widths;
    otherwise it is "inconclusive", or "not_escape" when the times are not those of an escape, with the reason.

    Example: escape-inference compare data/mnist_two_class.csv --laws power_law,arrhenius --output results
    """
    place = _check_writable(output)
    names = [name.strip() for name in laws.split(",") if name.strip()] if laws is not None else None
    if names is not None and not names:
        raise InputError("--laws names no law; give names separated by commas, or leave the option out")
    several = len(names) if names is not None else SHIPPED
    with Workers(several) as workers, _progress(quiet) as say:
        with _reading():
            from escape_inference.comparison import compare as run
            from escape_inference.inference import prepare
            from escape_inference.law import load_laws
            from escape_inference.posterior import save_tree, write_text

        _keep_compiled_programs()
        if names is not None:
            load_laws(names)  # a wrong name is told before anything is read
        say("reading the table and checking for escape")
        prepared = prepare(table, seed=seed)
        settings = {"seed": seed, "draws": draws, "warmup": warmup, "chains": chains}
        with TemporaryDirectory(prefix=".escape-inference-", dir=place) as folder:
            keep = lambda name, tree: save_tree(tree, Path(folder) / f"{name}.nc")  # while other laws are computed
            result = run(prepared, names, pooling=pooling, progress=say, keep=keep, workers=workers, **settings)
            output.mkdir(parents=True, exist_ok=True)
            for name in result.fits:
                (Path(folder) / f"{name}.nc").replace(output / f"{name}.nc")
    write_text(output / "comparison.csv", result.table.to_csv())
    write_text(
        output / "comparison.json", json.dumps(result.report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    _print_data(prepared)
    _print_comparison(result.report)
    print(f"Verdict: {result.verdict}")
    print(f"Reason: {result.reason}")
    print(f"Results: {output}")


def _keys(asked: bool) -> None:
    if asked:
        from escape_inference.trainers.schema import keys_text

        print(keys_text())
        raise typer.Exit


@app.command()
def collect(
    study: Annotated[Path, typer.Argument(help="Study file (TOML): network, data, minima, conditions.")],
    output: Output = Path("results"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a campaign that was stopped.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="In place of the study's own seed.")] = None,
    quiet: Quiet = False,
    keys: Annotated[
        bool,
        typer.Option("--keys", help="Print every key that a study may hold, and exit.", callback=_keys, is_eager=True),
    ] = False,
) -> None:
    """Measure: train minima, run the replicas, write OUTPUT/measurements.parquet.

    Finished pieces are kept: stop it at any time and go on with --resume; the table is the same as without a stop.

    Example: escape-inference collect scripts/studies/quick.toml --output measured
    """
    from escape_inference.trainers.collect import collect as run

    path = run(study, output, resume=resume, seed=seed, progress=not quiet)
    print(f"Measurements: {path}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with the results of compare.")],
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write FOLDER/report.html from the results of compare: verdict, tables, posteriors, rates against the laws.

    Example: escape-inference report results
    """
    from escape_inference.report import write_report

    with _progress(quiet) as say:
        say("drawing")
        path = write_report(folder)
    print(f"Report: {path}")


app.command()(cli_simulate.simulate)
app.command()(cli_simulate.check_law)


def _keep_compiled_programs() -> None:
    """Compiled programs are kept in the user's cache folder, so that a second command starts at once."""
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    if jax.config.values.get("jax_compilation_cache_dir") is None and os.access(Path(home).parent, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "escape_inference"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def main() -> None:
    """Run the command line; exit code 0 done, 2 bad input or usage, 1 anything else (Ctrl-C, too)."""
    atexit.register(gc.freeze)  # nothing is left to collect at the end
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app(standalone_mode=True)
    except InputError as error:
        print(f"escape-inference: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        print("escape-inference: stopped; nothing half-written is left", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"escape-inference: {error}", file=sys.stderr)
        sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C; a moment later where JAX is called by the garbage collector, which takes no exceptions."""
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        Timer(0.01, signal.raise_signal, (number,)).start()
    else:
        raise KeyboardInterrupt


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What says how far the work is; threads that outlive it are not heard."""
    console, ended, turn = Console(stderr=True, quiet=quiet), False, Lock()

    def say(text: str) -> None:
        with turn:
            if not ended:
                show(text)

    with ExitStack() as stack:
        if console.is_terminal and not quiet:
            show: Callable[[str], None] = stack.enter_context(console.status("starting")).update
        else:
            show = partial(console.print, highlight=False)
        try:
            yield say
        finally:
            with turn:
                ended = True


def _check_writable(output: Path) -> Path:
    """The folder, or the nearest one above it that is there.

    Raises:
        InputError: nothing can be written there.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    place = output
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--output {output}: no permission to write in {place}")
    return place


@contextmanager
def _reading() -> Iterator[None]:
    """While libraries are read: Ctrl-C waits, as some cannot be stopped halfway, and so does the garbage collector, which would look
    for long and find nothing."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        signal.signal(signal.SIGINT, before)
    if pressed and before is not signal.SIG_IGN:
        raise KeyboardInterrupt


def _print_data(prepared: "Prepared") -> None:
    """What the table is, before what it says."""
    print(f"Escape check: {prepared.check.sentence}")
    if prepared.left_out:
        print(f"Left out, not escape: {', '.join(prepared.left_out)}")
    if empty := prepared.conditions.not_measured:
        print(f"Not measured, inferred with wide priors: {', '.join(empty)}")
    if rare := prepared.conditions.rare_looks:
        more = f" and {len(rare) - SHOWN} more" if len(rare) > SHOWN else ""
        print(f"Looks too rare for a threshold (check_interval η h* above 0.2): {', '.join(rare[:SHOWN])}{more}")


def _format(value: float | bool | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(150, Console().width)).print(table)


def _print_parameters(law: str, parameters: dict[str, dict[str, float]]) -> None:
    columns = ["mean", "sd", "q05", "q95", "prior_sd", "moved_by_data", "theory", "contains_theory"]
    rows = [[name, *(_format(row.get(c)) for c in columns)] for name, row in parameters.items()]
    _print_table(f"{law}: parameters", ["parameter", *columns], rows)


def _print_comparison(report: dict) -> None:
    import pandas as pd

    from escape_inference.trends import trend_sentence

    columns = ["elpd", "elpd_diff", "elpd_diff_se", "stacking_weight", "log_evidence", "pareto_k_max", "trustworthy"]
    rows = [
        [name, *(_format(law[c]) for c in columns), _format(law["discrepancy"]["mean"])]
        for name, law in report["laws"].items()
    ]
    _print_table("laws, best first", ["law", *columns, "discrepancy"], rows)
    for name, law in report["laws"].items():
        _print_parameters(name, law["parameters"])
        for parameter in law["identifiability"].values():
            if parameter["status"] != "identified":
                print(f"  {parameter['sentence']}")
        if left := trend_sentence(pd.DataFrame(law["residual_trends"]).set_index("variable")):
            print(f"  {left}")
        for point, found in law["point_bayes_factors"].items():
            value, error = _format(found["log_bayes_factor"]), _format(found["log_bayes_factor_se"])
            print(f"  log Bayes factor of {point} against the family: {value} ± {error}")
        _print_ramps(name, law["critical_learning_rates"])


def _print_ramps(law: str, rows: list[dict]) -> None:
    if not rows:
        return
    bands = ("measured", "predicted", "stability_limit")
    table = [
        [str(row["minimum"]), _format(row["batch_size"]), f"{row['jumped']}/{row['runs']}"]
        + [f"{_format(row[b])} [{_format(row[f'{b}_q05'])}, {_format(row[f'{b}_q95'])}]" for b in bands]
        + [_format(row["gradient_descent_limit"])]
        for row in rows
    ]
    columns = ["minimum", "B", "jumped", "measured", "predicted", "2B/((n−2)αh*)", "2/h*"]
    _print_table(f"{law}: critical learning rates, 90 % intervals", columns, table)


if __name__ == "__main__":
    main()
