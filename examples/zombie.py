"""A zombie: its process lives, its health check says "ok", and its work has been standing still. ClevAgent tells the line.

    pip install .
    python examples/zombie.py

The agent's tool asks a server that never answers, without a timeout. A stall is told after a second here; the default is two minutes.
"""

import socket
import threading

import clevagent

stalled = threading.Event()


def page_somebody(incident):
    """Tell whoever is on duty. With on_stall="exit" the process would end here, for its supervisor to start it again."""
    print(
        f"{incident.kind}: nothing has moved in {incident.details['in']!r}; stuck in {incident.details['stack'][-1].rpartition(' in ')[2]}()"
    )
    stalled.set()


def fetch(connection):
    """Read a page. Nobody has given it a timeout."""
    return connection.recv(65_536)


def agent(connection):
    """Work, in a run of its own."""
    with clevagent.run(), clevagent.tool_call("fetch"):
        fetch(connection)


clevagent.init(agent="reader", stall_after=1, on_stall=page_somebody)
ours, silent_server = socket.socketpair()
worker = threading.Thread(target=agent, args=(ours,))
worker.start()
stalled.wait(30)
print("health check: ok" if worker.is_alive() else "health check: down")
silent_server.send(b"at last")  # the rest of the program
worker.join()
for end in (ours, silent_server):
    end.close()
clevagent.shutdown()
