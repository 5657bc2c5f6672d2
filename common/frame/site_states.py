"""A site's state in a run: the same words at the site, at the coordinator, in events and on every page."""

from typing import Final

OFFERED: Final = "offered"
WAITS: Final = "waits for approval"
APPROVED: Final = "approved"
DENIED: Final = "denied"
REFUSED: Final = "refused by rule"
FAILED: Final = "failed"
TRAINING: Final = "training"
AWAY: Final = "away"
FINISHED: Final = "finished"
OUTDATED: Final = "has an older roster"
PENDING: Final = (WAITS, OUTDATED)  # who says so is offered the run again and may yet take part
_OF_CODE: Final = {
    "ApprovalRequired": WAITS,
    "ApprovalDenied": DENIED,
    "BudgetExhausted": REFUSED,
    "FloorRefused": REFUSED,
    "PolicyRefusedError": REFUSED,
    "RosterOutdated": OUTDATED,
}


def of_code(code: str) -> str:
    """The state that a site's refusal with this code means.

    Example:
        >>> of_code("ApprovalRequired"), of_code("PolicyRefusedError"), of_code("DataError")
        ('waits for approval', 'refused by rule', 'failed')
    """
    return _OF_CODE.get(code, FAILED)
