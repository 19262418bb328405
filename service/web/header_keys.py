"""Keys in the form in which a request's header carries them."""


def header_bytes(key: str) -> bytes:
    """The bytes that a header with this key has, without the white space around it, which headers cannot carry.

    A file or a secret often ends with a line break. Raises ValueError, which does not show the key, for what cannot be
    sent.
    """
    key = key.strip()
    if not key:
        raise ValueError("it is empty")
    if not key.isprintable():
        raise ValueError("it has a line break or another control character inside, which no header can carry")
    return key.encode()
