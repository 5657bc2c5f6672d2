"""GATEWAY.toml: the gateway's own file. Frozen, strict and closed, as the files of `common/run/config.py`."""

from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from common.run import reading
from common.run.config import RunConfig
from common.run.rules.rule import Rule, check
from common.run.schema import section
from common.run.schema.section import Array, RequiredLine, Section

ADDRESS: Final = r"^[A-Za-z0-9.-]+:[0-9]{1,5}$|^\[[0-9A-Fa-f:]+\]:[0-9]{1,5}$"
BUNDLE: Final = r"^[0-9a-f]{64}$"
PATTERNS: Final = {
    **section.PATTERNS,
    ADDRESS: "host:port",
    BUNDLE: "a SHA-256 of 64 digits of 0-9 and a-f",
}

Address = Annotated[str, Field(pattern=ADDRESS, max_length=300)]
BodyMebibytes = Annotated[int, Field(ge=1, le=64)]
ShortSeconds = Annotated[float, Field(gt=0, le=3600)]


class SuperLinkConfig(Section):
    """The SuperLink behind the gateway."""

    address: Address = Field(default="127.0.0.1:8000", description="Its address; on this machine.")
    ca_file: RequiredLine = Field(description="PEM certificate that the SuperLink's own must lead to.")


class FleetConfig(Section):
    """The listener for sites."""

    listen: Address = Field(default="0.0.0.0:9443", description="Address to listen on.")
    certificate_file: RequiredLine = Field(description="The gateway's certificate and its chain, PEM.")
    key_file: RequiredLine = Field(description="Its private key, PEM, mode 0600.")
    ca_file: RequiredLine = Field(description="The sites' CA, PEM; not the root, if that signed the operators' CA too.")
    max_body_mib: BodyMebibytes = Field(
        default=8, description="Largest request, in MiB. Flower sends arrays in pieces of 5 MiB."
    )


class ControlConfig(Section):
    """The listener for operators."""

    listen: Address = Field(default="127.0.0.1:9444", description="Address to listen on.")
    certificate_file: RequiredLine = Field(description="The gateway's certificate and its chain, PEM.")
    key_file: RequiredLine = Field(description="Its private key, PEM, mode 0600.")
    ca_file: RequiredLine = Field(description="The operators' CA, PEM; not the root, if that signed the sites' CA too.")
    max_body_mib: BodyMebibytes = Field(default=1, description="Largest request, in MiB.")
    bundles: Array[Annotated[str, Field(pattern=BUNDLE)]] = Field(
        default=(), description="SHA-256 of the bundles that a run may start. Empty: this version's own."
    )


class LimitsConfig(Section):
    """What one certificate may use, on each listener, and how long the gateway waits."""

    requests_per_s: float = Field(default=100.0, gt=0, le=100_000, description="Requests per second, lasting.")
    burst: int = Field(default=400, ge=1, le=1_000_000, description="Requests at once, after a pause.")
    connections: int = Field(default=32, ge=1, le=10_000, description="Open connections.")
    header_kib: int = Field(default=16, ge=1, le=64, description="All headers of a request, in KiB.")
    handshake_timeout_s: ShortSeconds = Field(default=10.0, description="Longest TLS handshake.")
    header_timeout_s: ShortSeconds = Field(default=60.0, description="From the last answer to the next full header.")
    body_timeout_s: ShortSeconds = Field(default=10.0, description="Longest gap between two pieces of a body.")
    exchange_timeout_s: ShortSeconds = Field(default=300.0, description="One request and its answer; not for logs.")


class MembersConfig(Section):
    """Who may connect. Both files are read again when they change."""

    roster_file: RequiredLine = Field(description="The signed roster.")
    governance_file: RequiredLine = Field(description="The governance keys that must have signed it.")
    watermark_file: RequiredLine = Field(description="The gateway's note of the newest roster seen; it writes it.")
    revoked_file: RequiredLine = Field(description="SHA-256 of public keys that are refused, one a line; may be empty.")
    check_every_s: float = Field(default=2.0, gt=0, le=30, description="How often to look whether they changed.")


class LogConfig(Section):
    """Where refusals are written."""

    file: RequiredLine = Field(description="One JSON line for each refusal.")


RULES: Final = (
    Rule(
        keys=("fleet.ca_file", "control.ca_file"),
        is_broken=lambda gateway: gateway.fleet.ca_file == gateway.control.ca_file,
        message="with one CA a site could act as an operator",
        remedy="give sites and operators CAs of their own",
    ),
    Rule(
        keys=("fleet.listen", "control.listen"),
        is_broken=lambda gateway: gateway.fleet.listen == gateway.control.listen,
        message="sites and operators have one listener",
        remedy="give them listeners of their own",
    ),
)


class GatewayConfig(Section):
    """The whole of GATEWAY.toml."""

    superlink: SuperLinkConfig
    fleet: FleetConfig
    control: ControlConfig
    members: MembersConfig
    log: LogConfig
    limits: LimitsConfig = Field(default_factory=LimitsConfig)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        check(self, RULES)
        return self


GATEWAY_FILE: Final = reading.Format(
    GatewayConfig, rules=RULES, patterns=PATTERNS, other=RunConfig, other_name="the run file"
)


def load(path: Path) -> GatewayConfig:
    """Read GATEWAY.toml.

    Raises:
        ConfigError: The file cannot be read, or it has problems; the message lists all of them.
    """
    return parse(reading.read(path), name=str(path))


def parse(text: str, *, name: str) -> GatewayConfig:
    """Check the text of a GATEWAY.toml; `name` is what messages call it. See `load`."""
    return reading.parse(text, GATEWAY_FILE, name=name, overrides={})


def split_address(address: str) -> tuple[str, int]:
    """Take `host:port` apart.

    Example:
        >>> split_address("127.0.0.1:8000"), split_address("[::1]:8000")
        (('127.0.0.1', 8000), ('::1', 8000))
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
