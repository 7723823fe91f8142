"""Stable Video Diffusion, exactly: parity with the reference implementations, the published sizes, and loading.

tests/data/golden.* hold float64 outputs of diffusers' and transformers' modules. Weights and inputs are not stored:
`fill` makes them again from the parameters' names.
"""
import fnmatch
import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import model
from model import PRESETS, SVD_REPO, CLIPImageEncoder, Model4D, Preset, UNet, clip_preprocess, count, precondition
from vae import VAE

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "golden.safetensors")
CONFIGS = json.loads((DATA / "golden.json").read_text())
MANIFEST = json.loads(gzip.decompress((DATA / "manifest_svd.json.gz").read_bytes()))


def fill(name, shape):
    """Standard normals from PCG64 seeded with the crc32 of the name, scaled by the kind of parameter."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(shape))
    if name.endswith("mix_factor"):
        values = 0.3 + 0.9 * values
    elif not name.startswith("input."):
        if len(shape) >= 2 and "embedding.weight" not in name:
            values = values / np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and not name.endswith("bias"):
            values = 1 + 0.3 * values
        else:
            values = 0.2 * values
    return torch.from_numpy(values)


@torch.no_grad()
def filled(module):
    module.double().eval()
    for name, parameter in module.named_parameters():
        parameter.copy_(fill(name, parameter.shape))
    return module


def made(name, *shape):
    return fill("input." + name, shape)


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------------ golden values

UNET_CASES = dict(one=((1, 3, 8, 8, 12), 1, [1.6377], [[6, 127, 0.02]]),
                  two=((2, 4, 8, 4, 8), 3, [-0.7, 0.9], [[6, 127, 0.02], [9, 40, 0.1]]),
                  still=((1, 1, 8, 8, 8), 1, [-1.55], [[0, 0, 0.0]]))


def golden_frequencies(width, dtype, device):
    """The sinusoids' frequencies as the computer of the golden file rounded them.

    float32 exp differs between processors by one unit in the last place, at one or two of these 32 numbers, and the
    whole network in float64 shows it (3e-9). There, number 11 of 32 (0.496 units above its neighbour below) was rounded
    up; the others correctly."""
    assert dtype == torch.float32
    exact = torch.exp((-np.log(10000) * torch.arange(32, dtype=torch.float32) / 32).double()).float()
    exact[11] = torch.nextafter(exact[11], torch.tensor(1.0))
    return exact[::32 // width].to(device)


@torch.no_grad()
@pytest.mark.parametrize("case", UNET_CASES)
def test_unet_golden(case, monkeypatch):
    for width in (8, 16, 32):                   # the pinned table is float32's, to one unit in the last place
        ours = model.frequencies(width, torch.float32, "cpu")
        assert torch.allclose(golden_frequencies(width, torch.float32, "cpu"), ours, rtol=1.2e-7, atol=0)
    monkeypatch.setattr(model, "frequencies", golden_frequencies)
    shape, tokens, timestep, ids = UNET_CASES[case]
    output = filled(UNet(CONFIGS["unet"]))(
        made(f"unet.{case}.sample", *shape), torch.tensor(timestep, dtype=torch.float64),
        made(f"unet.{case}.image_embeds", shape[0], tokens, 24), torch.tensor(ids, dtype=torch.float64))
    assert difference(output, GOLDEN[f"unet.{case}"]) < 1e-10


@torch.no_grad()
def test_vae_golden():
    coder = filled(VAE(CONFIGS["vae"]))
    mean, logvar = coder.encode(made("vae.images", 2, 3, 16, 24))
    assert difference(mean, GOLDEN["vae.mean"]) < 1e-10
    assert difference(logvar, GOLDEN["vae.logvar"]) < 1e-10
    assert difference(coder.decode(made("vae.latents", 4, 4, 4, 6), 4), GOLDEN["vae.video"]) < 1e-10
    assert difference(coder.decode(made("vae.latents_two", 6, 4, 4, 4), 3), GOLDEN["vae.two_videos"]) < 1e-10


@torch.no_grad()
def test_clip_golden():
    clip = filled(CLIPImageEncoder(CONFIGS["clip"]))
    assert difference(clip(made("clip.pixels", 2, 3, 224, 224)), GOLDEN["clip.embeds"]) < 1e-10


@pytest.mark.parametrize("size", [(256, 320), (64, 80), (300, 224)])
def test_clip_preprocess_golden(size):
    name = f"preprocess.{size[0]}x{size[1]}"
    image = torch.tanh(made(name, 1, 3, *size).cumsum(-1).cumsum(-2) / 60)
    assert difference(clip_preprocess(image)[..., ::8, ::8], GOLDEN[name]) < 1e-10
    assert difference(clip_preprocess(image.float())[..., ::8, ::8].double(), GOLDEN[name]) < 1e-4


@pytest.mark.parametrize("steps", [5, 25])
def test_sampler_golden(steps):
    from sample import karras_sigmas
    svd = PRESETS["svd"]
    sigmas = torch.as_tensor(karras_sigmas(steps, svd.sigma_min, svd.sigma_max)).double()
    assert sigmas.shape == (steps + 1,) and sigmas[-1] == 0
    relative = (sigmas / GOLDEN[f"sampler.sigmas_{steps}"].clamp(min=1e-9) - 1)[:-1]
    assert relative.abs().max() < 1e-5                           # the reference computes them in float32
    assert difference(precondition(sigmas[:-1])[3], GOLDEN[f"sampler.timesteps_{steps}"]) < 1e-5


# --------------------------------------------------------------------------------------- the published sizes and keys

def test_full_size_keys():
    """Every key and shape of the published files, without memory."""
    svd, configs = PRESETS["svd"], MANIFEST["configs"]
    assert (svd.unet, svd.vae, svd.clip) == (configs["unet"], configs["vae"], configs["image_encoder"])
    with torch.device("meta"):
        parts = dict(unet=UNet(svd.unet), vae=VAE(svd.vae), image_encoder=CLIPImageEncoder(svd.clip))
    for name, part in parts.items():
        assert {key: list(value.shape) for key, value in part.state_dict().items()} == MANIFEST[name], name


def test_full_size_4d():
    """The paper's figures: 2.40 B, 2.38 B without cross-view attention, 1.54 B for plain SVD (published rounded up)."""
    with torch.device("meta"):
        full, none, rgb = (Model4D(PRESETS["svd"], *switches) for switches in ((), ("none",), ("none", True)))
    widths = [1280] * 6 + [640] * 3 + [320] * 3
    assert [layer.attention.to_q.in_features for layer in full.cross_view] == widths
    assert count(full.cross_view) == sum(4 * 512 * width + width + 4 * width for width in widths)
    assert count(rgb) == count(full.unet) == 1_524_623_082 and count(full.decoder_b) == 855_167_705
    assert count(none) == count(full.unet) + count(full.decoder_b) and count(full) == 2_401_470_467


# -------------------------------------------------------------------------------------------------- loading hub files

SMALL = dict(CONFIGS["unet"], block_out_channels=[32, 32], num_attention_heads=[1, 2], layers_per_block=1,
             down_block_types=["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
             up_block_types=["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"])
WEIGHTS, HALF_WEIGHTS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


def small_state(dtype=torch.float32):
    return {name: fill(name, p.shape).to(dtype) for name, p in UNet(SMALL).state_dict().items()}


def write_hub(folder, state, name=WEIGHTS, config=SMALL):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNetSpatioTemporalConditionModel", **config}))
    save_file(state, folder / name)
    return folder


def same_weights(module, state, dtype):
    return all(value.dtype == dtype and torch.equal(value, state[key].to(dtype))
               for key, value in module.state_dict().items())


def refused(use, *words):
    """Calls `use`, which must raise a ValueError of one line that has these words."""
    with pytest.raises(ValueError) as error:
        use()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_load_layouts(tmp_path):
    """Full precision, fp16 variant, both together, shards; float32, bfloat16 and float16 wanted."""
    full, half = small_state(), small_state(torch.float16)
    write_hub(tmp_path / "full/unet", full)
    write_hub(tmp_path / "half/unet", half, HALF_WEIGHTS)
    write_hub(tmp_path / "both/unet", full)
    write_hub(tmp_path / "both/unet", half, HALF_WEIGHTS)
    keys = sorted(full)
    for i in range(3):
        part = {key: full[key] for key in keys[i::3]}
        write_hub(tmp_path / "shards/unet", part, f"model-0000{i + 1}-of-00003.safetensors")

    assert same_weights(UNet.from_pretrained(tmp_path / "full"), full, torch.float32)
    assert same_weights(UNet.from_pretrained(str(tmp_path / "full/unet"), None, torch.bfloat16), full, torch.bfloat16)
    assert same_weights(UNet.from_pretrained(tmp_path / "half"), half, torch.float32)
    assert same_weights(UNet.from_pretrained(tmp_path / "both"), full, torch.float32)
    assert same_weights(UNet.from_pretrained(tmp_path / "both", dtype=torch.float16), half, torch.float16)
    assert same_weights(UNet.from_pretrained(tmp_path / "shards"), full, torch.float32)
    (tmp_path / "shards/unet/model-00002-of-00003.safetensors").unlink()
    refused(lambda: UNet.from_pretrained(tmp_path / "shards"), "Missing key", str(tmp_path / "shards/unet"))


WATCH = """
import os, sys, threading, torch
sys.path[:0] = [{root!r}, {tests!r}]
def held():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith({field!r})) * 1024
torch.zeros(99, 99) @ torch.zeros(99, 99)
{setup}
before, peak = held(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], held())
threading.Thread(target=watch, daemon=True).start()
{work}
print(max(peak[0], held()) - before)
"""


def peak_memory(field, setup, work):
    """The most bytes that `work` takes up in a process of its own. field: VmRSS, or RssAnon, without pages of files."""
    tests = Path(__file__).parent
    code = WATCH.format(root=str(tests.parent), tests=str(tests), field=field, setup=setup, work=work)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("stored, wanted, most", [(torch.float32, "bfloat16", 1.15), (torch.float16, "float16", 0.6)])
def test_load_holds_one_copy(tmp_path, stored, wanted, most):
    """Beside the file's own pages, which the system takes back when it likes, loading the whole 4D model takes up its
    converted weights and one tensor; unconverted, only decoder B and what does not come from the file.
    NANO4DGEN_FULL=1: at the full 2.40 B parameters (needs 7 GB of disk and of memory)."""
    config = PRESETS["svd"].unet
    if not os.environ.get("NANO4DGEN_FULL"):
        config = dict(config, block_out_channels=[64, 128, 192, 192], num_attention_heads=[1, 2, 3, 3])
    preset = Preset("", 0, 0, unet=config, vae={}, clip={})
    with torch.device("meta"):
        net = Model4D(preset)
    write_hub(tmp_path / "unet", {key: torch.ones(p.shape, dtype=stored) for key, p in net.unet.state_dict().items()},
              config=config)
    peak = peak_memory("RssAnon", "from model import Model4D, Preset",
                       f"net = Model4D.from_pretrained({preset!r}, {str(tmp_path)!r}, torch.{wanted})")
    print(f"peak {peak / count(net) / 2:.3f} times the weights")
    assert peak < most * count(net) * 2


@torch.no_grad()
def test_load_image_encoder_with_a_key_of_old_files(tmp_path):
    clip = filled(CLIPImageEncoder(CONFIGS["clip"])).float()
    state = {**clip.state_dict(), "vision_model.embeddings.position_ids": torch.arange(257)[None]}
    write_hub(tmp_path / "image_encoder", state, "model.fp16.safetensors", CONFIGS["clip"])
    assert same_weights(CLIPImageEncoder.from_pretrained(tmp_path), clip.state_dict(), torch.float32)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("mid_block.resnets.1.time_mixer.mix_factor"), ["Missing", "resnets.1.time_mixer.mix_factor"]),
    (lambda s: s.update({"conv_in.extra": torch.zeros(2)}), ["Unexpected", "conv_in.extra"]),
    (lambda s: s.update({"conv_in.bias": torch.zeros(7)}), ["conv_in.bias", "[7]", "[32]"])])
def test_load_wrong_keys(tmp_path, change, words):
    state = small_state()
    change(state)
    folder = write_hub(tmp_path / "unet", state)
    refused(lambda: UNet.from_pretrained(tmp_path), *words, str(folder))


def test_load_broken_files(tmp_path):
    load = lambda: UNet.from_pretrained(tmp_path)
    folder = write_hub(tmp_path / "unet", small_state())
    path, config = folder / WEIGHTS, folder / "config.json"
    whole = path.read_bytes()
    for damage in (whole[:-100], b"\xff" * 8 + whole[8:], whole[:8] + b"[1]" + whole[11:],
                   whole.replace(b"F32", b"X32", 1), os.urandom(5000), b""):
        path.write_bytes(damage)
        refused(load, str(path), "damaged")
    path.unlink()
    refused(load, str(folder), "no .safetensors file")
    for text, word in (('{"hello": 1}', "lacks the key"), ('{"half a', "config.json"), ("[]", "config.json")):
        config.write_text(text)
        refused(load, str(config), word)
    refused(lambda: UNet.from_pretrained(tmp_path / "nowhere"), "nowhere", "neither a folder nor a hub repo")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that copies what is asked for from tmp_path/remote to tmp_path/cache; where that fails, with hub.error."""
    hub = SimpleNamespace(remote=tmp_path / "remote", cache=tmp_path / "cache", asked=0, error=None)

    def download(repo, allow_patterns, ignore_patterns, local_files_only=False):
        hub.asked += 1
        match = lambda path, patterns: any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
        for path in hub.remote.rglob("*.*"):
            name = str(path.relative_to(hub.remote))
            if match(name, allow_patterns) and not match(name, ignore_patterns) and not (hub.cache / name).exists():
                if hub.error:
                    raise hub.error
                (hub.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, hub.cache / name)
        return str(hub.cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write_hub(hub.remote / "unet", small_state())
    return hub


def test_load_from_a_hub(hub):
    """Only the wanted precision is asked for; the other, where there is no such file."""
    assert same_weights(UNet.from_pretrained("owner/name"), small_state(), torch.float32)
    assert hub.asked == 1
    shutil.rmtree(hub.cache)
    assert same_weights(UNet.from_pretrained("owner/name", dtype=torch.bfloat16), small_state(), torch.bfloat16)
    assert hub.asked == 3


@pytest.mark.parametrize("cached, wanted", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_offline_the_other_precision_will_do(hub, cached, wanted):
    write_hub(hub.remote / "unet", small_state(torch.float16), HALF_WEIGHTS)
    for hub.error in (errors.LocalEntryNotFoundError("not\nthere"), errors.OfflineModeIsEnabled()):
        refused(lambda: UNet.from_pretrained(SVD_REPO, dtype=wanted), SVD_REPO, "offline", "folder")
    hub.error = errors.GatedRepoError("403\nForbidden", response=SimpleNamespace(headers={}, request=None))
    refused(lambda: UNet.from_pretrained(SVD_REPO), SVD_REPO, "licence", "hf auth login", "folder")
    hub.error = None
    UNet.from_pretrained("owner/name", dtype=cached)
    hub.error = errors.LocalEntryNotFoundError("offline")
    got = UNet.from_pretrained("owner/name", dtype=wanted)
    assert same_weights(got, small_state(torch.float16 if cached == torch.bfloat16 else cached), wanted)
