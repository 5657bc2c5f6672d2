import json
import weakref

import pytest
import torch

from client.agent import process
from client.cli import rows as site_rows
from client.cli.rows import Asked
from client.data import site_files
from common.errors import ConfigError, DataError, ModelError
from common.frame import wire
from common.frame.records import OpenedHead, from_head
from common.frame.wire import Frame
from common.run import config
from common.run.manifest import Offer, RunManifest
from tests import tiny


def write_rows(path, count: int, *, site: str = "north") -> None:
    """The tiny rows as instruction and output."""
    lines = [
        {"instruction": row.messages[0].content, "output": row.messages[1].content, "patient_id": row.unit}
        for row in tiny.rows(count, site=site)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def node(tmp_path, tiny_base):
    """A site's own file; `changes` are whole sections."""

    def make(**changes) -> config.NodeConfig:
        write_rows(tmp_path / "rows.jsonl", 16)
        sections = {
            "site": {"name": "north"},
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "model": {"base": str(tiny_base)},
            "hardware": {"device": "cpu", "num_threads": 1},
            "agent": {"log_folder": str(tmp_path / "log")},
        }
        return config.NodeConfig.model_validate({**sections, **changes})

    return make


@pytest.fixture
def manifest(engine, tiny_base):
    def make(changes=None) -> RunManifest:
        return RunManifest(tiny.settings(tiny_base, changes), engine.base_sha256, engine.tensor_specs)

    return make


def test_an_agent_reads_rows_and_base_when_a_run_is_opened(node, manifest):
    agent = process.make_agent(node())
    frame = wire.unpack(agent.answer(wire.pack(Frame("open", body=manifest().to_bytes()))), max_body_bytes=0)
    opened = from_head(OpenedHead, frame.head)
    assert opened.site == "north"
    assert opened.num_examples + opened.num_held_out == 16


def test_what_went_wrong_is_in_the_agents_own_log(node, manifest, tmp_path):
    agent = process.make_agent(node(data={"path": str(tmp_path / "missing.jsonl")}))
    frame = wire.unpack(agent.answer(wire.pack(Frame("open", body=manifest().to_bytes()))), max_body_bytes=0)
    (entry,) = [json.loads(line) for line in (tmp_path / "log" / process.LOG_FILE).read_text().splitlines()]
    assert frame.head == {"code": "DataError", "reference": entry["reference"]}
    assert "missing.jsonl" in entry["message"]


def test_rows_are_split_by_unit_as_the_run_says(node, manifest):
    data = process.load_data(node(), manifest({"data.held_out_fraction": "0.5"}))
    assert len(data.train) == len(data.held_out) == 8
    assert not {row.unit for row in data.train} & {row.unit for row in data.held_out}


def test_a_sites_own_held_out_rows_take_the_place_of_the_split(node, manifest, tmp_path):
    write_rows(tmp_path / "held-out.jsonl", 6, site="later")
    paths = {"path": str(tmp_path / "rows.jsonl"), "held_out_path": str(tmp_path / "held-out.jsonl")}
    data = process.load_data(node(data=paths), manifest())
    assert (len(data.train), len(data.held_out)) == (16, 6)


def test_a_unit_with_rows_on_both_sides_of_a_sites_own_split_is_refused(node, manifest, tmp_path):
    write_rows(tmp_path / "held-out.jsonl", 6)
    paths = {"path": str(tmp_path / "rows.jsonl"), "held_out_path": str(tmp_path / "held-out.jsonl")}
    with pytest.raises(DataError, match=r"3 units.*held_out_path") as caught:
        process.load_data(node(data=paths), manifest())
    assert "north-0" not in str(caught.value)


def test_a_base_is_loaded_once_for_runs_that_want_the_same(node, manifest):
    loader = process.EngineLoader(node())
    first = loader.load(manifest())
    assert loader.load(manifest({"training.learning_rate": "1e-3", "seed": "9"})) is first
    assert loader.load(manifest({"adapter.r": "2"})) is not first


def test_a_site_loads_the_precision_that_a_run_gives_it_and_keeps_it_whatever_others_have(node, manifest):
    loader = process.EngineLoader(node())
    first = loader.load(manifest({"model.site_quantization.north": "int8", "model.site_quantization.south": "nf4"}))
    assert first.quantization == "int8"
    assert loader.load(manifest({"model.site_quantization.north": "int8"})) is first
    assert loader.load(manifest({"model.site_quantization.south": "int8"})).quantization == "none"  # control


def test_another_adapter_is_another_engine_and_the_old_one_goes(node, manifest):
    loader = process.EngineLoader(node())
    first = weakref.ref(loader.load(manifest()).model)
    loader.load(manifest({"adapter.r": "2"}))
    assert first() is None


def test_a_failed_load_is_tried_again(node, manifest, tiny_base):
    loader = process.EngineLoader(node())
    wrong = RunManifest(manifest().run, "ab" * 32, manifest().tensor_specs)
    for _ in range(2):
        with pytest.raises(ModelError, match="abab"):
            loader.load(wrong)
    assert loader.load(manifest()).base_sha256 == manifest().base_sha256


def test_the_base_is_found_in_the_sites_store_by_its_hash(node, manifest, tiny_base, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "any-name").symlink_to(tiny_base)
    (tmp_path / "store" / "a-file").write_text("not a base")
    loader = process.EngineLoader(node(model={"store": str(tmp_path / "store")}))
    assert loader.load(manifest()).base_sha256 == manifest().base_sha256


def test_a_server_cannot_choose_the_device_or_the_base(node, manifest):
    engine = process.EngineLoader(node()).load(manifest())
    assert engine.device == torch.device("cpu")
    assert torch.get_num_threads() == 1


def check_rows(node, given):
    return site_rows.check(node.data, node.model, given, site=node.site.name)


def preview_rows(node, given, *, limit):
    return site_rows.preview(node.data, node.model, given, limit=limit)


def test_check_counts_the_sites_rows_and_their_tokens(node):
    report = check_rows(node(), Asked(max_length_tokens=64)).report
    assert (report.num_rows, report.num_units) == (16, 8)
    assert report.tokens is not None
    assert report.tokens.num_dropped == 0


def test_check_needs_no_base(node):
    found = check_rows(node(model={}), Asked())
    assert found.report.tokens is None
    assert not found.findings


def test_preview_shows_the_first_rows(node, tiny_base):
    _, shown = preview_rows(node(model={}), Asked(base=str(tiny_base), max_length_tokens=64), limit=2)
    assert len(shown) == 2


def test_a_sites_preferences_are_read_as_the_run_says_and_checked_by_both_answers(node, tmp_path, tiny_base):
    path = tmp_path / "pairs.jsonl"
    lines = [{"patient_id": n % 3, "prompt": f"Code {n}?", "chosen": "A", "rejected": "B B"} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = node(data={"path": str(path)})
    run = RunManifest(tiny.settings("tiny", {"training.objective.kind": '"dpo"'}), "ab" * 32, ())
    data = process.load_data(own, run)
    assert len(data.train) + len(data.held_out) == 6
    assert all(row.rejected[-1].content == "B B" for row in data.train)
    report = check_rows(own, Asked("dpo", 64)).report
    assert (report.num_rows, report.num_units) == (12, 3)
    _, shown = preview_rows(own, Asked("dpo", 64, base=str(tiny_base)), limit=2)
    assert [("B B" in "".join(text for text, _ in row.segments)) for row in shown] == [False, True]
    found = check_rows(own, Asked(max_length_tokens=64))
    assert found.report is None
    assert ["'output'" in finding.what for finding in found.findings] == [True]
    with pytest.raises(DataError, match="'output'"):
        site_files.read_rows(own.data, own.data.path)
    with pytest.raises(ConfigError, match="choose one of sft, dpo, kto"):
        check_rows(own, Asked("ppo", 64))


def test_preview_without_any_base_says_how_to_name_one(node):
    with pytest.raises(ModelError, match=r"--base"):
        preview_rows(node(model={}), Asked(max_length_tokens=64), limit=2)


def test_the_sites_own_limit_on_messages_holds(node, tmp_path):
    """The body is no manifest either way; the log says at which of the two checks it ended."""
    log = tmp_path / "log" / process.LOG_FILE
    frame = wire.pack(Frame("open", body=bytes((1 << 20) + 1)))
    for max_message_mib, reason in ((1, "limits are"), (2, "not a run manifest")):
        section = {"log_folder": str(log.parent), "max_message_mib": max_message_mib}
        answer = wire.unpack(process.make_agent(node(agent=section)).answer(frame), max_body_bytes=0)
        assert answer.head["code"] == "WireError"
        assert reason in log.read_text().splitlines()[-1]


def test_a_run_whose_adapter_could_come_in_a_larger_message_than_the_site_takes_is_refused_when_it_is_offered(
    node, engine, tiny_base, tmp_path
):
    """The head of a request may have 2 MiB by itself, so that no run fits into these."""
    log = tmp_path / "log" / process.LOG_FILE
    offer = Offer(RunManifest(tiny.settings(tiny_base), engine.base_sha256, engine.tensor_specs).to_bytes())
    for max_message_mib, is_refused in ((2, True), (4, False)):
        section = {"log_folder": str(log.parent), "max_message_mib": max_message_mib}
        agent = process.make_agent(node(agent=section))
        answer = wire.unpack(agent.answer(wire.pack(offer.to_frame())), max_body_bytes=0)
        assert (answer.head.get("code") == "PolicyRefusedError") == is_refused
    assert (
        log.read_text().count("agent.max_message_mib: a request that brings this run's adapter whole has up to 3 MiB")
        == 1
    )


def test_an_agent_without_a_policy_starts_only_if_somebody_says_so(tmp_path):
    plain = config.NodeConfig.model_validate({"site": {"name": "north"}, "data": {"path": "rows.jsonl"}})
    with pytest.raises(ConfigError, match=r"agent\.policy is not set.*sign-policy.*--without-policy"):
        process.check_policy(plain, without_policy=False)
    process.check_policy(plain, without_policy=True)


def test_a_policy_is_not_switched_off_by_an_option(tmp_path):
    agent = {"policy": "policy.toml", "policy_signer": "ab" * 32, "identity_key": "site.pem"}
    strict = config.NodeConfig.model_validate(
        {"site": {"name": "north"}, "data": {"path": "rows.jsonl"}, "agent": agent}
    )
    with pytest.raises(ConfigError, match="remove one"):
        process.check_policy(strict, without_policy=True)
    process.check_policy(strict, without_policy=False)
