"""Speed of the trainers on the network of the published experiments: 784-100-100-100-1 ReLU, 5,000 MNIST samples.

    python scripts/bench_trainers.py [--steps 1000] [--replicas 16] [--rounds 5] [--crossings 400] [--torch other/venv/bin/python]

Prints, for batch sizes 8 and 100: SGD iterations of replicas per second, their share of the machine's matrix-multiply peak,
and what an iteration costs with two-stage looks at every iteration against SGD alone. Then the time of the top 20 Hessian
eigenvalues, the memory of 1,000 replicas, and how many crossings the screens miss: the same replicas on the same random
numbers are looked at wherever a screen of 512 samples exceeds a small part of the barrier. With ``--torch`` (an interpreter
that has PyTorch, which this project never needs itself) scripts/bench_torch.py does the same work. Rivals take turns, and
every ratio is the median over the turns; processor time stands beside wall time, because other programs disturb it less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import beta

from escape_inference.trainers import Minimum, measure_escape, top_hessian, train_minimum
from escape_inference.trainers.datasets import load_data
from escape_inference.trainers.engines import make_engine
from escape_inference.trainers.hessian import CHECK_INTERVAL, TOLERANCE
from escape_inference.trainers.looks import Gate, Limits, World
from escape_inference.trainers.losses import mean_square
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.process import Process
from escape_inference.trainers.replicas import Replicas
from escape_inference.trainers.rounds import Round
from escape_inference.trainers.screens import Screens, choose_screens, pilot_losses
from escape_inference.trainers.sgd import make_recipe, root_key
from escape_inference.workers import processors


@dataclass(frozen=True)
class Setting:
    """A condition at which escapes from the trained minimum are neither rare nor immediate."""

    batch_size: int
    learning_rate: float
    ratio: float


@dataclass(frozen=True)
class Case:
    """The network at its minimum, and its data."""

    apply: Callable
    minimum: Minimum
    inputs: jax.Array
    targets: jax.Array

    def engine(self, setting: Setting, replicas: int, seed: int) -> tuple[Replicas, World]:
        """Replicas at the minimum that are not replaced, and a world without looks."""
        recipe = make_recipe(self.apply, mean_square, None, setting.batch_size, True)
        numbers = (jnp.float32(setting.learning_rate), jnp.float32(jnp.inf), jnp.int32(2**30), jnp.int32(2**30))
        world = World(self.inputs, self.targets, *numbers, None, None)
        options: dict = {"replace": False, "replica_batch": None, "threads": None}
        engine = make_engine(recipe, self.minimum.params, replicas, root_key(seed), setting.learning_rate, **options)
        assert isinstance(engine, Replicas)
        return engine, world


def clock(work: Callable[[], object]) -> np.ndarray:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return np.array([time.perf_counter() - wall, time.process_time() - processor])


def run_torch(python: Path, *arguments: str) -> dict:
    """What scripts/bench_torch.py prints."""
    command = [str(python), str(Path(__file__).with_name("bench_torch.py")), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def matrix_peak(size: int = 2000) -> float:
    """Floating-point operations per second of a large matrix product in single precision, on all cores."""
    square = jnp.ones((size, size))
    multiply = jax.jit(lambda a: a @ a)
    multiply(square).block_until_ready()
    best = min(clock(lambda: multiply(square).block_until_ready())[0] for _ in range(5))
    return 2 * size**3 / best


def operations(batch_size: int) -> float:
    """Of one SGD iteration: every weight in a product forward, one for its gradient, one for the gradient passed on."""
    first, others = 784 * 100, 2 * 100 * 100 + 100
    return batch_size * (4 * first + 6 * others)


def report_speed(case: Case, setting: Setting, replicas: int, steps: int, rounds: int, torch: Path | None) -> None:
    """SGD alone, with looks at every iteration, and in PyTorch, in turn."""
    engine, world = case.engine(setting, replicas, 0)
    engine.advance(5, world)
    common: dict = {
        "learning_rate": setting.learning_rate,
        "batch_size": setting.batch_size,
        "loss_barrier": setting.ratio * case.minimum.loss_minimum,
        "replicas": replicas,
    }
    network = (case.apply, case.minimum, case.inputs, case.targets)
    measure_escape(*network, steps=200, burn_in=(0, 0), seed=0, **common)  # compiles
    alone, looked, peaks, records = [], [], [], []
    rivals: dict[str, list[np.ndarray]] = {"eager": [], "vmap": []}
    for turn in range(rounds):
        peaks.append(matrix_peak())
        before = clock(lambda: engine.advance(engine.step + 200, world))
        seconds = clock(lambda: records.append(measure_escape(*network, steps=steps, seed=turn + 1, **common)))  # noqa: B023
        after = clock(lambda: engine.advance(engine.step + 200, world))
        alone.append((before + after) / (2 * replicas * 200))
        looked.append(seconds / (replicas * (steps + records[-1].burn_in)))
        if torch is not None:
            found = run_torch(torch, "sgd", str(setting.batch_size), "--replicas", str(replicas))
            for form, times in rivals.items():
                times.append(np.array([found[form]["wall"], found[form]["processor"]]))
    wall, processor = np.median(alone, axis=0)
    cores = len(processors())
    share = np.median(
        [operations(setting.batch_size) / seconds[0] / peak for seconds, peak in zip(alone, peaks, strict=True)]
    )
    in_cache = operations(setting.batch_size) * cores / processor / np.max(peaks)
    ratio = np.median(np.array(looked) / np.array(alone), axis=0)
    exposed = replicas * steps * rounds
    escapes = int(sum(record.escapes for record in records))
    print(f"batch size {setting.batch_size}, learning rate {setting.learning_rate:g}, barrier {setting.ratio:g} L*")
    print(f"  SGD alone: {1 / wall:.0f} replica-iterations/s, {1e6 * processor:.0f} us of processor time each")
    print(
        f"  share of the matrix-multiply peak: {100 * share:.0f} % by wall time; {100 * in_cache:.0f} % if processors were free"
    )
    print(f"  Fleming-Viot with looks against SGD alone: {ratio[0]:.2f} x wall, {ratio[1]:.2f} x processor time")
    print(f"  screens {records[-1].screens}, full losses per iteration {sum(r.full_looks for r in records) / exposed:.4f}, "
          f"one escape in {exposed / max(escapes, 1):.0f} replica-iterations")  # fmt: skip
    if torch is not None:
        times = {form: np.array(values) for form, values in rivals.items()}
        fastest = np.min([values / np.array(alone) for values in times.values()], axis=0)
        for form, values in times.items():
            print(f"  torch {form}: {1 / np.median(values[:, 0]):.0f} replica-iterations/s, "
                  f"{1e6 * np.median(values[:, 1]):.0f} us of processor time each")  # fmt: skip
        middle, low, high = (function(fastest, axis=0) for function in (np.median, np.min, np.max))
        print(f"  SGD against PyTorch in its fastest form: {middle[0]:.1f} x by wall time ({low[0]:.1f} to {high[0]:.1f}), "
              f"{middle[1]:.1f} x by processor time ({low[1]:.1f} to {high[1]:.1f})")  # fmt: skip


def report_eigenvalues(case: Case, rounds: int, torch: Path | None) -> None:
    """The top 20 Hessian eigenvalues, and the same in PyTorch with the same stopping rule."""
    options: dict = {"k": 20, "iterations": 60}
    found = [top_hessian(case.apply, case.minimum, case.inputs, case.targets, **options)]  # compiles
    ours, rivals = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minimum.npz"
        leaves = {f"leaf{index}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(case.minimum.params))}
        np.savez(path, inputs=np.asarray(case.inputs), targets=np.asarray(case.targets), **leaves)
        for _ in range(rounds):
            work = lambda: found.append(top_hessian(case.apply, case.minimum, case.inputs, case.targets, **options))
            ours.append(clock(work))
            if torch is not None:
                rule = ("--tolerance", str(TOLERANCE), "--interval", str(CHECK_INTERVAL))
                rivals.append(run_torch(torch, "lanczos", str(path), *rule))
    wall, processor = np.median(ours, axis=0)
    worst = (found[-1].residuals / found[-1].top).max()
    print(
        f"top 20 Hessian eigenvalues: {wall:.2f} s, {processor:.2f} s of processor time; largest residual {worst:.1g} of the largest"
    )
    for prefix, name in (("", "Lanczos written out in PyTorch"), ("package_", "hessian-eigenthings")):
        if not rivals or f"{prefix}one_core" not in rivals[0]:
            continue
        theirs = np.array([[r[f"{prefix}all_cores"]["wall"], r[f"{prefix}one_core"]["processor"]] for r in rivals])
        last = rivals[-1][f"{prefix}one_core"]
        apart = np.abs(np.array(last["values"]) - found[-1].eigenvalues).max() / found[-1].top
        ratio = np.median(theirs / np.array(ours), axis=0)
        print(f"  {name}: {np.median(theirs[:, 0]):.2f} s on all cores, {np.median(theirs[:, 1]):.2f} s of processor time on one; "
              f"residual {last['residual']:.1g}, {rivals[-1]['one_core']['products']} products; eigenvalues differ by {apart:.1g}")  # fmt: skip
        print(f"  against it: {ratio[0]:.2f} x by wall time, {ratio[1]:.2f} x by processor time")


class Generous(Screens):
    """Screens that pass everything above a small part of the barrier, never learn, and have no gate."""

    part = 0.3

    def limits(self, stage: int, barrier: float) -> Limits:
        return Limits(jnp.float32(self.part * barrier), jnp.float32(self.part * barrier))

    def gate(self, barrier: float, loss_minimum: float) -> Gate:
        return Gate(Limits(jnp.float32(0), jnp.float32(0)), jnp.float32(barrier))

    def fit(self, done: Round, barrier: float, loss_minimum: float) -> None:
        pass


def report_misses(case: Case, setting: Setting, crossings: int, steps: int) -> None:
    """First crossings of replicas from the minimum, as the screens see them and as generous screens do."""
    barrier = setting.ratio * case.minimum.loss_minimum
    seen, lowest = [], np.inf
    for generous in (True, False):
        engine, world = case.engine(setting, crossings, 7)
        world = world._replace(barrier=jnp.float32(barrier), check_interval=jnp.int32(1))
        pilot = pilot_losses(engine.recipe, case.minimum.params, root_key(7), world)
        screens = choose_screens(*pilot, barrier, 7, gated=True, forced=True)
        assert screens is not None
        if generous:
            large = (screens.indices[1], screens.indices[1]), (screens.weights[1], screens.weights[1])
            screens = Generous(*large, (screens.first_spread[1],) * 2, True)
        process = Process(engine, world, screens, None, steps, case.minimum.loss_minimum)
        process.measure(steps)
        seen.append({slot: step for done in process.rounds for step, slot in done.escapes})
        records = np.concatenate([done.records for done in process.rounds])
        if generous:
            lowest = np.min(records[records[:, 5] > barrier, 3], initial=np.inf) / barrier
    exact, screened = seen
    missed = sum(screened.get(slot) != step for slot, step in exact.items())
    limit = beta.ppf(0.95, missed + 1, len(exact) - missed)
    print(f"crossings at batch size {setting.batch_size}, learning rate {setting.learning_rate:g}, barrier {setting.ratio:g} L*: "
          f"{missed} of {len(exact)} missed by the screens, below {100 * limit:.2g} % with 95 % confidence")  # fmt: skip
    print(
        f"  the lowest screen of the replay at a crossing was {lowest:.2f} of the barrier; it looked from {Generous.part}"
    )


def report_memory(case: Case) -> None:
    """Advance 1,000 replicas a little, and print the most memory that this process has had."""
    measure_escape(
        case.apply, case.minimum, case.inputs, case.targets, learning_rate=0.1, batch_size=8, replicas=1000, steps=64,
        loss_barrier=5 * case.minimum.loss_minimum, burn_in=(0, 0), seed=2,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"1,000 replicas: {peak:.2f} GiB at most in this process")


def trained() -> Case:
    """The minimum."""
    data = load_data("mnist_two_class")
    network = load_network("multilayer_perceptron", data)
    inputs, targets = jnp.asarray(data.inputs), jnp.asarray(data.targets)
    settings: dict = {"learning_rate": 0.1, "batch_size": 100, "steps": 10_000, "seed": 1}
    minimum = train_minimum(network.apply, network.init(root_key(1)), inputs, targets, **settings)
    print(f"minimum: loss {minimum.loss_minimum:.3g}, gradient norm {minimum.gradient_norm:.2g}")
    return Case(network.apply, minimum, inputs, targets)


def main(given: argparse.Namespace) -> None:
    """Train the minimum, then report what is asked for."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} processors, load {load} when it began")
    case = trained()
    if "speed" in given.only:
        for setting in (Setting(8, 0.1, 5.0), Setting(100, 0.2, 2.0)):
            report_speed(case, setting, given.replicas, given.steps, given.rounds, given.torch)
    if "eigenvalues" in given.only:
        report_eigenvalues(case, given.rounds, given.torch)
    if "misses" in given.only:
        report_misses(case, Setting(8, 0.15, 3.0), given.crossings, 2000)
    if "memory" in given.only:
        report_memory(case)
    print(f"load {' '.join(f'{value:.1f}' for value in os.getloadavg())} when it ended")


if __name__ == "__main__":
    parts = ["speed", "eigenvalues", "misses", "memory"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="turns of the rivals")
    parser.add_argument("--crossings", type=int, default=400, help="replicas whose crossings are counted")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--torch", type=Path, help="a Python that has PyTorch, to compare with")
    main(parser.parse_args())
