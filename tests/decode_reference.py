"""A plain decoder with choices in decode, one sample and one token at a time, to compare patched models with.

It reads what enters the first layer of a patched model, prompt and new tokens, and computes the rest from the layers'
weights: keys and values by column, features set aside by column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Entries:
    """``with Entries(layers) as entries``: for every call of the model, what enters layer 0: ``x`` (B,N,C) and rotary
    tables."""

    def __init__(self, layers):
        self.layer, self.calls = layers[0], []

    def see(self, module, args, kwargs):
        self.calls.append((args[0].detach(), *(t.detach() for t in kwargs["position_embeddings"])))

    def __enter__(self):
        self.hook = self.layer.register_forward_pre_hook(self.see, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *error):
        self.hook.remove()


def half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class Decoder:
    """One sample: ``real`` (L,) and ``visual`` (L,) mark columns of the prompt. ``choose(layer, row, columns, memory)``
    gives the set of columns that stay, of those that the row (n,) is about; ``memory`` is a dictionary of the layer's
    own. ``revive``: whether columns without keys come back."""

    def __init__(self, layers, norm, head, bounds, choose, *, revive, prunes):
        self.layers, self.norm, self.head, self.bounds = layers, norm, head, bounds
        self.choose, self.revive, self.prunes = choose, revive, prunes
        self.keys = [{} for _ in layers]
        self.aside = {b: {} for b in bounds}
        self.memory = {b: {} for b in bounds}
        self.tables, self.log = {}, []

    def layer(self, i, xs, live):
        """Run the features ``xs`` (column -> (C,)) through layer ``i``, where they see ``live`` columns before them;
        returns features and the last one's attention, mean over heads, by column."""
        layer, attention = self.layers[i], self.layers[i].self_attn
        d = attention.head_dim
        for c, x in xs.items():
            y = layer.input_layernorm(x)
            cos, sin = self.tables[c]
            k = attention.k_proj(y).view(-1, d)
            self.keys[i][c] = (k * cos + half(k) * sin, attention.v_proj(y).view(-1, d))
        out = {}
        for c, x in xs.items():
            cos, sin = self.tables[c]
            q = attention.q_proj(layer.input_layernorm(x)).view(-1, d)
            q = q * cos + half(q) * sin
            seen = [j for j in sorted(live | {c}) if j <= c]
            k, v = (torch.stack([self.keys[i][j][n] for j in seen], 1) for n in (0, 1))
            k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
            weights = (torch.einsum("hd,hnd->hn", q, k) * attention.scaling).softmax(-1)
            y = x + attention.o_proj(torch.einsum("hn,hnd->hd", weights, v).flatten())
            out[c] = y + layer.mlp(layer.post_attention_layernorm(y))
        return out, dict(zip(seen, weights.mean(0).tolist(), strict=True))

    def run(self, xs, tables):
        """One call: features and tables by column, columns ascending; the logits of the last."""
        prefill = not self.tables
        self.tables.update(tables)
        last = max(xs)
        live, row = set(self.tables), {}
        for i in range(len(self.layers)):
            if i in self.bounds and (not prefill or self.prunes):
                stay = self.choose(i, row, self.memory[i]) | {last}
                if not prefill:
                    self.log.append((i, stay))
                if self.prunes:
                    self.aside[i].update({c: x for c, x in xs.items() if c not in stay})
                    lacking = {c for c in stay if c not in self.keys[i]}
                    xs = {c: xs[c] if c in xs else self.aside[i].pop(c) for c in sorted(lacking)}
                live = stay
            xs, row = self.layer(i, xs, live)
        return F.linear(self.norm(xs[last]), self.head.weight)


def decode(model, entries, b, real, visual, **how):
    """Logits (steps, V) of sample ``b`` for the calls that ``entries`` saw, and the decoder."""
    text = model.model.language_model
    decoder = Decoder(text.layers, text.norm, model.lm_head, **how)
    logits, at = [], len(real)
    with torch.no_grad():
        for n, (x, cos, sin) in enumerate(entries.calls):
            if cos.dim() == 4:  # early releases mix the axes of M-RoPE in the layers
                parts = text.config.rope_parameters["mrope_section"] * 2
                cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(t.split(parts, -1))], -1) for t in (cos, sin))
            cos, sin = (t.expand(len(x), -1, -1)[b] for t in (cos, sin))
            columns = real.nonzero().flatten().tolist() if n == 0 else [at]
            where = columns if n == 0 else [0]
            at += n > 0
            xs = {c: x[b, i] for c, i in zip(columns, where, strict=True)}
            logits.append(decoder.run(xs, {c: (cos[i], sin[i]) for c, i in zip(columns, where, strict=True)}))
    return torch.stack(logits), decoder
