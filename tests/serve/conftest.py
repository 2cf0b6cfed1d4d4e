"""What the tests of the server share: a tiny random model, and one server that most of them ask."""

from collections.abc import Iterator

import httpx
import pytest
from servers import Running, running

from lococo.options import ModelOptions, SlotOptions
from lococo.session import Session, opened


@pytest.fixture(scope="session")
def attached(tiny: str) -> Iterator[Session]:
    with opened(ModelOptions(model=tiny), SlotOptions("mass-merge", num_slots=32, chunk_size=16)) as session:
        yield session


@pytest.fixture(scope="session")
def served(attached: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(attached, tmp_path_factory.mktemp("contexts")) as one:
        yield one


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    with served.client() as one:
        yield one
