"""Tables `[[polish]]`: defaults of each kind, what has no effect, and on which line a mistake stands."""

import json

import pytest

from common.errors import ConfigError
from common.run import config
from common.run.manifest import public_part
from common.run.problems import locate
from common.run.schema import shape
from common.run.schema.polish import AnyStage

MINIMAL = 'version = 1\n[model]\nbase = "embedded"\n[privacy]\nmode = "none"\n'  # five lines
KINDS = shape.tables_of(config.RunConfig)["polish"].variants
NEEDED = {"grpo": {"reward": "exact"}, "rloo": {"reward_stage": "judge"}}


def table(**settings: object) -> str:
    stage = {"name": "align", "kind": "dpo", "data": "x", **settings}
    return "[[polish]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in stage.items())


def parse(*tables: str, overrides: dict[str, str] | None = None) -> tuple[AnyStage, ...]:
    return config.parse(MINIMAL + "".join(tables), name="run.toml", overrides=overrides or {}).polish


def problems(*tables: str, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*tables, overrides=overrides)
    return str(caught.value)


def test_stages_keep_their_order_and_get_their_kind_s_defaults():
    first, second = parse(table(name="teach", kind="sft"), table())
    assert (first.name, first.learning_rate, first.epochs, first.held_to) == ("teach", 1e-4, 1.0, "")
    assert (second.learning_rate, second.beta, second.loss, second.held_to) == (1e-5, 0.1, "sigmoid", "start")
    assert parse(table(steps=5))[0].epochs == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_asked_for_and_its_resolved_form_is_the_same_run(kind: str):
    judge = table(name="judge", kind="reward")
    text = MINIMAL + (judge if kind == "rloo" else "") + table(kind=kind, **NEEDED.get(kind, {}))
    run = config.parse(text, name="run.toml")
    assert config.RunConfig.model_validate(json.loads(config.resolved_json(run))) == run
    assert run.polish[-1].learning_rate > 0


OF_KINDS = {name for kind in KINDS.values() for name in kind.model_fields} - KINDS["cpt"].model_fields.keys()


@pytest.mark.parametrize("name", sorted(OF_KINDS))
def test_a_setting_of_another_kind_is_refused_where_it_stands(name: str):
    kind = next(kind for kind in ("cpt", "dpo") if name not in KINDS[kind].model_fields)
    taker = next(kind for kind, own in KINDS.items() if name in own.model_fields)
    message = problems(table(name="first"), table(kind=kind, **{name: 1}))
    assert f'polish.2.{name}  has no effect with kind = "{kind}"; remove it, or set polish.2.kind to ' in message
    assert f'"{taker}"' in message
    assert message.endswith("\n    run.toml:14")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 5, "epochs": 1.0}, "set either steps or epochs"),
        ({"epochs": 0.0}, "set either steps or epochs"),
        ({"micro_batch_size": 3}, "micro_batch_size must divide batch_size"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "no effect with loss 'ipo'"),
        ({"loss": "robust"}, "loss 'robust' with no label_smoothing is 'sigmoid'"),
        ({"kind": "kto", "micro_batch_size": 1}, "kto needs a micro_batch_size of 2"),
        ({"kind": "kto", "desirable_weight": 0.0, "undesirable_weight": 0.0}, "with both weights 0"),
        ({"kind": "grpo", "reward": "json"}, "json_schema belong together"),
        ({"kind": "grpo", "reward": "regex"}, "pattern belong together"),
        ({"kind": "grpo", "reward": "exact", "test_timeout_s": 3.0}, "test_timeout_s is for reward 'unit_test'"),
        ({"kind": "grpo", "reward": "exact", "reference": "base"}, "no effect while beta is 0"),
        ({"kind": "grpo", "reward": "exact", "num_generations": 5}, "num_generations must divide batch_size"),
    ],
)
def test_contradictions_within_a_stage_are_refused_at_its_table(settings: dict, told: str):
    message = problems(table(name="first"), table(**settings))
    assert "polish.2  stage 'align': " in message
    assert told in message
    assert "you wrote" not in message
    assert message.endswith("\n    run.toml:10")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"beta": 0.0}, "beta  must be greater than 0"),
        ({"learning_rate": 0.0}, "learning_rate  must be greater than 0"),
        ({"kind": "grpo"}, "reward  must be set"),
        ({"kind": "grpo", "reward": "right"}, 'reward  must be "exact", "json", "regex" or "unit_test"'),
        ({"kind": "grpo", "reward": "exact", "num_generations": 1}, "num_generations  must be at least 2"),
        ({"kind": "grpo", "reward": "exact", "temperature": 0.0}, "temperature  must be greater than 0"),
        ({"kind": "grpo", "reward": "exact", "max_new_tokens": 0}, "max_new_tokens  must be at least 1"),
        ({"kind": "grpo", "reward": "exact", "too_long": "truncate"}, 'too_long  must be "drop" or "error"'),
        ({"kind": "rloo"}, "reward_stage  must be set"),
    ],
)
def test_values_that_a_kind_cannot_have_are_refused_at_their_line(settings: dict, told: str):
    assert f"1 problem in run.toml\n  polish.2.{told}" in problems(table(name="first"), table(**settings))


def test_names_and_order_are_checked():
    assert "two stages are called 'align'" in problems(table(), table())
    asking = table(name="ask", kind="rloo", reward_stage="judge")
    assert "move the stage up" in problems(asking, table(name="judge", kind="reward"))
    assert "no stage of kind 'reward' called 'judge'" in problems(table(name="judge"), asking)
    assert len(parse(table(name="judge", kind="reward"), asking)) == 2


def test_unknown_keys_and_other_forms_lead_to_the_right_one():
    assert "polish.1.betta  unknown setting; did you mean beta?\n    run.toml:10" in problems(table(betta=1))
    assert "must be an array of tables, [[polish]]" in problems('[polish]\nname = "x"\n')


def test_overrides_name_a_stage_by_its_number():
    assert parse(table(), table(name="next"), overrides={"polish.2.steps": "7"})[1].steps == 7
    assert "[[polish]] has 1 tables, counted from 1" in problems(table(), overrides={"polish.2.steps": "7"})
    gate = '[[gate.rules]]\nkind = "loss"\n'
    assert "[[gate.rules]] has 1 tables, counted from 1" in problems(gate, overrides={"gate.rules.2.min_gain": "1"})
    assert config.parse(MINIMAL + gate, name="r", overrides={"gate.rules.1.min_gain": "1"}).gate.rules[0].min_gain == 1
    assert "name a setting of one table" in problems(table(), overrides={"polish.1": "7"})
    assert "--set polish.1.steps" in problems(table(), overrides={"polish.1.steps": "x"})


def test_sites_are_told_nothing_of_the_stages():
    run = config.parse(MINIMAL + table(), name="run.toml")
    assert public_part(run).polish == ()
    assert public_part(run) == public_part(config.parse(MINIMAL, name="run.toml"))


def test_lines_of_tables_are_found_by_number_subtables_and_all():
    text = "a = 1\n[[t]]\nx = 1\n[t.y]\nz = 1\n[b]\nx = 2\n[[t]]\n'x' = 3\n[ t . y . w ]\nv = 1\n"
    lines = locate.key_lines(text)
    assert lines["t", "1", "x"] == 3
    assert lines["t", "1", "y", "z"] == 5
    assert lines["t", "2", "x"] == 9
    assert lines["t", "2", "y", "w", "v"] == 11
    assert lines["b", "x"] == 7


def test_every_setting_of_a_stage_is_in_the_document():
    from common.run import pages

    text = pages.render()
    assert "### [[polish]]" in text
    assert all(f"| `{key}` |" in text for kind in KINDS.values() for key in kind.model_fields)
