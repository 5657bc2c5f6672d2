"""A run against the site's policy: each refusal names its rule, by its dotted path in the policy file, and the values.

Closed world: a setting that no rule here knows is refused too, so a later version's settings need a rule first.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from client.ledger.budget import COUNTS, EVALUATE
from client.policy.file import FORBIDDEN, BaseRules, DatasetRules, Policy
from client.train import schedule
from common.accounting import Event
from common.data import preference_rows
from common.errors import AccountingUnsupported, AuthError, PolicyRefusedError
from common.frame.records import OpenedHead, TensorSpec
from common.frame.wire import shown
from common.privacy import plan, sites
from common.run import config, egress, manifest, trainable
from common.run.catalogue import kinds
from common.run.catalogue.kinds import KINDS
from common.run.manifest import Offer, RunManifest
from common.run.schema import precisions

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
    "adapter.block_size": "adapter.max_parameters",
    "adapter.num_frequencies": "adapter.max_parameters",
    "training.objective": "train.objectives",
    "training.beta": "train.beta",
    "training.label_smoothing": "train.max_label_smoothing",
    "training.desirable_weight": "train.answer_weights",
    "training.undesirable_weight": "train.answer_weights",
    "training.local_epochs": "train.min_local_steps",
    "training.local_steps": "train.min_local_steps",
    "training.batch_size": "train.min_batch_size",
    "training.learning_rate": "train.learning_rate",
    "training.schedule": "train.learning_rate",
    "training.final_rate_fraction": "train.learning_rate",
    "training.warmup_fraction": "train.max_warmup_fraction",
    "training.optimizer": "train.optimizers",
    "training.weight_decay": "train.max_pull",
    "training.adam_beta1": "train.adam_beta1",
    "training.adam_beta2": "train.adam_beta2",
    "training.adam_epsilon": "train.max_adam_epsilon",
    "training.momentum": "train.max_momentum",
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
    "training.gradient_checkpointing": "the same gradient in less memory",
    "training.reference_point": "both are functions of the step's own rows",
    "aggregation.weighting": "the count of rows is judged among the figures that leave",
    "aggregation.max_weight_share": _AFTER,
    "aggregation.gap_warning": _AFTER,
    "aggregation.robust": _AFTER,
    "aggregation.num_bad_sites": _AFTER,
    "aggregation.max_update_norm": _AFTER,
    "aggregation.screening": _AFTER,
    "aggregation.screening_threshold": _AFTER,
    "aggregation.residual_max_lost": _AFTER,
    "aggregation.server_optimizer": _AFTER,
    "aggregation.server_learning_rate": _AFTER,
    "aggregation.server_beta1": _AFTER,
    "aggregation.server_beta2": _AFTER,
    "aggregation.server_tau": _AFTER,
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
    "evaluation": "every_rounds sites_per_round server_data batch_size exact_match_rows max_new_tokens metrics "
    "json_schema tasks tasks_every_rounds num_polish_stages",
    "gate": "rules evidence min_rows max_probe_drop min_baseline_gain max_site_rise min_loss_gain min_schema_valid "
    "max_exposure max_extracted max_pii_emission audit_file stop_after figures",
    "export": "formats gguf_type llama_cpp rows data_statement data_licence operator_key",
    "output": "folder keep_checkpoints example_prompts",
}
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
        policy: What the site allows.
        offer: What came.
        now: Unix seconds.
        operators: Keys of the operators in the roster; empty: it names none, so the policy's list decides alone.

    Raises:
        PolicyRefusedError: Unsigned, altered, signed by somebody else or for others, or past its date.
    """
    try:
        made = manifest.check_signature(offer)
    except AuthError as error:
        raise PolicyRefusedError(str(error), rule="federation.operators") from error
    listed, told = policy.federation.operators, f"key {shown(made.signer, limit=16)} is no operator's"
    _require(not operators or made.signer in operators, "roster", told)
    _require(made.signer in (listed or operators), "federation.operators", told)
    _require(
        made.federation == policy.federation.id,
        "federation.id",
        f"the run is for '{shown(made.federation)}', this site is in '{policy.federation.id}'",
    )
    _require(now <= made.not_after, "federation.not_after", f"the offer ended at {made.not_after}, it is {now:.0f}")
    is_bounded = made.not_after - now <= manifest.MAX_OFFER_S
    days = manifest.MAX_OFFER_S // 86_400
    _require(is_bounded, "federation.not_after", f"the offer is for more than {days} days; let it be made anew")


def check(policy: Policy, run_manifest: RunManifest, usage: Usage, *, site: str = "") -> None:
    """Everything about a run that can be judged before a row is read.

    Args:
        policy: What the site allows.
        run_manifest: What came.
        usage: What the site has done so far.
        site: Its name, by which a run may give it a precision of its own.

    Raises:
        PolicyRefusedError: Names the first rule that is broken.
    """
    _check_settings(run_manifest)
    base = _check_base(policy, run_manifest)
    _check_model(base, precisions.at_site(run_manifest.run.model, site))
    _check_adapter(policy, run_manifest)
    _check_training(policy, run_manifest.run)
    _check_privacy(policy, run_manifest.run)
    _check_cohort(policy, run_manifest.run)
    _check_texts(policy, run_manifest.run)
    _check_egress(policy, run_manifest, usage)
    _at_most("runs.max_per_day", usage.num_runs_today + 1, policy.runs.max_per_day)


def check_members(policy: Policy, num_sites: int) -> None:
    """No aggregate can come from more sites than the federation has.

    Raises:
        PolicyRefusedError: The roster has fewer sites than an aggregate must come from.
    """
    _at_least("cohort.min_sites", num_sites, policy.cohort.min_sites)


def check_node(policy: Policy, data: config.NodeDataConfig) -> DatasetRules:
    """The site's own file reads only what the policy allows.

    Returns:
        The rules of the data set that it reads.

    Raises:
        PolicyRefusedError: Another file, or a column that is not listed.
    """
    found = next((rules for rules in policy.data.datasets.values() if rules.path == data.path), None)
    if found is None:
        raise PolicyRefusedError(f"data.datasets: {data.path} is not listed", rule="data.datasets")
    if data.held_out_path:
        listed = [rules.path for rules in policy.data.datasets.values()]
        _require(data.held_out_path in listed, "data.datasets", f"{data.held_out_path} is not listed")
    named = {data.instruction_column, data.input_column, data.output_column, data.unit_column} - {""}
    extra = sorted(named - set(found.columns))
    _require(not extra, "data.datasets.columns", f"{', '.join(extra)} not listed for {data.path}")
    return found


def check_columns(dataset: DatasetRules, run: config.RunConfig) -> None:
    """The columns that the run's objective reads beside those that the site's own file names.

    Raises:
        PolicyRefusedError: One of them is not listed.
    """
    extra = sorted({*preference_rows.COLUMNS.get(run.training.objective, ())} - set(dataset.columns))
    told = f"training.objective = '{run.training.objective}' reads {', '.join(extra)}, not listed for {dataset.path}"
    _require(not extra, "data.datasets.columns", told)


def check_opened(policy: Policy, dataset: DatasetRules, head: OpenedHead, run: config.RunConfig) -> None:
    """Counts that are known once the rows are read.

    Raises:
        PolicyRefusedError: Too few rows or steps to hide a row in, too many steps, a round at a rate near 0, or more
            rows than may be read.
    """
    num_rows = head.num_examples + head.num_held_out + (head.num_dropped or 0)
    _at_least("train.min_records", head.num_examples, policy.train.min_records)
    _check_num_steps(policy, run, head.num_steps)
    _at_most("data.datasets.max_rows", num_rows, dataset.max_rows)


def leaves(run: config.RunConfig) -> Iterator[str]:
    """The dotted keys of a run file."""
    for name, value in run.model_dump().items():
        yield from (f"{name}.{key}" for key in value) if isinstance(value, dict) else (name,)


def is_covered(rules: Policy, run: config.RunConfig) -> bool:
    """Whether a policy demands that counts and figures of a run are covered: each unit is promised something."""
    return rules.privacy.mode == "required" and run.privacy.is_private_per_unit


def beside_rounds(rules: Policy, run: config.RunConfig) -> dict[str, list[Event]]:
    """What a run costs a unit beside its rounds: purpose to the steps of each release.

    Example:
        A run of 4 rounds that is evaluated after each has 5 evaluations.
    """
    if not is_covered(rules, run):
        return {}
    counts = [Event(1.0, rules.privacy.count_noise, 1)]
    noise_multiplier = rules.evaluation.noise_multiplier
    asked = [Event(1.0, noise_multiplier, 1)] * len(run.evaluated_rounds) if noise_multiplier else []
    return {COUNTS: counts, EVALUATE: asked}


def _known() -> set[str]:
    """The dotted keys that the rules here judge, or that were found harmless."""
    others = {f"{section}.{key}".lstrip(".") for section, keys in OTHERS.items() for key in keys.split()}
    return others | JUDGED.keys() | HARMLESS.keys()


def _check_settings(run_manifest: RunManifest) -> None:
    """No setting without a rule."""
    unknown = sorted(set(leaves(run_manifest.run)) - _known())
    _require(not unknown, "manifest", f"no rule judges {', '.join(unknown)}")


def _check_base(policy: Policy, run_manifest: RunManifest) -> BaseRules:
    """A base by the hash of its files."""
    found = next((base for base in policy.models.allow if base.sha256 == run_manifest.base_sha256), None)
    if found is None:
        digest = shown(run_manifest.base_sha256)
        raise PolicyRefusedError(f"models.allow: the base with hash {digest} is not listed", rule="models.allow")
    return found


def _check_model(base: BaseRules, model: config.ModelConfig) -> None:
    """How the base is used."""
    _one_of("models.allow.quantization", model.quantization, base.quantization)
    _one_of("models.allow.chat_template", model.chat_template, base.chat_template)


def _check_adapter(policy: Policy, run_manifest: RunManifest) -> None:
    """Judge the tensors themselves, whatever the run's settings call them."""
    adapter = run_manifest.run.adapter
    _one_of("adapter.kinds", adapter.kind, policy.adapter.kinds)
    _require(bool(run_manifest.tensor_specs), "lora.targets", "the run trains nothing")
    for spec in run_manifest.tensor_specs:
        if adapter.kind == "lora":
            _check_factor(policy, spec)
        else:
            _check_tensor(policy, spec, kind=adapter.kind)
    if adapter.kind != "lora":
        number = trainable.num_values(run_manifest.tensor_specs)
        _at_most("adapter.max_parameters", number, policy.adapter.max_parameters)
    used = KINDS[adapter.kind].settings
    if "r" in used:
        for rank in (adapter.r, *adapter.rank_of_sites.values()):
            _within("lora.r", rank, policy.lora.r)
    if "alpha" in used:
        _within("lora.alpha", adapter.alpha, policy.lora.alpha)
        _within("lora.scale", adapter.scale, policy.lora.scale)
    _at_most("lora.max_dropout", adapter.dropout, policy.lora.max_dropout)


def _check_factor(policy: Policy, spec: TensorSpec) -> None:
    """A factor or core of LoRA, or of a side adapter, on a layer that may be trained, of a rank that is allowed."""
    module, kind, factor = _parts(spec.name)
    _require(bool(module), "lora.targets", f"{shown(spec.name, limit=200)} is no factor")
    parts = module.split(".")
    is_allowed = parts[-1] in policy.lora.targets and not set(parts) & set(FORBIDDEN)
    _require(is_allowed, "lora.targets", f"{shown(module, limit=200)} is not one of them")
    rank = spec.shape[-1 if factor == "B" else 0] if len(spec.shape) == 2 else 0
    limits = policy.lora.r if kind == "lora" else (1, policy.lora.residual_r)
    _within("lora.r" if kind == "lora" else "lora.residual_r", rank, limits)


def _check_tensor(policy: Policy, spec: TensorSpec, *, kind: str) -> None:
    """A tensor of another kind: one that this kind has, on a layer that may be trained."""
    name = shown(spec.name, limit=200)
    _require(kinds.belongs(kind, spec.name), "adapter.kinds", f"{name} is no tensor of kind '{kind}'")
    facts = KINDS[kind]
    if facts.layers == "input":
        return
    parts = kinds.module_of(spec.name).split(".")
    is_norm = facts.layers in ("norms", "both") and parts[-1].endswith("norm") and len(spec.shape) == 1
    is_allowed = (is_norm or parts[-1] in policy.lora.targets) and not set(parts) & set(FORBIDDEN)
    _require(is_allowed, "lora.targets", f"{shown('.'.join(parts), limit=200)} is not one of them")


def _parts(name: str) -> tuple[str, str, str]:
    """Module, `lora` or `residual`, and factor of a tensor; empty for one that is no factor."""
    found = _FACTOR.fullmatch(name)
    return (found[1], found[2], found[3]) if found else ("", "", "")


def _check_training(policy: Policy, run: config.RunConfig) -> None:
    """An update must be the sum of many steps."""
    rules, training = policy.train, run.training
    _within("train.learning_rate", training.learning_rate, rules.learning_rate)
    _one_of("train.optimizers", training.optimizer, rules.optimizers)
    _one_of("train.objectives", training.objective, rules.objectives)
    _one_of("train.methods", run.aggregation.method, rules.methods)
    _at_least("train.min_batch_size", training.batch_size, rules.min_batch_size)
    if training.local_steps:
        _check_num_steps(policy, run, training.local_steps)
    _at_most("train.max_warmup_fraction", training.warmup_fraction, rules.max_warmup_fraction)
    pull = (run.aggregation.proximal + training.weight_decay) * training.learning_rate
    _at_most("train.max_pull", pull, rules.max_pull)
    if training.optimizer == "adamw":
        _within("train.adam_beta1", training.adam_beta1, rules.adam_beta1)
        _within("train.adam_beta2", training.adam_beta2, rules.adam_beta2)
        _at_most("train.max_adam_epsilon", training.adam_epsilon, rules.max_adam_epsilon)
    else:
        _at_most("train.max_momentum", training.momentum, rules.max_momentum)
    if training.max_grad_norm and not run.privacy.is_private_per_unit:
        _at_least("train.min_grad_norm", training.max_grad_norm, rules.min_grad_norm)
    if training.objective != "sft":
        _within("train.beta", training.beta, rules.beta)
        _at_most("train.max_label_smoothing", training.label_smoothing, rules.max_label_smoothing)
        for weight in (training.desirable_weight, training.undesirable_weight):
            _within("train.answer_weights", weight, rules.answer_weights)
    num_rounds, num_polished = run.federation.num_rounds, run.evaluation.num_polish_stages
    is_within = num_rounds + num_polished <= rules.max_rounds  # each is one more adapter that the site scores
    told = f"{num_rounds} rounds and {num_polished} adapters after polish are together above {rules.max_rounds}"
    _require(is_within, "train.max_rounds", told)
    _at_most("train.max_length_tokens", run.data.max_length_tokens, rules.max_length_tokens)


def _check_num_steps(policy: Policy, run: config.RunConfig, num_steps: int) -> None:
    """How many steps a round has, and the rate at which it makes them.

    The rate rises and then falls, so that the first round or the last has the lowest mean.
    """
    _at_least("train.min_local_steps", num_steps, policy.train.min_local_steps)
    _at_most("train.max_local_steps", num_steps, policy.train.max_local_steps)
    num_rounds, (lowest, _) = run.federation.num_rounds, policy.train.learning_rate
    for index in sorted({0, num_rounds - 1}):
        rate = schedule.mean_rate(index, num_rounds=num_rounds, num_steps=num_steps, training=run.training)
        told = (
            f"round {index + 1} of {num_rounds} trains at a mean rate of {rate:.2g}, which is below {lowest:g}; raise "
            "training.final_rate_fraction, or set training.schedule = 'constant'"
        )
        _require(rate >= lowest, "train.learning_rate", told)


def _check_privacy(policy: Policy, run: config.RunConfig) -> None:
    """Protection that the site requires."""
    protection = policy.privacy
    _require(
        protection.mode == "none" or run.privacy.is_private,
        "privacy.mode",
        f"differential privacy is required, the run has privacy.mode = '{run.privacy.mode}'",
    )
    _require(
        protection.mode == "none"
        or not run.privacy.is_private_per_site
        or run.privacy.noise_at in protection.site_level,
        "privacy.site_level",
        f"noise for whole sites, added at '{run.privacy.noise_at}', is no protection of a unit, and is not "
        "allowed in its place",
    )
    if run.privacy.is_private:
        _at_least("privacy.min_noise_multiplier", run.privacy.noise_multiplier, protection.min_noise_multiplier)
        _at_most("privacy.max_clip_norm", run.privacy.clip_norm, protection.max_clip_norm)
        _at_most("privacy.dp_delta", run.privacy.dp_delta, protection.dp_delta)
        planned = _planned(policy, run)
        _at_most("privacy.max_epsilon", planned, protection.max_epsilon)
    _require(
        protection.secagg == "none",
        "privacy.secagg",
        "secure aggregation is required, and this version has none",
    )


def _check_cohort(policy: Policy, run: config.RunConfig) -> None:
    """How many sites an aggregate comes from; by the run file's own rules a round has at least `min_sites`."""
    federation = run.federation
    _at_least("cohort.min_sites", federation.min_sites, policy.cohort.min_sites)
    if run.privacy.is_private_per_site:
        _at_least("cohort.min_sites", sites.num_expected(run), policy.cohort.min_sites)


def check_message_size(run_manifest: RunManifest, *, max_mib: int) -> None:
    """Refuse a run whose adapter could come in a larger message than this site takes, before anything is trained.

    Raises:
        PolicyRefusedError: It could.
    """
    size_mib = math.ceil(run_manifest.request_bytes / (1 << 20))
    if size_mib > max_mib:
        raise PolicyRefusedError(
            f"agent.max_message_mib: a request that brings this run's adapter whole has up to {size_mib} MiB, and this "
            f"site takes {max_mib}; raise it in the site's own file, or ask for a run of a lower adapter.r",
            rule="agent.max_message_mib",
        )


def _planned(policy: Policy, run: config.RunConfig) -> float:
    """Epsilon of the whole run at the site's own delta, counts and held-out figures included."""
    beside = [event for events in beside_rounds(policy, run).values() for event in events]
    try:
        return plan.epsilon(run, dp_delta=policy.privacy.dp_delta, beside=beside)
    except AccountingUnsupported as error:
        raise PolicyRefusedError(f"privacy.max_epsilon: {error}", rule="privacy.max_epsilon") from error


def _check_texts(policy: Policy, run: config.RunConfig) -> None:
    """A coordinator's text stands in every example, so it could ask for anything."""
    is_listed = run.data.system_prompt in policy.data.system_prompts
    _require(is_listed, "data.system_prompts", f"{len(run.data.system_prompt)} characters that are not listed")
    if run.evaluation.exact_match_rows:
        _at_least("evaluation.min_slice", run.evaluation.exact_match_rows, policy.evaluation.min_slice)


def _check_egress(policy: Policy, run_manifest: RunManifest, usage: Usage) -> None:
    """What the manifest says will leave."""
    rules, declared = policy.egress, run_manifest.egress
    for kind, own in declared.metrics.items():
        for name in own:
            _require(name in rules.metrics, "egress.metrics", f"{kind} would tell {name}, which is not listed")
    _at_most("egress.max_bytes_per_message", declared.bytes_per_message, rules.max_bytes_per_message)
    whole = egress.bytes_per_run(declared, run_manifest.run)
    _at_most("egress.max_bytes_per_run", max(whole, usage.bytes_of_run), rules.max_bytes_per_run)


def _within(rule: str, value: float, limits: tuple[float, float]) -> None:
    """Between two numbers, both included."""
    _require(limits[0] <= value <= limits[1], rule, f"{value:g} is not from {limits[0]:g} to {limits[1]:g}")


def _at_least(rule: str, value: float, floor: float) -> None:
    """Not below."""
    _require(value >= floor, rule, f"{value:g} is below {floor:g}")


def _at_most(rule: str, value: float, ceiling: float) -> None:
    """Not above."""
    _require(value <= ceiling, rule, f"{value:g} is above {ceiling:g}")


def _one_of(rule: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    _require(value in allowed, rule, f"'{value}' is not one of {', '.join(allowed)}")


def _require(is_allowed: bool, rule: str, message: str) -> None:
    """Refuse by a rule."""
    if not is_allowed:
        raise PolicyRefusedError(f"{rule}: {message}", rule=rule)
