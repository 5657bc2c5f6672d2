"""Every row at exactly one site, every unit whole."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from simulations.world.partition import sites_of

CANARY = "Zyxwvut-4711"


def table_of(num_units: int, *, rows_per_unit: int = 2, num_labels: int = 4) -> list[dict]:
    """Rows of units whose label follows from the unit."""
    return [
        {"n": unit * rows_per_unit + k, "patient": f"p{unit}", "label": f"Label {unit % num_labels}", "output": CANARY}
        for unit in range(num_units)
        for k in range(rows_per_unit)
    ]


def numbers(sites: dict[str, list[dict]]) -> list[int]:
    return sorted(row["n"] for rows in sites.values() for row in rows)


def shares(rows: list[dict]) -> dict[str, float]:
    counts = Counter(row["label"] for row in rows)
    return {label: count / len(rows) for label, count in counts.items()}


def partition(table: list[dict], **options) -> dict[str, list[dict]]:
    """Rows by site, sites ascending."""
    named = sites_of(table, **options)
    sites: dict[str, list[dict]] = {name: [] for name in sorted(set(named))}
    for fields, name in zip(table, named, strict=True):
        sites[name].append(fields)
    return sites


@given(
    how=st.sampled_from(["column", "iid", "dirichlet"]),
    num_units=st.integers(8, 30),
    num_sites=st.integers(1, 8),
    alpha=st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
    unit_column=st.sampled_from(["", "patient"]),
    seed=st.integers(0, 2**32),
)
def test_partition_is_a_partition_of_whole_units(how, num_units, num_sites, alpha, unit_column, seed):
    table = table_of(num_units)
    wanted = 0 if how == "column" else num_sites
    sites = partition(
        table,
        how=how,
        num_sites=wanted,
        site_column="label",
        dirichlet_alpha=alpha,
        unit_column=unit_column,
        seed=seed,
    )
    assert numbers(sites) == [row["n"] for row in table]
    assert len(sites) == (wanted or 4)
    assert all(sites.values())
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in sites)
    assert list(sites) == sorted(sites)
    if unit_column:
        places = {(row["patient"], name) for name, rows in sites.items() for row in rows}
        assert len(places) == num_units


def test_column_makes_a_site_of_each_value():
    table = [{"site": "St. Mary's (Nord)", "n": 1}, {"site": 7, "n": 2}, {"site": 7.0, "n": 3}]
    sites = partition(table, how="column")
    assert {name: [row["n"] for row in rows] for name, rows in sites.items()} == {"7": [2, 3], "st-mary-s-nord": [1]}


def test_iid_sites_are_of_equal_size_and_depend_on_the_seed_only():
    first, again, other = (
        partition(table_of(41), how="iid", num_sites=4, unit_column="patient", seed=seed) for seed in (1, 1, 2)
    )
    assert list(first) == ["site-00", "site-01", "site-02", "site-03"]
    assert sorted(len(rows) for rows in first.values()) == [20, 20, 20, 22]
    assert first == again != other


def test_names_sort_like_numbers_beyond_a_hundred_sites():
    names = list(partition(table_of(120), how="iid", num_sites=101))
    assert names[0] == "site-000"
    assert names[-1] == "site-100"


def test_rows_keep_the_tables_order_within_a_site():
    for rows in partition(table_of(30), how="dirichlet", num_sites=3, site_column="label").values():
        assert [row["n"] for row in rows] == sorted(row["n"] for row in rows)


def test_small_alpha_separates_labels_and_large_alpha_mixes_them():
    def skew(alpha: float) -> float:
        sites = partition(
            table_of(2000, rows_per_unit=1), how="dirichlet", num_sites=4, site_column="label", dirichlet_alpha=alpha
        )
        return sum(max(shares(rows).values()) for rows in sites.values()) / 4

    assert skew(0.01) > 0.8
    assert skew(1e6) < 0.32, "each of 4 labels has a share of 0.25 in all rows"


def test_dirichlet_matches_its_published_variance():
    """Var of a share of Dir(alpha p) is p (1 - p) / (alpha + 1); the first site draws from full pools."""
    alpha, p = 4.0, 0.25
    first = [
        shares(
            partition(
                table_of(160, rows_per_unit=1),
                how="dirichlet",
                num_sites=20,
                site_column="label",
                dirichlet_alpha=alpha,
                seed=seed,
            )["site-00"]
        ).get("Label 0", 0.0)
        for seed in range(300)
    ]
    mean = sum(first) / len(first)
    variance = sum((share - mean) ** 2 for share in first) / len(first)
    dirichlet = p * (1 - p) / (alpha + 1)
    expected = dirichlet + (p * (1 - p) - dirichlet) / 8  # and the spread of 8 draws
    assert abs(mean - p) < 0.04
    assert 0.75 < variance / expected < 1.3


def test_unit_of_several_labels_counts_under_its_commonest():
    table = [
        {"patient": unit, "label": label} for unit in range(20) for label in (f"rare {unit}", *["xy"[unit % 2]] * 2)
    ]
    sites = partition(
        table, how="dirichlet", num_sites=2, site_column="label", unit_column="patient", dirichlet_alpha=1e-6
    )
    assert sorted(sorted({row["patient"] % 2 for row in rows}) for rows in sites.values()) == [[0], [1]]


def refusal(table, **options) -> str:
    with pytest.raises(DataError) as caught:
        partition(table, **options)
    assert caught.value.exit_code == 3
    assert CANARY not in str(caught.value)
    return str(caught.value)


def test_no_rows():
    assert "no rows" in refusal([], how="iid", num_sites=2)


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_fewer_units_than_sites(how):
    message = refusal(table_of(3), how=how, num_sites=4, site_column="label", unit_column="patient")
    assert "3 units are too few for 4 sites" in message
    assert "data.num_sites" in message


@pytest.mark.parametrize("blank", [None, "", " ", float("nan")])
def test_row_without_a_site_or_a_unit(blank):
    table = [{"site": CANARY, "patient": CANARY}, {"site": blank, "patient": blank}]
    assert "data.site_column" in refusal(table, how="column")
    message = refusal(table, how="iid", num_sites=1, unit_column="patient")
    assert "1 of 2 rows have no value in the column 'patient' (rows 2)" in message
    assert "data.unit_column" in message


def test_unit_at_two_sites():
    table = [{"site": "a", "patient": CANARY}, {"site": "b", "patient": CANARY}]
    assert "1 of 1 units" in refusal(table, how="column", unit_column="patient")


@pytest.mark.parametrize("values", [("St Mary", "st-mary"), ("病院", "a")])
def test_names_that_cannot_be_told_apart(values):
    assert "rename" in refusal([{"site": value} for value in values], how="column")


def test_number_of_sites_that_contradicts_the_column():
    assert "has 4 values and 3 sites are wanted" in refusal(table_of(8), how="column", site_column="label", num_sites=3)


@pytest.mark.parametrize("options", [{"how": "iid"}, {"how": "dirichlet", "num_sites": 2, "dirichlet_alpha": 0.0}])
def test_number_out_of_range_is_a_callers_mistake(options):
    with pytest.raises(ValueError, match=r"num_sites|dirichlet_alpha"):
        partition(table_of(8), site_column="label", **options)
