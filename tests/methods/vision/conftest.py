"""The small classifier, made once."""

from __future__ import annotations

import pytest
from small_classifier import Setting, make_setting


@pytest.fixture(scope="session")
def setting() -> Setting:
    """A trained network with images."""
    return make_setting()
