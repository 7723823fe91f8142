"""RGB-D episodes of robot manipulation: recorded ones packed for training, or rendered ones, and clips cut from them.

    python data.py --task 1                            # render the synthetic world's episodes into data/task_1
    python data.py --task 1 --source FOLDER            # pack recorded episodes in the public dataset's layout
    python data.py --task 1 --source hub --episodes 3  # download and pack three of the public episodes
    python data.py --task 1 --preview                  # data/task_1/preview.png: two views, both clouds in one frame

The method needs, for every frame of every camera, the colour image and a *pointmap*: an image whose pixels hold metric
x, y, z. A pointmap of view m can be written in its own camera's frame (from depth and intrinsics alone) or in another
camera's frame (which takes both poses). Training turns every view's pointmaps into the frame of the reference view, so
that the clouds of all views lie in one space; poses are used for this and for nothing else.

Letters   C cameras, V views of a clip (view 0 is the reference), T frames, F = 1 observed + T predicted frames,
          A arms (0 right, 1 left), H W pixels
Units     metres, seconds, pixels; `depth.npy` is uint16 millimetres along the camera's z, 0 = nothing measured
Frames    cameras: OpenCV (x right, y down, z forward), integer pixel coordinates are pixel centres
          gripper: Franka's hand frame (z out of the palm, fingers slide along y, opening 0..0.08 m)
          world: z up, table top at z = 0, +x away from the robot, +y to its left
          `a_in_b` is the 4 x 4 that takes a-coordinates to b-coordinates: points_in_b = transform(points_in_a, a_in_b)

References: the method, arXiv 2507.01099; pointmaps in another view's frame, DUSt3R, arXiv 2312.14132; the public data,
Hugging Face dataset Zeyi/4dgen-dataset.
"""
import argparse
import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from scipy.spatial.transform import Rotation
from tqdm import tqdm

FAR = 2.0                   # metres; farther depth counts as invalid
CLIP_HZ = 2                 # frames a second of a clip: ten predicted frames are five seconds
MIN_SPEED = 0.02            # m/s; a clip must see an arm move faster than this in its first STATIC_SECONDS
STATIC_SECONDS = 2.0
TRAIN_CAMERAS, TEST_CAMERAS = range(0, 12), range(12, 16)      # public data's scene_1..scene_12, scene_13..scene_16


@dataclass(frozen=True)
class Task:
    name: str               # as in the paper
    folder: str             # as on the hub
    object: str             # name of the manipulated object in an episode's label names
    object_ids: tuple       # its label ids in public episodes, which carry no names


TASKS = {
    1: Task("StoreCerealBoxUnderShelf", "BimanualStoreCerealBoxUnderShelf", "cereal_box", (39,)),
    2: Task("PutSpatulaOnTable", "BimanualPutSpatulaOnTableFromUtensilCrock", "spatula", ()),
    3: Task("PlaceAppleFromBowlIntoBin", "BimanualPlaceAppleFromBowlIntoBin", "apple", (44,)),
}
ARMS = ("right", "left")
PUBLIC_GRIPPER_IDS = {"right": (29, 30, 31), "left": (33, 34, 35)}
OTHER, RIGHT_GRIPPER, LEFT_GRIPPER, OBJECT = 0, 1, 2, 3        # the labels of a packed episode


# ------------------------------------------------------------------------------------------------------- geometry
# Written with operators only: numpy arrays and torch tensors go in, the same kind comes out, any leading dimensions.

def pixel_rays(height, width, intrinsics):
    """(H, W, 3) directions with z = 1 through the pixel centres of a pinhole camera, in its own frame.

    intrinsics: (..., 3, 3) pixels. Returns (..., H, W, 3), the kind (numpy or torch) of `intrinsics`.
    """
    numpy = isinstance(intrinsics, np.ndarray)
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    u, v = ((x.astype(intrinsics.dtype) if numpy else torch.as_tensor(x).to(intrinsics)) for x in (u, v))
    focal = lambda i: intrinsics[..., i, i, None, None]
    centre = lambda i: intrinsics[..., i, 2, None, None]
    x = (u - centre(0)) / focal(0)                                              # (..., H, W)
    y = (v - centre(1)) / focal(1)
    one = x * 0 + 1
    return np.stack([x, y, one], -1) if numpy else torch.stack([x, y, one], -1)


def unproject(depth, intrinsics):
    """Depth (..., H, W) in metres along z -> points (..., H, W, 3) in the camera's own frame."""
    return pixel_rays(*depth.shape[-2:], intrinsics) * depth[..., None]


def transform(points_in_a, a_in_b):
    """Points (..., 3) in frame a -> the same shape in frame b.

    a_in_b: (..., 4, 4); its leading dimensions are the first ones of the points', so one pose moves a whole pointmap.
    """
    batch, shape = a_in_b.shape[:-2], points_in_a.shape
    flat = points_in_a.reshape(*shape[:len(batch)], -1, 3)                      # (..., N, 3)
    moved = flat @ a_in_b[..., :3, :3].mT + a_in_b[..., None, :3, 3]
    return moved.reshape(*moved.shape[:-2], *shape[len(batch):])


def project(points_in_cam, intrinsics):
    """Points (..., 3) in a camera's frame -> pixel coordinates (..., 2) = (u, v), and depth z (...,) in metres.

    intrinsics: (3, 3), or any shape that broadcasts. Points with z <= 0 lie behind the camera: their pixels mean
    nothing.
    """
    homogeneous = (intrinsics @ points_in_cam[..., None])[..., 0]
    z = homogeneous[..., 2]
    return homogeneous[..., :2] / z[..., None], z


def invert(a_in_b):
    """b_in_a of a rigid transform (..., 4, 4): rotation transposed, no matrix inversion."""
    b_in_a = a_in_b * 0
    rotation = a_in_b[..., :3, :3].mT
    b_in_a[..., :3, :3] = rotation
    b_in_a[..., :3, 3] = -(rotation @ a_in_b[..., :3, 3, None])[..., 0]
    b_in_a[..., 3, 3] = 1
    return b_in_a


def normalize_points(points):
    """Metres in [-1, 2] -> [-1, 1], an image's range, so that a pointmap can enter an image VAE. Nothing is clamped."""
    return (points - 0.5) / 1.5


def denormalize_points(points):
    """[-1, 1] -> metres in [-1, 2]; the inverse of normalize_points."""
    return points * 1.5 + 0.5


def point_maps(depth, intrinsics):
    """Depth (..., H, W) m and intrinsics (..., 3, 3) -> points_in_own_cam (..., H, W, 3) and valid (..., H, W).

    A pixel without depth (0, or beyond FAR) is put on the plane z = FAR along its own ray, before any change of frame,
    and is marked invalid. Left at 0 it would sit in the camera's centre: carried into another frame, every such pixel
    becomes the camera's position, a point that no surface has.
    """
    valid = (depth > 0) & (depth <= FAR)
    filled = depth + (FAR - depth) * ~valid
    return unproject(filled, intrinsics), valid


def scale_intrinsics(intrinsics, old_size, new_size):
    """Intrinsics (..., 3, 3) of an image resized from old_size (H, W) to new_size: u' = (u + 1/2) s - 1/2, per axis."""
    scaled = np.array(intrinsics, dtype=np.float64)
    for axis, s in ((0, new_size[1] / old_size[1]), (1, new_size[0] / old_size[0])):
        scaled[..., axis, axis] *= s
        scaled[..., axis, 2] = (scaled[..., axis, 2] + 0.5) * s - 0.5
    return scaled


def resize(frames, size, kind):
    """Resize (N, H, W[, 3]) to size (H, W). kind 'rgb': bilinear with antialiasing; 'depth' and 'label': nearest.

    Depth is never averaged: between a gripper at 0.8 m and a table at 1.1 m lies no surface at 0.95 m, and an invented
    point there would be trained on and tracked.
    """
    if frames.shape[1:3] == tuple(size):
        return np.ascontiguousarray(frames)
    if kind == "rgb":
        x = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "n h w c -> n c h w").float()
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return rearrange(x.round().clamp(0, 255).byte(), "n c h w -> n h w c").numpy()
    rows = ((np.arange(size[0]) + 0.5) * frames.shape[1] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * frames.shape[2] / size[1]).astype(int)
    return frames[:, rows[:, None], columns]


def rotation_from_6d(rot_6d):
    """(..., 6), the first two rows of a rotation matrix -> (..., 3, 3), by Gram-Schmidt (arXiv 1812.07035, eq. 15)."""
    a, b = rot_6d[..., :3], rot_6d[..., 3:]
    x = a / np.linalg.norm(a, axis=-1, keepdims=True)
    y = b - (x * b).sum(-1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], -2)


# ------------------------------------------------------------------------------------------------ packed episodes

def save_episode(folder, rgb, depth, label, intrinsics, cam_in_world, gripper_in_world, gripper_opening, time, info):
    """Write one packed episode; the folder appears only when it is complete.

    rgb (C,T,H,W,3) uint8, depth (C,T,H,W) uint16 mm, label (C,T,H,W) uint8, intrinsics (C,3,3) pixels, cam_in_world
    (C,T,4,4) or (C,4,4), gripper_in_world (T,A,4,4), gripper_opening (T,A) m, time (T,) s, info: what goes into
    episode.json (task, source, rate_hz, ...).
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "rgb.npy", rgb)
    np.save(partial / "depth.npy", depth)
    np.save(partial / "label.npy", label)
    np.savez(partial / "cameras.npz", intrinsics=intrinsics, cam_in_world=cam_in_world)
    np.savez(partial / "robot.npz", gripper_in_world=gripper_in_world, gripper_opening=gripper_opening, time=time)
    (partial / "episode.json").write_text(json.dumps(info, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def load_episode(folder):
    """Open a packed episode; the pictures stay on disk (memory-mapped) until they are indexed.

    Returns a namespace: rgb, depth, label, intrinsics (C,3,3), cam_in_world (C,T,4,4), gripper_in_world (T,A,4,4),
    gripper_opening (T,A), time (T,), rate_hz, info, folder. Raises ValueError naming the file that is missing or wrong.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / "episode.json").read_text())
        rgb, depth, label = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("rgb", "depth", "label"))
        with np.load(folder / "cameras.npz") as cameras, np.load(folder / "robot.npz") as robot:
            intrinsics, cam_in_world = cameras["intrinsics"], cameras["cam_in_world"]
            gripper_in_world, opening, time = robot["gripper_in_world"], robot["gripper_opening"], robot["time"]
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: {folder} is not a packed episode "
                         "(make it with data.py)") from None
    except (KeyError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}): delete it and run data.py again") from None
    if rgb.shape[:-1] != depth.shape or depth.shape != label.shape or len(gripper_in_world) != rgb.shape[1]:
        raise ValueError(f"{folder}: rgb {rgb.shape}, depth {depth.shape}, label {label.shape} and robot "
                         f"{gripper_in_world.shape} do not belong together; delete it and run data.py again")
    if cam_in_world.ndim == 3:
        cam_in_world = np.repeat(cam_in_world[:, None], rgb.shape[1], axis=1)
    return SimpleNamespace(rgb=rgb, depth=depth, label=label, intrinsics=intrinsics, cam_in_world=cam_in_world,
                           gripper_in_world=gripper_in_world, gripper_opening=opening, time=time,
                           rate_hz=info.get("rate_hz", 10), info=info, folder=folder)


def episode_folders(data):
    """The packed episodes under a data folder, in order of their names."""
    folders = sorted(path.parent for path in Path(data).glob("*/episode.json"))
    folders = [folder for folder in folders if not folder.name.endswith(".partial")]
    if not folders:
        raise ValueError(f"no packed episodes in {data}: run `python data.py --task N --out {data}` first")
    return folders


# ---------------------------------------------------------------------------- recorded episodes, the public layout

def find_recorded(source, task):
    """The `processed` folders of a task's episodes under any level of the public layout."""
    found = sorted({path.parent for path in Path(source).rglob("processed/observations.npz")})
    of_other_tasks = {t.folder for number, t in TASKS.items() if number != task}
    found = [path for path in found if not of_other_tasks & set(path.resolve().parts)]
    if not found:
        raise ValueError(f"{source} holds no processed/observations.npz of task {task} ({TASKS[task].folder}/<session>/"
                         "diffusion_spartan/episode_K/processed/)")
    return found


def label_ids(metadata, task):
    """Label ids -> {RIGHT_GRIPPER: ids, LEFT_GRIPPER: ids, OBJECT: ids}, by the episode's names where it has them."""
    names = metadata.get("label_names")
    if not names:
        return {RIGHT_GRIPPER: PUBLIC_GRIPPER_IDS["right"], LEFT_GRIPPER: PUBLIC_GRIPPER_IDS["left"],
                OBJECT: TASKS[task].object_ids}
    matching = lambda pattern: tuple(int(i) for i, name in names.items() if re.match(pattern, name))
    return {RIGHT_GRIPPER: matching("right_(hand|finger)"), LEFT_GRIPPER: matching("left_(hand|finger)"),
            OBJECT: matching(TASKS[task].object)}


def read_array(archive, key, path, shape):
    """archive[key], checked: `shape` has None where any length goes."""
    if key not in archive:
        raise ValueError(f"{path} has no array '{key}'")
    array = archive[key]
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        raise ValueError(f"{path}: '{key}' has shape {array.shape}, expected {shape} (None: any)")
    return array


def pack_recorded(processed, out, task, size):
    """Pack one recorded episode (a `processed` folder of the public layout) at size (H, W) into the folder `out`."""
    processed = Path(processed)
    for name in ("observations.npz", "intrinsics.npz", "extrinsics.npz"):
        if not (processed / name).exists():
            raise ValueError(f"{processed / name} is missing")
    meta_file = processed / "metadata.yaml"
    metadata = (yaml.safe_load(meta_file.read_text()) or {}) if meta_file.exists() else {}
    rate_hz = float(metadata.get("rate_hz", 10))
    ids = label_ids(metadata, task)
    observations_file = processed / "observations.npz"
    try:
        observations = np.load(observations_file)
        intrinsics_file, extrinsics_file = np.load(processed / "intrinsics.npz"), np.load(processed / "extrinsics.npz")
    except (OSError, ValueError) as error:
        raise ValueError(f"{processed} holds a damaged npz file ({error})") from None
    cameras = sorted((key for key in observations if re.fullmatch(r"scene_\d+", key)), key=lambda key: int(key[6:]))
    if len(cameras) < 2:
        raise ValueError(f"{observations_file} has {len(cameras)} cameras (scene_1, scene_2, ...); two are needed")

    rgb, depth, label, intrinsics, cam_in_world = [], [], [], [], []
    for camera in cameras:
        images = read_array(observations, camera, observations_file, (None, None, None, 3))
        shape = images.shape[:3]
        depths = read_array(observations, camera + "_depth", observations_file, shape)
        labels = read_array(observations, camera + "_label", observations_file, shape)
        packed = np.zeros(shape, np.uint8)
        for label_id, recorded_ids in ids.items():
            packed[np.isin(labels, recorded_ids)] = label_id
        rgb.append(resize(images, size, "rgb"))
        depth.append(resize(depths.astype(np.uint16), size, "depth"))
        label.append(resize(packed, size, "label"))
        intrinsics.append(scale_intrinsics(read_array(intrinsics_file, camera, processed / "intrinsics.npz", (3, 3)),
                                           shape[1:], size))
        cam_in_world.append(read_array(extrinsics_file, camera, processed / "extrinsics.npz", (shape[0], 4, 4)))

    frames = len(rgb[0])
    gripper_in_world = np.tile(np.eye(4), (frames, len(ARMS), 1, 1))
    opening = np.zeros((frames, len(ARMS)))
    for a, arm in enumerate(ARMS):
        pose = f"robot__actual__poses__{arm}::panda__"         # the actual one: the desired pose runs ahead of the hand
        gripper_in_world[:, a, :3, 3] = read_array(observations, pose + "xyz", observations_file, (frames, 3))
        gripper_in_world[:, a, :3, :3] = rotation_from_6d(
            read_array(observations, pose + "rot_6d", observations_file, (frames, 6)))
        key = f"robot__actual__grippers__{arm}::panda_hand"
        opening[:, a] = read_array(observations, key, observations_file, (frames, 1))[:, 0]
    save_episode(out, np.stack(rgb), np.stack(depth), np.stack(label), np.stack(intrinsics), np.stack(cam_in_world),
                 gripper_in_world, opening, np.arange(frames) / rate_hz,
                 dict(task=task, source="recorded", name="/".join(processed.parts[-4:-1]), rate_hz=rate_hz))


def pack_folder(source, task, out, size, episodes=None):
    """Pack every recorded episode of a task under `source`; those already in `out` are kept. Returns their number."""
    found = find_recorded(source, task)[:episodes]
    out = Path(out)
    packed = {load_episode(folder).info.get("name"): folder for folder in out.glob("episode_*") if folder.suffix == ""}
    todo = [path for path in found if "/".join(path.parts[-4:-1]) not in packed]
    number = len(packed)
    for processed in tqdm(todo, desc=f"packing {source}", unit="episode"):
        pack_recorded(processed, out / f"episode_{number:03d}", task, size)
        number += 1
    return number


# ------------------------------------------------------------------------------------------------ clips for training

def episode_split(count, seed=0, test_share=0.2):
    """Episode numbers 0..count-1 -> (train, test), fixed by the seed. At least one is held out if there are two."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, round(count * test_share)) if count > 1 else 0
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


def moving_starts(episode, frames):
    """Frames at which a clip of 1 + `frames` can start: it must fit, and an arm must move in its first two seconds."""
    stride = max(1, round(episode.rate_hz / CLIP_HZ))
    last = episode.rgb.shape[1] - 1 - stride * frames
    window = max(1, round(STATIC_SECONDS * episode.rate_hz))
    position = episode.gripper_in_world[..., :3, 3]                             # (T, A, 3) in the world
    speed = np.linalg.norm(np.diff(position, axis=0), axis=-1) * episode.rate_hz
    return [t for t in range(last + 1) if speed[t:t + window].max(initial=0) > MIN_SPEED]


class Clips(torch.utils.data.Dataset):
    """Clips of V views: one observed and `frames` predicted frames at 2 Hz, from cameras and episodes of one split.

    Item i is a function of (seed, i) alone, so a run that stops and resumes sees the same clips. A dict of tensors:
        rgb        (V, F, 3, H, W)  in [-1, 1]
        points     (V, F, 3, H, W)  normalised, in the reference camera's frame (view 0, at the observed instant)
        valid      (V, F, H, W)     bool, where depth was measured
        gripper    (V, F, H, W, A)  bool, the mask of each gripper
        own_points (V, 3, H, W)     normalised, the observed pointmap in the view's own camera frame: all a robot has
        frame_index (F - 1,)        which of the predicted frames 0..frames-1 these are
        intrinsics (V, 3, 3), view_in_ref (V, 4, 4) at the observed instant, gripper_in_ref (F, A, 4, 4), opening (F, A)
    With `single`, only one random predicted frame is taken (F = 2).
    """

    def __init__(self, data, split, size, views=2, frames=10, single=False, seed=0, length=1 << 30, split_seed=0):
        folders = episode_folders(data)
        train, test = episode_split(len(folders), split_seed)
        self.episodes, self.starts = [], []
        for number in {"train": train, "test": test or train}[split]:
            episode = load_episode(folders[number])
            starts = moving_starts(episode, frames)
            if starts:
                self.episodes.append(episode)
                self.starts.append(starts)
        if not self.episodes:
            raise ValueError(f"no episode of the {split} split of {data} holds a moving clip of 1 + {frames} frames at "
                             f"{CLIP_HZ} Hz")
        height, width = self.episodes[0].rgb.shape[2:4]
        if height < size[0] or width < size[1]:
            raise ValueError(f"{data} is packed at {height}x{width}, smaller than the {size[0]}x{size[1]} asked for: "
                             f"pack it again with data.py --size {size[0]}x{size[1]}")
        # a rig with fewer than 16 cameras has none to spare: every one serves both splits
        chosen = {"train": TRAIN_CAMERAS, "test": TEST_CAMERAS}[split]
        self.cameras = [np.array(chosen if len(episode.rgb) >= 16 else range(len(episode.rgb)))
                        for episode in self.episodes]
        for episode, cameras in zip(self.episodes, self.cameras):
            if len(cameras) < views:
                raise ValueError(f"{views} views were asked for, {episode.folder} has {len(cameras)} cameras "
                                 f"of the {split} split")
        self.split, self.size, self.views, self.frames = split, tuple(size), views, frames
        self.single, self.seed, self.length = single, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        draw = np.random.default_rng([self.seed, i])
        e = draw.integers(len(self.episodes))
        episode = self.episodes[e]
        start = int(draw.choice(self.starts[e]))
        cameras = draw.choice(self.cameras[e], self.views, replace=False)
        predicted = draw.integers(self.frames, size=1) if self.single else np.arange(self.frames)
        return read_clip(episode, start, cameras, predicted, self.size)


def read_clip(episode, start, cameras, predicted, size):
    """One clip of a packed episode: see Clips for what is returned.

    start: raw frame of the observation; cameras: V camera numbers, the reference first; predicted: which of the frames
    0, 1, ... after the observation, at 2 Hz.
    """
    stride = max(1, round(episode.rate_hz / CLIP_HZ))
    times = np.concatenate([[start], start + stride * (np.asarray(predicted) + 1)])              # (F,)
    old_size = episode.rgb.shape[2:4]
    intrinsics = scale_intrinsics(episode.intrinsics[cameras], old_size, size)                   # (V, 3, 3)
    ref_in_world = episode.cam_in_world[cameras[0], start]
    world_in_ref = invert(ref_in_world)
    view_in_ref = world_in_ref @ episode.cam_in_world[cameras][:, times]                         # (V, F, 4, 4)

    rgb = np.stack([resize(episode.rgb[c, times], size, "rgb") for c in cameras])                # (V, F, H, W, 3)
    depth = np.stack([resize(episode.depth[c, times], size, "depth") for c in cameras]) / np.float32(1000)
    label = np.stack([resize(episode.label[c, times], size, "label") for c in cameras])          # (V, F, H, W)
    own, valid = point_maps(depth, intrinsics[:, None].astype(np.float32))                       # (V, F, H, W, 3)
    points = transform(own, view_in_ref.astype(np.float32))
    grippers = [RIGHT_GRIPPER, LEFT_GRIPPER][:episode.gripper_in_world.shape[1]]

    channels_first = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, -3)))
    return dict(
        rgb=channels_first(rgb).float() / 127.5 - 1,
        points=normalize_points(channels_first(points)),
        valid=torch.from_numpy(valid),
        gripper=torch.from_numpy(label[..., None] == np.array(grippers)),
        own_points=normalize_points(channels_first(own[:, 0])),
        frame_index=torch.as_tensor(predicted),
        intrinsics=torch.from_numpy(intrinsics).float(),
        view_in_ref=torch.from_numpy(view_in_ref[:, 0]).float(),
        gripper_in_ref=torch.from_numpy(world_in_ref @ episode.gripper_in_world[times]).float(),
        opening=torch.from_numpy(episode.gripper_opening[times]).float(),
        name=f"{episode.folder.name} t{start} cameras {'-'.join(str(c + 1) for c in cameras)}",
    )


# ------------------------------------------------------------------------------------------------------- renderer

def look_at(position, target):
    """cam_in_world (4,4) of a camera at `position` that looks at `target`, upright (world z up)."""
    z = np.asarray(target, float) - position
    z /= np.linalg.norm(z)
    x = np.cross(z, (0, 0, 1))
    x /= np.linalg.norm(x)
    cam_in_world = np.eye(4)
    cam_in_world[:3] = np.stack([x, np.cross(z, x), z, position], 1)
    return cam_in_world


def ranges(first, count):
    """first (n,), count (n,) -> owner, value: entry i stands count[i] times, with values first[i], first[i] + 1, ..."""
    owner = np.repeat(np.arange(len(count)), count)
    value = np.arange(len(owner)) + np.repeat(first - (np.cumsum(count) - count), count)
    return owner, value


def rasterize(vertices_in_cam, faces, intrinsics, height, width, near=0.01, cull=False):
    """One triangle mesh as K pinhole cameras see it: the depth of the nearest surface, and which face it is.

    vertices_in_cam (K,N,3) metres, OpenCV camera axes; faces (M,3) vertex numbers; intrinsics (K,3,3) or (3,3) pixels.
    Returns depth (K,H,W) float32, z in metres, 0 where there is nothing, and face (K,H,W) int32, -1 where there is
    nothing. Integer pixel coordinates are pixel centres. What is nearer than `near` is cut away. Both sides of a face
    are drawn; with `cull` only the side from which its corners run counter-clockwise: enough, and faster, for closed
    meshes.

    Let the corners of a face be v_i, and Q the matrix with the columns q_i = K v_i. The ray of pixel p = (x, y, 1)
    meets the face's plane at sum_i w_i v_i / sum_i w_i with w = Q^-1 p; the point is on the face, in front of the
    camera, where all w_i >= 0, and there 1/z = sum_i w_i. All of it is linear in x and y, and no vertex is divided by
    its z, so that faces reaching behind the camera need no clipping (Olano and Greer 1997, "Triangle scan conversion
    using 2D homogeneous coordinates").
    """
    vertices_in_cam, faces = np.asarray(vertices_in_cam, float), np.asarray(faces)
    K, pixels = len(vertices_in_cam), height * width
    intrinsics = np.broadcast_to(np.asarray(intrinsics, float), (K, 3, 3))
    group = max(1, 2**20 // pixels)                      # cameras at a time, so that memory does not grow with K
    if K > group:
        parts = [rasterize(vertices_in_cam[i:i + group], faces, intrinsics[i:i + group], height, width, near, cull)
                 for i in range(0, K, group)]
        return tuple(np.concatenate(part) for part in zip(*parts))

    # 1. The pixel box of every face in every camera. Most faces of a fine mesh end here, between pixel centres.
    q = np.moveaxis(vertices_in_cam @ intrinsics.mT, -1, 0)                     # (3,K,N), the last one is z
    in_front = q[2] > near
    xy = q[:2] / np.where(in_front, q[2], 1)
    low, high = np.where(in_front, xy, -np.inf), np.where(in_front, xy, np.inf)  # a corner behind: no bound
    a, b, c = faces.T
    low = np.minimum(np.minimum(low[..., a], low[..., b]), low[..., c])         # (2,K,M)
    high = np.maximum(np.maximum(high[..., a], high[..., b]), high[..., c])
    low = np.ceil(low.clip(0, 2**30))
    high = np.floor(np.minimum(high, np.array([width - 1, height - 1])[:, None, None]))
    any_in_front = in_front[:, a] | in_front[:, b] | in_front[:, c]
    view, face = np.nonzero((low[0] <= high[0]) & (low[1] <= high[1]) & any_in_front)
    low, high = low[:, view, face].astype(int), high[:, view, face].astype(int)  # (2,n)

    # 2. Four lines per face, as functions of (x, y, 1) that are >= 0 inside: its three edges, and z >= near.
    cross = lambda a, b: np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])
    q0, q1, q2 = (q[:, view, corner[face]] for corner in (a, b, c))             # (3,n)
    w = np.stack([cross(q1, q2), cross(q2, q0), cross(q0, q1)])                 # (3,3,n)
    det = (w[0] * q0).sum(0)                                                    # < 0: seen from its outside
    visible = np.flatnonzero(det < -1e-12 if cull else np.abs(det) > 1e-12)     # a face seen edge-on covers nothing
    view, face, low, high = view[visible], face[visible], low[:, visible], high[:, visible]
    w = w[..., visible] / det[visible]                                          # (3,3,n), the rows of Q^-1
    inverse_z = w.sum(0)                                                        # (3,n)
    lines = np.concatenate([w, (np.array([[0], [0], [1 / near]]) - inverse_z)[None]])  # (4,3,n)

    # 3. The span of pixels, start to stop, in every row of every face.
    tri, y = ranges(low[1], high[1] - low[1] + 1)
    slope, offset = lines[:, 0, tri], lines[:, 1, tri] * y + lines[:, 2, tri]   # (4,rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = -offset / slope
    left = np.where(slope > 0, root, np.where((slope == 0) & (offset < 0), np.inf, -np.inf)).max(0)
    right = np.where(slope < 0, root, np.inf).min(0)
    # The 1e-6 of a pixel lets both neighbours own a pixel centre on their common edge: rounding opens no crack.
    start = np.ceil(np.clip(left - 1e-6, low[0, tri], width)).astype(int)
    stop = np.floor(np.clip(right + 1e-6, -1, high[0, tri])).astype(int)
    row, x = ranges(start, (stop - start + 1).clip(0))

    # 4. The z-buffer: the largest 1/z wins. The bits of positive floats sort as the floats do, so that the maximum of
    # one integer made of (bits of 1/z, face) keeps both the depth and the face.
    fragment = (inverse_z[1, tri] * y + inverse_z[2, tri])[row] + inverse_z[0, tri][row] * x
    key = fragment.astype(np.float32).view(np.int32).astype(np.int64) << 32 | face[tri][row]
    buffer = np.zeros(K * pixels, np.int64)
    np.maximum.at(buffer, (view[tri] * pixels + y * width)[row] + x, key)
    nearest = (buffer >> 32).astype(np.int32).view(np.float32)
    depth = np.divide(1, nearest, out=np.zeros_like(nearest), where=buffer > 0)
    face = np.where(buffer > 0, buffer & 0xffffffff, -1).astype(np.int32)
    return depth.reshape(K, height, width), face.reshape(K, height, width)


def load_mesh(path):
    """An OBJ or STL (binary or ascii) file -> vertices (N,3) float64 in the file's unit, faces (M,3) int64.

    Polygons become fans of triangles. Raises ValueError, one line, for a file that is not such a mesh.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".obj":
            words = [line.split() for line in data.decode().splitlines()]
            vertices = [[float(v) for v in w[1:4]] for w in words if w[:1] == ["v"]]
            polygons = [[int(v.split("/")[0]) for v in w[1:]] for w in words if w[:1] == ["f"]]
            faces = np.array([(f[0], f[i], f[i + 1]) for f in polygons for i in range(1, len(f) - 1)],
                             int).reshape(-1, 3)
            faces = np.where(faces > 0, faces - 1, faces + len(vertices))       # counted from 1, or back from the end
        elif path.suffix.lower() == ".stl":
            count = int.from_bytes(data[80:84], "little")
            if len(data) == 84 + 50 * count:                                    # binary: 12 floats and 2 bytes a face
                record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
                corners = np.frombuffer(data, record, count, 84)["corners"].reshape(-1, 3)
            else:
                words = [line.split() for line in data.decode().splitlines()]
                corners = np.array([[float(v) for v in w[1:4]] for w in words if w[:1] == ["vertex"]]).reshape(-1, 3)
            vertices, faces = np.unique(corners, axis=0, return_inverse=True)   # each face repeats its corners
            faces = faces.reshape(-1, 3)
        else:
            raise ValueError("its name must end in .obj or .stl")
        vertices = np.array(vertices, float).reshape(-1, 3)
        if not len(faces) or not np.isfinite(vertices).all() or faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError("it has no triangles, or corners that do not exist")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such mesh file") from None
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path} is no readable OBJ or STL mesh: {str(error).splitlines()[0]}") from None
    return vertices, faces.astype(np.int64)


LAMP_PIXELS = 512           # on a side of the lamp's own picture of the world, which tells what it lights
LAMP_TARGET = 0.05, 0, 0    # where it looks, in the world
LAMP_INTRINSICS = np.array([[0.75 * LAMP_PIXELS, 0, LAMP_PIXELS / 2],
                            [0, 0.75 * LAMP_PIXELS, LAMP_PIXELS / 2],
                            [0, 0, 1]])


def assemble(bodies, body_in_world):
    """All bodies as one mesh in the world: vertices (N,3), faces (M,3), normals (M,3), each face's body number (M,)."""
    vertices = [transform(body.mesh[0], pose) for body, pose in zip(bodies, body_in_world)]
    starts = np.cumsum([0] + [len(v) for v in vertices])
    vertices, faces = np.concatenate(vertices), np.concatenate([b.mesh[1] + start for b, start in zip(bodies, starts)])
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
    return vertices, faces, normals, np.repeat(np.arange(len(bodies)), [len(body.mesh[1]) for body in bodies])


def lamp_depth(mesh, lamp):
    """How far the light of a lamp at `lamp` (3,) gets through each of its pixels, (LAMP_PIXELS, LAMP_PIXELS) metres."""
    vertices_in_lamp = transform(mesh[0], invert(look_at(lamp, LAMP_TARGET)))
    depth = rasterize(vertices_in_lamp[None], mesh[1], LAMP_INTRINSICS, LAMP_PIXELS, LAMP_PIXELS, cull=True)[0][0]
    return np.where(depth > 0, depth, np.inf)


def draw_bodies(bodies, body_in_world, mesh, intrinsics, cam_in_world, size, lamp, behind=None):
    """What one camera sees of the bodies, before shadows fall on it. mesh: they, assembled. `behind`: such a picture,
    which they are drawn into.

    Returns a dict of flat arrays, one entry a pixel: depth, label, normal, color, the light of the sky, the light of
    the lamp if it reaches the point, and where the lamp would see the point: lamp_pixel and lamp_z.
    """
    H, W = size
    picture = {name: array.copy() for name, array in behind.items()} if behind else dict(
        depth=np.full(H * W, np.inf, np.float32), label=np.full(H * W, OTHER, np.uint8),
        normal=np.zeros((H * W, 3), np.float32), color=np.zeros((H * W, 3), np.float32), sky=np.ones(H * W, np.float32),
        sun=np.zeros(H * W, np.float32), lamp_pixel=np.zeros(H * W, int), lamp_z=np.zeros(H * W, np.float32))
    vertices, faces, normals, body_of_face = mesh
    depth, face = rasterize(transform(vertices, invert(cam_in_world))[None], faces, intrinsics, H, W, cull=True)
    depth, face = depth.ravel(), face.ravel()
    mine = np.flatnonzero((face >= 0) & (depth < picture["depth"]))             # (P,) pixels where a body is in front
    depth, face = depth[mine], face[mine]

    single = lambda x: np.asarray(x, np.float32)
    dot = lambda a, b: np.einsum("pi,pi->p", a, b)
    pixels = single(np.stack([mine % W, mine // W, np.ones(len(mine))], 1))
    rays = pixels @ single(cam_in_world[:3, :3] @ np.linalg.inv(intrinsics)).T
    points = single(cam_in_world[:3, 3]) + rays * depth[:, None]                # (P,3) in the world
    normal = single(normals)[face]                                              # (P,3)
    to_lamp = single(lamp) - points
    cosine = dot(normal, to_lamp) / np.sqrt(dot(to_lamp, to_lamp))

    # Points are moved off their surface by 6 mm, or it would shade itself: a pixel of the lamp is as large as that.
    in_lamp = transform(points + 0.006 * normal, single(invert(look_at(lamp, LAMP_TARGET))))
    x, y = (in_lamp[:, :2] / in_lamp[:, 2:] * LAMP_INTRINSICS[0, 0] + LAMP_INTRINSICS[0, 2] + 0.5).T
    in_view = (x >= 0) & (x < LAMP_PIXELS) & (y >= 0) & (y < LAMP_PIXELS)

    color, body = np.zeros_like(points), body_of_face[face]
    for i in np.flatnonzero(np.bincount(body)):
        of_body = np.flatnonzero(body == i)
        rotation, position = single(body_in_world[i][:3, :3]), single(body_in_world[i][:3, 3])
        color[of_body] = bodies[i].paint((points[of_body] - position) @ rotation, normal[of_body] @ rotation)

    seen = dict(depth=depth, label=np.array([body.label for body in bodies], np.uint8)[body],
                normal=normal, color=color, sky=0.42 + 0.13 * normal[:, 2], sun=0.55 * cosine.clip(0),
                lamp_z=np.where(in_view, in_lamp[:, 2], 0),
                lamp_pixel=np.where(in_view, y, 0).astype(int) * LAMP_PIXELS + np.where(in_view, x, 0).astype(int))
    for name, values in seen.items():
        picture[name][mine] = values
    return picture


def render(bodies, body_in_world, intrinsics, cam_in_world, size, lamp=(-0.5, -0.7, 1.9), samples=1, still=None):
    """Pictures of rigid painted bodies (see Body) from K cameras.

    body_in_world (N,4,4), intrinsics (K,3,3) pixels of size (H, W), cam_in_world (K,4,4), lamp (3,) in the world.
    Returns rgb (K,H,W,3) uint8, depth (K,H,W) float32 z in metres (0: nothing there), label (K,H,W) uint8, normal
    (K,H,W,3) float32 in the world. `samples` (odd) rays a pixel and axis smooth the colours; depth, label and normal
    are those of the pixel's centre. Bodies are closed: only their outsides are drawn. Light: a sky that is brighter
    than the ground, and a lamp with Lambert's cosine and hard shadows. `still`: what `backdrop` made of further bodies,
    which do not move, for the same cameras, size, lamp and samples.
    """
    H, W = fine = size[0] * samples, size[1] * samples
    mesh = assemble(bodies, body_in_world)
    pictures, light_reach = still or ([None] * len(cam_in_world), np.inf)
    light_reach = np.minimum(lamp_depth(mesh, lamp), light_reach).ravel()
    centre = np.s_[samples // 2::samples, samples // 2::samples]                # middle sample: the pixel's centre
    shots = []
    for K, camera, behind in zip(scale_intrinsics(intrinsics, size, fine), cam_in_world, pictures):
        seen = draw_bodies(bodies, body_in_world, mesh, K, camera, fine, lamp, behind)
        lit = seen["lamp_z"] < light_reach[seen["lamp_pixel"]]
        rgb = seen["color"] * (seen["sky"] + seen["sun"] * lit)[:, None]
        rgb = np.minimum(rgb, 1).reshape(H, W, 3)
        rgb = sum(rgb[i::samples] for i in range(samples))
        rgb = sum(rgb[:, i::samples] for i in range(samples)) / samples**2
        depth = seen["depth"].reshape(H, W)[centre]
        shots.append(((rgb * 255).round().astype(np.uint8), np.where(np.isinf(depth), 0, depth),
                      seen["label"].reshape(H, W)[centre], seen["normal"].reshape(H, W, 3)[centre]))
    return tuple(np.stack(images) for images in zip(*shots))


def backdrop(bodies, body_in_world, intrinsics, cam_in_world, size, lamp, samples=1):
    """The part of `render` that bodies which never move need only once: their pictures and their shadows."""
    fine, mesh = (size[0] * samples, size[1] * samples), assemble(bodies, body_in_world)
    pictures = [draw_bodies(bodies, body_in_world, mesh, K, camera, fine, lamp)
                for K, camera in zip(scale_intrinsics(intrinsics, size, fine), cam_in_world)]
    return pictures, lamp_depth(mesh, lamp)


# ------------------------------------------------------------------------------------------------ meshes and paint

@dataclass(frozen=True)
class Body:
    """A rigid piece of the world."""
    mesh: tuple             # vertices (N,3) metres in the body's own frame, faces (M,3)
    paint: object           # points (P,3) and normals (P,3) in the body's frame -> colours (P,3) in 0..1
    label: int = OTHER


def skin(rings):
    """rings (R,S,3), each counter-clockwise seen from the last one -> the closed mesh through them, normals outward."""
    R, S, _ = rings.shape
    vertices = np.concatenate([rings.reshape(-1, 3), rings[[0, -1]].mean(1)])   # the last two: middles of the caps
    i, j = np.meshgrid(np.arange(R - 1), np.arange(S), indexing="ij")
    here, right, above, across = (r * S + s % S for r, s in ((i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)))
    sides = [np.stack([here, right, across], -1), np.stack([here, across, above], -1)]
    j, next_j, top = np.arange(S), (np.arange(S) + 1) % S, (R - 1) * S
    caps = [np.stack([0 * j + R * S, next_j, j], -1), np.stack([0 * j + R * S + 1, top + j, top + next_j], -1)]
    return vertices, np.concatenate([part.reshape(-1, 3) for part in sides + caps])


def loft(*sections):
    """Rectangles (z, low x, high x, low y, high y) in order of z, joined into one solid."""
    return skin(np.array([[(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]
                          for z, x0, x1, y0, y1 in sections], float))


def box(size, centre=(0, 0, 0)):
    (x0, y0, z0), (x1, y1, z1) = np.array(centre) - np.array(size) / 2, np.array(centre) + np.array(size) / 2
    return loft((z0, x0, x1, y0, y1), (z1, x0, x1, y0, y1))


def lathe(*profile, segments=20):
    """A profile of (radius, z) points, from below, turned about the z axis. Going back down inside makes a vessel."""
    angle = 2 * np.pi * np.arange(segments) / segments
    return skin(np.array([[(r * np.cos(t), r * np.sin(t), z) for t in angle] for r, z in profile], float))


def capsule(length, radius):
    """From the origin along z, with round ends."""
    turn = np.linspace(0, np.pi / 2, 4)
    r, z = radius * np.sin(turn), radius * np.cos(turn)
    return lathe(*zip(r, -z), *zip(z, length + r), segments=14)


def merge(*meshes):
    """Several (vertices, faces) as one mesh."""
    counts = [len(vertices) for vertices, _ in meshes]
    starts = np.cumsum(counts) - counts
    return np.concatenate([v for v, _ in meshes]), np.concatenate([f + start for (_, f), start in zip(meshes, starts)])


def gripper_mesh():
    """A parallel-jaw gripper with the outer dimensions of the Franka hand, from primitives.

    Returns {"hand": (vertices, faces), "finger": (vertices, faces)}, metres, in the hand frame. "finger" is the left
    finger at opening 0. At opening w it moves by (0, +w/2, 0), and the right finger is the same mesh turned by 180
    degrees about z, then moved by (0, -w/2, 0).
    """
    flange = lathe((0.0315, -0.004), (0.0315, 0.014), segments=16)
    body = loft((-0.012, -0.012, 0.012, -0.097, 0.085), (0.004, -0.022, 0.022, -0.103, 0.097),
                (0.022, -0.0205, 0.0205, -0.1, 0.1), (0.0655, -0.0185, 0.0185, -0.1, 0.1))
    slider = loft((0.053, -0.0105, 0.0105, 0.003, 0.0258), (0.072, -0.0105, 0.0105, 0.0155, 0.0258))
    tip = loft((0.068, -0.0105, 0.0105, 0.0125, 0.0235), (0.0885, -0.009, 0.009, 0.0, 0.0150),
               (0.1063, -0.009, 0.009, 0.0, 0.0128))
    return {"hand": merge(flange, body), "finger": merge(slider, tip)}


LATTICE = np.random.default_rng(0).random((256, 256), dtype=np.float32)


def noise(u, v):
    """A smooth random field in 0..1 over the plane, with features of size 1."""
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    a, b = (t * t * (3 - 2 * t) for t in (u - i, v - j))
    corner = lambda di, dj: LATTICE[(j + dj) & 255, (i + di) & 255]
    return (corner(0, 0) * (1 - a) + corner(1, 0) * a) * (1 - b) + (corner(0, 1) * (1 - a) + corner(1, 1) * a) * b


def plain(color):
    return lambda points, normals: np.broadcast_to(np.float32(color), points.shape)


def wood(color, plank):
    """Planks along x, each of its own shade, with grain and blotches."""
    def paint(points, normals):
        x, y = points[:, 0], points[:, 1]
        number = np.floor(y / plank)
        shade = 0.68 + 0.2 * noise(number * 3.7, number * 0) + 0.14 * noise(x * 9 + 5.3 * number, y * 110) \
            + 0.18 * noise(x * 4 + 90, y * 4)
        return shade[:, None] * np.float32(color)
    return paint


def stripes(a, b, width, axis=2):
    """Two colours in turn along an axis of the body."""
    def paint(points, normals):
        return np.where(np.floor(points[:, axis, None] / width) % 2 > 0, np.float32(a), np.float32(b))
    return paint


def checks(a, b, cell):
    def paint(points, normals):
        return np.where(np.floor(points / cell + 1e-3).sum(1, keepdims=True) % 2 > 0, np.float32(a), np.float32(b))
    return paint


def cardboard(front, back):
    """A cereal box: a coloured front with a title bar, a white bowl and lines of print."""
    def paint(points, normals):
        x, z = points[:, 0], points[:, 2]
        face = np.abs(normals[:, 1]) > 0.5
        color = np.where((z > 0.035)[:, None], np.float32(back), np.float32(front))
        color = np.where((face & (np.hypot(x, z + 0.015) < 0.03))[:, None], np.float32((0.97, 0.95, 0.9)), color)
        print_ = ~face & (np.floor(z / 0.008) % 2 > 0) & (z < 0.02) & (np.abs(points[:, 1]) < 0.016)
        return np.where(print_[:, None], np.float32((0.95, 0.95, 0.95)), color)
    return paint


def cloth(table, centre, half, a, b):
    """A table top with a checked place mat painted on it: something that is at one place only."""
    mat = checks(a, b, half[0] / 2)

    def paint(points, normals):
        local = points - np.float32((*centre, 0))
        inside = (np.abs(local[:, 0]) < half[0]) & (np.abs(local[:, 1]) < half[1])
        return np.where(inside[:, None], mat(local * np.float32((1, 1, 0)), normals), table(points, normals))
    return paint


# ------------------------------------------------------------------------------------------------ synthetic world
# A kinematic world: hands go where they are told, what is gripped moves with the hand, what is let go falls straight
# down. Arms do not collide with anything.

HZ = 10                     # frames a second of a synthetic recording
TCP = 0.1                   # metres along z from the hand's origin to the point between the finger pads that grips
PADS = np.array([(x, z) for x in (-0.008, 0, 0.008) for z in (0.089, 0.094, 0.1, 0.105)])  # (x, z) on a pad, hand frame
UP = np.array([0.0, 0, 1])


def pose(position, rotation=np.eye(3)):
    """a_in_b (4,4) from the position (3,) and the rotation (3,3) of frame a in frame b."""
    a_in_b = np.eye(4)
    a_in_b[:3, :3], a_in_b[:3, 3] = rotation, position
    return a_in_b


def turn(axis, angle):
    """Rotation (3,3) by an angle in radians about axis 'x', 'y' or 'z'."""
    return Rotation.from_euler(axis, angle).as_matrix()


def hand(tip, forward, closing):
    """gripper_in_world: finger pads centred on `tip`, palm facing along `forward`, fingers moving along `closing`."""
    z = np.array(forward, float) / np.linalg.norm(forward)
    y = closing - (closing @ z) * z
    y /= np.linalg.norm(y)
    return pose(np.array(tip) - TCP * z, np.stack([np.cross(y, z), y, z], 1))


def shift(a_in_b, offset):
    """The pose moved by an offset (3,) given in frame b."""
    return pose(a_in_b[:3, 3] + offset, a_in_b[:3, :3])


def between(a, b, s):
    """The pose a share s of the way from pose a to pose b: along a line, turning about one axis."""
    turning = Rotation.from_matrix(b[:3, :3] @ a[:3, :3].T).as_rotvec()
    return pose(a[:3, 3] + s * (b[:3, 3] - a[:3, 3]), Rotation.from_rotvec(s * turning).as_matrix() @ a[:3, :3])


def stretch(start, end, side):
    """Pose at `start` with z towards `end`, and its x axis near `side`."""
    z = (end - start) / np.linalg.norm(end - start)
    y = np.cross(z, side)
    y /= np.linalg.norm(y)
    return pose(start, np.stack([np.cross(y, z), y, z], 1))


UPPER_ARM, FOREARM = 0.36, 0.42


def arm_bodies(arm, color):
    """The links of one arm, from base to fingers, in the order of arm_poses."""
    white, dark = plain((0.93, 0.93, 0.92)), plain((0.25, 0.26, 0.28))
    label = (RIGHT_GRIPPER, LEFT_GRIPPER)[arm]
    gripper = gripper_mesh()
    finger = Body(gripper["finger"], plain((0.32, 0.33, 0.36)), label)
    joint = merge(lathe((0.062, -0.075), (0.062, 0.075)))
    return [Body(lathe((0.11, -0.03), (0.11, 0.02), (0.08, 0.05), (0.075, 0.26)), white),
            Body(joint, dark), Body(capsule(UPPER_ARM, 0.06), stripes(color, (0.93, 0.93, 0.92), 0.19)),
            Body(joint, dark), Body(capsule(FOREARM, 0.05), white), Body(lathe((0.05, -0.06), (0.05, 0.06)), dark),
            Body(lathe((0.048, -0.05), (0.048, 0.05), (0.036, 0.1)), plain(color)),
            Body(gripper["hand"], white, label), finger, finger]


def arm_poses(base, gripper_in_world, opening):
    """Where the links are, body_in_world (10,4,4): a shoulder, an elbow that points up, and a wrist behind the hand."""
    shoulder = base + 0.333 * UP
    wrist = gripper_in_world[:3, 3] - 0.15 * gripper_in_world[:3, 2]
    reach = np.linalg.norm(wrist - shoulder)
    along = (wrist - shoulder) / reach
    side = np.cross(UP, along)
    side /= np.linalg.norm(side)
    ahead = (UPPER_ARM**2 - FOREARM**2 + reach**2) / (2 * reach)               # law of cosines
    above = np.sqrt(max(0.0, UPPER_ARM**2 - ahead**2))
    elbow = shoulder + ahead * along + above * np.cross(along, side)
    forearm = stretch(elbow, wrist, side)
    left = gripper_in_world @ pose((0, opening / 2, 0))
    right = gripper_in_world @ pose((0, -opening / 2, 0), turn("z", np.pi))
    across = stretch(shoulder, shoulder + side, UP)
    return np.stack([pose(base), across, stretch(shoulder, elbow, side), pose(elbow, across[:3, :3]), forearm,
                     pose(wrist, across[:3, :3]), gripper_in_world @ pose((0, 0, -0.1)), gripper_in_world, left, right])


def within(points, half, order):
    """Whether points (...,d) in a body's frame lie in a box (order inf) or ellipsoid (order 2) of half sizes (d,)."""
    return np.linalg.norm(points / np.array(half), ord=order, axis=-1) <= 1


# Each scene below is drawn at random and returns a namespace of
#   fixed             [(Body, body_in_world)], the furniture
#   object            Body of the thing to move
#   object_in_world   (4,4), where it is at first
#   solid             (half sizes (3,), order), what fingers can grip of it; see within
#   supports          [(support_in_world, half sizes (2,), order, height)], where it may rest besides the table
#   done              object_in_world -> bool, the goal
#   bases             [(3,)], where the arms stand
#   keys              [(seconds, {arm: (gripper_in_world, opening)})], the script; an arm not named stays
OPEN, SHUT = 0.08, 0.0      # metres between the fingers; SHUT closes on whatever there is


def cereal_scene(draw):
    """Task 1: a box stands on a shelf; the arm takes it from there and stores it below the shelf."""
    height, depth, width = draw.uniform(0.28, 0.31), 0.18, 0.36
    shelf = pose((draw.uniform(0.14, 0.2), draw.uniform(-0.12, 0.12), 0), turn("z", draw.uniform(-0.6, 0.6)))
    legs = [box((0.02, 0.02, height), (x, y, height / 2)) for x in (-0.08, 0.08) for y in (-0.17, 0.17)]
    shelf_mesh = merge(box((depth, width, 0.016), (0, 0, height - 0.008)), *legs)
    dark_wood = wood(np.array((0.45, 0.28, 0.17)) * draw.uniform(0.8, 1.1), 0.06)
    size = np.array([0.1, 0.045, 0.15]) * draw.uniform(0.9, 1.1, 3)
    front, back = draw.permutation([(0.85, 0.15, 0.1), (0.1, 0.35, 0.8), (0.95, 0.75, 0.1), (0.1, 0.6, 0.3)])[:2]
    start = shelf @ pose((draw.uniform(-0.05, -0.02), draw.uniform(-0.1, 0.1), height + size[2] / 2),
                         turn("z", draw.uniform(-0.15, 0.15)))
    end = shelf @ pose((draw.uniform(-0.06, -0.03), draw.uniform(-0.05, 0.05), size[2] / 2))

    pitch = draw.uniform(0.15, 0.35)                                            # from the front, a little from above
    grip = hand((-size[0] / 2 + 0.027, 0, 0.01), (np.cos(pitch), 0, -np.sin(pitch)), (0, 1, 0))  # gripper_in_object
    home = hand(draw.uniform((-0.25, -0.2, 0.3), (-0.12, 0.2, 0.42)), (0.5, 0, -1), (0, 1, 0))
    take, put = start @ grip, end @ grip
    back_off, over_board = -0.26 * shelf[:3, 0], 0.05 * UP
    keys = [(0.0, {0: (home, OPEN)}),
            (1.1, {0: (shift(take, -0.1 * take[:3, 2]), OPEN)}),                # approach
            (0.7, {0: (take, OPEN)}),
            (0.6, {0: (take, SHUT)}),                                           # grasp
            (0.4, {0: (shift(take, over_board), SHUT)}),                        # lift
            (0.8, {0: (shift(take, over_board + back_off), SHUT)}),             # away from the shelf
            (0.9, {0: (shift(put, back_off + 0.03 * UP), SHUT)}),               # down
            (0.9, {0: (shift(put, 0.012 * UP), SHUT)}),                         # under the board
            (0.3, {0: (put, SHUT)}),                                            # place
            (0.4, {0: (put, OPEN)}),                                            # release
            (0.6, {0: (shift(put, back_off), OPEN)}),                           # retreat
            (0.6, {0: (between(shift(put, back_off), home, 0.5), OPEN)})]

    def done(object_in_world):
        x, y, z = transform(object_in_world[:3, 3], invert(shelf))
        return within(np.array([x, y]), (depth / 2, width / 2), np.inf) and z < height / 2
    return SimpleNamespace(
        fixed=[(Body(shelf_mesh, dark_wood), shelf)], supports=[(shelf, (depth / 2, width / 2), np.inf, height)],
        done=done, object=Body(box(size), cardboard(front, back), OBJECT), object_in_world=start,
        solid=(size / 2, np.inf), bases=[np.array([-0.55, 0, 0])], keys=keys)


def spatula_scene(draw):
    """Task 2: a spatula leans in a crock, blade up; the arm pulls it out, turns it flat and lays it on the table."""
    height, radius, side = draw.uniform(0.12, 0.14), draw.uniform(0.048, 0.058), draw.choice([-1, 1])
    crock = pose((draw.uniform(0.05, 0.15), side * draw.uniform(0.08, 0.2), 0))
    inner = radius - 0.006
    crock_mesh = lathe((0.9 * radius, 0), (radius, height), (inner, height), (0.9 * inner, 0.008), segments=24)
    glaze = draw.permutation([(0.75, 0.8, 0.85), (0.2, 0.35, 0.5), (0.8, 0.5, 0.3), (0.35, 0.5, 0.35)])
    length = draw.uniform(0.21, 0.24)                                           # of the handle, centred on the origin
    thin = lambda z, half: (length / 2 + z, -0.0025, 0.0025, -half, half)
    spatula = merge(box((0.012, 0.018, length)), loft(thin(0, 0.012), thin(0.025, 0.036), thin(0.09, 0.036)))
    color = draw.permutation([(0.8, 0.1, 0.1), (0.1, 0.5, 0.25), (0.95, 0.6, 0.1)])[0]

    def paint(points, normals):
        return np.where(points[:, 2:] > length / 2, np.float32((0.12, 0.12, 0.13)), np.float32(color))
    lean = turn("z", draw.uniform(-0.5, 0.5)) @ turn("y", draw.uniform(-0.1, 0.16))
    start = pose(crock[:3, 3] + (0, 0, 0.008 - transform(spatula[0], pose(np.zeros(3), lean))[:, 2].min()), lean)
    flat = turn("z", draw.uniform(-0.5, 0.5)) @ turn("y", np.pi / 2)            # blade away from the robot
    end = pose((draw.uniform(-0.1, 0), -side * draw.uniform(0.08, 0.2), 0.006), flat)

    pitch = draw.uniform(0.15, 0.35)
    grip = hand((0, 0, length / 2 - draw.uniform(0.02, 0.035)), (np.cos(pitch), 0, -np.sin(pitch)), (0, 1, 0))
    home = hand(draw.uniform((-0.25, -0.15, 0.3), (-0.15, 0.15, 0.42)), (0.5, 0, -1), (0, 1, 0))
    take, put = start @ grip, end @ grip
    keys = [(0.0, {0: (home, OPEN)}),
            (1.1, {0: (shift(take, -0.1 * take[:3, 2]), OPEN)}),                # approach
            (0.7, {0: (take, OPEN)}),
            (0.6, {0: (take, SHUT)}),                                           # grasp
            (1.0, {0: (shift(take, draw.uniform(0.21, 0.25) * UP), SHUT)}),     # out of the crock
            (1.4, {0: (shift(put, 0.1 * UP), SHUT)}),                           # over to the other side, and flat
            (0.7, {0: (put, SHUT)}),                                            # place
            (0.4, {0: (put, OPEN)}),                                            # release
            (0.6, {0: (shift(put, 0.14 * UP), OPEN)}),                          # retreat
            (0.7, {0: (between(put, home, 0.6), OPEN)})]

    def done(object_in_world):
        lies = abs(object_in_world[2, 2]) < 0.2 and object_in_world[2, 3] < 0.02
        return lies and np.linalg.norm(object_in_world[:2, 3] - crock[:2, 3]) > radius
    return SimpleNamespace(
        fixed=[(Body(crock_mesh, stripes(glaze[0], glaze[1], 0.045)), crock)],
        supports=[(crock, (radius, radius), 2, 0.008)], done=done, object=Body(spatula, paint, OBJECT),
        object_in_world=start, solid=((0.006, 0.009, length / 2), np.inf),
        bases=[np.array([-0.55, 0, 0])], keys=keys)


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
    skin_color = draw.permutation([(0.85, 0.1, 0.1), (0.5, 0.75, 0.15), (0.9, 0.5, 0.1)])[0]
    start = shift(bowl, (0, 0, 0.006 + radius))

    meet = draw.uniform((-0.03, -0.06, 0.24), (0.08, 0.06, 0.32))
    x_axis = np.array([1.0, 0, 0])          # the hands meet with crossed fingers: one pair along x, one along z
    take = hand(start[:3, 3], (draw.uniform(-0.1, 0.1), draw.uniform(0, 0.25), -1), x_axis)
    give, receive = hand(meet, (0.1, 1, -0.25), x_axis), hand(meet, (0.1, -1, -0.25), UP)
    drop = hand(bin_[:3, 3] + 0.14 * UP, (0, 0.1, -1), (0, -1, 0))
    right_home = hand(draw.uniform((-0.2, -0.3, 0.28), (-0.1, -0.2, 0.38)), (0.3, 0, -1), x_axis)
    left_home = hand(draw.uniform((-0.2, 0.2, 0.28), (-0.1, 0.3, 0.38)), (0.3, 0, -1), (0, -1, 0))
    retreat = lambda gripper_in_world: shift(gripper_in_world, -0.13 * gripper_in_world[:3, 2])
    keys = [(0.0, {0: (right_home, OPEN), 1: (left_home, OPEN)}),
            (0.8, {0: (shift(take, 0.1 * UP), OPEN)}),                          # right: approach
            (0.5, {0: (take, OPEN)}),
            (0.6, {0: (take, SHUT)}),                                           # grasp
            (0.5, {0: (shift(take, 0.12 * UP), SHUT)}),                         # lift
            (0.9, {0: (give, SHUT), 1: (retreat(receive), OPEN)}),              # both: to where they meet
            (0.5, {1: (receive, OPEN)}),                                        # left: approach
            (0.6, {1: (receive, SHUT)}),                                        # grasp
            (0.4, {0: (give, OPEN)}),                                           # right: release
            (0.5, {0: (retreat(give), OPEN)}),
            (0.9, {0: (right_home, OPEN), 1: (shift(drop, 0.06 * UP), SHUT)}),  # left: over the bin
            (0.3, {1: (drop, SHUT)}),
            (0.4, {1: (drop, OPEN)}),                                           # release
            (0.4, {1: (shift(drop, 0.15 * UP), OPEN)})]                         # retreat

    def done(object_in_world):
        x, y, z = transform(object_in_world[:3, 3], invert(bin_))
        return within(np.array([x, y]), (length / 2, width / 2), np.inf) and z < height
    return SimpleNamespace(
        fixed=[(Body(bowl_mesh, stripes(china[0], china[1], 0.02)), bowl),
               (Body(bin_mesh, stripes(plastic, 0.8 * plastic, 0.03)), bin_)],
        supports=[(bowl, (0.08, 0.08), 2, 0.006), (bin_, (length / 2, width / 2), np.inf, 0.006)], done=done,
        object=Body(apple, stripes(skin_color, 0.85 * skin_color, radius), OBJECT), object_in_world=start,
        solid=((radius,) * 3, 2), bases=[np.array([-0.5, -0.33, 0]), np.array([-0.5, 0.33, 0])], keys=keys)


SCENES = {1: cereal_scene, 2: spatula_scene, 3: apple_scene}


def room(draw):
    """[(Body, body_in_world)]: a floor with walls, and the table with a place mat, in colours of their own."""
    tone = lambda *color: np.array(color) * draw.uniform(0.8, 1.1) + draw.uniform(-0.06, 0.06, 3)
    floor = checks(tone(0.5, 0.52, 0.55), tone(0.62, 0.6, 0.58), 0.3)
    table = wood(tone(0.85, 0.66, 0.45), draw.uniform(0.09, 0.16))
    mat = draw.permutation([(0.75, 0.3, 0.3), (0.3, 0.5, 0.75), (0.35, 0.6, 0.4), (0.8, 0.75, 0.6), (0.5, 0.35, 0.6)])
    top = cloth(table, (draw.uniform(0.1, 0.3), draw.uniform(-0.5, 0.5)), draw.uniform(0.1, 0.18, 2), mat[0], mat[1])
    vertices, faces = box((6, 6, 3), (0, 0, 0.75))
    return [(Body((vertices, faces[:, ::-1]), floor), np.eye(4)),               # inside out: seen from within
            (Body(box((1.25, 1.7, 0.05), (-0.1, 0, -0.025)), top), np.eye(4))]


def minimum_jerk(keys, draw):
    """A script [(seconds, {arm: (gripper_in_world, opening)})] at HZ -> gripper_in_world (T,A,4,4), opening (T,A).

    Every key is reached at rest, along s(t) = 10 t^3 - 15 t^4 + 6 t^5, which has the least squared jerk between two
    rests (Flash and Hogan 1985). The pace, each duration and each key's place vary a little.
    """
    pace = draw.uniform(0.9, 1.05)
    now = [keys[0][1][arm] for arm in sorted(keys[0][1])]
    poses, openings = [], []
    for seconds, targets in keys:
        target = [targets.get(arm, state) for arm, state in enumerate(now)]
        target = [(shift(p, draw.normal(0, 0.0015, 3)) if arm in targets else p, w)
                  for arm, (p, w) in enumerate(target)]
        steps = max(1, round(seconds * pace * draw.uniform(0.92, 1.08) * HZ))
        for t in np.arange(1, steps + 1) / steps:
            s = 10 * t**3 - 15 * t**4 + 6 * t**5
            poses.append([between(a, b, s) for (a, _), (b, _) in zip(now, target)])
            openings.append([a + (b - a) * s for (_, a), (_, b) in zip(now, target)])
        now = target
    return np.array(poses), np.array(openings)


class World:
    """One task's scene and its state: gripper_in_world (A,4,4), opening (A,) m, object_in_world (4,4), who holds it.

    world = World(task); world.reset(seed); world.step(gripper_in_world, opening); world.observe(...); world.success()
    """

    def __init__(self, task):
        self.task = task

    def reset(self, seed):
        """A new scene: what stands where, its size and its colour are functions of (task, seed). Sets `demonstration`,
        the scripted gripper_in_world (T,A,4,4) and opening (T,A) that does the task in it."""
        draw = np.random.default_rng([self.task, seed])
        self.scene = SCENES[self.task](draw)
        self.demonstration = minimum_jerk(self.scene.keys, draw)
        self.gripper_in_world, self.opening = self.demonstration[0][0], self.demonstration[1][0]
        self.gap = self.opening                       # how wide each hand was when it began to close
        self.object_in_world = self.scene.object_in_world
        self.holders = {}                             # arm -> width between its fingers; the first carries the object
        self.fixed = room(draw) + self.scene.fixed
        self.cameras = self.still = None              # the last cameras that observed, and what of it does not move
        colors = draw.permutation([(0.9, 0.45, 0.1), (0.15, 0.55, 0.75), (0.45, 0.7, 0.25)])
        self.arms = [arm_bodies(arm, colors[arm]) for arm in range(len(self.scene.bases))]
        self.lamp = draw.uniform((-0.7, 0.5, 1.7), (0.2, 0.9, 2.1)) * (1, draw.choice([-1, 1]), 1)

    def step(self, gripper_in_world, opening):
        """Move the hands to gripper_in_world (A,4,4), the fingers to opening (A,) m, as far as the object lets them."""
        motion = gripper_in_world @ invert(self.gripper_in_world)               # (A,4,4), in the world
        before, self.opening = self.opening, np.clip(opening, 0, OPEN)
        self.gripper_in_world = np.array(gripper_in_world)
        closing = self.opening < before
        self.gap = np.where(closing, self.gap, self.opening)
        if self.holders:
            self.object_in_world = motion[next(iter(self.holders))] @ self.object_in_world
        for arm in range(len(self.opening)):
            if arm not in self.holders:
                if closing[arm]:
                    self.grip(arm)
            elif self.opening[arm] > self.holders[arm] + 0.008:                 # 8 mm: a noisy opening drops nothing
                del self.holders[arm]
                if not self.holders:
                    self.object_in_world = upright(self.object_in_world)
            self.opening[arm] = max(self.opening[arm], self.holders.get(arm, 0))
        if not self.holders:
            self.fall()

    def grip(self, arm):
        """The object sticks to fingers that close on it from both sides; they push it to their middle."""
        y = np.linspace(-0.05, 0.05, 201)
        line = np.stack(np.broadcast_arrays(PADS[:, None, 0], y, PADS[:, None, 1]), -1)  # (pads,201,3), hand frame
        line_in_object = transform(line, invert(self.object_in_world) @ self.gripper_in_world[arm])
        touched = within(line_in_object, *self.scene.solid).any(0)
        if not touched.any():
            return
        low, high = y[touched][[0, -1]]
        # 5 mm each: finger tips are soft, and a recorded opening is never less than where the fingers were stopped.
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

    def observe(self, intrinsics, cam_in_world, size, samples=1):
        """The world from K cameras: see render. Returns rgb, depth in metres, label and normal."""
        cameras = intrinsics.tobytes(), cam_in_world.tobytes(), size, samples
        if self.cameras != cameras:
            self.cameras = cameras
            self.still = backdrop(*zip(*self.fixed), intrinsics, cam_in_world, size, self.lamp, samples)
        poses = [arm_poses(*arm) for arm in zip(self.scene.bases, self.gripper_in_world, self.opening)]
        return render([self.scene.object] + sum(self.arms, []), np.concatenate([[self.object_in_world], *poses]),
                      intrinsics, cam_in_world, size, self.lamp, samples, self.still)

    def success(self):
        """Whether the task is done: the object is where it belongs and nothing holds it."""
        return bool(not self.holders and self.scene.done(self.object_in_world))


def upright(object_in_world):
    """The pose with that axis of the object made vertical which is nearest to it: how a thing comes to rest."""
    axis = np.argmax(np.abs(object_in_world[2, :3]))
    now = object_in_world[:3, axis] * np.sign(object_in_world[2, axis])
    turning = np.cross(now, UP)
    angle = np.arctan2(np.linalg.norm(turning), now[2])
    turning *= angle / max(np.linalg.norm(turning), 1e-12)
    return pose(object_in_world[:3, 3], Rotation.from_rotvec(turning).as_matrix() @ object_in_world[:3, :3])


def sample_cameras(draw, tips, size, count=16):
    """Cameras on the paper's half shell, in front of the robot, looking at the middle of the workspace.

    Each has every hand in its picture for more than 85 % of the time. tips (T,A,3): the finger tips in the world.
    Returns intrinsics (count,3,3) pixels and cam_in_world (count,4,4).
    """
    H, W = size
    intrinsics, cam_in_world = [], []
    while len(cam_in_world) < count:
        position = draw.uniform((0.2, -0.5, 0.7), (0.6, 0.5, 1.2))
        focal = draw.uniform(0.72, 0.92) * W
        K = np.array([[focal, 0, (W - 1) / 2], [0, focal, (H - 1) / 2], [0, 0, 1]])
        camera = look_at(position, draw.normal((0, 0, 0.12), 0.04))
        camera[:3, :3] = camera[:3, :3] @ turn("z", draw.normal(0, 0.05))
        pixel, z = project(transform(tips, invert(camera)), K)
        seen = ((pixel >= 0) & (pixel <= (W - 1, H - 1))).all(-1) & (z > 0)
        if 0.7 <= np.linalg.norm(position) <= 1.2 and seen.mean(0).min() > 0.85:
            intrinsics.append(K)
            cam_in_world.append(camera)
    return np.stack(intrinsics), np.stack(cam_in_world)


def synthetic_episode(task, seed, out, size, samples):
    """Play and film one demonstration, and pack it into the folder `out`."""
    world = World(task)
    world.reset(seed)
    grippers, openings = world.demonstration
    tips = grippers[..., :3, 3] + TCP * grippers[..., :3, 2]
    intrinsics, cam_in_world = sample_cameras(np.random.default_rng([task, seed, 1]), tips, size)
    frames, states = [], []
    for gripper_in_world, opening in zip(grippers, openings):
        world.step(gripper_in_world, opening)
        rgb, depth, label, _ = world.observe(intrinsics, cam_in_world, size, samples)
        frames.append((rgb, (depth * 1000).round().astype(np.uint16), label))
        states.append((world.gripper_in_world, world.opening))
    if not world.success():
        raise ValueError(f"the demonstration of task {task} with seed {seed} does not succeed")
    rgb, depth, label = (np.stack(images, 1) for images in zip(*frames))        # (C,T,H,W[,3])
    gripper_in_world, opening = (np.stack(values) for values in zip(*states))
    save_episode(out, rgb, depth, label, intrinsics, cam_in_world, gripper_in_world, opening,
                 np.arange(len(opening)) / HZ, dict(task=task, source="synthetic", seed=seed, rate_hz=HZ))


def make_synthetic(task, out, episodes=25, size=(64, 80), seed=0, workers=None, samples=3):
    """Render `episodes` episodes of a task into out/episode_000, ...; those already there stay. Returns how many."""
    out = Path(out)
    jobs = []
    for number in range(episodes):
        folder, episode_seed = out / f"episode_{number:03d}", seed * 1000 + number
        if not folder.exists():
            jobs.append((task, episode_seed, folder, size, samples))
            continue
        episode = load_episode(folder)
        if (episode.info["source"] != "synthetic" or episode.info["seed"] != episode_seed
                or episode.rgb.shape[2:4] != size):
            raise ValueError(f"{folder} is another episode than the one asked for: choose another --out, "
                             f"or delete {out}")
    workers = min(workers or os.cpu_count(), len(jobs))
    progress = tqdm(total=len(jobs), desc=f"rendering synthetic episodes of task {task}", unit="episode")
    if workers <= 1:
        for job in jobs:
            synthetic_episode(*job)
            progress.update()
    else:                                             # spawned: a fork of a process with running threads may hang
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(synthetic_episode, *job) for job in jobs]):
                done.result()
                progress.update()
    progress.close()
    return episodes


# ------------------------------------------------------------------------------------------------ hub download

HUB_DATASET = "Zeyi/4dgen-dataset"
NEEDED_FILES = ("observations.npz", "intrinsics.npz", "extrinsics.npz", "actions.npz", "metadata.yaml")
# A packed episode against its download, at the same image size: public files are compressed, ours lie open for mapping.
PACKED_GROWTH = 3


def list_hub_episodes(task):
    """Episodes of a task on the hub: {processed folder in the repo: {file name: bytes}}, of the files we need only."""
    from huggingface_hub import HfApi
    episodes = {}
    for entry in HfApi().list_repo_tree(HUB_DATASET, TASKS[task].folder, recursive=True, repo_type="dataset"):
        folder, _, name = entry.path.rpartition("/")
        if folder.endswith("/processed") and name in NEEDED_FILES:
            episodes.setdefault(folder, {})[name] = entry.size
    natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
    complete = [folder for folder, files in episodes.items() if set(NEEDED_FILES[:3]) <= set(files)]
    return {folder: episodes[folder] for folder in sorted(complete, key=natural)}


def download_episodes(task, out, size, episodes=None, keep_raw=False):
    """Download the first `episodes` public episodes of a task (None: all), one at a time, and pack each at size (H, W).

    Only observations, intrinsics, extrinsics, actions and metadata are fetched, into out/raw, and deleted once packed
    unless keep_raw. What is packed already is skipped, a broken download goes on where it stopped. Returns the number
    packed in all. Raises ValueError, in one line, for a hub that can't be reached or read, and before anything is
    fetched for a full disk.
    """
    from huggingface_hub import hf_hub_download
    out = Path(out)

    def refused(error):             # the client has a dozen error types for "no", "not now" and "not you"
        return ValueError(f"cannot read {HUB_DATASET} on the hub ({type(error).__name__}): check the network; if it "
                          f"asks for it, accept the terms at https://huggingface.co/datasets/{HUB_DATASET} and run "
                          "`hf auth login`; or pass --source FOLDER of a local copy")
    try:
        found = list_hub_episodes(task)
    except Exception as error:
        raise refused(error) from None
    if not found:
        raise ValueError(f"{HUB_DATASET} lists no complete episode under {TASKS[task].folder}: "
                         "pass --source FOLDER of a local copy")
    name_of = lambda folder: "/".join(folder.split("/")[-4:-1])
    packed = {load_episode(folder).info.get("name") for folder in out.glob("episode_*") if folder.suffix == ""}
    todo = {folder: files for folder, files in list(found.items())[:episodes] if name_of(folder) not in packed}

    sizes = [sum(files.values()) for files in todo.values()]
    packed_bytes = sum(sizes) * PACKED_GROWTH * size[0] * size[1] / (480 * 640)
    raw_bytes = sum(sizes) if keep_raw else max(sizes, default=0)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free + sum(file.stat().st_size for file in (out / "raw").rglob("*") if file.is_file())
    needed, stays = raw_bytes + packed_bytes, packed_bytes + keep_raw * raw_bytes
    print(f"{HUB_DATASET}, task {task}: {len(found)} episodes, {len(packed)} packed here; {len(todo)} to download, "
          f"{sum(sizes) / 1e9:.2f} GB; on disk at most {needed / 1e9:.2f} GB, about {stays / 1e9:.2f} GB of it to stay")
    if needed > free:
        raise ValueError(f"{out} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed: "
                         f"give fewer --episodes, a smaller --size{' or no --keep_raw' * keep_raw}")

    number = len(packed)
    for folder, files in tqdm(todo.items(), desc="download and pack", unit="episode"):
        try:
            for name in files:
                hf_hub_download(HUB_DATASET, f"{folder}/{name}", repo_type="dataset", local_dir=out / "raw")
        except Exception as error:
            raise refused(error) from None
        pack_recorded(out / "raw" / folder, out / f"episode_{number:03d}", task, size)
        number += 1
        if not keep_raw:
            shutil.rmtree(out / "raw")
    return number


# ------------------------------------------------------------------------------------------------ pictures and commands

def preview(data, path, seed=0):
    """A picture of one clip: RGB, labels and depth of two views, and both clouds in the reference camera's frame."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw = np.random.default_rng(seed)
    episode = load_episode(draw.choice(episode_folders(data)))
    start = int(draw.choice(moving_starts(episode, 10) or [0]))
    cameras = draw.choice(len(episode.rgb), 2, replace=False)
    stride = max(1, round(episode.rate_hz / CLIP_HZ))
    last = min(start + 10 * stride, episode.rgb.shape[1] - 1)
    own, valid = point_maps(episode.depth[cameras, start] / 1000, episode.intrinsics[cameras])          # (2, H, W, 3)
    world_in_ref = invert(episode.cam_in_world[cameras[0], start])
    points = transform(own, world_in_ref @ episode.cam_in_world[cameras, start])
    label_colors = np.array([[0.85, 0.85, 0.85], [0.8, 0.1, 0.1], [0.1, 0.3, 0.8], [0.1, 0.6, 0.2]])

    picture = plt.figure(figsize=(20, 7), layout="constrained")
    grid = picture.add_gridspec(2, 6, width_ratios=[1, 1, 1, 1.1, 1.1, 1.1])
    for view, camera in enumerate(cameras):
        panels = [("observed", episode.rgb[camera, start]),
                  (f"{(last - start) / episode.rate_hz:g} s later", episode.rgb[camera, last]),
                  ("grippers red, blue; object green", label_colors[episode.label[camera, start]]),
                  ("depth, m", np.where(valid[view], own[view, ..., 2], np.nan))]
        for column, (title, shown) in enumerate(panels):
            axes = picture.add_subplot(grid[view, column])
            drawn = axes.imshow(shown)
            axes.set_title(f"camera {camera + 1}{' (reference)' if view == 0 else ''}: {title}", fontsize=9)
            axes.axis("off")
        picture.colorbar(drawn, ax=axes, shrink=0.7)
    for column, by_view in ((4, False), (5, True)):
        axes = picture.add_subplot(grid[:, column], projection="3d")
        for view, camera in enumerate(cameras):
            cloud, colors = points[view][valid[view]], episode.rgb[camera, start][valid[view]] / 255
            thin = np.random.default_rng(0).permutation(len(cloud))[:4000]
            x, y, z = cloud[thin].T
            axes.scatter(x, z, -y, c=["tab:blue", "tab:orange"][view] if by_view else colors[thin], s=2, linewidths=0)
        axes.set_aspect("equal")
        axes.view_init(elev=25, azim=-70)
        axes.set(xlabel="x", ylabel="z", zlabel="-y")
        axes.set_title("both clouds, reference frame" + (": one colour a view" if by_view else ": RGB"), fontsize=9)
    picture.suptitle(f"{episode.folder}, frame {start}")
    picture.savefig(path, dpi=80)
    plt.close(picture)


def parse_size(text):
    """'256x320' -> (256, 320), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, such as 256x320")
    return int(match[1]), int(match[2])


def prepare(task, out, source="synthetic", size=(64, 80), episodes=None, seed=0, workers=None, keep_raw=False):
    """Make the packed episodes of a task in `out` from one of the three sources. Returns how many there are."""
    if source == "synthetic":
        return make_synthetic(task, out, episodes or 25, size, seed, workers)
    if source == "hub":
        return download_episodes(task, out, size, episodes, keep_raw)
    if not Path(source).is_dir():
        raise ValueError(f"--source {source}: no such folder (or say synthetic, or hub)")
    return pack_folder(source, task, out, size, episodes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", type=int, default=1, choices=TASKS,
                        help="; ".join(f"{k} {t.name}" for k, t in TASKS.items()))
    parser.add_argument("--source", default="synthetic", help="synthetic, hub, or a folder of recorded episodes")
    parser.add_argument("--out", help="folder of the packed episodes [data/task_N]")
    parser.add_argument("--size", type=parse_size, default=(64, 80), help="HEIGHTxWIDTH in pixels of what is packed")
    parser.add_argument("--episodes", type=int, help="at most this many episodes [synthetic: 25, others: all]")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic episodes")
    parser.add_argument("--workers", type=int, help="processes that render [one a core]")
    parser.add_argument("--keep_raw", action="store_true", help="hub: keep what was downloaded, in OUT/raw")
    parser.add_argument("--preview", action="store_true",
                        help="write OUT/preview.png; makes the data first if there is none")
    args = parser.parse_args()
    for flag in ("episodes", "workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    out = Path(args.out or f"data/task_{args.task}")
    if not (args.preview and any(out.glob("*/episode.json"))):
        count = prepare(args.task, out, args.source, args.size, args.episodes, args.seed, args.workers, args.keep_raw)
        print(f"{out}: {count} episodes of task {args.task} ({TASKS[args.task].name}), source: {args.source}")
    if args.preview:
        preview(out, out / "preview.png", args.seed)
        print(f"picture: {out / 'preview.png'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"data.py: {error}")
