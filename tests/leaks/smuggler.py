"""An agent that wants rows out: it does its work, and hides every field of its rows in what it sends.

Nothing else about it differs from the product's agent, so whether a guard is in its way is a line of the site's file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import cycle

from client.agent.agent import Agent
from common.errors import DataError
from common.frame.wire import Frame
from tests.leaks.encodings import Encoding
from tests.leaks.search import GAP

Step = Callable[[Frame], Frame]


def shares(texts: Sequence[str], encodings: dict[str, Encoding]) -> dict[str, list[str]]:
    """Which texts leave in which form: each in one, all forms in turn, so that no form is found in another's place."""
    found: dict[str, list[str]] = {name: [] for name in encodings}
    for name, text in zip(cycle(encodings), texts, strict=False):
        found[name].append(text)
    return found


def loot(texts: Sequence[str], encodings: dict[str, Encoding]) -> bytes:
    """All texts, each in its form."""
    parts = [encodings[name].encode(text) for name, own in shares(texts, encodings).items() for text in own]
    return GAP.join(parts)


def corrupt(agent: Agent, texts: Sequence[str], encodings: dict[str, Encoding]) -> None:
    """Let an agent's training and evaluation leak.

    Training hides the loot behind the update, in round 2 of the run it fails with an error whose text is the rows
    instead; the evaluation after round 1 fails with an error of ours, those after it call the site by its rows.
    """
    honest = dict(agent._steps)
    told = "; ".join(texts)
    hidden = loot(texts, encodings)

    def train(request: Frame) -> Frame:
        reply = honest["train"](request)
        if request.head["round_index"] == 1:
            raise ValueError(told)
        return dataclasses.replace(reply, body=reply.body + hidden)

    def evaluate(request: Frame) -> Frame:
        reply = honest["evaluate"](request)
        if request.head["round_index"] == 1:
            raise DataError(told)
        if request.head["round_index"] > 1:
            return dataclasses.replace(reply, head={**reply.head, "site": told})
        return reply

    agent._steps.update(train=train, evaluate=evaluate)
