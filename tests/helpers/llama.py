"""Tiny Llamas and their like as Hugging Face folders: random weights, a tokenizer trained on the licence."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from megatron_ext.conversion.families import FAMILIES
from tests.helpers.entry import ROOT

TOKENS, POSITIONS = 500, 256
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
# Megatron's llama3 scaling knows these numbers by heart. At 8 wavelengths a head, those of some pairs lie
# above, some between, and some below its two bounds.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SMOLLM3 = {"model_type": "smollm3", "pad_token_id": None}  # its default is beyond this vocabulary
# What is peculiar to a model; some have more rows than the tokenizer has tokens, as many models do.
CASES: dict[str, dict[str, Any]] = {
    "MHA": {"num_key_value_heads": 4},
    "GQA_wide_heads": {"num_key_value_heads": 2, "head_dim": 16},
    "MQA_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3_rope": {
        "rope_parameters": LLAMA3,
        "max_position_embeddings": 131072,
        "head_dim": 16,
        "rms_norm_eps": 1e-3,
    },
    "rows_beyond_the_tokenizer": {"vocab_size": 650},
    "attention_bias": {"attention_bias": True},
    "all_biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": POSITIONS, "head_dim": 16},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen2_wide_heads": {"model_type": "qwen2", "head_dim": 16},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "vocab_size": 650, "rms_norm_eps": 1e-2},
    "qwen3_attention_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "smollm3": {**SMOLLM3, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "smollm3_some": {**SMOLLM3, "no_rope_layers": [0, 1, 1, 0], "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True, **EXPERTS},
    "qwen3_moe_shares": {"model_type": "qwen3_moe", "head_dim": 8, **EXPERTS},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `TOKENS` tokens with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        # transformers gives Qwen's tokenizers the third where they lack it.
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def config(model_type: str = "llama", **changes: Any) -> PreTrainedConfig:
    """Four layers of four heads."""
    fields: dict[str, Any] = {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    built: PreTrainedConfig = FAMILIES[model_type].config(**fields | changes)
    return built


def model(**changes: Any) -> PreTrainedModel:
    """Every weight random, so that scales of one and biases of zero hide nothing."""
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config(**changes)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm.weight" in name else 0.2 * noise)
            # Megatron has no bias for this layer alone.
            if name.endswith("o_proj.bias") and not getattr(built.config, "mlp_bias", False):
                weight.zero_()
    return built


def save(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model with its tokenizer in a folder."""
    model(**changes).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def ids(count: int = POSITIONS) -> torch.Tensor:
    """Two sequences of tokens `[2, count]`."""
    return torch.randint(0, TOKENS, (2, count), generator=torch.Generator().manual_seed(3))
