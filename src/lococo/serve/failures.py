"""What a client is told when something goes wrong, in OpenAI's shape."""

from typing import Any

from starlette.exceptions import HTTPException


class ApiError(HTTPException):
    """An answer other than the one asked for.

    Args:
        status: Of HTTP.
        message: What was expected, what came, what to do.
        code: For programs.
        param: The field of the request that is wrong.
        retry_after: Seconds to wait before another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return it as OpenAI's clients read it."""
        error = {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def reply_headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def _kind(status: int) -> str:
    known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def internal() -> ApiError:
    """Return what a client is told about a fault of ours; the log has the rest."""
    return ApiError(500, "the server failed at this request; its log says more", code="internal_error")


def draining() -> ApiError:
    """Return what a client is told while the server is shutting down."""
    return ApiError(503, "the server is shutting down; try another or again later", code="draining", retry_after=5)


def index_busy() -> ApiError:
    """Return what a client is told while other servers keep the index of contexts locked."""
    message = "the index of contexts cannot be used now; try again later"
    return ApiError(503, message, code="index_busy", retry_after=1)


def too_long(limit: int) -> ApiError:
    """Return what a client is told about a prompt or document of more tokens than the server reads."""
    return ApiError(
        400, f"the text has more than the {limit:,} tokens that this server reads", code="context_length_exceeded"
    )
