"""A run against the site's policy: each refusal names its rule, by its dotted path in the policy file, and the values.

Closed world: a setting that no rule here knows is refused too, so a later version's settings need a rule first.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, Final

from pydantic import BaseModel

from client.ledger.budget import COUNTS, EVALUATE
from client.policy.file import FORBIDDEN, DatasetRules, Policy
from client.train import schedule
from common.accounting import DpEvent
from common.data import preference_rows
from common.errors import AccountingUnsupported, AuthError, PolicyRefusedError
from common.frame.records import OpenedHead, TensorSpec
from common.frame.wire import shown
from common.privacy import cost, site_level
from common.run import config, manifest, trainable
from common.run.catalogue import kinds
from common.run.catalogue.kinds import KINDS
from common.run.manifest import Offer, RunManifest
from common.run.schema import precisions
from common.run.schema.model import FACTORS
from common.run.schema.privacy import PrivacyConfig

# What judges each setting that shapes an update: the rule of the policy by its dotted path.
JUDGED: Final = {
    "adapter.kind": "adapter.kinds",
    "adapter.r": "lora.r",
    "adapter.alpha": "lora.alpha",
    "adapter.use_rslora": "lora.scale",
    "adapter.dropout": "lora.max_dropout",
    "adapter.targets": "lora.targets",
    "adapter.site_ranks": "lora.r",
    "adapter.num_virtual_tokens": "adapter.max_parameters",
    "training.objective.kind": "train.objectives",
    "training.objective.beta": "train.beta",
    "training.objective.label_smoothing": "train.max_label_smoothing",
    "training.objective.desirable_weight": "train.answer_weights",
    "training.objective.undesirable_weight": "train.answer_weights",
    "training.local_epochs": "train.min_local_steps",
    "training.local_steps": "train.min_local_steps",
    "training.batch_size": "train.min_batch_size",
    "training.learning_rate": "train.learning_rate",
    "training.schedule": "train.learning_rate",
    "training.final_rate_fraction": "train.learning_rate",
    "training.warmup_fraction": "train.max_warmup_fraction",
    "training.optimizer.kind": "train.optimizers",
    "training.optimizer.weight_decay": "train.max_pull",
    "training.optimizer.beta1": "train.adam_beta1",
    "training.optimizer.beta2": "train.adam_beta2",
    "training.optimizer.epsilon": "train.max_adam_epsilon",
    "training.optimizer.momentum": "train.max_momentum",
    "training.max_grad_norm": "train.min_grad_norm",
    "aggregation.method": "train.methods",
    "aggregation.proximal": "train.max_pull",
    "aggregation.residual_rank": "lora.residual_r",
    "aggregation.num_heads": "lora.r",
    "wire.max_update_mib": "egress.max_bytes_per_message",
}
_AFTER: Final = "the coordinator's arithmetic on updates that have left"
_LESS: Final = "sends less of the same update"
# Settings of the same sections that need no rule, and why.
HARMLESS: Final = {
    "adapter.target_r": "masks ranks of tensors that are judged by themselves",
    "training.micro_batch_size": "the same sum in smaller pieces",
    "training.micro_batch_tokens": "the same sum in smaller pieces",
    "training.gradient_checkpointing": "the same gradient in less memory",
    "training.objective.reference_point": "both are functions of the step's own rows",
    "aggregation.weighting": "the count of rows is judged among the figures that leave",
    "aggregation.max_weight_share": _AFTER,
    "aggregation.gap_warning": _AFTER,
    "aggregation.robust.rule": _AFTER,
    "aggregation.robust.num_bad_sites": _AFTER,
    "aggregation.max_update_norm": _AFTER,
    "aggregation.screening.action": _AFTER,
    "aggregation.screening.threshold": _AFTER,
    "aggregation.residual_max_lost": _AFTER,
    "aggregation.server_optimizer.kind": _AFTER,
    "aggregation.server_optimizer.learning_rate": _AFTER,
    "aggregation.server_optimizer.beta1": _AFTER,
    "aggregation.server_optimizer.beta2": _AFTER,
    "aggregation.server_optimizer.tau": _AFTER,
    "wire.dtype": _LESS,
    "wire.density": _LESS,
    "wire.error_feedback": "what is kept at the site was part of an update that could have left",
    "wire.down": "the adapter that comes is judged by itself, whatever it came as",
    "wire.down_density": "the adapter that comes is judged by itself, whatever it came as",
}
# All other settings that a rule judges or that were found harmless.
OTHERS: Final = {
    "": "version name seed polish",
    "model": "base revision sha256 quantization site_quantization double_quantization dtype chat_template",
    "data": "source partition num_sites dirichlet_alpha site_column unit_column instruction_column input_column "
    "output_column held_out_fraction same_text max_length_tokens too_long system_prompt",
    "federation": "num_rounds sites_per_round min_sites round_timeout_s join_timeout_s num_sites",
    "privacy": "mode epsilon dp_delta sampling_prob noise_multiplier clip_norm noise_at max_rows_per_unit clipping "
    "adaptive_clipping clip_quantile clip_learning_rate",
    "evaluation": "every_rounds sites_per_round server_data batch_size exact_match_rows max_new_tokens tasks "
    "tasks_every_rounds num_polish_stages",
    "gate": "rules evidence min_rows stop_after",
    "export": "formats gguf_type llama_cpp rows data_statement data_licence operator_key",
    "output": "folder keep_checkpoints example_prompts",
}
# All settings that a rule here judges, or that were found harmless, by their dotted keys.
KNOWN: Final = JUDGED.keys() | HARMLESS.keys() | {
    f"{section}.{key}".lstrip(".") for section, keys in OTHERS.items() for key in keys.split()
}  # fmt: skip
_FACTOR: Final = re.compile(r"(.+)\.(lora|residual)_(A|B|(?<=lora_)H)\.weight")


@dataclass(frozen=True)
class Usage:
    """What this site has done so far, from its audit log.

    Attributes:
        num_runs_today: Other runs that were opened in the last 24 hours.
        bytes_of_run: What has left in this run.
    """

    num_runs_today: int = 0
    bytes_of_run: int = 0


def check_signature(policy: Policy, offer: Offer, *, now: float, operators: Collection[str] = ()) -> None:
    """Act on what one of the federation's operators signed, and nothing else.

    Args:
        operators: Keys of the operators in the roster; empty: it names none, so the policy's list decides alone.

    Raises:
        PolicyRefusedError: Unsigned, altered, signed by somebody else or for others, or past its date.
    """
    try:
        made = manifest.check_signature(offer)
    except AuthError as error:
        raise PolicyRefusedError(str(error), rule="federation.operators") from error
    listed, stranger = policy.federation.operators, f"key {shown(made.signer, limit=16)} is no operator's"
    _require(not operators or made.signer in operators, "roster", stranger)
    _require(made.signer in (listed or operators), "federation.operators", stranger)
    _require(
        made.federation == policy.federation.id,
        "federation.id",
        f"the run is for '{shown(made.federation)}', this site is in '{policy.federation.id}'",
    )
    _require(now <= made.not_after, "federation.not_after", f"the offer ended at {made.not_after}, it is {now:.0f}")
    is_bounded = made.not_after - now <= manifest.MAX_OFFER_S
    days = manifest.MAX_OFFER_S // 86_400
    _require(is_bounded, "federation.not_after", f"the offer is for more than {days} days; ask for a new one")


def check(policy: Policy, run_manifest: RunManifest, usage: Usage, *, site: str = "") -> None:
    """Judge everything about a run that can be judged before a row is read.

    Args:
        site: Its name, by which a run may give it a precision of its own.

    Raises:
        PolicyRefusedError: Names the first rule that is broken.
    """
    # Over 60 lines, as it is a list: a line for each rule, in the order in which they are judged.
    run, judge = run_manifest.run, partial(_judge, policy)
    training, privacy, protection = run.training, run.privacy, policy.privacy
    unknown = sorted(set(leaves(run)) - KNOWN)
    _require(not unknown, "manifest", f"no rule judges {', '.join(unknown)}")
    base = next((base for base in policy.models.allow if base.sha256 == run_manifest.base_sha256), None)
    if base is None:
        digest = shown(run_manifest.base_sha256)
        raise PolicyRefusedError(f"models.allow: the base with hash {digest} is not listed", rule="models.allow")
    model = precisions.at_site(run.model, site)
    judge("models.allow.quantization", model.quantization, limit=base.quantization)
    judge("models.allow.chat_template", model.chat_template, limit=base.chat_template)
    _check_adapter(policy, run.adapter, run_manifest.tensor_specs)

    # An update must be the sum of many steps.
    judge("train.learning_rate", training.learning_rate)
    judge("train.optimizers", training.optimizer.kind)
    judge("train.objectives", training.objective.kind)
    judge("train.methods", run.aggregation.method)
    judge("train.min_batch_size", training.batch_size)
    if training.local_steps:
        _check_num_steps(policy, training, training.local_steps, num_rounds=run.federation.num_rounds)
    judge("train.max_warmup_fraction", training.warmup_fraction)
    judge("train.max_pull", (run.aggregation.proximal + training.optimizer.weight_decay) * training.learning_rate)
    if training.optimizer.kind == "adamw":
        judge("train.adam_beta1", training.optimizer.beta1)
        judge("train.adam_beta2", training.optimizer.beta2)
        judge("train.max_adam_epsilon", training.optimizer.epsilon)
    else:
        judge("train.max_momentum", training.optimizer.momentum)
    if training.max_grad_norm and privacy.mode != "unit":
        judge("train.min_grad_norm", training.max_grad_norm)
    if training.objective.kind != "sft":
        judge("train.beta", training.objective.beta)
    if training.objective.kind == "dpo":
        judge("train.max_label_smoothing", training.objective.label_smoothing)
    elif training.objective.kind == "kto":
        for weight in (training.objective.desirable_weight, training.objective.undesirable_weight):
            judge("train.answer_weights", weight)
    num_rounds, num_polished = run.federation.num_rounds, run.evaluation.num_polish_stages
    is_within = num_rounds + num_polished <= policy.train.max_rounds  # each is one more adapter that the site scores
    together = f"{num_rounds} rounds and {num_polished} adapters after polish are together above"
    _require(is_within, "train.max_rounds", f"{together} {policy.train.max_rounds}")
    judge("train.max_length_tokens", run.data.max_length_tokens)

    _require(
        protection.mode == "none" or privacy.mode != "none",
        "privacy.mode",
        f"differential privacy is required, the run has privacy.mode = '{privacy.mode}'",
    )
    if privacy.mode == "site":
        _require(
            protection.mode == "none" or privacy.noise_at in protection.site_level,
            "privacy.site_level",
            f"noise for whole sites, added at '{privacy.noise_at}', is no protection of a unit, and is not allowed in "
            "its place",
        )
    if privacy.mode != "none":
        judge("privacy.min_noise_multiplier", privacy.noise_multiplier)
        judge("privacy.max_clip_norm", privacy.clip_norm)
        judge("privacy.dp_delta", privacy.dp_delta)
        # Of the whole run at the site's own delta, counts and held-out figures included.
        released = beside_rounds(policy, privacy, num_evaluations=len(run.evaluated_rounds))
        try:
            planned = cost.epsilon(run, dp_delta=protection.dp_delta, beside=[*chain(*released.values())])
        except AccountingUnsupported as error:
            raise PolicyRefusedError(f"privacy.max_epsilon: {error}", rule="privacy.max_epsilon") from error
        judge("privacy.max_epsilon", planned)
    _require(protection.secagg == "none", "privacy.secagg", "secure aggregation is required, and this version has none")

    judge("cohort.min_sites", run.federation.min_sites)  # by the run file's own rules a round has at least as many
    if privacy.mode == "site":
        judge("cohort.min_sites", site_level.num_expected(run))
    prompt = run.data.system_prompt  # stands in every example, so it could ask for anything
    is_listed = prompt in policy.data.system_prompts
    _require(is_listed, "data.system_prompts", f"{len(prompt)} characters that are not listed")
    if run.evaluation.exact_match_rows:
        judge("evaluation.min_slice", run.evaluation.exact_match_rows)
    declared = run_manifest.plan.egress
    for kind, names in declared.metrics.items():
        for name in names:
            is_listed = name in policy.egress.metrics
            _require(is_listed, "egress.metrics", f"{kind} would report {name}, which is not listed")
    judge("egress.max_bytes_per_message", declared.bytes_per_message)
    judge("egress.max_bytes_per_run", max(run_manifest.plan.bytes_per_run, usage.bytes_of_run))
    judge("runs.max_per_day", usage.num_runs_today + 1)


def check_members(policy: Policy, num_sites: int) -> None:
    """No aggregate can come from more sites than the federation has.

    Raises:
        PolicyRefusedError: The roster has fewer sites than an aggregate must come from.
    """
    _judge(policy, "cohort.min_sites", num_sites)


def check_node(policy: Policy, data: config.NodeDataConfig) -> DatasetRules:
    """The site's own file reads only what the policy allows.

    Returns:
        The rules of the data set that it reads.

    Raises:
        PolicyRefusedError: Another file, or a column that is not listed.
    """
    dataset = next((rules for rules in policy.data.datasets.values() if rules.path == data.path), None)
    if dataset is None:
        raise PolicyRefusedError(f"data.datasets: {data.path} is not listed", rule="data.datasets")
    if data.held_out_path:
        listed = [rules.path for rules in policy.data.datasets.values()]
        _require(data.held_out_path in listed, "data.datasets", f"{data.held_out_path} is not listed")
    named = {data.instruction_column, data.input_column, data.output_column, data.unit_column} - {""}
    extra = sorted(named - set(dataset.columns))
    _require(not extra, "data.datasets.columns", f"{', '.join(extra)} not listed for {data.path}")
    return dataset


def check_columns(dataset: DatasetRules, objective: str) -> None:
    """The columns that a run's objective reads beside those that the site's own file names.

    Raises:
        PolicyRefusedError: One of them is not listed.
    """
    extra = sorted({*preference_rows.COLUMNS.get(objective, ())} - set(dataset.columns))
    reads = f"training.objective.kind = '{objective}' reads {', '.join(extra)}, not listed for {dataset.path}"
    _require(not extra, "data.datasets.columns", reads)


def check_opened(
    policy: Policy, dataset: DatasetRules, head: OpenedHead, training: config.TrainingConfig, *, num_rounds: int
) -> None:
    """Counts that are known once the rows are read.

    Raises:
        PolicyRefusedError: Too few rows or steps to hide a row in, too many steps, a round at a rate near 0, or more
            rows than may be read.
    """
    num_rows = head.num_examples + head.num_held_out + (head.num_dropped or 0)
    _judge(policy, "train.min_records", head.num_examples)
    _check_num_steps(policy, training, head.num_steps, num_rounds=num_rounds)
    _judge(policy, "data.datasets.max_rows", num_rows, limit=dataset.max_rows)


def check_message_size(run_manifest: RunManifest, *, max_mib: int) -> None:
    """Refuse a run whose adapter could come in a larger message than this site takes, before anything is trained.

    Raises:
        PolicyRefusedError: It could.
    """
    size_mib = math.ceil(run_manifest.plan.request_bytes / (1 << 20))
    if size_mib > max_mib:
        raise PolicyRefusedError(
            f"agent.max_message_mib: a request that brings this run's adapter whole has up to {size_mib} MiB, and this "
            f"site takes {max_mib}; raise it in the site's own file, or ask for a run of a lower adapter.r",
            rule="agent.max_message_mib",
        )


def leaves(table: BaseModel, path: str = "") -> Iterator[str]:
    """The dotted keys of a run file's settings."""
    for name in type(table).model_fields:
        key, value = f"{path}.{name}".lstrip("."), getattr(table, name)
        yield from leaves(value, key) if isinstance(value, BaseModel) else (key,)


def is_covered(rules: Policy, privacy: PrivacyConfig) -> bool:
    """Whether a policy demands that counts and figures of a run are covered: each unit is promised something."""
    return rules.privacy.mode == "required" and privacy.mode == "unit"


def beside_rounds(rules: Policy, privacy: PrivacyConfig, *, num_evaluations: int) -> dict[str, list[DpEvent]]:
    """What a run costs a unit beside its rounds: purpose to the steps of each release.

    Example:
        A run of 4 rounds that is evaluated after each has 5 evaluations.
    """
    if not is_covered(rules, privacy):
        return {}
    counts = [DpEvent(1.0, rules.privacy.count_noise, 1)]
    noise_multiplier = rules.evaluation.noise_multiplier
    evaluations = [DpEvent(1.0, noise_multiplier, 1)] * num_evaluations if noise_multiplier else []
    return {COUNTS: counts, EVALUATE: evaluations}


def _check_adapter(policy: Policy, adapter: config.AdapterConfig, specs: Sequence[TensorSpec]) -> None:
    """Judge the tensors themselves, whatever the run's settings call them."""
    judge = partial(_judge, policy)
    judge("adapter.kinds", adapter.kind)
    _require(bool(specs), "lora.targets", "the run trains nothing")
    for spec in specs:
        _check_tensor(policy, spec, kind=adapter.kind)
    if adapter.kind != "lora":
        judge("adapter.max_parameters", trainable.num_values(specs))
    if isinstance(adapter, FACTORS):
        for rank in (adapter.r, *adapter.lower_ranks.values()):
            judge("lora.r", rank)
        judge("lora.alpha", adapter.alpha)
        judge("lora.scale", adapter.scale)
        judge("lora.max_dropout", adapter.dropout)


def _check_tensor(policy: Policy, spec: TensorSpec, *, kind: str) -> None:
    """A factor or core of LoRA or of a side adapter, or a tensor of another kind, on a layer that may be trained."""
    name, rank, is_side, is_norm = shown(spec.name, limit=200), 0, False, False
    if kind == "lora":
        match = _FACTOR.fullmatch(spec.name)
        module, side, factor = match.groups() if match else ("", "", "")
        _require(bool(module), "lora.targets", f"{name} is no factor")
        is_side = side == "residual"
        rank = spec.shape[-1 if factor == "B" else 0] if len(spec.shape) == 2 else 0
    else:
        _require(kinds.belongs(kind, spec.name), "adapter.kinds", f"{name} is no tensor of kind '{kind}'")
        layers, module = KINDS[kind].layers, kinds.module_of(spec.name)
        if layers == "input":
            return
        is_norm = layers in ("norms", "both") and module.endswith("norm") and len(spec.shape) == 1
    parts = module.split(".")
    is_allowed = (is_norm or parts[-1] in policy.lora.targets) and not set(parts) & set(FORBIDDEN)
    _require(is_allowed, "lora.targets", f"{shown(module, limit=200)} is not one of them")
    if kind == "lora":
        rule, limits = ("lora.residual_r", (1, policy.lora.residual_r)) if is_side else ("lora.r", policy.lora.r)
        _judge(policy, rule, rank, limit=limits)


def _check_num_steps(policy: Policy, training: config.TrainingConfig, num_steps: int, *, num_rounds: int) -> None:
    """How many steps a round has, and the rate at which it makes them."""
    _judge(policy, "train.min_local_steps", num_steps)
    _judge(policy, "train.max_local_steps", num_steps)
    lowest, _ = policy.train.learning_rate
    for index in sorted({0, num_rounds - 1}):  # the rate rises, then falls: one of these rounds has the lowest mean
        rate = schedule.mean_rate(index, num_rounds=num_rounds, num_steps=num_steps, training=training)
        slow = (
            f"round {index + 1} of {num_rounds} trains at a mean rate of {rate:.2g}, which is below {lowest:g}; raise "
            "training.final_rate_fraction, or set training.schedule = 'constant'"
        )
        _require(rate >= lowest, "train.learning_rate", slow)


def _judge(policy: Policy, rule: str, value: float | str, *, limit: Any = None) -> None:
    """Hold a value against a rule: a list of words, a range, a floor (`min_`) or a ceiling; NaN passes none.

    `limit` is what the policy has under the rule's dotted path, unless it is given.
    """
    limit = attrgetter(rule)(policy) if limit is None else limit
    if isinstance(value, str):
        _require(value in limit, rule, f"'{value}' is not one of {', '.join(limit)}")
    elif isinstance(limit, tuple):
        _require(limit[0] <= value <= limit[1], rule, f"{value:g} is not from {limit[0]:g} to {limit[1]:g}")
    elif rule.rpartition(".")[2].startswith("min_"):
        _require(value >= limit, rule, f"{value:g} is below {limit:g}")
    else:
        _require(value <= limit, rule, f"{value:g} is above {limit:g}")


def _require(is_allowed: bool, rule: str, message: str) -> None:
    if not is_allowed:
        raise PolicyRefusedError(f"{rule}: {message}", rule=rule)
