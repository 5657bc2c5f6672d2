"""Rows out of one file: JSON Lines, JSON, CSV, TSV or Parquet, by its extension.

A file is refused as a whole; the message lists the first unusable rows and never quotes them.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from common import extras
from common.data.problems import Problems, UnusableError

MAX_JSON_BYTES: Final = 512 << 20
PACKED: Final = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
SHEETS: Final = (".xls", ".xlsx", ".ods")
UTF8_BOM: Final = b"\xef\xbb\xbf"
UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
TO_UTF8: Final = "convert the file with `iconv -f WINDOWS-1252 -t UTF-8`, or -f whatever it was written in"
TO_COMMAS: Final = "separate fields by commas and put fields with commas, quotes or line breaks between double quotes"
TO_TABS: Final = "separate fields by tabs and put fields with tabs, quotes or line breaks between double quotes"
TO_JSON: Final = "write JSON objects, one per line in a .jsonl file or as one list in a .json file"


@dataclass(frozen=True)
class Located:
    """One row and where it was read.

    Attributes:
        place: Such as "train.jsonl line 12"; holds no field's value, and no other row of the data set has it.
        fields: Column names and values.
        file: The file's name; "" for rows that come from none.
    """

    place: str
    fields: dict[str, Any]
    file: str = ""


def scan_file(path: Path, *, max_line_bytes: int, problems: Problems) -> list[Located]:
    """Read what can be read of a file, and note what cannot.

    Args:
        problems: Gets every unusable row, and the file if it is unusable as a whole.

    Returns:
        The rows that can be used, in the file's order.
    """
    try:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise unknown(path)
        return reader(path, max_line_bytes, problems)
    except UnusableError as error:
        problems.add(str(path), error)
    except OSError as error:
        what = f"cannot be read ({error.strerror or 'it is damaged'})"
        problems.add(str(path), UnusableError(what, "check the file and its permissions"))
    return []


def unknown(path: Path) -> UnusableError:
    """What is wrong with a file whose extension is in no table, and what its owner can do."""
    suffix = path.suffix.lower()
    known = f"give one of {', '.join(READERS)}, or a folder of them"
    remedies = dict.fromkeys(PACKED, f"unpack {path.name} and {known}")
    remedies |= dict.fromkeys(SHEETS, f"save the sheet as CSV (UTF-8), and {known}")
    remedy = remedies.get(suffix, f"{known}; a file that holds no rows does not belong into a folder of data")
    return UnusableError(f"unknown kind of file ({suffix or 'no extension'})", remedy)


def _read_jsonl(path: Path, max_line_bytes: int, problems: Problems) -> list[Located]:
    """One JSON object per line."""
    rows = []
    for number, offset, line in _lines(path, max_line_bytes, problems):
        place = f"{path.name} line {number}"
        try:
            text = _decode(line, offset=offset)
            if text.strip():
                rows.append(Located(place, _object(_parse(text)), path.name))
        except UnusableError as error:
            problems.add(place, error)
    return rows


def _read_json(path: Path, max_line_bytes: int, problems: Problems) -> list[Located]:
    """One list of objects; `max_line_bytes` does not apply, such a list may well be one line."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_JSON_BYTES:
        raise UnusableError(f"{size_bytes} bytes, over the limit of {MAX_JSON_BYTES} for JSON", "write .jsonl instead")
    _refuse_utf16(path)
    content = path.read_bytes()
    body = content.removeprefix(UTF8_BOM)
    try:
        text = _decode(body, offset=len(content) - len(body))
        values = _parse(text) if text.strip() else []
        if not isinstance(values, list):
            raise UnusableError(f"it holds one {type(values).__name__}, not a list", TO_JSON)
    except UnusableError as error:
        problems.add(path.name, error)
        return []
    rows = []
    for number, value in enumerate(values, start=1):
        place = f"{path.name} row {number}"
        try:
            rows.append(Located(place, _object(value), path.name))
        except UnusableError as error:
            problems.add(place, error)
    return rows


def _read_table(path: Path, max_line_bytes: int, problems: Problems, *, mark: str) -> list[Located]:
    """Fields with a mark between them, under a line of column names."""
    lines, num_before = [], len(problems.found)
    for number, offset, line in _lines(path, max_line_bytes, problems):
        try:
            lines.append(_decode(line, offset=offset))
        except UnusableError as error:
            problems.add(f"{path.name} line {number}", error)
    if len(problems.found) > num_before:
        return []  # with a line missing, quotes may pair up otherwise, and every later message would be wrong
    before = csv.field_size_limit(max_line_bytes)  # a field may be as long as a line; csv's own limit is 128 KiB
    try:
        return _table_rows(path.name, lines, problems, mark=mark)
    finally:
        csv.field_size_limit(before)


def _table_rows(name: str, lines: list[str], problems: Problems, *, mark: str) -> list[Located]:
    """Pair each record with the column names; a record is called by the line where it begins."""
    rows = []
    records = csv.reader(lines, delimiter=mark, strict=True)
    remedy = TO_COMMAS if mark == "," else TO_TABS
    try:
        header = _header(next(records, []), mark=mark, remedy=remedy)
        first_line = records.line_num + 1
        for record in records:
            place, first_line = f"{name} line {first_line}", records.line_num + 1
            if record and len(record) != len(header):
                what = f"has {len(record)} fields under {len(header)} column names"
                problems.add(place, UnusableError(what, remedy))
            elif record:
                rows.append(Located(place, dict(zip(header, record, strict=True)), name))
    except csv.Error:
        problems.add(f"{name} line {records.line_num}", UnusableError("is not valid CSV", remedy))
    except UnusableError as error:
        problems.add(f"{name} line 1", error)
    return rows


def _header(record: list[str], *, mark: str, remedy: str) -> list[str]:
    """The column names, once they can be told apart."""
    names = [name.strip() for name in record]
    if len(names) == 1 and any(other in names[0] for other in ",;\t|".replace(mark, "")):
        expected = "a comma" if mark == "," else "a tab"
        raise UnusableError(f"names one column only and looks separated by another mark than {expected}", remedy)
    if len(set(names)) < len(names):
        raise UnusableError("names a column twice", "give every column a name of its own")
    return names


def _read_parquet(path: Path, max_line_bytes: int, problems: Problems) -> list[Located]:
    """Rows of a Parquet file; it has no lines, so `max_line_bytes` does not apply, and no row is bad by itself."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        what = "reading Parquet needs `pyarrow`"
        raise UnusableError(what, f"use .jsonl, or install it with: {extras.install('client')}") from error

    try:
        with parquet.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):  # a row would keep the last value
                raise UnusableError("names a column twice", "give every column a name of its own")
            table = [fields for batch in file.iter_batches(batch_size=1024) for fields in batch.to_pylist()]
    except (pyarrow.ArrowException, UnicodeDecodeError):  # whose text may quote a value
        what = "is not a readable Parquet file"
        raise UnusableError(what, "write it again, for example with pandas") from None
    return [Located(f"{path.name} row {number}", fields, path.name) for number, fields in enumerate(table, start=1)]


READERS: Final[Mapping[str, Callable[[Path, int, Problems], list[Located]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_table, mark=","),
    ".tsv": partial(_read_table, mark="\t"),
    ".parquet": _read_parquet,
}


def _lines(path: Path, max_line_bytes: int, problems: Problems) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in the file and bytes of each line, without ever holding more than the limit."""
    _refuse_utf16(path)
    with path.open("rb") as file:
        number, offset = 0, 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            if len(line) > max_line_bytes:
                what = f"over the limit of {max_line_bytes} bytes a line"
                remedy = "write one row per line, and shorten or split rows that are longer"
                problems.add(f"{path.name} line {number}", UnusableError(what, remedy))
                return
            body = line.removeprefix(UTF8_BOM) if number == 1 else line
            yield number, offset + len(line) - len(body), body
            offset += len(line)


def _refuse_utf16(path: Path) -> None:
    """Name the encoding that Windows programs call Unicode, instead of an error in every line."""
    with path.open("rb") as file:
        if file.read(2) in UTF16_BOMS:
            raise UnusableError("is UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`")


def _decode(content: bytes, *, offset: int) -> str:
    """UTF-8 without NUL; `offset` is where the bytes begin in the file."""
    if (nul := content.find(b"\0")) >= 0:
        raise UnusableError(f"has a NUL byte at byte {offset + nul}", "remove it; the file may be damaged or UTF-16")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableError(f"is not UTF-8 at byte {offset + error.start}", TO_UTF8) from None


def _parse(text: str) -> Any:
    """JSON in which every key is there once and every number is finite."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnusableError:
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise UnusableError(f"is not valid JSON at {where}", TO_JSON) from None
    except (ValueError, RecursionError):
        raise UnusableError("is not valid JSON: a number is too long or lists are nested too deeply", TO_JSON) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; the module on its own would keep the last of two values without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise UnusableError("has a key twice", "keep one value for each key")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are not JSON."""
    raise UnusableError("has NaN or Infinity, which JSON does not know", "write null or leave the key out")


def _object(value: Any) -> dict[str, Any]:
    """A row has to be a JSON object."""
    if not isinstance(value, dict):
        raise UnusableError(f"is a {type(value).__name__}, not a JSON object", TO_JSON)
    return value
