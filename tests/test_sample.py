"""The sampler on problems with a known answer, plain SVD end to end, poses out of pointmaps, pictures (sample.py)."""
import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import data as D
import model as M
import sample as S
import vae as V
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent


def test_sigmas_span_the_range_and_end_in_zero():
    sigmas = S.karras_sigmas(25)
    assert (sigmas.shape == (26,) and sigmas[0] == pytest.approx(700)
            and sigmas[-2] == pytest.approx(0.002) and sigmas[-1] == 0)
    assert (sigmas.diff() < 0).all()
    middle = ((700 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7                       # EDM eq. 5 at i = (N - 1) / 2
    assert S.karras_sigmas(3)[1] == pytest.approx(middle)


def gaussian_error(steps, s=1.7):
    """For data N(0, s^2) the ideal denoiser is x s^2 / (s^2 + sigma^2), and the exact end point of the ODE is known."""
    noise = torch.ones(1, dtype=torch.float64)
    sigmas = S.karras_sigmas(steps)
    end = S.sample_euler(lambda x, sigma: x * s ** 2 / (s ** 2 + sigma ** 2), noise, sigmas)
    start = (sigmas[0] ** 2 + 1).sqrt()
    return (end - start * s / (s ** 2 + sigmas[0] ** 2).sqrt()).abs().item()


def test_euler_error_halves_when_the_steps_double():
    errors = [gaussian_error(steps) for steps in (200, 400, 800)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.05)


class Echo(torch.nn.Module):
    """A stand-in for the model: its clean estimate is the condition, so guidance has a known effect."""
    def forward(self, noisy, sigma, cond, image_embeds=None, frame_index=None):
        return cond[:, :, :, None].expand_as(noisy)


def test_guidance_grows_over_the_frames_and_one_is_a_single_pass():
    cond = torch.full((1, 2, 2, 4, 3, 5), 2.0)
    plain = S.sample_latents(Echo(), cond, None, frames=3, steps=4)
    assert torch.allclose(plain, torch.tensor(2.0), atol=1e-5)
    guided = S.sample_latents(Echo(), cond, None, frames=3, steps=4, guidance=3.0)       # unconditional estimate: 0
    assert torch.allclose(guided[0, 0, 0, :, 0, 0, 0], torch.tensor([2.0, 4.0, 6.0]), atol=1e-5)


def test_the_same_seed_starts_alike():
    cond = torch.zeros(1, 2, 1, 2, 3, 3)
    model = lambda x, sigma, cond, embeds: 0.5 * x
    runs = [S.sample_latents(model, cond, None, 2, steps=3, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# ---- plain SVD, image to video

@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """Small random networks in the hub's layout: unet, vae, image_encoder."""
    folder = tmp_path_factory.mktemp("hub")
    configs = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
    torch.manual_seed(0)
    parts = (("unet", "unet", M.UNet, "diffusion_pytorch_model"), ("vae", "vae", V.VAE, "diffusion_pytorch_model"),
             ("image_encoder", "clip", M.CLIPImageEncoder, "model"))
    for name, key, kind, stem in parts:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(configs[key]))
        module = kind.from_config(configs[key])
        for p in module.parameters():
            p.data += 0.02 * torch.randn(p.shape)
        save_file(module.state_dict(), folder / name / f"{stem}.safetensors")
    return folder


def test_plain_svd_command(hub_folder, tmp_path):
    imageio.imwrite(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (100, 130, 3)).astype(np.uint8))
    command = [sys.executable, ROOT / "sample.py", "--svd", hub_folder, "--rgb", tmp_path / "a.png",
               "--frames", "3", "--steps", "2", "--chunk", "2", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "out" / "prediction.npz") as prediction:
        assert prediction["rgb"].shape == (1, 3, 256, 320, 3) and "points" not in prediction
    assert (tmp_path / "out" / "rgb.gif").exists()


def test_plain_svd_equals_the_reference_pipeline(hub_folder, monkeypatch):
    """Guidance over frames, conditions, Euler steps, decoding in chunks: as in diffusers, where it is installed."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from PIL import Image                                   # comes with imageio
    monkeypatch.setattr(M, "NOISE_AUGMENTATION", 0.0)
    unet = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(hub_folder, subfolder="unet").double()
    vae = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(hub_folder, subfolder="vae").double()
    vae.register_to_config(force_upcast=False)
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(hub_folder, subfolder="image_encoder").double()
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        interpolation_type="linear", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0,
        timestep_spacing="leading", timestep_type="continuous", steps_offset=1, use_karras_sigmas=True)
    pipeline = diffusers.StableVideoDiffusionPipeline(vae, clip, unet, scheduler, transformers.CLIPImageProcessor())
    pipeline.set_progress_bar_config(disable=True)
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    start = torch.randn(1, 3, 4, 16, 24, generator=torch.Generator().manual_seed(2))     # as sample_latents draws it
    theirs = pipeline(Image.fromarray(image), height=64, width=96, num_frames=3, num_inference_steps=4, fps=7, motion_bucket_id=127,
                      noise_aug_strength=0.0, decode_chunk_size=2, latents=start.double(), output_type="pt").frames[0]

    model, vaes, clip = S.load_svd(hub_folder, dtype=torch.float64)
    ours = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None, None]
    rgb, _ = S.sample_views(model, vaes, clip, ours, None, frames=3, steps=4, guidance=3.0, chunk=2,
                            generator=torch.Generator().manual_seed(2))
    assert (theirs - (rgb[0, 0] + 1) / 2).abs().max() < 1e-4


# ---- poses out of pointmaps

def pose(angle, translation):
    a_in_b = np.eye(4)
    a_in_b[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    a_in_b[:3, 3] = translation
    return a_in_b


def test_rigid_fit_recovers_a_motion():
    draw = np.random.default_rng(0)
    points, true = draw.standard_normal((50, 3)), pose(2.0, [0.3, -0.2, 0.9])
    assert np.allclose(S.rigid_fit(points, D.transform(points, true), np.ones(50)), true, atol=1e-10)
    flat = points * [1, 1, 0]                                           # a plane has a mirror image that fits as well
    assert np.linalg.det(S.rigid_fit(flat, D.transform(flat, true), np.ones(50))[:3, :3]) == pytest.approx(1)


def test_view_pose_is_recovered_from_pointmaps_in_spite_of_motion():
    draw = np.random.default_rng(1)
    depth = 1 + 0.3 * np.sin(np.arange(80) / 9) + 0.2 * np.cos(np.arange(64) / 7)[:, None]
    own, valid = D.point_maps(depth, np.array([[80.0, 0, 39.5], [0, 80, 31.5], [0, 0, 1]]))
    true = pose(0.7, [0.5, 0.1, 0.2])
    predicted = np.repeat(D.transform(own, true)[None], 10, 0) + 0.003 * draw.standard_normal((10, 64, 80, 3))
    predicted[:, 10:30, 10:40] += [0.2, 0.1, 0]              # an arm that has moved away from where it was observed
    found = S.recover_view_in_ref(own, valid, predicted)
    error = D.invert(true) @ found
    assert np.linalg.norm(error[:3, 3]) < 0.002 and np.trace(error[:3, :3]) > 3 - 1e-4
    plain = D.invert(true) @ S.rigid_fit(own[valid], np.median(predicted, 0)[valid], np.ones(valid.sum()))
    assert np.linalg.norm(plain[:3, 3]) > 0.02                          # without the reweighting the arm spoils it
    assert np.isnan(S.recover_view_in_ref(own, np.zeros_like(valid), predicted)).all()


# ---- pictures

def fake_prediction(views=2, frames=3, height=16, width=20):
    draw = np.random.default_rng(0)
    intrinsics = np.repeat(np.array([[[20.0, 0, 9.5], [0, 20, 7.5], [0, 0, 1]]]), views, 0)
    depth = draw.uniform(0.8, 1.2, (views, height, width)).astype(np.float32)
    points = D.point_maps(depth, intrinsics)[0]
    channels_first = torch.from_numpy(np.repeat(np.moveaxis(points, -1, 1)[:, None], frames, 1))
    observed = draw.integers(0, 255, (views, height, width, 3)).astype(np.uint8)
    return S.to_prediction(observed, depth, intrinsics, torch.rand(views, frames, 3, height, width) * 2 - 1,
                           channels_first)


def test_prediction_has_the_documented_arrays():
    prediction = fake_prediction()
    assert prediction["rgb"].shape == (2, 3, 16, 20, 3) and prediction["rgb"].dtype == np.uint8
    assert prediction["points"].shape == (2, 3, 16, 20, 3) and prediction["points"].dtype == np.float32
    assert prediction["valid"].shape == (2, 3, 16, 20) and prediction["valid"].all()
    assert np.allclose(prediction["view_in_ref"], np.eye(4), atol=1e-5)      # both views see their own points unmoved


def test_predicted_far_plane_is_not_a_surface():
    intrinsics = np.array([[[20.0, 0, 9.5], [0, 20, 7.5], [0, 0, 1]]])
    depth = np.full((1, 16, 20), 1.0)
    depth[0, :8] = 0                                                         # nothing measured: put on the far plane
    points = D.point_maps(depth, intrinsics)[0]
    prediction = S.to_prediction(np.zeros((1, 16, 20, 3), np.uint8), depth, intrinsics, torch.zeros(1, 1, 3, 16, 20),
                                 torch.from_numpy(np.moveaxis(points, -1, 1)[:, None]))
    assert not prediction["valid"][0, 0, :8].any() and prediction["valid"][0, 0, 8:].all()


def test_results_are_written_whole(tmp_path):
    prediction = fake_prediction()
    S.write_results(tmp_path, prediction, "test", ply=True)
    for name in ("sheet.png", "rgb.gif", "depth.gif", "cloud.gif", "frame_01.ply", "frame_03.ply"):
        assert (tmp_path / name).stat().st_size > 100, name
    with np.load(tmp_path / "prediction.npz", allow_pickle=False) as file:
        assert np.array_equal(file["points"], prediction["points"])
    assert not list(tmp_path.glob("*.partial*"))


def test_ply_holds_the_points(tmp_path):
    points, colors = (np.array([[0.1, 0.2, 0.3], [1, 2, 3]], np.float32),
                      np.array([[1, 2, 3], [250, 251, 252]], np.uint8))
    S.write_ply(tmp_path / "a.ply", points, colors)
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 2" in header and len(body) == 2 * 15
    assert (np.frombuffer(body[:12], "<f4").tolist() == pytest.approx([0.1, 0.2, 0.3])
            and body[12:15] == bytes([1, 2, 3]))


def test_splat_shows_the_nearer_point():
    points = np.array([[0, 0, 2.0], [0, 0, 1.0], [0, 0, -1.0]])
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    picture = S.splat(points, colors, np.array([[10.0, 0, 5], [0, 10, 4], [0, 0, 1]]), 9, 11)
    assert picture[4, 5].tolist() == [0, 255, 0] and picture[0, 0].tolist() == [245] * 3


# ---- the user's own pictures

def test_own_pictures_are_read_and_wrong_ones_named(tmp_path):
    files = {name: str(tmp_path / name)
             for name in ("a.png", "b.png", "da.png", "db.png", "small.png", "k.npz", "k1.npz")}
    for name in ("a.png", "b.png"):
        imageio.imwrite(files[name], np.full((48, 60, 3), 100, np.uint8))
    for name in ("da.png", "db.png"):
        imageio.imwrite(files[name], np.full((48, 60), 1234, np.uint16))
    imageio.imwrite(files["small.png"], np.full((24, 30), 1234, np.uint16))
    np.savez(files["k.npz"], intrinsics=np.repeat(np.array([[[50.0, 0, 29.5], [0, 50, 23.5], [0, 0, 1]]]), 2, 0))
    np.savez(files["k1.npz"], intrinsics=np.eye(3)[None])
    rgb, depth, k = S.read_views([files["a.png"], files["b.png"]], [files["da.png"], files["db.png"]], files["k.npz"],
                                 (24, 30))
    assert rgb.shape == (2, 24, 30, 3) and np.allclose(depth, 1.234) and k[0, 0, 0] == 25 and k[0, 0, 2] == 14.5
    for depths, intrinsics, says in ((["da.png"], "k.npz", "--depth 1"),
                                     (["da.png", "small.png"], "k.npz", "small.png"),
                                     (["da.png", "b.png"], "k.npz", "16-bit PNG"),
                                     (["da.png", "db.png"], "k1.npz", "k1.npz"),
                                     (["da.png", "db.png"], "a.png", "a.png"),
                                     (["da.png", "nowhere.png"], "k.npz", "nowhere.png")):
        with pytest.raises(ValueError, match=says):
            S.read_views([files["a.png"], files["b.png"]], [str(tmp_path / d) for d in depths], files[intrinsics],
                         (24, 30))
