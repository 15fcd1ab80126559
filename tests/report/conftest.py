"""The library's JavaScript is bundled once for all tests: that is most of the time that a page takes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import vl_convert


@pytest.fixture(scope="session", autouse=True)
def bundled_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", cache(vl_convert.javascript_bundle))
        yield
