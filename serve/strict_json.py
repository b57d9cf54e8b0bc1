"""JSON without the parts that readers disagree about: what is checked is what the caller meant."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from geneformer_ray.errors import InputError

__all__ = ["StrictJsonRoute", "parse_json"]


class StrictJsonRoute(APIRoute):
    """A route whose body is parsed by :func:`parse_json`: ``APIRouter(route_class=StrictJsonRoute)``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Make the handler; the body is parsed before it, so that errors keep their words."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.body_field is not None and kind == "application/json":
                request = _StrictRequest(request.scope, request.receive)
                await request.json()
            return await handler(request)

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


def parse_json(body: bytes) -> Any:
    """Parse a request's body.

    Raises
    ------
    InputError
        If it is no JSON: NaN and Infinity are none; or if an object names something twice, of which each reader takes
        another; or if it is nested deeper, or holds a longer number, than any request needs.
    """
    try:
        return json.loads(body, object_pairs_hook=_once_each, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise InputError("body", f"no JSON ({error.msg}, character {error.pos})", "a JSON object") from None
    except UnicodeDecodeError:
        raise InputError("body", "no UTF-8", "a JSON object") from None
    except RecursionError:
        raise InputError("body", "JSON of many levels", "a JSON object as /docs shows it") from None
    except InputError:
        raise
    except ValueError:  # Python reads no whole number of more than a few thousand digits
        raise InputError(
            "body", "a number of thousands of digits", "a JSON object with numbers of this world"
        ) from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError("body", f"{twice!r} twice in one object", "each name once")
    return found


def _no_number(name: str) -> Any:
    raise InputError("body", f"{name}, which is no JSON", "finite numbers")
