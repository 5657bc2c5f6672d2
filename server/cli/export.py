"""The commands for what a run made: verify, judge it, compare its answers with the base's, merge several, serve."""

from pathlib import Path
from typing import Annotated, Any

import typer

from common import cli

SignerOption = Annotated[str, typer.Option(help="Public key that must have signed them, 64 hexadecimal digits.")]


def verify(
    folder: Annotated[Path, typer.Argument(help="What `export --to` wrote.", metavar="FOLDER")],
    signer: Annotated[str, typer.Option(help="Public key that must have signed, 64 hexadecimal digits.")] = "",
    base: Annotated[Path | None, typer.Option(help="Also compare the formats' logits on this base.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Check an exported folder; needs no network.

    Files, hashes and signature; the adapter's form; tensors' names, shapes, types and values; no pickle.
    With --base every format is loaded, and its logits are held against the adapter's.

    \b
    Examples:
      silotune-server verify triage-1 --signer 3b6a27bc...
      silotune-server verify triage-1 --base smollm2-folder
    """
    from server.verify import verify as checks

    result = checks.verify(folder, signer=signer, base=base)
    cli.emit(result, as_json=json, show=lambda: cli.show(*checks.in_words(result)))


def gate(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN_FOLDER")],
    rules: Annotated[
        Path | None,
        typer.Option(
            help="Judge what it exports by these rules too; what its own gate refused stays refused.", metavar="FILE"
        ),
    ] = None,
    json: cli.JsonOption = False,
) -> None:
    """Judge a run's checkpoints anew by its own gate: the newest, then from the best on until one passes.

    From the run's figures alone: for an audit or a comparison that came after the end. Nothing is measured. With
    --rules the adapter that the run exports is judged by rules that came after its end. Exit code 9: none passes.

    \b
    Examples:
      silotune-server gate runs/triage
      silotune-server gate runs/triage/later/01 --rules stricter.toml
    """
    from common.errors import GateRefused
    from server.folder import run_files

    run_files.stored_manifest(run_folder)  # told before torch is loaded

    from server.run import finish

    judged = finish.gate_by(run_folder, rules) if rules else finish.gate_again(run_folder)
    cli.emit(judged, as_json=json, show=lambda: cli.show(*judged["in_words"]))
    if not judged["passed"]:
        raise typer.Exit(GateRefused.exit_code)


def merge(
    folders: Annotated[list[Path], typer.Argument(help="What `export --to` wrote.", metavar="FOLDER FOLDER...")],
    how: Annotated[str, typer.Option(help="linear, svd, ties, dare_ties, dare_linear or slerp.")],
    weights: Annotated[str, typer.Option(help="One number for each folder, with commas.")],
    to: Annotated[Path, typer.Option(help="For the result; a new folder.")],
    name: Annotated[str, typer.Option(help="Of the result; default: the new folder's.")] = "",
    rank: Annotated[int, typer.Option(min=0, help="To cut to; default: the largest there is. Not: linear, slerp.")] = 0,
    density: Annotated[float, typer.Option(help="Share of values that TIES keeps and DARE does not drop.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of DARE's choice.")] = 0,
    formats: Annotated[str, typer.Option(help="As of export; default: peft.")] = "",
    base: Annotated[Path | None, typer.Option(help="The base's folder; all but peft and vllm need it.")] = None,
    signer: SignerOption = "",
    operator_key: Annotated[Path | None, typer.Option(help="Private key that signs the result.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Merge the adapters of sealed exports into one.

    Every folder is verified first. The arithmetic is on the products B A: linear and slerp are exact, the others are
    cut to a rank, and it is told how much that loses. The result's card names what went in by its hashes.

    \b
    Examples:
      silotune-server merge triage-1 triage-2 --how linear --weights 0.5,0.5 --to both
      silotune-server merge triage-1 triage-2 --how ties --weights 1,1 --density 0.3 --rank 32 --to both
      silotune-server merge triage-1 triage-2 --how slerp --weights 0.7,0.3 --to both --formats peft,gguf --base BASE
    """
    from server.merge import adapters
    from server.merge import folder as merge_folder

    recipe = adapters.Recipe(how, _numbers(weights), rank, density, seed)  # type: ignore[arg-type]
    result = merge_folder.write(
        folders, to, recipe, name=name or to.resolve().name, formats=formats, base=base, signer=signer,
        sign_with=operator_key,
    )  # fmt: skip
    lost = f"the cut to its rank lost {result['lost']:.2%} of the norm" if result["lost"] else "exact"
    lines = (
        f"{to}: {result['formats']}, rank {result['rank']}; {lost}",
        cli.next_step("silotune-server", "verify", to),
    )
    cli.emit(result, as_json=json, show=lambda: cli.show(*lines))


def serve(
    folders: Annotated[list[str], typer.Argument(help="What `export --to` wrote.", metavar="[NAME=]FOLDER...")],
    base: Annotated[Path, typer.Option(help="Folder of the base that all were trained on.")],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is installed), vllm or transformers.")] = "auto",
    signer: SignerOption = "",
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key that every request must bear.")] = None,
    quantization: Annotated[str, typer.Option(help="Of the base: none, int8 or nf4; not for vLLM.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; not for vLLM.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer; not for vLLM.")] = 1024,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; not for vLLM.")] = 16,
    body_kib: Annotated[int, typer.Option(min=1, help="Largest request; not for vLLM.")] = 1024,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for vLLM, as --vllm-arg=--dtype=half.")
    ] = None,
    show_command: Annotated[bool, typer.Option("--show-command", help="Print vLLM's command and end.")] = False,
) -> None:
    """Answer requests in OpenAI's form, with an adapter for each model name.

    Every folder is verified before it is loaded. One base is in memory; a request's `model` chooses the adapter, and
    the base's own name none. Listens on this machine only, unless told otherwise. Prompts and answers are not logged.

    \b
    Examples:
      silotune-server serve triage-1 --base smollm2-folder
      silotune-server serve old=triage-1 new=triage-2 --base smollm2-folder --signer 3b6a27bc...
      silotune-server serve triage-1 --base llama-folder --engine vllm --vllm-arg=--tensor-parallel-size=2
      curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\
          -d '{"model": "new", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    from server.serve import folders as served_folders
    from server.serve import start

    chosen = "vllm" if show_command else start.choose(engine)
    address = start.Address(host, port, start.read_key(api_key_file))
    start.check_address(address)
    served = served_folders.verified(folders, base, signer=signer)
    if chosen == "vllm":
        refuse_for_vllm(quantization=quantization, device=device, max_tokens=max_tokens, queue=queue, body_kib=body_kib)
        command = start.vllm_command(base, served, address, extra=vllm_arg or ())
        if show_command:
            return cli.show(_quoted(command))
        for line in served_folders.dates_in_words(served):
            cli.show(line)
        start.become_vllm(command, address)
    options = {
        "vllm_arg": vllm_arg,
        "quantization": quantization,
        "device": device,
        "limits": (max_tokens, queue, body_kib),
    }
    return _serve_here(base, served, address, options)


def compare(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN_FOLDER")],
    rows: Annotated[Path, typer.Option(help="Rows to answer, in the run's columns.")],
    out: Annotated[Path, typer.Option(help="New .jsonl file of pairs, for raters.")],
    key: Annotated[
        Path | None,
        typer.Option(help="New .json file that says which side is which; default: in RUN_FOLDER/compare-keys."),
    ] = None,
    against: Annotated[str, typer.Option(help="Whose answers stand beside: base or prompt-only.")] = "base",
    prompt: Annotated[str, typer.Option(help="With prompt-only: the system message that the base is given.")] = "",
    max_rows: Annotated[int, typer.Option(min=0, help="Answer the first so many rows; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of sides and order.")] = 0,
    round_: Annotated[int, typer.Option("--round", help="Number of finished rounds; 0: the newest checkpoint.")] = 0,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; default: model.base, in the store.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Answer rows with a run's adapter and with its base, for blind ranking.

    Each line has `prompt`, `left` and `right`; the adapter is on the left of half of them, drawn by --seed. Which side
    is which is in the key alone: keep it from raters. Equal answers are left out, and counted.

    \b
    Examples:
      silotune-server compare runs/triage --rows held-out.jsonl --out rate/pairs.jsonl
      silotune-server compare runs/triage --rows held-out.jsonl --out rate/pairs.jsonl --against prompt-only
          --prompt "Answer with the code alone."
    """
    from common.errors import ConfigError
    from server.folder import run_files

    if against not in ("base", "prompt-only"):
        raise ConfigError(f"--against {against}: is none of base, prompt-only")
    run_files.stored_manifest(run_folder)  # told before torch is loaded

    from server.preferences import compare as comparing

    order = comparing.Order(str(rows), against, prompt, max_rows, seed)  # type: ignore[arg-type]
    result = comparing.compare(run_folder, order, out=out, key=key, num_rounds=round_, base=base)
    lines = (
        f"{result['pairs']}: {result['num_pairs']} pairs; {result['num_left_out']} rows left out (equal answers)",
        f"{result['key']}: which side is which; keep it from raters",
        cli.next_step(*ranking(out)),
    )
    cli.emit(result, as_json=json, show=lambda: cli.show(*lines))


def ranking(tasks: Path) -> list[object]:
    """The command by which a first rater begins, with a file of answers beside the tasks."""
    answers = tasks.with_name(f"{tasks.stem}-rater-1.jsonl")
    return ["silotune-server", "preferences", "rank", tasks, "--answers", answers, "--rater", "rater-1"]


def refuse_for_vllm(**options: object) -> None:
    """What vLLM would never hear of.

    Raises:
        ConfigError: An option of the small server was given.
    """
    from common.errors import ConfigError

    defaults = {"quantization": "none", "device": "auto", "max_tokens": 1024, "queue": 16, "body_kib": 1024}
    if given := [name.replace("_", "-") for name, value in options.items() if value != defaults[name]]:
        raise ConfigError(f"--{given[0]} is for the small server; leave it out, or take --engine transformers")


def _serve_here(base: Path, served: Any, address: Any, options: dict[str, Any]) -> None:
    """The small server, with what it needs."""
    from common import hosts
    from common.errors import ConfigError
    from common.run import config
    from server.serve import api, folders, start

    if options["vllm_arg"]:
        raise ConfigError("--vllm-arg is for vLLM; leave it out, or take --engine vllm")
    if options["quantization"] not in ("none", "int8", "nf4"):
        raise ConfigError(f"--quantization {options['quantization']}: is none of none, int8, nf4")
    if options["device"] not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {options['device']}: is none of auto, cpu, cuda")
    max_tokens, queue, body_kib = options["limits"]
    start.run_transformers(
        base,
        served,
        address,
        limits=api.Limits(max_tokens=max_tokens, queue=queue, body_kib=body_kib),
        settings=config.ModelConfig(base=str(base), quantization=options["quantization"]),
        device_name=options["device"],
        ready=lambda address, names: cli.show(
            f"http://{hosts.in_url(address[0])}:{address[1]}/v1    models: {', '.join(names)}",
            *folders.dates_in_words(served),
            "stop it with Ctrl-C",
        ),
    )


def _numbers(text: str) -> tuple[float, ...]:
    """Weights as they are written.

    Raises:
        ConfigError: One is no number.
    """
    from common.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("--weights: give numbers with commas, such as 0.5,0.5") from error


def _quoted(command: list[str]) -> str:
    """A command that can be pasted."""
    import shlex

    return shlex.join(command)
