"""A signal at the end of a loop's round, where CPython looks for signals, finds the block that the loop stands in.

CPython 3.13 forgets that block where the round ends under a condition (a filter, an ``if`` as the last statement, the test of a
``while``): the jump back, which the compiler adds late, is in no row of the exception table (python/cpython#130279). A lock would stay
locked, a ``finally`` would not run. So such a loop is a function of its own, or ends its round in another way.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(ROOT.glob("clevagent*/**/*.py"))


def code_objects(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_objects(constant)


def blocks_around(code: dis.Bytecode, offset: int) -> list[int]:
    """The handlers, innermost first, of the ``with`` and ``try`` blocks around an instruction; not those that the compiler adds."""
    opcodes = {instruction.offset: instruction.opname for instruction in code}
    found: list[int] = []
    handlers = {offset}
    while True:
        target = next((entry.target for entry in code.exception_entries if entry.start <= offset < entry.end), None)
        if target is None or target in handlers:
            return found
        handlers.add(target)
        if opcodes[target] == "PUSH_EXC_INFO":
            found.append(target)
        offset = target


def forgotten(source: str) -> list[str]:
    """Where a signal at the end of a round misses a block that the loop stands in."""
    found = []
    for code in code_objects(compile(source, "module", "exec")):
        bytecode = dis.Bytecode(code)
        for jump in bytecode:
            if "JUMP_BACKWARD" in jump.opname and "NO_INTERRUPT" not in jump.opname:
                # Where the interpreter stands when it looks: 3.11 and 3.12 have jumped by then, and take the instruction before.
                looks_at = jump.offset if sys.version_info >= (3, 13) else jump.argval - 2
                if blocks_around(bytecode, jump.argval) and not blocks_around(bytecode, looks_at):
                    found.append(f"{code.co_qualname}, line {jump.positions and jump.positions.lineno}")
    return found


FILTER_UNDER_A_LOCK = """
def idle(lock, runs):
    with lock:
        return [run for run in runs if run.is_idle]
"""


def test_the_check_finds_what_cpython_forgets() -> None:
    assert forgotten(FILTER_UNDER_A_LOCK) == (["idle, line 4"] if sys.version_info[:2] == (3, 13) else [])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_block_is_left_without_its_end(path: Path) -> None:
    assert forgotten(path.read_text()) == []
