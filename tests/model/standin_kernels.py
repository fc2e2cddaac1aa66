"""Stand-ins for the kernels of GPUs, on the CPU: attention over sequences of any length, as the
kernels' documentation says what they do. They differ from ours: scores of a whole sequence and its
mask, in float32, and torch's own derivative."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch


def attention(query, key, value, ends, key_ends, *, scale=None, causal=False, window=(-1, -1)):
    """(q, h, d), (k, g, d), (k, g, d) of sequences end to end -> (q, h, d).

    The last query of a sequence is aligned with its last key. Of the window, -1 is no limit.
    """
    assert ends.dtype == key_ends.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    groups = query.shape[1] // key.shape[1]
    left, right = window[0], 0 if causal else window[1]
    outputs = []
    for i in range(len(ends) - 1):
        q, k, v = (
            states[limits[i] : limits[i + 1]].float()
            for states, limits in ((query, ends), (key, key_ends), (value, key_ends))
        )
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or query.shape[-1] ** -0.5)
        place = torch.arange(len(q))[:, None] + len(k) - len(q)
        back = place - torch.arange(len(k))
        hidden = torch.zeros_like(back, dtype=torch.bool)
        if right >= 0:
            hidden |= back < -right
        if left >= 0:
            hidden |= back > left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs).to(query.dtype)


def varlen(release, calls):
    """`torch.nn.attention.varlen` of a release of torch; each call is noted."""

    def of_210(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
        calls.append(None)
        assert query.shape[1] == key.shape[1]
        return attention(query, key, value, cu_q, cu_k, causal=is_causal)

    def of_211(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        calls.append(window_size)
        assert query.shape[1] == key.shape[1]
        return attention(query, key, value, cu_q, cu_k, scale=scale, window=window_size)

    def of_213(
        query,
        key,
        value,
        cu_q,
        cu_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        calls.append(window_size)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return attention(query, key, value, cu_q, cu_k, scale=scale, window=window_size)

    return SimpleNamespace(varlen_attn={"2.10": of_210, "2.11": of_211, "2.13": of_213}[release])


def flash_attn(calls):
    """The package flash-attn 2, as far as transformers asks for it."""

    def varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        calls.append(window_size)
        options = {"scale": softmax_scale, "causal": causal, "window": window_size}
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    def func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
        options = {"scale": softmax_scale, "causal": causal, "window": window_size}
        ends = [torch.tensor([0, states.shape[1]], dtype=torch.int32) for states in (q, k)]
        rows = [attention(*row, *ends, **options) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def unpad_input(states, mask, *_):
        lengths = mask.sum(dim=1, dtype=torch.int32)
        where = mask.flatten().nonzero().flatten()
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return states.flatten(0, 1)[where], where, ends, int(lengths.max()), lengths

    def pad_input(states, where, batch, length):
        whole = states.new_zeros(batch * length, *states.shape[1:])
        return whole.index_copy(0, where, states).unflatten(0, (batch, length))

    made, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    made.__version__ = "2.8.3"
    made.flash_attn_func, made.flash_attn_varlen_func = func, varlen_func
    made.flash_attn_with_kvcache = None  # of generation
    padding.pad_input, padding.unpad_input = pad_input, unpad_input
    return {"flash_attn": made, "flash_attn.bert_padding": padding}


def installed(monkeypatch, modules):
    """The modules in the place of packages."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
