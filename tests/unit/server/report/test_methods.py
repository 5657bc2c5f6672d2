import io
import json

from rich.console import Console
from typer.testing import CliRunner

from common.run.catalogue.kinds import KINDS
from common.run.catalogue.methods import FACTS
from server.cli.app import app
from server.report import methods


def test_the_page_is_up_to_date(capsys):
    assert methods.main(["--check"]) == 0


def test_control_a_stale_page_is_noticed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "methods.md"
    monkeypatch.setattr(methods, "PAGE", path)
    assert methods.main(["--check"]) == 1
    assert methods.main([]) == 0
    assert methods.main(["--check"]) == 0
    path.write_text(path.read_text().replace("**no**", "yes", 1))
    assert methods.main(["--check"]) == 1
    assert "python -m server.report.methods" in capsys.readouterr().err


def test_the_command_prints_every_method_and_why_it_refuses():
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in FACTS)
    assert "fedsvd, server optimizer: the factors get new coordinates" in shown
    assert "(nearest: ffa)" in shown
    assert all(name in shown for name in KINDS)
    assert "nf4 base: it trains the weights themselves; not with full (nearest: lora)" in shown


def test_the_command_prints_what_goes_together_whatever_the_method():
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"}).stdout
    assert "noise for whole sites" in shown
    assert "a weight by rows would let a site move the sum" in " ".join(shown.split())
    assert "mixed ranks with server optimizer: no method has both" in shown
    assert "robust aggregation: each site chooses its own places" in shown


def test_the_command_prints_json():
    found = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert found["site_level"]["aggregation.robust.rule"]["is_allowed"] is False
    assert ["mixed ranks", "server optimizer"] in found["apart"]
    assert "record DP" in found["wire"]["sparse up as in FLASC"]["why_not"]
    assert set(found["methods"]) == set(found["combinations"]) == set(FACTS)
    assert found["methods"]["rolora"]["trains"] == ["B", "A"]
    assert set(found["kinds"]) == set(found["kind_combinations"]) == set(KINDS)
    assert found["kind_combinations"]["prefix_tuning"]["checkpointing"]["nearest"] == "prompt_tuning"
    refused = found["combinations"]["flexlora"]["secure aggregation"]
    assert refused == {
        "is_allowed": False,
        "reason": "the coordinator needs each site's factors, and would see their sum only",
        "nearest": "fedsvd",
    }


def test_tables_fit_80_columns_and_no_word_of_them_is_cut():
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system=None).print(methods.render())
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for name in (*FACTS, *KINDS):
        assert f" {name} " in shown
