"""The same work in PyTorch, for scripts/bench_trainers.py: run it in an environment that has torch and numpy, nothing else.

    python scripts/bench_torch.py [--steps 400] [--replicas 16] [--skip-lanczos]

Prints replica-iterations per second of SGD on the 784-100-100-100-1 ReLU network with 5,000 samples at B = 8 and B = 100: an
eager loop in one process on each core (plain autograd, one thread each), and torch.func.vmap over replicas on all cores; and
the seconds that the top 20 Hessian eigenvalues take by Lanczos with full reorthogonalisation on double-backward products. The
inputs are random numbers, because the speed does not depend on them.
"""

import argparse
import multiprocessing
import os
import time

import torch
from torch import nn

SAMPLES = 5000


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


def eager(batch: int, steps: int) -> float:
    """Iterations per second of one replica in one thread."""
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
    began = time.perf_counter()
    run(steps)
    return steps / (time.perf_counter() - began)


def vectorised(batch: int, replicas: int, steps: int) -> float:
    """Replica-iterations per second of torch.func.vmap over replicas."""
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
    began = time.perf_counter()
    run(steps, params)
    return replicas * steps / (time.perf_counter() - began)


def lanczos(count: int, iterations: int) -> tuple[float, list[float]]:
    """Seconds for the largest eigenvalues, and the first three of them."""
    inputs, targets = data()
    model = network()
    params = list(model.parameters())
    loss = 0.5 * ((model(inputs)[:, 0] - targets) ** 2).mean()
    slopes = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])

    def product(vector: torch.Tensor) -> torch.Tensor:
        images = torch.autograd.grad(flat, params, vector, retain_graph=True)
        return torch.cat([image.reshape(-1) for image in images])

    began = time.perf_counter()
    vector = torch.randn(flat.numel())
    basis, diagonal, off = [vector / vector.norm()], [], []
    for _ in range(iterations):
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            image = image - known.T @ (known @ image)
        off.append(float(image.norm()))
        basis.append(image / off[-1])
    matrix = (
        torch.diag(torch.tensor(diagonal))
        + torch.diag(torch.tensor(off[:-1]), 1)
        + torch.diag(torch.tensor(off[:-1]), -1)
    )
    values, vectors = torch.linalg.eigh(matrix)
    top = (torch.stack(basis[:-1]).T @ vectors.flip(1)[:, :count]).T
    for vector in top:
        product(vector)
    return time.perf_counter() - began, values.flip(0)[:3].tolist()


def main(steps: int, replicas: int, skip_lanczos: bool) -> None:
    """Print everything."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"torch {torch.__version__}, {cores} cores")
    for batch in (8, 100):
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            alone = sum(pool.starmap(eager, [(batch, steps)] * cores))
        torch.set_num_threads(cores)
        together = vectorised(batch, replicas, max(steps // 20, 5))
        print(f"torch B {batch}: eager {alone:.0f}, vmap {together:.0f} replica-iterations/s")
    if not skip_lanczos:
        torch.set_num_threads(cores)
        seconds, values = lanczos(20, 60)
        print(f"torch Lanczos: {seconds:.2f} s for 20 eigenvalues, largest {', '.join(f'{v:.3g}' for v in values)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--skip-lanczos", action="store_true")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.replicas, arguments.skip_lanczos)
