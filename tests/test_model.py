"""The 4D model: stream routing, two decoders, cross-view attention, ablations. Small networks with random weights."""
import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from bench_gpu import in_int8
from model import (PRESETS, CrossViewAttention, GroupNorm, Model4D, Preset, UNet, choose_preset, fresh, load_weights,
                   precondition, unet_config)

SMALL = Preset("small test", 32, 40, view_heads=2, view_head_dim=8, vae={},
               unet={**unet_config((16, 32), heads=(1, 2), layers=1, latent_channels=4, context=12, groups=8,
                                   attention_levels=1), "out_channels": 4})
WITH_CLIP = dataclasses.replace(SMALL, clip={}, unet={**SMALL.unet, "temporal_on_stills": True})
SWITCHES = [dict(), dict(mv_attention="none"), dict(rgb_only=True), dict(rgb_only=True, mv_attention="rgb")]


@torch.no_grad()
def randomise(module, scale=0.15):
    torch.manual_seed(0)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape) * scale + (p.ndim == 1) * 0.5)
    return module.eval()


def built(preset=SMALL, attention=False, **switches):
    """A model whose decoders are copies of one random U-Net; attention: with random cross-view attention as well."""
    net = Model4D(preset, unet=randomise(UNet(preset.unet)), **switches)
    if attention:
        randomise(net.cross_view, 0.4)
    return net.eval()


def inputs(B=2, V=2, S=2, T=3, h=4, w=5, clip=False, C=4):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(B, V, S, T, C, h, w, generator=generator)
    cond = torch.randn(B, V, S, C, h, w, generator=generator)
    return noisy, torch.linspace(0.5, 20, B), cond, torch.randn(B, V, 12, generator=generator) if clip else None


def moved(net, before, noisy, *rest):
    """(V, S) bool: the streams whose output is not what it was."""
    return (net(noisy, *rest) - before).abs().amax((0, 3, 4, 5, 6)) > 1e-5


# --------------------------------------------------------------------------------------------------- streams and views

@torch.no_grad()
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("switches", SWITCHES)
def test_new_model_is_the_plain_unet(switches, views):
    """Zero-initialised attention and copied decoder: every stream is exactly what the U-Net alone computes for it."""
    net = built(WITH_CLIP, **switches)
    assert len({p.data_ptr() for p in net.parameters()}) == len(list(net.parameters()))      # decoder B is a real copy
    noisy, sigma, cond, embeds = inputs(V=views, S=2 - net.rgb_only, clip=True)
    result = net(noisy, sigma, cond, embeds)
    assert result.shape == noisy.shape
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1, 1, 1) for c in precondition(sigma))
    ids = torch.tensor([[6, 127, 0.02]]).repeat(len(sigma), 1)
    for v in range(views):
        for s in range(noisy.shape[2]):
            x = noisy[:, v, s]
            sample = torch.cat([c_in * x, cond[:, v, s, None].expand(x.shape)], 2)
            D_x = c_skip * x + c_out * net.unet(sample, c_noise.flatten(), embeds[:, v, None], ids)
            assert (result[:, v, s] - D_x).abs().max() < 1e-5 * D_x.abs().max(), (v, s)


@torch.no_grad()
@pytest.mark.parametrize("switches", [dict(), dict(rgb_only=True, mv_attention="rgb")])
def test_attention_runs_one_way_from_the_reference(switches):
    """The reference's pointmap (its RGB in the ablation) moves the other views'; nothing else moves another stream."""
    net = built(attention=True, **switches)
    noisy, sigma, cond, _ = inputs(V=3, S=2 - net.rgb_only)
    before, last = net(noisy, sigma, cond), noisy.shape[2] - 1
    for v in range(3):
        for s in range(last + 1):
            changed, expected = noisy.clone(), torch.zeros(3, last + 1, dtype=torch.bool)
            changed[:, v, s] += 1
            expected[v, s] = True
            if (v, s) == (0, last):
                expected[:, last] = True
            assert torch.equal(moved(net, before, changed, sigma, cond), expected), (v, s)


@torch.no_grad()
@pytest.mark.parametrize("tokens, expected", [("view", [[[1, 1], [0, 0]], [[0, 0], [1, 1]]]),
                                              ("crossed", [[[0, 1], [0, 1]], [[1, 0], [1, 0]]])])
def test_whose_token_a_stream_sees(tokens, expected):
    """Its own view's; in the released weights RGB streams see view 1's and pointmaps view 0's."""
    net = built(dataclasses.replace(WITH_CLIP, tokens=tokens), mv_attention="none")
    noisy, sigma, cond, embeds = inputs(clip=True)
    before = net(noisy, sigma, cond, embeds)
    for v in range(2):
        changed = embeds.clone()
        changed[:, v] += 1
        assert moved(net, before, noisy, sigma, cond, changed).int().tolist() == expected[v]


@torch.no_grad()
def test_cross_view_attention_stays_within_a_frame_and_knows_positions():
    layer = randomise(CrossViewAttention(16, 2, 8))
    x, reference = torch.randn(6, 16, 3, 4), torch.randn(3, 16, 3, 4)        # 2 other views, 3 frames
    before = layer(x, reference)
    reference[1] = torch.randn(16, 3, 4)
    change = (layer(x, reference) - before).abs().amax((1, 2, 3)) > 1e-6
    assert change.tolist() == [False, True, False, False, True, False]
    shuffled = reference.flatten(2)[..., torch.randperm(12)].view(reference.shape)
    for norm in (True, False):                                               # positions come with the norms
        layer = randomise(CrossViewAttention(16, 2, 8, norm))
        assert torch.allclose(layer(x, reference), layer(x, shuffled), atol=1e-5) == (not norm)


# ------------------------------------------------------------------------------------------------------ time, stills

@torch.no_grad()
def test_frame_index():
    for preset in (SMALL, dataclasses.replace(SMALL, unet=WITH_CLIP.unet)):  # stills without and with layers along time
        net = built(preset)
        noisy, sigma, cond, _ = inputs()
        counted = net(noisy, sigma, cond, frame_index=torch.arange(3).repeat(2, 1))
        assert torch.equal(net(noisy, sigma, cond), counted)
        one = noisy[:, :, :, :1]
        early, late = (net(one, sigma, cond, frame_index=torch.full((2, 1), i)) for i in (0, 7))
        assert (early - late).abs().max() > 1e-4


@torch.no_grad()
def test_stills_skip_the_layers_along_time():
    noisy, sigma, cond, _ = inputs(T=1)
    for on, preset in ((False, SMALL), (True, dataclasses.replace(SMALL, unet=WITH_CLIP.unet))):
        net = built(preset)
        before = net(noisy, sigma, cond)
        for name, p in net.named_parameters():
            if "temporal" in name:
                p.add_(0.3)
        assert torch.equal(net(noisy, sigma, cond), before) != on


@torch.no_grad()
def test_a_fresh_clip_is_frames_one_by_one():
    """So that training can begin on stills: here all but the layers along time is random, and these are fresh."""
    net = built()
    start = fresh(UNet(SMALL.unet)).state_dict()
    net.unet.load_state_dict({key: value for key, value in start.items() if "temporal" in key}, strict=False)
    net.copy_decoder()
    noisy, sigma, cond, _ = inputs()
    clip = net(noisy, sigma, cond)
    for t in range(3):
        still = net(noisy[:, :, :, t:t + 1], sigma, cond, frame_index=torch.full((2, 1), t))
        assert torch.allclose(still, clip[:, :, :, t:t + 1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_attention_at_any_level_and_any_latent_size(levels):
    unet = unet_config((16, 32), (2, 2), 1, 4, 12, 8, levels) | {"out_channels": 4}
    preset = dataclasses.replace(SMALL, unet=unet)
    net = built(preset)
    assert [len(block.attentions) > 0 for block in net.unet.down_blocks] == [level < levels for level in (0, 1)]
    for h, w in [(8, 10), (16, 20), (5, 7), (1, 3)]:
        noisy, sigma, cond, _ = inputs(B=1, T=2, h=h, w=w)
        assert net(noisy, sigma, cond).shape == noisy.shape


# ---------------------------------------------------------------------------------------------------------- training

def test_every_trainable_parameter_gets_a_gradient():
    """Or data-parallel training stops. One context token: queries and keys of the attention to it are frozen, as they
    cannot change the output. On stills the layers along time get none."""
    for switches in SWITCHES:
        for T in (3, 1):
            net = built(attention=True, **switches).train()
            noisy, sigma, cond, _ = inputs(S=2 - net.rgb_only, T=T)
            net(noisy, sigma, cond).square().mean().backward()
            for name, p in net.named_parameters():
                skipped = T == 1 and ("temporal" in name or "resnets" in name and "time_mixer" in name)
                assert (p.grad is not None) == (p.requires_grad and not skipped), name
                frozen = "transformer" in name and any(part in name for part in ("attn2.to_q", "attn2.to_k", "norm2"))
                assert p.requires_grad != frozen, name


def test_checkpointing_changes_memory_only():
    net = built(attention=True).train()
    noisy, sigma, cond, _ = inputs()
    gradients = []
    for on in (False, True):
        net.checkpointing = on
        net.zero_grad()
        net(noisy, sigma, cond).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert net.checkpointing and net.decoder_b.checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@torch.no_grad()
def test_half_precision():
    net = built(attention=True)
    noisy, sigma, cond, _ = inputs()
    full = net(noisy, sigma, cond)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(noisy, sigma, cond)
    for result in (mixed, net.to(torch.bfloat16)(noisy, sigma, cond)):
        assert result.dtype == torch.float32
        assert (result - full).square().mean().sqrt() < 0.03 * full.square().mean().sqrt()


@torch.no_grad()
def test_weights_in_a_byte_a_number(tmp_path):
    """What tests/bench_gpu.py brings back is loaded as what it was, to a hundredth, and to the dtype asked for."""
    net, pieces = built(attention=True), {}
    for name, value in net.state_dict().items():
        pieces |= in_int8(name, value)
    save_file(pieces, tmp_path / "model.safetensors")
    with torch.device("meta"):
        again = Model4D(SMALL)
    load_weights(again, [tmp_path / "model.safetensors"])
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.01 * a.norm()
    noisy, sigma, cond, _ = inputs()
    full, made = net(noisy, sigma, cond), again.eval()(noisy, sigma, cond)
    assert (made - full).square().mean().sqrt() < 0.03 * full.square().mean().sqrt()


@torch.no_grad()
def test_norm_by_sums():
    """A GPU's way for large images gives PyTorch's numbers, also where the mean is far from zero."""
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
        norm = randomise(GroupNorm(4, 32, eps=1e-6)).to(dtype)
        x = (torch.randn(3, 32, 6, 7) * 2 + 5).to(dtype).contiguous(memory_format=torch.channels_last)
        right = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
        made = norm.by_sums(x)
        assert (made - right).norm() < most * right.norm() and made.dtype == dtype
        assert made.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------- noise levels, presets

def test_precondition():
    """What a perfect network answers, given the scalings, is the clean latent."""
    sigma = torch.tensor([0.002, 0.5, 1.0, 30.0, 700.0], dtype=torch.float64)
    clean, noise = torch.randn(2, 5, dtype=torch.float64)
    x, total = clean + sigma * noise, (sigma ** 2 + 1).sqrt()
    c_skip, c_out, c_in, c_noise = precondition(sigma)
    assert (c_skip * x + c_out * (noise - sigma * clean) / total - clean).abs().max() < 1e-10
    assert (c_in * total - 1).abs().max() < 1e-12 and torch.equal(c_noise, sigma.log() / 4)


@torch.no_grad()
@pytest.mark.parametrize("name, device", [("tiny", "cpu"), ("small", "meta")])
def test_presets_from_scratch(name, device):
    preset = PRESETS[name]
    cell, C = preset.vae["patch_size"], preset.vae["components"]
    noisy, sigma, cond, _ = inputs(1, T=1, h=preset.height // cell, w=preset.width // cell, C=C)
    with torch.device(device):
        net = Model4D(preset)
    D_x = net(noisy.to(device), sigma.to(device), cond.to(device))
    assert D_x.shape == noisy.shape
    assert device == "meta" or torch.equal(D_x, cond[:, :, :, None])         # fresh: nothing changes from what was seen


def test_auto_never_picks_svd(monkeypatch):
    assert choose_preset()[0] == "tiny" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
    for gib, expected in ((8, "tiny"), (24, "small"), (140, "small")):
        properties = type("Properties", (), dict(total_memory=gib * 2 ** 30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        assert choose_preset()[0] == expected


def test_wrong_use():
    noisy, sigma, cond, embeds = inputs(clip=True)
    for words, use in [("rgb_only", lambda: Model4D(SMALL, mv_attention="rgb")),
                       ("mv_attention", lambda: Model4D(SMALL, mv_attention="points2")),
                       ("streams", lambda: built()(noisy[:, :, :1], sigma, cond[:, :, :1])),
                       ("image_embeds", lambda: built()(noisy, sigma, cond, embeds)),
                       ("image_embeds", lambda: built(WITH_CLIP)(noisy, sigma, cond))]:
        with pytest.raises(ValueError, match=words):
            use()
