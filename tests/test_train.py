"""The loss, the draws, the optimisers, resuming, stopping, processes, and the script with tiny numbers (train.py)."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import sample
import test_released as released
import train
import vae

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "data" / "recorded"
# A smaller tiny, for subprocesses too: python SCRIPT train --steps 3 ...
SMALLER = """
import sys
sys.path.insert(0, {root!r})
import model
def smaller(preset):
    preset.unet = model.unet_config((32, 48), heads=(2, 2), layers=1, latent_channels=96, context=32, groups=8,
                                    attention_levels=0)
    preset.vae = dict(patch_size=8, components=96)
    return preset
"""
SCRIPT = SMALLER + """
smaller(model.PRESETS["tiny"])
name = sys.argv.pop(1)
program = __import__(name)
program.EVAL_CLIPS = 1
try:
    program.main()
except ValueError as error:
    raise SystemExit(f"{{name}}.py: {{error}}")
"""
QUICK = ["--preset", "tiny", "--steps", "20", "--single", "0.5", "--single_batch", "2", "--batch", "1", "--warmup", "2",
         "--seed", "3", "--eval_every", "10", "--save_every", "10"]


@pytest.fixture(scope="module", autouse=True)
def smaller_tiny():
    scope, before = {}, model.PRESETS["tiny"]
    exec(SMALLER.format(root=str(ROOT)), scope)
    model.PRESETS["tiny"] = scope["smaller"](model.Preset(**vars(before)))
    train.EVAL_CLIPS = 1
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield
    model.PRESETS["tiny"] = before
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """The recorded episode, packed; and once more with its two cameras doubled, for three views."""
    folder = tmp_path_factory.mktemp("episodes")
    data.pack_folder(RECORDED, 1, folder / "two", (64, 80))
    four = folder / "four" / next((folder / "two").glob("*/")).name
    shutil.copytree(folder / "two" / four.name, four)
    for name in ("rgb", "depth", "label"):
        np.save(four / f"{name}.npy", np.load(four / f"{name}.npy")[[0, 1, 0, 1]])
    cameras = data.read_npz(four / "cameras.npz")
    data.write_npz(four / "cameras.npz", {key: value[[0, 1, 0, 1]] for key, value in cameras.items()})
    return folder


@pytest.fixture(scope="module")
def whole(episodes, tmp_path_factory):
    """20 steps in one go, across both phases, stage 1 included."""
    out = tmp_path_factory.mktemp("whole")
    train.main(["--data", str(episodes / "two"), "--out", str(out), *QUICK])
    return out


@pytest.fixture
def run(episodes, whole, tmp_path, monkeypatch):
    """run("--steps", "3") trains in this process into tmp_path/out, with the codes of `whole` and without pictures."""
    def call(*flags, out="out", source="two", show=lambda *_: None):
        monkeypatch.setattr(train, "show", show)
        folders = "--data", episodes / source, "--vae", whole, "--out", tmp_path / out
        train.main([*map(str, folders), *QUICK, *flags])
        return torch.load(tmp_path / out / "resume.pt", weights_only=True)
    return call


@pytest.fixture
def launch(episodes, whole, tmp_path):
    """The same as a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))

    def call(*flags, out="out", processes=1, **options):
        command = [sys.executable, script] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script]
        command += ["train", "--data", episodes / "two", "--vae", whole, "--out", tmp_path / out, *QUICK, *flags]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    return call


def same(a, b):
    """Two training states, bit for bit."""
    def flat(x, name=""):
        return {name: x} if torch.is_tensor(x) else {key: value for part in x for key, value in flat(
            x[part] if isinstance(x, dict) else part, f"{name}.{part}" if isinstance(x, dict) else name).items()}
    for part in ("model", "average", "optimizers"):
        x, y = (flat(dict(enumerate(s[part])) if part == "optimizers" else s[part]) for s in (a, b))
        if x.keys() != y.keys() or not all(torch.equal(x[name], y[name]) for name in x):
            return False
    return True


def wait_for(path, process, seconds=120):
    stamp, began = path.stat().st_mtime_ns if path.exists() else None, time.time()
    while not path.exists() or path.stat().st_mtime_ns == stamp:
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.time() - began < seconds
        time.sleep(0.02)


# ---- the loss and its draws

def options(**changed):
    settings = dict(weight_cap=1e9, huber=0.0, mask_weight=1.0, moving_weight=0.0, lambda_3d=1.0)
    return SimpleNamespace(**{**settings, **changed})


def masks(T=1, V=1):
    """Of pictures of 8 x 16 pixels, two cells."""
    return dict(gripper=torch.zeros(1, V, T + 1, 8, 16, dtype=torch.bool), frame_index=torch.zeros(1, T),
                moving=torch.zeros(1, V, T, 8, 16, dtype=torch.bool),
                valid=torch.ones(1, V, T + 1, 8, 16, dtype=torch.bool))


def test_loss_by_hand():
    x_0 = torch.zeros(1, 1, 2, 1, 4, 1, 2)
    D_x = torch.stack([torch.ones(1, 1, 1, 4, 1, 2), torch.full((1, 1, 1, 4, 1, 2), 2.0)], 2)     # errors 1 and 4
    item = masks()
    item["valid"][:, :, 1, :, 8:] = False                           # no depth in the second cell
    item["moving"][..., 3, 9] = True                                # something moves in the second cell
    loss = lambda sigma, **changed: train.training_loss(lambda *_: D_x, x_0, None, None, item, torch.zeros_like(x_0),
                                                        torch.tensor([sigma]), options(**changed)).item()
    assert loss(2.0, lambda_3d=3.0) == pytest.approx(5 / 4 * (1 + 3 * 4 / 2))
    assert loss(2.0, moving_weight=2.0) == pytest.approx(5 / 4 * ((1 + 3) / 2 + 4 / 2))
    assert loss(0.1) == pytest.approx(101 * 3) and loss(0.1, weight_cap=25) == pytest.approx(25 * 3)
    item["gripper"][..., 1, 0, 0] = True                         # both cells: it is in one, and beside the other
    assert loss(2.0) == pytest.approx(5 / 4 * 2 * 3)
    item["gripper"][..., 1, :, :] = False
    item["gripper"][..., 0, 0, 0] = True                         # the observed frame has no loss
    assert loss(2.0) == pytest.approx(5 / 4 * 3)


def test_robust_loss_by_hand():
    """In pixels: those far off count by their distance, and masks are those of pixels."""
    codes = {name: SimpleNamespace(decode_latents=lambda z: z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))
             for name in ("rgb", "pointmap")}
    x_0, item = torch.zeros(1, 1, 2, 1, 4, 1, 2), masks()
    loss = lambda error, **changed: train.training_loss(
        lambda *_: torch.full_like(x_0, error), x_0, None, None, item, torch.zeros_like(x_0), torch.tensor([2.0]),
        options(huber=0.01, **changed), codes).item()
    assert loss(3.0) == pytest.approx(5 / 4 * 2 * (3 - 0.01), rel=1e-4)
    assert loss(1e-3) == pytest.approx(5 / 4 * 2 * 1e-6 / 0.02, rel=0.01)           # near 0 as the squared error
    item["moving"][..., 3, 9] = True
    assert loss(3.0, moving_weight=2.0) == pytest.approx(5 / 4 * 2 * 2.99 * (1 + 2 / 128), rel=1e-4)


def test_draws_depend_on_seed_and_sample_alone():
    draws = lambda seed, P_std=1.8: train.Samples([dict(frame_index=[0, 1])] * 4000, SimpleNamespace(
        seed=seed, P_mean=1.5, P_std=P_std, dropout=0.1))
    assert draws(1)[7]["sigma"] == draws(1)[7]["sigma"] not in (draws(1)[8]["sigma"], draws(2)[7]["sigma"])
    many = [draws(0)[i] for i in range(4000)]
    ln_sigma = np.log([x["sigma"] for x in many])
    assert abs(ln_sigma.mean() - 1.5) < 0.1 and abs(ln_sigma.std() - 1.8) < 0.1
    assert np.allclose(np.mean([x["keep"].numpy() for x in many], 0), 0.9, atol=0.02)


# ---- optimisers

def test_orthogonal_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20)):
        made = train.orthogonal(matrices := torch.randn(shape))
        values = torch.linalg.svdvals(made)
        assert 0.5 < values.min() and values.max() < 1.3
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        assert (made * (u @ vt)).sum() / (made.norm() * (u @ vt).norm()) > 0.97


def test_rounding_is_right_in_the_mean_and_low_memory_follows_adamw():
    """With steps far below bf16's resolution, which rounding to the nearest would lose."""
    torch.manual_seed(0)
    target = torch.randn(2000)
    full, half = torch.nn.Parameter(torch.ones(2000)), torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    settings = dict(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    adamw, low = torch.optim.AdamW([full], **settings), train.LowMemoryAdamW([half], **settings, seed=0)
    third = torch.full((100000,), 1 / 3)
    low.begin(0)
    assert abs(low.rounded(third).mean() - 1 / 3) < 1e-5 < abs(third.bfloat16().float().mean() - 1 / 3)
    for step in range(300):
        adamw.zero_grad()
        (full - target).square().sum().backward()
        torch.nn.utils.clip_grad_norm_([full], train.CLIP_GRAD)
        adamw.step()
        low.begin(step)
        (half.float() - target).square().sum().backward()
        assert half.grad is None
    losses = [(p.detach().float() - target).square().mean().item() for p in (full, half)]
    assert losses[0] < 1.6 < 1.9 < (1 - target).square().mean() and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert {value.dtype for value in low.state[half].values()} == {torch.bfloat16}


def test_one_batch_overfits(episodes, whole):
    run = sample.load_run(whole)
    torch.manual_seed(0)
    net = model.Model4D(model.PRESETS["tiny"])
    args = SimpleNamespace(seed=0, P_mean=3.0, P_std=0.0, dropout=0.0, lr=1e-3, muon_lr=0.02, beta2=0.98,
                           low_memory=False, precision="fp32")
    clips = data.Clips(episodes / "two", "train", (64, 80), single=True)
    item = torch.utils.data.default_collate([train.Samples(clips, args)[i] for i in range(2)])
    x_0 = sample.encode_targets(run, item["rgb"][:, :, 1:], item["points"][:, :, 1:])
    cond, _ = sample.encode_conditions(run, item["rgb"][:, :, 0], item["own_points"])
    optimizers, losses, noise = train.optimizers_of(net, args), [], torch.randn_like(x_0)
    for _ in range(60):
        loss = train.training_loss(net, x_0, cond, None, item, noise, item["sigma"], options()).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


# ---- the script

def test_a_run_leaves_weights_log_and_pictures(whole):
    for name in ("model.safetensors", "model.json", "resume.pt", "sheet_000010.png", "sheet_000020.png"):
        assert (whole / name).stat().st_size > 0, name
    assert not list(whole.glob("*.partial"))
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert {"torch", "hardware", "args"} <= set(lines[0])
    last = next(line for line in lines if line.get("step") == 20 and "loss" in line)
    assert last["loss"] > 0 and last["lr"] > 0
    assert any("abs_rel-m" in line for line in lines)


def test_stopped_while_evaluating_and_gone_on_with_it_is_the_same_to_the_bit(run, whole, capsys):
    state = run(show=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert state["step"] == 11 and "stopped at step 11" in capsys.readouterr().out
    once, twice = torch.load(whole / "resume.pt", weights_only=True), run()
    assert twice["step"] == 20 and same(once, twice) and "changed" not in capsys.readouterr().out


def test_a_resumed_run_keeps_its_settings_and_tells_what_was_changed(run, tmp_path, capsys):
    run("--steps", "2", "--lr", "1e-3", "--P_mean", "2")
    state = run("--steps", "4")
    assert state["args"]["P_mean"] == 2 and state["args"]["lr"] == 1e-3 and state["step"] == 4
    assert "changed settings: steps 2 -> 4\n" in capsys.readouterr().out
    for flags, says in (("--rgb_only", "rgb_only False: use another --out"), ("--muon_lr 0", "can't begin or end at 0"),
                        ("--minutes 5", "minutes 0.0")):
        with pytest.raises(ValueError, match=says):
            run(*flags.split())
    (weights := tmp_path / "out" / "model.safetensors").unlink()
    run("--steps", "4")
    assert weights.exists()                                           # resume.pt had them
    model.PRESETS["tiny"].view_heads, before = 2, model.PRESETS["tiny"].view_heads      # a later version of the preset
    try:
        assert run("--steps", "5")["info"]["preset"]["view_heads"] == before
    finally:
        model.PRESETS["tiny"].view_heads = before


def test_minutes_become_steps_and_stay(run, monkeypatch):
    given = [flag for flag in QUICK if flag not in ("--steps", "20")]
    monkeypatch.setattr(sys.modules[__name__], "QUICK", given)
    state = run("--minutes", "0.05")
    steps = state["args"]["steps"]
    assert state["step"] == steps >= 2
    again = run("--minutes", "0.05")
    assert again["args"]["steps"] == steps
    monkeypatch.setattr(sys.modules[__name__], "QUICK", QUICK + ["--steps", str(steps)])
    assert same(state, run(out="steps"))                              # timing left nothing behind


def test_late_starts_reach_the_loader(run, monkeypatch):
    clips, late = data.Clips, []
    monkeypatch.setattr(data, "Clips", lambda *args, **given: late.append(given.get("late")) or clips(*args, **given))
    run("--late", "0.5", "--steps", "2", "--eval_every", "100")
    assert 0.5 in late and train.resolve(dict(preset="small", out="nowhere"))[0].late == 0.7


def test_without_an_average_the_weights_are_written_once(run, tmp_path):
    flags = ["--ema", "0", "--save_every", "2", "--eval_every", "100", "--steps", "4"]
    before = run(*flags, "--single", "0")
    assert before["model"] is None
    weights = tmp_path / "out" / "model.safetensors"
    newer = weights.read_bytes()
    run(*flags, "--steps", "6", "--single", "0")
    os.replace(weights, tmp_path / "out" / "model.safetensors.partial")      # as a kill between the renames leaves it
    weights.write_bytes(newer)
    state, whole = train.read_state(tmp_path / "out"), train.weights_of(tmp_path / "out", 6)
    assert state["step"] == 6 and whole.suffix == ".partial"
    assert all(torch.equal(state["model"][name], value) for name, value in load_file(whole).items())
    run(*flags, "--steps", "6", "--single", "0")
    assert train.weights_of(tmp_path / "out", 6) == weights
    weights.write_bytes(newer)
    with pytest.raises(ValueError, match="or of another step"):
        train.read_state(tmp_path / "out")


def test_ablations_low_memory_three_views_and_bf16_train_and_sample(run, tmp_path):
    short, show = ["--steps", "2", "--eval_every", "2"], train.show
    for name, flags in dict(none="--mv_attention none", rgb="--rgb_only --mv_attention rgb", plain="--rgb_only",
                            low="--low_memory", bf16="--precision bf16", fp32="--precision fp32").items():
        run(*short, *flags.split(), out=name, show=show)
        loaded = sample.load_run(tmp_path / name)
        assert ("pointmap" in loaded.vaes) == ("--rgb_only" not in flags)
        assert (tmp_path / name / "sheet_000002.png").exists()
    assert {x.dtype for x in load_file(tmp_path / "low" / "model.safetensors").values()} == {torch.bfloat16}
    bf16, fp32 = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "fp32"))
    assert all(x.dtype == torch.float32 for x in bf16.values()) and any((bf16[key] != fp32[key]).any() for key in fp32)
    run(*short, "--views", "3", out="three", source="four")
    with pytest.raises(ValueError, match="2 cameras"):
        run(*short, "--views", "3", out="too_many")


def test_a_run_starts_from_another(run, whole, tmp_path):
    """Its weights, codes and switches; and resumes without looking there again for weights."""
    still = ["--init", str(whole), "--steps", "1", "--lr", "1e-12", "--muon_lr", "0", "--ema", "0", "--vae", str(whole)]
    run(*still)
    started, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", whole))
    assert all((started[name] - value).abs().max() < 1e-9 for name, value in before.items())
    assert run(*still, "--steps", "2")["step"] == 2
    with pytest.raises(ValueError, match="rgb_only False: use another --init"):
        run(*still, "--rgb_only", out="other")
    guided = sample.load_run(tmp_path / "out")
    assert guided.info["dropout"] == 0
    with pytest.raises(ValueError, match="--guidance must be 1"):
        sample.predict(guided, {}, guidance=2.0)


def test_a_run_starts_from_released_weights(tmp_path, monkeypatch):
    """The preset, both VAEs, and CLIP from where the folder says."""
    keys = released.FIXTURE["keys"]
    state = {key: released.made(key.replace("diffusion_model_2", "diffusion_model"), keys[key]) for key in keys}
    torch.save(dict(state_dict=state), tmp_path / "4dgen.ckpt")
    encoder = tmp_path / "hub" / "image_encoder"
    encoder.mkdir(parents=True)
    data.write_json(encoder / "config.json", released.SMALL.clip)
    save_file(model.CLIPImageEncoder(released.SMALL.clip).state_dict(), encoder / "model.safetensors")
    sample.convert_released(tmp_path / "4dgen.ckpt", tmp_path / "run", released.SMALL, str(tmp_path / "hub"))
    data.pack_folder(RECORDED, 1, tmp_path / "data", (released.SMALL.height, released.SMALL.width))
    monkeypatch.setattr(train, "show", lambda *_: None)
    train.main(["--init", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
                "--steps", "1", "--single", "0", "--batch", "1", "--lr", "1e-9", "--muon_lr", "0", "--ema", "0"])
    started, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "run"))
    assert all((started[name] - value).abs().max() < 1e-6 for name, value in before.items())
    assert sample.load_run(tmp_path / "out").model.preset.tokens == "crossed"


def test_steps_that_go_wrong_stop_before_the_weights_are_touched(run, monkeypatch, tmp_path):
    good = run("--steps", "4", "--save_every", "2", "--eval_every", "100")
    with pytest.raises(ValueError, match="lr 1e.20"):
        run("--steps", "6", "--lr", "1e20")
    loss = train.training_loss
    broken = lambda net, *args: loss(net, *args) + 0 * (0 * next(net.parameters()).sum()).sqrt()   # gradient: 0 * inf
    monkeypatch.setattr(train, "training_loss", broken)
    with pytest.raises(ValueError, match="not finite at step 4"):
        run("--steps", "6", "--save_every", "1")
    monkeypatch.setattr(train, "training_loss", loss)
    assert same(good, torch.load(tmp_path / "out" / "resume.pt", weights_only=True))
    monkeypatch.setattr(train, "EXPLODED", 1e-3)
    with pytest.raises(ValueError, match="a weight has grown"):
        run("--steps", "6", "--save_every", "1")
    assert same(good, torch.load(tmp_path / "out" / "resume.pt", weights_only=True))


@pytest.mark.parametrize("flags, says", [
    (["--preset", "svd", "--huber", "0.01"], "--huber 0.01 is for linear codes"),
    (["--steps", "0"], "--steps must be at least 1"), (["--single", "2"], "--single is a share"),
    (["--late", "-1"], "--late is a share"),
    (["--weight_cap", "-1"], "--weight_cap"), (["--dropout", "1.5"], "--dropout"), (["--seed", "9" * 14], "--seed is"),
    (["--init", "DIR"], "DIR is no run folder"), (["--minutes", "3"], "one of them"), (["--views", "1"], "at least 2"),
    (["--mv_attention", "rgb"], "rgb_only"), (["--low_memory", "--ema", "0.9"], "--ema 0")])
def test_wrong_flags_are_named(run, flags, says):
    with pytest.raises(ValueError, match=says):
        run(*flags)


def test_compile_is_left_out_on_a_cpu(capsys):
    given = SimpleNamespace(model=object(), args=SimpleNamespace(compile=True), device=torch.device("cpu"), world=1)
    assert train.wrapped(given, True) is given.model and "left out" in capsys.readouterr().out


def test_codes_of_another_preset_are_refused(run, tmp_path):
    for kind in vae.KINDS:
        vae.save_vae(tmp_path / f"vae_{kind}.safetensors", vae.LinearCode(dict(patch_size=8, components=12)), {})
    with pytest.raises(ValueError, match="no code of preset tiny"):
        run("--vae", str(tmp_path))


def test_help_and_dry_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "None" not in (text := capsys.readouterr().out) and "[data/task_N]" in text
    train.main(["--preset", "svd", "--out", str(tmp_path / "out"), "--dry_run"])
    text = capsys.readouterr().out
    assert "gradients 8.66" in text and "moments 17.32" in text and "frozen 1.54" in text
    assert not list(tmp_path.iterdir())
    train.main(["--preset", "svd", "--out", str(tmp_path / "out"), "--dry_run", "--low_memory"])
    assert "weights 4.47" in (text := capsys.readouterr().out) and "moments 8.66" in text


def test_numbers_too_small_to_matter_are_zero(tmp_path):
    """Below 1e-38 arithmetic on a CPU is many times slower, and the longer a network learns the more of it there is."""
    supported = torch.set_flush_denormal(False)
    assert (torch.tensor([2e-38]) / 10).item() > 0
    train.main(["--out", str(tmp_path / "out"), "--dry_run"])
    assert ((torch.tensor([2e-38]) / 10).item() == 0) == supported


def test_a_damaged_checkpoint_is_named(run, whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "resume.pt").write_bytes((whole / "resume.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="resume.pt is damaged"):
        run()


# ---- processes

def test_an_error_in_a_loading_process_ends_training(launch, episodes, tmp_path):
    shutil.copytree(episodes / "two", tmp_path / "cut")
    depth = next((tmp_path / "cut").glob("*/depth.npy"))
    depth.write_bytes(depth.read_bytes()[:len(depth.read_bytes()) // 2])
    process = launch("--workers", "1", "--data", tmp_path / "cut")
    assert process.wait(100) and "depth.npy" in process.stderr.read()


def test_two_processes_equal_accumulation(run, launch, tmp_path):
    flags = ["--steps", "4", "--eval_every", "100", "--precision", "fp32"]
    process = launch(*flags, "--accumulate", "1", out="two", processes=2)
    one = run(*flags, "--accumulate", "2", out="one")
    assert process.wait(120) == 0, process.stderr.read()[-2000:]
    two = torch.load(tmp_path / "two" / "resume.pt", weights_only=True)
    torch.manual_seed(3)                                              # where both began
    start = model.Model4D(model.PRESETS["tiny"]).state_dict()
    for name, value in one["model"].items():
        assert (value - two["model"][name]).abs().max() < 2e-3, name
    assert max((value - start[name]).abs().max() for name, value in one["model"].items()) > 0.01
    exact = [(a["exp_avg"] - b["exp_avg"]).abs().max() / (a["exp_avg"].abs().max() + 1e-6)
             for a, b in zip(one["optimizers"][0].values(), two["optimizers"][0].values())]
    assert max(exact) < 0.1


def test_killed_at_any_moment_it_leaves_something_to_go_on_from(launch, tmp_path):
    flags, last = ["--steps", "200", "--save_every", "1", "--eval_every", "1000"], 0
    file = tmp_path / "out" / "resume.pt"
    for wait in (0.0, 0.31):                                          # seconds after the first save of each attempt
        process = launch(*flags)
        wait_for(file, process)
        second = launch(*flags, "--seed", "9")
        time.sleep(wait)
        if not last:
            assert second.wait(60) and "another process is training" in second.stderr.read()
        else:
            second.kill()
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = train.read_state(tmp_path / "out")
        assert state["step"] > last
        assert state["model"].keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
        last = state["step"]


@pytest.mark.parametrize("how, processes, workers", [("group", 1, 2), ("ctrl-c", 1, 0), ("one", 2, 0)])
def test_a_stopped_run_saves_and_says_so(launch, tmp_path, how, processes, workers):
    """A signal to the whole group, loading processes included (schedulers, `timeout`); Ctrl-C; to one of two ranks."""
    file = tmp_path / "out" / "resume.pt"
    process = launch("--steps", "5000", "--save_every", "3", "--eval_every", "9999", "--workers", workers,
                     processes=processes, start_new_session=True)
    wait_for(file, process)
    if how == "group":
        os.killpg(process.pid, signal.SIGTERM)
    elif how == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    step = torch.load(file, weights_only=True)["step"]
    assert process.returncode == 0 and f"stopped at step {step};" in out and "Traceback" not in err, err[-2000:]
