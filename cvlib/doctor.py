"""What this machine can do: asked before a long run, not learnt from its failure.

`examine` lists what was found as `Finding`s; the command line and the notebooks' setup cell print them.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

from cvlib import assets, loading

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


def examine() -> list[Finding]:
    """Processor, card, number format, memory, disk and versions."""
    device, dtype = loading.device_and_dtype()
    return [
        Finding("python", platform.python_version()),
        Finding("libraries", versions()),
        Finding("processor", f"{os.cpu_count()} cores, {capability()}"),
        Finding("device", *card(device)),
        Finding(
            "16-bit format", dtype, "" if dtype != "float32" else "no fast bfloat16 here: expect a third of the speed"
        ),
        memory(),
        disk(),
        Finding("running model", *running_model()),
    ]


def capability() -> str:
    """The widest vector instructions torch uses here, and whether they multiply bfloat16."""
    import torch

    native = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{torch.backends.cpu.get_cpu_capability()} {native} native bfloat16"


def card(device: str) -> tuple[str, str]:
    """The accelerator, its capability and memory, and what follows for older ones."""
    if device != "cuda":
        return device, "" if device == "mps" else "no CUDA card: the notebooks run, the 7B recipes do not"
    import torch

    about = torch.cuda.get_device_properties(0)
    value = f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 1e9:.1f} GB"
    if (about.major, about.minor) < (7, 5):
        return value, "8-bit training needs capability 7.5 (Turing) or newer: use bits: 16"
    return value, ""


def memory() -> Finding:
    """Main memory of this machine."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError):
        return Finding("memory", "unknown on this system")
    return Finding(
        "memory", f"{total:.1f} GB", "" if total >= 6 else "the notebooks need about 6 GB: close other programs"
    )


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
