"""The rasteriser against surfaces with a known depth, mesh files, and the shading of pictures."""
import struct

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import data

H, W = 61, 83
INTRINSICS = np.array([[70.0, 0, 40.3], [0, 75.0, 29.1], [0, 0, 1]])
DIRECTIONS = np.stack([*np.meshgrid(np.arange(W), np.arange(H)), np.ones((H, W))], -1) @ np.linalg.inv(INTRINSICS).T


def random_camera(draw, distance=1.0):
    """world_in_cam (4,4) of a camera that looks roughly at the origin from `distance`, at any roll."""
    world_in_cam = np.eye(4)
    world_in_cam[:3, :3] = Rotation.random(random_state=draw.integers(1 << 30)).as_matrix()
    world_in_cam[:3, 3] = *draw.uniform(-0.1, 0.1, 2), distance
    return world_in_cam


def ball(radius, rings=200, segments=400):
    turn = np.linspace(0, np.pi, rings)
    return data.lathe(*zip(radius * np.sin(turn), -radius * np.cos(turn)), segments=segments)


def seen(mesh, world_in_cam, **options):
    return data.rasterize(data.transform(mesh[0], world_in_cam)[None], mesh[1], INTRINSICS, H, W, **options)


def test_plane_that_passes_below_the_camera():
    """A floor that reaches behind the camera: nothing to clip, and its depth is that of the plane in every pixel."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        corners = np.array([(-9, -9, 0), (9, -9, 0), (9, 9, 0), (-9, 9, 0)], float)
        cam_in_world = data.look_at(draw.uniform((-1, -1, 0.3), (1, 1, 1.5)), draw.uniform((-3, -3, 0), (3, 3, 0.5)))
        world_in_cam = data.invert(cam_in_world)
        depth, face = seen((corners, np.array([(0, 1, 2), (0, 2, 3)])), world_in_cam)
        ray = DIRECTIONS @ cam_in_world[:3, :3].T
        true = -cam_in_world[2, 3] / np.where(ray[..., 2] < 0, ray[..., 2], np.nan)
        on = data.transform(DIRECTIONS * true[..., None], cam_in_world)
        hit = np.isfinite(true) & (np.abs(on[..., :2]) < 9).all(-1)
        assert hit.sum() > 500
        np.testing.assert_array_equal(depth[0] > 0, hit)
        np.testing.assert_array_equal(face[0] >= 0, hit)
        np.testing.assert_allclose(depth[0][hit], true[hit], rtol=1e-6)


def test_box():
    """Depth and outline of a box are exact: the same pixels are hit as by the rays through the pixel centres."""
    draw = np.random.default_rng(1)
    for _ in range(20):
        size = draw.uniform(0.1, 0.6, 3)
        world_in_cam = random_camera(draw)
        cam_in_world = data.invert(world_in_cam)
        ray, eye = DIRECTIONS @ cam_in_world[:3, :3].T, cam_in_world[:3, 3]
        crossings = np.sort((np.array([-1, 1])[:, None, None, None] * size / 2 - eye) / ray, axis=0)  # (2,H,W,3) slabs
        enter, leave = crossings[0].max(-1), crossings[1].min(-1)
        hit = enter < leave
        for cull in (False, True):
            depth, _ = seen(data.box(size), world_in_cam, cull=cull)
            np.testing.assert_array_equal(depth[0] > 0, hit)
            np.testing.assert_allclose(depth[0][hit], enter[hit], rtol=1e-6)


def test_sphere():
    draw = np.random.default_rng(2)
    mesh = ball(0.3)
    for _ in range(5):
        world_in_cam = random_camera(draw, 1.2)
        centre = world_in_cam[:3, 3]
        b, a = DIRECTIONS @ centre, (DIRECTIONS**2).sum(-1)
        root = b**2 - a * (centre @ centre - 0.3**2)
        hit = root > 0
        true = (b - np.sqrt(root.clip(0))) / a
        depth, _ = seen(mesh, world_in_cam)
        assert ((depth[0] > 0) != hit).sum() <= 3             # the polyhedron lies 1e-4 inside its sphere
        inner = hit & (root > 0.05 * root.max())              # near the outline, a little inside means much deeper
        assert np.abs(depth[0] - true)[inner].max() < 2e-4


def test_no_cracks_and_the_nearer_face_wins():
    depth, _ = seen(ball(0.3, 25, 40), random_camera(np.random.default_rng(3)))
    for row in depth[0] > 0:                                  # a row through a ball is one run of pixels
        assert np.abs(np.diff(row.astype(int))).sum() <= 2
    near, far = data.box((0.2, 0.2, 0.2), (0, 0, 1)), data.box((0.6, 0.6, 0.2), (0, 0, 1.5))
    for order in ((near, far), (far, near)):
        vertices, faces = data.merge(*order)
        depth, _ = seen((vertices, faces), np.eye(4))
        alone = [seen(mesh, np.eye(4))[0] for mesh in (near, far)]
        np.testing.assert_array_equal(depth, np.where(alone[0] > 0, alone[0], alone[1]))


def test_many_cameras_are_many_single_ones():
    draw = np.random.default_rng(4)
    vertices, faces = ball(0.3, 9, 12)
    poses = np.stack([random_camera(draw) for _ in range(3)])
    vertices_in_cam = data.transform(np.broadcast_to(vertices, (3, *vertices.shape)), poses)
    for size in ((H, W), (H * 9, W * 9)):                   # the larger one is done in groups of cameras
        depth, face = data.rasterize(vertices_in_cam, faces, INTRINSICS, *size)
        for k in range(3):
            one_depth, one_face = data.rasterize(vertices_in_cam[k:k + 1], faces, INTRINSICS[None], *size)
            np.testing.assert_array_equal(depth[k], one_depth[0])
            np.testing.assert_array_equal(face[k], one_face[0])


def test_nothing_in_view():
    behind = data.box((0.2, 0.2, 0.2), (0, 0, -1))
    depth, face = seen(behind, np.eye(4))
    assert depth.dtype == np.float32 and face.dtype == np.int32
    assert (depth == 0).all() and (face == -1).all()


def test_primitives_are_closed_and_point_outward():
    """Every edge of a solid is shared by two faces in opposite directions, and its signed volume is positive."""
    gripper = data.gripper_mesh()
    for vertices, faces in (data.box((1, 2, 3)), data.capsule(0.4, 0.1), ball(1, 8, 12),
                            data.lathe((1, 0), (1, 1), (0.9, 1), (0.9, 0.1)), gripper["hand"], gripper["finger"]):
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        there, back = (set(map(tuple, e)) for e in (edges, edges[:, ::-1]))
        assert there == back and len(there) == len(edges)
        a, b, c = vertices[faces].transpose(1, 0, 2)
        assert (a * np.cross(b, c)).sum() > 0


def test_gripper_has_the_franka_hands_dimensions():
    gripper = data.gripper_mesh()
    hand, finger = gripper["hand"][0], gripper["finger"][0]
    assert np.abs(hand).max(0)[1] == pytest.approx(0.103, abs=0.002)             # 204 mm wide
    assert hand[:, 2].max() == pytest.approx(0.0659, abs=0.001)
    assert finger[:, 2].max() == pytest.approx(0.1063, abs=0.001)
    assert finger[:, 1].min() == 0                                               # pads touch at opening 0


def test_mesh_files(tmp_path):
    (tmp_path / "quad.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nvn 0 0 1\nv 0 1 0.5\nf 1/1/1 2//1 3 4\nf -4 -3 -2\n")
    vertices, faces = data.load_mesh(tmp_path / "quad.obj")
    assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5]]
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]

    vertices, faces = data.box((1, 2, 3))
    triangles = vertices[faces].astype(np.float32)
    binary = b"solid of a binary kind".ljust(80) + struct.pack("<I", len(triangles))
    binary += b"".join(struct.pack("<12fH", 0, 0, 0, *t.ravel(), 0) for t in triangles)
    (tmp_path / "binary.stl").write_bytes(binary)
    ascii_ = "\n".join(["solid box"] + ["facet normal 0 0 0\nouter loop\n"
                                        + "".join(f"vertex {x} {y} {z}\n" for x, y, z in t)
                                        + "endloop\nendfacet" for t in triangles] + ["endsolid"])
    (tmp_path / "ascii.STL").write_text(ascii_)
    for name in ("binary.stl", "ascii.STL"):
        read_vertices, read_faces = data.load_mesh(tmp_path / name)
        assert len(read_vertices) == len(vertices) and read_faces.dtype == np.int64
        np.testing.assert_array_equal(read_vertices[read_faces], triangles)


@pytest.mark.parametrize("name, content", [
    ("none.obj", None), ("empty.obj", b""), ("points.obj", b"v 0 0 0\nv 1 0 0\n"), ("far.obj", b"v 0 0 0\nf 1 2 3\n"),
    ("word.obj", b"v a b c\nf 1 1 1\n"), ("cut.stl", bytes(80) + struct.pack("<I", 7) + bytes(100)),
    ("noise.stl", bytes(range(256))), ("hand.ply", b"ply\n"),
    ("nan.obj", b"v nan 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n"), ("zero.stl", bytes(84))])
def test_bad_mesh_files_are_named_in_one_line(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.load_mesh(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_shadow_of_a_ball_on_a_table():
    """A pixel of the table is in the shade exactly where the ball stands between it and the lamp."""
    lamp, centre, radius = np.array([0.5, -0.6, 1.8]), np.array([0.05, 0.1, 0.3]), 0.15
    bodies = [data.Body(data.box((2, 2, 0.1), (0, 0, -0.05)), data.plain((0.8, 0.8, 0.8))),
              data.Body(ball(radius, 40, 60), data.plain((1, 0, 0)), data.OBJECT)]
    poses = np.stack([np.eye(4), data.pose(centre)])
    cam_in_world = np.stack([data.look_at((0.7, 0.4, 1.0), (0, 0, 0)), data.look_at((-0.6, 0.5, 1.1), (0, 0, 0))])
    intrinsics = np.tile(INTRINSICS, (2, 1, 1))
    rgb, depth, label, normal = data.render(bodies, poses, intrinsics, cam_in_world, (H, W), tuple(lamp))
    points = data.transform(data.unproject(depth, intrinsics), cam_in_world)
    table = (label == data.OTHER) & (depth > 0) & (np.abs(points[..., :2]) < 0.7).all(-1)
    np.testing.assert_allclose(points[table][:, 2], 0, atol=1e-5)
    np.testing.assert_allclose(normal[table], np.tile((0, 0, 1), (table.sum(), 1)), atol=1e-6)
    to_lamp = lamp - points[table]
    to_lamp /= np.linalg.norm(to_lamp, axis=1, keepdims=True)
    to_centre = centre - points[table]
    off_axis = np.linalg.norm(to_centre - (to_centre * to_lamp).sum(1, keepdims=True) * to_lamp, axis=1)
    dark = rgb[table].max(1) < 125
    assert dark[off_axis < radius - 0.012].all() and (off_axis < radius - 0.012).sum() > 100
    assert not dark[off_axis > radius + 0.012].any()
    assert (rgb[label == data.OBJECT][:, 1:] == 0).all() and (label == data.OBJECT).sum() > 100


def test_samples_smooth_the_colours_and_leave_the_geometry():
    bodies = [data.Body(data.box((2, 2, 0.1), (0, 0, -0.05)), data.checks((1, 1, 1), (0, 0, 0), 0.02))]
    cameras = INTRINSICS[None], data.look_at((0.7, 0.4, 1.0), (0, 0, 0))[None], (H, W)
    one, many = (data.render(bodies, np.eye(4)[None], *cameras, samples=samples) for samples in (1, 3))
    for a, b in zip(one[1:], many[1:]):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert many[0].astype(float).std() < 0.8 * one[0].astype(float).std()
