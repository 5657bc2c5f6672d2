"""Every format and every shape that is accepted."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from common.data import read
from common.rows import Columns, Message

ROWS = [
    {"patient_id": "p1", "instruction": "Summarise.", "input": 'Äpfel\nund Öl, "roh"', "output": "Obst"},
    {"patient_id": "p2", "instruction": "Translate.", "input": "", "output": "Herz 💊"},
]
COLUMNS = Columns(unit="patient_id")


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path: Path, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    WRITERS[suffix](path, ROWS)
    first, second = read.read(str(path), columns=COLUMNS)
    assert first.messages == (Message("user", 'Summarise.\n\nÄpfel\nund Öl, "roh"'), Message("assistant", "Obst"))
    assert second.messages == (Message("user", "Translate."), Message("assistant", "Herz 💊"))
    assert [first.unit, second.unit] == ["p1", "p2"]
    assert [first.is_input_empty, second.is_input_empty] == [False, True]
    assert first.row_id.startswith(f"train{suffix} ")
    assert first.row_id != second.row_id


@pytest.mark.parametrize("suffix", WRITERS)
def test_read_table_keeps_every_column(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    WRITERS[suffix](path, [row | {"site": "north"} for row in ROWS])
    assert read.read_table(str(path)) == [row | {"site": "north"} for row in ROWS]


def test_row_is_called_by_file_and_line_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]))
    assert [row.row_id for row in read.read(str(path), columns=COLUMNS)] == ["a.jsonl line 2", "a.jsonl line 4"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    WRITERS[suffix](path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert [row.unit for row in read.read(str(path), columns=COLUMNS)] == ["p1", "p2"]


def test_upper_case_extension_is_known(tmp_path):
    write_csv(tmp_path / "TRAIN.CSV", ROWS)
    assert len(read.read(str(tmp_path / "TRAIN.CSV"), columns=COLUMNS)) == 2


def test_folder_is_read_by_name_without_hidden_files_and_subfolders(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_csv(tmp_path / "more.csv", ROWS[1:])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.jsonl").write_text("broken")
    assert [row.unit for row in read.read(str(tmp_path), columns=COLUMNS)] == ["p2", "p1"]


def test_folder_saved_by_datasets_is_read(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        rows = read.read(str(tmp_path / name), columns=COLUMNS)
        assert [row.unit for row in rows] == ["p1", "p2"]
        assert rows[0].row_id == f"{name} row 1"


def test_csv_field_may_be_longer_than_the_modules_own_limit(tmp_path):
    write_csv(tmp_path / "a.csv", [ROWS[0] | {"input": "x" * 200_000}])
    before = csv.field_size_limit()
    assert len(read.read_table(str(tmp_path / "a.csv"))[0]["input"]) == 200_000
    assert csv.field_size_limit() == before


def test_column_names_are_configurable():
    columns = Columns(instruction="frage", input="text", output="antwort")
    (row,) = read.to_rows([{"frage": "Was?", "text": "Das.", "antwort": "Dies."}], columns)
    assert row.messages == (Message("user", "Was?\n\nDas."), Message("assistant", "Dies."))


def test_settings_that_name_prompt_and_completion_keep_the_input():
    columns = Columns(instruction="prompt", input="context", output="completion")
    (row,) = read.to_rows([{"prompt": "Was?", "context": "Das.", "completion": "Dies."}], columns)
    assert row.messages[0].content == "Was?\n\nDas."


def test_input_column_may_be_missing_or_null():
    rows = read.to_rows(
        [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}], Columns()
    )
    assert [row.messages[0].content for row in rows] == ["a", "a"]
    assert all(row.is_input_empty for row in rows)


def test_messages_keep_their_turns_and_all_answers_are_trained():
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    (row,) = read.to_rows([{"messages": [{"role": r, "content": c} for r, c in turns]}], Columns())
    assert row.messages == tuple(Message(r, c) for r, c in turns)
    assert row.num_context == 0


def test_null_keys_of_a_message_are_no_matter():
    (row,) = read.to_rows(
        [{"messages": [{"role": "user", "content": "u", "name": None}, {"role": "assistant", "content": "a"}]}],
        Columns(),
    )
    assert row.messages[0] == Message("user", "u")


def test_prompt_and_completion_go_through_the_chat_template():
    (row,) = read.to_rows([{"prompt": "p", "completion": "c"}], Columns())
    assert row.messages == (Message("user", "p"), Message("assistant", "c"))


def test_conversational_prompt_is_context_and_only_the_completion_is_trained():
    prompt = [
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
    ]
    (row,) = read.to_rows([{"prompt": prompt, "completion": [{"role": "assistant", "content": "a2"}]}], Columns())
    assert [m.content for m in row.messages] == ["u1", "a1", "u2", "a2"]
    assert row.num_context == 3


def test_prompt_beside_messages_is_not_a_second_shape():
    row = {"prompt": "p", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    assert read.to_rows([row], Columns())[0].messages[0].content == "u"


@pytest.mark.parametrize("value", [7, 7.0, "7", " 7 "])
def test_one_patient_is_one_unit_however_it_is_written(value):
    (row,) = read.to_rows([{"patient_id": value, "instruction": "a", "output": "b"}], COLUMNS)
    assert row.unit == "7"


def test_without_a_unit_column_every_row_is_a_unit():
    rows = read.to_rows([{"instruction": "a", "output": "b"}] * 3, Columns())
    assert len({row.unit for row in rows}) == 3


def test_ids_may_repeat_where_they_name_the_unit():
    rows = read.to_rows([{"id": 1, "instruction": "a", "output": "b"}] * 2, Columns(unit="id"))
    assert [row.unit for row in rows] == ["1", "1"]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(rows=st.lists(st.fixed_dictionaries({"instruction": texts, "output": texts}), min_size=1, max_size=5))
def test_text_survives_jsonl_unchanged(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("law") / "a.jsonl"
    write_jsonl(path, rows)
    got = read.read(str(path), columns=Columns())
    assert [(r.messages[0].content, r.messages[1].content) for r in got] == [
        (r["instruction"], r["output"]) for r in rows
    ]


def test_importing_the_reader_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'}"
    modules = "from client.data import check, split; from common.data import read"
    code = f"import sys; {modules}; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
