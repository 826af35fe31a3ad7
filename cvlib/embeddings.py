"""A grown tokenizer in, a grown model out: every new piece gets a row, and a start worth having.

A model holds one row a piece in its embedding matrix (what a token means on the way in) and one in its head (how it
is predicted on the way out); in a *tied* model the two are one matrix. A new piece has no row yet. Where should it
start?

* **mean**: the mean of the rows of its *sub-pieces*, the old pieces that spelt its text until now. 北京 begins halfway
  between what the model already read in its place. It costs nothing and needs no data.
* **random**: N(0, 0.02), the usual default of a resize. A stranger, and a quiet one: real rows are much longer.
* **zero**: nothing on the way in; on the way out a logit of exactly 0, far below those of likely pieces.

Only the new rows are trained, by peft's `trainable_token_indices`: the old rows cannot move, carry no optimiser state,
and an adapter folder holds the new rows and nothing else. `modules_to_save` would train and store the whole matrix,
twice if it was tied. How large the vocabulary is, is asked of the files and written down nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cvlib import InputError, vocabulary

STARTS = ("mean", "random", "zero")
USUAL_SPREAD = 0.02  # standard deviation of a fresh row in LLaMA's and most other configs


def spelt(grown: str | Path, base: str | Path) -> list[list[int]]:
    """How the old tokenizer spells each new piece: ids in `base`, for every id of `grown` from the first new one on.

    Args:
        grown: the tokenizer after `extension.extend` or `vocabulary.merge`: a file or a folder.
        base: the tokenizer it grew from.

    Raises:
        InputError: `grown` does not begin with the pieces of `base`, or has none beyond them.
    """
    new, old = vocabulary.load(grown), vocabulary.load(base)
    if new.pieces[: len(old.pieces)] != old.pieces:
        raise InputError(f"{grown}: does not begin with the pieces of {base}; grow it with `cvlib vocab extend`")
    added = new.pieces[len(old.pieces) :]
    if not added:
        raise InputError(f"{grown}: holds no piece that {base} lacks; grow it with `cvlib vocab extend`")
    return old.spell(added)


@torch.no_grad()
def grow(model, sub_pieces: Sequence[Sequence[int]], start: str = "mean", seed: int = 0) -> range:
    """Append a row for each new piece to the embedding matrix and, if it has its own, to the head.

    Args:
        model: a causal language model of transformers; it is changed in place.
        sub_pieces: for each new piece the old ids that spell it, from `spelt`.
        start: "mean" of the sub-pieces' rows, "random" N(0, 0.02), or "zero".
        seed: of the random start.

    Returns:
        The ids of the new rows.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    >>> grow(model, [[0, 1], [3]])
    range(4, 6)
    >>> rows = model.get_input_embeddings().weight
    >>> bool(torch.allclose(rows[4], (rows[0] + rows[1]) / 2)), bool(torch.equal(rows[5], rows[3]))
    (True, True)
    """
    if start not in STARTS:
        raise InputError(f"start is {start!r}; choose one of {', '.join(STARTS)}")
    old = model.get_input_embeddings().weight.shape[0]
    beyond = [number for ids in sub_pieces for number in ids if number >= old]
    if beyond:
        raise InputError(f"a new piece is spelt by id {beyond[0]}, but the model has {old:,} rows; is it another base?")
    model.resize_token_embeddings(old + len(sub_pieces), mean_resizing=False)
    for matrix in matrices(model):
        weight = matrix.weight
        weight[old:] = _rows(weight[:old], sub_pieces, start, seed).to(weight)
    return range(old, old + len(sub_pieces))


def _rows(table: torch.Tensor, sub_pieces: Sequence[Sequence[int]], start: str, seed: int) -> torch.Tensor:
    """The first values of the new rows: (new, hidden), float32."""
    shape = len(sub_pieces), table.shape[1]
    if start == "zero":
        return torch.zeros(shape)
    if start == "random":
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * USUAL_SPREAD
    return torch.stack([table[list(ids)].float().mean(0) for ids in sub_pieces])


def matrices(model) -> list[torch.nn.Module]:
    """The modules with a row a piece: the embedding and the head, or only the embedding if the two are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding.weight else [embedding, head]


def trainable(model, new: Sequence[int]) -> dict[str, list[int]]:
    """What peft must be told to train just these rows: `LoraConfig(trainable_token_indices=trainable(model, new))`.

    A tied head follows its embedding by itself; an untied one is named too.
    """
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return {names[matrix]: list(new) for matrix in matrices(model)}


def rows_of(adapter: str | Path) -> int:
    """How many rows a model must have before this adapter folder is laid over it; 0 if it brings none.

    Raises:
        InputError: the list of rows in its adapter_config.json cannot be read.
    """
    path = Path(adapter) / "adapter_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("trainable_token_indices") or {}
    try:
        lists = list(found.values()) if isinstance(found, dict) else [found]
        return 1 + max((number for ids in lists for number in ids), default=-1)
    except (AttributeError, TypeError):
        raise InputError(f"{path}: trainable_token_indices is {str(found)[:40]!r}; train the adapter again") from None
