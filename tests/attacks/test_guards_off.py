"""Controls of the attack table: what a site with a policy refuses, an agent without one does.

So it is the guard that refuses in `test_agent.py`, `test_rounds.py` and `test_heads.py`, and nothing else.
"""

import dataclasses

import pytest

from client.agent.agent import Agent
from client.agent.guard import Permissive
from common.frame.wire import Frame
from common.run.manifest import Offer
from tests.samples import vault

CANARY = "patient Ada Lovelace has a rare disease"
LONE = {"federation__min_sites": "1", "federation__num_sites": "1"}
OFFERS = {
    "a02 unsigned": lambda site: Frame("open", body=site.manifest().to_bytes()),
    "a02 a stranger's": lambda site: site.offer(key=vault.STRANGER).to_frame(),
    "a02 another federation's": lambda site: site.offer(federation="other").to_frame(),
    "a02 altered after signing": lambda site: Offer(
        site.manifest(training__learning_rate="3e-2").to_bytes(), site.offer().signature
    ).to_frame(),
    "a02 for a hundred years": lambda site: site.offer(days=36_500).to_frame(),
    "a02 past its date": lambda site: site.offer(days=-2).to_frame(),
    "a03 nobody approved, a07 neither noise nor secure sum": lambda site: site.offer().to_frame(),
    "a08 cohort of one": lambda site: site.offer(site.manifest(**LONE)).to_frame(),
    "a12 rate near 0": lambda site: site.offer(site.manifest(training__learning_rate="1e-9")).to_frame(),
    "a12 rate too high": lambda site: site.offer(site.manifest(training__learning_rate="5.0")).to_frame(),
    "a12 one step": lambda site: site.offer(
        site.manifest(training__local_steps="1", training__local_epochs="0.0")
    ).to_frame(),
    "a12 tiny batch": lambda site: site.offer(site.manifest(training__batch_size="1")).to_frame(),
    "a12 warm-up": lambda site: site.offer(site.manifest(training__warmup_fraction="0.9")).to_frame(),
    "a12 optimiser": lambda site: site.offer(site.manifest(training__optimizer__kind='"sgd"')).to_frame(),
    "a12 rounds": lambda site: site.offer(site.manifest(federation__num_rounds="5")).to_frame(),
    "a12 length": lambda site: site.offer(site.manifest(data__max_length_tokens="128")).to_frame(),
    "a12 method": lambda site: site.offer(site.manifest(aggregation__method='"ffa"')).to_frame(),
    "a22 system text": lambda site: site.offer(site.manifest(data__system_prompt='"Repeat the note."')).to_frame(),
    "a22 template": lambda site: site.offer(site.manifest(model__chat_template='"alpaca"')).to_frame(),
}


@pytest.fixture
def unguarded(site):
    """A site whose guard is that of simulations."""
    site.agent = Agent(
        site.name,
        load_data=lambda _: site.data,
        load_engine=lambda _: site.engine,
        report=lambda reference, error: site.errors.append(error),
        guard=Permissive(),
    )
    return site


@pytest.fixture
def taking_part(unguarded):
    assert unguarded.ask(unguarded.offer().to_frame()).kind == "opened"
    return unguarded


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_control_an_offer_that_a_policy_refuses_is_opened_without_one(unguarded, offer):
    assert unguarded.ask(offer(unguarded)).kind == "opened"


def test_control_a14_any_number_of_runs_is_opened(unguarded):
    offers = [unguarded.offer(unguarded.manifest(seed=str(seed))).to_frame() for seed in range(4)]
    assert [unguarded.ask(offer).kind for offer in offers] == ["opened"] * 4


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("lora_B", lambda tensor: tensor + 500.0),
        ("lora_A", lambda tensor: tensor[:1].expand_as(tensor).clone()),
    ],
    ids=["huge", "one row"],
)
def test_control_a15_an_adapter_that_reads_rows_is_trained_on(taking_part, part, change):
    state = {name: change(t) if part in name else t for name, t in taking_part.engine.initial.items()}
    assert taking_part.step(state=state).kind == "update"


def test_control_a13_a_round_is_played_again_with_another_adapter_and_out_of_order(taking_part):
    other = {name: tensor + 0.01 for name, tensor in taking_part.engine.initial.items()}
    first, second = taking_part.step(round_index=1), taking_part.step(round_index=1, state=other)
    assert (first.kind, second.kind, first.body == second.body) == ("update", "update", False)
    assert taking_part.step(round_index=0).kind == "update"


def test_control_a20_text_in_a_reply_leaves(taking_part):
    honest = taking_part.agent._steps["train"]

    def telling(request: Frame) -> Frame:
        reply = honest(request)
        return dataclasses.replace(reply, head={**reply.head, "note": CANARY})

    taking_part.agent._steps["train"] = telling
    assert taking_part.step().head["note"] == CANARY


def test_control_a21_figures_of_a_few_rows_leave_as_they_are(taking_part):
    head = taking_part.step("evaluate").head
    assert head["num_rows"] == 3
    assert head["nll_sum"] != round(head["nll_sum"], 6)


def test_control_a_coordinator_that_tells_of_no_log_gets_an_update(taking_part):
    assert taking_part.step(heads=[]).kind == "update"
