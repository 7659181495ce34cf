"""The passage integrals on panels: what flows through each panel, in log space and at a cost linear in the nodes.

With ``y = x − 1``, ``v = log y`` and ``r = x^(−q)`` the inner integral of the mean passage time, seen from its upper limit, is

    ``B(v) = e^{Φ(v)} ∫_{−∞}^{v} ½ r e^{−Φ} dv'``,   ``Φ = ΔU_q/T − n v/2``,   ``τ h* = (1/T) ∫ B dy``,

that is ``B' = r/2 + Φ' B``. On a panel the mean of −Φ' is taken out where it is positive (the path is driven outwards, B is
slaved to its source and Φ may fall by hundreds) and the linear equation that is left, ``u' + a u = f``, is collocated at
Radau nodes with the integration matrix diagonalised once and for all, so that every panel costs four small matrix
products whatever a is. Where Φ rises a is zero and the rule is plain spectral quadrature with exact exponents. On the first
panel ``y B`` is integrated against ``y^(n/2−1)`` exactly, so that no dimension is special.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from escape_inference.passage_edges import Vector, panel_edges, start_length
from escape_inference.passage_potential import potential

PANELS = 12
NODES = 8
START_NODES = 12
LEAST_FLOW = 1e-12

Nodes = Float[Array, "node panel condition"]
StartNodes = Float[Array, "node condition"]
Flows = Float[Array, "panel condition"]


class Rule(NamedTuple):
    """Constants of one panel of unit length: right Radau nodes, and the integration matrix in its eigenvectors.

    For ``u' + a u = f``, ``u(0) = 0``: ``u = Re[from_modes (poles/(1 + a poles)) to_modes f]``, with one mode for each pair of
    conjugate poles; real and imaginary parts are stacked.
    """

    nodes: np.ndarray
    weights: np.ndarray
    integrate: np.ndarray
    poles: np.ndarray
    to_modes: np.ndarray
    from_modes: np.ndarray
    of_one: np.ndarray


class StartRule(NamedTuple):
    """Constants of the starting panel ``0 < y < 1``: Gauss nodes and the monomials, in which ``2 y u' + n u = f`` is diagonal."""

    nodes: np.ndarray
    weights: np.ndarray
    integrate: np.ndarray
    to_powers: np.ndarray
    from_powers: np.ndarray


def integration_matrix(x: np.ndarray) -> np.ndarray:
    """Integrals from −1 to each node, halved, of the polynomial through values at the nodes ``x`` in (−1, 1]."""
    degree = len(x)
    basis = np.polynomial.legendre.legvander(x, degree)
    order = np.arange(1, degree)
    higher = (basis[:, 2:] - basis[:, : degree - 1]) / (2 * (2 * order + 1))
    return np.column_stack([(x + 1) / 2, higher]) @ np.linalg.inv(basis[:, :degree])


def radau_rule(nodes: int) -> Rule:
    """The rule with an even number of nodes; the last one is the end of the panel.

    >>> rule = radau_rule(4)
    >>> float(rule.weights @ rule.nodes**6), float(rule.nodes[-1])
    (0.1428..., 1.0)
    """
    legendre = np.polynomial.legendre
    polynomial = np.zeros(nodes + 1)
    polynomial[nodes], polynomial[nodes - 1] = 1.0, -1.0
    x = np.sort(legendre.legroots(polynomial).real)
    for _ in range(3):
        x = x - legendre.legval(x, polynomial) / legendre.legval(x, legendre.legder(polynomial))
    x[-1] = 1.0
    integrate = integration_matrix(x)
    poles, vectors = np.linalg.eig(integrate)
    upper = poles.imag > 0
    modes = np.linalg.inv(vectors)[upper]
    back = 2 * vectors[:, upper]
    return Rule(
        nodes=(x + 1) / 2,
        weights=integrate[-1],
        integrate=integrate,
        poles=poles[upper],
        to_modes=np.concatenate([modes.real, modes.imag]),
        from_modes=np.concatenate([back.real, -back.imag], axis=1),
        of_one=modes @ np.ones(nodes),
    )


def start_rule(nodes: int) -> StartRule:
    """The rule of the starting panel; its weights integrate over the whole panel."""
    x, weights = np.polynomial.legendre.leggauss(nodes)
    powers = np.vander((x + 1) / 2, nodes, increasing=True)
    return StartRule((x + 1) / 2, weights / 2, integration_matrix(x), np.linalg.inv(powers), powers)


RULE = radau_rule(NODES)
START = start_rule(START_NODES)


class Grid(NamedTuple):
    """Panels, nodes and flows of some conditions, for the source 1.

    In panel k, ``B = e^{−δ} (B_in homogeneous + u)`` with ``−Φ = a ζ + δ`` (counted from the start of the panel, 0 ≤ ζ ≤ 1) and
    ``u' + a u = source``; ``kernel = e^{fall − δ}`` where ``fall ≤ 0`` is δ at the end of the panel if Φ rises and 0 otherwise.
    At the end ``B_out = e^{−fall} (passed B_in + emitted)``. ``log_entering[k]`` is log B at the start of panel k, the last one
    is log B at the threshold.
    """

    log_y: Nodes
    log_x: Nodes
    height: Nodes
    volume: Nodes
    source: Nodes
    kernel: Nodes
    gain_real: Nodes
    gain_imag: Nodes
    response: Nodes
    homogeneous: Nodes
    fall: Flows
    passed: Flows
    emitted: Flows
    log_entering: Flows
    start_log_x: StartNodes
    start_height: StartNodes
    start_source: StartNodes
    start_kernel: StartNodes
    start_gain: StartNodes
    start_response: StartNodes
    start_length: Vector
    start_scale: Vector
    first_edge: Vector


def along(matrix: np.ndarray, values: Array) -> Array:
    """The matrix applied along the first axis."""
    return jnp.tensordot(jnp.asarray(matrix, values.dtype), values, 1)


def amplify(gain_real: Nodes, gain_imag: Nodes, modes: Nodes) -> Nodes:
    """Complex product of the gains with modes whose real and imaginary parts are stacked."""
    real, imag = modes[: NODES // 2], modes[NODES // 2 :]
    return jnp.concatenate([gain_real * real - gain_imag * imag, gain_real * imag + gain_imag * real])


def back_amplify(grid: "Grid", modes: Nodes) -> Nodes:
    """The transpose of :func:`amplify`."""
    return amplify(grid.gain_real, -grid.gain_imag, modes)


def at_end(modes: Nodes) -> Flows:
    """``u`` at the end of the panels."""
    return jnp.tensordot(jnp.asarray(RULE.from_modes[-1], modes.dtype), modes, 1)


def build_grid(temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector) -> Grid:
    """Panels placed, their kernels and gains, and B at their edges.

    Args:
        temperature: T, positive.
        excess: c − 1, positive.
        dimension: n, positive.
        noise_exponent: q.
    """
    T, n, q = temperature, dimension, noise_exponent
    stretch = 1 - q
    # the panels stay where they are when the arguments change; only their end is the threshold
    held = jax.lax.stop_gradient((T, excess, n, q))
    first = start_length(*held)
    edges = jnp.concatenate([panel_edges(*held, panels=PANELS)[:-1], jnp.log(excess)[None]])

    # the starting panel, in y
    y = first * START.nodes[:, None]
    start_log_x = jnp.log1p(y)
    start_height = potential(start_log_x, q)
    first_log_x = jnp.log1p(first)
    first_height = potential(first_log_x, q) / T
    start_source = jnp.exp(-start_height / T) * (1 + stretch * start_height) / (1 + y)
    start_kernel = jnp.exp(start_height / T - first_height) * first * START.weights[:, None]
    start_gain = 1 / (n + 2 * jnp.arange(START_NODES)[:, None])
    start_response = start_gain * along(START.to_powers, start_source)
    log_start = jnp.log(jnp.sum(start_response, axis=0)) + first_height

    # the first edge, where B is slaved if it lies beyond the starting panel
    edge_x = jnp.log1p(jnp.exp(edges[0]))
    edge_height = potential(edge_x, q)
    edge_power = 1 + stretch * edge_height
    pull = 2 * jnp.exp(edges[0] - edge_x) * edge_power / T
    slaved = jnp.log(edge_power) - edge_x - jnp.log(jnp.maximum(n - pull, 1e-3))
    log_start = jnp.where(edges[0] > jnp.log(first), slaved, log_start)

    # the panels, in v = log y
    length = jnp.diff(edges, axis=0)
    zeta = RULE.nodes[:, None, None]
    log_y = edges[:-1] + length * zeta
    y = jnp.exp(log_y)
    log_x = jnp.log(1 + y)
    height = potential(log_x, q)
    before = jnp.concatenate([edge_height[None], height[-1, :-1]])
    end_drop = n / 2 * length - (height[-1] - before) / T
    before, rate, fall, half_length = jax.lax.optimization_barrier(
        (before, jnp.maximum(end_drop, 0.0), jnp.minimum(end_drop, 0.0), length / 2)
    )
    delta = jnp.minimum((n * half_length - rate) * zeta - (height - before) / T, 200.0)
    source = jnp.exp(delta) * (1 + stretch * height) / (1 + y) * half_length
    kernel = jnp.exp(fall - delta)
    volume = y * length * RULE.weights[:, None, None]
    poles = RULE.poles[:, None, None]
    real, imag = 1 + rate * poles.real, rate * poles.imag
    norm = 1 / (real * real + imag * imag)
    real, imag = real * norm, -imag * norm
    gain_real, gain_imag = real * poles.real - imag * poles.imag, real * poles.imag + imag * poles.real
    one = RULE.of_one[:, None, None]
    homogeneous = jnp.concatenate([real * one.real - imag * one.imag, real * one.imag + imag * one.real])
    response = amplify(gain_real, gain_imag, along(RULE.to_modes, source))
    passed, emitted = at_end(homogeneous), at_end(response)
    log_entering = [log_start]
    for k in range(PANELS):
        out = passed[k] + emitted[k] * jnp.exp(-log_entering[-1])
        log_entering.append(log_entering[-1] - fall[k] + jnp.log(jnp.maximum(out, LEAST_FLOW)))
    return Grid(
        log_y, log_x, height, volume, source, kernel, gain_real, gain_imag, response, homogeneous, fall, passed, emitted,
        jnp.stack(log_entering), start_log_x, start_height, start_source, start_kernel, start_gain, start_response,
        first, first_height, edges[0],
    )  # fmt: skip
