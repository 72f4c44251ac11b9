"""Write `train.parquet` from scikit-learn's copy of the digits: pip install scikit-learn, then python make.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits


def main() -> None:
    digits = load_digits()  # levels 0..16 of ink; the pictures are dark on white
    levels = (255 - digits.images * 255 / 16).round().astype(np.uint8)
    rows = {"image": [Image.fromarray(picture) for picture in levels], "label": digits.target.tolist()}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(k) for k in range(10)])})
    Dataset.from_dict(rows, features=features).to_parquet(Path(__file__).with_name("train.parquet"))


if __name__ == "__main__":
    main()
