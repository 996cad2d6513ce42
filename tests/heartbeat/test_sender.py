"""The sender delivers every beat once, in order, whatever becomes of the receiver; and never disturbs the work."""

from __future__ import annotations

import contextlib
import logging
import socketserver
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clevagent import Beat, Watchdog
from clevagent.testing import FakeClock, HeartbeatReceiver
from clevagent_core.clock import SystemClock
from clevagent_heartbeat.sender import QUEUE, Leftover, Sender
from clevagent_heartbeat.spool import MOST_ROWS, Spool

BOOT = "boot-1"


def beat(seq, *, boot=BOOT, **changes):
    return {**Beat(agent="research", boot_id=boot, seq=seq, sent_at=1_767_225_600.0 + 30 * seq).to_wire(), **changes}


@pytest.fixture
def receiver():
    with HeartbeatReceiver() as receiver:
        yield receiver


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "deep" / "spool.db")


@pytest.fixture
def make(receiver):
    """Make senders to the receiver, which are stopped in the end."""
    made = []

    def make(*, clock=None, spool=None, endpoint=None, api_key=None, on_answer=lambda _: None):
        clock = clock or SystemClock()
        made.append(Sender(endpoint=endpoint or receiver.url, api_key=api_key, clock=clock, spool=spool, on_answer=on_answer))
        return made[-1]

    yield make
    receiver.recover()
    for sender in made:
        sender.stop(5)


def spool_at(path, *, boot=BOOT, clock=None):
    return Spool(path, boot_id=boot, clock=clock or SystemClock())


def seqs(receiver):
    return [beat["seq"] for beat in receiver.beats]


# -- delivery ---------------------------------------------------------------------------------------------------------------


def test_beats_arrive_in_order_over_one_connection(make, receiver):
    sender = make(api_key="cv_secret")
    for seq in range(1, 51):
        sender.send(beat(seq))
    assert sender.flush(10) == 0
    assert seqs(receiver) == list(range(1, 51))
    assert {request.headers["x-api-key"] for request in receiver.requests} == {"cv_secret"}
    assert all(request.headers["user-agent"].startswith("clevagent/") for request in receiver.requests)
    assert {request.path for request in receiver.requests} <= {"/api/v1/heartbeat", "/api/v1/heartbeat/batch"}


def test_an_endpoint_may_be_given_with_its_path(make, receiver):
    sender = make(endpoint=receiver.url + "/api/v1/")
    sender.send(beat(1))
    assert sender.flush(10) == 0
    assert seqs(receiver) == [1]


def test_sending_never_waits_for_the_receiver(make, receiver):
    receiver.react(hang=True)
    sender = make()
    for seq in range(1, 11):
        sender.send(beat(seq))
    assert receiver.beats == []  # and this line was reached


def test_answers_are_handed_on(make, receiver):
    answers = []
    receiver.budgets = [{"name": "day", "usd": 1.0}]
    sender = make(on_answer=answers.append)
    sender.send(beat(1))
    assert sender.flush(10) == 0
    assert [answer["budgets"] for answer in answers] == [[{"name": "day", "usd": 1.0}]]


@pytest.fixture
def endless():
    """The address of what answers every request with 200 and a body that never ends."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    self.request.sendall(b"[" * 65536)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_an_answer_without_end_is_not_read_to_its_end(make, endless):
    sender = make(endpoint=endless)
    for seq in (1, 2, 3):
        sender.send(beat(seq))
    assert sender.flush(10) == 0
    assert sender.dropped == 0


def test_an_answer_that_cannot_be_carried_out_is_told_and_stops_nothing(make, receiver, caplog):
    def fail(answer):
        raise RuntimeError("cannot")

    sender = make(on_answer=fail)
    sender.send(beat(1))
    sender.send(beat(2))
    assert sender.flush(10) == 0
    assert seqs(receiver) == [1, 2]
    assert "An answer of the monitor could not be carried out" in caplog.text


def test_the_result_of_a_command_is_reported(make, receiver):
    receiver.commands = [{"id": "c1", "command": "stop"}]
    sender = make()
    sender.report("c1", {"status": "done", "message": ""})
    assert sender.flush(10) == 0
    assert receiver.results == {"c1": {"status": "done", "message": ""}}


def test_a_result_that_nobody_wants_holds_up_no_beat(make, receiver):
    sender = make()
    sender.report("nobody", {"status": "done", "message": ""})
    sender.send(beat(1))
    assert sender.flush(10) == 0
    assert seqs(receiver) == [1]


# -- trouble ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 500},
        {"status": 503},
        {"status": 429},
        {"status": 408},
        {"drop": True},
        {"drop": True, "stored": True},
        {"status": 500, "stored": True},
    ],
    ids=str,
)
def test_what_fails_is_sent_again_until_it_arrives_once(make, receiver, trouble):
    clock = FakeClock()
    receiver.react(**trouble, times=3)
    sender = make(clock=clock)
    sender.send(beat(1))
    while not receiver.wait_for(1, timeout_s=0.01) or sender._left():
        clock.advance(60)
    assert seqs(receiver) == [1]
    assert len(receiver.requests) == 4


@pytest.mark.parametrize("asked", [7, 120])
def test_a_receiver_that_asks_to_wait_is_not_asked_before(make, receiver, asked):
    clock = FakeClock()
    receiver.react(status=429, retry_after_s=asked, times=1)
    sender = make(clock=clock)
    sender.send(beat(1))
    assert clock.wait_for_waiters(1)
    clock.advance(asked - 0.1)
    sender.send(beat(2))  # what is new does not hurry it
    assert clock.wait_for_waiters(1)
    assert len(receiver.requests) == 1
    clock.advance(0.2)
    assert receiver.wait_for(2)
    assert seqs(receiver) == [1, 2]


def test_a_beat_that_is_wrong_loses_only_itself(make, receiver, caplog):
    receiver.react(status=503, times=1)
    sender = make()
    for seq in (1, 2, 3, 4):
        sender.send(beat(seq, **({"pid": -1} if seq == 2 else {})))
    assert sender.flush(10) == 0
    assert seqs(receiver) == [1, 3, 4]
    assert sender.dropped == 1
    assert "A heartbeat was refused for good, and dropped" in caplog.text


def test_a_wrong_key_keeps_the_beats_until_it_is_right(make, receiver, path, caplog):
    clock = FakeClock()
    receiver.react(status=401)
    sender = make(clock=clock, spool=spool_at(path, clock=clock))
    for seq in (1, 2):
        sender.send(beat(seq))
    assert clock.wait_for_waiters(1)
    clock.advance(299)
    tried = len(receiver.requests)
    receiver.recover()
    clock.advance(1)
    assert receiver.wait_for(2)
    assert seqs(receiver) == [1, 2]
    assert tried == 1
    assert sender.dropped == 0
    assert [record.message for record in caplog.records if "Mend api_key=" in record.message]


def test_an_outage_is_told_once_and_its_end_once(make, receiver, caplog):
    clock = FakeClock()
    receiver.react(status=503)
    sender = make(clock=clock)
    with caplog.at_level(logging.WARNING, logger="clevagent"):
        for seq in range(1, 6):
            sender.send(beat(seq))
            assert clock.wait_for_waiters(1)
            clock.advance(60)
        receiver.recover()
        while not receiver.wait_for(5, timeout_s=0.01):
            clock.advance(60)
        assert sender.flush(10) == 0
    said = [record.message.split(":")[0] for record in caplog.records]
    assert said == ["Heartbeats cannot be delivered", "Heartbeats are delivered again."]


@pytest.mark.slow
def test_a_full_queue_drops_the_oldest_and_counts_them(make, receiver):
    receiver.react(hang=True)
    sender = make()
    for seq in range(1, QUEUE + 12):
        sender.send(beat(seq))
    assert sender.dropped + len(sender._queue) + len(sender._in_hand) == QUEUE + 11
    assert sender._queue[-1]["seq"] == QUEUE + 11


TROUBLES = st.sampled_from(
    [
        {"status": 500},
        {"status": 503, "stored": True},
        {"status": 429, "retry_after_s": 45},
        {"drop": True},
        {"drop": True, "stored": True},
        None,
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize("with_spool", [True, False])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(troubles=st.lists(TROUBLES, min_size=1, max_size=12), restart=st.booleans())
def test_every_beat_of_an_hour_of_trouble_arrives_once_and_in_order(tmp_path_factory, with_spool, troubles, restart):
    """A beat every 30 s of fake time, a receiver that fails in every way; at half-time the process may be replaced by another."""
    clock = FakeClock()
    path = str(tmp_path_factory.mktemp("spool") / "spool.db") if with_spool else None
    sent = []

    def start(receiver, boot):
        spool = None if path is None else spool_at(path, boot=boot, clock=clock)
        return Sender(endpoint=receiver.url, api_key=None, clock=clock, spool=spool, on_answer=lambda _: None)

    with HeartbeatReceiver() as receiver:
        boot = BOOT
        sender = start(receiver, boot)
        for number in range(1, 121):
            trouble = troubles[(number // 10) % len(troubles)]
            receiver.recover() if trouble is None else receiver.react(**trouble)
            if restart and with_spool and number == 60:
                assert sender.stop(0.2).lost == 0
                boot = "boot-2"
                sender = start(receiver, boot)
            sender.send(beat(number, boot=boot))
            sent.append((boot, number))
            clock.advance(30)
        receiver.recover()
        while not receiver.wait_for(len(sent), timeout_s=0.02):
            clock.advance(301)
        assert sender.flush(10) == 0
        assert sender.dropped == 0
        assert [(beat["boot_id"], beat["seq"]) for beat in receiver.beats] == sent
        assert [beat["sent_at"] for beat in receiver.beats] == [1_767_225_600.0 + 30 * number for _, number in sent]
        sender.stop(5)


# -- the end ----------------------------------------------------------------------------------------------------------------


def test_what_is_left_at_the_end_waits_in_the_spool_and_the_next_process_sends_it(make, receiver, path, caplog):
    receiver.react(status=503)
    sender = make(spool=spool_at(path))
    for seq in (1, 2, 3):
        sender.send(beat(seq))
    assert sender.stop(5) == Leftover(spooled=3, lost=0)
    assert "3 wait in the spool" in caplog.text
    assert sender.stop(5) == Leftover(0, 0)
    receiver.recover()
    second = make(spool=spool_at(path, boot="boot-2"))
    second.send(beat(1, boot="boot-2"))
    assert second.flush(10) == 0
    assert [(beat["boot_id"], beat["seq"]) for beat in receiver.beats] == [
        ("boot-1", 1),
        ("boot-1", 2),
        ("boot-1", 3),
        ("boot-2", 1),
    ]


def test_without_a_spool_what_is_left_at_the_end_is_lost_and_told(make, receiver, caplog):
    receiver.react(status=503)
    sender = make()
    for seq in (1, 2):
        sender.send(beat(seq))
    assert sender.stop(5) == Leftover(spooled=0, lost=2)
    assert "2 are lost" in caplog.text


def test_a_receiver_that_never_answers_holds_the_end_up_to_the_deadline_only(make, receiver, path):
    receiver.react(hang=True)
    sender = make(spool=spool_at(path))
    sender.send(beat(1))
    assert sender.stop(0.05) == Leftover(spooled=1, lost=0)
    assert len(spool_at(path, boot="boot-2")) == 1


@pytest.mark.slow
def test_a_try_that_fails_only_after_the_stop_is_no_reason_to_give_up(make, receiver):
    receiver.react(status=503, delay_s=0.3, times=1)
    sender = make()
    sender.send(beat(1))
    with receiver._changed:
        assert receiver._changed.wait_for(lambda: receiver.requests, 10)
    assert sender.stop(10) == Leftover(spooled=0, lost=0)
    assert seqs(receiver) == [1]


def test_a_watchdog_that_was_shut_down_leaves_no_thread_behind(receiver):
    before = set(threading.enumerate())
    watchdog = Watchdog(agent="research", endpoint=receiver.url, spool="off")
    assert receiver.wait_for(1)
    ours = set(threading.enumerate()) - before
    watchdog.shutdown()
    for thread in ours:
        thread.join(10)
    assert {thread.name for thread in ours} >= {"clevagent-timers", "clevagent-sender"}
    assert [thread.name for thread in ours if thread.is_alive() and thread.name.startswith("clevagent")] == []


def test_after_its_end_a_sender_takes_nothing(make, receiver):
    sender = make()
    sender.stop(1)
    sender.send(beat(1))
    sender.report("c1", {})
    assert sender.flush(1) == 0
    assert receiver.requests == []


# -- the spool --------------------------------------------------------------------------------------------------------------


def test_the_spool_gives_back_what_was_put_in_that_order(path):
    spool = spool_at(path)
    assert (len(spool), spool.take(10)) == (0, [])
    assert not Path(path).exists()
    assert spool.put([beat(1), beat(2)]) == 0
    assert spool.put([beat(2), beat(3)]) == 0
    assert [found["seq"] for found in spool.take(2)] == [1, 2]
    spool.done([beat(1)])
    assert [found["seq"] for found in spool.take(10)] == [2, 3]
    assert spool.take(1) == [beat(2)]
    assert Path(path).stat().st_mode & 0o777 == 0o600
    spool.close()


def test_a_spool_that_is_dropped_closes_its_connection(path):
    spool = spool_at(path)
    spool.put([beat(1)])
    connection = spool._connection
    del spool
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


@pytest.mark.slow
def test_a_full_spool_lets_the_oldest_go_and_tells_how_many(path):
    spool = spool_at(path)
    assert spool.put([beat(seq) for seq in range(1, MOST_ROWS + 1)]) == 0
    assert spool.put([beat(MOST_ROWS + 1), beat(MOST_ROWS + 2)]) == 2
    assert spool.take(1)[0]["seq"] == 3
    spool.close()


def test_what_a_living_process_has_left_is_its_own_for_ten_minutes(path):
    clock = FakeClock()
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        theirs, ours = spool_at(path, boot="theirs", clock=clock), spool_at(path, boot="ours", clock=clock)
        theirs.put([beat(1, boot="theirs")])
        with theirs._opened(create=False) as connection:
            connection.execute("UPDATE beats SET pid = ?", (other.pid,))
        assert ours.take(10) == []
        clock.advance(600)
        assert [found["seq"] for found in ours.take(10)] == [1]
        other.stdin.close()
    theirs.close()
    ours.close()


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_broken_file_is_set_aside_and_nothing_of_it_is_lost(path, caplog, content):
    Path(path).parent.mkdir()
    Path(path).write_bytes(content)
    spool = spool_at(path)
    assert spool.put([beat(1)]) == 0
    assert [found["seq"] for found in spool.take(10)] == [1]
    assert Path(f"{path}.broken").read_bytes() == content
    assert "was renamed to" in caplog.text
    spool.close()


def test_a_beat_in_which_somebody_has_written_stops_no_others(path, caplog):
    spool = spool_at(path)
    spool.put([beat(1)])
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE beats SET body = '{'")
    assert spool.take(10) == []
    assert "was renamed to" in caplog.text
    assert spool.put([beat(2)]) == 0
    assert [found["seq"] for found in spool.take(10)] == [2]
    spool.close()


def test_where_the_spool_cannot_be_written_beats_wait_in_memory(make, receiver, tmp_path, caplog):
    clock = FakeClock()
    (tmp_path / "file").write_text("in the way")
    receiver.react(status=503)
    sender = make(clock=clock, spool=spool_at(str(tmp_path / "file" / "spool.db"), clock=clock))
    for seq in range(1, 6):
        sender.send(beat(seq))
        assert clock.wait_for_waiters(1)
        clock.advance(60)
    receiver.recover()
    while not receiver.wait_for(5, timeout_s=0.01):
        clock.advance(60)
    assert seqs(receiver) == [1, 2, 3, 4, 5]
    assert sender.dropped == 0
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1


@pytest.mark.slow
def test_on_a_full_disk_the_agent_goes_on_and_what_is_lost_is_told_in_the_next_beat(receiver, tmp_path):
    """In a process of its own, which may write files of no size at all."""
    receiver.react(status=503)
    code = """
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        import clevagent
        watchdog = clevagent.init(agent="full", endpoint=sys.argv[1], spool=sys.argv[2], flush_s=1)
        clevagent.ping()
        watchdog.flush(1)
        print("worked", flush=True)
        sys.stdin.readline()
        print(watchdog.flush(20), watchdog.pulse._sender.dropped)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), receiver.url, str(tmp_path / "spool.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "worked\n"
        receiver.recover()
        said, errors = child.communicate("\n", timeout=60)
    assert (said, child.returncode) == ("0 0\n", 0)
    assert "cannot be used" in errors
    assert [beat["seq"] for beat in receiver.beats] == list(range(1, len(receiver.beats) + 1))


@pytest.mark.slow
def test_nothing_of_http_is_imported_before_a_monitor_is_named():
    code = "import sys, clevagent; clevagent.init(); clevagent.ping(); print([name for name in ('httpx', 'tenacity', 'sqlite3') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
