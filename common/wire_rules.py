"""What of `[wire]` goes together with what other settings, under any method; loads no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.config_types import Contradiction

if TYPE_CHECKING:
    from common.config import RunConfig


@dataclass(frozen=True)
class Conflict:
    """Two settings of the wire, or of the wire and another section, that do not go together under any method.

    Attributes:
        keys: The settings; the first names the problem.
        is_asked: Whether a run asks for both.
        reason: Why not.
        nearest: What to set instead.
    """

    keys: tuple[str, ...]
    is_asked: Callable[["RunConfig"], bool]
    reason: str
    nearest: str


CONFLICTS: Final = (
    Conflict(
        ("wire.density", "privacy.mode"),
        lambda run: run.wire.density < 1 and run.privacy.is_private,
        "the largest values of a noised update are mostly its noise",
        'wire.dtype = "int4", which rounds after the noise',
    ),
    Conflict(
        ("wire.density", "aggregation.robust"),
        lambda run: run.wire.density < 1 and run.aggregation.robust != "none",
        "sites send different values, and where most send none the robust rule sees zeros",
        'wire.dtype = "int4" with density 1',
    ),
    Conflict(
        ("wire.error_feedback", "wire.density"),
        lambda run: run.wire.density == 1 and not run.wire.error_feedback,
        "nothing is left out of an update that is whole, and the setting has no effect",
        "a density below 1, or leave it out",
    ),
)


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run asks for both, and the message, of `CONFLICTS`."""
    for conflict in CONFLICTS:
        told = f"{conflict.reason}; the nearest that is allowed is {conflict.nearest}"
        yield conflict.keys, conflict.is_asked, told
