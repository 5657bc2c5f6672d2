"""Limits, counts and padding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.data.rows import Message, Row
from common.errors import DataError
from common.text import prompts, templates
from common.text.prompts import Encoded

END = 1


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character; the pad token is the end token."""
    vocabulary = {"[unk]": 0, "<|im_end|>": END, "<|im_start|>": 2} | {chr(c): c for c in range(3, 128)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    built = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="[unk]"
    )
    built.chat_template = templates.CHATML
    return built


def row(question: str, answer: str, unit: str = "p1") -> Row:
    return Row((Message("user", question), Message("assistant", answer)), unit=unit, row_id="row 1")


def test_truncation_cuts_at_the_right_and_counts(tokenizer):
    whole = prompts.encode(row("ab", "cdef"), tokenizer, max_length_tokens=100, too_long="truncate")
    cut = prompts.encode(row("ab", "cdef"), tokenizer, max_length_tokens=24, too_long="truncate")
    assert whole.num_truncated == 0
    assert cut.input_ids == whole.input_ids[:24]
    assert cut.is_answer == whole.is_answer[:24]
    assert cut.num_truncated == len(whole.input_ids) - 24
    assert any(cut.is_answer)


def test_row_whose_answer_is_cut_away_is_dropped_and_counted(tokenizer):
    rows = [row("a" * 50, "b"), row("a", "b")]
    kept, report = prompts.encode_all(rows, tokenizer, max_length_tokens=40, too_long="truncate")
    assert len(kept) == 1
    assert (report.num_rows, report.num_dropped, report.num_truncated) == (2, 1, 0)


def test_report_counts_tokens(tokenizer):
    rows = [row("a", "b"), row("a", "bcd"), row("a", "b" * 90)]
    kept, report = prompts.encode_all(rows, tokenizer, max_length_tokens=40, too_long="truncate")
    assert report == prompts.EncodingReport(
        num_rows=3,
        num_truncated=1,
        num_dropped=0,
        num_tokens=sum(len(e.input_ids) for e in kept),
        num_answer_tokens=sum(sum(e.is_answer) for e in kept),
        max_tokens=40,
    )
    assert [sum(e.is_answer) for e in kept[:2]] == [2, 4], "answer characters and the end token"


def test_drop_leaves_out_what_is_too_long(tokenizer):
    kept, report = prompts.encode_all(
        [row("a", "b"), row("a", "b" * 90)], tokenizer, max_length_tokens=40, too_long="drop"
    )
    assert len(kept) == 1
    assert (report.num_dropped, report.num_truncated) == (1, 0)


def test_row_at_the_limit_is_kept_whole(tokenizer):
    whole = prompts.encode_whole(row("a", "b"), tokenizer)
    limit = len(whole.input_ids)
    assert prompts.encode(row("a", "b"), tokenizer, max_length_tokens=limit, too_long="error") == whole
    assert prompts.cut(whole, max_length_tokens=limit - 1, is_cut_allowed=False) is None


@pytest.mark.parametrize("rows", [[], [row("a" * 50, "b")]])
def test_nothing_left_to_learn_is_an_error(tokenizer, rows):
    with pytest.raises(DataError, match=r"data\.max_length_tokens") as caught:
        prompts.encode_all(rows, tokenizer, max_length_tokens=20, too_long="truncate")
    assert caught.value.exit_code == 3


def test_collate_pads_right_and_never_marks_padding(tokenizer):
    short, long = (prompts.encode_whole(row("a", "b" * n, unit=f"p{n}"), tokenizer) for n in (1, 3))
    batch = prompts.collate([short, long], pad_id=END)
    assert batch.input_ids_bt.dtype == batch.attention_mask_bt.dtype == torch.int64
    assert batch.owners == (0, 1)
    assert batch.attention_mask_bt.sum(dim=1).tolist() == [len(short.input_ids), len(long.input_ids)]
    assert batch.input_ids_bt[0, len(short.input_ids) :].tolist() == [END, END]
    flat = batch.input_ids_bt.flatten()
    assert torch.equal(flat[batch.predicting_n + 1], batch.targets_n)
    assert (batch.row_bt.flatten()[batch.predicting_n + 1] >= 0).all()
    assert batch.num_targets == (sum(short.is_answer), sum(long.is_answer))


def test_end_token_stays_in_the_mask_where_it_is_also_the_pad_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    batch = prompts.collate([prompts.encode_whole(row("a", "b"), tokenizer)] * 2, pad_id=END)
    assert batch.targets_n.tolist() == [ord("b"), END] * 2


def test_batch_moves_to_a_device(tokenizer):
    batch = prompts.collate([prompts.encode_whole(row("a", "b"), tokenizer)], pad_id=0).to("meta")
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}


def test_empty_batch_is_a_callers_mistake():
    with pytest.raises(ValueError, match="empty"):
        prompts.collate([], pad_id=0)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(lengths=lengths, pad_id=st.integers(0, 9))
def test_collate_keeps_every_token(lengths, pad_id):
    batch_rows = [Encoded(tuple(range(n)), tuple(k % 2 == 0 for k in range(n)), str(n)) for n in lengths]
    packed = prompts.collate(batch_rows, pad_id=pad_id, is_packed=True)
    assert packed.input_ids_bt.tolist() == packed.positions_bt.tolist() == [[k for n in lengths for k in range(n)]]
    assert packed.row_bt.tolist() == [[row for row, n in enumerate(lengths) for _ in range(n)]]
    assert packed.targets_n.tolist() == [k for n in lengths for k in range(2, n, 2)]
    assert packed.input_ids_bt[0, packed.predicting_n + 1].tolist() == packed.targets_n.tolist()
    owners = [owner for row, owner in enumerate(packed.owners) for _ in range(lengths[row])]
    for owner in set(owners):
        assert packed.tokens_of(owner).tolist() == [place for place, own in enumerate(owners) if own == owner]
    batch = prompts.collate(batch_rows, pad_id=pad_id)
    assert batch.input_ids_bt.shape == (len(lengths), max(lengths))
    for k, n in enumerate(lengths):
        assert batch.input_ids_bt[k].tolist() == [*range(n)] + [pad_id] * (max(lengths) - n)
        assert batch.attention_mask_bt[k].tolist() == [1] * n + [0] * (max(lengths) - n)
        targets = batch.row_bt.flatten()[batch.predicting_n] == k
        assert batch.targets_n[targets].tolist() == [i for i in range(1, n) if batch_rows[k].is_answer[i]]


def test_importing_prompts_loads_neither_torch_nor_transformers():
    code = "import sys; from common.text import prompts; print({'torch', 'transformers'} & set(sys.modules))"
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
