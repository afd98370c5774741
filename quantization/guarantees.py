"""What integers guarantee, whatever the image: sums that are exact in float32, and none that saturates in int16."""

from __future__ import annotations

from dataclasses import dataclass

from rprune.quantization.ptq import Quantization
from rprune.quantization.simulate import EXACT_FLOAT32, largest_accumulator
from rprune.quantization.weights import pairs_above


@dataclass(frozen=True)
class Exactness:
    """``largest``: layer name -> the largest of top * sum |w| + |b| over its filters, top = 2^b - 1 (255 in 8 bits)."""

    largest: dict[str, int]

    @property
    def proved(self) -> bool:
        """Every sum is below 2^24: float32 computes it exactly, in any order of its terms."""
        return all(value < EXACT_FLOAT32 for value in self.largest.values())


def exactness(quantization: Quantization) -> Exactness:
    """The bound for each layer; pixels have 8 bits whatever the others have."""
    top = max(scale.top for scale in quantization.activations.values())
    weights, biases = quantization.weights, quantization.biases
    return Exactness({name: largest_accumulator(weights[name], biases[name], top) for name in weights})


def saturating_pairs(quantization: Quantization) -> dict[str, int]:
    """Layer name -> neighbouring weights whose products a CPU without VNNI may add up beyond int16.

    Its instruction multiplies uint8 by int8 and adds two products with saturation: |w0| + |w1| > 128 of one sign is
    too much for two white inputs. ``portable`` leaves none.
    """
    return {name: int(pairs_above(weight).sum()) for name, weight in quantization.weights.items()}
