"""What every test shares."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples in every run: a failure is of the change at hand, and is there again when it is looked into.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path_factory.mktemp("cache")))
