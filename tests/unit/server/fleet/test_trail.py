"""The coordinator's own audit log, the sites' heads that it keeps, and what it hands on."""

import hashlib
import json
import os

import pytest

from client.memory.history import AUDIT_FILE
from client.memory.replicas import HEADS_FILE
from common import cli, events
from common.errors import AuditError, ConfigError, StorageError, TooFewSitesError
from common.frame import wire
from common.frame.wire import Frame
from common.trust import audit_log, heads, identity
from common.trust.audit_log import AuditLog
from server.cli import app as server_cli
from server.fleet import trail
from server.folder import checkpoint, run_files
from server.run import rounds
from server.run import run as server_run
from tests import tiny
from tests.samples import vault

SITES = ("north", "south", "west")
PUBLIC = identity.public_hex(vault.OPERATOR)
SITE_KEY = identity.public_hex(vault.SITE)


@pytest.fixture
def sites(tmp_path, engine):
    """Three sites with a policy, each of which approved the run."""
    made = [vault.make(tmp_path / name, engine, name=name) for name in SITES]
    for site in made:
        site.approve(site.manifest())
    return made


@pytest.fixture
def play(sites, tmp_path, engine):
    """Play the run, whole or resumed, in a folder; `nodes` are functions that answer frames."""

    def whole(nodes=None, *, folder="run", operator=None, resume=False):
        settings = tiny.settings("tiny")
        log = run_files.prepare(settings, tmp_path / folder, resume=resume)
        fleet = tiny.fleet(dict(enumerate(nodes or [site.agent.answer for site in sites], start=1)))
        operator = operator or vault.operator(tmp_path)
        common = {"fleet": fleet, "engine": engine, "folder": tmp_path / folder, "log": log, "resume": resume}
        return server_run.execute(settings, operator=operator, **common)

    return whole


@pytest.fixture
def fed(sites, tmp_path, engine):
    """The same federation, to be led step by step."""
    operator = vault.operator(tmp_path)
    nodes = {number: answering(site) for number, site in enumerate(sites, start=1)}
    made = tiny.federation(engine, tmp_path / "run", nodes, tiny.settings("tiny"))
    made.offer, made.trail = operator.make_offer(made.manifest), operator.trail
    return made


@pytest.fixture
def entries(tmp_path):
    """The coordinator's log, which must be whole; of one kind, as facts."""

    def read(kind: str = ""):
        found = audit_log.read(tmp_path / "op-audit" / trail.AUDIT_FILE, PUBLIC)
        return [entry.facts for entry in found if kind in ("", entry.kind)]

    return read


def answering(site):
    """A site's agent, also after it was started anew."""
    return lambda frame: site.agent.answer(frame)


def failed(fed) -> list[tuple[str, str]]:
    """Who failed, and the first word of why."""
    found = [event for event in events.read(fed.log.path) if event["kind"] == "site_failed"]
    return [(event["site"], event["reason"].split(":")[0].split(";")[0]) for event in found]


def test_a_run_is_in_the_coordinators_log_from_the_offer_to_its_end(play, sites, entries, tmp_path, engine):
    play()
    run = sites[0].manifest()
    log = list(audit_log.read(tmp_path / "op-audit" / trail.AUDIT_FILE, PUBLIC))
    step = ["sent", "received", "received", "received"]
    expected = ["offered", "opened", "opened", "opened", *step, *[*step, "aggregated", *step] * 2, "ended"]
    assert [entry.kind for entry in log] == expected
    assert {entry.facts["run"] for entry in log} == {run.sha256}
    (offered,) = entries("offered")
    assert (offered["federation"], offered["signer"], offered["name"]) == ("onco-eu", PUBLIC, "tiny")
    assert offered["not_after"] == int(vault.NOW + 86_400)
    assert [facts["site"] for facts in entries("opened")] == list(SITES)
    assert [facts["sites"] for facts in entries("sent")] == [list(SITES)] * 5
    assert entries("ended")[0]["outcome"] == "finished"
    for round_index, facts in enumerate(entries("aggregated")):
        loaded = checkpoint.load(
            tmp_path / "run", engine.tensor_specs, num_rounds=round_index + 1, run_sha256=run.sha256
        )
        assert (facts["adapter_sha256"], facts["num_updates"]) == (loaded.sha256, 3)


def test_what_the_coordinator_logs_is_what_the_sites_log(play, sites, entries):
    play()
    came = [(facts["site"], facts["sha256"], facts["num_bytes"]) for facts in entries("opened") + entries("received")]
    left = [
        (site.name, entry.facts["sha256"], entry.facts["num_bytes"])
        for site in sites
        for entry in site.log()
        if entry.kind == "left"
    ]
    assert len(left) == 18
    assert sorted(came) == sorted(left)
    adapters = {facts["adapter_sha256"] for facts in entries("sent")}
    assert adapters == {
        e.facts["request_sha256"] for e in sites[0].log() if e.facts.get("step") in ("train", "evaluate")
    }


def test_an_entry_is_on_the_disk_before_the_frame_goes_out(fed, entries, monkeypatch, engine):
    fed.wait()
    sent = []
    node = fed.fleet.send
    monkeypatch.setattr(fed.fleet, "send", lambda *a, **k: sent.append(len(entries("sent"))) or node(*a, **k))
    fed.play(engine.initial, round_index=0)
    assert sent == [1, 1, 1]


def test_a_log_that_cannot_be_written_sends_nothing(fed, sites, monkeypatch, engine):
    fed.wait()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            fed.play(engine.initial, round_index=0)
    assert [site.sent() for site in sites] == [[("open", 0)]] * 3
    fed.play(engine.initial, round_index=0)  # control
    assert [site.sent()[-1] for site in sites] == [("train", 0)] * 3


def test_a_refusal_is_logged_with_code_and_reference(fed, sites, entries):
    sites[1].approve(fed.manifest, is_approved=False)
    with pytest.raises(TooFewSitesError):
        fed.wait()
    (refused,) = entries("refused")
    assert (refused["step"], refused["node"], refused["code"]) == ("open", "2", "ApprovalDenied")
    assert refused["reference"] == sites[1].log()[-1].facts["reference"]


def test_a_site_that_waits_for_approval_is_logged_once(fed, sites, entries):
    sites[1].approve(fed.manifest, is_approved=False)
    waiting = vault.make(fed.folder.parent / "east", sites[0].engine, name="east")
    fed.fleet = tiny.fleet({1: sites[0].agent.answer, 2: sites[2].agent.answer, 3: waiting.agent.answer})
    with pytest.raises(TooFewSitesError):
        fed.wait()
    assert len(waiting.errors) > 10
    assert [facts["code"] for facts in entries("refused")] == ["ApprovalRequired"]


def test_updates_that_do_not_count_are_logged_as_failed(fed, entries, engine, sites):
    spoil = tiny.spoilt(sites[2].agent.answer, "train", tiny.with_head(num_examples=10**6))
    fed.fleet = tiny.fleet({1: sites[0].agent.answer, 2: sites[1].agent.answer, 3: spoil})
    fed.wait()
    fed.play(engine.initial, round_index=0)
    assert [(f["site"], f["step"], f["code"]) for f in entries("failed")] == [("west", "train", "AuthError")]
    assert [facts["site"] for facts in entries("received")] == ["north", "south"]


def test_a_run_that_fails_is_logged_as_ended(play, sites, entries):
    spoilt = [tiny.spoilt(site.agent.answer, "train", lambda frame: frame[:-1]) for site in sites]
    with pytest.raises(TooFewSitesError):
        play(spoilt)
    assert [(facts["outcome"], facts["code"]) for facts in entries("ended")] == [("failed", "TooFewSitesError")]


def test_a_resumed_run_goes_on_in_the_same_log(play, sites, entries, tmp_path):
    calls = []

    def fails_in_round_two(site):
        def node(frame: bytes) -> bytes:
            calls.append(frame)
            return site.agent.answer(frame) if len(calls) <= 12 else b""

        return node

    with pytest.raises(TooFewSitesError):
        play([fails_in_round_two(site) for site in sites])
    play(resume=True)
    assert [facts["first_round"] for facts in entries("offered")] == [0, 1]
    assert entries("offered")[1]["adapter_sha256"] == entries("aggregated")[0]["adapter_sha256"]
    assert [facts["outcome"] for facts in entries("ended")] == ["failed", "finished"]


def test_a_run_without_a_key_keeps_no_log_and_sends_the_frames_of_old(tmp_path, engine):
    fed = tiny.federation(engine, tmp_path / "run", tiny.make_nodes(engine), tiny.settings("tiny"))
    fed.wait()
    fed.play(engine.initial, round_index=0)
    assert not list(tmp_path.rglob("*audit*"))


def test_sites_without_a_policy_take_a_signed_run_and_leave_the_heads_alone(tmp_path, engine, entries):
    operator = vault.operator(tmp_path)
    fed = tiny.federation(engine, tmp_path / "run", tiny.make_nodes(engine), tiny.settings("tiny"))
    fed.offer, fed.trail = operator.make_offer(fed.manifest), operator.trail
    fed.wait()
    fed.play(engine.initial, round_index=0)
    assert len(entries("received")) == 3
    assert operator.trail.heads.newest() == {}


def test_every_site_holds_the_heads_of_all_the_others(play, sites, tmp_path):
    play()
    for site in sites:
        kept = heads.read(site.folder / HEADS_FILE)
        others = [other for other in sites if other is not site]
        assert sorted(kept) == sorted([vault.SERVER_LOG, *(other.name for other in others)])
        for other in others:
            audit_log.verify(other.folder / AUDIT_FILE, SITE_KEY, heads=[one.head for one in kept[other.name]])
        audit_log.verify(
            tmp_path / "op-audit" / "audit.jsonl", PUBLIC, heads=[one.head for one in kept[vault.SERVER_LOG]]
        )
        assert len(kept[vault.SERVER_LOG]) == 5  # one a request
    kept = heads.read(tmp_path / "op-audit" / trail.HEADS_FILE)
    assert {name: len(found) for name, found in kept.items()} == dict.fromkeys(SITES, 2)  # one a round


def test_a_request_is_one_frame_for_all_sites(fed, engine):
    plan = rounds.RoundPlan(fed.manifest.sha256, 0)
    frames = fed.request("train", plan, engine.initial, nodes=[1, 2, 3])
    assert len({id(frame) for frame in frames.values()}) == 1


def test_a_large_cohort_fits_the_log(fed, engine, entries):
    many = range(1200)
    fed.opened = {node: type("Opened", (), {"site": f"{node:04d}{'a' * 60}"})() for node in many}
    fed.request("train", rounds.RoundPlan(fed.manifest.sha256, 0), engine.initial, nodes=list(many))
    assert [len(facts["sites"]) for facts in entries("sent")] == [500, 500, 200]


def rolled_back(site, *, num_kept: int) -> None:
    """Restore an older copy of a site's log, and go on with it an hour later."""
    path = site.folder / AUDIT_FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:num_kept]))
    site.now += 3600
    site.start()


def test_a_site_whose_log_was_rolled_back_is_noticed_by_itself(fed, sites, engine):
    fed.wait()
    state = fed.play(engine.initial, round_index=0)
    state = fed.play(state, round_index=1)
    told = fed.trail.told()
    assert sites[1].step("evaluate", state=state, round_index=2, **told).kind == "metrics"  # control
    rolled_back(sites[1], num_kept=3)  # started, approved, opened: the rounds that were answered are forgotten
    assert sites[1].open(approve=False).kind == "opened"
    answer = sites[1].step(state=state, round_index=1, **told)
    assert sites[1].refused(answer) == ("PolicyRefusedError", "audit.heads")
    assert "this site's own log lacks entry" in str(sites[1].errors[-1])


@pytest.mark.parametrize("are_heads_kept", [True, False])
def test_a_site_whose_log_was_rolled_back_is_noticed_by_the_coordinator(
    fed, sites, engine, monkeypatch, are_heads_kept
):
    fed.wait()
    state = fed.play(engine.initial, round_index=0)
    fed.play(state, round_index=1)
    rolled_back(sites[1], num_kept=3)
    monkeypatch.setattr("client.memory.replicas.keep", lambda *_, **__: None)  # the site itself is in on it
    if not are_heads_kept:
        fed.trail.heads.path.unlink()
        fed.trail.heads.__init__(fed.trail.heads.path, vault.FEDERATION)
    fed.doubtful.add(2)
    fed.play(state, round_index=1)
    assert failed(fed) == ([("south", "AuditError")] if are_heads_kept else [])


@pytest.mark.parametrize("are_heads_kept", [True, False])
def test_a_site_whose_log_was_rolled_back_is_noticed_by_another_site(fed, sites, engine, monkeypatch, are_heads_kept):
    fed.wait()
    state = fed.play(engine.initial, round_index=0)
    state = fed.play(state, round_index=1)  # tells the heads of round 1
    rolled_back(sites[1], num_kept=3)
    fed.trail.heads.path.unlink()  # the coordinator is in on it
    fed.trail.heads.__init__(fed.trail.heads.path, vault.FEDERATION)
    fed.trail.heads.keep({"south": vault.signed(sites[1].gate._log.head)})
    if not are_heads_kept:
        monkeypatch.setattr("client.memory.replicas.keep", lambda *_, **__: None)
    answer = sites[0].step("evaluate", run=fed.manifest, state=state, round_index=2, **fed.trail.told())
    if not are_heads_kept:
        assert answer.kind == "metrics"
        return
    assert sites[0].refused(answer) == ("PolicyRefusedError", "audit.heads")
    assert "the audit log of south is told to stand at entry" in str(sites[0].errors[-1])


def without_south(fed, path) -> AuditLog:
    """The coordinator's log, signed anew as if south had never taken part."""
    anew = AuditLog(path, key=vault.OPERATOR)
    for entry in audit_log.read(fed.trail.log.path, PUBLIC):
        if entry.facts.get("site") != "south":
            anew.append(entry.kind, **entry.facts)
    return anew


def told_by(log: AuditLog) -> dict[str, list]:
    """What a coordinator with this log says beside a plan."""
    own = vault.signed(log.head, vault.SERVER_LOG, key=vault.OPERATOR)
    return {"heads": heads.to_list({vault.SERVER_LOG: own}), "links": log.links}


@pytest.mark.parametrize("are_heads_kept", [True, False])
@pytest.mark.parametrize("num_more", [0, 9])
def test_a_coordinator_that_writes_its_log_anew_is_noticed_by_the_sites(
    fed, sites, engine, tmp_path, monkeypatch, are_heads_kept, num_more
):
    fed.wait()
    state = fed.play(engine.initial, round_index=0)
    told = fed.trail.told()
    assert [site.step("evaluate", state=state, round_index=1, **told).kind for site in sites] == ["metrics"] * 3
    anew = without_south(fed, tmp_path / "anew.jsonl")
    for _ in range(num_more):  # longer than what the sites know
        anew.append("received", run=fed.manifest.sha256, site="north")
    assert (anew.head.sequence > fed.trail.log.head.sequence) == bool(num_more)
    audit_log.verify(anew.path, PUBLIC)  # alone it looks whole
    if not are_heads_kept:
        monkeypatch.setattr("client.memory.replicas.keep", lambda *_, **__: None)
    answers = [site.step(state=state, round_index=1, **told_by(anew)) for site in sites]
    if not are_heads_kept:
        assert [answer.kind for answer in answers] == ["update"] * 3
        return
    for site, answer in zip(sites, answers, strict=True):
        assert site.refused(answer) == ("PolicyRefusedError", "audit.heads")
        with pytest.raises(AuditError, match="known elsewhere"):
            audit_log.verify(anew.path, PUBLIC, heads=site.gate._heads.of(vault.SERVER_LOG))
    assert [site.step(state=state, round_index=1, **fed.trail.told()).kind for site in sites] == ["update"] * 3


def test_a_log_that_changed_under_the_run_ends_it(fed, engine):
    fed.wait()
    path = fed.trail.log.path
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(AuditError, match="shorter"):
        fed.play(engine.initial, round_index=0)


def test_a_site_that_told_of_a_log_and_does_not_any_more_does_not_count(fed, sites, engine):
    silent = tiny.with_head(num_audit_entries=0, audit_sha256="", audit_time=0.0, audit_signer="", audit_signature="")
    is_silent = []
    honest = sites[2].agent.answer
    spoil = tiny.spoilt(honest, "train", lambda frame: vault.signed_anew(silent(frame)) if is_silent else frame)
    fed.fleet = tiny.fleet({1: sites[0].agent.answer, 2: sites[1].agent.answer, 3: spoil})
    fed.wait()
    state = fed.play(engine.initial, round_index=0)
    assert failed(fed) == []
    is_silent.append(True)
    fed.play(state, round_index=1)
    assert failed(fed) == [("west", "AuditError")]


def test_the_log_of_another_key_is_not_gone_on_with(tmp_path):
    vault.operator(tmp_path).trail.log.append("offered", run="ab" * 32)
    vault.write_key(tmp_path / "other.pem", vault.STRANGER)
    with pytest.raises(AuditError, match="signature"):
        trail.open_trail(tmp_path / "other.pem", federation=vault.FEDERATION, folder=tmp_path / "op-audit")
    assert trail.open_trail(tmp_path / "other.pem", federation="x").log.path == tmp_path / "other-audit" / "audit.jsonl"


def command(*arguments: object, capsys) -> tuple[int, dict]:
    """A command of the coordinator's; exit code and what it printed."""
    code = 0
    try:
        cli.run(server_cli.app, ["audit", *map(str, arguments), "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_audit_commands(play, sites, tmp_path, capsys):
    play()
    capsys.readouterr()
    key, log = tmp_path / "op.pem", tmp_path / "op-audit" / trail.AUDIT_FILE
    assert command("show", "--operator-key", key, "--last", 1, capsys=capsys)[1]["entries"][0]["kind"] == "ended"
    kept = sites[0].folder / HEADS_FILE
    code, found = command("verify", "--operator-key", key, "--heads", kept, capsys=capsys)
    assert (code, found["num_heads_checked"]) == (0, 5)
    _, told = command("heads", "--operator-key", key, "--out", tmp_path / "heads.jsonl", capsys=capsys)
    assert [head["owner"] for head in told["heads"]] == sorted(SITES)
    theirs = ("--key", identity.public_hex(vault.SITE), "--heads", tmp_path / "heads.jsonl", "--owner", "south")
    assert command("verify", sites[1].folder / AUDIT_FILE, *theirs, capsys=capsys)[1]["num_heads_checked"] == 2
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-12]))
    assert command("verify", "--operator-key", key, "--heads", kept, capsys=capsys)[0] == 6
    assert command("verify", log, "--key", PUBLIC, capsys=capsys)[0] == 0  # control: alone it looks whole


@pytest.mark.parametrize("given", [[], ["--key", PUBLIC], ["audit.jsonl"], ["a", "--key", "b", "--operator-key", "c"]])
def test_a_log_must_be_named_one_way(given, capsys):
    assert command("verify", *given, capsys=capsys)[0] == ConfigError.exit_code


def test_what_went_is_told_by_its_size_and_digest():
    packed = wire.pack(Frame("update", {}, b"abc"))
    digest = hashlib.sha256(packed[:-35] + hashlib.sha256(b"abc").digest())
    assert trail.of_frame(packed) == {"num_bytes": len(packed), "sha256": digest.hexdigest()}
