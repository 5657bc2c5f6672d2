"""A run under Ray in a process of its own: Ray leaves open files behind, which pytest rightly complains about."""

import json
import sys
from pathlib import Path

from server.folder import run_files
from simulations.engines import engines
from simulations.world import world
from simulations.world.world import Source, World
from tests import tiny


def main(base: Path, folder: Path, changes: dict[str, str]) -> None:
    """Do it; print the sites."""
    settings = tiny.settings(base, changes)
    engine, log = world.load_engine(settings, num_threads=1), run_files.prepare(settings, folder)
    given = {"num_workers": 2, "num_threads": 1, "is_noise_accepted": settings.privacy.mode == "site"}
    shared = World(settings, engine, Source.of(settings).sites(), folder)
    outcome = engines.ray(shared, base_folder=base, log=log, **given)
    print(*outcome.sites)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
