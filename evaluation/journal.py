"""An append-only file of JSON lines that survives a kill; its first line says what the others hold for."""

from __future__ import annotations

import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rprune.errors import InputError, UsageError
from rprune.files import canonical_json, digest_of

Kind = TypeVar("Kind", bound="Journal")


@dataclass(eq=False)
class Journal(ABC):
    """Lines with their key. Without ``path`` they stay in memory."""

    FORMAT: ClassVar[str]
    WHAT: ClassVar[str]  # what the file is called
    WORK: ClassVar[str]  # what the lines are about
    COMMAND: ClassVar[str]  # what writes it

    key: Mapping[str, Any] | None = None
    path: Path | None = None

    @classmethod
    def open(cls: type[Kind], path: Path, key: Mapping[str, Any], *, resume: bool = True) -> Kind:
        """The journal of a file, which the first line creates; a line that was cut off is dropped.

        Without ``resume`` a file that is there is deleted. Raises UsageError for a file with another key, InputError
        for one that is none.
        """
        journal = cls(key, path)
        if path.exists():
            if resume and (whole := journal._load(path)):
                with path.open("r+b") as file:
                    file.truncate(whole)
            else:
                journal._bytes(path)  # nothing else is deleted
                path.unlink()
        return journal

    @abstractmethod
    def _take_line(self, line: dict[str, Any]) -> None:
        """Take over one line of a file."""

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        lines = [line]
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"format": self.FORMAT, "key": None if self.key is None else dict(self.key)}, line]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(canonical_json(each) + "\n" for each in lines))
            file.flush()
            os.fsync(file.fileno())

    def _need_key(self, path: Path, theirs: Mapping[str, Any]) -> None:
        if self.key is not None and digest_of(dict(theirs)) != digest_of(dict(self.key)):
            changed = [name for name in {**theirs, **self.key} if theirs.get(name) != self.key.get(name)]
            raise UsageError(
                f"{path} holds another {self.WORK}: {', '.join(sorted(changed))} differ",
                "choose another -o, or start anew with --no-resume",
            )

    def _load(self, path: Path) -> int:
        """Read a file; returns how many of its bytes are whole lines."""
        data = self._bytes(path)
        whole = data.rfind(b"\n") + 1
        if not whole:  # cut within its first line
            return 0
        try:
            head, *lines = map(json.loads, data[:whole].decode().splitlines())
            self._need_key(path, head["key"])
            for line in lines:
                self._take_line(line)
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise self._unusable(f"{path} is not a {self.WHAT}: {error}") from None
        return whole

    def _bytes(self, path: Path) -> bytes:
        """What is in a file of this format, or of which only the beginning of one was written."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._unusable(f"cannot read {path}: {error.strerror}") from None
        start = canonical_json({"format": self.FORMAT}).encode()[:-1]
        if data[: len(start)] != start[: len(data)]:
            raise self._unusable(f"{path} is not a {self.WHAT} of format {self.FORMAT}")
        return data

    def _unusable(self, message: str) -> InputError:
        return InputError(message, f"name one that '{self.COMMAND}' wrote")
