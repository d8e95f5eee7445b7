"""The thresholds of a quantizer: what it decides for every integer in front of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from learnsched.export import graph as g
from learnsched.export.calls import Calls, activation_before, as_tensor
from learnsched.export.operations import shape_of
from learnsched.export.thresholds import search
from learnsched.export.values import Doubles, Integer

# Values of a second summand that get thresholds of their own.
_ROWS = 4096


def thresholds(calls: Calls, quantizer: fx.Node, levels: g.IntegerLevels) -> dict[str, Any] | None:
    """The fields of a :class:`~learnsched.export.graph.Threshold`, found by search.

    Args:
        calls: up to the quantizer.
        quantizer: the call.
        levels: what it puts out.

    Returns:
        fields, ``inputs`` and ``shape`` among them; None where a summand is real, there are more than
        two, or the second takes too many values: then real operations must do it.

    Raises:
        ExportError: an activation falls somewhere.
    """
    sources, shape = calls.sources(quantizer), shape_of(quantizer)
    pairs = [(s, v) for s in sources if isinstance(v := calls.value(s), Integer)]
    uniform = {shape_of(source) for source in sources} == {shape}
    if len(pairs) < len(sources) or len(pairs) > 2 or not uniform:
        return None
    calls.check_rising(quantizer)
    # The operand with the wider range is compared; each value of the other gets thresholds.
    order = sorted(
        range(len(pairs)), key=lambda i: -int((pairs[i][1].high - pairs[i][1].low).max())
    )
    pairs = [pairs[i] for i in order]
    (main_call, main), others = pairs[0], pairs[1:]
    row_low = min((int(value.low.min()) for _, value in others), default=0)
    rows = max((int(value.high.max()) - row_low + 1 for _, value in others), default=1)
    if rows > _ROWS:
        return None
    channels, rank, steps = shape[0], len(shape), len(levels.integers) - 1

    def codes(x: g.Integers, row: g.Integers) -> g.Integers:
        """Codes where the main operand is ``x`` and the other in ``row``: ``(many, channels)``."""
        given = {main_call: as_tensor(main.decode(x), rank)}
        for other, value in others:
            given[other] = as_tensor(value.decode(row + row_low), rank)
        return calls.codes(quantizer, given).reshape(x.shape)

    low, high = (np.broadcast_to(end, channels).copy() for end in (main.low, main.high))
    slopes = _slopes(calls, quantizer, order)
    if slopes is None:
        ends = np.stack([low, high]).repeat(rows, 0)
        row = np.broadcast_to(np.tile(np.arange(rows), 2)[:, None], ends.shape)
        first, last = np.split(codes(ends, row), 2)
        falling = (last < first).any(0)
    else:
        falling = slopes[0] < 0
    sign = np.where(falling, -1, 1)
    low, high = np.where(falling, -high, low), np.where(falling, -low, high)

    def code(signed: g.Integers) -> g.Integers:
        flat = (signed * sign[:, None, None]).transpose(1, 2, 0).reshape(-1, channels)
        row = np.broadcast_to(np.arange(rows).repeat(steps)[:, None], flat.shape)
        return codes(flat, row).reshape(rows, steps, channels).transpose(2, 0, 1)

    return {
        "inputs": tuple(value.node for _, value in pairs),
        "shape": shape,
        "sign": sign,
        "thresholds": search(code, low, high, rows, steps),
        "low": low,
        "high": high,
        "row_low": row_low,
        "levels": levels,
        "slopes": slopes,
    }


def _slopes(calls: Calls, quantizer: fx.Node, order: list[int]) -> Doubles | None:
    """Derivatives of what is quantized, in level steps, by each summand's integers."""
    module: Any = calls.operations[quantizer].module
    found = calls.integer_affine(quantizer.all_input_nodes[0])
    if found is None or activation_before(module) is not None:
        return None
    step = module.scale.double().item() * module.levels.step
    return np.stack([found[0][i] / step for i in order])
