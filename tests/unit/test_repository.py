"""Promises that the repository makes about itself."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer.main

from client.cli.app import app as client
from server.cli.app import app as server
from simulations.cli.app import app as sim

ROOT = Path(__file__).parents[2]
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")})
COMMANDS = {"silotune-client": client, "silotune-server": server, "silotune-sim": sim}


@pytest.mark.parametrize("package", ["client", "server", "common", "simulations"])
def test_no_other_distribution_owns_our_package_names(package: str) -> None:
    assert set(importlib.metadata.packages_distributions().get(package, [])) <= {"silotune"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_commands_that_exist(page: Path) -> None:
    known = {name: set(typer.main.get_command(app).commands) for name, app in COMMANDS.items()}
    text = page.read_text(encoding="utf-8")
    for name, command in re.findall(r"(silotune-(?:client|server|sim)) ([a-z][a-z-]*)", text):
        assert command in known[name], f"{name} {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_readme_test_command_is_a_target_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ranges_admit_the_pins() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for group in project["optional-dependencies"].values() for one in group]
    pins = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for text in [*project["dependencies"], *extras]:
        wanted = Requirement(text)
        if wanted.name != "silotune":
            assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), text


def test_every_pin_has_the_hashes_of_its_files() -> None:
    pins = {line for line in (ROOT / "constraints.txt").read_text().split() if "==" in line}
    text = (ROOT / "constraints-hashes.txt").read_text()
    entries = re.findall(r"^(\S+==\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert {name for name, _ in entries} == pins
    assert sum(hashes.count("--hash") for _, hashes in entries) == text.count("--hash") > len(pins)
    assert "://" not in text


def test_files_stay_small() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    long = {name for name in tracked.split() if len((ROOT / name).read_text().splitlines()) > 600}
    assert not {name for name in long if "_pb2" not in name}
