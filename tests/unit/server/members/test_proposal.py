"""Members of the governance sign a change of the roster one by one, each on a machine of his own."""

import dataclasses
import json
import shutil

import pytest

from common import cli as common_cli
from common.errors import AuthError, ConfigError
from common.frame import wire
from common.trust import identity, kit, roster
from common.trust.roster import SiteEntry
from server.cli import app
from server.members import changes as admit
from server.members import proposal
from tests.samples.federations import NOW


@pytest.fixture
def made(joined, tmp_path):
    """The admission of a third site, proposed."""
    words = joined.enroll("cedar")
    path = tmp_path / "admit-cedar.json"
    admit.propose(
        joined.folder,
        lambda held: admit.admission(held, request_file=joined.request("cedar"), words=words, now=NOW),
        path=path,
    )
    return path


def newest(federation) -> roster.Roster:
    return roster.load(federation.folder / "roster.json", governance=federation.pinned, epoch_min=1)


def sign(federation, path, *numbers: int):
    """A copy of a proposal with these members' signatures."""
    copy = path.with_name(f"{path.stem}-{'-'.join(map(str, numbers))}.json")
    keys = [identity.load(federation.members[number]) for number in numbers]
    proposal.write(copy, proposal.sign(proposal.read(path), keys))
    return copy


def change(path, **changes):
    """A copy whose proposal says something else, under the same signatures."""
    signed = proposal.read(path)
    copy = path.with_name(f"changed-{path.name}")
    proposal.write(copy, dataclasses.replace(signed, proposal=dataclasses.replace(signed.proposal, **changes)))
    return copy


def publish(federation, *paths) -> int:
    return admit.publish(federation.folder, paths, now=NOW).epoch


def test_copies_that_members_signed_apart_admit_a_site_that_installs_its_kit(joined, made, tmp_path):
    epoch = newest(joined).epoch
    assert publish(joined, sign(joined, made, 0), sign(joined, made, 2)) == epoch + 1
    assert [site.name for site in newest(joined).sites] == ["alder", "birch", "cedar"]
    installed = joined.install(joined.folder / "kits" / "cedar", "cedar")
    assert installed.epoch == epoch + 1


def test_until_it_is_published_a_proposal_changes_nothing(joined, made):
    before = {path: path.read_bytes() for path in joined.folder.rglob("*") if path.is_file()}
    sign(joined, made, 0, 1)
    assert {path: path.read_bytes() for path in joined.folder.rglob("*") if path.is_file()} == before


def test_too_few_members(joined, made):
    one = sign(joined, made, 0)
    for paths in ([made], [one], [one, one], [one, made]):
        with pytest.raises(AuthError, match="valid signatures of governance keys and needs 2"):
            publish(joined, *paths)
    publish(joined, sign(joined, one, 1))  # control: another member's under the same copy


def test_a_key_signs_once_and_counts_once(joined, made, tmp_path):
    one = sign(joined, made, 0)
    with pytest.raises(ConfigError, match="has signed already"):
        sign(joined, one, 0)
    again = tmp_path / "again.json"
    shutil.copy(one, again)
    with pytest.raises(AuthError, match="has 1 valid signatures"):
        publish(joined, one, again)
    publish(joined, one, sign(joined, made, 1))  # control


def test_what_was_changed_after_signing_is_refused(joined, made):
    signed = sign(joined, made, 0, 1)
    found = proposal.read(signed).proposal
    cedar = found.roster.site("cedar")
    stolen = dataclasses.replace(cedar, identity_key="ab" * 32)
    sites = tuple(stolen if site.name == "cedar" else site for site in found.roster.sites)
    texts = {**found.kit, "policy.toml": found.kit["policy.toml"] + "# more\n"}
    for changed in ({"roster": dataclasses.replace(found.roster, sites=sites)}, {"kit": texts}):
        with pytest.raises(AuthError, match=r"signature of key .* is not valid"):
            publish(joined, change(signed, **changed))
    publish(joined, signed)  # control


def test_a_proposal_for_another_epoch_is_refused_by_members_and_by_the_coordinator(joined, made):
    signed, current = sign(joined, made, 0, 1), newest(joined)
    proposal.check(proposal.read(signed), current=current, pinned=joined.pinned)  # control
    joined.revoke("birch")
    with pytest.raises(AuthError, match="get the newest roster, or have the change proposed anew"):
        proposal.check(proposal.read(made), current=newest(joined), pinned=joined.pinned)
    with pytest.raises(AuthError, match="get the newest roster, or have the change proposed anew"):
        publish(joined, signed)
    assert [site.name for site in newest(joined).sites] == ["alder"]


def test_a_proposal_does_what_it_says_and_nothing_else(joined, made):
    found, current = proposal.read(made).proposal, newest(joined)
    more = SiteEntry("dogwood", "cd" * 32, found.roster.site("cedar").node_key.replace("A", "B", 1), "ef" * 32)
    hidden = dataclasses.replace(found.roster, sites=(*found.roster.sites, more))
    without = dataclasses.replace(found.roster, operators=found.roster.operators[:1])
    wrong_kit = {**found.kit, kit.CERTIFICATE: (joined.folder / "kits/alder/site.pem").read_text()}
    changes = [{"roster": hidden}, {"roster": without}, {"kind": "rotate"}, {"name": "alder"}, {"kit": wrong_kit}]
    for changed in [*changes, {"kit": {}}, {"kit": {**found.kit, kit.ROSTER: "{}"}}]:
        odd = proposal.Signed(dataclasses.replace(found, **changed))
        with pytest.raises(AuthError, match="proposal"):
            proposal.check(odd, current=current, pinned=joined.pinned)
    proposal.check(proposal.Signed(found), current=current, pinned=joined.pinned)  # control


def test_a_stranger_cannot_sign_and_copies_of_two_proposals_are_not_put_together(joined, made, tmp_path):
    stranger = identity.create(tmp_path / "stranger.key")
    by_stranger = tmp_path / "by-stranger.json"
    proposal.write(by_stranger, proposal.sign(proposal.read(sign(joined, made, 0)), [stranger]))
    with pytest.raises(AuthError, match="does not govern"):
        publish(joined, by_stranger)
    other = tmp_path / "other.json"
    admit.propose(joined.folder, lambda held: admit.revocation(held, name="birch"), path=other)
    with pytest.raises(AuthError, match="not copies of one proposal"):
        publish(joined, sign(joined, made, 0), sign(joined, other, 1))
    with pytest.raises(ConfigError, match="there already"):
        admit.propose(joined.folder, lambda held: admit.revocation(held, name="birch"), path=other)


def test_a_file_that_was_edited_is_no_proposal(joined, made):
    fields = json.loads(made.read_bytes())
    for changed in ({**fields, "extra": 1}, {**fields, "signatures": {"ab" * 32: {"roster": "", "kit": ""}}}):
        made.write_bytes(wire.canonical_json(changed))
        with pytest.raises(AuthError):
            proposal.read(made)


def told(capsys, *arguments: object, exit_code: int = 0) -> dict:
    with pytest.raises(SystemExit) as end:
        common_cli.run(app.app, [*map(str, arguments), "--json"])
    assert end.value.code == exit_code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_commands_show_a_member_what_changes_and_collect_signatures(joined, tmp_path, capsys):
    """Each member has copies of federation.json and of the newest roster, and nothing else of the coordinator's."""
    own, path = tmp_path / "member", tmp_path / "revoke.json"
    own.mkdir()
    for name in ("federation.json", "roster.json"):
        shutil.copy(joined.folder / name, own)
    mine = ["--pinned", own / "federation.json", "--roster", own / "roster.json"]
    revoke = ["revoke", "birch", "--federation", joined.folder]
    told(capsys, *revoke, exit_code=2)  # neither keys nor a file
    told(capsys, *revoke, "--propose", path, "--governance", joined.members[0], exit_code=2)
    epoch = told(capsys, *revoke, "--propose", path)["epoch"]
    shown = told(capsys, "roster", "show", path, *mine)
    assert shown["changes"][0] == f"revoke birch: epoch {epoch - 1} to {epoch} of onco-eu"
    assert "- birch leaves, and its keys are never accepted again" in shown["changes"]
    assert (shown["signed_by"], shown["missing"]) == ([], 2)
    first = told(capsys, "roster", "sign", path, "--key", joined.members[0], *mine, "--yes")
    assert (len(first["signed_by"]), first["missing"]) == (1, 1)
    assert told(capsys, "roster", "publish", path, "--federation", joined.folder, exit_code=6)["error"]
    told(capsys, "roster", "sign", path, "--key", joined.members[2], *mine, "--yes")
    published = told(capsys, "roster", "publish", path, "--federation", joined.folder)
    assert {key: published[key] for key in ("name", "epoch")} == {"name": "birch", "epoch": epoch}
    assert any(str(joined.folder / "roster.json") in step for step in published["next"])
    assert published["others"] == ["alder"]
    assert [site.name for site in newest(joined).sites] == ["alder"]


def test_a_renewal_is_signed_one_by_one_too_and_says_which_key_changes(joined, tmp_path):
    from client.join import enroll

    enroll.renew(joined.keys("alder"))
    path, current = tmp_path / "rotate.json", newest(joined)
    request_file = joined.keys("alder") / enroll.RENEWAL
    admit.propose(joined.folder, lambda held: admit.renewal(held, request_file=request_file, now=NOW), path=path)
    lines = proposal.in_words(proposal.read(path).proposal, current=current)
    new = proposal.read(path).proposal.roster.site("alder").tls_fingerprint
    assert f"~ alder: tls_fingerprint {current.site('alder').tls_fingerprint[:32]} to {new[:32]}" in lines
    assert publish(joined, sign(joined, path, 0, 1)) == current.epoch + 1
    joined.install(joined.folder / "kits" / "alder", "alder")
