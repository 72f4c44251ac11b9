"""What a model is told of a picture: a section for each modality."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from limner.config.base import Fraction, Section


class LabelCondition(Section):
    """One of K classes, as a vector into AdaGN (or as one token for cross-attention, LDM's ClassEmbedder)."""

    key: ClassVar[str] = "label"
    kind: Literal["label"] = "label"
    dropout: Fraction = Field(default=0.1, description="how often training sees the null condition instead")
    enters: Literal["vector", "token"] = "vector"
    width: PositiveInt | None = Field(default=None, description="token: its width")
    null: bool = Field(default=True, description="a learned row for the absent label; False: absent adds nothing")


class BPEText(Section):
    """A transformer trained from nothing, with the diffusion model, on byte-level BPE of the captions."""

    kind: Literal["bpe"] = "bpe"
    vocabulary: PositiveInt = 2048
    width: PositiveInt = 128
    depth: PositiveInt = 2
    head_dim: PositiveInt = 64
    heads: PositiveInt | None = Field(default=None, description="default: width / head_dim")
    length: PositiveInt = Field(
        default=32, description="tokens a caption, with its start and end marks; longer ones are cut"
    )
    masked: bool = Field(default=True, description="False: padding is attended to, as in CompVis' model")
    causal: bool = Field(default=False, description="a token sees none after it, as in CLIP")
    bias: bool = Field(default=False, description="of Q, K and V, as in CLIP")
    hidden: PositiveInt | None = Field(default=None, description="feed-forward width; default: 4 x width")
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    frozen: bool = Field(default=False, description="kept as it was imported when the diffusion model learns")


class PretrainedText(Section):
    """A frozen encoder of transformers: a local folder, a hub name, or `minilm` (from its wheel)."""

    kind: Literal["pretrained"] = "pretrained"
    name: str = "minilm"
    length: PositiveInt = 64


class WordsText(Section):
    """A transformer trained from nothing on frozen vectors of 27,000 English words, which come with Limner: a word
    that no caption has is near one that some has."""

    kind: Literal["words"] = "words"
    width: PositiveInt = 128
    depth: PositiveInt = 2
    head_dim: PositiveInt = 64
    length: PositiveInt = Field(default=32, description="tokens a caption, its marks included; longer ones are cut")
    noise: NonNegativeFloat = Field(default=0.7, description="added to the vectors in training, for new words' sake")


class GivenText(Section):
    """No encoder: captions are given as its output, since the U-Net was imported without it."""

    kind: Literal["given"] = "given"
    width: PositiveInt = Field(description="of a token")


class TextCondition(Section):
    """Captions: tokens for cross-attention, and a pooled vector into AdaGN."""

    key: ClassVar[str] = "text"
    kind: Literal["text"] = "text"
    dropout: Fraction = 0.1
    encoder: Annotated[BPEText | WordsText | PretrainedText | GivenText, Field(discriminator="kind")] = BPEText()
    pooled: bool = Field(default=True, description="a pooled vector into AdaGN besides the tokens")
    null: Literal["learned", "empty"] = Field(
        default="learned", description="empty: an absent caption is the empty one"
    )


class ImageCondition(Section):
    """A small picture, enlarged to the picture's size and concatenated to x_t: super-resolution.

    In training the small twin is made from the picture itself, by bicubic reduction with antialiasing.
    """

    key: ClassVar[str] = "small"
    kind: Literal["image"] = "image"
    dropout: Fraction = 0.1
    size: tuple[PositiveInt, PositiveInt] = Field((16, 16), description="height, width of the small picture")
    null: bool = Field(True, description="an absent picture is grey; False: every picture must be given")
    noise: Fraction = Field(
        default=0.0, description="the most noise added to the small picture in training; its level is told"
    )
    blur: float = Field(default=0.0, ge=0, description="the most blur before reduction, in pixels of the large picture")
    jpeg: int | None = Field(
        default=None, ge=1, le=95, description="the lowest JPEG quality of the twin; none: no JPEG"
    )


class SemanticMapCondition(Section):
    """A class for each pixel, one-hot, brought to the size of x_t by a learned strided convolution, concatenated."""

    key: ClassVar[str] = "semantic_map"
    kind: Literal["semantic_map"] = "semantic_map"
    dropout: Fraction = 0.1
    classes: tuple[str, ...] | None = Field(
        default=None, description="their names, in order; default: the data's classes.txt, or numbers"
    )
    void: int | None = Field(
        default=None, ge=0, description="the class that says nothing; default: one that is called void or unlabelled"
    )
    width: PositiveInt = Field(default=16, description="channels that the classes become")


class MaskCondition(Section):
    """A picture with a hole, and where the hole is, concatenated to x_t: inpainting and outpainting.

    In training the masks are made at random, unless the data have a column of them.
    """

    key: ClassVar[str] = "mask"
    kind: Literal["mask"] = "mask"
    dropout: Fraction = 0.1
    shapes: tuple[Literal["brush", "box", "outside"], ...] = Field(
        default=("brush", "box", "outside"), min_length=1, description="of masks made in training, in equal parts"
    )
    null: bool = Field(True, description="an absent picture is all hole; False: every picture must be given")
    hole: Literal["grey", "black"] = Field(default="grey", description="the colour that the model sees in the hole")
    signed: bool = Field(default=False, description="the mask is -1 and 1 to the network, not 0 and 1")
    cells: Literal["any", "first"] = Field(
        default="any", description="latents: a cell is in the hole for any of its pixels, or for its upper left one"
    )


class BoxTokens(Section):
    """Boxes as CompVis' layout models read them: a token for the class and one for each of two corners."""

    vocabulary: int = Field(
        default=8192, ge=4, description="classes and, as often used, cells of the grid of corners; the last is no box"
    )
    heads: PositiveInt | None = Field(default=None, description="default: width / head_dim")
    crop: bool = Field(default=True, description="two more tokens, of the part of the picture that is seen: the whole")


class BoxesCondition(Section):
    """A layout: (class, x, y, w, h) of each thing as a token, through a transformer, into cross-attention."""

    key: ClassVar[str] = "boxes"
    kind: Literal["boxes"] = "boxes"
    dropout: Fraction = 0.1
    classes: tuple[str, ...] | None = Field(default=None, description="their names, in order; default: the data's")
    most: PositiveInt = Field(default=24, description="boxes a picture; of more, the largest are taken")
    width: PositiveInt = 128
    depth: PositiveInt = 2
    head_dim: PositiveInt = 64
    pooled: bool = Field(default=True, description="a pooled vector into AdaGN besides the tokens")
    drawn: bool = Field(default=False, description="also drawn on a map, a channel for each class, concatenated to x_t")
    tokens: BoxTokens | None = Field(default=None, description="discrete tokens, as in CompVis' layout models")
    smallest: Fraction = Field(
        default=0.002, description="boxes made of semantic maps: the least area, as a share of the picture"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; numbers where none are told and the tokens leave room for them."""
        if self.classes is None and self.tokens is not None:
            return tuple(map(str, range(self.tokens.vocabulary - 1)))
        return self.classes or ()


class VariationCondition(Section):
    """Another picture, as a frozen feature network sees it: tokens for cross-attention and a vector into AdaGN.

    In training it is the picture itself.
    """

    key: ClassVar[str] = "variation"
    kind: Literal["variation"] = "variation"
    dropout: Fraction = 0.1
    side: PositiveInt = Field(default=64, multiple_of=32, description="of the square that the network sees, in pixels")
    grid: PositiveInt = Field(default=2, description="tokens along a side: the more, the closer to the picture")
    width: PositiveInt = Field(default=128, description="of the tokens")


ConditionConfig = Annotated[
    LabelCondition
    | TextCondition
    | ImageCondition
    | SemanticMapCondition
    | MaskCondition
    | BoxesCondition
    | VariationCondition,
    Field(discriminator="kind"),
]
