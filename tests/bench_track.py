"""What the tracker reaches, as a table.

    python tests/bench_track.py                          # on synthetic episodes, rendered on the way, built-in hand
    python tests/bench_track.py --recorded FOLDER        # on recorded episodes in the public layout, packed in --work
    python tests/bench_track.py --only 1 4 --episodes 3  # some rows, some episodes
    python tests/bench_track.py --only 6 --demos 20      # replays in the synthetic world
    python tests/bench_track.py --only 5 --open3d        # our icp beside Open3D's, where that package is installed

Rows  1  true pointmaps, first pose given: two views, then one       2  the first pose from the masks alone
      3  pointmaps as a generator makes them: noise, blur over edges, outliers, the second view shifted
      4  the hand removed for some frames                            5  speed
      6  the tracked path of a demonstration replayed in the synthetic world, two cameras placed for it, built-in hand
Two random test cameras an episode, 2 Hz, 256 x 320. An arm counts if it moves; "seen" are the frames in which either
view shows at least 100 of the gripper's pixels. Recorded episodes are tracked with the meshes in tests/data.
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
import evaluate
import track

SIZE = 256, 320              # H, W of recorded episodes; --size sets that of synthetic ones


def degraded(p, draw):
    """5 mm noise along the ray, 2-pixel blur that mixes surfaces at edges, 5 % outliers, the second view 1 cm off."""
    own = data.transform(p["points"], data.invert(p["view_in_ref"]).astype(np.float32))      # (V,T,H,W,3)
    z = gaussian_filter(own[..., 2], (0, 0, 1.0, 1.0))                                       # sigma 1: two pixels wide
    z = z + 0.005 * draw.standard_normal(z.shape)
    junk = draw.random(z.shape) < 0.05
    z[junk] += draw.uniform(-0.3, 0.3, junk.sum())
    rays = own / own[..., 2:].clip(0.05)
    points = data.transform((rays * z[..., None]).astype(np.float32), p["view_in_ref"].astype(np.float32))
    shift = draw.standard_normal(3)
    points[1:] += (0.01 * shift / np.linalg.norm(shift)).astype(np.float32)
    return {**p, "points": points}


def removed(p, start, stop):
    """Every point within 30 cm of a gripper's flange deleted in the predicted frames start..stop-1."""
    valid = p["valid"].copy()
    for t in range(start, stop):
        for pose in p["true_gripper_in_ref"][t + 1]:
            valid[:, t] &= np.linalg.norm(p["points"][:, t] - pose[:3, 3], axis=-1) > 0.3
    return {**p, "valid": valid}


def one_view(p):
    keys = (
        "rgb",
        "points",
        "valid",
        "intrinsics",
        "view_in_ref",
        "observed_rgb",
        "observed_depth",
        "observed_gripper",
        "pixels",
    )
    return {**p, **{key: p[key][:1] for key in keys}}


def errors(p, result):
    """Per predicted frame and moving arm: metres, degrees, opening m, closed right, lost, seen."""
    truth, got = p["true_gripper_in_ref"][1:], result["gripper_in_ref"][1:]
    moving = np.ptp(p["true_gripper_in_ref"][..., :3, 3], axis=0).max(-1) > 0.02
    cosine = (np.einsum("taij,taij->ta", truth[..., :3, :3], got[..., :3, :3]) - 1) / 2
    values = dict(
        m=np.linalg.norm(truth[..., :3, 3] - got[..., :3, 3], axis=-1),
        deg=np.degrees(np.arccos(cosine.clip(-1, 1))),
        opening=np.abs(result["opening"] - p["true_opening"])[1:],
        lost=result["lost"][1:],
        fingers=result["fingers"][1:] > 0,
        closed=(result["closed"] == track.closed_flags(p["true_opening"]))[1:],
        seen=(p["pixels"] >= 100).any(0)[1:],
    )
    return {key: value[:, moving].ravel() for key, value in values.items()}


def line(name, rows):
    e = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    right = (e["m"] < 0.02) & (e["deg"] < 10)
    percent = lambda x: f"{100 * np.mean(x):.1f}" if len(x) else "-"
    print(
        f"| {name} | {len(right)} | {1000 * np.median(e['m']):.1f} mm | {np.median(e['deg']):.1f} | {percent(right)} | "
        f"{percent(right[e['seen']])} | {percent(e['lost'])} | "
        f"{percent(~right & ~e['lost'])} | {1000 * np.median(e['opening']):.1f} mm | "
        f"{percent(e['closed'])} | {percent(e['closed'][e['fingers']])} |",
        flush=True,
    )


def clips(args):
    """(name, prediction with `pixels` (V,F,A))."""
    draw = np.random.default_rng(args.seed)
    for task in args.tasks:
        out = Path(args.work) / ("recorded" if args.recorded else "synthetic") / f"task_{task}"
        if args.recorded:
            data.pack_folder(args.recorded, task, out, SIZE)
        elif len(list(out.glob("*/episode.json"))) < args.episodes:
            data.make_synthetic(task, out, args.episodes, args.size, samples=1)
        for folder in data.episode_folders(out)[:args.episodes]:
            cameras = draw.choice(list(data.TEST_CAMERAS), 2, replace=False)
            p = track.episode_prediction(folder, cameras)
            episode = data.load_episode(folder)
            stride = round(episode.rate_hz / p["fps"])
            label = np.stack([episode.label[c, ::stride] for c in cameras])[:, :len(p["true_opening"])]
            p["pixels"] = np.stack([(label == g).sum((2, 3)) for g in (1, 2)[:p["true_opening"].shape[1]]], -1)
            yield f"task {task} {folder.name}", p


def first_pose(p, model):
    """Row 2 of one episode: metres and degrees modulo the half turn, of every arm that moves and that the first frame
    shows."""
    own, valid = data.point_maps(p["observed_depth"], p["intrinsics"])
    scene = track.make_scene(data.transform(own, p["view_in_ref"]), valid, p["intrinsics"], p["view_in_ref"])
    found = []
    for a, truth in enumerate(p["true_gripper_in_ref"][0]):
        if (
            np.ptp(p["true_gripper_in_ref"][:, a, :3, 3], axis=0).max() > 0.02
            and p["observed_gripper"][:, a].sum() >= 100
        ):
            poses, _, scores = track.register(model, scene, p["observed_gripper"][:, a])
            options = []
            for turned in (truth, truth @ track.HALF_TURN):
                away = Rotation.from_matrix(turned[:3, :3].T @ poses[0][:3, :3]).magnitude()
                options.append((np.linalg.norm(poses[0][:3, 3] - truth[:3, 3]), np.degrees(away)))
            found.append((*min(options, key=lambda o: o[1]), scores))
    return found


def replayed(task, seed, size):
    """Row 6: whether the path tracked in a demonstration's true video, executed from the first frame in the grippers'
    own frames, does the task."""
    world = data.World(task)
    world.reset(seed)
    world.step(world.demonstration[0][0], world.demonstration[1][0])
    cameras = evaluate.place_cameras(world, np.random.default_rng([task, seed, 2]), size, 2)
    frames = -(-(len(world.demonstration[0]) - 1) // evaluate.STRIDE)
    video = evaluate.scripted_future(world, 0, cameras, size, frames)
    path = evaluate.bridge(track.track({**evaluate.observe(world, cameras, size), **video}))
    evaluate.execute(world, path["gripper_motion"], path["opening"])
    return world.success()


def timed(p, model):
    """Seconds of wall clock and of processor time a frame a hand, after the first frame."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = track.track(p, "pose", model)
    frames = result["lost"][1:].size
    return result, (time.perf_counter() - wall) / frames, (time.process_time() - cpu) / frames


def all_cores(predictions, model):
    """Frames a second a hand when as many clips are tracked at once as there are cores, each in its own process."""
    os.environ["OMP_NUM_THREADS"] = "1"                   # the processes inherit it: a core each
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [(p, model) for p in predictions]
        list(pool.map(timed, *zip(*jobs[:2 * os.cpu_count()])))          # the processes start and import
        start = time.perf_counter()
        frames = sum(result["lost"][1:].size for result, _, _ in pool.map(timed, *zip(*jobs)))
        return frames / (time.perf_counter() - start)


def beside_open3d(rounds=20):
    """Point-to-plane on the same 2,000-point pairs, 5 mm and 3 degrees apart: the error of the source's points, and
    ms."""
    try:
        import open3d
    except ImportError:
        print("Open3D is not installed: pip install open3d")
        return
    registration = open3d.pipelines.registration
    print("\n| pair | ours, mm | Open3D, mm | ours, ms | Open3D, ms | ratio |\n|---|---|---|---|---|---|")
    for name, noise in (("same points", 0.0), ("resampled, 0.5 mm noise", 0.0005)):
        draw = np.random.default_rng(1)
        (vertices, faces) = data.load_mesh(HERE / "data/panda_hand.obj")
        target, normals = track.sample_surface(vertices, faces, 2000, 1)
        source = target[draw.permutation(2000)] if noise == 0 else track.sample_surface(vertices, faces, 2000, 2)[0]
        target, source = target + noise * draw.standard_normal(target.shape), source + noise * draw.standard_normal(
            source.shape
        )
        axis, shift = draw.standard_normal(3), draw.standard_normal(3)
        truth = np.eye(4)
        truth[:3, :3] = Rotation.from_rotvec(np.radians(3) * axis / np.linalg.norm(axis)).as_matrix()
        truth[:3, 3] = 0.005 * shift / np.linalg.norm(shift)
        moved = data.transform(source, data.invert(truth))
        a, b = open3d.geometry.PointCloud(), open3d.geometry.PointCloud()
        a.points, b.points, b.normals = (open3d.utility.Vector3dVector(x) for x in (moved, target, normals))
        criteria = registration.ICPConvergenceCriteria(1e-9, 1e-9, 50)
        calls = dict(
            ours=lambda: track.icp(moved, target, normals, None, 0.02, 50, kernel="none")[0],
            open3d=lambda: registration.registration_icp(
                a, b, 0.02, np.eye(4), registration.TransformationEstimationPointToPlane(), criteria
            ).transformation,
        )
        off, ms = {}, {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                start = time.perf_counter()
                T = call()
                ms[key].append(1000 * (time.perf_counter() - start))
                off[key] = 1000 * np.sqrt(((data.transform(moved, np.asarray(T)) - source)**2).sum(1).mean())
        ours, theirs = np.median(ms["ours"]), np.median(ms["open3d"])
        print(f"| {name} | {off['ours']:.4f} | {off['open3d']:.4f} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.1f} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--recorded", help="folder of recorded episodes in the public layout [synthetic ones]")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--episodes", type=int, default=5, help="of each task, at most")
    parser.add_argument("--demos", type=int, default=20, help="of each task, for row 6")
    parser.add_argument("--only", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="rows")
    parser.add_argument("--work", default="runs/bench_track", help="folder for the packed episodes")
    parser.add_argument("--size", type=data.parse_size, default=SIZE, help="HEIGHTxWIDTH of synthetic episodes, pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the cameras and the noise")
    parser.add_argument("--open3d", action="store_true", help="time our icp beside Open3D's")
    args = parser.parse_args()
    model = (
        track.hand_model(HERE / "data/panda_hand.obj", HERE / "data/panda_finger.obj")
        if args.recorded
        else track.hand_model()
    )
    draw = np.random.default_rng(args.seed)
    rows = {name: [] for name in ("1 two views", "1 one view", "3 degraded", "4 removed")}
    first, speed, recovered, predictions = [], [], [], []
    rows_on_clips = set(args.only) - {6}
    for name, p in tqdm(list(clips(args)) if rows_on_clips else [], desc="tracking", unit="episode"):
        if 5 in args.only:
            predictions.append(p)
        if {1, 5} & set(args.only):
            result, wall, cpu = timed(p, model)
            rows["1 two views"].append(errors(p, result))
            speed.append((wall, cpu))
        if 1 in args.only:
            alone = one_view(p)
            rows["1 one view"].append(errors(alone, track.track(alone, "pose", model)))
        if 2 in args.only:
            first += first_pose(p, model)
        if 3 in args.only:
            rows["3 degraded"].append(errors(p, track.track(degraded(p, draw), "pose", model)))
        if 4 in args.only:
            start, stop = 3, 6
            result = track.track(removed(p, start, stop), "pose", model)
            e = errors(p, result)
            arms = len(e["lost"]) // len(result["lost"][1:])
            lost, right = e["lost"].reshape(-1, arms), ((e["m"] < 0.02) & (e["deg"] < 10)).reshape(-1, arms)
            recovered.append((lost[start:stop].mean(), right[-2:].any(0).mean()))
    if any(rows.values()):
        print("\n| row | frames | median | median, degrees | within 2 cm and 10 degrees, % | the same, seen, % | "
              "lost, % | silently wrong, % | opening, median | closed right, % | the same, fingers seen, % |\n|" + "---|" * 11)
    for name, got in rows.items():
        if got:
            line(name, got)
    if first:
        ok = np.mean([m < 0.01 and deg < 5 for m, deg, _ in first])
        print(
            f"\n2 first pose from the mask: {100 * ok:.1f} % of {len(first)} within 1 cm and 5 degrees "
            f"modulo the half turn; median "
            f"{1000 * np.median([f[0] for f in first]):.1f} mm, {np.median([f[1] for f in first]):.1f} degrees"
        )
    if recovered:
        print(
            f"4 hand removed in three frames: {100 * np.mean([r[0] for r in recovered]):.1f} % of them reported lost; "
            f"{100 * np.mean([r[1] for r in recovered]):.1f} % of the hands tracked again by the end"
        )
    if speed and 5 in args.only:
        print(f"5 speed: {1 / np.mean([s[0] for s in speed]):.1f} frames a second a hand by the clock, "
              f"{1 / np.mean([s[1] for s in speed]):.1f} a second of processor time; one clip a core at once: "
              f"{all_cores(predictions, model):.1f} by the clock ({os.cpu_count()} cores, "
              f"load {os.getloadavg()[0]:.1f})")
    for task in args.tasks if 6 in args.only else []:
        done = [replayed(task, evaluate.ROLLOUT_SEED + k, args.size)
                for k in tqdm(range(args.demos), desc=f"replaying task {task}", unit="demo")]
        print(f"6 replayed in the synthetic world, {args.size[0]} x {args.size[1]}, task {task}: {sum(done)} of "
              f"{len(done)} succeed", flush=True)
    if args.open3d:
        beside_open3d()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"bench_track.py: {error}")
