"""Encoders that turn texts and pictures into vectors. There is nothing to fit: new items are embedded as old ones were.

Without a model, a picture is described by its colours and edges. With a model of the user, texts are encoded by
sentence-transformers and pictures by open_clip. Only weights in safetensors files are loaded, and no code that comes
with a model is run. An encoder's name contains a hash of its files: vectors of two names are never mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from components.common.artifacts import file_hash

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # open_clip's own two names
FILES = {  # of a model: weights, configuration, vocabularies
    "text_encoder": ("*.safetensors", "*.json", "*.txt", "*.model"),
    "image_encoder": (*CLIP_WEIGHTS, "*.json", "*.txt"),
}
INSTALL = "uv pip install -r pyproject.toml --extra encoders -c requirements.lock"
SIDE, CELLS, EDGE_CELLS, DIRECTIONS = 64, 8, 4, 8
Raw = TypeVar("Raw")


@dataclass(frozen=True)
class Encoder(Generic[Raw]):
    """name    identifies the encoder; equal names give equal vectors
    encode  one batch -> float32 [B, width]. It iterates over the batch once, and holds one picture at a time
    side    pixels a side that it needs of a picture; None: it may need all
    """

    name: str
    encode: Callable[[Iterable[Raw]], np.ndarray]
    side: int | None = None


def text_encoder(model: str) -> Encoder[str]:
    """A model of sentence-transformers, in a folder or by its name on Hugging Face.

    Raises ValueError if there is none.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(f"embed.text_encoder needs sentence-transformers ({error}): {INSTALL}") from None
    folder = _folder("text_encoder", model)
    pickled = [file for file in folder.rglob("pytorch_model.bin") if not file.with_name("model.safetensors").is_file()]
    if pickled or not any(folder.rglob("*.safetensors")):
        raise ValueError(
            f"embed.text_encoder: {model} has no model.safetensors{f' beside {pickled[0]}' if pickled else ''}, and "
            "weights of no other format are loaded; save it as safetensors (`SentenceTransformer.save` does)"
        )
    with _loading("text_encoder", model):
        network = SentenceTransformer(
            str(folder), trust_remote_code=False, local_files_only=True, model_kwargs={"use_safetensors": True}
        )

    def encode(texts: Iterable[str]) -> np.ndarray:
        vectors: Any = network.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)

    return Encoder(f"sentence-transformers {_version('text_encoder', model, folder)}", encode)


def image_encoder(model: str | None) -> Encoder[Image]:
    """A model of open_clip, in a folder or by its name on Hugging Face; None: `describe`.

    Raises ValueError if there is none.
    """
    if model is None:
        return Encoder("descriptors 1", describe, SIDE)
    try:
        import open_clip
        import torch
    except (ImportError, RuntimeError) as error:  # torchvision of another build than torch's: RuntimeError
        raise ValueError(f"embed.image_encoder needs open_clip ({error}): {INSTALL}") from None
    folder = _folder("image_encoder", model)
    if not any((folder / name).is_file() for name in CLIP_WEIGHTS):
        raise ValueError(
            f"embed.image_encoder: {model} has neither {' nor '.join(CLIP_WEIGHTS)}, and weights of no other format "
            "are loaded; save it with open_clip.push_to_hf_hub.save_for_hf(…, safe_serialization=True)"
        )
    with _loading("image_encoder", model):
        network, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).eval()

    def encode(pictures: Iterable[Image]) -> np.ndarray:
        with torch.inference_mode():
            pixels_BCHW = torch.stack(list(map(prepare, pictures))).to(device)
            return np.asarray(network.encode_image(pixels_BCHW).float().cpu().numpy())

    return Encoder(f"open_clip {_version('image_encoder', model, folder)}", encode)


def describe(pictures: Iterable[Image]) -> np.ndarray:
    """float32 [B, 192 + 128] of RGB pictures: the mean colour of each of 8×8 cells (MPEG-7's colour layout before its
    transform), and for each of 4×4 cells how strong the edges of each of eight directions are (Dalal and Triggs 2005:
    histograms of oriented gradients; here the whole picture is one block). Both to unit length.

    A picture's values do not depend on the other pictures of its batch.
    """
    small = list(map(_pixels, pictures))  # a loop variable would hold one picture while the next is decoded
    rgb_BHWC = np.stack(small) / 255
    batch, cell = len(small), SIDE // CELLS
    colour_BF = rgb_BHWC.reshape(batch, CELLS, cell, CELLS, cell, 3).mean(axis=(2, 4)).reshape(batch, -1)
    down_BHW, right_BHW = np.gradient(rgb_BHWC.mean(axis=3), axis=(1, 2))
    strength_BHW = np.hypot(down_BHW, right_BHW)
    turn_BHW = np.arctan2(down_BHW, right_BHW) * (DIRECTIONS / np.pi) % DIRECTIONS  # half a turn is the same edge
    nearest_BHW = np.floor(turn_BHW).astype(np.int64)
    next_BHW = turn_BHW - nearest_BHW  # shared between the two nearest directions, so that a small turn changes little
    at = np.arange(SIDE) // (SIDE // EDGE_CELLS)
    cell_BHW = (np.arange(batch)[:, None, None] * EDGE_CELLS + at[:, None]) * EDGE_CELLS + at
    edges_BF = np.zeros(batch * EDGE_CELLS**2 * DIRECTIONS)
    for direction_BHW, share_BHW in ((nearest_BHW, 1 - next_BHW), (nearest_BHW + 1, next_BHW)):
        bins = (cell_BHW * DIRECTIONS + direction_BHW % DIRECTIONS).ravel()
        edges_BF += np.bincount(bins, (strength_BHW * share_BHW).ravel(), len(edges_BF))
    return np.concatenate([_unit(colour_BF), _unit(edges_BF.reshape(batch, -1))], axis=1).astype(np.float32)


def _pixels(picture: Image) -> np.ndarray:
    from PIL.Image import Resampling

    return np.asarray(picture.resize((SIDE, SIDE), Resampling.BOX), dtype=np.float32)


def _unit(x_BF: np.ndarray) -> np.ndarray:
    norm_B1 = np.sqrt((x_BF**2).sum(axis=1, keepdims=True))
    return x_BF / np.where(norm_B1 > 0, norm_B1, 1)


# ---- models in folders and on Hugging Face ----------------------------------------------------------------------


def _folder(field: str, model: str) -> Path:
    """The model's folder. From Hugging Face only the files that are loaded are fetched, into that library's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES[field])))
    except Exception as error:  # network, name and rights each raise errors of their own
        raise ValueError(
            f"embed.{field}: {model!r} is not a folder, and Hugging Face does not have it ({type(error).__name__}: "
            f"{error}); name a folder that contains the model"
        ) from None


@contextmanager
def _loading(field: str, model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken folder can make the library raise anything
        raise ValueError(
            f"embed.{field}: {model} cannot be loaded ({type(error).__name__}: {error}); it must be a complete model "
            "without code of its own"
        ) from error


def _version(field: str, model: str, folder: Path) -> str:
    """The model's name, and a hash of its weights, configuration and vocabularies."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in FILES[field] for file in folder.rglob(pattern)}):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):  # files that download tools keep for themselves
            digest.update(f"{name.as_posix()} {file_hash(file)}\n".encode())
    return f"{Path(model).name} {digest.hexdigest()[:16]}"
