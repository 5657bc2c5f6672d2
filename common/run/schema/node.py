"""Sections of a site's own file."""

from typing import Annotated, Literal

from pydantic import Field

from common.run.schema.section import MAX_MESSAGE_MIB, PROXY, Line, Mebibytes, RequiredLine, Section, Sha256, Slug


class SiteConfig(Section):
    """Who this site is."""

    name: Slug = Field(description="The site's name.")


class NodeDataConfig(Section):
    """This site's rows. They never leave it."""

    path: RequiredLine = Field(description="A JSONL, JSON, CSV, TSV or Parquet file, or a folder of them.")
    held_out_path: Line = Field(
        default="", description="Own held-out rows, instead of the run's `data.held_out_fraction`. Empty: none."
    )
    instruction_column: RequiredLine = Field(default="instruction", description="Column of the task or question.")
    input_column: RequiredLine = Field(
        default="input", description="Column of the text that the task is about; may be empty in a row."
    )
    output_column: RequiredLine = Field(default="output", description="Column of the wanted answer.")
    unit_column: Line = Field(
        default="patient_id", description="Column of the unit, such as a patient. Empty: each row is its own unit."
    )


class NodeModelConfig(Section):
    """Where this site keeps base models."""

    store: Line = Field(default="", description="Folder with base models. Empty: the user's default store.")
    base: Line = Field(default="", description="Folder of the base, if it is not in the store. Empty: the store.")


class HardwareConfig(Section):
    """What this site trains on."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device. `auto`: CUDA where there is one, else CPU."
    )
    num_threads: int = Field(default=0, ge=0, le=4096, description="CPU threads. 0: all cores.")


class LinkConfig(Section):
    """The tunnel to the gateway; read by `silotune-client link --node` and by the doctor."""

    proxy: Annotated[str, Field(pattern=PROXY)] = Field(
        default="",
        description="HTTP proxy that must be passed on the way to the gateway: `http://host:port`. Empty: none; "
        "environment variables are not read.",
    )
    proxy_auth_file: Line = Field(
        default="",
        description="File with `NAME:PASSWORD` for the proxy, of the link's user and mode 0600. Empty: none is shown.",
    )


class AgentConfig(Section):
    """The process that holds this site's data and base model."""

    socket: RequiredLine = Field(
        default="/run/silotune/agent.sock", description="Unix socket on which the courier reaches the agent."
    )
    courier_group: Line = Field(default="", description="Unix group of the courier, which may open the socket too.")
    log_folder: RequiredLine = Field(default="/var/lib/silotune", description="Folder of the agent's own log.")
    max_message_mib: Mebibytes = Field(
        default=MAX_MESSAGE_MIB,
        description="Largest message on the socket, in MiB. A run whose adapter could come in a larger one is refused "
        "when it is offered.",
    )
    policy: Line = Field(default="", description="This site's signed policy. Empty: every run is taken.")
    policy_signer: Sha256 = Field(default="", description="Public key of the admin who signs the policy, 64 digits.")
    identity_key: Line = Field(default="", description="Private key of this site (Ed25519, PEM); signs the audit log.")
    roster_folder: Line = Field(
        default="", description="Folder with the installed federation.json and roster.json. Empty: no roster is read."
    )
