"""Instructions that a call takes, counted by valgrind's callgrind: on one binary they vary by a per cent, times by sixty.

The counting program runs under valgrind and asks callgrind, through a few lines of C, to begin at zero and to write down what it
counted (https://valgrind.org/docs/manual/cl-manual.html). All threads count, so nothing else may run meanwhile; the hash seed is
fixed, and garbage is collected between the counts only. Instructions are no times: a cache miss costs none.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("callgrind.c")


BLOCKS = 3
"""How often each count is made; the least of them counts, as now and then another thread runs or a table grows."""


class Counter:
    """Counts inside the program that runs under valgrind; :func:`count` gives what it wrote down."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.clevagent_dump.argtypes = [ctypes.c_char_p]
        self._library.clevagent_start()

    def count(self, label: str, function: Callable[[], object], *, calls: int, warm_up: int) -> None:
        """Call ``function`` ``calls`` times, ``BLOCKS`` times over, and have the instructions written down under ``label``."""
        for _ in range(warm_up):
            function()
        gc.collect()
        gc.disable()
        try:
            numbers = range(calls)
            for _ in range(BLOCKS):
                self._library.clevagent_zero()
                for _ in numbers:
                    function()
                self._library.clevagent_dump(f"{label}|{calls}".encode())
        finally:
            gc.enable()


def count(module: str) -> dict[str, float]:
    """Run ``python -m module LIBRARY`` under callgrind; return the instructions of one call, by label.

    The program makes a :class:`Counter` of the library, and counts by it.

    Raises:
        RuntimeError: valgrind or a C compiler is missing, or the program failed.

    """
    valgrind, compiler = (_found(tool) for tool in ("valgrind", "cc"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "callgrind.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SOURCE], check=True)
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"]
        done = subprocess.run(
            [*command, sys.executable, "-m", module, str(library)],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"python -m {module} failed under valgrind with exit status {done.returncode}:\n{done.stderr}")
        counts: dict[str, float] = {}
        for path in folder.glob("counts*"):
            found = parse(path.read_text(encoding="utf-8"))
            if found is not None:
                label, instructions = found
                counts[label] = min(instructions, counts.get(label, instructions))
        return counts


def _found(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise RuntimeError(f"{tool} is not installed, so no instruction can be counted. `make bench-instructions` sets it up.")
    return path


def parse(dump: str) -> tuple[str, float] | None:
    """Read one file that callgrind wrote: the label, and the instructions of one call; ``None`` where no label asked for it."""
    trigger = re.search(r"^desc: Trigger: Client Request: (.*)\|(\d+)$", dump, re.MULTILINE)
    total = re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)
    if trigger is None or total is None:
        return None
    return trigger[1], int(total[1]) / int(trigger[2])
