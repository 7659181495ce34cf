"""A campaign measures what it says, can be stopped at any moment, and ends with the same table."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from escape_inference.errors import InputError
from escape_inference.table import read_measurements
from escape_inference.trainers import parts as parts_module
from escape_inference.trainers.collect import collect

STUDY = """
seed = 5
[data]
name = "linear_regression"
samples = 500
[network]
name = "linear"
[hessian]
effective_dimension = "parameters"
[[minima]]
label = "d{dimension}"
data = { dimension = [1, 2] }
learning_rate = 0.1
batch_size = 50
steps = 100
polish_steps = 100
polish_learning_rate = 0.5
[[escape]]
learning_rate = 0.3
batch_size = 2
threshold = [1.3, 1.5]
replicas = 8
steps = 400
looks = "exact"
[[escape]]
minima = "d2"
learning_rate = 0.2
batch_size = 2
threshold = 1.3
replicas = 8
steps = 400
looks = "exact"
start = "minimum"
"""
PARTS = 2 + 4 + 1
"""Two minima, two conditions each, and one condition more at the second."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.toml"
    path.write_text(STUDY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(study: Path) -> Path:
    output = study.parent / "uninterrupted"
    collect(study, output, progress=False)
    return output


def same_tables(first: Path, second: Path) -> None:
    pd.testing.assert_frame_equal(
        pd.read_parquet(first / "measurements.parquet"), pd.read_parquet(second / "measurements.parquet")
    )
    for name in ("minima.csv", "conditions.csv", "trends.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def finished_parts(output: Path) -> set[str]:
    return {entry.name for entry in (output / "parts").glob("[!.]*")}


def test_the_table_obeys_the_rules_for_measured_tables(uninterrupted: Path) -> None:
    table = read_measurements(uninterrupted / "measurements.parquet")
    conditions = pd.read_csv(uninterrupted / "conditions.csv")
    minima = pd.read_csv(uninterrupted / "minima.csv").set_index("minimum")
    assert list(conditions["status"]) == ["measured"] * 5
    assert conditions["escapes"].sum() == table["escaped"].sum() > 50
    exposure = (table["learning_rate"] * table["steps"]).sum()
    assert conditions["exposure"].sum() == pytest.approx(exposure)
    assert set(table["minimum"]) == {"d1", "d2"}
    ratio = table["loss_barrier"] / table["loss_minimum"]
    assert set(ratio.round(6)) == {1.3, 1.5}
    assert minima.loc["d1", "loss_minimum"] == pytest.approx(0.5, rel=0.15)
    assert minima.loc["d2", "hessian_minimum"] == pytest.approx(1, rel=0.2)
    assert (minima["gradient_norm"] < 1e-5).all()
    assert table.groupby("minimum")["effective_dimension"].unique().str[0].to_dict() == {"d1": 1.0, "d2": 2.0}
    starts = table.groupby("start").size()
    assert starts["minimum"] == 8, "one row for each run that starts at the minimum"


def test_higher_thresholds_are_passed_less_often(uninterrupted: Path) -> None:
    rates = (
        pd.read_csv(uninterrupted / "conditions.csv").query("learning_rate == 0.3").set_index(["minimum", "threshold"])
    )
    for minimum in ("d1", "d2"):
        assert rates.loc[(minimum, 1.5), "rate"] < rates.loc[(minimum, 1.3), "rate"]


def test_every_run_has_a_name_of_its_own(uninterrupted: Path) -> None:
    table = pd.read_parquet(uninterrupted / "measurements.parquet")
    assert not table["run"].duplicated().any()


def test_the_same_seed_gives_the_same_table_and_another_seed_another(
    study: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    collect(study, tmp_path / "again", seed=5, progress=False)
    same_tables(uninterrupted, tmp_path / "again")
    collect(study, tmp_path / "other", seed=6, progress=False)
    first, other = (pd.read_parquet(folder / "measurements.parquet") for folder in (uninterrupted, tmp_path / "other"))
    assert not first.equals(other)


def test_a_condition_gives_the_same_runs_alone_and_among_others(
    study: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    text = STUDY.replace("threshold = [1.3, 1.5]", "threshold = 1.5").replace("[1, 2]", "[2, 1]")
    path = tmp_path / "fewer.toml"
    path.write_text(text[: text.rindex("[[escape]]")], encoding="utf-8")
    fewer = pd.read_parquet(collect(path, tmp_path / "fewer", progress=False))
    everything = pd.read_parquet(uninterrupted / "measurements.parquet")
    for minimum in ("d1", "d2"):
        alone = fewer[fewer["minimum"] == minimum].reset_index(drop=True)
        among = everything[everything["run"].isin(alone["run"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, among)


def test_a_campaign_killed_at_three_moments_ends_with_the_same_table(study: Path, uninterrupted: Path) -> None:
    output = study.parent / "killed"
    code = "import sys; from escape_inference.trainers.collect import collect; collect(*sys.argv[1:], resume=True)"
    for moment, parts_before in enumerate((0, 2, 4)):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(study), str(output)], stderr=subprocess.DEVNULL, env=dict(os.environ)
        )
        deadline = time.monotonic() + 120
        while not ((output / "campaign.json").exists() and len(finished_parts(output)) >= parts_before):
            assert process.poll() is None, "the campaign ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.03 * moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = finished_parts(output)
        assert parts_before <= len(kept) < PARTS
        assert not (output / "measurements.parquet").exists()
    before = {name: (output / "parts" / name).stat().st_mtime_ns for name in kept}
    collect(study, output, resume=True, progress=False)
    assert {name: (output / "parts" / name).stat().st_mtime_ns for name in kept} == before, "nothing is repeated"
    same_tables(uninterrupted, output)


def test_an_interrupt_keeps_finished_parts_and_says_so(
    study: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = parts_module.measure_escape, []

    def interrupted(*args: object, **settings: object) -> object:
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(parts_module, "measure_escape", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(study, tmp_path / "out")
    message = " ".join(capsys.readouterr().err.split())
    assert f"stopped: 4 of {PARTS} parts are finished" in message
    collect(study, tmp_path / "out", resume=True, progress=False)
    assert len(calls) == 3 + 3, "two conditions were not measured again"
    same_tables(uninterrupted, tmp_path / "out")


def test_a_finished_campaign_can_be_resumed_and_measures_nothing(
    study: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "measure_escape", None)
    monkeypatch.setattr(parts_module, "train_minimum", None)
    before = pd.read_parquet(uninterrupted / "measurements.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(collect(study, uninterrupted, resume=True, progress=False)), before)


def test_an_unstable_minimum_is_recorded_and_the_campaign_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        STUDY.replace("learning_rate = 0.2", "learning_rate = 30.0").replace('"minimum"', '"quasi_stationary"')
    )
    table = pd.read_parquet(collect(path, tmp_path / "out", progress=False))
    conditions = pd.read_csv(tmp_path / "out" / "conditions.csv")
    assert list(conditions["status"]) == ["measured"] * 4 + ["unstable"]
    assert conditions["note"].iloc[-1]
    assert conditions["learning_rate"].iloc[-1] == 30.0
    assert 30.0 not in set(table["learning_rate"])


def test_a_minimum_that_diverges_is_recorded_and_the_campaign_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    text = STUDY.replace("data = { dimension = [1, 2] }\nlearning_rate = 0.1", "learning_rate = [0.1, 1e6]")
    path.write_text(text.replace("d{dimension}", "lr{learning_rate}").replace('minima = "d2"', 'minima = "lr0.1"'))
    table = pd.read_parquet(collect(path, tmp_path / "out", progress=False))
    assert set(table["minimum"]) == {"lr0.1"}
    assert list(pd.read_csv(tmp_path / "out" / "minima.csv")["status"]) == ["trained", "failed"]
    statuses = pd.read_csv(tmp_path / "out" / "conditions.csv").groupby("minimum")["status"].unique().str[0]
    assert statuses.to_dict() == {"lr0.1": "measured", "lr1000000.0": "minimum failed"}


def test_a_campaign_without_any_escape_says_so_and_keeps_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    text = STUDY[: STUDY.rindex("[[escape]]")].replace("threshold = [1.3, 1.5]", "threshold = 1e6")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="escape"):
        collect(path, tmp_path / "out", progress=False)
    assert list(pd.read_csv(tmp_path / "out" / "conditions.csv")["escapes"]) == [0, 0]


RAMPS = """
[[ramps]]
relative = [0.05, 1.6]
levels = 8
steps_per_level = 50
batch_size = 3
threshold = 4.0
runs = 5
[[ramps]]
minima = "d2"
learning_rate = [0.1, 3.0]
spacing = "linear"
levels = 5
steps_per_level = 20
batch_size = 4
jump_factor = 3.0
runs = 3
"""


def test_ramps_join_the_table_and_have_a_table_of_their_own(study: Path, uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY + RAMPS, encoding="utf-8")
    table = read_measurements(collect(path, tmp_path / "out", progress=False))
    conditions = read_measurements(uninterrupted / "measurements.parquet")
    pd.testing.assert_frame_equal(table.iloc[: len(conditions)], conditions, check_categorical=False)
    rows = table.iloc[len(conditions) :]
    critical = pd.read_csv(tmp_path / "out" / "critical_learning_rates.csv")
    pd.testing.assert_frame_equal(
        critical, pd.read_parquet(tmp_path / "out" / "critical_learning_rates.parquet"), check_dtype=False
    )
    ramps = pd.read_csv(tmp_path / "out" / "ramps.csv")
    assert list(ramps["status"]) == ["measured"] * 3
    assert list(ramps["runs"]) == [5, 5, 3]
    assert list(ramps["batch_size"]) == [3, 3, 4]
    assert rows["run"].nunique() == len(critical) == 13
    last = rows.groupby("run", observed=True).tail(1).set_index("run")
    for _, run in critical.iterrows():
        assert bool(last.loc[run["run"], "escaped"]) == run["jumped"]
        assert last.loc[run["run"], "learning_rate"] == pytest.approx(run["upper"] if run["jumped"] else run["lower"])
    first = rows[rows["run"] == critical["run"].iloc[0]]
    h = first["hessian_minimum"].iloc[0]
    assert first["learning_rate"].iloc[0] == pytest.approx(0.05 * 2 / h)
    assert first["loss_barrier"].iloc[0] == pytest.approx(4 * first["loss_minimum"].iloc[0])
    assert ramps["gradient_descent_limit"].iloc[0] == pytest.approx(2 / h)
    middle = ramps["critical_learning_rate"]
    assert ((ramps["critical_learning_rate_lower"] <= middle) & (middle <= ramps["critical_learning_rate_upper"])).all()
    collect(path, tmp_path / "out", resume=True, progress=False)


def test_a_study_may_hold_ramps_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY[: STUDY.index("[[escape]]")] + RAMPS, encoding="utf-8")
    table = read_measurements(collect(path, tmp_path / "out", progress=False))
    assert set(table["start"]) == {"minimum"}
    assert not (tmp_path / "out" / "conditions.csv").exists()


def test_the_spectrum_of_a_study_gives_the_effective_dimension_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "spikes.py").write_text(
        "import numpy as np\n"
        "def data():\n"
        "    rng = np.random.default_rng(3)\n"
        "    x = rng.normal(size=(400, 40)) * np.sqrt(np.r_[9.0, 7.0, 5.0, np.full(37, 0.3)])\n"
        "    return x, rng.normal(size=400)\n"
    )
    text = STUDY[: STUDY.rindex("[[escape]]")].replace('"linear_regression"\nsamples = 500', '"spikes:data"')
    text = text.replace('label = "d{dimension}"\ndata = { dimension = [1, 2] }', 'label = "m"')
    section = 'effective_dimension = "outliers"\neigenvalues = 25\ndensity_probes = 6\ngauss_newton = true'
    text = text.replace('effective_dimension = "parameters"', section).replace("polish_learning_rate = 0.5\n", "")
    text = text.replace("learning_rate = 0.3", "temperature = 0.3").replace(
        "learning_rate = 0.1", "learning_rate = 0.02"
    )
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    table = read_measurements(collect(tmp_path / "study.toml", tmp_path / "out", progress=False))
    assert set(table["effective_dimension"]) == {3.0}
    assert 0 < table["effective_dimension_se"].iloc[0] < 0.6
    record = pd.read_csv(tmp_path / "out" / "minima.csv").iloc[0]
    assert record["outliers"] == 3
    assert abs(record["outliers_by_density"] - 3) < 3 * record["outliers_by_density_se"]
    assert abs(record["trace"] - (21 + 37 * 0.3)) < 3 * record["trace_se"] + 1
    spectra = pd.read_csv(tmp_path / "out" / "spectra.csv")
    assert spectra.groupby("part").size().to_dict() == {"gauss_newton": 25, "hessian": 25}
    parts = {part: own["eigenvalue"].to_numpy() for part, own in spectra.groupby("part")}
    assert parts["hessian"] == pytest.approx(parts["gauss_newton"], rel=1e-3), "a linear network has no curvature"
    assert parts["hessian"][0] == pytest.approx(table["hessian_minimum"].iloc[0])


def test_too_few_eigenvalues_leave_the_dimension_empty_and_say_so(study: Path, tmp_path: Path) -> None:
    text = STUDY.replace('effective_dimension = "parameters"', 'effective_dimension = "outliers"\neigenvalues = 1')
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    table = pd.read_parquet(collect(tmp_path / "study.toml", tmp_path / "out", progress=False))
    assert "effective_dimension" not in table
    notes = pd.read_csv(tmp_path / "out" / "minima.csv")["note"]
    assert notes.str.contains("do not tell how many are outliers").all()
