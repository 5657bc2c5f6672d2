"""What a site is told about its rows, and what it is shown of them."""

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from client.data import check
from common.data import read
from common.data.rows import Columns
from common.text import templates

CANARY = "Zyxwvut-4711"
COLUMNS = Columns(unit="patient")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    vocabulary = {"[unk]": 0, "<|im_end|>": 1, "<|im_start|>": 2} | {chr(c): c for c in range(3, 128)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    built = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="[unk]")
    built.chat_template = templates.CHATML
    return built


def rows_of(*fields: tuple[str, str, str]):
    table = [{"patient": p, "instruction": i, "input": "", "output": o} for p, i, o in fields]
    return read.to_rows(table, COLUMNS)


ROWS = rows_of(("p1", "a", "b"), ("p1", "a", "b"), ("p1", "c", CANARY), ("p2", "a", "b" * 50))
ROWS = [replace(ROWS[0], is_input_empty=False), *ROWS[1:]]  # rows 1 and 2 differ in nothing that is trained on


def test_counts_without_a_tokenizer():
    assert check.check(ROWS) == check.CheckReport(
        num_rows=4,
        num_units=2,
        rows_per_unit_median=2.0,
        rows_per_unit_max=3,
        num_duplicates=1,
        num_empty_inputs=3,
        num_same_text=2,  # the same is asked in the fourth row
    )


def test_counts_of_tokens(tokenizer):
    whole = check.check(ROWS, tokenizer=tokenizer).tokens
    assert whole.max_length_tokens is None
    assert (whole.num_too_long, whole.num_truncated, whole.num_dropped) == (0, 0, 0)
    assert whole.num_answer_tokens == 2 + 2 + len(CANARY) + 1 + 51
    assert whole.quantiles["50%"] < whole.quantiles["90%"] == whole.quantiles["100%"]


@pytest.mark.parametrize(("too_long", "truncated", "dropped"), [("truncate", 1, 0), ("drop", 0, 1), ("error", 0, 0)])
def test_what_a_limit_does(tokenizer, too_long, truncated, dropped):
    shortest_of_long = check.check(ROWS, tokenizer=tokenizer).tokens.quantiles["100%"] - 1
    tokens = check.check(ROWS, tokenizer=tokenizer, max_length_tokens=shortest_of_long, too_long=too_long).tokens
    assert (tokens.num_too_long, tokens.num_truncated, tokens.num_dropped) == (1, truncated, dropped)


def test_text_that_spells_a_control_token_is_counted(tokenizer):
    rows = rows_of(("p1", "a <|im_end|> b", "c"), ("p1", "a", "b"))
    assert check.check(rows, tokenizer=tokenizer).tokens.num_with_control_tokens == 1


def test_no_rows_is_a_callers_mistake():
    with pytest.raises(ValueError, match="no rows"):
        check.check([])


def screen(shown) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(shown)
    return console.file.getvalue()


def test_report_holds_no_text_of_a_row(tokenizer):
    report = check.check(ROWS, tokenizer=tokenizer, max_length_tokens=30)
    for text in (json.dumps(asdict(report)), screen(check.render(report)), repr(report)):
        assert CANARY not in text


def test_table_shows_every_count(tokenizer):
    report = check.check(ROWS * 400, tokenizer=tokenizer, max_length_tokens=30)
    shown = screen(check.render(report))
    assert "1,600" in shown
    assert "99% of rows" in shown
    assert "no limit" in screen(check.render(check.check(ROWS, tokenizer=tokenizer)))


def test_preview_marks_the_answer_and_nothing_else(tokenizer):
    (item,) = check.preview(ROWS, tokenizer, limit=1)
    answer = "".join(token.text for token in item.tokens if token.is_answer)
    assert answer == "b<|im_end|>"
    assert [text for text, is_answer in item.segments if is_answer] == ["b<|im_end|>"]
    assert "".join(text for text, _ in item.segments) == "".join(token.text for token in item.tokens)
    assert json.loads(json.dumps(asdict(item)))["tokens"][0] == {"id": 2, "text": "<|im_start|>", "is_answer": False}


def test_a_terminal_shows_answers_in_colour_under_the_number_of_their_row(tokenizer):
    shown = check.render_preview(check.preview(ROWS, tokenizer, limit=3))
    assert "row 3: " in shown.plain
    assert screen(shown).count("\x1b[30;42m") == 3
    assert f"\x1b[30;42m{CANARY}<|im_end|>\x1b[0m" in screen(shown)


def test_a_pipe_shows_answers_between_marks_that_no_row_can_spell(tokenizer):
    (row,) = rows_of(("p1", "a \u27e6x\u27e7", "b"))
    shown = check.render_preview(check.preview([row], tokenizer, limit=1)).plain
    assert shown.count("\u27e6") == shown.count("\u27e7") == 1
    assert "\u27e6b<|im_end|>\u27e7" in shown


def test_preview_tells_what_a_limit_does(tokenizer):
    limit = check.check(ROWS, tokenizer=tokenizer).tokens.quantiles["100%"] - 1
    options = {"limit": 4, "max_length_tokens": limit}
    cut = check.preview(ROWS, tokenizer, **options, too_long="truncate")
    assert "1 tokens cut off" in check.render_preview(cut).plain
    dropped = check.preview(ROWS, tokenizer, **options, too_long="drop")
    assert [item.is_dropped for item in dropped] == [False, False, False, True]
    assert "would not be trained on" in check.render_preview(dropped).plain


def test_markup_and_control_characters_of_the_data_have_no_effect(tokenizer):
    previews = [
        check.Preview(
            "row 1", (), (("[bold red]x[/] [link=http://a]y", True), ("\x1b[2J\x9b1m\u202eabc\r", False)), 0, False
        )
    ]
    shown = screen(check.render_preview(previews))
    assert "[bold red]x[/] [link=http://a]y" in shown
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J\\x9b1m\\u202eabc\\r" in shown


def test_check_says_which_setting_keeps_how_many_rows_and_answers(tokenizer):
    long = {"patient": "p1", "instruction": "note", "input": "x" * 200, "output": "b" * 10}
    wordy = {"patient": "p2", "instruction": "note", "input": "", "output": "b" * 200}
    rows = [*read.to_rows([long, wordy], COLUMNS), *ROWS[:2]]
    tokens = check.check(rows, tokenizer=tokenizer, max_length_tokens=120).tokens
    assert tokens.by_too_long == {
        "truncate_input": {"num_rows": 3, "num_whole_answers": 3},
        "truncate": {"num_rows": 3, "num_whole_answers": 2},
        "drop": {"num_rows": 2, "num_whole_answers": 2},
    }
    shown = io.StringIO()
    Console(file=shown, width=120).print(check.render(check.check(rows, tokenizer=tokenizer, max_length_tokens=120)))
    assert 'rows kept by data.too_long = "truncate_input"' in shown.getvalue()
    assert check.check(rows, tokenizer=tokenizer).tokens.by_too_long == {}
    (cut, *_) = check.preview(rows, tokenizer, limit=1, max_length_tokens=120, too_long="truncate_input")
    assert "tokens cut out of the input" in check.render_preview([cut]).plain
    assert "b" * 10 in check.render_preview([cut]).plain


def test_check_counts_own_held_out_rows_that_are_trained_on():
    held_out = rows_of(("p3", "c", "d"), ("p4", "is new", "e"))
    report = check.check([*rows_of(("p1", "c", "d"), ("p2", "f", "g")), *held_out], held_out=held_out)
    assert (report.num_held_out_in_training, report.num_same_text) == (1, 1)
    assert check.check(ROWS).num_held_out_in_training is None
