"""Names of what a training step consists of, for profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.profiler import record_function

PREFIX = "rprune: "


def phase(name: str) -> AbstractContextManager[Any]:
    """What is done inside is called so in a profile; without a profiler it costs microseconds."""
    return record_function(PREFIX + name)
