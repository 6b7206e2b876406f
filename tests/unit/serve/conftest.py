from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hash_pods import MakePod, serving_pods


@pytest.fixture
async def make_pod() -> AsyncIterator[MakePod]:
    async with serving_pods() as make:
        yield make
