"""The results of the benchmarks, collected and written down.

    python -m benchmarks.results            # what was measured, into benchmarks/RESULTS.md
    python -m benchmarks.results --readme   # and the tables of README.md that stand between markers

Each benchmark calls :func:`contribute`, which leaves its tables as JSON in ``benchmarks/.results`` (not in version control). What was
not measured this time stays in RESULTS.md as it was; each table says when it was measured, and on what.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".results"
RESULTS = HERE / "RESULTS.md"
README = HERE.parent / "README.md"
ORDER = (
    "peer_ceilings",
    "peer_costs",
    "peer_signs",
    "ceilings",
    "instructions",
    "hot_paths_langchain",
    "hot_paths_core",
    "graphs",
    "crews",
    "clients",
    "ledgers",
    "heartbeats",
    "hot_paths_imports",
)
"""Which benchmark comes first; any other one follows."""

INTRODUCTION = """\
# Results

Written by `python -m benchmarks.results`; do not edit. `make bench` measures ClevAgent, `make bench-instructions` counts instructions,
`make bench-peers` measures it beside others that are installed from the package index and driven as their own documentation says.
Times are CPU times on a machine with other work to do: compare the ratios, which were taken in one process in alternating blocks,
rather than single figures. Instructions come out the same within a per cent.
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table. Cells are text, written as they are."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What a reader has to know, in Markdown; stands under the table."""
    marker: str = ""
    """Where README.md shows the table: between ``<!-- marker -->`` and ``<!-- /marker -->``."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one run of one benchmark found, and on what."""

    sections: Sequence[Section]
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    machine: str = ""


def this_machine() -> str:
    """Say on what was measured, without naming it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {platform.python_implementation()} {platform.python_version()}, {platform.system()}"


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Look up the installed versions."""
    return {name: version(name) for name in distributions}


def contribute(name: str, sections: Sequence[Section], *, distributions: Iterable[str] = ("clevagent",)) -> None:
    """Leave ``sections`` for the next :func:`main`, in place of what ``name`` left before."""
    found = Contribution(
        sections=sections,
        versions=versions_of(distributions),
        date=datetime.now(UTC).date().isoformat(),
        machine=this_machine(),
    )
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def collected() -> list[Contribution]:
    """Read what was left, in :data:`ORDER`."""
    paths = sorted(FOLDER.glob("*.json"), key=lambda path: (_rank(path.stem), path.stem))
    return [_parse(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _parse(raw: dict[str, Any]) -> Contribution:
    return Contribution(**raw | {"sections": [Section(**section) for section in raw["sections"]]})


def table(section: Section) -> str:
    """Write a table in Markdown: names to the left, figures to the right."""
    lines = [_line(section.header), "|---|" + "---:|" * (len(section.header) - 1), *map(_line, section.rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def document(contributions: Sequence[Contribution], before: str = "") -> str:
    """Write RESULTS.md: what was measured now, and whatever else stands in ``before``."""
    now = {section.title: _text(section, found) for found in contributions for section in found.sections}
    kept = {title: text for title, text in _split(before).items() if title not in now}
    # New tables come in their order; one that was measured again keeps its place.
    titles = list(_split(before)) if kept else []
    titles += [title for title in now if title not in titles]
    return "\n".join([INTRODUCTION, *({**kept, **now}[title] for title in titles)])


def _text(section: Section, found: Contribution) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    parts = [f"## {section.title}", table(section), section.note.strip(), f"Measured on {found.date}: {found.machine}; {versions}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _split(text: str) -> dict[str, str]:
    """Take RESULTS.md apart: the text of each table, by its title."""
    _, *parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {part.partition("\n")[0].removeprefix("## "): part.rstrip("\n") + "\n" for part in parts}


def tables(text: str) -> dict[str, list[list[str]]]:
    """Read the tables of RESULTS.md: the cells of each row, by title."""
    return {
        title: [_cells(line) for line in part.splitlines() if line.startswith("| ")][1:] for title, part in _split(text).items()
    }


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def between_markers(text: str, section: Section) -> str:
    """Put a section's table where its markers stand in ``text``.

    Raises:
        ValueError: there is no such pair of markers.

    """
    start, end = f"<!-- {section.marker} -->", f"<!-- /{section.marker} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    written, found = pattern.subn(lambda _: f"{start}\n{table(section)}\n{end}", text)
    if found != 1:
        raise ValueError(f"the text has {found} places between {start} and {end}, so the table has no place; put in one")
    return written


def main(arguments: Sequence[str]) -> int:
    """Assemble what is there; say so where nothing is."""
    found = collected()
    if not found:
        print("Nothing was measured yet: run `make bench` or `make bench-peers` first.", file=sys.stderr)
        return 1
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    RESULTS.write_text(document(found, before), encoding="utf-8")
    if "--readme" in arguments:
        text = README.read_text(encoding="utf-8")
        for section in (section for contribution in found for section in contribution.sections if section.marker):
            text = between_markers(text, section)
        README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
