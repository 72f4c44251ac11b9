"""Checkpoints of other projects, read safely and strictly, and written for them."""

from limner.interop.conversion import Conversion, convert
from limner.interop.imported import Imported
from limner.interop.reading import read

__all__ = ["Conversion", "Imported", "convert", "read"]
