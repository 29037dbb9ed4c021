"""The generators: published sizes, token space, label dropout, training masks."""

from dataclasses import replace
from math import pi

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import (
    on_meta,
    relative,
    tiny_generator,
    tiny_generator_config,
)
from torch import Tensor

from titok_fast import GeneratorConfig, ImageBert, UViTBert, generator_class, preset
from titok_fast.models.blocks import PostNormBlock
from titok_fast.models.weights import to_official

# parameters, tensors in the published file
ZOO = {
    "titok-l-32": (177_202_432, 391),
    "titok-b-64": (177_227_008, 391),
    "titok-s-128": (294_990_848, 257),
}
AT_512 = {"titok-l-64-512": 177_227_008, "titok-b-128-512": 177_276_160}


@pytest.mark.parametrize("name", ZOO)
def test_zoo_has_the_published_sizes_and_tensors(name: str) -> None:
    config = preset(name).generator
    assert config is not None
    model = on_meta(generator_class(config), config)
    official = to_official(model.state_dict(), model.kind)
    assert (sum(p.numel() for p in model.parameters()), len(official)) == ZOO[name]
    assert GeneratorConfig.from_official(config.to_official()) == config


@pytest.mark.parametrize("name", AT_512)
def test_512_px_generators_differ_in_length_alone(name: str) -> None:
    config = preset(name).generator
    assert config is not None
    model = on_meta(ImageBert, config)
    assert config.image_seq_len == preset(name).tokenizer.num_latent_tokens
    assert sum(p.numel() for p in model.parameters()) == AT_512[name]


def test_class_follows_the_configuration() -> None:
    assert generator_class(GeneratorConfig()) is ImageBert
    assert generator_class(GeneratorConfig("UViT", num_hidden_layers=20)) is UViTBert


def test_token_space() -> None:
    config = GeneratorConfig()
    assert (config.mask_token_id, config.no_class_id, config.vocab_size) == (4096, 5097, 5098)
    model = tiny_generator()
    assert model.class_ids(torch.tensor([0, 999])).tolist() == [65, 1064]
    assert (model.mask_token_id, model.target_codebook_size) == (64, 64)
    assert (model.condition_num_classes, model.image_seq_len) == (1000, 8)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_label_dropout(model_type: str) -> None:
    model, B = tiny_generator(model_type), 400
    ids, labels = torch.randint(65, (1, 8)).expand(B, -1), torch.full((B,), 7)
    with_label = model(ids, labels, cond_drop_prob=0.0)
    without = model(ids, labels, cond_drop_prob=1.0)
    assert (with_label.shape, with_label.dtype) == ((B, 8, 64), torch.float32)
    none = torch.full((1,), model.config.no_class_id)
    assert relative(without[:1], model.lm_head(model.hidden(ids[:1], none))) < 1e-5
    mixed = model(ids, labels, cond_drop_prob=0.25)
    dropped = (mixed - without).abs().amax(dim=(1, 2)) < 1e-5
    kept = (mixed - with_label).abs().amax(dim=(1, 2)) < 1e-5
    assert bool((dropped ^ kept).all())
    assert 0.15 < dropped.double().mean() < 0.35
    torch.manual_seed(4)
    model(ids[:3], labels[:3], cond_drop_prob=0.0)
    after = torch.rand(1)
    torch.manual_seed(4)
    torch.rand(3)  # one uniform per sample, dropped or not: upstream's stream
    assert torch.equal(after, torch.rand(1))


@torch.no_grad()
def test_bert_against_its_description() -> None:
    model = tiny_generator("ViT")
    ids, labels = torch.randint(65, (2, 8)), torch.tensor([3, 4])
    tokens = torch.cat([labels[:, None] + 65, ids], dim=1)
    x = model.embeddings.weight[tokens] + model.type_embed[0] + model.pos_embed
    x = F.layer_norm(x, (64,), model.norm_in.weight, model.norm_in.bias, 1e-12)
    for block in model.blocks:
        x = plain_post_norm(block, x)
    want = F.linear(x[:, 1:], model.lm_head.weight, model.lm_head.bias)
    assert relative(model(ids, labels, cond_drop_prob=0.0), want) < 1e-5


def plain_post_norm(block: PostNormBlock, x: Tensor) -> Tensor:
    """Attention written out; normalisation after each sum."""
    B, L, D = x.shape
    q, k, v = (t.view(B, L, 2, D // 2).transpose(1, 2) for t in block.attn.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) * (D // 2) ** -0.5).softmax(dim=-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(B, L, D))
    x = F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, 1e-12)
    h = block.mlp.fc1(x)
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))  # the exact form, not the tanh one
    return F.layer_norm(x + block.mlp.fc2(h), (D,), block.norm2.weight, block.norm2.bias, 1e-12)


@torch.no_grad()
def test_uvit_merges_the_newest_skip_first() -> None:
    config = replace(tiny_generator_config("UViT"), num_hidden_layers=4)
    model = UViTBert(config).eval()
    ids, label = torch.randint(65, (2, 8)), torch.tensor([3, 4])
    tokens = torch.cat([label[:, None] + 65, ids], dim=1)
    x = model.embeddings(tokens) + model.pos_embed
    first = model.in_blocks[0](x)
    second = model.in_blocks[1](first)
    x = model.out_blocks[0](model.mid_block(second), second)
    x = model.norm(model.out_blocks[1](x, first))
    torch.testing.assert_close(model(ids, label, cond_drop_prob=0.0), model.lm_head(x[:, 1:]))


def test_dropout_acts_in_training_and_in_bert_alone() -> None:
    ids, labels = torch.randint(65, (2, 8)), torch.tensor([3, 4])
    for model_type, acts in (("ViT", True), ("UViT", False)):
        model = tiny_generator(model_type).train()
        first, second = (model(ids, labels, cond_drop_prob=0.0) for _ in range(2))
        assert torch.equal(first, second) != acts
        model.eval()
        first, second = (model(ids, labels, cond_drop_prob=0.0) for _ in range(2))
        assert torch.equal(first, second)


def test_training_masks_follow_the_arccos_schedule() -> None:
    model, B, K = tiny_generator(K=32), 4000, 32
    tokens = torch.randint(64, (B, K))
    masked, masks = model.masking_input_tokens(tokens)
    assert (masks.shape, masks.dtype) == ((B, K), torch.bool)
    assert torch.equal(masked[~masks], tokens[~masks])
    assert bool((masked[masks] == 64).all())
    counts = masks.sum(dim=1)
    assert counts.min() >= 1
    # of the arccos of a uniform, the share above a is cos(a pi / 2): half lie above 2/3
    above = (counts > 21).double().mean().item()
    assert above == pytest.approx(0.5, abs=0.04)
    assert counts.double().mean() / K == pytest.approx(2 / pi, abs=0.02)


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"forward wants input_ids \(B, K\) and condition \(B,\)"):
        tiny_generator()(torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_gradients_reach_every_parameter(model_type: str) -> None:
    model = tiny_generator(model_type).train()
    logits = model(torch.randint(65, (4, 8)), torch.arange(4), cond_drop_prob=0.5)
    F.cross_entropy(logits.flatten(0, 1), torch.randint(64, (32,))).backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
