"""Sites of different precision in one run: what each loads, what is refused, and what is told of the base's noise."""

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import load_file

from common import events
from common.errors import CodesDifferError, ConfigError, ModelError, WireError
from common.frame import wire
from common.model import codes, layerwise
from common.run import config, manifest
from common.run.manifest import Offer, RunManifest
from common.run.schema import precisions
from server.folder import run_files
from server.report import report
from server.run import base_noise, run
from server.view import figures
from simulations.world import run as running
from simulations.world import world
from simulations.world.world import Engines, World
from tests import tiny
from tests.samples.events import view

SITES = {"north": "nf4", "south": "int8", "west": "none"}
CLASSES = {"nf4": Linear4bit, "int8": Linear8bitLt}
MIXED = {
    "model.quantization": "nf4",
    "model.site_quantization.south": "int8",
    "model.site_quantization.west": "none",
    "training.local_epochs": "2",
    "federation.num_rounds": "2",
}


@pytest.fixture(scope="module")
def settings(tiny_base) -> config.RunConfig:
    return tiny.settings(tiny_base, MIXED)


@pytest.fixture(scope="module")
def engines(settings, load_tiny) -> Engines:
    return Engines(settings, load_tiny(MIXED))


@pytest.fixture(scope="module")
def offered(settings, engines) -> RunManifest:
    return run.manifest_of(settings, engines.main)


@pytest.fixture(scope="module")
def played(settings, engines, tmp_path_factory):
    """A run of all three, and its events."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    log = run_files.prepare(settings, folder)
    sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
    running.in_process(World(settings, engines.main, sites, folder, engines), log=log)
    return events.read(log.path)


def of_kind(log, kind):
    return [event for event in log if event["kind"] == kind]


def opened(engine, run_manifest, *, site: str, errors=None) -> str:
    """How a site answers the offer with such an engine."""
    frame = wire.pack(Offer(run_manifest.to_bytes()).to_frame())
    answer = tiny.make_agent(site, engine, errors=errors).answer(frame)
    return wire.unpack(answer, max_body_bytes=1 << 20).kind


def test_the_loss_falls_at_every_site(played):
    before, after = (of_kind(played, "evaluated")[index]["sites"] for index in (0, -1))
    assert all(after[site]["loss"] < before[site]["loss"] - 0.03 for site in SITES)
    assert {event["site"] for event in of_kind(played, "site_trained")} == SITES.keys()


def test_each_site_computes_on_layers_of_its_own_precision_and_shares_them_with_its_like(engines):
    for site, precision in SITES.items():
        engine = engines.at(site)
        layers = {type(layer) for layer in engine.model.get_base_model().modules() if codes.is_quantised(layer)}
        assert engine.quantization == precision
        assert layers == {CLASSES[name] for name in CLASSES if name == precision}
    assert engines.at("north") is engines.main
    assert engines.at("south") is engines.at("south")


@pytest.mark.parametrize("site", SITES)
def test_a_site_takes_part_with_its_own_precision_and_no_other(engines, offered, site):
    told: list[Exception] = []
    answers = {other: opened(engines.at(other), offered, site=site, errors=told) for other in SITES}
    assert answers == {other: "opened" if other == site else "refused" for other in SITES}
    assert [type(error) for error in told] == [CodesDifferError, CodesDifferError]
    assert all(f"gives this site '{SITES[site]}'" in str(error) for error in told)


def test_other_codes_are_refused_at_the_site_that_has_any(engines, offered, settings):
    invented = RunManifest(settings, offered.base_sha256, offered.tensor_specs, "ab" * 32)
    answers = {site: opened(engines.at(site), invented, site=site) for site in SITES}
    assert answers == {"north": "refused", "south": "opened", "west": "opened"}


def test_the_codes_are_the_same_whether_the_coordinator_or_only_a_site_is_4_bit(tiny_base, load_tiny, offered, engine):
    others = tiny.settings(tiny_base, {"model.site_quantization.north": "nf4"})
    assert layerwise.codes_of_run(engine, others.model) == offered.codes_sha256 == load_tiny(MIXED).codes_sha256
    assert layerwise.codes_of_run(engine, tiny.settings(tiny_base).model) == ""  # control: nobody is 4-bit
    run_manifest = RunManifest(others, engine.base_sha256, engine.tensor_specs, offered.codes_sha256)
    assert opened(load_tiny({"model.quantization": "nf4"}), run_manifest, site="north") == "opened"
    assert opened(engine, run_manifest, site="south") == "opened"
    without = RunManifest(others, engine.base_sha256, engine.tensor_specs)
    with pytest.raises(WireError, match="not a run manifest"):
        manifest.parse(without.to_bytes())


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_gives_the_very_codes_of_a_loaded_base(tiny_base, load_tiny, precision, dtype):
    changes = {"model.quantization": precision, "model.dtype": dtype}
    base = load_tiny(changes).model.get_base_model()
    held = {
        name.replace(".base_layer", ""): layer.weight.data
        for name, layer in base.named_modules()
        if codes.is_quantised(layer)
    }
    found = layerwise.layers(tiny_base, tiny.settings(tiny_base, changes).model, torch.device("cpu"))
    stored = {layer.name: layer.stored for layer in found}
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[name], codes_of_layer) for name, codes_of_layer in held.items())


def test_noise_is_the_relative_error_of_what_layers_compute_with(tiny_base, settings):
    """Made here from the files: NF4 by bitsandbytes, 8 bits by the rule of LLM.int8, a scale for each row."""
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in load_file(tiny_base / "model.safetensors").items()
        if name.endswith("_proj.weight")
    }
    used = {
        "nf4": {name: dequantize_4bit(*quantize_4bit(w, quant_type="nf4", compress_statistics=True)) for name, w in
                weights.items()},
        "int8": {name: (w / (scale := w.abs().amax(1, keepdim=True) / 127)).round() * scale for name, w in
                 weights.items()},
    }  # fmt: skip
    for precision, tolerance in (("nf4", 1e-6), ("int8", 5e-3)):  # 8-bit codes are made from 16-bit values
        found = base_noise.noise_of(
            layerwise.layers(tiny_base, precisions.at(settings.model, precision), torch.device("cpu"))
        )
        error = math.sqrt(sum(float((used[precision][n] - w).norm()) ** 2 for n, w in weights.items()))
        whole = math.sqrt(sum(float(w.norm()) ** 2 for w in weights.values()))
        assert found.error == pytest.approx(error / whole, rel=tolerance)
        name = "model.layers.1.mlp.up_proj"
        wanted = float((used[precision][name] - weights[name]).norm() / weights[name].norm())
        assert found.modules[name] == pytest.approx(wanted, rel=tolerance)
        assert found.modules.keys() == weights.keys()


def shown(log):
    """The rows of a report."""
    seen = view(log)
    return figures.precisions(seen.base_noise, seen.evaluated[0], seen.last_evaluated)


def test_the_run_tells_the_noise_and_the_untrained_loss_of_each_precision(played):
    noise = of_kind(played, "base_noise")[0]["precisions"]
    assert {name: found["sites"] for name, found in noise.items()} == {
        "nf4": ["all others"], "int8": ["south"], "none": ["west"]
    }  # fmt: skip
    assert noise["nf4"]["error"] > 5 * noise["int8"]["error"] > 5 * noise["none"]["error"] == 0
    assert set(noise["nf4"]["targets"]) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    first, last = (of_kind(played, "evaluated")[index] for index in (0, -1))
    rows = {row["name"]: row for row in shown(played)}
    for site, precision in SITES.items():
        assert rows[precision]["sites"] == site
        assert rows[precision]["base_loss"] == pytest.approx(first["sites"][site]["loss"])
        assert rows[precision]["loss"] == pytest.approx(last["sites"][site]["loss"])
    page = report.render(view(played))
    assert "Sites by the precision of their base" in page
    assert "nf4 (south = int8, west = none)" in page


def test_a_run_of_one_precision_tells_nothing_of_the_kind(played):
    alike = [event for event in played if event["kind"] != "base_noise"]
    assert shown(alike) == []
    assert "Sites by the precision" not in report.render(view(alike))


def test_naming_the_runs_own_precision_is_refused(tiny_base):
    south = {"model.site_quantization.south": "nf4"}
    tiny.settings(tiny_base, south)  # the control: the run's own is none
    for odd in ({"model.site_quantization.south": "none"}, {**south, "model.site_quantization.north": "none"}):
        with pytest.raises(ConfigError, match=r"name only sites whose precision is another"):
            tiny.settings(tiny_base, odd)
    with pytest.raises(ConfigError, match=r'site_quantization\.south  must be "none", "int8" or "nf4"'):
        tiny.settings(tiny_base, {"model.site_quantization.south": "fp4"})


def test_kinds_that_do_not_stand_on_a_sites_precision_are_refused(tiny_base):
    for kind, told in (
        ("full", "no nf4 base with this kind"),
        ("dora", "it starts from the base's weights, which differ between the sites"),
    ):
        cleared = {"adapter.kind": kind}
        tiny.settings(tiny_base, cleared)  # the control
        with pytest.raises(ConfigError, match=told):
            tiny.settings(tiny_base, {**cleared, "model.site_quantization.south": "nf4"})


def test_a_simulation_knows_its_sites(settings):
    sites = {site: tiny.site_data(site, 8) for site in SITES}
    world.require_named(settings.adapter, settings.model, sites)  # the control
    with pytest.raises(ConfigError, match=r"model\.site_quantization names west, and the sites are north, south"):
        world.require_named(settings.adapter, settings.model, {site: sites[site] for site in ("north", "south")})


def test_a_base_whose_files_name_layers_in_another_way_is_refused(tiny_base, settings, tmp_path):
    from safetensors.torch import save_file

    for file in tiny_base.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_base / "model.safetensors")
    save_file({name.replace("up_proj", "w3"): weight for name, weight in weights.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="give all sites one precision"):
        list(layerwise.layers(tmp_path, settings.model, torch.device("cpu")))
