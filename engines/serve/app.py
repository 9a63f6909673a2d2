"""The paths of the server, put together."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from ..runtime.painting import TRAINED
from . import page
from .endpoints import Endpoints
from .guard import FILES_PATH, Guard
from .log import Log
from .metrics import CONTENT_TYPE, Metrics
from .painting import decoders_of
from .refusals import Refused, body_from_refusal

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def application(endpoints: Endpoints, *, log: Log, metrics: Metrics) -> Guard:
    """The application of `endpoints`, behind its guard."""
    about, scheduler = endpoints.about, endpoints.scheduler
    decoders = decoders_of(endpoints.model)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model()]})

    async def model(request: Request) -> Response:
        return JSONResponse(_model())  # any name is answered by the one model

    def _model() -> dict[str, object]:
        facts = {"bundle_sha256": about.bundle_sha256, "precision": about.precision}
        return {
            "id": about.model,
            "object": "model",
            "created": 0,
            "owned_by": "star-export",
            "star": {
                **facts,
                "backend": about.backend,
                "size": f"{about.side}x{about.side}",
                "decoders": decoders,
                "resolutions": TRAINED if "diffusion" in decoders else (),
            },
        }

    async def health(request: Request) -> Response:
        try:
            scheduler.check()
        except Refused as error:
            return JSONResponse({"status": "failed", **body_from_refusal(error)}, 503)
        if scheduler.waiting.closed:
            return JSONResponse({"status": "stopping"}, 503)
        waiting, drawing = len(scheduler.waiting), len(scheduler.drawing)
        work = {"waiting": waiting, "drawing": drawing}
        return JSONResponse({"status": "ok", "model": about.model, **work, "decoders": decoders})

    async def numbers(request: Request) -> Response:
        gauges = {
            "star_waiting": len(scheduler.waiting),
            "star_drawing": len(scheduler.drawing),
            "star_bodies_bytes": endpoints.bodies.held_bytes,
        }
        return Response(metrics.text(gauges), media_type=CONTENT_TYPE)

    async def kept(request: Request) -> Response:
        name = request.path_params["name"]
        data = endpoints.files.read(name)
        if data is None:
            raise Refused(
                404,
                "There is no such image any more",
                where=f"path: expected the address of an image of the last hour, got {name[:60]!r}",
                fix="draw it again: its seed gives the same image",
                code="not_found",
            )
        return Response(data, media_type=MEDIA[name.rpartition(".")[2]])

    async def home(request: Request) -> Response:
        return Response(page.HTML, media_type="text/html; charset=utf-8", headers=page.HEADERS)

    routes = [
        Route("/", home),
        Route("/health", health),
        Route("/metrics", numbers),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/images/generations", endpoints.generations, methods=["POST"]),
        Route("/v1/images/edits", endpoints.edits, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route(FILES_PATH + "{name}", kept),
    ]
    paths = {route.path for route in routes}
    return Guard(
        Router(routes, redirect_slashes=False), endpoints.settings, log=log, metrics=metrics, paths=paths
    )
