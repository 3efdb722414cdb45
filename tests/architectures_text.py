"""Small models of languages, and of what is said: setups as their users write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from accumkern.planning.protocol import Setup

VOCABULARY = 64
LENGTH = 16
BFLOAT16 = torch.bfloat16


def text(length: int = 4096) -> Tensor:
    """Return text in which the next token mostly follows from the last one."""
    random = np.random.RandomState(0)  # of its own: global random numbers stay as they are
    noise = random.randint(0, VOCABULARY - 4, length)
    tokens = [1]
    for i in range(length - 1):
        tokens.append(4 + (noise[i] if i % 8 == 0 else (5 * tokens[-1] + 3) % (VOCABULARY - 4)))
    return torch.tensor(tokens)


TEXT = text()


def sentences(size: int) -> Tensor:
    """Return sentences that a random place in the text begins; tokens below 4 are special."""
    return torch.stack([TEXT[i : i + LENGTH] for i in torch.randint(len(TEXT) - LENGTH, (size,))])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.attention(self.norm1(x)).chunk(3, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 32, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._init)
        if tied:
            self.head.weight = self.tokens.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def next_tokens(size: int) -> tuple[Tensor, Tensor]:
    ix = torch.randint(len(TEXT) - LENGTH, (size,))
    x = torch.stack([TEXT[i : i + LENGTH] for i in ix])
    y = torch.stack([TEXT[i + 1 : i + 1 + LENGTH] for i in ix])
    return x, y


def gpt() -> Any:
    """As nanoGPT is: a seed, text sliced by index, weight decay for matrices only."""
    torch.manual_seed(1337)
    model = GPT().to(BFLOAT16)
    decayed = [param for param in model.parameters() if param.dim() >= 2]
    others = [param for param in model.parameters() if param.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    return Setup(model, optimizer, next_tokens, lambda model, batch: model(*batch), tokens_per_sample=LENGTH)


def tied() -> Any:
    """The embedding is the head."""
    model = GPT(tied=True).to(BFLOAT16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, next_tokens, lambda model, batch: model(*batch)


def causal(model: nn.Module, learning_rate: float) -> Any:
    def make_batch(size: int) -> dict[str, Tensor]:
        tokens = sentences(size)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    return Setup(model, optimizer, make_batch, lambda model, batch: model(**batch).loss, tokens_per_sample=LENGTH)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = SMALL | {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}


def llama() -> Any:
    config = transformers.LlamaConfig(**ATTENTION, num_key_value_heads=2)
    return causal(transformers.LlamaForCausalLM(config).to(BFLOAT16).train(), 3e-3)


def moe(dtype: torch.dtype = torch.float32) -> Any:
    """Mixtral: each token goes to two of four experts, and the router's loss is added."""
    config = transformers.MixtralConfig(
        **ATTENTION, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    return causal(transformers.MixtralForCausalLM(config).to(dtype).train(), 3e-3)


def moe_bfloat16() -> Any:
    return moe(BFLOAT16)


def mamba() -> Any:
    """State spaces, on the slow path in plain torch."""
    config = transformers.MambaConfig(**SMALL | {"num_hidden_layers": 1}, state_size=8, time_step_rank=4)
    return causal(transformers.MambaForCausalLM(config).train(), 3e-3)


def bert() -> Any:
    """Masked tokens, as the collator of transformers masks them: through booleans; only those count in the loss."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**ATTENTION)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def make_batch(size: int) -> dict[str, Tensor]:
        tokens = sentences(size)
        labels = tokens.clone()
        is_masked = torch.bernoulli(torch.full(labels.shape, 0.15)).bool()
        is_masked[:, 0] = True  # one in each sentence
        labels[~is_masked] = -100
        tokens[is_masked] = 3
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    return model, optimizer, make_batch, lambda model, batch: model(**batch).loss


def t5() -> Any:
    """Sentences of all lengths, padded to the longest of the batch; `longest_batch` says how long they can get."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).to(BFLOAT16).train()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=3e-2)

    def padded(tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        tokens = tokens[:, : int(lengths.max())]
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}

    def make_batch(size: int) -> dict[str, Tensor]:
        return padded(sentences(size), torch.randint(LENGTH // 2, LENGTH + 1, (size,)))

    def longest_batch(size: int) -> dict[str, Tensor]:
        return padded(sentences(size), torch.full((size,), LENGTH))

    return Setup(model, optimizer, make_batch, lambda model, batch: model(**batch).loss, longest_batch)


def whisper() -> Any:
    """Spectrograms in bfloat16, and what is said in them."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config).to(BFLOAT16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sounds = torch.from_numpy(np.random.RandomState(2).randn(VOCABULARY, 16, 2).astype(np.float32))

    def make_batch(size: int) -> dict[str, Tensor]:
        tokens = sentences(size)
        spectrograms = sounds[tokens].permute(0, 2, 1, 3).flatten(2)  # (size, mel bins, two frames for each token)
        return {"input_features": spectrograms.to(BFLOAT16), "labels": tokens}

    return model, optimizer, make_batch, lambda model, batch: model(**batch).loss


class LoRA(nn.Module):
    """A frozen linear layer and a trained one of low rank in float32 beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x.to(self.down.dtype) @ self.down.T @ self.up.T).to(x.dtype)


def lora() -> Any:
    """A frozen base in bfloat16; the optimizer has the adapters alone."""
    model = GPT(width=64).to(BFLOAT16).requires_grad_(False)
    for block in model.blocks:
        for name in ("attention", "projection"):
            setattr(block, name, LoRA(getattr(block, name)))
    model.head = LoRA(model.head)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    return model, optimizer, next_tokens, lambda model, batch: model(*batch)
