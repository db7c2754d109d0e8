"""What every shipped feature holds that no server, judge or generator is needed for."""

from typing import ClassVar

import numpy as np
import pytest
from tiny_training import make_config, make_model, make_pool, train

from dataflex_pipeline.testing.feature import FeatureContract
from dataflex_pipeline.testing.tables import random_numbers


@pytest.fixture(scope="module")
def model(one_thread, tmp_path_factory):
    """The tiny model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A checkpoint of it after a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "run", [0], make_config(model), make_pool(folder / "pool"))
    return folder / "run" / "round-00" / "checkpoint"


class OnModel(FeatureContract):
    """A feature computed with the tiny model."""

    @pytest.fixture(autouse=True)
    def _model(self, model):
        self.settings = {"model_name_or_path": str(model), "finetuning_type": "full"}


class TestLosses(OnModel):
    feature = "losses"


class TestLossesOfTheTarget(OnModel):
    feature = "losses"
    split = "target"


class TestResponseLosses(OnModel):
    feature = "response_losses"

    @pytest.fixture(autouse=True)
    def _template(self, _model):
        self.settings = {**self.settings, "template": "plain"}


class TestGradients(OnModel):
    feature = "gradients"
    split = "target"
    params: ClassVar = {"proj_dim": 16, "dtype": "float32"}
    others: ClassVar = {
        "side": "adam",
        "adam_update": "less",
        "proj_dim": 8,
        "projection": "rademacher",
        "seed": 1,
        "dtype": "float16",
    }


class TestGradientsOfAdam(TestGradients):
    """The pool's side: updates of a checkpoint after a few steps."""

    split = "pool"
    params: ClassVar = {"proj_dim": 16, "dtype": "float32", "side": "adam"}
    others: ClassVar = {**TestGradients.others, "side": "sgd"}

    @pytest.fixture(autouse=True)
    def _trained(self, model, checkpoint):
        self.settings, self.trained = make_config(model).model_dump(), checkpoint

    def round(self):
        return 0

    def checkpoint(self):
        return self.trained


class TestTargetDirections(OnModel):
    feature = "target_directions"
    split = "target"
    others: ClassVar = {"per": "row", "policy": {"rewards": {"reward_model_backend": "metric"}}}


class TestTargetDirectionsOfRows(TestTargetDirections):
    params: ClassVar = {"per": "row"}
    others: ClassVar = {**TestTargetDirections.others, "per": "group"}


DRAWN = {"generator": "transformers", "mc_samples": 2, "max_new_tokens": 3, "generation_batch_size": 4}
OTHERWISE_DRAWN = {
    "mc_samples": 3,
    "max_new_tokens": 4,
    "generation_temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "max_prompt_length": 2,
    "generator": "vllm",
    "generation_batch_size": 5,
    "generation_gpu_memory_utilization": 0.5,
    "generation_tensor_parallel_size": 2,
    "seed": 1,
}
METRIC = {"reward_model_backend": "metric", "reward_backend_params": {"metric": {"name": "chrf"}}}
ANOTHER_BACKEND = {"reward_model": {"max_length": 9}}  # of a backend that is not asked


class TestGenerations(OnModel):
    feature = "generations"
    split = "target"
    params = DRAWN
    others = OTHERWISE_DRAWN

    def batches(self):
        """Prompts that are drawn for together, which no setting of the configuration says."""
        return [{}, {"score_batch_tokens": 1}]


class TestRewards(OnModel):
    feature = "rewards"
    split = "target"
    params: ClassVar = {**METRIC, "generations": DRAWN}
    others: ClassVar = {
        "reward_model_backend": "api",
        "reward_backend_params": METRIC["reward_backend_params"] | ANOTHER_BACKEND,
        "reference": True,
        "generations": {**DRAWN, "seed": 1},
    }


@pytest.mark.slow
class TestPolicyGradients(OnModel):
    feature = "policy_gradients"
    split = "target"
    params: ClassVar = {"proj_dim": 16, "dtype": "float32", "generations": DRAWN, "rewards": METRIC}
    others: ClassVar = {
        "proj_dim": 8,
        "projection": "rademacher",
        "dtype": "float16",
        "seed": 1,
        "policy": "topk",
        "kept_samples": 1,
        "baseline": "none",
        "token_mean": True,
        "generations": {**DRAWN, "seed": 1},
        "rewards": {"reward_model_backend": "metric"},
    }


class TestInfluence(OnModel):
    feature = "influence"
    params: ClassVar = {"side": "sgd"}
    others: ClassVar = {
        "side": "adam",
        "adam_update": "less",
        "directions": {"per": "row"},
        "more": ({"per": "row"},),
    }


class TestInfluenceOfAdam(TestGradientsOfAdam):
    """The pool's side: updates of a checkpoint after a few steps."""

    feature = "influence"
    params: ClassVar = {"side": "adam"}
    others: ClassVar = {**TestInfluence.others, "side": "sgd"}


class OnVectors(FeatureContract):
    """A feature computed from vectors made elsewhere."""

    @pytest.fixture(autouse=True)
    def _vectors(self, tmp_path):
        rng = random_numbers("vectors")
        self.files = {}
        for split, n_rows in [*self.rows.items(), ("other", self.rows["pool"])]:
            self.files[split] = tmp_path / f"{split}.npy"
            vectors = rng.standard_normal((n_rows, 6)).astype(np.float32)
            np.save(self.files[split], vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        self.vectors = {split: {"vectors": str(file)} for split, file in self.files.items()}
        self.set_params()

    def set_params(self):
        """Set what the parameters are once the files are there."""


class TestEmbeddings(OnVectors):
    feature = "embeddings"
    idle: ClassVar = frozenset(
        {"model", "revision", "method", "batch_size", "max_length", "dtype", "text", "prompt"}
        | {"embed_gpu_memory_utilization"}
    )

    def set_params(self):
        self.params, self.others = self.vectors["pool"], self.vectors["other"]


class TestModelEmbeddings(OnModel):
    feature = "model_embeddings"
    params: ClassVar = {"model": None, "method": "model", "text": "chat_template"}
    others: ClassVar = {"text": "response", "max_length": 5, "prompt": "query: "}
    idle: ClassVar = frozenset(
        {"model", "method", "revision", "dtype", "vectors", "batch_size", "embed_gpu_memory_utilization"}
    )


class TestWords(FeatureContract):
    feature = "words"
    others: ClassVar = {"text": "response"}


class TestNeighbours(OnVectors):
    feature = "neighbours"
    split = "target"

    def set_params(self):
        self.params = {"max_K": 5, "pool": self.vectors["pool"], "target": self.vectors["target"]}
        self.others = {
            "max_K": 4,
            "search": "ivf",
            "nlist": 2,
            "nprobe": 3,
            "pool": self.vectors["other"],
            "target": self.vectors["pool"],
        }


class TestNeighboursThroughCells(TestNeighbours):
    def set_params(self):
        super().set_params()
        self.params = {**self.params, "search": "ivf", "nlist": 3, "nprobe": 2}
        self.others = {**self.others, "search": "exact"}


class TestDensity(OnVectors):
    feature = "density"

    def set_params(self):
        near = {"max_K": 5, "pool": self.vectors["pool"], "target": self.vectors["target"]}
        self.params = {"sigma": 1.5, "kde_K": 6, "gaussian": True, "neighbours": near}
        self.others = {
            "sigma": 1.0,
            "kde_K": 7,
            "gaussian": False,
            "search": "ivf",
            "nlist": 2,
            "nprobe": 3,
            "neighbours": {**near, "max_K": 4},
        }


class TestDensityThroughCells(TestDensity):
    def set_params(self):
        super().set_params()
        self.params = {**self.params, "search": "ivf", "nlist": 3, "nprobe": 2}
        self.others = {**self.others, "search": "exact"}
