"""What a coordinator or a hostile courier may try on a site that takes part: rounds, quotas, bytes, answers, logs.

Names carry the numbers of the attack table; `test_agent.py` has the offers. Each case has a control.
"""

import dataclasses
import hashlib
import json
import os
import tomllib

import pytest
import safetensors.torch
import torch

from client.agent.agent import MAX_BODY_BYTES, SiteData
from client.memory.history import AUDIT_FILE
from client.policy import file
from common.adapter import adapter
from common.data.rows import Message, Row
from common.errors import AuditError, PolicyRefusedError
from common.frame import wire
from common.frame.wire import Frame
from common.run import egress
from common.trust import identity
from tests import tiny
from tests.samples import vault

POLICY = "PolicyRefusedError"
CANARY = "patient Ada Lovelace has a rare disease"


def changed(site, name_part: str, change) -> dict[str, torch.Tensor]:
    """The initial adapter with one kind of tensor changed."""
    return {name: change(t) if name_part in name else t for name, t in site.engine.initial.items()}


def test_a13_round_repeated_with_another_adapter(open_site):
    first = open_site.step()
    probe = changed(open_site, "lora_B", lambda t: t + 0.01)
    assert open_site.refused(open_site.step(state=probe)) == (POLICY, "rounds")
    assert "came again with another adapter" in str(open_site.errors[-1])  # and not by its answer, once it was trained
    again = open_site.step()
    assert (again.kind, again.body) == ("update", first.body)


def test_a13_round_repeated_after_a_restart(open_site):
    first = open_site.step()
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    probe = changed(open_site, "lora_B", lambda t: t + 0.01)
    assert open_site.refused(open_site.step(state=probe)) == (POLICY, "rounds")
    assert open_site.step().body == first.body


def test_a13_repeated_round_that_would_give_other_bytes(open_site):
    assert open_site.step().kind == "update"
    whole, open_site.data = open_site.data, tiny.site_data("north", 16)
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    assert open_site.refused(open_site.step()) == (POLICY, "rounds")  # the difference would speak of the new rows
    open_site.data = whole
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    assert open_site.step().kind == "update"


def test_a13_round_out_of_order(open_site):
    assert open_site.step(round_index=1).kind == "update"
    assert open_site.refused(open_site.step(round_index=0)) == (POLICY, "rounds")
    assert open_site.refused(open_site.step("evaluate", round_index=1)) == (POLICY, "rounds")
    assert open_site.step("evaluate", round_index=2).kind == "metrics"


def test_a13_round_beyond_the_last_and_another_runs_message(open_site):
    assert open_site.refused(open_site.step(round_index=2)) == ("ProtocolError", "ProtocolError")
    assert open_site.refused(open_site.step(run_sha256="ab" * 32)) == ("ProtocolError", "ProtocolError")
    assert open_site.step(round_index=1).kind == "update"


def test_a14_runs_per_day(make):
    site = make(max_per_day="1")
    assert site.open().kind == "opened"
    other = site.manifest(seed="9")
    assert site.refused(site.open(other)) == (POLICY, "runs.max_per_day")
    assert site.open(approve=False).kind == "opened"  # the day's run itself goes on
    site.now += 86_400
    assert site.ask(site.offer(other, days=5).to_frame()).kind == "opened"


def test_a14_quota_of_runs_survives_a_restart(make):
    site = make(max_per_day="1")
    assert site.open().kind == "opened"
    site.start()
    assert site.refused(site.open(site.manifest(seed="9"))) == (POLICY, "runs.max_per_day")
    assert site.open(approve=False).kind == "opened"


@pytest.mark.parametrize("rule", ["max_bytes_per_message", "max_bytes_per_run"])
def test_a14_bytes_that_the_manifest_announces(make, rule):
    strict = make(**{rule: "20_000"})
    assert strict.refused(strict.open()) == (POLICY, f"egress.{rule}")
    assert make().open().kind == "opened"


def test_a14_bytes_of_repeated_answers_count(make, engine):
    declared = vault.make(make().folder.parent / "probe", engine).manifest().plan.egress.bytes_per_round
    site = make(max_bytes_per_run=str(2 * declared + egress.HEAD_BYTES))
    assert site.open().kind == "opened"
    answers = [site.step() for _ in range(4)]
    assert [answer.kind for answer in answers[:2]] == ["update", "update"]
    assert site.refused(answers[3]) == (POLICY, "egress.max_bytes_per_run")


def test_a14_bytes_of_one_answer_have_the_declared_limit(open_site):
    """White space in the header of the tensors: what reads them takes it, and bits could be hidden there."""
    honest, limit = open_site.agent._steps["train"], open_site.manifest().plan.egress.bytes_per_message

    def padded(request, num_bytes=limit):
        reply = honest(request)
        size = int.from_bytes(reply.body[:8], "little")
        header = reply.body[8 : 8 + size] + b" " * num_bytes
        return dataclasses.replace(reply, body=len(header).to_bytes(8, "little") + header + reply.body[8 + size :])

    open_site.agent._steps["train"] = padded
    assert open_site.refused(open_site.step()) == (POLICY, "egress.max_bytes_per_message")
    open_site.agent._steps["train"] = lambda request: padded(request, 8)
    assert open_site.step().kind == "update"  # the control: as such it is read


def test_a15_adapter_of_wrong_names_shapes_or_values(open_site):
    name = next(iter(open_site.engine.initial))
    good = dict(open_site.engine.initial)
    for state in (
        {**good, name: torch.zeros(2, 2)},
        {**good, "lm_head.weight": torch.zeros(2)},
        {**good, name: torch.full_like(good[name], float("nan"))},
    ):
        assert open_site.refused(open_site.step(state=state)) == ("ModelError", "ModelError")
    half = adapter.encode(good, dtype="bfloat16")
    assert open_site.refused(open_site.step(state=half)) == ("WireError", "WireError")
    assert open_site.step().kind == "update"


def test_a15_adapter_that_makes_an_update_speak_of_single_rows(open_site):
    cases = {
        "train.max_tensor_norm": changed(open_site, "lora_B", lambda t: t + 500.0),
        "train.adapter": changed(open_site, "lora_A", torch.zeros_like),
    }
    for rule, state in cases.items():
        assert open_site.refused(open_site.step(state=state)) == (POLICY, rule)
    trap = changed(open_site, "lora_A", lambda t: t[:1].expand_as(t).clone())
    assert open_site.refused(open_site.step(state=trap)) == (POLICY, "train.adapter")
    assert open_site.step().kind == "update"


def test_a16_a17_bytes_that_are_no_adapter(open_site):
    good = adapter.encode(open_site.engine.initial, dtype="float32")
    size = int.from_bytes(good[:8], "little")
    cases = [
        b"",
        b"\x80\x04N.",  # a pickle
        b"PK\x03\x04" + bytes(60),  # a zip
        (10**10).to_bytes(8, "little") + good[8:],
        good + b"\0",
        good[:-1],
        good.replace(b'"F32"', b'"F16"', 1),
        good[:8] + good[8 : 8 + size].replace(b"[0,", b"[4,", 1) + good[8 + size :],
    ]
    for body in cases:
        code, _ = open_site.refused(open_site.step(state=body))
        assert code in ("WireError", "ModelError")
    assert open_site.step(state=good).kind == "update"


def test_a17_bytes_that_the_library_itself_reads(open_site):
    good = adapter.encode(open_site.engine.initial, dtype="float32")
    size = int.from_bytes(good[:8], "little")
    header, values = good[8 : 8 + size].strip(), good[8 + size :]
    noted = header.replace(b"{", b'{"__metadata__":{"x":"y"},', 1)
    padded = header + b" " * (2 << 20)
    other = header.replace(b'"F32"', b'"I32"')
    for changed in (noted, padded, other):
        body = len(changed).to_bytes(8, "little") + changed + values
        assert safetensors.torch.load(body).keys() == open_site.engine.initial.keys()  # the control: a lenient reader
        assert open_site.refused(open_site.step(state=body)) == ("WireError", "WireError")
    assert open_site.step(state=good).kind == "update"


def test_a16_message_that_is_declared_too_large(open_site):
    prefix = wire._PREFIX.pack(wire.MAGIC, wire.VERSION, 16, MAX_BODY_BYTES + 1)
    assert open_site.refused(open_site.ask(prefix + bytes(100))) == ("WireError", "WireError")
    assert open_site.step().kind == "update"


def test_a19_exception_that_carries_a_patients_row(site):
    def fail(_):
        raise ValueError(CANARY)

    load, site.agent._load_data = site.agent._load_data, fail
    assert site.refused(site.open()) == ("InternalError", "InternalError")
    assert CANARY in str(site.errors[-1])  # the control: it was there to be sent
    assert b"Ada" not in (site.folder / AUDIT_FILE).read_bytes()
    site.agent._load_data = load
    assert site.open(approve=False).kind == "opened"


@pytest.mark.parametrize(
    "change",
    [
        lambda f: dataclasses.replace(f, head={**f.head, "note": CANARY}),
        lambda f: dataclasses.replace(f, head={**f.head, "note": 0.5}),
        lambda f: dataclasses.replace(f, head={k: v for k, v in f.head.items() if k != "num_steps"}),
        lambda f: dataclasses.replace(f, head={**f.head, "train_loss": 21.0}),
        lambda f: dataclasses.replace(f, head={**f.head, "train_loss": CANARY}),
        lambda f: dataclasses.replace(f, head={**f.head, "train_loss": None}),
        lambda f: dataclasses.replace(f, head={**f.head, "audit_sha256": CANARY}),
        lambda f: dataclasses.replace(f, head={**f.head, "num_audit_entries": 7}),
        lambda f: dataclasses.replace(f, head={**f.head, "site": CANARY}),
        lambda f: dataclasses.replace(f, head={**f.head, "run_sha256": CANARY}),
        lambda f: dataclasses.replace(f, head={**f.head, "round_index": 1}),
    ],
)
def test_a20_reply_with_an_extra_field_or_a_figure_out_of_range(open_site, change):
    honest = open_site.agent._steps["train"]
    open_site.agent._steps["train"] = lambda request: change(honest(request))
    assert open_site.refused(open_site.step()) == (POLICY, "egress.metrics")
    open_site.agent._steps["train"] = honest
    assert open_site.step().kind == "update"


def test_a20_opening_that_tells_text(site):
    honest = site.agent._steps["open"]
    site.agent._steps["open"] = lambda r: dataclasses.replace(honest(r), head={**honest(r).head, "site": CANARY})
    assert site.refused(site.open()) == (POLICY, "egress.metrics")
    assert site.refused(site.step()) == ("ProtocolError", "ProtocolError")  # rows were read, and it is not open
    site.agent._steps["open"] = honest
    assert site.open(approve=False).kind == "opened"


def test_a20_a_factor_that_the_method_does_not_send_stays_and_one_that_it_fixes_is_not_taken(make):
    """Under `ffa` the up-projections alone leave; a server that sends a down-projection of its own is refused."""
    site = make()
    run = site.manifest(aggregation__method='"ffa"')
    whole = adapter.encode(site.engine.initial, dtype="float32")
    ups = {name: tensor for name, tensor in site.engine.initial.items() if ".lora_B." in name}
    assert site.open(run).kind == "opened"
    code, _ = site.refused(site.step(run=run, state=whole))
    assert code == "ModelError"
    honest = site.agent._steps["train"]
    site.agent._steps["train"] = lambda request: dataclasses.replace(honest(request), body=whole)
    assert site.refused(site.step(run=run, state=ups)) == (POLICY, "egress")
    site.agent._steps["train"] = honest
    answer = site.step(run=run, state=ups)
    assert set(safetensors.torch.load(answer.body)) == set(ups)


def test_a20_reply_with_other_tensors_or_of_another_kind(open_site):
    honest = open_site.agent._steps["train"]
    extra = adapter.encode({**open_site.engine.initial, "rows": torch.zeros(4)}, dtype="float32")
    for change in ({"body": extra}, {"body": b""}, {"body": CANARY.encode()}, {"kind": "rows"}, {"kind": "opened"}):
        open_site.agent._steps["train"] = lambda request, change=change: dataclasses.replace(honest(request), **change)
        assert open_site.refused(open_site.step()) == (POLICY, "egress")
    open_site.agent._steps["train"] = honest
    assert open_site.step().kind == "update"


def test_a20_body_under_a_reply_that_has_none(open_site):
    honest = open_site.agent._steps["evaluate"]
    open_site.agent._steps["evaluate"] = lambda request: dataclasses.replace(honest(request), body=CANARY.encode())
    assert open_site.refused(open_site.step("evaluate")) == (POLICY, "egress")
    open_site.agent._steps["evaluate"] = honest
    assert open_site.step("evaluate").kind == "metrics"


def test_a20_figure_that_the_manifest_does_not_declare(open_site):
    """A field that the record has, and runs that learn preferences tell; this one learns answers."""
    honest = open_site.agent._steps["evaluate"]
    open_site.agent._steps["evaluate"] = lambda request: dataclasses.replace(
        honest(request), head={**honest(request).head, "num_preferred": 12345}
    )
    assert open_site.refused(open_site.step("evaluate")) == (POLICY, "egress.metrics")
    open_site.agent._steps["evaluate"] = honest
    assert open_site.step("evaluate").kind == "metrics"


def test_a20_figure_that_the_policy_does_not_list(make):
    text = vault.policy_text(make().engine.base_sha256)
    site = make()
    site.start(text.replace("serial = 3", "serial = 4").replace("train_loss = [0, 20]\n", ""))
    assert site.refused(site.open()) == (POLICY, "egress.metrics")
    site.start(text.replace("serial = 3", "serial = 5"))
    assert site.open(approve=False).kind == "opened"


def test_a21_evaluation_on_a_slice_that_is_too_small(make):
    strict = make(min_slice="50")
    assert strict.open().kind == "opened"
    assert strict.refused(strict.step("evaluate")) == (POLICY, "evaluation.min_slice")
    generate = strict.manifest(evaluation__exact_match_rows="2")
    assert strict.refused(strict.open(generate)) == (POLICY, "evaluation.min_slice")
    site = make()
    assert site.open().kind == "opened"
    assert site.step("evaluate").kind == "metrics"


@pytest.mark.parametrize("most", ["10", "13"])  # 9 rows train, in 3 steps of 4
def test_a21_training_loss_of_a_slice_that_is_too_small(make, most):
    strict, site = make(min_slice=most), make(min_slice="9")
    assert [one.open().kind for one in (strict, site)] == ["opened"] * 2
    assert strict.refused(strict.step()) == (POLICY, "evaluation.min_slice")
    assert site.step().kind == "update"


def test_a21_scores_leave_rounded(make):
    heads = {}
    for digits in (1, 3):
        site = make(min_slice=f"3\nround_metrics_to = {digits}")
        site.open()
        heads[digits] = site.step("evaluate").head | site.step().head
    for digits, head in heads.items():
        loss = head["nll_sum"] / head["num_answer_tokens"]
        assert loss == pytest.approx(round(loss, digits), abs=1e-4)
        assert head["train_loss"] == round(head["train_loss"], digits)
    assert heads[1]["nll_sum"] != heads[3]["nll_sum"]


@pytest.mark.parametrize("kind", ["fetch", "", "approve", "opened", "__init__"])
def test_a23_unknown_message_type(open_site, kind):
    assert open_site.refused(open_site.ask(Frame(kind))) == ("ProtocolError", "ProtocolError")
    assert open_site.step().kind == "update"


def test_a26_policy_that_was_edited_without_a_signature(site):
    path = site.folder / "policy.toml"
    admin = identity.public_hex(vault.ADMIN)
    file.load(path, signer=admin)
    path.write_text(path.read_text().replace("min_records = 9", "min_records = 1"))
    assert tomllib.loads(path.read_text())["train"]["min_records"] == 1  # the control: nothing else is wrong with it
    with pytest.raises(PolicyRefusedError, match="sign-policy") as caught:
        file.load(path, signer=admin)
    assert caught.value.rule == "signature"
    file.sign(path, vault.STRANGER)
    with pytest.raises(PolicyRefusedError):
        file.load(path, signer=admin)


def test_a26_older_policy_restored(site):
    old = site.policy
    site.start(old.replace("serial = 3", "serial = 4"))
    with pytest.raises(PolicyRefusedError, match="serial"):
        site.start(old)
    with pytest.raises(PolicyRefusedError, match="serial"):
        site.start(old.replace("serial = 3", "serial = 4").replace("min_records = 9", "min_records = 1"))
    site.start(old.replace("serial = 3", "serial = 5"))
    assert site.open().kind == "opened"


def test_a27_site_with_a_broken_audit_log_neither_starts_nor_answers(open_site):
    path = open_site.folder / AUDIT_FILE
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"serial"', b'"serjal"').replace(b'"policy_serial":3', b'"policy_serial":4'))
    assert all(json.loads(line) for line in path.read_bytes().splitlines())  # the control: lines, and no chain
    with pytest.raises(AuditError):
        open_site.start()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert open_site.step().head["code"] == "AuditError"
    path.write_bytes(whole)
    assert open_site.step().kind == "update"


def test_a27_log_records_what_left_by_size_and_hash(open_site):
    reply = open_site.step()
    sent, facts = wire.pack(reply), open_site.log()[-1].facts
    before = sent[: -len(reply.body) - 32]
    digest = hashlib.sha256(before + hashlib.sha256(reply.body).digest())
    assert (facts["num_bytes"], facts["sha256"]) == (len(sent), digest.hexdigest())


def test_an_answer_that_cannot_be_logged_does_not_leave(open_site, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert open_site.step().head["code"] == "StorageError"
    assert open_site.sent() == [("open", 0)]
    assert open_site.step().kind == "update"


def test_a_row_of_a_site_is_nowhere_in_its_audit_log(site):
    secret = Row((Message("user", CANARY), Message("assistant", "x")), unit="Ada", row_id="rows.jsonl line 7")
    site.data = SiteData([*site.data.train, secret], site.data.held_out)
    assert site.open().kind == "opened"
    assert site.step().kind == "update"
    assert b"Ada" not in (site.folder / AUDIT_FILE).read_bytes()
