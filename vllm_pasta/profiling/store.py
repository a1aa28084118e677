"""Keeps answers as JSON Lines as they come, so that an interrupted run can continue."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Method
from vllm_pasta.tasks import Answer, Example, Probe


@dataclass(frozen=True)
class Trial:
    """One probe of one example, asked by one method."""

    task: str
    example: Example
    probe: Probe
    method: Method

    @property
    def key(self) -> str:
        """Identifies all that the answer depends on but the model, which the `Store` names."""
        probe = self.probe
        asked = [probe.text, probe.emphasis, list(probe.choices)]
        length = "" if probe.choices else f"/{probe.max_tokens}"
        if probe.likelihood:
            asked += [text for text in (probe.target, probe.foil) if text]
            length = "/likelihood"
        digest = sha256(json.dumps(asked).encode()).hexdigest()[:12]
        return f"{self.task}|{digest}|{probe.name}{length}|{self.method.key}"


class Store:
    """A file of answers.

    The first line holds what all answers depend on (the model, versions). Every other line is an
    answer with its trial's key and some context for readers, or the time that the answers before
    it took, or a note: another value that was costly to compute.

    Attributes:
        notes: Notes by name; `note` adds one.
        seconds: The time that all answers took, those of earlier runs included, without engine
            starts.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], others: Iterable[Path] = ()) -> None:
        """Opens a file, or begins it with the first answer.

        Args:
            path: The file.
            run: Everything that all answers depend on, as JSON values.
            others: Files of the same run's other shards, which are read too.

        Raises:
            PastaError: a file is damaged, or it belongs to a run with another model or version.
        """
        self._path = path
        self._run = dict(run)
        self._answers: dict[str, Answer] = {}
        self.notes: dict[str, Any] = {}
        self.seconds = 0.0
        for file in [path, *others]:
            if file.exists() and file.stat().st_size:
                self._load(file)

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self._answers

    def __getitem__(self, trial: Trial) -> Answer:
        return self._answers[trial.key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answered: Iterable[tuple[Trial, Answer]], seconds: float = 0.0) -> None:
        """Appends answers and the time they took, in seconds; an interruption cannot undo it."""
        self.seconds += seconds
        with self._appending() as file:
            for trial, answer in answered:
                self._answers[trial.key] = answer
                value = {"logprobs": [round(x, 5) for x in answer.logprobs]}
                file.write(
                    json.dumps(
                        {
                            "key": trial.key,
                            "example": trial.example.key,
                            "method": trial.method.name,
                            **(value if answer.logprobs else {"text": answer.text}),
                        },
                        ensure_ascii=False,
                    )
                    + "\n"
                )
            file.write(json.dumps({"seconds": round(seconds, 3)}) + "\n")

    def note(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name."""
        self.notes[name] = value
        with self._appending() as file:
            file.write(json.dumps({"note": name, "value": value}) + "\n")

    def _appending(self) -> TextIO:
        new = not self._path.exists() or not self._path.stat().st_size
        file = self._path.open("a", encoding="utf-8")
        if new:
            file.write(json.dumps({"run": self._run}) + "\n")
        return file

    def _load(self, path: Path) -> None:
        data = path.read_bytes()
        if not data.endswith(b"\n"):  # interrupted in the middle of a line
            data = data[: data.rfind(b"\n") + 1]
            path.write_bytes(data)
        lines = data.decode().splitlines()
        try:
            run = json.loads(lines[0])["run"] if lines else self._run
            rest = [json.loads(line) for line in lines[1:]]
            seconds = sum(line["seconds"] for line in rest if "seconds" in line)
            answers = {
                line["key"]: Answer(line.get("text", ""), tuple(line.get("logprobs", ())))
                for line in rest
                if "key" in line
            }
            notes = {line["note"]: line["value"] for line in rest if "note" in line}
        except (KeyError, TypeError, ValueError) as e:
            raise PastaError(f"{path}: expected answers of an earlier run; {e!r:.120}") from e
        for field in self._run.keys() | run.keys():
            if run.get(field) != self._run.get(field):
                raise PastaError(
                    f"{path} was made with another {field} ({run.get(field)!r}, now "
                    f"{self._run.get(field)!r}): remove it, or name another file"
                )
        self._answers |= answers
        self.notes |= notes
        self.seconds += seconds
