"""FoundingConfig: the file that a federation's keys and certificates are made from; strict and closed."""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from common.run import config, reading
from common.run.rules.rule import Rule, check
from common.run.schema import section
from common.run.schema.section import Array, Section

HOST: Final = r"^[A-Za-z0-9.:-]+$"
ID: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
PATTERNS: Final = {
    **section.PATTERNS,
    HOST: "a host name or an address",
    ID: "1 to 63 of a-z, 0-9 and -, with no - at either end",
}
_Days = Annotated[int, Field(ge=1, le=36_500)]
_NO_OVERRIDES: Final[Mapping[str, str]] = {}


class IdentitySection(Section):
    """What the federation is called, and where its sites reach it."""

    id: str = Field(pattern=ID, description="The federation's name; part of every certificate and signature.")
    host_names: Array[Annotated[str, Field(pattern=HOST, max_length=253)]] = Field(
        min_length=1, description="Names and addresses of the gateway, the one that sites use first."
    )
    fleet_port: int = Field(default=9443, ge=1, le=65535, description="Port of the gateway's listener for sites.")
    operator_names: Array[Annotated[str, Field(pattern=ID)]] = Field(
        default=("operator",), description="Who may control runs."
    )


class GovernanceSection(Section):
    """Whose signatures a roster needs: `quorum` of `num_keys`."""

    num_keys: int = Field(default=3, ge=1, le=64, description="Number of governance keys, one a member.")
    quorum: int = Field(default=2, ge=1, le=64, description="How many of them must sign a roster or a kit.")


class ValiditySection(Section):
    """How long certificates are good."""

    root_days: _Days = Field(default=7300, description="The root, which stays offline.")
    intermediate_days: _Days = Field(default=1825, description="The issuers for servers, sites and operators.")
    certificate_days: _Days = Field(default=90, description="Certificates of the gateway, sites and operators.")
    overlap_days: int = Field(default=14, ge=0, le=365, description="After a rotation, the old certificate's rest.")


class FoundingConfig(Section):
    """One federation."""

    version: Annotated[Literal[1], BeforeValidator(section.refuse_look_alikes)] = Field(
        description="Version of this file's format."
    )
    federation: IdentitySection
    governance: GovernanceSection = Field(default_factory=GovernanceSection)
    validity: ValiditySection = Field(default_factory=ValiditySection)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        check(self, RULES)
        return self


def _is_host(name: str) -> bool:
    """Whether this is an address, or labels of letters, digits and hyphens."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        labels = name.split(".")
        is_number = labels[-1].isdecimal()
        return ":" not in name and not is_number and all(0 < len(label) < 64 for label in labels) and len(name) < 254
    return True


RULES: Final = (
    Rule(
        ("governance.quorum", "governance.num_keys"),
        lambda c: c.governance.quorum > c.governance.num_keys,
        "more signatures than keys, so that nothing could ever be signed",
        "lower the quorum",
    ),
    Rule(
        ("validity.intermediate_days", "validity.root_days"),
        lambda c: c.validity.intermediate_days > c.validity.root_days,
        "an issuer must not outlive the root",
        "lower it",
    ),
    Rule(
        ("validity.certificate_days", "validity.intermediate_days"),
        lambda c: c.validity.certificate_days > c.validity.intermediate_days,
        "a certificate must not outlive its issuer",
        "lower it",
    ),
    Rule(
        ("validity.overlap_days", "validity.certificate_days"),
        lambda c: c.validity.overlap_days >= c.validity.certificate_days,
        "the overlap must be shorter than a certificate's life",
        "lower it",
    ),
    Rule(
        ("federation.host_names",),
        lambda c: not all(map(_is_host, c.federation.host_names)),
        "one is neither a host name nor an address",
        "correct it",
    ),
    Rule(
        ("federation.operator_names",),
        lambda c: "gateway" in c.federation.operator_names,
        "gateway is the name of the gateway",
        "choose another",
    ),
)
FORM: Final = reading.Format(
    FoundingConfig, rules=RULES, patterns=PATTERNS, other=config.RunConfig, other_name="the run file"
)


def load(path: Path) -> FoundingConfig:
    """Read a federation file.

    Raises:
        ConfigError: The file cannot be read, or it has problems; the message lists all of them.
    """
    return parse(reading.read(path), name=str(path))


def parse(text: str, *, name: str) -> FoundingConfig:
    """Check the text of a federation file; `name` is what messages call it. See `load`.

    Example:
        >>> text = 'version = 1\\n[federation]\\nid = "onco-eu"\\nhost_names = ["gateway.onco.example", "10.0.0.5"]'
        >>> parse(text, name="federation.toml").federation.host_names
        ('gateway.onco.example', '10.0.0.5')
    """
    return reading.parse(text, FORM, name=name, overrides=_NO_OVERRIDES)
