"""Aggregation of a measured table into conditions."""

import numpy as np
import pandas as pd
import pytest

from escape_inference.conditions import aggregate
from escape_inference.errors import InputError
from escape_inference.gamma_intervals import interval_counts


def runs(steps: list[int], escaped: list[bool] | bool = True, **columns: object) -> pd.DataFrame:
    """One run in each row at η = 0.05, B = 7, looked at every 10 iterations."""
    settings = {"minimum": "m1", "learning_rate": 0.05, "batch_size": 7, "check_interval": 10} | columns
    return pd.DataFrame({"run": [f"r{i}" for i in range(len(steps))], "steps": steps, "escaped": escaped, **settings})


def reference(table: pd.DataFrame) -> pd.DataFrame:
    """The counts and exposures again, one row at a time."""
    keys = ["minimum", "learning_rate", "batch_size", "check_interval", "loss_barrier"]
    totals: dict[tuple, list[float]] = {}
    for row in table.itertuples():
        total = totals.setdefault(tuple(getattr(row, key) for key in keys), [0, 0, 0.0, 0.0])
        total[0] += 1
        total[1] += int(row.escaped)
        total[2] += row.learning_rate * row.steps
        total[3] += row.learning_rate * (row.steps - (row.check_interval if row.escaped else 0))
    names = ["runs", "escapes", "exposure", "exposure_before"]
    return pd.DataFrame([dict(zip(keys + names, [*key, *total], strict=True)) for key, total in totals.items()])


def random_table(rows: int = 3000, seed: int = 5) -> pd.DataFrame:
    """Rows of many conditions in random order."""
    rng = np.random.default_rng(seed)
    minimum = rng.integers(0, 4, rows)
    interval = rng.choice([1, 20], rows)
    steps = np.ceil(rng.exponential(900.0, rows) / interval).astype(int) * interval
    return pd.DataFrame(
        {
            "minimum": [f"m{i}" for i in minimum],
            "run": np.arange(rows),
            "learning_rate": rng.choice([0.03, 0.05], rows),
            "batch_size": rng.choice([8, 16], rows),
            "steps": np.minimum(steps, 1000),
            "escaped": steps <= 1000,
            "check_interval": interval,
            "barrier": "threshold",
            "loss_minimum": 1e-3 * (1 + minimum),
            "loss_barrier": 1e-3 * (1 + minimum) * rng.choice([2.0, 3.0], rows),
        }
    )


def test_counts_and_exposures_agree_with_a_plain_loop_in_order_of_first_appearance() -> None:
    table = random_table()
    frame, expected = aggregate(table).frame, reference(table)
    assert len(frame) == 4 * 2 * 2 * 2 * 2
    pd.testing.assert_frame_equal(frame[expected.columns], expected, check_dtype=False, rtol=1e-12)
    assert frame["condition"].is_unique
    np.testing.assert_allclose(frame["look_width"], frame["learning_rate"] * frame["check_interval"])


def test_labels_are_readable() -> None:
    table = runs([20, 30], learning_rate=[0.05, 0.06], loss_minimum=2e-4, loss_barrier=4e-4, barrier="threshold")
    assert list(aggregate(table).frame["condition"]) == ["m1 η=0.05 B=7 c=2", "m1 η=0.06 B=7 c=2"]


def test_labels_stay_unique_when_only_a_hidden_setting_differs() -> None:
    table = runs(
        [20, 30, 40, 50, 60, 70],
        start=["minimum", "quasi_stationary", "minimum", "minimum", "minimum", "minimum"],
        check_interval=[10, 10, 20, 10, 10, 10],
        hessian_saddle=[1.0, 1.0, 1.0, 2.0, np.nan, 1.0],
        hessian_saddle_se=[0.0, 0.0, 0.0, 0.0, 0.0, 0.5],
    )
    labels = aggregate(table).frame["condition"]
    assert len(labels) == 6
    assert labels.is_unique
    assert labels[1] == "m1 η=0.05 B=7 quasi-stationary"


def test_empty_measurements_stay_empty_and_missing_errors_are_zero() -> None:
    frame = aggregate(runs([20], loss_minimum=1e-3, loss_minimum_se=1e-5, hessian_minimum_se=0.3)).frame
    assert frame["loss_minimum_se"].iloc[0] == 1e-5
    assert frame[["loss_barrier", "hessian_minimum", "effective_dimension"]].isna().all(axis=None)
    # an error without its value says nothing
    assert frame["hessian_minimum_se"].iloc[0] == 0.0


def test_what_was_not_measured_is_named_and_counted() -> None:
    measured = {"loss_minimum": 1e-3, "loss_barrier": 3e-3, "hessian_minimum": 2.0}
    assert aggregate(runs([20], barrier="threshold", **measured)).not_measured == []
    assert aggregate(runs([20], barrier="saddle", **measured)).not_measured == ["hessian_saddle of 1 condition"]
    table = runs([20, 30, 40, 50], barrier="threshold", **measured | {"loss_barrier": [3e-3, np.nan, np.nan, 4e-3]})
    table = table.assign(minimum=["m1", "m1", "m2", "m3"], learning_rate=[0.05, 0.06, 0.05, 0.05])
    table.loc[table["minimum"] != "m1", "loss_minimum"] = np.nan
    table.loc[table["minimum"] == "m3", "hessian_minimum"] = np.nan
    assert aggregate(table).not_measured == [
        "loss_minimum of 2 minima",
        "hessian_minimum of 1 minimum",
        "loss_barrier of 2 conditions",
    ]


def test_conditions_over_a_threshold_that_are_looked_at_too_rarely_are_named() -> None:
    table = runs([20, 40, 30, 50], hessian_minimum=3.0, loss_minimum=0.01, loss_barrier=0.02, barrier="threshold")
    table = table.assign(learning_rate=[0.005, 0.01, 0.02, 0.02], check_interval=[10, 10, 10, 1])
    assert aggregate(table).rare_looks == ["m1 η=0.01 B=7 c=2 (0.3)", "m1 η=0.02 B=7 c=2 m=10 (0.6)"]
    assert aggregate(table.assign(barrier="saddle")).rare_looks == []
    assert aggregate(table.assign(hessian_minimum=np.nan)).rare_looks == []


def test_levels_of_a_ramp_are_conditions_of_their_own() -> None:
    ramp = runs([500, 500, 40], [False, False, True], learning_rate=[0.01, 0.02, 0.03], run="ramp")
    other = runs([60, 80, 30], learning_rate=[0.02, 0.02, 0.03], run=["a", "b", "c"])
    conditions = aggregate(pd.concat([ramp, other]))
    frame = conditions.frame
    assert frame["ramp"].tolist() == [True, True, True, False, False]
    assert frame["escapes"].tolist() == [0, 0, 1, 2, 1]
    assert frame["exposure_before"].tolist() == pytest.approx([5.0, 10.0, 0.9, 2.4, 0.6])
    assert frame["condition"].is_unique
    assert conditions.n_runs == 4
    assert conditions.n_escapes == 4


def test_runs_that_jump_at_the_first_level_of_a_ramp_are_counted_with_those_that_survived_it() -> None:
    levels = runs([500, 500, 40], [False, False, True], learning_rate=[0.01, 0.02, 0.03], run="a")
    early = runs([60, 500], learning_rate=0.01, run=["b", "c"])
    frame = aggregate(pd.concat([levels, early])).frame
    assert frame[["learning_rate", "ramp"]].to_numpy().tolist() == [[0.01, True], [0.02, True], [0.03, True]]
    assert frame[["runs", "starts", "escapes"]].to_numpy().tolist() == [[3, 3, 2], [1, 0, 0], [1, 0, 1]]
    assert frame["exposure"].tolist() == pytest.approx([10.6, 10.0, 1.2])


@pytest.mark.parametrize(("steps", "escaped"), [([60, 501], [True, True]), ([60, 500], [True, False])])
def test_runs_at_a_fixed_learning_rate_stay_apart_from_the_first_level_of_a_ramp(
    steps: list[int], escaped: list[bool]
) -> None:
    levels = runs([500, 500, 40], [False, False, True], learning_rate=[0.01, 0.02, 0.03], run="a")
    fixed = runs(steps, escaped, learning_rate=0.01, run=["b", "c"])
    frame = aggregate(pd.concat([levels, fixed])).frame
    assert frame["ramp"].tolist() == [True, True, True, False]
    assert frame["escapes"].tolist() == [0, 0, 1, sum(escaped)]


def test_gaps_of_a_slot_count_as_one_run_and_not_as_a_ramp() -> None:
    gaps = runs([30, 50, 70, 20, 90], [True, True, False, True, False], run=[1, 1, 1, 2, 2], start="quasi_stationary")
    conditions = aggregate(gaps)
    assert conditions.frame[["runs", "escapes", "ramp"]].to_numpy().tolist() == [[2, 3, False]]
    assert conditions.n_runs == 2


def test_few_distinct_times_are_kept_exactly() -> None:
    times = aggregate(runs([30, 30, 50, 80, 80], [True, True, True, True, False])).times
    expected = [[0, 20, 30, 2, 0], [0, 40, 50, 1, 0], [0, 70, 80, 1, 0], [0, 70, 80, 0, 1]]
    assert times[["condition", "lower", "upper", "escapes", "censored"]].to_numpy().astype(int).tolist() == expected


def test_an_escape_before_the_first_look_is_refused_and_a_run_censored_there_is_not() -> None:
    with pytest.raises(InputError, match=r"column 'check_interval', row 1 \(value 10\): must be at most steps"):
        aggregate(runs([4, 30]))
    conditions = aggregate(runs([10, 4, 30], [True, False, True]))
    assert conditions.times["lower"].tolist() == [0.0, 0.0, 20.0]
    assert conditions.frame["exposure_before"].iloc[0] == pytest.approx(0.05 * 24)


def test_many_distinct_times_are_joined_into_64_intervals_that_touch() -> None:
    rng = np.random.default_rng(2)
    steps = np.ceil(rng.exponential(5000.0, 4000)).astype(int)
    limit = np.where(rng.random(4000) < 0.3, rng.integers(1, 9000, 4000), 10**6)
    table = runs(list(np.minimum(steps, limit)), list(steps <= limit), check_interval=1)
    conditions = aggregate(table)
    times = conditions.times
    assert len(times) <= 64
    seen = times[times["escapes"] > 0]
    assert len(seen) == 48
    assert seen["escapes"].sum() == conditions.n_escapes
    # (π/2)/48 of the escapes in the largest, fewer in the tails
    assert seen["escapes"].max() < 1.1 * conditions.n_escapes * (np.pi / 2) / 48
    assert seen["escapes"].iloc[[0, -1]].max() < 0.1 * seen["escapes"].max()
    assert seen["lower"].tolist() == [0.0, *seen["upper"].iloc[:-1]]
    for row in seen.itertuples():
        inside = (table["steps"] > row.lower) & (table["steps"] <= row.upper) & table["escaped"]
        assert inside.sum() == row.escapes
    # the exposure of the censored runs is exact
    lost = times[times["censored"] > 0]
    assert (lost["upper"] * lost["censored"]).sum() == pytest.approx(table.loc[~table["escaped"], "steps"].sum())


def test_joined_intervals_hardly_change_the_likelihood() -> None:
    steps = np.ceil(np.random.default_rng(3).gamma(5.0, 400.0, 3000)).astype(int)
    joined = aggregate(runs(list(steps), check_interval=1)).times
    values, counts = np.unique(steps, return_counts=True)
    exact = pd.DataFrame({"lower": values - 1, "upper": values, "escapes": counts, "censored": 0})
    points = np.log(1 / 100.0) + np.array([-0.02, 0.0, 0.02]), np.log(5.0) + np.array([-0.05, 0.0, 0.05])
    grid = np.meshgrid(*points, indexing="ij")
    difference = [interval_counts(times, 0.05).log_likelihood(*grid) for times in (joined, exact)]
    assert np.ptp(difference[1]) > 2.0
    np.testing.assert_allclose(difference[0] - difference[0][1, 1], difference[1] - difference[1][1, 1], atol=0.15)


def test_the_life_table_counts_every_run_once_on_looks() -> None:
    table = random_table(5000)
    conditions = aggregate(table)
    life = conditions.life_table
    assert set(life["condition"]) == set(np.flatnonzero(conditions.frame["escapes"] >= 20))
    for i, part in life.groupby("condition"):
        setting = conditions.frame.iloc[i]
        assert (part["escapes"] + part["censored"]).sum() == setting["runs"]
        assert part["upper"].is_monotonic_increasing
        assert (part["upper"] % setting["check_interval"] == 0).all()


def test_runs_beyond_the_last_edge_are_censored_there() -> None:
    steps = np.ceil(np.random.default_rng(8).exponential(1000.0, 4000)).astype(int)
    life = aggregate(runs(list(steps), check_interval=1)).life_table
    last = life["upper"].iloc[-1]
    assert last == pytest.approx(1000.0 * np.log(256), rel=0.1)
    assert life["censored"].tolist() == [0] * (len(life) - 1) + [(steps > last).sum()]
    assert (life["escapes"] + life["censored"]).sum() == 4000


def test_conditions_can_be_selected_and_reordered() -> None:
    conditions = aggregate(random_table())
    mask = (conditions.frame["minimum"] == "m2").to_numpy()
    chosen = conditions.select(mask)
    assert chosen.minima == ["m2"]
    assert chosen.n_escapes == conditions.frame.loc[mask, "escapes"].sum()
    assert chosen.n_runs == conditions.frame.loc[mask, "runs"].sum()
    order = np.array([5, 0, 3])
    turned = conditions.select(order)
    assert turned.frame["condition"].tolist() == conditions.frame["condition"].iloc[order].tolist()
    for new, old in enumerate(order):
        for name in ("times", "life_table"):
            left, right = getattr(turned, name), getattr(conditions, name)
            left = left[left["condition"] == new].drop(columns="condition").reset_index(drop=True)
            right = right[right["condition"] == old].drop(columns="condition").reset_index(drop=True)
            pd.testing.assert_frame_equal(left, right)
    assert len(conditions.select(np.array([], dtype=int))) == 0


def test_rare_giant_step_counts_take_the_slow_path_to_the_same_result() -> None:
    # so many conditions and so long a run that both do not fit into one integer
    table = runs([2**52, *range(10, 3010)], minimum=[f"m{i % 1500}" for i in range(3001)], check_interval=1)
    frame = aggregate(table).frame
    assert len(frame) == 1500
    assert frame["escapes"].sum() == 3001
    assert frame["exposure"].iloc[1] == pytest.approx(0.05 * (10 + 1510))


def test_an_unchecked_table_is_checked_first() -> None:
    with pytest.raises(InputError, match="column 'steps', row 2"):
        aggregate(runs([30, -3]))


def test_path_and_digest_come_along() -> None:
    conditions = aggregate(runs([30]))
    assert conditions.path == "<data frame>"
    assert len(conditions.sha256) == 64
