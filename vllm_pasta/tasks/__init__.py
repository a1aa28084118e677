"""Tasks on which emphasis is evaluated and heads are ranked: the paper's four, and three more."""

from importlib import import_module
from importlib.metadata import entry_points

from vllm_pasta.errors import PastaError
from vllm_pasta.tasks.base import Answer, Example, Probe, Task
from vllm_pasta.tasks.data import Sample, Split, sample

__all__ = ["Answer", "Example", "Probe", "Sample", "Split", "Task", "load", "names", "sample"]

GROUP = "vllm_pasta.tasks"
"""Entry-point group in which other packages name their subclasses of `Task`."""

BUILT_IN = {
    "counterfact": "counterfact:CounterFact",
    "json": "biographies:JsonFormatting",
    "pronouns": "biographies:PronounChanging",
    "biasbios": "biographies:BiasBios",
    "arithmetic": "arithmetic:Arithmetic",
    "kv": "kv_retrieval:KeyValueRetrieval",
    "ifeval": "ifeval:IfEval",
}


def names() -> list[str]:
    """The names of all tasks: the built-in ones first, then those of other packages."""
    return [*BUILT_IN, *sorted({entry.name for entry in entry_points(group=GROUP)} - set(BUILT_IN))]


def load(name: str) -> Task:
    """Loads the task of that name.

    Raises:
        PastaError: there is no such task; the message lists those that there are.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        kind = getattr(import_module(f"{__name__}.{module}"), attribute)
    else:
        found = list(entry_points(group=GROUP, name=name))
        if not found:
            raise PastaError(f"task {name!r}: unknown; known are {', '.join(names())}")
        kind = found[0].load()
    task = kind()
    if not isinstance(task, Task):
        raise PastaError(f"task {name!r}: expected a subclass of vllm_pasta.tasks.Task, got {kind}")
    return task
