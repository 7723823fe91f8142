"""The loss, the draws, resuming, processes, and the training script end to end with tiny numbers (train.py)."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data as D
import model as M
import sample as S
import train as T
import vae as V

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "data" / "recorded"
TINY = ["--preset", "tiny", "--single", "0.5", "--single_batch", "2", "--batch", "1", "--eval_clips", "1",
        "--warmup", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A packed recorded episode and two untrained VAEs: (data folder, VAE folder)."""
    folder = tmp_path_factory.mktemp("stage_one")
    D.pack_folder(RECORDED, 1, folder / "data", (64, 80))
    torch.manual_seed(0)
    for name in ("rgb", "pointmap"):
        V.save_vae(folder / f"vae_{name}.safetensors", V.VAE.from_config(M.PRESETS["tiny"].vae), {})
    return folder / "data", folder


class Rates:
    lr, muon_lr, betas, weight_decay = 1e-3, 0.02, (0.9, 0.98), 0.01


def run(stage_one, out, *arguments, processes=1, check=True, environment=None):
    data, vae = stage_one
    command = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                       "--nproc_per_node", str(processes)]
    command += [ROOT / "train.py", "--data", data, "--vae", vae, "--out", out, *TINY, *arguments]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or result.returncode == 0, result.stderr[-2000:]
    return result


def weights(out, name="resume.safetensors"):
    return load_file(Path(out) / name)


# ---- the loss and its draws

def test_loss_by_hand():
    D_x, x_0 = torch.zeros(1, 1, 2, 1, 4, 1, 2), torch.zeros(1, 1, 2, 1, 4, 1, 2)
    D_x[0, 0, 0] = 1.0                                              # RGB: error 1 in both cells
    D_x[0, 0, 1] = 2.0                                              # pointmap: error 4 in both cells
    gripper = torch.tensor([[[[[True, False]]]]])                   # (B, V, T, h, w)
    valid = torch.tensor([[[[[1.0, 0.0]]]]])                        # the second cell has no depth
    loss, parts = T.diffusion_loss(D_x, x_0, torch.tensor([2.0]), gripper, valid, mask_weight=1.0, lambda_3d=3.0)
    assert parts[0, 0].tolist() == [(1 * 2 + 1) / 2, (4 * 2 + 0) / 2]
    assert loss.item() == pytest.approx((4 + 1) / 4 * (1.5 + 3.0 * 4.0))


def test_invalid_pixels_have_no_gradient():
    D_x = torch.randn(1, 2, 2, 1, 4, 2, 2, requires_grad=True)
    valid = torch.ones(1, 2, 1, 2, 2)
    valid[..., 0, 0] = 0
    loss, _ = T.diffusion_loss(D_x, torch.zeros_like(D_x), torch.ones(1),
                               torch.zeros(1, 2, 1, 2, 2, dtype=torch.bool), valid, 1.0, 1.0)
    loss.sum().backward()
    assert (D_x.grad[:, :, 1, ..., 0, 0] == 0).all() and (D_x.grad[:, :, 0, ..., 0, 0] != 0).all()


def test_cell_masks():
    mask = torch.zeros(1, 1, 1, 64, 80, dtype=torch.bool)
    mask[..., 20, 41] = True                                        # cell (2, 5)
    cells = T.cell_mask(mask, 8)
    assert (cells.shape == (1, 1, 1, 8, 10)
            and cells[0, 0, 0].nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (4, 5, 6)])
    assert T.cell_valid(mask, 8)[0, 0, 0, 2, 5] == 1 / 64


def test_draws_depend_on_seed_and_sample_alone():
    draw = lambda seed, i: T.draw_noise(seed, i, (2, 2, 1, 3, 4, 5), 1.5, 1.8, 0.1)
    assert torch.equal(draw(1, 7)[0], draw(1, 7)[0]) and draw(1, 7)[1:] == draw(1, 7)[1:]
    assert not torch.equal(draw(1, 7)[0], draw(1, 8)[0]) and draw(1, 7)[1] != draw(2, 7)[1]
    many = [T.draw_noise(0, i, (1,), 1.5, 1.8, 0.1) for i in range(4000)]
    ln_sigma = np.log([x[1] for x in many])
    assert abs(ln_sigma.mean() - 1.5) < 0.1 and abs(ln_sigma.std() - 1.8) < 0.1
    assert abs(np.mean([not x[2] for x in many]) - 0.1) < 0.02 and abs(np.mean([not x[3] for x in many]) - 0.1) < 0.02


def test_two_processes_share_out_the_samples_of_one():
    class args:
        steps, single, single_batch, batch = 4, 0.5, 3, 2
    args.accumulate = 2
    alone = [list(b) for b in T.index_batches(args, 0, 1, 0, 4)]
    args.accumulate = 1
    two = [[list(b) for b in T.index_batches(args, rank, 2, 0, 4)] for rank in (0, 1)]
    assert alone == [b for pair in zip(*two) for b in pair]
    flat = [i for b in alone for i in b]
    assert len(flat) == len(set(flat))
    args.accumulate = 2
    assert [list(b) for b in T.index_batches(args, 0, 1, 3, 4)] == alone[6:]


def test_one_batch_overfits(stage_one):
    data, folder = stage_one
    torch.manual_seed(0)
    preset = M.PRESETS["tiny"]
    model = M.Model4D(preset)
    vaes, clip = S.load_frozen(model, folder, "scratch")
    item = torch.utils.data.default_collate([D.Clips(data, "train", (64, 80), single=True)[i] for i in range(2)])
    with torch.no_grad():
        x_0 = S.encode_targets(model, vaes, item["rgb"][:, :, 1:], item["points"][:, :, 1:])
        cond, _ = S.encode_conditions(model, vaes, clip, item["rgb"][:, :, 0], item["own_points"])
    x_0 = (x_0 - x_0.mean()) / x_0.std()
    sigma = torch.full((2,), 20.0)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    optimizers = T.optimizers_of(model, Rates)
    still = torch.zeros(x_0.shape[0], 2, 1, *x_0.shape[-2:], dtype=torch.bool)
    losses = []
    for _ in range(60):
        D_x = model(x_0 + sigma[0] * noise, sigma, cond, None, item["frame_index"])
        loss = T.diffusion_loss(D_x, x_0, sigma, still, torch.ones(still.shape), 1.0, 1.0)[0].mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- the script

@pytest.fixture(scope="module")
def whole_run(stage_one, tmp_path_factory):
    """20 steps in one go, across both phases."""
    out = tmp_path_factory.mktemp("whole")
    run(stage_one, out, "--steps", "20", "--eval_every", "10", "--save_every", "10")
    return out


def test_a_run_leaves_weights_log_and_pictures(whole_run):
    for name in ("model.safetensors", "model.json", "resume.safetensors", "loss.png",
                 "sheet_000010.png", "sheet_000020.png"):
        assert (whole_run / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert {"torch", "device", "args"} <= set(lines[0])
    assert (any(line.get("step") == 20 and "loss" in line for line in lines)
            and any("abs_rel_m" in line for line in lines))


def test_ten_and_ten_steps_are_twenty_bit_for_bit(stage_one, whole_run, tmp_path):
    options = ["--steps", "20", "--eval_every", "10", "--save_every", "10"]
    run(stage_one, tmp_path, *options, "--stop_after", "10")
    assert "changed settings" not in run(stage_one, tmp_path, *options).stdout
    once, twice = weights(whole_run), weights(tmp_path)
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)
    steps = [json.loads(line).get("step") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps.count(20) == steps.count(10) == 2                  # a training line and an evaluation each, none twice


def test_changed_settings_of_a_resumed_run_are_told(stage_one, tmp_path):
    run(stage_one, tmp_path, "--steps", "2")
    assert ("changed settings: steps 2 -> 3, lr 0.002 -> 0.001"
            in run(stage_one, tmp_path, "--steps", "3", "--lr", "0.001").stdout)


def test_two_processes_equal_accumulation(stage_one, tmp_path):
    options = ["--steps", "4", "--eval_every", "100"]
    run(stage_one, tmp_path / "one", *options, "--accumulate", "2")
    run(stage_one, tmp_path / "two", *options, "--accumulate", "1", processes=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    worst = max((one[key] - two[key]).abs().max().item() for key in one if key.startswith("model."))
    assert worst < 1e-4
    moved = max((one[key] - value).abs().max().item()
                for key, value in weights(tmp_path / "one").items() if "exp_avg" in key)
    assert moved == 0


def test_killed_at_any_moment_it_leaves_something_to_go_on_from(stage_one, tmp_path):
    data, vae = stage_one
    command = [sys.executable, ROOT / "train.py", "--data", data, "--vae", vae, "--out", tmp_path, *TINY,
               "--steps", "200", "--save_every", "1", "--eval_every", "1000"]
    last = 0
    for wait in (0.3, 0.7, 1.1):                                    # seconds after the first save of each attempt
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        file, before = tmp_path / "resume.safetensors", time.time()
        stamp = file.stat().st_mtime_ns if file.exists() else None
        while ((not file.exists() or file.stat().st_mtime_ns == stamp)
               and process.poll() is None and time.time() - before < 60):
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        model = M.Model4D(M.PRESETS["tiny"])
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
        step, _ = T.resume(file, model, average, T.optimizers_of(model, Rates))
        assert step > last
        last = step
        S.load_run(tmp_path)


def test_ctrl_c_saves_and_the_same_command_goes_on(stage_one, tmp_path):
    data, vae = stage_one
    command = [sys.executable, "-u", ROOT / "train.py", "--data", data, "--vae", vae, "--out", tmp_path, *TINY,
               "--steps", "400"]
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step 0 to 400" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert "the same command goes on from there" in output and "Traceback" not in errors
    assert 0 < json.loads((tmp_path / "model.json").read_text())["step"] < 400


def test_sample_command_runs_on_what_training_left(stage_one, whole_run, tmp_path):
    data, _ = stage_one
    result = subprocess.run([sys.executable, ROOT / "sample.py", "--run", whole_run, "--data", data, "--steps", "2",
                             "--out", tmp_path / "s", "--ply"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "recovered camera pose is off by" in result.stdout
    with np.load(tmp_path / "s" / "prediction.npz", allow_pickle=False) as prediction:
        assert prediction["rgb"].shape == (2, 10, 64, 80, 3) and prediction["points"].shape == (2, 10, 64, 80, 3)
        assert prediction["true_gripper_in_ref"].shape == (11, 2, 4, 4) and prediction["view_in_ref"].shape == (2, 4, 4)


@pytest.mark.parametrize("switches", [["--mv_attention", "none"], ["--rgb_only"],
                                      ["--rgb_only", "--mv_attention", "rgb"]])
def test_ablations_train_and_sample(stage_one, tmp_path, switches):
    run(stage_one, tmp_path, "--steps", "2", "--eval_every", "2", *switches)
    model, vaes, _ = S.load_run(tmp_path)
    assert ("pointmap" in vaes) == ("--rgb_only" not in switches) and (tmp_path / "sheet_000002.png").exists()


def test_three_views_train(stage_one, tmp_path):
    result = run(stage_one, tmp_path, "--views", "3", "--steps", "2", check=False)
    # the episode has only two
    assert result.returncode and "2 cameras" in result.stderr and "Traceback" not in result.stderr


def test_dry_run_prints_and_writes_nothing(stage_one, tmp_path):
    result = run(stage_one, tmp_path / "out", "--dry_run", "--steps", "7")
    assert "parameters:" in result.stdout and "memory:" in result.stdout and "steps=7" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, says", [
    (["--steps", "0"], "--steps must be at least 1"), (["--single", "2"], "--single is a share"),
    (["--init", "hub"], "from scratch"), (["--preset", "svd", "--init", "scratch"], "published weights"),
    (["--views", "1"], "--views must be at least 2"), (["--mv_attention", "rgb"], "rgb_only"),
])
def test_wrong_flags_are_named(stage_one, tmp_path, arguments, says):
    result = run(stage_one, tmp_path, *arguments, check=False)
    assert result.returncode and says in result.stderr and "Traceback" not in result.stderr


def test_a_damaged_checkpoint_is_named(stage_one, whole_run, tmp_path):
    (tmp_path / "resume.safetensors").write_bytes((whole_run / "resume.safetensors").read_bytes()[:5000])
    result = run(stage_one, tmp_path, "--steps", "20", check=False)
    assert result.returncode and "can't be resumed" in result.stderr and "Traceback" not in result.stderr
