"""The deduplication of `cvlib.duplicates` as a datatrove pipeline: for more rows than one machine's memory holds.

datatrove (Penedo et al. 2024) runs the same four steps as files on disk, so that many machines can share them:
signatures, a task for each part of the rows; pairs, a task for each band; clusters, one task; the rows that stay, a
task for each part. Only its first step differs from ours, since it cuts words. One subclass puts our shingles and hash
functions there, and the clusters become the same.

    python benchmarks/beyond_one_machine.py rows-1.jsonl rows-2.jsonl -o cleaned      # needs: pip install datatrove
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from cvlib import InputError, messages
from cvlib.duplicates import BANDS, PER_BAND, SHINGLE, row_text, shingles, signatures

CONFIG = MinhashConfig(SHINGLE, BANDS, PER_BAND, hash_config=HashConfig(precision=32, hash_fc="sha1"))


class Rows(PipelineStep):
    """Usable rows of the files that fall to this task, as documents."""

    name, type = "rows", "reader"

    def __init__(self, files):
        super().__init__()
        self.files = [str(file) for file in files]

    def run(self, data=None, rank=0, world_size=1):
        for file in self.files[rank::world_size]:
            for line, row in messages.scan(file):
                if not isinstance(row, InputError):
                    turns = {"messages": [turn.row() for turn in row]}
                    yield Document(text=row_text(row), id=f"{file}:{line}", metadata=turns)


class Unused(WordTokenizer):
    """Stands where datatrove expects a splitter into words: characters are our unit."""

    def word_tokenize(self, text):
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


class CharacterSignature(MinhashDedupSignature):
    """datatrove's first step on our shingles, with our hash functions."""

    def __init__(self, output_folder):
        super().__init__(str(output_folder), CONFIG, language=Unused())

    def get_shingles(self, text):
        return shingles([text])[0]

    def get_signature(self, found):
        return signatures(found, np.array([len(found)])).reshape(BANDS, PER_BAND).tolist()


class Write(PipelineStep):
    """The rows that stay, one file a task."""

    name, type = "write", "writer"

    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)

    def run(self, data, rank=0, world_size=1):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{rank:05d}.jsonl").open("w", encoding="utf-8") as file:
            for document in data:
                row = {"messages": document.metadata["messages"], "from": document.id}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                yield document


def pipeline(files, out, executor=LocalPipelineExecutor, **options):
    """The last of four executors, each depending on the one before; `run()` runs them all.

    Args:
        files: row files; each task reads its share of them.
        out: folder for signatures, pairs, clusters and, in `rows`, what stays.
        executor: datatrove's class; `options` go to it (`partition` and `time` for Slurm).
    """
    out, parts = Path(out), len(files)
    stages = (
        ("signatures", parts, [Rows(files), CharacterSignature(out / "signatures")]),
        ("pairs", BANDS, [MinhashDedupBuckets(str(out / "signatures"), str(out / "pairs"), config=CONFIG)]),
        ("clusters", 1, [MinhashDedupCluster(str(out / "pairs"), str(out / "clusters"), CONFIG, save_cluster_id=True)]),
        ("rows", parts, [Rows(files), MinhashDedupFilter(str(out / "clusters")), Write(out / "rows")]),
    )
    last = None
    for name, tasks, steps in stages:
        last = executor(steps, tasks=tasks, depends=last, logging_dir=str(out / "logs" / name), **options)
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    chosen = parser.parse_args()
    pipeline(chosen.files, chosen.out, workers=chosen.workers).run()
