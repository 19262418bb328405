"""The errors of `pipelines`."""


class PipelineError(Exception):
    """The root of the errors of `pipelines`."""


class ModelLoadError(PipelineError):
    """Raised when a pipeline cannot be built: a wrong setting, unusable model files, or a missing device."""


class BatchTooLargeError(PipelineError):
    """Raised by a pipeline when a batch does not fit into memory, but smaller batches of its items may."""


class EngineError(ModelLoadError):
    """Raised when the engine that was asked for cannot run a model: a missing package, or a format it cannot use."""


class RejectItem(PipelineError):  # noqa: N818  # it says what to do, and is no fault of the program
    """Raised by a pipeline for an item that it refuses, or returned by `postprocess` in the item's place.

    Only the caller of that item gets it: an answer with the status 422 and the `reason`, or a failed job. It is not
    logged. Raised by `preprocess` for a batch of several, `index` is the item's place in the list: then `preprocess`
    runs again for the others, and no other stage runs twice. Without an index the batch is split until the item is
    found.
    """

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        super().__init__(reason or "the pipeline gave no reason")
        self.index = index


class MissingFieldError(RejectItem, AttributeError):
    """Raised where a pipeline without an `input_model` reads a field that an item does not have."""


def describe(error: Exception) -> str:
    """An error in one line: its message, after the name of its class unless it is an `EngineError`."""
    return str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
