"""What methods on embeddings let their users set, and the needs that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from dataflex_pipeline import api
from dataflex_pipeline.data.texts import Text
from dataflex_pipeline.embed.embedders import Chosen
from dataflex_pipeline.embed.settings import DEFAULT_MODEL, Dtype


class EmbeddingParams(api.Params):
    """Parameters of every method on embeddings; such a method's Params inherit from this class.

    What the feature's fingerprint already holds (by content, where it is a file) is left out of a dump, and
    so is what changes no result.
    """

    embed_model: str = Field(DEFAULT_MODEL, description="folder or hub name of the embedding model")
    model_name: str | None = Field(None, exclude=True, description="another name of embed_model")
    embed_revision: str | None = Field(
        None, exclude=True, description="branch, tag or commit of a hub embed_model"
    )
    embed_method: Chosen = Field(
        "auto",
        exclude=True,
        description="what runs it: vllm, sentence-transformers, or auto (the first that is installed; "
        "without a GPU sentence-transformers comes before vllm)",
    )
    batch_size: int = Field(32, ge=1, exclude=True, description="texts per forward pass; changes no result")
    max_length: int = Field(
        2048, ge=2, description="tokens kept of a text, and never more than the model takes"
    )
    embed_dtype: Dtype = Field("float32", description="number format that the model runs in")
    embed_text: Text = Field(
        "conversation", description="what of a row is embedded: conversation, prompt, response, chat_template"
    )
    query_text: Text | None = Field(
        None, description="the same of a target row; by default as embed_text says"
    )
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

    @field_serializer("embed_model")
    def _by_name(self, value: str) -> str:
        """A folder counts by its content, in the feature: moved elsewhere it is the same model."""
        return Path(value).name if Path(value).expanduser().is_dir() else value

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
        name, model = values["model_name"], values.get("embed_model", DEFAULT_MODEL)
        if model not in (DEFAULT_MODEL, name):
            raise ValueError(f"model_name ({name}) and embed_model ({model}) are one setting; give one")
        return values | {"embed_model": name}


def embedding_needs(params: EmbeddingParams) -> dict[str, api.Need]:
    """Return what a method with these parameters needs: embeddings of the pool and of the target."""
    shared = {
        "model": params.embed_model,
        "revision": params.embed_revision,
        "method": params.embed_method,
        "batch_size": params.batch_size,
        "max_length": params.max_length,
        "dtype": params.embed_dtype,
    }
    pool = {"text": params.embed_text, "prompt": params.embed_prompt, "vectors": params.embeddings}
    target = {
        "text": params.query_text or params.embed_text,
        "prompt": params.query_prompt,
        "vectors": params.query_embeddings,
    }
    return {
        "pool": api.Need("embeddings", "pool", None, shared | pool),
        "target": api.Need("embeddings", "target", None, shared | target),
    }
