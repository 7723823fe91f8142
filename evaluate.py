"""Scores 4D predictions: the paper's metrics, its baselines, its ablation, and rollouts in the synthetic world.

    python evaluate.py --task 1                        # sample every test clip, track, score: runs/task_1/evaluation/
    python evaluate.py --predictions DIR               # score anybody's DIR/NAME/prediction.npz files
    python evaluate.py --task 1 --ablation             # train and score the four rows of the published table
    python evaluate.py --task 1 --rollout 30           # closed loop in the synthetic world, success rates

The first two write results.json, results.md, horizon.png and worst.png. Beside every method stand rows that it must be
read against: the last frame repeated, the ground truth, and the ground truth through the VAEs.

Letters   V views (0 is the reference, n in the paper; the others are m), T predicted frames, A arms, N anything,
          H W pixels, D features
Units     metres, radians and pixels in every function; the tables print millimetres and degrees
Moving    pixels whose true point is more than 2 cm from where it was in the observed frame. Most of a tabletop stands
          still, and repeating the last frame is hard to beat there: read the moving columns.

References: the method, arXiv 2507.01099; SSIM, Wang et al. 2004; FVD, arXiv 1812.01717; AbsRel and delta, Eigen et al.,
arXiv 1406.2283; ADD, Hinterstoisser et al. 2012; Wilson's interval, Brown et al., Statistical Science 16 (2001).
"""
import argparse
import copy
import json
import re
import shutil
import subprocess
import sys
import zlib
from itertools import permutations
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

MOVING = 0.02               # metres a point must have moved to count as moving
SAME_SURFACE = 0.02         # metres within which two views' points count as the same piece of surface
FEWEST_SEEN = 10            # gripper pixels both views must share for the cross-view mIoU of a frame to be defined
I3D_REPO, I3D_FILE = "flateon/FVD-I3D-torchscript", "i3d_torchscript.pt"


# --------------------------------------------------------------------------------------------------------- images

def per_image(values, chosen):
    """Mean of values (N, ...) over the chosen pixels (N, ...) of each image, then over the images that have any."""
    means = [v[c].mean() for v, c in zip(values, chosen) if c.any()]
    return float(np.mean(means)) if means else float("nan")


def psnr(pred, true, valid=None):
    """10 log10(1 / MSE) of images (N, H, W, 3) in [0, 1], in dB, mean over N; over the pixels valid (N, H, W) if given.

    Identical images give infinity.
    """
    error = (np.asarray(pred, np.float64) - np.asarray(true, np.float64)) ** 2                  # (N, H, W, 3)
    valid = np.ones(error.shape[:3], bool) if valid is None else np.asarray(valid)
    mse = np.array([e[v].mean() for e, v in zip(error, valid) if v.any()])
    with np.errstate(divide="ignore"):
        return float(np.mean(-10 * np.log10(mse))) if len(mse) else float("nan")


def ssim(pred, true, valid=None):
    """Structural similarity (Wang et al. 2004, eq. 13) of images (N, H, W, 3) in [0, 1], mean over N; 1 is identical.

    Gaussian window, sigma 1.5, 11 x 11; population covariance; mean over channels and over the pixels whose whole
    window lies in the image (and that are in `valid` (N, H, W), if given).
    """
    x, y = np.asarray(pred, np.float64), np.asarray(true, np.float64)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    blur = lambda image: gaussian_filter(image, (0, 1.5, 1.5, 0), truncate=3.5)
    mu_x, mu_y = blur(x), blur(y)                                                               # (N, H, W, 3)
    var_x, var_y, cov = blur(x * x) - mu_x ** 2, blur(y * y) - mu_y ** 2, blur(x * y) - mu_x * mu_y
    similarity = ((2 * mu_x * mu_y + c1) * (2 * cov + c2)) / ((mu_x ** 2 + mu_y ** 2 + c1) * (var_x + var_y + c2))
    inner = np.zeros(x.shape[:3], bool)
    inner[:, 5:-5, 5:-5] = True
    return per_image(similarity.mean(-1), inner if valid is None else inner & np.asarray(valid))


# ----------------------------------------------------------------------------------------------- depth and points

def abs_rel(pred_z, true_z, valid=None):
    """mean |pred - true| / true over valid pixels (Eigen et al. 2014). Depths in metres, any shape; 0 is ideal.

    A true depth that is not a positive number is never valid. A wrong prediction is, whatever its sign.
    """
    p, g = depth_pairs(pred_z, true_z, valid)
    return float(np.mean(np.abs(p - g) / g)) if len(g) else float("nan")


def delta1(pred_z, true_z, valid=None):
    """Share of valid pixels with max(pred / true, true / pred) < 1.25 (Eigen et al. 2014); 1 is ideal."""
    p, g = depth_pairs(pred_z, true_z, valid)
    # As products: a p behind the camera makes both quotients negative, and so less than 1.25.
    return float(np.mean((p < 1.25 * g) & (g < 1.25 * p))) if len(g) else float("nan")


def depth_pairs(pred_z, true_z, valid):
    """The scored depths as two vectors: where the truth is a positive number and `valid` (if given) holds."""
    p, g = np.asarray(pred_z, np.float64), np.asarray(true_z, np.float64)
    measured = np.isfinite(g) & (g > 0)
    valid = measured if valid is None else measured & np.asarray(valid, bool)
    return p[valid], g[valid]


def released_masking(pred_points, true_points, valid, view_in_ref):
    """The released script's depth protocol: (pred_z, true_z, valid) of pointmaps (T, H, W, 3) of one view.

    There a pixel without depth is left at its camera's centre before the change of frame, so for view m it becomes the
    camera's position in the reference frame, a point that no surface has; what counts is only that both z are positive.
    """
    true_z = np.where(valid, true_points[..., 2], view_in_ref[2, 3])
    pred_z = pred_points[..., 2]
    return pred_z, true_z, (pred_z > 0) & (true_z > 0)


def point_error(pred, true, valid):
    """Mean Euclidean distance (m) between pointmaps (..., H, W, 3) over valid pixels (..., H, W)."""
    distance = np.linalg.norm(pred - true, axis=-1)[valid]
    return float(distance.mean()) if len(distance) else float("nan")


def chamfer(a, b, most=4000):
    """Chamfer distance (m) of clouds (N, 3), (M, 3): mean distance to the other's nearest point, average of both ways.

    Clouds of more than `most` points are thinned evenly. NaN if one of them is empty.
    """
    if not len(a) or not len(b):
        return float("nan")
    a, b = (cloud[np.linspace(0, len(cloud) - 1, min(len(cloud), most)).astype(int)] for cloud in (a, b))
    return float((cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2)


def moving(true_points, first_points, valid, first_valid):
    """Pixels (T, H, W) whose true point (T, H, W, 3) is more than 2 cm from its first frame's (H, W, 3)."""
    return valid & first_valid & (np.linalg.norm(true_points - first_points, axis=-1) > MOVING)


def flicker(pred, still):
    """Mean change |x_(t+1) - x_t| from frame to frame of (T, H, W, 3), over pixels that stand still in the truth.

    still: (T, H, W). The unit is that of the input; a world at rest has 0.
    """
    change = np.linalg.norm(np.diff(np.asarray(pred, np.float64), axis=0), axis=-1)             # (T - 1, H, W)
    change = change[still[1:] & still[:-1]]
    return float(change.mean()) if len(change) else float("nan")


# --------------------------------------------------------------------------------------- distributions of videos

def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to features a (N, D), b (M, D); 0 is ideal (arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S = X^T X the sample covariances (ddof 1) of centred
    features X. S_a S_b has the eigenvalues of (X_a X_b^T)(X_a X_b^T)^T, so the trace of its root is the sum of the
    singular values of X_a X_b^T: no root of a matrix, no complex numbers, and singular covariances (few clips, 400
    features) lose no digits.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"frechet_distance needs two samples in each set, got {len(a)} and {len(b)}")
    x_a, x_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    trace_of_root = np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x_a ** 2).sum() + (x_b ** 2).sum() - 2 * trace_of_root
    return float(max(0.0, distance))                            # rounding can leave -1e-13


def load_i3d(source="cached"):
    """The Kinetics-400 I3D that FVD is defined by, as TorchScript. source: 'hub' (download), 'cached' or a file.

    Returns None for 'cached' when the hub's file was never downloaded.
    """
    if source in ("hub", "cached"):
        from huggingface_hub import hf_hub_download
        try:
            source = hf_hub_download(I3D_REPO, I3D_FILE, local_files_only=source == "cached")
        except Exception as error:                      # offline, gated, not cached: the hub has a class for each
            if source == "cached":
                return None
            raise ValueError(f"--i3d hub: {I3D_REPO}/{I3D_FILE} cannot be had ({str(error).splitlines()[0]}): copy the "
                             "file here and give --i3d FILE") from None
    try:
        return torch.jit.load(source, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--i3d {source} is not a TorchScript file ({str(error).splitlines()[0]})") from None


@torch.no_grad()
def i3d_features(i3d, videos):
    """(N, 400) I3D logits of videos (N, T, H, W, 3) uint8, resized to 224 x 224, in [-1, 1]; T >= 10."""
    x = torch.as_tensor(np.asarray(videos)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1          # (N, T, 3, H, W)
    n, t = x.shape[:2]
    x = F.interpolate(x.flatten(0, 1), (224, 224), mode="bilinear", antialias=True).unflatten(0, (n, t))
    one = lambda video: i3d(video.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)
    return torch.cat([one(video) for video in x]).double().numpy()


def fvd(pred_features, true_features):
    """Frechet video distance (arXiv 1812.01717) between two sets of clips' I3D features (N, 400); NaN for one clip."""
    return frechet_distance(pred_features, true_features) if len(pred_features) > 1 else float("nan")


def fvd_per_clip(pred_features, true_features):
    """The released script's number: a 'Frechet distance' of one clip against one clip, averaged over clips.

    One sample has no covariance, so what is left is the squared distance of the two features. Not comparable with fvd.
    """
    return float(((np.asarray(pred_features) - np.asarray(true_features)) ** 2).sum(-1).mean())


# -------------------------------------------------------------------------------------------- agreement of views

def seen_by(points_in_cam, z_of_cam, intrinsics):
    """Which points (..., 3) in a camera's frame lie on the surface that camera sees, to 2 cm. z_of_cam: (H, W) m."""
    height, width = z_of_cam.shape
    in_front = points_in_cam[..., 2] > 1e-3
    pixels, z = data.project(np.where(in_front[..., None], points_in_cam, 1.0), intrinsics)
    column, row = np.moveaxis(np.rint(pixels).astype(int), -1, 0)
    inside = in_front & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return inside & (np.abs(z_of_cam[row.clip(0, height - 1), column.clip(0, width - 1)] - z) < SAME_SURFACE)


def cross_view_miou(points, gripper_n, gripper_m, intrinsics_n, intrinsics_m, ref_in_m, z_m=None, seen=None, slack=0):
    """IoU of the gripper's mask in view n, carried into camera m by n's predicted points, with m's own mask: (T,).

    points (T,H,W,3): view n's pointmap, reference frame (= n's camera); gripper_n, gripper_m (T,H,W) bool; ref_in_m
    (4,4): the true camera m, needed for scoring only. Every pixel of n is cut into 3 x 3 (otherwise a near n leaves
    holes in m), all of them are splatted into m with a z-buffer, and the nearest decides what m's pixel shows.

    As it stands this is the paper's metric, whose ceiling is far below 1: what m sees of the hand and n does not can
    never be covered, and a mask of 60 pixels is half boundary. For a metric on which the truth scores >= 0.9, give
      z_m (T,H,W)     true depth of view m: a splat more than 3 cm behind what m sees is hidden, and does not count;
      seen (T,H,W)    pixels of m that n truly sees (seen_by): only these can be missed;
      slack           pixels by which either mask may be off.
    """
    t, height, width = gripper_m.shape
    cut = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 2) / 3                  # (9, 2) = (du, dv)
    focal = np.array([intrinsics_n[0, 0], intrinsics_n[1, 1]])
    grow = lambda mask: binary_dilation(mask, np.ones((3, 3)), iterations=slack) if slack else mask
    ious = np.zeros(t)
    for i in range(t):
        shift = cut[:, None, None] / focal * points[i, ..., 2:]                                 # (9, H, W, 2) metres
        fine = points[i] + np.concatenate([shift, np.zeros((9, height, width, 1))], -1)         # (9, H, W, 3)
        shown, z = z_buffer(data.transform(fine, ref_in_m), np.broadcast_to(gripper_n[i], fine.shape[:3]), intrinsics_m,
                            (height, width))
        if z_m is not None:
            shown &= z < np.where(z_m[i] > 0, z_m[i], np.inf) + 0.03
        own = gripper_m[i]
        hit = (shown & grow(own)).sum()
        wrong = (shown & ~grow(own)).sum()
        missed = ((own if seen is None else own & seen[i]) & ~grow(shown)).sum()
        ious[i] = hit / (hit + wrong + missed) if hit + wrong + missed else np.nan
    return ious


def z_buffer(points_in_cam, carried, intrinsics, size):
    """What the nearest point on each pixel carries, (H, W) bool (False: no point), and its z (inf: no point)."""
    in_front = points_in_cam[..., 2] > 1e-3
    points, carried = points_in_cam[in_front], carried[in_front]                                # (N, 3), (N,)
    pixels, z = data.project(points, intrinsics)
    column, row = np.rint(pixels).astype(int).T
    inside = (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
    column, row, z, carried = column[inside], row[inside], z[inside], carried[inside]
    far_first = np.argsort(-z)                                  # of repeated pixels numpy keeps the last written
    shown, nearest = np.zeros(size, bool), np.full(size, np.inf)
    shown[row[far_first], column[far_first]] = carried[far_first]
    nearest[row[far_first], column[far_first]] = z[far_first]
    return shown, nearest


def pose_errors(pred_in_ref, true_in_ref):
    """Translation (m) and rotation angle (rad) between poses (..., 4, 4): two arrays (...,).

    The angle of R = R_pred^T R_true from sine and cosine: exact for small angles, where arccos loses half the digits.
    """
    pred_in_ref, true_in_ref = np.asarray(pred_in_ref, np.float64), np.asarray(true_in_ref, np.float64)
    translation = np.linalg.norm(pred_in_ref[..., :3, 3] - true_in_ref[..., :3, 3], axis=-1)
    R = pred_in_ref[..., :3, :3].mT @ true_in_ref[..., :3, :3]
    skew = np.stack([R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], -1)
    return translation, np.arctan2(np.linalg.norm(skew, axis=-1), np.trace(R, axis1=-2, axis2=-1) - 1)


# ------------------------------------------------------------------------------------------------------- grippers

def add_distance(pred_in_ref, pred_opening, true_in_ref, true_opening):
    """ADD (Hinterstoisser et al. 2012): mean distance (m) of the gripper's model points at the two poses and openings.

    Poses (..., 4, 4), openings (...,) in metres -> (...,).
    """
    place = lambda in_ref, opening: data.transform(gripper_points(opening), np.asarray(in_ref, np.float64))
    return np.linalg.norm(place(pred_in_ref, pred_opening) - place(true_in_ref, true_opening), axis=-1).mean(-1)


def gripper_points(opening):
    """Vertices of hand and fingers in the hand frame at openings (...,) -> (..., N, 3)."""
    opening = np.asarray(opening, np.float64)[..., None, None]
    parts = data.gripper_mesh()
    hand, finger = parts["hand"][0], parts["finger"][0]
    slide = opening / 2 * np.array([0.0, 1.0, 0.0])
    left, right = finger + slide, finger * [-1, -1, 1] - slide                                  # right: 180 deg about z
    return np.concatenate([np.broadcast_to(hand, (*opening.shape[:-2], *hand.shape)), left, right], -2)


def wilson_interval(successes, trials, z=1.96):
    """Wilson's 95 % interval of a success rate (Brown et al. 2001, eq. 4); honest at 0 and 1, unlike +- 1.96 sigma."""
    if not trials:
        return 0.0, 1.0
    p, n = successes / trials, trials
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---------------------------------------------------------------------------------------- scoring one prediction.npz

def load_prediction(path):
    """prediction.npz as a dict of arrays, checked. Raises ValueError naming the file and the key."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            p = {key: file[key] for key in file}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an npz file ({error})") from None
    for key in ("rgb", "intrinsics", "observed_rgb", "observed_depth"):
        if key not in p:
            raise ValueError(f"{path} has no array '{key}' (sample.py's docstring lists them)")
    v, t, h, w = p["rgb"].shape[:4] if p["rgb"].ndim == 5 else (0, 0, 0, 0)
    shapes = dict(rgb=(v, t, h, w, 3), points=(v, t, h, w, 3), valid=(v, t, h, w), intrinsics=(v, 3, 3),
                  view_in_ref=(v, 4, 4), observed_rgb=(v, h, w, 3), observed_depth=(v, h, w))
    for key in p:
        wanted = shapes.get(key.removeprefix("true_"))
        if wanted and p[key].shape != wanted:
            raise ValueError(f"{path}: '{key}' has shape {p[key].shape}, expected {wanted} (V, T, H, W as in 'rgb')")
    if "true_rgb" not in p:
        raise ValueError(f"{path} holds no ground truth ('true_rgb', 'true_points', ...) to score against")
    return p


def score(p, masks=None, trajectory=None, protocol="ours"):
    """All metrics of one prediction: {name: (T,) values over the horizon, or one number}, metres, radians and dB.

    p: the arrays of prediction.npz with its true_ keys. masks: (V, T, H, W) bool, the gripper in each generated view.
    trajectory: track.py's arrays for this video. What is not known is left out, not guessed. `-n` is view 0, `-m` the
    mean of the others. protocol 'released' masks depth as the authors' script does (see released_masking).
    """
    views, frames = p["rgb"].shape[:2]
    rgb, true_rgb = p["rgb"] / 255.0, p["true_rgb"] / 255.0
    geometry = "true_points" in p
    if geometry:
        true, valid, view_in_ref = p["true_points"], p["true_valid"], p["true_view_in_ref"]
        observed, observed_valid = data.point_maps(p["observed_depth"], p["intrinsics"])
        first = data.transform(observed, view_in_ref)                                           # (V, H, W, 3) in ref
        moves = np.stack([moving(true[v], first[v], valid[v], observed_valid[v]) for v in range(views)])
    values = {}

    def add(name, per_view_and_frame):
        """per_view_and_frame(v, t) -> number, for -n and (averaged over the other views) -m."""
        table = np.array([[per_view_and_frame(v, t) for t in range(frames)] for v in range(views)])     # (V, T)
        values[name + "-n"] = table[0]
        if views > 1:
            values[name + "-m"] = mean(table[1:], 0)

    one = lambda images, v, t: images[v, t:t + 1]
    add("psnr", lambda v, t: psnr(one(rgb, v, t), one(true_rgb, v, t)))
    add("ssim", lambda v, t: ssim(one(rgb, v, t), one(true_rgb, v, t)))
    if not geometry:
        return values
    add("psnr_moving", lambda v, t: psnr(one(rgb, v, t), one(true_rgb, v, t), one(moves, v, t)))
    add("ssim_moving", lambda v, t: ssim(one(rgb, v, t), one(true_rgb, v, t), one(moves, v, t)))
    values["flicker_rgb"] = mean([255 * flicker(rgb[v], valid[v] & ~moves[v]) for v in range(views)])
    if trajectory is not None and "true_gripper_in_ref" in p:
        values.update(score_gripper(trajectory, p["true_gripper_in_ref"], p["true_opening"], p.get("true_gripper")))
    if "points" not in p:
        return values

    points = p["points"]
    for metric in (abs_rel, delta1):
        if protocol == "released":
            add(metric.__name__, lambda v, t: metric(*released_masking(points[v, t], true[v, t], valid[v, t],
                                                                       view_in_ref[v])))
        else:
            add(metric.__name__, lambda v, t: metric(points[v, t, ..., 2], true[v, t, ..., 2], valid[v, t]))
        add(metric.__name__ + "_moving", lambda v, t: metric(points[v, t, ..., 2], true[v, t, ..., 2], moves[v, t]))
    add("points", lambda v, t: point_error(points[v, t], true[v, t], valid[v, t]))
    add("points_moving", lambda v, t: point_error(points[v, t], true[v, t], moves[v, t]))
    values["chamfer"] = np.array([chamfer(points[:, t][p["valid"][:, t]], true[:, t][valid[:, t]])
                                  for t in range(frames)])
    values["flicker"] = mean([flicker(points[v], valid[v] & ~moves[v]) for v in range(views)])
    errors = [pose_errors(p["view_in_ref"][v], view_in_ref[v]) for v in range(1, views)]
    values["camera_m"], values["camera_rad"] = mean([e[0] for e in errors]), mean([e[1] for e in errors])
    values.update(score_views(p, masks))
    return values


def mean(values, axis=None):
    """Mean of what is known; NaN, without a warning, where nothing is."""
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def score_views(p, masks):
    """Agreement of the views' clouds where both truly see, and the two cross-view mIoUs: {name: (T,) values}."""
    true, valid, points = p["true_points"], p["true_valid"], p["points"]
    views, frames = valid.shape[:2]
    true_gripper = p["true_gripper"].any(2) if "true_gripper" in p else None                    # (V, T, H, W)
    agreement, truths, miou, miou_paper = [], [], [], []
    for v in range(1, views):
        ref_in_m = data.invert(p["true_view_in_ref"][v].astype(np.float64))
        z_n = true[0, ..., 2] * valid[0]                                                        # (T, H, W), 0: unknown
        z_m = data.transform(true[v], ref_in_m)[..., 2] * valid[v]
        n_seen = np.stack([valid[0, t] & seen_by(data.transform(true[0, t], ref_in_m), z_m[t], p["intrinsics"][v])
                           for t in range(frames)])
        m_seen = np.stack([valid[v, t] & seen_by(true[v, t], z_n[t], p["intrinsics"][0]) for t in range(frames)])
        both = lambda cloud: [chamfer(cloud[0, t][n_seen[t]], cloud[v, t][m_seen[t]]) for t in range(frames)]
        agreement.append(both(points))
        truths.append(both(true))
        if masks is None:
            continue
        scored = (masks[v] if true_gripper is None else true_gripper[v]) & m_seen
        defined = np.where(scored.sum((1, 2)) >= FEWEST_SEEN, 1, np.nan)                        # (T,)
        cameras = p["intrinsics"][0], p["intrinsics"][v], ref_in_m
        miou.append(defined * cross_view_miou(points[0], masks[0], masks[v], *cameras, z_m, m_seen, slack=1))
        miou_paper.append(cross_view_miou(points[0], masks[0], masks[v], *cameras))
    if views == 1:
        return {}
    values = dict(agreement=mean(agreement, 0), agreement_ratio=mean(agreement, 0) / mean(truths, 0))
    if miou:
        values.update(miou=mean(miou, 0), miou_paper=mean(miou_paper, 0))
    return values


def score_gripper(trajectory, true_in_ref, true_opening, true_gripper=None):
    """Errors of the tracked grippers that move in the truth: a parked arm would halve every error. {name: (T,) values}.

    trajectory: gripper_in_ref (T+1,A,4,4), opening (T+1,A), lost (T+1,A), frame 0 the observed one; a lost frame counts
    with the pose that the tracker held. true_gripper (V,T,A,H,W) tells which view sees which gripper. Where none does,
    there is no error to speak of, and `lost` is the right answer: `invented` is the share of these that got a pose.
    """
    travel = np.linalg.norm(true_in_ref[:, :, :3, 3] - true_in_ref[0, :, :3, 3], axis=-1).max(0)       # (A,)
    arms = np.flatnonzero(travel > MOVING)
    if trajectory["gripper_in_ref"].shape != true_in_ref.shape:
        raise ValueError(f"trajectory.npz: gripper_in_ref has shape {trajectory['gripper_in_ref'].shape}, the truth "
                         f"{true_in_ref.shape}; track the whole clip and every arm")
    if not len(arms):
        return {}
    in_ref, opening, lost = (trajectory[key][1:, arms] for key in ("gripper_in_ref", "opening", "lost"))
    true_in_ref, true_opening = true_in_ref[1:, arms], true_opening[1:, arms]                           # (T, A', ...)
    seen = np.ones(lost.shape, bool)
    if true_gripper is not None:
        seen = true_gripper[:, :, arms].sum((3, 4)).max(0) >= FEWEST_SEEN                               # (T, A')
    where = lambda chosen, x: mean(np.where(chosen, x, np.nan), 1)
    translation, rotation = pose_errors(in_ref, true_in_ref)
    return dict(gripper_m=where(seen, translation), gripper_rad=where(seen, rotation),
                add=where(seen, add_distance(in_ref, opening, true_in_ref, true_opening)),
                opening=where(seen, np.abs(opening - true_opening)),
                lost=where(seen, lost), invented=where(~seen, ~lost))


# ------------------------------------------------------------------------------------------------------- baselines

def truth_row(p):
    """The ground truth as a prediction: the ceiling of every metric, and a test of the metrics themselves."""
    return dict(p, rgb=p["true_rgb"], points=p["true_points"], valid=p["true_valid"], view_in_ref=p["true_view_in_ref"])


def last_frame_row(p):
    """The observed frame repeated, with the true camera poses, which a model is not told."""
    observed, valid = data.point_maps(p["observed_depth"], p["intrinsics"])
    over_time = lambda x: np.repeat(x[:, None], p["rgb"].shape[1], axis=1)
    return dict(p, rgb=over_time(p["observed_rgb"]), points=over_time(data.transform(observed, p["true_view_in_ref"])),
                valid=over_time(valid), view_in_ref=p["true_view_in_ref"])


def vae_row(p, model, vaes):
    """The ground truth through the VAEs and back: no generator that works on these latents can do better."""
    device = next(model.parameters()).device
    to_batch = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 2)))[None].float().to(device)
    with torch.no_grad():
        latents = sample.encode_targets(model, vaes, to_batch(p["true_rgb"] / 127.5 - 1),
                                        to_batch(data.normalize_points(p["true_points"])))
        rgb, points = sample.decode(model, vaes, latents)
    prediction = sample.to_prediction(p["observed_rgb"], p["observed_depth"], p["intrinsics"], rgb[0],
                                      None if points is None else points[0])
    return dict(p, **prediction)


# -------------------------------------------------------------------------------------- tracks and masks of grippers

def tracks(p, folder=None):
    """A 4D video's gripper path (track.py's arrays) and masks (V, T, H, W) bool; None for what can't be had.

    The path is tracked in the clouds of all views together. Each view's mask comes from that view alone, so that two
    views which disagree about where the gripper is are caught: track its points, render the hand where the tracker
    found it, and keep the pixels whose own points lie there. With a `folder`, trajectory.npz and masks.npz in it
    (`gripper`, (V, T, H, W) bool, for instance from SAM 2) are read if they are newer than its prediction.npz, and
    written if not.
    """
    if "points" not in p:
        return None, None
    trajectory, masks = read_newer(folder, "trajectory.npz"), read_newer(folder, "masks.npz")
    can_track = "observed_gripper_in_ref" in p or "observed_gripper" in p
    if trajectory is None and can_track:
        trajectory = track.track(p)
        write_npz(folder, "trajectory.npz", trajectory)
    if masks is None and can_track:
        alone = [one_view(p, v) for v in range(len(p["rgb"]))]
        masks = dict(gripper=np.stack([tracked_mask(view, track.track(view)) for view in alone]))
        write_npz(folder, "masks.npz", masks)
    if masks is None:
        return trajectory, None
    if "gripper" not in masks or masks["gripper"].shape != p["rgb"].shape[:4]:
        raise ValueError(f"{folder}/masks.npz: an array 'gripper' of shape {p['rgb'].shape[:4]} is needed")
    return trajectory, masks["gripper"].astype(bool)


def read_newer(folder, name):
    """folder/name as a dict, None if it is missing or older than the prediction beside it."""
    if folder is None or not (folder / name).exists():
        return None
    if (folder / name).stat().st_mtime < (folder / "prediction.npz").stat().st_mtime:
        return None
    with np.load(folder / name, allow_pickle=False) as file:
        return {key: file[key] for key in file}


def write_npz(folder, name, arrays):
    """Under a temporary name, then renamed: a file that is there is complete."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"partial_{name}", **arrays)
        (folder / f"partial_{name}").rename(folder / name)


def one_view(p, v):
    """The prediction with view v only, its points still in the reference frame."""
    per_view = ("rgb", "points", "valid", "intrinsics", "view_in_ref",
                "observed_rgb", "observed_depth", "observed_gripper")
    return {**p, **{key: p[key][v:v + 1] for key in per_view if key in p}}


def tracked_mask(p, trajectory):
    """Where a one-view prediction shows the gripper, (T, H, W) bool: the rendered hand, if p's points agree to 3 cm."""
    t, height, width = p["rgb"].shape[1:4]
    ref_in_cam = data.invert(p["view_in_ref"][0])
    z_seen = data.transform(p["points"][0], ref_in_cam)[..., 2]                                 # (T, H, W)
    mask = np.zeros((t, height, width), bool)
    for a in range(trajectory["gripper_in_ref"].shape[1]):
        found = ~trajectory["lost"][1:, a]                                                      # (T,)
        if not found.any():
            continue
        gripper_in_cam = ref_in_cam @ trajectory["gripper_in_ref"][1:, a][found]
        vertices = data.transform(gripper_points(trajectory["opening"][1:, a][found]), gripper_in_cam)
        intrinsics = np.broadcast_to(p["intrinsics"][0], (len(vertices), 3, 3))
        z, _ = data.rasterize(vertices, gripper_faces(), intrinsics, height, width)
        mask[found] |= (z > 0) & (np.abs(z - z_seen[found]) < 0.03)
    return mask


def gripper_faces():
    """Triangles (M, 3) into gripper_points."""
    parts = data.gripper_mesh()
    (hand, hand_faces), (finger, finger_faces) = parts["hand"], parts["finger"]
    return np.concatenate([hand_faces, finger_faces + len(hand), finger_faces + len(hand) + len(finger)])


# ----------------------------------------------------------------------------------------------- rows of the tables

# name: heading, factor from SI to the table's unit, digits, +1 where more is better and -1 where less is
METRICS = {
    "miou_paper": ("mIoU, paper's", 1, 2, 1), "miou": ("mIoU, co-visible", 1, 2, 1),
    "fvd": ("FVD", 1, 0, -1), "fvd_per_clip": ("released script's FVD", 1, 1, -1),
    "abs_rel": ("AbsRel", 1, 3, -1), "delta1": ("delta1", 1, 3, 1),
    "abs_rel_moving": ("AbsRel, moving", 1, 3, -1), "delta1_moving": ("delta1, moving", 1, 3, 1),
    "points": ("points, mm", 1000, 0, -1), "points_moving": ("points, moving, mm", 1000, 0, -1),
    "psnr": ("PSNR, dB", 1, 1, 1), "ssim": ("SSIM", 1, 3, 1),
    "psnr_moving": ("PSNR, moving, dB", 1, 1, 1), "ssim_moving": ("SSIM, moving", 1, 3, 1),
    "chamfer": ("chamfer, mm", 1000, 1, -1), "agreement": ("agreement, mm", 1000, 1, -1),
    "agreement_ratio": ("agreement / truth's", 1, 2, -1),
    "camera_m": ("camera pose, mm", 1000, 0, -1), "camera_rad": ("camera pose, deg", 180 / np.pi, 1, -1),
    "flicker": ("flicker, mm", 1000, 1, -1), "flicker_rgb": ("flicker, grey levels", 1, 1, -1),
    "gripper_m": ("gripper, mm", 1000, 0, -1), "gripper_rad": ("gripper, deg", 180 / np.pi, 1, -1),
    "add": ("ADD, mm", 1000, 0, -1), "opening": ("opening, mm", 1000, 1, -1), "lost": ("lost, of seen", 1, 2, -1),
    "invented": ("not lost, of unseen", 1, 2, -1),
}
TABLES = {
    "As in the paper": "miou_paper miou fvd-n fvd-m abs_rel-n abs_rel-m delta1-n delta1-m",
    "Moving pixels": "abs_rel_moving-n abs_rel_moving-m delta1_moving-n delta1_moving-m "
                     "points_moving-n points_moving-m psnr_moving-n psnr_moving-m ssim_moving-n ssim_moving-m",
    "All pixels": "points-n points-m chamfer psnr-n psnr-m ssim-n ssim-m flicker flicker_rgb "
                  "fvd_per_clip-n fvd_per_clip-m",
    "Cameras and grippers": "agreement agreement_ratio camera_m camera_rad gripper_m gripper_rad add opening lost "
                            "invented",
}
# Table 1 of the paper; where single cells are not known, the range over the three simulated tasks
PUBLISHED = {
    "paper: ours": {"miou_paper": {1: ".70", 2: ".69", 3: ".64"}, "fvd-n": {1: "411", None: "378-491"},
                    "fvd-m": {1: "561", None: "258-561"}, "abs_rel-n": ".03-.06", "abs_rel-m": {1: ".11"},
                    "delta1-n": ".95-.98"},
    "paper: w/o MV attention": {"miou_paper": {1: ".41", 2: ".44", 3: ".26"}, "fvd-n": {1: "497", None: "451-597"},
                                "fvd-m": "302-607", "abs_rel-n": ".10-.15", "abs_rel-m": {1: ".31"},
                                "delta1-n": ".75-.89"},
    "paper: SVD": {"fvd-n": "370-977", "fvd-m": "417-743"},
    "paper: SVD w/ MV attention": {"fvd-n": "536-942", "fvd-m": "445-767"},
    "paper: 4D Gaussian": {"miou_paper": {1: ".39", 2: ".46", 3: ".44"}, "fvd-n": "1208-1396", "fvd-m": "815-1192",
                           "abs_rel-n": ".18-.33", "delta1-n": ".43-.80"},
}


class Features:
    """I3D features of clips, per view; those of the truth are kept, every row is compared with the same."""

    def __init__(self, i3d):
        self.i3d, self.truth = i3d, {}

    def __call__(self, name, p):
        """{'n': (pred (1, D), true (1, D)), 'm': (pred (V-1, D), true (V-1, D))}; {} without weights or 10 frames."""
        if self.i3d is None or p["rgb"].shape[1] < 10:
            return {}
        if name not in self.truth:
            self.truth[name] = i3d_features(self.i3d, p["true_rgb"])                            # (V, D)
        pred, true = i3d_features(self.i3d, p["rgb"]), self.truth[name]
        return {"n": (pred[:1], true[:1]), "m": (pred[1:], true[1:])}


def score_row(clips, features, protocol="ours"):
    """One seed of one method: iterable of (name, p, masks, trajectory) -> {clip: values}, {metric: number}.

    The second holds what is defined for a set of clips only, the FVDs.
    """
    scores, videos = {}, {}
    for name, p, masks, trajectory in clips:
        scores[name] = score(p, masks, trajectory, protocol)
        for view, pair in features(name, p).items():
            videos.setdefault(view, []).append(pair)
    of_set = {}
    for view, pairs in videos.items():
        pred, true = (np.concatenate(side) for side in zip(*pairs))
        if len(pred):
            of_set[f"fvd-{view}"], of_set[f"fvd_per_clip-{view}"] = fvd(pred, true), fvd_per_clip(pred, true)
    return scores, of_set


def summarise(seeds):
    """A table's row out of score_row's results, one per seed: {metric: mean, spread, per_seed, horizon}.

    A clip's value is the mean over its frames, a seed's the mean over its clips. spread: sample standard deviation over
    seeds, None for one seed. horizon: (T,) means over clips and seeds.
    """
    row = {}
    everything = [values for scores, of_set in seeds for values in [*scores.values(), of_set]]
    for name in dict.fromkeys(name for values in everything for name in values):
        known = [[values[name] for values in scores.values() if name in values] for scores, _ in seeds]
        per_seed = [of_set[name] if name in of_set else float(mean([mean(v) for v in k])) for k, (_, of_set) in
                    zip(known, seeds)]
        spread = float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 and np.isfinite(per_seed).all() else None
        row[name] = dict(mean=float(mean(per_seed)), spread=spread, per_seed=per_seed)
        over_time = [v for k in known for v in k if np.ndim(v) == 1]
        if over_time and len({len(v) for v in over_time}) == 1:
            row[name]["horizon"] = mean(over_time, 0).tolist()
    return row


def cell(row, name):
    """'0.061 +- 0.004' in the table's unit; 'n/a' for what is not known."""
    if name not in row or np.isnan(row[name]["mean"]):
        return "n/a"
    _, factor, digits, _ = METRICS[name.removesuffix("-n").removesuffix("-m")]
    spread = row[name]["spread"]
    text = f"{row[name]['mean'] * factor:.{digits}f}"
    return text if spread is None else f"{text} ± {spread * factor:.{digits}f}"


def markdown(rows, task=None, notes=()):
    """The tables of METRICS and TABLES as markdown, the published rows (of `task`, if known) below the first."""
    lines = []
    for title, names in TABLES.items():
        names = names.split()
        heading = []
        for name in names:
            base = name.removesuffix("-n").removesuffix("-m")
            text, _, _, better = METRICS[base]
            heading.append(f"{text}{name[len(base):]} {'↑' if better > 0 else '↓'}")
        lines += [f"### {title}", "", "| | " + " | ".join(heading) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {label} | " + " | ".join(cell(row, name) for name in names) + " |" for label, row in rows.items()]
        for label, cells in PUBLISHED.items() if title == "As in the paper" else ():
            found = [cells.get(name, "-") for name in names]
            found = [value.get(task, value.get(None, "-")) if isinstance(value, dict) else value for value in found]
            lines.append(f"| *{label}* | " + " | ".join(found) + " |")
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


def plot_horizon(rows, path):
    """How errors grow over the predicted frames, one line a row."""
    import matplotlib.pyplot as plt

    panels = ["abs_rel-n", "abs_rel-m", "points_moving-n", "points_moving-m", "psnr_moving-n", "psnr_moving-m", "miou",
              "gripper_m"]
    figure, axes = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    for ax, name in zip(axes.T.flat, panels):
        text, factor, _, _ = METRICS[name.removesuffix("-n").removesuffix("-m")]
        for i, (label, row) in enumerate(rows.items()):
            horizon = np.array(row.get(name, {}).get("horizon", []), float) * factor
            if np.isfinite(horizon).any():
                ax.plot((1 + np.arange(len(horizon))) / sample.FPS, horizon, "o-", markersize=3, color=f"C{i}",
                        label=label)
        ax.set(xlabel="seconds ahead", title=text + (f", view {name[-1]}" if name[-2] == "-" else ""))
        ax.set_ylim(bottom=0)
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes.flat), key=lambda both: len(both[1]))
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def worst_clips(folders, scores, path, count=3):
    """Picture of the clips with the largest point error: truth, prediction and error map of each view's last frame.

    folders and scores: {clip: prediction's folder} and {clip: values} of one seed. Errors in centimetres; grey where
    nothing was measured.
    """
    import matplotlib.pyplot as plt

    error = lambda values: mean([values.get(f"points-{v}", -values[f"psnr-{v}"])
                                 for v in "nm" if f"psnr-{v}" in values])
    chosen = sorted(scores, key=lambda clip: -error(scores[clip]))[:count]
    clips = {clip: load_prediction(folders[clip] / "prediction.npz") for clip in chosen}
    views = max(len(p["rgb"]) for p in clips.values())
    figure, axes = plt.subplots(len(clips), 3 * views, figsize=(2.7 * 3 * views, 2.4 * len(clips)), squeeze=False,
                                layout="constrained")
    for row, (clip, p) in zip(axes, clips.items()):
        row[0].set_ylabel(clip, fontsize=7)
        for v in range(len(p["rgb"])):
            true_ax, pred_ax, error_ax = row[3 * v:3 * v + 3]
            true_ax.imshow(p["true_rgb"][v, -1])
            true_ax.set_title(f"view {v}, truth", fontsize=8)
            pred_ax.imshow(p["rgb"][v, -1])
            pred_ax.set_title("predicted", fontsize=8)
            if "points" in p and "true_points" in p:
                off = 100 * np.linalg.norm(p["points"][v, -1] - p["true_points"][v, -1], axis=-1)
                off[~p["true_valid"][v, -1]] = np.nan
                error_ax.set_facecolor("grey")
                shown = error_ax.imshow(off, cmap="magma", vmin=0, vmax=30)
                error_ax.set_title(f"error, cm (mean {mean(off):.1f})", fontsize=8)
                figure.colorbar(shown, ax=error_ax, shrink=0.8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ----------------------------------------------------------------------------------------- predictions of test clips

def test_clips(folder, size, views, frames=10, count=None):
    """Every test clip as (episode, start, cameras): held-out episodes x ordered choices of test cameras.

    The starting frames run through the episode from choice to choice. count: that many, spread evenly.
    """
    held_out = data.Clips(folder, "test", size, views, frames)
    chosen = []
    for episode, starts in zip(held_out.episodes, held_out.starts):
        cameras = data.TEST_CAMERAS if len(episode.rgb) >= 16 else range(len(episode.rgb))
        choices = list(permutations(cameras, views))
        chosen += [(episode, starts[i * len(starts) // len(choices)], np.array(c)) for i, c in enumerate(choices)]
    if count is not None and count < len(chosen):
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, count).round().astype(int)]
    return chosen


def sample_test(run, folder, out, seed, count=None, views=2, frames=10, steps=25, device="cpu"):
    """Samples the test clips of a data folder with a trained run into out/NAME/prediction.npz; returns these folders.

    What is there already is kept, if it comes from the same checkpoint, data and settings (out/made_with.json).
    """
    run, out = Path(run), Path(out)
    model, vaes, clip = sample.load_run(run, device)
    made_with = json.dumps(dict(model=json.loads((run / "model.json").read_text()), seed=seed, steps=steps,
                                data=str(Path(folder).resolve()), written=(run / "model.safetensors").stat().st_mtime))
    if not (out / "made_with.json").exists() or (out / "made_with.json").read_text() != made_with:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "made_with.json").write_text(made_with)
    size, made = (model.preset.height, model.preset.width), []
    clips = test_clips(folder, size, views, frames, count)
    for episode, start, cameras in tqdm(clips, desc=f"sampling {out}", unit="clip"):
        item = data.read_clip(episode, start, cameras, np.arange(frames), size)
        target = out / re.sub(r"\W+", "_", item["name"])
        made.append(target)
        if not (target / "prediction.npz").exists():
            generator = torch.Generator().manual_seed(zlib.crc32(item["name"].encode()) + seed)
            write_npz(target, "prediction.npz", predict(model, vaes, clip, item, frames, steps, generator, device))
    return made


def predict(model, vaes, clip, item, frames=10, steps=25, generator=None, device="cpu"):
    """prediction.npz's arrays, truth included, for an item of data.Clips."""
    observed = item["rgb"][None, :, 0].to(device), item["own_points"][None].to(device)
    rgb, points = sample.sample_views(model, vaes, clip, *observed, frames, steps, generator=generator)
    prediction = sample.to_prediction(*sample.observation(item), rgb[0], None if points is None else points[0])
    return sample.add_truth(prediction, item)


# ----------------------------------------------------------------------------------------------- tables of many rows

def read_clips(folders):
    """Predictions with their tracks, one at a time: (name, p, masks, trajectory)."""
    for folder in tqdm(folders, desc="tracking and scoring", unit="clip"):
        p = load_prediction(folder / "prediction.npz")
        trajectory, masks = tracks(p, folder)
        yield folder.name, p, masks, trajectory


def baseline_clips(folders, make):
    """The same clips under a baseline: make(p) -> (p, masks, trajectory)."""
    for folder in folders:
        p = load_prediction(folder / "prediction.npz")
        if "true_points" in p:
            yield folder.name, *make(p)


def baselines(model=None, vaes=None):
    """{label: make} of the rows that need no generator; the VAEs' row only where a run with pointmaps is at hand."""
    def last_frame(p):
        frames = p["rgb"].shape[1]
        over_time = lambda x, n, axis: np.repeat(np.expand_dims(x, axis), n, axis)
        masks = over_time(p["observed_gripper"].any(1), frames, 1) if "observed_gripper" in p else None
        trajectory = None
        if "observed_gripper_in_ref" in p:
            held = over_time(p["observed_gripper_in_ref"], frames + 1, 0)
            trajectory = dict(gripper_in_ref=held, opening=over_time(p["observed_opening"], frames + 1, 0),
                              lost=np.zeros(held.shape[:2], bool))
        return last_frame_row(p), masks, trajectory

    def truth(p):
        trajectory = None
        if "true_gripper_in_ref" in p:
            trajectory = dict(gripper_in_ref=p["true_gripper_in_ref"], opening=p["true_opening"],
                              lost=np.zeros(p["true_opening"].shape, bool))
        return truth_row(p), p["true_gripper"].any(2) if "true_gripper" in p else None, trajectory

    def truth_tracked(p):
        trajectory, masks = tracks(truth_row(p))
        return truth_row(p), masks, trajectory

    def through_vaes(p):
        p = vae_row(p, model, vaes)
        trajectory, masks = tracks(p)
        return p, masks, trajectory

    rows = {"last frame repeated": last_frame, "ground truth": truth, "ground truth, tracked": truth_tracked}
    return rows if model is None or model.rgb_only else {**rows, "ground truth through the VAEs": through_vaes}


def compare(methods, out, task=None, i3d="cached", protocol="ours", run=None):
    """Scores methods {label: [folders of one seed, ...]}, and baselines on the first's clips; writes results."""
    out = Path(out)
    network = load_i3d(i3d)
    features, table, per_clip = Features(network), {}, {}
    for label, seeds in methods.items():
        scored = [score_row(read_clips(folders), features, protocol) for folders in seeds]
        table[label] = summarise(scored)
        per_clip[label] = [scores for scores, _ in scored]
    first_label, first_seeds = next(iter(methods.items()))
    model, vaes, _ = sample.load_run(run) if run else (None, None, None)
    for label, make in baselines(model, vaes).items():
        scored = score_row(baseline_clips(first_seeds[0], make), features, protocol)
        if scored[0]:
            table[label] = summarise([scored])

    seeds, clips = len(first_seeds), len(first_seeds[0])
    notes = [f"{clips} clips, {seeds} seed{'s (±: standard deviation over them)' if seeds > 1 else ''}; depth masking: "
             f"{protocol}. '-n' is the reference view, '-m' the others; moving: more than 2 cm from the first frame.",
             "'last frame repeated' is told the true camera poses. 'ground truth' has the true gripper masks and path: "
             "the ceiling of the metrics; 'ground truth, tracked' has the tracker's: the ceiling of what is tracked."]
    if network is None:
        notes.append(f"FVD: n/a, no I3D weights here. `--i3d hub` gets {I3D_REPO} (25 MB), `--i3d FILE` reads a copy.")
    elif clips < 256:
        notes.append(f"FVD from {clips} clips is far above its value for many, whatever the method: compare rows only.")
    text = markdown(table, task, notes)
    out.mkdir(parents=True, exist_ok=True)
    flat = {label: [{name: {key: float(mean(v)) for key, v in values.items()} for name, values in scores.items()}
                    for scores in seeds] for label, seeds in per_clip.items()}
    (out / "results.json").write_text(json.dumps(finite(dict(task=task, protocol=protocol, clips=clips, rows=table,
                                                             per_clip=flat, published=PUBLISHED)), indent=1))
    (out / "results.md").write_text(text)
    plot_horizon(table, out / "horizon.png")
    by_name = {folder.name: folder for folder in first_seeds[0]}
    worst_clips(by_name, per_clip[first_label][0], out / "worst.png")
    print(text)
    print(f"written: {out}/results.json, results.md, horizon.png, worst.png")
    return table


def finite(tree):
    """JSON has no infinity and no NaN: the first becomes the string 'inf', the second null."""
    if isinstance(tree, dict):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    if isinstance(tree, float) and not np.isfinite(tree):
        return None if np.isnan(tree) else str(tree)
    return tree


# -------------------------------------------------------------------------------------------------------- ablation

# the four rows of the paper's table, as flags of train.py
ABLATION = {
    "ours": [],
    "w/o MV attention": ["--mv_attention", "none"],
    "SVD": ["--rgb_only", "--mv_attention", "none"],
    "SVD w/ MV attention": ["--rgb_only", "--mv_attention", "rgb"],
}


def train_ablation(task, folder, run, seeds, flags=()):
    """Trains each row with each seed at the same budget, on the same VAEs; returns {label: run folders}.

    Each is a plain `python train.py`, which goes on where it was, and returns at once if it was done.
    """
    runs = {}
    for label, row_flags in ABLATION.items():
        for seed in seeds:
            out = run / "ablation" / f"{re.sub(r'[^a-z]+', '_', label.lower())}_seed_{seed}"
            command = [sys.executable, str(Path(__file__).with_name("train.py")), "--task", str(task),
                       "--data", str(folder), "--out", str(out), "--vae", str(run), "--seed", str(seed),
                       *row_flags, *flags]
            print("ablation:", " ".join(command[1:]), flush=True)
            if subprocess.run(command).returncode:
                raise ValueError(f"--ablation: train.py stopped in {out} (see above)")
            runs.setdefault(label, []).append(out)
    return runs


# --------------------------------------------------------------------- closed loop in the synthetic world

ROLLOUT_SEED = 1_000_000    # worlds of rollouts count from here; training episodes are numbered from 0
ASTRAY = 0.05               # metres from the script's path at which a hand counts as having left it
STRIDE = data.HZ // data.CLIP_HZ                            # steps of the world per frame of a clip
FAILURES = ("generation", "tracking", "execution")
PUBLISHED_SUCCESS = {1: ".73", 2: ".67", 3: ".53"}
PLACED = 128, 160           # the image size at which cameras are placed; each row then films in its own
CHUNKS = 3                  # observations per rollout; one carries the hand for five seconds


def observe(world, cameras, size):
    """What the robot knows now: prediction.npz's observed arrays. cameras: intrinsics (V,3,3), cam_in_world (V,4,4)."""
    intrinsics, cam_in_world = cameras
    rgb, depth, label, _ = world.observe(intrinsics, cam_in_world, size)
    labels = np.array([data.RIGHT_GRIPPER, data.LEFT_GRIPPER][:len(world.opening)])
    return dict(observed_rgb=rgb, observed_depth=depth, intrinsics=intrinsics,
                observed_gripper=label[:, None] == labels[:, None, None], observed_opening=np.array(world.opening),
                observed_gripper_in_ref=data.invert(cam_in_world[0]) @ world.gripper_in_world)


def place_cameras(world, draw, size, views, candidates=32):
    """Cameras that no episode was filmed with: of `candidates` random ones the V that see most of the hand, as a person
    would place them, when the script hides it most. A hand below a shelf is seen by few, and what no camera sees no
    tracker can follow. Returns intrinsics (V,3,3), cam_in_world (V,4,4).
    """
    world, (grippers, openings) = copy.deepcopy(world), world.demonstration
    tips = grippers[..., :3, 3] + data.TCP * grippers[..., :3, 2]
    intrinsics, cam_in_world = data.sample_cameras(draw, tips, size, candidates)
    small = 32, 40
    seen = []                                                           # gripper pixels, (frames, arms, candidates)
    for t, step in enumerate(zip(grippers, openings)):
        world.step(*step)
        if t % STRIDE == 0:
            label = world.observe(data.scale_intrinsics(intrinsics, size, small), cam_in_world, small)[2]
            seen.append([(label == arm).sum((1, 2)) for arm in range(1, 1 + len(world.opening))])
    best_view = lambda choice: np.array(seen)[..., list(choice)].max(-1)                       # (frames, arms)
    choice = list(max(permutations(range(candidates), views), key=lambda c: (best_view(c).min(), best_view(c).sum())))
    return intrinsics[choice], cam_in_world[choice]


def scripted_future(world, start, cameras, size, frames):
    """The video that a perfect generator would make: the script played on, from the world as it is, in a copy of it.

    Returns the arrays of prediction.npz, with the hands' true path (frame 0 is now).
    """
    world, (grippers, openings) = copy.deepcopy(world), world.demonstration
    intrinsics, cam_in_world = cameras
    video, path = [], [(world.gripper_in_world, world.opening)]
    for t in range(start + 1, start + 1 + frames * STRIDE):
        t_now = min(t, len(grippers) - 1)
        world.step(grippers[t_now], openings[t_now])
        if (t - start) % STRIDE == 0:
            video.append(world.observe(intrinsics, cam_in_world, size)[:2])
            path.append((world.gripper_in_world, world.opening))
    rgb, depth = (np.stack(images, 1) for images in zip(*video))                                # (V, T, H, W[, 3])
    view_in_ref = data.invert(cam_in_world[0]) @ cam_in_world
    points_in_cam, valid = data.point_maps(depth, intrinsics[:, None])
    gripper_in_world, opening = (np.stack(values) for values in zip(*path))
    return dict(rgb=rgb, points=data.transform(points_in_cam, view_in_ref), valid=valid, view_in_ref=view_in_ref,
                true_gripper_in_ref=data.invert(cam_in_world[0]) @ gripper_in_world, true_opening=opening)


def execute(world, motion, opening):
    """Move the hands as tracked: motion (T,A,4,4) from the first frame, in each hand's own; opening (T+1,A) m; at 2 Hz.

    Only the robot's own idea of where its hands are is needed, no camera pose. Straight lines between frames, at 10 Hz.
    Half a second holds an arrival and a grasp, or a grasp and a departure, and a hand must not close while it moves.
    Where the fingers move by more than 3 mm, they move last if the hand goes on in the direction that it came from (it
    arrives), and first if it takes the direction that it leaves in.
    """
    first = world.gripper_in_world
    targets = first @ motion
    path = np.concatenate([first[None], targets])[..., :3, 3]                                   # (T+1, A, 3)
    steps = np.pad(np.diff(path, axis=0), ((1, 1), (0, 0), (0, 0)))                             # (T+2, A, 3)
    heading = steps / np.linalg.norm(steps, axis=-1, keepdims=True).clip(1e-6)
    came, goes, leaves = heading[:-2], heading[1:-1], heading[2:]
    arrives = (goes * came).sum(-1) >= (goes * leaves).sum(-1)                                  # (T, A)
    grasps = np.abs(np.diff(opening, axis=0)) > 0.003
    s = np.arange(1, STRIDE + 1) / STRIDE
    early, late = (2 * s).clip(0, 1), (2 * s - 1).clip(0, 1)
    for t in range(len(targets)):
        start, start_width = world.gripper_in_world, np.array(world.opening)
        hand = np.where(grasps[t], np.where(arrives[t], early[:, None], late[:, None]), s[:, None])      # (STRIDE, A)
        fingers = np.where(grasps[t], np.where(arrives[t], late[:, None], early[:, None]), s[:, None])
        for share, width in zip(hand, start_width + fingers * (opening[t + 1] - start_width)):
            world.step(np.stack([data.between(*arm) for arm in zip(start, targets[t], share)]), width)


def bridge(path):
    """A track whose lost frames between two found ones lie on the straight line between these; elsewhere it holds."""
    in_ref, opening = path["gripper_in_ref"].copy(), path["opening"].copy()
    for a in range(in_ref.shape[1]):
        found = np.flatnonzero(~path["lost"][:, a])
        for before, after in zip(found[:-1], found[1:]):
            for t in range(before + 1, after):
                s = (t - before) / (after - before)
                in_ref[t, a] = data.between(in_ref[before, a], in_ref[after, a], s)
                opening[t, a] = opening[before, a] + s * (opening[after, a] - opening[before, a])
    return {**path, "gripper_in_ref": in_ref, "opening": opening}


def rollout(task, seed, size, imagine, generated, views=2, frames=10):
    """One try: observe, imagine, track, execute, again. Returns 'success', or what failed first.

    imagine(observation, world, start, cameras) -> the arrays of a 4D video, or None to hold still. A failure is due to
      tracking    the track left the script's path by more than 5 cm while lost, or in a true video;
      generation  it did so in a generated video, and nothing was lost;
      execution   the hand followed the script, and still the object is not where it belongs.
    """
    world = data.World(task)
    world.reset(seed)
    grippers, _ = world.demonstration
    intrinsics, cam_in_world = place_cameras(world, np.random.default_rng([task, seed, 2]), PLACED, views)
    cameras = data.scale_intrinsics(intrinsics, PLACED, size), cam_in_world
    failure = None
    for start in range(0, CHUNKS * frames * STRIDE, frames * STRIDE):
        observation = observe(world, cameras, size)
        video = imagine(observation, world, start, cameras)
        if video is None:
            return "success" if world.success() else "held still"
        path = bridge(track.track({**observation, **video}))
        execute(world, data.invert(path["gripper_in_ref"][0]) @ path["gripper_in_ref"][1:], path["opening"])
        if world.success():
            return "success"
        times = np.minimum(start + STRIDE * (1 + np.arange(frames)), len(grippers) - 1)
        ref_in_world = cameras[1][0]
        off, _ = pose_errors(ref_in_world @ path["gripper_in_ref"][1:], grippers[times])        # (T, A)
        astray = off > ASTRAY
        if failure is None and astray.any():
            failure = "generation" if generated and not (astray & path["lost"][1:]).any() else "tracking"
    return failure or "execution"


def rollouts(task, count, size, out, model=None, vaes=None, clip=None, steps=25, frames=10, device="cpu"):
    """The success rates of a trained model, of the oracle, and of holding still, on the same worlds and cameras.

    The model films in its own size; the oracle in `size`, and in the model's too, so that what the pixels cost is seen.
    """
    def generate(observation, world, start, cameras):
        seen = [observation[key] for key in ("observed_rgb", "observed_depth", "intrinsics")]
        own_points, _ = data.point_maps(*seen[1:])
        to_batch = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float32))[None].to(device)
        observed = to_batch(seen[0] / 127.5 - 1), to_batch(data.normalize_points(own_points))
        generator = torch.Generator().manual_seed(start)
        rgb, points = sample.sample_views(model, vaes, clip, *observed, frames, steps, generator=generator)
        return sample.to_prediction(*seen, rgb[0], points[0])

    oracle = lambda size: (lambda _, *now: scripted_future(*now, size, frames), False, size)
    rows = {f"oracle: the true future, {size[0]} x {size[1]}": oracle(size),
            "hold still": (lambda *_: None, False, size)}
    if model is not None:
        own = model.preset.height, model.preset.width
        rows = {f"ours, {own[0]} x {own[1]}": (generate, True, own),
                f"oracle: the true future, {own[0]} x {own[1]}": oracle(own), **rows}
    results = {}
    lines = ["| | success | Wilson 95 % | " + " | ".join(f"failed: {reason}" for reason in FAILURES) + " |",
             "|---" * 6 + "|"]
    for label, (imagine, generated, row_size) in rows.items():
        tries = range(ROLLOUT_SEED, ROLLOUT_SEED + count)
        outcomes = [rollout(task, seed, row_size, imagine, generated, frames=frames)
                    for seed in tqdm(tries, desc=label, unit="rollout")]
        won = outcomes.count("success")
        low, high = wilson_interval(won, count)
        failures = {reason: outcomes.count(reason) for reason in FAILURES}
        results[label] = dict(rollouts=count, success=won, rate=won / count, wilson=[low, high], failures=failures,
                              outcomes=outcomes)
        lines.append(f"| {label} | {won}/{count} = {won / count:.2f} | {low:.2f}-{high:.2f} | "
                     + " | ".join(str(failures[reason]) for reason in FAILURES) + " |")
    lines.append(f"| *paper: ours, 30 rollouts* | {PUBLISHED_SUCCESS[task]} | | | | |")
    lines += ["", f"- task {task} ({data.TASKS[task].name}), synthetic world. A rollout has two new cameras, the "
              f"best-seeing of 32, and at most {CHUNKS} observations, {frames} frames after each"]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rollouts.json").write_text(json.dumps(dict(task=task, size=size, rows=results), indent=1))
    (out / "rollouts.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {out}/rollouts.json, rollouts.md")
    return results


# --------------------------------------------------------------------------------------------------------- commands

def found_predictions(folder):
    folders = sorted(path.parent for path in Path(folder).rglob("prediction.npz"))
    if not folders:
        raise ValueError(f"--predictions {folder}: no NAME/prediction.npz in there")
    return folders


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", type=int, choices=data.TASKS, help="; ".join(f"{k} {t.name}" for k, t in data.TASKS.items()))
    add("--predictions", metavar="DIR", help="score DIR/NAME/prediction.npz instead of sampling; DIR/NAME/masks.npz "
        "(gripper (V,T,H,W) bool, from SAM 2, say) and trajectory.npz are used where they are there")
    add("--data", help="packed episodes [data/task_N]")
    add("--run", help="folder that train.py wrote [runs/task_N]")
    add("--out", help="folder for the results [RUN/evaluation, or DIR]")
    add("--clips", type=int, help="at most this many test clips [all: episodes x ordered pairs of test cameras]")
    add("--views", type=int, default=2, help="views of a clip, the first is the reference")
    add("--frames", type=int, default=10, help="frames to predict, two a second")
    add("--steps", type=int, default=25, help="Euler steps of the sampler")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the sampler's noise; of the training with --ablation")
    add("--protocol", default="ours", choices=["ours", "released"],
        help="masking of depth; released: as the authors' script, pixels without depth included")
    add("--i3d", default="cached", help="weights for FVD: hub (download), a file, or cached (the hub's, if it is here)")
    add("--ablation", action="store_true", help="train and score the four rows of the paper's table")
    add("--train_steps", type=int, help="steps of each row of --ablation [train.py's default]")
    add("--preset", help="of --ablation [train.py's default]")
    add("--rollout", type=int, metavar="N", help="N closed-loop tries in the synthetic world, with RUN's model if any")
    add("--size", type=data.parse_size, default=(128, 160),
        help="HEIGHTxWIDTH of the oracle's video in --rollout, pixels")
    args = parser.parse_args()
    if not args.task and not args.predictions:
        raise ValueError("say --task N, or --predictions DIR")
    if args.predictions:
        folder = Path(args.predictions)
        compare({folder.name or "predictions": [found_predictions(folder)]}, args.out or folder, args.task, args.i3d,
                args.protocol)
        return
    run, folder = Path(args.run or f"runs/task_{args.task}"), args.data or f"data/task_{args.task}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    predictions = lambda run, seed: sample_test(run, folder, run / "evaluation" / f"seed_{seed}", seed, args.clips,
                                                args.views, args.frames, args.steps, device)
    if args.rollout:
        loaded = None, None, None
        if (run / "model.json").exists():
            loaded = sample.load_run(run, device)
        else:
            print(f"no model in {run}: oracle and hold-still rows only")
        rollouts(args.task, args.rollout, args.size, args.out or run / "rollouts", *loaded, args.steps, args.frames,
                 device)
        return
    if args.ablation:
        flags = ["--steps", str(args.train_steps)] if args.train_steps else []
        flags += ["--preset", args.preset] if args.preset else []
        runs = train_ablation(args.task, folder, run, args.seeds, flags)
        methods = {label: [predictions(trained, seed) for trained, seed in zip(trained_runs, args.seeds)]
                   for label, trained_runs in runs.items()}
        compare(methods, args.out or run / "ablation", args.task, args.i3d, args.protocol, runs["ours"][0])
        return
    compare({"ours": [predictions(run, seed) for seed in args.seeds]}, args.out or run / "evaluation", args.task,
            args.i3d, args.protocol, run)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"evaluate.py: {error}")
