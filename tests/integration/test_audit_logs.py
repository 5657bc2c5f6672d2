"""A signed run over real processes: each party keeps a log, and each holds the heads of the others'."""

import json
import sys
from pathlib import Path

import pytest

from client.memory.history import AUDIT_FILE
from client.memory.replicas import HEADS_FILE
from client.policy import file
from common.trust import audit_log, heads, identity
from server.fleet import trail
from server.folder import run_files
from simulations.engines import deployment
from simulations.engines.deployment import Site
from tests import tiny
from tests.samples import vault

SITES = ("north", "south")


def write_site(folder: Path, name: str, *, base: Path, base_sha256: str, operator: str) -> Site:
    """A site with a policy that needs nobody's approval."""
    folder.mkdir(mode=0o700)
    rows = [
        {"instruction": row.messages[0].content, "output": row.messages[1].content, "patient_id": row.unit}
        for row in tiny.rows(16, site=name)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity.create(folder / "site.pem")
    text = vault.policy_text(base_sha256, approval='"none"', path=f'"{folder / "rows.jsonl"}"', min_slice="1")
    policy = folder / "policy.toml"
    policy.write_text(text.replace(identity.public_hex(vault.OPERATOR), operator))
    file.sign(policy, vault.ADMIN)
    (folder / "node.toml").write_text(
        f'[site]\nname = "{name}"\n[data]\npath = "{folder / "rows.jsonl"}"\n[model]\nbase = "{base}"\n'
        f'[hardware]\ndevice = "cpu"\nnum_threads = 1\n[agent]\nsocket = "{folder / "agent.sock"}"\n'
        f'log_folder = "{folder}"\npolicy = "{policy}"\npolicy_signer = "{identity.public_hex(vault.ADMIN)}"\n'
        f'identity_key = "{folder / "site.pem"}"\n'
    )
    command = (sys.executable, "-m", "client.cli.app", "serve", str(folder / "node.toml"))
    return Site(name, command, folder / "agent.sock")


@pytest.fixture
def folder(tmp_path, tiny_base, shared_engine):
    """A finished run of one round, its sites and the operator's key."""
    operator = identity.public_hex(identity.create(tmp_path / "op.pem"))
    base = {"base": tiny_base, "base_sha256": shared_engine.base_sha256, "operator": operator}
    sites = [write_site(tmp_path / name, name, **base) for name in SITES]
    changes = {"federation.num_rounds": "1", "federation.num_sites": "2", "federation.join_timeout_s": "120"}
    log = run_files.prepare(tiny.settings(tiny_base, changes), tmp_path / "run")
    signing = {"operator-key": str(tmp_path / "op.pem"), "federation": "onco-eu"}
    deployment.run(sites, log=log, config={"base-folder": str(tiny_base), **signing}, timeout_s=200, num_threads=1)
    return tmp_path


@pytest.mark.slow
def test_every_party_holds_the_heads_of_all_the_others(folder):
    keys = {name: identity.public_hex(identity.load(folder / name / "site.pem")) for name in SITES}
    operator = identity.public_hex(identity.load(folder / "op.pem"))
    server_log, server_heads = (folder / "op-audit" / name for name in (trail.AUDIT_FILE, trail.HEADS_FILE))
    kinds = [entry.kind for entry in audit_log.read(server_log, operator)]
    assert [kinds[0], kinds[-1], kinds.count("received")] == ["offered", "ended", 6]
    for name, other in (SITES, SITES[::-1]):
        kept = heads.read(folder / name / HEADS_FILE)
        assert sorted(kept) == sorted([heads.operator(operator), other])
        audit_log.verify(server_log, operator, heads=[one.head for one in kept[heads.operator(operator)]])
        audit_log.verify(folder / other / AUDIT_FILE, keys[other], heads=[one.head for one in kept[other]])
        audit_log.verify(folder / name / AUDIT_FILE, keys[name], heads=heads.of(server_heads, name, signer=keys[name]))
