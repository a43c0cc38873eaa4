"""What IPCV's card says of a tower, by pre-hooks on its stock blocks: an oracle."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch


class ByHand:
    """Pre-hooks on stock blocks, of one image: what enters them is what IPCV's card says."""

    def __init__(self, reducer, prefix, rows=None, groups=None):
        self.reducer, self.prefix, self.groups, self.inputs = reducer, prefix, groups, []
        self.rows = rows if rows is not None else self.gathered

    def gathered(self, value, tokens, n):
        if isinstance(value, tuple):
            return tuple(self.gathered(v, tokens, n) for v in value)
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        stay = [t - self.prefix for t in tokens if t >= self.prefix]
        if value.shape[-1] == value.shape[-2] == n:  # biases by relative position
            return value[..., tokens, :][..., tokens]
        if value.shape[-2] == n - self.prefix:
            return value[..., stay, :]
        return value[..., tokens, :] if value.shape[-2] == n else value

    def choose(self, h, before):
        """Tokens that stay, and the neighbours of every other one, in each of the groups."""
        n, stay, near = len(h), [*range(self.prefix)], {}
        for group in self.groups or [range(self.prefix, n)]:
            keep = self.reducer.keep
            left = keep if isinstance(keep, int) else max(int(len(group) * keep), 1)
            change = {i: float((h[i] - before[i]).norm()) for i in group}
            best = sorted(sorted(group, key=lambda i: -change[i])[:left])
            stay += best
            for i in set(group) - set(best):
                near[i] = sorted(best, key=lambda j: float((h[i] - h[j]).norm()))[: self.reducer.top_k]
        return sorted(stay), near

    def whole(self, y):
        if len(y) == len(self.h):  # as a block on all tokens left it; those that went are thrown away
            y = y[self.stay]
        out = self.h.clone()
        out[self.stay] = y
        for i, friends in self.near.items():
            places = [self.stay.index(j) for j in friends]
            out[i] = self.h[i] + (y[places] - self.h[friends]).mean(0)
        return out

    def before(self, layer):
        def hook(block, args, kwargs):
            name = next((k for k in ("hidden_states", "x") if k in kwargs), None)
            x = args[0] if name is None else kwargs[name]
            flat = x.reshape(-1, x.shape[-1])
            first, last = self.reducer.layer, self.reducer.layer + self.reducer.as_layer
            if layer == first:
                self.h = flat
                self.stay, self.near = self.choose(flat, self.inputs[-1])
            self.inputs.append(flat)
            if layer < first:
                return None
            y = self.whole(flat) if layer < last else flat[self.stay] if len(flat) == len(self.h) else flat
            y = y.view(*x.shape[:-2], *y.shape)
            if layer >= last:
                args = tuple(self.rows(a, self.stay, len(self.h)) for a in args)
                kwargs = {k: self.rows(v, self.stay, len(self.h)) for k, v in kwargs.items()}
            return ((y, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: y})

        return hook

    def behind(self, block, args, output):
        x = output[0] if isinstance(output, tuple) else output
        full = self.whole(x.reshape(-1, x.shape[-1])).view(*x.shape[:-2], -1, x.shape[-1])
        return (full, *output[1:]) if isinstance(output, tuple) else full

    @contextmanager
    def on(self, blocks):
        hooks = [b.register_forward_pre_hook(self.before(i), with_kwargs=True) for i, b in enumerate(blocks)]
        hooks.append(blocks[-1].register_forward_hook(self.behind))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


def views_of(tower, grids):
    """Places in the row of the patches of every image and frame."""
    frames, number = [], 0
    for t, h, w in grids.tolist():
        for _ in range(t):
            frames += [number] * (h * w // 4)
            number += 1
    order = range(len(frames))
    if hasattr(tower, "fullatt_block_indexes"):
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0].tolist()
    found = [[] for _ in range(number)]
    for place, unit in enumerate(order):
        found[frames[unit]] += range(4 * place, 4 * place + 4)
    return found


def rows(value, stay, n):
    """Of what a block is given, that of the patches ``stay`` of ``n``; windows are counted again, empty ones go."""
    if isinstance(value, tuple):
        return tuple(rows(v, stay, n) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 1 and int(value[-1]) == n:
        edges = [0]
        for low, high in zip(value[:-1].tolist(), value[1:].tolist(), strict=True):
            inside = sum(low <= s < high for s in stay)
            edges += [edges[-1] + inside] if inside else []
        return torch.tensor(edges, dtype=value.dtype)
    return value[stay] if len(value) == n and value.dim() > 1 else value


def packed_by_hand(tower, reducer, grids, pixels):
    groups = [range(int(grids.prod(1).sum()))] if reducer.per == "all" else views_of(tower, grids)
    by = ByHand(reducer, 0, rows, groups)

    def back(merger, args):
        return (by.whole(args[0]), *args[1:]) if hasattr(by, "h") else None

    with ExitStack() as stack:
        for merger in getattr(tower, "deepstack_merger_list", ()):
            stack.callback(merger.register_forward_pre_hook(back).remove)
        stack.enter_context(by.on(tower.blocks))
        return parts(tower(pixels, grid_thw=grids)), by


def parts(output):
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return [t for v in values for t in (v if isinstance(v, list | tuple) else (v,)) if isinstance(t, torch.Tensor)]
