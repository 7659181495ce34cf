"""Speed of the trainers on the network of the published experiments: 784-100-100-100-1 ReLU, 5,000 MNIST samples.

    python scripts/bench_trainers.py [--steps 1000] [--replicas 16] [--skip-misses] [--torch other/venv/bin/python]

Prints, for batch sizes 8 and 100: SGD iterations of replicas per second (one by one in cache on all processors, and
vectorised over replicas), what an iteration costs with two-stage looks at every iteration against SGD alone, and how
many crossings the screens miss, by comparison with exact looks on the same random numbers. Processor time is given
beside wall time, because the former does not suffer from other programs. Then the share of the machine's matrix-multiply
peak, the time of the top 20 Hessian eigenvalues, and the memory of 1,000 replicas. With ``--torch`` (an interpreter that has
PyTorch, which this project never needs itself) scripts/bench_torch.py runs too, and the ratios are printed.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from escape_inference.trainers import Minimum, measure_escape, top_hessian, train_minimum
from escape_inference.trainers.datasets import load_data
from escape_inference.trainers.engines import make_engine
from escape_inference.trainers.looks import World
from escape_inference.trainers.losses import mean_square
from escape_inference.trainers.networks import load_network
from escape_inference.trainers.replicas import Replicas
from escape_inference.trainers.sgd import make_recipe, root_key


@dataclass(frozen=True)
class Setting:
    """A condition at which escapes from the trained minimum are neither rare nor immediate."""

    batch_size: int
    learning_rate: float
    ratio: float


def clock(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def sgd_alone(
    apply: Callable,
    minimum: Minimum,
    inputs: jax.Array,
    targets: jax.Array,
    setting: Setting,
    replicas: int,
    steps: int,
) -> dict[str, float]:
    """Seconds per replica-iteration without any look: replicas one by one, and vectorised."""
    recipe, key = make_recipe(apply, mean_square, None, setting.batch_size, True), root_key(0)
    numbers = (jnp.float32(setting.learning_rate), jnp.float32(jnp.inf), jnp.int32(2**30), jnp.int32(2**30))
    world = World(inputs, targets, *numbers, None, None)
    engine = make_engine(
        recipe, minimum.params, replicas, key, setting.learning_rate, replace=False, replica_batch=None, threads=None
    )
    assert isinstance(engine, Replicas)
    engine.advance(5, world)
    best = sorted(clock(lambda: engine.advance(engine.step + steps, world)) for _ in range(3))[1]

    @jax.jit
    def vectorised(states: object, begin: jax.Array) -> object:
        def body(step: jax.Array, states: object) -> object:
            indices = jax.vmap(lambda slot: recipe.draw(jax.random.fold_in(key, slot), step, None, len(inputs))[0])(
                jnp.arange(replicas)
            )
            advance = jax.vmap(recipe.step, (0, None, None, None, 0))
            return advance(states, world.learning_rate, inputs, targets, indices)[0]

        return jax.lax.fori_loop(begin, begin + steps // 4, body, states)

    start = recipe.start(minimum.params, setting.learning_rate)
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (replicas, *jnp.shape(leaf))), start)
    jax.block_until_ready(vectorised(states, jnp.int32(1)))
    batch = sorted(clock(lambda: jax.block_until_ready(vectorised(states, jnp.int32(1)))) for _ in range(3))[1]
    return {
        "wall": best[0] / (replicas * steps),
        "processor": best[1] / (replicas * steps),
        "wall_vectorised": batch[0] / (replicas * (steps // 4)),
    }


def report(
    apply: Callable,
    minimum: Minimum,
    inputs: jax.Array,
    targets: jax.Array,
    setting: Setting,
    replicas: int,
    steps: int,
    misses: bool,
) -> float:
    """Measure one setting, print it, and return the replica-iterations per second of SGD alone."""
    alone = sgd_alone(apply, minimum, inputs, targets, setting, replicas, 200)
    common: dict = {
        "learning_rate": setting.learning_rate,
        "batch_size": setting.batch_size,
        "loss_barrier": setting.ratio * minimum.loss_minimum,
        "seed": 1,
    }
    measure_escape(apply, minimum, inputs, targets, replicas=2, steps=10, looks="screened", burn_in=(0, 0), **common)
    records = []
    wall, processor = clock(
        lambda: records.append(
            measure_escape(apply, minimum, inputs, targets, replicas=replicas, steps=steps, **common)
        )
    )
    after = sgd_alone(apply, minimum, inputs, targets, setting, replicas, 200)
    alone = {name: 0.5 * (value + after[name]) for name, value in alone.items()}  # the machine may be shared
    record = records[0]
    iterations = replicas * (steps + record.burn_in)
    gaps = record.rows.loc[record.rows["escaped"], "steps"]
    print(f"batch size {setting.batch_size}, learning rate {setting.learning_rate:g}, barrier {setting.ratio:g} L*")
    print(
        f"  SGD alone, one by one     {1 / alone['wall']:9.0f} replica-iterations/s, {1e6 * alone['processor']:.0f} us each"
    )
    print(f"  SGD alone, vectorised     {1 / alone['wall_vectorised']:9.0f} replica-iterations/s")
    print(
        f"  Fleming-Viot with looks   {iterations / wall:9.0f} replica-iterations/s, {1e6 * processor / iterations:.0f} us each"
    )
    print(f"  cost against SGD alone    {processor / iterations / alone['processor']:9.2f} x processor time")
    print(f"  screens {record.screens}, full losses per iteration {record.full_looks / (replicas * steps):.4f}")
    print(f"  escapes {record.escapes}, one in {replicas * steps / max(record.escapes, 1):.0f} replica-iterations")
    print(f"  gaps: coefficient of variation {np.std(gaps) / max(np.mean(gaps), 1e-9):.2f}; settled {record.settled}")
    if record.missed_fraction is not None:
        print(f"  crossings missed, estimated {record.missed_fraction:.4f} +- {record.missed_fraction_se:.4f}")
    if misses:
        runs: dict = {"replicas": replicas, "steps": 400, "start": "minimum"}
        exact = measure_escape(apply, minimum, inputs, targets, looks="exact", **runs, **common)
        screened = measure_escape(apply, minimum, inputs, targets, looks="screened", **runs, **common)
        late = int(np.sum(exact.rows["steps"].to_numpy() != screened.rows["steps"].to_numpy()))
        print(f"  against exact looks from the minimum: {late} of {exact.escapes} crossings seen late or not at all")
    return max(1 / alone["wall"], 1 / alone["wall_vectorised"])


def matrix_peak(size: int = 2000) -> float:
    """Floating-point operations per second of a large matrix product in single precision."""
    square = jnp.ones((size, size))
    multiply = jax.jit(lambda a: a @ a)
    multiply(square).block_until_ready()
    best = min(clock(lambda: multiply(square).block_until_ready())[0] for _ in range(5))
    return 2 * size**3 / best


def operations(batch_size: int) -> float:
    """Of one SGD iteration: every weight in a product forward, one for its gradient, one for the gradient passed on."""
    first, others = 784 * 100, 2 * 100 * 100 + 100
    return batch_size * (4 * first + 6 * others)


def eigenvalues(apply: Callable, minimum: Minimum, inputs: jax.Array, targets: jax.Array) -> float:
    """Seconds for the top 20 Hessian eigenvalues, after compilation."""
    spectra = []
    for _ in range(3):
        wall, _ = clock(lambda: spectra.append(top_hessian(apply, minimum, inputs, targets, k=20, iterations=60)))
    worst = (spectra[-1].residuals / spectra[-1].top).max()
    print(f"top 20 Hessian eigenvalues: {wall:.2f} s; largest residual {worst:.1g} of the largest eigenvalue")
    return wall


def memory(apply: Callable, minimum: Minimum, inputs: jax.Array, targets: jax.Array) -> None:
    """Advance 1,000 replicas a little, and print the most memory that this process has had."""
    measure_escape(
        apply, minimum, inputs, targets, learning_rate=0.1, batch_size=8, loss_barrier=5 * minimum.loss_minimum,
        replicas=1000, steps=64, burn_in=(0, 0), seed=2,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"1,000 replicas: {peak:.2f} GiB at most in this process")


def against_torch(python: Path, speeds: dict[int, float], wall: float) -> None:
    """Run the same work in PyTorch and print the ratios."""
    script = Path(__file__).with_name("bench_torch.py")
    text = subprocess.run([str(python), str(script)], check=True, capture_output=True, text=True).stdout
    print(text, end="")
    for batch, eager, together in re.findall(r"B (\d+): eager (\d+), vmap (\d+)", text):
        ratio = speeds[int(batch)] / max(float(eager), float(together))
        print(f"SGD at B = {batch}: {ratio:.1f} times PyTorch in its fastest form")
    seconds = re.search(r"Lanczos: ([\d.]+) s", text)
    if seconds:
        print(f"top 20 eigenvalues: {float(seconds[1]) / wall:.1f} times as fast as Lanczos in PyTorch")


def main(replicas: int, steps: int, misses: bool, torch: Path | None) -> None:
    """Train the minimum, then report everything."""
    data = load_data("mnist_two_class")
    network = load_network("multilayer_perceptron", data)
    inputs, targets = jnp.asarray(data.inputs), jnp.asarray(data.targets)
    settings: dict = {"learning_rate": 0.1, "batch_size": 100, "steps": 10_000, "seed": 1}
    minima: list[Minimum] = []
    wall, _ = clock(
        lambda: minima.append(train_minimum(network.apply, network.init(root_key(1)), inputs, targets, **settings))
    )
    print(f"minimum: loss {minima[0].loss_minimum:.3g}, gradient norm {minima[0].gradient_norm:.2g}, {wall:.1f} s")
    peak, speeds = matrix_peak(), {}
    for setting in (Setting(8, 0.1, 5.0), Setting(100, 0.2, 2.0)):
        several = misses and setting.batch_size == 8
        speed = report(network.apply, minima[0], inputs, targets, setting, replicas, steps, several)
        speeds[setting.batch_size] = speed
        share = speed * operations(setting.batch_size) / peak
        print(f"  share of the matrix-multiply peak, {peak / 1e9:.0f} GFlop/s: {100 * share:.0f} %")
    seconds = eigenvalues(network.apply, minima[0], inputs, targets)
    if torch is not None:
        against_torch(torch, speeds, seconds)
    memory(network.apply, minima[0], inputs, targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--skip-misses", action="store_true")
    parser.add_argument("--torch", type=Path, help="a Python that has PyTorch, to compare with")
    arguments = parser.parse_args()
    main(arguments.replicas, arguments.steps, not arguments.skip_misses, arguments.torch)
