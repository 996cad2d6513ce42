"""Finds, in the sequence of a run's finished calls, the place from which nothing new comes any more.

Two rules, told from 477 public runs of agents that people had labelled, 123 of them as looping. The figures are shares of those 123;
together the rules find .88 of them, after 3 calls (median), without one false alarm in the 354 others. One step earlier
(``repeats=3``) they find .93, still without one: the default keeps that distance. On 515 runs that were held back while the rules
were made: .81 of 118 found, none of 397 flagged.

* **Nothing new.** Every call in a row had been made before *and* brought what it had brought then. One call again and again,
  cycles of any length, and a few calls in changing order are one thing: no step tells the agent anything. It takes
  ``repeats`` such steps and, of each call among them, two on average: a round that is walked a second time may answer a second
  question; the third is a loop. Finds .80; without the second condition .86, with 4 false alarms. A step with news clears
  the row. If it took back one step only, .03 more would be found, and a batch that signs in, reads its settings and lists the
  tables for each of its items would be flagged.
* **The same failure.** A tool fails with an error that it gave before, word for word, although it is asked something else: prose
  sent to a shell, edits that are refused. It takes half as many again as above (6), for the arguments *are* new. Adds .07; from
  4 on, no number gave a false alarm. A success of that tool, or any other tool's new result, clears the count; a failure in other
  words takes one back. A *call* that failed before does not count: it may be the tests, run again after an edit.
  Where an error names its item ("order 4411 not found") each is news, so lookups that fail one by one are no loop; lookups that
  *raise* the same bare "not found" for 7 items, while none is found, are told as one: nothing in the calls says otherwise. Lookups
  that *answer* so do not fail.

What is the same? For arguments ``shape``. For results ``result``, *with* its numbers: a poll that says 43 % and then 44 % moves on, a
tuning run differs in its figures only (without the numbers: 15 false alarms). Only what failed is compared by ``result_shape`` when
its call is repeated, as shells count lines in their errors and servers number their requests (finds .06 more).

What is not found, since nothing in the calls tells it from healthy work: one call repeated whose results are always new (an
insertion while the file grows looks like a scroll through it), failing searches whose error names what was searched for, and an
edit in new words each time before a test that fails in the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

_KEPT = 128
"""How many different outcomes a generation of a memory holds; each memory has two."""
_LONGEST = 8
"""The longest cycle, in calls, that is named as one; in longer ones the order is not told."""
_RECENT = 3 * _LONGEST
"""How many of the last outcomes are kept to tell the length of a cycle."""
SAME_FAILURE = "same failure"
_TOOLS = 64
"""How many failing tools are told apart."""


class Sign(NamedTuple):
    """One finished call as fingerprints."""

    what: Hashable
    """Which tool, or which model, and in which node."""
    arguments: int
    """The arguments, exact up to key order and white space."""
    shape: int
    """The same without what only labels or counts the request."""
    result: int
    """What came back, exact up to white space."""
    result_shape: int
    """The same without ids, times and numbers."""
    failed: bool
    """Whether the call raised, or its tool or adapter says that it is an error."""


class Finding(NamedTuple):
    """What is repeating."""

    period: int
    """How many calls one round has: 1 for one call. Where the order varies, how many different calls take part."""
    times: int
    """How often it came so far: full rounds, the first included."""
    since: int
    """The first step that repeated what was known, counted from 0 over all steps of the run."""
    signs: tuple[Sign, ...]
    """One round; where the order varies, the different signs among the latest; for a failure, the last sign."""
    rule: str
    """``same call and result``, ``cycle``, ``nothing new`` or ``same failure``."""


class _Memory:
    """When each of the latest outcomes was last counted. Of those unused for ``_KEPT`` others, some are forgotten."""

    __slots__ = ("_new", "_old")

    def __init__(self) -> None:
        self._new: dict[Hashable, int] = {}
        self._old: dict[Hashable, int] = {}

    def swap(self, key: Hashable, step: int, started: int) -> int:
        """Give the step that ``key`` was counted at last, or -1; replace it by ``step``, unless it ended after ``started``.

        Two dictionaries in place of an ordered one: what is used moves to the new one, and what is left in the old one when
        the new one is full goes with it. That costs a third of moving each key to the end of a list.
        """
        new = self._new
        last = new.get(key, -1)
        if last < 0:
            last = self._old.get(key, -1)
        if last < started:
            new[key] = step
            if len(new) > _KEPT:
                self._old, self._new = new, {}
        return last

    def clear(self) -> None:
        self._new.clear()
        self._old.clear()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)


class Repetition:
    """What repeats in one run. Constant time a step, a few hundred entries; for use from one thread at a time.

    Feed tool calls and model calls to one of these each: a model's arguments grow with the history, so each of its calls
    is news, and would hide that the tools between them bring none.

    Args:
        repeats: how many steps in a row may bring nothing new before it is a loop: 4 means that the fifth time is one. Of
            failures in the same words, half as many again. At least 2.

    """

    __slots__ = (
        "_calls",
        "_different",
        "_failing",
        "_failures",
        "_failures_since",
        "_failures_told",
        "_last_failure",
        "_limit",
        "_outcomes",
        "_recent",
        "_repeats",
        "_row",
        "_row_since",
        "steps",
    )

    def __init__(self, *, repeats: int = 4) -> None:
        self._repeats = repeats
        self._limit = repeats + repeats // 2
        self.steps = 0
        """How many signs were observed."""
        self._calls = _Memory()
        self._outcomes = _Memory()
        self._recent: deque[tuple[Hashable, Sign]] = deque(maxlen=_RECENT)
        self._different: set[Hashable] = set()
        self._failing: set[Hashable] = set()
        self._last_failure: Sign | None = None
        self._row = self._row_since = 0
        self._failures = self._failures_since = self._failures_told = 0

    def observe(self, sign: Sign, *, started: int) -> Finding | None:
        """Take in one finished call; give what repeats from the step on where that is certain, until news comes.

        Args:
            sign: the call.
            started: how many signs had been observed when the call *began*. What was still running then is no earlier time
                of it: calls sent side by side, as to vote on an answer, count once a round.

        """
        step = self.steps
        self.steps = step + 1
        what, _, shape, result, result_shape, failed = sign
        # Numbers, as the fingerprints are: a tuple would be hashed anew wherever it is looked up.
        key = hash((what, shape, result_shape if failed else result, failed))
        last = self._calls.swap(key, step, started)
        if last < 0:
            if self._row:
                self._row = 0
                self._different.clear()
        elif last < started:
            if not self._row:
                self._row_since = step
            self._row += 1
            self._different.add(key)
        if last < started:
            self._recent.append((key, sign))
            if failed:
                self._fail(sign, step, started, is_new=last < 0)
            else:
                known = self._outcomes.swap(hash((what, result, False)), step, started) >= 0
                if self._failing and (not known or what in self._failing):
                    self._forgive()
        if self._row >= self._repeats and self._row >= 2 * len(self._different):
            return self._repeated()
        if self._failures >= self._limit:
            return self._failed()
        return None

    @property
    def failures(self) -> int:
        """How many failures in the same words are counted now."""
        return self._failures

    def reset(self) -> None:
        """Forget what was observed; ``steps`` goes on counting."""
        self._calls.clear()
        self._outcomes.clear()
        self._recent.clear()
        self._different.clear()
        self._row = 0
        self._forgive()

    def _fail(self, sign: Sign, step: int, started: int, *, is_new: bool) -> None:
        """Count a failure of a new call in words that its tool used before, take one back for new words."""
        last = self._outcomes.swap(hash((sign.what, sign.result, True)), step, started)
        if len(self._failing) < _TOOLS:
            self._failing.add(sign.what)
        if last < 0:
            # Never more than the limit is taken back from: news must end a finding at once, however long it lasted.
            self._failures = max(0, self._failures - 1)
        elif last < started and is_new:
            if not self._failures:
                self._failures_since = step
                self._failures_told = 1
            self._failures = min(self._failures + 1, self._limit)
            self._failures_told += 1
            self._last_failure = sign

    def _forgive(self) -> None:
        self._failures = self._failures_told = 0
        self._failing.clear()
        self._last_failure = None

    def _repeated(self) -> Finding:
        """Tell what repeats; called only while something does, so the cycle's length is looked for only then."""
        different = len(self._different)
        # One call alone needs no search: that is most loops, and each of their further steps.
        period = 1 if different == 1 else _period([key for key, _ in self._recent], self._row)
        if period:
            signs = (self._recent[-1][1],) if period == 1 else tuple(sign for _, sign in self._recent)[-period:]
            rule = "same call and result" if period == 1 else "cycle"
            return Finding(period, 1 + self._row // period, self._row_since, signs, rule)
        latest = {key: sign for key, sign in self._recent if key in self._different}
        return Finding(different, 1 + self._row // different, self._row_since, tuple(latest.values()), "nothing new")

    def _failed(self) -> Finding:
        signs = () if self._last_failure is None else (self._last_failure,)
        return Finding(1, self._failures_told, self._failures_since, signs, SAME_FAILURE)


def _period(keys: list[Hashable], row: int) -> int:
    """Give the length of the shortest cycle that the last ``row`` keys walk, as far as they are known; 0 if there is none."""
    count = len(keys)
    for period in range(1, _LONGEST + 1):
        compared = min(row, count - period)
        if compared < period:
            break
        if keys[count - compared :] == keys[count - compared - period : count - period]:
            return period
    return 0
