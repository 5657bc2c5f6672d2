"""Kinds of adapters: what the table says, what a run file gets to hear, and what peft attaches."""

import pytest
import torch

from common.adapter import adapter
from common.errors import ConfigError, ModelError
from common.loss import likelihood
from common.model import base, peft_kinds
from common.run import config, trainable
from common.run.catalogue.kinds import KINDS, belongs
from common.run.rules import compatibility, rules
from common.run.rules.kinds import KIND_FEATURES
from common.run.schema import shape
from tests import tiny

# Written down from the papers: is what the model does linear in the tensors that travel?
LINEAR = {"ia3", "ln_tuning", "full", "prompt_tuning", "prefix_tuning"}
ASKING = {
    "methods beside fedavg": {"aggregation.method": "rolora"},
    "int8 base": {"model.quantization": "int8"},
    "nf4 base": {"model.quantization": "nf4"},
    "sites of different precision": {"model.site_quantization.north": "nf4"},
    "16-bit compute": {"model.dtype": "bfloat16", "model.quantization": "int8"},
    "server optimizer": {"aggregation.server_optimizer.kind": "fedavgm"},
    "stacked clipping": {**tiny.NOISED, "privacy.clipping": "stacked"},
    "opacus clipping": {**tiny.NOISED, "privacy.clipping": "opacus"},
    "checkpointing": {"training.gradient_checkpointing": "true"},
    "steps down": {"wire.down": "int8"},
    "sparse download": {"wire.down_density": "0.25"},
}
CELLS = [
    pytest.param(feature, cell, id=f"{cell.row}-{feature.name}")
    for feature, cell in compatibility.cells(KINDS, KIND_FEATURES)
]


def test_the_table_is_whole():
    assert len(CELLS) == len(KINDS) * len(KIND_FEATURES)
    assert {feature.name for feature in KIND_FEATURES if feature.keys} == set(ASKING)
    assert {name for name, kind in KINDS.items() if not kind.inexact} == LINEAR


@pytest.mark.parametrize(("feature", "cell"), [one for one in CELLS if one.values[0].keys])
def test_a_run_file_hears_of_every_refused_cell_and_of_no_other(feature, cell):
    asked = tiny.of_kind(cell.row, **ASKING[feature.name])
    if cell.is_allowed:
        broken = _broken(asked)
        assert not any(f"no {feature.name} with this kind" in text for text in broken), broken
        return
    with pytest.raises(ConfigError) as caught:
        tiny.settings("tiny", asked)
    assert f"no {feature.name} with this kind: {cell.reason}" in str(caught.value)
    assert f"adapter.kind = '{cell.nearest}'" in str(caught.value)
    assert compatibility.cell(KINDS[cell.nearest], feature, KINDS).is_allowed


def _broken(asked) -> list[str]:
    """Messages of a run file's problems; none if it is right."""
    try:
        tiny.settings("tiny", asked)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_a_private_run_of_another_kind_is_averaged_by_fedavg():
    assert tiny.settings("tiny", tiny.of_kind("ia3", **tiny.NOISED)).aggregation.method == "fedavg"
    assert tiny.settings("tiny", tiny.NOISED).aggregation.method == "fedsvd"


def test_every_kind_has_a_schema_and_a_setting_of_another_is_refused():
    table = shape.tables_of(config.RunConfig)["adapter"]
    assert set(table.variants) == set(KINDS)
    for kind in KINDS:
        for name in set(table.names) - table.variants[kind].model_fields.keys():
            with pytest.raises(ConfigError, match=rf'{name}  has no effect with kind = "{kind}"; remove it, or set'):
                tiny.settings("tiny", {"adapter.kind": kind, f"adapter.{name}": "4"})
    assert len([rule for rule in rules.RUN_RULES if rule.keys[0] == "adapter.kind"]) < 30


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_every_kind_has_its_own_tensors_all_of_them_travel_and_a_seed_gives_the_same_start(load_tiny, tiny_base, kind):
    first, again = load_tiny(tiny.of_kind(kind)), load_tiny(tiny.of_kind(kind))
    assert all(torch.equal(first.initial[name], again.initial[name]) for name in again.initial)
    assert all((belongs(kind, name) and not belongs("lora", name)) or kind == "dora" for name in first.initial)
    assert trainable.trained_specs("fedavg", first.tensor_specs, round_index=3) == first.tensor_specs
    assert trainable.received_specs("fedavg", first.tensor_specs) == first.tensor_specs
    settings = tiny.settings(tiny_base, tiny.of_kind(kind)).adapter
    with base.quiet_peft():
        counted = peft_kinds.num_parameters(tiny_base, settings)
    assert counted == adapter.num_parameters(first.tensor_specs)
    if kind not in ("prompt_tuning", "prefix_tuning", "p_tuning"):  # virtual tokens change the model from the start
        assert torch.equal(_logits(first), _logits(load_tiny()))


@torch.no_grad()
def _logits(engine):
    return engine.model.eval()(input_ids=torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (tiny.of_kind("ia3") | {"adapter.targets": '["none_such"]'}, "matches no module"),
        (tiny.of_kind("ln_tuning") | {"model.dtype": "auto"}, ""),
    ],
)
def test_what_does_not_fit_the_base_is_named(load_tiny, asked, message):
    if not message:
        assert load_tiny(asked)
        return
    with pytest.raises(ModelError, match=message):
        load_tiny(asked)


@torch.no_grad()
def test_virtual_tokens_do_not_move_the_loss_to_other_tokens(load_tiny):
    """The loss of a padded batch is that of its rows one by one, read off the last logits of each."""
    from common.text import prompts

    engine = load_tiny(tiny.of_kind("prompt_tuning"))
    rows = prompts.encode_all(tiny.rows(3), engine.tokenizer, max_length_tokens=64, too_long="error")[0]
    together, _ = likelihood.answer_nll(engine.model, prompts.collate(rows, pad_id=engine.pad_id))
    apart = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row.input_ids) :]
        told = [i for i, is_answer in enumerate(row.is_answer) if is_answer]
        apart -= float(sum(logits[i - 1].log_softmax(-1)[row.input_ids[i]] for i in told))
    assert float(together) == pytest.approx(apart, rel=1e-5)
