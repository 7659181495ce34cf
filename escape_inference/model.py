"""The NumPyro model: priors of a law, latent settings, one observed site with one element for each condition.

:func:`build_inputs` turns conditions into arrays once; :func:`escape_model` is the model; :func:`evaluate` gives its log prior, its
log-likelihood and its derived quantities at a point of unconstrained space, which is all that the samplers need.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from threading import RLock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pandas as pd
from jaxtyping import Array, Float, Int
from numpyro import distributions as dist
from numpyro import handlers
from scipy import special

from escape_inference.conditions import Conditions
from escape_inference.law import Law, Setting, typical_curvature
from escape_inference.likelihood import EscapeCounts, Observations
from escape_inference.passage_table import PassageTable
from escape_inference.surrogate import Surrogate
from escape_inference.waiting import GammaLikelihood

MEAN_DISCREPANCY = 0.5
LEAST_DISCREPANCY = 1e-6
MEAN_SPREAD = 0.3  #: of a pooled parameter between minima, on the logarithm
POOLED = ("temperature_scale", "effective_dimension", "log_prefactor")
BARRIER_FLOOR = 0.02
LOWEST_BARRIER = -15.0  #: in units of the floor; a barrier lower still would be none at all, with an infinite gradient
MINIMUM_QUANTITIES = ("loss_minimum", "hessian_minimum", "effective_dimension")
LEVEL_QUANTITIES = ("loss_barrier", "hessian_saddle")
_ONE_TRACE = RLock()  # NumPyro's stack of effect handlers is one for all threads


class PriorWidths(NamedTuple):
    """Factors on the standard deviations of the priors of the parameters and on the mean of the discrepancy's prior."""

    parameters: Float[Any, ""] = 1.0
    discrepancy: Float[Any, ""] = 1.0

    def as_arrays(self) -> "PriorWidths":
        """The same as arrays, so that other values compile nothing new."""
        return PriorWidths(np.asarray(self.parameters, float), np.asarray(self.discrepancy, float))


DEFAULT_WIDTHS = PriorWidths()


class Measured(NamedTuple):
    """Log-normal knowledge of one quantity: centre and spread of its logarithm, and which entries are latent."""

    center: Float[Any, " item"]
    spread: Float[Any, " item"]
    latent: Int[Any, " latent"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Settings of the conditions as arrays, sorted by kind of barrier and start (``groups``)."""

    learning_rate: Float[Any, " condition"]
    batch_size: Float[Any, " condition"]
    check_interval: Float[Any, " condition"]
    minimum: Int[Any, " condition"]
    level: Int[Any, " condition"]
    level_minimum: Int[Any, " level"]
    measured: dict[str, Measured]
    dimension_measured: Any
    medians: dict[str, Float[Any, ""]]
    groups: tuple[tuple[str, str, int, int], ...] = field(metadata={"static": True})
    dimension_carried: str = field(metadata={"static": True})
    surrogate: Surrogate | None = None
    passage: dict[str, PassageTable] | None = None
    pooled: tuple[str, ...] = field(metadata={"static": True}, default=())

    @property
    def barriers(self) -> set[str]:
        """The kinds of barrier that occur."""
        return {group[0] for group in self.groups}


def sort_conditions(conditions: Conditions) -> Conditions:
    """The same conditions, grouped by kind of barrier and start."""
    order = conditions.frame.sort_values(["barrier", "start"], kind="stable").index.to_numpy()
    return conditions.select(order)


def build_inputs(law: Law, conditions: Conditions, pooling: str = "complete") -> Inputs:
    """Arrays of the settings, and what is known of each minimum and barrier, from sorted conditions.

    With ``partial`` pooling temperature scale, n (where it is not measured) and prefactor have a value for each minimum, log-normal around
    a population value with an inferred spread; with ``complete`` pooling one value for all minima.

    Empty values are latent with wide log-normal priors: h* around the typical h* of the table (0.2 / median learning rate if there
    is none) with log-sd 1.5; L* a factor e below its lowest barrier with log-sd 1 (1 with log-sd 2 if no barrier is known); L^s a
    factor e above L*, log-sd 1; h^s around h*, log-sd 1; n has the prior of the law.
    """
    frame = conditions.frame
    minima = pd.Index(conditions.minima)
    minimum = minima.get_indexer(pd.Index(frame["minimum"]))
    keys = ["minimum", "barrier", "loss_barrier", "loss_barrier_se", "hessian_saddle", "hessian_saddle_se"]
    level = frame.groupby(keys, dropna=False, sort=False).ngroup().to_numpy()
    first_of_minimum = frame.iloc[np.unique(minimum, return_index=True)[1]]
    first_of_level = frame.iloc[np.unique(level, return_index=True)[1]]
    level_minimum = minima.get_indexer(pd.Index(first_of_level["minimum"]))

    measured = {}
    h_default = np.full(len(minima), np.log(typical_curvature(frame)))
    measured["hessian_minimum"] = _measured(first_of_minimum, "hessian_minimum", h_default, 1.5)
    barrier_log = np.log(first_of_level["loss_barrier"].to_numpy(float))
    lowest = pd.Series(barrier_log).groupby(level_minimum).min().reindex(range(len(minima))).to_numpy()
    l_default, l_width = np.where(np.isfinite(lowest), lowest - 1.0, 0.0), np.where(np.isfinite(lowest), 1.0, 2.0)
    measured["loss_minimum"] = _measured(first_of_minimum, "loss_minimum", l_default, l_width)
    measured["loss_barrier"] = _measured(
        first_of_level, "loss_barrier", measured["loss_minimum"].center[level_minimum] + 1.0, 1.0
    )
    h_level = measured["hessian_minimum"].center[level_minimum]
    saddle = _measured(first_of_level, "hessian_saddle", h_level, 1.0)
    is_threshold = (first_of_level["barrier"] == "threshold").to_numpy()
    measured["hessian_saddle"] = Measured(
        np.where(is_threshold, h_level, saddle.center),
        np.where(is_threshold, 0.0, saddle.spread),
        saddle.latent[~is_threshold[saddle.latent]],
    )
    dimension = _measured(first_of_minimum, "effective_dimension", np.zeros(len(minima)), 0.0)
    known = first_of_minimum["effective_dimension"].notna().to_numpy()
    measured["effective_dimension"] = dimension
    uses_dimension = any(p.name == "effective_dimension" for p in law.parameters_for(set(frame["barrier"])))
    carried = "none" if not (uses_dimension and known.any()) else "all" if known.all() else "some"

    groups, kinds = [], list(zip(frame["barrier"], frame["start"], strict=True))
    for kind in dict.fromkeys(kinds):
        where = [i for i, other in enumerate(kinds) if other == kind]
        groups.append((*kind, where[0], where[-1] + 1))
    parameters = law.parameters_for(set(frame["barrier"]))
    sampled = {p.name for p in parameters if p.positive} - ({"effective_dimension"} if carried != "none" else set())
    pooled = POOLED if pooling == "partial" and len(minima) > 1 else ()
    return Inputs(
        learning_rate=frame["learning_rate"].to_numpy(float),
        batch_size=frame["batch_size"].to_numpy(float),
        check_interval=frame["check_interval"].to_numpy(float),
        minimum=minimum,
        level=level,
        level_minimum=level_minimum,
        measured=measured,
        dimension_measured=known,
        medians={p.name: np.asarray(p.median_for(frame)) for p in parameters},
        groups=tuple(groups),
        dimension_carried=carried,
        pooled=tuple(name for name in pooled if name in sampled or name == "log_prefactor"),
    )


def build_observations(conditions: Conditions, waiting: Mapping[int, GammaLikelihood]) -> Observations:
    """Counts of sorted conditions, and the tabulated Gamma likelihood of the delayed ones (by position)."""
    frame = conditions.frame
    index, tables = np.array(list(waiting), dtype=int), list(waiting.values())
    width = frame["look_width"].to_numpy(float)
    escapes = frame["escapes"].to_numpy(float)
    values = np.array([t.log_likelihood for t in tables]).reshape(len(tables), -1 if tables else 4)
    twins = [_exponential_twin(t.log_rate, t.log_likelihood) for t in tables]
    return Observations(
        escapes=escapes,
        looks=frame["exposure_before"].to_numpy(float) / width + escapes,
        look_width=width,
        weight=np.ones(len(frame)),
        delayed=index,
        table_start=np.array([t.log_rate[0] for t in tables]),
        table_step=np.array([t.log_rate[1] - t.log_rate[0] for t in tables]),
        table_values=values,
        table_escapes=np.array([t[0] for t in twins]),
        table_exposure=np.array([t[1] for t in twins]),
    )


def parameter_values(
    law: Law, inputs: Inputs, widths: PriorWidths
) -> tuple[dict[str, Array], Float[Array, ""], Float[Array, ""]]:
    """Sample the law's own parameters, the log prefactor and the discrepancy σ.

    σ has an exponential prior of mean 0.5 (a factor of 1.6), sampled through a standard normal variable so that its
    neighbourhood of zero is as easy for the sampler as the rest.
    """
    values = {}
    for p in law.parameters_for(inputs.barriers):
        if p.name == "effective_dimension" and inputs.dimension_carried == "all":
            continue
        some = p.name == "effective_dimension" and inputs.dimension_carried == "some"
        name = "effective_dimension_unmeasured" if some else p.name
        values[p.name] = numpyro.sample(name, p.prior(inputs.medians[p.name], widths.parameters))
    log_prefactor = numpyro.sample("log_prefactor", dist.Normal(0.0, 1.0 * widths.parameters))
    base = numpyro.sample("discrepancy_base", dist.Normal(0.0, 1.0))
    return values, log_prefactor, numpyro.deterministic("discrepancy", discrepancy_of(base, widths.discrepancy))


def by_minimum(name: str, value: Array, inputs: Inputs, positive: bool) -> Array:
    """The value of a parameter at every condition: its own, or that of the minimum, with an inferred spread between minima.

    The spread has an exponential prior of mean 0.3; the minima are standard normal latents, so that few data make no funnel.
    """
    if name not in inputs.pooled:
        return value
    spread = numpyro.sample(f"{name}_spread", dist.Exponential(1 / MEAN_SPREAD))
    size = inputs.measured["loss_minimum"].center.shape[0]
    base = numpyro.sample(f"{name}_minimum_base", dist.Normal(jnp.zeros(size), 1.0).to_event(1))
    each = value * jnp.exp(spread * base) if positive else value + spread * base
    return numpyro.deterministic(f"{name}_by_minimum", each)[inputs.minimum]


def discrepancy_of(base: Float[Any, "..."], width: Float[Any, ""] | float = 1.0) -> Float[Any, "..."]:
    """σ, exponential with mean 0.5 · ``width``, from a standard normal variable; in JAX or, for a NumPy array, in NumPy."""
    if isinstance(base, np.ndarray):  # operation by operation JAX would compile dozens of programs
        return np.maximum(-MEAN_DISCREPANCY * np.asarray(width) * special.log_ndtr(-base), LEAST_DISCREPANCY)
    return jnp.maximum(-MEAN_DISCREPANCY * width * jax.scipy.special.log_ndtr(-base), LEAST_DISCREPANCY)


def latent_log(name: str, measured: Measured) -> Float[Array, " item"]:
    """Logarithm of a measured quantity; entries with an error, or empty ones, are standard-normal latents ``<name>_base``."""
    if measured.latent.shape[0] == 0:
        return jnp.asarray(measured.center)
    size = measured.latent.shape[0]
    base = numpyro.sample(f"{name}_base", dist.Normal(jnp.zeros(size), 1.0).to_event(1))
    return jnp.asarray(measured.center).at[measured.latent].add(jnp.asarray(measured.spread)[measured.latent] * base)


def escape_model(law: Law, inputs: Inputs, observed: Observations, widths: PriorWidths = DEFAULT_WIDTHS) -> None:
    """The NumPyro model of a law.

    Args:
        law: the law.
        inputs: settings of the conditions.
        observed: what was seen; its ``escapes`` are the observed values.
        widths: factors on the widths of the priors.
    """
    values, log_prefactor, discrepancy = parameter_values(law, inputs, widths)
    values = {name: by_minimum(name, value, inputs, positive=True) for name, value in values.items()}
    log_prefactor = by_minimum("log_prefactor", log_prefactor, inputs, positive=False)
    logs = {name: latent_log(name, inputs.measured[name]) for name in (*MINIMUM_QUANTITIES[:2], *LEVEL_QUANTITIES)}
    log_barrier = logs["loss_barrier"] - logs["loss_minimum"][inputs.level_minimum]
    if inputs.measured["loss_minimum"].latent.shape[0] or inputs.measured["loss_barrier"].latent.shape[0]:
        log_barrier = BARRIER_FLOOR * jax.nn.softplus(jnp.maximum(log_barrier / BARRIER_FLOOR, LOWEST_BARRIER))
    if inputs.dimension_carried != "none":
        dimension = jnp.exp(latent_log("effective_dimension", inputs.measured["effective_dimension"]))
        if inputs.dimension_carried == "some":
            dimension = jnp.where(inputs.dimension_measured, dimension, values["effective_dimension"])
        values["effective_dimension"] = numpyro.deterministic("effective_dimension", dimension)[inputs.minimum]
    for name in MINIMUM_QUANTITIES[:2]:
        if inputs.measured[name].latent.shape[0]:
            numpyro.deterministic(name, jnp.exp(logs[name]))
    if inputs.measured["hessian_saddle"].latent.shape[0]:
        numpyro.deterministic("hessian_saddle", jnp.exp(logs["hessian_saddle"])[inputs.level])

    temperatures, rates = [], []
    for part, setting in _settings(inputs, logs, log_barrier):
        here = {name: value[part] if jnp.ndim(value) else value for name, value in values.items()}
        shape = (part.stop - part.start,)
        temperatures.append(jnp.broadcast_to(law.temperature(here, setting), shape))
        if inputs.surrogate is None:
            rates.append(jnp.broadcast_to(law.log_rate(here, setting), shape))
    numpyro.deterministic("temperature", jnp.concatenate(temperatures))
    numpyro.deterministic("log_barrier", log_barrier[inputs.level])
    law_rate = jnp.concatenate(rates) if inputs.surrogate is None else inputs.surrogate(values)
    log_rate = numpyro.deterministic("log_rate", law_rate + log_prefactor)
    with numpyro.plate("condition", log_rate.shape[0]), handlers.mask(mask=observed.weight > 0):
        numpyro.sample("escapes", EscapeCounts(log_rate, discrepancy, observed), obs=observed.escapes)


def known_settings(inputs: Inputs) -> Iterator[tuple[slice, Setting, dict[str, Array]]]:
    """Conditions of one kind after the other, with what the data carry of n, where every setting is known without error.

    In JAX or, for inputs of NumPy arrays, in NumPy.
    """
    numpy = np if isinstance(inputs.learning_rate, np.ndarray) else jnp
    names = (*MINIMUM_QUANTITIES[:2], *LEVEL_QUANTITIES)
    logs = {name: numpy.asarray(inputs.measured[name].center) for name in names}
    dimension = numpy.exp(numpy.asarray(inputs.measured["effective_dimension"].center))[inputs.minimum]
    log_barrier = logs["loss_barrier"] - logs["loss_minimum"][inputs.level_minimum]
    for part, setting in _settings(inputs, logs, log_barrier, numpy):
        yield part, setting, {"effective_dimension": dimension[part]} if inputs.dimension_carried == "all" else {}


def _settings(
    inputs: Inputs, logs: Mapping[str, Array], log_barrier: Array, numpy: Any = jnp
) -> Iterator[tuple[slice, Setting]]:
    for barrier, start, first, last in inputs.groups:
        part = slice(first, last)
        yield (
            part,
            Setting(
                learning_rate=numpy.asarray(inputs.learning_rate[part]),
                batch_size=numpy.asarray(inputs.batch_size[part]),
                check_interval=numpy.asarray(inputs.check_interval[part]),
                loss_minimum=numpy.exp(logs["loss_minimum"])[inputs.minimum[part]],
                log_barrier=log_barrier[inputs.level[part]],
                hessian_minimum=numpy.exp(logs["hessian_minimum"])[inputs.minimum[part]],
                hessian_saddle=numpy.exp(logs["hessian_saddle"])[inputs.level[part]],
                barrier=barrier,  # type: ignore[arg-type]
                start=start,  # type: ignore[arg-type]
                passage=(inputs.passage or {}).get(start) if barrier == "threshold" else None,
            ),
        )


class Evaluation(NamedTuple):
    """The model at one point of unconstrained space: log prior (Jacobian included), log-likelihoods, named values."""

    log_prior: Float[Any, ""]
    log_likelihood: Float[Any, " condition"]
    sites: dict[str, Any]


def site_shapes(law: Law, inputs: Inputs, observed: Observations) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of every sampled site and whether it is positive, in the order of the unconstrained vector."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    law = replace(
        law, log_rate=not_evaluated, temperature=not_evaluated
    )  # no site depends on them, and tracing integrals takes long

    def look(inputs: Inputs, observed: Observations) -> None:
        with _ONE_TRACE:
            trace = handlers.trace(handlers.seed(escape_model, jax.random.key(0))).get_trace(law, inputs, observed)
        for name, site in trace.items():
            if site["type"] == "sample" and not site["is_observed"]:
                found[name] = (jnp.shape(site["value"]), site["fn"].support is dist.constraints.positive)

    jax.eval_shape(look, inputs, observed)  # shapes only: no law is evaluated
    return found


def not_evaluated(*_: Any) -> Array:
    """Stands in for a law's formulas where they do not matter."""
    return jnp.zeros(())


def unpack(
    z: Float[Array, " dim"], shapes: Mapping[str, tuple[tuple[int, ...], bool]]
) -> tuple[dict[str, Array], Array]:
    """Named constrained values of an unconstrained vector, and the log Jacobian of the map."""
    values, position, log_jacobian = {}, 0, jnp.zeros(())
    for name, (shape, positive) in shapes.items():
        size = int(np.prod(shape))
        part = z[position : position + size].reshape(shape)
        values[name] = jnp.exp(part) if positive else part
        log_jacobian += jnp.sum(part) if positive else 0.0
        position += size
    return values, log_jacobian


def evaluate(
    z: Float[Array, " dim"],
    law: Law,
    shapes: Mapping[str, tuple[tuple[int, ...], bool]],
    inputs: Inputs,
    observed: Observations,
    widths: PriorWidths = DEFAULT_WIDTHS,
) -> Evaluation:
    """Log prior and log-likelihoods at an unconstrained point (weights not applied to the latter)."""
    trace, log_prior = _trace(z, law, shapes, inputs, observed, widths)
    for name in shapes:
        log_prior += jnp.sum(trace[name]["fn"].log_prob(trace[name]["value"]))
    site = trace["escapes"]["fn"]
    base = site.base_dist if hasattr(site, "base_dist") else site
    return Evaluation(log_prior, base.log_prob(observed.escapes), _named(trace, shapes))


def named_values(
    z: Float[Array, " dim"],
    law: Law,
    shapes: Mapping[str, tuple[tuple[int, ...], bool]],
    inputs: Inputs,
    observed: Observations,
    widths: PriorWidths = DEFAULT_WIDTHS,
) -> dict[str, Any]:
    """The named values of :func:`evaluate` alone; ``log_rate`` and ``discrepancy`` are all that the likelihood needs."""
    return _named(_trace(z, law, shapes, inputs, observed, widths)[0], shapes)


def _trace(
    z: Array, law: Law, shapes: Mapping[str, Any], inputs: Inputs, observed: Observations, widths: PriorWidths
) -> tuple[dict[str, Any], Array]:
    """The sites of the model at an unconstrained point, and the log Jacobian."""
    values, log_jacobian = unpack(z, shapes)
    with _ONE_TRACE:
        trace = handlers.trace(handlers.substitute(escape_model, data=values)).get_trace(law, inputs, observed, widths)
    return trace, log_jacobian


def _named(trace: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {k: s["value"] for k, s in trace.items() if s["type"] == "deterministic" or k in shapes}


@partial(jax.jit, static_argnames=("law", "count"))
def sample_prior(
    key: Array, law: Law, inputs: Inputs, observed: Observations, count: int, widths: PriorWidths = DEFAULT_WIDTHS
) -> Float[Array, "count dim"]:
    """Draws from the prior in unconstrained space."""
    shapes = site_shapes(law, inputs, observed)

    def one(key: Array) -> Array:
        model = handlers.block(handlers.seed(escape_model, key), hide=["escapes"])
        with _ONE_TRACE:
            trace = handlers.trace(model).get_trace(law, inputs, observed, widths)
        parts = [jnp.log(trace[k]["value"]) if positive else trace[k]["value"] for k, (_, positive) in shapes.items()]
        return jnp.concatenate([jnp.ravel(part) for part in parts])

    return jax.vmap(one)(jax.random.split(key, count))


def _measured(frame: pd.DataFrame, name: str, default: np.ndarray, width: np.ndarray | float) -> Measured:
    value, error = frame[name].to_numpy(float), frame[f"{name}_se"].fillna(0.0).to_numpy(float)
    missing = np.isnan(value)
    spread = np.where(missing, width, error / np.where(missing, 1.0, value))
    center = np.where(missing, default, np.log(np.where(missing, 1.0, value)))
    return Measured(center, spread, np.flatnonzero(spread > 0))


def _exponential_twin(log_rate: np.ndarray, log_likelihood: np.ndarray) -> tuple[float, float]:
    """Escapes and exposure of the exponential likelihood with the maximum and the curvature of a tabulated one."""
    top = int(np.clip(np.argmax(log_likelihood), 2, len(log_rate) - 3))
    step = log_rate[1] - log_rate[0]
    a, b, c = log_likelihood[top - 1 : top + 2]
    bend = (2 * b - a - c) / step**2
    peak = log_rate[top] + 0.5 * step * (c - a) / (2 * b - a - c)
    return float(bend), float(bend / np.exp(peak))
