"""A coordinator that hides what its log, or another site's, has said; and a courier that wants to fill the disk."""

import dataclasses

import pytest

from client.agent import gatekeeper
from client.memory import replicas
from client.memory.history import AUDIT_FILE
from common.trust import audit_log, identity
from common.trust import heads as audit_heads
from common.trust.audit_log import Head
from common.trust.heads import Heads
from tests.samples import vault
from tests.samples.vault import told

POLICY = "PolicyRefusedError"
RULE = (POLICY, "audit.heads")
SERVER = vault.server_head()


def flood(site, num_frames: int, *, frame: bytes = b"x") -> int:
    """Send as many requests; by how many bytes the audit log grew."""
    before = (site.folder / AUDIT_FILE).stat().st_size
    for _ in range(num_frames):
        site.agent.answer(frame)
    return (site.folder / AUDIT_FILE).stat().st_size - before


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_coordinator_that_does_not_tell_where_its_log_stands(open_site, kind):
    another = audit_heads.operator(identity.public_hex(vault.STRANGER))
    theirs = vault.signed(SERVER, another, key=vault.STRANGER)
    south = vault.signed(SERVER)
    for heads in ([], audit_heads.to_list({"south": south}), audit_heads.to_list({another: theirs})):
        assert open_site.refused(open_site.step(kind, heads=heads)) == RULE
    assert open_site.sent() == [("open", 0)]
    assert open_site.step(kind, **told()).kind in ("update", "metrics")


@pytest.mark.parametrize(
    "heads",
    [
        None,
        "x",
        {},
        [["south", -1, "5e" * 32, 1.0, "ab" * 32, "ab" * 64]],
        [["south", 1, "5e" * 32, 1.0, "ab" * 32, "ab"]],
        [[]] * 5000,
    ],
)
def test_heads_that_are_none(open_site, heads):
    assert open_site.refused(open_site.step(heads=heads)) == ("WireError", "WireError")
    assert open_site.step().kind == "update"


@pytest.mark.parametrize(
    "later",
    [
        told(Head(6, "aa" * 32, vault.NOW)),
        told(Head(7, "aa" * 32, vault.NOW)),
        told(Head(0, "aa" * 32, vault.NOW)),
        told(Head(9, "aa" * 32, vault.NOW)),
        told(south=Head(3, "aa" * 32, vault.NOW)),
        told(south=Head(4, "aa" * 32, vault.NOW)),
    ],
)
def test_a_log_that_went_back_stops_the_round_and_trains_nothing(open_site, later):
    south = Head(4, "ab" * 32, vault.NOW - 9)
    assert open_site.step("evaluate", **told(south=south)).kind == "metrics"
    trained = []
    honest = open_site.agent._steps["train"]
    open_site.agent._steps["train"] = lambda request: trained.append(honest(request)) or trained[-1]
    assert open_site.refused(open_site.step(**later)) == RULE
    assert not trained
    assert open_site.kept() == {vault.SERVER_LOG: [SERVER], "south": [south]}
    went_on = told(vault.server_head(9), south=Head(5, "aa" * 32, vault.NOW))
    assert open_site.step(**went_on).kind == "update"  # control
    assert len(trained) == 1


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_log_that_was_written_anew_and_is_longer_stops_the_round(open_site, changed):
    assert open_site.step("evaluate", **told()).kind == "metrics"
    lines = vault.links(12)
    lines[changed] = "00" * 32
    anew = Head(11, audit_log.follow(audit_log.GENESIS, lines), vault.NOW)
    request = told(anew) | {"links": lines}
    assert open_site.refused(open_site.step(**request)) == RULE
    assert "written anew" in str(open_site.errors[-1])
    assert open_site.step(**told(vault.server_head(11))).kind == "update"  # control


def test_control_a_longer_log_is_taken_by_who_kept_no_head_of_it(open_site):
    lines = ["00" * 32, *vault.links(12)[1:]]
    anew = Head(11, audit_log.follow(audit_log.GENESIS, lines), vault.NOW)
    assert open_site.step(**(told(anew) | {"links": lines})).kind == "update"


@pytest.mark.parametrize("links", [None, vault.links(9), [*vault.links(7), 7], [*vault.links(7), "AB" * 32], "00" * 32])
def test_links_that_are_too_many_or_none(open_site, links):
    assert open_site.refused(open_site.step(**(told() | {"links": links}))) == ("WireError", "WireError")
    assert open_site.step(**told()).kind == "update"


@pytest.mark.parametrize("num_more", [13, 5000])
def test_a_log_is_not_taken_with_fewer_hashes_than_it_grew_by(open_site, num_more):
    """However much it grew: a rewritten log with thousands of new lines, of which the last few fit, is no proof."""
    assert open_site.step("evaluate", **told() | {"links": []}).kind == "metrics"  # the first that it hears
    last = 7 + num_more
    whole, few = vault.links(last + 1), vault.links(last + 1)[1 - num_more :]
    anew = told(Head(last, "aa" * 32, vault.NOW))
    for links in (few, whole[-num_more:]):
        assert open_site.refused(open_site.step(**anew | {"links": links})) == RULE
    right = told(vault.server_head(last))
    assert open_site.refused(open_site.step(**right | {"links": few})) == RULE
    assert open_site.step(**right | {"links": whole[-num_more:]}).kind == "update"  # the control


def test_what_a_site_knows_of_others_survives_a_restart(open_site):
    assert open_site.step("evaluate").kind == "metrics"
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    assert open_site.refused(open_site.step(**told(dataclasses.replace(vault.server_head(6), time=vault.NOW)))) == RULE
    assert open_site.step(**told()).kind == "update"


def test_control_a_site_that_forgot_what_it_knew_notices_nothing(open_site):
    assert open_site.step("evaluate").kind == "metrics"
    (open_site.folder / replicas.HEADS_FILE).unlink()
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    assert open_site.refused(open_site.step(**told(Head(6, "aa" * 32, vault.NOW)))) == RULE  # nor does it fit its links
    assert open_site.step(**told(vault.server_head(6))).kind == "update"


def test_a_repeated_round_gives_the_same_bytes_whatever_heads_come_with_it(open_site):
    first = open_site.step()
    again = open_site.step(**told(vault.server_head(9), south=SERVER))
    assert (first.kind, again.body) == ("update", first.body)
    left = [entry.facts["content_sha256"] for entry in open_site.log() if entry.facts.get("step") == "train"]
    assert left[0] == left[1]


def test_a_site_whose_older_log_was_restored_finds_it_out(open_site):
    whole = (open_site.folder / AUDIT_FILE).read_bytes()
    update = open_site.step()
    own = Head(update.head["num_audit_entries"] - 1, update.head["audit_sha256"], update.head["audit_time"])
    assert open_site.step("evaluate", round_index=1, **told(north=own)).kind == "metrics"  # control
    (open_site.folder / AUDIT_FILE).write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 1])
    (open_site.folder / replicas.HEADS_FILE).unlink()  # the whole folder is from the backup
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    assert open_site.refused(open_site.step("evaluate", round_index=1, **told(north=own))) == RULE
    assert "restored" in str(open_site.errors[-1])
    assert (
        open_site.step("evaluate", round_index=1, **told()).kind == "metrics"
    )  # control: who is not told, cannot know


def test_a_site_that_can_keep_no_more_heads_says_so_and_trains_nothing(open_site, monkeypatch):
    monkeypatch.setattr(audit_heads, "MAX_FILE_BYTES", 10)
    assert open_site.refused(open_site.step()) == RULE
    assert "move it to your archive" in str(open_site.errors[-1])
    monkeypatch.undo()
    assert open_site.step().kind == "update"


def test_another_operators_log_is_another_log(open_site):
    theirs = audit_heads.operator(identity.public_hex(vault.STRANGER))
    head = vault.signed(Head(99, "cc" * 32, vault.NOW), theirs, key=vault.STRANGER)
    Heads(open_site.folder / replicas.HEADS_FILE, vault.FEDERATION).keep({theirs: head})
    assert open_site.step().kind == "update"


def test_a_flood_of_requests_cannot_fill_the_disk(open_site):
    limit = gatekeeper.MAX_REFUSALS_A_MINUTE
    grown = flood(open_site, limit)
    assert 0 < flood(open_site, 1500) < grown / 50
    assert [entry.kind for entry in open_site.log()[-2:]] == ["refused", "suppressing"]
    open_site.now += 61
    assert open_site.refused(open_site.ask(b"y")) == ("WireError", "WireError")
    suppressed = [entry.facts["num_refusals"] for entry in open_site.log() if entry.kind == "suppressed"]
    assert suppressed == [1500]


def test_control_without_the_bound_every_request_of_a_flood_is_a_line(open_site, monkeypatch):
    monkeypatch.setattr(gatekeeper, "MAX_REFUSALS_A_MINUTE", 10**9)
    open_site.start()
    num_before = len(open_site.log())
    flood(open_site, 300)
    assert len(open_site.log()) == num_before + 300


def test_what_was_suppressed_is_told_with_the_next_answer_too(open_site):
    flood(open_site, gatekeeper.MAX_REFUSALS_A_MINUTE + 30)
    open_site.now += 61
    assert open_site.step().kind == "update"
    assert [entry.kind for entry in open_site.log()[-3:]] == ["suppressing", "suppressed", "left"]


def test_the_same_offer_again_and_again_cannot_fill_the_disk(open_site):
    for _ in range(gatekeeper.MAX_OPENS_A_MINUTE - 1):
        assert open_site.open(approve=False).kind == "opened"
    assert open_site.refused(open_site.open(approve=False)) == (POLICY, "runs.opens")
    open_site.now += 61
    assert open_site.open(approve=False).kind == "opened"
