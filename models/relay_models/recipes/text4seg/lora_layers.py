"""A frozen Llama with LoRA (arXiv 2106.09685), for many questions about one picture in a single pass.

The sequence is one prefix (system sentence, picture) and several questions with their answers. Every question sees the
prefix and itself, and its positions go on from the prefix, as if it alone had been asked: what is computed is what as
many passes would give, but the prefix is computed once, and attention never forms a mask over the whole sequence.

The change is for the picture and what follows it: tokens before it are computed as the base computes them, as when
the model is served (activated LoRA, arXiv 2504.12397). Weights are merged before each step (`merge`) and rounded to the
base's dtype; the gradient of the halves is formed without that of the whole (`_LoraLinear`).

Legend: S tokens of a packed sequence, P of them the prefix, Q questions, L the longest of them, D width, N heads,
H a head's width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Matrices that read the same input are one matrix here.
_GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class PackedLayout:
    """Where in a packed sequence the questions are.

    Attributes:
        prefix: tokens of the prefix.
        lengths: tokens of each question, in order, its answer included.
        unchanged: tokens at the beginning of the prefix that are computed as the base computes them.
    """

    prefix: int
    lengths: tuple[int, ...]
    unchanged: int = 0

    def positions_S(self, device: torch.device) -> Tensor:  # noqa: N802
        ends = (self.prefix, *(self.prefix + length for length in self.lengths))
        begins = (0, *[self.prefix] * len(self.lengths))
        return torch.cat([torch.arange(*span, device=device) for span in zip(begins, ends, strict=True)])

    def padded_QL(self, device: torch.device) -> tuple[Tensor, Tensor]:  # noqa: N802
        """For each question and place, which token of the sequence stands there, and whether one does."""
        longest = max(self.lengths)
        place_L = torch.arange(longest, device=device)
        lengths_Q = torch.tensor(self.lengths, device=device)
        starts_Q = self.prefix + lengths_Q.cumsum(0) - lengths_Q
        is_token_QL = place_L < lengths_Q[:, None]
        return torch.where(is_token_QL, starts_Q[:, None] + place_L, self.prefix), is_token_QL


@dataclass(frozen=True, eq=False)
class Guide:
    """Where heads should look, and where tokens should know to be: what `LoraLlama` measures while it computes.

    Attributes:
        source_M: tokens of the questions, as places in the sequence.
        wanted_M: for each head of ``heads``, [M, P] which tokens of the prefix it should look at.
        layers: whose heads are measured.
        heads: pairs of key head and query head among those that share it.
        probed: layers whose output is returned for ``source_M``.
        stop: the layer after which nothing is computed, None for the last.
    """

    source_M: Tensor  # noqa: N815
    wanted_M: tuple[Tensor, ...]  # noqa: N815
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    probed: tuple[int, ...]
    stop: int | None = None


class _LoraLinear(torch.autograd.Function):
    """x @ merged.T, where merged = base + scale * up @ down is not differentiated as a whole, but in its halves.

    The first ``unchanged`` rows are x @ base.T. Nothing that is trained comes before them: they get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, merged: Tensor, scale: float, unchanged: int, *halves: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, merged, *halves)
        ctx.scale, ctx.unchanged = scale, unchanged
        y = F.linear(x, merged)
        y[:unchanged] = F.linear(x[:unchanged], base)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, merged, *halves = ctx.saved_tensors
        dx = dy @ merged
        dx[: ctx.unchanged] = 0
        x, dy = x[ctx.unchanged :], dy[ctx.unchanged :]
        found: list[Tensor | None] = []
        start = 0
        for down, up in zip(halves[::2], halves[1::2], strict=True):
            dy_part = dy[:, start : start + len(up)]
            start += len(up)
            x_R = x @ down.to(x.dtype).T
            dy_R = dy_part @ up.to(dy.dtype)
            found.append((dy_R.T @ x).float() * ctx.scale)
            found.append((dy_part.T @ x_R).float() * ctx.scale)
        return dx, None, None, None, None, *found


class _Group(nn.Module):
    """Frozen matrices that read the same input, as one, each with the halves of its change."""

    def __init__(self, bases: Sequence[Tensor], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("base", torch.cat(list(bases)), persistent=False)
        self.register_buffer("merged", self.base.clone(), persistent=False)
        width = bases[0].shape[1]
        self.downs = nn.ParameterList(
            (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width) for _ in bases
        )
        self.ups = nn.ParameterList(torch.zeros(len(base), rank) for base in bases)

    @torch.no_grad()
    def merge(self) -> None:
        start = 0
        for down, up in zip(self.downs, self.ups, strict=True):
            rows = slice(start, start + len(up))
            dtype = self.base.dtype
            torch.addmm(self.base[rows], up.to(dtype), down.to(dtype), alpha=self.scale, out=self.merged[rows])
            start += len(up)

    def forward(self, x_SD: Tensor, unchanged: int) -> Tensor:
        halves = [half for pair in zip(self.downs, self.ups, strict=True) for half in pair]
        return _LoraLinear.apply(x_SD, self.base, self.merged, self.scale, unchanged, *halves)


class LoraLlama(nn.Module):
    """SmolLM2 or another Llama without biases, frozen, with LoRA on every linear layer."""

    def __init__(
        self,
        config: Any,
        tensors: Mapping[str, Tensor],
        *,
        rank: int,
        alpha: float,
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """``config`` is a LlamaConfig; ``tensors`` are named as a LlamaForCausalLM's."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width = config.head_dim
        self.register_buffer("embeddings", tensors["model.embed_tokens.weight"].to(dtype), persistent=False)
        self.register_buffer("last_norm", tensors["model.norm.weight"].to(dtype), persistent=False)
        self.layers = nn.ModuleList()
        for number in range(config.num_hidden_layers):
            prefix = f"model.layers.{number}."
            layer = nn.Module()
            for name, modules in _GROUPS.items():
                bases = [tensors[f"{prefix}{module}.weight"].to(dtype) for module in modules]
                layer.add_module(name, _Group(bases, rank, alpha / rank, generator))
            for name in ("input_layernorm", "post_attention_layernorm"):
                layer.register_buffer(name, tensors[f"{prefix}{name}.weight"].to(dtype), persistent=False)
            self.layers.append(layer)
        half = torch.arange(0, self.head_width, 2) / self.head_width
        self.register_buffer("frequencies", config.rope_parameters["rope_theta"] ** -half, persistent=False)

    def merge(self) -> None:
        """Take the halves into the weights: before each step that follows a change of them."""
        for layer in self.layers:
            for name in _GROUPS:
                getattr(layer, name).merge()

    def named_halves(self) -> dict[str, nn.Parameter]:
        """``language_model.MODULE.lora_A.weight`` (down) and ``.lora_B.weight`` (up) to the parameters themselves."""
        named = {}
        for number, layer in enumerate(self.layers):
            for group, modules in _GROUPS.items():
                for index, module in enumerate(modules):
                    name = f"language_model.model.layers.{number}.{module}"
                    named[f"{name}.lora_A.weight"] = getattr(layer, group).downs[index]
                    named[f"{name}.lora_B.weight"] = getattr(layer, group).ups[index]
        return named

    def forward(self, x_SD: Tensor, layout: PackedLayout) -> Tensor:
        """Last hidden states [S, D] (normalised) of embeddings [S, D]."""
        return self.guided(x_SD, layout, None)[0]

    def guided(self, x_SD: Tensor, layout: PackedLayout, guide: Guide | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Last hidden states, the shares of attention [layers, M, heads] that went where the guide says, and for each
        probed layer [M, D] hidden states; the latter two are empty without a guide."""
        shares: list[Tensor] = []
        probed: list[Tensor] = []
        angles_SH = layout.positions_S(x_SD.device)[:, None] * self.frequencies
        cos_S1H = torch.cat((angles_SH.cos(), angles_SH.cos()), -1)[:, None].to(x_SD.dtype)
        sin_S1H = torch.cat((-angles_SH.sin(), angles_SH.sin()), -1)[:, None].to(x_SD.dtype)
        attention = _Attention(layout, self.heads // self.kv_heads, x_SD.dtype, x_SD.device)
        for number, layer in enumerate(self.layers):
            y_SD = self._norm(x_SD, layer.input_layernorm)
            qkv = layer.qkv(y_SD, layout.unchanged).view(len(x_SD), -1, self.head_width)
            qk, v = qkv[:, : self.heads + self.kv_heads], qkv[:, self.heads + self.kv_heads :]
            qk = qk * cos_S1H + qk.roll(self.head_width // 2, -1) * sin_S1H
            q, k = qk[:, : self.heads], qk[:, self.heads :]
            watched = guide if guide is not None and number in guide.layers else None
            mixed, seen = attention(q, k, v, watched)
            shares += seen
            x_SD = x_SD + layer.out(mixed, layout.unchanged)
            y_SD = self._norm(x_SD, layer.post_attention_layernorm)
            gate, up = layer.gate_up(y_SD, layout.unchanged).chunk(2, -1)
            x_SD = x_SD + layer.down(F.silu(gate) * up, layout.unchanged)
            if guide is not None and number in guide.probed:
                probed.append(x_SD[guide.source_M])
            if guide is not None and number == guide.stop:
                break
        return self._norm(x_SD, self.last_norm), torch.stack(shares) if shares else x_SD[:0], probed

    def _norm(self, x_SD: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_SD, (x_SD.shape[-1],), weight, self.config.rms_norm_eps)


class _Attention:
    """Attention of a packed sequence: the prefix by itself, the questions as a batch that sees the prefix's keys.

    Written as matrix products: in bfloat16 on a CPU these are several times as fast as the fused kernel with a mask.
    Query heads that share a key head stand below one another, so that no key is repeated.
    """

    def __init__(self, layout: PackedLayout, group: int, dtype: torch.dtype, device: torch.device) -> None:
        self.prefix, self.group = layout.prefix, group
        self.prefix_mask = _causal(layout.prefix, group, dtype, device)
        if layout.lengths:
            self.index_QL, self.is_token_QL = layout.padded_QL(device)
            self.own_mask = _causal(self.index_QL.shape[1], group, dtype, device)

    def __call__(self, q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, guide: Guide | None) -> tuple[Tensor, list[Tensor]]:
        P = self.prefix
        q_SNH = q_SNH * q_SNH.shape[-1] ** -0.5
        prefix_k, prefix_v = k_SNH[:P].transpose(0, 1), v_SNH[:P].transpose(0, 1)  # [kv heads, P, H]
        q = self._grouped(q_SNH[None, :P])[0]
        weights = (q @ prefix_k.transpose(1, 2) + self.prefix_mask).softmax(-1)
        prefix_PD = self._ungrouped((weights @ prefix_v)[None])[0]
        if len(q_SNH) == P:
            return prefix_PD, []
        q, k, v = (x.index_select(0, self.index_QL.reshape(-1)) for x in (q_SNH, k_SNH, v_SNH))
        q, k, v = (x.view(*self.index_QL.shape, *x.shape[1:]) for x in (q, k, v))
        q, k, v = self._grouped(q), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.cat((q @ prefix_k.transpose(1, 2), q @ k.transpose(2, 3) + self.own_mask), -1)
        weights = scores.softmax(-1)
        to_prefix, to_own = weights.split((P, weights.shape[-1] - P), -1)
        mixed_QLD = self._ungrouped(to_prefix @ prefix_v + to_own @ v)
        seen = [] if guide is None else [self._shares(to_prefix, guide)]
        return torch.cat((prefix_PD, mixed_QLD[self.is_token_QL])), seen

    def _shares(self, to_prefix: Tensor, guide: Guide) -> Tensor:
        """[M, heads] of attention weights [Q, kv heads, L * group, P]."""
        device = to_prefix.device
        place_S = torch.zeros(self.prefix + int(self.is_token_QL.sum()), dtype=torch.long, device=device)
        place_QL = torch.arange(self.is_token_QL.numel(), device=device).view_as(self.index_QL)
        place_S[self.index_QL[self.is_token_QL]] = place_QL[self.is_token_QL]
        place_M = place_S[guide.source_M]
        question_M, token_M = place_M // self.index_QL.shape[1], place_M % self.index_QL.shape[1]
        key_head_H, head_H = torch.tensor(guide.heads, device=device).unbind(1)
        weights_MHP = to_prefix[question_M[:, None], key_head_H, token_M[:, None] * self.group + head_H]
        return (weights_MHP * torch.stack(guide.wanted_M, 1)).sum(-1)

    def _grouped(self, q_QLNH: Tensor) -> Tensor:
        """[Q, kv heads, L * group, H]"""
        Q, L, N, H = q_QLNH.shape
        return q_QLNH.view(Q, L, N // self.group, self.group, H).transpose(1, 2).reshape(Q, -1, L * self.group, H)

    def _ungrouped(self, x: Tensor) -> Tensor:
        """[Q, L, D] of what `_grouped` made."""
        Q, kv_heads, rows, H = x.shape
        L = rows // self.group
        return x.view(Q, kv_heads, L, self.group, H).transpose(1, 2).reshape(Q, L, -1)


def _causal(length: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores [length * group, length]: each token sees itself and those before it."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1).repeat_interleave(group, 0)
    return torch.zeros(length * group, length, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))
