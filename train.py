"""Train the 4D model: RGB of every view, and every view's pointmap in the reference view's frame, ten frames ahead.

    python train.py --task 1                                # data, codes, model, pictures, on any machine
    python train.py --task 1 --minutes 600                  # as many steps as fit into so long
    python train.py --task 1 --preset svd                   # the paper's model from SVD's weights: one 48 GB GPU
    python train.py --task 1 --preset svd --low_memory      # one 24 GB GPU; LowMemoryAdamW says at what price
    torchrun --nproc_per_node 4 train.py --task 1 --preset svd --accumulate 1
    python train.py --task 1 --init runs/released_1         # from the weights of another run, or the authors' own
    python train.py --task 1 --dry_run                      # what would be done, and the memory it takes

Stopped and started again with the same command, it goes on where it was, to the bit. Writes into runs/task_N:
model.safetensors and model.json (averaged weights, for sample.py), resume.pt (all else that a resumed run needs),
log.jsonl, sheet_STEP.png. Stage 1, data and codes, runs first where its outputs are missing.

The loss (arXiv 2507.01099) is each stream's error on clean latents (tiny, small: on their pixels), weighted by noise
level:
    L = mean over views and frames of  L_diff(RGB) + lambda * L_3D-diff(pointmaps in the reference's frame)

Letters   B samples, V views, S streams (0 RGB, 1 pointmap), T predicted frames, C latent channels, H W pixels, h w
          latent cells, K matrices of one shape
References: the method, arXiv 2507.01099; EDM (noise levels and weights), arXiv 2206.00364; predicting x_0, arXiv
2511.13720; robust error, Charbonnier et al., ICIP 1994; Muon, Jordan 2024, kellerjordan.github.io/posts/muon.
"""
import argparse
import json
import math
import os
import signal
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
from model import PRESETS, SVD_REPO, CLIPImageEncoder, Model4D, Preset, choose_preset, count, load_weights
from sample import contact_sheet, encode_conditions, encode_targets, load_frozen, predict, read_info
from vae import VAE, writing_tensors
from vae import main as make_codes

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out of a run folder
    fcntl = None

# A flag's default, [tiny, small, svd] where it depends on the preset, or (choices), the first of them; and its help.
# --single: geometry is learned from many view pairs, and one frame shows a pair as ten do, at a tenth of the price.
# --late: starts all over an episode are more to learn than its first ones, by which clips are scored; the 800 steps of
# `tiny` score better without.
# --P_mean: at low noise the target itself gives the other camera away, and cross-view attention has nothing to learn.
# --mask_weight: a hand is few pixels; weighed like what is around it, it fades. Weighed so, it is drawn wherever it is
# likelier than one in this weight: too fat, thanks to which tiny's blur is found; small is too fat in depth still.
FLAGS = {
    "steps": ([800, 4000, 30000], "optimiser steps"),
    "single": ([0.95, 0.97, 0.0], "share of them, the first, on single frames"),
    "single_batch": ([16, 256, 1], "single-frame samples a batch and process"),
    "late": ([0.0, 0.7, 0.0], "share of these that start anywhere, not where a whole clip fits"),
    "batch": ([2, 16, 1], "clips a batch and process"),
    "accumulate": ([1, 1, 4], "batches a step"),
    "lr": ([2e-3, 2e-3, 1e-5], "peak learning rate of AdamW"),
    "muon_lr": ([0.02, 0.02, 0.0], "of Muon's matrices; 0: AdamW for all, as in the paper"),
    "beta2": ([0.98, 0.98, 0.999], "AdamW's memory of squared gradients"),
    "warmup": ([30, 60, 100], "steps of linear warm-up; cosine to 0 follows"),
    "ema": ([0.995, 0.999, 0.0], "decay of the weight average, 0: none"),
    "P_mean": ([3.5, 3.5, 1.0], "mean of ln(sigma)"),
    "P_std": ([1.5, 1.5, 1.6], "standard deviation of ln(sigma)"),
    "weight_cap": ([5.0, 5.0, 1e9], "largest weight of a noise level"),
    "huber": ([0.01, 0.01, 0.0], "in [-1, 1]: pixels further off count in proportion; 0: squared error of latents"),
    "mask_weight": ([32.0, 8.0, 1.0], "extra weight with a gripper there or beside"),
    "moving_weight": ([2.0, 2.0, 0.0], "extra weight where something moves"),
    "dropout": ([0.0, 0.0, 0.1], "of each condition, for guidance"),
    "lambda_3d": ([3.0, 3.0, 1.0], "weight of the pointmaps in the loss"),
    "minutes": (0.0, "train so long: steps are set from the speed of a few, for good [by --steps]"),
    "task": (tuple(data.TASKS), "; ".join(f"{number} {task.name}" for number, task in data.TASKS.items())),
    "data": ("", "packed episodes, rendered where missing [data/task_N]"),
    "out": ("", "run folder [runs/task_N]"),
    "vae": ("", "folder of vae_rgb and vae_pointmap, made where missing [OUT]"),
    "preset": (("auto", *PRESETS), "auto: tiny or small, by GPU"),
    "init": (SVD_REPO, "a run folder to start from; svd: or a hub repo, or a folder in its layout"),
    "mv_attention": (("points", "none", "rgb"), "none; rgb, with --rgb_only: ablations"),
    "rgb_only": (False, "ablation: no pointmaps"),
    "views": (2, "views a sample, the first is the reference"),
    "precision": (("auto", "bf16", "fp32"), "auto: bf16 where it is faster"),
    "low_memory": (False, "see LowMemoryAdamW"),
    "compile": (False, "torch.compile the model on a GPU"),
    "workers": (-1, "that load clips [CPU 0, GPU 8]"),
    "save_every": (200, "steps between saves"),
    "eval_every": (0, "steps between evaluations [a quarter of all]"),
    "seed": (0, "of weights, clips and noise"),
    "dry_run": (False, "print settings and memory, then stop"),
}
WEIGHT_DECAY, CLIP_GRAD = 0.01, 1.0  # of AdamW; largest norm of the gradient
LOG_EVERY, EVAL_CLIPS = 20, 6        # steps; held-out clips of an evaluation
# MiB that backward needs for a frame of two views, in clips and alone, in bf16: counted by tests/test_memory.py
ACTIVATIONS = {"tiny": (31.7, 20.1), "small": (83.5, 49.6), "svd": (381, 381)}
# Synthetic episodes, where there are none, and which of their frames: a large network learns a hundred by heart.
SCENES = {"tiny": (25, 1), "small": (800, 5), "svd": (25, 1)}
EXPLODED = 1e3                       # no weight comes near this while a network learns


# ---------------------------------------------------------------------------------------------- the loss, and its noise

def cell_share(mask, cell):
    """Pixels (..., H, W) bool -> (..., h, w), the share of each latent cell's pixels."""
    return F.avg_pool2d(mask.flatten(0, -3).float()[:, None], cell)[:, 0].unflatten(0, mask.shape[:-2])


def training_loss(net, x_0, cond, embeds, item, noise, sigma, args, codes=None):
    """The loss of B samples, (B,).

    x_0, noise (B, V, S, T, C, h, w): clean latents, standard normal; sigma (B,): one level for all streams of a sample;
    cond, embeds: the observed frame, from sample.encode_conditions; item: masks, from data.to_tensors.

    The squared error asks for the mean of all places where the arm could be: a blur. With args.huber the error is that
    of the pixels that `codes` decode, Charbonnier's (ICIP 1994), nearly the distance itself: it asks for the median.
    """
    weight = ((sigma ** 2 + 1) / sigma ** 2).clamp(max=args.weight_cap)  # (B,)
    x = x_0 + sigma.view(-1, 1, 1, 1, 1, 1, 1) * noise
    D_x = net(x, sigma, cond, embeds, item["frame_index"])
    if args.huber:
        D_x, x_0 = decoded(codes, D_x), decoded(codes, x_0)  # (B, V, S, T, 3, H, W)
    error = (D_x - x_0).float().square().mean(4)             # (B, V, S, T, h, w), with huber H, W
    if args.huber:
        error = (error + args.huber ** 2).sqrt() - args.huber

    cell = item["valid"].shape[-1] // error.shape[-1]
    gripper = cell_share(item["gripper"][:, :, 1:], cell)  # (B, V, T, h, w)
    gripper = F.max_pool2d(gripper.flatten(0, 2), 3, stride=1, padding=1).view_as(gripper) > 0
    moving = cell_share(item["moving"], cell) > 0
    important = 1 + args.mask_weight * gripper + args.moving_weight * moving
    measured = cell_share(item["valid"][:, :, 1:], cell)           # where no depth is, a pointmap has nothing to learn
    L = (error[:, :, 0] * important).mean((1, 2, 3, 4))                                      # L_diff
    if error.shape[2] == 2:
        L = L + args.lambda_3d * (error[:, :, 1] * important * measured).mean((1, 2, 3, 4))  # L_3D-diff
    return weight * L


def decoded(codes, latents):
    """Latents (B, V, S, T, C, h, w) of linear codes -> images (B, V, S, T, 3, H, W), through which gradients go."""
    images = [code.decode_latents(stream.flatten(0, 2)).unflatten(0, stream.shape[:3])
              for code, stream in zip(codes.values(), latents.unbind(2))]
    return torch.stack(images, 2)


class Samples(torch.utils.data.Dataset):
    """Sample i, a clip and all that is random about it but its noise: a function of (seed, i), so that a resumed run
    repeats it."""

    def __init__(self, clips, args):
        self.clips, self.args = clips, args

    def __getitem__(self, i):
        args, draw = self.args, np.random.default_rng([self.args.seed, 1, i])
        sigma = np.float32(math.exp(args.P_mean + args.P_std * draw.standard_normal()))
        keep = torch.from_numpy(draw.random(2) >= args.dropout)  # latent, embedding
        return dict(self.clips[i], number=i, sigma=sigma, keep=keep)


# -------------------------------------------------------------------------------------------------------- the optimiser

def multiplies_bf16_faster(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, matrix by matrix: all directions of a layer learn at the same pace."""

    def __init__(self, parameters, lr, momentum=0.95, bf16=False):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))
        self.bf16 = bf16

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        grads = [p.grad for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])                    # Nesterov's
        stacks = {}                                     # few large products take less time than many small ones
        for p, matrix in zip(parameters, ahead):
            stacks.setdefault((len(p), p[0].numel()), []).append((p, matrix.flatten(1)))  # (out, in * kernel)
        for (rows, columns), pairs in stacks.items():
            updates = orthogonal(torch.stack([matrix for _, matrix in pairs]), self.bf16)
            updates *= max(1, rows / columns) ** 0.5
            torch._foreach_add_([p for p, _ in pairs], [update.view_as(p) for (p, _), update in zip(pairs, updates)],
                                alpha=-group["lr"])


def orthogonal(matrices, bf16=False):
    """(K, rows, columns) -> the nearest matrices with singular values near 1, by Jordan's Newton-Schulz iteration."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if bf16 else x
    x = x.mT if x.shape[1] > x.shape[2] else x
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if x.shape == matrices.shape else x.mT).to(matrices.dtype)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW in 6 bytes a parameter instead of 16: bf16 weights and moments, and no gradients, for a tensor is stepped
    inside backward as soon as its gradient is complete.

    bf16 has 8 bits: a change by a thousandth would be lost, in every step. Rounded up or down at random, in proportion,
    it is right in the mean. The price: that noise, no accumulation, one process, clipping tensor by tensor, and a
    gradient that is not finite is noticed when other layers have been stepped (they are not saved then).
    """

    def __init__(self, parameters, lr, betas, weight_decay, seed):
        super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.seed, self.generator = seed, torch.Generator(parameters[0].device)
        self.norm = torch.zeros((), device=parameters[0].device)  # the step's largest; NaN stays NaN
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.step_tensor)

    def begin(self, step):
        """Before the backward of each step: what is drawn in it depends on nothing else."""
        self.count = step + 1
        self.generator.manual_seed(self.seed * 1_000_003 + step)
        self.norm.zero_()

    def rounded(self, x):
        """float32 -> bfloat16, up or down with the probabilities that make the mean right."""
        noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=self.generator)
        return (x.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32)

    @torch.no_grad()
    def step_tensor(self, p):
        group, state, g = self.param_groups[0], self.state[p], p.grad.float()
        p.grad = None
        lr, (b1, b2) = group["lr"], group["betas"]
        norm = g.norm()
        self.norm = torch.maximum(self.norm, norm)
        g *= (CLIP_GRAD / (norm + 1e-6)).clamp(max=1)
        m = state.setdefault("m", torch.zeros_like(p)).float().lerp_(g, 1 - b1)
        v = state.setdefault("v", torch.zeros_like(p)).float().lerp_(g.square(), 1 - b2)
        state["m"].copy_(self.rounded(m))
        state["v"].copy_(self.rounded(v))
        update = m / (1 - b1 ** self.count) / ((v / (1 - b2 ** self.count)).sqrt() + 1e-8)
        p.copy_(self.rounded(p.float() * (1 - lr * group["weight_decay"]) - lr * update))

    def step(self):
        """Done, in backward."""


def split(net, args):
    """Parameters for AdamW (what embeds the inputs, biases, norms, mixers), and matrices from features to features."""
    inputs = ("token", "unet.conv_in", "unet.time_embedding", "unet.add_embedding")
    groups = [], []
    for name, p in net.named_parameters():
        if p.requires_grad:
            is_matrix = p.ndim > 1 and not name.startswith(inputs) and "time_emb_proj" not in name
            groups[bool(args.muon_lr and is_matrix)].append(p)
    return groups


def optimizers_of(net, args):
    others, matrices = split(net, args)
    settings = dict(lr=args.lr, betas=(0.9, args.beta2), weight_decay=WEIGHT_DECAY)
    if args.low_memory:
        return [LowMemoryAdamW(others, **settings, seed=args.seed)]
    bf16 = args.precision != "fp32" and multiplies_bf16_faster(others[0].device)
    muon = [Muon(matrices, args.muon_lr, bf16=bf16)] if matrices else []
    # fused: `foreach`, CUDA's default, needs a temporary as large as the model
    return [torch.optim.AdamW(others, **settings, fused=True), *muon]


# ------------------------------------------------------------------------------------------------- what is kept on disk

def save(run, step):
    """model.safetensors, the weights to use, and resume.pt, the rest: the old two or the new two at any moment."""
    weights, state, tensors = run.folder / "model.safetensors", run.folder / "resume.pt", run.model.state_dict()
    largest = torch.stack([p.detach().abs().max() for p in run.model.parameters()]).max().item()
    if not largest < EXPLODED:
        raise ValueError(f"a weight has grown to {largest:.3g} by step {step}: lower --lr or --muon_lr; {state} still "
                         "holds the last good state")
    rest = dict(step=step, args=vars(run.args), info=run.info, average=run.average,
                model=tensors if run.average else None,          # without an average they stand in model.safetensors
                optimizers=[optimizer.state_dict()["state"] for optimizer in run.optimizers])
    data.write_json(run.folder / "model.json", dict(run.info, step=step))
    with writing_tensors(weights) as new_weights, writing_tensors(state) as new_state:  # renamed: state first
        save_file({name: value.contiguous() for name, value in {**tensors, **run.average}.items()}, new_weights,
                  metadata={"step": str(step)})
        torch.save(rest, new_state)


def read_state(folder):
    """What `save` left in a run folder, on the CPU; None where there is nothing."""
    path = folder / "resume.pt"
    if not path.exists():
        return None
    with data.reading(path, "delete it to start again, or use another --out"):
        if not zipfile.is_zipfile(path):  # which mmap calls an invalid argument
            raise ValueError("it is not whole")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if saved["model"] is None:
            if not (weights := weights_of(folder, saved["step"])):
                raise ValueError("its model.safetensors is missing, damaged or of another step")
            saved["model"] = load_file(weights)
        return saved


def weights_of(folder, step):
    """model.safetensors of that step, or its temporary name where a kill came between the two renames of `save`."""
    for path in (folder / "model.safetensors", folder / "model.safetensors.partial"):
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("step") == str(step):
                    return path
        except (OSError, SafetensorError):  # not there, or not whole
            pass


def origin_of(init):
    """What model.json says, where --init names a run folder; else nothing."""
    path = Path(init) / "model.json"
    return read_info(path.parent) if path.exists() else {}


class Log:
    """One JSON object a line. A resumed run cuts the lines of steps that it repeats."""

    def __init__(self, run):
        self.path = run.folder / "log.jsonl"
        lines = self.path.read_text().splitlines() if run.step and self.path.exists() else []
        lines = [line for line in lines if line.endswith("}") and json.loads(line).get("step", 0) <= run.step]
        with data.writing(self.path) as partial:
            partial.write_text("".join(line + "\n" for line in lines))
        hardware = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{os.cpu_count()} cores"
        self.write(torch=torch.__version__, hardware=hardware, bf16=run.bf16, args=vars(run.args))

    def write(self, **entry):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------------- evaluation

@contextmanager
def averaged(run):
    """The averaged weights in the model for as long as the block lasts; nothing is copied."""
    def swap():
        for name, p in run.model.named_parameters():
            if run.average:
                p.data, run.average[name] = run.average[name], p.data
    swap()
    run.model.eval()
    yield
    run.model.train()
    swap()


def show(run, step, log, stop):
    """Figures of held-out clips and a picture.

    The figures are of one step out of pure noise: at the highest sigma the input holds nothing of the answer, so that
    they say what the model infers from the observed frames; at a middle one the noisy target gives the camera away.
    """
    preset, rows = run.model.preset, []
    held_out = data.Clips(run.data, "test", (preset.height, preset.width), run.args.views, seed=run.args.seed)
    with averaged(run):
        for i in range(EVAL_CLIPS):
            if stop.asked:
                return
            rows.append(evaluate.score(predict(run, held_out.clip(i), steps=1)))
        names = [f"{name}-{view}" for name in ("psnr", "abs_rel", "hand") for view in "nm"]
        scores = {name: round(float(np.nanmean([row[name] for row in rows])), 4) for name in names if name in rows[0]}
        tqdm.write(f"step {step}, held out: " + ", ".join(f"{name} {value:g}" for name, value in scores.items()))
        clip = predict(run, held_out.clip(0), seed=run.args.seed)
    contact_sheet(sheet(run, step), clip, f"step {step}: {clip['name']}")
    log.write(step=step, **scores)  # last: what is cut off before is done again


def sheet(run, step):
    return run.folder / f"sheet_{step:06d}.png"


# ------------------------------------------------------------------------------------------------------------- one step

def batches(run, single, first, last):
    """Loaded batches of steps first..last - 1, of single frames or of clips. Two processes draw what one draws in twice
    as many batches."""
    args, preset, cell = run.args, run.model.preset, run.vaes["rgb"].cell
    clips = data.Clips(run.data, "train", (preset.height, preset.width), args.views, single=single, late=args.late,
                       seed=args.seed)
    V, S = args.views, 2 - args.rgb_only
    C_h_w = preset.unet["in_channels"] // 2, preset.height // cell, preset.width // cell
    size, on_gpu = args.single_batch if single else args.batch, run.device.type == "cuda"
    starts = [(batch * run.world + run.rank) * max(args.single_batch, args.batch)
              for batch in range(first * args.accumulate, last * args.accumulate)]
    loader = torch.utils.data.DataLoader(
        Samples(clips, args), batch_sampler=[range(start, start + size) for start in starts],
        num_workers=args.workers if args.workers >= 0 else 8 * on_gpu, pin_memory=on_gpu, worker_init_fn=leave_signals)
    generator = torch.Generator(run.device)
    for item in loader:
        generator.manual_seed(args.seed * 1_000_003 + item.pop("number")[0].item())
        item = {name: value.to(run.device, non_blocking=True) for name, value in item.items()}
        B, T = item["frame_index"].shape
        noise = torch.randn(B, V, S, T, *C_h_w, device=run.device, generator=generator)
        yield dict(item, noise=noise)


def wrapped(run, single):
    """The model as it is trained: compiled, and over all processes."""
    net = run.model
    if run.args.compile and run.device.type == "cpu":
        print("--compile: left out on a CPU, where PyTorch 2.13 compiles bf16 to wrong gradients")
    elif run.args.compile:
        torch._dynamo.config.suppress_errors = True  # what does not compile runs as ever, with a warning
        net = torch.compile(net)
    if run.world > 1:                                # on single frames the layers along time have no gradient
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, find_unused_parameters=single)
    return net


def gradients(net, run, loader, step, schedule):
    """Leaves the gradient of a step in the parameters. Returns the losses of its samples."""
    for optimizer, peak in zip(run.optimizers, (run.args.lr, run.args.muon_lr)):
        optimizer.param_groups[0]["lr"] = peak * schedule
    if run.args.low_memory:
        run.optimizers[0].begin(step)
    losses = []
    for micro in range(run.args.accumulate):
        item = next(loader)
        with torch.no_grad():
            x_0 = encode_targets(run, item["rgb"][:, :, 1:], item["points"][:, :, 1:])
            cond, embeds = encode_conditions(run, item["rgb"][:, :, 0], item["own_points"])
        kept = lambda x, i: x * item["keep"][:, i].view(-1, *[1] * (x.dim() - 1))
        cond, embeds = kept(cond, 0), None if embeds is None else kept(embeds, 1)
        # DDP averages gradients over the processes in backward: only the last batch of a step needs that.
        alone = run.world > 1 and micro < run.args.accumulate - 1
        with net.no_sync() if alone else nullcontext():
            with run.autocast():
                loss = training_loss(net, x_0, cond, embeds, item, item["noise"], item["sigma"], run.args,
                                     run.vaes)  # (B,)
            (loss.mean() / run.args.accumulate).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def steps_in(minutes, run):
    """How many steps fit: a few of each phase are timed, at learning rate 0."""
    seconds, timed = 0.0, 12
    for single, share in ((True, run.args.single), (False, 1 - run.args.single)):
        if share:
            net, loader = wrapped(run, single), batches(run, single, 0, timed)
            for step in range(timed):
                if step < 2:  # the first one warms up
                    began = time.time()
                loss = gradients(net, run, loader, step, schedule=0.0)
                for optimizer in run.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                loss.sum().item()  # waits for the GPU
            seconds += share * (time.time() - began) / (timed - 1)
    for optimizer in run.optimizers:
        optimizer.state.clear()
    steps = torch.tensor([0.95 * 60 * minutes / seconds], device=run.device)  # the rest: saves and evaluations
    if run.world > 1:
        dist.broadcast(steps, 0)
    return max(2, int(steps))


def train(run, log, stop):
    """The loop. Returns the step it came to."""
    args, step = run.args, run.step
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    averages, followed = list(run.average.values()), [p.detach() for p in run.model.parameters()]
    evaluates = lambda step: step % (args.eval_every or math.ceil(args.steps / 4)) == 0 or step == args.steps
    if run.rank == 0 and step and evaluates(step) and not sheet(run, step).exists():  # it was cut off there
        show(run, step, log, stop)
    losses, began = [], time.time()
    progress = tqdm(total=args.steps, initial=step, disable=run.rank != 0, unit="step", desc="train")
    for single, last in ((True, round(args.single * args.steps)), (False, args.steps)):
        if step >= last:
            continue
        net = None  # frees the gradients' buckets of the phase before
        net, loader = wrapped(run, single), batches(run, single, step, last)
        while step < last:
            schedule = min(1, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            losses.append(gradients(net, run, loader, step, schedule))
            norm = run.optimizers[0].norm if args.low_memory else torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)

            # What all processes must agree on, and the only wait for the GPU in a step: good, go on?
            verdict = torch.stack([(losses[-1].sum() + norm).isfinite(),
                                   torch.tensor(not stop.asked, device=run.device)]).float()
            if run.world > 1:
                dist.all_reduce(verdict, dist.ReduceOp.MIN)
            finite, go_on = verdict.tolist()
            if not finite:
                raise ValueError(f"the loss or its gradient is not finite at step {step}: lower --lr or --muon_lr; "
                                 f"{run.folder}/resume.pt, if there, holds the last good state")
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if averages:  # a young average forgets the random start quickly
                torch._foreach_lerp_(averages, followed, 1 - min(args.ema, (1 + step) / (10 + step)))

            progress.update()
            if run.rank == 0 and (step % LOG_EVERY == 0 or step == args.steps):
                loss = round(torch.cat(losses).mean().item(), 5)
                log.write(step=step, loss=loss, lr=args.lr * schedule, grad_norm=round(norm.item(), 4),
                          seconds=round((time.time() - began) / len(losses), 4))
                progress.set_postfix(loss=f"{loss:.3f}")
                began = time.time()
            if step % LOG_EVERY == 0:
                losses = []
            paused = time.time()
            if run.rank == 0 and (step % args.save_every == 0 or evaluates(step) or not go_on):
                save(run, step)
                if evaluates(step) and go_on:
                    show(run, step, log, stop)
            began += time.time() - paused
            if not go_on:
                return step
    return step


# ----------------------------------------------------------------------------------------------------------- the script

class Stop:
    """SIGTERM and Ctrl-C: before training they end the program, later they set `asked`, and the loop saves first."""

    def __init__(self):
        self.asked, self.saves = False, False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self)

    def __call__(self, *_):
        self.asked = True
        if not self.saves:
            raise SystemExit("stopped before the first step; the same command starts again")


def leave_signals(_):
    """In loading processes, which the main one ends: a signal to the whole group would take its next batch away."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def parse(argv=None):
    """The flags that were given, and no others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for name, (value, text) in FLAGS.items():
        first = value[0] if isinstance(value, (tuple, list)) else value
        kind = dict(action="store_true") if value is False else dict(type=type(first))
        if isinstance(value, list):
            text += " [" + ", ".join(f"{preset} {x:g}" for preset, x in zip(PRESETS, value)) + "]"
        elif value is not False and "[" not in text:
            text += f" [{first}]"
        parser.add_argument(f"--{name}", help=text, **kind, **dict(choices=value) if isinstance(value, tuple) else {})
    return vars(parser.parse_args(argv))


def folder_of(given):
    return Path(given.get("out") or f"runs/task_{given.get('task', 1)}")


def resolve(given):
    """All settings, the folder, and what is saved in it: flags that were given come before those of the run that is
    gone on with or started from, and these before the preset's."""
    folder = folder_of(given)
    saved, origin = read_state(folder), origin_of(given.get("init", SVD_REPO))
    before = saved["args"] if saved else {}
    if origin and not saved:
        before = dict(preset=origin["preset"]["name"], mv_attention=origin["mv_attention"],
                      rgb_only=origin["rgb_only"], vae=os.path.join(given["init"], origin["vae"]))
    given = {name: value for name, value in given.items() if (name, value) != ("preset", "auto")}
    kept = sorted(before.keys() - {"out", "dry_run"})
    changed = [name for name in kept if given.get(name, before[name]) != before[name]]
    holds, flag = (folder, "--out") if saved else (given.get("init"), "--init")
    for name in {"preset", "mv_attention", "rgb_only", "low_memory", "minutes"}.intersection(changed):
        raise ValueError(f"{holds} holds a run with {name} {before[name]}: use another {flag}")
    if "muon_lr" in changed and 0 in (before["muon_lr"], given["muon_lr"]):  # moments would meet other tensors
        raise ValueError(f"{holds} holds a run with muon_lr {before['muon_lr']}: it can't begin or end at 0")
    if changed:
        print("changed settings: " + ", ".join(f"{name} {before[name]} -> {given[name]}" for name in changed))
    preset = given.get("preset") or before.get("preset")
    if preset is None:
        preset, why = choose_preset()
        print(f"preset: {preset} ({why})")
    column = list(PRESETS).index(preset)
    settings = {name: value[column] if isinstance(value, list) else value[0] if isinstance(value, tuple) else value
                for name, (value, _) in FLAGS.items()}
    if given.get("low_memory"):
        settings.update(muon_lr=0.0, ema=0.0, accumulate=1)
    args = SimpleNamespace(**{**settings, **before, **given, "preset": preset})
    least = dict(steps=1, batch=1, single_batch=1, accumulate=1, warmup=1, save_every=1, views=2, seed=0, minutes=0,
                 weight_cap=0, huber=0, mask_weight=0, moving_weight=0, lambda_3d=0)
    for wrong, says in (
            *((not getattr(args, name) >= value, f"--{name} must be at least {value}, not {getattr(args, name)}")
              for name, value in least.items()),
            *((not 0 <= getattr(args, name) <= 1, f"--{name} is a share, 0 to 1, not {getattr(args, name)}")
              for name in ("single", "late", "dropout", "ema")),
            (args.seed > 10**9 or args.minutes > 10**6, "--seed is at most 10^9 and --minutes 10^6"),
            (not (0 < args.lr < 1 and 0 <= args.muon_lr < 1), f"--lr {args.lr:g} must be "
             f"above 0, --muon_lr {args.muon_lr:g} at least 0, and both below 1"),
            ({"steps", "minutes"} <= set(given), "--steps and --minutes both say how long to train: give one of them"),
            (saved and origin and "init" in changed, f"{folder} goes on from its own weights, not from --init "
             f"{args.init}: use another --out"),
            ("init" in given and not origin and preset != "svd", f"--init {args.init} is no run folder, and published "
             f"weights are for --preset svd, not {preset}"),
            (args.low_memory and (args.muon_lr or args.ema or args.accumulate > 1 or "WORLD_SIZE" in os.environ),
             "--low_memory steps AdamW inside backward: --muon_lr 0, --ema 0, --accumulate 1 and one process")):
        if wrong:
            raise ValueError(says)
    return args, folder, saved


def report(args, net, world):
    """What is trained, for how long, and the memory it takes."""
    print("  ".join(f"{name}={value}" for name, value in vars(args).items() if value != ""))
    adamw, muon = (sum(p.numel() for p in group) for group in split(net, args))
    with torch.device("meta"):
        frozen = ((2 - args.rgb_only) * count(VAE(net.preset.vae)) + count(CLIPImageEncoder(net.preset.clip))
                  if net.preset.clip else 0)
    each, low = (2, 0.81) if args.low_memory else (4, 1)
    in_clips, alone = ACTIVATIONS.get(net.preset.name, (math.nan, math.nan))  # nan: not counted yet
    frames = max(in_clips * data.FRAMES * args.batch, alone * args.single_batch * (args.single > 0))
    memory = dict(weights=each * count(net), gradients=0 if args.low_memory else 4 * (adamw + muon),
                  moments=each * (2 * adamw + muon), average=4 * count(net) * bool(args.ema), frozen=2 * frozen,
                  activations=low * frames * args.views / 2 * 2 ** 20)
    print("memory: " + ", ".join(f"{name} {size / 2 ** 30:.2f}" for name, size in memory.items())
          + f"; together {sum(memory.values()) / 2 ** 30:.1f} GiB on a GPU")
    length = f"{args.minutes:g} minutes" if args.minutes and args.dry_run else f"{args.steps} steps"
    batch = args.accumulate * world
    print(f"{count(net) / 1e6:.2f} M parameters, {(adamw + muon) / 1e6:.2f} M trained; {length}, {args.single:.0%} "
          f"on single frames, {args.single_batch * batch} view pairs a step; then {args.batch * batch} clips")


def stage_one(run_data, args, preset, folder):
    """Data and codes, where they are missing."""
    if not any(Path(run_data).glob("*/episode.json")):
        print(f"stage 1: no episodes in {run_data}: rendering the synthetic world's there (real ones: see data.py)")
        episodes, every = SCENES[preset.name]
        data.prepare(args.task, run_data, "synthetic", (preset.height, preset.width), episodes, every=every)
    if not all((folder / f"vae_{name}.json").exists() for name in ("rgb", "pointmap")[:2 - args.rgb_only]):
        print(f"stage 1: no VAE in {folder}: making it there")
        make_codes(["--task", str(args.task), "--data", str(run_data), "--preset", preset.name, "--out", str(folder),
                    "--seed", str(args.seed), "--init", args.init] + ["--rgb_only"] * args.rgb_only)


def start(args, preset, folder, saved, device):
    """The run, as sample.load_run gives it, and what trains it: average {name: tensor}, optimizers, step."""
    switches = dict(mv_attention=args.mv_attention, rgb_only=args.rgb_only)
    dtype = torch.bfloat16 if args.low_memory else torch.float32
    torch.manual_seed(args.seed)
    origin = origin_of(args.init)
    if preset.clip and not saved and not origin:
        net = Model4D.from_pretrained(preset, args.init, dtype, device, **switches)
    else:
        with torch.device("meta" if origin and not saved else device):
            net = Model4D(preset, **switches).to(dtype)
    if saved:
        net.load_state_dict(saved["model"])
    elif origin:
        load_weights(net, [Path(args.init) / "model.safetensors"], dtype, device)
    net.train().checkpointing = bool(preset.clip)  # at SVD's size activations are recomputed in backward
    average = {name: p.detach().clone() for name, p in net.named_parameters()} if args.ema else {}
    optimizers = optimizers_of(net, args)
    if saved:
        for name in average.keys() & saved["average"].keys():
            average[name].copy_(saved["average"][name])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))
    where, clip_from = Path(args.vae or folder), origin.get("init", args.init)
    vaes, clip = load_frozen(net, where, clip_from, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    bf16 = args.precision == "bf16" or args.precision == "auto" and multiplies_bf16_faster(device)
    # The cache would keep a bf16 copy of every weight until the end of forward: memory that checkpointing saves.
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not args.low_memory,
                                      cache_enabled=not net.checkpointing)
    info = dict(preset=asdict(preset), **switches, init=clip_from if preset.clip else None, task=args.task,
                seed=args.seed, dropout=args.dropout, vae=os.path.relpath(where, folder))
    return SimpleNamespace(model=net, vaes=vaes, clip=clip, info=info, folder=folder, device=device, dtype=dtype,
                           autocast=autocast, bf16=bf16, average=average, optimizers=optimizers,
                           args=args, step=saved["step"] if saved else 0)


def lock(folder):
    """Keeps other processes out of the folder until this one ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}: wait for it, or use another --out") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def main(argv=None):
    torch.set_flush_denormal(True)  # before threads start: numbers below 1e-38 slow a CPU, late in training by a third
    stop = Stop()
    rank, world, local = (int(os.environ.get(name, value)) for name, value in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    given = parse(argv)
    locked = lock(folder_of(given)) if rank == 0 and "dry_run" not in given else None  # until the process ends
    args, folder, saved = resolve(given)
    info = saved["info"] if saved else origin_of(args.init)
    preset = Preset(**info["preset"]) if info else PRESETS[args.preset]
    if preset.prediction == "v":  # SVD's VAE: latents are compared as they are, as in the paper
        if given.get("huber"):
            raise ValueError(f"--huber {args.huber:g} is for linear codes, those of tiny and small")
        args.huber = 0.0
    if args.dry_run:
        with torch.device("meta"):
            return report(args, Model4D(preset, args.mv_attention, args.rgb_only), world)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # others wait while the first does stage 1
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
    source = args.data or f"data/task_{args.task}"
    if rank == 0:
        stage_one(source, args, preset, Path(args.vae or folder))
        if saved and (weights := weights_of(folder, saved["step"])):
            os.replace(weights, folder / "model.safetensors")
    if world > 1:
        dist.barrier()
    torch.set_float32_matmul_precision("high")
    run = start(args, preset, folder, saved, device)
    run.data, run.rank, run.world = source, rank, world
    if rank == 0 and saved and not weights_of(folder, run.step):
        save(run, run.step)  # its weights are lost or damaged, and resume.pt has them
    saved = None  # it maps files that the next save replaces
    if args.minutes and not run.step:
        args.steps = steps_in(args.minutes, run)
    log = None
    if rank == 0:
        log = Log(run)
        report(args, run.model, world)
        precision = "bf16" if run.bf16 or args.low_memory else "fp32"
        print(f"training {preset.name} on {device} in {precision}, steps {run.step} to {args.steps}, in {folder}/")
    stop.saves = True
    try:
        step = train(run, log, stop)
    except BaseException as error:  # lets go of the loader, whose processes ignore the signal by which Python ends them
        traceback.clear_frames(error.__traceback__)
        raise
    if rank == 0:
        print(f"stopped at step {step}; the same command goes on from there" if step < args.steps or stop.asked else
              f"done: model.safetensors, {sheet(run, step).name} in {folder}/; next: python sample.py --run {folder}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"train.py: {str(error)[:100]}: lower --batch and --single_batch, or --low_memory")
    except (ValueError, OSError, KeyboardInterrupt) as error:  # of a loading process's the last line is the message
        raise SystemExit(f"train.py: {(str(error).strip() or 'interrupted').splitlines()[-1]}")
