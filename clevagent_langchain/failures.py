"""Whose fault an error is."""

from __future__ import annotations


def comes_from_a_callback(error: BaseException) -> bool:
    """Tell whether somebody's handler raised it, whatever it looks like: the request itself may have been answered."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == "langchain_core.callbacks.manager":
            return True
        traceback = traceback.tb_next
    return False
