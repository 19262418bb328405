"""The tasks of transformers that need no class of one's own, over HTTP and in the documentation of it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from modalkit.service.web import create_app
from tests.support.http_server import serving
from tests.support.tiny_models import EXACT, save_model

pytestmark = pytest.mark.anyio


def entry(pipeline: str, folder: Path, **keys: Any) -> dict[str, Any]:
    return {"pipeline": f"modalkit.pipelines.{pipeline}", "model_path": str(folder), **EXACT, **keys}


async def test_every_task_is_served_and_documented(tmp_path: Path) -> None:
    classifier = BertForSequenceClassification
    # Without a label for no entity: whatever the weights are, some are found.
    entities: dict[str, Any] = {"id2label": {0: "B-PER", 1: "B-LOC"}, "label2id": {"B-PER": 0, "B-LOC": 1}}
    inference: dict[str, Any] = {"id2label": {0: "entailment", 1: "other"}, "label2id": {"entailment": 0, "other": 1}}
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}, "batch_config": {"calibration": {"enabled": False}}},
        model_settings={
            "common": {"device": "cpu"},
            "model_entries": {
                "embed": entry("embedding:EmbeddingPipeline", save_model(BertModel, tmp_path / "e")),
                "rerank": entry("rerank:RerankPipeline", save_model(classifier, tmp_path / "r", num_labels=1)),
                "tag": entry(
                    "token_classification:TokenClassificationPipeline",
                    save_model(BertForTokenClassification, tmp_path / "t", **entities),
                ),
                "zero": entry(
                    "zero_shot:ZeroShotPipeline", save_model(classifier, tmp_path / "z", **inference), labels=["a", "b"]
                ),
            },
        },
    )
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as client:

            async def predict(model: str, **item: Any) -> dict[str, Any]:
                response = await client.post(f"/sync/predict?model_name={model}", json=item)
                assert response.status_code == 200, response.text
                body: dict[str, Any] = response.json()
                return body

            text = "Zürich and Genève are in Switzerland"
            assert len((await predict("embed", text=text))["embedding"]) == 32
            assert 0 <= (await predict("rerank", query="Where?", text=text))["score"] <= 1
            found = (await predict("tag", text=text))["entities"]
            assert found
            assert all(text[one["start"] : one["end"]] == one["word"] for one in found)
            assert sorted((await predict("zero", text=text))["labels"]) == ["a", "b"]
            assert sum((await predict("zero", text=text, labels=["x", "y", "z"]))["scores"]) == pytest.approx(1)

            schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
            assert schemas["EmbeddingResponse"]["properties"]["embedding"]["items"] == {"type": "number"}
            for name in ("RerankResponse", "Entity", "TokenClassificationResponse", "ZeroShotResponse"):
                own = schemas[name]["properties"].keys() - {"status", "error", "meta"}
                assert all("description" in schemas[name]["properties"][key] for key in own), name
