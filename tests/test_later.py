"""Libraries read when they are first used, by whichever thread comes first."""

import subprocess
import sys

TWO_AT_ONCE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import jax

from escape_inference.later import library

sys.setswitchinterval(1e-6)
ready = Barrier(2)


def read(*names):
    ready.wait()
    return [library(name).__name__ for name in names]


with ThreadPoolExecutor(2) as pool:
    hmc = pool.submit(read, "blackjax.adaptation.step_size", "blackjax.mcmc.hmc")
    smc = pool.submit(read, "blackjax.smc.tempered", "blackjax.smc.waste_free")
    print(*hmc.result(), *smc.result())
"""


def test_two_threads_that_read_parts_of_one_library_at_once_both_find_it_whole() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_AT_ONCE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "blackjax.smc.waste_free"
