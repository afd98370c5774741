"""Write the generated documentation, or check that it is up to date (``--check``): docs/cli.md and README's tables."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cli_reference() -> str:
    """Every command and option, as Typer prints them."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "rprune.cli.app",
        "utils",
        "docs",
        "--name",
        "rprune",
        "--title",
        "rprune",
    ]
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "docs", env=environment)
    return re.sub(r"[ \t]+\n", "\n", result.stdout).strip() + "\n"


def readme() -> str:
    """README with each block between ``<!-- table: NAME -->`` and ``<!-- end -->`` made from its benchmark's result."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        benchmark = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(benchmark)
        table = benchmark.table(json.loads(benchmark.RESULT.read_text(encoding="utf-8")))
        return f"<!-- table: {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    wanted = {ROOT / "docs" / "cli.md": cli_reference(), ROOT / "README.md": readme()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"out of date: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run 'make docs'")
        return
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
