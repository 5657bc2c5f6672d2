"""Nothing that one unit does reaches the gradient of another; each guard has a control in which it is off."""

import dataclasses
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from client.train import coupling, loop, private
from common.adapter import adapter
from common.errors import PrivacyError
from common.frame import wire
from common.loss import objectives, preference_score
from common.model import base as model
from common.model import loading
from common.privacy import noise
from common.privacy.noise import SeededNoise
from common.run import config, manifest
from common.run.schema.privacy import UnitPrivacy
from common.run.schema.training import Dpo
from tests import tiny
from tests.samples import architectures

CLIP_NORM = 0.01
NUM_UNITS = 12
HAVE_DROPOUT = {"gpt2", "opt"}  # by the default values of their configurations
DPO = Dpo(beta=0.3)


@contextmanager
def in_training_mode(network):
    """What training did before: masks from a public seed, in the order of the units."""
    network.train()
    torch.manual_seed(1)
    yield


@pytest.fixture
def unguarded(monkeypatch):
    """The guards off, one after the other."""
    return {
        "mode": lambda: monkeypatch.setattr(private, "uncoupled", in_training_mode),
        "watch": lambda: monkeypatch.setattr(private, "_watched", lambda network, modules: nullcontext()),
    }


def moved(engine, population, objective=objectives.SFT, *, at_once: int = 1) -> float:
    """How far the first unit moves the clipped sum, in units of C; all gradients are longer than C."""
    sums = []
    with torch.random.fork_rng():
        for some in (population, population[1:]):
            way = "stacked" if at_once > 1 else "auto"
            with private.prepared(engine, method=way, objective=objective) as (take, _):
                batches = (some[start : start + at_once] for start in range(0, len(some), at_once))
                size = adapter.num_parameters(engine.tensor_specs)
                given = {"take": take, "clip_norm": CLIP_NORM, "num_parameters": size, "device": engine.device}
                total, norms = private.clipped_sum(batches, **given)
                assert float(norms.min()) > CLIP_NORM
                sums.append(total)
    return float((sums[0] - sums[1]).norm()) / 2**noise.GRID_BITS


def longer(row):
    """The same row with a question of more tokens, so that others beside it are padded further."""
    question = dataclasses.replace(row.messages[0], content=row.messages[0].content + " q" * 9)
    rejected = (question, *row.rejected[1:]) if row.rejected else ()
    return dataclasses.replace(row, messages=(question, *row.messages[1:]), rejected=rejected)


def some_units(engine, count: int = NUM_UNITS):
    return [[row] for row in model.encode(engine, tiny.rows(count), tiny.settings("tiny").data)[0]]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's layers
@pytest.mark.parametrize("name", architectures.NAMES)
def test_no_architecture_couples_units_and_with_the_guard_off_dropout_does(name, tmp_path, unguarded):
    """Each with its default configuration; the controls have dropout in the adapter, and that of GPT-2 and OPT."""
    is_mixture = name in ("mixtral", "qwen3_moe")  # whose experts take no dropout of an adapter
    jitter = {"router_jitter_noise": 0.1} if name == "mixtral" else {}
    base = architectures.make(name, tmp_path, num_hidden_layers=1, **jitter)
    targets = {"adapter.targets": '["q_proj", "v_proj"]'} if is_mixture else {}
    settings = tiny.settings(base, {"adapter.dropout": "0.1", **targets})
    engine = loading.engine_of(settings, base, device_name="cpu", num_threads=1, trains=True)
    coupling.check(engine)
    if name in HAVE_DROPOUT:
        assert moved(engine, some_units(engine)) <= 1
    unguarded["mode"]()
    with pytest.raises(PrivacyError, match="random numbers"):
        coupling.check(engine)
    unguarded["watch"]()
    with pytest.raises(PrivacyError, match="coupling probe"):
        coupling.check(engine)
    if name in HAVE_DROPOUT:
        assert moved(engine, some_units(engine)) > 1.3


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt_tuning", "prefix_tuning", "ln_tuning"])
def test_no_kind_of_adapter_couples_units(load_tiny, kind):
    coupling.check(load_tiny(tiny.of_kind(kind)))


def in_place_of_norm(engine, module, monkeypatch):
    """The last norm of the base goes through `module` as well."""
    norm = engine.model.base_model.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda x, whole=norm.forward: module(whole(x)))
    monkeypatch.setitem(norm._modules, "also", module)


class Jitter(torch.nn.Module):
    """Noise that does not ask for the mode."""

    def forward(self, x):
        return x * (1 + 0.1 * torch.rand_like(x))


class Statistics(torch.nn.Module):
    """Statistics that are followed in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return x - self.mean


class Memory(torch.nn.Module):
    """What no buffer and no generator shows."""

    seen = 0

    def forward(self, x):
        self.seen += x.shape[1]
        return x * (1 + 0.01 * self.seen)


class BatchStatistics(torch.nn.Module):
    """Batch normalisation over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(64)

    def forward(self, x):
        return self.norm(x.mT).mT


@pytest.mark.parametrize(
    ("module", "told"), [(Jitter, "random numbers"), (Statistics, "changed .*mean"), (Memory, "coupling probe")]
)
def test_a_base_with_something_that_couples_is_refused_by_the_probe(engine, monkeypatch, module, told):
    in_place_of_norm(engine, module(), monkeypatch)
    with pytest.raises(PrivacyError, match=told):
        coupling.check(engine)


def test_statistics_of_batches_are_those_of_the_files_and_couple_in_training_mode(engine, monkeypatch, unguarded):
    in_place_of_norm(engine, BatchStatistics(), monkeypatch)
    assert moved(engine, some_units(engine)) <= 1
    coupling.check(engine)
    unguarded["mode"]()
    with pytest.raises(PrivacyError, match=r"changed .*(running_mean|num_batches)"):
        coupling.check(engine)


@pytest.mark.parametrize("stage", ["probe", "step"])
def test_an_agent_refuses_a_private_run_on_a_base_that_couples(engine, tiny_base, monkeypatch, stage):
    """The controls: a run without privacy, and a base without it."""
    private_run, plain_run = (tiny.settings(tiny_base, changes) for changes in (tiny.NOISED, {}))
    errors: list[Exception] = []

    def opened(run) -> str:
        agent = tiny.make_agent("north", engine, errors=errors)
        offer = manifest.RunManifest(run, engine.base_sha256, engine.tensor_specs, engine.codes_sha256)
        return wire.unpack(agent.answer(offered(offer)), max_body_bytes=1 << 24).kind

    assert opened(private_run) == "opened"
    in_place_of_norm(engine, Jitter(), monkeypatch)
    if stage == "step":  # the probe was passed before, and every step looks again
        with pytest.raises(PrivacyError, match="random numbers"):
            one_step(engine, some_units(engine))
        return
    coupling._passed.clear()
    assert opened(plain_run) == "opened"
    assert opened(private_run) == "refused"
    assert isinstance(errors[-1], PrivacyError)


def offered(run_manifest) -> bytes:
    return wire.pack(wire.Frame("open", {}, run_manifest.to_bytes()))


def one_step(engine, population, **changes):
    """The gradient of one private step, flattened; every unit is in it unless `changes` say otherwise."""
    given = {"mode": "unit", "sampling_prob": 1.0, "noise_multiplier": 2.0**-20, "clip_norm": 1.0} | changes
    rows = [row for unit in population for row in unit]
    tiny.private_step(engine, rows, UnitPrivacy(**given), SeededNoise(1))
    own = adapter.parameters(engine.model)
    return torch.cat([own[name].grad.flatten() for name in sorted(own)])


def test_in_bfloat16_units_are_apart_to_the_bit_and_together_in_a_pass_they_are_not(load_tiny):
    engine = load_tiny({"model.dtype": '"bfloat16"'})
    stirred = {name: tensor + 0.05 for name, tensor in engine.initial.items()}
    adapter.write(engine.model, stirred)
    coupling.check(engine)
    long = model.encode(engine, [longer(tiny.row(0))], tiny.settings("tiny").data)[0]
    population = [long, *some_units(engine)]
    assert moved(engine, population) <= 1
    with tiny.padded(engine.model):
        assert moved(engine, population, at_once=len(population)) > 1 + 1e-4


def test_pairs_of_answers_couple_neither_by_the_model_nor_by_their_references(load_tiny, unguarded):
    engine = load_tiny({"model.dtype": '"bfloat16"', "adapter.dropout": "0.1"})
    rows = [longer(tiny.pair(0)), *(tiny.pair(number) for number in range(1, 9))]
    run = tiny.settings("tiny", {"training.objective.kind": '"dpo"'})
    examples = objectives.encode(engine, rows, run)[0]
    begun = {name: tensor + 0.05 for name, tensor in engine.initial.items()}

    def references(some, batch_size):
        return by_row(preference_score.with_references(engine, some, begun, batch_size=batch_size))

    assert len(examples[0].rows[0].input_ids) > 5 + len(examples[1].rows[0].input_ids)
    for batch_size, is_apart in ((1, True), (9, False)):  # the control is scored together, beside padding
        with nullcontext() if is_apart else tiny.padded(engine.model):
            others = references(examples[1:], batch_size)
            assert (others.items() <= references(examples, batch_size).items()) is is_apart
    coupling.check(engine, objective=DPO)
    unguarded["mode"]()
    unguarded["watch"]()
    with pytest.raises(PrivacyError, match="coupling probe"):
        coupling.check(engine, objective=DPO)


def test_an_agent_scores_pairs_of_a_private_run_one_by_one(load_tiny, tiny_base):
    """The control is the same run without privacy, its rows padded."""
    engine = load_tiny({"model.dtype": '"bfloat16"'})
    found = {}
    for is_private in (True, False):
        changes = {
            "training.objective.kind": '"dpo"',
            "model.dtype": '"bfloat16"',
            **(tiny.NOISED if is_private else {}),
        }
        for count in (8, 9):
            rows = [*(tiny.pair(number) for number in range(8)), *([longer(tiny.pair(9))] if count == 9 else [])]
            agent = tiny.make_agent("north", engine, data=_site_data(rows))
            run = manifest.RunManifest(
                tiny.settings(tiny_base, changes), engine.base_sha256, engine.tensor_specs, engine.codes_sha256
            )
            agent.answer(offered(run))
            with_b = {name: tensor + 0.05 for name, tensor in engine.initial.items()}
            engine_begun = dataclasses.replace(engine, initial=with_b)
            opened = dataclasses.replace(agent._open_run(), engine=engine_begun)
            with nullcontext() if is_private else tiny.padded(engine.model):
                found[is_private, count] = by_row(opened.train_preferences)
    assert found[True, 8].items() < found[True, 9].items()
    assert not found[False, 8].items() < found[False, 9].items()


def by_row(examples):
    """References by what they are of."""
    return {(example.unit, tuple(example.rows[0].input_ids)): example.reference for example in examples}


def _site_data(rows):
    from client.agent.agent import SiteData

    return SiteData(rows, [tiny.pair(40)])


def test_what_is_released_is_whole_steps_of_the_grid(engine):
    """With noise so weak that float32 holds all digits; unrounded gradients would lie between."""
    population = some_units(engine, 1)
    released = one_step(engine, population, clip_norm=2.0**-10).double() * 2**40
    assert torch.equal(released, released.round())
    with private.prepared(engine, method="auto") as (take, _):
        raw = take(population)[0].double()
    raw *= 2**30 / raw.norm()
    assert float((raw - raw.round()).abs().max()) > 0.4  # control


def test_a_sum_does_not_depend_on_the_order_of_units_and_in_float32_it_would():
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(40, 500, generator=generator)
    order = torch.randperm(40, generator=generator)
    sums = [private.clip(some, clip_norm=3.0)[0] for some in (gradients, gradients[order])]
    assert torch.equal(*sums)
    assert not torch.equal(gradients.sum(0), gradients[order].sum(0))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e12])
@pytest.mark.parametrize("clip_norm", [1e-3, 0.3, 7.0])
def test_what_a_unit_adds_is_no_longer_than_the_clip_norm_in_whole_numbers(scale, clip_norm):
    """By Python's own integers, which do not round; rounding to the nearest step makes vectors longer."""
    gradient = scale * torch.randn(1, 3000, generator=torch.Generator().manual_seed(3))
    steps, _ = private.clip(gradient, clip_norm=clip_norm)
    assert sum(int(step) ** 2 for step in steps.tolist()) <= 2 ** (2 * noise.GRID_BITS)
    even = torch.full((1, 3000), 1.0)
    nearest = torch.round(even / even.norm() * 2.0**10)  # control, on a coarser grid
    assert int(nearest.square().sum()) > 2**20


def test_a_gradient_that_floating_point_scales_onto_the_grid_is_no_longer_than_the_clip_norm():
    """Scaled by 1 / norm in float64, (2^60, 2^30) is 2^30 steps and 1 step to the last digit: longer than 2^30."""
    steps, norms = private.clip(torch.tensor([[2.0**60, 2.0**30]]), clip_norm=1.0)
    assert sum(int(step) ** 2 for step in steps.tolist()) <= 2 ** (2 * noise.GRID_BITS)
    plain = torch.tensor([2.0**60, 2.0**30], dtype=torch.float64) / norms[0] * 2.0**noise.GRID_BITS
    assert sum(int(step) ** 2 for step in plain.tolist()) > 2 ** (2 * noise.GRID_BITS)  # the control


def test_a_unit_whose_gradient_is_no_number_adds_nothing_and_stops_no_round(engine):
    gradients = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [float("inf"), 0.0], [0.3, 0.0]])
    found, norms = private.clip(gradients, clip_norm=1.0)
    assert torch.equal(found, private.clip(gradients[[0, 3]], clip_norm=1.0)[0])
    assert norms.isfinite().tolist() == [True, False, False, True]
    rows = [tiny.pair(number) for number in range(6)]
    examples = list(objectives.encode(engine, rows, tiny.settings("tiny", {"training.objective.kind": '"dpo"'}))[0])
    examples = list(preference_score.with_references(engine, examples, engine.initial, batch_size=1))
    adapter.write(engine.model, engine.initial)
    spoilt = [dataclasses.replace(examples[0], reference=(float("nan"), 0.0)), *examples[1:]]
    told = loop.train(
        engine,
        spoilt,
        training=config.TrainingConfig(objective=Dpo(), local_epochs=0.0, local_steps=2, batch_size=4),
        privacy=UnitPrivacy(sampling_prob=1.0, noise_multiplier=1.0, max_rows_per_unit=2),
        round_index=0,
        num_rounds=1,
        seed=1,
        source=SeededNoise(1),
    )
    assert told.train_loss is None
    assert all(tensor.isfinite().all() for tensor in adapter.read(engine.model).values())


def test_a_unit_with_an_endless_gradient_counts_as_one_that_was_clipped():
    norms = torch.tensor([float("nan"), float("inf"), 0.5])
    assert (norms <= 1.0).tolist() == [False, False, True]
    assert np.isfinite(float((norms <= 1.0).double().sub(0.5).sum()))


def test_units_are_what_is_drawn_and_a_unit_is_never_cut(engine):
    rows = model.encode(engine, tiny.rows(7), tiny.settings("tiny").data)[0]
    assert [len(unit) for unit in private.group(rows)] == [2, 2, 2, 1]
