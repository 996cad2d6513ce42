"""What a guarded crew gives back with ``on_exceed="halt"``."""

from __future__ import annotations

from typing import Any

from crewai.crews.crew_output import CrewOutput
from pydantic import Field, PrivateAttr

from clevagent_core.verdicts import Incident


class GuardedCrewOutput(CrewOutput):
    """A crew's output, whole or as far as it came. It is a ``CrewOutput``, and can be pickled.

    ``tasks_output`` holds the tasks that were finished, ``raw``, ``pydantic`` and ``json_dict`` are those of the last one (``raw`` is
    ``""`` where none was), ``token_usage`` counts what all models of the crew have used so far.
    """

    is_complete: bool = Field(default=True, description="Whether every task was finished")
    _incident: Incident | None = PrivateAttr(default=None)

    @property
    def incident(self) -> Incident | None:
        """Why it ended early, with the numbers that this rests on; ``None`` where it did not."""
        return self._incident


def output_of(
    crew: Any, result: object, before: dict[int, object], incident: Incident | None, *, is_complete: bool
) -> GuardedCrewOutput:
    """Put together what there is.

    Args:
        crew: the crew.
        result: what its kickoff gave back, if it did.
        before: the outputs that its tasks had before, by the tasks' ids: they are no part of this kickoff.
        incident: why it ended early.
        is_complete: whether nothing was refused.

    """
    if isinstance(result, CrewOutput):
        output = GuardedCrewOutput(**{name: getattr(result, name) for name in CrewOutput.model_fields}, is_complete=is_complete)
    else:
        finished = [task.output for task in crew.tasks if task.output is not None and task.output is not before.get(id(task))]
        last = finished[-1] if finished else None
        output = GuardedCrewOutput(
            raw=last.raw if last is not None else "",
            pydantic=last.pydantic if last is not None else None,
            json_dict=last.json_dict if last is not None else None,
            tasks_output=finished,
            token_usage=crew.calculate_usage_metrics(),
            is_complete=is_complete,
        )
    output._incident = incident  # noqa: SLF001 - of this module
    return output
