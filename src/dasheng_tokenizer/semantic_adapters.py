"""Other people's frozen encoders, from transformers, as semantic encoders at 25 Hz.

Each takes frames of 20 ms and averages neighbours to tokens of 40 ms. Their windows are independent, so long audio
needs constant memory. Keys of `config.semantic_encoder`:

    kind            whisper, wavlm, hubert or wav2vec2
    config          the transformers configuration of the encoder, as a dict
    window_seconds  tokens that see each other; 30 s by default, Whisper's own limit
    silence_seconds Whisper only: silence that follows each window, as far as the largest has room; 2 s by default
    normalize       wave encoders only: zero mean and unit variance per window, as their feature extractors do
                    (`do_normalize` in the published preprocessor_config.json); true by default
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN, SemanticEncoder, encoder_mask, token_mask
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN, Float32LayerNorm, MelSpectrogram

TOKENS_PER_SECOND = 25
FRAMES_AVERAGED = 2
"""20 ms encoder frames a 40 ms token; all four encoder families stride by 320 samples."""


def average_frames(frames: Tensor) -> Tensor:
    """Neighbouring frames to tokens: (B, 2·N, D) → (B, N, D)."""
    return frames.unflatten(1, (-1, FRAMES_AVERAGED)).mean(2)


class WhisperSemanticEncoder(SemanticEncoder):
    """Whisper's encoder on windows of up to 30 s, with some silence after short clips instead of padding to 30 s.

    The transformers modules and weights are used as they are; only their forward is written again, because the original
    insists on 30 s of input (twenty times the work for a clip of a second and a half) and takes no mask. Without any
    silence the features of short clips move far from those that Whisper was trained to give.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        from dasheng_tokenizer.whisper_layer import WhisperLayer

        config = WhisperConfig(**settings["config"])
        config._attn_implementation = "sdpa"
        self.output_dim = config.d_model
        self.window_tokens = self.max_window_tokens = _tokens(settings, "window_seconds", 30.0)
        if self.window_tokens * FRAMES_AVERAGED > config.max_source_positions:
            raise ConfigurationError(
                f"window_seconds {settings.get('window_seconds')} is more than the encoder's "
                f"{config.max_source_positions} positions of 20 ms"
            )
        self.silence_tokens = _tokens(settings, "silence_seconds", 2.0)
        # Slaney mel scale and norm, 400-point window: the published WhisperFeatureExtractor.
        self.front_end = MelSpectrogram(400, config.num_mel_bins, power=2.0, mel_scale="slaney", norm="slaney")
        self.encoder = WhisperEncoder(config)
        self.encoder.layers = nn.ModuleList(WhisperLayer(config) for _ in self.encoder.layers)
        self.encoder.layer_norm = Float32LayerNorm(config.d_model)

    def layers(self) -> Iterable[nn.Module]:
        """See `SemanticEncoder.layers`."""
        return self.encoder.layers

    def log_mel(self, context_audio: Tensor, num_tokens: Tensor) -> Tensor:
        """Whisper's input features, 8 decades below the loudest of each clip: (B, bands, 4·N); zero past the end."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        log = self.front_end(context_audio, FRAMES_PER_TOKEN * length).clamp(min=1e-10).log10()  # (B, bands, 4N)
        past = ~token_mask(FRAMES_PER_TOKEN * num_tokens, log.shape[-1])[:, None]  # (B, 1, 4N)
        loudest = log.masked_fill(past, -10.0).amax((1, 2), keepdim=True)  # (B, 1, 1)
        return ((torch.maximum(log, loudest - 8.0) + 4.0) / 4.0).masked_fill(past, 0.0)

    def encode_window(self, context_audio: Tensor, num_tokens: Tensor, level: Tensor | None) -> Tensor:
        """See `SemanticEncoder.encode_window`."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        silence = min(self.silence_tokens, self.max_window_tokens - length)
        extended = F.pad(context_audio, (0, silence * SAMPLES_PER_TOKEN))
        tokens = (num_tokens + self.silence_tokens).clamp(max=self.max_window_tokens)
        return self._encode_extended(extended, tokens)[:, :length]  # (B, N, D)

    def _encode_extended(self, context_audio: Tensor, num_tokens: Tensor) -> Tensor:
        net = self.encoder
        mel = self.log_mel(context_audio, num_tokens).to(net.conv1.weight.dtype)  # (B, bands, 4N)
        mel_frames = token_mask(FRAMES_PER_TOKEN * num_tokens, mel.shape[-1])  # (B, 4N)
        # Zeros between the convolutions: a padded clip then sees what it sees at the end of its own tensor.
        h = F.gelu(net.conv1(mel)).masked_fill(~mel_frames[:, None], 0.0)  # (B, D, 4N)
        h = F.gelu(net.conv2(h)).transpose(1, 2)  # (B, 2N, D)
        h = h.float() + net.embed_positions.weight[: h.shape[1]]  # (B, 2N, D)
        mask = encoder_mask(token_mask(FRAMES_AVERAGED * num_tokens, h.shape[1]), net.conv1.weight.dtype)
        if mask is not None:
            mask = mask.expand(-1, 1, h.shape[1], -1)  # the attention of transformers wants (B, 1, 2N, 2N)
        for layer in net.layers:
            h = layer(h, mask)  # (B, 2N, D)
        return average_frames(net.layer_norm(h))  # (B, N, D)


class WaveSemanticEncoder(SemanticEncoder):
    """WavLM, HuBERT or wav2vec2 on windows of the waveform.

    Their first layer may normalise over the whole clip (`feat_extract_norm="group"`), and they were trained without
    masks, so padding would change a clip. Clips of equal length run together, others apart: nothing is ever padded.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

        kinds = {
            "hubert": (HubertConfig, HubertModel),
            "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
            "wavlm": (WavLMConfig, WavLMModel),
        }
        config_class, model_class = kinds[settings["kind"]]
        config = config_class(**settings["config"])
        stride, field = 1, 1
        for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
            field, stride = field + (kernel - 1) * stride, stride * step
        if stride * FRAMES_AVERAGED != SAMPLES_PER_TOKEN or field - stride > 2 * CONTEXT:
            raise ConfigurationError(
                f"the encoder's convolutions stride by {stride} samples; "
                f"{SAMPLES_PER_TOKEN // FRAMES_AVERAGED} are needed"
            )
        self.extra = field - stride  # samples beyond the strides that give exactly two frames a token
        self.output_dim = config.hidden_size
        self.window_tokens = self.max_window_tokens = _tokens(settings, "window_seconds", 30.0)
        self.normalize = bool(settings.get("normalize", True))
        self.encoder = model_class(config)

    def layers(self) -> Iterable[nn.Module]:
        """See `SemanticEncoder.layers`."""
        return self.encoder.encoder.layers  # type: ignore[no-any-return]

    def encode_window(self, context_audio: Tensor, num_tokens: Tensor, level: Tensor | None) -> Tensor:
        """See `SemanticEncoder.encode_window`."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        dtype = next(self.encoder.parameters()).dtype
        tokens = context_audio.new_zeros(len(num_tokens), length, self.output_dim, dtype=dtype)
        for count in num_tokens.unique().tolist():
            rows = num_tokens == count
            first = CONTEXT - self.extra // 2
            audio = context_audio[rows, first : first + count * SAMPLES_PER_TOKEN + self.extra].float()  # (b, samples)
            if self.normalize:
                variance, mean = torch.var_mean(audio, dim=1, correction=0, keepdim=True)
                audio = (audio - mean) / (variance + 1e-7).sqrt()  # 1e-7 as in Wav2Vec2FeatureExtractor
            frames = self.encoder(audio.to(dtype)).last_hidden_state  # (b, 2·count, D)
            tokens[rows, :count] = average_frames(frames).to(dtype)
        return tokens


def _tokens(settings: dict[str, Any], key: str, default: float) -> int:
    seconds = float(settings.get(key, default))
    tokens = round(seconds * TOKENS_PER_SECOND)
    if seconds < 0 or (key == "window_seconds" and tokens < 1) or abs(tokens - seconds * TOKENS_PER_SECOND) > 1e-6:
        raise ConfigurationError(f"{key} {seconds} must be a multiple of 0.04 s, and a window longer than nothing")
    return tokens


def build_adapter(settings: dict[str, Any]) -> SemanticEncoder:
    """The adapter for `config.semantic_encoder` with fresh weights."""
    adapter: type[nn.Module] = WhisperSemanticEncoder if settings["kind"] == "whisper" else WaveSemanticEncoder
    return adapter(settings)  # type: ignore[return-value]
