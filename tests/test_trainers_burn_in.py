"""When replicas count as settled."""

import numpy as np
import pytest

from escape_inference.trainers.burn_in import BurnIn, gelman_rubin, rate_change
from escape_inference.trainers.looks import Tally
from escape_inference.trainers.rounds import Round


def round_of(values: np.ndarray, escapes: int = 0, end: int = 0) -> Round:
    """A round in which each replica (row) took these log losses."""
    count = np.full(len(values), values.shape[1])
    tally = Tally.zero((len(values),))._replace(
        estimates=count, log_loss=values.sum(1), log_loss_square=(values**2).sum(1)
    )
    return Round([(end, slot % len(values)) for slot in range(escapes)], tally, np.empty((0, 7)))


def burn_in(levels: np.ndarray, escapes: list[int], spread: float = 0.0) -> BurnIn:
    """Twenty replicas with the given mean log loss in each round of 50 iterations, and levels of their own."""
    rng = np.random.default_rng(1)
    own = spread * rng.normal(size=(20, 1))
    record = BurnIn()
    for index, (level, escaped) in enumerate(zip(levels, escapes, strict=True)):
        end = 50 * (index + 1)
        record.add(end, round_of(level + own + rng.normal(size=(20, 50)), escaped, end))
    return record


def test_gelman_rubin_agrees_with_its_formula() -> None:
    values = np.random.default_rng(0).normal(size=(6, 40)) + np.arange(6)[:, None]
    within, between = values.var(axis=1, ddof=1).mean(), values.mean(1).var(ddof=1)
    expected = np.sqrt((39 / 40 * within + between) / within)
    assert gelman_rubin(np.full(6, 40.0), values.sum(1), (values**2).sum(1)) == pytest.approx(expected)


def test_stationary_replicas_have_settled() -> None:
    record = burn_in(np.zeros(16), [5] * 16)
    assert record.settled()
    assert record.test()["log_loss"] == pytest.approx(1, abs=0.02)


def test_replicas_at_levels_of_their_own_have_not_settled() -> None:
    record = burn_in(np.zeros(16), [5] * 16, spread=1.5)
    assert record.test()["log_loss"] > 1.2
    assert not record.settled()


def test_a_drift_common_to_all_replicas_has_not_settled_although_they_agree() -> None:
    record = burn_in(np.linspace(0, 2, 16), [5] * 16)
    assert record.test()["log_loss"] < 1.1
    assert record.test()["log_loss_drift"] > 2.5
    assert not record.settled()


def test_a_rising_escape_rate_has_not_settled() -> None:
    record = burn_in(np.zeros(16), [0] * 12 + [20] * 4)
    assert record.test()["escape_drift"] > 2.5
    assert not record.settled()


def test_early_rounds_are_forgotten() -> None:
    assert burn_in(np.r_[np.linspace(-3, 0, 8), np.zeros(8)], [0] * 8 + [5] * 8).settled()


def test_too_few_rounds_have_not_settled() -> None:
    assert not BurnIn().settled()
    assert not burn_in(np.zeros(1), [5]).settled()


def test_the_change_of_a_rate_is_counted_in_standard_errors() -> None:
    rng = np.random.default_rng(0)
    changes = [rate_change(list(rng.poisson([30, 60])), [100, 200]) for _ in range(2000)]
    assert np.mean(changes) == pytest.approx(0, abs=0.1)
    assert np.std(changes) == pytest.approx(1, abs=0.06)
    assert rate_change([10, 40], [100, 100]) > 4
