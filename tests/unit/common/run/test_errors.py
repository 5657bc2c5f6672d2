import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.run import config
from common.run.problems import foreign
from common.run.schema import shape

HEAD = 'version = 1\nmodel.base = "embedded"\nprivacy.mode = "none"\n'
RUN_KEYS = set(shape.keys_of(config.RunConfig))
NODE_KEYS = set(shape.keys_of(config.NodeConfig))

BAD = """\
# a comment with [brackets] and = signs
version = 1
name = "A name"
lr = 1e-4
learning_rate = 1e-4

[model] # the base
quantization = "nf8"
"base" = ""

[adapter]
r = 0
rank = 8
'alpha' = "high"

[data]
system_prompt = '''
[training]
batch_size = "eight"
'''
num_sites = 3

[training]
local-steps = 5
micro_batch_size = 3
optim = "adamw"

[federation]
sites_per_round = 1

[privacy]
mode = "record-dp"
target_epsilon = 8
"""
BAD_LINES = {
    "name": 3,
    "lr": 4,
    "learning_rate": 5,
    "model.quantization": 8,
    "model.base": 9,
    "adapter.r": 12,
    "adapter.rank": 13,
    "adapter.alpha": 14,
    "data.num_sites": 21,
    "training.local-steps": 24,
    "training.micro_batch_size": 25,
    "training.optim": 26,
    "federation.sites_per_round": 29,
    "privacy.mode": 32,
    "privacy.target_epsilon": 33,
}


def message_of(text: str, *, name: str = "run.toml", is_node: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse_node(text, name=name) if is_node else config.parse(text, name=name)
    return str(caught.value)


def places(message: str) -> dict[str, str]:
    lines = message.split("\n")[1:]
    return {what.strip().split("  ")[0]: where.strip() for what, where in zip(lines[::2], lines[1::2], strict=True)}


def hint(text: str) -> str:
    return message_of(text).split("\n")[1].split("unknown setting; ")[1]


def test_all_problems_are_listed_at_once_with_their_lines():
    message = message_of(BAD, name="bad.toml")
    assert message.startswith("15 problems in bad.toml\n")
    assert places(message) == {key: f"bad.toml:{line}" for key, line in BAD_LINES.items()}


def test_problems_come_in_the_order_of_the_file():
    assert list(places(message_of(BAD))) == list(BAD_LINES)


def test_exit_code():
    with pytest.raises(ConfigError) as caught:
        config.parse("", name="run.toml")
    assert caught.value.exit_code == 2


def test_empty_file_names_what_must_be_set():
    assert places(message_of("")) == dict.fromkeys(["version", "model.base", "privacy.mode"], "run.toml")
    assert places(message_of("", is_node=True)) == dict.fromkeys(["site.name", "data.path"], "run.toml")


def test_missing_key_points_at_its_section():
    assert places(message_of('version = 1\n[privacy]\nmode = "none"\n\n[model]\nrevision = ""\n')) == {
        "model.base": "run.toml:5"
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter.rr = 8", "did you mean adapter.r?"),
        ("[adapter]\nalfa = 8", "did you mean adapter.alpha?"),
        ("[training]\nlocal-steps = 8", "did you mean training.local_steps?"),
        ("[training]\nBatch_Size = 8", "did you mean training.batch_size?"),
        ("[train]\nbatch_size = 8", "did you mean training.batch_size?"),
        ("[lora]\nr = 8", "it belongs in [adapter]"),
        ("[training]\nseed = 8", "it belongs at the top, before any section"),
        ("[adapter]\nbatch_size = 8", "it belongs in [training] or in [evaluation]"),
        (
            "[adapter]\nbatch-size = 8",
            "did you mean training.batch_size or evaluation.batch_size?",
        ),
        ("[modell]", "did you mean [model]?"),
        ("[site]\nname = 'a'", "it belongs at the top, before any section"),
        ("[hardware]\ndevice = 'cpu'", "it belongs in [hardware] of a site's own file"),
        ("privacy.target_epsilon = 8", "here it is privacy.epsilon (of the whole run)"),
        ("model.lora.peft-lora-r = 32", "here it is adapter.r"),
        ("model.name = 'x'", "here it is model.base"),
        ("train.training-arguments.num-train-epochs = 3", "here it is training.local_epochs (per round)"),
        ("[tool.flwr.app.config]\nnum-server-rounds = 3", "here it is federation.num_rounds"),
        ("[[datasets]]\npath = 'x'", "here it is data.source"),
        ("[wandb]\nproject = 'x'", "results are files in the run's folder"),
        ("[wandb]\nentity = 'x'", "results are files in the run's folder"),
        ("[deepspeed]\nzero_stage = 3", "a site trains in one process on one device"),
        ("[tracker]\nproject = 'x'", "the sections are model, adapter, data"),
        ("[training]\nearly_stopping_patience = 3", "here it is gate.stop_after (evaluations in a row"),
        ("full_finetuning = true", 'here it is adapter.kind (write "full" for true)'),
        ("flash_attn = 'fa2'", "attention is PyTorch's own"),
        ("zzzzzz = 1", "the sections are model, adapter, data"),
        ("[wire]\nzzzzzz = 1", "[wire] has dtype, density, error_feedback, down, down_density, max_update_mib"),
    ],
)
def test_unknown_key_leads_to_the_right_one(text: str, expected: str):
    assert hint(HEAD + text).startswith(expected)


def test_key_of_the_run_file_in_a_node_file():
    message = message_of(
        'version = 1\nsite.name = "a"\ndata.path = "x"\nlora_r = 8\n[training]\nbatch_size = 8', is_node=True
    )
    assert "version  unknown setting; it belongs at the top, before any section of the run file" in message
    assert "lora_r  unknown setting; here it is adapter.r of the run file" in message
    assert (
        "training.batch_size  unknown setting; it belongs in [training] or in [evaluation] of the run file" in message
    )


@pytest.mark.parametrize("name", foreign.FOREIGN)
def test_foreign_name_is_translated(name: str):
    if name in RUN_KEYS:
        pytest.skip("is a setting of its own")
    *tables, key = name.split(".")
    text = HEAD + ".".join([*tables, key]) + " = 1"
    expected = foreign.FOREIGN[name]
    assert hint(text).startswith(f"here it is {expected.key}" if expected.key else expected.note)


@pytest.mark.parametrize("name", ["num-server-rounds", "Lora_R", "fraction-train", "LORA-ALPHA"])
def test_foreign_names_are_found_however_they_are_written(name: str):
    assert hint(f"{HEAD}{name} = 1").startswith("here it is ")


def test_foreign_names_lead_to_settings_that_exist():
    assert {entry.key for entry in foreign.FOREIGN.values()} - {""} <= RUN_KEYS
    assert all(entry.key or entry.note for entry in foreign.FOREIGN.values())
    assert len(foreign.FOREIGN) >= 40


def named_in(text: str) -> set[str]:
    """Dotted settings that a text names."""
    sections = sorted({key.split(".")[0] for key in RUN_KEYS | NODE_KEYS if "." in key})
    return {match[0] for match in re.finditer(rf"\b(?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+\b", text)}


def refused_values(text: str, key: str = "") -> list[str]:
    """Values that a text says to write, at its own key or after `section.key =`, and that the schema refuses."""
    written = r"\b([a-z_]+(?:\.[a-z_0-9]+)+) = ['\"]([a-z0-9_-]+)['\"]"
    said = [(found[1], f'"{found[2]}"') for found in re.finditer(written, text)]
    rest = re.sub(written, "", text)
    if key and "write kind" not in text:
        values = re.findall(r'(?<!\[)"[a-z0-9_-]+"|\["[a-z0-9_-]+"\]', rest)
        said += [(key, value) for value in values if f"{value} is " not in text]
    lines = [(place, value, f"{place} = {value}") for place, value in said]
    heads = {place: "\n".join(own for own in HEAD.splitlines() if not own.startswith(f"{place} ")) for place, _ in said}
    return [line for place, _, line in lines if f"{place}  must" in message_of(f"{heads[place]}\n{line}\nzzz = 1")]


def test_every_hint_names_settings_and_values_that_there_are():
    hints = [(hint.key, hint.note) for hint in foreign.FOREIGN.values()]
    hints += [("", note) for note in foreign.SECTIONS.values()]
    hints += [(key, note) for (key, _), note in foreign.VALUES.items()]
    for key, note in dict.fromkeys(hints):
        assert named_in(note) <= RUN_KEYS | NODE_KEYS, note
        assert refused_values(note, key if key in RUN_KEYS else "") == [], note
    assert named_in("set gate.patience") - RUN_KEYS == {"gate.patience"}  # controls
    assert refused_values('write "nf5"', "model.quantization") == ['model.quantization = "nf5"']
    assert refused_values('adapter.kind = "whole"') == ['adapter.kind = "whole"']


def test_foreign_values_belong_to_settings_that_exist():
    keys = RUN_KEYS | set(shape.keys_of(config.NodeConfig)) | set(config.RunConfig.model_fields)
    assert {key for key, _ in foreign.VALUES} <= keys


@pytest.mark.parametrize(("key", "value"), foreign.VALUES)
def test_foreign_value_is_translated(key: str, value: str):
    text = HEAD if not key.startswith("hardware") else ""
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
    message = message_of("\n".join([*lines, f'{key} = "{value}"']), is_node=key.startswith("hardware"))
    assert f'(you wrote "{value}"); {foreign.VALUES[(key, value)]}' in message


def test_values_of_unknown_keys_are_not_shown():
    with pytest.raises(ConfigError) as caught:
        config.parse(f'{HEAD}hf_token = "hf_secret"', name="run.toml")
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_long_values_and_names_are_cut():
    message = message_of(f'name = "{"A" * 10_000}"\n{HEAD}{"k" * 10_000} = 1')
    assert len(message) < 700


def test_long_lists_of_problems_are_cut():
    message = message_of(HEAD + "".join(f"unknown_{number} = 1\n" for number in range(2000)))
    assert message.startswith("2000 problems in run.toml\n")
    assert message.endswith("  and 1950 more")


def test_deep_tables_are_one_problem():
    message = message_of(HEAD + ".".join(["a"] * 2000) + " = 1")
    assert message.startswith("1 problem in run.toml\n  a.a.a.a.a.a.a.a  unknown setting")


def test_contradiction_between_bad_values_is_not_guessed():
    assert list(places(message_of(f"{HEAD}federation.min_sites = 0\nfederation.sites_per_round = 1"))) == [
        "federation.min_sites"
    ]


def test_contradictions_are_reported_beside_other_problems():
    text = f"{HEAD}adapter.r = 0\nfederation.sites_per_round = 1\ntraining.micro_batch_size = 3"
    assert list(places(message_of(text))) == ["adapter.r", "federation.sites_per_round", "training.micro_batch_size"]


@pytest.mark.parametrize("text", ["model = 'x'", "[[model]]\nbase = 'x'", "model = [1]"])
def test_section_must_be_a_section(text: str):
    message = message_of(f"version = 1\nprivacy.mode = 'none'\n{text}")
    assert places(message) == {"model": "run.toml:3"}
    assert "must be a section, [model]" in message


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("version = 1\n[model\n", 2, 7),
        ("version = 1\nversion = 2\n", 2, 12),
        ("version = 1\nname = run\n", 2, 8),
        ("a = '''\n", 2, 1),
        ("a = 1\nb", 2, 2),
        ("lr: 2e-4\n", 1, 3),
    ],
)
def test_syntax_error_has_line_and_column(text: str, line: int, column: int):
    message = message_of(text)
    assert message.startswith(f"run.toml:{line}:{column} is not valid TOML: ")
    assert message.endswith(f"(line {line}, column {column})")


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "9" * 20_000, "a = 2000-13-01"])
def test_what_python_s_parser_chokes_on_is_a_config_error(text: str):
    assert "run.toml" in message_of(text)
    assert len(message_of(text)) < 300


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name = '\xff'", "run.toml:1 is not UTF-8 text; save the file as UTF-8"),
        (b"a = 1\nb = '\xe9'\n", "run.toml:2 is not UTF-8 text"),
        (HEAD.encode("utf-16"), "is not UTF-8 text"),
        (b"#" * (1 << 20) + b"\n", "is larger than 1 MiB"),
    ],
)
def test_unreadable_content(tmp_path: Path, content: bytes, expected: str):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml") as caught:
        config.load(path)
    assert expected in str(caught.value)


def test_file_of_one_mebibyte_is_read(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(HEAD + "#" * ((1 << 20) - len(HEAD)))
    assert config.load(path).model.base == "embedded"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.toml", "is not there; give the path of a TOML file"),
        (".", "is a folder; give the path of the TOML file in it"),
        ("run.toml/x", "cannot be read (Not a directory)"),
        ("a\0b", "cannot be read (not a valid path)"),
        ("\udcff.toml", "\\udcff.toml is not there"),
    ],
)
@pytest.mark.parametrize("load", [config.load, config.load_node])
def test_unreadable_path(tmp_path: Path, name: str, expected: str, load):
    (tmp_path / "run.toml").write_text(HEAD)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    assert expected in str(caught.value)
    str(caught.value).encode()


BARE = string.ascii_letters + string.digits + "_-"
BARE_KEYS = st.text(BARE, min_size=1, max_size=20)
PRINTED_KEYS = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20).filter(
    lambda key: not set(key) <= set(BARE)
)
TABLES = [path for path, table in shape.tables_of(config.RunConfig).items() if not table.is_array]
SECTIONS = st.sampled_from([f"{path}.".lstrip(".") for path in TABLES])
OTHER_LINES = st.lists(st.sampled_from(["# c", "", "   ", "\t# [model]", '# "', "#'''", "\r"]), max_size=5)


@given(SECTIONS, BARE_KEYS, OTHER_LINES)
def test_any_unknown_key_is_named_with_its_line(section: str, key: str, before: list[str]):
    assume(section + key not in RUN_KEYS | set(config.RunConfig.model_fields))
    message = message_of("\n".join([*HEAD.splitlines(), *before, f"{section}{key} = 1"]))
    assert message.startswith(f"1 problem in run.toml\n  {section}{key}  unknown setting; ")
    assert message.endswith(f"\n    run.toml:{4 + len(before)}")


@given(SECTIONS, PRINTED_KEYS, OTHER_LINES)
def test_any_quoted_unknown_key_is_named_with_its_line(section: str, key: str, before: list[str]):
    quoted = json.dumps(key, ensure_ascii=False)
    message = message_of("\n".join([*HEAD.splitlines(), *before, f"{section}{quoted} = 1"]))
    assert message.startswith(f"1 problem in run.toml\n  {section}{quoted}  unknown setting; ")
    assert message.endswith(f"\n    run.toml:{4 + len(before)}")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_every_terminal_can_show_a_message(key: str, value: str):
    message = message_of(f"name = {_escaped(value + ' ')}\n{HEAD}model.{_escaped(key + ' ')} = 1")
    assert message.startswith("2 problems in run.toml\n")
    assert message.replace("\n", "").isprintable()
    assert message.count("\n") == 4


def _escaped(text: str) -> str:
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'
