"""A trained model's tokenizer as transformers knows it, and prompts by its chat template."""

from __future__ import annotations

from typing import Any

from dist.errors import ConfigError
from recipes.trained import Trained


def hf_tokenizer(trained: Trained) -> Any:
    """transformers' tokenizer of the model, with its special tokens and chat template (if any)."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer.from_buffer(trained.tokenizer_json)
    special = trained.special
    ids = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
    names = {name: made.id_to_token(number) for name, number in ids.items() if number is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=trained.template or None, **names
    )


def chat_ids(tokenizer: Any, message: str, system: str = "") -> list[int]:
    """Ids of a user's message as the template puts it, up to where the assistant speaks."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise ConfigError(f"the chat template refuses this conversation: {error}") from None
    return list(tokenizer.encode(text, add_special_tokens=False))


def require_template(trained: Trained) -> None:
    """ConfigError where the model has no chat template."""
    if not trained.template:
        raise ConfigError(
            f"{trained.place.path} has no chat template: it was not trained on a dataset of "
            "`leyden prep chat`, and its folder holds no chat_template.jinja; leave out --chat"
        )
