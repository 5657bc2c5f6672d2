"""What a coordinator asks of a site, and what it is answered: the one table of it. Imports no torch.

The courier carries these kinds and no other, the agent answers them, the guard holds request and reply against each
other and against the order here, and a manifest declares the figures of each reply. One more exchange a round, such as
the keys of a secure sum, is one more row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from common.frame.records import OpenedHead, SiteMetrics, UpdateHead


@dataclass(frozen=True)
class Exchange:
    """One request and its reply.

    Attributes:
        kind: Of the request.
        reply: Kind of the reply.
        head: Its record: no other field leaves.
        has_tensors: Whether tensors may leave in its body; else the body is empty.
        order: Its place within a round, from 0; None: it belongs to no round, and may be asked again at any time.
    """

    kind: str
    reply: str
    head: type
    has_tensors: bool
    order: int | None


EXCHANGES: Final[Mapping[str, Exchange]] = {
    exchange.kind: exchange
    for exchange in (
        Exchange("open", "opened", OpenedHead, has_tensors=False, order=None),
        Exchange("evaluate", "metrics", SiteMetrics, has_tensors=False, order=0),
        Exchange("train", "update", UpdateHead, has_tensors=True, order=1),
    )
}
NUM_IN_ROUND: Final = sum(exchange.order is not None for exchange in EXCHANGES.values())


def position(kind: str, round_index: int) -> int:
    """The place of a round's request in a run; of two requests the later one has the larger.

    Raises:
        ValueError: The request belongs to no round.

    Example:
        >>> [position("evaluate", 0), position("train", 0), position("evaluate", 1)]
        [0, 1, 2]
    """
    order = EXCHANGES[kind].order
    if order is None:
        raise ValueError(f"'{kind}' belongs to no round")
    return NUM_IN_ROUND * round_index + order
