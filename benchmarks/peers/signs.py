"""What a sign of life costs whoever gives it: a ping of ours beside what others offer for the same.

    .venv-peers/bin/python -m benchmarks.peers.signs

All of them in one process, in turn, in blocks; the fastest block of each. What they send goes to a stub on this machine.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import agentguard
import httpx
import sentry_sdk
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sentry_sdk.crons import capture_checkin
from sentry_sdk.crons.consts import MonitorStatus

import clevagent
from benchmarks.hot_paths import interleaved
from benchmarks.peers.stub import Collector
from benchmarks.results import Section, contribute

CALLS = 500


def signs(url: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Set each of them up as its documentation says."""
    clevagent.init(agent="bench")
    sentry_sdk.init(dsn=url.replace("http://", "http://key@") + "/1", default_integrations=False)
    tracer = agentguard.Tracer(service="bench", sink=agentguard.JsonlFileSink(str(folder / "traces.jsonl")))
    queued = agentguard.HttpSink(url=url, _allow_private=True)
    counter = MeterProvider(metric_readers=[InMemoryMetricReader()]).get_meter("bench").create_counter("beats")
    client = httpx.Client()
    event = {"kind": "heartbeat", "name": "beat", "data": {"status": "ok"}}
    return {
        "clevagent.ping()": clevagent.ping,
        "OpenTelemetry counter.add(1)": lambda: counter.add(1),
        "agentguard47 sink to a file": lambda: tracer._sink.emit(event),
        "Sentry capture_checkin()": lambda: capture_checkin(monitor_slug="bench", status=MonitorStatus.OK),
        "agentguard47 HTTP sink, queued": lambda: queued.emit(event),
        "httpx post, awaited": lambda: client.post(url, json=event),
    }


def main() -> None:
    """Measure everyone."""
    logging.disable(logging.CRITICAL)
    with Collector() as collector, tempfile.TemporaryDirectory() as folder:
        times = interleaved(signs(collector.url, Path(folder)), CALLS)
        clevagent.shutdown()
    least = times["clevagent.ping()"]
    rows = [(name, f"{us:.1f} us", f"{us / least:.1f} x") for name, us in sorted(times.items(), key=lambda item: item[1])]
    for line in rows:
        print("{:<40} {:>12} {:>10}".format(*line))
    contribute(
        "peer_signs",
        [
            Section(
                title="A sign of life, beside others",
                header=("", "the caller's thread", "against ours"),
                rows=rows,
                note="CPU time of the caller's thread. The post waits for its answer as well, which does not show here.",
            )
        ],
        distributions=("clevagent", "agentguard47", "sentry-sdk", "opentelemetry-sdk", "httpx"),
    )


if __name__ == "__main__":
    main()
