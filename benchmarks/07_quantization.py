"""Study of chapter 07: what each weight format costs, in error of the weights and in bits per byte of the model.

Two results. `07-weights`: for every matrix of two checkpoints, the relative error of each format and how far the
matrix is from normal. `07-quantization`: every matrix inside the running model's blocks (embeddings and head stay) is
quantised and dequantised by `cvlib.quantization`, then the answers of the same conversations are scored in float32,
English and Chinese. Nothing is trained, so the seeds are three disjoint random samples of text. Each conversation's
nats are kept: the chapter draws its own intervals, paired by row.

    python benchmarks/07_quantization.py                        # everything, 11 minutes on two cores
    python benchmarks/07_quantization.py weights nf4-64 fp4-64  # only these parts, merged into what is stored
"""

import random
import sys
from dataclasses import asdict

import study
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open

from cvlib import ROOT, assets, loading, messages
from cvlib import quantization as q
from cvlib.evaluation import score

SEEDS, ROWS = (0, 1, 2), 15
TEXTS = {"English": "alpaca_en.jsonl", "Chinese": "belle_zh.jsonl"}
LEVELS = {"nf4": q.nf4_levels(), "fp4": q.fp4_levels(), "int4": torch.arange(-7, 8) / 7}


def in_blocks(kind, size):
    """A round trip through blocks of 4-bit codes, and the bits a parameter takes."""
    levels = LEVELS[kind]
    return (
        lambda w: q.dequantize_blocks(*q.quantize_blocks(w, levels, size), levels, size).view(w.shape),
        lambda w: q.bits_per_parameter(4, size),
    )


#: Format → (weight → weight after the round trip, weight → bits per parameter).
FORMATS = {
    "source": (lambda w: w, lambda w: 32),
    "int8-row": (lambda w: q.dequantize_int8(*q.quantize_int8(w)), lambda w: q.bits_per_parameter(8, w.shape[1])),
    "int8-tensor": (lambda w: q.dequantize_int8(*q.quantize_int8(w, ())), lambda w: 8 + 32 / w.numel()),
    "nf4-64-double": (lambda w: q.Weight4bit.of(w).values(), lambda w: q.bits_per_parameter(4, 64, double=True)),
    **{f"{kind}-{size}": in_blocks(kind, size) for kind in LEVELS for size in (32, 64, 256, 1024)},
}
#: Arms that round the activations, too: int8 rows times int8 rows, entries ≥ the threshold kept apart (0: none).
THRESHOLDS = {"int8-both": 0.0, "llm-int8-6": 6.0, "llm-int8-2": 2.0}
ARMS = [name for name in FORMATS if name not in ("nf4-32", "fp4-32", "int4-32", "int4-1024")] + list(THRESHOLDS)


def inner_linears(model):
    """Every linear layer inside the blocks, by name: what bitsandbytes quantises. The head stays."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def sample(language, seed):
    """`ROWS` conversations; the samples of different seeds share no row."""
    rows = messages.read(ROOT / "data_samples" / TEXTS[language])
    random.Random(0).shuffle(rows)
    return rows[seed * ROWS : (seed + 1) * ROWS]


def int8_forward(layer, threshold):
    """LLM.int8() on `layer` by bitsandbytes' fast kernels; tests hold `q.llm_int8` equal to them."""
    wq, w_absmax = q.quantize_int8(layer.weight.data.half())

    def forward(x):
        rows = x.reshape(-1, x.shape[-1])
        xq, x_absmax, outliers = bnb.int8_vectorwise_quant(rows.half(), threshold)
        y = torch.ops.bitsandbytes.int8_mixed_scaled_mm(rows, xq, wq, x_absmax, w_absmax.flatten(), outliers)[0]
        return y.view(*x.shape[:-1], -1)

    return forward


def measure(arm, model, tokenizer):
    """Bits per parameter of one arm, and every conversation's nats and bytes, per language and seed."""
    layers = inner_linears(model)
    originals = {name: layer.weight.data for name, layer in layers.items()}
    round_trip, cost = FORMATS["int8-row" if arm in THRESHOLDS else arm]
    bits = sum(cost(w) * w.numel() for w in originals.values()) / sum(w.numel() for w in originals.values())
    for layer in layers.values():
        if arm in THRESHOLDS:
            layer.forward = int8_forward(layer, THRESHOLDS[arm])
        else:
            layer.weight.data = round_trip(layer.weight.data)
    rows = []
    for language in TEXTS:
        for seed in SEEDS:
            result = asdict(score(model, tokenizer, sample(language, seed), "chatml"))
            result["nll"] = [round(nats, 4) for nats in result["nll"]]
            rows.append({"arm": arm, "bits": round(bits, 4), "language": language, "seed": seed, **result})
    for name, layer in layers.items():
        layer.__dict__.pop("forward", None)
        layer.weight.data = originals[name]
    return rows


def weight_errors(name, matrices):
    """For every matrix: its kurtosis, the mean kurtosis inside blocks of 64, and the error of each format."""
    rows = []
    for layer, w in matrices.items():
        errors = {arm: relative_error(w, FORMATS[arm][0](w)) for arm in FORMATS if arm != "source"}
        about = {"checkpoint": name, "layer": layer, "parameters": w.numel(), "kurtosis": kurtosis(w)}
        rows.append({**about, "block_kurtosis": kurtosis(w.reshape(-1, 64)), **errors})
    return rows


def relative_error(w, back):
    """Root mean square error over root mean square weight."""
    return round(((back - w).square().mean() / w.square().mean()).sqrt().item(), 5)


def kurtosis(w):
    """Mean fourth power of the weights over the squared mean square of their row: 3 for a normal distribution."""
    rows = w if w.shape[-1] == 64 else w.reshape(1, -1)
    return round((rows / rows.square().mean(dim=1, keepdim=True).sqrt()).pow(4).mean().item(), 3)


def minilm():
    """The matrices inside the blocks of a checkpoint that was never quantised."""
    with safe_open(assets.fetch("minilm"), "pt") as file:
        names = [n for n in file.keys() if "encoder.layer" in n and n.endswith("weight")]  # noqa: SIM118
        return {n: w for n in names if (w := file.get_tensor(n)).dim() == 2}


def main(parts):
    model, tokenizer = loading.load("smollm2-135m", dtype="float32")
    if "weights" in parts:
        matrices = {name: layer.weight.data for name, layer in inner_linears(model).items()}
        rows = weight_errors("smollm2-135m", matrices) + weight_errors("minilm", minilm())
        study.save("07-weights", rows, error="root mean square error over root mean square weight")
    for arm in (arm for arm in ARMS if arm in parts):
        rows = [row for row in study.load("07-quantization") if row["arm"] != arm] + measure(arm, model, tokenizer)
        rows.sort(key=lambda row: ARMS.index(row["arm"]))
        study.save("07-quantization", rows, texts=TEXTS, rows_per_seed=ROWS, compute="float32", template="chatml")
        print(arm, "done", flush=True)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - {"weights", *ARMS}
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such part; choose from weights, {', '.join(ARMS)}")
    with torch.no_grad():
        main(sys.argv[1:] or ["weights", *ARMS])
