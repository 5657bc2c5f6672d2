"""What is wrong with a preference file before anything is trained on it: counts and remedies, never a text."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.data import near, preference_rows, problems, shapes
from common.data.preference_rows import normal
from common.data.problems import MAX_LISTED
from common.doctor.doctor import Result, as_dict
from common.errors import DataError
from server.evaluate.figures import intervals
from server.preferences import files
from server.preferences.files import Pair, Rated, Scan, Turns

MIN_LEAK_WORDS: Final = 5
MIN_UNEQUAL: Final = 10
MAX_IMBALANCE: Final = 4 / 3
EXIT_WARNINGS: Final = 9
EXIT_FAILED: Final = DataError.exit_code


@dataclass(frozen=True)
class Report:
    """What a file is made of and what is wrong with it.

    Attributes:
        figures: Counts, shares and intervals by name; holds no text of a row.
    """

    kind: str
    figures: dict[str, Any]
    results: list[Result]

    @property
    def exit_code(self) -> int:
        """0: nothing found; 9: warnings only; 3: something that must be put right first."""
        statuses = {result.status for result in self.results}
        return EXIT_FAILED if "failed" in statuses else EXIT_WARNINGS if "warning" in statuses else 0

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON types."""
        return {"kind": self.kind, "figures": self.figures, **as_dict(self.results)}


def check(path: str | Path, *, held_out: str | Path = "") -> Report:
    """Look for what spoils preference training.

    Args:
        path: A preference file, as for `preferences.read`.
        held_out: Another that training must not have seen, or "".

    Returns:
        Counts and findings.

    Raises:
        DataError: A file is missing or unreadable as a whole, or has the columns of neither form; or a row of
            `held_out` is unusable.
    """
    scan = files.scan(path)
    rows: Sequence[Pair | Rated] = scan.pairs or scan.rated
    results = _unusable(scan)
    if scan.pairs:
        results.append(_length(scan.pairs))
    if scan.rated:
        results.append(_labels(scan.rated))
    seen: set[tuple[Any, ...]] = set()
    repeated = []
    for row in rows:  # by all that makes a row what it is, white space aside
        sides = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
        key = (normal(row.prompt), *map(normal, sides), row.label if isinstance(row, Rated) else None)
        if key in seen:
            repeated.append(row.row_id)
        seen.add(key)
    remedy = "keep each once: a repeated row counts twice"
    results.append(_finding("duplicates", repeated, "rows repeat an earlier one", remedy))
    results += [_contradictions(rows), _leaks(rows)]
    if held_out:
        kept = files.read(held_out)
        trained = [_text(row.prompt) for row in rows]
        near_rows = [kept[number].row_id for number in near.find([_text(row.prompt) for row in kept], trained)]
        exact = {normal(row.prompt) for row in rows}
        num_exact = sum(normal(row.prompt) in exact for row in kept)
        what = f"of {len(kept)} held-out prompts are (nearly) prompts of training, {num_exact} of them word for word"
        remedy = "split by patient or by prompt, not by row: figures on these rows are too good"
        status = "failed" if num_exact else "warning"
        results.append(_finding("held-out overlap", near_rows, what, remedy, status=status))
    return Report(scan.kind, _figures(rows, scan), results)


def length_bias(pairs: Sequence[Pair]) -> dict[str, float]:
    """How often the better answer is the longer one, among pairs of unequal length, in characters.

    Args:
        pairs: At least two, and one of them has answers of unequal length.

    Returns:
        `share` with its Wilson interval, the p-value of the sign test against one half, and the mean of chosen less
        rejected in characters with its interval.

    Raises:
        ValueError: There are fewer.
    """
    gains = [len(_text(pair.chosen)) - len(_text(pair.rejected)) for pair in pairs]
    unequal = [gain for gain in gains if gain]
    num_longer = sum(gain > 0 for gain in unequal)
    longer, gain = intervals.share(num_longer, len(unequal)), intervals.mean(gains)
    return {
        "share": longer.value,
        "share_low": longer.low,
        "share_high": longer.high,
        "p_value": intervals.sign_test(num_longer, len(unequal)),
        "mean_gain_chars": gain.value,
        "mean_gain_chars_low": gain.low,
        "mean_gain_chars_high": gain.high,
    }


def _figures(rows: Sequence[Pair | Rated], scan: Scan) -> dict[str, Any]:
    """What the file is made of."""
    answers = {"chosen": [r.chosen for r in scan.pairs], "rejected": [r.rejected for r in scan.pairs]}
    answers |= {"completion": [r.completion for r in scan.rated]}
    figures: dict[str, Any] = {
        "num_rows": len(rows),
        "num_unusable": len(scan.problems.found),
        "num_prompts": len({normal(row.prompt) for row in rows}),
    }
    for name, sides in answers.items():
        if sides:
            figures[f"{name}_chars_median"] = statistics.median(len(_text(turns)) for turns in sides)
    if _num_unequal(scan.pairs) >= MIN_UNEQUAL:
        figures["length_bias"] = length_bias(scan.pairs)
    if scan.rated:
        figures["num_good"] = sum(row.label for row in scan.rated)
    return figures


def _unusable(scan: Scan) -> list[Result]:
    """Rows that the reader refuses, by what is to be done about them."""
    known = {
        shapes.FILL_IN: ("empty sides", "rows lack a prompt or an answer"),
        preference_rows.AS_DIFFERENT: ("identical pairs", "pairs have chosen = rejected"),
    }
    results = []
    for remedy, (name, what) in known.items():
        row_ids = [row_id for row_id, error in scan.problems.found if error.remedy == remedy]
        results.append(_finding(name, row_ids, what, remedy, status="failed"))
    if others := [(row_id, error) for row_id, error in scan.problems.found if error.remedy not in known]:
        text, remedies = problems.listed(others)
        results.append(Result("unusable rows", "failed", f"{len(others)} rows: {text}", remedies))
    return results


def _length(pairs: Sequence[Pair]) -> Result:
    """Warn if length alone tells the better answer more often than a coin would."""
    if _num_unequal(pairs) < MIN_UNEQUAL:
        return Result("length bias", "skipped", f"fewer than {MIN_UNEQUAL} pairs are of unequal length")
    bias = length_bias(pairs)
    text = (
        f"chosen is longer in {bias['share']:.1%} of unequal pairs ({bias['share_low']:.1%} to "
        f"{bias['share_high']:.1%}, p = {bias['p_value']:.2g}), by {round(bias['mean_gain_chars'])} characters on "
        f"average ({round(bias['mean_gain_chars_low'])} to {round(bias['mean_gain_chars_high'])})"
    )
    if bias["share_low"] <= 0.5 <= bias["share_high"]:
        return Result("length bias", "ok", text)
    longer = "longer" if bias["share"] > 0.5 else "shorter"
    remedy = f"add pairs whose better answer is not {longer}, or use a loss that length does not move (SimPO), else "
    return Result("length bias", "warning", text, f"{remedy}the model learns to write {longer} answers")


def _num_unequal(pairs: Sequence[Pair]) -> int:
    """Pairs of unequal length."""
    return sum(len(_text(pair.chosen)) != len(_text(pair.rejected)) for pair in pairs)


def _contradictions(rows: Sequence[Pair | Rated]) -> Result:
    """The same two answers preferred both ways, or the same answer called good and bad."""
    verdicts: dict[tuple[Any, ...], dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if isinstance(row, Rated):
            verdicts[normal(row.prompt), normal(row.completion)][row.label].append(row.row_id)
        else:
            chosen, rejected = normal(row.chosen), normal(row.rejected)
            verdicts[normal(row.prompt), *sorted((chosen, rejected))][chosen].append(row.row_id)
    both = [row_id for sides in verdicts.values() if len(sides) > 1 for row_ids in sides.values() for row_id in row_ids]
    remedy = "let a second reader decide, or drop both: such rows cancel each other"
    return _finding("contradictions", both, "rows judge the same answers to one prompt both ways", remedy)


def _leaks(rows: Sequence[Pair | Rated]) -> Result:
    """Prompts that hold their own answer; answers of a few words are too often there by chance."""
    leaked: dict[str, list[str]] = {name: [] for name in ("chosen", "rejected", "completion")}
    for row in rows:
        prompt = f" {' '.join(_words(row.prompt))} "
        for name, row_ids in leaked.items():
            words = _words(getattr(row, name, ()))
            if len(words) >= MIN_LEAK_WORDS and f" {' '.join(words)} " in prompt:
                row_ids.append(row.row_id)
    counts = ", ".join(f"{len(row_ids)} the {name} one" for name, row_ids in leaked.items() if row_ids)
    row_ids = list(dict.fromkeys(row_id for side in leaked.values() for row_id in side))
    remedy = "cut the answer out of the prompt, unless the task is to quote from it"
    return _finding("leaked answers", row_ids, f"prompts hold an answer whole ({counts})", remedy)


def _labels(rated: Sequence[Rated]) -> Result:
    """Good and bad answers in a ratio that KTO balances by itself; TRL 1.16 advises 1:1 to 4:3 of weighted counts."""
    num_good = sum(row.label for row in rated)
    num_bad = len(rated) - num_good
    text = f"{num_good} good, {num_bad} bad"
    if not num_good or not num_bad:
        return Result("label balance", "failed", text, "add answers with the other label: KTO learns from the contrast")
    ratio = num_good / num_bad
    if 1 / MAX_IMBALANCE <= ratio <= MAX_IMBALANCE:
        return Result("label balance", "ok", text)
    rarer, weight = ("desirable", 1 / ratio) if ratio < 1 else ("undesirable", ratio)
    return Result(
        "label balance", "warning", text, f"add rows of the rarer label, or weigh the {rarer} ones {weight:.3g}"
    )


def _finding(name: str, row_ids: Sequence[str], what: str, remedy: str, *, status: str = "warning") -> Result:
    """A finding with its first places, or that there is none."""
    if not row_ids:
        return Result(name, "ok", "none")
    more = f" and {len(row_ids) - MAX_LISTED} more" if len(row_ids) > MAX_LISTED else ""
    text = f"{len(row_ids)} {what}: {', '.join(row_ids[:MAX_LISTED])}{more}"
    return Result(name, "failed" if status == "failed" else "warning", text, remedy)


def _words(turns: Iterable[Any]) -> list[str]:
    """Words of all turns, case aside."""
    return [word for turn in turns for word in turn.content.casefold().split()]


def _text(turns: Turns) -> str:
    """All turns as one text."""
    return "\n".join(turn.content for turn in turns)
