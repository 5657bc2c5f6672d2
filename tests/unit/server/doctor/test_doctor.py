"""A healthy federation passes; each broken thing is found by its own check, with a remedy."""

import datetime
import json
import shutil

import pytest

from common import cli
from common.model.size import FLOAT32_BYTES
from common.trust import roster
from server.cli.app import app
from server.doctor import gateway, run
from server.doctor.examine import Machine, examine
from tests import tiny
from tests.samples import federations
from tests.samples.federations import NOW

GATEWAY = """
[superlink]
address = "127.0.0.1:1"
ca_file = "{folder}/ca/root.pem"
[fleet]
listen = "127.0.0.1:2"
certificate_file = "{folder}/servers/gateway.pem"
key_file = "{folder}/servers/gateway.key"
ca_file = "{folder}/ca/sites.pem"
[control]
listen = "127.0.0.1:3"
certificate_file = "{folder}/servers/gateway.pem"
key_file = "{folder}/servers/gateway.key"
ca_file = "{folder}/ca/operators.pem"
[members]
roster_file = "{folder}/roster.json"
governance_file = "{folder}/federation.json"
watermark_file = "{folder}/watermark.json"
revoked_file = "{folder}/revoked.txt"
[log]
file = "{folder}/refusals.jsonl"
"""


def silotune_server(*arguments: object) -> int:
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def find(name: str, **patient):
    (found,) = [result for result in examine(Machine(**patient)) if result.name == name]
    return found


@pytest.fixture
def gateway_file(joined):
    path = joined.root / "GATEWAY.toml"
    path.write_text(GATEWAY.format(folder=joined.folder))
    return path


@pytest.fixture
def run_file(tiny_base, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(tiny.RUN_FILE.format(base=tiny_base) + f'output.folder = "{tmp_path}/runs"\n')
    return path


def test_a_healthy_federation_passes(joined):
    found = {result.name: result.status for result in examine(Machine(joined.folder))}
    assert found.pop("governance") == "warning"  # the members' keys are still there
    assert set(found.values()) == {"ok"}
    assert len(found) == 8
    for name in ("governance", "offline"):
        shutil.rmtree(joined.folder / name)
    assert find("governance", federation=joined.folder).status == "ok"


def test_the_command_says_it_by_its_exit_code(joined, tmp_path, capsys):
    assert silotune_server("doctor", "--federation", joined.folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["is_healthy"]
    assert silotune_server("doctor", "--federation", tmp_path / "nowhere", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["remedy"] for one in found["checks"] if one["status"] == "failed"] == [
        "make one with silotune-server provision"
    ]
    assert silotune_server("doctor", "--certificate", tmp_path / "olga.pem") == 2
    assert silotune_server("doctor") == 0


def test_a_roster_that_nobody_signed(joined):
    path = joined.folder / "roster.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch":3', b'"epoch":9'))
    found = find("federation", federation=joined.folder)
    assert (found.status, "needs 2" in found.found) == ("failed", True)


def test_a_federation_file_that_says_another_quorum(joined):
    path = joined.folder / "federation.toml"
    path.write_text(path.read_text() + "[governance]\nnum_keys = 3\nquorum = 3\n")
    found = find("governance", federation=joined.folder)
    assert (found.status, "says 3 of 3" in found.found) == ("failed", True)


def test_authorities_that_do_not_belong_together(joined, tmp_path):
    other = federations.start(tmp_path / "other").folder / "ca"
    own = joined.folder / "ca"
    (own / "sites.key").chmod(0o644)
    assert "chmod 600" in find("authorities", federation=joined.folder).remedy
    (own / "sites.key").chmod(0o600)
    shutil.copy2(other / "sites.pem", own / "sites.pem")
    assert find("authorities", federation=joined.folder).status == "failed"
    for name in ("sites.pem", "sites.key"):
        shutil.copy2(other / name, own / name)
    assert "does not lead to the root" in find("authorities", federation=joined.folder).found
    shutil.copy2(other / "root.pem", own / "root.pem")
    assert "not the root that the sites pinned" in find("authorities", federation=joined.folder).found


def test_own_certificates_of_other_keys(joined):
    servers, operators = joined.folder / "servers", joined.folder / "operators"
    shutil.copy2(operators / "night.key", operators / "operator.key")
    assert "operator.pem is not for operator.key" in find("own certificates", federation=joined.folder).found
    shutil.copy2(operators / "night.pem", operators / "operator.pem")
    assert "another key than the roster" in find("own certificates", federation=joined.folder).found
    (servers / "gateway.pem").unlink()
    assert find("own certificates", federation=joined.folder).status == "failed"


@pytest.mark.parametrize(
    ("days", "own", "authorities"),
    [(75, "ok", "ok"), (80, "warning", "ok"), (91, "failed", "ok"), (1900, "failed", "failed")],
)
def test_certificates_that_end(joined, days, own, authorities):
    moment = (NOW + datetime.timedelta(days=days)).timestamp()
    found = {result.name: result for result in examine(Machine(joined.folder, clock=lambda: moment))}
    assert found["own certificates' end"].status == found["sites' end"].status == own
    assert found["authorities' end"].status == authorities
    assert own == "ok" or "reissue" in found["own certificates' end"].remedy


def test_lists_that_contradict_each_other(joined):
    folder = joined.folder
    assert find("members", federation=folder).status == "ok"
    (folder / "nodes" / "alder.pub").write_bytes((folder / "nodes" / "birch.pub").read_bytes())
    (folder / "kits" / "birch.tar").unlink()
    (folder / "revoked.txt").write_text(f"{'ab' * 32}\n")
    told = find("members", federation=folder).found
    for part in ("alder.pub is not the node key", "birch.tar is not there", "revoked.txt is not the list"):
        assert part in told
    issued = json.loads((folder / "issued.json").read_bytes())
    (folder / "issued.json").write_text(json.dumps(issued[1:], separators=(",", ":"), sort_keys=True))
    assert "no good certificate" in find("members", federation=folder).found


def test_after_a_revocation_all_is_well_but_a_gateway_with_the_old_roster(joined, gateway_file, tmp_path):
    old = shutil.copy2(joined.folder / "roster.json", tmp_path / "old.json")
    joined.revoke("birch")
    assert find("members", federation=joined.folder).found == "alder; 1 certificate revoked"
    assert find("gateway's roster", federation=joined.folder, gateway=gateway_file).status == "ok"
    gateway_file.write_text(gateway_file.read_text().replace(f"{joined.folder}/roster.json", str(old)))
    found = find("gateway's roster", federation=joined.folder, gateway=gateway_file)
    assert (found.status, "copy roster.json" in found.remedy) == ("failed", True)
    assert not (joined.folder / "watermark.json").exists()


def test_a_gateway_that_has_seen_a_newer_roster(joined, gateway_file, tmp_path):
    old = shutil.copy2(joined.folder / "roster.json", tmp_path / "old.json")
    joined.join("elm")
    newest = roster.load(joined.folder / "roster.json", governance=joined.pinned, epoch_min=1)
    roster.start_watermark(joined.folder / "watermark.json", newest)
    gateway_file.write_text(gateway_file.read_text().replace(f"{joined.folder}/roster.json", str(old)))
    assert "was seen before" in find("gateway's roster", gateway=gateway_file).found


def test_a_gateway_whose_file_or_keys_are_wrong(joined, gateway_file):
    assert find("gateway's file", gateway=gateway_file).status == "ok"
    assert find("gateway's keys", gateway=gateway_file).status == "ok"
    (joined.folder / "servers" / "gateway.key").chmod(0o640)
    assert "chmod 600" in find("gateway's keys", gateway=gateway_file).remedy
    text = gateway_file.read_text()
    gateway_file.write_text(text.replace("ca/sites.pem", "ca/root.pem"))
    assert "would pass for the other's" in find("gateway's file", gateway=gateway_file).found
    gateway_file.write_text(text.replace("[log]", "[logs]"))
    assert find("gateway's file", gateway=gateway_file).status == "failed"


def test_a_gateway_that_does_not_run(joined, gateway_file):
    found = {result.name: result for result in examine(Machine(joined.folder, gateway_file))}
    for name in ("listener for sites", "listener for operators", "SuperLink"):
        assert found[name].status == "failed", found[name]
        assert "start" in found[name].remedy
    assert find("listener for operators", gateway=gateway_file).status == "skipped"


@pytest.mark.parametrize(
    ("address", "listening", "status"),
    [
        ("127.0.0.1:8000", {"127.0.0.1"}, "ok"),
        ("127.0.0.1:8000", {"::1", "::ffff:127.0.0.1"}, "ok"),
        ("127.0.0.1:8000", {"0.0.0.0"}, "warning"),
        ("127.0.0.1:8000", {"127.0.0.1", "::"}, "warning"),
        ("127.0.0.1:8000", {"10.0.0.5"}, "warning"),
        ("10.0.0.5:8000", {"127.0.0.1"}, "warning"),
        ("localhost:8000", set(), "failed"),
        ("", set(), "skipped"),
    ],
)
def test_a_superlink_is_for_loopback_only(address, listening, status):
    assert gateway.superlink(address, listening=lambda port: listening).status == status


def test_the_kernel_tells_who_listens():
    import socket

    with socket.socket() as one, socket.socket(socket.AF_INET6) as other:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        assert gateway.listening_on(port) == set()
        one.listen()
        assert gateway.listening_on(port) == {"127.0.0.1"}
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::", port))
        other.listen()
        assert gateway.listening_on(port) == {"127.0.0.1", "::"}


def test_a_run_file_and_its_base(run_file, tiny_base, tmp_path):
    found = {result.name: result.status for result in examine(Machine(run=run_file))}
    assert found.pop("own held-out rows") == "skipped"
    assert set(found.values()) == {"ok"}
    text = run_file.read_text()
    for changed, name, part in (
        ("adapter.rank = 4\n", "run file", "adapter.rank"),
        (f'model.sha256 = "{"ab" * 32}"\n', "base model", "the run wants abab"),
        ('adapter.targets = ["q_proj", "no_such"]\n', "base model", "no layer no_such"),
        (f'evaluation.server_data = "{tmp_path}/gone.jsonl"\n', "own held-out rows", "no such file"),
    ):
        run_file.write_text(text + changed)
        result = find(name, run=run_file)
        assert (result.status, part in result.found) == ("failed", True), result
    run_file.write_text(text.replace(str(tiny_base), "no-such-base"))
    assert find("base model", run=run_file).status == "failed"
    assert find("checkpoints", run=run_file).status == "skipped"
    assert find("base model", run=run_file, base=tiny_base).status == "ok"


def test_own_rows_are_counted(run_file, tmp_path):
    table = tiny.write_table(tmp_path / "own.jsonl")
    run_file.write_text(run_file.read_text() + f'evaluation.server_data = "{table}"\n')
    assert find("own held-out rows", run=run_file).found == "36 rows"


def test_room_for_all_checkpoints(run_file, engine, monkeypatch):
    usage = shutil.disk_usage(run_file)
    num_bytes = FLOAT32_BYTES * sum(tensor.numel() for tensor in engine.initial.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=run.RECORDS_BYTES + 3 * num_bytes))
    assert find("checkpoints", run=run_file).status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=run.RECORDS_BYTES + 3 * num_bytes - 1))
    found = find("checkpoints", run=run_file)
    assert (found.status, "keep_checkpoints" in found.remedy) == ("failed", True)
