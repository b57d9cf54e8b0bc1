"""One connection to a service: requests that wait while it is busy, and errors that say what it says."""

from __future__ import annotations

import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx

from geneformer_ray.errors import GeneformerRayError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

__all__ = ["Connection", "ServiceError"]

BUSY = (429, 503)
LONGEST_PAUSE = 60.0  # seconds; a service that asks for more is not waited for


class ServiceError(GeneformerRayError):
    """The service refused a request, or did not answer.

    Parameters
    ----------
    status
        The HTTP status; None where nobody answered.
    field, got, takes
        What was wrong, as the service says it.
    """

    def __init__(self, status: int | None, field: str, got: str, takes: str) -> None:
        super().__init__(f"{field}: got {got}; takes {takes}")
        self.status, self.field, self.got, self.takes = status, field, got, takes

    def __reduce__(self) -> tuple[type[ServiceError], tuple[int | None, str, str, str]]:
        return type(self), (self.status, self.field, self.got, self.takes)


class Connection:
    """Sends requests to one service.

    Parameters
    ----------
    url, api_key, timeout, retries
        As :class:`geneformer_ray.client.Client` takes them.
    at_once
        Requests that are under way together.
    """

    def __init__(self, url: str, api_key: str | None, *, timeout: float, retries: int, at_once: int) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._retries, self._at_once = retries, at_once

    def close(self) -> None:
        """Close what it holds open."""
        self._http.close()

    def ask_each(self, path: str, bodies: Iterator[tuple[list[int], bytes]]) -> Iterator[tuple[list[int], Any]]:
        """Send several requests at once, and give their answers in order; never more bodies in memory than needed."""
        waiting: deque[tuple[list[int], Future[Any]]] = deque()
        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                for places, body in bodies:
                    waiting.append((places, pool.submit(self.ask, "POST", path, body)))
                    if len(waiting) >= 2 * self._at_once:
                        done, answer = waiting.popleft()
                        yield done, answer.result()
                while waiting:
                    done, answer = waiting.popleft()
                    yield done, answer.result()
            finally:
                # After a refusal the others are not sent any more.
                pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Send one request and give what the answer's JSON holds.

        Raises
        ------
        ServiceError
            If the service refuses it, is busy for too long, or does not answer.
        """
        headers = {} if body is None else {"Content-Type": "application/json"}
        for attempt in range(self._retries + 1):
            try:
                response = self._http.request(method, path, content=body, headers=headers)
            except httpx.TransportError as error:
                got = f"no answer ({str(error) or type(error).__name__})"
                raise ServiceError(None, "url", got, "the address of a running service") from error
            if response.is_success:
                return response.json()
            pause = _pause(response, attempt)
            if response.status_code not in BUSY or attempt == self._retries or pause > LONGEST_PAUSE:
                raise _refusal(response)
            time.sleep(pause)
        raise AssertionError("unreachable")


def _pause(response: httpx.Response, attempt: int) -> float:
    """Say how long to wait: what the service asks for, else longer each time; never quite the same for two clients."""
    asked = response.headers.get("Retry-After", "")
    pause = float(asked) if asked.isdigit() else min(0.5 * 2.0**attempt, 10.0)
    return pause * random.uniform(1.0, 1.25)


def _refusal(response: httpx.Response) -> ServiceError:
    try:
        error = response.json()["error"]
        return ServiceError(response.status_code, str(error["field"]), str(error["got"]), str(error["takes"]))
    except (ValueError, KeyError, TypeError):
        # A proxy in front has its own way of saying so.
        got = f"status {response.status_code}: {response.text[:200]}"
        return ServiceError(response.status_code, "service", got, "another try later")
