"""Load on the studio: many clients on loopback; lost and mixed-up pictures, memory, and what batching is worth.

python -m benchmarks.studio_load RUN [--clients 64] [--seconds 120] [--steps 10]

Each client asks for one picture after another with a seed of its own; afterwards a share of them is drawn again alone
and compared. Then, for a quarter of the time, the same load meets an engine that draws one request at a time. Clients
and server are threads of one process.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

import limner
from limner.studio.engine import Engine
from limner.studio.guard import Guard
from limner.studio.http import application
from limner.studio.limits import Limits
from limner.studio.server import running
from limner.studio.shelf import Shelf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check", type=int, default=50, help="pictures that are drawn again alone")
    asked = parser.parse_args()
    together = load(asked.run, asked.clients, asked.seconds, asked.steps, batch=16, keep=asked.check)
    alone = load(asked.run, asked.clients, asked.seconds / 4, asked.steps, batch=1, keep=0)
    wrong = compare(asked.run, together.pop("pictures"), asked.steps)
    del alone["pictures"]
    ratio = together["pictures_per_s"] / alone["pictures_per_s"]
    print(json.dumps({"together": together, "one by one": alone, "ratio": round(ratio, 2), **wrong}, indent=2))


def load(run: str, clients: int, seconds: float, steps: int, batch: int, keep: int) -> dict[str, Any]:
    """Figures of one load, and `keep` of the pictures by seed, any as likely as another.

    drawn, failed: requests, all that were sent. memory_grown_mb: resident memory at the end of the load, less that
    after its first tenth.
    """
    engine = Engine(Shelf.open([run]), Limits(queue=clients, batch=batch))
    app = Guard(application(engine), token=None, upload=engine.limits.upload, metrics=engine.metrics)
    process, pictures, failed = psutil.Process(os.getpid()), [], []
    drawn, chance, lock = set[int](), random.Random(0), threading.Lock()
    with running(app) as address:
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            with httpx.Client(base_url=address, timeout=600) as http:
                for count in range(10**6):
                    if time.monotonic() > end:
                        return
                    seed = number * 10**6 + count
                    answer = http.post("/api/draw", json={"seed": seed, "steps": steps})
                    if answer.status_code != 200:
                        failed.append(answer.text)
                        continue
                    found = answer.json()
                    assert found["recipe"]["seed"] == seed, "another client's picture"
                    with lock:  # a reservoir, so that the pictures kept don't count as memory that grows
                        drawn.add(seed)
                        place = len(pictures) if len(pictures) < keep else chance.randrange(len(drawn))
                        pictures[place : place + 1] = [(seed, found["pictures"][0]["png"])] if place < keep else []

        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(client, number) for number in range(clients)]
            time.sleep(seconds / 10)
            before = process.memory_info().rss
            for each in asked:
                each.result()
        took = time.monotonic() - began
        grown = process.memory_info().rss - before
    engine.close()
    return {"drawn": len(drawn), "failed": len(failed), "pictures_per_s": round(len(drawn) / took, 2),
            "memory_mb": round((before + grown) / 1e6), "memory_grown_mb": round(grown / 1e6, 1),
            "pictures": pictures}  # fmt: skip


def compare(run: str, pictures: list[tuple[int, str]], steps: int) -> dict[str, Any]:
    """How many pictures differ from the one drawn alone from the same seed, and by how much at most (of 255)."""
    generator = limner.load(run)
    worst, differing = 0, 0
    for seed, encoded in pictures:
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(int)
        chosen = {"label": 0} if "label" in generator.modalities else {}
        want = generator.sample(num=1, seed=seed, steps=steps, output="array", **chosen)[0].astype(int)
        gap = int(np.abs(found - want.reshape(found.shape)).max())
        worst, differing = max(worst, gap), differing + (gap > 0)
    return {"compared": len(pictures), "differing": differing, "worst": worst}


if __name__ == "__main__":
    main()
