"""The commands, thin: parse, call `limner.api`, print. torch is imported only when a command runs."""

from limner.cli.program import app, main

__all__ = ["app", "main"]
