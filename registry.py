"""Names for methods, objectives and attacks: built in, from an entry point, or from the user's own file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

import pydantic

from rprune.errors import InputError, RpruneError, UsageError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Frozen dataclasses by name.

    A name is one given to :meth:`register` in ``package``, an entry point of the group ``rprune.<kind>s``, or
    ``pkg.module:Class`` / ``file.py:Class``. A specification is a name or a table with the key ``name`` and the
    class's own fields: what a recipe writes, what a report prints, and what :meth:`describe` returns.
    """

    def __init__(self, kind: str, package: str, base: Callable[[], type[T]]) -> None:
        self.kind = kind
        self._package = package
        self._base = base
        self._classes: dict[str, type[T]] = {}
        self._references: dict[type, str] = {}  # classes of users by the name that they were asked for with
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def keep(cls: type[T]) -> type[T]:
            assert name not in self._classes, f"{self.kind} {name} is registered twice"
            self._classes[name] = cls
            return cls

        return keep

    def all(self) -> dict[str, type[T]]:
        """Every built-in and installed class by name, in alphabetical order."""
        if not self._loaded:
            package = importlib.import_module(self._package)
            for info in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                importlib.import_module(info.name)
            for entry in importlib.metadata.entry_points(group=f"rprune.{self.kind}s"):
                self._classes.setdefault(entry.name, entry.load())
            self._loaded = True
        return dict(sorted(self._classes.items()))

    def get(self, name: str) -> type[T]:
        """Raises UsageError for an unknown name (the nearest is offered), InputError for a class that does not fit."""
        known = self.all()
        if name in known:
            return known[name]
        if ":" not in name:
            raise unknown_name(self.kind, name, known)
        found = load_object(name)
        if not (isinstance(found, type) and issubclass(found, self._base()) and dataclasses.is_dataclass(found)):
            raise InputError(
                f"{name} is not a {self.kind}", f"it must be a dataclass derived from {self._base().__name__}"
            )
        self._references[found] = name
        fitting: Any = found
        return fitting  # type: ignore[no-any-return]

    def name_of(self, value: T) -> str:
        for name, cls in self._classes.items():
            if type(value) is cls:
                return name
        cls = type(value)
        return self._references.get(cls, f"{cls.__module__}:{cls.__qualname__}")

    def build(self, spec: str | Mapping[str, Any], **given: Any) -> T:
        """The object that a specification means; ``given`` fills fields that the caller provides (a threat model).

        Raises:
            UsageError: unknown name or field, or a value of the wrong type or range.
        """
        table: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(f"{self.kind} {spec!r} has no name", f'write {self.kind} = {{ name = "...", ... }}')
        cls = self.get(name)
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        wanted = fields - set(given)
        for key in table:
            if key not in wanted:
                raise unknown_name(f"option of {self.kind} {name}", key, wanted)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            # a table inside changes its default: TRADES with attack = { steps = 20 } keeps TRADES's own start
            value = table.get(field.name)
            if isinstance(value, Mapping) and dataclasses.is_dataclass(field.default) and "name" not in value:
                table[field.name] = dataclasses.asdict(field.default) | dict(value)  # type: ignore[arg-type]
        values = table | {key: value for key, value in given.items() if key in fields}
        try:
            return pydantic.TypeAdapter(cls).validate_python(values)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            *parents, last = (str(part) for part in problem["loc"])
            owner: Any = cls
            for part in parents:
                owner = getattr(owner, part, None)  # the default of a field: a table inside
            if problem["type"] == "unexpected_keyword_argument" and dataclasses.is_dataclass(owner):
                inner = [".".join([*parents, field.name]) for field in dataclasses.fields(owner)]
                raise unknown_name(f"option of {self.kind} {name}", ".".join([*parents, last]), inner) from None
            if (found := misspelt(problem, f"{self.kind} {name}")) is not None:
                raise found from None
            raise UsageError(
                f"{self.kind} {name}: {first_problem(error)}", "see 'rprune list' for its options"
            ) from None

    def describe(self, value: T) -> dict[str, Any]:
        """The JSON-able specification of an object; ``build(describe(v), ...) == v`` given the same threat model."""
        table: dict[str, Any] = {"name": self.name_of(value)}
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            if field.name != "threat":
                item: Any = getattr(value, field.name)
                if field.type == self._base().__name__:  # any of the registry, so it needs its name
                    item = self.describe(item)
                table[field.name] = dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item  # type: ignore[arg-type]
        return table


class Configured:
    """Base of everything in a registry: tables inside tables may not hold unknown keys either."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")


def first_problem(error: pydantic.ValidationError) -> str:
    """One line for a validation error: where, and what."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def misspelt(problem: Any, origin: str) -> RpruneError | None:
    """For a validation error of a word that is none of a fixed list: the error that offers the nearest."""
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return None
    place = ".".join(part for part in problem["loc"] if isinstance(part, str))
    return unknown_name(f"{place} in {origin}", problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))


def load_object(reference: str) -> Any:
    """The object that ``pkg.module:name`` or ``path/file.py:name`` names. Runs that module: for names a user typed.

    Raises InputError when the module cannot be loaded or has no such name.
    """
    target, _, name = reference.rpartition(":")
    is_file = target.endswith(".py") or "/" in target
    try:
        module = _load_file(Path(target)) if is_file else importlib.import_module(target)
    except InputError:
        raise
    except Exception as error:  # the user's own code may raise anything
        hint = "run it with Python by itself to see the whole error"
        if not is_file:
            hint = "a module must be importable from here; a file is named path/file.py:name"
        raise InputError(f"cannot load '{target}': {type(error).__name__}: {error}", hint) from error
    if not hasattr(module, name):
        raise InputError(f"'{target}' has no '{name}'", "write file.py:name of something defined there")
    return getattr(module, name)


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise InputError(f"no file '{path}'", "relative paths start at the current directory")
    # One module per file and content: objects of two loads then share their classes.
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"_rprune_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' is not a Python file", "the name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
