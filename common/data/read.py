"""A site's data, from a file, a folder or a `datasets` id, as rows in one form.

Three shapes are known: columns for instruction, input and output; `messages`; `prompt` and `completion`. Messages of
errors name files, rows, columns and types, and never hold what is in a field.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from common.data import files, hub, preference_rows, shapes
from common.data.files import Located
from common.data.problems import Problems, UnusableError
from common.errors import DataError
from common.rows import Columns, Row

MAX_LINE_BYTES: Final = 16 << 20
ID_COLUMN: Final = "id"
T = TypeVar("T")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read(source: str, *, columns: Columns, max_line_bytes: int = MAX_LINE_BYTES) -> list[Row]:
    """Read a data set as rows.

    Args:
        source: A .jsonl, .json, .csv or .parquet file; a folder, of which every such file is read, by name and without
            its subfolders, so a test file does not belong there; a folder made by `datasets.save_to_disk`; or, where
            no such path exists, a `datasets` id, of which the split "train" is read.
        columns: Which columns hold what.
        max_line_bytes: A longer line of JSONL or CSV is refused before it is in memory.

    Returns:
        The rows in order.

    Raises:
        DataError: The source is missing, empty or not readable, or rows are unusable: the first five are named.
    """
    located = locate(source, max_line_bytes)
    return _to_rows(located, columns, source=source)


def read_table(
    source: str, *, columns: Columns | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> list[dict[str, Any]]:
    """Read a data set as it is, with all its columns.

    Args:
        source: As for `read`.
        columns: If given, every row must fit them, as for `read`; problems are named by file and line.
        max_line_bytes: As for `read`.

    Returns:
        Column names and values of each row, in order.

    Raises:
        DataError: The source is missing, empty or not readable, or a row does not fit `columns`.
    """
    located = locate(source, max_line_bytes)
    if columns is not None:
        _to_rows(located, columns, source=source)
    return [row.fields for row in located]


def to_rows(table: Sequence[Mapping[str, Any]], columns: Columns) -> list[Row]:
    """Bring a table into one form.

    Args:
        table: Column names and values of each row, all of one shape.
        columns: Which columns hold what.

    Returns:
        The rows in order, called "row 1" and so on.

    Raises:
        DataError: The columns fit no shape, or rows are unusable: the first five are named.
    """
    located = [Located(f"row {number}", dict(fields)) for number, fields in enumerate(table, start=1)]
    return _to_rows(located, columns, source="the data")


def locate(source: str, max_line_bytes: int = MAX_LINE_BYTES) -> list[Located]:
    """Read a data set as it is, each row with its place; whether its columns fit a shape is not looked at.

    Args:
        source: As for `read`.
        max_line_bytes: As for `read`.

    Returns:
        The rows in order, at least one.

    Raises:
        DataError: The source is missing, empty or not readable.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = hub.load_folder(path) if hub.is_saved(path) else _read_folder(path, max_line_bytes)
    elif path.exists():
        rows = files.read_file(path, max_line_bytes=max_line_bytes)
    elif path.suffix.lower() in files.READERS or not _HUB_ID.fullmatch(source):
        raise DataError(f"{source}: no such file or folder: correct the path (data.path; data.source in a simulation)")
    else:
        rows = hub.load(source)
    if not rows:
        raise DataError(f"{source}: has no rows: name a file or folder that does")
    return rows


def scan(located: Sequence[Located], columns: Columns, *, source: str) -> tuple[list[Row], Problems]:
    """Normalise the rows that can be, and tell which cannot.

    Args:
        located: Rows as they were read.
        columns: Which columns hold what.
        source: What messages call the data set.

    Raises:
        DataError: The columns fit no shape, or all rows can be used and ids occur more than once.
    """
    names = {name for row in located for name in row.fields}
    choose = shapes.choose if columns.objective == "sft" else preference_rows.choose
    convert = choose(names, columns, source=source)
    rows, problems = _sort(located, lambda row: convert(row.fields, columns=columns, place=row.place))
    if columns.unit != ID_COLUMN and not problems.found:
        _refuse_duplicate_ids(located)
    return rows, problems


def convert_all(located: Sequence[Located], convert: Callable[[Located], T]) -> list[T]:
    """Every row converted, or a refusal that names the first that cannot be.

    Args:
        located: Rows as they were read.
        convert: Raises `UnusableError` for a row that it cannot use.

    Raises:
        DataError: Some are unusable.
    """
    rows, problems = _sort(located, convert)
    problems.raise_if_any()
    return rows


def _sort(located: Sequence[Located], convert: Callable[[Located], T]) -> tuple[list[T], Problems]:
    """Every row converted, and those that cannot be."""
    rows: list[T] = []
    problems = Problems()
    for row in located:
        try:
            rows.append(convert(row))
        except UnusableError as error:
            problems.add(row.place, error)
    return rows, problems


def _read_folder(folder: Path, max_line_bytes: int) -> list[Located]:
    """Every readable file of a folder, by name; hidden ones aside."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in files.READERS and not p.name.startswith("."))
    if not paths:
        raise DataError(f"{folder}: holds no {', '.join(files.READERS)} file (subfolders are not read)")
    return [row for path in paths for row in files.read_file(path, max_line_bytes=max_line_bytes)]


def _to_rows(located: Sequence[Located], columns: Columns, *, source: str) -> list[Row]:
    """Normalise every row, or refuse the data set with its first problems."""
    rows, problems = scan(located, columns, source=source)
    problems.raise_if_any()
    return rows


def _refuse_duplicate_ids(located: Sequence[Located]) -> None:
    """Two rows with one id are most often a file that was put together twice."""
    ids = [str(row.fields[ID_COLUMN]) if row.fields.get(ID_COLUMN) is not None else None for row in located]
    counts = Counter(value for value in ids if value is not None)
    repeated = [value for value, count in counts.items() if count > 1]
    if repeated:
        places = [row.place for row, value in zip(located, ids, strict=True) if value == repeated[0]][:5]
        raise DataError(
            f"{', '.join(places)}: have the same {ID_COLUMN!r}; {len(repeated)} ids occur more than once: remove the "
            f'duplicates, or set data.unit_column = "{ID_COLUMN}" if the column names the patient or customer'
        )
