"""What a site answers to a server that keeps to the protocol."""

import weakref

import pytest
import torch

from client.agent.agent import Agent
from client.train import loop, schedule
from common.adapter import adapter
from common.errors import RemoteError
from common.frame import wire
from common.frame.records import OpenedHead, RoundPlan, SiteMetrics, UpdateHead, from_head, to_head
from common.frame.wire import Frame
from common.model import base
from common.privacy.noise import SeededNoise
from common.run.manifest import RunManifest
from tests import tiny

MAX = 1 << 24


@pytest.fixture
def manifest(engine, tiny_base):
    changes = {"evaluation.exact_match_rows": "2", "evaluation.max_new_tokens": "3"}
    return RunManifest(tiny.settings(tiny_base, changes), engine.base_sha256, engine.tensor_specs)


@pytest.fixture
def agent(engine):
    return tiny.make_agent("north", engine)


def ask(agent, kind: str, answer_kind: str, *, head=None, body: bytes = b"") -> Frame:
    return wire.expect(agent.answer(wire.pack(Frame(kind, head or {}, body))), answer_kind, max_body_bytes=MAX)


def opened(agent, manifest) -> OpenedHead:
    return from_head(OpenedHead, ask(agent, "open", "opened", body=manifest.to_bytes()).head)


def play(agent, manifest, state, kind="train", answer_kind="update", **plan) -> Frame:
    head = to_head(RoundPlan(manifest.sha256, **{"round_index": 0, **plan}))
    return ask(agent, kind, answer_kind, head=head, body=adapter.encode(state, dtype="float32"))


def delta_of(frame: Frame, manifest) -> dict[str, torch.Tensor]:
    return adapter.decode(frame.body, manifest.tensor_specs, dtype="float32")


def test_opening_a_run_tells_counts_only(agent, manifest):
    found = opened(agent, manifest)
    start = adapter.digest(agent._run.start.tensors)
    assert found == OpenedHead("north", manifest.sha256, 9, 3, 0, 0, 3, adapter_sha256=start)


def test_a_run_that_is_open_is_not_prepared_again(engine, manifest):
    loads = []

    def load_data(asked: RunManifest):
        loads.append(asked.sha256)
        return tiny.site_data("north", 12)

    agent = Agent("north", load_data=load_data, load_engine=lambda _: engine, report=print)
    for _ in range(3):
        opened(agent, manifest)
    assert loads == [manifest.sha256]


def test_an_update_is_what_local_training_changed(agent, manifest, engine):
    opened(agent, manifest)
    frame = play(agent, manifest, engine.initial)
    head = from_head(UpdateHead, frame.head)
    assert (head.site, head.run_sha256, head.round_index) == ("north", manifest.sha256, 0)
    assert (head.num_examples, head.num_steps) == (9, 3)

    adapter.write(engine.model, engine.initial)
    train, _ = base.encode(engine, tiny.site_data("north", 12).train, manifest.run.data)
    seed = schedule.derive_seed(5, "north")
    told = loop.train(
        engine,
        train,
        training=manifest.run.training,
        privacy=manifest.run.privacy,
        round_index=0,
        num_rounds=2,
        seed=seed,
        source=SeededNoise(0),
    )
    after = adapter.read(engine.model)
    delta = delta_of(frame, manifest)
    assert all(torch.equal(delta[name], after[name] - engine.initial[name]) for name in after)
    assert (head.train_loss, head.num_tokens) == (told.train_loss, told.num_tokens)


def test_an_answer_depends_on_the_request_and_not_on_what_was_asked_before(agent, manifest, engine):
    opened(agent, manifest)
    first = play(agent, manifest, engine.initial)
    stirred = {name: tensor + 0.1 for name, tensor in engine.initial.items()}
    play(agent, manifest, stirred, kind="evaluate", answer_kind="metrics")
    play(agent, manifest, stirred, round_index=1)
    assert play(agent, manifest, engine.initial).body == first.body


def test_two_sites_on_one_base_do_not_disturb_each_other(manifest, engine):
    alone = tiny.make_agent("north", engine)
    opened(alone, manifest)
    expected = play(alone, manifest, engine.initial).body
    both = [tiny.make_agent(site, engine) for site in ("north", "south")]
    for agent in both:
        opened(agent, manifest)
    bodies = [play(agent, manifest, engine.initial).body for agent in (both[1], both[0])]
    assert bodies[1] == expected
    assert bodies[0] != expected


def test_the_next_round_gives_another_update(agent, manifest, engine):
    opened(agent, manifest)
    bodies = [play(agent, manifest, engine.initial, round_index=number).body for number in (0, 1)]
    assert bodies[0] != bodies[1]


def test_updates_travel_in_the_runs_dtype(agent, engine, tiny_base):
    small = RunManifest(tiny.settings(tiny_base, {"wire.dtype": '"bfloat16"'}), engine.base_sha256, engine.tensor_specs)
    opened(agent, small)
    frame = play(agent, small, engine.initial)
    found = adapter.decode(frame.body, small.tensor_specs, dtype="bfloat16")
    assert any(bool(tensor.any()) for tensor in found.values())


def test_evaluation_scores_the_adapter_that_came_on_held_out_rows(agent, manifest, engine):
    opened(agent, manifest)
    found = [
        from_head(SiteMetrics, play(agent, manifest, state, "evaluate", "metrics", round_index=2).head)
        for state in (engine.initial, {name: tensor + 0.1 for name, tensor in engine.initial.items()})
    ]
    assert [m.num_rows for m in found] == [3, 3]
    assert found[0].nll_sum != found[1].nll_sum
    assert (found[0].num_generated, found[0].num_exact) == (0, 0)


def test_answers_are_generated_only_where_the_plan_asks(agent, manifest, engine):
    opened(agent, manifest)
    frame = play(agent, manifest, engine.initial, "evaluate", "metrics", generate=True)
    assert from_head(SiteMetrics, frame.head).num_generated == 2  # evaluation.exact_match_rows


def test_rows_over_the_limit_are_cut_or_left_out_and_told(engine, tiny_base):
    changes = {"data.max_length_tokens": "29", "data.too_long": '"drop"'}
    run = RunManifest(tiny.settings(tiny_base, changes), engine.base_sha256, engine.tensor_specs)
    found = opened(tiny.make_agent("north", engine, count=40), run)
    assert found.num_dropped > 0
    assert found.num_examples + found.num_held_out + found.num_dropped == 40


def test_a_second_run_takes_the_place_of_the_first(agent, manifest, engine, tiny_base):
    other = RunManifest(tiny.settings(tiny_base, {"seed": "6"}), engine.base_sha256, engine.tensor_specs)
    opened(agent, manifest)
    assert opened(agent, other).run_sha256 == other.sha256
    play(agent, other, engine.initial)
    opened(agent, manifest)
    play(agent, manifest, engine.initial)


def test_the_base_of_the_run_before_is_let_go_before_the_next_is_loaded(load_tiny, manifest, tiny_base):
    loaded: list[weakref.ref] = []
    still_held = []

    def load(_: RunManifest):
        still_held.append([ref() is not None for ref in loaded])
        engine = load_tiny()
        loaded.append(weakref.ref(engine.model))
        return engine

    agent = Agent("north", load_data=lambda _: tiny.site_data("north", 12), load_engine=load, report=print)
    other = RunManifest(tiny.settings(tiny_base, {"seed": "6"}), manifest.base_sha256, manifest.tensor_specs)
    opened(agent, manifest)
    opened(agent, other)
    assert still_held == [[], [False]]


def test_two_runs_take_turns_at_a_site_and_neither_notices_the_other(engine, tiny_base):
    def run_of(seed: int) -> RunManifest:
        return RunManifest(tiny.settings(tiny_base, {"seed": str(seed)}), engine.base_sha256, engine.tensor_specs)

    first, second, stranger = (run_of(seed) for seed in (5, 6, 7))
    alone = tiny.make_agent("north", engine)
    opened(alone, first)
    expected = [play(alone, first, engine.initial, round_index=number).body for number in (0, 1)]
    agent = tiny.make_agent("north", engine)
    opened(agent, first)
    found = [play(agent, first, engine.initial, round_index=0).body]
    opened(agent, second)
    other = play(agent, second, engine.initial, round_index=0)
    found.append(play(agent, first, engine.initial, round_index=1).body)
    assert found == expected
    assert from_head(UpdateHead, other.head).run_sha256 == second.sha256
    assert other.body != expected[0]
    with pytest.raises(RemoteError, match="ProtocolError"):  # control
        play(agent, stranger, engine.initial)


def test_of_many_runs_the_one_that_was_idle_for_longest_must_be_offered_anew(engine, tiny_base, manifest):
    agent = tiny.make_agent("north", engine)

    def open_others(seeds: range) -> None:
        for seed in seeds:
            run = tiny.settings(tiny_base, {"seed": str(seed)})
            opened(agent, RunManifest(run, engine.base_sha256, engine.tensor_specs))

    opened(agent, manifest)
    open_others(range(100, 103))
    assert play(agent, manifest, engine.initial, "evaluate", "metrics")  # control
    open_others(range(103, 107))
    with pytest.raises(RemoteError, match="ProtocolError"):
        play(agent, manifest, engine.initial, "evaluate", "metrics")
