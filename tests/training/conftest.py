"""Starting weights that the tests of training share."""

from pathlib import Path

import pytest
from support.tiny_runs import make_weights


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of every tiny stage."""
    return make_weights(tmp_path_factory.mktemp("weights"))
