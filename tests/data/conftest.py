"""Shards that the tests of batches share."""

import pytest
from support.records import write_shards

from titok_fast.data.sources import Source
from titok_fast.data.webdataset import WebDatasetSource


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """30 records in 3 shards, of which 4, 17 and 18 are damaged."""
    folder = tmp_path_factory.mktemp("shards")
    return WebDatasetSource(write_shards(folder, [11, 8, 11], damaged=(4, 17, 18)))
