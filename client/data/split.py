"""Training and held-out rows; no privacy unit is in both, and no text where privacy allows it."""

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence

from common.data import near, overlap
from common.data.rows import Row
from common.errors import DataError
from common.run import config
from common.run.schema.privacy import PrivacyConfig

Sides = tuple[list[Row], list[Row]]  # to train on, and held out
Unit = tuple[str, str]  # a site and a unit of it


def split(
    rows: Sequence[Row],
    *,
    held_out_fraction: float,
    seed: int,
    site: str = "",
    keeps_texts: bool = True,
    secret: bytes | None = None,
) -> Sides:
    """Keep a share of the units of one site for evaluation; see `split_sites`.

    Example:
        >>> rows = [Row((), unit=f"patient-{i // 2}", row_id=f"row {i}") for i in range(8)]
        >>> train, held_out = split(rows, held_out_fraction=0.25, seed=1)
        >>> len(train), len({row.unit for row in held_out})
        (6, 1)
    """
    return split_sites(
        {site: rows}, held_out_fraction=held_out_fraction, seed=seed, keeps_texts=keeps_texts, secret=secret
    )[site]


def split_sites(
    sites: Mapping[str, Sequence[Row]],
    *,
    held_out_fraction: float,
    seed: int,
    keeps_texts: bool = True,
    secret: bytes | None = None,
) -> dict[str, Sides]:
    """Keep a share of each site's units for evaluation.

    Units are ordered by a hash of seed, or secret, and name, and the first of them are held out: the order of rows
    plays no part. Units that have a text in common, at one site or at several, go to one side together, in the order
    of the first of them; those that would take more than the share of a site are trained on.

    Args:
        sites: Rows by site, of at least two units each.
        held_out_fraction: Share of units to hold out, between 0 and 1; rounded, but at least one and not all of them.
        seed: Chooses which.
        keeps_texts: Whether texts go to one side; else only units do.
        secret: The site's own (`client.agent.process.split_secret`), which chooses in the place of the seed: who offers
            a run then neither knows nor chooses who is held out.

    Returns:
        By site, rows to train on and rows held out, each in the order given.

    Raises:
        DataError: A site has fewer than two units, or all of its units have texts in common.
        ValueError: The fraction is not between 0 and 1.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}, not between 0 and 1")
    num_units = {site: len({row.unit for row in rows}) for site, rows in sites.items()}
    for site, count in num_units.items():
        if count < 2:
            raise DataError(
                f"{_named(site)}{_shown(sites[site])} are of {count} unit and cannot be split into training and "
                f"held-out rows (data.held_out_fraction = {held_out_fraction:g}): add rows of other patients, or check "
                "data.unit_column"
            )
    wanted = {site: min(max(round(held_out_fraction * count), 1), count - 1) for site, count in num_units.items()}
    bundles = _bundles(sites, keeps_texts=keeps_texts)
    bundles.sort(key=lambda bundle: min((_rank(unit, seed, secret), site) for site, unit in bundle))
    counts = [Counter(site for site, _ in bundle) for bundle in bundles]
    chosen: dict[str, set[str]] = {site: set() for site in sites}
    for index in overlap.choose(counts, wanted=wanted, sizes=num_units):
        for site, unit in bundles[index]:
            chosen[site].add(unit)
    if empty := next((site for site, units in chosen.items() if not units), None):
        raise DataError(
            f"{_named(empty)}the rows of {num_units[empty]} units are the same or nearly the same text, here or at "
            "other sites, so none can be held out that is not trained on: add other rows, remove repeated ones, or set "
            'data.same_text = "count"'
        )
    return {site: _sides(rows, chosen[site]) for site, rows in sites.items()}


def split_each(
    rows: Sequence[Row], *, held_out_fraction: float, seed: int, site: str = "", secret: bytes | None = None
) -> Sides:
    """Keep a share of the units for evaluation, each unit by its own hash alone.

    One unit more or less then leaves all others where they are, which differential privacy over units needs: `split`
    holds out a fixed share, so that a new unit can push another one to the other side, and moves units whose texts are
    alike together. Here texts may be on both sides.

    Args:
        held_out_fraction: Probability with which a unit is held out, between 0 and 1.
        secret: As for `split_sites`. A larger fraction holds out the same units and more.

    Raises:
        DataError: No unit is left on one of the sides.
    """
    limit = int(held_out_fraction * 2**256)
    train, held_out = _sides(rows, {row.unit for row in rows if int.from_bytes(_rank(row.unit, seed, secret)) < limit})
    if not train or not held_out:
        raise DataError(
            f"{_named(site)}{_shown(rows)} of {len({row.unit for row in rows})} units give {len(train)} to train and "
            f"{len(held_out)} held out: there are too few units for data.held_out_fraction = {held_out_fraction:g}; "
            "add rows of other patients, or take another fraction, or rows of their own (data.held_out_path)"
        )
    return train, held_out


def for_run(
    sites: Mapping[str, Sequence[Row]],
    data: config.DataConfig,
    privacy: PrivacyConfig,
    *,
    seed: int,
    secret: bytes | None = None,
) -> dict[str, Sides]:
    """Training and held-out rows of each site as a run says.

    In a private run no row of one site decides where another site's goes, and where units are protected no unit decides
    about another.

    Args:
        sites: Rows by site: of all in a simulation, of its own at a real site.
        secret: A real site's own, which then chooses in the place of the run's seed; each unit by itself in every run
            that is private.
    """
    fraction, keeps_texts = data.held_out_fraction, data.same_text == "together"
    if privacy.mode == "unit" or (secret and privacy.mode != "none"):
        return {
            site: split_each(rows, held_out_fraction=fraction, seed=seed, site=site, secret=secret)
            for site, rows in sites.items()
        }
    if privacy.mode != "none":
        return {
            site: split(rows, held_out_fraction=fraction, seed=seed, site=site, keeps_texts=keeps_texts)
            for site, rows in sites.items()
        }
    return split_sites(sites, held_out_fraction=fraction, seed=seed, keeps_texts=keeps_texts, secret=secret)


def _bundles(sites: Mapping[str, Sequence[Row]], *, keeps_texts: bool) -> list[list[Unit]]:
    """Units that have to be on one side."""
    rows = [(site, row) for site, site_rows in sites.items() for row in site_rows]
    indices = {unit: index for index, unit in enumerate(dict.fromkeys((site, row.unit) for site, row in rows))}
    pairs = []
    if keeps_texts:
        for (site, row), first in zip(rows, overlap.groups([overlap.text_of(row) for _, row in rows]), strict=True):
            other_site, other = rows[first]
            pairs.append((indices[site, row.unit], indices[other_site, other.unit]))
    bundles: dict[int, list[Unit]] = {}
    for unit, first in zip(indices, near.merged(len(indices), pairs), strict=True):
        bundles.setdefault(first, []).append(unit)
    return list(bundles.values())


def _sides(rows: Sequence[Row], held_out: set[str]) -> Sides:
    return [row for row in rows if row.unit not in held_out], [row for row in rows if row.unit in held_out]


def _named(site: str) -> str:
    return f"site {site}: " if site else ""


def _shown(rows: Sequence[Row]) -> str:
    """How many rows, and where the first and the last of them are."""
    where = f" ({rows[0].row_id} to {rows[-1].row_id})" if rows else ""
    return f"{len(rows)} rows{where}"


def _rank(unit: str, seed: int, secret: bytes | None = None) -> bytes:
    """A unit's position: the same on every machine, or known to who has the secret alone."""
    if secret:
        return hmac.digest(secret, unit.encode(), "sha256")
    return hashlib.sha256(f"{seed}:{unit}".encode()).digest()
