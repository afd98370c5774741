"""Several processes for one command: how ``--gpus`` starts them, and how each joins the others.

The processes are torchrun's. On several machines torchrun itself starts them: ``torchrun ... -m rprune train ...``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import typer

from rprune.cli.console import stderr, stdout
from rprune.errors import UsageError, WorkError

PATIENCE = timedelta(days=7)  # one process may export or certify for long while the others wait


def launched(count: int | None, device: str) -> bool:
    """Run this command in ``count`` processes and wait for them; False where it has to run here.

    Raises:
        UsageError: there are not so many GPUs.
        WorkError: a process was ended from outside.
        Exit: with the code of the first process that failed.
    """
    if count is None or count == 1 or _size() > 1:
        return False
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if device.startswith("cuda:"):
        raise UsageError(f"--gpus and --device {device} contradict each other", "leave out --device")
    found = torch.cuda.device_count()
    if device != "cpu" and found < count:
        raise UsageError(f"--gpus {count}: there are {found}", "use as many as there are, or --device cpu")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed has said so itself
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=str(os.getpid()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "rprune", *sys.argv[1:])
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise WorkError(
                f"process {rank + 1} of {count} was ended by signal {-failure.exitcode}, so the others were, too",
                "the same command goes on from the last finished epoch",
            ) from None
        raise typer.Exit(failure.exitcode) from None
    return True


@contextmanager
def joined() -> Iterator[None]:
    """What torchrun started as one of several is one of them inside; the first alone talks."""
    if _size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    if dist.get_rank():
        stdout.quiet = stderr.quiet = True
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  a device, not a path of ours
            sys.stdout = nowhere
            yield
    else:
        yield
    dist.destroy_process_group()


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
