"""All aggregation methods: adding one is a file and a line here."""

from typing import Final

from common.errors import ConfigError
from server.aggregate.method import Method
from server.aggregate.methods import (
    fedavg,
    fedex,
    fedsa,
    fedsvd,
    ffa,
    flexlora,
    flora,
    ravan,
    rolora,
)

METHODS: Final[dict[str, Method]] = {
    "fedavg": fedavg,
    "ffa": ffa,
    "fedsvd": fedsvd,
    "rolora": rolora,
    "flexlora": flexlora,
    "fedex": fedex,
    "flora": flora,
    "fedsa": fedsa,
    "ravan": ravan,
}


def find(name: str) -> Method:
    """The method of `aggregation.method`.

    Raises:
        ConfigError: No such method in this version.
    """
    if name not in METHODS:
        raise ConfigError(f"aggregation.method = '{name}' is not built in this version; there is {', '.join(METHODS)}")
    return METHODS[name]
