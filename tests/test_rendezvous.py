"""Each attempt of torchrun finds its own processes, not those of the attempt before, in the one store there is."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from limner.rendezvous import INIT_METHOD


@pytest.mark.parametrize(("agents", "seen"), [("1", False), ("2", True)])
def test_attempts_do_not_see_one_another(monkeypatch: pytest.MonkeyPatch, agents: str, seen: bool) -> None:
    kept = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": kept.port, "RANK": 1, "WORLD_SIZE": 2,
                        "TORCHELASTIC_USE_AGENT_STORE": True, "GROUP_WORLD_SIZE": agents}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))

    def store_of(attempt: int) -> distributed.Store:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        store, rank, world = next(rendezvous(INIT_METHOD, timeout=timedelta(seconds=10)))
        assert (rank, world) == (1, 2)
        return store

    first = store_of(0)
    first.set("address of 0", "of the dead")
    assert store_of(0).check(["address of 0"])
    assert store_of(1).check(["address of 0"]) is seen
