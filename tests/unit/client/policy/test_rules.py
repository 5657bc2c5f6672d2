"""The policy file: its schema, its signature and its rules against a run. `tests/attacks` plays them against a site."""

from pathlib import Path

import pytest

from client.policy import file
from client.policy import rules as policy
from client.policy.rules import Usage
from common.errors import ConfigError, PolicyRefusedError
from common.frame.records import OpenedHead, TensorSpec
from common.run import config, egress
from common.run.manifest import RunManifest
from common.run.schema import shape
from common.trust import identity
from tests import tiny
from tests.samples import vault

BASE = "ab" * 32
SPECS = (TensorSpec("m.q_proj.lora_A.weight", (4, 64)), TensorSpec("m.q_proj.lora_B.weight", (64, 4)))


def rules(**changes: str) -> file.Policy:
    return file.parse(vault.policy_text(BASE, **changes), name="policy.toml")


def run(changes: dict[str, str] | None = None) -> RunManifest:
    return RunManifest(tiny.settings("tiny", changes), BASE, SPECS)


def refused(site_rules: file.Policy, run_manifest: RunManifest, usage: Usage = Usage()) -> PolicyRefusedError:  # noqa: B008
    with pytest.raises(PolicyRefusedError) as caught:
        policy.check(site_rules, run_manifest, usage)
    return caught.value


def test_a_run_within_the_rules_passes():
    policy.check(rules(), run(), Usage())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serial": '"3"'}, "serial"),
        ({"r": "[16, 2]"}, "lora.r"),
        ({"r": "[0, 2]"}, "lora.r"),
        ({"learning_rate": "[1e-3]"}, "train.learning_rate"),
        ({"targets": '["q_proj", "embed_tokens"]'}, "embed_tokens can never be trained"),
        ({"targets": '["model.lm_head"]'}, "lm_head"),
        ({"mode": '"off"'}, "privacy.mode"),
        ({"num_exact": "[0, 1]\ntext_of_rows = [0, 1]"}, "no such figure: text_of_rows"),
        ({"min_sites": "2\nno_such_rule = 1"}, "cohort.no_such_rule"),
        ({"min_slice": "3\ngenerations_leave = true"}, "evaluation.generations_leave"),
        ({"sha256": '"short"'}, "models.allow.1.sha256"),
        ({"r": "4"}, "lora.r  must be an array (you wrote 4)"),
        ({"max_bytes_per_run": "1979-05-27"}, "not a policy in TOML"),
        ({"max_bytes_per_run": "nan"}, "not a policy in TOML"),
        ({"max_bytes_per_run": "]"}, "not a policy in TOML"),
    ],
)
def test_a_policy_with_a_mistake_is_refused_and_the_key_is_named(change, message):
    with pytest.raises(ConfigError) as caught:
        rules(**change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha256": '"<64 digits>"'}, 'sha256  is not filled in: write your own value in the place of "<64 digits>"\n'),
        ({"sha256": '"<64 digits>"'}, "  models.allow.1.sha256  is not filled in"),
        ({"sha256": '"<64 digits>"'}, "    policy:11"),
        ({"path": '"<folder of your rows>"'}, "data.datasets.notes.path  is not filled in"),  # valid for the schema
        ({"operators": '["<64 digits of the operator>"]'}, "federation.operators.1  is not filled in"),
    ],
)
def test_what_a_template_leaves_open_is_named_by_key_and_line(change, told):
    with pytest.raises(ConfigError) as caught:
        file.parse(vault.policy_text(BASE, **change), name="policy")
    assert told in str(caught.value)
    assert "1 problem in policy" in str(caught.value)
    assert "pattern" not in str(caught.value)


def test_a_prompt_in_angle_brackets_is_no_placeholder():
    text = vault.policy_text(BASE).replace(
        "[data.datasets.notes]", '[data]\nsystem_prompts = ["<be brief>"]\n\n[data.datasets.notes]'
    )
    assert file.parse(text, name="policy").data.system_prompts == ("<be brief>",)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match="2 problems"):
        rules(min_sites="0", mode='"off"')


def test_every_setting_of_a_run_has_a_rule_or_was_found_harmless():
    """A new setting needs a rule in client/policy/rules.py, or its place in KNOWN."""
    assert {*shape.keys_of(config.RunConfig), "polish", "evaluation.tasks", "gate.rules"} == policy.KNOWN


def test_a_refusal_names_rule_value_and_limit():
    error = refused(rules(), run({"training.learning_rate": "1e-9"}))
    assert error.rule == "train.learning_rate"
    assert str(error) == "train.learning_rate: 1e-09 is not from 0.001 to 0.1"


def test_limits_themselves_are_allowed():
    for rate in ("1e-3", "1e-1"):
        policy.check(rules(), run({"training.learning_rate": rate}), Usage())


def test_a_rate_that_is_no_number_cannot_pass():
    broken = run().run.training.model_copy(update={"learning_rate": float("nan")})
    other = run().run.model_copy(update={"training": broken})
    assert refused(rules(), RunManifest(other, BASE, SPECS)).rule == "train.learning_rate"


def test_steps_that_a_run_names_are_judged_before_a_row_is_read():
    few = run({"training.local_steps": "1", "training.local_epochs": "0.0"})
    assert refused(rules(), few).rule == "train.min_local_steps"


def test_rows_that_are_answered_have_a_floor():
    policy.check(rules(), run({"evaluation.exact_match_rows": "3"}), Usage())
    assert refused(rules(), run({"evaluation.exact_match_rows": "2"})).rule == "evaluation.min_slice"


def test_a_step_may_not_go_back_so_far_that_only_the_last_gradient_leaves():
    pulled = run({"aggregation.proximal": "100.0", "training.learning_rate": "0.001"})
    policy.check(rules(), pulled, Usage())
    assert refused(rules(max_rounds="4\nmax_pull = 0.09"), pulled).rule == "train.max_pull"


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_learnt_only_where_the_policy_names_them(objective):
    asked = run({"training.objective.kind": f'"{objective}"'})
    assert refused(rules(), asked).rule == "train.objectives"
    assert "is not one of sft" in str(refused(rules(), asked))
    assert refused(rules(max_rounds='4\nobjectives = ["sft"]'), asked).rule == "train.objectives"
    allowed = {"max_rounds": f'4\nobjectives = ["{objective}"]'}
    assert refused(rules(**allowed), asked).rule == "egress.metrics"
    figures = "[0, 1e6]\npreference_loss_sum = [0, 1e9]\nnum_preferred = [0, 1e9]"
    policy.check(rules(**allowed, num_exact=figures), asked, Usage())
    assert refused(rules(**allowed), run()).rule == "train.objectives"


def test_the_columns_of_preferences_must_be_listed_too():
    dataset = file.DatasetRules(path="rows.jsonl", columns=("prompt", "chosen"), max_rows=10)
    policy.check_columns(dataset, "sft")
    with pytest.raises(PolicyRefusedError, match=r"data\.datasets\.columns: .*'dpo' reads rejected, not listed"):
        policy.check_columns(dataset, "dpo")
    whole = dataset.model_copy(update={"columns": ("prompt", "chosen", "rejected")})
    policy.check_columns(whole, "dpo")


def test_runs_of_the_day_are_counted():
    policy.check(rules(max_per_day="2"), run(), Usage(num_runs_today=1))
    assert refused(rules(max_per_day="2"), run(), Usage(num_runs_today=2)).rule == "runs.max_per_day"


def test_the_runs_that_a_version_without_protection_offers_are_refused_where_it_is_required():
    assert "privacy.mode = 'none'" in str(refused(rules(mode='"required"'), run()))
    assert "this version has none" in str(refused(rules(secagg='"required"'), run()))


def test_a_run_that_trains_nothing_is_refused():
    assert refused(rules(), RunManifest(run().run, BASE, ())).rule == "lora.targets"


def test_every_rank_of_a_run_must_be_allowed():
    mixed = {"aggregation.method": "fedsvd", "adapter.site_ranks.south": "2"}
    policy.check(rules(r="[2, 16]"), run(mixed), Usage())
    assert refused(rules(r="[3, 16]"), run(mixed)).rule == "lora.r"


def test_a_side_adapter_and_the_methods_that_keep_one_need_a_line_of_their_own():
    beside = (TensorSpec("m.q_proj.residual_A.weight", (8, 4)), TensorSpec("m.q_proj.residual_B.weight", (4, 8)))
    kept = run({"aggregation.method": "fedex", "aggregation.residual_rank": "8"})
    wide = RunManifest(kept.run, BASE, (*SPECS, *beside))
    assert refused(rules(), wide).rule == "lora.residual_r"
    assert refused(rules(r="[2, 16]\nresidual_r = 7"), wide).rule == "lora.residual_r"
    assert refused(rules(r="[2, 16]\nresidual_r = 8"), wide).rule == "train.methods"
    policy.check(rules(r="[2, 16]\nresidual_r = 8", max_rounds='4\nmethods = ["fedex"]'), wide, Usage())
    elsewhere = RunManifest(kept.run, BASE, (*SPECS, TensorSpec("m.lm_head.residual_A.weight", (8, 4))))
    assert refused(rules(r="[2, 16]\nresidual_r = 8"), elsewhere).rule == "lora.targets"


def test_cores_are_judged_by_the_rank_of_their_factors_and_their_method_needs_a_line():
    settings = run({"aggregation.method": "ravan"}).run
    cored = RunManifest(settings, BASE, (*SPECS, TensorSpec("m.q_proj.lora_H.weight", (4, 1))))
    assert refused(rules(), cored).rule == "train.methods"
    policy.check(rules(max_rounds='4\nmethods = ["ravan"]'), cored, Usage())
    wide = RunManifest(settings, BASE, (*SPECS, TensorSpec("m.q_proj.lora_H.weight", (400, 1))))
    assert refused(rules(), wide).rule == "lora.r"
    odd = RunManifest(settings, BASE, (*SPECS, TensorSpec("m.q_proj.residual_H.weight", (4, 1))))
    assert refused(rules(), odd).rule == "lora.targets"


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 4)])
def test_a_tensor_that_is_no_matrix_is_refused(shape):
    odd = RunManifest(run().run, BASE, (*SPECS, TensorSpec("m.k_proj.lora_A.weight", shape)))
    assert refused(rules(), odd).rule == "lora.r"


def node(**data: str) -> config.NodeDataConfig:
    return config.NodeDataConfig(**{"path": "rows.jsonl", **data})


def test_a_site_reads_listed_rows_and_columns_only():
    assert policy.check_node(rules(), node()).max_rows == 100
    for wrong, rule in (
        ({"path": "other.jsonl"}, "data.datasets"),
        ({"held_out_path": "other.jsonl"}, "data.datasets"),
        ({"input_column": "diagnosis"}, "data.datasets.columns"),
    ):
        with pytest.raises(PolicyRefusedError) as caught:
            policy.check_node(rules(), node(**wrong))
        assert caught.value.rule == rule


def test_more_rows_than_may_be_read_are_refused():
    dataset = policy.check_node(rules(), node())
    head = OpenedHead("north", BASE, num_examples=80, num_held_out=20, num_truncated=0, num_dropped=0, num_steps=20)
    policy.check_opened(rules(), dataset, head, run().run.training, num_rounds=run().run.federation.num_rounds)
    with pytest.raises(PolicyRefusedError) as caught:
        policy.check_opened(
            rules(max_rows="99"),
            policy.check_node(rules(max_rows="99"), node()),
            head,
            run().run.training,
            num_rounds=run().run.federation.num_rounds,
        )
    assert caught.value.rule == "data.datasets.max_rows"


def test_a_signed_policy_loads_and_is_known_by_its_hash(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(vault.policy_text(BASE))
    assert file.sign(path, vault.ADMIN).serial == 3
    assert file.signature_path(path) == tmp_path / "policy.toml.sig"
    assert file.signature_path(path).exists()
    admin = identity.public_hex(vault.ADMIN)
    first = file.load(path, signer=admin)
    assert first.rules == rules()
    path.write_text(vault.policy_text(BASE, serial="4"))
    file.sign(path, vault.ADMIN)
    assert file.load(path, signer=admin).sha256 != first.sha256


def test_a_policy_without_signature_says_what_is_missing(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(vault.policy_text(BASE))
    with pytest.raises(ConfigError, match=r"policy\.toml\.sig is not there"):
        file.load(path, signer=identity.public_hex(vault.ADMIN))


def test_a_signature_for_another_purpose_is_none_for_a_policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(vault.policy_text(BASE))
    (tmp_path / "policy.toml.sig").write_text(identity.sign(vault.ADMIN, path.read_bytes(), purpose="roster"))
    with pytest.raises(PolicyRefusedError):
        file.load(path, signer=identity.public_hex(vault.ADMIN))


def test_a_policy_with_a_mistake_is_not_signed(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(vault.policy_text(BASE, min_sites="0"))
    with pytest.raises(ConfigError):
        file.sign(path, vault.ADMIN)
    assert list(tmp_path.iterdir()) == [path]


def test_policy_key_and_signer_belong_together():
    with pytest.raises(ConfigError, match="belong together"):
        config.parse_node(
            '[site]\nname = "north"\n[data]\npath = "x"\n[agent]\npolicy = "policy.toml"', name="node.toml"
        )


def test_the_policy_of_a_startup_kit_is_valid_and_allows_nothing():
    template = Path(__file__).parents[4] / "server" / "members" / "kit" / "policy.toml.j2"
    text = template.read_text().replace("{{ name }}", "alder").replace("{{ federation_id }}", "onco-eu")
    text = text.replace("{{ epoch }}", "2")
    site_rules = file.parse(text, name="policy.toml")
    assert refused(site_rules, run()).rule == "models.allow"
    assert set(site_rules.egress.metrics) == set(egress.RANGES)
    with pytest.raises(PolicyRefusedError):
        policy.check_node(site_rules, node())


WHOLE_SITES = {
    "privacy.mode": '"site"',
    "privacy.sampling_prob": "0.5",
    "privacy.noise_multiplier": "4.0",
    "aggregation.weighting": '"uniform"',
    "federation.num_sites": "20",
}


def test_noise_for_whole_sites_satisfies_a_site_that_requires_privacy_only_where_its_policy_says_so():
    required = '"required"\nsite_level = '
    assert refused(rules(mode='"required"'), run(WHOLE_SITES)).rule == "privacy.site_level"
    assert refused(rules(mode=required + '["sites"]'), run(WHOLE_SITES)).rule == "privacy.site_level"
    policy.check(rules(mode=required + '["server"]'), run(WHOLE_SITES), Usage())
    policy.check(rules(), run(WHOLE_SITES), Usage())  # a site that requires nothing


def test_noise_for_whole_sites_is_held_to_the_limits_of_privacy_and_to_the_cohort():
    weak = run({**WHOLE_SITES, "privacy.noise_multiplier": "0.5"})
    assert refused(rules(), weak).rule == "privacy.min_noise_multiplier"
    long = run({**WHOLE_SITES, "privacy.clip_norm": "3.0"})
    assert refused(rules(), long).rule == "privacy.max_clip_norm"
    few = run({**WHOLE_SITES, "privacy.sampling_prob": "0.05"})
    assert "1 is below 2" in str(refused(rules(), few))
