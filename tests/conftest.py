"""All processes of one test run keep their compiled programs in one folder, which is removed when the run ends."""

import os
import shutil
import tempfile

import pytest

FOLDER, SHORTEST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
MADE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Before JAX is imported; test processes and commands that tests start inherit the folder."""
    if FOLDER not in os.environ:
        config.stash[MADE] = os.environ[FOLDER] = tempfile.mkdtemp(prefix="compiled-")
        os.environ[SHORTEST] = "0.3"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Only the process that made the folder removes it."""
    if (made := config.stash.get(MADE, None)) is not None:
        shutil.rmtree(made, ignore_errors=True)
        del os.environ[FOLDER], os.environ[SHORTEST]
