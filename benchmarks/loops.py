"""How well the loop detector tells looping runs from healthy ones, on labelled trajectories.

    python -m benchmarks.loops PATH                  # a .jsonl or .jsonl.gz file of labelled runs
    python -m benchmarks.loops PATH --missed         # and what was missed, by the shape of the loop
    python -m benchmarks.loops PATH --json FILE      # and the table as JSON

One JSON object a line: ``source``, ``label`` (``healthy``, ``looping``; others are left out), ``loop_from_step``, ``why``, and ``steps``
with ``tool``, ``args``, ``args_normalised``, ``result``, ``result_normalised`` (hex digests) and ``error``. The digests serve as
fingerprints; their normalised arguments lack all numbers, where :mod:`clevagent_core.guards.fingerprints` keeps them: harder for
precision. A run counts as found if the detector ever fires; the delay is counted in calls after ``loop_from_step``, and is negative
where an earlier repetition set it off.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clevagent_core.guards.repetition import Finding, Repetition, Sign

BLOCKS = 7


@dataclass
class Trajectory:
    source: str
    is_looping: bool
    loop_from_step: int | None
    why: str
    signs: list[Sign]


@dataclass
class Score:
    healthy: int = 0
    looping: int = 0
    found: int = 0
    false_alarms: int = 0
    delays: list[int] = field(default_factory=list)

    def add(self, run: Trajectory, fired: int | None) -> None:
        self.looping += run.is_looping
        self.healthy += not run.is_looping
        if fired is None:
            return
        if not run.is_looping:
            self.false_alarms += 1
            return
        self.found += 1
        if run.loop_from_step is not None:
            self.delays.append(fired - run.loop_from_step)

    def row(self) -> dict[str, Any]:
        """What is not defined (no loops, no healthy runs) is None, and never 1."""
        told = self.found + self.false_alarms
        return {
            "healthy": self.healthy,
            "looping": self.looping,
            "found": self.found,
            "false_alarms": self.false_alarms,
            "precision": self.found / told if told else None,
            "recall": self.found / self.looping if self.looping else None,
            "median_delay_calls": statistics.median(self.delays) if self.delays else None,
            "false_alarms_per_healthy_run": self.false_alarms / self.healthy if self.healthy else None,
        }


def read(path: Path) -> Iterator[Trajectory]:
    content = path.read_bytes()
    for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines():
        run = json.loads(line)
        if run["label"] in {"healthy", "looping"}:
            signs = [sign(step) for step in run["steps"]]
            yield Trajectory(run["source"], run["label"] == "looping", run["loop_from_step"], run["why"], signs)


def sign(step: dict[str, Any]) -> Sign:
    digests = (int(step[name], 16) for name in ("args", "args_normalised", "result", "result_normalised"))
    return Sign(step["tool"], *digests, bool(step["error"]))


def first_finding(signs: Iterable[Sign]) -> tuple[int, Finding] | None:
    """The step at which a detector with default settings fires first, where each call began after the one before had ended."""
    repetition = Repetition()
    for step, seen in enumerate(signs):
        finding = repetition.observe(seen, started=step)
        if finding is not None:
            return step, finding
    return None


def microseconds_a_step(runs: list[Trajectory]) -> float:
    """The fastest of several passes over all steps of all runs, divided by their number."""
    best = float("inf")
    for _ in range(BLOCKS):
        start = time.thread_time()
        for run in runs:
            repetition = Repetition()
            for step, seen in enumerate(run.signs):
                repetition.observe(seen, started=step)
        best = min(best, time.thread_time() - start)
    return best / sum(len(run.signs) for run in runs) * 1e6


@dataclass
class Report:
    total: dict[str, Any]
    by_source: dict[str, dict[str, Any]]
    by_rule: dict[str, dict[str, int]]
    missed_by_why: dict[str, list[int]]
    """How many of how many loops of this shape."""
    microseconds_a_step: float


def report_on(runs: list[Trajectory]) -> Report:
    total, by_source = Score(), collections.defaultdict(Score)
    rules: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"found": 0, "false_alarms": 0})
    missed: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for run in runs:
        answer = first_finding(run.signs)
        for score in (total, by_source[run.source]):
            score.add(run, None if answer is None else answer[0])
        if answer is not None:
            rules[answer[1].rule]["found" if run.is_looping else "false_alarms"] += 1
        if run.is_looping:
            missed[run.why][0] += answer is None
            missed[run.why][1] += 1
    return Report(
        total.row(),
        {source: score.row() for source, score in sorted(by_source.items())},
        dict(sorted(rules.items())),
        dict(sorted(missed.items(), key=lambda shape: (-shape[1][0], shape[0]))),
        microseconds_a_step(runs),
    )


def show(report: Report, *, missed: bool) -> None:
    print(
        f"{'':<46}{'healthy':>8}{'looping':>8}{'found':>7}{'false':>7}{'precision':>11}{'recall':>8}{'delay':>7}{'false/run':>11}"
    )
    for name, row in [*report.by_source.items(), ("all", report.total)]:
        counts = f"{row['healthy']:>8}{row['looping']:>8}{row['found']:>7}{row['false_alarms']:>7}"
        print(
            f"{name:<46}{counts}{told(row['precision'], 3):>11}{told(row['recall'], 3):>8}"
            f"{told(row['median_delay_calls'], 1):>7}{told(row['false_alarms_per_healthy_run'], 4):>11}"
        )
    print()
    for rule, counted in report.by_rule.items():
        print(f"first told by {rule:<30} {counted['found']:>4} found, {counted['false_alarms']:>3} false")
    print(f"\n{report.microseconds_a_step:.2f} us a step")
    if missed:
        print("\nmissed  of  shape of the loop")
        for why, (count, of) in report.missed_by_why.items():
            if count:
                print(f"{count:>6}{of:>4}  {why}")


def told(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description="Score the loop detector on labelled runs.")
    parser.add_argument("path", type=Path, help="a .jsonl or .jsonl.gz file of labelled runs")
    parser.add_argument("--missed", action="store_true", help="list what was missed, by the shape of the loop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file")
    options = parser.parse_args()
    runs = list(read(options.path))
    if not runs:
        parser.error(f"{options.path} holds no run labelled healthy or looping, so there is nothing to score.")
    report = report_on(runs)
    show(report, missed=options.missed)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
