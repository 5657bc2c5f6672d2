"""`[export]`: the sealed folder that a run ends with."""

import json

import pytest

from common import events
from common.adapter import adapter
from common.errors import ConfigError, DataError, GateRefused, SilotuneError
from common.run.manifest import RunManifest, public_part
from common.trust import identity
from server.folder import run_files
from server.report import report
from server.run import export, run
from server.verify import verify
from tests import tiny
from tests.samples.events import view

CHANGES = {"federation.num_rounds": "1"}
EXPORT = {"export.formats": '["peft", "merged", "gguf"]'}


@pytest.fixture
def play(load_tiny, tiny_base, tmp_path):
    """Run to the end; gives the run's folder."""

    def to_end(changes, *, name="run", resume=False):
        engine = load_tiny({**CHANGES, **changes})
        adapter.write(engine.model, engine.initial)
        settings = tiny.settings(tiny_base, {**CHANGES, **changes})
        folder = tmp_path / name
        log = run_files.prepare(settings, folder, resume=resume)
        fleet = tiny.fleet(tiny.make_nodes(engine))
        run.execute(settings, fleet=fleet, engine=engine, folder=folder, log=log, resume=resume)
        return folder

    return to_end


def exported(folder):
    return [event for event in events.read(folder / events.FILE) if event["kind"] == "exported"]


def test_a_run_ends_with_a_signed_folder_that_verifies_also_where_it_was_interrupted_in_the_export(
    play, tiny_base, tmp_path
):
    key = tmp_path / "op.pem"
    signer = identity.public_hex(identity.create(key))
    changes = {**EXPORT, "export.operator_key": str(key)}
    folder = play(changes)
    found = verify.verify(folder / export.FOLDER, signer=signer, base=tiny_base)
    assert found["formats"] == ["peft", "merged", "gguf"]
    [event] = exported(folder)
    assert event["signer"] == signer
    assert event["logits"] == found["logits"]
    assert set(event["logits"]) == {"base", "peft", "merged", "gguf"}
    finished = [one for one in events.read(folder / events.FILE) if one["kind"] == "round_finished"]
    assert event["adapter_sha256"] == finished[-1]["adapter_sha256"]
    assert f"signed by {signer}" in report.render(view(events.read(folder / events.FILE)))
    with pytest.raises(SilotuneError):  # control
        verify.verify(folder / export.FOLDER, signer="0" * 64, base=tiny_base)

    # an end that was interrupted in the export goes on with it
    path = folder / events.FILE
    kept = [
        line for line in path.read_text().splitlines() if json.loads(line)["kind"] not in ("exported", "run_finished")
    ]
    path.write_text("\n".join(kept) + "\n")
    (folder / export.FOLDER / "export.json").unlink()  # half a folder
    play(changes, resume=True)
    assert len(exported(folder)) == 1
    assert verify.verify(folder / export.FOLDER)["formats"] == ["peft", "merged", "gguf"]


def test_a_run_that_does_not_ask_writes_no_folder(play):
    folder = play({})
    assert not (folder / export.FOLDER).exists()
    assert exported(folder) == []


def test_what_the_gate_refuses_is_not_exported(play, tmp_path):
    plain = {"export.formats": '["peft"]'}
    refusing = {"gate.rules": "[{kind = 'loss', min_gain = 100.0}]", "gate.min_rows": "1"}
    with pytest.raises(GateRefused):
        play({**plain, **refusing})
    assert not (tmp_path / "run" / export.FOLDER).exists()
    passing = {"gate.rules": "[{kind = 'loss'}]", "gate.min_rows": "1"}
    assert (play({**plain, **passing}, name="control") / export.FOLDER).exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"export.formats": '["gguf"]', "export.llama_cpp": "/nowhere"}, ConfigError, "has no convert_hf_to_gguf.py"),
        ({**EXPORT, "export.rows": "no-such.jsonl"}, DataError, "no-such.jsonl"),
        ({**EXPORT, "export.operator_key": "no-such.pem"}, SilotuneError, "no-such.pem"),
        (tiny.of_kind("ia3", **{"export.formats": '["peft"]'}), ConfigError, "a sealed adapter is plain LoRA"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_first_round(play, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        play(changes)
    told = events.read(tmp_path / "run" / events.FILE) if (tmp_path / "run" / events.FILE).exists() else []
    assert not [event for event in told if event["kind"] == "round_started"]


def test_sites_are_told_nothing_of_it(tiny_base, engine):
    asked, plain = (tiny.settings(tiny_base, changes) for changes in (EXPORT, {}))
    assert public_part(asked) == public_part(plain)
    made = [RunManifest(one, engine.base_sha256, engine.tensor_specs).to_bytes() for one in (asked, plain)]
    assert made[0] == made[1]
