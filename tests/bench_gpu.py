"""One GPU: precision, a rollout, training steps and their memory at the paper's size; then a whole recipe in minutes.

    python tests/bench_gpu.py --out OUT                          # under four minutes on an H100
    python tests/bench_gpu.py --out OUT --recipe 7 --task 1      # then: render, train --minutes 7, sample, track, act
    python tests/bench_gpu.py --out OUT --rehearse --recipe 0.2  # the same path on a CPU, with tiny numbers

Weights are random (nothing is downloaded): each layer keeps the scale of its input, so that rounding errors are those
of a trained network in kind. Writes OUT/bench.json after every part, prints a table last; --recipe brings back the log,
the sheet and the weights in int8, in files of at most 15 MiB. Goals on an H200: 2 views x 10 frames in 3 s at 25
steps and 1 s at 8 (published 30 s, RTX 4090); training within 48 GB, and 24 with --low_memory (published 47); MFU 35 %.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
import train  # noqa: E402
from model import PRESETS, CLIPImageEncoder, Model4D, unet_config  # noqa: E402
from vae import build as build_code  # noqa: E402

FRAMES, VIEWS = 10, 2
RESULTS = {}


@torch.no_grad()
def randomise(module):
    """Random weights, none zero, that keep the scale of what goes through them."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            p.fill_(1)
        else:
            p.normal_(0, 0.02)
    return module


def make_run(preset, device, dtype, frozen_dtype):
    """A run as load_run gives it, made in place on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        net = randomise(Model4D(preset)).to(dtype)
        vaes = {kind: randomise(build_code(preset.vae)).to(frozen_dtype).eval() for kind in ("rgb", "pointmap")}
        clip = randomise(CLIPImageEncoder.from_config(preset.clip)).to(frozen_dtype).eval() if preset.clip else None
    run = sample.as_run(net, vaes, clip, dict(task=1), Path("."))
    for code in vaes.values():
        for name, buffer in code.named_buffers():
            if name == "basis":
                buffer.normal_(0, buffer[0].numel() ** -0.5)
    return run


def make_item(preset, batch, device):
    """A loaded batch as train.batches yields it."""
    V, T, H, W = VIEWS, FRAMES, preset.height, preset.width
    cell = preset.vae.get("patch_size") or 2 ** (len(preset.vae["block_out_channels"]) - 1)
    picture = lambda *shape: torch.rand(batch, V, *shape, H, W, device=device) * 2 - 1
    mask = lambda *shape: torch.ones(batch, V, *shape, H, W, dtype=torch.bool, device=device)
    noise = torch.randn(batch, V, 2, T, preset.unet["in_channels"] // 2, H // cell, W // cell, device=device)
    return dict(rgb=picture(T + 1, 3), points=picture(T + 1, 3), own_points=picture(3), gripper=mask(T + 1),
                moving=mask(T), valid=mask(T + 1), frame_index=torch.arange(T, device=device).expand(batch, T),
                noise=noise, sigma=torch.full((batch,), 3.0, device=device),
                keep=torch.ones(batch, 2, dtype=torch.bool, device=device))


def seconds(function, device, repeats=3):
    """Median time, after one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def peak_memory(device):
    """Peak GPU memory since the last call, GiB."""
    if device.type != "cuda":
        return None
    value = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(value, 2)


def model_inputs(run, item):
    with torch.no_grad():
        x_0 = sample.encode_targets(run, item["rgb"][:, :, 1:], item["points"][:, :, 1:])
        cond, embeds = sample.encode_conditions(run, item["rgb"][:, :, 0], item["own_points"])
    return x_0 + 3 * item["noise"], item["sigma"], cond, embeds, item["frame_index"]


# ---------------------------------------------------------------------------------------------------------- the parts

def matrix_product(args):
    n = 512 if args.rehearse else 8192
    a, b = torch.randn(2, n, n, device=args.device, dtype=torch.bfloat16)
    return dict(tflops=2 * n ** 3 / seconds(lambda: a @ b, args.device, 10) / 1e12)


@torch.no_grad()
def precision(args):
    """Root mean square difference of D_x from float32, relative."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False          # float32 is the yardstick
    run = make_run(args.preset, args.device, torch.float32, torch.float32)
    inputs = model_inputs(run, make_item(args.preset, 1, args.device))
    full = run.model(*inputs)
    with torch.autocast(args.device.type, torch.bfloat16):
        mixed = run.model(*inputs)
    half = run.model.bfloat16()(*[x.bfloat16() if i in (2, 3) and x is not None else x for i, x in enumerate(inputs)])
    off = lambda x: ((x.float() - full).square().mean().sqrt() / full.square().mean().sqrt()).item()
    return dict(bf16_weights=off(half), autocast=off(mixed))


@torch.no_grad()
def rollout(args):
    """From observed pictures to decoded frames, by parts, in bfloat16."""
    run = make_run(args.preset, args.device, torch.bfloat16, torch.bfloat16)
    item, out = make_item(args.preset, 1, args.device), {}
    cond, embeds = sample.encode_conditions(run, item["rgb"][:, :, 0], item["own_points"])
    parts = dict(encode=lambda: sample.encode_conditions(run, item["rgb"][:, :, 0], item["own_points"]),
                 decode=lambda: sample.decode(run, item["noise"]))
    for steps in (2, 1) if args.rehearse else (25, 8, 5):
        parts[f"sample_{steps}"] = lambda steps=steps: sample.sample_latents(run, cond, embeds, FRAMES, steps)
    peak_memory(args.device)
    for name, function in parts.items():
        out[name] = seconds(function, args.device, repeats=1)
    for name in [name for name in out if name.startswith("sample")]:
        out[name.replace("sample", "rollout")] = out["encode"] + out[name] + out["decode"]
    return dict(out, memory=peak_memory(args.device))


def training(args, low_memory=False):
    """A step as train.py takes it, the frozen nets in place, gradients accumulated; MFU against the matrix product."""
    given = dict(preset=args.preset.name, out=str(args.out / "nothing"), **dict(low_memory=True) if low_memory else {})
    options = train.resolve(given)[0]
    run = make_run(args.preset, args.device, torch.bfloat16 if low_memory else torch.float32, torch.bfloat16)
    run.model.train().checkpointing = bool(args.preset.clip)
    run.autocast = lambda: torch.autocast(args.device.type, torch.bfloat16, enabled=not low_memory, cache_enabled=False)
    run.args, run.world, run.optimizers = options, 1, train.optimizers_of(run.model, options)
    loader = itertools.repeat(make_item(args.preset, options.batch, args.device))
    inputs = model_inputs(run, next(loader))
    with FlopCounterMode(display=False) as encode:
        model_inputs(run, next(loader))
    with torch.device("meta"), FlopCounterMode(display=False) as forward:
        Model4D(args.preset).requires_grad_(False)(*[None if x is None else x.float().to("meta") for x in inputs])

    def step():
        train.gradients(run.model, run, loader, 0, schedule=1.0)
        if not low_memory:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    peak_memory(args.device)
    took = seconds(step, args.device, repeats=2)
    work = encode.get_total_flops() + 3 * forward.get_total_flops()                  # without what is computed twice
    tflops = options.accumulate * work / took / 1e12
    return dict(seconds=took, clips=options.accumulate * options.batch, tflops=tflops,
                mfu=tflops / RESULTS["matrix product"]["tflops"], memory=peak_memory(args.device))


@torch.no_grad()
def compiled(args):
    run = make_run(args.preset, args.device, torch.bfloat16, torch.bfloat16)
    inputs = model_inputs(run, make_item(args.preset, 1, args.device))
    eager = seconds(lambda: run.model(*inputs), args.device)
    fast = torch.compile(run.model, backend="eager" if args.rehearse else "inductor")
    began = time.time()
    fast(*inputs)
    return dict(eager=eager, compiled=seconds(lambda: fast(*inputs), args.device), compiling=time.time() - began)


def compiled_gradients(args):
    """How far compiled gradients of `tiny`, of single frames under autocast, are from eager ones, relative, a tensor: on
    a CPU PyTorch 2.13's are wrong, most of them zero, while the output is right."""
    run, gradients = make_run(PRESETS["tiny"], args.device, torch.float32, torch.float32), []
    noisy, *others, frame_index = model_inputs(run, make_item(PRESETS["tiny"], 2, args.device))
    for net in (run.model, torch.compile(run.model, backend="eager" if args.rehearse else "inductor")):
        with torch.autocast(args.device.type, torch.bfloat16):
            D_x = net(noisy[:, :, :, :1], *others, frame_index[:, :1])
        D_x.float().square().mean().backward()
        gradients.append([p.grad for p in run.model.parameters() if p.grad is not None])
        run.model.zero_grad()
    off = sorted(((a - b).norm() / a.norm().clamp(min=1e-9)).item() for a, b in zip(*gradients, strict=True))
    return dict(median=off[len(off) // 2], worst=off[-1])


def recipe(args):
    """small from nothing: episodes, training, a sampled clip, its track, the scores, the closed loop."""
    folder = args.out / f"run_{args.task}"
    source, python = args.out.parent / f"bench_data_{args.task}", [sys.executable]
    few = args.rehearse
    commands = dict(
        render=["data.py", "--task", args.task, "--out", source, "--every", 5, "--episodes", 4 if few else 800],
        train=["train.py", "--task", args.task, "--preset", "tiny" if few else "small", "--data", source, "--out",
               folder, "--minutes", args.recipe] + (["--single_batch", 2, "--batch", 1] if few else args.train_flags),
        sample=["sample.py", "--run", folder, "--data", source, "--out", args.out / "sample"],
        track=["track.py", "--prediction", args.out / "sample" / "prediction.npz", "--out", args.out / "track"],
        evaluate=["evaluate.py", "--task", args.task, "--run", folder, "--data", source, "--clips", 2 if few else 24,
                  "--out", args.out / "evaluation"],
        rollout=["evaluate.py", "--task", args.task, "--run", folder, "--rollout", 1 if few else 20,
                 "--execute", 5, "--out", args.out / "rollouts"])
    out = {}
    for name, command in commands.items():
        began = time.time()
        result = subprocess.run([str(part) for part in python + [ROOT / command[0]] + command[1:]], cwd=args.out,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (args.out / f"{name}.txt").write_text(result.stdout[-20000:])
        last = result.stdout.strip()[-300:]
        out[name] = dict(seconds=round(time.time() - began, 1), exit=result.returncode, last=last)
        if name == "train" and (folder / "model.safetensors").exists():  # before a time limit can come
            bring_back(folder, args.out / f"trained_{args.task}")
        if result.returncode and name in ("render", "train"):
            break
    for large in folder.glob("resume.pt"):
        large.unlink()
    return out


def in_int8(name, value):
    """A matrix as int8 and a scale a row, but for the first and last ones: with them so too, still points of the
    reference view fluctuate in `small` (two held-out clips) by 1.4 mm instead of .12, with these apart by .13."""
    if value.ndim < 2 or any(part in name for part in ("conv_in", "conv_out", "up_blocks.1.resnets.2")):
        return {name: value.bfloat16()}
    scale = value.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (value.ndim - 1)) / 127
    return {name: (value / scale).round().to(torch.int8), f"{name}.int8_scale": scale}


def bring_back(folder, out, most=15 * 2 ** 20):
    """The weights in int8, in files of at most 15 MiB, and what sample.py needs beside them."""
    out.mkdir(exist_ok=True)
    parts, size = [{}], 0
    for name, value in load_file(folder / "model.safetensors").items():
        pieces = in_int8(name, value.float())
        if size + value.numel() > most:
            parts.append({})
            size = 0
        parts[-1].update(pieces)
        size += sum(piece.nbytes for piece in pieces.values())
    for i, part in enumerate(parts):
        save_file(part, out / f"model{f'_{i + 1}_of_{len(parts)}' if len(parts) > 1 else ''}.safetensors")
    for name in ("model.json", "log.jsonl", *(f"vae_{kind}.{ending}" for kind in ("rgb", "pointmap")
                                              for ending in ("json", "safetensors"))):
        (out / name).write_bytes((folder / name).read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--recipe", type=float, default=0.0, metavar="MINUTES", help="then train small for so long")
    parser.add_argument("--recipe_only", action="store_true", help="nothing but the recipe")
    parser.add_argument("--task", type=int, default=1, help="of the recipe [1]")
    parser.add_argument("--train_flags", nargs="*", default=["--workers", "15"],
                        help="more flags for train.py; the last on the line")
    parser.add_argument("--rehearse", action="store_true", help="tiny numbers, on a CPU")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.device = torch.device("cpu" if args.rehearse else "cuda")
    args.preset = PRESETS["svd"]
    if args.rehearse:
        args.preset = replace(PRESETS["tiny"], vae=dict(patch_size=8, components=96),
                              unet=unet_config((32, 48), (2, 2), 1, 96, 32, 8, 0))
    began = time.time()
    parts = {} if args.recipe_only else {
        "matrix product": matrix_product, "precision": precision, "rollout": rollout, "training": training,
        "low memory": lambda args: training(args, low_memory=True),
        "compiled grads": compiled_gradients, "compiled": compiled}
    if args.recipe:
        parts["recipe"] = recipe
    RESULTS["machine"] = dict(torch=torch.__version__, cores=os.cpu_count(),
                              device="CPU" if args.rehearse else torch.cuda.get_device_name())
    for name, part in parts.items():
        if name.startswith("compiled") and time.time() - began > 150:
            RESULTS[name] = dict(left_out="the other parts took too long")
            continue
        started = time.time()
        try:
            RESULTS[name] = part(args)
        except Exception as error:                       # one part that fails must not take the others along
            RESULTS[name] = dict(error=f"{type(error).__name__}: {str(error)[:300]}")
        RESULTS[name]["part_took"] = round(time.time() - started, 1)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        (args.out / "bench.json").write_text(json.dumps(RESULTS, indent=1))
        print(name, json.dumps(RESULTS[name]), flush=True)
    print(f"\n{time.time() - began:.0f} s on {RESULTS['machine']['device']}")
    for name, row in RESULTS.items():
        for key, value in row.items():
            if isinstance(value, float) and key != "part_took":
                print(f"{name:16s} {key:14s} {value:12.4g}")


if __name__ == "__main__":
    main()
