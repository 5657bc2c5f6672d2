"""What a site is asked to say yes to, as a page for people and as a record for programs."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from common import site_states
from common.adapter import ranks
from common.data import preference_rows
from common.errors import AccountingUnsupported, ConfigError, LedgerError, PolicyRefusedError
from common.frame.records import TensorSpec
from common.frame.wire import shown
from common.privacy import plan as privacy_plan
from common.run import config, egress, guarding, manifest, trainable
from common.run.catalogue.kinds import KINDS
from common.run.manifest import Offer, RunManifest
from common.run.schema import precisions
from common.trust import identity
from common.trust.journal import AuditLog

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
        run: Hash of the manifest.
        facts: Question to answer, in the order of the page.
        metrics: Kind of reply to the names of its figures.
        tensors: Tensor name to shape.
        changes: Setting to its value in the last approved run and in this one; empty without such a run.
        compared_with: Hash of that run; empty if there is none.
        refusal: Why the policy refuses the run; empty if it does not.
    """

    run: str
    facts: dict[str, str]
    metrics: dict[str, list[str]]
    tensors: dict[str, list[int]]
    changes: dict[str, list[str]]
    compared_with: str
    refusal: str

    def as_dict(self) -> dict[str, Any]:
        """Give the review as JSON types."""
        return asdict(self)


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
    """All runs that this site was offered, the newest first; those too that a rule of its policy turned away."""
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
            "name": one.name,
            **_stands(RunHistory(), one, is_asking=True),
            "num_rounds_answered": 0,
            "bytes_out": 0,
            "offered_at": one.refused_at,
            "answered_at": None,
        }
        for sha256, one in refused.items()
        if sha256 not in desk.history.runs
    ]
    return sorted(table, key=lambda run: float(str(run["offered_at"])), reverse=True)


def _stands(run: RunHistory, refusal: Refusal | None, *, is_asking: bool) -> dict[str, str]:
    """How this site stands to a run: what somebody decided, what turned it away, or how far it has got."""
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
    """The page of one run.

    Raises:
        DataError: No such run, or its offer was removed.
    """
    sha256 = consent.find(desk.history, name)
    offer = consent.load(desk.folder, sha256)
    run = manifest.parse(offer.manifest)
    before = next((old for old in reversed(desk.history.approved) if old != sha256), "")
    changes = consent.differences(manifest.parse(consent.load(desk.folder, before).manifest), run) if before else {}
    return Review(
        run=sha256,
        facts=_facts(desk, offer, run),
        metrics={kind: sorted(own) for kind, own in run.egress.metrics.items()},
        tensors={shown(spec.name, limit=200): list(spec.shape) for spec in _leaving(run, desk.node.site.name)},
        changes={key: [_value(old), _value(new)] for key, (old, new) in changes.items()},
        compared_with=before,
        refusal=_refusal(desk, run),
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
    parts: list[RenderableType] = [facts, _figures(page), _shapes(page.tensors), _changes(page)]
    if page.refusal:
        parts.append(Text(f"This site's policy refuses the run, whatever you say: {page.refusal}", style="bold"))
    return Group(*parts)


def render_runs(table: Sequence[dict[str, Any]], *, now: float) -> RenderableType:
    """All runs for a terminal; `now` in Unix seconds.

    A coordinator that ends a run early tells no site, so of one that is not finished the last answer's age is shown.
    """
    shown_runs = Table("run", "name", "state", "rounds answered", "bytes out", "offered (UTC)", title="runs")
    for run in table:
        offered = time.strftime("%Y-%m-%d %H:%M", time.gmtime(run["offered_at"]))
        numbers = (f"{run['num_rounds_answered']}", f"{run['bytes_out']:,}", offered)
        state = f"{run['state']}: {run['rule']}, reference {run['reference']}" if run["rule"] else run["state"]
        if run["state"] == site_states.TRAINING:
            state += f", last answer {_age(now - run['answered_at'])} ago"
        shown_runs.add_row(run["run"][:12], Text(run["name"]), Text(state), *numbers)
    return shown_runs


def _age(seconds: float) -> str:
    """A span of time in its largest whole unit.

    Example:
        >>> _age(59), _age(3 * 3600 + 120), _age(200_000)
        ('59 s', '3 h', '2 d')
    """
    for name, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds // length_s:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def _facts(desk: Desk, offer: Offer, run: RunManifest) -> dict[str, str]:
    """Questions and answers."""
    settings, declared, made = run.run, run.egress, offer.signature
    num_rounds, data = settings.federation.num_rounds, desk.node.data
    named = (data.instruction_column, data.input_column, data.output_column)
    columns = ", ".join(preference_rows.COLUMNS.get(settings.training.objective, tuple(filter(None, named))))
    unit = f"; {data.unit_column} only to keep a unit's rows together" if data.unit_column else ""
    base = next((base.name for base in desk.policy.models.allow if base.sha256 == run.base_sha256), "not listed")
    leaving = _leaving(run, desk.node.site.name)
    num_values = sum(math.prod(spec.shape) for spec in leaving)
    return {
        "name": settings.name,
        "offered by": f"key {made.signer} of {made.federation}" if made else "nobody signed it",
        "offer ends (UTC)": time.strftime("%Y-%m-%d %H:%M", time.gmtime(made.not_after)) if made else "-",
        "what leaves": f"{len(leaving)} tensors with {num_values:,} values as {declared.dtype}, and the "
        "figures below, rounded; no row, no text",
        "bytes that leave": f"at most {declared.bytes_per_round:,} a round, "
        f"{declared.bytes_per_round * num_rounds:,} in {num_rounds} rounds{_after_rounds(settings)}",
        "largest message that comes": f"{run.request_bytes:,} bytes, the adapter whole; this site takes "
        f"{desk.node.agent.max_message_mib << 20:,}",
        "epsilon": _epsilon(desk, run),
        "counts and held-out figures": _beside(desk, settings),
        "rows that are read": f"all of {data.path}" + (f" and {data.held_out_path}" if data.held_out_path else ""),
        "columns that are read": columns + unit,
        "what is learnt": OBJECTIVES[settings.training.objective],
        "base": f"{base}, {run.base_sha256}",
        "base as quantised": _quantised(run, desk.node.site.name),
        "training": f"{num_rounds} rounds, {_length(settings.training)}, batches of {settings.training.batch_size}, "
        f"learning rate {settings.training.learning_rate:g}, at least {settings.federation.min_sites} sites",
        "learning rate by round": _rates(run.run),
        "settings that differ from their defaults": _not_default(settings),
        "this site's policy": _in_force(desk),
        "aggregation": f"{settings.aggregation.method}; a site trains and sends {_factors(run, desk.node.site.name)}",
        "who sees this update": guarding.in_words(settings.aggregation),
        "texts of the coordinator": settings.data.system_prompt or "none",
        "date in its prompts": run.date or "none",
    }


def _in_force(desk: Desk) -> str:
    """Which policy the agent has begun with."""
    serial, last = desk.policy.serial, desk.history.serial
    if last < 0 or desk.history.policy_sha256 == desk.policy_sha256:
        return f"serial {serial}"
    return f"serial {serial}, by which this page judges; the agent began with serial {last}: restart it"


def _after_rounds(run: config.RunConfig) -> str:
    """What the site is asked after the last round."""
    count = run.evaluation.num_polish_stages
    return f", then at most {count * egress.HEAD_BYTES:,} for figures of {count} polished adapters" if count else ""


def _epsilon(desk: Desk, run: RunManifest) -> str:
    """What the run would cost, and what the ledger has left."""
    settings = run.run
    if not settings.privacy.is_private:
        return NO_EPSILON
    if settings.privacy.is_private_per_site:
        return _site_level(settings)
    dp_delta = desk.policy.privacy.dp_delta
    try:
        released = policy.beside_rounds(desk.policy, settings)
        plan = privacy_plan.milestones(
            settings, dp_delta=dp_delta, beside=[event for events in released.values() for event in events]
        )
        paid = site_ledger.open_site(desk.node, rules=desk.policy, key=desk.key, history=desk.history)
        left = f"spent {paid.spent():.3f}, left {paid.remaining:.3f} of {desk.policy.privacy.max_epsilon:g}"
    except (AccountingUnsupported, ConfigError, LedgerError) as error:
        return f"not known: {error}"
    return f"{_planned(plan)} at delta {dp_delta:g}, by itself; this data set: {left}"


def _beside(desk: Desk, run: config.RunConfig) -> str:
    """How much of the epsilon is not of rounds, or that nothing protects these figures."""
    rules, asked = desk.policy, len(run.evaluated_rounds)
    if rules.privacy.mode == "none":
        return f"as they are, rounded, no noise: counts once, held-out figures {asked} times"
    if not policy.is_covered(rules, run):
        return "counts of rows as they are; no held-out figure leaves"
    counts = f"numbers of units once, with noise {rules.privacy.count_noise:g}"
    if not rules.evaluation.noise_multiplier:
        return f"{counts}; no held-out figure leaves. Part of the epsilon above"
    told = f"held-out figures {asked} times, each with noise {rules.evaluation.noise_multiplier:g}"
    return f"{counts}; {told}. Part of the epsilon above"


def _planned(plan: Mapping[int, float]) -> str:
    """Epsilon of the whole run, and the curve to it, which is steep at first."""
    *before, whole = plan.values()
    shown_rounds = ", ".join(f"{number}: {value:.3f}" for number, value in zip(plan, before, strict=False))
    return f"{whole:.3f} for the whole run" + (f" (after round {shown_rounds})" if before else "")


def _site_level(settings: config.RunConfig) -> str:
    """What the run would cost a site as a whole; no ledger holds it, as it is no promise to a unit."""
    try:
        whole = _planned(privacy_plan.milestones(settings))
    except AccountingUnsupported as error:
        whole = f"not known: {error}"
    return f"none for a unit; {whole} at delta {settings.privacy.dp_delta:g} for {privacy_plan.wording(settings)}"


def _factors(run: RunManifest, site: str) -> str:
    """What the method lets a site train, and what it puts beside that."""
    kind, rank = run.run.adapter.kind, run.run.aggregation.residual_rank
    if kind != "lora":
        return f"all tensors of kind {kind}: {KINDS[kind].rule}"
    beside = f", beside a frozen adapter of rank {rank} that the coordinator fills" if rank else ""
    kept = trainable.kept_specs(run.run.aggregation.method, run.tensor_specs)
    own_rank = ranks.of_site(run.run.adapter, site)
    smaller = f", at rank {own_rank} of {run.run.adapter.r}" if run.run.adapter.site_ranks else ""
    own = f"{smaller}; {len(kept)} more tensors are trained and stay here" if kept else smaller
    return trainable.in_words(run.egress.factors) + own + beside


def _quantised(run: RunManifest, site: str) -> str:
    """The precision of the base at this site, and that others have another."""
    found = run.codes_at(site)
    told = f"4-bit codes {found}" if found else QUANTISED[precisions.of_site(run.run.model, site)]
    others = [name for name in precisions.used(run.run.model) if name != precisions.of_site(run.run.model, site)]
    return f"{told}; other sites train beside it as {' or '.join(others)}" if others else told


def _leaving(run: RunManifest, site: str) -> tuple[TensorSpec, ...]:
    """The tensors that the run's method lets a site send."""
    return trainable.leaving_specs(run.run.aggregation.method, ranks.specs_of(run.run.adapter, run.tensor_specs, site))


def _length(training: config.TrainingConfig) -> str:
    """How much a round trains."""
    return f"{training.local_steps} steps each" if training.local_steps else f"{training.local_epochs:g} epochs each"


def _rates(run: config.RunConfig) -> str:
    """Mean rate of the first and the last round, which the policy's floor is about.

    A site whose rounds are counted in epochs takes more steps than one, which moves these figures a little.
    """
    num_steps, num_rounds = run.training.local_steps or EPOCH_STEPS, run.federation.num_rounds
    first, last = (
        schedule.mean_rate(index, num_rounds=num_rounds, num_steps=num_steps, training=run.training)
        for index in (0, num_rounds - 1)
    )
    return f"{run.training.schedule}: a mean of {first:.2g} in the first round and of {last:.2g} in the last"


def _not_default(run: config.RunConfig) -> str:
    """Every setting that is not at its default, one a line; what a manifest hides or tells elsewhere is left out."""
    lines = [
        f"{key} = {shown(str(value), limit=200)}"
        for key, value in config.changed(manifest.public_part(run)).items()
        if key not in ("version", "name", "model.base", "model.sha256", "data.source", "data.system_prompt")
    ]
    return "\n".join(lines) or "none"


def _refusal(desk: Desk, run: RunManifest) -> str:
    """What policy and site's own file say."""
    try:
        usage = desk.history.usage(run.sha256, now=time.time())
        policy.check(desk.policy, run, usage, site=desk.node.site.name)
        policy.check_message_size(run, max_mib=desk.node.agent.max_message_mib)
    except PolicyRefusedError as error:
        return str(error)
    return ""


def _figures(page: Review) -> Table:
    """Figures that leave, by the reply that carries them."""
    table = Table("reply", "figures", title="figures that leave")
    for kind, names in page.metrics.items():
        table.add_row(kind, ", ".join(names))
    return table


def _shapes(tensors: dict[str, list[int]]) -> Table:
    """Tensors that leave, those of one shape and layer kind together."""
    table = Table("tensor", "shape", "number", title="tensors that leave")
    groups: dict[tuple[str, str], int] = {}
    for name, shape in tensors.items():
        kind = (".".join(part if not part.isdigit() else "*" for part in name.split(".")), " x ".join(map(str, shape)))
        groups[kind] = groups.get(kind, 0) + 1
    for (name, shape_text), count in groups.items():
        table.add_row(Text(name), shape_text, str(count))
    return table


def _changes(page: Review) -> RenderableType:
    """The difference to the last approved run."""
    if not page.compared_with:
        return Text("No other run was approved here before, so there is nothing to compare with.")
    if not page.changes:
        return Text(f"The same as run {page.compared_with[:12]}, which was approved.")
    table = Table("setting", "approved before", "this run", title=f"differs from run {page.compared_with[:12]}")
    for key, (old, new) in page.changes.items():
        table.add_row(key, Text(old), Text(new))
    return table


def _value(value: Any) -> str:
    """A setting's value; the tensors only by their number."""
    return f"{len(value)} tensors" if isinstance(value, tuple) else shown(value, limit=200)
