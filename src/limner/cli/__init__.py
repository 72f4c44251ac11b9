"""The commands, thin: parse, call `limner.api`, print. torch is imported only when a command runs."""

import os

# Before torch is imported: threads that wait for work spin on their core, so that two processes on the same cores run
# ten times slower each; a bound on the spinning costs a process alone nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

from limner.cli.program import app, main

__all__ = ["app", "main"]
