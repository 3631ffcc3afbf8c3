"""Configuration of the tokenizer. The fields of the published `config.json` keep their names and meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN

LENGTH_MODES = ("exact", "published")

LATENT_KINDS = ("unified", "vae")

PUBLISHED_FLOOR = 1e-7
"""Smallest magnitude in a mel band of the published acoustic layer, full scale 1."""

SEMANTIC_KINDS = ("dasheng", "whisper", "wavlm", "hubert", "wav2vec2")


_WHOLE = (
    *("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_intermediate_size"),
    *("istft_n_fft", "istft_hop", "upsample_tokens", "n_mels_patch", "hop_length"),
)


class DashengTokenizerConfig(PreTrainedConfig):
    """Sizes of the semantic encoder, the acoustic layer and the decoder. The defaults are the published full size.

    Args:
        embed_dim: width D of the latent; of the native Dasheng encoder too. None takes the semantic encoder's width.
            With `latent_kind="vae"` the width around the bottleneck; None takes that of the decoder.
        depth: transformer blocks of the native Dasheng encoder.
        num_heads: attention heads of the native Dasheng encoder.
        decoder_embed_dim: width of the Vocos decoder.
        decoder_depth: ConvNeXt blocks of the decoder.
        decoder_intermediate_size: hidden width inside a ConvNeXt block.
        istft_n_fft: inverse STFT size in samples.
        istft_hop: inverse STFT hop in samples.
        istft_block_dc: make every frame of the inverse STFT sum to zero. The latents know no offset, and a decoder left
            to itself makes one up, most of all in music. Off in the published layout.
        upsample_tokens: decoder frames a token; istft_hop · upsample_tokens must be 640.
        n_mels_patch: mel bands of the acoustic layer's input.
        log_mel_floor: smallest magnitude in these bands, full scale 1; what lies below is taken for it before the
            logarithm. 1e-7 is that of the published layout. White noise at -90 dBFS has 3e-3 around 4 kHz; a computed
            layer (`acoustic_start`) then spends no power on the depth of bands that hold nothing.
        hop_length: hop of the mel front ends in samples (not the token's 640; that is `model.hop_length`).
        semantic_encoder: the frozen encoder: `{"kind": "dasheng"}`, or `{"kind": K, "config": {…}}` with K one of
            whisper, wavlm, hubert, wav2vec2 and the transformers configuration of that model. More keys: see
            `semantic_adapters`.
        normalize_semantic: bring every dimension of the frozen features to zero mean and unit variance, by statistics
            of the training data that are kept with the weights. Off in the published layout.
        length_mode: "exact" gives ceil(n/640) tokens and sample-exact audio; "published" repeats the published token
            count ⌊(⌊n/160⌋ + 1)/4⌋ and its mirrored right end.
        provenance: free-form facts shown by `dasheng-tokenizer info` (training data, licence, date).
        latent_kind: "unified" is the tokenizer; "vae" the baseline without a semantic encoder, see `vae`. Its
            `semantic_encoder` is empty; `depth` and `num_heads` have no meaning for it.
        vae_dim: width of the VAE's latent. 128 is that of EzAudio's (arXiv 2409.10819).
        vae_depth: ConvNeXt blocks of the VAE's encoder, of the decoder's intermediate size.

    Raises:
        ConfigurationError: sizes that contradict each other, or an unknown kind.
    """

    model_type = "dashengtokenizer"

    def __init__(
        self,
        embed_dim: int | None = None,
        depth: int = 32,
        num_heads: int = 16,
        decoder_embed_dim: int = 1280,
        decoder_depth: int = 12,
        decoder_intermediate_size: int = 5120,
        istft_n_fft: int = 1280,
        istft_hop: int = 320,
        istft_block_dc: bool = False,
        upsample_tokens: int = 2,
        n_mels_patch: int = 128,
        log_mel_floor: float = PUBLISHED_FLOOR,
        hop_length: int = 160,
        semantic_encoder: dict[str, Any] | None = None,
        normalize_semantic: bool = False,
        length_mode: str = "exact",
        provenance: dict[str, Any] | None = None,
        latent_kind: str = "unified",
        vae_dim: int = 128,
        vae_depth: int = 4,
        **kwargs: Any,
    ) -> None:
        self.latent_kind = latent_kind
        for name, group in (("semantic_encoder", semantic_encoder), ("provenance", provenance)):
            if group is not None and not isinstance(group, Mapping):
                raise ConfigurationError(f"{name} is {group!r}; it must be a mapping")
        default = {} if self.is_vae else {"kind": "dasheng"}
        self.semantic_encoder: dict[str, Any] = dict(semantic_encoder or default)
        self.embed_dim = (embed_dim or decoder_embed_dim) if self.is_vae else self._width(embed_dim)
        self.depth = depth
        self.num_heads = num_heads
        self.decoder_embed_dim = decoder_embed_dim
        self.decoder_depth = decoder_depth
        self.decoder_intermediate_size = decoder_intermediate_size
        self.istft_n_fft = istft_n_fft
        self.istft_hop = istft_hop
        self.istft_block_dc = istft_block_dc
        self.upsample_tokens = upsample_tokens
        self.n_mels_patch = n_mels_patch
        self.log_mel_floor = log_mel_floor
        self.hop_length = hop_length
        self.normalize_semantic = normalize_semantic
        self.length_mode = length_mode
        self.vae_dim = vae_dim
        self.vae_depth = vae_depth
        self.provenance = dict(provenance or {})
        self._check()
        super().__init__(**kwargs)

    @property
    def is_vae(self) -> bool:
        """Whether this is the VAE baseline."""
        return self.latent_kind == "vae"

    def _width(self, embed_dim: int | None) -> int:
        kind = self.semantic_encoder.get("kind")
        if kind not in SEMANTIC_KINDS:
            raise ConfigurationError(
                f"unknown semantic encoder kind {kind!r}; choose one of {', '.join(SEMANTIC_KINDS)}"
            )
        if kind == "dasheng":
            return 1280 if embed_dim is None else embed_dim
        inner = self.semantic_encoder.get("config") or {}
        if not isinstance(inner, Mapping):
            raise ConfigurationError(f"the config of the {kind} encoder is {inner!r}; it must be a mapping")
        width = inner.get("d_model") or inner.get("hidden_size")
        if width is None:
            raise ConfigurationError(
                f"semantic_encoder of kind {kind!r} needs 'config', the transformers configuration of the encoder, "
                "with its width (d_model or hidden_size)"
            )
        if not isinstance(width, int):
            raise ConfigurationError(f"the width of the {kind} encoder is {width!r}; it must be a whole number")
        if embed_dim is not None and embed_dim != width:
            raise ConfigurationError(
                f"embed_dim {embed_dim} differs from the width {width} of the {kind} encoder; acoustic features are "
                "added to semantic ones, so leave embed_dim out or make them equal"
            )
        return width

    def _check(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name.endswith("depth") else 1):
                raise ConfigurationError(f"{name} {value!r} must be a whole number above 0")
        floor = self.log_mel_floor
        if not isinstance(floor, int | float) or isinstance(floor, bool) or not 0 < floor < math.inf:
            raise ConfigurationError(f"log_mel_floor {floor!r} must be a magnitude above 0, such as 1e-7")
        if self.length_mode not in LENGTH_MODES:
            raise ConfigurationError(f"length_mode {self.length_mode!r} is not one of {', '.join(LENGTH_MODES)}")
        if self.istft_hop * self.upsample_tokens != SAMPLES_PER_TOKEN or self.hop_length * 4 != SAMPLES_PER_TOKEN:
            raise ConfigurationError(
                f"istft_hop · upsample_tokens ({self.istft_hop} · {self.upsample_tokens}) and 4 · hop_length "
                f"(4 · {self.hop_length}) must both be {SAMPLES_PER_TOKEN} samples, one token of 40 ms"
            )
        if self.istft_n_fft % self.istft_hop or (self.istft_n_fft - self.istft_hop) % 2:
            raise ConfigurationError(f"istft_n_fft {self.istft_n_fft} must be a multiple of istft_hop {self.istft_hop}")
        if self.latent_kind not in LATENT_KINDS:
            raise ConfigurationError(f"latent_kind {self.latent_kind!r} is not one of {', '.join(LATENT_KINDS)}")
        if self.is_vae:
            self._check_vae()
        elif self.semantic_encoder["kind"] == "dasheng" and self.embed_dim % self.num_heads:
            raise ConfigurationError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")

    def _check_vae(self) -> None:
        if self.semantic_encoder or self.normalize_semantic:
            raise ConfigurationError(
                'latent_kind "vae" has no semantic encoder: leave out semantic_encoder (and semantic_weights, in a '
                "recipe) and normalize_semantic"
            )
        if self.length_mode != "exact":
            raise ConfigurationError('latent_kind "vae" is not published: it needs length_mode "exact"')
        if self.vae_dim < 1 or self.vae_depth < 0 or self.embed_dim < 1:
            raise ConfigurationError(
                f"vae_dim {self.vae_dim} and embed_dim {self.embed_dim} must be at least 1, vae_depth {self.vae_depth} "
                "at least 0"
            )


AutoConfig.register(DashengTokenizerConfig.model_type, DashengTokenizerConfig, exist_ok=True)
