"""Commands that need no measurement: ``escape-inference simulate`` and ``escape-inference check-law``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from escape_inference.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".pq")
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def simulate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write: .csv or .parquet by its name.")],
    law: Annotated[str | None, typer.Option("--law", help="Draw from this law: its name, or its .py file.")] = None,
    world: Annotated[
        str | None, typer.Option("--world", help="Or step the equation of motion: noise 'loss' (as SGD) or 'uniform'.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            help="NAME=VALUE, as often as needed; default: the theory's value or the prior's median.",
        ),
    ] = None,
    design: Annotated[
        Path | None, typer.Option("--design", help="Table of conditions in place of the seven options below.")
    ] = None,
    barrier: Annotated[str, typer.Option("--barrier", help="saddle or threshold.")] = "saddle",
    minima: Annotated[int, typer.Option("--minima", min=1, help="Number of minima.")] = 12,
    learning_rates: Annotated[int, typer.Option("--learning-rates", min=1, help="Learning rates of each minimum.")] = 3,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs, slots or ramps of each condition.")] = 40,
    start: Annotated[
        str, typer.Option("--start", help="minimum or quasi_stationary: where the clock starts.")
    ] = "minimum",
    check_interval: Annotated[int, typer.Option("--check-interval", min=1, help="Iterations between two looks.")] = 1,
    ramp_levels: Annotated[
        int, typer.Option("--ramp-levels", min=0, help="Ramps of so many learning rates; 0: fixed rates.")
    ] = 0,
    dimension: Annotated[int, typer.Option("--dimension", min=1, help="Directions of the world's well.")] = 2,
    noise_exponent: Annotated[
        float, typer.Option("--noise-exponent", help="The world's loss noise grows as loss to this power.")
    ] = 1.0,
    noise_strength: Annotated[
        float | None, typer.Option("--noise-strength", help="D of the world's uniform noise (loss).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the table if it is there.")] = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Simulate a measured table, from a law or by stepping an equation of motion; other commands read it.

    With --law the times are exactly memoryless, at the rates of the law; its parameters may include log_prefactor and
    discrepancy. With --world a particle moves in a landscape with noise, and no law is used: noise that grows with the loss
    makes the power law true, uniform noise makes the Arrhenius law true.

    The conditions are chosen so that escapes are rare and can be seen. A --design gives them instead, one row for each:
    minimum, learning_rate, batch_size, loss_minimum, loss_barrier, hessian_minimum, hessian_saddle (saddles), runs,
    max_steps, and start, check_interval, ramp (a label for the levels of a ramp) where wanted.

    Example: escape-inference simulate --law power_law -p effective_dimension=4 --minima 10 --output table.csv

    Example: escape-inference simulate --world loss --dimension 3 --ramp-levels 12 --output ramps.parquet
    """
    _check_output(output, overwrite)
    if (law is None) == (world is None):
        raise InputError("give either --law (draw from a law) or --world (step an equation of motion)")
    for option, value, allowed in (
        ("--barrier", barrier, ("saddle", "threshold")),
        ("--start", start, ("minimum", "quasi_stationary")),
        *([("--world", world, ("loss", "uniform"))] if world else []),
    ):
        if value not in allowed:
            raise InputError(f"{option} is {' or '.join(allowed)}, not {value!r}")
    rows = _read_design(design) if design is not None else None
    if rows is not None:
        barrier = _barrier(rows)
    shape: dict[str, Any] = {"minima": minima, "learning_rates": learning_rates, "runs": runs, "seed": seed}
    shape |= {"check_interval": check_interval, "start": start}
    if ramp_levels and rows is None:
        if ramp_levels < 2 or start != "minimum":
            raise InputError("--ramp-levels needs at least 2 levels, and ramps start at the minimum")
        shape |= {"learning_rates": max(2, learning_rates)}
    if law is not None:
        values = _parameters(parameter or [])
        table, made_with = _from_law(law, values, rows, barrier, shape, ramp_levels, seed)
    else:
        if parameter:
            raise InputError(
                "--parameter belongs to a --law; a --world has --dimension, --noise-exponent, --noise-strength"
            )
        if world == "uniform" and noise_strength is None:
            noise_strength = 0.03
        about = (str(world), noise_exponent, noise_strength, dimension, barrier)
        table, made_with = _from_world(about, rows, shape, ramp_levels, seed)
    _write(table, output)
    escapes = int(table["escaped"].sum())
    if not quiet:
        typer.echo(made_with, err=True)
    print(f"Table: {output} ({len(table)} rows, {table['minimum'].nunique()} minima, {escapes} escapes)")


def check_law(
    law: Annotated[str, typer.Argument(help="Name of a law, or the path of a law's .py file.")],
    table: Annotated[
        Path | None, typer.Option("--table", help="Also try the law at this measured table's settings and rates.")
    ] = None,
    fits: Annotated[
        bool, typer.Option("--fits/--no-fits", help="Fit twice: does the second fit compile anything?")
    ] = True,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Test a law of your own against the contract that every law keeps; exit code 2 if it breaks a rule.

    The rules: the log rate and its slopes are finite at draws from the prior; the rate has the unit 1/time and does not
    depend on the unit of the loss; each condition stands on its own; the prior allows rates that could be seen and no absurd
    ones; a second fit compiles nothing. Each failure comes with a remedy.

    Example: escape-inference check-law my_law.py --table data/mnist_two_class.csv
    """
    from escape_inference.cli import _keep_compiled_programs
    from escape_inference.law_check import check_law as run

    _keep_compiled_programs()
    if not quiet:
        typer.echo("evaluating the law at draws from its prior", err=True)
    report = run(law, table, fits=fits, seed=seed)
    print(report)
    if not report.passed:
        rules = ", ".join(finding.rule for finding in report.failures)
        raise InputError(f"law {report.law} breaks the contract: {rules}")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"--output {output}: the name must end in {', '.join(SUFFIXES)}")
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"--output {output}: give a file in a folder that is there and can be written to")
    if output.exists() and not overwrite:
        raise InputError(f"--output {output} is there already; give another name, or --overwrite")


def _parameters(texts: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError:
            raise InputError(f"--parameter {text!r}: write it as NAME=VALUE, such as effective_dimension=4") from None
    return values


def _read_design(path: Path) -> "pd.DataFrame":
    import pandas as pd

    if not path.is_file():
        raise InputError(f"--design {path}: there is no such file")
    try:
        return pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    except Exception as error:
        raise InputError(f"--design {path}: cannot be read: {str(error).splitlines()[0]}") from None


def _barrier(rows: "pd.DataFrame") -> str:
    from escape_inference.simulation import barrier_of

    return barrier_of(rows)


def _from_law(
    law: str,
    values: dict[str, float],
    rows: "pd.DataFrame | None",
    barrier: str,
    shape: dict[str, Any],
    ramp_levels: int,
    seed: int,
) -> "tuple[pd.DataFrame, str]":
    from escape_inference.design import make_ramps
    from escape_inference.law import load_law
    from escape_inference.law_design import make_law_design
    from escape_inference.simulation import default_parameters
    from escape_inference.simulation import simulate as draw

    chosen = load_law(law)
    if rows is None:
        rows, values = make_law_design(chosen, values, barrier=barrier, **shape)
        rows = make_ramps(rows, levels=ramp_levels) if ramp_levels else rows
    else:
        values = default_parameters(chosen, rows) | values
    table = draw(chosen, rows, values, seed=seed)
    return table, f"{chosen.name}: " + ", ".join(f"{name} = {value:.6g}" for name, value in values.items())


def _from_world(
    about: tuple, rows: "pd.DataFrame | None", shape: dict[str, Any], ramp_levels: int, seed: int
) -> "tuple[pd.DataFrame, str]":
    from escape_inference.design import make_ramps
    from escape_inference.sde import simulate_sde
    from escape_inference.worlds import World, make_design

    world = World(*about)
    if rows is None:
        rows = make_design(world, **shape)
        rows = make_ramps(rows, levels=ramp_levels) if ramp_levels else rows
    return simulate_sde(world, rows, seed=seed), str(world)


def _write(table: "pd.DataFrame", output: Path) -> None:
    """Write under a temporary name and rename, so that the file is either whole or absent."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        if output.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
