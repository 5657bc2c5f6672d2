"""Every way in which data can be unusable: one line, the place, the remedy, and no word of the data."""

import json
import os
import traceback
import tracemalloc
from pathlib import Path

import pytest

from common.data import files, read
from common.data.problems import Problems
from common.data.rows import Columns
from common.errors import DataError

CANARY = "Zyxwvut-4711"
GOOD = {"instruction": "Summarise.", "input": "", "output": "Fine."}
COLUMNS = Columns()


def refusal(call, *args, **options) -> str:
    """The message of a DataError, checked for what holds of all of them."""
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert CANARY not in message
    assert "Zyx" not in message
    assert CANARY not in "".join(traceback.format_exception(caught.value)), "causes reach a site's log"
    return message


def refuse_file(path: Path, content: bytes | str, **options) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return refusal(read.read, str(path), columns=options.pop("columns", COLUMNS), **options)


def refuse_rows(*rows, columns: Columns = COLUMNS) -> str:
    return refusal(read.to_rows, list(rows), columns)


def line(**fields) -> str:
    return json.dumps(GOOD | fields) + "\n"


@pytest.mark.parametrize("name", ["none.jsonl", "/nowhere/at/all", "./none", "none.parquet"])
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in refusal(read.read, name, columns=COLUMNS)


def test_unknown_extension_lists_the_known_ones(tmp_path):
    message = refuse_file(tmp_path / "a.xlsx", CANARY)
    assert all(suffix in message for suffix in (".jsonl", ".json", ".csv", ".parquet"))


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text(CANARY)
    assert "holds no .jsonl" in refusal(read.read, str(tmp_path), columns=COLUMNS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(line())
    (tmp_path / "a.jsonl").chmod(0)
    assert "permissions" in refusal(read.read, str(tmp_path / "a.jsonl"), columns=COLUMNS)


def test_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    problems = Problems()
    assert files.scan_file(tmp_path / "a.jsonl", max_line_bytes=100, problems=problems) == []
    assert "cannot be read" in refusal(problems.raise_if_any)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", ""), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "a,b\n")],
)
def test_empty_data_set(tmp_path, name, content):
    assert "has no rows" in refuse_file(tmp_path / name, content)


def test_bad_json_names_line_and_column(tmp_path):
    message = refuse_file(tmp_path / "a.jsonl", line() + f'{{"instruction": "{CANARY}" oops}}\n')
    assert message.startswith("a.jsonl line 2: is not valid JSON at column")
    assert "Remedy: " in message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (f'["{CANARY}"]', "is a list, not a JSON object"),
        (f'{{"{CANARY}": 1, "{CANARY}": 2}}', "has a key twice"),
        ('{"instruction": NaN}', "NaN or Infinity"),
        ('{"instruction": ' + "9" * 5000 + "}", "a number is too long"),
        ('{"instruction": ' + "[" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_json_that_would_be_misread(tmp_path, content, what):
    message = refuse_file(tmp_path / "a.jsonl", content)
    assert message.startswith("a.jsonl line 1: ")
    assert what in message


def test_json_lines_in_a_json_file_says_so(tmp_path):
    message = refuse_file(tmp_path / "a.json", line() + line())
    assert "is not valid JSON at line 2, column 1" in message
    assert ".jsonl" in message


@pytest.mark.parametrize(("content", "kind"), [('{"data": []}', "one dict"), ('"x"', "one str"), ("7", "one int")])
def test_json_that_is_not_a_list(tmp_path, content, kind):
    assert f"holds {kind}, not a list" in refuse_file(tmp_path / "a.json", content)


def test_json_list_with_something_else_in_it(tmp_path):
    assert "a.json row 2: is a str" in refuse_file(tmp_path / "a.json", json.dumps([GOOD, CANARY]))


def test_huge_json_is_refused_by_its_size(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    message = refusal(read.read, str(tmp_path / "a.json"), columns=COLUMNS)
    assert str(files.MAX_JSON_BYTES) in message
    assert ".jsonl" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_line_of_two_gigabytes_is_refused_without_loading_it(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    tracemalloc.start()
    message = refusal(read.read, str(path), columns=COLUMNS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.startswith(f"a{suffix} line 1: over the limit of {16 << 20} bytes")
    assert peak_bytes < 64 << 20


def test_line_limit_is_exact(tmp_path):
    content = line().rstrip("\n")
    (tmp_path / "a.jsonl").write_text(content)
    assert len(read.read(str(tmp_path / "a.jsonl"), columns=COLUMNS, max_line_bytes=len(content))) == 1
    assert "line 1" in refuse_file(tmp_path / "a.jsonl", content, max_line_bytes=len(content) - 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_wrong_encoding_names_the_byte_and_iconv(tmp_path, suffix):
    content = {".jsonl": line(), ".json": "[\n", ".csv": "instruction,output\na,b\n"}[suffix].encode() + b"caf\xe9"
    message = refuse_file(tmp_path / f"a{suffix}", content)
    assert f"is not UTF-8 at byte {len(content) - 1}" in message
    assert "iconv" in message


def test_byte_order_mark_counts_in_the_offset(tmp_path):
    assert "not UTF-8 at byte 3;" in refuse_file(tmp_path / "a.jsonl", b"\xef\xbb\xbf\xe9\n\xe9")
    assert "not UTF-8 at byte 3." in refuse_file(tmp_path / "a.json", b"\xef\xbb\xbf\xe9\n\xe9")


def test_mixed_encodings_name_every_line(tmp_path):
    good, bad = line(output="café").encode(), line().replace("Fine", "café").encode("latin-1")
    message = refuse_file(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + good + bad + good + bad)
    first = len(b"\xef\xbb\xbf" + good) + bad.index(b"\xe9")
    second = first + len(bad) + len(good)
    assert f"a.jsonl line 2: is not UTF-8 at byte {first}; a.jsonl line 4: is not UTF-8 at byte {second}." in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    message = refuse_file(tmp_path / "a.jsonl", line(input=CANARY).encode(encoding))
    assert "UTF-16" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_nul_byte(tmp_path, suffix):
    assert "has a NUL byte at byte 5" in refuse_file(tmp_path / f"a{suffix}", b"[1,2 \0 ]")


def test_nul_and_half_a_surrogate_pair_behind_an_escape():
    assert "NUL character" in refuse_rows(GOOD | {"input": f"{CANARY}\0"})
    assert "surrogate" in refuse_rows(GOOD | {"output": f"{CANARY}\ud800"})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (f"instruction;output\n{CANARY};b\n", "looks separated by another mark"),
        (f"instruction\toutput\n{CANARY}\tb\n", "looks separated by another mark"),
        ("instruction,output,output\na,b,c\n", "names a column twice"),
        (f"instruction,output\n{CANARY},b,c\n", "line 2: has 3 fields under 2 column names"),
        (f"instruction,output\n{CANARY}\n", "line 2: has 1 fields under 2 column names"),
        (f'instruction,output\n"{CANARY},b\n', "is not valid CSV"),
        (f'instruction,output\n"{CANARY}"x,b\n', "line 2: is not valid CSV"),
    ],
)
def test_bad_csv(tmp_path, content, what):
    message = refuse_file(tmp_path / "a.csv", content)
    assert what in message
    assert "Remedy: " in message


def test_bad_parquet(tmp_path):
    assert "not a readable Parquet file" in refuse_file(tmp_path / "a.parquet", CANARY)


def test_damaged_folder_of_datasets(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    assert "save it again" in refusal(read.read, str(tmp_path), columns=COLUMNS)


def test_data_set_that_is_not_in_the_cache(monkeypatch, tmp_path):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal(read.read, "nobody/nothing", columns=COLUMNS)
    assert "no such file or folder" in message
    assert "nobody/nothing" in message


@pytest.mark.parametrize("empty", [None, "", " \n"])
@pytest.mark.parametrize(
    "row",
    [
        lambda x: GOOD | {"output": x},
        lambda x: {"prompt": CANARY, "completion": x},
        lambda x: {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": x}]},
    ],
)
def test_row_without_an_answer(row, empty):
    message = refuse_rows(row("good"), row(empty))
    assert message.startswith("row 2: has no answer in ")
    assert "Remedy: " in message


def test_row_that_lacks_a_key_the_others_have(tmp_path):
    message = refuse_file(tmp_path / "a.jsonl", line() + json.dumps({"instruction": CANARY}) + "\n")
    assert message.startswith("a.jsonl line 2: has no answer in 'output'")


@pytest.mark.parametrize("value", [7, 7.5, True, ["Zyx"], {"Zyx": "Zyx"}])
@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_text_that_is_not_text(column, value):
    message = refuse_rows(GOOD | {column: value})
    assert message.startswith(f"row 1: {column!r} is {type(value).__name__} and not text")


@pytest.mark.parametrize("value", [None, "", "  ", True, float("nan"), float("inf"), ["Zyx"]])
def test_unit_that_names_nobody(value):
    message = refuse_rows(
        GOOD | {"patient_id": "Zyx"}, GOOD | {"patient_id": value}, columns=Columns(unit="patient_id")
    )
    assert message.startswith("row 2: the unit column 'patient_id' is ")


def test_unit_column_that_is_nowhere():
    assert "data.unit_column" in refuse_rows(GOOD, columns=Columns(unit="patient_id"))


def test_input_column_that_is_set_and_nowhere():
    assert "data.input_column" in refuse_rows(GOOD, columns=Columns(input="context"))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("question", "answer"), ('data.instruction_column = "question"', 'data.output_column = "answer"')),
        (("instruction", "response"), ("no column 'output'", 'data.output_column = "response"')),
        (("prompt", "response"), ('data.instruction_column = "prompt"', 'data.output_column = "response"')),
        (("conversations",), ("rename 'conversations'", "`role`")),
        ((CANARY, "Zyx"), ("no column 'instruction' and no column 'output' among its 2",)),
    ],
)
def test_wrong_field_names_say_which_setting_to_set(names, parts):
    message = refuse_rows(dict.fromkeys(names, CANARY))
    assert all(part in message for part in parts), message


def test_columns_of_two_shapes():
    assert "two shapes" in refuse_rows(GOOD | {"prompt": CANARY, "completion": CANARY})


def chat(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": CANARY}, "'messages' is str and not a list"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": None}, "has no 'messages'"),
        ({"messages": [CANARY]}, "messages[0] is not an object"),
        ({"messages": [{"from": "human", "value": CANARY}]}, "messages[0] is not an object with `role`"),
        (chat(("tool", CANARY)), "messages[0] has another role"),
        (chat(("user", 7), ("assistant", "a")), "'messages[0].content' is int"),
        (chat(("user", " "), ("assistant", "a")), "has nothing in 'messages[0].content'"),
        (chat(("user", CANARY)), "the last message is not the assistant's"),
        (chat(("assistant", CANARY)), "begins with an answer"),
        (chat(("system", CANARY), ("assistant", CANARY)), "begins with an answer"),
        (chat(("user", "u"), ("system", CANARY), ("assistant", "a")), "a system message that is not the first"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]},
            "messages[1] has more than `role` and `content`",
        ),
        ({"prompt": CANARY, "completion": [{"role": "assistant", "content": "a"}]}, "no list in the other"),
        (
            {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "user", "content": CANARY}]},
            "the last message is not the assistant's",
        ),
        ({"prompt": None, "completion": CANARY}, "has nothing in 'prompt'"),
        ({"prompt": [{"role": "user", "content": "u"}], "completion": None}, "has no 'completion'"),
    ],
)
def test_bad_conversation(row, what):
    message = refuse_rows(row)
    assert message.startswith("row 1: ")
    assert what in message


def test_duplicate_ids_name_the_first_duplicates_rows(tmp_path):
    rows = [GOOD | {"id": value} for value in ("a", CANARY, "b", CANARY, "b", None, None)]
    message = refuse_file(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert message.startswith("a.jsonl line 2, a.jsonl line 4: have the same 'id'; 2 ids occur more than once")
    assert 'data.unit_column = "id"' in message


def test_many_problems_list_five_and_the_count(tmp_path):
    message = refuse_file(tmp_path / "a.jsonl", line() + line(output=None) * 3 + line(input=7) * 9)
    assert message.count("a.jsonl line") == 5
    assert "; and 7 more, 12 in all. Remedy: " in message
    assert message.count("fill in the missing text") == 1


def test_control_the_canary_would_be_found_if_a_message_quoted_a_value():
    def quoting() -> None:
        raise DataError(f"row 1: {CANARY} is not a number")

    with pytest.raises(AssertionError):
        refusal(quoting)
