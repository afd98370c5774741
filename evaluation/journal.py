"""An append-only file of JSON lines that survives a kill; its first line says what the others hold for.

Several processes write a file each, beside the one that all of them end with.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

from jaxtyping import Int64
from torch import Tensor

from rprune.errors import InputError, UsageError
from rprune.files import canonical_json, digest_of, unwritable
from rprune.training.world import world

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
    def open(
        cls: type[Kind], path: Path, key: Mapping[str, Any], *, resume: bool = True, merge: Sequence[Path] = ()
    ) -> Kind:
        """The journal of a file, which the first line creates; a line that was cut off is dropped.

        What processes of an earlier run left beside it is taken in, as is what :meth:`merge` makes of other files.
        Without ``resume`` what is there is deleted. Of several processes (:func:`world`) the first one has the file,
        and each of the others one of its own beside it; all know the rows. Raises UsageError for a file with another
        key, InputError for one that is none.
        """
        journal, here = cls(key, path), world()
        if here.first:
            if path.exists():
                if resume and (whole := journal._load(path)):
                    with path.open("r+b") as file:
                        file.truncate(whole)
                else:
                    journal._bytes(path)  # nothing else is deleted
                    path.unlink()
            for part in sorted(path.parent.glob(f"{glob.escape(path.name)}.*of*")):
                if resume:
                    journal._absorb(part)
                part.unlink()
            for other in merge:
                journal.merge(other)
        if here.size > 1:
            known = here.shared(journal._text())
            if not here.first:
                journal._take_text(known)
                journal.path = path.with_name(f"{path.name}.{here.rank + 1}of{here.size}")
        return journal

    def spread(self: Kind, ids: Int64[Tensor, " n"], work: Callable[[Kind, Int64[Tensor, " m"]], None]) -> None:
        """``work`` on samples, into this journal. Of several processes (:func:`world`) each takes its share of them.

        In the end all know the rows of all, and the first one's file holds them.
        """
        here = world()
        if here.size == 1:
            work(self, ids)
            return
        home = self.path
        with TemporaryDirectory() as folder:
            self.path = home or Path(folder) / "rows"
            work(self, ids[here.rank :: here.size])
            texts = here.gathered(self._text())
        self.path = home if here.first else None
        for text in texts:
            other = type(self)(self.key)
            other._take_text(text)
            self._take_over(other)
        self.path = home
        if home is not None and not here.first:
            home.unlink(missing_ok=True)

    def merge(self, path: Path) -> None:
        """Take over the rows of another file with the same key: a shard, or an earlier run.

        Raises UsageError, InputError as :meth:`open`.
        """
        self._absorb(path)

    @abstractmethod
    def _take_line(self, line: dict[str, Any]) -> None:
        """Take over one line of a file."""

    @abstractmethod
    def _take_over(self: Kind, other: Kind) -> None:
        """Add the rows that are not there yet."""

    def _absorb(self: Kind, path: Path) -> None:
        other = type(self)(self.key)
        other._load(path)
        self._take_over(other)

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path is not None and self.path.exists() else ""

    def _take_text(self, text: str, path: Path | None = None) -> None:
        """Whole lines of a file; ``path``: of one that has to have this key."""
        head, *lines = map(json.loads, text.splitlines() or ["{}"])
        if path is not None:
            self._need_key(path, head["key"])
        for line in lines:
            self._take_line(line)

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        lines = [line]
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"format": self.FORMAT, "key": None if self.key is None else dict(self.key)}, line]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(canonical_json(each) + "\n" for each in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

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
            self._take_text(data[:whole].decode(), path)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, zlib.error) as error:
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
