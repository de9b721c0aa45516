"""GGUF files that are a header and nothing else: models of any size whose weights are a hole in the
file, for what has to be known before weights are loaded."""

import os

import gguf
import numpy as np


def write(path, arch, keys, tensors, kind=np.float16):
    """A file of an architecture: keys (name without the architecture -> number or list), tensors
    (name -> shape, as numpy has it). Returns `path`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"a {arch}")
    writer.add_tokenizer_model("none")
    for name, value in keys.items():
        add = {
            int: writer.add_uint32, float: writer.add_float32, list: writer.add_array
        }[type(value)]  # fmt: skip
        add(f"{arch}.{name}", value)
    n_bytes = 0
    for name, shape in tensors.items():
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        writer.add_tensor_info(name, shape, np.dtype(kind), size)
        n_bytes += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, os.path.getsize(path) + 32 + n_bytes)
    return path


def llama(path, *, n_layer, width, n_head, n_head_kv, n_vocab=1024, n_ctx=131072):
    """A Llama in f16."""
    dim = width // n_head
    layer = {
        "attn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (n_head_kv * dim, width),
        "attn_v": (n_head_kv * dim, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_gate": (width, width),
        "ffn_up": (width, width),
        "ffn_down": (width, width),
    }
    tensors = {"token_embd.weight": (n_vocab, width), "output_norm.weight": (width,)}
    tensors |= {"output.weight": (n_vocab, width)}
    for il in range(n_layer):
        tensors |= {f"blk.{il}.{name}.weight": shape for name, shape in layer.items()}
    keys = {
        "vocab_size": n_vocab,
        "block_count": n_layer,
        "context_length": n_ctx,
        "embedding_length": width,
        "feed_forward_length": width,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    return write(path, "llama", keys, tensors)


def mamba(path):
    """A recurrent model: nothing in it can be bounded."""
    width, inner, state, rank = 64, 128, 16, 4
    keys = {
        "vocab_size": 64,
        "block_count": 1,
        "context_length": 512,
        "embedding_length": width,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }
    tensors = {
        "token_embd.weight": (64, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (2 * inner, width),
        "blk.0.ssm_conv1d.weight": (inner, 4),
        "blk.0.ssm_conv1d.bias": (inner,),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": (inner,),
        "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,),
        "blk.0.ssm_out.weight": (width, inner),
    }
    return write(path, "mamba", keys, tensors, np.float32)


def bloom(path, *, n_layer=2, width=96, n_head=6, n_vocab=256):
    """A Bloom in f32, whose ALiBi rules a bounded cache out."""
    layer = {
        "attn_norm": (width,),
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_up": (4 * width, width),
        "ffn_down": (width, 4 * width),
    }
    weights = {"token_embd_norm": (width,), "output_norm": (width,)}
    for il in range(n_layer):
        weights |= {f"blk.{il}.{name}": shape for name, shape in layer.items()}
    tensors = {"token_embd.weight": (n_vocab, width)}
    for name, shape in weights.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    keys = {
        "vocab_size": n_vocab,
        "block_count": n_layer,
        "context_length": 96,
        "embedding_length": width,
        "feed_forward_length": 4 * width,
        "attention.head_count": n_head,
        "attention.layer_norm_epsilon": 1e-5,
    }
    return write(path, "bloom", keys, tensors, np.float32)
