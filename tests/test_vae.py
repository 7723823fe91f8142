"""Stage 1: the linear code, SVD's VAE, and the command that makes both kinds. Packed episodes are stood in for."""
from types import SimpleNamespace

import pytest
import torch

import data
import vae
from vae import VAE, LinearCode, images_of, load_vae, masked_l1, moment, save_vae

SMALL = dict(block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4)
LINEAR = dict(patch_size=4, components=12)


class Clips:
    """As data.Clips: smooth random pictures, functions of (split, i), with depth missing in a corner."""
    held_out = True

    def __init__(self, folder, split, size, views=2, frames=10, single=False, seed=0):
        self.key, self.size, self.frames = seed + 500 * (split == "test"), size, 2 if single else frames + 1

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(self.key * 10 ** 6 + i)
        coarse = torch.randn(2 * self.frames + 2, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, self.size, mode="bicubic").tanh()
        valid = torch.ones(2, self.frames, *self.size, dtype=torch.bool)
        valid[..., :3, :4] = False
        videos = smooth[2:].unflatten(0, (2, self.frames))
        return dict(rgb=videos, points=videos * 0.5, own_points=smooth[:2] * 0.5, valid=valid)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """tmp_path with a preset `tiny` made tinier, and a hub folder with a small VAE for `svd`."""
    (tmp_path / "packed/one").mkdir(parents=True)
    (tmp_path / "packed/one/episode.json").write_text("{}")
    monkeypatch.setattr(data, "Clips", Clips)
    for name, config in (("tiny", LINEAR), ("svd", SMALL)):
        monkeypatch.setitem(vae.PRESETS, name, SimpleNamespace(name=name, height=16, width=24, vae=config))
    monkeypatch.setattr(vae, "FIT_CLIPS", 20)
    monkeypatch.setattr(vae, "HELD_OUT", 3)
    torch.manual_seed(0)
    save_vae(tmp_path / "hub/vae/model.safetensors", VAE(SMALL), {})
    data.write_json(tmp_path / "hub/vae/config.json", SMALL)
    return tmp_path


def run(stage, out, *flags):
    vae.main(["--data", str(stage / "packed"), "--out", str(stage / out), *flags])


# ---------------------------------------------------------------------------------------------------- the linear code

@torch.no_grad()
def test_linear_code_is_the_best_there_is():
    """Its error is the variance of what it leaves out, which no other 12 directions undercut; latents have unit
    variance, and what they can hold comes back exactly."""
    images = Clips(None, "train", (16, 24))[0]["rgb"].flatten(0, 1).double()
    code = LinearCode(LINEAR).double().fit([images[:7], images[7:]])
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)
    variance = torch.linalg.eigvalsh((patches - patches.mean(0)).T.cov(correction=0))
    latents = code.encode_latents(images)
    assert latents.shape == (22, 12, 4, 6) and abs(latents.square().mean().sqrt() - 1) < 1e-9
    error = (code.decode_latents(latents, 11) - images).square().mean() * 48
    assert abs(error - variance[:-12].sum()) < 1e-9
    code.basis.copy_(torch.linalg.qr(torch.randn(48, 12, dtype=torch.float64))[0].T.reshape(code.basis.shape))
    assert (code.decode_latents(code.encode_latents(images), 11) - images).square().mean() * 48 > 2 * error
    assert (code.encode_latents(code.decode_latents(latents)) - latents).abs().max() < 1e-9


@torch.no_grad()
def test_linear_code_stays_in_float32():
    images = Clips(None, "train", (16, 24))[0]["points"].flatten(0, 1)
    code = LinearCode(LINEAR).fit([images])
    expected = code.decode_latents(code.encode_latents(images), 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code.decode_latents(code.encode_latents(images), 11), expected)
    assert torch.equal(code.bfloat16().decode_latents(code.encode_latents(images), 11), expected)
    assert code.double().basis.dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------- SVD's VAE

@torch.no_grad()
def test_vae_shapes_scale_and_frames():
    torch.manual_seed(0)
    coder, images = VAE(SMALL).double().eval(), torch.rand(6, 3, 6, 10, dtype=torch.float64)
    latents, mean = coder.encode_latents(images), coder.encode(images)[0]
    assert latents.shape == (6, 4, 3, 5) and torch.equal(coder.encode_condition(images), mean)
    assert torch.equal(latents, mean * 0.18215)                              # SVD's condition is not scaled
    video = coder.decode_latents(latents, 3)
    assert video.shape == images.shape and torch.allclose(video, coder.decode(mean, 3))
    changed = latents.clone()
    changed[3:] += 1
    assert torch.equal(coder.decode_latents(changed, 3)[:3], video[:3])      # clips do not mix,
    assert not torch.allclose(coder.decode_latents(changed, 6)[:3], coder.decode_latents(latents, 6)[:3])   # frames do


def test_bad_input_is_named(tmp_path):
    for coder in (VAE(SMALL), LinearCode(LINEAR)):
        with pytest.raises(ValueError, match=f"15x24 .* multiples of {coder.cell}"):
            coder.encode_latents(torch.zeros(1, 3, 15, 24))
    with pytest.raises(ValueError, match="5 latents are not a whole number of clips of 2"):
        VAE(SMALL).decode(torch.zeros(5, 4, 2, 2), 2)
    path = tmp_path / "vae_rgb.safetensors"
    with pytest.raises(ValueError, match="vae_rgb.json is missing: make it first"):
        load_vae(path)
    for coder in (VAE({**SMALL, "target_encoder": True}), LinearCode(LINEAR)):
        save_vae(path, coder, dict(kind="rgb"))
        back = load_vae(path)
        assert type(back) is type(coder) and back.config == coder.config
        assert all(torch.equal(value, coder.state_dict()[key]) for key, value in back.state_dict().items())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_vae(path)


# -------------------------------------------------------------------------------------------------------- the command

def test_invalid_pixels_do_not_count():
    target, valid = torch.zeros(2, 3, 4, 4), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    made = torch.where(valid, 0.25, 1e6).expand(-1, 3, -1, -1).clone().requires_grad_()
    loss = masked_l1(made, target, valid)
    loss.backward()
    assert loss.item() == pytest.approx(0.25) and not made.grad[~valid.expand(-1, 3, -1, -1)].any()


def test_pointmaps_of_both_frames():
    clip = Clips(None, "train", (16, 24), single=True)[0]
    images, valid = images_of(clip, "pointmap")
    assert images.shape == (5, 3, 16, 24) and not valid[:, :, :3, :4].any()
    assert torch.equal(images[:4], clip["points"].flatten(0, 1)) and torch.equal(images[4], clip["own_points"][1])
    clip = Clips(None, "train", (16, 24))[0]
    for step, expected in ((4, clip["own_points"]), (5, clip["points"][:, 2:5].flatten(0, 1))):
        images, valid, frames = moment(clip, step, 3)
        assert torch.equal(images, expected) and frames == (3 if step % 2 else 1)
        assert valid.shape == (len(images), 1, 16, 24) and not valid[..., :3, :4].any()


def test_scores_of_a_code_with_a_known_error():
    off = SimpleNamespace(encode_latents=lambda x: x, decode_latents=lambda x, frames: x + 0.02)
    clips = Clips(None, "test", (16, 24), single=True)
    assert vae.evaluate(off, "pointmap", clips, "cpu")["median_mm"] == pytest.approx(30 * 3 ** 0.5, rel=1e-3)
    assert vae.evaluate(off, "rgb", clips, "cpu")["psnr"] == pytest.approx(40, abs=0.5)


def test_codes_are_fitted_once(stage, capsys):
    run(stage, "run", "--preset", "tiny")
    assert "held out: psnr" in capsys.readouterr().out
    before = (stage / "run/vae_rgb.safetensors").stat().st_mtime_ns
    run(stage, "run", "--preset", "tiny")
    assert "not made again" in capsys.readouterr().out
    assert (stage / "run/vae_rgb.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="code of preset tiny, not svd"):
        run(stage, "run", "--preset", "svd")
    run(stage, "colours", "--preset", "tiny", "--rgb_only")
    assert {path.stem for path in (stage / "colours").iterdir()} == {"vae_rgb"}


def test_fine_tuning_resumes_to_the_bit(stage, monkeypatch):
    flags = ["--preset", "svd", "--init", str(stage / "hub"), "--steps", "6", "--lr", "0.001", "--save_every", "2"]
    run(stage, "whole", *flags)
    step, steps = torch.optim.Adam.step, []

    def step_or_stop(self, *args):
        steps.append(1)
        if len(steps) == 4:                                                  # after the save at step 2
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", step_or_stop)
        run(stage, "parts", *flags)
    with pytest.raises(ValueError, match="was started with .*0.001"):
        run(stage, "parts", *flags, "--lr", "1")
    run(stage, "parts", *flags)
    assert len({(stage / out / "vae_pointmap.safetensors").read_bytes() for out in ("whole", "parts")}) == 1
    names = {f"vae_{kind}.{end}" for kind in ("rgb", "pointmap") for end in ("safetensors", "json")}
    assert {path.name for path in (stage / "parts").iterdir()} == names
    start = load_vae(stage / "parts/vae_rgb.safetensors").state_dict()
    tuned = load_vae(stage / "parts/vae_pointmap.safetensors").state_dict()
    assert all(not torch.equal(tuned[key], start[key]) for key in ("encoder.conv_in.weight", "decoder.conv_out.weight"))


@pytest.mark.parametrize("flags, words", [(["--steps", "0"], "--steps"), (["--frames", "12"], "--frames"),
                                          (["--lr", "1e30", "--steps", "9"], "lower --lr")])
def test_what_can_not_be_done_is_named(stage, flags, words):
    with pytest.raises(ValueError, match=words):
        run(stage, "run", "--preset", "svd", "--init", str(stage / "hub"), *flags)
