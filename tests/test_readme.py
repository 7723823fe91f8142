"""The README against the tree: its commands have the flags they use, its links lead somewhere, its counts are right."""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import sample
import track

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"\b((?:data|vae|train|sample|track|evaluate)\.py +-\S.*)", README)


@pytest.mark.parametrize("script", ["data.py", "vae.py", "train.py", "sample.py", "track.py", "evaluate.py"])
def test_flags_of_the_readme_exist(script):
    used = {flag for line in COMMANDS if line.startswith(script) for flag in re.findall(r"--\w+", line.split("#")[0])}
    if script != "vae.py":                                   # train.py runs it
        assert used, f"the README has no command of {script}"
    printed = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "default: None" not in printed.stdout
    missing = used - set(re.findall(r"--\w+", printed.stdout))
    assert not missing, f"{script} has no {missing}"


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 2
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_functions_of_the_diagram_exist():
    diagram = README.split("```mermaid")[1].split("```")[0]
    for script, name in re.findall(r"\b(data|model|sample|train|track|evaluate)\.(\w+)", diagram):
        assert re.search(rf"^(?:def|class) {name}\b", (ROOT / f"{script}.py").read_text(), re.M), f"{script}.{name}"


def test_counts():
    lines = sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py"))
    assert f"{lines:,} lines" in README and len(README) <= 18_000


@pytest.mark.parametrize("folder, most_off, least_near", [("trained", 0.04, 0.5), ("trained_small", 0.03, 0.65)])
def test_trained_weights_hold_their_figures(folder, most_off, least_near):
    """A scene of the synthetic world that no training has seen, two cameras, no poses: still things stay in place."""
    world = data.World(1)
    world.reset(2_000_000)
    tips = world.demonstration[0][..., :3, 3] + data.TCP * world.demonstration[0][..., :3, 2]
    cameras = data.sample_cameras(np.random.default_rng(0), tips, (64, 80), 2)
    for now in list(zip(*world.demonstration))[:11]:
        world.step(*now)
    run = sample.load_run(ROOT / "tests" / "data" / folder)
    clip = sample.predict(run, world.observe(*cameras, (64, 80)))
    true = evaluate.scripted_future(world, 10, cameras, (64, 80), data.FRAMES)
    off = np.abs(clip["points"] - true["points"])[..., 2] / true["points"][..., 2].clip(0.1)
    assert off[0][true["valid"][0]].mean() < most_off and off[1][true["valid"][1]].mean() < most_off
    shift, turn = data.pose_errors(clip["view_in_ref"][1], true["view_in_ref"][1])
    assert shift < 0.03 and turn < 4
    path = zip(true["true_gripper_in_ref"][2:5, 0], true["true_opening"][2:5, 0])      # 1 to 2 s ahead
    ref_in_view, hand = data.invert(true["view_in_ref"]), track.hand_model()
    there = np.stack([track.silhouette(hand, cameras[0], ref_in_view, (64, 80), *now) for now in path], 1)
    near = np.linalg.norm(clip["points"] - true["points"], axis=-1)[:, 1:4] < 0.03
    assert near[there].mean() > least_near                   # the hand is where it will be; had it stayed, 0.1
    if folder == "trained_small":                            # and is found there
        path = track.track(clip)
        metres, degrees = data.pose_errors(path["gripper_in_ref"], true["true_gripper_in_ref"])
        assert metres[1:4].max() < 0.03 and degrees[1:4].max() < 10
        assert path["closed"][1:4, 0].tolist() == [False, True, True]                  # and its grasp


def test_the_loop_closes():
    """Observe, imagine, track, act, and look again: of three worlds that were solved once, one at least."""
    run = sample.load_run(ROOT / "tests" / "data" / "trained_small")
    imagine = lambda *now: evaluate.predict_in_turn(run, *now)
    assert "success" in (evaluate.rollout(1, evaluate.ROLLOUT_SEED + i, (64, 80), imagine, True, acted=5)
                         for i in (148, 144, 147))
