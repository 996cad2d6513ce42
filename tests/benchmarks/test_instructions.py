"""Counting instructions: what is counted can be called, and what callgrind writes is read and compared."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

DUMP = """\
# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 4242
cmd:  python -m benchmarks.instructions
part: 3


desc: I1 cache:
desc: Timerange: Basic block 0 - 1200
desc: Trigger: Client Request: core, fresh|200

positions: line
events: Ir
summary: 41000000
"""


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks import instructions

    return instructions


@pytest.mark.slow
def test_everything_that_is_counted_can_be_called(instructions: ModuleType) -> None:
    """Without valgrind, and with small histories: what a change breaks here is known before anybody counts."""
    labels = []
    for label, call, _, _ in instructions.operations(histories=(2, 3), open_calls=5):
        for _ in range(3):
            call()
        labels.append(label)
    assert len(set(labels)) == len(labels)
    expected = [
        f"history of {size}, {kind}, {way}"
        for size in (2, 3)
        for kind in ("text", "tool calls")
        for way in ("growing", "cut in front")
    ]
    assert labels[-10:-2] == expected


def test_a_dump_tells_the_instructions_of_one_call(instructions: ModuleType) -> None:
    assert instructions.callgrind.parse(DUMP) == ("core, fresh", 205_000)


def test_a_dump_that_nobody_asked_for_tells_nothing(instructions: ModuleType) -> None:
    """Callgrind writes one more when the program ends."""
    assert instructions.callgrind.parse(DUMP.replace("Client Request: core, fresh|200", "Program termination")) is None


def test_only_what_differs_by_more_than_the_tolerance_is_told(instructions: ModuleType) -> None:
    section = instructions.Section(
        title="T",
        header=["", "bare", "added", "target, at most"],
        rows=[["a", "100.0 k", "1,000.0 k", "9 k"], ["b", "-", "104.0 k", "-"]],
    )
    assert instructions.changes([section], {"T": [["a", "102.0 k", "1,040.0 k", "8 k"], ["b", "-", "100.0 k", "-"]]}) == [
        "a, added: 1,040.0 k -> 1,000.0 k",
        "b, added: 100.0 k -> 104.0 k",
    ]
    assert instructions.changes([section], {"T": [["a", "100.0 k", "1,000.0 k", "9 k"]]}) == [
        "b, added: 104.0 k (not counted before)"
    ]
