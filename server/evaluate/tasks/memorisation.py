"""Kind `memorisation`: what an adapter keeps of planted secrets, and whether its training rows can be recognised."""

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
from common.loss import drops
from common.model import base, loading
from common.model.base import Engine
from common.privacy import roc
from common.run.schema.tasks import EvaluationConfig, MemorisationTask
from common.run.schema.training import DataConfig
from common.text import chat
from server.evaluate.figures import likelihood
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks import canary_rows
from server.evaluate.tasks.canary_rows import Canary
from server.evaluate.tasks.task import Task, as_base, digest, table_of

_MORE_TOKENS: Final = 4  # a continuation may be cut into other tokens than the secret alone


def load(settings: MemorisationTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
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
    paths = (settings.members_data, settings.non_members_data) if settings.members_data else ()
    sides = [loading.rows_of(path, data) for path in paths]

    def score(engine: Engine) -> Mapping[str, Scores]:
        figures = of_canaries(engine, canaries, batch_size=evaluation.batch_size, system_prompt=data.system_prompt)
        return {**figures, "auc": of_members(engine, *sides, data=data)} if sides else figures

    rows = [[dataclasses.replace(row, row_id="", unit="") for row in side] for side in sides]
    secrets = [dataclasses.asdict(canary) | {"name": ""} for canary in canaries]
    sha256 = digest(secrets, *([str(row) for row in side] for side in rows))
    unseen = tuple(map(overlap.text_of, sides[1])) if sides else ()  # members are there to be trained on
    return Task(settings, sha256, score, texts=unseen)


def of_canaries(
    engine: Engine, canaries: Sequence[Canary], *, batch_size: int, system_prompt: str
) -> dict[str, Scores]:
    """Exposure of the planted canaries, which of them are written out, and `auc` if others were not planted.

    `exposure` is the 90th percentile over the planted canaries, `exposure_mean` their mean, `exposure_max` the largest.
    By chance they are 3.3 bits, 1.4 bits, and about log2(canaries) + 0.8 bits.

    Raises:
        DataError: A text is longer than the model takes.
    """
    planted = [canary for canary in canaries if canary.is_trained]
    before = [_before(engine, canary, system_prompt) for canary in planted]
    bits = tuple((value,) for value in exposures(engine, planted, before, batch_size=batch_size))
    figures = {
        "exposure": Scores(bits, "high", higher_is_better=False),
        "exposure_mean": Scores(bits, "mean", higher_is_better=False),
        "exposure_max": Scores(bits, "largest", higher_is_better=False),
        "exposure_ceiling": of_rows([math.log2(len(canary.others) + 1) for canary in planted], higher_is_better=False),
        "extracted": of_rows(extracted(engine, planted, before, batch_size=batch_size), higher_is_better=False),
    }
    if len(planted) < len(canaries):
        # How far the loss of each secret after its prefix fell from the base to the adapter, nats a token
        pairs = [pair_of(engine, _before(engine, each, system_prompt) + each.prefix, each.secret) for each in canaries]

        def losses() -> list[float]:
            likelihoods = likelihood.log_likelihoods(engine, pairs, batch_size=batch_size)
            return [-total / len(following) for (total, _), (_, following) in zip(likelihoods, pairs, strict=True)]

        trained = losses()
        with as_base(engine):
            untrained = losses()
        drops = [old - new for old, new in zip(untrained, trained, strict=True)]
        figures["auc"] = _auc(drops, [canary.is_trained for canary in canaries])
    return figures


def exposures(engine: Engine, canaries: Sequence[Canary], before: Sequence[str], *, batch_size: int) -> list[float]:
    """Exposure of each, in bits: its rank by the log-perplexity of prefix and secret among its candidates."""
    pairs = [
        pair_of(engine, start, canary.prefix + text)
        for canary, start in zip(canaries, before, strict=True)
        for text in (canary.secret, *canary.others)
    ]
    totals = iter(likelihood.log_likelihoods(engine, pairs, batch_size=batch_size))
    sums = [[next(totals)[0] for _ in range(len(canary.others) + 1)] for canary in canaries]
    return [roc.exposure_of(secret, torch.tensor(others, dtype=torch.float64)) for secret, *others in sums]


def extracted(engine: Engine, canaries: Sequence[Canary], before: Sequence[str], *, batch_size: int) -> list[bool]:
    """Whether the greedy continuation of each prefix begins with the secret, white space before it aside."""
    asked = []
    for canary, start in zip(canaries, before, strict=True):  # raw text begins as it does for `pair_of`
        ids = _ids(engine, start + canary.prefix.rstrip())
        asked.append(ids if start else [likelihood.prefix_id(engine), *ids])
    length = max(len(_ids(engine, canary.secret)) for canary in canaries) + _MORE_TOKENS
    if max(map(len, asked)) + length > likelihood.max_length_tokens(engine):
        raise DataError("a canary's prefix and secret are longer than the model takes; shorten the row")
    written: list[str] = []
    for first in range(0, len(asked), batch_size):
        written += base.answer(engine, asked[first : first + batch_size], max_new_tokens=length)
    return [text.lstrip().startswith(canary.secret.strip()) for text, canary in zip(written, canaries, strict=True)]


def of_members(engine: Engine, members: Sequence[Row], others: Sequence[Row], *, data: DataConfig) -> Scores:
    """Area under the curve of the attack by loss, calibrated on the base; each row for itself.

    Raises:
        ConfigError: A row is longer than the run's limit.
    """
    rows = [[row] for row in (*members, *others)]
    drop_n = drops.loss_drops(engine, adapter.read(engine.model), rows, data=data)
    return _auc(drop_n.tolist(), [True] * len(members) + [False] * len(others))


def _auc(scores: Sequence[float], is_in: Sequence[bool]) -> Scores:
    """Rows of score and side."""
    rows = tuple((score, float(member)) for score, member in zip(scores, is_in, strict=True))
    return Scores(rows, "auc", higher_is_better=False)


def _before(engine: Engine, canary: Canary, system_prompt: str) -> str:
    """What stands before the prefix: the prompt in the chat template, or nothing."""
    if not canary.prompt:
        return ""
    row = Row((Message("user", canary.prompt), Message("assistant", "")), unit="", row_id=canary.name)
    return chat.render_prompt(row, engine.tokenizer, system_prompt=system_prompt).text


def pair_of(engine: Engine, before: str, following: str) -> likelihood.Pair:
    """A text and what follows it as tokens of the whole, as they are in training.

    Args:
        engine: Whose tokenizer.
        before: With its special tokens; a token that reaches beyond its end counts as following.
    """
    asked, whole = _ids(engine, before), _ids(engine, before + following)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False)))
    return (whole[:same] or [likelihood.prefix_id(engine)]), whole[same:]


def _ids(engine: Engine, text: str) -> list[int]:
    """Tokens of a text that has its special tokens in it."""
    return list(engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
