"""Accuracy and speed of the first-passage laws, against adaptive panels of a fine rule and the nested 64 × 64 rule.

Run ``python scripts/bench_passage.py [--conditions 400] [--seed 0]`` where the package is installed. It prints how the relative errors of the
mean passage rate and of the leading rate are distributed over the whole range of validity, and by dimension, barrier and
temperature, then the time of one evaluation with its gradient in all four arguments, as such and as a share of the time of the
nested rule measured in the same run.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from escape_inference.passage import log_leading_rate, log_mean_passage_rate

RANGE = {"temperature": (0.005, 1.0), "excess": (1e-3, 49.0), "dimension": (0.5, 200.0), "noise_exponent": (-0.5, 2.5)}
GAUSS, GAUSS_WEIGHTS = (a / 2 + b for a, b in zip(np.polynomial.legendre.leggauss(10), (0.5, 0.0), strict=True))
Conditions = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def potential(log_x: np.ndarray, q: float) -> np.ndarray:
    """``ΔU_q`` by the library's expm1."""
    return log_x if q == 1 else np.expm1((1 - q) * log_x) / (1 - q)


def _to_nodes() -> np.ndarray:
    basis = np.polynomial.legendre.legvander(2 * GAUSS - 1, 10)
    k = np.arange(1, 10)
    primitive = np.column_stack([GAUSS, (basis[:, 2:] - basis[:, :9]) / (2 * (2 * k + 1))])
    return primitive @ np.linalg.inv(basis[:, :10])


class FineRule:
    """The passage integrals of one condition by ten-point panels in ``log(x − 1)/2``, so short that every factor is resolved."""

    integrate = _to_nodes()

    def __init__(self, T: float, c: float, n: float, q: float) -> None:
        end, begin = 0.5 * np.log(c - 1), 0.5 * np.log(1e-10 * min(T, c - 1, 0.3))
        t = np.linspace(begin, end, 200_001)
        y = np.exp(2 * t)
        pull = y * (1 + y) ** -q / T
        density = np.abs(n - 2 * pull) / 1.5 + 2 * np.sqrt(pull) + 6
        counts = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
        self.edges = np.interp(np.linspace(0, counts[-1], int(counts[-1]) + 2), counts, t)
        self.width = np.diff(self.edges)[:, None]
        t = self.edges[:-1, None] + self.width * GAUSS
        y = np.exp(2 * t)
        at_edges = potential(np.log1p(np.exp(2 * self.edges)), q) / T - n * self.edges
        self.start, self.climb = at_edges[:-1], potential(np.log1p(y), q) / T - n * t - at_edges[:-1, None]
        self.source, self.volume, self.T, self.first = (
            (1 + y) ** -q * np.exp(-self.climb) * self.width,
            2 * y * self.width,
            T,
            1 / n,
        )
        self.log_mass = -q * np.log1p(y) - self.climb - self.start[:, None] + np.log(self.width * GAUSS_WEIGHTS)
        self.at_first = at_edges[0]

    def drive(self, f: np.ndarray) -> tuple[np.ndarray, float]:
        """``T G f`` over ``exp`` of the second value."""
        source = self.source * f
        flows = np.log(source @ GAUSS_WEIGHTS) - self.start
        entering = (
            np.logaddexp.accumulate(np.concatenate([[np.log(self.first * f[0, 0]) - self.at_first], flows]))[:-1]
            + self.start
        )
        log_b = self.climb + np.logaddexp(entering[:, None], np.log(source @ self.integrate.T))
        scale = log_b.max()
        density = np.exp(log_b - scale) * self.volume
        whole = density @ GAUSS_WEIGHTS
        later = np.cumsum(whole[::-1])[::-1]
        return np.maximum(later[:, None] - density @ self.integrate.T, 1e-290), scale

    def log_mean_rate(self) -> float:
        value, scale = self.drive(np.ones_like(self.source))
        return float(np.log(self.T) - np.log(value[0, 0]) - scale)

    def log_leading_rate(self) -> float:
        mass = np.exp(self.log_mass - self.log_mass.max())
        f, rate = np.ones_like(self.source), 0.0
        for _ in range(400):
            image, scale = self.drive(f)
            previous, rate = rate, np.log(self.T) - scale - np.log((mass * f * image).sum() / (mass * f * f).sum())
            if abs(rate - previous) < 1e-13:
                break
            f = image / image[0, 0]
        return float(rate)


def draw(generator: np.random.Generator, size: int) -> Conditions:
    """Conditions over the whole range: T, c − 1 and n uniform in their logarithm, q uniform."""
    T, excess, n = (np.exp(generator.uniform(*np.log(RANGE[k]), size)) for k in ("temperature", "excess", "dimension"))
    return T, 1 + excess, n, generator.uniform(*RANGE["noise_exponent"], size)


def nested_log_rate(T: jax.Array, c: jax.Array, n: jax.Array, q: jax.Array) -> jax.Array:
    """The mean passage rate by 64 × 64 Gauss nodes in ``x = 1 + s²``, ``y = 1 + (s u)²``."""
    z, w = (jnp.asarray(a) for a in np.polynomial.legendre.leggauss(64))
    z, w = (z + 1) / 2, w / 2
    s = jnp.sqrt(c - 1)[:, None, None] * z[:, None]
    u = s * z
    T, n, q = T[:, None, None], n[:, None, None], q[:, None, None]

    def height(s: jax.Array) -> jax.Array:
        return jnp.expm1((1 - q) * jnp.log1p(s**2)) / ((1 - q) * T)

    log_terms = (
        height(s) - height(u) - q * jnp.log1p(u**2) + (n - 1) * jnp.log(z) + jnp.log(s) + jnp.log(w * w[:, None])
    )
    return jnp.log(T[:, 0, 0] / 2) - 0.5 * jnp.log(c - 1) - jax.nn.logsumexp(log_terms, (1, 2))


def best_time(law: Callable[..., jax.Array], conditions: Conditions, repeats: int) -> float:
    """Seconds for values and gradients, the best of several."""
    evaluate = jax.jit(jax.value_and_grad(lambda *x: law(*x).sum(), argnums=(0, 1, 2, 3)))
    arguments = [jnp.asarray(x) for x in conditions]
    jax.block_until_ready(evaluate(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(evaluate(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def print_errors(title: str, errors: np.ndarray, groups: dict[str, np.ndarray]) -> None:
    print(f"{title}\n  {'':24}{'count':>6}{'median':>10}{'99 %':>10}{'largest':>10}{'> 1e-6':>8}")
    for name, chosen in groups.items():
        e = errors[chosen]
        if len(e):
            print(
                f"  {name:24}{len(e):6d}{np.median(e):10.1e}{np.quantile(e, 0.99):10.1e}{e.max():10.1e}{(e > 1e-6).sum():8d}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", type=int, default=400, help="conditions in the error map (about 0.1 s each)")
    parser.add_argument("--repeats", type=int, default=50, help="timed repetitions, the best of which counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    T, c, n, q = conditions = draw(generator, options.conditions)
    mean, leading = (np.asarray(jax.jit(law)(*conditions)) for law in (log_mean_passage_rate, log_leading_rate))
    fine = [FineRule(*map(float, x)) for x in zip(*conditions, strict=True)]
    everywhere = np.ones(len(T), bool)
    groups = {"everywhere": everywhere, "T < 0.05": T < 0.05, "T >= 0.05": T >= 0.05, "c < 2": c < 2, "c >= 2": c >= 2}
    groups |= {"n < 4": n < 4, "4 <= n < 30": (n >= 4) & (n < 30), "n >= 30": n >= 30, "q < 1": q < 1, "q >= 1": q >= 1}
    print_errors("mean passage rate, relative error", np.abs(mean - [r.log_mean_rate() for r in fine]), groups)
    rate = np.array([r.log_leading_rate() for r in fine])
    steps = (-np.inf, 0, 1, 2, 3, np.inf)
    bands = {f"{a} <= log rate < {b}": (rate >= a) & (rate < b) for a, b in pairwise(steps)}
    print_errors("leading rate, relative error", np.abs(leading - rate), bands)
    print(
        "value and gradient, best time\n  conditions   mean rate   leading rate   nested 64 x 64   mean/nested   leading/nested"
    )
    for size in (36, 100, 400):
        x = draw(np.random.default_rng(1), size)
        seconds = [best_time(law, x, options.repeats) for law in (log_mean_passage_rate, log_leading_rate)]
        nested = best_time(nested_log_rate, x, 3)
        print(
            f"  {size:10d}{seconds[0] * 1e3:9.2f} ms{seconds[1] * 1e3:12.2f} ms{nested * 1e3:14.1f} ms{seconds[0] / nested:14.3f}{seconds[1] / nested:17.3f}"
        )


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
