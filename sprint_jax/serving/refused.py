"""What a request that is not answered with a picture is told."""


class Refused(Exception):
    """A request that is turned away.

    status: of HTTP, 400 and above. sentence: for whoever asked: what is wrong, with its name and value, and the
    remedy; it never names a path of the server. retry_after: seconds after which to try again, or None.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after
