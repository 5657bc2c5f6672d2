import dataclasses
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuthError, WireError
from common.frame import wire
from common.frame.records import TensorSpec, to_head
from common.run import config, egress, manifest
from common.run.manifest import RunManifest
from common.trust import identity
from tests import tiny

SPECS = (TensorSpec("a.lora_A.weight", (4, 32)), TensorSpec("a.lora_B.weight", (32, 4)))
HASH = "ab" * 32
PRIVATE = {
    "model.base": "/srv/coordinator/bases/eight-billion",
    "data.source": "/srv/coordinator/rows.jsonl",
    "evaluation.server_data": "/srv/coordinator/held-out.jsonl",
    "evaluation.tasks": "[{name = 'a', kind = 'json', data = '/srv/rows', json_schema = '/srv/s'}]",
    "evaluation.tasks_every_rounds": "2",
    "output.folder": "/srv/coordinator/runs",
    "output.keep_checkpoints": "3",
    "output.example_prompts": "/srv/coordinator/prompts.jsonl",
}


def make(changes: dict[str, str] | None = None, *, specs: tuple[TensorSpec, ...] = SPECS) -> RunManifest:
    return RunManifest(tiny.settings("org/base", changes), HASH, specs)


def altered(**fields: object) -> bytes:
    """The canonical bytes with top-level fields replaced."""
    return wire.canonical_json({**json.loads(make().to_bytes()), **fields})


def with_setting(section: str, name: str, value: object) -> bytes:
    run = json.loads(make().to_bytes())["run"]
    run[section] = {**run[section], name: value}
    return altered(run=run)


def test_a_site_reads_the_same_manifest_that_the_server_wrote():
    written = make()
    found = manifest.parse(written.to_bytes())
    assert found.to_bytes() == written.to_bytes()
    assert found.sha256 == written.sha256
    assert found.tensor_specs == SPECS
    assert found.run == manifest.public_part(written.run)


def test_what_will_be_measured_is_told_by_its_hash_alone():
    frozen = dataclasses.replace(make(PRIVATE), evaluation_sha256="cd" * 32)
    assert frozen.sha256 != make(PRIVATE).sha256
    assert manifest.parse(frozen.to_bytes()).evaluation_sha256 == "cd" * 32
    assert manifest.parse(frozen.to_bytes()).run.evaluation.tasks == ()
    for wrong in ("cd", 3, None):
        with pytest.raises(WireError, match="not a run manifest"):
            manifest.parse(altered(evaluation_sha256=wrong))


def test_the_hash_does_not_depend_on_how_the_run_file_was_written():
    text = '[privacy]\nmode = "none"\n[model]\nbase = "org/base"\n[adapter]\nr = {r}\n'
    first, second = (
        RunManifest(config.parse(f"version = 1\n{text.format(r=r)}", name="x"), HASH, SPECS) for r in ("16", "0x10")
    )
    assert first.sha256 == second.sha256


def test_the_bytes_of_this_version_are_fixed():
    """Another hash for the same run would shut out every site that has an earlier release: raise VERSION instead."""
    text = 'version = 1\n[model]\nbase = "org/base"\n[privacy]\nmode = "none"'
    data = RunManifest(config.parse(text, name="run.toml"), HASH, SPECS).to_bytes()
    assert json.loads(data)["tensors"] == [["a.lora_A.weight", [4, 32]], ["a.lora_B.weight", [32, 4]]]
    assert wire.canonical_json(json.loads(data)) == data
    names = ["base_sha256", "codes_sha256", "date", "egress", "evaluation_sha256", "run", "tensors", "version"]
    assert sorted(json.loads(data)) == names


@pytest.mark.parametrize(
    "changes",
    [
        {"training.learning_rate": "1e-3"},
        {"federation.num_rounds": "3"},
        {"adapter.alpha": "9"},
        {"data.system_prompt": '"Be brief."'},
        {"wire.dtype": '"bfloat16"'},
        {"seed": "6"},
    ],
)
def test_every_setting_that_a_site_acts_on_changes_the_hash(changes):
    assert make(changes).sha256 != make().sha256


def test_base_and_tensors_change_the_hash():
    assert RunManifest(make().run, "cd" * 32, SPECS).sha256 != make().sha256
    assert make(specs=SPECS[:1]).sha256 != make().sha256


def test_a_run_s_date_is_part_of_it_and_must_be_one():
    dated = replace(make(), date="2026-03-04")
    assert manifest.parse(dated.to_bytes()).date == "2026-03-04"
    assert dated.sha256 != make().sha256
    for wrong in ("2026-3-4", "20260304", "yesterday", "2026-02-30"):
        with pytest.raises(WireError, match="not a run manifest"):
            manifest.parse(replace(make(), date=wrong).to_bytes())


def test_what_is_the_coordinators_own_affair_does_not_cross():
    assert b"/srv" not in make(PRIVATE).to_bytes()
    assert make(PRIVATE).sha256 == make().sha256
    assert b"/srv" in config.resolved_json(make(PRIVATE).run).encode()  # control: it was there to be told


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        altered(version=1),
        altered(version=True),
        altered(extra=1),
        altered(base_sha256=7),
        altered(codes_sha256="ab" * 32),
        altered(codes_sha256=None),
        with_setting("model", "quantization", "nf4"),
        altered(tensors=[["a", [4, 32]], ["a"]]),
        altered(tensors=[["a", ["4", 32]]]),
        altered(tensors=[["a", [4.5, 32]]]),
        altered(tensors=[["a", 4]]),
        altered(tensors=7),
        make().to_bytes().replace(b"[4,32]", b"[Infinity,32]"),
        altered(run={}),
        altered(run=None),
        with_setting("training", "no_such_key", 1),
        with_setting("training", "learning_rate", "1e-3"),
        with_setting("training", "learning_rate", -1.0),
        with_setting("privacy", "mode", "dp"),
        with_setting("federation", "min_sites", 0),
    ],
)
def test_parse_refuses_what_is_not_a_manifest(data):
    with pytest.raises(WireError):
        manifest.parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b" " + make().to_bytes(),
        make().to_bytes() + b"\n",
        json.dumps(json.loads(make().to_bytes())).encode(),
        make().to_bytes().decode().encode("utf-16"),
        make().to_bytes().replace(b'"version":1', b'"version":1.0'),
        make().to_bytes().replace(b'{"base', b'{"version":1,"base'),
        wire.canonical_json({**json.loads(make().to_bytes()), "run": {"version": 1}}),
        with_setting("model", "base", "/srv/coordinator/base"),
        with_setting("output", "folder", "elsewhere"),
    ],
)
def test_parse_refuses_a_second_way_to_write_the_same_manifest(data):
    with pytest.raises(WireError):
        manifest.parse(data)


def test_a_refusal_does_not_quote_what_came():
    with pytest.raises(WireError) as caught:
        manifest.parse(altered(base_sha256=["planted"]))
    assert "planted" not in str(caught.value)


KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))


def offered(**changes: object) -> manifest.Offer:
    """An offer whose signature's fields were changed after signing."""
    offer = manifest.sign(make(), KEY, federation="onco-eu", not_after=1_800_000_000)
    assert offer.signature is not None
    return manifest.Offer(offer.manifest, dataclasses.replace(offer.signature, **changes))


def test_an_offer_comes_through_its_frame_unchanged():
    frame = wire.unpack(wire.pack(offered().to_frame()), max_body_bytes=1 << 20)
    assert manifest.read_offer(frame) == offered()
    assert manifest.check_signature(manifest.read_offer(frame)).signer == identity.public_hex(KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "another"},
        {"not_after": 1_900_000_000},
        {"signer": identity.public_hex(OTHER)},
        {"signature": "00" * 64},
        {"signature": "x"},
        {"signer": ""},
    ],
)
def test_a_signature_covers_all_that_it_states(changes):
    with pytest.raises(AuthError):
        manifest.check_signature(offered(**changes))


def test_a_manifest_that_was_altered_after_signing_is_noticed():
    other = make({"training.learning_rate": "1e-9"}).to_bytes()
    with pytest.raises(AuthError):
        manifest.check_signature(dataclasses.replace(offered(), manifest=other))
    with pytest.raises(AuthError, match="not signed"):
        manifest.check_signature(manifest.Offer(other))


@pytest.mark.parametrize(
    "change", [{"signer": 7}, {"more": 1}, {"not_after": 1.5}, {"not_after": -1}, {"federation": "x" * 300}]
)
def test_a_head_that_is_no_signature_is_refused(change):
    head = to_head(offered().signature)
    manifest.read_offer(wire.Frame("open", head, b"{}"))
    with pytest.raises(WireError):
        manifest.read_offer(wire.Frame("open", {**head, **change}, b"{}"))


def test_a_manifest_is_refused_by_its_size_before_it_is_parsed():
    with pytest.raises(WireError, match="limit"):
        manifest.read_offer(wire.Frame("open", {}, bytes(manifest.MAX_BYTES + 1)))


def test_a_manifest_declares_every_figure_that_leaves_and_its_range():
    declared = json.loads(make().to_bytes())["egress"]
    assert sorted(declared["metrics"]) == ["metrics", "opened", "update"]
    assert declared["metrics"]["update"]["train_loss"] == [0, 100]
    for kind, record in egress.REPLIES.items():
        names = {field.name for field in dataclasses.fields(record)}
        assert names - {*egress.NAMES, *egress.PREFERENCES} == set(declared["metrics"][kind])


def test_a_manifest_declares_figures_of_preferences_only_where_it_learns_them():
    run = tiny.settings("tiny", {"training.objective.kind": '"dpo"'})
    declared = RunManifest(run, make().base_sha256, make().tensor_specs).plan.egress.metrics["metrics"]
    assert declared.keys() - make().plan.egress.metrics["metrics"].keys() == set(egress.PREFERENCES)


def test_declared_bytes_hold_the_largest_update():
    assert make().plan.egress.bytes_per_message >= 2 * 4 * 32 * 4 + 8 + 200
