import torch
from pydantic import BaseModel
from torch import nn

from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel
from modalkit.pipelines import EngineSettings, load_engine


class Reading(BaseModel):
    values: list[float]


class Mood(InferenceOutputModel):
    mood: str


class MoodPipeline(InferencePipeline):
    input_model, output_model = Reading, Mood

    def __init__(self, *arguments, engine="auto", dtype="auto", **entry):
        super().__init__(*arguments, **entry)
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
        samples = [{"input": torch.randn(count, 8)} for count in (2, 8, 32, 64)]
        self.engine = load_engine(module, samples, EngineSettings(engine=engine, dtype=dtype))
        self.engine_choice = self.engine.choice

    def preprocess(self, input_list):
        return {"input": torch.tensor([reading.values for reading in input_list])}

    def predict(self, input_list, preprocessed_data):
        return self.engine(**preprocessed_data)

    def postprocess(self, input_list, raw_output):
        return [Mood(mood="calm" if row[0] > row[1] else "wild") for row in raw_output["output"].tolist()]


if __name__ == "__main__":
    pipeline = MoodPipeline("moods", "models", {}, engine="torch", dtype="float32")
    print(pipeline.engine_choice)
    print([answer.mood for answer in pipeline.run_inference([Reading(values=[0.5] * 8), Reading(values=[-2] * 8)])])
