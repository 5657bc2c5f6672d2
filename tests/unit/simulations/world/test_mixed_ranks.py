"""Sites of different ranks in one run: what they are sent, what they send back, what is refused."""

import pytest
import torch

from common import events
from common.adapter import adapter, ranks
from common.errors import ConfigError, ModelError
from common.frame import wire
from common.frame.records import RoundPlan
from common.run import trainable
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from server.fleet import collect
from server.folder import run_files
from server.run import run
from simulations.world import world
from tests import tiny

MIXED = sorted(name for name, facts in FACTS.items() if facts.mixed_ranks != "no")
RANKS = {"north": 4, "south": 2, "west": 1}
CHANGES = {
    "adapter.site_ranks.south": "2",
    "adapter.site_ranks.west": "1",
    "training.local_epochs": "2",
    "federation.num_rounds": "3",
}


def settings(base, method: str):
    side = {"aggregation.residual_rank": "36"} if FACTS[method].base_delta == "residual" else {}
    return tiny.settings(base, {**CHANGES, **side, "aggregation.method": method})


@pytest.mark.parametrize("method", MIXED)
def test_each_site_is_sent_and_sends_an_adapter_of_its_own_rank_and_the_loss_falls(
    load_tiny, tiny_base, tmp_path, method
):
    found = settings(tiny_base, method)
    engine = load_tiny({"aggregation.residual_rank": "36", "aggregation.method": method} if method == "flora" else {})
    heard: dict[str, list] = {site: [] for site in RANKS}

    def listening(site, answer):
        def node(frame):
            reply = answer(frame)
            heard[site].append([wire.unpack(data, max_body_bytes=1 << 24) for data in (frame, reply)])
            return reply

        return node

    nodes = {n: listening(site, node) for (n, node), site in zip(tiny.make_nodes(engine).items(), RANKS, strict=True)}
    log = run_files.prepare(found, tmp_path / "run")
    outcome = run.execute(found, fleet=tiny.fleet(nodes), engine=engine, folder=tmp_path / "run", log=log)
    losses = [event["loss"] for event in events.read(log.path) if event["kind"] == "evaluated"]
    assert losses[-1] < losses[0] - 0.03
    assert adapter.specs(outcome.tensors) == engine.tensor_specs
    for site, rank in RANKS.items():
        own = trainable.at_rank(engine.tensor_specs, rank)
        assert {spec.shape[0] for spec in own if ".lora_A." in spec.name} == {rank}
        crossed = [(one.kind, one.head["round_index"]) for one, _ in heard[site] if one.kind != "open" and one.body]
        assert crossed == [
            ("evaluate", 1),
            ("evaluate", 2),
            ("evaluate", 3),
        ]  # the start it makes
        for request, reply in heard[site]:
            if request.kind != "open" and request.body:
                adapter.decode(request.body, trainable.received_specs(method, own), dtype="float32")
            if reply.kind == "update":
                sent = trainable.sent_specs(method, own, round_index=reply.head["round_index"])
                adapter.decode(reply.body, sent, dtype="float32")
        assert [reply.kind for _, reply in heard[site]].count("update") == 3


def test_an_update_of_another_sites_rank_is_refused_before_a_value_is_used(engine, tiny_base):
    run_manifest = RunManifest(settings(tiny_base, "flexlora"), engine.base_sha256, engine.tensor_specs)
    plan = RoundPlan(run_manifest.sha256, 0)
    node = tiny.make_agent("south", engine)
    node.answer(wire.pack(wire.Frame("open", {}, run_manifest.to_bytes())))
    specs = trainable.at_rank(engine.tensor_specs, 2)
    body = adapter.encode(ranks.cut(engine.initial, specs), dtype="float32")
    head = {"run_sha256": run_manifest.sha256, "round_index": 0, "generate": False}
    reply = wire.expect(node.answer(wire.pack(wire.Frame("train", head, body))), "update", max_body_bytes=1 << 24)
    assert (
        collect.read_update(reply, plan, expected=run_manifest.plan.for_site("south"))[0].site == "south"
    )  # the control
    for other in ("north", "west"):
        with pytest.raises(ModelError, match="expected"):
            collect.read_update(reply, plan, expected=run_manifest.plan.for_site(other))
    whole = node.answer(wire.pack(wire.Frame("train", head, adapter.encode(engine.initial, dtype="float32"))))
    assert wire.unpack(whole, max_body_bytes=1 << 24).head["code"] == "ModelError"


def test_a_simulation_knows_its_sites(tiny_base):
    sites = {site: tiny.site_data(site, 8) for site in RANKS}
    run = settings(tiny_base, "flexlora")
    world.require_named(run.adapter, run.model, sites)  # the control
    with pytest.raises(ConfigError, match="names west, and the sites are north, south"):
        world.require_named(run.adapter, run.model, {site: sites[site] for site in ("north", "south")})


def test_robust_aggregation_and_mixed_ranks_do_not_go_together(tiny_base):
    guarded = {
        "aggregation.robust.rule": "median",
        "aggregation.robust.num_bad_sites": "1",
        "aggregation.weighting": "uniform",
    }
    asked = {"aggregation.method": "fedsvd", "federation.min_sites": "3", **guarded}
    tiny.settings(tiny_base, asked)  # the control
    with pytest.raises(ConfigError, match="a smaller site has none for some"):
        tiny.settings(tiny_base, {**asked, "adapter.site_ranks.south": "2"})


def test_torch_sees_the_same_factors_whatever_a_shared_engine_held_before(engine, tiny_base):
    """Sites of several ranks share an engine: each writes its own rank into it."""
    for rank in (1, 4, 2):
        tensors = ranks.cut(engine.initial, trainable.at_rank(engine.tensor_specs, rank))
        adapter.write(engine.model, tensors)
        assert all(torch.equal(found, tensors[name]) for name, found in adapter.read(engine.model).items())
    adapter.write(engine.model, engine.initial)
