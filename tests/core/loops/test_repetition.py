"""The loop detector by itself: what it finds, what it leaves alone, and what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevagent_core.guards.repetition import Finding, Repetition, Sign

from .corpus import HEALTHY, LOOPS, Call


def sign(number: int, *, tool: str = "tool", result: int | None = None, failed: bool = False) -> Sign:
    result = number if result is None else result
    return Sign(tool, number, number, result, result, failed)


def walk(signs, repetition: Repetition | None = None) -> list[Finding | None]:
    repetition = repetition or Repetition()
    return [repetition.observe(one, started=repetition.steps) for one in signs]


def watch(calls: list[Call]) -> list[Finding | None]:
    repetition = Repetition()
    return [repetition.observe(call.sign(), started=repetition.steps if call.began is None else call.began) for call in calls]


def test_the_corpus_is_as_large_as_it_says():
    assert len(LOOPS) >= 14
    assert len(HEALTHY) >= 20


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found_within_six_repetitions_and_told_until_its_end(name):
    loop = LOOPS[name]()
    findings = watch(loop.calls)
    first = next((step for step, finding in enumerate(findings) if finding), None)
    assert first is not None
    # The first round is no repetition.
    assert loop.begins <= first < loop.begins + 7 * loop.period
    assert all(findings[first:])


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name):
    assert not any(watch(list(HEALTHY[name]())))


def test_a_call_repeated_is_found_at_its_fifth_time():
    findings = walk([sign(1), sign(2), *[sign(7)] * 6])
    assert findings[:6] == [None] * 6
    assert findings[6:] == [
        Finding(1, 5, 3, (sign(7),), "same call and result"),
        Finding(1, 6, 3, (sign(7),), "same call and result"),
    ]


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 7])
def test_a_cycle_is_found_at_the_end_of_its_third_round(period):
    cycle = [sign(10 + number) for number in range(period)]
    findings = walk([sign(1), *cycle * 3])
    assert not any(findings[:-1])
    assert findings[-1] == Finding(period, 3, 1 + period, tuple(cycle), "cycle")


def test_a_cycle_in_which_a_call_comes_twice_has_its_own_length():
    findings = walk([sign(1), sign(1), sign(2)] * 5)
    assert findings[-1].period == 3
    assert findings[-1].rule == "cycle"
    assert findings[-1].signs == (sign(1), sign(1), sign(2))


def test_calls_in_changing_order_are_told_as_such():
    a, b, c = sign(1), sign(2), sign(3)
    finding = walk([a, b, c, c, a, b, b, a, c, a, c, b])[-1]
    assert finding.rule == "nothing new"
    assert finding.period == 3
    assert finding.times == 4
    assert finding.since == 3
    assert set(finding.signs) == {a, b, c}


def test_the_same_failure_is_found_whatever_the_arguments():
    findings = walk([sign(number, result=99, failed=True) for number in range(8)])
    assert findings[:6] == [None] * 6
    assert findings[6] == Finding(1, 7, 1, (sign(6, result=99, failed=True),), "same failure")
    assert findings[7].times == 8


def test_the_same_call_that_fails_again_after_other_work_is_no_count_of_failures():
    edits = [sign(100 + number, tool="edit", result=5) for number in range(20)]
    assert not any(walk([one for edit in edits for one in (edit, sign(7, result=99, failed=True))]))


def test_a_failure_in_new_words_takes_one_back():
    same = [sign(number, result=99, failed=True) for number in range(7)]
    other = sign(50, result=98, failed=True)
    findings = walk([*same, other, sign(51, result=99, failed=True)])
    assert [finding is not None for finding in findings[-3:]] == [True, False, True]


def test_the_same_words_of_another_tool_are_another_failure():
    assert not any(walk([sign(number, tool=f"tool{number}", result=99, failed=True) for number in range(20)]))


def test_a_success_of_the_failing_tool_clears_its_failures_even_if_it_says_nothing_new():
    failures = [sign(number, result=99, failed=True) for number in range(6)]
    fine = [sign(100 + number, result=5) for number in range(2)]
    assert not any(walk([fine[0], *failures, fine[1], *[sign(200 + number, result=99, failed=True) for number in range(5)]]))


def test_what_another_tool_says_again_leaves_failures_counted():
    thoughts = (sign(100 + number, tool="think", result=5) for number in range(20))
    mixed = [one for number in range(10) for one in (next(thoughts), sign(number, result=99, failed=True))]
    assert any(walk(mixed))


def test_one_step_with_news_ends_a_finding():
    findings = walk([*[sign(7)] * 6, sign(8), *[sign(7)] * 4])
    assert [finding is not None for finding in findings] == [False] * 4 + [True] * 2 + [False] + [False] * 3 + [True]
    assert findings[-1].since == 7


def test_the_same_call_with_a_new_result_is_news():
    assert not any(walk([sign(7, result=number) for number in range(100)]))


def test_a_failed_call_with_other_details_in_its_error_is_none():
    assert walk([Sign("tool", 7, 7, number, 99, True) for number in range(5)])[-1].times == 5


def test_what_succeeds_is_not_what_failed_with_the_same_words():
    assert not any(walk([sign(7, failed=bool(number % 2)) for number in range(4)]))


def test_arguments_that_differ_only_in_labels_are_the_same():
    assert walk([Sign("tool", number, 7, 9, 9, False) for number in range(5)])[-1].times == 5


@pytest.mark.parametrize("repeats", [2, 3, 6, 10])
def test_repeats_says_how_many_repetitions_make_a_loop(repeats):
    findings = walk([sign(7)] * 12, Repetition(repeats=repeats))
    assert [finding is not None for finding in findings] == [False] * repeats + [True] * (12 - repeats)


def test_parallel_twins_do_not_count():
    repetition = Repetition()
    assert not any(repetition.observe(sign(7), started=0) for _ in range(50))


def test_parallel_twins_count_once_a_round():
    repetition = Repetition()
    rounds = []
    for _ in range(6):
        started = repetition.steps
        answers = [repetition.observe(sign(7), started=started) for _ in range(5)]
        rounds.append(any(answers))
    assert rounds == [False] * 4 + [True] * 2


def test_two_workers_that_overlap_all_the_time_are_found():
    repetition = Repetition()
    assert any(repetition.observe(sign(7), started=max(0, repetition.steps - 1)) for _ in range(12))


def test_parallel_failures_in_the_same_words_do_not_count():
    repetition = Repetition()
    assert not any(repetition.observe(sign(number, result=99, failed=True), started=0) for number in range(50))


def test_reset_forgets_what_repeated_but_not_the_count_of_steps():
    repetition = Repetition()
    walk([sign(7)] * 4 + [sign(number, result=99, failed=True) for number in range(6)], repetition)
    repetition.reset()
    assert repetition.steps == 10
    assert not any(walk([sign(7)] * 4 + [sign(number, result=99, failed=True) for number in range(20, 26)], repetition))


def test_after_a_reset_a_loop_is_found_again_and_its_beginning_counted_over_the_whole_run():
    repetition = Repetition()
    walk([sign(7)] * 5, repetition)
    repetition.reset()
    assert walk([sign(7)] * 5, repetition)[-1].since == 6


def _entries(repetition: Repetition) -> int:
    held = [getattr(repetition, name) for name in Repetition.__slots__]
    return sum(len(one) for one in held if hasattr(one, "__len__"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        sign,
        lambda step: sign(step, failed=True),
        lambda step: sign(step, tool=f"tool{step}", result=step % 7, failed=bool(step % 2)),
        lambda step: sign(step % 250),
        lambda step: sign(step, tool=f"tool{step % 1000}", result=99, failed=True),
        lambda step: sign(7),
    ],
    ids=["all new", "all failing", "many tools", "a long cycle", "many failing tools", "one call"],
)
def test_a_long_run_is_kept_in_a_few_hundred_entries(made):
    repetition = Repetition()
    most = 0
    for step in range(100_000):
        repetition.observe(made(step), started=step)
        if step % 997 == 0:
            most = max(most, _entries(repetition))
    assert repetition.steps == 100_000
    assert most < 800


def test_a_loop_is_found_after_a_long_healthy_beginning():
    repetition = Repetition()
    assert not any(walk((sign(step) for step in range(5_000)), repetition))
    assert walk([sign(7_001), sign(7_002)] * 3, repetition)[-1].rule == "cycle"


_signs = st.builds(
    Sign, st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans()
)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(), st.booleans()), unique_by=lambda pair: pair[0]))
def test_calls_that_are_all_new_are_never_a_loop(made):
    assert not any(walk([sign(number, failed=failed) for number, failed in made]))


@pytest.mark.slow
@given(st.lists(_signs, max_size=60), st.lists(_signs, min_size=1, max_size=7))
def test_whatever_came_before_a_cycle_walked_six_times_is_found_and_stays_found(before, cycle):
    findings = walk([*before, *cycle * 8])
    assert findings[len(before) + 6 * len(cycle) - 1]
    assert all(findings[len(before) + 6 * len(cycle) - 1 :])


@pytest.mark.slow
@given(st.lists(st.tuples(_signs, st.integers(0, 8)), max_size=80))
def test_a_finding_always_tells_what_can_be(made):
    repetition = Repetition()
    for one, lag in made:
        finding = repetition.observe(one, started=max(0, repetition.steps - lag))
        if finding is None:
            continue
        assert finding.times >= 2
        assert 0 <= finding.since < repetition.steps
        assert finding.period >= 1
        assert 1 <= len(finding.signs) <= finding.period
        assert finding.rule in {"same call and result", "cycle", "nothing new", "same failure"}
