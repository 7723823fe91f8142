"""One RGB-D frame per view in, ten future frames of every view out: RGB, and pointmaps in the reference view's frame.

    python sample.py --task 1                                                # a held-out clip, cameras never trained on
    python sample.py --run runs/task_1 --clip 3 --steps 5 --ply              # another, faster, with clouds
    python sample.py --run runs/task_1 --rgb A.png B.png --depth A_mm.png B_mm.png --intrinsics K.npz \\
                     --mask A_hand.png B_hand.png --pose POSE.npz --opening 0.08               # your own two cameras
    python sample.py --svd stabilityai/stable-video-diffusion-img2vid --rgb A.png              # SVD itself, no training
    python sample.py --released 4dgen.ckpt --out runs/released_1             # the authors' weights become a run folder

What the model is given: colour, depth and intrinsics of each view at one instant, and no camera pose. The pose of every
view in the reference camera's frame comes out instead: a view's observed points (in its own frame) and its predicted
points (in the reference's) belong to the same pixels, so that a rigid fit between them is the pose. --mask, --pose and
--opening are not for the model but for track.py, which starts from one of them.

Writes into RUN/samples/NAME: prediction.npz, sheet.png (observed, predicted, true), rgb.gif, depth.gif, cloud.gif (the
fused 4D scene, orbited); frame_TT.ply with --ply.

Letters   B samples, V views (view 0 is the reference), S streams (0 RGB, 1 pointmap), T predicted frames, A arms,
          C latent channels, D width of an image embedding, h w latent cells, H W pixels, N points
References: EDM, arXiv 2206.00364 (its equation and algorithm numbers); DPM-Solver++, arXiv 2211.01095; SVD, arXiv
2311.15127.
"""
import argparse
import pickle
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange
from safetensors import TensorSpec, serialize_file
from tqdm import tqdm

import data
from data import invert, point_maps, transform
from model import (NOISE_AUGMENTATION, PRESETS, SVD_REPO, CLIPImageEncoder, Model4D, Preset, clip_preprocess,
                   load_weights)
from vae import VAE, load_vae, read_keys, save_vae, writing_tensors

SAMPLERS = {"change": ("dpm", 2), "v": ("euler", 25)}     # solver and steps, by what the network predicts
FAR_SHARE = 0.97                    # of FAR: predicted points beyond are the plane where unmeasured pixels were put
DECODE_BYTES = 2600                 # memory that SVD's decoder takes for a pixel of a frame, in bf16


# ----------------------------------------------------------------------------------------------------------- conditions
# `run` is what load_run returns: model, vaes {"rgb", "pointmap"}, clip (the image encoder, or None), device, dtype, ...

def encode_conditions(run, rgb, own_points, rgb_noise=0.0):
    """What the observed frame tells the model. rgb, own_points (B, V, 3, H, W) in [-1, 1], points in the own frame.

    Returns cond (B, V, S, C, h, w), which stands beside the noisy latents of every frame, and image embeddings
    (B, V, D), None without CLIP. rgb_noise is added to what the VAE sees, not to what CLIP sees, as in SVD's pipeline.
    """
    B = len(rgb)
    streams = [("rgb", rgb + rgb_noise), ("pointmap", own_points)][:len(run.vaes)]
    cond = [run.vaes[name].encode_condition(images.flatten(0, 1)) for name, images in streams]  # (B V, C, h, w)
    cond = rearrange(cond, "s (b v) c h w -> b v s c h w", b=B).to(run.dtype)
    if run.clip is None:
        return cond, None
    pixels = clip_preprocess(rgb.flatten(0, 1).float())
    return cond, run.clip(pixels.to(next(run.clip.parameters()).dtype)).unflatten(0, (B, -1)).to(run.dtype)


def encode_targets(run, rgb, points):
    """Clean latents of predicted frames. rgb, points (B, V, T, 3, H, W) in [-1, 1] -> (B, V, S, T, C, h, w)."""
    B, V = rgb.shape[:2]
    streams = [("rgb", rgb), ("pointmap", points)][:len(run.vaes)]
    latents = [run.vaes[name].encode_latents(images.flatten(0, 2)).float() for name, images in streams]
    return rearrange(latents, "s (b v t) c h w -> b v s t c h w", b=B, v=V)


@torch.no_grad()
def decode(run, latents):
    """Latents (B, V, S, T, C, h, w) -> rgb (B, V, T, 3, H, W) in [-1, 1], points (B, V, T, 3, H, W) in m, or None.

    View by view, and on a GPU with so many frames at a time as its memory has room for; SVD's decoder then looks along
    time inside each part only.
    """
    B, V, S, T = latents.shape[:4]
    frames = T
    if latents.device.type == "cuda":
        pixels = latents[0, 0, 0, 0, 0].numel() * run.vaes["rgb"].cell ** 2
        frames = int(torch.cuda.mem_get_info(latents.device)[0] * 0.8 / (DECODE_BYTES * pixels))
    images = [torch.stack([torch.cat([run.vaes[name].decode_latents(part, len(part)).float()
                                      for part in latents[b, v, s].split(max(1, frames))])
                           for b in range(B) for v in range(V)]).unflatten(0, (B, V))
              for s, name in enumerate(("rgb", "pointmap")[:S])]
    return images[0].clamp(-1, 1), data.denormalize_points(images[1]) if S == 2 else None


# -------------------------------------------------------------------------------------------------------------- sampler

def karras_sigmas(steps, sigma_min=0.002, sigma_max=700.0, rho=7.0):
    """Noise levels sigma_0 > ... > sigma_steps = 0, (steps + 1,) float64 (EDM eq. 5; SVD's constants)."""
    i = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sample_euler(denoise, noise, sigmas):
    """Euler's method on the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (EDM algorithm 1, no churn).

    denoise(x, sigma) -> the clean estimate; noise: standard normal; sigmas: descending, ending in 0.
    """
    x = noise * (sigmas[0] ** 2 + 1).sqrt().item()           # variance of data plus noise, for data of variance 1
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
    return x


@torch.no_grad()
def sample_dpm(denoise, noise, sigmas):
    """The same ODE by DPM-Solver++(2M): in t = -ln(sigma) it is linear but for D, which goes on along the line through
    its last two values. Second order at one evaluation a step."""
    x = noise * (sigmas[0] ** 2 + 1).sqrt().item()
    D_before = h_before = None
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        D = D_ahead = denoise(x, sigma)
        if sigma_next > 0:
            h = np.log(sigma / sigma_next)
            if D_before is not None:
                D_ahead = D + (D - D_before) * h / (2 * h_before)
            D_before, h_before = D, h
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * D_ahead
    return x


SOLVERS = {"euler": sample_euler, "dpm": sample_dpm}


def sample_latents(run, cond, embeds, frames, steps=None, guidance=1.0, generator=None, solver=None, progress=False):
    """Clean latents (B, V, S, T, C, h, w), given what encode_conditions returns.

    guidance: of the last frame, growing over the frames from 1 (Ho and Salimans, arXiv 2207.12598; SVD's schedule); 1
    runs no unconditional pass. generator: of the starting noise, drawn on the CPU, so that all devices start alike.
    """
    preset = run.model.preset
    solver, steps = solver or SAMPLERS[preset.prediction][0], steps or SAMPLERS[preset.prediction][1]
    B, V, S, C, h, w = cond.shape
    noise = torch.randn((B, V, S, frames, C, h, w), generator=generator).to(cond.device)        # float32 for all models
    weight = torch.linspace(1, guidance, frames, device=cond.device)[:, None, None, None]       # (T, 1, 1, 1)
    bar = tqdm(total=steps, desc="sampling", unit="step", disable=not progress)

    def denoise(x, sigma):
        began, sigma = time.time(), torch.full((B,), sigma, device=x.device)
        D = run.model(x, sigma, cond, embeds).to(x.dtype)
        if guidance != 1:
            nothing = None if embeds is None else torch.zeros_like(embeds)
            unconditional = run.model(x, sigma, torch.zeros_like(cond), nothing).to(x.dtype)
            D = unconditional + weight * (D - unconditional)
        if progress and not bar.n:
            D.sum().item()                                                                      # waits for the GPU
            bar.write(f"{steps} steps of {time.time() - began:.2f} s: about {(time.time() - began) * steps:.0f} s")
        bar.update()
        return D

    latents = SOLVERS[solver](denoise, noise, karras_sigmas(steps, preset.sigma_min, preset.sigma_max))
    bar.close()
    return latents


@torch.no_grad()
def predict(run, clip, frames=data.FRAMES, steps=None, guidance=1.0, seed=0, solver=None, progress=False):
    """The clip with the prediction in it: rgb and, unless the run is RGB only, points, valid and view_in_ref.

    `valid` is where a point lies in front of its own camera, at the recovered pose, and nearer than FAR: the model has
    seen no truth beyond, only the plane on which unmeasured pixels were put.
    """
    if guidance != 1 and run.info.get("dropout", 0.1) == 0:
        raise ValueError(f"{run.folder} was trained with dropout 0, always with its conditions: --guidance must be 1")
    size = run.model.preset.height, run.model.preset.width
    if clip["observed_rgb"].shape[1:3] != size:
        raise ValueError(f"the clip's pictures are {data.size_text(clip['observed_rgb'].shape[1:3])}, the model's "
                         f"{data.size_text(size)}: give read_clip this size")
    observed = data.to_tensors({key: clip[key] for key in ("observed_rgb", "observed_depth", "intrinsics")})
    rgb, own_points = (x[None].to(run.device) for x in (observed["rgb"][:, 0], observed["own_points"]))    # (1,V,3,H,W)
    generator = torch.Generator().manual_seed(seed)
    rgb_noise = 0.0
    if run.augmentation:                            # SVD was trained on slightly noisy observed frames, and told so
        rgb_noise = run.augmentation * torch.randn(rgb.shape, generator=generator).to(rgb)
    cond, embeds = encode_conditions(run, rgb, own_points, rgb_noise)
    with run.autocast():
        latents = sample_latents(run, cond, embeds, frames, steps, guidance, generator, solver, progress)
    rgb, points = decode(run, latents)
    rgb = ((rgb[0] + 1) * 127.5).round().byte()
    clip = dict(clip, rgb=rearrange(rgb, "v t c h w -> v t h w c").cpu().numpy())
    for key in ("points", "valid", "view_in_ref"):
        clip.pop(key, None)
    if points is None:
        return clip
    points = rearrange(points[0], "v t c h w -> v t h w c").cpu().numpy()
    own, valid = point_maps(clip["observed_depth"], clip["intrinsics"])
    view_in_ref = np.stack([np.eye(4)] + [recover_view_in_ref(own[v], valid[v], points[v]) for v in range(1, len(own))])
    z = transform(points, invert(view_in_ref))[..., 2]
    return dict(clip, points=points, view_in_ref=view_in_ref, valid=(z > 0) & (z < FAR_SHARE * data.FAR))


def recover_view_in_ref(own, valid, points, iterations=20):
    """The pose of a view's camera in the reference frame: NaN where too little was measured.

    own (..., 3) points of the observed frame in the view's own frame, valid (...); points (T, ..., 3), the same pixels
    in the reference frame. The median over time removes most of what moves; the fit is reweighted (Geman-McClure), so
    that the rest counts little.
    """
    source, target = own[valid].astype(np.float64), np.median(points, axis=0)[valid].astype(np.float64)
    if len(source) < 3:
        return np.full((4, 4), np.nan)
    weights = np.ones(len(source))
    for _ in range(iterations):
        view_in_ref = data.rigid_fit(source, target, weights)
        residual = np.linalg.norm(transform(source, view_in_ref) - target, axis=-1)
        weights = 1 / (1 + (residual / max(np.median(residual), 0.005)) ** 2) ** 2
    return view_in_ref


# ------------------------------------------------------------------------------------------------------------- pictures

def enlarge(images, height=192):
    """(..., H, W, 3) by a whole number to about `height` pixels, so that small pictures can be seen."""
    k = max(1, round(height / images.shape[-3]))
    return np.repeat(np.repeat(images, k, -3), k, -2)


def depth_colors(z, clip):
    """Depth (..., H, W) m -> uint8 colours, red near, blue far, over the range that was observed; NaN is black."""
    import matplotlib
    observed = clip["observed_depth"]
    observed = observed[(observed > 0) & (observed <= data.FAR)]
    low, high = np.percentile(observed, (1, 99)) * (0.9, 1.1) if observed.size else (0.0, data.FAR)
    shown = np.nan_to_num((z - low) / (high - low)).clip(0, 1)
    return (matplotlib.colormaps["turbo_r"](shown)[..., :3] * 255 * np.isfinite(z)[..., None]).astype(np.uint8)


def depth_images(clip, prefix=""):
    """Colours of z in the reference frame, (V, T, H, W, 3), of the predicted frames, or the true ones ("true_")."""
    return depth_colors(np.where(clip[prefix + "valid"], clip[prefix + "points"][..., 2], np.nan), clip)


def contact_sheet(path, clip, title=""):
    """Observed | predicted | true: RGB and depth of every view over time, one PNG."""
    plt = data.pyplot()
    rows = []                                                # label, observed picture or None, pictures over time
    for v in range(len(clip["rgb"])):
        rows.append((f"view {v + 1}{' (reference)' * (v == 0)}\npredicted", clip["observed_rgb"][v], clip["rgb"][v]))
        if "true_rgb" in clip:
            rows.append(("true", None, clip["true_rgb"][v]))
        if "points" in clip:
            z = clip["observed_depth"][v]
            own = depth_colors(np.where(z > 0, z, np.nan), clip)
            rows.append(("own z, then z in\nreference, pred.", own, depth_images(clip)[v]))
            if "true_points" in clip:
                rows.append(("true z", None, depth_images(clip, "true_")[v]))
    frames = clip["rgb"].shape[1]
    shown = np.unique(np.linspace(0, frames - 1, 5).round().astype(int))
    headings = ["observed"] + [f"+{(t + 1) / clip['fps']:g} s" for t in shown]
    figure, axes = plt.subplots(len(rows), len(headings), squeeze=False, layout="constrained",
                                figsize=(2.1 * len(headings) + 0.6, 1.75 * len(rows) + 0.4))
    for ax, heading in zip(axes[0], headings):
        ax.set_title(heading, fontsize=9)
    for row, (label, observed, pictures) in zip(axes, rows):
        for ax, picture in zip(row, [observed] + [pictures[t] for t in shown]):
            ax.set(xticks=[], yticks=[])
            ax.set_frame_on(False)
            if picture is not None:
                ax.imshow(picture, interpolation="nearest")
        row[0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=9)
    with data.writing(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
    plt.close(figure)


def splat(points_in_cam, colors, intrinsics, height, width, radius=1):
    """Picture (H, W, 3) uint8 of a cloud (N, 3) with colours (N, 3): squares of 2 radius + 1 pixels, nearest on top."""
    in_front = points_in_cam[:, 2] > 0.05
    pixels, z = data.project(points_in_cam[in_front], intrinsics)
    order = np.argsort(-z)                                   # far first: later writes cover earlier ones
    u, v = pixels[order].round().astype(int).T
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v, colors = u[inside], v[inside], colors[in_front][order][inside]
    canvas = np.full((height + 2 * radius, width + 2 * radius, 3), 245, np.uint8)
    window = np.arange(2 * radius + 1)
    canvas[v[:, None, None] + window[:, None], u[:, None, None] + window] = colors[:, None, None]
    return canvas[radius:radius + height, radius:radius + width]


def look_from(target, distance, azimuth, elevation):
    """A camera in the reference camera's frame that orbits `target`: angles 0, 0 look along the reference's axis."""
    ca, sa, ce, se = np.cos(azimuth), np.sin(azimuth), np.cos(elevation), np.sin(elevation)
    forward, right = np.array([sa * ce, se, ca * ce]), np.array([ca, 0, -sa])
    cam_in_ref = np.eye(4)
    cam_in_ref[:3] = np.stack([right, np.cross(forward, right), forward, target - distance * forward], 1)
    return cam_in_ref


def cloud_frames(clip, height=300, width=380, pictures=2):
    """The fused cloud of all views while time runs and a camera swings: (T * pictures, H, W, 3) uint8."""
    points, rgb, valid = clip["points"], clip["rgb"], clip["valid"]
    count = pictures * points.shape[1]
    target = np.median(points[0, 0][valid[0, 0]], axis=0) if valid[0, 0].any() else np.array([0, 0, 1.0])
    intrinsics = np.array([[1.1 * width, 0, (width - 1) / 2], [0, 1.1 * width, (height - 1) / 2], [0, 0, 1]])
    drawn = []
    for i in range(count):
        t, phase = i // pictures, 2 * np.pi * i / count
        cam_in_ref = look_from(target, 1.2 * target[2] + 0.4, 0.5 * np.sin(phase), 0.15 + 0.15 * np.cos(phase))
        points_in_cam = transform(points[:, t][valid[:, t]], invert(cam_in_ref))
        drawn.append(splat(points_in_cam, rgb[:, t][valid[:, t]], intrinsics, height, width,
                           max(1, 160 // points.shape[-2])))
    return np.stack(drawn)


def write_ply(path, points, colors):
    """A coloured cloud, points (N, 3) m and colors (N, 3) uint8, as a binary PLY."""
    vertex = np.zeros(len(points), dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"], vertex["rgb"] = points, colors
    properties = [f"property float {x}" for x in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header\n"]
    with data.writing(path) as partial:
        partial.write_bytes("\n".join(header).encode() + vertex.tobytes())


def write_results(folder, clip, title="", ply=False):
    """prediction.npz, and then its pictures."""
    folder, fps, frames = Path(folder), clip["fps"], clip["rgb"].shape[1]
    data.write_npz(folder / "prediction.npz", clip)
    contact_sheet(folder / "sheet.png", clip, title)
    times = (np.arange(frames) + 1) / fps
    side_by_side = lambda video: enlarge(rearrange(video, "v t h w c -> t h (v w) c"))
    over = lambda video, true: np.concatenate([side_by_side(video), *map(side_by_side, true)], 1)   # truth below
    data.write_gif(folder / "rgb.gif", over(clip["rgb"], [clip["true_rgb"]] if "true_rgb" in clip else []), fps, times)
    if "points" not in clip:
        return
    true = [depth_images(clip, "true_")] if "true_points" in clip else []
    data.write_gif(folder / "depth.gif", over(depth_images(clip), true), fps, times)
    cloud = cloud_frames(clip)
    data.write_gif(folder / "cloud.gif", cloud, fps * len(cloud) / frames, np.repeat(times, len(cloud) // frames))
    for t in range(frames if ply else 0):
        seen = clip["valid"][:, t]
        write_ply(folder / f"frame_{t + 1:02d}.ply", clip["points"][:, t][seen], clip["rgb"][:, t][seen])


# -------------------------------------------------------------------------------------------------------------- loading

def read_info(folder):
    hint = f"train first, `python train.py --task N --out {folder}`"
    return read_keys(Path(folder) / "model.json", hint, "preset", "mv_attention", "rgb_only", "vae", "init")


def load_run(run, device="cpu", dtype=torch.float32):
    """What train.py left in a run folder, ready for `predict`: model.json says how the model is built, and where its
    VAEs and CLIP lie."""
    folder = Path(run)
    info = read_info(folder)
    with torch.device("meta"):
        net = Model4D(Preset(**info["preset"]), info["mv_attention"], info["rgb_only"])
    load_weights(net, [folder / "model.safetensors"], dtype, device)
    return as_run(net, *load_frozen(net, folder / info["vae"], info["init"], device, dtype), info, folder)


def as_run(net, vaes, clip, info, folder, augmentation=0.0):
    like = next(net.parameters())
    return SimpleNamespace(model=net.eval(), vaes=vaes, clip=clip, info=info, folder=folder, device=like.device,
                           dtype=like.dtype, autocast=nullcontext, augmentation=augmentation)


def load_frozen(net, vae_folder, init, device="cpu", dtype=torch.float32):
    """What never trains with the U-Net: the VAEs of stage 1 and, for presets with CLIP, its encoder from `init`, a hub
    repo or a folder in the hub's layout."""
    vaes = {name: load_vae(Path(vae_folder) / f"vae_{name}.safetensors").to(device, dtype).eval()
            for name in ("rgb", "pointmap")[:2 - net.rgb_only]}
    return vaes, CLIPImageEncoder.from_pretrained(init, dtype=dtype, device=device) if net.preset.clip else None


def load_svd(folder_or_repo, device="cpu", dtype=torch.float32):
    """SVD's image-to-video as published, as a run: every view by itself, RGB only."""
    net = Model4D.from_pretrained(PRESETS["svd"], folder_or_repo, dtype, device, rgb_only=True)
    vaes = {"rgb": VAE.from_pretrained(folder_or_repo, dtype=dtype, device=device)}
    clip = CLIPImageEncoder.from_pretrained(folder_or_repo, dtype=dtype, device=device)
    return as_run(net, vaes, clip, dict(task=None), Path("runs/svd"), NOISE_AUGMENTATION)


def read_views(size, rgb, depth=None, intrinsics=None, mask=None, pose=None, opening=None):
    """The user's own pictures as a clip of pictures of `size` (H, W).

    rgb, depth, mask: files, one a view, the reference first: 8-bit colours; 16-bit millimetres, 0 where nothing was
    measured; white where the hand is. intrinsics: npz with `intrinsics` (V, 3, 3), in pixels of these pictures. pose:
    npz with `observed_gripper_in_ref` (A, 4, 4), the hand in the first camera's frame. opening: (A,) m between fingers.
    Without depth, for SVD itself, nothing is measured, through a 60 degree lens.
    """
    needed = dict(rgb="an 8-bit RGB picture", depth="a picture of 16-bit millimetres", mask="a black and white picture")
    pictures = {}
    for kind, files in zip(needed, (rgb, depth or [], mask or [])):
        if files and len(files) != len(rgb):
            raise ValueError(f"--rgb names {len(rgb)} pictures, --{kind} {len(files)}: one a view is needed")
        pictures[kind] = []
        for path, first in zip(files, pictures["rgb"] or files):
            with data.reading(path):
                picture = np.asarray(imageio.imread(path))
            form = dict(rgb=picture.dtype == np.uint8 and picture.ndim == 3, mask=True,
                        depth=picture.dtype != np.uint8 and picture.ndim == 2)[kind]
            if not form or kind != "rgb" and picture.shape[:2] != first.shape[:2]:
                raise ValueError(f"{path} is {picture.dtype} of shape {picture.shape}: {needed[kind]}, as large as its "
                                 "RGB picture, is needed")
            pictures[kind].append(picture)
    stack = lambda kind, images: np.stack([data.resize(image[None], size, kind)[0] for image in images])
    clip = dict(fps=float(data.CLIP_HZ), name=Path(rgb[0]).stem, observed_depth=np.zeros((len(rgb), *size), np.float32),
                observed_rgb=stack("rgb", [picture[..., :3] for picture in pictures["rgb"]]))
    if not depth:
        focal = size[1] / 2 / np.tan(np.pi / 6)
        lens = np.array([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1]])
        return dict(clip, intrinsics=np.stack([lens] * len(rgb)))
    clip["observed_depth"] = stack("depth", pictures["depth"])
    cameras = read_key(intrinsics, "intrinsics")
    if cameras.shape != (len(rgb), 3, 3):
        raise ValueError(f"{intrinsics}: `intrinsics` has shape {cameras.shape}, expected ({len(rgb)}, 3, 3)")
    clip["intrinsics"] = np.stack([data.scale_intrinsics(camera, picture.shape[:2], size)
                                   for camera, picture in zip(cameras, pictures["rgb"])])
    if mask:
        clip["observed_gripper"] = stack("label", [picture.reshape(*picture.shape[:2], -1)[..., :3].max(-1)
                                                   for picture in pictures["mask"]])
    if pose:
        clip["observed_gripper_in_ref"] = read_key(pose, "observed_gripper_in_ref")
    if opening:
        clip["observed_opening"] = np.array(opening)
    return data.check_clip(clip)


def read_key(path, key):
    arrays = data.read_npz(path)
    if key not in arrays:
        raise ValueError(f"{path} has no array `{key}`, only {', '.join(arrays) or 'none'}")
    return arrays[key]


# --------------------------------------------------------------------------------------- the authors' released weights
# The files of the hub repo Zeyi/4dgen-ckpts, in the layout of sgm, the code that SVD was trained with. What these
# weights want otherwise than ours stands in the preset and in the VAEs' configs: GroupNorm eps, which view's CLIP token
# a stream sees, no norm before the cross-view attention, an encoder for conditions (its quant_conv stayed random, and
# the U-Net learned with it) and another for targets. SVD's three numbers were not embedded: that layer becomes zero.

INNER = (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
         ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"),
         ("nin_shortcut", "conv_shortcut"), ("time_pos_embed.0", "time_pos_embed.linear_1"),
         ("time_pos_embed.2", "time_pos_embed.linear_2"))
OUTER = {"unet": ((r"input_blocks\.0\.0\.", "conv_in."), (r"out\.0\.", "conv_norm_out."), (r"out\.2\.", "conv_out."),
                  (r"middle_block\.0\.", "mid_block.resnets.0."), (r"middle_block\.1\.", "mid_block.attentions.0."),
                  (r"middle_block\.2\.", "mid_block.resnets.1."), (r"time_embed\.0\.", "time_embedding.linear_1."),
                  (r"time_embed\.2\.", "time_embedding.linear_2.")),
         "vae": ((r"\bdown\.(\d)\.", r"down_blocks.\1."), (r"\bblock\.(\d)\.", r"resnets.\1."),
                 (r"(up|down)sample\.", r"\1samplers.0."), (r"mid\.block_1\.", "mid_block.resnets.0."),
                 (r"mid\.block_2\.", "mid_block.resnets.1."), (r"mid\.attn_1\.", "mid_block.attentions.0."),
                 (r"(attentions\.0\.)norm\.", r"\1group_norm."), (r"(attentions\.0\.)([qkv])\.", r"\1to_\2."),
                 (r"(attentions\.0\.)proj_out\.", r"\1to_out.0."), (r"\bnorm_out\.", "conv_norm_out."),
                 (r"conv_out\.time_mix_conv\.", "time_conv_out."), (r"(\.\d\.)mix_factor", r"\1time_mixer.mix_factor"))}
UNUSED = {r"conditioner\.embedders\.0\.": "CLIP, frozen in training: SVD's image_encoder stands for it",
          r"conditioner\.embedders\.[12]\.encoder\.(decoder|post_quant_conv)\.": "conditions are only encoded",
          r"loss\.": "belongs to the VAE's training"}


def unet_name(name, layers):
    """Our name of a parameter of sgm's U-Net. sgm counts all layers in one row, on the way down with the resamplers."""
    for theirs, ours in OUTER["unet"]:
        name = re.sub("^" + theirs, ours, name)
    if match := re.match(r"(in|out)put_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?", name):
        level, i = divmod(int(match[2]) - (match[1] == "in"), layers + 1)
        way, sampler = ("down", "downsamplers.0.conv.") if match[1] == "in" else ("up", "upsamplers.0.conv.")
        part = sampler if match[4] else f"{('resnets', 'attentions')[int(match[3])]}.{i}."
        name = f"{way}_blocks.{level}.{part}{name[match.end():]}"
    return inner_name(re.sub(r"(attentions\.\d\.)time_stack\.", r"\1temporal_transformer_blocks.", name))


def vae_name(name, levels):
    """Our name of a parameter of sgm's VAE, which counts `up` from the finest level."""
    name = re.sub(r"\bup\.(\d)\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.", name)
    for theirs, ours in OUTER["vae"]:
        name = re.sub(theirs, ours, name)
    return inner_name(name) if name.startswith("decoder") else name.replace("nin_shortcut", "conv_shortcut")


def inner_name(name):
    """The same for the inside of video residual blocks."""
    name = re.sub(r"(resnets\.\d\.)time_stack\.", r"\1temporal_res_block.", name)
    name = re.sub(r"(resnets\.\d\.)(?!temporal_res_block|time_mixer)", r"\1spatial_res_block.", name)
    for theirs, ours in INNER:
        name = name.replace(theirs, ours)
    return name


def released_parts(state, preset):
    """Sorts a released state dict by our modules: {"model", "rgb", "pointmap": {our key: tensor}}, or for pointmap.ckpt
    and color.ckpt {"vae": ...}; and says what is not needed, {key: reason}."""
    left, parts = dict(state), {}
    take = lambda prefix: {key[len(prefix):]: left.pop(key) for key in list(left) if key.startswith(prefix)}
    levels, C = len(preset.vae["block_out_channels"]), preset.vae["latent_channels"]
    flat = lambda key, x: x.flatten(1) if ".attn_1." in key and x.ndim == 4 else x     # (C, C, 1, 1): linear layers
    named = lambda half, prefix: {vae_name(half + key, levels): flat(key, x) for key, x in take(prefix).items()}
    if any(key.startswith("encoder.") for key in left):
        quant_conv = {"quant_conv.weight": torch.eye(2 * C)[:, :, None, None], "quant_conv.bias": torch.zeros(2 * C)}
        parts["vae"] = {**named("encoder.", "encoder."), **named("decoder.", "decoder."), **quant_conv}
    else:
        unet, second = take("model.diffusion_model."), take("model.diffusion_model_2.")
        for key, x in second.items():                            # a shallow copy there: one storage under two names
            if key not in unet or x.data_ptr() != unet[key].data_ptr() and not torch.equal(x, unet[key]):
                raise ValueError(f"model.diffusion_model_2.{key} differs from model.diffusion_model.{key}: the "
                                 "released models have one decoder under two names, this is another kind")
        ours = parts["model"] = {}
        for key, x in unet.items():
            name = re.sub(r"^attn_layers_decoder\.(\d|1[01])\.", r"cross_view.\1.attention.",
                          unet_name(key, preset.unet["layers_per_block"]))
            ours[name if name.startswith("cross_view") else f"unet.{name}"] = x
            if name.startswith(("up_blocks", "conv_norm_out", "conv_out")):
                ours[f"decoder_b.{name}"] = x
        width, ids = 4 * preset.unet["block_out_channels"][0], preset.unet["projection_class_embeddings_input_dim"]
        for layer, size in (("linear_1", ids), ("linear_2", width)):
            ours[f"unet.add_embedding.{layer}.weight"] = torch.zeros(width, size)
            ours[f"unet.add_embedding.{layer}.bias"] = torch.zeros(width)
        for kind, seen, target in (("pointmap", "conditioner.embedders.1.encoder.", "first_stage_pointmap_model."),
                                   ("rgb", "conditioner.embedders.2.encoder.", "first_stage_color_model.")):
            encoder = {f"target_{key}": x for key, x in named("encoder.", f"{target}encoder.").items()}
            parts[kind] = {**named("encoder.", f"{seen}encoder."), **named("quant_conv.", f"{seen}quant_conv."),
                           **named("decoder.", f"{target}decoder."), **encoder}
    unused = {key: next((why for pattern, why in UNUSED.items() if re.match(pattern, key)), None) for key in left}
    if strange := [key for key, why in unused.items() if why is None]:
        raise ValueError(f"{len(strange)} keys fit no part of the model: {', '.join(strange[:5])}")
    return parts, unused


def convert_released(path, out, preset=PRESETS["svd"], init=SVD_REPO):
    """Turns 4dgen.ckpt into a run folder like train.py's, or pointmap.ckpt / color.ckpt into vae_{pointmap,rgb}.
    Nothing that is pickled in the file is run. init: where CLIP comes from. Raises a one-line ValueError."""
    path, out = Path(path), Path(out)
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)      # pages of the file, no copy
        state = file.get("state_dict", file) if isinstance(file, dict) else {}
        if not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
            raise ValueError("has no state_dict of tensors")
        preset = replace(preset, view_norm=False, resnet_eps=1e-5, tokens="crossed")
        parts, unused = released_parts(state, preset)
        modules = {}
        for name, part in parts.items():
            with torch.device("meta"):
                coder = {**preset.vae, "target_encoder": name != "vae"}
                modules[name] = Model4D(preset) if name == "model" else VAE(coder)
            modules[name].load_state_dict(part, strict=True, assign=True)
    except pickle.UnpicklingError:
        foreign = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "objects"
        raise ValueError(f"{path} holds pickled {foreign}: not loaded, for safety") from None
    except (ValueError, RuntimeError, OSError, EOFError) as error:       # damaged, or not as expected
        raise ValueError(f"{path} can't be used: {' '.join(str(error).split())[:500]}") from None
    for name, module in modules.items():
        kind = name if name in ("rgb", "pointmap") else "pointmap" if "pointmap" in path.name else "rgb"
        if name != "model":
            save_vae(out / f"vae_{kind}.safetensors", module, dict(kind=kind, source=path.name))
            continue
        weights = {key: x.contiguous() for key, x in module.state_dict().items()}
        with writing_tensors(out / "model.safetensors") as partial:     # save_file wants no two names of one storage
            serialize_file({key: TensorSpec(dtype=str(x.dtype).removeprefix("torch."), shape=x.shape,
                                            data_ptr=x.data_ptr(), data_len=x.nbytes) for key, x in weights.items()},
                           partial)
        info = dict(preset=asdict(preset), mv_attention="points", rgb_only=False, init=init, vae=".", step=0)
        data.write_json(out / "model.json", dict(info, source=path.name))
    for why in dict.fromkeys(unused.values()):
        print(f"{list(unused.values()).count(why)} keys not used: {why}")


# --------------------------------------------------------------------------------------------------------------- script

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", type=int, choices=data.TASKS, help="take a held-out clip of this task [that of --run]")
    add("--run", help="folder that train.py wrote [runs/task_N]")
    add("--data", help="packed episodes to take the clip from [data/task_N]")
    add("--split", default="test", choices=["train", "test"], help="of cameras and episodes [test]")
    add("--clip", type=int, default=0, help="which clip, any number from 0 [0]")
    add("--views", type=int, default=2, help="views of the clip, the first is the reference [2]")
    add("--rgb", nargs="+", metavar="PNG", help="your own pictures instead, one a view, the reference first")
    add("--depth", nargs="+", metavar="PNG", help="16-bit millimetres, one a view")
    add("--intrinsics", metavar="NPZ", help="`intrinsics` (V, 3, 3), pixels of these pictures")
    add("--mask", nargs="+", metavar="PNG", help="white where the hand is, one a view; for track.py")
    add("--pose", metavar="NPZ", help="`observed_gripper_in_ref` (A, 4, 4), in the first camera's frame; for track.py")
    add("--opening", nargs="+", type=float, metavar="M", help="metres between the fingers, one an arm; for track.py")
    add("--svd", metavar="FOLDER_OR_REPO", help="Stable Video Diffusion itself, on --rgb")
    add("--released", metavar="CKPT", help="turn the authors' checkpoint into a run folder --out")
    add("--frames", type=int, default=data.FRAMES, help=f"frames to predict, {data.CLIP_HZ} a second [{data.FRAMES}]")
    add("--steps", type=int, help="of the solver [" + ", ".join(f"{k}: {n}" for k, (_, n) in SAMPLERS.items()) + "]")
    add("--solver", choices=SOLVERS, help="[" + ", ".join(f"{k}: {name}" for k, (name, _) in SAMPLERS.items()) + "]")
    add("--guidance", type=float, help="of the last frame, 1 at the first; 1 is one pass a step [1; with --svd 3]")
    add("--precision", choices=["fp32", "bf16"], help="of the networks [bf16 at SVD's size on a GPU, else fp32]")
    add("--seed", type=int, default=0, help="of the starting noise [0]")
    add("--ply", action="store_true", help="also write a cloud file for every frame")
    add("--out", help="folder for the results [RUN/samples/NAME]")
    args = parser.parse_args(argv)
    ours = bool(args.rgb) and not args.svd
    for wrong, says in (
            (not (args.task or args.run or args.svd or args.released), "say --task N, --run FOLDER or --svd REPO"),
            (args.released and not args.out, "--released needs --out, the run folder that it becomes"),
            (args.svd and (not args.rgb or args.depth or args.run), "--svd animates pictures, without depth and "
             "without a run: --svd FOLDER_OR_REPO --rgb A.png"),
            (ours and not (args.depth and args.intrinsics), "--rgb needs --depth and --intrinsics too: the pointmaps "
             "of the observed frame come from them"),
            (ours and len(args.rgb) < 2, "two views or more are needed: --rgb REFERENCE.png OTHER.png"),
            (not ours and (args.depth or args.intrinsics or args.mask or args.pose or args.opening), "--depth, "
             "--intrinsics, --mask, --pose and --opening belong to your own pictures: add --rgb"),
            (args.pose and not args.opening, "--pose needs --opening too, the metres between the fingers"),
            *((not getattr(args, flag) >= least, f"--{flag} must be at least {least}, not {getattr(args, flag)}")
              for flag, least in dict(steps=1, frames=1, views=1, clip=0, guidance=0).items()
              if getattr(args, flag) is not None)):
        if wrong:
            raise ValueError(says)
    return args


def main(argv=None):
    args = parse(argv)
    if args.released:
        convert_released(args.released, args.out)
        return print(f"next, when {args.out}/ has model.json and both VAEs: python sample.py --run {args.out}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.run or f"runs/task_{args.task}")
    large = args.svd or read_info(folder)["preset"]["clip"]
    half = args.precision == "bf16" or not args.precision and large and device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    run = load_svd(args.svd, device, dtype) if args.svd else load_run(folder, device, dtype)
    size = run.model.preset.height, run.model.preset.width
    if args.rgb:
        clip = read_views(size, args.rgb, args.depth, args.intrinsics, args.mask, args.pose, args.opening)
    else:
        task = args.task or run.info.get("task")
        if not (args.data or task):
            raise ValueError(f"{folder} does not say which task it is of: add --task N or --data FOLDER")
        clips = data.Clips(args.data or f"data/task_{task}", args.split, size, args.views, args.frames)
        clip = clips.clip(args.clip)
    guidance = args.guidance if args.guidance is not None else 3.0 if args.svd else 1.0
    began = time.time()
    clip = predict(run, clip, args.frames, args.steps, guidance, args.seed, args.solver, progress=True)
    views = len(clip["rgb"])
    print(f"{views} views x {args.frames} frames in {time.time() - began:.1f} s on {device}")
    name = re.sub(r"\W", "_", clip["name"] if args.rgb else f"{args.split}_{args.clip}")
    out = Path(args.out or run.folder / "samples" / name)
    write_results(out, clip, f"{clip['name']}, seed {args.seed}", args.ply)
    if "view_in_ref" in clip and "true_view_in_ref" in clip:
        for v, (m, degrees) in enumerate(zip(*data.pose_errors(clip["view_in_ref"], clip["true_view_in_ref"]))):
            if v:
                print(f"view {v + 1}: the recovered camera pose is off by {100 * m:.1f} cm and {degrees:.1f} degrees")
    print(f"results: {out}/ (prediction.npz, sheet.png, rgb.gif{', depth.gif, cloud.gif' * ('points' in clip)})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"sample.py: {str(error) or 'interrupted'}")
