"""Drawing by recordings: buckets, buffers and keys, with a stand-in for CUDA graphs."""

from collections.abc import Callable, Sequence

import pytest
import torch
from support.tiny_models import tiny_generator, tiny_tokenizer
from torch import Tensor

from titok_fast import SamplingConfig, TiTokPipeline
from titok_fast.backends import cuda_graph as graphs
from titok_fast.backends.cuda_graph import bucket
from titok_fast.backends.techniques import check_techniques, resolve_fast

SETTINGS = SamplingConfig(4, 3.0, "linear", 3.0, 4.5, True)
OTHER = {"schedule": "cosine", "confidence": "probability"}
K, MASK = 8, 64


class Recorder:
    """In place of CUDA graphs: inputs stay where they are, and there is one result, overwritten."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays = 0

    def __call__(
        self, work: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> Callable[[], Tensor]:
        self.sizes.append(len(inputs[0]))
        result = work(*inputs)
        given = [(x, x.data_ptr()) for x in inputs]

        def replay() -> Tensor:
            self.replays += 1
            assert all(x.data_ptr() == place for x, place in given)
            return result.copy_(work(*inputs))

        return replay


def pipeline(model_type: str = "ViT") -> TiTokPipeline:
    return TiTokPipeline(tiny_tokenizer(), tiny_generator(model_type), SETTINGS)


def recorded(model_type: str = "ViT") -> tuple[TiTokPipeline, Recorder]:
    """A pipeline with technique "graph" as compile makes it, but for what records."""
    pipe, recorder = pipeline(model_type), Recorder()
    use(pipe, recorder)
    return pipe, recorder


def use(pipe: TiTokPipeline, recorder: graphs.Capture) -> None:
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr("titok_fast.backends.cuda_graph.CudaCapture", lambda device: recorder)
        m.setattr("titok_fast.pipeline.check_techniques", lambda *given: None)
        pipe.compile(["graph"])


def draw(pipe: TiTokPipeline, count: int, **options: object) -> Tensor:
    labels = [(37 * i) % 1000 for i in range(count)]
    got = pipe(labels, seed=5, output="tensor", **options)  # type: ignore[arg-type]
    assert isinstance(got, Tensor)
    return got


def test_buckets() -> None:
    assert [bucket(n, 8) for n in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert [bucket(n, 6) for n in range(7)] == [1, 1, 2, 4, 4, 6, 6]
    assert bucket(100, 100) == 100
    assert bucket(65, 100) == 100
    assert bucket(64, 100) == 64


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_same_pictures_as_the_plain_pipeline(model_type: str) -> None:
    plain, (fast, recorder) = pipeline(model_type), recorded(model_type)
    want = draw(plain, 9)
    assert len(want.unique(dim=0)) == 9
    for count in (*range(1, 10), 3, 9):
        assert torch.equal(draw(fast, count), want[:count]), count
    assert recorder.sizes == [1, 2, 4, 8]  # 9 pictures are 8 and 1: a CPU takes 8 at once
    assert recorder.replays == 13


@pytest.mark.parametrize("size", [1, 3, 5, 9, 100])
def test_same_pictures_at_every_batch_size(size: int) -> None:
    fast, recorder = recorded()
    want = draw(pipeline(), 9)
    for count in range(1, 10):
        assert torch.equal(draw(fast, count, batch_size=size), want[:count]), count
    assert max(recorder.sizes) == min(size, 16)
    assert len(set(recorder.sizes)) == len(recorder.sizes)


def test_settings_have_their_own_recordings() -> None:
    plain, (fast, recorder) = pipeline(), recorded()
    for settings in ({}, OTHER, {"num_sample_steps": 2}, {}, OTHER):
        assert torch.equal(draw(fast, 4, **settings), draw(plain, 4, **settings))  # type: ignore[arg-type]
    assert recorder.sizes == [4, 4, 4]


def test_tokens_to_keep_and_seeds_are_inputs() -> None:
    plain, (fast, recorder) = pipeline(), recorded()
    tokens = torch.randint(MASK, (5, K))
    tokens[:, ::2] = MASK
    tokens[3] = MASK
    seeds = torch.arange(5) - 2
    for options in ({"tokens": tokens}, {"seeds": seeds}, {"tokens": tokens, "seeds": seeds}, {}):
        assert torch.equal(draw(fast, 5, **options, **OTHER), draw(plain, 5, **options, **OTHER))
    assert recorder.sizes == [8]


def test_results_are_the_callers_own() -> None:
    fast, _ = recorded()
    first = draw(fast, 4)
    kept = first.clone()
    draw(fast, 4, seeds=torch.arange(4))
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(draw(fast, 4), kept)


def test_a_sweep_drops_the_oldest_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    plain, (fast, recorder) = pipeline(), recorded()
    made = []
    for scale in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # 3 puts 2 out, which then puts 3 out
        got = draw(fast, 2, guidance_scale=scale)
        assert torch.equal(got, draw(plain, 2, guidance_scale=scale))
        made.append(len(recorder.sizes))
    assert made == [1, 2, 2, 3, 3, 4]


def test_a_failed_recording_leaves_nothing_behind() -> None:
    pipe = pipeline()
    recorder = Recorder()

    def fails_once(work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
        if not recorder.sizes:
            recorder.sizes.append(0)
            raise torch.OutOfMemoryError("no room")
        return recorder(work, inputs)

    use(pipe, fails_once)
    with pytest.raises(MemoryError, match="batch_size=4: try batch_size=2"):
        draw(pipe, 4, batch_size=4)
    assert torch.equal(draw(pipe, 4, batch_size=4), draw(pipeline(), 4))


def test_what_the_plain_pipeline_refuses_is_refused() -> None:
    plain, (fast, recorder) = pipeline(), recorded()
    bad: tuple[dict[str, object], ...] = (
        {"labels": [1000]},
        {"labels": [-1, 3]},
        {"labels": [1.5]},
        {"labels": [1], "seeds": torch.zeros(2, dtype=torch.int64)},
        {"labels": [1], "seeds": torch.zeros(1)},
        {"labels": [1], "tokens": torch.zeros(1, K + 1, dtype=torch.int64)},
        {"labels": [1], "tokens": torch.full((1, K), MASK + 1)},
        {"labels": [1], "tokens": torch.zeros(1, K)},
        {"labels": [1], "batch_size": 0},
    )
    for options in bad:
        messages = []
        for pipe in (plain, fast):
            with pytest.raises(ValueError, match=r"want|lie in|outside") as error:
                pipe(output="tensor", **options)  # type: ignore[arg-type]
            messages.append(str(error.value))
        assert messages[0] == messages[1], options
    assert recorder.sizes == []
    assert fast([]) == []
    assert draw(fast, 0).shape == (0, 32, 32, 3)


def test_compile_refuses_graphs_where_they_cannot_be() -> None:
    pipe = pipeline()
    with pytest.raises(ValueError, match=r"'graph' wants a CUDA pipeline; the pipeline is on cpu"):
        pipe.compile(["products", "graph"])
    assert pipe.techniques == ()
    assert pipe.generator is not None
    assert pipe.generator.blocks[0].attn.backend == "sdpa"  # nothing was changed before
    both = ("inductor", "graph")
    assert resolve_fast(True, "cuda", torch.bfloat16) == both
    check_techniques(both, "cuda", torch.bfloat16, {"mode": "max-autotune-no-cudagraphs"})
    with pytest.raises(ValueError, match="mode 'reduce-overhead' records CUDA graphs, and so"):
        check_techniques(both, "cuda", torch.bfloat16, {"mode": "reduce-overhead"})
    with pytest.raises(ValueError, match=r"\['mode'\] are for technique 'inductor'"):
        pipe.compile(mode="reduce-overhead")
