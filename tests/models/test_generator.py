"""The generators: published sizes, token space, label dropout, training masks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import (
    on_meta,
    relative,
    tiny_generator,
    tiny_generator_config,
)

from titok_fast import GeneratorConfig, ImageBert, UViTBert, generator_class, preset
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
