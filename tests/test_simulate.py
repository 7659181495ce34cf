"""Tables drawn from a law, in Python and by command, against the formulas by hand."""

import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest

import escape_inference as ei
from escape_inference.cli import main
from escape_inference.conditions import aggregate
from escape_inference.errors import InputError
from escape_inference.law import built_in_laws, load_law
from escape_inference.law_design import make_law_design
from escape_inference.simulation import law_log_rate, simulate
from escape_inference.table import read_measurements

VALUES = {"temperature_scale": 0.8, "effective_dimension": 3.4}


def design(**changes):
    """One asymmetric condition: nothing is 1."""
    return pd.DataFrame(
        {
            "minimum": ["a"],
            "learning_rate": 0.2,
            "batch_size": 3,
            "loss_minimum": 0.02,
            "loss_barrier": 0.031,
            "hessian_minimum": 3.1,
            "hessian_saddle": 1.7,
            "runs": 4000,
            "max_steps": 10**6,
        }
        | changes
    )


def kappa(n=3.4, eta=0.2):
    """Mori et al. (ICML 2022), by hand."""
    temperature = 0.8 * eta * 3.1 / 3
    return np.sqrt(3.1 * 1.7) / (2 * np.pi) * (0.031 / 0.02) ** -(1 / temperature + 1 - n / 2)


def test_waiting_times_are_memoryless_with_the_rate_of_the_formula():
    table = simulate("power_law", design(), VALUES, seed=1)
    steps = table["steps"].to_numpy()
    mean = 1 / -np.expm1(-kappa() * 0.2)  # geometric
    assert table["escaped"].all() and len(table) == 4000
    assert abs(steps.mean() / mean - 1) < 3 / np.sqrt(4000)
    assert abs(steps.std() / steps.mean() - 1) < 0.06
    for share in (0.5, 2.0):
        expected = np.exp(-share)
        assert abs((steps > share * mean).mean() - expected) < 3 * np.sqrt(expected * (1 - expected) / 4000)


def test_looks_end_runs_and_the_budget_censors_them():
    mean = 1 / (kappa() * 0.2)
    table = simulate("power_law", design(check_interval=7, max_steps=int(mean)), VALUES, seed=2)
    steps, escaped = table["steps"], table["escaped"]
    assert (steps % 7 == 0).all() and steps.max() == int(mean) // 7 * 7
    assert (steps[~escaped] == steps.max()).all()
    assert abs((~escaped).mean() - np.exp(-steps.max() / mean)) < 3 * 0.5 / np.sqrt(4000)


def test_gaps_of_replica_slots_fill_their_budget():
    mean = 1 / (kappa() * 0.2)
    rows = design(runs=300, start="quasi_stationary", max_steps=int(10 * mean))
    table = simulate("power_law", rows, VALUES, seed=3)
    per_slot = table.groupby("run")
    assert (per_slot["steps"].sum() == int(10 * mean)).all()
    count = int(table["escaped"].sum())
    assert abs(count / 3000 - 1) < 3 / np.sqrt(3000)
    gaps = table.loc[table["escaped"], "steps"]
    assert len(read_measurements(table)) == len(table)
    assert abs(gaps.std() / gaps.mean() - 1) < 0.15  # the longest gaps are cut by the budget


def test_the_log_prefactor_and_a_measured_dimension_enter_the_rate():
    more = simulate("power_law", design(), VALUES | {"log_prefactor": 1.0}, seed=4)["steps"].mean()
    assert more * 0.2 * np.e * kappa() == pytest.approx(1, abs=0.06)
    measured = simulate("power_law", design(effective_dimension=6.0), {"temperature_scale": 0.8}, seed=4)
    assert set(measured["effective_dimension"]) == {6.0}
    assert measured["steps"].mean() * 0.2 * kappa(n=6.0) == pytest.approx(1, abs=0.06)


def test_the_discrepancy_moves_each_condition_as_a_whole():
    eta = np.linspace(0.15, 0.25, 300)
    rows = pd.concat([design(learning_rate=x, runs=150) for x in eta], ignore_index=True)
    frame = aggregate(simulate("power_law", rows, VALUES | {"discrepancy": 0.6}, seed=5)).frame
    residual = np.log(frame["escapes"] / frame["exposure"]) - np.log(kappa(eta=eta))
    expected = np.sqrt(0.6**2 + 1 / 150)
    assert residual.std() == pytest.approx(expected, rel=3 / np.sqrt(600))
    assert abs(residual.mean()) < 3 * expected / np.sqrt(300)


def test_same_seed_gives_the_same_table():
    first = simulate("power_law", design(runs=20), VALUES, seed=6)
    pd.testing.assert_frame_equal(first, simulate("power_law", design(runs=20), VALUES, seed=6))
    assert not first["steps"].equals(simulate("power_law", design(runs=20), VALUES, seed=7)["steps"])


@pytest.mark.parametrize(
    ("name", "barrier"),
    [(name, "saddle") for name in ("power_law", "arrhenius", "arrhenius_anisotropic", "noise_exponent")]
    + [("power_law", "threshold"), ("arrhenius_anisotropic", "threshold")],
)
def test_designs_made_for_a_law_have_its_rates_in_the_range_that_can_be_measured(name, barrier):
    law = load_law(name)
    rows, values = make_law_design(law, {}, barrier=barrier, minima=5, runs=3, seed=8)
    ratio = np.exp(law_log_rate(law, rows, values, barrier)) / rows["hessian_minimum"]
    low, high = {"saddle": (0.00069, 0.031), "threshold": (0.0029, 0.152)}[barrier]
    relaxation = rows["learning_rate"] * rows["hessian_minimum"]
    assert (relaxation < 1.001).all()
    free = (
        relaxation < 0.999
    )  # a minimum whose noise is too weak stays at the largest learning rate that is a diffusion
    assert ((ratio > low) & (ratio < high))[free].mean() > 0.85 and free.mean() > 0.5
    expected = 3 / (ratio * rows["hessian_minimum"] * rows["learning_rate"])
    np.testing.assert_allclose(rows["max_steps"][free], np.ceil(expected)[free], rtol=0.001, atol=1.1)


def test_a_law_that_forgets_the_learning_rate_has_a_design_too():
    rows, _ = make_law_design(built_in_laws()["constant_rate"], {}, minima=3, runs=3)
    relaxation = rows["learning_rate"] * rows["hessian_minimum"]
    assert relaxation.between(0.029, 0.31).all()


@pytest.mark.parametrize(
    ("parameters", "changes", "message"),
    [
        ({"temperature_scale": 0.8}, {}, "lacks effective_dimension"),
        (VALUES | {"slope": 1.0}, {}, "does not use slope"),
        (VALUES | {"temperature_scale": -1.0}, {}, "must be positive"),
        (VALUES | {"discrepancy": -0.1}, {}, "must not be negative"),
        (VALUES | {"log_prefactor": float("nan")}, {}, "finite number"),
        (VALUES, {"effective_dimension": 2.0}, "does not use effective_dimension"),
        (VALUES, {"learning_rate": 0.0}, "row 1 of the design"),
        (VALUES, {"runs": 2.5}, "whole numbers"),
        (VALUES, {"start": "quasi_stationary", "max_steps": 10**9}, "too many"),
        (VALUES, {"barrier": "wall"}, "saddle or threshold"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(parameters, changes, message):
    with pytest.raises(InputError, match=message):
        simulate("power_law", design(**changes), parameters)


def test_a_law_without_a_formula_for_the_barrier_is_refused():
    law = dataclasses.replace(load_law("arrhenius"), barriers=("saddle",))
    with pytest.raises(InputError, match="no formula for barrier 'threshold'"):
        simulate(law, design().drop(columns="hessian_saddle"), VALUES)


def test_the_package_has_simulate_as_a_function_whatever_was_imported_before():
    import escape_inference.simulation

    assert ei.simulate is escape_inference.simulation.simulate


# --- the command


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and error of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["escape-inference", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_writes_the_table_of_the_function(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.csv"
    code, out, err = run(
        monkeypatch, capsys, "simulate", "--law", "power_law", "-p", "effective_dimension=4", "--minima", 3, "--runs", 5,
        "--seed", 9, "--output", path,
    )  # fmt: skip
    assert code == 0 and "45 rows" in out and "temperature_scale = 1, effective_dimension = 4" in err
    rows, values = make_law_design(load_law("power_law"), {"effective_dimension": 4.0}, minima=3, runs=5, seed=9)
    expected = simulate("power_law", rows, values, seed=9)
    assert read_measurements(path)["steps"].tolist() == expected["steps"].tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_the_command_steps_worlds_through_ramps_and_reads_designs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ramps.parquet"
    code, _, err = run(
        monkeypatch, capsys, "simulate", "--world", "uniform", "--minima", 2, "--runs", 4, "--ramp-levels", 5,
        "--dimension", 1, "--quiet", "--output", path,
    )  # fmt: skip
    table = read_measurements(path)
    assert code == 0 and not err
    assert table["learning_rate"].nunique() == 10 and table["run"].nunique() == 8
    design(runs=6).to_csv(tmp_path / "design.csv", index=False)
    code, out, _ = run(
        monkeypatch, capsys, "simulate", "--law", "arrhenius", "--design", tmp_path / "design.csv",
        "-p", "noise_strength=0.05", "--output", tmp_path / "own.csv",
    )  # fmt: skip
    assert code == 0 and "6 rows" in out


def test_bad_options_are_one_message_exit_code_two_and_no_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "design.csv").write_text("minimum,runs\na,3\n")
    for arguments, words in (
        ((), "either --law"),
        (("--law", "power_law", "--world", "loss"), "either --law"),
        (("--law", "power"), "no law 'power'"),
        (("--law", "power_law", "-p", "n"), "NAME=VALUE"),
        (("--law", "power_law", "-p", "n=3"), "does not use n"),
        (("--law", "power_law", "--barrier", "wall"), "--barrier"),
        (("--law", "power_law", "--start", "there"), "--start"),
        (("--law", "power_law", "--ramp-levels", "1"), "at least 2"),
        (("--law", "power_law", "--design", tmp_path / "none.csv"), "no such file"),
        (("--law", "power_law", "--design", tmp_path / "design.csv"), "lacks the columns"),
        (("--world", "pink"), "--world"),
        (("--world", "loss", "-p", "effective_dimension=3"), "belongs to a --law"),
        (("--world", "loss", "--output", tmp_path / "there.csv"), "--overwrite"),
        (("--world", "loss", "--output", tmp_path / "table.txt"), ".parquet"),
        (("--world", "loss", "--output", tmp_path / "no" / "table.csv"), "folder"),
    ):
        extra = () if "--output" in arguments else ("--output", tmp_path / "new.csv")
        code, _, err = run(monkeypatch, capsys, "simulate", *arguments, *extra)
        assert code == 2 and words in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["design.csv", "there.csv"]
    assert (tmp_path / "there.csv").read_text() == "mine"
