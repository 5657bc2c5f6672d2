import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.errors import ConfigError
from common.run import config
from common.run.catalogue.kinds import KINDS
from common.run.catalogue.methods import FACTS

MINIMAL = 'version = 1\n[model]\nbase = "embedded"\n[privacy]\nmode = "none"\n'
NODE = '[site]\nname = "north"\n[data]\npath = "rows.jsonl"\n'


def problems(text: str, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, name="run.toml", overrides=overrides or {})
    return str(caught.value)


def with_settings(*lines: str) -> str:
    sections: dict[str, list[str]] = {"model": ['base = "embedded"'], "privacy": ['mode = "none"']}
    for line in lines:
        section, _, setting = line.partition(".")
        if line.startswith("privacy.mode"):
            sections["privacy"].clear()
        sections.setdefault(section, []).append(setting)
    return "version = 1\n" + "\n".join(f"[{name}]\n" + "\n".join(body) for name, body in sections.items())


def test_minimal_file_gives_the_defaults():
    run = config.parse(MINIMAL, name="run.toml")
    assert (run.name, run.seed, run.model.quantization, run.adapter.r) == ("run", 0, "nf4", 16)
    assert (run.training.local_epochs, run.training.local_steps, run.federation.min_sites) == (1.0, 0, 2)


def test_minimal_node_file_gives_the_defaults():
    node = config.parse_node(NODE, name="node.toml")
    assert (node.site.name, node.hardware.device, node.agent.socket) == ("north", "auto", "/run/silotune/agent.sock")


def test_load_reads_files(tmp_path: Path):
    (tmp_path / "run.toml").write_text(MINIMAL)
    (tmp_path / "node.toml").write_text(NODE)
    assert config.load(tmp_path / "run.toml") == config.parse(MINIMAL, name="x")
    assert config.load_node(tmp_path / "node.toml") == config.parse_node(NODE, name="x")


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert config.load(tmp_path / "run.toml").model.base == "embedded"


def test_config_is_frozen_and_hashable():
    run = config.parse(MINIMAL, name="run.toml")
    with pytest.raises(ValidationError):
        run.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        run.adapter.r = 1  # type: ignore[misc]
    assert hash(run) == hash(config.parse(MINIMAL, name="other.toml"))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ('adapter.r = "8"', "must be a whole number"),
        ("adapter.r = true", "must be a whole number"),
        ("adapter.r = 8.0", "must be a whole number"),
        ("adapter.r = [8]", "must be a whole number"),
        ("adapter.r = 1979-05-27", "must be a whole number"),
        ('adapter.alpha = "8"', "must be a number"),
        ("adapter.alpha = true", "must be a number"),
        ("adapter.alpha = nan", "must be"),
        ("adapter.alpha = inf", "must be"),
        ("adapter.use_rslora = 1", "must be true or false"),
        ('adapter.use_rslora = "true"', "must be true or false"),
        ("adapter.targets = [3]", "must be text in quotes"),
        ("adapter.kind = 1", 'must be "lora"'),
    ],
)
def test_values_are_not_converted(setting: str, expected: str):
    assert expected in problems(with_settings(setting))


@pytest.mark.parametrize("value", ["true", "1.0", '"1"', "2", "[1]"])
def test_version_is_the_whole_number_one(value: str):
    assert "version  must be" in problems(MINIMAL.replace("version = 1", f"version = {value}"))


def test_whole_numbers_are_numbers():
    run = config.parse(with_settings("adapter.alpha = 32"), name="run.toml")
    assert isinstance(run.adapter.alpha, float)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("adapter.r = 0", "must be at least 1 (you wrote 0)"),
        ("adapter.r = 513", "must be at most 512 (you wrote 513)"),
        ("adapter.alpha = 0.0", "must be greater than 0 (you wrote 0.0)"),
        ("adapter.dropout = 1.0", "must be less than 1 (you wrote 1.0)"),
        ('adapter.targets = ["q_proj", ""]', 'adapter.targets.2  must be "all-linear" or the name of a module'),
        ('adapter.targets = ["q_proj, v_proj"]', 'adapter.targets.1  must be "all-linear" or the name of a module'),
        ("adapter.targets = []", "must not be empty"),
        ('adapter.targets = ["all-linear", "q_proj"]', '"all-linear" names all layers; remove it, or the others'),
        ('adapter.targets = ["q_proj", "q_proj"]', 'names "q_proj" twice; write it once'),
        ("adapter.targets = 3", "must be an array"),
        ("adapter.site_ranks = {north = 0}", "adapter.site_ranks.north  must be at least 1"),
        ('adapter.site_ranks = {"St. Ann" = 4}', 'adapter.site_ranks."St. Ann"  must be 1 to 64 of a-z, 0-9 and -'),
        ("adapter.site_ranks = [4]", "must be a table, with one line for each site"),
        ('model.sha256 = "abc"', "must be 64 digits of 0-9 and a-f, or empty"),
        ('model.revision = "a\\u0000b"', "must be one line without control characters"),
        ('model.quantization = "nf8"', 'must be "none", "int8" or "nf4" (you wrote "nf8")'),
        ('data.source = ""', "must not be empty"),
        ("data.held_out_fraction = 0.0", "must be greater than 0"),
        ("data.held_out_fraction = 0.9", "must be less than 0.9"),
        (f'data.source = "{"x" * 5000}"', "must be at most 4,096 characters long"),
        ("training.learning_rate = 0", "must be greater than 0"),
        ("training.optimizer.beta2 = 1", "must be less than 1"),
        ("federation.min_sites = 0", "must be at least 1"),
        ("federation.round_timeout_s = 0", "must be greater than 0"),
        ("wire.max_update_mib = 2048", "must be at most 2,047"),
    ],
)
def test_limits_are_named(setting: str, expected: str):
    assert expected in problems(with_settings(setting))


@pytest.mark.parametrize("name", ["", "Run", "a b", "-a", "a-", "a_b", "a\\n", "a" * 65])
def test_names_are_slugs(name: str):
    assert "name  must be 1 to 64 of a-z, 0-9 and -" in problems(f'name = "{name}"\n{MINIMAL}')


@pytest.mark.parametrize("seed", ["-1", "2147483648", str(10**30)])
def test_seed_has_31_bits(seed: str):
    assert "seed  must be at" in problems(f"seed = {seed}\n{MINIMAL}")


@pytest.mark.parametrize("key", ["training.learning_rate", "adapter.alpha", "federation.num_rounds", "wire.dtype"])
def test_enormous_numbers_are_refused_and_cut_short(key: str):
    message = problems(with_settings(f"{key} = 1{'0' * 4000}"))
    assert f"{key}  must be" in message
    assert len(message) < 400


@pytest.mark.parametrize("text", ["version = 1\n[model]\nbase = 'x'\n", MINIMAL.replace("mode =", "# mode =")])
def test_privacy_mode_has_no_default(text: str):
    message = problems(text)
    assert 'privacy.mode  must be set: write mode = "unit"' in message
    assert 'mode = "none"' in message


@pytest.mark.parametrize(
    ("mode", "remedy"), [("record-dp", 'write "unit"'), ("dp", 'write "unit"'), ("site-dp", 'write "site"')]
)
def test_other_names_of_privacy_are_led_to_ours_or_refused(mode: str, remedy: str):
    message = problems(MINIMAL.replace('"none"', f'"{mode}"'))
    assert f'(you wrote "{mode}")' in message
    assert remedy in message


def test_node_held_out_rows_are_other_rows():
    with pytest.raises(ConfigError, match=r"data\.held_out_path  evaluation on training rows"):
        config.parse_node(NODE + 'held_out_path = "rows.jsonl"\n', name="node.toml")


def test_local_steps_alone_turn_epochs_off():
    run = config.parse(with_settings("training.local_steps = 5"), name="run.toml")
    assert (run.training.local_steps, run.training.local_epochs) == (5, 0.0)
    assert config.TrainingConfig(local_steps=5).local_epochs == 0.0


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ('export.formats = "gguf, peft"', 'must be an array: formats = ["gguf", "peft"]'),
        (
            'evaluation.tasks = [{name = "a", kind = "answers", data = "x", metrics = "f1, rougeL"}]',
            'evaluation.tasks.1.metrics  must be an array: metrics = ["f1", "rougeL"]',
        ),
        ('adapter.targets = "q_proj,v_proj"', 'must be an array: targets = ["q_proj", "v_proj"]'),
        (
            'adapter.site_ranks = "north = 4, south=8"',
            ": site_ranks.north = 4, site_ranks.south = 8",
        ),
        ('model.site_quantization = "north = none"', ': site_quantization.north = "none"'),
    ],
)
def test_one_text_in_the_place_of_an_array_or_a_table_gets_the_lines_to_write(setting: str, remedy: str):
    assert f"{remedy} (you wrote" in problems(with_settings(setting))


def test_tables_of_sites_are_the_same_however_they_are_written():
    inline = with_settings("adapter.site_ranks = {south = 4, north = 8}", "aggregation.method = 'flexlora'")
    first = config.parse(inline, name="run.toml")
    second = config.parse(
        with_settings("aggregation.method = 'flexlora'", "adapter.site_ranks.south = 4"),
        name="run.toml",
        overrides={"adapter.site_ranks.north": "8"},
    )
    assert config.sha256(first) == config.sha256(second)
    assert hash(first) == hash(second)
    assert config.changed(first)["adapter.site_ranks"] == {"north": 8, "south": 4}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("adapter.r", "8", 8),
        ("adapter.use_rslora", "true", True),
        ("training.learning_rate", "1e-3", 1e-3),
        ("adapter.alpha", "8", 8.0),
        ("model.quantization", "int8", "int8"),
        ("model.base", "/models/a b=c", "/models/a b=c"),
        ("model.base", '"quoted"', "quoted"),
        ("model.revision", "", ""),
        ("data.system_prompt", "two\nlines = 3", "two\nlines = 3"),
        ("data.system_prompt", "[1", "[1"),
        ("output.folder", "#1", "#1"),
    ],
)
def test_override_wins(key: str, value: str, expected: object):
    text = with_settings("adapter.r = 4", 'model.quantization = "none"')
    run = config.parse(text, name="run.toml", overrides={key: value})
    section, name = key.split(".")
    assert getattr(getattr(run, section), name) == expected


def test_override_of_top_level_and_of_a_wrong_value():
    run = config.parse(with_settings("adapter.r = 0"), name="run.toml", overrides={"adapter.r": "4", "name": "b"})
    assert (run.adapter.r, run.name) == (4, "b")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("adapter.r", "x", 'adapter.r  must be a whole number (you wrote "x")'),
        ("adapter.rr", "8", "adapter.rr  unknown setting; did you mean adapter.r?"),
        ("adapter", "8", "adapter  must be a section, [adapter] (you wrote 8)"),
        ("adapter", "{r = 8}", "adapter  must be a section, [adapter]"),
        ("lora_r", "8", "lora_r  unknown setting; here it is adapter.r"),
        ("seed.r", "8", "seed  must be a whole number"),
        ("", "8", '""  unknown setting'),
        ("adapter..r", "8", 'adapter."".r  unknown setting'),
        ("output.folder", "a\udcff", 'output.folder  must be valid Unicode text (you wrote "a\\udcff")'),
        ("adapter.r", "[" * 5000, "adapter.r  must be a whole number"),
        ("adapter.r", "9" * 5000, "adapter.r  must be a whole number"),
    ],
)
def test_bad_override_is_reported_as_one(key: str, value: str, expected: str):
    message = problems(MINIMAL, {key: value})
    assert expected in message
    assert message.endswith(f"\n    --set {key}")
    message.encode()


def test_override_where_the_file_has_a_value_for_a_section():
    message = problems('adapter = "qlora"\n' + MINIMAL, {"adapter.r": "8"})
    assert 'adapter  must be a section, [adapter] (you wrote "qlora")' in message


def test_hash_does_not_depend_on_order_or_notation():
    one = 'seed = 3\nversion = 1\nprivacy.mode = "none"\nadapter = {alpha = 8, r = 4}\nmodel.base = "embedded"'
    two = with_settings("adapter.r = 4", "adapter.alpha = 8.0", "training.learning_rate = 0.0002")
    first, second = (config.parse(text, name="run.toml") for text in (one, "seed = 3\n" + two))
    assert config.resolved_json(first) == config.resolved_json(second)
    assert config.sha256(first) == config.sha256(second)


def test_hash_depends_on_every_setting():
    run = config.parse(MINIMAL, name="run.toml")
    other = config.parse(MINIMAL, name="run.toml", overrides={"wire.dtype": "float32"})
    assert config.sha256(run) != config.sha256(other)


def test_hash_of_the_minimal_file_is_known():
    assert config.sha256(config.parse(MINIMAL, name="run.toml")) == (
        "580cb48adf522a16679f592a99e3c874aaf17b135538d2f00ca5f3c3cdfe2896"
    )


def test_resolved_json_is_canonical_and_complete():
    text = config.resolved_json(config.parse(with_settings('data.system_prompt = "Grüße"'), name="run.toml"))
    table = json.loads(text)
    assert text == json.dumps(table, sort_keys=True, separators=(",", ":"))
    assert text.isascii()
    assert set(table) == set(config.RunConfig.model_fields)


@pytest.mark.parametrize("settings", [(), ("training.local_steps = 5",), ("adapter.alpha = 3",)])
def test_resolved_json_loads_again(settings: tuple[str, ...]):
    run = config.parse(with_settings(*settings), name="run.toml")
    assert config.RunConfig.model_validate(json.loads(config.resolved_json(run))) == run
    assert config.RunConfig.model_validate_json(config.resolved_json(run)) == run


def test_all_leaves_are_single_values_or_arrays_or_tables_of_them():
    for schema in (config.RunConfig, config.NodeConfig):
        definitions = schema.model_json_schema()["$defs"].values()
        fields = [field for section in definitions for field in section["properties"].values()]
        items = [field["items"] for field in fields if not {"$ref", "oneOf"} & field.get("items", {"$ref": ""}).keys()]
        of_sites = [value for field in fields for value in field.get("patternProperties", {}).values()]
        single = [field for field in fields if field.get("type") not in ("array", "object") and "oneOf" not in field]
        assert {field["type"] for field in (*single, *items, *of_sites)} <= {"string", "integer", "number", "boolean"}


def test_all_settings_are_described():
    for schema in (config.RunConfig, config.NodeConfig):
        for section in schema.model_json_schema()["$defs"].values():
            for name, field in section["properties"].items():
                assert field["description"].endswith("."), name


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'flwr', 'numpy', 'datasets'}"
    code = f"import sys, common.run.config; assert not {heavy} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(config.__file__).parents[2])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("kind = 'answers'", "metrics  must be set"),
        ("kind = 'answers', metrics = ['f1'], labels = ['yes', 'no']", "name one in metrics"),
        ("kind = 'answers', metrics = ['f1'], json_schema = 's.json'", "metric json and json_schema belong together"),
        ("kind = 'answers', metrics = ['json']", "metric json and json_schema belong together"),
        ("kind = 'json'", "json_schema  must be set"),
        ("kind = 'harness'", "harness_tasks  must be set"),
        (
            "kind = 'choice', metrics = ['f1']",
            'has no effect with kind = "choice"; remove it, or set evaluation.tasks.1.kind to "answers"',
        ),
        ("kind = 'perplexity', baseline_prompt = 'p'", 'baseline_prompt  has no effect with kind = "perplexity"'),
        ("kind = 'choice', text_column = 'x'", "text_column  has no effect"),
        ("kind = 'choice', baseline_examples = 2", "baseline_examples and baseline_data belong together"),
        ("kind = 'choice', baseline_examples = 2, baseline_data = 'rows.jsonl'", "the task's own file"),
    ],
)
def test_a_task_takes_what_its_kind_uses(task: str, message: str):
    text = f"evaluation.tasks = [{{name = 'a', data = 'rows.jsonl', {task}}}]\n"
    assert message in problems(f"{text}{MINIMAL}")


WHOLE_DOWN = {"fedsvd", "flexlora", "fedex", "flora"}


@pytest.mark.parametrize("method", list(FACTS))
def test_how_the_adapter_goes_down_follows_the_method_where_it_is_left_out(method):
    side = {"aggregation.residual_rank": "64"} if FACTS[method].base_delta == "residual" else {}
    run = config.parse(MINIMAL, name="run.toml", overrides={"aggregation.method": method, **side})
    assert run.wire.down == ("float32" if method in WHOLE_DOWN else "int4")
    assert run.wire.dtype == "int8"
    assert json.loads(config.resolved_json(run))["wire"]["down"] == run.wire.down
    assert config.RunConfig.model_validate(json.loads(config.resolved_json(run))) == run


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_adapter_has_a_way_down_where_it_is_left_out(kind):
    run = config.parse(MINIMAL, name="run.toml", overrides={"adapter.kind": kind, "model.quantization": "none"})
    assert run.wire.down == ("float32" if kind == "adalora" else "int4")


def test_what_is_left_out_of_the_wire_follows_whatever_decides_the_method():
    private = {"privacy.mode": "unit", "privacy.epsilon": "8.0", "privacy.sampling_prob": "0.01"}
    for overrides, down in (
        ({**private, "training.local_steps": "4"}, "float32"),  # fedsvd
        ({**private, "training.local_steps": "4", "aggregation.method": "ffa"}, "int4"),
        ({"aggregation.method": "fedavg", "wire.down": "float32"}, "float32"),
        ({"aggregation.method": "fedsvd", "adapter.site_ranks.north": "4"}, "float32"),
        ({"wire.down_density": "0.25"}, "int4"),
    ):
        assert config.parse(MINIMAL, name="run.toml", overrides=overrides).wire.down == down
    fedsa = {"aggregation.method": "fedsa"}
    assert config.parse(MINIMAL, name="run.toml", overrides=fedsa).evaluation.sites_per_round == 0
    with pytest.raises(ConfigError, match="so all must be asked"):
        config.parse(MINIMAL, name="run.toml", overrides={**fedsa, "evaluation.sites_per_round": "100"})
    with pytest.raises(ConfigError, match="no steps down with this method"):  # by name it is refused, as ever
        config.parse(MINIMAL, name="run.toml", overrides={"aggregation.method": "fedsvd", "wire.down": "int4"})
