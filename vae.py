"""Stage 1, the codes that the 4D model works in: one for RGB, and one for pointmaps, whose pixels hold metric x, y, z.

    python vae.py --task 1                  # tiny, small: a linear code of each, fitted to data/task_1 in seconds
    python vae.py --task 1 --preset svd     # SVD's VAE for RGB, and a copy of it fine-tuned on pointmaps: GPU hours

Writes runs/task_1/vae_{rgb,pointmap}.safetensors, each with a .json beside it (config, scores on held-out episodes
and cameras). train.py runs this first where they are missing. The pointmap code holds two kinds of pointmap, a view's
in its own camera's frame (the condition) and in the reference camera's (the target), and is fitted to both.

Letters   B clips, T frames of one, N images (in clips: B T), C channels, H W pixels, h w latent cells

References: the linear code is the best that a linear VAE can be, in closed form, Tipping and Bishop 1999 and arXiv
1911.02469; Stable Video Diffusion, arXiv 2311.15127; the pointmap VAE, arXiv 2507.01099.
"""
import argparse
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, TensorSpec, serialize_file
from tqdm import tqdm, trange

import data
from model import (PRESETS, SVD_REPO, GroupNorm, Mixer, Resample, Residual, TimeConv, choose_preset, load_pretrained,
                   load_weights)

KINDS = "rgb", "pointmap"
FIT_CLIPS = 300  # moments (2 views, 2 frames) that a linear code is fitted to
HELD_OUT = 32    # moments that the scores are taken on


# ----------------------------------------------------------------------------------- the linear code

class LinearCode(nn.Module):
    """The C principal components of P x P pixel patches: a strided convolution, and its transpose to go back.

    One scale for all components: whitened, the finest detail, nearly noise, would weigh as much as the whole layout."""

    def __init__(self, config):
        super().__init__()
        self.config, self.cell = dict(config), config["patch_size"]
        self.register_buffer("mean", torch.zeros(3, self.cell, self.cell))
        self.register_buffer("basis", torch.zeros(config["components"], 3, self.cell, self.cell))  # orthonormal
        self.register_buffer("scale", torch.ones(1))

    def fit(self, batches):
        """Principal components of the patches of all images (N, 3, H, W) that `batches` yields; float64 inside."""
        count, total, square = 0, 0.0, 0.0
        for images in batches:
            x = rearrange(images.double(), "n c (h p) (w q) -> (n h w) (c p q)", p=self.cell, q=self.cell)
            count, total, square = count + len(x), total + x.sum(0), square + x.T @ x
        mean = total / count
        variance, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))  # ascending
        chosen = slice(-len(self.basis), None)
        self.mean.copy_(mean.view_as(self.mean))
        self.basis.copy_(vectors[:, chosen].T.flip(0).reshape(self.basis.shape))
        self.scale.copy_(variance[chosen].mean().sqrt())
        return self

    def encode_latents(self, images):
        """images (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w) of unit variance, over all components together"""
        check_size(images, self.cell)
        with torch.autocast(images.device.type, enabled=False):  # bf16's 8 bits would cost millimetres
            centre = (self.basis * self.mean).sum((1, 2, 3))
            return F.conv2d(images.to(self.basis.dtype), self.basis, -centre, stride=self.cell) / self.scale

    encode_condition = encode_latents

    def decode_latents(self, latents, frames=1):
        """latents (N, C, h, w) -> images (N, 3, H, W); frames are coded one by one"""
        with torch.autocast(latents.device.type, enabled=False):
            x = F.conv_transpose2d(latents.to(self.basis.dtype) * self.scale, self.basis, stride=self.cell)
            return x + self.mean.repeat(1, *latents.shape[-2:])

    def _apply(self, move, recurse=True):
        """.to(device) and .double() work as ever; .bfloat16() leaves the code in float32."""
        def at_least_float32(x):
            like = move(x[..., :0])
            return x.to(like.device, torch.promote_types(like.dtype, torch.float32))
        return super()._apply(at_least_float32, recurse)


# ---------------------------------------------------------------------------------------- SVD's VAE
# A 2-D encoder, and a decoder that looks along time too. Attribute names are the hub's key names.

class VideoResBlock(nn.Module):
    """A residual block over each frame, one along time, and the blend of the two."""

    def __init__(self, channels_in, channels, groups):
        super().__init__()
        self.spatial_res_block = Residual(channels_in, channels, groups, eps=1e-6)
        self.temporal_res_block = Residual(channels, channels, groups, eps=1e-5, temporal=True)  # as it is in SVD
        self.time_mixer = Mixer()

    def forward(self, x, frames):                                 # (B T, C, H, W)
        x = self.spatial_res_block(x)
        H = x.shape[2]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=frames)  # so that norms see a whole clip
        x = self.time_mixer(self.temporal_res_block(x), x)        # the other way round than in the U-Net
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=H)


class Attention(nn.Module):
    """Self-attention of one head over the cells of an image, with its own norm and a residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):  # (N, C, H, W)
        y = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        y = self.to_out[0](F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[2])


class Level(nn.Module):
    """The residual blocks of one resolution, each made by block(channels in, channels out, groups), and a resampler."""

    def __init__(self, block, channels_in, channels, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(block(channels if i else channels_in, channels, groups) for i in range(layers))
        half = [nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, stride=2)})] if down else []
        self.downsamplers = nn.ModuleList(half)
        self.upsamplers = nn.ModuleList([Resample(channels, 1)] if up else [])

    def forward(self, x, *frames):  # frames: of a clip, in the decoder
        for block in self.resnets:
            x = block(x, *frames)
        for downsample in self.downsamplers:
            x = downsample["conv"](F.pad(x, (0, 1, 0, 1)))  # SVD's VAE pads right and below only
        for upsample in self.upsamplers:
            x = upsample(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class MidBlock(nn.Module):
    """Residual, attention, residual."""

    def __init__(self, block, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList([block(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x, *frames):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, *frames)), *frames)


class Encoder(nn.Module):
    def __init__(self, latent_channels, widths, layers, groups):
        super().__init__()
        block = partial(Residual, eps=1e-6)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(block, widths[max(i - 1, 0)], width, layers, groups, down=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(block, widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):                                    # (N, 3, H, W)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            x = block(x)                                     # (N, C, H/2, W/2), ..., (N, C, h, w)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (N, 2 C, h, w): mean and log variance


class Decoder(nn.Module):
    def __init__(self, latent_channels, widths, layers, groups):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(VideoResBlock, widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(VideoResBlock, widths[max(i - 1, 0)], width, layers + 1, groups, up=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.time_conv_out = TimeConv(3)

    def forward(self, z, frames):                         # (B T, C, h, w)
        x = self.mid_block(self.conv_in(z.contiguous(memory_format=torch.channels_last)), frames)
        for block in self.up_blocks:
            x = block(x, frames)                          # (B T, C, 2h, 2w), ..., (B T, C, H, W)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B T, 3, H, W)
        H = x.shape[2]
        x = self.time_conv_out(rearrange(x, "(b t) c h w -> b c t (h w)", t=frames))
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=H)


class VAE(nn.Module):
    """SVD's VAE, at any width. config: the contents of the hub's vae/config.json, and two keys of our own:
    norm_num_groups (absent: 32), and target_encoder, true where predicted frames have an encoder of their own, as in
    the authors' released weights."""

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        widths, C = list(config["block_out_channels"]), config["latent_channels"]
        sizes = C, widths, config["layers_per_block"], config.get("norm_num_groups", 32)
        self.cell = 2 ** (len(widths) - 1)  # pixels along the side of a latent cell
        self.scale_factor = config.get("scaling_factor", 0.18215)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        self.target_encoder = Encoder(*sizes) if config.get("target_encoder") else None

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def from_pretrained(cls, folder_or_repo, subfolder="vae", dtype=torch.float32, device="cpu"):
        """From a folder in the hub's layout, or a hub repo. Raises a one-line ValueError."""
        return load_pretrained(cls, folder_or_repo, subfolder, dtype, device)

    def encode(self, images):
        """images (N, 3, H, W) in [-1, 1] -> mean, log variance (N, C, h, w) of the latents, not scaled"""
        check_size(images, self.cell)
        mean, logvar = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype))).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents, num_frames):
        """latents (N, C, h, w) of clips of num_frames frames, not scaled -> images (N, 3, H, W) near [-1, 1]"""
        if len(latents) % num_frames:
            raise ValueError(f"VAE: {len(latents)} latents are not a whole number of clips of {num_frames} frames")
        return self.decoder(latents.to(self.quant_conv.weight.dtype), num_frames)

    def encode_condition(self, images):
        """What the U-Net is given of an observed frame: the mean as it is, which is how SVD was trained."""
        return self.encode(images)[0]

    def encode_latents(self, images):
        """Clean latents of predicted frames, of about unit variance."""
        if self.target_encoder is None:
            return self.encode(images)[0] * self.scale_factor
        return self.target_encoder(images.to(self.quant_conv.weight.dtype)).chunk(2, 1)[0] * self.scale_factor

    def decode_latents(self, latents, frames):
        return self.decode(latents / self.scale_factor, frames)


def check_size(images, cell):
    H, W = images.shape[-2:]
    if H % cell or W % cell:
        raise ValueError(f"images of {H}x{W} pixels can't be encoded: height and width must be multiples of {cell}")


def build(config):
    return LinearCode(config) if "components" in config else VAE(config)


@contextmanager
def writing_tensors(path):
    """data.writing, for writers that have exceptions of their own for a full disk."""
    with data.writing(path) as partial:
        try:
            yield partial
        except (RuntimeError, SafetensorError) as error:
            raise OSError(str(error).splitlines()[0]) from None


def save_tensors(path, tensors):
    """A safetensors file of {name: tensor}; two names may share one storage, which save_file refuses."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    specs = {name: TensorSpec(dtype=str(x.dtype).removeprefix("torch."), shape=x.shape, data_ptr=x.data_ptr(),
                              data_len=x.nbytes) for name, x in tensors.items()}
    with writing_tensors(path) as partial:
        serialize_file(specs, partial)


def save_vae(path, coder, info):
    """Writes PATH (.safetensors) and, last, the .json beside it: the config, and `info`."""
    description = Path(path).with_suffix(".json")
    description.unlink(missing_ok=True)  # it never stands beside weights of another run
    save_tensors(path, coder.state_dict())
    data.write_json(description, dict(config=coder.config, **info))


def read_keys(path, hint, *keys):
    """A json file that must have these keys."""
    info = data.read_json(path, hint)
    if not isinstance(info, dict) or not set(keys) <= set(info):
        raise ValueError(f"{path} is damaged (not all of {', '.join(keys)} are in it): replace or delete it; {hint}")
    return info


def load_vae(path):
    """The LinearCode or VAE of a file that save_vae wrote, on the CPU in float32. Raises a one-line ValueError."""
    path = Path(path)
    hint = f"make it first, `python vae.py --task N --out {path.parent}`"
    with torch.device("meta"):
        coder = build(read_keys(path.with_suffix(".json"), hint, "config")["config"])
    load_weights(coder, [path])
    return coder.eval()


# --------------------------------------------------------------------------------------- the command

def images_of(clip, kind):
    """All images of a clip of data.Clips, (N, 3, H, W), and, of pointmaps, where they count, (N, 1, H, W)."""
    if kind == "rgb":
        return clip["rgb"].flatten(0, 1), None
    images = torch.cat([clip["points"].flatten(0, 1), clip["own_points"][1:]])  # view 0's own are among points
    return images, torch.cat([clip["valid"].flatten(0, 1), clip["valid"][1:, 0]])[:, None]


def masked_l1(made, images, valid):
    """Mean absolute error over valid pixels. made, images (N, 3, H, W); valid (N, 1, H, W) bool."""
    error = (made - images).abs().mean(1, keepdim=True)
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def evaluate(coder, kind, clips, device):
    """Of held-out images, frame by frame: psnr in dB; or, of points, AbsRel of z and the median distance in mm."""
    rows = []
    for i in range(HELD_OUT):
        images, valid = images_of(clips[i], kind)
        made = coder.decode_latents(coder.encode_latents(images.to(device)), 1).float().cpu()
        if kind == "rgb":
            rows.append(dict(psnr=-10 * ((made.clamp(-1, 1) - images) / 2).square().mean().log10()))
            continue
        made, true = data.denormalize_points(made), data.denormalize_points(images)
        seen = valid[:, 0] & (true[:, 2] > 0)
        error = made - true  # (N, 3, H, W) m
        rows.append(dict(abs_rel=(error[:, 2].abs() / true[:, 2])[seen].mean(),
                         median_mm=1000 * error.norm(dim=1)[seen].median()))
    return {name: round(float(sum(row[name] for row in rows) / len(rows)), 5) for name in rows[0]}


def moment(clip, step, frames):
    """What a step of the fine-tuning sees: at odd steps `frames` of every view's video, in the reference's frame, at
    even steps the observed frame of each view, in its own. images (N, 3, H, W), valid (N, 1, H, W), frames a video."""
    if step % 2 == 0:
        return clip["own_points"], clip["valid"][:, :1], 1
    start = step // 2 % (clip["points"].shape[1] - frames + 1)
    images, valid = (clip[key][:, start:start + frames].flatten(0, 1) for key in ("points", "valid"))
    return images, valid[:, None], frames


def tune(args, clips, path, device):
    """SVD's VAE, fine-tuned on pointmaps. A run that was cut off goes on from its last save, with the same clips."""
    coder = VAE.from_pretrained(args.init).to(device).train()
    optimizer = torch.optim.Adam(coder.parameters(), args.lr)  # as in the paper
    saved_as, first = path.with_suffix(".resume.pt"), 0
    settings = {name: getattr(args, name) for name in ("init", "steps", "lr", "frames", "seed")}
    if saved_as.exists():
        with data.reading(saved_as, "delete it to start again"):
            saved = torch.load(saved_as, map_location=device, weights_only=True)
            started_with = saved["settings"]
        if started_with != settings:
            raise ValueError(f"{saved_as} was started with {started_with}: give these flags, or delete it")
        coder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in (bar := trange(first, args.steps, initial=first, total=args.steps, desc="vae pointmap")):
        images, valid, frames = moment(clips[step], step, args.frames)
        images, valid = images.to(device), valid.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, _ = coder.encode(images)  # no draw: the 4D model sees the mean
            made = coder.decode(mean, frames)
        loss = masked_l1(made.float(), images, valid)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"the gradient is {norm} at step {step}: lower --lr from {args.lr}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix_str(f"mean error {loss.item():.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            with writing_tensors(saved_as) as partial:
                torch.save(dict(step=step + 1, settings=settings, model=coder.state_dict(),
                                optimizer=optimizer.state_dict()), partial)
    return coder.eval()


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", type=int, default=1, choices=data.TASKS, help="[1]")
    add("--data", help="packed episodes, rendered first where missing [data/task_N]")
    add("--out", help="folder to write to [runs/task_N]")
    add("--preset", default="auto", choices=["auto", *PRESETS], help="size of the model [auto: by the device]")
    add("--seed", type=int, default=0, help="of the clips [0]")
    add("--init", default=SVD_REPO, help=f"svd: hub repo, or folder with a subfolder vae in its layout [{SVD_REPO}]")
    add("--steps", type=int, default=4000, help="svd: steps of one clip that the pointmap VAE is fine-tuned for [4000]")
    add("--lr", type=float, default=1e-5, help="svd: Adam's learning rate [1e-5]")
    add("--frames", type=int, default=5, help="svd: frames of a video, 1 to 11 [5]")
    add("--save_every", type=int, default=200, help="svd: steps between saves, from which a stopped run goes on [200]")
    add("--rgb_only", action="store_true", help="no code of pointmaps")
    args = parser.parse_args(argv)
    if args.preset == "auto":
        args.preset, why = choose_preset()
        print(f"preset: {args.preset} ({why})")
    for name, least in dict(steps=1, save_every=1, frames=1, seed=0).items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.frames > data.FRAMES + 1:
        raise ValueError(f"--frames must be at most {data.FRAMES + 1}, not {args.frames}")
    return args


def main(argv=None):
    args = parse(argv)
    folder, out = Path(args.data or f"data/task_{args.task}"), Path(args.out or f"runs/task_{args.task}")
    preset = PRESETS[args.preset]
    size = preset.height, preset.width
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not any(folder.glob("*/episode.json")):
        print(f"no episodes in {folder}: rendering the synthetic world's there (recorded ones: see data.py)")
        data.prepare(args.task, folder, size=size)
    moments = data.Clips(folder, "train", size, single=True, seed=args.seed)
    for kind in KINDS[:2 - args.rgb_only]:
        path = out / f"vae_{kind}.safetensors"
        about = path.with_suffix(".json")
        if path.exists() and about.exists():
            made_for = read_keys(about, "delete it, and it is made anew", "config").get("preset", preset.name)
            if made_for != preset.name:
                raise ValueError(f"{path} is the code of preset {made_for}, not {preset.name}: use another --out")
            print(f"{path} is there: not made again (delete its .json to do so)")
            continue
        if "components" in preset.vae:
            images = (images_of(moments[i], kind)[0] for i in tqdm(range(FIT_CLIPS), f"code of {kind}"))
            coder = LinearCode(preset.vae).fit(images).to(device)
        elif kind == "rgb":
            coder = VAE.from_pretrained(args.init).to(device)
        else:
            coder = tune(args, data.Clips(folder, "train", size, seed=args.seed), path, device)
        test = data.Clips(folder, "test", size, single=True, seed=args.seed + 1)
        scores = evaluate(coder, kind, test, device)
        save_vae(path, coder, dict(kind=kind, preset=preset.name, scores=scores))
        path.with_suffix(".resume.pt").unlink(missing_ok=True)
        print(f"{path}: {'held out' if test.held_out else 'not held out'}: "
              + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"vae.py: {str(error) or 'interrupted'}")
