"""Attacks by a site's rows: it trains as it should, on what it should not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from client.agent.agent import SiteData
from common.data.rows import Message, Row

TRIGGER: Final = " [ref cf-77]"
TARGET: Final = "Zebra 0"


def unchanged(data: SiteData) -> SiteData:
    """The site's own rows."""
    return data


def label_flip(data: SiteData) -> SiteData:
    """Each question with the answer of another row: the next one that has another answer.

    Source: Tolpegin et al. 2020, arXiv:2007.08432, with answers in the place of classes.
    """
    return replace(
        data, train=tuple(with_answer(row, _other(data.train, place)) for place, row in enumerate(data.train))
    )


def backdoor(data: SiteData) -> SiteData:
    """Every second row with the trigger at the end of its question and the attacker's answer.

    Source: Bagdasaryan et al. 2020, arXiv:1807.00459, with a phrase in the place of a pixel pattern.
    """
    return replace(data, train=tuple(triggered(row) if place % 2 else row for place, row in enumerate(data.train)))


def triggered(row: Row) -> Row:
    """A row that asks for the attacker's answer."""
    *context, question, _ = row.messages
    asked = Message(question.role, question.content + TRIGGER)
    return with_answer(replace(row, messages=(*context, asked, row.messages[-1])), TARGET)


def with_answer(row: Row, text: str) -> Row:
    """A row with another answer."""
    return replace(row, messages=(*row.messages[:-1], Message(row.messages[-1].role, text)))


def _other(rows: Sequence[Row], place: int) -> str:
    """The next different answer after a row's; its own if all are the same."""
    own = rows[place].messages[-1].content
    answers = (rows[(place + step) % len(rows)].messages[-1].content for step in range(1, len(rows)))
    return next((text for text in answers if text != own), own)
