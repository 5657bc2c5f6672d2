"""A healthy site passes; each broken thing is found by its own check, with a remedy."""

import datetime
import json
import os
import shutil
import time

import pytest

from client.agent import process
from client.cli.app import app
from client.doctor import work
from client.doctor.work import Device
from client.join import enroll
from client.memory.history import AUDIT_FILE
from client.policy import file as policy_file
from client.review import explain
from common import cli
from common.errors import ApprovalRequired, DataError
from common.run import manifest
from common.run.manifest import RunManifest
from common.trust import identity
from tests import tiny
from tests.samples import federations, vault
from tests.samples.federations import NOW

WIDE = Device("cpu", False, 1 << 40)


def silotune_client(*arguments: object) -> int:
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def statuses(diagnosis) -> dict[str, str]:
    return {result.name: result.status for result in diagnosis.results}


def start(site) -> None:
    """Let the policy come into force: the agent's first entry of the audit log."""
    process.make_guard(site.node)


def test_a_healthy_site_passes_and_nothing_is_changed(site):
    start(site)
    before = snapshot(site.folder, site.keys)
    found = statuses(site.examine(keys=site.keys))
    passed = {name for name, status in found.items() if status == "ok"}
    assert set(found.values()) <= {"ok", "skipped", "warning"}
    assert {name for name in found if name not in passed} <= {
        *("agent", "core dumps", "gateway", "registration", "newest roster", "clock")
    }
    assert len(passed) >= 16
    assert snapshot(site.folder, site.keys) == before


def snapshot(*folders) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None for folder in folders for path in folder.rglob("*")
    }


def test_nothing_that_a_doctor_prints_is_data_or_a_key(site, capsys):
    start(site)
    assert silotune_client("doctor", site.node_file, "--units", site.keys) == 0
    assert silotune_client("doctor", site.node_file, "--units", site.keys, "--json") == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in (site.folder / "rows.jsonl").read_text().splitlines()]
    secrets = [part for name in ("identity.key", "node.key", "tls.key") for part in pem(site.keys / name)]
    assert secrets
    for text in [row[key] for row in rows for key in ("instruction", "patient_id")] + secrets:
        assert text not in shown
    assert "36 rows of 18 units; 0 duplicates" in shown


def pem(path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "-----" not in line and len(line) > 20]


def test_the_command_prints_table_policy_and_json(site, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert silotune_client("doctor", site.node_file, "--units", site.keys) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:20])) <= 100
    assert "Waits for approval" in shown
    (site.keys / "identity.key").chmod(0o644)
    assert silotune_client("doctor", site.node_file, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["is_healthy"]
    assert {one["name"] for one in found["checks"] if one["status"] == "failed"} >= {"key files", "enrolment"}
    assert all(one["remedy"] for one in found["checks"] if one["status"] in ("failed", "warning"))


def test_a_broken_file_of_the_site_ends_the_examination(site):
    site.edit('name = "alder"', 'nome = "alder"')
    found = site.examine()
    assert statuses(found) == {"versions": "ok", "site's own file": "failed"}
    assert "nome" in found.results[1].found


def test_key_files_that_others_may_read(site):
    (site.keys / enroll.NODE_KEY).chmod(0o640)
    found = site.find("key files")
    assert (found.status, f"chmod 600 {site.keys / 'node.key'}" in found.remedy) == ("failed", True)


def test_a_key_that_is_gone_is_missed_where_a_kit_was_installed(site):
    (site.keys / enroll.TLS_KEY).unlink()
    assert site.find("key files").status == "failed"
    assert "is not there" in site.find("certificate").found


def test_a_folder_of_the_courier_alone_is_looked_at_for_what_it_has(site):
    courier = site.folder / "courier"
    courier.mkdir(mode=0o700)
    for name in ("node.key", "tls.key", "ca.pem", "site.pem"):
        shutil.copy2(site.keys / name, courier / name)
    found = statuses(site.examine(keys=courier))
    assert (found["key files"], found["certificate"], found["certificate's end"]) == ("ok", "ok", "ok")
    assert (found["enrolment"], found["roster"]) == ("skipped", "skipped")


def test_what_is_the_agents_alone_is_left_to_the_agents_user(site, monkeypatch):
    """As root or the courier see it."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    found = {result.name: result for result in site.examine().results}
    assert found["agent's files"].status == "skipped"
    assert "sudo -u" in found["agent's files"].remedy
    assert "policy" not in found
    assert all(result.status != "failed" for result in found.values())


@pytest.mark.parametrize(
    ("file", "checks"),
    [
        (enroll.IDENTITY_KEY, {"enrolment", "roster", "audit log"}),
        (enroll.NODE_KEY, {"enrolment", "roster"}),
        (enroll.TLS_KEY, {"certificate"}),
    ],
)
def test_a_key_of_another_enrolment(site, file, checks):
    start(site)
    site.federation.enroll("elm")
    shutil.copy2(site.federation.keys("elm") / file, site.keys / file)
    found = {name for name, status in statuses(site.examine()).items() if status == "failed"}
    assert found == checks


def test_a_certificate_of_another_federation(site, tmp_path):
    other = federations.start(tmp_path / "other")
    shutil.copy2(other.folder / "ca" / "root.pem", site.keys / "ca.pem")
    assert "does not lead to the root" in site.find("certificate").found


@pytest.mark.parametrize(
    ("days", "end", "certificate"), [(75, "ok", "ok"), (80, "warning", "ok"), (91, "failed", "failed")]
)
def test_a_certificate_that_ends(site, days, end, certificate):
    moment = (NOW + datetime.timedelta(days=days)).timestamp()
    found = {result.name: result for result in site.examine(clock=lambda: moment).results}
    assert (found["certificate's end"].status, found["certificate"].status) == (end, certificate)
    assert end == "ok" or "silotune-client renew" in found["certificate's end"].remedy


def test_a_renewed_certificate_is_well(site):
    enroll.renew(site.keys)
    change = site.federation.rotate(site.keys / enroll.RENEWAL)
    site.federation.install(site.federation.unpack(change, site.folder), "alder", words="")
    found = statuses(site.examine())
    assert {found[name] for name in ("enrolment", "certificate", "roster")} == {"ok"}


def test_a_revoked_site(site):
    site.federation.revoke("alder")
    shutil.copy2(site.federation.folder / "roster.json", site.keys / "roster.json")
    found = site.find("roster")
    assert (found.status, "revoked" in found.found, "coordinator" in found.remedy) == ("failed", True, True)


def test_an_altered_roster(site):
    path = site.keys / "roster.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch":2', b'"epoch":9'))
    found = site.find("roster")
    assert (found.status, "needs 2" in found.found) == ("failed", True)


def test_an_old_roster(site):
    old = (site.keys / "roster.json").read_bytes()
    site.federation.join("elm")
    federations.install.update_roster(site.federation.folder / "roster.json", keys=site.keys)
    assert site.find("roster").status == "ok"
    (site.keys / "roster.json").write_bytes(old)
    found = site.find("roster")
    assert (found.status, "was seen before" in found.found) == ("failed", True)


def test_a_lost_note_of_the_roster(site):
    (site.keys / "epoch.json").unlink()
    assert site.find("roster").status == "failed"


def test_a_site_without_a_policy_is_warned(site):
    text = site.node_file.read_text()
    site.node_file.write_text(text[: text.index("policy =")])
    found = site.find("policy")
    assert (found.status, "every run is taken" in found.found) == ("warning", True)
    assert site.find("audit log").status == "skipped"


def test_a_policy_that_was_edited_after_signing(site):
    path = site.folder / "policy.toml"
    path.write_text(path.read_text().replace("max_rounds = 4", "max_rounds = 400"))
    found = site.find("policy")
    assert (found.status, "sign-policy" in found.remedy) == ("failed", True)


def test_a_policy_with_an_unknown_rule_or_for_another_federation(site):
    path = site.folder / "policy.toml"
    text = path.read_text()
    path.write_text(f"no_such_rule = 1\n{text}")
    signature = identity.sign(vault.ADMIN, path.read_bytes(), purpose=policy_file.PURPOSE)
    path.with_name("policy.toml.sig").write_text(signature)
    assert "no_such_rule" in site.find("policy").found
    path.write_text(text.replace('id = "onco-eu"', 'id = "other"'))
    policy_file.sign(path, vault.ADMIN)
    assert "federation other" in site.find("policy").found


def test_a_policy_that_does_not_allow_the_sites_own_file(site):
    site.sign(columns='["instruction"]')
    assert "data.datasets.columns" in site.find("policy").found
    assert site.find("data").status == "failed"


def test_an_audit_log_that_was_changed(site):
    start(site)
    path = site.folder / "log" / AUDIT_FILE
    path.write_bytes(path.read_bytes().replace(b"started", b"stopped"))
    found = site.find("audit log")
    assert (found.status, "entry 0" in found.found) == ("failed", True)


def test_a_policy_older_than_one_that_was_in_force(site):
    start(site)
    site.sign(serial="2")
    found = site.find("audit log")
    assert (found.status, "serial 2" in found.found) == ("failed", True)


def test_rows_that_are_missing_unusable_too_many_or_too_few(site):
    rows = site.folder / "rows.jsonl"
    text = rows.read_text()
    site.sign(max_rows="35")
    assert "the policy allows 35" in site.find("data").found
    site.sign(min_records="37")
    assert "train.min_records is 37" in site.find("data").found
    rows.write_text(text + '{"instruction": "the patient has", "output": 7, "patient_id": "north-0"}\n')
    found = site.find("data")
    assert (found.status, "line 37" in found.found, "the patient" in found.found) == ("failed", True, False)
    rows.unlink()
    assert site.find("data").status == "failed"


def test_a_name_of_a_data_set_is_never_looked_up(site):
    site.edit(f'path = "{site.folder}/rows.jsonl"', 'path = "no-such-file"')
    assert "no such file or folder" in site.find("data").found


def test_a_base_that_is_damaged_missing_or_not_listed(site):
    found = site.find("base models")
    assert (found.status, site.base_sha256 in found.found) == ("ok", False)
    store = site.folder / "models"
    site.sign(sha256=f'"{"ab" * 32}"')
    found = site.find("base models").found
    assert "policy allows tiny (abababababab)" in found
    assert f"tiny ({site.base_sha256}) here" in found  # whole, to be listed
    site.sign()
    (store / "tiny").unlink()
    shutil.copytree(site.base, store / "tiny")
    (store / "tiny" / "config.json").write_text((store / "tiny" / "config.json").read_text() + " ")
    assert site.find("base models").status == "failed"
    shutil.rmtree(store / "tiny")
    found = {result.name: result for result in site.examine().results}
    assert (found["base models"].status, found["memory"].status) == ("failed", "skipped")


def test_some_bases_that_are_not_here_are_a_warning(site):
    listed = f'name = "tiny"\nsha256 = "{site.base_sha256}"'
    path = site.folder / "policy.toml"
    path.write_text(
        path.read_text().replace(listed, f'{listed}\n[[models.allow]]\nname = "big"\nsha256 = "{"cd" * 32}"')
    )
    policy_file.sign(path, vault.ADMIN)
    found = site.find("base models")
    assert (found.status, "big (cdcdcdcdcdcd) is not here" in found.found) == ("warning", True)


def test_memory_that_is_short(site):
    allowed = work.load_policy(site.node.agent)
    job = work.largest_work(allowed, WIDE)
    assert (job.num_tokens, job.r, job.num_rows, job.quantization) == (64, 16, 8, "nf4")
    plain = work.memory(site.base, job, WIDE)
    assert (plain.status, "No GPU is used" in plain.found) == ("ok", True)
    need = work.RUNTIME_BYTES + 1
    assert work.memory(site.base, job, Device("cpu", False, need)).status == "failed"
    some = work.memory(site.base, job, Device("cuda", True, work.RUNTIME_BYTES + (2 << 20)))
    assert (some.status, "micro_batch_size" in some.remedy) == ("warning", True)


def test_memory_for_a_run_that_was_offered(site, engine):
    start(site)
    run = RunManifest(tiny.settings("tiny", {"adapter.r": "3"}), engine.base_sha256, engine.tensor_specs)
    gate = process.make_guard(site.node)
    offer = manifest.sign(run, vault.OPERATOR, federation="onco-eu", not_after=int(time.time()) + 86_400)
    with pytest.raises(ApprovalRequired):
        gate.before_open(offer)
    assert "rank 3" in site.find("memory", run="tiny").found
    assert "(none)" in site.find("memory", run="tiny").found
    mixed = tiny.settings("tiny", {f"model.site_quantization.{site.node.site.name}": "nf4"})
    sections, name = (mixed.model, mixed.adapter, mixed.training), site.node.site.name
    assert work.work_of(*sections, num_tokens=64, device=WIDE, site=name).quantization == "nf4"
    with pytest.raises(DataError):
        work.offered(site.node.agent, "no-such-run")
    assert site.find("memory", run="no-such-run").status == "failed"


def test_a_device_that_is_not_there(site):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    site.edit('device = "cpu"', 'device = "cuda"')
    found = site.find("memory")
    assert (found.status, "driver" in found.remedy) == ("failed", True)


def test_a_log_folder_that_is_a_file_and_a_store_without_room(site, monkeypatch):
    (site.folder / "log").rmdir()
    (site.folder / "log").write_text("")
    assert site.find("disk").status == "failed"
    usage = shutil.disk_usage(site.folder)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert site.find("disk of bases").status == "warning"


def test_the_policy_in_sentences(site):
    told = explain.explain(work.load_policy(site.node.agent))
    text = "\n".join(sentence for sentences in told.values() for sentence in sentences)
    assert list(told) == [explain.MAY_RUN, explain.PROTECTED, explain.WAITS]
    for part in ("rank 2 to 16", "0.001 to 0.1", "at least 3 steps", "at most 100 rows", "Every run waits", "2 sites"):
        assert part in text, part
    assert "Differential privacy is not required" in text
    site.sign(mode='"required"', secagg='"required"', approval='"none"', operators="[]")
    stricter = explain.explain(work.load_policy(site.node.agent))
    assert "epsilon at most 8" in stricter[explain.PROTECTED][0]
    assert stricter[explain.WAITS] == ["Nothing waits: whatever is allowed above runs without anybody's approval."]
    assert "no run can pass" in stricter[explain.MAY_RUN][0]
    by_roster = explain.explain(work.load_policy(site.node.agent), reads_roster=True)
    assert "one of the operators in its roster" in by_roster[explain.MAY_RUN][0]
