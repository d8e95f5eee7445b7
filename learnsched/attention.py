"""Attention whose projections are layers of their own, for ``quantize_`` to take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_REPLACED = ("in_proj_weight", "in_proj_bias", *(f"{p}_weight" for p in _PROJECTIONS))
_OUTPUTS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class ProjectedAttention(nn.MultiheadAttention):
    """What :func:`attention_to_linears_` makes of an ``nn.MultiheadAttention``.

    It is called as that is (Vaswani et al. 2017, section 3.2.2), and computes with the modules
    ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. Float states of before the change can be loaded.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention.forward`` does.

        Raises:
            ValueError: ``is_causal`` comes without the mask that it is a hint of.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal tells of what kind attn_mask is; give attn_mask, too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._heads(self.q_proj(query))
        k, v = (
            self._heads(self._extended(projected, more))
            for projected, more in (
                (self.k_proj(key), self.bias_k),
                (self.v_proj(value), self.bias_v),
            )
        )
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` to ``(batch, heads, length, width of a head)``."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extended(self, projected: Tensor, more: Tensor | None) -> Tensor:
        """Keys or values with those that the module adds behind them."""
        if more is not None:
            projected = torch.cat([projected, more.expand(len(projected), 1, -1)], 1)
        return F.pad(projected, (0, 0, 0, 1)) if self.add_zero_attn else projected

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores, of a shape that broadcasts to theirs; None for nothing."""
        parts = []
        if attn_mask is not None:  # (queries, keys) or (batch · heads, queries, keys)
            each = (len(q), self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            parts.append(_added(attn_mask, q).reshape(*each, *attn_mask.shape[-2:]))
        if key_padding_mask is not None:  # (batch, keys), or (keys,) of one that is not a batch
            padding = _added(key_padding_mask, q)
            parts.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
        if not parts:
            return None
        # The added keys are never masked.
        mask = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return F.pad(mask, (0, k.shape[2] - mask.shape[-1]))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for kind in ("weight", "bias"):
            packed = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if packed is not None:
                parts = zip(_PROJECTIONS, packed.chunk(3), strict=True)
                state_dict.update({f"{prefix}{name}.{kind}": part for name, part in parts})
        for name in _PROJECTIONS:
            own = state_dict.pop(f"{prefix}{name}_weight", None)
            if own is not None:
                state_dict[f"{prefix}{name}.weight"] = own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def attention_to_linears_(model: nn.Module) -> nn.Module:
    """Give each ``nn.MultiheadAttention`` linear layers for its projections, in place.

    The projections of torch's attention, ``nn.TransformerEncoderLayer`` and the like among its users,
    are bare parameters, three of them in one; :func:`learnsched.quantize_` takes layers. Afterwards the
    modules are :class:`ProjectedAttention`, with the same values and outputs up to rounding, and the
    children ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. The parameters of the first three are
    new ones: make the optimizer after this. States of the model as it was can be loaded still.

    Args:
        model: any module, before it is quantized.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has no ``nn.MultiheadAttention``, or its projections are computed from
            other parameters, as by pruning, or are parameters that have other places in the model too.
            The model is as it was.

    Example:
        >>> net = attention_to_linears_(nn.TransformerEncoderLayer(8, 2, 16))
        >>> [name for name, _ in net.self_attn.named_children()]
        ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
    }
    if not found:
        raise ValueError(
            "the model has no nn.MultiheadAttention; quantize_ takes attention of nn.Linear as it is"
        )
    _refuse_shared(model, found)
    linears = {module: _projections(name, module) for name, module in found.items()}
    # All that can fail comes before this line: from here on the model changes.
    for attention, projections in linears.items():
        for name in _REPLACED:
            attention.register_parameter(name, None)
        output = attention.out_proj
        del attention.out_proj  # and back again, behind the others
        for name, linear in {**projections, "out_proj": output}.items():
            attention.add_module(name, linear.train(attention.training))
        # A linear layer but for its name, which keeps it from torch's own quantization.
        output.__class__ = nn.Linear  # type: ignore[assignment]
        attention.__class__ = ProjectedAttention
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):  # which would look for the parameters
            module.use_nested_tensor = False
    return model


def _refuse_shared(model: nn.Module, found: Mapping[str, nn.MultiheadAttention]) -> None:
    """Refuse projections whose parameters have other places too, which would keep the old ones."""
    places: dict[Any, list[str]] = {}
    for name, module in model.named_modules():  # once each, however often the model refers to it
        for own, parameter in module.named_parameters(name, recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append(own)
    for attention in found.values():
        for kind in _REPLACED:
            shared = places.get(getattr(attention, kind), [])
            if len(shared) > 1:
                raise ValueError(
                    f"{shared} are one parameter, and each projection gets parameters of its own; give "
                    "each place its own first (nn.Parameter(weight.detach().clone())), and share those "
                    "of q_proj, k_proj and v_proj afterwards, if they are to be shared"
                )


def _projections(name: str, module: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Linear layers with the values of the projections of queries, keys and values."""
    if type(module.out_proj) not in _OUTPUTS:
        raise ValueError(
            f"out_proj of {name or 'the model'} is a {type(module.out_proj).__name__}, not torch's own "
            "linear layer, as with parametrizations; remove that first"
        )
    own = dict(module.named_parameters(recurse=False))
    packed = module._qkv_same_embed_dim
    names = ("in_proj_weight",) if packed else tuple(f"{p}_weight" for p in _PROJECTIONS)
    if missing := [n for n in names if n not in own]:
        raise ValueError(
            f"{missing} of {name or 'the model'} is computed from others, as by pruning; remove that "
            "first"
        )
    weights = own[names[0]].chunk(3) if packed else [own[n] for n in names]
    bias = own.get("in_proj_bias")
    biases = [None] * 3 if bias is None else bias.chunk(3)
    trained = own[names[0]].requires_grad
    result = {}
    for projection, weight, part in zip(_PROJECTIONS, weights, biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], part is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(), trained)
        if part is not None and bias is not None:
            linear.bias = nn.Parameter(part.detach().clone(), bias.requires_grad)
        result[projection] = linear
    return result


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to scores: booleans are True where there is to be no attention."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
