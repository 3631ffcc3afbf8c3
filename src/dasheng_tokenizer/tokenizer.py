"""The tokenizer: frozen semantic encoder + one linear acoustic layer → unified embedding → Vocos decoder.

audio (B,S) ─┬─ semantic encoder (frozen) ───────────► semantic (B,T,D) ─┐
             └─ log-mel ─ one linear layer ─ norm ───► acoustic (B,T,D) ─+─► unified (B,T,D) ─► decoder ─► audio

With `latent_kind="vae"` the encoder is that of `vae`, and a linear layer brings its latent to the upsampler's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils.generic import ModelOutput

from dasheng_tokenizer.checkpoints import load_strictly
from dasheng_tokenizer.configuration import PUBLISHED_FLOOR, DashengTokenizerConfig
from dasheng_tokenizer.decoder import VocosDecoder
from dasheng_tokenizer.errors import AudioError, ConfigurationError, LatentError
from dasheng_tokenizer.injection import InjectionEncoder
from dasheng_tokenizer.input_checks import check_audio, check_latents
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN, SemanticEncoder, token_mask
from dasheng_tokenizer.spectral import (
    CONTEXT,
    SAMPLES_PER_TOKEN,
    SAMPLING_RATE,
    InverseSTFT,
    with_context,
    with_reflected_context,
)
from dasheng_tokenizer.vae import VAEEncoder

if TYPE_CHECKING:
    from dasheng_tokenizer.streaming import TokenizerStream
    from dasheng_tokenizer.token_file import AudioTokens


HALF_PRECISION = {
    name: dtype for dtype in (torch.float16, torch.bfloat16) for name in (dtype, str(dtype), str(dtype).split(".")[1])
}
"""How a caller may ask for one."""


@dataclass
class DashengTokenizerOutput(ModelOutput):
    """What the model returns; B clips, S samples, T tokens, D latent width.

    Attributes:
        audio: (B, S) reconstruction, float32, zero past each clip's end.
        unified: (B, T, D) latent: semantic + acoustic, or the posterior's mean in a VAE.
        semantic: (B, T, D) output of the frozen encoder, normalised if the configuration says so; None in a VAE.
        acoustic: (B, T, D) output of the acoustic layer; None in a VAE.
        token_mask: (B, T) bool, true for tokens that hold signal.
    """

    audio: Tensor | None = None
    unified: Tensor | None = None
    semantic: Tensor | None = None
    acoustic: Tensor | None = None
    token_mask: Tensor | None = None


class DashengTokenizerModel(PreTrainedModel):
    """Continuous audio tokenizer: 16 kHz mono audio to 25 vectors a second, and back.

    The semantic encoder is frozen: its parameters need no gradient and it stays in eval mode.
    """

    config_class = DashengTokenizerConfig
    config: DashengTokenizerConfig
    base_model_prefix = ""
    main_input_name = "audio"
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock", "ConvNeXtBlock"]
    # Modules that also protect themselves against `.half()`; this list protects them in from_pretrained(dtype=…).
    _keep_in_fp32_modules_strict = [
        *("spectrogram", "mel_scale", "init_bn", "patch_embed", "semantic_norm"),
        *("norm", "norm1", "norm2", "layer_norm", "self_attn_layer_norm", "final_layer_norm", "head"),
    ]

    sampling_rate = SAMPLING_RATE
    hop_length = SAMPLES_PER_TOKEN
    frame_rate = SAMPLING_RATE / SAMPLES_PER_TOKEN
    margin = CONTEXT

    def __init__(self, config: DashengTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder: InjectionEncoder | VAEEncoder
        self.encoder = VAEEncoder(config) if config.is_vae else InjectionEncoder(config)
        # The identity has no weights: the published layout stays as it is.
        self.latent_projection = nn.Linear(config.vae_dim, config.embed_dim) if config.is_vae else nn.Identity()
        step = config.upsample_tokens
        self.upsampler = nn.ConvTranspose1d(config.embed_dim, config.embed_dim, kernel_size=step, stride=step)
        self.decoder = VocosDecoder(config)
        self._hash_cache: tuple[Any, str] = (None, "")
        self.post_init()
        self.freeze_semantic_encoder()
        self.train(self.training)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # one positional argument, which may be left out
        cls, pretrained_model_name_or_path: Any = None, **kwargs: Any
    ) -> Any:
        """The embedded default (no argument), a folder, or a hub name; keywords as in transformers.

        Raises:
            CheckpointError: not found, damaged, or with missing, foreign or misshapen weights.
        """
        half = {name: kwargs[name] for name in ("dtype", "torch_dtype") if kwargs.get(name) in HALF_PRECISION}
        if not half or kwargs.keys() & {"device_map", "output_loading_info", "quantization_config"}:
            return load_strictly(super().from_pretrained, pretrained_model_name_or_path, kwargs)
        # Cast after it was identified, so that its tokens are known to be of the checkpoint.
        exact = {name: value for name, value in kwargs.items() if name not in half}
        model = load_strictly(super().from_pretrained, pretrained_model_name_or_path, exact)
        model.weights_hash()
        return model.to(HALF_PRECISION[next(iter(half.values()))])

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """A folder that `from_pretrained` and the Auto classes of transformers load; arguments as in transformers."""
        from dasheng_tokenizer.feature_extraction import (
            DashengTokenizerFeatureExtractor,
        )  # which may import this module

        super().save_pretrained(save_directory, *args, **kwargs)
        DashengTokenizerFeatureExtractor().save_pretrained(save_directory)

    # ------------------------------------------------------------------ public: tensors at 16 kHz

    def forward(self, audio: Tensor, padding_mask: Tensor | None = None) -> DashengTokenizerOutput:
        """Encode and decode.

        Args:
            audio: (B, S) samples at 16 kHz, full scale 1, S ≥ 1.
            padding_mask: (B, S) bool or 0/1, true for real samples, padding only on the right. None: all are real.

        Returns:
            DashengTokenizerOutput; `.audio` has S samples (640·T in `length_mode="published"`).

        Raises:
            AudioError: wrong rank, no samples, NaN or infinity.
            MaskError: wrong shape, holes, padding on the left, or a clip without a real sample.
        """
        unified, semantic, acoustic, tokens = self._encode_parts(audio, padding_mask)  # (B, T, D) or None
        mask = token_mask(tokens, unified.shape[1])  # (B, T)
        exact = self.config.length_mode == "exact"
        reconstruction = self._decode_masked(unified, tokens)[:, : audio.shape[-1] if exact else None]
        if exact and padding_mask is not None:
            reconstruction = reconstruction * padding_mask.to(reconstruction)
        return DashengTokenizerOutput(reconstruction, unified, semantic, acoustic, mask)

    def encode(self, audio: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, S) samples at 16 kHz → (B, T, D) unified embedding, T = ⌈S/640⌉; arguments and errors as `forward`.

        Gradients reach the acoustic layer; wrap in `torch.no_grad()` where none are wanted. A VAE gives the mean of its
        posterior.
        """
        return self._encode_parts(audio, padding_mask)[0]

    def decode(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """(B, T, D) → (B, num_samples) float32 samples at 16 kHz; 640·T of them when None.

        Raises:
            LatentError: wrong rank or width, no token, NaN or infinity, or `num_samples` outside 1 … 640·T.
        """
        check_latents(latents, self.latent_dim)
        full = latents.shape[1] * SAMPLES_PER_TOKEN
        if num_samples is not None and not 1 <= num_samples <= full:
            raise LatentError(f"num_samples {num_samples} is outside 1…{full}, what {latents.shape[1]} tokens hold")
        return self._decode(latents)[:, :num_samples]  # (B, num_samples)

    def num_tokens(self, num_samples: int | Tensor) -> Any:
        """Tokens of a clip of `num_samples` at 16 kHz under the configured length mode."""
        if self.config.length_mode == "published":
            return (num_samples // self.config.hop_length + 1) // FRAMES_PER_TOKEN
        return -(-num_samples // SAMPLES_PER_TOKEN)

    # ------------------------------------------------------------------ public: audio of any rate and channels

    def compress(self, audio: np.ndarray | Tensor, sampling_rate: int) -> AudioTokens:
        """Audio of any rate (8–192 kHz), any number of channels and any length → tokens that remember them.

        Args:
            audio: (samples,) or (channels, samples), floating point at full scale 1 or integers at theirs.
            sampling_rate: of `audio`, in Hz.

        Raises:
            AudioError: empty, NaN or infinite, wrong rank, rate out of range.
        """
        from dasheng_tokenizer.chunking import compress

        return compress(self, audio, sampling_rate)

    def decompress(self, tokens: AudioTokens, force: bool = False) -> Tensor:
        """Tokens → (channels, samples) float32 at the rate, length and channel count of the original.

        Raises:
            ModelMismatchError: the tokens were made by a model with other weights, unless `force`.
        """
        from dasheng_tokenizer.chunking import decompress

        return decompress(self, tokens, force)

    def streaming(
        self,
        sampling_rate: int = SAMPLING_RATE,
        num_channels: int = 1,
        level: float | None = None,
        reconstruct: bool = True,
    ) -> TokenizerStream:
        """Live audio: a context manager that takes blocks of any size and gives tokens and reconstruction in time.

        They equal those of `compress` and `decompress` of the whole. How long they take: `streaming.streaming_latency`.

        Args:
            sampling_rate: of the audio, in Hz, 8000 to 192000.
            num_channels: each is a stream of its own.
            level: loudest mel power of the whole recording, where the encoder's floor hangs on it (Dasheng); None: that
                of a full-scale tone.
            reconstruct: also decode.

        Raises:
            AudioError: rate out of range or no channel; ConfigurationError: `length_mode` is not "exact".
        """
        from dasheng_tokenizer.streaming import FULL_SCALE_LEVEL, TokenizerStream

        return TokenizerStream(
            self, sampling_rate, num_channels, FULL_SCALE_LEVEL if level is None else level, reconstruct
        )

    def set_encoder_window(self, seconds: float) -> None:
        """How many seconds of audio see each other in the semantic encoder, from now on.

        Short windows make live tokens come sooner; the tokens are others than those of the default, and less good.

        Raises:
            ConfigurationError: not a multiple of 0.04 s, longer than the encoder allows, or a VAE, which has none.
        """
        self.semantic_encoder.set_window(seconds)

    def compile_layers(self, **options: Any) -> DashengTokenizerModel:
        """Compiles the layers of semantic encoder and decoder; returns the model.

        Layers of a kind share their code, so that each kind is compiled once, at its first call, for every length; a
        batch of several clips and one with padding count as further kinds. Worth it on GPUs; a CPU gains nothing
        (docs/speed.md).

        Args:
            options: of `torch.compile`, such as `mode="reduce-overhead"` (CUDA graphs) or `backend`.
        """
        encoder = self.encoder.convnext if isinstance(self.encoder, VAEEncoder) else self.semantic_encoder.layers()
        for layer in (*encoder, *self.decoder.backbone.convnext):
            layer.compile(**{"dynamic": True, **options})
        return self

    # ------------------------------------------------------------------ public: training and bookkeeping

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the matrix products and of the latents; spectra, norms and the head stay in float32."""
        return self.upsampler.weight.dtype

    @property
    def latent_dim(self) -> int:
        """Width D of a token."""
        return self.config.vae_dim if self.config.is_vae else self.config.embed_dim

    @property
    def injection(self) -> InjectionEncoder:
        """Semantic and acoustic branch.

        Raises:
            ConfigurationError: a VAE, which has neither; so do all that ask for one of them.
        """
        if isinstance(self.encoder, VAEEncoder):
            raise ConfigurationError(
                'this model has latent_kind "vae" and so no semantic or acoustic embedding; use its latent, the '
                "`unified` of the output"
            )
        return self.encoder

    @property
    def semantic_encoder(self) -> SemanticEncoder:
        """The frozen encoder."""
        return self.injection.model

    def encode_acoustic(self, context_audio: Tensor) -> Tensor:
        """Acoustic branch of context audio (see `spectral`): (B, 512 + 640·N + 512) → (B, N, D), with gradients."""
        return self.injection.acoustic(context_audio)

    @torch.no_grad()
    def encode_features(self, context_audio: Tensor) -> Tensor:
        """Frozen encoder alone on context audio whose tokens are all real: (B, 512 + 640·N + 512) → (B, N, D)."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        count = torch.full((len(context_audio),), length, device=context_audio.device)
        return self.semantic_encoder(context_audio, count)

    def encode_semantic(self, context_audio: Tensor) -> Tensor:
        """Semantic branch of context audio, `encode_features` normalised as configured; same shapes."""
        return self.injection.semantic_norm(self.encode_features(context_audio))

    def train(self, mode: bool = True) -> DashengTokenizerModel:
        """Training mode for all but the semantic encoder, which stays as it was trained."""
        super().train(mode)
        if not self.config.is_vae:
            self.semantic_encoder.eval()
        return self

    def freeze_semantic_encoder(self) -> None:
        """Its parameters need no gradient, where there is one."""
        if not self.config.is_vae:
            self.semantic_encoder.requires_grad_(False)

    def freeze_acoustic_layer(self) -> None:
        """Its parameters need no gradient either, so that training leaves the latents as they are.

        Raises:
            ConfigurationError: a VAE, which has none.
        """
        for layer in (self.injection.patch_embed, self.injection.norm):
            layer.requires_grad_(False)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all but the semantic encoder."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def weights_hash(self) -> str:
        """SHA-256 of all weights as float32, in hex, and of the floor of the log-mel spectrogram if it is an own one.

        A model that is moved to another device or cast to another precision afterwards keeps it, since its latents stay
        those of the same model; `from_pretrained(dtype=…)` asks before it casts.
        """
        key = self._hash_key()
        if self._hash_cache[0] != key:  # hashing takes seconds at full size and callers ask once per file
            digest = hashlib.sha256()
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            if self.config.log_mel_floor != PUBLISHED_FLOOR:  # no weight, and yet latents hang on it
                digest.update(f"log_mel_floor {self.config.log_mel_floor!r}".encode())
            self._hash_cache = (key, digest.hexdigest())
        return self._hash_cache[1]

    def to_empty(self, *args: Any, **kwargs: Any) -> DashengTokenizerModel:
        """As in torch; what it was is forgotten."""
        self._hash_cache = (None, "")
        return super().to_empty(*args, **kwargs)

    # ------------------------------------------------------------------ inside

    def _hash_key(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a weight does; those made in inference mode have no version and are taken for constant."""
        tensors = self.state_dict().values()
        return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> DashengTokenizerModel:
        """Moves and casts: see `weights_hash`."""
        key, known = self._hash_cache
        same = key is not None and key == self._hash_key()
        super()._apply(fn, recurse)
        if same:
            self._hash_cache = (self._hash_key(), known)
        return self

    def _encode_parts(
        self, audio: Tensor, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Latent (B, T, D), its semantic and acoustic parts (None in a VAE), zero past each end; token counts (B,)."""
        samples = check_audio(audio, padding_mask)  # (B,)
        if self.config.length_mode == "published":
            return self._encode_published(audio, samples)
        if padding_mask is not None:
            audio = audio.masked_fill(~padding_mask.bool(), 0.0)
        tokens = self.num_tokens(samples)  # (B,)
        context_audio = with_context(audio.float(), self.num_tokens(audio.shape[-1]))
        if isinstance(self.encoder, VAEEncoder):
            return self.encoder(context_audio, tokens).mean, None, None, tokens
        return *self._encode_context(context_audio, tokens), tokens

    def _encode_context(
        self, context_audio: Tensor, tokens: Tensor, level: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unified, semantic and acoustic embeddings, each (B, T, D), zero past each clip's end."""
        encoder = self.injection
        with torch.no_grad():
            semantic = encoder.semantic_norm(encoder.model(context_audio, tokens, level))  # (B, T, D)
        acoustic = encoder.acoustic(context_audio)  # (B, T, D)
        hidden = ~token_mask(tokens, acoustic.shape[1])[..., None]  # (B, T, 1)
        semantic, acoustic = semantic.masked_fill(hidden, 0.0), acoustic.masked_fill(hidden, 0.0)
        # Summed before they are rounded to the model's type.
        return (semantic + acoustic).to(self.dtype), semantic.to(self.dtype), acoustic.to(self.dtype)

    def _encode_published(self, audio: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The published count of tokens and mirrored right end; each clip on its own, which mends its mask faults."""
        shortest = int(samples.min())
        if shortest <= CONTEXT:
            raise AudioError(
                f'a clip of {shortest} samples is too short for length_mode="published", which mirrors {CONTEXT} '
                'samples at each end; use length_mode="exact"'
            )
        parts = []
        for clip, count in zip(audio, samples.tolist(), strict=True):
            tokens = torch.tensor([self.num_tokens(count)], device=audio.device)
            context = with_reflected_context(clip[None, :count].float(), int(tokens))
            # The published floor looks at every frame, also at those too few for a last token.
            frames = torch.tensor([1 + count // self.config.hop_length], device=audio.device)
            level = self.semantic_encoder.level(context, frames)
            context = context[:, : int(tokens) * SAMPLES_PER_TOKEN + 2 * CONTEXT]
            parts.append(self._encode_context(context, tokens, level))
        unified, semantic, acoustic = (
            nn.utils.rnn.pad_sequence([clip[0] for clip in branch], batch_first=True)
            for branch in zip(*parts, strict=True)
        )
        return unified, semantic, acoustic, self.num_tokens(samples)

    def _decode(self, latents: Tensor) -> Tensor:
        x = self.latent_projection(latents.to(self.dtype)).transpose(1, 2)  # (B, width, T)
        return self.decoder(self.upsampler(x).transpose(1, 2))  # (B, 640·T)

    def _decode_masked(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Decodes clips of different length as if each were alone: zero latents are not the edge of a tensor."""
        if torch.compiler.is_compiling() or bool((tokens == latents.shape[1]).all()):
            return self._decode(latents)
        full = latents.shape[1] * SAMPLES_PER_TOKEN
        clips = [self._decode(z[None, :count])[0] for z, count in zip(latents, tokens.tolist(), strict=True)]
        return torch.stack([F.pad(clip, (0, full - len(clip))) for clip in clips])  # (B, 640·T)

    def _init_weights(self, module: nn.Module) -> None:
        """Also fills what no checkpoint holds, after creation on the meta device."""
        super()._init_weights(module)
        if isinstance(module, InverseSTFT):
            module.reset_basis()


AutoModel.register(DashengTokenizerConfig, DashengTokenizerModel, exist_ok=True)
