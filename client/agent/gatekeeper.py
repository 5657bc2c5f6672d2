"""The guard of a site that has a policy: signature, rules, consent, order and quotas before; egress after; all logged.

An answer is in the audit log, on the disk, before its bytes leave; a log that cannot be written sends nothing.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.agent import outgoing, probes
from client.agent.moves import Moves
from client.agent.pressure import Limit
from client.join import membership
from client.join.membership import Membership
from client.memory import consent, replicas
from client.memory.history import AUDIT_FILE, History
from client.memory.payment import Payment
from client.policy import figures
from client.policy import rules as policy
from client.policy.figures import FigureNoise
from client.policy.file import DatasetRules, SignedPolicy
from common.adapter import broadcast
from common.adapter.adapter import Tensors
from common.errors import (
    ApprovalDenied,
    ApprovalRequired,
    AuditError,
    BudgetExhausted,
    CodesDifferError,
    LedgerError,
    PolicyRefusedError,
    ProtocolError,
    RosterOutdated,
    SilotuneError,
    StorageError,
    code_of,
)
from common.frame import site_states, wire
from common.frame.exchanges import EXCHANGES, position
from common.frame.records import SIGNED, OpenedHead, RoundPlan
from common.frame.wire import Frame
from common.privacy import noise
from common.run import config, egress, manifest
from common.run.manifest import Offer, RunManifest
from common.trust import heads, identity, roster, signed_frame
from common.trust.audit_log import AuditLog, Head
from common.trust.heads import Heads

MAX_REFUSALS_A_MINUTE: Final = 120  # that are logged
MAX_OPENS_A_MINUTE: Final = 60  # that are answered; the same offer may come again, and each answer is logged
RULES: Final[dict[type[Exception], str]] = {
    ApprovalDenied: "runs.approval",
    BudgetExhausted: "privacy.max_epsilon",
    CodesDifferError: "model.codes",
    LedgerError: "privacy.ledger",
    RosterOutdated: "roster",
}


class Gatekeeper:
    """A `Guard` with rules; it watches to which rows an adapter answers.

    Args:
        signed_policy: What the site allows.
        node: The site's own file.
        key: The site's identity; signs the audit log.
        clock: Unix seconds.
        tell: Given a line for people when a run is opened, a round is answered or the policy's file has changed.

    Raises:
        PolicyRefusedError: The policy is older than one that was in force, or does not allow the site's own file; or
            the roster is old, forged or without this site.
        AuditError: The audit log is not whole.
    """

    watches_rows = True

    def __init__(
        self,
        signed_policy: SignedPolicy,
        *,
        node: config.NodeConfig,
        key: Ed25519PrivateKey,
        clock: Callable[[], float] = time.time,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.policy = signed_policy.rules
        self._tell = tell
        self._policy_file, self._policy_seen = Path(node.agent.policy), signed_policy.sha256
        self.history = History()
        self._folder, self._max_message_mib = Path(node.agent.log_folder), node.agent.max_message_mib
        self._site, self._identity_key = node.site.name, identity.public_hex(key)
        self._roster_folder = node.agent.roster_folder
        self._clock = clock
        self._admitted: set[str] = set()
        self._signers: dict[str, str] = {}
        federation = self.policy.federation.id
        self._heads = Heads(self._folder / replicas.HEADS_FILE, federation)
        self._vouch = partial(heads.sign, owner=node.site.name, federation=federation, key=key)
        self._sign = partial(signed_frame.sign, key=key, federation=federation)
        self._refusals = Limit(MAX_REFUSALS_A_MINUTE, clock=clock)
        self._opens = Limit(MAX_OPENS_A_MINUTE, clock=clock)
        self._log = AuditLog(self._folder / AUDIT_FILE, key=key, on_entry=self.history.take, clock=clock)
        self._payment = Payment(node, rules=self.policy, key=key, history=self.history, log=self._log)
        self._moves = Moves(self._folder, rules=self.policy)
        self._dataset = self._start(signed_policy, node)
        self._log.append("started", policy_sha256=signed_policy.sha256, policy_serial=self.policy.serial)

    def before_open(self, offer: Offer) -> None:
        """Only a run that an operator signed, the policy allows and somebody approved."""
        if not self._opens.allows():
            raise PolicyRefusedError(f"runs.opens: more than {MAX_OPENS_A_MINUTE} offers a minute", rule="runs.opens")
        self._admitted.discard(offer.sha256)
        self._notice_policy()
        self._refresh()
        member = self._check_roster()
        if member and offer.roster_epoch > member.seen.epoch:
            raise RosterOutdated(
                f"roster: this site has epoch {member.seen.epoch}, and the run is offered under {offer.roster_epoch}; "
                "silotune-client link --agent SOCKET brings the newest, or take it by: silotune-client roster"
            )
        operators = member.operators if member else ()
        policy.check_signature(self.policy, offer, now=self._clock(), operators=operators)
        if member:
            policy.check_members(self.policy, member.num_sites)
        run = manifest.parse(offer.manifest)
        self._signers[offer.sha256] = offer.signature.signer if offer.signature else ""
        try:
            policy.check(self.policy, run, self.history.usage(offer.sha256, now=self._clock()), site=self._site)
            policy.check_message_size(run, max_mib=self._max_message_mib)
            policy.check_columns(self._dataset, run.run.training.objective.kind)
        except PolicyRefusedError:
            with suppress(ApprovalRequired, StorageError):  # kept so that people can read what the refused run asks
                consent.store(self._folder / consent.REFUSED, offer)
            raise
        if offer.sha256 not in self.history.runs:
            consent.store(self._folder, offer)
            self._log.append("offered", run=offer.sha256, name=run.run.name, rule="runs.approval", **_who(offer))
        consent.require(self.policy, self.history, run, folder=self._folder)
        self._payment.check(run)

    def take_roster(self, data: bytes) -> int:
        """A newer one holds from now on, and this site must be in it; one that holds already changes nothing."""
        self._refresh()
        membership.take(self._roster_folder, data, rules=self.policy.federation, seen=self.history.roster)
        found = self._check_roster()
        return found.seen.epoch if found else 0

    def begins(self, make: Callable[[], Tensors], *, num_steps: int, run: RunManifest) -> None:
        """The first adapter is held against what this site makes of the seed itself."""
        self._moves.begin(run, make, num_steps=num_steps)

    def before_step(self, request: Frame, plan: RoundPlan, tensors: Tensors, *, run: RunManifest) -> None:
        """Only a run that is still approved, a round in its order, an adapter that no attack shaped, and whole logs."""
        if plan.run_sha256 not in self._admitted:
            raise ProtocolError("this run is not open at this site; the server must send its manifest first")
        self._refresh()
        member = self._check_roster()
        consent.require(self.policy, self.history, run, folder=self._folder)
        self._check_order(request, plan, run)
        probes.check(tensors, max_tensor_norm=self.policy.train.max_tensor_norm)
        if (request.kind, plan.round_index) not in self.history.run(run.sha256).steps:
            self._moves.check(run, plan.round_index, tensors)
            self._moves.keep(run, plan.round_index, tensors)
        self._keep_heads(request, signer=self._signers[plan.run_sha256], keys=member.site_keys if member else None)

    def counted(self, head: OpenedHead, *, num_units: tuple[int, int], run: RunManifest) -> OpenedHead:
        """Enough rows for the policy; where it demands differential privacy, units are told, noised and charged."""
        num_rounds = run.run.federation.num_rounds
        policy.check_opened(self.policy, self._dataset, head, run.run.training, num_rounds=num_rounds)
        if self.policy.privacy.mode == "none":
            return head
        if not policy.is_covered(self.policy, run.run.privacy):
            return dataclasses.replace(head, num_held_out=0)
        released = self._payment.counts(
            run, lambda: figures.counts(num_units, rules=self.policy, source=noise.SystemNoise())
        )
        return figures.head_of_units(head, released, rules=self.policy)

    def before_evaluation(self, plan: RoundPlan, *, run: RunManifest) -> Frame | FigureNoise | None:
        """Where privacy is demanded, no figure leaves that no noise covers, and what leaves is paid for once."""
        if self.policy.privacy.mode == "none":
            return None
        rules = self.policy.evaluation
        if not rules.noise_multiplier or not policy.is_covered(self.policy, run.run.privacy):
            raise PolicyRefusedError(
                "evaluation.noise_multiplier: differential privacy is required, and no noise is set for held-out "
                "figures",
                rule="evaluation.noise_multiplier",
            )
        kept = self._payment.answered(run, plan.round_index, kind="evaluate")
        if kept is not None:
            return kept
        self._payment.pay(run, plan.round_index, kind="evaluate")
        return FigureNoise(rules.noise_multiplier, rules.max_loss, noise.SystemNoise())

    def before_training(self, request: Frame, plan: RoundPlan, *, run: RunManifest) -> Frame | None:
        """A round private for units is paid for once; a private answer is given again if it is asked for again."""
        if run.run.privacy.mode == "none":
            return None
        kept = self._payment.answered(run, plan.round_index)
        if kept is None and run.run.privacy.mode == "unit":
            self._payment.pay(run, plan.round_index)
        return kept

    def after_training(self, spread: float | None, answering: tuple[float, str] | None) -> None:
        """An update to which a few steps gave nearly all, or which few rows answer to, speaks of these rows."""
        limit = self.policy.train.min_spread
        if spread is not None and not spread >= limit:
            raise PolicyRefusedError(
                f"train.min_spread: the round's gradients come from a share of {spread:.3f} of its steps, which is "
                f"below {limit:g}",
                rule="train.min_spread",
            )
        share, module = answering or (1.0, "")
        if not share >= self.policy.train.min_answering:
            raise PolicyRefusedError(
                f"train.min_answering: a direction of {module} answers to a share of {share:.3f} of the round's rows, "
                f"which is below {self.policy.train.min_answering:g}",
                rule="train.min_answering",
            )

    def outgoing(self, request: Frame, reply: Frame, *, run: RunManifest) -> bytes:
        """Round, check against manifest and policy, count, log; then the bytes may leave."""
        if reply.kind != EXCHANGES[request.kind].reply:
            raise PolicyRefusedError(f"egress: a reply of kind '{reply.kind}'", rule="egress")
        rounded = outgoing.rounded(reply, digits=self.policy.evaluation.round_metrics_to)
        names = {"site": self._site, "run_sha256": run.sha256, "round_index": request.head.get("round_index")}
        outgoing.check(self.policy, run, rounded, names=names)
        if reply.kind == "update" and run.run.privacy.mode != "none":
            self._payment.keep(run, int(rounded.head["round_index"]), rounded)
        if reply.kind == "metrics" and policy.is_covered(self.policy, run.run.privacy):
            self._payment.keep(run, int(rounded.head["round_index"]), rounded, kind="evaluate")
        rounded = self._sign(self._with_audit_head(rounded))
        data = wire.pack(rounded)
        self._check_bytes(run, len(data))
        facts = self._facts(run, request, rounded, data)
        if reply.kind == "opened":
            self._admit(run)
        self._log.append("left", **facts)
        self._tell_left(run, rounded)
        return data

    def _tell_left(self, run: RunManifest, reply: Frame) -> None:
        """A line for people: the state that the run is in by now."""
        name, num_rounds = run.run.name, run.run.federation.num_rounds
        if reply.kind == "opened":
            self._tell(f"{site_states.APPROVED}: run '{name}' is open")
        elif reply.kind == "update":
            state = site_states.FINISHED if self.history.run(run.sha256).is_finished else site_states.TRAINING
            self._tell(f"{state}: run '{name}', round {reply.head['round_index'] + 1} of {num_rounds} is answered")

    def refused(self, reference: str, request: Frame | None, error: Exception) -> None:
        """Log code and rule. An offer that merely waits was logged when it came.

        Of a flood only so many a minute are logged, and how many were not, so that no courier can fill the disk.
        """
        if isinstance(error, ApprovalRequired | AuditError):
            return
        self._tell_suppressed()
        if not self._refusals.allows():
            if self._refusals.is_first_suppressed:
                self._log.append("suppressing", max_a_minute=MAX_REFUSALS_A_MINUTE)
            return
        step = request.kind if request is not None and request.kind in (*EXCHANGES, roster.KIND) else "unknown"
        self._log.append(
            "refused", step=step, code=code_of(error), rule=_rule(error), reference=reference, **_run_of(request)
        )

    def _refresh(self) -> Head:
        """Read what people decided meanwhile, and tell of a flood of refusals that is over."""
        self._tell_suppressed()
        return self._log.refresh()

    def _notice_policy(self) -> None:
        """Tell, once, that the policy's file is no longer what this agent has begun with, and that nothing follows.

        It is not taken up: rules are bound into the ledger, the bounds on adapters and the runs that are open.
        """
        with suppress(OSError):
            found = _sha256(self._policy_file.read_bytes())
            if found != self._policy_seen:
                self._policy_seen = found
                self._tell(
                    f"{self._policy_file} has changed; serial {self.policy.serial}, with which this agent began, stays "
                    "in force until it is restarted"
                )

    def _tell_suppressed(self) -> None:
        """Log how many refusals a minute that is over had beyond those that were logged."""
        num_suppressed = self._refusals.take_suppressed()
        if num_suppressed:
            self._log.append("suppressed", num_refusals=num_suppressed)

    def _start(self, signed_policy: SignedPolicy, node: config.NodeConfig) -> DatasetRules:
        """Policy and roster must hold before the door opens; why they do not is in the log."""
        try:
            check_serial(signed_policy, self.history)
            self._check_roster()
            return policy.check_node(self.policy, node.data)
        except PolicyRefusedError as error:
            self._log.append("refused", step="start", code=code_of(error), rule=_rule(error))
            raise

    def _check_roster(self) -> Membership | None:
        """This site is a member by the newest roster, and a newer one is remembered before anything else is done."""
        seen = self.history.roster
        found = membership.check(
            self._roster_folder,
            rules=self.policy.federation,
            seen=seen,
            site=self._site,
            identity_key=self._identity_key,
        )
        if found and found.seen != seen:
            self._log.append("roster", **dataclasses.asdict(found.seen))
        return found

    def _keep_heads(self, request: Frame, *, signer: str, keys: Mapping[str, str] | None) -> None:
        """Where the logs of the others stand; `keys` are the sites' by the roster, None where this site reads none."""
        told = replicas.read(request, signer=signer, federation=self.policy.federation.id)
        own = replicas.Own(self._site, self._identity_key, self.history.line_hashes)
        replicas.keep(told, self._heads, own=own, keys=keys)

    def _with_audit_head(self, reply: Frame) -> Frame:
        """Tell where this log stands with every update, so that the coordinator can notice a cut tail."""
        if reply.kind != "update":
            return reply
        head = self._refresh()
        vouched = self._vouch(head)
        told = (head.sequence + 1, head.sha256, head.time, vouched.signer, vouched.signature)
        return reply.with_head({**reply.head, **dict(zip(egress.AUDIT, told, strict=True))})

    def _admit(self, run: RunManifest) -> None:
        """The rows are read, and there are enough: the run begins, and counts as one of the day's."""
        if self.history.run(run.sha256).opened_at is None:
            approved_by = consent.require(self.policy, self.history, run, folder=self._folder)
            num_rounds = run.run.federation.num_rounds
            self._log.append("opened", run=run.sha256, approved_by=approved_by, num_rounds=num_rounds)
        self._admitted.add(run.sha256)

    def _check_order(self, request: Frame, plan: RoundPlan, run: RunManifest) -> None:
        """Rounds go forward; one that was answered is answered again only for the very same adapter.

        Of evaluations only those are answered that the run file plans, each once.
        """
        if request.kind == "evaluate" and plan.round_index not in run.plan.evaluated_rounds:
            raise PolicyRefusedError(
                f"rounds: no evaluation is planned after {plan.round_index} rounds; evaluation.every_rounds is "
                f"{run.run.evaluation.every_rounds}",
                rule="rounds",
            )
        steps = self.history.run(plan.run_sha256).steps
        known = steps.get((request.kind, plan.round_index))
        if known is not None and known.request_sha256 != broadcast.adapter_sha256(request):
            raise PolicyRefusedError(
                f"rounds: {request.kind} of round {plan.round_index} came again with another adapter", rule="rounds"
            )
        last = max((step.position for step in steps.values()), default=-1)
        if known is None and position(request.kind, plan.round_index) < last:
            raise PolicyRefusedError(
                f"rounds: {request.kind} of round {plan.round_index} came after a later step", rule="rounds"
            )

    def _check_bytes(self, run: RunManifest, num_bytes: int) -> None:
        """The policy's quotas, and what the manifest declared."""
        limits, whole = self.policy.egress, self.history.run(run.sha256).bytes_out + num_bytes
        largest = min(limits.max_bytes_per_message, run.plan.egress.bytes_per_message)
        for rule, value, limit in (
            ("egress.max_bytes_per_message", num_bytes, largest),
            ("egress.max_bytes_per_run", whole, limits.max_bytes_per_run),
        ):
            if value > limit:
                raise PolicyRefusedError(f"{rule}: {value} bytes are above {limit}", rule=rule)

    def _facts(self, run: RunManifest, request: Frame, reply: Frame, data: bytes) -> dict[str, Any]:
        """What the log says of an answer that leaves.

        Raises:
            PolicyRefusedError: The step was answered before, and this answer is another one.
        """
        place = (request.kind, int(reply.head.get("round_index", 0)))
        content = _content_sha256(reply)
        known = self.history.run(run.sha256).steps.get(place)
        if known is not None and known.content_sha256 != content:
            raise PolicyRefusedError(
                f"rounds: round {place[1]} was answered before, and the answer would not be the same bytes again",
                rule="rounds",
            )
        return {
            "run": run.sha256,
            "step": place[0],
            "round_index": place[1],
            "num_bytes": len(data),
            "sha256": wire.digest_of(data),
            "request_sha256": broadcast.adapter_sha256(request),
            "content_sha256": content,
        }


def check_serial(signed_policy: SignedPolicy, history: History) -> None:
    """A policy that was in force is never followed by an older one, nor by another one of the same number.

    Raises:
        PolicyRefusedError: It would be.
    """
    serial, last = signed_policy.rules.serial, history.serial
    if serial < last or (serial == last and signed_policy.sha256 != history.policy_sha256):
        raise PolicyRefusedError(
            f"serial: the policy has serial {serial}, and another one with serial {last} was in force here; "
            f"raise it above {last} and sign the policy again",
            rule="serial",
        )


def _who(offer: Offer) -> dict[str, Any]:
    """Who offers a run."""
    return {} if offer.signature is None else {"signer": offer.signature.signer, "not_after": offer.signature.not_after}


def _rule(error: Exception) -> str:
    """The rule that refused; the error's class where it is a rule of the protocol."""
    if isinstance(error, PolicyRefusedError):
        return error.rule
    return RULES.get(type(error), code_of(error))


def _run_of(request: Frame | None) -> dict[str, str]:
    """The run that a refused request was about: by its manifest, or as it says."""
    if request is None:
        return {}
    if request.kind == "open":
        with suppress(SilotuneError):  # else it has no name that could be believed to be one
            return {"run": _sha256(request.body), "name": manifest.parse(bytes(request.body)).run.name}
        return {"run": _sha256(request.body)}
    named = request.head.get("run_sha256")
    return {"run": wire.shown(named)} if isinstance(named, str) else {}


def _content_sha256(reply: Frame) -> str:
    """Hash of an answer without its time, the log's head and the signature, which no two answers share."""
    head = {name: value for name, value in reply.head.items() if name not in ("seconds", *egress.AUDIT, *SIGNED)}
    return wire.digest(reply.with_head(head))


def _sha256(data: wire.Bytes) -> str:
    """Lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()
