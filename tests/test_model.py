"""The 4D model: stream routing, two decoders, cross-view attention, ablations. Small networks with random weights."""
import dataclasses

import pytest
import torch

from model import PRESETS, CrossViewAttention, Model4D, Preset, UNet, precondition, unet_config

SMALL = Preset('small test', 32, 40, view_heads=2, view_head_dim=8, vae={},
               unet=unet_config((16, 32), heads=(1, 2), layers=1, latent_channels=4, context=12, groups=8,
                                attention_levels=1))
WITH_CLIP = dataclasses.replace(SMALL, clip={})
SWITCHES = [dict(), dict(mv_attention='none'), dict(rgb_only=True), dict(rgb_only=True, mv_attention='rgb')]


@torch.no_grad()
def randomise(module, scale=0.15):
    torch.manual_seed(0)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape) * scale + (p.ndim == 1) * 0.5)
    return module.eval()


def built(preset=SMALL, attention=False, **switches):
    """A model whose decoders are copies of one random U-Net; attention: with random cross-view attention as well."""
    unet = randomise(UNet.from_config(preset.unet))
    model = Model4D(preset, unet=unet, **switches)
    if attention:
        randomise(model.cross_view, 0.4)
    return model.eval()


def inputs(B=2, V=2, S=2, T=3, h=4, w=5, clip=False):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(B, V, S, T, 4, h, w, generator=generator)
    cond = torch.randn(B, V, S, 4, h, w, generator=generator)
    sigma = torch.linspace(0.5, 20, B)
    return noisy, sigma, cond, torch.randn(B, V, 12, generator=generator) if clip else None


@torch.no_grad()
@pytest.mark.parametrize('views', [1, 2, 3])
@pytest.mark.parametrize('switches', SWITCHES)
def test_fresh_model_is_the_plain_unet(switches, views):
    """Zero-initialised attention and copied decoder: every stream is exactly what the U-Net alone computes for it."""
    model = built(WITH_CLIP, **switches)
    noisy, sigma, cond, embeds = inputs(V=views, S=2 - model.rgb_only, clip=True)
    result = model(noisy, sigma, cond, embeds)
    assert result.shape == noisy.shape
    c_skip, c_out, c_in, c_noise = precondition(sigma)
    ids = torch.tensor([[6, 127, 0.02]]).repeat(len(sigma), 1)
    for v in range(views):
        for s in range(noisy.shape[2]):
            x = noisy[:, v, s]
            sample = torch.cat([c_in[:, None, None, None, None] * x, cond[:, v, s, None].expand(x.shape)], 2)
            F_x = model.unet(sample, c_noise, embeds[:, v, None], ids)
            D_x = c_skip[:, None, None, None, None] * x + c_out[:, None, None, None, None] * F_x
            assert (result[:, v, s] - D_x).abs().max() < 1e-5 * D_x.abs().max(), (v, s)


def test_decoders_share_no_storage():
    model = built()
    a = {p.data_ptr() for p in model.unet.parameters()}
    pairs = list(zip(model.decoder_b.named_parameters(), model.decoder_b.state_dict()))
    assert len(pairs) > 50
    for (name, p), _ in pairs:
        assert p.data_ptr() not in a and torch.equal(p, model.unet.state_dict()[name])
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)
    assert not torch.equal(model.unet.conv_out.bias, model.decoder_b.conv_out.bias)
    model.copy_decoder()
    assert torch.equal(model.unet.conv_out.bias, model.decoder_b.conv_out.bias)


@torch.no_grad()
def test_attention_runs_one_way_between_pointmaps():
    """The reference's pointmap moves the other views' pointmaps, and nothing else moves anything of another
    stream."""
    model = built(attention=True)
    noisy, sigma, cond, _ = inputs(V=3)
    before = model(noisy, sigma, cond)
    for v in range(3):
        for s in range(2):
            changed = noisy.clone()
            changed[:, v, s] += 1
            moved = (model(changed, sigma, cond) - before).abs().amax((0, 3, 4, 5, 6)) > 1e-5        # (V, S)
            expected = torch.zeros(3, 2, dtype=torch.bool)
            expected[v, s] = True
            if (v, s) == (0, 1):
                expected[:, 1] = True
            assert torch.equal(moved, expected), (v, s)


@torch.no_grad()
def test_attention_of_the_rgb_ablation():
    model = built(attention=True, rgb_only=True, mv_attention='rgb')
    noisy, sigma, cond, _ = inputs(V=3, S=1)
    before = model(noisy, sigma, cond)
    for v, expected in [(0, [True, True, True]), (1, [False, True, False])]:
        changed = noisy.clone()
        changed[:, v] += 1
        assert ((model(changed, sigma, cond) - before).abs().amax((0, 2, 3, 4, 5, 6)) > 1e-5).tolist() == expected


@torch.no_grad()
def test_more_views_change_nothing_for_the_others():
    model = built(attention=True)
    noisy, sigma, cond, _ = inputs(V=4)
    four = model(noisy, sigma, cond)
    for v in (1, 2, 3):
        pair = [0, v]
        assert torch.allclose(model(noisy[:, pair], sigma, cond[:, pair]), four[:, pair], atol=1e-4)


@torch.no_grad()
def test_cross_view_attention_stays_within_a_frame():
    layer = randomise(CrossViewAttention(16, 2, 8))
    x, reference = torch.randn(6, 16, 3, 4), torch.randn(3, 16, 3, 4)        # 2 other views, 3 frames
    before = layer(x, reference)
    reference[1] = torch.randn(16, 3, 4)
    moved = (layer(x, reference) - before).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [False, True, False, False, True, False]


@torch.no_grad()
def test_cross_view_attention_knows_positions():
    """Without the sine positions, shuffling the reference's cells would change nothing."""
    x, reference = torch.randn(1, 16, 3, 4), torch.randn(1, 16, 3, 4)
    shuffled = reference.flatten(2)[..., torch.randperm(12)].view(reference.shape)
    for norm in (True, False):
        layer = randomise(CrossViewAttention(16, 2, 8, norm))
        assert torch.allclose(layer(x, reference), layer(x, shuffled), atol=1e-5) == (not norm)


@torch.no_grad()
def test_image_embedding_by_view():
    """Each stream sees the embedding of its own view, RGB and pointmap alike."""
    model = built(WITH_CLIP, mv_attention='none')
    noisy, sigma, cond, embeds = inputs(clip=True)
    before = model(noisy, sigma, cond, embeds)
    for v in range(2):
        changed = embeds.clone()
        changed[:, v] += 1
        moved = (model(noisy, sigma, cond, changed) - before).abs().amax((0, 3, 4, 5, 6)) > 1e-5
        assert moved.tolist() == [[v == 0] * 2, [v == 1] * 2]


@torch.no_grad()
def test_frame_index():
    model = built()
    noisy, sigma, cond, _ = inputs()
    assert torch.equal(model(noisy, sigma, cond), model(noisy, sigma, cond, frame_index=torch.arange(3).repeat(2, 1)))
    one = noisy[:, :, :, :1]
    early, late = (model(one, sigma, cond, frame_index=torch.full((2, 1), i)) for i in (0, 7))
    assert (early - late).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize('size', [(4, 5), (5, 7), (1, 3)])
def test_any_latent_size(size):
    noisy, sigma, cond, _ = inputs(h=size[0], w=size[1])
    assert built()(noisy, sigma, cond).shape == noisy.shape


def test_every_trainable_parameter_gets_a_gradient():
    """Or data-parallel training stops. One context token: queries and keys of the attention to it are frozen, as they
    cannot change the output."""
    for switches in SWITCHES:
        model = built(attention=True, **switches).train()
        noisy, sigma, cond, _ = inputs(S=2 - model.rgb_only)
        model(noisy, sigma, cond).square().mean().backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
            frozen = 'transformer' in name and any(part in name for part in ('attn2.to_q', 'attn2.to_k', 'norm2'))
            assert p.requires_grad != frozen, name


def test_checkpointing_changes_memory_only():
    model = built(attention=True).train()
    noisy, sigma, cond, _ = inputs()
    gradients = []
    for on in (False, True):
        model.checkpointing = on
        model.zero_grad()
        model(noisy, sigma, cond).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert model.decoder_b.checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@torch.no_grad()
def test_half_precision():
    model = built(attention=True)
    noisy, sigma, cond, _ = inputs()
    full = model(noisy, sigma, cond)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(noisy, sigma, cond)
    half = model.to(torch.bfloat16)(noisy, sigma, cond)
    for result in (mixed, half):
        assert result.dtype == torch.float32
        assert (result - full).square().mean().sqrt() < 0.03 * full.square().mean().sqrt()


def test_wrong_use():
    with pytest.raises(ValueError, match='rgb_only'):
        Model4D(SMALL, mv_attention='rgb')
    with pytest.raises(ValueError, match='mv_attention'):
        Model4D(SMALL, mv_attention='points2')
    noisy, sigma, cond, embeds = inputs(clip=True)
    with pytest.raises(ValueError, match='streams'):
        built()(noisy[:, :, :1], sigma, cond[:, :, :1])
    with pytest.raises(ValueError, match='image_embeds'):
        built()(noisy, sigma, cond, embeds)
    with pytest.raises(ValueError, match='image_embeds'):
        built(WITH_CLIP)(noisy, sigma, cond)
    with pytest.raises(ValueError, match='block_out_channels'):
        UNet.from_config({})


@pytest.mark.parametrize('name', ['tiny', 'small'])
def test_presets_from_scratch(name):
    preset = PRESETS[name]
    factor = preset.vae['patch_size'] * 2 ** (len(preset.vae['block_out_channels']) - 1)
    channels, h, w = preset.vae['latent_channels'], preset.height // factor, preset.width // factor
    assert (factor, preset.unet['in_channels'], preset.unet['out_channels']) == (8, 2 * channels, channels)
    model = Model4D(preset)
    noisy = torch.randn(1, 2, 2, 1, channels, h, w)
    assert torch.allclose(model(noisy, torch.ones(1), noisy[:, :, :, 0]), noisy / 2)     # fresh: F_x = 0
