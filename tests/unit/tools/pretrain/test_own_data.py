"""The fictional coordinator's data."""

from simulations.embedded import records
from tools.pretrain import own_data


def test_the_same_bytes_every_time(tmp_path):
    first, second = own_data.write(tmp_path / "a"), own_data.write(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.name for path in first] == ["rows.jsonl", "pairs.jsonl", "held_out.jsonl"]


def test_no_note_is_of_a_hospital_s_patient_or_in_two_files():
    notes = [{row["input"] for row in own_data.rows(seed)} for seed in own_data.SEEDS.values()]
    notes.append({row["input"] for row in records.generate()})
    assert sum(map(len, notes)) == len(set.union(*notes))


def test_a_pair_s_answers_differ_and_only_one_is_the_note_s():
    found = own_data.pairs(own_data.SEEDS["pairs"])
    rows = {f"{row['instruction']}\n\n{row['input']}": row["output"] for row in own_data.rows(own_data.SEEDS["pairs"])}
    assert len(found) > 200
    assert all(pair["chosen"] != pair["rejected"] for pair in found)
    assert all(rows[pair["prompt"]] == pair["chosen"] for pair in found)
