"""The HTTP API: pictures in OpenAI's form and in Limner's own, health, and figures for Prometheus."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from limner import __version__
from limner.errors import LimnerError
from limner.outputs import Picture, png
from limner.studio import reading
from limner.studio.engine import Engine
from limner.studio.guard import error_body
from limner.studio.jobs import Busy, Cancelled, Fault, Job, TimedOut
from limner.studio.jobs import Request as Drawing

_log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.25
"""How often it is seen whether a client is still there."""
CLIENT_GONE = 499
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Number = Annotated[int, Field(ge=0, lt=2**62, strict=True)]
Real = Annotated[float, Field(allow_inf_nan=False)]
One = Annotated[str, Field(max_length=10_000)] | Annotated[int, Field(strict=True)]


class Settings(BaseModel):
    """How to draw; what is left out is the run's own."""

    model_config = ConfigDict(extra="forbid")
    seed: Whole | None = Field(None, description="with a picture's number it decides its noise; default: at random")
    steps: Number | None = None
    guidance: Real | None = Field(None, description="classifier-free scale; 1 is off")
    sampler: str | None = None
    spacing: str | None = None
    interval: tuple[Real, Real] | None = Field(None, description="times in which guidance acts; 0 is data, 1 noise")
    rescale: Real | None = None
    eta: Real | None = None
    classifier_scale: Real | None = Field(None, description="of the classifier that goes with the model; 0 is off")

    def chosen(self) -> dict[str, Any]:
        """What was given, by name."""
        return {name: getattr(self, name) for name in Settings.model_fields if getattr(self, name) is not None}


class Draw(Settings):
    """Limner's own form."""

    model: str | None = Field(None, description="default: the first")
    size: str | None = Field(None, description="WIDTHxHEIGHT; default: the model's own")
    num: Number = 1
    first: Number = Field(0, description="number of the first picture")
    label: One | list[One] | None = Field(None, description="names or numbers; one, or one a picture in rotation")
    text: str | list[str] | None = Field(None, description="captions")
    negative_text: str | list[str] | None = Field(None, description="what the pictures should not be")
    image: str | list[str] | None = Field(None, description="to enlarge, vary, paint in or start from; base64")
    mask: str | None = Field(None, description="with image: white is painted anew; base64")
    strength: Real | None = Field(None, description="with image: how far to noise it before drawing, 0 to 1")
    semantic_map: str | None = Field(None, description="a PNG of class numbers, in base64")
    boxes: list[tuple[One, Real, Real, Real, Real]] | None = Field(None, description="(class, x, y, w, h) in 0..1")


class Generation(Settings):
    """OpenAI's form, with Limner's settings beside it (`extra_body` of the Python client)."""

    prompt: str = Field("", description="a caption, or a class by name or number, as the model has them")
    model: str | None = None
    n: Number | None = 1
    size: str | None = Field(None, description="'auto', or WIDTHxHEIGHT, such as '64x64'")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url: as a data: URL; nothing is kept")
    negative_prompt: str | None = None
    # What other models' clients send, and what means nothing here:
    quality: str | None = None
    style: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None
    output_format: Literal["png"] | None = None
    user: str | None = None


class Drawn(BaseModel):
    """One picture: its number, what it was asked to show, and the PNG in base64 with its whole recipe inside."""

    index: int
    facts: dict[str, Any]
    png: str


class Drawings(BaseModel):
    """recipe: what all of the pictures have in common."""

    model: str
    seconds: float
    recipe: dict[str, Any]
    pictures: list[Drawn]


class Generated(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Generations(BaseModel):
    """OpenAI's answer; `seed` is an addition."""

    created: int
    data: list[Generated]
    output_format: str = "png"
    size: str
    seed: int


def application(engine: Engine) -> FastAPI:
    """The API over an engine, which it closes at its own end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="Limner studio", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  description="Pictures from the models of this studio.")  # fmt: skip
    app.state.engine = engine
    _errors(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the studio is there."""
        return {"status": "ok", "models": len(engine.shelf.generators), "waiting": engine.waiting}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures in Prometheus' form."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models, in OpenAI's form, with the conditions and classes that each has."""
        return {"object": "list", "data": [_model(engine, name) for name in engine.shelf.generators]}

    @app.post("/v1/images/generations", responses=_RESPONSES)
    async def generations(asked: Generation, request: Request) -> Generations:
        """Pictures, asked for as of OpenAI's API."""
        drawing = await asyncio.to_thread(_of_openai, engine, asked)
        pictures, _ = await _drawn(engine, drawing, request)
        facts = engine.facts(drawing)
        data = [encoded(picture, facts) for picture in pictures]
        as_url = asked.response_format == "url"
        shown = [Generated(url=f"data:image/png;base64,{each}") if as_url else Generated(b64_json=each)
                 for each in data]  # fmt: skip
        return Generations(
            created=int(time.time()), data=shown, seed=drawing.seed, size=_size(engine, drawing.model, drawing.size)
        )

    @app.post("/api/draw", responses=_RESPONSES)
    async def draw(asked: Draw, request: Request) -> Drawings:
        """Pictures, asked for in Limner's own words."""
        drawing = await asyncio.to_thread(_of_limner, engine, asked)
        pictures, seconds = await _drawn(engine, drawing, request)
        facts = engine.facts(drawing)
        shown = [Drawn(index=p.index, facts=dict(p.facts), png=encoded(p, facts)) for p in pictures]
        return Drawings(model=drawing.model, seconds=seconds, recipe=facts, pictures=shown)

    return app


def encoded(picture: Picture, facts: dict[str, Any]) -> str:
    """A PNG in base64, its recipe inside."""
    return base64.b64encode(png_of(picture, facts)).decode()


def png_of(picture: Picture, facts: dict[str, Any]) -> bytes:
    """A PNG with all that is needed to draw it again."""
    return png(picture.pixels, {**facts, "index": picture.index, **picture.facts})


def _model(engine: Engine, name: str) -> dict[str, Any]:
    generator = engine.shelf.generators[name]
    return {"id": name, "object": "model", "created": 0, "owned_by": "limner", "conditions": generator.modalities,
            "classes": generator.classes, "size": _size(engine, name), "digest": generator.digest}  # fmt: skip


def _size(engine: Engine, name: str, asked: tuple[int, int] | None = None) -> str:
    height, width = asked or engine.shelf.generators[name].config.data.size or (0, 0)
    return f"{width}x{height}"


def _of_limner(engine: Engine, asked: Draw) -> Drawing:
    name = engine.shelf.named(asked.model)
    size = reading.size_of(asked.size, engine.shelf.generators[name], engine.limits)
    images = [asked.image] if isinstance(asked.image, str) else (asked.image or [])[: engine.limits.num]
    conditions: dict[str, Any] = {"label": asked.label, "text": asked.text, "negative_text": asked.negative_text}
    conditions["boxes"] = [asked.boxes] if asked.boxes else None
    conditions |= reading.told(engine.shelf.generators[name], engine.limits, image=images, mask=asked.mask,
                               semantic_map=asked.semantic_map, size=size)  # fmt: skip
    return engine.request(model=name, num=asked.num, first=asked.first, conditions=conditions, strength=asked.strength,
                          size=size, **asked.chosen())  # fmt: skip


def _of_openai(engine: Engine, asked: Generation) -> Drawing:
    name = engine.shelf.named(asked.model)
    kinds = engine.shelf.generators[name].modalities
    kind = "text" if "text" in kinds else "label" if "label" in kinds else None
    if kind is None and asked.prompt.strip():
        raise LimnerError(f"prompt: {name} has neither captions nor classes; leave it empty")
    conditions = {kind: asked.prompt} if kind and asked.prompt.strip() else {}
    conditions |= {"negative_text": asked.negative_prompt} if asked.negative_prompt else {}
    num = 1 if asked.n is None else asked.n
    size = reading.size_of(asked.size, engine.shelf.generators[name], engine.limits)
    return engine.request(model=name, num=num, conditions=conditions, size=size, **asked.chosen())


async def _drawn(engine: Engine, drawing: Drawing, request: Request) -> tuple[Sequence[Picture], float]:
    """The pictures and the seconds that they took. Whoever goes away meanwhile frees the place."""
    job = engine.submit(drawing)
    done = asyncio.wrap_future(job.done)
    try:
        while not (await asyncio.wait({done}, timeout=LOOK_EVERY_S))[0]:
            if await request.is_disconnected():
                job.cancel("the client went away")
        return await done, time.monotonic() - job.asked_at
    finally:
        _give_up(job)


def _give_up(job: Job) -> None:
    if not job.done.done():
        job.cancel()


# --- errors -------------------------------------------------------------------------------------------------------


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class Wrong(BaseModel):
    """Whatever goes wrong is one sentence."""

    error: Error


_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": Wrong, "description": "the request doesn't fit the model"},
    413: {"model": Wrong, "description": "the body is too large"},
    429: {"model": Wrong, "description": "the queue is full; Retry-After tells when to come back"},
    504: {"model": Wrong, "description": "it took too long"},
}


_SAID = {"json_invalid": "the body is no JSON", "extra_forbidden": "there is no such field", "missing": "is missing"}


def status_of(error: LimnerError) -> int:
    """The HTTP status that an error goes with."""
    if isinstance(error, Busy):
        return 429
    if isinstance(error, TimedOut):
        return 504
    if isinstance(error, Cancelled):
        return CLIENT_GONE
    return 500 if isinstance(error, Fault) else 400


def _errors(app: FastAPI) -> None:
    @app.exception_handler(LimnerError)
    async def wrong(_: Request, error: LimnerError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Busy) else None
        return _answer(status_of(error), str(error), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body" and not isinstance(part, int)]
        name = place[0] if place else None
        said = _SAID.get(first["type"], str(first["msg"]))
        return _answer(400, said if name is None else f"{name}: {said[0].lower()}{said[1:]}", name)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        _log.error("answering failed", exc_info=error)
        return _answer(500, f"a fault of limner: {type(error).__name__}")


def _answer(status: int, message: str, param: str | None = None, headers: Any = None) -> JSONResponse:
    return JSONResponse(error_body(status, " ".join(message.split()), param), status, headers=headers)
