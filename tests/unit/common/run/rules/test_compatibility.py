"""Every cell of the table of methods: what the literature says of it, and what a run file gets to hear."""

import itertools
import re

import pytest

from common.errors import ConfigError
from common.run import config
from common.run.catalogue.methods import FACTS
from common.run.rules import compatibility, wire
from common.run.rules import rules as config_rules
from common.run.rules.compatibility import FEATURES
from tests import tiny

# Written down from the papers, not from the facts: secure aggregation, record DP, central DP, quantised base, mixed
# ranks, server optimizer, central polishing, robust aggregation, sparse updates, steps down, sparse download, own
# rows.
EXPECTED = {
    "fedavg": "yes yes yes yes no yes yes yes yes yes yes yes",
    "ffa": "yes yes yes yes no yes yes yes yes yes yes yes",
    "fedsvd": "yes yes yes yes yes no yes yes no no no yes",
    "rolora": "yes yes yes yes no yes yes yes yes yes yes yes",
    "flexlora": "no yes no yes yes no yes no no no no yes",
    "fedex": "no no no yes no no yes no yes no no yes",
    "flora": "no no no yes yes no yes no no no no yes",
    "fedsa": "yes yes yes yes no yes no yes yes yes no no",
    "ravan": "yes yes yes yes no yes yes yes yes yes no yes",
}
ASKING = {
    "quantised base": {"model.quantization": "nf4"},
    "mixed ranks": {"adapter.site_ranks.north": "2"},
    "server optimizer": {"aggregation.server_optimizer.kind": "fedavgm"},
    "robust aggregation": {
        "aggregation.robust.rule": "median",
        "aggregation.robust.num_bad_sites": "1",
        "aggregation.weighting": "uniform",
        "federation.min_sites": "3",
    },
    "sparse updates": {"wire.density": "0.1"},
    "steps down": {"wire.down": "int4"},
    "sparse download": {"wire.down_density": "0.25"},
    "coordinator's own rows": {"evaluation.server_data": "rows.jsonl"},
    "central polishing": {"polish": '[{name = "teach", kind = "sft", data = "rows.jsonl"}]'},
    "record DP": tiny.NOISED,
    "central DP": {
        "privacy.mode": "site",
        "privacy.sampling_prob": "0.1",
        "privacy.noise_multiplier": "1.0",
        "aggregation.weighting": "uniform",
    },
}
SIDE = {name: {"aggregation.residual_rank": "8"} for name, facts in FACTS.items() if facts.base_delta == "residual"}
CELLS = [
    pytest.param(feature, cell, id=f"{cell.row}-{feature.name}")
    for feature, cell in compatibility.cells(FACTS, FEATURES)
]


def test_the_table_is_whole():
    assert len(CELLS) == len(FACTS) * len(FEATURES)
    assert set(EXPECTED) == set(FACTS)
    assert {feature.name for feature in FEATURES if feature.keys} == set(ASKING)


@pytest.mark.parametrize(("feature", "cell"), CELLS)
def test_every_cell_says_what_the_literature_says_and_a_refusal_names_a_way_out(feature, cell):
    column = [one.name for one in FEATURES].index(feature.name)
    assert ("yes" if cell.is_allowed else "no") == EXPECTED[cell.row].split()[column]
    if cell.is_allowed:
        assert cell.nearest == ""
    else:
        assert cell.reason
        assert compatibility.cell(FACTS[cell.nearest], feature, FACTS).is_allowed


@pytest.mark.parametrize(("feature", "cell"), [one for one in CELLS if one.values[0].keys])
def test_a_run_file_may_combine_exactly_what_the_table_allows(feature, cell):
    changes = {"aggregation.method": cell.row, **ASKING[feature.name], **SIDE.get(cell.row, {})}
    if cell.is_allowed:
        assert feature.is_asked(tiny.settings("tiny", changes))
        return
    with pytest.raises(ConfigError, match=rf"(?s)no {feature.name} with this method.*'{cell.nearest}'"):
        tiny.settings("tiny", changes)


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature.keys], ids=lambda one: one.name)
def test_control_no_feature_is_asked_for_by_itself(feature):
    assert not feature.is_asked(tiny.settings("tiny"))
    known = config.RunConfig.model_fields
    assert all(key.partition(".")[0] in known for key in feature.keys)


SEVEN = (
    ("record DP", "central DP"),
    ("quantised base",),
    ("mixed ranks",),
    ("server optimizer",),
    ("central polishing",),
)


def combinations() -> list[tuple[str, ...]]:
    """All that can be asked for of the last five of the table's seven dimensions, method and secure sum aside."""
    chosen = itertools.product(*(("", *names) for names in SEVEN))
    return [tuple(name for name in asked if name) for asked in chosen]


def heard(method: str, asked: tuple[str, ...]) -> str:
    """What a run file with all of them is told; nothing if it is right."""
    changes = {"aggregation.method": method, **SIDE.get(method, {})}
    for name in asked:
        changes |= ASKING[name]
    try:
        tiny.settings("tiny", changes)
    except ConfigError as error:
        return str(error)
    return ""


def bears(method: str, asked: tuple[str, ...]) -> bool:
    """By the table of this file; noise for whole sites has sites of one rank, whatever the method."""
    names = [feature.name for feature in FEATURES]
    row = EXPECTED[method].split()
    return not {"central DP", "mixed ranks"} <= set(asked) and all(row[names.index(one)] == "yes" for one in asked)


@pytest.mark.parametrize("method", sorted(FACTS))
def test_every_combination_of_all_dimensions_is_taken_or_told_a_way_out_that_is_one(method):
    """48 run files each: what is refused names a method that bears all of it, or says which two none bears."""
    assert len(combinations()) == 48
    for asked in combinations():
        told = heard(method, asked)
        assert (told == "") == bears(method, asked), (asked, told)
        if told:
            named = [other for other in FACTS if f"allows it is '{other}'" in told]
            has_way = any(bears(other, asked) for other in named)
            assert has_way or "no method goes together with both" in told or "same rank" in told, (asked, told)


WIRE = {
    "integers up": {"wire.dtype": "int4"},
    "sparse up with error feedback": {"wire.density": "0.1"},
    "sparse up as in FLASC": {"wire.density": "0.1", "wire.error_feedback": "false"},
    "steps down": {"wire.down": "int4"},
    "sparse steps down": {"wire.down": "int4", "wire.down_density": "0.25"},
    "sparse adapter down as in FLASC": {"wire.down_density": "0.25"},
}


@pytest.mark.parametrize("option", wire.OPTIONS, ids=lambda option: option.name)
@pytest.mark.parametrize("column", wire.COLUMNS[1:])
def test_what_sends_less_goes_together_with_what_its_table_says_under_some_method(option, column):
    assert len(WIRE) == len(wire.OPTIONS)
    asked = {**WIRE[option.name], **ASKING[column]}
    taken = {name for name in FACTS if _is_taken({"aggregation.method": name, **SIDE.get(name, {}), **asked})}
    assert (taken == set()) == (column in option.why_not)


def _is_taken(changes: dict[str, str]) -> bool:
    try:
        tiny.settings("tiny", changes)
    except ConfigError:
        return False
    return True


def test_what_no_method_goes_together_with_is_said_once_and_for_any_method():
    pairs = {(one.name, other.name) for one, other in compatibility.apart()}
    assert ("mixed ranks", "server optimizer") in pairs
    assert ("record DP", "mixed ranks") not in pairs
    for method in ("fedavg", "flexlora"):
        told = heard(method, ("mixed ranks", "server optimizer"))
        assert "no method goes together with both mixed ranks and server optimizer; remove one of the two" in told
    assert "goes together with both" not in heard("fedavg", ("mixed ranks",))


def test_every_refusal_that_a_run_file_can_cause_is_a_rule():
    refused = [cell for feature, cell in compatibility.cells(FACTS, FEATURES) if feature.keys and not cell.is_allowed]
    rules = [rule for rule in config_rules.RUN_RULES if "with this method" in rule.message]
    assert len(rules) == len({(cell.feature, cell.reason, cell.nearest) for cell in refused}) == 23
    assert len(refused) == 33


def test_a_side_adapter_needs_a_rank_and_only_methods_that_keep_one_take_it():
    for method in SIDE:
        with pytest.raises(ConfigError, match=r"residual_rank.*keeps a side adapter; set its rank"):
            tiny.settings("tiny", {"aggregation.method": method})
    for setting in ({"aggregation.residual_rank": "8"}, {"aggregation.residual_max_lost": "0.5"}):
        with pytest.raises(ConfigError, match="keeps no side adapter; remove it"):
            tiny.settings("tiny", setting)


def test_a_large_gap_calls_for_the_nearest_exact_method():
    assert compatibility.without_gap(tiny.settings("tiny")) == "rolora"
    assert compatibility.without_gap(tiny.settings("tiny", {"aggregation.method": "flexlora"})) == "fedsvd"
    assert compatibility.without_gap(tiny.settings("tiny", {"aggregation.method": "ffa"})) == ""
    mixed = {"aggregation.method": "flexlora", **ASKING["mixed ranks"]}
    assert compatibility.without_gap(tiny.settings("tiny", mixed)) == "flora"  # fedsvd would cut for smaller sites
    assert compatibility.without_gap(tiny.settings("tiny", {**mixed, **tiny.NOISED})) == ""  # nor is flora private


def test_it_is_one_that_the_runs_other_settings_allow(monkeypatch):
    from dataclasses import replace

    only_refreshing = replace(FACTS["fedavg"], nearest=("fedsvd", "ffa"))
    monkeypatch.setattr(compatibility, "FACTS", {**FACTS, "fedavg": only_refreshing})
    assert compatibility.without_gap(tiny.settings("tiny")) == "fedsvd"
    assert compatibility.without_gap(tiny.settings("tiny", ASKING["server optimizer"])) == "ffa"


@pytest.mark.parametrize(
    ("optimizer", "setting", "others"),
    [
        ("none", "learning_rate", '"fedavgm", "fedadam", "fedyogi" or "fedadagrad"'),
        ("none", "beta1", '"fedavgm", "fedadam" or "fedyogi"'),
        ("fedavgm", "beta2", '"fedadam" or "fedyogi"'),
        ("fedavgm", "tau", '"fedadam", "fedyogi" or "fedadagrad"'),
        ("fedadagrad", "beta1", '"fedavgm", "fedadam" or "fedyogi"'),
        ("fedadagrad", "beta2", '"fedadam" or "fedyogi"'),
    ],
)
def test_a_setting_that_the_optimizer_does_not_use_is_refused(optimizer, setting, others):
    changes = {f"aggregation.server_optimizer.{key}": value for key, value in (("kind", optimizer), (setting, "0.5"))}
    expected = (
        f'{setting}  has no effect with kind = "{optimizer}"; remove it, or set aggregation.server_optimizer.kind'
    )
    with pytest.raises(ConfigError, match=re.escape(f"{expected} to {others}\n")):
        tiny.settings("tiny", changes)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_control_one_that_it_uses_is_taken(optimizer):
    given = {"aggregation.server_optimizer.kind": optimizer, "aggregation.server_optimizer.learning_rate": "0.5"}
    assert tiny.settings("tiny", given).aggregation.server_optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robust.num_bad_sites": "1"}, 'num_bad_sites  has no effect with rule = "none"; remove it, or set'),
        ({"robust.rule": "krum"}, "aggregation.robust.num_bad_sites  must be set"),
        ({"screening.threshold": "9.0"}, 'threshold  has no effect with action = "off"; remove it, or set'),
        ({"num_bad_sites": "1"}, "num_bad_sites  unknown setting; here it is aggregation.robust.num_bad_sites"),
        ({"server_tau": "0.5"}, "server_tau  unknown setting; here it is aggregation.server_optimizer.tau"),
        ({"robust": "median"}, 'must be a section, [aggregation.robust] (you wrote "median"); write "median" as rule'),
    ],
)
def test_a_setting_of_a_guard_that_is_off_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny.settings("tiny", {f"aggregation.{key}": value for key, value in changes.items()})
