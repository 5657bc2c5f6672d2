"""Who takes part in a run: nodes that open it, what each is sent, and whether its answer counts."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from common.adapter import ranks
from common.adapter.broadcast import WHOLE, plain_body
from common.errors import ProtocolError, SilotuneError, TooFewSitesError, WireError
from common.event_kinds import SiteFailed, SiteJoined, SiteRefused, SiteSkipped
from common.frame import site_states, wire
from common.frame.exchanges import EXCHANGES
from common.frame.records import ADAPTER, OpenedHead, RoundPlan, SiteMetrics, UpdateHead, from_head, to_head
from common.frame.wire import Frame
from common.run.manifest import Offer
from common.run.schema.section import SLUG
from common.run.schema.wire import WHOLE as WHOLE_DOWN
from server.aggregate.method import State
from server.fleet import broadcast, collect
from server.fleet.broadcast import Step
from server.fleet.fleet import SMALL_REPLY_BYTES, Fleet
from server.fleet.run import Run
from server.fleet.trail import of_error, of_frame

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


class Sites:
    """The sites of a run: who is there, under which name, and what each was sent and has answered.

    Everything here is of this process alone: whoever resumes a run offers it anew and learns the same again.

    Args:
        run: The run.
        fleet: The nodes.
        told_names: The names under which nodes were registered, or that they told in an earlier try of the run; for
            showing only, as nobody has vouched for them yet.

    Attributes:
        fleet: The nodes.
        opened: What each node told when it opened the run.
        silent: Nodes that let the whole wait pass, for an offer or a step; they are offered the run with a short wait,
            and have no part in it before they answer.
        suspects: Nodes that let the wait of a step pass, and have answered no step since.
        held: Hash of the adapter that each node answered for last.
        metrics: Last held-out figures of each site, by name.
    """

    def __init__(self, run: Run, fleet: Fleet, *, told_names: Mapping[int, str] | None = None) -> None:
        self.run, self.fleet, self._told_names = run, fleet, told_names or {}
        self.opened: dict[int, OpenedHead] = {}
        self.silent: set[int] = set()
        self.suspects: set[int] = set()
        self.held: dict[int, str] = {}
        self.metrics: dict[str, SiteMetrics] = {}
        self._sent: dict[int, str] = {}  # hash of the adapter in the last request to each node
        self._names: dict[str, int] = {}  # a name stays with the node that told it first, under the key of the site
        self._doubtful: set[int] = set()  # failed at a step: their agent may have started anew
        self._refused: dict[int, str] = {}
        self._away: dict[int, str] = {}  # connected, and did not answer the offer: their agent may yet start
        self._asked_at: dict[int, float] = {}  # when nodes said that a person has to decide, or that a roster is older
        self._pending: dict[int, str] = {}  # which of the two they said last
        self._outdated_since: dict[int, float] = {}

    def ask(self, frames: Mapping[int, bytes], *, kind: str, at_most_s: float = math.inf) -> Iterator[collect.Answer]:
        """Send frames and yield the answers as they come, until the step's deadline; see `collect.ask`."""
        federation, exchange = self.run.plan.federation, EXCHANGES[kind]
        is_offer = exchange.order is None
        return collect.ask(
            self.fleet,
            frames,
            kind=kind,
            timeout_s=min(at_most_s, federation.join_timeout_s if is_offer else federation.round_timeout_s),
            max_reply_bytes=SMALL_REPLY_BYTES + (self.run.plan.max_update_bytes if exchange.has_tensors else 0),
            suspects=() if is_offer else self.suspects,
            grace_s=SECOND_WAIT_S,
            clock=self.run.clock,
            sleep=self.run.sleep,
        )

    def name(self, node_id: int) -> str:
        """A node's site name; `node N` before it has told one."""
        if node_id in self.opened:
            return self.opened[node_id].site
        known = next((site for site, known in self._names.items() if known == node_id), "")
        return known or self._told_names.get(node_id) or self.fleet.names.get(node_id, f"node {node_id}")

    def present(self) -> dict[str, int]:
        """The node of each site that opened the run, is connected now and answered when it was asked last."""
        connected = (node_id for node_id in self.fleet.node_ids() if node_id in self.opened)
        return {self.name(node_id): node_id for node_id in connected if node_id not in self.silent}

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
        if self.run.trail:
            self.run.trail.check(frame, site=str(frame.head.get("site", "")))
        return frame

    def read_update(self, answer: collect.Answer, plan: RoundPlan) -> tuple[UpdateHead, State]:
        """One update, checked before a float of it is used.

        Raises:
            SilotuneError: It does not count; as `expect` and `collect.read_update`.
            WireError: It is under another name, or claims another number of rows than the site opened with.
            AuditError: Its site's log went back.
        """
        site = self.name(answer.node_id)
        frame = self.expect(answer, "update", max_body_bytes=self.run.plan.max_update_bytes)
        head, change = collect.read_update(frame, plan, expected=self.run.plan.for_site(site))
        if head.site != site or head.num_examples != self.opened[answer.node_id].num_examples:
            raise WireError("update is under another name, or claims another number of rows than the site opened with")
        if self.run.trail:
            self.run.trail.keep(head)
        return head, change

    def fail(self, answer: collect.Answer, error: SilotuneError, *, step: str) -> None:
        """Log that a site's answer does not count, and doubt the site.

        One that is late has no part in the run before it answers an offer, which is waited for only shortly.
        """
        self.held.pop(answer.node_id, None)
        self._doubtful.add(answer.node_id)
        if answer.is_late:
            self.silent.add(answer.node_id)
            self.suspects.add(answer.node_id)
        site, reason = self.name(answer.node_id), collect.reason_of(error, self.fleet)
        state = site_states.AWAY if answer.is_late else collect.state_of(error)
        self.run.record("failed", step=step, site=site, **of_error(error))
        self.run.log.append(SiteFailed(site=site, step=step, state=state, reason=reason))

    def received(self, answer: collect.Answer, plan: RoundPlan, *, step: str) -> None:
        """Write down an answer that counts, before it is used; the node holds the adapter that it was sent."""
        self.held[answer.node_id] = self._sent[answer.node_id]
        self.suspects.discard(answer.node_id)
        if self.run.trail and answer.frame is not None:
            self.run.trail.answered(self.name(answer.node_id))
            facts = {"round_index": plan.round_index, "site": self.name(answer.node_id), **of_frame(answer.frame)}
            self.run.record("received", step=step, **facts)

    def request(
        self, kind: str, plan: RoundPlan, state: State, *, nodes: Sequence[int], steps: Sequence[Step] = ()
    ) -> dict[int, bytes]:
        """A request that brings the global adapter without what sites make themselves, by node.

        Nodes of one rank that hold the same share one frame. It is in the audit log before it is sent.

        Args:
            kind: `train` or `evaluate`.
            plan: The round.
            state: The global adapter.
            nodes: Who is asked.
            steps: To this adapter; a node that holds one on their way is sent the rest of them alone.
        """
        by_rank: dict[int, list[int]] = {}
        for node_id in nodes:
            by_rank.setdefault(self.run.plan.rank_of(self.name(node_id)), []).append(node_id)
        frames: dict[int, bytes] = {}
        for same in by_rank.values():
            names = [self.name(node_id) for node_id in same]
            tensors = ranks.cut(state, self.run.plan.for_site(names[0]).down(plan.round_index))
            head = {**to_head(plan), **(self.run.trail.told(names) if self.run.trail else {})}
            settings = self.run.plan.wire
            if settings.is_adapter_sparse:
                body = plain_body(kind, tensors, settings)
                frames |= self._recorded(
                    Frame(kind, head, body), plan, nodes=same, adapter_sha256=hashlib.sha256(body).hexdigest()
                )
                continue
            for form, body, group in broadcast.forms(tensors, nodes=same, held=self.held, steps=steps):
                is_told = settings.down != WHOLE_DOWN or form.form != WHOLE
                request = Frame(kind, {**head, ADAPTER: to_head(form)} if is_told else head, body)
                frames |= self._recorded(request, plan, nodes=group, adapter_sha256=form.sha256)
        return frames

    def _recorded(
        self, request: Frame, plan: RoundPlan, *, nodes: Sequence[int], adapter_sha256: str
    ) -> dict[int, bytes]:
        """One frame for these nodes, written down."""
        frame = wire.pack(request)
        self._sent.update(dict.fromkeys(nodes, adapter_sha256))
        if self.run.trail:
            facts = {"round_index": plan.round_index, "adapter_sha256": adapter_sha256, **of_frame(frame)}
            names = sorted(self.name(node_id) for node_id in nodes)
            for start in range(0, len(names), NAMES_AN_ENTRY):
                self.run.record("sent", step=request.kind, sites=names[start : start + NAMES_AN_ENTRY], **facts)
        return dict.fromkeys(nodes, frame)

    def wait(self) -> None:
        """Offer the run to nodes as they connect, until `federation.num_sites` (or `min_sites`) have opened it.

        Raises:
            TooFewSitesError: Not enough before `federation.join_timeout_s`; the message says who refused and why.
        """
        federation = self.run.plan.federation
        wanted = federation.num_sites or federation.min_sites
        deadline = self.run.clock() + federation.join_timeout_s
        while True:
            self.join()
            if len(self.opened) >= wanted:
                return
            if self.run.clock() >= deadline or self._have_all_decided():
                others = sorted((self._refused | self._away).items())
                reasons = "; ".join(f"{self.name(node)}: {reason}" for node, reason in others)
                raise TooFewSitesError(
                    f"{len(self.opened)} sites opened the run, {wanted} are needed; "
                    f"{reasons or 'no other node is connected'}"
                )
            self.run.sleep(collect.POLL_S if not self._away else RETRY_S)

    def _have_all_decided(self) -> bool:
        """Whether every node that the run waits for has opened it or refused.

        One that did not get a roster will not without somebody's doing, so then those that are connected are all.
        """
        connected = set(self.fleet.node_ids())
        num_sites = len(connected) if self.fleet.is_closed else self.run.plan.federation.num_sites
        decided = self._refused.keys() | self.opened.keys()
        if self._refused.keys() & self._outdated_since.keys():
            return decided >= connected
        return bool(num_sites) and len(decided) >= num_sites

    def rejoin(self) -> None:
        """Before a round: offer the run again to nodes that refused, failed or fell silent; the reason may be mended.

        One that is still silent is left out of the round, which an event says.
        """
        self._refused.clear()
        for node_id in self._doubtful:
            self.opened.pop(node_id, None)
        self._doubtful.clear()
        self.join()
        for node_id in sorted(self.suspects & self.silent & set(self.fleet.node_ids())):
            self.run.log.append(SiteSkipped(site=self.name(node_id), state=site_states.AWAY, reason=STILL_SILENT))

    def join(self) -> None:
        """Offer the run to connected nodes that have neither opened nor refused it, and to those that were away."""
        limit = self.run.clock() - APPROVAL_RETRY_S
        deciding = {node_id for node_id, asked_at in self._asked_at.items() if asked_at > limit}  # not asked yet again
        known = self.opened.keys() | self._refused.keys() | deciding
        newcomers = [node_id for node_id in self.fleet.node_ids() if node_id not in known]
        offered = self.run.offer or Offer(self.run.manifest.to_bytes())
        epoch = self.run.trail.roster_epoch() if self.run.trail else 0
        offer = wire.pack(replace(offered, roster_epoch=epoch).to_frame())
        silent = [node_id for node_id in newcomers if node_id in self.silent]
        others = [node_id for node_id in newcomers if node_id not in self.silent]
        for node_ids, at_most_s in ((others, math.inf), (silent, SECOND_WAIT_S)):
            for answer in self.ask(dict.fromkeys(node_ids, offer), kind="open", at_most_s=at_most_s):
                self._away.pop(answer.node_id, None)
                self.silent.discard(answer.node_id)
                if answer.frame is None:
                    self._away[answer.node_id] = answer.reason
                    if answer.is_late:
                        self.silent.add(answer.node_id)
                    continue
                try:
                    self._admit(answer.node_id, self._read_opened(answer), answer.frame)
                except SilotuneError as error:
                    self._take_refusal(answer.node_id, error)

    def _read_opened(self, answer: collect.Answer) -> OpenedHead:
        """A node's answer to the offer, checked."""
        head = from_head(OpenedHead, self.expect(answer, "opened").head)
        if head.run_sha256 != self.run.manifest.sha256 or not head.num_examples:
            raise ProtocolError("answered for another run, or has no rows")
        if not re.fullmatch(SLUG, head.site):
            raise ProtocolError("has no site name of a-z, 0-9 and '-'")
        if self._names.setdefault(head.site, answer.node_id) != answer.node_id:
            raise ProtocolError(f"the name '{head.site}' is taken by another node")
        return head

    def _admit(self, node_id: int, head: OpenedHead, frame: bytes) -> None:
        """Take a node in."""
        facts = {"site": head.site, "num_examples": head.num_examples, **of_frame(frame)}
        self.run.record("opened", node=str(node_id), **facts)
        self._outdated_since.pop(node_id, None)
        self.opened[node_id], self.held[node_id] = head, head.adapter_sha256
        self.run.log.append(
            SiteJoined(
                node=node_id,
                site=head.site,
                num_examples=head.num_examples,
                num_held_out=head.num_held_out,
                num_truncated=head.num_truncated,
                num_dropped=head.num_dropped,
                num_steps=head.num_steps,
            )
        )

    def _take_refusal(self, node_id: int, error: SilotuneError) -> None:
        """Remember a site that said no, and log it under its name where that is known.

        One where a person has yet to decide, or that has yet to fetch a roster, counts as away and is asked again, and
        says so once; the latter not for ever.
        """
        state, reason, now = collect.state_of(error), collect.reason_of(error, self.fleet), self.run.clock()
        if state == site_states.OUTDATED and self.run.trail:
            reason = OLD_ROSTER.format(epoch=self.run.trail.roster_epoch())
        is_known = self._pending.get(node_id) == state
        if state in site_states.PENDING:
            self._asked_at[node_id], self._pending[node_id], self._away[node_id] = now, state, reason
            since = self._outdated_since.setdefault(node_id, now) if state == site_states.OUTDATED else now
            if now - since >= ROSTER_WAIT_S:
                self._refused[node_id] = self._away.pop(node_id)
        else:
            self._refused[node_id], is_known = reason, False
        if not is_known:
            self.run.record("refused", step="open", node=str(node_id), **of_error(error))
            self.run.log.append(SiteRefused(node=node_id, site=self.name(node_id), state=state, reason=reason))
