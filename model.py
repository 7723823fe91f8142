"""The networks: Stable Video Diffusion's U-Net, the 4D model with two decoders made of it, and CLIP's image encoder.

    python model.py --preset svd                                     # prints how many parameters each part has
    net = Model4D(PRESETS["tiny"])                                   # from scratch
    net = Model4D.from_pretrained(PRESETS["svd"], dtype=torch.bfloat16)

Every view of a scene goes through the U-Net as two streams, an RGB video and a pointmap video, which share encoder and
middle. Decoder A writes the RGB of every view and the pointmap of view 0, the reference. Decoder B writes the pointmaps
of the other views *in the reference camera's frame*: each of its layers looks at what the reference's pointmap had
there, through cross-view attention. See `Model4D.forward`.

Attributes are named as the keys of the published files, so that these load with strict=True and no renaming.

Letters: B samples (in the U-Net: clips), V views (view 0 the reference), S streams (0 RGB, 1 pointmap), T frames, C
channels, h w latent cells, N rows of tokens, L context tokens, D width of one, E width of the time embedding.

References: Stable Video Diffusion, arXiv 2311.15127; EDM, arXiv 2206.00364; the method, arXiv 2507.01099; DUSt3R,
arXiv 2312.14132 (a second view's pointmap in the first one's frame); CLIP, arXiv 2103.00020; JiT, arXiv 2511.13720
(clean data as the prediction).
"""
import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from data import read_json

# ------------------------------------------------------------------------------------------- presets

SVD_REPO = "stabilityai/stable-video-diffusion-img2vid"
FPS_ID, MOTION_BUCKET, NOISE_AUGMENTATION = 6, 127, 0.02  # SVD's three conditioning numbers, kept constant
LARGE = 2 ** 22  # numbers in an image or a clip above which GroupNorm adds up itself; the paper's U-Net stays below


@dataclass
class Preset:
    """One size of the whole model; saved beside its weights."""
    name: str
    height: int               # pixels
    width: int
    unet: dict                # as the hub's unet/config.json; keys of our own: see unet_config
    vae: dict                 # as the hub's vae/config.json, or {"patch_size", "components"}: a linear code
    clip: dict = None         # as the hub's image_encoder/config.json; None: one learned token instead
    prediction: str = "v"     # what the U-Net predicts: "v" as in SVD, or "change", see Model4D.forward
    sigma_min: float = 0.002  # noise levels that sampling ends and starts with
    sigma_max: float = 700.0
    view_heads: int = 8       # heads of the cross-view attention
    view_head_dim: int = 64   # channels a head
    view_norm: bool = True    # LayerNorm and sine positions in front of it
    resnet_eps: float = None  # of the residual blocks' GroupNorms; None: SVD's two values
    tokens: str = "view"      # a stream sees its own view's token; "crossed": as the released weights do


def unet_config(channels, heads, layers, latent_channels, context, groups, attention_levels):
    """The hub's U-Net config, for a network trained from scratch, with two keys that the hub's lacks: norm_num_groups
    of every GroupNorm (absent: 32), and temporal_on_stills, whether single frames go through the layers along time.
    It writes one channel more than the latents have: see Model4D.forward.

    attention_levels: how many levels have transformers, counted from the finest (the middle always has one)."""
    attends = ["CrossAttn" * (level < attention_levels) for level in range(len(channels))]
    return dict(in_channels=2 * latent_channels, out_channels=latent_channels + 1, block_out_channels=list(channels),
                num_attention_heads=list(heads), layers_per_block=layers, transformer_layers_per_block=1,
                cross_attention_dim=context, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96,
                down_block_types=[f"{cross}DownBlockSpatioTemporal" for cross in attends],
                up_block_types=[f"{cross}UpBlockSpatioTemporal" for cross in attends[::-1]],
                norm_num_groups=groups, temporal_on_stills=False)


PRESETS = {
    # A laptop: 16 x 20 cells. All 48 components of a patch: nothing is lost in the code.
    "tiny": Preset("tiny", height=64, width=80, prediction="change", sigma_min=1.0, sigma_max=80.0, view_heads=4,
                   view_head_dim=32, vae=dict(patch_size=4, components=48),
                   unet=unet_config((64, 96), heads=(4, 4), layers=1, latent_channels=48, context=32, groups=8,
                                    attention_levels=0)),
    # One ordinary GPU, for minutes: twice the channels, twice the layers.
    "small": Preset("small", height=64, width=80, prediction="change", sigma_min=1.0, sigma_max=80.0, view_heads=4,
                    view_head_dim=32, vae=dict(patch_size=4, components=48),
                    unet=unet_config((128, 192), heads=(4, 4), layers=2, latent_channels=48, context=32, groups=8,
                                     attention_levels=0)),
    # The paper's model, from the published weights of SVD img2vid: 32 x 40 cells of 4 channels.
    "svd": Preset("svd", height=256, width=320,
                  unet=dict(sample_size=96, in_channels=8, out_channels=4, block_out_channels=[320, 640, 1280, 1280],
                            num_attention_heads=[5, 10, 20, 20], layers_per_block=2, transformer_layers_per_block=1,
                            cross_attention_dim=1024, addition_time_embed_dim=256, num_frames=14,
                            projection_class_embeddings_input_dim=768,
                            down_block_types=["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
                            up_block_types=["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3),
                  vae=dict(sample_size=768, in_channels=3, out_channels=3, block_out_channels=[128, 256, 512, 512],
                           down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2, latent_channels=4,
                           scaling_factor=0.18215, force_upcast=True),
                  clip=dict(hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32,
                            num_attention_heads=16, num_channels=3, image_size=224, patch_size=14, hidden_act="gelu",
                            layer_norm_eps=1e-5, attention_dropout=0.0)),
}


def choose_preset():
    """`tiny`, or `small` where a GPU has the memory for it, and the reason. `svd`, days of training, is asked for."""
    if not torch.cuda.is_available():
        return "tiny", "no CUDA GPU here"
    memory = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    reason = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    return ("small", reason) if memory > 15 else ("tiny", f"{reason}; small needs 16")


def count(module):
    """Number of parameters of a module (0 for None)."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------- loading published weights

def load_pretrained(module_class, folder_or_repo, subfolder=None, dtype=torch.float32, device="cpu"):
    """A module with the weights of a folder in the hub's layout (config.json beside .safetensors files), or of a hub
    repo, which is downloaded first."""
    half = dtype in (torch.float16, torch.bfloat16)
    folder = hub_folder(folder_or_repo, subfolder or "", half)
    config = read_json(folder / "config.json", "give a folder in the hub's layout, or download it again")
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json is damaged: give a folder in the hub's layout, or download it again")
    try:
        with torch.device("meta"):
            module = module_class(config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks the key {error}: is it that of an SVD {subfolder}?") from None
    files = sorted(folder.glob("*.safetensors"))  # one, or shards; often in both precisions
    files = [path for path in files if (".fp16" in path.name) == half] or files
    if not files:
        raise ValueError(f"{folder} has no .safetensors file")
    load_weights(module, files, dtype, device)
    return module.eval()


def hub_folder(folder_or_repo, subfolder, half):
    """The folder of a local copy, or of a hub repo: downloaded, resumed, or already there. half: the files of half
    precision are enough. Without a connection the other precision will do, where that is in the cache."""
    if Path(folder_or_repo).is_dir():
        return Path(folder_or_repo) / subfolder
    repo, failure = str(folder_or_repo), None
    if Path(repo).exists() or repo.count("/") != 1 or repo[0] in "./~":
        raise ValueError(f"{repo} is neither a folder nor a hub repo (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    for half in (half, not half):
        names = "config.json", "*fp16*" if half else "*.safetensors"
        try:
            root = snapshot_download(repo, allow_patterns=[f"{subfolder}/{name}".lstrip("/") for name in names],
                                     ignore_patterns=["*.bin"] if half else ["*.bin", "*fp16*"],
                                     local_files_only=failure is not None)
            if any((Path(root) / subfolder).glob("*.safetensors")):
                return Path(root) / subfolder
        except Exception as error:  # the client has many types for "no" and "not now"
            failure = failure or error
    why = type(failure).__name__ if failure else "it has no .safetensors"
    if isinstance(failure, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        raise ValueError(f"{repo}/{subfolder} is not in the cache and the hub can't be reached ({why}): you are "
                         "offline? Connect, or pass the folder of a local copy")
    raise ValueError(f"can't download {repo}/{subfolder} ({why}): accept its licence at https://huggingface.co/{repo} "
                     "and run `hf auth login`, or pass the folder of a local copy")


def load_weights(module, files, dtype=torch.float32, device="cpu"):
    """Fills `module` (built on the meta device, to save memory) from safetensors files, strictly. Tensors of the wanted
    dtype stay pages of the file, the others are converted one by one: memory never holds two copies. int8 ones have a
    scale a row beside them, as tests/bench_gpu.py writes them."""
    state = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    if key not in getattr(module, "keys_to_ignore", ()) and not key.endswith(".int8_scale"):
                        value = file.get_tensor(key)
                        if value.dtype == torch.int8:
                            value = value * file.get_tensor(f"{key}.int8_scale")
                        state[key] = value.to(device, dtype)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}): download it again") from None
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{files[0]}: {' '.join(str(error).split())[:500]}") from None


# ------------------------------------------------------------------------------- pieces of the U-Net

class Condition(NamedTuple):
    """What every layer of the U-Net is told about the B clips it works on."""
    time: torch.Tensor    # (B, E) noise level and SVD's three numbers, embedded
    context: torch.Tensor # (B, L, D) image embedding
    frame: torch.Tensor   # (B, T) frame numbers
    still: bool           # single frames that skip the layers along time

    def rows(self, rows):
        return Condition(self.time[rows], self.context[rows], self.frame[rows], self.still)


def frequencies(width, dtype, device):
    """1 ... 1/10000 in `width` geometric steps."""
    return torch.exp(-math.log(10000) * torch.arange(width, dtype=dtype, device=device) / width)


def sinusoid(x, width):
    """Sinusoidal embedding [cos, sin] of x (...,) -> (..., width); float32, as SVD has it, unless x is float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    angle = x[..., None] * frequencies(width // 2, x.dtype, x.device)
    return torch.cat([angle.cos(), angle.sin()], -1)


class Embedding(nn.Module):
    """A sinusoid, or several, through two linear layers."""

    def __init__(self, width_in, hidden, width_out):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, hidden)
        self.linear_2 = nn.Linear(hidden, width_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class Mixer(nn.Module):
    """a * spatial + (1 - a) * temporal, with a = sigmoid of one learned number."""

    def __init__(self):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, spatial, temporal):
        return torch.lerp(spatial, temporal.to(spatial.dtype), torch.sigmoid(-self.mix_factor).to(spatial.dtype))


class TimeConv(nn.Conv3d):
    """Conv3d of kernel (3, 1, 1), run on (B, C, T, cells) as a 2-D convolution: the same sums, faster on a CPU."""

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        if x.shape[2] == 1:  # both neighbours of a lone frame are zero padding
            return F.conv2d(x, self.weight[:, :, 1], self.bias)
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, and for large images on a GPU a faster way to the same numbers: its CUDA kernel adds a group up on
    one multiprocessor of a hundred, and copies channels-last images to and fro. Of the paper's model, the VAE's."""

    def forward(self, x):
        large = x.is_cuda and x[0].numel() > LARGE and not torch.is_grad_enabled()
        return self.by_sums(x) if large else super().forward(x)

    def by_sums(self, x):
        """x (N, C, ., .), best channels-last; sums are float32, also those of bfloat16."""
        groups = rearrange(x, "n (g c) h w -> n (h w) g c", g=self.num_groups)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = groups.mean((1, 3), dtype=dtype)
        length = torch.linalg.vector_norm(groups, dim=(1, 3), dtype=dtype)
        std = ((length ** 2 / groups[0, :, 0].numel() - mean ** 2).clamp(min=0) + self.eps).sqrt()  # (N, G)
        mean, std = (repeat(y, "n g -> n (g c) 1 1", c=groups.shape[3]) for y in (mean, std))
        scale = self.weight[:, None, None] / std
        return torch.addcmul(self.bias[:, None, None] - mean * scale, x, scale, out=torch.empty_like(x))


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, with the time embedding, if there is one, added between. Over images (B T, C, h,
    w) or, if `temporal`, over (B, C, T, cells): the norm's statistics then run over all frames of a clip."""

    def __init__(self, channels_in, channels, groups, eps, time_width=None, temporal=False):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, eps)
        self.conv1 = TimeConv(channels) if temporal else nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, channels) if time_width else None
        self.norm2 = GroupNorm(groups, channels, eps)
        self.conv2 = TimeConv(channels) if temporal else nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x, time=None):
        """x (B or B T, C, ., .), time (B, E) -> x's shape with C' channels"""
        y = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            y = y + repeat(self.time_emb_proj(F.silu(time)), "b c -> (b t) c 1 1", t=len(x) // len(time))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class VideoResidual(nn.Module):
    """A residual block over space, then one over time, blended."""

    def __init__(self, channels_in, channels, time_width, groups, eps):
        super().__init__()
        self.spatial_res_block = Residual(channels_in, channels, groups, eps, time_width)
        self.temporal_res_block = Residual(channels, channels, groups, eps, time_width, temporal=True)
        self.time_mixer = Mixer()

    def forward(self, x, c):
        x = self.spatial_res_block(x, c.time)  # (B T, C, h, w)
        if c.still:
            return x
        h, T = x.shape[2], c.frame.shape[1]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=T)  # a view, as x is channels-last
        x = self.time_mixer(x, self.temporal_res_block(x, c.time))
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=h)


class Attention(nn.Module):
    """Multi-head attention of queries (N, n, C) to keys and values (N, n or L, D); self-attention without them."""

    def __init__(self, width, context_width, heads, inner=None):
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(self, query, key=None, value=None):
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (rearrange(y, "n l (heads c) -> n heads l c", heads=self.heads)
                   for y in (self.to_q(query), self.to_k(key), self.to_v(value)))
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # backward is 6 times faster than the fused
            y = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(y, "n heads l c -> n l (heads c)"))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        gated = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})
        self.net = nn.ModuleList([gated, nn.Identity(), nn.Linear(4 * width, width)])  # net.0.proj, net.2

    def forward(self, x):
        x, gate = self.net[0]["proj"](x).chunk(2, -1)
        return self.net[2](x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention within a row of tokens, cross-attention to the clip's context, feed-forward. The temporal kind,
    whose rows run along time, has one more feed-forward in front."""

    def __init__(self, width, context_width, heads, temporal=False):
        super().__init__()
        self.temporal = temporal
        if temporal:
            self.norm_in = nn.LayerNorm(width)
            self.ff_in = FeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        """x (N, n, C), context (B, L, D), where the rows of one clip follow each other -> (N, n, C)"""
        if self.temporal:
            x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        tokens = rearrange(x, "(b n) l c -> b (n l) c", b=len(context))  # all tokens of a clip
        if context.shape[1] == 1:                     # softmax over one key is 1, whatever query and key are
            tokens = tokens + self.attn2.to_out(self.attn2.to_v(context))
        else:
            tokens = tokens + self.attn2(self.norm2(tokens), context)
        x = tokens.view(x.shape)
        return x + self.ff(self.norm3(x))


class VideoTransformer(nn.Module):
    """Transformer blocks over the cells of each frame, each followed by one over the frames of each cell, blended."""

    def __init__(self, channels, context_width, heads, layers, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads) for _ in range(layers))
        self.temporal_transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads, temporal=True) for _ in range(layers))
        self.time_pos_embed = Embedding(channels, 4 * channels, channels)
        self.time_mixer = Mixer()
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, c):
        (B, T), (C, h, w) = c.frame.shape, x.shape[1:]                 # x (B T, C, h, w)
        position = self.time_pos_embed(sinusoid(c.frame, C))[:, None]  # (B, 1, T, C)
        y = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        for over_space, over_time in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            spatial = rearrange(over_space(y, c.context), "(b t) n c -> b n t c", t=T)
            y = spatial + position  # all that a still knows of time
            if not c.still:
                y = over_time(y.flatten(0, 1), c.context).view(spatial.shape)
            y = rearrange(self.time_mixer(spatial, y), "b n t c -> (b t) n c")
        return x + rearrange(self.proj_out(y), "n (h w) c -> n c h w", h=h)


class Resample(nn.Module):
    """Half the size by a strided convolution, or nearest-neighbour up to a given size and a convolution."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)

    def forward(self, x, size=None):
        return self.conv(x if size is None else F.interpolate(x, size, mode="nearest"))


class Level(nn.Module):
    """The layers of one resolution, on the way down, in the middle or on the way up. A layer is a residual block and,
    where the level attends, a transformer. widths: (channels in, channels out) of each residual block."""

    def __init__(self, widths, config, level, attends, eps, down=False, up=False):
        super().__init__()
        keys = "cross_attention_dim", "num_attention_heads", "transformer_layers_per_block"
        sizes = (config[key] for key in keys)  # the hub gives one number, or one for each level
        sizes = [size[level] if isinstance(size, (list, tuple)) else size for size in sizes]
        eps = config.get("resnet_eps") or eps
        groups, time_width = config.get("norm_num_groups", 32), 4 * config["block_out_channels"][0]
        self.resnets = nn.ModuleList(VideoResidual(*pair, time_width, groups, eps) for pair in widths)
        self.attentions = nn.ModuleList(VideoTransformer(widths[-1][1], *sizes, groups) for _ in range(attends))
        self.downsamplers = nn.ModuleList([Resample(widths[-1][1], 2)] if down else [])
        self.upsamplers = nn.ModuleList([Resample(widths[-1][1], 1)] if up else [])

    def layer(self, i, x, c):
        x = self.resnets[i](x, c)
        return self.attentions[i](x, c) if len(self.attentions) else x

    def middle(self, x, c):
        return self.resnets[1](self.layer(0, x, c), c)


class Decoder(nn.Module):
    """The way up of the U-Net: layers that take one skip connection each, then norm, SiLU, convolution."""

    def __init__(self, config):
        super().__init__()
        self.checkpointing = False                           # True: recompute activations in backward, to save memory
        channels, layers = config["block_out_channels"], config["layers_per_block"] + 1
        skips = [channels[0]] + [width for width in channels for _ in range(layers)]  # what the encoder leaves:
        del skips[-1]                                        # conv_in, each level's layers and all downsamplers but one
        self.up_blocks, width = nn.ModuleList(), channels[-1]
        for kind, level in zip(config["up_block_types"], reversed(range(len(channels)))):
            widths = []
            for _ in range(layers):
                widths.append((width + skips.pop(), channels[level]))
                width = channels[level]
            attends = layers if kind.startswith("CrossAttn") else 0
            self.up_blocks.append(Level(widths, config, level, attends, eps=1e-6, up=level > 0))
        self.conv_norm_out = nn.GroupNorm(config.get("norm_num_groups", 32), channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config["out_channels"], 3, padding=1)

    def layers(self):
        """Yields (level, number of the layer in it, whether an upsampler follows it), in the order of computation."""
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                yield block, i, i == len(block.resnets) - 1 and len(block.upsamplers) > 0

    def decode(self, x, skips, c, cross_view=(), reference=()):
        """All layers: x (B T, C, h, w) after the middle, skips (used up) -> output (B T, C, h, w), and what each layer
        wrote. With cross_view, layer i's result looks at reference[i], what the reference stream wrote there."""
        written = []
        for i, (block, k, upsample) in enumerate(self.layers()):
            x = self.run(block.layer, k, torch.cat([x, skips.pop()], 1), c)
            if upsample:
                x = block.upsamplers[0](x, skips[-1].shape[-2:])
            if cross_view:
                x = self.run(cross_view[i], x, reference[i])
            written.append(x)
        return self.conv_out(F.silu(self.conv_norm_out(x))), written

    def run(self, function, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


class UNet(Decoder):
    """SVD's spatio-temporal U-Net: a decoder and, before it, the way down. config: the hub's unet/config.json."""

    def __init__(self, config):
        super().__init__(config)
        self.config = dict(config)
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], 4 * channels[0], 4 * channels[0])
        ids_width = config["projection_class_embeddings_input_dim"]
        self.add_embedding = Embedding(ids_width, 4 * channels[0], 4 * channels[0])
        self.down_blocks, width = nn.ModuleList(), channels[0]
        for level, kind in enumerate(config["down_block_types"]):
            attends = kind.startswith("CrossAttn")
            widths = [(width, channels[level])] + [(channels[level], channels[level])] * (layers - 1)
            width = channels[level]
            self.down_blocks.append(Level(widths, config, level, layers if attends else 0,
                                          eps=1e-6 if attends else 1e-5,  # no slip: the published weights have both
                                          down=level < len(channels) - 1))
        self.mid_block = Level([(width, width)] * 2, config, -1, 1, eps=1e-5)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def from_pretrained(cls, folder_or_repo, subfolder="unet", dtype=torch.float32, device="cpu"):
        return load_pretrained(cls, folder_or_repo, subfolder, dtype, device)

    def condition(self, timestep, image_embeds, added_time_ids, frame_index):
        """timestep (B,), image_embeds (B, L, D), added_time_ids (B, 3), frame_index (B, T) -> Condition"""
        ids = sinusoid(added_time_ids.to(timestep.dtype), self.config["addition_time_embed_dim"]).flatten(1)
        time = self.time_embedding(sinusoid(timestep, self.config["block_out_channels"][0]))
        time = time + self.add_embedding(ids)  # (B, E)
        still = frame_index.shape[1] == 1 and not self.config.get("temporal_on_stills", True)
        return Condition(time, image_embeds.to(time.dtype), frame_index.to(timestep.dtype), still)

    def encode(self, sample, c):
        """sample (B T, C, h, w) -> features after the middle (B T, C', h', w') and the list of skip connections"""
        # Channels last: a row of tokens, an image and a clip are then views of each other, and convolutions are faster.
        x = self.conv_in(sample.to(self.conv_in.weight.dtype, memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self.run(block.layer, i, x, c)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        return self.run(self.mid_block.middle, x, c), skips

    def forward(self, sample, timestep, image_embeds, added_time_ids, frame_index=None):
        """One evaluation of the plain U-Net.

        sample (B, T, C_in, h, w): noisy latents, scaled by c_in, and condition latents; timestep (B,) c_noise;
        image_embeds (B, L, D); added_time_ids (B, 3): fps id, motion bucket, noise augmentation; frame_index (B, T),
        0, 1, 2... when None. Returns (B, T, C_out, h, w)."""
        B, T = sample.shape[:2]
        if frame_index is None:
            frame_index = torch.arange(T, device=sample.device).expand(B, T)
        c = self.condition(timestep.float(), image_embeds, added_time_ids, frame_index)
        x, skips = self.encode(sample.flatten(0, 1), c)
        return self.decode(x, skips, c)[0].unflatten(0, (B, T))


# ------------------------------------------------------------------------------ CLIP's image encoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPLayer(nn.Module):
    """One pre-norm transformer layer of the vision tower."""

    def __init__(self, width, hidden, heads, eps):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):  # (N, tokens, C)
        y = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{name}_proj"](y), "n l (heads c) -> n heads l c", heads=self.heads)
                   for name in "qkv")
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "n heads l c -> n l (heads c)")
        x = x + self.self_attn["out_proj"](y)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPImageEncoder(nn.Module):
    """CLIP's vision transformer (ViT-H/14 in SVD): one embedding of an image, from its class token. config: the hub's
    image_encoder/config.json."""
    keys_to_ignore = ("vision_model.embeddings.position_ids",)  # 0, 1, 2...; older files have it

    def __init__(self, config):
        super().__init__()
        if config["hidden_act"] != "gelu":
            raise ValueError(f"CLIP config: hidden_act is {config['hidden_act']!r}, SVD's encoder has 'gelu'")
        width, patch, eps = config["hidden_size"], config["patch_size"], config["layer_norm_eps"]
        embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(config["num_channels"], width, patch, patch, bias=False),
            "position_embedding": nn.Embedding((config["image_size"] // patch) ** 2 + 1, width)})
        embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.vision_model = nn.ModuleDict({
            "embeddings": embeddings,
            "pre_layrnorm": nn.LayerNorm(width, eps),  # the published files really spell it so
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                CLIPLayer(width, config["intermediate_size"], config["num_attention_heads"], eps)
                for _ in range(config["num_hidden_layers"]))}),
            "post_layernorm": nn.LayerNorm(width, eps)})
        self.visual_projection = nn.Linear(width, config["projection_dim"], bias=False)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def from_pretrained(cls, folder_or_repo, subfolder="image_encoder", dtype=torch.float32, device="cpu"):
        return load_pretrained(cls, folder_or_repo, subfolder, dtype, device)

    def forward(self, pixels):
        """pixels (N, 3, 224, 224) from clip_preprocess -> (N, D)"""
        model = self.vision_model
        patches = rearrange(model["embeddings"]["patch_embedding"](pixels), "n c h w -> n (h w) c")
        first = model["embeddings"].class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + model["embeddings"]["position_embedding"].weight  # (N, 257, C)
        x = model["pre_layrnorm"](x)
        for layer in model["encoder"]["layers"]:
            x = layer(x)
        return self.visual_projection(model["post_layernorm"](x[:, 0]))


def clip_preprocess(images, size=224):
    """SVD's preparation of images for CLIP: blur against aliasing, bicubic resize, normalisation.

    images (N, 3, H, W) in [-1, 1] -> (N, 3, size, size) with CLIP's mean and standard deviation. The aspect ratio is
    not kept: SVD was trained so. The blur is a Gaussian of sigma (H / size - 1) / 2 pixels, cut off at two sigmas."""
    for axis in (-2, -1):
        sigma = max((images.shape[axis] / size - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2  # the kernel has 2 reach + 1 taps
        offset = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-offset ** 2 / (2 * sigma ** 2))
        kernel = (kernel / kernel.sum()).view((-1, 1) if axis == -2 else (1, -1)).expand(images.shape[1], 1, -1, -1)
        padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        images = F.conv2d(F.pad(images, padding, mode="reflect"), kernel, groups=images.shape[1])
    images = F.interpolate(images, (size, size), mode="bicubic", align_corners=True)
    mean, std = (images.new_tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std


# -------------------------------------------------------------------------------------- the 4D model

def precondition(sigma):
    """EDM's scalings for data of unit variance: the clean estimate is D_x = c_skip x + c_out F(c_in x; c_noise).

    sigma: noise levels > 0 -> c_skip, c_out, c_in, c_noise, of its shape, as SVD was trained (v-prediction)."""
    total = sigma ** 2 + 1
    return 1 / total, -sigma / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def sine_positions(h, w, width, device):
    """Fixed 2-D positions of latent cells, (h w, width): half the channels tell the row, half the column. An image side
    is 100 units long at every resolution."""
    row, column = (sinusoid((torch.arange(n, device=device) + 0.5) * (100 / n), width // 2) for n in (h, w))
    return torch.cat([repeat(row, "h d -> (h w) d", w=w), repeat(column, "w d -> (h w) d", h=h)], -1)


class CrossViewAttention(nn.Module):
    """Lets every cell of another view look at all cells of the reference view, in the same frame."""

    def __init__(self, channels, heads, head_dim, norm=True):
        super().__init__()
        self.norm_view = nn.LayerNorm(channels) if norm else None
        self.norm_reference = nn.LayerNorm(channels) if norm else None
        self.attention = Attention(channels, channels, heads, heads * head_dim)
        nn.init.zeros_(self.attention.to_out[0].weight)  # it adds nothing at first: a new svd model is exactly SVD
        nn.init.zeros_(self.attention.to_out[0].bias)

    def forward(self, x, reference):
        """x (v b t, C, h, w) of the v other views, reference (b t, C, h, w) -> as x"""
        h, w = x.shape[2:]
        views, position = len(x) // len(reference), 0
        view, ref = (rearrange(y, "n c h w -> n (h w) c") for y in (x, reference))
        if self.norm_view is not None:
            view, ref = self.norm_view(view), self.norm_reference(ref)
            position = sine_positions(h, w, x.shape[1], x.device).to(view.dtype)
        key, value = (repeat(y, "n l c -> (v n) l c", v=views) for y in (ref + position, ref))
        return x + rearrange(self.attention(view + position, key, value), "n (h w) c -> n c h w", h=h)


def fresh(unet):
    """Prepares a U-Net for training from scratch: every residual branch ends in zero weights, so that features pass
    through unchanged and the output is zero, and layers along time start as the identity: a clip starts as frames one
    by one, which is what training begins with."""
    for module in unet.modules():
        ends = [getattr(module, name) for name in ("conv2", "proj_out", "conv_out") if hasattr(module, name)]
        if getattr(module, "temporal", False):  # a transformer block
            ends = [module.ff_in.net[2], module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]]
        for end in ends:
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)
        if isinstance(module, TimeConv):
            nn.init.zeros_(module.weight[:, :, ::2])  # the frame before and the frame after
    return unet


class Model4D(nn.Module):
    """The paper's model: one encoder and middle for all streams, two decoders, cross-view attention in the second.

    mv_attention: "points" (the method), "none" (an ablation) or, with rgb_only, "rgb" (another: the RGB of other views
    attends to the reference's). rgb_only: no pointmaps and no second decoder, plain SVD on every view; "points" then
    means "none". unet: a U-Net with weights, decoder B becomes a copy of its own; None: a fresh one."""

    def __init__(self, preset, mv_attention="points", rgb_only=False, unet=None):
        super().__init__()
        if mv_attention not in ("points", "none", "rgb") or mv_attention == "rgb" and not rgb_only:
            raise ValueError(f"mv_attention is 'points', 'none' or, with rgb_only, 'rgb', not {mv_attention!r}")
        self.preset, self.rgb_only = preset, rgb_only
        self.mv_attention = "none" if rgb_only and mv_attention == "points" else mv_attention
        self.unet = fresh(UNet({**preset.unet, "resnet_eps": preset.resnet_eps})) if unet is None else unet
        like = self.unet.conv_in.weight
        self.cross_view = nn.ModuleList(
            CrossViewAttention(block.resnets[0].spatial_res_block.conv2.out_channels, preset.view_heads,
                               preset.view_head_dim, preset.view_norm)
            for block, _, _ in self.unet.layers() if self.mv_attention != "none").to(like.device, like.dtype)
        if preset.clip is None:
            self.token = nn.Parameter(torch.randn(1, 1, preset.unet["cross_attention_dim"]).to(like))
        self.decoder_b = None
        self.copy_decoder()
        # One context token: queries and keys of the attention to it play no part (see TransformerBlock) and are not
        # trained, so that an optimiser and DDP leave them alone.
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                for part in (module.norm2, module.attn2.to_q, module.attn2.to_k):
                    part.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, preset, folder_or_repo=SVD_REPO, dtype=torch.float32, device="cpu", **switches):
        """From SVD's published weights: folder_or_repo has a subfolder unet. switches: mv_attention, rgb_only."""
        return cls(preset, unet=UNet.from_pretrained(folder_or_repo, "unet", dtype, device), **switches)

    def copy_decoder(self):
        """Makes decoder B a copy of decoder A as it is now: call it after loading weights into `unet`."""
        if not self.rgb_only:
            with torch.device("meta"):
                self.decoder_b = Decoder(self.unet.config)
            self.decoder_b.checkpointing = self.unet.checkpointing
            for name in ("up_blocks", "conv_norm_out", "conv_out"):
                setattr(self.decoder_b, name, copy.deepcopy(getattr(self.unet, name)))

    @property
    def checkpointing(self):
        return self.unet.checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        for decoder in filter(None, (self.unet, self.decoder_b)):
            decoder.checkpointing = on

    def forward(self, noisy, sigma, cond, image_embeds=None, frame_index=None):
        """The clean-latent estimate D_x (B, V, S, T, C, h, w).

        noisy (B, V, S, T, C, h, w): clean latents + sigma * noise; sigma (B,); cond (B, V, S, C, h, w): latents of the
        observed frame; image_embeds (B, V, D): CLIP's embedding of each view's observed frame, None for presets without
        CLIP; frame_index (B, T), 0..T-1 when None. S is 2, or 1 with rgb_only."""
        B, V, S, T = noisy.shape[:4]
        if S != 2 - self.rgb_only:
            raise ValueError(f"noisy has {S} streams a view, this model has {2 - self.rgb_only}")
        if (image_embeds is None) != (self.preset.clip is None):
            raise ValueError("image_embeds (B, V, D) are needed by presets with a CLIP encoder, and only by them")
        scalings = precondition(sigma.to(torch.promote_types(sigma.dtype, torch.float32)))
        c_skip, c_out, c_in, c_noise = (rearrange(c, "b -> b 1 1 1 1 1 1") for c in scalings)
        if frame_index is None:
            frame_index = torch.arange(T, device=noisy.device).expand(B, T)

        # 1. Encoder and middle: every stream of every view is a clip like any other.
        # ("change" is given the best linear guess, which fades out as the noise grows: of pure noise nothing is left.)
        scaled = noisy * (c_in if self.preset.prediction == "v" else c_skip)
        x = torch.cat([scaled.to(cond.dtype), repeat(cond, "b v s c h w -> b v s t c h w", t=T)], 4)
        x = rearrange(x, "b v s t c h w -> (s v b t) c h w")
        ids = torch.tensor([FPS_ID, MOTION_BUCKET, NOISE_AUGMENTATION], dtype=c_noise.dtype, device=noisy.device)
        c = self.unet.condition(c_noise.flatten().repeat(S * V), self.tokens(image_embeds, B, V, S),
                                ids.expand(S * V * B, 3), frame_index.repeat(S * V, 1))
        x, skips = self.unet.encode(x, c)

        # 2. Decoder A: RGB of all views and the reference's pointmap (RGB only: the reference's RGB).
        lead = B if self.rgb_only else (V + 1) * B  # clips
        rows = slice(0, lead * T)
        F_x, written = self.unet.decode(x[rows], [skip[rows] for skip in skips], c.rows(slice(0, lead)))

        # 3. Decoder B: the other views' pointmaps. Each layer looks at the reference's, the last clips of A.
        if V > 1:
            decoder, rows = self.unet if self.rgb_only else self.decoder_b, slice(lead * T, None)
            reference = [y[-B * T:] for y in written]
            F_b, _ = decoder.decode(x[rows], [skip[rows] for skip in skips], c.rows(slice(lead, None)),
                                    self.cross_view, reference)
            F_x = torch.cat([F_x, F_b])
        F_x = rearrange(F_x.to(noisy.dtype), "(s v b t) c h w -> b v s t c h w", s=S, v=V, b=B)
        if self.preset.prediction == "v":
            return c_skip.to(noisy.dtype) * noisy + c_out.to(noisy.dtype) * F_x

        # "change": what differs from the observed frame, so that what stays is sharp at once, and, in the last channel,
        # a gate on that frame: where the arm leaves, one number erases it.
        change, gate = F_x.split([F_x.shape[4] - 1, 1], 4)
        return (1 + gate) * rearrange(cond, "b v s c h w -> b v s 1 c h w") + change

    def tokens(self, image_embeds, B, V, S):
        """The context token of every clip, ((s v b), 1, D): of its own view, or learned where there is no CLIP."""
        if image_embeds is None:
            return self.token.expand(S * V * B, 1, -1)
        if self.preset.tokens == "crossed":  # RGB sees view 1's, pointmaps see view 0's
            crossed = image_embeds[:, [min(1, V - 1), 0][:S]]
            return repeat(crossed, "b s d -> (s v b) 1 d", v=V)
        return repeat(image_embeds, "b v d -> (s v b) 1 d", s=S)


def main():
    parser = argparse.ArgumentParser(description="Prints how many parameters each part of a preset has.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="[tiny]")
    with torch.device("meta"):
        net = Model4D(PRESETS[parser.parse_args().preset])
    decoder = sum(count(part) for part in (net.unet.up_blocks, net.unet.conv_norm_out, net.unet.conv_out))
    for name, number in (("encoder and middle", count(net.unet) - decoder), ("decoder A", decoder),
                         ("decoder B", count(net.decoder_b)), ("cross-view attention", count(net.cross_view)),
                         ("all", count(net))):
        print(f"{name:22s}{number:15,d}")


if __name__ == "__main__":
    main()
