"""What users meet: bad inputs, kills, full disks, read-only folders, few open files.

    python -m pytest tests/test_faults.py -s            # a sample of the kills and full disks; --long: all of them

Right is one line that names file, key, shape or flag, and exit code 1 or 2; after a kill the same command ends as an
undisturbed one does, bit for bit. A trial is a process that runs a script as `python SCRIPT` does, forked from one that
has imported everything: imports take longer than most trials.
"""
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import data
from vae import VAE, save_vae

ROOT = Path(__file__).parent.parent
PROCESSED = next((ROOT / "tests" / "data" / "recorded").rglob("processed"))
SERVER = r'''
import ctypes, json, os, resource, runpy, signal, struct, sys, traceback
from dataclasses import replace
sys.path.insert(0, root := sys.argv[1])
import imageio.v3, numpy as np, PIL.Image, torch, torch._dynamo
import data, evaluate, model, sample, track, train, vae
torch.set_num_threads(1), data.pyplot()
small = model.unet_config((32, 48), (2, 2), layers=1, latent_channels=24, context=32, groups=8, attention_levels=0)
model.PRESETS["tiny"] = replace(model.PRESETS["tiny"], unet=small, vae=dict(patch_size=8, components=24))
model.PRESETS["svd"] = replace(model.PRESETS["svd"], height=64, width=80)
model.PRESETS["small"] = replace(model.PRESETS["small"], height=128, width=160)
track.track = lambda clip: {key: np.repeat(x[None], 1 + clip["rgb"].shape[1], 0) for key, x in dict(    # not tried here
    gripper_in_ref=clip["observed_gripper_in_ref"], opening=clip["observed_opening"],
    lost=clip["observed_opening"] > -1).items()}
ends = {}
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        text = open(ends.pop(job["wait"]), "rb").read().decode(errors="replace")
        _, status, usage = os.wait4(job["wait"], 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime]), flush=True)
        continue
    end, write = os.pipe()
    if not (pid := os.fork()):
        break
    os.close(write)
    ends[pid] = end
    print(pid, flush=True)
else:
    sys.exit()
os.setsid()
os.dup2(write, 1), os.dup2(write, 2), os.chdir(job["folder"])
signal.alarm(job["seconds"]), signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored below nohup
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
if job["obeys"]:                                                 # permissions, which root has a privilege not to
    libc = ctypes.CDLL(None)
    libc.prctl(28, 1), libc.capset(struct.pack("II", 0x20080522, 0), bytes(24))     # nor do the processes it starts
sys.argv, code = job["words"], 0
try:
    runpy.run_path(f"{root}/{sys.argv[0]}", run_name="__main__")
except SystemExit as end:
    code = end.code
except BaseException:
    code = traceback.format_exc()
if isinstance(code, str):
    code = print(code, file=sys.stderr) or 1
sys.stdout.flush()
os._exit(code or 0)                                              # to take down all that was imported would cost 0.6 s
'''
TRAIN = ("train.py --preset tiny --data ../base/data --vae ../base/run --out run --single 0.5 --warmup 2 "
         "--single_batch 2 --batch 1 --save_every 1 --eval_every 9 --steps ")
COMMANDS = {            # what is killed, and meets full disks
    "pack": "data.py --source ../base/source --out data",
    "render": "data.py --episodes 2 --size 8x10 --workers 2 --out data",
    "code": "vae.py --preset tiny --data ../base/data --out run",
    "tune": "vae.py --preset svd --init ../base/hub --data ../base/data --out run --steps 10 --frames 2 --save_every 3",
    "train": TRAIN + "5",
    "train, no average": TRAIN + "5 --ema 0",
    "sample": "sample.py --run ../base/run --data ../base/data --out out --frames 4",
    "evaluate": "evaluate.py --task 1 --run run --data ../base/data --clips 3 --seeds 0 --frames 3 --steps 2",
}
LFS, CUT, GONE = b"version https://git-lfs.github.com/spec/v1\noid sha256:1", lambda old: old[:9999], lambda old: None
STRANGE = {             # copies with one thing wrong: folder of `base`, file, its new content or changed arrays
    "cut": ("rec", "observations.npz", CUT), "lfs": ("rec", "observations.npz", LFS),
    "o0": ("rec", "observations.npz", dict(scene_3=lambda x: x / 255)),
    "m0": ("run", "model.json", b""), "m1": ("run", "model.json", b"{}"), "m2": ("run", "model.json", b"[1, 2]"),
    "w0": ("run", "model.safetensors", CUT), "w1": ("run", "model.safetensors", GONE), "r0": ("run", "resume.pt", CUT),
    "v0": ("run", "vae_rgb.json", b"{}"), "v1": ("run", "vae_rgb.safetensors", CUT), "r1": ("run", "resume.pt", LFS),
    "r2": ("run", "resume.pt", pickle.dumps(Path(".")) * 50), "h0": ("hub/vae", "config.json", b"{}"),
    "e0": ("data/E", "episode.json", b""), "e1": ("data/E", "episode.json", b"[]"), "e2": ("data/E", "rgb.npy", CUT),
    "e3": ("data/E", "episode.json", b'{"rate_hz": "ten"}'), "p0": ("out", "prediction.npz", CUT),
    "p1": ("out", "prediction.npz", dict(rgb=lambda x: x / 255)), "d1": ("own", "A_mm.png", b"no picture"),
    "p2": ("out", "prediction.npz", dict(points=lambda x: x * 1000)), "a0": ("own", "A.png", "A_mm.png"),
    "k0": ("own", "K.npz", dict(intrinsics=lambda x: x * 3)), "d2": ("own", "A_mm.png", "small.png"),
    "t0": ("own", "K.npz", dict(observed_gripper_in_ref=lambda x: x * 1000)), "d0": ("own", "A_mm.png", "A.png"),
}
BAD = """
data.py --out new | --source nowhere > no such folder; --source ../base/hub > no observations.npz; --task 9 > --task
data.py --out new | --size 64 > --size; --source ../base/source --size 0x80 > --size; --episodes 0 > --episodes
data.py --out new | --source ../base/source --workers 2 > --workers; --seed -1 > --seed
data.py --out new | --source hub > check the network; --out ../base/data > synthetic
data.py --out new | --source ~cut > observations.npz is damaged; --source ~lfs > git-lfs; --source ~o0 > 'scene_3'
vae.py --data ../base/data | --steps 0 > --steps; --frames 12 > --frames; --seed -1 > --seed; --preset huge > --preset
vae.py --data ../base/data --preset svd --init | nowhere > nowhere; ~h0 > config.json
train.py --data ../base/data | --lr 1e20 > --lr; --lr nan > --lr; --steps 0 > --steps; --minutes -1 > --minutes
vae.py --data ../base/data --preset small | --out new > --size
train.py --data ../base/data --vae ../base/run | --seed -1 > --seed; --views 3 > not 3
train.py --out | ../base/run --rgb_only > --out; ~r0 > resume.pt is damaged; ~r1 > resume.pt; ~r2 > resume.pt
train.py --data ../base/data --out new --vae | ~v0 > vae_rgb.json is damaged; ~v1 > vae_rgb.safetensors
train.py --vae ../base/run --out new --data | ~e0 > episode.json is damaged; ~e1 > e1/E; ~e2 > rgb.npy; ~e3 > e3/E
sample.py | --steps 4 > say --task; --run nowhere > train first; --depth A.png --run ../base/run > add --rgb
sample.py --data ../base/data --run ../base/run | --clip -1 > --clip; --frames 99 > 99 frames; --views 5 > not 5
sample.py --data ../base/data --run ../base/run | --guidance nan > --guidance; --data nowhere > nowhere
sample.py --run | ~m0 > model.json is damaged; ~m1 > model.json; ~m2 > model.json; ~w0 > model.safe; ~w1 > model.safe
sample.py | --svd some/model --rgb @A.png > offline; --released ~r2/resume.pt --out new > resume.pt
OWN | --depth @A_mm.png > --depth 1; --rgb no.png @B.png > no.png is missing; --opening .08 > --pose
OWN | --depth ~d0/A_mm.png @B_mm.png > 16-bit; --depth ~d1/A_mm.png @B_mm.png > A_mm.png; --rgb ~a0/A.png @B.png > 8-bit
OWN | --depth ~d2/A_mm.png @B_mm.png > as large; --intrinsics ~k0/K.npz > 'intrinsics'; --intrinsics @A.png > A.png
OWN | --pose ~t0/K.npz --opening .04 > gripper_in_ref; --pose @K.npz --opening 80 > opening
track.py --prediction | no.npz > is missing; ~p0/prediction.npz > damaged; ~p1/prediction.npz > 'rgb'
track.py --prediction ../base/out/prediction.npz | --hand X > --finger; --object no.obj > no.obj is missing
track.py --episode | nowhere > cameras.npz is missing; ../base/data/E --cameras 1 99 > not cameras 1, 99
evaluate.py --predictions | ~h0 > no prediction.npz; ~p0 > npz is damaged; ~p1 > npz: 'rgb'; ~p2 > npz: 'points'
"""
OWN = "sample.py --run ../base/run --rgb @A.png @B.png --depth @A_mm.png @B_mm.png --intrinsics @K.npz"
TABLE = []


class Programs:
    """Starts them in folders beside each other below `top`, and waits for them."""

    def __init__(self, top):
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.top, self.ends, pipes = top, {}, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT)], env=environ, **pipes)

    def ask(self, **job):
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, folder, command, obeys=False, seconds=600, **limits):
        (self.top / folder).mkdir(exist_ok=True)
        job = dict(obeys=obeys, seconds=seconds, limits=limits)
        return self.ask(folder=str(self.top / folder), words=command.split(), **job)

    def run(self, *words, **options):
        return self.ask(wait=self.start(*words, **options))[:2]

    def fresh(self, folder, command):
        shutil.rmtree(self.top / folder, ignore_errors=True)
        if "--run run" in command:
            shutil.copytree(self.top / "base" / "run", self.top / folder / "run")
        return folder

    def undisturbed(self, name):                         # what a command leaves, and the processor's seconds it takes
        if name not in self.ends:
            pid = self.start(folder := self.fresh(f"whole {name}", COMMANDS[name]), COMMANDS[name])
            code, text, seconds = self.ask(wait=pid)
            assert code == 0, text
            self.ends[name] = contents(self.top / folder), seconds
        return self.ends[name]

    def kill(self, pid, how, seconds):
        """Ends a program after so many seconds of a processor: its code, what it said, whether all of it has ended."""
        while 0 <= seconds_of(pid) < seconds:
            time.sleep(0.02)
        (os.killpg if how == signal.SIGINT else os.kill)(pid, how)     # Ctrl-C reaches all that runs in a terminal
        (code, text, _), limit = self.ask(wait=pid), time.time() + 20
        while seconds_of(pid) >= 0 and time.time() < limit:
            time.sleep(0.1)
        return code, text, seconds_of(pid) < 0


def last_line(text):
    return text.replace("\r", "\n").strip().split("\n")[-1]


def told(kind, trial, behaviour, ok):
    TABLE.append(f"{kind:10.10} | {trial:50.50} | {behaviour[-110:]:110} | {'ok' if ok else 'NOT OK'}")
    return [] if ok else [TABLE[-1]]


def contents(folder):
    """{file: what matters in it}: no times, and of the log only the figures of the evaluations."""
    read = {".npz": data.read_npz, ".pt": lambda path: torch.load(path, weights_only=True),
            ".jsonl": lambda path: [line for line in path.read_text().splitlines() if "psnr" in line]}
    plain = lambda x: np.asarray(x).tobytes() if isinstance(x, (np.ndarray, torch.Tensor)) else x
    return {str(path.relative_to(folder)): repr(tree_map(plain, read.get(path.suffix, Path.read_bytes)(path)))
            for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.fixture(scope="module")
def long(request):
    yield request.config.getoption("--long")
    print("", *TABLE, f"{len(TABLE)} trials, {sum('NOT OK' in line for line in TABLE)} not ok", sep="\n")


@pytest.fixture(scope="module")
def programs(tmp_path_factory, long):
    top = tmp_path_factory.mktemp("faults")
    base, own = top / "base", top / "base" / "own"
    for folder in ("rec", *(f"source/session/episode_{k}/processed" for k in range(4))):
        shutil.copytree(PROCESSED, base / folder)
    config = dict(block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4)
    save_vae(base / "hub" / "vae" / "model.safetensors", VAE(config), {})
    data.write_json(base / "hub" / "vae" / "config.json", config)
    data.pack_folder(base / "source", 1, base / "data", (64, 80))
    episode = next((base / "data").glob("*/"))
    shutil.copytree(episode, base / "data" / "E", copy_function=os.link)
    clip = data.read_clip(data.load_episode(episode), 0, [0, 1])
    data.write_npz(own / "K.npz", {key: clip[key] for key in ("intrinsics", "observed_gripper_in_ref")})
    for name, rgb, depth in zip("AB", clip["observed_rgb"], clip["observed_depth"]):
        imageio.imwrite(own / f"{name}.png", rgb)
        imageio.imwrite(own / f"{name}_mm.png", (1000 * depth).astype(np.uint16))
    imageio.imwrite(own / "small.png", rgb[:9, :9])
    programs = Programs(top)
    for command in ("train.py --preset tiny --data ../base/data --out run --steps 2",
                    "sample.py --run run --data ../base/data --out out --steps 2 --frames 2"):
        code, text = programs.run("base", command)
        assert code == 0, text
    yield programs
    programs.server.communicate()


def seconds_of(group):
    """What the living processes of a program have used of the processor so far; negative: there is none."""
    ticks, alive = 0, False
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp, *rest = path.read_text().rpartition(")")[2].split()
        except OSError:                                  # it has just ended
            continue
        if int(pgrp) == group and state != "Z":
            ticks, alive = ticks + sum(map(int, rest[8:12])), True
    return ticks / os.sysconf("SC_CLK_TCK") if alive else -1


def goes_on(programs, folder, name, whole, kind, trial, code, text, wrong=False):
    """Runs a command again after a fault, and compares."""
    again, said = programs.run(folder, COMMANDS[name])
    differ = sorted({path for path, _ in contents(programs.top / folder).items() ^ whole.items()})
    after = f"{again}, differs: {differ}: {last_line(said)}" if again or differ else "ends as undisturbed"
    good = not (wrong or again or differ or "Traceback" in text + said)
    return told(kind, trial, f"{code} {last_line(text)[:60]}; again: {after}", good)


def test_bad_inputs_are_refused_in_one_line(programs):
    for variant, (folder, file, change) in STRANGE.items():
        source, target = programs.top / "base" / folder, programs.top / "strange" / variant / folder.partition("/")[2]
        shutil.copytree(source, target, copy_function=os.link)
        (target / file).unlink()
        if isinstance(change, dict):
            arrays = data.read_npz(source / file)
            data.write_npz(target / file, arrays | {key: new(arrays[key]) for key, new in change.items()})
        elif isinstance(change, str):
            shutil.copy(source / change, target / file)
        elif (new := change((source / file).read_bytes()) if callable(change) else change) is not None:
            (target / file).write_bytes(new)
    failed = []
    for command, trials in (row.split(" | ") for row in BAD.strip().split("\n")):
        for trial in trials.split("; "):
            flags, words = trial.split(" > ")
            whole = f"{command} {flags}".replace("OWN", OWN).replace("~", "../strange/").replace("@", "../base/own/")
            code, text = programs.run("bad", whole, seconds=60)
            line, script = last_line(text), whole.split()[0]
            good = code > 0 and "Traceback" not in text and line.startswith(script) and words in line
            failed += told("bad input", f"{command} {flags}".replace("../base/", ""), f"{code} {line}", good)
    assert not failed


def test_killed_at_random_moments_it_goes_on_to_the_same_end(programs, long):
    draw, failed = random.Random(0), []
    for name in COMMANDS if long else ("train",):
        for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) if long else (signal.SIGKILL,):
            (whole, seconds), share = programs.undisturbed(name), draw.uniform(0.05, 0.9)
            pid = programs.start(folder := programs.fresh("killed", COMMANDS[name]), COMMANDS[name])
            code, text, all_ended = programs.kill(pid, how, share * seconds)
            trial = f"{how.name} in {name} at {share:.0%}" + ", which left processes" * (not all_ended)
            failed += goes_on(programs, folder, name, whole, "kill", trial, code, text, not all_ended)
    assert not failed


def test_rendering_processes_end_with_a_killed_parent(programs):
    pid = programs.start("render", COMMANDS["render"])
    code, text, all_ended = programs.kill(pid, signal.SIGKILL, 6)
    assert not told("kill", "SIGKILL in render after 6 s", f"{code} all its processes end", code == -9 and all_ended)


def test_full_disk_and_read_only_folder(programs, long):
    failed = []
    for name in COMMANDS if long else ("train",):
        whole = programs.undisturbed(name)[0]
        sizes = [path.stat().st_size for path in (programs.top / f"whole {name}").rglob("*") if path.is_file()]
        stopped = {sum(size > most for size in sizes): most for most in (0, 300, 3000, 30_000, 300_000, 3_000_000)}
        stopped.pop(0, None)                             # each limit stops other files, and one that stops none is out
        for size in (*stopped.values(), None) if long and name != "render" else (30_000, None):    # it saves as packing
            folder = programs.fresh("full", COMMANDS[name])
            path = programs.top / folder / ("run" if "--run run" in COMMANDS[name] else ".")
            path.mkdir(exist_ok=True)
            path.chmod(0o755 if size is not None else 0o555)
            limits = dict(RLIMIT_FSIZE=size) if size is not None else dict(obeys=True)
            code, text = programs.run(folder, COMMANDS[name], **limits)
            path.chmod(0o755)
            says = "cannot write" if size is not None else "Permission denied"
            wrong = says not in text if code else contents(programs.top / folder) != whole
            failed += goes_on(programs, folder, name, whole, "full disk", f"{name}: {limits}", code, text, wrong)
    assert not failed


def test_a_second_process_is_refused_and_few_open_files_are_enough(programs):
    first = programs.start("two", TRAIN + "999")
    while not (programs.top / "two" / "run" / "lock").exists():
        time.sleep(0.02)
    code, text = programs.run("two", TRAIN + "999")
    os.kill(first, signal.SIGKILL)
    good = code == 1 and "another process is training in run" in text and programs.ask(wait=first)[0] == -9
    failed = told("two", "train.py twice in one folder", f"{code} {last_line(text)}", good)
    (programs.top / "many").mkdir()
    for k in range(200):
        (programs.top / "many" / f"synthetic_{k:05d}").symlink_to(programs.top / "base" / "data" / "E")
    code, text = programs.run("two", TRAIN.replace("base/data", "many") + "1 --out many", RLIMIT_NOFILE=1024)
    assert not failed + told("open files", "200 episodes, 1024 files", f"{code} {last_line(text)}", code == 0)


def test_pictures_are_drawn_whatever_a_notebook_asks_for(programs):
    words, backend = COMMANDS["sample"].split(), "module://matplotlib_inline.backend_inline"
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=programs.top / "two", text=True,
                          env=os.environ | {"MPLBACKEND": backend}, capture_output=True)
    good = done.returncode == 0 and (programs.top / "two" / "out" / "sheet.png").exists()
    assert not told("MPLBACKEND", "sample.py", f"{done.returncode} {last_line(done.stdout + done.stderr)}", good)
