"""Plugins of one watchdog: loaded one by one, checked, ordered, and the hot ones bound into plain calls.

pluggy registers, validates, orders and blocks. A call through it costs over a microsecond, so the hooks that fire for every
call of the agent are bound once: after each change of the set of plugins, ``Plugins`` holds tuples of bound methods.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pluggy

from clevagent_core import hookspecs
from clevagent_core.errors import PluginError, UsageError
from clevagent_core.interrupts import is_interrupt
from clevagent_core.pricing import Rates

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.calls import Call, LLMCall, Step
    from clevagent_core.clock import Clock
    from clevagent_core.ledger.account import Ledger
    from clevagent_core.runs import Run
    from clevagent_core.summaries import RunSummary
    from clevagent_core.tickets import Outcome, Reservation, Ticket
    from clevagent_core.verdicts import Incident, Verdict
    from clevagent_core.watchdog import Watchdog
    from clevagent_wire.beats import Beat

logger = logging.getLogger("clevagent")

ENTRY_POINT_GROUP = "clevagent"

BUILTINS = (
    "clevagent_heartbeat.remote",
    "clevagent_core.guards.loop",
    "clevagent_core.guards.budget",
    "clevagent_heartbeat.stall",
    "clevagent_core.guards.spike",
    "clevagent_heartbeat.pulse",
    "clevagent_core.bounds",
    "clevagent_core.price_list",
    "clevagent_core.ledger.memory",
    "clevagent_core.ledger.files",
    "clevagent_core.carrying",
)
"""The built-in plugins by dotted name, in the order in which they are registered. Each module has ``plugin()``, which makes one.
All are ordinary plugins: they use the public hooks only, and any of them can be blocked. Adapters are found like everybody's
plugins, by the entry points of this distribution."""


_WRAPPABLE = frozenset({"clevagent_guard", "clevagent_attach", "clevagent_ledger"})
"""The hooks that are called through pluggy itself, so that a wrapper around them is run."""


@dataclass(frozen=True, slots=True)
class PluginState:
    """What became of one plugin."""

    name: str
    """Its dotted module name, or the entry point's name."""
    source: str
    """``built-in``, ``init`` (given by the user), or the distribution that brought it."""
    status: str
    """``loaded``, ``not installed``, ``blocked`` or ``broken``. A plugin that is ``not installed`` is loaded, and waits: what it
    attaches to (``clevagent_attachable``) is not installed."""
    detail: str = ""
    """Its hooks when it is loaded; what is missing, and which extra adds it; what is wrong with it when it is broken."""


@dataclass(frozen=True, slots=True)
class BoundHooks:
    """The hot hooks of one set of plugins, as plain calls."""

    before_call: tuple[tuple[Callable[[Run, Call], Verdict], object], ...] = ()
    """Checks, each with its plugin."""
    reserve: tuple[tuple[Callable[[Run, Ticket, Sequence[Budget]], Reservation | Verdict], object], ...] = ()
    """Reservations, each with its plugin."""
    call_settled: tuple[Callable[[Run, Call, Outcome], None], ...] = ()
    call_failed: tuple[Callable[[Run, Call, Outcome], None], ...] = ()
    step: tuple[Callable[[Run, Step], None], ...] = ()

    def __add__(self, other: BoundHooks) -> BoundHooks:
        """Give the hooks of both, these first."""
        return BoundHooks(
            self.before_call + other.before_call,
            self.reserve + other.reserve,
            self.call_settled + other.call_settled,
            self.call_failed + other.call_failed,
            self.step + other.step,
        )


def entry_points(*, group: str) -> Iterable[EntryPoint]:
    """Find what installed distributions offer; scanning them takes tens of milliseconds, so it is done at ``init``."""
    from importlib.metadata import entry_points as find  # noqa: PLC0415 - takes 10 ms to import

    return find(group=group)


class Plugins:
    """The plugins of one watchdog, and one typed method per hook. Registering is not meant for several threads at once."""

    def __init__(self, *, block: Iterable[str] = ()) -> None:
        """Start with no plugins; those named in ``block`` are never registered."""
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._blocked = tuple(dict.fromkeys(block))
        self._states: dict[str, PluginState] = {}
        self._distributions: dict[str, Distribution] = {}
        for name in self._blocked:
            self._manager.set_blocked(name)
        self._bind()

    def load(self, extra: Sequence[object] = ()) -> None:
        """Register the built-ins, then entry points, then ``extra`` (named by the user, so that a broken one is fatal).

        Raises:
            PluginError: one of ``extra`` is broken.
            UsageError: ``block`` names a plugin that does not exist.

        """
        for name in BUILTINS:
            if name in self._blocked:
                self._states[name] = PluginState(name, "built-in", "blocked")
            else:
                self.register(import_module(name).plugin(), name=name, source="built-in")
        for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
            self._load_entry_point(point)
        for plugin in extra:
            self.register(plugin)
        unknown = [name for name in self._blocked if name not in self._states]
        if unknown:
            raise UsageError(
                f"block={unknown!r} names no plugin that is installed, so nothing was blocked by it. "
                f"`clevagent plugins` lists what there is: {', '.join(self._states)}."
            )

    def register(self, plugin: object, *, name: str | None = None, source: str = "init") -> None:
        """Register one plugin.

        Raises:
            PluginError: it has no hooks, a misspelt one, or a hot one that is a wrapper or takes other arguments.

        """
        if isinstance(plugin, type):
            raise PluginError(
                f"{plugin.__name__} is a class, so its hooks would be called without an instance. Register {plugin.__name__}() instead."
            )
        if self._manager.is_registered(plugin):
            raise PluginError(
                f"The plugin {self._manager.get_name(plugin)!r} is registered already, so its hooks would be called twice. Give it once; "
                "for two of a kind, make two instances."
            )
        known = name or self._name(plugin)
        if self._manager.is_blocked(known):
            self._states[known] = PluginState(known, source, "blocked")
            return
        try:
            self._manager.register(plugin, known)
            self._manager.check_pending()
            self._check(plugin)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise PluginError(
                f"The plugin {known!r} cannot be used: {error}. Its hooks must be named and written as in "
                "clevagent_core.hookspecs; it was not registered."
            ) from error
        hooks = sorted(hook.name for hook in self._manager.get_hookcallers(plugin) or ())
        self._states[known] = PluginState(known, source, "loaded", ", ".join(hooks))
        self._bind()

    def _name(self, plugin: object) -> str:
        """Find a name that people can read and block: a module's own, or that of an instance's class."""
        base = getattr(plugin, "__name__", None) or f"{type(plugin).__module__}.{type(plugin).__qualname__}"
        name, number = base, 1
        while self._manager.has_plugin(name):
            number += 1
            name = f"{base}#{number}"
        return str(name)

    def unregister(self, plugin: object) -> None:
        """Take a plugin out again."""
        name = self._manager.get_name(plugin)
        self._manager.unregister(plugin)
        if name is not None:
            self._states.pop(name, None)
        self._bind()

    def states(self) -> tuple[PluginState, ...]:
        """Return what became of every plugin: loaded, not installed, blocked or broken. Imports no framework."""
        waiting = {name: missing for name, missing in self._missing_frameworks() if name in self._states}
        states = {name: replace(self._states[name], status="not installed", detail=detail) for name, detail in waiting.items()}
        return tuple((self._states | states).values())

    bound_hooks: BoundHooks
    """The hot hooks, bound anew whenever the set of plugins changes."""

    # -- everything else: through pluggy ----------------------------------------------------------------------------------

    def configure(self, watchdog: Watchdog) -> None:
        """Tell plugins that the watchdog is ready."""
        for implementation in self._implementations("clevagent_configure"):
            try:
                _call(implementation, watchdog=watchdog)
            except (UsageError, PluginError):
                raise
            except Exception as error:
                if is_interrupt(error):
                    raise
                raise PluginError(
                    f"The plugin {implementation.plugin_name!r} failed while it was configured: {error!r}. "
                    f"It cannot do its work; mend it, or leave it out with block=[{implementation.plugin_name!r}]."
                ) from error

    def unconfigure(self, watchdog: Watchdog) -> None:
        """Tell plugins that the watchdog shuts down."""
        self._observe("clevagent_unconfigure", watchdog=watchdog)

    def run_started(self, run: Run) -> None:
        """Tell observers that a run began."""
        self._observe("clevagent_run_started", run=run)

    def beat(self, beat: Beat) -> None:
        """Tell observers of a heartbeat."""
        self._observe("clevagent_beat", beat=beat)

    def incident(self, incident: Incident) -> None:
        """Tell observers that something is wrong. May block: not for the caller's thread."""
        self._observe("clevagent_incident", incident=incident)

    def run_ended(self, run: Run, summary: RunSummary) -> None:
        """Tell observers that a run is over."""
        self._observe("clevagent_run_ended", run=run, summary=summary)

    def guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None = None
    ) -> object | None:
        """Ask who can guard ``obj``."""
        found: object | None = self._manager.hook.clevagent_guard(obj=obj, watchdog=watchdog, budgets=budgets, on_exceed=on_exceed)
        return found

    def attach(self, name: str, watchdog: Watchdog) -> bool:
        """Ask who can attach to the framework ``name``."""
        return bool(self._manager.hook.clevagent_attach(name=name, watchdog=watchdog))

    def attachable(self) -> dict[str, str]:
        """Ask what can be attached to: names, each with the module whose import tells that it is in use."""
        found: dict[str, str] = {}
        for _, modules in self._attachable():
            found = {**modules, **found}
        return found

    def _attachable(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Ask each plugin what it can attach to, with the plugin's name."""
        for implementation in self._implementations("clevagent_attachable"):
            try:
                yield implementation.plugin_name, {str(name): str(module) for name, module in _call(implementation).items()}
            except Exception as error:  # whose code: a plugin's; it is passed over, and the others are asked
                if is_interrupt(error):
                    raise
                logger.exception(
                    "The plugin %r could not tell what it attaches to; it was passed over.", implementation.plugin_name
                )

    def _missing_frameworks(self) -> Iterator[tuple[str, str]]:
        """Find the plugins none of whose frameworks is installed, each with what is missing."""
        for plugin, modules in self._attachable():
            if modules and not any(map(_is_installed, modules.values())):
                extras = _extras(self._distributions.get(plugin))
                source = self._states[plugin].source
                needs = (
                    f"needs {module.partition('.')[0]}" + (f", which the extra {source}[{name}] adds" if name in extras else "")
                    for name, module in modules.items()
                )
                yield plugin, "; or ".join(needs)

    def price(self, model: str, provider: str | None, service_tier: str | None) -> Rates | None:
        """Ask for a model's rates; a provider that fails counts as one that does not know."""
        found = self._first("clevagent_price", model=model, provider=provider, service_tier=service_tier)
        if found is None or isinstance(found, Rates):
            return found
        logger.error("A provider of prices answered %r for %r, which is no Rates; it was passed over.", found, model)
        return None

    def bound(self, call: LLMCall) -> int | None:
        """Ask for the bound of a call's input; a provider that fails counts as one that cannot tell."""
        for provider in self._bounds:
            try:
                bound: int | None = provider(call)
            except Exception as error:  # whose code: a plugin's; the context window then stands for the bound
                if is_interrupt(error):
                    raise
                logger.exception("A provider of bounds failed; the call counts as the model's whole context window.")
                continue
            if bound is None:
                continue
            if type(bound) is int and bound >= 0:
                return bound
            logger.error("A provider of bounds answered %r, which is no number of tokens; it was passed over.", bound)
        return None

    def ledger(self, url: str, clock: Clock, agent: str) -> Ledger | None:
        """Ask who can open the ledger ``url``."""
        found: Ledger | None = self._manager.hook.clevagent_ledger(url=url, clock=clock, agent=agent)
        return found

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _load_entry_point(self, point: EntryPoint) -> None:
        source = point.dist.name if point.dist is not None else "entry point"
        if point.dist is not None:
            self._distributions[point.name] = point.dist
        if point.name in self._blocked:
            self._states[point.name] = PluginState(point.name, source, "blocked")
            return
        try:
            plugin = point.load()
            self.register(plugin() if isinstance(plugin, type) else plugin, name=point.name, source=source)
        except Exception as error:  # whose code: anybody's package, imported because it is installed
            if is_interrupt(error):
                raise
            logger.warning("The plugin %r of %s is broken and was left out: %r", point.name, source, error)
            self._states[point.name] = PluginState(point.name, source, "broken", f"{type(error).__name__}: {error}")

    def _check(self, plugin: object) -> None:
        callers = self._manager.get_hookcallers(plugin) or []
        if not callers:
            raise ValueError("it has no method marked with @hookimpl")
        for caller in callers:
            is_hot = caller.name in hookspecs.HOT_HOOKS
            wanted = list(inspect.signature(getattr(hookspecs, caller.name)).parameters)
            for implementation in caller.get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                if inspect.iscoroutinefunction(implementation.function):
                    raise ValueError(f"{caller.name} is called without await, so it cannot be an async function")
                if (implementation.wrapper or implementation.hookwrapper) and caller.name not in _WRAPPABLE:
                    raise ValueError(
                        f"{caller.name} is {'a hot hook and is ' if is_hot else ''}called one plugin at a time, without wrappers"
                    )
                if is_hot and list(implementation.argnames) != wanted:
                    raise ValueError(f"{caller.name} is a hot hook and must take ({', '.join(wanted)}), in this order")

    def _bind(self) -> None:
        # pluggy tells nobody when plugins change, so register and unregister go through this class.
        self.bound_hooks = BoundHooks(
            self._bound_with_plugin("clevagent_before_call"),
            self._bound_with_plugin("clevagent_reserve"),
            self._bound("clevagent_call_settled"),
            self._bound("clevagent_call_failed"),
            self._bound("clevagent_step"),
        )
        self._bounds = self._bound("clevagent_bound")

    def _implementations(self, hook: str) -> list[pluggy.HookImpl]:
        # pluggy keeps them in reverse order of calling.
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return list(reversed(caller.get_hookimpls()))

    def _bound(self, hook: str) -> tuple[Callable[..., Any], ...]:
        return tuple(implementation.function for implementation in self._implementations(hook))

    def _bound_with_plugin(self, hook: str) -> tuple[tuple[Callable[..., Any], object], ...]:
        return tuple((implementation.function, implementation.plugin) for implementation in self._implementations(hook))

    def _observe(self, hook: str, **arguments: object) -> None:
        for implementation in self._implementations(hook):
            try:
                _call(implementation, **arguments)
            except Exception as error:  # whose code: a plugin's; observers fail open, and one never silences the next
                if is_interrupt(error):
                    raise
                logger.exception("The plugin %r failed in %s and was passed over.", implementation.plugin_name, hook)

    def _first(self, hook: str, **arguments: object) -> Any:
        for implementation in self._implementations(hook):
            try:
                answer = _call(implementation, **arguments)
            except Exception as error:  # whose code: a plugin's; a provider that fails counts as one that does not know
                if is_interrupt(error):
                    raise
                logger.exception("The plugin %r failed in %s and was passed over.", implementation.plugin_name, hook)
                continue
            if answer is not None:
                return answer
        return None


def _call(implementation: pluggy.HookImpl, **arguments: object) -> Any:
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def _is_installed(module: str) -> bool:
    """Check whether a module can be found. Neither it nor a package around it is imported."""
    if sys.modules.get(module) is not None:
        return True
    name, *parts = module.split(".")
    try:
        spec = find_spec(name)
    except ValueError:  # a module that was made by hand has no spec
        return not parts
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec is not None


def _extras(distribution: Distribution | None) -> Sequence[str]:
    return (distribution.metadata.get_all("Provides-Extra") or ()) if distribution is not None else ()
