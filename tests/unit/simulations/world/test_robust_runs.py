"""Whole runs with one bad site among honest ones: what it can do to the adapter, and what a run says of its guard."""

import pytest
import torch

from common import events
from common.adapter import adapter
from common.errors import ConfigError
from common.run.manifest import RunManifest
from server.folder import run_files
from server.run import run
from tests import tiny

GUARD = {"aggregation.robust.num_bad_sites": "1", "aggregation.weighting": "uniform"}
SIZES = (12, 8, 9, 10, 11, 12, 8)
FACTOR = 1e4


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """The adapter and the events of a run of seven sites, the last of which may be bad."""

    def execute(rule: str, *, is_bad: bool, **changes: str):
        guard = GUARD if rule != "none" else {"aggregation.weighting": "uniform"}
        given = {**guard, "aggregation.robust.rule": rule, "federation.min_sites": "7", "federation.num_sites": "7"}
        settings = tiny.settings(tiny_base, {**given, "training.batch_size": "4", **changes})
        specs = RunManifest(settings, engine.base_sha256, engine.tensor_specs).tensor_specs

        def alter(body: bytes) -> bytes:
            change = adapter.decode(body, specs, dtype=settings.wire.dtype)
            return adapter.encode({name: FACTOR * tensor for name, tensor in change.items()}, dtype=settings.wire.dtype)

        agents = [tiny.make_agent(f"site-{number}", engine, count=count) for number, count in enumerate(SIZES)]
        nodes = {number: agent.answer for number, agent in enumerate(agents, start=1)}
        if is_bad:
            nodes[7] = tiny.spoilt(nodes[7], "train", tiny.with_body(alter))
        folder = tmp_path / f"{rule}-{is_bad}"
        log = run_files.prepare(settings, folder)
        outcome = run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=folder, log=log)
        return outcome.tensors, events.read(log.path)

    return execute


def apart(one, other) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "bulyan"])
def test_a_site_that_sends_a_scaled_update_stays_without_effect(play, rule):
    honest, log = play(rule, is_bad=False)
    attacked, _ = play(rule, is_bad=True)
    assert apart(honest, attacked) < 0.1
    (plan,) = [event for event in log if event["kind"] == "run_started"]
    assert f"robust aggregation: {rule} against 1 bad site" in plan["guarding"]
    assert {event["gap"] for event in log if event["kind"] == "round_finished"} == {None}


def test_control_under_the_mean_it_moves_the_adapter_where_it_likes(play):
    honest, _ = play("none", is_bad=False)
    attacked, _ = play("none", is_bad=True)
    assert apart(honest, attacked) > 1


def test_a_bound_on_the_norm_holds_it_to_the_length_of_others_and_events_tell_what_came(play):
    _, log = play("none", is_bad=False)
    usual = max(event["update_norm"] for event in log if event["kind"] == "site_trained")
    attacked, log = play("none", is_bad=True, **{"aggregation.max_update_norm": f"{usual:.6f}"})
    norms = {event["site"]: event["update_norm"] for event in log if event["kind"] == "site_trained"}
    assert norms["site-6"] > 100 * norms["site-0"]
    num_rounds = sum(event["kind"] == "round_finished" for event in log)
    start = {name: tensor for name, tensor in attacked.items() if ".lora_B." in name}  # B begins at zero
    moved = float(sum(tensor.double().square().sum() for tensor in start.values()) ** 0.5)
    assert moved <= num_rounds * usual


def test_the_manifest_holds_the_guard_so_that_each_site_signs_up_for_it(engine, tiny_base):
    plain = tiny.settings(tiny_base, {"aggregation.weighting": "uniform"})
    guarded = tiny.settings(tiny_base, {**GUARD, "aggregation.robust.rule": "median", "federation.min_sites": "3"})
    first, second = (RunManifest(one, engine.base_sha256, engine.tensor_specs) for one in (plain, guarded))
    assert first.sha256 != second.sha256
    assert b'"rule":"median"' in second.to_bytes()


def test_a_run_of_too_few_sites_for_the_bad_ones_is_refused(tiny_base):
    with pytest.raises(ConfigError, match="too few sites for so many bad ones"):
        tiny.settings(tiny_base, {**GUARD, "aggregation.robust.rule": "krum", "federation.min_sites": "4"})


def test_an_update_that_is_all_zero_has_no_norm_and_is_left_alone():
    from common.privacy import clipping

    change = {"b": torch.zeros(2)}
    assert clipping.scaled(change, 1.0) == (change, 0.0)
