"""A run with noise for whole sites, from file to model card: draws, refusal, resume, and what is told."""

import json
import shutil

import pytest
import torch

from common import events
from common.errors import FloorRefused, PrivacyError, TooFewSitesError
from common.privacy import cost as privacy_cost
from server.folder import checkpoint, run_files
from server.report import report, status
from server.run import run as server_run
from simulations.world import run, world
from simulations.world.world import World
from tests import tiny

SITE_LEVEL = {
    "privacy.mode": '"site"',
    "privacy.sampling_prob": "0.6",
    "privacy.noise_multiplier": "1.0",
    "privacy.clip_norm": "0.1",
    "privacy.dp_delta": "1e-5",
    "aggregation.weighting": '"uniform"',
    "aggregation.method": '"fedsvd"',
    "federation.num_rounds": "3",
    "evaluation.every_rounds": "3",
}
AT_SITES = {"privacy.noise_at": '"sites"', "privacy.sampling_prob": "1.0"}


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """A run; with `fleet` through `server.run.run.execute` with the product's own noise."""

    def execute(changes=None, *, name="run", resume=False, is_noise_accepted=True, agents=None, **more):
        settings = privacy_cost.resolve(tiny.settings(tiny_base, {**SITE_LEVEL, **(changes or {})}))
        sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
        log = run_files.prepare(settings, tmp_path / name, resume=resume)
        shared = World(settings, engine, sites, tmp_path / name)
        if agents is None:
            outcome = run.in_process(shared, log=log, resume=resume, is_noise_accepted=is_noise_accepted, **more)
        else:
            given = {"engine": engine, "folder": shared.folder, "log": log, "resume": resume, **more}
            outcome = server_run.execute(settings, fleet=tiny.fleet(agents), is_noise_accepted=True, **given)
        return outcome, events.read(log.path)

    return execute


@pytest.fixture
def agents(engine):
    return {
        number: tiny.make_agent(site, engine, data=tiny.site_data(site, tiny.SITES[site])).answer
        for number, site in enumerate(sorted(tiny.SITES), start=1)
    }


def of(log, kind):
    return [event for event in log if event["kind"] == kind]


@pytest.mark.parametrize("changes", [{}, {**AT_SITES, "aggregation.method": '"fedavg"'}])
def test_a_run_tells_what_it_spent_and_nothing_that_no_noise_covers(play, changes):
    outcome, log = play(changes)
    plan, done = of(log, "run_started")[0], of(log, "round_finished")
    assert plan["noise_ratio"] > 10
    assert plan["noise_accepted"]
    spent = [event["epsilon"] for event in done]
    assert spent == sorted(spent)
    assert spent[-1] <= plan["epsilon_planned"][-1] + 1e-4
    trained = of(log, "site_trained")
    assert {(e["train_loss"], e["seconds"], e["update_norm"]) for e in trained} <= {(None, None, None)}
    assert plan["method"] != "fedavg" or {event["gap"] for event in done} == {None}  # a figure of single updates
    assert "each site as a whole" in plan["privacy_wording"]
    card = (outcome.folder / run_files.EXPORT_FOLDER / "README.md").read_text()
    assert f"epsilon {spent[-1]:.3f} at delta 1e-05" in card
    assert plan["privacy_wording"] in card
    assert not any(site in card for site in tiny.SITES)
    assert "spent so" in report.write(outcome.folder).read_text()
    told = status.read(outcome.folder)
    assert told["privacy"]["epsilon"] == spent[-1]
    assert told["privacy"]["wording"] == plan["privacy_wording"]


def test_few_sites_are_refused_unless_accepted_and_a_resume_needs_it_too(play, tmp_path):
    with pytest.raises(FloorRefused, match=r"noise to signal is \d+: with 1\.8 sites a round"):
        play(is_noise_accepted=False)
    assert not run_files.finished(tmp_path / "run")
    play(resume=True)
    with pytest.raises(FloorRefused, match="--i-accept"):
        play(resume=True, is_noise_accepted=False)


def test_a_study_can_be_repeated_with_its_draws(play):
    one, log = play(name="one")
    again, other = play(name="again")
    assert all(torch.equal(one.tensors[name], again.tensors[name]) for name in one.tensors)
    drawn = [[event["sites"] for event in of(told, "round_started")] for told in (log, other)]
    assert drawn[0] == drawn[1]


def test_a_round_without_any_site_is_noised_and_charged_like_every_other(play, agents):
    nobody = {"privacy.sampling_prob": "1e-4", "federation.num_rounds": "1"}
    outcome, log = play(nobody, agents=agents)
    assert of(log, "round_started")[0]["sites"] == []
    assert of(log, "round_finished")[0]["num_updates"] == 0
    assert all(tensor.abs().max() > 0 for tensor in outcome.tensors.values())  # B begins as zeros


def test_noise_of_the_product_is_never_the_same_twice(play, agents):
    one, _ = play({"federation.num_rounds": "1"}, name="one", agents=agents)
    two, _ = play({"federation.num_rounds": "1"}, name="two", agents=agents)
    assert not all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_a_resumed_run_keeps_what_was_released_and_draws_new_noise_for_what_was_not(play, agents, tmp_path):
    changes = {**AT_SITES, "privacy.noise_at": '"server"'}
    gone = []

    def leaves(frame):
        gone.append(frame)
        raise KeyboardInterrupt

    def stops_in_round_two(answer):
        from common.frame import wire

        def node(frame):
            found = wire.unpack(frame, max_body_bytes=1 << 24)
            is_second = found.kind == "train" and found.head["round_index"] == 1
            return leaves(frame) if is_second and not gone else answer(frame)

        return node

    broken = {**agents, 3: stops_in_round_two(agents[3])}
    with pytest.raises(KeyboardInterrupt):
        play(changes, agents=broken)
    folder = tmp_path / "run"
    first = (checkpoint.folder_of(folder, 1) / checkpoint.ADAPTER_FILE).read_bytes()
    shutil.copytree(folder, tmp_path / "copy")
    _, log = play(changes, agents=agents, resume=True)
    _, other = play(changes, agents=agents, resume=True, name="copy")
    assert (checkpoint.folder_of(folder, 1) / checkpoint.ADAPTER_FILE).read_bytes() == first
    hashes = [[event["adapter_sha256"] for event in of(one, "round_finished")] for one in (log, other)]
    assert [len(one) for one in hashes] == [3, 3]  # each round was released once
    assert hashes[0][0] == hashes[1][0]
    assert hashes[0][1] != hashes[1][1]  # an unreleased round has noise of its own
    plain = of(log, "run_started")[0]["epsilon_planned"]
    assert of(log, "round_finished")[-1]["epsilon"] == pytest.approx(plain[-1], abs=1e-4)


def test_a_released_round_whose_checkpoint_is_gone_or_damaged_is_not_played_again(play, tmp_path):
    play()
    newest = checkpoint.folder_of(tmp_path / "run", 3)
    (newest / checkpoint.ADAPTER_FILE).write_bytes(b"")
    with pytest.raises(PrivacyError, match="round 3 was released"):
        play(resume=True)
    assert newest.is_dir()  # where it was, so that it can be put back
    shutil.rmtree(newest)
    with pytest.raises(PrivacyError, match="round 3 was released"):
        play(resume=True)


def test_a_run_that_stopped_between_checkpoint_and_event_charges_the_round(play, tmp_path):
    play(AT_SITES)
    path = tmp_path / "run" / events.FILE
    kept = [line for line in path.read_text().splitlines() if not _is_last_round(json.loads(line))]
    path.write_text("".join(f"{line}\n" for line in kept))
    outcome, log = play(AT_SITES, resume=True)
    spent = privacy_cost.curve(privacy_cost.resolve(run_files.stored_settings(outcome.folder)))
    card = (outcome.folder / run_files.EXPORT_FOLDER / "README.md").read_text()
    shown = float(card.partition("whole sites: epsilon ")[2].partition(" ")[0])
    assert of(log, "round_finished")[-1]["epsilon"] < shown < spent[-1]  # the lost round at the quorum's minimum


def _is_last_round(event):
    return event["kind"] in ("round_finished", "run_finished") and event.get("round", 2) == 2


def test_a_round_in_which_all_drawn_sites_fail_does_not_count(play, agents):
    from common.frame import wire

    failing = {
        number: tiny.spoilt(answer, "train", lambda _: wire.pack(wire.Frame("nonsense", {})))
        for number, answer in agents.items()
    }
    with pytest.raises(TooFewSitesError, match="got 0 valid updates, 3 sites were drawn"):
        play({**AT_SITES, "privacy.noise_at": '"server"'}, agents=failing)


def test_noise_of_a_simulation_is_the_seeds(tiny_base):
    settings = tiny.settings(tiny_base, SITE_LEVEL)
    make = world.server_noise(settings.seed)
    cpu = torch.device("cpu")
    assert torch.equal(make(0).discrete(4, std=1e6, device=cpu), make(0).discrete(4, std=1e6, device=cpu))
    assert not torch.equal(make(0).discrete(4, std=1e6, device=cpu), make(1).discrete(4, std=1e6, device=cpu))
