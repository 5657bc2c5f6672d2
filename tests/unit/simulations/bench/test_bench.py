"""What a benchmark's result looks like and when a goal counts as met; nothing is timed here."""

import io
import json
import socket

import pytest
import torch
from rich.console import Console

from client.train import loop
from common.adapter import adapter
from common.errors import ConfigError, ModelError, SilotuneError
from common.run import config
from common.run.schema.wire import WireConfig
from simulations.bench import aggregate, deployment, dp, figures, scale, table, tax
from simulations.bench import bytes as bytes_bench
from simulations.bench.arms import aggregate as aggregate_arm
from simulations.bench.arms import bytes as bytes_arm
from simulations.bench.arms import deployment as deployment_arm
from simulations.bench.arms import dp as dp_arm
from simulations.bench.arms import gpu as gpu_arm
from simulations.bench.arms import llama, process, tax_silotune
from simulations.bench.arms import scale as scale_arm
from simulations.bench.figures import Figure
from simulations.world.world import Source


def screen(result) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table.render(result))
    return console.file.getvalue()


def test_a_result_is_json_with_every_figure_its_goal_and_whether_it_holds():
    measured = [
        Figure("round", 1.23456, "x", goal=1.1),
        Figure("rows", 7, "rows"),
        Figure("start", 5, "CPU s", goal=12),
    ]
    result = json.loads(json.dumps(figures.result("some", measured)))
    assert result.keys() == {"bench", "figures", "ok", "machine"}
    assert result["bench"] == "some"
    assert result["ok"] is False
    assert result["figures"] == [
        {"name": "round", "value": 1.2346, "unit": "x", "goal": 1.1, "is_floor": False, "ok": False},
        {"name": "rows", "value": 7, "unit": "rows", "goal": None, "is_floor": False, "ok": True},
        {"name": "start", "value": 5, "unit": "CPU s", "goal": 12, "is_floor": False, "ok": True},
    ]
    assert result["machine"].keys() >= {"cpu", "cores", "load", "python", "torch"}
    assert all(result["machine"].values())


def test_a_value_on_its_goal_meets_it_before_rounding():
    assert figures.result("some", [Figure("a", 1.1, "x", goal=1.1)])["ok"]
    assert not figures.result("some", [Figure("a", 1.10001, "x", goal=1.1)])["ok"]


def test_a_table_names_the_goal_and_what_was_missed():
    shown = screen(figures.result("some", [Figure("a", 2.0, "x", goal=1.5), Figure("b", 1, "MiB", goal=3)]))
    assert "at most 1.5  missed" in shown
    assert "at most 3    ok" in shown


def test_the_list_names_every_bench():
    result = table.run("list")
    assert result == {"benches": dict(table.BENCHES)}
    assert all(name in screen(result) for name in table.BENCHES)


def test_an_unknown_bench_lists_the_names():
    with pytest.raises(ConfigError, match="bench 'speed': there is tax, dp, bytes, scale"):
        table.run("speed")


def runs(*, startup: float, rounds: list[float], loss: float, peak: float) -> list[dict]:
    return [{"startup_cpu_s": startup, "rounds_cpu_s": rounds, "losses": [3.0, loss], "peak_rss_mib": peak}] * 3


FAST = {"startup": 7.0, "rounds": [10.0, 12.1], "loss": 2.0, "peak": 600.0}
PLAIN = runs(startup=0.0, rounds=[5.0, 7.0], loss=2.0, peak=0.0)


def test_tax_within_its_goals():
    shown = tax.judge(runs(**FAST), PLAIN, label="nf4", goal_ratio=1.1)
    assert all(figure.ok for figure in shown)
    assert {figure.name: figure.value for figure in shown}["round, nf4: silotune / plain loop"] == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"startup": 12.1}, "start-up, nf4"),
        ({"rounds": [10.0, 12.3]}, "round, nf4: silotune / plain loop"),
        ({"peak": 820.0}, "peak memory, nf4"),
        ({"loss": 2.1}, "training loss, nf4: largest difference"),
    ],
)
def test_each_goal_of_tax_can_be_missed(change, missed):
    shown = tax.judge(runs(**FAST | change), PLAIN, label="nf4", goal_ratio=1.1)
    assert [figure.name for figure in shown if not figure.ok] == [missed]


def sizes(*, slow: float = 1.0, grown: float = 0.0) -> dict[int, dict]:
    def one(size: int) -> dict:
        factor = slow if size == 1000 else 1.0
        marks = [(round_index * size * 0.1 * factor, round_index * size * 0.2) for round_index in range(4)]
        return {"marks": marks, "peak_rss_mib": 500.0 + (grown if size == 1000 else 0.0)}

    return {size: one(size) for size in scale.NUM_ROUNDS}


def test_scale_within_its_goals():
    shown = scale.judge(sizes(slow=1.4, grown=149.0))
    assert all(figure.ok for figure in shown)
    assert len(shown) == 3 * len(scale.NUM_ROUNDS) + 2


@pytest.mark.parametrize(("change", "missed"), [({"slow": 1.6}, "CPU"), ({"grown": 151.0}, "memory")])
def test_each_goal_of_scale_can_be_missed(change, missed):
    [figure] = [figure for figure in scale.judge(sizes(**change)) if not figure.ok]
    assert missed in figure.name


def test_the_sites_of_scale_are_ten_kinds_with_rows_of_their_own():
    settings = config.load(scale_arm.RUN_FILE, overrides={"data.num_sites": "20"})
    sites = list(scale_arm.make_sites(Source.of(settings), 20).values())
    assert len(sites) == 20
    for first, again in zip(sites[:10], sites[10:], strict=True):
        assert [row.messages for row in first.train] == [row.messages for row in again.train]
        assert first.train[0].messages[0].content is not again.train[0].messages[0].content
    assert min(len(site.held_out) for site in sites) > 0


def test_tax_goes_by_a_run_with_two_sites_and_no_evaluation_between_rounds():
    settings = config.load(tax_silotune.RUN_FILE)
    assert settings.federation.num_sites == 2
    assert settings.evaluation.every_rounds == settings.federation.num_rounds


def whole_round(*, peak: float = 900.0, **seconds: float) -> dict:
    spent = dict.fromkeys(aggregate_arm.PARTS, 0.5) | {"float32 additions": 1.0} | seconds
    return {"num_parameters": 2**26, "dtype": "bfloat16", "seconds": spent, "peak_mib": peak}


def test_aggregate_within_its_goals():
    shown = aggregate.judge(whole_round(), whole_round(peak=949.0, norm=0.25))
    assert all(figure.ok for figure in shown)
    values = {figure.name: figure.value for figure in shown}
    assert values["decode and check, norm, combine, gap: all / float32 additions, 100 sites"] == pytest.approx(1.75)
    assert values["peak memory, 100 sites"] == pytest.approx(949 / 256)
    assert {f"{part} / float32 additions, 17 sites" for part in ("gap", "frame's hash", "decode and check")} <= set(
        values
    )


@pytest.mark.parametrize(
    ("many", "missed"),
    [
        (whole_round(gap=0.6), "gap: all"),
        (whole_round(combine=0.6), "gap: all"),
        (whole_round(peak=951.0), "sites - "),
    ],
)
def test_each_goal_of_a_round_can_be_missed(many, missed):
    [figure] = [figure for figure in aggregate.judge(whole_round(), many) if not figure.ok]
    assert missed in figure.name


def test_the_goal_of_a_method_that_factors_can_be_missed():
    arms = {"flexlora": {"cpu_s": 0.03, "gap_cpu_s": 0.03}, "fedex": {"cpu_s": 0.11, "gap_cpu_s": 0.0}}
    [figure] = [figure for figure in aggregate.of_factored(arms) if not figure.ok]
    assert "fedex" in figure.name


def test_an_arm_of_aggregate_has_the_module_and_the_sites_that_its_figures_name():
    drawn = aggregate_arm._draw(aggregate_arm.MODULE, seed=1, std=1.0)
    assert {tuple(tensor.shape) for tensor in drawn.values()} == {(16, 11008), (4096, 16)}
    assert aggregate_arm.NUM_SITES == 10


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_a_round_of_aggregate_goes_through_all_its_parts(monkeypatch, dtype):
    monkeypatch.setattr(aggregate_arm, "LAYERS", 1)
    monkeypatch.setattr(aggregate_arm, "SHAPES", {"q": (640, 320)})
    found = aggregate_arm.whole_round(5, WireConfig(dtype=dtype))
    assert (found["num_parameters"], found["dtype"]) == (16 * 960, dtype)
    assert set(found["seconds"]) == set(aggregate_arm.PARTS)
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_an_arm_that_fails_says_why():
    with pytest.raises(SilotuneError, match=r"no\.such\.arm 7 failed with code 1: ModuleNotFoundError"):
        process.measure("no.such.arm", "7")


def test_the_clocks_of_a_process_are_positive():
    assert process.cpu_s() > 0
    assert process.peak_rss_mib() > 10


def test_the_arms_of_private_steps_do_the_same_work_on_a_small_shape():
    """Every way takes a step of the same model; a way that is not known is refused."""
    shape, cpu = llama.Shape(32, 64, 1, 2, 2, 64, rows=2, tokens=16, answer_tokens=4), torch.device("cpu")
    engine = llama.make_engine(llama.make_base(shape, cpu), cpu, is_checkpointed=False)
    rows = dp_arm.make_rows(shape)
    optimizer = loop.make_optimizer(adapter.parameters(engine.model).values(), config.TrainingConfig().optimizer)
    engine.model.train()
    for name in ("plain", "stacked", "microbatch", "opacus"):
        with dp_arm._arm(name, engine, rows, optimizer) as take_step:
            take_step()
        assert all(parameter.grad is not None for parameter in adapter.parameters(engine.model).values())
    with pytest.raises(ModelError, match="no such arm"), dp_arm._arm("fast", engine, rows, optimizer):
        pass


def test_ratios_of_private_steps_have_their_goals():
    found = {way: {"seconds": seconds, "peak_mib": 1.0} for way, seconds in (("plain", 2.0), ("stacked", 2.1))}
    plain, ratio = dp._step_figures("8b", found, goal=1.05)
    assert (plain.value, plain.goal) == (2.0, None)
    assert (ratio.value, ratio.goal, ratio.ok) == (1.05, 1.05, True)


def arms(**changes):
    """Runs of `bench bytes` that meet every goal; 4 sites."""
    ours = {"losses": [3.0, 1.01], "training": [0, 400], "evaluation": [40, 440], "num_sites": 4, "messages": 900}
    theirs = {"losses": [3.0, 1.0], "training": [0, 8000], "evaluation": [4000, 8000], "num_sites": 4}
    own = {**ours, "training": [0, 800], "evaluation": [40, 1040]}
    baselines = {"float32": theirs, "nvflare": {**theirs, "training": [0, 1400]}}
    return {"default": own, "int3": ours, **baselines} | changes


def test_bytes_of_ours_hold_evaluations_and_those_of_the_baselines_do_not():
    found = {figure.name: figure.value for figure in bytes_bench.judge(arms())}
    assert found["silotune, int3 both ways: a site"] == 210
    assert found["bytes, defaults / float32 both ways"] == pytest.approx(0.23)
    assert found["float32 both ways: a site"] == 2000
    assert found["bytes, int3 both ways / 4-bit messages"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("arm", "field", "value", "missed"),
    [
        ("int3", "training", [0, 580], "bytes, int3 both ways / float32 both ways"),
        ("default", "training", [0, 1000], "bytes, defaults / float32 both ways"),
        ("default", "losses", [3.0, 1.01, 1.03], "last held-out loss, defaults - float32 both ways"),
        ("nvflare", "training", [0, 1000], "bytes, int3 both ways / 4-bit messages"),
        ("nvflare", "losses", [3.0, 2.0], "bytes, int3 both ways / 4-bit messages"),
    ],
)
def test_each_goal_of_bytes_can_be_missed(arm, field, value, missed):
    assert all(figure.ok for figure in bytes_bench.judge(arms()))
    spoilt = arms(**{arm: {**arms()[arm], field: value}})
    assert [figure.name for figure in bytes_bench.judge(spoilt) if not figure.ok] == [missed]


def test_four_bit_messages_are_what_bitsandbytes_makes_of_them():
    """Half a byte a value, 4 bytes a block of 64 and a table of 16: as NVFLARE's log counts them."""
    tensor = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    found, num_bytes = bytes_arm.filtered({"a": tensor})
    assert num_bytes == 2048 + 64 * 4 + 16 * 4
    assert 0.02 < float((found["a"] - tensor).norm() / tensor.norm()) < 0.12


def test_a_deployed_round_is_told_in_seconds_and_bytes_of_a_site():
    near = {"marks": [0.0, 2.0, 4.0], "frame_bytes": 800, "num_sites": 4, "adapter_sha256": "a", "wire_bytes": 0}
    far = near | {"marks": [0.0, 5.0, 11.0], "frame_bytes": 880, "wire_bytes": 1760}
    told = {figure.name: figure for figure in deployment.judge(near, far)}
    assert told["a round of 4 sites, deployed"].value == 5.5
    assert told["a round, deployed / in process"].value == 2.75
    assert told["frames of a site and round, both ways"].value == 110
    assert told["on the wire / frames"].value == 2
    assert told["adapters that differ"].ok
    other = {figure.name: figure for figure in deployment.judge(near, far | {"adapter_sha256": "b"})}
    assert not other["adapters that differ"].ok


def test_the_relay_between_links_and_gateway_counts_both_ways():
    with socket.create_server(("127.0.0.1", 0)) as gateway, deployment_arm.counted(gateway.getsockname()[1]) as way:
        with socket.create_connection(("127.0.0.1", way.port)) as link:
            link.sendall(b"12345")
            there, _ = gateway.accept()
            with there:
                assert there.recv(5) == b"12345"
                there.sendall(b"123")
                assert link.recv(3) == b"123"
        assert way.num_bytes == 8


def test_rows_of_the_gpu_arms_have_the_lengths_of_instruction_data():
    rows = list(gpu_arm.rows(300, 1000, is_full=False))
    lengths = [len(row.input_ids) for row in rows]
    assert min(lengths) >= gpu_arm.SHORTEST
    assert max(lengths) <= gpu_arm.LONGEST
    assert 300 < sorted(lengths)[150] < 430
    assert {len(row.input_ids) for row in gpu_arm.rows(3, 1000, is_full=True)} == {gpu_arm.LONGEST}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_the_gpu_arms_say_so():
    with pytest.raises(ModelError, match="CUDA"):
        gpu_arm.main("silotune", "{}")


def test_a_floor_is_met_from_above():
    assert Figure("speed", 4.0, "x", goal=3.5, is_floor=True).ok
    assert not Figure("speed", 3.0, "x", goal=3.5, is_floor=True).ok


def test_only_benchmarks_with_a_short_form_take_quick():
    with pytest.raises(ConfigError, match="no --quick"):
        table.run("tax", quick=True)
