"""Chat template, tokens and loss mask: the same for training and for evaluation.

Shapes: b rows of a batch, t tokens of the longest row.
"""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from common.data.rows import Message, Row
from common.errors import DataError, ModelError
from common.text import chat, spelling, templates

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

TooLong = Literal["truncate", "truncate_input", "drop", "error"]
CUT_MARK: Final = " [...] "  # where the middle of an input was
_WHOLE_WORD: Final = re.compile(r"\S\s+\S")
_LAST_PART: Final = re.compile(r"\S+\Z")
_FIRST_PART: Final = re.compile(r"\A\S+")
TemplateName = Literal["tokenizer", "chatml", "alpaca"]


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; arrays of 4 and 1 bytes a token where `encode` made it.

    Attributes:
        input_ids: Token ids of the whole conversation, cut at the limit.
        is_answer: 1 on the tokens that the loss covers, else 0; as long as `input_ids`.
        unit: The row's privacy unit.
        num_truncated: Tokens that were cut off at the right, or out of the input.
    """

    input_ids: Sequence[int]
    is_answer: Sequence[int]
    unit: str
    num_truncated: int = 0

    @property
    def rows(self) -> "tuple[Encoded, ...]":
        """What goes through the model together: the row itself; see `common.loss.objectives` for examples that have
        two.
        """
        return (self,)


@dataclass(frozen=True)
class EncodingReport:
    """What encoding did to a data set.

    Attributes:
        num_rows: Rows that went in.
        num_truncated: Rows that were cut and kept.
        num_dropped: Rows that were left out: too long, cut so that no answer remained, or pairs whose answers are the
            same after the cut.
        num_tokens: Tokens of the rows kept.
        num_answer_tokens: Those of them that the loss covers.
        max_tokens: Tokens of the longest row kept.
    """

    num_rows: int
    num_truncated: int
    num_dropped: int
    num_tokens: int
    num_answer_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once: lines of tokens, and to which rows and privacy units these belong.

    Attributes:
        input_ids_bt: Token ids, int64; the pad id where there is no token.
        row_bt: Number of each token's row, int64, not descending along the lines; -1 on padding.
        positions_bt: Place of each token in its row, int64; 0 on padding.
        predicting_n: Places, in the lines laid end to end, of the tokens that predict an answer's token, int64.
        targets_n: The ids of the tokens that they predict, row after row; a row's first token is predicted by nothing.
        lengths: Tokens of each row.
        num_targets: Predicted tokens of each row.
        owners: Number of each row's privacy unit, from 0 up to the number of units.
        is_packed: All rows are in one line, without padding; attention must not cross them.
    """

    input_ids_bt: "torch.Tensor"
    row_bt: "torch.Tensor"
    positions_bt: "torch.Tensor"
    predicting_n: "torch.Tensor"
    targets_n: "torch.Tensor"
    lengths: tuple[int, ...]
    num_targets: tuple[int, ...]
    owners: tuple[int, ...]
    is_packed: bool

    @property
    def device(self) -> "torch.device":
        """Where the tensors are."""
        return self.input_ids_bt.device

    @property
    def attention_mask_bt(self) -> "torch.Tensor":
        """1 on tokens and 0 on padding, int64."""
        return (self.row_bt >= 0).long()

    def tokens_of(self, owner: int) -> "torch.Tensor":
        """Places of one unit's tokens in the lines laid end to end, (n,), int64."""
        import torch

        rows = [row for row, own in enumerate(self.owners) if own == owner]
        return torch.isin(self.row_bt, torch.tensor(rows, device=self.device)).flatten().nonzero().squeeze(1)

    def to(self, device: "torch.device | str") -> "Batch":
        """Give the same batch on another device."""
        names = ("input_ids_bt", "row_bt", "positions_bt", "predicting_n", "targets_n")
        if str(device).startswith("cuda"):  # out of pinned memory a copy does not hold the host up
            pinned = {name: getattr(self, name).pin_memory() for name in names}
            return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()})
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def use_template(tokenizer: "Tokenizer", name: TemplateName, *, date: str = "") -> "Tokenizer":
    """Set the tokenizer's chat template to a built-in one, or to its own as a run can be trained with it.

    Args:
        tokenizer: Changed in place.
        name: "tokenizer" keeps the template that came with the model; see `templates.fitted` for what is put before it.
        date: The day, YYYY-MM-DD, that a template prints which prints one; empty: the day on which it is rendered.

    Raises:
        ModelError: The tokenizer has no template, or several and none of them is the default, or it lacks the tokens
            that the named one needs.
    """
    if name == "tokenizer":
        chat.require_template(tokenizer)
        if isinstance(tokenizer.chat_template, dict):
            named: dict[str, str] = tokenizer.chat_template
            if "default" not in named:
                raise ModelError(
                    f"the tokenizer has the chat templates {', '.join(sorted(named))}, and none is the default: "
                    'set model.chat_template = "chatml" or "alpaca"'
                )
            tokenizer.chat_template = named["default"]
        tokenizer.chat_template = templates.with_date(templates.fitted(tokenizer), date)
    elif name == "chatml":
        missing = [token for token in templates.CHATML_TOKENS if token not in tokenizer.get_vocab()]
        if missing:  # it would be cut into pieces
            raise ModelError(
                f'the tokenizer has no token {" or ".join(missing)}, which model.chat_template = "chatml" needs: '
                'set it to "tokenizer" or "alpaca"'
            )
        tokenizer.chat_template = templates.CHATML
    elif name == "alpaca":
        if not tokenizer.eos_token:
            raise ModelError('the tokenizer has no end token, which model.chat_template = "alpaca" needs')
        tokenizer.chat_template = templates.ALPACA
    else:
        raise ValueError(f"unknown chat template {name!r}")
    start = tokenizer.bos_token_id
    if name != "tokenizer" and start is not None and tokenizer("a")["input_ids"][0] == start:  # as in every text
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def encode(
    row: Row, tokenizer: "Tokenizer", *, max_length_tokens: int, too_long: TooLong, system_prompt: str = ""
) -> Encoded | None:
    """Turn one row into tokens and mark those that the loss covers.

    The conversation is rendered once and tokenised once. An answer is what the model has to write itself: from the
    end of the generation prompt to the end-of-turn token, without the white space that the template puts after it.
    It is marked by position, so a pad token that is also the end token does no harm. A token that begins before the
    answer, as when "\\n" of the template merges with "\\n" of the answer, is not marked.

    Args:
        too_long: What to do with a longer one; "truncate" cuts at the right, "truncate_input" as `shorten` does.
        system_prompt: System message for rows that have none of their own; "" adds none.

    Returns:
        The row, or None if it was dropped: too long, or no answer token left after the cut.

    Raises:
        DataError: The row is too long and `too_long` is "error".
        ModelError: The tokenizer is not fast, or its template cannot be used for training.
    """
    if too_long == "truncate_input":
        row = shorten(row, tokenizer, max_length_tokens=max_length_tokens, system_prompt=system_prompt)
    encoded = encode_whole(row, tokenizer, system_prompt=system_prompt)
    num_tokens = len(encoded.input_ids)
    if too_long == "error" and num_tokens > max_length_tokens:
        raise DataError(
            f"{row.row_id}: {num_tokens} tokens, over the limit of {max_length_tokens}: "
            'raise data.max_length_tokens or set data.too_long = "truncate_input", "truncate" or "drop"'
        )
    return cut(encoded, max_length_tokens=max_length_tokens, is_cut_allowed=too_long == "truncate")


def _between_words(text: str, head: int, tail: int) -> tuple[str, str]:
    """The parts before and after, less a word that either place is within: half a number is another number."""
    first, last = text[:head], text[tail:]
    if _WHOLE_WORD.search(first) and not text[head : head + 1].isspace():
        first = _LAST_PART.sub("", first)
    if _WHOLE_WORD.search(last) and not text[tail - 1 : tail].isspace() and not last[:1].isspace():
        last = _FIRST_PART.sub("", last)
    return first.rstrip(), last.lstrip()


def encode_whole(row: Row, tokenizer: "Tokenizer", *, system_prompt: str = "") -> Encoded:
    """Encode a row at its full length; see `encode`.

    Raises:
        ModelError: The tokenizer is not fast, or its template cannot be used for training.
    """
    spelling.require_fast(tokenizer)
    found = chat.render(row, tokenizer, system_prompt=system_prompt)
    input_ids, offsets = spelling.tokenise(found, tokenizer)
    is_answer = array("b", bytes(len(input_ids)))
    for start, end in found.answers:
        inside = [i for i, (left, right) in enumerate(offsets) if start <= left < end and start < right]
        left, right = offsets[inside[-1]] if inside else (0, 0)
        # the last token ends there, or is a control token of those that take the white space behind them
        is_control = right > end and spelling.added(tokenizer).fullmatch(found.text[left:right].strip())
        if not inside or (right != end and not is_control):
            raise ModelError(f"{row.row_id}: no token ends where an answer ends: {chat.remedy(tokenizer)}")
        for i in inside:
            is_answer[i] = 1
    return Encoded(array("i", input_ids), is_answer, row.unit, row.num_cut)


def shorten(row: Row, tokenizer: "Tokenizer", *, max_length_tokens: int, system_prompt: str = "") -> Row:
    """Cut the middle out of a row's input, so that the row fits; answers, instruction and template stay whole.

    The input is what follows the instruction in the longest user turn, or all of that turn where the row's shape has
    no instruction of its own. Its beginning and end stay, as many tokens of each, with " [...] " between them. Of a
    pair both answers get the same input, which fits the longer one.

    Returns:
        The row with `num_cut` tokens less; as it was, if it fits, or if it would not fit without any input either.
    """

    def num_tokens(candidate: Row) -> int:
        rows = [replace(candidate, messages=turns) for turns in (candidate.messages, candidate.rejected) if turns]
        return max(len(encode_whole(one, tokenizer, system_prompt=system_prompt).input_ids) for one in rows)

    num_over = num_tokens(row) - max_length_tokens
    given = [place for place, message in enumerate(row.messages) if message.role == "user"]
    if num_over <= 0 or not given:
        return row
    place = max(given, key=lambda number: len(row.messages[number].content))
    if row.rejected[place : place + 1] not in ((), row.messages[place : place + 1]):
        return row  # the two conversations of a pair differ before their answers
    before, about = (
        row.messages[place].content[part] for part in (slice(row.input_start), slice(row.input_start, None))
    )
    _, offsets = spelling.tokenise(spelling.Rendered(about, ((0, len(about)),), ("user",)), tokenizer)
    num_kept = len(offsets) - num_over
    while num_kept > 1:
        head, tail = _between_words(
            about, offsets[(num_kept + 1) // 2 - 1][1], offsets[len(offsets) - num_kept // 2][0]
        )
        turn = replace(row.messages[place], content=f"{before}{head}{CUT_MARK}{tail}")
        both = [(*turns[:place], turn, *turns[place + 1 :]) if turns else () for turns in (row.messages, row.rejected)]
        shorter = replace(row, messages=both[0], rejected=both[1], num_cut=len(offsets) - num_kept)
        if (num_over := num_tokens(shorter) - max_length_tokens) <= 0:
            return shorter
        num_kept -= num_over
    return row


def cut(encoded: Encoded, *, max_length_tokens: int, is_cut_allowed: bool) -> Encoded | None:
    """Bring a row under the limit.

    Args:
        is_cut_allowed: Whether a longer row is cut at the right or dropped.

    Returns:
        The row, or None if it is dropped or no answer token is left.
    """
    num_over = len(encoded.input_ids) - max_length_tokens
    if num_over <= 0:
        return encoded
    if not is_cut_allowed or not any(encoded.is_answer[:max_length_tokens]):
        return None
    ids, is_answer = encoded.input_ids[:max_length_tokens], encoded.is_answer[:max_length_tokens]
    return replace(encoded, input_ids=ids, is_answer=is_answer, num_truncated=num_over)


def encode_all(
    rows: Iterable[Row], tokenizer: "Tokenizer", *, max_length_tokens: int, too_long: TooLong, system_prompt: str = ""
) -> tuple[list[Encoded], EncodingReport]:
    """Encode a data set and count what was cut and left out.

    Returns:
        The rows kept, in order, and the counts.

    Raises:
        DataError: No row is left, or one is too long and `too_long` is "error".
        ModelError: The tokenizer is not fast, or its template cannot be used for training.
    """
    results = [
        encode(row, tokenizer, max_length_tokens=max_length_tokens, too_long=too_long, system_prompt=system_prompt)
        for row in rows
    ]
    kept = [encoded for encoded in results if encoded is not None]
    if not kept:
        raise DataError(
            f"no answer token is left in any of {len(results)} rows at {max_length_tokens} tokens: "
            "raise data.max_length_tokens or shorten the rows"
        )
    return kept, report_of(kept, num_rows=len(results))


def prompt_ids(row: Row, tokenizer: "Tokenizer", *, system_prompt: str = "") -> tuple[list[int], str]:
    """Give what a model is shown to write the last answer, and that answer.

    Args:
        row: Its last message is the expected answer.

    Returns:
        Token ids up to and with the generation prompt, and the expected text.

    Raises:
        ModelError: The tokenizer is not fast, or its template fails.
    """
    spelling.require_fast(tokenizer)
    found = chat.render_prompt(row, tokenizer, system_prompt=system_prompt)
    return spelling.tokenise(found, tokenizer)[0], row.messages[-1].content


def text_ids(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Give the tokens of a text that is no conversation; control tokens that it spells are text, as in a message.

    Returns:
        Token ids, none of them added at the ends.

    Raises:
        ModelError: The tokenizer is not fast.
    """
    spelling.require_fast(tokenizer)
    return spelling.tokenise(spelling.Rendered(text, ((0, len(text)),), ("user",)), tokenizer)[0]


def turn_end_id(tokenizer: "Tokenizer") -> int:
    """Give the token with which the chat template ends an answer.

    Returns:
        The first token after the answer in the template's own rendering of one, white space aside.

    Raises:
        ModelError: The tokenizer is not fast, its template cannot be used for training, or it ends an answer with text
            of several tokens, at the first of which generation would stop in the middle of answers.
    """
    spelling.require_fast(tokenizer)
    row = Row((Message("user", "Yes?"), Message("assistant", "Yes.")), unit="", row_id="a trial conversation")
    found = chat.render(row, tokenizer)
    [(start, end)] = found.answers
    tail = found.text[start:end].partition("Yes.")[2].strip()
    ids = spelling.tokenise(spelling.Rendered(tail, (), ()), tokenizer)[0]
    if ids[0] not in tokenizer.added_tokens_decoder and len(ids) > 1:
        raise ModelError(
            "the chat template ends an answer with text that is no token of its own, so generation would not know "
            f"where to stop: {chat.remedy(tokenizer)}"
        )
    return ids[0]


def stop_ids(tokenizer: "Tokenizer", generation: "GenerationConfig | None" = None) -> tuple[int, ...]:
    """Tell which tokens end an answer; evaluation, `serve` and every export ask here.

    Args:
        generation: `generation_config` of the base, whose authors may name more tokens; None: there is none.

    Returns:
        The template's end of a turn, the tokenizer's end token and those of `generation`, ascending.

    Raises:
        ModelError: See `turn_end_id`.
    """
    named = generation.eos_token_id if generation else None
    more = named if isinstance(named, list) else [named]
    ids = {turn_end_id(tokenizer), tokenizer.eos_token_id, *more}
    return tuple(sorted(i for i in ids if i is not None))


def collate(batch: Sequence[Encoded], *, pad_id: int, owners: Sequence[int] = (), is_packed: bool = False) -> Batch:
    """Lay rows out as the lines of one pass: each in a line of its own, padded at the right, or all in one line.

    Args:
        pad_id: Fills the gaps; which id it is does not matter to the mask.
        owners: Number of each row's unit; empty: rows of one name are of one unit, numbered as they come.
        is_packed: All rows in one line, for a model that keeps them apart (`common.model.varlen.traits_of`).

    Raises:
        ValueError: The batch is empty.

    Shape: (b, t); b rows and t tokens of the longest, or one line of all tokens.
    """
    import torch

    if not batch:
        raise ValueError("an empty batch has no shape")
    lengths = np.array([len(encoded.input_ids) for encoded in batch])
    num_lines, width = (1, int(lengths.sum())) if is_packed else (len(batch), int(lengths.max()))
    starts = lengths.cumsum() - lengths if is_packed else np.arange(len(batch)) * width
    tokens_n = np.concatenate([np.asarray(encoded.input_ids) for encoded in batch])
    row_n = np.arange(len(batch)).repeat(lengths)
    position_n = np.concatenate([np.arange(length) for length in lengths])
    place_n = starts.repeat(lengths) + position_n
    is_target_n = np.concatenate([np.asarray(encoded.is_answer, dtype=bool) for encoded in batch]) & (position_n > 0)

    def laid_out(values_n: np.ndarray, fill: int) -> torch.Tensor:
        line = np.full(num_lines * width, fill, dtype=np.int64)
        line[place_n] = values_n
        return torch.from_numpy(line).view(num_lines, width)

    names: dict[str, int] = {}
    return Batch(
        input_ids_bt=laid_out(tokens_n, pad_id),
        row_bt=laid_out(row_n, -1),
        positions_bt=laid_out(position_n, 0),
        predicting_n=torch.from_numpy(place_n[is_target_n] - 1),
        targets_n=torch.from_numpy(tokens_n[is_target_n].astype(np.int64)),
        lengths=tuple(lengths.tolist()),
        num_targets=tuple(np.bincount(row_n[is_target_n], minlength=len(batch)).tolist()),
        owners=tuple(owners) or tuple(names.setdefault(encoded.unit, len(names)) for encoded in batch),
        is_packed=is_packed,
    )


def report_of(kept: "Sequence[Any]", *, num_rows: int) -> EncodingReport:
    """Count examples that were kept, rows or pairs, out of so many; a pair is one, with the tokens of both."""
    rows: list[Encoded] = [row for example in kept for row in example.rows]
    return EncodingReport(
        num_rows=num_rows,
        num_truncated=sum(any(row.num_truncated for row in example.rows) for example in kept),
        num_dropped=num_rows - len(kept),
        num_tokens=sum(len(row.input_ids) for row in rows),
        num_answer_tokens=sum(sum(row.is_answer) for row in rows),
        max_tokens=max(len(row.input_ids) for row in rows),
    )
