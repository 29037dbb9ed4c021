"""The switches of the waterfall: each technique off and on gives the same images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.bench_scripts import scripts
from support.tiny_models import (
    CONFIGS,
    TINY_VQGAN,
    CountingForwards,
    rebuilt,
    relative,
    tiny_generator,
    tiny_tokenizer_config,
)
from torch import Tensor

from titok_fast import SamplingConfig, TiTok, TiTokPipeline
from titok_fast.models import vqgan as maskgit_vqgan
from titok_fast.sampling import unmask as sampling

(techniques,) = scripts("lib.techniques")

LINEAR = CONFIGS[0]
SETTINGS = {
    "linear": LINEAR,
    "constant": SamplingConfig(3, 2.0, "constant", 3.0, 2.0),
    "power-cosine": SamplingConfig(4, 6.9, "power-cosine", 3.0, 2.8, True),
    "maskgit": SamplingConfig(4, 2.0, "linear", schedule="cosine", confidence="probability"),
}
BUILT_IN = techniques.BUILT_IN
# what each variant has: none, or all but one
VARIANTS = {"none": ()}
VARIANTS |= {f"no {name}": tuple(n for n in BUILT_IN if n != name) for name in BUILT_IN}


@pytest.fixture(autouse=True)
def _phases(monkeypatch: pytest.MonkeyPatch) -> None:
    # the tiny decoder's largest level to be upsampled is 16 x 16
    monkeypatch.setattr(maskgit_vqgan, "PHASES_FROM_PIXELS", 16 * 16)


def pipeline(model_type: str = "ViT") -> TiTokPipeline:
    """Its pixel decoder begins with 128 channels: narrower ones are not laid out channels-last."""
    config = replace(tiny_tokenizer_config(), pixel=replace(TINY_VQGAN, hidden_channels=64))
    return TiTokPipeline(rebuilt(TiTok(config)), tiny_generator(model_type), LINEAR)


@pytest.fixture(scope="module", params=["ViT", "UViT"])
def pipe(request: pytest.FixtureRequest) -> TiTokPipeline:
    return pipeline(request.param)


@torch.no_grad()
def drawn(pipe: TiTokPipeline, config: SamplingConfig, B: int = 4) -> tuple[Tensor, Tensor]:
    """Ids of a batch that has a class twice, and their pixels."""
    labels = torch.tensor([7, 300, 7, 12])[:B]
    ids = sampling.sample(pipe.generator, labels, sampling.sample_seeds(5, B), config)
    return ids, pipe.tokenizer.decode_tokens(ids)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_are_the_same_with_and_without(
    pipe: TiTokPipeline, variant: str, settings: str
) -> None:
    ids, pixels = drawn(pipe, SETTINGS[settings])
    with techniques.applied(VARIANTS[variant]):
        got_ids, got_pixels = drawn(pipe, SETTINGS[settings])
    assert torch.equal(got_ids, ids)
    # float32 sums in another order; folding two kernels into one costs the most
    assert relative(got_pixels, pixels) < 2e-5
    assert len(ids.unique()) > 4


def test_kept_tokens_stay_and_images_may_differ_in_their_number(pipe: TiTokPipeline) -> None:
    tokens = torch.full((3, 8), 64)
    tokens[0, :5], tokens[1, 2] = torch.arange(5), 9
    run = (torch.tensor([1, 2, 3]), sampling.sample_seeds(0, 3), LINEAR, tokens)
    want = sampling.sample(pipe.generator, *run)
    with techniques.applied([]):
        assert torch.equal(sampling.sample(pipe.generator, *run), want)


def _calls(pipe: TiTokPipeline, owner: Any, name: str) -> list[Any]:
    """The first argument of each call of a function or module while a batch is drawn."""
    found = getattr(owner, name)
    if isinstance(found, torch.nn.Module):
        owner, name, found = found, "forward", found.forward
    with patch.object(owner, name, wraps=found) as spy:
        drawn(pipe, LINEAR)
    return [call.args[0] for call in spy.call_args_list]


def _trunk_rows(pipe: TiTokPipeline, config: SamplingConfig = LINEAR) -> list[int]:
    with CountingForwards(pipe.generator) as passes:
        drawn(pipe, config)
    return passes.rows


def _head_rows(pipe: TiTokPipeline) -> list[int]:
    return [x.flatten(0, -2).shape[0] for x in _calls(pipe, pipe.generator, "lm_head")]


def _layout(pipe: TiTokPipeline) -> bool:
    x = _calls(pipe, pipe.tokenizer.pixel_decoder.mid[0], "conv2")[0]
    return x.is_contiguous(memory_format=torch.channels_last)


def _shortcuts(pipe: TiTokPipeline) -> int:
    return len(_calls(pipe, pipe.tokenizer.pixel_decoder.up[0].block[0], "nin_shortcut"))


def _batches(pipe: TiTokPipeline) -> list[int]:
    return [len(x) for x in _calls(pipe, pipe.tokenizer.pixel_decoder, "conv_in")]


# what shows that a technique is there: what is seen with it, and without
SEEN: dict[str, tuple[Callable[[TiTokPipeline], object], object, object]] = {
    "one-batch": (_trunk_rows, [4, 8, 8, 8], [4] * 7),
    "skip-zero": (lambda p: _trunk_rows(p, SETTINGS["power-cosine"]), [4, 8, 8, 8], [8] * 4),
    "mixed-hidden": (_head_rows, [], [32] * 7),
    "fused-qkv": (lambda p: len(_calls(p, p.generator.blocks[0].attn, "qkv")), 4, 0),
    "channels-last": (_layout, True, False),
    "phases": (lambda p: len(_calls(p, maskgit_vqgan, "interleave_phases")), 4, 0),
    "folded-shortcut": (_shortcuts, 0, 4),
    "fused-norm": (lambda p: len(_calls(p, maskgit_vqgan, "group_norm_silu")), 4 * 7, 0),
    "one-image": (_batches, [1] * 4, [4]),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_technique_is_in_or_out(name: str) -> None:
    pipe = pipeline()
    look, there, absent = SEEN[name]
    outside = [n for n in BUILT_IN if n != name]
    for names, want in ((outside, absent), ([*outside, name], there)):
        with techniques.applied(names):
            assert look(pipe) == want
    assert look(pipe) == there


def test_everything_is_put_back() -> None:
    def state() -> list[object]:
        return [sampling.unmask] + [vars(o)[name] for o, name, _ in techniques._PLAIN.values()]

    before = state()
    with techniques.applied([]):
        assert all(a is not b for a, b in zip(before, state(), strict=True))
    with pytest.raises(ZeroDivisionError), techniques.applied([]):
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(before, state(), strict=True))
    with techniques.applied(BUILT_IN):  # then the loop is the one that ships
        assert sampling.unmask is before[0]


def test_an_unknown_technique_is_refused() -> None:
    message = "unknown technique faster; known: bf16, skip-zero"
    with pytest.raises(ValueError, match=message), techniques.applied(["faster"]):
        pass
