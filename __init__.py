"""rprune: small image classifiers that keep their adversarial robustness, with proof."""

__version__ = "0.1.0"
