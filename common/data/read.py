"""A site's data, from a file, a folder or a `datasets` id, as rows in one form.

Three shapes are known: columns for instruction, input and output; `messages`; `prompt` and `completion`. Messages of
errors name files, rows, columns and types, and never hold what is in a field.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from common import extras
from common.data import files, preference_rows, shapes
from common.data.files import Located
from common.data.problems import Problems, UnusableError
from common.data.rows import Columns, Row
from common.errors import DataError

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

MAX_LINE_BYTES: Final = 16 << 20
ID_COLUMN: Final = "id"
ABOUT_ROWS: Final = ("README", "LICENSE", "LICENCE", "COPYING", "NOTICE", "CITATION", "CHANGELOG", "DATASHEET")
NO_ROWS: Final = ("_SUCCESS", "Thumbs.db", "desktop.ini")  # of Spark and of Windows
S = TypeVar("S")
T = TypeVar("T")
SPLIT: Final = "train"
_SAVED: Final = ("state.json", "dataset_dict.json")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read(source: str, *, columns: Columns, max_line_bytes: int = MAX_LINE_BYTES) -> list[Row]:
    """Read a data set as rows.

    Args:
        source: A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file; a folder, of which every such file is read, by
            name and without what `left_out` names, so a test file does not belong there; a folder made by
            `datasets.save_to_disk`; or, where no such path exists, a `datasets` id, of which the split "train" is read.
        max_line_bytes: A longer line of JSONL or CSV is refused before it is in memory.

    Returns:
        The rows in order. Without a unit column a row's unit is its number in the data set, "row 1" and so on.

    Raises:
        DataError: The source is missing, empty or not readable, or rows are unusable: the first five are named.
    """
    return convert(locate(source, max_line_bytes), columns, source=source)


def read_table(
    source: str, *, columns: Columns | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> list[dict[str, Any]]:
    """Read a data set as it is, with all its columns.

    Args:
        columns: If given, every row must fit them, as for `read`; problems are named by file and line.

    Raises:
        DataError: The source is missing, empty or not readable, or a row does not fit `columns`.
    """
    located = locate(source, max_line_bytes)
    if columns is not None:
        convert(located, columns, source=source)
    return [row.fields for row in located]


def to_rows(table: Sequence[Mapping[str, Any]], columns: Columns) -> list[Row]:
    """Bring a table into one form.

    Returns:
        The rows in order, called "row 1" and so on.

    Raises:
        DataError: The columns fit no shape, or rows are unusable: the first five are named.
    """
    located = [Located(f"row {number}", dict(fields)) for number, fields in enumerate(table, start=1)]
    return convert(located, columns, source="the data")


def locate(source: str, max_line_bytes: int = MAX_LINE_BYTES) -> list[Located]:
    """Read a data set as it is, each row with its place; whether its columns fit a shape is not looked at.

    Returns:
        The rows in order, at least one.

    Raises:
        DataError: The source is missing, empty or not readable.
    """
    problems = Problems()
    rows = gather(source, problems, max_line_bytes=max_line_bytes)
    problems.raise_if_any()
    return rows


def gather(source: str, problems: Problems, *, max_line_bytes: int = MAX_LINE_BYTES) -> list[Located]:
    """Read what can be read of a data set, and note what cannot.

    Args:
        problems: Gets every file and row that cannot be read.

    Returns:
        The rows in order; at least one, unless there are problems.

    Raises:
        DataError: There is nothing of that name, or nothing in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _load_saved(path) if _is_saved(path) else _read_folder(path, max_line_bytes, problems)
    elif path.exists():
        rows = files.scan_file(path, max_line_bytes=max_line_bytes, problems=problems)
    elif path.suffix.lower() in files.READERS or not _HUB_ID.fullmatch(source):
        raise DataError(f"{source}: no such file or folder: correct the path (data.path; data.source in a simulation)")
    else:
        rows = _load_by_id(source)
    if not rows and not problems.found:
        raise DataError(f"{source}: has no rows: name a file or folder that does")
    return rows


def left_out(source: str) -> list[str]:
    """What of a folder of data is never read: hidden files, README, LICENSE and their like, and subfolders.

    Returns:
        Names; none for a file, a folder of `datasets` or an id. Any other file that cannot be read is a problem.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or _is_saved(folder):
        return []
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if _is_left_out(path))


def _is_left_out(path: Path) -> bool:
    """See `left_out`; a file that can be read counts as rows, whatever its name."""
    if path.name.startswith("."):
        return True
    if path.suffix.lower() in files.READERS:
        return False
    return path.is_dir() or path.name in NO_ROWS or path.name.partition(".")[0].upper() in ABOUT_ROWS


def scan(located: Sequence[Located], columns: Columns, *, source: str) -> tuple[list[Row], Problems]:
    """Normalise the rows that can be, and tell which cannot.

    Returns:
        The rows; and the problems, of which the last may be that a file has ids more than once.

    Raises:
        DataError: The columns fit no shape.
    """
    names = {name for row in located for name in row.fields}
    choose = shapes.choose if columns.objective == "sft" else preference_rows.choose
    fit = choose(names, columns, source=source)

    def convert_one(numbered: tuple[int, Located]) -> Row:
        number, row = numbered
        found = fit(row.fields, columns=columns, place=row.place)
        return found if columns.unit else replace(found, unit=f"row {number}")

    rows, problems = _sort(list(enumerate(located, start=1)), convert_one, place=lambda numbered: numbered[1].place)
    if columns.unit != ID_COLUMN:
        _note_duplicate_ids(located, problems)
    return rows, problems


def convert(located: Sequence[Located], columns: Columns, *, source: str) -> list[Row]:
    """Normalise every row, or refuse the data set with its first problems.

    Raises:
        DataError: The columns fit no shape, or rows are unusable: the first five are named.
    """
    rows, problems = scan(located, columns, source=source)
    problems.raise_if_any()
    return rows


def convert_all(located: Sequence[Located], convert: Callable[[Located], T]) -> list[T]:
    """Every row converted, or a refusal that names the first that cannot be.

    Args:
        convert: Raises `UnusableError` for a row that it cannot use.

    Raises:
        DataError: Some are unusable.
    """
    rows, problems = _sort(located, convert, place=lambda row: row.place)
    problems.raise_if_any()
    return rows


def _sort(items: Sequence[S], convert: Callable[[S], T], *, place: Callable[[S], str]) -> tuple[list[T], Problems]:
    """Every row converted, and those that cannot be."""
    rows: list[T] = []
    problems = Problems()
    for item in items:
        try:
            rows.append(convert(item))
        except UnusableError as error:
            problems.add(place(item), error)
    return rows, problems


def _read_folder(folder: Path, max_line_bytes: int, problems: Problems) -> list[Located]:
    """Every file of a folder, by name, but for what `left_out` names; one that cannot be read is a problem."""
    paths = sorted(path for path in folder.iterdir() if not _is_left_out(path))
    if not any(path.suffix.lower() in files.READERS for path in paths):
        others = f"; what it holds is of another kind: {', '.join(path.name for path in paths[:5])}" if paths else ""
        raise DataError(f"{folder}: holds no {', '.join(files.READERS)} file (subfolders are not read){others}")
    return [row for path in paths for row in files.scan_file(path, max_line_bytes=max_line_bytes, problems=problems)]


def _note_duplicate_ids(located: Sequence[Located], problems: Problems) -> None:
    """Two rows of a file with one id are most often a file that was put together twice.

    An id that starts anew in each file is no such thing: a row is known by its file and its place there.
    """
    ids = [(row.file, str(row.fields[ID_COLUMN])) if row.fields.get(ID_COLUMN) is not None else None for row in located]
    counts = Counter(value for value in ids if value is not None)
    repeated = [value for value, count in counts.items() if count > 1]
    if repeated:
        places = [row.place for row, value in zip(located, ids, strict=True) if value == repeated[0]][:5]
        what = f"have the same {ID_COLUMN!r}; {len(repeated)} ids occur more than once in a file"
        remedy = (
            f"remove rows that are there twice; if {ID_COLUMN!r} names the patient or customer, set data.unit_column = "
            f'"{ID_COLUMN}"; if it numbers rows and starts anew, leave the column out or rename it'
        )
        problems.add(", ".join(places), UnusableError(what, remedy))


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` made this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def _load_saved(folder: Path) -> list[Located]:
    """What `datasets.save_to_disk` wrote; of several splits the one called "train"."""
    import datasets

    try:  # its errors are not kept as causes: their text may quote rows
        saved = datasets.load_from_disk(str(folder))
        chosen = saved[SPLIT] if isinstance(saved, datasets.DatasetDict) else saved
        return _numbered(chosen, folder.name)
    except (OSError, ValueError, KeyError):
        raise DataError(f"{folder}: is not a readable saved data set with a split {SPLIT!r}: save it again") from None


def _load_by_id(name: str) -> list[Located]:
    """The split "train" of a data set by its id; HF_HUB_OFFLINE=1 keeps the library to its local cache."""
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise DataError(
            f"{name}: no such file or folder, and `datasets` is not installed to look it up; "
            f"correct the path, or install it with: {extras.install('client')}"
        ) from error
    try:
        return _numbered(datasets.load_dataset(name, split=SPLIT), name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError, HFValidationError) as error:
        raise DataError(
            f"{name}: no such file or folder, and no data set of that id with a split {SPLIT!r} can be loaded "
            f"({type(error).__name__}): correct the path, or download the data set and name its folder"
        ) from None


def _numbered(rows: "datasets.Dataset", name: str) -> list[Located]:
    """Rows with their numbers."""
    return [Located(f"{name} row {number}", fields) for number, fields in enumerate(rows, start=1)]
