"""The flags of the evaluation tasks, one for each in the table: `--hellaswag FILE`."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jaxgpt.config.flag_types import unless_none
from jaxgpt.config.roles import Role
from jaxgpt.data.tasks import FROM_DATASETS, TASKS, Task

if TYPE_CHECKING:  # the fields come from TASKS at run time; `vars()` reads them

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TaskSources:
        """Where the questions of each task come from, by the task's name."""

else:

    def _flag_type(task: Task) -> object:
        text = f"{task.file}, or '{FROM_DATASETS}' to download it"
        flag = arg(help=text, metavar="FILE", help_behavior_hint=unless_none)
        return Annotated[str | None, Role.TUNABLE, Role.LOCAL, flag]

    TaskSources = dataclasses.make_dataclass(
        "TaskSources",
        [(name, _flag_type(task), dataclasses.field(default=None)) for name, task in TASKS.items()],
        frozen=True,
        kw_only=True,
        namespace={"__doc__": "Evaluation tasks; `train` scores them at each evaluation."},
    )
