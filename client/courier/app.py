"""The courier: a Flower ClientApp that carries frames between the link and the agent. Imports no torch.

The node's own configuration says where the agent listens: `flower-supernode --node-config 'agent-socket="PATH"'`.
Nothing of an exception leaves: Flower would send its text to the server, so every failure is a code.
"""

from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from client.courier import line
from common.errors import TransportError, WireError
from common.frame import envelope
from common.frame.exchanges import EXCHANGES

SOCKET_KEY = "agent-socket"
app = ClientApp()


def carry(kind: str) -> ClientAppCallable:
    """Make the function that answers messages of one kind."""

    def answer(message: Message, context: Context) -> Message:
        try:
            socket_path = Path(str(context.node_config[SOCKET_KEY]))
            frame = line.call(socket_path, kind, envelope.unpack(message.content), message.metadata.ttl)
            content = RecordDict({envelope.NAME: ArrayRecord({envelope.NAME: Array(*envelope.declare(frame))})})
            return Message(content, reply_to=message)
        except TransportError:
            code = envelope.AGENT_AWAY
        except WireError:
            code = envelope.BAD_CONTENT
        except Exception:  # noqa: BLE001 - the app's edge; Flower sends an exception's text to the server
            code = envelope.COURIER_FAILED
        return Message(Error(code), reply_to=message)

    return answer


for _kind in EXCHANGES:
    app.query(_kind)(carry(_kind))
