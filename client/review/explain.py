"""A site's policy in plain sentences: what may run, what must protect it, and what waits for a person."""

from collections.abc import Sequence
from typing import Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from client.policy.file import BaseRules, DatasetRules, Policy
from common.run.catalogue.kinds import KINDS

MAY_RUN: Final = "May run"
PROTECTED: Final = "Must protect it"
WAITS: Final = "Waits for approval"
MIB: Final = 1 << 20
_APPROVAL: Final = {
    "every_run": "Every run waits until somebody here approves it.",
    "changed_runs": "A run waits until somebody here approves it, unless one that differs in name and seed only was "
    "approved before.",
    "none": "Nothing waits: whatever is allowed above runs without anybody's approval.",
}


def explain(policy: Policy, *, reads_roster: bool = False) -> dict[str, list[str]]:
    """Say what a policy means.

    Args:
        policy: What the site's admin signed.
        reads_roster: Whether the site's own file names the federation's roster, which names operators.

    Returns:
        Heading to sentences, in the order in which they are read.
    """
    return {
        MAY_RUN: [
            _who(policy, reads_roster=reads_roster),
            *_models(policy),
            _training(policy),
            *_rows(policy),
            *_leaves(policy),
        ],
        PROTECTED: _protection(policy),
        WAITS: [_APPROVAL[policy.runs.approval], "A changed run is another run, and waits again."][
            : 1 if policy.runs.approval == "none" else 2
        ],
    }


def render(sentences: dict[str, list[str]]) -> list[RenderableType]:
    """Show a policy's sentences for a terminal."""
    shown: list[RenderableType] = []
    for heading, told in sentences.items():
        lines = Table.grid(padding=(0, 1))
        for sentence in told:
            lines.add_row("  -", Text(sentence))
        shown += [Text(f"\n{heading}", style="bold"), lines]
    return shown


def _who(policy: Policy, *, reads_roster: bool) -> str:
    """Whose runs."""
    keys = [key[:12] for key in policy.federation.operators]
    if not keys and reads_roster:
        return (
            f"Runs of federation {policy.federation.id} that one of the operators in its roster signed; at most "
            f"{policy.runs.max_per_day} a day."
        )
    if not keys:
        return f"No operator of {policy.federation.id} is listed, so no run can pass."
    signers = f"key {_list(keys)}" if len(keys) == 1 else f"one of the keys {_list(keys)}"
    return f"Runs of federation {policy.federation.id} that {signers} signed; at most {policy.runs.max_per_day} a day."


def _models(policy: Policy) -> list[str]:
    """On what base, and which parts."""
    if not policy.models.allow:
        return ["No base model is listed, so no run can pass."]
    trained = _list(policy.lora.targets) or "no layer, so no run can pass"
    low, high = policy.lora.r
    return [
        f"On these bases: {'; '.join(map(_base, policy.models.allow))}.",
        f"An adapter of rank {low} to {high} on {trained}. Embeddings and the output head are never trained.",
        *_other_kinds(policy),
    ]


def _other_kinds(policy: Policy) -> list[str]:
    """Adapters of other kinds than LoRA, if any."""
    others = [f"{name} ({KINDS[name].rule})" for name in policy.adapter.kinds if name != "lora"]
    return [f"Also of at most {policy.adapter.max_parameters:,} values: {'; '.join(others)}."] if others else []


def _base(base: BaseRules) -> str:
    """One base."""
    return f"{base.name} (files {base.sha256[:12]}; quantisation {' or '.join(base.quantization)})"


def _training(policy: Policy) -> str:
    """How much."""
    rules = policy.train
    low, high = rules.learning_rate
    return (
        f"{' or '.join(rules.optimizers)} at a rate of {low:g} to {high:g}, at least {rules.min_local_steps} steps a "
        f"round with {rules.min_batch_size} rows or more each, {rules.max_rounds} rounds and "
        f"{rules.max_length_tokens} tokens a row at most."
    )


def _rows(policy: Policy) -> list[str]:
    """What is read."""
    if not policy.data.datasets:
        return ["No file of rows is listed, so the agent does not start."]
    least = f"Fewer than {policy.train.min_records:,} training rows are never trained on."
    return [*(_dataset(rules) for rules in policy.data.datasets.values()), least]


def _dataset(rules: DatasetRules) -> str:
    """One file."""
    return f"{rules.path} may be read: {_list(rules.columns)}; at most {rules.max_rows:,} rows."


def _leaves(policy: Policy) -> list[str]:
    """What goes out."""
    egress, evaluation = policy.egress, policy.evaluation
    message, run = egress.max_bytes_per_message / MIB, egress.max_bytes_per_run / MIB
    return [
        f"At most {message:,.1f} MiB leave in a message and {run:,.1f} MiB in a run.",
        f"Beside the adapter these figures leave, rounded to {evaluation.round_metrics_to} digits and never of fewer "
        f"than {evaluation.min_slice} rows: {_list(sorted(egress.metrics)) or 'none'}. Answers never leave.",
    ]


def _protection(policy: Policy) -> list[str]:
    """What stands between an update and the rows."""
    rules = policy.privacy
    private = (
        f"Differential privacy is required: epsilon at most {rules.max_epsilon:g} at delta {rules.dp_delta:g}, noise "
        f"multiplier at least {rules.min_noise_multiplier:g}, clipping at {rules.max_clip_norm:g} or below."
        if rules.mode == "required"
        else "Differential privacy is not required: text of the rows can be rebuilt from an update without it."
    )
    secret = (
        "Secure aggregation is required: the coordinator sees sums only."
        if rules.secagg == "required"
        else "Secure aggregation is not required: the coordinator may see this site's own update."
    )
    return [private, secret, f"An aggregate comes from {policy.cohort.min_sites} sites or more."]


def _list(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names)
