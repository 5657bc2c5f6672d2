"""Which tables a schema has, read off its types: nested ones, arrays of them, and those that come in variants."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Key = tuple[str, ...]
Variants = Mapping[str, type[BaseModel]]
_ONLY: Final = ""


@dataclass(frozen=True)
class Table:
    """One table of a file.

    Attributes:
        path: Its dotted path; empty for the top of the file.
        variants: Its schema, by the value of `tag`; under "" where it has one form only.
        tag: The setting that says which variant it is; empty where it has one form only.
        default: The variant that it is where nothing is said; empty where that must be said.
        is_array: Whether a file has any number of them, `[[path]]`.
    """

    path: str
    variants: Variants
    tag: str = ""
    default: str = ""
    is_array: bool = False

    def variant_of(self, written: Mapping[str, Any]) -> str:
        """The variant that a table asks for; where it names none, the one that has most of its keys."""
        named = written.get(self.tag, self.default) if self.tag else _ONLY
        if isinstance(named, str) and named in self.variants:
            return named
        return max(self.variants, key=lambda name: len(written.keys() & self.variants[name].model_fields.keys()))

    def takers(self, name: str) -> list[str]:
        """The variants that have a setting."""
        return [variant for variant, schema in self.variants.items() if name in schema.model_fields]

    @property
    def names(self) -> list[str]:
        """All settings and tables in it, each once."""
        return list(dict.fromkeys(name for schema in self.variants.values() for name in schema.model_fields))


@functools.cache
def tables_of(schema: type[BaseModel]) -> Mapping[str, Table]:
    """All tables of a file, by dotted path, each before those in it; the top of the file is ""."""
    return {table.path: table for table in (Table("", {_ONLY: schema}), *_inner(schema, ""))}


def keys_of(schema: type[BaseModel]) -> tuple[str, ...]:
    """The dotted keys of a file, in the order of its schema, without those of tables in arrays."""
    tables = tables_of(schema)
    keys = (join(table.path, name) for table in tables.values() if not table.is_array for name in table.names)
    return tuple(key for key in keys if key not in tables)


def path_of(loc: tuple[int | str, ...], tables: Mapping[str, Table]) -> Key:
    """A pydantic location as a key: what is in an array is counted from 1, and the names of variants are left out."""
    key: list[str] = []
    path, is_variant_next = "", False
    for part in loc:
        if isinstance(part, int):
            key.append(str(part + 1))
        elif is_variant_next:
            is_variant_next = False
        elif part != "[key]":
            key.append(part)
            path = join(path, part)
            is_variant_next = path in tables and tables[path].tag != ""
    return tuple(key)


def path_without_numbers(key: Key) -> str:
    """The dotted path of a key, the numbers of tables left out.

    Example:
        >>> path_without_numbers(("evaluation", "tasks", "2", "kind"))
        'evaluation.tasks.kind'
    """
    return ".".join(part for part in key if not part.isdecimal())


def join(path: str, name: str) -> str:
    """A dotted key."""
    return f"{path}.{name}" if path else name


def _inner(schema: type[BaseModel], path: str) -> Iterator[Table]:
    """The tables in a table, each followed by those in it."""
    for name, field in schema.model_fields.items():
        item = get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else None
        tag, variants = _variants(item or field.annotation, field.discriminator)
        if variants:
            default = getattr(_default(field), tag) if tag and not item and not field.is_required() else ""
            yield Table(join(path, name), variants, tag, default, is_array=item is not None)
            for inner in dict.fromkeys(variants.values()):
                yield from _inner(inner, join(path, name))


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _variants(kind: Any, discriminator: Any) -> tuple[str, Variants]:
    """The setting that tells variants apart, and their schemas; nothing for what is no table."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        discriminator = next((field.discriminator for field in more if isinstance(field, FieldInfo)), discriminator)
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if not all(isinstance(member, type) and issubclass(member, BaseModel) for member in members):
        return "", {}
    tag = str(discriminator or "")
    if not tag:
        return "", {_ONLY: kind}
    return tag, {name: member for member in members for name in get_args(member.model_fields[tag].annotation)}
