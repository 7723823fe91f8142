"""RGB-D episodes of robot manipulation: recorded ones packed for training, or rendered ones, and the clips cut from them.

    python data.py --task 1                             # render the synthetic world's episodes into data/task_1
    python data.py --task 1 --source FOLDER             # pack recorded episodes in the public dataset's layout
    python data.py --task 1 --source hub --episodes 3   # download and pack three of the public episodes
    python data.py --task 1 --preview                   # data/task_1/preview.png: two views, and both clouds in one frame

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
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from tqdm import tqdm

FAR = 2.0                   # metres; farther depth counts as invalid
CLIP_HZ = 2                 # frames a second of a clip: ten predicted frames are five seconds
MIN_SPEED = 0.02            # m/s; a clip must see an arm move faster than this in its first STATIC_SECONDS
STATIC_SECONDS = 2.0
TRAIN_CAMERAS, TEST_CAMERAS = range(0, 12), range(12, 16)      # scene_1..scene_12 and scene_13..scene_16 of the public data


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
    u, v = (u, v) if numpy else (torch.as_tensor(u).to(intrinsics), torch.as_tensor(v).to(intrinsics))
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

    intrinsics: (3, 3), or any shape that broadcasts. Points with z <= 0 lie behind the camera: their pixels mean nothing.
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
    """Metres in [-1, 2] -> [-1, 1], the range of an image, so that a pointmap can enter an image VAE. Nothing is clamped."""
    return (points - 0.5) / 1.5


def denormalize_points(points):
    """[-1, 1] -> metres in [-1, 2]; the inverse of normalize_points."""
    return points * 1.5 + 0.5


def point_maps(depth, intrinsics):
    """Depth (..., H, W) m and intrinsics (..., 3, 3) -> points_in_own_cam (..., H, W, 3) and valid (..., H, W).

    A pixel without depth (0, or beyond FAR) is put on the plane z = FAR along its own ray, before any change of frame, and
    is marked invalid. Left at 0 it would sit in the camera's centre: carried into another frame, every such pixel
    becomes the camera's position, a point that no surface has.
    """
    valid = (depth > 0) & (depth <= FAR)
    filled = depth * valid + FAR * ~valid
    return unproject(filled, intrinsics), valid


def scale_intrinsics(intrinsics, old_size, new_size):
    """Intrinsics (..., 3, 3) of an image resized from old_size (H, W) to new_size: u' = (u + 1/2) s - 1/2 on each axis."""
    scaled = np.array(intrinsics, dtype=np.float64)
    for axis, s in ((0, new_size[1] / old_size[1]), (1, new_size[0] / old_size[0])):
        scaled[..., axis, axis] *= s
        scaled[..., axis, 2] = (scaled[..., axis, 2] + 0.5) * s - 0.5
    return scaled


def resize(frames, size, kind):
    """Resize (N, H, W[, 3]) to size (H, W). kind 'rgb' is bilinear with antialiasing, 'depth' and 'label' take the nearest.

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
    (C,T,4,4) or (C,4,4), gripper_in_world (T,A,4,4), gripper_opening (T,A) m, time (T,) s, info: what goes into episode.json
    (task, source, rate_hz, ...).
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
        raise ValueError(f"{error.filename} is missing: {folder} is not a packed episode (make it with data.py)") from None
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
    """Label ids -> {RIGHT_GRIPPER: ids, LEFT_GRIPPER: ids, OBJECT: ids}, by the episode's own names where it has them."""
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
    """Episode numbers 0..count-1 -> (train, test), fixed by the seed. At least one episode is held out if there are two."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, round(count * test_share)) if count > 1 else 0
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


def moving_starts(episode, frames):
    """Frames at which a clip of 1 + `frames` can start: it must fit, and an arm must move within its first two seconds."""
    stride = max(1, round(episode.rate_hz / CLIP_HZ))
    last = episode.rgb.shape[1] - 1 - stride * frames
    window = max(1, round(STATIC_SECONDS * episode.rate_hz))
    position = episode.gripper_in_world[..., :3, 3]                             # (T, A, 3) in the world
    speed = np.linalg.norm(np.diff(position, axis=0), axis=-1) * episode.rate_hz
    return [t for t in range(last + 1) if speed[t:t + window].max(initial=0) > MIN_SPEED]


class Clips(torch.utils.data.Dataset):
    """Clips of V views: one observed and `frames` predicted frames at 2 Hz, from cameras and episodes of one split.

    Item i is a function of (seed, i) alone, so a run that stops and resumes sees the same clips. It is a dict of tensors:
        rgb        (V, F, 3, H, W)  in [-1, 1]
        points     (V, F, 3, H, W)  normalised, in the reference camera's frame (view 0, at the observed instant)
        valid      (V, F, H, W)     bool, where depth was measured
        gripper    (V, F, H, W, A)  bool, the mask of each gripper
        own_points (V, 3, H, W)     normalised, the observed pointmap in the view's own camera frame: all a robot would have
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
        self.split, self.size, self.views, self.frames = split, tuple(size), views, frames
        self.single, self.seed, self.length = single, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        draw = np.random.default_rng([self.seed, i])
        e = draw.integers(len(self.episodes))
        episode = self.episodes[e]
        start = int(draw.choice(self.starts[e]))
        count = len(episode.rgb)
        cameras = np.array(TRAIN_CAMERAS if self.split == "train" else TEST_CAMERAS)
        if count < 16:                                    # a rig with few cameras: every one serves both splits
            cameras = np.arange(count)
        cameras = draw.choice(cameras, self.views, replace=False)
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


# ------------------------------------------------------------------------------------------------ hub download
# (download_episodes)


# ------------------------------------------------------------------------------------------------ pictures and commands

def preview(data, path, seed=0):
    """A picture of one clip of a data folder: RGB, depth and labels of two views, and both clouds in the reference frame."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = episode_folders(data)[0]
    episode = load_episode(folder)
    size = episode.rgb.shape[2:4]
    clip = Clips(data, "train", size, seed=seed)[0]
    picture = plt.figure(figsize=(17, 7), layout="constrained")
    grid = picture.add_gridspec(2, 5, width_ratios=[1, 1, 1, 1.1, 1.1])
    for view in range(2):
        depth = denormalize_points(clip["own_points"][view, 2]).numpy()
        depth[~clip["valid"][view, 0].numpy()] = np.nan
        mask = clip["gripper"][view, 0].any(-1).numpy()
        image = (clip["rgb"][view, 0].permute(1, 2, 0).numpy() + 1) / 2
        last = (clip["rgb"][view, -1].permute(1, 2, 0).numpy() + 1) / 2
        panels = [("observed", image, {}), ("5 s later", last, {}), ("depth, m", depth, dict(cmap="viridis"))]
        for column, (title, shown, options) in enumerate(panels):
            axes = picture.add_subplot(grid[view, column])
            drawn = axes.imshow(shown, **options)
            axes.set_title(f"view {view}{' (reference)' if view == 0 else ''}: {title}", fontsize=9)
            axes.axis("off")
            if column == 0:
                axes.contour(mask, [0.5], colors="red", linewidths=1)
            if column == 2:
                picture.colorbar(drawn, ax=axes, shrink=0.7)
    for column, by_view in ((3, False), (4, True)):
        axes = picture.add_subplot(grid[:, column], projection="3d")
        for view in range(2):
            keep = clip["valid"][view, 0].numpy()
            points = denormalize_points(clip["points"][view, 0]).permute(1, 2, 0).numpy()[keep]
            colors = (clip["rgb"][view, 0].permute(1, 2, 0).numpy()[keep] + 1) / 2
            thin = np.random.default_rng(0).permutation(len(points))[:4000]
            x, y, z = points[thin].T
            axes.scatter(x, z, -y, c=["tab:blue", "tab:orange"][view] if by_view else colors[thin], s=2, linewidths=0)
        axes.set_aspect("equal")
        axes.view_init(elev=25, azim=-70)
        axes.set(xlabel="x", ylabel="z", zlabel="-y")
        axes.set_title("both clouds, reference frame" + (": blue 0, orange 1" if by_view else ": RGB"), fontsize=9)
    picture.suptitle(f"{data}: {clip['name']}")
    picture.savefig(path, dpi=90)
    plt.close(picture)


def parse_size(text):
    """'256x320' -> (256, 320), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, such as 256x320")
    return int(match[1]), int(match[2])


def prepare(task, out, source="synthetic", size=(64, 80), episodes=None, seed=0, workers=None):
    """Make the packed episodes of a task in `out` from one of the three sources. Returns how many there are."""
    if source == "synthetic":
        return make_synthetic(task, out, episodes or 25, size, seed, workers)
    if source == "hub":
        raise ValueError("--source hub is not there yet")
    if not Path(source).is_dir():
        raise ValueError(f"--source {source}: no such folder (or say synthetic, or hub)")
    return pack_folder(source, task, out, size, episodes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", type=int, default=1, choices=TASKS, help="; ".join(f"{k} {t.name}" for k, t in TASKS.items()))
    parser.add_argument("--source", default="synthetic", help="synthetic, hub, or a folder of recorded episodes")
    parser.add_argument("--out", help="folder of the packed episodes [data/task_N]")
    parser.add_argument("--size", type=parse_size, default=(64, 80), help="HEIGHTxWIDTH in pixels of what is packed")
    parser.add_argument("--episodes", type=int, help="at most this many episodes [synthetic: 25, others: all]")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic episodes")
    parser.add_argument("--workers", type=int, help="processes that render [one a core]")
    parser.add_argument("--preview", action="store_true", help="write OUT/preview.png; makes the data first if there is none")
    args = parser.parse_args()
    out = Path(args.out or f"data/task_{args.task}")
    if not (args.preview and any(out.glob("*/episode.json"))):
        count = prepare(args.task, out, args.source, args.size, args.episodes, args.seed, args.workers)
        print(f"{out}: {count} episodes of task {args.task} ({TASKS[args.task].name}), source: {args.source}")
    if args.preview:
        preview(out, out / "preview.png", args.seed)
        print(f"picture: {out / 'preview.png'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"data.py: {error}")
