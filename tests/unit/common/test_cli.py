import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Annotated

import pytest
import typer

from common import cli, errors
from common.errors import ConfigError, SilotuneError

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SilotuneError)]
EXIT_CODES = {
    "SilotuneError": 1,
    "ConfigError": 2,
    "DataError": 3,
    "ModelError": 4,
    "CodesDifferError": 4,
    "PrivacyError": 5,
    "AccountingUnsupported": 5,
    "FloorRefused": 5,
    "BudgetExhausted": 5,
    "LedgerError": 5,
    "RunBusyError": 8,
    "PolicyRefusedError": 5,
    "ApprovalRequired": 5,
    "ApprovalDenied": 5,
    "ProtocolError": 6,
    "WireError": 6,
    "AuthError": 6,
    "AuditError": 6,
    "RosterOutdated": 6,
    "TooFewSitesError": 6,
    "RemoteError": 6,
    "TransportError": 7,
    "StorageError": 8,
    "GateRefused": 9,
}
CANARY = "patient Ada Lovelace has a rare disease"


def run(command, *arguments: str) -> int:
    """Run a command that has one sub-command; its exit code."""
    app = cli.make("trial", "A trial.", examples="")
    app.command("go")(command)
    app.callback()(lambda: None)
    try:
        cli.run(app, ["go", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_class_has_its_exit_code_and_one_line(kind, capsys):
    def fail() -> None:
        raise kind("run.toml: what is wrong and the remedy")

    assert run(fail) == EXIT_CODES[kind.__name__] == kind.exit_code
    told = capsys.readouterr()
    assert told.err == "error: run.toml: what is wrong and the remedy\n"
    assert told.out == ""


def test_only_a_broken_link_may_be_tried_again_unchanged():
    assert [kind.__name__ for kind in TREE if kind.is_retryable] == ["TransportError"]


def test_json_ends_with_an_error_object(capsys):
    def fail(json: cli.JsonOption = False) -> None:
        raise ConfigError("key foo")

    assert run(fail, "--json") == 2
    told = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(told) == {"error": {"code": "ConfigError", "message": "key foo", "exit_code": 2}}


@pytest.mark.parametrize("as_json", [True, False])
def test_the_message_of_a_foreign_error_is_never_shown(as_json, capsys):
    caught = []

    def fail(json: cli.JsonOption = False) -> None:
        try:
            raise ValueError(CANARY) from KeyError(CANARY)
        except ValueError as error:
            caught.append(str(error))
            raise

    assert run(fail, *["--json"] * as_json) == 1
    told = capsys.readouterr()
    assert CANARY not in told.out + told.err
    assert "internal error ValueError" in told.err
    assert "test_cli.py" in told.err
    assert caught == [CANARY]  # control: it was there to be shown


@pytest.mark.parametrize(
    ("end", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (cli.Stopped("2 rounds are kept\nnext: go on", cli.TERMINATED), 143, "2 rounds are kept\nnext: go on"),
    ],
)
def test_a_command_that_is_stopped_says_what_it_has_to_say(end, exit_code, message, capsys):
    def fail(json: cli.JsonOption = False) -> None:
        raise end

    assert run(fail, "--json") == exit_code
    told = capsys.readouterr()
    assert told.err == f"error: {message}\n"
    assert json.loads(told.out)["error"] == {"code": "Interrupted", "message": message, "exit_code": exit_code}


def test_a_command_can_be_told_again_as_it_was_given():
    told = []

    def go(
        context: typer.Context,
        file: Annotated[str, typer.Argument()],
        size: Annotated[int, typer.Option()] = 3,
        is_loud: Annotated[bool, typer.Option("--loud")] = False,
        set_: cli.SetOption = None,
        json: cli.JsonOption = False,
    ) -> None:
        told.append(cli.quoted(cli.again(context)))
        told.append(cli.quoted(cli.again(context, "other", without=("json",))))

    def other(file: Annotated[str, typer.Argument()], json: cli.JsonOption = False) -> None:
        """Takes some of the options."""

    app = cli.make("trial", "A trial.", examples="")
    app.command("go")(go)
    app.command("other")(other)
    for words in (["go", "my run.toml", "--json"], ["go", "--set", "a=1", "--size=4", "x", "--set", "b='c'", "--loud"]):
        app(words, standalone_mode=False)
    assert told == [
        "trial go 'my run.toml' --json",
        "trial other 'my run.toml'",
        """trial go x --size 4 --loud --set a=1 --set 'b='"'"'c'"'"''""",
        "trial other x",
    ]


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["surplus"]])
def test_wrong_usage_has_the_code_of_wrong_settings(arguments, capsys):
    assert run(lambda: None, *arguments) == 2
    assert capsys.readouterr().err


def test_a_misspelt_command_is_told_the_nearest_once(capsys):
    app = cli.make("trial", "A trial.", examples="")
    app.command("export")(lambda: None)
    app.callback()(lambda: None)
    with pytest.raises(SystemExit):
        cli.run(app, ["exprt"])
    assert capsys.readouterr().err.count("Did you mean 'export'?") == 1


def test_a_result_is_one_json_line_or_what_people_read(capsys):
    cli.emit({"loss": 1.5, "site": "zürich"}, as_json=True, show=lambda: print("never"))
    assert capsys.readouterr().out == '{"loss": 1.5, "site": "zürich"}\n'
    cli.emit({}, as_json=False, show=lambda: cli.show("for [people]", "two"))
    assert capsys.readouterr().out == "for [people]\ntwo\n"


def test_settings_on_the_command_line_become_overrides():
    assert cli.overrides(["a.b=1", " a.c = x=y "]) == {"a.b": "1", "a.c": "x=y"}
    assert cli.overrides(None) == cli.overrides([]) == {}


@pytest.mark.parametrize("pair", ["a.b", "=1", ""])
def test_a_setting_without_key_or_sign_is_refused_with_the_right_form(pair):
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        cli.overrides([pair])


def test_the_last_of_two_values_for_one_setting_counts():
    assert cli.overrides(["a.b=1", "a.b=2"]) == {"a.b": "2"}


def test_a_new_folder_never_meets_an_old_one(tmp_path):
    assert cli.fresh_folder(tmp_path, "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert cli.fresh_folder(tmp_path, "demo") == tmp_path / "demo-3"


@pytest.mark.parametrize("command", ["simulations.cli.app", "client.cli.app", "server.cli.app"])
def test_help_answers_at_once_without_the_heavy_libraries(command):
    heavy = ["torch", "transformers", "peft", "flwr", "bitsandbytes", "datasets", "ray", "grpc", "pandas"]
    code = (
        f"import sys, {command} as c\n"
        "sys.argv = ['x', '--help']\n"
        "try: c.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded', sorted(set({heavy}) & set(sys.modules)))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "loaded []"
    assert "Usage" in told.stdout


def test_control_the_probe_sees_a_heavy_library():
    code = "import sys, numpy\nprint(sorted({'numpy'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "['numpy']\n"


@pytest.mark.parametrize("place", [["-v", "go"], ["go", "-v"], ["go", "--verbose"]])
def test_verbose_shows_where_an_error_arose_and_no_text_of_a_foreign_one(place, capsys):
    def fail() -> None:
        try:
            raise ValueError(CANARY)
        except ValueError as error:
            raise ConfigError("key foo") from error

    app = cli.make("trial", "A trial.", examples="")
    app.command("go")(fail)
    app.callback()(lambda: None)
    with pytest.raises(SystemExit):
        cli.run(app, place)
    told = capsys.readouterr().err
    assert "error: key foo\n  ConfigError\n" in told
    assert "  ValueError\n" in told
    assert "test_cli.py" in told
    assert CANARY not in told
    assert "CPU s" in told
    assert run(fail) == 2
    assert capsys.readouterr().err == "error: key foo\n"  # control: nothing of it without the option


def test_quiet_leaves_results_and_errors(capsys):
    def go(json: cli.JsonOption = False) -> None:
        cli.say("under way")
        cli.progress(as_json=json).print("half")
        cli.emit({}, as_json=json, show=lambda: cli.show("result"))

    assert run(go, "-q") == 0
    assert capsys.readouterr().out == "result\n"
    assert run(go) == 0
    assert capsys.readouterr().out == "under way\nhalf\nresult\n"  # control, and the last call's -q is forgotten


def test_verbose_and_quiet_together_are_wrong_usage(capsys):
    assert run(lambda: None, "-q", "-v") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_version_is_told_without_a_command(capsys):
    app = cli.make("trial", "A trial.", examples="")
    app.command("go")(lambda: None)
    app.callback()(lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.run(app, ["--version"])
    assert not end.value.code
    told = capsys.readouterr().out
    for name in ("silotune", "torch", "transformers", "peft", "flwr"):
        assert f"{name} {importlib.metadata.version(name)}" in told


@pytest.mark.parametrize(
    ("words", "offered"),
    [("silotune-server sta", "status"), ("silotune-server status --j", "--json"), ("silotune-server -", "--version")],
)
def test_the_shell_completes_commands_and_options(words, offered):
    code = "import sys, server.cli.app; sys.argv = ['silotune-server']; server.cli.app.main()"
    asked = {"_SILOTUNE_SERVER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert offered in done.stdout.split(), done.stderr
