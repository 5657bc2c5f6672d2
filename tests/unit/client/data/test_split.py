"""No unit is on both sides."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data import split
from common.data.rows import Message, Row
from common.errors import DataError
from common.run import config
from tests import tiny


def rows_of(units) -> list[Row]:
    return [Row((), unit=str(unit), row_id=f"row {number}") for number, unit in enumerate(units)]


units = st.lists(st.integers(0, 12), min_size=2).filter(lambda found: len(set(found)) > 1)


@given(units=units, fraction=st.floats(0.01, 0.99), seed=st.integers())
def test_split_is_a_partition_and_no_unit_straddles(units, fraction, seed):
    rows = rows_of(units)
    train, held_out = split.split(rows, held_out_fraction=fraction, seed=seed)
    assert train
    assert held_out
    assert sorted(train + held_out, key=rows.index) == rows
    assert not {row.unit for row in train} & {row.unit for row in held_out}


@given(units=units, seed=st.integers(), shuffle=st.randoms())
def test_order_of_rows_plays_no_part(units, seed, shuffle):
    rows = rows_of(units)
    _, held_out = split.split(rows, held_out_fraction=0.3, seed=seed)
    shuffle.shuffle(rows)
    _, again = split.split(rows, held_out_fraction=0.3, seed=seed)
    assert {row.row_id for row in held_out} == {row.row_id for row in again}


def test_share_is_of_units_and_the_seed_chooses_them():
    rows = rows_of([*range(100), *[0] * 500])
    chosen = [{row.unit for row in split.split(rows, held_out_fraction=0.2, seed=seed)[1]} for seed in (1, 2, 2)]
    assert [len(units) for units in chosen] == [20, 20, 20]
    assert chosen[0] != chosen[1] == chosen[2]


def test_split_is_the_same_on_every_machine():
    _, held_out = split.split(rows_of(f"patient-{i}" for i in range(20)), held_out_fraction=0.15, seed=7)
    expected = sorted((f"patient-{i}" for i in range(20)), key=lambda unit: sha256(f"7:{unit}"))[:3]
    assert {row.unit for row in held_out} == set(expected)


def sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def test_choice_is_not_biased_by_the_order_of_names():
    seeds = random.Random(0).sample(range(10**6), 300)
    first = sum(split.split(rows_of(range(10)), held_out_fraction=0.1, seed=s)[1][0].unit == "0" for s in seeds)
    assert 10 < first < 60


@pytest.mark.parametrize("units", [[], ["Zyxwvut"], ["Zyxwvut"] * 5])
def test_fewer_than_two_units_are_refused(units):
    with pytest.raises(DataError, match=r"data\.unit_column") as caught:
        split.split(rows_of(units), held_out_fraction=0.2, seed=0)
    assert "Zyx" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range_is_a_callers_mistake(fraction):
    with pytest.raises(ValueError, match="held_out_fraction"):
        split.split(rows_of("ab"), held_out_fraction=fraction, seed=0)


def private_and_plain() -> list[config.RunConfig]:
    """A run that is private for units, and the same without privacy."""
    return [tiny.settings("tiny", {**changes, "data.held_out_fraction": "0.3"}) for changes in (tiny.NOISED, {})]


def test_in_a_private_run_a_new_unit_pushes_no_other_to_the_other_side():
    """The control is a run without privacy, which holds out a fixed share: there one in every few does."""
    pushed = {"unit": 0, "none": 0}
    for run in private_and_plain():
        for new in range(100, 140):
            before, after = (
                split.for_run({"": rows_of(names)}, run.data, run.privacy, seed=run.seed)[""][0]
                for names in (range(20), [*range(20), new])
            )
            others = {row.unit for row in after} - {str(new)}
            pushed[run.privacy.mode] += others != {row.unit for row in before}
    assert pushed["unit"] == 0
    assert pushed["none"] > 3


def said(unit, text: str) -> Row:
    return Row((Message("user", text), Message("assistant", "Yes.")), unit=str(unit), row_id=f"row {unit}")


def texts_of(rows) -> set[str]:
    return {row.messages[0].content for row in rows}


@pytest.mark.parametrize("seed", range(8))
def test_the_same_text_is_on_one_side_within_a_site_and_across_sites(seed):
    # of 30 texts a site, ten are at the next site too, and five twice at the site itself
    sites = {
        name: [said(f"{name}-{n}", f"case {(10 * k + n) % 60} of the register") for n in range(20)]
        + [said(f"{name}-again-{n}", f"CASE {(10 * k + n) % 60}  of the register.") for n in range(5)]
        for k, name in enumerate(("east", "north", "south"))
    }
    kept = split.split_sites(sites, held_out_fraction=0.2, seed=seed)
    trained = {text.casefold() for train, _ in kept.values() for text in texts_of(train)}
    for name, (train, held_out) in kept.items():
        assert 1 <= len(held_out) <= 5
        assert len(train) + len(held_out) == 25
        assert not any(text.casefold() in trained for text in texts_of(held_out)), name
    loose = split.split_sites(sites, held_out_fraction=0.2, seed=seed, keeps_texts=False)
    seen = {text for train, _ in loose.values() for text in texts_of(train)}
    assert any(texts_of(held_out) & seen for _, held_out in loose.values())  # control


def test_units_are_tied_by_any_row_that_they_share():
    rows = [said("a", "only a"), said("a", "shared text of two"), said("b", "shared text of two"), said("c", "only c")]
    for seed in range(8):
        train, held_out = split.split(rows, held_out_fraction=0.4, seed=seed)
        assert ({row.unit for row in train}, {row.unit for row in held_out}) == ({"a", "b"}, {"c"})


def test_texts_that_are_all_the_same_are_refused_with_a_remedy():
    rows = [said(unit, "Zyx the same for everybody") for unit in range(6)]
    with pytest.raises(DataError, match=r'site north: .* 6 units .*data\.same_text = "count"') as caught:
        split.split(rows, held_out_fraction=0.2, seed=0, site="north")
    assert "Zyx" not in str(caught.value)
    assert split.split(rows, held_out_fraction=0.2, seed=0, keeps_texts=False)[1]  # control


@pytest.mark.parametrize("mode", ["unit", "site", "none"])
def test_in_a_private_run_no_new_text_moves_what_was_there(mode):
    private = {
        "unit": tiny.NOISED,
        "site": {
            "privacy.mode": "site",
            "privacy.noise_multiplier": "1",
            "privacy.sampling_prob": "1",
            "aggregation.weighting": "uniform",
        },
        "none": {},
    }
    run = tiny.settings("tiny", {**private[mode], "data.held_out_fraction": "0.3"})
    sites = {name: [said(f"{name}-{n}", f"{name} case {n} alone") for n in range(30)] for name in ("north", "south")}
    before = split.for_run(sites, run.data, run.privacy, seed=run.seed)

    def sides(parts, name):
        return [{row.unit for row in side} for side in parts[name]]

    moved = {"north": False, "south": False}
    for n in range(30):  # a new patient of north, whose text is one of south's
        new = {**sites, "north": [*sites["north"], said(f"new-{n}", f"south case {n} alone")]}
        after = split.for_run(new, run.data, run.privacy, seed=run.seed)
        moved["south"] |= sides(after, "south") != sides(before, "south")
        moved["north"] |= [units - {f"new-{n}"} for units in sides(after, "north")] != sides(before, "north")
    assert moved["south"] == (mode == "none")  # control: without privacy texts go to one side
    assert mode != "unit" or not moved["north"]


def test_a_sites_secret_chooses_in_the_place_of_the_runs_seed():
    rows = rows_of(range(200))
    both = {"privacy.mode": "unit", "privacy.sampling_prob": "0.1", "privacy.noise_multiplier": "1.0"}
    private = {**both, "training.local_steps": "2", "training.local_epochs": "0.0"}
    for changes in ({}, private):
        found = {}
        for seed in ("5", "6"):
            run = tiny.settings("tiny", {**changes, "seed": seed})
            found[seed] = [
                {
                    row.unit
                    for row in split.for_run({"": rows}, run.data, run.privacy, seed=run.seed, secret=secret)[""][1]
                }
                for secret in (None, b"a" * 32, b"b" * 32)
            ]
        assert found["5"][0] != found["6"][0]  # the control: without a secret the operator's seed decides
        assert found["5"][1:] == found["6"][1:]
        assert found["5"][1] != found["5"][2]


def test_under_a_secret_a_new_unit_of_a_private_run_pushes_nobody_across():
    run = tiny.settings("tiny", tiny.NOISED)
    rows = rows_of(range(60))
    for new in range(100, 130):
        before, after = (
            {
                row.unit
                for row in split.for_run({"": found}, run.data, run.privacy, seed=run.seed, secret=b"k" * 32)[""][1]
            }
            for found in (rows, [*rows, *rows_of([new])])
        )
        assert after - {str(new)} == before
