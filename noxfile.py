"""The tests on each version of Python that is supported and found: ``make test-versions``, or ``nox --session tests-3.13``."""

import hashlib
import os
import subprocess
from pathlib import Path

import nox

VERSIONS = ["3.11", "3.12", "3.13"]
"""As in the classifiers of ``pyproject.toml``."""
PINS = ("pyproject.toml", "constraints.txt")
"""What decides the packages of an environment."""

nox.needs_version = ">=2026"
nox.options.default_venv_backend = "virtualenv"  # comes with a pip that knows --group, and needs no venv module
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # which CI=true would turn on


def put_pythons_on_path() -> None:
    """Let nox find the interpreters that pyenv has but does not offer."""
    for version in VERSIONS:
        command = ["sh", "scripts/find-python.sh", version]
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a constant
        if found.returncode == 0:
            os.environ["PATH"] = f"{Path(found.stdout.strip()).parent}{os.pathsep}{os.environ['PATH']}"


put_pythons_on_path()


@nox.session(python=VERSIONS)
def tests(session: nox.Session) -> None:
    """Run the tests; what follows ``--`` is given to pytest."""
    install(session)
    session.run("pytest", "-n", "auto", "--dist", "worksteal", "--ignore=tests/crewai", *session.posargs)


def install(session: nox.Session) -> None:
    """Install the pinned packages, unless the environment has them already."""
    stamp = Path(session.virtualenv.location, ".installed")
    pins = hashlib.sha256(b"".join(Path(name).read_bytes() for name in PINS)).hexdigest()
    if stamp.exists() and stamp.read_text() == pins:
        return
    session.install("--quiet", "--constraint", "constraints.txt", "--editable", ".", "--group", "tests")
    stamp.write_text(pins)
