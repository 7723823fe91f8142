"""Our U-Net beside diffusers' on the CPU: time and peak memory of forward and of forward + backward, in one run.

    pip install diffusers && python tests/bench_cpu.py [--threads 2] [--rounds 3] [--size 32 40]

Every measurement runs in a process of its own and the two implementations take turns, so that neither gains from a warm
cache or a quiet minute. Time is the median of all runs, wall clock and CPU seconds; memory is the process's peak beyond
what it held with the weights in. Weights and inputs are the same in both, so their outputs are compared as well.
Expected: all ratios <= 1.
"""
import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def unet_config(channels):
    cross = ["CrossAttnDownBlockSpatioTemporal"] * (len(channels) - 1) + ["DownBlockSpatioTemporal"]
    return dict(in_channels=8, out_channels=4, block_out_channels=channels, layers_per_block=2,
                num_attention_heads=[c // 64 for c in channels], transformer_layers_per_block=1,
                cross_attention_dim=1024, addition_time_embed_dim=256, projection_class_embeddings_input_dim=768,
                down_block_types=cross, up_block_types=[name.replace("Down", "Up") for name in cross[::-1]],
                num_frames=10, sample_size=40)


def memory(field):
    """VmRSS (now) or VmHWM (peak) of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024


def measure(args):
    """The child process: prints one JSON line."""
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = unet_config(args.channels)
    if args.child == "diffusers":
        from diffusers import UNetSpatioTemporalConditionModel
        unet = UNetSpatioTemporalConditionModel(**config)
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from model import UNet
        unet = UNet(config)
    with torch.no_grad():                              # the same weights whatever the order in which modules were made
        for name, p in sorted(unet.named_parameters()):
            values = torch.randn(p.shape)
            p.copy_(values / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.1 * values)
    inputs = (torch.randn(1, args.frames, 8, *args.size), torch.tensor([0.7]), torch.randn(1, 1, 1024),
              torch.tensor([[6.0, 127.0, 0.02]]))
    backward = args.mode == "forward+backward"
    unet.train(backward)

    def run():
        with torch.set_grad_enabled(backward):
            y = unet(*inputs, return_dict=False)[0] if args.child == "diffusers" else unet(*inputs)
        if backward:
            unet.zero_grad(set_to_none=True)
            y.square().mean().backward()
        return y.detach()

    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")      # sets the peak back to now
    y, wall, cpu = run(), [], []
    for _ in range(args.repeats):
        w, c = time.perf_counter(), time.process_time()
        y = run()
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    print(json.dumps(dict(wall=wall, cpu=cpu, memory=memory("VmHWM") - before, norm=float(y.double().norm()))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="[2]")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each implementation and mode [3]")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each process, after one to warm up [3]")
    parser.add_argument("--frames", type=int, default=10, help="[10]")
    parser.add_argument("--size", type=int, nargs=2, default=[32, 40], help="height and width of the latents [32 40]")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256, 256], help="[64 128 256 256]")
    parser.add_argument("--child", choices=["diffusers", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=["forward", "forward+backward"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args)
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads))
    results = {}
    for turn in range(args.rounds):
        for mode in ("forward", "forward+backward"):
            for child in ("diffusers", "ours") if turn % 2 == 0 else ("ours", "diffusers"):
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", child, "--mode", mode],
                                      capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise SystemExit(f"{child} failed: {done.stderr.strip().splitlines()[-1]}")
                results.setdefault((mode, child), []).append(json.loads(done.stdout.splitlines()[-1]))
    print(" " * 28 + "    wall s     CPU s  peak MiB   output norm")
    for mode in ("forward", "forward+backward"):
        rows = {}
        for child in ("diffusers", "ours"):
            runs = results[mode, child]
            rows[child] = [statistics.median(t for run in runs for t in run["wall"]),
                           statistics.median(t for run in runs for t in run["cpu"]), max(run["memory"] for run in runs)]
            print("{:18s}{:10s}{:10.3f}{:10.3f}{:10.0f}{:14.6f}".format(mode, child, *rows[child], runs[0]["norm"]))
        ratios = [ours / theirs for ours, theirs in zip(rows["ours"], rows["diffusers"])]
        print("{:18s}{:10s}{:10.3f}{:10.3f}{:10.3f}".format(mode, "ratio", *ratios))


if __name__ == "__main__":
    main()
