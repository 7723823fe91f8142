"""Stage 1: shapes, losses, latent scale, training that resumes to the bit, the released layout."""
import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data as D
import model as M
import vae as V

SMALL = dict(block_out_channels=[16], layers_per_block=1, latent_channels=4, norm_num_groups=4, patch_size=4,
             scaling_factor=1.0)


def make_data(folder, episodes=2, cameras=3, frames=12, size=(16, 24)):
    """Packed episodes of smooth random pictures, with some depth missing and a gripper that moves."""
    H, W = size
    v, u = np.mgrid[:H, :W]
    for number in range(episodes):
        r = np.random.default_rng(number)
        phase = r.uniform(0, 6, (cameras, frames, 1, 1, 3))
        rgb = 127 + 100 * np.sin(0.3 * u[..., None] + phase + np.arange(3)) * np.cos(0.2 * v[..., None])
        depth = 900 + 200 * np.sin(0.2 * u + phase[..., 0]) + 5 * v
        depth[..., :3, :4] = 0
        cam_in_world = np.tile(np.eye(4), (cameras, 1, 1))
        cam_in_world[:, :3, 3] = r.uniform(-0.2, 0.2, (cameras, 3))
        gripper = np.tile(np.eye(4), (frames, 2, 1, 1))
        gripper[:, 0, 0, 3] = 0.05 * np.arange(frames)
        intrinsics = np.tile([[20.0, 0, W / 2 - 0.5], [0, 20, H / 2 - 0.5], [0, 0, 1]], (cameras, 1, 1))
        D.save_episode(folder / f"episode_{number:03d}", rgb.astype(np.uint8), depth.astype(np.uint16),
                       np.zeros(depth.shape, np.uint8), intrinsics, cam_in_world, gripper, np.zeros((frames, 2)),
                       np.arange(frames) / 2, dict(task=1, source="test", rate_hz=2.0))


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    make_data(folder)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """The tiny preset, made tinier."""
    preset = dataclasses.replace(M.PRESETS["tiny"], height=16, width=24, vae=SMALL)
    monkeypatch.setitem(M.PRESETS, "tiny", preset)
    monkeypatch.setattr(V, "HELD_OUT", 2)
    monkeypatch.setattr(V, "STATISTICS", 8)
    return preset


def flags(data, out, **more):
    given = dict(task=1, preset="tiny", data=data, out=out, steps=6, pointmap_steps=4, batch=2, video_every=3,
                 device="cpu", **more)
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


# ------------------------------------------------------------------------------------------------------------ networks

@pytest.mark.parametrize("widths, layers, patch, cell", [([8], 1, 4, 4), ([8, 16], 2, 1, 2), ([8, 16, 16], 1, 2, 8)])
def test_shapes(widths, layers, patch, cell):
    vae = V.VAE(dict(block_out_channels=widths, layers_per_block=layers, latent_channels=5, norm_num_groups=4,
                     patch_size=patch))
    mean, logvar = vae.encode(torch.rand(6, 3, 3 * cell, 5 * cell))
    assert mean.shape == logvar.shape == (6, 5, 3, 5)
    for frames in (1, 2, 6):
        assert vae.decode(mean, frames).shape == (6, 3, 3 * cell, 5 * cell)


def test_temporal_convolution_is_conv3d():
    conv = V.TemporalConv(4, 6).double()
    for frames in (1, 2, 5):
        x = torch.randn(2, 4, frames, 7, dtype=torch.float64)
        expected = torch.nn.Conv3d.forward(conv, x[..., None])[..., 0]
        assert (conv(x) - expected).abs().max() < 1e-13


def test_frames_of_other_clips_do_not_mix():
    torch.manual_seed(0)
    vae = V.VAE(SMALL).double().eval()
    z = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    changed = z.clone()
    changed[3:] += 1
    assert torch.equal(vae.decode(z, 3)[:3], vae.decode(changed, 3)[:3])
    assert not torch.allclose(vae.decode(z, 6)[:3], vae.decode(changed, 6)[:3])


def test_bad_input_is_named():
    vae = V.VAE(SMALL)
    with pytest.raises(ValueError, match="18 x 24 must be multiples of 4"):
        vae.encode(torch.zeros(1, 3, 18, 24))
    with pytest.raises(ValueError, match="5 latents are not a whole number of clips of 2"):
        vae.decode(torch.zeros(5, 4, 2, 2), 2)
    with pytest.raises(ValueError, match="multiples of norm_num_groups 32"):
        V.VAE(dict(SMALL, norm_num_groups=32))
    with pytest.raises(ValueError, match="latent_channels"):
        V.VAE(dict(block_out_channels=[32], layers_per_block=1))


# ------------------------------------------------------------------------------------------------------------ training

def test_loss_ignores_invalid_pixels():
    target, valid = torch.zeros(2, 3, 4, 4), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    prediction = torch.where(valid, 0.25, torch.nan).expand(-1, 3, -1, -1).clone().requires_grad_()
    loss = V.masked_l1(prediction, target, valid)
    assert loss.item() == pytest.approx(0.25)
    wild = torch.where(valid, 0.25, 1e6).expand(-1, 3, -1, -1).clone().requires_grad_()
    V.masked_l1(wild, target, valid).backward()
    assert (wild.grad[~valid.expand(-1, 3, -1, -1)] == 0).all() and (wild.grad[valid.expand(-1, 3, -1, -1)] > 0).all()


def test_kl_is_that_of_two_normals():
    mean, logvar = torch.tensor([[[[0.5, -1.0]]]]), torch.tensor([[[[0.3, -2.0]]]])
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()),
                                                 torch.distributions.Normal(0.0, 1.0)).sum()
    assert V.kl_from_normal(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-6)
    assert V.kl_from_normal(torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)) == 0


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_orthogonal_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix = matrix @ torch.diag(torch.logspace(0, -1.5, shape[1]))
    values = torch.linalg.svdvals(V.orthogonal(matrix))
    assert values.max() < 1.3 and values.min() > 0.5
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert F.cosine_similarity(V.orthogonal(matrix).flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_latents_are_standardised_and_come_back():
    torch.manual_seed(0)
    vae = V.VAE(SMALL).double().eval()
    images = torch.rand(8, 3, 16, 24, dtype=torch.float64) * torch.linspace(0.2, 1, 8)[:, None, None, None]
    V.standardise(vae, images.split(4))
    with torch.no_grad():
        latents = V.encode_latents(vae, images)
        assert latents.mean((0, 2, 3)).abs().max() < 1e-5 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-2
        assert torch.allclose(V.decode_latents(vae, latents, 4), vae.decode(vae.encode(images)[0], 4))


def test_pointmaps_are_trained_on_in_both_frames(episodes):
    clip = D.Clips(episodes, "train", (16, 24), single=True)[0]
    samples = V.images_of(clip, "pointmap", slice(None), observed=True)
    images, valid = (torch.cat(part) for part in zip(*samples))
    assert images.shape == (5, 3, 16, 24) and not valid[:, :, :3, :4].any()
    assert torch.equal(images[0], clip["points"][0, 0]) and torch.equal(images[2], clip["points"][1, 0])
    assert torch.equal(images[4], clip["own_points"][1]) and not torch.equal(images[4], images[2])
    assert torch.cat([v for _, v in V.images_of(clip, "rgb", slice(None))]).all()


def test_interrupted_training_resumes_to_the_bit(episodes, tiny, tmp_path, monkeypatch):
    V.main(flags(episodes, tmp_path / "whole"))

    save_state = V.save_state

    def save_and_terminate(*arguments):
        save_state(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(V, "save_state", save_and_terminate)
        with pytest.raises(SystemExit, match="stopped at step 2 of vae rgb"):
            V.main(flags(episodes, tmp_path / "parts", save_every=2))
    with pytest.raises(ValueError, match="was started with seed 0, not 5"):
        V.main(flags(episodes, tmp_path / "parts", seed=5))
    V.main(flags(episodes, tmp_path / "parts"))
    for kind in V.KINDS:
        whole, parts = (tmp_path / name / f"vae_{kind}.safetensors" for name in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
        infos = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, parts)]
        assert infos[0]["shift"] == infos[1]["shift"] and infos[0]["scores"] == infos[1]["scores"]
        entries = [json.loads(line) for line in (tmp_path / "parts" / f"vae_{kind}.jsonl").read_text().splitlines()]
        steps = [entry["step"] for entry in entries if "step" in entry]
        assert steps == sorted(set(steps)) and steps[-1] == (5 if kind == "rgb" else 3)
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert left == {f"vae_{kind}{end}" for kind in V.KINDS
                    for end in (".safetensors", ".json", ".jsonl", ".png", ".loss.png")}

    vae = V.load_vae(tmp_path / "parts" / "vae_pointmap.safetensors")
    with torch.no_grad():
        assert V.encode_latents(vae, torch.zeros(2, 3, 16, 24)).shape == (2, 4, 4, 6)


def test_training_from_random_weights_lowers_the_error(episodes, tiny, tmp_path, monkeypatch):
    levels = dict(SMALL, block_out_channels=[8, 16], patch_size=2)
    monkeypatch.setitem(M.PRESETS, "tiny", dataclasses.replace(tiny, vae=levels))
    monkeypatch.setattr(V, "WARMUP", 2)
    V.main(flags(episodes, tmp_path) + ["--steps", "40", "--lr", "0.03"])
    entries = [json.loads(line) for line in (tmp_path / "vae_rgb.jsonl").read_text().splitlines()]
    errors = [entry["error"] for entry in entries if "error" in entry]
    assert errors[-1] < 0.7 * errors[0]


def test_loading_says_what_is_wrong(tmp_path):
    path = tmp_path / "vae_rgb.safetensors"
    with pytest.raises(ValueError, match="vae_rgb.json is missing: train the VAEs first"):
        V.load_vae(path)
    vae = V.VAE(SMALL)
    vae.shift = [0.5] * 4
    V.save_vae(path, vae, dict(kind="rgb"))
    assert V.load_vae(path).shift == vae.shift
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        V.load_vae(path)


@pytest.mark.parametrize("wrong, message", [
    (["--preset", "huge"], "--preset"), (["--steps", "0"], "--steps must be at least 1"),
    (["--video_frames", "12"], "--video_frames is 1 to 11"), (["--task", "9"], "--task")])
def test_wrong_flags_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        V.main(wrong)


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for preset in V.PRESET_OPTIONS:
        V.main(["--preset", preset, "--dry_run"])
    assert "latents of 4 x 32 x 40" in capsys.readouterr().out and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- the released checkpoints

def sgm_layout(widths, layers):
    """Key names of sgm's VAE, written down from its regular layout, independently of the map that is tested."""
    norm_conv = [f"{part}.{kind}" for part in ("norm1", "conv1", "norm2", "conv2") for kind in ("weight", "bias")]
    stack = [f"time_stack.{part}.{kind}" for part in ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3")
             for kind in ("weight", "bias")] + ["mix_factor"]
    shortcut = ["nin_shortcut.weight", "nin_shortcut.bias"]
    attention = [f"{part}.{kind}" for part in ("norm", "q", "k", "v", "proj_out") for kind in ("weight", "bias")]
    ends = [f"{part}.{kind}" for part in ("conv_in", "norm_out", "conv_out") for kind in ("weight", "bias")]
    outer = ("quant_conv", "decoder.conv_out.time_mix_conv")
    keys = [f"{part}.{kind}" for part in outer for kind in ("weight", "bias")]
    for half in ("encoder", "decoder"):
        block = norm_conv + (stack if half == "decoder" else [])
        keys += [f"{half}.{key}" for key in ends]
        middle = (("block_1", block), ("attn_1", attention), ("block_2", block))
        keys += [f"{half}.mid.{name}.{key}" for name, part in middle for key in part]
        for level in range(len(widths)):
            below = level + 1 if half == "decoder" else level - 1                # where the level's input comes from
            wider = 0 <= below < len(widths) and widths[below] != widths[level]
            up = half == "decoder"
            name, sampler, count = ("up", "upsample", layers + 1) if up else ("down", "downsample", layers)
            for j in range(count):
                parts = block + (shortcut if j == 0 and wider else [])
                keys += [f"{half}.{name}.{level}.block.{j}.{key}" for key in parts]
            if (level > 0 if half == "decoder" else level < len(widths) - 1):
                keys += [f"{half}.{name}.{level}.{sampler}.conv.{kind}" for kind in ("weight", "bias")]
    return keys


def test_released_names_are_a_bijection():
    config = M.PRESETS["svd"].vae
    with torch.device("meta"):
        names = V.released_names(V.VAE(config))
    expected = sgm_layout(config["block_out_channels"], config["layers_per_block"])
    assert len(set(names.values())) == len(names) == len(expected) == 374 and set(names.values()) == set(expected)


def test_released_checkpoint_loads(tmp_path):
    config = dict(block_out_channels=[8, 16], layers_per_block=2, latent_channels=4, norm_num_groups=4)
    torch.manual_seed(0)
    vae = V.VAE(config).eval()
    with torch.no_grad():
        vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
        vae.quant_conv.bias.zero_()
    names = V.released_names(vae)
    state = {}
    for key, value in vae.state_dict().items():
        is_projection = ".attn_1." in names[key] and value.ndim == 2
        state["first_stage_model." + names[key]] = value[:, :, None, None].clone() if is_projection else value.clone()
    del state["first_stage_model.quant_conv.weight"], state["first_stage_model.quant_conv.bias"]
    state["loss.discriminator.weight"] = torch.zeros(3)
    torch.save(dict(state_dict=state, epoch=3), tmp_path / "pointmap.ckpt")
    loaded = V.load_released(tmp_path / "pointmap.ckpt", config)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in vae.state_dict().items())

    for change, message in ((lambda s: s.update({"encoder.odd": torch.zeros(1)}), "unexpected key encoder.odd"),
                            (lambda s: s.pop("first_stage_model.decoder.mid.block_1.mix_factor"),
                             "missing key decoder.mid.block_1.mix_factor"),
                            (lambda s: s.update({"first_stage_model.encoder.conv_in.bias": torch.zeros(9)}),
                             r"encoder.conv_in.bias has shape \[9\]")):
        broken = dict(state)
        change(broken)
        torch.save(dict(state_dict=broken), tmp_path / "broken.ckpt")
        with pytest.raises(ValueError, match=message):
            V.load_released(tmp_path / "broken.ckpt", config)
