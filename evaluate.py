"""Scores 4D predictions: the paper's metrics, its baselines, its ablation, and a closed loop in the synthetic world.

    python evaluate.py --task 1 --clips 8                 # sample, track and score held-out clips
    python evaluate.py --predictions DIR                  # score every prediction.npz below DIR, whoever made it
    python evaluate.py --task 1 --ablation --minutes 30   # train the four rows of the paper's table alike, score them
    python evaluate.py --task 1 --rollout 20 --execute 4  # observe, generate, track, act on 4 frames, observe again

Most of a tabletop stands still, where repeating the last frame is hard to beat: read that column beside every method,
and the lines of what moves, of the hand, and of what stays. The truth's columns say what tracker and code can reach.

Letters   V views (0 is the reference, n in the paper; the others are m), T predicted frames, F = T + 1 with the
          observed one, A arms, H W pixels, N anything, D features
Units     metres, degrees, dB and pixels in every function; the tables print millimetres

References: SSIM, Wang et al. 2004; AbsRel and delta, arXiv 1406.2283; FVD, arXiv 1812.01717; MMD with a polynomial
kernel, arXiv 1801.01401; Wilson's interval, Brown et al., Statistical Science 2001.
"""
import argparse
import copy
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

import data
import sample
import track
from data import invert, pose_errors, read_npz, transform, truth_row, write_json, write_npz

SAME_COLOUR = 10            # of 255, up to which a still pixel's colour counts as unchanged: no shadow came or went
NEAR = 0.03                 # m within which a point is on the hand
TRACKED = 0.02, 10          # m and degrees within which a hand counts as tracked
FEWEST_SEEN = 10            # gripper pixels that make a frame one that shows the hand
HORIZONS = {"0.5-1 s": slice(0, 2), "1.5-2.5 s": slice(2, 5), "3-5 s": slice(5, 10)}  # predicted frames at 2 Hz
I3D = "flateon/FVD-I3D-torchscript", "i3d_torchscript.pt"         # on the hub


# ------------------------------------------------------------------------------------------------ images and depths

def mean(values, axis=None):
    """Mean of what is known; NaN, without a warning, where nothing is."""
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def psnr(pred, true, valid=None):
    """10 log10(1 / MSE) in dB of images (..., H, W, 3) in [0, 1], mean over images; over valid (..., H, W)
    if given. Identical images have 100 dB, so that means stay finite."""
    error = ((np.asarray(pred, np.float64) - true) ** 2).reshape(-1, *pred.shape[-3:])  # (N, H, W, 3)
    valid = np.ones(error.shape[:3], bool) if valid is None else np.reshape(valid, error.shape[:3])
    return float(mean([-10 * np.log10(max(e[v].mean(), 1e-10)) for e, v in zip(error, valid) if v.any()]))


def ssim(pred, true):
    """Structural similarity (Wang et al. 2004, eq. 13) of images (..., H, W, 3) in [0, 1]; 1 is identical. Gaussian
    window, sigma 1.5, 11 x 11; mean over the pixels whose whole window is in the image."""
    x, y = (np.asarray(image, np.float64).reshape(-1, *pred.shape[-3:]) for image in (pred, true))
    c_1, c_2 = 0.01 ** 2, 0.03 ** 2
    blur = lambda image: gaussian_filter(image, (0, 1.5, 1.5, 0), truncate=3.5)[:, 5:-5, 5:-5]
    mu_x, mu_y = blur(x), blur(y)  # (N, H-10, W-10, 3)
    var_x, var_y, cov = blur(x * x) - mu_x ** 2, blur(y * y) - mu_y ** 2, blur(x * y) - mu_x * mu_y
    alike = (2 * mu_x * mu_y + c_1) * (2 * cov + c_2) / ((mu_x ** 2 + mu_y ** 2 + c_1) * (var_x + var_y + c_2))
    return float(alike.mean())


def depth_pairs(pred_z, true_z, valid):
    """The scored depths as two vectors: where the truth is a positive number and `valid` (if given) holds."""
    p, g = np.asarray(pred_z, np.float64), np.asarray(true_z, np.float64)
    chosen = np.isfinite(g) & (g > 0) & (True if valid is None else np.asarray(valid, bool))
    return p[chosen], g[chosen]


def abs_rel(pred_z, true_z, valid=None):
    """mean |pred - true| / true over valid pixels, any shape; 0 is ideal. A wrong sign counts like any error."""
    p, g = depth_pairs(pred_z, true_z, valid)
    return float(mean(np.abs(p - g) / g))


def delta1(pred_z, true_z, valid=None):
    """Share of valid pixels with max(pred / true, true / pred) < 1.25; 1 is ideal."""
    p, g = depth_pairs(pred_z, true_z, valid)
    return float(mean((p < 1.25 * g) & (g < 1.25 * p)))      # as products: of a p < 0 both quotients are below 1.25


def chamfer(a, b, most=4000):
    """Mean distance (m) of clouds (N, 3), (M, 3) to the other's nearest point, average of both ways; large clouds are
    thinned evenly. NaN if one is empty."""
    if not len(a) or not len(b):
        return float("nan")
    a, b = (cloud[np.linspace(0, len(cloud) - 1, min(len(cloud), most)).astype(int)] for cloud in (a, b))
    return float((cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2)


def still_error(pred, true, still, most=1000):
    """Median distance (m) of still pixels' points (H, W, 3) from the truth, once the view's rigid drift is taken back:
    a view that lies wrong as a whole is the camera's error, this is what trembles on top of it."""
    chosen = np.flatnonzero(still)[::max(1, still.sum() // most)]
    if len(chosen) < 3:
        return float("nan")
    true, pred = (x.reshape(-1, 3)[chosen] for x in (true, pred))  # (N, 3)
    drift = sample.recover_view_in_ref(true, np.ones(len(true), bool), pred[None])
    return float(np.median(np.linalg.norm(pred - transform(true, drift), axis=-1)))


# ------------------------------------------------------------------------------------------------ videos and views

def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to features a (N, D), b (M, D) (arXiv 1706.08500):
    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S = X^T X the sample covariances of centred features X.

    The root's trace is the sum of the singular values of X_a X_b^T, whose squares are S_a S_b's eigenvalues: singular
    covariances (few clips, 400 features) lose no digits.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance needs two samples in each set, got {len(a)} and {len(b)}")
    x_a, x_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    trace_of_root = np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x_a ** 2).sum() + (x_b ** 2).sum() - 2 * trace_of_root
    return float(max(0.0, distance))                         # rounding can leave -1e-13


def polynomial_mmd(a, b):
    """Unbiased squared MMD of paired features a, b (N, D), kernel (x.y / D + 1)^3 (arXiv 1801.01401). It does not fall
    as clips are added, as Frechet's does. Pairs (i, i) are left out: a clip and its truth are not independent."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # (N, N)
    h = kernel(a, a) + kernel(b, b) - kernel(a, b) - kernel(b, a)
    return float((h.sum() - np.trace(h)) / (len(a) * (len(a) - 1)))


def load_i3d(file=None):
    """The Kinetics-400 I3D that defines FVD, as TorchScript: a file, or the hub's if it was downloaded, or None."""
    if file is None:
        from huggingface_hub import try_to_load_from_cache
        file = try_to_load_from_cache(*I3D)
        if not isinstance(file, str):
            return None
    try:
        return torch.jit.load(file, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--i3d {file} is not a TorchScript file ({str(error).splitlines()[0]})") from None


@torch.no_grad()
def i3d_features(i3d, videos):
    """(N, 400) I3D logits of videos (N, T, H, W, 3) uint8, resized to 224 x 224, in [-1, 1]; T >= 10."""
    x = torch.as_tensor(np.asarray(videos)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # (N, T, 3, H, W)
    x = [F.interpolate(video, (224, 224), mode="bilinear", antialias=True).transpose(0, 1)[None] for video in x]
    return torch.cat([i3d(video, rescale=False, resize=False, return_features=True) for video in x]).double().numpy()


def cross_view_miou(points, gripper_n, gripper_m, intrinsics_n, intrinsics_m, ref_in_m):
    """IoU of the gripper's mask in view n, carried into camera m by n's predicted points, with m's own mask: (T,),
    NaN where neither is there. points (T,H,W,3): view n's, reference frame; gripper_n, gripper_m (T,H,W) bool;
    ref_in_m (4,4): the true camera m, for scoring only.

    It tells whether two views agree about the hand, be it right or wrong. The truth scores far below 1: what only m
    sees of the hand is not covered, and a small mask is half boundary.
    """
    thirds = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(9, 1, 2) / 3  # of a pixel: to leave no holes
    ious = []
    for t, own in enumerate(gripper_m):
        hand = np.repeat(points[t][gripper_n[t]][None], 9, 0)                        # (9, N, 3)
        hand[..., :2] += thirds / (intrinsics_n[0, 0], intrinsics_n[1, 1]) * hand[..., 2:]
        hand_in_m = transform(hand, ref_in_m)
        pixels, _ = data.project(hand_in_m[hand_in_m[..., 2] > 1e-3], intrinsics_m)  # (N, 2)
        column, row = np.rint(pixels).astype(int).T
        inside = (column >= 0) & (column < own.shape[1]) & (row >= 0) & (row < own.shape[0])
        shown = np.zeros(own.shape, bool)
        shown[row[inside], column[inside]] = True
        union = (shown | own).sum()
        ious.append((shown & own).sum() / union if union else np.nan)
    return np.array(ious)


# ------------------------------------------------------------------------------------------------ scoring one clip

def score(clip, trajectory=None):
    """All that can be said of one prediction: {figure: (T,) values over the horizon, or one number}.

    clip: checked, with its truth; with `gripper` (V,T,H,W), the hand's mask in the generated views, mIoU too.
    trajectory: track.track's. A figure whose keys are missing is left out, not guessed. `-n` is view 0, `-m` the mean
    of the others; a frame without such pixels has NaN.
    """
    views, frames = clip["rgb"].shape[:2]
    values = {}

    def add(name, figure, *arrays):
        table = np.array([[figure(*(x[v, t] for x in arrays)) for t in range(frames)] for v in range(views)])
        values[name + "-n"] = table[0]
        if views > 1:
            values[name + "-m"] = mean(table[1:], 0)

    rgb, true_rgb = clip["rgb"] / 255, clip["true_rgb"] / 255
    add("psnr", psnr, rgb, true_rgb)
    add("ssim", ssim, rgb, true_rgb)
    if trajectory is not None and "true_gripper_in_ref" in clip:
        values.update(score_hands(trajectory, clip))
    if not {"true_points", "true_view_in_ref"} <= clip.keys():
        return values
    true, valid = clip["true_points"], clip["true_valid"]
    own, own_valid = data.point_maps(clip["observed_depth"], clip["intrinsics"])
    moved = np.linalg.norm(true - transform(own, clip["true_view_in_ref"])[:, None], axis=-1) > data.MOVED
    still, moving = (valid & own_valid[:, None] & chosen for chosen in (~moved, moved))  # (V, T, H, W)
    change = np.abs(clip["true_rgb"].astype(int) - clip["observed_rgb"][:, None]).max(-1)
    add("psnr_same", psnr, rgb, true_rgb, still & (change <= SAME_COLOUR))
    if "points" not in clip:
        return values
    points = clip["points"]
    off = np.linalg.norm(points - true, axis=-1)  # (V, T, H, W)
    for suffix, where in ("", valid), ("_moving", moving):
        add("points" + suffix, lambda x, chosen: mean(x[chosen]), off, where)
    add("abs_rel", abs_rel, points[..., 2], true[..., 2], valid)
    add("delta1", delta1, points[..., 2], true[..., 2], valid)
    add("still", still_error, points, true, still)
    if "true_gripper" in clip:
        add("hand", lambda x, chosen: mean(x[chosen] < NEAR), off, valid & clip["true_gripper"].any(2))
        for view in "nm"[:views]:
            values |= {f"hand-{view} {horizon}": values[f"hand-{view}"][part] for horizon, part in HORIZONS.items()}
    values["chamfer"] = np.array([chamfer(points[:, t][clip["valid"][:, t]], true[:, t][valid[:, t]])
                                  for t in range(frames)])
    if "view_in_ref" in clip:
        apart = pose_errors(clip["view_in_ref"][1:], clip["true_view_in_ref"][1:])
        values["camera_m"], values["camera_deg"] = map(mean, apart)
    if "gripper" in clip and views > 1:
        values["miou"] = mean([score_masks(clip, v) for v in range(1, views)], 0)
    return values


def score_masks(clip, v):
    """The mIoU (T,) of view v; 0 where the hand is truly in sight and was found in neither view."""
    n, m = clip["gripper"][0], clip["gripper"][v]
    iou = cross_view_miou(clip["points"][0], n, m, *clip["intrinsics"][[0, v]], invert(clip["true_view_in_ref"][v]))
    in_sight = clip["true_gripper"][v].any((1, 2, 3)) if "true_gripper" in clip else m.any((1, 2))
    return np.where(np.isnan(iou) & in_sight, 0, iou)


def score_hands(trajectory, clip):
    """Errors of the tracked hands that move in the truth (a parked arm would halve every error), in the frames in which
    a view shows them: {figure: (T,) values}. A lost frame counts with the pose that the tracker held."""
    true = clip["true_gripper_in_ref"]  # (F, A, 4, 4)
    arms = np.flatnonzero((pose_errors(true, true[:1])[0] > data.MOVED).any(0))
    lost = trajectory["lost"][1:, arms]  # (T, A')
    metres, degrees = pose_errors(trajectory["gripper_in_ref"][1:, arms], true[1:, arms])
    figures = dict(tracked=~lost & (metres < TRACKED[0]) & (degrees < TRACKED[1]), lost=lost, gripper_m=metres,
                   gripper_deg=degrees, opening=np.abs(trajectory["opening"] - clip["true_opening"])[1:, arms])
    seen = lost | True
    if "true_gripper" in clip:
        seen = clip["true_gripper"][:, :, arms].sum((3, 4)).max(0) >= FEWEST_SEEN
    return {name: mean(np.where(seen, x, np.nan), 1) for name, x in figures.items()}


# ------------------------------------------------------------------------------------------------ rows

def tracked(clip):
    """(the clip with `gripper` (V,T,H,W), the hand's mask in each generated view; its trajectory, or None). Masks that
    the clip brings along, from SAM 2 for instance, are kept."""
    if "points" not in clip or not {"observed_gripper_in_ref", "observed_gripper"} & clip.keys():
        return clip, None
    trajectory = track.track(clip)
    return {"gripper": hand_masks(clip, trajectory)} | clip, trajectory


def hand_masks(clip, trajectory):
    """Where each view shows the hand, (V,T,H,W) bool: the hand drawn where it was tracked, where the view's own points
    lie there to 3 cm. So views that disagree about where the hand is are caught."""
    masks, hand, ref_in_view = np.zeros(clip["valid"].shape, bool), track.hand_model(), invert(clip["view_in_ref"])
    z_seen = transform(clip["points"], ref_in_view)[..., 2]                             # (V, T, H, W)
    for t, a in zip(*np.nonzero(~trajectory["lost"][1:])):
        vertices = hand.vertices + np.outer(trajectory["opening"][t + 1, a] * hand.vertex_slide, (0, 1, 0))
        in_view = [transform(vertices, one @ trajectory["gripper_in_ref"][t + 1, a]) for one in ref_in_view]
        z, _ = data.rasterize(in_view, hand.faces, clip["intrinsics"], *masks.shape[2:])     # (V, H, W)
        masks[:, t] |= (z > 0) & (np.abs(z - z_seen[:, t]) < NEAR)
    return masks


def last_frame_row(clip, told_poses=True):
    """The observed frame repeated and the hand held still, with the true camera poses, which a model is not told, or
    with each view's own points taken as they are."""
    frames = clip["rgb"].shape[1]
    view_in_ref = clip["true_view_in_ref"] if told_poses else np.tile(np.eye(4), (len(clip["rgb"]), 1, 1))
    own, valid = data.point_maps(clip["observed_depth"], clip["intrinsics"])
    seen = dict(rgb=clip["observed_rgb"], points=transform(own, view_in_ref), valid=valid)
    row = clip | {key: np.stack([x] * frames, 1) for key, x in seen.items()} | dict(view_in_ref=view_in_ref)
    if not told_poses or not {"observed_gripper_in_ref", "observed_opening"} <= clip.keys():
        return row, None
    hand = dict(gripper_in_ref=clip["observed_gripper_in_ref"], opening=clip["observed_opening"],
                lost=np.zeros(len(clip["observed_opening"]), bool))
    still = {key: np.stack([x] * (frames + 1)) for key, x in hand.items()}
    return row | dict(gripper=hand_masks(row, still)), still


def code_row(clip, run):
    """The truth through the code and back, with the true cameras: no generator of these latents can do better."""
    tensors = data.to_tensors(clip)
    true = (tensors[key][None, :, 1:].to(run.device) for key in ("rgb", "points"))      # (1, V, T, 3, H, W)
    with torch.no_grad():
        rgb, points = (x[0].movedim(2, -1).cpu().numpy() for x in sample.decode(run, sample.encode_targets(run, *true)))
    return tracked(truth_row(clip) | dict(rgb=((rgb + 1) * 127.5).round().astype(np.uint8), points=points))


def baselines(run=None):
    """{label: make} of the rows that need no generator; make(clip) -> (clip, trajectory)."""
    rows = {"last frame repeated": last_frame_row, "own points unmoved": lambda clip: last_frame_row(clip, False),
            "truth, tracked": lambda clip: tracked(truth_row(clip))}
    if run is not None and not run.model.rgb_only:
        rows["truth through the code"] = lambda clip: code_row(clip, run)
    return rows


# ------------------------------------------------------------------------------------------------ tables

# figure, in the table's order: heading, factor to the table's unit, digits
METRICS = {
    "miou": ("mIoU ↑", 1, 2), "fvd": ("FVD ↓", 1, 0), "mmd": ("MMD ↓", 1, 1), "abs_rel": ("AbsRel ↓", 1, 3),
    "delta1": ("delta1 ↑", 1, 3), "points_moving": ("moving points, mm ↓", 1000, 0),
    "hand": ("hand within 30 mm ↑", 1, 2), "tracked": ("tracked ↑", 1, 2), "lost": ("lost ↓", 1, 2),
    "gripper_m": ("gripper, mm ↓", 1000, 0), "gripper_deg": ("gripper, deg ↓", 1, 1),
    "opening": ("opening, mm ↓", 1000, 1), "points": ("points, mm ↓", 1000, 0), "chamfer": ("chamfer, mm ↓", 1000, 1),
    "still": ("still pixels off, mm ↓", 1000, 1), "camera_m": ("camera, mm ↓", 1000, 0),
    "camera_deg": ("camera, deg ↓", 1, 1), "psnr": ("PSNR, dB ↑", 1, 1), "psnr_same": ("PSNR, unchanged, dB ↑", 1, 1),
    "ssim": ("SSIM ↑", 1, 3)}
# Table 1 of the paper: tasks 1 / 2 / 3, or ranges over them
PUBLISHED = {
    "paper: ours": {"miou": ".70 / .69 / .64", "fvd-n": "378-491", "fvd-m": "258-561", "abs_rel-n": ".03-.06",
                    "abs_rel-m": ".11 (task 1)", "delta1-n": ".95-.98"},
    "paper: w/o MV attention": {"miou": ".41 / .44 / .26", "fvd-n": "451-597", "fvd-m": "302-607",
                                "abs_rel-n": ".10-.15", "abs_rel-m": ".31 (task 1)", "delta1-n": ".75-.89"}}


def score_row(clips, i3d, true_features):
    """One seed of one method: (name, clip, trajectory)s -> {name: figures}, {figure of the whole set: number}.
    true_features: {name: I3D features (V, D) of the true videos}, filled here, for the next row."""
    scores, pairs, of_set = {}, [], {}
    for name, clip, trajectory in clips:
        scores[name] = score(clip, trajectory)
        if i3d is not None and clip["rgb"].shape[1] >= 10:
            if name not in true_features:
                true_features[name] = i3d_features(i3d, clip["true_rgb"])
            pairs.append((i3d_features(i3d, clip["rgb"]), true_features[name]))
    for view, chosen in ("n", slice(0, 1)), ("m", slice(1, None)):
        pred, true = (np.concatenate([part[chosen] for part in side]) for side in zip(*pairs)) if pairs else ((), ())
        if len(pred) > 1:
            of_set |= {f"fvd-{view}": frechet_distance(pred, true), f"mmd-{view}": polynomial_mmd(pred, true)}
    return scores, of_set


def summarise(seeds):
    """A table's row out of score_row's results, one per seed: {figure: mean, spread, per_seed}. A clip's value is the
    mean over its frames, a seed's over its clips; spread: sample standard deviation over seeds, None of one."""
    row, everything = {}, [values for scores, of_set in seeds for values in [*scores.values(), of_set]]
    for name in dict.fromkeys(name for values in everything for name in values):
        per_seed = [float(of_set.get(name, mean([mean(values[name]) for values in scores.values() if name in values])))
                    for scores, of_set in seeds]
        row[name] = dict(mean=float(mean(per_seed)), per_seed=per_seed,
                         spread=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None)
    return row


def cell(row, name):
    """'0.061 ± 0.004' in the table's unit; nothing for what is not known."""
    known, (_, factor, digits) = row.get(name), METRICS[name.split("-")[0]]
    if known is None or np.isnan(known["mean"]):
        return ""
    return " ± ".join(f"{x * factor:.{digits}f}" for x in (known["mean"], known["spread"]) if x is not None)


def markdown(rows, notes=()):
    """{label: row} as a markdown table with a line for each figure that a row has, the published values beside it."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    labels = [*rows, *PUBLISHED]
    padded = lambda cells: " | ".join(f"{x:>{max(13, len(label))}}" for x, label in zip(cells, labels))
    lines = [f"| {'':33} | {padded(labels)} |", "|---" * (len(labels) + 1) + "|"]
    for figure, (heading, _, _) in METRICS.items():
        for name in (name for name in names if name.split("-")[0] == figure):
            where = name.partition("-")[2]           # of which view, and when
            title = heading + f" ({where})" * bool(where)
            cells = [cell(row, name) for row in rows.values()] + [said.get(name, "") for said in PUBLISHED.values()]
            lines.append(f"| {title:33} | {padded(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def load_clip(folder):
    """folder/prediction.npz with its truth, checked."""
    path = Path(folder) / "prediction.npz"
    clip = read_npz(path)
    try:
        clip = data.check_clip(clip, ("observed", "rgb", "true_rgb"))
        if "gripper" in clip and clip["gripper"].shape != clip["rgb"].shape[:4]:
            raise ValueError(f"'gripper' has shape {clip['gripper'].shape}, expected {clip['rgb'].shape[:4]}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return clip


def compare(methods, out, i3d=None, run=None):
    """Scores methods {label: [{name: folder} of one seed, ...]} and baselines on the first's clips; writes results."""
    def clips_of(label, folders, make):
        for name, folder in tqdm(folders.items(), desc=f"scoring {label}", unit="clip"):
            clip = load_clip(folder)
            if make is tracked:
                yield name, *make(clip)
            elif {"true_points", "true_view_in_ref"} <= clip.keys():
                yield name, *make({key: clip[key] for key in clip if key != "gripper"})

    out, network, true_features, scored = Path(out), load_i3d(i3d), {}, {}
    label, (first, *_) = next(iter(methods.items()))
    jobs = [(method, folders, tracked) for method, seeds in methods.items() for folders in seeds]
    for job in jobs + [(name, first, make) for name, make in baselines(run).items()]:
        row = score_row(clips_of(*job), network, true_features)
        if row[0]:
            scored.setdefault(job[0], []).append(row)
    table = {method: summarise(seeds) for method, seeds in scored.items()}
    text = markdown(table, [
        f"{len(first)} clips, seeds: {max(map(len, scored.values()))} (±: standard deviation over them); n: the "
        f"reference view, m: others; moving: by over {1000 * data.MOVED:.0f} mm; unchanged: surface and colour.",
        f"Tracked: of the frames that show the hand, within {100 * TRACKED[0]:.0f} cm and {TRACKED[1]} degrees. Still "
        "pixels: median, after each view's rigid drift. The repeated frame is told the true cameras.",
        f"FVD of {len(first)} clips is far above its value for many: compare rows only." if network else
        f"FVD, MMD: `hf download {' '.join(I3D)}` gets the I3D weights (25 MB); or --i3d FILE."])
    per_clip = {method: [scores for scores, _ in seeds] for method, seeds in scored.items()}
    write_results(out, text, dict(rows=table, per_clip=per_clip))
    off = {name: mean(values.get("points-m", -values["psnr-n"])) for name, values in per_clip[label][0].items()}
    worst = max(off, key=off.get)
    sample.contact_sheet(out / "worst.png", load_clip(first[worst]), f"the worst of {len(off)}: {worst}")
    print(f"the worst clip: {out}/worst.png")
    return table


def write_results(out, text, values, name="results"):
    """NAME.md and NAME.json, whose NaNs become null; and prints the first."""
    values = json.dumps(values, default=lambda x: x.tolist())
    write_json(out / f"{name}.json", json.loads(values, parse_constant=lambda _: None))
    with data.writing(out / f"{name}.md") as partial:
        partial.write_text(text)
    print(f"{text}\nwritten: {out}/{name}.json, {name}.md")


def weights_hash(run):
    """Of every number that a loaded run computes with, wherever it was read from."""
    digest = hashlib.sha256()
    for part in filter(None, (run.model, *run.vaes.values(), run.clip)):
        for name, x in part.state_dict().items():
            digest.update(name.encode() + x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sample_clips(run, folder, count, out, seed=0, views=2, frames=10, steps=None):
    """Samples held-out clips 0..count-1 of packed episodes, numbered as by sample.py --clip: {name: folder below out}.
    Those that are there stay if out/made_with.json names the same weights, data and settings; if not, they go."""
    clips = data.Clips(folder, "test", (run.model.preset.height, run.model.preset.width), views, frames)
    settings = dict(seed=seed, frames=frames, views=views, steps=steps, model=run.info, weights=weights_hash(run),
                    data={episode.folder.name: episode.info for episode in clips.episodes})
    if not clips.held_out:
        print(f"{folder} has episodes of one split only: the clips are not held out")
    made_with, there = out / "made_with.json", list(out.glob("*/prediction.npz"))
    if there and not made_with.exists():
        raise ValueError(f"{out} holds predictions that evaluate.py did not make: move them away")
    if there and data.read_json(made_with) != json.loads(json.dumps(settings)):
        for stale in there:
            stale.unlink()
    write_json(made_with, settings)
    made = {f"clip_{i:03d}": out / f"clip_{i:03d}" for i in range(count)}
    for i, path in enumerate(tqdm(made.values(), desc=f"sampling {out}", unit="clip")):
        if not (path / "prediction.npz").exists():
            prediction = sample.predict(run, clips.clip(i), frames=frames, steps=steps, seed=1000 * seed + i)
            write_npz(path / "prediction.npz", prediction)
    return made


# the four rows of the paper's table, as flags of train.py
ABLATION = {"ours": [], "w/o MV attention": ["--mv_attention", "none"], "SVD": ["--rgb_only", "--mv_attention", "none"],
            "SVD w/ MV attention": ["--rgb_only", "--mv_attention", "rgb"]}


def train_ablation(task, folder, run, seeds, flags=()):
    """Trains each row with each seed at the same budget, on the same codes: {label: run folders}. Each is a plain
    `python train.py`, which goes on where it was, and returns at once if it was done."""
    runs = {label: [] for label in ABLATION}
    for seed in seeds:
        for label, switches in ABLATION.items():
            out = run / "ablation" / f"{re.sub(r'[^a-z]+', '_', label.lower())}_seed_{seed}"
            words = "--task", task, "--data", folder, "--out", out, "--vae", run, "--seed", seed, *switches, *flags
            print("ablation: train.py", *words, flush=True)
            script = Path(__file__).with_name("train.py")
            if subprocess.run([sys.executable, *map(str, (script, *words))]).returncode:
                raise ValueError(f"--ablation: train.py stopped in {out} (see above)")
            runs[label].append(out)
    return runs


# ------------------------------------------------------------------------------------------------ closed loop

ROLLOUT_SEED = 1_000_000    # worlds of rollouts count from here; training episodes are numbered from 0
ASTRAY = 0.05               # m from the script's path at which a hand counts as having left it
STRIDE = data.HZ // data.CLIP_HZ  # steps of the world per frame of a clip
LIMIT = 30                  # frames that a try may last: fifteen seconds
CANDIDATES = 16             # cameras of which a try takes those that see most of the hand
FAILURES = ("generation", "tracking", "execution")
PUBLISHED_SUCCESS = {1: ".73", 2: ".67", 3: ".53"}


def place_cameras(world, draw, size, views=2):
    """Cameras that no episode was filmed with: intrinsics (V,3,3), cam_in_world (V,4,4). As a person would, each is
    chosen among random ones to show most of the hand in that frame of the script in which those before it show least.
    """
    world, script, seen, chosen = copy.deepcopy(world), world.demonstration, [], []
    tips = script[0][..., :3, 3] + data.TCP * script[0][..., :3, 2]
    intrinsics, cam_in_world = data.sample_cameras(draw, tips, size, CANDIDATES)
    small = data.scale_intrinsics(intrinsics, size, (32, 40)), cam_in_world, (32, 40)
    for t, step in enumerate(zip(*script)):
        world.step(*step)
        if t % STRIDE == 0:
            label = world.film(*small)[2]
            seen.append([(label == arm).sum((1, 2)) for arm in range(1, 1 + len(world.opening))])
    seen = np.array(seen)                                                               # (frames, arms, cameras)
    for _ in range(views):
        shown = {c: seen[..., [*chosen, c]].max(-1) for c in range(CANDIDATES) if c not in chosen}
        chosen.append(max(shown, key=lambda c: (shown[c].min(), shown[c].sum())))
    return intrinsics[chosen], cam_in_world[chosen]


def scripted_future(world, step, cameras, size, frames=10):
    """The clip of a perfect generator: the script played on from `step`, in a copy of the world as it is."""
    clip, world = world.observe(*cameras, size), copy.deepcopy(world)
    script, video, path = list(zip(*world.demonstration)), [], [(world.gripper_in_world, world.opening)]
    for t in range(step + 1, step + 1 + frames * STRIDE):
        world.step(*script[min(t, len(script) - 1)])
        if (t - step) % STRIDE == 0:
            video.append(world.film(*cameras, size)[:2])
            path.append((world.gripper_in_world, world.opening))
    rgb, depth = (np.stack(pictures, 1) for pictures in zip(*video))  # (V, T, H, W[, 3])
    gripper_in_world, opening = map(np.stack, zip(*path))
    points, valid = data.point_maps(depth, cameras[0][:, None])
    world_in_ref = invert(cameras[1][0])
    view_in_ref = world_in_ref @ cameras[1]
    return clip | dict(rgb=rgb, points=transform(points, view_in_ref), valid=valid, view_in_ref=view_in_ref,
                       true_gripper_in_ref=world_in_ref @ gripper_in_world, true_opening=opening)


def execute(world, path, frames, watch=lambda: None):
    """Moves the hands along the first `frames` steps of a tracked path, in straight lines, at the world's rate.

    Only the motion since the observed frame is used, in each hand's own frame: no camera pose. Fingers that open by
    more than 3 mm do so before the hand moves on: half a second can hold a release and a departure.
    """
    first, openings = world.gripper_in_world, path["opening"]  # (A, 4, 4), (F, A)
    targets = first @ invert(path["gripper_in_ref"][0]) @ path["gripper_in_ref"]  # (F, A, 4, 4)
    even = np.arange(1, STRIDE + 1)[:, None] / STRIDE
    for target, opening in zip(targets[1:frames + 1], openings[1:]):
        start, width = world.gripper_in_world, np.array(world.opening)
        release = opening - width > 0.003
        hand, fingers = np.where(release, 2 * even - 1, even).clip(0), np.where(release, 2 * even, even).clip(max=1)
        for share, wide in zip(hand, width + fingers * (opening - width)):  # (A,), (A,)
            world.step(np.stack([data.between(*arm) for arm in zip(start, target, share)]), wide)
        watch()


def rollout(task, seed, size, imagine, generated, views=2, acted=10, film=None):
    """One try: observe, imagine, track, act on the first `acted` frames, again. 'success', or what failed first:

    tracking    the track left the script's path by more than 5 cm while lost, or in a true video;
    generation  it did so in a generated video, and nothing was lost;
    execution   the hand followed the script, and still the object is not where it belongs.
    imagine(world, step, cameras, size) -> a clip with a prediction, or None to hold still. film: gets pictures.
    """
    world, failure = data.World(task), None
    world.reset(seed)
    script = world.demonstration[0]
    cameras = place_cameras(world, np.random.default_rng([task, seed, 2]), size, views)
    large = tuple(max(1, round(240 / size[0])) * pixels for pixels in size)
    view = data.scale_intrinsics(cameras[0][:1], size, large), cameras[1][:1], large
    watch = lambda: None if film is None else film.append(world.film(*view)[0][0])
    for frame in range(0, LIMIT, acted):
        clip = imagine(world, frame * STRIDE, cameras, size)
        if clip is None:
            return "success" if world.success() else "held still"
        path = track.track(clip)
        execute(world, path, acted, watch)
        if world.success():
            return "success"
        now = np.minimum(STRIDE * (frame + 1 + np.arange(acted)), len(script) - 1)
        in_ref, lost = path["gripper_in_ref"][1:acted + 1], path["lost"][1:acted + 1]
        astray = pose_errors(cameras[1][0] @ in_ref, script[now])[0] > ASTRAY  # (acted, A)
        if failure is None and astray.any():
            failure = "generation" if generated and not (astray & lost).any() else "tracking"
    return failure or "execution"


def rollouts(task, count, out, run=None, size=(128, 160), views=2, acted=10, frames=10, steps=None):
    """Success of a run, of the oracle and of holding still on the same worlds; writes rollouts.json and .md."""
    def ours(world, step, cameras, size):
        return sample.predict(run, world.observe(*cameras, size), frames=frames, steps=steps, seed=step)

    imagine = {"ours": ours, "oracle: the true future": lambda *now: scripted_future(*now, frames),
               "hold still": lambda *_: None}
    outcomes = {label: [] for label in imagine if label != "ours" or run is not None}
    out, started = Path(out), time.time()
    for i in tqdm(range(count), desc="rollouts", unit="try"):
        for label in outcomes:
            film, seed = [] if i == 0 else None, ROLLOUT_SEED + i
            outcomes[label].append(rollout(task, seed, size, imagine[label], label == "ours", views, acted, film))
            if film:
                seconds = np.arange(1, 1 + len(film)) / data.CLIP_HZ
                data.write_gif(out / f"{label.split(':')[0]}.gif", film, data.CLIP_HZ, seconds)
        if i == 0:
            tqdm.write(f"{count} tries: about {(count - 1) * (time.time() - started) / 60:.0f} min more")
    lines = [f"| | success | Wilson 95 % | failed: {' | failed: '.join(FAILURES)} |", "|---" * 6 + "|"]
    for label, found in outcomes.items():
        won, failed = found.count("success"), " | ".join(str(found.count(reason)) for reason in FAILURES)
        low, high = wilson_interval(won, count)
        lines.append(f"| {label} | {won}/{count} = {won / count:.2f} | {low:.2f}-{high:.2f} | {failed} |")
    settings = dict(task=task, size=data.size_text(size), views=views, acted=acted, frames=frames,
                    steps=steps or "the preset's", limit=LIMIT)
    lines += [f"| *paper: ours, 30 rollouts* | {PUBLISHED_SUCCESS[task]} | | | | |", "",
              "- " + ", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    results = settings | dict(weights=run and weights_hash(run), outcomes=outcomes)
    write_results(out, "\n".join(lines), results, "rollouts")
    print(f"the first try of each row: {out}/*.gif")
    return outcomes


def wilson_interval(successes, trials, z=1.96):
    """Wilson's 95 % interval of a success rate (Brown et al. 2001, eq. 4); honest at 0 and 1, unlike +- 1.96 sigma."""
    p, n = successes / trials, trials
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


# ------------------------------------------------------------------------------------------------ commands

MODES = {"clips": "held-out clips (no mode flag)", "predictions": "--predictions", "ablation": "--ablation",
         "rollout": "--rollout"}
FLAGS = {  # type, the modes that do something with it (the others refuse it), help
    "data": (str, "clips ablation", "packed episodes [data/task_N]"),
    "run": (str, "clips ablation rollout", "folder that train.py wrote [runs/task_N]"),
    "out": (str, "clips predictions ablation rollout", "folder of results [RUN/evaluation, /ablation, /rollouts; DIR]"),
    "clips": (int, "clips ablation", "held-out clips to sample and score [24]"),
    "views": (int, "clips ablation rollout", "views of a clip, the first is the reference [2]"),
    "frames": (int, "clips ablation rollout", "frames to predict, two a second [10]"),
    "steps": (int, "clips ablation rollout", "steps of the sampler [1 of the small presets, 8 of svd]"),
    "seeds": (int, "clips ablation", "of the sampler's noise, and of the training with --ablation [0 1]"),
    "i3d": (str, "clips predictions ablation", "TorchScript I3D for FVD and MMD [the hub's, if it was downloaded]"),
    "minutes": (float, "ablation", "minutes to train each row and seed [train.py's steps]"),
    "train_steps": (int, "ablation", "the same in steps [train.py's]"),
    "preset": (str, "ablation", "of the models [train.py's]"),
    "execute": (int, "rollout", "frames to act on before looking again [--frames]"),
    "size": (data.parse_size, "rollout", "HxW pixels of what is filmed [the model's; 128x160 without one]"),
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="example: python evaluate.py --task 1 "
                                     "--run tests/data/trained --clips 4 --seeds 0 --out runs/trained")
    tasks = "; ".join(f"{number} {task.name}" for number, task in data.TASKS.items())
    parser.add_argument("--task", type=int, choices=data.TASKS, help=tasks)
    command = parser.add_mutually_exclusive_group()
    command.add_argument("--predictions", metavar="DIR", help="score every prediction.npz below DIR; an array gripper "
                         "(V,T,H,W) in it, from SAM 2, say, takes the place of the tracker's masks")
    command.add_argument("--ablation", action="store_const", const=True, help="train and score the paper's four rows")
    command.add_argument("--rollout", type=int, metavar="N", help="N closed-loop tries, with RUN's model if any")
    for name, (kind, modes, text) in FLAGS.items():
        text = text if " " in modes else f"{MODES[modes]}: {text}"
        parser.add_argument(f"--{name}", type=kind, help=text, nargs="+" if name == "seeds" else None)
    args = parser.parse_args()
    args.mode = next((mode for mode in MODES if getattr(args, mode) is not None and mode != "clips"), "clips")
    for name, value in vars(args).items():
        if name in FLAGS and value is not None and args.mode not in FLAGS[name][1].split():
            raise ValueError(f"--{name} does nothing for {MODES[args.mode]}: leave it out; it is for "
                             + " and ".join(MODES[mode] for mode in FLAGS[name][1].split()))
        if type(value) in (int, float) and value < (least := {"views": 2, "minutes": 0.01}.get(name, 1)):
            raise ValueError(f"--{name} {value}: at least {least} is needed")
    args.views, args.frames, args.seeds = args.views or 2, args.frames or 10, args.seeds or [0, 1]
    args.execute = args.execute or args.frames
    if args.execute > args.frames:
        raise ValueError(f"--execute {args.execute}: only {args.frames} frames are predicted (--frames)")
    if not args.predictions and not args.task:
        raise ValueError("say --task N, or --predictions DIR")
    return args


def load(folder):
    return sample.load_run(folder, *sample.fastest(sample.read_info(folder)["preset"]["clip"]))


def score_task(args, run, folder, out):
    """Samples, tracks and scores the held-out clips with RUN, or with the four rows of the ablation."""
    runs, methods, count = {"ours": [run] * len(args.seeds)}, {}, args.clips or 24
    if args.ablation:
        flags = {"--minutes": args.minutes, "--steps": args.train_steps, "--preset": args.preset}
        flags = [word for flag in flags.items() if flag[1] for word in flag]
        print(f"{len(ABLATION) * len(args.seeds)} trainings" + (f" of {args.minutes:g} minutes" if args.minutes else
                                                               " of train.py's length (--minutes M to say another)"))
        runs = train_ablation(args.task, folder, run, args.seeds, flags)
    for label, trained, seed in ((label, *pair) for label in runs for pair in zip(runs[label], args.seeds)):
        loaded, target = load(trained), (trained / "evaluation" if args.ablation else out) / f"seed_{seed}"
        make = lambda n: sample_clips(loaded, folder, n, target, seed, args.views, args.frames, args.steps)
        if not methods:                              # the first clip tells how long all will take
            times, rows = [time.time()], len(runs) * len(args.seeds)
            first, = make(1).values()
            times.append(time.time())
            score_row([("", *tracked(load_clip(first)))], load_i3d(args.i3d), {})
            sampling, scoring = np.diff([*times, time.time()]) * count / 60
            print(f"{count} clips, {rows} times: about {rows * sampling + (rows + 3) * scoring:.0f} min")
        methods.setdefault(label, []).append(make(count))
    compare(methods, out, args.i3d, load(runs["ours"][0]))


def main():
    args = parse()
    if args.predictions:
        top = Path(args.predictions)
        found = {str(path.parent.relative_to(top)): path.parent for path in sorted(top.rglob("prediction.npz"))}
        if not found:
            raise ValueError(f"--predictions {top}: no prediction.npz anywhere below it")
        print(f"{len(found)} predictions below {top}")
        return compare({top.name or "predictions": [found]}, args.out or top, args.i3d)
    run = Path(args.run or f"runs/task_{args.task}")
    out = Path(args.out or run / dict(clips="evaluation", ablation="ablation", rollout="rollouts")[args.mode])
    if args.mode != "rollout":
        return score_task(args, run, Path(args.data or f"data/task_{args.task}"), out)
    loaded, size = None, args.size or (128, 160)
    if args.run or (run / "model.json").exists():
        loaded = load(run)
        size = args.size or (loaded.model.preset.height, loaded.model.preset.width)
        if loaded.model.rgb_only:
            raise ValueError(f"{run} generates RGB only, no points to track: --rollout needs a run without --rgb_only")
    else:
        print(f"no model in {run}: oracle and hold-still rows only (make one, `python train.py --task {args.task}`, "
              "or give --run)")
    rollouts(args.task, args.rollout, out, loaded, size, args.views, args.execute, args.frames, args.steps)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"evaluate.py: {str(error) or 'interrupted'}")
