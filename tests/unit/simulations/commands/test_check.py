"""`silotune-sim check`: all that is wrong with all sites' rows, in one go, and no word of them."""

import json
import re

import pytest

from common import cli
from common.errors import DataError
from simulations.cli.app import app
from simulations.world.world import Source
from tests import tiny

CANARY = "Zyxwvut-4711"
COLUMNS = "site,patient_id,instruction,output\n"


def line(**fields: object) -> str:
    return json.dumps({"site": "north", "patient_id": "p1", "instruction": "Code?", "output": CANARY} | fields) + "\n"


def silotune_sim(*arguments: object) -> int:
    """Run the command; its exit code."""
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def checked(tiny_base, tmp_path, capsys):
    """Write a run over a folder of rows and check it; exit code, sites and problems."""

    def run(*arguments: object, **files: str) -> tuple[int, dict, list[dict]]:
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        run_file = tmp_path / "run.toml"
        run_file.write_text(tiny.RUN_FILE.format(base=tiny_base) + f'data.source = "{folder}"\n')
        code = silotune_sim("check", run_file, *arguments, "--json")
        out = capsys.readouterr().out.splitlines()[-1]
        assert "Zyx" not in out
        found = json.loads(out)
        return code, found["sites"], found["problems"]

    return run


def told(problems: list[dict]) -> list[tuple[str, str]]:
    return [(problem["site"], problem["place"]) for problem in problems]


def test_rows_without_a_fault_are_counted_and_the_next_command_is_a_run(checked, tmp_path, capsys):
    rows = "".join(
        line(site=site, patient_id=f"{site} {n}", input=f"{site} {n}") for site in ("north", "south") for n in range(4)
    )
    code, sites, problems = checked(a_jsonl=rows, README_md="about")
    assert (code, problems) == (0, [])
    assert {site: (found["num_rows"], found["num_units"]) for site, found in sites.items()} == {
        "north": (4, 4),
        "south": (4, 4),
    }
    assert sites["north"]["tokens"]["num_too_long"] == 0
    assert sites["north"]["not_read"] == ["README.md"]
    assert silotune_sim("check", tmp_path / "run.toml", "--rows-only") == 0
    assert "next: silotune-sim run" in capsys.readouterr().out


def test_faults_of_every_kind_are_told_at_once(checked, tmp_path, capsys):
    code, sites, problems = checked(
        a_jsonl=line() + line(output="", patient_id="NULL") + "oops\n" + line(site="") + line(patient_id="p2"),
        b_csv=COLUMNS + "south,q1,i,o\nsouth,q1,i,o\nsouth,unknown,i,o\n",
        c_gz=CANARY,
    )
    assert code == 3
    assert told(problems) == [
        ("", "a.jsonl line 3"),
        ("", str(tmp_path / "rows" / "c.gz")),
        ("north", "a.jsonl line 2"),
        ("north", "a.jsonl line 2"),
        ("south", "b.csv line 4"),
        ("", "a.jsonl line 4"),
    ]
    assert all(problem["remedy"] for problem in problems)
    assert {site: found["num_rows"] for site, found in sites.items()} == {"north": 2, "south": 2}
    assert silotune_sim("check", tmp_path / "run.toml", "--rows-only") == 3
    assert "6 problems" in capsys.readouterr().out


def test_split_and_tokens_of_every_site_are_told_with_site_rows_and_limit(checked):
    long = line(site="south", patient_id="q1", output="a b c " * 400)
    code, sites, problems = checked(
        a_jsonl=line() + line() + long + line(site="south", patient_id="q2") + line(site="south", patient_id="Q2")
    )
    assert code == 3
    split, tokens = problems
    assert split["site"] == "north"
    assert "2 rows (a.jsonl line 1 to a.jsonl line 2) are of 1 unit" in split["what"]
    assert (tokens["site"], tokens["place"]) == ("south", "a.jsonl line 3")
    assert "over the limit of data.max_length_tokens = " in tokens["what"]
    assert sites["south"]["alike"] == ["a.jsonl line 4 and a.jsonl line 5"]


def test_too_many_tokens_under_truncate_and_a_large_delta_are_told(checked):
    rows = "".join(line(patient_id=f"p{n}", instruction="a b c " * 400) for n in range(6))
    changes = {**tiny.NOISED, "privacy.dp_delta": "1e-4", "data.too_long": '"truncate"'}
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    code, sites, problems = checked(*options, a_jsonl=rows)
    assert code == 3
    delta, *lost = problems
    assert "privacy.dp_delta = 0.0001 is too large for the" in delta["what"]
    assert delta["remedy"] == "set at most 1e-05, the smaller of 1e-5 and 1 / (n ln n)"
    counts = [
        re.match(r"no answer token is left in any of (\d) (training|held-out) rows at", one["what"]) for one in lost
    ]
    assert sum(int(count[1]) for count in counts) == 6
    assert [count[2] for count in counts] == ["training", "held-out"]
    assert sites["north"]["tokens"]["num_dropped"] == 6


def test_a_site_column_that_no_row_has_names_the_way_without_one(checked):
    rows = "".join(json.dumps({"patient_id": f"p{n}", "instruction": "i", "output": "o"}) + "\n" for n in range(4))
    code, _, problems = checked("--rows-only", a_jsonl=rows)
    assert code == 3
    assert "have no value in the column 'site'" in problems[0]["what"]
    assert 'data.partition = "iid"' in problems[0]["what"]


def test_a_base_that_is_not_here_keeps_no_row_from_being_looked_at(checked, tmp_path):
    code, sites, problems = checked(
        "--model", tmp_path / "none", a_jsonl=line() + line(patient_id="p2") + line(output="")
    )
    assert code == 3
    assert [("--rows-only" in problem["remedy"], problem["place"]) for problem in problems] == [
        (True, ""),
        (False, "a.jsonl line 3"),
    ]
    assert sites["north"]["num_rows"] == 2


def test_a_run_names_site_and_file_of_rows_that_cannot_be_split(checked, tiny_base, tmp_path):
    checked("--rows-only", a_jsonl=line() * 3 + line(site="south") * 2)
    settings = tiny.settings(str(tiny_base), {"data.source": json.dumps(str(tmp_path / "rows"))})
    with pytest.raises(DataError, match=r"one of them in rows a\.jsonl line 1 \(north\) to a\.jsonl line 5 \(south\)"):
        Source.of(settings).sites()
    (tmp_path / "rows" / "a.jsonl").write_text(line() * 3)
    with pytest.raises(DataError, match=r"^site north: 3 rows \(a\.jsonl line 1 to a\.jsonl line 3\) are of 1 unit"):
        Source.of(settings).sites()
