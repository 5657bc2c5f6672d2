"""What the gateway says and does by itself: the newest roster for sites, and the sites' registration at the SuperLink.

A SuperLink lets nodes connect whose keys are registered there. The signed roster is the list of these keys, so the
gateway registers a site whose key the SuperLink does not know: the first time that its courier connects, and again when
the SuperLink has lost its state.
"""

import hashlib
from typing import Final

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse, RegisterNodeRequest
from google.protobuf.message import DecodeError, Message
from starlette.responses import JSONResponse, Response

from common.trust import roster
from server.gateway.members import Members, Site
from server.gateway.refusals import Refused
from server.gateway.rules import Headers

_REGISTER: Final = "/v1/control/register-node"
_LIST: Final = "/v1/control/list-nodes"
_HEADERS: Final = {"content-type": "application/protobuf", "accept-encoding": "identity"}


def newest_roster(headers: Headers, *, known: Members) -> Response:
    """The signed roster as it lies in the gateway's file; 204 without a body for a site that has it already.

    Args:
        headers: Of the request; `roster.KNOWN` is the SHA-256 of the file that the site has.
        known: Those who may connect, by that roster.
    """
    has = [value for name, value in headers if name == roster.KNOWN.encode()]
    if has == [hashlib.sha256(known.roster).hexdigest().encode()]:
        return Response(status_code=204)
    return Response(known.roster, media_type="application/json")


async def tell(upstream: httpx.AsyncClient, site: Site) -> Response:
    """Whether the SuperLink knows a site's node key: one word, in the form of a refusal's.

    Raises:
        Refused: 502, the SuperLink is away or does not answer as expected.
    """
    answer = await _ask(upstream, _LIST, ListNodesRequest())
    try:
        keys = {node.public_key for node in ListNodesResponse.FromString(answer.content).nodes_info}
    except DecodeError:
        raise Refused(502, "superlink") from None
    if answer.status_code != 200:
        raise Refused(502, "superlink")
    return JSONResponse({"detail": "registered" if site.node_pem in keys else "unregistered"})


async def register(upstream: httpx.AsyncClient, site: Site) -> None:
    """Register a site's node key of the roster; a SuperLink that has it already refuses, and nothing changes.

    Raises:
        Refused: 502, the SuperLink is away.
    """
    await _ask(upstream, _REGISTER, RegisterNodeRequest(public_key=site.node_pem, name=site.name))


async def _ask(upstream: httpx.AsyncClient, path: str, message: Message) -> httpx.Response:
    """One call of the SuperLink's control interface."""
    try:
        return await upstream.post(path, content=message.SerializeToString(), headers=_HEADERS)
    except httpx.HTTPError as error:
        raise Refused(502, "superlink") from error
