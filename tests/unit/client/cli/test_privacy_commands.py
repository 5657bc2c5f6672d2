"""The ledger as the people of a site begin, read and lower it."""

import json
import re
from pathlib import Path

import pytest

from client.cli import app as client_cli
from client.ledger import sealed
from client.memory import consent, history, site_ledger
from client.review import privacy_view, review
from common import cli
from common.accounting import DpEvent
from common.errors import ConfigError, LedgerError
from common.run import config
from common.trust import identity
from tests import tiny
from tests.samples import vault

ROUND = DpEvent(0.0256, 0.9, 40)
OTHER = "cd" * 32


@pytest.fixture
def site(tmp_path, engine, monkeypatch):
    """A site with rows, keys, a policy with a budget, and one offered run."""
    made = vault.make(tmp_path / "site", engine)
    tiny.write_table(made.folder / "rows.jsonl")
    monkeypatch.chdir(made.folder)
    vault.write_key(made.folder / "site.pem", vault.SITE)
    (made.folder / "node.toml").write_text(
        f'[site]\nname = "north"\n[data]\npath = "rows.jsonl"\n[agent]\nlog_folder = "{made.folder}"\n'
        f'policy = "policy.toml"\npolicy_signer = "{identity.public_hex(vault.ADMIN)}"\nidentity_key = "site.pem"\n'
    )
    made.ask(made.offer().to_frame())
    return made


def budget(site, serial: int = 4, **settings: object) -> None:
    """A policy with another [privacy]."""
    from client.policy import file as policy_file

    lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
    text = site.policy.replace("[privacy]\n", f"[privacy]\n{lines}\n").replace("serial = 3", f"serial = {serial}")
    (site.folder / "policy.toml").write_text(text)
    policy_file.sign(site.folder / "policy.toml", vault.ADMIN)


def silotune_client(*arguments: object) -> int:
    """Run the command; its exit code."""
    try:
        cli.run(client_cli.app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def desk() -> review.Desk:
    return review.open_desk(config.load_node(Path("node.toml")))


def parts() -> dict:
    opened = desk()
    return {"node": opened.node, "rules": opened.policy, "key": vault.SITE, "history": opened.history}


def pay(run_sha256: str, *, rounds: int, first: int = 0, event: DpEvent = ROUND) -> None:
    """As the agent does: the ledger first, then the audit log."""
    paid = site_ledger.open_site(**parts())
    for round_index in range(first, first + rounds):
        paid.reserve(run_sha256, round_index, event)
        site_ledger.mirror(desk().log, paid)


def test_a_ledger_is_begun_once_and_tells_its_promise(site, capsys):
    assert silotune_client("ledger", "create", "node.toml", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dataset"], told["unit"], told["max_epsilon"], told["dp_delta"]) == ("notes", "patient_id", 8.0, 1e-6)
    assert Path(told["ledger"]).name == "notes.patient_id.ledger"
    assert silotune_client("ledger", "create", "node.toml") == 5
    assert "there is a ledger already" in capsys.readouterr().err


def test_a_lost_ledger_is_not_begun_anew(site, capsys):
    assert silotune_client("ledger", "create", "node.toml") == 0
    next(site.folder.glob("*.ledger")).unlink()
    capsys.readouterr()
    for arguments in (("ledger", "create", "node.toml"), ("privacy", "node.toml")):
        assert silotune_client(*arguments) == 5
        assert "a lost ledger is a spent budget" in capsys.readouterr().err


def test_without_a_ledger_the_command_to_begin_one_is_named(site, capsys):
    assert silotune_client("privacy", "node.toml") == 5
    assert "silotune-client ledger create" in capsys.readouterr().err


@pytest.mark.parametrize(("dp_delta", "told"), [("1e-4", "at most 1e-05"), ("1e-5", "")])
def test_a_delta_that_is_no_promise_is_refused(site, capsys, dp_delta, told):
    budget(site, dp_delta=dp_delta)
    assert silotune_client("ledger", "create", "node.toml") == (2 if told else 0)
    assert told in capsys.readouterr().err


def test_delta_is_bounded_by_the_number_of_units(site):
    with pytest.raises(ConfigError, match="too large for 1000000 units"):
        site_ledger.create(**parts(), log=desk().log, num_units=1_000_000)


def test_an_older_copy_is_refused_because_the_audit_log_knows_better(site):
    silotune_client("ledger", "create", "node.toml")
    path = next(site.folder.glob("*.ledger"))
    pay(site.manifest().sha256, rounds=1)
    copy = path.read_bytes()
    pay(site.manifest().sha256, rounds=1, first=1)
    path.write_bytes(copy)
    with pytest.raises(LedgerError, match="older copy was restored"):
        site_ledger.open_site(**parts())
    opened = parts()
    opened["history"] = history.History()  # the control: without the log the copy looks right
    assert len(site_ledger.open_site(**opened).budget().reservations) == 1


def test_the_page_shows_runs_curve_and_what_comes_next(site, capsys):
    silotune_client("ledger", "create", "node.toml")
    run = site.manifest()
    pay(run.sha256, rounds=2)
    pay(OTHER, rounds=1, event=DpEvent(0.01, 1.2, 100))
    capsys.readouterr()
    assert silotune_client("privacy", "node.toml", "--run", "tiny", "--json") == 0
    page = json.loads(capsys.readouterr().out)
    paid = site_ledger.open_site(**parts())
    assert page["spent"] == pytest.approx(paid.budget().spent(), abs=1e-4)
    assert page["spent"] + page["remaining"] == pytest.approx(8.0, abs=2e-4)
    assert [(one["run"], one["num_rounds_charged"]) for one in page["runs"]] == [(run.sha256, 2), (OTHER, 1)]
    assert page["runs"][0]["name"] == "tiny"
    assert page["next_round"]["epsilon"] == pytest.approx(paid.budget().cost_of(ROUND), abs=1e-4)
    num_planned = run.run.federation.num_rounds - 2
    assert [point["is_planned"] for point in page["curve"]] == [False] * 2 + [True] * num_planned
    epsilons = [point["epsilon"] for point in page["curve"]]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] > epsilons[1] - epsilons[0]
    if num_planned:
        assert epsilons[2] == pytest.approx(paid.budget().spent() + paid.budget().cost_of(ROUND), abs=2e-4)


def test_a_run_that_trained_here_without_noise_is_shown_as_unprotected(site, capsys):
    silotune_client("ledger", "create", "node.toml")
    site.open()
    assert site.step().kind == "update"
    capsys.readouterr()
    assert silotune_client("privacy", "node.toml", "--json") == 0
    page = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["epsilon"]) for run in page["runs"]] == [("tiny", None)]
    assert page["runs"][0]["bytes_out"] > 0
    assert (page["spent"], page["next_round"], page["curve"]) == (0.0, None, [])
    silotune_client("privacy", "node.toml")
    assert re.search(r"tiny\W+0\W+0\W+none", capsys.readouterr().out)


def test_the_page_for_people_says_what_is_covered_and_what_is_not(site, capsys):
    silotune_client("ledger", "create", "node.toml")
    pay(site.manifest().sha256, rounds=1)
    capsys.readouterr()
    assert silotune_client("privacy", "node.toml") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in privacy_view.NOT_COVERED:
        assert part in text
    assert "'patient_id' were among the rows of 'notes'" in text
    assert "One more round like the last (40 steps, noise 0.9, sampling 0.0256) costs epsilon" in text
    assert "only adapters leave" not in text.lower()


@pytest.mark.parametrize(("run", "exit_code"), [("nosuch", 3), ("tiny", 3)])
def test_a_run_that_was_never_charged_has_no_curve(site, capsys, run, exit_code):
    silotune_client("ledger", "create", "node.toml")
    assert silotune_client("privacy", "node.toml", "--run", run) == exit_code


def test_a_budget_is_lowered_with_the_policy_and_not_raised(site, capsys):
    silotune_client("ledger", "create", "node.toml")
    budget(site, serial=4, max_epsilon=2.5)
    capsys.readouterr()
    assert silotune_client("privacy", "node.toml") == 5
    assert "silotune-client ledger lower" in capsys.readouterr().err
    assert silotune_client("ledger", "lower", "node.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_epsilon"] == 2.5
    assert silotune_client("privacy", "node.toml") == 0
    budget(site, serial=5, max_epsilon=9.0)
    capsys.readouterr()
    for arguments in (("privacy", "node.toml"), ("ledger", "lower", "node.toml")):
        assert silotune_client(*arguments) == 5
    assert "can only be lowered" in capsys.readouterr().err


def test_a_run_whose_offer_is_gone_has_no_planned_rounds(site, capsys):
    silotune_client("ledger", "create", "node.toml")
    pay(site.manifest().sha256, rounds=1)
    for offer in (site.folder / consent.FOLDER).glob("*.frame"):
        offer.unlink()
    capsys.readouterr()
    silotune_client("privacy", "node.toml", "--json")
    assert len(json.loads(capsys.readouterr().out)["curve"]) == 1


def test_units_with_odd_names_have_a_file_of_their_own(site):
    header = site_ledger.promise(desk().policy, config.load_node(Path("node.toml")).data)
    from dataclasses import replace

    names = {
        site_ledger.ledger_path(site.folder, replace(header, unit=unit)).name for unit in ("a/b", "a b", "..", "row")
    }
    assert len(names) == 4
    assert all(Path(name).name == name for name in names)


def test_the_mirror_is_an_entry_of_the_signed_log(site):
    silotune_client("ledger", "create", "node.toml")
    pay(site.manifest().sha256, rounds=1)
    entries = [entry for entry in site.log() if entry.kind == "ledger"]
    assert [entry.facts["counter"] for entry in entries] == [0, 1]
    head = site_ledger.open_site(**parts()).head()
    assert sealed.LedgerHead(1, entries[-1].facts["ledger_sha256"]) == head


PRIVATE = {
    "privacy__mode": '"unit"',
    "privacy__sampling_prob": "0.0256",
    "privacy__noise_multiplier": "0.9",
    "privacy__dp_delta": "1e-6",
    "training__local_steps": "300",
    "training__local_epochs": "0.0",
    "federation__num_rounds": "4",
}


def test_a_review_shows_the_planned_curve_and_never_budget_over_rounds(site):
    """7.924 is dp-accounting's own figure for these 1,200 steps."""
    silotune_client("ledger", "create", "node.toml")
    run = site.manifest(**PRIVATE)
    assert site.ask(site.offer(run).to_frame()).head["code"] == "ApprovalRequired"
    told = review.review(desk(), run.sha256).facts["epsilon"]
    assert told.startswith("7.924 for the whole run (after round 1: ")
    assert told.endswith("at delta 1e-06, by itself; this data set: spent 0.000, left 8.000 of 8")
    curve = {int(number): float(cost) for number, cost in re.findall(r"(\d+): (\d\.\d+)", told)}
    assert list(curve) == [1, 2, 3]
    assert list(curve.values()) == sorted(curve.values())
    assert curve[1] > 1.5 * 7.924 / 4
