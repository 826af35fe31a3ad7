"""Speed of serving, for chapter 12: every format in transformers and llama.cpp against the memory's own speed.

To write one token a model must be read from memory once, whole. So tokens a second ≤ bandwidth ÷ bytes of the weights:
the roofline (Williams et al. 2009), measured here in the same rounds on a matrix far larger than any cache, twice: by
a sum, which does nothing but read, and by a matrix-vector product, which is what a model does with its weights.

Prompt and answer are timed apart; a prompt's tokens share one reading of the weights, and so do several answers at once
(`batch`). Answers are timed behind a short and a longer `context`. Rounds are interleaved and alternate their order, so
that a machine that slows down slows all of them. llama.cpp runs in a process of its own for each format, as it does for
a user: OpenMP's threads wait more slowly for each other as soon as one process holds more of them than the machine has
cores. Last, llama.cpp through `engines` beside xllamacpp used bare: one call for all tokens, nothing streamed.

Where `perf` is installed (Debian: linux-perf), a last round says what share of the time went into matrix products.

    python benchmarks/bench_decoding.py                # three rounds, seven minutes; the machine must be quiet
    python benchmarks/bench_decoding.py --rounds 1     # a first look
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import study
import torch

from cvlib import engines, export, generation, loading, server, shapes
from cvlib.export import llama_cpp
from cvlib.recipes import Decoding

NAME, BASE = "12-decoding", "smollm2-135m"
FORMATS = {"float32": (16, "float32"), "bfloat16": (16, "bfloat16"), "int8": (8, "bfloat16"), "NF4": (4, "bfloat16")}
QUANTS = ("f16", "q8_0", "q4_0")
THREADS, SHORT, LONG, ANSWER, BATCH = sorted({1, os.cpu_count()}), 8, 256, 25, 4
GREEDY = Decoding(temperature=0, repetition_penalty=1, max_new_tokens=ANSWER)
PRODUCTS = re.compile(r"vec_dot|gemv|gemm|mul_mat")  # how llama.cpp calls its functions that multiply matrices


def bandwidths():
    """Bytes a second at which a matrix of 2 GiB is read, by a sum and by a product with a vector; the best of three."""
    W, x, found = torch.ones(8192, 65536), torch.ones(65536), {}
    for name, work in (("sum", W.sum), ("product", lambda: W @ x)):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        found[name] = W.nbytes / min(times)
    return found


def bytes_per_token(folder, context):
    """What each format reads for a token: all weights once, and the keys and values of the tokens before it."""
    config, shape = llama_cpp.plan(folder, "f16")[1], shapes.SHAPES[BASE]  # the embeddings are the head, too
    element = {kind: 4 if dtype == "float32" else 2 for kind, (_, dtype) in FORMATS.items()}
    weights = {kind: sum(shapes.weight_bytes(shape, bits, element[kind])) for kind, (bits, _) in FORMATS.items()}
    weights |= {quant: sum(tensor.bytes for tensor in llama_cpp.plan(folder, quant)[0]) for quant in QUANTS}
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (context + ANSWER // 2)
    return {kind: size + cached * element.get(kind, 2) for kind, size in weights.items()}


def in_transformers(model, start):
    """Tokens a second by (phase, batch, context): of the prompt, of an answer, and of `BATCH` answers at once."""
    speeds = {}
    for batch, context in ((1, SHORT), (1, LONG), (BATCH, LONG)):
        began = time.perf_counter()
        times = [time.perf_counter() for _ in generation.tokens(model, [start[:context]] * batch, GREEDY)]
        speeds["answer", batch, context] = batch * (ANSWER - 1) / (times[-1] - times[0])
        if (batch, context) == (1, LONG):
            speeds["prompt", batch, context] = context / (times[0] - began)
    return speeds


def in_llama_cpp(file, threads, start):
    """The same by llama.cpp's own clock, and how fast an answer comes through `engines` and bare, by ours."""
    engine, speeds = engines.LlamaCpp(file, "chatml", 4096, threads), {}

    def asked(context, cache=False):
        with server.connected(engine.server, engine.key) as ask:
            return ask("/completion", **body(start[:context]), cache_prompt=cache)["timings"]

    asked(LONG)  # the first call allocates
    for context in (SHORT, LONG):  # the first token of an answer comes of the prompt
        alone = asked(context)
        speeds["answer", 1, context] = (ANSWER - 1) / alone["predicted_ms"] * 1e3
    speeds["prompt", 1, LONG] = LONG / alone["prompt_ms"] * 1e3
    for way, work in (("bare", lambda: asked_bare(engine, start)), ("engines", lambda: count(engine, start))):
        began = time.perf_counter()
        assert work() == ANSWER
        speeds[way, 1, LONG] = ANSWER / (time.perf_counter() - began)
    with ThreadPoolExecutor(BATCH) as pool:
        list(pool.map(lambda _: asked(LONG, True), range(BATCH)))  # every slot has the prompt now
        together = list(pool.map(lambda _: asked(LONG, True), range(BATCH)))
    speeds["answer", BATCH, LONG] = BATCH * (ANSWER - 1) / max(each["predicted_ms"] for each in together) * 1e3
    return speeds


def body(start):
    """A greedy request for an answer of a fixed length."""
    return {"prompt": start, "n_predict": ANSWER, "temperature": 0, "ignore_eos": True}


def asked_bare(engine, start):
    """xllamacpp's own call, in this process and without HTTP: the tokens it says it wrote."""
    return engine.server.handle_completions(body(start))["usage"]["completion_tokens"]


def count(engine, start):
    """An answer through `engines`, token by token: how many there were."""
    return sum(1 for _ in engine.tokens(start, GREEDY))


def products(file, threads, start):
    """The share of llama.cpp's time that goes into matrix products, while it answers behind a short context."""
    engine = engines.LlamaCpp(file, "chatml", 4096, threads)
    with tempfile.TemporaryDirectory() as place, server.connected(engine.server, engine.key) as ask:
        ask("/completion", **body(start[:SHORT]))
        command = ["perf", "record", "-e", "cpu-clock", "-o", f"{place}/perf", "-p", str(os.getpid())]
        watch = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1)
        for _ in range(20):
            ask("/completion", **body(start[:SHORT]))
        watch.send_signal(signal.SIGINT)
        watch.wait()
        command = ["perf", "report", "-i", f"{place}/perf", "--stdio", "--sort", "symbol"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+([\d.]+)%\s+\[.\] (\S+)", report, re.MULTILINE)
    return sum(float(share) for share, symbol in lines if PRODUCTS.search(symbol)) / 100


def apart(work, *given):
    """`work(*given)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *given).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    began, rows, shares, folder = time.perf_counter(), [], [], Path(loading.resolve(BASE))
    load = os.getloadavg()[0]  # how many others wanted the processor when we began: 0 on a quiet machine
    with tempfile.TemporaryDirectory() as place:
        files = {quant: Path(place) / f"{quant}.gguf" for quant in QUANTS}
        for quant, file in files.items():
            export.gguf(folder, file, quant)
        models = {kind: loading.load(BASE, bits, dtype, device="cpu") for kind, (bits, dtype) in FORMATS.items()}
        start = models["float32"][1]("The sun is a star, and the planets go round it. " * LONG).input_ids[:LONG]
        for threads in THREADS:
            torch.set_num_threads(threads)
            work = {kind: lambda model=model: in_transformers(model, start) for kind, (model, _) in models.items()}
            for each in work.values():
                each()  # the first call of each allocates and packs
            for quant, file in files.items():
                work[quant] = lambda file=file, threads=threads: apart(in_llama_cpp, file, threads, start)
            for turn in range(rounds):
                about = {"threads": threads, "round": turn}
                for name, speed in bandwidths().items():
                    rows.append(about | {"phase": "memory", "by": name, "bytes_per_second": speed})
                for kind in list(work)[:: -1 if turn % 2 else 1]:
                    for (phase, batch, context), speed in work[kind]().items():
                        row = {"format": kind, "phase": phase, "batch": batch, "context": context}
                        rows.append(about | row | {"tokens_per_second": round(speed, 2)})
                print(threads, turn, f"{rows[-1]}", f"{time.perf_counter() - began:.0f} s", flush=True)
            for quant, file in files.items() if shutil.which("perf") else ():
                share = round(apart(products, file, threads, start), 3)
                shares.append({"threads": threads, "format": quant, "products": share})
            sizes = {context: bytes_per_token(folder, context) for context in (SHORT, LONG)}
            about = {"base": BASE, "answer": ANSWER, "rounds": rounds, "load": round(load, 1)}
            study.save(NAME, rows, **about, bytes_per_token=sizes, shares=shares)


if __name__ == "__main__":
    main()
