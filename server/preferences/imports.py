"""Exports of Argilla and Label Studio, as pairs.

Argilla: what SDK 2.x writes with `dataset.records.to_json(path)`: a list of records with `id`, `fields` and `responses`
(by question, a list of `value` and `user_id`). A ranking's value is a list of fields' names, best first; files of
Argilla 1.x have `{"value": name, "rank": number}` instead, where equal ranks are ties. A label's value is the
preferred field's name. This form does not tell drafts from submitted responses: filter for submitted ones when
exporting. The flattened form (`to_list(flatten=True)`, `to_datasets`) has `QUESTION.responses` and
`QUESTION.responses.status`; of it only submitted responses are taken. Suggestions are a model's and are not taken.

Label Studio: export "JSON" (1.x): a list of tasks with `data` and `annotations`; of an annotation's `result`, the item
of type `pairwise` with `{"selected": "left" | "right"}` counts. Left is the first name of its `to_name`, which names
tags of the labelling interface; `--between` names the columns of `data` in that order (the template "Human Preference
collection for RLHF" has answer1 and answer2). "JSON-MIN" leaves out cancelled flags and types and is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.data import read as reading
from common.data.files import Located
from common.data.problems import UnusableError
from common.errors import ConfigError
from server.preferences import build
from server.preferences.build import Built
from server.preferences.files import Pair

AS_ARGILLA: Final = "export with dataset.records.to_json(PATH), and name --question, --prompt and --between"
AS_LABEL_STUDIO: Final = 'export as "JSON", not "JSON-MIN", and name --prompt and --between as in the tasks\' data'
SUBMITTED: Final = "submitted"


def argilla(path: Path, *, question: str, prompt: str, between: Sequence[str]) -> Built:
    """Read an export of Argilla.

    Args:
        question: Name of the ranking or label question.
        between: Fields of the answers, at least two.

    Returns:
        A pair for every two answers that a response ranks differently; each user's response counts.

    Raises:
        ConfigError: `between` names fewer than two fields, or one twice.
        DataError: The file cannot be read, or is not of that form.
    """
    _require_columns(between)
    located = reading.locate(str(path))
    counts = {"records without a response": 0, "responses not submitted": 0, "ties": 0}

    def pairs_of(row: Located) -> list[Pair]:
        fields = row.fields.get("fields")
        texts = fields if isinstance(fields, dict) else row.fields
        values = _responses(row, question, counts)
        counts["records without a response"] += not values
        pairs = []
        for value in values:
            ranks = _ranks(value, between)
            for better, worse in ((a, b) for a in ranks for b in ranks if a != b):
                if ranks[better] < ranks[worse]:
                    pairs.append(_pair(texts, prompt, better, worse, row.place))
                elif ranks[better] == ranks[worse] and better < worse:
                    counts["ties"] += 1
        return pairs

    by_row = reading.convert_all(located, pairs_of)
    return build.different([pair for pairs in by_row for pair in pairs], num_read=len(located), left_out=counts)


def label_studio(path: Path, *, prompt: str, between: Sequence[str]) -> Built:
    """Read an export of Label Studio.

    Args:
        prompt: Column of the prompt in the tasks' `data`.
        between: Columns of the left and of the right answer.

    Returns:
        One pair for each annotation that selects a side.

    Raises:
        ConfigError: `between` does not name two columns.
        DataError: The file cannot be read, or is not of that form.
    """
    _require_columns(between, most=2)
    located = reading.locate(str(path))
    counts = {"tasks without an annotation": 0, "cancelled annotations": 0, "annotations without a choice": 0}

    def pairs_of(row: Located) -> list[Pair]:
        data, annotations = row.fields.get("data"), row.fields.get("annotations")
        if not isinstance(data, dict) or not isinstance(annotations, list):
            raise UnusableError("has no `data` with `annotations`", AS_LABEL_STUDIO)
        counts["tasks without an annotation"] += not annotations
        left, right = between
        pairs = []
        for annotation in annotations:
            if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
                raise UnusableError("has an annotation without `result`", AS_LABEL_STUDIO)
            items = [item for item in annotation["result"] if isinstance(item, dict) and item.get("type") == "pairwise"]
            if len(items) > 1:
                raise UnusableError(
                    "has an annotation with several comparisons", "export a project with one Pairwise tag"
                )
            value = items[0].get("value") if items else {}
            side = value.get("selected") if isinstance(value, dict) else None
            if side not in (None, "none", "left", "right"):
                raise UnusableError("has a comparison that selects neither left nor right", AS_LABEL_STUDIO)
            if annotation.get("was_cancelled"):
                counts["cancelled annotations"] += 1
            elif side in (None, "none"):
                counts["annotations without a choice"] += 1
            else:
                better, worse = (left, right) if side == "left" else (right, left)
                pairs.append(_pair(data, prompt, better, worse, row.place))
        return pairs

    by_row = reading.convert_all(located, pairs_of)
    return build.different([pair for pairs in by_row for pair in pairs], num_read=len(located), left_out=counts)


def _require_columns(between: Sequence[str], *, most: int = 0) -> None:
    """Refuse names that cannot be compared."""
    if len(between) < 2 or len(set(between)) < len(between) or "" in between or (most and len(between) > most):
        raise ConfigError(f"--between must name {'two' if most else 'two or more'} different columns, such as a,b")


def _responses(row: Located, question: str, counts: dict[str, int]) -> list[Any]:
    """Values of the submitted responses to one question, of the nested or the flattened form."""
    nested, flat = row.fields.get("responses"), f"{question}.responses"
    if isinstance(nested, dict):
        items = nested.get(question) or []
        if not isinstance(items, list) or not all(isinstance(item, dict) and "value" in item for item in items):
            raise UnusableError("has responses that are not a list of objects with `value`", AS_ARGILLA)
        given = [(item["value"], item.get("status") or SUBMITTED) for item in items]
    elif flat in row.fields:
        values, statuses = row.fields[flat] or [], row.fields.get(f"{flat}.status") or []
        if not isinstance(values, list) or not isinstance(statuses, list) or len(values) != len(statuses):
            raise UnusableError("has not as many statuses as responses", AS_ARGILLA)
        given = list(zip(values, statuses, strict=True))
    else:
        raise UnusableError("has no responses to the question", AS_ARGILLA)
    counts["responses not submitted"] += sum(status != SUBMITTED for _, status in given)
    return [value for value, status in given if status == SUBMITTED]


def _ranks(value: Any, between: Sequence[str]) -> dict[str, int]:
    """Rank of each answer, 1 the best; a label puts all other answers second."""
    if isinstance(value, str):
        value = [{"value": name, "rank": 1 if name == value else 2} for name in between] if value in between else None
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = [{"value": name, "rank": rank} for rank, name in enumerate(value, start=1)]
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and isinstance(item.get("value"), str) and type(item.get("rank")) is int
        for item in value
    ):
        raise UnusableError("has a response that ranks none of the answers", AS_ARGILLA)
    ranks = {item["value"]: item["rank"] for item in value}
    if set(ranks) != set(between) or len(ranks) != len(value):
        raise UnusableError(f"has a response that does not rank the {len(between)} answers of --between", AS_ARGILLA)
    return {name: ranks[name] for name in between}


def _pair(texts: Mapping[str, Any], prompt: str, better: str, worse: str, row_id: str) -> Pair:
    """A pair out of named columns."""
    missing = [name for name in (prompt, better, worse) if name not in texts]
    if missing:
        raise UnusableError(f"has no field {missing[0]!r}", "correct --prompt or --between")
    fields = {better: texts[better], worse: texts[worse], "prompt": texts[prompt]}
    return build.pair_of(fields, worse, better, row_id=row_id)
