"""`bentoml serve`: POST /rank takes a user and candidates, and answers the candidates, best first."""

from __future__ import annotations

import gc
import json
import os
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before BentoML reads it

import bentoml
import torch
from bentoml.exceptions import InvalidArgument
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from bento import MAX_BODY_BYTES, MAX_HISTORY, MODEL, SERVING
from bento.scorer import Scorer
from bento.store import OnlineFeatures, UserRow, feast_reader

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STORE_TIMEOUT = 0.2  # seconds; a healthy store answers within 0.01

Id = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]


class Request(BaseModel):
    """history  item ids, oldest first, in place of the online store's; k  how many items to return
    context  feature -> value as text, also for numbers; null: missing
    """

    model_config = ConfigDict(extra="forbid")

    user_id: Id
    candidates: Annotated[list[Id], Field(min_length=1)]
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = None
    context: dict[str, str | None] | None = None
    k: Annotated[int, Field(strict=True, ge=1)] | None = None


class Answer(BaseModel):
    """items and their click probabilities, best first, equal ones in the request's order.

    degraded  what the answer was computed without: unknown_user, unknown_items, missing_context, store_unavailable
    """

    version: str
    items: list[int]
    scores: list[float]
    degraded: list[str]


@bentoml.service(
    name="ctr_ranker",
    http={"host": "127.0.0.1"},  # to be reached from other machines, serve with `--host`
    traffic={"timeout": 10},
    threads=16,  # requests that wait for the online store do not hold up the others
    tracing={"excluded_urls": ".*"},  # with gc.freeze, this doubles the requests per second
    logging={"access": {"enabled": False}},
    envs=[{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}],
)
class CtrRanker:
    """Click probabilities of candidate items for a user."""

    model = bentoml.models.BentoModel(f"{MODEL}:latest")

    def __init__(self) -> None:
        torch.set_num_threads(1)  # requests are small: one thread each, several at once
        folder = Path(self.model.path)
        facts = json.loads((folder / SERVING).read_text())
        self.version: str = facts["version"]
        self.max_candidates: int = facts["max_candidates"]
        self.scorer = Scorer(folder)
        self.online = OnlineFeatures(feast_reader(os.environ.get("CLICKLOOP_ONLINE")), timeout=STORE_TIMEOUT)
        # The port opens after __init__, so ready means that a full request was scored.
        item_ids = self.scorer.catalog.item_ids_I[-self.max_candidates :].tolist()
        warm = self.scorer.rank(0, item_ids, item_ids[:MAX_HISTORY], {}, {})
        if not torch.isfinite(warm).all():
            raise ValueError(f"{folder}: the model scores {int((~warm.isfinite()).sum())} items as NaN or infinite")
        gc.collect()
        gc.freeze()

    @bentoml.api
    def rank(self, request: Request, /) -> Answer:
        """Score the candidates for the user, best first."""
        if len(request.candidates) > self.max_candidates:
            raise InvalidArgument(
                f"candidates: {len(request.candidates)} ids; at most {self.max_candidates} in one request"
            )
        context = request.context or {}
        if unknown := sorted(context.keys() - self.scorer.context_names):
            raise InvalidArgument(f"context: unknown {unknown}; known are {sorted(self.scorer.context_names)}")
        user = UserRow()
        if self.scorer.needs_profile or (self.scorer.needs_history and request.history is None):
            user = self.online.read(request.user_id)
        history = user.history if request.history is None else request.history
        try:
            scores = self.scorer.rank(request.user_id, request.candidates, history, user.profile, context)
        except ValueError as error:
            raise InvalidArgument(f"context: {error}") from None
        order = torch.argsort(scores, descending=True, stable=True)[: request.k]
        degraded = [user.reason] if user.reason else []
        if not self.scorer.known(request.candidates).all():
            degraded.append("unknown_items")
        if self.scorer.context_names - context.keys():
            degraded.append("missing_context")
        return Answer(
            version=self.version,
            items=[request.candidates[i] for i in order.tolist()],
            scores=scores[order].tolist(),
            degraded=degraded,
        )


class Refuse:
    """Refuses bodies that are not JSON (415) or are too large (413) before anything parses them.

    BentoML itself would accept forms, and answer a broken form with a 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json":
            status, error = HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "content-type: send application/json"
            return await JSONResponse({"error": error}, status)(scope, receive, send)
        body, more = b"", True
        while more and len(body) <= MAX_BODY_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            status, error = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: more than {MAX_BODY_BYTES} bytes"
            return await JSONResponse({"error": error}, status, {"connection": "close"})(scope, receive, send)

        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            message, whole = whole, None
            return await receive() if message is None else message

        return await self.app(scope, replay, send)


CtrRanker.add_asgi_middleware(Refuse)  # type: ignore[attr-defined]
