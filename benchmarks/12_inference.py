"""Study of chapter 12: what each format for serving costs, in bits per byte of the model and in error of its weights.

The running model with the shipped Chinese adapter merged into it in float32 is stored in seven formats: three plain
ones, llama.cpp's q8_0 and q4_0 (a GGUF file is written and unpacked again, so that the same code scores every format),
and bitsandbytes' int8 and NF4. Held-out conversations are scored in float32 arithmetic, except int8: in `eval()` mode
bitsandbytes rounds the activations, too, which is how it serves. Nothing is trained: intervals are over rows, and every
row's nats are kept so that the chapter can pair them. Then the weights alone: the error of each format over all
matrices inside the blocks, here and in a checkpoint that was never quantised.

    python benchmarks/12_inference.py                    # every arm that is not in the results file yet
    python benchmarks/12_inference.py --minutes 3        # start no arm after 3 minutes; exit code 75: more to do
    python benchmarks/12_inference.py --budget smoke     # one arm on four rows, printed and not kept
"""

import sys
import tempfile
import time
from pathlib import Path

import gguf
import study
import torch
from safetensors import safe_open

from cvlib import ROOT, assets, evaluation, export, loading, messages, shapes
from cvlib import quantization as q

NAME, BASE, ADAPTER = "12-inference", "smollm2-135m", ROOT / "data_samples" / "adapters" / "smollm2-zh"
HELD_OUT, TEXTS = 36, {"English": "alpaca_en.jsonl", "Chinese": "belle_zh.jsonl"}
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "f16": torch.float16}
PACKED = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
CODES = {"int8": 8, "NF4": 4}
ARMS = [*PLAIN, *PACKED, *CODES]


def held_out(count=HELD_OUT):
    """Conversations of both languages that the adapter has not seen."""
    files = {language: ROOT / "data_samples" / file for language, file in TEXTS.items()}
    return {language: messages.split(messages.read(file))[1][:count] for language, file in files.items()}


def stored_as(arm, merged):
    """The merged model with its numbers as the format holds them, its tokenizer, and the bytes the format takes."""
    if arm in CODES:
        model, tokenizer = loading.load(str(merged), bits=CODES[arm], dtype="float32", device="cpu")
        return model, tokenizer, served_bytes(arm)
    model, tokenizer = loading.load(str(merged), dtype="float32", device="cpu")
    if arm in PACKED:
        with tempfile.TemporaryDirectory() as folder:
            size = export.gguf(merged, Path(folder) / "model.gguf", arm)
            export.fill(model, Path(folder) / "model.gguf")
        return model, tokenizer, size
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(PLAIN[arm]))
    return model, tokenizer, sum(weight.numel() for weight in model.parameters()) * PLAIN[arm].itemsize


def served_bytes(arm):
    """Bytes of int8's or NF4's codes and scales, with embeddings, norms and head in 16 bits as they are served."""
    shape = shapes.SHAPES[BASE]
    matrices, rest = shapes.weight_bytes(shape, CODES[arm])
    return matrices + rest


def bits_per_byte(arm, merged, texts):
    """A row for each language: every conversation's nats and bytes, and the processor seconds of scoring."""
    model, tokenizer, size = stored_as(arm, merged)
    rows = []
    for language, conversations in texts.items():
        began = time.process_time()
        score = evaluation.score(model, tokenizer, conversations, "chatml")
        found = {"bpb": round(score.bits_per_byte, 6), "nll": [round(nats, 4) for nats in score.nll]}
        about = {"measurement": "bits per byte", "arm": arm, "language": language, "size": size}
        rows.append(about | found | {"bytes": score.text_bytes, "cpu_seconds": round(time.process_time() - began, 1)})
    return rows


def round_trips():
    """Format → what a matrix looks like after it, in float32."""

    def packed(kind):
        return lambda w: torch.tensor(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind))

    trips = {arm: packed(kind) for arm, kind in PACKED.items()}
    trips |= {arm: lambda w, to=to: w.to(to).float() for arm, to in PLAIN.items() if arm != "float32"}
    trips["int8"] = lambda w: q.dequantize_int8(*q.quantize_int8(w))
    trips["NF4"] = lambda w: q.Weight4bit.of(w).values()
    return trips


def weight_errors(checkpoint, matrices):
    """For each format, root mean square error over root mean square weight, over all matrices together."""
    rows = []
    for arm, trip in round_trips().items():
        wrong = sum((trip(w) - w).double().square().sum().item() for w in matrices)
        error = (wrong / sum(w.double().square().sum().item() for w in matrices)) ** 0.5
        rows.append({"measurement": "weights", "arm": arm, "checkpoint": checkpoint, "error": round(error, 6)})
    return rows


def inside_blocks(path, mark):
    """Every matrix of a safetensors file that lies inside a block, in float32."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if mark in name and name.endswith("weight")]  # noqa: SIM118
        return [w.float() for name in names if (w := file.get_tensor(name)).dim() == 2]


def main():
    options, began = study.options(__doc__), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        print(export.merge(BASE, [ADAPTER], merged, dtype="float32"), flush=True)
        if options.budget == "smoke":
            print(bits_per_byte("q4_0", merged, held_out(4)))
            return 0
        rows = study.load(NAME)
        if not any(row["measurement"] == "weights" for row in rows):
            rows += weight_errors("merged smollm2-135m", inside_blocks(merged / "model.safetensors", ".layers."))
            rows += weight_errors("minilm, never quantised", inside_blocks(assets.fetch("minilm"), "encoder.layer"))
        for arm in ARMS:
            if any(row["arm"] == arm and row["measurement"] == "bits per byte" for row in rows):
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                return 75
            rows += bits_per_byte(arm, merged, held_out())
            study.save(NAME, rows, base=BASE, adapter=ADAPTER.name, template="chatml", threads=torch.get_num_threads())
            print(arm, {row["language"]: (row["bpb"], row["cpu_seconds"]) for row in rows[-2:]}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
