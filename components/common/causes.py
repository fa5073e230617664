"""Why a step failed, as far as it decides whether to try it again. The exit codes are those of sysexits.h."""

from __future__ import annotations

BROKEN, TRY_AGAIN = 65, 75  # exit codes: EX_DATAERR and EX_TEMPFAIL
PASSING = (ConnectionError, TimeoutError, BlockingIOError, MemoryError)
# Of libraries that this file must not import: redis, botocore, aiohttp, httpx, torch
PASSING_NAMES = {
    "ConnectionError", "TimeoutError", "EndpointConnectionError", "ClientConnectorError", "ConnectError",
    "OutOfMemoryError",
}  # fmt: skip


class BusyError(ValueError):
    """Data, code and settings may all be right: something that passes is in the way. The message says what."""


class StepError(Exception):
    """A step failed, and nobody knows whether it would fail again. The message is the reason that it gave."""


def passes(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is of a kind that passes: no connection, a busy device."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, (BusyError, *PASSING)) or kinds & PASSING_NAMES:
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_code(error: Exception) -> int:
    """TRY_AGAIN, BROKEN for an error of data, code or settings, or 1 where nobody knows."""
    return TRY_AGAIN if passes(error) else BROKEN if isinstance(error, ValueError) else 1
