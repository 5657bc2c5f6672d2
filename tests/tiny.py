"""A tiny base, tiny sites and tiny runs: seconds where real ones take minutes. Seeds are fixed."""

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from common.data.rows import Message, Row
from common.run import config
from common.run.schema import shape

WORDS = ("ache", "burn", "cold", "dose", "ear", "fall", "gut", "heart", "itch", "jaw", "knee", "lung")
RUN_FILE = """
version = 1
name = "tiny"
seed = 5
model.base = "{base}"
model.quantization = "none"
adapter.r = 4
adapter.alpha = 8
data.max_length_tokens = 64
training.batch_size = 4
training.learning_rate = 2e-2
training.local_epochs = 1.0
federation.num_rounds = 2
federation.min_sites = 2
federation.num_sites = 3
federation.round_timeout_s = 60
privacy.mode = "none"
wire.dtype = "float32"
wire.down = "float32"
"""
NOISED = {
    "privacy.mode": "unit",
    "privacy.sampling_prob": "0.1",
    "privacy.noise_multiplier": "1.0",
    "training.local_steps": "2",
    "training.local_epochs": "0.0",
}  # changes that make a run private for units
SMALL = {"r": "4", "alpha": "8.0", "num_virtual_tokens": "4"}


def settings(base: Path | str, changes: Mapping[str, str] | None = None, *, more: str = "") -> config.RunConfig:
    """A run of two rounds; `changes` are as on the command line. A kind of adapter begins with its own defaults."""
    lines = RUN_FILE.format(base=base).splitlines()
    kept = [line for line in lines if "adapter.kind" not in (changes or {}) or not line.startswith("adapter.")]
    return config.parse("\n".join([*kept, more]), name="run.toml", overrides=changes or {})


def of_kind(kind: str, **more: str) -> dict[str, str]:
    """Changes that give a run a small adapter of this kind."""
    has = shape.tables_of(config.RunConfig)["adapter"].variants[kind].model_fields
    return {"adapter.kind": kind, **{f"adapter.{key}": value for key, value in SMALL.items() if key in has}, **more}


def row(number: int, *, site: str = "north") -> Row:
    """A question with a rule behind its answer, so that a few steps lower the loss."""
    word = WORDS[number % len(WORDS)]
    question = Message("user", f"{site} sees {word} {number % 7}: code?")
    return Row((question, Message("assistant", word.upper())), unit=f"{site}-{number // 2}", row_id=f"row {number}")


def pair(number: int, *, site: str = "north", is_swapped: bool = False) -> Row:
    """The same question with the right answer preferred to that of the next word, or the other way round."""
    right, wrong = row(number, site=site), row(number + 1, site=site)
    both = (right.messages, (right.messages[0], wrong.messages[-1]))
    chosen, rejected = both[::-1] if is_swapped else both
    return replace(right, messages=chosen, rejected=rejected, num_context=1)


def rated(number: int, *, site: str = "north", is_swapped: bool = False) -> Row:
    """One of the two answers, and whether it is the right one; the other way round if swapped."""
    both, is_right = pair(number, site=site), number % 3 != 0
    messages = both.messages if is_right else both.rejected
    return replace(both, messages=messages, rejected=(), is_desirable=is_right != is_swapped)


def rows(count: int, *, site: str = "north") -> list[Row]:
    """The first `count` rows of a site; two rows a unit."""
    return [row(number, site=site) for number in range(count)]


CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def make_base(folder: Path, *, control: tuple[str, ...] = CONTROL, end: str = "<|im_end|>") -> Path:
    """A Llama of two layers with random weights, and a byte-level tokenizer with a chat template, as files.

    `control` are the tokenizer's first tokens, `end` is the one that it calls its end token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer(control, end)
    tokenizer.save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def exact_logits(network, ids_bt):
    """What a model computes in float64: in float32 two orders of summation, so two processors, differ by over 1e-5."""
    import torch

    def norm(x, *, layer):  # transformers' own goes through float32
        return layer.weight * x * (x.square().mean(-1, keepdim=True) + layer.variance_epsilon).rsqrt()

    exact = copy.deepcopy(network).double().eval()
    for layer in exact.modules():
        if hasattr(layer, "variance_epsilon"):
            layer.forward = functools.partial(norm, layer=layer)
    with torch.no_grad():
        return exact(input_ids=ids_bt).logits


def make_tokenizer(control: tuple[str, ...] = CONTROL, end: str = "<|im_end|>"):
    """Byte-level BPE with a few merges, trained on the rows above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from common.text import templates

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message.content for number in range(84) for message in row(number).messages]
    core.train_from_iterator(texts, trainer)
    built = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token="<|pad|>")
    built.chat_template = templates.CHATML
    return built


SITES = {"north": 16, "south": 12, "west": 8}  # rows


def site_data(site: str, count: int):
    """A site's rows, the last quarter held out."""
    from client.agent.agent import SiteData

    table = rows(count, site=site)
    num_train = 3 * count // 4
    return SiteData(table[:num_train], table[num_train:])


def make_agent(site: str, engine, *, count: int = 12, errors: list[Exception] | None = None, data=None, folder=None):
    """A site on an engine that may be shared; what it could not do goes to `errors`, what stays with it to `folder`."""
    from client.agent.agent import Agent
    from client.agent.shelf import Shelf

    told = [] if errors is None else errors
    found = data or site_data(site, count)
    return Agent(
        site,
        load_data=lambda _: found,
        load_engine=lambda _: engine,
        report=lambda reference, error: told.append(error),
        shelf=Shelf(folder) if folder else None,
    )


def fake_time():
    """A clock and a sleep that moves it; no test waits."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return lambda: now[0], sleep


def silent(_: bytes) -> None:
    """A node that takes a frame and never answers."""


def mute(answer, kind: str):
    """A node that never answers one kind of request."""
    from common.frame import wire

    return lambda frame: None if wire.unpack(frame, max_body_bytes=1 << 24).kind == kind else answer(frame)


def spoilt(answer, kind: str, change):
    """A node whose answers to one kind of request go through `change`; the control is `change=lambda frame: frame`."""
    from common.frame import wire

    def node(frame: bytes) -> bytes | None:
        reply = answer(frame)
        return change(reply) if wire.unpack(frame, max_body_bytes=1 << 24).kind == kind else reply

    return node


def with_head(**changes: object):
    """A change for `spoilt`: the same frame with other values in its head."""
    from common.frame import wire

    def change(frame: bytes) -> bytes:
        found = wire.unpack(frame, max_body_bytes=1 << 24)
        return wire.pack(wire.Frame(found.kind, {**found.head, **changes}, found.body))

    return change


def with_body(alter):
    """A change for `spoilt`: the same frame with its body altered, and a right hash."""
    from common.frame import wire

    def change(frame: bytes) -> bytes:
        found = wire.unpack(frame, max_body_bytes=1 << 24)
        return wire.pack(wire.Frame(found.kind, found.head, alter(found.body)))

    return change


def fleet(answers):
    """Functions that answer frames as nodes."""
    from simulations.world.run import InProcessFleet

    return InProcessFleet(answers)


def write_table(path: Path) -> Path:
    """The rows of all sites as one JSONL file with a column `site`."""
    lines = [
        {
            "instruction": found.messages[0].content,
            "output": found.messages[1].content,
            "patient_id": found.unit,
            "site": site.capitalize(),
        }
        for site, count in SITES.items()
        for found in rows(count, site=site)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def federation(engine, folder: Path, nodes, settings: config.RunConfig):
    """The coordinator of functions that answer frames, by node id; its clock moves only when somebody sleeps."""
    from common.events import EventLog
    from common.run.manifest import RunManifest
    from server.fleet.run import Run
    from tests.samples.coordinator import Coordinator

    clock, sleep = fake_time()
    manifest = RunManifest(settings, engine.base_sha256, engine.tensor_specs, engine.codes_sha256)
    return Coordinator(Run(manifest, folder, EventLog(folder / "events.jsonl"), clock=clock, sleep=sleep), fleet(nodes))


def make_nodes(engine, folder: Path | None = None):
    """North, south and west as nodes 1, 2 and 3; what stays with a site is in a folder of its name."""
    places = {site: folder / site if folder else None for site in SITES}
    named = enumerate(SITES.items(), start=1)
    return {n: make_agent(site, engine, count=count, folder=places[site]).answer for n, (site, count) in named}


@contextmanager
def padded(model) -> Iterator[None]:
    """Rows reach the model padded to one length, as if it did not keep those of one line apart."""
    from common.model import varlen

    traits = varlen.traits_of(model)
    varlen._traits[model] = replace(traits, can_pack=False)
    try:
        yield
    finally:
        varlen._traits[model] = traits


def private_step(engine, rows, privacy, source) -> None:
    """Set the gradients of one private step, as training under unit privacy takes them."""
    from client.train import private
    from common.adapter import adapter

    units = private.population(rows, dp_delta=privacy.dp_delta)
    mechanism = private.Mechanism(units, parameters=adapter.parameters(engine.model), privacy=privacy, source=source)
    with private.prepared(engine, method=privacy.clipping) as (take, _):
        mechanism.set_gradients(([unit] for unit in mechanism.draw()), take=take)
