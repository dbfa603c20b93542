"""Static pages: the playground at `/` and a reader of the OpenAPI document at `/docs`. They work offline."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from serving.web.problems import ProblemError
from serving.web.scopes import needs

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).parent.parent / "playground"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in KINDS}
"""Read once: no request can name another file."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _page(name: str) -> Response:
    if name not in FILES:
        raise ProblemError("not-found", "there is no such page")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Response(FILES[name], headers=headers, media_type=KINDS[Path(name).suffix])


@router.get("/")
@needs("use")
async def playground() -> Response:
    """The playground."""
    return _page("index.html")


@router.get("/docs")
@needs("use")
async def docs() -> Response:
    """The API, for people."""
    return _page("docs.html")


@router.get("/playground/{name}")
@needs("use")
async def asset(name: str) -> Response:
    """A script or style."""
    return _page(name)
