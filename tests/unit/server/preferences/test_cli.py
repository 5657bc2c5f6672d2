"""`silotune-server preferences`, from candidates to a preference file, and what is refused."""

import json
import re
import signal
import subprocess
import sys

import httpx
import pytest

from common import cli, hosts
from server.cli.app import app
from server.preferences import answers
from server.preferences import files as preferences
from tests.hosts import NEEDS_IPV6


def silotune_server(*arguments: object) -> int:
    """Run the command; its exit code."""
    try:
        cli.run(app, ["preferences", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tasks(tmp_path, capsys):
    rows = [{"prompt": f"Why {k}?", "base": f"base {k}", "tuned": f"tuned {k}"} for k in range(6)]
    source = written(tmp_path / "answers.jsonl", rows)
    path = tmp_path / "rate" / "tasks.jsonl"
    made = silotune_server("blind", source, "--between", "base,tuned", "--tasks", path, "--key", tmp_path / "key.json")
    assert made == 0
    capsys.readouterr()
    return path


def rate(tasks, path, rater):
    with answers.Session(tasks, path, rater=rater) as session:
        for task in session.tasks:
            session.answer(task.number, "left" if "tuned" in task.left[0].content else "right")
    return path


def test_from_candidates_to_a_preference_file(tasks, tmp_path, capsys):
    files = [rate(tasks, tmp_path / f"{rater}.jsonl", rater) for rater in ("anna", "ben")]
    assert silotune_server("agree", *files, "--json") == 0
    [pair] = json.loads(capsys.readouterr().out)["agreements"]
    assert pair["agreement"]["value"] == pair["kappa"]["value"] == 1.0
    out = tmp_path / "pairs.jsonl"
    assert silotune_server("unblind", tasks, *files, "--key", tmp_path / "key.json", "--out", out) == 0
    assert "tuned wins 100.0% of decided tasks (95 % interval 61.0% to 100.0%)" in capsys.readouterr().out
    assert {pair.chosen[0].content.split()[0] for pair in preferences.read(out)} == {"tuned"}
    assert silotune_server("check", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["is_healthy"] is True


def test_a_result_without_pairs_can_be_seen_and_not_written(tasks, tmp_path, capsys):
    with answers.Session(tasks, tmp_path / "anna.jsonl", rater="anna") as session:
        session.answer(1, "tie")
    given = ("unblind", tasks, tmp_path / "anna.jsonl", "--key", tmp_path / "key.json")
    assert silotune_server(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_ties"], found["num_skipped"], found["win_rate"], found["num_written"]) == (1, 5, None, 0)
    assert silotune_server(*given, "--out", tmp_path / "pairs.jsonl") == 2


def test_check_exits_by_severity(tmp_path, capsys):
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    clean, repeated = written(tmp_path / "a.jsonl", [good]), written(tmp_path / "b.jsonl", [good, good])
    broken = written(tmp_path / "c.jsonl", [good, {**good, "rejected": "So."}])
    assert [silotune_server("check", path) for path in (clean, repeated, broken)] == [0, 9, 3]
    shown = capsys.readouterr().out
    assert "-> keep each once" in shown
    assert "Why?" not in shown


def test_building_and_importing_write_pairs(tmp_path, capsys):
    scores = [{"prompt": "Why?", "completion": text, "score": score} for text, score in (("So.", 2), ("No.", 1))]
    source, out = written(tmp_path / "scores.jsonl", scores), tmp_path / "pairs.jsonl"
    assert silotune_server("build", source, "--from", "ratings", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_written"] == 1
    assert silotune_server("build", source, "--from", "ratings", "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    task = {
        "data": {"prompt": "Why?", "answer1": "So.", "answer2": "No."},
        "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "right"}}]}],
    }
    (export := tmp_path / "project.json").write_text(json.dumps([task]))
    given = ("import", export, "--from", "label-studio", "--between", "answer1,answer2", "--out", out, "--force")
    assert silotune_server(*given) == 0
    assert preferences.read(out)[0].chosen[0].content == "No."


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("build", "x.jsonl", "--from", "ratings", "--out", "p.jsonl", "--draft", "a"), "--from edits"),
        (("build", "x.jsonl", "--from", "edits", "--out", "p.jsonl", "--margin", "1"), "--from ratings"),
        (("import", "x.json", "--from", "argilla", "--between", "a,b", "--out", "p.jsonl"), "--question"),
        (("rank", "t.jsonl", "--answers", "a.jsonl", "--rater", "anna", "--port", "1"), "--web"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, told, capsys):
    assert silotune_server(*arguments) == 2
    assert told in capsys.readouterr().err


def test_ranking_without_a_terminal_names_the_page(tasks, tmp_path, capsys):
    assert silotune_server("rank", tasks, "--answers", tmp_path / "anna.jsonl", "--rater", "anna") == 2
    assert "--web" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=NEEDS_IPV6)])
def test_a_page_that_is_killed_has_kept_every_answer(tasks, tmp_path, host):
    command = [
        sys.executable,
        "-u",
        "-m",
        "server.cli.app",
        "preferences",
        "rank",
        str(tasks),
        "--rater",
        "anna",
        "--web",
    ]
    path = tmp_path / "anna.jsonl"
    command += ["--answers", str(path), "--host", host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        try:
            address = re.fullmatch(
                rf"open (http://{re.escape(hosts.in_url(host))}:\d+/\S+/)\n", served.stdout.readline()
            )[1]
            with httpx.Client(base_url=address, trust_env=False) as client:
                assert client.get("").status_code == 200
                for number in (1, 2):
                    assert client.post("answer", json={"task": number, "answer": "tie"}).status_code == 200
        finally:
            served.send_signal(signal.SIGKILL)
    with answers.Session(tasks, path, rater="anna") as session:  # the dead process holds the file no more
        assert (session.num_done, session.current.number) == (2, 3)
