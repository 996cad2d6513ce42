"""Fixtures of pytest and pytest-asyncio that open a run: it covers the test, like a plain ``with`` block around it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.slow

SHARED = """
    import asyncio
    import unittest

    import pytest
    import pytest_asyncio

    import clevagent
    from clevagent import Budget, Stopped
    from clevagent.testing import LoopbackProvider
    from langchain_openai import ChatOpenAI
    from openai import AsyncOpenAI, OpenAI

    PROVIDER = LoopbackProvider().start()
    MODEL = clevagent.guard(ChatOpenAI(model="gpt-4o", api_key="test", base_url=PROVIDER.openai_url, max_tokens=20, max_retries=0))
    CLIENT = clevagent.guard(OpenAI(api_key="test", base_url=PROVIDER.openai_url))
    ASKED = {"model": "gpt-4o", "max_tokens": 20, "messages": [{"role": "user", "content": "x"}]}

    def tries(count=3):
        '''Try so often with each; tell how many requests the provider was sent.'''
        before = PROVIDER.request_count
        for _ in range(count):
            for ask in (lambda: MODEL.invoke("x"), lambda: CLIENT.chat.completions.create(**ASKED)):
                try:
                    ask()
                except Stopped:
                    pass
        return PROVIDER.request_count - before

    async def atries(count=3):
        before = PROVIDER.request_count
        async with AsyncOpenAI(api_key="test", base_url=PROVIDER.openai_url) as plain:
            client = clevagent.guard(plain)
            for _ in range(count):
                try:
                    await client.chat.completions.create(**ASKED)
                except Stopped:
                    pass
        return PROVIDER.request_count - before
"""


def _outcomes(tmp_path, program, *options):
    """Run tests in a session of their own, and give how many passed; any that fails fails here."""
    (tmp_path / "shared.py").write_text(textwrap.dedent(SHARED))
    path = tmp_path / "test_program.py"
    path.write_text("from shared import *\n" + textwrap.dedent(program))
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CLEVAGENT_"))}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_that_a_fixture_opens_covers_the_test(tmp_path):
    """Also where it is autouse, of a wider scope, or opened by another fixture or a context manager in it."""
    out = _outcomes(
        tmp_path,
        """
        from contextlib import ExitStack, contextmanager

        @pytest.fixture
        def run():
            with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
                yield run
            assert run.ended_at is not None

        @contextmanager
        def opened():
            with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
                yield run

        @pytest.fixture
        def managed():
            with opened() as run:
                yield run

        @pytest.fixture
        def stacked():
            with ExitStack() as stack:
                yield stack.enter_context(clevagent.run(budgets=[Budget(llm_calls=3)]))

        @pytest.fixture
        def nested(run):
            with clevagent.run(budgets=[Budget(llm_calls=2)]) as inner:
                yield inner

        @pytest.fixture(scope="module")
        def wide():
            with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
                yield run

        @pytest.mark.parametrize("again", range(2))
        def test_ceiling(run, again):
            assert tries() == 3 == run.summary().total.calls

        def test_managed(managed):
            assert tries() == 3 == managed.summary().total.calls

        def test_stacked(stacked):
            assert tries() == 3 == stacked.summary().total.calls

        def test_nested(run, nested):
            assert tries() == 2 == nested.summary().total.calls == run.summary().total.calls

        def test_none():
            assert tries() == 6

        class TestWide:
            def test_first(self, wide):
                assert tries(1) == 2

            def test_second(self, wide):
                assert tries(1) == 1
                assert wide.summary().total.calls == 3
        """,
    )
    assert "8 passed" in out


def test_what_a_test_starts_in_a_fixtures_run_counts_in_it(tmp_path):
    out = _outcomes(
        tmp_path,
        """
        import threading
        from concurrent.futures import ThreadPoolExecutor

        @pytest.fixture
        def run():
            with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
                yield run

        def test_thread(run):
            made = []
            thread = threading.Thread(target=lambda: made.append(tries()))
            thread.start()
            thread.join(20)
            assert made == [3] == [run.summary().total.calls]

        def test_pool(run):
            with clevagent.run(), ThreadPoolExecutor(1) as pool:
                assert pool.submit(tries).result(20) == 3 == run.summary().total.calls

        def test_loop(run):
            assert asyncio.run(atries(6)) == 3 == run.summary().total.calls

        def test_generator(run):
            def steps():
                with clevagent.run(budgets=[Budget(llm_calls=1)]) as inner:
                    yield tries(1)
                    yield tries(1)

            assert list(steps()) == [1, 0]
            assert tries() == 2 and run.summary().total.calls == 3
        """,
    )
    assert "4 passed" in out


def test_a_run_that_a_fixture_of_pytest_asyncio_opens_covers_the_test(tmp_path):
    out = _outcomes(
        tmp_path,
        """
        @pytest_asyncio.fixture
        async def run():
            async with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
                yield run
            assert run.ended_at is not None

        @pytest.fixture
        def sync_run():
            with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
                yield run

        @pytest.mark.asyncio
        @pytest.mark.parametrize("again", range(2))
        async def test_ceiling(run, again):
            assert await atries(6) == 3 == run.summary().total.calls

        @pytest.mark.asyncio
        async def test_tasks(run):
            await asyncio.gather(*(asyncio.create_task(atries(2)) for _ in range(3)))
            assert run.summary().total.calls == 3

        @pytest.mark.asyncio
        async def test_thread(run):
            assert await asyncio.to_thread(tries) == 3 == run.summary().total.calls

        @pytest.mark.asyncio
        async def test_sync_fixture(sync_run):
            assert await atries(6) == 3 == sync_run.summary().total.calls

        @pytest.mark.asyncio
        async def test_none():
            assert await atries(6) == 6
        """,
    )
    assert "6 passed" in out


def test_a_run_that_a_unittest_enters_covers_the_test(tmp_path):
    out = _outcomes(
        tmp_path,
        """
        class Case(unittest.TestCase):
            def setUp(self):
                self.run_ = self.enterContext(clevagent.run(budgets=[Budget(llm_calls=3)]))

            def test_one(self):
                assert tries() == 3 == self.run_.summary().total.calls

            def test_two(self):
                assert tries() == 3 == self.run_.summary().total.calls

        class AsyncCase(unittest.IsolatedAsyncioTestCase):
            async def asyncSetUp(self):
                self.run_ = await self.enterAsyncContext(clevagent.run(budgets=[Budget(llm_calls=3)]))

            async def test_one(self):
                assert await atries(6) == 3 == self.run_.summary().total.calls

        def test_none():
            assert tries() == 6
        """,
        "-p",
        "no:asyncio",
    )
    assert "4 passed" in out
