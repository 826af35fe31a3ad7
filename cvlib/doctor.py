"""What this machine can do: asked before a long run, not learnt from its failure.

`examine` lists what was found as `Finding`s; the command line and the notebooks' setup cell print them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata

from cvlib import assets, fitting, loading, recipes, shapes

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Finding:
    """One fact about this machine; `mend` says what to do if it is a problem."""

    name: str
    value: str
    mend: str = ""


def versions() -> str:
    """The versions that decide a result, in one line."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)


def summary() -> str:
    """Versions and device in two lines, for the head of a notebook."""
    device, dtype = loading.device_and_dtype()
    value = card(device)[0] if device == "cuda" else f"{device}, {os.cpu_count()} cores, {capability()}"
    return f"Python {platform.python_version()}, {versions()}\n{value}; computing in {dtype}"


def examine() -> list[Finding]:
    """Processor, card, number format, memory, disk and versions."""
    device, dtype = loading.device_and_dtype()
    return [
        Finding("python", platform.python_version()),
        Finding("libraries", versions()),
        Finding("processor", f"{os.cpu_count()} cores, {capability()}"),
        Finding("device", *card(device)),
        *driver(device),
        Finding(
            "16-bit format", dtype, "" if dtype != "float32" else "no fast bfloat16 here: expect a third of the speed"
        ),
        Finding("memory", f"{main_memory() / 1e9:.1f} GB" if main_memory() else "unknown on this system"),
        disk(),
        Finding("running model", *running_model()),
        Finding("recipes", f"counted for {device} in {dtype}; for a card in float16: cvlib memory RECIPE --card GB"),
        *budgets(device, dtype),
    ]


def capability() -> str:
    """The widest vector instructions torch uses here, and whether they multiply bfloat16."""
    import torch

    native = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{torch.backends.cpu.get_cpu_capability()} {native} native bfloat16"


def card(device: str) -> tuple[str, str]:
    """The accelerator, its capability and memory, and what follows for older ones."""
    if device != "cuda":
        return (
            device,
            "" if device == "mps" else "no CUDA card: the notebooks run; 7B and 13B are slow here, even where they fit",
        )
    import torch

    about = torch.cuda.get_device_properties(0)
    value = f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 1e9:.1f} GB"
    if (about.major, about.minor) < (7, 5):
        return value, "8-bit training needs capability 7.5 (Turing) or newer: use bits: 16"
    return value, ""


def driver(device: str) -> list[Finding]:
    """NVIDIA's driver, asked of `nvidia-smi`; also where it is installed and torch cannot use the card."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True)
    if asked.returncode:
        return [Finding("driver", "does not answer", "run nvidia-smi and see what it says; a new driver may be needed")]
    version = asked.stdout.split("\n")[0]
    unused = "there is a card, but this torch cannot use it: install a CUDA build of torch" if device == "cpu" else ""
    return [Finding("driver", version, unused)]


def main_memory() -> int:
    """Bytes of main memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 0


def budgets(device: str, dtype: str) -> list[Finding]:
    """For every shipped recipe, whether it trains in the memory of this device, or what to change."""
    if device == "cuda":
        import torch

        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = main_memory()
    found = []
    for name in recipes.names() if room else ():
        recipe = recipes.load(name)
        fits, line = fitting.fits(recipe, shapes.shape_of(recipe.base), room, device, dtype)
        found.append(Finding(f"recipe {name}", line if fits else "does not fit", "" if fits else line))
    return found


def disk() -> Finding:
    """Free space where models and data are kept."""
    folder = assets.home()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    return Finding("disk", f"{free:.0f} GB free for the cache", "" if free >= 3 else "make room, or set CVLIB_HOME")


def running_model() -> tuple[str, str]:
    """Whether the running model is here already."""
    asset = assets.find("smollm2-135m")
    if assets.cached(asset):
        return "in the cache, verified", ""
    return "not fetched yet", f"run: cvlib assets smollm2-135m ({asset.download / 1e6:.0f} MB)"
