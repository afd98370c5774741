"""Make ``fingerprints.json``: ``python -m rprune.models.fingerprints``, when architectures or torchvision change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rprune.models.guess import TABLE, fingerprint, shapes_of, sketch
from rprune.models.registry import Architecture, names


def known() -> list[str]:
    """Every architecture that is guessed: built in, and torchvision's classifiers."""
    import torchvision

    classifiers = torchvision.models.list_models(module=torchvision.models)
    return [*names(), *(f"torchvision:{name}" for name in classifiers)]


def made(architectures: Iterable[str]) -> dict[str, Any]:
    """The table of these architectures."""
    import torchvision

    candidates: dict[str, list[str]] = {}
    sketches: dict[str, list[int]] = {}
    for name in architectures:
        side = {"torchvision:inception_v3": 299}.get(name, 224 if name.startswith("torchvision:") else 32)
        keys = list(shapes_of(Architecture(name, 1000, (3, side, side))))
        candidates.setdefault(fingerprint(keys), []).append(name)
        sketches[name] = sketch(keys)
    version = str(torchvision.__version__).partition("+")[0]
    return {"torchvision": version, "candidates": candidates, "sketches": sketches}


if __name__ == "__main__":
    found = made(known())
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(found["candidates"].items())]
    rows = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found["sketches"].items()]
    TABLE.write_text(
        f'{{\n "torchvision": {json.dumps(found["torchvision"])},\n "candidates": {{\n' + ",\n".join(lines)
        + '\n },\n "sketches": {\n' + ",\n".join(rows) + "\n }\n}\n",
        encoding="utf-8",
    )  # fmt: skip
    print(f"wrote {TABLE}: {len(found['sketches'])} architectures, {len(found['candidates'])} sets of names")
