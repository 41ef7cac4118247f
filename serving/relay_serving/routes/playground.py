"""`GET /`: the playground, one static page, and what it has to know about the server before it has an API key.

The page asks for nothing but this server's own routes, relative to its own address, so that it also works behind a
prefix. vLLM guards `/v1` only: the page is reachable without a key, and asks for one when `/v1` answers 401.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from relay_serving.segmentation.profile import SegmentationProfile

FOLDER = Path(__file__).parents[1] / "playground"
FILES = {"style.css": "text/css", "script.js": "text/javascript"}
# Nothing from elsewhere, nothing inline, no markup made from strings; pictures may also be files that a person chose.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

router = APIRouter()


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> Response:
    return FileResponse(FOLDER / "index.html", media_type="text/html", headers=HEADERS)


@router.get("/playground/server.json", include_in_schema=False)
async def facts(raw_request: Request) -> Response:
    """Whether this server answers with masks, and on what grid; the model's name stays behind the key."""
    return JSONResponse({"segmentation": getattr(raw_request.app.state, "playground", None)}, headers=HEADERS)


@router.api_route("/playground/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def file(name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(FOLDER / name, media_type=FILES[name], headers=HEADERS)


def attach(app: FastAPI) -> None:
    """Add the page. Routes that are there already win: the first that matches a path answers it."""
    app.include_router(router)


def publish(state: Any, profile: SegmentationProfile | None) -> None:
    """Tell the page what the served model answers with; a profile of None: text only."""
    state.playground = None if profile is None else {"rows": profile.rows, "columns": profile.columns}
