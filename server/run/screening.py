"""A round's updates on their way into the sum: as they come, or first held against each other."""

from collections.abc import Iterator

from common import events
from common.event_kinds import Screened
from common.frame.records import UpdateHead
from common.scores import Seen
from server.aggregate import screen
from server.aggregate.method import State
from server.fleet.federation import Federation

Update = tuple[UpdateHead, State, int]  # with the bytes of its frame


def passed(fed: Federation, updates: Iterator[Update], *, round_index: int) -> Iterator[Update]:
    """The updates that count. With screening, none does before all are there, and what was seen is logged."""
    settings = fed.manifest.run.aggregation.screening
    if settings.action == "off":
        yield from updates
        return
    waiting = {update[0].site: update for update in updates}
    changes = {site: change for site, (_, change, _) in sorted(waiting.items())}
    past = screen.history(events.read(fed.log.path), round_index=round_index)
    found = screen.look(changes, past, threshold=settings.threshold) if changes else {}
    dropped = screen.left_out(found) if settings.action == "drop" else set()
    for site in sorted(dropped):
        fed.record("screened", round_index=round_index, site=site)
    sites = {
        site: Seen(norm=seen.norm, cosine=seen.cosine, reasons=seen.reasons, is_left_out=site in dropped)
        for site, seen in found.items()
    }
    fed.log.append(Screened(round=round_index, sites=sites))
    yield from (waiting[site] for site in waiting if site not in dropped)
