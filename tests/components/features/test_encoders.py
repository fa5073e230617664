"""encoders: colours and edges that can be counted by hand; models loaded from safetensors, and from nothing else."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from components.features.encoders import image_encoder, text_encoder
from tests.components.features.small_encoders import clip_model, sentence_model

TEXTS = ["rook gambit", "orbital orbit rook gambit rook", "nothing known", "rook"]


# ---- without weights --------------------------------------------------------------------------------------------


def described(*pictures: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """(colours [B, row, column, RGB], edges [B, row, column, direction])."""
    encoder = image_encoder(None)
    found = encoder.encode(list(pictures))
    assert found.shape == (len(pictures), 320) and found.dtype == np.float32
    return found[:, :192].reshape(-1, 8, 8, 3), found[:, 192:].reshape(-1, 4, 4, 8)


def waves(angle: float, side: int = 64) -> Image.Image:
    """Grey stripes whose brightness changes in the direction of `angle`, counted from the right downwards."""
    y, x = np.mgrid[:side, :side]
    phase = (np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / 16
    return Image.fromarray((127 + 100 * np.sin(phase)).astype(np.uint8)).convert("RGB")


def noise(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_colours_lie_where_they_are_in_the_picture() -> None:
    flag = Image.new("RGB", (80, 40), (255, 0, 0))
    flag.paste((0, 0, 255), (40, 0, 80, 20))  # the upper right quarter
    colours, _ = described(flag)
    wanted = np.zeros((8, 8, 3))
    wanted[..., 0] = 1
    wanted[:4, 4:] = (0, 0, 1)
    np.testing.assert_allclose(colours[0], wanted / 8, atol=1e-6)  # 64 cells of length 1, to unit length


@pytest.mark.parametrize("direction", range(8))
def test_edges_are_told_by_their_direction(direction: int) -> None:
    """Stripes across each of the eight directions; bright to dark or dark to bright is the same edge."""
    _, edges = described(waves(direction * np.pi / 8), waves(direction * np.pi / 8 + np.pi))
    total = edges.sum(axis=(1, 2))
    assert (total.argmax(axis=1) == direction).all()
    assert (total[:, direction] > 0.8 * total.sum(axis=1)).all()


def test_edges_lie_where_they_are_in_the_picture() -> None:
    half = Image.new("RGB", (64, 64))
    half.paste(waves(0).crop((0, 0, 64, 32)), (0, 0))
    _, edges = described(half)
    assert edges[0, :2].sum() > 50 * edges[0, 3].sum() and (edges[0, :2, :, 0] > 0.1).all()


def test_a_picture_of_one_colour_has_no_edges() -> None:
    colours, edges = described(Image.new("RGB", (10, 10)), Image.new("RGB", (10, 10), "white"))
    assert not edges.any() and not colours[0].any()
    np.testing.assert_allclose(colours[1], 1 / 192**0.5, rtol=1e-6)


def test_a_picture_has_the_same_bytes_in_every_batch() -> None:
    pictures = [noise(seed, 20 + 7 * seed, 200 - 11 * seed) for seed in range(7)]
    encode = image_encoder(None).encode
    together = encode(pictures)
    alone = np.concatenate([encode([picture]) for picture in pictures])
    assert together.tobytes() == alone.tobytes()
    assert encode(pictures[::-1])[::-1].tobytes() == alone.tobytes()
    assert len(np.unique(together, axis=0)) == 7


# ---- sentence-transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_model(tmp_path_factory.mktemp("sentences"))


@pytest.fixture
def copied(sentences: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(sentences, tmp_path / "small"))


def test_texts_go_through_the_model(sentences: Path) -> None:
    """By hand: its transformer, the mean over the tokens, its dense layer."""
    from transformers import AutoModel, AutoTokenizer

    encoder = text_encoder(str(sentences))
    found = encoder.encode(TEXTS)
    assert found.shape == (4, 12) and found.dtype == np.float32
    bert, tokenizer = AutoModel.from_pretrained(sentences).eval(), AutoTokenizer.from_pretrained(sentences)
    dense = load_file(sentences / "2_Dense" / "model.safetensors")
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            mean = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(dim=1)[0]
        wanted = torch.tanh(dense["linear.weight"] @ mean + dense["linear.bias"])
        np.testing.assert_allclose(vector, wanted.numpy(), atol=1e-5)


def test_a_name_tells_the_weights(copied: Callable[[], Path], sentences: Path) -> None:
    own = copied()
    before = text_encoder(str(sentences)).name
    assert before.startswith("sentence-transformers small ")
    (own / "README.md").write_text("another word")
    (own / ".cache").mkdir()
    (own / ".cache" / "when.json").write_text("now")
    assert text_encoder(str(own)).name == before
    for changed in ("2_Dense/model.safetensors", "config_sentence_transformers.json"):
        content = bytearray((own / changed).read_bytes())
        content[-1:] = [content[-1] ^ 1] if changed.endswith("safetensors") else b" }"
        (own / changed).write_bytes(content)
        assert (before := text_encoder(str(own)).name) != text_encoder(str(sentences)).name


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/model.safetensors"])
def test_pickled_weights_are_not_loaded(weights: str, copied: Callable[[], Path], tmp_path: Path) -> None:
    """Bytes that would write a file when they are unpickled lie where the weights were."""
    model, trace = copied(), tmp_path / "unpickled"
    (model / weights).unlink()
    (model / weights).with_name("pytorch_model.bin").write_bytes(pickle.dumps(_Writes(trace)))
    with pytest.raises(ValueError, match=r"embed\.text_encoder: .*small has no model\.safetensors beside .*save it as"):
        text_encoder(str(model))
    (model / weights).with_name("pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"embed\.text_encoder: .*small cannot be loaded"):
        text_encoder(str(model))
    assert not trace.exists()


def test_pickled_weights_in_parts_are_not_loaded(copied: Callable[[], Path]) -> None:
    """They would load: what refuses them is their format."""
    model = copied()
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"(?s)embed\.text_encoder: .*small cannot be loaded .*safetensors"):
        text_encoder(str(model))


class _Writes:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_code_beside_the_weights_is_not_run(copied: Callable[[], Path], tmp_path: Path) -> None:
    model, trace = copied(), tmp_path / "ran"
    (model / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Own: pass\n")
    modules = json.loads((model / "modules.json").read_text())
    modules[2]["type"] = "own.Own"
    (model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"(?s)embed\.text_encoder: .* cannot be loaded .* without code of its own"):
        text_encoder(str(model))
    assert not trace.exists()


def test_a_name_is_looked_up_on_hugging_face(sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, what that library holds in its cache is found, and what it does not hold is told."""
    from huggingface_hub import constants

    cached = tmp_path / "models--somebody--small"
    shutil.copytree(sentences, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, local = text_encoder("somebody/small"), text_encoder(str(sentences))
    assert found.name == local.name and found.encode(TEXTS).tobytes() == local.encode(TEXTS).tobytes()
    told = r"embed\.text_encoder: 'somebody/large' is not a folder, and Hugging Face does not .*a folder that contains"
    with pytest.raises(ValueError, match=told):
        text_encoder("somebody/large")


@pytest.mark.parametrize(
    ("make", "package", "told"),
    [
        (text_encoder, "sentence_transformers", r"embed\.text_encoder needs sentence-transformers .*--extra encoders"),
        (image_encoder, "open_clip", r"embed\.image_encoder needs open_clip .*--extra encoders"),
    ],
)
def test_a_package_that_is_not_installed(
    make: Callable[[str], Any], package: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=told):
        make(str(tmp_path))


# ---- open_clip --------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return clip_model(tmp_path / "clip")


def test_pictures_go_through_the_model(clip: Path) -> None:
    """By hand: the pixels scaled as its config says, its own network with the weights of its file."""
    import open_clip

    encoder = image_encoder(str(clip))
    pictures = [noise(seed, 32, 32) for seed in range(3)]
    found = encoder.encode(pictures)
    assert found.shape == (3, 12) and found.dtype == np.float32 and encoder.name.startswith("open_clip clip ")
    config = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.model.CLIP(**config).eval()
    model.load_state_dict(load_file(clip / "open_clip_model.safetensors"))
    scaled = (np.stack([np.asarray(p) for p in pictures]) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    with torch.no_grad():
        wanted = model.encode_image(torch.tensor(scaled, dtype=torch.float32).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    assert encoder.encode([noise(1, 300, 200)]).shape == (1, 12)  # of any size


def test_pickled_weights_of_pictures_are_not_loaded(clip: Path, tmp_path: Path) -> None:
    """Not where they are alone, and not where open_clip would take them before safetensors of another name."""
    trace, weights = tmp_path / "unpickled", clip / "open_clip_model.safetensors"
    (clip / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(_Writes(trace)))
    known = image_encoder(str(clip)).encode([noise(0)])  # beside safetensors they are left alone
    told = r"embed\.image_encoder: .*clip has neither open_clip_model\.safetensors nor .*save it with"
    shutil.move(weights, clip / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        image_encoder(str(clip))
    shutil.move(clip / "model.safetensors", tmp_path / "kept")
    with pytest.raises(ValueError, match=told):
        image_encoder(str(clip))
    shutil.move(tmp_path / "kept", weights)
    assert np.array_equal(image_encoder(str(clip)).encode([noise(0)]), known)
    assert not trace.exists()


def test_weights_that_are_cut_short(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    weights = clip / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"embed\.image_encoder: .*clip cannot be loaded .*must be a complete model"):
        image_encoder(str(clip))
