"""Training and held-out rows; no privacy unit is in both."""

import hashlib
from collections.abc import Sequence

from common import config
from common.errors import DataError
from common.rows import Row


def split(rows: Sequence[Row], *, held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Keep a share of the units for evaluation.

    Units are ordered by a hash of seed and name, and the first of them are held out: the order of rows plays no part.

    Args:
        rows: At least two units.
        held_out_fraction: Share of units to hold out, between 0 and 1; rounded, but at least one and not all of them.
        seed: Chooses which.

    Returns:
        Rows to train on and rows held out, each in the order given.

    Raises:
        DataError: Fewer than two units.
        ValueError: The fraction is not between 0 and 1.

    Example:
        >>> rows = [Row((), unit=f"patient-{i // 2}", row_id=f"row {i}") for i in range(8)]
        >>> train, held_out = split(rows, held_out_fraction=0.25, seed=1)
        >>> len(train), len({row.unit for row in held_out})
        (6, 1)
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}, not between 0 and 1")
    units = sorted({row.unit for row in rows}, key=lambda unit: _rank(unit, seed))
    if len(units) < 2:
        raise DataError(
            f"{_shown(rows)} are of {len(units)} unit and cannot be split into training and held-out rows "
            f"(data.held_out_fraction = {held_out_fraction:g}): add rows of other patients, or check data.unit_column"
        )
    num_held_out = min(max(round(held_out_fraction * len(units)), 1), len(units) - 1)
    chosen = set(units[:num_held_out])
    return [row for row in rows if row.unit not in chosen], [row for row in rows if row.unit in chosen]


def split_each(rows: Sequence[Row], *, held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Keep a share of the units for evaluation, each unit by its own hash alone.

    One unit more or less then leaves all others where they are, which differential privacy over units needs: `split`
    holds out a fixed share, so that a new unit can push another one to the other side.

    Args:
        rows: Rows of units.
        held_out_fraction: Probability with which a unit is held out, between 0 and 1.
        seed: Chooses which.

    Raises:
        DataError: No unit is left on one of the sides.
    """
    limit = int(held_out_fraction * 2**256)
    chosen = {row.unit for row in rows if int.from_bytes(_rank(row.unit, seed)) < limit}
    train, held_out = [row for row in rows if row.unit not in chosen], [row for row in rows if row.unit in chosen]
    if not train or not held_out:
        raise DataError(
            f"{_shown(rows)} of {len({row.unit for row in rows})} units give {len(train)} to train and {len(held_out)} "
            f"held out: there are too few units for data.held_out_fraction = {held_out_fraction:g}; add rows of other "
            "patients, or take another fraction or seed"
        )
    return train, held_out


def for_run(rows: Sequence[Row], run: config.RunConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows as a run says.

    Raises:
        DataError: Too few units.
    """
    how = split_each if run.privacy.is_private_per_unit else split
    return how(rows, held_out_fraction=run.data.held_out_fraction, seed=run.seed)


def _shown(rows: Sequence[Row]) -> str:
    """How many rows, and where the first and the last of them are."""
    where = f" ({rows[0].row_id} to {rows[-1].row_id})" if rows else ""
    return f"{len(rows)} rows{where}"


def _rank(unit: str, seed: int) -> bytes:
    """A unit's position, the same on every machine."""
    return hashlib.sha256(f"{seed}:{unit}".encode()).digest()
