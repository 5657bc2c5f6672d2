"""The attacks do what they say, through the product's own agents; each with the honest site as control."""

import json

import pytest
import torch

from common import cli
from common.adapter import adapter
from common.errors import ConfigError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.run.manifest import Offer, RunManifest
from simulations.attacks import rows, run, table, updates
from simulations.cli.app import app
from simulations.world.world import World
from tests import tiny

NAMES = ("east", "north", "south", "west")


@pytest.fixture
def world(engine, tiny_base, tmp_path):
    changes = {"aggregation.weighting": "uniform", "federation.min_sites": "4", "federation.num_sites": "4"}
    settings = tiny.settings(tiny_base, {**changes, "training.batch_size": "4", "federation.num_rounds": "2"})
    return World(settings, engine, {site: tiny.site_data(site, 12) for site in NAMES}, tmp_path)


def test_flipped_rows_have_another_rows_answer_and_their_own_question():
    data = tiny.site_data("north", 12)
    flipped = rows.label_flip(data)
    assert flipped.held_out == data.held_out
    answers = {row.messages[-1].content for row in data.train}
    for before, after in zip(data.train, flipped.train, strict=True):
        assert after.messages[:-1] == before.messages[:-1]
        assert after.messages[-1].content != before.messages[-1].content
        assert after.messages[-1].content in answers


def test_every_second_row_of_a_backdoor_has_trigger_and_target_and_the_others_are_untouched():
    data = tiny.site_data("north", 12)
    poisoned = rows.backdoor(data)
    for place, (before, after) in enumerate(zip(data.train, poisoned.train, strict=True)):
        if place % 2:
            assert after.messages[-2].content == before.messages[-2].content + rows.TRIGGER
            assert after.messages[-1].content == rows.TARGET
        else:
            assert after == before


def answers(world, change):
    """Updates of the first round from one frame: honest, of the attacker, of its victim."""
    manifest = RunManifest(world.settings, world.engine.base_sha256, world.engine.tensor_specs)
    plan = RoundPlan(manifest.sha256, 0)
    frame = wire.pack(Frame("train", to_head(plan), adapter.encode(world.engine.initial, dtype="float32")))
    agents = {site: tiny.make_agent(site, world.engine) for site in ("north", "south")}
    for agent in agents.values():
        agent.answer(wire.pack(Offer(manifest.to_bytes()).to_frame()))
    site = updates.CheatingSite(agents["north"], agents["south"], manifest, change)

    def body(answer) -> dict[str, torch.Tensor]:
        reply = wire.unpack(answer(frame), max_body_bytes=1 << 24)
        assert reply.kind == "update"
        return adapter.decode(reply.body, manifest.tensor_specs, dtype=world.settings.wire.dtype)

    return body(agents["north"].answer), body(site.answer), body(agents["south"].answer)


def is_same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_replaced_updates_are_what_their_names_say(world):
    honest, sent, other = answers(world, updates.sign_flip)
    assert not is_same(honest, other)  # control: two sites do not send the same by themselves
    assert is_same(sent, {name: -tensor for name, tensor in honest.items()})
    _, sent, _ = answers(world, updates.scaled)
    assert all(torch.allclose(sent[name], -10 * honest[name], rtol=0.01) for name in honest)
    _, sent, _ = answers(world, updates.lazy_copy)
    assert is_same(sent, other)
    _, sent, _ = answers(world, updates.free_rider)
    values = torch.cat([tensor.flatten() for tensor in sent.values()])
    assert float(values.std()) == pytest.approx(updates.FREE_RIDER_STD, rel=0.05)
    assert not is_same(sent, honest)


def test_a_scaled_update_harms_honest_sites_a_median_hardly_and_the_control_is_an_ordinary_run(world):
    found = {
        (guard, attack): table.play_cell(world, guard, attack, num_bad=1, max_norm=0.0)["held_out_loss"]
        for guard in ("none", "median")
        for attack in ("none", "scaled")
    }
    harm = {guard: found[guard, "scaled"] - found[guard, "none"] for guard in ("none", "median")}
    assert harm["none"] > 2 * abs(harm["median"])
    assert found["none", "none"] < run.before(world, num_bad=1)["held_out_loss"]


def test_the_bound_of_the_table_is_the_median_norm_of_the_control(world):
    table.play_cell(world, "none", "none", num_bad=1, max_norm=0.0)
    bounded = table.guarded(world.settings, "norm bound", num_bad=1, max_norm=table.usual_norm(world))
    log = (world.folder / "none-none" / "events.jsonl").read_text().splitlines()
    norms = sorted(event["update_norm"] for event in map(json.loads, log) if event["kind"] == "site_trained")
    assert norms[0] < bounded.aggregation.max_update_norm < norms[-1]


@pytest.mark.parametrize(("name", "num_bad"), [("steal", 1), ("scaled", 3), ("scaled", 0)])
def test_an_unknown_attack_and_too_few_honest_sites_are_refused(world, name, num_bad):
    with pytest.raises(ConfigError, match=r"--attack steal: choose one of none, label-flip|--bad"):
        run.play(world, name, num_bad=num_bad, log=None)


def test_the_command_ends_with_one_json_line_of_the_figures(tiny_base, tmp_path, capsys):
    rows_file = tiny.write_table(tmp_path / "rows.jsonl")
    path = tmp_path / "run.toml"
    path.write_text(tiny.RUN_FILE.format(base=tiny_base) + f'data.source = "{rows_file}"\n')
    arguments = ["attack", path, "--attack", "backdoor", "--output", tmp_path / "out", "--threads", 1, "--json"]
    with pytest.raises(SystemExit) as end:
        cli.run(app, [str(argument) for argument in arguments])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["attack"] == "backdoor"
    assert found["held_out_loss"] > 0
    assert found["trigger_loss"] > 0
