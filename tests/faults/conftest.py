"""The process that starts the runs of these tests: one for all modules."""

import pytest
from killing import Killer


@pytest.fixture(scope="session")
def killer():
    with Killer() as started:
        yield started
