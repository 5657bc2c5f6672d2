"""Settings that are fine alone and contradict each other: every rule is broken by a test."""

import json

import pytest
from pydantic import ValidationError

from common.run import config
from common.run.rules import rules
from tests.unit.common.run.test_config import MINIMAL, problems, with_settings

UNIT = "privacy.mode = 'unit'"
PRIVATE = [UNIT, "privacy.sampling_prob = 0.1", "privacy.epsilon = 8", "training.local_steps = 5"]
SITE = [
    "privacy.mode = 'site'",
    "privacy.sampling_prob = 0.1",
    "privacy.noise_multiplier = 1",
    "federation.num_sites = 100",
    "aggregation.weighting = 'uniform'",
]
KRUM = ["aggregation.robust.rule = 'krum'", "aggregation.robust.num_bad_sites = 1"]
UNIFORM = "aggregation.weighting = 'uniform'"
TASK = "{name = 'a', kind = 'choice', data = 'rows.jsonl'}"
IA3 = "adapter.kind = 'ia3'"
STAGE = 'polish = [{name = "align", kind = "dpo", data = "x"}]\n'
BROKEN_RULES = [
    ("adapter.site_ranks", 7, ["adapter.site_ranks = {north = 16}", "aggregation.method = 'fedsvd'"]),
    ("model.site_quantization", 4, ["model.site_quantization = {north = 'nf4'}"]),
    ("adapter.kind", 8, ["adapter.kind = 'dora'", "model.site_quantization = {a = 'none'}"]),
    ("adapter.kind", 7, [IA3, "aggregation.method = 'ffa'"]),
    ("adapter.kind", 7, ["adapter.kind = 'prefix_tuning'", "training.gradient_checkpointing = true"]),
    ("adapter.dropout", 9, ["adapter.dropout = 0.1", *PRIVATE]),
    ("adapter.target_r", 8, ["adapter.kind = 'adalora'", "adapter.target_r = 17"]),
    ("model.revision", 4, ["model.revision = 'main'"]),
    ("data.output_column", 7, ["data.output_column = 'input'"]),
    ("data.site_column", 7, ["data.site_column = ''"]),
    ("data.num_sites", 7, ["data.partition = 'iid'"]),
    ("data.num_sites", 8, ["data.partition = 'dirichlet'", "data.num_sites = 0"]),
    ("data.num_sites", 7, ["data.num_sites = 4"]),
    ("data.num_sites", 7, ["data.num_sites = 3", "data.partition = 'iid'", "federation.num_sites = 4"]),
    ("data.dirichlet_alpha", 7, ["data.dirichlet_alpha = 0.1"]),
    ("training.local_steps", 8, ["training.local_epochs = 1.0", "training.local_steps = 5"]),
    ("training.local_epochs", 7, ["training.local_epochs = 0"]),
    ("training.micro_batch_size", 7, ["training.micro_batch_size = 3"]),
    ("training.micro_batch_size", 7, ["training.micro_batch_size = 16"]),
    ("training.micro_batch_tokens", 8, ["training.micro_batch_size = 4", "training.micro_batch_tokens = 4096"]),
    ("training.final_rate_fraction", 8, ["training.schedule = 'constant'", "training.final_rate_fraction = 0.1"]),
    ("federation.sites_per_round", 7, ["federation.sites_per_round = 1"]),
    ("evaluation.sites_per_round", 7, ["evaluation.sites_per_round = 5", "aggregation.method = 'fedsa'"]),
    ("federation.num_sites", 7, ["federation.num_sites = 1"]),
    ("aggregation.method", 7, ["aggregation.method = 'fedsvd'", "aggregation.server_optimizer.kind = 'fedadam'"]),
    ("aggregation.residual_rank", 7, ["aggregation.residual_rank = 8"]),
    ("aggregation.residual_max_lost", 7, ["aggregation.residual_max_lost = 0.5"]),
    ("aggregation.num_heads", 7, ["aggregation.num_heads = 8"]),
    ("aggregation.num_heads", 8, ["aggregation.method = 'ravan'", "aggregation.num_heads = 3"]),
    ("privacy.clipping", 8, [*PRIVATE, "aggregation.method = 'ravan'", "privacy.clipping = 'stacked'"]),
    ("aggregation.proximal", 9, ["training.learning_rate = 0.1", "aggregation.proximal = 10.0"]),
    ("aggregation.max_weight_share", 8, ["aggregation.weighting = 'uniform'", "aggregation.max_weight_share = 0.4"]),
    ("aggregation.weighting", 7, [*KRUM, "federation.min_sites = 5"]),
    ("federation.min_sites", 11, [*KRUM, "aggregation.weighting = 'uniform'", "federation.min_sites = 4"]),
    ("federation.min_sites", 9, ["aggregation.screening.action = 'drop'", "federation.min_sites = 3"]),
    ("privacy.clip_learning_rate", 8, [*PRIVATE, "privacy.clip_learning_rate = 0.3"]),
    ("privacy.clip_quantile", 8, [*PRIVATE, "privacy.clip_quantile = 0.3"]),
    ("privacy.max_rows_per_unit", 8, [*PRIVATE, "privacy.max_rows_per_unit = 9"]),
    ("training.max_grad_norm", 10, [*PRIVATE, "training.max_grad_norm = 5.0"]),
    ("privacy.epsilon", 5, [UNIT, PRIVATE[1], PRIVATE[3]]),
    ("training.local_steps", 5, PRIVATE[:3]),
    ("training.objective.reference_point", 10, [*PRIVATE, "training.objective.kind = 'kto'"]),
    ("training.objective.kind", 7, ["training.objective.kind = 'dpo'", "evaluation.exact_match_rows = 5"]),
    ("training.objective.kind", 7, ["training.objective.kind = 'dpo'", "data.output_column = 'answer'"]),
    ("wire.density", 11, [*PRIVATE, "wire.density = 0.1"]),
    ("wire.density", 13, [*KRUM, UNIFORM, "federation.min_sites = 5", "wire.density = 0.1"]),
    ("wire.error_feedback", 7, ["wire.error_feedback = false"]),
    (
        "adapter.site_ranks",
        7,
        [
            "adapter.site_ranks = {a = 2}",
            "aggregation.method = 'fedsvd'",
            "federation.min_sites = 4",
            "aggregation.screening.action = 'drop'",
        ],
    ),
    ("aggregation.weighting", 5, SITE[:-1]),
    (
        "aggregation.robust.rule",
        14,
        [*SITE, "federation.min_sites = 5", "aggregation.robust.num_bad_sites = 1", KRUM[0]],
    ),
    ("aggregation.screening.action", 13, [*SITE, "federation.min_sites = 5", "aggregation.screening.action = 'drop'"]),
    ("aggregation.max_update_norm", 12, [*SITE, "aggregation.max_update_norm = 1.0"]),
    ("federation.sites_per_round", 10, [*SITE, "federation.sites_per_round = 5"]),
    ("federation.num_sites", 5, [*SITE[:3], SITE[4]]),
    ("privacy.dp_delta", 8, [*SITE, "privacy.dp_delta = 1e-4"]),
    ("privacy.sampling_prob", 6, [*SITE, "privacy.noise_at = 'sites'"]),
    (
        "privacy.adaptive_clipping",
        9,
        [
            SITE[0],
            "privacy.sampling_prob = 1.0",
            *SITE[2:],
            "privacy.noise_at = 'sites'",
            "privacy.adaptive_clipping = true",
        ],
    ),
    ("evaluation.tasks", 7, [f"evaluation.tasks = [{TASK}, {TASK}]"]),
    ("evaluation.tasks_every_rounds", 7, ["evaluation.tasks_every_rounds = 2"]),
    ("evaluation.num_polish_stages", 7, ["evaluation.num_polish_stages = 1"]),
    ("export.formats", 7, ["export.formats = ['peft']", "aggregation.method = 'fedsa'"]),
    ("export.gguf_type", 8, ["export.formats = ['peft']", "export.gguf_type = 'q8_0'"]),
    ("export.gguf_type", 8, ["export.formats = ['gguf']", "export.gguf_type = 'q8_0'"]),
    ("export.llama_cpp", 8, ["export.formats = ['peft']", "export.llama_cpp = 'llama.cpp'"]),
    ("export.rows", 8, ["export.formats = ['peft', 'vllm']", "export.rows = 'rows.jsonl'"]),
    ("export.operator_key", 7, ["export.operator_key = 'op.pem'"]),
    ("gate.evidence", 7, ["gate.evidence = 'interval'"]),
    ("gate.min_rows", 7, ["gate.min_rows = 5"]),
    *(("gate.rules", 7, [f"gate.rules = [{{kind = '{kind}'}}]"]) for kind in ("probes", "schema", "exposure", "pii")),
    ("gate.rules", 9, [f"evaluation.tasks = [{TASK}]", "gate.rules = [{kind = 'baseline'}]"]),
    ("gate.rules", 7, ["gate.rules = [{kind = 'audit', file = 'audit.json'}]"]),
    ("gate.rules", 7, ["gate.rules = [{kind = 'figure', figure = 'b.acc', bound = 'min', limit = 0.5}]"]),
]


@pytest.mark.parametrize(("key", "line", "settings"), BROKEN_RULES)
def test_contradiction_is_refused(key: str, line: int, settings: list[str]):
    message = problems(with_settings(*settings))
    assert message.startswith(f"1 problem in run.toml\n  {key}  ")
    assert message.endswith(f"\n    run.toml:{line}")


def test_a_stage_that_needs_a_reference_does_not_follow_a_method_with_a_side_adapter():
    flora = with_settings("aggregation.method = 'flora'", "aggregation.residual_rank = 8")
    message = problems(STAGE + flora)
    assert message.startswith("1 problem in run.toml\n  polish  this method keeps a side adapter")
    assert message.endswith("\n    run.toml:1")
    config.parse(STAGE.replace("dpo", "sft") + flora, name="run.toml")  # the control


def test_a_gate_that_asks_sites_goes_with_polish_only_if_they_are_asked_after_it():
    message = problems(STAGE + with_settings("gate.rules = [{kind = 'sites'}, {kind = 'loss'}]"))
    assert message.startswith("1 problem in run.toml\n  gate.rules  sites are not asked after polish")
    asked = with_settings("gate.rules = [{kind = 'sites'}, {kind = 'loss'}]", "evaluation.num_polish_stages = 1")
    config.parse(STAGE + asked, name="run.toml")  # the control


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.num_polish_stages = 2"], "there are fewer stages"),
        (["aggregation.method = 'flexlora'", "adapter.site_ranks = {north = 4}"], "would score a part of"),
        (["aggregation.method = 'fedsa'"], "with factors of their own in the place of its"),
    ],
)
def test_sites_do_not_score_after_polish_what_is_not_the_adapter(settings, message):
    asked = "evaluation.num_polish_stages = 1"
    assert message in problems(
        STAGE + with_settings(*{line.partition(" =")[0]: line for line in (asked, *settings)}.values())
    )
    config.parse(STAGE + with_settings(asked), name="run.toml")  # the control


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["privacy.clip_norm = 2.0"], 'clip_norm  has no effect with mode = "none"; remove it, or set privacy.mode to'),
        ([*PRIVATE, "privacy.noise_at = 'sites'"], 'noise_at  has no effect with mode = "unit"; remove it, or set'),
        ([*SITE, "privacy.max_rows_per_unit = 2"], 'has no effect with mode = "site"; remove it, or set privacy.mode'),
        ([*SITE, "privacy.clipping = 'auto'"], 'has no effect with mode = "site"; remove it, or set privacy.mode to'),
        ([UNIT, *PRIVATE[2:]], "privacy.sampling_prob  must be set: the probability with which a unit is in a step"),
        (["training.objective.beta = 0.5"], 'has no effect with kind = "sft"; remove it, or set'),
        (["training.beta = 0.5"], "training.beta  unknown setting; here it is training.objective.beta"),
        (["training.objective.kind = 'kto'", "training.objective.label_smoothing = 0.1"], 'kind to "dpo"'),
        (["training.objective.kind = 'dpo'", "training.objective.desirable_weight = 2.0"], 'kind to "kto"'),
        (["training.objective.kind = 'dpo'", "training.objective.undesirable_weight = 2.0"], 'kind to "kto"'),
        (["training.objective.kind = 'dpo'", "training.objective.reference_point = 'zero'"], 'kind to "kto"'),
        (["training.optimizer.momentum = 0.9"], 'set training.optimizer.kind to "sgd"'),
        (["training.optimizer.kind = 'sgd'", "training.optimizer.beta1 = 0.8"], 'has no effect with kind = "sgd"'),
        (["training.optimizer = 'sgd'"], 'must be a section, [training.optimizer] (you wrote "sgd"); write "sgd" as'),
        (["training.adam_beta1 = 0.8"], "here it is training.optimizer.beta1"),
    ],
)
def test_a_setting_of_another_variant_is_refused(settings: list[str], message: str):
    found = problems(with_settings(*settings))
    assert found.startswith("1 problem in run.toml\n")
    assert message in found


def test_every_rule_is_broken_by_a_test():
    assert {rule.keys[0] for rule in rules.RUN_RULES} == {key for key, _, _ in BROKEN_RULES} | {"polish"}


@pytest.mark.parametrize(
    "settings",
    [
        ("data.partition = 'iid'", "data.num_sites = 4", "federation.sites_per_round = 4"),
        ("data.partition = 'dirichlet'", "data.num_sites = 4", "data.dirichlet_alpha = 0.1"),
        ("training.local_epochs = 0", "training.local_steps = 5"),
        ("training.local_epochs = 0.5",),
        ("training.batch_size = 12", "training.micro_batch_size = 4"),
        ("training.batch_size = 12", "training.micro_batch_tokens = 100"),
        ("training.optimizer.kind = 'sgd'", "training.optimizer.momentum = 0.9"),
        ("training.optimizer.beta1 = 0.8",),
        ("federation.sites_per_round = 2", "federation.num_sites = 3"),
        ("federation.min_sites = 1",),
    ],
)
def test_what_fits_together_is_accepted(settings: tuple[str, ...]):
    config.parse(with_settings(*settings), name="run.toml")


def test_rule_defaults_are_the_schema_s():
    assert config.DataConfig().dirichlet_alpha == 0.5


def test_config_built_in_code_is_checked_too():
    run = json.loads(config.resolved_json(config.parse(MINIMAL, name="run.toml")))
    run["federation"]["sites_per_round"] = 1
    with pytest.raises(ValidationError, match="sites_per_round"):
        config.RunConfig.model_validate(run)
