"""Every snippet of README.md runs and does what the text says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from escape_inference import law, read_measurements
from escape_inference.cli import app

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)


def snippets(language):
    return [text for name, text in SNIPPETS if name == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name, text in zip(("compare.py", "my_study.py", "measure.py", "my_law.py"), snippets("python"), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "study.toml").write_text(*snippets("toml"), encoding="utf-8")
    return folder


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_python_example_finds_the_law_of_its_world(folder):
    done = run(sys.executable, "compare.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("power_law - ")
    assert 0.8 < float(done.stdout.split()[-1]) < 1.25


def test_the_study_measures_the_network_of_the_user(folder):
    done = run(
        sys.executable,
        "-m",
        "escape_inference.cli",
        "collect",
        "study.toml",
        "--output",
        "measured",
        "--quiet",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    table = read_measurements(folder / "measured" / "measurements.parquet")
    assert table["escaped"].any()


def test_the_trainers_measure_a_table_from_python(folder):
    done = run(sys.executable, "measure.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "critical learning rate" in done.stdout
    assert read_measurements(folder / "measured.csv")["escaped"].any()


def test_the_law_of_the_user_is_loaded_from_its_file(folder):
    loaded = law.load_law(str(folder / "my_law.py"))
    assert loaded.name == "frozen_noise"
    assert len(snippets("python")[2].splitlines()) < 60


def test_the_commands_name_subcommands_options_files_and_laws_that_exist():
    commands = {command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    for line in re.findall(r"escape-inference ([^`\n]+)", TEXT):
        assert line.split()[0] in commands, line
    for path in re.findall(r"(?:data|scripts)/[\w/]+\.\w+", TEXT):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"--laws ([\w,]+)", TEXT):
        assert set(name.removesuffix(",my_law").split(",")) <= set(law.built_in_laws())
