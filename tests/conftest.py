"""What every test stands on: no settings from outside, no connection beyond this machine, and a clock that a test moves."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import shutil
import signal
import socket
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Before CrewAI is imported: nothing of a test leaves this machine (the socket fixture would fail it).
os.environ.update(
    CREWAI_DISABLE_TELEMETRY="true",
    OTEL_SDK_DISABLED="true",
    CREWAI_TRACING_ENABLED="false",
    CREWAI_DISABLE_VERSION_CHECK="true",
    CREWAI_TESTING="true",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    # It keeps what tasks gave in a database of the user's, which versions write differently.
    CREWAI_STORAGE_DIR=tempfile.mkdtemp(prefix="crewai-"),
    # Where heartbeats wait while nobody takes them.
    XDG_STATE_HOME=tempfile.mkdtemp(prefix="state-"),
    # A client reads every certificate of the machine when it is made, 20 ms each time; nothing here speaks TLS.
    SSL_CERT_DIR=tempfile.mkdtemp(prefix="no-certificates-"),
)
os.environ.pop("SSL_CERT_FILE", None)

import pytest
from hypothesis import HealthCheck, settings

import clevagent
from clevagent.testing import FakeClock
from clevagent_core import default

# A machine that has other work to do says nothing about a test.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any machine")

HAS_CREWAI = importlib.util.find_spec("crewai") is not None
"""CrewAI is in an environment of its own."""


_SENDS_WITH_HTTPCORE_1 = int(version("openai").partition(".")[0]) < 3


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Shells start what runs in the background deaf to Ctrl-C, and programs that tests start would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not HAS_CREWAI:
        return
    # CrewAI and litellm keep clients and event loops that nobody closes, and use what others have deprecated.
    for line in (
        "ignore:unclosed:ResourceWarning",
        "ignore::DeprecationWarning",
        "ignore::pydantic.warnings.PydanticDeprecationWarning",
        "ignore::UserWarning",
        "ignore:Cannot set an attribute on 'crewai:ImportWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore:coroutine .* was never awaited:RuntimeWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CrewAI's own imports warn of
        import crewai  # noqa: F401 - for all that follow
        import litellm  # noqa: F401 - the same


def pytest_unconfigure() -> None:
    # Not atexit: the workers of pytest-xdist end without it.
    for folder in ("CREWAI_STORAGE_DIR", "XDG_STATE_HOME", "SSL_CERT_DIR"):
        shutil.rmtree(os.environ[folder], ignore_errors=True)


_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


_NEEDS_NEWER = (
    ("langchain", (1, 4), r"[Mm]iddleware", "agent middleware of older ones swallows what LangGraph lets pass, and has fewer hooks"),
    ("langchain-openai", (1, 3), r"test_guard_frameworks.*\[responses", "older ones send `stop` to the Responses API, which refuses it"),
    (
        "langchain-anthropic", (1, 3), r"test_anthropic\[None\]|structured_output_without_a_limit",
        "older ones do not know what a model can write at most",
    ),
    ("crewai", (1, 15, 20), r"test_a_hierarchical_crew$", "1.15.19 cannot kick a hierarchical crew off twice"),
)  # fmt: skip
"""What older versions of others cannot do, guarded or not: distribution, since when they can, which tests, and what it is."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, since, pattern, reason in _NEEDS_NEWER:
        try:
            have = tuple(int(part) for part in version(name).split(".")[: len(since)])
        except PackageNotFoundError:
            continue
        if have < since:
            for item in items:
                if re.search(pattern, item.nodeid):
                    item.add_marker(pytest.mark.skip(reason=f"{name} {version(name)}: {reason}"))


@pytest.fixture(autouse=True)
def _a_process_without_clevagent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin without ``CLEVAGENT_*`` in the environment, and end without a watchdog of the process."""
    for name in [name for name in os.environ if name.startswith("CLEVAGENT_")]:
        monkeypatch.delenv(name)
    yield
    clevagent.shutdown()
    # The next test is a program of its own.
    default._was_shut_down = False


@pytest.fixture(autouse=True)
def _no_collection_inside_httpcore() -> Iterator[None]:
    """Collect garbage between tests only, where the SDKs send with httpcore 1.

    It makes objects while it holds a lock that is not reentrant. If the collector runs there and closes a stream that was dropped, which
    takes the same lock, the thread waits for itself. The plain SDKs do that, too.
    """
    if not _SENDS_WITH_HTTPCORE_1:
        yield
        return
    gc.disable()
    yield
    gc.enable()
    gc.collect(1)


@pytest.fixture(autouse=True, scope="session")
def _no_connection_beyond_this_machine() -> Iterator[None]:
    """Refuse every ``connect`` to an address that is not loopback: the one place where the network is blocked."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            original = getattr(socket.socket, name)

            def connect(self: socket.socket, address: Any, *, _original: Any = original) -> Any:
                if self.family in {socket.AF_INET, socket.AF_INET6} and address[0] not in _LOOPBACK:
                    raise RuntimeError(f"a test tried to connect to {address!r}; tests talk to this machine only")
                return _original(self, address)

            patch.setattr(socket.socket, name, connect)
        yield


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands at the beginning of 2026 until the test moves it."""
    return FakeClock()
