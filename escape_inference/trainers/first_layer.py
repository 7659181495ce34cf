"""Networks whose inputs enter through one product with one matrix of weights, taken apart at that product.

The first layer often has most of the weights, and the inputs are known in advance. Where ``apply(params, inputs)`` uses
the inputs only in ``inputs @ W`` (or ``W @ x`` for each sample), and W nowhere else, it is ``rest(others, inputs @ W)``,
and both the product and its changes can be computed in better ways than by repeating it. The product is looked for in
the traced program, so any network may have it, the user's own too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array, Float, Int, PyTree

from escape_inference.trainers.losses import Apply

CALLS = ("jit", "pjit", "closed_call")
"""Equations that hold a program which may be written out in their place."""
VIEWS = ("transpose", "reshape", "squeeze")
"""Equations that only arrange the entries of an array anew."""
EMPTY = jax.make_jaxpr(lambda: ())().jaxpr
"""Lends its description to programs of one equation, which JAX asks for."""
WHOLE = 16
"""The number of used columns is made a multiple of this with some that are not, as products are then quicker."""
PARTS, FULL = 4, 0.95
"""Parts of the samples of which each has its own number of columns; they are not parted if a larger share remains."""


@dataclass(frozen=True)
class FirstLayer:
    """A network taken apart; made by ``first_layer``.

    The matrix is always [inputs, outputs], and only its rows of the ``used`` columns of the inputs: the others meet
    zeros in every sample, so that plain SGD never moves them.

    Attributes:
        apply: the network.
        samples: number of the inputs it was made for.
        shape: of one sample.
        dtype: of the inputs.
        used: columns of the flattened inputs that are not zero in every sample, and a few more; those that are zero
            most often are last.
    """

    apply: Apply
    samples: int
    shape: tuple[int, ...]
    dtype: np.dtype
    used: tuple[int, ...]

    def _split(self, structure: Any, leaves: Sequence[Any], batch: int) -> _Split:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        split = _split(self.apply, structure, shapes, (batch, *self.shape), self.dtype, _double())
        assert split is not None
        return split

    def take(self, params: PyTree) -> tuple[Float[Array, "inputs outputs"], PyTree]:
        """The used rows of the matrix, and the other parameters."""
        leaves, structure = jax.tree.flatten(params)
        split = self._split(structure, leaves, self.samples)
        matrix = split.matrix(leaves[split.leaf])
        others = jax.tree.unflatten(structure, [*leaves[: split.leaf], None, *leaves[split.leaf + 1 :]])
        return matrix[jnp.asarray(self.used)], others

    def put(self, params: PyTree, matrix: Float[Array, "inputs outputs"], others: PyTree) -> PyTree:
        """The inverse of ``take``; the rows that are not used are those of ``params``."""
        leaves, structure = jax.tree.flatten(params)
        split = self._split(structure, leaves, self.samples)
        whole = split.matrix(leaves[split.leaf])
        place = np.full(len(whole), -1)
        place[list(self.used)] = np.arange(len(self.used))
        whole = jnp.where((place >= 0)[:, None], matrix[np.maximum(place, 0)], whole)
        rest = jax.tree.leaves(others)
        return jax.tree.unflatten(
            structure, [*rest[: split.leaf], split.as_leaf(whole, leaves[split.leaf]), *rest[split.leaf :]]
        )

    def rows(self, inputs: Float[Array, "n ..."]) -> Float[Array, "n inputs"]:
        """The used columns of the inputs."""
        flat = inputs.reshape(len(inputs), -1)
        return flat if self.used == tuple(range(flat.shape[1])) else flat[:, jnp.asarray(self.used)]

    def rest(self, params: PyTree, others: PyTree, product: Float[Array, "batch outputs"]) -> Array:
        """Predictions from ``rows(inputs) @ matrix`` and the other parameters (of ``params``, only shapes count)."""
        leaves, structure = jax.tree.flatten(params)
        return self._split(structure, leaves, len(product)).rest(jax.tree.leaves(others), product)


def first_layer(apply: Apply, params: PyTree, inputs: Float[Array, "n ..."]) -> FirstLayer | None:
    """The network taken apart at the product with its inputs; None if it has another form.

    >>> params = {"a": jnp.ones((40, 3)), "b": jnp.ones(3)}
    >>> len(first_layer(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.eye(20, 40)).used)
    32
    >>> first_layer(lambda p, x: x**2 @ p, jnp.ones(3), jnp.eye(3)) is None
    True
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    samples, dtype = len(inputs), np.dtype(inputs.dtype)
    for size in (1, 2, samples):  # the traced program of a single sample may be another one
        if _split(apply, structure, shapes, (size, *inputs.shape[1:]), dtype, _double()) is None:
            return None
    often = np.count_nonzero(np.asarray(inputs).reshape(samples, -1), axis=0)
    columns = np.argsort(-often, kind="stable")[: _whole(int(np.count_nonzero(often)))]
    return FirstLayer(apply, samples, inputs.shape[1:], dtype, tuple(columns.tolist()))


def _whole(columns: int) -> int:
    return -(-columns // WHOLE) * WHOLE


class Staircase(NamedTuple):
    """The rows of all samples, so sorted that the columns behind those of each part are zero there.

    Many inputs are zero in the same places of many samples (the margins of images), and their products need not be made.

    >>> stairs = Staircase.of(jnp.eye(8, 64) + jnp.eye(8, 64, k=40))
    >>> [part.shape for part in stairs.parts], stairs.order.tolist()
    ([(2, 48), (2, 48), (2, 48), (2, 48)], [0, 1, 2, 3, 4, 5, 6, 7])
    """

    parts: tuple[Float[Array, "samples columns"], ...]
    order: Int[Array, " n"]

    @classmethod
    def of(cls, rows: Float[Array, "n inputs"]) -> Staircase:
        """Sort rows whose columns are already sorted."""
        place = np.arange(1, rows.shape[1] + 1, dtype=np.int32)
        last = np.max(place * (np.asarray(rows) != 0), axis=1)
        order = np.argsort(last, kind="stable")
        parts = [part for part in np.array_split(order, PARTS) if len(part)]
        widths = [min(max(_whole(int(last[part[-1]])), 1), rows.shape[1]) for part in parts]
        if sum(len(part) * width for part, width in zip(parts, widths, strict=True)) > FULL * rows.size:
            return cls((rows,), jnp.arange(len(rows)))
        return cls(tuple(rows[part, :width] for part, width in zip(parts, widths, strict=True)), jnp.asarray(order))

    def times(self, matrix: Float[Array, "inputs outputs"]) -> Float[Array, "n outputs"]:
        """Products of all samples, in the order of ``order``."""
        return jnp.concatenate([part @ matrix[: part.shape[1]] for part in self.parts])


@dataclass(frozen=True)
class OnRows:
    """A network whose inputs are the rows of a ``Staircase`` in its order; its parameters are the same.

    Attributes:
        layer: the network taken apart.
        parts: samples and columns of each part.
    """

    layer: FirstLayer
    parts: tuple[tuple[int, int], ...]

    def __call__(self, params: PyTree, rows: Float[Array, "n inputs"]) -> Array:
        matrix, others = self.layer.take(params)
        across = (((1,), (1,)), ((), ()))  # its gradient is then the quicker one of two equal products
        turned, products, first = jax.lax.optimization_barrier(matrix.T), [], 0
        for samples, columns in self.parts:
            part = rows[first : first + samples, :columns]
            products.append(jax.lax.dot_general(part, turned[:, :columns], across))
            first += samples
        return self.layer.rest(params, others, jnp.concatenate(products))


def _double() -> bool:
    """Traced programs depend on this setting."""
    return bool(jax.config.read("jax_enable_x64"))


@dataclass(frozen=True, eq=False)
class _Split:
    """A traced network for one size of batch, with the product and what leads to it named."""

    jaxpr: Jaxpr
    consts: list[Any]
    leaf: int
    product: JaxprEqn
    inputs_first: bool
    views: list[JaxprEqn]
    others: list[JaxprEqn]

    def _operand(self, leaf: Array) -> Array:
        weights = self.product.invars[1 if self.inputs_first else 0]
        return _evaluate(self.views, {self.jaxpr.invars[self.leaf]: leaf}, [weights])[0]

    def matrix(self, leaf: Array) -> Array:
        """The weights as [inputs, outputs]."""
        axis = self.product.params["dimension_numbers"][0][1 if self.inputs_first else 0][0]
        operand = jnp.moveaxis(self._operand(leaf), axis, 0)
        return operand.reshape(len(operand), -1)

    def as_leaf(self, matrix: Array, like: Array) -> Array:
        """The matrix in the form that the parameters have; every view is undone by its transpose."""
        return jax.linear_transpose(self.matrix, jax.ShapeDtypeStruct(like.shape, like.dtype))(matrix)[0]

    def rest(self, others: list[Array], product: Array) -> Array:
        shape = _aval(self.product.outvars[0]).shape
        if self.inputs_first:
            product = product.reshape(shape)
        else:
            product = jnp.moveaxis(product.reshape(shape[-1], *shape[:-1]), 0, -1)
        invars = [var for place, var in enumerate(self.jaxpr.invars[:-1]) if place != self.leaf]
        known = dict(zip([*self.jaxpr.constvars, *invars], [*self.consts, *others], strict=True))
        return _evaluate(self.others, known | {self.product.outvars[0]: product}, self.jaxpr.outvars)[0]


@lru_cache(maxsize=64)
def _split(
    apply: Apply, structure: Any, shapes: tuple, inputs_shape: tuple[int, ...], dtype: np.dtype, double: bool
) -> _Split | None:
    leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def flat(leaves: list[Array], inputs: Array) -> Array:
        return apply(jax.tree.unflatten(structure, leaves), inputs)

    def written_out(*values: Array) -> list[Array]:
        return _evaluate(
            traced.jaxpr.eqns, dict(zip(known, [*traced.consts, *values], strict=True)), traced.jaxpr.outvars
        )

    inputs = jax.ShapeDtypeStruct(inputs_shape, dtype)
    try:
        traced = jax.make_jaxpr(flat)(leaves, inputs)
    except Exception:  # whatever the user's function raises for a batch of this size
        return None
    known = [*traced.jaxpr.constvars, *traced.jaxpr.invars]
    closed = jax.make_jaxpr(written_out)(*leaves, inputs)
    return _find(closed.jaxpr, closed.consts)


def _find(jaxpr: Jaxpr, consts: list[Any]) -> _Split | None:
    """The one product, if the inputs and one array of weights go nowhere else."""
    uses: dict[Var, list[JaxprEqn]] = {}
    for line in jaxpr.eqns:
        for var in line.invars:
            if isinstance(var, Var):
                uses.setdefault(var, []).append(line)
    outputs = {var for var in jaxpr.outvars if isinstance(var, Var)}

    def follow(var: Var) -> tuple[Var, list[JaxprEqn], JaxprEqn | None]:
        """Through views, as long as there is one use: what the last one gives, the views, and what is made of it."""
        views = []
        while len(lines := uses.get(var, [])) == 1 and var not in outputs and lines[0].primitive.name in VIEWS:
            views.append(lines[0])
            var = lines[0].outvars[0]
        return var, views, lines[0] if len(lines) == 1 and var not in outputs else None

    *leaves, inputs = jaxpr.invars
    rows, arranging, product = follow(inputs)
    if product is None or product.primitive.name != "dot_general":
        return None
    batch = _aval(inputs).shape[0]
    inputs_first = product.invars[0] is rows
    contracted, batched = product.params["dimension_numbers"]
    shapes = [_aval(line.outvars[0]).shape for line in arranging]
    kept = all(line.primitive.name != "transpose" for line in arranging) and all(s[:1] == (batch,) for s in shapes)
    plain = (
        kept
        and len(_aval(rows).shape) == 2
        and tuple(contracted[0 if inputs_first else 1]) == (1,)
        and not any(batched)
        and len({_aval(var).dtype for var in (*product.invars, *product.outvars)}) == 1
    )
    for leaf, var in enumerate(leaves):
        _, views, end = follow(var)
        if plain and end is product:
            gone = {id(line) for line in (*arranging, *views, product)}
            others = [line for line in jaxpr.eqns if id(line) not in gone]
            return _Split(jaxpr, consts, leaf, product, inputs_first, views, others)
    return None


def _aval(var: Any) -> Any:
    """Shape and type of a variable."""
    return var.aval


def _evaluate(lines: Sequence[JaxprEqn], known: dict[Var, Any], wanted: Sequence[Any]) -> list[Any]:
    """The values of variables after these equations, with the programs that they call written out."""
    values = dict(known)
    read: Callable[[Any], Any] = lambda var: var.val if isinstance(var, Literal) else values[var]
    for line in lines:
        given = [read(var) for var in line.invars]
        if line.primitive.name in CALLS and "jaxpr" in line.params:
            inner = line.params["jaxpr"]
            start = dict(zip([*inner.jaxpr.constvars, *inner.jaxpr.invars], [*inner.consts, *given], strict=True))
            made = _evaluate(inner.jaxpr.eqns, start, inner.jaxpr.outvars)
        else:
            made = _alone(line)(*given)
        values.update(zip(line.outvars, made, strict=True))
    return [read(var) for var in wanted]


def _alone(line: JaxprEqn) -> Callable[..., list[Any]]:
    """One equation as a function, its literals among the arguments."""
    invars: list[Any] = [Var(var.aval) if isinstance(var, Literal) else var for var in line.invars]
    about = EMPTY.debug_info.with_unknown_names()
    program = Jaxpr((), invars, line.outvars, [line.replace(invars=invars)], line.effects, about)
    return jaxpr_as_fun(ClosedJaxpr(program, ()))
