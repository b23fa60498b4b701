"""A tiny Llama, written as safetensors and as GGUF, and wheels made on the spot."""

from __future__ import annotations

import os
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.store import Store
from tests.databases import database_url, postgres, postgres_url
from tests.servers import s3_server

__all__ = ["database_url", "postgres", "postgres_url", "s3_server"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ċ Ċ", "Ġ Ġ", "a b")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)

MakeWheel = Callable[..., str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of one's own."""
    return tmp_path / "cache"


@pytest.fixture(params=["disk", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Of a kind with folders, and of two without; the last is behind a network."""
    if request.param == "disk":
        return Store(tmp_path / "store")
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}/artifacts")
    request.getfixturevalue("s3_server")
    bucket = f"of-{uuid.uuid4().hex}"
    store = Store(f"s3://{bucket}/artifacts")
    store._fs.mkdir(bucket)
    return store


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWheel:
    """``make_wheel(name, files, version="1.0")`` puts a wheel where pip looks, and only there."""
    wheelhouse = tmp_path / "wheelhouse"
    wheelhouse.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))

    def make(name: str, files: dict[str, bytes | Path], version: str = "1.0") -> str:
        package = name.replace("-", "_")
        about = f"{package}-{version}.dist-info"
        with zipfile.ZipFile(wheelhouse / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
            for path, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                wheel.writestr(f"{package}/{path}", data)
            wheel.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            wheel.writestr(
                f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{about}/RECORD", "")
        return f"wheel:{name}"

    return make


def _vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(m.split()) for m in MERGES)]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 20 000 weights, as ``save_pretrained`` leaves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama_gguf(llama: Path) -> Path:
    """The same weights and a SmolLM-like tokenizer, as llama.cpp's converter writes them."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    def rotary(weight: np.ndarray, heads: int) -> np.ndarray:
        """llama.cpp interleaves the halves that rotate together; transformers keeps them apart."""
        rows, columns = weight.shape
        halves = weight.reshape(heads, 2, rows // heads // 2, columns)
        return halves.swapaxes(1, 2).reshape(rows, columns)

    tensors = load_file(llama / "model.safetensors")
    path = llama.parent / "llama.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = _vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    layer = "model.layers.0."
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_norm": f"{layer}input_layernorm",
        "blk.0.attn_q": f"{layer}self_attn.q_proj",
        "blk.0.attn_k": f"{layer}self_attn.k_proj",
        "blk.0.attn_v": f"{layer}self_attn.v_proj",
        "blk.0.attn_output": f"{layer}self_attn.o_proj",
        "blk.0.ffn_norm": f"{layer}post_attention_layernorm",
        "blk.0.ffn_gate": f"{layer}mlp.gate_proj",
        "blk.0.ffn_up": f"{layer}mlp.up_proj",
        "blk.0.ffn_down": f"{layer}mlp.down_proj",
    }
    for short, long in names.items():
        weight = tensors[f"{long}.weight"]
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(short)
        writer.add_tensor(f"{short}.weight", rotary(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
