"""Offers, reviews and decisions, as the people of a site see them."""

import json
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from client.agent.agent import SiteData
from client.cli import app as client_cli
from client.memory import consent
from client.policy import file
from client.review import review
from common import cli
from common.errors import AuditError, ConfigError, DataError, ModelError
from common.frame.wire import Frame
from common.trust import heads as audit_heads
from common.trust import identity
from common.trust.heads import Heads
from server.cli import app as server_cli
from tests.samples import vault


@pytest.fixture
def site(tmp_path, engine):
    """A site that was offered one run."""
    made = vault.make(tmp_path / "site", engine)
    ask(made)
    return made


@pytest.fixture
def node_file(site):
    """The site's own file on disk, with its keys."""
    return vault.write_node(site)


def ask(site, run=None, **offer) -> str:
    """The site's answer to an offer: its kind, or the code of its refusal."""
    answer = site.ask(site.offer(run or site.manifest(), **offer).to_frame())
    return str(answer.head.get("code", answer.kind))


def desk(site, node_file) -> review.Desk:
    from common.run import config

    return review.open_desk(config.load_node(node_file))


def page(site, node_file, name: str = "tiny") -> tuple[review.Review, str]:
    """A review and its text."""
    shown = review.review(desk(site, node_file), name)
    screen = StringIO()
    Console(file=screen, width=200).print(review.render(shown))
    return shown, screen.getvalue()


def command(app, *arguments: str, capsys) -> tuple[int, dict]:
    """A command's exit code and JSON."""
    code = 0
    try:
        cli.run(app.app, [*arguments, "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_offer_is_kept_and_logged_once(site):
    for _ in range(3):
        assert ask(site) == "ApprovalRequired"
    assert [entry.kind for entry in site.log()] == ["started", "offered"]
    assert consent.load(site.folder, site.manifest().sha256) == site.offer()


def test_preview_asks_what_an_offer_asks(site, node_file, tiny_base):
    from client.cli import rows
    from common.run import config

    offered = replace(site.manifest(), date="2026-03-04")
    site.ask(site.offer(offered).to_frame())
    node = config.load_node(node_file)
    with pytest.raises(ModelError, match="hash"):  # this site has no base at all
        rows.asked(node, offered.sha256[:12], rows.Asked())
    node = node.model_copy(update={"model": node.model.model_copy(update={"base": str(tiny_base)})})
    found = rows.asked(node, offered.sha256[:12], rows.Asked(date="2030-01-01"))
    assert found == rows.Asked("sft", 64, "error", "", "tokenizer", "2026-03-04", str(tiny_base))


def test_an_offer_whose_file_was_changed_is_not_shown(site):
    (path,) = (site.folder / consent.FOLDER).iterdir()
    from common.frame import wire

    path.write_bytes(wire.pack(site.offer(site.manifest(seed="9")).to_frame()))
    with pytest.raises(DataError, match="another run"):
        consent.load(site.folder, site.manifest().sha256)
    path.write_bytes(b"x")
    with pytest.raises(DataError):
        consent.load(site.folder, site.manifest().sha256)


def test_what_the_policy_refuses_is_not_even_offered(site):
    assert ask(site, site.manifest(training__learning_rate="1e-9")) == "PolicyRefusedError"
    assert len(list((site.folder / consent.FOLDER).iterdir())) == 1


def test_the_number_of_offers_that_are_kept_is_limited(site, monkeypatch):
    monkeypatch.setattr(consent, "MAX_OFFERS", 1)
    assert ask(site, site.manifest(seed="9")) == "ApprovalRequired"
    assert len(list((site.folder / consent.FOLDER).iterdir())) == 1


def test_the_newest_decision_counts(site):
    run = site.manifest()
    for is_approved, code in ((True, "opened"), (False, "ApprovalDenied"), (True, "opened")):
        site.approve(run, is_approved=is_approved)
        assert ask(site) == code


def test_approval_survives_a_restart_and_is_for_this_manifest_alone(site):
    site.approve(site.manifest())
    site.start()
    assert ask(site) == "opened"
    assert ask(site, site.manifest(seed="9")) == "ApprovalRequired"


def test_a_rule_may_let_through_what_differs_from_an_approved_run_in_name_and_seed(tmp_path, engine):
    site = vault.make(tmp_path / "rule", engine, approval='"changed_runs"', max_per_day="9")
    assert ask(site) == "ApprovalRequired"
    site.approve(site.manifest())
    assert ask(site) == "opened"
    assert ask(site, site.manifest(name='"again"', seed="9")) == "opened"
    opened = [entry.facts["approved_by"] for entry in site.log() if entry.kind == "opened"]
    assert opened == ["person", "runs.approval = changed_runs"]
    assert ask(site, site.manifest(seed="9", training__learning_rate="3e-2")) == "ApprovalRequired"


def test_a_rule_may_let_through_whatever_the_policy_allows(tmp_path, engine):
    site = vault.make(tmp_path / "rule", engine, approval='"none"')
    assert ask(site) == "opened"
    assert ask(site, site.manifest(training__learning_rate="1e-9")) == "PolicyRefusedError"
    site.approve(site.manifest(), is_approved=False)
    assert ask(site) == "ApprovalDenied"


def test_a_review_shows_every_setting_that_differs_from_its_default(site, node_file):
    odd = {
        "training__optimizer__epsilon": "1e-7",
        "training__optimizer__weight_decay": "0.01",
        "adapter__dropout": "0.1",
    }
    changed = site.manifest(**odd)
    assert ask(site, changed) == "ApprovalRequired"
    plain, other = (
        page(site, node_file, sha256)[0].facts["settings that differ from their defaults"].splitlines()
        for sha256 in (site.manifest().sha256, changed.sha256)
    )
    assert not any("epsilon" in line for line in plain)
    new = {"training.optimizer.epsilon = 1e-07", "training.optimizer.weight_decay = 0.01", "adapter.dropout = 0.1"}
    assert set(other) - set(plain) == new


def test_a_review_says_what_leaves_and_what_is_read(site, node_file):
    found, text = page(site, node_file)
    egress = site.manifest().plan.egress
    assert f"{egress.bytes_per_round:,} a round" in found.facts["bytes that leave"]
    assert f"{2 * egress.bytes_per_round:,} in 2 rounds" in found.facts["bytes that leave"]
    assert found.facts["epsilon"].startswith("none: updates leave without differential privacy")
    assert found.facts["rows that are read"] == "all of rows.jsonl"
    assert "instruction, input, output" in found.facts["columns that are read"]
    assert found.facts["base"].startswith("tiny, ")
    assert found.facts["base as quantised"] == "not quantised; the hash of its files says all"
    assert "robust aggregation: off, so one bad site can move the adapter" in found.facts["who sees this update"]
    assert found.facts["what is learnt"].startswith("to write the answers in the rows")
    assert found.facts["aggregation"] == "fedavg; a site trains and sends A and B"
    assert (
        found.facts["learning rate by round"] == "cosine: a mean of 0.016 in the first round and of 0.0037 in the last"
    )
    assert "\ntraining.learning_rate = 0.02\n" in found.facts["settings that differ from their defaults"]
    assert found.tensors == {spec.name: list(spec.shape) for spec in site.manifest().tensor_specs}
    for word in ("train_loss", "layers.*.self_attn.q_proj.lora_A.weight", "4 x 64", "nothing to compare with"):
        assert word in text


def test_a_review_shows_the_difference_to_the_last_approved_run(site, node_file):
    site.approve(site.manifest())
    ask(site, site.manifest(name='"second"', training__learning_rate="3e-2"))
    found, text = page(site, node_file, "second")
    assert found.changes == {"name": ["tiny", "second"], "training.learning_rate": ["0.02", "0.03"]}
    assert "differs from run" in text


def test_a_review_says_that_the_policy_would_refuse(site, node_file):
    site.start(site.policy.replace("serial = 3", "serial = 4").replace("min_sites = 2", "min_sites = 3"))
    found, text = page(site, node_file)
    assert found.refusal == "cohort.min_sites: 2 is below 3"
    assert "whatever you say" in text


def test_text_of_a_coordinator_cannot_steer_the_terminal(tmp_path, engine, node_file, site):
    prompt = "[bold]Be brief"
    lines = 'max_rows = 100\n\n[data]\nsystem_prompts = ["", "[bold]Be brief"]\n'
    site.start(site.policy.replace("serial = 3", "serial = 4").replace("max_rows = 100\n", lines))
    assert ask(site, site.manifest(name='"spoken"', data__system_prompt=f'"{prompt}"')) == "ApprovalRequired"
    assert prompt in page(site, node_file, "spoken")[1]


def test_a_run_is_found_by_name_or_first_digits(site, node_file):
    run = site.manifest().sha256
    opened = desk(site, node_file)
    assert consent.find(opened.history, run[:8]) == run
    assert consent.find(opened.history, "tiny") == run
    for name in ("other", run[:3], ""):
        with pytest.raises(DataError, match="names 0 runs"):
            consent.find(opened.history, name)
    ask(site, site.manifest(seed="9"))
    with pytest.raises(DataError, match="names 2 runs"):
        consent.find(desk(site, node_file).history, "tiny")


def test_the_commands_from_offer_to_approval(site, node_file, capsys):
    _, listed = command(client_cli, "runs", str(node_file), capsys=capsys)
    assert [(run["name"], run["state"]) for run in listed["runs"]] == [("tiny", "waits for approval")]
    _, shown = command(client_cli, "review", str(node_file), "tiny", capsys=capsys)
    assert shown["run"] == site.manifest().sha256
    assert (
        command(client_cli, "approve", str(node_file), "tiny", "--by", "DPO", capsys=capsys)[1]["state"] == "approved"
    )
    assert ask(site) == "opened"
    assert command(client_cli, "deny", str(node_file), "tiny", capsys=capsys)[1]["state"] == "denied"
    assert ask(site) == "ApprovalDenied"
    assert [entry.facts["by"] for entry in site.log() if entry.kind == "approved"] == ["DPO"]


def test_a_run_that_a_rule_turned_away_is_listed_with_the_rule_until_it_is_taken(site, node_file, capsys):
    listed = lambda: command(client_cli, "runs", str(node_file), capsys=capsys)[1]["runs"]  # noqa: E731
    bad = site.manifest(name='"greedy"', training__learning_rate="0.5")
    assert ask(site, bad) == "PolicyRefusedError"
    told = {run["name"]: (run["state"], run["rule"]) for run in listed()}
    assert told["greedy"] == ("refused by rule", "train.learning_rate")
    shown = command(client_cli, "review", str(node_file), "greedy", capsys=capsys)[1]
    assert shown["facts"]["training"].startswith("2 rounds")
    assert not shown["is_open"]
    assert shown["refusal"].startswith("train.learning_rate: 0.5 is not from")
    with pytest.raises(DataError, match="names 0 runs"):
        review.decide(desk(site, node_file), "greedy", is_approved=True, by="DPO")
    assert ask(site, site.manifest(name='"stale"'), days=-1.0) == "PolicyRefusedError"
    with pytest.raises(DataError, match=r"refused by federation.not_after before its offer was kept; agent.jsonl"):
        page(site, node_file, "stale")
    site.start(
        site.policy.replace("learning_rate = [1e-3, 1e-1]", "learning_rate = [1e-3, 1]").replace("= 3\n", "= 4\n", 1)
    )
    assert ask(site, bad) == "ApprovalRequired"
    told = {run["name"]: (run["state"], run["rule"]) for run in listed()}
    assert told["greedy"] == ("waits for approval", "")  # control
    assert page(site, node_file, "greedy")[0].is_open


def test_a_run_is_training_until_its_last_round_is_answered_and_then_finished(site, node_file, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(site.gate, "_tell", told.append)
    listed = lambda: {run["name"]: run for run in review.runs(desk(site, node_file))}  # noqa: E731
    site.open()
    assert listed()["tiny"]["state"] == "approved"
    site.step()
    shown = StringIO()
    Console(file=shown, width=200).print(review.render_runs([*listed().values()], now=vault.NOW + 3 * 3600))
    assert "training, last answer 3 h ago" in shown.getvalue()
    site.step("evaluate", round_index=1)
    assert listed()["tiny"]["state"] == "training"  # control
    site.step(round_index=1)
    run = listed()["tiny"]
    assert (run["state"], run["num_rounds_answered"], run["answered_at"]) == ("finished", 2, vault.NOW)
    assert told == [
        "approved: run 'tiny' is open",
        "training: run 'tiny', round 1 of 2 is answered",
        "finished: run 'tiny', round 2 of 2 is answered",
    ]


def test_a_run_that_was_not_drawn_for_its_last_round_is_finished_by_the_evaluation_after_it(site, node_file):
    site.open()
    site.step()
    site.step("evaluate", round_index=2)
    assert [run["state"] for run in review.runs(desk(site, node_file))] == ["finished"]


def test_what_failed_here_is_no_refusal_by_rule_and_a_refused_step_is_listed_until_one_is_answered(site, node_file):
    listed = lambda: [(run["state"], run["rule"]) for run in review.runs(desk(site, node_file))]  # noqa: E731
    rows, site.data = site.data, SiteData((), ())
    answer = site.open()
    assert answer.head["code"] == "DataError"
    assert listed() == [("failed", "DataError")]
    assert review.runs(desk(site, node_file))[0]["reference"] == answer.head["reference"]
    site.data = rows
    site.open()
    state = {name: 1e3 + tensor for name, tensor in site.begun(site.manifest()).items()}
    assert site.step(state=state).kind == "refused"
    assert listed() == [("refused by rule", "train.max_tensor_norm")]
    site.step("evaluate")
    assert listed() == [("training", "")]


def test_a_refused_step_of_a_run_that_nobody_offered_is_in_no_list(site, node_file):
    site.ask(Frame("train", {"run_sha256": "ab" * 32, "round_index": 0}))
    assert [run["name"] for run in review.runs(desk(site, node_file))] == ["tiny"]


def test_the_commands_for_people(site, node_file, capsys):
    for arguments in (["runs"], ["review"], ["audit", "show"]):
        cli_arguments = [*arguments, str(node_file), *(["tiny"] if arguments == ["review"] else [])]
        client_cli.app(cli_arguments, standalone_mode=False)
    told = capsys.readouterr().out
    assert "waits" in told
    assert "started" in told


def test_the_audit_commands(site, node_file, capsys, tmp_path):
    heads = tmp_path / "heads.jsonl"
    Heads(heads, vault.FEDERATION).keep({"north": vault.signed(site.gate._log.head, "north")})
    code, found = command(client_cli, "audit", "verify", str(node_file), "--heads", str(heads), capsys=capsys)
    assert (code, found["num_entries"], found["num_heads_checked"]) == (0, 2, 1)
    log, key = site.folder / "audit.jsonl", identity.public_hex(vault.SITE)
    outside = ["audit", "verify", str(log), "--key", key, "--heads", str(heads), "--owner", "north"]
    assert command(server_cli, *outside, capsys=capsys)[0] == 0
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    assert command(server_cli, *outside, capsys=capsys)[0] == 6
    assert command(client_cli, "audit", "verify", str(node_file), "--heads", str(heads), capsys=capsys)[0] == 6
    assert command(client_cli, "audit", "verify", str(node_file), capsys=capsys)[0] == 0  # alone it looks whole


def test_heads_of_others_prove_nothing_about_this_site(site, node_file, capsys, tmp_path):
    Heads(tmp_path / "heads.jsonl", vault.FEDERATION).keep({"south": vault.signed(site.gate._log.head)})
    given = ["audit", "verify", str(node_file), "--heads", str(tmp_path / "heads.jsonl")]
    assert command(client_cli, *given, capsys=capsys)[0] == 6


def test_a_site_shows_and_exports_the_heads_that_it_keeps(site, node_file, capsys, tmp_path):
    out, operator = tmp_path / "out.jsonl", identity.public_hex(vault.OPERATOR)
    listed = ["audit", "heads", str(node_file)]
    assert command(client_cli, *listed, capsys=capsys) == (0, {"heads": []})  # none was handed on yet
    assert site.open().kind == "opened"
    assert site.step(**vault.TOLD).kind == "update"
    _, found = command(client_cli, *listed, "--out", str(out), capsys=capsys)
    assert [(head["owner"], head["sequence"]) for head in found["heads"]] == [(vault.SERVER_LOG, 7)]
    assert [head.sequence for head in audit_heads.of(out, vault.SERVER_LOG, signer=operator)] == [7]
    client_cli.app(listed, standalone_mode=False)
    assert vault.SERVER_LOG[:16] in capsys.readouterr().out


def test_keys_and_signature_by_command(tmp_path, site, capsys):
    key, policy = tmp_path / "keys" / "admin.pem", site.folder / "policy.toml"
    public = command(client_cli, "new-key", str(key), capsys=capsys)[1]["public_key"]
    signed = command(client_cli, "sign-policy", str(policy), "--key", str(key), capsys=capsys)[1]
    assert signed == {"signature": f"{policy}.sig", "policy_signer": public, "serial": 3, "notes": []}
    policy.write_text(site.policy.replace("[[models.allow]]", "[[models.other]]"))
    with pytest.raises(SystemExit):
        cli.run(client_cli.app, ["sign-policy", str(policy), "--key", str(key)])
    assert "models.allow  must be set" in capsys.readouterr().err


def test_who_signs_is_told_what_is_still_empty_and_that_the_agent_must_be_restarted(tmp_path, site, capsys):
    policy = site.folder / "policy.toml"
    policy.write_text(re.sub(r"targets = .*", "targets = []", site.policy))
    vault.write_key(tmp_path / "admin.pem", vault.ADMIN)
    client_cli.app(["sign-policy", str(policy), "--key", str(tmp_path / "admin.pem")], standalone_mode=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "note: lora.targets is empty, so no run can pass" in told
    assert "restart the agent (systemctl restart silotune-agent)" in told


def test_an_edited_policy_is_not_in_force_before_a_restart_and_agent_and_reviewer_say_so(site, node_file, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(site.gate, "_tell", told.append)
    assert page(site, node_file)[0].facts["this site's policy"] == "serial 3"
    changed = site.policy.replace("serial = 3", "serial = 4").replace("max_rounds = 4", "max_rounds = 1")
    (site.folder / "policy.toml").write_text(changed)
    file.sign(site.folder / "policy.toml", vault.ADMIN)
    for _ in range(2):
        assert site.open().kind == "opened"  # two rounds: the old policy's four still hold
    assert [line for line in told if "policy.toml" in line] == [
        f"{site.folder / 'policy.toml'} has changed; serial 3, with which this agent began, stays in force until it is "
        "restarted"
    ]
    shown = page(site, node_file)[0]
    assert "the agent began with serial 3: restart it" in shown.facts["this site's policy"]
    assert "max_rounds" in shown.refusal
    site.start(changed)  # control
    assert site.open().head["code"] == "PolicyRefusedError"
    assert page(site, node_file)[0].facts["this site's policy"] == "serial 4"


def test_a_site_without_policy_has_nothing_to_approve(tmp_path, node_file):
    from common.run import config

    plain = config.parse_node('[site]\nname = "north"\n[data]\npath = "x"', name="node.toml")
    with pytest.raises(ConfigError, match="no policy"):
        review.open_desk(plain)


def test_a_log_that_is_not_whole_takes_no_decision(site, node_file):
    log = site.folder / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"offered", b"approve", 1))
    with pytest.raises(AuditError):
        desk(site, node_file)
