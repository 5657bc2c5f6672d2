"""A site's policy against kinds of adapters: listed by name, bounded in size, on layers that may be trained."""

import pytest

from client.policy import file
from client.policy import rules as policy
from client.policy.rules import Usage
from client.review import explain
from common.errors import PolicyRefusedError
from common.frame.records import TensorSpec
from common.run.manifest import RunManifest
from tests import tiny
from tests.samples import vault

BASE = "ab" * 32
IA3 = {"adapter.kind": "ia3"}
ALLOWED = '[2, 16]\n[adapter]\nkinds = ["lora", "ia3", "prompt_tuning", "ln_tuning"]\nmax_parameters = 200'
SPEC = TensorSpec("base_model.model.q_proj.ia3_l", (64, 1))


def rules(r: str = ALLOWED) -> file.Policy:
    return file.parse(vault.policy_text(BASE, r=r), name="policy.toml")


def offered(*specs: TensorSpec, **changes: str) -> RunManifest:
    return RunManifest(tiny.settings("tiny", {**IA3, **changes}), BASE, specs)


def test_a_listed_kind_within_its_size_passes():
    policy.check(rules(), offered(SPEC), Usage())


@pytest.mark.parametrize(
    ("site_rules", "run_manifest", "rule"),
    [
        ("[2, 16]", offered(SPEC), "adapter.kinds"),
        ('[2, 16]\n[adapter]\nkinds = ["ia3"]', offered(SPEC), "adapter.max_parameters"),
        (ALLOWED, offered(SPEC, TensorSpec("base_model.model.k_proj.ia3_l", (200, 1))), "adapter.max_parameters"),
        (ALLOWED, offered(TensorSpec("base_model.model.lm_head.ia3_l", (64, 1))), "lora.targets"),
        (ALLOWED, offered(TensorSpec("base_model.model.embed_tokens.q_proj.ia3_l", (64, 1))), "lora.targets"),
        (ALLOWED, offered(TensorSpec("base_model.model.q_proj.weight", (8, 8))), "adapter.kinds"),
        (ALLOWED, offered(SPEC, TensorSpec("base_model.model.q_proj.lora_A.weight", (2, 8))), "adapter.kinds"),
        (ALLOWED, offered(), "lora.targets"),
    ],
)
def test_anything_else_is_refused_by_its_rule(site_rules, run_manifest, rule):
    with pytest.raises(PolicyRefusedError) as caught:
        policy.check(rules(site_rules), run_manifest, Usage())
    assert caught.value.rule == rule


def test_norms_are_vectors_and_a_matrix_under_such_a_name_is_none():
    kind = {"adapter.kind": "ln_tuning"}
    policy.check(rules(), offered(TensorSpec("m.input_layernorm.ln_tuning_layers.weight", (64,)), **kind), Usage())
    wide = TensorSpec("m.input_layernorm.ln_tuning_layers.weight", (8, 8))
    with pytest.raises(PolicyRefusedError) as caught:
        policy.check(rules(), offered(wide, **kind), Usage())
    assert caught.value.rule == "lora.targets"


def test_virtual_tokens_touch_no_layer_and_are_bounded_by_their_size():
    kind = {"adapter.kind": "prompt_tuning"}
    policy.check(rules(), offered(TensorSpec("prompt_encoder.embedding.weight", (3, 64)), **kind), Usage())
    with pytest.raises(PolicyRefusedError) as caught:
        policy.check(rules(), offered(TensorSpec("prompt_encoder.embedding.weight", (4, 64)), **kind), Usage())
    assert caught.value.rule == "adapter.max_parameters"


def test_lora_itself_is_refused_where_it_is_not_listed():
    lora = RunManifest(tiny.settings("tiny"), BASE, (TensorSpec("m.q_proj.lora_A.weight", (4, 64)),))
    policy.check(rules(), lora, Usage())
    with pytest.raises(PolicyRefusedError):
        policy.check(rules('[2, 16]\n[adapter]\nkinds = ["ia3"]'), lora, Usage())


def test_the_policy_in_sentences_names_the_other_kinds():
    told = " ".join(sentence for part in explain.explain(rules()).values() for sentence in part)
    assert "at most 200 values: ia3 (" in told
    plain = explain.explain(rules("[2, 16]"))
    assert "ia3" not in str(plain)
