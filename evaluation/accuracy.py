"""Clean accuracy over a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rprune.data.loaders import Loader

Predict = Callable[[Float[Tensor, "b c h w"]], Int64[Tensor, " b"]]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Labels and predicted classes of the first n samples of a split, on the CPU."""

    labels: Int64[Tensor, " n"]
    predicted: Int64[Tensor, " n"]

    @property
    def right(self) -> Tensor:
        return self.labels == self.predicted

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        return int(self.right.sum())


def classes_of(net: nn.Module) -> Predict:
    """The predictor of a torch network; a class of -1, wrong for every label, where logits are not numbers."""

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = net(x)
        classes: Tensor = logits.argmax(1)
        return classes.masked_fill(logits.isnan().any(1), -1)

    return predict


def predictions(
    predict: Predict,
    data: Loader,
    *,
    limit: int | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    batch_size: int = 500,
) -> Predictions:
    """Predictions for the first ``limit`` samples, or exactly for ``ids``. A network must be in eval mode."""
    labels, predicted = [], []
    for batch in data.ordered(batch_size, limit) if ids is None else map(data.take, torch.split(ids, batch_size)):
        labels.append(batch.y.cpu())
        predicted.append(predict(batch.x).cpu())
    return Predictions(torch.cat(labels), torch.cat(predicted))
