"""What the model checks of its input, with messages that say what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from dasheng_tokenizer.errors import AudioError, LatentError, MaskError
from dasheng_tokenizer.semantic_encoder import token_mask


def check_audio(audio: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Number of real samples, (B,), of each clip of a batch (B, S) with a mask (B, S) or none.

    Raises:
        AudioError, MaskError: as `DashengTokenizerModel.forward`.
    """
    if not isinstance(audio, Tensor):
        raise AudioError(
            f"audio is a {type(audio).__name__}; expected a tensor (batch, samples) at 16 kHz: use "
            "torch.from_numpy(array), or model.compress, which takes arrays of any rate and channels"
        )
    if audio.ndim != 2 or audio.shape[0] == 0 or audio.shape[1] == 0:
        raise AudioError(
            f"audio has shape {tuple(audio.shape)}; expected (batch, samples) with at least one sample. For one clip "
            "use audio[None], for files of any rate and channels use model.compress"
        )
    if not audio.is_floating_point():
        raise AudioError(
            f"audio has type {audio.dtype}; expected floating point at full scale 1 (int16: divide by 32768)"
        )
    samples = torch.full((len(audio),), audio.shape[1], device=audio.device)
    if torch.compiler.is_compiling():  # data-dependent checks cannot be traced
        return samples if padding_mask is None else padding_mask.sum(1)
    finite = torch.isfinite(audio)
    if not bool(finite.all()):
        item, sample = (~finite).nonzero()[0].tolist()
        raise AudioError(
            f"audio holds NaN or infinity, first in clip {item} at sample {sample}; remove or repair that clip"
        )
    return samples if padding_mask is None else _check_mask(padding_mask, audio.shape)


def _check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Number of real samples of each clip, (B,), of a mask that is true for them."""
    if mask.shape != shape:
        raise MaskError(f"padding_mask has shape {tuple(mask.shape)}; expected that of the audio, {tuple(shape)}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise MaskError("padding_mask must be boolean or hold only 0 and 1; true or 1 marks real samples")
    mask = mask.bool()
    samples = mask.sum(1)  # (B,)
    for item, contiguous in enumerate((mask == token_mask(samples, mask.shape[1])).all(1).tolist()):
        if not contiguous:
            where = "on the left" if not bool(mask[item, 0]) else "in the middle"
            raise MaskError(f"padding_mask hides samples {where} of clip {item}; pad on the right only")
    if int(samples.min()) == 0:
        raise MaskError(
            f"padding_mask hides every sample of clip {int(samples.argmin())}; leave such clips out of the batch"
        )
    return samples


def check_latents(latents: Tensor, width: int) -> None:
    """Refuses what is not (B, T, width) of finite numbers.

    Raises:
        LatentError: as `DashengTokenizerModel.decode`.
    """
    if latents.ndim != 3 or latents.shape[1] == 0 or latents.shape[2] != width:
        raise LatentError(
            f"latents have shape {tuple(latents.shape)}; expected (batch, tokens ≥ 1, {width}), the latent width of "
            "this model"
        )
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(latents).all()):
        raise LatentError("latents hold NaN or infinity; check where they come from, the decoder would spread them")
