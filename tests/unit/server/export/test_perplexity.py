"""What merging into bf16 does to the perplexity: measured on rows, in card and seal, refused where it is much."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from common.adapter import adapter
from common.errors import ConfigError, ModelError
from common.loss import evaluation
from common.model import base as model
from common.run.manifest import RunManifest
from server.export import adapter as export
from server.export import folder as export_folder
from server.export import perplexity, probe, seal
from server.export.folder import Exported
from server.run import finish
from server.verify import verify
from tests import tiny

SIDE = {"aggregation.method": "fedex", "aggregation.residual_rank": "4"}
CORED = {"aggregation.method": "ravan", "aggregation.num_heads": "2"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"messages": [asdict(message) for message in tiny.row(number).messages]} for number in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def engine_and_source(load_tiny, tiny_base):
    """A `fedex` adapter whose side adapter does as much as its factors."""
    engine, settings = load_tiny(SIDE), tiny.settings(tiny_base, SIDE)
    generator = torch.Generator().manual_seed(8)
    state = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    return engine, Exported(state, RunManifest(settings, engine.base_sha256, engine.tensor_specs), 2, {"north": 9}, [])


@pytest.fixture(scope="module")
def sealed(engine_and_source, tiny_base, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "export"
    formats = ("peft", "merged")
    export_folder.write(
        folder, engine_and_source[1], formats=formats, base=tiny_base, llama_cpp=None, key=None, rows=rows
    )
    return folder


def merged_without_side(source, base, folder):
    """The fault: the factors are merged, and the side adapter is forgotten."""
    tensors = {name: 0 * tensor if "residual" in name else tensor for name, tensor in source.tensors.items()}
    export.save_adapter(folder / "peft", tensors, run_manifest=source.run_manifest, num_rounds=2, sites={})
    export.merge(folder / "peft", base, folder / "merged")
    return folder


def test_the_figures_are_those_of_the_runs_own_model_and_of_the_merged_one(sealed, engine_and_source, rows):
    engine, source = engine_and_source
    found = probe.stored(perplexity.Perplexity, seal.read(sealed).facts.perplexity, what="perplexity")
    adapter.write(engine.model, source.tensors)
    encoded, _ = model.encode(engine, [tiny.row(number) for number in range(10)], source.run_manifest.run.data)
    nll, num_tokens = evaluation.held_out_nll(engine, encoded, batch_size=4)
    assert (found.num_rows, found.num_tokens) == (10, num_tokens)
    assert found.side_by_side == pytest.approx(math.exp(nll / num_tokens), rel=1e-5)
    assert abs(math.log(found.ratio)) < perplexity.LIMIT / 2
    assert found.merged != found.side_by_side  # bf16 is another model, if hardly
    assert found.low < found.merged - found.side_by_side < found.high
    assert found.high - found.low < 0.1 * abs(
        found.base - found.side_by_side
    )  # of pairs: much narrower than rows are apart
    assert abs(math.log(found.base / found.side_by_side)) > 10 * perplexity.LIMIT


def test_cores_are_measured_as_they_are_trained(load_tiny, tiny_base, rows, tmp_path):
    settings = tiny.settings(tiny_base, CORED)
    engine = load_tiny(CORED)
    generator = torch.Generator().manual_seed(8)
    state = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    source = Exported(state, RunManifest(settings, engine.base_sha256, engine.tensor_specs), 2, {"north": 9}, [])
    folder = tmp_path / "export"
    export_folder.write(folder, source, formats=("merged",), base=tiny_base, llama_cpp=None, key=None, rows=rows)
    found = probe.stored(perplexity.Perplexity, seal.read(folder).facts.perplexity, what="perplexity")
    assert abs(math.log(found.ratio)) < perplexity.LIMIT / 2
    assert abs(math.log(found.base / found.side_by_side)) > 5 * perplexity.LIMIT


def test_card_and_verify_tell_them(sealed):
    found = seal.read(sealed).facts.perplexity
    card = (sealed / "README.md").read_text()
    assert f"| base and adapters side by side, float32 | {found['side_by_side']:.4f} |" in card
    assert f"| merged in float32, rounded to bf16 | {found['merged']:.4f} |" in card
    result = verify.verify(sealed)
    assert result["perplexity"] == found
    assert any(f"perplexity {found['merged']:.4f}, side by side" in line for line in verify.in_words(result))


def test_control_a_merge_that_forgets_the_side_adapter_is_refused(engine_and_source, tiny_base, rows, tmp_path):
    _, source = engine_and_source
    broken = merged_without_side(source, tiny_base, tmp_path)
    run = source.run_manifest.run
    beside = perplexity.side_by_side(rows, source.tensors, run=run, base=tiny_base)
    found = perplexity.measure(beside, broken / "merged", run.model.chat_template)
    with pytest.raises(ModelError, match=r"tiny: the merged checkpoint has perplexity .* side by side"):
        found.check("tiny")
    with pytest.raises(ModelError, match="the sum of base and adapter are off by"):  # and by the probe, without rows
        export.merge(broken / "peft", tiny_base, tmp_path / "again", beside_btv=beside.logits_btv)
    assert not (tmp_path / "again").exists()


def test_figures_beyond_the_limit_are_refused_however_they_were_sealed(sealed, tmp_path):
    facts = seal.read(sealed).facts
    beyond = facts.perplexity | {"merged": 1.02 * facts.perplexity["side_by_side"]}
    with pytest.raises(ModelError, match="a ratio within"):
        probe.stored(perplexity.Perplexity, beyond, what="perplexity").check("x")
    for broken in ({**beyond, "merged": float("nan")}, {"merged": 1.0}, {**beyond, "base": "much"}):
        with pytest.raises(ModelError, match="malformed"):
            probe.stored(perplexity.Perplexity, broken, what="perplexity")
    silent = replace(facts, perplexity=facts.perplexity | {"merged": facts.perplexity["merged"] * 1.001})
    with pytest.raises(ModelError, match="does not tell the perplexity"):
        verify.check_perplexity(sealed, silent)


def test_the_coordinators_own_rows_are_taken_where_the_run_file_names_them_by_a_home_folder(
    engine_and_source, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.jsonl").write_text("{}\n")
    for name, is_there in (("~/own.jsonl", True), ("~/other.jsonl", False), ("", False)):
        run = tiny.settings(tiny_base, {**SIDE, "evaluation.server_data": f'"{name}"'})
        source = replace(engine_and_source[1], run_manifest=replace(engine_and_source[1].run_manifest, run=run))
        assert (finish._own_rows(source) is not None) is is_there


def test_without_rows_the_card_says_that_nothing_was_measured(engine_and_source, tiny_base, tmp_path):
    folder = tmp_path / "export"
    export_folder.write(folder, engine_and_source[1], formats=("merged",), base=tiny_base, llama_cpp=None, key=None)
    assert "was not measured: no rows were given" in (folder / "README.md").read_text()
    assert verify.verify(folder)["perplexity"] == {}


def test_rows_without_a_merged_format_are_refused(tmp_path, rows):
    with pytest.raises(ConfigError, match="--rows is for merged weights"):
        finish.export_to(
            tmp_path, tmp_path / "out", formats="peft", num_rounds=0, base=None, llama_cpp=None, sign_with=None,
            rows=rows,
        )  # fmt: skip
