"""A private step of adapters that are no LoRA: one unit at a time, held against a naive loop that shares no code."""

import pytest
import torch

from client.agent.agent import SiteData
from client.train import private
from common import events
from common.adapter import adapter
from common.errors import ModelError
from common.loss import likelihood
from common.model import base
from common.privacy import noise
from server.folder import run_files
from server.run import run
from tests import tiny

KINDS = {
    "ia3": {},
    "dora": {"adapter.r": "4"},
    "prompt_tuning": {"adapter.num_virtual_tokens": "3"},
}
CLIP_NORM = 0.05


def changes(kind: str) -> dict[str, str]:
    return {"adapter.kind": kind, **KINDS[kind]}


def stirred(load_tiny, kind: str):
    """An engine whose adapter does something."""
    engine = load_tiny(changes(kind))
    generator = torch.Generator().manual_seed(1)
    moved = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in engine.initial.items()}
    adapter.write(engine.model, moved)
    engine.model.train()
    return engine


def naive(engine, rows) -> torch.Tensor:
    """Row by row without padding: each unit's gradient of its summed loss, clipped, added up. Shape (P,)."""
    own = adapter.parameters(engine.model)
    total = torch.zeros(sum(parameter.numel() for parameter in own.values()))
    for unit in sorted({row.unit for row in rows}):
        engine.model.zero_grad()
        for row in (row for row in rows if row.unit == unit):
            ids = torch.tensor([row.input_ids])
            logits = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row.input_ids) :]
            told = [i for i, is_answer in enumerate(row.is_answer) if is_answer and i]
            for i in told:
                (-logits[i - 1].log_softmax(-1)[row.input_ids[i]]).backward(retain_graph=True)
        whole = torch.cat([own[name].grad.flatten() for name in sorted(own)])
        total += whole * min(1.0, CLIP_NORM / float(whole.norm()))
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_step_is_that_of_a_naive_loop(load_tiny, kind):
    engine = stirred(load_tiny, kind)
    rows, _ = base.encode(engine, tiny.rows(7), tiny.settings("tiny").data)
    wanted = naive(engine, rows)
    with private.prepared(engine, method="auto") as (take, is_many):
        batches = ([unit] for unit in private.group(rows))
        found, norms = private.clipped_sum(
            batches, take=take, clip_norm=CLIP_NORM, num_parameters=len(wanted), device=torch.device("cpu")
        )
    found = found.float() * noise.grid_step(CLIP_NORM)
    assert not is_many
    assert len(norms) == 4
    assert float((found - wanted).norm()) < 2e-5 * float(wanted.norm())
    own = adapter.parameters(engine.model)
    unclipped = torch.autograd.grad(
        sum(likelihood.answer_nll(engine.model, _batch(engine, [row]))[0] for row in rows),
        [own[name] for name in sorted(own)],
    )
    raw = torch.cat([one.flatten() for one in unclipped])
    assert float((found - raw).norm()) > 0.1 * float(raw.norm())  # control: clipping does something here


def _batch(engine, rows):
    from common.text import prompts

    return prompts.collate(rows, pad_id=engine.pad_id)


def test_stacked_clipping_refuses_what_is_no_lora_and_auto_takes_one_unit_at_a_time(load_tiny):
    engine = load_tiny(changes("dora"))
    with pytest.raises(ModelError, match="stacked"), private.prepared(engine, method="stacked"):
        pass
    with private.prepared(engine, method="auto") as (_, is_many):
        assert not is_many


def test_a_whole_private_run_of_another_kind_moves_its_adapter_and_tells_no_loss(load_tiny, tiny_base, tmp_path):
    given = {
        **changes("ia3"),
        **tiny.NOISED,
        "privacy.sampling_prob": "0.5",
        "federation.num_rounds": "1",
        "federation.num_sites": "2",
    }
    settings, engine = tiny.settings(tiny_base, given), load_tiny(given)
    sites = {1: ("north", tiny.rows(12)), 2: ("south", tiny.rows(12, site="south"))}
    nodes = {
        number: tiny.make_agent(name, engine, data=SiteData(rows[:8], rows[8:])).answer
        for number, (name, rows) in sites.items()
    }
    log = run_files.prepare(settings, tmp_path)
    outcome = run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=tmp_path, log=log)
    assert any(not torch.equal(outcome.tensors[name], engine.initial[name]) for name in engine.initial)
    trained = [event for event in events.read(tmp_path / events.FILE) if event["kind"] == "site_trained"]
    assert [event["train_loss"] for event in trained] == [None, None]
