"""The full-size 4D model on one GPU: precision, time of a rollout, time of a training step, peak memory of both.

    python tests/bench_gpu.py [--preset svd] [--views 2] [--steps 25 8] [--compile] [--skip_training]
    python tests/bench_gpu.py --preset tiny --device cpu            # does the script itself work?

Weights are random (nothing is downloaded): each layer keeps the scale of its input, so that rounding errors are those
of a trained network in kind. Goals on an H200: a rollout of 2 views x 10 frames, from observation to decoded frames,
in 3 s at 25 steps and 1 s at 8 (published: 30 s on an RTX 4090); training within 48 GB. """
import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample as S
from model import PRESETS, CLIPImageEncoder, Model4D, count
from vae import VAE

FRAMES = 10


@torch.no_grad()
def randomise(module):
    """Random weights, none zero, that keep the scale of what goes through them."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(0, (p[0].numel()) ** -0.5)
        elif 'norm' in name and name.endswith('weight'):
            p.fill_(1)
        else:
            p.normal_(0, 0.02)
    return module


def build(preset, dtype, device):
    """The 4D model, the two VAEs and the image encoder (None without CLIP), made in place on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = randomise(Model4D(preset)).to(dtype).eval()
        model.copy_decoder()
        vaes = {kind: randomise(VAE.from_config(preset.vae)).to(dtype).eval() for kind in ('rgb', 'pointmap')}
        clip = randomise(CLIPImageEncoder.from_config(preset.clip)).to(dtype).eval() if preset.clip else None
    return model, vaes, clip


class Clock:
    """Adds up wall-clock seconds by name, waiting for the GPU at both ends."""

    def __init__(self, device):
        self.seconds, self.wait = {}, torch.cuda.synchronize if device.type == 'cuda' else lambda: None

    def __call__(self, name, function, *args):
        self.wait()
        start = time.perf_counter()
        result = function(*args)
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
        return result


def peak(device):
    """Peak GPU memory since the last call, GiB."""
    if device.type != 'cuda':
        return float('nan')
    value = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.reset_peak_memory_stats()
    return value


def latents(preset, views, device, frames=FRAMES):
    """Random inputs of the model: noisy (1, V, 2, T, C, h, w), sigma, cond, image_embeds."""
    cell = preset.vae.get('patch_size', 1) * 2 ** (len(preset.vae['block_out_channels']) - 1)
    C, h, w = preset.vae['latent_channels'], preset.height // cell, preset.width // cell
    generator = torch.Generator().manual_seed(0)
    noisy = 3 * torch.randn(1, views, 2, frames, C, h, w, generator=generator)
    cond = torch.randn(1, views, 2, C, h, w, generator=generator)
    embeds = torch.randn(1, views, preset.unet['cross_attention_dim'], generator=generator) if preset.clip else None
    return [x if x is None else x.to(device) for x in (noisy, torch.full((1,), 3.0), cond, embeds)]


@torch.no_grad()
def precision(preset, views, device):
    """Root mean square difference of D_x in bfloat16 and under autocast from float32, relative."""
    inputs = latents(preset, views, device)
    model = build(preset, torch.float32, device)[0]
    full = model(*inputs)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = model(*inputs)
    half = model.to(torch.bfloat16)(*inputs)
    for name, result in (('bfloat16 weights', half), ('autocast', mixed)):
        error = (result.float() - full).square().mean().sqrt() / full.square().mean().sqrt()
        print(f'precision   {name:18s} relative error of D_x against float32 {error:.2e}')
    print(f'precision   peak memory {peak(device):.1f} GiB (float32 weights, {count(model) / 1e9:.3f} B parameters)')


@torch.no_grad()
def rollout(preset, views, all_steps, device, compiled):
    """From observed images and pointmaps to decoded frames, in bfloat16, with its parts."""
    model, vaes, clip = build(preset, torch.bfloat16, device)
    if compiled:
        model.compile()
    rgb, points = (torch.rand(2, 1, views, 3, preset.height, preset.width, device=device) * 2 - 1).to(torch.bfloat16)
    for steps in all_steps:
        for warm in (False, True):
            clock = Clock(device)
            peak(device)
            cond, embeds = clock('encode', S.encode_conditions, model, vaes, clip, rgb, points)
            x = clock('sample', S.sample_latents, model, cond, embeds, FRAMES, steps if warm else 2)
            clock('decode', S.decode, model, vaes, x)
        parts = ', '.join(f'{name} {seconds:.3f}' for name, seconds in clock.seconds.items())
        total = sum(clock.seconds.values())
        print(f'rollout     {steps:2d} steps, {views} views x {FRAMES} frames: {total:.3f} s ({parts}; '
              f'{clock.seconds["sample"] / steps * 1e3:.1f} ms a step), peak memory {peak(device):.1f} GiB')


def training(preset, views, device, compiled):
    """Steps of one clip: float32 weights, bfloat16 autocast, activation checkpointing, AdamW."""
    model = build(preset, torch.float32, device)[0].train()
    model.checkpointing = True
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == 'cuda')
    inputs = latents(preset, views, device)
    step_model = torch.compile(model) if compiled else model
    for step in range(4):
        clock = Clock(device)
        if step == 3:
            peak(device)
        with torch.autocast(device.type, torch.bfloat16) if device.type == 'cuda' else nullcontext():
            loss = clock('forward', lambda: step_model(*inputs).square().mean())
        clock('backward', loss.backward)
        clock('clip and AdamW', lambda: (torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), optimizer.step()))
        optimizer.zero_grad(set_to_none=True)
    parts = ', '.join(f'{name} {seconds:.3f}' for name, seconds in clock.seconds.items())
    print(f'training    one clip, {views} views: {sum(clock.seconds.values()):.3f} s a step ({parts}), peak memory '
          f'{peak(device):.1f} GiB')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', choices=PRESETS, default='svd')
    parser.add_argument('--views', type=int, default=2)
    parser.add_argument('--steps', type=int, nargs='+', default=[25, 8], help='sampling steps of each rollout')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--compile', action='store_true', help='torch.compile the model')
    parser.add_argument('--skip_training', action='store_true')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('no GPU here: --preset tiny --device cpu tries the script itself')
    device, preset = torch.device(args.device), PRESETS[args.preset]
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    print(f'{name}, torch {torch.__version__}, preset {preset.name}, {preset.height} x {preset.width}')
    torch.backends.cuda.matmul.allow_tf32 = False                    # float32 is the yardstick here
    torch.backends.cudnn.allow_tf32 = False
    precision(preset, args.views, device)
    rollout(preset, args.views, args.steps, device, args.compile)
    if not args.skip_training:
        training(preset, args.views, device, args.compile)


if __name__ == '__main__':
    main()
