"""Solvers on problems with a known answer, plain SVD, poses out of pointmaps, pictures, own cameras (sample.py)."""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import evaluate
import model
import sample
import track
import vae

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "data" / "recorded"


def test_orders_of_the_solvers_on_a_gaussian():
    """For data N(0, s^2) the ideal denoiser is x s^2 / (s^2 + sigma^2), and the ODE's exact end point is known: twice
    the steps, half Euler's error, a quarter of DPM-Solver++'s."""
    def error(solver, steps, s=1.7, sigma_min=0.002, sigma_max=80.0):
        sigmas = sample.karras_sigmas(steps, sigma_min, sigma_max)
        end = solver(lambda x, sigma: x * s ** 2 / (s ** 2 + sigma ** 2), torch.ones(1, dtype=torch.float64), sigmas)
        return (end - (sigmas[0] ** 2 + 1).sqrt() * s / (s ** 2 + sigmas[0] ** 2).sqrt()).abs().item()

    for solver, order, steps in ((sample.sample_euler, 1, 200), (sample.sample_dpm, 2, 100)):
        errors = [error(solver, steps * 2 ** k) for k in range(3)]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
        assert np.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)
    for s in (3, 1, 0.3, 0.1, 0.03):                     # latents at their natural scale have components of all sizes
        assert error(sample.sample_dpm, 12, s, 0.01) < error(sample.sample_euler, 25, s, 0.01)
    for s in (1, 0.6, 0.3, 0.1):                         # svd's default against SVD's own 25 steps
        assert error(sample.sample_dpm, 8, s, 0.002, 700.0) < error(sample.sample_euler, 25, s, 0.002, 700.0)


class Echo(torch.nn.Module):
    """Its clean estimate is the condition, so that guidance has a known effect."""
    calls = 0

    def forward(self, noisy, sigma, cond, image_embeds=None, frame_index=None):
        self.calls += 1
        return cond[:, :, :, None].expand_as(noisy)


@pytest.mark.parametrize("solver", [sample.sample_euler, sample.sample_dpm])
def test_guidance_grows_over_the_frames_and_one_is_a_single_pass(solver):
    cond, net = torch.full((1, 2, 2, 4, 3, 5), 2.0), Echo()
    net.preset, run = model.PRESETS["tiny"], SimpleNamespace(model=net)
    plain = sample.sample_latents(run, cond, None, 3, 4, solver=solver)
    assert torch.allclose(plain, torch.tensor(2.0), atol=1e-5) and run.model.calls == 4
    guided = sample.sample_latents(run, cond, None, 3, 4, guidance=3.0, solver=solver)       # unconditional: 0
    assert torch.allclose(guided[0, 0, 0, :, 0, 0, 0], torch.tensor([2.0, 4.0, 6.0]), atol=1e-5)
    assert run.model.calls == 4 + 8
    off = sample.sample_latents(run, cond, None, 3, 4, guidance=0.0, solver=solver)
    assert torch.allclose(off[0, 0, 0, :, 0, 0, 0], torch.tensor([2.0, 1.0, 0.0]), atol=1e-5)


# ---- a run of its own, and plain SVD

@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run folder with random weights, and the recorded episode, packed."""
    folder = tmp_path_factory.mktemp("untrained")
    data.pack_folder(RECORDED, 1, folder / "data", (64, 80))
    moments = data.Clips(folder / "data", "train", (64, 80), single=True)
    code = dict(patch_size=8, components=96)
    for kind in ("rgb", "pointmap"):
        fitted = vae.LinearCode(code).fit(vae.images_of(moments[i], kind)[0] for i in range(20))
        vae.save_vae(folder / f"vae_{kind}.safetensors", fitted, {})
    preset = model.Preset("tiny", 64, 80, vae=code, prediction="change", sigma_min=0.01, sigma_max=80.0,
                          view_heads=2, view_head_dim=8, unet=model.unet_config((16, 24), (2, 2), 1, 96, 16, 8, 0))
    torch.manual_seed(0)
    start = model.Model4D(preset).state_dict()
    weights = {key: value + 0.05 * torch.randn(value.shape) for key, value in start.items()}
    save_file(weights, folder / "model.safetensors")
    data.write_json(folder / "model.json", dict(preset=vars(preset), mv_attention="points", rgb_only=False, init=None,
                                                vae=".", task=1, step=0))
    return folder


def test_predict_puts_the_documented_arrays_into_the_clip(untrained):
    run = sample.load_run(untrained)
    clip = data.Clips(untrained / "data", "test", (64, 80)).clip(0)
    made = sample.predict(run, clip, steps=2)
    assert made["rgb"].shape == (2, 10, 64, 80, 3) and made["points"].shape == (2, 10, 64, 80, 3)
    assert made["valid"].shape == (2, 10, 64, 80) and made["view_in_ref"].shape == (2, 4, 4) and "rgb" not in clip
    data.check_clip(made, ("observed", "prediction", "truth"))
    blind = {key: value for key, value in clip.items() if not key.startswith(("true_", "observed_g", "observed_op"))}
    again = sample.predict(run, blind, steps=2)                       # nothing of the truth is used
    assert all(np.array_equal(made[key], again[key]) for key in ("rgb", "points", "valid", "view_in_ref"))
    assert not np.array_equal(made["rgb"], sample.predict(run, clip, steps=2, seed=1)["rgb"])


def test_the_truth_through_the_code_and_back_has_its_pose(untrained):
    """A denoiser that knows the answer gives the truth back, and with it the other camera's pose."""
    run = sample.load_run(untrained)
    clips = data.Clips(untrained / "data", "test", (64, 80))
    item = {key: value[None] for key, value in clips[0].items()}
    x_0 = sample.encode_targets(run, item["rgb"][:, :, 1:], item["points"][:, :, 1:])
    run.model.forward = lambda noisy, *_: x_0
    made = sample.predict(run, clips.clip(0), steps=3)
    metres, degrees = data.pose_errors(made["view_in_ref"], made["true_view_in_ref"])
    assert metres.max() < 0.03 and degrees.max() < 3
    error = np.linalg.norm(made["points"] - made["true_points"], axis=-1)[made["true_valid"] & made["valid"]]
    assert np.median(error) < 0.02
    seen = made["true_valid"] & (made["true_points"][..., 2] < 1.5)
    assert made["valid"][seen].mean() > 0.95 > 0.5 > made["valid"][~made["true_valid"]].mean()


def test_what_stays_is_where_it_was_measured():
    draw = np.random.default_rng(0)
    observed, valid = draw.uniform(0.5, 1.0, (3, 12, 16, 3)), np.ones((3, 12, 16), bool)
    noise = np.array([0.004, 0.02, 0.004])[:, None, None, None, None] * draw.standard_normal((3, 5, 12, 16, 3))
    points = observed[:, None] + noise
    points[:, :, 2:5, 2:5] += (0.2, 0, 0)                             # a thing that left, in all frames
    observed[2], valid[:, 11] = np.nan, False                         # no pose; pixels without depth
    made = sample.anchored(points, observed, valid)
    changed = np.linalg.norm(made - points, axis=-1)
    assert (changed[2] == 0).all() and (changed[:, :, 11] == 0).all() and changed[:, :, 2:5, 2:5].max() < 0.03
    still = np.s_[:, 6:11]
    for view in (0, 1):
        before, after = (np.linalg.norm(x[view] - observed[view], axis=-1)[still] for x in (points, made))
        assert np.median(after) < 0.5 * np.median(before) and (after <= before).all()
    assert np.linalg.norm(made[0] - observed[0], axis=-1)[still].mean() < 0.003


def test_only_models_that_predict_what_changes_are_anchored(untrained):
    run = sample.load_run(untrained)
    clips = data.Clips(untrained / "data", "test", (64, 80))
    item = {key: value[None] for key, value in clips[0].items()}
    x_0 = sample.encode_targets(run, item["rgb"][:, :, 1:], item["points"][:, :, 1:])
    x_0 += 0.05 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    run.model.forward = lambda *_: x_0
    made = sample.predict(run, clips.clip(0), steps=1)
    run.model.preset = dataclasses.replace(run.model.preset, prediction="v")
    raw = sample.predict(run, clips.clip(0), steps=1)
    assert np.array_equal(raw["view_in_ref"], made["view_in_ref"]) and np.array_equal(raw["rgb"], made["rgb"])
    decoded = sample.decode(run, x_0)[1][0].movedim(2, -1).numpy()
    assert np.array_equal(raw["points"], decoded)
    off = [np.mean(evaluate.score(x)["still-n"]) for x in (made, raw)]
    assert off[0] < 0.5 * off[1]


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """Small random networks in the hub's layout: unet, vae, image_encoder."""
    folder = tmp_path_factory.mktemp("hub")
    configs = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
    torch.manual_seed(0)
    stem = "diffusion_pytorch_model"
    for name, key, kind, stem in (("unet", "unet", model.UNet, stem), ("vae", "vae", vae.VAE, stem),
                                  ("image_encoder", "clip", model.CLIPImageEncoder, "model")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(configs[key]))
        module = kind.from_config(configs[key])
        for p in module.parameters():
            p.data += 0.02 * torch.randn(p.shape)
        save_file(module.state_dict(), folder / name / f"{stem}.safetensors")
    return folder


def test_plain_svd_equals_the_reference_pipeline(hub_folder, monkeypatch):
    """Guidance over frames, conditions, Euler steps, decoding: as in diffusers, where it is installed."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    unet = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(hub_folder, subfolder="unet").double()
    theirs = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(hub_folder, subfolder="vae").double()
    theirs.register_to_config(force_upcast=False)
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(hub_folder, subfolder="image_encoder").double()
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        interpolation_type="linear", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0,
        timestep_spacing="leading", timestep_type="continuous", steps_offset=1, use_karras_sigmas=True)
    pipeline = diffusers.StableVideoDiffusionPipeline(theirs, clip, unet, scheduler, transformers.CLIPImageProcessor())
    pipeline.set_progress_bar_config(disable=True)
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    start = torch.randn(1, 3, 4, 16, 24, generator=torch.Generator().manual_seed(2))     # as sample_latents draws it
    frames = pipeline(Image.fromarray(image), height=64, width=96, num_frames=3, num_inference_steps=4, fps=7,
                      motion_bucket_id=127, noise_aug_strength=0.0, decode_chunk_size=3, latents=start.double(),
                      output_type="pt").frames[0]
    run = sample.load_svd(hub_folder, dtype=torch.float64)
    rgb = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None, None]
    monkeypatch.setattr(model, "NOISE_AUGMENTATION", 0.0)               # of the observed frame
    cond, embeds = sample.encode_conditions(run, rgb, None)
    latents = sample.sample_latents(run, cond, embeds, 3, 4, guidance=3.0, solver=sample.sample_euler,
                                    generator=torch.Generator().manual_seed(2))
    ours, _ = sample.decode(run, latents)
    assert (frames - (ours[0, 0] + 1) / 2).abs().max() < 1e-4


# ---- poses out of pointmaps

def pose(angle, translation):
    a_in_b = np.eye(4)
    a_in_b[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    a_in_b[:3, 3] = translation
    return a_in_b


def test_view_pose_is_recovered_from_pointmaps_in_spite_of_motion():
    draw = np.random.default_rng(1)
    depth = 1 + 0.3 * np.sin(np.arange(80) / 9) + 0.2 * np.cos(np.arange(64) / 7)[:, None]
    own, valid = data.point_maps(depth, np.array([[80.0, 0, 39.5], [0, 80, 31.5], [0, 0, 1]]))
    true = pose(0.7, [0.5, 0.1, 0.2])
    predicted = np.repeat(data.transform(own, true)[None], 10, 0) + 0.003 * draw.standard_normal((10, 64, 80, 3))
    predicted[:, 10:30, 10:40] += [0.2, 0.1, 0]              # an arm that has moved away from where it was observed
    metres, degrees = data.pose_errors(sample.recover_view_in_ref(own, valid, predicted), true)
    assert metres < 0.002 and degrees < 0.5
    plain = data.rigid_fit(own[valid], np.median(predicted, 0)[valid], np.ones(valid.sum()))
    assert data.pose_errors(plain, true)[0] > 0.02                      # without the reweighting the arm spoils it
    assert np.isnan(sample.recover_view_in_ref(own, np.zeros_like(valid), predicted)).all()


# ---- pictures

@pytest.fixture(scope="module")
def truth(untrained):
    return data.truth_row(data.Clips(untrained / "data", "test", (64, 80)).clip(0))


def test_the_film_shows_everything_at_true_speed(truth, tmp_path, monkeypatch):
    sample.write_film(tmp_path / "scene.gif", truth)
    gif = Image.open(tmp_path / "scene.gif")
    seconds = sum((gif.seek(i), gif.info["duration"])[1] for i in range(gif.n_frames)) / 1000
    assert seconds == pytest.approx(5, abs=0.2) and gif.size == (3 * 160 + 256, 2 * 256)         # the truth below
    shown, drawn = [], lambda path, frames, fps, seconds: shown.append((frames, fps, seconds))
    monkeypatch.setattr(data, "write_gif", drawn)
    sample.write_film("film", {key: value for key, value in truth.items() if key != "true_rgb"})
    (frames, fps, seconds), = shown
    assert frames.shape == (10, 256, 736, 3) and fps == 2 and seconds[-1] == 5
    assert np.array_equal(frames[7, 128:256:2, :160:2], truth["observed_rgb"][1])
    assert np.array_equal(frames[7, 128:256:2, 160:320:2], truth["rgb"][1, 7])
    black = (frames[7, :128:2, 320:480:2] == 0).all(-1)                                           # depth: unmeasured
    assert np.array_equal(black, ~truth["valid"][0, 7])
    assert (frames[:, :, 480:] != frames[0, :, 480:]).any((1, 2, 3))[1:].all()                    # the cloud turns
    sample.write_film("film", truth, np.full((2, 11, 256, 320, 3), 9, np.uint8))                  # colours of any size
    assert shown[1][0].shape == frames.shape and (shown[1][0][:, :, :320] == 9).all()


def test_the_sheets_headings_are_really_drawn(truth, tmp_path, monkeypatch):
    plt, drawn = data.pyplot(), []
    monkeypatch.setattr(plt, "close", drawn.append)
    sample.contact_sheet(tmp_path / "sheet.png", truth, "a title")
    axes, sheet = drawn[0].axes, imageio.imread(tmp_path / "sheet.png")[..., :3]
    assert [ax.get_title() for ax in axes[:3]] == ["observed", "+0.5 s", "+1.5 s"]
    for ax in axes[:3]:                                                       # there is ink where a heading stands
        box = ax.title.get_window_extent()
        top, bottom = len(sheet) - int(box.y1) - 2, len(sheet) - int(box.y0) + 2
        assert sheet[top:bottom, int(box.x0):int(box.x1)].min() < 100
    monkeypatch.undo()
    plt.close(drawn[0])


def test_the_cloud_shows_the_nearer_point():
    points = np.array([[0, 0, 2.0], [0, 0, 1.0], [0, 0, -9.0]], np.float32).reshape(1, 1, 1, 3, 3)
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8).reshape(1, 1, 1, 3, 3)
    picture = sample.cloud_frames(dict(points=points, rgb=rgb, valid=np.ones((1, 1, 1, 3), bool)), "", 8)[0]
    assert picture.shape == (8, 8, 3) and (picture == [0, 255, 0]).all()          # not what lies behind, or the camera


# ---- the command, and the user's own pictures

def command(*arguments):
    line = [sys.executable, *map(str, (ROOT / "sample.py", *arguments))]
    result = subprocess.run(line, capture_output=True, text=True)
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    return result


def test_commands(untrained, hub_folder, tmp_path):
    result = command("--run", untrained, "--data", untrained / "data", "--steps", "2", "--out", tmp_path / "ours")
    assert result.returncode == 0 and "2/2" in result.stderr, result.stderr[-2000:]
    assert data.read_npz(tmp_path / "ours" / "prediction.npz")["points"].shape == (2, 10, 64, 80, 3)
    imageio.imwrite(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (100, 130, 3)).astype(np.uint8))
    result = command("--svd", hub_folder, "--rgb", tmp_path / "a.png", "--frames", 3, "--steps", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    made = data.read_npz(tmp_path / "prediction.npz")
    assert made["rgb"].shape == (1, 3, 256, 320, 3) and "points" not in made and (tmp_path / "scene.gif").exists()


def test_flags_that_would_do_nothing_are_refused(untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                # data/task_1 may well be there, in the repository
    for arguments, says in (("--svd X", "--rgb A.png"), ("--svd X --rgb a --depth b", "without --svd"),
                            ("--task 1 --guidance -1", "--guidance must be at least 0"),
                            ("--run R --rgb a b --depth a b --intrinsics K --data d", "--data does nothing"),
                            ("--released X --task 1", "nothing but --out"),
                            ("--task 1 --rgb a b", "--depth and --intrinsics"), (f"--run {untrained}", "data/task_1")):
        with pytest.raises(ValueError, match=re.escape(says)):
            sample.main(arguments.split())


@pytest.fixture(scope="module")
def own(untrained, tmp_path_factory):
    """A recorded moment as a person keeps it: PNGs of 128 x 160, masks 0/255, npz files."""
    folder = tmp_path_factory.mktemp("own")
    clip = data.Clips(untrained / "data", "test", (64, 80)).clip(0)
    large = lambda x: np.repeat(np.repeat(x, 2, 0), 2, 1)
    for v, name in enumerate("ab"):
        imageio.imwrite(folder / f"{name}.png", large(clip["observed_rgb"][v]))
        millimetres = (clip["observed_depth"][v] * 1000).round().astype(np.uint16)
        imageio.imwrite(folder / f"{name}_depth.png", large(millimetres))
        imageio.imwrite(folder / f"{name}_mask.png", large(clip["observed_gripper"][v].any(0)).astype(np.uint8) * 255)
    np.savez(folder / "k.npz", intrinsics=data.scale_intrinsics(clip["intrinsics"], (64, 80), (128, 160)))
    np.savez(folder / "pose.npz", observed_gripper_in_ref=clip["observed_gripper_in_ref"][:1])
    return folder, clip


def test_own_pictures_become_a_clip_that_can_be_tracked(own, untrained):
    folder, true = own
    files = lambda kind: [str(folder / f"{name}{kind}.png") for name in "ab"]
    clip = sample.read_views((64, 80), files(""), files("_depth"), folder / "k.npz", files("_mask"),
                             folder / "pose.npz", [0.08])
    assert np.abs(clip["observed_rgb"].astype(int) - true["observed_rgb"]).mean() < 12
    assert np.allclose(clip["observed_depth"], true["observed_depth"], atol=0.001)
    assert np.allclose(clip["intrinsics"], true["intrinsics"])
    assert (clip["observed_gripper"][:, 0] == true["observed_gripper"].any(1)).all()
    assert clip["observed_opening"] == [0.08]
    out = untrained / "own"
    result = command("--run", untrained, "--rgb", *files(""), "--depth", *files("_depth"), "--mask", *files("_mask"),
                     "--intrinsics", folder / "k.npz", "--pose", folder / "pose.npz", "--opening", 0.08, "--steps", 2,
                     "--out", out)
    assert result.returncode == 0, result.stderr[-2000:]
    made = data.read_npz(out / "prediction.npz")
    for init in ("pose", "mask"):
        trajectory = track.track(made, init)
        assert trajectory["gripper_in_ref"].shape == (11, 1, 4, 4)
    plain = sample.read_views((64, 80), files(""))                              # for SVD: nothing is measured
    assert not plain["observed_depth"].any() and plain["intrinsics"].shape == (2, 3, 3)


def test_wrong_files_are_named(own, tmp_path):
    """Those that tests/test_faults.py does not try."""
    folder, k = own[0], np.array([[1400.0, 0, 960], [0, 1400, 540], [0, 0, 1]])
    np.savez(tmp_path / "one.npz", intrinsics=k[None])
    np.savez(tmp_path / "wide.npz", intrinsics=np.stack([k, k]))                    # of full HD, not of these pictures
    rgb, depth = ([str(folder / f"{name}{kind}.png") for name in "ab"] for kind in ("", "_depth"))
    for says, changed in (("one.npz", dict(intrinsics=tmp_path / "one.npz")),
                          ("64x80 picture", dict(intrinsics=tmp_path / "wide.npz")),
                          ("has no array 'intrinsics'", dict(intrinsics=folder / "pose.npz")),
                          ("no array 'observed_gripper_in_ref'", dict(pose=folder / "k.npz"))):
        with pytest.raises(ValueError, match=re.escape(says)):
            sample.read_views((64, 80), **dict(rgb=rgb, depth=depth, intrinsics=folder / "k.npz") | changed)
