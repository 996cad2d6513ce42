"""The models that litellm would ask in one call when the first one fails: asked here, each by a call of its own, with its own price.

``fallbacks`` is a list of names, or of mappings of what differs; ``context_window_fallback_dict`` names, for a model, the one to ask
where the prompt is too long for it. Both are kept from litellm. Checked with litellm 1.83 and later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from crewai.llms.base_llm import BaseLLM

from clevagent_core.errors import Stopped, UsageError
from clevagent_crewai.dialects import FALLBACKS, dialect_of

_WINDOW = "context_window_fallback_dict"


def fallbacks_of(model: BaseLLM, error: Exception) -> Iterator[BaseLLM]:
    """Give the models to ask after a call of ``model`` has ended in ``error``; none after a refusal."""
    if isinstance(error, Stopped) or dialect_of(model).quiet is None:
        return
    params = model.additional_params
    names: list[Any] = []
    larger = (params.get(_WINDOW) or {}).get(model.model)
    if larger is not None and any(base.__name__ == "ContextWindowExceededError" for base in type(error).__mro__):
        names.append(larger)
    names += params.get("fallbacks") or []
    for name in names:
        yield _other(model, dict(name) if isinstance(name, Mapping) else {"model": name})


def check_litellm() -> None:
    """Refuse what litellm would do by itself in every call of the process, whatever the call says.

    Raises:
        UsageError: it would ask other models.

    """
    fallbacks = getattr(sys.modules.get("litellm"), "model_fallbacks", None)
    if fallbacks:
        raise UsageError(
            f"litellm.model_fallbacks is {fallbacks!r}: litellm would ask these models in calls that no budget sees, so the call was "
            "refused. Leave it out, and give them to the model, where ClevAgent asks them: LLM(fallbacks=[...])."
        )


def _other(model: BaseLLM, differs: dict[str, Any]) -> BaseLLM:
    """Make a model that shares all with ``model`` but what differs, and falls back no further."""
    fields = {name: differs.pop(name) for name in list(differs) if name in type(model).model_fields}
    params = {name: value for name, value in model.additional_params.items() if name not in FALLBACKS}
    other: BaseLLM = object.__new__(type(model))
    object.__setattr__(other, "__dict__", {**model.__dict__, **fields, "additional_params": {**params, **differs}})
    for name in ("__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
        object.__setattr__(other, name, getattr(model, name))
    return other
