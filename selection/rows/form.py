"""Which form the rows of a data file have: the `dataset_format` that LLaMA-Factory needs to read them."""

from typing import Any

from selection.run.errors import UserError

_ROLES = {  # in LLaMA-Factory's sharegpt, then other names in use
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
_DEFAULT_TAGS = {"role_tag": "from", "content_tag": "value"} | {tag: names[0] for tag, names in _ROLES.items()}
_DEFAULT_COLUMNS = ({"prompt": "instruction", "query": "input", "response": "output"}, {"messages": "conversations"})
_TEXT_COLUMNS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_TEXT_COLUMNS += (("instruction", "response"), ("question", "response"), ("context", "response"))
_BESIDE_PROMPT = ("input", "context")  # what the prompt speaks of


def detect_form(columns: list[str], rows: list[dict], source: str) -> tuple[dict[str, Any], list[str]]:
    """How LLaMA-Factory has to read these rows: keys of `dataset_format`, and the columns in use.

    Knows conversations of from/value or role/content messages (columns conversations, messages) and text columns.
    Raises: UserError naming the columns where none of these fits, and for preference data."""
    names, tags = {}, None
    for column in ("messages", "conversations"):
        if not names and column in columns and (tags := _tags(column, rows, source)):
            names = {"messages": column}
    texts = [name for name in columns if not any(isinstance(row[name], list | dict) for row in rows)]
    for prompt, response in _TEXT_COLUMNS:
        if not names and {prompt, response} <= set(texts):
            beside = next((name for name in _BESIDE_PROMPT if name in texts and name != prompt), None)
            names = {"prompt": prompt} | ({"query": beside} if beside else {}) | {"response": response}
    preference = {"chosen", "rejected"} if not names else {"prompt", "completion", "label"}  # TRL's pairs; its KTO
    if preference <= set(columns) and (not names or all(isinstance(row["label"], bool) for row in rows)):
        how = "write the prompt and the good answer alone, as prompt and completion"
        has = ", ".join(sorted(preference))
        raise UserError(f"--data {source}: it is preference data ({has}), every row here is to be learnt: {how}")
    if not names:
        known = "".join(f"{prompt} and {response}, " for prompt, response in _TEXT_COLUMNS) + "messages, conversations"
        how = "name them, e.g. --set dataset_format.columns.prompt=… --set dataset_format.columns.response=…"
        raise UserError(f"--data {source}: its columns ({', '.join(columns)}) have no known form ({known}): {how}")
    names |= {"system": "system"} if "system" in columns else {}
    form = {"formatting": "sharegpt" if tags else "alpaca"}  # and what differs from LLaMA-Factory's defaults
    form |= {"columns": names} if names not in _DEFAULT_COLUMNS else {}
    form |= {"tags": tags} if tags not in (None, _DEFAULT_TAGS) else {}
    return form, list(names.values())


def _tags(column: str, rows: list[dict], source: str) -> dict[str, str] | None:
    """The tags of a column of messages; None where it holds something else.

    role/content is read as sharegpt with other tags: "openai" would add a sentence to every system prompt."""
    messages = [message for row in rows for message in (row[column] if isinstance(row[column], list) else [None])]
    pairs = [("from", "value"), ("role", "content")]
    pairs = [pair for pair in pairs if all(isinstance(m, dict) and set(pair) <= set(m) for m in messages)]
    if not messages or not pairs:
        return None
    role, content = pairs[0]
    tags = _DEFAULT_TAGS | {"role_tag": role, "content_tag": content}
    tags |= {"user_tag": "user", "assistant_tag": "assistant"} if role == "role" else {}
    roles = {str(message[role]) for message in messages}
    for name, words in _ROLES.items():
        if len(found := roles.intersection(words)) == 1:
            tags[name] = found.pop()
    if (strange := roles - {tags[name] for name in _ROLES}) or any(message.get("tool_calls") for message in messages):
        what = f"roles {', '.join(sorted(strange))}" if strange else "tool_calls"
        raise UserError(f"--data {source}: {column} has {what}: say how to read it, with --set dataset_format.…")
    return tags
