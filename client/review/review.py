"""What a site is asked to say yes to, as a page for people and as a record for programs."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.memory import consent, site_ledger
from client.memory.history import AUDIT_FILE, History, Refusal, RunHistory
from client.policy import file
from client.policy import rules as policy
from client.policy.file import Policy
from client.train import schedule
from common.data import preference_rows
from common.errors import AccountingUnsupported, ConfigError, DataError, LedgerError, PolicyRefusedError
from common.frame import site_states
from common.frame.records import TensorSpec
from common.frame.wire import shown
from common.privacy import cost as privacy_cost
from common.run import config, egress, guarding, manifest, trainable
from common.run.catalogue.kinds import KINDS
from common.run.manifest import Offer, RunManifest
from common.run.schema import precisions
from common.trust import identity
from common.trust.audit_log import AuditLog

NO_EPSILON: Final = (
    "none: updates leave without differential privacy and without secure aggregation; the coordinator sees this site's "
    "own update, from which text of the rows can be rebuilt"
)


QUANTISED: Final = {
    "none": "not quantised; the hash of its files says all",
    "int8": "to 8 bits, whose codes differ between processors; only its files are hashed",
}

EPOCH_STEPS: Final = 100  # what a round is taken to have where epochs decide, to show its mean rate

OBJECTIVES: Final = {
    "sft": "to write the answers in the rows (sft)",
    "dpo": "to prefer the chosen answer of each pair to the rejected one (dpo). Both are read; of neither does text "
    "leave, but the update holds what this site's people prefer, and a pair is protected as its patient's row is",
    "kto": "to write answers that were called good rather than those called bad (kto). Answers and labels are read; "
    "neither leaves, but the update holds what this site's people think of answers",
}


@dataclass(frozen=True)
class Desk:
    """What a person decides with: the site's own file, policy, identity key, log and what the log says."""

    node: config.NodeConfig
    policy: Policy
    key: Ed25519PrivateKey = field(repr=False)
    log: AuditLog
    history: History
    policy_sha256: str

    @property
    def folder(self) -> Path:
        """Of offers and log."""
        return Path(self.node.agent.log_folder)


@dataclass(frozen=True)
class Review:
    """One run, as its reviewer sees it.

    Attributes:
        facts: Question to answer, in the order of the page.
        metrics: Kind of reply to the names of its figures.
        tensors: Tensor name to shape.
        changes: Setting to its value in the last approved run and in this one; empty without such a run.
        compared_with: Hash of that run; empty if there is none.
        refusal: Why the policy refuses the run; empty if it does not.
        is_open: Whether somebody can approve it; not a run that was refused when it was offered.
    """

    run: str
    facts: dict[str, str]
    metrics: dict[str, list[str]]
    tensors: dict[str, list[int]]
    changes: dict[str, list[str]]
    compared_with: str
    refusal: str
    is_open: bool


def open_desk(node: config.NodeConfig) -> Desk:
    """Open log and policy of a site.

    Raises:
        ConfigError: The site has no policy, or a file of it cannot be read.
        PolicyRefusedError: The policy was edited and not signed again.
        AuditError: The log is not whole.
    """
    if not node.agent.policy:
        raise ConfigError("this site has no policy, so nothing waits for approval; set agent.policy in its file")
    signed = file.load(Path(node.agent.policy), signer=node.agent.policy_signer)
    key = identity.load(Path(node.agent.identity_key))
    history = History()
    log = AuditLog(Path(node.agent.log_folder) / AUDIT_FILE, key=key, on_entry=history.take)
    return Desk(node, signed.rules, key, log, history, signed.sha256)


def runs(desk: Desk) -> list[dict[str, Any]]:
    """All runs that this site was offered, the newest first; those too that a rule of its policy refused."""
    refused = desk.history.refusals
    table = [
        {
            "run": sha256,
            "name": run.name,
            **_stands(run, refused.get(sha256), is_asking=desk.policy.runs.approval != "none"),
            "num_rounds_answered": sum(step == "train" for step, _ in run.steps),
            "bytes_out": run.bytes_out,
            "offered_at": run.offered_at,
            "answered_at": run.left_at,
        }
        for sha256, run in desk.history.runs.items()
    ]
    table += [
        {
            "run": sha256,
            "name": refusal.name,
            **_stands(RunHistory(), refusal, is_asking=True),
            "num_rounds_answered": 0,
            "bytes_out": 0,
            "offered_at": refusal.refused_at,
            "answered_at": None,
        }
        for sha256, refusal in refused.items()
        if sha256 not in desk.history.runs
    ]
    return sorted(table, key=lambda run: float(str(run["offered_at"])), reverse=True)


def _stands(run: RunHistory, refusal: Refusal | None, *, is_asking: bool) -> dict[str, str]:
    """A run's state at this site: what somebody decided, what refused it, or how far it has got."""
    state, rule, reference = site_states.WAITS if is_asking else site_states.OFFERED, "", ""
    if run.decision == "denied":
        state = site_states.DENIED
    elif refusal:
        state, rule, reference = site_states.of_code(refusal.code), refusal.rule, refusal.reference
    elif run.is_finished:
        state = site_states.FINISHED
    elif run.steps:
        state = site_states.TRAINING
    elif run.decision or run.opened_at is not None:
        state = site_states.APPROVED
    return {"state": state, "rule": rule, "reference": reference}


def review(desk: Desk, name: str) -> Review:
    """The page of one run; of one that the policy refused, too.

    Raises:
        DataError: No such run, or its offer is not kept.
    """
    sha256 = consent.find(desk.history, name, with_refused=True)
    if sha256 in desk.history.runs:
        offer = consent.load(desk.folder, sha256)
    else:
        refusal = desk.history.refusals[sha256]
        try:
            offer = consent.load(desk.folder / consent.REFUSED, sha256)
        except DataError as error:
            raise DataError(
                f"run {sha256[:12]} was refused by {refusal.rule} before its offer was kept; agent.jsonl has the "
                f"reason under reference {refusal.reference}"
            ) from error
    run = manifest.parse(offer.manifest)
    before = next((old for old in reversed(desk.history.approved) if old != sha256), "")
    changes = consent.differences(manifest.parse(consent.load(desk.folder, before).manifest), run) if before else {}
    refused_by = ""
    try:
        usage = desk.history.usage(run.sha256, now=time.time())
        policy.check(desk.policy, run, usage, site=desk.node.site.name)
        policy.check_message_size(run, max_mib=desk.node.agent.max_message_mib)
    except PolicyRefusedError as error:
        refused_by = str(error)
    leaving = run.plan.for_site(desk.node.site.name).tensors.leaving
    return Review(
        run=sha256,
        facts={**_facts_of_updates(desk, offer, run, leaving), **_facts_of_training(desk, run)},
        metrics={kind: sorted(names) for kind, names in run.plan.egress.metrics.items()},
        tensors={shown(spec.name, limit=200): list(spec.shape) for spec in leaving},
        changes={key: [_value(old), _value(new)] for key, (old, new) in changes.items()},
        compared_with=before,
        refusal=refused_by,
        is_open=sha256 in desk.history.runs,
    )


def decide(desk: Desk, name: str, *, is_approved: bool, by: str) -> dict[str, str]:
    """Approve or deny a run; it counts from the agent's next answer on.

    Raises:
        DataError: No such run, or its offer was removed.
    """
    sha256 = consent.find(desk.history, name)
    if is_approved:
        consent.load(desk.folder, sha256)  # nobody approves what nobody could have read
    consent.decide(desk.log, sha256, is_approved=is_approved, by=by)
    return {"run": sha256, "name": desk.history.run(sha256).name, "state": desk.history.run(sha256).decision}


def render(page: Review) -> RenderableType:
    """A review for a terminal."""
    facts = Table("question", "answer", title=f"run {page.run[:12]}", show_lines=True)
    for question, answer in page.facts.items():
        facts.add_row(question, Text(answer))
    figures = Table("reply", "figures", title="figures that leave")
    for kind, names in page.metrics.items():
        figures.add_row(kind, ", ".join(names))
    # Tensors of one shape and layer kind together.
    tensors = Table("tensor", "shape", "number", title="tensors that leave")
    groups = Counter(
        (".".join("*" if part.isdigit() else part for part in name.split(".")), " x ".join(map(str, shape)))
        for name, shape in page.tensors.items()
    )
    for (name, shape_text), count in groups.items():
        tensors.add_row(Text(name), shape_text, str(count))
    changes: RenderableType
    if not page.compared_with:
        changes = Text("No other run was approved here before, so there is nothing to compare with.")
    elif not page.changes:
        changes = Text(f"The same as run {page.compared_with[:12]}, which was approved.")
    else:
        title = f"differs from run {page.compared_with[:12]}"
        changes = table = Table("setting", "approved before", "this run", title=title)
        for key, (old, new) in page.changes.items():
            table.add_row(key, Text(old), Text(new))
    parts: list[RenderableType] = [facts, figures, tensors, changes]
    if page.refusal:
        parts.append(Text(f"This site's policy refuses the run, whatever you say: {page.refusal}", style="bold"))
    return Group(*parts)


def render_runs(table: Sequence[dict[str, Any]], *, now: float) -> RenderableType:
    """All runs for a terminal; `now` in Unix seconds.

    Sites do not learn that a coordinator ended a run early, so of an unfinished run the last answer's age is shown.
    """
    shown_runs = Table("run", "name", "state", "rounds answered", "bytes out", "offered (UTC)", title="runs")
    for run in table:
        offered = time.strftime("%Y-%m-%d %H:%M", time.gmtime(run["offered_at"]))
        numbers = (f"{run['num_rounds_answered']}", f"{run['bytes_out']:,}", offered)
        state = f"{run['state']}: {run['rule']}, reference {run['reference']}" if run["rule"] else run["state"]
        if run["state"] == site_states.TRAINING:
            age_s = max(now - run["answered_at"], 0)
            spans = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
            unit, length_s = next(((unit, span) for unit, span in spans if age_s >= span), ("s", 1))
            state += f", last answer {age_s // length_s:.0f} {unit} ago"
        shown_runs.add_row(run["run"][:12], Text(run["name"]), Text(state), *numbers)
    return shown_runs


def _facts_of_updates(desk: Desk, offer: Offer, run: RunManifest, leaving: Sequence[TensorSpec]) -> dict[str, str]:
    """Who asks, what leaves, and what protects it."""
    settings, declared, made = run.run, run.plan.egress, offer.signature
    num_rounds = settings.federation.num_rounds
    after_rounds, num_polished = "", settings.evaluation.num_polish_stages
    if num_polished:
        figure_bytes = num_polished * egress.HEAD_BYTES
        after_rounds = f", then at most {figure_bytes:,} for figures of {num_polished} polished adapters"
    rules, num_asked = desk.policy, len(settings.evaluated_rounds)
    if rules.privacy.mode == "none":
        figures = f"as they are, rounded, no noise: counts once, held-out figures {num_asked} times"
    elif not policy.is_covered(rules, settings.privacy):
        figures = "counts of rows as they are; no held-out figure leaves"
    else:
        figures = f"numbers of units once, with noise {rules.privacy.count_noise:g}; "
        if rules.evaluation.noise_multiplier:
            figures += f"held-out figures {num_asked} times, each with noise {rules.evaluation.noise_multiplier:g}"
        else:
            figures += "no held-out figure leaves"
        figures += ". Part of the epsilon above"
    num_values = sum(math.prod(spec.shape) for spec in leaving)
    return {
        "name": settings.name,
        "offered by": f"key {made.signer} of {made.federation}" if made else "nobody signed it",
        "offer ends (UTC)": time.strftime("%Y-%m-%d %H:%M", time.gmtime(made.not_after)) if made else "-",
        "what leaves": f"{len(leaving)} tensors with {num_values:,} values as {declared.dtype}, and the "
        "figures below, rounded; no row, no text",
        "bytes that leave": f"at most {declared.bytes_per_round:,} a round, "
        f"{declared.bytes_per_round * num_rounds:,} in {num_rounds} rounds{after_rounds}",
        "largest message that comes": f"{run.plan.request_bytes:,} bytes, the adapter whole; this site takes "
        f"{desk.node.agent.max_message_mib << 20:,}",
        "epsilon": _epsilon(desk, run),
        "counts and held-out figures": figures,
    }


def _facts_of_training(desk: Desk, run: RunManifest) -> dict[str, str]:
    """What is read and how it is trained on."""
    settings, data, site = run.run, desk.node.data, desk.node.site.name
    training, federation = settings.training, settings.federation
    named = (data.instruction_column, data.input_column, data.output_column)
    columns = ", ".join(preference_rows.COLUMNS.get(training.objective.kind, tuple(filter(None, named))))
    if data.unit_column:
        columns += f"; {data.unit_column} only to keep a unit's rows together"
    base = next((base.name for base in desk.policy.models.allow if base.sha256 == run.base_sha256), "not listed")
    precision, codes_sha256 = precisions.of_site(settings.model, site), run.codes_at(site)
    quantised = f"4-bit codes {codes_sha256}" if codes_sha256 else QUANTISED[precision]
    if others := [name for name in precisions.used(settings.model) if name != precision]:
        quantised += f"; other sites train beside it as {' or '.join(others)}"
    length = f"{training.local_epochs:g} epochs each"
    if training.local_steps:
        length = f"{training.local_steps} steps each"
    # The mean rate of a round is what the policy's floor is about; a round counted in epochs has more or fewer steps
    # than are assumed here, which moves these figures a little.
    first, last = (
        schedule.mean_rate(
            index, num_rounds=federation.num_rounds, num_steps=training.local_steps or EPOCH_STEPS, training=training
        )
        for index in (0, federation.num_rounds - 1)
    )
    # What a manifest hides or says elsewhere is left out.
    aside = ("version", "name", "model.base", "model.sha256", "data.source", "data.system_prompt")
    changed = config.changed(manifest.public_part(settings)).items()
    not_default = [f"{key} = {shown(str(value), limit=200)}" for key, value in changed if key not in aside]
    serial, last_serial = desk.policy.serial, desk.history.serial
    in_force = f"serial {serial}"
    if last_serial >= 0 and desk.history.policy_sha256 != desk.policy_sha256:
        in_force += f", by which this page judges; the agent began with serial {last_serial}: restart it"
    kind, rank = settings.adapter.kind, settings.aggregation.residual_rank
    if kind == "lora":
        sends = trainable.in_words(run.plan.egress.factors)
        if settings.adapter.kind == "lora" and settings.adapter.site_ranks:
            sends += f", at rank {run.plan.rank_of(site)} of {settings.adapter.r}"
        if kept := run.plan.tensors.kept:
            sends += f"; {len(kept)} more tensors are trained and stay here"
        if rank:
            sends += f", beside a frozen adapter of rank {rank} that the coordinator fills"
    else:
        sends = f"all tensors of kind {kind}: {KINDS[kind].rule}"
    return {
        "rows that are read": f"all of {data.path}" + (f" and {data.held_out_path}" if data.held_out_path else ""),
        "columns that are read": columns,
        "what is learnt": OBJECTIVES[training.objective.kind],
        "base": f"{base}, {run.base_sha256}",
        "base as quantised": quantised,
        "training": f"{federation.num_rounds} rounds, {length}, batches of {training.batch_size}, learning rate "
        f"{training.learning_rate:g}, at least {federation.min_sites} sites",
        "learning rate by round": f"{training.schedule}: a mean of {first:.2g} in the first round and of {last:.2g} in "
        "the last",
        "settings that differ from their defaults": "\n".join(not_default) or "none",
        "this site's policy": in_force,
        "aggregation": f"{settings.aggregation.method}; a site trains and sends {sends}",
        "who sees this update": guarding.in_words(settings.aggregation),
        "texts of the coordinator": settings.data.system_prompt or "none",
        "date in its prompts": run.date or "none",
    }


def _epsilon(desk: Desk, run: RunManifest) -> str:
    """What the run would cost, and what the ledger has left."""
    settings, rules = run.run, desk.policy
    if settings.privacy.mode == "none":
        return NO_EPSILON
    dp_delta = rules.privacy.dp_delta
    if settings.privacy.mode == "site":  # no ledger holds it, as it is no promise to a unit
        try:
            whole = _planned(privacy_cost.milestones(settings))
        except AccountingUnsupported as error:
            whole = f"not known: {error}"
        return f"none for a unit; {whole} at delta {settings.privacy.dp_delta:g} for {privacy_cost.wording(settings)}"
    try:
        num_evaluations = len(settings.evaluated_rounds)
        released = policy.beside_rounds(rules, settings.privacy, num_evaluations=num_evaluations)
        plan = privacy_cost.milestones(settings, dp_delta=dp_delta, beside=[*chain(*released.values())])
        budget = site_ledger.open_site(desk.node, rules=rules, key=desk.key, history=desk.history).budget()
        left = f"spent {budget.spent():.3f}, left {budget.remaining:.3f} of {rules.privacy.max_epsilon:g}"
    except (AccountingUnsupported, ConfigError, LedgerError) as error:
        return f"not known: {error}"
    return f"{_planned(plan)} at delta {dp_delta:g}, by itself; this data set: {left}"


def _planned(plan: Mapping[int, float]) -> str:
    """Epsilon of the whole run, and the curve to it, which is steep at first."""
    *before, whole = plan.values()
    shown_rounds = ", ".join(f"{number}: {value:.3f}" for number, value in zip(plan, before, strict=False))
    return f"{whole:.3f} for the whole run" + (f" (after round {shown_rounds})" if before else "")


def _value(value: Any) -> str:
    """A setting's value; the tensors only by their number."""
    return f"{len(value)} tensors" if isinstance(value, tuple) else shown(value, limit=200)
