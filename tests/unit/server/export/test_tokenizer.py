"""An export speaks as the run did: the base's own tokenizer, one chat template, and the run's system prompt."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from common.data.rows import Message, Row
from common.errors import ConfigError, ModelError
from common.run import config
from common.text import chat, prompts, templates
from server.export import folder as export_folder
from server.export import gguf as export_gguf
from server.export import seal
from server.export import tokenizer as export_tokenizer
from server.merge import adapters
from server.merge import folder as merge_folder
from server.serve import engine as serving
from server.serve import folders, start
from server.serve.requests import Talk
from server.verify import verify
from tests import tiny
from tests.samples import architectures, exports

PROMPT = 'You are careful.\nSay "I do not know" where {% you %} {{ must }}: Grüße, 漢字 🙂 \\ end'
SPOKEN = {"data.system_prompt": json.dumps(PROMPT, ensure_ascii=False)}
FORMATS = ("peft", "vllm", "merged", "nf4", "gguf")
ASKED = Row((Message("user", "north sees ache 3: code?"), Message("assistant", "ACHE")), unit="", row_id="row")


def save(source, base, folder, *formats):
    export_folder.write(folder, source, formats=formats, base=base, llama_cpp=None, key=None)
    return folder


@pytest.fixture(scope="module")
def spoken(tiny_base, tmp_path_factory):
    """Exports of a run with a system prompt."""
    _, source = exports.drawn(tiny.settings(tiny_base, SPOKEN), tiny_base)
    return save(source, tiny_base, tmp_path_factory.mktemp("spoken") / "export", *FORMATS), source


def rendered(folder, row, template=None):
    """As a user of the folder renders what comes before the answer."""
    talk = [{"role": message.role, "content": message.content} for message in row.messages[:-1]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, chat_template=template)


def gguf_template(folder):
    field = gguf.GGUFReader(folder / "gguf" / "model.gguf").get_field(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    return field.contents()


def test_every_export_renders_a_conversation_as_the_run_with_its_system_prompt(spoken, tiny_base):
    folder, _ = spoken
    trained = prompts.use_template(AutoTokenizer.from_pretrained(tiny_base), "tokenizer")
    wanted = chat.render_prompt(ASKED, trained, system_prompt=PROMPT).text
    assert PROMPT in wanted
    for name in ("merged", "nf4"):
        assert rendered(folder / name, ASKED) == wanted
    for template in (
        (folder / "peft/chat_template.jinja").read_text(encoding="utf-8"),
        (folder / "vllm/tiny/chat_template.jinja").read_text(encoding="utf-8"),
        gguf_template(folder),
    ):
        assert rendered(tiny_base, ASKED, template) == wanted
    own = Row((Message("system", "Be short."), *ASKED.messages), unit="", row_id="row")
    assert rendered(folder / "merged", own) == chat.render_prompt(own, trained).text  # its own stands alone
    assert rendered(tiny_base, ASKED) != wanted  # control


def test_card_modelfile_and_seal_have_it_and_verify_is_content(spoken, tiny_base):
    folder, _ = spoken
    found = verify.verify(folder, base=tiny_base)
    assert found["logits"]["merged"]["from_rounded"] < 1e-5
    text = (folder / "gguf/Modelfile").read_text(encoding="utf-8")
    assert f'\nSYSTEM """{PROMPT}"""\nTEMPLATE """' in text
    for card in (folder / "README.md", folder / "peft/README.md"):
        assert "    You are careful.\n    Say" in card.read_text(encoding="utf-8")
    assert seal.read(folder).facts.system_prompt == PROMPT


def test_serve_gives_it_to_conversations_without_a_system_message(spoken, tiny_base):
    served = folders.verified([str(spoken[0])], tiny_base)
    settings = config.ModelConfig(base=str(tiny_base), quantization="none")
    models = serving.Models(tiny_base, served, settings=settings, device_name="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    wanted, _ = prompts.prompt_ids(ASKED, tokenizer, system_prompt=PROMPT)
    talk = [Talk(role="user", content=ASKED.messages[0].content)]
    assert models.chat_ids("tiny", talk) == wanted
    assert models.chat_ids("base", talk) == prompts.prompt_ids(ASKED, tokenizer)[0]  # control: not the base's
    command = start.vllm_command(tiny_base, served, start.Address())
    assert command[command.index("--chat-template") + 1] == str(spoken[0] / "peft/chat_template.jinja")


def test_vllm_takes_one_system_prompt(spoken, tiny_base, load_tiny, tmp_path):
    plain = exports.write(tmp_path / "plain", load_tiny(), tiny_base, seed=1, template="tokenizer")
    served = folders.verified([str(spoken[0]), str(plain)], tiny_base)
    with pytest.raises(ModelError, match="different system prompts"):
        start.vllm_command(tiny_base, served, start.Address())
    assert "--chat-template" not in start.vllm_command(tiny_base, served[1:], start.Address())  # control


def test_adapters_of_one_system_prompt_are_merged_with_it_and_of_two_not_at_all(spoken, tiny_base, load_tiny, tmp_path):
    plain = exports.write(tmp_path / "plain", load_tiny(), tiny_base, seed=1, template="tokenizer")
    recipe = adapters.Recipe("linear", (0.5, 0.5))
    with pytest.raises(ModelError, match="another system prompt"):
        merge_folder.write([spoken[0], plain], tmp_path / "x", recipe, name="x", base=tiny_base)
    merge_folder.write([spoken[0], spoken[0]], tmp_path / "both", recipe, name="both", base=tiny_base)
    assert "    You are careful.\n" in (tmp_path / "both/README.md").read_text(encoding="utf-8")
    assert seal.read(tmp_path / "both").facts.system_prompt == PROMPT
    assert PROMPT in rendered(
        tiny_base, ASKED, (tmp_path / "both/peft/chat_template.jinja").read_text(encoding="utf-8")
    )


def strip(text):
    return text.removeprefix(export_tokenizer.system_default(PROMPT))


FAULTS = {
    "peft": "peft/chat_template.jinja",
    "vllm": "vllm/tiny/chat_template.jinja",
    "merged": "merged/chat_template.jinja",
    "nf4": "nf4/chat_template.jinja",
}


@pytest.mark.parametrize("where", ["peft", "merged", "gguf", "Modelfile", "README.md", "every template"])
def test_a_system_prompt_that_is_missing_is_found_however_it_was_sealed(spoken, tmp_path, where):
    folder = Path(shutil.copytree(spoken[0], tmp_path / "export"))
    sealed = seal.read(folder)
    facts = sealed.facts
    if where in FAULTS:
        path = folder / FAULTS[where]
        path.write_text(strip(path.read_text(encoding="utf-8")), encoding="utf-8")
    elif where == "gguf":
        path = folder / "merged/chat_template.jinja"
        text = path.read_text(encoding="utf-8")
        path.write_text(strip(text), encoding="utf-8")
        (folder / "gguf/model.gguf").unlink()
        export_gguf.convert(folder / "merged", folder / "gguf/model.gguf", name="tiny")
        path.write_text(text, encoding="utf-8")
    elif where == "Modelfile":
        (folder / "gguf/Modelfile").write_text(export_gguf.modelfile(folder / "merged"))
    elif where == "README.md":
        card = folder / "README.md"
        card.write_text(card.read_text(encoding="utf-8").replace("You are careful", "You"), encoding="utf-8")
    else:
        import hashlib
        from dataclasses import replace

        for path in (folder / fault for fault in FAULTS.values()):
            path.write_text(strip(path.read_text(encoding="utf-8")), encoding="utf-8")
        plain = (folder / "peft/chat_template.jinja").read_bytes()
        facts = replace(facts, chat_template_sha256=hashlib.sha256(plain).hexdigest())
    (folder / seal.FILE).unlink()
    specs = [seal.TensorSpec(name, tuple(shape)) for name, shape in sealed.adapter.items()]
    seal.write(folder, facts, specs=specs, key=None)
    with pytest.raises(ModelError, match=r"chat template|Modelfile|system prompt"):
        verify.verify(folder)


def test_a_system_prompt_that_a_modelfile_cannot_hold_is_refused_before_anything_is_merged(tiny_base, tmp_path):
    changes = {"data.system_prompt": json.dumps('Quote in """ three.')}
    _, source = exports.drawn(tiny.settings(tiny_base, changes), tiny_base)
    with pytest.raises(ConfigError, match=r'gguf: data\.system_prompt holds """'):
        export_folder.check(source, formats=("gguf",), base=tiny_base, llama_cpp=None)
    export_folder.check(source, formats=("merged",), base=tiny_base, llama_cpp=None)  # control


# --- the tokenizer itself -------------------------------------------------------------------------------------------

NAMED = [
    {"name": "default", "template": templates.CHATML},
    {"name": "tool_use", "template": "{{ tools }}" + templates.CHATML},
]


def named_base(folder, templates):
    """A base whose tokenizer has named templates in the way of transformers 4, and no pad token."""
    base = tiny.make_base(folder)
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    settings |= {"chat_template": templates, "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return base


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A base with named templates, and its exports."""
    base = named_base(tmp_path_factory.mktemp("named") / "base", NAMED)
    _, source = exports.drawn(tiny.settings(base), base)
    return base, save(source, base, tmp_path_factory.mktemp("named") / "export", "peft", "merged", "nf4", "gguf")


def test_of_named_chat_templates_the_default_is_exported_as_a_template(named):
    base, folder = named
    assert isinstance(AutoTokenizer.from_pretrained(base).chat_template, dict)
    for text in ((folder / "peft/chat_template.jinja").read_text(), gguf_template(folder)):
        assert text == templates.CHATML
    for name in ("merged", "nf4"):
        assert AutoTokenizer.from_pretrained(folder / name).chat_template == templates.CHATML
    assert verify.verify(folder, base=base)["formats"] == ["peft", "merged", "nf4", "gguf"]


def test_named_chat_templates_without_a_default_are_refused_at_load(tmp_path):
    base = named_base(tmp_path / "base", [{**NAMED[1], "name": "rag"}, NAMED[1]])
    with pytest.raises(ModelError, match="has the chat templates rag, tool_use, and none is the default"):
        exports.drawn(tiny.settings(base), base)
    exports.drawn(tiny.settings(base, {"model.chat_template": '"chatml"'}), base)  # control: the remedy


def test_an_exported_tokenizer_is_the_base_s_own_files_but_for_the_template(named):
    base, folder = named
    wanted = json.loads((base / "tokenizer_config.json").read_text())
    for name in ("merged", "nf4"):
        assert (folder / name / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        found = json.loads((folder / name / "tokenizer_config.json").read_text())
        assert found == {key: value for key, value in wanted.items() if key in found}
        assert wanted.keys() - found.keys() <= {"chat_template", "auto_map", "is_local", "name_or_path"}
        loaded = AutoTokenizer.from_pretrained(folder / name)
        assert loaded.pad_token is None  # the run pads with the end token
        assert export_tokenizer.differences(loaded, AutoTokenizer.from_pretrained(base)) == []


def test_a_class_of_transformers_that_the_file_does_not_fit_is_refused_before_anything_is_kept(tmp_path):
    """Of type qwen2, whatever class is named: who loads a merged checkpoint would get other tokens."""
    base = architectures.make("qwen2", tmp_path / "base")  # with that class's own file, which is exported in test_bases
    tiny.make_tokenizer().save_pretrained(base)
    _, source = exports.drawn(tiny.settings(base), base)
    with pytest.raises(ModelError, match=r"cuts text for this type of model by a class of its own.*export peft"):
        save(source, base, tmp_path / "export", "merged")
    assert not (tmp_path / "export").exists()
    save(source, base, tmp_path / "export", "peft")  # the remedy


def test_a_tokenizer_that_is_another_one_is_found_on_the_base(named, tmp_path):
    base, whole = named
    folder = Path(shutil.copytree(whole, tmp_path / "export"))
    path = folder / "merged/tokenizer.json"
    stored = json.loads(path.read_text())
    stored["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, stored["pre_tokenizer"]],
    }
    stored["model"]["merges"] = stored["model"]["merges"][:1]
    path.write_text(json.dumps(stored))
    sealed = seal.read(folder)
    (folder / seal.FILE).unlink()
    specs = [seal.TensorSpec(name, tuple(shape)) for name, shape in sealed.adapter.items()]
    seal.write(folder, sealed.facts, specs=specs, key=None)
    verify.verify(folder)  # without the base nobody can tell
    with pytest.raises(ModelError, match=r"merged: its tokenizer is not the base's \(text in tokens differs\)"):
        verify.verify(folder, base=base)
