"""Kind `memorisation`: what an adapter keeps of planted secrets, and whether its training rows can be told."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Final

import torch

from common.adapter import adapter
from common.data import overlap
from common.data.rows import Message, Row
from common.errors import DataError
from common.model import base, loading
from common.model.base import Engine
from common.privacy import membership, roc
from common.run.config import RunConfig
from common.run.schema.tasks import TaskConfig
from common.text import chat
from server.evaluate.figures import likelihood
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks import canary_rows
from server.evaluate.tasks.canary_rows import Canary
from server.evaluate.tasks.task import Task, as_base, digest, table_of

_MORE_TOKENS: Final = 4  # a continuation may be cut into other tokens than the secret alone


def load(settings: TaskConfig, run: RunConfig) -> Task:
    """Read canaries, and members and non-members if they are given.

    Raises:
        DataError: The rows are missing or unusable, or no canary was planted.
    """
    canaries = [
        canary_rows.read(fields, num_candidates=settings.num_candidates, where=f"{settings.name}, row {number}")
        for number, fields in enumerate(table_of(settings), start=1)
    ]
    if not any(canary.is_trained for canary in canaries):
        raise DataError(f"{settings.data}: no row has trained = true, so there is nothing that could have been learnt")
    sides = _sides(settings, run)

    def score(engine: Engine) -> Mapping[str, Scores]:
        found = of_canaries(engine, canaries, run)
        return {**found, "auc": of_members(engine, *sides, run)} if sides else found

    rows = [[dataclasses.replace(row, row_id="", unit="") for row in side] for side in sides or ()]
    told = [dataclasses.asdict(canary) | {"name": ""} for canary in canaries]
    sha256 = digest(told, *([str(row) for row in side] for side in rows))
    unseen = tuple(map(overlap.text_of, sides[1])) if sides else ()  # members are there to be trained on
    return Task(settings, sha256, score, texts=unseen)


def of_canaries(engine: Engine, canaries: Sequence[Canary], run: RunConfig) -> dict[str, Scores]:
    """Exposure of the planted canaries, which of them are written out, and `auc` if others were not planted.

    `exposure` is the 90th percentile over the planted canaries, `exposure_mean` their mean, `exposure_max` the largest.
    By chance they are 3.3 bits, 1.4 bits, and about log2(canaries) + 0.8 bits.

    Raises:
        DataError: A text is longer than the model takes.
    """
    planted = [canary for canary in canaries if canary.is_trained]
    batch_size = run.evaluation.batch_size
    bits = tuple((value,) for value in exposures(engine, planted, run))
    found = {
        "exposure": Scores(bits, "high", higher_is_better=False),
        "exposure_mean": Scores(bits, "mean", higher_is_better=False),
        "exposure_max": Scores(bits, "largest", higher_is_better=False),
        "exposure_ceiling": of_rows([math.log2(len(one.others) + 1) for one in planted], higher_is_better=False),
        "extracted": of_rows(extracted(engine, planted, run, batch_size=batch_size), higher_is_better=False),
    }
    if len(planted) < len(canaries):
        drops = _canary_drops(engine, canaries, run)
        found["auc"] = _auc(drops, [canary.is_trained for canary in canaries])
    return found


def exposures(engine: Engine, canaries: Sequence[Canary], run: RunConfig) -> list[float]:
    """Exposure of each, in bits: its rank by the log-perplexity of prefix and secret among its candidates.

    Raises:
        DataError: A text is longer than the model takes.
    """
    pairs = [
        pair_of(engine, _before(engine, one, run), one.prefix + text)
        for one in canaries
        for text in (one.secret, *one.others)
    ]
    found = iter(likelihood.log_likelihoods(engine, pairs, batch_size=run.evaluation.batch_size))
    sums = [[next(found)[0] for _ in range(len(one.others) + 1)] for one in canaries]
    return [roc.exposure_of(own, torch.tensor(others, dtype=torch.float64)) for own, *others in sums]


def extracted(engine: Engine, canaries: Sequence[Canary], run: RunConfig, *, batch_size: int) -> list[bool]:
    """Whether the greedy continuation of each prefix begins with the secret, white space before it aside."""
    asked = [_asked(engine, one, run) for one in canaries]
    length = max(len(_ids(engine, one.secret)) for one in canaries) + _MORE_TOKENS
    if max(map(len, asked)) + length > likelihood.max_length_tokens(engine):
        raise DataError("a canary's prefix and secret are longer than the model takes; shorten the row")
    written: list[str] = []
    for start in range(0, len(asked), batch_size):
        written += base.answer(engine, asked[start : start + batch_size], max_new_tokens=length)
    return [text.lstrip().startswith(one.secret.strip()) for text, one in zip(written, canaries, strict=True)]


def of_members(engine: Engine, members: Sequence[Row], others: Sequence[Row], run: RunConfig) -> Scores:
    """Area under the curve of the attack by loss, calibrated on the base; each row for itself.

    Raises:
        ConfigError: A row is longer than the run's limit.
    """
    rows = [[row] for row in (*members, *others)]
    drops = membership.loss_drops(engine, adapter.read(engine.model), rows, data=run.data)
    return _auc(drops.tolist(), [True] * len(members) + [False] * len(others))


def _canary_drops(engine: Engine, canaries: Sequence[Canary], run: RunConfig) -> list[float]:
    """How far the loss of each secret after its prefix fell from the base to the adapter, nats a token."""
    pairs = [pair_of(engine, _before(engine, one, run) + one.prefix, one.secret) for one in canaries]

    def losses() -> list[float]:
        found = likelihood.log_likelihoods(engine, pairs, batch_size=run.evaluation.batch_size)
        return [-total / len(following) for (total, _), (_, following) in zip(found, pairs, strict=True)]

    after = losses()
    with as_base(engine):
        before = losses()
    return [old - new for old, new in zip(before, after, strict=True)]


def _auc(scores: Sequence[float], is_in: Sequence[bool]) -> Scores:
    """Rows of score and side."""
    rows = tuple((score, float(member)) for score, member in zip(scores, is_in, strict=True))
    return Scores(rows, "auc", higher_is_better=False)


def _sides(settings: TaskConfig, run: RunConfig) -> tuple[list[Row], list[Row]] | None:
    """Members and non-members, in the run's columns; None if none are given."""
    if not settings.members_data:
        return None
    return loading.rows_of(settings.members_data, run), loading.rows_of(settings.non_members_data, run)


def _before(engine: Engine, canary: Canary, run: RunConfig) -> str:
    """What stands before the prefix: the prompt in the chat template, or nothing."""
    if not canary.prompt:
        return ""
    row = Row((Message("user", canary.prompt), Message("assistant", "")), unit="", row_id=canary.name)
    return chat.render_prompt(row, engine.tokenizer, system_prompt=run.data.system_prompt).text


def pair_of(engine: Engine, before: str, following: str) -> likelihood.Pair:
    """A text and what follows it as tokens of the whole, as they are in training.

    Args:
        engine: Whose tokenizer.
        before: With its special tokens; a token that reaches beyond its end counts as following.
        following: What is scored.
    """
    asked, whole = _ids(engine, before), _ids(engine, before + following)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False)))
    return (whole[:same] or [likelihood.prefix_id(engine)]), whole[same:]


def _asked(engine: Engine, canary: Canary, run: RunConfig) -> list[int]:
    """Prompt and prefix as tokens; raw text begins as it does for `pair_of`."""
    before = _before(engine, canary, run)
    return ([] if before else [likelihood.prefix_id(engine)]) + _ids(engine, before + canary.prefix.rstrip())


def _ids(engine: Engine, text: str) -> list[int]:
    """Tokens of a text that has its special tokens in it."""
    return list(engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
