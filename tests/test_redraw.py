"""Draws of another posterior from those of a known one, also where some of them carry nothing."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from escape_inference import redraw
from escape_inference.evidence import Evidence
from escape_inference.importance import Weighted, importance_sample
from escape_inference.model import PriorWidths
from escape_inference.precision import float64
from escape_inference.sampler import Draws


def density(z):
    """Normal with mean 3 and variance 1/100 in each of two directions; its integral is π/50."""
    return -50 * jnp.sum((z - 3) ** 2)


@float64
def found_from(spoil):
    start = np.random.default_rng(0).normal(size=(2000, 2))
    log_weight = -50 * np.sum((start - 3) ** 2, axis=1)
    return importance_sample(density, start, spoil(log_weight))


def test_points_without_a_finite_weight_do_not_spoil_the_others():
    """0/0 and 0 come from draws that the known posterior or the new one rules out."""

    def spoil(log_weight):
        log_weight[::7], log_weight[3::50], log_weight[5::50] = np.nan, -np.inf, np.inf
        return log_weight

    found = found_from(spoil)
    assert abs(found.log_evidence - np.log(np.pi / 50)) < 3 * found.standard_error < 0.1
    assert np.abs(np.average(found.z, axis=0, weights=np.exp(found.log_weight)) - 3).max() < 0.02


def test_with_no_usable_point_the_answer_is_that_it_cannot_be_trusted():
    found = found_from(lambda log_weight: np.full_like(log_weight, np.nan))
    assert found.pareto_k == np.inf
    assert not np.isfinite(found.log_weight).any()


@pytest.fixture
def redrawn(monkeypatch):
    """A posterior of which importance sampling finds what is given, one after the other; what was asked for."""
    asked = {"draws": [], "acceptance": []}

    def run_chains(found, *_, acceptance, **__):
        asked["acceptance"].append(acceptance)
        rest = dict.fromkeys(Draws._fields, np.zeros((4, 100)))
        diverging = np.full((4, 100), len(asked["acceptance"]) < 3)
        return Draws(**rest | {"z": np.random.default_rng(0).normal(size=(4, 100, 5)), "diverging": diverging})

    def find(*weights):
        left = [Weighted(np.zeros((len(one), 5)), one, k) for one, k in weights]

        def importance(*_, draws, **__):
            asked["draws"].append(draws)
            return left.pop(0)

        monkeypatch.setattr(redraw, "importance_sample", importance)
        target = SimpleNamespace(used=np.arange(5), law=None, shapes=())
        sample = redraw.Sample(SimpleNamespace(target=target), PriorWidths(), np.zeros((9, 5)), *[None] * 3)
        settings = {"draws": 2000, "seed": 0, "warmup": 300, "chains": 4}
        return redraw._redraw(sample, np.zeros(9), np.ones(3), PriorWidths(), **settings), asked

    monkeypatch.setattr(redraw, "run_chains", run_chains)
    monkeypatch.setattr(redraw, "densities", lambda *_: [None])
    monkeypatch.setattr(redraw, "_data", lambda *_: None)
    monkeypatch.setattr(redraw, "_share_outside", lambda *_: 0.0)
    monkeypatch.setattr(redraw, "bridge_log_evidence", lambda *_, **__: Evidence(0.0, 0.1, "bridge"))
    monkeypatch.setattr(redraw, "_sample", lambda *given: redraw.Sample(*given[:4], None, given[4]))
    return find


def weights(effective, draws):
    """As many draws with a weight as are effective."""
    return np.where(np.arange(draws) < effective, 0.0, -50.0)


def test_where_few_draws_carry_weight_there_are_more_of_them(redrawn):
    found, asked = redrawn((weights(60, 2000), 0.3), (weights(300, 10_000), 0.3))
    assert found.evidence.method == "importance"
    assert len(found.z) == 10_000
    assert asked == {"draws": [2000, 10_000], "acceptance": []}  # 1.5 * 200 / 60 times as many


def test_weights_that_still_cannot_be_trusted_give_way_to_chains_with_smaller_and_smaller_steps(redrawn):
    found, asked = redrawn((weights(1000, 2000), 0.9), (weights(1000, 4000), 0.8))
    assert found.evidence.method == "bridge"
    assert asked["draws"] == [2000, 4000]
    np.testing.assert_allclose(1 - np.array(asked["acceptance"]), [1 / 10, 1 / 30, 1 / 90])  # until none diverges
