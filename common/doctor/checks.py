"""Checks that a site's doctor and a coordinator's share: versions, clock, key files, certificates' end, disk."""

import datetime
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from common import keyfile
from common.doctor.doctor import Result, check, failed, ok, problem_and_remedy, size, skipped, warning
from common.errors import ConfigError

PACKAGE: Final = "silotune"
SHOWN: Final = ("flwr", "torch", "transformers", "peft", "bitsandbytes", "opacus")
MAX_SKEW_S: Final = 60.0
WARN_DAYS: Final = 14
_DAY: Final = datetime.timedelta(days=1)


@check("versions", remedy="install silotune anew into an environment of its own, with the release's constraints.txt")
def versions(
    extra: str,
    *,
    requirements: Sequence[str] | None = None,
    python: str = "",
) -> Result:
    """Compare what is installed with the ranges that the installed silotune names.

    Args:
        requirements: Such as `torch>=2.7,<3`; None: those of the installed distribution.
        python: A version of Python; empty: this one's.
    """
    wanted = [
        Requirement(text) for text in (metadata.requires(PACKAGE) if requirements is None else requirements) or ()
    ]
    ours = [package for package in wanted if package.marker is None or package.marker.evaluate({"extra": extra})]
    problems, shown = [], []
    for package in ours:
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{package.name} is not installed")
            continue
        if not package.specifier.contains(version, prereleases=True):
            problems.append(f"{package.name} {version} is not {package.specifier}")
        if package.name in SHOWN:
            shown.append(f"{package.name} {version}")
    python = python or platform.python_version()
    allowed = SpecifierSet(metadata.metadata(PACKAGE)["Requires-Python"] or "")
    if python not in allowed:
        problems.append(f"Python {python} is not {allowed}")
    if problems:
        return failed("; ".join(problems))
    return ok(
        f"silotune {metadata.version(PACKAGE)}, Python {python}, {', '.join(shown)}; {len(ours)} packages in range"
    )


@check("clock", remedy="let a time server set this machine's clock, as with: timedatectl set-ntp true")
def clock(skew_s: float | None) -> Result:
    """Compare this clock with the gateway's, by the Date header of its answer.

    Args:
        skew_s: This clock less the other, in seconds; None: nobody was asked.
    """
    if skew_s is None:
        return skipped("no other clock was asked", "give --gateway")
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the gateway's; at most {MAX_SKEW_S:.0f} s"
    return ok(text) if abs(skew_s) <= MAX_SKEW_S else failed(text)


@check("key files", remedy="restore the key from your backup; a key of another user's process is checked as that user")
def key_files(paths: Iterable[Path]) -> Result:
    """Hold private keys against the rule of `common.keyfile`: there, of this user, mode 0600."""
    given = list(dict.fromkeys(path.absolute() for path in paths))
    if not given:
        return skipped("no folder of keys is known", "give --keys DIR")
    problems: list[tuple[str, str]] = []
    for path in given:
        try:
            keyfile.read(path)
        except ConfigError as error:
            problems.append(problem_and_remedy(error))
    if problems:
        return failed("\n".join(what for what, _ in problems), "; ".join(filter(None, (do for _, do in problems))))
    return ok(f"{', '.join(path.name for path in given)}: mode 0600, of this user")


@check("certificates' end", remedy="renew them")
def expiry(ends: Mapping[str, datetime.datetime], *, now: datetime.datetime, remedy: str) -> Result:
    """Check how long certificates, name to end, are good; under 14 days is a warning."""
    if not ends:
        return skipped("there is no certificate to look at")
    first = min(ends, key=lambda name: ends[name])
    days = (ends[first] - now) / _DAY
    text = f"{first}: until {ends[first]:%Y-%m-%d}, {days:.0f} days" + (" (the first to end)" if len(ends) > 1 else "")
    if days <= 0:
        return failed(f"{first}: ended at {ends[first]:%Y-%m-%d %H:%M} UTC", remedy)
    return warning(text, remedy) if days < WARN_DAYS else ok(text)


@check("disk", remedy="name a folder that this user may write in")
def disk(
    folder: Path, *, need_bytes: int, what: str, remedy: str = "free space, or name a folder on another disk"
) -> Result:
    """Check that a folder, or its nearest parent that is there, can be written and has room for `what`."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return failed(f"{there} is not a folder that this user may write in")
    free = shutil.disk_usage(there).free
    text = f"{there}: {size(free)} free, {size(need_bytes)} needed for {what}"
    return ok(text) if free >= need_bytes else failed(text, remedy)
