"""Settings that are fine alone and contradict each other, as one table per file.

A setting that could have no effect is a contradiction too: it would do nothing and nobody would notice.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from common.run.catalogue.methods import FACTS
from common.run.problems import hints
from common.run.rules import compatibility, cores, evaluation, gate, kinds, sites, wire
from common.run.schema.tables import Contradiction, NodeTables, RunTables

RESIDUAL_MAX_LOST = 0.05
MAX_WEIGHT_SHARE = 0.5
MIN_SCREENED = 4


@dataclass(frozen=True)
class Rule:
    """One contradiction.

    Attributes:
        keys: Dotted keys that take part; the first names the problem.
        is_broken: Whether a config breaks the rule.
        message: What is wrong and the remedy.
    """

    keys: tuple[str, ...]
    is_broken: Callable[[Any], bool]
    message: str


def check(config: BaseModel, rules: tuple[Rule, ...]) -> None:
    """Raise if a config that was built in code breaks a rule.

    Raises:
        ValueError: Every broken rule, in one line.
    """
    broken = [f"{rule.keys[0]}: {describe(config, rule)}" for rule in rules if rule.is_broken(config)]
    if broken:
        raise ValueError("; ".join(broken))


def describe(config: BaseModel, rule: Rule) -> str:
    """Say what is wrong, with the values that take part; of an array of tables with their number."""
    shown = []
    for key in rule.keys:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        is_tables = isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value)
        if value is not None:  # else a setting that another variant of its table has
            shown.append(f"{key} = {f'{len(value)} tables' if is_tables else hints.show_value(value)}")
    return f"{rule.message} ({', '.join(shown)})"


def is_private(table: Mapping[str, Any]) -> bool:
    """Whether an unchecked table of a run file asks for differential privacy."""
    privacy = table.get("privacy")
    return isinstance(privacy, dict) and privacy.get("mode") in ("unit", "site")


def _has_same_columns(config: RunTables | NodeTables) -> bool:
    data = config.data
    return len({data.instruction_column, data.input_column, data.output_column}) < 3


def _needs_more_sites(config: RunTables) -> bool:
    wanted = max(config.federation.min_sites, config.federation.sites_per_round, config.federation.num_sites)
    return 0 < config.data.num_sites < wanted


def _has_revision_without_hub(config: RunTables) -> bool:
    base = config.model.base
    return config.model.revision != "" and (base == "embedded" or base.startswith(("/", ".", "~")))


def _has_idle_adaption(config: RunTables) -> bool:
    privacy = config.privacy
    if privacy.mode == "none" or privacy.adaptive_clipping:
        return False
    defaults = type(privacy).model_fields
    return any(getattr(privacy, key) != defaults[key].default for key in ("clip_quantile", "clip_learning_rate"))


def _has_small_batch(config: RunTables) -> bool:
    privacy, training = config.privacy, config.training
    return privacy.mode == "unit" and privacy.max_rows_per_unit > (training.micro_batch_size or training.batch_size)


_COLUMNS = ("data.output_column", "data.instruction_column", "data.input_column")


def _is_combined(config: RunTables, method: str, feature: compatibility.Feature) -> bool:
    return config.aggregation.method == method and feature.is_asked(config)


def _refused_combinations() -> tuple[Rule, ...]:
    """One rule for each cell of the table of methods that says no and that a run file can ask for."""
    return tuple(
        Rule(
            ("aggregation.method", *feature.keys),
            functools.partial(_is_combined, method=cell.method, feature=feature),
            f"no {feature.name} with this method: {cell.reason}; the nearest method that allows it is '{cell.nearest}'",
        )
        for feature, cell in compatibility.cells()
        if feature.keys and not cell.is_allowed
    )


_SITES_FOR_BAD = {"median": (2, 1), "trimmed_mean": (2, 1), "krum": (2, 3), "multi_krum": (2, 3), "bulyan": (4, 3)}


def _has_too_few_good_sites(config: RunTables) -> bool:
    robust = config.aggregation.robust
    if robust.rule == "none":
        return False
    a_bad_one, more = _SITES_FOR_BAD[robust.rule]
    return config.federation.min_sites < a_bad_one * robust.num_bad_sites + more


def _keeps_residual(config: RunTables) -> bool:
    return FACTS[config.aggregation.method].base_delta == "residual"


def _loses_side_adapter(config: RunTables) -> bool:
    return _keeps_residual(config) and any(stage.held_to or stage.kind == "reward" for stage in config.polish)


def _has_idle_columns(config: RunTables) -> bool:
    data = config.data
    is_named = (data.instruction_column, data.input_column, data.output_column) != ("instruction", "input", "output")
    return config.training.objective.kind != "sft" and is_named and not config.evaluation.server_data


_OF_OBJECTIVES: tuple[Contradiction, ...] = (
    (
        ("training.objective.reference_point", "training.objective.kind", "privacy.mode"),
        lambda c: c.training.objective.couples_examples and c.privacy.mode != "none",
        "a mean over the step lets one unit move the gradients of all others, which no clipping bounds; set 'zero'",
    ),
    (
        ("training.objective.kind", "evaluation.exact_match_rows"),
        lambda c: c.training.objective.kind != "sft" and c.evaluation.exact_match_rows > 0,
        "held-out preferences are scored by their margins, none is answered by generation; remove exact_match_rows",
    ),
    (
        ("training.objective.kind", "data.instruction_column", "data.input_column", "data.output_column"),
        _has_idle_columns,
        "columns of preferences have fixed names, and there are no other rows (evaluation.server_data); remove these",
    ),
)

_ADAPTERS = frozenset({"peft", "vllm"})  # all other formats of [export] hold merged weights


def _exports_no_adapter(config: RunTables) -> bool:
    return bool(config.export.formats) and FACTS[config.aggregation.method].is_personal


_OF_EXPORTS: tuple[Contradiction, ...] = (
    (
        ("export.formats", "aggregation.method"),
        _exports_no_adapter,
        "under this method each site has an adapter of its own, and the coordinator none to export; remove it",
    ),
    (
        ("export.gguf_type", "export.formats"),
        lambda c: c.export.gguf_type != "bf16" and "gguf" not in c.export.formats,
        "is for the format gguf; add it to export.formats, or remove this",
    ),
    (
        ("export.gguf_type", "export.llama_cpp"),
        lambda c: "gguf" in c.export.formats and c.export.gguf_type != "bf16" and not c.export.llama_cpp,
        "is written by llama-quantize; set export.llama_cpp to a checkout with it, or 'bf16'",
    ),
    (
        ("export.llama_cpp", "export.formats"),
        lambda c: bool(c.export.llama_cpp) and "gguf" not in c.export.formats,
        "writes the format gguf; add it to export.formats, or remove this",
    ),
    (
        ("export.rows", "export.formats"),
        lambda c: bool(c.export.rows) and not set(c.export.formats) - _ADAPTERS,
        "is for merged weights; add merged, nf4, int8, gguf or onnx to export.formats, or remove this",
    ),
    (
        ("export.operator_key", "export.formats"),
        lambda c: bool(c.export.operator_key) and not c.export.formats,
        "signs a folder that nobody asked for; set export.formats, or remove this",
    ),
)

RUN_RULES = (
    *(Rule(*contradiction) for contradiction in compatibility.contradictions()),
    *_refused_combinations(),
    *(Rule(*contradiction) for contradiction in wire.contradictions()),
    *(Rule(*contradiction) for contradiction in kinds.contradictions()),
    Rule(
        ("polish", "aggregation.method"),
        _loses_side_adapter,
        "this method keeps a side adapter, which the reference model or the reward model of a stage would be without; "
        "choose sft, cpt, orpo or simpo, grpo with beta = 0, or another aggregation.method",
    ),
    Rule(
        ("aggregation.residual_rank", "aggregation.method"),
        lambda c: _keeps_residual(c) and not c.aggregation.residual_rank,
        "this method keeps a side adapter; set its rank, such as the number of sites times adapter.r",
    ),
    Rule(
        ("aggregation.residual_rank", "aggregation.method"),
        lambda c: not _keeps_residual(c) and c.aggregation.residual_rank > 0,
        "this method keeps no side adapter; remove it",
    ),
    Rule(
        ("aggregation.residual_max_lost", "aggregation.method"),
        lambda c: not _keeps_residual(c) and c.aggregation.residual_max_lost != RESIDUAL_MAX_LOST,
        "this method keeps no side adapter; remove it",
    ),
    *(Rule(*conflict) for conflict in cores.CONFLICTS),
    *(Rule(*contradiction) for contradiction in _OF_OBJECTIVES),
    Rule(
        ("aggregation.max_weight_share", "aggregation.weighting"),
        lambda c: c.aggregation.weighting == "uniform" and c.aggregation.max_weight_share != MAX_WEIGHT_SHARE,
        "has no effect where all sites weigh the same; remove it",
    ),
    Rule(
        ("aggregation.weighting", "aggregation.robust.rule"),
        lambda c: c.aggregation.robust.rule != "none" and c.aggregation.weighting != "uniform",
        "under robust aggregation all sites weigh the same, as a number of rows is a site's own claim; set 'uniform'",
    ),
    Rule(
        ("federation.min_sites", "aggregation.robust.rule", "aggregation.robust.num_bad_sites"),
        _has_too_few_good_sites,
        "too few sites for so many bad ones; with f of them median and trimmed_mean need 2 f + 1 sites, krum and "
        "multi_krum 2 f + 3, bulyan 4 f + 3",
    ),
    Rule(
        ("federation.min_sites", "aggregation.screening.action"),
        lambda c: c.aggregation.screening.action != "off" and c.federation.min_sites < MIN_SCREENED,
        f"screening holds sites against each other and needs {MIN_SCREENED} of them at least; raise min_sites",
    ),
    Rule(
        ("aggregation.proximal", "training.learning_rate"),
        lambda c: c.aggregation.proximal * c.training.learning_rate >= 1,
        "a step would go all the way back, or beyond; their product must be below 1",
    ),
    Rule(
        ("model.revision", "model.base"),
        _has_revision_without_hub,
        "a revision belongs to a hub id, and this base is not one; remove it",
    ),
    Rule(_COLUMNS, _has_same_columns, "the instruction, input and output columns must be three different ones"),
    Rule(
        ("data.site_column", "data.partition"),
        lambda c: c.data.partition == "column" and not c.data.site_column,
        "the rows' sites are read from this column, so it needs a name",
    ),
    Rule(
        ("data.num_sites", "data.partition"),
        lambda c: c.data.partition != "column" and c.data.num_sites == 0,
        "this partition needs the number of sites; set data.num_sites",
    ),
    Rule(
        ("data.num_sites", "data.partition"),
        lambda c: c.data.partition == "column" and c.data.num_sites > 0,
        "the values of data.site_column are the sites; remove data.num_sites, or choose iid or dirichlet",
    ),
    Rule(
        ("data.num_sites", "federation.min_sites", "federation.sites_per_round", "federation.num_sites"),
        _needs_more_sites,
        "the federation waits for more sites than there are; raise data.num_sites or lower the others",
    ),
    Rule(
        ("data.dirichlet_alpha", "data.partition"),
        lambda c: c.data.partition != "dirichlet" and c.data.dirichlet_alpha != 0.5,
        "has no effect with this partition; remove it",
    ),
    Rule(
        ("training.local_steps", "training.local_epochs"),
        lambda c: c.training.local_steps > 0 and c.training.local_epochs > 0,
        "steps and epochs are two answers to one question; remove one of them",
    ),
    Rule(
        ("training.local_epochs", "training.local_steps"),
        lambda c: c.training.local_steps == 0 and c.training.local_epochs == 0,
        "a site would not train at all; set local_epochs or local_steps above 0",
    ),
    Rule(
        ("training.micro_batch_size", "training.batch_size"),
        lambda c: c.training.micro_batch_size > 0 and c.training.batch_size % c.training.micro_batch_size != 0,
        "must divide batch_size",
    ),
    Rule(
        ("training.micro_batch_tokens", "training.micro_batch_size"),
        lambda c: c.training.micro_batch_tokens > 0 and c.training.micro_batch_size > 0,
        "tokens and rows are two answers to one question; remove one of them",
    ),
    Rule(
        ("training.final_rate_fraction", "training.schedule"),
        lambda c: c.training.schedule == "constant" and c.training.final_rate_fraction > 0,
        "has no effect with this schedule; remove it or choose 'linear' or 'cosine'",
    ),
    Rule(
        ("federation.sites_per_round", "federation.min_sites"),
        lambda c: 0 < c.federation.sites_per_round < c.federation.min_sites,
        "no round could count: it must be 0 (all) or at least min_sites",
    ),
    Rule(
        ("federation.num_sites", "federation.min_sites", "federation.sites_per_round"),
        lambda c: 0 < c.federation.num_sites < max(c.federation.min_sites, c.federation.sites_per_round),
        "must be 0 (whoever has connected) or at least min_sites and sites_per_round",
    ),
    *(Rule(*contradiction) for contradiction in sites.contradictions()),
    Rule(
        ("privacy.epsilon", "privacy.noise_multiplier", "privacy.mode"),
        lambda c: c.privacy.mode != "none" and not (c.privacy.epsilon or c.privacy.noise_multiplier),
        "set the epsilon of the whole run, or the noise multiplier, or both",
    ),
    Rule(
        ("training.local_steps", "privacy.mode"),
        lambda c: c.privacy.mode == "unit" and not c.training.local_steps,
        "under differential privacy a round has a fixed number of steps; set local_steps and remove local_epochs",
    ),
    Rule(
        ("training.max_grad_norm", "privacy.mode"),
        lambda c: c.privacy.mode == "unit" and c.training.max_grad_norm not in (0.0, 1.0),
        "has no effect under differential privacy, which clips each unit; remove it and set privacy.clip_norm",
    ),
    Rule(
        ("privacy.max_rows_per_unit", "training.micro_batch_size", "training.batch_size"),
        _has_small_batch,
        "all rows of a unit go through the model at once; raise the (micro-)batch size or lower max_rows_per_unit",
    ),
    Rule(
        ("privacy.clip_quantile", "privacy.clip_learning_rate", "privacy.adaptive_clipping"),
        _has_idle_adaption,
        "has no effect while the clip norm is fixed; remove it or set adaptive_clipping",
    ),
    Rule(
        ("evaluation.tasks",),
        lambda c: len({task.name for task in c.evaluation.tasks}) < len(c.evaluation.tasks),
        "two tasks have one name; give each its own",
    ),
    Rule(
        ("evaluation.tasks_every_rounds", "evaluation.tasks"),
        lambda c: c.evaluation.tasks_every_rounds > 0 and not c.evaluation.tasks,
        "there is nothing to measure; name tasks, or remove it",
    ),
    *(Rule(*contradiction) for contradiction in evaluation.CONTRADICTIONS),
    *(Rule(*contradiction) for contradiction in gate.contradictions()),
    *(Rule(*contradiction) for contradiction in _OF_EXPORTS),
)

NODE_RULES = (
    Rule(_COLUMNS, _has_same_columns, "the instruction, input and output columns must be three different ones"),
    Rule(
        ("data.held_out_path", "data.path"),
        lambda c: c.data.held_out_path == c.data.path,
        "evaluation on training rows says nothing; name another file",
    ),
    Rule(
        ("agent.policy", "agent.policy_signer", "agent.identity_key"),
        lambda c: len({bool(c.agent.policy), bool(c.agent.policy_signer), bool(c.agent.identity_key)}) > 1,
        "a policy, its signer's public key and this site's key belong together; set all three, or none",
    ),
    Rule(
        ("agent.roster_folder", "agent.policy"),
        lambda c: bool(c.agent.roster_folder) and not c.agent.policy,
        "a roster is looked at by an agent with a policy only; set agent.policy too, or remove it",
    ),
    Rule(
        ("link.proxy_auth_file", "link.proxy"),
        lambda c: bool(c.link.proxy_auth_file) and not c.link.proxy,
        "there is no proxy to show a name and password to; set link.proxy, or remove it",
    ),
)
