"""Memory of a training step on a GPU, counted without one: `svd` within 48 GB, and with --low_memory within 24.

On the meta device tensors have sizes and no contents. train.py's step runs there by the rules of CUDA's autocast,
attention and optimiser kernels. Not counted: the CUDA context and libraries' workspaces, for which 1 GiB is left.
"""
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from weakref import finalize

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import train
from data import FRAMES
from model import PRESETS, CLIPImageEncoder, Model4D
from vae import build


class Meter(TorchDispatchMode):
    """Bytes in all tensors that are alive, and the most that there were."""
    live, peak, known = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]:
            if storage not in self.known:
                self.known[storage] = size = -(-storage.nbytes() // 512) * 512       # as CUDA's allocator rounds
                self.live, self.peak = self.live + size, max(self.peak, self.live + size)
                finalize(storage, lambda size=size: setattr(self, "live", self.live - size))
        return out


@pytest.fixture
def autocast(monkeypatch):
    """Makes the meta device behave as a GPU does. `on` says whether autocast's rules hold."""
    state, flash = SimpleNamespace(on=False), torch.ops.aten._scaled_dot_product_flash_attention

    def by_rule(function, dtype):
        cast = lambda x: x.to(dtype) if state.on and isinstance(x, torch.Tensor) else x
        return lambda *args, **named: function(*map(cast, args), **{key: cast(x) for key, x in named.items()})

    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: flash(*qkv)[0])
    for name in ("scaled_dot_product_attention", "linear", "conv2d", "group_norm", "layer_norm"):
        dtype = torch.float32 if "norm" in name else torch.bfloat16
        monkeypatch.setattr(F, name, by_rule(getattr(F, name), dtype))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())           # the codes switch it off
    monkeypatch.setattr(train.LowMemoryAdamW, "begin", lambda self, step: setattr(self, "count", 1))
    monkeypatch.setattr(torch, "Generator", type("Nothing", (), dict(__new__=lambda *_: None)))
    for name in ("_get_fused_kernels_supported_devices", "_get_foreach_kernels_supported_devices"):
        monkeypatch.setattr(sys.modules["torch.optim.optimizer"], name, lambda: ["meta"])
    return state


def peak_of_a_step(args, autocast, B, T):
    """GiB, where gradients of earlier batches are there."""
    preset, V, low, e, args.accumulate = PRESETS[args.preset], args.views, args.low_memory, torch.empty, 1
    with torch.device("meta"), Meter() as meter:
        net = Model4D(preset).to(torch.bfloat16 if low else torch.float32)
        vaes = {kind: build(preset.vae).bfloat16().requires_grad_(False) for kind in ("rgb", "pointmap")}
        clip = CLIPImageEncoder(preset.clip).bfloat16() if preset.clip else None
        net.train().checkpointing = bool(preset.clip)
        run = SimpleNamespace(model=net, vaes=vaes, clip=clip, args=args, dtype=net.unet.conv_in.weight.dtype, world=1,
                              average=[torch.empty_like(p) for p in net.parameters() if args.ema],
                              optimizers=train.optimizers_of(net, args),
                              autocast=lambda: setattr(autocast, "on", not low) or nullcontext())
        P, C, cell = (preset.height, preset.width), preset.unet["in_channels"] // 2, vaes["rgb"].cell
        masks = dict(valid=e(B, V, T + 1, *P) > 0, gripper=e(B, V, T + 1, *P) > 0, moving=e(B, V, T, *P) > 0)
        item = dict(masks, rgb=e(B, V, T + 1, 3, *P), points=e(B, V, T + 1, 3, *P), own_points=e(B, V, 3, *P),
                    sigma=e(B), keep=e(B, 2), frame_index=e(B, T), noise=e(B, V, 2, T, C, P[0] // cell, P[1] // cell))
        for p in (trained := [p for p in net.parameters() if p.requires_grad]):
            p.grad = None if low else torch.empty_like(p)
            run.optimizers[0].state[p].update(dict(m=torch.empty_like(p), v=torch.empty_like(p)) if low else {})
    with meter:
        for first in (True, False):                                                  # makes the optimiser's state
            if not first:
                train.gradients(net, run, iter([item]), 0, 1.0)
                autocast.on = False
            torch.nn.utils.clip_grad_norm_(trained, train.CLIP_GRAD)
            [optimizer.step() for optimizer in run.optimizers]
    return meter.peak / 2 ** 30


@pytest.mark.parametrize("flags, most", [("svd", 48), ("svd --low_memory", 24), ("small", 16), ("tiny", 8)])
def test_a_training_step_fits_and_dry_run_says_so(flags, most, autocast, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "out"), "--preset", *flags.split()]
    train.main([*flags, "--dry_run"])
    printed = float(re.search(r"together ([\d.]+) GiB", capsys.readouterr().out)[1])
    args = train.resolve(train.parse(flags))[0]
    phases = [(args.batch, FRAMES), (args.single_batch, 1)][:1 + (args.single > 0)]
    counted = max(peak_of_a_step(args, autocast, *phase) for phase in phases)
    assert counted + 1 < most and printed == pytest.approx(counted, abs=0.06), (counted, printed)
