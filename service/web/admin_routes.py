"""The routes for operators: the state of the models, reloads, and changes of their limits."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from pydantic import RootModel

from modalkit.service.gateway import Gateway, ModelAdministration, find_model
from modalkit.service.settings import BatchConfig
from modalkit.service.web.answers import JSON, PROBLEM_ANSWERS, ModelView
from modalkit.service.web.bodies import read_as
from modalkit.service.web.job_routes import refuse_unknown_query
from modalkit.service.web.problems import ProblemError

CANNOT_CHANGE = (
    "the models run in other processes, which cannot be told to reload; deploy again, and new containers take over"
)
NEEDS_KEY = (
    "this needs an API key, and none is configured: set app_settings.auth_config, or send the process the signal "
    "SIGHUP, which reloads its models"
)


def _limits_schema() -> dict[str, Any]:
    """The schema of limits. It has no defaults, because a limit that is left out stays as it is."""
    fields: dict[str, dict[str, Any]] = BatchConfig.model_json_schema()["properties"]
    del fields["calibration"]
    properties = {
        name: {key: value for key, value in field.items() if key != "default"} for name, field in fields.items()
    }
    example = {"max_batch_size": 64}
    return {"type": "object", "properties": properties, "additionalProperties": False, "examples": [example]}


ModelName = Annotated[str, Path(description="A model's name in the configuration.")]


def make_admin_router(gateway: Gateway, dependencies: Sequence[Any]) -> APIRouter:
    """The routes over the models of `gateway`. Without `dependencies`, which check the key, each request is refused."""
    router = APIRouter(
        prefix="/admin",
        tags=["administration"],
        dependencies=[*(dependencies or [Depends(_refuse)]), Depends(refuse_unknown_query)],
        responses=PROBLEM_ANSWERS,
    )

    def administration() -> ModelAdministration:
        if gateway.administration is None:
            raise ProblemError(HTTPStatus.NOT_IMPLEMENTED, CANNOT_CHANGE)
        return gateway.administration

    def view(name: str) -> ModelView:
        model = find_model(gateway.models, name)
        limits = None if gateway.administration is None else gateway.administration.limits(name)
        return ModelView(
            name=model.name,
            readiness=model.readiness,
            problem=model.problem,
            engine=None if model.engine_choice is None else str(model.engine_choice),
            batch_config=None if limits is None else limits.model_dump(mode="json", exclude={"calibration"}),
        )

    @router.get("/models", summary="The models, with the limits of their batches")
    async def list_models() -> list[ModelView]:
        return [view(name) for name in gateway.models]

    @router.get("/models/{name:path}", summary="One model")
    async def get_model(name: ModelName) -> ModelView:
        return view(name)

    @router.post(
        "/models/{name:path}/reload",
        summary="Load a model anew beside the one that runs, and replace it",
        description="By the configuration as it is now. The answer comes when the new one is warm and runs all batches "
        "from then on; no request fails for it. With 409 the old one goes on, and the detail says why.",
    )
    async def reload_model(name: ModelName) -> ModelView:
        await administration().reload(name)
        return view(name)

    @router.patch(
        "/models/{name:path}",
        summary="Change the limits of a model's batches",
        description="Keys of `batch_config`, except `calibration`; they hold until the model is reloaded or started.",
        openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": _limits_schema()}}}},
    )
    async def change_limits(request: Request, name: ModelName) -> ModelView:
        limits = await read_as(RootModel[dict[str, Any]], request)
        await administration().set_limits(name, limits.root)
        return view(name)

    return router


async def _refuse() -> None:
    raise ProblemError(HTTPStatus.FORBIDDEN, NEEDS_KEY)
