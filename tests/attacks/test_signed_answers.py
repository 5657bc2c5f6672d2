"""A member, or whoever holds a courier, answers in another site's name, or with bytes of another site or round.

Each has a control: where names are not checked against the roster, or nobody signs, the lie is taken.
"""

import contextlib
import dataclasses

import pytest

from common import events
from common.errors import AuthError, TooFewSitesError
from common.frame.wire import Frame
from common.trust import identity, signed_frame
from tests import tiny
from tests.samples import rosters, vault

FEDERATION = vault.FEDERATION
CHANGES = {"federation.num_sites": "2"}


@pytest.fixture
def members(tmp_path, engine):
    """North and south as the roster names them, each with a key of its own."""
    keys = {"north": vault.SITE, "south": rosters.SOUTH_KEY}
    return {
        name: vault.make(tmp_path / name, engine, name=name, key=key, max_per_day="9") for name, key in keys.items()
    }


@pytest.fixture
def found(tmp_path, engine, tiny_base):
    """A federation of nodes by a signed run, with or without the roster."""

    def make(nodes, *, with_roster: bool = True):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        fed = tiny.federation(engine, folder, nodes, tiny.settings(tiny_base, CHANGES))
        roster_folder = rosters.write(tmp_path / "roster") if with_roster else None
        operator = vault.operator(folder, roster_folder=roster_folder)
        fed.offer, fed.trail = operator.make_offer(fed.manifest), operator.trail
        return fed

    return make


def join(fed, members) -> None:
    for site in members.values():
        site.approve(fed.manifest)
    fed.wait()


def failures(fed) -> list[tuple[str, str]]:
    log = events.read(fed.log.path)
    return [(e["step"], e["reason"].split(":")[0]) for e in log if e["kind"] == "site_failed"]


def test_control_members_under_their_own_names_take_part(found, members, engine):
    fed = found({1: members["north"].send, 2: members["south"].send})
    join(fed, members)
    fed.play(engine.initial, round_index=0)
    fed.evaluate(engine.initial, num_rounds=1, generate=False)
    assert failures(fed) == []
    assert sorted(fed.metrics) == ["north", "south"]


@pytest.mark.parametrize("with_roster", [True, False])
def test_a_member_cannot_be_the_first_to_answer_under_anothers_name(found, members, tmp_path, engine, with_roster):
    impostor = vault.make(tmp_path / "impostor", engine, name="north", key=rosters.SOUTH_KEY, max_per_day="9")
    fed = found({1: impostor.send, 2: members["south"].send}, with_roster=with_roster)
    impostor.approve(fed.manifest)
    if not with_roster:  # the control: nobody knows whose name it is
        join(fed, members)
        assert fed.names["north"] == 1
        return
    with pytest.raises(TooFewSitesError, match="'north' is signed by another key"):
        join(fed, members)
    assert "north" not in fed.names


def test_a_name_that_the_roster_does_not_have_is_nobodys(found, members, tmp_path, engine):
    stranger = vault.make(tmp_path / "stranger", engine, name="east", key=vault.STRANGER, max_per_day="9")
    fed = found({1: stranger.send, 2: members["south"].send})
    stranger.approve(fed.manifest)
    with pytest.raises(TooFewSitesError, match="the roster names no site 'east'"):
        join(fed, members)


def courier(site: vault.Vault, kind: str, change):
    """A courier that changes one kind of answer, with a right hash."""
    return tiny.spoilt(site.send, kind, change)


LIES = {
    "another name": ("train", tiny.with_head(site="south")),
    "fewer steps": ("train", tiny.with_head(num_steps=1)),
    "another update": ("train", tiny.with_body(lambda body: body[:-4] + bytes(4))),
    "no signature": ("train", tiny.with_head(signer="", signature="")),
    "figures of its own": ("evaluate", tiny.with_head(nll_sum=1e-9)),
    "unsigned figures": ("evaluate", tiny.with_head(signer="", signature="")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_courier_can_drop_an_answer_and_cannot_change_one(found, members, engine, lie):
    kind, change = LIES[lie]
    fed = found({1: courier(members["north"], kind, change), 2: members["south"].send})
    join(fed, members)
    with pytest.raises(TooFewSitesError) if kind == "train" else contextlib.nullcontext():
        fed.play(engine.initial, round_index=0)
    if kind == "evaluate":
        fed.evaluate(engine.initial, num_rounds=1, generate=False)
    assert failures(fed) == [(kind, "AuthError")]


def test_an_answer_of_another_round_or_of_another_federation_is_not_signed_for_this_one(members):
    site = members["north"]
    assert site.open().kind == "opened"
    update, key = site.step(), identity.public_hex(vault.SITE)
    signed_frame.check(update, key=key, federation=FEDERATION)  # the control
    changes = [
        dataclasses.replace(update, kind="metrics"),
        dataclasses.replace(update, body=update.body + b"x"),
        *(
            Frame(update.kind, {**update.head, name: value}, update.body)
            for name, value in {
                "round_index": 1,
                "run_sha256": "ab" * 32,
                "site": "south",
                "num_examples": 10,
                "train_loss": 1.0,
            }.items()
        ),
    ]
    for other in changes:
        with pytest.raises(AuthError):
            signed_frame.check(other, key=key, federation=FEDERATION)
    for wrong in (
        {"key": identity.public_hex(rosters.SOUTH_KEY), "federation": FEDERATION},
        {"key": key, "federation": "onco-us"},
    ):
        with pytest.raises(AuthError):
            signed_frame.check(update, **wrong)


def test_every_kind_of_answer_is_signed(members):
    site = members["north"]
    answers = [site.open(), site.step("evaluate"), site.step()]
    assert [answer.kind for answer in answers] == ["opened", "metrics", "update"]
    for answer in answers:
        signed_frame.check(answer, key=identity.public_hex(vault.SITE), federation=FEDERATION)


def test_a_name_keeps_the_key_of_its_first_answer_where_there_is_no_roster(found, members, tmp_path, engine):
    fed = found({1: members["north"].send, 2: members["south"].send}, with_roster=False)
    join(fed, members)
    other = vault.make(tmp_path / "other", engine, name="north", key=vault.STRANGER, max_per_day="9")
    other.approve(fed.manifest)
    assert other.open(fed.manifest).kind == "opened"
    plan = {"run_sha256": fed.manifest.sha256, "round_index": 0, "generate": False}
    with pytest.raises(AuthError, match="another key"):
        fed.trail.check(other.step(run=fed.manifest, **plan), site="north")
    fed.trail.check(members["north"].step(run=fed.manifest, **plan), site="north")  # the control
