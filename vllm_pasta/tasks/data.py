"""Chooses examples: from a public file or a task's generator, in splits that never overlap."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_pasta.errors import PastaError
from vllm_pasta.tasks.base import Example, Task

Split = Literal["train", "held-out", "test"]

SHARES: dict[Split, int] = {"train": 5, "held-out": 2, "test": 3}
"""Tenths of the examples in each split. Heads are ranked on "train", their number is chosen on
"held-out", and figures are reported on "test"."""


@dataclass(frozen=True)
class Sample:
    """Examples of one split, and where they come from.

    Attributes:
        examples: The examples, in an order that depends on the seed alone.
        source: The file's name, or "built-in generator".
        digest: The first 16 hexadecimal digits of the examples' SHA-256.
    """

    examples: list[Example]
    source: str
    digest: str


def split_of(key: str) -> Split:
    """The split of the example with that key, which depends on nothing else."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    for split, share in SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("shares add up to ten")


def sample(
    task: Task, split: Split, count: int, seed: int = 0, folder: Path | None = None
) -> Sample:
    """Takes ``count`` examples of a split.

    Args:
        task: The task.
        split: "train", "held-out" or "test".
        count: The number of examples.
        seed: Decides which examples are taken; it does not move examples between splits.
        folder: Folder with public files. If it has none of the task's files, or is None, the
            task's generator gives the examples.

    Raises:
        PastaError: the file is in another format, or the split has fewer examples.
    """
    assert split in get_args(Split)
    path = find_file(task, folder)
    every = task.make() if path is None else _read(task, path)
    mine = {example.key: example for example in every if split_of(example.key) == split}
    if len(mine) < count:
        raise PastaError(
            f"{task.name}: expected {count} examples of the {split} split, but "
            f"{path or 'the built-in generator'} has {len(mine)}"
        )
    order = sorted(mine, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    examples = [mine[key] for key in order[:count]]
    text = json.dumps([[e.key, e.fields] for e in examples], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Sample(examples, path.name if path else "built-in generator", digest)


def find_file(task: Task, folder: Path | None) -> Path | None:
    """The task's public file in ``folder``, or None."""
    paths = [folder / name for name in task.files] if folder else []
    return next((path for path in paths if path.is_file()), None)


def _read(task: Task, path: Path) -> Iterator[Example]:
    try:
        yield from task.read(path)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise PastaError(f"{path}: not in the format of {task.name}: {e!r:.200}") from e


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON file that holds a list, or of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        if path.suffix == ".json":
            yield from json.load(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())
