import dataclasses
import json

import pytest

from common.errors import AuthError, ConfigError
from common.frame import wire
from common.trust import governance, identity, roster
from common.trust.governance import Governance
from common.trust.roster import OperatorEntry, PeerEntry, Roster, SiteEntry
from tests.samples import rosters
from tests.samples.rosters import MEMBERS, PINNED
from tests.samples.vault import STRANGER


def site(number: int, **changes) -> SiteEntry:
    return dataclasses.replace(rosters.site(f"site-{number}", 5 + number), **changes)


ROSTER = roster.make(
    PINNED,
    epoch=4,
    sites=(site(0), site(1)),
    servers=(PeerEntry("gateway", "aa" * 32),),
    operators=(OperatorEntry("operator", "bb" * 32, "dd" * 32),),
)


def accepted(data: bytes, tmp_path, *, pinned: Governance = PINNED, epoch_min: int = 1) -> Roster:
    (tmp_path / "roster.json").write_bytes(data)
    return roster.load(tmp_path / "roster.json", governance=pinned, epoch_min=epoch_min)


@pytest.mark.parametrize("signers", [MEMBERS, MEMBERS[:2], MEMBERS[1:], [*MEMBERS[:2], STRANGER]])
def test_a_roster_with_enough_signatures_is_accepted(tmp_path, signers):
    assert accepted(rosters.signed(ROSTER, signers), tmp_path) == ROSTER


def test_what_we_sign_is_accepted(tmp_path):
    assert accepted(roster.signed_bytes(ROSTER, MEMBERS[:2], pinned=PINNED), tmp_path) == ROSTER


@pytest.mark.parametrize("signers", [[], MEMBERS[:1], [MEMBERS[0], STRANGER], [STRANGER]])
def test_a_roster_with_too_few_signatures_is_refused(tmp_path, signers):
    with pytest.raises(AuthError, match=r"valid signatures of governance keys and needs 2"):
        accepted(rosters.signed(ROSTER, signers), tmp_path)


def test_one_member_counts_once_however_often_it_is_written(tmp_path):
    signed = json.loads(rosters.signed(ROSTER, MEMBERS[:1]))
    ((public, signature),) = signed["signatures"].items()
    signed["signatures"][public.upper()] = signature
    with pytest.raises(AuthError, match="has 1 valid"):
        accepted(wire.canonical_json(signed), tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": 5},
        {"sites": ROSTER.sites[:1]},
        {"sites": (site(0), site(1, identity_key="cc" * 32))},
        {"sites": (site(0), site(1, tls_fingerprint="cc" * 32))},
        {"operators": (OperatorEntry("operator", "cc" * 32, "dd" * 32),)},
        {"operators": (OperatorEntry("operator", "bb" * 32, "cc" * 32),)},
    ],
)
def test_a_roster_that_was_altered_after_signing_is_refused(tmp_path, changed):
    signed = json.loads(rosters.signed(ROSTER, MEMBERS))
    signed["roster"] = dataclasses.asdict(dataclasses.replace(ROSTER, **changed))
    with pytest.raises(AuthError, match="has 0 valid"):
        accepted(wire.canonical_json(signed), tmp_path)


def test_a_roster_for_another_purpose_is_refused(tmp_path):
    signed = json.loads(rosters.signed(ROSTER, []))
    signed["signatures"] = PINNED.sign(ROSTER.to_bytes(), MEMBERS, purpose="kit")
    with pytest.raises(AuthError, match="has 0 valid"):
        accepted(wire.canonical_json(signed), tmp_path)


def test_an_older_roster_is_refused(tmp_path):
    data = rosters.signed(ROSTER, MEMBERS)
    assert accepted(data, tmp_path, epoch_min=4).epoch == 4
    with pytest.raises(AuthError, match="is of epoch 4, 5 was seen before"):
        accepted(data, tmp_path, epoch_min=5)


@pytest.mark.parametrize(
    "changed",
    [
        {"federation_id": "onco-us"},
        {"quorum": 1},
        {"quorum": 3},
        {"governance": PINNED.keys[:2]},
        {"governance": (*PINNED.keys, identity.public_hex(STRANGER))},
        {"governance": (*PINNED.keys[:2], identity.public_hex(STRANGER))},
        {"governance": (*PINNED.keys[:2], PINNED.keys[0])},
    ],
)
def test_a_roster_cannot_change_what_is_pinned(tmp_path, changed):
    """Even the members themselves cannot: each site's admin has to pin a new governance."""
    with pytest.raises(AuthError, match="pinned"):
        accepted(rosters.signed(dataclasses.replace(ROSTER, **changed), MEMBERS), tmp_path)


def test_the_order_of_governance_keys_does_not_matter(tmp_path):
    turned = dataclasses.replace(PINNED, keys=PINNED.keys[::-1])
    assert accepted(rosters.signed(ROSTER, MEMBERS), tmp_path, pinned=turned) == ROSTER
    assert turned.words == PINNED.words


@pytest.mark.parametrize("pinned", [{"quorum": 4}, {"keys": (PINNED.keys[0],) * 3}, {"quorum": 0}])
def test_a_pinned_governance_that_contradicts_itself_is_refused(pinned):
    with pytest.raises(AuthError):
        governance.check(dataclasses.replace(PINNED, **pinned))
    governance.check(PINNED)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"sites": (site(0), site(1, name="site-0"))}, "site name"),
        ({"sites": (site(0), site(1, identity_key=site(0).identity_key))}, "identity key"),
        ({"sites": (site(0, identity_key=PINNED.keys[0]), site(1))}, "identity key"),
        ({"sites": (site(0), site(1, node_key=site(0).node_key))}, "node key"),
        ({"sites": (site(0), site(1, tls_fingerprint=site(0).tls_fingerprint))}, "TLS key"),
        ({"sites": (site(0), site(1, tls_fingerprint="aa" * 32))}, "TLS key"),
        ({"sites": (site(0), site(1, retiring_tls_fingerprint="bb" * 32, retires_at=9))}, "TLS key"),
        ({"operators": (OperatorEntry("gateway", "bb" * 32, "dd" * 32),)}, "server or operator name"),
        ({"operators": (OperatorEntry("operator", "bb" * 32, site(0).identity_key),)}, "identity key"),
    ],
)
def test_a_roster_with_the_same_name_or_key_twice_is_refused(tmp_path, changed, what):
    twice = dataclasses.replace(ROSTER, **changed)
    with pytest.raises(AuthError, match=f"the same {what} twice"):
        accepted(rosters.signed(twice, MEMBERS), tmp_path)
    with pytest.raises(AuthError, match=f"the same {what} twice"):
        roster.signed_bytes(twice, MEMBERS, pinned=PINNED)


def altered(*keys: str, value: object) -> bytes:
    """A signed file with one more field, or another value, somewhere."""
    signed = json.loads(rosters.signed(ROSTER, MEMBERS))
    place = signed
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[keys[-1]] = value
    return wire.canonical_json(signed)


@pytest.mark.parametrize(
    "data",
    [
        altered("extra", value=1),
        altered("roster", "extra", value=1),
        altered("roster", "sites", "0", "extra", value=1),
        altered("roster", "servers", "0", "extra", value=1),
        altered("roster", "version", value=2),
        altered("roster", "epoch", value="4"),
        altered("roster", "epoch", value=True),
        altered("roster", "epoch", value=0),
        altered("roster", "sites", "0", "name", value="../etc"),
        altered("roster", "sites", "0", "identity_key", value="AA" * 32),
        altered("roster", "sites", "0", "node_key", value="ssh-rsa"),
        b"",
        b"[]",
        b"{" * 100_000,
        b'{"roster":NaN}',
        json.dumps(json.loads(rosters.signed(ROSTER, MEMBERS))).encode(),
        rosters.signed(ROSTER, MEMBERS) + b"\n",
        b'{"roster":{},' + rosters.signed(ROSTER, MEMBERS)[1:],
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, data):
    with pytest.raises(AuthError):
        accepted(data, tmp_path)


def test_a_missing_or_huge_file_is_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"roster.json: cannot be read"):
        roster.load(tmp_path / "roster.json", governance=PINNED, epoch_min=1)
    (tmp_path / "roster.json").write_bytes(b" " * (governance.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        roster.load(tmp_path / "roster.json", governance=PINNED, epoch_min=1)


@pytest.mark.parametrize("keys", [MEMBERS[:1], [MEMBERS[0], MEMBERS[0]], [MEMBERS[0], STRANGER]])
def test_signing_needs_a_quorum_of_members(keys):
    with pytest.raises(ConfigError, match="govern"):
        roster.signed_bytes(ROSTER, keys, pinned=PINNED)


@pytest.fixture
def watermark(tmp_path):
    roster.start_watermark(tmp_path / "epoch.json", ROSTER)
    return tmp_path / "epoch.json"


def take(given: Roster, tmp_path, watermark) -> Roster:
    (tmp_path / "roster.json").write_bytes(rosters.signed(given, MEMBERS))
    return roster.accept(tmp_path / "roster.json", governance=PINNED, watermark=watermark)


def test_a_site_remembers_the_highest_epoch(tmp_path, watermark):
    newer = dataclasses.replace(ROSTER, epoch=6, sites=ROSTER.sites[:1])
    assert take(ROSTER, tmp_path, watermark) == ROSTER
    assert take(newer, tmp_path, watermark) == newer
    assert roster.seen_epoch(watermark) == 6
    with pytest.raises(AuthError, match="6 was seen before"):
        take(ROSTER, tmp_path, watermark)
    assert take(newer, tmp_path, watermark) == newer


def test_two_rosters_of_one_epoch_are_noticed(tmp_path, watermark):
    with pytest.raises(AuthError, match="differs from the roster of epoch 4"):
        take(dataclasses.replace(ROSTER, sites=ROSTER.sites[:1]), tmp_path, watermark)


def test_a_forged_roster_does_not_move_the_watermark(tmp_path, watermark):
    (tmp_path / "roster.json").write_bytes(rosters.signed(dataclasses.replace(ROSTER, epoch=99), MEMBERS[:1]))
    with pytest.raises(AuthError):
        roster.accept(tmp_path / "roster.json", governance=PINNED, watermark=watermark)
    assert roster.seen_epoch(watermark) == 4


def test_a_lost_or_damaged_watermark_is_an_error_and_not_epoch_0(tmp_path, watermark):
    with pytest.raises(ConfigError, match="accepted a roster before"):
        roster.start_watermark(watermark, ROSTER)
    watermark.write_bytes(b"4")
    with pytest.raises(AuthError):
        take(ROSTER, tmp_path, watermark)
    watermark.unlink()
    with pytest.raises(ConfigError, match="note of the newest roster seen is missing"):
        take(ROSTER, tmp_path, watermark)


def test_a_site_is_found_by_name_and_by_certificate():
    changed = dataclasses.replace(ROSTER, sites=(site(0, retiring_tls_fingerprint="cc" * 32, retires_at=1000), site(1)))
    assert changed.site("site-1") == site(1)
    assert changed.site_of_tls(site(1).tls_fingerprint, now_s=2000) == site(1)
    assert changed.site_of_tls("cc" * 32, now_s=999).name == "site-0"
    for fingerprint, now_s in (("cc" * 32, 1000), ("dd" * 32, 0), ("", 0)):
        with pytest.raises(AuthError, match="no site in epoch 4"):
            changed.site_of_tls(fingerprint, now_s=now_s)
    with pytest.raises(AuthError, match="site-7 is not in epoch 4"):
        changed.site("site-7")
