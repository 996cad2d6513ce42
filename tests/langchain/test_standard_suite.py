"""langchain-tests' standard suite, run with plain models and with guarded ones."""

from __future__ import annotations

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_anthropic import ChatAnthropic
from langchain_core.load import dumpd
from langchain_openai import ChatOpenAI
from langchain_tests.unit_tests import ChatModelUnitTests

import clevagent
from clevagent_langchain.marks import GUARDED


class _Suite(ChatModelUnitTests):
    """What the suite asks of its environment, without the plugins that pyproject.toml turns off."""

    plain_class = ChatOpenAI
    is_guarded = False

    @property
    def chat_model_class(self):
        return self.plain_class

    @pytest.fixture(autouse=True)
    def _keys(self, monkeypatch):
        # Some of its tests make a model without a key.
        for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
            monkeypatch.setenv(name, "test")

    @pytest.fixture
    def snapshot(self):
        """Return what gives the serialized form of the plain model, which syrupy would keep in a file.

        A guarded one adds its mark. Without that, what is loaded from it would not be guarded.
        """
        plain = self.plain_class(**self.standard_chat_model_params, **self.chat_model_params)
        return lambda name: dumpd(plain) | ({GUARDED: []} if self.is_guarded else {})

    @pytest.fixture
    def benchmark(self):
        return lambda function: function()


class _Guarding:
    """Stands for a class of models: what it makes is guarded."""

    def __init__(self, plain_class):
        self._plain_class = plain_class

    def __call__(self, **params):
        return clevagent.guard(self._plain_class(**params))

    def __getattr__(self, name):
        return getattr(self._plain_class, name)


class _Guarded:
    """Makes the suite use guarded models throughout: it makes some in its ``model`` fixture, and others in its tests."""

    is_guarded = True

    @property
    def chat_model_class(self):
        return _Guarding(self.plain_class)


class TestOpenAI(_Suite):
    @property
    def chat_model_params(self):
        return {"model": "gpt-4o", "base_url": "http://127.0.0.1:1"}

    @property
    def init_from_env_params(self):
        return (
            {
                "OPENAI_API_KEY": "api_key",
                "OPENAI_ORG_ID": "org_id",
                "OPENAI_API_BASE": "http://127.0.0.1:1",
                "OPENAI_PROXY": "http://127.0.0.1:2",
            },
            {},
            {
                "openai_api_key": "api_key",
                "openai_organization": "org_id",
                "openai_api_base": "http://127.0.0.1:1",
                "openai_proxy": "http://127.0.0.1:2",
            },
        )


class TestGuardedOpenAI(_Guarded, TestOpenAI):
    pass


# It knows two of the three methods that the suite names.
@pytest.mark.filterwarnings("ignore:Unrecognized structured output method 'json_mode':UserWarning")
class TestAnthropic(_Suite):
    plain_class = ChatAnthropic

    @property
    def chat_model_params(self):
        return {"model": "claude-sonnet-4-6", "base_url": "http://127.0.0.1:1"}

    @property
    def init_from_env_params(self):
        return (
            {"ANTHROPIC_API_KEY": "api_key", "ANTHROPIC_API_URL": "http://127.0.0.1:1"},
            {"model": "claude-sonnet-4-6"},
            {"anthropic_api_key": "api_key", "anthropic_api_url": "http://127.0.0.1:1"},
        )


class TestGuardedAnthropic(_Guarded, TestAnthropic):
    pass
