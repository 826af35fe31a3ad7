"""What leaves the house: base + adapter → one model folder (`merging`) → one GGUF file for llama.cpp (`llama_cpp`).

    found = export.merge("smollm2-135m", ["runs/zh"], "merged", dtype="float16")
    print(found)                                   # bytes, and how storing moved the logits
    export.gguf("merged", "zh-q8_0.gguf", quant="q8_0")

Whatever is written is written under a hidden name and renamed when it is complete: a killed export leaves no model
behind. Space on the disk is asked for before anything starts.
"""

from cvlib.export.llama_cpp import FORMATS, fill, gguf, refuse_file, room
from cvlib.export.merging import Merged, merge, refuse_folder, require_space

__all__ = ["FORMATS", "Merged", "fill", "gguf", "merge", "refuse_file", "refuse_folder", "require_space", "room"]
