"""The commands for preference data: checked, built, imported, and ranked blind by people."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli
from server.cli import export

if TYPE_CHECKING:
    from server.preferences.build import Built

app = cli.make(
    "preferences",
    "Preference data for DPO, KTO and reward models: check it, build it, import it, let people rank blind.",
    examples=(
        "silotune-server preferences check pairs.jsonl --held-out test.jsonl",
        "silotune-server preferences blind answers.jsonl --between base,tuned --tasks rate/tasks.jsonl --key key.json",
        "silotune-server preferences rank rate/tasks.jsonl --answers rate/anna.jsonl --rater anna --web",
    ),
)
Source = Annotated[Path, typer.Argument(help="Rows: .jsonl, .json, .csv or .parquet.", metavar="FILE")]
Tasks = Annotated[Path, typer.Argument(help="What `blind` wrote for raters.", metavar="TASKS.jsonl")]
OutOption = Annotated[Path, typer.Option(help="The preference file to write, .jsonl.", metavar="PAIRS.jsonl")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")]
BetweenOption = Annotated[str, typer.Option(help="Columns of the answers, such as base,tuned.", metavar="A,B")]


class Origin(StrEnum):
    """What pairs are built from."""

    RATINGS = "ratings"
    EDITS = "edits"


class Tool(StrEnum):
    """Whose export is imported."""

    ARGILLA = "argilla"
    LABEL_STUDIO = "label-studio"


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A preference file.", metavar="FILE")],
    held_out: Annotated[Path | None, typer.Option(help="A file that training must not have seen.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Look for what spoils preference training, and name each remedy.

    Shows counts and places, never a text. Exit code 0: nothing found; 9: warnings only; 3: put it right first.

    \b
    Examples:
      silotune-server preferences check pairs.jsonl
      silotune-server preferences check pairs.jsonl --held-out test.jsonl --json
    """
    from common.doctor import doctor
    from server.preferences import checks

    report = checks.check(file, held_out=held_out or "")
    cli.emit(report.as_dict(), as_json=json, show=lambda: doctor.show(doctor.render(report.results)))
    raise typer.Exit(report.exit_code)


@app.command()
def build(
    file: Source,
    out: OutOption,
    from_: Annotated[Origin, typer.Option("--from", help="What the rows hold.")],
    margin: Annotated[float | None, typer.Option(min=0, help="Ratings: scores this near are a tie; default 0.")] = None,
    draft: Annotated[str, typer.Option(help="Edits: column of the draft; default: draft.")] = "",
    edited: Annotated[str, typer.Option(help="Edits: column of the edited text; default: edited.")] = "",
    force: ForceOption = False,
    json: cli.JsonOption = False,
) -> None:
    """Make pairs out of ratings or of edits.

    Ratings: every two answers to one prompt whose scores differ; ties are left out. Edits: the edited text is chosen,
    the draft rejected; unchanged drafts are left out.

    \b
    Examples:
      silotune-server preferences build scores.jsonl --from ratings --margin 0.5 --out pairs.jsonl
      silotune-server preferences build letters.csv --from edits --draft model --edited signed --out pairs.jsonl
    """
    from common.errors import ConfigError
    from server.preferences import build as building

    if from_ is Origin.RATINGS:
        if draft or edited:
            raise ConfigError("--draft and --edited are for --from edits; leave them out")
        built = building.from_ratings(file, margin=margin or 0.0)
    else:
        if margin is not None:
            raise ConfigError("--margin is for --from ratings; leave it out")
        built = building.from_edits(file, draft=draft or "draft", edited=edited or "edited")
    _write(built, out, force=force, as_json=json)


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="The export, .json or .jsonl.", metavar="EXPORT")],
    out: OutOption,
    from_: Annotated[Tool, typer.Option("--from", help="Which tool wrote it.")],
    between: BetweenOption,
    prompt: Annotated[str, typer.Option(help="Field of the prompt.")] = "prompt",
    question: Annotated[str, typer.Option(help="Argilla: name of the ranking or label question.")] = "",
    force: ForceOption = False,
    json: cli.JsonOption = False,
) -> None:
    """Make pairs out of an export of Argilla or Label Studio.

    Argilla 2: dataset.records.to_json(PATH), filtered for submitted responses. Label Studio 1: export as "JSON".

    \b
    Examples:
      silotune-server preferences import records.json --from argilla --question preference
          --between response1,response2 --out pairs.jsonl
      silotune-server preferences import project.json --from label-studio --between answer1,answer2 --out pairs.jsonl
    """
    from common.errors import ConfigError
    from server.preferences import imports

    if bool(question) != (from_ is Tool.ARGILLA):
        raise ConfigError("--question and --from argilla go together; give both, or neither")
    names = between.split(",")
    if from_ is Tool.ARGILLA:
        built = imports.argilla(file, question=question, prompt=prompt, between=names)
    else:
        built = imports.label_studio(file, prompt=prompt, between=names)
    _write(built, out, force=force, as_json=json)


@app.command()
def blind(
    file: Source,
    between: BetweenOption,
    tasks: Annotated[Path, typer.Option(help="For raters; a new .jsonl file.", metavar="TASKS.jsonl")],
    key: Annotated[
        Path, typer.Option(help="Says which side is which; a new file in another folder.", metavar="KEY.json")
    ],
    seed: Annotated[int | None, typer.Option(min=0, help="Draws sides and order; default: a random one.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Prepare a blind comparison of two candidates.

    Rows have `prompt` and a column for each candidate. Give raters the tasks and never the key.

    \b
    Examples:
      silotune-server preferences blind answers.jsonl --between base,tuned --tasks rate/tasks.jsonl --key key.json
    """
    import secrets

    from server.preferences import blind as blinding

    drawn = secrets.randbelow(1 << 32) if seed is None else seed
    made = blinding.make(file, between=between.split(","), seed=drawn, tasks=tasks, key=key)
    counts = {"num_tasks": len(made.rows), "num_identical": made.num_identical}
    result = {**counts, "tasks": str(tasks), "key": str(key), "tasks_sha256": made.tasks_sha256}
    line = (
        f"{len(made.rows)} tasks; rows left out, both answers being equal: {made.num_identical}; keep {key} from raters"
    )
    next_step = cli.next_step(*export.ranking(tasks))
    cli.emit(result, as_json=json, show=lambda: cli.show(line, next_step))


@app.command()
def rank(
    tasks: Tasks,
    answers: Annotated[Path, typer.Option(help="The rater's own file; continued if it exists.")],
    rater: Annotated[str, typer.Option(help="Name or pseudonym of the rater.")],
    web: Annotated[bool, typer.Option("--web", help="Serve a page instead of using the terminal.")] = False,
    host: Annotated[str, typer.Option(help="With --web: what to listen on; default: 127.0.0.1.")] = "",
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="With --web; default: a free one.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM; needed for a --host that others reach.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
) -> None:
    """Rank blind: in this terminal, or on a page in the browser.

    Every answer is on the disk before the next task is shown. Stop at any time; the same command goes on.

    \b
    Examples:
      silotune-server preferences rank rate/tasks.jsonl --answers rate/anna.jsonl --rater anna
      silotune-server preferences rank rate/tasks.jsonl --answers rate/ben.jsonl --rater ben --web --port 8765
    """
    from common.errors import ConfigError
    from server.preferences import terminal
    from server.preferences.answers import Session

    if not web and (host or port is not None or certificate or key):
        raise ConfigError("--host, --port, --certificate and --key are for --web; add it, or leave them out")
    with Session(tasks, answers, rater=rater) as session:
        if web:
            from server.preferences import web as page

            door = page.Door(host or page.LOOPBACK, port or 0, certificate, key)
            page.serve(session, door=door, say=lambda address: cli.show(f"open {address}", "stop it with Ctrl-C"))
        else:
            terminal.run(session)
        cli.show(f"{session.num_done} of {len(session.tasks)} answered, kept in {answers}")
        if session.current is None:
            cli.show(f"next, with the key: silotune-server preferences unblind {tasks} {answers} --key KEY.json")


@app.command()
def unblind(
    tasks: Tasks,
    answers: Annotated[list[Path], typer.Argument(help="One file for each rater.", metavar="ANSWERS.jsonl...")],
    key: Annotated[Path, typer.Option(help="The key that `blind` wrote.", metavar="KEY.json")],
    out: Annotated[Path | None, typer.Option(help="Write the decided tasks here.", metavar="PAIRS.jsonl")] = None,
    force: ForceOption = False,
    json: cli.JsonOption = False,
) -> None:
    """Put answers and key together: win rate, agreement, and the preference file.

    With several raters the majority decides each task; as many votes for both are a tie, which is left out.

    \b
    Examples:
      silotune-server preferences unblind rate/tasks.jsonl rate/anna.jsonl rate/ben.jsonl --key key.json
          --out pairs.jsonl
    """
    from common.errors import ConfigError
    from server.preferences import build as building
    from server.preferences import outcome

    if force and out is None:
        raise ConfigError("--force is for --out; add it, or leave --force out")
    decided = outcome.unblind(tasks, key_file=key, answer_files=answers)
    if out:
        building.write(decided.built, out, is_overwriting=force)
    checking = cli.next_step("silotune-server", "preferences", "check", out)
    next_step = checking if out else "next: the same with --out PAIRS.jsonl"
    result = {**decided.as_dict(), "out": str(out or "")}
    cli.emit(result, as_json=json, show=lambda: cli.show(*outcome.in_words(decided), next_step))


@app.command()
def agree(
    answers: Annotated[list[Path], typer.Argument(help="One file for each rater.", metavar="ANSWERS.jsonl...")],
    json: cli.JsonOption = False,
) -> None:
    """Show how far raters agree: Cohen's kappa of each pair, with its interval. Needs no key.

    \b
    Examples:
      silotune-server preferences agree rate/anna.jsonl rate/ben.jsonl
    """
    from server.preferences import agreement
    from server.preferences import answers as answering

    agreements = agreement.compare([answering.read(path) for path in answers])
    cli.emit({"agreements": agreements}, as_json=json, show=lambda: cli.show(*map(agreement.in_words, agreements)))


def _write(built: "Built", out: Path, *, force: bool, as_json: bool) -> None:
    """Write pairs and tell what was left out."""
    from server.preferences import build as building

    building.write(built, out, is_overwriting=force)
    left_out = ", ".join(f"{count} {reason}" for reason, count in built.left_out.items())
    line = f"{out}: {len(built.rows)} pairs out of {built.num_read} rows; left out: {left_out}"
    next_step = cli.next_step("silotune-server", "preferences", "check", out)
    cli.emit({**built.as_dict(), "out": str(out)}, as_json=as_json, show=lambda: cli.show(line, next_step))
