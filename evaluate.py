"""Scores 4D predictions: the paper's metrics, its baselines, its ablation, and rollouts in the synthetic world.

    python evaluate.py --task 1                        # sample every test clip, track, score: runs/task_1/evaluation/
    python evaluate.py --predictions DIR               # score anybody's DIR/NAME/prediction.npz files (format: sample.py)
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
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.spatial import cKDTree

import data

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

    Gaussian window, sigma 1.5, 11 x 11; population covariance; mean over channels and over the pixels whose whole window
    lies in the image (and in `valid` (N, H, W), if given).
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
    # p > 0: behind the camera both quotients are negative, which is less than 1.25 too
    return float(np.mean((p > 0) & (p < 1.25 * g) & (g < 1.25 * p))) if len(g) else float("nan")


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
    """Squared Frechet distance of the Gaussians fitted to features a (N, D) and b (M, D); 0 is ideal (arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S = X^T X the sample covariances (ddof 1) of centred features X.
    S_a S_b has the eigenvalues of (X_a X_b^T)(X_a X_b^T)^T, so the trace of its root is the sum of the singular values of
    X_a X_b^T: no root of a matrix, no complex numbers, and singular covariances (few clips, 400 features) lose no digits.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"frechet_distance needs two samples in each set, got {len(a)} and {len(b)}")
    x_a, x_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    trace_of_root = np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x_a ** 2).sum() + (x_b ** 2).sum() - 2 * trace_of_root)


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
    """IoU of the gripper's mask in view n, carried into camera m by n's predicted points, with m's own mask; (T,) values.

    points (T,H,W,3): view n's pointmap, reference frame (= n's camera); gripper_n, gripper_m (T,H,W) bool; ref_in_m
    (4,4): the true camera m, needed for scoring only. Every pixel of n is cut into 3 x 3 (otherwise a near n leaves
    holes in m), all of them are splatted into m with a z-buffer, and the nearest decides what m's pixel shows.

    As it stands this is the paper's metric, whose ceiling is far below 1: what m sees of the hand and n does not can never
    be covered, and a mask of 60 pixels is half boundary. For a metric on which the truth scores >= 0.9, give
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
        fine = np.concatenate([points[i, ..., :2] + shift, np.broadcast_to(points[i, ..., 2:], (*shift.shape[:3], 1))], -1)
        shown, z = splat(data.transform(fine, ref_in_m), np.broadcast_to(gripper_n[i], fine.shape[:3]), intrinsics_m,
                         (height, width))
        if z_m is not None:
            shown &= z < np.where(z_m[i] > 0, z_m[i], np.inf) + 0.03
        own = gripper_m[i]
        hit = (shown & grow(own)).sum()
        wrong = (shown & ~grow(own)).sum()
        missed = ((own if seen is None else own & seen[i]) & ~grow(shown)).sum()
        ious[i] = hit / (hit + wrong + missed) if hit + wrong + missed else np.nan
    return ious


def splat(points_in_cam, carried, intrinsics, size):
    """Z-buffer of points: (H, W) bool, what the nearest point on each pixel carries (False: none), and its z (inf: none)."""
    in_front = points_in_cam[..., 2] > 1e-3
    points, carried = points_in_cam[in_front], carried[in_front]                                # (N, 3), (N,)
    pixels, z = data.project(points, intrinsics)
    column, row = np.rint(pixels).astype(int).T
    inside = (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
    column, row, z, carried = column[inside], row[inside], z[inside], carried[inside]
    far_first = np.argsort(-z)                                          # of repeated pixels numpy keeps the last written
    shown, nearest = np.zeros(size, bool), np.full(size, np.inf)
    shown[row[far_first], column[far_first]] = carried[far_first]
    nearest[row[far_first], column[far_first]] = z[far_first]
    return shown, nearest


def pose_errors(pred_in_ref, true_in_ref):
    """Translation (m) and rotation angle (rad) between poses (..., 4, 4): two arrays (...,).

    The angle of R = R_pred^T R_true from its sine and cosine: exact for small angles, where arccos loses half the digits.
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
    """Wilson's 95 % interval of a success rate (Brown et al. 2001, eq. 4): honest at 0 and at 1, unlike +- 1.96 sigma."""
    if not trials:
        return 0.0, 1.0
    p, n = successes / trials, trials
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
