"""What the tables of all our files are made of: kinds of values, and a section that is frozen, strict and closed."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

SLUG = r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$"
SHA256 = r"^([0-9a-f]{64})?$"
PROXY = r"^(http://[A-Za-z0-9.:\[\]_-]+:[0-9]{1,5}/?)?$"
LINE = r"^[^\x00-\x1f\x7f]*$"
TARGET = r"^[A-Za-z0-9_.]+$|^all-linear$"
REGION = r"^[A-Z]{2}$"
PATTERNS = {
    SLUG: "1 to 64 of a-z, 0-9 and -, with no - at either end",
    SHA256: "64 digits of 0-9 and a-f, or empty",
    PROXY: "http://host:port, without name and password and without TLS to the proxy itself, or empty",
    LINE: "one line without control characters",
    TARGET: '"all-linear" or the name of a module',
    REGION: 'a country as two capitals, such as "DE"',
}

Slug = Annotated[str, Field(pattern=SLUG)]
Sha256 = Annotated[str, Field(pattern=SHA256)]
Line = Annotated[str, Field(pattern=LINE, max_length=4096)]
RequiredLine = Annotated[str, Field(pattern=LINE, min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
PositiveCount = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=2_592_000)]
MAX_MESSAGE_MIB = 2047  # of one message, at both ends; on its way it goes in pieces
Mebibytes = Annotated[int, Field(ge=1, le=MAX_MESSAGE_MIB)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def refuse_look_alikes(value: object) -> object:
    """Tell 1 from true and 1.0, which Python holds to be equal."""
    if type(value) is not int:
        raise ValueError("must be the whole number 1")
    return value


def is_positive(table: Mapping[str, object], key: str) -> bool:
    """Whether an unchecked table holds a whole number over 0 under `key`."""
    value = table.get(key)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _frozen(value: object) -> object:
    """Let a TOML array be a tuple, so that a config can be hashed."""
    return tuple(value) if isinstance(value, list) else value


def _array(value: object, info: ValidationInfo) -> object:
    """A TOML array as a tuple; who wrote one text with commas reads the array to write instead."""
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",") if item.strip()]
        raise ValueError(f"must be an array: {info.field_name} = {json.dumps(items, ensure_ascii=False)}")
    if not isinstance(value, list | tuple):
        raise ValueError(f'must be an array, as in {info.field_name} = ["..."]')
    return tuple(value)


def _each_once(items: tuple[object, ...]) -> tuple[object, ...]:
    if repeated := [item for number, item in enumerate(items) if item in items[:number]]:
        raise ValueError(f'names "{repeated[0]}" twice; write it once')
    return items


class FrozenDict(dict[str, Any]):
    """A table that can be hashed, as all in a section must be; typed as a Mapping, so that nothing changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _site_table(value: object, info: ValidationInfo) -> object:
    """A table of sites; who wrote one text with commas and equal signs reads the lines to write instead."""
    if isinstance(value, dict):
        return value
    pairs = [part.partition("=")[::2] for part in value.strip("{ }").split(",")] if isinstance(value, str) else []
    shown = {site.strip(): text.strip('" ') for site, text in pairs} or {"SITE": "VALUE"}
    lines = [
        f"{info.field_name}.{site} = {text if text.isdecimal() else json.dumps(text)}" for site, text in shown.items()
    ]
    raise ValueError(f"must be a table, with one line for each site: {', '.join(lines)}")


T = TypeVar("T", bound=BaseModel)
Item = TypeVar("Item")
Array = Annotated[tuple[Item, ...], BeforeValidator(_array), AfterValidator(_each_once)]  # of texts, each once
OfSites = Annotated[Mapping[Slug, Item], BeforeValidator(_site_table), AfterValidator(FrozenDict)]
Tables = Annotated[tuple[T, ...], BeforeValidator(_frozen)]  # an array of tables: [[section.name]] in the file


class Section(BaseModel):
    """What all tables of both files share: frozen, strict, closed, finite numbers only."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
