"""`silotune-server gateway`: both listeners in one process, until a signal."""

import asyncio
import resource
import signal
import time
from collections.abc import Callable
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
from server.gateway.settings import ControlConfig, FleetConfig, GatewayConfig, LimitsConfig, split_address

REPLIES: Final = "replies.json"  # beside the note of the newest roster


def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: A file or an address cannot be used.
        AuthError: The roster is not signed as it must be, or too old.
    """
    tls.check_apart(Path(config.fleet.ca_file), Path(config.control.ca_file))
    who = config.members
    roster_file, governance_file, revoked_file = map(Path, (who.roster_file, who.governance_file, who.revoked_file))

    def load() -> Members:
        return members.load(
            roster_file=roster_file,
            governance_file=governance_file,
            watermark=Path(who.watermark_file),
            revoked_file=revoked_file,
            now_s=time.time(),
        )

    files = [roster_file, governance_file, revoked_file]
    watched = Watched(files, load=load, clock=time.monotonic, every_s=who.check_every_s)
    watched.now()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is an open file
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log = RefusalLog(Path(config.log.file), wall_clock=time.time, clock=time.monotonic)
    try:
        asyncio.run(_serve(config, known=watched.now, log=log))
    finally:
        log.close()


async def _serve(config: GatewayConfig, *, known: Callable[[], Members], log: RefusalLog) -> None:
    """Run both listeners; when one fails the other is cancelled, and its error is raised as it is."""
    context = tls.upstream_context(Path(config.superlink.ca_file))
    async with proxy.connect(config.superlink.address, context=context) as upstream:
        replies = Replies(Path(config.members.watermark_file).with_name(REPLIES), wall_clock=time.time)
        fleet = Gate(
            name="fleet",
            paths=rules.FLEET_PATHS | rules.SITE_PATHS,
            max_body_bytes=config.fleet.max_body_mib << 20,
            check_peer=lambda headers, fingerprint, known: rules.check_site(headers, fingerprint, known=known),
            check_body={rules.PUSH_MESSAGES: replies.check_push},
            endless=frozenset(),
            replies=replies,
        )
        allowed = bundles.allowed(config.control.bundles)
        control = Gate(
            name="control",
            paths=rules.CONTROL_PATHS,
            max_body_bytes=config.control.max_body_mib << 20,
            check_peer=lambda _, fingerprint, known: rules.check_operator(fingerprint, known=known),
            check_body={rules.START_RUN: lambda _, body: bundles.check_start(body, bundles=allowed)},
            endless=frozenset({rules.STREAM_LOGS}),
        )
        make = partial(_listener, limits=config.limits, known=known, log=log, upstream=upstream)
        listeners = [make(fleet, config.fleet), make(control, config.control)]

        def stop() -> None:
            for listener in listeners:
                listener.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        tasks = [asyncio.create_task(listener.serve()) for listener in listeners]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def _listener(
    gate: Gate,
    ends: FleetConfig | ControlConfig,
    *,
    limits: LimitsConfig,
    known: Callable[[], Members],
    log: RefusalLog,
    upstream: httpx.AsyncClient,
) -> Listener:
    """Put one listener together."""
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
