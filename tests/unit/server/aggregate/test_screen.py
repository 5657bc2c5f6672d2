"""Screening: each sign by hand, what it leaves alone, and a whole run in which the bad site has no part."""

import math

import pytest
import torch

from common import events
from common.adapter import adapter
from common.run.manifest import RunManifest
from server.aggregate import screen
from server.aggregate.screen import Look
from server.folder import run_files
from server.run import run
from tests import tiny
from tests.samples.events import view

SHAPES = {"m.lora_A.weight": (2, 50), "m.lora_B.weight": (40, 2), "n.lora_B.weight": (40, 2)}
SITES = ("a", "b", "c", "d", "e", "f", "g")
THRESHOLD = 4.0


def cohort(*, seed: int = 1, shared: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    """Seven sites that go the same way, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    common = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {
        site: {name: shared * common[name] + torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for site in SITES
    }


def flagged(updates, past=None, *, threshold: float = THRESHOLD) -> dict[str, str]:
    """The kind of the first reason of every site that has one."""
    found = screen.look(updates, past or {}, threshold=threshold)
    return {site: seen.reasons[0].partition(":")[0] for site, seen in found.items() if seen.reasons}


@pytest.mark.parametrize("seed", range(20))
def test_a_cohort_of_honest_sites_is_left_alone(seed):
    assert flagged(cohort(seed=seed)) == {}


@pytest.mark.parametrize(
    ("factor", "kind"), [(10.0, "norm"), (0.05, "norm"), (0.0, "norm"), (-1.0, "direction"), (1.5, None)]
)
def test_a_scaled_a_vanishing_and_a_reversed_update_are_found_and_a_slightly_longer_one_is_not(factor, kind):
    updates = cohort()
    updates["d"] = {name: factor * tensor for name, tensor in updates["d"].items()}
    assert flagged(updates) == ({"d": kind} if kind else {})


def test_one_module_that_is_too_long_is_enough():
    updates = cohort()
    updates["d"]["n.lora_B.weight"] = 10 * updates["d"]["n.lora_B.weight"]
    (reason,) = screen.look(updates, {}, threshold=THRESHOLD)["d"].reasons
    assert reason.startswith("norm: off in 1 of 2 modules, at worst")


def test_of_three_alike_the_first_by_name_counts_and_all_are_named():
    updates = cohort()
    updates["f"] = updates["g"] = updates["b"]
    found = screen.look(updates, {}, threshold=THRESHOLD)
    assert {site for site, seen in found.items() if seen.reasons} == {"b", "f", "g"}
    assert screen.left_out(found) == {"f", "g"}


def test_a_copy_that_is_scaled_as_well_counts_neither():
    updates = cohort()
    updates["a"] = {name: 20 * tensor for name, tensor in updates["b"].items()}
    found = screen.look(updates, {}, threshold=THRESHOLD)
    assert "a" in screen.left_out(found)


def test_cosine_to_the_others_is_that_of_the_sum_without_oneself():
    updates = cohort()
    flat = {site: torch.cat([t.flatten() for t in update.values()]).double() for site, update in updates.items()}
    for site, seen in screen.look(updates, {}, threshold=THRESHOLD).items():
        others = torch.stack([vector for other, vector in flat.items() if other != site]).sum(dim=0)
        assert seen.cosine == pytest.approx(float(torch.cosine_similarity(flat[site], others, dim=0)), abs=1e-12)


def past_of(norms, cosines) -> list[Look]:
    return [Look(norm, cosine, ()) for norm, cosine in zip(norms, cosines, strict=True)]


def test_a_site_is_held_against_its_own_last_rounds_and_a_flagged_round_is_no_example():
    updates = cohort(shared=0.3)
    updates["d"] = {name: 2.5 * tensor for name, tensor in updates["d"].items()}
    cosine = screen.look(updates, {}, threshold=THRESHOLD)["d"].cosine
    usual = past_of([-0.8] * 4, [cosine] * 4)
    assert flagged(updates) == {}
    assert flagged(updates, {"d": usual}) == {"d": "history"}
    assert flagged(updates, {"d": past_of([math.log(2.5)] * 4, [cosine] * 4)}) == {}
    assert flagged(updates, {"d": usual[:2]}) == {}
    assert flagged(updates, {"d": [Look(seen.norm, seen.cosine, ("norm: x",)) for seen in usual]}) == {}


def test_history_is_ten_rounds_of_the_events_and_a_round_that_was_played_again_counts_once():
    def event(number, norm):
        return {"kind": "screened", "round": number, "sites": {"a": {"norm": norm, "cosine": 0.5, "reasons": []}}}

    log = [event(number, float(number)) for number in range(15)]
    again = [*log, event(14, 99.0), {"kind": "round_finished", "round": 14}]
    past = screen.history(view(again).screened, round_index=15)
    assert [seen.norm for seen in past["a"]] == [*map(float, range(5, 14)), 99.0]
    assert screen.history(view(again).screened, round_index=0) == {}


@pytest.mark.parametrize(("screening", "is_kept"), [("drop", False), ("report", True), ("off", True)])
def test_a_bad_site_has_no_part_in_a_run_that_leaves_it_out(engine, tiny_base, tmp_path, screening, is_kept):
    given = {"aggregation.screening.action": screening, "federation.min_sites": "4", "federation.num_sites": "5"}
    settings = tiny.settings(tiny_base, {**given, "training.local_epochs": "0.0", "training.local_steps": "4"})
    specs = RunManifest(settings, engine.base_sha256, engine.tensor_specs).tensor_specs

    def alter(body: bytes) -> bytes:
        change = adapter.decode(body, specs, dtype=settings.wire.dtype)
        return adapter.encode({name: 1e4 * tensor for name, tensor in change.items()}, dtype=settings.wire.dtype)

    agents = [tiny.make_agent(f"site-{number}", engine, count=12) for number in range(5)]
    nodes = {number: agent.answer for number, agent in enumerate(agents, start=1)}
    nodes[5] = tiny.spoilt(nodes[5], "train", tiny.with_body(alter))
    log = run_files.prepare(settings, tmp_path / "run")
    outcome = run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=tmp_path / "run", log=log)
    largest = max(float(tensor.abs().max()) for tensor in outcome.tensors.values())
    assert (largest > 10) == is_kept
    told = events.read(log.path)
    seen = [event["sites"]["site-4"] for event in told if event["kind"] == "screened"]
    assert [found["is_left_out"] for found in seen] == ([] if screening == "off" else [not is_kept] * len(seen))
    assert all(found["reasons"][0].startswith("norm") for found in seen)
    assert ("site-4" in outcome.sites) == is_kept
