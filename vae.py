"""Stable Video Diffusion's VAE: a 2-D encoder that squeezes an image 8 x 8 to 1, and a decoder that also looks along time.

References: Stable Video Diffusion (arXiv 2311.15127); latent diffusion (arXiv 2112.10752).

Letters: N images (= B clips x T frames), C channels, H W pixels, h w latent cells (H / 8, W / 8 with four levels).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


# ---------------------------------------------------------------------------------------------------------------------
# Networks. Attribute names are the hub's key names, so that its files load without renaming.

class TemporalConv(nn.Conv3d):
    """Conv3d of kernel (3, 1, 1), run as a 2-D convolution over (time, cells): the same sums, and far faster on a CPU."""

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
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=num_frames)  # the norms below take statistics over a whole clip
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
    """SVD's VAE, at any width. `config` has the keys of the hub's config.json, and 'norm_num_groups' (32 where absent).

    `shift` and `scale` (C, 1, 1) take the encoder's mean to the latents that the 4D model works on, (mean - shift) * scale:
    0 and the config's scaling_factor as in SVD, or measured from data so that latents have zero mean and unit variance.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
        groups = config.get("norm_num_groups", 32)
        for width in widths:
            if width % groups:
                raise ValueError(f"VAE config: block_out_channels {widths} must be multiples of norm_num_groups {groups}")
        self.latent_channels = C = config["latent_channels"]
        self.scale_factor = config.get("scaling_factor", 0.18215)
        self.cell = 2 ** (len(widths) - 1)                            # pixels along the side of a latent cell
        self.encoder = Encoder(config.get("in_channels", 3), C, widths, layers, groups)
        self.decoder = Decoder(config.get("out_channels", 3), C, widths, layers, groups)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        # not among the hub's keys, so kept out of the state dict
        self.register_buffer("shift", torch.zeros(C, 1, 1), persistent=False)
        self.register_buffer("scale", torch.full((C, 1, 1), float(self.scale_factor)), persistent=False)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    def encode(self, images):
        """images (N, 3, H, W) in [-1, 1] -> mean, log variance (N, C, h, w) of the latents, before shift and scale."""
        H, W = images.shape[-2:]
        if H % self.cell or W % self.cell:
            raise ValueError(f"VAE: image height and width {H} x {W} must be multiples of {self.cell}; resize the images")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents, num_frames):
        """latents (N, C, h, w), N = clips x num_frames, without shift and scale -> images (N, 3, H, W) near [-1, 1]."""
        if len(latents) % num_frames:
            raise ValueError(f"VAE: {len(latents)} latents are not a whole number of clips of {num_frames} frames")
        return self.decoder(latents, num_frames)
