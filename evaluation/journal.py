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

        Raises UsageError for a file with another key, InputError for one that is none.
        """
        journal = cls(key, path)
        if path.exists() and resume:
            whole = journal._load(path)
            with path.open("r+b") as file:
                file.truncate(whole)
        else:
            path.unlink(missing_ok=True)
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
        hint = f"name one that '{self.COMMAND}' wrote"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}", hint) from None
        whole = data.rfind(b"\n") + 1
        try:
            head, *lines = map(json.loads, data[:whole].decode().splitlines())
            if head["format"] != self.FORMAT:
                raise ValueError(f"format {head['format']}")
            self._need_key(path, head["key"])
            for line in lines:
                self._take_line(line)
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise InputError(f"{path} is not a {self.WHAT}: {error}", hint) from None
        return whole
