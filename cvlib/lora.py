"""LoRA, in the letters of its equation: freeze W, learn a product of two thin matrices beside it.

    y = x Wᵀ + s · x Aᵀ Bᵀ        s = α / r        (Hu et al. 2021, arXiv 2106.09685)

    x (…, in)   one row per token          A (r, in)    squeezes `in` numbers down to r
    W (out, in) frozen                     B (out, r)   spreads r numbers out again, starts at zero

The paper writes h = W x + s·B A x, for a column x. Our tokens are rows, so the order turns round: (B A x)ᵀ = xᵀ Aᵀ Bᵀ.
The stored shapes are the paper's: `nn.Linear` keeps W as (out, in), and the stored weight changes by ΔW = s · B A.

Read from top to bottom: one layer, its merge, its variant DoRA, then a whole model, then arithmetic on adapters.
`cvlib.training` trains with peft; the tests hold that this file and peft give the same outputs, gradients and steps.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from cvlib.recipes import PROJECTIONS  # the seven matrices of a LLaMA block: four of attention, three of the MLP


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` (also a bitsandbytes one) plus the trainable low-rank path of the equation above.

    Args:
        base: the layer to adapt; its weight and bias are frozen here.
        r: rank, 1 or more; above min(in, out) it only costs memory, so it is refused.
        alpha: the volume α; s = α / r, so doubling r at equal α halves each direction's say.
        dropout: share of the low-rank path's inputs set to zero while training.
        rslora: s = α / √r instead (Kalajdzievski 2023, arXiv 2312.03732): the output's size stays put as r grows.

    A and B are float32 even over bf16, int8 or NF4 (bf16 would round small steps away), float64 over float64.

    >>> layer = LoRALinear(nn.Linear(6, 4), r=2, alpha=4)
    >>> tuple(layer.A.shape), tuple(layer.B.shape), layer.s
    ((2, 6), (4, 2), 2.0)
    >>> x = torch.randn(3, 5, 6)
    >>> torch.equal(layer(x), layer.base(x))                 # B is zero: an untrained adapter changes nothing
    True
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if r not in range(1, (most := min(base.in_features, base.out_features)) + 1):
            raise ValueError(f"rank {r} on a layer whose shorter side is {most}; take a rank from 1 to {most}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha}; take a finite number above 0, often 2 · rank")
        self.base, self.r, self.alpha, self.merged = base.requires_grad_(False), r, alpha, False
        self.s = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # nn.Linear's own start: uniform within ±1/√in

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """x Aᵀ Bᵀ, (…, in) → (…, out), from the left: never builds the (out, in) product."""
        z = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (…, r)
        return F.linear(z, self.B)  # (…, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → y (…, out), in the base layer's dtype."""
        y = self.base(x)
        return y if self.merged else (y + self.low_rank(x) * self.s).to(y.dtype)

    def delta(self) -> torch.Tensor:
        """ΔW = s · B A, (out, in): what the adapter adds to the stored weight."""
        return (self.B @ self.A).detach() * self.s

    def merged_weight(self) -> torch.Tensor:
        """W + ΔW, (out, in), in float32 or better: the weight that a merge should store."""
        W = self.base.weight.detach()
        if not W.is_floating_point():
            raise ValueError(f"the base weight is stored as {W.dtype} codes; load it in 16 or 32 bits, then merge")
        return W.to(self.A.dtype) + self.delta()

    def merge(self) -> float:
        """Write W + ΔW into the base weight: after that the adapter costs nothing to run.

        The sum is made in float32, then rounded once to the base's dtype. Returns the share of the update which that
        rounding lost, ‖stored − (W + ΔW)‖ / ‖ΔW‖: 0.0 in float32, large in bf16, whose gaps near W are as wide as ΔW.
        Refused (ValueError): merged already, a quantised base, or a sum that is not finite in the base's dtype.
        """
        if self.merged:
            raise ValueError("this layer is merged already; a second merge would add the update twice")
        exact = self.merged_weight()
        stored, size = exact.to(self.base.weight.dtype), (exact - self.base.weight).norm().item()
        if not stored.isfinite().all():
            raise ValueError(f"W + ΔW is not finite in {stored.dtype}; the adapter diverged or needs a wider dtype")
        self.base.weight.data.copy_(stored)
        self.merged = True
        return (stored.to(exact.dtype) - exact).norm().item() / size if size else 0.0

    def unmerge(self) -> None:
        """Subtract ΔW again. What two roundings lost does not come back: keep the base file, not a merged one."""
        if not self.merged:
            raise ValueError("this layer is not merged; there is nothing to take out")
        W = self.base.weight.data
        W.copy_((W.to(self.A.dtype) - self.delta()).to(W.dtype))
        self.merged = False


class DoRALinear(LoRALinear):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): learn each output row's length m apart from its direction.

        y = (m / ‖W + ΔW‖) ⊙ x (W + ΔW)ᵀ        ‖·‖ over each row of the weight, m (out,), starts at ‖W‖

    As in the paper's section 4.3 the norm is a constant for the gradient (detached). B = 0 still changes nothing.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, **options):
        super().__init__(base, r, alpha, **options)
        self.m = nn.Parameter(super().merged_weight().norm(dim=1))  # (out,)

    def gain(self) -> torch.Tensor:  # m / ‖W + ΔW‖, (out,)
        return self.m / super().merged_weight().norm(dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged:
            return y
        g, xW = self.gain(), y if self.base.bias is None else y - self.base.bias
        return (y + ((g - 1) * xW + g * self.low_rank(x) * self.s)).to(y.dtype)

    def merged_weight(self) -> torch.Tensor:
        return self.gain().detach()[:, None] * super().merged_weight()

    def unmerge(self) -> None:
        raise ValueError("a merged DoRA layer does not know its old row lengths; reload the base instead")


def attach(model: nn.Module, targets: Iterable[str], r: int, alpha: float, kind=LoRALinear, **options) -> int:
    """Freeze the whole model, then wrap every linear layer whose last name is one of `targets`, in place.

    Returns how many. A target that names no linear layer is a ValueError: in silence it would never be trained.

    >>> block = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4), "norm": nn.LayerNorm(8)})
    >>> attach(block, ["q_proj", "v_proj"], r=2, alpha=4), trainable(block)
    (2, 56)
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    last_names = {name.rpartition(".")[2] for name in linear}
    if missing := [t for t in targets if t not in last_names]:
        raise ValueError(f"no linear layer is called {missing[0]!r}; this model has {', '.join(sorted(last_names))}")
    model.requires_grad_(False)
    chosen = [name for name in linear if name.rpartition(".")[2] in targets]
    for name in chosen:
        model.set_submodule(name, kind(linear[name], r, alpha, **options))
    return len(chosen)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of the model by name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def merge(model: nn.Module) -> dict[str, float]:
    """Merge *every* adapted layer, whatever its name, and put plain linear layers back: the rounding cost of each."""
    costs = {name: layer.merge() for name, layer in adapters(model).items()}
    for name in costs:
        model.set_submodule(name, model.get_submodule(name).base)
    return costs


def trainable(model: nn.Module) -> int:
    """How many parameters will learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_count(config, r: int, targets: Iterable[str] = PROJECTIONS) -> int:
    """LoRA's size for any LLaMA-shaped model, from its config alone: layers · Σ r · (in + out).

    `config`: anything with the fields of a transformers `LlamaConfig` (grouped-query attention included).

    >>> from types import SimpleNamespace as Shape
    >>> llama_7b = Shape(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    >>> parameter_count(llama_7b, 8, ["q_proj", "v_proj"]), parameter_count(llama_7b, 8)
    (4194304, 19988480)
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    q, kv, mlp = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head, config.intermediate_size
    sides = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    sides |= {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}
    if unknown := set(targets := list(targets)) - set(sides):
        raise ValueError(f"no projection is called {min(unknown)!r}; choose from {', '.join(sides)}")
    return config.num_hidden_layers * sum(r * sum(sides[t]) for t in targets)


def plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict]:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): two optimiser groups, B (and DoRA's m) `ratio` times as fast."""
    A, B = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (B if name.endswith(".B") or p.ndim == 1 else A).append(p)
    return [{"params": A, "lr": lr}, {"params": B, "lr": lr * ratio}]


#: An adapter off its model: layer name → (A, B) with the scale folded into B, so that ΔW = B A exactly.
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


def detach(model: nn.Module) -> Adapter:
    """Copy a trained LoRA off its model. Refused: an untrained one, and DoRA, whose m has no place in (A, B)."""
    layers = adapters(model)
    if not any(layer.B.count_nonzero() for layer in layers.values()):
        raise ValueError("every B of this adapter is zero: it was never trained, or its weights were lost on saving")
    if any(isinstance(layer, DoRALinear) for layer in layers.values()):
        raise ValueError("DoRA's update is not a product B A; merge it and keep the merged weights")
    return {name: (layer.A.detach().clone(), layer.B.detach() * layer.s) for name, layer in layers.items()}


def combine(*terms: tuple[float, Adapter]) -> Adapter:
    """Σ wᵢ ΔWᵢ as one adapter, exactly: A's stacked, wᵢ-scaled B's side by side; the ranks add up.

    (Not the sums of the A's and of the B's: (B₁ + B₂)(A₁ + A₂) has cross terms B₁A₂ and B₂A₁, which nobody trained.)

    >>> one = {"q_proj": (torch.ones(1, 3), torch.ones(2, 1))}
    >>> A, B = combine((1.0, one), (-0.25, one))["q_proj"]
    >>> tuple(A.shape), (B @ A).tolist()
    ((2, 3), [[0.75, 0.75, 0.75], [0.75, 0.75, 0.75]])
    """
    total = {}
    for name in dict.fromkeys(name for _, adapter in terms for name in adapter):
        parts = [(adapter[name][0], w * adapter[name][1]) for w, adapter in terms if name in adapter]
        if len(shapes := {(len(B), A.shape[1]) for A, B in parts}) > 1:
            raise ValueError(f"{name}: updates of shapes {sorted(shapes)} cannot be added; take adapters of one model")
        total[name] = (torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1))
    return total


def add_to(model: nn.Module, adapter: Adapter) -> None:
    """W ← W + B A in a plain model, in place, summed in float32. Refused: what does not fit, what is not finite."""
    layers = dict(model.named_modules())
    for name, (A, B) in adapter.items():
        W = getattr(layers.get(name), "weight", torch.empty(0)).data
        if W.shape != (B.shape[0], A.shape[1]) or A.shape[0] != B.shape[1]:
            sizes = ", ".join(f"{key} {tuple(M.shape)}" for key, M in (("B", B), ("A", A), ("the model's W", W)))
            raise ValueError(f"{name}: the shapes do not fit: {sizes}; take an adapter of this model")
        total = (W.to(A.dtype) + B @ A).to(W.dtype)
        if not total.isfinite().all():
            raise ValueError(f"{name}: W + B A is not finite in {W.dtype}; the adapter diverged")
        W.copy_(total)
