"""Fixtures of the server's tests."""

import pytest

from helpers.servers import Gate


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()
