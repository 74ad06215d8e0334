"""Texts that other tokenizers read as control tokens, broken so that they stay text everywhere.

Our own tokenizer never turns text into a control id (`tokens/tokenizer.py`); those of other tools do, and texts leave
this package: exported for them, or sampled by a model that learned them. A space before the last character is enough:
`<|im_end| >`. It is seen, it is undone by deleting it, and what is also an HTML tag (`<s >`) stays one.
"""

from __future__ import annotations

import re
from collections import Counter

BROKEN = "text: control token broken"

# By family: ChatML, GPT, Llama 3, Qwen, Phi, gpt-oss and others; DeepSeek; EXAONE; Llama 1 and 2, Mistral, Gemma, T5;
# chat templates of Llama 2 and Mistral; Gemma's turns; Qwen's tools and thoughts; code models. Left out is what begins
# and ends nothing and is a word of its own, such as SmolLM2's <filename>.
_PLAIN = (
    r"</?s>|<(?:bos|eos|pad|unk)>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|SYSTEM_PROMPT)\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>"
    r"|</?(?:think|tool_call|tool_response)>"
    r"|<fim_(?:prefix|middle|suffix|pad)>"
)
_CONTROL = re.compile(
    rf"<\|[A-Za-z0-9_/.:@-]{{1,64}}\|>|<｜[^<>｜\s]{{1,64}}｜>|\[\|[A-Za-z0-9_/]{{1,64}}\|\]|{_PLAIN}"
)


def _break(text: str, found: Counter[str]) -> str:
    """The text with each control token broken; adds to `found` how many there were, under what was done."""
    text, count = _CONTROL.subn(lambda match: f"{match[0][:-1]} {match[0][-1]}", text)
    if count:
        found[BROKEN] += count
    return text


RULES = ((rf"<\|[A-Za-z0-9_]|<｜|\[\|[A-Za-z]|{_PLAIN}", _break),)
"""What every text with a control token has (for RE2), and how it is broken: (text, found) -> text."""
