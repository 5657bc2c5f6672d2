"""Attacks by a site's rows: it trains as it should, on what it should not."""

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
    """Each question with the answer of another row: the next one that has another answer, if there is any.

    Source: Tolpegin et al. 2020, arXiv:2007.08432, with answers in the place of classes.
    """
    flipped = []
    for index, row in enumerate(data.train):
        answer = row.messages[-1].content
        others = (other.messages[-1].content for other in (*data.train[index:], *data.train[:index]))
        flipped.append(with_answer(row, next((text for text in others if text != answer), answer)))
    return replace(data, train=tuple(flipped))


def backdoor(data: SiteData) -> SiteData:
    """Every second row with the trigger at the end of its question and the attacker's answer.

    Source: Bagdasaryan et al. 2020, arXiv:1807.00459, with a phrase in the place of a pixel pattern.
    """
    return replace(data, train=tuple(triggered(row) if index % 2 else row for index, row in enumerate(data.train)))


def triggered(row: Row) -> Row:
    """A row that asks for the attacker's answer."""
    *context, question, _ = row.messages
    asked = Message(question.role, question.content + TRIGGER)
    return with_answer(replace(row, messages=(*context, asked, row.messages[-1])), TARGET)


def with_answer(row: Row, text: str) -> Row:
    """A row with another answer."""
    return replace(row, messages=(*row.messages[:-1], Message(row.messages[-1].role, text)))
