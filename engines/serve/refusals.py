"""Errors as an answer: in OpenAI's form, with our three parts."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, MissingError, StarError, UsageError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(StarError):
    """A request that is answered with the HTTP `status`: `param` is the field that is wrong, `code` a word
    for programs. `retry_after_s` says when to come again, and `allow` which methods a path takes."""

    def __init__(
        self,
        status: int,
        what: str,
        *,
        where: str,
        fix: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ):
        super().__init__(what, where=where, fix=fix)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s, self.allow = retry_after_s, allow


def refusal(error: BaseException) -> Refused:
    """What a client is told of `error`: nothing of the inside of a bug of ours."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (UsageError, InputError)):
        name = error.where.partition(":")[0]
        return Refused(
            400,
            error.what,
            where=error.where,
            fix=error.fix,
            param=name if name.isidentifier() else None,
            code="invalid_value",
        )
    if isinstance(error, MissingError):
        return Refused(503, error.what, where=error.where, fix=error.fix, code="unavailable")
    if isinstance(error, StarError):
        return Refused(500, error.what, where=error.where, fix=error.fix, code="model_error")
    return Refused(
        500,
        "The server failed",
        where=f"server: {type(error).__name__}; its log has the rest",
        fix="report it, with the lines of the log",
        code="internal_error",
    )


def body_from_refusal(error: Refused) -> dict[str, Any]:
    """The error object that OpenAI's clients expect; `what`, `where` and `fix` are ours."""
    parts = {name: _plain(getattr(error, name)) for name in ("what", "where", "fix")}
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": "{what} ({where}). {fix}".format(**parts),
            "type": kind,
            "param": None if error.param is None else _plain(error.param),
            "code": error.code,
            **parts,
        }
    }


def _plain(text: str) -> str:
    """`text` on one line and in valid Unicode."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()
