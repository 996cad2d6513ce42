"""``functools.cache`` for functions of classes: its type asks for arguments that are hashable, and takes no class for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])


def cache(function: F) -> F:
    """Keep every answer."""
    return cast("F", functools.cache(function))
