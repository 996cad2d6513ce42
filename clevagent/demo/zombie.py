"""An agent that spends nothing and does nothing: its process lives, and its work stands still."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from clevagent.testing import HeartbeatReceiver
from clevagent_heartbeat.stall import EXIT_STATUS

STALL_AFTER_S = 2.0
_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Zombie:
    """What was heard of it."""

    beats: int
    """How many beats said that it lives."""
    age_s: float
    """How long nothing had moved when that was told."""
    where: str
    """The line where it was stuck."""
    stack: tuple[str, ...]
    status: int
    """What its process ended with."""


def watch() -> Zombie:
    """Let it hang in a process of its own, and hear of it as a monitor does.

    Raises:
        RuntimeError: it was not told, or did not end.

    """
    command = [sys.executable, "-P", "-m", "clevagent.demo.stuck"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with HeartbeatReceiver() as receiver:
        process = subprocess.Popen(  # noqa: S603 - this package, by this interpreter
            [*command, receiver.url, str(STALL_AFTER_S)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            process_group=0,
        )
        try:
            _, errors = process.communicate(timeout=_WAIT_S)
        finally:
            process.kill()
            process.communicate()
        return _heard(receiver.beats, process.returncode, errors.decode(errors="replace"))


def _heard(beats: list[dict[str, Any]], status: int, errors: str) -> Zombie:
    told = [(beat, incident) for beat in beats for incident in beat["incidents"] if incident["kind"] == "stall"]
    if not told or status != EXIT_STATUS:
        raise RuntimeError(
            f"The zombie of the demo was heard of in {len(beats)} beats and {len(told)} incidents, and ended with status {status} where "
            f"{EXIT_STATUS} was expected. Please report it, with what this computer is. It wrote:\n{errors}"
        )
    _, incident = told[0]
    details = incident["details"]
    return Zombie(
        beats=sum(beat["kind"] == "liveness" for beat in beats),
        age_s=details["seconds"],
        where=details["where"],
        stack=tuple(details["stack"]),
        status=status,
    )
