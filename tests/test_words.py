"""Captions in a vocabulary of many words: the table, its tokens, and the encoder that begins with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limner import build
from limner.config import RunConfig, TextCondition
from limner.generator import Generator
from limner.nn import words
from limner.nn.text import TextConditioner
from limner.plan.counting import count
from limner.studio.insight import token_spans

LENGTH = 12
TABLE = words.vectors(torch.device("cpu"))
PLACES = {word: place for place, word in enumerate(words.words())}


def conditioner(noise: float = 0.7) -> TextConditioner:
    torch.manual_seed(0)
    encoder = {"kind": "words", "width": 32, "head_dim": 16, "length": LENGTH, "noise": noise}
    return build.text_conditioner(TextCondition.model_validate({"encoder": encoder}), emb_channels=8)


def distance(one: str, other: str) -> float:
    return float((TABLE[PLACES[one]] - TABLE[PLACES[other]]).norm())


def test_the_table_has_a_vector_for_every_token() -> None:
    assert words.words()[0] == "[PAD]"
    assert len(set(words.words())) == len(TABLE) > 20_000
    assert TABLE.square().mean() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("word", "near", "far"),
    [("airplane", "aircraft", "sandwich"), ("sandwich", "hamburger", "airplane"), ("darker", "dark", "light"),
     ("puppy", "dog", "house"), ("printer", "printing", "cat")],
)  # fmt: skip
def test_words_of_like_meaning_are_near(word: str, near: str, far: str) -> None:
    assert distance(word, near) < distance(word, far)


def test_a_caption_is_cut_into_words_and_pieces() -> None:
    tokenizer = words.WordTokenizer(LENGTH)
    tokens = tokenizer(["A Café: vespa", "熊"])
    read = [[words.words()[k] for k in row[keep]] for row, keep in zip(tokens.ids, tokens.mask, strict=True)]
    assert read == [["[CLS]", "a", "cafe", ":", "ve", "##sp", "##a", "[SEP]"], ["[CLS]", "[UNK]", "[SEP]"]]
    assert (tokens.ids[~tokens.mask] == 0).all()
    assert tokens.cut == 0
    assert tokenizer(["red " * 20]).cut == 1
    assert token_spans(tokenizer, "A Café")[:4] == [(0, 0), (0, 1), (2, 6), (0, 0)]


def test_captions_of_other_languages_are_told(caplog: pytest.LogCaptureFixture) -> None:
    words.WordTokenizer(LENGTH).learn(["a red heart", "ein rotes Herz"])
    assert not caplog.records
    words.WordTokenizer(LENGTH).learn(["a red heart", "赤いハート"])
    assert "1 of 2 captions have words that no English vocabulary has" in caplog.text


@settings(max_examples=50, deadline=None)
@given(caption=st.text(st.characters(), max_size=60))
def test_any_text_is_accepted(caption: str) -> None:
    tokens = words.WordTokenizer(LENGTH)([caption, ""])
    assert tokens.ids.shape == tokens.mask.shape == (2, LENGTH)
    assert 0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < len(TABLE)


def test_noise_is_added_in_training_alone() -> None:
    made = conditioner()
    captions = ["a red heart"] * 2
    one, other = made(captions, 2).tokens
    assert not torch.allclose(one, other)
    one, other = made.eval()(captions, 2).tokens
    assert torch.equal(one, other)
    one, other = conditioner(noise=0.0)(captions, 2).tokens
    assert torch.equal(one, other)


def test_the_table_is_no_part_of_the_weights() -> None:
    names = {name for name in conditioner().state_dict() if "embedding" in name}
    assert names == {"encoder.embedding.proj.weight", "encoder.embedding.proj.bias"}


def test_an_unknown_word_is_read_as_its_neighbour() -> None:
    """An encoder taught to tell two captions apart, under noise, takes a word that it never saw for the nearer one."""
    made = conditioner()
    head = torch.nn.Linear(made.token_channels, 2)
    optimizer = torch.optim.Adam([*made.parameters(), *head.parameters()], lr=3e-3)
    target = torch.tensor([0, 1]).repeat(8)
    for _ in range(60):
        tokens = made(["airplane", "dog"] * 8, 16)
        loss = torch.nn.functional.cross_entropy(head(tokens.tokens[:, 1]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    with torch.no_grad():
        asked = made(["aircraft", "helicopter", "puppy", "dogs"], 4)
        assert head(asked.tokens[:, 1]).argmax(1).tolist() == [0, 0, 1, 1]


def test_words_that_no_caption_had_are_read_as_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    reword = words.Rewording(words.words_of(["A red bread-basket", "dog; horse", "violin 7"]))
    assert reword("Sandwich; DOG 5, red") == "bread; DOG 5, red"
    assert reword("a puppy") == "a dog"
    assert reword("a quaternion") == "a quaternion"
    told = [record.getMessage() for record in caplog.records]
    assert "text: no caption in training has 'sandwich', it is read as 'bread'" in told
    assert "text: no caption in training has 'quaternion', nor any word near it" in told
    reword("sandwich, sandwich")
    assert len(caplog.records) == len(told)


def test_captions_in_another_language_are_left_alone() -> None:
    reword = words.Rewording(words.words_of(["ein kleiner Hund", "eine gelbe Blume", "zwei rote Äpfel"]))
    assert reword("ein Pferd") == "ein Pferd"


def test_a_trained_encoder_rewords_and_one_in_training_does_not() -> None:
    encoder = {"kind": "bpe", "width": 32, "head_dim": 16, "vocabulary": 300, "length": LENGTH}
    section = TextCondition.model_validate({"encoder": encoder})
    made = build.text_conditioner(section, 8, "a red dog")
    made.learn(["a red dog"])
    asked, known = (made.train()([text], 1).tokens for text in ("a red puppy", "a red dog"))
    assert not torch.equal(asked, known)
    asked, known = (made.eval()([text], 1).tokens for text in ("a red puppy", "a red dog"))
    assert torch.equal(asked, known)


def test_a_model_of_words_draws_and_is_counted() -> None:
    raw: dict[str, Any] = {
        "data": {"size": [8, 8]},
        "model": {"kind": "unet", "levels": [{"channels": 8, "cross_attention": 1}], "norm_groups": 4, "head_dim": 8},
        "conditions": [{"kind": "text", "encoder": {"kind": "words", "width": 32, "head_dim": 16, "length": LENGTH}}],
    }
    recipe = RunConfig.model_validate(raw)
    torch.manual_seed(0)
    model = build.model(recipe)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gen = Generator(recipe, model, device=torch.device("cpu"))
    red, blue = (gen.sample(text=text, seed=1, steps=2, guidance=2.0, output="tensor") for text in ("red", "blue"))
    assert red.shape == (1, 3, 8, 8)
    assert not torch.allclose(red, blue)
    assert count(recipe, bf16=False).image.condition_flops > 0
