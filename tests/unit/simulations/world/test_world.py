import json

import pytest

from client.agent import process
from common.data import overlap
from common.errors import DataError, ModelError
from common.model import base
from common.run import config
from common.run.manifest import RunManifest
from simulations.engines import site_files
from simulations.world import world
from simulations.world.world import Failures, Source
from tests import tiny


@pytest.fixture
def settings(tiny_base, tmp_path):
    table = tiny.write_table(tmp_path / "rows.jsonl")

    def make(changes=None):
        return tiny.settings(tiny_base, {"data.source": f'"{table}"', **(changes or {})})

    return make


def test_the_values_of_the_site_column_are_the_sites(settings):
    sites = Source.of(settings()).sites()
    assert list(sites) == ["north", "south", "west"]
    assert {site: len(data.train) + len(data.held_out) for site, data in sites.items()} == tiny.SITES


def test_no_patient_is_on_both_sides(settings):
    for data in Source.of(settings()).sites().values():
        assert data.train
        assert data.held_out
        assert not {row.unit for row in data.train} & {row.unit for row in data.held_out}


@pytest.mark.parametrize("unit_column", ["", "patient_id"])
def test_a_site_of_its_own_reads_the_rows_and_units_that_a_simulation_gives_it(settings, tmp_path, unit_column):
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a", "b"):
        tiny.write_table(folder / f"{name}.jsonl")
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        numbered = [json.dumps({**row, "id": number}) for number, row in enumerate(rows)]  # starts anew in each file
        (folder / f"{name}.jsonl").write_text("\n".join(numbered))
    run = settings({"data.source": f'"{folder}"', "data.unit_column": f'"{unit_column}"'})
    places = {"base_folder": tmp_path, "log_folder": tmp_path / "log", "num_threads": 1}
    site_files.write(Source.of(run).tables(), data=run.data, folder=tmp_path / "sites", **places)
    for number, (site, data) in enumerate(Source.of(run).sites().items()):
        node = config.load_node(tmp_path / "sites" / str(number) / "node.toml")
        own = process.load_data(node, RunManifest(run, "ab" * 32, ()))
        assert node.site.name == site
        assert [(row.messages, row.unit) for row in own.train] == [(row.messages, row.unit) for row in data.train]
        assert [row.unit for row in own.held_out] == [row.unit for row in data.held_out]
        assert {row.row_id.partition(" ")[0] for row in data.train} == {"a.jsonl", "b.jsonl"}


def test_sites_are_a_function_of_the_run_file(settings):
    assert Source.of(settings()).sites() == Source.of(settings()).sites()
    assert Source.of(settings()).sites() != Source.of(settings({"seed": "6"})).sites()


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_rows_can_be_dealt_out_to_any_number_of_sites(settings, how):
    sites = Source.of(settings({"data.partition": f'"{how}"', "data.num_sites": "4"})).sites()
    assert list(sites) == ["site-00", "site-01", "site-02", "site-03"]
    assert sum(len(data.train) + len(data.held_out) for data in sites.values()) == sum(tiny.SITES.values())


def test_the_embedded_records_need_no_file(tiny_base):
    sites = Source.of(tiny.settings(tiny_base, {"data.source": '"embedded"', "federation.num_sites": "4"})).sites()
    assert len(sites) == 4


def test_a_row_that_does_not_fit_is_named_by_line(settings, tmp_path):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "Ada?", "patient_id": "p", "site": "North"}) + "\n")
    with pytest.raises(DataError, match="line 37") as caught:
        Source.of(settings()).sites()
    assert "Ada" not in str(caught.value)


def test_a_base_is_found_by_path_by_name_or_in_the_package(settings, tiny_base, tmp_path):
    assert world.base_folder(settings().model.base) == tiny_base
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").symlink_to(tiny_base)
    named = tiny.settings("mine")
    assert world.base_folder(named.model.base, store_folder=tmp_path / "store").name == "mine"
    assert world.base_folder(tiny.settings("embedded").model.base) == world.EMBEDDED_BASE
    with pytest.raises(ModelError, match="silotune-sim base"):
        world.base_folder(named.model.base, store_folder=tmp_path)


def test_the_engine_is_what_the_run_file_says(settings, tiny_base):
    engine = world.load_engine(settings({"adapter.r": "2"}), device="cpu", num_threads=1)
    assert engine.base_sha256 == base.hash_base(tiny_base)
    assert min(engine.tensor_specs[0].shape) == 2


def test_failures_are_in_each_sites_log_and_at_hand(tmp_path):
    failures = Failures(tmp_path)
    failures.reporter("north")("0a1b", DataError("line 3"))
    failures.reporter("south")("0a1c", DataError("line 4"))
    assert [str(error) for error in failures.errors] == ["line 3", "line 4"]
    assert json.loads((tmp_path / "north.jsonl").read_text())["reference"] == "0a1b"
    anew = Failures(tmp_path)
    assert [anew.explain(reference) for reference in ("0a1c", "0a1e", "")] == ["line 4", "", ""]
    failures.reporter("south")("0a1f", tripped())
    assert anew.explain("0a1f").startswith("KeyError at ")
    assert "row's" not in anew.explain("0a1f")


def tripped() -> Exception:
    try:
        {}["a row's text"]
    except KeyError as error:
        return error
    raise AssertionError


def test_a_text_that_several_sites_have_is_held_out_at_all_of_them_or_trained_on_at_all(settings, tmp_path):
    # a register in which half of the reports stand under two specialties, as in public sets of transcriptions
    table = [
        {
            "instruction": f"Report {n} of the register: what was done?",
            "output": f"note {n}",
            "patient_id": f"{site}-{n}",
        }
        | {"site": site}
        for site, numbers in {"surgery": range(40), "urology": range(20, 60), "cardiology": range(60, 80)}.items()
        for n in numbers
    ]
    path = tmp_path / "register.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    changes = {"data.source": f'"{path}"'}
    together = Source.of(settings(changes)).sites()
    assert {site: len(data.held_out) for site, data in together.items()} == {
        "cardiology": 4,
        "surgery": 8,
        "urology": 8,
    }
    assert overlap.total(world.overlaps(together).values()) == overlap.OverlapCounts(20, 0, 0)
    loose = Source.of(settings({**changes, "data.same_text": '"count"'})).sites()
    expected = {
        site: sum(
            any(row.messages == other.messages for part in loose.values() for other in part.train) for row in rows
        )
        for site, rows in ((site, data.held_out) for site, data in loose.items())
    }
    assert {site: found.num_exact for site, found in world.overlaps(loose).items()} == expected
    assert expected["surgery"] > 0  # control
    assert expected["cardiology"] == 0
    private = {**changes, **tiny.NOISED}
    counted = world.overlaps(Source.of(settings(private)).sites())
    assert overlap.total(counted.values()).num_exact > 0  # only counted, as no unit may move another
