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
from common.data.rows import Columns, Message
from common.errors import DataError

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


def write_tsv(path: Path, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    ".jsonl": write_jsonl,
    ".ndjson": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".parquet": write_parquet,
}


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


NUM_MANY = 2 * 1024 + 100  # Parquet is read 1,024 rows at a time


@pytest.mark.parametrize("kind", [*WRITERS, "saved"])
def test_of_many_rows_each_has_its_own_place_and_unit(tmp_path, kind):
    table = [{"instruction": f"i{n}", "output": "o", "patient": f"p{n // 2}"} for n in range(NUM_MANY)]
    path = tmp_path / f"many{kind}"
    if kind == "saved":
        datasets.Dataset.from_list(table).save_to_disk(path)
    else:
        WRITERS[kind](path, table)
    strangers = read.read(str(path), columns=Columns())
    assert [row.unit for row in strangers] == [f"row {n}" for n in range(1, NUM_MANY + 1)]
    word, first = (
        ("line", 2 if kind in (".csv", ".tsv") else 1) if kind in (".jsonl", ".ndjson", ".csv", ".tsv") else ("row", 1)
    )
    assert [row.row_id for row in strangers] == [f"{path.name} {word} {n + first}" for n in range(NUM_MANY)]
    assert [row.messages[0].content for row in strangers] == [f"i{n}" for n in range(NUM_MANY)]
    assert [row.unit for row in read.read(str(path), columns=Columns(unit="patient"))] == [
        f"p{n // 2}" for n in range(NUM_MANY)
    ]


def test_rows_of_several_files_have_places_and_units_of_their_own(tmp_path):
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", ROWS * 600)
    rows = read.read(str(tmp_path), columns=Columns())
    assert len({row.row_id for row in rows}) == len({row.unit for row in rows}) == len(rows) == 2400


def test_a_row_of_csv_is_called_by_the_line_where_it_begins(tmp_path):
    (tmp_path / "a.csv").write_text('instruction,output\n"two\nlines",o\n\ni,o\n')
    assert [row.row_id for row in read.read(str(tmp_path / "a.csv"), columns=Columns())] == [
        "a.csv line 2",
        "a.csv line 5",
    ]


def test_ids_that_start_anew_in_each_file_are_no_matter(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [row | {"id": n} for n, row in enumerate(ROWS)])
    assert len(read.read(str(tmp_path), columns=COLUMNS)) == 4
    write_jsonl(tmp_path / "b.jsonl", [row | {"id": 0} for row in ROWS])
    with pytest.raises(DataError, match=r"b\.jsonl line 1, b\.jsonl line 2: have the same 'id'.*starts anew.*rename"):
        read.read(str(tmp_path), columns=COLUMNS)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("b.jsonl.gz", "unpack b.jsonl.gz"),
        ("b.zip", "unpack b.zip"),
        ("b.xlsx", "save the sheet as CSV"),
        ("b.txt", ".ndjson"),
        ("b", "no extension"),
        ("b.jsonl.bak", ".bak"),
    ],
)
def test_no_file_of_a_folder_is_passed_over_in_silence(tmp_path, name, remedy):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / name).write_bytes(b"rows")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match="unknown kind of file") as caught:
            read.read(str(source), columns=COLUMNS)
        assert str(tmp_path / name) in str(caught.value)
        assert remedy in str(caught.value)


def test_what_of_a_folder_is_never_read_is_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    for name in (".hidden.gz", "README.md", "LICENSE", "licence.txt", "_SUCCESS"):
        (tmp_path / name).write_text("not rows")
    (tmp_path / "old").mkdir()
    assert len(read.read(str(tmp_path), columns=COLUMNS)) == 2
    assert read.left_out(str(tmp_path)) == [".hidden.gz", "LICENSE", "README.md", "_SUCCESS", "licence.txt", "old/"]


def test_all_files_of_a_folder_are_told_what_is_wrong_with_them(tmp_path):
    (tmp_path / "a.jsonl").write_text("{oops\n")
    (tmp_path / "b.csv").write_bytes(b"instruction,output\n\xe9,o\n")
    (tmp_path / "c.parquet").write_bytes(b"no")
    (tmp_path / "d.gz").write_bytes(b"no")
    with pytest.raises(DataError) as caught:
        read.read(str(tmp_path), columns=COLUMNS)
    assert all(part in str(caught.value) for part in ("a.jsonl line 1", "b.csv line 2", "c.parquet", "d.gz"))


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
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
