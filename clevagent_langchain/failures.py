"""Whose fault an error is, and when it came."""

from __future__ import annotations

_STARTS = frozenset({"on_chat_model_start", "on_llm_start"})


def comes_from_a_callback(error: BaseException) -> bool:
    """Tell whether somebody's handler raised it, whatever it looks like: the request itself may have been answered."""
    return bool(_callbacks_in(error))


def comes_before_sending(error: BaseException) -> bool:
    """Tell whether it came while handlers were told of the start of calls, none of which was sent then."""
    return not _STARTS.isdisjoint(_callbacks_in(error))


def _callbacks_in(error: BaseException) -> set[str]:
    """Name the functions of LangChain's callback managers that it went through."""
    found = set()
    traceback = error.__traceback__
    while traceback is not None:
        python = traceback.tb_frame
        if python.f_globals.get("__name__") == "langchain_core.callbacks.manager":
            found.add(python.f_code.co_name)
        traceback = traceback.tb_next
    return found
