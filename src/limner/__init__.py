"""Limner trains and samples conditional diffusion models."""

__version__ = "0.1.0"
