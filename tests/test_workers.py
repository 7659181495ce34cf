"""Processes that answer questions, and what is said when one of them cannot."""

import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from escape_inference import InputError, workers

KNOWN = []


def remember(number, say):
    KNOWN.append(number)
    say(f"got {number}")
    return sum(KNOWN), os.getpid()


def refuse(say):
    raise InputError("row 3: not a number")


def end(say):
    os._exit(1)


def take_long(say):
    say(str(os.getpid()))
    time.sleep(60)


def collects(say):
    return gc.isenabled()


def where(say):
    return os.sched_getaffinity(0)


def where_for_a_while(share, say):
    with ThreadPoolExecutor(1) as pool, workers.on_processors(share):
        return pool.submit(os.sched_getaffinity, 0).result()


@pytest.fixture
def worker():
    worker = workers.Worker(workers.processors()[:1], "escape_inference.errors")
    yield worker
    worker.stop()


def test_a_worker_says_what_it_does_and_keeps_what_it_has_found(worker):
    said = []
    first, process = worker.ask(remember, 2, say=said.append)
    second, same = worker.ask(remember, 3, say=said.append)
    assert (first, second, said) == (2, 5, ["got 2", "got 3"])
    assert process == same != os.getpid()
    assert KNOWN == []


def test_an_error_there_is_raised_here_and_the_worker_goes_on(worker):
    with pytest.raises(InputError, match="row 3"):
        worker.ask(refuse, say=print)
    assert worker.ask(remember, 1, say=lambda text: None)[0] == 1


def test_a_worker_that_ended_is_told_of(worker):
    with pytest.raises(ChildProcessError, match="memory"):
        worker.ask(end, say=print)


def test_a_worker_collects_garbage_and_only_what_others_are_copies_of_ends_without_a_word(worker):
    assert worker.ask(collects, say=print)
    here = "import gc, sys, escape_inference.copied; sys.exit(3 if gc.isenabled() else 4)"
    assert subprocess.run([sys.executable, "-c", here]).returncode == 3


def note(name, say):
    time.sleep(0.2)
    say(name)
    return name


def test_questions_of_lower_rank_come_first_and_those_left_over_are_dropped(worker):
    said = []
    with workers.Desk([worker]) as desk:
        first = desk.submit(1, note, "begun at once", say=said.append)
        while not worker._turn.locked():
            time.sleep(0.01)
        later = [desk.submit(1, note, "later", say=said.append), desk.submit(1, refuse, say=said.append)]
        sooner = desk.submit(0, note, "sooner", say=said.append)
        assert (first.result(), later[0].result(), sooner.result()) == ("begun at once", "later", "sooner")
        with pytest.raises(InputError, match="row 3"):
            later[1].result()
        desk.submit(1, note, "last", say=said.append)
        dropped = desk.submit(1, note, "dropped", say=said.append)
    time.sleep(0.6)
    assert said[:3] == ["begun at once", "sooner", "later"]
    assert dropped.cancelled()
    assert worker.ask(remember, 1, say=lambda text: None)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processors to choose here")
def test_a_worker_stays_on_its_processor(worker):
    assert worker.ask(where, say=print) == set(workers.processors()[:1])
    assert worker.ask(where_for_a_while, workers.processors(), say=print) == set(workers.processors())
    assert worker.ask(where, say=print) == set(workers.processors()[:1])


WORKER = """
import os, test_workers as t
w = t.workers.Worker(t.workers.processors()[:1], 'escape_inference.errors')
w.ask(t.take_long, say=lambda text: (print(text, flush=True), os.kill(os.getpid(), 9)))
"""
POOL = """
import os, time, test_workers as t
pool = t.workers.processes(1)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 60)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("code", [WORKER, POOL], ids=["worker", "pool"])
def test_workers_end_with_the_process_that_started_them(code):
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        parent.wait()
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")


def test_one_worker_is_none_and_processors_are_shared_out(monkeypatch):
    with workers.Workers(1, "escape_inference.errors") as pool:
        assert pool.all == []
    monkeypatch.setattr(workers, "processors", lambda: [4, 5, 6])
    assert workers._shares(2) == [[4, 6], [5]]
    assert workers._shares(4) == [[4], [5], [6], [4]]
