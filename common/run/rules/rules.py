"""Settings that are fine alone and contradict each other, as one table per file.

A setting that could have no effect is a contradiction too: it would do nothing and nobody would notice.
"""

from typing import Final

from common import accounting
from common.run.catalogue.methods import FACTS
from common.run.rules import compatibility, gate, kinds, wire
from common.run.rules.rule import Rule, idle
from common.run.schema.model import BY_HASH
from common.run.schema.tables import NodeTables, RunTables

MIN_SCREENED: Final = 4


def _has_same_columns(config: RunTables | NodeTables) -> bool:
    data = config.data
    return len({data.instruction_column, data.input_column, data.output_column}) < 3


def _needs_more_sites(config: RunTables) -> bool:
    wanted = max(config.federation.min_sites, config.federation.sites_per_round, config.federation.num_sites)
    return 0 < config.data.num_sites < wanted


def _has_revision_without_hub(config: RunTables) -> bool:
    base = config.model.base
    return config.model.revision != "" and (base == "embedded" or base.startswith(("/", ".", "~")))


def _has_small_batch(config: RunTables) -> bool:
    privacy, training = config.privacy, config.training
    return privacy.mode == "unit" and privacy.max_rows_per_unit > (training.micro_batch_size or training.batch_size)


_COLUMNS = ("data.output_column", "data.instruction_column", "data.input_column")


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


_ADAPTERS = frozenset({"peft", "vllm"})  # all other formats of [export] hold merged weights


def _exports_no_adapter(config: RunTables) -> bool:
    return bool(config.export.formats) and FACTS[config.aggregation.method].is_personal


def _has_cores(config: RunTables) -> bool:
    return FACTS[config.aggregation.method].has_cores


def _has_fewer_stages(config: RunTables) -> bool:
    """A manifest names no stages, so this is for the coordinator's own file; it may lack a base yet."""
    if getattr(config.model, "base", BY_HASH) == BY_HASH:
        return False
    return config.evaluation.num_polish_stages > sum(stage.changes_adapter for stage in config.polish)


def _has_large_delta(config: RunTables) -> bool:
    num_sites = config.federation.num_sites
    if config.privacy.mode != "site" or not num_sites:
        return False
    return config.privacy.dp_delta > accounting.largest_delta(num_sites)


RUN_RULES: Final = (
    *compatibility.RULES,
    *wire.RULES,
    *kinds.RULES,
    Rule(
        ("polish", "aggregation.method"),
        _loses_side_adapter,
        "this method keeps a side adapter, which the reference model or the reward model of a stage would be without",
        "choose sft, cpt, orpo or simpo, grpo with beta = 0, or another aggregation.method",
    ),
    Rule(
        ("aggregation.residual_rank", "aggregation.method"),
        lambda c: _keeps_residual(c) and not c.aggregation.residual_rank,
        "this method keeps a side adapter",
        "set its rank, such as the number of sites times adapter.r",
    ),
    Rule(
        ("aggregation.residual_rank", "aggregation.method"),
        lambda c: not _keeps_residual(c) and c.aggregation.residual_rank > 0,
        "this method keeps no side adapter",
        "remove it",
    ),
    idle(
        "aggregation.residual_max_lost",
        "aggregation.method",
        where=lambda c: not _keeps_residual(c),
        message="this method keeps no side adapter",
    ),
    idle(
        "aggregation.num_heads",
        "aggregation.method",
        where=lambda c: not _has_cores(c),
        message="has no effect, as only ravan has heads",
    ),
    Rule(
        ("aggregation.num_heads", "adapter.r"),
        lambda c: _has_cores(c) and c.adapter.kind == "lora" and c.adapter.r % c.aggregation.num_heads > 0,
        "all heads have the same share of the rank",
        "choose a number that divides adapter.r",
    ),
    Rule(
        ("privacy.clipping", "aggregation.method"),
        lambda c: _has_cores(c) and c.privacy.mode == "unit" and c.privacy.clipping in ("stacked", "opacus"),
        "reads gradients of units off the weights of linear layers, and a core is none",
        "set 'microbatch' or 'auto'",
    ),
    Rule(
        ("training.objective.reference_point", "training.objective.kind", "privacy.mode"),
        lambda c: c.training.objective.couples_examples and c.privacy.mode != "none",
        "a mean over the step lets one unit move the gradients of all others, which no clipping bounds",
        "set 'zero'",
    ),
    Rule(
        ("training.objective.kind", "evaluation.exact_match_rows"),
        lambda c: c.training.objective.kind != "sft" and c.evaluation.exact_match_rows > 0,
        "held-out preferences are scored by their margins, none is answered by generation",
        "remove exact_match_rows",
    ),
    Rule(
        ("training.objective.kind", "data.instruction_column", "data.input_column", "data.output_column"),
        _has_idle_columns,
        "columns of preferences have fixed names, and there are no other rows (evaluation.server_data)",
        "remove these",
    ),
    idle(
        "aggregation.max_weight_share",
        "aggregation.weighting",
        where=lambda c: c.aggregation.weighting == "uniform",
        message="has no effect where all sites weigh the same",
    ),
    Rule(
        ("aggregation.weighting", "aggregation.robust.rule"),
        lambda c: c.aggregation.robust.rule != "none" and c.aggregation.weighting != "uniform",
        "under robust aggregation all sites weigh the same, as a number of rows is a site's own claim",
        "set 'uniform'",
    ),
    Rule(
        ("federation.min_sites", "aggregation.robust.rule", "aggregation.robust.num_bad_sites"),
        _has_too_few_good_sites,
        "too few sites for so many bad ones",
        "with f of them median and trimmed_mean need 2 f + 1 sites, krum and multi_krum 2 f + 3, bulyan 4 f + 3",
    ),
    Rule(
        ("federation.min_sites", "aggregation.screening.action"),
        lambda c: c.aggregation.screening.action != "off" and c.federation.min_sites < MIN_SCREENED,
        f"screening holds sites against each other and needs {MIN_SCREENED} of them at least",
        "raise min_sites",
    ),
    Rule(
        ("aggregation.proximal", "training.learning_rate"),
        lambda c: c.aggregation.proximal * c.training.learning_rate >= 1,
        "a step would go all the way back, or beyond",
        "their product must be below 1",
    ),
    Rule(
        ("model.revision", "model.base"),
        _has_revision_without_hub,
        "a revision belongs to a hub id, and this base is not one",
        "remove it",
    ),
    Rule(
        _COLUMNS,
        _has_same_columns,
        "two of the three columns of instruction, input and output are one",
        "name three different ones",
    ),
    Rule(
        ("data.site_column", "data.partition"),
        lambda c: c.data.partition == "column" and not c.data.site_column,
        "the rows' sites are read from this column",
        "give it a name",
    ),
    Rule(
        ("data.num_sites", "data.partition"),
        lambda c: c.data.partition != "column" and c.data.num_sites == 0,
        "this partition needs the number of sites",
        "set data.num_sites",
    ),
    Rule(
        ("data.num_sites", "data.partition"),
        lambda c: c.data.partition == "column" and c.data.num_sites > 0,
        "the values of data.site_column are the sites",
        "remove data.num_sites, or choose iid or dirichlet",
    ),
    Rule(
        ("data.num_sites", "federation.min_sites", "federation.sites_per_round", "federation.num_sites"),
        _needs_more_sites,
        "the federation waits for more sites than there are",
        "raise data.num_sites or lower the others",
    ),
    idle(
        "data.dirichlet_alpha",
        "data.partition",
        where=lambda c: c.data.partition != "dirichlet",
        message="has no effect with this partition",
    ),
    Rule(
        ("training.local_steps", "training.local_epochs"),
        lambda c: c.training.local_steps > 0 and c.training.local_epochs > 0,
        "steps and epochs are two answers to one question",
        "remove one of them",
    ),
    Rule(
        ("training.local_epochs", "training.local_steps"),
        lambda c: c.training.local_steps == 0 and c.training.local_epochs == 0,
        "a site would not train at all",
        "set local_epochs or local_steps above 0",
    ),
    Rule(
        ("training.micro_batch_size", "training.batch_size"),
        lambda c: c.training.micro_batch_size > 0 and c.training.batch_size % c.training.micro_batch_size != 0,
        "a step is made of passes of equal size",
        "set a number that divides batch_size",
    ),
    Rule(
        ("training.micro_batch_tokens", "training.micro_batch_size"),
        lambda c: c.training.micro_batch_tokens > 0 and c.training.micro_batch_size > 0,
        "tokens and rows are two answers to one question",
        "remove one of them",
    ),
    idle(
        "training.final_rate_fraction",
        "training.schedule",
        where=lambda c: c.training.schedule == "constant",
        message="has no effect with this schedule",
        remedy="remove it or choose 'linear' or 'cosine'",
    ),
    Rule(
        ("federation.sites_per_round", "federation.min_sites"),
        lambda c: 0 < c.federation.sites_per_round < c.federation.min_sites,
        "no round could count",
        "set 0 (all) or at least min_sites",
    ),
    Rule(
        ("federation.num_sites", "federation.min_sites", "federation.sites_per_round"),
        lambda c: 0 < c.federation.num_sites < max(c.federation.min_sites, c.federation.sites_per_round),
        "fewer than a round needs",
        "set 0 (whoever has connected) or at least min_sites and sites_per_round",
    ),
    *compatibility.SITE_REFUSES,
    Rule(
        ("federation.num_sites", "privacy.mode"),
        lambda c: c.privacy.mode == "site" and not c.federation.num_sites,
        "the noised sum is divided by the expected number of sites",
        "state how many there are",
    ),
    Rule(
        ("privacy.dp_delta", "federation.num_sites", "privacy.mode"),
        _has_large_delta,
        "for n sites, delta may be at most the smaller of 1e-5 and 1 / (n ln n)",
        "lower it",
    ),
    Rule(
        ("privacy.sampling_prob", "privacy.noise_at", "privacy.mode"),
        lambda c: c.privacy.mode == "site" and c.privacy.noise_at == "sites" and c.privacy.sampling_prob < 1,
        "the coordinator knows who was drawn and adds noise, so that drawing saves nothing",
        "set 1",
    ),
    Rule(
        ("privacy.adaptive_clipping", "privacy.noise_at", "privacy.mode"),
        lambda c: c.privacy.mode == "site" and c.privacy.noise_at == "sites" and c.privacy.adaptive_clipping,
        "the coordinator sees noised updates only and cannot count their norms",
        "keep the clip norm fixed",
    ),
    Rule(
        ("privacy.epsilon", "privacy.noise_multiplier", "privacy.mode"),
        lambda c: c.privacy.mode != "none" and not (c.privacy.epsilon or c.privacy.noise_multiplier),
        "nothing says how much noise there is",
        "set the epsilon of the whole run, or the noise multiplier, or both",
    ),
    Rule(
        ("training.local_steps", "privacy.mode"),
        lambda c: c.privacy.mode == "unit" and not c.training.local_steps,
        "under differential privacy a round has a fixed number of steps",
        "set local_steps and remove local_epochs",
    ),
    idle(
        "training.max_grad_norm",
        "privacy.mode",
        where=lambda c: c.privacy.mode == "unit" and c.training.max_grad_norm > 0,
        message="has no effect under differential privacy, which clips each unit",
        remedy="remove it and set privacy.clip_norm",
    ),
    Rule(
        ("privacy.max_rows_per_unit", "training.micro_batch_size", "training.batch_size"),
        _has_small_batch,
        "all rows of a unit go through the model at once",
        "raise the (micro-)batch size or lower max_rows_per_unit",
    ),
    *(
        idle(
            f"privacy.{key}",
            "privacy.adaptive_clipping",
            where=lambda c: c.privacy.mode != "none" and not c.privacy.adaptive_clipping,
            message="has no effect while the clip norm is fixed",
            remedy="remove it or set adaptive_clipping",
        )
        for key in ("clip_quantile", "clip_learning_rate")
    ),
    Rule(
        ("evaluation.tasks",),
        lambda c: len({task.name for task in c.evaluation.tasks}) < len(c.evaluation.tasks),
        "two tasks have one name",
        "give each its own",
    ),
    Rule(
        ("evaluation.tasks_every_rounds", "evaluation.tasks"),
        lambda c: c.evaluation.tasks_every_rounds > 0 and not c.evaluation.tasks,
        "there is nothing to measure",
        "name tasks, or remove it",
    ),
    Rule(
        ("evaluation.sites_per_round", "aggregation.method"),
        lambda c: c.evaluation.sites_per_round > 0 and FACTS[c.aggregation.method].is_personal,
        "a site puts down its own adapter when it is asked about it, so all must be asked",
        "remove it, or set 0",
    ),
    Rule(
        ("evaluation.num_polish_stages", "polish"),
        _has_fewer_stages,
        "there are fewer stages of [[polish]] that change the adapter",
        "add stages, or lower it",
    ),
    Rule(
        ("evaluation.num_polish_stages", "adapter.site_ranks"),
        lambda c: c.evaluation.num_polish_stages > 0 and compatibility.has_site_ranks(c),
        "a site of a lower rank would score a part of the polished adapter only",
        "remove one of the two",
    ),
    Rule(
        ("evaluation.num_polish_stages", "aggregation.method"),
        lambda c: c.evaluation.num_polish_stages > 0 and FACTS[c.aggregation.method].is_personal,
        "sites would score the adapter with factors of their own in the place of its",
        "choose another method",
    ),
    *gate.RULES,
    Rule(
        ("export.formats", "aggregation.method"),
        _exports_no_adapter,
        "under this method each site has an adapter of its own, and the coordinator none to export",
        "remove it",
    ),
    idle(
        "export.gguf_type",
        "export.formats",
        where=lambda c: "gguf" not in c.export.formats,
        message="is for the format gguf",
        remedy="add it to export.formats, or remove this",
    ),
    Rule(
        ("export.gguf_type", "export.llama_cpp"),
        lambda c: "gguf" in c.export.formats and c.export.gguf_type != "bf16" and not c.export.llama_cpp,
        "is written by llama-quantize",
        "set export.llama_cpp to a checkout with it, or 'bf16'",
    ),
    Rule(
        ("export.llama_cpp", "export.formats"),
        lambda c: bool(c.export.llama_cpp) and "gguf" not in c.export.formats,
        "writes the format gguf",
        "add it to export.formats, or remove this",
    ),
    Rule(
        ("export.rows", "export.formats"),
        lambda c: bool(c.export.rows) and not set(c.export.formats) - _ADAPTERS,
        "is for merged weights",
        "add merged, nf4, int8, gguf or onnx to export.formats, or remove this",
    ),
    Rule(
        ("export.operator_key", "export.formats"),
        lambda c: bool(c.export.operator_key) and not c.export.formats,
        "signs a folder that nobody asked for",
        "set export.formats, or remove this",
    ),
)

NODE_RULES: Final = (
    Rule(
        _COLUMNS,
        _has_same_columns,
        "two of the three columns of instruction, input and output are one",
        "name three different ones",
    ),
    Rule(
        ("data.held_out_path", "data.path"),
        lambda c: c.data.held_out_path == c.data.path,
        "evaluation on training rows says nothing",
        "name another file",
    ),
    Rule(
        ("agent.policy", "agent.policy_signer", "agent.identity_key"),
        lambda c: len({bool(c.agent.policy), bool(c.agent.policy_signer), bool(c.agent.identity_key)}) > 1,
        "a policy, its signer's public key and this site's key belong together",
        "set all three, or none",
    ),
    Rule(
        ("agent.roster_folder", "agent.policy"),
        lambda c: bool(c.agent.roster_folder) and not c.agent.policy,
        "a roster is looked at by an agent with a policy only",
        "set agent.policy too, or remove it",
    ),
    Rule(
        ("link.proxy_auth_file", "link.proxy"),
        lambda c: bool(c.link.proxy_auth_file) and not c.link.proxy,
        "there is no proxy to show a name and password to",
        "set link.proxy, or remove it",
    ),
)
