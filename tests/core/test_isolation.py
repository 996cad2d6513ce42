"""What ``tests/conftest.py`` promises every test."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest


def test_no_connection_leaves_this_machine():
    with socket.socket() as made, pytest.raises(RuntimeError, match="tests talk to this machine only"):
        made.connect(("192.0.2.1", 80))


def test_no_connection_of_an_event_loop_leaves_this_machine():
    with pytest.raises(RuntimeError, match="tests talk to this machine only"):
        asyncio.run(asyncio.open_connection("192.0.2.1", 80))


def test_connections_to_this_machine_are_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_no_setting_comes_from_outside():
    assert not [name for name in os.environ if name.startswith("CLEVAGENT_")]
