"""Downloading public episodes (data.py --source hub), against a stand-in for the two hub calls in use. No network."""
import shutil
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest

import data as D

RECORDED = next((Path(__file__).parent / "data" / "recorded").rglob("processed"))
File, Folder = namedtuple("File", "path size"), namedtuple("Folder", "path tree_id")
SIZE = (32, 40)


class Hub:
    """A dataset repo of `count` episodes, each a copy of the recorded one, with files that nobody needs beside them."""

    def __init__(self, monkeypatch, count=3, observations_bytes=1000):
        self.fetched, self.error, self.fail_at = [], None, None
        self.tree = [Folder(f"{D.TASKS[1].folder}/2025-01-01", "x")]
        for k in (10, 2, 1)[:count]:                                  # not in order: episode_10 comes last all the same
            folder = f"{D.TASKS[1].folder}/2025-01-01/diffusion_spartan/episode_{k}/processed"
            self.tree += [Folder(folder, "x"), File(f"{folder}/observations.npz", observations_bytes)]
            others = ("intrinsics.npz", "extrinsics.npz", "metadata.yaml")
            self.tree += [File(f"{folder}/{name}", 10) for name in others]
            self.tree += [File(f"{folder}/video.mp4", 10 ** 12)]
            self.tree += [File(folder.replace("processed", "raw") + "/observations.npz", 5)]
        incomplete = f"{D.TASKS[1].folder}/2025-01-02/diffusion_spartan/episode_0/processed"
        self.tree.append(File(f"{incomplete}/observations.npz", 7))
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def list_repo_tree(self, repo_id, path_in_repo=None, *, recursive=False, repo_type=None):
        assert (repo_id, path_in_repo, recursive, repo_type) == (D.HUB_DATASET, D.TASKS[1].folder, True, "dataset")
        if self.error:
            raise self.error
        return iter(self.tree)

    def hf_hub_download(self, repo_id, filename, *, repo_type=None, local_dir=None):
        assert repo_id == D.HUB_DATASET and repo_type == "dataset" and filename in {entry.path for entry in self.tree}
        if self.fail_at == len(self.fetched):
            raise ConnectionError("the line went dead")
        self.fetched.append(filename)
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RECORDED / target.name, target)
        return str(target)


def test_downloads_packs_and_deletes(tmp_path, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    assert D.prepare(1, tmp_path, "hub", SIZE, episodes=2) == 2
    assert [Path(name).parts[3] for name in hub.fetched] == 4 * ["episode_1"] + 4 * ["episode_2"]
    assert {Path(name).name for name in hub.fetched} <= set(D.NEEDED_FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episode_000", "episode_001"]
    episode = D.load_episode(tmp_path / "episode_001")
    assert episode.info["name"] == "2025-01-01/diffusion_spartan/episode_2" and episode.rgb.shape[2:4] == SIZE
    assert "3 episodes, 0 packed here; 2 to download, 0.00 GB" in capsys.readouterr().out

    assert D.prepare(1, tmp_path, "hub", SIZE, keep_raw=True) == 3                          # only the third is fetched
    assert len(hub.fetched) == 12 and len(list((tmp_path / "raw").rglob("observations.npz"))) == 1
    assert len(D.episode_folders(tmp_path)) == 3


def test_goes_on_after_an_interruption(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    hub.fail_at = 6
    with pytest.raises(ValueError, match="ConnectionError.*--source FOLDER") as caught:
        D.download_episodes(1, tmp_path, SIZE)
    assert "\n" not in str(caught.value) and len(D.episode_folders(tmp_path)) == 1
    hub.fail_at = None
    assert D.download_episodes(1, tmp_path, SIZE) == 3
    assert sum("episode_1/" in name for name in hub.fetched) == 4                     # the first: once


def test_full_disk_stops_before_the_download(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, observations_bytes=2 * 10 ** 9)
    monkeypatch.setattr(D.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(9e9, 6.9e9, 2.1e9))
    with pytest.raises(ValueError, match=r"has 2.10 GB free, 6.\d\d GB are needed: .*fewer --episodes.*no --keep_raw"):
        D.download_episodes(1, tmp_path, SIZE, keep_raw=True)
    assert not hub.fetched
    D.download_episodes(1, tmp_path, SIZE, episodes=1)                          # one at a time: little above 2 GB
    assert len(hub.fetched) == 4


def test_gated_or_offline_hub_is_one_line(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    hub.error = OSError("a long story\nin many lines")
    with pytest.raises(ValueError, match="OSError.*hf auth login") as caught:
        D.download_episodes(1, tmp_path / "out", SIZE)
    assert "\n" not in str(caught.value)
    hub.error, hub.tree = None, []
    with pytest.raises(ValueError, match="lists no complete episode under BimanualStore"):
        D.download_episodes(1, tmp_path / "out", SIZE)
    assert not (tmp_path / "out").exists()
