"""Tasks: the prompt and target of an item, and how answers are scored.

Built-in and custom tasks use the same YAML; ``load_task`` takes a name or a file.
"""

from mta.data.tasks.load import load_task, task_names
from mta.data.tasks.prompt import Example, PromptFormat
from mta.data.tasks.task import Form, Task

__all__ = ["Example", "Form", "PromptFormat", "Task", "load_task", "task_names"]
