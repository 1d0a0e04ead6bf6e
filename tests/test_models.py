"""Encoders and the projection head: shapes, names, and what an unknown name says."""

import pytest
import torch
import torchvision

from dist_ssl.config import UserError
from dist_ssl.models import ENCODERS, GlobalBatchNorm, build_encoder, build_model
from tests.trajectory import small_config

WIDTHS = {"resnet_tiny": 128, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}
WIDTHS |= {f"{name}_small": width for name, width in WIDTHS.items() if name != "resnet_tiny"}
WIDTHS |= {"resnet_tiny_pyramid": (16 + 4 + 1) * 128, "vit_s_16": 384, "vit_b_16": 768}


def test_a_pyramid_keeps_where_things_are():
    plain, pyramid = build_encoder("resnet_tiny").eval(), build_encoder("resnet_tiny_pyramid").eval()
    loaded = pyramid.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("norm.") for name in loaded.missing_keys)
    image = torch.randn(1, 3, 32, 32)
    h = pyramid(image)[0] * (1 + pyramid.norm.eps) ** 0.5
    places, quarters, whole = h.split([16 * 128, 4 * 128, 128])
    maps = plain.blocks(plain.stem(image))[0]
    torch.testing.assert_close(places.view(128, 4, 4), maps)
    torch.testing.assert_close(quarters.view(128, 2, 2)[:, 0, 1], 2 * maps[:, :2, 2:].mean((1, 2)))
    torch.testing.assert_close(whole, 4 * plain(image)[0])
    assert pyramid(torch.randn(1, 3, 20, 20)).shape == h[None].shape  # whatever the view's size


def test_the_levels_of_a_pyramid_weigh_the_same():
    h = build_encoder("resnet_tiny_pyramid").train()(torch.randn(64, 3, 32, 32))
    for level, places in zip(h.split([16 * 128, 4 * 128, 128], dim=1), (16, 4, 1), strict=True):
        assert level.var(0, unbiased=False).sum().item() == pytest.approx(16 * 128, rel=0.01), places


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_h_of_their_width(name):
    encoder = build_encoder(name, 32)
    assert encoder.output_dim == WIDTHS[name]
    assert encoder.eval()(torch.randn(2, 3, 32, 32)).shape == (2, WIDTHS[name])


@pytest.mark.slow
def test_parameter_names_are_torchvisions():
    ours = build_encoder("resnet50").state_dict()
    theirs = torchvision.models.resnet50().state_dict()
    assert set(ours) == {name for name in theirs if not name.startswith("fc.")}
    ours = build_encoder("vit_b_16", 224).state_dict()
    theirs = torchvision.models.vit_b_16().state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items() if "heads" not in n}


@pytest.mark.parametrize("name", ["resnet51", "vit_b_16_small", "resnet_tiny_small", ""])
def test_an_unknown_encoder_lists_what_there_is(name):
    with pytest.raises(UserError) as error:
        build_encoder(name)
    assert all(known in str(error.value) for known in ENCODERS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_is_torchs_in_any_memory_format(rows, memory_format, affine):
    x, dy = torch.randn(rows, 8, 6, 5).contiguous(memory_format=memory_format), torch.randn(rows, 8, 6, 5)
    found = []
    for kind in (GlobalBatchNorm, torch.nn.BatchNorm2d):
        given = x.clone().requires_grad_()
        y = kind(8, affine=affine)(given)
        found.append((y, *torch.autograd.grad(y, given, dy)))
    for ours, torchs in zip(*found, strict=True):
        assert torch.allclose(ours, torchs, atol=1e-5)


def test_weights_are_a_function_of_the_seed_alone(tmp_path):
    torch.manual_seed(1)
    first = build_model(small_config(tmp_path, ""))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = build_model(small_config(tmp_path, ""))
    other = build_model(small_config(tmp_path, "", "run.seed=1"))
    weight = "encoder.stem.0.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_vit_wants_a_multiple_of_its_patch():
    with pytest.raises(UserError, match=r"augment\.crop_size: expected a multiple .* 16; got 30"):
        build_encoder("vit_s_16", 30)


def test_a_vit_takes_other_sizes_by_resampled_position_embeddings():
    """At its own size its bits are torchvision's; at another one its embeddings are those of bicubic resampling."""
    ours = build_encoder("vit_s_16", 64).eval()
    options = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 4 * 384, "patch_size": 16}
    theirs = {side: torchvision.models.VisionTransformer(image_size=side, **options).eval() for side in (64, 48, 96)}
    for model in theirs.values():
        model.heads = torch.nn.Identity()
    state = ours.state_dict()
    name = "encoder.pos_embedding"
    theirs[64].load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs[64](x))
    grid = state[name][:, 1:].mT.unflatten(2, (4, 4))
    for side in (48, 96):
        resampled = torch.nn.functional.interpolate(grid, size=(side // 16, side // 16), mode="bicubic")
        positions = torch.cat([state[name][:, :1], resampled.flatten(2).mT], dim=1)
        theirs[side].load_state_dict(state | {name: positions})
        x = torch.randn(2, 3, side, side)
        assert torch.allclose(ours(x), theirs[side](x), atol=1e-4)
    out = ours(torch.randn(2, 3, 48, 48))
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()  # a plain sum of a layer norm has no gradient
    assert ours.encoder.pos_embedding.grad.abs().sum(2).min() > 0
    with pytest.raises(UserError, match=r"evaluation\.image_size: expected a multiple .* 16; got 50"):
        ours(torch.randn(2, 3, 50, 50))


def test_the_weights_of_a_vit_are_those_of_torchvision_at_a_seed():
    torch.manual_seed(3)
    ours = build_encoder("vit_s_16", 32).state_dict()
    torch.manual_seed(3)
    theirs = torchvision.models.VisionTransformer(32, 16, 12, 6, 384, 4 * 384).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
