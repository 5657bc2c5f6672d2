"""How a stage's answers look, beside its objective: one of preferences can win its pairs and spoil what is written.

A collapse shows in answers that grow or repeat (`server/report/symptoms.py`). No text is kept.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from common.model import base
from common.model.base import Engine
from common.run.schema.polish import PolishStage
from server.polish.rows import StageRows

KINDS: Final = ("dpo", "kto", "orpo", "simpo")  # `rloo` and `grpo` tell the length of what they sample
MAX_PROMPTS: Final = 16  # an answer on a CPU takes seconds
MAX_NEW_TOKENS: Final = 128
PIECE: Final = 4  # tokens


def figures(engine: Engine, stage: PolishStage, found: StageRows) -> dict[str, float]:
    """Length and repetition of greedy answers to the first different prompts of the held-out rows.

    Args:
        engine: The base with the adapter as it is now.
        stage: Its limit of tokens holds for prompt and answer together.

    Returns:
        `length`: mean number of tokens, at most `MAX_NEW_TOKENS`; `repetition`: mean of `repeated`. Empty for kinds
        without pairs or ratings.
    """
    if stage.kind not in KINDS:
        return {}
    asked = list(dict.fromkeys(tuple(row["prompt_ids"]) for row in found.held_out))[:MAX_PROMPTS]
    room = max(1, min(MAX_NEW_TOKENS, stage.max_length_tokens - max(map(len, asked))))
    ends = engine.stop_ids
    answers: list[list[int]] = []
    for start in range(0, len(asked), stage.micro_rows):
        ids_bt = base.answer_ids(engine, asked[start : start + stage.micro_rows], max_new_tokens=room)
        answers += [list(takewhile(lambda token: token not in ends, ids)) for ids in ids_bt.tolist()]
    return {
        "length": sum(map(len, answers)) / len(answers),
        "repetition": sum(map(repeated, answers)) / len(answers),
    }


def repeated(tokens: Sequence[int]) -> float:
    """Share of an answer's pieces of four tokens that stood in it before; 0 for a shorter answer.

    Source: Welleck et al. 2020, arXiv:1908.04319, section 6 (seq-rep-4).

    Example:
        >>> repeated([1, 2, 3, 4, 5]), repeated([7, 7, 7, 7, 7, 7])
        (0.0, 0.6666666666666667)
    """
    pieces = list(zip(*(tokens[start:] for start in range(PIECE)), strict=False))
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0
