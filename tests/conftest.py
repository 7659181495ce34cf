"""All processes of one test run keep their compiled programs in one folder, which is removed when the run ends.

Programs are compiled quickly rather than for speed: most of them run once, and compiling them would be half of the run.

Each of several test processes, and the commands that it starts, stay on a processor of their own, where there are as many: JAX
hands small pieces of work between threads, and tests side by side would spend half of their time on that.
"""

import os
import shutil
import tempfile

import pytest

FOLDER, SHORTEST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
QUICKLY = (
    "--xla_backend_optimization_level=1",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)  #: of XLA, unless the environment has other wishes
MADE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Before JAX is imported; test processes and commands that tests start inherit the folder."""
    if FOLDER not in os.environ:
        config.stash[MADE] = os.environ[FOLDER] = tempfile.mkdtemp(prefix="compiled-")
        os.environ[SHORTEST] = "0.3"
        os.environ["XLA_FLAGS"] = " ".join([*QUICKLY, os.environ.get("XLA_FLAGS", "")])
    worker, count = (os.environ.get(f"PYTEST_XDIST_{name}", "") for name in ("WORKER", "WORKER_COUNT"))
    if worker and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) >= int(count) > 1:
            os.sched_setaffinity(0, processors[int(worker.removeprefix("gw")) :: int(count)])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Only the process that made the folder removes it."""
    if (made := config.stash.get(MADE, None)) is not None:
        shutil.rmtree(made, ignore_errors=True)
        del os.environ[FOLDER], os.environ[SHORTEST]
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removeprefix(" ".join(QUICKLY)).strip()
