"""What a site's audit log says about its runs, folded entry by entry: the site's only memory of what it has done."""

import math
from dataclasses import dataclass, field
from typing import Final

from client.ledger.sealed import LedgerHead
from client.policy.rules import Usage
from common.frame.exchanges import position
from common.trust.audit_log import Entry

AUDIT_FILE: Final = "audit.jsonl"
DAY_S: Final = 86_400
MAX_REFUSALS: Final = 1000


@dataclass(frozen=True)
class RosterSeen:
    """The newest roster that this site has accepted.

    Attributes:
        epoch: Its number; 0 before the first.
        sha256: Its hash.
        governance_sha256: Of the governance that signed it.
    """

    epoch: int = 0
    sha256: str = ""
    governance_sha256: str = ""


@dataclass(frozen=True)
class AnsweredStep:
    """One answer to one request.

    Attributes:
        position: Its place in a run; see `common.frame.exchanges`.
        request_sha256: Hash of the adapter that came.
        content_sha256: Hash of what left, times aside.
    """

    position: int
    request_sha256: str
    content_sha256: str


@dataclass
class RunHistory:
    """One run.

    Attributes:
        name: As its manifest calls it.
        offered_at: Unix seconds.
        decision: `""`, `approved` or `denied`.
        opened_at: When it was first opened; None if it never was.
        num_rounds: Of its manifest; None if it was never opened, or by a release that did not write it down.
        bytes_out: Sum of what left.
        left_at: When the newest answer left, Unix seconds; None before the first.
        steps: What was answered, by kind and round.
    """

    name: str = ""
    offered_at: float = 0.0
    decision: str = ""
    opened_at: float | None = None
    num_rounds: int | None = None
    bytes_out: int = 0
    left_at: float | None = None
    steps: dict[tuple[str, int], AnsweredStep] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether the last planned round was answered, or an evaluation after it where others were drawn for it."""
        last = position("train", self.num_rounds - 1) if self.num_rounds else math.inf
        return any(step.position >= last for step in self.steps.values())


@dataclass(frozen=True)
class Refusal:
    """The newest request of a run that this site turned away.

    Attributes:
        name: Of the run, as its manifest calls it; empty if the request had none that could be read.
        code: What the coordinator was told.
        rule: The rule of the policy, or the code where none refused.
        reference: Under which the agent's own log has the reason.
        refused_at: Unix seconds.
    """

    name: str
    code: str
    rule: str
    reference: str
    refused_at: float


@dataclass
class History:
    """All runs that this site knows of, by the hash of their manifests.

    Attributes:
        runs: In the order in which they were first heard of.
        approved: Hashes in the order of approval.
        serial: Of the newest policy that the agent has started with; -1 before the first.
        policy_sha256: Of that policy.
        ledgers: The newest line that is known of each privacy ledger, by its file's name.
        refusals: Runs whose newest offer or step was turned away, the newest last; at most `MAX_REFUSALS`, as anybody
            can offer.
        line_hashes: Of every entry, by its place.
        roster: The newest roster that was accepted.
    """

    runs: dict[str, RunHistory] = field(default_factory=dict)
    approved: list[str] = field(default_factory=list)
    serial: int = -1
    policy_sha256: str = ""
    ledgers: dict[str, LedgerHead] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    line_hashes: list[bytes] = field(default_factory=list)
    roster: RosterSeen = RosterSeen()

    def take(self, entry: Entry) -> None:
        """One more entry of the log."""
        facts = entry.facts
        self.line_hashes.append(bytes.fromhex(entry.head.sha256))
        if entry.kind == "started":
            self.serial, self.policy_sha256 = facts["policy_serial"], facts["policy_sha256"]
        elif entry.kind == "ledger":
            self.ledgers[facts["ledger"]] = LedgerHead(facts["counter"], facts["ledger_sha256"])
        elif entry.kind == "roster":
            self.roster = RosterSeen(**facts)
        elif entry.kind == "refused":
            self._take_refused(entry)
        elif entry.kind in ("offered", "approved", "denied", "opened", "left"):
            self._take_run(entry, self.runs.setdefault(facts["run"], RunHistory()))

    def _take_refused(self, entry: Entry) -> None:
        """One more offer that was turned away, or a step of a run that is known: whoever asks can name any other."""
        facts = entry.facts
        run = facts.get("run", "")
        if run and (facts["step"] == "open" or run in self.runs):
            name = facts.get("name", "") or self.run(run).name
            self.refusals.pop(run, None)
            self.refusals[run] = Refusal(name, facts["code"], facts["rule"], facts["reference"], entry.time)
            while len(self.refusals) > MAX_REFUSALS:
                del self.refusals[next(iter(self.refusals))]

    def usage(self, run_sha256: str, *, now: float) -> Usage:
        """What counts against the policy's quotas when this run wants to open."""
        others = (run.opened_at for sha256, run in self.runs.items() if sha256 != run_sha256)
        num_today = sum(opened_at is not None and opened_at > now - DAY_S for opened_at in others)
        return Usage(num_today, self.run(run_sha256).bytes_out)

    def run(self, run_sha256: str) -> RunHistory:
        """A run's history; an empty one if the run is unknown."""
        return self.runs.get(run_sha256, RunHistory())

    def _take_run(self, entry: Entry, run: RunHistory) -> None:
        """One more entry about one run."""
        if entry.kind != "denied":
            self.refusals.pop(entry.facts["run"], None)
        if entry.kind == "offered":
            run.name, run.offered_at = entry.facts["name"], entry.time
        elif entry.kind == "opened":
            run.opened_at = entry.time if run.opened_at is None else run.opened_at
            run.num_rounds = entry.facts.get("num_rounds")
        elif entry.kind == "left":
            run.left_at, facts = entry.time, entry.facts
            run.bytes_out += facts["num_bytes"]
            if facts["step"] != "open":
                key = (facts["step"], facts["round_index"])
                step = AnsweredStep(position(*key), facts["request_sha256"], facts["content_sha256"])
                run.steps.setdefault(key, step)
        else:
            run.decision = entry.kind
            self.approved = [sha256 for sha256 in self.approved if sha256 != entry.facts["run"]]
            self.approved += [entry.facts["run"]] if entry.kind == "approved" else []
