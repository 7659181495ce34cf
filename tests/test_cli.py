"""Commands, their files and their exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from threading import Timer
from types import SimpleNamespace

import pytest

from escape_inference.cli import _print_data, _progress
from escape_inference.report import _escape_check
from escape_inference.sde import simulate_sde
from escape_inference.worlds import World, make_design


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "escape_inference.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    world = World(dimension=2, barrier="saddle")
    design = make_design(world, minima=4, learning_rates=3, runs=20, seed=5)
    simulate_sde(world, design, seed=5).to_csv(folder / "table.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def compared(folder):
    done = run(
        "compare",
        "table.csv",
        "--laws",
        "power_law,constant_rate",
        "--output",
        "out",
        "--draws",
        500,
        "--warmup",
        300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_compare_writes_its_files_and_prints_the_verdict(folder, compared):
    names = {path.name for path in (folder / "out").iterdir()}
    assert names >= {"power_law.nc", "constant_rate.nc", "comparison.json", "comparison.csv"}
    report = json.loads((folder / "out" / "comparison.json").read_text())
    assert f"Verdict: {report['verdict']}" in compared.stdout
    assert "sampling" in compared.stderr


def test_looks_that_are_too_rare_for_a_threshold_are_printed_and_in_the_page(capsys):
    named = [f"m{i} (0.{i})" for i in range(3, 10)]
    conditions = SimpleNamespace(not_measured=[], rare_looks=named)
    _print_data(SimpleNamespace(check=SimpleNamespace(sentence="s."), left_out=(), conditions=conditions))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Looks too rare for a threshold") and line.endswith("m7 (0.7) and 2 more")
    page = _escape_check({"escape_check": {}, "rare_looks": named})
    assert "Looks too rare for a threshold" in page and "m9 (0.9)" in page


def test_report_draws_a_page_from_the_results(folder, compared):
    done = run("report", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "out" / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "power_law" in page


def test_threads_that_outlive_the_work_are_not_heard(capsys):
    with _progress(quiet=False) as say:
        say("heard")
    say("after the end")
    assert capsys.readouterr().err.split() == ["heard"]


@pytest.mark.parametrize("after", ["importing", "reading", "posterior"])
def test_ctrl_c_stops_everything_with_one_line_and_writes_nothing(folder, after):
    listening = (  # a shell's background job, and so its children, would ignore Ctrl-C
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from escape_inference.cli import main; print('importing', file=sys.stderr, flush=True); main()"
    )
    command = [sys.executable, "-c", listening, "compare", "table.csv", "--output", "stopped"]
    before = sorted(folder.iterdir())
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        late = Timer(120, process.kill)
        late.start()
        for line in process.stderr:
            if after in line:
                time.sleep(0.3)
                os.killpg(process.pid, signal.SIGINT)
                break
        rest = process.stderr.read().splitlines()
        late.cancel()
    assert process.returncode == 1
    assert rest[-1] == "escape-inference: stopped; nothing half-written is left"
    assert "Traceback" not in "".join(rest)
    assert sorted(folder.iterdir()) == before


def test_bad_input_is_one_message_exit_code_two_and_nothing_written(folder):
    (folder / "bad.csv").write_text("minimum,run,learning_rate,batch_size,steps\na,1,0.1,1,10\n")
    for arguments, words in (
        (("compare", "bad.csv", "--output", "new"), "escaped"),
        (("compare", "missing.csv", "--output", "new"), "missing.csv"),
        (("compare", "table.csv", "--laws", "power", "--output", "new"), "power_law"),
        (("infer", "table.csv", "--law", "none.py", "--output", "new"), "none.py"),
        (("infer", "table.csv", "--seed", "-1", "--output", "new"), "seed"),
        (("report", "nowhere"), "compare"),
    ):
        done = run(*arguments, cwd=folder)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not (folder / "new").exists()


@pytest.mark.parametrize("command", ["infer", "compare", "collect", "report"])
def test_every_command_has_help_seed_and_quiet(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert "--seed" in done.stdout
    assert "--quiet" in done.stdout
    assert "Example:" in done.stdout
