"""Where a run is: in its well, over the saddle that is watched, or out by another way.

Its own loss does not say: it exceeds L^s in the well, in directions that lead nowhere. So gradient descent goes down from where
the run is, and the run has

- *crossed* if it ends nearer to the minimum beyond the saddle than to the one it started from;
- *left elsewhere* if it ends at rest farther from both of them than the saddle is: another way out, censored there;
- *stayed* otherwise. Points that have not come to rest count as one of the two nearer by.

A descent is over as soon as it is within half of the way to the saddle of either minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from escape_inference.trainers.descent import Goals, descend_one

STAYED, CROSSED, ELSEWHERE = 0, 1, 2
AT_REST = 1e-3
"""Gradient norm of a point at rest, over ``sqrt(2 h^s (L^s - L))``, that of a slope as high as the barrier."""
CLOSE = 0.5
"""A descent is over within this share of a minimum's distance to the saddle."""
AT_SADDLE = 0.1
"""A point at rest within this share of it is at the saddle itself, and has not left."""


class Map(NamedTuple):
    """Where the two minima and the saddle between them are, and how descents go."""

    home: Float[Array, " p"]
    beyond: Float[Array, " p"]
    saddle: Float[Array, " p"]
    at_rest: Float[Array, ""]
    rate: Float[Array, ""]
    descent_steps: Array


def whereabouts(level: Callable[[Array], Array], point: Float[Array, " p"], world: Map) -> Array:
    """Has a run at this point stayed, crossed, or left elsewhere? See the module's docstring."""
    home_radius = jnp.linalg.norm(world.saddle - world.home)
    beyond_radius = jnp.linalg.norm(world.saddle - world.beyond)
    centres = jnp.stack([world.home, world.beyond])
    goals = Goals(centres, CLOSE * jnp.stack([home_radius, beyond_radius]), world.at_rest)
    ended, loss, slope = descend_one(level, point, world.rate, world.descent_steps, goals)
    home, beyond, top = (jnp.linalg.norm(ended - at) for at in (world.home, world.beyond, world.saddle))
    far = (home > home_radius) & (beyond > beyond_radius)
    far = far & (top > AT_SADDLE * jnp.minimum(home_radius, beyond_radius))
    elsewhere = ~jnp.isfinite(loss) | (far & (slope <= world.at_rest))
    return jnp.where(elsewhere, ELSEWHERE, jnp.where(beyond < home, CROSSED, STAYED))
