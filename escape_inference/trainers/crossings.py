"""Escape times of SGD over a known saddle.

At every look it is seen where each run is, by the rule of ``whereabouts.py``. Looks may be far apart, since a run that has crossed
stays away for long; the time is then known to the interval between two looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from escape_inference.errors import InputError
from escape_inference.trainers.burn_in import BurnIn
from escape_inference.trainers.engines import FEW_PARAMETERS
from escape_inference.trainers.escape import check_run
from escape_inference.trainers.looks import Tally
from escape_inference.trainers.losses import Apply, SampleLoss, check_problem, resolve_loss
from escape_inference.trainers.minimum import Minimum, Progress, parameters_of
from escape_inference.trainers.optimizers import OptimizerFactory
from escape_inference.trainers.process import BURN_IN_ROUNDS, UnstableMinimum
from escape_inference.trainers.record import Condition, EscapeRecord, Outcome, make_record
from escape_inference.trainers.rounds import Round
from escape_inference.trainers.saddle import SAFE
from escape_inference.trainers.sgd import Recipe, check_training, make_recipe, root_key, slot_key
from escape_inference.trainers.way_out import Exit
from escape_inference.trainers.whereabouts import AT_REST, CROSSED, ELSEWHERE, STAYED, Map, whereabouts


def measure_crossings(
    apply: Apply,
    minimum: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    way_out: Exit,
    *,
    learning_rate: float,
    batch_size: int,
    replicas: int,
    steps: int,
    check_interval: int = 100,
    start: str = "quasi_stationary",
    descent_steps: int = 500,
    optimizer: OptimizerFactory | optax.GradientTransformation | None = None,
    loss: str | SampleLoss = "mean_square",
    with_replacement: bool = True,
    seed: int = 0,
    burn_in: tuple[int, int] | None = None,
    hessian_minimum: float | None = None,
    run_prefix: str = "",
    progress: Progress | None = None,
) -> EscapeRecord:
    """Run replicas of SGD from a minimum and time how long they take to leave it over one saddle.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        minimum: a ``Minimum``, or a pytree of parameters; where the runs start.
        inputs: samples first.
        targets: samples first.
        way_out: a usable exit of this minimum, from ``find_exits``.
        learning_rate: eta, time units per iteration.
        batch_size: B, samples per gradient.
        replicas: runs side by side.
        steps: iterations of each replica, after the burn-in; rounded down to a multiple of ``check_interval``.
        check_interval: every so many iterations it is seen which runs have crossed.
        start: ``quasi_stationary`` (a run that left is replaced by a copy of a random survivor) or ``minimum``.
        descent_steps: most iterations of the descent that tells where a run is.
        optimizer: as in ``measure_escape``.
        loss: as in ``train_minimum``.
        with_replacement: as in ``measure_escape``.
        seed: random numbers are fixed by (seed, replica slot, iteration).
        burn_in: as in ``measure_escape``.
        hessian_minimum: h*, 1/time, for the rows.
        run_prefix: put before every ``run``.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Returns:
        The rows, with ``barrier`` "saddle", L^s, h^s and their errors, and how they were measured.

    Raises:
        UnstableMinimum: every replica left between the same two looks.
        InputError: an argument that cannot be used.

    Examples:
        >>> from escape_inference.trainers.exits import find_exits
        >>> loss = lambda f, y: (f[0]**4 / 4 - f[0]**2 / 2 + 0.02 * f[0] + 0.6)
        >>> problem = lambda theta, x: theta + x, jnp.full(1, -1.0), jnp.array([[-0.3], [0.3]]), jnp.zeros((2, 1))
        >>> found = find_exits(
        ...     *problem, loss=loss, images=7, path_iterations=100, learning_rates=[0.9], batch_size=1, loss_barrier=0.7,
        ...     runs=8, steps=300)
        >>> record = measure_crossings(
        ...     *problem, found.lowest, loss=loss, learning_rate=0.5, batch_size=1, replicas=16, steps=500,
        ...     check_interval=10)
        >>> record.escapes > 0, set(record.rows["barrier"])
        (True, {'saddle'})
    """
    began = time.perf_counter()
    sample_loss = resolve_loss(loss)
    params = parameters_of(minimum)
    inputs, targets = check_problem(apply, sample_loss, params, inputs, targets)
    check_training(learning_rate, batch_size, steps, len(inputs))
    check_run(start, "exact", replicas, steps, check_interval, None, burn_in, hessian_minimum)
    recipe = make_recipe(apply, sample_loss, optimizer, batch_size, with_replacement)
    level = float(jax.jit(recipe.mean_loss)(params, inputs, targets))
    loss_minimum = minimum.loss_minimum if isinstance(minimum, Minimum) else level
    saddle = way_out.saddle
    if not way_out.usable or not loss_minimum < saddle.loss_barrier:
        raise InputError(f"way_out: must be a usable exit with a saddle above the loss of the minimum. {way_out.note}")
    steps -= steps % check_interval
    height = saddle.loss_barrier - way_out.loss_home
    world = Map(
        home=jnp.asarray(way_out.home),
        beyond=jnp.asarray(way_out.beyond),
        saddle=ravel_pytree(parameters_of(saddle.params))[0],
        at_rest=jnp.float32(AT_REST * (2 * saddle.hessian_saddle * max(height, 0.0)) ** 0.5),
        rate=jnp.float32(SAFE / max(way_out.hessian_along, hessian_minimum or 0.0, saddle.hessian_saddle)),
        descent_steps=jnp.int32(descent_steps),
    )
    process = _Crossings(recipe, params, replicas, seed, learning_rate, start == "quasi_stationary", world)
    process.data, process.progress, process.steps = (inputs, targets), progress, steps
    burnt, settled = 0, True
    test: dict[str, float] = {}
    if process.replace:
        burnt, test, settled = process.burn_in(burn_in or (steps // 4, steps), check_interval)
    process.forget()
    process.measure(burnt, burnt + steps, check_interval)
    more = {
        "loss_barrier_se": saddle.loss_barrier_se,
        "hessian_saddle": saddle.hessian_saddle,
        "hessian_saddle_se": saddle.hessian_saddle_se,
    }
    condition = Condition(
        float(learning_rate),
        int(batch_size),
        int(check_interval),
        start,
        loss_minimum,
        saddle.loss_barrier,
        hessian_minimum,
        run_prefix,
        barrier="saddle",
        more=tuple(more.items()),
    )
    outcome = Outcome(
        process.rounds,
        replicas,
        burnt,
        burnt + steps,
        check_interval,
        1,
        None,
        test,
        settled,
        elsewhere=tuple(process.elsewhere),
    )
    return make_record(condition, outcome, time.perf_counter() - began)


class _Crossings:
    """Replicas that are advanced from look to look."""

    data: tuple[Array, Array]
    progress: Progress | None
    steps: int

    def __init__(
        self, recipe: Recipe, params: PyTree, replicas: int, seed: int, learning_rate: float, replace: bool, world: Map
    ) -> None:
        self.replace, self.replicas, self.seed, self.world = replace, replicas, seed, world
        self.rate = jnp.float32(learning_rate)
        self.slots = jnp.arange(replicas, dtype=jnp.uint32)
        one = recipe.start(params, learning_rate)
        self.states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (replicas, *jnp.shape(leaf))), one)
        self.alive = np.ones(replicas, bool)
        self.step = 0
        self.key = root_key(seed)
        few = sum(leaf.size for leaf in jax.tree.leaves(params)) <= FEW_PARAMETERS
        self._advance = _compiled_round(recipe, few)
        self.forget()

    def forget(self) -> None:
        """What was seen so far belongs to the burn-in."""
        self.rounds: list[Round] = []
        self.elsewhere: list[tuple[int, int]] = []

    def advance(self, end: int) -> Round:
        """Advance every replica to iteration ``end``, look, and replace those that have left."""
        steps = np.int32(self.step), np.int32(end)
        arguments = (self.slots, *steps, self.rate, self.key, self.world, *self.data)
        states, codes, losses = self._advance(self.states, *arguments)
        codes, losses, alive = np.asarray(codes), np.asarray(losses, float), self.alive.copy()
        gone = alive & (codes != STAYED)
        if self.replace and gone.all():
            elsewhere = int((codes == ELSEWHERE).sum())
            raise UnstableMinimum(
                f"at learning rate {float(self.rate):g} every replica had left by iteration {end}, {elsewhere} of "
                f"{self.replicas} by another way than over the saddle: there is no escape rate. Lower the learning rate, "
                "or look more often (check_interval)."
            )
        self.elsewhere += [(end, int(slot)) for slot in np.flatnonzero(gone & (codes == ELSEWHERE))]
        if self.replace and gone.any():
            donors = np.arange(self.replicas)
            generator = np.random.default_rng([self.seed, end])
            donors[gone] = generator.choice(np.flatnonzero(~gone), size=int(gone.sum()))
            states = _copies(states, donors)
        elif not self.replace:
            self.alive = alive & ~gone
        self.states, self.step = states, end
        return Round(
            escapes=[(end, int(slot)) for slot in np.flatnonzero(gone & (codes == CROSSED))],
            tally=_tally(losses, alive),
            records=_records(end, losses, alive),
        )

    def burn_in(self, limits: tuple[int, int], check_interval: int) -> tuple[int, dict[str, float], bool]:
        """Advance until the replicas have settled; iterations used, the tests, and whether they passed."""
        least, most = (-(-limit // check_interval) * check_interval for limit in limits)
        record, tested = BurnIn(), most // BURN_IN_ROUNDS
        until = tested
        while self.step < most:
            end = self.step + check_interval
            record.add(end, self.advance(end))
            if end >= until:
                until = end + tested
                self._tell(0, f"burn-in, iteration {end} of at most {most}")
                if end >= least and record.settled():
                    break
        return self.step, record.test(), record.settled()

    def measure(self, begin: int, end: int, check_interval: int) -> None:
        """Advance to iteration ``end``, keeping every round."""
        escapes = 0
        while self.step < end and self.alive.any():
            self.rounds.append(self.advance(self.step + check_interval))
            escapes += len(self.rounds[-1].escapes)
            self._tell(self.step - begin, f"{escapes} escapes")
        self._tell(self.steps, f"{escapes} escapes")

    def _tell(self, done: int, message: str) -> None:
        if self.progress:
            self.progress(done, self.steps, message)


@jax.jit
def _copies(states: PyTree, donors: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[donors], states)


@lru_cache(maxsize=32)
def _compiled_round(recipe: Recipe, together: bool) -> Callable:
    """``-> (states, codes, losses)`` of all replicas at iteration ``end``, side by side or one after another."""

    def round_(
        states: PyTree, slots: Array, begin: Array, end: Array, rate: Array, key: PRNGKeyArray, world: Map,
        inputs: Array, targets: Array,
    ) -> tuple[PyTree, Array, Array]:  # fmt: skip
        samples = inputs.shape[0]

        def one(state: PyTree, slot: Array) -> tuple[PyTree, Array, Array]:
            stream = slot_key(key, slot)

            def body(carry: tuple) -> tuple:
                state, step, order = carry
                step = step + 1
                order = recipe.renew(order, stream, step, samples)
                indices, _ = recipe.draw(stream, step, order, samples)
                return recipe.step(state, rate, inputs, targets, indices, stream, step)[0], step, order

            carry = (state, begin, recipe.order(stream, begin + 1, samples))
            state = jax.lax.while_loop(lambda carry: carry[1] < end, body, carry)[0]
            point, unravel = ravel_pytree(state[0])

            def level(at: Array) -> Array:
                return recipe.mean_loss(unravel(at), inputs, targets)

            return state, whereabouts(level, point, world), level(point)

        if together:
            return jax.vmap(one)(states, slots)
        return jax.lax.map(lambda pair: one(*pair), (states, slots))

    return jax.jit(round_)


def _tally(losses: np.ndarray, alive: np.ndarray) -> Tally:
    """The sums that the burn-in tests, of one look at every replica."""
    usable = alive & np.isfinite(losses) & (losses > 0)
    logs = np.log(losses, out=np.zeros_like(losses), where=usable)
    values: dict[str, Any] = dict.fromkeys(Tally._fields, np.zeros(losses.shape))
    values |= {
        "looks": alive.astype(int),
        "estimates": usable.astype(int),
        "log_loss": logs,
        "log_loss_square": logs**2,
    }
    return Tally(**values)


def _records(step: int, losses: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The looks at the living replicas, as ``looks.RECORD`` orders them."""
    slots = np.flatnonzero(alive)
    level, none = losses[slots], np.full(len(slots), np.nan)
    return np.stack([np.full(len(slots), step), slots, none, level, level, level, np.ones(len(slots))], axis=1)
