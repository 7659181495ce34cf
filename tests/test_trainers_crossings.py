"""When has a run crossed a saddle, left by another way, or stayed?"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from escape_inference.errors import InputError
from escape_inference.trainers import Exit, Saddle, UnstableMinimum, find_exits, measure_crossings
from escape_inference.trainers.whereabouts import CROSSED, ELSEWHERE, STAYED, Map, whereabouts

PUSH, HEIGHT = 0.25, 0.05
INPUTS, TARGETS = np.zeros((2, 1), np.float32), np.array([[-PUSH], [PUSH]], np.float32)
"""The samples push the weight to either side; their mean loss is periodic, with minima at 0, +-2, +-4."""


def shifted(theta, inputs):
    return theta + inputs


def periodic(prediction, target):
    return 0.6 - HEIGHT * jnp.cos(jnp.pi * prediction[0]) + target[0] * prediction[0]


def level(x: float) -> float:
    return 0.6 - HEIGHT * np.cos(np.pi * x)


def to_the_right(**changes: object) -> Exit:
    curvature = HEIGHT * np.pi**2
    saddle = Saddle(
        jnp.array([1.0]), level(1), 1e-6, curvature, 2e-6, 0.0, 1, np.array([-curvature]), np.ones(1), np.empty(0), True, ""
    )  # fmt: skip
    home, beyond = np.zeros(1, np.float32), np.full(1, 2.0, np.float32)
    return Exit(saddle, home, beyond, level(0), level(2), curvature, 3, bool(changes.get("usable", True)), "")


def crossings(**changes: object):
    settings: dict = {"learning_rate": 0.9, "batch_size": 1, "replicas": 64, "steps": 2000, "check_interval": 5}
    way_out = changes.pop("way_out", None) or to_the_right()
    return measure_crossings(shifted, jnp.zeros(1), INPUTS, TARGETS, way_out, loss=periodic, **(settings | changes))


def test_runs_to_the_left_are_not_escapes_over_the_saddle_on_the_right() -> None:
    record = crossings(run_prefix="a-", hessian_minimum=0.4)
    both = record.escapes + record.elsewhere
    assert both > 200
    assert stats.binomtest(record.escapes, both).pvalue > 0.01, "the landscape is symmetric"
    rows = record.rows
    assert rows["escaped"].sum() == record.escapes
    assert (rows["steps"] * 0.9).sum() == pytest.approx(record.exposure) == pytest.approx(64 * 2000 * 0.9)
    assert len(rows) - record.escapes >= record.elsewhere, "those to the left are censored"
    assert rows["run"].is_unique
    assert rows["run"].str.startswith("a-").all()
    assert rows.iloc[0][["barrier", "hessian_minimum", "loss_barrier_se"]].tolist() == ["saddle", 0.4, 1e-6]
    assert record.settled
    assert abs(record.rate_change) < 3


def test_from_the_minimum_every_run_ends_once() -> None:
    record = crossings(start="minimum", steps=600, replicas=128)
    rows = record.rows
    assert len(rows) == 128
    ended = rows[rows["steps"] < 600]
    assert len(ended) >= record.escapes
    assert record.elsewhere > 5
    assert record.escapes > 5
    lost_before_the_last_look = (rows.loc[~rows["escaped"], "steps"] < 600).sum()
    assert record.elsewhere - 3 <= lost_before_the_last_look <= record.elsewhere
    assert record.trend["exposure"].sum() == pytest.approx(record.exposure)


def test_rates_do_not_depend_on_how_often_one_looks() -> None:
    """The probability to escape between two looks is ``1 - exp(-kappa dt)``."""
    rates = []
    for interval in (5, 40):
        record = crossings(check_interval=interval, replicas=128, steps=4000, seed=interval)
        width = 0.9 * interval
        both = (record.escapes + record.elsewhere) / record.exposure
        rates.append((-np.log1p(-both * width) / width, (record.escapes + record.elsewhere) ** -0.5))
    (first, first_se), (second, second_se) = rates
    assert abs(np.log(first / second)) < 4 * np.hypot(first_se, second_se) + 0.05


def test_the_rule_of_whereabouts() -> None:
    far = Map(*(jnp.array([at]) for at in (0.0, 2.0, 1.0)), jnp.float32(1e-3), jnp.float32(0.5), jnp.int32(300))

    def at(x: float) -> int:
        return int(whereabouts(lambda point: level(0) + 0 * point[0] + periodic_mean(point), jnp.array([x]), far))

    def periodic_mean(point):
        return HEIGHT * (1 - jnp.cos(jnp.pi * point[0]))

    places = {0.0: STAYED, 0.9: STAYED, -0.9: STAYED, 1.1: CROSSED, 2.7: CROSSED, -1.1: ELSEWHERE, 3.2: ELSEWHERE}
    assert {x: at(x) for x in places} == places
    assert at(1.0) in (STAYED, CROSSED), "at rest on the saddle itself"
    assert at(float("nan")) == ELSEWHERE


def test_both_ways_out_of_a_periodic_landscape_are_found_and_kept(tmp_path: Path) -> None:
    found = find_exits(
        shifted, jnp.zeros(1), INPUTS, TARGETS, loss=periodic, learning_rates=1.2, batch_size=1, loss_barrier=0.7,
        runs=16, steps=200, images=7, path_iterations=100,
    )  # fmt: skip
    with pytest.raises(InputError, match="learning_rates: needs at least one value"):
        find_exits(
            shifted, jnp.zeros(1), INPUTS, TARGETS, loss=periodic, learning_rates=[], batch_size=1, loss_barrier=0.7
        )
    near = [one for one in found.exits if one.usable]
    assert {round(float(one.beyond[0])) for one in near} == {-2, 2}
    for one in near:
        assert one.saddle.loss_barrier == pytest.approx(level(1), rel=1e-5)
        assert one.hessian_along == pytest.approx(HEIGHT * np.pi**2, rel=1e-3)
    assert found.returned + sum(one.runs for one in found.exits) <= found.runs == 16
    path = near[0].save(tmp_path / "exit.npz")
    again = Exit.load(path, jnp.zeros(1))
    assert again.numbers == near[0].numbers
    assert again.beyond == near[0].beyond
    with pytest.raises(InputError, match="has 1 parameters, but the network has 2"):
        Exit.load(path, jnp.zeros(2))
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a saved exit"):
        Exit.load(path, jnp.zeros(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "there"}, "start: 'there' is not known"),
        ({"replicas": 1}, "replicas: must be an integer of at least 2"),
        ({"check_interval": 9999}, "check_interval: must be an integer from 1 to steps"),
        ({"batch_size": 3}, "batch_size: must be an integer from 1 to the number of samples, 2"),
        ({"way_out": to_the_right(usable=False)}, "way_out: must be a usable exit"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        crossings(**changes)


def test_replicas_that_all_leave_at_once_have_no_rate() -> None:
    with pytest.raises(UnstableMinimum, match=r"every replica had left by iteration .* by another way"):
        crossings(learning_rate=30.0, replicas=2, check_interval=400)
