"""What the server answers: the page, its cards, pictures by number, decisions; to its own address and token alone."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from influence_cli.errors import InfluenceError
from influence_cli.review.desk_page import MOST
from influence_cli.review.ledger import Conflict

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from influence_cli.review.ledger import Kept, Ledger
    from influence_cli.review.photos import Photos

# Of one request: an import of a hundred thousand decisions.
MOST_BYTES = 20_000_000
# Nothing is kept by the browser but pictures; no other page may frame this one or learn its address.
HEADERS = {
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Served:
    """What there is to serve.

    Attributes:
        page: the page without its cards.
        cards: from places of suspects to the HTML of their cards.
        suspects: how many there are.
        photos: of the data set.
        ledger: the decisions.
    """

    page: str
    cards: Callable[[Sequence[int]], str]
    suspects: int
    photos: Photos
    ledger: Ledger


def make_app(served: Served, token: str, hosts: Sequence[str]) -> ASGIApp:
    """Make the application. Every path begins with the token; anything else is refused without a look at it.

    Args:
        served: what there is to serve.
        token: the secret part of the address.
        hosts: the values that the header Host may have, such as ``127.0.0.1:8750``.
    """

    async def page(_: Request) -> Response:
        return HTMLResponse(served.page, headers={"cache-control": "no-store"})

    async def cards(request: Request) -> Response:
        places = [int(word) for word in request.query_params.get("at", "").split(",") if word.isdecimal()]
        if len(places) > MOST or any(place >= served.suspects for place in places):
            return PlainTextResponse("no such suspects", 404)
        return HTMLResponse(await run_in_threadpool(served.cards, places), headers={"cache-control": "no-store"})

    def picture(read: Callable[[int], tuple[bytes, str]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                data, kind = await run_in_threadpool(read, request.path_params["index"])
            except InfluenceError as error:
                return PlainTextResponse(error.message.encode("utf-8", "replace"), 404)
            return Response(data, media_type=kind, headers={"cache-control": "private, max-age=300"})

        return answer

    async def state(request: Request) -> Response:
        try:
            version, rows = await run_in_threadpool(served.ledger.state)
            if request.query_params.get("since") == str(version):
                return JSONResponse({"version": version})
            return _decisions(served.ledger, version, rows)
        except InfluenceError as error:
            return _refusal(error, 409)

    async def change(request: Request) -> Response:
        try:
            changes = _changes(await _body(request))
        except ValueError as error:
            return JSONResponse({"error": f"not decisions: {error}"}, 400)
        try:
            version = await run_in_threadpool(served.ledger.change, changes)
        except Conflict:
            return _decisions(served.ledger, *served.ledger.state(), status=409)
        except InfluenceError as error:
            return _refusal(error, 423 if not served.ledger.writes else 422)
        return JSONResponse({"version": version})

    routes = [
        Route("/", page),
        Route("/cards", cards),
        Route("/thumbnail/{index:int}", picture(served.photos.thumbnail)),
        Route("/photo/{index:int}", picture(served.photos.photo)),
        Route("/decisions", state),
        Route("/decisions", change, methods=["POST"]),
    ]
    return _guarded(Starlette(routes=routes), token, hosts)


def _guarded(app: ASGIApp, token: str, hosts: Sequence[str]) -> ASGIApp:
    """Let through what is asked of this host by its token and comes from no other page."""
    allowed, origins = {host.encode() for host in hosts}, {f"http://{host}".encode() for host in hosts}
    begin = f"/{token}/".encode()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = [(name.lower(), value) for name, value in scope["headers"]]
        named = [value for name, value in given if name == b"host"]
        other = [value for name, value in given if name == b"origin" and value not in origins]
        path = scope["path"].encode("utf-8", "surrogatepass")
        if len(named) != 1 or named[0] not in allowed or other:
            refusal: ASGIApp | None = PlainTextResponse("this host is not served here", 403, HEADERS)
        elif not hmac.compare_digest(path[: len(begin)], begin):
            refusal = PlainTextResponse("open the address that influence review printed", 403, HEADERS)
        else:
            refusal = None
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        inner = scope["path"][len(begin) - 1 :]
        await app({**scope, "path": inner, "raw_path": inner.encode("utf-8", "surrogatepass")}, receive, with_headers)

    return answer


async def _body(request: Request) -> object:
    """Read the JSON of a request.

    Raises:
        ValueError: it is too long, of another type, or no JSON.
    """
    # A form of another page cannot send this type without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError("the type must be application/json")
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > MOST_BYTES:
            raise ValueError("too many at once")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _changes(body: object) -> list[tuple[int, tuple[str, str], tuple[str, str]]]:
    """Check the shape of changes: a list of [index, decision, new label, decision before, new label before]."""
    if not isinstance(body, list) or not body:
        raise ValueError("a list of changes is needed")
    changes, seen = [], set()
    for entry in body:
        if not isinstance(entry, list) or len(entry) != 5 or type(entry[0]) is not int:
            raise ValueError("a change is [index, decision, new label, decision before, new label before]")
        if not all(isinstance(word, str) for word in entry[1:]):
            raise ValueError("decisions and labels are text")
        index, decision, new, earlier, earlier_new = entry
        if index in seen:
            raise ValueError(f"example {index} twice")
        seen.add(index)
        changes.append((index, (earlier, earlier_new), (decision, new)))
    return changes


def _decisions(ledger: Ledger, version: int, rows: dict[int, Kept], status: int = 200) -> Response:
    listed = [[index, row.decision, row.new_label, row.who, row.when] for index, row in rows.items()]
    body = json.dumps({"version": version, "writes": ledger.writes, "rows": listed})
    return Response(body, status, media_type="application/json", headers={"cache-control": "no-store"})


def _refusal(error: InfluenceError, status: int) -> Response:
    text = error.message + (f": {error.hint}" if error.hint else "")
    return JSONResponse({"error": text.encode("utf-8", "replace").decode()}, status)
