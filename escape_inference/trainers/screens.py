"""Choosing the two screens from a pilot run, and keeping their thresholds right as looks come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from scipy.special import ndtr

from escape_inference.trainers.first_layer import FirstLayer, Staircase, first_layer
from escape_inference.trainers.looks import FAR_LOOKS, Gate, Limits, Screen, World
from escape_inference.trainers.losses import sample_losses
from escape_inference.trainers.rounds import Round
from escape_inference.trainers.sgd import Recipe, slot_key

SAFETY = 3.0
"""A screen lets a loss pass only if its estimate is this many standard deviations below the barrier."""
CLOSE = 0.75
"""Width, in standard deviations, of the band below a threshold in which extra looks are frequent."""
FIRST_SIZES, SECOND_SIZES = (128, 512), (512, 2048)
"""Sizes of the screens to choose from: few, as every pair is compiled anew, and not so small that the samples of which a
large loss is made are often left out."""
FIXED_COST = 24
"""Cost of evaluating any subsample, in samples (measured for a network of 10^5 weights)."""
FEWEST = 1024
"""With fewer samples than this the full loss is cheap and every look is exact."""
GATE_SAFETY = 0.85
"""The gate asks from this fraction of its lowest value seen near the barrier."""
SMALLEST_SPREAD = 1e-3
STRETCHES, PROBED, PROBE = (1.1, 30.0), 12, 256
"""Smallest and largest stretch of a pilot's displacement, how many are tried, and on how many samples."""
FEWEST_SNAPSHOTS, WARM_UP = 16, 64
"""States without which there are no screens, and iterations before the first of them."""
CLIMBING = 0.03
"""Share of its time that SGD is taken to spend evenly between its typical loss and the barrier, for the cost."""
NEAR = 0.25
"""Looks within this fraction of the log barrier below it, or within a whole one above, tell of a screen's errors."""
LARGEST_WEIGHT = 4.0
"""Largest weight of a look that was made by chance, lest one of them decides the thresholds."""
MEMORY, PRIOR_LOOKS = 512, 10.0
"""Looks remembered for the thresholds, and how many of them the pilot counts for."""
ENOUGH_FOR_GATE = 25
"""Iterations near the barrier from which the lowest gate is trusted; before, the part of it in proportion to them."""
KICKED = 2.0
"""A loss near the barrier comes from a few large batch losses; the pilot's stretched states vary less, by this factor."""
PILOT_SLOT = 0x70696C6F


@dataclass
class Screens:
    """Two weighted subsamples with the offset and spread of ``log(full loss) - log(screen)``, and the lowest gate.

    The gate's error is far from normal (a run leaves by one large batch loss, or by several smaller ones), so its
    threshold is a part of the lowest value that it had near the barrier; until there was one, it asks always.
    """

    indices: tuple[np.ndarray, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]
    first_spread: tuple[float, float]
    gated: bool
    offset: list[float] = field(default_factory=lambda: [0.0, 0.0])
    spread: list[float] = field(default_factory=list)
    lowest_gate: float = float("inf")
    near: int = 0
    seen: np.ndarray = field(default_factory=lambda: np.empty((0, 5)))
    gathered: list[tuple[Array, Array, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spread = list(self.first_spread)

    @property
    def sizes(self) -> tuple[int, int]:
        """Samples of the first and of the second screen."""
        return len(self.indices[0]), len(self.indices[1])

    def fit(self, done: Round, barrier: float, loss_minimum: float) -> None:
        """Learn the gate, offsets and spreads near the barrier from a round."""
        self.near += int(np.sum(done.tally.near))
        self.lowest_gate = min(self.lowest_gate, float(np.min(done.tally.lowest_gate)))
        near, ratio = done.records[:, 2:7], barrier / loss_minimum
        with np.errstate(invalid="ignore"):
            usable = (near[:, 3] > barrier * ratio**-NEAR) & (near[:, 3] < barrier * ratio)
            usable &= np.all(near[:, 1:3] > 0, axis=1)
        self.seen = np.concatenate([self.seen, near[usable]])[-MEMORY:]
        weight = np.minimum(1 / self.seen[:, 4], LARGEST_WEIGHT)
        for stage, first in enumerate(self.first_spread):  # the pilot counts as PRIOR_LOOKS looks
            error = np.log(self.seen[:, 3] / self.seen[:, stage + 1])
            total = PRIOR_LOOKS + weight.sum()
            self.offset[stage] = float(weight @ error / total)
            square = PRIOR_LOOKS * first**2 + weight @ (error - self.offset[stage]) ** 2
            self.spread[stage] = float(np.sqrt(square / total))

    def limits(self, stage: int, barrier: float) -> Limits:
        """Where a screen asks for the next stage."""
        threshold = barrier * np.exp(-self.offset[stage] - SAFETY * self.spread[stage])
        return Limits(jnp.float32(threshold), jnp.float32(threshold * np.exp(-CLOSE * self.spread[stage])))

    def gate(self, barrier: float, loss_minimum: float) -> Gate:
        """Where the gate asks for the first screen."""
        lowest = GATE_SAFETY * min(self.near / ENOUGH_FOR_GATE, 1.0) * self.lowest_gate if self.near else 0.0
        near = barrier * (barrier / loss_minimum) ** -NEAR * np.exp(-self.offset[1])
        return Gate(Limits(jnp.float32(lowest), jnp.float32(GATE_SAFETY * lowest)), jnp.float32(near))

    def put_into(self, world: World, loss_minimum: float) -> World:
        """The world with what the compiled code needs of these screens."""
        if not self.gathered:
            for indices, weights in zip(self.indices, self.weights, strict=True):
                chosen = jnp.asarray(indices)
                self.gathered.append((world.inputs[chosen], world.targets[chosen], jnp.asarray(weights, jnp.float32)))
        limits = [self.limits(stage, float(world.barrier)) for stage in (0, 1)]
        gate = self.gate(float(world.barrier), loss_minimum) if self.gated else None
        first, second = (Screen(*arrays, own) for arrays, own in zip(self.gathered, limits, strict=True))
        return world._replace(gate=gate, screens=(first, second))


@lru_cache(maxsize=32)
def _compiled_pilot(recipe: Recipe) -> Callable:
    def pilot(state: PyTree, step: Array, end: Array, key: PRNGKeyArray, world: World) -> PyTree:
        stream, samples = slot_key(key, PILOT_SLOT), world.inputs.shape[0]

        def body(carry: tuple) -> tuple:
            state, step, order = carry
            step = step + 1
            order = recipe.renew(order, stream, step, samples)
            indices, _ = recipe.draw(stream, step, order, samples)
            state, _ = recipe.step(state, world.learning_rate, world.inputs, world.targets, indices, stream, step)
            return state, step, order

        carry = (state, step, recipe.order(stream, step + 1, samples))
        return jax.lax.while_loop(lambda carry: carry[1] < end, body, carry)[0]

    return jax.jit(pilot)


def pilot_losses(
    recipe: Recipe, params: PyTree, key: PRNGKeyArray, world: World, snapshots: int = 18, interval: int = 16
) -> tuple[Float[np.ndarray, "s n"], Float[np.ndarray, "t n"]]:
    """Losses of every sample along a run that is put back to its last state whenever it is found above the barrier.

    And the same at states near the barrier, where the screens must be right: those of the run, with their displacement
    from the minimum stretched. A few samples tell how far.
    """
    run, barrier = _compiled_pilot(recipe), float(world.barrier)
    origin = kept = recipe.start(params, float(world.learning_rate))
    losses_at, aim = _Stretched(recipe, origin[0], world), barrier
    met: list[np.ndarray] = []
    near: list[np.ndarray] = []
    step = 0
    for snapshot in range(4 * snapshots):
        end = step + (interval if snapshot else WARM_UP)
        state, step = run(kept, jnp.int32(step), jnp.int32(end), key, world), end
        losses, there = (np.asarray(found, dtype=np.float64) for found in losses_at(state[0], aim))
        level = losses.mean()
        if level <= 2 * barrier:
            met.append(losses)
            if barrier / 2 < there.mean() < 2 * barrier:
                near.append(there)
                aim *= np.sqrt(barrier / there.mean())
        if level <= barrier:
            kept = state
        if len(near) == snapshots:
            break
    samples = len(world.inputs)
    return np.asarray(met).reshape(len(met), samples), np.asarray(near).reshape(len(near), samples)


class _Stretched:
    """The losses of every sample at some parameters, and with their displacement from the origin stretched.

    By so much that the mean loss of ``PROBE`` samples, spread evenly over the data, is ``aim``. Where the first layer
    is a product with the inputs, it is made once for all and for the origin, being linear.
    """

    def __init__(self, recipe: Recipe, origin: PyTree, world: World) -> None:
        layer = first_layer(recipe.apply, origin, world.inputs)
        self._losses = _compiled_losses(recipe, layer)
        self._inputs: Array | Staircase = world.inputs
        self._targets = world.targets
        self._origin: tuple[PyTree, Array | None] = origin, None
        if layer is not None:
            stairs = Staircase.of(layer.rows(world.inputs))
            self._inputs, self._targets = stairs, world.targets[stairs.order]
            matrix, others = layer.take(origin)
            self._origin = others, stairs.times(matrix)

    def __call__(self, params: PyTree, aim: float) -> tuple[Array, Array]:
        return self._losses(self._origin, params, jnp.float32(aim), self._inputs, self._targets)


@lru_cache(maxsize=32)
def _compiled_losses(recipe: Recipe, layer: FirstLayer | None) -> Callable:
    stretches = jnp.geomspace(*STRETCHES, PROBED)

    def losses(
        origin: PyTree, params: PyTree, aim: Array, inputs: Array | Staircase, targets: Array
    ) -> tuple[Array, Array]:
        if isinstance(inputs, Staircase):
            assert layer is not None
            matrix, others = layer.take(params)
            here: tuple[PyTree, Array | None] = others, inputs.times(matrix)
        else:
            here = params, None

        def at(stretch: Array | float, chosen: Array | slice = slice(None)) -> Array:
            own, product = jax.tree.map(lambda start, end: start + stretch * (end - start), origin, here)
            if layer is None:
                assert not isinstance(inputs, Staircase)
                return sample_losses(recipe.apply, recipe.loss, own, inputs[chosen], targets[chosen])
            return jax.vmap(recipe.loss)(layer.rest(params, own, product[chosen]), targets[chosen])

        probe = jnp.linspace(0, len(targets) - 1, min(PROBE, len(targets))).astype(int)
        means = jax.lax.map(lambda stretch: jnp.mean(at(stretch, probe)), stretches)
        rising = jax.lax.cummax(jnp.where(jnp.isfinite(means), means, jnp.inf))
        stretch = jnp.interp(jnp.log(aim), jnp.log(rising), stretches)
        near, far = at(1.0), at(stretch)
        if isinstance(inputs, Staircase):
            near, far = (jnp.zeros_like(losses).at[inputs.order].set(losses) for losses in (near, far))
        return near, far

    return jax.jit(losses)


def subsample(
    typical: Float[np.ndarray, " n"], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, Float[np.ndarray, " m"]]:
    """``size`` samples drawn systematically with probability growing with their typical loss, and their weights.

    The weighted sum of their losses is an unbiased estimate of the mean loss (a fifth of the probability is uniform, so
    that no weight exceeds 5 / size).

    >>> indices, weights = subsample(np.ones(1000), 10, np.random.default_rng(0))
    >>> len(set(indices.tolist())), float(weights.sum())
    (10, 1.0)
    """
    order = rng.permutation(len(typical))
    probability = 0.8 * typical / typical.sum() + 0.2 / len(typical)
    position = (np.arange(size) + rng.uniform()) / size
    indices = order[np.minimum(np.searchsorted(np.cumsum(probability[order]), position), len(typical) - 1)]
    return indices, 1 / (size * len(typical) * probability[indices])


def choose_screens(
    losses: Float[np.ndarray, "s n"],
    at_barrier: Float[np.ndarray, "t n"],
    barrier: float,
    seed: int,
    *,
    gated: bool,
    forced: bool = False,
) -> Screens | None:
    """The pair of screen sizes of least expected cost, or None if exact looks are as cheap.

    The expected cost of an iteration, in sample evaluations, is ``m1 + P1 m2 + P12 N``, where P1 and P12 are the
    probabilities that one and both screens come near the barrier, given the losses met and the screens' spread.

    Args:
        losses: of every sample, at states that SGD visits.
        at_barrier: the same at states near the barrier.
        barrier: loss of escape.
        seed: of the draw of the subsamples.
        gated: a gate stands before the first screen.
        forced: choose the best pair even if exact looks are as cheap.
    """
    samples = losses.shape[1]
    if min(len(losses), len(at_barrier)) < FEWEST_SNAPSHOTS:
        return None
    log_full, full = np.log(losses.mean(1)), at_barrier.mean(1)
    typical = (at_barrier / full[:, None]).mean(0)
    climb = np.linspace(np.median(log_full), np.log(barrier), 20)
    rng = np.random.default_rng(seed)
    drawn = {}
    for size in sorted({size for size in FIRST_SIZES + SECOND_SIZES if size <= samples // 2}):
        indices, weights = subsample(typical, size, rng)
        error = np.log(full) - np.log(at_barrier[:, indices] @ weights)
        drawn[size] = indices, weights * np.exp(error.mean()), KICKED * max(float(np.std(error)), SMALLEST_SPREAD)
    usual = float(np.median([spread * np.sqrt(size) for size, (_, _, spread) in drawn.items()]))
    candidates = {}
    for size, (indices, weights, own) in drawn.items():
        spread = max(own, usual / np.sqrt(size))  # a lucky draw is not trusted
        met, climbing = (ndtr((logs - np.log(barrier)) / spread + SAFETY) for logs in (log_full, climb))
        near = np.concatenate([(1 - CLIMBING) * met / len(met), CLIMBING * climbing / len(climb)])
        candidates[size] = indices, weights, spread, near, np.concatenate([met, climbing])
    best, choice = float("inf") if forced else 0.5 * samples, None
    for first in sorted(candidates.keys() & set(FIRST_SIZES)):
        near_first = candidates[first][3]
        for second in sorted(size for size in candidates.keys() & set(SECOND_SIZES) if size > first):
            ask_second = FAR_LOOKS[1] + near_first.sum()
            ask_full = FAR_LOOKS[1] * FAR_LOOKS[2] + (near_first * candidates[second][4]).sum()
            cost = first + FIXED_COST + ask_second * (second + FIXED_COST) + ask_full * samples
            if cost < best:
                best, choice = cost, (first, second)
    if choice is None:
        return None
    (index1, weight1, spread1, *_), (index2, weight2, spread2, *_) = (candidates[size] for size in choice)
    return Screens((index1, index2), (weight1, weight2), (spread1, spread2), gated)
