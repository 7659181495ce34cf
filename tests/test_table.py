"""The measured table: what is accepted, what is filled in, and the message for everything that is refused."""

import hashlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

from escape_inference.errors import InputError
from escape_inference.row_groups import ramp_codes
from escape_inference.table import is_checked, read_measurements


def good_table(rows: int = 8) -> pd.DataFrame:
    """Two minima, one run in each row, the last one censored; asymmetric numbers throughout."""
    minimum = np.where(np.arange(rows) < rows // 2, "m1", "m2")
    first = minimum == "m1"
    return pd.DataFrame(
        {
            "minimum": minimum,
            "run": [f"r{i}" for i in range(rows)],
            "learning_rate": np.where(first, 0.05, 0.07),
            "batch_size": 8,
            "steps": 100 + 10 * np.arange(rows),
            "escaped": np.arange(rows) < rows - 1,
            "check_interval": 10,
            "barrier": "threshold",
            "start": "minimum",
            "loss_minimum": np.where(first, 2e-4, 3e-3),
            "loss_barrier": np.where(first, 6e-4, 5e-3),
            "hessian_minimum": np.where(first, 10.5, 27.0),
            "hessian_saddle": np.nan,
            "effective_dimension": np.where(first, 4.0, 6.5),
            "hessian_minimum_se": np.where(first, 0.3, 0.0),
        }
    )


def write(table: pd.DataFrame, path: Path) -> Path:
    """As CSV or Parquet by suffix."""
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


def changed(name: str, rows: list[int], value: Any) -> pd.DataFrame:
    """The good table with some cells of a column replaced; ``rows`` count from 1."""
    table = good_table()
    column = table[name].astype(object)
    for row in rows:
        column.iloc[row - 1] = value
    return table.assign(**{name: column})


def as_ramp(escaped: list[bool]) -> pd.DataFrame:
    """Rows 1 to 3 are one ramp."""
    table = good_table()
    table.loc[:2, "run"] = "ramp"
    table.loc[:2, "learning_rate"] = [0.01, 0.02, 0.03]
    table.loc[:2, "escaped"] = escaped
    return table


SPOILED: dict[str, tuple[pd.DataFrame, str, list[int], str]] = {
    "negative learning rate": (changed("learning_rate", [3], -0.1), "learning_rate", [3], "above 0"),
    "zero learning rate": (changed("learning_rate", [1, 8], 0.0), "learning_rate", [1, 8], "above 0"),
    "infinite learning rate": (changed("learning_rate", [2], np.inf), "learning_rate", [2], "finite"),
    "empty learning rate": (changed("learning_rate", [5], np.nan), "learning_rate", [5], "required"),
    "learning rate in words": (changed("learning_rate", [4], "fast"), "learning_rate", [4], "a number"),
    "batch size zero": (changed("batch_size", [6], 0), "batch_size", [6], "whole number"),
    "batch size with a fraction": (changed("batch_size", [6, 7], 8.5), "batch_size", [6, 7], "whole number"),
    "empty batch size": (changed("batch_size", [2], None), "batch_size", [2], "required"),
    "negative steps": (changed("steps", [7], -5), "steps", [7], "at least 1"),
    "steps zero in many rows": (changed("steps", [1, 2, 3, 4, 5, 6], 0), "steps", [1, 2, 3, 4, 5], "first 5 of 6"),
    "steps beyond any count": (changed("steps", [3], 1e300), "steps", [3], "whole number"),
    "steps in words": (changed("steps", [3], "12k"), "steps", [3], "a number"),
    "empty steps": (changed("steps", [8], None), "steps", [8], "required"),
    "escaped in other words": (changed("escaped", [2, 4], "yes"), "escaped", [2, 4], "true or false"),
    "escaped is two": (changed("escaped", [4], 2), "escaped", [4], "true or false"),
    "escaped is empty": (changed("escaped", [1], None), "escaped", [1], "required"),
    "empty minimum": (changed("minimum", [3], None), "minimum", [3], "required"),
    "empty run": (changed("run", [3, 5], None), "run", [3, 5], "required"),
    "check interval zero": (changed("check_interval", [2], 0), "check_interval", [2], "whole number"),
    "look before the start": (good_table().assign(check_interval=121), "check_interval", [1, 2, 3], "at most steps"),
    "unknown barrier": (changed("barrier", [6], "wall"), "barrier", [6], "'saddle' or 'threshold'"),
    "unknown start": (changed("start", [6, 8], "anywhere"), "start", [6, 8], "'minimum' or 'quasi_stationary'"),
    "negative loss": (changed("loss_minimum", [5, 6, 7, 8], -1.0), "loss_minimum", [5, 6, 7, 8], "above 0"),
    "infinite loss": (changed("loss_barrier", [1], np.inf), "loss_barrier", [1], "finite"),
    "barrier at the minimum": (changed("loss_barrier", [2], 2e-4), "loss_barrier", [2], "above loss_minimum"),
    "barrier below the minimum": (changed("loss_barrier", [5, 8], 1e-3), "loss_barrier", [5, 8], "above loss_minimum"),
    "curvature in words": (changed("hessian_minimum", [3], "steep"), "hessian_minimum", [3], "a number"),
    "curvature zero": (changed("hessian_saddle", [4], 0.0), "hessian_saddle", [4], "above 0"),
    "dimension zero": (changed("effective_dimension", [1], 0), "effective_dimension", [1], "above 0"),
    "negative error": (changed("hessian_minimum_se", [1], -0.1), "hessian_minimum_se", [1], "at least 0"),
    "two losses of one minimum": (changed("loss_minimum", [3], 2.1e-4), "loss_minimum", [3], "same in all rows"),
    "two curvatures of one minimum": (changed("hessian_minimum", [7], 3.0), "hessian_minimum", [7], "same in all rows"),
    "a curvature left empty": (changed("hessian_minimum", [6, 8], None), "hessian_minimum", [6, 8], "same in all rows"),
    "two dimensions of one minimum": (changed("effective_dimension", [2], 4.5), "effective_dimension", [2], "same"),
    "two errors of one minimum": (changed("hessian_minimum_se", [8], 0.2), "hessian_minimum_se", [8], "same in all"),
    "escape before the end of a ramp": (as_ramp([True, False, True]), "escaped", [1], "its own label"),
    "two escapes before the end of a ramp": (as_ramp([True, True, False]), "escaped", [1, 2], "ramp"),
    "no escape at all": (good_table().assign(escaped=False), "escaped", [], "rows 1 to 8"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", "frame"])
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_table_is_refused_with_file_column_rows_and_rule(name: str, suffix: str, tmp_path: Path) -> None:
    table, column, rows, rule = SPOILED[name]
    if suffix == ".parquet":
        table = table.astype({c: "string" for c in table.columns if table[c].dtype == object})
    given_table = table if suffix == "frame" else write(table, tmp_path / f"spoiled{suffix}")
    with pytest.raises(InputError) as caught:
        read_measurements(given_table)
    message = str(caught.value)
    assert message.startswith("<data frame>: " if suffix == "frame" else f"{tmp_path}/spoiled{suffix}: ")
    assert f"column {column!r}" in message
    assert rule in message
    if rows:
        places = f"{'rows' if len(rows) > 1 else 'row'} {', '.join(map(str, rows))} ("
        assert places in message
    assert message.endswith("Row 1 is the first below the header.")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["minimum", "run", "learning_rate", "batch_size", "steps", "escaped"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_missing_required_column_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    path = write(good_table().drop(columns=name), tmp_path / f"t{suffix}")
    with pytest.raises(InputError, match=rf"t{suffix}: required column '{name}' missing"):
        read_measurements(path)


def test_a_misspelt_column_is_suggested(tmp_path: Path) -> None:
    path = write(good_table().rename(columns={"learning_rate": "Learning Rate"}), tmp_path / "t.csv")
    with pytest.raises(InputError, match="'learning_rate' \\(is 'Learning Rate' meant\\?\\)"):
        read_measurements(path)


HEADER = b"minimum,run,learning_rate,batch_size,steps,escaped\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("empty.parquet", b"", "the file is empty"),
        ("header.csv", HEADER, "no rows"),
        ("semicolons.csv", HEADER.replace(b",", b";") + b"a;1;0.1;8;5;true\n", "commas"),
        ("bytes.csv", bytes(range(256)) * 20, "cannot be read|not a readable|missing"),
        ("not.parquet", b"minimum,run\n1,2\n", "cannot be read as a parquet table"),
        ("sheet.xlsx", b"PK", "a .csv or .parquet file"),
        ("double.csv", b"run," + HEADER + b"1,a,1,0.1,8,5,true\n", "duplicate column 'run'"),
        ("short.csv", HEADER + b"a,1,.1,8,5,true\na,2,.1\n", "row 2: 3 fields where the header has 6"),
        ("latin.csv", HEADER + "é,1,.1,8,5,true\n".encode("latin-1"), "utf-8"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_name(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_measurements(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_measurements(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_measurements(tmp_path)
    with pytest.raises(InputError, match="not int"):
        read_measurements(3)  # type: ignore[arg-type]


def test_csv_parquet_and_frame_give_the_same_table(tmp_path: Path) -> None:
    table = good_table()
    results = [read_measurements(write(table, tmp_path / name)) for name in ("t.csv", "t.parquet")]
    results.append(read_measurements(table))
    for other in results[1:]:
        pd.testing.assert_frame_equal(results[0], other, check_flags=False)


def test_defaults_are_filled_in_and_types_are_settled() -> None:
    table = good_table()[["minimum", "run", "learning_rate", "batch_size", "steps", "escaped"]]
    result = read_measurements(table)
    assert result["check_interval"].unique().tolist() == [1]
    assert result["barrier"].unique().tolist() == ["saddle"]
    assert result["start"].unique().tolist() == ["minimum"]
    assert result[["loss_minimum", "loss_barrier_se"]].isna().all(axis=None)
    assert [result[name].dtype for name in ("learning_rate", "batch_size", "steps", "escaped")] == [
        np.dtype(kind) for kind in ("float64", "int64", "int64", "bool")
    ]


def test_empty_cells_of_optional_columns_take_the_default(tmp_path: Path) -> None:
    table = changed("check_interval", [2], None).assign(barrier=["saddle", None] * 4, start=None)
    for path in (
        write(table, tmp_path / "t.csv"),
        write(table.astype({"check_interval": float}), tmp_path / "t.parquet"),
    ):
        result = read_measurements(path)
        assert result["check_interval"].tolist() == [10, 1, 10, 10, 10, 10, 10, 10]
        assert set(result["barrier"]) == {"saddle"}
        assert set(result["start"]) == {"minimum"}


@pytest.mark.parametrize(
    "flags",
    [
        ["true", "false"],
        ["TRUE", "False"],
        ["tRuE", " false "],
        ["1", "0"],
        [1, 0],
        [1.0, 0.0],
        [True, False],
        ["True", 0],
    ],
)
def test_every_spelling_of_a_boolean_is_read(flags: list[Any], tmp_path: Path) -> None:
    table = good_table().assign(escaped=pd.Series(flags * 4, dtype=object))
    for given_table in (table, write(table, tmp_path / "t.csv")):
        assert read_measurements(given_table)["escaped"].tolist() == [True, False] * 4


def test_numbers_in_scientific_notation_and_nullable_types_are_read(tmp_path: Path) -> None:
    text = "minimum,run,learning_rate,batch_size,steps,escaped\n1,007,5e-2,8.0,1e3,true\n1,8,5e-2,8,20,0\n"
    (tmp_path / "t.csv").write_text(text)
    result = read_measurements(tmp_path / "t.csv")
    assert result["steps"].tolist() == [1000, 20]
    assert result["minimum"].tolist() == ["1", "1"]
    nullable = good_table().convert_dtypes()
    assert read_measurements(nullable)["steps"].tolist() == good_table()["steps"].tolist()
    arrow = good_table().convert_dtypes(dtype_backend="pyarrow")
    assert read_measurements(arrow)["escaped"].tolist() == good_table()["escaped"].tolist()


def test_other_columns_are_kept_and_ignored(tmp_path: Path) -> None:
    table = good_table().assign(note="hand made", when=pd.Timestamp("2026-11-24"), wild=[1, "x", 2, 3, 4, 5, 6, 7])
    result = read_measurements(table)
    assert result["note"].unique().tolist() == ["hand made"]
    assert result["wild"].tolist() == [1, "x", 2, 3, 4, 5, 6, 7]
    assert "wild" in read_measurements(write(table, tmp_path / "t.csv")).columns


def test_a_table_with_one_escape_is_accepted() -> None:
    assert read_measurements(good_table().assign(escaped=[True] + [False] * 7))["escaped"].sum() == 1


def test_the_digest_is_that_of_the_file_and_changes_with_the_content(tmp_path: Path) -> None:
    path = write(good_table(), tmp_path / "t.csv")
    result = read_measurements(path)
    assert result.attrs["path"] == str(path)
    assert result.attrs["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    frames = [read_measurements(good_table()), read_measurements(good_table().assign(steps=17))]
    assert frames[0].attrs["sha256"] != frames[1].attrs["sha256"]
    assert frames[0].attrs["sha256"] == read_measurements(good_table()).attrs["sha256"]


def test_a_checked_table_keeps_its_origin_and_a_changed_one_is_checked_again(tmp_path: Path) -> None:
    result = read_measurements(write(good_table(), tmp_path / "t.csv"))
    assert is_checked(result)
    assert read_measurements(result).attrs["sha256"] == result.attrs["sha256"]
    shorter = result[result["minimum"] == "m1"]
    assert not is_checked(shorter)
    assert read_measurements(shorter).attrs["sha256"] != result.attrs["sha256"]
    with pytest.raises(InputError, match=r"t\.csv: column 'steps'"):
        read_measurements(result.assign(steps=-1))


def test_the_table_that_was_given_is_not_changed(tmp_path: Path) -> None:
    table = good_table()
    copy = table.copy(deep=True)
    result = read_measurements(table)
    result.loc[0, "learning_rate"] = 99.0
    result.loc[0, "steps"] = 99
    pd.testing.assert_frame_equal(table, copy)
    from_file = read_measurements(write(table, tmp_path / "t.parquet"))
    from_file.loc[0, "steps"] = 7
    assert from_file["steps"].iloc[0] == 7


def test_a_ramp_is_a_run_with_several_rows_and_gaps_of_a_slot_are_not() -> None:
    ramp = as_ramp([False, False, True])
    assert ramp_codes(read_measurements(ramp))[0].tolist() == [True] * 3 + [False] * 5
    gaps = as_ramp([True, True, False]).assign(start="quasi_stationary")
    assert not ramp_codes(read_measurements(gaps))[0].any()
    other_barriers = as_ramp([True, True, True]).assign(loss_barrier=np.linspace(4e-3, 5e-3, 8))
    assert not ramp_codes(read_measurements(other_barriers))[0].any()


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["m1", "8", "0.1", "true", "saddle", "threshold", "quasi_stationary", "inf", "NaN", ""]),
    st.dates(),
    st.lists(st.integers(), max_size=2),
)
NAMES = [*good_table().columns, "loss_barrier_se", "note"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_cells_give_a_table_or_a_message_and_nothing_else(data: st.DataObject) -> None:
    table = good_table().astype(object)
    for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=4)):
        cells = data.draw(st.lists(CELLS, min_size=8, max_size=8))
        rows = data.draw(st.sets(st.integers(0, 7)))
        column = table[name].tolist() if name in table else [None] * 8
        table[name] = pd.Series([cells[i] if i in rows else column[i] for i in range(8)], dtype=object)
    if data.draw(st.booleans()):
        table = table.infer_objects()
    try:
        result = read_measurements(table)
    except InputError as error:
        assert str(error).startswith("<data frame>: ")
    else:
        assert is_checked(result)
        assert result["escaped"].any()
        assert (result["learning_rate"] > 0).all()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    noise=st.text(alphabet="01.,-e\n\"' trufalsmn;é\x00", max_size=60) | st.binary(max_size=40),
    place=st.integers(0, 120),
    whole=st.booleans(),
)
def test_random_bytes_in_a_file_give_a_table_or_a_message(
    noise: str | bytes, place: int, whole: bool, tmp_path: Path
) -> None:
    content = b"minimum,run,learning_rate,batch_size,steps,escaped\nm1,1,0.1,8,50,true\nm1,2,0.1,8,70,false\n"
    raw = noise if isinstance(noise, bytes) else noise.encode()
    path = tmp_path / "t.csv"
    path.write_bytes(raw if whole else content[:place] + raw + content[place:])
    try:
        assert is_checked(read_measurements(path))
    except InputError as error:
        assert str(error).startswith(str(path))
