"""What can be converted: a GGUF file, a Hugging Face folder, a model on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

from .. import gguf_header, metadata
from ..config import QFilterError
from .text import one_line

MODEL_TYPES = ("llama", "mistral")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def check_packages() -> None:
    """QFilterError unless everything that convert needs is installed."""
    missing = [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise QFilterError(
            f"convert needs the packages {', '.join(missing)}; install them with "
            "`pip install 'qfllama[convert]'`"
        )


def resolve(src) -> Path:
    """The GGUF file or checkpoint folder that SRC means, checked to be of a kind that can be
    converted. A hub id (user/name) is downloaded into huggingface_hub's cache first."""
    path = Path(src)
    if not path.exists():
        if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(src)):
            raise QFilterError(
                f"{src} does not exist; give a GGUF file, a checkpoint folder or a "
                "hub id (user/name)"
            )
        path = _download(str(src))
    if path.is_dir():
        _check_checkpoint(path)
    else:
        check_gguf(path)
    return path


def check_gguf(path) -> None:
    """QFilterError unless `path` is one whole GGUF file of a dense llama model with tokenizer."""
    header = gguf_header.scan(path)
    arch = metadata.model_shape(path).architecture
    if arch != "llama":
        raise QFilterError(
            f"{path} is a {arch} model; only models of the Llama architecture can be converted yet"
        )
    if header.get("llama.expert_count", 0):
        raise QFilterError(
            f"{path} is a mixture of experts, which cannot be converted yet; "
            "give a dense Llama model"
        )
    if header.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        raise QFilterError(f"{path} has no tokenizer; give a GGUF that has one")
    if header.get("split.count", 1) > 1:
        raise QFilterError(
            f"{path} is one part of {header.get('split.count')}; join them first "
            "with `llama-gguf-split --merge`"
        )


def _download(name):
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:  # noqa: BLE001 - the hub, the network or the disk
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        why = one_line(error)
        if cause is not error and one_line(cause) not in why:
            why += f" ({one_line(cause)})"
        raise QFilterError(
            f"{name} is no file or folder here and cannot be downloaded from the "
            f"Hugging Face hub: {why}"
        ) from None


def _check_checkpoint(folder):
    """QFilterError unless the folder has a complete checkpoint of the Llama architecture."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except OSError:
        raise QFilterError(
            f"{folder} has no config.json: not a Hugging Face checkpoint; give the "
            "folder with the model's files, or a GGUF file"
        ) from None
    except ValueError as error:
        raise QFilterError(
            f"{folder / 'config.json'} is damaged: {one_line(error)}; download it again"
        ) from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        raise QFilterError(
            f"{folder} is a {kind} model; only models of the Llama architecture "
            f"({', '.join(MODEL_TYPES)}) can be converted yet"
        )
    weight_files(folder)


def weight_files(folder) -> list[Path]:
    """The files that hold a checkpoint's weights, sorted. QFilterError if one is missing."""
    folder = Path(folder)
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise QFilterError(f"{index} is damaged; download the checkpoint again") from None
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise QFilterError(
                    f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} "
                    "weight files); download the checkpoint again"
                )
            return [folder / name for name in names]
        if (folder / kind).is_file():
            return [folder / kind]
    raise QFilterError(f"{folder} has no model.safetensors; give a checkpoint with its weights")


def digest(path, progress=None) -> str:
    """SHA-256 of a GGUF file, or of the weight files of a checkpoint folder, one after another.
    progress: called with the number of bytes read, per piece."""
    path, sha = Path(path), hashlib.sha256()
    for file in weight_files(path) if path.is_dir() else [path]:
        with open(file, "rb") as data:
            while piece := data.read(16 << 20):
                sha.update(piece)
                if progress:
                    progress(len(piece))
    return sha.hexdigest()


def n_bytes(path) -> int:
    """Size in bytes of what `digest` reads."""
    path = Path(path)
    return sum(file.stat().st_size for file in (weight_files(path) if path.is_dir() else [path]))
