"""What an active coordinator may offer to a site: each refused, logged with its rule, nothing read and nothing sent.

Names carry the numbers of the attack table. Each has a control: the same request succeeds where the rule allows it.
"""

import dataclasses
import json

import pytest

from client.memory.history import AUDIT_FILE
from client.policy import rules
from common.frame import wire
from common.frame.records import TensorSpec
from common.frame.wire import Frame
from common.run import manifest
from common.run.manifest import Offer, RunManifest
from common.trust import audit_log, identity
from tests.samples import vault

POLICY = "PolicyRefusedError"


def with_specs(run: RunManifest, *specs: TensorSpec) -> RunManifest:
    return RunManifest(run.run, run.base_sha256, (*run.tensor_specs, *specs))


def test_control_a_run_within_all_rules_is_played(site):
    run = site.manifest()
    assert site.open(run).kind == "opened"
    assert site.step("evaluate").kind == "metrics"
    for number in range(2):
        assert site.step("train", round_index=number).kind == "update"
        assert site.step("evaluate", round_index=number + 1).kind == "metrics"
    assert [step for step, _ in site.sent()] == ["open", "evaluate", "train", "evaluate", "train", "evaluate"]
    assert not site.errors


def test_rows_are_not_read_for_an_offer_that_is_refused(site):
    run = site.manifest()
    probing = site.manifest(training__learning_rate="1e-9")
    for offer in (Offer(run.to_bytes()), site.offer(run), site.offer(run, key=vault.STRANGER), site.offer(probing)):
        assert site.ask(offer.to_frame()).kind == "refused"
    assert site.num_reads == 0
    assert site.open().kind == "opened"
    assert site.num_reads == 1


def test_a02_unsigned_manifest(site):
    site.approve(site.manifest())
    answer = site.ask(Frame("open", body=site.manifest().to_bytes()))
    assert site.refused(answer) == (POLICY, "federation.operators")
    assert site.open().kind == "opened"


def test_a02_offer_for_a_hundred_years(site):
    site.approve(site.manifest())
    for days in (36_500, 367):
        assert site.refused(site.ask(site.offer(days=days).to_frame())) == (POLICY, "federation.not_after")
    assert site.ask(site.offer(days=365).to_frame()).kind == "opened"


def test_a02_manifest_signed_by_a_stranger_or_for_another_federation(site):
    site.approve(site.manifest())
    assert site.refused(site.ask(site.offer(key=vault.STRANGER).to_frame())) == (POLICY, "federation.operators")
    assert site.refused(site.ask(site.offer(federation="other").to_frame())) == (POLICY, "federation.id")
    assert site.ask(site.offer().to_frame()).kind == "opened"


def test_a02_manifest_altered_after_signing(site):
    altered = site.manifest(training__learning_rate="3e-2")
    site.approve(altered)
    good = site.offer()
    answer = site.ask(Offer(altered.to_bytes(), good.signature).to_frame())
    assert site.refused(answer) == (POLICY, "federation.operators")
    assert site.ask(site.offer(altered).to_frame()).kind == "opened"


def test_a02_manifest_past_its_date(site):
    site.approve(site.manifest())
    site.now += 2 * 86_400
    assert site.refused(site.ask(site.offer().to_frame())) == (POLICY, "federation.not_after")
    assert site.ask(site.offer(days=3).to_frame()).kind == "opened"


def test_a03_run_that_nobody_approved(site):
    answer = site.ask(site.offer().to_frame())
    assert (answer.kind, answer.head["code"]) == ("refused", "ApprovalRequired")
    last = site.log()[-1]
    assert (last.kind, last.facts["rule"], last.facts["run"]) == ("offered", "runs.approval", site.manifest().sha256)
    assert site.sent() == []
    assert site.open().kind == "opened"


def test_a03_run_that_was_denied(site):
    site.approve(site.manifest(), is_approved=False)
    assert site.refused(site.ask(site.offer().to_frame())) == ("ApprovalDenied", "runs.approval")
    assert site.open().kind == "opened"


def test_a03_run_that_was_changed_after_approval(site):
    site.approve(site.manifest())
    other = site.manifest(training__learning_rate="3e-2")
    assert site.ask(site.offer(other).to_frame()).head["code"] == "ApprovalRequired"
    assert site.ask(site.offer().to_frame()).kind == "opened"


def test_a03_approval_that_is_taken_back_while_the_run_goes_on(open_site):
    assert open_site.step().kind == "update"
    open_site.approve(open_site.manifest(), is_approved=False)
    assert open_site.refused(open_site.step(round_index=1)) == ("ApprovalDenied", "runs.approval")
    open_site.approve(open_site.manifest())
    assert open_site.step(round_index=1).kind == "update"


def test_a03_an_approval_that_was_written_by_another_key_stops_the_site(site):
    log = site.folder / AUDIT_FILE
    head = site.gate._log.head
    forged = {"sequence": head.sequence + 1, "time": 1.0, "kind": "approved", "previous": head.sha256}
    forged["facts"] = {"run": site.manifest().sha256, "by": "nobody"}
    signature = identity.sign(vault.STRANGER, wire.canonical_json(forged), purpose=audit_log.PURPOSE)
    whole = log.read_bytes()
    log.write_bytes(whole + wire.canonical_json({**forged, "signature": signature}) + b"\n")
    assert site.ask(site.offer().to_frame()).head["code"] == "AuditError"
    log.write_bytes(whole)
    assert site.open().kind == "opened"


@pytest.mark.parametrize("key", ["training", "privacy", "secrets"])
def test_a04_key_that_the_manifest_does_not_have(site, key):
    fields = json.loads(site.manifest().to_bytes())
    own = {**fields["run"].get(key, {}), "no_such_key": 1}
    data = wire.canonical_json({**fields, "run": {**fields["run"], key: own}})
    site.approve(site.manifest())
    signed = manifest.sign(_Bytes(data), vault.OPERATOR, federation="onco-eu", not_after=int(site.now) + 9)
    assert site.refused(site.ask(signed.to_frame())) == ("WireError", "WireError")
    assert site.ask(site.offer().to_frame()).kind == "opened"


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Stands for a manifest whose bytes nobody could have made."""

    data: bytes

    def to_bytes(self) -> bytes:
        return self.data


def test_a04_setting_that_no_rule_judges(site, monkeypatch):
    site.approve(site.manifest())
    with monkeypatch.context() as patch:
        patch.setattr(rules, "KNOWN", rules.KNOWN - {"training.optimizer.epsilon"})
        assert site.refused(site.ask(site.offer().to_frame())) == (POLICY, "manifest")
    assert site.ask(site.offer().to_frame()).kind == "opened"


@pytest.mark.parametrize("rule", ["mode", "secagg"])
def test_a07_run_without_the_protection_that_the_site_requires(make, rule):
    strict = make(**{rule: '"required"'})
    assert strict.refused(strict.open()) == (POLICY, f"privacy.{rule}")
    assert make().open().kind == "opened"


@pytest.mark.parametrize("changes", [{"min_sites": "3"}, {"min_sites": "4"}])
def test_a08_cohort_below_the_minimum(make, changes):
    strict = make(**changes)
    assert strict.refused(strict.open()) == (POLICY, "cohort.min_sites")
    assert strict.open(strict.manifest(federation__min_sites="4", federation__num_sites="4")).kind == "opened"


def test_a08_cohort_of_one(site):
    alone = site.manifest(federation__min_sites="1", federation__num_sites="1")
    assert site.refused(site.open(alone)) == (POLICY, "cohort.min_sites")
    drawn = site.manifest(federation__min_sites="1", federation__sites_per_round="1")
    assert site.refused(site.open(drawn)) == (POLICY, "cohort.min_sites")
    assert site.open().kind == "opened"


def test_a10_base_that_is_not_listed(make):
    strict = make(sha256=f'"{"ab" * 32}"')
    assert strict.refused(strict.open()) == (POLICY, "models.allow")
    assert make().open().kind == "opened"


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_A.weight",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.bias",
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight",
        "base_model.model.model.embed_tokens.q_proj.lora_A.weight",
    ],
)
def test_a11_target_that_lists_tokens_or_is_not_allowed(site, name):
    run = with_specs(site.manifest(), TensorSpec(name, (4, 64)))
    assert site.refused(site.open(run)) == (POLICY, "lora.targets")
    assert site.open().kind == "opened"


def test_a11_rank_out_of_range(make):
    narrow = make(r="[8, 16]")
    assert narrow.refused(narrow.open()) == (POLICY, "lora.r")
    site = make()
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    wide = with_specs(site.manifest(), TensorSpec(name, (17, 64)))
    assert site.refused(site.open(wide)) == (POLICY, "lora.r")
    assert site.open().kind == "opened"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"training__learning_rate": "1e-9"}, "train.learning_rate"),
        ({"training__learning_rate": "5.0"}, "train.learning_rate"),
        ({"training__local_steps": "1", "training__local_epochs": "0.0"}, "train.min_local_steps"),
        ({"training__batch_size": "1"}, "train.min_batch_size"),
        ({"training__warmup_fraction": "0.9"}, "train.max_warmup_fraction"),
        ({"training__optimizer__kind": '"sgd"'}, "train.optimizers"),
        ({"federation__num_rounds": "5"}, "train.max_rounds"),
        ({"data__max_length_tokens": "128"}, "train.max_length_tokens"),
    ],
)
def test_a12_training_that_reads_single_gradients(site, changes, rule):
    assert site.refused(site.open(site.manifest(**changes))) == (POLICY, rule)
    assert site.open().kind == "opened"


@pytest.mark.parametrize(("rule", "value"), [("min_records", "10"), ("min_local_steps", "4")])
def test_a12_too_few_records_or_steps_at_this_site(make, rule, value):
    strict = make(**{rule: value})
    assert strict.refused(strict.open()) == (POLICY, f"train.{rule}")
    assert strict.sent() == []
    assert strict.refused(strict.step()) == ("ProtocolError", "ProtocolError")  # the run did not open
    assert make().open().kind == "opened"


def test_a12_a_method_that_the_policy_does_not_list(make):
    site = make(max_rounds='4\nmethods = ["ffa", "fedsvd"]')
    assert site.refused(site.open()) == (POLICY, "train.methods")
    assert site.open(site.manifest(aggregation__method='"ffa"')).kind == "opened"


def test_a22_text_and_template_of_the_server(make):
    site = make()
    spoken = site.manifest(data__system_prompt='"Repeat the note."')
    assert site.refused(site.open(spoken)) == (POLICY, "data.system_prompts")
    formed = site.manifest(model__chat_template='"alpaca"')
    assert site.refused(site.open(formed)) == (POLICY, "models.allow.chat_template")
    allowed = make(max_rows='100\n\n[data]\nsystem_prompts = ["", "Repeat the note."]')
    assert allowed.open(spoken).kind == "opened"
