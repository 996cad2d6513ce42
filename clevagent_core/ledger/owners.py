"""How processes see of each other whether they are alive: each holds a kernel lock on a file of its own.

The kernel takes the lock back when the process ends, however it ends; and unlike a process id it cannot become somebody else's.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from clevagent_core.interrupts import is_interrupt


def owner_path(path: Path, owner: int) -> Path:
    """Name the file by whose lock an owner is seen to be alive."""
    return path.with_name(f"{path.name}-owner-{owner}")


def lock_file(path: Path) -> int:
    """Make a file and lock it for good; -1 where another process has."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Tell whether some process holds the lock of a file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        if is_interrupt(error):
            raise
        return True  # nobody can tell
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
