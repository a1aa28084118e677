"""Keeps answers as JSON Lines as they come, so that an interrupted run can continue."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

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
    """A file of answers, which one run at a time may write.

    The first line holds what all answers depend on (the model, versions). Every other line is an
    answer with its trial's key and some context for readers, or the time that the answers before
    it took, or a note: another value that was costly to compute.

    Attributes:
        notes: Notes by name; `note` adds one.
        seconds: The time that all answers took, those of earlier runs included, without engine
            starts.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], others: Iterable[Path] = ()) -> None:
        """Opens a file, and keeps other processes out of it until this store is closed.

        Half a line at the end, which a run that was killed or a full disk left, is cut off.

        Args:
            path: The file; an empty one is made if there is none.
            run: Everything that all answers depend on, as JSON values.
            others: Files of the same run's other shards, which are read too.

        Raises:
            PastaError: a file is damaged, or it belongs to a run with another model or version, or
                another run is writing it, or it cannot be written.
        """
        self._path = path
        self._run = dict(run)
        self._answers: dict[str, Answer] = {}
        self.notes: dict[str, Any] = {}
        self.seconds = 0.0
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as e:
            raise PastaError(f"{path}: cannot be written: {e.strerror}") from e
        _alone(self._file, fcntl.LOCK_EX)
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self._file.truncate(len(whole))
        self._load(path, whole)
        for other in others:
            with other.open("rb") as file:
                _alone(file, fcntl.LOCK_SH)
                data = file.read()
            self._load(other, data[: data.rfind(b"\n") + 1])

    def close(self) -> None:
        """Lets other runs write the file; what is known stays readable."""
        self._file.close()

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self._answers

    def __getitem__(self, trial: Trial) -> Answer:
        return self._answers[trial.key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answered: Iterable[tuple[Trial, Answer]], seconds: float = 0.0) -> None:
        """Appends answers and the time they took, in seconds; an interruption cannot undo it.

        Raises:
            PastaError: the file cannot be written, as when the disk is full.
        """
        lines: list[dict[str, Any]] = []
        kept: dict[str, Answer] = {}
        for trial, answer in answered:
            # As it is read again, so that a run that was interrupted comes to the same result.
            answer = Answer(answer.text, tuple(round(x, 5) for x in answer.logprobs))
            kept[trial.key] = answer
            lines.append(
                {
                    "key": trial.key,
                    "example": trial.example.key,
                    "method": trial.method.name,
                    **({"logprobs": answer.logprobs} if answer.logprobs else {"text": answer.text}),
                }
            )
        self._append([*lines, {"seconds": round(seconds, 3)}])
        self._answers |= kept
        self.seconds += seconds

    def note(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name.

        Raises:
            PastaError: the file cannot be written, as when the disk is full.
        """
        self._append([{"note": name, "value": value}])
        self.notes[name] = value

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes lines, or none of them; they are on the disk then."""
        size = os.fstat(self._file.fileno()).st_size
        if not size:
            lines = [{"run": self._run}, *lines]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as e:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise PastaError(
                f"{self._path}: cannot be written: {e.strerror}. All answers before are kept: mend "
                "that, and the same command continues"
            ) from e

    def _load(self, path: Path, data: bytes) -> None:
        if not data:
            return
        try:
            lines = data.decode().split("\n")[:-1]  # splitlines would also cut at U+2028 in a text
            run = json.loads(lines[0])["run"]
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


def _alone(file: BinaryIO, lock: int) -> None:
    """Locks an open file until it is closed, or the process ends.

    Raises:
        PastaError: another run holds it.
    """
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise PastaError(
            f"{file.name}: another run is writing its answers there: wait for it, or name another "
            "file"
        ) from e
    except OSError:
        pass  # a file system without locks
