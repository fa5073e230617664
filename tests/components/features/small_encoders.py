"""Encoders with weights as they are drawn, in the layouts in which their libraries publish any."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.parts import need

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rook", "gambit", "orbit", "##al")


def sentence_model(root: Path, seed: int = 0) -> Path:
    """A folder of sentence-transformers, `small`: two layers, the mean over the tokens, and a dense layer to 12."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (root / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "bert")
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "bert")
    modules = [Transformer(str(root / "bert")), Pooling(16), Dense(16, 12)]
    SentenceTransformer(modules=modules, device="cpu").save(str(root / "small"))
    return root / "small"


def clip_model(folder: Path) -> Path:
    """A folder of open_clip: a small ResNet to 12, with BatchNorm. Skips the test where open_clip is not there."""
    need("open_clip")
    import open_clip

    config = {
        "model_cfg": {
            "embed_dim": 12,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config["model_cfg"])
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder
