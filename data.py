"""The clip, the one dictionary that every stage reads and writes, and the episodes it is cut from.

    python data.py --task 1                            # render the synthetic world's episodes into data/task_1
    python data.py --task 1 --episodes 800 --every 5   # many scenes, at the 2 Hz of clips
    python data.py --task 1 --source FOLDER            # pack recorded episodes and say what was found
    python data.py --task 1 --source hub --episodes 3  # download and pack three of the public episodes

Each also draws preview.png: two cameras of an episode, and both clouds in one frame.

A *pointmap* is an image whose pixels hold metric x, y, z. Depth and intrinsics give it in the camera's own frame; poses
carry it into the reference view's, where the clouds of all views meet.

Letters   V views of a clip (view 0 is the reference), T predicted frames, F = T + 1 with the observed one, A arms,
          H W pixels, N points. Of an episode: R cameras, T frames. Of the renderer: K pictures at once, M faces.
Units     metres, seconds, pixels
Frames    cameras: OpenCV (x right, y down, z forward), integer pixel coordinates are pixel centres
          gripper: Franka's hand frame (z out of the palm, fingers slide along y, opening 0..0.08 m)
          world: z up, table top at z = 0, +x away from the robot, +y to its left
          `a_in_b` (4,4) takes a-coordinates to b-coordinates: points_in_b = transform(points_in_a, a_in_b)
          `points` without a frame in the name: of the reference camera at the observed instant

References: the method, arXiv 2507.01099; pointmaps in another view's frame, arXiv 2312.14132; the public data,
huggingface.co/datasets/Zeyi/4dgen-dataset.
"""
import argparse
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from tqdm import tqdm

FAR = 2.0                   # metres; farther depth counts as invalid
CLIP_HZ = 2                 # frames a second of a clip
FRAMES = 10                 # predicted ones: five seconds
MOVED = 0.013               # metres; a pixel whose point is farther than this from its observed point has moved
MIN_SPEED = 0.02            # m/s; a clip must see an arm move faster than this in its first STATIC_SECONDS
STATIC_SECONDS = 2.0
TRAIN_CAMERAS, TEST_CAMERAS = range(0, 12), range(12, 16)  # of a rig of 16, as in the paper


@dataclass(frozen=True)
class Task:
    name: str          # as in the paper
    folder: str        # as on the hub
    object: str        # name of the manipulated object in an episode's label names
    object_ids: tuple  # its label ids in public episodes, which carry no names


TASKS = {
    1: Task("StoreCerealBoxUnderShelf", "BimanualStoreCerealBoxUnderShelf", "cereal_box", (39,)),
    2: Task("PutSpatulaOnTable", "BimanualPutSpatulaOnTableFromUtensilCrock", "spatula", ()),
    3: Task("PlaceAppleFromBowlIntoBin", "BimanualPlaceAppleFromBowlIntoBin", "apple", (44,)),
}
OTHER, RIGHT_GRIPPER, LEFT_GRIPPER, OBJECT = 0, 1, 2, 3  # the labels of a packed episode
PUBLIC_GRIPPER_IDS = {RIGHT_GRIPPER: (29, 30, 31), LEFT_GRIPPER: (33, 34, 35)}


# ------------------------------------ geometry
# Down to point_maps for numpy arrays and torch tensors; the rest is numpy's.

def pixel_rays(height, width, intrinsics):
    """(..., H, W, 3) directions with z = 1 through the pixel centres of pinhole cameras (..., 3, 3)."""
    xp = np if isinstance(intrinsics, np.ndarray) else torch
    like = dict(dtype=intrinsics.dtype, device=intrinsics.device)
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    rays = xp.ones((*intrinsics.shape[:-2], 3, height, width), **like)  # channels first in memory: faster
    rays[..., 0, :, :] = (xp.arange(width, **like) - cx) / fx
    rays[..., 1, :, :] = (xp.arange(height, **like)[:, None] - cy) / fy
    return xp.moveaxis(rays, -3, -1)


def unproject(depth, intrinsics):
    """Depth (..., H, W) along z -> points (..., H, W, 3) in the camera's own frame."""
    return pixel_rays(*depth.shape[-2:], intrinsics) * depth[..., None]


def transform(points_in_a, a_in_b):
    """Points (..., 3) in frame a -> in frame b. The leading dimensions of a_in_b (..., 4, 4) are the points' first."""
    batch, shape = a_in_b.shape[:-2], points_in_a.shape
    flat = points_in_a.reshape(*shape[:len(batch)], -1, 3)            # (..., N, 3)
    moved = (a_in_b[..., :3, :3] @ flat.mT + a_in_b[..., :3, 3:]).mT  # this way round is faster
    return moved.reshape(*moved.shape[:-2], *shape[len(batch):])


def project(points_in_cam, intrinsics):
    """Points (..., 3) in a camera's frame -> pixels (..., 2) = (u, v), meaningless where z <= 0, and z (...,)."""
    homogeneous = (intrinsics @ points_in_cam[..., None])[..., 0]
    return homogeneous[..., :2] / homogeneous[..., 2:], homogeneous[..., 2]


def invert(a_in_b):
    """b_in_a of a rigid transform (..., 4, 4)."""
    b_in_a = a_in_b * 0
    rotation = a_in_b[..., :3, :3].mT
    b_in_a[..., :3, :3] = rotation
    b_in_a[..., :3, 3] = -(rotation @ a_in_b[..., :3, 3, None])[..., 0]
    b_in_a[..., 3, 3] = 1
    return b_in_a


def pose(position, rotation=np.eye(3)):
    """a_in_b (..., 4, 4) from frame a's position (..., 3) and rotation in frame b."""
    a_in_b = np.zeros((*np.shape(position)[:-1], 4, 4))
    a_in_b[..., :3, :3], a_in_b[..., :3, 3], a_in_b[..., 3, 3] = rotation, position, 1
    return a_in_b


def normalize_points(points):
    """Metres in [-1, 2] -> [-1, 1], an image's range. Nothing is clamped."""
    return (points - 0.5) / 1.5


def denormalize_points(points):
    return points * 1.5 + 0.5


def point_maps(depth, intrinsics):
    """Depth (..., H, W) m and intrinsics (..., 3, 3) -> points_in_own_cam (..., H, W, 3) and valid (..., H, W).

    A pixel without depth (0, negative, NaN, infinite or beyond FAR) is put on the plane z = FAR along its own ray and
    marked invalid. Left at 0 it would be the camera's position in another frame, a point that no surface has.
    """
    xp, valid = np if isinstance(depth, np.ndarray) else torch, (depth > 0) & (depth <= FAR)
    return unproject(xp.where(valid, depth, FAR), intrinsics), valid


def scale_intrinsics(intrinsics, old_size, new_size):
    """Intrinsics (..., 3, 3) of a picture resized from old_size (H, W) to new_size: u' = (u + 1/2) s - 1/2."""
    scaled = np.array(intrinsics, dtype=np.float64)
    for axis, s in ((0, new_size[1] / old_size[1]), (1, new_size[0] / old_size[0])):
        scaled[..., axis, axis] *= s
        scaled[..., axis, 2] = (scaled[..., axis, 2] + 0.5) * s - 0.5
    return scaled


def resize(frames, size, kind):
    """(..., H, W[, 3]) at size (H, W): 'rgb' bilinear with antialiasing; 'depth' and 'label' nearest, for between a
    gripper at 0.8 m and a table at 1.1 m lies no surface at 0.95 m."""
    old_size = frames.shape[-3:-1] if kind == "rgb" else frames.shape[-2:]
    if old_size == tuple(size):
        return frames
    if kind == "rgb":
        x = torch.from_numpy(np.ascontiguousarray(frames)).reshape(-1, *old_size, 3).movedim(-1, 1).float()
        x = F.interpolate(x, size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        return x.movedim(1, -1).reshape(*frames.shape[:-3], *size, 3).numpy()
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, old_size))
    return frames[..., rows[:, None], columns]


def rotation_from_6d(rot_6d):
    """(..., 6), the first two rows of a rotation -> (..., 3, 3), by Gram-Schmidt (arXiv 1812.07035, eq. 15)."""
    a, b = rot_6d[..., :3], rot_6d[..., 3:]
    x = a / np.linalg.norm(a, axis=-1, keepdims=True)
    y = b - (x * b).sum(-1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], -2)


def rotation_angle(rotation):
    """The angle of rotations (..., 3, 3) in radians (...,), exact near 0, where an arccos is not."""
    sines = np.stack([rotation[..., i, i - 2] - rotation[..., i - 2, i] for i in range(3)], -1)
    return np.arctan2(np.linalg.norm(sines, axis=-1), np.trace(rotation, axis1=-2, axis2=-1) - 1)


def pose_errors(a_in_ref, b_in_ref):
    """How far two poses (..., 4, 4) are apart: metres (...,) and degrees (...,)."""
    turned = a_in_ref[..., :3, :3].mT @ b_in_ref[..., :3, :3]
    return np.linalg.norm(a_in_ref[..., :3, 3] - b_in_ref[..., :3, 3], axis=-1), np.rad2deg(rotation_angle(turned))


def rigid_fit(source, target, weights):
    """source_in_target (..., 4, 4) from points (..., N, 3) and their partners, weighted least squares (Kabsch 1976)."""
    weights = (weights / weights.sum(-1, keepdims=True))[..., None]  # (..., N, 1)
    source_mean, target_mean = (weights * source).sum(-2), (weights * target).sum(-2)
    covariance = (source - source_mean[..., None, :]).mT @ (weights * (target - target_mean[..., None, :]))
    u, _, vt = np.linalg.svd(covariance)
    u[..., 2] *= np.sign(np.linalg.det(u @ vt))[..., None]  # a rotation, never a mirror image
    rotation = (u @ vt).mT
    return pose(target_mean - (rotation @ source_mean[..., None])[..., 0], rotation)


# ------------------------------------ files and pictures

@contextmanager
def reading(path, hint=""):
    """What goes wrong with a file that is read, as a ValueError of one line. hint: how it can be made."""
    hint = hint and ": " + hint
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is missing{hint}") from None
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise ValueError(f"cannot read {path}: {why.splitlines()[0]}") from None
    except Exception as error:  # of zip, zlib, json, npy, ...: whatever a damaged file makes them raise
        why = (str(error) or "it is empty").splitlines()[0]
        with open(path, "rb") as file:
            head = file.read(24)
        raise ValueError(f"{path} is damaged ({why}; begins with {head}){hint or ': replace or delete it'}") from None


@contextmanager
def writing(path):
    """Yields a name beside `path`, for a file or a folder that becomes `path` when all is written. A file that is there
    is replaced, a folder never."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed process left it
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def read_npz(path, hint=""):
    with reading(path, hint), np.load(path) as file:
        return dict(file)


def read_json(path, hint=""):
    with reading(path, hint):
        return json.loads(Path(path).read_text())


def write_npz(path, arrays):
    with writing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)


def write_json(path, values):
    with writing(path) as partial:
        partial.write_text(json.dumps(values, indent=1))


def pyplot():
    """matplotlib.pyplot on the Agg canvas, whatever MPLBACKEND says."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    return plt


def write_gif(path, frames, fps, seconds):
    """Frames (T, H, W, 3) uint8 as a gif at true speed, with a clock that shows `seconds` (T,) in a corner."""
    from PIL import Image, ImageDraw
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture, time in zip(pictures, seconds):
        ImageDraw.Draw(picture).text((3, 1), f"{time:+.1f} s", fill="white", stroke_fill="black", stroke_width=1)
    # One palette for all: of the frames' own, a small thing of a rare colour would not get one.
    some = np.concatenate([np.asarray(picture) for picture in pictures[::4]])
    palette = Image.fromarray(some).quantize(256, method=Image.Quantize.FASTOCTREE)
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    with writing(path) as partial:
        first.save(partial, "GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0)


# ------------------------------------ the clip

CLIP = {  # key: its axes and kind; the poses of views are those of the observed instant
    "observed_rgb": ("V H W 3", "rgb"),
    "observed_depth": ("V H W", "depth"),
    "observed_gripper": ("V A H W", "mask"),
    "observed_object": ("V H W", "mask"),
    "intrinsics": ("V 3 3", "intrinsics"),
    "observed_gripper_in_ref": ("A 4 4", "pose"),
    "observed_opening": ("A", "opening"),
    "ref_in_world": ("4 4", "pose"),
    "rgb": ("V T H W 3", "rgb"),  # the prediction
    "points": ("V T H W 3", "points"),
    "valid": ("V T H W", "mask"),
    "view_in_ref": ("V 4 4", "pose"),
    "true_rgb": ("V T H W 3", "rgb"),  # the truth, where it is known
    "true_points": ("V T H W 3", "points"),
    "true_valid": ("V T H W", "mask"),
    "true_view_in_ref": ("V 4 4", "pose"),
    "true_gripper": ("V T A H W", "mask"),
    "true_gripper_in_ref": ("F A 4 4", "pose"),
    "true_opening": ("F A", "opening"),
    "frame_index": ("T", "number"),  # which of the frames 0, 1, ... after the observed one
    "fps": ("", "number"),
}
NEEDS = {
    "observed": ("observed_rgb", "observed_depth", "intrinsics"),
    "prediction": ("rgb", "points"),
    "pose": ("observed_gripper_in_ref",),
    "mask": ("observed_gripper",),
    "truth": ("true_rgb", "true_points", "true_valid", "true_view_in_ref"),
}
KINDS = {
    "rgb": (np.uint8, "colours, uint8 0 to 255"),
    "depth": (np.float32, "integer millimetres or floating-point metres, most of them 0.05 m to 2 m, 0 for none"),
    "mask": (bool, "a mask: boolean, 0/1, 0/255 or 0..1"),
    "points": (np.float32, "floating-point metres"),
    "pose": (np.float64, "rigid transforms [[R, t], [0, 0, 0, 1]] in metres"),
    "opening": (np.float64, "the metres between two fingers, such as 0.04"),
    "number": (None, "finite numbers"),
    "intrinsics": (np.float64, "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of the {} picture, (cx, cy) near "
                               "its middle"),
}


def check_clip(clip, need=("observed",)):
    """The clip with every array in the dtype of its kind, or a ValueError that names key, shape, dtype or range.

    need: keys, or groups of NEEDS, that must be there. Masks may lack the arms' axis, and NaN points become invalid.
    """
    for key in sum((NEEDS.get(group, (group,)) for group in need), ()):
        if key not in clip:
            raise ValueError(f"the clip has no '{key}' ({CLIP[key][0]}), only {', '.join(clip)}")
    checked, lengths = dict(clip, fps=clip.get("fps", CLIP_HZ)), {}
    for key, (axes, kind) in CLIP.items():
        if key not in checked:
            continue
        axes, array = axes.split(), np.asarray(checked[key])
        if kind == "mask" and "A" in axes and array.ndim == len(axes) - 1:
            array = np.expand_dims(array, axes.index("A"))
        expected = [int(axis) if axis.isdigit() else lengths.get(axis) for axis in axes]
        if array.ndim != len(axes) or 0 in array.shape \
                or any(want not in (None, got) for want, got in zip(expected, array.shape)):
            known = "".join(f", {axis} = {lengths[axis]}" for axis in axes if axis in lengths)
            raise ValueError(f"'{key}' has shape {array.shape}, expected ({', '.join(axes)}){known}")
        lengths |= {axis: n for axis, n in zip(axes, array.shape) if not axis.isdigit()}
        if "T" in axes:
            lengths["F"] = lengths["T"] + 1
        checked[key] = canonical(array, kind, f"'{key}'", (lengths.get("H"), lengths.get("W")))
    for prefix in ("", "true_"):
        if (points := checked.get(prefix + "points")) is not None:
            finite = np.isfinite(points).all(-1)
            checked |= {prefix + "valid": checked.get(prefix + "valid", True) & finite,
                        prefix + "points": np.where(finite[..., None], points, FAR)}
    return checked


def canonical(array, kind, name, size=(None, None)):
    """The array in the dtype of its kind, if it can be what KINDS says; size (H, W): of the picture of intrinsics."""
    form, (dtype, expected) = array.dtype.kind, KINDS[kind]
    known = array[np.isfinite(array)] if form == "f" else array
    low, high = (known.min(), known.max()) if known.size and form in "buif" else (0, 0)
    good = form in "buif" and (known.size == array.size or kind in ("depth", "points"))
    if not good:
        pass
    elif kind == "rgb":
        good = form in "ui" and 0 <= low and high <= 255
    elif kind == "depth":
        unit = np.float32(1 if form == "f" else 0.001)
        measured = known[known > 0] * unit
        good = form != "b" and (high <= 0 or np.median(measured) >= 0.05 and (measured <= FAR).mean() >= 0.2)
        array = np.where((array > 0) & (array < np.inf), array, 0).astype(dtype) * unit
    elif kind == "mask":
        good = low >= 0 and (high <= 1 or high == 255)
        array = array > (high / 2 if high > 1 else 0.5)
    elif kind == "points":
        good = form == "f" and (not known.size or np.median(np.abs(known)) < 20)
    elif kind == "opening":
        good = -0.005 <= low and high <= 0.25
    elif kind == "pose":
        R = array[..., :3, :3].astype(float)
        off = max(np.abs(R @ R.mT - np.eye(3)).max(), np.abs(array[..., 3, :] - (0, 0, 0, 1)).max())
        good = off < 1e-3 and (np.linalg.det(R) > 0).all() and max(-low, high) < 20
    elif kind == "intrinsics":
        middle, focal = array[..., (0, 1), 2] / size[::-1] - 0.5, array[..., (0, 1), (0, 1)] / max(size)
        rest = array[..., (0, 1, 2, 2, 2), (1, 0, 0, 1, 2)] - (0, 0, 0, 0, 1)
        good = np.abs(middle).max() < 0.15 and 0.2 < focal.min() and focal.max() < 10 and np.abs(rest).max() < 1e-3
    if not good:
        holes = ", some of it not finite" * (known.size < array.size)
        raise ValueError(f"{name} is {known.dtype} {low:g} to {high:g}{holes}: expected "
                         + expected.format(size_text(size)))
    return array.astype(dtype or array.dtype)


def clip_stride(rate_hz, name):
    """Recorded frames from one frame of a clip to the next."""
    stride = round(rate_hz / CLIP_HZ) if 0 < rate_hz < 1e6 else 0
    if stride < 1 or abs(stride * CLIP_HZ / rate_hz - 1) > 0.02:
        raise ValueError(f"{name} has {rate_hz:g} frames a second: expected a multiple of {CLIP_HZ}")
    return stride


def read_clip(episode, start, cameras, predicted=range(FRAMES), size=None):
    """The clip (see CLIP) that an episode's `cameras` (from 0, the reference first) observe at its frame `start`.

    predicted: which of the frames 0, 1, ... at CLIP_HZ after that one; size (H, W): by default the episode's.
    """
    cameras, predicted, size = np.asarray(cameras), np.asarray(predicted, int), tuple(size or episode.size)
    times = start + episode.stride * np.concatenate([[0], predicted + 1])  # (F,)
    numbers = [str(c + 1) for c in cameras]
    if not (0 <= min(cameras) <= max(cameras) < episode.cameras and 0 <= start <= max(times) < episode.frames):
        raise ValueError(f"{episode.folder} has {episode.cameras} cameras and {episode.frames} frames, not cameras "
                         f"{', '.join(numbers)} from {start} to {max(times)}")
    rgb, depth, label = (resize(getattr(episode, kind)[cameras[:, None], times], size, kind)
                         for kind in ("rgb", "depth", "label"))                 # (V, F, H, W, ...)
    depth = depth / np.float32(1000)
    intrinsics = scale_intrinsics(episode.intrinsics[cameras], episode.size, size)  # (V, 3, 3)
    ref_in_world = episode.cam_in_world[cameras[0], start]
    world_in_ref = invert(ref_in_world)
    view_in_ref = world_in_ref @ episode.cam_in_world[cameras][:, times]        # (V, F, 4, 4)
    own, valid = point_maps(depth[:, 1:], intrinsics[:, None].astype(np.float32))  # (V, T, H, W, 3)
    gripper_in_ref, opening = world_in_ref @ episode.gripper_in_world[times], episode.gripper_opening[times]
    clip = dict(
        name=f"{episode.folder.name} t{start} cameras {'-'.join(numbers)}", fps=float(CLIP_HZ),
        frame_index=predicted, ref_in_world=ref_in_world, intrinsics=intrinsics,
        observed_rgb=rgb[:, 0], observed_depth=depth[:, 0],
        observed_gripper_in_ref=gripper_in_ref[0], observed_opening=opening[0],
        true_rgb=rgb[:, 1:], true_points=transform(own, view_in_ref[:, 1:].astype(np.float32)), true_valid=valid,
        true_view_in_ref=view_in_ref[:, 0], true_gripper_in_ref=gripper_in_ref, true_opening=opening)
    if episode.labelled:
        hands = RIGHT_GRIPPER + np.arange(opening.shape[1])  # (A,)
        gripper = label[:, :, None] == hands[:, None, None]  # (V, F, A, H, W)
        clip |= dict(observed_gripper=gripper[:, 0], true_gripper=gripper[:, 1:],
                     observed_object=label[:, 0] == OBJECT)
    return clip


def truth_row(clip):
    """The clip with its truth as its prediction."""
    return clip | {key: clip["true_" + key] for key in ("rgb", "points", "valid", "view_in_ref")}


def to_tensors(clip):
    """A clip as what the networks take. Without a truth F = 1, and points, moving and frame_index are absent.

    rgb (V,F,3,H,W) in [-1, 1], points (V,F,3,H,W) normalised, valid and gripper, any hand's, (V,F,H,W), own_points
    (V,3,H,W): the observed ones in the view's own camera frame, all that a robot has, frame_index (T,), moving
    (V,T,H,W): the true point is measured, and none was observed in that pixel within MOVED of it.
    """
    known = "true_rgb" in clip
    channels_first = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, -3)))
    frames = lambda seen, key: np.concatenate([seen[:, None], clip[key]], 1) if known else seen[:, None]  # (V, F, ...)
    own, valid = point_maps(clip["observed_depth"], clip["intrinsics"].astype(np.float32))  # (V, H, W, 3)
    rgb, valid = frames(clip["observed_rgb"], "true_rgb"), frames(valid, "true_valid")
    labelled = "observed_gripper" in clip
    gripper = frames(clip["observed_gripper"], "true_gripper").any(2) if labelled else np.zeros_like(valid)
    item = dict(rgb=channels_first(rgb) / 127.5 - 1, valid=torch.from_numpy(valid), gripper=torch.from_numpy(gripper),
                own_points=normalize_points(channels_first(own)))
    if known:
        now = transform(own, clip["true_view_in_ref"].astype(np.float32))
        points = channels_first(frames(now, "true_points"))  # (V, F, 3, H, W) m
        near = ((points[:, 1:] - points[:, :1]).square().sum(2) <= MOVED**2).numpy() & valid[:, :1]
        item |= dict(points=normalize_points(points), moving=torch.from_numpy(valid[:, 1:] & ~near),
                     frame_index=torch.as_tensor(clip["frame_index"]))
    return item


def split_of(name):
    """'train' or 'test' by the name of an episode's folder alone: more episodes move none."""
    return "test" if zlib.crc32(name.encode()) % 5 == 0 else "train"


def moving_starts(episode, frames=FRAMES):
    """Frames at which a clip can start: it must fit, and an arm must move in its first two seconds."""
    last = episode.frames - 1 - episode.stride * frames
    window = round(STATIC_SECONDS * episode.rate_hz)
    speed = np.linalg.norm(np.diff(episode.gripper_in_world[..., :3, 3], axis=0), axis=-1) * episode.rate_hz  # (T-1,A)
    return [t for t in range(last + 1) if speed[t:t + window].max(initial=0) > MIN_SPEED]


class Clips:
    """Clips of V views from the cameras and episodes of one split: [i] as tensors, .clip(i) as the metric dictionary,
    each a function of (seed, i) alone. `single`: one predicted frame (T = 1), the nearer of two random ones, for a
    robot acts on the first and looks again; the share `late` of these starts anywhere, with as many ahead as are left:
    a whole clip fits only where an episode begins, and the robot looks until it ends.

    A rig of fewer than 16 cameras serves both splits with all of them, and a folder whose episodes are all of one
    split with all of those (`held_out` is then False).
    """

    def __init__(self, folder, split, size, views=2, frames=FRAMES, single=False, late=0.0, seed=0):
        every = [load_episode(path) for path in episode_folders(folder)]
        chosen = [episode for episode in every if split_of(episode.folder.name) == split]
        self.held_out = 0 < len(chosen) < len(every)
        self.cuts = []  # (episode, frames it can start at with a whole clip ahead, or with one frame, cameras)
        for episode in chosen or every:
            half = TRAIN_CAMERAS if split == "train" else TEST_CAMERAS
            cameras = np.array(half if episode.cameras >= 16 else range(episode.cameras))
            if min(np.array(episode.size) - size) < 0 or len(cameras) < views:
                raise ValueError(f"{episode.folder} has {len(cameras)} cameras for the {split} split at "
                                 f"{size_text(episode.size)}, not {views} at {size_text(size)}: see data.py --size")
            if starts := moving_starts(episode, frames):
                self.cuts.append((episode, starts, moving_starts(episode, 1), cameras))
        if not self.cuts:
            raise ValueError(f"no {split} episode of {folder} holds a moving clip of 1 + {frames} frames")
        self.size, self.views, self.frames = tuple(size), views, frames
        self.single, self.late, self.seed = single, late, seed

    def __getitem__(self, i):
        return to_tensors(self.clip(i))

    def clip(self, i):
        draw = np.random.default_rng([self.seed, i])
        episode, starts, anywhere, cameras = self.cuts[draw.integers(len(self.cuts))]
        late = self.single and self.late and draw.random() < self.late
        start, cameras = int(draw.choice(anywhere if late else starts)), draw.choice(cameras, self.views, replace=False)
        left = min(self.frames, (episode.frames - 1 - start) // episode.stride)
        predicted = [draw.integers(left, size=2).min()] if self.single else np.arange(self.frames)
        return read_clip(episode, start, cameras, predicted, self.size)


# ------------------------------------ packed episodes
# A folder named after the recording: rgb.npy (R,T,H,W,3) uint8, depth.npy (R,T,H,W) uint16 mm (0: nothing measured),
# label.npy (R,T,H,W) uint8, cameras.npz, robot.npz and episode.json (task, source, rate_hz, labelled, ...).

AGAIN = "delete its folder and run data.py again"


class Episode(SimpleNamespace):
    """A packed episode: size (H, W), cameras R, frames T, rgb, depth, label, intrinsics (R,3,3), cam_in_world
    (R,T,4,4), gripper_in_world (T,A,4,4), gripper_opening (T,A), rate_hz, stride, labelled, info, folder. Pictures are
    mapped only while they are read, so that any number of episodes can be open."""
    rgb = property(lambda self: self.map("rgb.npy"))
    depth = property(lambda self: self.map("depth.npy"))
    label = property(lambda self: self.map("label.npy"))

    def map(self, name):
        with reading(self.folder / name, AGAIN):
            return np.load(self.folder / name, mmap_mode="r")


def load_episode(folder):
    folder = Path(folder)
    arrays = read_npz(folder / "cameras.npz", AGAIN) | read_npz(folder / "robot.npz", AGAIN)
    with reading(path := folder / "episode.json", AGAIN):
        info = json.loads(path.read_text())
        episode = Episode(folder=folder, info=info, **arrays, rate_hz=info["rate_hz"],
                          stride=clip_stride(info["rate_hz"], folder), labelled=info.get("labelled", True))
    episode.cameras, episode.frames, *size = episode.rgb.shape[:4]
    episode.size = tuple(size)
    if episode.cam_in_world.ndim == 3:  # cameras that stand
        episode.cam_in_world = episode.cam_in_world[:, None].repeat(episode.frames, 1)
    return episode


def episode_folders(folder):
    """The packed episodes in a folder, in order of their names."""
    found = sorted(path.parent for path in Path(folder).glob("*/episode.json"))
    found = [path for path in found if path.suffix != ".partial"]  # a killed process left that one
    if not found:
        raise ValueError(f"no packed episodes in {folder}: run python data.py --task N --out {folder}")
    return found


def save_episode(folder, rgb, depth, label, intrinsics, cam_in_world, gripper_in_world, gripper_opening, info):
    """Write one packed episode: its folder appears when it is complete."""
    with writing(folder) as partial:
        partial.mkdir()
        for name, array in (("rgb", rgb), ("depth", depth), ("label", label)):
            np.save(partial / f"{name}.npy", array)
        np.savez(partial / "cameras.npz", intrinsics=intrinsics, cam_in_world=cam_in_world)
        np.savez(partial / "robot.npz", gripper_in_world=gripper_in_world, gripper_opening=gripper_opening)
        write_json(partial / "episode.json", info)


def packed_already(out, task, source, size):
    """The names of the episodes that `out` holds. Another source, task or size is refused."""
    packed = [load_episode(path.parent) for path in Path(out).glob("*/episode.json")]
    for episode in packed:
        there = f"{episode.info['source']}, task {episode.info['task']}, {size_text(episode.size)}"
        if there != (asked := f"{source}, task {task}, {size_text(size)}"):
            raise ValueError(f"{episode.folder} is {there}, not {asked}: one folder holds one kind, give another --out")
    return [episode.folder.name for episode in packed]


# ------------------------------------ recorded episodes, the public layout
# A folder each, `<session>/diffusion_spartan/episode_K/processed` or any other, with the files and keys that README.md
# lists. Depth may be floating-point metres, too. metadata.yaml, if any: rate_hz [10]; label_names,
# {id: name}, where names begin with right_hand, right_finger, left_hand, left_finger or TASKS's object [public ids].

HUB_DATASET = "Zeyi/4dgen-dataset"


def natural(name):
    """A key to sort by: episode_2 before episode_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def ask_hub(method, **arguments):
    import huggingface_hub
    try:
        return getattr(huggingface_hub.HfApi(), method)(HUB_DATASET, repo_type="dataset", **arguments)
    except Exception as error:  # the client has a dozen types for "no", "not now" and "not you"
        raise ValueError(f"cannot read huggingface.co/datasets/{HUB_DATASET} ({type(error).__name__}): check the "
                         "network, accept its terms and run `hf auth login`, or pass --source FOLDER") from None


def find_recorded(source, task):
    """{session_episode: folder} of a task's recordings below the folder `source`, or on the "hub"."""
    if source == "hub":
        files = [Path(file) for file in ask_hub("list_repo_files") if file.startswith(TASKS[task].folder)]
    elif Path(source).is_dir():
        files = Path(source).resolve().rglob("observations.npz")
    else:
        raise ValueError(f"--source {source}: no such folder (or say synthetic, or hub)")
    others, found = {t.folder for number, t in TASKS.items() if number != task}, {}
    folders = {file.parent for file in files if file.name == "observations.npz" and not others & set(file.parts)}
    raw = {folder for folder in folders if folder.name != "processed" and folder.with_name("processed") in folders}
    for folder in sorted(folders - raw, key=natural):
        name = "_".join([part for part in folder.parts[1:] if part not in ("processed", "diffusion_spartan")][-2:])
        if name in found:
            raise ValueError(f"{found[name]} and {folder} would both be packed as {name}: rename one of them")
        found[name] = folder
    if not found:
        raise ValueError(f"{source} holds no observations.npz of task {task}: README.md has the layout")
    return found


def read_metadata(path, task):
    """rate_hz and {packed label: recorded ids} of a recording."""
    rate_hz, ids = 10, PUBLIC_GRIPPER_IDS | {OBJECT: TASKS[task].object_ids}
    if path.exists():
        with reading(path):
            metadata = yaml.safe_load(path.read_text())
            rate_hz = float(metadata.get("rate_hz", rate_hz))
            if names := metadata.get("label_names"):
                starts = ("right_hand", "right_finger"), ("left_hand", "left_finger"), TASKS[task].object
                ids = {1 + k: [int(i) for i in names if names[i].startswith(s)] for k, s in enumerate(starts)}
    return rate_hz, ids


def read_recorded(path, key, *shapes, kind="number", size=(None, None)):
    """The array `key` of an npz file, if it has one of `shapes` (None: any length) and fits its kind."""
    with reading(path), np.load(path) as file:
        array = file[key] if key in file else None
    if array is None:
        raise ValueError(f"{path} has no array '{key}'")
    fits = lambda shape: len(shape) == array.ndim and all(want in (None, n) for want, n in zip(shape, array.shape))
    if not any(map(fits, shapes)):
        expected = " or ".join(map(str, shapes)).replace("None", "any")
        raise ValueError(f"{path}: '{key}' has shape {array.shape}, expected {expected}")
    return canonical(array, kind, f"{path}: '{key}'", size)


def pack_recorded(folder, out, task, size):
    file, intrinsics, extrinsics = (folder / f"{name}.npz" for name in ("observations", "intrinsics", "extrinsics"))
    rate_hz, label_ids = read_metadata(folder / "metadata.yaml", task)
    clip_stride(rate_hz, folder)
    with reading(file), np.load(file) as arrays:
        keys = arrays.files
    names = sorted((key for key in keys if key + "_depth" in keys or key + "_label" in keys), key=natural)
    if len(names) < 2:
        raise ValueError(f"{file} has {len(names)} cameras (NAME and NAME_depth), two are needed")
    labelled = any(name + "_label" in keys for name in names)

    cameras, frames = [], None
    for name in names:
        rgb = read_recorded(file, name, (frames, None, None, 3), kind="rgb")
        frames, *old_size = shape = rgb.shape[:3]
        if min(np.array(old_size) - size) < 0:
            raise ValueError(f"{file}: '{name}' has {size_text(old_size)} pixels, less than --size {size_text(size)}")
        depth = read_recorded(file, name + "_depth", shape, kind="depth")  # m
        label = np.zeros(shape, np.uint8)
        if labelled:
            recorded = read_recorded(file, name + "_label", shape)
            for number, ids in label_ids.items():
                label[np.isin(recorded, ids)] = number
        K = read_recorded(intrinsics, name, (3, 3), kind="intrinsics", size=old_size)
        cam_in_world = read_recorded(extrinsics, name, (frames, 4, 4), (4, 4), kind="pose")
        mm = np.where(depth < 65, np.rint(depth * 1000), 0).astype(np.uint16)
        cameras.append((resize(rgb, size, "rgb"), resize(mm, size, "depth"), resize(label, size, "label"),
                        scale_intrinsics(K, old_size, size), np.broadcast_to(cam_in_world, (frames, 4, 4))))

    key = "robot__actual__{}__{}::panda_{}".format  # the desired poses run ahead of the hand
    gripper_in_world, opening = [], []
    for arm in ("right", "left")[:1 + (key("poses", "left", "_xyz") in keys)]:
        xyz = read_recorded(file, at := key("poses", arm, "_xyz"), (frames, 3))
        rot_6d = read_recorded(file, key("poses", arm, "_rot_6d"), (frames, 6))
        gripper_in_world.append(canonical(pose(xyz, rotation_from_6d(rot_6d)), "pose", f"{file}: '{at}' with rot_6d"))
        width = read_recorded(file, key("grippers", arm, "hand"), (frames, 1), (frames,), kind="opening")
        opening.append(width.reshape(frames))
    info = dict(task=task, source="recorded", rate_hz=rate_hz, labelled=labelled, cameras=names)
    save_episode(out, *(np.stack(arrays) for arrays in zip(*cameras)), np.stack(gripper_in_world, 1),
                 np.stack(opening, 1), info)


def pack_folder(source, task, out, size, episodes=None):
    """Pack a task's first `episodes` recordings, of a folder or the "hub", that `out` has not yet: their names."""
    out, packed = Path(out), packed_already(out, task, "recorded", size)
    found = dict([*find_recorded(source, task).items()][:episodes])
    raw, new = out / "raw.partial", [name for name in found if name not in packed]
    if known := len(found) - len(new):
        print(f"{known} of {source} were packed before: delete their folders in {out} to pack them anew")
    for name in tqdm(new, desc=f"packing {source}", unit="episode"):
        if source == "hub":
            files = [f"{found[name]}/*.npz", f"{found[name]}/metadata.yaml"]
            ask_hub("snapshot_download", local_dir=raw, allow_patterns=files)
        pack_recorded(raw / found[name], out / name, task, size)  # what lies below a folder has an absolute path
        shutil.rmtree(raw, ignore_errors=True)
    return new


def report(folder):
    """Print what a packed episode holds, and how far from the others' the points of each camera are."""
    episode = load_episode(folder)
    points, valid = point_maps(episode.depth[:, 0] / 1000, episode.intrinsics)
    points, label = transform(points, episode.cam_in_world[:, 0]), episode.label[:, 0]  # in the world
    clouds = [cloud[seen] for cloud, seen in zip(points, valid)]
    print(f"{folder}: {episode.cameras} cameras at {size_text(episode.size)}, {episode.frames} frames at "
          f"{episode.rate_hz:g} Hz, {len(moving_starts(episode))} moving clips; depth in {valid.mean():.0%} of the "
          f"pixels; {episode.gripper_opening.shape[1]} hands, {'' if episode.labelled else 'not '}labelled")
    for c, name in enumerate(episode.info["cameras"]):
        some, others = clouds[c][::1 + len(clouds[c]) // 4000], np.concatenate(clouds[:c] + clouds[c + 1:])
        apart = 1000 * np.median(cKDTree(others).query(some)[0]) if len(some) and len(others) else np.nan
        doubt = "" if apart < 30 else "  <- check its extrinsics, intrinsics and depth unit"
        print(f"  camera {c + 1:2d} {name:10} cloud {apart:.0f} mm from the others'{doubt}")
    for arm, hand in enumerate(episode.gripper_in_world[0]) if episode.labelled else ():
        shown = points[valid & (label == RIGHT_GRIPPER + arm)]
        apart = 1000 * np.linalg.norm(np.median(shown, 0) - hand[:3, 3]) if len(shown) else np.nan
        doubt = "" if apart < 150 else "  <- check label_names and the hand's poses"
        print(f"  hand {arm + 1}: {len(shown)} labelled pixels, {apart:.0f} mm from its pose{doubt}")


# ------------------------------------ renderer

def unit(vector):
    """The vector (3,) at length 1."""
    return vector / np.linalg.norm(vector)


def look_at(position, target):
    """cam_in_world (4,4) of a camera at `position` that looks at `target`, upright."""
    z = unit(np.subtract(target, position))
    x = unit(np.cross(z, UP))
    return pose(position, np.stack([x, np.cross(z, x), z], 1))


def ranges(first, count):
    """first (n,), count (n,) -> owner, value: i stands count[i] times, beside first[i], first[i] + 1, ..."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) + np.repeat(first - (np.cumsum(count) - count), count)


def rasterize(vertices_in_cam, faces, intrinsics, height, width, cull=False):
    """A mesh in K pictures: depth (K,H,W) float32 m of the nearest surface (0: none), its face (K,H,W) (-1).

    vertices_in_cam (K,N,3), faces (M,3), intrinsics (K,3,3) or (3,3). `cull` leaves out faces whose corners run
    clockwise, the insides of closed meshes.

    With the corners' q_i = intrinsics v_i as columns of Q, the ray of pixel p = (x, y, 1) meets the face where all of
    w = Q^-1 p are >= 0, at 1/z = sum_i w_i: linear in x and y, and no vertex is divided by its z, so that faces that
    reach behind the camera need no clipping (Olano and Greer 1997).
    """
    vertices_in_cam, faces = np.asarray(vertices_in_cam, float), np.asarray(faces)
    K, pixels = len(vertices_in_cam), height * width
    # 1. The pixel box of every face in every picture. Most faces of a fine mesh end here.
    q = np.moveaxis(vertices_in_cam @ intrinsics.mT, -1, 0)  # (3,K,N), the last one is z
    in_front = q[2] > 0.01  # m: what is nearer has no bound in the picture
    xy, last = q[:2] / np.where(in_front, q[2], 1), np.array([[[width - 1]], [[height - 1]]])
    low = np.ceil(np.where(in_front, xy, 0)[..., faces].min(-1).clip(0, 2**30))  # (2,K,M); a corner behind: no bound
    high = np.floor(np.where(in_front, xy, np.inf)[..., faces].max(-1).clip(max=last))
    view, face = np.nonzero((low <= high).all(0) & in_front[:, faces].any(-1))
    low, high = low[:, view, face].astype(int), high[:, view, face].astype(int)  # (2,n)

    # 2. The three edges of every face, as functions of (x, y, 1) that are >= 0 inside.
    q0, q1, q2 = (q[:, view, corner[face]] for corner in faces.T)  # (3,n)
    w = np.stack([np.cross(a, b, axis=0) for a, b in ((q1, q2), (q2, q0), (q0, q1))])  # (3,3,n)
    det = (w[0] * q0).sum(0)  # < 0: seen from its outside
    visible = np.flatnonzero(det < -1e-12 if cull else np.abs(det) > 1e-12)  # a face seen edge-on covers nothing
    view, face, low, high = view[visible], face[visible], low[:, visible], high[:, visible]
    w = w[..., visible] / det[visible]  # (3,3,n), the rows of Q^-1
    inverse_z = w.sum(0)  # (3,n)

    # 3. The span of pixels, start to stop, in every row of every face.
    tri, y = ranges(low[1], high[1] - low[1] + 1)
    slope, offset = w[:, 0, tri], w[:, 1, tri] * y + w[:, 2, tri]  # (3,rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = -offset / slope
    left = np.where(slope > 0, root, np.where((slope == 0) & (offset < 0), np.inf, -np.inf)).max(0)
    right = np.where(slope < 0, root, np.inf).min(0)
    # 1e-6: both neighbours own a pixel centre on their common edge, so that rounding opens no crack.
    start = np.ceil(np.clip(left - 1e-6, low[0, tri], width)).astype(int)
    stop = np.floor(np.clip(right + 1e-6, -1, high[0, tri])).astype(int)
    row, x = ranges(start, (stop - start + 1).clip(0))

    # 4. The z-buffer: the largest 1/z wins, as the maximum of integers (bits of 1/z, face); bits sort as floats do.
    fragment = (inverse_z[1, tri] * y + inverse_z[2, tri])[row] + inverse_z[0, tri][row] * x
    key = fragment.astype(np.float32).view(np.int32).astype(np.int64) << 32 | face[tri][row]
    buffer = np.zeros(K * pixels, np.int64)
    np.maximum.at(buffer, (view[tri] * pixels + y * width)[row] + x, key)
    nearest = (buffer >> 32).astype(np.int32).view(np.float32)
    depth = np.divide(1, nearest, out=np.zeros_like(nearest), where=buffer > 0)
    face = np.where(buffer > 0, buffer & 0xffffffff, -1).astype(np.int32)
    return depth.reshape(K, height, width), face.reshape(K, height, width)


LAMP_PIXELS = 512         # on a side of the lamp's own picture of the world, which tells what it lights
LAMP_TARGET = 0.05, 0, 0  # where it looks, in the world
LAMP_FOCAL, LAMP_CENTRE = 0.75 * LAMP_PIXELS, LAMP_PIXELS / 2


@dataclass(frozen=True)
class Body:
    mesh: tuple    # vertices (N,3) in the body's own frame, faces (M,3)
    paint: object  # points (P,3) and normals (P,3) in that frame -> colours (P,3) in 0..1
    label: int = OTHER


def draw_bodies(placed, intrinsics, cam_in_world, size, lamp, samples):
    """What K cameras see of bodies [(Body, body_in_world)] before shadows fall, and how far the light gets through each
    pixel of the lamp. A camera's: pixels (P,) with something in them, its depth, label, colour, light of the sky and of
    the lamp, and where the lamp sees it: distance along its axis and pixel."""
    H, W = fine = size[0] * samples, size[1] * samples
    single = lambda x: np.asarray(x, np.float32)
    vertices, faces = merge(*((transform(body.mesh[0], at), body.mesh[1]) for body, at in placed))
    body_of_face = np.repeat(np.arange(len(placed)), [len(body.mesh[1]) for body, _ in placed])
    labels = np.array([body.label for body, _ in placed], np.uint8)
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)

    world_in_lamp = invert(look_at(lamp, LAMP_TARGET))
    lens = np.array([[LAMP_FOCAL, 0, LAMP_CENTRE], [0, LAMP_FOCAL, LAMP_CENTRE], [0, 0, 1]])
    reach = rasterize(transform(vertices, world_in_lamp)[None], faces, lens, LAMP_PIXELS, LAMP_PIXELS, cull=True)[0]
    views = []
    for K, camera in zip(scale_intrinsics(intrinsics, size, fine), cam_in_world):
        in_camera = transform(vertices, invert(camera))[None]
        depth, face = (x.ravel() for x in rasterize(in_camera, faces, K, H, W, cull=True))
        pixel = np.flatnonzero(face >= 0)  # (P,)
        depth, face = depth[pixel], face[pixel]
        rays = single(np.stack([pixel % W, pixel // W, np.ones(len(pixel))], 1))
        rays = rays @ single(camera[:3, :3] @ np.linalg.inv(K)).T
        points = single(camera[:3, 3]) + rays * depth[:, None]  # (P,3) in the world
        normal, body, to_lamp = single(normals)[face], body_of_face[face], single(lamp) - points
        cosine = np.einsum("pi,pi->p", normal, to_lamp) / np.sqrt(np.einsum("pi,pi->p", to_lamp, to_lamp))
        # Points are moved off their surface by 6 mm, a pixel of the lamp, or it would shade itself.
        in_lamp = transform(points + 0.006 * normal, single(world_in_lamp))
        xy = in_lamp[:, :2] / in_lamp[:, 2:] * LAMP_FOCAL + LAMP_CENTRE + 0.5
        lamp_z = np.where(((xy >= 0) & (xy < LAMP_PIXELS)).all(1), in_lamp[:, 2], 0)
        column, row = xy.clip(0, LAMP_PIXELS - 1).astype(int).T
        color = np.zeros_like(points)
        for i, (painted, at) in enumerate(placed):
            mine, rotation = body == i, single(at[:3, :3])
            color[mine] = painted.paint((points[mine] - single(at[:3, 3])) @ rotation, normal[mine] @ rotation)
        views.append((pixel, depth, labels[body], color, 0.42 + 0.13 * normal[:, 2], 0.55 * cosine.clip(0), lamp_z,
                      row * LAMP_PIXELS + column))
    return views, np.where(reach > 0, reach, np.inf).ravel()


def render(placed, intrinsics, cam_in_world, size, lamp, samples=1, *behind):
    """Closed painted bodies under a sky and a lamp (3,): rgb (K,H,W,3) uint8, depth (K,H,W) m (0: none), label (K,H,W).

    `samples` (odd) rays a pixel and axis smooth the colours; the rest is that of the pixel's centre. behind: what
    draw_bodies made of other bodies.
    """
    layers = *behind, draw_bodies(placed, intrinsics, cam_in_world, size, lamp, samples)
    K, H, W = len(intrinsics), size[0] * samples, size[1] * samples
    depth, label = np.full((K, H * W), np.inf, np.float32), np.zeros((K, H * W), np.uint8)
    rgb, reach = np.zeros((K, H * W, 3), np.float32), np.min([reach for _, reach in layers], 0)
    for views, _ in layers:
        for k, (pixel, z, number, color, sky, sun, lamp_z, lamp_pixel) in enumerate(views):
            shaded = np.minimum(color * (sky + sun * (lamp_z < reach[lamp_pixel]))[:, None], 1)
            seen = z < depth[k, pixel]
            at = k, pixel[seen]
            depth[at], label[at], rgb[at] = z[seen], number[seen], shaded[seen]
    depth, label = (x.reshape(K, H, W)[:, samples // 2::samples, samples // 2::samples] for x in (depth, label))
    rgb = rgb.reshape(K, size[0], samples, size[1], samples, 3).sum(2).sum(3) / samples**2
    return (rgb * 255).round().astype(np.uint8), np.where(np.isinf(depth), 0, depth), label.copy()


# ------------------------------------ meshes and paint

def load_mesh(path):
    """An OBJ file in metres -> vertices (N,3), faces (M,3); polygons become fans of triangles."""
    with reading(path, "give a mesh in OBJ format"):
        text = Path(path).read_text("utf-8-sig", "replace").replace("\\\n", " ")
        words = [line.split() for line in text.splitlines()]
        vertices = np.array([w[1:4] for w in words if w[:1] == ["v"]], float)
        above = np.cumsum([w[:1] == ["v"] for w in words])  # vertices above each line
        polygons = [[i - 1 if i > 0 else n + i for i in (int(v.split("/")[0]) for v in w[1:])]
                    for n, w in zip(above, words) if w[:1] == ["f"]]  # counted from 1, or back from the last one above
        faces = np.array([(f[0], *pair) for f in polygons for pair in zip(f[1:], f[2:])])
        if faces.min() < 0:
            raise ValueError("a face has a vertex that is not there")
        extent = np.ptp(vertices[faces].reshape(-1, 3), axis=0).max()
    if not 0.001 <= extent <= 2:
        raise ValueError(f"{path} is {extent:g} m long, read in metres: scale it (from millimetres, by 0.001)")
    return vertices, faces


def skin(rings):
    """rings (n,m,3), counter-clockwise seen from the last one -> the closed mesh through them, normals outward."""
    n, m, _ = rings.shape
    vertices = np.concatenate([rings.reshape(-1, 3), rings[[0, -1]].mean(1)])  # the last two: middles of the caps
    row, j, following, top = m * np.arange(n - 1)[:, None], np.arange(m), (np.arange(m) + 1) % m, (n - 1) * m
    here, right = row + j, row + following
    parts = ((here, right, right + m), (here, right + m, here + m),
             (0 * j + n * m, following, j), (0 * j + n * m + 1, top + j, top + following))
    return vertices, np.concatenate([np.stack(part, -1).reshape(-1, 3) for part in parts])


def loft(*sections):
    """Rectangles (z, low x, high x, low y, high y) in order of z, joined into one solid."""
    return skin(np.array([[(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]
                          for z, x0, x1, y0, y1 in sections], float))


def box(size, centre=(0, 0, 0)):
    (x0, y0, z0), (x1, y1, z1) = (centre + sign * np.array(size) / 2 for sign in (-1, 1))
    return loft((z0, x0, x1, y0, y1), (z1, x0, x1, y0, y1))


def lathe(*profile, segments=20):
    """A profile of (radius, z) points, from below, turned about z. Going back down inside makes a vessel."""
    angle = 2 * np.pi * np.arange(segments) / segments
    return skin(np.array([[(r * np.cos(t), r * np.sin(t), z) for t in angle] for r, z in profile], float))


def capsule(length, radius):
    """From the origin along z, with round ends."""
    turned = np.linspace(0, np.pi / 2, 4)
    r, z = radius * np.sin(turned), radius * np.cos(turned)
    return lathe(*zip(r, -z), *zip(z, length + r), segments=14)


def merge(*meshes):
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in meshes])
    return np.concatenate([v for v, _ in meshes]), np.concatenate([f + start for (_, f), start in zip(meshes, starts)])


def gripper_mesh():
    """A gripper of Franka's outer dimensions: {"hand": mesh, "finger": mesh} in the hand's frame. "finger" is the left
    one at opening 0. At opening w it moves by w/2 along y; the right one is that turned by 180 degrees about z."""
    flange = lathe((0.0315, -0.004), (0.0315, 0.014), segments=16)
    body = loft((-0.012, -0.012, 0.012, -0.097, 0.085), (0.004, -0.022, 0.022, -0.103, 0.097),
                (0.022, -0.0205, 0.0205, -0.1, 0.1), (0.0655, -0.0185, 0.0185, -0.1, 0.1))
    slider = loft((0.053, -0.0105, 0.0105, 0.003, 0.0258), (0.072, -0.0105, 0.0105, 0.0155, 0.0258))
    tip = loft((0.068, -0.0105, 0.0105, 0.0125, 0.0235), (0.0885, -0.009, 0.009, 0.0, 0.0150),
               (0.1063, -0.009, 0.009, 0.0, 0.0128))
    return {"hand": merge(flange, body), "finger": merge(slider, tip)}


LATTICE = np.random.default_rng(0).random((256, 256), dtype=np.float32)


def noise(u, v):
    """A smooth random field in 0..1 with features of size 1."""
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    a, b = (t * t * (3 - 2 * t) for t in (u - i, v - j))
    corner = lambda di, dj: LATTICE[(j + dj) & 255, (i + di) & 255]
    return (corner(0, 0) * (1 - a) + corner(1, 0) * a) * (1 - b) + (corner(0, 1) * (1 - a) + corner(1, 1) * a) * b


def plain(color):
    return lambda points, normals: np.broadcast_to(np.float32(color), points.shape)


def pattern(where, a, b):
    """Colour a where where(points) (P,) holds, else b."""
    return lambda points, normals: np.where(where(points)[:, None], np.float32(a), np.float32(b))


def stripes(a, b, width):
    return pattern(lambda points: np.floor(points[:, 2] / width) % 2 > 0, a, b)


def checks(a, b, cell):
    return pattern(lambda points: np.floor(points / cell + 1e-3).sum(1) % 2 > 0, a, b)


def wood(color, plank):
    """Planks along x, each of its own shade, with grain and blotches."""
    def paint(points, normals):
        x, y, number = points[:, 0], points[:, 1], np.floor(points[:, 1] / plank)
        shade = (0.68 + 0.2 * noise(number * 3.7, number * 0) + 0.14 * noise(x * 9 + 5.3 * number, y * 110)
                 + 0.18 * noise(x * 4 + 90, y * 4))
        return shade[:, None] * np.float32(color)
    return paint


def cardboard(front, back):
    """A cereal box: a title bar, a white bowl and lines of print."""
    def paint(points, normals):
        x, y, z = points.T
        face = np.abs(normals[:, 1]) > 0.5
        color = np.where((z > 0.035)[:, None], np.float32(back), np.float32(front))
        color[face & (np.hypot(x, z + 0.015) < 0.03)] = 0.97, 0.95, 0.9
        color[~face & (np.floor(z / 0.008) % 2 > 0) & (z < 0.02) & (np.abs(y) < 0.016)] = 0.95
        return color
    return paint


def cloth(table, centre, half, a, b):
    """A table top with a checked place mat."""
    mat = checks(a, b, half[0] / 2)

    def paint(points, normals):
        local = points - np.float32((*centre, 0))
        inside = (np.abs(local[:, :2]) < half).all(1)
        return np.where(inside[:, None], mat(local * np.float32((1, 1, 0)), normals), table(points, normals))
    return paint


# ------------------------------------ synthetic world
# Hands go where they are told, what is gripped moves with the hand, what is let go falls straight down.

HZ = 10                     # frames a second of a synthetic recording
TCP = 0.1                   # metres along z from the hand's origin to the point between the finger pads
OPEN, SHUT = 0.08, 0.0      # metres between the fingers; SHUT closes on whatever there is
PADS = np.array([(x, z) for x in (-0.008, 0, 0.008) for z in (0.089, 0.094, 0.1, 0.105)])  # (x, z) on a pad, hand frame
UPPER_ARM, FOREARM, WRIST = 0.36, 0.42, 0.15  # metres; the wrist's is from the hand back to where the arm bends
AHEAD, LEFT, UP = np.eye(3)


def turn(axis, angle):
    return Rotation.from_euler(axis, angle).as_matrix()


def along(position, z, y):
    """The pose at `position` with axes along the unit vectors `z` and `y`, normal to each other."""
    return pose(position, np.stack([np.cross(y, z), y, z], 1))


def hand(tip, forward, closing):
    """gripper_in_world with the pads at `tip`, the palm facing `forward` and fingers that move along `closing`."""
    z = unit(forward)
    return along(tip - TCP * z, z, unit(closing - (closing @ z) * z))


def shift(a_in_b, offset):
    """The pose moved by an offset (3,) given in frame b."""
    return pose(a_in_b[:3, 3] + offset, a_in_b[:3, :3])


def between(a, b, s):
    """The pose a share s of the way from a to b, along a line, turning about one axis."""
    turning = Rotation.from_matrix(b[:3, :3] @ a[:3, :3].T).as_rotvec()
    return pose(a[:3, 3] + s * (b[:3, 3] - a[:3, 3]), Rotation.from_rotvec(s * turning).as_matrix() @ a[:3, :3])


def stretch(start, end, side):
    """The pose at `start` with z towards `end` and x near `side`."""
    z = unit(end - start)
    return along(start, z, unit(np.cross(z, side)))


def arm_links(arm, color, base, gripper_in_world, opening):
    """[(Body, body_in_world)] of one arm: a shoulder, an elbow that points up, and a wrist behind the hand."""
    shoulder = base + 0.333 * UP
    wrist = gripper_in_world[:3, 3] - WRIST * gripper_in_world[:3, 2]
    reach = np.linalg.norm(wrist - shoulder)
    straight = (wrist - shoulder) / reach
    side = unit(np.cross(UP, straight))
    ahead = (UPPER_ARM**2 - FOREARM**2 + reach**2) / (2 * reach)  # law of cosines
    above = np.sqrt(max(0.0, UPPER_ARM**2 - ahead**2))
    elbow = shoulder + ahead * straight + above * np.cross(straight, side)
    across = stretch(shoulder, shoulder + side, UP)
    pale, label, gripper = (0.93, 0.93, 0.92), 1 + arm, gripper_mesh()
    white, dark = plain(pale), plain((0.25, 0.26, 0.28))
    finger = Body(gripper["finger"], plain((0.32, 0.33, 0.36)), label)
    joint = Body(lathe((0.062, -0.075), (0.062, 0.075)), dark)
    flange = Body(lathe((0.048, -0.05), (0.048, 0.05), (0.036, 0.1)), plain(color))
    return [(Body(lathe((0.11, -0.03), (0.11, 0.02), (0.08, 0.05), (0.075, 0.26)), white), pose(base)),
            (joint, across),
            (Body(capsule(UPPER_ARM, 0.06), stripes(color, pale, 0.19)), stretch(shoulder, elbow, side)),
            (joint, pose(elbow, across[:3, :3])),
            (Body(capsule(FOREARM, 0.05), white), stretch(elbow, wrist, side)),
            (Body(lathe((0.05, -0.06), (0.05, 0.06)), dark), pose(wrist, across[:3, :3])),
            (flange, gripper_in_world @ pose((0, 0, -0.1))),
            (Body(gripper["hand"], white, label), gripper_in_world),
            (finger, gripper_in_world @ pose((0, opening / 2, 0))),
            (finger, gripper_in_world @ pose((0, -opening / 2, 0), turn("z", np.pi)))]


def within(points, half, order):
    """Whether points (...,d) lie in a box (order inf) or ellipsoid (order 2) of half sizes (d,)."""
    return np.linalg.norm(points / np.array(half), ord=order, axis=-1) <= 1


@dataclass
class Scene:
    fixed: list     # [(Body, body_in_world)], the furniture
    object: Body
    object_in_world: np.ndarray
    solid: tuple  # (half sizes (3,), order) of what fingers can grip of it, see within
    supports: list  # [(support_in_world, half sizes (2,), order, height)], where it may rest
    done: object    # object_in_world -> bool, the goal
    keys: list      # [(seconds, {arm: (gripper_in_world, opening)})]; an arm not named stays
    bases: tuple = (np.array([-0.55, 0, 0]),)


def one_arm(home, take, *keys):
    """The keys of a one-armed task: from `home` to a grasp at `take`, then (seconds, gripper_in_world, opening)."""
    grasp = (0.0, home, OPEN), (1.1, shift(take, -0.1 * take[:3, 2]), OPEN), (0.7, take, OPEN), (0.6, take, SHUT)
    return [(seconds, {0: state}) for seconds, *state in (*grasp, *keys)]


def lies_in(place_in_world, half, height):
    def done(object_in_world):
        local = transform(object_in_world[:3, 3], invert(place_in_world))
        return within(local[:2], half, np.inf) and local[2] < height
    return done


def cereal_scene(draw):
    """Task 1: a box stands on a shelf; the arm takes it from there and stores it below the shelf."""
    height, depth, width = draw.uniform(0.28, 0.31), 0.18, 0.36  # of the shelf
    shelf = pose((draw.uniform(0.14, 0.2), draw.uniform(-0.12, 0.12), 0), turn("z", draw.uniform(-0.6, 0.6)))
    legs = [box((0.02, 0.02, height), (x, y, height / 2)) for x in (-0.08, 0.08) for y in (-0.17, 0.17)]
    shelf_mesh = merge(box((depth, width, 0.016), (0, 0, height - 0.008)), *legs)
    dark_wood = wood(np.array((0.45, 0.28, 0.17)) * draw.uniform(0.8, 1.1), 0.06)
    size = np.array([0.1, 0.045, 0.15]) * draw.uniform(0.9, 1.1, 3)
    front, back = draw.permutation([(0.85, 0.15, 0.1), (0.1, 0.35, 0.8), (0.95, 0.75, 0.1), (0.1, 0.6, 0.3)])[:2]
    start = shelf @ pose((draw.uniform(-0.05, -0.02), draw.uniform(-0.1, 0.1), height + size[2] / 2),
                         turn("z", draw.uniform(-0.15, 0.15)))
    end = shelf @ pose((draw.uniform(-0.06, -0.03), draw.uniform(-0.05, 0.05), size[2] / 2))

    pitch = draw.uniform(0.15, 0.35)  # from the front, a little from above
    grip = hand((-size[0] / 2 + 0.027, 0, 0.01), (np.cos(pitch), 0, -np.sin(pitch)), LEFT)  # gripper_in_object
    home = hand(draw.uniform((-0.25, -0.2, 0.3), (-0.12, 0.2, 0.42)), (0.5, 0, -1), LEFT)
    take, put = start @ grip, end @ grip
    back_off = -0.26 * shelf[:3, 0]
    keys = one_arm(
        home, take,
        (0.4, shift(take, 0.05 * UP), SHUT),
        (0.8, shift(take, 0.05 * UP + back_off), SHUT),
        (0.9, shift(put, back_off + 0.03 * UP), SHUT),
        (0.9, shift(put, 0.012 * UP), SHUT),  # under the board
        (0.3, put, SHUT),
        (0.4, put, OPEN),
        (0.6, shift(put, back_off), OPEN),
        (0.6, between(shift(put, back_off), home, 0.5), OPEN))

    half = depth / 2, width / 2
    return Scene([(Body(shelf_mesh, dark_wood), shelf)], Body(box(size), cardboard(front, back), OBJECT), start,
                 (size / 2, np.inf), [(shelf, half, np.inf, height)], lies_in(shelf, half, height / 2), keys)


def spatula_scene(draw):
    """Task 2: a spatula leans in a crock, blade up; the arm pulls it out, turns it flat and lays it on the table."""
    height, radius, side = draw.uniform(0.12, 0.14), draw.uniform(0.048, 0.058), draw.choice([-1, 1])
    crock = pose((draw.uniform(0.05, 0.15), side * draw.uniform(0.08, 0.2), 0))
    inner = radius - 0.006
    crock_mesh = lathe((0.9 * radius, 0), (radius, height), (inner, height), (0.9 * inner, 0.008), segments=24)
    glaze = draw.permutation([(0.75, 0.8, 0.85), (0.2, 0.35, 0.5), (0.8, 0.5, 0.3), (0.35, 0.5, 0.35)])
    length = draw.uniform(0.21, 0.24)  # of the handle, centred on the origin
    thin = lambda z, half: (length / 2 + z, -0.0025, 0.0025, -half, half)
    spatula = merge(box((0.012, 0.018, length)), loft(thin(0, 0.012), thin(0.025, 0.036), thin(0.09, 0.036)))
    color = draw.permutation([(0.8, 0.1, 0.1), (0.1, 0.5, 0.25), (0.95, 0.6, 0.1)])[0]
    paint = pattern(lambda points: points[:, 2] > length / 2, (0.12, 0.12, 0.13), color)
    lean = turn("z", draw.uniform(-0.5, 0.5)) @ turn("y", draw.uniform(-0.1, 0.16))
    start = pose(crock[:3, 3] + (0, 0, 0.008 - transform(spatula[0], pose(np.zeros(3), lean))[:, 2].min()), lean)
    flat = turn("z", draw.uniform(-0.5, 0.5)) @ turn("y", np.pi / 2)  # blade away from the robot
    end = pose((draw.uniform(-0.1, 0), -side * draw.uniform(0.08, 0.2), 0.006), flat)

    pitch = draw.uniform(0.15, 0.35)
    grip = hand((0, 0, length / 2 - draw.uniform(0.02, 0.035)), (np.cos(pitch), 0, -np.sin(pitch)), LEFT)
    home = hand(draw.uniform((-0.25, -0.15, 0.3), (-0.15, 0.15, 0.42)), (0.5, 0, -1), LEFT)
    take, put = start @ grip, end @ grip
    keys = one_arm(
        home, take,
        (1.0, shift(take, draw.uniform(0.21, 0.25) * UP), SHUT),
        (1.4, shift(put, 0.1 * UP), SHUT),  # over to the other side, and flat
        (0.7, put, SHUT),
        (0.4, put, OPEN),
        (0.6, shift(put, 0.14 * UP), OPEN),
        (0.7, between(put, home, 0.6), OPEN))

    def done(object_in_world):
        lies = abs(object_in_world[2, 2]) < 0.2 and object_in_world[2, 3] < 0.02
        return lies and np.linalg.norm(object_in_world[:2, 3] - crock[:2, 3]) > radius
    return Scene([(Body(crock_mesh, stripes(*glaze[:2], 0.045)), crock)], Body(spatula, paint, OBJECT), start,
                 ((0.006, 0.009, length / 2), np.inf), [(crock, (radius, radius), 2, 0.008)], done, keys)


def apple_scene(draw):
    """Task 3: the right arm takes an apple out of a bowl and hands it to the left arm, which drops it into a bin."""
    bowl = pose((draw.uniform(-0.02, 0.1), draw.uniform(-0.32, -0.22), 0))
    bowl_mesh = lathe((0.045, 0), (0.075, 0.02), (0.092, 0.055), (0.086, 0.055), (0.07, 0.023), (0.042, 0.006),
                      segments=24)
    china = draw.permutation([(0.9, 0.9, 0.95), (0.95, 0.8, 0.5), (0.5, 0.75, 0.8)])
    bin_ = pose((draw.uniform(-0.02, 0.1), draw.uniform(0.25, 0.35), 0), turn("z", draw.uniform(-0.4, 0.4)))
    length, width, height = draw.uniform(0.2, 0.24), draw.uniform(0.17, 0.2), 0.09
    bin_mesh = merge(box((length, width, 0.006), (0, 0, 0.003)),
                     *(box((0.006, width, height), (s * length / 2, 0, height / 2)) for s in (-1, 1)),
                     *(box((length, 0.006, height), (0, s * width / 2, height / 2)) for s in (-1, 1)))
    plastic = draw.permutation([(0.1, 0.4, 0.75), (0.15, 0.5, 0.3), (0.45, 0.45, 0.5)])[0]
    radius, arc = draw.uniform(0.026, 0.03), np.linspace(0, np.pi, 9)
    apple = merge(lathe(*zip(radius * np.sin(arc), -radius * np.cos(arc)), segments=18),
                  lathe((0.003, radius - 0.002), (0.002, radius + 0.012), segments=6))
    peel = draw.permutation([(0.85, 0.1, 0.1), (0.5, 0.75, 0.15), (0.9, 0.5, 0.1)])[0]
    start = shift(bowl, (0, 0, 0.006 + radius))

    meet = draw.uniform((-0.03, -0.06, 0.24), (0.08, 0.06, 0.32))  # with crossed fingers: along x, along z
    take = hand(start[:3, 3], (draw.uniform(-0.1, 0.1), draw.uniform(0, 0.25), -1), AHEAD)
    give, receive = hand(meet, (0.1, 1, -0.25), AHEAD), hand(meet, (0.1, -1, -0.25), UP)
    drop = hand(bin_[:3, 3] + 0.14 * UP, (0, 0.1, -1), -LEFT)
    right_home = hand(draw.uniform((-0.2, -0.3, 0.28), (-0.1, -0.2, 0.38)), (0.3, 0, -1), AHEAD)
    left_home = hand(draw.uniform((-0.2, 0.2, 0.28), (-0.1, 0.3, 0.38)), (0.3, 0, -1), -LEFT)
    retreat = lambda gripper_in_world: shift(gripper_in_world, -0.13 * gripper_in_world[:3, 2])
    keys = [(0.0, {0: (right_home, OPEN), 1: (left_home, OPEN)}),
            (0.8, {0: (shift(take, 0.1 * UP), OPEN)}),
            (0.5, {0: (take, OPEN)}),
            (0.6, {0: (take, SHUT)}),
            (0.5, {0: (shift(take, 0.12 * UP), SHUT)}),
            (0.9, {0: (give, SHUT), 1: (retreat(receive), OPEN)}),  # to where the hands meet
            (0.5, {1: (receive, OPEN)}),
            (0.6, {1: (receive, SHUT)}),
            (0.4, {0: (give, OPEN)}),
            (0.5, {0: (retreat(give), OPEN)}),
            (0.9, {0: (right_home, OPEN), 1: (shift(drop, 0.06 * UP), SHUT)}),  # over the bin
            (0.3, {1: (drop, SHUT)}),
            (0.4, {1: (drop, OPEN)}),
            (0.4, {1: (shift(drop, 0.15 * UP), OPEN)})]

    half = length / 2, width / 2
    return Scene([(Body(bowl_mesh, stripes(*china[:2], 0.02)), bowl),
                  (Body(bin_mesh, stripes(plastic, 0.8 * plastic, 0.03)), bin_)],
                 Body(apple, stripes(peel, 0.85 * peel, radius), OBJECT), start, ((radius,) * 3, 2),
                 [(bowl, (0.08, 0.08), 2, 0.006), (bin_, half, np.inf, 0.006)], lies_in(bin_, half, height),
                 keys, (np.array([-0.5, -0.33, 0]), np.array([-0.5, 0.33, 0])))


SCENES = {1: cereal_scene, 2: spatula_scene, 3: apple_scene}


def room(draw):
    """[(Body, body_in_world)]: floor and walls, and the table with a place mat, in colours of their own."""
    tone = lambda *color: np.array(color) * draw.uniform(0.8, 1.1) + draw.uniform(-0.06, 0.06, 3)
    floor = checks(tone(0.5, 0.52, 0.55), tone(0.62, 0.6, 0.58), 0.3)
    table = wood(tone(0.85, 0.66, 0.45), draw.uniform(0.09, 0.16))
    mat = draw.permutation([(0.75, 0.3, 0.3), (0.3, 0.5, 0.75), (0.35, 0.6, 0.4), (0.8, 0.75, 0.6), (0.5, 0.35, 0.6)])
    top = cloth(table, (draw.uniform(0.1, 0.3), draw.uniform(-0.5, 0.5)), draw.uniform(0.1, 0.18, 2), *mat[:2])
    vertices, faces = box((6, 6, 3), (0, 0, 0.75))
    return [(Body((vertices, faces[:, ::-1]), floor), np.eye(4)),  # inside out
            (Body(box((1.25, 1.7, 0.05), (-0.1, 0, -0.025)), top), np.eye(4))]


def minimum_jerk(keys, draw):
    """A scene's keys -> gripper_in_world (T,A,4,4), opening (T,A) at HZ, a little varied in pace and place. Each is
    reached at rest with the least squared jerk (Flash and Hogan 1985)."""
    pace = draw.uniform(0.9, 1.05)
    now = [*keys[0][1].values()]
    poses, openings = [], []
    for seconds, targets in keys:
        target = [(shift(targets[arm][0], draw.normal(0, 0.0015, 3)), targets[arm][1]) if arm in targets else state
                  for arm, state in enumerate(now)]
        steps = max(1, round(seconds * pace * draw.uniform(0.92, 1.08) * HZ))
        for t in np.arange(1, steps + 1) / steps:
            s = 10 * t**3 - 15 * t**4 + 6 * t**5
            poses.append([between(a, b, s) for (a, _), (b, _) in zip(now, target)])
            openings.append([a + (b - a) * s for (_, a), (_, b) in zip(now, target)])
        now = target
    return np.array(poses), np.array(openings)


class World:
    """One task's scene and its state: gripper_in_world (A,4,4), opening (A,) m, object_in_world (4,4), holders."""

    def __init__(self, task):
        self.task = task

    def reset(self, seed):
        """A new scene, and a demonstration in it: gripper_in_world (T,A,4,4), opening (T,A)."""
        draw = np.random.default_rng([self.task, seed])
        self.scene = SCENES[self.task](draw)
        self.demonstration = minimum_jerk(self.scene.keys, draw)
        self.gripper_in_world, self.opening = self.demonstration[0][0], self.demonstration[1][0]
        self.object_in_world = self.scene.object_in_world
        self.gap = self.opening  # how wide each hand was when it began to close
        self.holders = {}        # arm: width between its fingers; the first carries the object
        self.fixed = room(draw) + self.scene.fixed
        self.still = {}          # the cameras that filmed last: what they see that does not move
        self.colors = draw.permutation([(0.9, 0.45, 0.1), (0.15, 0.55, 0.75), (0.45, 0.7, 0.25)])
        self.lamp = draw.uniform((-0.7, 0.5, 1.7), (0.2, 0.9, 2.1)) * (1, draw.choice([-1, 1]), 1)

    def step(self, gripper_in_world, opening):
        """Move the hands, and the fingers as far as the object lets them."""
        motion = gripper_in_world @ invert(self.gripper_in_world)  # (A,4,4), in the world
        before, self.opening = self.opening, np.clip(opening, 0, OPEN)
        self.gripper_in_world = np.array(gripper_in_world)
        closing = self.opening < before
        self.gap = np.where(closing, self.gap, self.opening)
        if self.holders:
            self.object_in_world = motion[next(iter(self.holders))] @ self.object_in_world
        for arm in range(len(self.opening)):
            if arm not in self.holders and closing[arm]:
                self.grip(arm)
            elif self.opening[arm] > self.holders.get(arm, OPEN) + 0.008:  # a noisy opening drops nothing
                del self.holders[arm]
                if not self.holders:
                    self.object_in_world = upright(self.object_in_world)
            self.opening[arm] = max(self.opening[arm], self.holders.get(arm, 0))
        if not self.holders:
            self.fall()

    def grip(self, arm):
        """Fingers that close on the object from both sides push it to their middle and hold it."""
        y = np.linspace(-0.05, 0.05, 201)
        line = np.stack(np.broadcast_arrays(PADS[:, None, 0], y, PADS[:, None, 1]), -1)  # (pads,201,3), hand frame
        line_in_object = transform(line, invert(self.object_in_world) @ self.gripper_in_world[arm])
        touched = within(line_in_object, *self.scene.solid).any(0)
        if not touched.any():
            return
        low, high = y[touched][[0, -1]]
        # 5 mm: finger tips are soft, and openings are recorded where the fingers were stopped.
        if max(-low, high) < self.gap[arm] / 2 + 0.005 and self.opening[arm] < high - low + 0.005:
            if not self.holders:
                middle = (low + high) / 2 * self.gripper_in_world[arm, :3, 1]
                self.object_in_world = shift(self.object_in_world, -middle)
            self.holders[arm] = high - low

    def fall(self):
        """Straight down to the highest support below, within one step."""
        bottom = transform(self.scene.object.mesh[0], self.object_in_world)[:, 2].min()
        heights = [0.0]
        for support_in_world, half, order, height in self.scene.supports:
            centre = transform(self.object_in_world[:3, 3], invert(support_in_world))
            if within(centre[:2], half, order) and height < bottom + 0.03:
                heights.append(height)
        self.object_in_world = shift(self.object_in_world, (max(heights) - bottom) * UP)

    def film(self, intrinsics, cam_in_world, size, samples=1):
        """The world from K cameras: rgb, depth in metres and label, see render."""
        view = intrinsics, cam_in_world, size, self.lamp, samples
        key = intrinsics.tobytes(), cam_in_world.tobytes(), size, samples
        if key not in self.still:
            self.still = {key: draw_bodies(self.fixed, *view)}
        placed = [(self.scene.object, self.object_in_world)]
        for arm, base in enumerate(self.scene.bases):
            placed += arm_links(arm, self.colors[arm], base, self.gripper_in_world[arm], self.opening[arm])
        return render(placed, *view, self.still[key])

    def observe(self, intrinsics, cam_in_world, size):
        """What a robot sees now with V cameras, as the observed_ keys of a clip."""
        rgb, depth, label = self.film(intrinsics, cam_in_world, size)
        return dict(observed_rgb=rgb, observed_depth=depth, intrinsics=intrinsics, fps=float(CLIP_HZ),
                    observed_gripper=np.stack([label == 1 + arm for arm in range(len(self.opening))], 1),
                    observed_object=label == OBJECT, observed_opening=self.opening, ref_in_world=cam_in_world[0],
                    observed_gripper_in_ref=invert(cam_in_world[0]) @ self.gripper_in_world)

    def success(self):
        """Whether the object is where it belongs and nothing holds it."""
        return bool(not self.holders and self.scene.done(self.object_in_world))


def upright(object_in_world):
    """The pose turned until the axis that is nearest to the vertical is vertical: how a thing comes to rest."""
    axis = np.argmax(np.abs(object_in_world[2, :3]))
    now = object_in_world[:3, axis] * np.sign(object_in_world[2, axis])
    turning = np.cross(now, UP)
    angle = np.arctan2(np.linalg.norm(turning), now[2])
    turning *= angle / max(np.linalg.norm(turning), 1e-12)
    return pose(object_in_world[:3, 3], Rotation.from_rotvec(turning).as_matrix() @ object_in_world[:3, :3])


def sample_cameras(draw, tips, size, count=16):
    """Cameras on the paper's half shell, in front of the robot: intrinsics (count,3,3), cam_in_world (count,4,4). Each
    sees every hand for more than 85 % of the time. tips (T,A,3): the finger tips in the world."""
    H, W = size
    cameras = []
    for _ in range(50_000):
        position = draw.uniform((0.2, -0.5, 0.7), (0.6, 0.5, 1.2))
        focal = draw.uniform(0.72, 0.92) * W
        K = np.array([[focal, 0, (W - 1) / 2], [0, focal, (H - 1) / 2], [0, 0, 1]])
        camera = look_at(position, draw.normal((0, 0, 0.12), 0.04))
        camera[:3, :3] = camera[:3, :3] @ turn("z", draw.normal(0, 0.05))
        pixel, z = project(transform(tips, invert(camera)), K)
        seen = ((pixel >= 0) & (pixel <= (W - 1, H - 1))).all(-1) & (z > 0)
        if 0.7 <= np.linalg.norm(position) <= 1.2 and seen.mean(0).min() > 0.85:
            cameras.append((K, camera))
        if len(cameras) == count:
            return tuple(np.stack(values) for values in zip(*cameras))
    raise ValueError(f"pictures of {size_text(size)} are too narrow or too flat for cameras to see the hands")


def synthetic_episode(task, out, size, every, seed):
    world = World(task)
    world.reset(seed)
    grippers, openings = world.demonstration
    tips = grippers[..., :3, 3] + TCP * grippers[..., :3, 2]
    intrinsics, cam_in_world = sample_cameras(np.random.default_rng([task, seed, 1]), tips, size)
    frames = []
    for i, (gripper_in_world, opening) in enumerate(zip(grippers, openings)):
        world.step(gripper_in_world, opening)
        if (i + seed) % every:
            continue
        rgb, depth, label = world.film(intrinsics, cam_in_world, size, samples=3)
        frames.append((rgb, (depth * 1000).round().astype(np.uint16), label, world.gripper_in_world, world.opening))
    assert world.success(), f"the demonstration of task {task}, seed {seed} fails"
    *pictures, gripper_in_world, opening = zip(*frames)
    info = dict(task=task, source="synthetic", seed=seed, rate_hz=HZ / every)
    folder = Path(out) / f"synthetic_{seed:05d}"
    save_episode(folder, *(np.stack(x, 1) for x in pictures), intrinsics, cam_in_world, np.stack(gripper_in_world),
                 np.stack(opening), info)
    return folder.name


def end_with_parent():
    """In a rendering process, which would go on when its parent is killed."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def make_synthetic(task, out, episodes, size, seed=0, workers=None, every=1):
    """Render the worlds seed * 1000, ... that `out` has not yet, every 1st or 5th frame: their names."""
    packed = packed_already(out, task, "synthetic", size)
    seeds = [s for s in range(seed * 1000, seed * 1000 + episodes) if f"synthetic_{s:05d}" not in packed]
    workers, run = min(workers or os.cpu_count(), len(seeds)), map
    if workers > 1:                                     # spawned: a fork of a process with running threads may hang
        run = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent).map
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
    names = run(functools.partial(synthetic_episode, task, out, size, every), seeds)
    signal.signal(signal.SIGINT, interrupt)
    try:
        return [*tqdm(names, f"rendering synthetic episodes of task {task}", len(seeds), unit="episode")]
    except BrokenExecutor:
        raise ValueError("a rendering process was killed, for want of memory? Try fewer --workers") from None
    finally:
        for process in multiprocessing.active_children():  # idle, or stopped with this one
            process.terminate()


# ------------------------------------ pictures and commands

def preview(folder, seed):
    """Draw folder/preview.png: what two cameras see at one instant, and both clouds in the first one's frame."""
    plt, draw = pyplot(), np.random.default_rng(seed)
    episode = load_episode(draw.choice(episode_folders(folder)))
    t, cameras = draw.integers(episode.frames), draw.choice(episode.cameras, 2, replace=False)
    own, valid = point_maps(episode.depth[cameras, t] / 1000, episode.intrinsics[cameras])
    cam_in_world = episode.cam_in_world[cameras, t]
    figure = plt.figure(figsize=(12, 17), layout="constrained")
    figure.suptitle(f"{episode.folder.name}, frame {t}\nlabels: 1 right gripper, 2 left gripper, 3 object; below: the "
                    "points of both cameras in the first one's frame, m")
    clouds = figure.add_subplot(2, 1, 2, projection="3d", xlabel="x", ylabel="z")
    for v, (c, points) in enumerate(zip(cameras, transform(own, invert(cam_in_world[0]) @ cam_in_world))):
        for k, image in enumerate((episode.rgb[c, t], episode.label[c, t])):
            axes = figure.add_subplot(4, 2, 1 + 2 * v + k, title=f"camera {c + 1}" + ", labels" * k)
            drawn = axes.imshow(image, vmin=0, vmax=3)
        figure.colorbar(drawn, ax=axes)
        x, y, z = points[valid[v]].T
        clouds.scatter(x, z, -y, s=6, linewidths=0)
    clouds.set_aspect("equal")
    with writing(path := Path(folder) / "preview.png") as partial:
        figure.savefig(partial, dpi=60, format="png")
    print(f"picture: {path}")


def size_text(size):
    return f"{size[0]}x{size[1]}"


def parse_size(text):
    """'256x320' -> (256, 320), height first."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, such as 256x320")
    return tuple(map(int, text.split("x")))


def prepare(task, out, source="synthetic", size=(64, 80), episodes=None, seed=0, workers=None, every=1):
    """Make the packed episodes of a task in `out` from one of the three sources."""
    if source == "synthetic":
        new = make_synthetic(task, out, episodes or 25, size, seed, workers, every)
    else:
        new = pack_folder(source, task, out, size, episodes)
        for name in new:
            report(Path(out) / name)
    print(f"{out}: {len(episode_folders(out))} episodes of task {task} ({TASKS[task].name}), source: {source}, "
          f"{len(new)} of them new")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", type=int, default=1, choices=TASKS, help="; ".join(f"{k} {t.name}" for k, t in TASKS.items()))
    add("--source", default="synthetic", help="synthetic, hub, or a folder of recorded episodes [synthetic]")
    add("--out", type=Path, help="folder of the packed episodes [data/task_N]")
    add("--size", type=parse_size, default=(64, 80), help="HEIGHTxWIDTH in pixels of what is packed [64x80]")
    add("--episodes", type=int, help="at most this many [synthetic: 25, others: all]")
    add("--seed", type=int, default=0, help="of the synthetic episodes and of the preview [0]")
    add("--workers", type=int, help="processes that render [one a core]")
    add("--every", type=int, default=1, choices=(1, 5), help="5: render the 2 Hz of clips alone, five times as fast: "
        "from many scenes a large network learns more than from many frames [1]")
    args = parser.parse_args()
    for name, least in dict(episodes=1, workers=1, seed=0).items():
        if (given := getattr(args, name)) is not None and given < least:
            raise ValueError(f"--{name} must be at least {least}, not {given}")
    if (args.workers or args.every > 1) and args.source != "synthetic":
        raise ValueError("--workers and --every are for synthetic episodes only: leave them out")
    args.out = args.out or Path(f"data/task_{args.task}")
    prepare(**vars(args))
    preview(args.out, args.seed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"data.py: {str(error) or 'interrupted'}")
