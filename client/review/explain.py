"""A site's policy in plain sentences: what may run, what must protect it, and what waits for a person."""

from typing import Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from client.policy.file import Policy
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
        reads_roster: Whether the site's own file names the federation's roster, which names operators.

    Returns:
        Heading to sentences, in the order in which they are read.
    """
    # Over 60 lines, as it is one text, in the order of the policy.
    federation, train, egress, protection = policy.federation, policy.train, policy.egress, policy.privacy
    keys, a_day = [key[:12] for key in federation.operators], f"at most {policy.runs.max_per_day} a day"
    if not keys and reads_roster:
        may_run = [f"Runs of federation {federation.id} that one of the operators in its roster signed; {a_day}."]
    elif not keys:
        may_run = [f"No operator of {federation.id} is listed, so no run can pass."]
    else:
        signers = f"{'key' if len(keys) == 1 else 'one of the keys'} {', '.join(keys)}"
        may_run = [f"Runs of federation {federation.id} that {signers} signed; {a_day}."]
    if not policy.models.allow:
        may_run.append("No base model is listed, so no run can pass.")
    else:
        bases = "; ".join(
            f"{base.name} (files {base.sha256[:12]}; quantisation {' or '.join(base.quantization)})"
            for base in policy.models.allow
        )
        layers = ", ".join(policy.lora.targets) or "no layer, so no run can pass"
        may_run += [
            f"On these bases: {bases}.",
            f"An adapter of rank {policy.lora.r[0]} to {policy.lora.r[1]} on {layers}. Embeddings and the output head "
            "are never trained.",
        ]
        others = [f"{name} ({KINDS[name].rule})" for name in policy.adapter.kinds if name != "lora"]
        if others:
            may_run.append(f"Also of at most {policy.adapter.max_parameters:,} values: {'; '.join(others)}.")
    may_run.append(
        f"{' or '.join(train.optimizers)} at a rate of {train.learning_rate[0]:g} to {train.learning_rate[1]:g}, at "
        f"least {train.min_local_steps} steps a round with {train.min_batch_size} rows or more each, "
        f"{train.max_rounds} rounds and {train.max_length_tokens} tokens a row at most."
    )
    if policy.data.datasets:
        may_run += [
            f"{rules.path} may be read: {', '.join(rules.columns)}; at most {rules.max_rows:,} rows."
            for rules in policy.data.datasets.values()
        ]
        may_run.append(f"Fewer than {train.min_records:,} training rows are never trained on.")
    else:
        may_run.append("No file of rows is listed, so the agent does not start.")
    message_mib, run_mib = egress.max_bytes_per_message / MIB, egress.max_bytes_per_run / MIB
    may_run += [
        f"At most {message_mib:,.1f} MiB leave in a message and {run_mib:,.1f} MiB in a run.",
        f"Beside the adapter these figures leave, rounded to {policy.evaluation.round_metrics_to} digits and never of "
        f"fewer than {policy.evaluation.min_slice} rows: {', '.join(sorted(egress.metrics)) or 'none'}. Answers never "
        "leave.",
    ]
    private = (
        f"Differential privacy is required: epsilon at most {protection.max_epsilon:g} at delta "
        f"{protection.dp_delta:g}, noise multiplier at least {protection.min_noise_multiplier:g}, clipping at "
        f"{protection.max_clip_norm:g} or below."
        if protection.mode == "required"
        else "Differential privacy is not required: text of the rows can be rebuilt from an update without it."
    )
    secret = (
        "Secure aggregation is required: the coordinator sees sums only."
        if protection.secagg == "required"
        else "Secure aggregation is not required: the coordinator may see this site's own update."
    )
    approval = [_APPROVAL[policy.runs.approval]]
    if policy.runs.approval != "none":
        approval.append("A changed run is another run, and waits again.")
    cohort = f"An aggregate comes from {policy.cohort.min_sites} sites or more."
    return {MAY_RUN: may_run, PROTECTED: [private, secret, cohort], WAITS: approval}


def render(sentences: dict[str, list[str]]) -> list[RenderableType]:
    """Show a policy's sentences for a terminal."""
    shown: list[RenderableType] = []
    for heading, lines in sentences.items():
        grid = Table.grid(padding=(0, 1))
        for line in lines:
            grid.add_row("  -", Text(line))
        shown += [Text(f"\n{heading}", style="bold"), grid]
    return shown
