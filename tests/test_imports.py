"""The order of the house: a module imports only what stands above it here, and `import cvlib` brings nothing heavy."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cvlib

ORDER = (
    "recipes",
    "assets",
    "pieces",
    "texts",
    "vocabulary",
    "ranks",
    "learner",
    "extension",
    "messages",
    "questions",
    "lora",
    "quantization",
    "shapes",
    "activations",
    "memory",
    "fitting",
    "show",
    "sources",
    "templates",
    "duplicates",
    "contamination",
    "mixture",
    "attention",
    "batching",
    "census",
    "embeddings",
    "loading",
    "doctor",
    "sampling",
    "generation",
    "server",
    "engines",
    "intervals",
    "evaluation",
    "behaviour",
    "exams",
    "domains",
    "adapters",
    "checkpoints",
    "callbacks",
    "training",
    "export",
    "chat",
    "web",
    "commands",
    "__main__",
)
PACKAGE = Path(cvlib.__file__).parent
LIGHT = ("recipes", "assets", "messages", "templates")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "matplotlib", "yaml", "tqdm")


def modules() -> dict[str, list[Path]]:
    """Every module with its files: one, or all of its folder."""
    files = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    folders = {path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")}
    return files | folders


def imported(source: str) -> set[str]:
    """Names of our modules that a source imports, at its top or inside a function, in any form."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("cvlib.")}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:  # from . import x, from .x import y
                parts = ["cvlib", *filter(None, parts)]
            if parts[0] == "cvlib":
                found |= {parts[1]} if parts[1:] else {name.name for name in node.names}
    return found & {*ORDER, *modules()}


def test_every_form_of_import_is_seen():
    source = """
import cvlib.lora
from cvlib import InputError, show as pictures
from . import batching
def f():
    from cvlib.training import train
    from .chat import Chat
    import torch, cvlib.export as e
"""
    assert imported(source) == {"lora", "show", "batching", "training", "chat", "export"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_stands_above_it(name):
    assert name in ORDER, f"cvlib/{name}.py has no place in the table; put it behind everything it imports"
    above = ORDER[: ORDER.index(name)]
    for path in modules()[name]:
        assert imported(path.read_text(encoding="utf-8")) - {name} <= set(above), path


@pytest.mark.parametrize("name", [None, *LIGHT])
def test_light_modules_bring_nothing_heavy(name):
    statement = "import cvlib" + (f".{name}" if name else "")
    code = f"import sys; {statement}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    allowed = {"yaml"} if name == "recipes" else set()
    assert not loaded & (set(HEAVY) - allowed)


def fastest(*arguments: str, runs: int = 5) -> float:
    """Seconds of the quickest of several runs: what the program itself takes, without what else the machine did."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def test_import_and_help_are_quick():
    bare = fastest("-c", "pass")
    assert fastest("-c", "import cvlib") - bare < 0.3
    assert fastest("-m", "cvlib", "--help") - bare < 0.5
