"""One graph holds the sampling loop, and one each way through the tokenizer."""

import pytest
import torch
from support.tiny_models import CONFIGS, photographs, tiny_generator, tiny_tokenizer
from torch._dynamo.testing import CompileCounter

from titok_fast import SamplingConfig
from titok_fast.sampling.unmask import sample_seeds, unmask


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
@pytest.mark.parametrize("config", CONFIGS, ids=["logit", "probability"])
def test_the_loop_is_one_graph(model_type: str, config: SamplingConfig) -> None:
    model, backend = tiny_generator(model_type), CompileCounter()
    ids, seeds = torch.full((3, 8), 64), sample_seeds(1, 3)
    class_ids = model.class_ids(torch.tensor([1, 2, 3]))
    compiled = torch.compile(unmask, fullgraph=True, backend=backend)
    got = compiled(model, ids, class_ids, seeds, config)
    assert torch.equal(got, unmask(model, ids, class_ids, seeds, config))
    assert backend.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["legacy", "vq"])
def test_both_ways_through_the_tokenizer_are_one_graph(kind: str) -> None:
    model, images = tiny_tokenizer(kind), photographs(32)
    for call, given in ((model.encode, images), (model.decode_tokens, torch.randint(64, (3, 8)))):
        backend = CompileCounter()
        got = torch.compile(call, fullgraph=True, backend=backend)(given)
        want = call(given)
        if isinstance(want, tuple):
            got, want = got[1]["min_encoding_indices"], want[1]["min_encoding_indices"]
        assert torch.equal(got, want)
        assert backend.frame_count == 1
