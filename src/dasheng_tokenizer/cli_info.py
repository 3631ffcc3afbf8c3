"""The command `info`: what a model or a token file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dasheng_tokenizer.cli_paths import TOKEN_SUFFIX
from dasheng_tokenizer.errors import one_line


def info(name: str | None) -> str:
    """Describe a token file (a name that ends in .tokens.safetensors, or any safetensors file) or a model.

    Raises:
        TokenFileError, CheckpointError: it cannot be read.
    """
    if name is not None and (name.endswith(TOKEN_SUFFIX) or (name.endswith(".safetensors") and Path(name).is_file())):
        return _lines(_token_file(name))
    return _lines(_model(name))


def _token_file(path: str) -> dict[str, Any]:
    from dasheng_tokenizer.token_file import AudioTokens

    header = AudioTokens.info(path)
    return {
        "token file": path,
        "audio": f"{header['duration']:.3f} s, {header['num_samples']} samples at {header['sampling_rate']} Hz, "
        f"{header['num_channels']} channels",
        "tokens": f"{header['num_tokens']} per channel, {header['latent_dim']} wide, {header['frame_rate']} a second",
        "number type": header["dtype"],
        "made by": header["model_name"],
        "weights hash": header["weights_hash"],
    }


def _model(name: str | None) -> dict[str, Any]:
    from dasheng_tokenizer.audio import MAX_RATE, MIN_RATE
    from dasheng_tokenizer.checkpoints import embedded_default
    from dasheng_tokenizer.chunking import model_name
    from dasheng_tokenizer.cli_audio import load_model

    model = load_model(name, "cpu", None)
    config = model.config
    frozen = 0 if config.is_vae else sum(parameter.numel() for parameter in model.semantic_encoder.parameters())
    trained = sum(parameter.numel() for _, parameter in model.trainable_parameters())
    facts: dict[str, Any] = {
        "model": model_name(model),
        "loaded from": name or f"{embedded_default()} (the embedded default)",
        "parameters": f"{(frozen + trained) / 1e6:.2f} M: semantic encoder, frozen {frozen / 1e6:.2f} M; "
        f"{'VAE' if config.is_vae else 'acoustic layer'} and decoder {trained / 1e6:.2f} M",
        "latent": "VAE, the mean of the posterior" if config.is_vae else "unified, semantic + acoustic",
        "semantic encoder": config.semantic_encoder.get("kind", "none"),
        "decoder": f"{config.decoder_depth} blocks, width {config.decoder_embed_dim}, "
        f"intermediate {config.decoder_intermediate_size}",
        "sampling rate": f"{model.sampling_rate} Hz inside; {MIN_RATE} to {MAX_RATE} Hz in and out",
        "tokens": f"{model.frame_rate:g} a second, {model.latent_dim} wide, {model.hop_length} samples each",
        "length mode": config.length_mode,
        "weights hash": model.weights_hash(),
    }
    facts |= {one_line(f"provenance: {key}"): value for key, value in config.provenance.items()}
    return facts


def _lines(facts: dict[str, Any]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{key:<{width}}  {one_line(str(value))}" for key, value in facts.items())
