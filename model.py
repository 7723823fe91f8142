"""The networks: Stable Video Diffusion's U-Net, the two-decoder 4D model built from it, and CLIP's image encoder.

    python model.py --preset svd                                       # prints the parameter counts of every part
    model = Model4D(PRESETS['tiny'])                                   # from scratch
    model = Model4D.from_pretrained(PRESETS['svd'], SVD_REPO, dtype=torch.bfloat16)

Two views of one scene go through the U-Net as separate streams: an RGB video and a pointmap video per view. All
streams share encoder and middle. Decoder A writes the RGB of every view and the pointmap of view 0, the reference.
Decoder B writes the pointmaps of the other views *in the reference camera's frame*; to know where that frame is, each
of its layers looks at the reference's pointmap features through cross-view attention. See `Model4D.forward`.

Attributes are named as the keys of the published files (`down_blocks.0.attentions.1.proj_in.weight`), so they load
with strict=True and no renaming.

Letters: B samples, V views (view 0 = reference), S streams of a view (0 RGB, 1 pointmap), N = streams * samples, T
frames, C channels, h w latent cells, n = h * w tokens, L context tokens, D width of a context token, E width of the
time embedding.

References: Blattmann et al. 2023, Stable Video Diffusion (arXiv 2311.15127); Karras et al. 2022, EDM (arXiv
2206.00364); Liu et al. 2025, Geometry-aware 4D Video Generation for Robot Manipulation (arXiv 2507.01099); Wang et
al. 2024, DUSt3R (arXiv 2312.14132): the pointmap of a second view in the first view's frame; Radford et al. 2021,
CLIP (arXiv 2103.00020).
"""
import argparse
import collections
import copy
import dataclasses
import json
import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------- presets

SVD_REPO = 'stabilityai/stable-video-diffusion-img2vid'
FPS_ID, MOTION_BUCKET, NOISE_AUGMENTATION = 6, 127, 0.02               # SVD's three conditioning numbers, kept constant


@dataclasses.dataclass
class Preset:
    """One size of the whole model. `unet`, `vae` and `clip` are the hub's config.json contents, with two keys of our
    own: norm_num_groups, the number of groups of every GroupNorm (32 where absent, as in the published weights), and
    the VAE's patch_size, the side of the pixel squares that it folds into channels first (1 where absent)."""
    name: str
    height: int                        # pixels
    width: int                         # pixels
    unet: dict
    vae: dict
    clip: dict = None                  # None: one learned token stands in for the image embedding
    view_heads: int = 8                # heads of the cross-view attention
    view_head_dim: int = 64            # channels a head
    view_norm: bool = True             # LayerNorm and sine positions in front of it


def unet_config(channels, heads, layers, latent_channels, context, groups, attention_levels):
    """The hub's U-Net config for a network trained from scratch. `attention_levels`: how many levels, counted from
    the finest, have transformers (the middle always has)."""
    attends = [level < attention_levels for level in range(len(channels))]
    return dict(in_channels=2 * latent_channels, out_channels=latent_channels, block_out_channels=list(channels),
                num_attention_heads=list(heads), layers_per_block=layers, transformer_layers_per_block=1,
                cross_attention_dim=context, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96,
                norm_num_groups=groups,
                down_block_types=['CrossAttn' * a + 'DownBlockSpatioTemporal' for a in attends],
                up_block_types=['CrossAttn' * a + 'UpBlockSpatioTemporal' for a in attends[::-1]])


def vae_config(channels, layers, latent_channels, groups, patch_size=1):
    """The hub's VAE config for a network trained from scratch; latents are patch_size * 2 ** (levels - 1) times
    smaller than images."""
    return dict(in_channels=3, out_channels=3, down_block_types=['DownEncoderBlock2D'] * len(channels),
                block_out_channels=list(channels), layers_per_block=layers, latent_channels=latent_channels,
                scaling_factor=1.0, force_upcast=False, norm_num_groups=groups, patch_size=patch_size)


PRESETS = {
    # A laptop CPU, minutes: 8 x 10 latents of 8 channels.
    'tiny': Preset('tiny', height=64, width=80, view_heads=4, view_head_dim=32,
                   unet=unet_config((48, 64), heads=(2, 2), layers=1, latent_channels=8, context=32, groups=8,
                                    attention_levels=0),
                   vae=vae_config((32, 64), layers=1, latent_channels=8, groups=8, patch_size=4)),
    # One ordinary GPU, an hour: 16 x 20 latents.
    'small': Preset('small', height=128, width=160, view_heads=4, view_head_dim=64,
                    unet=unet_config((64, 128, 256), heads=(1, 2, 4), layers=2, latent_channels=8, context=64,
                                     groups=32, attention_levels=3),
                    vae=vae_config((32, 64, 128, 128), layers=2, latent_channels=8, groups=16)),
    # The paper's model, from the published weights of SVD img2vid: 32 x 40 latents of 4 channels.
    'svd': Preset('svd', height=256, width=320,
                  unet=dict(sample_size=96, in_channels=8, out_channels=4, block_out_channels=[320, 640, 1280, 1280],
                            num_attention_heads=[5, 10, 20, 20], layers_per_block=2, transformer_layers_per_block=1,
                            cross_attention_dim=1024, addition_time_embed_dim=256, num_frames=14,
                            projection_class_embeddings_input_dim=768,
                            down_block_types=['CrossAttnDownBlockSpatioTemporal'] * 3 + ['DownBlockSpatioTemporal'],
                            up_block_types=['UpBlockSpatioTemporal'] + ['CrossAttnUpBlockSpatioTemporal'] * 3),
                  vae=dict(sample_size=768, in_channels=3, out_channels=3, block_out_channels=[128, 256, 512, 512],
                           down_block_types=['DownEncoderBlock2D'] * 4, layers_per_block=2, latent_channels=4,
                           scaling_factor=0.18215, force_upcast=True),
                  clip=dict(hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32,
                            num_attention_heads=16, num_channels=3, image_size=224, patch_size=14, hidden_act='gelu',
                            layer_norm_eps=1e-5, attention_dropout=0.0)),
}


def choose_preset():
    """The largest preset that this machine trains in reasonable time, and the reason in words."""
    if not torch.cuda.is_available():
        return "tiny", "no CUDA GPU here"
    memory = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    name = torch.cuda.get_device_name(0)
    return ("svd", f"{name}, {memory:.0f} GB") if memory > 44 else ("small", f"{name}, {memory:.0f} GB; svd needs 48")


# ------------------------------------------------------------------------------------------- loading published weights

def load_pretrained(module_class, folder_or_repo, subfolder=None, dtype=torch.float32, device='cpu'):
    """A module with the weights of a folder in the hub's layout, or of a hub repo, which is downloaded first.

    The folder (or its `subfolder`) holds config.json beside diffusion_pytorch_model.safetensors or model.safetensors,
    an .fp16 variant of them, or shards with their index.json. `module_class.from_config(config)` builds the module
    without memory (on the meta device); then each tensor goes straight to `dtype` on `device`, so memory never holds
    two copies.

    Raises ValueError, in one line that names it, for a missing or unexpected key, a wrong shape, a damaged file, a
    folder without config.json and a repo that can't be reached."""
    half = dtype in (torch.float16, torch.bfloat16)
    folder = hub_folder(folder_or_repo, subfolder, half)
    config_path = folder / 'config.json'
    if not config_path.is_file():
        raise ValueError(f"{folder} has no config.json: give a folder in the hub's layout (config.json + .safetensors)")
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise ValueError(f'{config_path} is not JSON ({error}): download it again') from None
    with torch.device('meta'):
        module = module_class.from_config(config)
    load_weights(module, weight_files(folder, half), dtype, device)
    return module.eval()


def hub_folder(folder_or_repo, subfolder=None, half=False):
    """The folder of a local copy, or of a hub repo: downloaded, resumed, or already there. half: the .fp16 files,
    where the repo has them, are enough. Raises a one-line ValueError."""
    subfolder = subfolder or ''
    if Path(folder_or_repo).is_dir():
        return Path(folder_or_repo) / subfolder
    if Path(folder_or_repo).exists() or str(folder_or_repo).count('/') != 1 or str(folder_or_repo)[0] in './~':
        raise ValueError(f'{folder_or_repo} is neither a folder nor a hub repo name (owner/name)')
    from huggingface_hub import snapshot_download
    try:
        for variant in (half, not half):
            wanted = ['config.json'] + (['*fp16*'] if variant else ['*.safetensors', '*.safetensors.index.json'])
            wanted = [f'{subfolder}/{name}'.lstrip('/') for name in wanted]
            root = snapshot_download(str(folder_or_repo), allow_patterns=wanted,
                                     ignore_patterns=['*.bin'] if variant else ['*.bin', '*fp16*'])
            if any((Path(root) / subfolder).glob('*.safetensors')):
                break
    except Exception as error:                          # the client has many types for "no", "not now", "not you"
        raise ValueError(f'cannot download {folder_or_repo} ({type(error).__name__}): accept its licence at '
                         f'https://huggingface.co/{folder_or_repo} and run `hf auth login`, or pass the folder of a '
                         f'local copy') from None
    return Path(root) / subfolder


def weight_files(folder, half=False):
    """The safetensors files of a folder in the hub's layout: of its two variants the wanted one, else the other."""
    for variant in ('.fp16', '') if half else ('', '.fp16'):
        for stem in ('diffusion_pytorch_model', 'model'):
            index = folder / f'{stem}.safetensors.index{variant}.json'
            single = folder / f'{stem}{variant}.safetensors'
            if single.is_file():
                return [single]
            if index.is_file():
                names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
                for name in names:
                    if not (folder / name).is_file():
                        raise ValueError(f'{folder / name} is missing, but {index.name} lists it: download it again')
                return [folder / name for name in names]
    raise ValueError(f'{folder} has no diffusion_pytorch_model[.fp16].safetensors and no model[.fp16].safetensors')


def read_safetensors(path):
    """Yields (key, tensor) of a .safetensors file, one at a time. The file is read, not mapped as the safetensors
    package does: mapped pages stay in memory beside the tensors made of them, which doubles the peak when the wanted
    dtype is another."""
    dtypes = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
              'I64': torch.int64}
    try:
        with open(path, 'rb') as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), 'little'), Path(path).stat().st_size)))
            start = file.tell()
            header.pop('__metadata__', None)
            for key, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
                tensor = torch.empty(entry['shape'], dtype=dtypes[entry['dtype']])
                begin, end = entry['data_offsets']
                file.seek(start + begin)
                read = file.readinto(tensor.view(-1).view(torch.uint8).numpy())
                if not read == end - begin == tensor.nbytes:
                    raise ValueError(f'the file ends within {key}')
                yield key, tensor
    except Exception as error:                                   # there is no end to what a damaged header can cause
        error = f'{type(error).__name__}: {error}'
        raise ValueError(f'{path} is damaged or truncated ({error}): download it again') from None


def load_weights(module, files, dtype=torch.float32, device='cpu'):
    """Fills `module` (which may be on the meta device) from safetensors files, strictly. Raises a one-line
    ValueError."""
    state = {}
    for path in files:
        for key, tensor in read_safetensors(path):
            if key not in getattr(module, 'keys_to_ignore', ()):
                state[key] = tensor.to(device, dtype)
    fill(module, state, files[0] if len(files) == 1 else files[0].parent)


def fill(module, state, source):
    """Gives `module` the tensors of `state`, themselves, not copies. Raises a ValueError that names `source` and the
    key."""
    expected = module.state_dict()
    for key, value in state.items():
        if key not in expected:
            raise ValueError(f'{source}: unexpected key {key} {list(value.shape)}, not in {type(module).__name__}')
        if value.shape != expected[key].shape:
            raise ValueError(f'{source}: {key} has shape {list(value.shape)}, the model needs '
                             f'{list(expected[key].shape)}')
    refuse_missing(source, [key for key in expected if key not in state])
    module.load_state_dict(state, strict=True, assign=True)


def refuse_missing(source, keys):
    if keys:
        raise ValueError(f'{source}: missing key {keys[0]}' + f' and {len(keys) - 1} more' * (len(keys) > 1))


# ------------------------------------------------------------------------------------------------- pieces of the U-Net

class Condition(NamedTuple):
    """What every layer of the U-Net is told about the B clips it works on."""
    time: torch.Tensor                                  # (B, E) noise level and SVD's three numbers, embedded
    context: torch.Tensor                               # (B, L, D) image embedding
    frame: torch.Tensor                                 # (B, T) frame numbers

    def rows(self, rows):
        return Condition(*(field[rows] for field in self))


def frequencies(width, device):
    """1 ... 1/10000 in `width` geometric steps, in float32 as in the reference implementation, whatever the model's
    dtype."""
    return torch.exp(-math.log(10000) * torch.arange(width, dtype=torch.float32, device=device) / width)


def sinusoid(x, width):
    """Sinusoidal embedding [cos, sin] of x (...,) -> (..., width), float32."""
    angle = x.float()[..., None] * frequencies(width // 2, x.device)
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
    """Blends a spatial and a temporal branch: a * spatial + (1 - a) * temporal, with a = sigmoid of one learned
    number."""

    def __init__(self):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, spatial, temporal):
        return torch.lerp(spatial, temporal.to(spatial.dtype), torch.sigmoid(-self.mix_factor).to(spatial.dtype))


class TimeConv(nn.Conv3d):
    """Conv3d of kernel (3, 1, 1), computed on (B, C, T, n) as a Conv2d of kernel (3, 1): the same sums, faster
    kernels."""

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        if x.shape[2] == 1:                             # a single frame: both neighbours in time are padding, zero
            return F.conv2d(x, self.weight[:, :, 1], self.bias)
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, with the time embedding added between. Works on images (B T, C, h, w), or,
    where `conv` is TimeConv, along time on (B, C, T, n): the norm's statistics then run over all frames of a clip."""

    def __init__(self, channels_in, channels, time_width, groups, eps, temporal=False):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = TimeConv(channels) if temporal else nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = TimeConv(channels) if temporal else nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x, time):
        """x (N, C, a, b), time (B, E) where N is a multiple of B -> (N, C', a, b)"""
        time = self.time_emb_proj(F.silu(time)).repeat_interleave(len(x) // len(time), 0)
        y = self.conv1(F.silu(self.norm1(x))) + time[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class VideoResidual(nn.Module):
    """A residual block over space, then one over time, blended."""

    def __init__(self, channels_in, channels, time_width, groups, eps):
        super().__init__()
        self.spatial_res_block = Residual(channels_in, channels, time_width, groups, eps)
        self.temporal_res_block = Residual(channels, channels, time_width, groups, eps, temporal=True)
        self.time_mixer = Mixer()

    def forward(self, x, c):
        """x (B T, C, h, w), c Condition -> (B T, C', h, w)"""
        x = self.spatial_res_block(x, c.time)                                # (B T, C', h, w)
        clip = x.unflatten(0, c.frame.shape).transpose(1, 2).flatten(3)      # (B, C', T, n), a view
        clip = self.time_mixer(clip, self.temporal_res_block(clip, c.time))
        return clip.transpose(1, 2).reshape(x.shape)                         # (B T, C', h, w)


class Attention(nn.Module):
    """Multi-head attention of x (M, n, C) to itself, or to a context (M, L, D)."""

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
        q, k, v = (projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)             # (M, heads, n or L, C / heads)
                   for projected in (self.to_q(query), self.to_k(key), self.to_v(value)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))                                 # (M, n, C)


class GEGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))     # net.0, net.2

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention within a row of tokens, cross-attention to the sample's context, feed-forward. The temporal
    kind, whose rows run along time, has one more feed-forward in front."""

    def __init__(self, width, context_width, heads, temporal=False):
        super().__init__()
        if temporal:
            self.norm_in = nn.LayerNorm(width)
            self.ff_in = FeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)
        self.temporal = temporal

    def forward(self, x, context):
        """x (M, n, C), context (B, L, D) where the rows of one sample follow each other -> (M, n, C)"""
        if self.temporal:
            x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        tokens = x.reshape(len(context), -1, x.shape[-1])                    # (B, all tokens of a sample, C)
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
        """x (B T, C, h, w), c Condition -> (B T, C, h, w)"""
        B, T = c.frame.shape
        C, h, w = x.shape[1:]
        frame_position = self.time_pos_embed(sinusoid(c.frame, C))           # (B, T, C)
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(B * T, h * w, C))
        for over_space, over_time in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            y = over_space(y, c.context)                                     # (B T, n, C)
            spatial = y.view(B, T, h * w, C).transpose(1, 2)                 # (B, n, T, C)
            temporal = (spatial + frame_position[:, None]).reshape(B * h * w, T, C)
            temporal = over_time(temporal, c.context).view(spatial.shape)    # (B, n, T, C)
            y = self.time_mixer(spatial, temporal).transpose(1, 2).reshape(B * T, h * w, C)
        y = self.proj_out(y).view(B * T, h, w, C).permute(0, 3, 1, 2)        # (B T, C, h, w)
        return x + y


class Resample(nn.Module):
    """Half the size by a strided convolution, or nearest-neighbour up to a given size and a convolution."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)

    def forward(self, x, size=None):
        return self.conv(x if size is None else F.interpolate(x, size, mode='nearest'))


class Level(nn.Module):
    """The layers of one resolution, on the way down, in the middle or on the way up. A layer is a residual block and,
    where the level attends, a transformer. `widths`: pairs (channels in, channels out), one for each residual
    block."""

    def __init__(self, widths, config, heads, context_width, transformer_layers, attends, eps, down=False, up=False):
        super().__init__()
        channels, groups = widths[-1][1], config.get('norm_num_groups', 32)
        time_width = 4 * config['block_out_channels'][0]
        self.resnets = nn.ModuleList(VideoResidual(i, o, time_width, groups, eps) for i, o in widths)
        self.attentions = nn.ModuleList(VideoTransformer(channels, context_width, heads, transformer_layers, groups)
                                        for _ in range(attends))
        self.downsamplers = nn.ModuleList([Resample(channels, 2)] if down else [])
        self.upsamplers = nn.ModuleList([Resample(channels, 1)] if up else [])

    def layer(self, i, x, c):
        x = self.resnets[i](x, c)
        return self.attentions[i](x, c) if len(self.attentions) else x


class Middle(Level):
    def forward(self, x, c):
        x = self.resnets[0](x, c)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            x = resnet(attention(x, c), c)
        return x


class Decoder(nn.Module):
    """The way up of the U-Net: layers that take one skip connection each, then norm, SiLU, convolution."""

    def __init__(self, config):
        super().__init__()
        self.checkpointing = False                      # True: save memory, recompute activations in the backward pass
        channels = config['block_out_channels']
        levels, layers = len(channels), config['layers_per_block'] + 1
        skips = [channels[0]] + [c for c in channels for _ in range(layers)]     # what the encoder leaves: conv_in, and
        del skips[-1]                                   # each level's layers and downsampler (the last level has none)
        self.up_blocks, width = nn.ModuleList(), channels[-1]
        for i, kind in enumerate(config['up_block_types']):
            level = levels - 1 - i
            widths = []
            for _ in range(layers):
                widths.append((width + skips.pop(), channels[level]))
                width = channels[level]
            attends = layers if kind.startswith('CrossAttn') else 0
            self.up_blocks.append(Level(widths, config, *per_level(config, level), attends, eps=1e-6, up=level > 0))
        self.conv_norm_out = nn.GroupNorm(config.get('norm_num_groups', 32), channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config['out_channels'], 3, padding=1)

    def layers(self):
        """Yields (level, number of the layer in it, whether an upsampler follows it), in the order of computation."""
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                yield block, i, i == len(block.resnets) - 1 and len(block.upsamplers) > 0

    def layer(self, step, x, skip, next_size, c):
        """One layer: x (B T, C, h, w) and its skip -> (B T, C', h', w'), at next_size (h', w') if an upsampler
        follows."""
        block, i, upsample = step
        x = self.run(block.layer, i, torch.cat([x, skip], 1), c)
        return block.upsamplers[0](x, next_size) if upsample else x

    def output(self, x):
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def run(self, function, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


def per_level(config, level):
    """(heads, width of a context token, transformer layers) of a level; the hub gives one number, or one for each
    level."""
    keys = 'num_attention_heads', 'cross_attention_dim', 'transformer_layers_per_block'
    return [value[level] if isinstance(value, (list, tuple)) else value for value in (config[key] for key in keys)]


class UNet(Decoder):
    """SVD's spatio-temporal U-Net: a decoder and, before it, the way down."""

    def __init__(self, config):
        super().__init__(config)
        self.config = dict(config)
        channels, layers = config['block_out_channels'], config['layers_per_block']
        self.conv_in = nn.Conv2d(config['in_channels'], channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], 4 * channels[0], 4 * channels[0])
        ids_width = config['projection_class_embeddings_input_dim']
        self.add_embedding = Embedding(ids_width, 4 * channels[0], 4 * channels[0])
        self.down_blocks, width = nn.ModuleList(), channels[0]
        for level, kind in enumerate(config['down_block_types']):
            attends = kind.startswith('CrossAttn')
            widths = [(width, channels[level])] + [(channels[level], channels[level])] * (layers - 1)
            width = channels[level]
            self.down_blocks.append(Level(widths, config, *per_level(config, level), layers if attends else 0,
                                          eps=1e-6 if attends else 1e-5,     # no slip: the published weights have both
                                          down=level < len(channels) - 1))
        self.mid_block = Middle([(width, width)] * 2, config, *per_level(config, -1), 1, eps=1e-5)

    @classmethod
    def from_config(cls, config):
        """`config`: the contents of the hub's unet/config.json. Raises ValueError for a config of another kind."""
        try:
            return cls(config)
        except KeyError as error:
            raise ValueError(f'U-Net config lacks the key {error}: is it the config.json of an SVD unet?') from None

    @classmethod
    def from_pretrained(cls, folder_or_repo, subfolder='unet', dtype=torch.float32, device='cpu'):
        return load_pretrained(cls, folder_or_repo, subfolder, dtype, device)

    def condition(self, timestep, image_embeds, added_time_ids, frame_index):
        """timestep (B,), image_embeds (B, L, D), added_time_ids (B, 3), frame_index (B, T) -> Condition"""
        each = sinusoid(added_time_ids, self.config['addition_time_embed_dim'])                   # (B, 3, width)
        time = (self.time_embedding(sinusoid(timestep, self.config['block_out_channels'][0]))
                + self.add_embedding(each.flatten(1)))                                            # (B, E)
        return Condition(time, image_embeds.to(time.dtype), frame_index)

    def encode(self, sample, c):
        """sample (B T, C, h, w) -> features after the middle (B T, C', h', w') and the list of skip connections"""
        # Channels last: then a row of tokens, an image and a clip are views of each other, and nothing is copied
        # between.
        x = self.conv_in(sample.to(self.conv_in.weight.dtype, memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self.run(block.layer, i, x, c)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        return self.run(self.mid_block, x, c), skips

    def forward(self, sample, timestep, image_embeds, added_time_ids, frame_index=None):
        """One evaluation of the U-Net.

        sample (B, T, C_in, h, w): noisy latents, scaled by c_in, and condition latents; timestep (B,) c_noise;
        image_embeds (B, L, D); added_time_ids (B, 3): fps id, motion bucket, noise augmentation; frame_index (B, T),
        0, 1, 2... when None. Returns (B, T, C_out, h, w)."""
        B, T = sample.shape[:2]
        if frame_index is None:
            frame_index = torch.arange(T, device=sample.device).expand(B, T)
        c = self.condition(timestep, image_embeds, added_time_ids, frame_index)
        x, skips = self.encode(sample.flatten(0, 1), c)
        for step in self.layers():
            x = self.layer(step, x, skips.pop(), skips[-1].shape[-2:] if skips else None, c)
        return self.output(x).unflatten(0, (B, T))


# ------------------------------------------------------------------------------------------------ CLIP's image encoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPLayer(nn.Module):
    """One pre-norm transformer layer of the vision tower."""

    def __init__(self, width, hidden, heads, eps):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict({f'{name}_proj': nn.Linear(width, width) for name in ('q', 'k', 'v', 'out')})
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(width, hidden), 'fc2': nn.Linear(hidden, width)})

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ('q_proj', 'k_proj', 'v_proj'))               # (B, heads, tokens, width / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn['out_proj'](y)
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.layer_norm2(x))))


class CLIPImageEncoder(nn.Module):
    """CLIP's vision transformer (ViT-H/14 in SVD): one embedding for an image, from its class token."""
    keys_to_ignore = ('vision_model.embeddings.position_ids',)          # 0, 1, 2...; older files have it

    def __init__(self, config):
        super().__init__()
        if config['hidden_act'] != 'gelu':
            raise ValueError(f"CLIP config has hidden_act {config['hidden_act']!r}; SVD's encoder has 'gelu'")
        width, patch, eps = config['hidden_size'], config['patch_size'], config['layer_norm_eps']
        self.image_size, tokens = config['image_size'], (config['image_size'] // patch) ** 2 + 1
        embeddings = nn.ModuleDict({
            'patch_embedding': nn.Conv2d(config['num_channels'], width, patch, patch, bias=False),
            'position_embedding': nn.Embedding(tokens, width)})
        embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.vision_model = nn.ModuleDict({
            'embeddings': embeddings,
            'pre_layrnorm': nn.LayerNorm(width, eps),                   # the published files really spell it so
            'encoder': nn.ModuleDict({'layers': nn.ModuleList(
                CLIPLayer(width, config['intermediate_size'], config['num_attention_heads'], eps)
                for _ in range(config['num_hidden_layers']))}),
            'post_layernorm': nn.LayerNorm(width, eps)})
        self.visual_projection = nn.Linear(width, config['projection_dim'], bias=False)

    @classmethod
    def from_config(cls, config):
        """`config`: the contents of the hub's image_encoder/config.json. Raises ValueError for a config of another
        kind."""
        try:
            return cls(config)
        except KeyError as error:
            raise ValueError(f"CLIP config lacks the key {error}: is it the config.json of SVD's encoder?") from None

    @classmethod
    def from_pretrained(cls, folder_or_repo, subfolder='image_encoder', dtype=torch.float32, device='cpu'):
        return load_pretrained(cls, folder_or_repo, subfolder, dtype, device)

    def forward(self, pixels):
        """pixels (B, 3, 224, 224) from clip_preprocess -> (B, D)"""
        model = self.vision_model
        patches = model['embeddings']['patch_embedding'](pixels).flatten(2).transpose(1, 2)          # (B, 256, width)
        first = model['embeddings'].class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + model['embeddings']['position_embedding'].weight        # (B, 257, width)
        x = model['pre_layrnorm'](x)
        for layer in model['encoder']['layers']:
            x = layer(x)
        return self.visual_projection(model['post_layernorm'](x[:, 0]))                              # (B, D)


def clip_preprocess(images, size=224):
    """SVD's preparation of images for CLIP: blur against aliasing, bicubic resize, normalisation.

    images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size) with CLIP's mean and standard deviation. The aspect ratio is
    not kept: SVD was trained so. The blur is a Gaussian of sigma (H / size - 1) / 2 pixels, cut off at two sigmas."""
    for axis in (-2, -1):
        sigma = max((images.shape[axis] / size - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2                             # the kernel has 2 reach + 1 taps
        offset = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-offset ** 2 / (2 * sigma ** 2))
        kernel = (kernel / kernel.sum()).view((-1, 1) if axis == -2 else (1, -1)).expand(images.shape[1], 1, -1, -1)
        padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        images = F.conv2d(F.pad(images, padding, mode='reflect'), kernel, groups=images.shape[1])
    images = F.interpolate(images, (size, size), mode='bicubic', align_corners=True)
    mean, std = (torch.tensor(value, dtype=images.dtype, device=images.device)[:, None, None]
                 for value in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std


# -------------------------------------------------------------------------------------------------------- the 4D model

def precondition(sigma):
    """EDM's scalings for v-prediction with sigma_data = 1, as SVD was trained: D_x = c_skip x + c_out F(c_in x;
    c_noise).

    sigma: tensor of noise levels > 0 -> c_skip, c_out, c_in, c_noise, of its shape."""
    total = sigma ** 2 + 1
    return 1 / total, -sigma / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def sine_positions(h, w, width, device):
    """Fixed 2-D positions of latent cells, (h w, width): half the channels tell the row, half the column. An image
    side is 100 units long at every resolution."""
    row, column = (sinusoid((torch.arange(n, device=device) + 0.5) * (100 / n), width // 2) for n in (h, w))
    return torch.cat([row[:, None].expand(h, w, -1), column[None].expand(h, w, -1)], -1).flatten(0, 1)


class CrossViewAttention(nn.Module):
    """Lets every cell of another view look at all cells of the reference view, in the same frame."""

    def __init__(self, channels, heads, head_dim, norm=True):
        super().__init__()
        self.norm_view = nn.LayerNorm(channels) if norm else None
        self.norm_reference = nn.LayerNorm(channels) if norm else None
        self.attention = Attention(channels, channels, heads, heads * head_dim)
        nn.init.zeros_(self.attention.to_out[0].weight)         # it adds nothing at first: a fresh model is exactly SVD
        nn.init.zeros_(self.attention.to_out[0].bias)

    def forward(self, x, reference):
        """x (M F, C, h, w): M other views, F frames of all samples; reference (F, C, h, w) -> (M F, C, h, w)"""
        C, h, w = x.shape[1:]
        views = len(x) // len(reference)
        view, ref = (y.permute(0, 2, 3, 1).reshape(len(y), h * w, C) for y in (x, reference))      # (frames, n, C)
        position = 0
        if self.norm_view is not None:
            view, ref = self.norm_view(view), self.norm_reference(ref)
            position = sine_positions(h, w, C, x.device).to(view.dtype)
        query, key, value = view + position, (ref + position).repeat(views, 1, 1), ref.repeat(views, 1, 1)
        y = self.attention(query, key, value)                                                      # (M F, n, C)
        return x + y.view(len(x), h, w, C).permute(0, 3, 1, 2)


def fresh(unet):
    """Prepares a U-Net for training from scratch: the last layer of each residual branch starts at zero, so that the
    network starts as the identity on its features and its output at zero."""
    for module in unet.modules():
        last = {Residual: 'conv2', VideoTransformer: 'proj_out', UNet: 'conv_out'}.get(type(module))
        if last:
            nn.init.zeros_(getattr(module, last).weight)
            nn.init.zeros_(getattr(module, last).bias)
        if isinstance(module, TimeConv):                # a clip starts as frames one by one: training begins on those
            nn.init.zeros_(module.weight[:, :, 0])
            nn.init.zeros_(module.weight[:, :, 2])
    return unet


class Model4D(nn.Module):
    """The paper's model: one encoder and middle for all streams, two decoders, cross-view attention in the second.

    mv_attention: 'points' (the method: pointmaps of other views attend to the reference's pointmap), 'none' (w/o MV
    attention), or, with rgb_only, 'rgb' (SVD w/ MV attention: RGB of other views attends to the reference's RGB, in
    the only decoder). rgb_only: no pointmaps and no second decoder, plain SVD on every view; 'points' then means
    'none'. unet: a U-Net with weights, from which decoder B is copied; None: a fresh one, for training from
    scratch."""

    def __init__(self, preset, mv_attention='points', rgb_only=False, unet=None):
        super().__init__()
        if mv_attention not in ('points', 'none', 'rgb'):
            raise ValueError(f"mv_attention is 'points', 'none' or 'rgb', not {mv_attention!r}")
        if mv_attention == 'rgb' and not rgb_only:
            raise ValueError("mv_attention 'rgb' is the ablation without pointmaps: it needs rgb_only")
        self.preset, self.rgb_only = preset, rgb_only
        self.mv_attention = 'none' if rgb_only and mv_attention == 'points' else mv_attention
        self.unet = fresh(UNet.from_config(preset.unet)) if unet is None else unet
        weight = self.unet.conv_in.weight
        self.decoder_b = None
        self.cross_view = nn.ModuleList()
        if self.mv_attention != 'none':
            for block, _, _ in self.unet.layers():
                channels = block.resnets[-1].spatial_res_block.conv2.out_channels
                self.cross_view.append(CrossViewAttention(channels, preset.view_heads, preset.view_head_dim,
                                                          preset.view_norm))
            self.cross_view.to(weight.device, weight.dtype)
        if preset.clip is None:
            token = torch.randn(1, 1, preset.unet['cross_attention_dim'])
            self.token = nn.Parameter(token.to(weight.device, weight.dtype))
        self.copy_decoder()
        # One context token: queries and keys of the cross-attention to it play no part (see TransformerBlock), so
        # they are not trained either; an optimiser and DDP then leave them alone.
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                for part in (module.norm2, module.attn2.to_q, module.attn2.to_k):
                    part.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, preset, folder_or_repo=SVD_REPO, dtype=torch.float32, device='cpu', **switches):
        """From SVD's published weights: `folder_or_repo` has a subfolder unet. `switches`: mv_attention, rgb_only."""
        return cls(preset, unet=UNet.from_pretrained(folder_or_repo, 'unet', dtype, device), **switches)

    def copy_decoder(self):
        """Makes decoder B a copy of decoder A as it is now, sharing no storage: call it after loading weights into
        `unet`."""
        if not self.rgb_only:
            with torch.device('meta'):
                self.decoder_b = Decoder(self.unet.config)
            self.decoder_b.checkpointing = self.unet.checkpointing
            for name in ('up_blocks', 'conv_norm_out', 'conv_out'):
                setattr(self.decoder_b, name, copy.deepcopy(getattr(self.unet, name)))

    @property
    def checkpointing(self):
        return self.unet.checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        self.unet.checkpointing = on
        if self.decoder_b is not None:
            self.decoder_b.checkpointing = on

    def streams(self, views):
        """Which (view, stream) decoder A writes and which decoder B, in the order of computation. A's first is the
        one that the other views attend to."""
        if self.rgb_only:
            return [(v, 0) for v in range(views)], []
        return [(0, 1)] + [(v, 0) for v in range(views)], [(v, 1) for v in range(1, views)]

    def forward(self, noisy, sigma, cond, image_embeds=None, frame_index=None):
        """The clean-latent estimate D_x.

        noisy (B, V, S, T, C, h, w): clean latents + sigma * noise; sigma (B,); cond (B, V, S, C, h, w): latents of
        the observed frame; image_embeds (B, V, D): CLIP embedding of each view's observed frame, None for presets
        without CLIP; frame_index (B, T), 0..T-1 when None. S is 2, or 1 with rgb_only. Returns (B, V, S, T, C, h,
        w)."""
        B, V, S, T = noisy.shape[:4]
        if S != 2 - self.rgb_only:
            raise ValueError(f'noisy has {S} streams a view, this model has {2 - self.rgb_only}')
        if (image_embeds is None) != (self.preset.clip is None):
            raise ValueError('image_embeds (B, V, D) are needed by presets with a CLIP encoder, and only by them')
        decoder_a, decoder_b = self.streams(V)
        streams = decoder_a + decoder_b
        c_skip, c_out, c_in, c_noise = (c[:, None, None, None, None, None, None] for c in precondition(sigma.float()))

        # All streams through encoder and middle in one pass, stream by stream: rows are (stream, sample, frame).
        cond = cond[:, :, :, None].expand(-1, -1, -1, T, -1, -1, -1)
        sample = torch.cat([(c_in * noisy).to(cond.dtype), cond], 4)                     # (B, V, S, T, 2C, h, w)
        sample = torch.cat([sample[:, v, s] for v, s in streams])                        # (N, T, 2C, h, w)
        if image_embeds is None:
            embeds = self.token.expand(len(sample), -1, -1)                              # (N, 1, D)
        else:
            embeds = torch.cat([image_embeds[:, v, None] for v, s in streams])           # (N, 1, D), of the own view
        if frame_index is None:
            frame_index = torch.arange(T, device=noisy.device).expand(B, T)
        ids = torch.tensor([FPS_ID, MOTION_BUCKET, NOISE_AUGMENTATION], device=noisy.device).expand(len(sample), 3)
        c = self.unet.condition(c_noise.flatten().repeat(len(streams)), embeds, ids,
                                frame_index.repeat(len(streams), 1))
        x, skips = self.unet.encode(sample.flatten(0, 1), c)                             # (N T, C', h', w')

        # The decoders, layer by layer side by side: B's layer i reads what A's layer i has just written.
        first = len(decoder_a) * B                                                       # rows of decoder A
        c_a, c_b = c.rows(slice(0, first)), c.rows(slice(first, None))
        a, b = x[:first * T], x[first * T:]
        steps_b = self.decoder_b.layers() if decoder_b else None
        for i, step in enumerate(self.unet.layers()):
            skip = skips.pop()
            size = skips[-1].shape[-2:] if skips else None
            a = self.unet.layer(step, a, skip[:first * T], size, c_a)
            if decoder_b:
                b = self.decoder_b.layer(next(steps_b), b, skip[first * T:], size, c_b)
            if self.mv_attention == 'points' and decoder_b:
                b = self.unet.run(self.cross_view[i], b, a[:B * T])
            if self.mv_attention == 'rgb' and V > 1:
                a = torch.cat([a[:B * T], self.unet.run(self.cross_view[i], a[B * T:], a[:B * T])])
        output = self.unet.output(a)
        if decoder_b:
            output = torch.cat([output, self.decoder_b.output(b)])                       # (N T, C, h, w)

        # Back to views and streams: row `order[v S + s]` of the streams is stream s of view v.
        order = [streams.index((v, s)) for v in range(V) for s in range(S)]
        output = output.unflatten(0, (len(streams), B, T))[order]                        # (V S, B, T, C, h, w)
        F_x = output.transpose(0, 1).unflatten(1, (V, S)).to(noisy.dtype)                # (B, V, S, T, C, h, w)
        return c_skip.to(noisy.dtype) * noisy + c_out.to(noisy.dtype) * F_x


# ----------------------------------------------------------------------------------- the authors' released checkpoints

# Classes whose pickled instances lie in a training checkpoint beside the weights. They are read as empty shells:
# nothing of theirs is imported or run.
INERT_CLASSES = ['omegaconf.dictconfig.DictConfig', 'omegaconf.listconfig.ListConfig', 'omegaconf.nodes.AnyNode',
                 'omegaconf.base.ContainerMetadata', 'omegaconf.base.Metadata', 'typing.Any',
                 'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint',
                 'lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint']


class Inert:
    """Stands for an instance of a class in INERT_CLASSES."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """The state dict of a PyTorch or PyTorch-Lightning checkpoint, memory-mapped, without running what is pickled in
    it. Raises a one-line ValueError when the file is damaged or asks for a class that is not listed above."""
    known = [(type(name.rpartition('.')[2], (Inert,), {}), name) for name in INERT_CLASSES]
    try:
        with torch.serialization.safe_globals(known + [collections.defaultdict, dict, list, int]):
            file = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f'{path} does not exist') from None
    except pickle.UnpicklingError:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(INERT_CLASSES)
        raise ValueError(f'{path} holds pickled {", ".join(sorted(foreign)) or "objects"}, not loaded for safety: save '
                         f'only its state_dict, on a machine where you trust the file') from None
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(f'{path} is damaged or no PyTorch checkpoint ({str(error).splitlines()[0]})') from None
    state = file.get('state_dict', file) if isinstance(file, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f'{path} has no state_dict of tensors')
    return state


RESIDUAL_NAMES = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
                  'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection'}
BRANCH_NAMES = {'spatial_res_block': '', 'temporal_res_block': 'time_stack.', 'time_mixer': 'time_mixer.'}
OUTER_NAMES = {'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2',
               'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
               'add_embedding.linear_1': 'label_emb.0.0', 'add_embedding.linear_2': 'label_emb.0.2',
               'mid_block.resnets.0': 'middle_block.0', 'mid_block.attentions.0': 'middle_block.1',
               'mid_block.resnets.1': 'middle_block.2'}


def sgm_names(unet):
    """{our key: its name in sgm, the code base that SVD was trained with}. sgm numbers the U-Net's layers in one row:
    input_blocks.k, middle_block.k and output_blocks.k, each with residual block, transformer and resampler as .0, .1,
    .2."""
    outer, per_level = dict(OUTER_NAMES), unet.config['layers_per_block']
    for level, block in enumerate(unet.down_blocks):
        first = 1 + level * (per_level + 1)
        for i in range(per_level):
            outer[f'down_blocks.{level}.resnets.{i}'] = f'input_blocks.{first + i}.0'
            outer[f'down_blocks.{level}.attentions.{i}'] = f'input_blocks.{first + i}.1'
        outer[f'down_blocks.{level}.downsamplers.0.conv'] = f'input_blocks.{first + per_level}.0.op'
    for level, block in enumerate(unet.up_blocks):
        first = level * (per_level + 1)
        for i in range(per_level + 1):
            outer[f'up_blocks.{level}.resnets.{i}'] = f'output_blocks.{first + i}.0'
            outer[f'up_blocks.{level}.attentions.{i}'] = f'output_blocks.{first + i}.1'
        last = 2 if len(block.attentions) else 1
        outer[f'up_blocks.{level}.upsamplers.0.conv'] = f'output_blocks.{first + per_level}.{last}.conv'

    names = {}
    for key in unet.state_dict():
        ours = next(name for name in outer if key.startswith(name + '.'))
        rest = key[len(ours) + 1:]
        if '.resnets.' in ours:
            branch, piece, *kind = rest.split('.')                  # time_mixer.mix_factor has no third part
            rest = BRANCH_NAMES[branch] + '.'.join([RESIDUAL_NAMES.get(piece, piece), *kind])
        elif '.attentions.' in ours:
            rest = rest.replace('temporal_transformer_blocks.', 'time_stack.')
            rest = rest.replace('time_pos_embed.linear_1', 'time_pos_embed.0').replace('time_pos_embed.linear_2',
                                                                                       'time_pos_embed.2')
        names[key] = f'{outer[ours]}.{rest}'
    return names


def load_released(path, preset=PRESETS['svd'], dtype=torch.float32, device='cpu', prefix='model.diffusion_model.'):
    """A Model4D with the weights of a checkpoint in the layout of the authors' release (Zeyi/4dgen-ckpts,
    4dgen.ckpt).

    The U-Net's keys are known exactly. Of the rest we know only what its code says, and assume this much: a second
    decoder, if stored, repeats output_blocks (and out) under another name; the cross-view attention is one to_q,
    to_k, to_v, to_out.0 for each decoder layer, in the order of their names, with no norm in front. A key that fits
    neither is an error.

    What differs from the authors' code when these weights run here: their two decoders were one (a shallow copy), so
    A and B start equal; each stream sees its own view's image embedding, where theirs were mixed up between views;
    guidance is 1, as it was in effect there. Raises a one-line ValueError that names the key."""
    state = {key[len(prefix):]: value for key, value in read_checkpoint(path).items() if key.startswith(prefix)}
    with torch.device('meta'):
        unet = UNet.from_config(preset.unet)
    layers, names = len(list(unet.layers())), sgm_names(unet)
    refuse_missing(path, [prefix + name for name in names.values() if name not in state])
    state = {name: value.to(device, dtype) for name, value in state.items()}

    # Sort what is not the U-Net's: by the part of its name after the first dot, or by being a projection of an
    # attention.
    decoder_a = {name.partition('.')[2]: key for key, name in names.items() if re.match(r'(output_blocks|out)\.', name)}
    decoder_b, attentions, unknown = {}, {}, []
    for name in sorted(set(state) - set(names.values()), key=natural):
        projection = re.fullmatch(r'(.+)\.(to_[qkv]\.weight|to_out\.0\.weight|to_out\.0\.bias)', name)
        if name.partition('.')[2] in decoder_a:
            decoder_b['decoder_b.' + decoder_a[name.partition('.')[2]]] = state[name]
        elif projection:
            attentions.setdefault(projection[1], {})[projection[2]] = state[name]
        else:
            unknown.append(name)
    if len(attentions) not in (0, layers) or any(len(parts) != 5 for parts in attentions.values()):
        unknown += [f'{module}.{part}' for module, parts in attentions.items() for part in parts]
    if unknown:
        raise ValueError(f'{path}: {len(unknown)} keys fit no part of the model: {", ".join(unknown[:20])}')

    fill(unet, {key: state[name] for key, name in names.items()}, path)
    model = Model4D(dataclasses.replace(preset, view_norm=False), unet=unet)
    cross_view = {f'cross_view.{i}.attention.{part}': value
                  for i, parts in enumerate(attentions.values()) for part, value in parts.items()}
    fill(model, {**model.state_dict(), **decoder_b, **cross_view}, path)
    return model.eval()


def natural(name):
    """Sorting key that puts block 2 before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def count(module):
    """Number of parameters of a module (0 for None)."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def main():
    parser = argparse.ArgumentParser(description='Prints the parameter counts of a preset (built without memory).')
    parser.add_argument('--preset', choices=PRESETS, default='tiny')
    preset = PRESETS[parser.parse_args().preset]
    with torch.device('meta'):
        model = Model4D(preset)
    unet = model.unet
    decoder = sum(count(part) for part in (unet.up_blocks, unet.conv_norm_out, unet.conv_out))
    encoder = sum(count(part) for part in (unet.conv_in, unet.time_embedding, unet.add_embedding, unet.down_blocks))
    for name, number in [('encoder', encoder), ('middle', count(unet.mid_block)), ('decoder A', decoder),
                         ('decoder B', count(model.decoder_b)), ('cross-view attention', count(model.cross_view)),
                         ('all', count(model))]:
        print(f'{name:22s}{number:15,d}')


if __name__ == '__main__':
    main()
