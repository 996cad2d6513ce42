"""A loop of one's own around a raw client: no framework, one line for the guard.

    pip install ".[openai]"
    python examples/raw_client.py

A guarded client asks before each attempt, retries inside the SDK included, and sends an output limit that fits what is left. Here the
model never says that it is done; the ceiling does.
"""

from offline import MODEL, model_access
from openai import OpenAI

import clevagent
from clevagent.testing import Reply


def script(body):
    """Never be done."""
    return Reply(text=f"Idea {len(body['messages']) // 2}: not good enough yet.", output_tokens=60)


with model_access(script) as access:
    clevagent.init(agent="brainstorm")
    client = clevagent.guard(OpenAI(**access.client))
    messages = [{"role": "user", "content": "Find a name for a watchdog. Say DONE when you are content."}]
    with clevagent.run(budgets=[clevagent.Budget(usd=0.001)]) as run:
        try:
            while True:
                answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content
                if "DONE" in answer:
                    break
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Another one."}]
        except clevagent.BudgetExceeded as refusal:
            print("Stopped:", refusal)
    print(f"{len(messages) // 2} ideas.")
    print(run)
    print(access.bill())
    clevagent.shutdown()
