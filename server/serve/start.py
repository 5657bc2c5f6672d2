"""Start the endpoint: vLLM where it is installed, a small server on transformers otherwise."""

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, get_args

from transformers.utils import GENERATION_CONFIG_NAME

from common import hosts
from common.errors import ConfigError, ModelError
from common.model import base as model
from common.run import config
from server.export import canonical, folder
from server.serve.folders import Served, base_name

Engine = Literal["auto", "vllm", "transformers"]
ENGINES: Final = get_args(Engine)


@dataclass(frozen=True)
class Address:
    """Where it listens.

    Attributes:
        host: An address of this machine.
        port: 0 takes a free one.
        api_key: Bearer token of every request; empty: none, which only loopback allows.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str = ""


def read_key(file: Path | None) -> str:
    """The API key in a file, without the end of its line.

    Raises:
        ConfigError: No such file, others may read it, or it is too short to be a secret.
    """
    if file is None:
        return ""
    try:
        key, mode = file.read_text(encoding="utf-8").strip(), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read") from error
    if mode & 0o077:
        raise ConfigError(f"--api-key-file {file}: others may read it; chmod 600 {file}")
    if len(key) < 16 or not key.isascii() or not key.isprintable():
        raise ConfigError(f"--api-key-file {file}: needs 16 printable characters or more")
    return key


def check_address(address: Address) -> None:
    """Beyond loopback only with a key.

    Raises:
        ConfigError: No key.
    """
    if not hosts.is_loopback(address.host) and not address.api_key:
        raise ConfigError(
            f"--host {address.host}: whoever reaches it could ask; give --api-key-file, and put TLS before it"
        )


def choose(engine: str) -> str:
    """The engine that is meant.

    Raises:
        ConfigError: There is none of that name, or vLLM is not installed.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: is none of {', '.join(ENGINES)}")
    if engine == "vllm" and not find_vllm():
        raise ConfigError(
            "--engine vllm: no program vllm is on the PATH; pip install vllm into an environment of its own, since its "
            "needs differ from silotune's, and put its bin folder on the PATH, or take --engine transformers"
        )
    return ("vllm" if find_vllm() else "transformers") if engine == "auto" else engine


def find_vllm() -> str | None:
    """vLLM's program: on the PATH, or beside this Python; None where there is none."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    return shutil.which("vllm", path=path)


def vllm_command(base: Path, served: Sequence[Served], address: Address, *, extra: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's own server; its key goes by the environment, where no list of processes shows it.

    Args:
        extra: Arguments of vLLM's own, such as `--dtype=float32`.

    Raises:
        ModelError: A rank that vLLM does not take, or adapters of several chat templates, of which it takes one.
    """
    ranks = {adapter.rank for adapter in served}
    if max(ranks) > canonical.RANKS[-1]:
        raise ModelError(f"an adapter has rank {max(ranks)}, vLLM takes up to {canonical.RANKS[-1]}")
    command = [
        find_vllm() or "vllm", "serve", str(base),
        "--served-model-name", base_name(base), "--host", address.host, "--port", str(address.port),
        "--enable-lora", "--max-lora-rank", str(max(ranks)), "--max-loras", str(len(served)),
        "--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in served),
    ]  # fmt: skip
    first = served[0]
    for what, values in (
        ("chat templates", {adapter.template for adapter in served}),
        ("system prompts", {adapter.system_prompt for adapter in served}),
        ("dates in their prompts", {adapter.date for adapter in served}),
    ):
        if len(values) > 1:
            raise ModelError(f"the adapters were trained with different {what}, and vLLM takes one; serve them apart")
    if (first.folder / GENERATION_CONFIG_NAME).is_file():  # where answers end; adapters of one template agree
        command += ["--generation-config", str(first.folder)]
    is_own_template = first.template == "tokenizer" and (
        folder.template_of(base, first.template, first.system_prompt, first.date)
        == str(model.load_tokenizer(base).chat_template)
    )
    if not is_own_template:
        files = [adapter.template_file for adapter in served if adapter.template_file]
        if not files:
            raise ModelError(
                f"{first.name} was trained with the template {first.template}, and "
                f"{'with a system prompt' if first.system_prompt else 'no system prompt'}, and exported without it; "
                "export it again with --base"
            )
        command += ["--chat-template", str(files[0])]
    return [*command, *extra]


def become_vllm(command: Sequence[str], address: Address) -> NoReturn:
    """Put vLLM in the place of this process, so that whoever stops the one stops the other and all that it started.

    It tells nobody of its use, asks no hub, and does not look for this machine's address by way of a public one, as it
    does where `VLLM_HOST_IP` is not set.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {"VLLM_HOST_IP": "127.0.0.1", **os.environ, **quiet}
    if address.api_key:
        environment["VLLM_API_KEY"] = address.api_key
    os.execve(command[0], list(command), environment)  # noqa: S606 - no shell is wanted


def run_transformers(
    base: Path,
    served: Sequence[Served],
    address: Address,
    *,
    limits: Any,
    settings: config.ModelConfig,
    device_name: str,
    ready: Any,
) -> None:
    """Load everything and serve until stopped.

    Args:
        ready: Called with the address and the models' names when it listens.

    Raises:
        ModelError: Base or adapter cannot be loaded here.
        ConfigError: The address cannot be used.
    """
    import uvicorn

    from server.serve import api, engine

    # before minutes of loading, so that a taken port is known at once
    with hosts.listen(address.host, address.port, options="--host or --port") as listener:
        models = engine.Models(base, served, settings=settings, device_name=device_name)
        names = {*api.LOOPBACK, address.host} if hosts.is_loopback(address.host) else set()
        app = api.application(models, limits, api_key=address.api_key, names=names)
        options = uvicorn.Config(
            app, http=api.Caller, ws="none", lifespan="off", access_log=False, log_level="error", server_header=False,
            proxy_headers=False, limit_concurrency=limits.queue + 64, timeout_keep_alive=30,
        )  # fmt: skip
        ready(listener.getsockname()[:2], models.names)
        asyncio.run(uvicorn.Server(options).serve(sockets=[listener]))
