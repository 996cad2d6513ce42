"""Run the unit tests of LangChain's packages plainly and with ClevAgent attached, and print the difference.

Run by ``make transparency``, in an environment of its own. Needs the package index, and no other network.

Exit status: 0 if every test that passes plainly passes guarded too, but for those that are KNOWN; 1 if one does not, 2 if nothing could
be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SDISTS = Path(sys.prefix, "sdists")
"""Kept with the environment, whose versions they have."""
PACKAGES = {
    "langchain-core": "tests/unit_tests",
    "langchain-openai": "tests/unit_tests",
    "langchain-anthropic": "tests/unit_tests",
    "langgraph": "tests",
}
"""The packages, and where their sdists keep unit tests."""
PLUGINS = {"langchain-core": ["alone"]}
"""What a suite needs of its environment, both ways."""
KNOWN = {
    "tests/unit_tests/runnables/test_config.py::test_merge_config_callbacks": (
        "counts the handlers of a manager that LangChain itself has made; whatever its register_configure_hook() adds is one of them"
    ),
}
"""The tests that differ for what attaching is, whoever attaches, each with the reason."""
FROM_OUTSIDE = re.compile(r"(CLEVAGENT|LANGCHAIN|LANGSMITH|LANGGRAPH|OPENAI|ANTHROPIC|PYTEST)_|PYTHONPATH$|CI$")
"""Settings and keys of whoever runs this, which the suites expect to be absent."""
TEST_S = 120
"""How long one test may take."""


@dataclass
class Outcomes:
    """What became of the tests of one run."""

    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    is_cut_short: bool = False
    """Whether the run was ended by its time limit."""

    @classmethod
    def read(cls, path: Path, *, is_cut_short: bool) -> Outcomes:
        """Read what outcomes.py has written. A test that fails in any phase has failed."""
        found = cls(is_cut_short=is_cut_short)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            test, phase, outcome = json.loads(line)
            if outcome == "failed":
                found.failed.add(test)
            elif outcome == "skipped":
                found.skipped.add(test)
            elif outcome == "passed" and phase == "call":
                found.passed.add(test)
        found.passed -= found.failed
        return found

    @property
    def total(self) -> int:
        """How many tests were run or skipped."""
        return len(self.passed | self.failed | self.skipped)


@dataclass
class Compared:
    """What became of one package."""

    package: str
    note: str = ""
    """Why it was passed over, or what is to be known of the numbers."""
    plain: Outcomes = field(default_factory=Outcomes)
    guarded: Outcomes = field(default_factory=Outcomes)
    differing: list[str] = field(default_factory=list)
    """The tests that pass plainly and fail guarded."""


def download(package: str) -> Path | None:
    """Return the sdist of the installed version, or None where the index has none."""
    folder = SDISTS / f"{package}-{version(package)}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as fresh:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package, "--dest", fresh]
            done = subprocess.run([*pip, f"{package}=={version(package)}"], check=False)  # noqa: S603 - names from above
            if done.returncode != 0:
                return None
            shutil.copytree(fresh, folder)
    return next(folder.glob("*.tar.gz"), None)


def unpack(sdist: Path, package: str, folder: Path) -> Path:
    """Unpack an sdist, without the package itself: the tests import what is installed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    shutil.rmtree(root / package.replace("-", "_"))
    return root


def run(sdist: Path, package: str, tests: list[str], plugins: list[str], options: argparse.Namespace) -> Outcomes:
    """Run tests of an sdist in a process of their own, in a folder of their own: some write files."""
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(sdist, package, Path(folder, "sdist"))
        outcomes, chosen = Path(folder, "outcomes"), Path(folder, "chosen")
        chosen.write_text("\n".join(tests), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not FROM_OUTSIDE.match(name)}
        environment |= {
            "PYTHONPATH": str(HERE),
            "TRANSPARENCY_OUTCOMES": str(outcomes),
            "NO_DOCKER": "true",  # LangGraph's suite: no Postgres, no Redis
            "LANGSMITH_TRACING": "false",
        }
        command = [sys.executable, "-m", "pytest", f"@{chosen}", "--quiet", "--no-header", "--tb=short", "-n", options.processes]
        # Their own options ask for coverage and for durations. Benchmarks differ by nature.
        command += ["-o", "addopts=", "--benchmark-disable", "--disable-socket", "--allow-unix-socket", f"--timeout={TEST_S}"]
        command += [argument for plugin in ("outcomes", *PLUGINS.get(package, ()), *plugins) for argument in ("-p", plugin)]
        if not options.verbose:
            command += ["--no-summary"]
        is_cut_short = not finish(command, root, environment, options)
        return Outcomes.read(outcomes, is_cut_short=is_cut_short)


def finish(command: list[str], root: Path, environment: dict[str, str], options: argparse.Namespace) -> bool:
    """Wait for a run; end it, with its workers, at its time limit and return False."""
    output = None if options.verbose else subprocess.DEVNULL
    # The return code says nothing: outcomes are compared test by test.
    with subprocess.Popen(  # noqa: S603 - put together above
        command, cwd=root, env=environment, stdout=output, stderr=output, start_new_session=True
    ) as running:
        try:
            running.wait(options.limit)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            return False
        except BaseException:  # Ctrl-C: the workers have a session of their own, and would go on
            os.killpg(running.pid, signal.SIGKILL)
            raise
    return True


def compare(package: str, options: argparse.Namespace) -> Compared:
    """Run the tests of a package plainly and guarded. What differs is run again both ways, as a test may fail by chance."""
    sdist = download(package)
    if sdist is None:
        return Compared(package, "the index has no sdist of it")
    with tarfile.open(sdist) as archive:
        if not any(f"/{PACKAGES[package]}/" in name for name in archive.getnames()):
            return Compared(package, "its sdist carries no tests")
    found = Compared(package)
    found.plain = run(sdist, package, [PACKAGES[package]], [], options)
    found.guarded = run(sdist, package, [PACKAGES[package]], ["attached"], options)
    if found.plain.total and not found.guarded.total:
        found.note = "the guarded run did not start; --verbose shows why"
        return found
    differing = sorted(found.plain.passed - found.guarded.passed)
    if found.guarded.is_cut_short or found.plain.is_cut_short:
        found.note = f"not finished within {options.limit} s"
        differing = sorted(found.plain.passed & found.guarded.failed)
    if differing:
        plain = run(sdist, package, differing, [], options)
        guarded = run(sdist, package, differing, ["attached"], options)
        found.differing = sorted(plain.passed - guarded.passed)
    return found


def report(results: list[Compared]) -> None:
    """Print the table, and the names of what differs."""
    print()
    print(f"{'package':<28}{'tests':>7}{'passed plainly':>16}{'passed guarded':>16}{'differ':>8}")
    for one in results:
        name = f"{one.package} {version(one.package)}"
        numbers = f"{one.plain.total:>7}{len(one.plain.passed):>16}{len(one.guarded.passed):>16}{len(one.differing):>8}"
        print(f"{name:<28}{numbers if one.plain.total else '':<47}{'  ' + one.note if one.note else ''}")
    for one in results:
        if one.differing:
            print(f"\n{one.package}: pass plainly, fail guarded")
            print("\n".join(f"  {test}" + (f" (known: it {KNOWN[test]})" if test in KNOWN else "") for test in one.differing))


def main() -> int:
    """Compare the packages that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; all if none is named")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one run of one package may take")
    parser.add_argument("--processes", default="auto", help="of pytest-xdist")
    parser.add_argument("--verbose", action="store_true", help="show what pytest prints")
    options = parser.parse_args()
    if unknown := set(options.packages) - set(PACKAGES):
        parser.error(f"no such package: {', '.join(sorted(unknown))}")
    results = []
    for package in options.packages or PACKAGES:
        print(f"{package} {version(package)} ...", flush=True)
        results.append(compare(package, options))
    report(results)
    if not any(one.plain.total for one in results):
        return 2
    found = (one for one in results if one.plain.total)
    return int(any(not KNOWN.keys() >= {*one.differing} or one.guarded.is_cut_short or not one.guarded.total for one in found))


if __name__ == "__main__":
    sys.exit(main())
