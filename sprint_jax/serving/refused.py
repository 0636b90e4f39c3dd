"""The refusal that a client gets instead of an image, and its response."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class Refused(Exception):
    """A request is turned away.

    status: the HTTP status, 400 or above. sentence: what is wrong, with its name and value, and the
    remedy; it never names a path of the server. retry_after: seconds until another try, or None.
    headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    def response(self) -> JSONResponse:
        """Return {"error": sentence} with the status."""
        content = {"error": self.sentence}
        return JSONResponse(content, status_code=self.status, headers=self.headers)
