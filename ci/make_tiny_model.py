"""Writes a tiny random model that SGLang can serve without network or weights.

    python make_tiny_model.py TARGET --arch llama|qwen3moe|mixtral

Needs `tokenizers` and `transformers`, so it is run by the environment that
`install_sglang_cpu.sh` builds. The weights are left to `--load-format dummy`. The same
arguments give the same files. TARGET appears only when it is complete.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

VOCABULARY = 2048
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
CONTEXT = 4096
HIDDEN = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False},
    "qwen3moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": HIDDEN // 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}


def model_config(arch: str) -> dict[str, Any]:
    """Two layers, four heads on two key-value heads: enough to be split over two ranks."""
    bos, eos, pad = (SPECIAL_TOKENS.index(token) for token in SPECIAL_TOKENS[1:])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 4,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float32",
        **ARCHITECTURES[arch],
    }


def save_tokenizer(target: Path) -> None:
    """A byte-level BPE tokenizer: encodes any text, decodes any id.

    SGLang wants a vocabulary of exactly the size in the configuration. Trained on every
    pair of the syllables below, the merges suffice for that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    syllables = [c + v + end for c in "bdfgklmnprst" for v in "aeiou" for end in ("", "n", "s")]
    corpus = (" ".join(pair) + "".join(pair) for pair in itertools.product(syllables, repeat=2))
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    size = tokenizer.get_vocab_size()
    assert size == VOCABULARY, f"the corpus gives {size} tokens, not {VOCABULARY}"
    unknown, bos, eos, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)


def main() -> None:
    """Reads the command line and writes the model."""
    parser = argparse.ArgumentParser(description="Write a tiny random model.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="llama")
    options = parser.parse_args()
    config = model_config(options.arch)
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    partial = options.target.with_name(f"{options.target.name}.partial.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        save_tokenizer(partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
        partial.replace(options.target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
