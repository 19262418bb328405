"""The identifiers by which a queue or a receiver tells a message that comes a second time."""

import hashlib
import re

_SAFE = re.compile(r"[A-Za-z0-9_-]{1,128}")


def safe_id(job_id: str) -> str:
    """A job's id as every queue and header can carry it; an id of other characters is replaced by its SHA-256."""
    return job_id if _SAFE.fullmatch(job_id) else id_of_text(job_id)


def id_of_text(text: str) -> str:
    """The id for a message that comes without its job's: the SHA-256 of its text, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
