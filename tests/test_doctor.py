"""The doctor: what it finds, and that every problem comes with what to do."""

import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from cvlib import assets, doctor, loading


def test_this_machine():
    found = {item.name: item for item in doctor.examine()}
    assert {"python", "libraries", "processor", "device", "memory", "disk", "running model"} <= set(found)
    assert all(item.value for item in found.values())
    assert f"torch {torch.__version__.split('+')[0]}" in found["libraries"].value
    assert f"{os.cpu_count()} cores" in found["processor"].value
    assert found["running model"].value == "in the cache, verified"


def test_two_lines_for_a_notebook():
    lines = doctor.summary().splitlines()
    assert len(lines) == 2
    assert "bitsandbytes" in lines[0]
    assert lines[1].endswith(loading.device_and_dtype()[1])


@pytest.mark.parametrize(
    ("name", "major", "minor", "memory", "mend"),
    [("Tesla T4", 7, 5, 16e9, ""), ("Tesla V100", 7, 0, 16e9, "8-bit"), ("GeForce RTX 2080 Ti", 7, 5, 11.5e9, "")],
)
def test_cards(name, major, minor, memory, mend, monkeypatch):
    about = SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    value, todo = doctor.card("cuda")
    assert value == f"{name}, capability {major}.{minor}, {memory / 1e9:.1f} GB"
    assert mend in todo
    assert bool(todo) == bool(mend)


def test_no_card():
    assert "no CUDA card" in doctor.card("cpu")[1]


@pytest.mark.parametrize(
    ("script", "device", "value", "mend"),
    [
        ("echo 550.54.15; echo 550.54.15", "cuda", "550.54.15", ""),
        ("echo 550.54.15", "cpu", "550.54.15", "install a CUDA build of torch"),
        ("echo no devices >&2; exit 9", "cpu", "does not answer", "run nvidia-smi"),
    ],
)
def test_driver(script, device, value, mend, monkeypatch, tmp_path):
    (program := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (found,) = doctor.driver(device)
    assert (found.name, found.value) == ("driver", value)
    assert mend in found.mend
    assert bool(mend) == bool(found.mend)


def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver("cpu") == []


@pytest.mark.parametrize(("gigabytes", "fits"), [(1, False), (32, True)])
def test_which_recipes_fit(gigabytes, fits, monkeypatch):
    sizes = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": gigabytes * 10**6}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert doctor.main_memory() == gigabytes * 10**9
    found = {item.name: item for item in doctor.budgets("cpu", "bfloat16")}
    assert {"recipe smollm2-cpu", "recipe smollm2-zh"} <= set(found)
    for item in found.values():
        assert bool(item.mend) != fits
        assert f"of {gigabytes}.0 GB" in item.value or item.value == "does not fit"


def test_memory_where_the_system_does_not_say(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert doctor.main_memory() == 0
    assert doctor.budgets("cpu", "float32") == []


@pytest.mark.parametrize("free", [1e9, 50e9])
def test_disk_of_a_cache_that_does_not_exist_yet(free, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setenv("CVLIB_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, free if folder == tmp_path else 0))
    found = doctor.disk()
    assert found.value == f"{free / 1e9:.0f} GB free for the cache"
    assert bool(found.mend) == (free < 3e9)


def test_a_model_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("CVLIB_HOME", str(tmp_path))
    value, mend = doctor.running_model()
    assert value == "not fetched yet"
    assert mend == f"run: cvlib assets smollm2-135m ({assets.find('smollm2-135m').download / 1e6:.0f} MB)"
