"""Compiled programs: kept on disk for other processes, never one for another, made by one process at a time."""

import dataclasses
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from escape_inference import load_law, programs
from escape_inference.law import built_in_laws
from escape_inference.problem import densities
from escape_inference.programs import Ahead

fcntl = pytest.importorskip("fcntl")


@contextmanager
def kept_in(folder):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def folder(tmp_path):
    with kept_in(tmp_path):
        yield tmp_path / "traced"


def traced_again(function, x, **static):
    """The value, and whether Python ran the function for it, by a new object as in a new process."""
    ran = []

    def counted(x, **static):
        ran.append(True)
        return function(x, **static)

    counted.__name__ = function.__name__
    return Ahead(counted, static=tuple(static))(x, **static).tolist(), bool(ran)


def twice(x, times=2):
    return x * times


def kept(folder):
    return sorted(path for path in folder.iterdir() if not path.suffix)


def test_a_program_is_traced_once_for_all_processes(folder):
    x = np.arange(3, dtype=np.float32)
    assert traced_again(twice, x, times=2) == ([0.0, 2.0, 4.0], True)
    assert traced_again(twice, x + 1, times=2) == ([2.0, 4.0, 6.0], False)
    assert len(kept(folder)) == 1


@pytest.mark.parametrize("change", ["static", "shape", "type", "source", "name"])
def test_whatever_a_program_depends_on_makes_another_one(folder, monkeypatch, change):
    x = np.arange(3, dtype=np.float32)
    traced_again(twice, x, times=2)
    if change == "source":
        monkeypatch.setattr(programs, "_fingerprint", lambda: "another")
    function = (lambda x, times: x * times) if change == "name" else twice
    x = {"shape": np.arange(4, dtype=np.float32), "type": np.arange(3, dtype=np.int32)}.get(change, x)
    times = 3 if change == "static" else 2
    value, ran = traced_again(function, x, times=times)
    assert ran
    assert value == (x * times).tolist()
    assert len(kept(folder)) == 2


def test_the_laws_and_what_they_call_belong_to_the_source():
    """A program of an edited law would otherwise be the old one."""
    names = {path.name for path in programs._sources()}
    assert {f"{name}.py" for name in built_in_laws()} | {"law.py", "passage.py", "likelihood.py", "model.py"} <= names


def test_only_laws_that_ship_are_kept():
    law = load_law("power_law")
    own = dataclasses.replace(law, name="power_law_of_mine")
    shapes = (("temperature_scale", ((), True)),)
    assert all(function.stored_as for function in densities(law, shapes))
    for other in (own, dataclasses.replace(law, log_rate=lambda values, setting: law.log_rate(values, setting))):
        assert not any(hasattr(function, "stored_as") for function in densities(other, shapes))


def test_a_function_that_does_not_say_what_it_is_is_not_kept(folder):
    apply = lambda x, inner: inner(x)
    x = np.ones(2, np.float32)
    assert traced_again(apply, x, inner=lambda x: x + 1) == ([2.0, 2.0], True)
    assert traced_again(apply, x, inner=lambda x: x + 2) == ([3.0, 3.0], True)
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"nothing that was traced", None])
def test_a_damaged_file_is_made_again(folder, content):
    x = np.ones(2, np.float32)
    traced_again(twice, x, times=2)
    (path,) = kept(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert traced_again(twice, x, times=2) == ([2.0, 2.0], True)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with kept_in(tmp_path / "file"):
        assert traced_again(twice, np.ones(2, np.float32), times=2) == ([2.0, 2.0], True)


def test_nothing_is_kept_where_jax_keeps_nothing_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kept_in("gs://bucket/programs"):
        assert traced_again(twice, np.ones(2, np.float32), times=2) == ([2.0, 2.0], True)
    assert not list(tmp_path.iterdir())


def test_a_program_that_another_process_makes_is_waited_for(folder):
    x = np.ones(2, np.float32)
    traced_again(twice, x, times=2)
    (path,) = kept(folder)
    content = path.read_bytes()
    path.unlink()
    with open(path.with_suffix(".lock"), "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(traced_again, twice, x, times=2)
        time.sleep(10 * programs.WAIT)
        assert not waiting.done()
        path.write_bytes(content)  # as the other process would
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result() == ([2.0, 2.0], False)


def test_a_process_that_is_suspended_is_not_waited_for_any_longer(folder, monkeypatch):
    monkeypatch.setattr(programs, "PATIENCE", 0.3)
    x = np.ones(2, np.float32)
    traced_again(twice, x, times=2)
    (path,) = kept(folder)
    path.unlink()
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert traced_again(twice, x, times=2) == ([2.0, 2.0], True)


def test_another_process_gets_the_same_bits(folder, tmp_path):
    """The sampler: from nothing, and with what the first process kept."""
    script = textwrap.dedent("""
        import sys, jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_compilation_cache_dir", sys.argv[1])
        from escape_inference.bend import straight
        from escape_inference.precision import float64
        from escape_inference.sampler import hmc

        def log_joint(z, data):
            return -0.5 * jnp.sum((z - data) ** 2)

        log_joint.stored_as = "a normal density"

        @float64
        def draws():
            keys, start = jax.random.split(jax.random.key(0), 2), np.zeros((2, 2))
            settings = dict(log_joint=log_joint, warmup=50, draws=50)
            return hmc(keys, start, np.eye(2), straight(2), np.ones(2), np.asarray(50), np.asarray(0.8), **settings)

        found = draws()
        assert abs(found.z.mean() - 1) < 0.5
        print(type(found).__name__, np.asarray(found.z).tobytes().hex())
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    run = lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first = run()
    made = kept(folder)
    assert made
    times = [path.stat().st_mtime_ns for path in made]
    assert run() == first
    assert [path.stat().st_mtime_ns for path in kept(folder)] == times
