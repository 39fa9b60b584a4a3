"""Small transformers that tests prune: Hugging Face's own, from tiny configurations, and others written here."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}


class Logits(nn.Module):
    """A Hugging Face model that gives a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs).logits


def bert(width=32, layers=2):
    sizes = {**TINY, "hidden_size": width, "num_hidden_layers": layers}
    return Logits(BertForSequenceClassification(BertConfig(**TOKENS, **sizes)))


def vit():
    return Logits(ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4, num_channels=1)))


def gpt2(layers=2):
    return Logits(GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=32, n_layer=layers, n_head=4, n_positions=16)))


def llama():
    return Logits(LlamaForCausalLM(LlamaConfig(**TOKENS, **TINY, num_key_value_heads=2, max_position_embeddings=16)))


class FusedAttention(nn.Module):
    """Rows of `qkv` lie [3, heads, head_dim]."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class HeadsFirstAttention(nn.Module):
    """Rows of `qkv` lie [heads, 3, head_dim]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.depth = heads, 3
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


class SeparateAttention(nn.Module):
    """Runs, and gives other numbers, when rows leave q, k and v but `n_heads` stays."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.n_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * 0.3).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


class BiasedAttention(SeparateAttention):
    """With a bias for each head, as for relative positions."""

    def __init__(self, dim, n_heads):
        super().__init__(dim, n_heads)
        self.head_bias = nn.Parameter(torch.randn(n_heads, 16, 16))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.n_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * 0.3 + self.head_bias).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


class StaleAttention(FusedAttention):
    """Takes the size of a head from the width of its input."""

    def forward(self, x):
        b, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, dim))


class InterleavedAttention(SeparateAttention):
    """Runs another linear layer between those of its queries and keys."""

    def __init__(self, dim, n_heads):
        super().__init__(dim, n_heads)
        self.gate = nn.Linear(dim, 1)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.n_heads, -1).transpose(1, 2)
        gate = self.gate(x)
        k, v = (layer(x).view(b, n, self.n_heads, -1).transpose(1, 2) for layer in (self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * 0.3).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1) * gate.sigmoid())


class TorchAttention(nn.MultiheadAttention):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


ATTENTIONS = {
    "fused": FusedAttention,
    "heads_first": HeadsFirstAttention,
    "separate": SeparateAttention,
    "biased": BiasedAttention,
    "stale": StaleAttention,
    "interleaved": InterleavedAttention,
    "torch": TorchAttention,
}


class PatchTransformer(nn.Module):
    """Images (N, 1, 8, 8) as 16 patches, two blocks, ten classes."""

    def __init__(self, attention, dim=32, heads=4):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.positions = nn.Parameter(torch.randn(16, dim))
        self.blocks = nn.ModuleList(Block(ATTENTIONS[attention], dim, heads) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class EncoderLayers(nn.Module):
    """Torch's own encoder."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.encoder(images.squeeze(1)).mean(dim=1))
