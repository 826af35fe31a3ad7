"""Speed of serving, for chapter 12: every format in transformers and llama.cpp against the memory's own speed.

To write one token a model must be read from memory once, whole. So tokens a second ≤ bandwidth ÷ bytes of the weights:
the roofline (Williams et al. 2009), measured here in the same rounds by reading a matrix far larger than any cache.
Prompt and answer are timed apart; a prompt's tokens share one reading of the weights, and so do several answers at once
(`batch`). Rounds are interleaved and alternate their order, so that a machine that slows down slows all of them. Last,
llama.cpp through `engines` beside xllamacpp used bare: one call for all tokens, nothing streamed.

    python benchmarks/bench_decoding.py                # three rounds, five minutes; the machine must be quiet
    python benchmarks/bench_decoding.py --rounds 1     # a first look
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import study
import torch

from cvlib import engines, export, generation, loading, server, shapes
from cvlib.export import llama_cpp
from cvlib.recipes import Decoding

NAME, BASE = "12-decoding", "smollm2-135m"
FORMATS = {"float32": (16, "float32"), "bfloat16": (16, "bfloat16"), "int8": (8, "bfloat16"), "NF4": (4, "bfloat16")}
QUANTS = ("f16", "q8_0", "q4_0")
THREADS, PROMPT, ANSWER, BATCH = sorted({1, os.cpu_count()}), 256, 25, 4
GREEDY = Decoding(temperature=0, repetition_penalty=1, max_new_tokens=ANSWER)


def bandwidth():
    """Bytes a second at which a matrix of 2 GiB is read: the better of a sum and a matrix-vector product."""
    W, x, times = torch.ones(8192, 65536), torch.ones(65536), []
    for work in (W.sum, lambda: W @ x) * 3:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return W.numel() * W.element_size() / min(times)


def bytes_per_token(folder):
    """What each format reads for a token: all weights once, and the keys and values of the tokens before it."""
    config, shape = llama_cpp.plan(folder, "f16")[1], shapes.SHAPES[BASE]  # the embeddings are the head, too
    element = {kind: 4 if dtype == "float32" else 2 for kind, (_, dtype) in FORMATS.items()}
    weights = {kind: sum(shapes.weight_bytes(shape, bits, element[kind])) for kind, (bits, _) in FORMATS.items()}
    weights |= {quant: sum(tensor.bytes for tensor in llama_cpp.plan(folder, quant)[0]) for quant in QUANTS}
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (PROMPT + ANSWER // 2)
    return {kind: size + cached * element.get(kind, 2) for kind, size in weights.items()}


def in_transformers(model, start):
    """Tokens a second of the prompt, of the answer, and of `BATCH` answers at once."""
    speeds = {}
    for batch in (1, BATCH):
        began = time.perf_counter()
        times = [time.perf_counter() for _ in generation.tokens(model, [start] * batch, GREEDY)]
        if batch == 1:
            speeds["prompt", 1] = len(start) / (times[0] - began)
        speeds["answer", batch] = batch * (ANSWER - 1) / (times[-1] - times[0])
    return speeds


def in_llama_cpp(engine, start):
    """The same by llama.cpp's own clock, and how fast an answer comes through `engines` and bare, by ours."""
    body = {"prompt": start, "n_predict": ANSWER, "temperature": 0, "ignore_eos": True}

    def asked(cache):
        with server.connected(engine.server, engine.key) as ask:
            return ask("/completion", **body, cache_prompt=cache)["timings"]

    alone = asked(False)
    speeds = {("prompt", 1): len(start) / alone["prompt_ms"] * 1e3}
    speeds["answer", 1] = (ANSWER - 1) / alone["predicted_ms"] * 1e3  # the first token comes of the prompt
    for way, work in (("bare", lambda: asked_bare(engine, body)), ("engines", lambda: count(engine, start))):
        began = time.perf_counter()
        assert work() == ANSWER
        speeds[way, 1] = ANSWER / (time.perf_counter() - began)
    with ThreadPoolExecutor(BATCH) as pool:
        list(pool.map(lambda _: asked(True), range(BATCH)))  # every slot has the prompt now
        together = list(pool.map(lambda _: asked(True), range(BATCH)))
    speeds["answer", BATCH] = BATCH * (ANSWER - 1) / max(each["predicted_ms"] for each in together) * 1e3
    return speeds


def asked_bare(engine, body):
    """xllamacpp's own call, in this process and without HTTP: the tokens it says it wrote."""
    return engine.server.handle_completions(body)["usage"]["completion_tokens"]


def count(engine, start):
    """An answer through `engines`, token by token: how many there were."""
    return sum(1 for _ in engine.tokens(start, GREEDY))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    began, rows, folder = time.perf_counter(), [], Path(loading.resolve(BASE))
    load = os.getloadavg()[0]  # how many others wanted the processor when we began: 0 on a quiet machine
    with tempfile.TemporaryDirectory() as place:
        files = {quant: Path(place) / f"{quant}.gguf" for quant in QUANTS}
        for quant, file in files.items():
            export.gguf(folder, file, quant)
        models = {kind: loading.load(BASE, bits, dtype, device="cpu") for kind, (bits, dtype) in FORMATS.items()}
        start = models["float32"][1]("The sun is a star, and the planets go round it. " * PROMPT).input_ids[:PROMPT]
        for threads in THREADS:
            torch.set_num_threads(threads)
            served = {quant: engines.LlamaCpp(file, "chatml", 4096, threads) for quant, file in files.items()}
            work = {kind: lambda model=model: in_transformers(model, start) for kind, (model, _) in models.items()}
            work |= {quant: lambda engine=engine: in_llama_cpp(engine, start) for quant, engine in served.items()}
            for each in work.values():
                each()  # the first call of each allocates and packs
            for turn in range(rounds):
                rows.append({"threads": threads, "round": turn, "phase": "memory", "bytes_per_second": bandwidth()})
                for kind in list(work)[:: -1 if turn % 2 else 1]:
                    for (phase, batch), speed in work[kind]().items():
                        about = {"threads": threads, "round": turn, "format": kind, "phase": phase, "batch": batch}
                        rows.append(about | {"tokens_per_second": round(speed, 2)})
                print(threads, turn, f"{rows[-1]}", f"{time.perf_counter() - began:.0f} s", flush=True)
            about = {"base": BASE, "prompt": PROMPT, "answer": ANSWER, "rounds": rounds, "load": round(load, 1)}
            study.save(NAME, rows, **about, bytes_per_token=bytes_per_token(folder))


if __name__ == "__main__":
    main()
