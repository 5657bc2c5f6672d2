"""`silotune-sim audit`: what an attacker gets, against what is claimed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli
from common.errors import PrivacyError
from simulations.cli.options import of_run

if TYPE_CHECKING:
    from simulations.audit.finding import Finding
    from simulations.commands.commands import Order

audit_app = cli.make(
    "audit",
    "Attack what is trained here, and hold what an attacker gets against the claimed epsilon. Exit code 5: refuted.",
    examples=("silotune-sim audit mechanism", "silotune-sim audit canaries RUN.toml --json"),
)
OptionalRunFile = Annotated[Path | None, typer.Argument(help="Take the settings of this run.", metavar="[RUN.toml]")]
CanariesOption = Annotated[int, typer.Option("--canaries", min=4, help="m; more canaries show a smaller leak.")]
ClaimOption = Annotated[
    float | None, typer.Option("--claim", min=0, help="Hold the result against this epsilon, not the accountant's.")
]


@audit_app.command()
def mechanism(
    run_file: OptionalRunFile = None,
    sampling_prob: Annotated[float, typer.Option(min=0, max=1, help="q, if no run file is given.")] = 0.25,
    noise_multiplier: Annotated[float, typer.Option(min=0, help="sigma, if no run file is given.")] = 2.0,
    steps: Annotated[int, typer.Option(min=1, help="T, if no run file is given.")] = 50,
    dp_delta: Annotated[float, typer.Option(help="Delta, if no run file is given.")] = 1e-5,
    canaries: CanariesOption = 1000,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999999999, help="Probability with which right noise is not refuted.")
    ] = 0.95,
    claim: ClaimOption = None,
    set_: cli.SetOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Test draw, clip and noise with canaries that only they see.

    Seconds. With q = 1 the estimate is exact, so one audit in twenty refutes right noise; ask for more confidence then.

    \b
    Examples:
      silotune-sim audit mechanism
      silotune-sim audit mechanism RUN.toml --confidence 0.999
      silotune-sim audit mechanism --noise-multiplier 1 --claim 4.44
    """
    from common.privacy.noise import SystemNoise
    from common.run import config
    from simulations.audit import mechanism as auditing

    if run_file:
        privacy, num_steps = auditing.settings_of(config.load(run_file, overrides=cli.overrides(set_)))
    else:
        privacy, num_steps = auditing.settings(sampling_prob, noise_multiplier, dp_delta=dp_delta), steps
    finding = auditing.audit(
        privacy,
        num_steps=num_steps,
        num_canaries=canaries,
        source=SystemNoise(),
        confidence=confidence,
        claimed_epsilon=claim,
    )
    _emit(finding, as_json=json)


@audit_app.command()
@of_run()
def canaries(
    order: "Order",
    canaries: CanariesOption = 200,
    max_share: Annotated[float, typer.Option(min=0, help="Most canaries for each unit that trains.")] = 0.01,
    claim: ClaimOption = None,
) -> None:
    """Train a run with notes of random tokens, and guess which of them it was trained on.

    Each of m canaries is inserted with probability 1/2 as a unit of its own. As long as the run.

    \b
    Examples:
      silotune-sim audit canaries RUN.toml
      silotune-sim audit canaries RUN.toml --canaries 100 --max-share 0.5 --output runs/canaries
    """
    from simulations.audit import canaries as auditing
    from simulations.commands import commands

    with commands.audited(order) as (shared, log):
        finding = auditing.audit(shared, log, num_canaries=canaries, max_share=max_share, claimed_epsilon=claim)
    _emit(finding, as_json=order.as_json)


@audit_app.command()
@of_run()
def mia(order: "Order", claim: ClaimOption = None) -> None:
    """Train a run on half of its units, and guess from their losses which half.

    \b
    Examples:
      silotune-sim audit mia RUN.toml --json
    """
    from simulations.audit import mia as auditing
    from simulations.commands import commands

    with commands.audited(order) as (shared, log):
        finding = auditing.audit(shared, log, claimed_epsilon=claim)
    _emit(finding, as_json=order.as_json)


@audit_app.command()
@of_run(without=("output",))
def inversion(
    order: "Order", notes: Annotated[int, typer.Option(min=1, help="How many notes to attack, each alone.")] = 20
) -> None:
    """Train a site on one note as the run says, and read the note's words off the update.

    Fresh noise each time. Sharpest for a rank above the number of distinct words, one step of sgd and short notes.

    \b
    Examples:
      silotune-sim audit inversion RUN.toml
      silotune-sim audit inversion RUN.toml --notes 5 --set adapter.r=64
    """
    from common.privacy.noise import SystemNoise
    from simulations.audit import inversion as auditing

    shared = order.world()
    rows = auditing.choose(shared.sites, notes)
    finding = auditing.audit(shared, rows, sources=[SystemNoise() for _ in rows])
    _emit(finding, as_json=order.as_json)


def _emit(finding: "Finding", *, as_json: bool) -> None:
    """Print; end with the exit code of privacy if the claim is refuted."""
    from simulations.audit.finding import render

    cli.emit(finding.as_dict(), as_json=as_json, show=lambda: cli.show(render(finding)))
    if finding.is_refuted:
        raise typer.Exit(PrivacyError.exit_code)
