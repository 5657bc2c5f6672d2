"""What a site sees of its own data before it joins a run: counts, and rows as the model will get them."""

import math
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from common.data import overlap, units
from common.data.problems import Problems, UnusableError
from common.data.rows import Row
from common.errors import ModelError
from common.text import chat, prompts, spelling
from common.text.prompts import Encoded, TooLong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

QUANTILES: Final = (0.5, 0.9, 0.99, 1.0)
MAX_SHOWN: Final = 5
_SHOWN_AS: Final = {"alike": "units alike, first in", "not_read": "in the folder, not read"}
ANSWER_MARKS: Final = ("\u27e6", "\u27e7")  # white square brackets, which show in a pipe what a terminal colours
FITTING: Final[tuple[TooLong, ...]] = ("truncate_input", "truncate", "drop")  # ways to bring a row under the limit
HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})  # Unicode categories


@dataclass(frozen=True)
class TokenCounts:
    """Lengths under one tokenizer.

    Attributes:
        quantiles: Tokens of a whole row, before any cut, that these shares of rows have at most; "100%" is the longest.
        max_length_tokens: The limit that the other counts are for; None without one.
        num_too_long: Rows over the limit, whatever happens to them.
        num_truncated: Rows that would be cut and kept.
        num_dropped: Rows that would be left out.
        num_answer_tokens: Tokens that the loss would cover.
        num_with_control_tokens: Rows that spell a control token of the tokenizer, such as its end token, which is
            cut into ordinary tokens.
        by_too_long: What each `data.too_long` would make of the limit: `num_rows` that are kept, and of these
            `num_whole_answers` that lose nothing; empty without a limit.
    """

    quantiles: dict[str, int]
    max_length_tokens: int | None
    num_too_long: int
    num_truncated: int
    num_dropped: int
    num_answer_tokens: int
    num_with_control_tokens: int
    by_too_long: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """Counts over a site's rows; nothing in it is text of a row.

    Attributes:
        num_duplicates: Rows whose messages repeat an earlier row's exactly.
        num_empty_inputs: Rows whose input field is missing or empty.
        num_same_text: Rows whose text is that of an earlier row, word for word or nearly; a run's split keeps them on
            one side, unless it is private.
        num_held_out_in_training: Of the site's own held-out rows, those whose text it trains on; None without such.
        num_units_alike: Units whose names differ in case, leading zeros, blanks, dashes or kind of digits only. They
            are different units; if they are one patient, the file must say so.
        alike: Where the first of them begin.
        not_read: What of the folder of data is never read, such as a README.
    """

    num_rows: int
    num_units: int
    rows_per_unit_median: float
    rows_per_unit_max: int
    num_duplicates: int
    num_empty_inputs: int
    num_same_text: int = 0
    num_held_out_in_training: int | None = None
    tokens: TokenCounts | None = None
    num_units_alike: int = 0
    alike: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()


@dataclass(frozen=True)
class Token:
    """One token of a previewed row.

    Attributes:
        text: What it stands for; a character of several tokens shows as a replacement mark.
        is_answer: Whether the loss covers it.
    """

    id: int
    text: str
    is_answer: bool


@dataclass(frozen=True)
class Preview:
    """One row as the model gets it. Holds data: for the site's own eyes.

    Attributes:
        segments: The text, in pieces that are answer or are not.
        num_truncated: Tokens cut off, or out of the input.
        is_dropped: Whether the row would be left out; it is then shown whole.
    """

    row_id: str
    tokens: tuple[Token, ...]
    segments: tuple[tuple[str, bool], ...]
    num_truncated: int
    is_dropped: bool
    is_input_cut: bool = False


def check(
    rows: Sequence[Row],
    *,
    tokenizer: "Tokenizer | None" = None,
    max_length_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system_prompt: str = "",
    problems: Problems | None = None,
    held_out: Sequence[Row] | None = None,
) -> CheckReport:
    """Count what a site's data are made of.

    Args:
        tokenizer: Adds counts of tokens; has its chat template set.
        max_length_tokens: The run's limit; None counts without one.
        too_long: What the run does with longer rows; under "error" they are only counted, as too long.
        problems: Gets every row that the template cannot render, and under "error" every row that is too long; None
            raises the first of the one kind and only counts the other.
        held_out: Those of the rows that are the site's own held-out ones; None: a run splits.

    Raises:
        ValueError: There are no rows.
        ModelError: The tokenizer or its template cannot be used for training, and `problems` is None.
    """
    if not rows:
        raise ValueError("there are no rows to check")
    sizes = Counter(row.unit for row in rows).values()
    tokens = None
    if tokenizer is not None:
        tokens = _count_tokens(rows, tokenizer, max_length_tokens, too_long, system_prompt, problems)
    first_rows = {row.unit: row.row_id for row in reversed(rows)}
    groups = units.alike(row.unit for row in rows)
    num_trained = None
    if held_out is not None:
        aside = set(map(id, held_out))
        shared = overlap.between({"": held_out}, {"": [row for row in rows if id(row) not in aside]})[""]
        num_trained = shared.num_exact + shared.num_near
    return CheckReport(
        num_rows=len(rows),
        num_units=len(sizes),
        rows_per_unit_median=float(statistics.median(sizes)),
        rows_per_unit_max=max(sizes),
        num_duplicates=len(rows) - len({row.messages for row in rows}),
        num_empty_inputs=sum(row.is_input_empty for row in rows),
        num_same_text=len(rows) - len(set(overlap.groups([overlap.text_of(row) for row in rows]))),
        num_held_out_in_training=num_trained,
        tokens=tokens,
        num_units_alike=sum(map(len, groups)),
        alike=tuple(" and ".join(first_rows[unit] for unit in group[:3]) for group in groups[:MAX_SHOWN]),
    )


def told_apart(rows: Sequence[Row], *, path: str, unit_column: str) -> Sequence[Row]:
    """Rows of one of several data sets, as they are counted together: a row that is its own unit is none of another's.

    Args:
        unit_column: "" if every row is a unit, which is then a number in the data set.
    """
    return rows if unit_column else [replace(row, unit=f"{path} {row.unit}") for row in rows]


def render(report: CheckReport) -> Table:
    """Show a report as a table for rich's console."""
    table = Table("count", "value", title="data check")
    lines: dict[str, Any] = asdict(report)
    tokens: dict[str, Any] = lines.pop("tokens") or {}
    for share, num_tokens in tokens.pop("quantiles", {}).items():
        lines[f"tokens of a row, {share} of rows at most"] = num_tokens
    for name in ("alike", "not_read"):
        if places := lines.pop(name):
            table.add_row(_SHOWN_AS[name], Text("; ".join(places)))
    by_too_long = tokens.pop("by_too_long", {})
    for name, value in (lines | tokens).items():
        if name == "num_held_out_in_training" and value is None:
            continue
        table.add_row(name.removeprefix("num_").replace("_", " "), "no limit" if value is None else f"{value:,}")
    for setting, kept in by_too_long.items():
        table.add_row(f'rows kept by data.too_long = "{setting}"', f"{kept['num_rows']:,}")
        table.add_row(f'answers kept whole by data.too_long = "{setting}"', f"{kept['num_whole_answers']:,}")
    return table


def preview(
    rows: Iterable[Row],
    tokenizer: "Tokenizer",
    *,
    limit: int,
    max_length_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system_prompt: str = "",
) -> list[Preview]:
    """Show rows as the model gets them, with the tokens that the loss covers.

    Args:
        rows: The data set; only its first rows are read.
        max_length_tokens: The run's limit; None shows rows whole.

    Returns:
        At most `limit` previews. They hold text of the rows: for the site's own screen.

    Raises:
        ModelError: The tokenizer or its template cannot be used for training.
    """
    previews = []
    for row in islice(rows, limit):
        whole = prompts.encode_whole(row, tokenizer, system_prompt=system_prompt)
        kept = _fitted(row, whole, tokenizer, max_length_tokens, too_long, system_prompt)
        shown = kept or whole  # a row that would be left out is shown whole
        pairs = list(zip(shown.input_ids, map(bool, shown.is_answer), strict=True))
        runs = [(is_answer, [i for i, _ in run]) for is_answer, run in groupby(pairs, key=lambda pair: pair[1])]
        item = Preview(
            row_id=row.row_id,
            tokens=tuple(Token(i, _decode([i], tokenizer), is_answer) for i, is_answer in pairs),
            segments=tuple((_decode(ids, tokenizer), is_answer) for is_answer, ids in runs),
            num_truncated=shown.num_truncated,
            is_dropped=kept is None,
            is_input_cut=too_long == "truncate_input",
        )
        previews.append(item)
    return previews


def render_preview(previews: Iterable[Preview]) -> Text:
    """Show previews: answers between `ANSWER_MARKS`, and for a terminal highlighted, all else dim.

    Returns:
        Text in which neither rich markup nor control characters of the data have an effect.
    """
    shown = Text()
    for item in previews:
        cut = ""
        if item.num_truncated:
            cut = f", {item.num_truncated} tokens cut {'out of the input' if item.is_input_cut else 'off'}"
        fate = ", too long: it would not be trained on" if item.is_dropped else ""
        num_answer = sum(token.is_answer for token in item.tokens)
        head = f"{item.row_id}: {len(item.tokens)} tokens, {num_answer} of them answer{cut}{fate}"
        shown.append(f"{head}\n", style="bold")
        for text, is_answer in item.segments:
            before, after = ANSWER_MARKS if is_answer else ("", "")
            # Invisible characters and marks of answers are spelled out, so that data cannot steer the terminal.
            visible = "".join(
                ascii(character)[1:-1]
                if character in ANSWER_MARKS or (unicodedata.category(character) in HIDDEN and character not in "\n\t")
                else character
                for character in text
            )
            shown.append(before)
            shown.append(visible, style="black on green" if is_answer else "dim")
            shown.append(after)
        shown.append("\n\n")
    return shown


def _count_tokens(
    rows: Sequence[Row],
    tokenizer: "Tokenizer",
    limit: int | None,
    too_long: TooLong,
    system_prompt: str,
    problems: Problems | None,
) -> TokenCounts | None:
    """Lengths of whole rows, and what a limit does to them; rows that the template cannot render are left out."""
    whole: list[tuple[Row, Encoded]] = []
    for row in rows:
        try:
            whole.append((row, prompts.encode_whole(row, tokenizer, system_prompt=system_prompt)))
        except ModelError as error:
            if problems is None:
                raise
            problems.add(row.row_id, UnusableError(str(error).removeprefix(f"{row.row_id}: "), ""))
    if not whole:
        return None
    num_control = 0
    for row, _ in whole:
        if any(spelling.added(tokenizer).search(message.content) for message in row.messages):
            rendered = chat.render(row, tokenizer)
            num_control += bool(spelling.spelled(rendered.text, spelling.pieces(rendered, tokenizer), tokenizer))
    uncut = [encoded for _, encoded in whole]
    fitted: dict[TooLong, list[Encoded | None]] = {}
    for setting in FITTING if limit is not None else ():
        fitted[setting] = [_fitted(*pair, tokenizer, limit, setting, system_prompt) for pair in whole]
    kept: Sequence[Encoded | None] = fitted.get(too_long, uncut)
    by_too_long: dict[str, dict[str, int]] = {}
    for setting, ways in fitted.items():
        pairs = [(before, after) for before, after in zip(uncut, ways, strict=True) if after is not None]
        num_whole = sum(sum(after.is_answer) == sum(before.is_answer) for before, after in pairs)
        by_too_long[setting] = {"num_rows": len(pairs), "num_whole_answers": num_whole}
    lengths = sorted(len(encoded.input_ids) for encoded in uncut)
    if problems is not None and limit is not None and too_long == "error":
        # In a message of many, how long the longest is says what to set.
        what = f"over the limit of data.max_length_tokens = {limit}; the longest row has {lengths[-1]} tokens"
        remedy = 'raise data.max_length_tokens, shorten the rows, or set data.too_long = "truncate_input" or "drop"'
        for row, encoded in whole:
            if len(encoded.input_ids) > limit:
                problems.add(row.row_id, UnusableError(what, remedy))
    return TokenCounts(
        quantiles={f"{share:.0%}": lengths[math.ceil(share * len(lengths)) - 1] for share in QUANTILES},
        max_length_tokens=limit,
        num_too_long=sum(limit is not None and length > limit for length in lengths),
        num_truncated=sum(encoded is not None and encoded.num_truncated > 0 for encoded in kept),
        num_dropped=sum(encoded is None for encoded in kept),
        num_answer_tokens=sum(sum(encoded.is_answer) for encoded in kept if encoded is not None),
        num_with_control_tokens=num_control,
        by_too_long=by_too_long,
    )


def _fitted(
    row: Row, whole: Encoded, tokenizer: "Tokenizer", limit: int | None, too_long: TooLong, system_prompt: str
) -> Encoded | None:
    """A row under the limit; None if it is left out, or ends the run."""
    if limit is None or len(whole.input_ids) <= limit:
        return whole
    way: TooLong = "drop" if too_long == "error" else too_long
    return prompts.encode(row, tokenizer, max_length_tokens=limit, too_long=way, system_prompt=system_prompt)


def _decode(ids: list[int], tokenizer: "Tokenizer") -> str:
    """The text of tokens, control tokens included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
