"""Every architecture of docs/bases.md goes from load to serve: what its row says is possible works, the rest is refused
before round 1."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from common import events
from common.adapter import adapter
from common.errors import ConfigError, ModelError
from common.model import base as model
from common.model import loading
from server.export import seal
from server.folder import run_files
from server.run import export, finish, run
from server.serve import engine as serving
from server.serve import folders
from server.serve.engine import Answer, Sampling
from server.serve.requests import Talk
from server.verify import rehearsal
from tests import tiny
from tests.samples import architectures, exports

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
PRECISIONS = ("none", "nf4", "int8")
WRITTEN = ("peft", "vllm", "merged", "nf4", "int8", "gguf", "onnx")
PLAIN = ("peft", "vllm", "merged", "nf4", "int8", "onnx")
EXPERTS = ("peft", "vllm", "merged")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


class Base(NamedTuple):
    """What is possible with one architecture."""

    title: str
    precisions: tuple[str, ...] = PRECISIONS
    targets: tuple[str, ...] = ("all-linear",)
    formats: tuple[str, ...] = PLAIN


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BASES = {
    "llama": Base("Llama", formats=WRITTEN),
    "mistral": Base("Mistral"),
    "qwen2": Base("Qwen2"),
    "qwen3": Base("Qwen3"),
    "phi3": Base("Phi-3"),
    "gemma2": Base("Gemma 2"),
    "gemma3": Base("Gemma 3, text"),
    "gpt2": Base("GPT-2"),
    "bloom": Base("BLOOM"),
    "opt": Base("OPT"),
    "gpt_neox": Base("GPT-NeoX"),
    "falcon": Base("Falcon", precisions=("none",), formats=(*EXPERTS, "onnx")),
    "mixtral": Base("Mixtral", precisions=("none",), targets=ATTENTION, formats=EXPERTS),
    "qwen3_moe": Base("Qwen3-MoE", precisions=("none",), targets=ATTENTION, formats=EXPERTS),
}


def table() -> str:
    """The table of docs/bases.md."""

    def mark(is_possible: bool) -> str:
        return "yes" if is_possible else "no"

    head = ["base", *(f"trains in {one}" for one in PRECISIONS), "`adapter.targets`", *(f"`{one}`" for one in WRITTEN)]
    rows = [head, ["---"] * len(head)]
    for one in BASES.values():
        trains = [mark(precision in one.precisions) for precision in PRECISIONS]
        rows.append(
            [one.title, *trains, f"`{', '.join(one.targets)}`", *(mark(name in one.formats) for name in WRITTEN)]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_of_bases_is_the_table_that_is_tried():
    assert table() in PAGE.read_text(encoding="utf-8")
    assert set(BASES) == set(architectures.NAMES)


def settings_of(name, base, **changes):
    return tiny.settings(
        base, {"adapter.targets": json.dumps(BASES[name].targets), "federation.num_rounds": "1", **changes}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_base_goes_from_load_to_serve(name, tmp_path):
    base, wanted = architectures.make(name, tmp_path / "base"), BASES[name]
    formats = [one for one in wanted.formats if one != "onnx"]  # below: it takes a minute
    settings = settings_of(name, base, **{"export.formats": json.dumps(formats)})
    engine = loading.engine_of(settings, base, device_name="cpu", num_threads=1, trains=True)
    folder = tmp_path / "run"
    log = run_files.prepare(settings, folder, resume=False)
    run.execute(settings, fleet=tiny.fleet(tiny.make_nodes(engine)), engine=engine, folder=folder, log=log)

    told = events.read(folder / events.FILE)
    [exported] = [one for one in told if one["kind"] == "exported"]
    assert exported["formats"] == formats
    logits = exported["logits"]
    assert logits["base"]["difference"] > 1e-3  # it was trained
    for one in ("merged", "gguf"):
        assert one not in logits or logits[one]["from_rounded"] < 1e-5
    losses = [one["loss"] for one in told if one["kind"] == "evaluated"]
    assert losses[-1] < losses[0]

    served = folders.verified([str(folder / export.FOLDER)], base)
    models = serving.Models(base, served, settings=settings.model, device_name="cpu")
    ids = models.chat_ids("tiny", [Talk(role="user", content=tiny.row(1).messages[0].content)])
    found = "".join(models.answer("tiny", ids, Sampling(8, temperature=0), Answer(len(ids))))
    adapter.write(engine.model, finish.stored(folder, num_rounds=0).tensors)
    assert found == model.answer(engine, [ids], max_new_tokens=8)[0]
    assert seal.read(folder / export.FOLDER).facts.probe["effect"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_base_becomes_an_onnx_graph_or_it_is_said_before_the_first_round(name, tmp_path):
    pytest.importorskip("onnxruntime")
    base = architectures.make(name, tmp_path / "base")
    settings, order = settings_of(name, base), rehearsal.Order(("peft", "onnx"))
    if "onnx" in BASES[name].formats:
        rehearsal.rehearse(settings, base, base_sha256=name, order=order)
        return
    with pytest.raises(ModelError, match=r"small random model .*torch cannot export .*leave onnx out"):
        rehearsal.rehearse(settings, base, base_sha256=name, order=order)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_what_a_base_cannot_have_is_refused_before_the_first_round(name, tmp_path):
    base, wanted = architectures.make(name, tmp_path / "base"), BASES[name]
    for precision in PRECISIONS:
        settings = settings_of(name, base, **{"model.quantization": precision})
        if precision in wanted.precisions:
            loading.engine_of(settings, base, device_name="cpu", num_threads=1)
            continue
        with pytest.raises(ModelError, match="of the weights of this base's layers"):
            loading.engine_of(settings, base, device_name="cpu", num_threads=1)
    engine, _ = exports.drawn(settings_of(name, base), base)
    for one in (one for one in WRITTEN if one not in (*wanted.formats, "onnx")):
        asked = settings_of(name, base, **{"export.formats": f'["peft", "{one}"]'})
        manifest = run.manifest_of(asked, engine)
        with pytest.raises((ConfigError, ModelError), match=r"give --llama-cpp DIR|of the weights of this base's"):
            export.check(manifest, engine)
    if wanted.targets == ATTENTION:
        with pytest.raises(ModelError, match="tensors that are no linear layers"):
            exports.drawn(tiny.settings(base, {"adapter.targets": '["all-linear"]'}), base)
