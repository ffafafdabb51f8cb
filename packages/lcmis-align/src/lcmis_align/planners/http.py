"""A planner behind an OpenAI-compatible HTTP interface: a hosted model, or a local server such as vLLM or llama.cpp."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from lcmis_align.errors import PlannerError
from lcmis_align.planners.base import AskingPlanner

AGAIN = (408, 429, 500, 502, 503, 504)
"""Status codes that may be different the next time."""


class OpenAICompatiblePlanner(AskingPlanner):
    """Asks `POST {base_url}/chat/completions`.

    base_url: up to and including "/v1". model: as the server names it. api_key_env: environment variable that holds the
    key, read at each call and kept nowhere; a local server needs none. timeout: seconds for one answer.
    json_mode: ask the server for a JSON object (not all know it). session: an `httpx.Client` to use.
    max_retries: further tries, after a wrong answer as well as after a status 429 or 5xx or a timeout.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        session: httpx.Client | None = None,
        json_mode: bool = False,
        cache: str | Path | None = None,
        max_retries: int = 3,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        super().__init__(model, cache=cache, max_retries=max_retries)
        self.base_url, self.api_key_env, self.timeout = base_url.rstrip("/"), api_key_env, timeout
        self.json_mode, self._session, self._sleep = json_mode, session or httpx.Client(), sleep

    def __repr__(self) -> str:
        return f"OpenAICompatiblePlanner({self.base_url!r}, {self.model!r})"

    def complete(self, messages: list[dict[str, str]]) -> str:
        """Raises PlannerError with the status and the beginning of the body, or when the server cannot be reached."""
        body: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": 0}
        if self.json_mode:
            body["response_format"] = {"type": "json_object"}
        wrong = ""
        for attempt in range(self.max_retries + 1):
            wait = 0.5 * 2**attempt
            try:
                response = self._session.post(
                    f"{self.base_url}/chat/completions", json=body, headers=self._headers(), timeout=self.timeout
                )
            except httpx.TimeoutException:
                wrong = f"no answer within {self.timeout:g} s"
            except httpx.HTTPError as error:
                raise PlannerError(
                    f"{self.base_url} cannot be reached ({self._clean(str(error))})", hint="check the address"
                ) from error
            else:
                if response.status_code == 200:
                    return self._content(response)
                wrong = f"status {response.status_code}: {self._clean(response.text)[:200]}"
                if response.status_code not in AGAIN:
                    raise PlannerError(f"{self.base_url} answered with {wrong}", raw=self._clean(response.text))
                after = response.headers.get("retry-after", "")
                wait = min(float(after), 60.0) if after.replace(".", "", 1).isdigit() else wait
            if attempt < self.max_retries:
                self._sleep(wait)
        raise PlannerError(f"{self.base_url} failed {self.max_retries + 1} times, at last with {wrong}")

    def _content(self, response: httpx.Response) -> str:
        try:
            return str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            text = self._clean(response.text)
            raise PlannerError(f"{self.base_url} answered with no chat completion: {text[:200]!r}", raw=text) from error

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _clean(self, text: str) -> str:
        # Servers have been seen to repeat a wrong key in their answer.
        key = os.environ.get(self.api_key_env)
        return text.replace(key, "***") if key else text
