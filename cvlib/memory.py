"""Model shape and recipe in, bytes out, part by part: will it fit, and if not, what must shrink?

Two moments of a training step compete for the peak:

* **loss**: all that is kept for the backward pass, and three float32 tensors as large as the logits (log-probabilities
  and two gradients): 12 bytes for every entry of the vocabulary at every labelled token, where the logits had 2;
* **block**: all that is kept, the gradients inside one block, one matrix unpacked to 16 bits if the base is quantised,
  and with checkpointing that block's own tensors, computed a second time.

Nothing is loaded and nothing runs: `shapes` counts the weights, `activations` the tensors, and here they are added up,
so a laptop can say what a 7B model needs on an 11 GB card. GB is 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from cvlib.activations import Step, block_saves, workspace
from cvlib.recipes import Adapter, Recipe
from cvlib.shapes import SHAPES, Shape, adapter_parameters, weight_bytes

#: Bytes before the first tensor. CUDA: an allowance for driver and kernels, they differ by card; CPU: Python with torch
#: and transformers imported, measured.
CONTEXT = {"cuda": 500_000_000, "cpu": 550_000_000}
#: The parts as a picture shows them: how their names begin.
KINDS = {
    "weights of the blocks": ("matrices",),
    "embeddings, norms, head": ("embeddings",),
    "driver and libraries": ("driver",),
    "adapters, gradients, optimiser": ("adapters", "their gradients", "optimiser"),
    "kept for the backward pass": ("rotary", "inputs of", "activations", "final norm", "one block, computed"),
    "logits in float32": ("log-probabilities", "their two gradients", "logits"),
    "work inside a block": ("gradients inside", "one block, reading"),
    "KV cache": ("KV cache",),
}


@dataclass(frozen=True)
class Part:
    """So many bytes, needed `always` or only at one moment: `loss` or `block`."""

    name: str
    bytes: int
    when: str = "always"


@dataclass(frozen=True)
class Budget:
    """The parts, in order."""

    parts: tuple[Part, ...]

    def at(self, moment: str) -> int:
        """Bytes needed at `loss` or at `block`."""
        return sum(part.bytes for part in self.parts if part.when in ("always", moment))

    @property
    def moment(self) -> str:
        """The moment of the peak; `always` if the parts know no moments, as in serving."""
        return max(("always", "block", "loss"), key=self.at)

    @property
    def peak(self) -> int:
        """Most bytes needed at any time."""
        return self.at(self.moment)

    @property
    def largest(self) -> Part:
        """The largest part that is there at the peak."""
        return max((part for part in self.parts if part.when in ("always", self.moment)), key=lambda part: part.bytes)


def budget(
    shape: Shape,
    adapter: Adapter,
    step: Step,
    checkpointing: bool = False,
    reentrant: bool = False,
    optimizer: str = "adamw",
) -> Budget:
    """Bytes of a training step, by part.

    Args:
        checkpointing: keep only each block's input, compute the rest again.
        reentrant: torch's older kind of checkpointing. At 8 bits it decides: bitsandbytes keeps what its int8 matrices
            read where autograd cannot see it, and the newer kind, which only drops what it sees, never frees it.
        optimizer: as in a recipe, see `moments`.

    >>> adapter, step = Adapter(targets=["q_proj", "v_proj"]), Step(tokens=1024, labelled=1024, bits=8, dtype="float16")
    >>> for checkpointing in (False, True):
    ...     print(round(budget(SHAPES["llama-7b"], adapter, step, checkpointing, reentrant=True).peak / 1e9, 1))
    14.3
    8.3
    """
    t, e, layers = step.tokens, step.element, shape.layers
    matrices, others = weight_bytes(shape, step.bits, e)
    trained = adapter_parameters(shape, adapter)
    saves = block_saves(shape, adapter, step)
    block = sum(saves.values())
    whole = (layers - 1) * block + sum(block_saves(shape, adapter, step, first=True).values())
    stream = layers * e * t * shape.hidden
    unseen = layers * e * t * (2 * shape.hidden + shape.query_width + shape.intermediate) * (step.bits == 8)
    twice = saves["shared inputs"] if unseen and not reentrant else 0  # the first copy is the one that is used
    logits = step.labelled * shape.vocab
    parts = [
        Part(f"matrices of the blocks, {step.bits if step.bits < 16 else 8 * e} bits", matrices),
        Part("embeddings, norms, head", others),
        Part("adapters", 4 * trained),
        Part("their gradients", 4 * trained),
        Part("optimiser", moments(shape, adapter, optimizer)),
        Part("rotary tables", 2 * e * t * shape.head_dim),
        Part("inputs of the blocks", checkpointing * (stream + step.packed * t * t)),  # and the mask, one byte each
        Part("inputs of int8 matrices", checkpointing * (not reentrant) * unseen),
        Part("activations", (not checkpointing) * whole),
        Part("driver and libraries", CONTEXT[step.device]),
        Part("final norm, places of labels", 4 * t * (shape.hidden + 1) + 16 * step.labelled, "loss"),
        Part("log-probabilities, float32", 4 * logits, "loss"),
        Part("their two gradients, float32", 8 * logits, "loss"),
        Part("one block, computed again", checkpointing * (block - twice), "block"),
        Part("gradients inside a block", workspace(shape, adapter, step), "block"),
    ]
    return Budget(tuple(part for part in parts if part.bytes))


def moments(shape: Shape, adapter: Adapter, optimizer: str) -> int:
    """Bytes of AdamW's two moments on the card.

    * `adamw`: two float32 for every trained weight.
    * `adamw_8bit`: two bytes, and two float32 absmax for every 256 weights (Dettmers et al. 2021).
    * `paged_adamw_8bit`: the bytes may leave the card; but bitsandbytes pages no tensor of fewer than 100,000 entries.

    >>> seven = Adapter(r=8, targets=list(SHAPES["llama-7b"].matrices))
    >>> [round(moments(SHAPES["llama-7b"], seven, kind) / 1e6) for kind in ("adamw", "adamw_8bit", "paged_adamw_8bit")]
    [160, 41, 41]
    >>> [round(moments(SHAPES["llama-13b"], seven, kind) / 1e6) for kind in ("adamw", "adamw_8bit", "paged_adamw_8bit")]
    [250, 64, 37]
    """
    tensors = [adapter.r * side for name in adapter.targets for side in shape.matrices[name]]  # of each A and each B
    if optimizer == "adamw":
        return shape.layers * 8 * sum(tensors)
    small = sum(8 * size for size in tensors if size < 4096)  # bitsandbytes keeps these in float32
    stays = sum(
        2 * size for size in tensors if size >= 4096 and not (optimizer.startswith("paged") and size >= 100_000)
    )
    return shape.layers * (small + stays + sum(8 * ceil(size / 256) for size in tensors if size >= 4096))


def serving(
    shape: Shape, bits: int, tokens: int, rows: int = 1, dtype: str = "float16", device: str = "cuda"
) -> Budget:
    """Bytes of generating to `tokens` tokens, prompt included, in `rows` conversations at once.

    >>> kv = [part for part in serving(SHAPES["llama-7b"], 4, tokens=2048).parts if part.name == "KV cache"]
    >>> kv[0].bytes == 2 * 32 * 2048 * 4096 * 2      # keys and values, blocks, tokens, width, bytes
    True
    """
    step = Step(rows * tokens, rows, bits=bits, dtype=dtype, device=device)
    e = step.element
    matrices, others = weight_bytes(shape, bits, e)
    unpacked = e * shape.hidden * shape.intermediate * (bits < 16)
    parts = [
        Part(f"matrices of the blocks, {bits if bits < 16 else 8 * e} bits", matrices),
        Part("embeddings, norms, head", others),
        Part("KV cache", 2 * shape.layers * step.tokens * shape.key_width * e),
        Part("driver and libraries", CONTEXT[device]),
        Part("one block, reading the prompt", step.tokens * e * (3 * shape.intermediate + 3 * shape.hidden) + unpacked),
        Part("logits and their float32 copy", (e + 4) * rows * shape.vocab),
    ]
    return Budget(tuple(part for part in parts if part.bytes))


def of_recipe(recipe: Recipe, shape: Shape, device: str = "cuda", dtype: str = "float16") -> Budget:
    """The budget of a recipe at its worst: every row of the longest length, and a label on every token.

    `dtype` is what `auto` stands for on the machine meant (`loading.device_and_dtype`): float16 up to Turing.
    """
    plan, tokens = recipe.schedule, recipe.schedule.micro_rows * recipe.data.max_length
    chosen = dtype if recipe.dtype == "auto" else recipe.dtype
    step = Step(tokens, tokens, plan.micro_rows > 1, recipe.bits, chosen, device)
    return budget(shape, recipe.adapter, step, plan.gradient_checkpointing, optimizer=plan.optimizer)


def table(budget: Budget) -> list[list]:
    """Rows for `show.Table(["part", "GB", "when"], …)`; the last one is the peak."""
    rows = [[part.name, round(part.bytes / 1e9, 3), part.when] for part in budget.parts]
    when = budget.moment if budget.moment == "always" else f"at the {budget.moment}"
    return [*rows, ["peak", round(budget.peak / 1e9, 3), when]]


def drawing(budget: Budget) -> dict[str, float]:
    """GB that are there at the peak, by kind (`KINDS`), for `show.stacked`.

    >>> drawing(Budget((Part("optimiser", 8 * 10**9), Part("adapters", 10**9), Part("activations", 10**6, "block"))))
    {'adapters, gradients, optimiser': 9.0, 'kept for the backward pass': 0.001}
    """
    there = [part for part in budget.parts if part.when in ("always", budget.moment)]
    sums = {kind: sum(part.bytes for part in there if part.name.startswith(names)) for kind, names in KINDS.items()}
    return {kind: size / 1e9 for kind, size in sums.items() if size}


def reported() -> list[list]:
    """What Chinese-Vicuna reported beside what we predict: [model, reported GB, predicted GB, the difference].

    Its finetune.py: 4 rows padded to 256 tokens, every position labelled (trap 1), q and v adapted, checkpointing of
    the older kind. Figures from its README and issues 91 and 202, rounded there; we did not measure any of them.
    """
    small, large = SHAPES["llama-7b"], SHAPES["llama-13b"]
    adapter, step = Adapter(), Step(tokens=4 * 256, labelled=4 * 256, bits=8, dtype="float16")

    def predicted(budget: Budget) -> float:
        return round(budget.peak / 1e9, 1)

    def training(shape: Shape) -> float:
        return predicted(budget(shape, adapter, step, checkpointing=True, reentrant=True))

    return [
        ["7B, 8 bits, loaded", "8", predicted(serving(small, 8, 256)), "rounded; driver and kernels differ by card"],
        ["7B, 8 bits, training", "8.2 to 9", training(small), "evaluation scores 8 rows at once: twice the logits"],
        ["13B, 8 bits, loaded", "14", predicted(serving(large, 8, 256)), "rounded; driver and kernels differ by card"],
        [
            "13B, 8 bits, training",
            "18",
            training(large),
            "not explained by the parts; perhaps the allocator's free blocks, which a 24 GB card lets it keep",
        ],
        ["7B, 4 bits, loaded", "4 to 5", predicted(serving(small, 4, 256)), "not said whether loaded or in training"],
    ]
