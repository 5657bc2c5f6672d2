"""A9 and its neighbours: a roster that is old, forged, doubled or without this site, against a site that reads it.

Each is refused by rule `roster` at the next step, logged, and refused again by a fresh start. The control is the same
site with the right roster.
"""

import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.agent.gatekeeper import Gatekeeper
from common.errors import PolicyRefusedError
from common.frame import wire
from common.frame.wire import Frame
from common.trust import identity, kit, roster
from common.trust.governance import Governance
from common.trust.roster import OperatorEntry
from tests.samples import vault
from tests.samples.rosters import GOOD, MEMBERS, NORTH, PINNED, changed, put, signed, site

POLICY = "PolicyRefusedError"
BY_ROSTER = (POLICY, "roster")


def altered() -> bytes:
    """The right signatures, and one more operator."""
    file = json.loads(signed(changed()))
    file["roster"]["operators"].append(dataclasses.asdict(OperatorEntry("eve", "cc" * 32, "dd" * 32)))
    return wire.canonical_json(file)


FORGED = {
    "signed by strangers": signed(changed(), (vault.STRANGER, vault.OPERATOR)),
    "altered after signing": altered(),
    "one signature too few": signed(changed(), MEMBERS[:1]),
    "a quorum of its own": signed(changed(quorum=1), MEMBERS[:1]),
    "a governance of its own": signed(changed(governance=(identity.public_hex(vault.STRANGER),)), MEMBERS),
    "another federation": signed(changed(federation_id="onco-us")),
    "a Sybil member that one member of the governance signed": signed(
        changed(sites=(*GOOD.sites, site("south-2", 7))), MEMBERS[:1]
    ),
    "a Sybil member with another site's key": signed(
        changed(sites=(*GOOD.sites, site("south-2", 7, identity_key=GOOD.sites[1].identity_key)))
    ),
    "a Sybil member under this site's name": signed(changed(sites=(*GOOD.sites, site("north", 7)))),
    "a governance member as a site": signed(
        changed(sites=(*GOOD.sites, site("south-2", 7, identity_key=PINNED.keys[0])))
    ),
    "an older epoch": signed(dataclasses.replace(GOOD, epoch=3)),
    "another roster of the same epoch": signed(dataclasses.replace(GOOD, sites=(NORTH, site("west", 8)))),
    "this site revoked": signed(changed(sites=GOOD.sites[1:])),
    "another key under this site's name": signed(changed(sites=(site("north", 9), GOOD.sites[1]))),
    "no roster at all": b"",
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED.keys())
def test_a09_roster_that_is_not_the_federations_newest(member, data):
    assert member.step().kind == "update"
    put(member, data)
    assert member.refused(member.step(round_index=1)) == BY_ROSTER
    assert member.refused(member.ask(member.offer().to_frame())) == BY_ROSTER
    with pytest.raises(PolicyRefusedError, match="roster: ") as caught:
        member.start()
    last = member.log()[-1]
    assert caught.value.rule == last.facts["rule"] == "roster"
    assert (last.kind, last.facts["step"]) == ("refused", "start")
    put(member, signed(GOOD))
    member.start()
    assert member.open(approve=False).kind == "opened"
    assert member.step(round_index=1).kind == "update"


def test_a09_roster_of_the_next_epoch_is_taken_and_the_one_before_never_again(member):
    put(member, signed(changed()))
    assert member.step().kind == "update"
    noted = [entry.facts["epoch"] for entry in member.log() if entry.kind == "roster"]
    assert noted == [4, 5]
    put(member, signed(GOOD))
    assert member.refused(member.step(round_index=1)) == BY_ROSTER
    with pytest.raises(PolicyRefusedError, match="5 was seen before"):  # also after a restart
        member.start()


def hand(member, data: bytes) -> Frame:
    """What the link does with a roster that it fetched."""
    return member.ask(Frame(roster.KIND, {}, data))


TRUE_ENDS = ("this site revoked", "another key under this site's name")  # the governance's word, which holds


def test_a09_roster_that_the_link_brings_and_that_is_not_the_federations_newest(member):
    before = (member.roster_folder / kit.ROSTER).read_bytes()
    for data in (FORGED[name] for name in FORGED if name not in TRUE_ENDS):
        assert member.refused(hand(member, data)) == BY_ROSTER
        assert member.log()[-1].facts["step"] == "roster"
        assert (member.roster_folder / kit.ROSTER).read_bytes() == before
    assert member.step().kind == "update"  # the roster that it had holds
    told = hand(member, signed(changed()))  # control
    assert (told.kind, told.head, member.log()[-1].facts["epoch"]) == ("taken", {"epoch": 5}, 5)


@pytest.mark.parametrize("name", TRUE_ENDS)
def test_a09_roster_that_the_link_brings_and_that_ends_this_sites_part(member, name):
    assert member.refused(hand(member, FORGED[name])) == BY_ROSTER
    assert (member.roster_folder / kit.ROSTER).read_bytes() == FORGED[name]
    assert member.refused(member.step()) == BY_ROSTER
    assert member.refused(hand(member, signed(GOOD))) == BY_ROSTER  # and it does not go back
    assert member.refused(member.step()) == BY_ROSTER


def test_a09_the_newest_roster_is_taken_once_and_an_older_one_never_again(member, make):
    num_entries = len(member.log())
    assert hand(member, signed(GOOD)).head == {"epoch": 4}
    assert len(member.log()) == num_entries  # as it does at each start of the link
    for _ in range(2):
        assert hand(member, signed(changed())).head == {"epoch": 5}
    assert [entry.kind for entry in member.log()[num_entries:]] == ["roster"]
    assert member.refused(hand(member, signed(GOOD))) == BY_ROSTER
    assert member.refused(hand(member, signed(dataclasses.replace(changed(), sites=(NORTH,))))) == BY_ROSTER
    assert member.refused(hand(member, bytes((4 << 20) + 1))) == BY_ROSTER
    put(member, signed(GOOD))  # the folder alone was restored from a backup
    assert hand(member, signed(changed())).head == {"epoch": 5}
    assert member.step().kind == "update"
    alone = make()
    assert alone.refused(hand(alone, signed(changed()))) == BY_ROSTER  # a site that reads no roster


def test_a09_run_under_a_newer_roster_waits_until_the_link_has_brought_it(member):
    """And not by the number alone: nobody signed it, and the site's own roster decides who may offer a run."""
    frame = dataclasses.replace(member.offer(), roster_epoch=5).to_frame()
    assert member.refused(member.ask(frame)) == ("RosterOutdated", "roster")
    hand(member, signed(changed()))
    assert member.ask(frame).kind == "opened"
    older = dataclasses.replace(member.offer(), roster_epoch=1).to_frame()
    assert member.ask(older).kind == "opened"
    for false in (-1, True, 1.5, "5", 1 << 60):
        answer = member.ask(dataclasses.replace(frame, head={**frame.head, "roster_epoch": false}))
        assert member.refused(answer)[0] == "WireError"


def test_a09_other_governance_beside_a_roster_that_it_signed(member):
    strangers = [Ed25519PrivateKey.generate() for _ in range(2)]
    other = Governance("onco-eu", 2, tuple(map(identity.public_hex, strangers)), "ee" * 32)
    (member.roster_folder / kit.PINNED).write_bytes(other.to_bytes())
    put(member, signed(changed(governance=other.keys), strangers))
    assert member.refused(member.step()) == BY_ROSTER
    (member.roster_folder / kit.PINNED).write_bytes(PINNED.to_bytes())
    put(member, signed(GOOD))
    assert member.step().kind == "update"


def test_a09_roster_below_the_policys_epoch(join):
    with pytest.raises(PolicyRefusedError, match="the policy asks for 5") as caught:
        join(operators=f'["{identity.public_hex(vault.OPERATOR)}"]\nroster_epoch_min = 5')
    assert caught.value.rule == "roster"
    assert join(operators="[]\nroster_epoch_min = 4").open().kind == "opened"


def test_a09_policy_that_asks_for_a_roster_at_an_agent_that_reads_none(make):
    with pytest.raises(PolicyRefusedError, match=r"agent\.roster_folder"):
        make(operators="[]\nroster_epoch_min = 1")
    assert make().open().kind == "opened"


def test_a02_run_of_somebody_whom_the_roster_does_not_name(join):
    member = join(operators="[]")
    member.approve(member.manifest())
    assert member.refused(member.ask(member.offer(key=vault.STRANGER).to_frame())) == BY_ROSTER
    assert member.ask(member.offer().to_frame()).kind == "opened"


def test_a02_operator_who_left_the_roster_but_not_the_policy(join):
    member = join()
    put(member, signed(changed(operators=(OperatorEntry("oscar", "bb" * 32, "dd" * 32),))))
    assert member.refused(member.open()) == BY_ROSTER
    put(member, signed(changed(epoch=6)))
    assert member.open(approve=False).kind == "opened"


def test_a02_operator_whom_the_policy_does_not_list(join):
    member = join(operators=f'["{"dd" * 32}"]')
    assert member.refused(member.open()) == (POLICY, "federation.operators")
    assert join(operators="[]").open().kind == "opened"


def test_a02_without_operators_in_the_roster_the_policys_list_decides(join):
    member = join()
    put(member, signed(changed(operators=())))
    assert member.refused(member.ask(member.offer(key=vault.STRANGER).to_frame())) == (POLICY, "federation.operators")
    assert member.open().kind == "opened"
    nobody = join(operators="[]")
    assert nobody.refused(nobody.open()) == (POLICY, "federation.operators")


def test_a08_federation_with_fewer_sites_than_an_aggregate_must_come_from(join):
    member = join()
    put(member, signed(changed(sites=(NORTH,))))
    assert member.refused(member.open()) == (POLICY, "cohort.min_sites")
    put(member, signed(changed(epoch=6)))
    assert member.open(approve=False).kind == "opened"


def test_control_without_the_check_a_forged_roster_is_not_noticed(member, monkeypatch):
    put(member, FORGED["signed by strangers"])
    monkeypatch.setattr(Gatekeeper, "_check_roster", lambda _: None)
    assert member.step().kind == "update"
