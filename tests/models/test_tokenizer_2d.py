"""The paper's 2D variant (table 3c): each patch's own row is quantised and decoded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import ALONE, recipe_of, tokenizer_config, updated
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from titok_fast import TiTok, TokenizerConfig
from titok_fast.costs import tokenizer_costs
from titok_fast.models.blocks import set_attention
from titok_fast.training.trainer import Trainer

CONFIG = replace(tokenizer_config("single_stage"), vit_dec_patch_size=8, is_2d=True)


def lengths(model: TiTok, images: Tensor) -> tuple[list[Any], Tensor]:
    """Rows that each block reads, and the reconstruction."""
    seen: list[Any] = []
    blocks = [*model.encoder.transformer, *model.decoder.transformer]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen, model(images)[0]


def test_the_transformers_read_patches_alone() -> None:
    images = torch.rand(3, 3, 16, 16)
    rows, made = lengths(TiTok(CONFIG), images)
    assert rows == [1 + 4, 1 + 4]
    assert made.shape == images.shape
    rows, _ = lengths(TiTok(replace(CONFIG, is_2d=False)), images)
    assert rows == [1 + 4 + 4, 1 + 4 + 4]


def test_a_latent_is_its_own_patch() -> None:
    torch.manual_seed(0)
    model = TiTok(CONFIG).eval()
    for block in [*model.encoder.transformer, *model.decoder.transformer]:
        block.attn.proj.weight.data.zero_()  # rows see nothing of each other
    a = torch.rand(1, 3, 16, 16)
    b = a.clone()
    b[:, :, :8, 8:] += 0.5  # the second of four patches, row-major
    za, zb = (model.encoder(x, model.latent_tokens).flatten(2)[0] for x in (a, b))
    assert ((za - zb).abs().amax(dim=0) > 1e-4).tolist() == [False, True, False, False]
    codes = torch.randn(1, 4, 1, 4)
    moved = codes.clone()
    moved[:, :, :, 2] += 1  # the third: left half of the lower row
    change = (model.decoder(codes) - model.decoder(moved)).abs().sum(dim=(0, 1))
    # the last 3 x 3 convolution reaches one pixel beyond a patch
    assert change[8:, :8].min() > 0
    assert change[:7].max() == 0
    assert change[:, 9:].max() == 0


def test_every_weight_is_trained() -> None:
    model = TiTok(CONFIG).train()
    z, result = model.encode(torch.rand(8, 3, 16, 16))
    (model.decode(z).square().mean() + result["quantizer_loss"]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_its_cost_is_that_of_the_products_it_does() -> None:
    model, costs = TiTok(CONFIG).eval(), tokenizer_costs(CONFIG)
    set_attention(model, "products")  # the counter does not see SDPA's on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        z = model.encoder(torch.rand(1, 3, 16, 16), model.latent_tokens)
        model.decoder(z)
    assert counter.get_total_flops() == costs["encoder"].flops + costs["vit_decoder"].flops


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    model = TiTok(CONFIG).eval()
    model.save_pretrained(tmp_path)
    again = TiTok.from_pretrained(str(tmp_path))
    assert again.config == CONFIG
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(images)[0], model(images)[0])
    assert TiTok(replace(CONFIG, is_2d=False)).state_dict().keys() == model.state_dict().keys()


def test_official_files_name_it_only_where_it_is_on() -> None:
    assert CONFIG.to_official()["model"]["vq_model"]["is_2d"] is True
    plain = replace(CONFIG, is_2d=False)
    assert "is_2d" not in plain.to_official()["model"]["vq_model"]
    assert TokenizerConfig.from_official(plain.to_official()) == plain


@pytest.mark.parametrize(
    "change", [{"num_latent_tokens": 8}, {"vit_dec_patch_size": 4}, {"is_legacy": True}]
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    if "is_legacy" in change:
        change["pixel"] = replace(CONFIG.pixel, channel_mult=(1, 1, 1, 1))
    replace(CONFIG, is_2d=False, **change)
    with pytest.raises(ValueError, match=r"is_2d=True wants .*\(4, 8, False\)"):
        replace(CONFIG, **change)


def test_it_learns(tmp_path: Path) -> None:
    recipe = recipe_of("single_stage", tmp_path, tmp_path, steps=60)
    recipe = replace(updated(recipe, losses={"discriminator_start": 100}), tokenizer=CONFIG)
    trainer = Trainer(recipe, ALONE)
    # not noise, which four codes cannot hold
    shade = torch.linspace(0.1, 0.9, 8).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    batch = {"images": shade.contiguous(), "labels": torch.zeros(8, dtype=torch.int64)}
    losses = []
    for _ in range(60):
        assert trainer.gradients(batch, detailed=True)
        trainer.apply()
        losses.append(trainer.logs()["reconstruction_loss"])
    assert losses[-1] < 0.3 * losses[0]
