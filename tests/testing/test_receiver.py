"""The receiver of heartbeats: over real sockets, from many threads, and with the trouble that a test asks for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import clevagent
from clevagent.testing import HeartbeatReceiver
from clevagent_core.errors import UsageError

ONE = "/api/v1/heartbeat"
TOTALS = dict.fromkeys(("input_tokens", "output_tokens", "tokens", "llm_calls", "tool_calls", "steps", "loops", "refusals"), 0)
IMPATIENT_S = 0.2
"""How long a client waits for an answer that never comes."""


@pytest.fixture
def receiver():
    with HeartbeatReceiver() as receiver:
        yield receiver


@pytest.fixture
def client(receiver):
    with httpx.Client(base_url=receiver.url, timeout=10) as client:
        yield client


def beat(seq=1, **changes):
    return {
        "agent": "research", "status": "ok", "boot_id": "boot-1", "seq": seq, "sent_at": 1.0, "totals": {**TOTALS, "cost_usd": 0.0},
    } | changes  # fmt: skip


def post(client, seq=1):
    return client.post(ONE, json=beat(seq))


def numbers(receiver):
    return [beat["seq"] for beat in receiver.beats]


# -- as it should be --------------------------------------------------------------------------------------------------------


def test_it_is_served_on_this_machine_and_keeps_what_comes(receiver, client):
    assert receiver.url.startswith("http://127.0.0.1:")
    assert post(client).json()["ok"] is True
    assert receiver.beats == [beat()]


def test_a_repeat_is_counted_and_not_kept(receiver, client):
    for seq in (1, 2, 1, 1):
        assert post(client, seq).status_code == 200
    assert (numbers(receiver), receiver.repeats) == ([1, 2], 2)


def test_beats_are_kept_in_the_order_in_which_they_came(receiver, client):
    for seq in (3, 1, 2):
        post(client, seq)
    assert numbers(receiver) == [3, 1, 2]


def test_requests_are_kept_as_they_came_the_refused_ones_too(receiver, client):
    client.post(ONE, content=b"beat", headers={"X-Trace": "t1"})
    client.get("/api/v1/status?full=1")
    first, second = receiver.requests
    assert (first.method, first.path, first.body, first.headers["x-trace"]) == ("POST", ONE, b"beat", "t1")
    assert (second.method, second.path, second.body) == ("GET", "/api/v1/status", b"")


def test_one_connection_serves_many_requests(receiver, client):
    """A client that keeps its connection has it kept."""
    streams = set()
    for seq in (1, 2, 3):
        with client.stream("POST", ONE, json=beat(seq)) as response:
            streams.add(response.extensions["network_stream"].get_extra_info("client_addr"))
            response.read()
    assert len(streams) == 1
    assert numbers(receiver) == [1, 2, 3]


@pytest.mark.slow
def test_a_beat_that_comes_by_many_threads_at_once_is_kept_once(receiver, client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: post(client, number % 20 + 1).status_code, range(160)))
    assert set(answers) == {200}
    assert (sorted(numbers(receiver)), receiver.repeats) == (list(range(1, 21)), 140)


def test_results_of_commands_are_kept(receiver, client):
    receiver.commands.append({"id": "c1", "command": "stop", "by": "ana", "reason": "", "run_id": None})
    assert [command["id"] for command in post(client).json()["commands"]] == ["c1"]
    client.post("/api/v1/commands/c1/result", json={"status": "done", "message": "stopped"})
    assert receiver.results == {"c1": {"status": "done", "message": "stopped"}}
    assert post(client, 2).json()["commands"] == []


def test_without_a_key_of_its_own_it_lets_everybody_in(receiver, client):
    assert post(client).status_code == 200
    assert client.post(ONE, json=beat(2), headers={"X-API-Key": "cv_any"}).status_code == 200


def test_with_a_key_it_lets_nobody_else_in():
    with HeartbeatReceiver(api_key="cv_right") as receiver:
        for key, status in (("cv_wrong", 401), ("cv_right", 200)):
            assert httpx.post(receiver.url + ONE, json=beat(), headers={"X-API-Key": key}).status_code == status


def test_waiting_ends_when_enough_distinct_beats_are_there(receiver, client):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receiver.wait_for, 2)
        post(client, 1)
        post(client, 1)
        assert not waiting.done()
        post(client, 2)
        assert waiting.result() is True


def test_waiting_for_too_many_beats_ends_without_them(receiver, client):
    post(client)
    assert receiver.wait_for(2, timeout_s=0) is False


def test_the_beats_of_an_agent_pass_every_check(receiver):
    """What the real client makes is what the receiver takes."""
    clevagent.init(agent="research", endpoint=receiver.url, api_key="cv_any", spool="off")
    with clevagent.run():
        clevagent.ping("reading", message="page 3", iteration_count=3, memory_mb=12.5, custom={"page": 3})
    clevagent.shutdown()
    assert receiver.beats[-1]["kind"] == "shutdown"
    assert [request.headers["x-api-key"] for request in receiver.requests] == ["cv_any"] * len(receiver.requests)
    assert [(beat["iteration_count"], beat["meta"]) for beat in receiver.beats if beat["message"] == "page 3"] == [(3, {"page": 3})]


def test_without_a_server_it_has_no_address():
    receiver = HeartbeatReceiver()
    with pytest.raises(UsageError, match="`with` block"):
        receiver.url  # noqa: B018 - it raises
    with receiver:
        assert receiver.url
        with pytest.raises(UsageError, match="served already"):
            receiver.__enter__()
    with pytest.raises(UsageError, match="`with` block"):
        receiver.url  # noqa: B018 - it raises


def test_it_can_be_served_again_and_has_what_it_had():
    """A monitor that is started anew."""
    again = HeartbeatReceiver()
    for seq in (1, 2):
        with again:
            httpx.post(again.url + ONE, json=beat(seq))
    assert numbers(again) == [1, 2]


# -- trouble ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 413, 422, 429, 500, 503])
def test_a_status_is_answered_instead_and_nothing_is_kept(receiver, client, status):
    receiver.react(status=status)
    response = post(client)
    assert (response.status_code, response.json()["ok"], receiver.beats) == (status, False, [])
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(("retry_after_s", "header"), [(None, None), (30, "30"), (0.5, "0.5")])
def test_it_says_when_to_come_again_if_asked_to(receiver, client, retry_after_s, header):
    receiver.react(status=429, retry_after_s=retry_after_s)
    assert post(client).headers.get("Retry-After") == header


def test_trouble_lasts_for_so_many_requests(receiver, client):
    receiver.react(status=503, times=2)
    assert [post(client).status_code for _ in range(4)] == [503, 503, 200, 200]


def test_trouble_lasts_until_it_recovers(receiver, client):
    receiver.react(status=503)
    assert [post(client).status_code for _ in range(5)] == [503] * 5
    receiver.recover()
    assert post(client).status_code == 200


def test_new_trouble_takes_the_place_of_the_old(receiver, client):
    receiver.react(status=503)
    receiver.react(status=429, times=1)
    assert [post(client).status_code for _ in range(2)] == [429, 200]


@pytest.mark.slow
def test_what_hangs_is_neither_kept_nor_answered(receiver, client):
    receiver.react(hang=True, times=1)
    with pytest.raises(httpx.ReadTimeout):
        client.post(ONE, json=beat(), timeout=IMPATIENT_S)
    assert (receiver.beats, len(receiver.requests)) == ([], 1)
    assert post(client).status_code == 200


def test_closing_lets_go_of_clients_that_hang():
    receiver = HeartbeatReceiver()
    with ThreadPoolExecutor(1) as pool:
        with receiver:
            receiver.react(hang=True)
            waiting = pool.submit(httpx.post, receiver.url + ONE, json=beat(), timeout=60)
            with receiver._changed:
                assert receiver._changed.wait_for(lambda: receiver._requests, 10)
        with pytest.raises(httpx.RemoteProtocolError):
            waiting.result()


@pytest.mark.slow
def test_a_delayed_answer_is_late_and_the_beat_is_kept(receiver, client):
    receiver.react(delay_s=60, times=1)
    with pytest.raises(httpx.ReadTimeout):
        client.post(ONE, json=beat(), timeout=IMPATIENT_S)
    assert numbers(receiver) == [1]
    assert post(client).status_code == 200
    assert receiver.repeats == 1


def test_a_short_delay_changes_nothing_else(receiver, client):
    receiver.react(delay_s=0.01)
    assert post(client).json()["ok"] is True


@pytest.mark.parametrize(("stored", "kept"), [(False, []), (True, [1])])
def test_a_dropped_connection_may_or_may_not_have_been_in_time(receiver, client, stored, kept):
    receiver.react(drop=True, stored=stored, times=1)
    with pytest.raises(httpx.RemoteProtocolError):
        post(client)
    assert numbers(receiver) == kept
    post(client)
    assert (numbers(receiver), receiver.repeats) == ([1], len(kept))


def test_a_failure_may_have_come_after_storing(receiver, client):
    receiver.react(status=500, stored=True, times=1)
    assert post(client).status_code == 500
    assert numbers(receiver) == [1]


# -- as an application ------------------------------------------------------------------------------------------------------


class Exchange:
    """One request by the ASGI protocol, in pieces as a server may cut them."""

    def __init__(self, *messages, **scope):
        self.scope = {"type": "http", "method": "POST", "path": ONE, "headers": [(b"Content-Type", b"application/json")], **scope}
        self._messages = list(messages)
        self.sent = []

    async def receive(self):
        return self._messages.pop(0)

    async def send(self, message):
        self.sent.append(message)

    def play(self, app: Callable) -> list:
        asyncio.run(app(self.scope, self.receive, self.send))
        return self.sent


def test_a_body_in_pieces_is_put_together():
    receiver = HeartbeatReceiver()
    content = json.dumps(beat()).encode()
    pieces = [{"type": "http.request", "body": content[at : at + 7], "more_body": True} for at in range(0, len(content), 7)]
    start, body = Exchange(*pieces, {"type": "http.request"}).play(receiver)
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert json.loads(body["body"])["ok"] is True
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert receiver.beats == [beat()]


def test_a_client_that_leaves_halfway_leaves_nothing():
    receiver = HeartbeatReceiver()
    sent = Exchange({"type": "http.request", "body": b'{"agent"', "more_body": True}, {"type": "http.disconnect"}).play(receiver)
    assert (sent, receiver.requests) == ([], [])


def test_it_speaks_nothing_but_http():
    with pytest.raises(RuntimeError, match="websocket"):
        Exchange(type="websocket").play(HeartbeatReceiver())


def test_trouble_is_made_at_this_door_too():
    receiver = HeartbeatReceiver()
    request = {"type": "http.request", "body": json.dumps(beat()).encode()}
    receiver.react(status=503, retry_after_s=7, times=1)
    start, _ = Exchange(request).play(receiver)
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"7")
    receiver.react(drop=True, stored=True, times=1)
    with pytest.raises(ConnectionResetError):
        Exchange(request).play(receiver)
    receiver.react(hang=True, times=1)

    async def hang():
        hanging = Exchange(request)
        task = asyncio.create_task(receiver(hanging.scope, hanging.receive, hanging.send))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(hang())
    assert numbers(receiver) == [1]


def test_many_doors_lead_to_the_same_receiver():
    """What came by a socket is a repeat at the application's door."""
    with HeartbeatReceiver() as receiver:
        worker = threading.Thread(target=httpx.post, args=(receiver.url + ONE,), kwargs={"json": beat()})
        worker.start()
        assert receiver.wait_for(1)
        Exchange({"type": "http.request", "body": json.dumps(beat()).encode()}).play(receiver)
        worker.join()
        assert (numbers(receiver), receiver.repeats) == ([1], 1)
