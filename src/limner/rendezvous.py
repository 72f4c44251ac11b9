"""Where processes find one another, after a restart by torchrun as well.

torchrun keeps one store for all attempts, and nothing in it tells one attempt from the next (PyTorch 2.13's
`rendezvous.py`; pytorch/pytorch#135712): a process that starts again reads the addresses of the dead. Under a prefix
of its own each attempt finds only its own. One agent counts its restarts for all its workers; the agents of several
machines may count otherwise, so there the store is left as it is (docs/cluster.md has the setting that helps).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

INIT_METHOD = "limner://"


def _attempts_own(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    for store, rank, world in rendezvous(urlsplit(url)._replace(scheme="env").geturl(), **options):
        yield PrefixStore(f"attempt-{attempt}", store) if alone else store, rank, world


register_rendezvous_handler(INIT_METHOD.partition(":")[0], _attempts_own)
