import json
import re
import tomllib
from pathlib import Path

import pytest

from common.run import config
from common.run import pages as config_docs
from common.run.problems import foreign
from common.run.rules import rules
from common.run.schema import section as config_types
from common.run.schema import shape

REPOSITORY = Path(__file__).resolve().parents[4]
BLOCK = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)


def parse_any(text: str, name: str) -> None:
    parse = config.parse_node if "site" in tomllib.loads(text) else config.parse
    parse(text, name=name)


def toml_files() -> list[Path]:
    return sorted(path for folder in ("simulations/configs", "docs") for path in (REPOSITORY / folder).rglob("*.toml"))


def example_blocks() -> list[tuple[str, str]]:
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    blocks = [(str(page.relative_to(REPOSITORY)), block) for page in pages for block in BLOCK.findall(page.read_text())]
    return sorted((page, block) for page, block in blocks if "version = 1\n" in block or "[site]\n" in block)


@pytest.mark.parametrize("path", toml_files(), ids=lambda path: path.name)
def test_every_config_in_the_repository_loads(path: Path):
    parse_any(path.read_text(), str(path))


@pytest.mark.parametrize(("page", "block"), example_blocks())
def test_every_config_in_the_documentation_loads(page: str, block: str):
    parse_any(block, page)


def test_documentation_has_examples():
    assert len([page for page, _ in example_blocks() if page == "docs/config.md"]) == 3


def test_document_is_up_to_date():
    assert config_docs.main(["--check"]) == 0


def test_stale_or_missing_document_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "config.md"
    assert config_docs.main(["--check", "--file", str(path)]) == 1
    path.write_text(config_docs.render() + "\n")
    assert config_docs.main(["--check", "--file", str(path)]) == 1
    assert "python -m common.run.pages" in capsys.readouterr().err


def test_document_is_written(tmp_path: Path):
    path = tmp_path / "config.md"
    assert config_docs.main(["--file", str(path)]) == 0
    assert config_docs.main(["--check", "--file", str(path)]) == 0


def test_complete_example_is_the_minimal_one_with_defaults():
    whole = config.parse(config_docs.example(config.RunConfig), name="whole")
    overrides = {"model.base": "smollm2", "model.quantization": "nf4"}
    assert whole == config.parse(config_docs.MINIMAL, name="minimal", overrides=overrides)


@pytest.mark.parametrize("schema", [config.RunConfig, config.NodeConfig])
def test_complete_example_has_every_setting(schema: type[config_types.Section]):
    path, found = "", []
    for line in config_docs.example(schema).splitlines():
        path = line.strip("[]") if line.startswith("[") else path
        if setting := re.match(r"(?:# )?([a-z_0-9]+) = ", line):
            found.append(shape.join(path, setting[1]))
    assert tuple(dict.fromkeys(found)) == shape.keys_of(schema)


def test_document_names_every_setting_rule_and_foreign_name():
    text = config_docs.render()
    for schema in (config.RunConfig, config.NodeConfig):
        assert all(f"| `{key.split('.')[-1]}` |" in text for key in shape.keys_of(schema))
    assert all(f"| `{name}` |" in text for name in foreign.FOREIGN)
    assert all(f"| {rule.message} | {rule.remedy} |" in text for rule in (*rules.RUN_RULES, *rules.NODE_RULES))


def test_document_shows_a_real_error():
    assert "7 problems in run.toml\n" in config_docs.render()


def test_tables_have_as_many_cells_as_columns():
    for line in config_docs.render().splitlines():
        if line.startswith("| `"):
            assert len(re.split(r"(?<!\\)\|", line)) in (4, 5, 6), line


@pytest.mark.parametrize(("name", "schema"), [("run", config.RunConfig), ("node", config.NodeConfig)])
def test_json_schema_is_printed(name: str, schema: type[config_types.Section], capsys: pytest.CaptureFixture[str]):
    assert config_docs.main(["--schema", name]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(printed["properties"]) == set(schema.model_fields)
    assert printed["additionalProperties"] is False


def test_every_pattern_has_words():
    for schema in (config.RunConfig, config.NodeConfig):
        assert set(re.findall(r'"pattern": (".*")', config_docs.json_schema(schema))) <= {
            json.dumps(pattern) for pattern in config_types.PATTERNS
        }
