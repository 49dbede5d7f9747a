"""The tokenizer against sentencepiece, the encoder against the reference's embeddings and transformers."""

import json
import math
import random
import re
import shutil
import struct

import pytest
import torch
from conftest import GOLDENS, VARIANTS, assert_close, expected
from safetensors.torch import load_file, save_file

from checkpoint import save_weights
from shapes import make_tokenizer
from text_encoder import Normalizer, T5Config, T5Encoder, Tokenizer

VARIANT = GOLDENS / "fun-2b-inp"
TOKENIZER_DIR = VARIANT / "tokenizer"
WEIGHTS = "text_encoder/model.safetensors"
# fp32 rounding only: embeddings are of order 4, and two ways to sum a softmax differ by 1e-5 over 226 tokens
TOLERANCE = 2e-5


def prompts(variant):
    content = json.loads((GOLDENS / variant / "prompts.json").read_text())
    return content["prompts"], content["negative_prompt"], content["max_length"]


def reference_ids(sp, text):
    """sentencepiece between the literal special tokens; <extra_id_N> eat the white space around them."""
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    special |= {f"<extra_id_{i}>": len(sp) + 99 - i for i in range(100)}
    text = re.sub(r"\s*(<extra_id_[1-9]?\d>)\s*", r"\1", text)
    ids = []
    for part in re.split(r"(<pad>|</s>|<unk>|<extra_id_[1-9]?\d>)", text):
        ids += [special[part]] if part in special else map(sp.piece_to_id, sp.encode(part, out_type=str))
    return ids


def fuzzed_texts(count, pieces):
    rng = random.Random(0)
    blocks = [(0, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x300, 0x370), (0x1100, 0x1200), (0x2000, 0x2070)]
    blocks += [(0x2460, 0x2500), (0x3000, 0x3100), (0x3300, 0x3400), (0x4E00, 0x4F00), (0xAC00, 0xAD00)]
    blocks += [(0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF00, 0xFFA0), (0xFF61, 0xFFA0), (0x10000, 0x110000)]
    words = "<pad> </s> <unk> <extra_id_0> <extra_id_42> <extra_id_99> <extra_id_100> </s".split()
    words += "👩\u200d👧 👍🏽 🇩🇪 ❤\ufe0f ｶﾞ ﾊﾟ e\u0301 ö ▁ ＜pad＞".split() + [" ", "  ", "\u3000"]

    def part(kind):
        if kind == "word":
            return rng.choice(words)
        return rng.choice(pieces) if kind == "piece" else chr(rng.randrange(*kind))

    for _ in range(count):
        kinds = rng.choices([*blocks, "word", "word", "piece", "piece"], k=rng.randrange(1, 5))
        yield "".join(part(rng.choice(kinds)) for _ in range(rng.randrange(1, 60)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_of_the_reference_prompts_are_equal(variant):
    texts, negative, length = prompts(variant)
    tokenizer = Tokenizer.from_pretrained(GOLDENS / variant)
    theirs = expected(variant)
    assert torch.equal(tokenizer(texts, max_length=length), theirs["text.input_ids"])
    assert torch.equal(tokenizer([negative], max_length=length), theirs["text.neg_input_ids"])


def test_ids_of_fuzzed_unicode_equal_sentencepiece():
    sentencepiece = pytest.importorskip("sentencepiece")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER_DIR / "spiece.model"))
    pieces = [sp.id_to_piece(i).replace("▁", " ") for i in range(3, len(sp))]
    tokenizer = Tokenizer.from_pretrained(TOKENIZER_DIR)
    for text in fuzzed_texts(1000, pieces):
        assert tokenizer.encode(text) == reference_ids(sp, text), repr(text)


CORPUS = ["the cat sat on the mat", "a dog and the cat ran", "an apple on a table", "rain  in spain"] * 20


def train_vocabulary(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"normalization_rule_name": "identity", "vocab_size": 26, "minloglevel": 2} | options
    options |= {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    where = {"sentence_iterator": iter(CORPUS), "model_prefix": str(folder / "spiece")}
    sentencepiece.SentencePieceTrainer.train(**where, **options)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def test_a_vocabulary_without_rules_equals_sentencepiece(tmp_path):
    sp = train_vocabulary(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    texts = ["", " ", "  the cat  sat ", "ﬁne\tday", "xyz the", "a</s> b", "\0cat"]
    for text in [*texts, *fuzzed_texts(200, CORPUS)]:
        assert tokenizer.encode(text) == reference_ids(sp, text), repr(text)


OTHER_KINDS = [
    {"byte_fallback": True, "vocab_size": 280},
    {"model_type": "bpe", "vocab_size": 40},
    {"treat_whitespace_as_suffix": True},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": False},
]


@pytest.mark.parametrize("options", OTHER_KINDS)
def test_a_vocabulary_of_another_kind_is_refused(tmp_path, options):
    train_vocabulary(tmp_path, **options)
    with pytest.raises(ValueError, match="of another kind"):
        Tokenizer.from_pretrained(tmp_path)


def test_replacements_are_found_through_wide_and_narrow_steps_of_the_trie():
    units = [0] * 512
    units[0] = 1 << 10 | 512  # the root: its children lie 1 << 8 away, bit 9 adds the 8
    units[0x100 ^ ord("a")] = 1 << 10 | 256 | ord("a")  # a rule ends here, its value lies one step away
    units[0x100 ^ ord("a") ^ 1] = 1 << 31 | 2  # the third byte of the replacements
    charsmap = struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"-\0bc\0"
    assert Normalizer(charsmap)(" xa  \0é ") == "▁xbc▁\0é"


def test_a_long_prompt_is_cut_but_keeps_its_end_token():
    tokenizer = Tokenizer.from_pretrained(VARIANT)
    whole = tokenizer(["one two three four five six seven"], max_length=40)
    cut = tokenizer(["one two three four five six seven"], max_length=5)
    assert cut.tolist() == [whole[0, :4].tolist() + [1]]
    assert tokenizer([""], max_length=3).tolist() == [[1, 0, 0]]
    assert tokenizer(["one"]).shape == (1, 226) and tokenizer(["one"]).dtype == torch.long


def test_a_tokenizer_json_is_read_when_there_is_no_spiece_model(tmp_path):
    written = make_tokenizer()  # asks for a </s> of its own
    written.enable_truncation(1)
    written.save(str(tmp_path / "tokenizer.json"))
    red, circle = map(written.token_to_id, ("red", "circle"))
    ids = Tokenizer.from_pretrained(tmp_path)(["red circle", "purple"], max_length=4)
    assert ids.tolist() == [[red, circle, 1, 0], [2, 1, 0, 0]]


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of one checkpoint's text_encoder that a test may change."""
    shutil.copytree(VARIANT / "text_encoder", tmp_path / "text_encoder")
    return tmp_path


def some_ids(b=2, length=40, vocab=1120):
    return torch.randint(0, vocab, (b, length))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_equal_the_reference(variant, stream):
    theirs = expected(variant)
    texts, negative, length = prompts(variant)
    tokenizer = Tokenizer.from_pretrained(GOLDENS / variant)
    t5 = T5Encoder.from_pretrained(GOLDENS / variant, stream=stream)
    chosen = (0, 1, 5, 11) if variant == "fun-2b-inp" else (0, 1, 2, 3)
    ids = tokenizer([texts[i] for i in chosen], max_length=length)
    with torch.no_grad():
        assert_close(t5(ids), theirs["text.prompt_embeds"], TOLERANCE)
        assert_close(t5(tokenizer(negative, max_length=length)), theirs["text.neg_embeds"], TOLERANCE)


def odd_config(**changes):
    """No two sizes alike, and every number that could be hard-coded away from T5's own."""
    sizes = {"vocab_size": 60, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 3, "num_heads": 5}
    buckets = {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 25}
    return T5Config(**(sizes | buckets | {"layer_norm_epsilon": 0.03} | changes))


# one rounding of an output of order 2 in the type's own precision; the sums inside differ in order
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_what_we_save_gives_the_same_in_transformers(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    T5Encoder(odd_config()).save_pretrained(tmp_path)
    ours = T5Encoder.from_pretrained(tmp_path, dtype=dtype)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "text_encoder", dtype=dtype).eval()
    weights = theirs.state_dict()
    for (
        name,
        tensor,
    ) in ours.state_dict().items():  # with fp16, the last feed-forward weight is unrounded fp32
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name
    ids = some_ids(2, 40, 60)
    with torch.no_grad():
        text, peer = ours(ids), theirs(ids).last_hidden_state
    assert text.dtype == peer.dtype == dtype
    assert_close(text, peer, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_streamed_from_shards_gives_exactly_the_same(checkpoint, dtype, monkeypatch):
    whole = T5Encoder.from_pretrained(checkpoint, dtype=dtype)
    ids = some_ids()
    weights = load_file(checkpoint / WEIGHTS)
    monkeypatch.setattr("checkpoint.MAX_SHARD_BYTES", 20_000)
    save_weights(weights, checkpoint / "text_encoder", "model")
    assert len(list((checkpoint / "text_encoder").glob("*.safetensors"))) == 3
    streamed = T5Encoder.from_pretrained(checkpoint / "text_encoder", dtype=dtype, stream=True)
    text = streamed(ids)
    with torch.no_grad():  # with gradients attention takes another kernel and rounds otherwise
        assert torch.equal(text, whole(ids)) and text.dtype == dtype
    assert not text.requires_grad
    assert torch.equal(text, streamed(ids))  # once more, from disk again
    assert all(parameter.is_meta for parameter in streamed.parameters())  # nothing was kept


@pytest.mark.parametrize("keep_both", [False, True])
def test_the_embedding_may_go_by_its_other_name(checkpoint, keep_both):
    ids = some_ids()
    with torch.no_grad():
        text = T5Encoder.from_pretrained(checkpoint)(ids)
    weights = load_file(checkpoint / WEIGHTS)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    if not keep_both:
        del weights["shared.weight"]
    save_file(weights, checkpoint / WEIGHTS)
    for stream in (False, True):
        with torch.no_grad():
            assert torch.equal(T5Encoder.from_pretrained(checkpoint, stream=stream)(ids), text)


def test_the_norm_is_taken_in_fp32():
    norm = T5Encoder(odd_config()).encoder.final_layer_norm.half()
    assert torch.isfinite(norm(torch.full((1, 24), 3e4).half())).all()  # 9e8 is beyond fp16


def test_gradients_reach_every_parameter():
    t5 = T5Encoder(odd_config())
    t5(some_ids(2, 40, 60)).square().mean().backward()
    assert not [name for name, p in t5.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_new_encoder_starts_as_one_of_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = T5Encoder(odd_config(vocab_size=400, d_model=256, d_kv=32, d_ff=320, num_heads=6))
    ours.save_pretrained(tmp_path)
    config = transformers.T5Config.from_pretrained(tmp_path / "text_encoder")
    theirs = transformers.T5EncoderModel(config).state_dict()
    for name, weight in ours.state_dict().items():
        # six standard errors of the difference of two standard deviations
        spread = 6 / math.sqrt(weight.numel())
        assert weight.std().item() == pytest.approx(theirs[name].std().item(), rel=spread), name
