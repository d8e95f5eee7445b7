"""What of a model stays real, though a user may take it for quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from learnsched.modules import KNOWN, QUANTIZED_LAYERS, QUANTIZED_TYPES, REAL, labelled, matrices


def notes_on_what_stays_real(
    model: nn.Module, products: Sequence[str], *, weights: bool
) -> Iterator[str]:
    """Modules that hold products or activations of no quantized kind.

    Args:
        model: before it is converted.
        products: names of parameters of no layer that products are formed with, as was seen.
        weights: whether any weight is quantized; else those that are not need no word.
    """
    attention = {n: m for n, m in model.named_modules() if type(m) is nn.MultiheadAttention}
    if weights and attention:
        yield (
            f"{[*attention]} stay real: they are nn.MultiheadAttention, whose projections are bare "
            "parameters; call learnsched.attention_to_linears_(model) first"
        )
    told = {module.out_proj for module in attention.values()}
    named = [
        (f"{name} ({type(module).__name__})", module)
        for name, module in model.named_modules()
        if module not in told
    ]
    if foreign := [
        n for n, module in named if isinstance(module, KNOWN) and type(module) not in KNOWN
    ]:
        yield (
            f"{foreign} stay real: what a subclass computes is not known (a parametrization makes one, "
            "too)"
        )
    if weights and (real := [n for n, module in named if isinstance(module, REAL)]):
        yield f"{real} stay real: of such layers no quantized kind is known"
    if weights and products:
        yield (
            f"{[*products]} stay real: the model forms products with these parameters itself; let an "
            "nn.Linear or a convolution hold them"
        )
    bare = [
        label
        for name, module in model.named_modules()
        if _is_a_layer_of_ones_own(module)
        for parameter in matrices(module)
        if (label := labelled(name, module, parameter)) not in products
    ]
    if weights and bare:
        yield (
            f"{bare} stay real: they are parameters of no layer of torch's; where products are formed "
            "with them, let an nn.Linear or a convolution hold them. What is looked up or added, as "
            "tables and positions are, is right as it is"
        )


def _is_a_layer_of_ones_own(module: nn.Module) -> bool:
    """Whether a module is not torch's, and leaves products to no layers inside of it, as blocks do."""
    known = (*KNOWN, *QUANTIZED_LAYERS, nn.Embedding, nn.EmbeddingBag)
    foreign = not type(module).__module__.startswith("torch.") and not isinstance(module, known)
    inside = (m for m in module.modules() if m is not module)
    return foreign and not any(isinstance(m, (*QUANTIZED_TYPES, *REAL)) for m in inside)
