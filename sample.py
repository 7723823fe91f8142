"""One RGB-D frame per view in, ten future frames of every view out: RGB, and pointmaps in the reference view's frame.

    python sample.py --task 1                                                            # held-out clip, unseen cameras
    python sample.py --task 1 --clip 3 --steps 8 --ply                                   # another, faster, with clouds
    python sample.py --task 1 --rgb A.png B.png --depth A.png B.png --intrinsics K.npz   # your own two cameras
    python sample.py --svd stabilityai/stable-video-diffusion-img2vid --rgb A.png        # plain SVD, image to video

What the model is given: colour, depth and intrinsics of each view at one instant. No camera pose. The pose of every
view in the reference camera's frame comes out instead: a view's observed points (own frame) and its predicted points
(reference frame) belong to the same pixels, so a rigid fit between the two is the pose.

Writes into runs/task_N/samples/NAME: prediction.npz, sheet.png (observed, predicted, true), rgb.gif, depth.gif,
cloud.gif (the fused 4D scene, orbited), and frame_TT.ply with --ply.

Letters   B samples, V views (view 0 is the reference), S streams (0 RGB, 1 pointmap), T predicted frames,
          C latent channels, h w latent cells, H W pixels
References: EDM, arXiv 2206.00364 (sampler; eq. and algorithm numbers are from there); SVD, arXiv 2311.15127.
"""
import argparse
import json
import os
import re
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange, repeat

import data as D
import model as M
from vae import VAE, decode_latents, encode_latents, load_vae

FPS = D.CLIP_HZ


# ------------------------------------------------------------------------------------------------------- conditioning

def encode_conditions(model, vaes, clip, rgb, own_points, rgb_noise=0.0):
    """What the observed frame tells the model about each stream.

    rgb, own_points: (B, V, 3, H, W) in [-1, 1]; own_points in each view's own camera frame (None when the model is RGB
    only). vaes: {'rgb': VAE, 'pointmap': VAE}; clip: CLIPImageEncoder or None. Returns cond (B, V, S, C, h, w),
    concatenated to the noisy latents of every frame, and image_embeds (B, V, D), one CLIP token per view (None without
    CLIP). rgb_noise, shaped like rgb, is added to what the VAE sees and not to what CLIP sees, as in SVD's own
    pipeline.
    """
    b = rgb.shape[0]
    streams = [("rgb", rgb + rgb_noise)] + ([("pointmap", own_points)] if not model.rgb_only else [])
    cond = []
    for name, images in streams:
        latents = encode_latents(vaes[name], images.flatten(0, 1))                    # (B V, C, h, w), unit scale
        if clip is not None:
            latents = latents / vaes[name].scale_factor                               # SVD's condition is not scaled
        cond.append(rearrange(latents, "(b v) c h w -> b v c h w", b=b))
    embeds = None
    if clip is not None:
        pixels = M.clip_preprocess(rgb.flatten(0, 1).float()).to(next(clip.parameters()).dtype)
        embeds = rearrange(clip(pixels), "(b v) d -> b v d", b=b)
    return torch.stack(cond, 2), embeds


def encode_targets(model, vaes, rgb, points):
    """Clean latents of the predicted frames. rgb, points: (B, V, T, 3, H, W) in [-1, 1] -> (B, V, S, T, C, h, w)."""
    b, v, t = rgb.shape[:3]
    streams = [("rgb", rgb)] + ([("pointmap", points)] if not model.rgb_only else [])
    latents = [encode_latents(vaes[name], images.flatten(0, 2)) for name, images in streams]
    return torch.stack([rearrange(z, "(b v t) c h w -> b v t c h w", b=b, v=v) for z in latents], 2)


# ------------------------------------------------------------------------------------------------------------ sampler

def karras_sigmas(steps, sigma_min=0.002, sigma_max=700.0, rho=7.0):
    """Noise levels sigma_0 > ... > sigma_steps = 0, (steps + 1,) float64 (EDM eq. 5 with SVD's constants)."""
    i = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sample_euler(denoise, noise, sigmas):
    """Euler's method on the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (EDM algorithm 1, no churn).

    denoise(x, sigma) -> the clean estimate, shaped like x; noise: standard normal; sigmas: descending, ending in 0.
    """
    x = noise * (sigmas[0] ** 2 + 1).sqrt().item()           # variance of data plus noise, for data of variance 1
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        slope = (x - denoise(x, sigma)) / sigma
        x = x + slope * (sigma_next - sigma)
    return x


@torch.no_grad()
def sample_latents(model, cond, embeds, frames, steps=25, guidance=1.0, generator=None):
    """Clean latents (B, V, S, T, C, h, w) given the conditions of encode_conditions.

    guidance: of the last frame; grows linearly over the frames from 1 (Ho & Salimans, arXiv 2207.12598; SVD's
    schedule). 1 runs no unconditional pass. generator: of the starting noise, drawn on the CPU so that every device
    starts alike.
    """
    b, v, s, c, h, w = cond.shape
    noise = torch.randn((b, v, s, frames, c, h, w), generator=generator).to(cond.device)    # float32 for every model
    weight = torch.linspace(1, guidance, frames, device=cond.device)[:, None, None, None]   # (T, 1, 1, 1)

    def denoise(x, sigma):
        sigma = torch.full((b,), sigma, device=x.device)
        conditional = model(x, sigma, cond, embeds).to(x.dtype)
        if guidance == 1.0:
            return conditional
        nothing = None if embeds is None else torch.zeros_like(embeds)
        unconditional = model(x, sigma, torch.zeros_like(cond), nothing).to(x.dtype)
        return unconditional + weight * (conditional - unconditional)

    return sample_euler(denoise, noise, karras_sigmas(steps))


@torch.no_grad()
def decode(model, vaes, latents, chunk=None):
    """Latents (B, V, S, T, C, h, w) -> rgb (B, V, T, 3, H, W) in [-1, 1], points (B, V, T, 3, H, W) in m (or None).

    chunk: frames decoded at a time; the decoder looks along time inside a chunk only (None: the whole clip).
    """
    b, v, s, t = latents.shape[:4]
    chunk = chunk or t
    images = []
    for stream, name in enumerate(["rgb", "pointmap"][:s]):
        parts = []
        for first in range(0, t, chunk):
            part = latents[:, :, stream, first:first + chunk]                               # (B, V, chunk, C, h, w)
            part = part.to(next(vaes[name].parameters()).dtype)
            decoded = decode_latents(vaes[name], part.flatten(0, 2), part.shape[2])
            parts.append(decoded.unflatten(0, part.shape[:3]))
        images.append(torch.cat(parts, 2))
    rgb = images[0].clamp(-1, 1)
    return rgb, D.denormalize_points(images[1].float()) if s == 2 else None


def sample_views(model, vaes, clip, rgb, own_points, frames=10, steps=25, guidance=1.0, generator=None, chunk=None,
                 rgb_noise=0.0):
    """The whole way for a batch: observed rgb, own_points (B, V, 3, H, W) -> what `decode` returns."""
    with torch.no_grad():
        cond, embeds = encode_conditions(model, vaes, clip, rgb, own_points, rgb_noise)
    latents = sample_latents(model, cond, embeds, frames, steps, guidance, generator)
    return decode(model, vaes, latents, chunk)


# ---------------------------------------------------------------------------------------------- poses out of pointmaps

def rigid_fit(source, target, weights):
    """The rigid motion (4, 4) that takes source (N, 3) to target (N, 3) in weighted least squares (Kabsch 1976)."""
    w = weights / weights.sum()
    source_mean, target_mean = w @ source, w @ target
    u, _, vt = np.linalg.svd((source - source_mean).T @ (w[:, None] * (target - target_mean)))
    flip = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])                      # a rotation, never a mirror image
    source_in_target = np.eye(4)
    source_in_target[:3, :3] = (u @ flip @ vt).T
    source_in_target[:3, 3] = target_mean - source_in_target[:3, :3] @ source_mean
    return source_in_target


def recover_view_in_ref(observed_in_own, valid, predicted_in_ref, iterations=20):
    """The pose of a view's camera in the reference frame, from pointmaps alone.

    observed_in_own (H, W, 3) and valid (H, W) of the observed frame; predicted_in_ref (T, H, W, 3) of the same view.
    The median over time removes what moves; the fit is reweighted (Geman-McClure) so that what is left of it has no
    say.
    """
    source = observed_in_own[valid].astype(np.float64)
    target = np.median(predicted_in_ref, axis=0)[valid].astype(np.float64)
    if len(source) < 3:
        return np.full((4, 4), np.nan)
    weights = np.ones(len(source))
    for _ in range(iterations):
        view_in_ref = rigid_fit(source, target, weights)
        residual = np.linalg.norm(D.transform(source, view_in_ref) - target, axis=-1)
        scale = max(np.median(residual), 0.005)
        weights = 1 / (1 + (residual / scale) ** 2) ** 2
    return view_in_ref


def to_prediction(observed_rgb, observed_depth, intrinsics, rgb, points):
    """prediction.npz's arrays from one sample.

    observed_rgb (V, H, W, 3) uint8, observed_depth (V, H, W) m, intrinsics (V, 3, 3), rgb (V, T, 3, H, W) in [-1, 1],
    points (V, T, 3, H, W) m in the reference frame. `valid` is where the prediction lies in front of the view's own
    camera, as the recovered pose has it, and nearer than FAR: the model has seen no truth beyond, and pixels without
    depth were put there.
    """
    prediction = dict(
        rgb=((rearrange(rgb, "v t c h w -> v t h w c") + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy(),
        intrinsics=intrinsics, observed_rgb=observed_rgb, observed_depth=observed_depth.astype(np.float32),
        fps=np.float64(FPS))
    if points is None:
        return prediction
    points = rearrange(points, "v t c h w -> v t h w c").cpu().numpy().astype(np.float32)
    observed, valid = D.point_maps(observed_depth, intrinsics)
    view_in_ref = np.stack([np.eye(4)] + [recover_view_in_ref(observed[v], valid[v], points[v])
                                          for v in range(1, len(points))])
    z_in_own = D.transform(points, D.invert(view_in_ref))[..., 2]
    prediction.update(points=points, view_in_ref=view_in_ref, valid=(z_in_own > 0) & (z_in_own < 0.97 * D.FAR))
    return prediction


def add_truth(prediction, item):
    """The same keys with the prefix true_, and the robot's state, from an item of data.Clips."""
    rgb = rearrange((item["rgb"] + 1) * 127.5, "v f c h w -> v f h w c").round().byte().numpy()
    points = rearrange(D.denormalize_points(item["points"]), "v f c h w -> v f h w c").numpy()
    prediction.update(
        true_rgb=rgb[:, 1:], true_points=points[:, 1:], true_valid=item["valid"][:, 1:].numpy(),
        true_view_in_ref=item["view_in_ref"].numpy(), true_gripper_in_ref=item["gripper_in_ref"].numpy(),
        true_opening=item["opening"].numpy(),
        true_gripper=rearrange(item["gripper"][:, 1:], "v t h w a -> v t a h w").numpy(),
        observed_gripper=rearrange(item["gripper"][:, 0], "v h w a -> v a h w").numpy(),
        observed_gripper_in_ref=item["gripper_in_ref"][0].numpy(), observed_opening=item["opening"][0].numpy(),
        name=item["name"])
    return prediction


# ----------------------------------------------------------------------------------------------------------- pictures

def colorize(z, low, high):
    """Depth (..., H, W) in metres -> uint8 RGB, near is bright; no depth is black."""
    import matplotlib
    known = np.isfinite(z)
    colors = matplotlib.colormaps["turbo_r"](np.clip((np.where(known, z, high) - low) / (high - low), 0, 1))[..., :3]
    return (colors * 255 * known[..., None]).astype(np.uint8)


def enlarge(images, height=192):
    """Whole-number nearest enlargement of (..., H, W, 3) to about `height` pixels, to make small pictures visible."""
    k = max(1, round(height / images.shape[-3]))
    return np.repeat(np.repeat(images, k, -3), k, -2)


def depth_range(prediction):
    z = prediction["observed_depth"]
    z = z[(z > 0) & (z <= D.FAR)]
    return (float(np.percentile(z, 1)) * 0.9, float(np.percentile(z, 99)) * 1.1) if z.size else (0.0, D.FAR)


def depth_images(prediction, prefix=""):
    """z in the reference frame of predicted (prefix '') or true ('true_') frames as colours: (V, T, H, W, 3) uint8."""
    z = np.where(prediction[prefix + "valid"], prediction[prefix + "points"][..., 2], np.nan)
    return colorize(z, *depth_range(prediction))


def contact_sheet(path, prediction, title=""):
    """Observed | predicted | true: RGB and depth of every view over time, one PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    views, frames = prediction["rgb"].shape[:2]
    shown = np.unique(np.linspace(0, frames - 1, 5).round().astype(int))
    rows = []                                              # (label, observed picture or None, pictures over time)
    for v in range(views):
        name = f"view {v}" + (" (reference)" if v == 0 else "")
        rows.append((f"{name}\npredicted", prediction["observed_rgb"][v], prediction["rgb"][v]))
        if "true_rgb" in prediction:
            rows.append(("true", None, prediction["true_rgb"][v]))
        if "points" in prediction:
            own = np.where(prediction["observed_depth"][v] > 0, prediction["observed_depth"][v], np.nan)
            rows.append(("predicted z\nin reference", colorize(own, *depth_range(prediction)),
                         depth_images(prediction)[v]))
            if "true_points" in prediction:
                rows.append(("true z", None, depth_images(prediction, "true_")[v]))
    figure, axes = plt.subplots(len(rows), 1 + len(shown),
                                figsize=(2.1 * (1 + len(shown)) + 0.6, 1.75 * len(rows) + 0.4),
                                squeeze=False, layout="constrained")
    for row, (label, observed, pictures) in zip(axes, rows):
        for ax, picture, heading in zip(row, [observed] + [pictures[t] for t in shown],
                                        ["observed"] + [f"+{(t + 1) / FPS:g} s" for t in shown]):
            ax.set(xticks=[], yticks=[])
            ax.set_frame_on(False)
            if picture is not None:
                ax.imshow(picture, interpolation="nearest")
            if row is axes[0]:
                ax.set_title(heading, fontsize=9)
        row[0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def splat(points_in_cam, colors, intrinsics, height, width, radius=1):
    """Picture (H, W, 3) uint8 of a cloud (N, 3) with colours (N, 3): squares of 2 radius + 1 pixels, nearest on top."""
    points_in_cam, colors = points_in_cam[points_in_cam[:, 2] > 0.05], colors[points_in_cam[:, 2] > 0.05]
    pixels, z = D.project(points_in_cam, intrinsics)
    order = np.argsort(-z)                                          # far first: later writes cover earlier ones
    u, v = pixels[order].round().astype(int).T
    canvas = np.full((height + 2 * radius, width + 2 * radius, 3), 245, np.uint8)
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v, colors = u[inside], v[inside], colors[order][inside]
    window = np.arange(2 * radius + 1)
    rows = v[:, None, None] + window[:, None]                       # (N, 2r + 1, 1)
    columns = u[:, None, None] + window                             # (N, 1, 2r + 1)
    canvas[rows, columns] = colors[:, None, None]
    return canvas[radius:-radius, radius:-radius] if radius else canvas


def look_from(target, distance, azimuth, elevation):
    """A camera in the reference camera's frame that orbits `target`: angles 0, 0 look along the reference's axis."""
    ca, sa, ce, se = np.cos(azimuth), np.sin(azimuth), np.cos(elevation), np.sin(elevation)
    forward = np.array([sa * ce, se, ca * ce])
    right = np.array([ca, 0, -sa])
    cam_in_ref = np.eye(4)
    cam_in_ref[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    cam_in_ref[:3, 3] = target - distance * forward
    return cam_in_ref


def cloud_frames(prediction, height=300, width=380, loops=2):
    """The fused cloud of all views while time runs and a camera swings around it: (N, H, W, 3) uint8."""
    points, rgb, valid = prediction["points"], prediction["rgb"], prediction["valid"]
    frames = points.shape[1]
    target = np.median(points[0, 0][valid[0, 0]], axis=0) if valid[0, 0].any() else np.array([0, 0, 1.0])
    intrinsics = np.array([[1.1 * width, 0, (width - 1) / 2], [0, 1.1 * width, (height - 1) / 2], [0, 0, 1]])
    pictures = []
    for i in range(loops * frames):
        t, phase = i % frames, 2 * np.pi * i / (loops * frames)
        cam_in_ref = look_from(target, 1.2 * target[2] + 0.4, 0.5 * np.sin(phase), 0.15 + 0.15 * np.cos(phase))
        keep = valid[:, t]
        seen = D.transform(points[:, t][keep], D.invert(cam_in_ref))
        pictures.append(splat(seen, rgb[:, t][keep], intrinsics, height, width, radius=max(1, 160 // points.shape[-2])))
    return np.stack(pictures)


def write_ply(path, points, colors):
    """A coloured cloud, points (N, 3) m and colors (N, 3) uint8, as a binary PLY."""
    vertex = np.zeros(len(points), dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"], vertex["rgb"] = points, colors
    header = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
              + "".join(f"property float {axis}\n" for axis in "xyz")
              + "".join(f"property uchar {color}\n" for color in ("red", "green", "blue")) + "end_header\n")
    Path(path).write_bytes(header.encode() + vertex.tobytes())


def write_gif(path, pictures, fps):
    imageio.imwrite(path, pictures, duration=1000 / fps, loop=0)


def write_results(folder, prediction, title="", ply=False):
    """prediction.npz and its pictures. The npz is written under a temporary name and renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "prediction.partial.npz", **prediction)
    os.replace(folder / "prediction.partial.npz", folder / "prediction.npz")
    contact_sheet(folder / "sheet.png", prediction, title)
    side_by_side = lambda video: enlarge(rearrange(video, "v t h w c -> t h (v w) c"))
    above = lambda top, bottom: np.concatenate([top, bottom], 1)
    rgb = side_by_side(prediction["rgb"])
    write_gif(folder / "rgb.gif",
              above(rgb, side_by_side(prediction["true_rgb"])) if "true_rgb" in prediction else rgb, 4)
    if "points" not in prediction:
        return
    z = side_by_side(depth_images(prediction))
    write_gif(folder / "depth.gif",
              above(z, side_by_side(depth_images(prediction, "true_"))) if "true_points" in prediction else z, 4)
    write_gif(folder / "cloud.gif", cloud_frames(prediction), 6)
    if ply:
        for t in range(prediction["points"].shape[1]):
            keep = prediction["valid"][:, t]
            write_ply(folder / f"frame_{t + 1:02d}.ply",
                      prediction["points"][:, t][keep], prediction["rgb"][:, t][keep])


# ------------------------------------------------------------------------------------------------------------- loading

def load_run(run, device="cpu", dtype=torch.float32):
    """What train.py left in a run folder: model, vaes {'rgb', 'pointmap'} and clip (None without it), in eval mode.

    model.json beside the weights says how the model is built and where its VAEs (and CLIP) lie. Raises ValueError.
    """
    run = Path(run)
    try:
        info = json.loads((run / "model.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run}/model.json is missing: train first, `python train.py --task N --out {run}`") from None
    with torch.device("meta"):
        model = M.Model4D(M.Preset(**info["preset"]), info["mv_attention"], info["rgb_only"])
    M.load_weights(model, [run / "model.safetensors"], dtype, device)
    vaes, clip = load_frozen(model, run / info["vae"], info["init"], device, dtype)
    return model.eval(), vaes, clip


def load_frozen(model, vae_folder, init, device="cpu", dtype=torch.float32):
    """The parts that never train with the U-Net: the VAEs of stage 1, and for presets with CLIP its encoder from `init`
    (a folder in the hub's layout, or a hub repo)."""
    names = ["rgb"] if model.rgb_only else ["rgb", "pointmap"]
    vaes = {name: load_vae(Path(vae_folder) / f"vae_{name}.safetensors").to(device, dtype).eval() for name in names}
    clip = None
    if model.preset.clip is not None:
        clip = M.CLIPImageEncoder.from_pretrained(init, dtype=dtype, device=device)
    return vaes, clip


def load_svd(folder_or_repo, device="cpu", dtype=torch.float32):
    """Plain SVD image-to-video, untrained by us: every view by itself, RGB only."""
    model = M.Model4D.from_pretrained(M.PRESETS["svd"], folder_or_repo, dtype, device, rgb_only=True)
    vae = VAE.from_pretrained(folder_or_repo, dtype=dtype, device=device)
    return model.eval(), {"rgb": vae}, M.CLIPImageEncoder.from_pretrained(folder_or_repo, dtype=dtype, device=device)


def read_views(rgb_files, depth_files, intrinsics_file, size):
    """The user's own pictures -> observed_rgb (V, H, W, 3) uint8, observed_depth (V, H, W) m, intrinsics (V, 3, 3).

    All of them come out at `size`. Depth files are 16-bit PNGs in millimetres (0: nothing measured); the npz holds
    `intrinsics` (V, 3, 3) in pixels of the given pictures. Without depth files (plain SVD) depth is 0 and the
    intrinsics are those of a 60 degree lens.
    """
    images = [read_picture(path) for path in rgb_files]
    for path, image in zip(rgb_files, images):
        if image.ndim != 3 or image.dtype != np.uint8:
            raise ValueError(f"{path}: an 8-bit RGB picture is needed, this is {image.dtype} of shape {image.shape}")
    rgb = np.stack([D.resize(image[None, ..., :3], size, "rgb")[0] for image in images])
    if depth_files is None:
        focal = size[1] / 2 / np.tan(np.pi / 6)
        lens = np.array([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1]])
        return rgb, np.zeros(rgb.shape[:3]), np.repeat(lens[None], len(rgb), 0)
    if len(depth_files) != len(rgb_files):
        raise ValueError(f"--rgb names {len(rgb_files)} pictures, --depth {len(depth_files)}: "
                         "one of each per view is needed")
    depths = [read_picture(path) for path in depth_files]
    for path, depth, image in zip(depth_files, depths, images):
        if depth.dtype != np.uint16 or depth.shape != image.shape[:2]:
            raise ValueError(f"{path}: a 16-bit PNG of millimetres, {image.shape[0]}x{image.shape[1]} like its RGB "
                             f"picture, is needed; this is {depth.dtype} of shape {depth.shape}")
    try:
        with np.load(intrinsics_file) as file:
            intrinsics = file["intrinsics"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{intrinsics_file}: an npz file with an array `intrinsics` (V, 3, 3) is needed "
                         f"({error})") from None
    if intrinsics.shape != (len(rgb_files), 3, 3):
        raise ValueError(f"{intrinsics_file}: `intrinsics` has shape {intrinsics.shape}, "
                         f"expected {(len(rgb_files), 3, 3)}")
    depth = np.stack([D.resize(d[None], size, "depth")[0] for d in depths]) / 1000.0
    scaled = [D.scale_intrinsics(k, image.shape[:2], size) for k, image in zip(intrinsics, images)]
    return rgb, depth, np.stack(scaled)


def read_picture(path):
    try:
        return imageio.imread(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error})") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", type=int, choices=D.TASKS,
                        help="sample a clip of this task's held-out data with runs/task_N")
    parser.add_argument("--run", help="folder that train.py wrote [runs/task_N]")
    parser.add_argument("--data", help="packed episodes to take the clip from [data/task_N]")
    parser.add_argument("--split", default="test", choices=["train", "test"], help="of cameras and episodes")
    parser.add_argument("--clip", type=int, default=0, help="which clip: any number")
    parser.add_argument("--views", type=int, default=2, help="views of the clip, the first is the reference")
    parser.add_argument("--rgb", nargs="+", help="your own pictures instead, one per view, the reference first")
    parser.add_argument("--depth", nargs="+", help="16-bit PNGs in millimetres, one per view")
    parser.add_argument("--intrinsics", help="npz with `intrinsics` (V, 3, 3), pixels of the given pictures")
    parser.add_argument("--svd", metavar="FOLDER_OR_REPO", help="no training: Stable Video Diffusion itself on --rgb")
    parser.add_argument("--frames", type=int, default=10, help="frames to predict, two a second")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps")
    parser.add_argument("--guidance", type=float,
                        help="of the last frame, 1 at the first; 1 is one pass a step [1; with --svd 3]")
    parser.add_argument("--chunk", type=int, help="frames that the VAE decodes at a time [all]")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the networks")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise")
    parser.add_argument("--ply", action="store_true", help="also write one cloud file per frame")
    parser.add_argument("--out", help="folder for the results [RUN/samples/NAME]")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    for flag in ("steps", "frames", "views"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if not args.task and not args.run and not args.svd:
        raise ValueError("say --task N, --run FOLDER or --svd FOLDER_OR_REPO")
    if args.svd and not args.rgb:
        raise ValueError("--svd animates pictures of yours: add --rgb A.png")
    if args.rgb and not args.svd and not (args.depth and args.intrinsics):
        raise ValueError("--rgb needs --depth and --intrinsics too: the pointmaps of the observed frame come from them")

    run = Path(args.run or f"runs/task_{args.task}")
    model, vaes, clip = load_svd(args.svd, device, dtype) if args.svd else load_run(run, device, dtype)
    size = model.preset.height, model.preset.width
    item = None
    if args.rgb:
        if len(args.rgb) < 2 and not model.rgb_only:
            raise ValueError("two views or more are needed: --rgb REFERENCE.png OTHER.png")
        observed_rgb, observed_depth, intrinsics = read_views(args.rgb, args.depth, args.intrinsics, size)
        name = Path(args.rgb[0]).stem
    else:
        item = D.Clips(args.data or f"data/task_{args.task}", args.split, size, args.views, args.frames)[args.clip]
        observed_rgb, observed_depth, intrinsics = observation(item)
        name = f"{args.split}_{args.clip}"
    own_points, _ = D.point_maps(observed_depth, intrinsics)
    to_batch = lambda x: torch.from_numpy(np.moveaxis(x, -1, 2 if x.ndim == 5 else 1).copy())[None].to(device, dtype)
    rgb = to_batch(observed_rgb.astype(np.float32) / 127.5 - 1)                              # (1, V, 3, H, W)
    own = to_batch(D.normalize_points(own_points))
    guidance = args.guidance or (3.0 if args.svd else 1.0)
    generator = torch.Generator().manual_seed(args.seed)
    rgb_noise = 0.0
    if args.svd:                                        # SVD was trained on slightly noisy observed frames, and told so
        rgb_noise = M.NOISE_AUGMENTATION * torch.randn(rgb.shape, generator=generator).to(rgb)
    started = time.time()
    rgb, points = sample_views(model, vaes, clip, rgb, own, args.frames, args.steps, guidance, generator, args.chunk,
                               rgb_noise)
    seconds = time.time() - started

    prediction = to_prediction(observed_rgb, observed_depth, intrinsics, rgb[0].float(),
                               None if points is None else points[0])
    if item:
        prediction = add_truth(prediction, item)
    out = Path(args.out) if args.out else (Path("runs/svd") if args.svd else run) / "samples" / re.sub(r"\W", "_", name)
    write_results(out, prediction, f"{item['name'] if item else name}, {args.steps} steps, seed {args.seed}", args.ply)
    print(f"{len(observed_rgb)} views x {args.frames} frames in {seconds:.1f} s on {device} ({args.steps} Euler steps)")
    if points is not None and item:
        for v in range(1, len(observed_rgb)):
            error = D.invert(prediction["true_view_in_ref"][v]) @ prediction["view_in_ref"][v]
            angle = np.degrees(np.arccos(np.clip((np.trace(error[:3, :3]) - 1) / 2, -1, 1)))
            print(f"view {v}: recovered camera pose is off by {np.linalg.norm(error[:3, 3]) * 100:.1f} cm "
                  f"and {angle:.1f} degrees")
    print(f"results: {out}/ (prediction.npz, sheet.png, rgb.gif"
          + (", depth.gif, cloud.gif)" if points is not None else ")"))


def observation(item):
    """The observed frame of an item of data.Clips: rgb (V, H, W, 3) uint8, depth (V, H, W) m, intrinsics (V, 3, 3)."""
    rgb = rearrange((item["rgb"][:, 0] + 1) * 127.5, "v c h w -> v h w c").round().byte().numpy()
    depth = D.denormalize_points(item["own_points"][:, 2]) * item["valid"][:, 0]
    return rgb, depth.numpy(), item["intrinsics"].numpy()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"sample.py: {error}")
