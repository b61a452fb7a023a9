"""Text that leaves the process (parameters, tags, messages of errors) without the secrets that the process holds."""

from __future__ import annotations

import os
import re

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(r"(SECRET|PASSWORD|PASSWD|TOKEN|SECRET_ACCESS_KEY|API_KEY|PRIVATE_KEY|CREDENTIALS)$")
_SHORTEST = 6  # a shorter value is more likely a switch ("true", "1") than a secret, and would blank out plain words

_USERINFO = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@]+@")
_SIGNED = re.compile(
    r"(?i)\b(x-amz-signature|x-amz-credential|x-amz-security-token|secret_key|access_token)=[^&\s\"']+"
)


def redact(text: str) -> str:
    """`text` without the values of secret environment variables, without user:password in URLs, without signatures.

    An environment variable is secret when its name ends like AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
    MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN or RAY_AUTH_TOKEN.
    """
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):  # longest first: one secret may contain another
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _SIGNED.sub(rf"\1={HIDDEN}", text)
