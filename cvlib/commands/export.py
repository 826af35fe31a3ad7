"""`cvlib export`: one model folder or one file out of a base and its adapters."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from cvlib import InputError
from cvlib.commands import command, place, say

EXAMPLES = """\
Adapters are merged in float32 and rounded once; the base must be the model in 16 bits.

examples:
  cvlib export --adapter runs/mine --to gguf --quant q8_0 -o runs/mine.gguf
  cvlib export --adapter runs/mine --to hf -o runs/merged
  cvlib export --adapter runs/general runs/law --to hf -o runs/both
"""


def register(group) -> None:
    """Add this command to the command line."""
    leaving = command(group, "export", export, "one model folder or GGUF file out of a base and its adapters", EXAMPLES)
    leaving.add_argument("model", nargs="?", help="asset, hub id or folder (default: the adapter's base)")
    leaving.add_argument(
        "--adapter", nargs="+", type=Path, default=[], metavar="DIR", help="adapters to merge, one over the other"
    )
    leaving.add_argument("--to", choices=("hf", "gguf"), required=True, help="safetensors folder, or for llama.cpp")
    leaving.add_argument("--quant", choices=("f16", "q8_0", "q4_0"), help="the GGUF's format (default: f16)")
    leaving.add_argument("-o", "--out", type=place, required=True, metavar="OUT", help="the folder or file to write")
    leaving.add_argument("--force", action="store_true", help="replace OUT if it exists")


def export(options: argparse.Namespace) -> None:
    """`cvlib export`: merge in float32, then write; a GGUF is made from a merged folder that is thrown away."""
    from cvlib import export, loading

    if not (options.model or options.adapter):
        raise InputError("nothing to export; name a model, or --adapter DIR")
    if options.to == "hf" and options.quant:
        raise InputError(f"--quant {options.quant} is a GGUF format; leave it out, or choose --to gguf")
    quant = options.quant or "f16"
    (export.refuse_file if options.to == "gguf" else export.refuse_folder)(options.out, options.force)
    base = options.model or loading.read_adapter(options.adapter[0]).get("base_model_name_or_path")
    if options.to == "gguf":  # the merged model in float32 lies beside it for a while
        export.require_space(options.out, 2 * export.room(base, "f16") + export.room(base, quant))
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    if options.to == "hf":
        merged = export.merge(base, options.adapter, options.out, force=options.force)
        say(options, dataclasses.asdict(merged) | {"folder": str(merged.folder)}, str(merged))
        return
    between = options.out.absolute().with_name(f".{options.out.name}.merging")
    shutil.rmtree(between, ignore_errors=True)  # of an export that was killed
    try:
        merged = export.merge(base, options.adapter, between / options.out.stem, dtype="float32")
        size = export.gguf(merged.folder, options.out, quant, options.force)
    finally:
        shutil.rmtree(between, ignore_errors=True)
    data = {"out": str(options.out), "quant": quant, "bytes": size, "change": merged.change}
    moved = f"it answers as base and adapters do: no logit moved by more than {merged.change:.2g}"
    say(options, data, f"{options.out}: {size / 1e6:,.1f} MB, {quant}; {moved}")
