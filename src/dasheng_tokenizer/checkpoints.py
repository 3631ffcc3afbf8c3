"""Where weights come from: the embedded default, folders, hub names, and published weights of frozen encoders.

Only safetensors are read. The one exception is a local `.pt` file of the original Dasheng release, read by PyTorch's
restricted unpickler (`weights_only=True`), because its authors publish nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dasheng_tokenizer.checkpoint_sizes import refuse_inflated, refuse_other_weights, stored_shapes
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DashengTokenizerError
from dasheng_tokenizer.files import parse_json

PUBLISHED = "mispeech/dashengtokenizer"
"""Hub name of the authors' weights."""

DASHENG_SIZES = {768: (12, 12), 1280: (32, 16), 1536: (40, 24)}
"""Width → (depth, heads) of the published Dasheng encoders: base, 0.6B (also MiDashengLM's) and 1.2B."""

WHISPER_FIELDS = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
    "activation_function",
)


SIZES = (
    *("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_intermediate_size"),
    *("istft_n_fft", "istft_hop", "upsample_tokens", "n_mels_patch", "hop_length", "semantic_encoder"),
    *("normalize_semantic", "length_mode", "latent_kind", "vae_dim", "vae_depth"),
)
"""Fields of config.json that decide about the weights."""


def embedded_default() -> Path:
    """Folder of the model that ships inside the package."""
    return Path(str(files("dasheng_tokenizer") / "embedded" / "default"))


def load_strictly(load: Callable[..., Any], name: str | Path | None, kwargs: dict[str, Any]) -> Any:
    """Runs transformers' `from_pretrained`; each of its silent or cryptic failures becomes a CheckpointError."""
    source = str(embedded_default() if name is None else name)
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CheckpointError(
            f"{source}: no such folder, and not a hub name of the form OWNER/NAME such as {PUBLISHED}; leave it out "
            "for the embedded default"
        )
    if kwargs.pop("use_safetensors", True) is False:
        raise CheckpointError(f"{source}: only safetensors are loaded; leave use_safetensors out")
    _check_claims(source, kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    # Left to itself, transformers names misshapen weights only in a log; they are named in the error below instead.
    strict = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    # float32 even where the file is float16: half precision is an option for speed, never a surprise.
    defaults = {"dtype": torch.float32}
    try:
        model, info = load(source, **{**defaults, **kwargs, **strict})
    except ConfigurationError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except DashengTokenizerError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}: the weights or config.json are damaged ({error}); download or copy it again"
        ) from error
    except Exception as error:  # of any kind where config.json holds what transformers does not expect
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: no model could be loaded ({reason}). Give a folder with config.json and model.safetensors, a "
            f"hub name such as {PUBLISHED} (needs a network or a filled cache), or nothing for the embedded default"
        ) from error
    for word in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(word) or ())
        if keys:
            listed = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(
                f"{source}: {word.replace('_', ' ')}: {listed}. This is not a complete checkpoint of the architecture "
                "in its config.json; export it again with save_pretrained"
            )
    # Loading makes the parameters anew and forgets that these need no gradient.
    model.freeze_semantic_encoder()
    return (model, info) if wants_info else model


def _check_claims(source: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse what config.json claims and the weights are not, before a model of that size is made.

    Raises:
        CheckpointError: other weights than safetensors, damaged files, or sizes that these weights cannot have.
    """
    from dasheng_tokenizer.configuration import DashengTokenizerConfig
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

    folder = _local_folder(source, kwargs)
    if folder is None or not (folder / "config.json").is_file():
        return  # transformers names what is missing
    refuse_other_weights(folder)
    shapes = stored_shapes(folder)
    try:
        told = parse_json((folder / "config.json").read_bytes())
        if not isinstance(told, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json is damaged ({error}); download or copy it again") from error
    config = kwargs.get("config")  # given by the Auto classes, which read it from the same folder
    if not shapes:
        return
    kind = told.get("model_type", DashengTokenizerConfig.model_type)
    if kind != DashengTokenizerConfig.model_type:
        raise CheckpointError(
            f"{source}: no model could be loaded: its config.json is of the type {kind!r}, not "
            f"{DashengTokenizerConfig.model_type!r}; give a folder or hub name of a tokenizer"
        )
    try:
        if not isinstance(config, DashengTokenizerConfig):
            config = DashengTokenizerConfig(**{key: value for key, value in told.items() if key in SIZES})
        refuse_inflated(source, {key: getattr(config, key) for key in SIZES}, shapes)
        with torch.device("meta"):
            wanted = DashengTokenizerModel(config).state_dict()
    except DashengTokenizerError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except Exception as error:  # what a class of transformers raises for settings that it does not expect
        raise CheckpointError(f"{source}: config.json makes no model ({type(error).__name__}: {error})") from error
    wrong = sorted(name for name, tensor in wanted.items() if shapes.get(name, tensor.shape) != tuple(tensor.shape))
    if wrong:
        raise CheckpointError(
            f"{source}: mismatched keys: {', '.join(wrong[:5])}. This is not a complete checkpoint of the architecture "
            "in its config.json; export it again with save_pretrained"
        )


def _local_folder(source: str, kwargs: Mapping[str, Any]) -> Path | None:
    """The folder, or that of the cache that the hub's JSON and safetensors were downloaded to; None: not to be had."""
    subfolder = kwargs.get("subfolder") or ""
    if Path(source).is_dir():
        return Path(source) / subfolder
    from huggingface_hub import snapshot_download

    options = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], **options)) / subfolder
    except Exception:  # network, names, permissions: transformers says it better
        return None


# ---------------------------------------------------------------------- frozen encoders


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config.json (empty when absent) of a folder, a `.safetensors` file or a Dasheng `.pt` file.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    names = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    refuse_other_weights(path)
    if not names or not names[0].is_file():
        raise CheckpointError(f"{source}: no weights found; give a folder with *.safetensors, or such a file")
    state: dict[str, Tensor] = {}
    try:
        for name in names:
            if name.suffix in (".pt", ".pth"):
                dump = torch.load(name, map_location="cpu", weights_only=True)
                state.update(dump.get("model", dump))
            else:
                state.update(load_file(name))
        config_file = folder / "config.json"
        config = parse_json(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
    except Exception as error:  # many kinds: safetensors, zip, unpickler, JSON
        raise CheckpointError(f"{source}: cannot be read ({error}); download or copy it again") from error
    return state, config


def dasheng_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames Dasheng weights as published elsewhere to this package's keys of the semantic encoder.

    Known layouts: the single-file release (`init_bn.1.weight`, an `outputlayer`), the same under a prefix, and
    MiDashengLM's audio encoder (`audio_encoder.init_bn.weight`, buffers without a dot, optional layer scales
    `ls1.gamma`, folded here into the projections that they multiply).

    Raises:
        CheckpointError: no Dasheng weights among the keys.
    """
    anchor = next((key for key in state if key.endswith("time_pos_embed")), None)
    if anchor is None:
        raise CheckpointError("no key ends in time_pos_embed: these are not weights of a Dasheng encoder")
    prefix = anchor.removesuffix("time_pos_embed")
    renamed: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith(prefix) or "outputlayer" in key:
            continue
        key = key.removeprefix(prefix)
        key = re.sub(r"^init_bn\.(?=[a-z])", "init_bn.1.", key)
        key = re.sub(r"^front_end\.(?:0\.)?spectrogram[._]window$", "front_end.0.spectrogram.window", key)
        key = re.sub(r"^front_end\.(?:0\.)?(?:melscale_fbanks|mel_scale\.fb)$", "front_end.0.mel_scale.fb", key)
        if match := re.fullmatch(r"(blocks\.\d+)\.ls([12])\.gamma", key):
            scales[f"{match[1]}.{'attn.proj' if match[2] == '1' else 'mlp.fc2'}"] = tensor
        else:
            renamed[key] = tensor
    for target, scale in scales.items():
        renamed[f"{target}.weight"] = renamed[f"{target}.weight"] * scale[:, None]
        renamed[f"{target}.bias"] = renamed[f"{target}.bias"] * scale
    return renamed


def _adapter_state(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Strips the prefix under which transformers stores an encoder (`model.encoder.`, `wavlm.`, …) and adds ours."""
    inner = {key.removeprefix("encoder.") for key in wanted if key.startswith("encoder.")}
    prefixes = {key[: len(key) - len(name)] for name in sorted(inner)[:1] for key in state if key.endswith(name)}
    for prefix in sorted(prefixes, key=len):
        found = {
            f"encoder.{key.removeprefix(prefix)}": tensor for key, tensor in state.items() if key.startswith(prefix)
        }
        found = {key: tensor for key, tensor in found.items() if key in wanted}
        if found:
            return found
    return {}


def load_semantic_weights(model: Any, source: str | Path) -> None:
    """Fills the frozen encoder of `model` from published weights; windows and filter banks may be absent there.

    Raises:
        CheckpointError: a weight is missing or of another shape; ConfigurationError: a VAE, which has no such encoder.
    """
    encoder = model.semantic_encoder
    state, _ = read_weights(source)
    wanted = encoder.state_dict()
    dasheng = model.config.semantic_encoder["kind"] == "dasheng"
    found = dasheng_state(state) if dasheng else _adapter_state(state, set(wanted))
    optional = {
        key for key in wanted if "front_end." in key or key.endswith(("num_batches_tracked", "masked_spec_embed"))
    }
    missing = sorted(set(wanted) - set(found) - optional)
    foreign = sorted(set(found) - set(wanted))
    wrong = [key for key in found if key in wanted and found[key].shape != wanted[key].shape]
    for word, keys in (("missing", missing), ("unknown", foreign), ("of another shape", wrong)):
        if keys:
            raise CheckpointError(
                f"{source}: {len(keys)} weights {word}, for example {keys[0]}; is it the right encoder?"
            )
    encoder.load_state_dict({**wanted, **found})
    encoder.requires_grad_(False)


def semantic_settings(source: str | Path) -> dict[str, Any]:
    """Configuration fields of the frozen encoder stored at `source`: `semantic_encoder`, and sizes for Dasheng.

    Raises:
        CheckpointError: unreadable; ConfigurationError: of a kind that is not supported.
    """
    try:
        return _semantic_settings(source)
    except DashengTokenizerError:
        raise
    except Exception as error:  # of any kind where the files hold what nobody expects
        raise CheckpointError(
            f"{source}: cannot be read ({type(error).__name__}: {error}); download it again"
        ) from error


def _semantic_settings(source: str | Path) -> dict[str, Any]:
    state, config = read_weights(source)
    kind = config.get("model_type", "dasheng")
    if any(key.endswith("time_pos_embed") for key in state):
        width = dasheng_state(state)["time_pos_embed"].shape[1]
        depth = 1 + max(int(match[1]) for key in state if (match := re.search(r"blocks\.(\d+)\.", key)))
        heads = config.get("num_heads") or DASHENG_SIZES.get(width, (depth, max(1, width // 64)))[1]
        return {"semantic_encoder": {"kind": "dasheng"}, "embed_dim": width, "depth": depth, "num_heads": heads}
    if kind == "whisper":
        inner = {field: config[field] for field in WHISPER_FIELDS if field in config}
    elif kind in ("wavlm", "hubert", "wav2vec2"):
        from transformers import AutoConfig

        inner = AutoConfig.for_model(**config).to_diff_dict()
    else:
        raise ConfigurationError(f"{source}: model type {kind!r} is no supported frozen encoder")
    settings: dict[str, Any] = {"kind": kind, "config": inner}
    preprocessor = Path(source) / "preprocessor_config.json"
    if kind != "whisper" and preprocessor.is_file():
        settings["normalize"] = bool(parse_json(preprocessor.read_text()).get("do_normalize", True))
    return {"semantic_encoder": settings}


def new_tokenizer(semantic_weights: str | Path, **sizes: Any) -> Any:
    """An untrained tokenizer on the frozen encoder stored at `semantic_weights`.

    Args:
        semantic_weights: folder or file of a Whisper, WavLM, HuBERT, wav2vec2 or Dasheng encoder.
        sizes: fields of DashengTokenizerConfig, such as decoder_embed_dim.

    Raises:
        CheckpointError: unreadable, or settings and weights that do not belong together.
        ConfigurationError: a kind that is not supported, or `sizes` that contradict each other.
    """
    from dasheng_tokenizer.configuration import DashengTokenizerConfig
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

    settings = semantic_settings(semantic_weights)
    config = DashengTokenizerConfig(**{**settings, **sizes})
    state, _ = read_weights(semantic_weights)
    claimed = {key: getattr(config, key) for key in settings}
    refuse_inflated(semantic_weights, claimed, {name: tuple(tensor.shape) for name, tensor in state.items()})
    try:
        model = DashengTokenizerModel(config)
    except DashengTokenizerError:
        raise
    except Exception as error:  # what a class of transformers raises for settings that it does not expect
        raise CheckpointError(
            f"{semantic_weights}: config.json makes no encoder ({type(error).__name__}: {error}); download it again"
        ) from error
    load_semantic_weights(model, semantic_weights)
    return model
