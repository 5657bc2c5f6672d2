"""Flower's simulation engine: virtual sites in Ray workers, for many GPUs or machines.

Each worker is one process and keeps what it has loaded: the agents come from a function that caches, so a base is
loaded once a worker and not once a message.
"""

import importlib.util
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from flwr.app import ConfigRecordValues, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from common import extras, quiet
from common.errors import ConfigError, TransportError
from common.frame.exchanges import EXCHANGES
from simulations.engines import grid as grids

Result = TypeVar("Result")
AgentFactory = Callable[[int], Callable[[bytes], bytes]]
BackendConfig = dict[str, dict[str, ConfigRecordValues]]
PARTITION_KEY: Final = "partition-id"  # Flower numbers its virtual nodes from 0
_POLL_S: Final = 0.05


def run(
    server_main: Callable[[Grid], Result],
    agent_for: AgentFactory,
    *,
    num_sites: int,
    num_workers: int,
    num_gpus: int = 0,
) -> Result:
    """Run the server's side in this process and the sites in Ray workers.

    Args:
        server_main: Does the whole run over the grid it is given.
        agent_for: Site index, from 0, to that site's `answer`. Called in workers for every message, so it must cache;
            it must survive pickling: a function of an importable module, or a `functools.partial` of one.
        num_gpus: GPUs of this machine, which the workers share evenly; each worker sees one.

    Raises:
        ConfigError: Ray is not installed.
        TransportError: The engine ended before `server_main` did.
    """
    quiet.hush()
    if importlib.util.find_spec("ray") is None:
        command = extras.install("sim")
        raise ConfigError(f"this engine needs Ray; use the in-process engine, or install it with: {command}")
    results: list[Result] = []
    resources: BackendConfig = {"client_resources": {"num_cpus": 1, "num_gpus": gpu_share(num_workers, num_gpus)}}
    server_app, logger = ServerApp(), logging.getLogger("flwr")

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < num_sites:  # Flower registers them beside this thread
            time.sleep(_POLL_S)
        results.append(server_main(grid))

    with (
        tempfile.TemporaryDirectory(prefix="silotune-ray-", ignore_cleanup_errors=True) as folder,
        _environment(FLWR_HOME=f"{folder}/flower"),
        ExitStack() as stack,
    ):
        _start_ray(num_workers, num_gpus=num_gpus, folder=Path(folder))
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        run_simulation(server_app, virtual_app(agent_for), num_sites, backend_config=resources)
    if not results:
        raise TransportError("Flower's simulation engine ended before the run did; its messages are above")
    return results[0]


def gpu_share(num_workers: int, num_gpus: int) -> float:
    """What one worker takes of a GPU; Ray hides all GPUs from a worker that takes nothing.

    Example:
        >>> gpu_share(4, 0), gpu_share(2, 4), gpu_share(4, 4), gpu_share(5, 2)
        (0.0, 1.0, 1.0, 0.3333)
    """
    if num_gpus == 0:
        return 0.0
    sharing = -(-num_workers // num_gpus)
    return 1.0 if sharing == 1 else math.floor(1e4 / sharing) / 1e4  # Ray counts in steps of 0.0001


def virtual_app(agent_for: AgentFactory) -> ClientApp:
    """The ClientApp of all virtual sites: the site's own index picks its agent."""

    def answer(message: Message, context: Context) -> Message:  # pickled, so it refers to nothing but `agent_for`
        reply = grids.answer(agent_for(int(context.node_config[PARTITION_KEY])), message)
        if reply is None:
            raise TransportError("a virtual site in a worker must answer at once")
        return reply

    app = ClientApp()
    for kind in EXCHANGES:
        app.query(kind)(answer)
    return app


def _start_ray(num_workers: int, *, num_gpus: int, folder: Path) -> None:
    """Start Ray on this machine alone, before Flower would: Flower waits for ever if Ray fails.

    Two habits of Ray 2.55 are stopped: it listens on every interface without a password, and it asks the cloud's
    metadata servers where it is, though usage reports are off, unless a file in the home folder says so.
    """
    with _environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", HOME=str(folder)):
        import ray

        if ray.is_initialized():
            return  # a cluster that the caller has joined
        (folder / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
        for is_last in (False, False, True):
            try:
                ray.init(
                    num_cpus=num_workers,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,  # what a site could not do is in its own log
                    runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
                    _temp_dir=str(folder),
                )
                return
            except Exception as error:
                ray.shutdown()
                if is_last:
                    what = f"Ray did not start ({type(error).__name__})"
                    raise TransportError(f"{what}: free memory and disk, or use another engine") from error


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while; processes started meanwhile keep them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
