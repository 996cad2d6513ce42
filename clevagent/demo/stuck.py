"""The process of the demo's zombie: an agent whose tool reads from a server that never answers, without a timeout."""

from __future__ import annotations

import socket
import sys

import clevagent


def read_page(connection: socket.socket) -> bytes:
    """Read what the server says. It says nothing, and nobody has set a timeout."""
    return connection.recv(65_536)


def main(endpoint: str, stall_after: float) -> None:
    """Work until it hangs."""
    clevagent.init(agent="zombie", endpoint=endpoint, interval=1, stall_after=stall_after, on_stall="exit", spool="off")
    ours, _silent_server = socket.socketpair()
    with clevagent.run(), clevagent.tool_call("fetch"):
        read_page(ours)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
