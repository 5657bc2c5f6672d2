"""The process of a site whose agent smuggles: `python smuggling_agent.py NODE.toml`."""

import sys
from pathlib import Path

from client.agent import process
from client.cli import rows
from client.courier import door
from common.data import read
from common.run import config
from tests.leaks import canaries, encodings, smuggler


def main() -> None:
    node = config.load_node(Path(sys.argv[1]))
    agent = process.make_agent(node)
    tokenizer = rows.load_tokenizer(node.model, rows.Asked())
    forms = encodings.all_of(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    smuggler.corrupt(agent, canaries.texts(read.read_table(node.data.path)), forms)
    server = door.serve(
        agent.answer, socket_path=Path(node.agent.socket), max_message_bytes=node.agent.max_message_mib << 20
    )
    door.wait(server)


if __name__ == "__main__":
    main()
