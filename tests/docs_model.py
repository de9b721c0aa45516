"""What the code in README and docs works with, small: a model with random weights whose tokens are
bytes, the same with filters, a text. No torch."""

import shutil
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import numpy as np
from gguf_files import rectangular

from qfllama import gguf_copy, schema

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM, WIDTH, N_CTX = 4, 4, 2, 32, 64, 8192
QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "questions"
SPECIAL = ("<unk>", "<s>", "</s>")


def write_model(path) -> None:
    """A Llama in a GGUF file, which ends an answer after a few hundred tokens, by chance."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("docs")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * (len(SPECIAL) + 256))
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    layer = {
        "attn_q": (N_HEAD * HEAD_DIM, WIDTH),
        "attn_k": (N_HEAD_KV * HEAD_DIM, WIDTH),
        "attn_v": (N_HEAD_KV * HEAD_DIM, WIDTH),
        "attn_output": (WIDTH, N_HEAD * HEAD_DIM),
        "ffn_gate": (WIDTH, WIDTH),
        "ffn_up": (WIDTH, WIDTH),
        "ffn_down": (WIDTH, WIDTH),
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
    }
    n_vocab = len(SPECIAL) + 256
    shapes = {"token_embd": (n_vocab, WIDTH), "output": (n_vocab, WIDTH), "output_norm": (WIDTH,)}
    for il in range(N_LAYER):
        shapes |= {f"blk.{il}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        weights = random.normal(size=shape) * 0.1 if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fill(folder: Path) -> None:
    """The files that README and docs name."""
    write_model(folder / "model.gguf")
    rows = np.random.default_rng(2).normal(size=(N_LAYER, N_HEAD_KV, HEAD_DIM)).astype(np.float32)
    quality = {name: np.full((N_LAYER, N_HEAD_KV), 0.5, np.float32) for name in schema.QUALITY}
    filters = rectangular(rows, quality=quality)
    gguf_copy.write(folder / "model.gguf", folder / "model-qf.gguf", filters)
    (folder / "book.txt").write_text(topics["assignment"][:4000], encoding="utf-8")
    (folder / "checkpoint").mkdir()
    shutil.copytree(QUESTIONS, folder / "benchmarks" / "questions")
