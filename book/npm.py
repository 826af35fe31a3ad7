"""A package of the npm registry, fetched by npm itself, verified, and unpacked under `_build/npm`.

The slides need reveal.js and the page tests axe-core; neither is in a Python package that keeps up with them.
"""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "_build" / "npm"
PINNED = {
    "reveal.js": ("6.0.2", "2f0c20bfb02447a198a1ebe8a8c097a5437d035caa38f2820bf4ba887a3eac91"),
    "axe-core": ("4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"),
}


class NotAvailable(Exception):
    """Why the package could not be had, in one line."""


def package(name: str) -> Path:
    """Folder of the pinned version of `name`.

    Raises:
        NotAvailable: no npm on this machine, no way to the registry, or a file that is not the one we know.
    """
    version, sha256 = PINNED[name]
    folder = FOLDER / f"{name}-{version}"
    if folder.exists():
        return folder
    if not shutil.which("npm"):
        raise NotAvailable(f"{name} comes from npm, which is not on this machine: install Node.js")
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=FOLDER, capture_output=True, text=True)
    archive = FOLDER / f"{name}-{version}.tgz"
    if done.returncode or not archive.exists():
        raise NotAvailable(f"npm could not fetch {name} {version}; check the network: {done.stderr.strip()[-200:]}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        archive.unlink()
        raise NotAvailable(f"{archive.name} is not the file this book was made with; fetched and dropped")
    with tarfile.open(archive) as tar:
        tar.extractall(FOLDER / "unpacked", filter="data")
    (FOLDER / "unpacked" / "package").rename(folder)
    return folder
