"""Output limits of raw clients: which key is sent, what is clamped, and what is refused instead."""

from __future__ import annotations

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clevagent
from clevagent import Budget, BudgetExceeded, Price, UsageError
from clevagent.testing import LoopbackProvider, Reply

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}


@pytest.fixture
def client(provider):
    with openai.OpenAI(api_key="test", base_url=provider.openai_url) as client:
        yield clevagent.guard(client)


def sent(provider):
    keys = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    return {key: value for key, value in provider.requests[-1].body.items() if key in keys}


@pytest.mark.parametrize(
    ("model", "key", "most"),
    [
        ("gpt-4o", "max_tokens", 16_384),
        ("gpt-4o-2024-05-13", "max_tokens", 4096),
        ("gpt-3.5-turbo", "max_tokens", 4096),
        ("o3-mini", "max_completion_tokens", 32_768),
        ("gpt-5-nano", "max_completion_tokens", 32_768),
        ("openai/o3-mini", "max_completion_tokens", 32_768),
    ],
)
def test_the_limit_that_is_added_is_one_that_the_model_takes(provider, client, model, key, most):
    with clevagent.run(budgets=[Budget(usd=10)]):
        client.chat.completions.create(model=model, messages=MESSAGES)
    assert sent(provider) == {key: most}


def test_the_limit_that_is_added_leaves_half_of_what_is_free_to_others(provider, client):
    with clevagent.run(budgets=[Budget(output_tokens=20_000)]) as run:
        client.responses.create(model="o3", input="Hello")
        assert sent(provider) == {"max_output_tokens": 10_000}
    assert run.summary().total.calls == 1


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_a_model_that_writes_less_than_others_of_its_family_is_asked_again(provider, client, endpoint):
    key = "max_tokens" if endpoint == "chat" else "max_output_tokens"
    provider.reset(
        lambda body: Reply(status=400, error_message=f"{key} is too large: it is at most 8192.") if body[key] > 8192 else Reply()
    )

    def ask():
        if endpoint == "chat":
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        else:
            client.responses.create(model="gpt-4o", input="Hello")

    with clevagent.run(budgets=[Budget(usd=10)]) as run:
        ask()
    assert (sent(provider), provider.request_count) == ({key: 4096}, 2)
    assert run.summary().total.calls == 1
    with clevagent.run(budgets=[Budget(usd=10)]):
        ask()
    assert provider.request_count == 3  # and what it takes is known now


def test_a_small_window_takes_what_fits_into_it(provider, client):
    """As servers of one's own say it, which do not name the parameter."""
    refusal = Reply(status=400, error_message="This model's maximum context length is 4096 tokens. However, you requested more.")
    provider.reset(lambda body: refusal if body["max_tokens"] > 4000 else Reply())
    clevagent.init(prices={"llama": Price(input=1, output=1)})
    with clevagent.run(budgets=[Budget(usd=10)]) as run:
        client.chat.completions.create(model="llama", messages=MESSAGES)
    assert (sent(provider), run.summary().total.calls) == ({"max_tokens": 1024}, 1)


def test_a_prompt_that_fits_no_window_is_the_users_error(provider, client):
    provider.reset(lambda _: Reply(status=400, error_message="This model's maximum context length is 4096 tokens."))
    with clevagent.run(budgets=[Budget(usd=10)]) as run, pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert run.summary().total.calls == 0


def test_a_model_that_knows_only_the_other_name_of_it_is_asked_again(provider, client):
    def answer(body):
        if "max_tokens" in body:
            return Reply(status=400, error_message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return Reply()

    provider.reset(answer)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert sent(provider) == {"max_completion_tokens": 16_384}
    assert run.summary().total.calls == 1


def test_what_the_user_named_is_the_users_and_the_error_too(provider, client):
    provider.reset([Reply(status=400, error_message="Unsupported parameter: 'max_tokens'")])
    with clevagent.run(budgets=[Budget(usd=1)]), pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=20)
    assert provider.request_count == 1


def test_nothing_is_added_where_nothing_limits_the_output(provider, client):
    with clevagent.run(budgets=[Budget(llm_calls=5)]):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        client.responses.create(model="gpt-4o", input="Hello")
    assert sent(provider) == {}


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_the_users_limit_is_lowered_under_its_own_name(provider, client, key):
    with clevagent.run(budgets=[Budget(output_tokens=300)]) as run:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, **{key: 5000})
    assert sent(provider) == {key: 300}
    assert run.summary().clamped_calls == 1


def test_of_two_limits_both_are_lowered(provider, client):
    with clevagent.run(budgets=[Budget(output_tokens=300)]):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=280, extra_body={"max_completion_tokens": 900})
    assert sent(provider) == {"max_tokens": 280, "max_completion_tokens": 300}


def test_the_limit_of_each_endpoint(provider, client):
    with clevagent.run(budgets=[Budget(output_tokens=10_000)]):
        client.responses.create(model="gpt-4o", input="Hello")
        assert sent(provider) == {"max_output_tokens": 5000}
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Hello")
        assert sent(provider) == {"max_tokens": 4096}


@pytest.mark.parametrize(
    "params",
    [
        {"response_format": SCHEMA},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "required"},
    ],
    ids=["structured", "forced tool"],
)
def test_an_answer_that_would_be_useless_if_cut_is_refused(provider, client, params):
    with clevagent.run(budgets=[Budget(output_tokens=900)]), pytest.raises(BudgetExceeded):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=1000, **params)
    assert provider.request_count == 0


@pytest.mark.parametrize(
    "params",
    [{"response_format": {"type": "text"}}, {"tool_choice": "auto"}, {"tool_choice": "none"}],
    ids=str,
)
def test_what_says_nothing_new_does_not_forbid_to_cut(provider, client, params):
    with clevagent.run(budgets=[Budget(output_tokens=900)]):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=1000, **params)
    assert sent(provider) == {"max_tokens": 900}


def test_a_structured_response_is_not_cut(provider, client):
    text = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object", "properties": {}}}}
    with clevagent.run(budgets=[Budget(output_tokens=900)]), pytest.raises(BudgetExceeded):
        client.responses.create(model="gpt-4o", input="Hello", max_output_tokens=1000, text=text)
    assert provider.request_count == 0


WINDOW = 128_000


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.chat.completions.create(
            model="gpt-4o",
            max_tokens=10,
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}],
        ),
        lambda c: c.chat.completions.create(
            model="gpt-4o", max_tokens=10, messages=[{"role": "assistant", "audio": {"id": "audio_1"}}, *MESSAGES]
        ),
        lambda c: c.responses.create(model="gpt-4o", input="Hello", max_output_tokens=10, previous_response_id="resp_1"),
        lambda c: c.responses.create(model="gpt-4o", max_output_tokens=10, prompt={"id": "pmpt_1"}),
        lambda c: c.responses.create(
            model="gpt-4o",
            max_output_tokens=10,
            input=[{"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}],
        ),
    ],
    ids=["image", "audio", "previous", "prompt", "file"],
)
def test_what_text_cannot_bound_counts_as_the_context_window(provider, client, call):
    with clevagent.run(budgets=[Budget(input_tokens=WINDOW - 1)]), pytest.raises(BudgetExceeded) as stop:
        call(client)
    assert (stop.value.needed, provider.request_count) == (WINDOW, 0)


@pytest.mark.parametrize(
    ("params", "rounds"),
    [
        ({"tools": [{"type": "web_search"}]}, 10),
        ({"tools": [{"type": "web_search"}], "max_tool_calls": 2}, 3),
        ({"tools": [{"type": "mcp", "server_label": "a", "server_url": "https://example.org"}], "max_tool_calls": 20}, 21),
        ({"tools": [{"type": "local_shell"}]}, 1),
    ],
)
def test_tools_that_run_at_the_provider_read_the_window_again_and_again(provider, client, params, rounds):
    """Their results come back within the same request, whose usage is the sum of all."""
    with clevagent.run(budgets=[Budget(input_tokens=WINDOW - 1)]), pytest.raises(BudgetExceeded) as stop:
        client.responses.create(model="gpt-4o", input="Hello", max_output_tokens=10, **params)
    assert (stop.value.needed, provider.request_count) == (rounds * WINDOW, 0)


def test_a_tool_by_which_another_model_works_is_refused_under_a_ceiling_in_money(provider, client):
    with clevagent.run(budgets=[Budget(usd=100)]), pytest.raises(UsageError, match="/responses with image_generation"):
        client.responses.create(model="gpt-4o", input="Draw", tools=[{"type": "image_generation"}])
    with clevagent.run(budgets=[Budget(usd=100)]), pytest.raises(UsageError, match="/chat/completions with fallbacks"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, extra_body={"models": ["gpt-4o", "o1-pro"]})
    assert provider.request_count == 0


@pytest.mark.parametrize("limit", [5000.0, 5000])
def test_a_limit_is_lowered_whatever_kind_of_number_it_is(provider, client, limit):
    with clevagent.run(budgets=[Budget(output_tokens=300)]):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=limit)
    assert sent(provider) == {"max_tokens": 300}


def test_what_is_predicted_is_reserved_beside_the_limit(provider, client):
    """What was predicted and not written is billed as output."""
    prediction = {"type": "content", "content": "x" * 1000}
    with clevagent.run(budgets=[Budget(output_tokens=1050)]), pytest.raises(BudgetExceeded):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=100, prediction=prediction)
    assert provider.request_count == 0


def test_the_deployment_of_an_azure_client_is_the_model(provider):
    clevagent.init(prices={"my-deployment": Price(input=1, output=2)})
    client = clevagent.guard(
        openai.AzureOpenAI(
            api_key="test", azure_endpoint=provider.anthropic_url, api_version="2024-10-21", azure_deployment="my-deployment"
        )
    )
    assert isinstance(client, openai.AzureOpenAI)
    with clevagent.run(budgets=[Budget(usd="0.000000001")]), pytest.raises(BudgetExceeded, match="my-deployment"):
        client.chat.completions.create(model="my-deployment", messages=MESSAGES)
    # Azure sends it to the deployment that the client names, whatever the body says.
    with clevagent.run(budgets=[Budget(usd="0.000000001")]), pytest.raises(BudgetExceeded, match="my-deployment"):
        client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
    of_any = clevagent.guard(openai.AzureOpenAI(api_key="test", azure_endpoint=provider.anthropic_url, api_version="2024-10-21"))
    with clevagent.run(budgets=[Budget(usd=1)]), pytest.raises(UsageError, match="other-one"):
        of_any.chat.completions.create(model="other-one", messages=MESSAGES)
    assert provider.request_count == 0


# -- any shape of request -------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=60)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant"]), "content": st.one_of(TEXT, st.lists(PART, max_size=3))}
)
TOOL = st.builds(lambda name: {"type": "function", "function": {"name": name or "f", "parameters": {}}}, TEXT)
SHAPE = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=4)},
    optional={
        "max_tokens": st.integers(1, 800),
        "max_completion_tokens": st.integers(1, 800),
        "n": st.integers(1, 4),
        "stream": st.booleans(),
        "tools": st.lists(TOOL, max_size=2),
        "tool_choice": st.sampled_from(["auto", "none", "required"]),
        "response_format": st.sampled_from([{"type": "text"}, SCHEMA]),
        "temperature": st.floats(0, 1),
        "extra_body": st.fixed_dictionaries({}, optional={"max_tokens": st.integers(1, 900), "n": st.integers(1, 3)}),
    },
)


@pytest.fixture(scope="module")
def bill():
    with LoopbackProvider() as provider, openai.OpenAI(api_key="test", base_url=provider.openai_url, max_retries=0) as plain:
        yield provider, plain


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(SHAPE, min_size=1, max_size=4), ceiling=st.integers(10, 6000))
def test_no_shape_of_request_passes_the_ceiling(bill, shapes, ceiling):
    provider, plain = bill
    provider.reset()
    client = clevagent.guard(plain)
    with clevagent.run(budgets=[Budget(tokens=ceiling)]) as run:
        for shape in shapes:
            try:
                answer = client.chat.completions.create(model="gpt-4o", **shape)
            except BudgetExceeded:
                continue
            if shape.get("stream"):
                chunks = list(answer)
                assert all(chunk.choices for chunk in chunks)
        summary = run.summary()
    assert provider.billed_tokens <= ceiling
    assert summary.total.input_tokens + summary.total.output_tokens == provider.billed_tokens
    assert summary.calls_charged_at_bound == 0
