"""One RGB-D frame of each view in, ten future frames out: RGB, and pointmaps in the reference view's frame.

    python sample.py --task 1                              # a held-out clip, cameras never trained on
    python sample.py --run runs/task_1 --clip 3 --steps 5  # another one, with more steps
    python sample.py --run runs/task_1 --rgb A.png B.png --depth A_mm.png B_mm.png \\
                     --intrinsics K.npz --mask A_hand.png B_hand.png        # your own two cameras
    python sample.py --svd stabilityai/stable-video-diffusion-img2vid --rgb A.png   # SVD itself
    python sample.py --released 4dgen.ckpt --out runs/released_1    # the authors' weights, as a run

The model is given colours, depth and intrinsics of each view, and no camera pose. The poses come out instead: a view's
observed points, in its own frame, and its predicted points, in the reference's, belong to the same pixels, and a rigid
fit between them is the pose. Through it, where a model predicts what changes, points that stayed are drawn to the
measured ones.

Writes prediction.npz, sheet.png and scene.gif into RUN/samples/NAME.

Letters   B samples, V views (0 is the reference), S streams (0 RGB, 1 pointmap), T predicted frames, F = T + 1 with the
          observed one, A arms, C latent channels, D width of an image embedding, h w latent cells, H W pixels

References: EDM, arXiv 2206.00364 (its equation and algorithm numbers); DPM-Solver++, arXiv 2211.01095; SVD, arXiv
2311.15127; guidance, arXiv 2207.12598.
"""
import argparse
import pickle
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import torch
from einops import rearrange
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import data
from data import invert, point_maps, transform
from model import PRESETS, SVD_REPO, CLIPImageEncoder, Model4D, Preset, clip_preprocess, load_weights
from vae import KINDS, VAE, load_vae, read_keys, save_tensors, save_vae

STEPS = {"change": 1, "v": 8}  # of the solver, by what the network predicts
FAR_SHARE = 0.97               # of FAR: points beyond are the plane where unmeasured pixels were put
STILL = 0.01                   # m: least reach of `anchored`; 10 to 40 mm do alike, at 80 slow hands stick


# ------------------------------------ conditions
# `run` is what load_run returns: model, vaes {"rgb", "pointmap"}, clip (the image encoder, or None), info, folder,
# device, dtype, autocast.

def encode_conditions(run, rgb, own_points):
    """What the observed frame tells the model. rgb, own_points (B, V, 3, H, W) in [-1, 1], points in each view's own
    frame -> cond (B, V, S, C, h, w), which stands beside the noisy latents of every frame, and image embeddings
    (B, V, D), None without CLIP."""
    streams = zip(run.vaes.values(), (rgb, own_points))
    cond = torch.stack([coder.encode_condition(x.flatten(0, 1)) for coder, x in streams], 1)
    cond = cond.unflatten(0, rgb.shape[:2]).to(run.dtype)
    if run.clip is None:
        return cond, None
    pixels = clip_preprocess(rgb.flatten(0, 1).float()).to(next(run.clip.parameters()).dtype)
    return cond, run.clip(pixels).unflatten(0, rgb.shape[:2]).to(run.dtype)


def encode_targets(run, rgb, points):
    """Clean latents (B, V, S, T, C, h, w) of predicted frames. rgb, points (B, V, T, 3, H, W) in [-1, 1], points in
    the reference frame."""
    streams = zip(run.vaes.values(), (rgb, points))
    latents = [coder.encode_latents(x.flatten(0, 2)).float() for coder, x in streams]
    return torch.stack([x.unflatten(0, rgb.shape[:3]) for x in latents], 2)


@torch.no_grad()
def decode(run, latents):
    """Latents (B, V, S, T, C, h, w), video by video to spare memory -> rgb (B, V, T, 3, H, W) in [-1, 1], points
    (B, V, T, 3, H, W) in m, or None."""
    images = []
    for s, coder in enumerate(run.vaes.values()):
        videos = latents[:, :, s].flatten(0, 1)  # (B V, T, C, h, w)
        made = [coder.decode_latents(video, len(video)).float() for video in videos]
        images.append(torch.stack(made).unflatten(0, latents.shape[:2]))
    return images[0].clamp(-1, 1), data.denormalize_points(images[1]) if images[1:] else None


# ------------------------------------ sampler

def karras_sigmas(steps, sigma_min=0.002, sigma_max=700.0, rho=7.0):
    """Noise levels sigma_0 > ... > sigma_steps = 0, (steps + 1,) float64 (EDM eq. 5; SVD's constants)."""
    i = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + i * (low - high)) ** rho, i.new_zeros(1)])


@torch.no_grad()
def sample_dpm(denoise, noise, sigmas, order=2):
    """The probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma by DPM-Solver++(2M): in t = -ln(sigma) it is
    linear but for D, which goes on along the line through its last two values. At order 1 D stays as it is, and this is
    Euler's method (EDM algorithm 1, no churn).

    denoise(x, sigma) -> the clean estimate D; noise: standard normal; sigmas: descending, ending in 0."""
    x = noise * (sigmas[0] ** 2 + 1).sqrt().item()  # variance of noise and data, whose own is 1
    D_before = h_before = None
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        D = D_ahead = denoise(x, sigma)
        if sigma_next > 0 and order == 2:
            h = np.log(sigma / sigma_next)
            if D_before is not None:
                D_ahead = D + (D - D_before) * h / (2 * h_before)
            D_before, h_before = D, h
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * D_ahead
    return x


sample_euler = partial(sample_dpm, order=1)


def sample_latents(run, cond, embeds, frames, steps=None, guidance=1.0, generator=None, solver=sample_dpm,
                   progress=False):
    """Clean latents (B, V, S, T, C, h, w), given what encode_conditions returns.

    guidance: of the last frame, growing over the frames from 1 (as in SVD); 1 runs no unconditional pass. generator: of
    the starting noise, drawn on the CPU, so that all devices start alike."""
    preset, (B, V, S, C, h, w) = run.model.preset, cond.shape
    sigmas = karras_sigmas(steps or STEPS[preset.prediction], preset.sigma_min, preset.sigma_max)
    noise = torch.randn((B, V, S, frames, C, h, w), generator=generator).to(cond.device)
    weight = torch.linspace(1, guidance, frames, device=cond.device)[:, None, None, None]  # (T, 1, 1, 1)

    def denoise(x, sigma):
        sigma = torch.full((B,), sigma, device=x.device)
        D = run.model(x, sigma, cond, embeds).to(x.dtype)
        if guidance != 1:
            nothing = None if embeds is None else torch.zeros_like(embeds)
            unconditional = run.model(x, sigma, torch.zeros_like(cond), nothing).to(x.dtype)
            D = unconditional + weight * (D - unconditional)
        bar.update()
        return D

    with tqdm(total=len(sigmas) - 1, desc="sampling", unit="step", disable=not progress) as bar:
        return solver(denoise, noise, sigmas)


@torch.no_grad()
def predict(run, clip, frames=data.FRAMES, steps=None, guidance=1.0, seed=0, progress=False):
    """The clip with the prediction in it: rgb and, unless the run is RGB only, points, valid and view_in_ref.

    `valid` is where a point lies in front of its own camera, at the recovered pose, and nearer than FAR: the model has
    seen no truth beyond, only the plane on which unmeasured pixels were put. Models that predict what changes leave
    the rest to the observed frame: see `anchored`."""
    if guidance != 1 and run.info.get("dropout", 0.1) == 0:
        raise ValueError(f"{run.folder} was trained with dropout 0: --guidance must be 1")
    tensors = data.to_tensors({key: clip[key] for key in data.NEEDS["observed"]})  # nothing of the truth
    rgb, own_points = (x[None].to(run.device) for x in (tensors["rgb"][:, 0], tensors["own_points"]))
    generator = torch.Generator().manual_seed(seed)
    cond, embeds = encode_conditions(run, rgb, own_points)
    with run.autocast():
        latents = sample_latents(run, cond, embeds, frames, steps, guidance, generator, progress=progress)
    rgb, points = decode(run, latents)  # (1, V, T, 3, H, W)
    clip = dict(clip, rgb=((rgb[0].movedim(2, -1) + 1) * 127.5).round().byte().cpu().numpy())
    if points is None:
        return clip
    points = points[0].movedim(2, -1).cpu().numpy()  # (V, T, H, W, 3)
    own, valid = point_maps(clip["observed_depth"], clip["intrinsics"])
    poses = [recover_view_in_ref(*view) for view in zip(own[1:], valid[1:], points[1:])]
    view_in_ref = np.stack([np.eye(4), *poses])
    if run.model.preset.prediction == "change":
        points = anchored(points, transform(own, view_in_ref), valid)
    z = transform(points, invert(view_in_ref))[..., 2]
    return dict(clip, points=points, view_in_ref=view_in_ref, valid=(z > 0) & (z < FAR_SHARE * data.FAR))


def recover_view_in_ref(own, valid, points):
    """The pose of a view's camera in the reference frame: NaN where too little was measured.

    own (..., 3) points of the observed frame in the view's own frame, valid (...); points (T, ..., 3), the same pixels
    in the reference frame. The median over time removes most of what moves; the fit is reweighted (Geman-McClure), so
    that the rest counts little."""
    source, target = own[valid].astype(float), np.median(points, 0)[valid].astype(float)
    if len(source) < 3:
        return np.full((4, 4), np.nan)
    weights = np.ones(len(source))
    for _ in range(20):
        view_in_ref = data.rigid_fit(source, target, weights)
        residual = np.linalg.norm(transform(source, view_in_ref) - target, axis=-1)
        weights = geman_mcclure(residual, max(np.median(residual), 0.005))
    return view_in_ref


def anchored(points, observed, valid):
    """Predicted points (V, T, H, W, 3) in m, those that did not move drawn to where the observed frame measured them.

    observed (V, H, W, 3): the observed frame's points in the reference frame, at the recovered poses (NaN: the view
    stays as it is), valid (V, H, W). The reach, view by view, is twice the median distance: most points stay."""
    made = points.copy()
    for view, there, known in zip(made, observed, valid & np.isfinite(observed).all(-1)):
        if known.any():
            off = np.linalg.norm(view - there, axis=-1)  # (T, H, W)
            weights = geman_mcclure(off[:, known], max(2 * np.median(off[:, known]), STILL))
            view[:, known] += weights[..., None] * (there - view)[:, known]
    return made


def geman_mcclure(residual, scale):
    """Robust weights: 1 at 0, a quarter at `scale`, next to nothing far beyond."""
    return 1 / (1 + (residual / scale) ** 2) ** 2


# ------------------------------------ pictures

def pictures(clip, prefix=""):
    """{"RGB": , and where points are predicted "z": } of a clip, (V, F, H, W, 3) uint8 each, the observed frame first.
    z is each view's own, then the reference's: red near, blue far, black where nothing is valid. prefix "true_": of the
    truth, where it is known."""
    import matplotlib
    if prefix + "rgb" not in clip:
        return {}
    join = lambda first, key: np.concatenate([first[:, None], clip[prefix + key]], 1)
    made, z = {"RGB": join(clip["observed_rgb"], "rgb")}, clip["observed_depth"]
    if "points" in clip:
        seen = (z > 0) & (z <= data.FAR)
        low, high = np.percentile(z[seen], (1, 99)) * (0.9, 1.1) if seen.any() else (0.0, data.FAR)
        z = np.concatenate([z[:, None], clip[prefix + "points"][..., 2]], 1)
        colours = matplotlib.colormaps["turbo_r"](((z - low) / (high - low)).clip(0, 1))[..., :3]
        made["z"] = (colours * 255 * join(seen, "valid")[..., None]).astype(np.uint8)
    return made


def contact_sheet(path, clip, title=""):
    """Predicted RGB and depth of every view over time, the observed first, each above its truth, one PNG."""
    plt, rows, made, true = data.pyplot(), {}, pictures(clip), pictures(clip, "true_")
    for v in range(len(clip["rgb"])):
        for kind in made:
            rows[f"view {v + 1}, {kind}"] = made[kind][v]
            if true:
                rows[f"view {v + 1}, true {kind}"] = true[kind][v]
    shown = [0, *np.unique(np.linspace(1, clip["rgb"].shape[1], 5).astype(int))]
    figure, axes = plt.subplots(len(rows), len(shown), squeeze=False, layout="constrained",
                                figsize=(2.1 * len(shown) + 0.6, 1.75 * len(rows) + 0.4))
    for row, (label, video) in zip(axes, rows.items()):
        row[0].set_ylabel(label, fontsize=9)
        for ax, t in zip(row, shown):
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.imshow(video[t], interpolation="nearest")
    for ax, t in zip(axes[0], shown):
        ax.set_title(f"+{t / clip['fps']:g} s" if t else "observed", fontsize=9)
    figure.suptitle(title, fontsize=9)
    with data.writing(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
    plt.close(figure)


def cloud_frames(clip, prefix, side):
    """The fused cloud of all views while time runs and a camera swings, (T, side, side, 3) uint8: squares in the
    points' colours, the nearest on top."""
    points, rgb, valid = (clip[prefix + key] for key in ("points", "rgb", "valid"))
    T, radius = points.shape[1], max(1, side // (2 * points.shape[2]))
    square, border = np.arange(2 * radius + 1), side + 2 * radius
    intrinsics = np.array([[1.2 * side, 0, side / 2], [0, 1.2 * side, side / 2], [0, 0, 1]])
    target = np.median(points[0, 0], axis=(0, 1))
    drawn = np.full((T, border, border, 3), 245, np.uint8)
    for t in range(T):
        seen, phase = valid[:, t], 2 * np.pi * t / T
        turned = Rotation.from_euler("YX", (0.5 * np.sin(phase), -0.15 - 0.15 * np.cos(phase))).as_matrix()
        pixels, z = data.project((points[:, t][seen] - target) @ turned + (0, 0, 1.2 * target[2] + 0.4), intrinsics)
        shown = (z > 0.05) & (pixels > -0.5).all(-1) & (pixels < side - 0.5).all(-1)
        order = np.argsort(-z[shown])  # far first: later writes cover earlier ones
        u, v = pixels[shown][order].round().astype(int)[..., None, None].swapaxes(0, 1)
        drawn[t, v + square[:, None], u + square] = rgb[:, t][seen][shown][order][:, None, None]
    return drawn[:, radius:-radius, radius:-radius]


def write_film(path, clip, rgb=None):
    """All of a clip in motion, a gif with a clock: a row a view of the observed frame, the others, their depth; beside
    them the fused cloud; below, the truth's. With `rgb` (V, F, ., ., 3) for the colours, such as track.py's with the
    hand drawn in, without the truth's."""
    films = []
    for prefix in ("", "true_")[:1 + (rgb is None and "true_rgb" in clip)]:
        colours, *depth = pictures(clip, prefix).values()
        colours = colours if rgb is None else rgb
        columns = [colours[:, :1].repeat(colours.shape[1] - 1, 1), colours[:, 1:], *(z[:, 1:] for z in depth)]
        for i, images in enumerate(columns):
            size = 128, 128 * images.shape[3] // images.shape[2]
            images = data.resize(np.moveaxis(images, -1, 0), size, "label")  # the nearest pixel
            columns[i] = rearrange(images, "c v t h w -> t (v h) w c")
        cloud = [cloud_frames(clip, prefix, columns[0].shape[1]) for _ in depth]
        films.append(np.concatenate(columns + cloud, 2))
    seconds = np.arange(1, 1 + len(films[0])) / clip["fps"]
    data.write_gif(path, np.concatenate(films, 1), clip["fps"], seconds)


# ------------------------------------ loading

def read_info(folder):
    hint = f"train first, `python train.py --task N --out {folder}`"
    info = read_keys(path := Path(folder) / "model.json", hint, "preset", "mv_attention", "rgb_only", "vae", "init")
    with data.reading(path, hint):
        return info | dict(preset=asdict(Preset(**info["preset"])))


def load_run(run, device="cpu", dtype=torch.float32):
    """What train.py left in a run folder, ready for `predict`: model.json says how the model is built, and where its
    VAEs and CLIP lie."""
    folder = Path(run)
    info = read_info(folder)
    with torch.device("meta"):
        net = Model4D(Preset(**info["preset"]), info["mv_attention"], info["rgb_only"])
    load_weights(net, [folder / "model.safetensors"], dtype, device)
    return as_run(net, *load_frozen(net, folder / info["vae"], info["init"], device, dtype), info, folder)


def load_frozen(net, vae_folder, init, device, dtype):
    """What never trains with the U-Net: the VAEs of stage 1 and, for presets with CLIP, its encoder from `init`, a hub
    repo or a folder in the hub's layout."""
    vaes = {}
    for name in KINDS[:2 - net.rgb_only]:
        path = vae_folder / f"vae_{name}.safetensors"
        vaes[name] = vae = load_vae(path).to(device, dtype)
        if vae.config.get("components", vae.config.get("latent_channels")) != net.preset.unet["in_channels"] // 2:
            raise ValueError(f"{path} is no code of preset {net.preset.name}: use another --vae or --out")
    return vaes, CLIPImageEncoder.from_pretrained(init, dtype=dtype, device=device) if net.preset.clip else None


def load_svd(folder_or_repo, device="cpu", dtype=torch.float32):
    """SVD's image-to-video as published, as a run: every view by itself, RGB only."""
    net = Model4D.from_pretrained(PRESETS["svd"], folder_or_repo, dtype, device, rgb_only=True)
    vaes = {"rgb": VAE.from_pretrained(folder_or_repo, dtype=dtype, device=device)}
    clip = CLIPImageEncoder.from_pretrained(folder_or_repo, dtype=dtype, device=device)
    return as_run(net, vaes, clip, {}, Path("runs/svd"))


def fastest(large):
    """Device and dtype: the GPU where there is one, and there bf16 for the paper's model, which loses nothing by it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, torch.bfloat16 if large and device == "cuda" else torch.float32


def as_run(net, vaes, clip, info, folder):
    like = next(net.parameters())
    return SimpleNamespace(model=net.eval(), vaes=vaes, clip=clip, info=info, folder=folder, device=like.device,
                           dtype=like.dtype, autocast=nullcontext)


def read_picture(path, kind, size=None):
    """A picture file: rgb (H, W, 3) uint8, depth (H, W) millimetres, mask (H, W). size: (H, W) it must have."""
    with data.reading(path):
        picture = np.asarray(imageio.imread(path))
    eight_bit, axes = picture.dtype == np.uint8, picture.ndim
    coloured = axes == 3 and picture.shape[2] >= 3
    good, needed = dict(rgb=(eight_bit and coloured, "an 8-bit RGB picture"),
                        mask=(axes == 2 or coloured, "a grey or RGB mask"),
                        depth=(not eight_bit and axes == 2, "a picture of 16-bit millimetres"))[kind]
    if not good or size not in (None, picture.shape[:2]):
        raise ValueError(f"{path} is {picture.dtype} of shape {picture.shape}: {needed}, as large as its RGB "
                         "picture, is needed")
    if kind == "mask":
        return picture.reshape(*picture.shape[:2], -1)[..., :3].max(-1)
    return picture[..., :3] if kind == "rgb" else picture


def read_views(size, rgb, depth=None, intrinsics=None, mask=None, pose=None, opening=None):
    """The user's own pictures as a clip of pictures of `size` (H, W), in the forms that the flags' help texts say.
    Without depth, for SVD itself, nothing is measured."""
    for flag, files in (("depth", depth), ("mask", mask)):
        if files and len(files) != len(rgb):
            raise ValueError(f"--rgb names {len(rgb)} pictures, --{flag} {len(files)}: one a view is needed")
    colours = [read_picture(path, "rgb") for path in rgb]
    sizes = [picture.shape[:2] for picture in colours]
    read = lambda paths, kind: [read_picture(path, kind, own) for path, own in zip(paths, sizes)]
    fit = lambda pictures, kind: np.stack([data.resize(picture, size, kind) for picture in pictures])
    clip = dict(fps=float(data.CLIP_HZ), name=Path(rgb[0]).stem, observed_rgb=fit(colours, "rgb"))
    if not depth:
        return dict(clip, observed_depth=np.zeros((len(rgb), *size), np.float32),
                    intrinsics=np.tile(np.eye(3), (len(rgb), 1, 1)))
    cameras = data.read_recorded(intrinsics, "intrinsics", (len(rgb), 3, 3))
    clip["intrinsics"] = np.stack([data.scale_intrinsics(*camera, size) for camera in zip(cameras, sizes)])
    clip["observed_depth"] = fit(read(depth, "depth"), "depth")
    if mask:
        clip["observed_gripper"] = fit(read(mask, "mask"), "label")
    if pose:
        clip["observed_gripper_in_ref"] = data.read_recorded(pose, "observed_gripper_in_ref", (None, 4, 4))
    if opening:
        clip["observed_opening"] = np.array(opening)
    return data.check_clip(clip)


# ------------------------------------ the authors' released weights
# The files of the hub repo Zeyi/4dgen-ckpts, in the layout of sgm, the code that SVD was trained with. What these
# weights want otherwise than ours stands in the preset and in the VAEs' configs: GroupNorm eps, which view's CLIP token
# a stream sees, no norm before the cross-view attention, an encoder for conditions (its quant_conv stayed random, and
# the U-Net learned with it) and another for targets. SVD's three numbers were not embedded: that layer becomes zero.

RESIDUAL = {".in_layers.0.": ".norm1.", ".in_layers.2.": ".conv1.", ".emb_layers.1.": ".time_emb_proj.",
            ".out_layers.0.": ".norm2.", ".out_layers.3.": ".conv2.", ".skip_connection.": ".conv_shortcut."}
OF_UNET = {".input_blocks.0.0.": ".conv_in.", ".out.0.": ".conv_norm_out.", ".out.2.": ".conv_out.",
           ".middle_block.0.": ".mid_block.resnets.0.", ".middle_block.1.": ".mid_block.attentions.0.",
           ".middle_block.2.": ".mid_block.resnets.1.", ".time_embed.": ".time_embedding.",
           "embedding.0.": "embedding.linear_1.", "embedding.2.": "embedding.linear_2.",
           "pos_embed.0.": "pos_embed.linear_1.", "pos_embed.2.": "pos_embed.linear_2."} | RESIDUAL
OF_VAE = {".mid.": ".mid_block.", ".block_1.": ".resnets.0.", ".block_2.": ".resnets.1.",
          ".attn_1.norm.": ".attentions.0.group_norm.", ".attn_1.proj_out.": ".attentions.0.to_out.0.",
          ".attn_1.": ".attentions.0.to_", ".down.": ".down_blocks.", ".block.": ".resnets.",
          ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.", ".norm_out.": ".conv_norm_out.",
          ".conv_out.time_mix_conv.": ".time_conv_out.", ".mix_factor": ".time_mixer.mix_factor",
          ".nin_shortcut.": ".conv_shortcut."} | RESIDUAL
PLACES = {  # what a key begins with: the module it goes to, and how its name begins there
    "model.diffusion_model.": ("model", ""), "encoder.": ("vae", "encoder."), "decoder.": ("vae", "decoder.")}
UNUSED = ["conditioner.embedders.0.", "loss."]  # CLIP, frozen in training: SVD's stands for it; of the VAE's training
for seen, target, kind in (("conditioner.embedders.1.encoder.", "first_stage_pointmap_model.", "pointmap"),
                           ("conditioner.embedders.2.encoder.", "first_stage_color_model.", "rgb")):
    PLACES |= {seen + "encoder.": (kind, "encoder."), seen + "quant_conv.": (kind, "quant_conv."),
               target + "encoder.": (kind, "target_encoder."), target + "decoder.": (kind, "decoder.")}
    UNUSED += [seen + "decoder.", seen + "post_quant_conv."]  # conditions are only encoded


def renamed(name, names):
    for theirs, ours in names.items():
        name = f".{name}".replace(theirs, ours)[1:]
    return name


def video_residual(name):
    """sgm's video residual block is a spatial one that has the temporal one inside."""
    return re.sub(r"(resnets\.\d\.)(time_stack\.|(?!time_mixer))",
                  lambda match: f"{match[1]}{'temporal' if match[2] else 'spatial'}_res_block.", name)


def unet_name(name, layers):
    """Our name, in Model4D, of a parameter of sgm's U-Net. sgm counts all layers in one row, on the way down with the
    resamplers."""
    name = renamed(name, OF_UNET)
    if match := re.match(r"(in|out)put_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?", name):
        level, i = divmod(int(match[2]) - (match[1] == "in"), layers + 1)
        way, sampler = ("down", "downsamplers.0.conv.") if match[1] == "in" else ("up", "upsamplers.0.conv.")
        part = sampler if match[4] else f"{('resnets', 'attentions')[int(match[3])]}.{i}."
        name = f"{way}_blocks.{level}.{part}{name[match.end():]}"
    name = video_residual(re.sub(r"(attentions\.\d\.)time_stack\.", r"\1temporal_transformer_blocks.", name))
    name, cross_view = re.subn(r"^attn_layers_decoder\.(\d|1[01])\.", r"cross_view.\1.attention.", name)
    return name if cross_view else f"unet.{name}"


def vae_name(name, levels):
    """Our name of a parameter of sgm's VAE, which counts `up` from the finest level."""
    name = re.sub(r"\bup\.(\d)\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.", name)
    name = renamed(name, OF_VAE)
    return video_residual(name) if name.startswith("decoder") else name


def released_parts(state, preset):
    """Sorts a released state dict by our modules: {"model", "rgb", "pointmap": {our key: tensor}}, or for pointmap.ckpt
    and color.ckpt {"vae": ...}."""
    parts, layers, levels = {}, preset.unet["layers_per_block"], len(preset.vae["block_out_channels"])
    for key, x in state.items():
        first = key.replace("model.diffusion_model_2.", "model.diffusion_model.")
        if first != key:  # a shallow copy there: one storage under two names
            if first not in state or x.data_ptr() != state[first].data_ptr() and not torch.equal(x, state[first]):
                raise ValueError(f"{key} differs from {first}: a released model has one decoder under two names")
        elif not key.startswith(tuple(UNUSED)):
            if not (prefix := next(filter(key.startswith, PLACES), "")):
                raise ValueError(f"{key} fits no part of the model")
            (part, place), name = PLACES[prefix], key.removeprefix(prefix)
            name = unet_name(name, layers) if part == "model" else vae_name(place + name, levels)
            one_by_one = "attentions" in name and x.ndim == 4  # a convolution there, linear here
            parts.setdefault(part, {})[name] = x.flatten(1) if one_by_one else x
    if ours := parts.get("model"):
        ours |= {re.sub("^unet", "decoder_b", name): x for name, x in ours.items()
                 if name.startswith(("unet.up_blocks", "unet.conv_norm_out", "unet.conv_out"))}
        width, ids = 4 * preset.unet["block_out_channels"][0], preset.unet["projection_class_embeddings_input_dim"]
        for layer, inputs in ("linear_1", ids), ("linear_2", width):
            ours[f"unet.add_embedding.{layer}.weight"] = torch.zeros(width, inputs)
            ours[f"unet.add_embedding.{layer}.bias"] = torch.zeros(width)
    if ours := parts.get("vae"):  # alone it has no quant_conv
        C = 2 * preset.vae["latent_channels"]
        ours |= {"quant_conv.weight": torch.eye(C)[:, :, None, None], "quant_conv.bias": torch.zeros(C)}
    return parts


def convert_released(path, out, preset=PRESETS["svd"], init=SVD_REPO):
    """Turns 4dgen.ckpt into a run folder like train.py's, or pointmap.ckpt / color.ckpt into vae_{pointmap,rgb}.
    Nothing that is pickled in the file is run. init: where CLIP comes from."""
    path, out = Path(path), Path(out)
    alone = "pointmap" if "pointmap" in path.name else "rgb" if "color" in path.name else None
    preset = replace(preset, view_norm=False, resnet_eps=1e-5, tokens="crossed")
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # pages of the file, no copy
        state = file.get("state_dict", file) if isinstance(file, dict) else {}
        if not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
            raise ValueError("has no state_dict of tensors")
        modules = {}
        for part, tensors in released_parts(state, preset).items():
            with torch.device("meta"):
                coder = preset.vae | dict(target_encoder=part != "vae")
                modules[part] = Model4D(preset) if part == "model" else VAE(coder)
            modules[part].load_state_dict(tensors, strict=True, assign=True)
        if not modules:
            raise ValueError("holds no part of the model")
        if "vae" in modules and not alone:
            raise ValueError("is one VAE, and only its file's name says which: call it pointmap.ckpt or color.ckpt")
    except pickle.UnpicklingError:
        foreign = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "objects"
        raise ValueError(f"{path} holds pickled {foreign}: not loaded, for safety") from None
    except (ValueError, RuntimeError, OSError, EOFError) as error:  # damaged, or not as expected
        raise ValueError(f"{path} can't be used: {' '.join(str(error).split())[:500]}") from None
    for part, module in modules.items():
        if part == "model":
            save_tensors(out / "model.safetensors", module.state_dict())
            data.write_json(out / "model.json", dict(preset=asdict(preset), mv_attention="points", rgb_only=False,
                                                     init=init, vae=".", step=0, source=path.name))
        else:
            kind = alone if part == "vae" else part
            save_vae(out / f"vae_{kind}.safetensors", module, dict(kind=kind, source=path.name))


# ------------------------------------ script

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", type=int, choices=data.TASKS, help="take a held-out clip of this task [that of --run]")
    source = parser.add_mutually_exclusive_group().add_argument
    source("--run", help="folder that train.py wrote [runs/task_N]")
    source("--svd", metavar="FOLDER_OR_REPO", help="Stable Video Diffusion itself, RGB only")
    source("--released", metavar="CKPT", help="turn the authors' checkpoint into a run folder --out")
    add("--data", help="packed episodes to take the clip from [data/task_N]")
    add("--clip", type=int, default=0, help="which held-out clip, any number from 0 [0]")
    add("--views", type=int, default=2, help="cameras of the clip, the first is the reference [2]")
    add("--rgb", nargs="+", metavar="PNG", help="your own 8-bit pictures instead, one a view, the reference first")
    add("--depth", nargs="+", metavar="PNG", help="16-bit millimetres, 0 where nothing was measured, one a view")
    add("--intrinsics", metavar="NPZ", help="`intrinsics` (V, 3, 3), in pixels of these pictures")
    add("--mask", nargs="+", metavar="PNG", help="white where the hand is, one a view; for track.py")
    add("--pose", metavar="NPZ", help="`observed_gripper_in_ref` (A, 4, 4), the hand in the first camera's frame, "
        "metres, OpenCV axes; for track.py")
    add("--opening", nargs="+", type=float, metavar="M", help="metres between the fingers, one an arm; for track.py")
    add("--frames", type=int, default=data.FRAMES, help=f"to predict, {data.CLIP_HZ} a second [{data.FRAMES}]")
    add("--steps", type=int, help="of the solver [8 of svd, 1 of the small presets]")
    add("--guidance", type=float, help="of the last frame, 1 at the first; 1 is one pass a step [1; with --svd 3]")
    add("--seed", type=int, default=0, help="of the starting noise [0]")
    add("--out", help="folder for the results [RUN/samples/NAME]")
    args = parser.parse_args(argv)
    for flag, least in dict(steps=1, frames=1, views=1, clip=0, guidance=0).items():
        if getattr(args, flag) is not None and not getattr(args, flag) >= least:  # NaN too
            raise ValueError(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    own = args.rgb and not args.svd
    for wrong, says in (
            (not (args.task or args.run or args.released or args.svd and args.rgb),
             "say --task N, --run FOLDER, or --svd FOLDER_OR_REPO --rgb A.png"),
            (own and not (args.depth and args.intrinsics), "--rgb needs --depth and --intrinsics too"),
            (not own and (args.depth or args.intrinsics or args.mask or args.pose or args.opening),
             "--depth, --intrinsics, --mask, --pose, --opening go with your own pictures: add --rgb, without --svd"),
            (args.opening and not args.pose, "--opening goes with --pose"),
            (args.rgb and args.data, "--data does nothing with --rgb: leave it out"),
            (args.released and (args.task or args.rgb or args.data or args.steps or args.guidance is not None),
             "--released takes nothing but --out")):
        if wrong:
            raise ValueError(says)
    return args


def main(argv=None):
    args = parse(argv)
    if args.released:
        out = args.out or f"runs/{Path(args.released).stem}"
        convert_released(args.released, out)
        return print(f"next, when {out}/ has model.json and both VAEs: python sample.py --task N --run {out}")
    folder = Path(args.run or f"runs/task_{args.task}")
    run = (load_svd(args.svd, *fastest(True)) if args.svd
           else load_run(folder, *fastest(read_info(folder)["preset"]["clip"])))
    size = run.model.preset.height, run.model.preset.width
    if args.rgb:
        clip = read_views(size, args.rgb, args.depth, args.intrinsics, args.mask, args.pose, args.opening)
    else:
        episodes = args.data or f"data/task_{args.task or run.info.get('task', 'N')}"
        clip = data.Clips(episodes, "test", size, args.views, args.frames).clip(args.clip)
    guidance = args.guidance if args.guidance is not None else 3.0 if args.svd else 1.0
    clip = predict(run, clip, args.frames, args.steps, guidance, args.seed, progress=True)
    name = re.sub(r"\W", "_", clip["name"] if args.rgb else f"test_{args.clip}")
    out = Path(args.out or run.folder / "samples" / name)
    data.write_npz(out / "prediction.npz", clip)
    contact_sheet(out / "sheet.png", clip, f"{clip['name']}, seed {args.seed}")
    write_film(out / "scene.gif", clip)
    print(f"results: {out}/ (prediction.npz, sheet.png, scene.gif)")
    if np.isnan(clip.get("view_in_ref", 0)).any():
        raise ValueError("too little depth is measured in a view to recover its pose: track.py can't use this")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"sample.py: {str(error) or 'interrupted'}")
