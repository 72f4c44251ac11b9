"""The engine: pictures equal to those drawn alone, batches, the queue, giving up, time, errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import limner
import tiny_studio
from limner.errors import LimnerError
from limner.outputs import Picture
from limner.studio.engine import Engine
from limner.studio.jobs import Busy, Cancelled, Fault, Job, Progress, TimedOut
from limner.studio.limits import Limits
from limner.studio.shelf import Shelf


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_studio.write_run(tmp_path_factory.mktemp("studio") / "tiny", tiny_studio.recipe())


@pytest.fixture
def engine(run: Path) -> Iterator[Engine]:
    made = Engine(Shelf.open([run]), Limits(queue=8, batch=8, num=8, steps=2000))
    yield made
    made.close()


class Held:
    """The engine's thread kept at the first step of an errand until `release`, so that a queue can build up."""

    def __init__(self, engine: Engine) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self.job = engine.errand(None, self._work)
        assert self.reached.wait(10)

    def _work(self, *_: object) -> None:
        self.reached.set()
        self.gate.wait(20)

    def release(self) -> None:
        self.gate.set()


def pixels(pictures: list[Picture]) -> np.ndarray:
    return np.stack([picture.pixels for picture in pictures])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_pictures_drawn_together_equal_those_drawn_alone(engine: Engine, run: Path, sampler: str) -> None:
    asked = [{"num": 1, "seed": 5, "conditions": {"label": "dog"}}, {"num": 3, "seed": 9, "first": 2},
             {"num": 2, "seed": 5, "conditions": {"label": ["fish", 0]}}]  # fmt: skip
    held = Held(engine)
    jobs = [engine.draw(sampler=sampler, **each) for each in asked]
    held.release()
    together = [pixels(job.pictures()) for job in jobs]
    assert engine.metrics.batch._sum.get() == 6, "they should have been one batch"
    generator = limner.load(run)
    for each, found in zip(asked, together, strict=True):
        alone = generator.sample(output="array", sampler=sampler, num=each["num"], seed=each["seed"],
                                 first=each.get("first", 0), **each.get("conditions", {}))  # fmt: skip
        np.testing.assert_allclose(found.astype(int), alone, atol=1)
        assert (found == alone).mean() > 0.99
    assert not np.array_equal(together[0][0], together[2][0]), "another label, the same noise"


def test_what_was_asked_is_in_the_facts(engine: Engine) -> None:
    pictures = engine.draw(num=4, seed=1, first=7).pictures()
    assert [picture.index for picture in pictures] == [7, 8, 9, 10]
    assert [picture.facts["label_name"] for picture in pictures] == ["cat", "dog", "fish", "cat"]
    facts = engine.facts(engine.request(seed=1, steps=3))
    assert (facts["seed"], facts["steps"]) == (1, 3)
    assert facts["digest"]


def test_only_what_fits_together_is_one_batch(engine: Engine) -> None:
    held = Held(engine)
    jobs = [engine.draw(num=num, steps=steps) for num, steps in ((4, 2), (1, 3), (3, 2), (4, 2))]
    held.release()
    assert [len(job.pictures()) for job in jobs] == [4, 1, 3, 4]
    assert engine.metrics.batch._sum.get() == 12
    drawn = engine.metrics.registry.get_sample_value("limner_batch_pictures_count")
    assert drawn == 3, "4 + 3 of two steps; 1 of three; and 4, for which there was no room"


def test_pictures_of_another_size_are_drawn_by_themselves(engine: Engine) -> None:
    held = Held(engine)
    jobs = [engine.draw(seed=1, size=size) for size in (None, (8, 16), (8, 8))]
    held.release()
    assert [job.pictures()[0].pixels.shape for job in jobs] == [(8, 8, 3), (8, 16, 3), (8, 8, 3)]
    drawn = engine.metrics.registry.get_sample_value("limner_batch_pictures_count")
    assert drawn == 2, "8x8 is the model's own size"


def test_beyond_the_queue_it_says_when_to_come_back(engine: Engine) -> None:
    held = Held(engine)
    jobs = [engine.draw() for _ in range(8)]
    with pytest.raises(Busy, match="8 requests are waiting already; try again in 1 s") as caught:
        engine.draw()
    assert caught.value.retry_after_s >= 1
    jobs[3].cancel()
    assert engine.waiting == 7
    jobs.append(engine.draw())
    held.release()
    with pytest.raises(Cancelled):
        jobs[3].pictures()
    assert all(len(job.pictures()) == 1 for k, job in enumerate(jobs) if k != 3)


def test_giving_up_stops_the_sampler_within_a_step(engine: Engine) -> None:
    job = engine.draw(steps=2000)
    tiny_studio.until(lambda: isinstance(job._progress, Progress))
    job.cancel()
    with pytest.raises(Cancelled):
        job.pictures()
    tiny_studio.until(lambda: not engine._drawing)
    assert job._progress is not None
    assert job._progress.step < 1000, "it should have stopped long before the end"
    assert len(engine.draw().pictures()) == 1


def test_one_of_a_batch_gives_up_and_the_other_goes_on(engine: Engine) -> None:
    held = Held(engine)
    one, other = engine.draw(steps=50, seed=1), engine.draw(steps=50, seed=2)
    held.release()
    tiny_studio.until(lambda: one._progress is not None)
    one.cancel()
    alone = engine.shelf.generators["tiny"].sample(num=1, steps=50, seed=2, label=0, output="array")
    np.testing.assert_allclose(pixels(other.pictures()).astype(int), alone, atol=1)


def test_time_is_up_while_drawing_and_while_waiting(engine: Engine) -> None:
    drawing, waiting = engine.draw(timeout_s=0.3, steps=2000), engine.draw(timeout_s=0.3, steps=5)
    for job in (drawing, waiting):
        with pytest.raises(TimedOut, match="took longer than the 0 s it was given"):
            job.pictures()
    assert len(engine.draw().pictures()) == 1


def test_the_forming_picture_is_shown(engine: Engine) -> None:
    held = Held(engine)
    job = engine.draw(num=2, steps=8, previews=True)
    plain = engine.draw(num=1, steps=8)
    events = job.events()
    assert next(events) is None, "it waits"
    held.release()
    seen = [event for event in events if event is not None]
    assert seen[-1].step == 8
    assert seen[-1].left_s == 0
    assert all(event.previews is None or event.previews.shape == (2, 8, 8, 3) for event in seen)
    assert seen[-1].previews is not None
    plain.pictures()
    assert plain._progress is not None
    assert plain._progress.previews is None


def test_a_fault_ends_its_batch_and_nothing_else(engine: Engine) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("secret of the house")

    with pytest.raises(Fault, match=r"^a fault of limner: RuntimeError$"):
        engine.errand(None, fault).done.result()
    assert len(engine.draw().pictures()) == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "tine"}, "model 'tine': there is none such here; did you mean 'tiny'"),
        ({"num": 9}, "num: 9, should be from 1 to 8"),
        ({"num": 0}, "num: 0, should be from 1"),
        ({"steps": 10**12}, "steps: 1000000000000, should be from 1 to 2000"),
        ({"spacing": "ddim2001"}, "2001|spacing"),
        ({"conditions": {"label": "dgo"}}, "label 'dgo': there is no such class; did you mean 'dog'"),
        ({"conditions": {"label": []}}, "an empty list"),
        ({"conditions": {"text": "a dog"}}, "text: this model was not trained with it"),
        ({"classifier_scale": 1.0}, "needs a classifier"),
        ({"sampler": "dpm"}, "sampler 'dpm': there is none such"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(engine: Engine, asked: dict[str, object], said: str) -> None:
    with pytest.raises(LimnerError, match=said):
        engine.request(**asked)  # pyright: ignore[reportArgumentType]


def test_a_caption_is_drawn_and_bounded(tmp_path: Path) -> None:
    run = tiny_studio.write_run(tmp_path / "words", tiny_studio.text_recipe(), ["a red cat", "a blue dog"])
    engine = Engine(Shelf.open([run]), Limits(caption=20))
    try:
        red, blue = (engine.draw(seed=0, conditions={"text": text}) for text in ("a red cat", "a blue dog"))
        assert not np.array_equal(red.pictures()[0].pixels, blue.pictures()[0].pixels)
        assert red.pictures()[0].facts == {"text": "a red cat"}
        with pytest.raises(LimnerError, match="a caption of 21 characters; 20 are allowed"):
            engine.request(conditions={"text": "x" * 21})
        with pytest.raises(LimnerError, match="half a surrogate pair at character 1"):
            engine.request(conditions={"text": "x\ud800"})
    finally:
        engine.close()


def test_closing_gives_up_what_waits(run: Path) -> None:
    engine = Engine(Shelf.open([run]), Limits(steps=3000))
    jobs: list[Job] = [engine.draw(steps=3000), engine.draw(steps=3)]
    engine.close()
    for job in jobs:
        with pytest.raises(Cancelled, match="the studio is closing"):
            job.pictures()
    with pytest.raises(Busy):
        engine.draw()


def test_shelf_names_runs_and_keeps_untrained_ones_to_watch(run: Path, tmp_path: Path) -> None:
    twin = tiny_studio.write_run(tmp_path / "other" / "tiny", tiny_studio.recipe())
    bare = tiny_studio.write_run(tmp_path / "bare", tiny_studio.recipe())
    (bare / "model.safetensors").unlink()
    shelf = Shelf.open([run, twin, bare])
    assert list(shelf.generators) == [f"{run.parent.name}/tiny", "other/tiny"]
    assert list(shelf.runs) == [*shelf.generators, "bare"]
    for wrong, said in (([], "no run"), ([run, run], "named twice"), ([tmp_path / "none"], "no such file")):
        with pytest.raises(LimnerError, match=said):
            Shelf.open(wrong)
