"""An adapter that no training could have made of the last one is refused, whatever its norms and ranks.

Names carry the numbers of the attack table. Each case has a control: without the bound the adapter is taken.
"""

import dataclasses
import math

import pytest
import torch

from client.agent import moves, probes
from client.agent.agent import SiteData
from client.agent.guard import Permissive
from client.agent.moves import FOLDER, Seen
from common.adapter import adapter, start
from common.data.rows import Message
from common.model import base
from common.model.base import initial_of
from common.run import trainable
from server.aggregate.methods import fedsvd, flexlora
from server.fleet import broadcast
from tests import tiny

POLICY = "PolicyRefusedError"
RULE = (POLICY, "train.max_move")


def crafted(site, run, *, size: float = 5.0) -> dict[str, torch.Tensor]:
    """Full ranks and norms far below the limit: a switch of large values in the up-projections."""
    generator = torch.Generator().manual_seed(1)
    begun = start.initial(run, initial_of(site.engine, run.run))
    made = {
        name: t + size * torch.randn(t.shape, generator=generator) if "lora_B" in name else t
        for name, t in begun.items()
    }
    probes.check(made, max_tensor_norm=905.0)  # the control: norms and ranks tell nothing
    return made


def nudged(state, size: float) -> dict[str, torch.Tensor]:
    return {name: t + size if "lora_B" in name else t for name, t in state.items()}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a31_a_first_adapter_that_the_seed_does_not_give(open_site, kind):
    run = open_site.manifest()
    assert open_site.refused(open_site.step(kind, state=crafted(open_site, run))) == RULE
    assert open_site.refused(open_site.step(kind, state=nudged(open_site.engine.initial, 1e-3))) == RULE
    assert open_site.step(kind).kind in ("update", "metrics")


def test_a31_control_without_a_guard_a_crafted_adapter_is_trained_on(open_site):
    made = crafted(open_site, open_site.manifest())
    open_site.agent._guard = Permissive()
    assert open_site.step(state=made).kind == "update"


def test_a31_an_adapter_that_moved_farther_than_a_round_could_move_it(open_site):
    run = open_site.manifest().run
    bound = moves.site_move(0, run=run, num_steps=3)
    assert open_site.step("evaluate").kind == "metrics"
    assert open_site.step().kind == "update"
    far, near = (nudged(open_site.engine.initial, factor * bound) for factor in (4.5, 0.5))
    assert open_site.refused(open_site.step("evaluate", round_index=1, state=far)) == RULE
    assert open_site.step("evaluate", round_index=1, state=near).kind == "metrics"
    other = nudged(open_site.engine.initial, 0.6 * bound)
    assert open_site.refused(open_site.step(round_index=1, state=other)) == RULE  # scored and trained are one adapter
    open_site.start()  # another process knows it from the disk
    assert open_site.open(approve=False).kind == "opened"
    assert open_site.refused(open_site.step(round_index=1, state=other)) == RULE
    assert open_site.step(round_index=1, state=near).kind == "update"


def test_a31_where_the_last_adapter_is_lost_the_start_bounds_the_next(open_site):
    bound = moves.site_move(0, run=open_site.manifest().run, num_steps=3)
    assert open_site.step().kind == "update"
    next((open_site.folder / FOLDER).iterdir()).write_bytes(b"spoilt")
    open_site.start()
    assert open_site.open(approve=False).kind == "opened"
    far, near = (nudged(open_site.engine.initial, factor * bound) for factor in (4.5, 0.5))
    assert open_site.refused(open_site.step("evaluate", round_index=1, state=far)) == RULE
    assert open_site.step("evaluate", round_index=1, state=near).kind == "metrics"


def test_the_engine_of_another_seed_gives_the_start_of_the_runs_own(engine):
    assert all(torch.equal(t, engine.initial[name]) for name, t in initial_of(engine, tiny.settings("tiny")).items())
    other = initial_of(engine, tiny.settings("tiny", {"seed": "6"}))
    assert any(not torch.equal(t, engine.initial[name]) for name, t in other.items())


def test_the_constant_bounds_adamw_whatever_the_gradients_are():
    """Against torch's own AdamW, on gradients that grow, vanish and turn; the bound is reached at the first step."""
    generator = torch.Generator().manual_seed(2)
    for beta1, beta2 in ((0.9, 0.999), (0.5, 0.9), (0.99, 0.95)):
        grown = torch.tensor([2.0**n for n in range(1, 41)])
        columns = [torch.ones(40), grown, 1 / grown, torch.randn(40, generator=generator).exp()]
        value = torch.zeros(len(columns), requires_grad=True)
        optimizer = torch.optim.AdamW([value], lr=1.0, betas=(beta1, beta2), eps=0.0, weight_decay=0.0)
        shares = []
        for step, gradient in enumerate(torch.stack(columns, dim=1), start=1):
            before = value.detach().clone()
            value.grad = gradient
            optimizer.step()
            moved = float((value.detach() - before).abs().max())
            shares.append(moved / moves.adam_constant(step, beta1=beta1, beta2=beta2))
        assert shares[0] == pytest.approx(1.0, abs=1e-5)
        assert max(shares) <= 1 + 1e-5


@pytest.mark.parametrize("method", ["fedsvd", "flexlora"])
def test_a_method_that_turns_the_factors_is_bounded_by_the_product(site, method):
    """What the coordinator's own code makes of updates within the bound passes, and four times as much does not."""
    run = site.manifest(aggregation__method=f'"{method}"').run
    rules = site.gate.policy
    generator = torch.Generator().manual_seed(3)
    manifest = site.manifest(aggregation__method=f'"{method}"')
    state = start.initial(manifest, initial_of(site.engine, run))
    server = {"fedsvd": fedsvd, "flexlora": flexlora}[method]
    trained = [name for name in state if method == "flexlora" or "lora_B" in name]
    for index in range(2):
        move = moves.site_move(index, run=run, num_steps=3)
        updates = [
            {name: move * torch.sign(torch.randn(state[name].shape, generator=generator)) for name in trained}
            for _ in range(2)
        ]

        def after(size: float, state=state, updates=updates) -> dict[str, torch.Tensor]:
            combined = server.start(state, trained=trained)
            for update in updates:
                combined.add({name: size * t for name, t in update.items()}, weight=1.0)
            return server.apply(state, combined.result())

        last = Seen(index, state)
        moves.check_step(run, last, Seen(index + 1, after(1.0)), num_steps=3, rules=rules)
        with pytest.raises(moves.PolicyRefusedError, match=r"train\.max_move: the product of"):
            moves.check_step(run, last, Seen(index + 1, after(40.0)), num_steps=3, rules=rules)
        state = after(1.0)


@pytest.mark.parametrize(("method", "down"), [("rolora", "int4"), ("fedavg", "int3")])
def test_what_rounding_left_out_of_a_step_may_come_later_even_of_a_factor_that_is_not_trained(site, method, down):
    """Every value moves as far as training can move it, at a site that allows no more; the last round's rate is low."""
    changes = {"aggregation__method": f'"{method}"', "wire__down": f'"{down}"', "training__schedule": '"linear"'}
    run = site.manifest(**changes, federation__num_rounds="6", training__final_rate_fraction="0.0").run
    strict = site.gate.policy.model_copy(update={"train": site.gate.policy.train.model_copy(update={"max_move": 1.0})})
    generator = torch.Generator().manual_seed(3)
    state, memory, late = dict(site.engine.initial), {}, []
    for index in range(6):
        move = moves.site_move(index, run=run, num_steps=3)
        trained = trainable.sent_names(method, site.engine.tensor_specs, round_index=index)
        size = {name: move * torch.rand(t.shape, generator=generator) for name, t in state.items()}
        wanted = {name: t + size[name] if name in trained else t for name, t in state.items()}
        after, memory, _ = broadcast.settle(state, wanted, memory, sent=site.engine.tensor_specs, dtype=down)
        moves.check_step(run, Seen(index, state), Seen(index + 1, after), num_steps=3, rules=strict)
        late += [float((after[name] - state[name]).abs().max()) for name in state if name not in trained]
        far = {name: t + 4 * move * (name in trained) for name, t in state.items()}
        if method == "fedavg":
            with pytest.raises(moves.PolicyRefusedError, match=r"train\.max_move"):  # the control
                moves.check_step(run, Seen(index, state), Seen(index + 1, far), num_steps=3, rules=strict)
        state = after
    assert (max(late, default=0.0) > 1e-3 * move) == (method == "rolora")


def test_fedsvds_rows_must_be_orthonormal(site):
    run = site.manifest(aggregation__method='"fedsvd"')
    state = start.initial(run, initial_of(site.engine, run.run))
    longer = {name: 1.5 * t if "lora_A" in name else t for name, t in state.items()}
    moves.check_step(run.run, Seen(0, state), Seen(0, state), num_steps=3, rules=site.gate.policy)
    with pytest.raises(moves.PolicyRefusedError, match="orthonormal"):
        moves.check_step(run.run, Seen(0, state), Seen(0, longer), num_steps=3, rules=site.gate.policy)


def test_a_polished_adapter_may_move_by_as_much_as_all_rounds_could(site):
    run = site.manifest().run
    whole = math.fsum(moves.site_move(index, run=run, num_steps=3) for index in range(2))
    state, rules = site.engine.initial, site.gate.policy
    moves.check_step(run, Seen(2, state), Seen(3, nudged(state, 3.9 * whole)), num_steps=3, rules=rules)
    with pytest.raises(moves.PolicyRefusedError):
        moves.check_step(run, Seen(2, state), Seen(3, nudged(state, 4.1 * whole)), num_steps=3, rules=rules)


def test_honest_rounds_of_two_sites_pass_each_others_bounds(make, engine):
    """Real training, mean and next adapter at a site with a guard; how near to the bound it comes."""
    from server.aggregate import mean

    sites = [make(name="north", count=12), make(name="south", count=16)]
    run = sites[0].manifest()
    state = dict(engine.initial)
    for site in sites:
        assert site.open(run).kind == "opened"
    for index in range(2):
        combined = mean.start(state, trained=list(state))
        for site in sites:
            assert site.step("evaluate", run=run, state=state, round_index=index).kind == "metrics"
            answer = site.step(run=run, state=state, round_index=index)
            assert answer.kind == "update"
            combined.add(adapter.decode(answer.body, run.tensor_specs, dtype="float32"), weight=1.0)
        after = mean.add(state, combined.result())
        moved = max(float((after[name] - state[name]).abs().max()) for name in state)
        assert 0.1 < moved / moves.site_move(index, run=run.run, num_steps=3) < 1.5
        state = after


def test_a31_an_update_that_speaks_of_one_row(make, engine):
    """An adapter that knows all rows but one gives an update of this one alone; no norm, rank or step tells."""
    rare = dataclasses.replace(
        tiny.row(2), messages=(Message("user", "patient Ada: code?"), Message("assistant", "QZX 77"))
    )
    common_rows = [dataclasses.replace(tiny.row(0), row_id=f"row {n}", unit=f"u{n}") for n in range(40)]
    data = {"rare": SiteData([*common_rows[:39], rare], tiny.rows(4)), "common": SiteData(common_rows, tiny.rows(4))}
    steps = {"training__local_epochs": "0.0", "training__local_steps": "10", "training__schedule": '"constant"'}
    site = make(min_local_steps="3\nmin_spread = 0.3")
    site.data = data["common"]
    learnt = {"training__learning_rate": "1e-2", **steps, "training__local_steps": "60"}
    free = Permissive()
    guard, site.agent._guard = site.agent._guard, free
    warm = site.manifest(**learnt)
    assert site.open(warm, approve=False).kind == "opened"
    answer = site.step(run=warm)
    update = adapter.decode(answer.body, warm.tensor_specs, dtype="float32")
    state = {name: t + update[name] for name, t in engine.initial.items()}
    run = site.manifest(training__learning_rate="1e-3", **steps)
    outcomes = {}
    for name in ("rare", "common"):
        site.data, site.agent._run = data[name], None
        site.agent._guard = free
        assert site.open(run, approve=False).kind == "opened"
        outcomes[name, "free"] = site.step(run=run, state=state)
        site.agent._guard = SpreadOnly(guard)
        outcomes[name, "guard"] = site.step(run=run, state=state)
    assert [outcomes[name, "free"].kind for name in ("rare", "common")] == ["update"] * 2
    assert outcomes["rare", "guard"].head["code"] == POLICY  # the control is `free`, which sent both
    assert "train.min_spread" in str(site.errors[0])
    assert outcomes["common", "guard"].kind == "update"


class SpreadOnly(Permissive):
    """The real guard's look at the gradients, without its bound on the adapter, which would refuse this one before."""

    def __init__(self, guard) -> None:
        self.after_training = guard.after_training
        self.watches_rows = guard.watches_rows


MODULE = "model.layers.0.self_attn.q_proj"


def asking_one_row(engine, rows, rare: int) -> dict[str, torch.Tensor]:
    """The start, but for one direction of one module: what sets one row's tokens apart from those of all others."""
    encoded, _ = base.encode(engine, rows, tiny.settings("tiny").data)
    seen = []
    layer = next(m for name, m in engine.model.named_modules() if name.endswith(f"{MODULE}.lora_A.default"))
    handle = layer.register_forward_hook(lambda _, given, __: seen.append(given[0][0, 4:].double()))
    adapter.write(engine.model, engine.initial)
    with torch.no_grad():
        for row in encoded:
            engine.model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    others_ni = torch.cat([tokens for place, tokens in enumerate(seen) if place != rare])
    spread_ii = others_ni.T @ others_ni / len(others_ni) + 1e-6 * torch.eye(others_ni.shape[1])
    apart_in = torch.linalg.solve(spread_ii, seen[rare].T)
    token = int((seen[rare].T * apart_in).sum(dim=0).argmax())
    made = {name: tensor.clone() for name, tensor in engine.initial.items()}
    factor = next(tensor for name, tensor in made.items() if f"{MODULE}.lora_A" in name)
    factor[0] = (apart_in[:, token] / apart_in[:, token].norm() * factor[0].double().norm()).float()
    return made


def test_a31_an_adapter_that_asks_what_one_row_alone_answers(make, engine):
    """Its norms are those of the start and its rank is full; of 40 rows one answers to one of its directions."""
    rare = dataclasses.replace(
        tiny.row(2), messages=(Message("user", "patient Ada Zxqv: code?"), Message("assistant", "QZX 77 WVU"))
    )
    rows = [dataclasses.replace(tiny.row(0), row_id=f"row {n}", unit=f"u{n}") for n in range(39)] + [rare]
    site = make(min_local_steps="3\nmin_spread = 0.0")
    site.data = SiteData(rows, tiny.rows(4))
    made = asking_one_row(engine, rows, 39)
    probes.check(made, max_tensor_norm=905.0)
    guard = site.agent._guard
    run = site.manifest(training__learning_rate="1e-3", training__schedule='"constant"')
    site.agent._guard = Permissive()
    assert site.open(run, approve=False).kind == "opened"
    assert site.step(run=run, state=made).kind == "update"  # the control
    site.agent._guard = SpreadOnly(guard)
    assert site.step(run=run, state=made).head["code"] == POLICY
    assert f"a direction of base_model.model.{MODULE} answers to a share of 0.0" in str(site.errors[-1])
    assert site.step(run=run).kind == "update"  # and the start itself passes


def test_what_is_watched_changes_no_bit(make, engine):
    site = make(min_local_steps="3")
    site.data = SiteData(tiny.rows(12), tiny.rows(4))
    run = site.manifest()
    assert site.open(run).kind == "opened"
    watched = site.step(run=run).body
    site.agent._guard = Permissive()
    assert site.step(run=run).body == watched
