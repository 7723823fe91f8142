"""Train the 4D model: RGB of every view, and every view's pointmaps in the reference view's frame, ten frames ahead.

    python train.py --task 1                                  # everything: data, VAEs, model, pictures; a CPU will do
    python train.py --task 1 --data data/task_1 --preset small                         # one ordinary GPU
    python train.py --task 1 --preset svd                                              # one 48 GB GPU, SVD's weights
    torchrun --nproc_per_node 4 train.py --task 1 --preset svd --accumulate 1          # four of them
    python train.py --task 1 --dry_run                        # print what would be done, and stop

Stopped and started again with the same command, it goes on where it was. Writes into runs/task_N: model.safetensors and
model.json (the averaged weights; sample.py reads these), resume.safetensors (everything to go on), log.jsonl, loss.png,
sheet_STEP.png. Stage 1, the data and the two VAEs, runs first where its outputs are missing.

The loss (arXiv 2507.01099): for each stream the denoiser's error on clean latents, weighted by noise level,
    L = sum over frames of  L_diff(RGB of every view) + lambda * L_3D-diff(pointmaps of every view, in reference frame).

Letters   B samples, V views, S streams (0 RGB, 1 pointmap), T frames, C latent channels, h w latent cells, H W pixels
References: the method, arXiv 2507.01099; EDM, arXiv 2206.00364 (noise levels, preconditioning, loss weight);
SVD, arXiv 2311.15127.
"""
import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as D
import model as M
import sample as S
from vae import Muon, Stop

# What a preset trains with, unless a flag says otherwise.
#   steps          optimiser steps
#   single         share of the steps spent on single frames first, single_batch pairs of views each: what teaches the
#                  geometry is the number of view pairs seen, and one frame shows the same pair as ten do, at a tenth
#                  of the price
#   batch          clips a step and process, after that
#   muon_lr        learning rate of the weight matrices under Muon, 0: AdamW for everything, as in the paper. From
#                  scratch Muon learns faster (README has the measurement); lr is AdamW's, for all the rest
#   P_mean, P_std  ln(sigma) ~ N(P_mean, P_std^2). The pretrained U-Net keeps SVD's. From scratch more noise is needed:
#                  at low noise the noisy target itself tells where the other camera is, and the cross-view attention
#                  has nothing to learn
DEFAULTS = {
    "tiny": dict(steps=600, single=0.7, single_batch=32, batch=4, accumulate=1, lr=2e-3, muon_lr=0.02,
                 betas=(0.9, 0.98), weight_decay=0.01, warmup=30, ema=0.99, P_mean=1.5, P_std=1.8,
                 checkpointing=False, eval_every=300),
    "small": dict(steps=12000, single=0.5, single_batch=64, batch=8, accumulate=1, lr=1e-3, muon_lr=0.01,
                  betas=(0.9, 0.98), weight_decay=0.01, warmup=200, ema=0.999, P_mean=1.5, P_std=1.8,
                  checkpointing=False, eval_every=1000),
    "svd": dict(steps=30000, single=0.0, single_batch=1, batch=1, accumulate=4, lr=1e-5, muon_lr=0.0,
                betas=(0.9, 0.999), weight_decay=0.01, warmup=100, ema=0.0, P_mean=1.0, P_std=1.6,
                checkpointing=True, eval_every=2500),
}
SINGLE_FRAMES, WHOLE_CLIPS = 0, 1           # the two phases
NOISE_BUCKETS = (0.1, 1.0, 10.0)            # sigma; the log gives the loss below, between and above these


# ---------------------------------------------------------------------------------------------- the loss, and its noise

def draw_noise(seed, index, shape, P_mean, P_std, dropout):
    """Everything random about training sample `index`: a function of (seed, index), so that a resumed run repeats it,
    and so does a run on another number of processes.

    Returns noise (V, S, T, C, h, w), sigma (one for all views, streams and frames), and whether to keep its two
    conditions.
    """
    draw = np.random.default_rng([seed, 1, index])
    sigma = math.exp(P_mean + P_std * draw.standard_normal())
    keep_latent, keep_embed = draw.random(2) >= dropout
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)), sigma, keep_latent, keep_embed


def loss_weight(sigma):
    """EDM's weight on the clean-latent error, for data of unit variance: (sigma^2 + 1) / sigma^2."""
    return (sigma ** 2 + 1) / sigma ** 2


def cell_mask(mask, cell):
    """Pixels (..., H, W) bool -> latent cells (..., h, w) bool: any pixel of a cell counts, and the cells around it."""
    cells = F.max_pool2d(mask.flatten(0, -3).float()[:, None], cell)
    return F.max_pool2d(cells, 3, stride=1, padding=1)[:, 0].unflatten(0, mask.shape[:-2]) > 0


def cell_valid(valid, cell):
    """Pixels (..., H, W) bool -> (..., h, w) in [0, 1]: the share of a cell's pixels where depth was measured."""
    return F.avg_pool2d(valid.flatten(0, -3).float()[:, None], cell)[:, 0].unflatten(0, valid.shape[:-2])


def diffusion_loss(D_x, x_0, sigma, gripper, valid, mask_weight, lambda_3d):
    """The training loss of B samples, (B,), and its parts (B, V, S) before the noise weight.

    D_x, x_0 (B, V, S, T, C, h, w) predicted and clean latents; sigma (B,); gripper (B, V, T, h, w) bool, latent cells
    with a gripper in or beside them, which count 1 + mask_weight; valid (B, V, T, h, w) in [0, 1], 0 where no depth was
    measured.
    """
    error = (D_x - x_0).float().square().mean(4)                                           # (B, V, S, T, h, w)
    cell_weight = torch.ones_like(error) * (1 + mask_weight * gripper[:, :, None])
    if error.shape[2] == 2:
        # nothing to learn where no depth is
        cell_weight = torch.stack([cell_weight[:, :, 0], cell_weight[:, :, 1] * valid], 2)
    parts = (error * cell_weight).mean((3, 4, 5))                                          # (B, V, S)
    stream_weight = torch.tensor([1.0, lambda_3d], device=parts.device)[:parts.shape[2]]   # L_diff + lambda * L_3D-diff
    return loss_weight(sigma) * (parts * stream_weight).sum(2).mean(1), parts


# ---------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, vaes, clip, loader, device, context):
    """AbsRel (mean |z - z_true| / z_true, z in the reference frame, measured pixels) of the reference view n and of the
    other views m, from one denoising step out of pure noise.

    At sigma = 700 the input holds nothing of the answer, so this is what the model infers from the observed frames
    alone. At a middle sigma the noisy target would give the other camera's pose away. Two baselines without learning
    come along: n repeated from the observed frame, and m's own points left in m's own frame.
    """
    sums = {}
    for item in loader:
        item = {key: value.to(device) if torch.is_tensor(value) else value for key, value in item.items()}
        b, v, t = item["rgb"][:, :, 1:].shape[:3]
        sigma = torch.full((b,), 700.0, device=device)
        with context():
            cond, embeds = S.encode_conditions(model, vaes, clip, item["rgb"][:, :, 0], item["own_points"])
            noise = torch.randn((*cond.shape[:3], t, *cond.shape[3:]),
                                generator=torch.Generator().manual_seed(0)).to(device)
            D_x = model(noise * sigma[0], sigma, cond, embeds)
            rgb, points = S.decode(model, vaes, D_x.float())
        l2 = (rgb - item["rgb"][:, :, 1:]).float().square().mean((2, 3, 4, 5)) / 4           # (B, V), of [0, 1] images
        rows = {"psnr": -10 * l2.clamp(min=1e-10).log10()}
        if points is not None:
            true = D.denormalize_points(item["points"])[:, :, 1:, 2]                         # (B, V, T, H, W)
            own = D.denormalize_points(item["own_points"])[:, :, None, 2].expand_as(true)
            seen = item["valid"][:, :, 1:] & (true > 0)
            abs_rel = lambda z: (((z - true).abs() / true.clamp(min=1e-3) * seen).sum((2, 3, 4))
                                 / seen.sum((2, 3, 4)).clamp(min=1))
            rows.update(abs_rel=abs_rel(points[:, :, :, 2]), baseline=abs_rel(own))
        for name, values in rows.items():
            sums.setdefault(name, []).append(values.cpu())
    mean = {name: torch.cat(values).mean(0) for name, values in sums.items()}                # (V,)
    return {f"{name}_{view}": round(chosen.item(), 4) for name, values in mean.items()
            for view, chosen in (("n", values[0]), ("m", values[1:].mean())) if len(values) > 1 or view == "n"}


# ------------------------------------------------------------------------------------------------- what is kept on disk

def save(path, tensors, **metadata):
    """A safetensors file that is the old one or the new one, at any moment. Numbers and settings go into its header."""
    partial = Path(str(path) + ".partial")
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial,
              metadata={key: json.dumps(value) for key, value in metadata.items()})
    os.replace(partial, path)


def training_state(model, average, optimizers):
    """Every tensor that a resumed run needs, by name. No generator: whatever is random is a function of the step."""
    tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
    tensors.update({f"average.{name}": p for name, p in average.items()})
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors.update({f"optimizer.{key}.{names[p]}": value for key, value in state.items()})
    return tensors


def resume(path, model, average, optimizers):
    """Put a saved training state back; returns how many steps it had done, and the settings it was started with."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, "pt") as file:
            step, before = (json.loads(file.metadata()[key]) for key in ("step", "args"))
            weights = {}
            for key in file.keys():
                part, name = key.split(".", 1)
                value = file.get_tensor(key)
                if part == "model":
                    weights[name] = value
                elif part == "average":
                    average[name].copy_(value)
                else:
                    entry, name = name.split(".", 1)
                    p = parameters[name]
                    # AdamW counts its steps on the CPU
                    owner[p].state[p][entry] = value if entry == "step" else value.to(p.device)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"{path} can't be resumed ({type(error).__name__}: {message}); it belongs to other settings "
                         "or is damaged: use another --out, or delete it to start again") from None
    return step, before


def cut_log(log_file, step):
    """Drops the lines that an interrupted run wrote after its last save: those steps are done again."""
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line).get("step", 0) <= step]
    partial = log_file.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, log_file)


def plot_log(log_file, path):
    """The loss curve, by noise level, and the held-out errors, from the jsonl log."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in Path(log_file).read_text().splitlines()]
    train, held_out = [x for x in lines if "loss" in x], [x for x in lines if "psnr_n" in x]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in sorted({key for x in train for key in x if key.startswith("loss")}):
        points = [(x["step"], x[name]) for x in train if x.get(name)]
        left.plot(*zip(*points), label=name.replace("_", " "), linewidth=2 if name == "loss" else 1)
    left.set(xlabel="step", yscale="log", title="training loss, by noise level sigma")
    for name in ("abs_rel_n", "abs_rel_m", "baseline_n", "baseline_m"):
        points = [(x["step"], x[name]) for x in held_out if name in x]
        if points:
            right.plot(*zip(*points), "--" if "baseline" in name else "o-", label=name)
    right.set(xlabel="step", title="held-out AbsRel (one step from pure noise)", ylim=(0, None))
    for ax in (left, right):
        if ax.lines:
            ax.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------- the script

def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", type=int, default=1, choices=D.TASKS, help="; ".join(f"{k} {t.name}" for k, t in D.TASKS.items()))
    add("--data", help="packed episodes; rendered first when missing [data/task_N]")
    add("--out", help="everything is written here [runs/task_N]")
    add("--preset", default="auto", choices=["auto", *M.PRESETS], help="size of the model; auto: by device and memory")
    add("--init",
        help="weights to start from: scratch, hub, or a folder in the hub's layout [svd: hub; others: scratch]")
    add("--vae", help="folder with vae_rgb and vae_pointmap; trained first when missing [OUT]")
    add("--mv_attention", choices=["points", "none", "rgb"], default="points",
        help="cross-view attention; none and rgb are ablations")
    add("--rgb_only", action="store_true", help="ablation: no pointmaps")
    add("--views", type=int, default=2, help="views a sample, the first is the reference")
    for name, kind, text in [
            ("steps", int, "optimiser steps"),
            ("single", float, "share of them on single frames, at the start"),
            ("single_batch", int, "single-frame samples a step and process"),
            ("batch", int, "clips a step and process"),
            ("accumulate", int, "batches summed up before a step"),
            ("lr", float, "peak learning rate"),
            ("muon_lr", float, "of Muon's matrices; 0: AdamW for all"),
            ("warmup", int, "steps of linear warm-up; cosine to 0 follows"),
            ("weight_decay", float, "of AdamW"),
            ("ema", float, "decay of the weight average, 0: none"),
            ("P_mean", float, "mean of ln(sigma)"),
            ("P_std", float, "standard deviation of ln(sigma)"),
            ("eval_every", int, "steps between evaluations and pictures")]:
        values = ", ".join(f"{preset}: {defaults[name]}" for preset, defaults in DEFAULTS.items())
        add(f"--{name}", type=kind, help=f"{text} [{values}]")
    add("--lambda_3d", type=float, default=1.0, help="weight of the pointmap streams in the loss")
    add("--mask_weight", type=float, default=1.0, help="extra weight of latent cells with a gripper")
    add("--dropout", type=float, default=0.1, help="probability of dropping each condition")
    add("--clip_grad", type=float, default=1.0, help="largest norm of the gradient")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 on a GPU that has it, fp32 on a CPU")
    add("--checkpointing", type=int, choices=[0, 1], help="recompute activations to save memory [svd: 1, others: 0]")
    add("--save_every", type=int, default=200, help="steps between saves")
    add("--eval_clips", type=int, default=16, help="held-out clips of an evaluation")
    add("--workers", type=int, help="processes that load clips [CPU: 0, GPU: 4]")
    add("--seed", type=int, default=0, help="of weights, clips and noise")
    add("--stop_after", type=int, help="stop at this step as if interrupted (the schedule is that of --steps)")
    add("--dry_run", action="store_true", help="print the resolved settings and sizes, then stop")
    args = parser.parse_args()
    if args.preset == "auto":
        args.preset, why = M.choose_preset()
        print(f"preset: {args.preset} ({why})")
    for name, value in DEFAULTS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.data, args.out = args.data or f"data/task_{args.task}", args.out or f"runs/task_{args.task}"
    args.vae = args.vae or args.out
    args.init = args.init or ("hub" if args.preset == "svd" else "scratch")
    args.init = M.SVD_REPO if args.init == "hub" else args.init
    if (args.init == "scratch") == (args.preset == "svd"):
        raise ValueError(f"--preset {args.preset} with --init {args.init}: svd starts from published weights (hub, or "
                         "a folder in the hub's layout), the other presets from scratch")
    for name in ("steps", "batch", "single_batch", "accumulate", "eval_every", "save_every", "eval_clips"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.views < 2:
        raise ValueError(f"--views must be at least 2, not {args.views}")
    if not 0 <= args.single <= 1:
        raise ValueError(f"--single is a share of the steps, 0 to 1, not {args.single}")
    return args


def optimizers_of(model, args):
    """Muon for matrices that map features to features, AdamW for what embeds the inputs, biases, norms and mixers."""
    inputs = ("token", "unet.conv_in", "unet.time_embedding", "unet.add_embedding")
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = args.muon_lr and p.ndim > 1 and not name.startswith(inputs) and "time_emb_proj" not in name
            (matrices if is_matrix else others).append(p)
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    return [adamw] + ([Muon(matrices, args.muon_lr, momentum=0.95)] if matrices else [])


def report(args, model, rank):
    """Prints the resolved settings, and what they amount to."""
    if rank != 0:
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder_a = sum(M.count(part) for part in (model.unet.up_blocks, model.unet.conv_norm_out, model.unet.conv_out))
    print("  ".join(f"{name}={value}" for name, value in vars(args).items() if value is not None))
    print(f"parameters: encoder and middle {(M.count(model.unet) - decoder_a) / 1e6:.2f} M, "
          f"decoder A {decoder_a / 1e6:.2f} M, decoder B {M.count(model.decoder_b) / 1e6:.2f} M, "
          f"cross-view attention {M.count(model.cross_view) / 1e6:.2f} M; trained {trained / 1e6:.2f} M")
    # weights, gradients, two moments (Muon has one), average: fp32 each
    states = 4 - bool(args.muon_lr) + bool(args.ema)
    print(f"memory: {4 * states * trained / 2 ** 30:.2f} GB for weights, gradients, optimiser"
          f"{' and average' * bool(args.ema)}, plus activations")
    single = single_steps(args)
    world = int(os.environ.get("WORLD_SIZE", 1))
    print(f"steps: {single} of {args.single_batch * args.accumulate * world} view pairs on single frames, "
          f"then {args.steps - single} of {args.batch * args.accumulate * world} clips, "
          f"on {world} process{'es' * (world > 1)}")


def single_steps(args):
    return round(args.single * args.steps)


def stage_one(args, rank):
    """Data and VAEs, where they are missing: the same commands that a person would type."""
    if rank == 0 and not any(Path(args.data).glob("*/episode.json")):
        size = M.PRESETS[args.preset].height, M.PRESETS[args.preset].width
        print(f"stage 1: no episodes in {args.data}: rendering the synthetic world's there (real ones: see data.py)")
        D.prepare(args.task, args.data, size=size)
    names = ["rgb"] if args.rgb_only else ["rgb", "pointmap"]
    if rank == 0 and not all((Path(args.vae) / f"vae_{name}.safetensors").exists() for name in names):
        print(f"stage 1: no VAE in {args.vae}: training it there")
        command = [sys.executable, str(Path(__file__).with_name("vae.py")), "--task", str(args.task),
                   "--data", args.data, "--preset", args.preset, "--out", args.vae, "--seed", str(args.seed)]
        if args.preset == "svd":
            command += ["--init", args.init]
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if subprocess.run(command, env=alone).returncode:
            raise ValueError("stage 1 stopped (see above)")
    if dist.is_initialized():
        dist.barrier()


def index_batches(args, rank, world, first, last):
    """Sample numbers of every micro-batch of steps first..last-1. One number is one sample of the run, whatever the
    number of processes: two processes draw together what one draws with twice the accumulation."""
    for step in range(first, last):
        batch = args.single_batch if step < single_steps(args) else args.batch
        for micro in range(args.accumulate):
            start = ((step * args.accumulate + micro) * world + rank) * max(args.single_batch, args.batch)
            yield range(start, start + batch)


def git_hash():
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def main():
    args = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    preset = M.PRESETS[args.preset]
    if args.dry_run:
        with torch.device("meta"):
            report(args, M.Model4D(preset, args.mv_attention, args.rgb_only), rank)
        return
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the other processes wait while the first does stage 1, which can take hours
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
    stage_one(args, rank)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # ---- model, average, optimiser
    torch.manual_seed(args.seed)
    if args.init == "scratch":
        raw_model = M.Model4D(preset, args.mv_attention, args.rgb_only).to(device)
    else:
        raw_model = M.Model4D.from_pretrained(preset, args.init, device=device, mv_attention=args.mv_attention,
                                              rgb_only=args.rgb_only)
    raw_model.checkpointing = bool(args.checkpointing)
    report(args, raw_model, rank)
    torch.set_float32_matmul_precision("high")
    if args.workers is None:
        args.workers = 0 if device.type == "cpu" else 4
    if args.precision == "auto":
        args.precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    # autocast would keep every weight in half precision too, until the end of the forward pass: memory that
    # checkpointing saves
    context = (lambda: torch.autocast(device.type, kind, cache_enabled=not args.checkpointing)) if kind else nullcontext
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    parameters = [p for p in raw_model.parameters() if p.requires_grad]
    optimizers = optimizers_of(raw_model, args)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = {name: p.detach().clone() for name, p in raw_model.named_parameters()} if args.ema else {}
    resume_file, log_file = out / "resume.safetensors", out / "log.jsonl"
    step = 0
    if resume_file.exists():
        step, before = resume(resume_file, raw_model, average, optimizers)
        changed = [f"{name} {before[name]} -> {value}" for name, value in vars(args).items()
                   if name in before and json.dumps(before[name]) != json.dumps(value) and name != "stop_after"]
        if rank == 0:
            print(f"going on at step {step} of {resume_file}"
                  + (", with changed settings: " + ", ".join(changed) if changed else ""))
            cut_log(log_file, step)
    model = raw_model
    if world > 1:
        model = DistributedDataParallel(raw_model, device_ids=[local] if device.type == "cuda" else None)
    vaes, clip = S.load_frozen(raw_model, args.vae, args.init, device)

    # ---- data
    size = preset.height, preset.width
    clips = lambda split, **options: D.Clips(args.data, split, size, args.views, seed=args.seed, **options)
    train_sets = {SINGLE_FRAMES: clips("train", single=True), WHOLE_CLIPS: clips("train")}
    held_out = torch.utils.data.DataLoader(clips("test", length=args.eval_clips),
                                           batch_size=min(args.batch, args.eval_clips))

    def batches(first):
        """Loaded micro-batches from step `first` on: single frames, then clips."""
        turn = single_steps(args)
        for phase, start, stop in ((SINGLE_FRAMES, first, turn), (WHOLE_CLIPS, max(first, turn), args.steps)):
            sampler = list(index_batches(args, rank, world, start, stop))
            loader = torch.utils.data.DataLoader(train_sets[phase], batch_sampler=sampler, num_workers=args.workers,
                                                 pin_memory=device.type == "cuda")
            for indices, item in zip(sampler, loader):
                yield indices, {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                                for key, value in item.items()}

    def log(**line):
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(line) + "\n")

    def write_checkpoint():
        """The averaged weights for sample.py, then everything that a resumed run needs."""
        if rank != 0:
            return
        weights = dict(raw_model.state_dict())
        weights.update(average)
        save(out / "model.safetensors", weights, step=step)
        info = dict(preset=asdict(preset), mv_attention=raw_model.mv_attention, rgb_only=args.rgb_only, init=args.init,
                    vae=os.path.relpath(args.vae, out), step=step, task=args.task, seed=args.seed)
        (out / "model.json.partial").write_text(json.dumps(info, indent=1))
        os.replace(out / "model.json.partial", out / "model.json")
        save(resume_file, training_state(raw_model, average, optimizers), step=step, args=vars(args))

    def evaluate_average():
        """Held-out scores and a sample picture, with the averaged weights in the model for as long as it takes."""
        if rank != 0:
            return
        training = {name: p.detach().clone() for name, p in raw_model.named_parameters() if name in average}
        raw_model.load_state_dict(average, strict=False)
        raw_model.eval()
        scores = evaluate(raw_model, vaes, clip, held_out, device, context)
        item = held_out.dataset[0]
        with context():
            rgb, points = S.sample_views(raw_model, vaes, clip, item["rgb"][None, :, 0].to(device),
                                         item["own_points"][None].to(device), steps=12,
                                         generator=torch.Generator().manual_seed(args.seed))
        prediction = S.to_prediction(*S.observation(item), rgb[0].float(), None if points is None else points[0])
        S.contact_sheet(out / f"sheet_{step:06d}.png", S.add_truth(prediction, item), f"step {step}: {item['name']}")
        raw_model.load_state_dict(training, strict=False)
        raw_model.train()
        log(step=step, **scores)
        plot_log(log_file, out / "loss.png")
        tqdm.write(f"step {step}: held out, one step from noise: " + ", ".join(f"{k} {v}" for k, v in scores.items()))

    # ---- the loop
    if step == 0:
        log(git=git_hash(), python=platform.python_version(), torch=torch.__version__,
            threads=torch.get_num_threads(), device=str(device),
            gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
            args={k: str(v) for k, v in vars(args).items()})
    last = min(args.steps, args.stop_after or args.steps)
    if rank == 0:
        print(f"training {args.preset} on {device} in {args.precision}, step {step} to {last}; "
              f"everything is written to {out}/")
    raw_model.train()
    loader = batches(step)
    stop = Stop()                                               # becomes true at Ctrl-C and SIGTERM
    buckets = {}                                                # noise level -> losses since the last line of the log
    progress = tqdm(total=args.steps, initial=step, disable=rank != 0, unit="step", desc="train")
    while step < last and not stop.asked:
        started = time.time()
        warm, done = min(1.0, (step + 1) / args.warmup), step / args.steps
        schedule = warm * 0.5 * (1 + math.cos(math.pi * done))
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * schedule

        total = 0.0
        for micro in range(args.accumulate):
            indices, item = next(loader)
            with torch.no_grad(), context():
                x_0 = S.encode_targets(raw_model, vaes, item["rgb"][:, :, 1:], item["points"][:, :, 1:]).float()
                cond, embeds = S.encode_conditions(raw_model, vaes, clip, item["rgb"][:, :, 0], item["own_points"])
            noise, sigma, keep_latent, keep_embed = zip(*(
                draw_noise(args.seed, i, x_0.shape[1:], args.P_mean, args.P_std, args.dropout) for i in indices))
            noise, sigma = torch.stack(noise).to(device), torch.tensor(sigma, device=device)             # sigma (B,)
            keep = lambda x, kept: x * torch.tensor(kept, device=device).view(-1, *[1] * (x.dim() - 1))
            cond = keep(cond, keep_latent)                                                      # (B, V, S, C, h, w)
            embeds = None if embeds is None else keep(embeds, keep_embed)                       # (B, V, D)
            cell = preset.height // x_0.shape[-2]
            gripper = cell_mask(item["gripper"][:, :, 1:].any(-1), cell)                        # (B, V, T, h, w)
            valid = cell_valid(item["valid"][:, :, 1:], cell)
            x = x_0 + sigma.view(-1, *[1] * 6) * noise                                          # (B, V, S, T, C, h, w)
            # DDP adds up gradients across processes in backward: only the last micro-batch of a step needs that.
            last_micro = micro == args.accumulate - 1
            with nullcontext() if world == 1 or last_micro else model.no_sync():
                with context():
                    D_x = model(x, sigma, cond, embeds, item["frame_index"])
                loss, _ = diffusion_loss(D_x, x_0, sigma, gripper, valid, args.mask_weight, args.lambda_3d)   # (B,)
                scaler.scale(loss.mean() / args.accumulate).backward()
            total += loss.detach().mean().item() / args.accumulate
            for level, value in zip(sigma.tolist(), loss.tolist()):
                edges = [edge for edge in NOISE_BUCKETS if edge <= level]
                buckets.setdefault(f"loss_above_{edges[-1]:g}" if edges else f"loss_below_{NOISE_BUCKETS[0]:g}",
                                   []).append(value)

        if not math.isfinite(total):
            raise ValueError(f"the loss is {total} at step {step}: lower --lr, or use --precision fp32; "
                             f"{resume_file} holds the last good state")
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad).item()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))         # a young average forgets the random start quickly
        for name, p in raw_model.named_parameters():
            if name in average:
                average[name].lerp_(p.detach(), 1 - decay)

        progress.update()
        progress.set_postfix(loss=f"{total:.3f}")
        if step % 20 == 0 or step == last:
            log(step=step, loss=round(total, 5), lr=args.lr * schedule, grad_norm=round(norm, 4),
                seconds=round(time.time() - started, 3),
                **{name: round(float(np.mean(values)), 5) for name, values in buckets.items()})
            buckets = {}
        if step % args.save_every == 0 or step == last or stop.asked:
            write_checkpoint()
        if step % args.eval_every == 0 or step == args.steps:
            evaluate_average()
    progress.close()
    stop.restore()
    if rank == 0 and step < args.steps:
        print(f"stopped at step {step}; the same command goes on from there")
    elif rank == 0:
        print(f"done: {out}/model.safetensors, {out}/loss.png, {out}/sheet_{step:06d}.png; "
              f"next: python sample.py --task {args.task} --run {out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"train.py: {error}")
