"""A measured table from disk: CSV or Parquet, read by Arrow, with the digest of the file."""

import csv
import difflib
import hashlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from escape_inference.errors import InputError
from escape_inference.table_columns import CHOICES, NUMBERS, REQUIRED

_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def load(path: Any) -> tuple[str, str, dict[Any, Any], int]:
    """Name, digest, raw columns and number of rows of a file."""
    try:
        file = Path(path)
    except TypeError:
        raise InputError(f"a table is a path or a pandas.DataFrame, not {type(path).__name__}.") from None
    source = str(path)
    try:
        if file.is_dir():
            raise InputError(f"{source}: is a folder; give the table in it, a .csv or .parquet file.")
        if not file.exists():
            raise InputError(f"{source}: there is no such file.")
        if file.suffix.lower() not in (".csv", ".parquet", ".pq"):
            raise InputError(
                f"{source}: a table is a .csv or .parquet file, not {file.suffix or 'a file without suffix'!r}."
            )
        if file.stat().st_size == 0:
            raise InputError(f"{source}: the file is empty.")
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        arrow = _load_csv(source, file) if file.suffix.lower() == ".csv" else _load_parquet(source, file)
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source}: cannot be read as a {file.suffix.lower()[1:]} table: {_first_line(error)}"
        ) from None
    rows = arrow.num_rows
    return source, sha256, {name: arrow.column(i) for i, name in enumerate(arrow.column_names)}, rows


def _load_csv(source: str, file: Path) -> pa.Table:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream), [])
    check_names(source, header)
    words = dict.fromkeys(("minimum", *CHOICES), _DICTIONARY)
    numbers = dict.fromkeys(NUMBERS, pa.float64())
    for run in (pa.int64(), pa.string()):
        types = {**words, **numbers, "run": run, "escaped": pa.bool_()}
        try:
            return pa.csv.read_csv(file, convert_options=pa.csv.ConvertOptions(column_types=types))
        except pa.ArrowInvalid as error:
            if "conversion error" not in str(error) or "UTF8" in str(error):
                raise _unreadable_rows(source, file, error) from None
    texts = pa.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
    return pa.csv.read_csv(file, convert_options=texts)


def _unreadable_rows(source: str, file: Path, error: Exception) -> InputError:
    """The message for rows of the wrong length, or for whatever else stopped the reader."""
    try:
        with file.open(encoding="utf-8") as stream:
            for _ in stream:
                pass
    except UnicodeDecodeError as other:
        return InputError(f"{source}: the file is not UTF-8 text ({other}); save it as UTF-8.")
    rows: list[Any] = []

    def note(row: Any) -> str:
        rows.append((row.number - 1, row.actual_columns, row.expected_columns))
        return "skip"

    options = {"parse_options": pa.csv.ParseOptions(invalid_row_handler=note)}
    try:
        pa.csv.read_csv(file, read_options=pa.csv.ReadOptions(use_threads=False), **options)
    except pa.ArrowInvalid as other:
        error = other
    if not rows:
        return InputError(f"{source}: not a readable CSV table: {_first_line(error)}")
    numbers = ", ".join(str(number) for number, _, _ in rows[:5])
    more = f" (first 5 of {len(rows)})" if len(rows) > 5 else ""
    return InputError(
        f"{source}: {'row' if len(rows) == 1 else 'rows'} {numbers}{more}: {rows[0][1]} fields where the header has "
        f"{rows[0][2]}. Give every row one field for each column. Row 1 is the first below the header."
    )


def _load_parquet(source: str, file: Path) -> pa.Table:
    schema = pa.parquet.read_schema(file)
    check_names(source, schema.names)
    words = [
        name for name in ("minimum", *CHOICES) if name in schema.names and pa.types.is_string(schema.field(name).type)
    ]
    table = pa.parquet.ParquetFile(file, read_dictionary=words).read()
    return table.select([name for name in table.column_names if not name.startswith("__index_level_")])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def check_names(source: str, names: list[Any]) -> None:
    """Refuse duplicate and missing columns."""
    if isinstance(names, list) and any(isinstance(name, tuple) for name in names):
        raise InputError(f"{source}: the columns have several levels; give plain column names.")
    seen = pd.Index(names, dtype=object)
    double = [str(name) for name in seen[seen.duplicated()].unique()]
    if double:
        raise InputError(f"{source}: duplicate column {', '.join(map(repr, double))}; give each column once.")
    missing = [name for name in REQUIRED if name not in names]
    if not missing:
        return
    texts = [str(name) for name in names]
    if len(texts) == 1 and any(mark in texts[0] for mark in ";\t"):
        raise InputError(f"{source}: the header is not separated by commas; save the table as comma-separated values.")
    lower = {text.strip().lower().replace(" ", "_"): text for text in texts}
    hints = []
    for name in missing:
        close = difflib.get_close_matches(
            name, [text for text in lower if text not in REQUIRED or lower[text] != text], 1, 0.8
        )
        hints.append(f"{name!r}" + (f" (is {lower[close[0]]!r} meant?)" if close else ""))
    raise InputError(
        f"{source}: required column{'s' if len(missing) > 1 else ''} {', '.join(hints)} missing. "
        f"A table needs {', '.join(REQUIRED)}."
    )
