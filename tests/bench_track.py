"""What the tracker reaches, as a table.

    python tests/bench_track.py --recorded FOLDER                      # recorded episodes in the public layout, 256x320
    python tests/bench_track.py --recorded FOLDER --seeds 11 12 13     # cameras and noise that no constant was set on
    python tests/bench_track.py --size 64x80 --episodes 4              # synthetic episodes, the built-in hand
    python tests/bench_track.py --recorded FOLDER --rows two one mask  # some rows
    python tests/bench_track.py --speed --recorded FOLDER              # a clip a core at once
    python tests/bench_track.py --open3d                               # our icp beside Open3D's, if that is installed

Each row: two random test cameras an episode and seed, 2 Hz, true pointmaps unless it says otherwise, the first pose
given. An arm counts if it moves; "seen" are the frames in which either view shows at least 100 of the gripper's pixels.
"closed" is held against the whole episode's true openings, also where the clip starts in the middle.
"""
import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data
import track

ROWS = {
    "two": "two views", "one": "one view", "dead": "two views, one of them dead",
    "generated": "as generated: 5 mm noise, blurred edges, 5 % outliers, second view 1 cm off",
    "held": "starts while something is held", "holes20": "20 % of the pixels unmeasured",
    "holes30": "30 % of the pixels unmeasured", "removed": "the hand gone in three frames",
    "mask": "first pose from the masks",
}


# ---------------------------------------------------------------------------------------------- what the rows do

def generated(clip, draw):
    """5 mm noise along the ray, 2-pixel blur that mixes surfaces at edges, 5 % outliers, the second view 1 cm off."""
    view_in_ref = clip["view_in_ref"].astype(np.float32)
    own = data.transform(clip["points"], data.invert(view_in_ref))                          # (V,T,H,W,3)
    z = gaussian_filter(own[..., 2], (0, 0, 1, 1)) + 0.005 * draw.standard_normal(own.shape[:-1])
    junk = draw.random(z.shape) < 0.05
    z[junk] += draw.uniform(-0.3, 0.3, junk.sum())
    points = data.transform((own / own[..., 2:] * z[..., None]).astype(np.float32), view_in_ref)
    shift = draw.standard_normal(3)
    points[1:] += (0.01 * shift / np.linalg.norm(shift)).astype(np.float32)
    return clip | dict(points=points)


def holes(clip, share, draw):
    return clip | dict(valid=clip["valid"] & (draw.random(clip["valid"].shape) >= share),
                       observed_depth=clip["observed_depth"] * (draw.random(clip["observed_depth"].shape) >= share))


def removed(clip):
    """Every point within 30 cm of a flange deleted in three frames."""
    valid = clip["valid"].copy()
    for t in range(3, 6):
        for pose in clip["true_gripper_in_ref"][t + 1]:
            valid[:, t] &= np.linalg.norm(clip["points"][:, t] - pose[:3, 3], axis=-1) > 0.3
    return clip | dict(valid=valid)


def first_view(clip):
    return {key: value[:1] if data.CLIP.get(key, "?")[0].startswith("V") else value for key, value in clip.items()}


def starts(episode, row):
    """Frames at which the row's clips start, and the true open/closed of all frames at 2 Hz."""
    openings = episode.gripper_opening[::episode.stride]
    closed = track.closed_flags(openings)
    if row != "held":
        return [0], closed
    moving = np.ptp(episode.gripper_in_world[..., :3, 3], axis=0).max(-1) > 0.02
    held = [np.flatnonzero(closed[:-2, a]) for a in np.flatnonzero(moving)]
    return [frames[len(frames) // 3] for frames in held if len(frames)], closed


def clips(args, row, seed):
    """The row's clips, each with `closed` (F,A) and `pixels` (T,A)."""
    draw, noise = np.random.default_rng(seed), np.random.default_rng(seed)
    for folder in args.folders:
        episode = data.load_episode(folder)
        cameras = draw.choice(list(data.TEST_CAMERAS), 2, replace=False)
        frames, (first, closed) = (episode.frames - 1) // episode.stride, starts(episode, row)
        for start in first:
            count = frames - start if row == "held" else min(frames, args.frames)
            clip = data.truth_row(data.read_clip(episode, start * episode.stride, cameras, range(count)))
            clip |= dict(closed=closed[start:start + count + 1], pixels=clip["true_gripper"].sum((3, 4)).max(0))
            clip = first_view(clip) if row == "one" else generated(clip, noise) if row == "generated" else clip
            clip = holes(clip, int(row[5:]) / 100, noise) if row.startswith("holes") else clip
            clip = removed(clip) if row == "removed" else clip
            if row == "dead":
                clip["valid"][1], clip["observed_depth"][1] = False, 0
            yield clip


# ------------------------------------------------------------------------------------------------------- the figures

def errors(clip, result):
    """Per predicted frame and moving arm: metres, degrees, opening m, closed right, lost, seen."""
    truth = clip["true_gripper_in_ref"]
    moving = np.ptp(truth[..., :3, 3], axis=0).max(-1) > 0.02
    m, degrees = data.pose_errors(truth[1:], result["gripper_in_ref"][1:])
    values = dict(m=m, degrees=degrees, opening=np.abs(result["opening"] - clip["true_opening"])[1:],
                  lost=result["lost"][1:], closed=(result["closed"] == clip["closed"])[1:], seen=clip["pixels"] >= 100)
    return {key: value[:, moving].ravel() for key, value in values.items()}


def line(name, found, seconds):
    e = {key: np.concatenate([one[key] for one in found]) for key in found[0]}
    right = (e["m"] < 0.02) & (e["degrees"] < 10)
    percent = lambda x: f"{100 * np.mean(x):.1f}" if len(x) else "-"
    print(f"| {name} | {len(right)} | {1000 * np.nanmedian(e['m']):.2f} | {np.nanmedian(e['degrees']):.1f} | "
          f"{percent(right)} / {percent(right[e['seen']])} | {percent(e['lost'])} | {percent(~right & ~e['lost'])} | "
          f"{1000 * np.median(e['opening']):.1f} | {percent(e['closed'])} | {len(right) / seconds:.1f} |", flush=True)


def first_poses(clip, result):
    """Metres and degrees, up to the half turn, of every first pose that was looked for in at least 100 pixels."""
    for a, pose in enumerate(result["gripper_in_ref"][0]):
        if clip["observed_gripper"][:, a].sum() >= 100:
            both = (clip["true_gripper_in_ref"][0, a] @ turn for turn in (np.eye(4), track.HALF_TURN))
            yield min((data.pose_errors(pose, truth) for truth in both), key=lambda error: error[1])


def one_row(args, row, model):
    found, spent, extra = [], 0.0, []
    for seed in args.seeds:
        for clip in tqdm(clips(args, row, seed), desc=row, total=len(args.folders), disable=not sys.stderr.isatty()):
            if row == "mask":                             # the first frame says all: one more is tracked
                short = {key: value for key, value in clip.items() if key != "frame_index" and "true_" not in key}
                short |= {key: clip[key][:, :1] for key in ("rgb", "points", "valid")}
                extra += first_poses(clip, track.track(short, "mask", model))
                continue
            before = time.process_time()
            result = track.track(clip, "pose", model)
            found.append(errors(clip, result))
            spent += (time.process_time() - before) * len(found[-1]["m"]) / result["lost"][1:].size
            if row == "removed":
                extra.append((result["lost"][4:7].mean(), (~result["lost"][-2:]).any(0).mean()))
    if row == "mask":
        m, degrees = np.array(extra).T
        print(f"{ROWS[row]}: {np.sum((m < 0.01) & (degrees < 5))} of {len(m)} within 1 cm and 5 degrees, up to half a "
              f"turn; median {1000 * np.median(m):.1f} mm, {np.median(degrees):.1f} degrees", flush=True)
        return
    line(ROWS[row], found, spent)
    if row == "removed":
        gone, back = np.mean(extra, axis=0)
        print(f"  {100 * gone:.0f} % of the removed reported lost, {100 * back:.0f} % of the hands tracked by the end")


def tracked(clip, model):
    return track.track(clip, "pose", model)["lost"][1:].size


def all_cores(args, model):
    """Frames a second a hand with one clip on every core."""
    os.environ["OMP_NUM_THREADS"] = "1"                   # the processes inherit it
    todo = list(clips(args, "two", args.seeds[0]))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(tracked, todo[:os.cpu_count()], [model] * os.cpu_count()))            # they start and import
        before = time.perf_counter()
        frames = sum(pool.map(tracked, todo, [model] * len(todo)))
        print(f"{frames / (time.perf_counter() - before):.1f} frames a second a hand on {os.cpu_count()} cores, "
              f"load before {os.getloadavg()[0]:.1f}")


def beside_open3d(rounds=20):
    """Point-to-plane on the same 2,000-point pairs, 5 mm and 3 degrees apart: the source's rms error, and ms."""
    try:
        from open3d import geometry, pipelines, utility
    except ImportError as error:
        raise SystemExit(f"--open3d: {error} (pip install open3d)")
    registration = pipelines.registration
    criteria = registration.ICPConvergenceCriteria(1e-9, 1e-9, 50)
    planes = registration.TransformationEstimationPointToPlane(registration.TukeyLoss(0.02))
    vertices, faces = data.load_mesh(HERE / "data/panda_hand.obj")
    print("| pair | ours, mm | Open3D, mm | ours, ms | Open3D, ms | ratio |\n|---|---|---|---|---|---|")
    for name, noise in (("same points", 0.0), ("0.5 mm noise", 0.0005)):
        draw = np.random.default_rng(1)
        target, normals = track.sample_surface(vertices, faces, 2000)
        source = target[draw.permutation(2000)] + noise * draw.standard_normal(target.shape)
        axis, shift = draw.standard_normal((2, 3))
        truth = np.eye(4)
        truth[:3, :3] = Rotation.from_rotvec(np.radians(3) * axis / np.linalg.norm(axis)).as_matrix()
        truth[:3, 3] = 0.005 * shift / np.linalg.norm(shift)
        moved = data.transform(source, data.invert(truth))
        a, b = geometry.PointCloud(), geometry.PointCloud()
        a.points, b.points, b.normals = (utility.Vector3dVector(x) for x in (moved, target, normals))
        calls = dict(
            ours=lambda: track.icp(moved, target, normals, None, 0.02, 50)[0],
            theirs=lambda: registration.registration_icp(
                a, b, 0.02, np.eye(4), planes, criteria).transformation)
        off, ms = {}, {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                before = time.perf_counter()
                T = np.asarray(call())
                ms[key].append(1000 * (time.perf_counter() - before))
                off[key] = 1000 * np.sqrt(((data.transform(moved, T) - source)**2).sum(1).mean())
        ours, theirs = np.median(ms["ours"]), np.median(ms["theirs"])
        print(f"| {name} | {off['ours']:.4f} | {off['theirs']:.4f} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--recorded", help="folder of recorded episodes in the public layout [synthetic episodes]")
    add("--tasks", type=int, nargs="+", default=[1, 2, 3], help="[1 2 3]")
    add("--episodes", type=int, default=5, help="of each task, at most [5]")
    add("--frames", type=int, default=100, help="predicted ones of a clip, at most [to the end of the episode]")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="[all]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of cameras and noise [0 1 2]")
    add("--size", type=data.parse_size, default=(256, 320), help="HEIGHTxWIDTH that is packed [256x320]")
    add("--work", type=Path, default=Path("runs/bench_track"), help="folder of the packed episodes [runs/bench_track]")
    add("--speed", action="store_true", help="only this: a clip a core at once")
    add("--open3d", action="store_true", help="only this: our icp beside Open3D's")
    args = parser.parse_args()
    if args.open3d:
        return beside_open3d()
    args.folders = []
    for task in args.tasks:
        out = args.work / f"{'recorded' if args.recorded else 'synthetic'}_{data.size_text(args.size)}_{task}"
        data.prepare(task, out, args.recorded or "synthetic", args.size, args.episodes)
        args.folders += data.episode_folders(out)[:args.episodes]
    meshes = (HERE / "data/panda_hand.obj", HERE / "data/panda_finger.obj") if args.recorded else ()
    model = track.hand_model(*meshes)
    if args.speed:
        return all_cores(args, model)
    print(f"\nseeds {args.seeds}\n| row | frames | median, mm | degrees | within 2 cm and 10 degrees: all / seen, % | "
          "lost, % | silently wrong, % | opening, median mm | open/closed right, % | frames/s of processor time a hand |"
          "\n|" + "---|" * 10, flush=True)
    for row in args.rows:
        one_row(args, row, model)


if __name__ == "__main__":
    main()
