"""The same work in PyTorch, for scripts/bench_trainers.py: run it in an environment that has torch and numpy.

    python scripts/bench_torch.py sgd BATCH [--steps 400] [--replicas 16]
    python scripts/bench_torch.py lanczos MINIMUM.npz

Prints one line of JSON. ``sgd``: replica-iterations per second, and processor seconds for each, of SGD on the
784-100-100-100-1 ReLU network with 5,000 samples: an eager loop in one process on each core (plain autograd, one thread
each), and torch.func.vmap over replicas on all cores; the inputs are random numbers, because the speed does not depend on
them. ``lanczos``: seconds for the largest Hessian eigenvalues at the minimum of that file (its weights, inputs and
targets), on all cores and on one: double-backward products on a graph that is built once and kept, full
reorthogonalisation, and the stopping rule of ``escape_inference.trainers.hessian``. Where the package
``hessian-eigenthings`` is installed, its Lanczos iteration does the same with as many products, told to it in advance.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import time

import numpy as np
import torch
from torch import nn

SAMPLES = 5000
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network() -> nn.Sequential:
    """Three hidden layers of 100."""
    layers: list[nn.Module] = []
    for size in (784, 100, 100):
        layers += [nn.Linear(size, 100), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs between 0 and 1, targets +1 and -1."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(SAMPLES, 784, generator=generator)
    return inputs, torch.sign(torch.rand(SAMPLES, generator=generator) - 0.5)


def eager(batch: int, steps: int) -> tuple[float, float]:
    """Wall and processor seconds per iteration of one replica in one thread."""
    torch.set_num_threads(1)
    inputs, targets = data()
    model = network()
    params = list(model.parameters())

    def run(count: int) -> None:
        for _ in range(count):
            chosen = torch.randint(SAMPLES, (batch,))
            loss = 0.5 * ((model(inputs[chosen])[:, 0] - targets[chosen]) ** 2).mean()
            slopes = torch.autograd.grad(loss, params)
            with torch.no_grad():
                torch._foreach_add_(params, slopes, alpha=-0.01)

    run(20)
    wall, processor = time.perf_counter(), time.process_time()
    run(steps)
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps


def vectorised(batch: int, replicas: int, steps: int) -> tuple[float, float]:
    """Wall and processor seconds per replica-iteration of torch.func.vmap over replicas."""
    inputs, targets = data()
    models = [network() for _ in range(replicas)]
    params, _ = torch.func.stack_module_state(models)
    skeleton = network().to("meta")

    def loss(own: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((torch.func.functional_call(skeleton, own, (x,))[:, 0] - y) ** 2).mean()

    slope = torch.func.vmap(torch.func.grad(loss))

    def run(count: int, own: dict) -> dict:
        for _ in range(count):
            chosen = torch.randint(SAMPLES, (replicas, batch))
            slopes = slope(own, inputs[chosen], targets[chosen])
            own = {name: value - 0.01 * slopes[name] for name, value in own.items()}
        return own

    params = {name: value.detach() for name, value in params.items()}
    params = run(5, params)
    wall, processor = time.perf_counter(), time.process_time()
    run(steps, params)
    count = replicas * steps
    return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


def minimum(path: str) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """The network with the weights of that file, and its inputs and targets."""
    stored = np.load(path)
    model = network()
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.copy_(torch.from_numpy(stored[f"leaf{index}"]))
    return model, torch.from_numpy(stored["inputs"]), torch.from_numpy(stored["targets"])


def package(path: str, count: int, products: int) -> dict[str, object]:
    """Seconds for the same eigenvalues by the package hessian-eigenthings, the full batch in one piece."""
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings import lanczos as iterate

    model, inputs, targets = minimum(path)
    loss = lambda model, batch: 0.5 * ((model(batch[0])[:, 0] - batch[1]) ** 2).mean()
    operator = HessianOperator(model, [(inputs, targets)], loss)
    operator.matvec(torch.ones(operator.size))
    wall, processor = time.perf_counter(), time.process_time()
    found = iterate(operator, k=count, max_iter=products, which="LA", reorthogonalize=True, seed=0)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    residual = float(found.residuals.max() / found.eigenvalues[0])
    return {"wall": wall, "processor": processor, "values": found.eigenvalues.tolist(), "residual": residual}


def lanczos(path: str, count: int, iterations: int, tolerance: float, interval: int) -> dict[str, object]:
    """Wall and processor seconds for the largest eigenvalues, the number of products, and what was found."""
    model, inputs, targets = minimum(path)
    params = list(model.parameters())
    wall, processor = time.perf_counter(), time.process_time()
    loss = 0.5 * ((model(inputs)[:, 0] - targets) ** 2).mean()
    slopes = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])
    basis = torch.empty(iterations, flat.numel())
    diagonal, couplings = np.zeros(iterations), np.zeros(iterations)
    vector = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(0))
    vector /= vector.norm()
    done = 0
    while done < iterations:
        basis[done] = vector
        images = torch.autograd.grad(flat, params, vector, retain_graph=True)
        image = torch.cat([part.reshape(-1) for part in images])
        diagonal[done] = image @ vector
        image -= diagonal[done] * vector
        if done:
            image -= couplings[done - 1] * basis[done - 1]
        done += 1
        image -= (basis[:done] @ image) @ basis[:done]
        couplings[done - 1] = image.norm()
        vector = image / couplings[done - 1]
        if done == iterations or (done >= count and done % interval == 0):
            matrix = np.diag(diagonal[:done]) + np.diag(couplings[: done - 1], 1) + np.diag(couplings[: done - 1], -1)
            values, mixing = np.linalg.eigh(matrix)
            residuals = couplings[done - 1] * np.abs(mixing[-1, ::-1][:count])
            if residuals.max() < tolerance * values[-1]:
                break
    vectors = torch.from_numpy(np.ascontiguousarray(mixing[:, ::-1][:, :count].T, np.float32)) @ basis[:done]
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    assert len(vectors) == count
    found = {"values": values[::-1][:count].tolist(), "residual": float(residuals.max() / values[-1])}
    return {"wall": wall, "processor": processor, "products": done, **found}


def main() -> None:
    """Read the arguments and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["sgd", "lanczos"])
    parser.add_argument("argument", help="batch size, or file of the minimum")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--interval", type=int, default=3)
    given = parser.parse_args()
    if given.work == "lanczos":
        result: dict[str, object] = {}
        for name, threads in (("all_cores", CORES), ("one_core", 1)):
            torch.set_num_threads(threads)
            own = lanczos(given.argument, given.count, given.iterations, given.tolerance, given.interval)
            result[name] = own
            if importlib.util.find_spec("hessian_eigenthings"):
                result[f"package_{name}"] = package(given.argument, given.count, int(own["products"]))  # type: ignore[call-overload]
    else:
        batch = int(given.argument)
        with multiprocessing.get_context("spawn").Pool(CORES) as pool:
            alone = np.array(pool.starmap(eager, [(batch, given.steps)] * CORES))
        torch.set_num_threads(CORES)
        together = vectorised(batch, given.replicas, max(given.steps // 20, 5))
        result = {
            "eager": {"wall": 1 / float(np.sum(1 / alone[:, 0])), "processor": float(alone[:, 1].mean())},
            "vmap": {"wall": together[0], "processor": together[1]},
        }
    print(json.dumps({"torch": torch.__version__, "cores": CORES, **result}))


if __name__ == "__main__":
    main()
