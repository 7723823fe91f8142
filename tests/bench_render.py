"""Speed of the renderer, and how demonstrations survive noise. Run from the repository's root; minutes, not a test.

    python tests/bench_render.py                # frames a second of --workers processes (2), both picture sizes
    python tests/bench_render.py --replay       # demonstrations replayed with noise, 50 seeds a task
"""
import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


def film(task, seed, size, samples, frames):
    """Film a demonstration's first frames with 16 cameras; returns RGB-D-label pictures, wall seconds, CPU seconds."""
    world = data.World(task)
    world.reset(seed)
    grippers, openings = world.demonstration
    tips = grippers[..., :3, 3] + data.TCP * grippers[..., :3, 2]
    intrinsics, cam_in_world = data.sample_cameras(np.random.default_rng(seed), tips, size)
    start, cpu = time.perf_counter(), time.process_time()
    for gripper_in_world, opening in zip(grippers[:frames], openings[:frames]):
        world.step(gripper_in_world, opening)
        world.observe(intrinsics, cam_in_world, size, samples)
    return frames * len(intrinsics), time.perf_counter() - start, time.process_time() - cpu


def film_all(workers):
    print(f"{workers} processes, 16 cameras, whole demonstrations of 60 frames; fixed things are drawn once a camera")
    for size, frames in (((64, 80), 60), ((256, 320), 20)):
        for samples in (1, 3):
            with ProcessPoolExecutor(workers) as pool:
                jobs = [pool.submit(film, 1 + i % 3, i, size, samples, frames) for i in range(workers)]
                results = [job.result() for job in jobs]
            rate = sum(count / wall for count, wall, _ in results)
            cpu = sum(c for _, _, c in results) / sum(count for count, _, _ in results)
            print(f"{size[0]:4d} x {size[1]:3d}, {samples}x{samples} samples a pixel: {rate:6.1f} frames/s, "
                  f"{1000 * cpu:5.1f} CPU ms a frame")


def disturbed(gripper_in_world, metres, degrees, draw):
    """Poses (T,A,4,4) with normal noise in every frame: `metres` on each axis, and a turn of `degrees` on each axis."""
    noisy = gripper_in_world.copy()
    noisy[..., :3, 3] += draw.normal(0, metres, noisy.shape[:2] + (3,))
    turn = Rotation.from_rotvec(draw.normal(0, np.deg2rad(degrees), (noisy.shape[0] * noisy.shape[1], 3))).as_matrix()
    noisy[..., :3, :3] = turn.reshape(*noisy.shape[:2], 3, 3) @ noisy[..., :3, :3]
    return noisy


def replay(task, seed, metres=0.0, degrees=0.0, stride=1):
    """Record the demonstration, then do what was recorded, with noise, in the same scene afresh; did it succeed?"""
    world = data.World(task)
    world.reset(seed)
    states = []
    for gripper_in_world, opening in zip(*world.demonstration):
        world.step(gripper_in_world, opening)
        states.append((world.gripper_in_world, world.opening))
    grippers, openings = (np.stack(values) for values in zip(*states))
    kept = np.unique(np.append(np.arange(0, len(grippers), stride), len(grippers) - 1))
    grippers = disturbed(grippers[kept], metres, degrees, np.random.default_rng([task, seed, 7]))
    world.reset(seed)
    for gripper_in_world, opening in zip(grippers, openings[kept]):
        world.step(gripper_in_world, opening)
    return world.success()


def replay_all(seeds):
    print(f"replayed demonstrations that succeed, of {seeds} a task (tasks 1, 2, 3)")
    for text, arguments in {
            "as recorded, 10 Hz": dict(),
            "as recorded, every 5th frame (2 Hz)": dict(stride=5),
            "5 mm, 3 degrees, 10 Hz": dict(metres=0.005, degrees=3),
            "5 mm, 3 degrees, 2 Hz": dict(metres=0.005, degrees=3, stride=5),
            "1 cm, 5 degrees, 10 Hz": dict(metres=0.01, degrees=5),
            "2 cm, 5 degrees, 10 Hz": dict(metres=0.02, degrees=5),
            "5 cm, 3 degrees, 10 Hz": dict(metres=0.05, degrees=3),
            "5 cm, 3 degrees, 2 Hz": dict(metres=0.05, degrees=3, stride=5),
            }.items():
        print(f"{text:38}", *(f"{sum(replay(task, seed, **arguments) for seed in range(seeds)):3d}"
                              for task in data.TASKS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replay", action="store_true", help="replay with noise in place of timing")
    parser.add_argument("--seeds", type=int, default=50, help="demonstrations a task [50]")
    parser.add_argument("--workers", type=int, default=2, help="processes that are timed at once [2]")
    args = parser.parse_args()
    replay_all(args.seeds) if args.replay else film_all(args.workers)
