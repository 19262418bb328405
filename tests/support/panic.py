"""An error that is no `Exception`, of a library that is not written in Python."""


class Panic(BaseException):
    """As libraries written in Rust raise it (`pyo3_runtime.PanicException`)."""
