"""A run in progress: the manifest, the fleet and the sites that opened the run."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from common.adapter import ranks
from common.adapter.broadcast import WHOLE, plain_body
from common.data.rows import Row
from common.errors import ProtocolError, RemoteError, SilotuneError, TooFewSitesError
from common.event_kinds import SiteFailed, SiteJoined, SiteRefused, SiteSkipped
from common.events import EventLog
from common.frame import site_states, wire
from common.frame.records import ADAPTER, OpenedHead, RoundPlan, SiteMetrics, from_head, to_head
from common.frame.wire import Frame
from common.model.base import Engine
from common.privacy.noise import Noise, SystemNoise
from common.run.manifest import Offer, RunManifest
from common.run.schema.section import SLUG
from common.run.schema.wire import WHOLE as WHOLE_DOWN
from common.text.prompts import Encoded
from server.aggregate.method import Method, State
from server.aggregate.optimizer import Memory
from server.evaluate.kept_apart import Apart
from server.evaluate.suite import Suite
from server.fleet import broadcast, collect
from server.fleet.broadcast import Step
from server.fleet.fleet import SMALL_REPLY_BYTES, Fleet
from server.fleet.trail import Trail, of_error, of_frame

RETRY_S: Final = 1.0  # between offers to a node whose agent is away
SECOND_WAIT_S: Final = 5.0  # for a node that was silent; one that was only slow has the run open by now
APPROVAL_RETRY_S: Final = 15.0  # between offers to a node where a person has to decide, or that fetches a roster
ROSTER_WAIT_S: Final = 90.0  # for a node to fetch the newest roster; its link looks every half minute
OLD_ROSTER: Final = (
    "its roster is older than epoch {epoch} of the coordinator's; its link fetches the newest within half a minute if "
    "roster.json was copied to the gateway (members.roster_file). Else send it: silotune-client roster roster.json "
    "--keys KEYS"
)
NAMES_AN_ENTRY: Final = 500  # of 64 characters at most, so that an entry keeps within `audit.MAX_LINE_BYTES`
STILL_SILENT: Final = "it has let a step pass and does not answer yet; it takes part again once it does"


def fresh_noise(round_index: int) -> Noise:
    """Draws and noise that nobody can foresee, and that no other try of the round has."""
    return SystemNoise()


@dataclass(frozen=True)
class OwnRows:
    """Held-out rows of the coordinator's own (`evaluation.server_data`)."""

    engine: Engine
    encoded: Sequence[Encoded]


@dataclass
class Federation:
    """What every step of a run needs.

    Attributes:
        manifest: The run as data.
        fleet: The nodes.
        method: How adapters are aggregated.
        folder: The run's folder.
        log: Its events.
        sites: What each node told when it opened the run.
        refused: Why nodes did not open it.
        away: Nodes that are connected and did not answer the offer: their agent may yet start.
        silent: Nodes that let the whole wait pass, for an offer or a step; they are offered the run with a short wait,
            and have no part in it before they answer.
        suspects: Nodes that let the wait of a step pass, and have answered no step since.
        names: The node of each site name. A name stays with the node that told it first, under the key of the site.
        told_names: The names under which nodes were registered, or that they told in an earlier try of the run; for
            showing only, as nobody has vouched for them yet.
        doubtful: Nodes that failed at a step; their agent may have started anew, so they are offered the run again.
        metrics: Last held-out figures of each site, by name.
        offer: The signed manifest; None offers it unsigned, which only sites without a policy take.
        trail: The coordinator's audit log; None where nobody signs the run.
        asked_at: When nodes said that a person has to decide, or that their roster is older, by `clock`.
        pending: Which of the two they said last.
        outdated_since: When nodes said first that their roster is older.
        own_rows: The coordinator's own held-out rows, and the engine that scores them; None without any.
        suite: What the coordinator measures on its own rows; None: nothing.
        apart: Rows that no stage is to train on.
        examples: Prompts that may be shown with their answers; none: no text is kept.
        memory: What the coordinator remembers from round to round.
        steps: To the newest adapter, where it goes down as steps: of the last round, and of rounds that sites missed.
        sent: Hash of the adapter in the last request to each node.
        held: Hash of the adapter that each node answered for last.
        make_noise: Source of a round's secret draws and noise, under differential privacy for sites as a whole.
        clock: Seconds, monotonic.
        sleep: Waits between looks.
    """

    manifest: RunManifest
    fleet: Fleet
    method: Method
    folder: Path
    log: EventLog
    sites: dict[int, OpenedHead] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    away: dict[int, str] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)
    names: dict[str, int] = field(default_factory=dict)
    told_names: dict[int, str] = field(default_factory=dict)
    doubtful: set[int] = field(default_factory=set)
    metrics: dict[str, SiteMetrics] = field(default_factory=dict)
    offer: Offer | None = None
    trail: Trail | None = None
    asked_at: dict[int, float] = field(default_factory=dict)
    pending: dict[int, str] = field(default_factory=dict)
    outdated_since: dict[int, float] = field(default_factory=dict)
    own_rows: OwnRows | None = None
    suite: Suite | None = None
    apart: Sequence[Apart] = ()
    examples: Sequence[Row] = ()
    memory: Memory = field(default_factory=dict)
    steps: Sequence[Step] = ()
    sent: dict[int, str] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)
    make_noise: Callable[[int], Noise] = fresh_noise
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def ask(self, frames: Mapping[int, bytes], *, kind: str, at_most_s: float = math.inf) -> Iterator[collect.Answer]:
        """Send frames and yield the answers as they come, until the step's deadline; see `collect.ask`."""
        settings = self.manifest.run.federation
        timeout_s = min(at_most_s, settings.join_timeout_s if kind == "open" else settings.round_timeout_s)
        size = SMALL_REPLY_BYTES + (self.manifest.plan.max_update_bytes if kind == "train" else 0)
        return collect.ask(
            self.fleet,
            frames,
            kind=kind,
            timeout_s=timeout_s,
            max_reply_bytes=size,
            suspects=() if kind == "open" else self.suspects,
            grace_s=SECOND_WAIT_S,
            clock=self.clock,
            sleep=self.sleep,
        )

    def name(self, node_id: int) -> str:
        """A node's site name; `node N` before it has told one."""
        if node_id in self.sites:
            return self.sites[node_id].site
        known = next((site for site, known in self.names.items() if known == node_id), "")
        return known or self.told_names.get(node_id) or self.fleet.names.get(node_id, f"node {node_id}")

    def present(self) -> list[int]:
        """Nodes that opened the run, are connected now and answered when they were asked last."""
        return [node_id for node_id in self.fleet.node_ids() if node_id in self.sites and node_id not in self.silent]

    def expect(self, answer: collect.Answer, kind: str, *, max_body_bytes: int = 0) -> Frame:
        """What a node answered, of one kind and, where the run is signed, under the key of the site that it names.

        Raises:
            ProtocolError: There is no answer.
            RemoteError: The site refused.
            WireError: It is malformed or of another kind.
            AuthError: Another key signed it, or none where one is due.
        """
        if answer.frame is None:
            raise ProtocolError(answer.reason)
        frame = wire.expect(answer.frame, kind, max_body_bytes=max_body_bytes)
        if self.trail:
            self.trail.check(frame, site=str(frame.head.get("site", "")))
        return frame

    def fail(self, answer: collect.Answer, error: SilotuneError, *, step: str) -> None:
        """Log that a site's answer does not count, and doubt the site.

        One that is late has no part in the run before it answers an offer, which is waited for only shortly.
        """
        self.held.pop(answer.node_id, None)
        self.doubtful.add(answer.node_id)
        if answer.is_late:
            self.silent.add(answer.node_id)
            self.suspects.add(answer.node_id)
        reason, state = (
            collect.reason_of(error, self.fleet),
            site_states.AWAY if answer.is_late else collect.state_of(error),
        )
        self.record("failed", step=step, site=self.name(answer.node_id), **of_error(error))
        self.log.append(SiteFailed(site=self.name(answer.node_id), step=step, state=state, reason=reason))

    def record(self, kind: str, **facts: Any) -> None:
        """Write into the audit log, if one is kept; on the disk when this returns.

        Raises:
            AuditError: The log was changed meanwhile.
            StorageError: It cannot be written.
        """
        if self.trail:
            self.trail.log.append(kind, run=self.manifest.sha256, **facts)

    def record_received(self, answer: collect.Answer, plan: RoundPlan, *, step: str) -> None:
        """Write down an answer that counts, before it is used; the node holds the adapter that it was sent."""
        self.held[answer.node_id] = self.sent[answer.node_id]
        self.suspects.discard(answer.node_id)
        if self.trail and answer.frame is not None:
            self.trail.answered(self.name(answer.node_id))
            facts = {"round_index": plan.round_index, "site": self.name(answer.node_id), **of_frame(answer.frame)}
            self.record("received", step=step, **facts)

    def request(self, kind: str, plan: RoundPlan, state: State, *, nodes: Sequence[int]) -> dict[int, bytes]:
        """A request that brings the global adapter without what sites make themselves, one frame for all nodes alike.

        It is in the audit log before it is sent.
        """
        by_rank: dict[int, list[int]] = {}
        for node_id in nodes:
            by_rank.setdefault(self.manifest.plan.rank_of(self.name(node_id)), []).append(node_id)
        frames: dict[int, bytes] = {}
        for same in by_rank.values():
            frames |= self._request(kind, plan, state, nodes=same)
        return frames

    def _request(self, kind: str, plan: RoundPlan, state: State, *, nodes: Sequence[int]) -> dict[int, bytes]:
        """Frames for nodes whose adapters have one rank."""
        names = [self.name(node_id) for node_id in nodes]
        tensors = ranks.cut(state, self.manifest.plan.for_site(names[0]).down(plan.round_index))
        heads = {**to_head(plan), **(self.trail.told(names) if self.trail else {})}
        settings = self.manifest.run.wire
        if settings.is_adapter_sparse:
            body = plain_body(kind, tensors, settings)
            digest = sha256(body).hexdigest()
            return self._recorded(Frame(kind, heads, body), plan, nodes=nodes, adapter_sha256=digest)
        frames: dict[int, bytes] = {}
        for form, body, group in broadcast.forms(tensors, nodes=nodes, held=self.held, steps=self.steps):
            is_told = settings.down != WHOLE_DOWN or form.form != WHOLE
            request = Frame(kind, {**heads, ADAPTER: to_head(form)} if is_told else heads, body)
            frames |= self._recorded(request, plan, nodes=group, adapter_sha256=form.sha256)
        return frames

    def _recorded(
        self, request: Frame, plan: RoundPlan, *, nodes: Sequence[int], adapter_sha256: str
    ) -> dict[int, bytes]:
        """One frame for these nodes, written down."""
        frame = wire.pack(request)
        self.sent.update(dict.fromkeys(nodes, adapter_sha256))
        if self.trail:
            facts = {"round_index": plan.round_index, "adapter_sha256": adapter_sha256, **of_frame(frame)}
            names = sorted(self.name(node_id) for node_id in nodes)
            for start in range(0, len(names), NAMES_AN_ENTRY):
                self.record("sent", step=request.kind, sites=names[start : start + NAMES_AN_ENTRY], **facts)
        return dict.fromkeys(nodes, frame)


def wait_for_sites(federation: Federation) -> None:
    """Offer the run to nodes as they connect, until `federation.num_sites` (or `min_sites`) have opened it.

    Raises:
        TooFewSitesError: Not enough before `federation.join_timeout_s`; the message says who refused and why.
    """
    settings = federation.manifest.run.federation
    wanted = settings.num_sites or settings.min_sites
    deadline = federation.clock() + settings.join_timeout_s
    while True:
        join(federation)
        if len(federation.sites) >= wanted:
            return
        if federation.clock() >= deadline or _is_hopeless(federation):
            raise TooFewSitesError(_who_is_missing(federation, wanted))
        federation.sleep(collect.POLL_S if not federation.away else RETRY_S)


def rejoin(federation: Federation) -> None:
    """Before a round: offer the run again to nodes that refused, failed or fell silent, for the reason may be mended.

    One that is still silent is left out of the round, which an event says.
    """
    federation.refused.clear()
    for node_id in federation.doubtful:
        federation.sites.pop(node_id, None)
    federation.doubtful.clear()
    join(federation)
    for node_id in sorted(federation.suspects & federation.silent & set(federation.fleet.node_ids())):
        federation.log.append(SiteSkipped(site=federation.name(node_id), state=site_states.AWAY, reason=STILL_SILENT))


def join(federation: Federation) -> None:
    """Offer the run to connected nodes that have neither opened nor refused it; those whose agent was away, again."""
    known = federation.sites.keys() | federation.refused.keys() | _deciding(federation)
    newcomers = [node_id for node_id in federation.fleet.node_ids() if node_id not in known]
    offered = federation.offer or Offer(federation.manifest.to_bytes())
    epoch = federation.trail.roster_epoch() if federation.trail else 0
    offer = wire.pack(replace(offered, roster_epoch=epoch).to_frame())
    silent = [node_id for node_id in newcomers if node_id in federation.silent]
    others = [node_id for node_id in newcomers if node_id not in federation.silent]
    for node_ids, at_most_s in ((others, math.inf), (silent, SECOND_WAIT_S)):
        for answer in federation.ask(dict.fromkeys(node_ids, offer), kind="open", at_most_s=at_most_s):
            _admit(federation, answer)


def _admit(federation: Federation, answer: collect.Answer) -> None:
    """Take a node in, or remember why not."""
    federation.away.pop(answer.node_id, None)
    federation.silent.discard(answer.node_id)
    if answer.frame is None:
        federation.away[answer.node_id] = answer.reason
        if answer.is_late:
            federation.silent.add(answer.node_id)
        return
    try:
        head = _read_opened(federation, answer)
    except RemoteError as error:
        _take_refusal(federation, answer.node_id, error)
        return
    except SilotuneError as error:
        federation.refused[answer.node_id] = collect.reason_of(error, federation.fleet)
        _tell_refusal(federation, answer.node_id, error)
        return
    told = {"site": head.site, "num_examples": head.num_examples, **of_frame(answer.frame)}
    federation.record("opened", node=str(answer.node_id), **told)
    federation.outdated_since.pop(answer.node_id, None)
    federation.sites[answer.node_id] = head
    federation.held[answer.node_id] = head.adapter_sha256
    federation.log.append(
        SiteJoined(
            node=answer.node_id,
            site=head.site,
            num_examples=head.num_examples,
            num_held_out=head.num_held_out,
            num_truncated=head.num_truncated,
            num_dropped=head.num_dropped,
            num_steps=head.num_steps,
        )
    )


def _take_refusal(federation: Federation, node_id: int, error: RemoteError) -> None:
    """Remember a site that said no.

    One where a person has yet to decide, or that has yet to fetch a roster, counts as away and is asked again; the
    latter not for ever.
    """
    state, now = collect.state_of(error), federation.clock()
    if state not in site_states.PENDING:
        federation.refused[node_id] = collect.reason_of(error, federation.fleet)
        _tell_refusal(federation, node_id, error)
        return
    is_told = federation.pending.get(node_id) == state
    federation.asked_at[node_id], federation.pending[node_id] = now, state
    federation.away[node_id] = _reason(federation, error)
    if state == site_states.OUTDATED and now - federation.outdated_since.setdefault(node_id, now) >= ROSTER_WAIT_S:
        federation.refused[node_id] = federation.away.pop(node_id)
    if not is_told:
        _tell_refusal(federation, node_id, error)


def _reason(federation: Federation, error: SilotuneError) -> str:
    """Why a site does not take part, or not yet."""
    if collect.state_of(error) == site_states.OUTDATED and federation.trail:
        return OLD_ROSTER.format(epoch=federation.trail.roster_epoch())
    return collect.reason_of(error, federation.fleet)


def _tell_refusal(federation: Federation, node_id: int, error: SilotuneError) -> None:
    """Log why a node does not take part, or not yet; under its site's name where that is known."""
    federation.record("refused", step="open", node=str(node_id), **of_error(error))
    federation.log.append(
        SiteRefused(
            node=node_id,
            site=federation.name(node_id),
            state=collect.state_of(error),
            reason=_reason(federation, error),
        )
    )


def _deciding(federation: Federation) -> set[int]:
    """Nodes that need not be asked yet again."""
    limit = federation.clock() - APPROVAL_RETRY_S
    return {node_id for node_id, asked_at in federation.asked_at.items() if asked_at > limit}


def _read_opened(federation: Federation, answer: collect.Answer) -> OpenedHead:
    """A node's answer to the offer, checked."""
    head = from_head(OpenedHead, federation.expect(answer, "opened").head)
    if head.run_sha256 != federation.manifest.sha256 or not head.num_examples:
        raise ProtocolError("answered for another run, or has no rows")
    if not re.fullmatch(SLUG, head.site):
        raise ProtocolError("has no site name of a-z, 0-9 and '-'")
    if federation.names.setdefault(head.site, answer.node_id) != answer.node_id:
        raise ProtocolError(f"the name '{head.site}' is taken by another node")
    return head


def _is_hopeless(federation: Federation) -> bool:
    """Whether every node that the run waits for has refused; one that did not get a roster will not without somebody's
    doing, so then those that are connected are all.
    """
    num_sites = federation.manifest.run.federation.num_sites
    if federation.fleet.is_closed:
        num_sites = len(federation.fleet.node_ids())
    decided = federation.refused.keys() | federation.sites.keys()
    if federation.refused.keys() & federation.outdated_since.keys():
        return decided >= set(federation.fleet.node_ids())
    return bool(num_sites) and len(decided) >= num_sites


def _who_is_missing(federation: Federation, wanted: int) -> str:
    """How many are there, how many are needed, and what the others said."""
    others = sorted((federation.refused | federation.away).items())
    reasons = "; ".join(f"{federation.name(node)}: {reason}" for node, reason in others)
    return (
        f"{len(federation.sites)} sites opened the run, {wanted} are needed; {reasons or 'no other node is connected'}"
    )
