"""The authors' released weights: a checkpoint in their layout, made by a rule, gives their code's outputs.

tests/data/released_small.* hold inputs and float64 outputs of the released code at small width, the rule by which every
tensor of the checkpoint is made from its key, and the keys and shapes of the full-size files.
"""
import dataclasses
import gzip
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import PRESETS, Model4D, Preset, load_weights
from sample import UNUSED, convert_released, released_parts, unet_name
from test_svd import peak_memory
from vae import VAE, load_vae

DATA = Path(__file__).parent / "data"
FIXTURE = json.loads(gzip.decompress((DATA / "released_small.json.gz").read_bytes()))
GOLDEN = {key: value.double() for key, value in load_file(DATA / "released_small.safetensors").items()}
SMALL = Preset("small", FIXTURE["preset"]["height"], FIXTURE["preset"]["width"],
               **{key: FIXTURE["preset"][key] for key in ("unet", "vae", "clip")})


def made(key, shape):
    """The fixture's rule: a tensor of the checkpoint from its key."""
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("mix_factor"):
        pass
    elif len(shape) >= 2:
        r = r / np.sqrt(np.prod(shape[1:]))
    elif len(shape) == 1 and key.endswith(".weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    return torch.from_numpy(np.asarray(r, np.float32))


@pytest.fixture(scope="module")
def state():
    """The small checkpoint's state dict. The second U-Net shares the first one's storage, as in the real file."""
    tensors = {key: made(key, shape) for key, shape in FIXTURE["keys"].items() if "diffusion_model_2" not in key}
    for key, values in FIXTURE["recipe"]["first_values"].items():
        shared = key.replace("diffusion_model_2", "diffusion_model")
        assert np.allclose(tensors[shared].flatten()[:len(values)], values, atol=1e-7)
    return {key: tensors[key.replace("diffusion_model_2", "diffusion_model")] for key in FIXTURE["keys"]}


@pytest.fixture(scope="module")
def run(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    torch.save(dict(state_dict=state, epoch=59, global_step=7), folder / "4dgen.ckpt")
    convert_released(folder / "4dgen.ckpt", folder / "run", SMALL)
    return folder / "run"


def off(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def test_denoised(run):
    """Every stream of both views, in float64; and in float32, as it is used, at its rounding."""
    with torch.device("meta"):
        net = Model4D(Preset(**json.loads((run / "model.json").read_text())["preset"])).eval()
    load_weights(net, [run / "model.safetensors"])
    inputs = [GOLDEN[key] for key in ("noisy", "sigma", "cond", "image_embeds")]
    single = net(*[x.float() for x in inputs]).double()
    assert off(single, GOLDEN["denoised"]) < 3e-4 * GOLDEN["denoised"].abs().max()
    double = net.double()(*inputs)
    assert off(double, GOLDEN["denoised"]) < 1e-10
    for wrong in (dict(tokens="view"), dict(resnet_eps=None)):               # each rule matters
        other = Model4D(dataclasses.replace(net.preset, **wrong)).double().eval()
        other.load_state_dict(net.state_dict())
        assert off(other(*inputs), GOLDEN["denoised"]) > 1e-6, wrong


@torch.no_grad()
def test_codes(run):
    """Conditions through an encoder with quant_conv, targets through another without, videos through the decoder."""
    for stream, kind in enumerate(("rgb", "pointmap")):
        coder = load_vae(run / f"vae_{kind}.safetensors").double()
        images, scale = GOLDEN["images"], coder.scale_factor
        cond = coder.encode_condition(images[:, :, stream].flatten(0, 1))
        assert off(cond, GOLDEN["cond"][:, :, stream].flatten(0, 1)) < 1e-10
        mean = coder.encode_latents(images[0, 0, stream, None])
        assert off(mean / scale, GOLDEN["moments"][stream, None, :4]) < 1e-10
        video = coder.decode_latents(GOLDEN["latents"][stream], len(GOLDEN["latents"][stream]))
        assert off(video, GOLDEN["decoded"][stream]) < 1e-10


def test_every_key_of_the_full_size_file():
    """All 4,606 are used, or of a part that is not needed; what is used fills our full-size modules."""
    keys = FIXTURE["full_keys"]
    assert len(keys) == 4606
    preset = dataclasses.replace(PRESETS["svd"], view_norm=False, resnet_eps=1e-5, tokens="crossed")
    with torch.device("meta"):
        parts = released_parts({key: torch.empty(shape) for key, shape in keys.items()}, preset)
        modules = dict(model=Model4D(preset), **{kind: VAE({**preset.vae, "target_encoder": True})
                                                 for kind in ("rgb", "pointmap")})
    for name, module in modules.items():
        module.load_state_dict(parts[name], strict=True, assign=True)
    second, unused = ([key for key in keys if key.startswith(tuple(place))]
                      for place in (["model.diffusion_model_2."], UNUSED))
    invented = 4 + len(modules["model"].decoder_b.state_dict())              # zeros, and decoder B's copies
    used = sum(len(part) for part in parts.values()) - invented
    assert used + len(second) + len(unused) == len(keys) and len(unused) == 398 + 2 * 140


def test_vae_alone(tmp_path):
    """pointmap.ckpt and color.ckpt: encoder, decoder and the parts of a loss."""
    state = {key: made(key, shape) for key, shape in FIXTURE["vae_keys"].items()}
    torch.save(dict(state_dict=state), tmp_path / "pointmap.ckpt")
    convert_released(tmp_path / "pointmap.ckpt", tmp_path)
    coder = load_vae(tmp_path / "vae_pointmap.safetensors")
    projection = coder.decoder.mid_block.attentions[0].to_q.weight
    assert torch.equal(projection, state["decoder.mid.attn_1.q.weight"][:, :, 0, 0])
    moments = coder.encoder(torch.zeros(1, 3, 16, 16))
    assert torch.equal(torch.cat(coder.encode(torch.zeros(1, 3, 16, 16)), 1), moments)       # an identity quant_conv


U = "model.diffusion_model."


@pytest.mark.parametrize("change, words", [
    (lambda s: [s.pop(key) for key in list(s) if "output_blocks.4.1." in key], ["up_blocks.1.attentions.1"]),
    (lambda s: [s.pop(key) for key in list(s) if "decoder.3.to_q" in key], ["cross_view.3.attention.to_q.weight"]),
    (lambda s: s.update({U + "attn_layers_decoder.12.to_q.weight": torch.zeros(9)}), ["attn_layers_decoder.12"]),
    (lambda s: s.update({U + "label_emb.0.0.bias": torch.zeros(128)}), ["label_emb"]),
    (lambda s: s.update({"model.diffusion_model_2.out.2.bias": torch.ones(4)}), ["_2.out.2.bias differs"]),
    (lambda s: s.update({"pose_head.weight": torch.ones(4)}), ["pose_head.weight"]),
    (lambda s: s.update({f"model.diffusion_model{two}.out.2.bias": torch.ones(9) for two in ("", "_2")}),
     ["conv_out.bias", "[9]"]),
    (lambda s: s.pop("first_stage_color_model.decoder.mid.block_1.mix_factor"), ["resnets.0.time_mixer.mix_factor"])])
def test_other_files_are_refused_by_name(state, tmp_path, change, words):
    other = dict(state)
    change(other)
    torch.save(dict(state_dict=other), tmp_path / "4dgen.ckpt")
    refused(tmp_path, *words)
    assert not (tmp_path / "run").exists()


def refused(folder, *words):
    with pytest.raises(ValueError) as error:
        convert_released(folder / "4dgen.ckpt", folder / "run", SMALL)
    text = str(error.value)
    assert "\n" not in text and "4dgen.ckpt" in text and all(word in text for word in words), text


class Shell:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path)
    for content, *words in ((dict(state_dict={}, hyper_parameters=Shell()), "system", "safety"), ([1, 2], "no state_dict")):
        torch.save(content, "4dgen.ckpt")
        refused(tmp_path, *words)
    assert not Path("pwned").exists()
    Path("4dgen.ckpt").write_bytes(Path("4dgen.ckpt").read_bytes()[:300])
    refused(tmp_path, "PytorchStreamReader")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_conversion_needs_little_memory(state, tmp_path):
    """With a wider U-Net, so that the file is large beside what Python itself takes up. The mapped file is counted."""
    preset = dataclasses.replace(SMALL, unet=dict(SMALL.unet, block_out_channels=[64, 128, 256, 256],
                                                  num_attention_heads=[4, 8, 16, 16]))
    with torch.device("meta"):
        shapes = {key: p.shape for key, p in Model4D(preset).state_dict().items()}
    width = lambda key, x: shapes.get(unet_name(key.partition(".diffusion_model.")[2], 2), x.shape)
    first = {key: torch.zeros(width(key, x)) for key, x in state.items() if "diffusion_model_2" not in key}
    wide = {key: first[key.replace("diffusion_model_2", "diffusion_model")] for key in state}
    torch.save(dict(state_dict=wide), tmp_path / "4dgen.ckpt")
    size = (tmp_path / "4dgen.ckpt").stat().st_size
    peak = peak_memory("VmRSS", "from sample import convert_released\nfrom model import Preset",
                       f"convert_released({str(tmp_path / '4dgen.ckpt')!r}, {str(tmp_path / 'run')!r}, {preset!r})")
    print(f"{size / 2 ** 20:.0f} MiB, peak {peak / size:.3f} times that")
    assert peak < 1.1 * size
