"""Processes that work side by side, each on a processor of its own, and keep what they have computed for the next question.

JAX hands small pieces of work between its threads, which on two processors takes as long as the work itself; several processes with
one thread each do not. This module imports nothing heavy, so that processes can be started before anything else; on Linux all are
copies of one that has read the libraries already.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import count
from math import inf
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from queue import PriorityQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any

Say = Callable[[str], None]
LIBRARIES = (
    "escape_inference.copied",
    "numpyro",
    "arviz_stats",
    "xarray",
    "pandas",
    "scipy.stats",
    "escape_inference.comparison",
)  #: that start no threads of JAX


def processors() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextmanager
def on_processors(share: list[int]) -> Iterator[None]:
    """Let this thread, and those that it starts, run on these processors for a while."""
    before = processors()
    _settle(share)
    try:
        yield
    finally:
        _settle(before)


def _context() -> BaseContext:
    """How processes are started; never as copies of this one, whose threads may hold locks."""
    if sys.platform != "linux":
        return get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context, name = get_context("forkserver"), "OPENBLAS_NUM_THREADS"
    context.set_forkserver_preload(list(LIBRARIES))
    resource_tracker.ensure_running()  # it would let the signal through again
    before, mask = os.environ.get(name), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ[name] = "1"  # threads of one processor would wait for each other
    forkserver.ensure_running()  # Ctrl-C is not for it, even while it reads
    os.environ.pop(name) if before is None else os.environ.update({name: before})
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def processes(workers: int) -> ProcessPoolExecutor:
    """A pool of new processes for questions that are independent of each other."""
    context = _context()
    free = context.SimpleQueue()
    for share in _shares(workers):
        free.put(share)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_settle_on_next, initargs=(free,))


class Worker:
    """One process that answers one question at a time."""

    def __init__(self, share: list[int], module: str, context: Any = None) -> None:
        context = context or _context()
        self._pipe, there = context.Pipe()
        self._turn = Lock()
        self._process = context.Process(target=_answer, args=(there, share, module), daemon=True)
        self._process.start()
        there.close()

    def ask(self, function: Callable[..., Any], *arguments: Any, say: Say) -> Any:
        """The value of ``function(*arguments, say)``; ``function`` is one of a module, and texts are said here.

        Raises:
            ChildProcessError: the process has ended, for want of memory perhaps.
            Exception: whatever the function raised.
        """
        with self._turn:
            try:
                self._pipe.send((function, arguments))
                while (answer := self._pipe.recv())[0] == "said":
                    say(answer[1])
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise ChildProcessError(
                    "a process of the comparison has ended (was there too little memory?)"
                ) from error
        if answer[0] == "failed":
            raise answer[1]
        return answer[1]

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


class Desk:
    """Questions for several workers, answered in the order of their rank; those still waiting at the end of a ``with`` block are dropped."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._questions: PriorityQueue[tuple[float, int, Any]] = PriorityQueue()
        self._answers: list[Future] = []
        self._number, self._count = count(), len(workers)
        for worker in workers:
            Thread(target=self._serve, args=(worker,), daemon=True).start()

    def submit(self, rank: float, function: Callable[..., Any], *arguments: Any, say: Say) -> Future:
        """The value of ``function(*arguments, say)`` at a worker that is free, as soon as no question of lower rank waits."""
        answer: Future = Future()
        self._answers.append(answer)
        self._questions.put((rank, next(self._number), (answer, function, arguments, say)))
        return answer

    def _serve(self, worker: Worker) -> None:
        while (question := self._questions.get()[2]) is not None:
            answer, function, arguments, say = question
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(worker.ask(function, *arguments, say=say))
            except BaseException as error:
                answer.set_exception(error)

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for _ in range(self._count):
            self._questions.put((inf, next(self._number), None))
        for answer in self._answers:
            answer.cancel()  # whoever waits for it need not wait for ever


class Workers:
    """Several workers while a ``with`` block lasts; none if there would be only one.

    ``with Workers(5) as workers: compare(table, workers=workers)`` studies up to five laws side by side. A script that does so needs
    ``if __name__ == "__main__":`` around what it runs, as each worker reads it again.

    Args:
        most: workers, at most; never more than processors.
        module: what a worker imports at once.
    """

    def __init__(self, most: int, module: str = "escape_inference.comparison") -> None:
        count = min(most, len(processors()))
        context = _context() if count > 1 else None
        start = lambda: [Worker(share, module, context) for share in _shares(count)] if count > 1 else []
        aside = ThreadPoolExecutor(1)  # it takes as long as reading the libraries, which this process has to do, too
        self._starting = aside.submit(start)
        aside.shutdown(wait=False)

    @property
    def all(self) -> list[Worker]:
        """The workers, as soon as they are there."""
        return self._starting.result()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.all:
            worker.stop()


def _shares(workers: int) -> list[list[int]]:
    """The processors of each worker."""
    own = processors()
    return [own[number % len(own) :: workers] for number in range(workers)]


def _begin(share: list[int], module: str | None = None) -> None:
    """Run on these processors, as long as the process that asks; what there is by now is never garbage."""
    Thread(target=_end_with_parent, daemon=True).start()
    _settle(share)
    if module is not None:
        import_module(module)
    gc.freeze()
    gc.enable()


def _settle(share: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)


def _settle_on_next(free: Any) -> None:
    _begin(free.get())


def _answer(pipe: Connection, share: list[int], module: str) -> None:
    """The life of a worker: Ctrl-C is for the process that asks, and with that process it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _begin(share, module)
    with suppress(EOFError, BrokenPipeError):
        while True:
            function, arguments = pipe.recv()
            try:
                answer = "done", function(*arguments, lambda text: pipe.send(("said", text)))
            except Exception as error:
                answer = "failed", error
            pipe.send(answer)


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
