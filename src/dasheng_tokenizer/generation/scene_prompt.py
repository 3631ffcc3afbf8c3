"""Structured prompts of the published sibling generator: one scene, told in parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dasheng_tokenizer.errors import TextError

TAGS = {
    "caption": "caption",
    "speech": "speech",
    "transcript": "asr",
    "sfx": "sfx",
    "music": "music",
    "ambience": "env",
}
"""Part → its published tag, in the published order. The tags are plain text for the text encoder."""

_TAG = re.compile(r"<\|(.*?)\|>")


@dataclass(frozen=True)
class ScenePrompt:
    """What shall be heard, told as a whole and in parts.

        ScenePrompt("A woman greets the crowd over soft piano", transcript="Good evening, everyone", music="soft piano")

    Attributes:
        caption: the whole scene; must be there.
        speech: who speaks, and how.
        transcript: the words that are spoken.
        sfx: sound effects.
        music: music.
        ambience: surroundings.

    Raises:
        TextError: no caption, a part that is no string or empty, or one that holds a tag.
    """

    caption: str
    speech: str | None = None
    transcript: str | None = None
    sfx: str | None = None
    music: str | None = None
    ambience: str | None = None

    def __post_init__(self) -> None:
        """Refuse parts that would make another prompt than meant."""
        for name in TAGS:
            text = getattr(self, name)
            if text is None and name != "caption":
                continue
            if not isinstance(text, str):
                raise TextError(f"the {name} of the prompt is of type {type(text).__name__}; give a string")
            if not text.strip():
                hint = "tell what shall be heard" if name == "caption" else "leave the part out, or say what it is"
                raise TextError(f"the {name} of the prompt is empty; {hint}")
            if tag := _TAG.search(text):
                raise TextError(f"the {name} of the prompt holds the tag {tag[0]}; give each part by its own name")

    def __str__(self) -> str:
        """The one string that the text encoder reads."""
        parts = {name: getattr(self, name) for name in TAGS}
        return " ".join(f"<|{TAGS[name]}|> {text.strip()}" for name, text in parts.items() if text is not None)

    @property
    def parts(self) -> dict[str, str]:
        """The parts beside the caption that are there."""
        held = {name: getattr(self, name) for name in TAGS if name != "caption"}
        return {name: text for name, text in held.items() if text is not None}

    @classmethod
    def of(cls, text: str | ScenePrompt, parts: Mapping[str, str] | None = None) -> ScenePrompt:
        """From a caption and parts, or from a whole prompt with tags, which must begin with the caption's.

        Raises:
            TextError: an unknown tag or part, a tag twice, a part given in both ways, no caption, or what the class
                refuses.
        """
        if isinstance(text, ScenePrompt):
            if parts:
                raise TextError("the prompt has its parts already; put them all into one ScenePrompt")
            return text
        if not isinstance(text, str):
            raise TextError(f"a prompt is of type {type(text).__name__}; give a string or a ScenePrompt")
        held = _parsed(text) if _TAG.search(text) else {"caption": text}
        for name, part in (parts or {}).items():
            if name not in TAGS or name == "caption":
                raise TextError(f"unknown part {name!r} of a prompt; known are {', '.join(list(TAGS)[1:])}")
            if name in held:
                raise TextError(f"the {name} is in the prompt already; give it once")
            held[name] = part
        if "caption" not in held:
            raise TextError("the prompt has no caption; begin it with <|caption|> and what shall be heard")
        return cls(**held)


def _parsed(text: str) -> dict[str, str]:
    """A string with tags → its parts."""
    names = {tag: name for name, tag in TAGS.items()}
    before, *pieces = _TAG.split(text)  # text, tag, text, tag, …
    if before.strip() or pieces[0] != "caption":
        raise TextError(f"a prompt with tags must begin with <|caption|>, not with {text[:30]!r}")
    held: dict[str, str] = {}
    for tag, part in zip(pieces[::2], pieces[1::2], strict=True):
        if tag not in names:
            raise TextError(f"unknown tag <|{tag}|>; known are {', '.join(f'<|{known}|>' for known in names)}")
        if names[tag] in held:
            raise TextError(f"the tag <|{tag}|> is there twice; give each part once")
        held[names[tag]] = part.strip()
    return held
