"""The web page, in Gradio: draw, compare, understand, watch. Whole by itself; nothing comes from outside."""

from limner.studio.page.page import mount

__all__ = ["mount"]
