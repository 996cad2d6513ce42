"""The sender: a guest in the agent's process. It never blocks a caller, never raises, and never grows.

One daemon thread takes beats from a bounded queue and posts them, oldest first. What cannot be delivered goes to the spool, and is sent
from there, in order and before anything newer, once somebody takes it. This is the one module that knows HTTP. It is imported where a
monitor is named, in the thread that names it, with all that it needs: a process that is forked while another thread imports could never
import the same again.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - the names of hosts are looked up by it
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import httpcore  # noqa: F401 - httpx imports it when it makes its first client
import httpx
import tenacity

from clevagent_core.clock import Clock, ReentrantEvent
from clevagent_core.errors import DeliveryError
from clevagent_wire.version import __version__

if TYPE_CHECKING:
    from clevagent_heartbeat.spool import Spool

logger = logging.getLogger("clevagent")

QUEUE = 1000
"""How many beats wait in memory; of more, the oldest are dropped and counted."""
BATCH = 100
"""How many beats one request carries."""
TIMEOUT_S = 5.0
"""How long to wait for a connection, for each piece of an answer, and for all of it once it has begun."""
MOST_BYTES = 1_000_000
"""How much of an answer is read."""
LONGEST_PAUSE_S = 60.0
"""The longest time between two tries, unless the receiver asks for more."""
REFUSED_PAUSE_S = 300.0
"""The time between two tries while everything is refused (a wrong key, a wrong address): somebody has to mend that first."""
_OF_THE_BEAT = frozenset({400, 413, 422})
"""Statuses that say that this very request is wrong; anything else may be right later."""

Beat = Mapping[str, Any]

_no_fork = threading.Lock()
"""Held while OpenSSL is set up, some 20 to 100 ms once in a process: a child forked meanwhile would wait for its locks for ever."""


class _Refused(DeliveryError):
    """Everything is refused, not this request: somebody has to mend something."""


class Leftover(NamedTuple):
    """What was not delivered when a sender stopped."""

    spooled: int
    """Beats that wait in the spool: the next process of the agent sends them."""
    lost: int
    """Beats that are gone."""


class Sender:
    """Delivers beats to one receiver. Every method is safe from any thread, and from a signal handler."""

    def __init__(
        self,
        *,
        endpoint: str,
        api_key: str | None,
        clock: Clock,
        spool: Spool | None,
        on_answer: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Start nothing yet.

        Args:
            endpoint: the receiver's address, with or without ``/api/v1``.
            api_key: sent as ``X-API-Key``.
            clock: for the pauses between tries.
            spool: where beats wait during an outage; without one they stay in the queue.
            on_answer: gets each answer, on the sender's thread.

        """
        self._base = endpoint.rstrip("/").removesuffix("/api/v1") + "/api/v1"
        self._headers = {"X-API-Key": api_key} if api_key else {}
        self._clock = clock
        self._spool = spool
        self._on_answer = on_answer
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._queue: deque[Beat] = deque()
        self._reports: dict[str, Mapping[str, Any]] = {}
        self._in_hand: list[Beat] = []
        """What the thread is about to deliver."""
        self._is_spooling = self._spool is not None
        """Whether something may wait in the spool: from the start, of processes before."""
        self._wake = ReentrantEvent()
        """There is something to do."""
        self._hurry = ReentrantEvent()
        """Somebody waits: a pause between two tries is cut short."""
        self._idle = ReentrantEvent()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._client: httpx.Client | None = None
        self._is_stopping = self._has_stopped = False
        self._is_last_try = False
        """Whether the try that goes on was begun after the stop; one begun before it may have failed for a reason that is over."""
        self._failing: str | None = None
        """Why nothing can be delivered, as it was told when that began."""
        self.dropped = 0
        """How many beats are lost for good."""

    # -- for the owner ----------------------------------------------------------------------------------------------------

    def send(self, beat: Beat) -> None:
        """Queue a beat. Never blocks, never raises."""
        with self._lock:
            if self._is_stopping:
                return
            if len(self._queue) >= QUEUE:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(beat)
            self._begin()

    def report(self, command_id: str, result: Mapping[str, Any]) -> None:
        """Queue what became of a command. Never blocks, never raises."""
        with self._lock:
            if not self._is_stopping and len(self._reports) < QUEUE:
                self._reports[command_id] = result
                self._begin()

    def flush(self, timeout_s: float) -> int:
        """Wait until everything is delivered, at most ``timeout_s`` seconds; a pause between tries is cut short. Tell how many are left."""
        if self._thread is None:
            return 0
        self._hurry.set()
        self._clock.wait(self._idle, timeout_s)
        return 0 if self._idle.is_set() else max(1, self._left())

    def stop(self, timeout_s: float) -> Leftover:
        """Deliver what waits, at most ``timeout_s`` seconds and with one try; keep the rest in the spool. Safe to call twice.

        What is left is told in the log.
        """
        with self._lock:
            if self._has_stopped:
                return Leftover(0, 0)
            self._is_stopping = True
            # Set again by the thread when it has closed its connection.
            self._idle.clear()
        self._hurry.set()
        self._wake.set()
        if self._thread is not None:
            self._clock.wait(self._idle, timeout_s)
        with self._lock:
            self._has_stopped = True
            rest = [*self._in_hand, *self._queue]
            self._queue.clear()
        left = self._keep(rest)
        if self._spool is not None:
            self._spool.close()
        if rest:
            self._tell_leftover(left)
        return left

    def after_fork(self) -> None:
        """Be the sender of a forked child: nothing of the parent's waits here, and nothing of its connection is touched."""
        self._reset()

    # -- the thread -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread before there is anything to send: Python 3.12 starts none while the interpreter shuts down."""
        with self._lock:
            if not self._is_stopping:
                self._start_thread()

    def _begin(self) -> None:
        self._idle.clear()
        self._wake.set()
        self._start_thread()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="clevagent-sender", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is shutting down: what waits goes to the spool
                self._thread = None

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            # Others may have left something since.
            self._is_spooling = self._spool is not None
            try:
                self._deliver_all()
            except Exception:  # whose code: ours; a fault in one round must not end the sending
                logger.exception("The heartbeat sender failed, and goes on with the next beat.")
                # Else it would fail with these for ever.
                with self._lock:
                    self.dropped += len(self._in_hand)
                self._delivered(len(self._in_hand))
            with self._lock:
                if not self._is_stopping:
                    continue
            if self._client is not None:
                self._client.close()
            self._idle.set()
            return

    def _deliver_all(self) -> None:
        while True:
            # From the spool, as long as there is something in it. Not under the lock, for which callers would wait.
            waiting = self._spool.take(BATCH) if self._is_spooling and self._spool is not None else []
            self._is_spooling = bool(waiting)
            with self._lock:
                self._in_hand = list(waiting) or [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                if not self._in_hand and not self._reports:
                    self._idle.set()
                    return
            if not self._deliver():
                return

    def _deliver(self) -> bool:
        """Deliver what is in hand, however long that takes; tell whether it is worth going on now."""
        try:
            self._retrying()(self._post_all)
        except DeliveryError:
            return False  # stopped: what is in hand goes to the spool
        self._delivered(len(self._in_hand))
        return True

    def _delivered(self, count: int) -> None:
        """Let go of the first beats in hand."""
        with self._lock:
            beats, self._in_hand = self._in_hand[:count], self._in_hand[count:]
        if self._spool is not None and self._is_spooling and beats:
            self._spool.done(beats)

    def _retrying(self) -> tenacity.Retrying:
        backoff = tenacity.wait_random_exponential(multiplier=1, max=LONGEST_PAUSE_S)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked = error.retry_after_s if isinstance(error, DeliveryError) else None
            return backoff(state) if asked is None else asked

        return tenacity.Retrying(
            wait=pause,
            stop=lambda _: self._is_last_try,
            retry=tenacity.retry_if_exception_type(DeliveryError),
            before_sleep=self._failed,
            sleep=self._pause,
            reraise=True,
        )

    def _pause(self, seconds: float) -> None:
        """Wait before the next try: as long as that takes, or until somebody flushes."""
        self._clock.wait(self._hurry, seconds)
        if not self._is_stopping:
            self._hurry.clear()

    def _failed(self, state: tenacity.RetryCallState) -> None:
        """Nobody takes it: keep it in the spool, with all that has queued behind it, and tell it once."""
        error = state.outcome.exception() if state.outcome is not None else None
        if self._failing is None:
            self._failing = str(error)
            logger.warning(
                "Heartbeats cannot be delivered: %s They wait %s and are sent in their order once they are taken. (Told once for an outage.)",
                error,
                "in memory" if self._spool is None else f"in {self._spool.path}",
            )
        if self._spool is None:
            return
        with self._lock:
            queued = list(self._queue)
        rest = queued if self._is_spooling else [*self._in_hand, *queued]
        gone = self._spool.put(rest) if rest else 0
        if gone is None:
            return  # they stay where they are
        self._is_spooling = True
        with self._lock:
            self.dropped += gone
            for beat in queued:
                self._take_out(beat)

    def _take_out(self, beat: Beat) -> None:
        # Not there any more where so many have come meanwhile that it was dropped.
        if self._queue and self._queue[0] is beat:
            self._queue.popleft()

    def _keep(self, rest: Sequence[Beat]) -> Leftover:
        if not rest:
            return Leftover(0, 0)
        gone = None if self._spool is None else self._spool.put(rest)
        lost = len(rest) if gone is None else gone
        with self._lock:
            self.dropped += lost
        # With those that have been there since an earlier try.
        return Leftover(len(self._spool) if self._spool is not None else 0, lost)

    def _left(self) -> int:
        with self._lock:
            return len(self._in_hand) + len(self._queue) + len(self._reports)

    def _tell_leftover(self, left: Leftover) -> None:
        parts = []
        if left.spooled and self._spool is not None:
            parts.append(f"{left.spooled} wait in the spool {self._spool.path}, and the next process of this agent sends them")
        if left.lost:
            parts.append(f"{left.lost} are lost (spool= names a file in which they could wait)")
        logger.warning("Heartbeats could not be delivered before the process ended: %s.", "; ".join(parts))

    # -- HTTP -------------------------------------------------------------------------------------------------------------

    def _post_all(self) -> None:
        """Post the reports, and what is in hand.

        Raises:
            DeliveryError: not all of it was taken, and it is worth another try. What is wrong for good is dropped and counted.

        """
        self._is_last_try = self._is_stopping
        while self._reports:
            command_id, result = next(iter(self._reports.items()))
            self._report(command_id, result)
            self._reports.pop(command_id, None)
        beats = self._in_hand
        if len(beats) > 1:
            try:
                self._answered(self._post("/heartbeat/batch", {"heartbeats": beats}))
            except DeliveryError as error:
                if not error.permanent:
                    raise
                # One of them is wrong: the others are not to be lost with it.
            else:
                return
        for beat in beats:
            try:
                self._answered(self._post("/heartbeat", beat))
            except DeliveryError as error:
                if not error.permanent:
                    raise
                logger.warning("A heartbeat was refused for good, and dropped: %s", error)
                with self._lock:
                    self.dropped += 1
            self._delivered(1)

    def _report(self, command_id: str, result: Mapping[str, Any]) -> None:
        try:
            self._post(f"/commands/{quote(command_id, safe='')}/result", result)
        except DeliveryError as error:
            if not isinstance(error, _Refused) and not error.permanent:
                raise
            # The command is told again with the next answer, if that matters; beats are not to wait for it.
            logger.warning("What became of the command %r was refused: %s", command_id, error)

    def _answered(self, answer: object) -> None:
        if self._failing is not None:
            self._failing = None
            logger.warning("Heartbeats are delivered again.")
        if not isinstance(answer, dict):
            return
        try:
            self._on_answer(answer)
        except Exception:  # whose code: ours; what was delivered stays delivered
            logger.exception("An answer of the monitor could not be carried out: %.500r", answer)

    def _post(self, path: str, body: Mapping[str, Any]) -> object:
        if self._client is None:
            headers = {**self._headers, "User-Agent": f"clevagent/{__version__}", "Content-Type": "application/json"}
            with _no_fork:
                self._client = httpx.Client(headers=headers, timeout=TIMEOUT_S, follow_redirects=False)
        try:
            with self._client.stream("POST", self._base + path, content=json.dumps(body).encode()) as response:
                said = self._read(response)
        except httpx.HTTPError as error:
            raise DeliveryError(f"{self._base} cannot be reached ({error!r}).", permanent=False) from error
        except (httpx.InvalidURL, httpx.CookieConflict) as error:
            raise DeliveryError(f"{self._base} is no address ({error}).", permanent=False, retry_after_s=REFUSED_PAUSE_S) from error
        if response.is_success:
            try:
                return json.loads(said)
            except (ValueError, RecursionError):  # something in between has answered; for all that can be told it was taken
                return None
        raise self._refused(response, said[:200].decode(errors="replace"))

    def _read(self, response: httpx.Response) -> bytes:
        """Read an answer, or its beginning where it is no answer of a monitor: without end, or piece by piece for ever."""
        said, until = bytearray(), self._clock.monotonic() + TIMEOUT_S
        for piece in response.iter_bytes():
            said += piece
            if len(said) > MOST_BYTES or self._clock.monotonic() > until:
                break
        return bytes(said)

    def _refused(self, response: httpx.Response, said: str) -> DeliveryError:
        status = response.status_code
        if status in _OF_THE_BEAT:
            return DeliveryError(f"{self._base} answered {status}: {said}", permanent=True)
        asked = _retry_after(response.headers.get("Retry-After"), self._clock.wall())
        if status in {408, 425, 429} or response.is_server_error:
            return DeliveryError(f"{self._base} answered {status}.", permanent=False, retry_after_s=asked)
        advice = "Mend api_key=" if status in {401, 403} else "Mend endpoint="
        return _Refused(
            f"{self._base} answered {status}: {said}. {advice}; it is tried again every {REFUSED_PAUSE_S:g} s.",
            permanent=False,
            retry_after_s=REFUSED_PAUSE_S if asked is None else asked,
        )


def _retry_after(value: str | None, wall: float) -> float | None:
    """Read how many seconds a receiver asks to wait: a number or a date; at most five minutes."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - wall
        except ValueError:
            return None
    return min(max(0.0, seconds), REFUSED_PAUSE_S) if seconds == seconds else None  # noqa: PLR0124 - not NaN


os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)
