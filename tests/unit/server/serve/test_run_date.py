"""A template that prints the day of a run: one day in the manifest, at sites, in every export and in what serves it."""

import datetime
import json
import shutil
from dataclasses import replace

import gguf
import pytest
from transformers import AutoTokenizer

from client.agent.process import EngineLoader
from common.errors import ModelError
from common.frame import wire
from common.model import loading
from common.run import config
from common.run.manifest import date_of, parse
from common.text import prompts, templates
from server.export import folder as export_folder
from server.export import seal
from server.export.folder import Exported
from server.folder import run_files
from server.merge import adapters
from server.merge import folder as merge_folder
from server.run import run
from server.serve import engine as serving
from server.serve import folders, start
from server.serve.requests import Talk
from server.verify import verify
from tests import tiny

TEMPLATE = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + templates.CHATML
LAUNCH, NEXT_DAY = "2026-03-04", "2026-03-05"
PRINTED = "<|im_start|>system\n04 Mar 2026<|im_end|>\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.make_base(tmp_path_factory.mktemp("dated") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def load(base, date):
    return loading.engine_of(tiny.settings(base), base, device_name="cpu", num_threads=1, date=date)


@pytest.fixture(scope="module")
def engine(base):
    return load(base, LAUNCH)


@pytest.fixture(scope="module")
def manifest(base, engine):
    return run.manifest_of(tiny.settings(base), engine)


@pytest.fixture(scope="module")
def export(engine, base, manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "export"
    source = Exported(engine.initial, manifest, 1, {"north": 5}, [])
    export_folder.write(folder, source, formats=("peft", "merged", "gguf"), base=base, llama_cpp=None, key=None)
    return folder


def test_the_manifest_holds_the_day_of_the_launch_where_the_template_prints_one(base, manifest, tiny_base):
    assert parse(manifest.to_bytes()).date == LAUNCH
    plain = [run.manifest_of(tiny.settings(tiny_base), load(tiny_base, date)) for date in (LAUNCH, NEXT_DAY)]
    assert plain[0].date == ""
    assert plain[0].to_bytes() == plain[1].to_bytes()  # without a date in it a run is the same on every day
    with pytest.raises(ValueError, match="load the base with the run's"):
        run.manifest_of(tiny.settings(base), load(base, ""))


def test_a_run_that_goes_on_keeps_its_day(manifest, tmp_path):
    tomorrow = datetime.date.fromisoformat(NEXT_DAY)
    stored = tmp_path / run_files.MANIFEST_FILE
    assert date_of(stored, today=tomorrow) == NEXT_DAY
    run_files.prepare(manifest.run, tmp_path)
    stored.write_bytes(manifest.to_bytes())
    assert date_of(stored, today=tomorrow) == LAUNCH
    assert date_of(None, today=tomorrow) == NEXT_DAY


def test_a_site_renders_the_run_s_day_and_loads_anew_for_another(base, manifest, tmp_path):
    node = config.NodeConfig.model_validate(
        {
            "site": {"name": "north"},
            "data": {"path": "rows.jsonl"},
            "model": {"base": str(base)},
            "hardware": {"device": "cpu", "num_threads": 1},
        }
    )
    loader = EngineLoader(node)
    first = loader.load(manifest)
    row = tiny.row(0)
    assert first.tokenizer.decode(prompts.prompt_ids(row, first.tokenizer)[0]).startswith(PRINTED)
    assert loader.load(manifest) is first
    other = loader.load(replace(manifest, date=NEXT_DAY))
    assert other.tokenizer.decode(prompts.prompt_ids(row, other.tokenizer)[0]).startswith(PRINTED.replace("04", "05"))


def test_every_export_prints_the_run_s_day(base, export, tmp_path):
    talk = [{"role": "user", "content": "hello"}]
    for folder in (export / "peft", export / "merged"):
        template = (folder / "chat_template.jinja").read_text()
        tokenizer = AutoTokenizer.from_pretrained(base)
        assert tokenizer.apply_chat_template(talk, tokenize=False, chat_template=template).startswith(PRINTED), folder
    field = gguf.GGUFReader(export / "gguf" / "model.gguf").get_field("tokenizer.chat_template")
    assert field.contents() == template
    assert verify.verify(export, base=base)
    assert load(export / "merged", NEXT_DAY).date == ""  # who trains on what was merged keeps its date


def test_a_seal_names_the_day_and_one_of_another_day_or_of_none_fails(base, export, tmp_path):
    assert seal.read(export).facts.date == LAUNCH
    for date, message in ((NEXT_DAY, "chat template is not"), ("the 4th", "not a seal")):
        copy = shutil.copytree(export, tmp_path / date)
        sealed = json.loads((copy / seal.FILE).read_bytes())
        sealed["facts"]["date"] = date
        (copy / seal.FILE).write_bytes(wire.canonical_json(sealed))
        with pytest.raises(ModelError, match=message):
            verify.verify(copy, base=base)


def test_adapters_of_runs_of_different_days_are_not_merged(base, export, engine, manifest, tmp_path):
    other = Exported(engine.initial, replace(manifest, date=NEXT_DAY), 1, {"north": 5}, [])
    export_folder.write(tmp_path / "next", other, formats=("peft",), base=base, llama_cpp=None, key=None)
    recipe = adapters.Recipe("linear", (0.5, 0.5))
    with pytest.raises(ModelError, match="of one day only can be merged"):
        merge_folder.write([export, tmp_path / "next"], tmp_path / "both", recipe, name="both")


def test_what_serves_says_which_day_it_uses(base, export):
    served = folders.verified([f"dated={export}"], base)
    assert folders.dates_in_words(served) == ["date in prompts, of the run: 2026-03-04 (dated)"]
    settings = config.ModelConfig(base=str(base), quantization="none")
    models = serving.Models(base, served, settings=settings, device_name="cpu")
    for name in models.names:
        ids = models.chat_ids(name, [Talk(role="user", content="hello")])
        assert models.tokenizer(name).decode(ids).startswith(PRINTED), name
    command = start.vllm_command(base, served, start.Address())
    assert command[-2:] == ["--chat-template", str(export / "peft" / "chat_template.jinja")]
    with pytest.raises(ModelError, match="different dates in their prompts"):
        start.vllm_command(base, [*served, replace(served[0], name="other", date=NEXT_DAY)], start.Address())
    with pytest.raises(ModelError, match="export it again"):
        start.vllm_command(base, [replace(served[0], template_file=None)], start.Address())
