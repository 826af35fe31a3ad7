"""Give the book another address: `make repo URL=https://github.com/you/your-fork`.

The address is one setting, `repository.url` in `_config.yml`; the pages' edit, issue and Colab buttons follow it.
Badges, setup cells and `git clone` lines must repeat it, because Colab and a reader's terminal see one file and no
setting. This script writes it into all of them, and tests/test_repository.py holds them equal.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import yaml
from build import normalised

ROOT = Path(__file__).resolve().parent.parent
TEXT = {".cff", ".ipynb", ".md", ".toml", ".yml"}


def main() -> int:
    url = sys.argv[1].removesuffix("/").removesuffix(".git") if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        remedy = "give the address as URL=https://github.com/owner/name, where Colab can open the notebooks"
        print(f"{url or 'no address'}: {remedy}", file=sys.stderr)
        return 2
    old = address(ROOT)
    changed = move(ROOT, old, url)
    print(f"{old} → {url}: {len(changed)} files rewritten")
    return 0


def address(root: Path) -> str:
    """The book's address: the one setting."""
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]


def texts(root: Path) -> list[Path]:
    """The files that may name the address: text, outside environments, caches and builds."""
    skipped = ("_build", "runs", "node_modules")
    folders = [
        path
        for path in root.iterdir()
        if path.is_dir() and path.name not in skipped and (path.name == ".github" or not path.name.startswith("."))
    ]
    found = [path for folder in folders for path in folder.rglob("*")] + list(root.iterdir())
    return sorted(
        path for path in found if path.suffix in TEXT and path.is_file() and ".ipynb_checkpoints" not in path.parts
    )


def move(root: Path, old: str, new: str) -> list[Path]:
    """Write `new` wherever a GitHub or Colab address names `old`; the files that changed."""
    was, now = (url.removeprefix("https://github.com/") for url in (old, new))
    pattern = re.compile(rf"(?<=github\.com/){re.escape(was)}(?![\w-])|(?<=com/github/){re.escape(was)}(?![\w-])")
    changed = []
    for path in texts(root):
        before = path.read_text(encoding="utf-8")
        after = pattern.sub(now, before)
        if after == before:
            continue
        if path.suffix == ".ipynb":  # a cell's id comes from its text
            nbformat.write(normalised(nbformat.reads(after, as_version=4)), path)
        else:
            path.write_text(after, encoding="utf-8")
        changed.append(path)
    return changed


if __name__ == "__main__":
    sys.exit(main())
