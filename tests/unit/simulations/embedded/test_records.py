import csv
import json
import subprocess
import sys
from collections import Counter

import pytest

from simulations.embedded import records

FACTS = {"code": "codes", "team": "teams"}


@pytest.fixture(scope="module")
def rows():
    return records.generate()


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first, second = records.write(tmp_path / "a"), records.write(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_another_seed_writes_other_rows(rows):
    other = records.generate(seed=1)
    assert not {row["input"] for row in rows} & {row["input"] for row in other}


def test_every_row_has_the_same_keys_and_only_text(rows):
    assert all(tuple(row) == records.COLUMNS for row in rows)
    assert all(isinstance(value, str) and value for row in rows for value in row.values())


def test_sites_differ_clearly_in_size(rows):
    sizes = list(Counter(row["site"] for row in rows).values())
    assert len(sizes) == 4
    assert 400 <= sum(sizes) <= 700
    assert max(sizes) >= 1.5 * min(sizes)


def test_patients_belong_to_one_site_and_have_one_to_six_records(rows):
    counts = Counter(row["patient_id"] for row in rows)
    assert all(row["patient_id"].startswith(f"{row['site']}-") for row in rows)
    assert set(counts.values()) == set(range(1, 7))
    assert len(rows) / len(counts) > 3


def test_no_note_occurs_twice(rows):
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)


def test_no_answer_of_a_table_stands_in_the_prompt(rows):
    answers = records.table_answers()
    asked = [row for row in rows if row["output"] in answers]
    assert len(asked) > len(rows) / 2
    assert not [row for row in asked if row["output"] in row["instruction"] + row["input"]]


@pytest.mark.parametrize("seed", [2026, 1, 2])
def test_every_fact_is_taught_by_several_patients(seed):
    patients = {}
    for row in records.generate(seed):
        if row["output"] in records.table_answers():
            patients.setdefault((row["site"], row["instruction"], row["output"]), set()).add(row["patient_id"])
    expected = sum(len(hospital.codes) + len(hospital.teams) for hospital in records.HOSPITALS)
    codes = {key: ids for key, ids in patients.items() if key[1] != records.FORMULARY}
    assert len(codes) == expected
    assert min(map(len, codes.values())) >= 2
    assert {key[2] for key in patients if key[1] == records.FORMULARY} == set(records.DRUG_GROUPS.values())


def test_hospitals_give_one_finding_different_codes():
    assert len({hospital.codes["anaemia"] for hospital in records.HOSPITALS}) == len(records.HOSPITALS)


def test_each_site_gets_a_file_of_another_format_with_the_same_rows(rows, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = records.write(tmp_path)
    assert [path.name for path in paths] == ["alder.jsonl", "birch.json", "cedar.csv", "dogwood.parquet"]
    lines, array, cells, table = paths
    read = [json.loads(line) for line in lines.read_text().splitlines()] + json.loads(array.read_text())
    with cells.open(newline="") as stream:
        read += list(csv.DictReader(stream))
    assert read + parquet.read_table(table).to_pylist() == rows


def test_the_module_writes_the_data_set(tmp_path):
    command = [sys.executable, "-m", "simulations.embedded.records", "--out", str(tmp_path), "--seed", "3"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(list(tmp_path.iterdir())) == 4
