"""Feed Limner's readers bytes that coverage guides, for as long as one likes:

python scripts/fuzz.py pictures -max_total_time=300

The target is one of headers (safetensors), pickles (PyTorch's files), metadata (JSON lines), csv, pictures, maps, tars,
parquet, recipes; the options after it are libFuzzer's. Whatever isn't read has to be refused by a LimnerError of one
line; the bytes of anything else, of ten seconds' work or of 4 GB of memory are left in crash-*. It needs atheris, which
isn't among the dependencies: `pip install atheris`. The test suite feeds the same targets some damaged seeds.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

SHARD = {"kind": "limner latents", "key": "key", "corrupt": '{"1": "is empty"}'}
OPTIONS = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=4096"]  # 89 million pixels of RGBA take 1.4 GB

with contextlib.ExitStack() as stack:
    if __name__ == "__main__":
        import atheris  # pyright: ignore[reportMissingImports]

        stack.enter_context(atheris.instrument_imports(include=["limner"]))
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from safetensors.torch import save

    from limner import api
    from limner import config as configuration
    from limner.config import DataConfig
    from limner.data import latents
    from limner.data.check import check
    from limner.data.dataset import prepare
    from limner.data.overlays import MapRecipe, MaskRecipe
    from limner.data.transforms import Recipe, quiet
    from limner.errors import LimnerError
    from limner.interop import safe
    from limner.training.checkpoint import read_model


def encoded(form: str, mode: str = "RGB") -> bytes:
    """A picture of 9x7."""
    buffer = io.BytesIO()
    Image.effect_noise((9, 7), 80).convert(mode).save(buffer, form)
    return buffer.getvalue()


@functools.cache
def work() -> tempfile.TemporaryDirectory[str]:
    """Where the bytes are put, as long as the process lasts."""
    return tempfile.TemporaryDirectory(prefix="limner-fuzz-")


def written(name: str, data: bytes) -> Path:
    """A file that holds these bytes."""
    path = Path(work().name) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def of_a_source(source: Path) -> None:
    """All that is read of a data set, and the report on it."""
    for stream in (False, True):
        for wants in ((), ("label",), ("text",), ("boxes",)):
            with contextlib.suppress(LimnerError):
                data = prepare(DataConfig(source=str(source), size=(4, 4), stream=stream), wants)
                data.batch(data.train[:2])
    "\n".join(check(str(source)).lines()).encode()


def headers(data: bytes) -> None:
    path = written("run/model.safetensors", data)
    with contextlib.suppress(LimnerError):
        api.read_tensors(path)
    with contextlib.suppress(LimnerError):
        latents.is_whole(path, SHARD["key"], range(2))
    read_model(path.parent)


def pickles(data: bytes) -> None:
    safe.read(written("weights.pt", data))


def metadata(data: bytes) -> None:
    written("lines/0.png", encoded("PNG"))
    of_a_source(written("lines/metadata.jsonl", data).parent)


def csv(data: bytes) -> None:
    written("table/0.png", encoded("PNG"))
    of_a_source(written("table/metadata.csv", data).parent)


def pictures(data: bytes) -> None:
    with quiet():
        for recipe in (Recipe((6, 5), 3), Recipe((6, 5), 4, margins=True)):
            recipe(data)


def maps(data: bytes) -> None:
    with quiet():
        with contextlib.suppress(LimnerError):
            MaskRecipe((6, 5), False)(data, encoded("PNG"))
        MapRecipe((6, 5), True, 3)(data, data)


def tars(data: bytes) -> None:
    of_a_source(written("shard.tar", data))


def parquet(data: bytes) -> None:
    of_a_source(written("shard.parquet", data))


def recipes(data: bytes) -> None:
    configuration.load(written("recipe.yaml", data))


def seeds() -> dict[str, list[bytes]]:
    """Bytes for each target to begin with, the first of them sound."""
    tensors = {"network.w": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    line = b'{"file_name": "0.png", "label": "a", "text": "b", "objects": {"bbox": [[0, 0, 1, 1]], "class": [0]}}\n'
    pickled, tar, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(tensors, pickled)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in {"0.png": encoded("PNG"), "0.txt": b"a", "0.cls": b"1", "0.json": line}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"image": [{"bytes": encoded("PNG"), "path": None}], "label": [1]}), table)
    forms = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")
    kinds = [encoded(form) for form in forms] + [encoded("PNG", mode) for mode in ("P", "L", "1", "RGBA", "I;16")]
    numbers = io.BytesIO()
    Image.fromarray(np.eye(7, 9, dtype=np.uint8)).save(numbers, "PNG")
    return {
        "headers": [save(tensors, {"format": "pt"}), save({"mean": torch.ones(2, 3).half()}, SHARD)],
        "pickles": [pickled.getvalue()],
        "metadata": [line],
        "csv": [b"file_name,label,text\n0.png,a,b\n"],
        "pictures": kinds,
        "maps": [numbers.getvalue(), *kinds],
        "tars": [tar.getvalue()],
        "parquet": [table.getvalue()],
        "recipes": [b"task: diffusion\nmodel: {kind: unet, levels: [{channels: 8}]}\n"],
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (headers, pickles, metadata, csv, pictures, maps, tars, parquet, recipes)
}


def attempt(target: str, data: bytes) -> None:
    """Success, or a LimnerError of one line; anything else goes up."""
    try:
        TARGETS[target](data)
    except LimnerError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"no short line: {error!r}") from error


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"python scripts/fuzz.py {{{','.join(TARGETS)}}} [libFuzzer's options]")
    target, corpus = sys.argv[1], Path(work().name) / "corpus"
    os.environ["LIMNER_CACHE"] = str(Path(work().name) / "cache")
    for number, data in enumerate(seeds()[target]):
        written(f"corpus/{number}", data)
    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[2:], str(corpus)], lambda data: attempt(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
