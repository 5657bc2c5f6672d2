"""Heads of audit logs that their owners did not sign: told by a hostile coordinator to a site, or by a site to it.

At a site each is refused by rule `audit.heads`, logged, trains nothing and is not kept. The control is the same step
with the head that its owner signed, or the same false head where the guard under test is off.
"""

import dataclasses

import pytest

from client.memory import replicas
from common.errors import AuditError, AuthError
from common.frame.records import UpdateHead
from common.trust import heads, identity
from common.trust.audit_log import Head
from server.fleet import trail as trails
from tests.samples import rosters, vault
from tests.samples.rosters import NORTH, SOUTH, SOUTH_KEY

RULE = ("PolicyRefusedError", "audit.heads")
TRUE = Head(4, "ab" * 32, vault.NOW - 9)
INVENTED = Head(9, "cd" * 32, vault.NOW - 5)
HONEST = vault.signed(TRUE, key=SOUTH_KEY)


def as_south(key=SOUTH_KEY, head=INVENTED, owner="south", federation=vault.FEDERATION):
    """A head that names south's key, signed by any key for anybody."""
    made = vault.signed(head, owner, key=key, federation=federation)
    return dataclasses.replace(made, signer=SOUTH.identity_key, federation=vault.FEDERATION)


LINE = identity.sign(SOUTH_KEY, b"{}", purpose="audit")
FALSE = {
    "invented and signed by the operator": as_south(vault.OPERATOR),
    "signed by this site's key": as_south(vault.SITE),
    "signed by a stranger, who says so": vault.signed(INVENTED, key=vault.STRANGER),
    "signed by another site, which says so": vault.signed(INVENTED, key=vault.SITE),
    "of another site": as_south(owner="north"),
    "for another federation": as_south(head=TRUE, federation="onco-us"),
    "another hash under the signature": dataclasses.replace(HONEST, head=dataclasses.replace(TRUE, sha256="cd" * 32)),
    "another place under the signature": dataclasses.replace(HONEST, head=dataclasses.replace(TRUE, sequence=9)),
    "another time under the signature": dataclasses.replace(HONEST, head=dataclasses.replace(TRUE, time=vault.NOW)),
    "a line's signature": dataclasses.replace(HONEST, signature=LINE),
}


@pytest.mark.parametrize("told", FALSE.values(), ids=FALSE)
def test_a_coordinator_that_tells_what_another_site_never_signed(member, told):
    assert member.refused(member.step("evaluate", **vault.told(south=told))) == RULE
    assert "did not sign" in str(member.errors[-1])
    assert member.sent() == [("open", 0)]
    assert not (member.folder / replicas.HEADS_FILE).exists() or not member.kept()
    assert member.step("evaluate", **vault.told(south=HONEST)).kind == "metrics"  # control
    assert member.kept()["south"] == [TRUE]


@pytest.mark.parametrize("told", FALSE.values(), ids=FALSE)
def test_control_without_the_signature_a_false_head_is_kept(member, told, monkeypatch):
    monkeypatch.setattr(heads, "verify", lambda owner, told, *, key="": None)
    assert member.step("evaluate", **vault.told(south=told)).kind == "metrics"
    assert told.head in [one.head for one in member.gate._heads.newest().values()]


def test_a_false_head_would_have_stopped_the_site_for_good(member, monkeypatch):
    false = FALSE["invented and signed by the operator"]
    with monkeypatch.context() as patch:
        patch.setattr(heads, "verify", lambda owner, told, *, key="": None)
        assert member.step("evaluate", **vault.told(south=false)).kind == "metrics"
    later = vault.signed(Head(9, "ef" * 32, vault.NOW), key=SOUTH_KEY)
    assert member.refused(member.step(**vault.told(south=later))) == RULE


def test_a_coordinator_that_invents_what_this_site_told(member):
    own = member.gate._log.head
    false = vault.signed(dataclasses.replace(own, sha256="cd" * 32), "north", key=vault.OPERATOR)
    for told in (false, dataclasses.replace(false, signer=NORTH.identity_key)):
        assert member.refused(member.step("evaluate", **vault.told(north=told))) == RULE
        assert "did not sign" in str(member.errors[-1])
    assert member.step("evaluate", **vault.told(north=own)).kind == "metrics"  # control


def test_a_coordinators_own_head_that_another_key_signed(member):
    request = vault.told()
    honest = request["heads"][0]
    for key in (vault.STRANGER, vault.SITE):
        other = vault.told(key=key)["heads"][0]
        for false in ([*honest[:-1], other[-1]], [*honest[:-2], *other[-2:]]):
            assert member.refused(member.step("evaluate", **{**request, "heads": [false]})) == RULE
    assert member.step("evaluate", **request).kind == "metrics"  # control


def test_a_coordinators_head_for_another_federation(member):
    assert member.refused(member.step("evaluate", **vault.told(federation="onco-us"))) == RULE
    assert member.step("evaluate", **vault.told()).kind == "metrics"  # control


def test_heads_of_who_is_not_in_the_roster_are_left_out(member):
    ghost = vault.signed(INVENTED, "ghost", key=vault.STRANGER)
    assert member.step("evaluate", **vault.told(ghost=ghost, south=HONEST)).kind == "metrics"
    assert sorted(member.kept()) == sorted([vault.SERVER_LOG, "south"])


def test_control_a_site_without_a_roster_believes_the_first_key_and_no_other(open_site):
    first = vault.signed(INVENTED, key=vault.STRANGER)
    assert open_site.step("evaluate", **vault.told(south=first)).kind == "metrics"
    later = dataclasses.replace(INVENTED, sequence=10, time=vault.NOW)
    assert open_site.refused(open_site.step(**vault.told(south=vault.signed(later, key=SOUTH_KEY)))) == RULE
    assert open_site.step(**vault.told(south=vault.signed(later, key=vault.STRANGER))).kind == "update"


@pytest.fixture
def trail(tmp_path):
    """A coordinator that reads the roster."""
    return vault.operator(tmp_path, roster_folder=rosters.write(tmp_path / "kit")).trail


def update(told, *, site="south") -> UpdateHead:
    """What a site tells with its update."""
    head = told.head
    audit = (head.sequence + 1, head.sha256, head.time, told.signer, told.signature)
    return UpdateHead(site, "ab" * 32, 0, 12, 3, 100, 1.0, 1.0, *audit)


@pytest.mark.parametrize("told", FALSE.values(), ids=FALSE)
def test_an_update_with_a_head_that_its_site_did_not_sign_does_not_count(trail, told):
    with pytest.raises(AuditError, match="did not sign"):
        trail.keep(update(told))
    assert trail.heads.newest() == {}
    trail.keep(update(HONEST))  # control
    assert trail.heads.newest() == {"south": HONEST}


def test_an_update_of_a_site_that_the_roster_does_not_name_does_not_count(trail, tmp_path):
    trail.keep(update(HONEST))  # control
    (tmp_path / "kit" / "roster.json").write_bytes(rosters.signed(rosters.changed(sites=(NORTH,))))
    with pytest.raises(AuditError, match="not in the roster"):
        trail.keep(update(vault.signed(INVENTED, key=SOUTH_KEY)))
    assert [owner for owner, *_ in trail.told()["heads"]] == [vault.SERVER_LOG]


def test_an_update_of_a_site_of_the_roster_that_tells_of_no_log_does_not_count(trail):
    with pytest.raises(AuditError, match="no audit log"):
        trail.keep(UpdateHead("south", "ab" * 32, 0, 12, 3, 100, 1.0, 1.0))


@pytest.mark.parametrize("name", ["signed by strangers", "older"])
def test_a_coordinator_goes_back_to_no_older_and_no_forged_roster(trail, tmp_path, name):
    path = tmp_path / "kit" / "roster.json"
    path.write_bytes(rosters.signed(rosters.changed()))
    trail.keep(update(HONEST))  # control
    keys = (vault.STRANGER, vault.SITE) if name == "signed by strangers" else tuple(rosters.MEMBERS[:2])
    path.write_bytes(rosters.signed(rosters.GOOD if name == "older" else rosters.changed(epoch=6), keys))
    with pytest.raises(AuthError):
        trail.keep(update(HONEST))


def test_a_roster_of_another_federation_is_not_read(tmp_path):
    folder = rosters.write(tmp_path / "kit")
    vault.write_key(tmp_path / "op.pem", vault.OPERATOR)
    with pytest.raises(AuthError, match="onco-us"):
        trails.open_trail(tmp_path / "op.pem", federation="onco-us", roster_folder=folder)
    trails.open_trail(tmp_path / "op.pem", federation="onco-eu", roster_folder=folder)  # control
