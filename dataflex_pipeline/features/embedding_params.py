"""Parameters of embeddings and of what is found with them: neighbours, density. Each is declared once."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from dataflex_pipeline import api
from dataflex_pipeline.data.texts import Text
from dataflex_pipeline.embed.embedders import Chosen
from dataflex_pipeline.embed.settings import DEFAULT_MODEL, Dtype
from dataflex_pipeline.features.params import by_name
from dataflex_pipeline.neighbours.cells import Search


class TextLimits(api.Params):
    """How much of a text an embedding model is given, and how many texts at once."""

    batch_size: int = Field(
        32,
        ge=1,
        exclude=True,
        description="texts per forward pass, of sentence-transformers; changes no result",
    )
    max_length: int = Field(
        2048, ge=2, description="tokens kept of a text, and never more than the model takes"
    )


class EmbedderMemory(api.Params):
    """What an embedder takes of a device."""

    embed_gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, exclude=True, description="share of a GPU's memory that vLLM embeds with"
    )


class VectorParams(TextLimits, EmbedderMemory):
    """Parameters of the embeddings feature: of one side, the pool or the target."""

    model: str | None = Field(
        DEFAULT_MODEL,
        description="folder or hub name of the embedding model; null: the run's own, by method: model",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    method: Chosen = Field("auto", description="what runs it")
    dtype: Dtype | Literal["auto"] = Field("auto", description="number format that the model runs in")
    text: Text = Field("conversation", description="what of a row is embedded")
    prompt: str = Field("", description="put before every text")
    vectors: str | None = Field(None, description="vectors made elsewhere: path.npy or path.parquet")

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.model is None and self.method != "model":
            raise ValueError("the run's own model embeds by method: model")
        return self

    @property
    def by_run_model(self) -> bool:
        """Whether the run's own model embeds, so that the vectors depend on the round."""
        return self.model is None and self.vectors is None

    @property
    def feature(self) -> str:
        """The feature that these are parameters of."""
        return "model_embeddings" if self.by_run_model else "embeddings"


class EmbeddingParams(TextLimits, EmbedderMemory):
    """Parameters of every method on embeddings.

    What the feature's fingerprint already holds (by content, where it is a file) is left out of a dump, and
    so is what changes no result.
    """

    embed_model: str | None = Field(
        None,
        description=f"folder or hub name of the embedding model; null: {DEFAULT_MODEL}, or by embed_method: "
        "model the run's own model",
    )
    model_name: str | None = Field(None, exclude=True, description="another name of embed_model")
    embed_revision: str | None = Field(
        None, exclude=True, description="branch, tag or commit of a hub embed_model"
    )
    embed_method: Chosen = Field(
        "auto",
        exclude=True,
        description="what runs it: vllm, sentence-transformers, or auto (the first that is installed; "
        "without a GPU sentence-transformers comes before vllm); model: the last hidden states of a causal "
        "language model, averaged with weights that rise along the row",
    )
    embed_dtype: Dtype | Literal["auto"] = Field(
        "auto",
        description="number format that the model runs in; auto: that of bf16, float32 on a CPU; the run's "
        "own runs as bf16 says",
    )
    embed_text: Text | None = Field(
        None,
        description="what of a row is embedded: conversation, prompt, response, chat_template; null: "
        "conversation, by the run's own model chat_template",
    )
    query_text: Text | None = Field(None, description="the same of a target row; null: as embed_text says")
    embed_prompt: str = Field("", description="put before every text of the pool")
    query_prompt: str = Field(
        "", description="put before every text of the target, such as an instruction to the model"
    )
    embeddings: str | None = Field(
        None, exclude=True, description="vectors of the pool made elsewhere: path.npy or path.parquet"
    )
    query_embeddings: str | None = Field(
        None, exclude=True, description="vectors of the target made elsewhere"
    )
    candidate_path: str | None = Field(None, exclude=True, description="another name of dataset")
    query_path: str | None = Field(None, exclude=True, description="another name of eval_dataset")
    query: Literal["first_100"] | None = Field(
        None, exclude=True, description="first_100: the first 100 rows of the pool are the target"
    )

    @property
    def chosen_model(self) -> str | None:
        """The embedding model; None for the run's own."""
        return self.embed_model or (None if self.embed_method == "model" else DEFAULT_MODEL)

    @property
    def chosen_text(self) -> Text:
        """What of a row is embedded."""
        return self.embed_text or ("conversation" if self.chosen_model else "chat_template")

    @field_serializer("embed_model")
    def _model_by_name(self, value: str | None) -> str | None:
        """A folder counts by its content, in the feature: moved elsewhere it is the same model."""
        return by_name(self.chosen_model)

    @field_serializer("embed_text")
    def _text_chosen(self, value: Text | None) -> Text:
        return self.chosen_text

    @field_validator("embed_method", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        return "sentence-transformers" if value == "sentence-transformer" else value

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, values: Any) -> Any:
        """Let ``model_name`` stand for ``embed_model``; two different names are a mistake."""
        if not isinstance(values, dict) or values.get("model_name") is None:
            return values
        name, model = values["model_name"], values.get("embed_model")
        if model not in (None, DEFAULT_MODEL, name):
            raise ValueError(f"model_name ({name}) and embed_model ({model}) are one setting; give one")
        return values | {"embed_model": name}

    def pool_vectors(self) -> VectorParams:
        """Return the parameters of the pool's embeddings."""
        return self._vectors(text=self.chosen_text, prompt=self.embed_prompt, vectors=self.embeddings)

    def target_vectors(self) -> VectorParams:
        """Return the parameters of the target's embeddings."""
        text = self.query_text or self.chosen_text
        return self._vectors(text=text, prompt=self.query_prompt, vectors=self.query_embeddings)

    def pool_need(self) -> api.Need:
        """Return what asks for the pool's embeddings."""
        params = self.pool_vectors()
        return api.Need(params.feature, "pool", params=params)

    def target_need(self) -> api.Need:
        """Return what asks for the target's embeddings."""
        params = self.target_vectors()
        return api.Need(params.feature, "target", params=params)

    def _vectors(self, **own: Any) -> VectorParams:
        return VectorParams(
            **self.part(TextLimits),
            **self.part(EmbedderMemory),
            model=self.chosen_model,
            revision=self.embed_revision,
            method=self.embed_method,
            dtype=self.embed_dtype,
            **own,
        )


class SearchParams(api.Params):
    """How near rows are searched."""

    search: Search = Field("auto", description="exact, ivf (cells), or auto: exact where that is affordable")
    nlist: int | None = Field(
        None, ge=1, description="cells of an ivf search; null: the square root of the rows"
    )
    nprobe: int | None = Field(
        None, ge=1, description="cells looked into; null: four times what is wanted, at least 16"
    )


class NearestParams(SearchParams):
    """The same, with how many rows are near a target row."""

    max_K: int = Field(5000, ge=1, description="nearest pool rows per target row")  # noqa: N815


class NeighbourParams(NearestParams):
    """Parameters of the neighbours feature."""

    pool: VectorParams = Field(
        default_factory=VectorParams, exclude=True, description="parameters of the pool's embeddings"
    )
    target: VectorParams = Field(
        default_factory=VectorParams, exclude=True, description="parameters of the target's embeddings"
    )

    @property
    def by_run_model(self) -> bool:
        """Whether the run's own model embeds one of the two."""
        return self.pool.by_run_model or self.target.by_run_model


class KernelParams(api.Params):
    """The kernel that a row's density is summed with."""

    kde_K: int = Field(1000, ge=1, description="nearest rows that a row's density is summed over")  # noqa: N815
    sigma: float = Field(
        0.75,
        ge=0,
        allow_inf_nan=False,
        description="width of the density kernel, of distances from 0 to 2; 0: every density is 1",
    )
