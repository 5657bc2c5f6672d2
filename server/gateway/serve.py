"""`silotune-server gateway`: both listeners in one process, until a signal."""

import asyncio
import resource
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from server.gateway import bundles, members, proxy, rules, tls
from server.gateway.connection import Door, Listener
from server.gateway.limits import Buckets, Seats
from server.gateway.members import Members, Watched
from server.gateway.proxy import Gate, Proxy
from server.gateway.refusals import RefusalLog
from server.gateway.replies import Replies
from server.gateway.settings import ControlConfig, FleetConfig, GatewayConfig, MembersConfig, split_address

REPLIES: Final = "replies.json"  # beside the note of the newest roster


def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: GATEWAY.toml.

    Raises:
        ConfigError: A file or an address cannot be used.
        AuthError: The roster is not signed as it must be, or too old.
    """
    tls.check_apart(Path(config.fleet.ca_file), Path(config.control.ca_file))
    watched = _watched(config.members)
    watched.now()
    _allow_many_files()
    log = RefusalLog(Path(config.log.file), wall_clock=time.time, clock=time.monotonic)
    try:
        asyncio.run(_serve(config, known=watched.now, log=log))
    finally:
        log.close()


def _watched(config: MembersConfig) -> Watched:
    """Watch the files that say who may connect."""
    files = [Path(config.roster_file), Path(config.governance_file), Path(config.revoked_file)]
    roster_file, governance_file, revoked_file = files

    def load() -> Members:
        return members.load(
            roster_file=roster_file,
            governance_file=governance_file,
            watermark=Path(config.watermark_file),
            revoked_file=revoked_file,
            now_s=time.time(),
        )

    return Watched(files, load=load, clock=time.monotonic, every_s=config.check_every_s)


async def _serve(config: GatewayConfig, *, known: Callable[[], Members], log: RefusalLog) -> None:
    """Run both listeners."""
    context = tls.upstream_context(Path(config.superlink.ca_file))
    async with proxy.connect(config.superlink.address, context=context) as upstream:
        make = partial(_listener, config=config, known=known, log=log, upstream=upstream)
        replies = Replies(Path(config.members.watermark_file).with_name(REPLIES), wall_clock=time.time)
        fleet = make(_fleet_gate(config.fleet, replies), config.fleet)
        listeners = [fleet, make(_control_gate(config.control), config.control)]
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _stop, listeners)
        await _together([listener.serve() for listener in listeners])


async def _together(servers: Sequence[Coroutine[None, None, None]]) -> None:
    """Run all until they end; when one fails the others are cancelled, and its error is raised as it is."""
    tasks = [asyncio.create_task(server) for server in servers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _stop(listeners: list[Listener]) -> None:
    """Ask all listeners to end."""
    for listener in listeners:
        listener.should_exit = True


def _listener(
    gate: Gate,
    ends: FleetConfig | ControlConfig,
    *,
    config: GatewayConfig,
    known: Callable[[], Members],
    log: RefusalLog,
    upstream: httpx.AsyncClient,
) -> Listener:
    """Put one listener together."""
    limits = config.limits
    context = tls.server_context(
        certificate_file=Path(ends.certificate_file),
        key_file=Path(ends.key_file),
        ca_file=Path(ends.ca_file),
        on_failure=lambda reason: log.write(gate.name, f"handshake: {reason}"),
    )
    buckets = Buckets(per_s=limits.requests_per_s, burst=limits.burst, clock=time.monotonic)
    app = Proxy(gate, known, buckets, limits, upstream, log, time.time)
    door = Door(gate.name, split_address(ends.listen), context, limits, Seats(limits.connections), log)
    return Listener(app, door)


def _fleet_gate(config: FleetConfig, replies: Replies) -> Gate:
    """What sites may do."""
    return Gate(
        name="fleet",
        paths=rules.FLEET_PATHS | rules.SITE_PATHS,
        max_body_bytes=config.max_body_mib << 20,
        check_peer=lambda headers, fingerprint, known: rules.check_site(headers, fingerprint, known=known),
        check_body={rules.PUSH_MESSAGES: replies.check_push},
        endless=frozenset(),
        replies=replies,
    )


def _control_gate(config: ControlConfig) -> Gate:
    """What operators may do."""
    allowed = bundles.allowed(config.bundles)
    return Gate(
        name="control",
        paths=rules.CONTROL_PATHS,
        max_body_bytes=config.max_body_mib << 20,
        check_peer=lambda _, fingerprint, known: rules.check_operator(fingerprint, known=known),
        check_body={rules.START_RUN: lambda _, body: bundles.check_start(body, bundles=allowed)},
        endless=frozenset({rules.STREAM_LOGS}),
    )


def _allow_many_files() -> None:
    """Raise this process' own limit on open files to what the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
