"""What can be converted: a GGUF file, a Hugging Face folder, a model on the Hugging Face hub."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from .. import gguf_header
from ..config import QFilterError
from ..shape import model_shape
from ..terminal import escaped
from . import export
from .text import need_packages, one_line, reason

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

WHY_NOT = {
    "mla": "multi-head latent attention (MLA) caches no keys per head",
    "sparse": "its sparse attention keeps an index of the cache that nothing may be missing from",
    "recurrent": "it is recurrent and caches no keys",
    "encoder": "an encoder reads its text at once and has no cache that grows",
    "diffusion": "a diffusion model reads its text at once and has no cache that grows",
    "bias": "its attention (ALiBi) needs the distance to every key, which differs per head once "
    "some are dropped",
    "projector": "it has no language model in it",
    "draft": "it only drafts for another model",
    "audio": "it makes sound and not text",
}
"""Kinds of models whose cache cannot be bounded."""

GGUF_KINDS = {
    **dict.fromkeys(("deepseek4", "minimax-m3"), "sparse"),
    **dict.fromkeys(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), "recurrent"),
    **dict.fromkeys(("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert"), "encoder"),
    **dict.fromkeys(("jina-bert-v2", "jina-bert-v3", "eurobert", "gemma-embedding"), "encoder"),
    **dict.fromkeys(("t5", "t5encoder"), "encoder"),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), "diffusion"),
    **dict.fromkeys(("bloom", "refact"), "bias"),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), "draft"),
    **dict.fromkeys(("wavtokenizer-dec", "qwen3tts", "pockettts"), "audio"),
}
"""general.architecture of a GGUF -> key of WHY_NOT. Others are found by their other keys."""

CHECKPOINT_KINDS = {
    **dict.fromkeys(("mamba", "rwkv"), "recurrent"),
    **dict.fromkeys(("bert", "t5"), "encoder"),
    **dict.fromkeys(("dream", "llada"), "diffusion"),
    **dict.fromkeys(("bloom", "mpt", "refact"), "bias"),
    **dict.fromkeys(("wavtokenizer", "qwen3tts", "pockettts"), "audio"),
}
"""Module of upstream's converter -> key of WHY_NOT."""


def check_packages() -> None:
    """QFilterError unless everything that convert needs is installed."""
    need_packages("convert needs", "torch", "transformers", "accelerate")


def resolve(src) -> Path:
    """The GGUF file or checkpoint folder that SRC means; checks that it can be converted. A hub id
    (user/name) is downloaded into huggingface_hub's cache first; its config.json is checked before
    the weights are downloaded."""
    path = Path(src)
    if not path.exists():
        if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(src)):
            raise QFilterError(
                f"{src} does not exist; give a GGUF file, a checkpoint folder or a "
                "hub id (user/name)"
            )
        need_packages(
            f"{src} is no file or folder here, give a GGUF file; a model of the hub needs",
            "huggingface_hub",
        )
        _check_config(_download(str(src), ["config.json"]))
        path = _download(str(src), HUB_FILES)
    if path.is_dir():
        _check_checkpoint(path)
        return path
    check_gguf(path)
    return gguf_header.scan_first(path)[0]


def check_gguf(path) -> None:
    """QFilterError unless `path` is a complete GGUF file, or a part of a split one, of a decoder
    with keys per head and a tokenizer."""
    first, header = gguf_header.scan_first(path)
    arch = str(header.get("general.architecture"))
    kind = str(header.get("general.type", "model"))
    if arch == "clip" or kind in ("mmproj", "projector"):
        raise _refusal(path, "multimodal projector", "projector")
    if kind != "model":
        raise QFilterError(
            f"{path} is no model but of the type {escaped(kind)}; give the GGUF of a model"
        )
    if why := _why_not_gguf(arch, header):
        raise _refusal(path, f"{arch} model", why)
    model_shape(first)
    if header.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        raise QFilterError(f"{path} has no tokenizer; give a GGUF that has one")
    gguf_header.parts(path)


def _why_not_gguf(arch, header):
    """A key of WHY_NOT for models of the architecture `arch` with these keys, or None."""
    if arch in GGUF_KINDS:
        return GGUF_KINDS[arch]
    if np.any(header.get(f"{arch}.attention.kv_lora_rank", 0)):
        return "mla"
    if np.any(header.get(f"{arch}.attention.indexer.top_k", 0)):
        return "sparse"
    if not np.all(header.get(f"{arch}.attention.causal", True)):
        return "encoder"
    if np.any(header.get(f"{arch}.attention.max_alibi_bias", 0)):
        return "bias"
    if arch == "baichuan" and header.get("baichuan.block_count") == 40:  # 13B; 7B has RoPE
        return "bias"
    return None


def _refusal(path, what, why):
    return QFilterError(
        f"{path} is a {escaped(what)}: {WHY_NOT[why]}; give a decoder that caches keys per head"
    )


def _download(name, files):
    """Folder with those files of the hub repository `name` that match a pattern in `files`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns="*/*"))
    except Exception as error:  # noqa: BLE001 - the hub, the network or the disk
        raise QFilterError(
            f"{name} is no file or folder here and cannot be downloaded from the "
            f"Hugging Face hub: {reason(error)}; check the name and the network"
        ) from None


def _check_checkpoint(folder):
    """QFilterError unless the folder has a complete checkpoint of a model that can be converted."""
    _check_config(folder)
    weight_files(folder)


def _check_config(folder):
    """QFilterError unless the config.json in `folder` is of a decoder with keys per head whose
    architecture upstream's converter knows."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise QFilterError(
            f"{folder} has no config.json: not a Hugging Face checkpoint; give the "
            "folder with the model's files, or a GGUF file"
        ) from None
    except OSError as error:
        raise QFilterError(f"cannot read {folder / 'config.json'}: {error.strerror}") from None
    except ValueError as error:
        raise QFilterError(
            f"{folder / 'config.json'} is damaged: {one_line(error)}; download it again"
        ) from None
    if not isinstance(config, dict):
        raise QFilterError(f"{folder / 'config.json'} is damaged: no object; download it again")
    name = _architecture(folder, config)
    known = text_models()
    if known and name not in known:
        raise QFilterError(
            f"{folder} is a {escaped(name)} model, which llama.cpp's converter does not know; give a model "
            "of another architecture"
        )
    if why := _why_not_checkpoint(name, known.get(name), config):
        raise _refusal(folder, f"{name} model", why)


def _architecture(folder, config):
    """The architecture that upstream's converter goes by: that of the text model inside, if any."""
    for names in (_text_config(config).get("architectures"), config.get("architectures")):
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    raise QFilterError(
        f"{folder / 'config.json'} names no architecture "
        f"(model_type: {escaped(config.get('model_type'))}); "
        "download it again"
    )


def _text_config(config):
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _why_not_checkpoint(name, module, config):
    """A key of WHY_NOT for a checkpoint of the architecture `name`, or None. module: of upstream's
    converter. `check_gguf` finds the other cases once the checkpoint is converted."""
    config = config | _text_config(config)
    if module in CHECKPOINT_KINDS:
        return CHECKPOINT_KINDS[module]
    if config.get("is_encoder_decoder") is True or config.get("is_causal") is False:
        return "encoder"
    if config.get("kv_lora_rank"):
        return "mla"
    if config.get("alibi") is True or config.get("position_embedding_type") == "alibi":
        return "bias"
    if re.search("Draft|Eagle|Speculator|DSpark", name):
        return "draft"
    return None


def text_models() -> dict[str, str]:
    """Architectures (as config.json names them) of the text models that upstream's converter knows,
    and its module for each; empty if this version of it has no such table. The file is parsed, not
    imported: an import takes seconds and needs torch."""
    table = export.converter_path().parent / "conversion" / "__init__.py"
    if not table.is_file():
        return {}
    for node in ast.parse(table.read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP":
            return ast.literal_eval(node.value)
    return {}


def weight_files(folder) -> list[Path]:
    """The files that hold a checkpoint's weights, sorted. QFilterError if one is missing."""
    folder = Path(folder)
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
                missing = [name for name in names if not (folder / name).is_file()]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise QFilterError(f"{index} is damaged; download the checkpoint again") from None
            if missing:
                raise QFilterError(
                    f"{folder} lacks {escaped(missing[0])} ({len(missing)} of {len(names)} "
                    "weight files); download the checkpoint again"
                )
            return [folder / name for name in names]
        if (folder / kind).is_file():
            return [folder / kind]
    raise QFilterError(f"{folder} has no model.safetensors; give a checkpoint with its weights")


def digest(path, progress=None) -> str:
    """SHA-256 of a model's GGUF file or of the weight files of a checkpoint folder; several files
    count as one, in order. progress: called with the number of bytes of every piece."""
    sha = hashlib.sha256()
    for file in _files(path):
        with open(file, "rb") as data:
            while piece := data.read(16 << 20):
                sha.update(piece)
                if progress:
                    progress(len(piece))
    return sha.hexdigest()


def n_bytes(path) -> int:
    """Size in bytes of what `digest` reads."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path):
    return weight_files(path) if Path(path).is_dir() else gguf_header.parts(path)
