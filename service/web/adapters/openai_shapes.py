"""The models, files and batches of OpenAI's API, as they are sent and answered."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ListedModel(BaseModel):
    """A model."""

    id: str = Field(description="The name that `?model_name=` takes.")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds: when this process began to serve the model.")
    owned_by: Literal["modalkit"] = "modalkit"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"] = "batch"
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    """A file that was removed."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class NewBatch(BaseModel):
    """What a batch is made of."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str
    endpoint: Literal["/sync/predict", "/v1/embeddings"]
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] | None = None


class BatchError(BaseModel):
    """What is wrong with a line of the input file, or with the batch."""

    code: str
    line: int | None = None
    message: str


class BatchErrors(BaseModel):
    """What is wrong with the input file, or the batch."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """How many requests a batch has."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchObject(NewBatch):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    status: Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"] = (
        "in_progress"
    )
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    completed_at: int | None = None
    expired_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()


class FileList(BaseModel):
    """Files, the newest first."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool = False


class BatchList(BaseModel):
    """Batches, the newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    has_more: bool = False
