"""One table into the tables of several sites; no privacy unit is at two of them."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np

from common.data import units as unit_names
from common.data.problems import UnusableError
from common.errors import DataError

Fields = dict[str, Any]
How = Literal["column", "iid", "dirichlet"]
WITHOUT_SITES: Final = 'data.partition = "iid" with data.num_sites deals rows out at random where none names a site'


def sites_of(
    table: Sequence[Fields],
    *,
    how: How,
    num_sites: int = 0,
    site_column: str = "site",
    dirichlet_alpha: float = 0.5,
    unit_column: str = "",
    seed: int = 0,
    places: Sequence[str] = (),
) -> list[str]:
    """The site of every row.

    "column": the values of `site_column` are the sites. "iid": units are dealt out at random, as many to each site.
    "dirichlet": sites of equal numbers of units, whose mix of the values of `site_column` is drawn from a Dirichlet
    distribution around the mix of all units; name there the label, topic or natural site whose share shall differ.
    A unit with several values counts under its commonest.

    Args:
        num_sites: Number of sites; under "column" 0, or exactly the number of values.
        site_column: Not used by "iid".
        dirichlet_alpha: Concentration; small makes sites differ, large makes them alike. Only for "dirichlet".
        unit_column: Rows with one value of it stay together; "" lets every row be a unit.
        places: Where each row was read, for messages; () calls rows by their numbers in the table.

    Returns:
        A name for each row, of a-z, 0-9 and "-".

    Raises:
        DataError: A column is missing, a site would be empty, a unit is at two sites, or a name cannot be made.
        ValueError: `dirichlet_alpha` or `num_sites` is out of range.

    Source: Hsu, Qi and Brown 2019, arXiv:1909.06335, section 3: q ~ Dir(alpha p), drawn without replacement.
    """
    if not table:
        raise DataError("there are no rows to give to sites: check data.source")
    places = places or [str(number) for number in range(1, len(table) + 1)]
    if unit_column:
        _refuse_blank(table, unit_column, places, remedy="fill it in or correct data.unit_column")
        units = _in_one_form(table, unit_column, places, of=unit_names.name_of)  # the form that sites know them by
    else:
        units = [f"{number:09d}" for number in range(len(table))]
    if how == "column":
        site_of = _by_column(table, units, column=site_column, num_sites=num_sites, places=places)
        return [site_of[unit] for unit in units]
    num_units = len(set(units))
    if num_sites < 1:
        raise ValueError(f"num_sites is {num_sites}; this partition needs at least 1")
    if num_units < num_sites:
        raise DataError(
            f"{num_units} units are too few for {num_sites} sites: lower data.num_sites, add rows, or check "
            f"data.unit_column ({unit_column!r})"
        )
    rng = np.random.default_rng(seed)
    if how == "iid":
        order = [sorted(set(units))[i] for i in rng.permutation(num_units)]
        groups = [order[k::num_sites] for k in range(num_sites)]
    else:
        # The commonest label of each unit; of equals the first in the alphabet.
        counts: dict[str, Counter[str]] = {}
        for unit, value in zip(units, _site_values(table, site_column, places), strict=True):
            counts.setdefault(unit, Counter())[value] += 1
        labels = {unit: min(seen, key=lambda value: (-seen[value], value)) for unit, seen in sorted(counts.items())}
        groups = _skew(labels, num_sites, dirichlet_alpha, rng)
    width = max(2, len(str(num_sites - 1)))  # names sort like numbers
    site_of = {unit: f"site-{k:0{width}d}" for k, group in enumerate(groups) for unit in group}
    return [site_of[unit] for unit in units]


def without_site(table: Sequence[Fields], column: str) -> list[int]:
    """Which rows have nothing in the column of sites: indices in the table, from 0."""

    def is_blank(value: Any) -> bool:
        return value is None or value != value or not str(value).strip()

    return [number for number, fields in enumerate(table) if is_blank(fields.get(column))]


def site_in(fields: Fields, column: str) -> str:
    """The site that a row names; "" if none."""
    try:
        return _slug(unit_names.form(fields.get(column), column))
    except UnusableError:
        return ""


def _site_values(table: Sequence[Fields], column: str, places: Sequence[str]) -> list[str]:
    """The column of sites or labels as text."""
    _refuse_blank(table, column, places, remedy=f"fill it in or correct data.site_column; {WITHOUT_SITES}")
    return _in_one_form(table, column, places, of=unit_names.form)


def _refuse_blank(table: Sequence[Fields], column: str, places: Sequence[str], *, remedy: str) -> None:
    """A row without a value would belong to nobody."""
    missing = without_site(table, column)
    if missing:
        first = ", ".join(places[number] for number in missing[:5])
        raise DataError(
            f"{len(missing)} of {len(table)} rows have no value in the column {column!r} (rows {first}): {remedy}"
        )


def _in_one_form(
    table: Sequence[Fields], column: str, places: Sequence[str], *, of: Callable[[Any, str], str]
) -> list[str]:
    """A column as names."""
    names = []
    for fields, row_id in zip(table, places, strict=True):
        try:
            names.append(of(fields[column], column))
        except UnusableError as error:
            what = error.what.replace("the unit column", "the column")
            raise DataError(f"row {row_id}: {what}. Remedy: {error.remedy}") from None
    return names


def _by_column(
    table: Sequence[Fields], units: Sequence[str], *, column: str, num_sites: int, places: Sequence[str]
) -> Mapping[str, str]:
    """The site of each unit, as the rows say."""
    values = _site_values(table, column, places)
    slugs = {value: _slug(value) for value in values}
    first_row = dict(zip(reversed(values), reversed(places), strict=True))
    if len(set(slugs.values())) < len(slugs) or not all(slugs.values()):
        counts = Counter(slugs.values())
        clashing = [first_row[value] for value, slug in slugs.items() if not slug or counts[slug] > 1]
        raise DataError(
            f"values of the column {column!r} become the same site name, or none, in a-z, 0-9 and '-' (first in rows "
            f"{', '.join(clashing[:5])}): rename them"
        )
    if num_sites not in (0, len(slugs)):
        raise DataError(
            f"the column {column!r} has {len(slugs)} values and {num_sites} sites are wanted: "
            f"set data.num_sites = 0, or data.partition to iid or dirichlet"
        )
    site_of = {unit: slugs[value] for unit, value in zip(units, values, strict=True)}
    straddling = {unit for unit, value in zip(units, values, strict=True) if site_of[unit] != slugs[value]}
    if straddling:
        first = next(unit for unit in units if unit in straddling)
        triples = zip(units, values, places, strict=True)
        rows = [f"{row_id} ({slugs[value]})" for unit, value, row_id in triples if unit == first]
        raise DataError(
            f"{len(straddling)} of {len(site_of)} units have rows at several sites, one of them in rows "
            f"{rows[0]} to {rows[-1]}: make the values of data.unit_column differ between sites, as each site protects "
            "its own"
        )
    return site_of


def _slug(value: str) -> str:
    """A site name of a-z, 0-9 and "-"; empty if nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:64].strip("-")


def _skew(labels: Mapping[str, str], num_sites: int, alpha: float, rng: np.random.Generator) -> list[list[str]]:
    """Units for each site, by a mix of labels of its own."""
    if not alpha > 0:
        raise ValueError(f"dirichlet_alpha is {alpha}, not positive")
    names = sorted(set(labels.values()))
    pools = [[unit for unit, label in labels.items() if label == name] for name in names]
    pools = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools]
    prior_l = np.array([len(pool) for pool in pools]) / len(labels)
    sizes = [len(labels) // num_sites + (k < len(labels) % num_sites) for k in range(num_sites)]
    groups: list[list[str]] = []
    for size in sizes:
        mix_l = rng.dirichlet(alpha * prior_l)
        group: list[str] = []
        for _ in range(size):  # a pool that is used up gives its share to the others
            left_l = np.array([len(pool) for pool in pools])
            share_l = mix_l * (left_l > 0)
            if not share_l.sum() > 0:
                share_l = left_l.astype(np.float64)
            group.append(pools[rng.choice(len(pools), p=share_l / share_l.sum())].pop())
        groups.append(group)
    return groups
