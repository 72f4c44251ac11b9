"""Checkpoints of other projects, read safely and strictly."""

from limner.interop.imported import Imported
from limner.interop.reading import read

__all__ = ["Imported", "read"]
