"""Stage 1, the VAEs: Stable Video Diffusion's VAE (a 2-D encoder, a decoder that also looks along time), once for RGB
and once for pointmaps, whose pixels hold metric x, y, z instead of colours.

    python vae.py --task 1                  # trains both on data/task_1: runs/task_1/vae_{rgb,pointmap}.safetensors
    python vae.py --task 1 --preset svd     # SVD's published VAE for RGB, and a copy of it fine-tuned on pointmaps
    torchrun --nproc_per_node 8 vae.py --task 1 --preset svd

The 4D model works on the latents of these two and never trains them. The pointmap VAE has to hold two kinds of
pointmap: a view's in its own camera's frame (the condition) and a view's in the reference camera's frame (the target).
It trains on both. Pixels without a depth measurement do not count.

Letters: N images (= B clips x T frames), C channels, H W pixels, h w latent cells.

References: Stable Video Diffusion (arXiv 2311.15127); latent diffusion (arXiv 2112.10752); the pointmap VAE (arXiv
2507.01099); Muon, the optimiser of the presets trained from scratch (Jordan 2024, kellerjordan.github.io/posts/muon).
"""
import argparse
import json
import math
import os
import platform
import signal
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data as D
import model as M


# ------------------------------------------------------------------------------------------------------------ networks
# Attribute names are the hub's key names, so that its files load without renaming.

class TemporalConv(nn.Conv3d):
    """Conv3d of kernel (3, 1, 1), run as a 2-D convolution over (time, cells): the same sums, faster on a CPU."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):                                             # (B, C, T, cells)
        if x.shape[2] == 1:                                           # both neighbours of a lone frame are zero padding
            return F.conv2d(x, self.weight[:, :, 1], self.bias)
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class ResBlock(nn.Module):
    """Two normalised convolutions and a shortcut, over images (N, C, H, W) or, if `temporal`, over (B, C, T, cells)."""

    def __init__(self, in_channels, out_channels, groups, temporal=False):
        super().__init__()
        eps = 1e-5 if temporal else 1e-6                              # the two really differ in SVD
        conv = TemporalConv if temporal else (lambda i, o: nn.Conv2d(i, o, 3, padding=1))
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = conv(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Mixer(nn.Module):
    """Blend of the spatial and the temporal result by one learned number."""

    def __init__(self):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))                # a = 1/2 at the start

    def forward(self, spatial, temporal):
        a = torch.sigmoid(self.mix_factor)
        return (1 - a) * spatial + a * temporal                       # the other way round than in SVD's U-Net


class VideoResBlock(nn.Module):
    """A residual block over each frame, one along time, and the blend of the two."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.spatial_res_block = ResBlock(in_channels, out_channels, groups)
        self.temporal_res_block = ResBlock(out_channels, out_channels, groups, temporal=True)
        self.time_mixer = Mixer()

    def forward(self, x, num_frames):                                 # (B T, C, H, W)
        x = self.spatial_res_block(x)
        H = x.shape[2]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=num_frames)  # so that norms see a whole clip
        x = self.time_mixer(x, self.temporal_res_block(x))
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

    def forward(self, x):                                             # (N, C, H, W)
        tokens = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "n 1 (h w) c -> n c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):                                             # (N, C, H, W) -> (N, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))                      # SVD's VAE pads right and below only


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):                                             # (N, C, H, W) -> (N, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    def __init__(self, in_channels, out_channels, layers, groups, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x):
        for block in [*self.resnets, *self.downsamplers]:
            x = block(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, in_channels, out_channels, layers, groups, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            [VideoResBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)])
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x, num_frames):
        for block in self.resnets:
            x = block(x, num_frames)
        for block in self.upsamplers:
            x = block(x)
        return x


class MidBlock(nn.Module):
    """Residual, attention, residual; of video blocks in the decoder."""

    def __init__(self, channels, groups, block):
        super().__init__()
        self.resnets = nn.ModuleList([block(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x, *num_frames):                                # num_frames: the decoder's video blocks only
        x = self.resnets[0](x, *num_frames)
        x = self.attentions[0](x)
        return self.resnets[1](x, *num_frames)


class Encoder(nn.Module):
    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [DownBlock(widths[max(i - 1, 0)], widths[i], layers, groups, last=i == len(widths) - 1)
             for i in range(len(widths))])
        self.mid_block = MidBlock(widths[-1], groups, ResBlock)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):                                             # (N, 3, H, W)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)                                              # (N, C, H/2, W/2), ..., (N, C, h, w)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))           # (N, 2 C, h, w): mean and log variance


class Decoder(nn.Module):
    def __init__(self, out_channels, latent_channels, widths, layers, groups):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, VideoResBlock)
        self.up_blocks = nn.ModuleList(
            [UpBlock(widths[max(i - 1, 0)], widths[i], layers + 1, groups, last=i == len(widths) - 1)
             for i in range(len(widths))])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.time_conv_out = TemporalConv(out_channels, out_channels)

    def forward(self, z, num_frames):                                 # (B T, C, h, w)
        x = self.mid_block(self.conv_in(z), num_frames)
        for block in self.up_blocks:
            x = block(x, num_frames)                                  # (B T, C, 2h, 2w), ..., (B T, C, H, W)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))              # (B T, 3, H, W)
        H = x.shape[2]
        x = self.time_conv_out(rearrange(x, "(b t) c h w -> b c t (h w)", t=num_frames))
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=H)


class VAE(nn.Module):
    """SVD's VAE, at any width. `config` has the keys of the hub's config.json and two of our own, SVD's value where
    absent: norm_num_groups (32) and patch_size (1): the image is first cut into patches of so many pixels a side, whose
    pixels are the channels of the first layer, which makes a small network for a CPU several times cheaper.

    The lists `shift` and `scale`, one number a channel, take the encoder's mean to the latents of the 4D model: (mean -
    shift) * scale, with 0 and the config's scaling_factor as in SVD, or measured from data, see `standardise`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        try:
            widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
            C = config["latent_channels"]
        except KeyError as error:
            raise ValueError(f"VAE config lacks the key {error}: is it the config.json of an SVD vae?") from None
        groups, self.patch = config.get("norm_num_groups", 32), config.get("patch_size", 1)
        if any(width % groups for width in widths):
            raise ValueError(f"VAE config: block_out_channels {widths} must be multiples of norm_num_groups {groups}")
        self.cell = self.patch * 2 ** (len(widths) - 1)               # pixels along the side of a latent cell
        self.scale_factor = config.get("scaling_factor", 0.18215)
        self.shift, self.scale = [0.0] * C, [self.scale_factor] * C
        self.encoder = Encoder(config.get("in_channels", 3) * self.patch ** 2, C, widths, layers, groups)
        self.decoder = Decoder(config.get("out_channels", 3) * self.patch ** 2, C, widths, layers, groups)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def from_pretrained(cls, folder_or_repo, subfolder="vae", dtype=torch.float32, device="cpu"):
        """From a folder in the hub's layout, or a hub repo. Raises ValueError, one line that names the fault."""
        return M.load_pretrained(cls, folder_or_repo, subfolder, dtype, device)

    def encode(self, images):
        """images (N, 3, H, W) in [-1, 1] -> mean, log variance (N, C, h, w) of the latents, before shift and scale."""
        H, W = images.shape[-2:]
        if H % self.cell or W % self.cell:
            raise ValueError(f"VAE: height and width {H} x {W} must be multiples of {self.cell}: resize the images")
        x = F.pixel_unshuffle(images, self.patch)                     # (N, 3 patch^2, H/patch, W/patch)
        x = x.contiguous(memory_format=torch.channels_last)           # a third faster, on CPU and GPU
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents, num_frames):
        """latents (N, C, h, w), N = clips x num_frames, without shift and scale -> images (N, 3, H, W) near [-1, 1]."""
        if len(latents) % num_frames:
            raise ValueError(f"VAE: {len(latents)} latents are not a whole number of clips of {num_frames} frames")
        x = self.decoder(latents.contiguous(memory_format=torch.channels_last), num_frames)
        return F.pixel_shuffle(x, self.patch)

    def forward(self, images, num_frames, noise):
        """Reconstruction from one draw of the latents, their mean and log variance. noise (N, C, h, w), normal."""
        mean, logvar = self.encode(images)
        return self.decode(mean + torch.exp(0.5 * logvar) * noise, num_frames), mean, logvar


# ------------------------------------------------------------------------------------ the authors' released checkpoints

def released_names(vae):
    """{our key: its name in sgm, the code base that SVD was trained with}; sgm numbers `up` from the finest level."""
    levels = len(vae.decoder.up_blocks)
    block = dict(spatial_res_block="", temporal_res_block="time_stack.", time_mixer="")
    stacked = dict(norm1="in_layers.0", conv1="in_layers.2", norm2="out_layers.0", conv2="out_layers.3")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names = {}
    for key in vae.state_dict():
        parts = key.split(".")
        half, rest = parts[0], parts[1:]
        if rest[0] in ("down_blocks", "up_blocks"):
            level = int(rest[1]) if rest[0] == "down_blocks" else levels - 1 - int(rest[1])
            piece = {"resnets": f"block.{rest[3]}", "downsamplers": "downsample", "upsamplers": "upsample"}[rest[2]]
            outer, rest = f"{half}.{rest[0].split('_')[0]}.{level}.{piece}.", rest[4:]
        elif rest[0] == "mid_block":
            outer = f"{half}.mid.{'block' if rest[1] == 'resnets' else 'attn'}_{int(rest[2]) + 1}."
            inner = ".".join(rest[3:-1])
            rest = [attention[inner], rest[-1]] if rest[1] == "attentions" else rest[3:]
        else:
            outer = f"{half}."
            renamed = dict(conv_norm_out="norm_out", time_conv_out="conv_out.time_mix_conv")
            rest = [renamed.get(rest[0], rest[0]), *rest[1:]]
        if rest[0] in block:                                          # a decoder's video block
            temporal = rest[0] == "temporal_res_block"
            outer, rest = outer + block[rest[0]], [stacked[rest[1]], rest[2]] if temporal else rest[1:]
        names[key] = outer + ".".join("nin_shortcut" if part == "conv_shortcut" else part for part in rest)
    return names


def load_released(path, config=None):
    """The VAE of a checkpoint in the authors' layout (Zeyi/4dgen-ckpts, VAE/<task>/pointmap.ckpt), in float32.

    config: SVD's where None. Keys may stand below a prefix first_stage_model; what is neither encoder nor decoder (such
    as the training loss) is left out. sgm's attention projections are 1 x 1 convolutions, ours are linear. Where the
    file has no quant_conv (sgm has engines with and without), ours is the identity. Raises a one-line ValueError that
    names the key.
    """
    vae = VAE(config or M.PRESETS["svd"].vae)
    state = {key.removeprefix("first_stage_model."): value for key, value in M.read_checkpoint(path).items()}
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    state = {key: value for key, value in state.items() if key.split(".")[0] in parts}
    if not any(key.startswith("quant_conv.") for key in state):
        channels = vae.quant_conv.out_channels
        state["quant_conv.weight"] = torch.eye(channels)[:, :, None, None]
        state["quant_conv.bias"] = torch.zeros(channels)
    names = released_names(vae)
    for name in state:
        if name not in set(names.values()):
            raise ValueError(f"{path}: unexpected key {name}, not in SVD's VAE")
    ours = {}
    for key, value in vae.state_dict().items():
        if names[key] not in state:
            raise ValueError(f"{path}: missing key {names[key]}")
        given = state[names[key]]
        given = given.flatten(1) if value.ndim == 2 and given.ndim == 4 else given
        if given.shape != value.shape:
            raise ValueError(f"{path}: {names[key]} has shape {list(given.shape)}, the model needs {list(value.shape)}")
        ours[key] = given.float()
    vae.load_state_dict(ours)
    return vae.eval()


# ------------------------------------------------------------------------------------------------------------ latents

def per_channel(values, like):
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]             # (C, 1, 1)


def encode_latents(vae, images):
    """images (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w) of the 4D model: the mean, shifted and scaled."""
    mean, _ = vae.encode(images)
    return (mean - per_channel(vae.shift, mean)) * per_channel(vae.scale, mean)


def decode_latents(vae, latents, num_frames):
    """latents (N, C, h, w), shifted and scaled, of clips of num_frames frames -> images (N, 3, H, W)."""
    return vae.decode(latents / per_channel(vae.scale, latents) + per_channel(vae.shift, latents), num_frames)


@torch.no_grad()
def standardise(vae, batches):
    """Sets shift and scale so that latents of the given batches have zero mean and unit variance in every channel."""
    means = [vae.encode(images)[0].float().transpose(0, 1).flatten(1) for images in batches]
    means = torch.cat(means, 1)                                                                  # (C, N h w)
    vae.shift = means.mean(1).tolist()
    vae.scale = (1 / means.std(1)).tolist()


def save_vae(path, vae, info):
    """Writes PATH (.safetensors) and, last, the .json beside it: config, shift and scale of the latents, and `info`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)                              # a .json never stands beside weights of another run
    save_file({name: value.contiguous() for name, value in vae.state_dict().items()}, f"{path}.part")
    os.replace(f"{path}.part", path)
    Path(f"{described}.part").write_text(
        json.dumps(dict(config=vae.config, shift=vae.shift, scale=vae.scale, **info), indent=1))
    os.replace(f"{described}.part", described)


def load_vae(path):
    """The VAE of a file that save_vae wrote, on the CPU in float32. Raises ValueError."""
    path = Path(path)
    described = path.with_suffix(".json")
    if not described.exists():
        raise ValueError(f"{described} is missing: train the VAEs first, `python vae.py --task N --out {path.parent}`")
    info = json.loads(described.read_text())
    with torch.device("meta"):
        vae = VAE(info["config"])
    M.load_weights(vae, [path])
    vae.shift, vae.scale = info["shift"], info["scale"]
    return vae.eval()


# ------------------------------------------------------------------------------------------------------------ training

KINDS = ("rgb", "pointmap")         # one VAE each; the second starts from the first


@dataclass
class Options:
    """The flags. None stands for the preset's value, PRESET_OPTIONS."""
    task: int = 1                   # 1, 2 or 3
    data: str = None                # folder of packed episodes, rendered first when missing [data/task_N]
    preset: str = "auto"            # tiny, small, svd; auto picks by device and memory
    out: str = None                 # the VAEs are written here [runs/task_N]
    init: str = M.SVD_REPO          # svd only: hub repo or folder in the hub's layout, with a subfolder vae
    tune_rgb: bool = False          # svd only: fine-tune the RGB VAE too; it stays SVD's otherwise
    steps: int = None               # optimiser steps of the RGB VAE
    pointmap_steps: int = None      # and of the pointmap VAE
    batch: int = None               # moments a step and process; each gives two views of an observed and a later frame
    video_every: int = None         # every so many steps a batch of short videos, which train the layers along time
    video_frames: int = None        # frames of those
    lr: float = None                # highest learning rate: of Muon's matrices (tiny, small), of Adam (svd)
    kl: float = None                # weight of the KL term, against the mean absolute error of a pixel
    seed: int = 0                   # of weights, clips and noise
    save_every: int = 200           # steps between two saves of the training state
    workers: int = None             # processes that read clips [CPU: 0, GPU: 8]
    device: str = None              # cpu, cuda, cuda:1 [cuda if there is one]
    dry_run: bool = False           # print the resolved settings, then stop


PRESET_OPTIONS = {
    "tiny": dict(steps=450, pointmap_steps=750, batch=2, video_every=8, video_frames=4, lr=0.02, kl=1e-6),
    "small": dict(steps=4000, pointmap_steps=6000, batch=8, video_every=4, video_frames=4, lr=0.02, kl=1e-6),
    "svd": dict(steps=4000, pointmap_steps=4000, batch=1, video_every=1, video_frames=5, lr=1e-5, kl=0.0),
}
VECTOR_LR = 0.1                     # Adam's learning rate of biases and norms, as a share of Muon's
WARMUP = 20                         # steps
HELD_OUT = 32                       # moments that the final scores are taken on
STATISTICS = 60                     # moments that shift and scale are measured on


class Muon(torch.optim.Optimizer):
    """Momentum whose step, a matrix per layer, is made orthogonal: every direction of a layer learns at the same pace.

    Pointmaps are nearly all mean and slope, so plain gradients hardly see the rest. From random weights, in 40 CPU
    seconds, the pointmap VAE came to a mean error of 89 mm with it and of 143 mm with Adam.
    """

    def __init__(self, parameters, lr, momentum=0.9):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])                        # Nesterov's
                update = orthogonal(ahead.flatten(1))                                            # (out, in * kernel)
                rows, columns = update.shape
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix, steps=5):
    """The nearest matrix with singular values near 1, by a quintic Newton-Schulz iteration (coefficients: Jordan)."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class TrainingImages(torch.utils.data.Dataset):
    """Item `step` is that step's batch: images (N, 3, H, W), valid (N, 1, H, W) bool, frames of a clip (1: stills).

    A function of (seed, step, rank) alone. Every `video_every`-th batch holds short videos, the others single images.
    """

    def __init__(self, data, size, kind, options, rank=0, world=1):
        self.moments = D.Clips(data, "train", size, single=True, seed=options.seed)
        self.videos = D.Clips(data, "train", size, seed=options.seed)
        self.kind, self.options, self.rank, self.world = kind, options, rank, world

    def __getitem__(self, step):
        o, samples = self.options, []
        first = (step * self.world + self.rank) * o.batch
        if step % o.video_every == o.video_every - 1:
            for i in range(first, first + max(1, o.batch // 2)):
                start = np.random.default_rng([o.seed, i]).integers(self.videos.frames + 2 - o.video_frames)
                samples += images_of(self.videos[i], self.kind, slice(start, start + o.video_frames))
            frames = o.video_frames
        else:
            for i in range(first, first + o.batch):
                samples += images_of(self.moments[i], self.kind, slice(None), observed=True)
            frames = 1
        images, valid = zip(*samples)
        return torch.cat(images), torch.cat(valid), frames


def images_of(clip, kind, cut, observed=False):
    """Frames `cut` of every view of a clip: a list of (images (T, 3, H, W), valid (T, 1, H, W)).

    Pointmaps are those in the reference's frame; with `observed` also the other views' first ones in their own frame.
    """
    valid = clip["valid"][:, :, None]                                                            # (V, F, 1, H, W)
    if kind == "rgb":
        return [(view[cut], torch.ones_like(v[cut])) for view, v in zip(clip["rgb"], valid)]
    own = [(clip["own_points"][1:], valid[1:, 0])] if observed else []
    return [(view[cut], v[cut]) for view, v in zip(clip["points"], valid)] + own


def masked_l1(prediction, target, valid):
    """Mean absolute error over valid pixels. prediction, target (N, 3, H, W); valid (N, 1, H, W) bool."""
    error = (prediction - target).abs().mean(1, keepdim=True)                                    # (N, 1, H, W)
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


def kl_from_normal(mean, logvar):
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over the latents of an image, mean over images."""
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def start(kind, preset, options):
    """The VAE before its first step."""
    if preset.name == "svd":
        return VAE.from_pretrained(options.init)
    if kind == "pointmap":
        return load_vae(Path(options.out) / "vae_rgb.safetensors")                               # as in the paper
    torch.manual_seed(options.seed)
    vae = VAE(preset.vae)
    C = preset.vae["latent_channels"]
    with torch.no_grad():                   # nearly no noise on the latents: else little is learnt before it has shrunk
        vae.quant_conv.weight[C:].zero_()
        vae.quant_conv.bias[C:].fill_(-8.0)
    return vae


def optimizers_of(vae, preset, lr):
    if preset.name == "svd":
        return [torch.optim.Adam(vae.parameters(), lr)]                                          # as in the paper
    return [Muon([p for p in vae.parameters() if p.ndim > 1], lr),
            torch.optim.Adam([p for p in vae.parameters() if p.ndim == 1], lr * VECTOR_LR, betas=(0.9, 0.98))]


def learning_rate(step, steps, preset):
    """As a share of the highest: warm-up and cosine to zero; constant for fine-tuning, as in the paper."""
    if preset.name == "svd":
        return 1.0
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_state(path, vae, optimizers, step, settings):
    """Everything a resumed run needs, in one file that is renamed into place."""
    names = {p: name for name, p in vae.named_parameters()}
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in vae.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors.update({f"optimizer.{names[p]}.{key}": value.contiguous() for key, value in state.items()})
    save_file(tensors, f"{path}.part", metadata=dict(step=str(step), settings=json.dumps(settings)))
    os.replace(f"{path}.part", path)


def load_state(path, vae, optimizers, settings):
    """Fills model and optimisers from save_state's file and returns the step to go on with. Raises ValueError."""
    parameters = dict(vae.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads(file.metadata()["settings"])
            for key, value in settings.items():
                if saved.get(key) != value:
                    raise ValueError(f"{path} was started with {key} {saved.get(key)}, not {value}: give that, or "
                                     "delete it")
            for key in file.keys():
                part, name = key.split(".", 1)
                value = file.get_tensor(key)
                if part == "model":
                    parameters[name].data.copy_(value)
                else:
                    name, entry = name.rsplit(".", 1)
                    p = parameters[name]
                    # Adam keeps its step counter on the CPU
                    owner[p].state[p][entry] = value if entry == "step" else value.to(p.device)
            return int(file.metadata()["step"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start this VAE again") from None


class Stop:
    """Becomes true at SIGTERM or Ctrl-C, so that the loop can save before it ends."""

    def __init__(self):
        self.asked = False
        self.before = {name: signal.signal(name, self) for name in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self, *_):
        self.asked = True

    def restore(self):
        for name, handler in self.before.items():
            signal.signal(name, handler)


def train(kind, preset, options, device, rank=0, world=1):
    """Trains the VAE of one kind and writes vae_KIND.safetensors, .json, .jsonl (log) and .png (reconstructions)."""
    out = Path(options.out)
    size = preset.height, preset.width
    path, state_path = out / f"vae_{kind}.safetensors", out / f"vae_{kind}.state.safetensors"
    steps = options.steps if kind == "rgb" else options.pointmap_steps
    if preset.name == "svd" and kind == "rgb" and not options.tune_rgb:
        if rank == 0:
            save_vae(path, VAE.from_pretrained(options.init), dict(kind=kind, source=options.init))
            print(f"{path}: SVD's own, from {options.init}")
        return

    images = TrainingImages(options.data, size, kind, options, rank, world)
    vae = start(kind, preset, options).to(device).train()
    optimizers = optimizers_of(vae, preset, options.lr)
    highest = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    settings = dict(kind=kind, steps=steps, config=vae.config, world=world, **{
        name: getattr(options, name) for name in ("batch", "video_every", "video_frames", "lr", "kl", "seed")})
    first = load_state(state_path, vae, optimizers, settings) if state_path.exists() else 0
    log = Log(out / f"vae_{kind}.jsonl", first, settings, device) if rank == 0 else None
    network = nn.parallel.DistributedDataParallel(vae) if world > 1 else vae

    loader = torch.utils.data.DataLoader(images, None, sampler=range(first, steps), num_workers=options.workers)
    bar = tqdm(total=steps, initial=first, desc=f"vae {kind}", disable=rank != 0, mininterval=1.0)
    stop = Stop()
    began = time.time()
    for step, (batch, valid, frames) in zip(range(first, steps), loader):
        for optimizer, lr in zip(optimizers, highest):
            optimizer.param_groups[0]["lr"] = lr * learning_rate(step, steps, preset)
        batch, valid = batch.to(device, non_blocking=True), valid.to(device, non_blocking=True)
        generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + step) * world + rank)
        cells = batch.shape[-2] // vae.cell, batch.shape[-1] // vae.cell
        noise = torch.randn(len(batch), len(vae.shift), *cells, generator=generator, device=device)
        if preset.name == "svd":
            noise.zero_()                                          # fine-tuned on the mean, which the 4D model will see
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            reconstruction, mean, logvar = network(batch, frames, noise)
        error = masked_l1(reconstruction.float(), batch, valid)
        kl = kl_from_normal(mean.float(), logvar.float())
        loss = error + options.kl * kl
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of vae {kind} is {loss.item()} at step {step}: lower --lr from {options.lr}")
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        bar.update()
        if rank == 0 and (step % 5 == 0 or step == steps - 1):           # 5: so that videos come up too
            log.write(step=step, error=error.item(), kl=kl.item(), frames=frames, seconds=round(time.time() - began, 2),
                      lr=optimizers[0].param_groups[0]["lr"])
            bar.set_postfix_str(f"error {error.item():.4f}")
        last = step + 1 == steps
        if rank == 0 and (stop.asked or last or (step + 1) % options.save_every == 0):
            save_state(state_path, vae, optimizers, step + 1, settings)
        if stop.asked and not last:
            bar.close()
            raise SystemExit(f"stopped at step {step + 1} of vae {kind}; the same command goes on from there")
    bar.close()
    stop.restore()
    if rank != 0:
        return

    vae.eval()
    if preset.name != "svd":
        still = range(0, STATISTICS // options.batch * options.video_every, options.video_every)     # no videos
        standardise(vae, (images[step][0].to(device) for step in still))
    scores, shown = evaluate(vae, kind, options, size, device)
    log.write(**scores)
    print(f"{path}: held-out " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    picture(path.with_suffix(".png"), kind, *shown)
    plot_log(out / f"vae_{kind}.loss.png", log.path)
    save_vae(path, vae, dict(kind=kind, settings=settings, scores=scores))
    state_path.unlink(missing_ok=True)


class Log:
    """A file with one JSON object a line: source and machine, then steps. A resumed run cuts what it will repeat."""

    def __init__(self, path, first, settings, device):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text().splitlines() if first and path.exists() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line).get("step", -1) < first]
        path.write_text("".join(line + "\n" for line in kept))
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
        self.write(source=git_hash(), torch=torch.__version__, device=name, settings=settings)

    def write(self, **entry):
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def git_hash():
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except OSError:                                                  # no git here
        return ""


@torch.no_grad()
def evaluate(vae, kind, options, size, device):
    """Scores on held-out episodes and cameras, and a few images, their reconstructions and masks to look at.

    rgb: psnr in dB. pointmap, over valid pixels, in own and in reference frame: abs_rel of z, distance of points in mm.
    """
    clips = D.Clips(options.data, "test", size, single=True, seed=options.seed + 1)
    samples = [sample for i in range(HELD_OUT) for sample in images_of(clips[i], kind, slice(None), observed=True)]
    images, valid = (torch.cat(part) for part in zip(*samples))
    parts = []
    for part in images.split(16):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts.append(decode_latents(vae, encode_latents(vae, part.to(device)), 1).float().cpu())
    made = torch.cat(parts)
    shown = slice(0, None, max(1, len(images) // 6))
    if kind == "rgb":
        squared = ((made.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)             # (N,), of colours in 0..1
        return dict(psnr=-10 * squared.log10().mean().item()), (images[shown], made[shown], valid[shown])
    true, metres = D.denormalize_points(images), D.denormalize_points(made)
    z, true_z = metres[:, 2], true[:, 2]                                                         # (N, H, W)
    keep = valid[:, 0] & (true_z > 0) & (z > 0)
    relative = ((z - true_z).abs() / true_z)[keep]
    distance = (metres - true).norm(dim=1)[valid[:, 0]]
    scores = dict(abs_rel=relative.mean().item(), median_abs_rel=relative.median().item(),
                  mean_mm=1000 * distance.mean().item(), median_mm=1000 * distance.median().item())
    return scores, (true[shown], metres[shown], valid[shown])


def picture(path, kind, images, made, valid):
    """Rows: what went in, what came out; for pointmaps z in metres, and a third row, the distance between the two."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = 2 if kind == "rgb" else 3
    figure, axes = plt.subplots(rows, len(images), figsize=(2.2 * len(images), 1.9 * rows), squeeze=False,
                                layout="constrained")
    for column, (true, shown, mask) in enumerate(zip(images.numpy(), made.numpy(), valid[:, 0].numpy())):
        if kind == "rgb":
            for ax, image in zip(axes[:, column], (true, shown)):
                ax.imshow((image.transpose(1, 2, 0).clip(-1, 1) + 1) / 2)
        else:
            low, high = np.percentile(true[2][mask], [1, 99])
            for ax, image in zip(axes[:2, column], (true, shown)):
                drawn = ax.imshow(np.where(mask, image[2], np.nan), vmin=low, vmax=high)
            figure.colorbar(drawn, ax=axes[:2, column], location="bottom", shrink=0.8).ax.tick_params(labelsize=6)
            error = 1000 * np.linalg.norm(shown - true, axis=0)                                  # (H, W) mm
            drawn = axes[2, column].imshow(np.where(mask, error, np.nan), vmin=0, vmax=200, cmap="magma")
    if kind != "rgb":
        figure.colorbar(drawn, ax=axes[2, :], shrink=0.8, label="mm")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    names = ("RGB, input", "RGB, output") if kind == "rgb" else ("z (m), input", "z (m), output", "distance")
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(name)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_log(path, log_path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in map(json.loads, log_path.read_text().splitlines()) if "step" in entry]
    figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for label, chosen in (("stills", lambda frames: frames == 1), ("videos", lambda frames: frames > 1)):
        points = [(entry["step"], entry["error"]) for entry in entries if chosen(entry["frames"])]
        if points:
            ax.plot(*zip(*points), label=label)
    ax.set(xlabel="step", ylabel="mean absolute error", yscale="log", title=log_path.stem)
    ax.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------- the script

def parse(argv=None):
    """Options with everything resolved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    source = Path(__file__).read_text().split("class Options:")[1]
    for field in fields(Options):
        line = next(line for line in source.splitlines() if line.startswith(f"    {field.name}: "))
        text = line.split("# ")[1]                                   # the comment beside a flag is its help
        if field.name in PRESET_OPTIONS["tiny"]:
            text += " [" + ", ".join(f"{name}: {values[field.name]}" for name, values in PRESET_OPTIONS.items()) + "]"
        elif field.default not in (None, False):
            text += f" [{field.default}]"
        kind = dict(action="store_true") if field.type is bool else dict(type=field.type, default=field.default)
        parser.add_argument(f"--{field.name}", help=text, **kind)
    options = Options(**vars(parser.parse_args(argv)))
    if options.task not in D.TASKS:
        raise ValueError(f"--task is one of {', '.join(map(str, D.TASKS))}, not {options.task}")
    if options.preset == "auto":
        options.preset, why = M.choose_preset()
        print(f"preset: {options.preset} ({why})")
    if options.preset not in PRESET_OPTIONS:
        raise ValueError(f"--preset is auto or one of {', '.join(PRESET_OPTIONS)}, not {options.preset}")
    for name, value in PRESET_OPTIONS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("steps", "pointmap_steps", "batch", "video_every", "save_every"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if not 1 <= options.video_frames <= 11:
        raise ValueError(f"--video_frames is 1 to 11, the frames of a clip, not {options.video_frames}")
    options.data = options.data or f"data/task_{options.task}"
    options.out = options.out or f"runs/task_{options.task}"
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.workers is None:
        options.workers = 0 if options.device == "cpu" else 8
    return options


def main(argv=None):
    options = parse(argv)
    preset = M.PRESETS[options.preset]
    rank, world, device = 0, 1, torch.device(options.device)
    if "RANK" in os.environ:                                         # started by torchrun
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        with torch.device("meta"):
            vae = VAE(preset.vae)
        print("  ".join(f"{name}={value}" for name, value in vars(options).items()))
        print(f"VAE: encoder {M.count(vae.encoder) / 1e6:.2f} M, decoder {M.count(vae.decoder) / 1e6:.2f} M weights; "
              f"{preset.height} x {preset.width} images, latents of {len(vae.shift)} x {preset.height // vae.cell} x "
              f"{preset.width // vae.cell}")
        if not options.dry_run and not any(Path(options.data).glob("*/episode.json")):
            print(f"no episodes in {options.data}: rendering the synthetic world's there (recorded ones: see data.py)")
            D.prepare(options.task, options.data, size=(preset.height, preset.width))
    for kind in () if options.dry_run else KINDS:
        if world > 1:
            dist.barrier()
        if (Path(options.out) / f"vae_{kind}.json").exists():
            if rank == 0:
                print(f"{options.out}/vae_{kind}.json is there: not trained again (delete it to do so)")
            continue
        train(kind, preset, options, device, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"vae.py: {error}")
