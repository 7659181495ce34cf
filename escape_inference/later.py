"""Libraries that take long to read and are not needed by every process, read when they are first used."""

from importlib import import_module
from threading import RLock, Thread
from typing import Any

_READING = RLock()


def library(name: str) -> Any:
    """A module, read by one thread at a time: two that read parts of one library at once can each find the other's half done.

    >>> library("json").loads("1")
    1
    """
    with _READING:
        return import_module(name)


def read_ahead(name: str) -> None:
    """Start reading a module that will be needed, while this thread waits for something else."""
    Thread(target=library, args=(name,), daemon=True).start()
